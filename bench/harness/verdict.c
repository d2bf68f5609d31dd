#include "bench/harness/verdict.h"

#include <math.h>
#include <stdlib.h>

const struct verdict_rule usual_rule = {
        .margin = 0.01, .same = 0.03, .width = 0.02, .deviation = 0.12};

/* Of the standard normal distribution, for 95% on both sides. */
static const double NORMAL_QUANTILE = 1.959964;

/* More pairs than this have ranks that are as good as normal. */
enum { MAX_EXACT_PAIRS = 64 };

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double middle(const double *sorted, int count)
{
	return count % 2 ? sorted[count / 2] : (sorted[count / 2 - 1] + sorted[count / 2]) / 2;
}

/*
 * How many of the means at either end lie outside the interval: the largest k with
 * P(W < k) <= 2.5%, where W is the sum of the ranks 1 ... count that a fair coin picks.
 */
static int means_outside(int count)
{
	enum { MAX_SUM = MAX_EXACT_PAIRS * (MAX_EXACT_PAIRS + 1) / 2 };
	double chance[MAX_SUM + 1] = {1};
	const double n = count;
	int sum = 0;

	if (count > MAX_EXACT_PAIRS)
		return (int)(n * (n + 1) / 4 -
		             NORMAL_QUANTILE * sqrt(n * (n + 1) * (2 * n + 1) / 24));
	for (int rank = 1; rank <= count; rank++) {
		sum += rank;
		for (int w = sum; w >= 0; w--)
			chance[w] = (chance[w] + (w >= rank ? chance[w - rank] : 0)) / 2;
	}
	double below = 0;
	int k = 0;

	while (k < sum && below + chance[k] <= 0.025)
		below += chance[k++];
	return k;
}

/* The means of every two pairs, each pair with itself too; sorted. */
static double *walsh_means(const double *pairs, int count, int n_means)
{
	double *means = malloc((size_t)n_means * sizeof *means);
	int at = 0;

	for (int i = 0; means && i < count; i++)
		for (int j = i; j < count; j++)
			means[at++] = (pairs[i] + pairs[j]) / 2;
	if (means)
		qsort(means, (size_t)n_means, sizeof *means, compare_doubles);
	return means;
}

struct ratio ratio_of_pairs(double *pairs, int count, bool alternated,
                            const struct verdict_rule *rule)
{
	struct ratio ratio = {count, NAN, NAN, NAN, !alternated || count < MIN_PAIRS};
	const int n_means = count * (count + 1) / 2;
	double *means = count > 0 ? walsh_means(pairs, count, n_means) : NULL;

	if (!means)
		return ratio;
	qsort(pairs, (size_t)count, sizeof *pairs, compare_doubles);
	double value = middle(means, n_means), low, high;

	if (ratio.assumed) {
		/* Runs that did not take turns are one pair, whatever their number. */
		double half =
		        NORMAL_QUANTILE * sqrt(2.0 / (alternated ? count : 1)) * rule->deviation;

		low = fmin(value - half, pairs[0]);
		high = fmax(value + half, pairs[count - 1]);
	} else {
		const int outside = means_outside(count);

		low = means[outside - 1];
		high = means[n_means - outside];
	}
	free(means);
	ratio.value = exp(value);
	ratio.low = exp(low);
	ratio.high = exp(high);
	return ratio;
}

/* Written so that NaN is unclear. */
enum verdict verdict_of(const struct ratio *ratio, const struct verdict_rule *rule)
{
	if (ratio->low > 1 + rule->margin)
		return VERDICT_SLOWER;
	if (ratio->high < 1 / (1 + rule->margin))
		return VERDICT_FASTER;
	if (ratio->low >= 1 / (1 + rule->same) && ratio->high <= 1 + rule->same)
		return VERDICT_SAME;
	return VERDICT_UNCLEAR;
}

const char *verdict_name(enum verdict verdict)
{
	static const char *const names[VERDICT_COUNT] = {"same", "faster", "slower", "unclear"};

	return names[verdict];
}

bool ratio_is_narrow(const struct ratio *ratio, const struct verdict_rule *rule)
{
	return !ratio->assumed && log(ratio->high / ratio->low) / 2 <= log1p(rule->width);
}
