#define _GNU_SOURCE
#include "baselines/cudnn/library.h"

#include <dlfcn.h>
#include <glob.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cuda/cuda_backend.h"

enum { MAX_PATH = 1024, OLDEST = 90000 };

/* What a device keeps. */
struct kept {
	bool tried;
	const char *why;
	char name[64];
	struct cudnn_library library;
};

/* Function pointers come from dlsym() as object pointers; POSIX lets them be copied as bytes. */
static bool find(void *object, void *function, const char *name)
{
	void *symbol = dlsym(object, name);

	memcpy(function, &symbol, sizeof symbol);
	return symbol != NULL;
}

/* Writes the version of the library at `path` to `out`, 0 if it cannot be opened. */
static void report_version(const char *path, int out)
{
	size_t (*version)(void);
	size_t found = 0;
	void *object = dlopen(path, RTLD_LAZY | RTLD_LOCAL);

	if (object && find(object, &version, "cudnnGetVersion"))
		found = version();
	if (write(out, &found, sizeof found) < 0)
		_exit(1);
	_exit(0);
}

/*
 * The version of a library without opening it here: its parts have the same
 * names in every version, and the first one loaded would stay.
 */
static size_t version_of(const char *path)
{
	size_t version = 0;
	int ends[2];

	if (pipe(ends) != 0)
		return 0;
	const pid_t child = fork();
	if (child == 0)
		report_version(path, ends[1]);
	close(ends[1]);
	if (child < 0 || read(ends[0], &version, sizeof version) != (ssize_t)sizeof version)
		version = 0;
	close(ends[0]);
	if (child > 0)
		waitpid(child, NULL, 0);
	return version;
}

/* Remembers `path` if it is a newer cuDNN than the best so far. */
static void consider(const char *path, char *best, size_t *best_version)
{
	const size_t version = version_of(path);

	if (version < OLDEST || version <= *best_version)
		return;
	*best_version = version;
	snprintf(best, MAX_PATH, "%s", path);
}

/* The packages of the python3 whose executable is in `directory`. */
static void consider_python(const char *directory, size_t length, char *best, size_t *best_version)
{
	char pattern[MAX_PATH];
	glob_t found;

	snprintf(pattern, sizeof pattern,
	         "%.*s/../lib/python3*/*-packages/nvidia/cudnn/lib/libcudnn.so.9", (int)length,
	         directory);
	if (glob(pattern, 0, NULL, &found) != 0)
		return;
	for (size_t i = 0; i < found.gl_pathc; i++)
		consider(found.gl_pathv[i], best, best_version);
	globfree(&found);
}

/* The path of the library to open, "" if there is none. */
static void choose(char *best)
{
	const char *wanted = getenv("CUDNN_LIBRARY"), *path = getenv("PATH");
	size_t version = 0;

	best[0] = '\0';
	if (wanted) {
		snprintf(best, MAX_PATH, "%s", wanted);
		return;
	}
	consider("libcudnn.so.9", best, &version);
	consider("/usr/local/cuda/lib64/libcudnn.so.9", best, &version);
	while (path && *path) {
		const size_t length = strcspn(path, ":");

		if (length > 0)
			consider_python(path, length, best, &version);
		path += length + (path[length] == ':');
	}
}

static bool find_functions(void *object, struct cudnn_library *l)
{
	return find(object, &l->create, "cudnnCreate") &&
	       find(object, &l->destroy, "cudnnDestroy") &&
	       find(object, &l->set_stream, "cudnnSetStream") &&
	       find(object, &l->error_string, "cudnnGetErrorString") &&
	       find(object, &l->last_error, "cudnnGetLastErrorString") &&
	       find(object, &l->create_descriptor, "cudnnBackendCreateDescriptor") &&
	       find(object, &l->destroy_descriptor, "cudnnBackendDestroyDescriptor") &&
	       find(object, &l->finalize, "cudnnBackendFinalize") &&
	       find(object, &l->set_attribute, "cudnnBackendSetAttribute") &&
	       find(object, &l->get_attribute, "cudnnBackendGetAttribute") &&
	       find(object, &l->execute, "cudnnBackendExecute");
}

/* Why cuDNN cannot be had, or NULL once it is open. */
static const char *open_library(struct cudnn_library *library)
{
	char path[MAX_PATH];
	size_t (*version)(void);

	choose(path);
	if (path[0] == '\0')
		return "no cuDNN 9 on this machine";
	void *object = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
	if (!object)
		return "the file in CUDNN_LIBRARY cannot be opened";
	if (!find(object, &version, "cudnnGetVersion") || !find_functions(object, library))
		return "this cuDNN has no graph interface";
	library->version = version();
	return library->version < OLDEST ? "cuDNN is older than 9.0" : NULL;
}

/* Closes the handle; the library stays in memory. */
static void release(void *memory)
{
	struct kept *kept = memory;

	if (kept->library.handle)
		kept->library.destroy(kept->library.handle);
}

/* What the device keeps, after the library has been looked for; NULL: no memory. */
static struct kept *kept_by(const struct device *device)
{
	struct kept *kept = cuda_slot(device, sizeof *kept, release);

	if (!kept || kept->tried)
		return kept;
	kept->tried = true;
	kept->why = open_library(&kept->library);
	const size_t version = kept->library.version;
	snprintf(kept->name, sizeof kept->name, "cuDNN %zu.%zu.%zu", version / 10000,
	         version / 100 % 100, version % 100);
	return kept;
}

const struct cudnn_library *cudnn_library_get(const struct device *device, const char **why)
{
	struct kept *kept = kept_by(device);

	*why = kept ? kept->why : "no memory for cuDNN";
	if (*why)
		return NULL;
	struct cudnn_library *l = &kept->library;
	if (cuda_activate(device) != STATUS_OK ||
	    (!l->handle &&
	     (l->create(&l->handle) != 0 || l->set_stream(l->handle, cuda_stream(device)) != 0))) {
		*why = "cuDNN does not accept this GPU";
		l->handle = NULL;
	}
	return l->handle ? l : NULL;
}

size_t cudnn_library_version(const struct device *device)
{
	const struct kept *kept = kept_by(device);

	return !kept || kept->why ? 0 : kept->library.version;
}

const char *cudnn_library_name(const struct device *device, const void *args)
{
	const struct kept *kept = kept_by(device);

	(void)args;
	return !kept || kept->why ? NULL : kept->name;
}
