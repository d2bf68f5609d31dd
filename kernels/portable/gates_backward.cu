/*
 * Gradients of the gates of GLA and of the linear-attention family. All are bound by memory. Where
 * a parameter's gradient is a sum over tokens, a thread keeps its own columns from token to token,
 * and the shares are added afterwards in a fixed order.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/norm_rows.cuh"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 8, FORGET_PER_SM = 5;

static __device__ __forceinline__ const bf16 *elements(const void *tensor)
{
	return static_cast<const bf16 *>(tensor);
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

/* What a row's sums make of its logit: dlogit, and the shares of dbias and dlog_rate. */
struct step_sums {
	float dbias, dlog_rate;
};

static __device__ __forceinline__ float finish_step(struct step_sums &sums, float ddt, float d_log,
                                                    float logit, float dt, float rate)
{
	const float dlogit = (ddt - rate * d_log) * sigmoid(logit);

	sums.dbias += dlogit;
	sums.dlog_rate = fmaf(-d_log * rate, dt, sums.dlog_rate);
	return dlogit;
}

/* A row is a head (norm_rows.cuh). parts [2, step, H]: dbias and dlog_rate. */
template <int V, bool BLOCK>
static __global__ void __launch_bounds__(ROW_THREADS, V == 2 ? 6 : 4)
        time_step_backward_kernel(const __grid_constant__ struct time_step_backward_args a,
                                  const __grid_constant__ struct row_plan p, float *parts)
{
	const struct time_step_args &f = a.forward;
	const int64_t d = f.d_head;
	const struct row_place<V> at = place_of<V, BLOCK>(p, f.n_tokens, f.n_heads, d);
	const int64_t row = (at.token * f.n_heads + at.head) * d + at.column;
	const int64_t x_step = held(p.step * f.x_stride), step = held(p.step * f.logit_stride);
	const int rounds = (int)divide_up(f.n_tokens, p.step), tensors = a.dskip ? 3 : 2;
	const float rate = __expf(f.log_rate[at.head]), bias = f.bias[at.head];
	const bf16 *x = elements(f.x) + at.token * f.x_stride + at.head * d + at.column;
	const bf16 *dout = elements(a.dout) + row, *dskip = elements(a.dskip) + row;
	const int64_t logit_at = at.token * f.logit_stride + at.head;
	const bf16 *logits = elements(f.logit) + logit_at,
	           *d_logs = elements(a.dlog_decay) + at.slot;
	bf16 *dx = static_cast<bf16 *>(a.dx) + row;
	bf16 *dlogit = static_cast<bf16 *>(a.dlogit) + logit_at;
	const bf16 zero = __float2bfloat16(0.0f);
	bf16 logit_next = at.own > 0 ? *logits : zero, d_log_next = at.own > 0 ? *d_logs : zero;
	struct step_sums sums = {};
	int from = 0, to = 0;

	for (int k = 1 - p.stages; k < rounds; k++) {
		const bool ahead = k + p.stages - 1 < at.own, there = k < at.own;

		copy_row<V>(ring_slot<V>(tensors, to, 0), x, at, ahead);
		copy_row<V>(ring_slot<V>(tensors, to, 1), dout, at, ahead);
		if (a.dskip)
			copy_row<V>(ring_slot<V>(tensors, to, 2), dskip, at, ahead);
		copy_commit();
		to = next_stage(to, p.stages);
		x += x_step;
		dout += p.row_step;
		dskip += p.row_step;
		if (k < 0)
			continue;

		const float logit = __bfloat162float(logit_next) + bias, dt = softplus(logit);
		const float d_log = __bfloat162float(d_log_next);
		const vector8 *xs = ring_slot<V>(tensors, from, 0);
		const vector8 *douts = ring_slot<V>(tensors, from, 1);
		const vector8 *skips = ring_slot<V>(tensors, from, 2);
		float ddt[1] = {};

		logits += step;
		d_logs += p.slots;
		if (k + 1 < at.own) {
			logit_next = *logits;
			d_log_next = *d_logs;
		}
		wait_rows(p.stages - 1);
#pragma unroll
		for (int i = 0; i < V; i++) {
			float v[8], dy[8], sum[8] = {};

			unpack8(v, xs[i * ROW_THREADS]);
			unpack8(dy, douts[i * ROW_THREADS]);
			if (a.dskip)
				unpack8(sum, skips[i * ROW_THREADS]);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				ddt[0] = fmaf(dy[j], v[j], ddt[0]);
				sum[j] = fmaf(dt, dy[j], sum[j]);
			}
			store_row<V>(dx, sum, i, at, there);
		}
		sum_rows<BLOCK>(ddt, p, k & 1);
		if (there && at.leads)
			*dlogit =
			        __float2bfloat16(finish_step(sums, ddt[0], d_log, logit, dt, rate));
		dx += p.row_step;
		dlogit += step;
		from = next_stage(from, p.stages);
	}
	copy_wait<0>();
	if (!at.leads)
		return;
	parts[at.slot] = sums.dbias;
	parts[p.slots + at.slot] = sums.dlog_rate;
}

/* The same of heads of any width. */
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_time_step_backward_kernel(const __grid_constant__ struct time_step_backward_args a,
                                       const __grid_constant__ struct row_plan p, float *parts)
{
	const struct time_step_args &f = a.forward;
	const int64_t d = f.d_head, width = f.n_heads * d;
	const struct row_place<1> at = place_of<1, true>(p, f.n_tokens, f.n_heads, d);
	const float rate = __expf(f.log_rate[at.head]), bias = f.bias[at.head];
	struct step_sums sums = {};

	for (int64_t n = at.token; n < f.n_tokens; n += p.step) {
		const int64_t logit_at = n * f.logit_stride + at.head,
		              row = n * width + at.head * d;
		const float logit = __bfloat162float(elements(f.logit)[logit_at]) + bias;
		const float d_log =
		        __bfloat162float(elements(a.dlog_decay)[n * f.n_heads + at.head]);
		const float dt = softplus(logit);
		float ddt = 0.0f;

		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			float x[8], dout[8], skip[8] = {};

			load8(x, elements(f.x) + n * f.x_stride + at.head * d + i);
			load8(dout, elements(a.dout) + row + i);
			if (a.dskip)
				load8(skip, elements(a.dskip) + row + i);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				ddt += dout[j] * x[j];
				skip[j] += dt * dout[j];
			}
			store8(static_cast<bf16 *>(a.dx) + row + i, skip);
		}
		ddt = block_sum(ddt);
		if (at.leads)
			static_cast<bf16 *>(a.dlogit)[logit_at] =
			        __float2bfloat16(finish_step(sums, ddt, d_log, logit, dt, rate));
	}
	if (!at.leads)
		return;
	parts[at.slot] = sums.dbias;
	parts[p.slots + at.slot] = sums.dlog_rate;
}

static struct row_plan time_step_plan(const struct device *device,
                                      const struct time_step_backward_args *a)
{
	const struct time_step_args *f = &a->forward;

	return plan_rows(device, f->n_tokens, f->n_heads, f->d_head, a->dskip ? 3 : 2, 6, 4);
}

static auto time_step_kernel_of(const struct row_plan &p)
        -> decltype(&time_step_backward_kernel<2, true>)
{
	const bool block = p.lanes == ROW_THREADS;

	if (p.vectors == 0)
		return wide_time_step_backward_kernel;
	if (p.vectors == 2)
		return block ? time_step_backward_kernel<2, true>
		             : time_step_backward_kernel<2, false>;
	return block ? time_step_backward_kernel<4, true> : time_step_backward_kernel<4, false>;
}

} // namespace

extern "C" const char *portable_time_step_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct time_step_backward_args *>(args);
	const struct time_step_args *f = &a->forward;

	return either(check_widths(f->d_head, f->x_stride), check_aligned(f->x));
}

extern "C" size_t portable_time_step_backward_workspace(const struct device *device,
                                                        const void *args)
{
	const auto *a = static_cast<const struct time_step_backward_args *>(args);

	return (size_t)(2 * time_step_plan(device, a).slots) * sizeof(float);
}

extern "C" enum status portable_time_step_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	static constexpr char NAME[] = "time_step_backward";
	const auto *a = static_cast<const struct time_step_backward_args *>(args);
	const int64_t heads = a->forward.n_heads;
	const struct row_plan p = time_step_plan(device, a);
	float *parts = static_cast<float *>(workspace);
	enum status status = launch(device, NAME, time_step_kernel_of(p), dim3((unsigned)p.blocks),
	                            ROW_THREADS, p.shared, *a, p, parts);

	if (status == STATUS_OK)
		status = column_sums(device, NAME, parts, p.step, heads, heads, a->dbias);
	if (status != STATUS_OK)
		return status;
	return column_sums(device, NAME, parts + p.slots, p.step, heads, heads, a->dlog_rate);
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
