/* What a delta rule writes of a token, and the decay of its state; and their gradients. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

enum status cpu_delta_gate(struct device *device, const void *args, void *workspace)
{
	const struct delta_gate_args *a = args;
	int64_t heads = a->n_heads;

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		const float *logit = (const float *)a->logit + n * a->stride;
		const float *decay_logit = (const float *)a->decay_logit;
		float *beta = (float *)a->beta + n * heads;
		float *log_decay = (float *)a->log_decay + n * heads;

#pragma omp simd
		for (int64_t h = 0; h < heads; h++)
			beta[h] = sigmoid_f32(logit[h]);
		/* softplus(x) = -logsigmoid(-x). */
		for (int64_t h = 0; decay_logit && h < heads; h++)
			log_decay[h] =
			        exp_f32(a->log_rate[h]) *
			        log_sigmoid_f32(-decay_logit[n * a->stride + h] - a->bias[h]);
	}
	return STATUS_OK;
}

/* Each thread's share of dbias and dlog_rate. */
size_t cpu_delta_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct delta_gate_backward_args *a = args;

	return 2 * sizeof(double) * (size_t)(a->forward.n_heads * omp_get_max_threads());
}

/* softplus' = sigmoid; log_decay is its own derivative with respect to log_rate. */
static void decay_backward(const struct delta_gate_backward_args *a, int64_t n, double *dbias,
                           double *dlog_rate)
{
	const struct delta_gate_args *f = &a->forward;
	const float *decay_logit = (const float *)f->decay_logit + n * f->stride;
	const float *dlog_decay = (const float *)a->dlog_decay + n * f->n_heads;
	float *ddecay_logit = (float *)a->ddecay_logit + n * f->stride;

	for (int64_t h = 0; h < f->n_heads; h++) {
		float logit = decay_logit[h] + f->bias[h];
		float scaled = exp_f32(f->log_rate[h]) * dlog_decay[h];

		ddecay_logit[h] = -scaled * sigmoid_f32(logit);
		dbias[h] += ddecay_logit[h];
		dlog_rate[h] += scaled * log_sigmoid_f32(-logit);
	}
}

enum status cpu_delta_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct delta_gate_backward_args *a = args;
	const struct delta_gate_args *f = &a->forward;
	int64_t heads = f->n_heads;
	int n_threads = omp_get_max_threads();
	double *partial = workspace;

	memset(partial, 0, sizeof *partial * (size_t)(2 * heads * n_threads));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < f->n_tokens; n++) {
		const float *logit = (const float *)f->logit + n * f->stride;
		const float *dbeta = (const float *)a->dbeta + n * heads;
		float *dlogit = (float *)a->dlogit + n * f->stride;
		double *mine = partial + 2 * heads * omp_get_thread_num();

		for (int64_t h = 0; h < heads; h++)
			dlogit[h] = dbeta[h] * sigmoid_f32(logit[h]) * sigmoid_f32(-logit[h]);
		if (f->decay_logit)
			decay_backward(a, n, mine, mine + heads);
	}
	if (!f->decay_logit)
		return STATUS_OK;
	add_shares(partial, n_threads, 2 * heads, heads, a->dbias);
	add_shares(partial + heads, n_threads, 2 * heads, heads, a->dlog_rate);
	return STATUS_OK;
}
