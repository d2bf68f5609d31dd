#include "baselines/cudnn/kernels.h"

#include "baselines/cudnn/library.h"

CUDA_KERNEL_LIST(cudnn_kernels, CUDNN_KERNELS, {.unsupported = cudnn_library_name});
