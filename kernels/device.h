/*
 * A backend is a kind of place where tensors live and operations run, "cpu" or "cuda": one struct
 * of function pointers each. A device is a handle to one such place: its memory, the one queue
 * that its work is submitted to, its kernels, and all that libraries keep for it. Several can be
 * open at once. Nothing above kernels/ knows which backend it has been given.
 */
#ifndef KERNELS_DEVICE_H
#define KERNELS_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/noise.h"
#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Element types. I32 holds tokens and positions, F64 the tensors of the reference. */
enum dtype { DTYPE_F32, DTYPE_BF16, DTYPE_I32, DTYPE_F64 };

/* Bytes of one element. */
size_t dtype_size(enum dtype dtype);

/* "fp32", "bf16", "int32", "fp64": what the CSV calls it. */
const char *dtype_name(enum dtype dtype);

struct kernel;
struct device;
struct directions;
struct gather;
struct strided;

/* What a row says about the device. Strings are owned by the caller's struct. */
struct device_info {
	char name[128];                   /* CPU model or GPU name */
	char driver[64];                  /* driver version, or the kernel's release on a CPU */
	char runtime[128];                /* CUDA toolkit version, or the BLAS library's version */
	size_t memory_total, memory_free; /* bytes; free is sampled by info() */
	int n_threads;                    /* CPU threads used; 0 on CUDA */
};

/* Why a clock is lower than it could be: bits of conditions.throttle. */
enum throttle {
	THROTTLE_POWER = 1,    /* a power limit, in software */
	THROTTLE_HEAT = 2,     /* a temperature limit, in software or hardware */
	THROTTLE_HARDWARE = 4, /* slowdown by the hardware, power brake included */
	THROTTLE_UNKNOWN = -1, /* nobody could be asked */
};

/* Under which conditions the work between the last start and stop of the stopwatch ran. */
struct conditions {
	double clock_mhz; /* of the processors over that time; NAN: unknown */
	int throttle;     /* while it ran: bits of enum throttle, or THROTTLE_UNKNOWN */
	double power_w;   /* near it; NAN: unknown */
	/* What others did to it on a CPU: involuntary context switches, and processes that wanted
	 * to run at its end besides this one's threads; -1: unknown, or of no meaning. */
	int64_t switches, others;
};

/* Nothing known. */
struct conditions conditions_unknown(void);

/* What the device can do at most, measured when first asked for. */
struct ceilings {
	double copy_gb_per_s; /* bytes read and written */
	double read_gb_per_s;
	double gemm_tflops; /* of the backend's own matrix products */
};

/* Some rows of every sequence, ascending. */
struct row_list {
	int64_t count;
	const int64_t *rows;
};

/*
 * The base of every backend's handle. Filled by open(); kernels find what they need of it through
 * their backend's functions (kernels/cuda/cuda_backend.h).
 */
struct device {
	const struct backend *backend;
	enum dtype activation; /* element of activations and weight matrices */
	/* Element of what argument structs call float: fp32, and fp64 on the reference's device. */
	enum dtype wide;
	/*
	 * Every implementation of every operation, for each operation from the
	 * one to prefer to the last resort; ends with an entry whose run is NULL.
	 */
	const struct kernel *kernels;
	/* Where among them those begin that are not the backend's own; NULL: nowhere. */
	const struct kernel *others;
	void *state; /* the backend's own */
	/*
	 * The same place once more, where every floating-point tensor holds doubles
	 * and the kernels are the fp64 reference; NULL on that handle itself. Lives as
	 * long as this handle.
	 */
	struct device *reference;
	/* Kernels that would add up in another order at every run do not, or refuse. */
	bool deterministic;
	/* Of operations over pairs of tokens the reference computes these rows alone; NULL: all. */
	const struct row_list *rows;
	/* The reference's first token, where a sequence is cut: positions count from it. */
	int64_t first_token;
	/* In the reference decays of recurrences with sigmoid gates are off by this, at random: one
	 * close to 1 is rounded as 1 is. 0: they are not. */
	double decay_jitter;
	uint64_t decay_seed;
	struct ceilings ceilings;
};

/*
 * Every function but open gets the device first; use the device_...() functions below. Those that
 * fail return a status and leave a message.
 */
struct backend {
	const char *name;
	enum dtype activation;

	/*
	 * Opens a device: the first one ("" or NULL), or the one with this index, UUID or PCI
	 * address. `more`: lists of kernels beside the backend's own, which come after them in
	 * order of preference; NULL, or an array that ends with NULL. Says in one line why if it
	 * cannot.
	 */
	enum status (*open)(const char *which, const struct kernel *const *more,
	                    struct device **device);
	void (*close)(struct device *device);
	enum status (*info)(struct device *device, struct device_info *info);

	/* Memory of the device, at least 256-byte aligned; contents undefined. */
	enum status (*allocate)(struct device *device, size_t bytes, void **memory);
	void (*release)(struct device *device, void *memory);
	enum status (*upload)(struct device *device, void *to, const void *host, size_t bytes);
	enum status (*download)(struct device *device, void *host, const void *from, size_t bytes);
	enum status (*fill)(struct device *device, void *memory, int byte, size_t bytes);
	/* Waits for all work and reports any error it met. */
	enum status (*synchronize)(struct device *device);
	/* Submits work to the caller's queue (a cudaStream_t) from now on; NULL where work is not
	 * queued. */
	enum status (*use_stream)(struct device *device, void *stream);

	/*
	 * Stopwatch: the time between start and stop in milliseconds, of the work
	 * submitted between them (device events on CUDA, the clock on a CPU).
	 */
	enum status (*stopwatch_start)(struct device *device);
	enum status (*stopwatch_stop)(struct device *device, double *milliseconds);
	/* Of the time that stopwatch_stop() gave last. */
	void (*conditions)(struct device *device, struct conditions *conditions);
	/* Evicts the last-level cache so that the next sample starts cold. */
	enum status (*flush_cache)(struct device *device);
	/*
	 * Measures the device's memory: GB/s of copying (bytes read and written)
	 * and of reading alone. NULL where the device's memory is the host's:
	 * the harness then measures that.
	 */
	enum status (*bandwidth)(struct device *device, double *copy_gb_per_s,
	                         double *read_gb_per_s);

	/*
	 * What the host would be slow at where tensors are large and far away;
	 * normal_floats is NULL where the host does it: elements 0 .. count-1
	 * of a stream of normal(0, scale) (kernels/noise.h) as type `dtype`.
	 * count_nonfinite: *n = how many elements of a strided tensor are NaN or Inf. gather: see
	 * device_gather(). add: to += from, of device->wide.
	 */
	enum status (*normal_floats)(struct device *device, enum dtype dtype, void *memory,
	                             int64_t count, float scale, uint64_t seed, uint64_t stream);
	enum status (*count_nonfinite)(struct device *device, const struct gather *region,
	                               int64_t *n);
	enum status (*gather)(struct device *device, const struct gather *gather, void *to);
	enum status (*add)(struct device *device, int64_t count, const void *from, void *to);
	/* To queries or keys, [sequence, position, head, channel]: what their directions add to
	 * them (kernels/data.h). */
	enum status (*add_directions)(struct device *device, const struct strided *rows,
	                              const struct directions *directions);

	/* Named ranges for a profiler (NVTX on CUDA, nothing on a CPU). */
	void (*range_push)(struct device *device, const char *name);
	void (*range_pop)(struct device *device);
};

enum { GATHER_DIMS = 4 };

/* Elements of a strided tensor, to be copied into a dense one of doubles. */
struct gather {
	enum dtype dtype; /* of `from`; to: doubles, or int32 where that is int32 */
	const void *from; /* the first element */
	int64_t size[GATHER_DIMS], stride[GATHER_DIMS]; /* outermost first; strides in elements */
	/* Of the dimension `listed`: which indices, size[listed] of them, on the host; NULL: 0, 1,
	 * ... */
	const int64_t *list;
	int listed;
	/* Of floating-point elements: by how much each becomes larger or smaller at random,
	 * relative to itself; each row, as where a weight of the row was rounded; and by itself. */
	double jitter, row_jitter, absolute;
	uint64_t seed;
};

/* Elements of a tensor that are to be written; size and stride as above. */
struct strided {
	enum dtype dtype;
	void *data;
	int64_t size[GATHER_DIMS], stride[GATHER_DIMS];
};

/* Element i of the dense tensor, off as is said above. */
NOISE_FUNCTION double gather_jittered(const struct gather *g, int64_t i, double value)
{
	const double sign = noise_sign(g->seed, 0, (uint64_t)i);
	const double of_row = noise_sign(g->seed, 1, (uint64_t)(i / g->size[3]));

	return value * (1 + g->jitter * sign + g->row_jitter * of_row) + g->absolute * sign;
}

extern const struct backend cpu_backend;

/* The list of backends this build has, ending with NULL; cpu is always there. */
extern const struct backend *const backends[];

/* The backend called `name`, or NULL. */
const struct backend *backend_find(const char *name);

static inline void device_close(struct device *device)
{
	device->backend->close(device);
}

static inline enum status device_info(struct device *device, struct device_info *info)
{
	return device->backend->info(device, info);
}

static inline enum status device_allocate(struct device *device, size_t bytes, void **memory)
{
	return device->backend->allocate(device, bytes, memory);
}

static inline void device_release(struct device *device, void *memory)
{
	device->backend->release(device, memory);
}

static inline enum status device_upload(struct device *device, void *to, const void *host,
                                        size_t bytes)
{
	return device->backend->upload(device, to, host, bytes);
}

static inline enum status device_download(struct device *device, void *host, const void *from,
                                          size_t bytes)
{
	return device->backend->download(device, host, from, bytes);
}

static inline enum status device_fill(struct device *device, void *memory, int byte, size_t bytes)
{
	return device->backend->fill(device, memory, byte, bytes);
}

static inline enum status device_synchronize(struct device *device)
{
	return device->backend->synchronize(device);
}

static inline enum status device_stopwatch_start(struct device *device)
{
	return device->backend->stopwatch_start(device);
}

static inline enum status device_stopwatch_stop(struct device *device, double *milliseconds)
{
	return device->backend->stopwatch_stop(device, milliseconds);
}

static inline void device_conditions(struct device *device, struct conditions *conditions)
{
	device->backend->conditions(device, conditions);
}

static inline enum status device_flush_cache(struct device *device)
{
	return device->backend->flush_cache(device);
}

/* Uploads `count` floats as the element type `dtype` (F32, BF16 or F64). */
enum status device_upload_floats(struct device *device, enum dtype dtype, void *to,
                                 const float *host, size_t count);
/* Downloads `count` elements of type `dtype` as floats. */
enum status device_download_floats(struct device *device, enum dtype dtype, float *host,
                                   const void *from, size_t count);
/* The same for doubles, of any floating-point type. */
enum status device_upload_doubles(struct device *device, enum dtype dtype, void *to,
                                  const double *host, size_t count);
enum status device_download_doubles(struct device *device, enum dtype dtype, double *host,
                                    const void *from, size_t count);

/*
 * Whether a tensor of a b c elements could be in anybody's memory: whether it has at most 2^42. A
 * plan asks before it forms larger products, which then fit into 64 bits.
 */
bool elements_fit(int64_t a, int64_t b, int64_t c);

/* Gathers into memory of the device. */
enum status device_gather(struct device *device, const struct gather *gather, void *to);
/* The same by the host, for backends whose memory it can reach. */
void gather_on_host(const struct gather *gather, void *to);
int64_t nonfinite_on_host(const struct gather *gather);
void add_directions_on_host(const struct strided *rows, const struct directions *directions);

#ifdef __cplusplus
}
#endif

#endif
