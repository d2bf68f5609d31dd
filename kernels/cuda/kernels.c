/* The list of CUDA kernels: for each operation the preferred providers first. */
#include "baselines/cublas/cublas.h"
#include "baselines/cudnn/cudnn.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/hopper.h"
#include "kernels/portable/portable.h"

const struct kernel cuda_kernels[] = {
        {OP_NORM_LINEAR, "portable", portable_norm_linear_unsupported,
         portable_norm_linear_workspace, portable_norm_linear},
        {OP_LINEAR_RESIDUAL, "portable", portable_linear_residual_unsupported,
         portable_linear_residual_workspace, portable_linear_residual},
        {OP_ROTATE, "portable", portable_rotate_unsupported, NULL, portable_rotate},
        {OP_ATTENTION, "hopper", hopper_attention_unsupported, hopper_attention_workspace,
         hopper_attention},
        {OP_ATTENTION, "portable", portable_attention_unsupported, NULL, portable_attention},
        {OP_ATTENTION, "cudnn", cudnn_attention_unsupported, cudnn_attention_workspace,
         cudnn_attention},
        {OP_ATTENTION, "cublas", cublas_attention_unsupported, cublas_attention_workspace,
         cublas_attention},
        {OP_ATTENTION_STEP, "hopper", hopper_attention_step_unsupported,
         hopper_attention_step_workspace, hopper_attention_step},
        {OP_ATTENTION_STEP, "portable", portable_attention_step_unsupported,
         portable_attention_step_workspace, portable_attention_step},
        {OP_ATTENTION_STEP, "cudnn", cudnn_attention_step_unsupported,
         cudnn_attention_step_workspace, cudnn_attention_step},
        {OP_RAT_SCAN, "portable", portable_rat_scan_unsupported, NULL, portable_rat_scan},
        {OP_RAT_STEP, "hopper", hopper_rat_step_unsupported, hopper_rat_step_workspace,
         hopper_rat_step},
        {OP_RAT_STEP, "portable", portable_rat_step_unsupported, portable_rat_step_workspace,
         portable_rat_step},
        {OP_RECURRENCE, "portable", portable_recurrence_unsupported, portable_recurrence_workspace,
         portable_recurrence},
        {OP_RECURRENCE_STEP, "portable", portable_recurrence_step_unsupported, NULL,
         portable_recurrence_step},
        {OP_MATRIX_RECURRENCE, "portable", portable_matrix_recurrence_unsupported,
         portable_matrix_recurrence_workspace, portable_matrix_recurrence},
        {OP_MATRIX_RECURRENCE_STEP, "portable", portable_matrix_recurrence_step_unsupported, NULL,
         portable_matrix_recurrence_step},
        {OP_DECAY_GATE, "portable", portable_decay_gate_unsupported, NULL, portable_decay_gate},
        {OP_NORM_GATE, "portable", portable_norm_gate_unsupported, NULL, portable_norm_gate},
        {OP_GELU, "portable", NULL, NULL, portable_gelu},
        {OP_EMBEDDING, "portable", portable_embedding_unsupported, NULL, portable_embedding},
        {OP_CROSS_ENTROPY, "portable", portable_cross_entropy_unsupported, NULL,
         portable_cross_entropy},
        {OP_ARGMAX, "portable", NULL, NULL, portable_argmax},
        {0},
};
