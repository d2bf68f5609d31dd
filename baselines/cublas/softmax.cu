/* Masked softmax of stored scores, one block per row. */
#include "baselines/cublas/softmax.h"
#include "kernels/portable/device.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP };

/* The block's maximum or sum of one value per thread, for all threads. */
template <bool SUM> static __device__ __forceinline__ float reduce_block(float x)
{
	float *shared = reinterpret_cast<float *>(shared_memory);

	for (int offset = WARP / 2; offset > 0; offset /= 2) {
		const float other = __shfl_xor_sync(0xffffffffu, x, offset);

		x = SUM ? x + other : fmaxf(x, other);
	}
	__syncthreads();
	if (threadIdx.x % WARP == 0)
		shared[threadIdx.x / WARP] = x;
	__syncthreads();
	x = shared[0];
	for (int w = 1; w < WARPS; w++)
		x = SUM ? x + shared[w] : fmaxf(x, shared[w]);
	return x;
}

static __global__ void __launch_bounds__(THREADS)
        softmax_kernel(const __grid_constant__ struct attention_args a, bf16 *scores,
                       int64_t stride)
{
	const int64_t row = blockIdx.x, t = row % a.seq_len;
	const int64_t end = a.mask == MASK_FULL ? a.kv_len : min(t + 1, a.kv_len);
	const int64_t begin = a.mask == MASK_WINDOW && t > a.window ? t - a.window : 0;
	bf16 *x = scores + row * stride;
	float top = -INFINITY, sum = 0.0f;

	for (int64_t i = begin + threadIdx.x; i < end; i += THREADS)
		top = fmaxf(top, __bfloat162float(x[i]));
	top = reduce_block<false>(top);
	const float base = top == -INFINITY ? 0.0f : top;
	for (int64_t i = begin + threadIdx.x; i < end; i += THREADS)
		sum += exp2_fast((__bfloat162float(x[i]) - base) * LOG2E);
	sum = reduce_block<true>(sum);
	for (int64_t i = threadIdx.x; i < a.kv_len; i += THREADS) {
		const bool visible = i >= begin && i < end;
		const float p =
		        visible ? exp2_fast((__bfloat162float(x[i]) - base) * LOG2E) / sum : 0.0f;

		x[i] = __float2bfloat16(p);
	}
	if (a.lse && threadIdx.x == 0)
		a.lse[row] = base + logf(sum);
}

extern "C" enum status cublas_softmax(struct device *device, const struct attention_args *a,
                                      void *scores, int64_t stride)
{
	return launch(device, "attention", softmax_kernel,
	              dim3((unsigned)(a->batch * a->n_heads * a->seq_len)), THREADS,
	              WARPS * sizeof(float), *a, static_cast<bf16 *>(scores), stride);
}
