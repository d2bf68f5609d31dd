/* Order statistics of samples, their intervals, and ratios of samples taken side by side. */
#ifndef BENCH_HARNESS_STATISTICS_H
#define BENCH_HARNESS_STATISTICS_H

enum { MAX_SAMPLES = 2000 };

struct interval {
	double low, high;
};

struct summary {
	int count;
	double minimum, p20, median, p80;
	struct interval interval; /* 95%, of the median */
};

/*
 * Summarizes samples[count], 1 <= count <= MAX_SAMPLES, in the order in which they were taken.
 * Quantiles are interpolated. The interval has order statistics for its ends (the binomial ranks of
 * the median), so it needs no normal noise: two clock levels are as good. It is wider where
 * neighbours in time resemble each other. It says how well this process knows its own median;
 * how far two processes differ is another matter (docs/comparing.md).
 */
struct summary summarize(const double *samples, int count);

/* Median of samples[count]. */
double median_of(const double *samples, int count);

/* Half the width of an interval, relative to the value inside it. */
double relative_half_width(struct interval interval, double value);

struct ratio {
	int rounds;
	double ratio; /* the median over the rounds of baseline / value */
	struct interval interval;
};

/* What summarize() says of the rounds' ratios: cheap, to decide whether they suffice. */
struct ratio ratio_quick(const double *baseline, const double *value, int count);
/* The same with the 95% interval of a bootstrap over the rounds: percentiles of the medians of
 * resampled rounds, drawn in blocks so that drift counts. Reproducible. */
struct ratio ratio_bootstrap(const double *baseline, const double *value, int count);

#endif
