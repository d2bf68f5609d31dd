/* Prototypes of the cuDNN baseline, listed in kernels/cuda/kernels.c as provider "cudnn". */
#ifndef BASELINES_CUDNN_CUDNN_H
#define BASELINES_CUDNN_CUDNN_H

#include <stddef.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* OP_ATTENTION without own token or gate, every mask but chunk; fused kernels chosen by cuDNN. */
const char *cudnn_attention_unsupported(const void *args);
size_t cudnn_attention_workspace(const void *args);
enum status cudnn_attention(const void *args, void *workspace);

/* Its gradients, of the same arguments; dq is summed in fp32 in the workspace. */
const char *cudnn_attention_backward_unsupported(const void *args);
size_t cudnn_attention_backward_workspace(const void *args);
enum status cudnn_attention_backward(const void *args, void *workspace);

/* OP_ATTENTION_STEP: a kernel rotates q and k and fills the cache, cuDNN attends. */
const char *cudnn_attention_step_unsupported(const void *args);
size_t cudnn_attention_step_workspace(const void *args);
enum status cudnn_attention_step(const void *args, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
