#include "kernels/hopper/tensor_map.h"

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

static PFN_cuTensorMapEncodeTiled_v12000 find_encode()
{
	PFN_cuTensorMapEncodeTiled_v12000 encode = NULL;
	cudaDriverEntryPointQueryResult found;

	cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled",
	                                 reinterpret_cast<void **>(&encode), 12000,
	                                 cudaEnableDefault, &found);
	return encode;
}

bool tensor_map_supports(const struct view *view)
{
	return !view->data || (reinterpret_cast<uintptr_t>(view->data) % 16 == 0 &&
	                       view->token % 8 == 0 && view->head % 8 == 0 && view->batch % 8 == 0);
}

enum status tensor_map_encode(CUtensorMap *map, const struct view *view, int64_t batch,
                              int64_t tokens, int64_t heads, int64_t d, int box_tokens)
{
	static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
	const bool shared = view->head == 0; /* no map has a stride of 0 */
	const cuuint64_t dims[4] = {(cuuint64_t)d, (cuuint64_t)tokens,
	                            shared ? 1 : (cuuint64_t)heads, (cuuint64_t)batch};
	const cuuint64_t strides[3] = {(cuuint64_t)view->token * 2,
	                               (cuuint64_t)(shared ? view->token : view->head) * 2,
	                               (cuuint64_t)view->batch * 2};
	const cuuint32_t box[4] = {64, (cuuint32_t)box_tokens, 1, 1};
	const cuuint32_t steps[4] = {1, 1, 1, 1};

	if (!encode)
		return status_set(STATUS_CUDA, "the driver has no cuTensorMapEncodeTiled");
	CUresult result =
	        encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, view->data, dims, strides, box,
	               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
	               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
	if (result != CUDA_SUCCESS)
		return status_set(STATUS_CUDA, "cuTensorMapEncodeTiled: error %d", (int)result);
	return STATUS_OK;
}
