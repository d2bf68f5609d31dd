/*
 * Gates of the linear-attention family: Mamba-2's time step, the delta rules' gate and HGRN's
 * forget gate. All are bound by memory; a thread takes eight channels of a share of the
 * tokens, of the delta rules one head of one token.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128, PER_SM = 8 };

/* Starts a kernel whose threads have eight columns each of a share of the tokens. */
template <typename Arguments>
static enum status launch_shares(struct device *device, const char *operation,
                                 void (*kernel)(Arguments), int64_t n_tokens, int64_t width,
                                 const Arguments &a)
{
	const int64_t columns = divide_up(width, 8 * THREADS);
	const int64_t shares = count_shares(device, n_tokens, PER_SM, columns);

	return launch(device, operation, kernel, dim3((unsigned)columns, (unsigned)shares), THREADS,
	              0, a);
}

static __device__ __forceinline__ float silu(float x)
{
	return x * sigmoid(x);
}

/* A thread keeps to its channels, and so to their head, for every gridDim.y-th token. */
static __global__ void __launch_bounds__(THREADS, PER_SM)
        time_step_kernel(const __grid_constant__ struct time_step_args a)
{
	const int64_t width = a.n_heads * a.d_head;
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t step = held((int64_t)gridDim.y * a.x_stride);
	const int64_t logit_step = held((int64_t)gridDim.y * a.logit_stride);
	const int64_t out_step = held((int64_t)gridDim.y * width);

	if (column >= width)
		return;
	const int64_t h = column / a.d_head;
	const bf16 *x = static_cast<const bf16 *>(a.x) + blockIdx.y * a.x_stride + column;
	const bf16 *logit = static_cast<const bf16 *>(a.logit) + blockIdx.y * a.logit_stride + h;
	bf16 *out = static_cast<bf16 *>(a.out) + blockIdx.y * width + column;
	bf16 *log_decay = column % a.d_head == 0
	                          ? static_cast<bf16 *>(a.log_decay) + blockIdx.y * a.n_heads + h
	                          : NULL;
	const float bias = a.bias[h], rate = -__expf(a.log_rate[h]);
	vector8 next = load8(x);
	bf16 next_logit = *logit;

	for (int64_t n = blockIdx.y; n < a.n_tokens; n += gridDim.y) {
		const float dt = softplus(__bfloat162float(next_logit) + bias);
		float v[8];

		unpack8(v, next);
		x += step;
		logit += logit_step;
		if (n + gridDim.y < a.n_tokens) {
			next = load8(x);
			next_logit = *logit;
		}
#pragma unroll
		for (int i = 0; i < 8; i++)
			v[i] *= dt;
		store8(out, v);
		out += out_step;
		if (!log_decay)
			continue;
		*log_decay = __float2bfloat16(rate * dt);
		log_decay += (int64_t)gridDim.y * a.n_heads;
	}
}

extern "C" const char *portable_time_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct time_step_args *>(args);

	return either(check_widths(a->d_head, a->x_stride), check_aligned(a->x));
}

extern "C" enum status portable_time_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct time_step_args *>(args);
	return launch_shares(device, "time_step", time_step_kernel, a->n_tokens,
	                     a->n_heads * a->d_head, *a);
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

/* ln f, where f is close to 1 by the series in 1 - f. */
static __device__ __forceinline__ float log_of_forget(float f, float rest)
{
	const float near = -rest * fmaf(rest, fmaf(rest, 0.33333333f, 0.5f), 1.0f);

	return rest < 0.01f ? near : LN2 * log2_fast(f);
}

/* 1-f = sigmoid(-bound) sigmoid(-logit) never cancels. A thread keeps its channels' bounds for
 * every gridDim.y-th token. */
static __global__ void __launch_bounds__(THREADS, PER_SM)
        forget_gate_kernel(const __grid_constant__ struct forget_gate_args a)
{
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t step = held((int64_t)gridDim.y * a.stride);
	const int64_t out_step = held((int64_t)gridDim.y * a.width);
	int64_t strided = blockIdx.y * a.stride + column, row = blockIdx.y * a.width + column;
	float bound[8], open[8], closed[8];
	vector8 next_logit, next_x;

	if (column >= a.width)
		return;
	load8f(bound, a.bound + column);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const struct sigmoids s = sigmoids_of(-LOG2E * bound[i]);

		open[i] = s.of;
		closed[i] = s.of_minus;
	}
	next_logit = load8(static_cast<const bf16 *>(a.logit) + strided);
	next_x = load8(static_cast<const bf16 *>(a.x) + strided);
	for (int64_t n = blockIdx.y; n < a.n_tokens; n += gridDim.y) {
		float logit[8], x[8], key[8];

		unpack8(logit, next_logit);
		unpack8(x, next_x);
		strided += step;
		if (n + gridDim.y < a.n_tokens) {
			next_logit = load8(static_cast<const bf16 *>(a.logit) + strided);
			next_x = load8(static_cast<const bf16 *>(a.x) + strided);
		}
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const struct sigmoids s = sigmoids_of(-LOG2E * logit[i]);
			const float f = fmaf(open[i], s.of_minus, s.of);

			key[i] = closed[i] * s.of_minus;
			logit[i] = log_of_forget(f, key[i]);
			x[i] = silu(x[i]) * (a.key ? 1.0f : key[i]);
		}
		store8(static_cast<bf16 *>(a.log_decay) + row, logit);
		store8(static_cast<bf16 *>(a.out) + row, x);
		if (a.key)
			store8(static_cast<bf16 *>(a.key) + row, key);
		row += out_step;
	}
}

extern "C" const char *portable_forget_gate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct forget_gate_args *>(args);

	return either(check_widths(a->width, a->stride), check_aligned(a->logit, a->x));
}

extern "C" enum status portable_forget_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct forget_gate_args *>(args);
	return launch_shares(device, "forget_gate", forget_gate_kernel, a->n_tokens, a->width, *a);
}
