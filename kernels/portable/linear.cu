/* The projections: RMSNorm before, or the residual after, a product by cuBLASLt. A bias is added in
 * a pass of its own, the residual with it. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/product.cuh"

enum { ROWS = 4, THREADS = 256 };

static __global__ void __launch_bounds__(ROWS *WARP)
        rms_norm_kernel(const bf16 *x, const float *weight, bf16 *y, float *rstd, int64_t n_rows,
                        int64_t d, float eps)
{
	const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / WARP;
	const int lane = threadIdx.x % WARP;
	float sum = 0.0f, v[8], w[8];

	if (row >= n_rows)
		return;
	x += row * d;
	y += row * d;
	for (int64_t i = 8 * lane; i < d; i += 8 * WARP) {
		load8(v, x + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum += v[j] * v[j];
	}
	const float r = rsqrtf(group_sum(sum, WARP) / (float)d + eps);
	for (int64_t i = 8 * lane; i < d; i += 8 * WARP) {
		load8(v, x + i);
		load8f(w, weight + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			v[j] *= r * w[j];
		store8(y + i, v);
	}
	if (rstd && lane == 0)
		rstd[row] = r;
}

extern "C" const char *portable_norm_linear_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct norm_linear_args *>(args);

	return check_widths(a->d_in, a->d_out);
}

extern "C" size_t portable_norm_linear_workspace(const struct device *, const void *)
{
	return GEMM_WORKSPACE;
}

/* y [n, d_out] = x [n, d_in] weight^T + residual (or NULL), all bf16 and dense. */
static enum status multiply(struct device *device, int64_t n, int64_t d_in, int64_t d_out,
                            const void *x, const void *weight, const void *residual, void *y,
                            void *workspace)
{
	struct gemm g = product(n, d_in, d_out, {x, false}, {weight, true}, y, DTYPE_BF16);

	g.addend = residual;
	return gemm_run(device, &g, workspace);
}

/* y += bias + residual (or NULL); a thread takes eight elements. */
static __global__ void __launch_bounds__(THREADS)
        bias_kernel(bf16 *y, const float *bias, const bf16 *residual, int64_t n, int64_t width)
{
	const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	float v[8], b[8], r[8] = {};

	if (i >= n * width)
		return;
	load8(v, y + i);
	load8f(b, bias + i % width);
	if (residual)
		load8(r, residual + i);
#pragma unroll
	for (int j = 0; j < 8; j++)
		v[j] += b[j] + r[j];
	store8(y + i, v);
}

static enum status add_bias(struct device *device, const char *operation, int64_t n, int64_t width,
                            const float *bias, const void *residual, void *y)
{
	return launch_each(device, operation, bias_kernel, n * (width / 8), THREADS,
	                   static_cast<bf16 *>(y), bias, static_cast<const bf16 *>(residual), n,
	                   width);
}

extern "C" enum status portable_norm_linear(struct device *device, const void *args,
                                            void *workspace)
{
	const auto *a = static_cast<const struct norm_linear_args *>(args);
	const dim3 grid((unsigned)divide_up(a->n_tokens, ROWS));

	if (a->norm_weight) {
		enum status status = launch(device, "norm_linear", rms_norm_kernel, grid,
		                            ROWS * WARP, 0, static_cast<const bf16 *>(a->x),
		                            a->norm_weight, static_cast<bf16 *>(a->x_norm), a->rstd,
		                            a->n_tokens, a->d_in, a->eps);
		if (status != STATUS_OK)
			return status;
	}
	const enum status status =
	        multiply(device, a->n_tokens, a->d_in, a->d_out, a->norm_weight ? a->x_norm : a->x,
	                 a->weight, NULL, a->y, workspace);

	return status != STATUS_OK || !a->bias ? status
	                                       : add_bias(device, "norm_linear", a->n_tokens,
	                                                  a->d_out, a->bias, NULL, a->y);
}

extern "C" const char *portable_linear_residual_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct linear_residual_args *>(args);

	if (a->bias && a->residual == a->y)
		return "a bias, and the residual in the place of y";
	return check_widths(a->d_in, a->d_out);
}

extern "C" size_t portable_linear_residual_workspace(const struct device *, const void *)
{
	return GEMM_WORKSPACE;
}

extern "C" enum status portable_linear_residual(struct device *device, const void *args,
                                                void *workspace)
{
	const auto *a = static_cast<const struct linear_residual_args *>(args);

	const enum status status = multiply(device, a->n_tokens, a->d_in, a->d_out, a->x, a->weight,
	                                    a->bias ? NULL : a->residual, a->y, workspace);

	return status != STATUS_OK || !a->bias ? status
	                                       : add_bias(device, "linear_residual", a->n_tokens,
	                                                  a->d_out, a->bias, a->residual, a->y);
}
