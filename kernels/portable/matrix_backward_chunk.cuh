/*
 * A chunk of the matrix recurrence's gradients (matrix_recurrence_backward.cu): its shared memory,
 * its tiles of queries and keys and their decays, and its scores.
 */
#ifndef KERNELS_PORTABLE_MATRIX_BACKWARD_CHUNK_CUH
#define KERNELS_PORTABLE_MATRIX_BACKWARD_CHUNK_CUH

#include "kernels/portable/matrix_backward.cuh"

namespace matrix_backward
{

constexpr int GROUPS = SUBS;  /* of tokens, a warp's 16 each */
constexpr float MILD = 60.0f; /* log2 of a sub-chunk's decay whose inverse can be a factor */

/* Rows of factors: a sub-chunk's keys to the chunk's end (the last: ones), its queries inside it,
 * and those of sub-chunk 2 to 0, 3 to 1, 3 to 0. */
enum { REST, GROWTH = REST + SUBS, BETWEEN = GROWTH + SUBS, FACTORS = BETWEEN + 3 };

/* Where the gradients go. */
struct outputs {
	struct rows dq, dk, dv, dlog_decay;
};

/* Shared memory, in bytes. */
template <int PANEL> struct layout {
	static constexpr int TILE = CHUNK * PANEL * (int)sizeof(bf16);
	static constexpr int STATE = PANEL * SLAB, VALUES = CHUNK * SLAB; /* elements */
	static constexpr int STAGE = 2 * (STATE + VALUES) * (int)sizeof(bf16);
	static constexpr int Q = 0, K = Q + TILE, SCORES = K + TILE;
	static constexpr int STAGES = SCORES + CHUNK * CHUNK * (int)sizeof(bf16);
	static constexpr int SMALL = STAGES + 2 * STAGE;
	static constexpr int BYTES = SMALL + (int)sizeof(float) * (3 * GROUPS * PANEL + 3 * CHUNK) +
	                             (int)sizeof(bf16) * FACTORS * PANEL;
	/* Before the slabs: decays and the exact scores, in the second stage. */
	static constexpr int DECAYS = STAGES + STAGE, EXACT = DECAYS + TILE;
	/* After them: sums of dq over the tiles, of dk in the stages, then the pairs of sub-chunks.
	 */
	static constexpr int DQ = Q, DK = STAGES, PAIRS = STAGES + 2 * TILE;
};

/* The block's chunk, and what is small in shared memory. */
template <int PANEL> struct place {
	int b, h, chunk, valid; /* valid: tokens */
	int64_t first;          /* token */
	bf16 *q, *k, *scores;
	float *whole;  /* [SUBS, PANEL]: decay of each sub-chunk */
	bf16 *factors; /* [FACTORS, PANEL]: further decays of tiles */
	float *kept;   /* [GROUPS, PANEL]: sums of k R (L v) over 16 tokens */
	float *flow;   /* [GROUPS, PANEL]: sums of S L; then of the tokens of a sub-chunk */
	float *g;      /* [CHUNK]: log2 decays up to each token, where channels decay alike */
	float *token;  /* [CHUNK]: sums of q dq - k dk over the channels */
	float *base; /* [8]: a warp's each: the rest of F over the channels; decays: mild or not */
};

template <int PANEL>
static __device__ __forceinline__ place<PANEL> place_of(const struct matrix_recurrence_args &f,
                                                        const struct plan &p)
{
	using L = layout<PANEL>;
	struct place<PANEL> x;
	const unsigned heads = (unsigned)f.n_heads, chunks = (unsigned)p.chunks;

	x.h = (int)(blockIdx.x % heads);
	x.chunk = (int)(blockIdx.x / heads % chunks);
	x.b = (int)(blockIdx.x / heads / chunks);
	x.first = (int64_t)x.chunk * CHUNK;
	x.valid = (int)min((int64_t)CHUNK, f.seq_len - x.first);
	x.q = reinterpret_cast<bf16 *>(shared_memory + L::Q);
	x.k = reinterpret_cast<bf16 *>(shared_memory + L::K);
	x.scores = reinterpret_cast<bf16 *>(shared_memory + L::SCORES);
	x.whole = reinterpret_cast<float *>(shared_memory + L::SMALL);
	x.kept = x.whole + SUBS * PANEL;
	x.flow = x.kept + GROUPS * PANEL;
	x.g = x.flow + GROUPS * PANEL;
	x.token = x.g + CHUNK;
	x.base = x.token + CHUNK;
	x.factors = reinterpret_cast<bf16 *>(x.base + CHUNK);
	return x;
}

/* ---- tiles and their decays ---- */

template <int PANEL>
static __device__ __forceinline__ void load_keys(const struct place<PANEL> &x, const struct plan &p,
                                                 int64_t panel, bool decays)
{
	load_tile<PANEL>(x.q, p.q, x.b, x.h, x.first, x.valid, panel * PANEL);
	load_tile<PANEL>(x.k, p.k, x.b, x.h, x.first, x.valid, panel * PANEL);
	if (decays)
		load_tile<PANEL>(reinterpret_cast<bf16 *>(shared_memory + layout<PANEL>::DECAYS),
		                 p.log_decay, x.b, x.h, x.first, x.valid, panel * PANEL);
	copy_commit();
}

/* Where a thread finds its part of S, L, dout and v of a slab, and where dv goes. */
struct sources {
	const bf16 *state, *gradient, *dout, *v;
	bf16 *dv;
	int columns; /* of values, from this thread's on */
};

template <int PANEL>
static __device__ __forceinline__ struct sources
sources_of(const struct place<PANEL> &x, const struct matrix_recurrence_args &f,
           const struct plan &p, const struct rows &dv, int64_t panel)
{
	const int row = threadIdx.x / (SLAB / 8), column = threadIdx.x % (SLAB / 8) * 8;
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int64_t piece =
	        piece_at<PANEL>(p, x.b * f.n_heads + x.h, x.chunk, panel, 0) + 8 * threadIdx.x;
	const int64_t t = x.first + row;

	return {p.states + piece,
	        p.gradients + piece,
	        at(p.dout.view, x.b, t, x.h) + column,
	        at(p.v.view, x.b, t, x.h) + column,
	        at(dv.view, x.b, x.first + 16 * (warp % GROUPS) + lane / 4, x.h) +
	                16 * (warp / GROUPS) + 4 * (lane % 4),
	        row < x.valid ? (int)p.v.width - column : 0};
}

template <int PANEL>
static __device__ __forceinline__ void load_slab(const struct sources &from, int slab)
{
	using L = layout<PANEL>;
	constexpr int STEP = 8 * THREADS;
	bf16 *const stage =
	        reinterpret_cast<bf16 *>(shared_memory + L::STAGES + slab % 2 * L::STAGE);
	bf16 *const states = stage + 8 * threadIdx.x;
	bf16 *const values = stage + 2 * L::STATE +
	                     offset<SLAB>(threadIdx.x / (SLAB / 8), threadIdx.x % (SLAB / 8));
	const int64_t next = (int64_t)slab * L::STATE;
	const bool inside = SLAB * slab < from.columns;

#pragma unroll
	for (int i = 0; i < L::STATE / STEP; i++) {
		copy16_async(states + i * STEP, from.state + next + i * STEP, true);
		copy16_async(states + L::STATE + i * STEP, from.gradient + next + i * STEP, true);
	}
	copy16_async(values, from.dout + SLAB * slab, inside);
	copy16_async(values + L::VALUES, from.v + SLAB * slab, inside);
	copy_commit();
}

/* A thread's sub-chunk and its two channels, in the panel and in all. */
struct strip {
	int sub, channel;
	int64_t column;
};

template <int PANEL> static __device__ __forceinline__ struct strip strip_of(int64_t panel)
{
	struct strip s;

	s.sub = threadIdx.x / (PANEL / 2);
	s.channel = threadIdx.x % (PANEL / 2) * 2;
	s.column = panel * PANEL + s.channel;
	return s;
}

/* The decay of each sub-chunk; whether all are mild. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ bool sum_decays(const struct place<PANEL> &x,
                                                  const struct strip &s)
{
	bf16 *const decays = reinterpret_cast<bf16 *>(shared_memory + layout<PANEL>::DECAYS);
	float u = 0.0f, w = 0.0f;
	bool mild = true;

	if (s.sub < SUBS) {
#pragma unroll
		for (int i = 0; i < SUB; i++) {
			const uint32_t g = *pair_at<PANEL>(decays, s.sub * SUB + i, s.channel);

			u += low_half(g);
			w += high_half(g);
		}
		u *= LOG2E;
		w *= LOG2E;
		*reinterpret_cast<float2 *>(x.whole + s.sub * PANEL + s.channel) =
		        make_float2(exp2_fast(u), exp2_fast(w));
		mild = u >= -MILD && w >= -MILD;
	}
	mild = __all_sync(0xffffffffu, mild);
	if (threadIdx.x % WARP == 0)
		x.base[threadIdx.x / WARP] = mild ? 1.0f : 0.0f;
	__syncthreads();
	float votes = 0.0f;
#pragma unroll
	for (int i = 0; i < THREADS / WARP; i++)
		votes += x.base[i];
	return votes == (float)(THREADS / WARP);
}

/* q decays from its sub-chunk's start, k to its sub-chunk's end, where they lie; and the decays
 * behind each sub-chunk. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void decay_tiles(const struct place<PANEL> &x,
                                                   const struct strip &s)
{
	bf16 *const decays = reinterpret_cast<bf16 *>(shared_memory + layout<PANEL>::DECAYS);
	uint32_t g[SUB];
	float u = 0.0f, w = 0.0f;

	if (threadIdx.x < PANEL) {
		bf16 *const to = x.factors + threadIdx.x;
		float whole[SUBS], product = 1.0f;

#pragma unroll
		for (int i = SUBS - 1; i >= 0; i--) {
			whole[i] = x.whole[i * PANEL + threadIdx.x];
			to[(REST + i) * PANEL] = __float2bfloat16(product);
			to[(GROWTH + i) * PANEL] = __float2bfloat16(reciprocal_fast(whole[i]));
			product *= whole[i];
		}
		to[BETWEEN * PANEL] = __float2bfloat16(whole[1]);
		to[(BETWEEN + 1) * PANEL] = __float2bfloat16(whole[2]);
		to[(BETWEEN + 2) * PANEL] = __float2bfloat16(whole[1] * whole[2]);
	}
	if (s.sub < SUBS) {
#pragma unroll
		for (int i = 0; i < SUB; i++) {
			uint32_t *const q = pair_at<PANEL>(x.q, s.sub * SUB + i, s.channel);

			g[i] = *pair_at<PANEL>(decays, s.sub * SUB + i, s.channel);
			u += low_half(g[i]) * LOG2E;
			w += high_half(g[i]) * LOG2E;
			*q = multiply_pairs(*q, pack(exp2_fast(u), exp2_fast(w)));
		}
		u = w = 0.0f;
#pragma unroll
		for (int i = SUB - 1; i >= 0; i--) {
			uint32_t *const k = pair_at<PANEL>(x.k, s.sub * SUB + i, s.channel);

			*k = multiply_pairs(*k, pack(exp2_fast(u), exp2_fast(w)));
			u += low_half(g[i]) * LOG2E;
			w += high_half(g[i]) * LOG2E;
		}
	}
	__syncthreads();
}

/* The decays of two neighbouring channels over sub-chunks first .. end-1. */
template <int PANEL>
static __device__ __forceinline__ float2 decay_over(const struct place<PANEL> &x, int first,
                                                    int end, int channel)
{
	float2 product = make_float2(1.0f, 1.0f);

	for (int i = first; i < end; i++) {
		const float2 one = *reinterpret_cast<const float2 *>(x.whole + i * PANEL + channel);

		product = make_float2(product.x * one.x, product.y * one.y);
	}
	return product;
}

/* The inverse of a sub-chunk's decay, if it is mild. */
template <int PANEL>
static __device__ __forceinline__ float2 growth(const struct place<PANEL> &x, int sub, int channel)
{
	const float2 one = *reinterpret_cast<const float2 *>(x.whole + sub * PANEL + channel);

	return make_float2(reciprocal_fast(one.x), reciprocal_fast(one.y));
}

/* A fragment of 16 rows and channels channel .. channel+15 times a row of factors. */
template <int PANEL>
static __device__ __forceinline__ void
decay_fragment(uint32_t (&a)[4], const struct place<PANEL> &x, int which, int channel)
{
	const bf16 *from = x.factors + which * PANEL + channel + 2 * (threadIdx.x % 4);

#pragma unroll
	for (int i = 0; i < 2; i++) {
		const uint32_t two = *reinterpret_cast<const uint32_t *>(from + 8 * i);

		a[2 * i] = multiply_pairs(a[2 * i], two);
		a[2 * i + 1] = multiply_pairs(a[2 * i + 1], two);
	}
}

/* ---- the scores ---- */

/* scatter_sum(), unrolled for certain. */
template <int HALF = SUB / 2>
static __device__ __forceinline__ float sum_lanes(float (&x)[SUB], int lane)
{
	if constexpr (HALF == 0) {
		return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
	} else {
		const bool upper = lane & (2 * HALF);

#pragma unroll
		for (int i = 0; i < HALF; i++) {
			const float low = x[i], high = x[i + HALF];

			x[i] = (upper ? high : low) +
			       __shfl_xor_sync(0xffffffffu, upper ? low : high, 2 * HALF);
		}
		return sum_lanes<HALF / 2>(x, lane);
	}
}

/*
 * Scores inside a sub-chunk, the part of 64 channels, exactly: sum[t] of lane l gains
 * q_t k_s W_ts for s = l / 2 <= t. Before q and k decay.
 */
template <int PANEL>
static __device__ __forceinline__ void add_exact(float (&sum)[SUB], const struct place<PANEL> &x)
{
	bf16 *const decays = reinterpret_cast<bf16 *>(shared_memory + layout<PANEL>::DECAYS);
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int first = warp % SUBS * SUB, channel = warp / SUBS * 64 + 2 * lane;
	const bool busy = channel < PANEL;
	float2 k[SUB];

#pragma unroll
	for (int t = 0; t < SUB; t++) {
		const uint32_t q = busy ? *pair_at<PANEL>(x.q, first + t, channel) : 0;
		const uint32_t now = busy ? *pair_at<PANEL>(x.k, first + t, channel) : 0;
		const uint32_t g = busy ? *pair_at<PANEL>(decays, first + t, channel) : 0;
		const float a0 = exp2_fast(low_half(g) * LOG2E),
		            a1 = exp2_fast(high_half(g) * LOG2E);
		float products[SUB];

		k[t] = make_float2(low_half(now), high_half(now));
#pragma unroll
		for (int s = 0; s < SUB; s++) {
			if (s < t) {
				k[s].x *= a0;
				k[s].y *= a1;
			}
			products[s] = s > t ? 0.0f : low_half(q) * k[s].x + high_half(q) * k[s].y;
		}
		sum[t] += sum_lanes(products, lane);
	}
}

/* Products of 16 rows of two tiles, of queries and of keys. */
template <int PANEL>
static __device__ __forceinline__ void load_fragments(uint32_t (&left)[4], uint32_t (&right)[4],
                                                      const struct place<PANEL> &x, int query,
                                                      int key, int step)
{
	load_matrices(left, down_first<PANEL>(x.q, 16 * query, 2 * step));
	load_matrices(right, across_first<PANEL>(x.k, 16 * key, 2 * step));
}

/* Undecayed scores of this warp's sub-chunk with itself, of which the diagonal is used. */
template <int PANEL>
static __device__ __forceinline__ void add_own(float (&own)[2][4], const struct place<PANEL> &x)
{
	const int warp = threadIdx.x / WARP, group = warp % GROUPS;

	if (warp / GROUPS != group / 2)
		return;
#pragma unroll
	for (int step = 0; step < PANEL / 16; step++) {
		uint32_t left[4], right[4];

		load_fragments<PANEL>(left, right, x, group, group, step);
		multiply_add(own[0], left, right[0], right[1]);
		multiply_add(own[1], left, right[2], right[3]);
	}
}

/* The scores of 16 queries and 32 keys, from a panel. Diagonal: of tiles that have decayed, those
 * of the query's sub-chunk only if decays are mild. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void add_scores(float (&s)[4][4], const struct place<PANEL> &x,
                                                  bool mild)
{
	const int warp = threadIdx.x / WARP, group = warp % GROUPS;

#pragma unroll
	for (int n = 0; n < 2; n++) {
		const int other = 2 * (warp / GROUPS) + n;

		const int which = other == group       ? GROWTH + group
		                  : other == group - 1 ? REST + SUBS - 1
		                                       : BETWEEN + group - 2 + (group - other) / 3;

		if (other > group || (DIAGONAL && other == group && !mild))
			continue;
#pragma unroll
		for (int step = 0; step < PANEL / 16; step++) {
			uint32_t left[4], right[4];

			load_fragments<PANEL>(left, right, x, group, other, step);
			if (DIAGONAL)
				decay_fragment<PANEL>(left, x, which, 16 * step);
			multiply_add(s[2 * n], left, right[0], right[1]);
			multiply_add(s[2 * n + 1], left, right[2], right[3]);
		}
	}
}

/* Writes 16 x 32 scores; those of later keys become zero. Where channels decay alike, the scores
 * decay here. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void store_scores(const float (&s)[4][4],
                                                    const struct place<PANEL> &x)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

#pragma unroll
	for (int n = 0; n < 4; n++)
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int i = 16 * (warp % GROUPS) + 8 * half + lane / 4;
			const int j = 32 * (warp / GROUPS) + 8 * n + 2 * (lane % 4);
			float u = j <= i ? s[n][2 * half] : 0.0f;
			float w = j + 1 <= i ? s[n][2 * half + 1] : 0.0f;

			if (!DIAGONAL && j <= i) {
				u *= decay_between(x.g[j], x.g[i]);
				w *= decay_between(x.g[j + 1], x.g[i]);
			}
			*pair_at<CHUNK>(x.scores, i, j) = pack(u, w);
		}
}

/* Adds the exact scores of this warp's sub-chunk, and those of tokens with themselves, if the keys
 * are among the warp's. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void place_exact(float (&s)[4][4], const float (&own)[2][4],
                                                   const float (&sum)[SUB],
                                                   const struct place<PANEL> &x)
{
	float *const exact = reinterpret_cast<float *>(shared_memory + layout<PANEL>::EXACT);
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int group = warp % GROUPS;

	if (lane % 2 == 0) {
#pragma unroll
		for (int t = 0; t < SUB; t++)
			exact[(warp * SUB + t) * SUB + lane / 2] = sum[t];
	}
	__syncthreads();
#pragma unroll
	for (int n = 0; n < 4; n++) {
		if (2 * (warp / GROUPS) + n / 2 != group)
			continue;
#pragma unroll
		for (int e = 0; e < 4; e++) {
			const int i = lane / 4 + e / 2 * 8, j = n % 2 * 8 + 2 * (lane % 4) + e % 2;
			const float *one = exact + (group * SUB + i) * SUB + j;

			s[n][e] = (i == j ? own[n % 2][e] : s[n][e]) + one[0] +
			          one[GROUPS * SUB * SUB];
		}
	}
}

} // namespace matrix_backward

#endif
