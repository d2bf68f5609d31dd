#include "bench/harness/statistics.h"

#include <math.h>
#include <stdlib.h>

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

struct summary summarize(double *samples, int count)
{
	qsort(samples, (size_t)count, sizeof *samples, compare_doubles);
	struct summary s = {.count = count,
	                    .minimum = samples[0],
	                    .p20 = quantile(samples, count, 0.2),
	                    .median = quantile(samples, count, 0.5),
	                    .p80 = quantile(samples, count, 0.8)};
	/* For normal noise: sigma = (q3 - q1) / 1.349, error of the median 1.2533 sigma / sqrt(n).
	 * Quartiles, because a single hiccup must not keep the sampling going. */
	double spread = quantile(samples, count, 0.75) - quantile(samples, count, 0.25);

	s.relative_error = 1.2533 * spread / (1.349 * sqrt(count) * s.median);
	return s;
}

bool samples_suffice(const struct stopping_rule *rule, double *samples, int count, double elapsed)
{
	double seconds = 0;

	if (rule->samples > 0)
		return count >= rule->samples;
	if (count < MIN_SAMPLES)
		return false;
	if (count == MAX_SAMPLES || elapsed >= rule->max_time)
		return true;
	for (int i = 0; i < count; i++)
		seconds += 1e-3 * samples[i];
	return seconds >= rule->min_time && count >= MIN_NOISE_SAMPLES &&
	       summarize(samples, count).relative_error <= rule->noise;
}
