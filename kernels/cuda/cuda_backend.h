/*
 * What the CUDA backend offers to the kernels that run on it: one stream, the
 * properties of the open device, and errors that say where they happened.
 * Included by C and CUDA files; nothing here allocates or synchronizes.
 */
#ifndef KERNELS_CUDA_CUDA_BACKEND_H
#define KERNELS_CUDA_CUDA_BACKEND_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "kernels/backend.h"
#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const struct backend cuda_backend;

/* Every kernel of the CUDA backend, preferred providers first (kernels/cuda/kernels.c). */
extern const struct kernel cuda_kernels[];

/* The stream that all work is submitted to, one operation after another. */
cudaStream_t cuda_stream(void);

/* Multiprocessors of the open device; 1 before a device is open. */
int cuda_sm_count(void);

/* Whether the open device runs sm_90a code. */
bool cuda_is_hopper(void);

/* Shared memory that one block may have, in bytes; 0 before a device is open. */
size_t cuda_shared_limit(void);

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
