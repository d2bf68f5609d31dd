/* GLA's and KDA's output stage: RMSNorm of each head, times a curve of the output gate; and its
 * gradients. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

static float head_rstd(int64_t d, float eps, const float *x)
{
	return 1.0f / sqrtf(dot_f32(d, x, x) / (float)d + eps);
}

/* The curve of `gate` is gate * sigmoid(gate) or, with `flat` 1, sigmoid(gate). */
static float curve_of(float flat, float gate)
{
	return (flat + (1.0f - flat) * gate) * sigmoid_f32(gate);
}

static float flatness(enum curve curve)
{
	return curve == CURVE_SIGMOID ? 1.0f : 0.0f;
}

enum status cpu_norm_gate(struct device *device, const void *args, void *workspace)
{
	const struct norm_gate_args *a = args;
	int64_t d = a->d_head;
	float flat = flatness(a->curve);

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		for (int64_t h = 0; h < a->n_heads; h++) {
			const float *x = (const float *)a->x + (n * a->n_heads + h) * d;
			const float *gate = (const float *)a->gate + n * a->gate_stride + h * d;
			float *out = (float *)a->out + (n * a->n_heads + h) * d;
			float rstd = head_rstd(d, a->eps, x);

			if (a->rstd)
				a->rstd[n * a->n_heads + h] = rstd;
#pragma omp simd
			for (int64_t i = 0; i < d; i++)
				out[i] = x[i] * rstd * a->weight[i] * curve_of(flat, gate[i]);
		}
	}
	return STATUS_OK;
}

/* One double [d] of dweight per thread. */
size_t cpu_norm_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct norm_gate_backward_args *a = args;

	return sizeof(double) * (size_t)(omp_get_max_threads() * a->forward.d_head);
}

/*
 * With n = x rstd w and s = silu(gate) = gate sigma, out = n s: dgate = dout n s'(gate),
 * s' = sigma (1 + gate (1 - sigma)), or with s = sigma, s' = sigma (1 - sigma); dweight += dout s x
 * rstd; and dx through the norm.
 */
static void head_backward(const struct norm_gate_backward_args *a, int64_t n, int64_t h,
                          double *dweight)
{
	const struct norm_gate_args *f = &a->forward;
	int64_t d = f->d_head, row = n * f->n_heads + h;
	const float *x = (const float *)f->x + row * d, *dout = (const float *)a->dout + row * d;
	const float *gate = (const float *)f->gate + n * f->gate_stride + h * d;
	float *dx = (float *)a->dx + row * d;
	float *dgate = (float *)a->dgate + n * f->gate_stride + h * d;
	float rstd = f->rstd[row], projection = 0, flat = flatness(f->curve);

#pragma omp simd reduction(+ : projection)
	for (int64_t i = 0; i < d; i++) {
		float g = gate[i], sigma = sigmoid_f32(g), x_hat = x[i] * rstd;
		float factor = flat + (1.0f - flat) * g, dnorm = dout[i] * factor * sigma;

		dgate[i] = dout[i] * x_hat * f->weight[i] * sigma *
		           (1.0f - flat + factor * (1.0f - sigma));
		dweight[i] += dnorm * x_hat;
		dx[i] = dnorm * f->weight[i];
		projection += dnorm * f->weight[i] * x_hat;
	}
	projection /= (float)d;
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		dx[i] = rstd * (dx[i] - x[i] * rstd * projection);
}

enum status cpu_norm_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct norm_gate_backward_args *a = args;
	const struct norm_gate_args *f = &a->forward;
	int64_t d = f->d_head;
	int n_threads = omp_get_max_threads();
	double *partial = workspace;

	memset(partial, 0, sizeof *partial * (size_t)(n_threads * d));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < f->n_tokens; n++)
		for (int64_t h = 0; h < f->n_heads; h++)
			head_backward(a, n, h, partial + omp_get_thread_num() * d);
	add_shares(partial, n_threads, d, d, a->dweight);
	return STATUS_OK;
}
