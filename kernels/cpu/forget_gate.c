/*
 * HGRN's forget gate, f = b + (1-b) sigmoid(logit) with b = sigmoid(bound), and what it leaves for
 * the input, 1-f = sigmoid(-bound) sigmoid(-logit), which never cancels. ln f comes from whichever
 * of the two is the smaller.
 */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* b and 1-b, [width] each, computed once. */
struct bounds {
	float *low, *rest;
};

static struct bounds fill_bounds(const struct forget_gate_args *a, void *workspace)
{
	struct bounds b = {workspace, (float *)workspace + a->width};

	for (int64_t i = 0; i < a->width; i++) {
		b.low[i] = sigmoid_f32(a->bound[i]);
		b.rest[i] = sigmoid_f32(-a->bound[i]);
	}
	return b;
}

static size_t bounds_bytes(const struct forget_gate_args *a)
{
	return 2 * sizeof(float) * (size_t)a->width;
}

size_t cpu_forget_gate_workspace(const struct device *device, const void *args)
{
	return bounds_bytes(args);
}

static void token_forward(const struct forget_gate_args *a, const struct bounds *b, int64_t n)
{
	const float *logit = (const float *)a->logit + n * a->stride;
	const float *x = (const float *)a->x + n * a->stride;
	float *log_decay = (float *)a->log_decay + n * a->width,
	      *out = (float *)a->out + n * a->width;
	float *key = a->key ? (float *)a->key + n * a->width : NULL;

#pragma omp simd
	for (int64_t i = 0; i < a->width; i++) {
		float closed = sigmoid_f32(-logit[i]), input = b->rest[i] * closed;
		float f = sigmoid_f32(logit[i]) + b->low[i] * closed;

		log_decay[i] = input < 0.5f ? log1p_f32(-input) : log_f32(f);
		out[i] = x[i] * sigmoid_f32(x[i]) * (key ? 1.0f : input);
	}
	if (key)
#pragma omp simd
		for (int64_t i = 0; i < a->width; i++)
			key[i] = b->rest[i] * sigmoid_f32(-logit[i]);
}

enum status cpu_forget_gate(struct device *device, const void *args, void *workspace)
{
	const struct forget_gate_args *a = args;
	const struct bounds b = fill_bounds(a, workspace);

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++)
		token_forward(a, &b, n);
	return STATUS_OK;
}

/* The bounds, then each thread's share of dbound. */
size_t cpu_forget_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct forget_gate_backward_args *a = args;

	return bounds_bytes(&a->forward) +
	       sizeof(double) * (size_t)(a->forward.width * omp_get_max_threads());
}

/*
 * With s = sigmoid(logit): df = dlog_decay / f - d(1-f); df/dlogit = (1-b) s (1-s), in which s/f
 * stays below 1 where f is tiny; df/db = 1-s, db/dbound = b (1-b).
 */
static void token_backward(const struct forget_gate_backward_args *a, const struct bounds *b,
                           int64_t n, double *dbound)
{
	const struct forget_gate_args *f = &a->forward;
	int64_t row = n * f->stride, packed = n * f->width;
	const float *logit = (const float *)f->logit + row, *x = (const float *)f->x + row;
	const float *dlog_decay = (const float *)a->dlog_decay + packed;
	const float *dout = (const float *)a->dout + packed;
	const float *dkey = f->key ? (const float *)a->dkey + packed : NULL;
	float *dlogit = (float *)a->dlogit + row, *dx = (float *)a->dx + row;

#pragma omp simd
	for (int64_t i = 0; i < f->width; i++) {
		float open = sigmoid_f32(logit[i]), closed = sigmoid_f32(-logit[i]);
		float forget = open + b->low[i] * closed, sigma = sigmoid_f32(x[i]);
		float dinput = dkey ? dkey[i] : dout[i] * x[i] * sigma;
		float df = dlog_decay[i] / forget - dinput;

		dlogit[i] = b->rest[i] * closed * (dlog_decay[i] * (open / forget) - dinput * open);
		dx[i] = dout[i] * (dkey ? 1.0f : b->rest[i] * closed) * sigma *
		        (1.0f + x[i] * (1.0f - sigma));
		dbound[i] += df * closed * b->low[i] * b->rest[i];
	}
}

enum status cpu_forget_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct forget_gate_backward_args *a = args;
	const struct forget_gate_args *f = &a->forward;
	const struct bounds b = fill_bounds(f, workspace);
	double *partial = (double *)(b.rest + f->width);
	int n_threads = omp_get_max_threads();

	memset(partial, 0, sizeof *partial * (size_t)(f->width * n_threads));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < f->n_tokens; n++)
		token_backward(a, &b, n, partial + f->width * omp_get_thread_num());
	add_shares(partial, n_threads, f->width, f->width, a->dbound);
	return STATUS_OK;
}
