/* RWKV's token shift: forward, gradients, and one token at a time. Bound by memory: a task takes a
 * block of tokens, all channels of one after the other. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"

/* Tokens of a task, and channels of one of the backward pass. */
enum { BLOCK_TOKENS = 64, BLOCK_CHANNELS = 64 };

/* out [width] = x + (before - x) * mix; before NULL: 0. */
static void mix_row(int64_t width, const float *x, const float *before, const float *mix,
                    float *out)
{
	if (before)
#pragma omp simd
		for (int64_t i = 0; i < width; i++)
			out[i] = x[i] + (before[i] - x[i]) * mix[i];
	else
#pragma omp simd
		for (int64_t i = 0; i < width; i++)
			out[i] = x[i] - x[i] * mix[i];
}

/* The mixes of output n for row r of the batch. */
static const float *mix_of(const struct token_shift_args *a, int64_t n, int64_t r)
{
	return a->form == SHIFT_CONSTANT
	               ? a->weight + n * a->width
	               : (const float *)a->mix + (n * a->batch * a->seq_len + r) * a->width;
}

enum status cpu_token_shift(struct device *device, const void *args, void *workspace)
{
	const struct token_shift_args *a = args;
	int64_t rows = a->batch * a->seq_len, width = a->width;

#pragma omp parallel for schedule(static, BLOCK_TOKENS)
	for (int64_t r = 0; r < rows; r++) {
		const float *x = (const float *)a->x + r * width;
		const float *before = r % a->seq_len == 0 ? NULL : x - width;

		for (int64_t n = 0; n < a->n_out; n++)
			mix_row(width, x, before, mix_of(a, n, r),
			        (float *)a->out + (n * rows + r) * width);
		if (a->last && r % a->seq_len == a->seq_len - 1)
			memcpy((float *)a->last + r / a->seq_len * width, x,
			       sizeof *x * (size_t)width);
	}
	return STATUS_OK;
}

/* Each thread's share of dweight. */
size_t cpu_token_shift_backward_workspace(const struct device *device, const void *args)
{
	const struct token_shift_args *f =
	        &((const struct token_shift_backward_args *)args)->forward;

	return f->form == SHIFT_CONSTANT
	               ? sizeof(double) * (size_t)(f->n_out * f->width * omp_get_max_threads())
	               : 0;
}

/*
 * Output n of channels `first` .. of row r: with a token before it, dx of that token gets dout mix,
 * and its own dout (1 - mix). The gradient of the mix, dout (before - x), is stored or added to a
 * thread's share.
 */
static void output_backward(const struct token_shift_backward_args *a, int64_t n, int64_t r,
                            int64_t first, int64_t channels, double *dweight)
{
	const struct token_shift_args *f = &a->forward;
	int64_t at = r * f->width + first, out = n * f->batch * f->seq_len * f->width + at;
	const float *x = (const float *)f->x + at, *mix = mix_of(f, n, r) + first;
	const float *dout = (const float *)a->dout + out;
	float *dx = (float *)a->dx + at, dmix[BLOCK_CHANNELS];

	if (r % f->seq_len == 0)
#pragma omp simd
		for (int64_t i = 0; i < channels; i++) {
			dmix[i] = -dout[i] * x[i];
			dx[i] += dout[i] * (1.0f - mix[i]);
		}
	else
#pragma omp simd
		for (int64_t i = 0; i < channels; i++) {
			dmix[i] = dout[i] * (x[i - f->width] - x[i]);
			dx[i] += dout[i] * (1.0f - mix[i]);
			dx[i - f->width] += dout[i] * mix[i];
		}
	if (f->form == SHIFT_VARIABLE)
		memcpy((float *)a->dmix + out, dmix, sizeof *dmix * (size_t)channels);
	else
#pragma omp simd
		for (int64_t i = 0; i < channels; i++)
			dweight[n * f->width + first + i] += dmix[i];
}

/* One sequence of a block of channels: token t completes dx of the one before it. */
static void block_backward(const struct token_shift_backward_args *a, int64_t b, int64_t first,
                           int64_t channels, double *dweight)
{
	const struct token_shift_args *f = &a->forward;

	for (int64_t r = b * f->seq_len; r < (b + 1) * f->seq_len; r++) {
		float *dx = (float *)a->dx + r * f->width + first;

		if (!a->dresidual)
			memset(dx, 0, sizeof *dx * (size_t)channels);
		else if (a->dx != a->dresidual)
			memcpy(dx, (const float *)a->dresidual + r * f->width + first,
			       sizeof *dx * (size_t)channels);
		for (int64_t n = 0; n < f->n_out; n++)
			output_backward(a, n, r, first, channels, dweight);
	}
}

enum status cpu_token_shift_backward(struct device *device, const void *args, void *workspace)
{
	const struct token_shift_backward_args *a = args;
	const struct token_shift_args *f = &a->forward;
	int64_t blocks = (f->width + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
	int64_t share = f->n_out * f->width;
	int n_threads = omp_get_max_threads();
	double *partial = workspace;

	if (f->form == SHIFT_CONSTANT)
		memset(partial, 0, cpu_token_shift_backward_workspace(device, args));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t task = 0; task < f->batch * blocks; task++) {
		int64_t first = task % blocks * BLOCK_CHANNELS, left = f->width - first;

		block_backward(a, task / blocks, first,
		               left < BLOCK_CHANNELS ? left : BLOCK_CHANNELS,
		               partial ? partial + share * omp_get_thread_num() : NULL);
	}
	if (f->form == SHIFT_CONSTANT)
		add_shares(partial, n_threads, share, share, a->dweight);
	return STATUS_OK;
}

enum status cpu_token_shift_step(struct device *device, const void *args, void *workspace)
{
	const struct token_shift_step_args *a = args;
	const bool moves = a->form == SHIFT_CONSTANT;
	int64_t width = a->width;

#pragma omp parallel for schedule(static)
	for (int64_t b = 0; b < a->batch; b++) {
		const size_t bytes = sizeof(float) * (size_t)width;
		const float *x = (const float *)a->x + b * width;
		float *before = (float *)(moves ? a->state : a->before) + b * width;

		for (int64_t n = 0; n < a->n_out; n++) {
			const int64_t row = (n * a->batch + b) * width;
			const float *mix = moves ? a->weight + n * width : (float *)a->mix + row;

			mix_row(width, x, before, mix, (float *)a->out + row);
		}
		if (moves && a->before)
			memcpy((float *)a->before + b * width, before, bytes);
		if (moves)
			memcpy(before, x, bytes);
	}
	return STATUS_OK;
}
