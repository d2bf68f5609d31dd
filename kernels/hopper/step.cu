/*
 * Generation for sm_90a: attention_step and rat_step, one query per sequence
 * and head against a cache [B, H, slots, d], d = 64 or 128. Bound by the bytes
 * of the cache.
 *
 * A block is a producer warp, which streams tiles of 32 keys and values into a
 * four-stage ring with bulk copies, and four consumer warps, which take eight
 * keys of each tile: d/8 lanes share a key, 16 bytes each. The tiles of all
 * (sequence, head) pairs form one line that is cut into equal parts, one per
 * block, so every block streams the same bytes without a pause; a pair that a
 * cut falls into is put together by whichever of its blocks finishes last.
 *
 * The new token never travels through the cache: its score and value start the
 * online softmax of the block that has the pair's first tile, which also
 * writes the cache slot. In RAT that block updates the running state as well.
 */
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/hopper.h"
#include "kernels/hopper/ptx.cuh"

using namespace hopper;

namespace
{

constexpr int TILE = 32, STAGES = 4, BLOCKS_PER_SM = 3;
constexpr int CONSUMER_WARPS = 4, CONSUMERS = CONSUMER_WARPS * 32, THREADS = CONSUMERS + 32;
constexpr float LOG2E = 1.44269504f;

struct bf16_view {
	__nv_bfloat16 *data;
	int64_t batch, head;
	__device__ __nv_bfloat16 *at(int b, int h) const
	{
		return data + b * batch + h * head;
	}
};

/* What both operations share; RAT's fields are unused otherwise. */
struct parameters {
	int n_heads, q_heads, pairs, slots, window, chunk;
	bool rope;
	float scale;
	const int32_t *position;
	bf16_view q, k, v, z, gate, k_cache, v_cache, out;
	const float *gate_bias;
	float *k_state, *v_state;
	float *partials;      /* [2 * blocks][d + 2] */
	unsigned int *counts; /* [pairs] */
};

/* The keys of earlier tokens: `count` of them, in slots first, first + 1, ... modulo slots. */
struct history {
	int count, first, tiles; /* tiles per pair, at least one */
};

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

/* First tile of a block's part of the line. */
__device__ __forceinline__ int64_t part_begin(int64_t total, int block)
{
	return total * block / gridDim.x;
}

/* The block whose part holds a tile. */
__device__ __forceinline__ int part_of(int64_t total, int64_t tile)
{
	int block = static_cast<int>(tile * gridDim.x / total);

	while (part_begin(total, block + 1) <= tile)
		block++;
	while (part_begin(total, block) > tile)
		block--;
	return block;
}

template <int D> struct shared_layout {
	static constexpr int HALF = TILE * D * 2; /* bytes of a stage's keys, then its values */
	static constexpr int BARRIERS = STAGES * 2 * HALF;
	static constexpr int TABLE = BARRIERS + 2 * STAGES * 8; /* cos, sin [D/2] each */
	static constexpr int MERGE = TABLE + D * 4;             /* [warps][D + 2] floats */
	static constexpr int BYTES = MERGE + CONSUMER_WARPS * (D + 2) * 4 + 16;
};

template <int D>
__device__ __forceinline__ void produce(const parameters &p, const history &past, int64_t begin,
                                        int64_t end, uint32_t shared)
{
	using layout = shared_layout<D>;
	int stage = 0;
	uint32_t parity = 1;

	for (int64_t tile = begin; tile < end; tile++) {
		const int pair = static_cast<int>(tile / past.tiles);
		const int b = pair / p.n_heads, h = pair - b * p.n_heads;
		const int j =
		        static_cast<int>(tile - static_cast<int64_t>(pair) * past.tiles) * TILE;
		const int count = min(TILE, past.count - j);
		const int slot = (past.first + j) % p.slots, straight = min(count, p.slots - slot);
		const uint32_t full = shared + layout::BARRIERS + stage * 8;
		const uint32_t keys = shared + stage * 2 * layout::HALF,
		               values = keys + layout::HALF;
		const __nv_bfloat16 *k = p.k_cache.at(b, h), *v = p.v_cache.at(b, h);

		barrier_wait(full + STAGES * 8, parity);
		barrier_arrive_expect(full, count * D * 4);
		if (straight > 0) {
			bulk_load(keys, k + static_cast<int64_t>(slot) * D, straight * D * 2, full);
			bulk_load(values, v + static_cast<int64_t>(slot) * D, straight * D * 2,
			          full);
		}
		if (count > straight) {
			bulk_load(keys + straight * D * 2, k, (count - straight) * D * 2, full);
			bulk_load(values + straight * D * 2, v, (count - straight) * D * 2, full);
		}
		if (++stage == STAGES) {
			stage = 0;
			parity ^= 1;
		}
	}
}

/* Eight neighboring channels of a row, as floats. */
__device__ __forceinline__ void unpack(float (&x)[8], uint4 packed)
{
	const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
	for (int i = 0; i < 4; i++) {
		x[2 * i] = low_bf16(pairs[i]);
		x[2 * i + 1] = high_bf16(pairs[i]);
	}
}

__device__ __forceinline__ void load_eight(float (&x)[8], const __nv_bfloat16 *source)
{
	unpack(x, *reinterpret_cast<const uint4 *>(source));
}

__device__ __forceinline__ void load_eight(float (&x)[8], uint32_t shared)
{
	uint4 packed;

	asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
	             : "r"(shared));
	unpack(x, packed);
}

__device__ __forceinline__ void store_eight(__nv_bfloat16 *target, const float (&x)[8])
{
	*reinterpret_cast<uint4 *>(target) =
	        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
	                   pack_bf16(x[6], x[7]));
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

/* An online softmax over some keys: o is unnormalized, base-2 maximum. */
struct partial {
	float max, sum, o[8];
};

__device__ __forceinline__ void merge(partial &a, float max, float sum, const float (&o)[8])
{
	const float top = fmaxf(a.max, max), safe = top == -INFINITY ? 0.0f : top;
	const float ours = exp2_approx(a.max - safe), theirs = exp2_approx(max - safe);

	a.max = top;
	a.sum = a.sum * ours + sum * theirs;
#pragma unroll
	for (int i = 0; i < 8; i++)
		a.o[i] = a.o[i] * ours + o[i] * theirs;
}

/* RAT's running pair after this token: g*state + (1-g)*x, zero before a chunk's first token. */
__device__ __forceinline__ void update_state(float *state, float (&x)[8], const float (&g)[8],
                                             bool reset, bool write)
{
	float4 *packed = reinterpret_cast<float4 *>(state);
	const float4 a = packed[0], b = packed[1];
	const float old[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
	for (int i = 0; i < 8; i++)
		x[i] = fmaf(g[i], reset ? 0.0f : old[i], (1.0f - g[i]) * x[i]);
	__syncwarp(); /* lanes that share a key have all read */
	if (write) {
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
                                           int channel, bool write, const float (&q)[8],
                                           const float *table, partial &own)
{
	float k[8], v[8];
	bool store = write;
	int slot = 0;

	load_eight(k, p.k.at(b, h % p.q_heads) + channel);
	load_eight(v, p.v.at(b, h) + channel);
	if (RAT) {
		const int64_t state = (static_cast<int64_t>(b) * p.n_heads + h) * D + channel;
		const int offset = position % p.chunk;
		float g[8];

		load_eight(g, p.gate.at(b, h) + channel);
#pragma unroll
		for (int i = 0; i < 8; i++)
			g[i] = 1.0f / (1.0f + __expf(-g[i] - p.gate_bias[h * D + channel + i]));
		update_state(p.k_state + state, k, g, offset == 0, write);
		update_state(p.v_state + state, v, g, offset == 0, write);
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
	float *slot = scratch + warp * (D + 2);
	if (lane < D / 8) {
#pragma unroll
		for (int i = 0; i < 8; i++)
			slot[channel + i] = mine.o[i];
		if (lane == 0) {
			slot[D] = mine.max;
			slot[D + 1] = mine.sum;
		}
	}
	named_barrier_sync(1, CONSUMERS);
	for (int w = 1; warp == 0 && w < CONSUMER_WARPS; w++) {
		const float *other = scratch + w * (D + 2);
		float o[8];
#pragma unroll
		for (int i = 0; i < 8; i++)
			o[i] = other[channel + i];
		merge(mine, other[D], other[D + 1], o);
	}
}

/* Joins the parts of a pair that several blocks share. True in the block that has it all. */
template <int D>
__device__ __forceinline__ bool merge_grid(const parameters &p, partial &mine, int64_t total,
                                           int64_t pair_begin, int64_t pair_end, int lane)
{
	const int first = part_of(total, pair_begin), last = part_of(total, pair_end - 1);
	const int channel = lane % (D / 8) * 8;
	const auto slot = [&](int block) {
		const int tail = part_begin(total, block) <= pair_begin;

		return p.partials + static_cast<int64_t>(2 * block + tail) * (D + 2);
	};
	unsigned int arrived = 0;

	if (first == last)
		return true;
	float *ours = slot(blockIdx.x);
	if (lane < D / 8) {
#pragma unroll
		for (int i = 0; i < 8; i++)
			__stcg(ours + channel + i, mine.o[i]);
		if (lane == 0) {
			__stcg(ours + D, mine.max);
			__stcg(ours + D + 1, mine.sum);
		}
	}
	__threadfence();
	__syncwarp();
	if (lane == 0)
		arrived = atomicAdd(p.counts + pair_begin / ((pair_end - pair_begin)), 1);
	arrived = __shfl_sync(~0u, arrived, 0);
	if (arrived != static_cast<unsigned int>(last - first))
		return false;
	__threadfence();
	for (int block = first; block <= last; block++) {
		const float *other = slot(block);
		float o[8];

		if (block == static_cast<int>(blockIdx.x))
			continue;
#pragma unroll
		for (int i = 0; i < 8; i++)
			o[i] = __ldcg(other + channel + i);
		merge(mine, __ldcg(other + D), __ldcg(other + D + 1), o);
	}
	return true;
}

template <int D, bool RAT>
__device__ __forceinline__ void write_out(const parameters &p, partial &mine, int b, int h,
                                          int lane)
{
	const int channel = lane % (D / 8) * 8;
	const float inverse = 1.0f / mine.sum;

#pragma unroll
	for (int i = 0; i < 8; i++)
		mine.o[i] *= inverse;
	if (RAT) {
		float z[8];

		load_eight(z, p.z.at(b, h) + channel);
#pragma unroll
		for (int i = 0; i < 8; i++)
			mine.o[i] /= 1.0f + __expf(-z[i]);
	}
	if (lane < D / 8)
		store_eight(p.out.at(b, h) + channel, mine.o);
}

template <int D, bool RAT>
__device__ __forceinline__ void consume(const parameters &p, const history &past, int position,
                                        int64_t begin, int64_t end, int64_t total, uint32_t shared,
                                        const float *table, float *scratch)
{
	using layout = shared_layout<D>;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const int channel = lane % (D / 8) * 8, group = lane / (D / 8);
	const int first = warp * (TILE / CONSUMER_WARPS) + group;
	int stage = 0;
	uint32_t parity = 0;

	for (int64_t tile = begin; tile < end;) {
		const int pair = static_cast<int>(tile / past.tiles);
		const int b = pair / p.n_heads, h = pair - b * p.n_heads;
		const int64_t pair_begin = static_cast<int64_t>(pair) * past.tiles;
		const int64_t pair_end = pair_begin + past.tiles, stop = min(pair_end, end);
		partial mine = {-INFINITY, 0, {}};
		float q[8];

		load_eight(q, p.q.at(b, h % p.q_heads) + channel);
		if (tile == pair_begin && warp == 0) {
			take_token<D, RAT>(p, b, h, position, channel, group == 0, q, table, mine);
			if (group != 0)
				mine = {-INFINITY, 0, {}};
		}
		if (p.rope)
			rotate<D>(q, table, channel);
#pragma unroll
		for (int i = 0; i < 8; i++)
			q[i] *= p.scale * LOG2E;
		for (; tile < stop; tile++) {
			const uint32_t full = shared + layout::BARRIERS + stage * 8;
			const int count = past.count - static_cast<int>(tile - pair_begin) * TILE;

			barrier_wait(full, parity);
			fold_tile<D>(mine, q, shared + stage * 2 * layout::HALF, count, first,
			             channel);
			__syncwarp();
			if (lane == 0)
				barrier_arrive(full + STAGES * 8);
			if (++stage == STAGES) {
				stage = 0;
				parity ^= 1;
			}
		}
		merge_block<D>(mine, scratch, warp, lane);
		if (warp == 0 && merge_grid<D>(p, mine, total, pair_begin, pair_end, lane))
			write_out<D, RAT>(p, mine, b, h, lane);
	}
}

/* cos and sin of the rotation at `position`; the angle in double, for it grows with the position.
 */
template <int D> __device__ __forceinline__ void fill_table(float *table, int position)
{
	if (threadIdx.x < D / 2) {
		const double angle = position * exp2(threadIdx.x * (-2.0 / D) * 13.287712379549449);
		const double turns = angle * 0.15915494309189535;
		float sine, cosine;

		sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
		table[threadIdx.x] = cosine;
		table[D / 2 + threadIdx.x] = sine;
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
	const history past = history_at<RAT>(p, position);
	const int64_t total = static_cast<int64_t>(p.pairs) * past.tiles;
	const int64_t begin = part_begin(total, blockIdx.x),
	              end = part_begin(total, blockIdx.x + 1);

	if (threadIdx.x == 0) {
		for (int i = 0; i < STAGES; i++) {
			barrier_init(shared + layout::BARRIERS + i * 8, 1);
			barrier_init(shared + layout::BARRIERS + (STAGES + i) * 8, CONSUMER_WARPS);
		}
		barrier_init_fence();
	}
	if (p.rope)
		fill_table<D>(table, RAT ? position / p.chunk : position);
	__syncthreads();
	if (threadIdx.x >= CONSUMERS) {
		if (threadIdx.x == CONSUMERS)
			produce<D>(p, past, begin, end, shared);
	} else {
		consume<D, RAT>(p, past, position, begin, end, total, shared, table, scratch);
	}
}

int block_count()
{
	return BLOCKS_PER_SM * cuda_sm_count();
}

template <int D, bool RAT> enum status launch(const parameters &p)
{
	const int bytes = shared_layout<D>::BYTES;

	CUDA_TRY(cudaFuncSetAttribute(step_kernel<D, RAT>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	CUDA_TRY(cudaMemsetAsync(p.counts, 0, p.pairs * sizeof *p.counts, cuda_stream()));
	step_kernel<D, RAT><<<block_count(), THREADS, bytes, cuda_stream()>>>(p);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

bf16_view of(const struct view &v)
{
	return {static_cast<__nv_bfloat16 *>(v.data), v.batch, v.head};
}

bool aligned(const struct view &v)
{
	return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.batch % 8 == 0 && v.head % 8 == 0;
}

const char *unsupported_shape(int64_t d_head, const struct view *k_cache,
                              const struct view *v_cache)
{
	if (!cuda_is_hopper())
		return "needs compute capability 9.0";
	if (d_head != 64 && d_head != 128)
		return "head width must be 64 or 128";
	if (k_cache->token != d_head || v_cache->token != d_head)
		return "the cache of a head must be contiguous";
	if (!aligned(*k_cache) || !aligned(*v_cache))
		return "views must be 16-byte aligned";
	return NULL;
}

size_t workspace_bytes(int64_t pairs, int64_t d_head)
{
	const size_t counts = (pairs * sizeof(unsigned int) + 255) / 256 * 256;

	return counts + 2 * block_count() * (d_head + 2) * sizeof(float);
}

void place_workspace(parameters &p, void *workspace)
{
	p.counts = static_cast<unsigned int *>(workspace);
	p.partials = reinterpret_cast<float *>(static_cast<char *>(workspace) +
	                                       (p.pairs * sizeof(unsigned int) + 255) / 256 * 256);
}

} // namespace

extern "C" const char *hopper_attention_step_unsupported(const void *args)
{
	const struct attention_step_args *a = static_cast<const struct attention_step_args *>(args);

	if (!aligned(a->q) || !aligned(a->k) || !aligned(a->v) || !aligned(a->out))
		return "views must be 16-byte aligned";
	return unsupported_shape(a->d_head, &a->k_cache, &a->v_cache);
}

extern "C" size_t hopper_attention_step_workspace(const void *args)
{
	const struct attention_step_args *a = static_cast<const struct attention_step_args *>(args);

	return workspace_bytes(a->batch * a->n_heads, a->d_head);
}

extern "C" enum status hopper_attention_step(const void *args, void *workspace)
{
	const struct attention_step_args *a = static_cast<const struct attention_step_args *>(args);
	parameters p = {};

	p.n_heads = p.q_heads = static_cast<int>(a->n_heads);
	p.pairs = static_cast<int>(a->batch * a->n_heads);
	p.slots = static_cast<int>(a->kv_slots);
	p.window = static_cast<int>(a->window);
	p.rope = a->rope;
	p.scale = a->scale;
	p.position = a->position;
	p.q = of(a->q);
	p.k = of(a->k);
	p.v = of(a->v);
	p.k_cache = of(a->k_cache);
	p.v_cache = of(a->v_cache);
	p.out = of(a->out);
	place_workspace(p, workspace);
	return a->d_head == 64 ? launch<64, false>(p) : launch<128, false>(p);
}

extern "C" const char *hopper_rat_step_unsupported(const void *args)
{
	const struct rat_step_args *a = static_cast<const struct rat_step_args *>(args);

	if (!aligned(a->q) || !aligned(a->k) || !aligned(a->v) || !aligned(a->z) ||
	    !aligned(a->gate) || !aligned(a->out))
		return "views must be 16-byte aligned";
	return unsupported_shape(a->d_head, &a->k_chunk, &a->v_chunk);
}

extern "C" size_t hopper_rat_step_workspace(const void *args)
{
	const struct rat_step_args *a = static_cast<const struct rat_step_args *>(args);

	return workspace_bytes(a->batch * a->n_heads, a->d_head);
}

extern "C" enum status hopper_rat_step(const void *args, void *workspace)
{
	const struct rat_step_args *a = static_cast<const struct rat_step_args *>(args);
	parameters p = {};

	p.n_heads = static_cast<int>(a->n_heads);
	p.q_heads = static_cast<int>(a->groups);
	p.pairs = static_cast<int>(a->batch * a->n_heads);
	p.slots = static_cast<int>(a->chunk_slots);
	p.chunk = static_cast<int>(a->chunk);
	p.rope = a->rope;
	p.scale = a->scale;
	p.position = a->position;
	p.q = of(a->q);
	p.k = of(a->k);
	p.v = of(a->v);
	p.z = of(a->z);
	p.gate = of(a->gate);
	p.k_cache = of(a->k_chunk);
	p.v_cache = of(a->v_chunk);
	p.out = of(a->out);
	p.gate_bias = a->gate_bias;
	p.k_state = a->k_state;
	p.v_state = a->v_state;
	place_workspace(p, workspace);
	return a->d_head == 64 ? launch<64, true>(p) : launch<128, true>(p);
}
