/* Starting kernels. */
#ifndef KERNELS_HOPPER_LAUNCH_CUH
#define KERNELS_HOPPER_LAUNCH_CUH

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"

/* Submits a kernel with `shared` bytes of dynamic shared memory. */
template <typename... Parameters>
enum status submit(struct device *device, void (*kernel)(Parameters...), int64_t blocks,
                   int threads, int shared, const Parameters &...arguments)
{
	CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
	kernel<<<static_cast<unsigned>(blocks), threads, shared, cuda_stream(device)>>>(
	        arguments...);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

/* Blocks that take `items` in turns: no more than one on a multiprocessor. */
static inline int turns(const struct device *device, int64_t items)
{
	const int sms = cuda_sm_count(device);

	return items < sms ? static_cast<int>(items) : sms;
}

/*
 * The same of a kernel that may begin before the one ahead of it in the stream has ended: once
 * every block of the kernel ahead has called let_next_begin() or ended (kernels/hopper/ptx.cuh),
 * and has to call wait_for_previous() before it reads what that kernel writes, or writes anything
 * at all. All such kernels ask for the same division of a multiprocessor between shared memory and
 * cache: blocks of two kernels never meet on one where the divisions differ.
 */
template <typename... Parameters>
enum status launch_early(struct device *device, void (*kernel)(Parameters...), int blocks,
                         int threads, int shared, const Parameters &...arguments)
{
	cudaLaunchConfig_t config = {};
	cudaLaunchAttribute early = {};

	early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	early.val.programmaticStreamSerializationAllowed = 1;
	config.gridDim = dim3(static_cast<unsigned int>(blocks));
	config.blockDim = dim3(static_cast<unsigned int>(threads));
	config.dynamicSmemBytes = static_cast<size_t>(shared);
	config.stream = cuda_stream(device);
	config.attrs = &early;
	config.numAttrs = 1;
	CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
	CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
	                              cudaFuncAttributePreferredSharedMemoryCarveout,
	                              cudaSharedmemCarveoutMaxShared));
	CUDA_TRY(cudaLaunchKernelEx(&config, kernel, arguments...));
	return STATUS_OK;
}

#endif
