/* Mamba-2's discretization: a time step per head and token, the decay and the input it makes. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* log(1 + e^x). */
static float softplus_f32(float x)
{
	return -log_sigmoid_f32(-x);
}

enum status cpu_time_step(struct device *device, const void *args, void *workspace)
{
	const struct time_step_args *a = args;
	int64_t d = a->d_head;

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++)
		for (int64_t h = 0; h < a->n_heads; h++) {
			int64_t row = n * a->n_heads + h;
			const float *x = (const float *)a->x + n * a->x_stride + h * d;
			float *out = (float *)a->out + row * d;
			float dt = softplus_f32(((const float *)a->logit)[n * a->logit_stride + h] +
			                        a->bias[h]);

			((float *)a->log_decay)[row] = -expf(a->log_rate[h]) * dt;
#pragma omp simd
			for (int64_t i = 0; i < d; i++)
				out[i] = dt * x[i];
		}
	return STATUS_OK;
}

/* Each thread's share of dbias and dlog_rate. */
size_t cpu_time_step_backward_workspace(const struct device *device, const void *args)
{
	const struct time_step_backward_args *a = args;

	return 2 * sizeof(double) * (size_t)(a->forward.n_heads * omp_get_max_threads());
}

/* d(dt) = dout.x - exp(log_rate) dlog_decay; softplus' = sigmoid; log_decay is its own derivative
 * with respect to log_rate. */
static void head_backward(const struct time_step_backward_args *a, int64_t n, int64_t h,
                          double *dbias, double *dlog_rate)
{
	const struct time_step_args *f = &a->forward;
	int64_t d = f->d_head, row = n * f->n_heads + h;
	const float *x = (const float *)f->x + n * f->x_stride + h * d;
	const float *dout = (const float *)a->dout + row * d;
	const float *dskip = a->dskip ? (const float *)a->dskip + row * d : NULL;
	float *dx = (float *)a->dx + row * d;
	float logit = ((const float *)f->logit)[n * f->logit_stride + h] + f->bias[h];
	float dt = softplus_f32(logit), rate = expf(f->log_rate[h]), ddt = 0;
	float dlog_decay = ((const float *)a->dlog_decay)[row];

#pragma omp simd reduction(+ : ddt)
	for (int64_t i = 0; i < d; i++) {
		ddt += dout[i] * x[i];
		dx[i] = dt * dout[i] + (dskip ? dskip[i] : 0.0f);
	}
	float dlogit = (ddt - rate * dlog_decay) * sigmoid_f32(logit);

	((float *)a->dlogit)[n * f->logit_stride + h] = dlogit;
	dbias[h] += dlogit;
	dlog_rate[h] -= dlog_decay * rate * dt;
}

enum status cpu_time_step_backward(struct device *device, const void *args, void *workspace)
{
	const struct time_step_backward_args *a = args;
	int64_t heads = a->forward.n_heads;
	int n_threads = omp_get_max_threads();
	double *partial = workspace;

	memset(partial, 0, sizeof *partial * (size_t)(2 * heads * n_threads));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < a->forward.n_tokens; n++) {
		double *mine = partial + 2 * heads * omp_get_thread_num();

		for (int64_t h = 0; h < heads; h++)
			head_backward(a, n, h, mine, mine + heads);
	}
	add_shares(partial, n_threads, 2 * heads, heads, a->dbias);
	add_shares(partial + heads, n_threads, 2 * heads, heads, a->dlog_rate);
	return STATUS_OK;
}
