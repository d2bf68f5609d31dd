/* Prototypes of the cuBLAS baseline, listed in kernels/cuda/kernels.c as provider "cublas". */
#ifndef BASELINES_CUBLAS_CUBLAS_H
#define BASELINES_CUBLAS_CUBLAS_H

#include <stddef.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * OP_ATTENTION without own token or gate, every mask but chunk: all T x T
 * scores at once, as attention was done before fused kernels. Its workspace
 * grows with B H T^2.
 */
const char *cublas_attention_unsupported(const void *args);
size_t cublas_attention_workspace(const void *args);
enum status cublas_attention(const void *args, void *workspace);

/* OP_MATRIX_RECURRENCE with the plain rule and no, constant or scalar decay, chunk by chunk. */
const char *cublas_matrix_recurrence_unsupported(const void *args);
size_t cublas_matrix_recurrence_workspace(const void *args);
enum status cublas_matrix_recurrence(const void *args, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
