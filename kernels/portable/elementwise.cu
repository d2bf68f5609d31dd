/* GELU, its gradient and the embedding: one thread per eight elements. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 256 };

static __device__ __forceinline__ float gelu(float x)
{
	return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

static __global__ void __launch_bounds__(THREADS) gelu_kernel(const bf16 *x, bf16 *y, int64_t count)
{
	const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	float v[8];

	if (i + 8 <= count) {
		load8(v, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			v[j] = gelu(v[j]);
		store8(y + i, v);
		return;
	}
	for (int64_t j = i; j < count; j++)
		y[j] = __float2bfloat16(gelu(__bfloat162float(x[j])));
}

extern "C" enum status portable_gelu(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct gelu_args *>(args);
	const dim3 grid((unsigned)divide_up(divide_up(a->count, 8), THREADS));

	return launch(device, "gelu", gelu_kernel, grid, THREADS, 0,
	              static_cast<const bf16 *>(a->x), static_cast<bf16 *>(a->y), a->count);
}

/* d/dx gelu(x) = Phi(x) + x phi(x). */
static __device__ __forceinline__ float gelu_slope(float x)
{
	return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) +
	       x * 0.39894228040143268f * __expf(-0.5f * x * x);
}

static __global__ void __launch_bounds__(THREADS)
        gelu_backward_kernel(const bf16 *x, const bf16 *dy, bf16 *dx, int64_t count)
{
	const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	float v[8], d[8];

	if (i + 8 <= count) {
		load8(v, x + i);
		load8(d, dy + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			d[j] *= gelu_slope(v[j]);
		store8(dx + i, d);
		return;
	}
	for (int64_t j = i; j < count; j++)
		dx[j] = __float2bfloat16(__bfloat162float(dy[j]) *
		                         gelu_slope(__bfloat162float(x[j])));
}

extern "C" enum status portable_gelu_backward(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct gelu_backward_args *>(args);
	const dim3 grid((unsigned)divide_up(divide_up(a->count, 8), THREADS));

	return launch(device, "gelu_backward", gelu_backward_kernel, grid, THREADS, 0,
	              static_cast<const bf16 *>(a->x), static_cast<const bf16 *>(a->dy),
	              static_cast<bf16 *>(a->dx), a->count);
}

static __global__ void __launch_bounds__(THREADS)
        embedding_kernel(const int32_t *tokens, const bf16 *table, bf16 *y, int64_t n_tokens,
                         int64_t d)
{
	const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t n = i / (d / 8), column = i % (d / 8) * 8;

	if (n < n_tokens)
		*reinterpret_cast<vector8 *>(y + n * d + column) =
		        load8(table + tokens[n] * d + column);
}

extern "C" const char *portable_embedding_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct embedding_args *>(args);

	return check_widths(a->d_model);
}

extern "C" enum status portable_embedding(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct embedding_args *>(args);
	const dim3 grid((unsigned)divide_up(a->n_tokens * (a->d_model / 8), THREADS));

	return launch(device, "embedding", embedding_kernel, grid, THREADS, 0, a->tokens,
	              static_cast<const bf16 *>(a->table), static_cast<bf16 *>(a->y), a->n_tokens,
	              a->d_model);
}
