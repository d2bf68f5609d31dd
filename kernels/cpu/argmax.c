/* Greedy choice of the next token. */
#include <math.h>

#include "kernels/cpu/kernels_cpu.h"

/* The lowest index of the largest element; a row that has a NaN gives the first NaN's. */
static int32_t row_argmax(const float *x, int64_t count)
{
	float max = -INFINITY;
	int has_nan = 0;
	int64_t i = 0;

#pragma omp simd reduction(max : max) reduction(| : has_nan)
	for (int64_t j = 0; j < count; j++) {
		max = x[j] > max ? x[j] : max;
		has_nan |= x[j] != x[j];
	}
	while (has_nan ? !isnan(x[i]) : x[i] != max)
		i++;
	return (int32_t)i;
}

enum status cpu_argmax(struct device *device, const void *args, void *workspace)
{
	const struct argmax_args *a = args;
	const float *logits = a->logits;

#pragma omp parallel for schedule(static) if (a->n_tokens > 1)
	for (int64_t n = 0; n < a->n_tokens; n++)
		a->tokens[n] = row_argmax(logits + n * a->vocab, a->vocab);
	if (a->position)
		++*a->position;
	return STATUS_OK;
}
