/*
 * RMSNorm and the projection behind it. The norm's passes are bound by memory: rows are spread over
 * the threads, sums are fp64, and the gradient of norm_weight is summed by each thread over its own
 * rows, then over the threads in their order.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/shares.h"

/* 1 / sqrt(mean(x^2) + eps). */
static float row_rstd(const float *x, int64_t d, float eps)
{
	double sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++)
		sum += (double)x[i] * (double)x[i];
	return (float)(1 / sqrt(sum / (double)d + (double)eps));
}

static void normalize(const struct norm_linear_args *a)
{
	const float *x = a->x;
	float *x_norm = a->x_norm;

#pragma omp parallel for schedule(static) if (a->n_tokens > 1)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		const float *row = x + n * a->d_in;
		float rstd = row_rstd(row, a->d_in, a->eps);

#pragma omp simd
		for (int64_t i = 0; i < a->d_in; i++)
			x_norm[n * a->d_in + i] = row[i] * rstd * a->norm_weight[i];
		if (a->rstd)
			a->rstd[n] = rstd;
	}
}

enum status cpu_norm_linear(struct device *device, const void *args, void *workspace)
{
	const struct norm_linear_args *a = args;

	if (a->norm_weight)
		normalize(a);
	for (int64_t n = 0; a->bias && n < a->n_tokens; n++)
		memcpy((float *)a->y + n * a->d_out, a->bias, (size_t)a->d_out * sizeof(float));
	cpu_matmul(false, true, a->n_tokens, a->d_out, a->d_in, a->x_norm, a->weight,
	           a->bias ? 1.0f : 0.0f, a->y);
	return STATUS_OK;
}

/* dx = dx_norm, plus the residual's gradient where given. */
static void add_residual(const struct norm_linear_backward_args *a)
{
	const float *dx_norm = a->dx_norm, *dresidual = a->dresidual;
	float *dx = a->dx;
	int64_t count = a->forward.n_tokens * a->forward.d_in;

#pragma omp parallel for simd schedule(static)
	for (int64_t i = 0; i < count; i++)
		dx[i] = dresidual ? dx_norm[i] + dresidual[i] : dx_norm[i];
}

/*
 * One row, with xh = x * rstd and g = dx_norm * norm_weight:
 *   dx = rstd * (g - xh * mean(g * xh)) + dresidual,  sums += dx_norm * xh.
 */
static void norm_row_backward(const struct norm_linear_backward_args *a, int64_t n, double *sums)
{
	const float *x = (const float *)a->forward.x + n * a->forward.d_in;
	const float *dx_norm = (const float *)a->dx_norm + n * a->forward.d_in;
	const float *dresidual = a->dresidual;
	float *dx = (float *)a->dx + n * a->forward.d_in;
	float rstd = a->forward.rstd[n];
	double dot = 0;

#pragma omp simd reduction(+ : dot)
	for (int64_t i = 0; i < a->forward.d_in; i++) {
		float dw = dx_norm[i] * x[i] * rstd;

		dot += (double)dw * (double)a->forward.norm_weight[i];
		sums[i] += (double)dw;
	}
	float mean = (float)(dot / (double)a->forward.d_in);
	if (dresidual)
		dresidual += n * a->forward.d_in;
#pragma omp simd
	for (int64_t i = 0; i < a->forward.d_in; i++) {
		float g = dx_norm[i] * a->forward.norm_weight[i];
		float through_norm = rstd * (g - x[i] * rstd * mean);

		dx[i] = dresidual ? through_norm + dresidual[i] : through_norm;
	}
}

static void norm_backward(const struct norm_linear_backward_args *a, double *partial)
{
	int n_parts = 1;

#pragma omp parallel
	{
		double *sums = partial + omp_get_thread_num() * a->forward.d_in;

#pragma omp single
		n_parts = omp_get_num_threads();
		memset(sums, 0, (size_t)a->forward.d_in * sizeof *sums);
#pragma omp for schedule(static)
		for (int64_t n = 0; n < a->forward.n_tokens; n++)
			norm_row_backward(a, n, sums);
	}
	add_shares(partial, n_parts, a->forward.d_in, a->forward.d_in, a->dnorm_weight);
}

size_t cpu_norm_linear_backward_workspace(const struct device *device, const void *args)
{
	const struct norm_linear_backward_args *a = args;

	size_t norm = a->forward.norm_weight ? sum_rows_bytes(a->forward.d_in) : 0;
	size_t bias = a->forward.bias ? sum_rows_bytes(a->forward.d_out) : 0;

	return norm > bias ? norm : bias;
}

enum status cpu_norm_linear_backward(struct device *device, const void *args, void *workspace)
{
	const struct norm_linear_backward_args *a = args;

	cpu_matmul(true, false, a->forward.d_out, a->forward.d_in, a->forward.n_tokens, a->dy,
	           a->forward.x_norm, 0, a->dweight);
	cpu_matmul(false, false, a->forward.n_tokens, a->forward.d_in, a->forward.d_out, a->dy,
	           a->forward.weight, 0, a->dx_norm);
	if (a->forward.bias)
		sum_rows(a->forward.n_tokens, a->forward.d_out, a->dy, workspace, a->dbias);
	if (a->forward.norm_weight)
		norm_backward(a, workspace);
	else
		add_residual(a);
	return STATUS_OK;
}
