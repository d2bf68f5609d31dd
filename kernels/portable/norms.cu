/*
 * The norms behind a recurrence: norm, then gate (GLA, RetNet, KDA, RWKV-6) and gate, then norm
 * (Mamba-2; without a gate linear attention). Bound by memory: rows go through rings
 * (norm_rows.cuh), each is read once. Of a row of more than 4096 elements a block reads its own
 * share a second time.
 */
#include "kernels/portable/kernels.h"
#include "kernels/portable/norm_rows.cuh"

namespace
{

/* The blocks of a multiprocessor of rows of V vectors. */
static constexpr __host__ __device__ int per_sm(int vectors, bool more)
{
	return vectors == 2 ? (more ? 5 : 6) : more ? 3 : 4;
}

static __device__ __forceinline__ const bf16 *elements(const void *tensor)
{
	return static_cast<const bf16 *>(tensor);
}

/* silu(x), or sigmoid(x). */
static __device__ __forceinline__ float curve_of(bool silu, float x)
{
	return silu ? x * sigmoid(x) : sigmoid(x);
}

/* ---- norm, then gate ---- */

/* CENTERED: the mean is taken off first, and each channel has its own weight and bias. SILU: the
 * curve. */
template <int V, bool BLOCK, bool CENTERED, bool SILU>
static __global__ void __launch_bounds__(ROW_THREADS, per_sm(V, CENTERED))
        norm_gate_kernel(const __grid_constant__ struct norm_gate_args a,
                         const __grid_constant__ struct row_plan p)
{
	const struct row_place<V> at = place_of<V, BLOCK>(p, a.n_tokens, a.n_heads, a.d_head);
	const int64_t d = a.d_head, first = at.head * d;
	const int64_t row = (at.token * a.n_heads + at.head) * d + at.column;
	const int64_t gate_step = held(p.step * a.gate_stride);
	const int rounds = (int)divide_up(a.n_tokens, p.step);
	const float per_column = 1.0f / (float)d;
	const bf16 *x = elements(a.x) + row;
	const bf16 *gate = elements(a.gate) + at.token * a.gate_stride + first + at.column;
	bf16 *out = static_cast<bf16 *>(a.out) + row;
	float *rstd = a.rstd && at.leads ? a.rstd + at.slot : NULL;
	float w[V][8], b[V][8];
	int from = 0, to = 0;

	load_columns<V>(w, a.weight + (CENTERED ? first : 0), at);
	if (CENTERED)
		load_columns<V>(b, a.bias + first, at);
	for (int k = 1 - p.stages; k < rounds; k++) {
		const bool ahead = k + p.stages - 1 < at.own, there = k < at.own;

		copy_row<V>(ring_slot<V>(2, to, 0), x, at, ahead);
		copy_row<V>(ring_slot<V>(2, to, 1), gate, at, ahead);
		copy_commit();
		to = next_stage(to, p.stages);
		x += p.row_step;
		gate += gate_step;
		if (k < 0)
			continue;
		wait_rows(p.stages - 1);

		const vector8 *xs = ring_slot<V>(2, from, 0), *gates = ring_slot<V>(2, from, 1);
		float v[V][8], z[8];

#pragma unroll
		for (int i = 0; i < V; i++)
			unpack8(v[i], xs[i * ROW_THREADS]);
		if (CENTERED) {
			float total[1] = {};

#pragma unroll
			for (int i = 0; i < V; i++)
#pragma unroll
				for (int j = 0; j < 8; j++)
					total[0] += v[i][j];
			sum_rows<BLOCK>(total, p, 0);
			/* Elements past the row's end are not off the mean. */
#pragma unroll
			for (int i = 0; i < V; i++)
#pragma unroll
				for (int j = 0; j < 8; j++)
					v[i][j] -= at.inside[i] ? total[0] * per_column : 0.0f;
		}
		float squares[1] = {};
#pragma unroll
		for (int i = 0; i < V; i++)
#pragma unroll
			for (int j = 0; j < 8; j++)
				squares[0] = fmaf(v[i][j], v[i][j], squares[0]);
		sum_rows<BLOCK>(squares, p, CENTERED ? 1 : k & 1);
		const float r = rsqrtf(squares[0] * per_column + a.eps);
#pragma unroll
		for (int i = 0; i < V; i++) {
			unpack8(z, gates[i * ROW_THREADS]);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const float y = v[i][j] * r;

				v[i][j] = (CENTERED ? fmaf(y, w[i][j], b[i][j]) : y * w[i][j]) *
				          curve_of(SILU, z[j]);
			}
			store_row<V>(out, v[i], i, at, there);
		}
		if (there && rstd)
			*rstd = r;
		from = next_stage(from, p.stages);
		out += p.row_step;
		if (rstd)
			rstd += p.slots;
	}
	copy_wait<0>();
}

/* The same of rows of any width. */
template <bool CENTERED>
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_norm_gate_kernel(const __grid_constant__ struct norm_gate_args a,
                              const __grid_constant__ struct row_plan p)
{
	const struct row_place<1> at = place_of<1, true>(p, a.n_tokens, a.n_heads, a.d_head);
	const int64_t d = a.d_head, first = at.head * d, width = a.n_heads * d;
	const float *weight = a.weight + (CENTERED ? first : 0);

	for (int64_t n = at.token; n < a.n_tokens; n += p.step) {
		const bf16 *x = elements(a.x) + n * width + first;
		const bf16 *gate = elements(a.gate) + n * a.gate_stride + first;
		bf16 *out = static_cast<bf16 *>(a.out) + n * width + first;
		float sum = 0.0f, mean = 0.0f, v[8], z[8], w[8], b[8] = {};

		for (int64_t i = at.column; CENTERED && i < d; i += 8 * ROW_THREADS) {
			load8(v, x + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				mean += v[j];
		}
		if (CENTERED)
			mean = block_sum(mean) / (float)d;
		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			load8(v, x + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				sum += (v[j] - mean) * (v[j] - mean);
		}
		const float r = rsqrtf(block_sum(sum) / (float)d + a.eps);
		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			load8(v, x + i);
			load8(z, gate + i);
			load8f(w, weight + i);
			if (CENTERED)
				load8f(b, a.bias + first + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				v[j] = ((v[j] - mean) * r * w[j] + b[j]) *
				       curve_of(a.curve == CURVE_SILU, z[j]);
			store8(out + i, v);
		}
		if (a.rstd && at.leads)
			a.rstd[n * a.n_heads + at.head] = r;
	}
}

template <bool CENTERED, bool SILU>
static auto norm_gate_kernel_of(const struct row_plan &p)
        -> decltype(&norm_gate_kernel<2, true, true, true>)
{
	const bool block = p.lanes == ROW_THREADS;

	if (p.vectors == 0)
		return wide_norm_gate_kernel<CENTERED>;
	if (p.vectors == 2)
		return block ? norm_gate_kernel<2, true, CENTERED, SILU>
		             : norm_gate_kernel<2, false, CENTERED, SILU>;
	return block ? norm_gate_kernel<4, true, CENTERED, SILU>
	             : norm_gate_kernel<4, false, CENTERED, SILU>;
}

} // namespace

extern "C" const char *portable_norm_gate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct norm_gate_args *>(args);

	if (!is_known_curve(a->curve))
		return "an unknown curve";
	if (!is_known_norm(a->norm))
		return "an unknown norm";
	return either(check_widths(a->d_head, a->gate_stride), check_aligned(a->gate));
}

extern "C" enum status portable_norm_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct norm_gate_args *>(args);
	const bool group = a->norm == NORM_GROUP;
	const struct row_plan p = plan_rows(device, a->n_tokens, a->n_heads, a->d_head, 2,
	                                    per_sm(2, group), per_sm(4, group));

	const auto kernel = a->curve == CURVE_SILU ? group ? norm_gate_kernel_of<true, true>(p)
	                                                   : norm_gate_kernel_of<false, true>(p)
	                    : group ? norm_gate_kernel_of<true, false>(p)
	                                           : norm_gate_kernel_of<false, false>(p);

	return launch(device, "norm_gate", kernel, dim3((unsigned)p.blocks), ROW_THREADS, p.shared,
	              *a, p);
}

/* ---- gate, then norm ---- */

namespace
{

/* u = (x + weight skip) silu(gate), of eight elements. */
static __device__ __forceinline__ void gated8(float (&u)[8], bool has_skip, const vector8 &skip,
                                              float weight, bool has_gate, const vector8 &gate)
{
	float other[8];

	unpack8(other, skip);
#pragma unroll
	for (int j = 0; has_skip && j < 8; j++)
		u[j] = fmaf(weight, other[j], u[j]);
	unpack8(other, gate);
#pragma unroll
	for (int j = 0; has_gate && j < 8; j++)
		u[j] *= curve_of(true, other[j]);
}

/* GATED: with a gate or a skip. */
template <int V, bool BLOCK, bool GATED>
static __global__ void __launch_bounds__(ROW_THREADS, per_sm(V, GATED))
        gate_norm_kernel(const __grid_constant__ struct gate_norm_args a,
                         const __grid_constant__ struct row_plan p)
{
	const int64_t d = a.n_heads * a.d_head / a.groups;
	const struct row_place<V> at = place_of<V, BLOCK>(p, a.n_tokens, a.groups, d);
	const int64_t first = at.head * d + at.column;
	const int64_t row = at.token * a.groups * d + first;
	const int rounds = (int)divide_up(a.n_tokens, p.step);
	const bool has_skip = GATED && a.skip, has_gate = GATED && a.gate;
	const int n_skip = has_skip ? 1 : 0, tensors = 1 + n_skip + (has_gate ? 1 : 0);
	const int64_t skip_step = held(p.step * a.skip_stride);
	const int64_t gate_step = held(p.step * a.gate_stride);
	const float per_column = 1.0f / (float)d;
	const bf16 *x = elements(a.x) + row;
	const bf16 *skip = elements(a.skip) + at.token * a.skip_stride + first;
	const bf16 *gate = elements(a.gate) + at.token * a.gate_stride + first;
	bf16 *out = static_cast<bf16 *>(a.out) + row;
	float *rstd = a.rstd && at.leads ? a.rstd + at.slot : NULL;
	float w[V][8], skip_weight[V] = {};
	int from = 0, to = 0;

	load_columns<V>(w, a.weight, at);
#pragma unroll
	for (int i = 0; i < V; i++)
		if (has_skip && at.inside[i])
			skip_weight[i] = a.skip_weight[(first + i * at.apart) / a.d_head];
	for (int k = 1 - p.stages; k < rounds; k++) {
		const bool ahead = k + p.stages - 1 < at.own, there = k < at.own;

		copy_row<V>(ring_slot<V>(tensors, to, 0), x, at, ahead);
		if (has_skip)
			copy_row<V>(ring_slot<V>(tensors, to, 1), skip, at, ahead);
		if (has_gate)
			copy_row<V>(ring_slot<V>(tensors, to, 1 + n_skip), gate, at, ahead);
		copy_commit();
		to = next_stage(to, p.stages);
		x += p.row_step;
		skip += skip_step;
		gate += gate_step;
		if (k < 0)
			continue;
		wait_rows(p.stages - 1);

		const vector8 *xs = ring_slot<V>(tensors, from, 0);
		const vector8 *skips = ring_slot<V>(tensors, from, 1);
		const vector8 *gates = ring_slot<V>(tensors, from, 1 + n_skip);
		float u[V][8], squares[1] = {};

#pragma unroll
		for (int i = 0; i < V; i++) {
			vector8 other = {}, gate8 = {};

			unpack8(u[i], xs[i * ROW_THREADS]);
			if (has_skip)
				other = skips[i * ROW_THREADS];
			if (has_gate)
				gate8 = gates[i * ROW_THREADS];
			gated8(u[i], has_skip, other, skip_weight[i], has_gate, gate8);
#pragma unroll
			for (int j = 0; j < 8; j++)
				squares[0] = fmaf(u[i][j], u[i][j], squares[0]);
		}
		sum_rows<BLOCK>(squares, p, k & 1);
		const float r = rsqrtf(squares[0] * per_column + a.eps);
#pragma unroll
		for (int i = 0; i < V; i++) {
#pragma unroll
			for (int j = 0; j < 8; j++)
				u[i][j] *= r * w[i][j];
			store_row<V>(out, u[i], i, at, there);
		}
		if (there && rstd)
			*rstd = r;
		from = next_stage(from, p.stages);
		out += p.row_step;
		if (rstd)
			rstd += p.slots;
	}
	copy_wait<0>();
}

/* Eight elements before the norm, from `column` of token n on. */
static __device__ __forceinline__ void load_gated(float (&u)[8], const struct gate_norm_args &a,
                                                  int64_t n, int64_t column)
{
	const float weight = a.skip ? a.skip_weight[column / a.d_head] : 0.0f;
	vector8 skip = {}, gate = {};

	load8(u, elements(a.x) + n * a.n_heads * a.d_head + column);
	if (a.skip)
		skip = load8(elements(a.skip) + n * a.skip_stride + column);
	if (a.gate)
		gate = load8(elements(a.gate) + n * a.gate_stride + column);
	gated8(u, a.skip, skip, weight, a.gate, gate);
}

/* The same of rows of any width. */
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_gate_norm_kernel(const __grid_constant__ struct gate_norm_args a,
                              const __grid_constant__ struct row_plan p)
{
	const int64_t width = a.n_heads * a.d_head, d = width / a.groups;
	const struct row_place<1> at = place_of<1, true>(p, a.n_tokens, a.groups, d);
	const int64_t first = at.head * d;

	for (int64_t n = at.token; n < a.n_tokens; n += p.step) {
		float sum = 0.0f, u[8], w[8];

		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			load_gated(u, a, n, first + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				sum += u[j] * u[j];
		}
		const float r = rsqrtf(block_sum(sum) / (float)d + a.eps);
		for (int64_t i = at.column; i < d; i += 8 * ROW_THREADS) {
			load_gated(u, a, n, first + i);
			load8f(w, a.weight + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				u[j] *= r * w[j];
			store8(static_cast<bf16 *>(a.out) + n * width + first + i, u);
		}
		if (a.rstd && at.leads)
			a.rstd[n * a.groups + at.head] = r;
	}
}

template <bool GATED>
static auto gate_norm_kernel_of(const struct row_plan &p)
        -> decltype(&gate_norm_kernel<2, true, true>)
{
	const bool block = p.lanes == ROW_THREADS;

	if (p.vectors == 0)
		return wide_gate_norm_kernel;
	if (p.vectors == 2)
		return block ? gate_norm_kernel<2, true, GATED> : gate_norm_kernel<2, false, GATED>;
	return block ? gate_norm_kernel<4, true, GATED> : gate_norm_kernel<4, false, GATED>;
}

} // namespace

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
	const int tensors = 1 + (a->skip ? 1 : 0) + (a->gate ? 1 : 0);
	const struct row_plan p =
	        plan_rows(device, a->n_tokens, a->groups, a->n_heads * a->d_head / a->groups,
	                  tensors, per_sm(2, tensors > 1), per_sm(4, tensors > 1));

	return launch(device, "gate_norm",
	              tensors > 1 ? gate_norm_kernel_of<true>(p) : gate_norm_kernel_of<false>(p),
	              dim3((unsigned)p.blocks), ROW_THREADS, p.shared, *a, p);
}
