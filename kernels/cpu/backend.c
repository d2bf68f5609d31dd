/* The CPU backend: the process's own memory, the monotonic clock, and the kernels of this folder.
 */
#define _GNU_SOURCE
#include "kernels/device.h"

#include <cblas.h>
#include <inttypes.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/reference/reference.h"

enum {
	PAGE_BYTES = 4096,
	HUGE_PAGE_BYTES = 2 << 20,
	LINE_BYTES = 64,
	BLAS_BUFFER_BYTES = 128 << 20
};

/* A handle: the device, and its other face, the reference's. */
struct cpu_device {
	struct device base, reference;
	double stopwatch_started;
	int64_t switches_before, switches; /* involuntary, of the last timed work */
	char *flush_buffer;
	size_t flush_bytes;
	struct kernel *kernels; /* those of this folder, then the ones that open() was given */
};

static struct cpu_device *cpu_device_of(const struct device *device)
{
	return device->state;
}

/*
 * The kernels call BLAS from inside OpenMP regions, each thread on its own block: BLAS's own
 * threads would spin against OpenMP's on the same cores.
 */
static enum status cpu_open(const char *which, const struct kernel *const *more,
                            struct device **device)
{
	struct cpu_device *cpu = calloc(1, sizeof *cpu);

	if (which && *which && strcmp(which, "0") != 0) {
		free(cpu);
		return status_set(STATUS_INVALID,
		                  "--device: backend cpu has one device, 0, not '%.64s'", which);
	}
	if (cpu)
		cpu->kernels = kernels_joined(cpu_kernels, more);
	if (!cpu || !cpu->kernels) {
		free(cpu);
		return status_set(STATUS_OOM, "no memory for a device");
	}
	openblas_set_num_threads(1);
	cpu->reference = (struct device){.backend = &cpu_backend,
	                                 .activation = DTYPE_F64,
	                                 .wide = DTYPE_F64,
	                                 .kernels = reference_kernels,
	                                 .state = cpu};
	cpu->base = (struct device){.backend = &cpu_backend,
	                            .activation = DTYPE_F32,
	                            .wide = DTYPE_F32,
	                            .kernels = cpu->kernels,
	                            .others = cpu->kernels + kernels_count(cpu_kernels),
	                            .state = cpu,
	                            .reference = &cpu->reference};
	*device = &cpu->base;
	return STATUS_OK;
}

static void cpu_close(struct device *device)
{
	struct cpu_device *cpu = cpu_device_of(device);

	free(cpu->flush_buffer);
	free(cpu->kernels);
	free(cpu);
}

/* The first unsigned number after `key` in a file of lines; false if there is none. */
static bool read_number(const char *path, const char *key, uint64_t *number)
{
	FILE *file = fopen(path, "r");
	char line[256];
	bool found = false;

	if (!file)
		return false;
	while (!found && fgets(line, sizeof line, file))
		found = strncmp(line, key, strlen(key)) == 0 &&
		        sscanf(line + strlen(key), "%" SCNu64, number) == 1;
	fclose(file);
	return found;
}

/*
 * Lowers *total and *available to what the control group in `directory` allows. The files are
 * named limit_name and usage_name; its page cache can be reclaimed and does not count as used.
 */
static void apply_group_limit(const char *directory, const char *limit_name, const char *usage_name,
                              size_t *total, size_t *available)
{
	char path[512];
	uint64_t limit, used, cache = 0;

	snprintf(path, sizeof path, "%s/%s", directory, limit_name);
	if (!read_number(path, "", &limit))
		return;
	snprintf(path, sizeof path, "%s/%s", directory, usage_name);
	if (!read_number(path, "", &used))
		return;
	snprintf(path, sizeof path, "%s/memory.stat", directory);
	if (!read_number(path, "total_inactive_file ", &cache))
		read_number(path, "inactive_file ", &cache);
	used -= cache < used ? cache : used;
	size_t left = used < limit ? (size_t)(limit - used) : 0;
	*total = limit < *total ? (size_t)limit : *total;
	*available = left < *available ? left : *available;
}

/* Applies the limits of the control group `path` below `root` and of all its ancestors. */
static void apply_group_limits(const char *root, const char *path, const char *limit_name,
                               const char *usage_name, size_t *total, size_t *available)
{
	char directory[384];
	int length = snprintf(directory, sizeof directory, "%s%s", root, path);

	if (length < 0 || (size_t)length >= sizeof directory)
		return;
	for (char *end = directory + length; end && (size_t)(end - directory) >= strlen(root);
	     end = strrchr(directory, '/')) {
		*end = '\0';
		apply_group_limit(directory, limit_name, usage_name, total, available);
	}
}

/*
 * Bytes of address space that are left under `ulimit -v`; SIZE_MAX without one. OpenBLAS maps a
 * buffer for every thread that multiplies, sooner or later, and waits for ever if it cannot; which
 * it already has nobody knows.
 */
static size_t address_space_left(void)
{
	const size_t buffers = (size_t)omp_get_max_threads() * BLAS_BUFFER_BYTES;
	struct rlimit limit;
	uint64_t pages = 0;

	if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY ||
	    !read_number("/proc/self/statm", "", &pages))
		return SIZE_MAX;
	const size_t used = (size_t)pages * PAGE_BYTES + buffers;

	return used < limit.rlim_cur ? (size_t)limit.rlim_cur - used : 0;
}

/*
 * The threads that OpenBLAS starts map their buffers at once, and try again until they can. Under
 * a limit that leaves no room they never end, and exit() would wait for them: the last handler to
 * be registered, which is the first to run, ends the process.
 */
static void leave_without_waiting(int code, void *unused)
{
	fflush(NULL);
	_exit(code);
}

__attribute__((constructor)) static void prepare_exit(void)
{
	if (address_space_left() != SIZE_MAX)
		on_exit(leave_without_waiting, NULL);
}

/* Memory that can be taken without the kernel killing somebody for it. */
static void memory_sizes(size_t *total, size_t *available)
{
	uint64_t kib = 0;
	char line[320];
	FILE *groups = fopen("/proc/self/cgroup", "r");

	*total = read_number("/proc/meminfo", "MemTotal:", &kib) ? (size_t)kib * 1024 : SIZE_MAX;
	*available =
	        read_number("/proc/meminfo", "MemAvailable:", &kib) ? (size_t)kib * 1024 : *total;
	while (groups && fgets(line, sizeof line, groups)) {
		char *controller = strchr(line, ':');
		char *path = controller ? strchr(controller + 1, ':') : NULL;

		if (!path)
			continue;
		*path++ = '\0';
		path[strcspn(path, "\n")] = '\0';
		if (strcmp(controller, ":memory") == 0)
			apply_group_limits("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
			                   "memory.usage_in_bytes", total, available);
		else if (strcmp(controller, ":") == 0)
			apply_group_limits("/sys/fs/cgroup", path, "memory.max", "memory.current",
			                   total, available);
	}
	if (groups)
		fclose(groups);
	const size_t left = address_space_left();
	*available = left < *available ? left : *available;
}

static void cpu_model(char *name, size_t size)
{
	FILE *file = fopen("/proc/cpuinfo", "r");
	struct utsname system;
	char line[256];

	snprintf(name, size, "%s", uname(&system) == 0 ? system.machine : "cpu");
	while (file && fgets(line, sizeof line, file)) {
		const char *colon = strchr(line, ':');

		if (strncmp(line, "model name", strlen("model name")) != 0 || !colon)
			continue;
		line[strcspn(line, "\n")] = '\0';
		snprintf(name, size, "%s", colon + 1 + strspn(colon + 1, " "));
		break;
	}
	if (file)
		fclose(file);
}

static enum status cpu_info(struct device *device, struct device_info *info)
{
	struct utsname system;

	*info = (struct device_info){.n_threads = omp_get_max_threads()};
	cpu_model(info->name, sizeof info->name);
	if (uname(&system) == 0)
		snprintf(info->driver, sizeof info->driver, "%.63s", system.release);
	snprintf(info->runtime, sizeof info->runtime, "%s", openblas_get_config());
	memory_sizes(&info->memory_total, &info->memory_free);
	return STATUS_OK;
}

/*
 * Every page is touched at once, by all threads: what was granted is then really there, the next
 * request sees it as used, and no timed region pays for page faults.
 */
static void touch_pages(char *memory, size_t bytes)
{
#pragma omp parallel for schedule(static)
	for (size_t i = 0; i < bytes; i += PAGE_BYTES)
		memory[i] = 0;
}

static enum status cpu_allocate(struct device *device, size_t bytes, void **memory)
{
	size_t total, available;
	size_t alignment = bytes >= 2 * HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : PAGE_BYTES;

	*memory = NULL;
	memory_sizes(&total, &available);
	/* What is left over keeps the page tables and everybody else alive. */
	if (bytes > available - available / 32)
		return status_set(STATUS_OOM, "%zu bytes wanted, %zu available", bytes, available);
	size_t rounded = (bytes + alignment - 1) / alignment * alignment;
	char *taken = aligned_alloc(alignment, rounded ? rounded : alignment);
	if (!taken)
		return status_set(STATUS_OOM, "%zu bytes wanted, the allocator refuses", bytes);
	if (alignment == HUGE_PAGE_BYTES)
		madvise(taken, rounded, MADV_HUGEPAGE);
	touch_pages(taken, rounded);
	*memory = taken;
	return STATUS_OK;
}

static void cpu_release(struct device *device, void *memory)
{
	free(memory);
}

/* Caches of 100 GiB are copied and filled; one thread would take tens of seconds. */
enum { PIECE_BYTES = 1 << 20 };

static size_t piece_at(size_t first, size_t bytes)
{
	return bytes - first < PIECE_BYTES ? bytes - first : (size_t)PIECE_BYTES;
}

static enum status cpu_copy(struct device *device, void *to, const void *from, size_t bytes)
{
#pragma omp parallel for schedule(static) if (bytes > PIECE_BYTES)
	for (size_t i = 0; i < bytes; i += PIECE_BYTES)
		memcpy((char *)to + i, (const char *)from + i, piece_at(i, bytes));
	return STATUS_OK;
}

static enum status cpu_fill(struct device *device, void *memory, int byte, size_t bytes)
{
#pragma omp parallel for schedule(static) if (bytes > PIECE_BYTES)
	for (size_t i = 0; i < bytes; i += PIECE_BYTES)
		memset((char *)memory + i, byte, piece_at(i, bytes));
	return STATUS_OK;
}

static enum status cpu_synchronize(struct device *device)
{
	return STATUS_OK;
}

static double seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* How often a thread of ours has had to make way for somebody else. */
static int64_t involuntary_switches(void)
{
	struct rusage usage;

	return getrusage(RUSAGE_SELF, &usage) == 0 ? usage.ru_nivcsw : 0;
}

static enum status cpu_stopwatch_start(struct device *device)
{
	struct cpu_device *cpu = cpu_device_of(device);

	cpu->switches_before = involuntary_switches();
	cpu->stopwatch_started = seconds_now();
	return STATUS_OK;
}

static enum status cpu_stopwatch_stop(struct device *device, double *milliseconds)
{
	struct cpu_device *cpu = cpu_device_of(device);

	*milliseconds = 1e3 * (seconds_now() - cpu->stopwatch_started);
	cpu->switches = involuntary_switches() - cpu->switches_before;
	return STATUS_OK;
}

/* Processes and threads of the machine that run or want to, besides ours. */
static int64_t runnable_others(void)
{
	FILE *file = fopen("/proc/loadavg", "r");
	int64_t running, others = -1;

	if (!file)
		return -1;
	if (fscanf(file, "%*f %*f %*f %" SCNd64, &running) == 1) {
		others = running - omp_get_max_threads();
		others = others > 0 ? others : 0;
	}
	fclose(file);
	return others;
}

static void cpu_conditions(struct device *device, struct conditions *conditions)
{
	*conditions = conditions_unknown();
	conditions->switches = cpu_device_of(device)->switches;
	conditions->others = runnable_others();
}

/* Bytes of the largest cache that the first CPU sees; 32 MiB where the system does not say. */
static size_t last_level_cache_bytes(void)
{
	size_t largest = 0;

	for (int i = 0; i < 8; i++) {
		char path[96];
		uint64_t kib;

		snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
		if (read_number(path, "", &kib) && kib * 1024 > largest)
			largest = (size_t)kib * 1024;
	}
	return largest ? largest : (size_t)32 << 20;
}

/* Streams over twice the last-level cache; every thread a part, to clear its private caches too. */
static enum status cpu_flush_cache(struct device *device)
{
	struct cpu_device *cpu = cpu_device_of(device);

	if (!cpu->flush_buffer) {
		void *memory;
		cpu->flush_bytes = 2 * last_level_cache_bytes();
		enum status status = cpu_allocate(device, cpu->flush_bytes, &memory);

		if (status != STATUS_OK)
			return status;
		cpu->flush_buffer = memory;
	}
	char *buffer = cpu->flush_buffer;
#pragma omp parallel for schedule(static)
	for (size_t i = 0; i < cpu->flush_bytes; i += LINE_BYTES)
		buffer[i]++;
	return STATUS_OK;
}

static enum status cpu_gather(struct device *device, const struct gather *gather, void *to)
{
	gather_on_host(gather, to);
	return STATUS_OK;
}

static enum status cpu_count_nonfinite(struct device *device, const struct gather *region,
                                       int64_t *n)
{
	*n = nonfinite_on_host(region);
	return STATUS_OK;
}

static enum status cpu_add(struct device *device, int64_t count, const void *from, void *to)
{
	const float *addend = from;
	float *sum = to;

#pragma omp parallel for simd schedule(static)
	for (int64_t i = 0; i < count; i++)
		sum[i] += addend[i];
	return STATUS_OK;
}

static enum status cpu_add_directions(struct device *device, const struct strided *rows,
                                      const struct directions *directions)
{
	add_directions_on_host(rows, directions);
	return STATUS_OK;
}

static void cpu_range_push(struct device *device, const char *name)
{
}

static void cpu_range_pop(struct device *device)
{
}

const struct backend cpu_backend = {
        .name = "cpu",
        .activation = DTYPE_F32,
        .open = cpu_open,
        .close = cpu_close,
        .info = cpu_info,
        .allocate = cpu_allocate,
        .release = cpu_release,
        .upload = cpu_copy,
        .download = cpu_copy,
        .fill = cpu_fill,
        .synchronize = cpu_synchronize,
        .stopwatch_start = cpu_stopwatch_start,
        .stopwatch_stop = cpu_stopwatch_stop,
        .conditions = cpu_conditions,
        .flush_cache = cpu_flush_cache,
        .count_nonfinite = cpu_count_nonfinite,
        .gather = cpu_gather,
        .add = cpu_add,
        .add_directions = cpu_add_directions,
        .range_push = cpu_range_push,
        .range_pop = cpu_range_pop,
};
