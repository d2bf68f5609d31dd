/*
 * The gated linear recurrence, forward and one step: channels are independent,
 * so each task takes a sequence and a block of channels through all of T, with
 * its state in the first-level cache and vectors across channels.
 */
#include "kernels/cpu/recurrence.h"

#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"

enum { BLOCK_CHANNELS = 64 };

int64_t channel_blocks(int64_t batch, int64_t width)
{
	int64_t threads = omp_get_max_threads(), common = batch, rest = threads;
	int64_t most = (width + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;

	while (rest) {
		int64_t remainder = common % rest;

		common = rest;
		rest = remainder;
	}
	return threads / common < most ? threads / common : most;
}

int64_t channel_block_start(int64_t width, int64_t n_blocks, int64_t block)
{
	int64_t units = (width + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
	int64_t start = units * block / n_blocks * BLOCK_CHANNELS;

	return start < width ? start : width;
}

/* One token of n channels: h = g h + (1-g) x. bias may be NULL. */
static void advance_sigmoid(int64_t n, const float *x, const float *gate, const float *bias,
                            float *h)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++) {
		struct gate_pair g = sigmoid_gate(bias ? gate[i] + bias[i] : gate[i]);

		h[i] = g.decay * h[i] + g.input * x[i];
	}
}

/* h = exp(gate) h + x. */
static void advance_log_decay(int64_t n, const float *x, const float *gate, float *h)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		h[i] = exp_f32(gate[i]) * h[i] + x[i];
}

/* out = sigmoid(z) h; z NULL: out = h. */
static void gate_output(int64_t n, const float *z, const float *h, float *out)
{
	if (!z) {
		memcpy(out, h, sizeof *out * (size_t)n);
		return;
	}
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = sigmoid_f32(z[i]) * h[i];
}

/* Token t of sequence b, channels first .. first+n; h is their state. */
static void advance_channels(const struct recurrence_args *a, int64_t b, int64_t t, int64_t first,
                             int64_t n, float *h)
{
	const float *x = view_at(&a->x, b, t, 0) + first;
	const float *gate = view_at(&a->gate, b, t, 0) + first;

	if (a->form == GATE_SIGMOID)
		advance_sigmoid(n, x, gate, a->gate_bias ? a->gate_bias + first : NULL, h);
	else
		advance_log_decay(n, x, gate, h);
	if (a->h.data)
		memcpy(view_at(&a->h, b, t, 0) + first, h, sizeof *h * (size_t)n);
	gate_output(n, a->z.data ? view_at(&a->z, b, t, 0) + first : NULL, h,
	            view_at(&a->out, b, t, 0) + first);
}

/* All of sequence b, channels first .. first+n. */
static void run_channels(const struct recurrence_args *a, int64_t b, int64_t first, int64_t n,
                         float *h)
{
	if (a->h0)
		memcpy(h, a->h0 + b * a->d_model + first, sizeof *h * (size_t)n);
	else
		memset(h, 0, sizeof *h * (size_t)n);
	for (int64_t t = 0; t < a->seq_len; t++)
		advance_channels(a, b, t, first, n, h);
	if (a->h_final)
		memcpy(a->h_final + b * a->d_model + first, h, sizeof *h * (size_t)n);
}

/* The running states, [B, D]. */
size_t cpu_recurrence_workspace(const struct device *device, const void *args)
{
	const struct recurrence_args *a = args;

	return sizeof(float) * (size_t)(a->batch * a->d_model);
}

enum status cpu_recurrence(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_args *a = args;
	int64_t n_blocks = channel_blocks(a->batch, a->d_model);

#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < a->batch * n_blocks; task++) {
		int64_t b = task / n_blocks;
		int64_t first = channel_block_start(a->d_model, n_blocks, task % n_blocks);
		int64_t end = channel_block_start(a->d_model, n_blocks, task % n_blocks + 1);

		run_channels(a, b, first, end - first, (float *)workspace + b * a->d_model + first);
	}
	return STATUS_OK;
}

enum status cpu_recurrence_step(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_step_args *a = args;
	struct recurrence_args one = {.batch = a->batch,
	                              .seq_len = 1,
	                              .d_model = a->d_model,
	                              .form = a->form,
	                              .x = a->x,
	                              .gate = a->gate,
	                              .z = a->z,
	                              .gate_bias = a->gate_bias,
	                              .out = a->out};
	int64_t n_blocks = channel_blocks(a->batch, a->d_model);

#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < a->batch * n_blocks; task++) {
		int64_t b = task / n_blocks;
		int64_t first = channel_block_start(a->d_model, n_blocks, task % n_blocks);
		int64_t end = channel_block_start(a->d_model, n_blocks, task % n_blocks + 1);

		advance_channels(&one, b, 0, first, end - first, a->h + b * a->d_model + first);
	}
	return STATUS_OK;
}
