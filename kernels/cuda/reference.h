/* The fp64 reference of kernels/reference, running on the device. */
#ifndef KERNELS_CUDA_REFERENCE_H
#define KERNELS_CUDA_REFERENCE_H

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/reference/reference.h"

extern const struct reference_device cuda_reference;

#ifdef __cplusplus
}
#endif

#endif
