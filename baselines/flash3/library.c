#define _GNU_SOURCE
#include "baselines/flash3/library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/cuda/cuda_backend.h"

enum { MAX_PATH = 1024 };

/* What a device keeps. */
struct kept {
	bool tried;
	const char *why;
	char name[64];
	struct flash3_library library;
};

/* Function pointers come from dlsym() as object pointers; POSIX lets them be copied as bytes. */
static bool find(void *object, void *function, const char *name)
{
	void *symbol = dlsym(object, name);

	memcpy(function, &symbol, sizeof symbol);
	return symbol != NULL;
}

/* Opens libflash3.so in `folder`, seen from the program's own. */
static void *open_beside(const char *folder)
{
	char program[MAX_PATH], path[2 * MAX_PATH];
	const ssize_t length = readlink("/proc/self/exe", program, sizeof program);

	if (length <= 0 || length == sizeof program)
		return NULL;
	const char *name = memrchr(program, '/', (size_t)length);
	snprintf(path, sizeof path, "%.*s/%slibflash3.so", (int)(name - program), program, folder);
	return dlopen(path, RTLD_LAZY | RTLD_LOCAL);
}

/* Why it cannot be had, or NULL once it is open. */
static const char *open_library(struct flash3_library *l)
{
	const char *wanted = getenv("FLASH3_LIBRARY");
	void *object = wanted ? dlopen(wanted, RTLD_LAZY | RTLD_LOCAL) : open_beside("");

	/* A test lies one folder deeper. */
	if (!object && !wanted)
		object = open_beside("../");
	if (!object)
		return wanted ? "the file in FLASH3_LIBRARY cannot be opened"
		              : "FlashAttention-3 is not built: make flash3";
	if (!find(object, &l->workspace, "flash3_workspace") ||
	    !find(object, &l->forward, "flash3_forward") ||
	    !find(object, &l->backward_workspace, "flash3_backward_workspace") ||
	    !find(object, &l->backward, "flash3_backward") ||
	    !find(object, &l->version, "flash3_version") ||
	    !find(object, &l->problem_size, "flash3_problem_size") ||
	    l->problem_size() != sizeof(struct flash3_gradients))
		return "FlashAttention-3 was built for another version: make flash3";
	return NULL;
}

/* The library stays in memory. */
static void release(void *memory)
{
	(void)memory;
}

/* What the device keeps, after the library has been looked for; NULL: no memory. */
static const struct kept *kept_by(const struct device *device)
{
	struct kept *kept = cuda_slot(device, sizeof *kept, release);

	if (!kept || kept->tried)
		return kept;
	kept->tried = true;
	kept->why = open_library(&kept->library);
	if (!kept->why)
		snprintf(kept->name, sizeof kept->name, "FlashAttention-3 %s",
		         kept->library.version());
	return kept;
}

const struct flash3_library *flash3_library_get(const struct device *device, const char **why)
{
	const struct kept *kept = kept_by(device);

	*why = kept ? kept->why : "no memory for FlashAttention-3";
	return *why ? NULL : &kept->library;
}

const char *flash3_library_name(const struct device *device, const void *args)
{
	const struct kept *kept = kept_by(device);

	(void)args;
	return !kept || kept->why ? NULL : kept->name;
}
