/*
 * Gradients of the gates of GLA and of the linear-attention family. All are bound by memory. Where
 * a parameter's gradient is a sum over tokens, a thread keeps its own columns from token to token,
 * and the shares are added afterwards in a fixed order.
 */
#include <algorithm>

#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/product.cuh"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 8;

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

	return {x * s, s * (1.0f + x * (1.0f - s))};
}

/* sums[h] = the sum of columns h*d .. of `columns`; a warp per head. */
static __global__ void __launch_bounds__(WARP)
        head_sums_kernel(const float *columns, int64_t d, float *sums)
{
	float sum = 0.0f;

	for (int64_t i = threadIdx.x; i < d; i += WARP)
		sum += columns[blockIdx.x * d + i];
	sum = group_sum(sum, WARP);
	if (threadIdx.x == 0)
		sums[blockIdx.x] = sum;
}

} // namespace

/* ---- decay_gate ---- */

namespace
{

/* A thread's eight columns of rows blockIdx.y, blockIdx.y + gridDim.y, ..., of x or, where there is
 * one, times `factor`: parts [gridDim.y, width]. */
static __global__ void __launch_bounds__(THREADS)
        sum_tokens_kernel(const bf16 *x, const bf16 *factor, int64_t n_tokens, int64_t width,
                          float *parts)
{
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float sum[8] = {};

	if (column >= width)
		return;
#pragma unroll 4
	for (int64_t n = blockIdx.y; n < n_tokens; n += gridDim.y) {
		float v[8], w[8];

		load8(v, x + n * width + column);
		if (factor)
			load8(w, factor + n * width + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum[j] += factor ? v[j] * w[j] : v[j];
	}
	store8f(parts + blockIdx.y * width + column, sum);
}

/* dlogit from dout, and the logits x W^T that are in its place, in place. */
static __global__ void __launch_bounds__(THREADS)
        decay_slope_kernel(const __grid_constant__ struct decay_gate_backward_args a)
{
	const struct decay_gate_args &f = a.forward;
	const int64_t index = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t column = index % f.d_out;
	const bool rate = f.form == LOW_RANK_RATE, step = f.form == LOW_RANK_STEP;
	float logit[8], bias[8], d[8];

	if (index >= f.n_tokens * f.d_out)
		return;
	const float factor = rate   ? -__expf(f.log_rate[column / (f.d_out / f.n_heads)])
	                     : step ? 1.0f
	                            : 1.0f / f.normalizer;
	load8(logit, elements(a.dlogit) + index);
	load8(d, elements(a.dout) + index);
	load8f(bias, f.bias + column);
#pragma unroll
	for (int j = 0; j < 8; j++) {
		const float u = logit[j] + bias[j];

		d[j] *= factor * sigmoid(rate || step ? u : -u);
	}
	store8(static_cast<bf16 *>(a.dlogit) + index, d);
}

/* dlogit = dout out: -exp(logit) is its own derivative. */
static __global__ void __launch_bounds__(THREADS)
        exp_slope_kernel(const __grid_constant__ struct decay_gate_backward_args a)
{
	const int64_t index = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float out[8], d[8];

	if (index >= a.forward.n_tokens * a.forward.d_out)
		return;
	load8(out, elements(a.forward.out) + index);
	load8(d, elements(a.dout) + index);
#pragma unroll
	for (int j = 0; j < 8; j++)
		d[j] *= out[j];
	store8(static_cast<bf16 *>(a.dlogit) + index, d);
}

/* to [n_tokens, rank] = tanh(x). */
static __global__ void __launch_bounds__(THREADS)
        tanh_kernel(const __grid_constant__ struct decay_gate_args f, bf16 *to)
{
	const int64_t index = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float x[8];

	if (index >= f.n_tokens * f.rank)
		return;
	load8(x, elements(f.x) + index / f.rank * f.x_stride + index % f.rank);
#pragma unroll
	for (int j = 0; j < 8; j++)
		x[j] = tanh_of(x[j]).value;
	store8(to + index, x);
}

/* dx, of tanh(x), becomes that of x. */
static __global__ void __launch_bounds__(THREADS)
        tanh_slope_kernel(const __grid_constant__ struct decay_gate_backward_args a)
{
	const struct decay_gate_args &f = a.forward;
	const int64_t index = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t place = index / f.rank * f.x_stride + index % f.rank;
	float x[8], dx[8];

	if (index >= f.n_tokens * f.rank)
		return;
	load8(x, elements(f.x) + place);
	load8(dx, static_cast<const bf16 *>(a.dx) + place);
#pragma unroll
	for (int j = 0; j < 8; j++)
		dx[j] *= tanh_of(x[j]).slope;
	store8(static_cast<bf16 *>(a.dx) + place, dx);
}

static int64_t token_splits(const struct device *device, int64_t n_tokens, int64_t width)
{
	return count_shares(device, n_tokens, BLOCKS_PER_SM, divide_up(width, 8 * THREADS));
}

/* sums [d_out] of x, times `factor` where there is one, over the tokens. */
static enum status sum_tokens(struct device *device, const struct decay_gate_args *f, const void *x,
                              const void *factor, float *parts, float *sums)
{
	const int64_t splits = token_splits(device, f->n_tokens, f->d_out);
	const enum status status =
	        launch(device, "decay_gate_backward", sum_tokens_kernel,
	               dim3((unsigned)divide_up(f->d_out, 8 * THREADS), (unsigned)splits), THREADS,
	               0, static_cast<const bf16 *>(x), static_cast<const bf16 *>(factor),
	               f->n_tokens, f->d_out, parts);

	if (status != STATUS_OK)
		return status;
	return column_sums(device, "decay_gate_backward", parts, splits, f->d_out, f->d_out, sums);
}

/* A decay is its own derivative with respect to log_rate. */
static enum status sum_rates(struct device *device, const struct decay_gate_backward_args *a,
                             float *parts)
{
	const struct decay_gate_args *f = &a->forward;
	float *columns = parts + token_splits(device, f->n_tokens, f->d_out) * f->d_out;
	const enum status status = sum_tokens(device, f, a->dout, f->out, parts, columns);

	if (status != STATUS_OK)
		return status;
	return launch(device, "decay_gate_backward", head_sums_kernel, dim3((unsigned)f->n_heads),
	              WARP, 0, columns, f->d_out / f->n_heads, a->dlog_rate);
}

} // namespace

extern "C" const char *portable_decay_gate_backward_unsupported(const struct device *,
                                                                const void *args)
{
	const auto *a = static_cast<const struct decay_gate_backward_args *>(args);
	const struct decay_gate_args *f = &a->forward;

	if (!is_known_low_rank(f->form))
		return "an unknown gate of low rank";
	if (f->form == LOW_RANK_RATE && f->d_out / f->n_heads % 8)
		return "widths must be multiples of 8";
	return either(check_widths(f->rank, f->x_stride, f->d_out), check_aligned(f->x, a->dx));
}

/* Bytes of partial sums and of products, which take turns; after them is tanh(x). */
static size_t low_rank_sums(const struct device *device, const struct decay_gate_args *f)
{
	const int64_t rows =
	        token_splits(device, f->n_tokens, f->d_out) + (f->form == LOW_RANK_RATE ? 1 : 0);
	const size_t parts = (size_t)(rows * f->d_out) * sizeof(float);

	return (std::max(parts, (size_t)GEMM_WORKSPACE) + 255) / 256 * 256;
}

extern "C" size_t portable_decay_gate_backward_workspace(const struct device *device,
                                                         const void *args)
{
	const auto *a = static_cast<const struct decay_gate_backward_args *>(args);
	const struct decay_gate_args *f = &a->forward;

	return low_rank_sums(device, f) +
	       (has_tanh(f->form) ? (size_t)(f->n_tokens * f->rank) * sizeof(bf16) : 0);
}

/* dlogit, unless that is dout. */
static enum status low_rank_slope(struct device *device, const struct decay_gate_backward_args *a,
                                  void *workspace)
{
	const struct decay_gate_args *f = &a->forward;
	const int64_t threads = f->n_tokens * (f->d_out / 8);

	if (is_logit(f->form))
		return STATUS_OK;
	if (f->form == LOW_RANK_EXP)
		return launch_each(device, "decay_gate_backward", exp_slope_kernel, threads,
		                   THREADS, *a);
	/* The logits once more, in dlogit's place. */
	struct gemm g = product(f->n_tokens, f->rank, f->d_out, {f->x, false}, {f->weight, true},
	                        a->dlogit, DTYPE_BF16);
	g.a_leading = f->x_stride;
	const enum status status = gemm_run(device, &g, workspace);
	return status == STATUS_OK ? launch_each(device, "decay_gate_backward", decay_slope_kernel,
	                                         threads, THREADS, *a)
	                           : status;
}

extern "C" enum status portable_decay_gate_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const auto *a = static_cast<const struct decay_gate_backward_args *>(args);
	const struct decay_gate_args *f = &a->forward;
	const void *dlogit = is_logit(f->form) ? a->dout : a->dlogit;
	const int64_t threads = f->n_tokens * (f->rank / 8);
	const bool tanh = has_tanh(f->form);
	float *parts = static_cast<float *>(workspace);
	auto *input =
	        reinterpret_cast<bf16 *>(static_cast<char *>(workspace) + low_rank_sums(device, f));
	enum status status = low_rank_slope(device, a, workspace);

	if (status == STATUS_OK && tanh)
		status = launch_each(device, "decay_gate_backward", tanh_kernel, threads, THREADS,
		                     *f, input);
	if (status == STATUS_OK)
		status = sum_tokens(device, f, dlogit, NULL, parts, a->dbias);
	if (status == STATUS_OK && f->form == LOW_RANK_RATE)
		status = sum_rates(device, a, parts);
	/* dweight = dlogit^T x, or tanh(x). */
	struct gemm g = product(f->d_out, f->n_tokens, f->rank, {dlogit, true},
	                        {tanh ? input : f->x, false}, a->dweight, DTYPE_F32);
	g.b_leading = tanh ? f->rank : f->x_stride;
	if (status == STATUS_OK)
		status = gemm_run(device, &g, workspace);
	/* dx = dlogit W. */
	g = product(f->n_tokens, f->d_out, f->rank, {dlogit, false}, {f->weight, false}, a->dx,
	            DTYPE_BF16);
	g.out_leading = f->x_stride;
	if (status == STATUS_OK)
		status = gemm_run(device, &g, workspace);
	if (status != STATUS_OK || !tanh)
		return status;
	return launch_each(device, "decay_gate_backward", tanh_slope_kernel, threads, THREADS, *a);
}

/* ---- forget_gate ---- */

namespace
{

/* With k = 1 - f = sigmoid(-bound) sigmoid(-logit): a thread's eight columns of a share of the
 * tokens; parts [gridDim.y, width]. */
static __global__ void __launch_bounds__(THREADS)
        forget_gate_backward_kernel(const __grid_constant__ struct forget_gate_backward_args a,
                                    float *parts)
{
	const struct forget_gate_args &f = a.forward;
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float bound[8], dbound[8] = {};

	if (column >= f.width)
		return;
	load8f(bound, f.bound + column);
	for (int64_t n = blockIdx.y; n < f.n_tokens; n += gridDim.y) {
		const int64_t at_row = n * f.width + column, strided = n * f.stride + column;
		float logit[8], x[8], d_log[8], dout[8], dkey[8] = {};

		load8(logit, elements(f.logit) + strided);
		load8(x, elements(f.x) + strided);
		load8(d_log, elements(a.dlog_decay) + at_row);
		load8(dout, elements(a.dout) + at_row);
		if (f.key)
			load8(dkey, elements(a.dkey) + at_row);
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const float closed = sigmoid(-logit[i]), open = sigmoid(logit[i]);
			const float key = sigmoid(-bound[i]) * closed;
			const float forget = open + sigmoid(bound[i]) * closed;
			const struct silu_pair s = silu(x[i]);
			const float dk = (f.key ? dkey[i] : dout[i] * s.value) -
			                 __fdividef(d_log[i], forget);

			x[i] = dout[i] * s.slope * (f.key ? 1.0f : key);
			logit[i] = -key * open * dk;
			dbound[i] -= key * sigmoid(bound[i]) * dk;
		}
		store8(static_cast<bf16 *>(a.dlogit) + strided, logit);
		store8(static_cast<bf16 *>(a.dx) + strided, x);
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
