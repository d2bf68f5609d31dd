/*
 * A backend is a place where tensors live and operations run: "cpu" or "cuda".
 * One struct of function pointers each; nothing above this file knows which
 * one it has been given.
 */
#ifndef KERNELS_BACKEND_H
#define KERNELS_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Element types. I32 holds tokens and positions. */
enum dtype { DTYPE_F32, DTYPE_BF16, DTYPE_I32 };

/* Bytes of one element. */
size_t dtype_size(enum dtype dtype);

/* "fp32", "bf16", "int32": what the CSV calls it. */
const char *dtype_name(enum dtype dtype);

struct kernel;
struct reference_device;

/* What a row says about the device. Strings are owned by the backend. */
struct device_info {
	char name[128];                   /* CPU model or GPU name */
	char driver[64];                  /* driver version, or the kernel's release on a CPU */
	char runtime[128];                /* CUDA toolkit version, or the BLAS library's version */
	size_t memory_total, memory_free; /* bytes; free is sampled by info() */
	int n_threads;                    /* CPU threads used; 0 on CUDA */
	double sm_clock_mhz;              /* 0 where unknown */
	bool throttled;                   /* a throttle reason other than idle is active */
};

struct backend {
	const char *name;
	enum dtype activation; /* element of activations and weight matrices */

	/* Opens device `index`; says in one line why if it cannot. */
	enum status (*open)(int index);
	void (*close)(void);
	enum status (*info)(struct device_info *info);

	/* Memory of the device, at least 256-byte aligned; contents undefined. */
	enum status (*allocate)(size_t bytes, void **memory);
	void (*release)(void *memory);
	enum status (*upload)(void *device, const void *host, size_t bytes);
	enum status (*download)(void *host, const void *device, size_t bytes);
	enum status (*fill)(void *device, int byte, size_t bytes);
	/* Waits for all work and reports any error it met. */
	enum status (*synchronize)(void);

	/*
	 * Stopwatch: the time between start and stop in milliseconds, of the work
	 * submitted between them (device events on CUDA, the clock on a CPU).
	 */
	enum status (*stopwatch_start)(void);
	enum status (*stopwatch_stop)(double *milliseconds);
	/* Evicts the last-level cache so that the next sample starts cold. */
	enum status (*flush_cache)(void);
	/*
	 * Measures the device's memory: GB/s of copying (bytes read and written)
	 * and of reading alone. NULL where the device's memory is the host's:
	 * the harness then measures that.
	 */
	enum status (*bandwidth)(double *copy_gb_per_s, double *read_gb_per_s);

	/*
	 * What the host would be slow at where tensors are large and far away;
	 * each is NULL where the host does it. normal_floats: elements 0 .. count-1
	 * of a stream of normal(0, scale) (layers/noise.h) as type `dtype`.
	 * count_nonfinite: *n = how many elements are NaN or Inf.
	 */
	enum status (*normal_floats)(enum dtype dtype, void *memory, int64_t count, float scale,
	                             uint64_t seed, uint64_t stream);
	enum status (*count_nonfinite)(enum dtype dtype, const void *memory, int64_t count,
	                               int64_t *n);
	/* The fp64 reference, running on this device (kernels/reference/reference.h). */
	const struct reference_device *reference;

	/* Named ranges for a profiler (NVTX on CUDA, nothing on a CPU). */
	void (*range_push)(const char *name);
	void (*range_pop)(void);

	/*
	 * Every implementation of every operation, for each operation from the
	 * one to prefer to the last resort; ends with an entry whose run is NULL.
	 */
	const struct kernel *kernels;
};

extern const struct backend cpu_backend;

/* The list of backends this build has, ending with NULL; cpu is always there. */
extern const struct backend *const backends[];

/* The backend called `name`, or NULL. */
const struct backend *backend_find(const char *name);

/* Uploads `count` floats as the element type `dtype` (F32 or BF16). */
enum status backend_upload_floats(const struct backend *backend, enum dtype dtype, void *device,
                                  const float *host, size_t count);
/* Downloads `count` elements of type `dtype` as floats. */
enum status backend_download_floats(const struct backend *backend, enum dtype dtype, float *host,
                                    const void *device, size_t count);

#ifdef __cplusplus
}
#endif

#endif
