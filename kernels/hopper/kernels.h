/*
 * The sm_90a kernels.
 *
 * hopper_norm_linear, hopper_linear_residual: up to 8 tokens, no bias.
 * hopper_attention, hopper_attention_backward: d = 64 or 128, every mask except the dilated one,
 *   own token and gate. The backward sums dq, and dk and dv of heads that share keys, in an order
 *   that differs from run to run, unless the device is to be deterministic.
 * hopper_attention_step, hopper_rat_step: d = 64 or 128, each head's cache contiguous.
 * hopper_grouped_step: the attention_step of heads that share keys, or of any cache; d = 64 or 128.
 * hopper_rat_scan: d = 64 or 128.
 * hopper_recurrence: any width that is a multiple of 8.
 * hopper_scalar_decay: the plain rule, decays that channels share; d_k up to 256. The form picked
 *   by the shape; _onchip: all on the chip; _materialise: the states before chunks of any multiple
 *   of 64 in memory.
 * hopper_scalar_decay_backward: the plain rule, decays that channels share; d_k and d_v up to 128,
 *   or 256 where decays have no gradient.
 * hopper_delta_rule: the delta rule, decays that channels share; d_k up to 128.
 * hopper_kda: the delta rule, a diagonal decay; d_k up to 128.
 * hopper_gla: a diagonal decay, the plain rule or the bonus; d_k = 64, 128, 256, d_v up to 512, not
 *   256/64. _fused: one kernel, both widths at most 128. _staged: its operands go through memory.
 *   Both take chunks of 16, 32 and 64. _materialise: the states before chunks go through memory,
 *   whose lengths are multiples of 64, or T and more. Plain: picks.
 * hopper_gla_backward: a diagonal decay, the plain rule; d_k and d_v 64 or 128; beyond 1024 tokens
 *   sequences times heads must be half as many as multiprocessors.
 * hopper_matrix_recurrence_step: every decay and rule.
 */
#ifndef KERNELS_HOPPER_KERNELS_H
#define KERNELS_HOPPER_KERNELS_H

#include "kernels/cuda/kernel_list.h"

/* clang-format off */
#define HOPPER_KERNELS(X)                                                                          \
	X(NORM_LINEAR, "hopper", hopper_norm_linear, checked, none)                                \
	X(LINEAR_RESIDUAL, "hopper", hopper_linear_residual, checked, none)                        \
	X(ATTENTION, "hopper", hopper_attention, checked, workspace)                               \
	X(ATTENTION_BACKWARD, "hopper", hopper_attention_backward, checked, workspace)             \
	X(ATTENTION_STEP, "hopper", hopper_attention_step, checked, workspace)                     \
	X(ATTENTION_STEP, "hopper", hopper_grouped_step, checked, workspace)                       \
	X(RAT_SCAN, "hopper", hopper_rat_scan, checked, workspace)                                 \
	X(RAT_STEP, "hopper", hopper_rat_step, checked, workspace)                                 \
	X(RECURRENCE, "hopper", hopper_recurrence, checked, workspace)                             \
	X(MATRIX_RECURRENCE, "hopper", hopper_scalar_decay, checked, workspace)                    \
	X(MATRIX_RECURRENCE, "hopper_onchip", hopper_scalar_decay_onchip, checked, workspace)      \
	X(MATRIX_RECURRENCE, "hopper_materialise", hopper_scalar_decay_materialise,                \
	  checked, workspace)                                                                      \
	X(MATRIX_RECURRENCE, "hopper", hopper_delta_rule, checked, workspace)                      \
	X(MATRIX_RECURRENCE, "hopper", hopper_kda, checked, workspace)                             \
	X(MATRIX_RECURRENCE, "hopper", hopper_gla, checked, workspace)                             \
	X(MATRIX_RECURRENCE, "hopper_fused", hopper_gla_fused, checked, none)                      \
	X(MATRIX_RECURRENCE, "hopper_staged", hopper_gla_staged, checked, workspace)               \
	X(MATRIX_RECURRENCE, "hopper_materialise", hopper_gla_materialise, checked, workspace)     \
	X(MATRIX_RECURRENCE_BACKWARD, "hopper", hopper_scalar_decay_backward, checked, workspace)  \
	X(MATRIX_RECURRENCE_BACKWARD, "hopper", hopper_gla_backward, checked, workspace)           \
	X(MATRIX_RECURRENCE_STEP, "hopper", hopper_matrix_recurrence_step, checked, none)
/* clang-format on */

KERNEL_LIST_DECLARATION(hopper_kernels, HOPPER_KERNELS);

#endif
