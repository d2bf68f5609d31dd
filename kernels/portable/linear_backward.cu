/*
 * Gradients of the projections: two products by cuBLASLt, dx = dy W and
 * dweight = dy^T x, and between them and the residual stream the gradient of
 * RMSNorm, with r = rstd, u = dx_norm * w:
 *   dx = dresidual + r u - x r^3 mean(u x),   dw = sum over tokens of dx_norm x r.
 * A thread of the norm owns the same columns of every row that its block
 * takes, so that dw is summed in registers; a block takes several rows at a
 * time, which share one barrier. The blocks' shares are added in a fixed order.
 */
#include <algorithm>

#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/product.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, BLOCKS_PER_SM = 4, MAX_WIDTH = 4 * 8 * THREADS };

/* Vectors of eight columns that a thread owns, and rows taken at a time. */
template <int VECTORS>
static __global__ void __launch_bounds__(THREADS)
        norm_backward_kernel(const __grid_constant__ struct norm_linear_backward_args a,
                             float *parts)
{
	constexpr int ROWS = VECTORS == 1 ? 4 : VECTORS == 2 ? 2 : 1;
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const bf16 *x = static_cast<const bf16 *>(a.forward.x),
	           *dy = static_cast<const bf16 *>(a.dx_norm);
	const bf16 *residual = static_cast<const bf16 *>(a.dresidual);
	bf16 *dx = static_cast<bf16 *>(a.dx);
	float *shared = reinterpret_cast<float *>(shared_memory);
	float weight[VECTORS][8] = {}, dweight[VECTORS][8] = {};
	int buffer = 0;

#pragma unroll
	for (int v = 0; v < VECTORS; v++)
		if (8 * (threadIdx.x + v * THREADS) < a.forward.d_in)
			load8f(weight[v], a.forward.norm_weight + 8 * (threadIdx.x + v * THREADS));
	for (int64_t first = (int64_t)blockIdx.x * ROWS; first < a.forward.n_tokens;
	     first += (int64_t)gridDim.x * ROWS) {
		vector8 xs[ROWS][VECTORS] = {}, dys[ROWS][VECTORS] = {}, rs[ROWS][VECTORS] = {};
		float sums[ROWS] = {}, rstd[ROWS];
		float *const exchange = shared + buffer * WARPS * ROWS;

#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			const int64_t row = min(first + r, a.forward.n_tokens - 1);

			rstd[r] = first + r < a.forward.n_tokens ? a.forward.rstd[row] : 0.0f;
#pragma unroll
			for (int v = 0; v < VECTORS; v++) {
				const int64_t column = 8 * (threadIdx.x + v * THREADS);

				if (column >= a.forward.d_in)
					continue;
				xs[r][v] = load8(x + row * a.forward.d_in + column);
				dys[r][v] = load8(dy + row * a.forward.d_in + column);
				if (residual)
					rs[r][v] = load8(residual + row * a.forward.d_in + column);
			}
		}
#pragma unroll
		for (int r = 0; r < ROWS; r++) {
#pragma unroll
			for (int v = 0; v < VECTORS; v++) {
				float xf[8], g[8];

				unpack8(xf, xs[r][v]);
				unpack8(g, dys[r][v]);
#pragma unroll
				for (int j = 0; j < 8; j++) {
					const float product = g[j] * xf[j];

					sums[r] += weight[v][j] * product;
					dweight[v][j] += rstd[r] * product;
				}
			}
			sums[r] = group_sum(sums[r], WARP);
			if (lane == 0)
				exchange[warp * ROWS + r] = sums[r];
		}
		__syncthreads();
		buffer ^= 1;
#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			float sum = 0.0f;

#pragma unroll
			for (int w = 0; w < WARPS; w++)
				sum += exchange[w * ROWS + r];
			const float scale =
			        rstd[r] * rstd[r] * rstd[r] * sum / (float)a.forward.d_in;
#pragma unroll
			for (int v = 0; v < VECTORS; v++) {
				const int64_t column = 8 * (threadIdx.x + v * THREADS);
				float xf[8], g[8], base[8];

				if (column >= a.forward.d_in || first + r >= a.forward.n_tokens)
					continue;
				unpack8(xf, xs[r][v]);
				unpack8(g, dys[r][v]);
				unpack8(base, rs[r][v]);
#pragma unroll
				for (int j = 0; j < 8; j++)
					g[j] = base[j] + rstd[r] * weight[v][j] * g[j] -
					       scale * xf[j];
				store8(dx + (first + r) * a.forward.d_in + column, g);
			}
		}
	}
#pragma unroll
	for (int v = 0; v < VECTORS; v++)
		if (8 * (threadIdx.x + v * THREADS) < a.forward.d_in)
			store8f(parts + blockIdx.x * a.forward.d_in +
			                8 * (threadIdx.x + v * THREADS),
			        dweight[v]);
}

static int64_t norm_blocks(const struct device *device, const struct norm_linear_backward_args *a)
{
	return count_shares(device, a->forward.n_tokens, BLOCKS_PER_SM, 1);
}

static enum status norm_backward(struct device *device, const struct norm_linear_backward_args *a,
                                 float *parts)
{
	const int vectors = (int)divide_up(a->forward.d_in, 8 * THREADS);
	const dim3 grid((unsigned)norm_blocks(device, a));
	enum status status = launch(device, "norm_linear_backward",
	                            vectors == 1   ? norm_backward_kernel<1>
	                            : vectors == 2 ? norm_backward_kernel<2>
	                            : vectors == 3 ? norm_backward_kernel<3>
	                                           : norm_backward_kernel<4>,
	                            grid, THREADS, 2 * WARPS * 4 * sizeof(float), *a, parts);

	if (status != STATUS_OK)
		return status;
	return column_sums(device, "norm_linear_backward", parts, grid.x, a->forward.d_in,
	                   a->forward.d_in, a->dnorm_weight);
}

/* A thread's eight columns of a share of the tokens. parts [gridDim.y, width]. */
static __global__ void __launch_bounds__(THREADS)
        bias_gradient_kernel(const bf16 *dy, int64_t n_tokens, int64_t width, float *parts)
{
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float sum[8] = {}, v[8];

	if (column >= width)
		return;
#pragma unroll 4
	for (int64_t n = blockIdx.y; n < n_tokens; n += gridDim.y) {
		load8(v, dy + n * width + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum[j] += v[j];
	}
	store8f(parts + blockIdx.y * width + column, sum);
}

static int64_t bias_shares(const struct device *device, int64_t n, int64_t width)
{
	return count_shares(device, n, BLOCKS_PER_SM, divide_up(width, 8 * THREADS));
}

static size_t bias_workspace(const struct device *device, int64_t n, int64_t width)
{
	return (size_t)(bias_shares(device, n, width) * width) * sizeof(float);
}

/* dbias [width] = the sum of n rows of dy. */
static enum status bias_gradient(struct device *device, const char *operation, int64_t n,
                                 int64_t width, const void *dy, float *dbias, void *workspace)
{
	const int64_t shares = bias_shares(device, n, width);
	float *parts = static_cast<float *>(workspace);
	const enum status status =
	        launch(device, operation, bias_gradient_kernel,
	               dim3((unsigned)divide_up(width, 8 * THREADS), (unsigned)shares), THREADS, 0,
	               static_cast<const bf16 *>(dy), n, width, parts);

	return status != STATUS_OK
	               ? status
	               : column_sums(device, operation, parts, shares, width, width, dbias);
}

/* dx [n, d_in] = dy [n, d_out] weight + addend (or NULL); dweight = dy^T x. */
static enum status input_gradient(struct device *device, int64_t n, int64_t d_in, int64_t d_out,
                                  const void *dy, const void *weight, const void *addend, void *dx,
                                  void *workspace)
{
	struct gemm g = product(n, d_out, d_in, {dy, false}, {weight, false}, dx, DTYPE_BF16);

	g.addend = addend;
	return gemm_run(device, &g, workspace);
}

static enum status weight_gradient(struct device *device, int64_t n, int64_t d_in, int64_t d_out,
                                   const void *dy, const void *x, float *dweight, void *workspace)
{
	const struct gemm g = product(d_out, n, d_in, {dy, true}, {x, false}, dweight, DTYPE_F32);

	return gemm_run(device, &g, workspace);
}

extern "C" const char *portable_norm_linear_backward_unsupported(const struct device *,
                                                                 const void *args)
{
	const auto *a = static_cast<const struct norm_linear_backward_args *>(args);

	if (a->forward.norm_weight && a->forward.d_in > MAX_WIDTH)
		return "rows to normalize of more than 8192";
	return check_widths(a->forward.d_in, a->forward.d_out);
}

extern "C" size_t portable_norm_linear_backward_workspace(const struct device *device,
                                                          const void *args)
{
	const auto *a = static_cast<const struct norm_linear_backward_args *>(args);
	const struct norm_linear_args *f = &a->forward;
	const size_t parts = (size_t)(norm_blocks(device, a) * f->d_in) * sizeof(float);
	const size_t bias = f->bias ? bias_workspace(device, f->n_tokens, f->d_out) : 0;

	return std::max({parts, bias, (size_t)GEMM_WORKSPACE});
}

extern "C" enum status portable_norm_linear_backward(struct device *device, const void *args,
                                                     void *workspace)
{
	const auto *a = static_cast<const struct norm_linear_backward_args *>(args);
	enum status status =
	        weight_gradient(device, a->forward.n_tokens, a->forward.d_in, a->forward.d_out,
	                        a->dy, a->forward.x_norm, a->dweight, workspace);

	if (status == STATUS_OK && a->forward.bias)
		status = bias_gradient(device, "norm_linear_backward", a->forward.n_tokens,
		                       a->forward.d_out, a->dy, a->dbias, workspace);
	if (status != STATUS_OK)
		return status;
	if (!a->forward.norm_weight)
		return input_gradient(device, a->forward.n_tokens, a->forward.d_in,
		                      a->forward.d_out, a->dy, a->forward.weight, a->dresidual,
		                      a->dx, workspace);
	status = input_gradient(device, a->forward.n_tokens, a->forward.d_in, a->forward.d_out,
	                        a->dy, a->forward.weight, NULL, a->dx_norm, workspace);
	return status == STATUS_OK ? norm_backward(device, a, static_cast<float *>(workspace))
	                           : status;
}

extern "C" const char *portable_linear_residual_backward_unsupported(const struct device *,
                                                                     const void *args)
{
	const auto *a = static_cast<const struct linear_residual_backward_args *>(args);

	return check_widths(a->d_in, a->d_out);
}

extern "C" size_t portable_linear_residual_backward_workspace(const struct device *device,
                                                              const void *args)
{
	const auto *a = static_cast<const struct linear_residual_backward_args *>(args);
	const size_t bias = a->dbias ? bias_workspace(device, a->n_tokens, a->d_out) : 0;

	return std::max(bias, (size_t)GEMM_WORKSPACE);
}

extern "C" enum status portable_linear_residual_backward(struct device *device, const void *args,
                                                         void *workspace)
{
	const auto *a = static_cast<const struct linear_residual_backward_args *>(args);
	enum status status = input_gradient(device, a->n_tokens, a->d_in, a->d_out, a->dy,
	                                    a->weight, NULL, a->dx, workspace);

	if (status == STATUS_OK && a->dbias)
		status = bias_gradient(device, "linear_residual_backward", a->n_tokens, a->d_out,
		                       a->dy, a->dbias, workspace);
	if (status != STATUS_OK)
		return status;
	return weight_gradient(device, a->n_tokens, a->d_in, a->d_out, a->dy, a->x, a->dweight,
	                       workspace);
}
