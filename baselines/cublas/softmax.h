/* The step between the two products of attention. */
#ifndef BASELINES_CUBLAS_SOFTMAX_H
#define BASELINES_CUBLAS_SOFTMAX_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of scores [B, H, T, stride] (bf16) become probabilities, zero where masked; lse as in args.
 */
enum status cublas_softmax(struct device *device, const struct attention_args *args, void *scores,
                           int64_t stride);

#ifdef __cplusplus
}
#endif

#endif
