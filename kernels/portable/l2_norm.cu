/*
 * L2 norm of the heads of q and k, and its backward. Bound by memory: a row is a head of a token
 * (norm_rows.cuh), in views of bf16 whose sequences may lie apart. Heads of more than 4096 elements
 * are read twice.
 */
#include "kernels/portable/kernels.h"
#include "kernels/portable/norm_rows.cuh"

namespace
{

/* The blocks of a multiprocessor of rows of V vectors, of one or two tensors. */
static constexpr __host__ __device__ int per_sm(int vectors, int tensors)
{
	return vectors > 2 ? 3 : tensors > 1 ? 5 : 6;
}

/* A place's tokens in a [B, T, H, d] view: by how much a step moves, and by how much more where it
 * ends beyond its sequence. */
struct view_walk {
	int64_t step, wrap;
};

static __device__ __forceinline__ struct view_walk walk_of(const struct view &v, int64_t seq_len,
                                                           int64_t step)
{
	return {held(step / seq_len * v.batch + step % seq_len * v.token),
	        held(v.batch - seq_len * v.token)};
}

/* A token's place in its sequence, a step on; whether that began anew. */
static __device__ __forceinline__ bool advance(int64_t &t, int64_t seq_len, int64_t step)
{
	t += step;
	if (t < seq_len)
		return false;
	t -= seq_len;
	return true;
}

static __device__ __forceinline__ int64_t offset_of(const struct view_walk &w, bool wrapped)
{
	return w.step + (wrapped ? w.wrap : 0);
}

/* A place's first row in a view. */
template <int V>
static __device__ __forceinline__ bf16 *first_row(const struct view &v,
                                                  const struct row_place<V> &p, int64_t seq_len)
{
	return at(v, p.token / seq_len, p.token % seq_len, p.head) + p.column;
}

template <int V, bool BLOCK>
static __global__ void __launch_bounds__(ROW_THREADS, per_sm(V, 1))
        l2_norm_kernel(const __grid_constant__ struct l2_norm_args a,
                       const __grid_constant__ struct row_plan p)
{
	const int64_t n_tokens = a.batch * a.seq_len, step = held(p.step % a.seq_len);
	const struct row_place<V> place = place_of<V, BLOCK>(p, n_tokens, a.n_heads, a.d_head);
	const struct view_walk of_x = walk_of(a.x, a.seq_len, p.step);
	const struct view_walk of_y = walk_of(a.y, a.seq_len, p.step);
	const int rounds = (int)divide_up(n_tokens, p.step);
	const bf16 *x = first_row(a.x, place, a.seq_len);
	bf16 *y = first_row(a.y, place, a.seq_len);
	float *inverses = a.inverse && place.leads ? a.inverse + place.slot : NULL;
	int64_t t = place.token % a.seq_len, t_ahead = t;
	int from = 0, to = 0;

	for (int k = 1 - p.stages; k < rounds; k++) {
		copy_row<V>(ring_slot<V>(1, to, 0), x, place, k + p.stages - 1 < place.own);
		copy_commit();
		to = next_stage(to, p.stages);
		x += offset_of(of_x, advance(t_ahead, a.seq_len, step));
		if (k < 0)
			continue;
		wait_rows(p.stages - 1);

		const vector8 *xs = ring_slot<V>(1, from, 0);
		float u[V][8], squares[1] = {};

#pragma unroll
		for (int i = 0; i < V; i++) {
			unpack8(u[i], xs[i * ROW_THREADS]);
#pragma unroll
			for (int j = 0; j < 8; j++)
				squares[0] = fmaf(u[i][j], u[i][j], squares[0]);
		}
		sum_rows<BLOCK>(squares, p, k & 1);
		const float inverse = rsqrtf(squares[0] + a.eps);
#pragma unroll
		for (int i = 0; i < V; i++) {
#pragma unroll
			for (int j = 0; j < 8; j++)
				u[i][j] *= inverse;
			store_row<V>(y, u[i], i, place, k < place.own);
		}
		if (inverses && k < place.own)
			*inverses = inverse;
		if (inverses)
			inverses += p.slots;
		y += offset_of(of_y, advance(t, a.seq_len, step));
		from = next_stage(from, p.stages);
	}
	copy_wait<0>();
}

/* The same of rows of any width. */
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_l2_norm_kernel(const __grid_constant__ struct l2_norm_args a,
                            const __grid_constant__ struct row_plan p)
{
	const int64_t n_tokens = a.batch * a.seq_len;
	const struct row_place<1> place = place_of<1, true>(p, n_tokens, a.n_heads, a.d_head);

	for (int64_t n = place.token; n < n_tokens; n += p.step) {
		const int64_t b = n / a.seq_len, t = n % a.seq_len;
		const bf16 *x = at(a.x, b, t, place.head);
		float sum = 0.0f, u[8];

		for (int64_t i = place.column; i < a.d_head; i += 8 * ROW_THREADS) {
			load8(u, x + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				sum = fmaf(u[j], u[j], sum);
		}
		const float inverse = rsqrtf(block_sum(sum) + a.eps);
		for (int64_t i = place.column; i < a.d_head; i += 8 * ROW_THREADS) {
			load8(u, x + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				u[j] *= inverse;
			store8(at(a.y, b, t, place.head) + i, u);
		}
		if (a.inverse && place.leads)
			a.inverse[n * a.n_heads + place.head] = inverse;
	}
}

template <int V, bool BLOCK>
static __global__ void __launch_bounds__(ROW_THREADS, per_sm(V, 2))
        l2_norm_backward_kernel(const __grid_constant__ struct l2_norm_backward_args a,
                                const __grid_constant__ struct row_plan p)
{
	const struct l2_norm_args &f = a.forward;
	const int64_t n_tokens = f.batch * f.seq_len, step = held(p.step % f.seq_len);
	const struct row_place<V> place = place_of<V, BLOCK>(p, n_tokens, f.n_heads, f.d_head);
	const struct view_walk of_y = walk_of(f.y, f.seq_len, p.step);
	const struct view_walk of_dy = walk_of(a.dy, f.seq_len, p.step);
	const struct view_walk of_dx = walk_of(a.dx, f.seq_len, p.step);
	const int rounds = (int)divide_up(n_tokens, p.step);
	const bf16 *y = first_row(f.y, place, f.seq_len), *dy = first_row(a.dy, place, f.seq_len);
	bf16 *dx = first_row(a.dx, place, f.seq_len);
	const float *inverses = f.inverse + place.slot;
	float inverse = place.own > 0 ? *inverses : 0.0f;
	int64_t t = place.token % f.seq_len, t_ahead = t;
	int from = 0, to = 0;

	for (int k = 1 - p.stages; k < rounds; k++) {
		const bool ahead = k + p.stages - 1 < place.own;

		copy_row<V>(ring_slot<V>(2, to, 0), y, place, ahead);
		copy_row<V>(ring_slot<V>(2, to, 1), dy, place, ahead);
		copy_commit();
		to = next_stage(to, p.stages);
		const bool wrapped = advance(t_ahead, f.seq_len, step);
		y += offset_of(of_y, wrapped);
		dy += offset_of(of_dy, wrapped);
		if (k < 0)
			continue;
		inverses += p.slots;

		const float next = k + 1 < place.own ? *inverses : 0.0f;
		const vector8 *ys = ring_slot<V>(2, from, 0), *dys = ring_slot<V>(2, from, 1);
		float u[V][8], du[V][8], along[1] = {};

		wait_rows(p.stages - 1);
#pragma unroll
		for (int i = 0; i < V; i++) {
			unpack8(u[i], ys[i * ROW_THREADS]);
			unpack8(du[i], dys[i * ROW_THREADS]);
#pragma unroll
			for (int j = 0; j < 8; j++)
				along[0] = fmaf(u[i][j], du[i][j], along[0]);
		}
		sum_rows<BLOCK>(along, p, k & 1);
#pragma unroll
		for (int i = 0; i < V; i++) {
#pragma unroll
			for (int j = 0; j < 8; j++)
				du[i][j] = inverse * fmaf(-u[i][j], along[0], du[i][j]);
			store_row<V>(dx, du[i], i, place, k < place.own);
		}
		inverse = next;
		dx += offset_of(of_dx, advance(t, f.seq_len, step));
		from = next_stage(from, p.stages);
	}
	copy_wait<0>();
}

/* The same of rows of any width. */
static __global__ void __launch_bounds__(ROW_THREADS)
        wide_l2_norm_backward_kernel(const __grid_constant__ struct l2_norm_backward_args a,
                                     const __grid_constant__ struct row_plan p)
{
	const struct l2_norm_args &f = a.forward;
	const int64_t n_tokens = f.batch * f.seq_len;
	const struct row_place<1> place = place_of<1, true>(p, n_tokens, f.n_heads, f.d_head);

	for (int64_t n = place.token; n < n_tokens; n += p.step) {
		const int64_t b = n / f.seq_len, t = n % f.seq_len;
		const bf16 *y = at(f.y, b, t, place.head), *dy = at(a.dy, b, t, place.head);
		const float inverse = f.inverse[n * f.n_heads + place.head];
		float along = 0.0f, u[8], du[8];

		for (int64_t i = place.column; i < f.d_head; i += 8 * ROW_THREADS) {
			load8(u, y + i);
			load8(du, dy + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				along = fmaf(u[j], du[j], along);
		}
		along = block_sum(along);
		for (int64_t i = place.column; i < f.d_head; i += 8 * ROW_THREADS) {
			load8(u, y + i);
			load8(du, dy + i);
#pragma unroll
			for (int j = 0; j < 8; j++)
				du[j] = inverse * fmaf(-u[j], along, du[j]);
			store8(at(a.dx, b, t, place.head) + i, du);
		}
	}
}

/* Of the kernels for two and four vectors, in warps and in blocks, and for any width: that of a
 * plan. */
template <typename Kernel>
static Kernel kernel_of(const struct row_plan &p, Kernel warp2, Kernel block2, Kernel warp4,
                        Kernel block4, Kernel wide)
{
	const bool block = p.lanes == ROW_THREADS;

	return p.vectors == 0   ? wide
	       : p.vectors == 2 ? (block ? block2 : warp2)
	                        : (block ? block4 : warp4);
}

static struct row_plan plan_of(const struct device *device, const struct l2_norm_args *f,
                               int tensors)
{
	return plan_rows(device, f->batch * f->seq_len, f->n_heads, f->d_head, tensors,
	                 per_sm(2, tensors), per_sm(4, tensors));
}

} // namespace

extern "C" const char *portable_l2_norm_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct l2_norm_args *>(args);

	return either(check_widths(a->d_head), check_aligned(&a->x, &a->y));
}

extern "C" enum status portable_l2_norm(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct l2_norm_args *>(args);
	const struct row_plan p = plan_of(device, a, 1);

	return launch(device, "l2_norm",
	              kernel_of(p, l2_norm_kernel<2, false>, l2_norm_kernel<2, true>,
	                        l2_norm_kernel<4, false>, l2_norm_kernel<4, true>,
	                        wide_l2_norm_kernel),
	              dim3((unsigned)p.blocks), ROW_THREADS, p.shared, *a, p);
}

extern "C" const char *portable_l2_norm_backward_unsupported(const struct device *,
                                                             const void *args)
{
	const auto *a = static_cast<const struct l2_norm_backward_args *>(args);

	return either(check_widths(a->forward.d_head),
	              check_aligned(&a->forward.y, &a->dy, &a->dx));
}

extern "C" enum status portable_l2_norm_backward(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct l2_norm_backward_args *>(args);
	const struct row_plan p = plan_of(device, &a->forward, 2);

	return launch(device, "l2_norm_backward",
	              kernel_of(p, l2_norm_backward_kernel<2, false>,
	                        l2_norm_backward_kernel<2, true>, l2_norm_backward_kernel<4, false>,
	                        l2_norm_backward_kernel<4, true>, wide_l2_norm_backward_kernel),
	              dim3((unsigned)p.blocks), ROW_THREADS, p.shared, *a, p);
}
