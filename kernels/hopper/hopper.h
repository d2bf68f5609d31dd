/* Prototypes of the sm_90a kernels, listed in kernels/cuda/kernels.c as provider "hopper". */
#ifndef KERNELS_HOPPER_HOPPER_H
#define KERNELS_HOPPER_HOPPER_H

#include <stddef.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* OP_ATTENTION; d = 64 or 128, every mask, own token and gate. */
const char *hopper_attention_unsupported(const void *args);
size_t hopper_attention_workspace(const void *args);
enum status hopper_attention(const void *args, void *workspace);

/* OP_ATTENTION_BACKWARD; the same. Sums dq in an order that differs from run to run. */
const char *hopper_attention_backward_unsupported(const void *args);
size_t hopper_attention_backward_workspace(const void *args);
enum status hopper_attention_backward(const void *args, void *workspace);

/* OP_ATTENTION_STEP and OP_RAT_STEP; d = 64 or 128, each head's cache contiguous. */
const char *hopper_attention_step_unsupported(const void *args);
size_t hopper_attention_step_workspace(const void *args);
enum status hopper_attention_step(const void *args, void *workspace);
const char *hopper_rat_step_unsupported(const void *args);
size_t hopper_rat_step_workspace(const void *args);
enum status hopper_rat_step(const void *args, void *workspace);

/* OP_MATRIX_RECURRENCE, plain rule, decays that channels share; d_k up to 256. The form picked by
 * the shape; all on the chip; with the states before chunks of any multiple of 64 in memory. */
const char *hopper_scalar_decay_unsupported(const void *args);
size_t hopper_scalar_decay_workspace(const void *args);
enum status hopper_scalar_decay(const void *args, void *workspace);
size_t hopper_scalar_decay_onchip_workspace(const void *args);
enum status hopper_scalar_decay_onchip(const void *args, void *workspace);
const char *hopper_scalar_decay_materialise_unsupported(const void *args);
size_t hopper_scalar_decay_materialise_workspace(const void *args);
enum status hopper_scalar_decay_materialise(const void *args, void *workspace);

/* OP_MATRIX_RECURRENCE, delta rule, decays that channels share; d_k up to 128. */
const char *hopper_delta_rule_unsupported(const void *args);
enum status hopper_delta_rule(const void *args, void *workspace);

/* OP_MATRIX_RECURRENCE_STEP, every decay and rule. */
const char *hopper_matrix_recurrence_step_unsupported(const void *args);
enum status hopper_matrix_recurrence_step(const void *args, void *workspace);

/* OP_RECURRENCE; any width that is a multiple of 8. */
const char *hopper_recurrence_unsupported(const void *args);
size_t hopper_recurrence_workspace(const void *args);
enum status hopper_recurrence(const void *args, void *workspace);

/* OP_RAT_SCAN; d = 64 or 128. */
const char *hopper_rat_scan_unsupported(const void *args);
size_t hopper_rat_scan_workspace(const void *args);
enum status hopper_rat_scan(const void *args, void *workspace);

/* OP_MATRIX_RECURRENCE: a diagonal decay, the plain rule or the bonus; d_k = 64, 128, 256, d_v up
 * to 512, not 256/64. Fused: one kernel, both widths at most 128. Staged: its operands go through
 * memory. Both take chunks of 16, 32 and 64. Materialise: the states before chunks go through
 * memory, whose lengths are multiples of 64, or T and more. Plain: picks. */
const char *hopper_gla_unsupported(const void *args);
size_t hopper_gla_workspace(const void *args);
enum status hopper_gla(const void *args, void *workspace);
const char *hopper_gla_fused_unsupported(const void *args);
enum status hopper_gla_fused(const void *args, void *workspace);
const char *hopper_gla_staged_unsupported(const void *args);
size_t hopper_gla_staged_workspace(const void *args);
enum status hopper_gla_staged(const void *args, void *workspace);
const char *hopper_gla_materialise_unsupported(const void *args);
size_t hopper_gla_materialise_workspace(const void *args);
enum status hopper_gla_materialise(const void *args, void *workspace);

/* OP_NORM_LINEAR and OP_LINEAR_RESIDUAL of up to 8 tokens. */
const char *hopper_norm_linear_unsupported(const void *args);
enum status hopper_norm_linear(const void *args, void *workspace);
const char *hopper_linear_residual_unsupported(const void *args);
enum status hopper_linear_residual(const void *args, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
