/*
 * Gates of the linear-attention family: Mamba-2's time step, the delta rules' gate, HGRN's forget
 * gate, and the norm behind a gate. All are bound by memory; a thread takes eight channels of one
 * token, of the delta rules one head.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128 };

static __device__ __forceinline__ float silu(float x)
{
	return x * sigmoid(x);
}

static __global__ void __launch_bounds__(THREADS)
        time_step_kernel(const __grid_constant__ struct time_step_args a)
{
	const int64_t width = a.n_heads * a.d_head;
	const int64_t index = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	const int64_t n = index / width, column = index % width, h = column / a.d_head;
	float x[8];

	if (n >= a.n_tokens)
		return;
	const float logit =
	        __bfloat162float(static_cast<const bf16 *>(a.logit)[n * a.logit_stride + h]) +
	        a.bias[h];
	const float dt = softplus(logit);
	load8(x, static_cast<const bf16 *>(a.x) + n * a.x_stride + column);
#pragma unroll
	for (int i = 0; i < 8; i++)
		x[i] *= dt;
	store8(static_cast<bf16 *>(a.out) + index, x);
	if (column % a.d_head == 0)
		static_cast<bf16 *>(a.log_decay)[n * a.n_heads + h] =
		        __float2bfloat16(-__expf(a.log_rate[h]) * dt);
}

extern "C" const char *portable_time_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct time_step_args *>(args);

	return either(check_widths(a->d_head, a->x_stride), check_aligned(a->x));
}

extern "C" enum status portable_time_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct time_step_args *>(args);
	const int64_t threads = a->n_tokens * a->n_heads * (a->d_head / 8);

	return launch_each(device, "time_step", time_step_kernel, threads, THREADS, *a);
}

static __global__ void __launch_bounds__(THREADS)
        delta_gate_kernel(const __grid_constant__ struct delta_gate_args a)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t n = index / a.n_heads, h = index % a.n_heads, from = n * a.stride + h;

	if (n >= a.n_tokens)
		return;
	const float logit = __bfloat162float(static_cast<const bf16 *>(a.logit)[from]);
	static_cast<bf16 *>(a.beta)[index] = __float2bfloat16(sigmoid(logit));
	if (!a.decay_logit)
		return;
	const float step = softplus(
	        __bfloat162float(static_cast<const bf16 *>(a.decay_logit)[from]) + a.bias[h]);
	static_cast<bf16 *>(a.log_decay)[index] = __float2bfloat16(-__expf(a.log_rate[h]) * step);
}

extern "C" enum status portable_delta_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct delta_gate_args *>(args);

	return launch_each(device, "delta_gate", delta_gate_kernel, a->n_tokens * a->n_heads,
	                   THREADS, *a);
}

/* 1-f = sigmoid(-bound) sigmoid(-logit) never cancels; ln f is taken from the smaller of f, 1-f. */
static __global__ void __launch_bounds__(THREADS)
        forget_gate_kernel(const __grid_constant__ struct forget_gate_args a)
{
	const int64_t index = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	const int64_t n = index / a.width, column = index % a.width;
	float logit[8], x[8], bound[8], log_decay[8], key[8];

	if (n >= a.n_tokens)
		return;
	load8(logit, static_cast<const bf16 *>(a.logit) + n * a.stride + column);
	load8(x, static_cast<const bf16 *>(a.x) + n * a.stride + column);
	load8f(bound, a.bound + column);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float closed = sigmoid(-logit[i]);
		const float f = sigmoid(logit[i]) + sigmoid(bound[i]) * closed;

		key[i] = sigmoid(-bound[i]) * closed;
		log_decay[i] = key[i] < 0.5f ? log_1_plus(-key[i]) : __logf(f);
		x[i] = silu(x[i]) * (a.key ? 1.0f : key[i]);
	}
	store8(static_cast<bf16 *>(a.log_decay) + index, log_decay);
	store8(static_cast<bf16 *>(a.out) + index, x);
	if (a.key)
		store8(static_cast<bf16 *>(a.key) + index, key);
}

extern "C" const char *portable_forget_gate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct forget_gate_args *>(args);

	return either(check_widths(a->width, a->stride), check_aligned(a->logit, a->x));
}

extern "C" enum status portable_forget_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct forget_gate_args *>(args);
	const int64_t threads = a->n_tokens * (a->width / 8);

	return launch_each(device, "forget_gate", forget_gate_kernel, threads, THREADS, *a);
}

/* Eight elements before the norm, from `column` of token n on. */
static __device__ __forceinline__ void load_gated(float (&u)[8], const struct gate_norm_args &a,
                                                  int64_t n, int64_t column)
{
	float other[8];

	load8(u, static_cast<const bf16 *>(a.x) + n * a.n_heads * a.d_head + column);
	if (a.skip) {
		const float weight = a.skip_weight[column / a.d_head];

		load8(other, static_cast<const bf16 *>(a.skip) + n * a.skip_stride + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			u[j] = fmaf(weight, other[j], u[j]);
	}
	if (a.gate) {
		load8(other, static_cast<const bf16 *>(a.gate) + n * a.gate_stride + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			u[j] *= silu(other[j]);
	}
}

/* `lanes` lanes take a group of one token; its second reading comes from the L1 cache. */
static __global__ void __launch_bounds__(THREADS)
        gate_norm_kernel(const __grid_constant__ struct gate_norm_args a, int lanes)
{
	const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
	const bool valid = row < a.n_tokens * a.groups;
	const int lane = threadIdx.x % lanes;
	const int64_t n = valid ? row / a.groups : 0, g = valid ? row % a.groups : 0;
	const int64_t width = a.n_heads * a.d_head, group = width / a.groups;
	float sum = 0.0f, u[8], w[8];

	for (int64_t i = 8 * lane; i < group; i += 8 * lanes) {
		load_gated(u, a, n, g * group + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum += u[j] * u[j];
	}
	const float r = rsqrtf(group_sum(sum, lanes) / (float)group + a.eps);
	for (int64_t i = 8 * lane; valid && i < group; i += 8 * lanes) {
		load_gated(u, a, n, g * group + i);
		load8f(w, a.weight + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			u[j] *= r * w[j];
		store8(static_cast<bf16 *>(a.out) + n * width + g * group + i, u);
	}
	if (valid && a.rstd && lane == 0)
		a.rstd[row] = r;
}

extern "C" const char *portable_gate_norm_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct gate_norm_args *>(args);

	return either(check_widths(a->d_head, a->n_heads * a->d_head / a->groups,
	                           a->skip ? a->skip_stride : 0, a->gate ? a->gate_stride : 0),
	              check_aligned(a->skip, a->gate));
}

extern "C" enum status portable_gate_norm(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct gate_norm_args *>(args);
	const int lanes = lanes_for(a->n_heads * a->d_head / a->groups);
	const int64_t threads = a->n_tokens * a->groups * lanes;

	return launch_each(device, "gate_norm", gate_norm_kernel, threads, THREADS, *a, lanes);
}
