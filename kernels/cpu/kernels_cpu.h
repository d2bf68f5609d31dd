/*
 * Every kernel of the CPU provider: fp32 tensors, OpenMP threads. `args` is the argument struct of
 * the operation (kernels/kernels.h) that the function is named after; `workspace` has at least the
 * bytes that cpu_X_workspace() asks for, planned for omp_get_max_threads() threads, and
 * is 64-byte aligned. All return STATUS_OK; arguments are trusted.
 */
#ifndef KERNELS_CPU_KERNELS_CPU_H
#define KERNELS_CPU_KERNELS_CPU_H

#include <stddef.h>

#include "kernels/kernels.h"

/* The list; ends with an entry whose run is NULL. */
extern const struct kernel cpu_kernels[];

enum status cpu_norm_linear(const void *args, void *workspace);
enum status cpu_norm_linear_backward(const void *args, void *workspace);
enum status cpu_linear_residual(const void *args, void *workspace);
enum status cpu_linear_residual_backward(const void *args, void *workspace);
enum status cpu_rotate(const void *args, void *workspace);
enum status cpu_rotate_backward(const void *args, void *workspace);
enum status cpu_attention(const void *args, void *workspace);
enum status cpu_attention_backward(const void *args, void *workspace);
enum status cpu_attention_step(const void *args, void *workspace);
enum status cpu_rat_scan(const void *args, void *workspace);
enum status cpu_rat_scan_backward(const void *args, void *workspace);
enum status cpu_rat_step(const void *args, void *workspace);
enum status cpu_recurrence(const void *args, void *workspace);
enum status cpu_recurrence_backward(const void *args, void *workspace);
enum status cpu_recurrence_step(const void *args, void *workspace);
enum status cpu_matrix_recurrence(const void *args, void *workspace);
enum status cpu_matrix_recurrence_backward(const void *args, void *workspace);
enum status cpu_matrix_recurrence_step(const void *args, void *workspace);
enum status cpu_decay_gate(const void *args, void *workspace);
enum status cpu_decay_gate_backward(const void *args, void *workspace);
enum status cpu_norm_gate(const void *args, void *workspace);
enum status cpu_norm_gate_backward(const void *args, void *workspace);
enum status cpu_rotate_step(const void *args, void *workspace);
enum status cpu_short_conv(const void *args, void *workspace);
enum status cpu_short_conv_backward(const void *args, void *workspace);
enum status cpu_short_conv_step(const void *args, void *workspace);
enum status cpu_time_step(const void *args, void *workspace);
enum status cpu_time_step_backward(const void *args, void *workspace);
enum status cpu_forget_gate(const void *args, void *workspace);
enum status cpu_forget_gate_backward(const void *args, void *workspace);
enum status cpu_gate_norm(const void *args, void *workspace);
enum status cpu_gate_norm_backward(const void *args, void *workspace);
enum status cpu_gelu(const void *args, void *workspace);
enum status cpu_gelu_backward(const void *args, void *workspace);
enum status cpu_embedding(const void *args, void *workspace);
enum status cpu_embedding_backward(const void *args, void *workspace);
enum status cpu_cross_entropy(const void *args, void *workspace);
enum status cpu_argmax(const void *args, void *workspace);

/* Bytes of workspace wanted for these arguments. */
size_t cpu_norm_linear_backward_workspace(const void *args);
size_t cpu_rotate_workspace(const void *args);
size_t cpu_rotate_backward_workspace(const void *args);
size_t cpu_attention_workspace(const void *args);
size_t cpu_attention_backward_workspace(const void *args);
size_t cpu_attention_step_workspace(const void *args);
size_t cpu_rat_scan_workspace(const void *args);
size_t cpu_rat_scan_backward_workspace(const void *args);
size_t cpu_rat_step_workspace(const void *args);
size_t cpu_recurrence_workspace(const void *args);
size_t cpu_recurrence_backward_workspace(const void *args);
size_t cpu_matrix_recurrence_workspace(const void *args);
size_t cpu_matrix_recurrence_backward_workspace(const void *args);
size_t cpu_matrix_recurrence_step_workspace(const void *args);
size_t cpu_decay_gate_backward_workspace(const void *args);
size_t cpu_norm_gate_backward_workspace(const void *args);
size_t cpu_rotate_step_workspace(const void *args);
size_t cpu_short_conv_backward_workspace(const void *args);
size_t cpu_time_step_backward_workspace(const void *args);
size_t cpu_forget_gate_workspace(const void *args);
size_t cpu_forget_gate_backward_workspace(const void *args);
size_t cpu_gate_norm_backward_workspace(const void *args);

/* NULL, or why the kernel cannot take these arguments. */
const char *cpu_rotate_unsupported(const void *args);
const char *cpu_rotate_backward_unsupported(const void *args);
const char *cpu_rotate_step_unsupported(const void *args);

#endif
