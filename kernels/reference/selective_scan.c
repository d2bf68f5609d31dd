/* fp64 selective scan: of each channel one number of its state after another. */
#include "kernels/reference/shared.h"

#include <omp.h>

static double rate_of(const struct selective_scan_args *a, int64_t i, int64_t n)
{
	return exp(wide(a->log_rate)[i * a->state + n]);
}

/* Element (b, n, i) of [B, N, channels]. */
static int64_t state_index(const struct selective_scan_args *a, int64_t b, int64_t n, int64_t i)
{
	return (b * a->state + n) * a->channels + i;
}

static double gate_of(const struct view *z, int64_t b, int64_t t, int64_t i)
{
	return z->data ? silu(at(z, b, t, 0)[i]) : 1;
}

/* Number n of a channel's state: h [T + 1], the first before all tokens, and decay [T], which may
 * be NULL. */
static void run_state(const struct selective_scan_args *a, int64_t b, int64_t i, int64_t n,
                      double *h, double *decay)
{
	const double rate = rate_of(a, i, n);

	h[0] = a->h0 ? wide(a->h0)[state_index(a, b, n, i)] : 0;
	for (int64_t t = 0; t < a->seq_len; t++) {
		const double dt = at(&a->dt, b, t, 0)[i], keep = exp(-rate * dt);

		h[t + 1] = keep * h[t] + dt * at(&a->u, b, t, 0)[i] * at(&a->b, b, t, 0)[n];
		if (decay)
			decay[t] = keep;
	}
}

/* y [T] of a channel; h is scratch [T + 1]. Stores what is wanted of the states. */
static void run_channel(const struct selective_scan_args *a, int64_t b, int64_t i, double *h,
                        double *y)
{
	const int64_t n_borders = (a->seq_len + SCAN_CHUNK - 1) / SCAN_CHUNK;

	for (int64_t t = 0; t < a->seq_len; t++)
		y[t] = a->skip ? wide(a->skip)[i] * at(&a->u, b, t, 0)[i] : 0;
	for (int64_t n = 0; n < a->state; n++) {
		run_state(a, b, i, n, h, NULL);
		for (int64_t t = 0; t < a->seq_len; t++)
			y[t] += at(&a->c, b, t, 0)[n] * h[t + 1];
		for (int64_t j = 0; a->borders && j < n_borders; j++)
			wide_out(a->borders)[((b * n_borders + j) * a->state + n) * a->channels +
			                     i] = h[j * SCAN_CHUNK];
		if (a->h_final)
			wide_out(a->h_final)[state_index(a, b, n, i)] = h[a->seq_len];
	}
}

enum status reference_selective_scan(struct device *device, const void *args, void *workspace)
{
	const struct selective_scan_args *a = args;
	const int64_t each = 2 * a->seq_len + 1;
	double *memory = take_doubles(omp_get_max_threads() * each);

	if (!memory)
		return STATUS_OOM;
#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t i = 0; i < a->channels; i++) {
			double *h = memory + omp_get_thread_num() * each, *y = h + a->seq_len + 1;

			run_channel(a, b, i, h, y);
			for (int64_t t = 0; t < a->seq_len; t++)
				at(&a->out, b, t, 0)[i] = y[t] * gate_of(&a->z, b, t, i);
		}
	free(memory);
	return STATUS_OK;
}

/* The gradient of y. */
static double dy_of(const struct selective_scan_backward_args *x, int64_t b, int64_t t, int64_t i)
{
	return at(&x->dout, b, t, 0)[i] * gate_of(&x->forward.z, b, t, i);
}

/* lambda [T], the gradients of number n of a channel's states; returns that of the first. */
static double run_lambda(const struct selective_scan_backward_args *x, int64_t b, int64_t i,
                         int64_t n, const double *decay, double *lambda)
{
	const struct selective_scan_args *a = &x->forward;
	double carry = 0;

	for (int64_t t = a->seq_len - 1; t >= 0; t--) {
		lambda[t] = at(&a->c, b, t, 0)[n] * dy_of(x, b, t, i) + carry;
		carry = decay[t] * lambda[t];
	}
	return carry;
}

/* What number n of the state adds to the gradients of its channel. Returns the sum of dlog_rate. */
static double channel_gradient(const struct selective_scan_backward_args *x, int64_t b, int64_t i,
                               int64_t n, const double *h, const double *decay,
                               const double *lambda)
{
	const struct selective_scan_args *a = &x->forward;
	const double rate = rate_of(a, i, n);
	double sum = 0;

	for (int64_t t = 0; t < a->seq_len; t++) {
		const double dt = at(&a->dt, b, t, 0)[i], in = at(&a->b, b, t, 0)[n];
		const double kept = lambda[t] * decay[t] * h[t];

		at(&x->du, b, t, 0)[i] += dt * lambda[t] * in;
		at(&x->ddt, b, t, 0)[i] += lambda[t] * at(&a->u, b, t, 0)[i] * in - rate * kept;
		sum -= rate * dt * kept;
	}
	return sum;
}

/* All gradients of channel i but dB and dC; memory is scratch of 4 T + 1. */
static void channel_backward(const struct selective_scan_backward_args *x, int64_t i,
                             double *memory)
{
	const struct selective_scan_args *a = &x->forward;
	double *h = memory, *decay = h + a->seq_len + 1, *lambda = decay + a->seq_len;
	double *y = lambda + a->seq_len, dskip = 0;
	struct selective_scan_args forward = *a;

	forward.borders = forward.h_final = NULL;
	zero(a->state, wide_out(x->dlog_rate) + i * a->state);
	for (int64_t b = 0; b < a->batch; b++) {
		run_channel(&forward, b, i, h, y);
		for (int64_t t = 0; t < a->seq_len; t++) {
			const double dy = dy_of(x, b, t, i), dout = at(&x->dout, b, t, 0)[i];

			if (a->z.data)
				at(&x->dz, b, t, 0)[i] =
				        dout * y[t] * silu_derivative(at(&a->z, b, t, 0)[i]);
			at(&x->du, b, t, 0)[i] = a->skip ? wide(a->skip)[i] * dy : 0;
			at(&x->ddt, b, t, 0)[i] = 0;
			dskip += dy * at(&a->u, b, t, 0)[i];
		}
		for (int64_t n = 0; n < a->state; n++) {
			run_state(a, b, i, n, h, decay);
			const double dh0 = run_lambda(x, b, i, n, decay, lambda);

			if (x->dh0)
				wide_out(x->dh0)[state_index(a, b, n, i)] = dh0;
			wide_out(x->dlog_rate)[i * a->state + n] +=
			        channel_gradient(x, b, i, n, h, decay, lambda);
		}
	}
	if (a->skip)
		wide_out(x->dskip)[i] = dskip;
}

/* dB and dC of number n of all states of a sequence; memory is scratch of 3 T + 1. */
static void shared_backward(const struct selective_scan_backward_args *x, int64_t b, int64_t n,
                            double *memory)
{
	const struct selective_scan_args *a = &x->forward;
	double *h = memory, *decay = h + a->seq_len + 1, *lambda = decay + a->seq_len;

	for (int64_t t = 0; t < a->seq_len; t++)
		at(&x->db, b, t, 0)[n] = at(&x->dc, b, t, 0)[n] = 0;
	for (int64_t i = 0; i < a->channels; i++) {
		run_state(a, b, i, n, h, decay);
		run_lambda(x, b, i, n, decay, lambda);
		for (int64_t t = 0; t < a->seq_len; t++) {
			at(&x->db, b, t, 0)[n] +=
			        at(&a->dt, b, t, 0)[i] * at(&a->u, b, t, 0)[i] * lambda[t];
			at(&x->dc, b, t, 0)[n] += dy_of(x, b, t, i) * h[t + 1];
		}
	}
}

enum status reference_selective_scan_backward(struct device *device, const void *args,
                                              void *workspace)
{
	const struct selective_scan_backward_args *x = args;
	const struct selective_scan_args *a = &x->forward;
	const int64_t each = 4 * a->seq_len + 1;
	double *memory = take_doubles(omp_get_max_threads() * each);

	if (!memory)
		return STATUS_OOM;
#pragma omp parallel for
	for (int64_t i = 0; i < a->channels; i++)
		channel_backward(x, i, memory + omp_get_thread_num() * each);
#pragma omp parallel for
	for (int64_t j = 0; j < a->batch * a->state; j++)
		shared_backward(x, j / a->state, j % a->state,
		                memory + omp_get_thread_num() * each);
	free(memory);
	return STATUS_OK;
}

enum status reference_selective_scan_step(struct device *device, const void *args, void *workspace)
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

	return reference_selective_scan(device, &token, workspace);
}
