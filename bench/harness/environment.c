#define _GNU_SOURCE
#include "bench/harness/environment.h"

#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "version.h" /* written by make */

#ifdef __clang__
static const char compiler_version[] = __VERSION__;
#else
static const char compiler_version[] = "gcc " __VERSION__;
#endif

void time_utc(char text[32])
{
	time_t now = time(NULL);
	struct tm broken_down;

	gmtime_r(&now, &broken_down);
	strftime(text, 32, "%Y-%m-%dT%H:%M:%SZ", &broken_down);
}

/* $RUN_ID makes the programs of one `make bench-latency` one run. */
static void name_run(char *run_id, size_t size, const char *wanted)
{
	const char *inherited = getenv("RUN_ID");
	uint32_t chance = 0;
	char now[32];

	if (!wanted[0] && inherited)
		wanted = inherited;
	if (wanted[0]) {
		snprintf(run_id, size, "%s", wanted);
		/* A line of a file has it, whoever reads that. */
		for (char *c = run_id; *c; c++)
			if (iscntrl((unsigned char)*c))
				*c = '-';
		return;
	}
	if (getrandom(&chance, sizeof chance, 0) < 0)
		chance = (uint32_t)getpid();
	time_utc(now);
	snprintf(run_id, size, "%s-%04x", now, (unsigned)chance & 0xffff);
}

void device_folder_name(char *folder, size_t size, const char *backend, const char *device)
{
	size_t length = 0;

	if (strncmp(device, "NVIDIA ", 7) == 0)
		device += 7;
	if (strcmp(backend, "cpu") == 0)
		length = (size_t)snprintf(folder, size, "cpu-");
	for (; *device && length + 1 < size; device++) {
		unsigned char c = (unsigned char)*device;

		if (isalnum(c) || c == '.')
			folder[length++] = (char)tolower(c);
		else if (length > 0 && folder[length - 1] != '-')
			folder[length++] = '-';
	}
	while (length > 0 && folder[length - 1] == '-')
		length--;
	folder[length] = '\0';
}

enum status environment_read(struct environment *environment, struct device *device,
                             const char *run_id)
{
	*environment = (struct environment){.git_sha = GIT_SHA,
	                                    .git_dirty = GIT_DIRTY,
	                                    .compiler = compiler_version,
	                                    .build = BUILD_ID};
	gethostname(environment->host, sizeof environment->host - 1);
	name_run(environment->run_id, sizeof environment->run_id, run_id);
	enum status status = device_info(device, &environment->device);

	device_folder_name(environment->device_folder, sizeof environment->device_folder,
	                   device->backend->name, environment->device.name);
	return status;
}
