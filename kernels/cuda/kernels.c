/* The list of CUDA kernels, preferred providers first. */
#include "kernels/cuda/cuda_backend.h"

const struct kernel cuda_kernels[] = {
        {0},
};
