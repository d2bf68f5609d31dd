/* The loss of a language model and its gradient, in place of the logits. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/vector_math.h"

/* Exponentials summed in fp32 before they join the fp64 sum. */
enum { SUM_BLOCK = 512 };

static float row_max(const float *x, int64_t count)
{
	float max = -INFINITY;

#pragma omp simd reduction(max : max)
	for (int64_t i = 0; i < count; i++)
		max = x[i] > max ? x[i] : max;
	return max;
}

/* sum e^(x - max). */
static double sum_exponentials(const float *x, int64_t count, float max)
{
	double sum = 0;

	for (int64_t first = 0; first < count; first += SUM_BLOCK) {
		int64_t last = first + SUM_BLOCK < count ? first + SUM_BLOCK : count;
		float block = 0;

#pragma omp simd reduction(+ : block)
		for (int64_t i = first; i < last; i++)
			block += exp_f32(x[i] - max);
		sum += (double)block;
	}
	return sum;
}

/* x becomes scale * e^(x - max). */
static void scale_exponentials(float *x, int64_t count, float max, float scale)
{
#pragma omp simd
	for (int64_t i = 0; i < count; i++)
		x[i] = scale * exp_f32(x[i] - max);
}

/* A row's loss; its logits become softmax - one_hot(target) over n_valid if the gradient is wanted.
 */
static float row_loss(const struct cross_entropy_args *a, int64_t n, double n_valid)
{
	float *x = (float *)a->logits + n * a->vocab;
	int32_t target = a->targets[n];
	float max = row_max(x, a->vocab), chosen = x[target];
	double sum = sum_exponentials(x, a->vocab, max);

	if (a->want_gradient) {
		scale_exponentials(x, a->vocab, max, (float)(1 / (sum * n_valid)));
		x[target] = (float)((exp((double)chosen - (double)max) / sum - 1) / n_valid);
	}
	return (float)(log(sum) + (double)max - (double)chosen);
}

static void clear_row(const struct cross_entropy_args *a, int64_t n)
{
	memset((float *)a->logits + n * a->vocab, 0, (size_t)a->vocab * sizeof(float));
}

/* Where no target is valid the mean is 0/0, NaN, and the gradient zero. */
enum status cpu_cross_entropy(struct device *device, const void *args, void *workspace)
{
	const struct cross_entropy_args *a = args;
	int64_t n_valid = 0;
	double sum = 0;

	for (int64_t n = 0; n < a->n_tokens; n++)
		n_valid += a->targets[n] >= 0;
#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		a->losses[n] = a->targets[n] >= 0 ? row_loss(a, n, (double)n_valid) : 0;
		if (a->targets[n] < 0 && a->want_gradient)
			clear_row(a, n);
	}
	for (int64_t n = 0; n < a->n_tokens; n++)
		sum += (double)a->losses[n];
	*a->loss = (float)(sum / (double)n_valid);
	return STATUS_OK;
}
