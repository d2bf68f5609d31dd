/* Order statistics of samples, and when to stop taking them. */
#ifndef BENCH_HARNESS_STATISTICS_H
#define BENCH_HARNESS_STATISTICS_H

#include <stdbool.h>

struct summary {
	int count;
	double minimum, p20, median, p80;
	/* Standard error of the median, estimated from the quartiles, relative to the median. */
	double relative_error;
};

/* Sorts samples[count] (count >= 1) and summarizes them. Quantiles are interpolated. */
struct summary summarize(double *samples, int count);

/* When sampling may end. Times in seconds. */
struct stopping_rule {
	int samples;     /* exactly so many; 0: by the rest of the rule */
	double min_time; /* of the samples together */
	double max_time; /* of sampling, what lies between the samples included */
	double noise;    /* relative standard error of the median to reach */
};

/* Least number of samples, whatever they cost, and least number for the noise to be judged. */
enum { MIN_SAMPLES = 3, MIN_NOISE_SAMPLES = 7, MAX_SAMPLES = 2000 };

/* Whether samples[count] (milliseconds; reordered), which took `elapsed` seconds, suffice. */
bool samples_suffice(const struct stopping_rule *rule, double *samples, int count, double elapsed);

#endif
