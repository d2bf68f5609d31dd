/*
 * Mamba's short convolution and its silu, or none. A thread owns eight channels and
 * walks down TOKENS tokens with the three before them in registers, so x is
 * read 1 + 3/TOKENS times, the repeated rows from the L2 cache.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128, TOKENS = 16 };

/* Eight channels' taps and bias, and the inputs of the tokens before. */
struct channels {
	float weight[8][CONV_WIDTH], bias[8], before[CONV_HISTORY][8];
};

static __device__ __forceinline__ void load_weights(struct channels &c, const float *weight,
                                                    const float *bias, int64_t channel)
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float4 taps =
		        *reinterpret_cast<const float4 *>(weight + (channel + i) * CONV_WIDTH);

		c.weight[i][0] = taps.x;
		c.weight[i][1] = taps.y;
		c.weight[i][2] = taps.z;
		c.weight[i][3] = taps.w;
		c.bias[i] = bias ? bias[channel + i] : 0.0f;
	}
}

/* One token: out from its x and those before, which move on by one. */
static __device__ __forceinline__ void advance(struct channels &c, const float (&x)[8],
                                               float (&out)[8], enum curve curve)
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
		float sum = fmaf(c.weight[i][CONV_HISTORY], x[i], c.bias[i]);

#pragma unroll
		for (int j = 0; j < CONV_HISTORY; j++)
			sum = fmaf(c.weight[i][j], c.before[j][i], sum);
		out[i] = curve == CURVE_NONE ? sum : sum * sigmoid(sum);
#pragma unroll
		for (int j = 0; j + 1 < CONV_HISTORY; j++)
			c.before[j][i] = c.before[j + 1][i];
		c.before[CONV_HISTORY - 1][i] = x[i];
	}
}

static __global__ void __launch_bounds__(THREADS)
        conv_kernel(const __grid_constant__ struct short_conv_args a)
{
	const int64_t pieces = a.channels / 8, segments = divide_up(a.seq_len, TOKENS);
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t channel = index % pieces * 8, segment = index / pieces % segments;
	const int64_t b = index / pieces / segments, first = segment * TOKENS;
	const int64_t last = min(first + TOKENS, a.seq_len);
	const bf16 *x = static_cast<const bf16 *>(a.x) + b * a.seq_len * a.x_stride + channel;
	bf16 *out = static_cast<bf16 *>(a.out) + b * a.seq_len * a.channels + channel;
	struct channels c;
	float value[8], result[8];

	if (b >= a.batch)
		return;
	load_weights(c, a.weight, a.bias, channel);
#pragma unroll
	for (int j = 0; j < CONV_HISTORY; j++) {
		const int64_t t = first - CONV_HISTORY + j;

#pragma unroll
		for (int i = 0; i < 8; i++)
			c.before[j][i] = 0.0f;
		if (t >= 0)
			load8(c.before[j], x + t * a.x_stride);
	}
#pragma unroll 4
	for (int64_t t = first; t < last; t++) {
		load8(value, x + t * a.x_stride);
		advance(c, value, result, a.curve);
		store8(out + t * a.channels, result);
	}
	if (!a.history || last < a.seq_len)
		return;
	bf16 *history = static_cast<bf16 *>(a.history) + b * CONV_HISTORY * a.channels + channel;
#pragma unroll
	for (int j = 0; j < CONV_HISTORY; j++)
		store8(history + j * a.channels, c.before[j]);
}

extern "C" const char *portable_short_conv_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct short_conv_args *>(args);

	if (!is_known_activation(a->curve))
		return "an unknown curve";
	return either(check_widths(a->channels, a->x_stride), check_aligned(a->x, a->weight));
}

extern "C" enum status portable_short_conv(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct short_conv_args *>(args);
	const int64_t threads = a->batch * divide_up(a->seq_len, TOKENS) * (a->channels / 8);

	return launch_each(device, "short_conv", conv_kernel, threads, THREADS, *a);
}

static __global__ void __launch_bounds__(THREADS)
        step_kernel(const __grid_constant__ struct short_conv_step_args a)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t b = index / (a.channels / 8), channel = index % (a.channels / 8) * 8;
	bf16 *history = static_cast<bf16 *>(a.history) + b * CONV_HISTORY * a.channels + channel;
	struct channels c;
	float value[8], result[8];

	if (b >= a.batch)
		return;
	load_weights(c, a.weight, a.bias, channel);
	load8(value, static_cast<const bf16 *>(a.x) + b * a.x_stride + channel);
#pragma unroll
	for (int j = 0; j < CONV_HISTORY; j++)
		load8(c.before[j], history + j * a.channels);
	advance(c, value, result, a.curve);
#pragma unroll
	for (int j = 0; j < CONV_HISTORY; j++)
		store8(history + j * a.channels, c.before[j]);
	store8(static_cast<bf16 *>(a.out) + b * a.channels + channel, result);
}

extern "C" const char *portable_short_conv_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct short_conv_step_args *>(args);

	if (!is_known_activation(a->curve))
		return "an unknown curve";
	return either(check_widths(a->channels, a->x_stride), check_aligned(a->x, a->weight));
}

extern "C" enum status portable_short_conv_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct short_conv_step_args *>(args);
	const int64_t threads = a->batch * (a->channels / 8);

	return launch_each(device, "short_conv_step", step_kernel, threads, THREADS, *a);
}
