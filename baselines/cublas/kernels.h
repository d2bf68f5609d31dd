/*
 * The cuBLAS baseline.
 *
 * cublas_attention: no own token or gate, every mask but chunk: all T x T scores at once, as
 *   attention was done before fused kernels. Its workspace grows with B H T^2.
 * cublas_matrix_recurrence: the plain rule and no, constant or scalar decay, chunk by chunk.
 */
#ifndef BASELINES_CUBLAS_KERNELS_H
#define BASELINES_CUBLAS_KERNELS_H

#include "kernels/cuda/kernel_list.h"

/* clang-format off */
#define CUBLAS_KERNELS(X)                                                                          \
	X(ATTENTION, "cublas", cublas_attention, rounding, workspace)                              \
	X(MATRIX_RECURRENCE, "cublas", cublas_matrix_recurrence, checked, workspace)
/* clang-format on */

KERNEL_LIST_DECLARATION(cublas_kernels, CUBLAS_KERNELS);

#endif
