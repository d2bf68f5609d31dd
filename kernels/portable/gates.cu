/* The gates of low rank of GLA, KDA, RWKV-6 and Mamba. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum {
	THREADS = 128,
	TOKENS = 16,  /* of a tile: one product's rows */
	TILES = 4,    /* that a warp takes, one after the other */
	COLUMNS = 64, /* of a warp */
	GROUP = 32 /* columns of four products, interleaved so that a lane gets eight neighbours */
};

/* log2(1 / (1 + 2^-x)); where e = 2^-|x| is small, log2(1 + e) by its series. */
static __device__ __forceinline__ float log2_sigmoid(float x)
{
	const float e = exp2_fast(-fabsf(x));
	const float log = e < 0.002f ? e * (LOG2E - 0.5f * LOG2E * e) : log2_fast(1.0f + e);

	return fminf(x, 0.0f) - log;
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

/* Eight logits from column `own` on become the gate. */
template <enum low_rank FORM>
static __device__ __forceinline__ void finish_gate(float (&y)[8], const struct decay_gate_args &a,
                                                   int64_t own)
{
	if (FORM == LOW_RANK_LOGIT || FORM == LOW_RANK_TANH)
		return;
	if (FORM == LOW_RANK_EXP) {
#pragma unroll
		for (int j = 0; j < 8; j++)
			y[j] = -exp2_fast(LOG2E * y[j]);
		return;
	}
	/* softplus(x) = -logsigmoid(-x). */
	const float factor = FORM == LOW_RANK_RATE
	                             ? LN2 * __expf(a.log_rate[own / (a.d_out / a.n_heads)])
	                     : FORM == LOW_RANK_STEP ? -LN2
	                                             : LN2 / a.normalizer;

#pragma unroll
	for (int j = 0; j < 8; j++)
		y[j] = factor * log2_sigmoid((FORM == LOW_RANK_DECAY ? LOG2E : -LOG2E) * y[j]);
}

template <enum low_rank FORM>
static __global__ void __launch_bounds__(THREADS)
        decay_gate_kernel(const __grid_constant__ struct decay_gate_args a)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int64_t column = ((int64_t)blockIdx.y * (THREADS / WARP) + warp) * COLUMNS;

	for (int tile = 0; tile < TILES && column < a.d_out; tile++) {
		const int64_t token = ((int64_t)blockIdx.x * TILES + tile) * TOKENS;
		float sum[COLUMNS / 8][4] = {};

		gate_products<FORM == LOW_RANK_TANH || FORM == LOW_RANK_EXP>(sum, a, token, column);
#pragma unroll
		for (int i = 0; i < COLUMNS / GROUP * 2; i++) {
			const int64_t n = token + lane / 4 + i % 2 * 8;
			const int64_t own = column + i / 2 * GROUP + lane % 4 * 8;
			float bias[8], y[8];

			if (n >= a.n_tokens || own >= a.d_out)
				continue;
			load8f(bias, a.bias + own);
#pragma unroll
			for (int j = 0; j < 8; j++)
				y[j] = sum[i / 2 * 4 + j / 2][i % 2 * 2 + j % 2] + bias[j];
			finish_gate<FORM>(y, a, own);
			store8(static_cast<bf16 *>(a.out) + n * a.d_out + own, y);
		}
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

static auto kernel_of(enum low_rank form) -> decltype(&decay_gate_kernel<LOW_RANK_DECAY>)
{
	switch (form) {
	case LOW_RANK_DECAY:
		return decay_gate_kernel<LOW_RANK_DECAY>;
	case LOW_RANK_RATE:
		return decay_gate_kernel<LOW_RANK_RATE>;
	case LOW_RANK_TANH:
		return decay_gate_kernel<LOW_RANK_TANH>;
	case LOW_RANK_EXP:
		return decay_gate_kernel<LOW_RANK_EXP>;
	case LOW_RANK_STEP:
		return decay_gate_kernel<LOW_RANK_STEP>;
	default:
		return decay_gate_kernel<LOW_RANK_LOGIT>;
	}
}

extern "C" enum status portable_decay_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct decay_gate_args *>(args);
	const dim3 grid((unsigned)divide_up(a->n_tokens, TOKENS * TILES),
	                (unsigned)divide_up(a->d_out, THREADS / WARP * COLUMNS));

	return launch(device, "decay_gate", kernel_of(a->form), grid, THREADS, 0, *a);
}
