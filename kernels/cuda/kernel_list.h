/* Lists of CUDA kernels (kernels/kernel_list.h): each is run on the current device, of which a
 * process may have several. */
#ifndef KERNELS_CUDA_KERNEL_LIST_H
#define KERNELS_CUDA_KERNEL_LIST_H

#include "kernels/cuda/cuda_backend.h"
#include "kernels/kernel_list.h"

#define KERNEL_RUNS(function) run_##function
#define KERNEL_RUN(operation, provider, function, check, space)                                    \
	static enum status run_##function(struct device *device, const void *args,                 \
	                                  void *workspace)                                         \
	{                                                                                          \
		enum status status = cuda_activate(device);                                        \
                                                                                                   \
		return status == STATUS_OK ? function(device, args, workspace) : status;           \
	}
#define CUDA_KERNEL_LIST(name, KERNELS, ...)                                                       \
	KERNELS(KERNEL_RUN) KERNEL_LIST(name, KERNELS, __VA_ARGS__)

#endif
