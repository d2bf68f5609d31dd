#define _POSIX_C_SOURCE 200809L
#include "bench/harness/streams.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static bool closed[STDERR_FILENO + 1];

void streams_open(void)
{
	for (int i = 0; i <= STDERR_FILENO; i++) {
		closed[i] = fcntl(i, F_GETFD) < 0 && errno == EBADF;
		/* The lowest free number is the one that is given: this one. */
		if (closed[i] && open("/dev/null", O_RDWR) != i)
			_exit(2);
	}
}

bool stdout_was_closed(void)
{
	return closed[STDOUT_FILENO];
}

enum status stdout_finish(void)
{
	if (closed[STDOUT_FILENO])
		return status_set(STATUS_IO, "standard output is closed");
	/* An earlier write may have failed, and the last one succeeded. */
	const bool failed = ferror(stdout);

	if (fflush(stdout) != 0)
		return status_set(STATUS_IO, "standard output: %s", strerror(errno));
	if (failed)
		return status_set(STATUS_IO, "standard output: not everything could be written");
	return STATUS_OK;
}
