/*
 * Gradients of the gates and norms of GLA and of the linear-attention family.
 * All are bound by memory. Where a parameter's gradient is a sum over tokens,
 * a thread keeps its own columns from token to token, in registers or in its
 * part of the shared memory (of rows too wide for that, where the shares are
 * left), and the shares are added afterwards in a fixed order.
 */
#include <algorithm>

#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/product.cuh"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 8;

/* Widest row that a warp or less takes; of a wider one a block takes all. */
constexpr int64_t WIDEST_OF_WARP = 1024;

/* Shared memory that a block of any device may have. */
constexpr size_t MOST_SHARED = 96 * 1024;

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

/* Of silu, or of a sigmoid. */
static __device__ __forceinline__ struct silu_pair curve_of(enum curve curve, float x)
{
	const float s = sigmoid(x);

	return curve == CURVE_SILU ? silu(x) : silu_pair{s, s * (1.0f - s)};
}

/* to += x, eight floats that are this thread's own. */
static __device__ __forceinline__ void add8(float *to, const float (&x)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		to[i] += x[i];
}

/* Lanes that take a row of `width` elements, up to a block of them. */
static int lanes_of_row(int64_t width)
{
	return width <= WIDEST_OF_WARP ? lanes_for(width) : THREADS;
}

/* Bytes of shared memory for `rows` rows of sums behind a sum of each warp; those of the warps
 * alone where the rows do not fit. */
static size_t shared_for(int64_t rows, int64_t width)
{
	const size_t warps = THREADS / WARP * sizeof(float);
	const size_t bytes = warps + (size_t)(rows * width) * sizeof(float);

	return bytes <= MOST_SHARED ? bytes : warps;
}

/* The rows of sums behind those of the warps. */
static __device__ __forceinline__ float *shared_rows()
{
	return reinterpret_cast<float *>(shared_memory) + THREADS / WARP;
}

/* Sum over the lanes of a row, which are all threads of the block or some of a warp; all get it. */
static __device__ __forceinline__ float row_sum(float x, int lanes)
{
	float *of_warps = reinterpret_cast<float *>(shared_memory);

	if (lanes <= WARP)
		return group_sum(x, lanes);
	x = group_sum(x, WARP);
	if (threadIdx.x % WARP == 0)
		of_warps[threadIdx.x / WARP] = x;
	__syncthreads();
	x = 0.0f;
#pragma unroll
	for (int i = 0; i < THREADS / WARP; i++)
		x += of_warps[i];
	__syncthreads();
	return x;
}

/* Columns 8 * lane, 8 * (lane + lanes), ... of a row of sums, cleared or written out. */
static __device__ __forceinline__ void clear_sums(float *sums, int64_t width, int lane, int lanes)
{
	for (int64_t i = 8 * lane; i < width; i += 8 * lanes)
#pragma unroll
		for (int j = 0; j < 8; j++)
			sums[i + j] = 0.0f;
}

static __device__ __forceinline__ void write_sums(float *to, const float *sums, int64_t width,
                                                  int lane, int lanes)
{
	if (to == sums)
		return;
	for (int64_t i = 8 * lane; i < width; i += 8 * lanes)
#pragma unroll
		for (int j = 0; j < 8; j++)
			to[i + j] = sums[i + j];
}

/* ---- norm_gate ---- */

/* The mean of a row of d elements, which `lanes` lanes take; all get it. */
static __device__ __forceinline__ float row_mean(const bf16 *x, int64_t d, int lane, int lanes)
{
	float sum = 0.0f, v[8];

	for (int64_t i = 8 * lane; i < d; i += 8 * lanes) {
		load8(v, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum += v[j];
	}
	return row_sum(sum, lanes) / (float)d;
}

/*
 * With x^ = x rstd, y = x^ weight, out = y curve(gate): `lanes` lanes take head
 * blockIdx.y of one token after another. parts [H, rows at once, d]; their sums are in shared
 * memory until the end, if that is so large. CENTERED: x^ = (x - mean) rstd, y = x^ weight + bias,
 * parts [2, rows at once, H, d] of dweight and dbias.
 */
template <bool IN_SHARED, bool CENTERED>
static __global__ void __launch_bounds__(THREADS)
        norm_gate_backward_kernel(const __grid_constant__ struct norm_gate_backward_args a,
                                  int lanes, float *parts)
{
	const struct norm_gate_args &f = a.forward;
	const int64_t slots = (int64_t)gridDim.x * (THREADS / lanes), h = blockIdx.y;
	const int64_t slot = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
	const int64_t d = f.d_head, width = f.n_heads * d;
	const int lane = threadIdx.x % lanes;
	float *part = CENTERED ? parts + slot * width + h * d : parts + (h * slots + slot) * d;
	float *bias_part = part + slots * width;
	float *row = shared_rows() + threadIdx.x / lanes * (CENTERED ? 2 : 1) * d;
	float *sums = IN_SHARED ? row : part, *bias_sums = IN_SHARED ? row + d : bias_part;
	const float *weight = f.weight + (CENTERED ? h * d : 0);

	clear_sums(sums, d, lane, lanes);
	if (CENTERED)
		clear_sums(bias_sums, d, lane, lanes);
	for (int64_t first = 0; first < f.n_tokens; first += slots) {
		const bool valid = first + slot < f.n_tokens;
		const int64_t n = valid ? first + slot : f.n_tokens - 1;
		const bf16 *x = elements(f.x) + n * width + h * d;
		const bf16 *dout = elements(a.dout) + n * width + h * d;
		const bf16 *gate = elements(f.gate) + n * f.gate_stride + h * d;
		bf16 *dx = static_cast<bf16 *>(a.dx) + n * width + h * d;
		bf16 *dgate = static_cast<bf16 *>(a.dgate) + n * f.gate_stride + h * d;
		const float r = f.rstd[n * f.n_heads + h];
		const float mean = CENTERED ? row_mean(x, d, lane, lanes) : 0.0f;
		float xs[8], dy[8], z[8], w[8], b[8] = {}, projection = 0.0f, center = 0.0f;

		for (int64_t i = 8 * lane; i < d; i += 8 * lanes) {
			load8(xs, x + i);
			load8(dy, dout + i);
			load8(z, gate + i);
			load8f(w, weight + i);
			if (CENTERED)
				load8f(b, f.bias + h * d + i);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const struct silu_pair s = curve_of(f.curve, z[j]);
				const float normed = (xs[j] - mean) * r, dnorm = dy[j] * s.value;
				const float through = dnorm * normed;

				z[j] = dy[j] * (normed * w[j] + b[j]) * s.slope;
				projection += through * w[j];
				center += dnorm * w[j];
				xs[j] = valid ? through : 0.0f;
				dy[j] = valid ? dnorm : 0.0f;
			}
			add8(sums + i, xs);
			if (CENTERED)
				add8(bias_sums + i, dy);
			if (valid)
				store8(dgate + i, z);
		}
		projection = row_sum(projection, lanes) / (float)d;
		center = CENTERED ? row_sum(center, lanes) / (float)d : 0.0f;
		for (int64_t i = 8 * lane; valid && i < d; i += 8 * lanes) {
			load8(xs, x + i);
			load8(dy, dout + i);
			/* dgate may have taken the gate's place. */
			load8(z, gate + i);
			load8f(w, weight + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				dy[j] = r * (dy[j] * curve_of(f.curve, z[j]).value * w[j] - center -
				             (xs[j] - mean) * r * projection);
			store8(dx + i, dy);
		}
	}
	write_sums(part, sums, d, lane, lanes);
	if (CENTERED)
		write_sums(bias_part, bias_sums, d, lane, lanes);
}

template <bool IN_SHARED>
static auto norm_gate_kernel_of(enum norm norm) -> decltype(&norm_gate_backward_kernel<true, true>)
{
	return norm == NORM_GROUP ? norm_gate_backward_kernel<IN_SHARED, true>
	                          : norm_gate_backward_kernel<IN_SHARED, false>;
}

} // namespace

/* Rows of partial sums that norm_gate's kernel leaves of dweight, and of dbias. */
static int64_t norm_gate_parts(const struct device *device, const struct norm_gate_args *f)
{
	const int lanes = lanes_of_row(f->d_head);

	return f->n_heads * blocks_for(device, f->n_tokens, f->n_heads, lanes) * (THREADS / lanes);
}

extern "C" const char *portable_norm_gate_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct norm_gate_backward_args *>(args);
	const struct norm_gate_args *f = &a->forward;

	if (f->n_heads > 65535)
		return "more than 65535 heads";
	if (!is_known_curve(f->curve))
		return "an unknown curve";
	if (!is_known_norm(f->norm))
		return "an unknown norm";
	if (f->gate == a->dgate)
		return "dgate in the place of the gate";
	return either(check_widths(f->d_head, f->gate_stride), check_aligned(f->gate, a->dgate));
}

extern "C" size_t portable_norm_gate_backward_workspace(const struct device *device,
                                                        const void *args)
{
	const auto *a = static_cast<const struct norm_gate_backward_args *>(args);

	const int64_t sums = a->forward.norm == NORM_GROUP ? 2 : 1;

	return (size_t)(sums * norm_gate_parts(device, &a->forward) * a->forward.d_head) *
	       sizeof(float);
}

extern "C" enum status portable_norm_gate_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	const auto *a = static_cast<const struct norm_gate_backward_args *>(args);
	const struct norm_gate_args *f = &a->forward;
	const int lanes = lanes_of_row(f->d_head);
	const bool group = f->norm == NORM_GROUP;
	const size_t shared = shared_for((group ? 2 : 1) * (THREADS / lanes), f->d_head);
	const dim3 grid((unsigned)blocks_for(device, f->n_tokens, f->n_heads, lanes),
	                (unsigned)f->n_heads);
	const int64_t width = f->n_heads * f->d_head, n_parts = norm_gate_parts(device, f);
	float *parts = static_cast<float *>(workspace), *bias_parts = parts + n_parts * f->d_head;
	enum status status = launch(device, "norm_gate_backward",
	                            shared > shared_for(0, 0) ? norm_gate_kernel_of<true>(f->norm)
	                                                      : norm_gate_kernel_of<false>(f->norm),
	                            grid, THREADS, shared, *a, lanes, parts);

	if (status == STATUS_OK && group)
		status = column_sums(device, "norm_gate_backward", bias_parts, n_parts / f->n_heads,
		                     width, width, a->dbias);
	if (status != STATUS_OK)
		return status;
	if (group)
		return column_sums(device, "norm_gate_backward", parts, n_parts / f->n_heads, width,
		                   width, a->dweight);
	return column_sums(device, "norm_gate_backward", parts, norm_gate_parts(device, f),
	                   f->d_head, f->d_head, a->dweight);
}

/* ---- gate_norm ---- */

namespace
{

/* u = w silu(gate), w = x + skip_weight skip, eight elements of token n; skip is handed out. */
struct gated8 {
	float w[8], u[8], skip[8], slope[8]; /* slope: of silu; value: silu */
	float value[8];
};

static __device__ __forceinline__ void load_gated(struct gated8 &g, const struct gate_norm_args &f,
                                                  int64_t n, int64_t column)
{
	float z[8];

	load8(g.w, elements(f.x) + n * f.n_heads * f.d_head + column);
	if (f.skip) {
		const float weight = f.skip_weight[column / f.d_head];

		load8(g.skip, elements(f.skip) + n * f.skip_stride + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			g.w[j] = fmaf(weight, g.skip[j], g.w[j]);
	}
	if (f.gate)
		load8(z, elements(f.gate) + n * f.gate_stride + column);
#pragma unroll
	for (int j = 0; j < 8; j++) {
		const struct silu_pair s = silu(f.gate ? z[j] : 0.0f);

		g.value[j] = f.gate ? s.value : 1.0f;
		g.slope[j] = s.slope;
		g.u[j] = g.w[j] * g.value[j];
	}
}

/* to = x, plus what `more` has there, unless that is NULL; it may be `to`. */
static __device__ __forceinline__ void store_added(bf16 *to, const void *more, int64_t place,
                                                   const float (&x)[8])
{
	float sum[8] = {};

	if (more)
		load8(sum, elements(more) + place);
#pragma unroll
	for (int j = 0; j < 8; j++)
		sum[j] += x[j];
	store8(to + place, sum);
}

/* `lanes` lanes take group blockIdx.y of one token after another. parts [groups, rows at once,
 * group]; skip_parts [rows at once, H*d] iff skip; sums in shared memory as above. */
template <bool IN_SHARED>
static __global__ void __launch_bounds__(THREADS)
        gate_norm_backward_kernel(const __grid_constant__ struct gate_norm_backward_args a,
                                  int lanes, float *parts, float *skip_parts)
{
	const struct gate_norm_args &f = a.forward;
	const int64_t slots = (int64_t)gridDim.x * (THREADS / lanes), g = blockIdx.y;
	const int64_t slot = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
	const int64_t width = f.n_heads * f.d_head, group = width / f.groups;
	const int lane = threadIdx.x % lanes;
	float *part = parts + (g * slots + slot) * group;
	float *skip_part = skip_parts + slot * width + g * group;
	float *row = shared_rows() + threadIdx.x / lanes * 2 * group;
	float *sums = IN_SHARED ? row : part, *skip_sums = IN_SHARED ? row + group : skip_part;

	clear_sums(sums, group, lane, lanes);
	if (f.skip)
		clear_sums(skip_sums, group, lane, lanes);
	for (int64_t first = 0; first < f.n_tokens; first += slots) {
		const bool valid = first + slot < f.n_tokens;
		const int64_t n = valid ? first + slot : f.n_tokens - 1;
		const bf16 *dout = elements(a.dout) + n * width + g * group;
		const float r = f.rstd[n * f.groups + g];
		float dy[8], w[8], projection = 0.0f;
		struct gated8 x;

		for (int64_t i = 8 * lane; i < group; i += 8 * lanes) {
			load_gated(x, f, n, g * group + i);
			load8(dy, dout + i);
			load8f(w, f.weight + i);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const float through = dy[j] * x.u[j] * r;

				projection += through * w[j];
				dy[j] = valid ? through : 0.0f;
			}
			add8(sums + i, dy);
		}
		projection = row_sum(projection, lanes) / (float)group;
		for (int64_t i = 8 * lane; valid && i < group; i += 8 * lanes) {
			const int64_t column = g * group + i;

			load_gated(x, f, n, column);
			load8(dy, dout + i);
			load8f(w, f.weight + i);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const float du = r * (dy[j] * w[j] - x.u[j] * r * projection);

				dy[j] = du * x.value[j];
				x.w[j] *= du * x.slope[j];
			}
			store_added(static_cast<bf16 *>(a.dx), a.dresidual, n * width + column, dy);
			if (f.gate)
				store8(static_cast<bf16 *>(a.dgate) + n * f.gate_stride + column,
				       x.w);
			if (!f.skip)
				continue;
			const float weight = f.skip_weight[column / f.d_head];
#pragma unroll
			for (int j = 0; j < 8; j++) {
				x.skip[j] *= dy[j];
				dy[j] *= weight;
			}
			add8(skip_sums + i, x.skip);
			store8(static_cast<bf16 *>(a.dskip) + n * width + column, dy);
		}
	}
	write_sums(part, sums, group, lane, lanes);
	if (f.skip)
		write_sums(skip_part, skip_sums, group, lane, lanes);
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

/* The shape of gate_norm's launch. */
struct gate_norm_plan {
	int lanes;
	int64_t group, width, blocks, slots;
};

static struct gate_norm_plan gate_norm_plan_of(const struct device *device,
                                               const struct gate_norm_args *f)
{
	struct gate_norm_plan p;

	p.width = f->n_heads * f->d_head;
	p.group = p.width / f->groups;
	p.lanes = lanes_of_row(p.group);
	p.blocks = blocks_for(device, f->n_tokens, f->groups, p.lanes);
	p.slots = p.blocks * (THREADS / p.lanes);
	return p;
}

} // namespace

extern "C" const char *portable_gate_norm_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct gate_norm_backward_args *>(args);
	const struct gate_norm_args *f = &a->forward;
	const int64_t group = f->n_heads * f->d_head / f->groups;

	if (f->groups > 65535)
		return "more than 65535 groups";
	if ((f->gate && f->gate == a->dgate) || (f->skip && f->skip == a->dskip))
		return "gradients in the place of what they are taken of";
	return either(check_widths(f->d_head, group, f->skip ? f->skip_stride : 0,
	                           f->gate ? f->gate_stride : 0),
	              check_aligned(f->skip, f->gate, a->dgate, a->dresidual));
}

extern "C" size_t portable_gate_norm_backward_workspace(const struct device *device,
                                                        const void *args)
{
	const auto *a = static_cast<const struct gate_norm_backward_args *>(args);
	const struct gate_norm_plan p = gate_norm_plan_of(device, &a->forward);

	return (size_t)((a->forward.skip ? 2 * p.slots + 1 : p.slots) * p.width) * sizeof(float);
}

extern "C" enum status portable_gate_norm_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	const auto *a = static_cast<const struct gate_norm_backward_args *>(args);
	const struct gate_norm_args *f = &a->forward;
	const struct gate_norm_plan p = gate_norm_plan_of(device, f);
	float *parts = static_cast<float *>(workspace), *skip_parts = parts + p.slots * p.width;
	float *columns = skip_parts + p.slots * p.width;
	const size_t shared = shared_for(2 * (THREADS / p.lanes), p.group);
	enum status status = launch(device, "gate_norm_backward",
	                            shared > shared_for(0, 0) ? gate_norm_backward_kernel<true>
	                                                      : gate_norm_backward_kernel<false>,
	                            dim3((unsigned)p.blocks, (unsigned)f->groups), THREADS, shared,
	                            *a, p.lanes, parts, skip_parts);

	if (status == STATUS_OK)
		status = column_sums(device, "gate_norm_backward", parts, f->groups * p.slots,
		                     p.group, p.group, a->dweight);
	if (status != STATUS_OK || !f->skip)
		return status;
	status = column_sums(device, "gate_norm_backward", skip_parts, p.slots, p.width, p.width,
	                     columns);
	if (status != STATUS_OK)
		return status;
	return launch(device, "gate_norm_backward", head_sums_kernel, dim3((unsigned)f->n_heads),
	              WARP, 0, columns, f->d_head, a->dskip_weight);
}

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
