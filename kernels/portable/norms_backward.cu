/*
 * Gradients of the norms behind a recurrence. Bound by memory: rows go through rings
 * (norm_rows.cuh), each is read once. A thread keeps the sums over tokens of its own columns in
 * registers; the shares are added afterwards in a fixed order. Of a row of more than 4096 elements
 * a block reads its own share a second time, and keeps its sums in its share's place.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/norm_rows.cuh"

namespace
{

/* The blocks of a multiprocessor of rows of V vectors. */
static constexpr __host__ __device__ int per_sm(int vectors, bool more)
{
	return vectors > 2 ? 2 : more ? 3 : 4;
}

static __device__ __forceinline__ const bf16 *elements(const void *tensor)
{
	return static_cast<const bf16 *>(tensor);
}

/* silu(x), or sigmoid(x), and its slope. */
struct curve_pair {
	float value, slope;
};

static __device__ __forceinline__ struct curve_pair curve_of(bool silu, float x)
{
	const float s = sigmoid(x), value = silu ? x * s : s;

	return {value, silu ? fmaf(value, 1.0f - s, s) : value * (1.0f - s)};
}

/* A block's sums of a wide row: its thread's columns 8 lane, 8 (lane + ROW_THREADS), ... */
static __device__ __forceinline__ void clear_sums(float *sums, int64_t width)
{
	for (int64_t i = 8 * threadIdx.x; i < width; i += 8 * ROW_THREADS)
#pragma unroll
		for (int j = 0; j < 8; j++)
			sums[i + j] = 0.0f;
}

/* to += x, eight floats that are this thread's own. */
static __device__ __forceinline__ void add8(float *to, const float (&x)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		to[i] += x[i];
}

/* ---- norm_gate ---- */

/*
 * With x^ = x rstd, y = x^ weight, out = y curve(gate). parts [gridDim.x, d]: a block's share of
 * dweight. CENTERED: x^ = (x - mean) rstd, y = x^ weight + bias, parts [2, step, H, d] of dweight
 * and dbias. SILU: the curve.
 */
template <int V, bool BLOCK, bool CENTERED, bool SILU>
static __global__ void __launch_bounds__(ROW_THREADS, per_sm(V, CENTERED))
        norm_gate_backward_kernel(const __grid_constant__ struct norm_gate_backward_args a,
                                  const __grid_constant__ struct row_plan p, float *parts)
{
	const struct norm_gate_args &f = a.forward;
	const int64_t d = f.d_head;
	const struct row_place<V> at = place_of<V, BLOCK>(p, f.n_tokens, f.n_heads, d);
	const int64_t first = at.head * d;
	const int64_t row = (at.token * f.n_heads + at.head) * d + at.column;
	const int64_t strided = at.token * f.gate_stride + first + at.column;
	const int64_t gate_step = held(p.step * f.gate_stride);
	const int rounds = (int)divide_up(f.n_tokens, p.step);
	const float per_column = 1.0f / (float)d, *rstd = f.rstd + at.slot;
	const bf16 *x = elements(f.x) + row, *dout = elements(a.dout) + row;
	const bf16 *gate = elements(f.gate) + strided;
	bf16 *dx = static_cast<bf16 *>(a.dx) + row, *dgate = static_cast<bf16 *>(a.dgate) + strided;
	float w[V][8], b[V][8], sums[V][8] = {}, bias_sums[V][8] = {};
	float r = at.own > 0 ? *rstd : 0.0f;
	int from = 0, to = 0;

	load_columns<V>(w, f.weight + (CENTERED ? first : 0), at);
	if (CENTERED && V == 2)
		load_columns<V>(b, f.bias + first, at);
	for (int k = 1 - p.stages; k < rounds; k++) {
		const bool ahead = k + p.stages - 1 < at.own, there = k < at.own;

		copy_row<V>(ring_slot<V>(3, to, 0), x, at, ahead);
		copy_row<V>(ring_slot<V>(3, to, 1), dout, at, ahead);
		copy_row<V>(ring_slot<V>(3, to, 2), gate, at, ahead);
		copy_commit();
		to = next_stage(to, p.stages);
		x += p.row_step;
		dout += p.row_step;
		gate += gate_step;
		if (k < 0)
			continue;
		rstd += p.slots;

		const float next_r = k + 1 < at.own ? *rstd : 0.0f;
		const vector8 *xs = ring_slot<V>(3, from, 0), *douts = ring_slot<V>(3, from, 1);
		const vector8 *gates = ring_slot<V>(3, from, 2);
		/* x, off the mean, and rstd times the gradient of x^. */
		float u[V][8], du[V][8];

		wait_rows(p.stages - 1);
#pragma unroll
		for (int i = 0; i < V; i++)
			unpack8(u[i], xs[i * ROW_THREADS]);
		if (CENTERED) {
			float total[1] = {};

#pragma unroll
			for (int i = 0; i < V; i++)
#pragma unroll
				for (int j = 0; j < 8; j++)
					total[0] += u[i][j];
			sum_rows<BLOCK>(total, p, 0);
#pragma unroll
			for (int i = 0; i < V; i++)
#pragma unroll
				for (int j = 0; j < 8; j++)
					u[i][j] -= total[0] * per_column;
		}
		/* The gradient of x^ along x^, and of CENTERED rstd times that along ones. */
		float along[CENTERED ? 2 : 1] = {};
#pragma unroll
		for (int i = 0; i < V; i++) {
			float dy[8], z[8];

			unpack8(dy, douts[i * ROW_THREADS]);
			unpack8(z, gates[i * ROW_THREADS]);
			/* Of four vectors there are no registers for it. */
			if (CENTERED && V > 2 && at.inside[i])
				load8f(b[i], f.bias + first + at.column + i * at.apart);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const struct curve_pair s = curve_of(SILU, z[j]);
				const float scaled = dy[j] * r, through = scaled * u[i][j];
				const float weighed = through * w[i][j];

				du[i][j] = scaled * w[i][j] * s.value;
				sums[i][j] = fmaf(through, s.value, sums[i][j]);
				along[0] = fmaf(weighed, s.value, along[0]);
				z[j] = s.slope *
				       (CENTERED ? fmaf(dy[j], b[i][j], weighed) : weighed);
				if (CENTERED) {
					bias_sums[i][j] = fmaf(dy[j], s.value, bias_sums[i][j]);
					along[1] += du[i][j];
				}
			}
			store_row<V>(dgate, z, i, at, there);
		}
		sum_rows<BLOCK>(along, p, CENTERED ? 1 : k & 1);
		const float projection = along[0] * per_column * r * r;
#pragma unroll
		for (int i = 0; i < V; i++) {
#pragma unroll
			for (int j = 0; j < 8; j++) {
				if (CENTERED)
					du[i][j] -= along[CENTERED] * per_column;
				du[i][j] = fmaf(-u[i][j], projection, du[i][j]);
			}
			store_row<V>(dx, du[i], i, at, there);
		}
		r = next_r;
		dx += p.row_step;
		dgate += gate_step;
		from = next_stage(from, p.stages);
	}
	copy_wait<0>();
	if (CENTERED) {
		store_columns<V>(parts + at.slot * d, sums, at);
		store_columns<V>(parts + (p.slots + at.slot) * d, bias_sums, at);
	} else {
		store_block_sums<V, BLOCK>(parts + blockIdx.x * d, sums, at, d);
	}
}

/* The mean of a wide row. */
static __device__ __forceinline__ float row_mean(const bf16 *x, int64_t d)
{
	float sum = 0.0f, v[8];

	for (int64_t i = 8 * threadIdx.x; i < d; i += 8 * ROW_THREADS) {
		load8(v, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum += v[j];
	}
	return block_sum(sum) / (float)d;
}

/* The same of rows of any width. */
template <bool CENTERED>
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_norm_gate_backward_kernel(const __grid_constant__ struct norm_gate_backward_args a,
                                       const __grid_constant__ struct row_plan p, float *parts)
{
	const struct norm_gate_args &f = a.forward;
	const int64_t d = f.d_head, width = f.n_heads * d;
	const struct row_place<1> at = place_of<1, true>(p, f.n_tokens, f.n_heads, d);
	const int64_t first = at.head * d;
	const float *weight = f.weight + (CENTERED ? first : 0);
	float *sums = parts + at.slot * d, *bias_sums = sums + p.slots * d;

	clear_sums(sums, d);
	if (CENTERED)
		clear_sums(bias_sums, d);
	for (int64_t n = at.token; n < f.n_tokens; n += p.step) {
		const bf16 *x = elements(f.x) + n * width + first;
		const bf16 *dout = elements(a.dout) + n * width + first;
		const bf16 *gate = elements(f.gate) + n * f.gate_stride + first;
		const float r = f.rstd[n * f.n_heads + at.head];
		const float mean = CENTERED ? row_mean(x, d) : 0.0f;
		float xs[8], dy[8], z[8], w[8], b[8] = {}, projection = 0.0f, center = 0.0f;

		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			load8(xs, x + i);
			load8(dy, dout + i);
			load8(z, gate + i);
			load8f(w, weight + i);
			if (CENTERED)
				load8f(b, f.bias + first + i);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const struct curve_pair s = curve_of(f.curve == CURVE_SILU, z[j]);
				const float normed = (xs[j] - mean) * r, dnorm = dy[j] * s.value;

				z[j] = dy[j] * (normed * w[j] + b[j]) * s.slope;
				xs[j] = dnorm * normed;
				projection += xs[j] * w[j];
				center += dnorm * w[j];
				dy[j] = dnorm;
			}
			add8(sums + i, xs);
			if (CENTERED)
				add8(bias_sums + i, dy);
			store8(static_cast<bf16 *>(a.dgate) + n * f.gate_stride + first + i, z);
		}
		projection = block_sum(projection) / (float)d;
		center = CENTERED ? block_sum(center) / (float)d : 0.0f;
		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			load8(xs, x + i);
			load8(dy, dout + i);
			load8(z, gate + i);
			load8f(w, weight + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				dy[j] = r * (dy[j] * curve_of(f.curve == CURVE_SILU, z[j]).value *
				                     w[j] -
				             center - (xs[j] - mean) * r * projection);
			store8(static_cast<bf16 *>(a.dx) + n * width + first + i, dy);
		}
	}
}

template <bool CENTERED, bool SILU>
static auto norm_gate_kernel_of(const struct row_plan &p)
        -> decltype(&norm_gate_backward_kernel<2, true, true, true>)
{
	const bool block = p.lanes == ROW_THREADS;

	if (p.vectors == 0)
		return wide_norm_gate_backward_kernel<CENTERED>;
	if (p.vectors == 2)
		return block ? norm_gate_backward_kernel<2, true, CENTERED, SILU>
		             : norm_gate_backward_kernel<2, false, CENTERED, SILU>;
	return block ? norm_gate_backward_kernel<4, true, CENTERED, SILU>
	             : norm_gate_backward_kernel<4, false, CENTERED, SILU>;
}

static struct row_plan norm_gate_plan(const struct device *device, const struct norm_gate_args *f)
{
	const bool group = f->norm == NORM_GROUP;

	return plan_rows(device, f->n_tokens, f->n_heads, f->d_head, 3, per_sm(2, group),
	                 per_sm(4, group));
}

} // namespace

extern "C" const char *portable_norm_gate_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct norm_gate_backward_args *>(args);
	const struct norm_gate_args *f = &a->forward;

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
	const struct norm_gate_args *f = &a->forward;
	const struct row_plan p = norm_gate_plan(device, f);

	return (size_t)((f->norm == NORM_GROUP ? 2 * p.slots : p.blocks) * f->d_head) *
	       sizeof(float);
}

extern "C" enum status portable_norm_gate_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	static constexpr char NAME[] = "norm_gate_backward";
	const auto *a = static_cast<const struct norm_gate_backward_args *>(args);
	const struct norm_gate_args *f = &a->forward;
	const struct row_plan p = norm_gate_plan(device, f);
	const bool group = f->norm == NORM_GROUP;
	const int64_t width = f->n_heads * f->d_head;
	float *parts = static_cast<float *>(workspace);
	const auto kernel = f->curve == CURVE_SILU ? group ? norm_gate_kernel_of<true, true>(p)
	                                                   : norm_gate_kernel_of<false, true>(p)
	                    : group ? norm_gate_kernel_of<true, false>(p)
	                                           : norm_gate_kernel_of<false, false>(p);
	enum status status = launch(device, NAME, kernel, dim3((unsigned)p.blocks), ROW_THREADS,
	                            p.shared, *a, p, parts);

	if (status == STATUS_OK && group)
		status = column_sums(device, NAME, parts + p.slots * f->d_head, p.step, width,
		                     width, a->dbias);
	if (status != STATUS_OK)
		return status;
	return group ? column_sums(device, NAME, parts, p.step, width, width, a->dweight)
	             : column_sums(device, NAME, parts, p.blocks, f->d_head, f->d_head, a->dweight);
}

/* ---- gate_norm ---- */

namespace
{

/* With w = x + skip_weight skip: u = w silu(gate), eight elements. */
struct gated8 {
	float w[8], u[8], skip[8], slope[8]; /* slope: of silu; value: silu */
	float value[8];
};

static __device__ __forceinline__ void make_gated(struct gated8 &g, const vector8 &x, bool has_skip,
                                                  const vector8 &skip, float weight, bool has_gate,
                                                  const vector8 &gate)
{
	float z[8];

	unpack8(g.w, x);
	unpack8(g.skip, skip);
	unpack8(z, gate);
#pragma unroll
	for (int j = 0; has_skip && j < 8; j++)
		g.w[j] = fmaf(weight, g.skip[j], g.w[j]);
	if (has_gate) {
#pragma unroll
		for (int j = 0; j < 8; j++) {
			const struct curve_pair s = curve_of(true, z[j]);

			g.value[j] = s.value;
			g.slope[j] = s.slope;
			g.u[j] = g.w[j] * s.value;
		}
		return;
	}
#pragma unroll
	for (int j = 0; j < 8; j++) {
		g.value[j] = 1.0f;
		g.slope[j] = 0.0f;
		g.u[j] = g.w[j];
	}
}

/* x += dskip_weight's share of eight elements of one head. */
static __device__ __forceinline__ void add_product(float &sum, const float (&x)[8],
                                                   const float (&y)[8])
{
#pragma unroll
	for (int j = 0; j < 8; j++)
		sum = fmaf(x[j], y[j], sum);
}

/*
 * parts [gridDim.x, group]: a block's share of dweight; skip_parts [step, H d / 8] iff skip: of
 * dskip_weight, by vectors of eight columns. GATED: with a gate or a skip.
 */
template <int V, bool BLOCK, bool GATED>
static __global__ void __launch_bounds__(ROW_THREADS, per_sm(V, GATED))
        gate_norm_backward_kernel(const __grid_constant__ struct gate_norm_backward_args a,
                                  const __grid_constant__ struct row_plan p, float *parts,
                                  float *skip_parts)
{
	const struct gate_norm_args &f = a.forward;
	const int64_t d = f.n_heads * f.d_head / f.groups;
	const struct row_place<V> at = place_of<V, BLOCK>(p, f.n_tokens, f.groups, d);
	const int64_t first = at.head * d + at.column, row = at.token * f.groups * d + first;
	const bool has_skip = GATED && f.skip, has_gate = GATED && f.gate;
	const int of_residual = 2, of_skip = of_residual + (a.dresidual ? 1 : 0);
	const int of_gate = of_skip + (has_skip ? 1 : 0), tensors = of_gate + (has_gate ? 1 : 0);
	const int64_t skip_step = held(p.step * f.skip_stride);
	const int64_t gate_step = held(p.step * f.gate_stride);
	const int rounds = (int)divide_up(f.n_tokens, p.step);
	const float per_column = 1.0f / (float)d, *rstd = f.rstd + at.slot;
	const bf16 *x = elements(f.x) + row, *dout = elements(a.dout) + row;
	const bf16 *residual = elements(a.dresidual) + row;
	const bf16 *skip = elements(f.skip) + at.token * f.skip_stride + first;
	const bf16 *gate = elements(f.gate) + at.token * f.gate_stride + first;
	bf16 *dx = static_cast<bf16 *>(a.dx) + row, *dskip = static_cast<bf16 *>(a.dskip) + row;
	bf16 *dgate = static_cast<bf16 *>(a.dgate) + at.token * f.gate_stride + first;
	float w[V][8], sums[V][8] = {}, skip_weight[V] = {}, skip_sums[V] = {};
	float r = at.own > 0 ? *rstd : 0.0f;
	int from = 0, to = 0;

	load_columns<V>(w, f.weight, at);
#pragma unroll
	for (int i = 0; i < V; i++)
		if (has_skip && at.inside[i])
			skip_weight[i] = f.skip_weight[(first + i * at.apart) / f.d_head];
	for (int k = 1 - p.stages; k < rounds; k++) {
		const bool ahead = k + p.stages - 1 < at.own, there = k < at.own;

		copy_row<V>(ring_slot<V>(tensors, to, 0), x, at, ahead);
		copy_row<V>(ring_slot<V>(tensors, to, 1), dout, at, ahead);
		if (a.dresidual)
			copy_row<V>(ring_slot<V>(tensors, to, of_residual), residual, at, ahead);
		if (has_skip)
			copy_row<V>(ring_slot<V>(tensors, to, of_skip), skip, at, ahead);
		if (has_gate)
			copy_row<V>(ring_slot<V>(tensors, to, of_gate), gate, at, ahead);
		copy_commit();
		to = next_stage(to, p.stages);
		x += p.row_step;
		dout += p.row_step;
		residual += p.row_step;
		skip += skip_step;
		gate += gate_step;
		if (k < 0)
			continue;
		rstd += p.slots;

		const float next_r = k + 1 < at.own ? *rstd : 0.0f;
		const vector8 *xs = ring_slot<V>(tensors, from, 0);
		const vector8 *douts = ring_slot<V>(tensors, from, 1);
		const vector8 *residuals = ring_slot<V>(tensors, from, of_residual);
		const vector8 *skips = ring_slot<V>(tensors, from, of_skip);
		const vector8 *gates = ring_slot<V>(tensors, from, of_gate);
		/* Kept for what follows the sum: without a gate u and its gradient over rstd, with
		 * one its sigmoid; the rest is made again. */
		float u[V][8], du[V][8], open[V][8], along[1] = {};

		wait_rows(p.stages - 1);
#pragma unroll
		for (int i = 0; i < V; i++) {
			float other[8], dy[8];

			unpack8(u[i], xs[i * ROW_THREADS]);
			unpack8(dy, douts[i * ROW_THREADS]);
			if (has_skip) {
				unpack8(other, skips[i * ROW_THREADS]);
#pragma unroll
				for (int j = 0; j < 8; j++)
					u[i][j] = fmaf(skip_weight[i], other[j], u[i][j]);
			}
			if (has_gate) {
				unpack8(other, gates[i * ROW_THREADS]);
#pragma unroll
				for (int j = 0; j < 8; j++) {
					open[i][j] = sigmoid(other[j]);
					u[i][j] *= other[j] * open[i][j];
				}
			}
#pragma unroll
			for (int j = 0; j < 8; j++) {
				sums[i][j] = fmaf(dy[j] * r, u[i][j], sums[i][j]);
				du[i][j] = dy[j] * w[i][j];
				along[0] = fmaf(du[i][j], u[i][j], along[0]);
			}
		}
		sum_rows<BLOCK>(along, p, k & 1);
		const float projection = along[0] * per_column * r * r;
#pragma unroll
		for (int i = 0; i < V; i++) {
			float sum[8] = {};

			if (a.dresidual)
				unpack8(sum, residuals[i * ROW_THREADS]);
			if (!GATED) {
#pragma unroll
				for (int j = 0; j < 8; j++)
					sum[j] = fmaf(r, fmaf(-u[i][j], projection, du[i][j]),
					              sum[j]);
				store_row<V>(dx, sum, i, at, there);
				continue;
			}
			float g[8], dw[8], other[8];

			unpack8(g, xs[i * ROW_THREADS]);
			unpack8(dw, douts[i * ROW_THREADS]);
			if (has_skip) {
				unpack8(other, skips[i * ROW_THREADS]);
#pragma unroll
				for (int j = 0; j < 8; j++)
					g[j] = fmaf(skip_weight[i], other[j], g[j]);
			}
			/* g: x and the skip; then the gate's gradient. */
			if (has_gate) {
				float z[8];

				unpack8(z, gates[i * ROW_THREADS]);
#pragma unroll
				for (int j = 0; j < 8; j++) {
					const float s = open[i][j], value = z[j] * s;
					const float d = r * fmaf(-g[j] * value, projection,
					                         dw[j] * w[i][j]);

					g[j] *= d * fmaf(value, 1.0f - s, s);
					dw[j] = d * value;
				}
				store_row<V>(dgate, g, i, at, there);
			} else {
#pragma unroll
				for (int j = 0; j < 8; j++)
					dw[j] = r * fmaf(-g[j], projection, dw[j] * w[i][j]);
			}
#pragma unroll
			for (int j = 0; j < 8; j++)
				sum[j] += dw[j];
			store_row<V>(dx, sum, i, at, there);
			if (!has_skip)
				continue;
			add_product(skip_sums[i], other, dw);
#pragma unroll
			for (int j = 0; j < 8; j++)
				dw[j] *= skip_weight[i];
			store_row<V>(dskip, dw, i, at, there);
		}
		r = next_r;
		dx += p.row_step;
		dskip += p.row_step;
		dgate += gate_step;
		from = next_stage(from, p.stages);
	}
	copy_wait<0>();
	store_block_sums<V, BLOCK>(parts + blockIdx.x * d, sums, at, d);
#pragma unroll
	for (int i = 0; has_skip && i < V; i++)
		if (at.inside[i])
			skip_parts[at.slot * (d / 8) + (at.column + i * at.apart) / 8] =
			        skip_sums[i];
}

/* The same of rows of any width. */
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_gate_norm_backward_kernel(const __grid_constant__ struct gate_norm_backward_args a,
                                       const __grid_constant__ struct row_plan p, float *parts,
                                       float *skip_parts)
{
	const struct gate_norm_args &f = a.forward;
	const int64_t width = f.n_heads * f.d_head, group = width / f.groups;
	const struct row_place<1> at = place_of<1, true>(p, f.n_tokens, f.groups, group);
	const int64_t first = at.head * group;
	float *sums = parts + at.slot * group, *skip_sums = skip_parts + at.slot * (group / 8);

	clear_sums(sums, group);
	for (int64_t i = at.column / 8; f.skip && i < group / 8; i += ROW_THREADS)
		skip_sums[i] = 0.0f;
	for (int64_t n = at.token; n < f.n_tokens; n += p.step) {
		const float r = f.rstd[n * f.groups + at.head];
		float projection = 0.0f;

		for (int pass = 0; pass < 2; pass++) {
			for (int64_t i = at.column; i < group; i += 8 * ROW_THREADS) {
				const int64_t column = first + i, place = n * width + column;
				const float weight =
				        f.skip ? f.skip_weight[column / f.d_head] : 0.0f;
				vector8 skip = {}, gate = {};
				float dy[8], w[8], dx[8] = {};
				struct gated8 g;

				if (f.skip)
					skip = load8(elements(f.skip) + n * f.skip_stride + column);
				if (f.gate)
					gate = load8(elements(f.gate) + n * f.gate_stride + column);
				make_gated(g, load8(elements(f.x) + place), f.skip, skip, weight,
				           f.gate, gate);
				load8(dy, elements(a.dout) + place);
				load8f(w, f.weight + i);
				if (pass == 0) {
#pragma unroll
					for (int j = 0; j < 8; j++) {
						dy[j] *= g.u[j] * r;
						projection += dy[j] * w[j];
					}
					add8(sums + i, dy);
					continue;
				}
				if (a.dresidual)
					load8(dx, elements(a.dresidual) + place);
#pragma unroll
				for (int j = 0; j < 8; j++) {
					const float du =
					        r * (dy[j] * w[j] - g.u[j] * r * projection);

					dy[j] = du * g.value[j];
					g.w[j] *= du * g.slope[j];
					dx[j] += dy[j];
				}
				store8(static_cast<bf16 *>(a.dx) + place, dx);
				if (f.gate)
					store8(static_cast<bf16 *>(a.dgate) + n * f.gate_stride +
					               column,
					       g.w);
				if (!f.skip)
					continue;
				add_product(skip_sums[i / 8], g.skip, dy);
#pragma unroll
				for (int j = 0; j < 8; j++)
					dy[j] *= weight;
				store8(static_cast<bf16 *>(a.dskip) + place, dy);
			}
			if (pass == 0)
				projection = block_sum(projection) / (float)group;
		}
	}
}

template <bool GATED>
static auto gate_norm_kernel_of(const struct row_plan &p)
        -> decltype(&gate_norm_backward_kernel<2, true, true>)
{
	const bool block = p.lanes == ROW_THREADS;

	if (p.vectors == 0)
		return wide_gate_norm_backward_kernel;
	if (p.vectors == 2)
		return block ? gate_norm_backward_kernel<2, true, GATED>
		             : gate_norm_backward_kernel<2, false, GATED>;
	return block ? gate_norm_backward_kernel<4, true, GATED>
	             : gate_norm_backward_kernel<4, false, GATED>;
}

static bool is_gated(const struct gate_norm_args *f)
{
	return f->skip || f->gate;
}

static struct row_plan gate_norm_plan(const struct device *device,
                                      const struct gate_norm_backward_args *a)
{
	const struct gate_norm_args *f = &a->forward;
	const int tensors = 2 + (a->dresidual ? 1 : 0) + (f->skip ? 1 : 0) + (f->gate ? 1 : 0);

	return plan_rows(device, f->n_tokens, f->groups, f->n_heads * f->d_head / f->groups,
	                 tensors, per_sm(2, is_gated(f)), per_sm(4, is_gated(f)));
}

/* Sums of each block, and of each of `step` tokens at a time; then of them all. */
static int64_t gate_norm_sums(const struct row_plan &p, const struct gate_norm_args *f)
{
	const int64_t width = f->n_heads * f->d_head;

	return p.blocks * (width / f->groups) + (f->skip ? (p.step + 1) * (width / 8) : 0);
}

} // namespace

extern "C" const char *portable_gate_norm_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct gate_norm_backward_args *>(args);
	const struct gate_norm_args *f = &a->forward;
	const int64_t group = f->n_heads * f->d_head / f->groups;

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

	return (size_t)gate_norm_sums(gate_norm_plan(device, a), &a->forward) * sizeof(float);
}

extern "C" enum status portable_gate_norm_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	static constexpr char NAME[] = "gate_norm_backward";
	const auto *a = static_cast<const struct gate_norm_backward_args *>(args);
	const struct gate_norm_args *f = &a->forward;
	const struct row_plan p = gate_norm_plan(device, a);
	const int64_t vectors = f->n_heads * f->d_head / 8;
	const int64_t group = f->n_heads * f->d_head / f->groups;
	float *parts = static_cast<float *>(workspace), *skip_parts = parts + p.blocks * group;
	float *columns = skip_parts + p.step * vectors;
	enum status status =
	        launch(device, NAME,
	               is_gated(f) ? gate_norm_kernel_of<true>(p) : gate_norm_kernel_of<false>(p),
	               dim3((unsigned)p.blocks), ROW_THREADS, p.shared, *a, p, parts, skip_parts);

	if (status == STATUS_OK)
		status = column_sums(device, NAME, parts, p.blocks, group, group, a->dweight);
	if (status != STATUS_OK || !f->skip)
		return status;
	status = column_sums(device, NAME, skip_parts, p.step, vectors, vectors, columns);
	if (status != STATUS_OK)
		return status;
	return part_sums(device, NAME, columns, f->n_heads, f->d_head / 8, a->dskip_weight);
}
