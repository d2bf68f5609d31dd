/* One line on standard error that says how far a run is; nothing where that is no terminal. */
#ifndef BENCH_HARNESS_PROGRESS_H
#define BENCH_HARNESS_PROGRESS_H

#include <stdbool.h>

struct progress {
	bool visible;
	int total, done;
	double started;             /* seconds, monotonic */
	double all_work, done_work; /* estimates in any one unit */
};

/* Seconds on the monotonic clock. */
double seconds_now(void);

/* Begins with `total` cases of `all_work` together. */
void progress_begin(struct progress *progress, int total, double all_work);
/* Shows which case is under way. */
void progress_show(const struct progress *progress, const char *label);
/* Counts a case of `work` as done. */
void progress_advance(struct progress *progress, double work);
/* Removes the line, so that something else can be printed. */
void progress_clear(const struct progress *progress);

#endif
