/* Starting kernels, and the shared memory they are given. */
#ifndef KERNELS_PORTABLE_LAUNCH_CUH
#define KERNELS_PORTABLE_LAUNCH_CUH

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"

/* What launch() was asked for, the same for every kernel. */
extern __shared__ __align__(128) unsigned char shared_memory[];

/*
 * Submits a kernel to the device's stream, with `shared` bytes of dynamic
 * shared memory; an error names the operation.
 */
template <typename... Parameters, typename... Arguments>
static enum status launch(struct device *device, const char *operation,
                          void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                          Arguments... arguments)
{
	cudaLaunchConfig_t config = {};

	config.gridDim = grid;
	config.blockDim = dim3((unsigned)threads);
	config.dynamicSmemBytes = shared;
	config.stream = cuda_stream(device);
	if (shared > 48 * 1024) {
		enum status status = cuda_status(
		        cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
		                             cudaFuncAttributeMaxDynamicSharedMemorySize,
		                             (int)shared),
		        operation, __FILE__, __LINE__);
		if (status != STATUS_OK)
			return status;
	}
	return cuda_status(
	        cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
	        operation, __FILE__, __LINE__);
}

#endif
