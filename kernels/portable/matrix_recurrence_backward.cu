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
 * A block of eight warps takes a chunk of a head: first the scores B of all panels, then panel after
 * panel, the last one first, slabs of 32 columns of S, L, v and dout, two of them in shared
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

constexpr int GROUPS = SUBS; /* of tokens, a warp's 16 each */

/* Shared memory, in bytes. */
template <int PANEL> struct layout {
	static constexpr int TILE = CHUNK * PANEL * (int)sizeof(bf16);
	static constexpr int STATE = PANEL * SLAB, VALUES = CHUNK * SLAB; /* elements */
	static constexpr int STAGE = 2 * (STATE + VALUES) * (int)sizeof(bf16);
	static constexpr int Q = 0, K = Q + TILE, SCORES = K + TILE;
	static constexpr int STAGES = SCORES + CHUNK * CHUNK * (int)sizeof(bf16);
	static constexpr int SMALL = STAGES + 2 * STAGE;
	static constexpr int BYTES = SMALL + (int)sizeof(float) * (4 * GROUPS * PANEL + 3 * CHUNK);
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
	float *whole; /* [SUBS, PANEL]: decay of each sub-chunk */
	float *rest;  /* [SUBS, PANEL]: of all sub-chunks behind it */
	float *kept;  /* [GROUPS, PANEL]: sums of k R (L v) over 16 tokens */
	float *flow;  /* [GROUPS, PANEL]: sums of S L; then of the tokens of a sub-chunk */
	float *g;     /* [CHUNK]: log2 decays up to each token, where channels decay alike */
	float *token; /* [CHUNK]: sums of q dq - k dk over the channels */
	float *base;  /* [8]: the rest of F over the channels, a warp's each; [8..8 + 16): sums */
};

template <int PANEL>
static __device__ __forceinline__ struct place<PANEL> place_of(const struct matrix_recurrence_args &f,
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
	x.rest = x.whole + SUBS * PANEL;
	x.kept = x.rest + SUBS * PANEL;
	x.flow = x.kept + GROUPS * PANEL;
	x.g = x.flow + GROUPS * PANEL;
	x.token = x.g + CHUNK;
	x.base = x.token + CHUNK;
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

/* S, L, dout and v of a slab. */
template <int PANEL>
static __device__ __forceinline__ void load_slab(const struct place<PANEL> &x,
                                                 const struct matrix_recurrence_args &f,
                                                 const struct plan &p, int64_t panel, int64_t slab)
{
	using L = layout<PANEL>;
	bf16 *const stage = reinterpret_cast<bf16 *>(shared_memory + L::STAGES + slab % 2 * L::STAGE);
	const int64_t piece = piece_at<PANEL>(p, x.b * f.n_heads + x.h, x.chunk, panel, slab);

#pragma unroll
	for (int i = 0; i < L::STATE / 8 / THREADS; i++) {
		const int element = (i * THREADS + (int)threadIdx.x) * 8;

		copy16_async(stage + element, p.states + piece + element, true);
		copy16_async(stage + L::STATE + element, p.gradients + piece + element, true);
	}
	load_tile<SLAB>(stage + 2 * L::STATE, p.dout, x.b, x.h, x.first, x.valid, slab * SLAB);
	load_tile<SLAB>(stage + 2 * L::STATE + L::VALUES, p.v, x.b, x.h, x.first, x.valid,
	                slab * SLAB);
	copy_commit();
}

/*
 * q decays from its sub-chunk's start, k to its sub-chunk's end, where they lie; and the decay of
 * each sub-chunk. A thread takes two channels of a sub-chunk.
 */
template <int PANEL>
static __device__ __forceinline__ void decay_tiles(const struct place<PANEL> &x)
{
	bf16 *const decays = reinterpret_cast<bf16 *>(shared_memory + layout<PANEL>::DECAYS);
	const int sub = threadIdx.x / (PANEL / 2), channel = threadIdx.x % (PANEL / 2) * 2;
	uint32_t g[SUB];
	float u = 0.0f, w = 0.0f;

	if (sub >= SUBS)
		return;
#pragma unroll
	for (int i = 0; i < SUB; i++) {
		uint32_t *const q = pair_at<PANEL>(x.q, sub * SUB + i, channel);

		g[i] = *pair_at<PANEL>(decays, sub * SUB + i, channel);
		u += low_half(g[i]) * LOG2E;
		w += high_half(g[i]) * LOG2E;
		*q = pack(low_half(*q) * exp2_fast(u), high_half(*q) * exp2_fast(w));
	}
	*reinterpret_cast<float2 *>(x.whole + sub * PANEL + channel) =
	        make_float2(exp2_fast(u), exp2_fast(w));
	u = w = 0.0f;
#pragma unroll
	for (int i = SUB - 1; i >= 0; i--) {
		uint32_t *const k = pair_at<PANEL>(x.k, sub * SUB + i, channel);

		*k = pack(low_half(*k) * exp2_fast(u), high_half(*k) * exp2_fast(w));
		u += low_half(g[i]) * LOG2E;
		w += high_half(g[i]) * LOG2E;
	}
}

/* The decays behind each sub-chunk, once those of sub-chunks are there. */
template <int PANEL>
static __device__ __forceinline__ void sum_rest(const struct place<PANEL> &x)
{
	if (threadIdx.x >= PANEL)
		return;
	float product = 1.0f;

#pragma unroll
	for (int i = SUBS - 1; i >= 0; i--) {
		x.rest[i * PANEL + threadIdx.x] = product;
		product *= x.whole[i * PANEL + threadIdx.x];
	}
}

/* The decays of two neighbouring channels over sub-chunks first .. end-1. */
template <int PANEL>
static __device__ __forceinline__ float2 decay_over(const struct place<PANEL> &x, int first, int end,
                                                    int channel)
{
	float2 product = make_float2(1.0f, 1.0f);

#pragma unroll
	for (int i = 0; i < SUBS; i++) {
		const float2 one = *reinterpret_cast<const float2 *>(x.whole + i * PANEL + channel);

		if (i >= first && i < end) {
			product.x *= one.x;
			product.y *= one.y;
		}
	}
	return product;
}

static __device__ __forceinline__ uint32_t times(uint32_t pair, float2 factor)
{
	return pack(low_half(pair) * factor.x, high_half(pair) * factor.y);
}

/* A fragment of 16 rows times factor(channel), which is for two channels. */
template <typename Factor>
static __device__ __forceinline__ void decay_fragment(uint32_t (&a)[4], int channel,
                                                      const Factor &factor)
{
#pragma unroll
	for (int i = 0; i < 2; i++) {
		const float2 two = factor(channel + 8 * i + 2 * (threadIdx.x % 4));

		a[2 * i] = times(a[2 * i], two);
		a[2 * i + 1] = times(a[2 * i + 1], two);
	}
}

/* ---- the scores ---- */

/*
 * Scores inside a sub-chunk, the part of 64 channels, exactly: sum[t] of lane l gains
 * q_t k_s W_ts for s = l / 2 <= t. Before q and k decay.
 */
template <int PANEL>
static __device__ __forceinline__ void add_exact(float (&sum)[SUB], const struct place<PANEL> &x)
{
	bf16 *const decays = reinterpret_cast<bf16 *>(shared_memory + layout<PANEL>::DECAYS);
	const int warp = threadIdx.x / WARP;
	const int first = warp % SUBS * SUB, channel = warp / SUBS * 64 + 2 * (threadIdx.x % WARP);
	float2 k[SUB];

	if (channel >= PANEL)
		return;
#pragma unroll
	for (int t = 0; t < SUB; t++) {
		const uint32_t q = *pair_at<PANEL>(x.q, first + t, channel);
		const uint32_t now = *pair_at<PANEL>(x.k, first + t, channel);
		const uint32_t g = *pair_at<PANEL>(decays, first + t, channel);
		const float a0 = exp2_fast(low_half(g) * LOG2E), a1 = exp2_fast(high_half(g) * LOG2E);
		float products[SUB];

		k[t] = make_float2(low_half(now), high_half(now));
#pragma unroll
		for (int s = 0; s < SUB; s++) {
			if (s < t) {
				k[s].x *= a0;
				k[s].y *= a1;
			}
			products[s] = s > t ? 0.0f
			                    : low_half(q) * k[s].x + high_half(q) * k[s].y;
		}
		sum[t] += scatter_sum(products);
	}
}

/*
 * The scores of 16 queries and 32 keys, from a panel. Diagonal: between sub-chunks only, of tiles
 * that have decayed.
 */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void add_scores(float (&s)[4][4], const struct place<PANEL> &x)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int group = warp % GROUPS, side = warp / GROUPS;

#pragma unroll
	for (int step = 0; step < PANEL / 16; step++) {
		uint32_t left[4], right[4];

#pragma unroll
		for (int n = 0; n < 2; n++) {
			const int other = 2 * side + n;

			if (DIAGONAL ? other >= group : other > group)
				continue;
			load_matrices(left, x.q + offset<PANEL>(16 * group + lane % 16,
			                                        2 * step + lane / 16));
			if (DIAGONAL && other + 1 < group)
				decay_fragment(left, 16 * step, [&](int channel) {
					return decay_over<PANEL>(x, other + 1, group, channel);
				});
			load_matrices(right,
			              x.k + offset<PANEL>(16 * other + lane / 16 * 8 + lane % 8,
			                                  2 * step + lane / 8 % 2));
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

/* Adds the exact scores of this warp's sub-chunk, if its keys are among the warp's. */
template <int PANEL>
static __device__ __forceinline__ void place_exact(float (&s)[4][4], const float (&sum)[SUB],
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
			const float *one = exact + (group * SUB + lane / 4 + e / 2 * 8) * SUB +
			                   n % 2 * 8 + 2 * (lane % 4) + e % 2;

			s[n][e] = one[0] + one[GROUPS * SUB * SUB];
		}
	}
}

/* ---- a slab ---- */

/* a += rows of a tile of values times S^T or L^T: 16 tokens, half of the panel's channels. */
template <int PANEL>
static __device__ __forceinline__ void add_state(float (&a)[PANEL / 16][4],
                                                 const uint32_t (&left)[4], const bf16 *state,
                                                 int step)
{
	const int lane = threadIdx.x % WARP, half = threadIdx.x / WARP / GROUPS;
	uint32_t right[4];

#pragma unroll
	for (int n = 0; n < PANEL / 32; n++) {
		load_matrices(right, state +
		                             ((half * (PANEL / 16) + 2 * n + lane / 16) * (SLAB / 8) +
		                              2 * step + lane / 8 % 2) *
		                                     64 +
		                             lane % 8 * 8);
		multiply_add(a[2 * n], left, right[0], right[1]);
		multiply_add(a[2 * n + 1], left, right[2], right[3]);
	}
}

/* dB of 16 queries and those of 32 keys that come no later than the sub-chunk. */
static __device__ __forceinline__ void add_dscores(float (&s)[4][4], const uint32_t (&left)[4],
                                                   const bf16 *v, int step)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	uint32_t right[4];

#pragma unroll
	for (int n = 0; n < 2; n++) {
		const int other = 2 * (warp / GROUPS) + n;

		if (other > warp % GROUPS)
			continue;
		load_matrices(right, v + offset<SLAB>(16 * other + lane / 16 * 8 + lane % 8,
		                                      2 * step + lane / 8 % 2));
		multiply_add(s[2 * n], left, right[0], right[1]);
		multiply_add(s[2 * n + 1], left, right[2], right[3]);
	}
}

/* dv of 16 tokens and half of the slab's columns; with `within`, from the chunk's tokens, too. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void value_gradients(float (&d)[2][4],
                                                       const struct place<PANEL> &x,
                                                       const bf16 *gradient, const bf16 *dout,
                                                       bool within)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int group = warp % GROUPS, half = warp / GROUPS;
	uint32_t left[4], right[4];

#pragma unroll
	for (int step = 0; step < PANEL / 16; step++) {
		load_matrices(left, x.k + offset<PANEL>(16 * group + lane % 16,
		                                        2 * step + lane / 16));
		if (DIAGONAL && group < SUBS - 1)
			decay_fragment(left, 16 * step, [&](int channel) {
				return *reinterpret_cast<const float2 *>(x.rest + group * PANEL +
				                                         channel);
			});
		load_matrices_transposed(right,
		                         gradient +
		                                 ((2 * step + lane / 8 % 2) * (SLAB / 8) +
		                                  2 * half + lane / 16) *
		                                         64 +
		                                 lane % 8 * 8);
		multiply_add(d[0], left, right[0], right[1]);
		multiply_add(d[1], left, right[2], right[3]);
	}
	if (!DIAGONAL) {
#pragma unroll
		for (int e = 0; e < 4; e++) {
			const float factor = exp2_fast(
			        x.g[CHUNK - 1] - x.g[16 * group + lane / 4 + e / 2 * 8]);

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
		load_matrices_transposed(
		        left, x.scores + offset<CHUNK>(16 * other + lane / 16 * 8 + lane % 8,
		                                       2 * group + lane / 8 % 2));
		load_matrices_transposed(right, dout + offset<SLAB>(16 * other + lane % 16,
		                                                    2 * half + lane / 16));
		multiply_add(d[0], left, right[0], right[1]);
		multiply_add(d[1], left, right[2], right[3]);
	}
}

/* Writes dv; `more`: adds to what is there. */
template <int PANEL>
static __device__ __forceinline__ void store_values(const float (&d)[2][4],
                                                    const struct place<PANEL> &x,
                                                    const struct rows &dv, float scale,
                                                    int64_t first, bool more)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int row = 16 * (warp % GROUPS) + 8 * half + lane / 4;

#pragma unroll
		for (int n = 0; n < 2; n++) {
			const int64_t column = first + 16 * (warp / GROUPS) + 8 * n + 2 * (lane % 4);
			const uint32_t old = more ? load_pair(dv, x.b, x.first + row, x.h, column,
			                                      row < x.valid)
			                          : 0;

			if (row < x.valid)
				store_pair(dv, x.b, x.first + row, x.h, column,
				           scale * d[n][2 * half] + low_half(old),
				           scale * d[n][2 * half + 1] + high_half(old));
		}
	}
}

/* This thread's part of rowsum(S L): one row, some of the columns. */
template <int PANEL>
static __device__ __forceinline__ float multiply_states(const bf16 *state, const bf16 *gradient)
{
	constexpr int PARTS = THREADS / PANEL, COLUMNS = SLAB / 8 / PARTS;
	const int row = threadIdx.x % PANEL, part = threadIdx.x / PANEL;
	float sum = 0.0f;

#pragma unroll
	for (int i = 0; i < COLUMNS; i++) {
		const int at = (row / 8 * (SLAB / 8) + part * COLUMNS + i) * 64 + row % 8 * 8;
		float s[8], l[8];

		load8(s, state + at);
		load8(l, gradient + at);
#pragma unroll
		for (int e = 0; e < 8; e++)
			sum += s[e] * l[e];
	}
	return sum;
}

/* ---- after the slabs ---- */

/* This lane's channel of pair n of sums, counted within the panel. */
template <int PANEL> static __device__ __forceinline__ int channel_of(int n)
{
	return threadIdx.x / WARP / GROUPS * (PANEL / 2) + 8 * n + 2 * (threadIdx.x % 4);
}

/* Decays of tokens: dq from the state by P, dk by R. */
template <int PANEL>
static __device__ __forceinline__ void decay_sums(float (&dq)[PANEL / 16][4],
                                                  float (&dk)[PANEL / 16][4],
                                                  const struct place<PANEL> &x)
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

/* kept: sums of k R (L v) over the warp's tokens, channel by channel. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void sum_kept(const float (&dk)[PANEL / 16][4],
                                                const struct place<PANEL> &x)
{
	const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP % GROUPS;

#pragma unroll
	for (int n = 0; n < PANEL / 16; n++) {
		const int channel = channel_of<PANEL>(n), row = 16 * group + lane / 4;
		const uint32_t a = *pair_at<PANEL>(x.k, row, channel);
		const uint32_t b = *pair_at<PANEL>(x.k, row + 8, channel);
		float u = low_half(a) * dk[n][0] + low_half(b) * dk[n][2];
		float w = high_half(a) * dk[n][1] + high_half(b) * dk[n][3];

#pragma unroll
		for (int bit = 4; bit < WARP; bit *= 2) {
			u += __shfl_xor_sync(0xffffffffu, u, bit);
			w += __shfl_xor_sync(0xffffffffu, w, bit);
		}
		if (DIAGONAL) {
			const float2 rest =
			        *reinterpret_cast<const float2 *>(x.rest + group * PANEL + channel);

			u *= rest.x;
			w *= rest.y;
		}
		if (lane < 4)
			*reinterpret_cast<float2 *>(x.kept + group * PANEL + channel) =
			        make_float2(u, w);
	}
}

template <int PANEL>
static __device__ __forceinline__ void decay_by_sub(float (&d)[PANEL / 16][4],
                                                    const struct place<PANEL> &x, int sub)
{
#pragma unroll
	for (int n = 0; n < PANEL / 16; n++) {
		const float2 one = *reinterpret_cast<const float2 *>(x.whole + sub * PANEL +
		                                                     channel_of<PANEL>(n));

		d[n][0] *= one.x;
		d[n][1] *= one.y;
		d[n][2] *= one.x;
		d[n][3] *= one.y;
	}
}

/* d += dB rows of this warp's tokens (dq), or its columns (dk, TRANSPOSED), times 16 rows of a tile.
 */
template <int PANEL, bool TRANSPOSED>
static __device__ __forceinline__ void add_pairs(float (&d)[PANEL / 16][4],
                                                 const struct place<PANEL> &x, const bf16 *tile,
                                                 int other)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int group = warp % GROUPS, half = warp / GROUPS;
	uint32_t left[4], right[4];

	if (TRANSPOSED)
		load_matrices_transposed(
		        left, x.scores + offset<CHUNK>(16 * other + lane / 16 * 8 + lane % 8,
		                                       2 * group + lane / 8 % 2));
	else
		load_matrices(left, x.scores + offset<CHUNK>(16 * group + lane % 16,
		                                             2 * other + lane / 16));
#pragma unroll
	for (int n = 0; n < PANEL / 32; n++) {
		load_matrices_transposed(
		        right, tile + offset<PANEL>(16 * other + lane % 16,
		                                    half * (PANEL / 16) + 2 * n + lane / 16));
		multiply_add(d[2 * n], left, right[0], right[1]);
		multiply_add(d[2 * n + 1], left, right[2], right[3]);
	}
}

/* dq and dk from the chunk's tokens; diagonal: from other sub-chunks, and relative to the ends
 * between sub-chunks. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void add_within(float (&dq)[PANEL / 16][4],
                                                  float (&dk)[PANEL / 16][4],
                                                  const struct place<PANEL> &x)
{
	const int group = threadIdx.x / WARP % GROUPS;

#pragma unroll 1
	for (int other = 0; other < group + !DIAGONAL; other++) {
		if (DIAGONAL)
			decay_by_sub<PANEL>(dq, x, other);
		add_pairs<PANEL, false>(dq, x, x.k, other);
	}
#pragma unroll 1
	for (int other = SUBS - 1; other > group - !DIAGONAL; other--) {
		if (DIAGONAL)
			decay_by_sub<PANEL>(dk, x, other);
		add_pairs<PANEL, true>(dk, x, x.q, other);
	}
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

/* A thread's sub-chunk and its two channels, in the panel and in all. */
struct strip {
	int sub, channel;
	int64_t column;
};

template <int PANEL>
static __device__ __forceinline__ void load_flow(float2 (&flow)[SUB], float *tile,
                                                 const struct strip &s)
{
#pragma unroll
	for (int i = 0; i < SUB; i++)
		flow[i] = *sum_at<PANEL>(tile, s.sub * SUB + i, s.channel);
}

/* The decays of a token and the strip's channels. */
template <int PANEL>
static __device__ __forceinline__ float2 strip_decay(const struct place<PANEL> &x,
                                                     const struct plan &p, const struct strip &s,
                                                     int i)
{
	const int row = s.sub * SUB + i;
	const uint32_t g = load_pair(p.log_decay, x.b, x.first + row, x.h, s.column, row < x.valid);

	return make_float2(low_half(g) * LOG2E, high_half(g) * LOG2E);
}

template <int PANEL>
static __device__ __forceinline__ float2 strip_pair(const struct place<PANEL> &x,
                                                    const struct rows &from, const struct strip &s,
                                                    int i)
{
	const int row = s.sub * SUB + i;
	const uint32_t pair = load_pair(from, x.b, x.first + row, x.h, s.column, row < x.valid);

	return make_float2(low_half(pair), high_half(pair));
}

/* Writes dq of a strip; gives flow what the pairs inside the sub-chunk add to q dq. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void finish_queries(float2 (&flow)[SUB],
                                                      const struct place<PANEL> &x,
                                                      const struct plan &p, const struct strip &s,
                                                      const struct rows &to, float scale)
{
	float *const tile = reinterpret_cast<float *>(shared_memory + layout<PANEL>::DQ);
	const float *const pairs =
	        reinterpret_cast<const float *>(shared_memory + layout<PANEL>::PAIRS) +
	        s.sub * SUB * SUB;
	float2 k[SUB], g = {};

	upwards<0, SUB>([&](auto at_token) {
		constexpr int i = decltype(at_token)::value;
		const int row = s.sub * SUB + i;
		float2 d = *sum_at<PANEL>(tile, row, s.channel);

		if constexpr (DIAGONAL) {
			const float2 one = strip_decay<PANEL>(x, p, s, i);
			const float2 a = make_float2(exp2_fast(one.x), exp2_fast(one.y));

			g = make_float2(g.x + one.x, g.y + one.y);
			k[i] = strip_pair<PANEL>(x, p.k, s, i);
#pragma unroll
			for (int j = 0; j < i; j++)
				k[j] = make_float2(k[j].x * a.x, k[j].y * a.y);
			const float2 near = weigh<0, i + 1>(pairs + i * SUB, k);
			const float2 q = strip_pair<PANEL>(x, p.q, s, i);

			d.x = exp2_fast(g.x) * d.x + near.x;
			d.y = exp2_fast(g.y) * d.y + near.y;
			flow[i].x += q.x * near.x;
			flow[i].y += q.y * near.y;
		}
		if (row < x.valid)
			store_pair(to, x.b, x.first + row, x.h, s.column, scale * d.x, scale * d.y);
	});
}

/* The same of dk, backwards; flow loses what the pairs add to k dk. */
template <int PANEL, bool DIAGONAL>
static __device__ __forceinline__ void finish_keys(float2 (&flow)[SUB], const struct place<PANEL> &x,
                                                   const struct plan &p, const struct strip &s,
                                                   const struct rows &to, float scale)
{
	float *const tile = reinterpret_cast<float *>(shared_memory + layout<PANEL>::DK);
	const float *const pairs =
	        reinterpret_cast<const float *>(shared_memory + layout<PANEL>::PAIRS) +
	        (SUBS + s.sub) * SUB * SUB;
	float2 q[SUB], g = {}, a = {};

	downwards<0, SUB>([&](auto at_token) {
		constexpr int j = decltype(at_token)::value;
		const int row = s.sub * SUB + j;
		float2 d = *sum_at<PANEL>(tile, row, s.channel);

		if constexpr (DIAGONAL) {
			q[j] = strip_pair<PANEL>(x, p.q, s, j);
#pragma unroll
			for (int i = j + 1; i < SUB; i++)
				q[i] = make_float2(q[i].x * a.x, q[i].y * a.y);
			const float2 near = weigh<j, SUB>(pairs + j * SUB, q);
			const float2 k = strip_pair<PANEL>(x, p.k, s, j);

			d.x = exp2_fast(g.x) * d.x + near.x;
			d.y = exp2_fast(g.y) * d.y + near.y;
			flow[j].x -= k.x * near.x;
			flow[j].y -= k.y * near.y;
			const float2 one = strip_decay<PANEL>(x, p, s, j);
			a = make_float2(exp2_fast(one.x), exp2_fast(one.y));
			g = make_float2(g.x + one.x, g.y + one.y);
		}
		if (row < x.valid)
			store_pair(to, x.b, x.first + row, x.h, s.column, scale * d.x, scale * d.y);
	});
}

/* A first token has no state to decay, where rounding would leave something. */
static __device__ __forceinline__ float only_if_decaying(float flow,
                                                         const struct matrix_recurrence_args &f,
                                                         int64_t t)
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
		product += i < THREADS / PANEL ? x.flow[i * PANEL + channel] : 0.0f;
	}
	return whole * product + sum;
}

/* Diagonal: the sums of flow from each token on, to memory. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void
finish_channels(float2 (&flow)[SUB], const struct place<PANEL> &x,
                const struct matrix_recurrence_args &f, const struct strip &s, const struct rows &to)
{
	const bool busy = s.sub < SUBS;
	float2 sum = {};

	if (busy) {
		const float2 whole = decay_over<PANEL>(x, 0, SUBS, s.channel);

		sum = make_float2(flow_behind<PANEL>(x, s.channel, whole.x),
		                  flow_behind<PANEL>(x, s.channel + 1, whole.y));
	}
	__syncthreads();
	if (busy) {
		float2 all = {};

#pragma unroll
		for (int i = 0; i < SUB; i++)
			all = make_float2(all.x + flow[i].x, all.y + flow[i].y);
		*reinterpret_cast<float2 *>(x.flow + s.sub * PANEL + s.channel) = all;
	}
	__syncthreads();
	if (!busy)
		return;
	for (int sub = SUBS - 1; sub > s.sub; sub--) {
		const float2 all =
		        *reinterpret_cast<const float2 *>(x.flow + sub * PANEL + s.channel);

		sum = make_float2(sum.x + all.x, sum.y + all.y);
	}
#pragma unroll
	for (int i = SUB - 1; i >= 0; i--) {
		const int64_t t = x.first + s.sub * SUB + i;

		sum = make_float2(sum.x + flow[i].x, sum.y + flow[i].y);
		if (t < f.seq_len)
			store_pair(to, x.b, t, x.h, s.column,
			           f.scale * only_if_decaying(sum.x, f, t),
			           f.scale * only_if_decaying(sum.y, f, t));
	}
}

/* One decay for all channels: adds a panel's flow to the tokens' sums; `last`: to memory.
 * Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void
finish_tokens(const float2 (&flow)[SUB], const struct place<PANEL> &x,
              const struct matrix_recurrence_args &f, const struct strip &s, const struct view &to,
              bool first, bool last)
{
	constexpr int WARPS_OF_SUB = PANEL / 2 / WARP;
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	float both[SUB], base = 0.0f;

	if (threadIdx.x < PANEL)
		base = flow_behind<PANEL>(x, threadIdx.x, exp2_fast(x.g[CHUNK - 1]));
	base = group_sum(base, WARP);
	if (lane == 0)
		x.base[warp] = (first ? 0.0f : x.base[warp]) + base;
#pragma unroll
	for (int i = 0; i < SUB; i++)
		both[i] = flow[i].x + flow[i].y;
	const float sum = scatter_sum(both);
	__syncthreads();
	if (s.sub < SUBS && lane % 2 == 0)
		x.flow[warp * SUB + lane / 2] = sum;
	__syncthreads();
	if (threadIdx.x < CHUNK) {
		float all = first ? 0.0f : x.token[threadIdx.x];

#pragma unroll
		for (int i = 0; i < WARPS_OF_SUB; i++)
			all += x.flow[(threadIdx.x / SUB * WARPS_OF_SUB + i) * SUB +
			              threadIdx.x % SUB];
		x.token[threadIdx.x] = all;
	}
	__syncthreads();
	if (!last || (int)threadIdx.x >= x.valid)
		return;
	float total = 0.0f;
#pragma unroll
	for (int i = 0; i < THREADS / WARP; i++)
		total += x.base[i];
	for (int i = CHUNK - 1; i >= (int)threadIdx.x; i--)
		total += x.token[i];
	*at(to, x.b, x.first + threadIdx.x, x.h) = __float2bfloat16(
	        f.scale * only_if_decaying(total, f, x.first + threadIdx.x));
}

/* Where the gradients go. */
struct outputs {
	struct rows dq, dk, dv, dlog_decay;
};

template <int PANEL, bool DIAGONAL>
static __global__ void __launch_bounds__(THREADS, 2)
        chunk_kernel(const __grid_constant__ struct matrix_recurrence_args f,
                     const __grid_constant__ struct plan p, const __grid_constant__ struct outputs o)
{
	using L = layout<PANEL>;
	const struct place<PANEL> x = place_of<PANEL>(f, p);
	const int warp = threadIdx.x / WARP;
	float dscores[4][4] = {};

	if (!DIAGONAL && threadIdx.x < WARP) {
		const int64_t t = x.first + 2 * threadIdx.x;
		const struct token_sums sums = sum_tokens(
		        make_float2(token_decay(f, x.b, t, x.h, t < f.seq_len),
		                    token_decay(f, x.b, t + 1, x.h, t + 1 < f.seq_len)));

		x.g[2 * threadIdx.x] = sums.first;
		x.g[2 * threadIdx.x + 1] = sums.second;
	}
	{
		float scores[4][4] = {}, exact[SUB] = {};

		for (int64_t panel = 0; panel < p.panels; panel++) {
			__syncthreads();
			load_keys<PANEL>(x, p, panel, DIAGONAL);
			if (panel == p.panels - 1) {
				load_slab<PANEL>(x, f, p, panel, 0);
				copy_wait<1>();
			} else {
				copy_wait<0>();
			}
			__syncthreads();
			if (DIAGONAL) {
				add_exact<PANEL>(exact, x);
				__syncthreads();
				decay_tiles<PANEL>(x);
				__syncthreads();
				sum_rest<PANEL>(x);
			}
			add_scores<PANEL, DIAGONAL>(scores, x);
		}
		if (DIAGONAL)
			place_exact<PANEL>(scores, exact, x);
		store_scores<PANEL, DIAGONAL>(scores, x);
	}
#pragma unroll 1
	for (int64_t panel = p.panels - 1; panel >= 0; panel--) {
		const bool first = panel == p.panels - 1;
		const struct strip s = {(int)threadIdx.x / (PANEL / 2),
		                        (int)threadIdx.x % (PANEL / 2) * 2,
		                        panel * PANEL + threadIdx.x % (PANEL / 2) * 2};
		float dq[PANEL / 16][4] = {}, dk[PANEL / 16][4] = {}, product = 0.0f;

		if (!first) {
			__syncthreads();
			load_keys<PANEL>(x, p, panel, DIAGONAL);
			load_slab<PANEL>(x, f, p, panel, 0);
			copy_wait<1>();
			__syncthreads();
			if (DIAGONAL) {
				decay_tiles<PANEL>(x);
				__syncthreads();
				sum_rest<PANEL>(x);
			}
		}
#pragma unroll 1
		for (int64_t slab = 0; slab < p.slabs; slab++) {
			const bf16 *const state = reinterpret_cast<const bf16 *>(
			        shared_memory + L::STAGES + slab % 2 * L::STAGE);
			const bf16 *const gradient = state + L::STATE;
			const bf16 *const dout = gradient + L::STATE, *const v = dout + L::VALUES;
			float dv[2][4] = {};

			copy_wait<0>();
			__syncthreads();
			if (slab + 1 < p.slabs)
				load_slab<PANEL>(x, f, p, panel, slab + 1);
#pragma unroll
			for (int step = 0; step < SLAB / 16; step++) {
				const int lane = threadIdx.x % WARP;
				const int rows = offset<SLAB>(16 * (warp % GROUPS) + lane % 16,
				                              2 * step + lane / 16);
				uint32_t left[4];

				load_matrices(left, dout + rows);
				add_state<PANEL>(dq, left, state, step);
				if (first)
					add_dscores(dscores, left, v, step);
				load_matrices(left, v + rows);
				add_state<PANEL>(dk, left, gradient, step);
			}
			value_gradients<PANEL, DIAGONAL>(dv, x, gradient, dout, first);
			store_values<PANEL>(dv, x, o.dv, f.scale, slab * SLAB, !first);
			if (decays_by_data(f))
				product += multiply_states<PANEL>(state, gradient);
		}
		if (!DIAGONAL)
			decay_sums<PANEL>(dq, dk, x);
		if (decays_by_data(f)) {
			x.flow[threadIdx.x] = product;
			sum_kept<PANEL, DIAGONAL>(dk, x);
		}
		__syncthreads();
		if (first) {
			store_scores<PANEL, DIAGONAL>(dscores, x);
			__syncthreads();
		}
		add_within<PANEL, DIAGONAL>(dq, dk, x);
		if (DIAGONAL)
			spread_pairs<PANEL>(reinterpret_cast<float *>(shared_memory + L::PAIRS), x);
		__syncthreads();
		float *const dq_tile = reinterpret_cast<float *>(shared_memory + L::DQ);
		store_sums<PANEL>(reinterpret_cast<float *>(shared_memory + L::DK), dk);
		float2 flow[SUB] = {};
		if (decays_by_data(f)) {
			/* Into dk's registers: the tiles are where dq's sums will be. */
			difference<PANEL>(dk, dq, x);
			__syncthreads();
			store_sums<PANEL>(dq_tile, dk);
			__syncthreads();
			if (s.sub < SUBS)
				load_flow<PANEL>(flow, dq_tile, s);
		}
		__syncthreads();
		store_sums<PANEL>(dq_tile, dq);
		__syncthreads();
		if (s.sub < SUBS) {
			finish_queries<PANEL, DIAGONAL>(flow, x, p, s, o.dq, f.scale);
			finish_keys<PANEL, DIAGONAL>(flow, x, p, s, o.dk, f.scale);
		}
		if (!decays_by_data(f))
			continue;
		if (DIAGONAL)
			finish_channels<PANEL>(flow, x, f, s, o.dlog_decay);
		else
			finish_tokens<PANEL>(flow, x, f, s, o.dlog_decay.view, first, panel == 0);
	}
}

/* ---- the operation ---- */

static struct rows rows_of(const struct view &v, int64_t width)
{
	return {v, width, is_aligned(&v) && width % 8 == 0};
}

static int panel_rows(const struct matrix_recurrence_args *f)
{
	return f->d_k <= 64 ? 64 : 128;
}

static int64_t elements(const struct matrix_recurrence_args *f, const struct plan &p)
{
	return f->batch * f->n_heads * p.chunks * p.panels * panel_rows(f) * p.slabs * SLAB;
}

static struct plan plan_of(const struct device *device,
                           const struct matrix_recurrence_backward_args *a, void *workspace)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const int64_t rows = panel_rows(f);
	struct plan p = {};

	p.q = rows_of(f->q, f->d_k);
	p.k = rows_of(f->k, f->d_k);
	p.v = rows_of(f->v, f->d_v);
	p.dout = rows_of(a->dout, f->d_v);
	p.log_decay = rows_of(f->log_decay, f->d_k);
	p.chunks = divide_up(f->seq_len, CHUNK);
	p.panels = divide_up(f->d_k, rows);
	p.slabs = divide_up(f->d_v, SLAB);
	/* Segments of at least two chunks, if the states alone do not give every multiprocessor a
	 * block. */
	const int64_t sms = cuda_sm_count(device);
	const int64_t blocks = f->batch * f->n_heads * p.panels * divide_up(p.slabs, 4);
	const int64_t wanted = blocks >= sms ? 1 : divide_up(2 * sms, blocks);
	p.per_segment = max(divide_up(p.chunks, wanted), min((int64_t)2, p.chunks));
	p.segments = divide_up(p.chunks, p.per_segment);

	const int64_t kept = p.segments > 1 ? p.segments * f->batch * f->n_heads * p.panels * rows
	                                    : 0;
	p.states = static_cast<bf16 *>(workspace);
	p.gradients = p.states + elements(f, p);
	p.ends = reinterpret_cast<float *>(p.gradients + elements(f, p));
	p.decays = p.ends + kept * p.slabs * SLAB;
	return p;
}

template <int PANEL>
static enum status run(struct device *device, const struct matrix_recurrence_backward_args *a,
                       const struct plan &p)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const dim3 grid((unsigned)(f->batch * f->n_heads * p.chunks));
	const struct outputs o = {rows_of(a->dq, f->d_k), rows_of(a->dk, f->d_k),
	                          rows_of(a->dv, f->d_v), rows_of(a->dlog_decay, f->d_k)};

	if (f->decay == DECAY_DIAGONAL)
		return launch(device, "matrix_recurrence_backward", chunk_kernel<PANEL, true>, grid,
		              THREADS, (size_t)layout<PANEL>::BYTES, *f, p, o);
	return launch(device, "matrix_recurrence_backward", chunk_kernel<PANEL, false>, grid,
	              THREADS, (size_t)layout<PANEL>::BYTES, *f, p, o);
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
	const struct plan p = plan_of(device, a, NULL);
	const int64_t kept = p.segments > 1 ? p.segments * a->forward.batch * a->forward.n_heads *
	                                              p.panels * panel_rows(&a->forward)
	                                    : 0;

	return (size_t)(reinterpret_cast<const char *>(p.decays + kept) - (const char *)NULL);
}

extern "C" enum status portable_matrix_recurrence_backward(struct device *device, const void *args,
                                                           void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct plan p = plan_of(device, a, workspace);
	const enum status status = sweep(device, *a, p, panel_rows(&a->forward));

	if (status != STATUS_OK)
		return status;
	return panel_rows(&a->forward) == 64 ? run<64>(device, a, p) : run<128>(device, a, p);
}
