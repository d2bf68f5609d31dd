#include "kernels/portable/kernels.h"

CUDA_KERNEL_LIST(portable_kernels, PORTABLE_KERNELS, {0});
