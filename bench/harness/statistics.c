#include "bench/harness/statistics.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RESAMPLES = 1000 };

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double quantile(const double *sorted, int count, double fraction)
{
	double at = fraction * (count - 1);
	int below = (int)at;

	if (below + 1 >= count)
		return sorted[count - 1];
	return sorted[below] + (at - below) * (sorted[below + 1] - sorted[below]);
}

static void sort_into(double *sorted, const double *samples, int count)
{
	memcpy(sorted, samples, (size_t)count * sizeof *sorted);
	qsort(sorted, (size_t)count, sizeof *sorted, compare_doubles);
}

double median_of(const double *samples, int count)
{
	double sorted[MAX_SAMPLES];

	sort_into(sorted, samples, count);
	return quantile(sorted, count, 0.5);
}

/*
 * By how much the error of the median grows where neighbours in time resemble each other. Signs
 * about the median tell the correlation r of neighbours, (2/pi) asin r of normal noise; samples k
 * apart then have r^k, and the variance of the median, a sum of signs, grows by what those add.
 */
static double persistence(const double *samples, int count, double median)
{
	static const double half_pi = 1.57079632679489661923;
	int alike = 0, pairs = 0;
	double variance = 1;

	for (int i = 1; i < count; i++) {
		const double a = samples[i - 1] - median, b = samples[i] - median;

		pairs += a != 0 && b != 0;
		alike += a * b > 0;
	}
	/* A few pairs tell nothing. */
	if (pairs < 8)
		return 1;
	const double r = fmin(fmax(sin(half_pi * (2. * alike / pairs - 1)), 0), 0.95);

	for (int k = 1; k < count; k++)
		variance += 2 * (1 - (double)k / count) * asin(pow(r, k)) / half_pi;
	return sqrt(variance);
}

/* The binomial ranks of the median: n/2 -+ 1.96 sqrt(n)/2, widened. */
static struct interval median_interval(const double *sorted, int count, double widening)
{
	const double reach = 0.98 * sqrt(count) * widening;
	const int low = (int)floor(0.5 * count - reach);
	const int high = (int)ceil(0.5 * count + reach);

	return (struct interval){sorted[low < 0 ? 0 : low],
	                         sorted[high > count - 1 ? count - 1 : high]};
}

struct summary summarize(const double *samples, int count)
{
	double sorted[MAX_SAMPLES];

	sort_into(sorted, samples, count);
	struct summary s = {.count = count,
	                    .minimum = sorted[0],
	                    .p20 = quantile(sorted, count, 0.2),
	                    .median = quantile(sorted, count, 0.5),
	                    .p80 = quantile(sorted, count, 0.8)};

	s.interval = median_interval(sorted, count, persistence(samples, count, s.median));
	return s;
}

double relative_half_width(struct interval interval, double value)
{
	return 0.5 * (interval.high - interval.low) / value;
}

static void divide(double *ratios, const double *baseline, const double *value, int count)
{
	for (int i = 0; i < count; i++)
		ratios[i] = baseline[i] / value[i];
}

struct ratio ratio_quick(const double *baseline, const double *value, int count)
{
	double ratios[MAX_SAMPLES];

	divide(ratios, baseline, value, count);
	const struct summary s = summarize(ratios, count);

	return (struct ratio){count, s.median, s.interval};
}

static uint32_t next_random(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(*state >> 33);
}

struct ratio ratio_bootstrap(const double *baseline, const double *value, int count)
{
	double ratios[MAX_SAMPLES], drawn[MAX_SAMPLES], medians[RESAMPLES];
	const int block = (int)fmax(1, round(cbrt(count) - 1));
	uint64_t state = 1;

	divide(ratios, baseline, value, count);
	for (int i = 0; i < RESAMPLES; i++) {
		for (int j = 0; j < count; j += block) {
			const uint32_t first = next_random(&state) % (uint32_t)count;

			for (int k = 0; k < block && j + k < count; k++)
				drawn[j + k] = ratios[((int)first + k) % count];
		}
		medians[i] = median_of(drawn, count);
	}
	qsort(medians, RESAMPLES, sizeof *medians, compare_doubles);
	return (struct ratio){
	        count,
	        median_of(ratios, count),
	        {quantile(medians, RESAMPLES, 0.025), quantile(medians, RESAMPLES, 0.975)}};
}
