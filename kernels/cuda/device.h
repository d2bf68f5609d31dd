/* The backend's own kernels: they keep time and evict the cache. All are submitted to `stream`. */
#ifndef KERNELS_CUDA_DEVICE_H
#define KERNELS_CUDA_DEVICE_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What clock_kernel measured: SM cycles and nanoseconds of the same interval. */
struct clock_sample {
	uint64_t cycles, nanoseconds;
};

/* Succeeds iff this build has code for the current device. */
cudaError_t device_code_present(void);

/*
 * Holds the stream until *gate reaches `ticket`, so that a host which submits
 * work more slowly than the device runs it leaves no gaps in what is timed.
 * Gives up after `limit_ns`: whatever waits for the device meanwhile cannot deadlock.
 */
cudaError_t device_hold(cudaStream_t stream, const int *gate, int ticket, uint64_t limit_ns);

/* Keeps one thread busy for `ns` nanoseconds. */
cudaError_t device_spin(cudaStream_t stream, uint64_t ns);

/* Counts SM cycles for `ns` nanoseconds into *sample (pinned host memory). */
cudaError_t device_clock(cudaStream_t stream, uint64_t ns, struct clock_sample *sample);

/* Reads `bytes` at `buffer`; whatever else the L2 cache held is evicted, and nothing in it is
 * dirty. */
cudaError_t device_read(cudaStream_t stream, const void *buffer, size_t bytes);

/* Copies `bytes`, a multiple of 16; the buffers must not overlap. */
cudaError_t device_copy(cudaStream_t stream, void *to, const void *from, size_t bytes);

/* `count` random bf16 values, uniform in -1 .. 1, reproducible from `seed`. */
cudaError_t device_random(cudaStream_t stream, void *memory, size_t count, uint32_t seed);

/* Elements 0 .. count-1 of a stream of normal(0, scale), as bf16 or as fp32. */
cudaError_t device_normal(cudaStream_t stream, void *memory, bool bf16, int64_t count, float scale,
                          uint64_t seed, uint64_t noise_stream);

/* Adds to *found (device memory) how many elements of bf16 or fp32 are NaN or Inf. */
cudaError_t device_count_nonfinite(cudaStream_t stream, const void *memory, bool bf16,
                                   int64_t count, unsigned long long *found);

#ifdef __cplusplus
}
#endif

#endif
