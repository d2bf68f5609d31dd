/* The gates of low rank of GLA, KDA, RWKV-6 and Mamba. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum {
	THREADS = 128,
	TOKENS = 16,  /* of a tile: one product's rows */
	TILES = 4,    /* that a warp takes, one after the other */
	COLUMNS = 64, /* of a warp */
	GROUP = 32, /* columns of four products, interleaved so that a lane gets eight neighbours */
	NARROW_PER_SM = 4 /* blocks of a multiprocessor */
};

/*
 * log2(1 / (1 + 2^-x)). log2(1 + e) is e times a polynomial, to 2^-19 of it for every e from 0 to
 * 1: as many instructions as a logarithm and a series for small e, but half the work for the units
 * that do one in eight cycles.
 */
static __device__ __forceinline__ float log2_sigmoid(float x)
{
	const float e = exp2_fast(-fabsf(x));
	float p = 0.020401185f;

	p = fmaf(p, e, -0.095797546f);
	p = fmaf(p, e, 0.21528454f);
	p = fmaf(p, e, -0.33908904f);
	p = fmaf(p, e, 0.47766837f);
	p = fmaf(p, e, -0.72115946f);
	p = fmaf(p, e, 1.4426932f);
	return fmaf(-e, p, fminf(x, 0.0f));
}

/* Two neighbouring elements. */
static __device__ __forceinline__ uint32_t load_pair(const bf16 *from)
{
	return *reinterpret_cast<const uint32_t *>(from);
}

/* Two neighbours' tanh in bf16, and what that leaves of it, likewise. */
struct split_pair {
	uint32_t high, low;
};

static __device__ __forceinline__ struct split_pair tanh_of(uint32_t pair)
{
	const float x = tanh_of(low_half(pair)).value, y = tanh_of(high_half(pair)).value;
	const uint32_t high = pack(x, y);

	return {high, pack(x - low_half(high), y - high_half(high))};
}

/* sum[n]: 16 tokens from `token` on times columns 8 (x / 2) + 2 (n % 4) + x % 2 of group n / 4.
 * TANH: of tanh(x), to twice the digits of bf16. */
template <bool TANH>
static __device__ __forceinline__ void gate_products(float (&sum)[COLUMNS / 8][4],
                                                     const struct decay_gate_args &a, int64_t token,
                                                     int64_t column)
{
	const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
	const auto *x = static_cast<const bf16 *>(a.x) + 2 * c;
	const bf16 *row0 = x + min(token + g, a.n_tokens - 1) * a.x_stride;
	const bf16 *row1 = x + min(token + g + 8, a.n_tokens - 1) * a.x_stride;

	for (int64_t r = 0; r < a.rank; r += 16) {
		const bool whole = r + 8 < a.rank;
		uint32_t left[4] = {load_pair(row0 + r), load_pair(row1 + r),
		                    whole ? load_pair(row0 + r + 8) : 0,
		                    whole ? load_pair(row1 + r + 8) : 0};
		uint32_t rest[4];

#pragma unroll
		for (int i = 0; TANH && i < 4; i++) {
			const struct split_pair split = tanh_of(left[i]);

			left[i] = split.high;
			rest[i] = split.low;
		}
#pragma unroll
		for (int n = 0; n < COLUMNS / 8; n++) {
			const int64_t own = column + n / 4 * GROUP + g / 2 * 8 + n % 4 * 2 + g % 2;
			const bf16 *w = static_cast<const bf16 *>(a.weight) +
			                min(own, a.d_out - 1) * a.rank + r + 2 * c;

			const uint32_t right[2] = {load_pair(w), whole ? load_pair(w + 8) : 0};

			multiply_add(sum[n], left, right[0], right[1]);
			if (TANH)
				multiply_add(sum[n], rest, right[0], right[1]);
		}
	}
}

/* By what a logit is multiplied before its gate is taken, to powers of two where there are any. */
template <enum low_rank FORM> static __device__ constexpr float scale_of()
{
	return FORM == LOW_RANK_DECAY || FORM == LOW_RANK_EXP   ? LOG2E
	       : FORM == LOW_RANK_RATE || FORM == LOW_RANK_STEP ? -LOG2E
	                                                        : 1.0f;
}

/* By what log2_sigmoid is multiplied for the eight columns from `own` on. softplus(x) =
 * -logsigmoid(-x). */
template <enum low_rank FORM>
static __device__ __forceinline__ float factor_of(const struct decay_gate_args &a, int64_t own)
{
	return FORM == LOW_RANK_RATE   ? LN2 * __expf(a.log_rate[own / (a.d_out / a.n_heads)])
	       : FORM == LOW_RANK_STEP ? -LN2
	                               : LN2 / a.normalizer;
}

/* The gate of a logit that was scaled. */
template <enum low_rank FORM>
static __device__ __forceinline__ float gate_of(float scaled, float factor)
{
	if (FORM == LOW_RANK_LOGIT || FORM == LOW_RANK_TANH)
		return scaled;
	if (FORM == LOW_RANK_EXP)
		return -exp2_fast(scaled);
	return factor * log2_sigmoid(scaled);
}

/* What a lane knows of its columns: eight of each group. */
struct gate_columns {
	float bias[COLUMNS / GROUP][8], factor[COLUMNS / GROUP];
	bool inside[COLUMNS / GROUP];
};

template <enum low_rank FORM>
static __device__ __forceinline__ void
load_gate_columns(struct gate_columns &c, const struct decay_gate_args &a, int64_t column)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int i = 0; i < COLUMNS / GROUP; i++) {
		const int64_t wanted = column + i * GROUP + lane % 4 * 8;
		const int64_t own = min(wanted, a.d_out - 8);

		c.inside[i] = wanted < a.d_out;
		load8f(c.bias[i], a.bias + own);
#pragma unroll
		for (int j = 0; j < 8; j++)
			c.bias[i][j] *= scale_of<FORM>();
		if (FORM == LOW_RANK_DECAY || FORM == LOW_RANK_RATE || FORM == LOW_RANK_STEP)
			c.factor[i] = factor_of<FORM>(a, own);
	}
}

/* Sums of gate_products() become the gates of a lane's two rows, which go to `row0` and `row1`, if
 * they are `there`. */
template <enum low_rank FORM>
static __device__ __forceinline__ void
store_gates(bf16 *row0, bf16 *row1, const float (&sum)[COLUMNS / 8][4],
            const struct gate_columns &c, bool there0, bool there1)
{
#pragma unroll
	for (int i = 0; i < COLUMNS / GROUP * 2; i++) {
		const bool there = i % 2 ? there1 : there0;
		float y[8];

#pragma unroll
		for (int j = 0; j < 8; j++)
			y[j] = gate_of<FORM>(fmaf(sum[i / 2 * 4 + j / 2][i % 2 * 2 + j % 2],
			                          scale_of<FORM>(), c.bias[i / 2][j]),
			                     c.factor[i / 2]);
		if (there && c.inside[i / 2])
			store8((i % 2 ? row1 : row0) + i / 2 * GROUP, y);
	}
}

template <enum low_rank FORM>
static __global__ void __launch_bounds__(THREADS)
        decay_gate_kernel(const __grid_constant__ struct decay_gate_args a)
{
	const int64_t column =
	        ((int64_t)blockIdx.y * (THREADS / WARP) + threadIdx.x / WARP) * COLUMNS;
	struct gate_columns c;

	if (column >= a.d_out)
		return;
	load_gate_columns<FORM>(c, a, column);
	for (int tile = 0; tile < TILES; tile++) {
		const int64_t token = ((int64_t)blockIdx.x * TILES + tile) * TOKENS;
		const int64_t n = token + threadIdx.x % WARP / 4;
		bf16 *row = static_cast<bf16 *>(a.out) + n * a.d_out + column + threadIdx.x % 4 * 8;
		float sum[COLUMNS / 8][4] = {};

		gate_products<FORM == LOW_RANK_TANH || FORM == LOW_RANK_EXP>(sum, a, token, column);
		store_gates<FORM>(row, row + 8 * a.d_out, sum, c, n < a.n_tokens,
		                  n + 8 < a.n_tokens);
	}
}

/* The rows of x for a tile's product, of up to 16 columns. */
static __device__ __forceinline__ void load_narrow(uint32_t (&left)[4], const bf16 *row0,
                                                   const bf16 *row1, bool whole, bool there0,
                                                   bool there1)
{
	left[0] = there0 ? load_pair(row0) : 0;
	left[1] = there1 ? load_pair(row1) : 0;
	left[2] = there0 && whole ? load_pair(row0 + 8) : 0;
	left[3] = there1 && whole ? load_pair(row1 + 8) : 0;
}

/* In how many of a block's tiles row `first` of the first one's is among the tokens. */
static __device__ __forceinline__ int count_tiles(int64_t first, int64_t n_tokens)
{
	const int64_t step = (int64_t)gridDim.x * TOKENS;

	return first < n_tokens ? held((int)divide_up(n_tokens - first, step)) : 0;
}

/* Of a rank of up to 16: a warp keeps its weights and takes every gridDim.x-th tile, the next of
 * which is loaded meanwhile. */
template <enum low_rank FORM>
static __global__ void __launch_bounds__(THREADS, NARROW_PER_SM)
        narrow_gate_kernel(const __grid_constant__ struct decay_gate_args a)
{
	constexpr bool TANH = FORM == LOW_RANK_TANH || FORM == LOW_RANK_EXP;
	const int lane = threadIdx.x % WARP, g = lane / 4, quarter = lane % 4;
	const int64_t column =
	        ((int64_t)blockIdx.y * (THREADS / WARP) + threadIdx.x / WARP) * COLUMNS;
	uint32_t right[COLUMNS / 8][2], next[4];
	struct gate_columns c;

	if (column >= a.d_out)
		return;
	load_gate_columns<FORM>(c, a, column);
#pragma unroll
	for (int n = 0; n < COLUMNS / 8; n++) {
		const int64_t own = column + n / 4 * GROUP + g / 2 * 8 + n % 4 * 2 + g % 2;
		const bf16 *w = static_cast<const bf16 *>(a.weight) +
		                min(own, a.d_out - 1) * a.rank + 2 * quarter;

		right[n][0] = load_pair(w);
		right[n][1] = a.rank > 8 ? load_pair(w + 8) : 0;
	}
	const int64_t token = (int64_t)blockIdx.x * TOKENS, first = token + g;
	const int tiles = count_tiles(token, a.n_tokens), rows0 = count_tiles(first, a.n_tokens);
	const int rows1 = count_tiles(first + 8, a.n_tokens);
	const int64_t step = (int64_t)gridDim.x * TOKENS;
	const int64_t x_step = held(step * a.x_stride), out_step = held(step * a.d_out);
	const bf16 *x0 = static_cast<const bf16 *>(a.x) + first * a.x_stride + 2 * quarter;
	const bf16 *x1 = x0 + 8 * a.x_stride;
	bf16 *out0 = static_cast<bf16 *>(a.out) + first * a.d_out + column + 8 * quarter;
	bf16 *out1 = out0 + 8 * a.d_out;
	const bool whole = a.rank > 8;

	load_narrow(next, x0, x1, whole, 0 < rows0, 0 < rows1);
	for (int tile = 0; tile < tiles; tile++) {
		uint32_t left[4] = {next[0], next[1], next[2], next[3]}, rest[4];
		float sum[COLUMNS / 8][4] = {};

		x0 += x_step;
		x1 += x_step;
		load_narrow(next, x0, x1, whole, tile + 1 < rows0, tile + 1 < rows1);
#pragma unroll
		for (int i = 0; TANH && i < 4; i++) {
			const struct split_pair split = tanh_of(left[i]);

			left[i] = split.high;
			rest[i] = split.low;
		}
#pragma unroll
		for (int n = 0; n < COLUMNS / 8; n++) {
			multiply_add(sum[n], left, right[n][0], right[n][1]);
			if (TANH)
				multiply_add(sum[n], rest, right[n][0], right[n][1]);
		}
		store_gates<FORM>(out0, out1, sum, c, tile < rows0, tile < rows1);
		out0 += out_step;
		out1 += out_step;
	}
}

extern "C" const char *portable_decay_gate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct decay_gate_args *>(args);

	if (!is_known_low_rank(a->form))
		return "an unknown gate of low rank";
	if (a->form == LOW_RANK_RATE && a->d_out / a->n_heads % 8)
		return "widths must be multiples of 8";
	return either(check_widths(a->rank, a->x_stride, a->d_out), check_aligned(a->x));
}

template <enum low_rank FORM>
static auto kernel_for(bool narrow) -> decltype(&decay_gate_kernel<FORM>)
{
	return narrow ? narrow_gate_kernel<FORM> : decay_gate_kernel<FORM>;
}

static auto kernel_of(enum low_rank form, bool narrow)
        -> decltype(&decay_gate_kernel<LOW_RANK_DECAY>)
{
	switch (form) {
	case LOW_RANK_DECAY:
		return kernel_for<LOW_RANK_DECAY>(narrow);
	case LOW_RANK_RATE:
		return kernel_for<LOW_RANK_RATE>(narrow);
	case LOW_RANK_TANH:
		return kernel_for<LOW_RANK_TANH>(narrow);
	case LOW_RANK_EXP:
		return kernel_for<LOW_RANK_EXP>(narrow);
	case LOW_RANK_STEP:
		return kernel_for<LOW_RANK_STEP>(narrow);
	default:
		return kernel_for<LOW_RANK_LOGIT>(narrow);
	}
}

extern "C" enum status portable_decay_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct decay_gate_args *>(args);
	const int64_t columns = divide_up(a->d_out, THREADS / WARP * COLUMNS);
	const bool narrow = a->rank <= 16;
	const int64_t blocks = narrow ? count_shares(device, divide_up(a->n_tokens, TOKENS),
	                                             NARROW_PER_SM, columns)
	                              : divide_up(a->n_tokens, TOKENS * TILES);

	return launch(device, "decay_gate", kernel_of(a->form, narrow),
	              dim3((unsigned)blocks, (unsigned)columns), THREADS, 0, *a);
}
