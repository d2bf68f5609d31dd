/*
 * What the CUDA backend offers to the kernels that run on it: a device's stream and properties,
 * memory for what libraries keep of it, and errors that say where they happened. Included by C
 * and CUDA files.
 */
#ifndef KERNELS_CUDA_CUDA_BACKEND_H
#define KERNELS_CUDA_CUDA_BACKEND_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "kernels/device.h"
#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Its open() takes lists of kernels beside its own. The entry that ends such a list may have an
 * `unsupported`: called without arguments it returns the name and version of the library that
 * these kernels run on, or NULL if that is not there.
 */
extern const struct backend cuda_backend;

/* The fp64 reference, the kernels of device->reference (kernels/cuda/reference.cu). */
extern const struct kernel cuda_reference_kernels[];

/* Makes the device the one that this thread's CUDA calls mean. Kernels are run on it. */
enum status cuda_activate(const struct device *device);

/* The stream that all work is submitted to, one operation after another. */
cudaStream_t cuda_stream(const struct device *device);

/* Multiprocessors. */
int cuda_sm_count(const struct device *device);

/* Whether it runs sm_90a code. */
bool cuda_is_hopper(const struct device *device);

/* Shared memory that one block may have, in bytes. */
size_t cuda_shared_limit(const struct device *device);

/*
 * `bytes` of memory on the host that the device owns, zero when it is first asked for; NULL if
 * there is none. `release` tells one such memory from another: it is called with it before the
 * device is closed, and has to free what the memory holds but not the memory.
 */
void *cuda_slot(const struct device *device, size_t bytes, void (*release)(void *memory));

/* STATUS_OK, or STATUS_CUDA (STATUS_OOM for a failed allocation) with the place and operation. */
enum status cuda_status(cudaError_t error, const char *operation, const char *file, int line);

/* Returns from the calling function, with its status, if a CUDA runtime call fails. */
#define CUDA_TRY(call)                                                                             \
	do {                                                                                       \
		enum status cuda_try_ = cuda_status(call, #call, __FILE__, __LINE__);              \
		if (cuda_try_ != STATUS_OK)                                                        \
			return cuda_try_;                                                          \
	} while (0)

#ifdef __cplusplus
}
#endif

#endif
