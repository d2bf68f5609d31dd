/* The library that `make flash3` builds, found and opened at run time. */
#ifndef BASELINES_FLASH3_LIBRARY_H
#define BASELINES_FLASH3_LIBRARY_H

#include "baselines/flash3/shim/shim.h"
#include "kernels/device.h"

struct flash3_library {
	size_t (*workspace)(const struct flash3_problem *problem);
	cudaError_t (*forward)(const struct flash3_problem *problem, void *workspace,
	                       cudaStream_t stream);
	size_t (*backward_workspace)(const struct flash3_gradients *gradients);
	cudaError_t (*backward)(const struct flash3_gradients *gradients, void *workspace,
	                        cudaStream_t stream);
	const char *(*version)(void);
	size_t (*problem_size)(void);
};

/*
 * libflash3.so, opened at a device's first call: the file that the environment variable
 * FLASH3_LIBRARY names, or the one in the program's folder or above it. NULL if there is none, and
 * *why says so in a few words (static memory).
 */
const struct flash3_library *flash3_library_get(const struct device *device, const char **why);

/* "FlashAttention-3" and its version, or NULL if there is none; `args` is not read. */
const char *flash3_library_name(const struct device *device, const void *args);

#endif
