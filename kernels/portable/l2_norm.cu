/*
 * L2 norm of the heads of q and k, and its backward.
 *
 * Roles: as many lanes as a head has vectors of eight elements, at most a warp, take one head of
 * one token. Layout: views of bf16, moved as 16 bytes; what a wide head is read a second time for
 * comes from the L1 cache. Invariant: every lane of a warp takes part in its sums, those past the
 * last row with zeros. Limiter: memory.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128 };

/* Row `row` of a [B, T, H, d] view. */
static __device__ __forceinline__ bf16 *row_of(const struct view &v, const struct l2_norm_args &a,
                                               int64_t row)
{
	const int64_t n = row / a.n_heads;

	return at(v, n / a.seq_len, n % a.seq_len, row % a.n_heads);
}

static __global__ void __launch_bounds__(THREADS)
        l2_norm_kernel(const __grid_constant__ struct l2_norm_args a, int lanes)
{
	const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
	const int lane = threadIdx.x % lanes;
	const bool valid = row < a.batch * a.seq_len * a.n_heads;
	const bf16 *x = row_of(a.x, a, valid ? row : 0);
	float sum = 0.0f, u[8];

	for (int64_t i = 8 * lane; valid && i < a.d_head; i += 8 * lanes) {
		load8(u, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum = fmaf(u[j], u[j], sum);
	}
	const float inverse = rsqrtf(group_sum(sum, lanes) + a.eps);
	for (int64_t i = 8 * lane; valid && i < a.d_head; i += 8 * lanes) {
		load8(u, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			u[j] *= inverse;
		store8(row_of(a.y, a, row) + i, u);
	}
	if (valid && a.inverse && lane == 0)
		a.inverse[row] = inverse;
}

extern "C" const char *portable_l2_norm_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct l2_norm_args *>(args);

	return either(check_widths(a->d_head), check_aligned(&a->x, &a->y));
}

extern "C" enum status portable_l2_norm(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct l2_norm_args *>(args);
	const int lanes = lanes_for(a->d_head);
	const int64_t threads = a->batch * a->seq_len * a->n_heads * lanes;

	return launch_each(device, "l2_norm", l2_norm_kernel, threads, THREADS, *a, lanes);
}

static __global__ void __launch_bounds__(THREADS)
        l2_norm_backward_kernel(const __grid_constant__ struct l2_norm_backward_args a, int lanes)
{
	const struct l2_norm_args &f = a.forward;
	const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / lanes;
	const int lane = threadIdx.x % lanes;
	const bool valid = row < f.batch * f.seq_len * f.n_heads;
	const int64_t from = valid ? row : 0;
	const bf16 *y = row_of(f.y, f, from), *dy = row_of(a.dy, f, from);
	float along = 0.0f, u[8], du[8];

	for (int64_t i = 8 * lane; valid && i < f.d_head; i += 8 * lanes) {
		load8(u, y + i);
		load8(du, dy + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			along = fmaf(u[j], du[j], along);
	}
	along = group_sum(along, lanes);
	for (int64_t i = 8 * lane; valid && i < f.d_head; i += 8 * lanes) {
		load8(u, y + i);
		load8(du, dy + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			du[j] = f.inverse[row] * fmaf(-u[j], along, du[j]);
		store8(row_of(a.dx, f, row) + i, du);
	}
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
	const struct l2_norm_args *f = &a->forward;
	const int lanes = lanes_for(f->d_head);
	const int64_t threads = f->batch * f->seq_len * f->n_heads * lanes;

	return launch_each(device, "l2_norm_backward", l2_norm_backward_kernel, threads, THREADS,
	                   *a, lanes);
}
