#define _GNU_SOURCE
#include "baselines/flash3/library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_PATH = 1024 };

static struct {
	bool tried;
	const char *why;
	struct flash3_library library;
} flash3;

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
static const char *open_library(void)
{
	const char *wanted = getenv("FLASH3_LIBRARY");
	struct flash3_library *l = &flash3.library;
	void *object = wanted ? dlopen(wanted, RTLD_LAZY | RTLD_LOCAL) : open_beside("");

	/* A test lies one folder deeper. */
	if (!object && !wanted)
		object = open_beside("../");
	if (!object)
		return wanted ? "the file in FLASH3_LIBRARY cannot be opened"
		              : "FlashAttention-3 is not built: make flash3";
	if (!find(object, &l->workspace, "flash3_workspace") ||
	    !find(object, &l->forward, "flash3_forward") ||
	    !find(object, &l->version, "flash3_version") ||
	    !find(object, &l->problem_size, "flash3_problem_size") ||
	    l->problem_size() != sizeof(struct flash3_problem))
		return "FlashAttention-3 was built for another version: make flash3";
	return NULL;
}

const struct flash3_library *flash3_library_get(const char **why)
{
	if (!flash3.tried)
		flash3.why = open_library();
	flash3.tried = true;
	*why = flash3.why;
	return flash3.why ? NULL : &flash3.library;
}
