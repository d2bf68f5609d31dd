/* Where and with what a run is made: the columns that all its rows share. */
#ifndef BENCH_HARNESS_ENVIRONMENT_H
#define BENCH_HARNESS_ENVIRONMENT_H

#include <stdbool.h>

#include "kernels/device.h"

struct environment {
	char host[64];
	char run_id[128];
	const char *git_sha, *compiler;
	const char *build; /* processor, sanitizers and changes: "x86-64-v3 dirty:1a2b3c4d" */
	bool git_dirty;
	struct device_info device; /* as of the start of the run */
	char device_folder[128];   /* "h100-80gb-hbm3", "cpu-amd-epyc": its folder in results/ */
};

/* Describes the machine and an open backend. run_id "": $RUN_ID, or a new one. */
enum status environment_read(struct environment *environment, struct device *device,
                             const char *run_id);

/* The device's name in lower case without "NVIDIA ", everything but letters, digits and dots as
 * single dashes; names of CPUs begin with "cpu-". */
void device_folder_name(char *folder, size_t size, const char *backend, const char *device);

/* Now, as "2026-01-31T23:59:59Z". */
void time_utc(char text[32]);

#endif
