/* Where the reference runs, and its memory there. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"

static const struct reference_device *in_use;

void reference_use(const struct reference_device *device)
{
	in_use = device;
}

const struct reference_device *reference_in_use(void)
{
	return in_use;
}

enum status reference_take(int64_t count, double **memory)
{
	if (in_use)
		return in_use->take(count, memory);
	*memory = malloc((size_t)count * sizeof **memory + 1);
	if (!*memory)
		return status_set(STATUS_OOM, "no memory for %lld doubles of a reference",
		                  (long long)count);
	return STATUS_OK;
}

void reference_release(double *memory)
{
	if (in_use)
		in_use->release(memory);
	else
		free(memory);
}

void reference_get_rows(int64_t width, int64_t n_rows, const int64_t *rows, const double *from,
                        double *to)
{
	if (in_use) {
		in_use->get_rows(width, n_rows, rows, from, to);
		return;
	}
	for (int64_t i = 0; i < n_rows; i++)
		memcpy(to + i * width, from + rows[i] * width, (size_t)width * sizeof *to);
}

/* To nearest, ties to even, with the 8 significant bits of bf16. */
static double round_bf16(double x)
{
	int exponent;
	double fraction = frexp(x, &exponent);

	return isfinite(x) ? ldexp(nearbyint(ldexp(fraction, 8)), exponent - 8) : x;
}

void reference_round(enum dtype dtype, int64_t count, double *x)
{
	if (in_use) {
		in_use->round(dtype, count, x);
		return;
	}
#pragma omp parallel for
	for (int64_t i = 0; i < count; i++)
		x[i] = dtype == DTYPE_BF16 ? round_bf16(x[i]) : (double)(float)x[i];
}
