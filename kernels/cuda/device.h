/* The backend's own kernels: they keep time, evict the cache, fill and look at memory. All are
 * submitted to the stream of a device that is active. */
#ifndef KERNELS_CUDA_DEVICE_H
#define KERNELS_CUDA_DEVICE_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* SM cycles and nanoseconds of the same interval. */
struct clock_sample {
	uint64_t cycles, nanoseconds;
};

/* Succeeds iff this build has code for the current device. */
cudaError_t code_is_present(void);

/*
 * Holds the stream until *gate reaches `ticket`, so that a host which submits
 * work more slowly than the device runs it leaves no gaps in what is timed.
 * Gives up after `limit_ns`: whatever waits for the device meanwhile cannot deadlock.
 */
cudaError_t submit_hold(struct device *device, const int *gate, int ticket, uint64_t limit_ns);

/* Keeps one thread busy for `ns` nanoseconds. */
cudaError_t submit_spin(struct device *device, uint64_t ns);

/* When a multiprocessor passed submit_clock_start(), by its own count of cycles and by the timer;
 * it is forgotten by submit_clock_stop(). */
struct clock_start {
	uint64_t cycles, nanoseconds;
};

/* Takes one for each of n multiprocessors, on the device. */
cudaError_t clock_starts_take(int n, struct clock_start **starts);

/*
 * The clock over the work submitted between these two: both counters of the multiprocessor on which
 * the second runs, since the first, and for at least `ns` nanoseconds, into *sample (pinned host
 * memory). Where the first missed that multiprocessor it is the clock of `ns` after the work.
 */
cudaError_t submit_clock_start(struct device *device, struct clock_start *starts);
cudaError_t submit_clock_stop(struct device *device, struct clock_start *starts, uint64_t ns,
                              struct clock_sample *sample);

/* Reads `bytes` at `buffer`; whatever else the L2 cache held is evicted, and nothing in it is
 * dirty. */
cudaError_t submit_read(struct device *device, const void *buffer, size_t bytes);

/* Copies `bytes`, a multiple of 16; the buffers must not overlap. */
cudaError_t submit_copy(struct device *device, void *to, const void *from, size_t bytes);

/* `count` random bf16 values, uniform in -1 .. 1, reproducible from `seed`. */
cudaError_t submit_random(struct device *device, void *memory, size_t count, uint32_t seed);

/* Elements 0 .. count-1 of a stream of normal(0, scale), of any floating-point type. */
cudaError_t submit_normal(struct device *device, void *memory, enum dtype dtype, int64_t count,
                          float scale, uint64_t seed, uint64_t noise_stream);

/* Adds to *found (device memory) how many elements of any floating-point type are NaN or Inf. */
cudaError_t submit_count_nonfinite(struct device *device, const struct gather *region,
                                   unsigned long long *found);

/* backend.gather, with the list in the device's memory. */
cudaError_t submit_gather(struct device *device, const struct gather *gather, const int64_t *list,
                          void *to);

/* backend.add_directions, for any floating-point type. */
cudaError_t submit_add_directions(struct device *device, const struct strided *rows,
                                  const struct directions *directions);

/* to += from, of device->wide. */
cudaError_t submit_add(struct device *device, int64_t count, const void *from, void *to);

#ifdef __cplusplus
}
#endif

#endif
