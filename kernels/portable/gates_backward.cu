/*
 * Gradients of the gates of GLA and of the linear-attention family. All are bound by memory. Where
 * a parameter's gradient is a sum over tokens, a thread keeps its own columns from token to token,
 * and the shares are added afterwards in a fixed order.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 8, FORGET_PER_SM = 5;

static __device__ __forceinline__ const bf16 *elements(const void *tensor)
{
	return static_cast<const bf16 *>(tensor);
}

/* Blocks for `rows` rows per group, THREADS / lanes of them at a time, so that all groups fill the
 * device. */
static int64_t blocks_for(const struct device *device, int64_t rows, int64_t groups, int lanes)
{
	return count_shares(device, divide_up(rows, THREADS / lanes), BLOCKS_PER_SM, groups);
}

/* silu(x) and its slope. */
struct silu_pair {
	float value, slope;
};

static __device__ __forceinline__ struct silu_pair silu(float x)
{
	const float s = sigmoid(x);

	return {x * s, fmaf(x * s, 1.0f - s, s)};
}

static int64_t token_splits(const struct device *device, int64_t n_tokens, int64_t width)
{
	return count_shares(device, n_tokens, FORGET_PER_SM, divide_up(width, 8 * THREADS));
}

} // namespace

/* ---- forget_gate ---- */

namespace
{

/* With k = 1 - f = sigmoid(-bound) sigmoid(-logit): a thread's eight columns of a share of the
 * tokens; parts [gridDim.y, width]. */
static __global__ void __launch_bounds__(THREADS, FORGET_PER_SM)
        forget_gate_backward_kernel(const __grid_constant__ struct forget_gate_backward_args a,
                                    float *parts)
{
	const struct forget_gate_args &f = a.forward;
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t step = held((int64_t)gridDim.y * f.stride);
	const int64_t row_step = held((int64_t)gridDim.y * f.width);
	int64_t strided = blockIdx.y * f.stride + column, row = blockIdx.y * f.width + column;
	float bound[8], above[8], below[8], dbound[8] = {};
	vector8 logits, xs, d_logs, douts, dkeys = {};
	const auto load = [&]() {
		logits = load8(elements(f.logit) + strided);
		xs = load8(elements(f.x) + strided);
		d_logs = load8(elements(a.dlog_decay) + row);
		douts = load8(elements(a.dout) + row);
		if (f.key)
			dkeys = load8(elements(a.dkey) + row);
	};

	if (column >= f.width)
		return;
	load8f(bound, f.bound + column);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const struct sigmoids s = sigmoids_of(-LOG2E * bound[i]);

		above[i] = s.of;
		below[i] = s.of_minus;
	}
	load();
	for (int64_t n = blockIdx.y; n < f.n_tokens; n += gridDim.y) {
		bf16 *dlogit = static_cast<bf16 *>(a.dlogit) + strided;
		bf16 *dx = static_cast<bf16 *>(a.dx) + strided;
		float logit[8], x[8], d_log[8], dout[8], dkey[8];

		unpack8(logit, logits);
		unpack8(x, xs);
		unpack8(d_log, d_logs);
		unpack8(dout, douts);
		unpack8(dkey, dkeys);
		strided += step;
		row += row_step;
		if (n + gridDim.y < f.n_tokens)
			load();
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const struct sigmoids g = sigmoids_of(-LOG2E * logit[i]);
			const float key = below[i] * g.of_minus;
			const float forget = fmaf(above[i], g.of_minus, g.of);
			const struct silu_pair s = silu(x[i]);
			const float dk = fmaf(-d_log[i], reciprocal_fast(forget),
			                      f.key ? dkey[i] : dout[i] * s.value);

			x[i] = dout[i] * s.slope * (f.key ? 1.0f : key);
			logit[i] = -key * g.of * dk;
			dbound[i] = fmaf(-key * above[i], dk, dbound[i]);
		}
		store8(dlogit, logit);
		store8(dx, x);
	}
	store8f(parts + blockIdx.y * f.width + column, dbound);
}

} // namespace

extern "C" const char *portable_forget_gate_backward_unsupported(const struct device *,
                                                                 const void *args)
{
	const auto *a = static_cast<const struct forget_gate_backward_args *>(args);
	const struct forget_gate_args *f = &a->forward;

	return either(check_widths(f->width, f->stride),
	              check_aligned(f->logit, f->x, a->dlogit, a->dx));
}

extern "C" size_t portable_forget_gate_backward_workspace(const struct device *device,
                                                          const void *args)
{
	const auto *a = static_cast<const struct forget_gate_backward_args *>(args);
	const struct forget_gate_args *f = &a->forward;

	return (size_t)(token_splits(device, f->n_tokens, f->width) * f->width) * sizeof(float);
}

extern "C" enum status portable_forget_gate_backward(struct device *device, const void *args,
                                                     void *workspace)
{
	const auto *a = static_cast<const struct forget_gate_backward_args *>(args);
	const struct forget_gate_args *f = &a->forward;
	const int64_t splits = token_splits(device, f->n_tokens, f->width);
	float *parts = static_cast<float *>(workspace);
	enum status status =
	        launch(device, "forget_gate_backward", forget_gate_backward_kernel,
	               dim3((unsigned)divide_up(f->width, 8 * THREADS), (unsigned)splits), THREADS,
	               0, *a, parts);

	if (status != STATUS_OK)
		return status;
	return column_sums(device, "forget_gate_backward", parts, splits, f->width, f->width,
	                   a->dbound);
}

/* ---- time_step ---- */

namespace
{

/* `lanes` lanes take head blockIdx.y of one token after another. parts [rows at once, 2, H]: shares
 * of dbias and dlog_rate. */
static __global__ void __launch_bounds__(THREADS)
        time_step_backward_kernel(const __grid_constant__ struct time_step_backward_args a,
                                  int lanes, float *parts)
{
	const struct time_step_args &f = a.forward;
	const int64_t slots = (int64_t)gridDim.x * (THREADS / lanes), h = blockIdx.y;
	const int64_t slot = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
	const int64_t d = f.d_head, width = f.n_heads * d;
	const int lane = threadIdx.x % lanes;
	const float rate = __expf(f.log_rate[h]), bias = f.bias[h];
	float dbias = 0.0f, dlog_rate = 0.0f;

	for (int64_t first = 0; first < f.n_tokens; first += slots) {
		const bool valid = first + slot < f.n_tokens;
		const int64_t n = valid ? first + slot : f.n_tokens - 1;
		const float logit =
		        __bfloat162float(elements(f.logit)[n * f.logit_stride + h]) + bias;
		const float dt = softplus(logit);
		const float d_log = __bfloat162float(elements(a.dlog_decay)[n * f.n_heads + h]);
		float ddt = 0.0f;

		for (int64_t i = 8 * lane; i < d; i += 8 * lanes) {
			const int64_t at_row = n * width + h * d + i;
			float x[8], dout[8], skip[8] = {};

			load8(x, elements(f.x) + n * f.x_stride + h * d + i);
			load8(dout, elements(a.dout) + at_row);
			if (a.dskip)
				load8(skip, elements(a.dskip) + at_row);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				ddt += dout[j] * x[j];
				dout[j] = dt * dout[j] + skip[j];
			}
			if (valid)
				store8(static_cast<bf16 *>(a.dx) + at_row, dout);
		}
		ddt = group_sum(ddt, lanes) - rate * d_log;
		const float dlogit = ddt * sigmoid(logit);
		if (!valid || lane != 0)
			continue;
		static_cast<bf16 *>(a.dlogit)[n * f.logit_stride + h] = __float2bfloat16(dlogit);
		dbias += dlogit;
		dlog_rate -= d_log * rate * dt;
	}
	if (lane != 0)
		return;
	parts[2 * slot * f.n_heads + h] = dbias;
	parts[(2 * slot + 1) * f.n_heads + h] = dlog_rate;
}

static int64_t time_step_slots(const struct device *device, const struct time_step_args *f)
{
	const int lanes = lanes_for(f->d_head);

	return blocks_for(device, f->n_tokens, f->n_heads, lanes) * (THREADS / lanes);
}

} // namespace

extern "C" const char *portable_time_step_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct time_step_backward_args *>(args);
	const struct time_step_args *f = &a->forward;

	if (f->n_heads > 65535)
		return "more than 65535 heads";
	return either(check_widths(f->d_head, f->x_stride), check_aligned(f->x));
}

extern "C" size_t portable_time_step_backward_workspace(const struct device *device,
                                                        const void *args)
{
	const auto *a = static_cast<const struct time_step_backward_args *>(args);

	return (size_t)(2 * time_step_slots(device, &a->forward) * a->forward.n_heads) *
	       sizeof(float);
}

extern "C" enum status portable_time_step_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	const auto *a = static_cast<const struct time_step_backward_args *>(args);
	const struct time_step_args *f = &a->forward;
	const int lanes = lanes_for(f->d_head);
	const dim3 grid((unsigned)blocks_for(device, f->n_tokens, f->n_heads, lanes),
	                (unsigned)f->n_heads);
	float *parts = static_cast<float *>(workspace);
	enum status status = launch(device, "time_step_backward", time_step_backward_kernel, grid,
	                            THREADS, 0, *a, lanes, parts);

	if (status == STATUS_OK)
		status =
		        column_sums(device, "time_step_backward", parts, time_step_slots(device, f),
		                    2 * f->n_heads, f->n_heads, a->dbias);
	if (status != STATUS_OK)
		return status;
	return column_sums(device, "time_step_backward", parts + f->n_heads,
	                   time_step_slots(device, f), 2 * f->n_heads, f->n_heads, a->dlog_rate);
}

/* ---- delta_gate ---- */

namespace
{

/* A thread keeps to one head of every `slots`-th token. parts [slots, 2, H]: shares of dbias and
 * dlog_rate. */
static __global__ void __launch_bounds__(THREADS)
        delta_gate_backward_kernel(const __grid_constant__ struct delta_gate_backward_args a,
                                   int64_t slots, float *parts)
{
	const struct delta_gate_args &f = a.forward;
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t slot = index / f.n_heads, h = index % f.n_heads;
	float rate = 0.0f, bias = 0.0f, dbias = 0.0f, dlog_rate = 0.0f;

	if (slot >= slots)
		return;
	if (f.decay_logit) {
		rate = __expf(f.log_rate[h]);
		bias = f.bias[h];
	}
	for (int64_t n = slot; n < f.n_tokens; n += slots) {
		const int64_t row = n * f.n_heads + h, from = n * f.stride + h;
		const float logit = __bfloat162float(elements(f.logit)[from]);
		const float dbeta = __bfloat162float(elements(a.dbeta)[row]);

		static_cast<bf16 *>(a.dlogit)[from] =
		        __float2bfloat16(dbeta * sigmoid(logit) * sigmoid(-logit));
		if (!f.decay_logit)
			continue;
		const float u = __bfloat162float(elements(f.decay_logit)[from]) + bias;
		const float scaled = rate * __bfloat162float(elements(a.dlog_decay)[row]);
		const float du = -scaled * sigmoid(u);

		static_cast<bf16 *>(a.ddecay_logit)[from] = __float2bfloat16(du);
		dbias += du;
		dlog_rate -= scaled * softplus(u);
	}
	if (!f.decay_logit)
		return;
	parts[2 * slot * f.n_heads + h] = dbias;
	parts[(2 * slot + 1) * f.n_heads + h] = dlog_rate;
}

/* Tokens that are taken at a time. */
static int64_t delta_gate_slots(const struct device *device, const struct delta_gate_args *f)
{
	return count_shares(device, f->n_tokens, BLOCKS_PER_SM * THREADS, f->n_heads);
}

} // namespace

extern "C" size_t portable_delta_gate_backward_workspace(const struct device *device,
                                                         const void *args)
{
	const auto *a = static_cast<const struct delta_gate_backward_args *>(args);
	const struct delta_gate_args *f = &a->forward;

	return (size_t)(2 * delta_gate_slots(device, f) * f->n_heads) * sizeof(float);
}

extern "C" enum status portable_delta_gate_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const auto *a = static_cast<const struct delta_gate_backward_args *>(args);
	const struct delta_gate_args *f = &a->forward;
	const int64_t slots = delta_gate_slots(device, f);
	float *parts = static_cast<float *>(workspace);
	enum status status = launch_each(device, "delta_gate_backward", delta_gate_backward_kernel,
	                                 slots * f->n_heads, THREADS, *a, slots, parts);

	if (status != STATUS_OK || !f->decay_logit)
		return status;
	status = column_sums(device, "delta_gate_backward", parts, slots, 2 * f->n_heads,
	                     f->n_heads, a->dbias);
	if (status != STATUS_OK)
		return status;
	return column_sums(device, "delta_gate_backward", parts + f->n_heads, slots, 2 * f->n_heads,
	                   f->n_heads, a->dlog_rate);
}
