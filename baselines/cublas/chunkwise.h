/* The elementwise steps between the products of chunkwise linear attention. */
#ifndef BASELINES_CUBLAS_CHUNKWISE_H
#define BASELINES_CUBLAS_CHUNKWISE_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* decay[(h*B + b)*T + t] = the log decays summed from the first token of t's chunk to t. */
enum status chunkwise_sum_decays(struct device *device, const struct matrix_recurrence_args *a,
                                 int64_t chunk, float *decay);

/*
 * A head of x, [B, T, width], times exp(decay_t), or with `to_end` exp(the chunk's last decay -
 * decay_t); to [B, T, width] dense. decay is the head's [B, T].
 */
enum status chunkwise_scale(struct device *device, const struct matrix_recurrence_args *a,
                            const struct view *x, int64_t head, int64_t width, int64_t chunk,
                            bool to_end, const float *decay, void *to);

/*
 * scores [count, rows, stride] (bf16): zero above the diagonal, times exp(decay_i - decay_j) below.
 * decay NULL: no decay; else that of the first item's first token, items decay_stride apart.
 */
enum status chunkwise_mask(struct device *device, int64_t count, int64_t rows, int64_t stride,
                           const float *decay, int64_t decay_stride, void *scores);

/*
 * states [H, B, C, d_k d_v] (bf16): what each chunk adds becomes the state before it, beginning
 * with a->h0; a->final_state is written where it is wanted.
 */
enum status chunkwise_scan(struct device *device, const struct matrix_recurrence_args *a,
                           int64_t chunk, const float *decay, void *states);

#ifdef __cplusplus
}
#endif

#endif
