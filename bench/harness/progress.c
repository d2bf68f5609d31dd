#define _POSIX_C_SOURCE 200809L
#include "bench/harness/progress.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

double seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void progress_begin(struct progress *progress, int total, double all_work)
{
	*progress = (struct progress){.visible = isatty(STDERR_FILENO) == 1,
	                              .total = total,
	                              .started = seconds_now(),
	                              .all_work = all_work};
}

void progress_show(const struct progress *progress, const char *label)
{
	double elapsed = seconds_now() - progress->started;

	if (!progress->visible)
		return;
	fprintf(stderr, "\r\033[K[%d/%d] %s", progress->done + 1, progress->total, label);
	if (progress->done_work > 0) {
		int left = (int)(elapsed * (progress->all_work / progress->done_work - 1));

		fprintf(stderr, "  about %d:%02d left", left / 60, left % 60);
	}
	fflush(stderr);
}

void progress_advance(struct progress *progress, double work)
{
	progress->done++;
	progress->done_work += work;
}

void progress_clear(const struct progress *progress)
{
	if (!progress->visible)
		return;
	fputs("\r\033[K", stderr);
	fflush(stderr);
}
