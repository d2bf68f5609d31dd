#include "baselines/flash3/kernels.h"

#include "baselines/flash3/library.h"

CUDA_KERNEL_LIST(flash3_kernels, FLASH3_KERNELS, {.unsupported = flash3_library_name});
