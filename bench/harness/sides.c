#include "bench/harness/sides.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Clocks further apart make a difference of their own. */
static const double CLOCK_TOLERANCE = 0.03;

/* The run of row `index`: that of an earlier row of the same run_id, or a new one. */
static int find_run(const struct side *side, int index)
{
	const char *id = side->results.row[index].run_id;

	for (int i = 0; i < index; i++)
		if (strcmp(side->results.row[i].run_id, id) == 0 &&
		    (id[0] || side->path[i] == side->path[index]))
			return side->run[i];
	return side->n_runs;
}

enum status side_add(struct side *side, const char *path)
{
	const int first = side->results.count;

	TRY(results_add_all(&side->results, path));
	const size_t count = (size_t)side->results.count + 1;
	int *run = realloc(side->run, count * sizeof *run);
	if (run)
		side->run = run;
	const char **paths = realloc(side->path, count * sizeof *paths);
	if (paths)
		side->path = paths;
	if (!run || !paths)
		return status_set(STATUS_OOM, "%s: no memory for its runs", path);
	for (int i = first; i < side->results.count; i++) {
		side->path[i] = path;
		side->run[i] = find_run(side, i);
		side->n_runs += side->run[i] == side->n_runs;
		side->n_noisy +=
		        strcmp(side->results.row[i].status, status_name(STATUS_NOISY)) == 0;
	}
	return STATUS_OK;
}

/* Texts of a row that have to be the same in all rows, where they are known. */
static const struct {
	const char *name, *allow;
	size_t offset;
} equal[] = {
        {"devices", "device", offsetof(struct result, device)},
        {"backends", "device", offsetof(struct result, backend)},
        {"builds", "build", offsetof(struct result, build)},
        {"compilers", "build", offsetof(struct result, compiler)},
};

static bool is_allowed(const struct allowed *allowed, const char *what)
{
	return strcmp(what, "device") == 0 ? allowed->device : allowed->build;
}

/* Uncommitted changes are part of a build's name, and no difference in how it was built. */
static size_t compared_length(const char *text)
{
	const char *changes = strstr(text, " dirty:");

	return changes ? (size_t)(changes - text) : strlen(text);
}

/* The first text in rows of either side that differs from *first, which the first row that has
 * one sets; NULL if all are the same. */
static const char *other_text(const struct side *side, size_t offset, const char **first)
{
	for (int i = 0; i < side->results.count; i++) {
		const char *text =
		        *(const char *const *)((const char *)&side->results.row[i] + offset);
		const size_t length = compared_length(text);

		if (!*first && *text)
			*first = text;
		if (*first && *text &&
		    (length != compared_length(*first) || memcmp(text, *first, length) != 0))
			return text;
	}
	return NULL;
}

static enum status check_texts(const struct sides *sides, const struct allowed *allowed)
{
	for (size_t i = 0; i < sizeof equal / sizeof *equal; i++) {
		const char *first = NULL;
		const char *other = other_text(&sides->base, equal[i].offset, &first);

		if (!other)
			other = other_text(&sides->new, equal[i].offset, &first);
		if (other && !is_allowed(allowed, equal[i].allow))
			return status_set(
			        STATUS_INVALID,
			        "the %s differ: '%.160s' and '%.160s' (--allow-different %s)",
			        equal[i].name, first, other, equal[i].allow);
	}
	return STATUS_OK;
}

static bool has_threads(const struct side *side, int64_t threads)
{
	for (int i = 0; i < side->results.count; i++)
		if (side->results.row[i].threads == threads || side->results.row[i].threads < 0)
			return true;
	return false;
}

/* A sweep over threads has cases in common with another; two sides without any do not. */
static enum status check_threads(struct sides *sides, const struct allowed *allowed)
{
	struct side *both[] = {&sides->base, &sides->new};

	for (int i = 0; i < sides->base.results.count; i++)
		if (has_threads(&sides->new, sides->base.results.row[i].threads))
			return STATUS_OK;
	if (sides->base.results.count == 0 || sides->new.results.count == 0)
		return STATUS_OK;
	if (!allowed->build)
		return status_set(STATUS_INVALID,
		                  "the threads differ: %lld and %lld (--allow-different build)",
		                  (long long)sides->base.results.row[0].threads,
		                  (long long)sides->new.results.row[0].threads);
	for (int side = 0; side < 2; side++)
		for (int i = 0; i < both[side]->results.count; i++)
			both[side]->results.row[i].threads = -1;
	return STATUS_OK;
}

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* Median clock of the measured rows; NAN if none has one. */
static double median_clock(const struct side *side)
{
	double *clock = malloc(((size_t)side->results.count + 1) * sizeof *clock), median = NAN;
	int count = 0;

	for (int i = 0; clock && i < side->results.count; i++)
		if (result_ok(&side->results.row[i]) && side->results.row[i].sm_clock_mhz > 0)
			clock[count++] = side->results.row[i].sm_clock_mhz;
	if (count > 0) {
		qsort(clock, (size_t)count, sizeof *clock, compare_doubles);
		median = clock[count / 2];
	}
	free(clock);
	return median;
}

static enum status check_clocks(const struct sides *sides, const struct allowed *allowed)
{
	const double base = median_clock(&sides->base), new = median_clock(&sides->new);

	/* False where either is unknown. */
	if (fmax(base / new, new / base) > 1 + CLOCK_TOLERANCE && !allowed->clock)
		return status_set(STATUS_INVALID,
		                  "the clocks differ: medians of %.0f and %.0f MHz (--cycles "
		                  "compares clock cycles; --allow-different clock)",
		                  base, new);
	return STATUS_OK;
}

enum status sides_check(struct sides *sides, const struct allowed *allowed)
{
	TRY(check_texts(sides, allowed));
	TRY(check_threads(sides, allowed));
	return check_clocks(sides, allowed);
}

/* The case of a row: one that there is, or a new one. */
static int case_of(struct sides *sides, const struct result *row)
{
	for (int i = 0; i < sides->n_cases; i++)
		if (result_same_case(sides->example[i], row))
			return i;
	sides->example[sides->n_cases] = row;
	return sides->n_cases++;
}

/* The case of each row of a side; -1: a row of ratios. */
static void find_cases(struct sides *sides, struct side *side, int *case_of_row)
{
	for (int i = 0; i < side->results.count; i++) {
		const struct result *row = &side->results.row[i];

		side->n_ratios += result_is_ratio(row);
		case_of_row[i] = result_is_ratio(row) ? -1 : case_of(sides, row);
	}
}

static enum status fill_cells(const struct sides *sides, struct side *side, const int *case_of_row)
{
	side->cell =
	        calloc((size_t)sides->n_cases * (size_t)side->n_runs + 1, sizeof(struct result *));
	if (!side->cell)
		return status_set(STATUS_OOM, "no memory for %d cases", sides->n_cases);
	for (int i = 0; i < side->results.count; i++) {
		if (case_of_row[i] < 0)
			continue;
		const struct result **cell =
		        &side->cell[case_of_row[i] * side->n_runs + side->run[i]];

		side->n_repeated += *cell != NULL;
		*cell = &side->results.row[i];
	}
	return STATUS_OK;
}

enum status sides_match(struct sides *sides)
{
	const size_t n_base = (size_t)sides->base.results.count;
	const size_t n_new = (size_t)sides->new.results.count;
	int *case_of_row = malloc((n_base + n_new + 1) * sizeof *case_of_row);
	enum status status = STATUS_OK;

	sides->example = calloc(n_base + n_new + 1, sizeof(struct result *));
	if (!case_of_row || !sides->example)
		status = status_set(STATUS_OOM, "no memory for %zu rows", n_base + n_new);
	if (status == STATUS_OK) {
		find_cases(sides, &sides->base, case_of_row);
		find_cases(sides, &sides->new, case_of_row + n_base);
		status = fill_cells(sides, &sides->base, case_of_row);
	}
	if (status == STATUS_OK)
		status = fill_cells(sides, &sides->new, case_of_row + n_base);
	free(case_of_row);
	return status;
}

static void side_release(struct side *side)
{
	results_release(&side->results);
	free(side->run);
	free(side->path);
	free(side->cell);
	*side = (struct side){0};
}

void sides_release(struct sides *sides)
{
	side_release(&sides->base);
	side_release(&sides->new);
	free(sides->example);
	*sides = (struct sides){0};
}

int sides_pairs(const struct sides *sides)
{
	return sides->base.n_runs < sides->new.n_runs ? sides->base.n_runs : sides->new.n_runs;
}

/* The first or the last time of a run; "" if unknown. Times of this form sort as text. */
static const char *time_of_run(const struct side *side, int run, bool last)
{
	const char *time = "";

	for (int i = 0; i < side->results.count; i++) {
		const char *at = side->results.row[i].time_utc;

		if (side->run[i] == run && (!*time || (strcmp(at, time) > 0) == last))
			time = at;
	}
	return time;
}

bool sides_alternated(const struct sides *sides)
{
	const struct side *both[] = {&sides->base, &sides->new};

	for (int pair = 0; pair + 1 < sides_pairs(sides); pair++)
		for (int i = 0; i < 4; i++) {
			const char *end = time_of_run(both[i % 2], pair, true);
			const char *begin = time_of_run(both[i / 2], pair + 1, false);

			if (!*end || !*begin || strcmp(end, begin) > 0)
				return false;
		}
	return true;
}

const struct result *side_cell(const struct side *side, int index, int run)
{
	return side->cell[index * side->n_runs + run];
}
