#include "baselines/cublas/kernels.h"

CUDA_KERNEL_LIST(cublas_kernels, CUBLAS_KERNELS, {0});
