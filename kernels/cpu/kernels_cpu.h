/*
 * Every kernel of the CPU provider: fp32 tensors, OpenMP threads. `args` is the argument struct of
 * the operation (kernels/kernels.h) that the function is named after; `workspace` has at least the
 * bytes that the kernel asks for, planned for omp_get_max_threads() threads, and is 64-byte
 * aligned. All return STATUS_OK; arguments are trusted.
 */
#ifndef KERNELS_CPU_KERNELS_CPU_H
#define KERNELS_CPU_KERNELS_CPU_H

#include "kernels/kernel_list.h"

/* clang-format off */
#define CPU_KERNELS(X)                                                                             \
	X(NORM_LINEAR, "cpu", cpu_norm_linear, any, none)                                          \
	X(NORM_LINEAR_BACKWARD, "cpu", cpu_norm_linear_backward, any, workspace)                   \
	X(LINEAR_RESIDUAL, "cpu", cpu_linear_residual, any, none)                                  \
	X(LINEAR_RESIDUAL_BACKWARD, "cpu", cpu_linear_residual_backward, any, workspace)           \
	X(ROTATE, "cpu", cpu_rotate, checked, workspace)                                           \
	X(ROTATE_BACKWARD, "cpu", cpu_rotate_backward, checked, workspace)                         \
	X(ATTENTION, "cpu", cpu_attention, checked, workspace)                             \
	X(ATTENTION_BACKWARD, "cpu", cpu_attention_backward, checked, workspace)           \
	X(ATTENTION_STEP, "cpu", cpu_attention_step, any, workspace)                               \
	X(RAT_SCAN, "cpu", cpu_rat_scan, any, workspace)                                           \
	X(RAT_SCAN_BACKWARD, "cpu", cpu_rat_scan_backward, any, workspace)                         \
	X(RAT_STEP, "cpu", cpu_rat_step, any, workspace)                                           \
	X(RECURRENCE, "cpu", cpu_recurrence, checked, workspace)                           \
	X(RECURRENCE_BACKWARD, "cpu", cpu_recurrence_backward, checked, workspace)         \
	X(RECURRENCE_STEP, "cpu", cpu_recurrence_step, checked, none)                      \
	X(RATPLUS_STEP, "cpu", cpu_ratplus_step, any, workspace)                                   \
	X(SELECTIVE_SCAN, "cpu", cpu_selective_scan, any, workspace)                               \
	X(SELECTIVE_SCAN_BACKWARD, "cpu", cpu_selective_scan_backward, any, workspace)             \
	X(SELECTIVE_SCAN_STEP, "cpu", cpu_selective_scan_step, any, workspace)                     \
	X(MATRIX_RECURRENCE, "cpu", cpu_matrix_recurrence, checked, workspace)             \
	X(MATRIX_RECURRENCE_BACKWARD, "cpu", cpu_matrix_recurrence_backward, checked, workspace)\
	X(MATRIX_RECURRENCE_STEP, "cpu", cpu_matrix_recurrence_step, checked, workspace)   \
	X(DECAY_GATE, "cpu", cpu_decay_gate, checked, workspace)                                   \
	X(DECAY_GATE_BACKWARD, "cpu", cpu_decay_gate_backward, checked, workspace)                 \
	X(NORM_GATE, "cpu", cpu_norm_gate, checked, none)                                          \
	X(NORM_GATE_BACKWARD, "cpu", cpu_norm_gate_backward, checked, workspace)                   \
	X(ROTATE_STEP, "cpu", cpu_rotate_step, checked, workspace)                                 \
	X(SHORT_CONV, "cpu", cpu_short_conv, checked, none)                                        \
	X(SHORT_CONV_BACKWARD, "cpu", cpu_short_conv_backward, checked, workspace)                 \
	X(SHORT_CONV_STEP, "cpu", cpu_short_conv_step, checked, none)                              \
	X(TIME_STEP, "cpu", cpu_time_step, any, none)                                              \
	X(TIME_STEP_BACKWARD, "cpu", cpu_time_step_backward, any, workspace)                       \
	X(DELTA_GATE, "cpu", cpu_delta_gate, any, none)                                            \
	X(DELTA_GATE_BACKWARD, "cpu", cpu_delta_gate_backward, any, workspace)                     \
	X(FORGET_GATE, "cpu", cpu_forget_gate, any, workspace)                                     \
	X(FORGET_GATE_BACKWARD, "cpu", cpu_forget_gate_backward, any, workspace)                   \
	X(GATE_NORM, "cpu", cpu_gate_norm, any, none)                                              \
	X(GATE_NORM_BACKWARD, "cpu", cpu_gate_norm_backward, any, workspace)                       \
	X(BLOCK_LINEAR, "cpu", cpu_block_linear, any, none)                                        \
	X(BLOCK_LINEAR_BACKWARD, "cpu", cpu_block_linear_backward, any, none)                      \
	X(LRU_GATE, "cpu", cpu_lru_gate, any, workspace)                                           \
	X(LRU_GATE_BACKWARD, "cpu", cpu_lru_gate_backward, any, workspace)                         \
	X(GELU_GATE, "cpu", cpu_gelu_gate, any, none)                                              \
	X(GELU_GATE_BACKWARD, "cpu", cpu_gelu_gate_backward, any, none)                            \
	X(L2_NORM, "cpu", cpu_l2_norm, any, none)                                                  \
	X(L2_NORM_BACKWARD, "cpu", cpu_l2_norm_backward, any, none)                                \
	X(TOKEN_SHIFT, "cpu", cpu_token_shift, checked, none)                                      \
	X(TOKEN_SHIFT_BACKWARD, "cpu", cpu_token_shift_backward, checked, workspace)               \
	X(TOKEN_SHIFT_STEP, "cpu", cpu_token_shift_step, checked, none)                            \
	X(GELU, "cpu", cpu_gelu, any, none)                                                        \
	X(GELU_BACKWARD, "cpu", cpu_gelu_backward, any, none)                                      \
	X(EMBEDDING, "cpu", cpu_embedding, any, none)                                              \
	X(EMBEDDING_BACKWARD, "cpu", cpu_embedding_backward, any, none)                            \
	X(CROSS_ENTROPY, "cpu", cpu_cross_entropy, any, none)                                      \
	X(ARGMAX, "cpu", cpu_argmax, any, none)
/* clang-format on */

KERNEL_LIST_DECLARATION(cpu_kernels, CPU_KERNELS);

#endif
