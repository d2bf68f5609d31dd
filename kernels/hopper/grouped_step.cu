/*
 * Generation for sm_90a where several heads read one head of keys: attention_step, d = 64 or 128.
 * K and V of a pair (a sequence and a head of keys) are read once for up to 16 heads, its readers;
 * more readers are several pairs.
 *
 *   producer   (a thread) streams tiles of 64 keys and values into a ring, swizzled
 *   consumers  (four warps) take sixteen keys of each tile, on the tensor cores, since by ordinary
 *              arithmetic eight readers would take longer than the bytes:
 *                S^T = K Q^T    m16n8k16, sixteen keys x eight readers
 *                O^T += V^T P^T sixteen channels x eight readers; P^T is S^T, transposed in
 *                               registers, and a column of both is a reader
 * Fewer than eight (sixteen) readers are filled up with zeros. Work is divided, and pieces are
 * merged, as step.cu does it. Warps meet at the end of a pair alone.
 *
 * The new token starts the softmax of warp 0 of the block with the pair's first tile, which also
 * writes the cache slot. That slot, and those outside the window, lie in tiles that are read: their
 * scores become -infinity, their values 0.
 *
 * The first tiles are under way before the projection ahead in the stream has ended. So its direct
 * predecessor must not be what writes *position or the cache; in a layer it is the projection.
 *
 * Limit, as predicted: the bytes of the cache, once for all readers. docs/kernels/step.md.
 */
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/step.cuh"
#include "kernels/hopper/tensor_map.h"

using namespace hopper;

namespace
{

constexpr int CONSUMER_WARPS = 4, CONSUMERS = CONSUMER_WARPS * 32, THREADS = CONSUMERS + 32;
constexpr int POSTS = 2; /* chunks of work that the consumers may know of */
constexpr int MAX_READERS = 16;

/* Of OCTETS times eight readers. More registers leave room for fewer blocks, with longer rings. */
template <int OCTETS> struct shape {
	static constexpr int READERS = 8 * OCTETS;
	static constexpr int STAGES = OCTETS == 1 ? 2 : 3;
	static constexpr int BLOCKS_PER_SM = OCTETS == 1 ? 3 : 2;
};

struct parameters {
	CUtensorMap k_tiles, v_tiles;
	int n_heads, kv_heads, pairs, slots, window;
	int readers, parts; /* of a head of keys; pairs that these are cut into */
	bool rope;
	float scale_log2;
	const int32_t *position;
	bf16_view q, k, v, k_cache, v_cache, out;
	int64_t k_token, v_token; /* strides of the caches' slots */
	int cut, pieces, round;   /* split_of() */
	float *partials;          /* [cut * pieces][READERS][d + 4] */
};

/* Tickets drawn and pieces done, as in step.cu. */
__device__ unsigned int ticket, pieces_done[MAX_BLOCKS];

/*
 * Where the window goes round the ring of slots all of it is read, else the keys that are seen:
 * then the slots before `straight` are all seen.
 */
struct ring_history : history {
	int straight;
};

__device__ __forceinline__ ring_history history_at(const parameters &p, int position)
{
	ring_history h;

	h.count = p.window < 0 ? position : min(position, p.window);
	h.first = (position - h.count) % p.slots;
	h.straight = h.first + h.count;
	h.tiles = max((h.count + TILE - 1) / TILE, 1);
	if (h.straight > p.slots) {
		h.first = h.straight = 0;
		h.tiles = (p.slots + TILE - 1) / TILE;
	}
	return h;
}

/* A pair's sequence, head of keys, and readers: `count` heads from `first` on. */
struct readers {
	int b, kv, first, count;
	bool stores; /* the new token */
};

__device__ __forceinline__ readers readers_of(const parameters &p, int pair)
{
	const int keys = pair / p.parts, part = pair - keys * p.parts;
	const int b = keys / p.kv_heads, kv = keys - b * p.kv_heads;
	const int skipped = part * MAX_READERS;

	return {b, kv, kv * p.readers + skipped, min(p.readers - skipped, MAX_READERS), part == 0};
}

/* Floats of a reader's partial result: o, maximum, sum, and padding, by which no two banks meet. */
template <int D> constexpr int PARTIAL = D + 4;

enum {
	BAR_FULL,
	BAR_EMPTY = BAR_FULL + 3,
	BAR_POST_FULL = BAR_EMPTY + 3,
	BAR_POST_EMPTY = BAR_POST_FULL + POSTS,
	BAR_COUNT = BAR_POST_EMPTY + POSTS
};

template <int D, int OCTETS> struct shared_layout {
	static constexpr int READERS = shape<OCTETS>::READERS;
	static constexpr int HALF = TILE * D * 2; /* bytes of a stage's keys, then its values */
	static constexpr int MERGE = shape<OCTETS>::STAGES * 2 * HALF; /* [READERS][D + 4] floats */
	static constexpr int WEIGHTS = MERGE + READERS * PARTIAL<D> * 4; /* [warps][READERS] max */
	static constexpr int TABLE = WEIGHTS + CONSUMER_WARPS * READERS * 4; /* cos, sin [D/2] */
	static constexpr int BARRIERS = TABLE + D * 4;
	static constexpr int POSTS_AT = BARRIERS + BAR_COUNT * 8;
	static constexpr int FLAG = POSTS_AT + POSTS * 16;
	static constexpr int BYTES = FLAG + 16 + 1024; /* 1024: to align the base */
};

template <int D, int OCTETS>
__device__ __forceinline__ void produce(const parameters &p, const history &past, const schedule &s,
                                        uint32_t shared)
{
	using layout = shared_layout<D, OCTETS>;
	const uint32_t barriers = shared + layout::BARRIERS;
	slot_ring<shape<OCTETS>::STAGES> stage;
	slot_ring<POSTS> post_at;
	const uint64_t policy = policy_evict_first();

	const auto post = [&](const work &w) {
		const uint32_t to = shared + layout::POSTS_AT + post_at.slot * 16;

		barrier_wait(barriers + (BAR_POST_EMPTY + post_at.slot) * 8, post_at.parity ^ 1);
		shared_store(to, w.pair);
		shared_store(to + 4, w.first);
		shared_store(to + 8, w.end);
		barrier_arrive(barriers + (BAR_POST_FULL + post_at.slot) * 8);
		post_at.advance();
	};
	const auto stream = [&](const work &w) {
		const readers r = readers_of(p, w.pair);

#pragma unroll 1
		for (int i = w.first; i < w.end; i++) {
			const uint32_t full = barriers + (BAR_FULL + stage.slot) * 8;
			const uint32_t keys = shared + stage.slot * 2 * layout::HALF;

			barrier_wait(barriers + (BAR_EMPTY + stage.slot) * 8, stage.parity ^ 1);
			barrier_arrive_expect(full, 2 * layout::HALF);
#pragma unroll
			for (int panel = 0; panel < D / 64; panel++)
				tensor_load(keys + panel * PANEL_BYTES, &p.k_tiles, full,
				            panel * 64, past.first + i * TILE, r.kv, r.b, policy);
#pragma unroll
			for (int panel = 0; panel < D / 64; panel++)
				tensor_load(keys + layout::HALF + panel * PANEL_BYTES, &p.v_tiles,
				            full, panel * 64, past.first + i * TILE, r.kv, r.b,
				            policy);
			stage.advance();
		}
	};

	if (blockIdx.x < s.chunks) {
		/* The cache is older than the kernel before; the tickets are not. */
		work w = chunk_at(s, past, blockIdx.x);
		const int early = min(w.first + EARLY, w.end);

		stream({w.pair, w.first, early});
		wait_for_previous();
		/* s.chunks draws in all, after which the counter is zero. */
		int next = gridDim.x + atomicInc(&ticket, s.chunks - 1);
		post(w);
		stream({w.pair, early, w.end});
		while (next < s.chunks) {
			w = chunk_at(s, past, next);
			next = gridDim.x + atomicInc(&ticket, s.chunks - 1);
			post(w);
			stream(w);
		}
	}
	let_next_begin();
	post({-1, 0, 0});
}

/* A row as the right operand of a product: of each 16 channels those of columns 2t, 2t + 1, and of
 * 2t + 8, 2t + 9; t = lane % 4. */
template <int D>
__device__ __forceinline__ void load_operand(uint32_t (&x)[D / 16][2], const __nv_bfloat16 *row)
{
	const uint32_t *pairs = reinterpret_cast<const uint32_t *>(row) + threadIdx.x % 4;

#pragma unroll
	for (int s = 0; s < D / 16; s++) {
		x[s][0] = row ? pairs[8 * s] : 0;
		x[s][1] = row ? pairs[8 * s + 4] : 0;
	}
}

/* Rotate-half: a thread has both channels i and i + D/2. */
template <int D>
__device__ __forceinline__ void rotate_operand(uint32_t (&x)[D / 16][2], const float *table)
{
	const float *cosine = table + 2 * (threadIdx.x % 4), *sine = cosine + D / 2;

#pragma unroll
	for (int s = 0; s < D / 32; s++) {
#pragma unroll
		for (int i = 0; i < 2; i++) {
			const float2 c = *reinterpret_cast<const float2 *>(cosine + 16 * s + 8 * i);
			const float2 n = *reinterpret_cast<const float2 *>(sine + 16 * s + 8 * i);
			const uint32_t a = x[s][i], b = x[s + D / 32][i];
			const float a0 = low_bf16(a), a1 = high_bf16(a);
			const float b0 = low_bf16(b), b1 = high_bf16(b);

			x[s][i] = pack_bf16(a0 * c.x - b0 * n.x, a1 * c.y - b1 * n.y);
			x[s + D / 32][i] = pack_bf16(b0 * c.x + a0 * n.x, b1 * c.y + a1 * n.y);
		}
	}
}

/* This warp's softmax. Columns of a thread: of each eight readers 2t and 2t + 1. */
template <int D, int OCTETS> struct state {
	uint32_t q[OCTETS][D / 16][2];
	float o[OCTETS][D / 16][4]; /* channels lane/4 and lane/4 + 8 of sixteen */
	float max[OCTETS][2];       /* the same in all threads of a column */
	float sum[OCTETS][2];       /* over this thread's keys */

	__device__ __forceinline__ void clear()
	{
#pragma unroll
		for (int n = 0; n < OCTETS; n++) {
#pragma unroll
			for (int e = 0; e < 2; e++) {
				max[n][e] = -INFINITY;
				sum[n][e] = 0;
			}
#pragma unroll
			for (int i = 0; i < D / 4; i++)
				o[n][i / 4][i % 4] = 0;
		}
	}
};

/* The new token of a pair: its scores and value begin the softmax, and its slot is written. */
template <int D, int OCTETS>
__device__ __forceinline__ void take_token(const parameters &p, const readers &r, int position,
                                           const float *table, state<D, OCTETS> &mine)
{
	const int lane = threadIdx.x % 32, row = lane / 4, t = lane % 4;
	const int slot = position % p.slots;
	const __nv_bfloat16 *v = p.v.at(r.b, r.kv);
	uint32_t k[D / 16][2];

	load_operand<D>(k, p.k.at(r.b, r.kv));
#pragma unroll
	for (int n = 0; n < OCTETS; n++) {
		float score = 0; /* of reader 8 n + row */

#pragma unroll
		for (int i = 0; i < D / 8; i++) {
			const uint32_t a = mine.q[n][i / 2][i % 2], b = k[i / 2][i % 2];

			score = fmaf(low_bf16(a), low_bf16(b), score);
			score = fmaf(high_bf16(a), high_bf16(b), score);
		}
		score += __shfl_xor_sync(~0u, score, 1);
		score += __shfl_xor_sync(~0u, score, 2);
#pragma unroll
		for (int e = 0; e < 2; e++) {
			mine.max[n][e] = __shfl_sync(~0u, score, (2 * t + e) * 4) * p.scale_log2;
			mine.sum[n][e] = row == 0 ? 1 : 0;
		}
#pragma unroll
		for (int i = 0; i < D / 16; i++) {
			mine.o[n][i][0] = mine.o[n][i][1] = __bfloat162float(v[16 * i + row]);
			mine.o[n][i][2] = mine.o[n][i][3] = __bfloat162float(v[16 * i + row + 8]);
		}
	}
	if (!r.stores)
		return;
	if (p.rope)
		rotate_operand<D>(k, table);
	uint32_t *key = reinterpret_cast<uint32_t *>(p.k_cache.at(r.b, r.kv) + slot * p.k_token);
#pragma unroll
	for (int s = 0; s < D / 16; s++)
		if (row == s) {
			key[8 * s + t] = k[s][0];
			key[8 * s + t + 4] = k[s][1];
		}
	if (lane < D / 8)
		reinterpret_cast<uint4 *>(p.v_cache.at(r.b, r.kv) + slot * p.v_token)[lane] =
		        reinterpret_cast<const uint4 *>(v)[lane];
}

/* Which keys of a tile are seen, from their slots. */
struct sight {
	int now, count, slots; /* the new token's slot, how many before it are seen, of how many */

	__device__ bool sees(int slot) const
	{
		const int behind = now - slot, age = behind > 0 ? behind : behind + slots;

		return slot < slots && age <= count;
	}
};

/* P^T of this warp's sixteen keys as the right operand of a product with their values. */
template <int D, int OCTETS>
__device__ __forceinline__ void probabilities(state<D, OCTETS> &mine, float (&x)[OCTETS][4],
                                              float scale, uint32_t (&p)[OCTETS][2])
{
	float top[OCTETS][2];
	bool moved = false;

#pragma unroll
	for (int n = 0; n < OCTETS; n++) {
#pragma unroll
		for (int e = 0; e < 2; e++) {
			top[n][e] = fmaxf(x[n][e], x[n][e + 2]) * scale;
#pragma unroll
			for (int offset = 4; offset < 32; offset *= 2)
				top[n][e] =
				        fmaxf(top[n][e], __shfl_xor_sync(~0u, top[n][e], offset));
			top[n][e] = fmaxf(top[n][e], mine.max[n][e]);
			moved |= top[n][e] != mine.max[n][e];
		}
	}
	if (__any_sync(~0u, moved)) {
#pragma unroll
		for (int n = 0; n < OCTETS; n++) {
#pragma unroll
			for (int e = 0; e < 2; e++) {
				const float safe = top[n][e] == -INFINITY ? 0.0f : top[n][e];
				const float rescale = exp2_approx(mine.max[n][e] - safe);

				mine.max[n][e] = top[n][e];
				mine.sum[n][e] *= rescale;
#pragma unroll
				for (int i = 0; i < D / 16; i++) {
					mine.o[n][i][e] *= rescale;
					mine.o[n][i][e + 2] *= rescale;
				}
			}
		}
	}
#pragma unroll
	for (int n = 0; n < OCTETS; n++) {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const float max = mine.max[n][i % 2], safe = max == -INFINITY ? 0.0f : max;

			x[n][i] = exp2_approx(fmaf(x[n][i], scale, -safe));
			mine.sum[n][i % 2] += x[n][i];
		}
		p[n][0] = transpose_matrix(pack_bf16(x[n][0], x[n][1]));
		p[n][1] = transpose_matrix(pack_bf16(x[n][2], x[n][3]));
	}
}

/* This warp's sixteen keys of a tile, the first in this slot; `all`: every one is seen. Returns
 * what the values' loads left, for warp_arrive_read(); those of the keys have ended before. */
template <int D, int OCTETS>
__device__ __forceinline__ uint32_t fold_tile(const parameters &p, state<D, OCTETS> &mine,
                                              uint32_t keys, int slot, const sight &seen, bool all)
{
	const int lane = threadIdx.x % 32, token = threadIdx.x / 32 * 16;
	const uint32_t values = keys + shared_layout<D, OCTETS>::HALF;
	float x[OCTETS][4] = {}, odd[OCTETS][4] = {};
	uint32_t right[OCTETS][2], a[4], loaded = 0;

#pragma unroll
	for (int s = 0; s < D / 16; s++) {
		load_matrix_x4(plain_block(keys + s / 4 * PANEL_BYTES, token, s % 4 * 16, lane),
		               a[0], a[1], a[2], a[3]);
#pragma unroll
		for (int n = 0; n < OCTETS; n++)
			mma_16816(s % 2 ? odd[n] : x[n], a[0], a[1], a[2], a[3], mine.q[n][s][0],
			          mine.q[n][s][1]);
	}
#pragma unroll
	for (int i = 0; i < 4 * OCTETS; i++) {
		x[i / 4][i % 4] += odd[i / 4][i % 4];
		if (!all && !seen.sees(slot + lane / 4 + i % 4 / 2 * 8))
			x[i / 4][i % 4] = -INFINITY;
	}
	probabilities(mine, x, p.scale_log2, right);
	uint32_t kept[2] = {~0u, ~0u}; /* of a register: its keys 2t, 2t + 1; those 8 further */
	if (!all) {
#pragma unroll
		for (int i = 0; i < 2; i++)
			kept[i] = (seen.sees(slot + 2 * (lane % 4) + 8 * i) ? 0xffffu : 0) |
			          (seen.sees(slot + 2 * (lane % 4) + 8 * i + 1) ? 0xffff0000u : 0);
	}
#pragma unroll
	for (int i = 0; i < D / 16; i++) {
		load_transposed_x4(
		        transposed_block(values + i / 4 * PANEL_BYTES, token, i % 4 * 16, lane), a);
#pragma unroll
		for (int n = 0; n < OCTETS; n++)
			mma_16816(mine.o[n][i], a[0] & kept[0], a[1] & kept[0], a[2] & kept[1],
			          a[3] & kept[1], right[n][0], right[n][1]);
		/* Registers do not suffice for all; the SASS has the first two read long before. */
		if (OCTETS == 1 || i >= 2)
			loaded |= a[0];
	}
	return loaded;
}

/*
 * What the warps have of a pair into `sums` [READERS][D + 4], in a fixed order, relative to the
 * largest maximum; for all consumers to read.
 */
template <int D, int OCTETS>
__device__ __forceinline__ void merge_warps(state<D, OCTETS> &mine, float *sums, float *maxima)
{
	constexpr int READERS = shape<OCTETS>::READERS;
	const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
	float sum[OCTETS][2], top[OCTETS][2];

	named_barrier_sync(1, CONSUMERS); /* what was here of the pair before has been read */
	if (row == 0) {
#pragma unroll
		for (int i = 0; i < 2 * OCTETS; i++)
			maxima[warp * READERS + i / 2 * 8 + 2 * t + i % 2] = mine.max[i / 2][i % 2];
	}
	named_barrier_sync(1, CONSUMERS);
#pragma unroll
	for (int i = 0; i < 2 * OCTETS; i++) {
		const int n = i / 2, e = i % 2;

		top[n][e] = -INFINITY;
#pragma unroll
		for (int w = 0; w < CONSUMER_WARPS; w++)
			top[n][e] = fmaxf(top[n][e], maxima[w * READERS + n * 8 + 2 * t + e]);
		const float safe = top[n][e] == -INFINITY ? 0.0f : top[n][e];
		const float rescale = exp2_approx(mine.max[n][e] - safe);
		sum[n][e] = mine.sum[n][e] * rescale;
#pragma unroll
		for (int offset = 4; offset < 32; offset *= 2)
			sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], offset);
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			mine.o[n][j][e] *= rescale;
			mine.o[n][j][e + 2] *= rescale;
		}
	}
#pragma unroll 1
	for (int turn = 0; turn < CONSUMER_WARPS; turn++) {
		if (warp == turn) {
#pragma unroll
			for (int i = 0; i < 2 * OCTETS; i++) {
				const int n = i / 2, e = i % 2;
				float *to = sums + (n * 8 + 2 * t + e) * PARTIAL<D>;

#pragma unroll
				for (int j = 0; j < D / 8; j++) {
					const int channel = 8 * j + row;
					const float x = mine.o[n][j / 2][e + j % 2 * 2];

					to[channel] = turn == 0 ? x : to[channel] + x;
				}
				if (row == 0) {
					to[D] = top[n][e];
					to[D + 1] = turn == 0 ? sum[n][e] : to[D + 1] + sum[n][e];
				}
			}
		}
		named_barrier_sync(1, CONSUMERS);
	}
}

/* Eight channels of a reader's partial result. */
template <int D> __device__ __forceinline__ partial partial_at(const float *row, int channel)
{
	partial x = {row[D], row[D + 1], {}};

#pragma unroll
	for (int i = 0; i < 8; i += 4)
		unpack_four(x.o + i, *reinterpret_cast<const float4 *>(row + channel + i));
	return x;
}

__device__ __forceinline__ void write_out(const parameters &p, const readers &r, int reader,
                                          int channel, partial &x)
{
	const float inverse = 1.0f / x.sum;

#pragma unroll
	for (int i = 0; i < 8; i++)
		x.o[i] *= inverse;
	store_eight(p.out.at(r.b, r.first + reader) + channel, x.o);
}

/* Puts this piece of a cut pair beside the others. True if it was the last: all are there. */
template <int D, int OCTETS>
__device__ __forceinline__ bool hand_in(const float *sums, float *piece, unsigned int *done,
                                        int pieces, uint32_t flag)
{
	constexpr int FOURS = shape<OCTETS>::READERS * PARTIAL<D> / 4;

	for (int i = threadIdx.x; i < FOURS; i += CONSUMERS)
		__stcg(reinterpret_cast<float4 *>(piece) + i,
		       reinterpret_cast<const float4 *>(sums)[i]);
	named_barrier_sync(1, CONSUMERS);
	if (threadIdx.x == 0)
		shared_store(flag, increment_wrapping(done, pieces - 1) == pieces - 1);
	named_barrier_sync(1, CONSUMERS);
	return shared_load(flag);
}

/* The outputs of a pair: of `sums`, or of all its pieces. */
template <int D, int OCTETS>
__device__ __forceinline__ void finish(const parameters &p, const readers &r, const schedule &s,
                                       const work &w, const float *sums, uint32_t flag)
{
	constexpr int READERS = shape<OCTETS>::READERS, LANES = D / 8;
	const bool whole = w.pair < s.whole || s.pieces == 1;
	const int cut = w.pair - s.whole;
	float *const all = p.partials + static_cast<int64_t>(cut) * s.pieces * READERS * PARTIAL<D>;

	if (!whole && !hand_in<D, OCTETS>(sums, all + w.first / s.length * READERS * PARTIAL<D>,
	                                  pieces_done + cut, s.pieces, flag))
		return;
#pragma unroll 1
	for (int i = threadIdx.x; i < r.count * LANES; i += CONSUMERS) {
		const int reader = i / LANES, channel = i % LANES * 8;
		partial x = {-INFINITY, 0, {}};

		if (whole)
			x = partial_at<D>(sums + reader * PARTIAL<D>, channel);
#pragma unroll 4
		for (int piece = 0; !whole && piece < s.pieces; piece++) {
			const float *from = all + (piece * READERS + reader) * PARTIAL<D>;
			const float2 weight = __ldcg(reinterpret_cast<const float2 *>(from + D));
			float o[8];

#pragma unroll
			for (int j = 0; j < 8; j += 4)
				unpack_four(o + j, __ldcg(reinterpret_cast<const float4 *>(
				                           from + channel + j)));
			merge(x, weight.x, weight.y, o);
		}
		write_out(p, r, reader, channel, x);
	}
}

template <int D, int OCTETS>
__device__ __forceinline__ void consume(const parameters &p, const ring_history &past,
                                        const schedule &s, int position, uint32_t shared,
                                        char *memory)
{
	using layout = shared_layout<D, OCTETS>;
	const uint32_t barriers = shared + layout::BARRIERS;
	const float *table = reinterpret_cast<const float *>(memory + layout::TABLE);
	float *sums = reinterpret_cast<float *>(memory + layout::MERGE);
	float *maxima = reinterpret_cast<float *>(memory + layout::WEIGHTS);
	const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4;
	const sight seen = {position % p.slots, past.count, p.slots};
	slot_ring<shape<OCTETS>::STAGES> stage;
	slot_ring<POSTS> post;

	while (true) {
		const uint32_t from = shared + layout::POSTS_AT + post.slot * 16;
		state<D, OCTETS> mine;

		barrier_wait(barriers + (BAR_POST_FULL + post.slot) * 8, post.parity);
		const work w = {shared_load(from), shared_load(from + 4), shared_load(from + 8)};
		warp_arrive(barriers + (BAR_POST_EMPTY + post.slot) * 8);
		post.advance();
		if (w.pair < 0)
			return;
		const readers r = readers_of(p, w.pair);
		mine.clear();
#pragma unroll
		for (int n = 0; n < OCTETS; n++)
			load_operand<D>(mine.q[n], 8 * n + row < r.count
			                                   ? p.q.at(r.b, r.first + 8 * n + row)
			                                   : NULL);
		if (w.first == 0 && warp == 0)
			take_token(p, r, position, table, mine);
#pragma unroll
		for (int n = 0; n < OCTETS; n++)
			if (p.rope)
				rotate_operand<D>(mine.q[n], table);
#pragma unroll 1
		for (int i = w.first; i < w.end; i++) {
			const int slot = past.first + i * TILE;

			barrier_wait(barriers + (BAR_FULL + stage.slot) * 8, stage.parity);
			const uint32_t loaded =
			        fold_tile(p, mine, shared + stage.slot * 2 * layout::HALF,
			                  slot + warp * 16, seen, slot + TILE <= past.straight);
			warp_arrive_read(barriers + (BAR_EMPTY + stage.slot) * 8, loaded);
			stage.advance();
		}
		merge_warps(mine, sums, maxima);
		finish<D, OCTETS>(p, r, s, w, sums, shared + layout::FLAG);
	}
}

template <int D, int OCTETS>
__global__ void __launch_bounds__(THREADS, shape<OCTETS>::BLOCKS_PER_SM)
        grouped_step_kernel(const __grid_constant__ parameters p)
{
	using layout = shared_layout<D, OCTETS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);
	char *memory = unaligned + (shared - shared_address(unaligned));
	const int position = *p.position;

	if (threadIdx.x == 0) {
		const uint32_t barriers = shared + layout::BARRIERS;

		for (int i = 0; i < shape<OCTETS>::STAGES; i++) {
			barrier_init(barriers + (BAR_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_EMPTY + i) * 8, CONSUMER_WARPS);
		}
		for (int i = 0; i < POSTS; i++) {
			barrier_init(barriers + (BAR_POST_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_POST_EMPTY + i) * 8, CONSUMER_WARPS);
		}
		barrier_init_fence();
	}
	__syncthreads();
	const ring_history past = history_at(p, position);
	const schedule s = schedule_of(p, past);

	if (threadIdx.x >= CONSUMERS) {
		if (threadIdx.x == CONSUMERS)
			produce<D, OCTETS>(p, past, s, shared);
		return;
	}
	if (p.rope)
		fill_table<D>(reinterpret_cast<float *>(memory + layout::TABLE), position);
	wait_for_previous();
	named_barrier_sync(1, CONSUMERS);
	consume<D, OCTETS>(p, past, s, position, shared, memory);
}

int parts_of(const struct attention_step_args *a)
{
	return static_cast<int>((a->n_heads / a->kv_heads + MAX_READERS - 1) / MAX_READERS);
}

int octets_of(const struct attention_step_args *a)
{
	return a->n_heads / a->kv_heads > 8 ? 2 : 1;
}

split split_for(const struct device *device, const struct attention_step_args *a)
{
	const int blocks = octets_of(a) == 1 ? shape<1>::BLOCKS_PER_SM : shape<2>::BLOCKS_PER_SM;

	return split_of(device, a->batch * a->kv_heads * parts_of(a), blocks);
}

template <int D, int OCTETS>
enum status launch(struct device *device, const parameters &p, const split &s)
{
	return launch_early(device, grouped_step_kernel<D, OCTETS>, s.blocks, THREADS,
	                    shared_layout<D, OCTETS>::BYTES, p);
}

enum status fill_parameters(parameters &p, const struct attention_step_args *a, const split &s,
                            void *workspace)
{
	p.n_heads = static_cast<int>(a->n_heads);
	p.kv_heads = static_cast<int>(a->kv_heads);
	p.readers = static_cast<int>(a->n_heads / a->kv_heads);
	p.parts = parts_of(a);
	p.pairs = static_cast<int>(a->batch * a->kv_heads * p.parts);
	p.slots = static_cast<int>(a->kv_slots);
	p.window = static_cast<int>(a->window);
	p.rope = a->rope;
	p.scale_log2 = a->scale * LOG2E;
	p.position = a->position;
	p.q = of(a->q);
	p.k = of(a->k);
	p.v = of(a->v);
	p.k_cache = of(a->k_cache);
	p.v_cache = of(a->v_cache);
	p.k_token = a->k_cache.token;
	p.v_token = a->v_cache.token;
	p.out = of(a->out);
	p.cut = s.cut;
	p.pieces = s.pieces;
	p.round = s.round;
	p.partials = static_cast<float *>(workspace);
	TRY(tensor_map_encode(&p.k_tiles, &a->k_cache, a->batch, a->kv_slots, a->kv_heads,
	                      a->d_head, TILE));
	return tensor_map_encode(&p.v_tiles, &a->v_cache, a->batch, a->kv_slots, a->kv_heads,
	                         a->d_head, TILE);
}

} // namespace

extern "C" const char *hopper_grouped_step_unsupported(const struct device *device,
                                                       const void *args)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);

	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	if (!(a->scale > 0.0f))
		return "scale must be positive";
	if (a->rope && a->rope_width > 0 && a->rope_width != a->d_head)
		return "a part of a head that is rotated";
	return check_views(device, &a->q, &a->k, &a->v, &a->k_cache, &a->v_cache, &a->out);
}

extern "C" size_t hopper_grouped_step_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);
	const split s = split_for(device, a);

	return static_cast<size_t>(s.cut) * s.pieces * 8 * octets_of(a) * (a->d_head + 4) *
	       sizeof(float);
}

extern "C" enum status hopper_grouped_step(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);
	const split s = split_for(device, a);
	const bool one = octets_of(a) == 1;
	parameters p = {};

	TRY(fill_parameters(p, a, s, workspace));
	if (a->d_head == 64)
		return one ? launch<64, 1>(device, p, s) : launch<64, 2>(device, p, s);
	return one ? launch<128, 1>(device, p, s) : launch<128, 2>(device, p, s);
}
