/*
 * The selective scan, forward and one step. Channels are independent: a task takes a sequence and
 * a block of channels through all of T, its state [N, SCAN_CHANNELS] in the first-level cache and
 * vectors across channels, which all multiply with the same B and C. Limit: N exponentials a token
 * and channel.
 */
#include "kernels/cpu/selective_scan.h"

#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"

void scan_rates(const struct selective_scan_args *a, int64_t first, int64_t count, float *rate)
{
	for (int64_t n = 0; n < a->state; n++)
		for (int64_t i = 0; i < count; i++)
			rate[n * SCAN_CHANNELS + i] =
			        -expf(a->log_rate[(first + i) * a->state + n]);
}

/* Copies `count` channels of a state [N, from_width] to rows to_width apart; from NULL: zeros. */
static void copy_state(int64_t state, int64_t count, const float *from, int64_t from_width,
                       float *to, int64_t to_width)
{
	for (int64_t n = 0; n < state; n++)
		if (from)
			memcpy(to + n * to_width, from + n * from_width,
			       sizeof *to * (size_t)count);
		else
			memset(to + n * to_width, 0, sizeof *to * (size_t)count);
}

/* One token of `count` channels; rows of h are SCAN_CHANNELS apart. */
static void advance(int64_t state, int64_t count, const float *u, const float *dt, const float *b,
                    const float *c, const float *rate, const float *skip, float *h, float *y)
{
	for (int64_t i = 0; i < count; i++)
		y[i] = skip ? skip[i] * u[i] : 0.0f;
	for (int64_t n = 0; n < state; n++) {
		const float *r = rate + n * SCAN_CHANNELS, in = b[n], out = c[n];
		float *row = h + n * SCAN_CHANNELS;

#pragma omp simd
		for (int64_t i = 0; i < count; i++) {
			row[i] = exp_f32(r[i] * dt[i]) * row[i] + dt[i] * u[i] * in;
			y[i] += out * row[i];
		}
	}
}

/* out = y silu(z); z NULL: out = y. */
static void store_output(int64_t count, const float *y, const float *z, float *out)
{
	if (!z) {
		memcpy(out, y, sizeof *out * (size_t)count);
		return;
	}
#pragma omp simd
	for (int64_t i = 0; i < count; i++)
		out[i] = y[i] * silu_f32(z[i]);
}

/* Sequence b, `count` channels from `first` on; rate and h are scratch [N, SCAN_CHANNELS]. */
static void run_block(const struct selective_scan_args *a, int64_t b, int64_t first, int64_t count,
                      float *rate, float *h)
{
	const int64_t states = a->state * a->channels;
	float y[SCAN_CHANNELS];

	scan_rates(a, first, count, rate);
	copy_state(a->state, count, a->h0 ? a->h0 + b * states + first : NULL, a->channels, h,
	           SCAN_CHANNELS);
	for (int64_t t = 0; t < a->seq_len; t++) {
		if (a->borders && t % SCAN_CHUNK == 0)
			copy_state(a->state, count, h, SCAN_CHANNELS,
			           scan_border(a, b, t / SCAN_CHUNK) + first, a->channels);
		advance(a->state, count, view_at(&a->u, b, t, 0) + first,
		        view_at(&a->dt, b, t, 0) + first, view_at(&a->b, b, t, 0),
		        view_at(&a->c, b, t, 0), rate, a->skip ? a->skip + first : NULL, h, y);
		store_output(count, y, a->z.data ? view_at(&a->z, b, t, 0) + first : NULL,
		             view_at(&a->out, b, t, 0) + first);
	}
	if (a->h_final)
		copy_state(a->state, count, h, SCAN_CHANNELS, a->h_final + b * states + first,
		           a->channels);
}

/* Of each thread: rates and state of a block. */
static size_t block_bytes(int64_t state)
{
	return 2 * sizeof(float) * SCAN_CHANNELS * (size_t)state;
}

size_t cpu_selective_scan_workspace(const struct device *device, const void *args)
{
	const struct selective_scan_args *a = args;

	return block_bytes(a->state) * (size_t)omp_get_max_threads();
}

enum status cpu_selective_scan(struct device *device, const void *args, void *workspace)
{
	const struct selective_scan_args *a = args;
	const int64_t blocks = scan_blocks(a);

#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < a->batch * blocks; task++) {
		const int64_t first = task % blocks * SCAN_CHANNELS;
		float *rate =
		        (float *)workspace + 2 * SCAN_CHANNELS * a->state * omp_get_thread_num();

		run_block(a, task / blocks, first, scan_block_size(a, first), rate,
		          rate + SCAN_CHANNELS * a->state);
	}
	return STATUS_OK;
}

size_t cpu_selective_scan_step_workspace(const struct device *device, const void *args)
{
	const struct selective_scan_step_args *a = args;

	return block_bytes(a->state) * (size_t)omp_get_max_threads();
}

enum status cpu_selective_scan_step(struct device *device, const void *args, void *workspace)
{
	const struct selective_scan_step_args *a = args;
	const struct selective_scan_args token = {
	        .batch = a->batch,
	        .seq_len = 1,
	        .channels = a->channels,
	        .state = a->state,
	        .u = a->u,
	        .dt = a->dt,
	        .z = a->z,
	        .b = a->b,
	        .c = a->c,
	        .log_rate = a->log_rate,
	        .skip = a->skip,
	        .h0 = a->h,
	        .out = a->out,
	        .h_final = a->h,
	};

	return cpu_selective_scan(device, &token, workspace);
}
