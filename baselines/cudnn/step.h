/* What cuDNN's decode, and FlashAttention-3's as it is used here, leave to others. */
#ifndef BASELINES_CUDNN_STEP_H
#define BASELINES_CUDNN_STEP_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Writes the rotated q [batch, n_heads, d_head] to q_out, the rotated k and v to the cache, and
 * to query_lengths and key_lengths [batch] how many queries (1) and cached keys there are, unless
 * both are NULL.
 */
enum status cudnn_step_prepare(struct device *device, const struct attention_step_args *args,
                               void *q_out, int32_t *query_lengths, int32_t *key_lengths);

#ifdef __cplusplus
}
#endif

#endif
