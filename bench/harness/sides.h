/* Two sides of a comparison: the rows of every run, ordered by case and run. */
#ifndef BENCH_HARNESS_SIDES_H
#define BENCH_HARNESS_SIDES_H

#include <stdbool.h>
#include <stddef.h>

#include "bench/harness/results.h"

/* The runs of one program. A run is a process, or several of one run_id; of files that do not name
 * their runs each is one. */
struct side {
	const char *name; /* "base", "new" */
	struct results results;
	int n_runs;
	int *run;                   /* [results.count] which run a row is of */
	const char **path;          /* [results.count] which file it is from */
	const struct result **cell; /* [case * n_runs + run]; NULL: that run lacks the case */
	int n_repeated;             /* rows that a later one of the same run and case replaces */
	int n_ratios;               /* rows of ratios, which are no measurements of a case */
	int n_noisy;
};

struct sides {
	struct side base, new;
	int n_cases;
	const struct result **example; /* [n_cases], a row of each case */
};

/* Adds a file's rows to a side: status of results_add_all(). */
enum status side_add(struct side *side, const char *path);

/* What may differ between the sides although it changes times. */
struct allowed {
	bool device, build, clock;
};

/*
 * STATUS_INVALID, with a line that names them, if the rows are of several devices or backends, of
 * several builds (processor and sanitizers, compiler, threads) or at clocks more than 3% apart,
 * unless that is allowed. What an old file does not tell is not compared. A number of threads
 * that may differ is then taken from all rows, so that cases meet.
 */
enum status sides_check(struct sides *sides, const struct allowed *allowed);

/* Fills in the cases and cells of both. STATUS_OOM. */
enum status sides_match(struct sides *sides);

void sides_release(struct sides *sides);

/* Pairs of runs: the first of both sides, the second, and so on. */
int sides_pairs(const struct sides *sides);

/* Whether the runs took turns: both of a pair are over before the next pair begins. */
bool sides_alternated(const struct sides *sides);

/* A row of a case in a run, or NULL. */
const struct result *side_cell(const struct side *side, int index, int run);

#endif
