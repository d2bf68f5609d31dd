/* A projection and the residual around it. */
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/shares.h"

/* By rows on all threads: a plain memcpy would leave half of the bandwidth unused. */
static void copy_rows(float *to, const float *from, int64_t rows, int64_t width)
{
#pragma omp parallel for schedule(static) if (rows > 1)
	for (int64_t n = 0; n < rows; n++)
		memcpy(to + n * width, from + n * width, (size_t)width * sizeof *to);
}

/* y = bias, plus the residual where given. */
static void add_bias(const struct linear_residual_args *a)
{
	const float *residual = a->residual;
	float *y = a->y;

#pragma omp parallel for schedule(static) if (a->n_tokens > 1)
	for (int64_t n = 0; n < a->n_tokens; n++)
#pragma omp simd
		for (int64_t i = 0; i < a->d_out; i++)
			y[n * a->d_out + i] =
			        a->bias[i] + (residual ? residual[n * a->d_out + i] : 0.0f);
}

enum status cpu_linear_residual(struct device *device, const void *args, void *workspace)
{
	const struct linear_residual_args *a = args;

	if (a->bias)
		add_bias(a);
	else if (a->residual && a->residual != a->y)
		copy_rows(a->y, a->residual, a->n_tokens, a->d_out);
	cpu_matmul(false, true, a->n_tokens, a->d_out, a->d_in, a->x, a->weight,
	           a->residual || a->bias ? 1.0f : 0.0f, a->y);
	return STATUS_OK;
}

size_t cpu_linear_residual_backward_workspace(const struct device *device, const void *args)
{
	const struct linear_residual_backward_args *a = args;

	return a->dbias ? sum_rows_bytes(a->d_out) : 0;
}

enum status cpu_linear_residual_backward(struct device *device, const void *args, void *workspace)
{
	const struct linear_residual_backward_args *a = args;

	cpu_matmul(true, false, a->d_out, a->d_in, a->n_tokens, a->dy, a->x, 0, a->dweight);
	cpu_matmul(false, false, a->n_tokens, a->d_in, a->d_out, a->dy, a->weight, 0, a->dx);
	if (a->dbias)
		sum_rows(a->n_tokens, a->d_out, a->dy, workspace, a->dbias);
	return STATUS_OK;
}
