/* GLA's two gates: the low-rank decay before the recurrence, the normalized output after it. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/portable.h"

enum { THREADS = 128, TOKENS = 8 };

/* log(1 / (1 + e^-x)); where e^-|x| is small, log(1 + e) by its series. */
static __device__ __forceinline__ float log_sigmoid(float x)
{
	const float e = __expf(-fabsf(x));
	const float log = e < 0.01f ? e * (1.0f - e * (0.5f - e * 0.33333333f)) : __logf(1.0f + e);

	return fminf(x, 0.0f) - log;
}

/* A thread computes two columns of TOKENS tokens, reading each weight once. */
static __global__ void __launch_bounds__(THREADS)
        decay_gate_kernel(const __grid_constant__ struct decay_gate_args a)
{
	const int64_t column = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * 2;
	const int64_t first = (int64_t)blockIdx.x * TOKENS;
	const auto *weight = static_cast<const bf16 *>(a.weight) + column * a.rank;
	float sum[TOKENS][2] = {}, w0[8], w1[8], x[8];

	if (column >= a.d_out)
		return;
	for (int64_t r = 0; r < a.rank; r += 8) {
		load8(w0, weight + r);
		load8(w1, weight + a.rank + r);
#pragma unroll
		for (int i = 0; i < TOKENS; i++) {
			const int64_t n = min(first + i, a.n_tokens - 1);

			load8(x, static_cast<const bf16 *>(a.x) + n * a.x_stride + r);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				sum[i][0] += x[j] * w0[j];
				sum[i][1] += x[j] * w1[j];
			}
		}
	}
	const float bias0 = a.bias[column], bias1 = a.bias[column + 1],
	            factor = 1.0f / a.normalizer;
	auto *out = static_cast<bf16 *>(a.log_decay) + first * a.d_out + column;
#pragma unroll
	for (int i = 0; i < TOKENS; i++)
		if (first + i < a.n_tokens)
			*reinterpret_cast<uint32_t *>(out + i * a.d_out) =
			        pack(factor * log_sigmoid(sum[i][0] + bias0),
			             factor * log_sigmoid(sum[i][1] + bias1));
}

extern "C" const char *portable_decay_gate_unsupported(const void *args)
{
	const auto *a = static_cast<const struct decay_gate_args *>(args);

	return a->rank % 8 || a->x_stride % 8 || a->d_out % 8 ||
	                       reinterpret_cast<uintptr_t>(a->x) % 16
	               ? "rank and widths must be multiples of 8"
	               : NULL;
}

extern "C" enum status portable_decay_gate(const void *args, void *)
{
	const auto *a = static_cast<const struct decay_gate_args *>(args);
	const dim3 grid((unsigned)divide_up(a->n_tokens, TOKENS),
	                (unsigned)divide_up(a->d_out, 2 * THREADS));

	return launch("decay_gate", decay_gate_kernel, grid, THREADS, 0, *a);
}

/* `width` lanes take the head of one token; its second reading comes from the L1 cache. */
static __global__ void __launch_bounds__(THREADS)
        norm_gate_kernel(const __grid_constant__ struct norm_gate_args a, int width)
{
	const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / width;
	const bool valid = row < a.n_tokens * a.n_heads;
	const int lane = threadIdx.x % width;
	const int64_t n = valid ? row / a.n_heads : 0, h = valid ? row % a.n_heads : 0;
	const int64_t offset = h * a.d_head;
	const auto *x = static_cast<const bf16 *>(a.x) + n * a.n_heads * a.d_head + offset;
	const auto *gate = static_cast<const bf16 *>(a.gate) + n * a.gate_stride + offset;
	auto *out = static_cast<bf16 *>(a.out) + n * a.n_heads * a.d_head + offset;
	float sum = 0.0f, v[8], z[8], w[8];

	for (int64_t i = 8 * lane; i < a.d_head; i += 8 * width) {
		load8(v, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum += v[j] * v[j];
	}
	const float r = rsqrtf(group_sum(sum, width) / (float)a.d_head + a.eps);
	for (int64_t i = 8 * lane; valid && i < a.d_head; i += 8 * width) {
		load8(v, x + i);
		load8(z, gate + i);
		load8f(w, a.weight + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			v[j] *= r * w[j] * z[j] * sigmoid(z[j]);
		store8(out + i, v);
	}
	if (valid && a.rstd && lane == 0)
		a.rstd[row] = r;
}

extern "C" const char *portable_norm_gate_unsupported(const void *args)
{
	const auto *a = static_cast<const struct norm_gate_args *>(args);

	return a->d_head % 8 || a->gate_stride % 8 || reinterpret_cast<uintptr_t>(a->gate) % 16
	               ? "widths must be multiples of 8"
	               : NULL;
}

extern "C" enum status portable_norm_gate(const void *args, void *)
{
	const auto *a = static_cast<const struct norm_gate_args *>(args);
	int width = 1;

	while (width < WARP && 8 * width < a->d_head)
		width *= 2;
	const int64_t threads = a->n_tokens * a->n_heads * width;
	return launch("norm_gate", norm_gate_kernel, dim3((unsigned)divide_up(threads, THREADS)),
	              THREADS, 0, *a, width);
}
