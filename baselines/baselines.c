#include "baselines/baselines.h"

#include <stddef.h>

#ifdef WITH_CUDA
#include "baselines/cublas/kernels.h"
#include "baselines/cudnn/kernels.h"
#include "baselines/flash3/kernels.h"
#endif

const struct kernel *const baseline_kernels[] = {
#ifdef WITH_CUDA
        cudnn_kernels,
        flash3_kernels,
        cublas_kernels,
#endif
        NULL,
};
