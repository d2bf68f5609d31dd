/*
 * Prototypes of the kernels for any GPU from compute capability 8.0, listed in
 * kernels/cuda/kernels.c as provider "portable". Names and meanings are those
 * of struct kernel: portable_<operation>, with _unsupported and _workspace
 * where it has them. All want views and rows that are 16-byte aligned.
 */
#ifndef KERNELS_PORTABLE_PORTABLE_H
#define KERNELS_PORTABLE_PORTABLE_H

#include <stddef.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

const char *portable_norm_linear_unsupported(const void *args);
size_t portable_norm_linear_workspace(const void *args);
enum status portable_norm_linear(const void *args, void *workspace);

const char *portable_norm_linear_backward_unsupported(const void *args);
size_t portable_norm_linear_backward_workspace(const void *args);
enum status portable_norm_linear_backward(const void *args, void *workspace);

const char *portable_linear_residual_unsupported(const void *args);
size_t portable_linear_residual_workspace(const void *args);
enum status portable_linear_residual(const void *args, void *workspace);

const char *portable_linear_residual_backward_unsupported(const void *args);
size_t portable_linear_residual_backward_workspace(const void *args);
enum status portable_linear_residual_backward(const void *args, void *workspace);

const char *portable_rotate_unsupported(const void *args);
enum status portable_rotate(const void *args, void *workspace);

const char *portable_rotate_backward_unsupported(const void *args);
enum status portable_rotate_backward(const void *args, void *workspace);

const char *portable_attention_unsupported(const void *args);
enum status portable_attention(const void *args, void *workspace);

const char *portable_attention_backward_unsupported(const void *args);
size_t portable_attention_backward_workspace(const void *args);
enum status portable_attention_backward(const void *args, void *workspace);

const char *portable_attention_step_unsupported(const void *args);
size_t portable_attention_step_workspace(const void *args);
enum status portable_attention_step(const void *args, void *workspace);

const char *portable_rat_scan_unsupported(const void *args);
enum status portable_rat_scan(const void *args, void *workspace);

const char *portable_rat_scan_backward_unsupported(const void *args);
size_t portable_rat_scan_backward_workspace(const void *args);
enum status portable_rat_scan_backward(const void *args, void *workspace);

const char *portable_rat_step_unsupported(const void *args);
size_t portable_rat_step_workspace(const void *args);
enum status portable_rat_step(const void *args, void *workspace);

const char *portable_recurrence_unsupported(const void *args);
size_t portable_recurrence_workspace(const void *args);
enum status portable_recurrence(const void *args, void *workspace);

const char *portable_recurrence_backward_unsupported(const void *args);
size_t portable_recurrence_backward_workspace(const void *args);
enum status portable_recurrence_backward(const void *args, void *workspace);

const char *portable_recurrence_step_unsupported(const void *args);
enum status portable_recurrence_step(const void *args, void *workspace);

const char *portable_matrix_recurrence_unsupported(const void *args);
size_t portable_matrix_recurrence_workspace(const void *args);
enum status portable_matrix_recurrence(const void *args, void *workspace);
const char *portable_recurrent_form_unsupported(const void *args);
enum status portable_recurrent_form(const void *args, void *workspace);

const char *portable_matrix_recurrence_backward_unsupported(const void *args);
size_t portable_matrix_recurrence_backward_workspace(const void *args);
enum status portable_matrix_recurrence_backward(const void *args, void *workspace);

const char *portable_matrix_recurrence_step_unsupported(const void *args);
enum status portable_matrix_recurrence_step(const void *args, void *workspace);

const char *portable_decay_gate_unsupported(const void *args);
enum status portable_decay_gate(const void *args, void *workspace);

const char *portable_decay_gate_backward_unsupported(const void *args);
size_t portable_decay_gate_backward_workspace(const void *args);
enum status portable_decay_gate_backward(const void *args, void *workspace);

const char *portable_norm_gate_unsupported(const void *args);
enum status portable_norm_gate(const void *args, void *workspace);

const char *portable_norm_gate_backward_unsupported(const void *args);
size_t portable_norm_gate_backward_workspace(const void *args);
enum status portable_norm_gate_backward(const void *args, void *workspace);

const char *portable_rotate_step_unsupported(const void *args);
enum status portable_rotate_step(const void *args, void *workspace);

const char *portable_short_conv_unsupported(const void *args);
enum status portable_short_conv(const void *args, void *workspace);

const char *portable_short_conv_backward_unsupported(const void *args);
size_t portable_short_conv_backward_workspace(const void *args);
enum status portable_short_conv_backward(const void *args, void *workspace);

const char *portable_short_conv_step_unsupported(const void *args);
enum status portable_short_conv_step(const void *args, void *workspace);

const char *portable_time_step_unsupported(const void *args);
enum status portable_time_step(const void *args, void *workspace);

const char *portable_time_step_backward_unsupported(const void *args);
size_t portable_time_step_backward_workspace(const void *args);
enum status portable_time_step_backward(const void *args, void *workspace);

const char *portable_forget_gate_unsupported(const void *args);
enum status portable_forget_gate(const void *args, void *workspace);

const char *portable_forget_gate_backward_unsupported(const void *args);
size_t portable_forget_gate_backward_workspace(const void *args);
enum status portable_forget_gate_backward(const void *args, void *workspace);

const char *portable_gate_norm_unsupported(const void *args);
enum status portable_gate_norm(const void *args, void *workspace);

const char *portable_gate_norm_backward_unsupported(const void *args);
size_t portable_gate_norm_backward_workspace(const void *args);
enum status portable_gate_norm_backward(const void *args, void *workspace);

enum status portable_gelu(const void *args, void *workspace);
enum status portable_gelu_backward(const void *args, void *workspace);

const char *portable_embedding_unsupported(const void *args);
enum status portable_embedding(const void *args, void *workspace);

const char *portable_embedding_backward_unsupported(const void *args);
size_t portable_embedding_backward_workspace(const void *args);
enum status portable_embedding_backward(const void *args, void *workspace);

size_t portable_cross_entropy_workspace(const void *args);
enum status portable_cross_entropy(const void *args, void *workspace);

enum status portable_argmax(const void *args, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
