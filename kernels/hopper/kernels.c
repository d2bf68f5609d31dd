#include "kernels/hopper/kernels.h"

CUDA_KERNEL_LIST(hopper_kernels, HOPPER_KERNELS, {0});
