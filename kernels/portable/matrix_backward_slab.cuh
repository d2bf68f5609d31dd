/*
 * A chunk of the matrix recurrence's gradients (matrix_recurrence_backward.cu): what S and L, taken
 * in slabs, add to the gradients, then what the chunk's own tokens add.
 */
#ifndef KERNELS_PORTABLE_MATRIX_BACKWARD_SLAB_CUH
#define KERNELS_PORTABLE_MATRIX_BACKWARD_SLAB_CUH

#include "kernels/portable/matrix_backward_chunk.cuh"

namespace matrix_backward
{

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
			const float factor = decay_between(x.g[16 * group + lane / 4 + e / 2 * 8],
			                                   x.g[CHUNK - 1]);

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
		const float since = exp2_fast(g), until = decay_between(g, x.g[CHUNK - 1]);

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

} // namespace matrix_backward

#endif
