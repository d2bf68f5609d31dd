#include "kernels/judge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/*
 * What is allowed, in responses: of the worst row, of all rows together, and of what all rows of a
 * stretch of positions have in common. Correct kernels stay below two thirds
 * (tests/test_operations.c, tests/test_judgement.c).
 */
static const double ROW_ALLOWED = 7, ALL_ALLOWED = 2, DRIFT_ALLOWED = 7;
/* What sums lose has one sign. */
static const double LOST_ALLOWED = 2;
/* Over the root of how many elements there are: the length of few is uncertain. */
static const double ALL_BY_CHANCE = 5;
/* Part of the mean row's response that every row is entitled to: its own may vanish by chance. */
static const double COMMON_PART = 0.1;
/* Part of the mean row's length that a row is held against for rel_err where its own is less. */
static const double LEAST_PART = 0.01;
/* Positions that rows are summed over where they are sums over those after them: a chunk. */
enum { SUMMED_POSITIONS = 64 };
/* Elements of a stretch at least: of fewer the responses may vanish by chance. */
enum { FEWEST_IN_COMMON = 64 };
/* About where fp32 and bf16 end: kernels may have 0 instead. */
static const double NOTHING = 0x1p-120;

void check_raise(double *worst, double error)
{
	if (!(error <= *worst))
		*worst = isnan(error) ? (double)INFINITY : error;
}

void judge_raise(struct check_result *result, double share, const char *name, const char *test)
{
	if (!(share <= result->share)) {
		result->name = name;
		result->test = test;
	}
	check_raise(&result->share, share);
}

/* Half a unit in the last place of a number of this type that is as large as x. */
static double half_unit(enum dtype dtype, double x)
{
	const int bits = dtype == DTYPE_BF16 ? 8 : dtype == DTYPE_F32 ? 24 : 53;
	uint64_t power;

	/* The power of two below it. */
	memcpy(&power, &x, sizeof power);
	power &= UINT64_C(0x7ff0000000000000);
	memcpy(&x, &power, sizeof x);
	return ldexp(x, -bits);
}

/* The rounding of an output itself, which every kernel is entitled to. */
static double own_rounding(const struct judged *j, int64_t i)
{
	return fmax(half_unit(j->dtype, fmax(fabs(j->actual[i]), fabs(j->expected[i]))), NOTHING);
}

/* What an element is off by beyond that. */
static double excess(const struct judged *j, int64_t i)
{
	const double beyond = fabs(j->actual[i] - j->expected[i]) - own_rounding(j, i);

	return beyond > 0 || isnan(beyond) ? beyond : 0;
}

/* An element without what was added to it. */
static double made(const struct judged *j, int64_t i)
{
	return j->expected[i] - (j->base ? j->base[i] : 0);
}

/* The mean square of an element's responses, and what sums may lose of the element itself. */
static double allowance(const struct judged *j, int64_t i)
{
	double sum = 0;

	for (int r = 0; r < j->n_responses; r++)
		sum += j->response[r][i] * j->response[r][i];
	return j->scale * j->scale * sum / j->n_responses + pow(j->lost * made(j, i), 2);
}

static int64_t count_of(const struct judged *j)
{
	return j->size[0] * j->size[1] * j->size[2] * j->size[3];
}

static double ratio(double error, double allowed)
{
	if (!isfinite(error) || !isfinite(allowed))
		return INFINITY;
	return error == 0 ? 0 : error / allowed;
}

/*
 * Rounding a key times 1 - x, with x below half a unit, leaves the key itself, which is off by x:
 * on the average of a chunk of C tokens by C g / 2 with decays of e^-g. Where x is some units,
 * errors have both signs, but not quite equally often. What is returned is above what was found for
 * keys that are normal and chunks of 16 to 256 tokens (docs/verification.md).
 */
double judge_alike(double log_decay)
{
	const double g = fabs(log_decay), most = ROUNDING_BF16 / 2;

	if (g <= 0x1p-12)
		return fmin(MOST_CHUNK * g / 2, most);
	return fmax(most * 0x1p-12 / g, 1.6e-4 * fmin(1, 0x1p-8 / g));
}

/* ---- rows ---- */

/* Sums over a row. */
struct row {
	double error, length, excess, allowance; /* squares */
};

static struct row row_of(const struct judged *j, int64_t row)
{
	const int64_t width = j->size[3];
	struct row sum = {0};

	for (int64_t i = row * width; i < (row + 1) * width; i++) {
		const double error = j->actual[i] - j->expected[i];
		/* Of a sum with something else only what was added is judged, less the sum's
		 * own rounding. */
		const double relevant = j->base ? excess(j, i) : error;
		const double beyond = excess(j, i);

		sum.error += relevant * relevant;
		sum.length += made(j, i) * made(j, i);
		sum.excess += beyond * beyond;
		sum.allowance += allowance(j, i);
	}
	return sum;
}

/* The largest allowance of a chunk of rows, of which the i-th is the first: it may be a small sum
 * of large ones. */
static double allowance_after(const struct judged *j, const struct row *rows, int64_t i)
{
	int64_t stride = 1;
	double largest = 0;

	for (int d = j->position + 1; d < JUDGED_DIMS - 1; d++)
		stride *= j->size[d];
	/* Where nothing counts positions but a row itself, no row comes after. */
	const int64_t left = j->position == JUDGED_DIMS - 1
	                             ? 1
	                             : j->size[j->position] - i / stride % j->size[j->position];

	for (int64_t k = 0; k < left && k < SUMMED_POSITIONS; k++)
		largest = fmax(largest, rows[i + k * stride].allowance);
	return largest;
}

/* Returns what every row is entitled to, the square of its length. */
static double judge_rows(const struct judged *j, struct row *rows, struct check_result *result)
{
	const int64_t n = count_of(j) / j->size[3];
	struct row all = {0};
	double worst = 0, worst_share = 0;

#pragma omp parallel for schedule(static)
	for (int64_t i = 0; i < n; i++)
		rows[i] = row_of(j, i);
	for (int64_t i = 0; i < n; i++) {
		all.length += rows[i].length;
		all.excess += rows[i].excess;
		all.allowance += rows[i].allowance;
	}
	const double least = LEAST_PART * sqrt(all.length / (double)n);
	const double common = COMMON_PART * COMMON_PART * all.allowance / (double)n;
	for (int64_t i = 0; i < n; i++) {
		check_raise(&worst, ratio(sqrt(rows[i].error), fmax(sqrt(rows[i].length), least)));
		const double allowed =
		        common + (j->summed ? allowance_after(j, rows, i) : rows[i].allowance);

		check_raise(&worst_share, ratio(sqrt(rows[i].excess), ROW_ALLOWED * sqrt(allowed)));
	}
	check_raise(&result->rel_err, worst);
	judge_raise(result, worst_share, j->name, "a row");
	const double allowed = ALL_ALLOWED + ALL_BY_CHANCE / sqrt((double)count_of(j));
	judge_raise(result, ratio(sqrt(all.excess), allowed * sqrt(all.allowance)), j->name,
	            "all rows");
	return common;
}

/* ---- what rows have in common ---- */

/*
 * Sums over the elements at one position, or over a stretch of positions. A fault such as a state
 * that has lost a thousandth makes all rows after it shorter: their errors, multiplied with the
 * rows themselves, add up, while those of roundings cancel.
 */
struct drift {
	double error;                    /* of actual - expected, times expected */
	double rounding;                 /* variance of that from roundings of outputs, */
	double allowance;                /* and from responses, if they were independent; */
	double responses[MAX_RESPONSES]; /* what the responses add up to in fact */
	double length;                   /* squares of expected */
	double alike;                    /* what those may be off by alike */
};

static void add_drift(struct drift *to, const struct drift *from, int n_responses)
{
	to->error += from->error;
	to->rounding += from->rounding;
	to->allowance += from->allowance;
	to->length += from->length;
	to->alike += from->alike;
	for (int r = 0; r < n_responses; r++)
		to->responses[r] += from->responses[r];
}

static void add_element(const struct judged *j, int64_t i, double alike, double common,
                        struct drift *to)
{
	const double length = fabs(made(j, i)) > NOTHING ? made(j, i) : 0;
	const double rounding = own_rounding(j, i), allowed = allowance(j, i) + common;

	to->error += (j->actual[i] - j->expected[i]) * length;
	to->rounding += rounding * rounding * length * length;
	to->length += length * length;
	to->alike += alike * length * length;
	to->allowance += allowed * length * length;
	for (int r = 0; r < j->n_responses; r++)
		to->responses[r] += j->scale * j->response[r][i] * length;
}

/* The mean square of what the responses add up to. */
static double together(const struct drift *d, int n_responses)
{
	double sum = 0;

	for (int r = 0; r < n_responses; r++)
		sum += d->responses[r] * d->responses[r];
	return sum / n_responses;
}

/*
 * Every stretch of `width` positions, each beginning in the middle of the one before. *correlated:
 * by how much the responses of so many positions, or fewer, add up more than independent ones
 * would, on the average.
 */
static double stretches(const struct drift *cells, int64_t n, int64_t width, int n_responses,
                        double lost, struct drift *sums, double *correlated)
{
	const int64_t step = width > 1 ? width / 2 : 1;
	double more = 0, worst = 0;
	int64_t count = 0, seen = 0;

	for (int64_t from = 0; from == 0 || from + width <= n; from += step) {
		struct drift *sum = &sums[count++];

		*sum = (struct drift){0};
		for (int64_t i = from; i < from + width && i < n; i++)
			add_drift(sum, &cells[i], n_responses);
		if (sum->allowance > 0) {
			more += together(sum, n_responses) / sum->allowance;
			seen++;
		}
	}
	if (seen > 0)
		*correlated = fmax(*correlated, more / (double)seen);
	for (int64_t i = 0; i < count; i++) {
		const double variance =
		        fmax(*correlated * sums[i].allowance, together(&sums[i], n_responses)) +
		        sums[i].rounding;

		check_raise(&worst,
		            ratio(fabs(sums[i].error),
		                  DRIFT_ALLOWED * sqrt(variance) +
		                          LOST_ALLOWED * lost * sums[i].length + sums[i].alike));
	}
	return worst;
}

static double judge_lane(const struct judged *j, const struct drift *cells, int64_t n,
                         int64_t elements, struct drift *sums)
{
	double correlated = 0, worst = 0;
	int64_t width = 1;

	while (width * elements < FEWEST_IN_COMMON)
		width *= 2;
	for (; width < 2 * n; width *= 2) {
		/* Two sums of a chunk share half of their terms, on the average. */
		if (j->summed)
			correlated = fmax(correlated,
			                  0.5 * fmin((double)width, (double)SUMMED_POSITIONS));
		check_raise(&worst, stretches(cells, n, width < n ? width : n, j->n_responses,
		                              j->lost, sums, &correlated));
	}
	return worst;
}

/* Lanes run along the positions, one for each index of the other dimensions but the last; the first
 * is the sum of all others. */
static void judge_drift(const struct judged *j, double common, struct drift *cells, int64_t n_lanes,
                        struct check_result *result)
{
	const int64_t n = j->size[j->position], count = count_of(j), *size = j->size;
	const int64_t elements = count / (n * n_lanes);
	double worst = 0;

	for (int64_t i = 0; i < count; i++) {
		const int64_t index[JUDGED_DIMS] = {i / (size[1] * size[2] * size[3]),
		                                    i / (size[2] * size[3]) % size[1],
		                                    i / size[3] % size[2], i % size[3]};
		int64_t lane = 0;

		for (int d = 0; d < JUDGED_DIMS - 1; d++)
			lane = d == j->position ? lane : lane * size[d] + index[d];
		const double alike = !j->alike ? 0 : j->alike[j->heads < 0 ? 0 : index[j->heads]];

		add_element(j, i, alike, common, &cells[(1 + lane) * n + index[j->position]]);
	}
	for (int64_t i = 0; i < n_lanes * n; i++)
		add_drift(&cells[i % n], &cells[n + i], j->n_responses);
	for (int64_t lane = n_lanes > 1 ? 0 : 1; lane <= n_lanes; lane++)
		check_raise(&worst, judge_lane(j, cells + lane * n, n,
		                               lane == 0 ? elements * n_lanes : elements,
		                               cells + (n_lanes + 1) * n));
	judge_raise(result, worst, j->name, "what rows have in common");
}

enum status judge(const struct judged *j, struct check_result *result)
{
	const int64_t count = count_of(j), n = j->size[j->position];
	int64_t n_lanes = 1;

	if (count == 0)
		return STATUS_OK;
	for (int d = 0; d < JUDGED_DIMS - 1; d++)
		n_lanes *= d == j->position ? 1 : j->size[d];
	struct row *rows = malloc((size_t)(count / j->size[3]) * sizeof *rows);
	/* A lane has at most 2 n stretches of one width. */
	struct drift *cells = calloc((size_t)((n_lanes + 3) * n), sizeof *cells);
	enum status status =
	        rows && cells ? STATUS_OK : status_set(STATUS_OOM, "no memory to verify with");

	if (status == STATUS_OK) {
		const double common = judge_rows(j, rows, result);

		/* What is small beside its base is rounded away with one sign. */
		if (j->carries && !j->base)
			judge_drift(j, common / (double)j->size[3], cells, n_lanes, result);
	}
	free(rows);
	free(cells);
	return status;
}
