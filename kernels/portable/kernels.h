/*
 * The kernels for any GPU from compute capability 8.0. All want views and rows that are 16-byte
 * aligned. The provider of those that are products by cuBLASLt is called by its name.
 */
#ifndef KERNELS_PORTABLE_KERNELS_H
#define KERNELS_PORTABLE_KERNELS_H

#include "kernels/cuda/kernel_list.h"

/* clang-format off */
#define PORTABLE_KERNELS(X)                                                                        \
	X(NORM_LINEAR, "cublaslt", portable_norm_linear, checked, workspace)                       \
	X(NORM_LINEAR_BACKWARD, "cublaslt", portable_norm_linear_backward, checked, workspace)     \
	X(LINEAR_RESIDUAL, "cublaslt", portable_linear_residual, checked, workspace)               \
	X(LINEAR_RESIDUAL_BACKWARD, "cublaslt", portable_linear_residual_backward,                 \
	  checked, workspace)                                                                      \
	X(ROTATE, "portable", portable_rotate, checked, none)                                      \
	X(ROTATE_BACKWARD, "portable", portable_rotate_backward, checked, none)                    \
	X(ATTENTION, "portable", portable_attention, checked, none)                                \
	X(ATTENTION_BACKWARD, "portable", portable_attention_backward, checked, workspace)         \
	X(ATTENTION_STEP, "portable", portable_attention_step, checked, workspace)                 \
	X(RAT_SCAN, "portable", portable_rat_scan, checked, none)                                  \
	X(RAT_SCAN_BACKWARD, "portable", portable_rat_scan_backward, checked, workspace)           \
	X(RAT_STEP, "portable", portable_rat_step, checked, workspace)                             \
	X(RECURRENCE, "portable", portable_recurrence, checked, workspace)                         \
	X(RECURRENCE_BACKWARD, "portable", portable_recurrence_backward, checked, workspace)       \
	X(RECURRENCE_STEP, "portable", portable_recurrence_step, checked, none)                    \
	X(RATPLUS_STEP, "portable", portable_ratplus_step, checked, workspace)                     \
	X(SELECTIVE_SCAN, "portable", portable_selective_scan, checked, workspace)                 \
	X(SELECTIVE_SCAN_BACKWARD, "portable", portable_selective_scan_backward, checked,          \
	  workspace)                                                                               \
	X(SELECTIVE_SCAN_STEP, "portable", portable_selective_scan_step, checked, none)            \
	X(MATRIX_RECURRENCE, "portable", portable_matrix_recurrence, checked, workspace)           \
	X(MATRIX_RECURRENCE, "portable", portable_delta, checked, workspace)                       \
	X(MATRIX_RECURRENCE, "portable", portable_recurrent_form, checked, none)                   \
	X(MATRIX_RECURRENCE_BACKWARD, "portable", portable_matrix_recurrence_backward,             \
	  checked, workspace)                                                                      \
	X(MATRIX_RECURRENCE_BACKWARD, "portable", portable_delta_backward, checked, workspace)     \
	X(MATRIX_RECURRENCE_STEP, "portable", portable_matrix_recurrence_step, checked, none)      \
	X(DECAY_GATE, "portable", portable_decay_gate, checked, none)                              \
	X(DECAY_GATE_BACKWARD, "portable", portable_decay_gate_backward, checked, workspace)       \
	X(NORM_GATE, "portable", portable_norm_gate, checked, none)                                \
	X(NORM_GATE_BACKWARD, "portable", portable_norm_gate_backward, checked, workspace)         \
	X(ROTATE_STEP, "portable", portable_rotate_step, checked, none)                            \
	X(SHORT_CONV, "portable", portable_short_conv, checked, none)                              \
	X(SHORT_CONV_BACKWARD, "portable", portable_short_conv_backward, checked, workspace)       \
	X(SHORT_CONV_STEP, "portable", portable_short_conv_step, checked, none)                    \
	X(TIME_STEP, "portable", portable_time_step, checked, none)                                \
	X(TIME_STEP_BACKWARD, "portable", portable_time_step_backward, checked, workspace)         \
	X(DELTA_GATE, "portable", portable_delta_gate, any, none)                                  \
	X(DELTA_GATE_BACKWARD, "portable", portable_delta_gate_backward, any, workspace)           \
	X(FORGET_GATE, "portable", portable_forget_gate, checked, none)                            \
	X(FORGET_GATE_BACKWARD, "portable", portable_forget_gate_backward, checked, workspace)     \
	X(GATE_NORM, "portable", portable_gate_norm, checked, none)                                \
	X(GATE_NORM_BACKWARD, "portable", portable_gate_norm_backward, checked, workspace)         \
	X(BLOCK_LINEAR, "cublaslt", portable_block_linear, checked, workspace)                     \
	X(BLOCK_LINEAR_BACKWARD, "cublaslt", portable_block_linear_backward, checked, workspace)   \
	X(LRU_GATE, "portable", portable_lru_gate, checked, none)                                  \
	X(LRU_GATE_BACKWARD, "portable", portable_lru_gate_backward, checked, workspace)           \
	X(GELU_GATE, "portable", portable_gelu_gate, checked, none)                                \
	X(GELU_GATE_BACKWARD, "portable", portable_gelu_gate_backward, checked, none)              \
	X(L2_NORM, "portable", portable_l2_norm, checked, none)                                    \
	X(L2_NORM_BACKWARD, "portable", portable_l2_norm_backward, checked, none)                  \
	X(TOKEN_SHIFT, "portable", portable_token_shift, checked, none)                            \
	X(TOKEN_SHIFT_BACKWARD, "portable", portable_token_shift_backward, checked, workspace)     \
	X(TOKEN_SHIFT_STEP, "portable", portable_token_shift_step, checked, none)                  \
	X(GELU, "portable", portable_gelu, any, none)                                              \
	X(GELU_BACKWARD, "portable", portable_gelu_backward, any, none)                            \
	X(EMBEDDING, "portable", portable_embedding, checked, none)                                \
	X(EMBEDDING_BACKWARD, "portable", portable_embedding_backward, checked, workspace)         \
	X(CROSS_ENTROPY, "portable", portable_cross_entropy, any, workspace)                       \
	X(ARGMAX, "portable", portable_argmax, any, none)
/* clang-format on */

KERNEL_LIST_DECLARATION(portable_kernels, PORTABLE_KERNELS);

#endif
