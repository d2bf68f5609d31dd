/*
 * Verdicts on two programs, from pairs of neighbouring processes. What a process measures differs
 * from what the next one does by far more than its samples differ among themselves (its memory
 * lies elsewhere), so a process counts as one number, and only processes tell how sure one is.
 */
#ifndef BENCH_HARNESS_VERDICT_H
#define BENCH_HARNESS_VERDICT_H

#include <stdbool.h>

enum verdict { VERDICT_SAME, VERDICT_FASTER, VERDICT_SLOWER, VERDICT_UNCLEAR, VERDICT_COUNT };

/* Fractions: 0.01 is 1%. */
struct verdict_rule {
	double margin;    /* slower: the whole interval lies above 1 + margin; faster: below
	                     1 / (1 + margin) */
	double same;      /* same: the whole interval lies between 1 / (1 + same) and 1 + same */
	double width;     /* an interval no wider than once this to either side is narrow enough */
	double deviation; /* assumed of one program's processes, where too few were measured */
};

/* The rule where nobody gives another. */
extern const struct verdict_rule usual_rule;

/* Least number of pairs that an interval of 95% can be had from without an assumption. */
enum { MIN_PAIRS = 6 };

/* A ratio new / base and its 95% interval. */
struct ratio {
	int pairs;
	double value, low, high;
	bool assumed; /* the interval stems from verdict_rule.deviation */
};

/*
 * The ratio of pairs[count] (count >= 1), each the logarithm of new / base of two neighbouring
 * processes: the Hodges-Lehmann estimate and the interval of the signed-rank test. It is exact
 * where the logarithms are symmetric about their middle, as they are if the two of a pair run in
 * random order, and a few wild pairs do not widen it. Below MIN_PAIRS, and for runs that did not
 * take turns (`alternated` false), the interval is that of the deviation assumed, and wider if
 * the pairs themselves are. Sorts pairs[]. count 0, or no memory: a ratio of NAN.
 */
struct ratio ratio_of_pairs(double *pairs, int count, bool alternated,
                            const struct verdict_rule *rule);

enum verdict verdict_of(const struct ratio *ratio, const struct verdict_rule *rule);
const char *verdict_name(enum verdict verdict);

/* Whether the interval needs no more pairs: its width decides, never what it says. */
bool ratio_is_narrow(const struct ratio *ratio, const struct verdict_rule *rule);

#endif
