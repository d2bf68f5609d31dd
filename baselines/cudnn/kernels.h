/*
 * The cuDNN baseline.
 *
 * cudnn_attention: no own token or gate, every mask but chunk; fused kernels chosen by cuDNN.
 * cudnn_attention_backward: of the same arguments; dq is summed in fp32 in the workspace.
 * cudnn_attention_step: a kernel rotates q and k and fills the cache, cuDNN attends.
 */
#ifndef BASELINES_CUDNN_KERNELS_H
#define BASELINES_CUDNN_KERNELS_H

#include "kernels/cuda/kernel_list.h"

/* clang-format off */
#define CUDNN_KERNELS(X)                                                                           \
	X(ATTENTION, "cudnn", cudnn_attention, checked, workspace)                                 \
	X(ATTENTION_BACKWARD, "cudnn", cudnn_attention_backward, checked, workspace)               \
	X(ATTENTION_STEP, "cudnn", cudnn_attention_step, checked, workspace)
/* clang-format on */

KERNEL_LIST_DECLARATION(cudnn_kernels, CUDNN_KERNELS);

#endif
