/*
 * Generation for sm_90a: attention_step and rat_step, one query per sequence and head against a
 * cache [B, H, slots, d], d = 64 or 128.
 *
 *   producer   (a warp) streams tiles of 64 keys and values into a two-stage ring with bulk copies,
 *              and the rows of the new token in a ring of their own
 *   consumers  (four warps) take sixteen keys of each tile: d/8 lanes share a key, 16 bytes each
 * Blocks draw their work by ticket, since multiprocessors do not all get the same bandwidth: whole
 * (sequence, head) pairs first, then pieces of the last pairs, so that all blocks end together. The
 * piece that is done last merges all of its pair.
 *
 * The new token never travels through the cache: its score and value start the online softmax of
 * the block that has the pair's first tile, which also writes the cache slot. In RAT that block
 * updates the running state as well.
 *
 * The first tiles are under way before the projection ahead in the stream has ended. So its direct
 * predecessor must not be what writes *position or the cache; in a layer it is the projection.
 *
 * Limit: the bytes of the cache: 4.6 TB/s at B = 512, T = 4096. For few sequences fences and the
 * ends of kernels, which wait for all loads in flight on the multiprocessor, those of the next
 * kernel too: a RAT block at T = 131072 takes 35.7 us, its bytes 22.6. docs/kernels/step.md.
 */
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"
#include "kernels/hopper/step.cuh"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int STAGES = 2, HEADERS = 2, BLOCKS_PER_SM = 3;
constexpr int CONSUMER_WARPS = 4, CONSUMERS = CONSUMER_WARPS * 32, THREADS = CONSUMERS + 32;
/* What both operations share; RAT's fields are unused otherwise. */
struct parameters {
	int n_heads, q_heads, pairs, slots, window, chunk;
	bool rope;
	float scale;
	const int32_t *position;
	bf16_view q, k, v, z, gate, k_cache, v_cache, out;
	const float *gate_bias;
	float *k_state, *v_state;
	int cut;           /* how many pairs are cut */
	int pieces, round; /* into how many pieces: at most, and for each block to have one */
	float *partials;   /* [cut * pieces][d + 4] */
};

/*
 * Tickets drawn, and pieces of each cut pair that are done. Each counter wraps
 * to zero with the last increment of a launch, so no launch has to clear them;
 * a launch that fails to end takes the whole module with it. Launches must not
 * overlap: the backend has one stream.
 */
__device__ unsigned int ticket, pieces_done[MAX_BLOCKS];

template <bool RAT> __device__ history history_at(const parameters &p, int position)
{
	history h;

	if (RAT) {
		h.count = position / p.chunk;
		h.first = 0;
	} else {
		h.count = p.window < 0 ? position : min(position, p.window);
		h.first = (position - h.count) % p.slots;
	}
	h.tiles = max((h.count + TILE - 1) / TILE, 1);
	return h;
}

/*
 * Rows of a header, D*2 bytes each, except those of floats D*4; the last says what
 * is to be done.
 */
enum {
	ROW_Q,
	ROW_K,
	ROW_V,
	ROW_Z,
	ROW_GATE,
	ROW_BIAS,
	ROW_K_STATE = 7,
	ROW_V_STATE = 9,
	ROW_WORK = 11,
	HEADER_ROWS
};

/* Floats of a partial result in memory: o, maximum, sum, and padding to 16 bytes. */
template <int D> constexpr int PARTIAL = D + 4;

template <int D> struct shared_layout {
	static constexpr int HALF = TILE * D * 2; /* bytes of a stage's keys, then its values */
	static constexpr int HEADERS_AT = STAGES * 2 * HALF;
	static constexpr int BARRIERS = HEADERS_AT + HEADERS * HEADER_ROWS * D * 2;
	static constexpr int TABLE = BARRIERS + 2 * (STAGES + HEADERS) * 8; /* cos, sin [D/2] */
	static constexpr int MERGE = TABLE + D * 4; /* [warps][D + 4] floats */
	static constexpr int FLAG = MERGE + CONSUMER_WARPS * PARTIAL<D> * 4;
	static constexpr int BYTES = FLAG + 16;
};

/* Barriers, 8 bytes each. */
enum {
	BAR_FULL,
	BAR_EMPTY = BAR_FULL + STAGES,
	BAR_HEADER_FULL = BAR_EMPTY + STAGES,
	BAR_HEADER_EMPTY = BAR_HEADER_FULL + HEADERS
};

/* What the new token brings for one pair; all pieces need q and z, only the first the rest. */
template <int D, bool RAT>
__device__ __forceinline__ void load_header(const parameters &p, const work &w, uint32_t header,
                                            uint32_t full)
{
	const int b = w.pair / p.n_heads, h = w.pair - b * p.n_heads;
	const bool token = w.first == 0;
	const int bytes = D * 2;

	barrier_arrive_expect(full, (token ? RAT ? 11 : 3 : RAT ? 2 : 1) * bytes);
	bulk_load(header + ROW_Q * bytes, p.q.at(b, h % p.q_heads), bytes, full);
	if (RAT)
		bulk_load(header + ROW_Z * bytes, p.z.at(b, h), bytes, full);
	if (!token)
		return;
	bulk_load(header + ROW_K * bytes, p.k.at(b, h % p.q_heads), bytes, full);
	bulk_load(header + ROW_V * bytes, p.v.at(b, h), bytes, full);
	if (RAT) {
		const int64_t state = (static_cast<int64_t>(b) * p.n_heads + h) * D;

		bulk_load(header + ROW_GATE * bytes, p.gate.at(b, h), bytes, full);
		bulk_load(header + ROW_BIAS * bytes, p.gate_bias + h * D, 2 * bytes, full);
		bulk_load(header + ROW_K_STATE * bytes, p.k_state + state, 2 * bytes, full);
		bulk_load(header + ROW_V_STATE * bytes, p.v_state + state, 2 * bytes, full);
	}
}

/* `count` rows of a ring of slots, from `slot` on. */
template <int D>
__device__ __forceinline__ void load_rows(uint32_t shared, const __nv_bfloat16 *cache, int slot,
                                          int count, int slots, uint32_t full, uint64_t policy)
{
	const int straight = min(count, slots - slot);

	bulk_load(shared, cache + static_cast<int64_t>(slot) * D, straight * D * 2, full, policy);
	if (count > straight)
		bulk_load(shared + straight * D * 2, cache, (count - straight) * D * 2, full,
		          policy);
}

template <int D> __device__ __forceinline__ void post_work(uint32_t header, const work &w)
{
	shared_store(header + ROW_WORK * D * 2, w.pair);
	shared_store(header + ROW_WORK * D * 2 + 4, w.first);
	shared_store(header + ROW_WORK * D * 2 + 8, w.end);
}

template <int D> __device__ __forceinline__ work read_work(uint32_t header)
{
	return {shared_load(header + ROW_WORK * D * 2), shared_load(header + ROW_WORK * D * 2 + 4),
	        shared_load(header + ROW_WORK * D * 2 + 8)};
}

/* The producer's rings. */
template <int D, bool RAT> struct producer {
	using layout = shared_layout<D>;

	const parameters &p;
	const history &past;
	uint32_t shared;
	uint64_t policy;
	slot_ring<STAGES> stage;
	slot_ring<HEADERS> header;

	__device__ uint32_t barrier(int index) const
	{
		return shared + layout::BARRIERS + index * 8;
	}

	__device__ void post(const work &w)
	{
		const uint32_t rows =
		        shared + layout::HEADERS_AT + header.slot * HEADER_ROWS * D * 2;
		const uint32_t full = barrier(BAR_HEADER_FULL + header.slot);

		barrier_wait(barrier(BAR_HEADER_EMPTY + header.slot), header.parity ^ 1);
		post_work<D>(rows, w);
		if (w.pair >= 0)
			load_header<D, RAT>(p, w, rows, full);
		else
			barrier_arrive(full);
		header.advance();
	}

	__device__ void stream(const work &w)
	{
		const int b = w.pair / p.n_heads, h = w.pair - b * p.n_heads;
		const __nv_bfloat16 *k = p.k_cache.at(b, h), *v = p.v_cache.at(b, h);

		for (int i = w.first; i < w.end; i++) {
			const int count = min(TILE, past.count - i * TILE);
			const int slot = (past.first + i * TILE) % p.slots;
			const uint32_t full = barrier(BAR_FULL + stage.slot);
			const uint32_t keys = shared + stage.slot * 2 * layout::HALF;

			barrier_wait(barrier(BAR_EMPTY + stage.slot), stage.parity ^ 1);
			barrier_arrive_expect(full, count * D * 4);
			if (count > 0) {
				load_rows<D>(keys, k, slot, count, p.slots, full, policy);
				load_rows<D>(keys + layout::HALF, v, slot, count, p.slots, full,
				             policy);
			}
			stage.advance();
		}
	}
};

template <int D, bool RAT>
__device__ __forceinline__ void produce(const parameters &p, const history &past, const schedule &s,
                                        uint32_t shared)
{
	producer<D, RAT> out = {p, past, shared, policy_evict_first(), {}, {}};

	if (blockIdx.x < s.chunks) {
		/* The cache is older than the kernel before; the new token and the tickets are not.
		 */
		work w = chunk_at(s, past, blockIdx.x);
		const int early = min(w.first + EARLY, w.end);

		out.stream({w.pair, w.first, early});
		wait_for_previous();
		/* Every chunk taken draws one ticket: s.chunks in all, after which the counter is
		 * zero. */
		int next = gridDim.x + atomicInc(&ticket, s.chunks - 1);
		out.post(w);
		out.stream({w.pair, early, w.end});
		while (next < s.chunks) {
			w = chunk_at(s, past, next);
			next = gridDim.x + atomicInc(&ticket, s.chunks - 1);
			out.post(w);
			out.stream(w);
		}
	}
	let_next_begin();
	out.post({-1, 0, 0});
}

__device__ __forceinline__ void load_eight(float (&x)[8], uint32_t shared)
{
	uint4 packed;

	asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
	             : "r"(shared));
	unpack_bf16(x, packed);
}

__device__ __forceinline__ void load_eight_floats(float (&x)[8], uint32_t shared)
{
#pragma unroll
	for (int i = 0; i < 8; i += 4)
		asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
		             : "=f"(x[i]), "=f"(x[i + 1]), "=f"(x[i + 2]), "=f"(x[i + 3])
		             : "r"(shared + i * 4));
}

/* Sum over the lanes that share a key. */
template <int LANES> __device__ __forceinline__ float sum_lanes(float x)
{
#pragma unroll
	for (int offset = LANES / 2; offset > 0; offset /= 2)
		x += __shfl_xor_sync(~0u, x, offset);
	return x;
}

template <int LANES> __device__ __forceinline__ float dot(const float (&a)[8], const float (&b)[8])
{
	float sum = 0;
#pragma unroll
	for (int i = 0; i < 8; i++)
		sum = fmaf(a[i], b[i], sum);
	return sum_lanes<LANES>(sum);
}

/* Rotate-half: channel i of the first half pairs with i + D/2; `x` are this lane's eight. */
template <int D>
__device__ __forceinline__ void rotate(float (&x)[8], const float *table, int channel)
{
	const bool second = channel >= D / 2;
	const float *cosine = table + (channel & (D / 2 - 1)), *sine = cosine + D / 2;
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float other = __shfl_xor_sync(~0u, x[i], D / 16);

		x[i] = x[i] * cosine[i] + (second ? other : -other) * sine[i];
	}
}

/* RAT's running pair after this token: g*old + (1-g)*x, old zero before a chunk's first token. */
__device__ __forceinline__ void update_state(float *state, float (&x)[8], const float (&g)[8],
                                             uint32_t old_state, bool reset, bool write)
{
	float old[8];

	load_eight_floats(old, old_state);
#pragma unroll
	for (int i = 0; i < 8; i++)
		x[i] = fmaf(g[i], reset ? 0.0f : old[i], (1.0f - g[i]) * x[i]);
	if (write) {
		float4 *packed = reinterpret_cast<float4 *>(state);

		packed[0] = make_float4(x[0], x[1], x[2], x[3]);
		packed[1] = make_float4(x[4], x[5], x[6], x[7]);
	}
}

/*
 * The new token of a pair: score into own.max, value into own.o, and the cache
 * slot (RAT: the state, and the slot at a chunk's end) written. `q` unrotated.
 * Called by whole warps; only lanes with `write` store.
 */
template <int D, bool RAT>
__device__ __forceinline__ void take_token(const parameters &p, int b, int h, int position,
                                           int channel, bool write, uint32_t header,
                                           const float (&q)[8], const float *table, partial &own)
{
	float k[8], v[8];
	bool store = write;
	int slot = 0;

	load_eight(k, header + (ROW_K * D + channel) * 2);
	load_eight(v, header + (ROW_V * D + channel) * 2);
	if (RAT) {
		const int64_t state = (static_cast<int64_t>(b) * p.n_heads + h) * D + channel;
		const int offset = position % p.chunk;
		float g[8], bias[8];

		load_eight(g, header + (ROW_GATE * D + channel) * 2);
		load_eight_floats(bias, header + ROW_BIAS * D * 2 + channel * 4);
#pragma unroll
		for (int i = 0; i < 8; i++)
			g[i] = 1.0f / (1.0f + __expf(-g[i] - bias[i]));
		update_state(p.k_state + state, k, g, header + ROW_K_STATE * D * 2 + channel * 4,
		             offset == 0, write);
		update_state(p.v_state + state, v, g, header + ROW_V_STATE * D * 2 + channel * 4,
		             offset == 0, write);
		store = write && offset == p.chunk - 1;
		slot = position / p.chunk;
	} else {
		slot = position % p.slots;
	}
	own.max = dot<D / 8>(q, k) * p.scale * LOG2E;
	own.sum = 1.0f;
#pragma unroll
	for (int i = 0; i < 8; i++)
		own.o[i] = v[i];
	if (p.rope)
		rotate<D>(k, table, channel);
	if (store) {
		store_eight(p.k_cache.at(b, h) + static_cast<int64_t>(slot) * D + channel, k);
		store_eight(p.v_cache.at(b, h) + static_cast<int64_t>(slot) * D + channel, v);
	}
}

/* Folds this warp's eight keys of a tile, of which `count` in the tile are real. */
template <int D>
__device__ __forceinline__ void fold_tile(partial &mine, const float (&q)[8], uint32_t keys,
                                          int count, int first, int channel)
{
	constexpr int GROUPS = 32 / (D / 8), ROUNDS = TILE / CONSUMER_WARPS / GROUPS;
	float score[ROUNDS], top = mine.max;

#pragma unroll
	for (int r = 0; r < ROUNDS; r++) {
		float k[8];

		load_eight(k, keys + ((first + r * GROUPS) * D + channel) * 2);
		score[r] = dot<D / 8>(q, k);
		if (first + r * GROUPS >= count)
			score[r] = -INFINITY;
		top = fmaxf(top, score[r]);
	}
	const float safe = top == -INFINITY ? 0.0f : top, rescale = exp2_approx(mine.max - safe);

	mine.max = top;
	mine.sum *= rescale;
#pragma unroll
	for (int i = 0; i < 8; i++)
		mine.o[i] *= rescale;
#pragma unroll
	for (int r = 0; r < ROUNDS; r++) {
		const float weight = exp2_approx(score[r] - safe);
		float v[8];

		if (first + r * GROUPS < count) {
			load_eight(v, keys + shared_layout<D>::HALF +
			                      ((first + r * GROUPS) * D + channel) * 2);
			mine.sum += weight;
#pragma unroll
			for (int i = 0; i < 8; i++)
				mine.o[i] = fmaf(weight, v[i], mine.o[i]);
		}
	}
}

/* The warps' partials into every lane group of warp 0; others return with nothing. */
template <int D>
__device__ __forceinline__ void merge_block(partial &mine, float *scratch, int warp, int lane)
{
	const int channel = lane % (D / 8) * 8;

#pragma unroll
	for (int offset = D / 8; offset < 32; offset *= 2) {
		float o[8];
		const float max = __shfl_xor_sync(~0u, mine.max, offset);
		const float sum = __shfl_xor_sync(~0u, mine.sum, offset);
#pragma unroll
		for (int i = 0; i < 8; i++)
			o[i] = __shfl_xor_sync(~0u, mine.o[i], offset);
		merge(mine, max, sum, o);
	}
	named_barrier_sync(1, CONSUMERS); /* the previous pair's partials have been read */
	float *slot = scratch + warp * PARTIAL<D>;
	if (lane < D / 8) {
#pragma unroll
		for (int i = 0; i < 8; i += 4)
			*reinterpret_cast<float4 *>(slot + channel + i) =
			        make_float4(mine.o[i], mine.o[i + 1], mine.o[i + 2], mine.o[i + 3]);
		if (lane == 0)
			*reinterpret_cast<float2 *>(slot + D) = make_float2(mine.max, mine.sum);
	}
	named_barrier_sync(1, CONSUMERS);
	for (int w = 1; warp == 0 && w < CONSUMER_WARPS; w++) {
		const float *other = scratch + w * PARTIAL<D>;
		const float2 weight = *reinterpret_cast<const float2 *>(other + D);
		float o[8];
#pragma unroll
		for (int i = 0; i < 8; i += 4)
			unpack_four(o + i, *reinterpret_cast<const float4 *>(other + channel + i));
		merge(mine, weight.x, weight.y, o);
	}
}

/*
 * Puts this piece of a cut pair, which warp 0 holds, beside the others. True,
 * in all warps, if it was the last: then `mine` is this lane's share of all.
 */
template <int D>
__device__ __forceinline__ bool merge_pieces(const parameters &p, partial &mine, const schedule &s,
                                             const work &w, uint32_t flag, int warp, int lane)
{
	constexpr int GROUPS = 32 / (D / 8);
	const int cut = w.pair - s.whole, channel = lane % (D / 8) * 8;
	float *const all = p.partials + static_cast<int64_t>(cut) * s.pieces * PARTIAL<D>;

	if (warp == 0) {
		float *target = all + w.first / s.length * PARTIAL<D>;

		if (lane < D / 8) {
#pragma unroll
			for (int i = 0; i < 8; i += 4)
				__stcg(reinterpret_cast<float4 *>(target + channel + i),
				       make_float4(mine.o[i], mine.o[i + 1], mine.o[i + 2],
				                   mine.o[i + 3]));
			if (lane == 0)
				__stcg(reinterpret_cast<float2 *>(target + D),
				       make_float2(mine.max, mine.sum));
		}
		__syncwarp();
		if (lane == 0)
			shared_store(flag, increment_wrapping(pieces_done + cut, s.pieces - 1) ==
			                           s.pieces - 1);
	}
	named_barrier_sync(1, CONSUMERS);
	if (!shared_load(flag))
		return false;
	/* Each piece is always taken by the same lanes, so that the result is always the same. */
	mine = {-INFINITY, 0, {}};
#pragma unroll 4
	for (int piece = warp * GROUPS + lane / (D / 8); piece < s.pieces;
	     piece += CONSUMER_WARPS * GROUPS) {
		const float *other = all + piece * PARTIAL<D>;
		const float2 weight = __ldcg(reinterpret_cast<const float2 *>(other + D));
		float o[8];
#pragma unroll
		for (int i = 0; i < 8; i += 4)
			unpack_four(o + i,
			            __ldcg(reinterpret_cast<const float4 *>(other + channel + i)));
		merge(mine, weight.x, weight.y, o);
	}
	return true;
}

template <int D, bool RAT>
__device__ __forceinline__ void write_out(const parameters &p, partial &mine, int b, int h,
                                          uint32_t header, int lane)
{
	const int channel = lane % (D / 8) * 8;
	const float inverse = 1.0f / mine.sum;

#pragma unroll
	for (int i = 0; i < 8; i++)
		mine.o[i] *= inverse;
	if (RAT) {
		float z[8];

		load_eight(z, header + (ROW_Z * D + channel) * 2);
#pragma unroll
		for (int i = 0; i < 8; i++)
			mine.o[i] /= 1.0f + __expf(-z[i]);
	}
	if (lane < D / 8)
		store_eight(p.out.at(b, h) + channel, mine.o);
}

template <int D, bool RAT>
__device__ __forceinline__ void consume(const parameters &p, const history &past, const schedule &s,
                                        int position, uint32_t shared, const float *table,
                                        float *scratch)
{
	using layout = shared_layout<D>;
	const uint32_t barriers = shared + layout::BARRIERS;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const int channel = lane % (D / 8) * 8, group = lane / (D / 8);
	const int first = warp * (TILE / CONSUMER_WARPS) + group;
	slot_ring<STAGES> stage;
	slot_ring<HEADERS> header;

	while (true) {
		const uint32_t rows =
		        shared + layout::HEADERS_AT + header.slot * HEADER_ROWS * D * 2;
		partial mine = {-INFINITY, 0, {}};
		float q[8];

		barrier_wait(barriers + (BAR_HEADER_FULL + header.slot) * 8, header.parity);
		const work w = read_work<D>(rows);
		if (w.pair < 0)
			return;
		const int b = w.pair / p.n_heads, h = w.pair - b * p.n_heads;
		load_eight(q, rows + (ROW_Q * D + channel) * 2);
		if (w.first == 0 && warp == 0) {
			take_token<D, RAT>(p, b, h, position, channel, group == 0, rows, q, table,
			                   mine);
			if (group != 0)
				mine = {-INFINITY, 0, {}};
		}
		if (p.rope)
			rotate<D>(q, table, channel);
#pragma unroll
		for (int i = 0; i < 8; i++)
			q[i] *= p.scale * LOG2E;
		for (int i = w.first; i < w.end; i++) {
			barrier_wait(barriers + (BAR_FULL + stage.slot) * 8, stage.parity);
			fold_tile<D>(mine, q, shared + stage.slot * 2 * layout::HALF,
			             past.count - i * TILE, first, channel);
			warp_arrive(barriers + (BAR_EMPTY + stage.slot) * 8);
			stage.advance();
		}
		merge_block<D>(mine, scratch, warp, lane);
		bool done = w.pair < s.whole || s.pieces == 1;
		if (!done) {
			done = merge_pieces<D>(p, mine, s, w, shared + layout::FLAG, warp, lane);
			if (done)
				merge_block<D>(mine, scratch, warp, lane);
		}
		if (warp == 0 && done)
			write_out<D, RAT>(p, mine, b, h, rows, lane);
		warp_arrive(barriers + (BAR_HEADER_EMPTY + header.slot) * 8);
		header.advance();
	}
}

template <int D, bool RAT>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        step_kernel(const __grid_constant__ parameters p)
{
	using layout = shared_layout<D>;
	extern __shared__ __align__(128) char memory[];
	const uint32_t shared = shared_address(memory);
	float *table = reinterpret_cast<float *>(memory + layout::TABLE);
	float *scratch = reinterpret_cast<float *>(memory + layout::MERGE);
	const int position = *p.position;

	if (threadIdx.x == 0) {
		const uint32_t barriers = shared + layout::BARRIERS;

		for (int i = 0; i < STAGES; i++) {
			barrier_init(barriers + (BAR_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_EMPTY + i) * 8, CONSUMER_WARPS);
		}
		for (int i = 0; i < HEADERS; i++) {
			barrier_init(barriers + (BAR_HEADER_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_HEADER_EMPTY + i) * 8, CONSUMER_WARPS);
		}
		barrier_init_fence();
	}
	__syncthreads();
	const history past = history_at<RAT>(p, position);
	const schedule s = schedule_of(p, past);

	if (threadIdx.x >= CONSUMERS) {
		if (threadIdx.x == CONSUMERS)
			produce<D, RAT>(p, past, s, shared);
		return;
	}
	if (p.rope)
		fill_table<D>(table, RAT ? position / p.chunk : position);
	named_barrier_sync(1, CONSUMERS);
	consume<D, RAT>(p, past, s, position, shared, table, scratch);
}

template <int D, bool RAT> enum status launch(struct device *device, const parameters &p)
{
	return launch_early(device, step_kernel<D, RAT>,
	                    split_of(device, p.pairs, BLOCKS_PER_SM).blocks, THREADS,
	                    shared_layout<D>::BYTES, p);
}

const char *unsupported_shape(const struct device *device, int64_t d_head,
                              const struct view *k_cache, const struct view *v_cache)
{
	if (!cuda_is_hopper(device))
		return "needs compute capability 9.0";
	if (d_head != 64 && d_head != 128)
		return "head width must be 64 or 128";
	if (k_cache->token != d_head || v_cache->token != d_head)
		return "the cache of a head must be contiguous";
	if (!aligned(*k_cache) || !aligned(*v_cache))
		return "views must be 16-byte aligned";
	return NULL;
}

size_t workspace_bytes(const struct device *device, int64_t pairs, int64_t d_head)
{
	const split s = split_of(device, pairs, BLOCKS_PER_SM);

	return static_cast<size_t>(s.cut) * s.pieces * (d_head + 4) * sizeof(float);
}

/* What both operations have. */
template <typename Args>
parameters parameters_of(const struct device *device, const Args *a, void *workspace)
{
	parameters p = {};

	p.n_heads = static_cast<int>(a->n_heads);
	p.pairs = static_cast<int>(a->batch * a->n_heads);
	p.rope = a->rope;
	p.scale = a->scale;
	p.position = a->position;
	p.q = of(a->q);
	p.k = of(a->k);
	p.v = of(a->v);
	p.out = of(a->out);
	const split s = split_of(device, p.pairs, BLOCKS_PER_SM);
	p.cut = s.cut;
	p.pieces = s.pieces;
	p.round = s.round;
	p.partials = static_cast<float *>(workspace);
	return p;
}

} // namespace

extern "C" const char *hopper_attention_step_unsupported(const struct device *device,
                                                         const void *args)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);

	if (a->kv_heads != a->n_heads)
		return "heads that share keys have a kernel of their own";
	if (a->rope && a->rope_width > 0 && a->rope_width != a->d_head)
		return "a part of a head that is rotated";
	if (!aligned(a->q) || !aligned(a->k) || !aligned(a->v) || !aligned(a->out))
		return "views must be 16-byte aligned";
	return unsupported_shape(device, a->d_head, &a->k_cache, &a->v_cache);
}

extern "C" size_t hopper_attention_step_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);

	return workspace_bytes(device, a->batch * a->n_heads, a->d_head);
}

extern "C" enum status hopper_attention_step(struct device *device, const void *args,
                                             void *workspace)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);
	parameters p = parameters_of(device, a, workspace);

	p.q_heads = static_cast<int>(a->n_heads);
	p.slots = static_cast<int>(a->kv_slots);
	p.window = static_cast<int>(a->window);
	p.k_cache = of(a->k_cache);
	p.v_cache = of(a->v_cache);
	return a->d_head == 64 ? launch<64, false>(device, p) : launch<128, false>(device, p);
}

extern "C" const char *hopper_rat_step_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct rat_step_args *>(args);

	if (!aligned(a->q) || !aligned(a->k) || !aligned(a->v) || !aligned(a->z) ||
	    !aligned(a->gate) || !aligned(a->out) || !aligned(a->gate_bias) ||
	    !aligned(a->k_state) || !aligned(a->v_state))
		return "views must be 16-byte aligned";
	return unsupported_shape(device, a->d_head, &a->k_chunk, &a->v_chunk);
}

extern "C" size_t hopper_rat_step_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct rat_step_args *>(args);

	return workspace_bytes(device, a->batch * a->n_heads, a->d_head);
}

extern "C" enum status hopper_rat_step(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct rat_step_args *>(args);
	parameters p = parameters_of(device, a, workspace);

	p.q_heads = static_cast<int>(a->groups);
	p.slots = static_cast<int>(a->chunk_slots);
	p.chunk = static_cast<int>(a->chunk);
	p.z = of(a->z);
	p.gate = of(a->gate);
	p.k_cache = of(a->k_chunk);
	p.v_cache = of(a->v_chunk);
	p.gate_bias = a->gate_bias;
	p.k_state = a->k_state;
	p.v_state = a->v_state;
	return a->d_head == 64 ? launch<64, true>(device, p) : launch<128, true>(device, p);
}
