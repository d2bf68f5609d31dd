/*
 * The FlashAttention-3 baseline. Without the library that `make flash3` builds all of it is
 * unsupported.
 *
 * flash3_attention, flash3_attention_backward: no own token or gate, every mask except the chunk
 *   mask; d = 64 or 128.
 * flash3_attention_step: at a position that the host knows; a kernel rotates q and k and fills the
 *   cache, FlashAttention-3 attends to what is visible of it, which must be one piece.
 */
#ifndef BASELINES_FLASH3_KERNELS_H
#define BASELINES_FLASH3_KERNELS_H

#include "kernels/cuda/kernel_list.h"

/* clang-format off */
#define FLASH3_KERNELS(X)                                                                          \
	X(ATTENTION, "flash3", flash3_attention, checked, workspace)                               \
	X(ATTENTION_BACKWARD, "flash3", flash3_attention_backward, checked, workspace)             \
	X(ATTENTION_STEP, "flash3", flash3_attention_step, checked, workspace)
/* clang-format on */

KERNEL_LIST_DECLARATION(flash3_kernels, FLASH3_KERNELS);

#endif
