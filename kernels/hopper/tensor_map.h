/* Tensor maps for the copy engine, from the project's views. */
#ifndef KERNELS_HOPPER_TENSOR_MAP_H
#define KERNELS_HOPPER_TENSOR_MAP_H

#include <cuda.h>

#include "kernels/cuda/cuda_backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * A map of the bf16 tensor `view` [batch, tokens, heads, d] with coordinates
 * (d, token, head, batch) and boxes of 64 x box_tokens, 128-byte swizzle: a
 * 128-wide head takes two boxes. Outside the tensor loads give zeros and stores are dropped.
 * Heads without a stride between them are one, whose coordinate is 0. STATUS_CUDA if the driver
 * refuses.
 */
enum status tensor_map_encode(CUtensorMap *map, const struct view *view, int64_t batch,
                              int64_t tokens, int64_t heads, int64_t d, int box_tokens);

/* Whether a view, if there is one, can have a map: 16-byte aligned base and strides. */
bool tensor_map_supports(const struct view *view);

#ifdef __cplusplus
}

/* NULL, or what is amiss: with the device, or with one of the views. */
template <typename... Views>
const char *check_views(const struct device *device, const Views *...views)
{
	if (!cuda_is_hopper(device))
		return "needs compute capability 9.0";
	return (tensor_map_supports(views) && ...) ? NULL : "views must be 16-byte aligned";
}
#endif

#endif
