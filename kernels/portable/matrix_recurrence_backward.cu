/*
 * Gradients of the plain matrix recurrence S_t = A_t S_{t-1} + k_t^T v_t,
 * o_t = scale q_t S_t, chunkwise on the tensor cores, the same in every run:
 *   1. and 2. the states before the chunks and the gradients L of those after
 *      them (matrix_backward_sweep.cu);
 *   3. here, all chunks in parallel, with W_ij the decays from behind token j to
 *      token i, P_i from the chunk's start, R_j to its end, and
 *      B = tril(q k^T W), dB = tril(dout v^T):
 *        dq_i = P_i (S dout_i) + sum over j <= i of dB_ij W_ij k_j
 *        dk_j = R_j (L v_j)    + sum over i >= j of dB_ij W_ij q_i
 *        dv_j = (k_j R_j) L    + sum over i >= j of B_ij dout_i;
 *   and the gradient of log A_t, what flows through it: from S and from the
 *   tokens before t to L and to the tokens from t on,
 *        F_t = D rowsum(S L) + sum of k R (L v) + sum over i >= t of (q_i dq_i - k_i dk_i).
 *   A pair of tokens that lies on one side of t cancels in the last sum. Both of its
 *   terms are therefore made of the same rounded factors, and no sum is longer
 *   than a chunk.
 *
 * Every decay is 2^x with x <= 0. Diagonal decays: between sub-chunks of 16
 * tokens they are split at the ends of sub-chunks: queries decay from the end before theirs,
 * keys to their own's end, and the sums, fp32, decay by whole sub-chunks while they
 * grow (Horner). Pairs inside a sub-chunk are taken one by one, fp32, with
 * products of the decays. Decays of all channels alike multiply the scores.
 *
 * A block of eight warps takes a chunk of a head: first the scores B of all panels, then panel
 * after panel, the last one first, slabs of 32 columns of S, L, v and dout, two of them in shared
 * memory. Warp w has the 16 tokens w % 4, and of them half w / 4 of the panel's
 * channels, of the slab's columns or of the other tokens. From the second panel on
 * dv is added to what is already in memory.
 *
 * Limited by memory, 7.3 KB for a token of a head of 128 x 128 with diagonal decays in all three
 * passes: docs/kernels/matrix_backward.md. 128 registers, 98 KB of shared memory, two blocks on a
 * multiprocessor. Any widths, any strides: what is not in whole pieces of
 * 16 bytes is loaded element by element.
 */
#include "kernels/portable/kernels.h"
#include "kernels/portable/matrix_backward.cuh"

namespace
{

using namespace matrix_backward;

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
static __device__ __forceinline__ struct place<PANEL>
place_of(const struct matrix_recurrence_args &f, const struct plan &p) {
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
			*q = pack(low_half(*q) * exp2_fast(u), high_half(*q) * exp2_fast(w));
		}
		u = w = 0.0f;
#pragma unroll
		for (int i = SUB - 1; i >= 0; i--) {
			uint32_t *const k = pair_at<PANEL>(x.k, s.sub * SUB + i, s.channel);

			*k = pack(low_half(*k) * exp2_fast(u), high_half(*k) * exp2_fast(w));
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
				u *= exp2_fast(x.g[i] - x.g[j]);
				w *= exp2_fast(min_or_nan(x.g[i] - x.g[j + 1], 0.0f));
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

/* ---- a slab ---- */

/* Where this lane's rows of matrices are, of tiles that only some warps read. */
struct lanes {
	int scores; /* transposed: of queries 0 .. 15, the warp's keys */
	int values; /* dout of tokens 0 .. 15, the warp's columns */
	int keys;   /* v of the warp's first keys */
};

static __device__ __forceinline__ struct lanes lanes_of()
{
	const int warp = threadIdx.x / WARP, group = warp % GROUPS, half = warp / GROUPS;

	return {held(lane_across<CHUNK>() ^ 16 * group), held(lane_down<SLAB>() ^ 16 * half),
	        held(32 * half * SLAB + lane_across<SLAB>())};
}

/* a += rows of a tile of values times S^T or L^T: 16 tokens, half of the panel's channels. */
template <int PANEL>
static __device__ __forceinline__ void
add_state(float (&a)[PANEL / 16][4], const uint32_t (&left)[4], const bf16 *state, int step)
{
	const int lane = threadIdx.x % WARP, half = threadIdx.x / WARP / GROUPS;
	const bf16 *const from =
	        state + ((half * (PANEL / 16) + lane / 16) * (SLAB / 8) + lane / 8 % 2) * 64 +
	        lane % 8 * 8;
	uint32_t right[4];

#pragma unroll
	for (int n = 0; n < PANEL / 32; n++) {
		load_matrices(right, from + (2 * n * SLAB / 8 + 2 * step) * 64);
		multiply_add(a[2 * n], left, right[0], right[1]);
		multiply_add(a[2 * n + 1], left, right[2], right[3]);
	}
}

/* dB of 16 queries and those of 32 keys that come no later than the sub-chunk. */
static __device__ __forceinline__ void add_dscores(float (&s)[4][4], const uint32_t (&left)[4],
                                                   const bf16 *v, const struct lanes &at, int step)
{
	const int warp = threadIdx.x / WARP;
	uint32_t right[4];

#pragma unroll
	for (int n = 0; n < 2; n++) {
		const int other = 2 * (warp / GROUPS) + n;

		if (other > warp % GROUPS)
			continue;
		load_matrices(right, v + 16 * n * SLAB + (at.keys ^ 16 * step));
		multiply_add(s[2 * n], left, right[0], right[1]);
		multiply_add(s[2 * n + 1], left, right[2], right[3]);
	}
}

/* dv of 16 tokens and half of the slab's columns; with `within`, from the chunk's tokens, too. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void
value_gradients(float (&d)[2][4], const struct place<PANEL> &x, const bf16 *gradient,
                const bf16 *dout, const struct lanes &at, bool within)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int group = warp % GROUPS, half = warp / GROUPS;
	const bf16 *const from =
	        gradient + (lane / 8 % 2 * (SLAB / 8) + 2 * half + lane / 16) * 64 + lane % 8 * 8;
	uint32_t left[4], right[4];

#pragma unroll
	for (int step = 0; step < PANEL / 16; step++) {
		load_matrices(left, down_first<PANEL>(x.k, 16 * group, 2 * step));
		if (DIAGONAL)
			decay_fragment<PANEL>(left, x, REST + group, 16 * step);
		load_matrices_transposed(right, from + step * 2 * SLAB / 8 * 64);
		multiply_add(d[0], left, right[0], right[1]);
		multiply_add(d[1], left, right[2], right[3]);
	}
	if (!DIAGONAL) {
#pragma unroll
		for (int e = 0; e < 4; e++) {
			const float factor =
			        exp2_fast(x.g[CHUNK - 1] - x.g[16 * group + lane / 4 + e / 2 * 8]);

			d[0][e] *= factor;
			d[1][e] *= factor;
		}
	}
	if (!within)
		return;
#pragma unroll
	for (int other = 0; other < GROUPS; other++) {
		if (other < group)
			continue;
		load_matrices_transposed(left, x.scores + 16 * other * CHUNK + at.scores);
		load_matrices_transposed(right, dout + 16 * other * SLAB + at.values);
		multiply_add(d[0], left, right[0], right[1]);
		multiply_add(d[1], left, right[2], right[3]);
	}
}

/* Four columns 4 c .. 4 c + 3 for lane c of a row's four, of pairs 2 c, 2 c + 1 of two times eight
 * columns, times scale. */
static __device__ __forceinline__ uint2 trade_pairs(const float *left, const float *right,
                                                    float scale)
{
	const int c = threadIdx.x % 4;
	const uint32_t a = pack(scale * left[0], scale * left[1]);
	const uint32_t b = pack(scale * right[0], scale * right[1]);
	const uint32_t far = __shfl_xor_sync(0xffffffffu, c < 2 ? b : a, 2);
	const uint32_t low = c < 2 ? a : far, high = c < 2 ? far : b;
	const uint32_t near = __shfl_xor_sync(0xffffffffu, c % 2 ? low : high, 1);

	return make_uint2(c % 2 ? near : low, c % 2 ? high : near);
}

/* Writes dv of a slab, 32 bytes of a row side by side; `more`: adds to what is there. */
template <int PANEL>
static __device__ __forceinline__ void
store_values(const float (&d)[2][4], const struct place<PANEL> &x, const struct rows &dv, bf16 *to,
             float scale, int slab, bool more)
{
	const int c = threadIdx.x % 4, warp = threadIdx.x / WARP;
	const int row = 16 * (warp % GROUPS) + threadIdx.x % WARP / 4;
	const bool inside = SLAB * slab + 16 * (warp / GROUPS) + 4 * c < dv.width;

#pragma unroll
	for (int half = 0; half < 2; half++) {
		uint2 *const place =
		        reinterpret_cast<uint2 *>(to + SLAB * slab + 8 * half * dv.view.token);
		const bool valid = inside && row + 8 * half < x.valid;
		uint2 four = trade_pairs(d[0] + 2 * half, d[1] + 2 * half, scale);

		if (more && valid) {
			const uint2 old = *place;

			four.x = pack(low_half(four.x) + low_half(old.x),
			              high_half(four.x) + high_half(old.x));
			four.y = pack(low_half(four.y) + low_half(old.y),
			              high_half(four.y) + high_half(old.y));
		}
		if (valid)
			*place = four;
	}
}

/*
 * sums: those of the rows of S times L, 16 rows of a warp (of 64 rows, half of the columns), in
 * the diagonals of rows 0 .. 7 and 8 .. 15 times themselves.
 */
template <int PANEL>
static __device__ __forceinline__ void multiply_states(float (&sums)[4], const bf16 *state,
                                                       const bf16 *gradient)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int first = 2 * (warp % (PANEL / 16)) + lane / 8 % 2;

#pragma unroll
	for (int step = 0; step < PANEL / 64; step++) {
		const int column = 2 * (PANEL == 64 ? warp / 4 : step) + lane / 16;
		const int at = (first * (SLAB / 8) + column) * 64 + lane % 8 * 8;
		uint32_t s[4], l[4];

		/* Rows 0 and 8, then the columns behind. */
		load_matrices(s, state + at);
		load_matrices(l, gradient + at);
		const uint32_t upper[4] = {s[0], 0, s[2], 0}, lower[4] = {0, s[1], 0, s[3]};
		multiply_add(sums, upper, l[0], l[2]);
		multiply_add(sums, lower, l[1], l[3]);
	}
}

/* Leaves them in flow. */
template <int PANEL>
static __device__ __forceinline__ void store_products(const float (&sums)[4],
                                                      const struct place<PANEL> &x)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	float *const to = x.flow + 16 * warp + lane / 4;

	if (lane / 8 == lane % 4) {
		to[0] = lane / 4 % 2 ? sums[1] : sums[0];
		to[8] = lane / 4 % 2 ? sums[3] : sums[2];
	}
}

/* ---- after the slabs ---- */

/* This lane's channel of pair n of sums, counted within the panel. */
template <int PANEL> static __device__ __forceinline__ int channel_of(int n)
{
	return threadIdx.x / WARP / GROUPS * (PANEL / 2) + 8 * n + 2 * (threadIdx.x % 4);
}

/* Decays of tokens: dq from the state by P, dk by R. */
template <int PANEL>
static __device__ __forceinline__ void
decay_sums(float (&dq)[PANEL / 16][4], float (&dk)[PANEL / 16][4], const struct place<PANEL> &x)
{
	const int row = 16 * (threadIdx.x / WARP % GROUPS) + threadIdx.x % WARP / 4;

#pragma unroll
	for (int half = 0; half < 2; half++) {
		const float g = x.g[row + 8 * half];
		const float since = exp2_fast(g), until = exp2_fast(x.g[CHUNK - 1] - g);

#pragma unroll
		for (int n = 0; n < PANEL / 16; n++)
#pragma unroll
			for (int e = 2 * half; e < 2 * half + 2; e++) {
				dq[n][e] *= since;
				dk[n][e] *= until;
			}
	}
}

/* Sums over the eight lanes of a channel: x[2 i], x[2 i + 1] of the lane whose row is i. */
template <int COUNT, int BIT = 4> static __device__ __forceinline__ void sum_rows(float (&x)[COUNT])
{
	constexpr int HALF = COUNT * 2 / BIT;

	if constexpr (BIT < WARP) {
		const bool upper = threadIdx.x & BIT;

#pragma unroll
		for (int i = 0; i < HALF; i++) {
			const float low = x[i], high = x[i + HALF];

			x[i] = (upper ? high : low) +
			       __shfl_xor_sync(0xffffffffu, upper ? low : high, BIT);
		}
		sum_rows<COUNT, 2 * BIT>(x);
	}
}

/* kept: sums of k R (L v) over the warp's tokens, channel by channel. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void sum_kept(const float (&dk)[PANEL / 16][4],
                                                const struct place<PANEL> &x)
{
	const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP % GROUPS;
	const int row = 16 * group + lane / 4;
	float sums[16] = {};

#pragma unroll
	for (int n = 0; n < PANEL / 16; n++) {
		const int channel = channel_of<PANEL>(n);
		const uint32_t a = *pair_at<PANEL>(x.k, row, channel);
		const uint32_t b = *pair_at<PANEL>(x.k, row + 8, channel);

		sums[2 * n] = low_half(a) * dk[n][0] + low_half(b) * dk[n][2];
		sums[2 * n + 1] = high_half(a) * dk[n][1] + high_half(b) * dk[n][3];
	}
	sum_rows(sums);
	const int n = lane / 4 % 2 * 4 + lane / 8 % 2 * 2 + lane / 16;
	if (n >= PANEL / 16)
		return;
	const int channel = channel_of<PANEL>(n);
	float2 pair = make_float2(sums[0], sums[1]);
	if (DIAGONAL) {
		const float2 rest = decay_over<PANEL>(x, group + 1, SUBS, channel);

		pair = make_float2(pair.x * rest.x, pair.y * rest.y);
	}
	*reinterpret_cast<float2 *>(x.kept + group * PANEL + channel) = pair;
}

/* d times factor(channel), which is for two channels. */
template <int PANEL, typename Factor>
static __device__ __forceinline__ void multiply_channels(float (&d)[PANEL / 16][4],
                                                         const Factor &factor)
{
#pragma unroll
	for (int n = 0; n < PANEL / 16; n++) {
		const float2 two = factor(channel_of<PANEL>(n));

		d[n][0] *= two.x;
		d[n][1] *= two.y;
		d[n][2] *= two.x;
		d[n][3] *= two.y;
	}
}

/* d += dB rows of this warp's tokens (dq), or its columns (dk, TRANSPOSED), times 16 rows of a
 * tile.
 */
template <int PANEL, bool TRANSPOSED>
static __device__ __forceinline__ void
add_pairs(float (&d)[PANEL / 16][4], const struct place<PANEL> &x, const bf16 *tile, int other)
{
	const int warp = threadIdx.x / WARP, group = warp % GROUPS, half = warp / GROUPS;
	uint32_t left[4], right[4];

	if (TRANSPOSED)
		load_matrices_transposed(left,
		                         across_first<CHUNK>(x.scores, 16 * other, 2 * group));
	else
		load_matrices(left, down_first<CHUNK>(x.scores, 16 * group, 2 * other));
#pragma unroll
	for (int n = 0; n < PANEL / 32; n++) {
		load_matrices_transposed(
		        right, down_first<PANEL>(tile, 16 * other, half * (PANEL / 16) + 2 * n));
		multiply_add(d[2 * n], left, right[0], right[1]);
		multiply_add(d[2 * n + 1], left, right[2], right[3]);
	}
}

/* dq, or dk (TRANSPOSED), from one of the chunk's sub-chunks. Diagonal: relative to the end between
 * it and the next towards the warp's own; mild decays inside that by way of its other end. */
template <int PANEL, bool DIAGONAL, bool TRANSPOSED>
static __device__ __forceinline__ void add_sub(float (&d)[PANEL / 16][4],
                                               const struct place<PANEL> &x, int other)
{
	const int group = threadIdx.x / WARP % GROUPS;

	if (DIAGONAL)
		multiply_channels<PANEL>(d, [&](int channel) {
			return decay_over<PANEL>(x, other, other + 1, channel);
		});
	add_pairs<PANEL, TRANSPOSED>(d, x, TRANSPOSED ? x.q : x.k, other);
	if (DIAGONAL && other == group)
		multiply_channels<PANEL>(
		        d, [&](int channel) { return growth<PANEL>(x, other, channel); });
}

/* dq and dk from the chunk's tokens; diagonal: relative to the ends of sub-chunks, from the warp's
 * own only if decays are mild. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void add_within(float (&dq)[PANEL / 16][4],
                                                  float (&dk)[PANEL / 16][4],
                                                  const struct place<PANEL> &x, bool mild)
{
	const int group = threadIdx.x / WARP % GROUPS, own = !DIAGONAL || mild;

#pragma unroll 1
	for (int other = 0; other < group + own; other++)
		add_sub<PANEL, DIAGONAL, false>(dq, x, other);
#pragma unroll 1
	for (int other = SUBS - 1; other > group - own; other--)
		add_sub<PANEL, DIAGONAL, true>(dk, x, other);
}

/* dk = q dq - k dk, with the tiles as they have decayed. */
template <int PANEL>
static __device__ __forceinline__ void difference(float (&dk)[PANEL / 16][4],
                                                  const float (&dq)[PANEL / 16][4],
                                                  const struct place<PANEL> &x)
{
	const int row = 16 * (threadIdx.x / WARP % GROUPS) + threadIdx.x % WARP / 4;

#pragma unroll
	for (int n = 0; n < PANEL / 16; n++)
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int channel = channel_of<PANEL>(n);
			const uint32_t q = *pair_at<PANEL>(x.q, row + 8 * half, channel);
			const uint32_t k = *pair_at<PANEL>(x.k, row + 8 * half, channel);
			float &u = dk[n][2 * half], &w = dk[n][2 * half + 1];

			u = low_half(q) * dq[n][2 * half] - low_half(k) * u;
			w = high_half(q) * dq[n][2 * half + 1] - high_half(k) * w;
		}
}

/* A pair of channels in a tile of fp32 sums, without conflicts for fragments and for rows. */
template <int PANEL>
static __device__ __forceinline__ float2 *sum_at(float *tile, int row, int channel)
{
	return reinterpret_cast<float2 *>(tile + row * PANEL) + (channel / 2 ^ (row & 3) << 2);
}

template <int PANEL>
static __device__ __forceinline__ void store_sums(float *tile, const float (&d)[PANEL / 16][4])
{
	const int row = 16 * (threadIdx.x / WARP % GROUPS) + threadIdx.x % WARP / 4;

#pragma unroll
	for (int n = 0; n < PANEL / 16; n++)
#pragma unroll
		for (int half = 0; half < 2; half++)
			*sum_at<PANEL>(tile, row + 8 * half, channel_of<PANEL>(n)) =
			        make_float2(d[n][2 * half], d[n][2 * half + 1]);
}

/* dB inside the sub-chunks, fp32, as rows and as columns: pairs[sub][i][j], and [j][i] behind. */
template <int PANEL>
static __device__ __forceinline__ void spread_pairs(float *pairs, const struct place<PANEL> &x)
{
	for (int index = threadIdx.x; index < SUBS * SUB * SUB / 2; index += THREADS) {
		const int row = index / (SUB / 2), j = index % (SUB / 2) * 2, sub = row / SUB;
		const uint32_t pair = *pair_at<CHUNK>(x.scores, row, sub * SUB + j);
		float *const columns = pairs + (SUBS + sub) * SUB * SUB + row % SUB;

		pairs[row * SUB + j] = low_half(pair);
		pairs[row * SUB + j + 1] = high_half(pair);
		columns[j * SUB] = low_half(pair);
		columns[(j + 1) * SUB] = high_half(pair);
	}
}

/* A row of pairs times the vectors, of which only FROM .. END-1 count. */
template <int FROM, int END>
static __device__ __forceinline__ float2 weigh(const float *weights, const float2 (&x)[SUB])
{
	float2 sum = {};

#pragma unroll
	for (int i = FROM / 4; i < (END + 3) / 4; i++) {
		const float4 four = reinterpret_cast<const float4 *>(weights)[i];
		const float w[4] = {four.x, four.y, four.z, four.w};

#pragma unroll
		for (int e = 0; e < 4; e++)
			if (4 * i + e >= FROM && 4 * i + e < END) {
				sum.x += w[e] * x[4 * i + e].x;
				sum.y += w[e] * x[4 * i + e].y;
			}
	}
	return sum;
}

/* Calls visit(integral constant i) for i = FROM .. END-1, or backwards. */
template <int I> struct index {
	static constexpr int value = I;
};

template <int FROM, int END, typename Visit>
static __device__ __forceinline__ void upwards(const Visit &visit)
{
	if constexpr (FROM < END) {
		visit(index<FROM>());
		upwards<FROM + 1, END>(visit);
	}
}

template <int FROM, int END, typename Visit>
static __device__ __forceinline__ void downwards(const Visit &visit)
{
	if constexpr (FROM < END) {
		visit(index<END - 1>());
		downwards<FROM, END - 1>(visit);
	}
}

/* A strip's q dq - k dk, zeros for threads without a strip. */
template <int PANEL>
static __device__ __forceinline__ void load_flow(float2 (&flow)[SUB], float *tile,
                                                 const struct strip &s)
{
#pragma unroll
	for (int i = 0; i < SUB; i++)
		flow[i] = s.sub < SUBS ? *sum_at<PANEL>(tile, s.sub * SUB + i, s.channel)
		                       : make_float2(0.0f, 0.0f);
}

/* A strip of a tensor in memory, token after token. */
struct strip_cursor {
	bf16 *at;
	int64_t step;
	int valid; /* tokens of the strip */
};

template <int PANEL>
static __device__ __forceinline__ struct strip_cursor
cursor_of(const struct place<PANEL> &x, const struct rows &r, const struct strip &s)
{
	const bool inside = s.sub < SUBS && s.column < r.width;

	return {held(at(r.view, x.b, x.first + s.sub * SUB, x.h) + s.column), r.view.token,
	        inside ? x.valid - s.sub * SUB : 0};
}

/* Pairs of the strip's tokens, zeros outside. */
template <int PANEL>
static __device__ __forceinline__ void load_strip(uint32_t (&pairs)[SUB],
                                                  const struct place<PANEL> &x,
                                                  const struct rows &r, const struct strip &s)
{
	const struct strip_cursor c = cursor_of<PANEL>(x, r, s);

#pragma unroll
	for (int i = 0; i < SUB; i++)
		pairs[i] = i < c.valid ? *reinterpret_cast<const uint32_t *>(c.at + i * c.step) : 0;
}

static __device__ __forceinline__ void store_strip(const struct strip_cursor &c, int i, float2 pair,
                                                   float scale)
{
	if (i < c.valid)
		*reinterpret_cast<uint32_t *>(c.at + i * c.step) =
		        pack(scale * pair.x, scale * pair.y);
}

/* What a strip needs again from memory: decays, and for pairs inside the sub-chunk q and k. */
struct strip_values {
	uint32_t g[SUB], q[SUB], k[SUB];
};

static __device__ __forceinline__ float2 halves(uint32_t pair)
{
	return make_float2(low_half(pair), high_half(pair));
}

static __device__ __forceinline__ float2 exp2_both(float2 x)
{
	return make_float2(exp2_fast(x.x * LOG2E), exp2_fast(x.y * LOG2E));
}

static __device__ __forceinline__ float2 product(float2 a, float2 b)
{
	return make_float2(a.x * b.x, a.y * b.y);
}

static __device__ __forceinline__ float2 sum(float2 a, float2 b)
{
	return make_float2(a.x + b.x, a.y + b.y);
}

/* Writes dq of a strip. EXACT: with the pairs inside the sub-chunk, and flow gets their q dq. */
template <int PANEL, bool EXACT>
static __device__ __forceinline__ void
finish_queries(float2 (&flow)[SUB], const struct strip_values &values, const struct strip &s,
               const struct strip_cursor &to, float scale)
{
	float *const tile = reinterpret_cast<float *>(shared_memory + layout<PANEL>::DQ);
	const float *const pairs =
	        reinterpret_cast<const float *>(shared_memory + layout<PANEL>::PAIRS) +
	        s.sub * SUB * SUB;
	float2 k[SUB] = {}, g = {};

	upwards<0, SUB>([&](auto at_token) {
		constexpr int i = decltype(at_token)::value;
		float2 d = *sum_at<PANEL>(tile, s.sub * SUB + i, s.channel);

		const float2 one = halves(values.g[i]);

		g = sum(g, one);
		d = product(d, exp2_both(g));
		if constexpr (EXACT) {
			const float2 a = exp2_both(one);

			k[i] = halves(values.k[i]);
#pragma unroll
			for (int j = 0; j < i; j++)
				k[j] = product(k[j], a);
			const float2 near = weigh<0, i + 1>(pairs + i * SUB, k);

			d = sum(d, near);
			flow[i] = sum(flow[i], product(halves(values.q[i]), near));
		}
		store_strip(to, i, d, scale);
	});
}

/* The same of dk, backwards; flow loses k dk of the pairs. */
template <int PANEL, bool EXACT>
static __device__ __forceinline__ void
finish_keys(float2 (&flow)[SUB], const struct strip_values &values, const struct strip &s,
            const struct strip_cursor &to, float scale)
{
	float *const tile = reinterpret_cast<float *>(shared_memory + layout<PANEL>::DK);
	const float *const pairs =
	        reinterpret_cast<const float *>(shared_memory + layout<PANEL>::PAIRS) +
	        (SUBS + s.sub) * SUB * SUB;
	float2 q[SUB] = {}, g = {}, a = {};

	downwards<0, SUB>([&](auto at_token) {
		constexpr int j = decltype(at_token)::value;
		float2 d = *sum_at<PANEL>(tile, s.sub * SUB + j, s.channel);

		const float2 one = halves(values.g[j]);

		d = product(d, exp2_both(g));
		g = sum(g, one);
		if constexpr (EXACT) {
			q[j] = halves(values.q[j]);
#pragma unroll
			for (int i = j + 1; i < SUB; i++)
				q[i] = product(q[i], a);
			const float2 near = weigh<j, SUB>(pairs + j * SUB, q);
			const float2 lost = product(halves(values.k[j]), near);

			d = sum(d, near);
			flow[j] = make_float2(flow[j].x - lost.x, flow[j].y - lost.y);
			a = exp2_both(one);
		}
		store_strip(to, j, d, scale);
	});
}

template <int PANEL, bool EXACT>
static __device__ __forceinline__ void
finish_both(float2 (&flow)[SUB], struct strip_values &values, const struct place<PANEL> &x,
            const struct plan &p, const struct strip &s, const struct outputs &o, float scale)
{
	if (s.sub >= SUBS)
		return;
	if (EXACT) {
		load_strip<PANEL>(values.q, x, p.q, s);
		load_strip<PANEL>(values.k, x, p.k, s);
	}
	finish_queries<PANEL, EXACT>(flow, values, s, cursor_of<PANEL>(x, o.dq, s), scale);
	finish_keys<PANEL, EXACT>(flow, values, s, cursor_of<PANEL>(x, o.dk, s), scale);
}

/* A first token has no state to decay, where rounding would leave something. */
static __device__ __forceinline__ float
only_if_decaying(float flow, const struct matrix_recurrence_args &f, int64_t t)
{
	return t == 0 && !f.h0 && !isnan(flow) ? 0.0f : flow;
}

/* What flows past the chunk's end or its start, of one channel: the F of a token behind it. */
template <int PANEL>
static __device__ __forceinline__ float flow_behind(const struct place<PANEL> &x, int channel,
                                                    float whole)
{
	float sum = 0.0f, product = 0.0f;

#pragma unroll
	for (int i = 0; i < GROUPS; i++) {
		sum += x.kept[i * PANEL + channel];
		product += i < 128 / PANEL ? x.flow[i * PANEL + channel] : 0.0f;
	}
	return whole * product + sum;
}

/* Diagonal: the sums of flow from each token on, to memory. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void finish_channels(float2 (&flow)[SUB],
                                                       const struct place<PANEL> &x,
                                                       const struct matrix_recurrence_args &f,
                                                       const struct strip &s, const struct rows &to)
{
	const bool busy = s.sub < SUBS;
	float2 rest = {};

	if (busy) {
		const float2 whole = decay_over<PANEL>(x, 0, SUBS, s.channel);

		rest = make_float2(flow_behind<PANEL>(x, s.channel, whole.x),
		                   flow_behind<PANEL>(x, s.channel + 1, whole.y));
	}
	__syncthreads();
	if (busy) {
		float2 all = {};

#pragma unroll
		for (int i = 0; i < SUB; i++)
			all = sum(all, flow[i]);
		*reinterpret_cast<float2 *>(x.flow + s.sub * PANEL + s.channel) = all;
	}
	__syncthreads();
	if (!busy)
		return;
	const struct strip_cursor cursor = cursor_of<PANEL>(x, to, s);
	const int64_t t = x.first + s.sub * SUB;
	for (int sub = SUBS - 1; sub > s.sub; sub--)
		rest = sum(rest,
		           *reinterpret_cast<const float2 *>(x.flow + sub * PANEL + s.channel));
#pragma unroll
	for (int i = SUB - 1; i >= 0; i--) {
		rest = sum(rest, flow[i]);
		if (i == 0)
			rest = make_float2(only_if_decaying(rest.x, f, t),
			                   only_if_decaying(rest.y, f, t));
		store_strip(cursor, i, rest, f.scale);
	}
}

/* Diagonal: dq, dk and dlog_decay of a panel from the sums, which are relative to the ends of
 * sub-chunks. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void
finish_diagonal(const float (&dq)[PANEL / 16][4], float (&dk)[PANEL / 16][4],
                const struct place<PANEL> &x, const struct matrix_recurrence_args &f,
                const struct plan &p, const struct strip &s, const struct outputs &o, bool mild)
{
	using L = layout<PANEL>;
	float *const dq_tile = reinterpret_cast<float *>(shared_memory + L::DQ);
	struct strip_values values;
	float2 flow[SUB];

	if (!mild)
		spread_pairs<PANEL>(reinterpret_cast<float *>(shared_memory + L::PAIRS), x);
	__syncthreads();
	store_sums<PANEL>(reinterpret_cast<float *>(shared_memory + L::DK), dk);
	load_strip<PANEL>(values.g, x, p.log_decay, s);
	/* Into dk's registers: the tiles are where dq's sums will be. */
	difference<PANEL>(dk, dq, x);
	__syncthreads();
	store_sums<PANEL>(dq_tile, dk);
	__syncthreads();
	load_flow<PANEL>(flow, dq_tile, s);
	__syncthreads();
	store_sums<PANEL>(dq_tile, dq);
	__syncthreads();
	if (mild)
		finish_both<PANEL, false>(flow, values, x, p, s, o, f.scale);
	else
		finish_both<PANEL, true>(flow, values, x, p, s, o, f.scale);
	finish_channels<PANEL>(flow, x, f, s, o.dlog_decay);
}

/* Writes 16 tokens and half of the panel's channels. */
template <int PANEL>
static __device__ __forceinline__ void store_rows(const float (&d)[PANEL / 16][4],
                                                  const struct place<PANEL> &x,
                                                  const struct rows &to, int64_t panel, float scale)
{
	const int warp = threadIdx.x / WARP;
	const int row = 16 * (warp % GROUPS) + threadIdx.x % WARP / 4;
	const int64_t column = panel * PANEL + warp / GROUPS * (PANEL / 2) + 4 * (threadIdx.x % 4);
	bf16 *const place = at(to.view, x.b, x.first + row, x.h) + column;

#pragma unroll
	for (int half = 0; half < 2; half++)
#pragma unroll
		for (int n = 0; n < PANEL / 16; n += 2) {
			const uint2 four = trade_pairs(d[n] + 2 * half, d[n + 1] + 2 * half, scale);

			if (row + 8 * half < x.valid && column + 8 * n < to.width)
				*reinterpret_cast<uint2 *>(place + 8 * half * to.view.token +
				                           8 * n) = four;
		}
}

/* Channels that decay alike: adds a panel's q dq - k dk to the tokens' sums. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void add_tokens(const float (&dq)[PANEL / 16][4],
                                                  const float (&dk)[PANEL / 16][4],
                                                  const struct place<PANEL> &x, bool first)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int row = 16 * (warp % GROUPS) + lane / 4;
	float base = 0.0f;

#pragma unroll
	for (int half = 0; half < 2; half++) {
		float sum = 0.0f;

#pragma unroll
		for (int n = 0; n < PANEL / 16; n++) {
			const int channel = channel_of<PANEL>(n);
			const uint32_t q = *pair_at<PANEL>(x.q, row + 8 * half, channel);
			const uint32_t k = *pair_at<PANEL>(x.k, row + 8 * half, channel);

			sum += low_half(q) * dq[n][2 * half] - low_half(k) * dk[n][2 * half];
			sum += high_half(q) * dq[n][2 * half + 1] -
			       high_half(k) * dk[n][2 * half + 1];
		}
		sum = group_sum(sum, 4);
		if (lane % 4 == 0)
			x.whole[warp / GROUPS * CHUNK + row + 8 * half] = sum;
	}
	if (threadIdx.x < PANEL)
		base = flow_behind<PANEL>(x, threadIdx.x, exp2_fast(x.g[CHUNK - 1]));
	base = group_sum(base, WARP);
	if (lane == 0)
		x.base[warp] = (first ? 0.0f : x.base[warp]) + base;
	__syncthreads();
	if (threadIdx.x < CHUNK)
		x.token[threadIdx.x] = (first ? 0.0f : x.token[threadIdx.x]) +
		                       x.whole[threadIdx.x] + x.whole[CHUNK + threadIdx.x];
	__syncthreads();
}

/* The sums of what flows from each token on, to memory, by the first warp. */
template <int PANEL>
static __device__ __forceinline__ void store_tokens(const struct place<PANEL> &x,
                                                    const struct matrix_recurrence_args &f,
                                                    const struct view &to)
{
	const int last = CHUNK - 1 - 2 * (int)threadIdx.x;
	float base = 0.0f;

	if (threadIdx.x >= WARP)
		return;
	for (int i = 0; i < THREADS / WARP; i++)
		base += x.base[i];
	const struct token_sums sums = sum_tokens(make_float2(x.token[last], x.token[last - 1]));
#pragma unroll
	for (int i = 0; i < 2; i++) {
		const float flow = base + (i ? sums.second : sums.first);
		const int64_t t = x.first + last - i;

		if (last - i < x.valid)
			*at(to, x.b, t, x.h) =
			        __float2bfloat16(f.scale * only_if_decaying(flow, f, t));
	}
}

template <int PANEL, bool DIAGONAL>
static __global__ void __launch_bounds__(THREADS, 2)
        chunk_kernel(const __grid_constant__ struct matrix_recurrence_args f,
                     const __grid_constant__ struct plan p,
                     const __grid_constant__ struct outputs o)
{
	using L = layout<PANEL>;
	const struct place<PANEL> x = place_of<PANEL>(f, p);
	const int warp = threadIdx.x / WARP, slabs = (int)p.slabs;

	if (!DIAGONAL && threadIdx.x < WARP) {
		const int64_t t = x.first + 2 * threadIdx.x;
		const struct token_sums sums =
		        sum_tokens(make_float2(token_decay(f, x.b, t, x.h, t < f.seq_len),
		                               token_decay(f, x.b, t + 1, x.h, t + 1 < f.seq_len)));

		x.g[2 * threadIdx.x] = sums.first;
		x.g[2 * threadIdx.x + 1] = sums.second;
	}
	bool mild = true; /* of the panel at hand */
	{
		float scores[4][4] = {}, own[2][4] = {}, exact[SUB] = {};

#pragma unroll 1
		for (int64_t panel = 0; panel < p.panels; panel++) {
			const struct strip s = strip_of<PANEL>(panel);

			__syncthreads();
			load_keys<PANEL>(x, p, panel, DIAGONAL);
			if (panel == p.panels - 1) {
				load_slab<PANEL>(sources_of<PANEL>(x, f, p, o.dv, panel), 0);
				copy_wait<1>();
			} else {
				copy_wait<0>();
			}
			__syncthreads();
			if (DIAGONAL) {
				mild = sum_decays<PANEL>(x, s);
				if (mild)
					add_own<PANEL>(own, x);
				else
					add_exact<PANEL>(exact, x);
				__syncthreads();
				decay_tiles<PANEL>(x, s);
			}
			add_scores<PANEL, DIAGONAL>(scores, x, mild);
		}
		if (DIAGONAL)
			place_exact<PANEL>(scores, own, exact, x);
		store_scores<PANEL, DIAGONAL>(scores, x);
	}
#pragma unroll 1
	for (int64_t panel = p.panels - 1; panel >= 0; panel--) {
		const bool first = panel == p.panels - 1;
		const struct strip s = strip_of<PANEL>(panel);
		const struct sources from = sources_of<PANEL>(x, f, p, o.dv, panel);
		float dq[PANEL / 16][4] = {}, dk[PANEL / 16][4] = {}, products[4] = {};
		float dscores[4][4] = {};
		const struct lanes at = lanes_of();

		if (!first) {
			__syncthreads();
			load_keys<PANEL>(x, p, panel, DIAGONAL);
			load_slab<PANEL>(from, 0);
			copy_wait<1>();
			__syncthreads();
			if (DIAGONAL) {
				mild = sum_decays<PANEL>(x, s);
				decay_tiles<PANEL>(x, s);
			}
		}
#pragma unroll 1
		for (int slab = 0; slab < slabs; slab++) {
			const bf16 *const state = reinterpret_cast<const bf16 *>(
			        shared_memory + L::STAGES + slab % 2 * L::STAGE);
			const bf16 *const gradient = state + L::STATE;
			const bf16 *const dout = gradient + L::STATE, *const v = dout + L::VALUES;
			float dv[2][4] = {};

			copy_wait<0>();
			__syncthreads();
			if (slab + 1 < slabs)
				load_slab<PANEL>(from, slab + 1);
#pragma unroll
			for (int step = 0; step < SLAB / 16; step++) {
				const int group = warp % GROUPS;
				uint32_t left[4];

				load_matrices(left, down_first<SLAB>(dout, 16 * group, 2 * step));
				add_state<PANEL>(dq, left, state, step);
				if (first)
					add_dscores(dscores, left, v, at, step);
				load_matrices(left, down_first<SLAB>(v, 16 * group, 2 * step));
				add_state<PANEL>(dk, left, gradient, step);
			}
			value_gradients<PANEL, DIAGONAL>(dv, x, gradient, dout, at, first);
			store_values<PANEL>(dv, x, o.dv, from.dv, f.scale, slab, !first);
			if (decays_by_data(f))
				multiply_states<PANEL>(products, state, gradient);
		}
		if (!DIAGONAL)
			decay_sums<PANEL>(dq, dk, x);
		if (decays_by_data(f)) {
			store_products<PANEL>(products, x);
			sum_kept<PANEL, DIAGONAL>(dk, x);
		}
		__syncthreads();
		if (first) {
			store_scores<PANEL, DIAGONAL>(dscores, x);
			__syncthreads();
		}
		add_within<PANEL, DIAGONAL>(dq, dk, x, mild);
		if (DIAGONAL) {
			finish_diagonal<PANEL>(dq, dk, x, f, p, s, o, mild);
			continue;
		}
		if (decays_by_data(f)) {
			add_tokens<PANEL>(dq, dk, x, first);
			if (panel == 0)
				store_tokens<PANEL>(x, f, o.dlog_decay.view);
		}
		store_rows<PANEL>(dq, x, o.dq, panel, f.scale);
		store_rows<PANEL>(dk, x, o.dk, panel, f.scale);
	}
}

/* ---- tensors that are not whole pieces of 16 bytes ---- */

/* Copies an element of a token and head; zeros behind the width. */
static __global__ void __launch_bounds__(THREADS)
        copy_kernel(const __grid_constant__ struct matrix_recurrence_args f,
                    const __grid_constant__ struct rows from,
                    const __grid_constant__ struct rows to)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t column = index % to.width, token = index / to.width;
	const int64_t h = token % f.n_heads, t = token / f.n_heads % f.seq_len;
	const int64_t b = token / f.n_heads / f.seq_len;

	if (b < f.batch)
		at(to.view, b, t, h)[column] = column < from.width ? at(from.view, b, t, h)[column]
		                                                   : __float2bfloat16(0.0f);
}

static enum status copy(struct device *device, const struct matrix_recurrence_args &f,
                        const struct rows &from, const struct rows &to)
{
	return launch_each(device, "matrix_recurrence_backward", copy_kernel,
	                   f.batch * f.seq_len * f.n_heads * to.width, THREADS, f, from, to);
}

/* ---- the operation ---- */

constexpr int MAX_COPIES = 9;

/* A problem whose tensors are all whole pieces, and those that it has in place of the caller's. */
struct problem {
	struct plan plan;
	struct outputs outputs;
	int n_copied;
	struct {
		struct rows theirs, ours;
		bool output;
	} copied[MAX_COPIES];
	size_t bytes; /* of workspace */
};

/* Takes room in the workspace. */
static char *take(struct problem *problem, char *workspace, int64_t bytes)
{
	char *const room = workspace + problem->bytes;

	problem->bytes += (size_t)divide_up(bytes, 256) * 256;
	return room;
}

/* The tensor, or one like it in the workspace. */
static struct rows whole_rows(struct problem *problem, char *workspace,
                              const struct matrix_recurrence_args *f, const struct view &v,
                              int64_t width, bool output)
{
	const int64_t wide = divide_up(width, 8) * 8, row = f->n_heads * wide;

	if (!v.data || (is_aligned(&v) && width == wide))
		return {v, width};
	const struct rows ours = {
	        {take(problem, workspace, f->batch * f->seq_len * row * (int64_t)sizeof(bf16)),
	         f->seq_len * row, row, wide},
	        wide};
	problem->copied[problem->n_copied++] = {{v, width}, ours, output};
	return ours;
}

static int panel_rows(const struct matrix_recurrence_args *f)
{
	return f->d_k <= 64 ? 64 : 128;
}

static struct problem problem_of(const struct device *device,
                                 const struct matrix_recurrence_backward_args *a, void *workspace)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const int64_t rows = panel_rows(f), sequences = f->batch * f->n_heads;
	char *const memory = static_cast<char *>(workspace);
	struct problem x = {};
	struct plan &p = x.plan;
	const auto whole = [&](const struct view &v, int64_t width, bool output) {
		return whole_rows(&x, memory, f, v, width, output);
	};

	p.chunks = divide_up(f->seq_len, CHUNK);
	p.panels = divide_up(f->d_k, rows);
	p.slabs = divide_up(f->d_v, SLAB);
	/* Segments of at least two chunks, if the states alone do not give every multiprocessor a
	 * block. */
	const int64_t sms = cuda_sm_count(device);
	const int64_t blocks = sequences * p.panels * divide_up(p.slabs, 4);
	const int64_t wanted = blocks >= sms ? 1 : divide_up(2 * sms, blocks);
	p.per_segment = max(divide_up(p.chunks, wanted), min((int64_t)2, p.chunks));
	p.segments = divide_up(p.chunks, p.per_segment);

	const int64_t state = p.panels * rows * p.slabs * SLAB;
	const int64_t states = sequences * p.chunks * state * (int64_t)sizeof(bf16);
	const int64_t kept = p.segments > 1 ? p.segments * sequences * (int64_t)sizeof(float) : 0;
	p.states = reinterpret_cast<bf16 *>(take(&x, memory, states));
	p.gradients = reinterpret_cast<bf16 *>(take(&x, memory, states));
	p.ends = reinterpret_cast<float *>(take(&x, memory, kept * state));
	p.decays = reinterpret_cast<float *>(take(&x, memory, kept * p.panels * rows));
	p.q = whole(f->q, f->d_k, false);
	p.k = whole(f->k, f->d_k, false);
	p.v = whole(f->v, f->d_v, false);
	p.dout = whole(a->dout, f->d_v, false);
	x.outputs.dq = whole(a->dq, f->d_k, true);
	x.outputs.dk = whole(a->dk, f->d_k, true);
	x.outputs.dv = whole(a->dv, f->d_v, true);
	if (f->decay == DECAY_DIAGONAL) {
		p.log_decay = whole(f->log_decay, f->d_k, false);
		x.outputs.dlog_decay = whole(a->dlog_decay, f->d_k, true);
	} else {
		x.outputs.dlog_decay.view = a->dlog_decay;
	}
	return x;
}

template <int PANEL>
static enum status run(struct device *device, const struct matrix_recurrence_args *f,
                       const struct problem &x)
{
	const dim3 grid((unsigned)(f->batch * f->n_heads * x.plan.chunks));
	const size_t shared = (size_t)layout<PANEL>::BYTES;

	if (f->decay == DECAY_DIAGONAL)
		return launch(device, "matrix_recurrence_backward", chunk_kernel<PANEL, true>, grid,
		              THREADS, shared, *f, x.plan, x.outputs);
	return launch(device, "matrix_recurrence_backward", chunk_kernel<PANEL, false>, grid,
	              THREADS, shared, *f, x.plan, x.outputs);
}

} // namespace

extern "C" const char *portable_matrix_recurrence_backward_unsupported(const struct device *,
                                                                       const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);

	return a->forward.rule != RULE_PLAIN ? "only the plain rule" : NULL;
}

extern "C" size_t portable_matrix_recurrence_backward_workspace(const struct device *device,
                                                                const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);

	return problem_of(device, a, NULL).bytes;
}

extern "C" enum status portable_matrix_recurrence_backward(struct device *device, const void *args,
                                                           void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *f = &a->forward;
	const struct problem x = problem_of(device, a, workspace);
	enum status status = STATUS_OK;

	for (int i = 0; i < x.n_copied && status == STATUS_OK; i++)
		if (!x.copied[i].output)
			status = copy(device, *f, x.copied[i].theirs, x.copied[i].ours);
	if (status == STATUS_OK)
		status = sweep(device, *a, x.plan, panel_rows(f));
	if (status == STATUS_OK)
		status = panel_rows(f) == 64 ? run<64>(device, f, x) : run<128>(device, f, x);
	for (int i = 0; i < x.n_copied && status == STATUS_OK; i++)
		if (x.copied[i].output)
			status = copy(device, *f, x.copied[i].ours, x.copied[i].theirs);
	return status;
}
