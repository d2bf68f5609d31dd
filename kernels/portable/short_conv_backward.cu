/*
 * Gradients of the short convolution. With dpre the gradient before the silu,
 *   dx_t = sum over j of weight_j dpre_{t+3-j},  dweight_j = sum over t of dpre_t x_{t-3+j}.
 * A thread owns eight channels and walks down TOKENS tokens, and the three
 * behind them once more, since they complete its last dx; the pre-activation
 * is computed again. It keeps the sums over tokens from segment to segment.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128, TOKENS = 16, BLOCKS_PER_SM = 4;

/* Eight channels: taps and bias, the inputs of the tokens before, dx of these and the token, and
 * the parameters' gradients. */
struct channels {
	float weight[CONV_WIDTH][8], bias[8];
	float before[CONV_HISTORY][8], dx[CONV_WIDTH][8];
	float dweight[CONV_WIDTH][8], dbias[8];
};

static __device__ __forceinline__ void
start(struct channels &c, const struct short_conv_backward_args &a, int64_t channel)
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
		c.bias[i] = a.forward.bias ? a.forward.bias[channel + i] : 0.0f;
		c.dbias[i] = 0.0f;
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++) {
			c.weight[j][i] = a.forward.weight[(channel + i) * CONV_WIDTH + j];
			c.dweight[j][i] = 0.0f;
		}
	}
}

/* Row n of dout, summed over its readers. */
static __device__ __forceinline__ void
load_dout(float (&sum)[8], const struct short_conv_backward_args &a, int64_t n, int64_t channel)
{
	const bf16 *dout =
	        static_cast<const bf16 *>(a.dout) + n * a.n_readers * a.forward.channels + channel;
	float x[8];

	load8(sum, dout);
	for (int64_t r = 1; r < a.n_readers; r++) {
		load8(x, dout + r * a.forward.channels);
#pragma unroll
		for (int i = 0; i < 8; i++)
			sum[i] += x[i];
	}
}

/* A token's x and dout; `own`: its share of the parameters' gradients is this thread's. Afterwards
 * c.dx[0] is complete. */
static __device__ __forceinline__ void advance(struct channels &c, const float (&x)[8],
                                               const float (&dout)[8], bool own, enum curve curve)
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
		float pre = fmaf(c.weight[CONV_HISTORY][i], x[i], c.bias[i]);

#pragma unroll
		for (int j = 0; j < CONV_HISTORY; j++)
			pre = fmaf(c.weight[j][i], c.before[j][i], pre);
		const float s = sigmoid(pre);
		const float slope = curve == CURVE_NONE ? 1.0f : s * (1.0f + pre * (1.0f - s));
		const float dpre = dout[i] * slope;
		const float share = own ? dpre : 0.0f;

#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++) {
			c.dx[j][i] = fmaf(c.weight[j][i], dpre, c.dx[j][i]);
			c.dweight[j][i] = fmaf(share, j < CONV_HISTORY ? c.before[j][i] : x[i],
			                       c.dweight[j][i]);
		}
		c.dbias[i] += share;
	}
}

/* The token becomes one of those before. */
static __device__ __forceinline__ void shift(struct channels &c, const float (&x)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
#pragma unroll
		for (int j = 0; j + 1 < CONV_HISTORY; j++)
			c.before[j][i] = c.before[j + 1][i];
		c.before[CONV_HISTORY - 1][i] = x[i];
#pragma unroll
		for (int j = 0; j + 1 < CONV_WIDTH; j++)
			c.dx[j][i] = c.dx[j + 1][i];
		c.dx[CONV_WIDTH - 1][i] = 0.0f;
	}
}

/* Block column blockIdx.x of 8 THREADS channels; segments blockIdx.y, blockIdx.y + gridDim.y, ...
 * parts [gridDim.y, 5 channels]: dweight, dbias. */
static __global__ void __launch_bounds__(THREADS)
        conv_backward_kernel(const __grid_constant__ struct short_conv_backward_args a,
                             float *parts)
{
	const struct short_conv_args &f = a.forward;
	const int64_t segments = divide_up(f.seq_len, TOKENS);
	const int64_t channel = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	struct channels c;

	if (channel >= f.channels)
		return;
	start(c, a, channel);
	for (int64_t item = blockIdx.y; item < f.batch * segments; item += gridDim.y) {
		const int64_t b = item / segments, first = item % segments * TOKENS;
		const int64_t last = min(first + TOKENS, f.seq_len);
		const bf16 *x =
		        static_cast<const bf16 *>(f.x) + b * f.seq_len * f.x_stride + channel;
		bf16 *dx = static_cast<bf16 *>(a.dx) + b * f.seq_len * f.x_stride + channel;

#pragma unroll
		for (int j = 0; j < CONV_HISTORY; j++) {
#pragma unroll
			for (int i = 0; i < 8; i++)
				c.before[j][i] = 0.0f;
			if (first - CONV_HISTORY + j >= 0)
				load8(c.before[j], x + (first - CONV_HISTORY + j) * f.x_stride);
		}
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++)
#pragma unroll
			for (int i = 0; i < 8; i++)
				c.dx[j][i] = 0.0f;
		for (int64_t t = first; t < last + CONV_HISTORY; t++) {
			float value[8] = {}, dout[8] = {};

			if (t < f.seq_len) {
				load8(value, x + t * f.x_stride);
				load_dout(dout, a, b * f.seq_len + t, channel);
			}
			advance(c, value, dout, t < last, f.curve);
			if (t - CONV_HISTORY >= first)
				store8(dx + (t - CONV_HISTORY) * f.x_stride, c.dx[0]);
			shift(c, value);
		}
	}
	float *const to = parts + blockIdx.y * (CONV_WIDTH + 1) * f.channels;
#pragma unroll
	for (int i = 0; i < 8; i++) {
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++)
			to[(channel + i) * CONV_WIDTH + j] = c.dweight[j][i];
		to[f.channels * CONV_WIDTH + channel + i] = c.dbias[i];
	}
}

static int64_t splits_of(const struct device *device, const struct short_conv_args *f)
{
	return count_shares(device, f->batch * divide_up(f->seq_len, TOKENS), BLOCKS_PER_SM,
	                    divide_up(f->channels, 8 * THREADS));
}

} // namespace

extern "C" const char *portable_short_conv_backward_unsupported(const struct device *,
                                                                const void *args)
{
	const auto *a = static_cast<const struct short_conv_backward_args *>(args);
	const struct short_conv_args *f = &a->forward;

	if (!is_known_activation(f->curve))
		return "an unknown curve";
	if (f->x == a->dx)
		return "dx in the place of x";
	return either(check_widths(f->channels, f->x_stride), check_aligned(f->x, a->dx));
}

extern "C" size_t portable_short_conv_backward_workspace(const struct device *device,
                                                         const void *args)
{
	const auto *a = static_cast<const struct short_conv_backward_args *>(args);
	const struct short_conv_args *f = &a->forward;

	return (size_t)(splits_of(device, f) * (CONV_WIDTH + 1) * f->channels) * sizeof(float);
}

extern "C" enum status portable_short_conv_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const auto *a = static_cast<const struct short_conv_backward_args *>(args);
	const struct short_conv_args *f = &a->forward;
	const int64_t splits = splits_of(device, f), taps = CONV_WIDTH * f->channels;
	float *parts = static_cast<float *>(workspace);
	enum status status =
	        launch(device, "short_conv_backward", conv_backward_kernel,
	               dim3((unsigned)divide_up(f->channels, 8 * THREADS), (unsigned)splits),
	               THREADS, 0, *a, parts);

	if (status == STATUS_OK)
		status = column_sums(device, "short_conv_backward", parts, splits,
		                     taps + f->channels, taps, a->dweight);
	if (status != STATUS_OK || !f->bias)
		return status;
	return column_sums(device, "short_conv_backward", parts + taps, splits, taps + f->channels,
	                   f->channels, a->dbias);
}
