/* Mamba's short convolution with its silu, or none: forward, gradients, and one token at a time. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* Channels that a task of the backward pass takes, and tokens that one of the forward does. */
enum { BLOCK_CHANNELS = 64, BLOCK_TOKENS = 64 };

/* to[i] = bias (NULL: 0) + the taps of token t, before the activation; row t of x is x + t *
 * stride, and rows before the sequence are zero. */
static void convolve(const struct short_conv_args *a, const float *x, int64_t t, int64_t channels,
                     const float *weight, const float *bias, float *to)
{
	if (bias)
		memcpy(to, bias, sizeof *to * (size_t)channels);
	else
		memset(to, 0, sizeof *to * (size_t)channels);
	for (int64_t j = t < CONV_HISTORY ? CONV_HISTORY - t : 0; j < CONV_WIDTH; j++) {
		const float *row = x + (t - CONV_HISTORY + j) * a->x_stride;

#pragma omp simd
		for (int64_t i = 0; i < channels; i++)
			to[i] += weight[i * CONV_WIDTH + j] * row[i];
	}
}

/* What the step after the last token needs to know. */
static void store_history(const struct short_conv_args *a, int64_t b)
{
	const float *x = (const float *)a->x + b * a->seq_len * a->x_stride;
	float *to = (float *)a->history + b * CONV_HISTORY * a->channels;
	size_t bytes = sizeof *to * (size_t)a->channels;

	for (int64_t j = 0; j < CONV_HISTORY; j++) {
		int64_t t = a->seq_len - CONV_HISTORY + j;

		if (t < 0)
			memset(to + j * a->channels, 0, bytes);
		else
			memcpy(to + j * a->channels, x + t * a->x_stride, bytes);
	}
}

enum status cpu_short_conv(struct device *device, const void *args, void *workspace)
{
	const struct short_conv_args *a = args;
	int64_t blocks = (a->seq_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < a->batch * blocks; task++) {
		int64_t b = task / blocks, first = task % blocks * BLOCK_TOKENS;
		int64_t last =
		        first + BLOCK_TOKENS < a->seq_len ? first + BLOCK_TOKENS : a->seq_len;
		const float *x = (const float *)a->x + b * a->seq_len * a->x_stride;

		for (int64_t t = first; t < last; t++) {
			float *out = (float *)a->out + (b * a->seq_len + t) * a->channels;

			convolve(a, x, t, a->channels, a->weight, a->bias, out);
			if (a->curve == CURVE_NONE)
				continue;
#pragma omp simd
			for (int64_t i = 0; i < a->channels; i++)
				out[i] = silu_f32(out[i]);
		}
		if (a->history && last == a->seq_len)
			store_history(a, b);
	}
	return STATUS_OK;
}

/* Each thread's share of dweight and dbias: CONV_WIDTH + 1 doubles per channel. */
size_t cpu_short_conv_backward_workspace(const struct device *device, const void *args)
{
	const struct short_conv_backward_args *a = args;

	return sizeof(double) * (CONV_WIDTH + 1) *
	       (size_t)(a->forward.channels * omp_get_max_threads());
}

/* dpre [channels]: the gradient before the activation of token t, channels from `first` on. */
static void activation_backward(const struct short_conv_backward_args *a, int64_t b, int64_t t,
                                int64_t first, int64_t channels, float *dpre)
{
	const struct short_conv_args *f = &a->forward;
	const float *x = (const float *)f->x + b * f->seq_len * f->x_stride + first;
	const float *dout =
	        (const float *)a->dout + (b * f->seq_len + t) * a->n_readers * f->channels + first;
	float sum[BLOCK_CHANNELS];

	memcpy(sum, dout, sizeof *sum * (size_t)channels);
	for (int64_t r = 1; r < a->n_readers; r++)
#pragma omp simd
		for (int64_t i = 0; i < channels; i++)
			sum[i] += dout[r * f->channels + i];
	if (f->curve == CURVE_NONE) {
		memcpy(dpre, sum, sizeof *sum * (size_t)channels);
		return;
	}
	convolve(f, x, t, channels, f->weight + first * CONV_WIDTH,
	         f->bias ? f->bias + first : NULL, dpre);
#pragma omp simd
	for (int64_t i = 0; i < channels; i++) {
		float s = sigmoid_f32(dpre[i]);

		dpre[i] = sum[i] * s * (1.0f + dpre[i] * (1.0f - s));
	}
}

/* One sequence of a block of channels. Token t completes what tokens t-3 .. t pass to dx. */
static void block_backward(const struct short_conv_backward_args *a, int64_t b, int64_t first,
                           int64_t channels, double *dweight, double *dbias)
{
	const struct short_conv_args *f = &a->forward;
	const float *weight = f->weight + first * CONV_WIDTH;
	float dpre[BLOCK_CHANNELS];

	for (int64_t t = 0; t < f->seq_len; t++) {
		int64_t row = (b * f->seq_len + t) * f->x_stride + first;

		activation_backward(a, b, t, first, channels, dpre);
		memset((float *)a->dx + row, 0, sizeof *dpre * (size_t)channels);
		for (int64_t j = t < CONV_HISTORY ? CONV_HISTORY - t : 0; j < CONV_WIDTH; j++) {
			int64_t from = row + (j - CONV_HISTORY) * f->x_stride;
			const float *x = (const float *)f->x + from;
			float *dx = (float *)a->dx + from;

#pragma omp simd
			for (int64_t i = 0; i < channels; i++) {
				dx[i] += weight[i * CONV_WIDTH + j] * dpre[i];
				dweight[i * CONV_WIDTH + j] += dpre[i] * x[i];
			}
		}
		for (int64_t i = 0; i < channels; i++)
			dbias[i] += dpre[i];
	}
}

enum status cpu_short_conv_backward(struct device *device, const void *args, void *workspace)
{
	const struct short_conv_backward_args *a = args;
	const struct short_conv_args *f = &a->forward;
	int64_t blocks = (f->channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
	int n_threads = omp_get_max_threads();
	int64_t taps = f->channels * CONV_WIDTH, share = taps + f->channels;
	double *partial = workspace;

	memset(partial, 0, cpu_short_conv_backward_workspace(device, args));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t task = 0; task < f->batch * blocks; task++) {
		int64_t first = task % blocks * BLOCK_CHANNELS, left = f->channels - first;
		double *mine = partial + share * omp_get_thread_num();

		block_backward(a, task / blocks, first,
		               left < BLOCK_CHANNELS ? left : BLOCK_CHANNELS,
		               mine + first * CONV_WIDTH, mine + taps + first);
	}
	add_shares(partial, n_threads, share, taps, a->dweight);
	if (f->bias)
		add_shares(partial + taps, n_threads, share, f->channels, a->dbias);
	return STATUS_OK;
}

enum status cpu_short_conv_step(struct device *device, const void *args, void *workspace)
{
	const struct short_conv_step_args *a = args;
	int64_t c = a->channels;

#pragma omp parallel for schedule(static)
	for (int64_t b = 0; b < a->batch; b++) {
		const float *x = (const float *)a->x + b * a->x_stride;
		float *history = (float *)a->history + b * CONV_HISTORY * c;
		float *out = (float *)a->out + b * c;

#pragma omp simd
		for (int64_t i = 0; i < c; i++) {
			const float *w = a->weight + i * CONV_WIDTH;
			float old = history[i], middle = history[c + i], last = history[2 * c + i];

			float sum = (a->bias ? a->bias[i] : 0.0f) + w[0] * old + w[1] * middle +
			            w[2] * last + w[3] * x[i];

			out[i] = a->curve == CURVE_NONE ? sum : silu_f32(sum);
			history[i] = middle;
			history[c + i] = last;
			history[2 * c + i] = x[i];
		}
	}
	return STATUS_OK;
}
