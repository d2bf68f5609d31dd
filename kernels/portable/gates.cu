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

/* ---- ranks above 16: a block keeps the rows of x of 128 tokens, and takes all columns, whose
 * weights pass through shared memory, the next 64 on their way meanwhile. ---- */

enum { WIDE_THREADS = 256, WIDE_TOKENS = WIDE_THREADS / WARP * TOKENS };

/* Element of a tile of weights, [COLUMNS, 8 PIECES], that begins a row's piece of eight: rows that
 * a product takes side by side are in different banks. */
template <int PIECES> static __device__ __forceinline__ int weight_at(int row, int piece)
{
	return (row * PIECES + (piece ^ (row / 8 % 4 * 2 + row % 2))) * 8;
}

/* The weights of 64 columns, in the background; zeros past the rank. */
template <int PIECES>
static __device__ __forceinline__ void load_weights(bf16 *tile, const struct decay_gate_args &a,
                                                    int64_t column)
{
#pragma unroll
	for (int j = 0; j < COLUMNS * PIECES / WIDE_THREADS; j++) {
		const int i = threadIdx.x + j * WIDE_THREADS, row = i / PIECES, piece = i % PIECES;
		const bool valid = piece * 8 < a.rank;

		copy16_async(tile + weight_at<PIECES>(row, piece),
		             static_cast<const bf16 *>(a.weight) +
		                     min(column + row, a.d_out - 1) * a.rank +
		                     (valid ? piece * 8 : 0),
		             valid);
	}
	copy_commit();
}

/* sum[n], as of gate_products(): products of 16 tokens with a tile of weights. */
template <int STEPS>
static __device__ __forceinline__ void
multiply_weights(float (&sum)[COLUMNS / 8][4], const uint32_t (&left)[STEPS][4], const bf16 *tile)
{
	const int lane = threadIdx.x % WARP, j = lane % 8, half = lane / 8 % 2, second = lane / 16;
	const int row = j / 2 * 8 + second * 2 + j % 2;

#pragma unroll
	for (int step = 0; step < STEPS; step++)
#pragma unroll
		for (int n = 0; n < COLUMNS / 8; n += 2) {
			uint32_t right[4];

			load_matrices(right,
			              tile + weight_at<2 * STEPS>(row + n / 4 * GROUP + n % 4 * 2,
			                                          2 * step + half));
			multiply_add(sum[n], left[step], right[0], right[1]);
			multiply_add(sum[n + 1], left[step], right[2], right[3]);
		}
}

template <enum low_rank FORM, int STEPS>
static __global__ void __launch_bounds__(WIDE_THREADS, 2)
        wide_gate_kernel(const __grid_constant__ struct decay_gate_args a)
{
	constexpr bool TANH = FORM == LOW_RANK_TANH || FORM == LOW_RANK_EXP;
	constexpr int TILE = COLUMNS * STEPS * 16;
	bf16 *const tiles = reinterpret_cast<bf16 *>(shared_memory);
	const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
	const int64_t token = (int64_t)blockIdx.x * WIDE_TOKENS + threadIdx.x / WARP * TOKENS + g;
	const bool there0 = token < a.n_tokens, there1 = token + 8 < a.n_tokens;
	const auto *x = static_cast<const bf16 *>(a.x) + 2 * c;
	const bf16 *x0 = x + min(token, a.n_tokens - 1) * a.x_stride;
	const bf16 *x1 = x + min(token + 8, a.n_tokens - 1) * a.x_stride;
	bf16 *out = static_cast<bf16 *>(a.out) + token * a.d_out + 8 * c;
	uint32_t left[STEPS][4], rest[TANH ? STEPS : 1][4];

	load_weights<2 * STEPS>(tiles, a, 0);
#pragma unroll
	for (int step = 0; step < STEPS; step++) {
		const int r = 16 * step;
		const bool low = r < a.rank, high = r + 8 < a.rank;

		left[step][0] = low ? load_pair(x0 + r) : 0;
		left[step][1] = low ? load_pair(x1 + r) : 0;
		left[step][2] = high ? load_pair(x0 + r + 8) : 0;
		left[step][3] = high ? load_pair(x1 + r + 8) : 0;
#pragma unroll
		for (int i = 0; TANH && i < 4; i++) {
			const struct split_pair split = tanh_of(left[step][i]);

			left[step][i] = split.high;
			rest[step][i] = split.low;
		}
	}
#pragma unroll 1
	for (int64_t column = 0, tile = 0; column < a.d_out; column += COLUMNS, tile ^= 1) {
		float sum[COLUMNS / 8][4] = {};
		struct gate_columns columns;

		copy_wait<0>();
		__syncthreads();
		if (column + COLUMNS < a.d_out)
			load_weights<2 * STEPS>(tiles + (tile ^ 1) * TILE, a, column + COLUMNS);
		multiply_weights<STEPS>(sum, left, tiles + tile * TILE);
		if constexpr (TANH)
			multiply_weights<STEPS>(sum, rest, tiles + tile * TILE);
		load_gate_columns<FORM>(columns, a, column);
		store_gates<FORM>(out, out + 8 * a.d_out, sum, columns, there0, there1);
		out += COLUMNS;
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

/* The blocks of a gate, and the kernel. */
struct gate_launch {
	void (*kernel)(struct decay_gate_args);
	dim3 blocks;
	int threads;
	size_t shared;
};

/* Up to 16 ranks in registers; up to 128 the rows of x, of tanh(x) up to 64; all others come from
 * memory, tile after tile. */
template <enum low_rank FORM>
static struct gate_launch launch_of(const struct device *device, const struct decay_gate_args *a)
{
	constexpr bool TANH = FORM == LOW_RANK_TANH || FORM == LOW_RANK_EXP;
	const int64_t columns = divide_up(a->d_out, THREADS / WARP * COLUMNS);
	const auto tall = [&](int64_t blocks, int64_t across) {
		return dim3((unsigned)blocks, (unsigned)across);
	};
	const auto wide = [&](int steps) {
		return (size_t)(2 * COLUMNS * 16 * steps) * sizeof(bf16);
	};
	const int64_t wide_blocks = divide_up(a->n_tokens, WIDE_TOKENS);

	if (a->rank <= 16)
		return {narrow_gate_kernel<FORM>,
		        tall(count_shares(device, divide_up(a->n_tokens, TOKENS), NARROW_PER_SM,
		                          columns),
		             columns),
		        THREADS, 0};
	if (a->rank <= 64)
		return {wide_gate_kernel<FORM, 4>, tall(wide_blocks, 1), WIDE_THREADS, wide(4)};
	if constexpr (!TANH)
		if (a->rank <= 128)
			return {wide_gate_kernel<FORM, 8>, tall(wide_blocks, 1), WIDE_THREADS,
			        wide(8)};
	return {decay_gate_kernel<FORM>, tall(divide_up(a->n_tokens, TOKENS * TILES), columns),
	        THREADS, 0};
}

static struct gate_launch launch_of(const struct device *device, const struct decay_gate_args *a)
{
	switch (a->form) {
	case LOW_RANK_DECAY:
		return launch_of<LOW_RANK_DECAY>(device, a);
	case LOW_RANK_RATE:
		return launch_of<LOW_RANK_RATE>(device, a);
	case LOW_RANK_TANH:
		return launch_of<LOW_RANK_TANH>(device, a);
	case LOW_RANK_EXP:
		return launch_of<LOW_RANK_EXP>(device, a);
	case LOW_RANK_STEP:
		return launch_of<LOW_RANK_STEP>(device, a);
	default:
		return launch_of<LOW_RANK_LOGIT>(device, a);
	}
}

extern "C" enum status portable_decay_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct decay_gate_args *>(args);
	const struct gate_launch x = launch_of(device, a);

	return launch(device, "decay_gate", x.kernel, x.blocks, x.threads, x.shared, *a);
}
