/* Rows of a table, and the sum of their gradients. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"

enum { COLUMN_BLOCK = 32 };

enum status cpu_embedding(struct device *device, const void *args, void *workspace)
{
	const struct embedding_args *a = args;
	const float *table = a->table;
	float *y = a->y;

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++)
		memcpy(y + n * a->d_model, table + a->tokens[n] * a->d_model,
		       (size_t)a->d_model * sizeof *y);
	return STATUS_OK;
}

/* Columns `first` to `last` of the table's gradient, tokens in their order. */
static void sum_columns(const struct embedding_backward_args *a, int64_t first, int64_t last)
{
	const float *dy = a->dy;

	for (int64_t row = 0; row < a->vocab; row++)
		memset(a->dtable + row * a->d_model + first, 0,
		       (size_t)(last - first) * sizeof *a->dtable);
	for (int64_t n = 0; n < a->n_tokens; n++) {
		float *sum = a->dtable + a->tokens[n] * a->d_model;

#pragma omp simd
		for (int64_t i = first; i < last; i++)
			sum[i] += dy[n * a->d_model + i];
	}
}

/* Each thread owns columns, so that tokens that repeat neither race nor change the result. */
enum status cpu_embedding_backward(struct device *device, const void *args, void *workspace)
{
	const struct embedding_backward_args *a = args;
	int64_t n_blocks = (a->d_model + COLUMN_BLOCK - 1) / COLUMN_BLOCK;

#pragma omp parallel
	{
		int64_t thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
		int64_t first = n_blocks * thread / n_threads * COLUMN_BLOCK;
		int64_t last = n_blocks * (thread + 1) / n_threads * COLUMN_BLOCK;

		last = last < a->d_model ? last : a->d_model;
		if (first < last)
			sum_columns(a, first, last);
	}
	return STATUS_OK;
}
