/* fp64 projections on the device: with a norm before them, and with a residual. */
#include "kernels/cuda/reference.cuh"

using namespace reference;

/* ---- products ---- */

constexpr int TILE = 64, DEPTH = 16, STRIDE = TILE + 1;
constexpr int SIDE = 16, EACH = TILE / SIDE; /* threads, and elements of each, along a side */

/* Element k of row i is at i * row + k * inner. */
struct operand {
	const double *data;
	int64_t row, inner;
};

/* tile[k][i] = element k of row i; neighbouring threads take neighbours in memory. */
static __device__ void load_tile(const struct operand &o, int64_t first_row, int64_t rows,
                                 int64_t first, int64_t end, double *tile)
{
	for (int n = threadIdx.x; n < TILE * DEPTH; n += THREADS) {
		const int i = o.inner == 1 ? n / DEPTH : n % TILE;
		const int k = o.inner == 1 ? n % DEPTH : n / TILE;
		const bool inside = first_row + i < rows && first + k < end;

		tile[k * STRIDE + i] =
		        inside ? o.data[(first_row + i) * o.row + (first + k) * o.inner] : 0;
	}
}

/* Blocks share a tile of the product if there are few: each sums `share` of the inner dimension. */
static __global__ void __launch_bounds__(THREADS)
        product_kernel(int64_t rows, int64_t columns, int64_t inner, int64_t share,
                       struct operand a, struct operand b, double *out)
{
	__shared__ double left[DEPTH * STRIDE], right[DEPTH * STRIDE];
	const int64_t wide = quotient_up(columns, TILE), tiles = quotient_up(rows, TILE) * wide;
	const int64_t row = blockIdx.x % tiles / wide * TILE, column = blockIdx.x % wide * TILE;
	const int64_t first = blockIdx.x / tiles * share, end = smaller(first + share, inner);
	const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
	double sum[EACH][EACH] = {};

	for (int64_t k = first; k < end; k += DEPTH) {
		__syncthreads();
		load_tile(a, row, rows, k, end, left);
		load_tile(b, column, columns, k, end, right);
		__syncthreads();
		for (int n = 0; n < DEPTH; n++)
#pragma unroll
			for (int i = 0; i < EACH; i++)
#pragma unroll
				for (int j = 0; j < EACH; j++)
					sum[i][j] += left[n * STRIDE + y + SIDE * i] *
					             right[n * STRIDE + x + SIDE * j];
	}
	for (int i = 0; i < EACH; i++)
		for (int j = 0; j < EACH; j++) {
			const int64_t r = row + y + SIDE * i, c = column + x + SIDE * j;

			if (r < rows && c < columns)
				atomicAdd(out + r * columns + c, sum[i][j]);
		}
}

/* out [rows, columns] = addend + a b^T: sums over k of a_ik b_jk. The addend may be NULL, or out.
 */
static enum status product(struct device *device, int64_t rows, int64_t columns, int64_t inner,
                           struct operand a, struct operand b, const void *addend, void *out)
{
	const size_t bytes = (size_t)(rows * columns) * sizeof(double);
	const int64_t tiles = quotient_up(rows, TILE) * quotient_up(columns, TILE);
	const int64_t most = quotient_up(inner, 16 * DEPTH);
	const int64_t wanted = quotient_up(4 * cuda_sm_count(device), tiles);
	const int64_t share = quotient_up(inner, smaller(most, wanted));

	if (!addend)
		TRY(device_fill(device, out, 0, bytes));
	else if (addend != out)
		CUDA_TRY(cudaMemcpyAsync(out, addend, bytes, cudaMemcpyDeviceToDevice,
		                         cuda_stream(device)));
	return launch(device, product_kernel, tiles * quotient_up(inner, share), 0, rows, columns,
	              inner, share, a, b, doubles(out));
}

/* y [n, d_out] = addend + x W^T. */
static enum status linear(struct device *device, int64_t n, int64_t d_in, int64_t d_out,
                          const void *x, const void *weight, const void *addend, void *y)
{
	return product(device, n, d_out, d_in, {doubles(x), d_in, 1}, {doubles(weight), d_in, 1},
	               addend, y);
}

/* dx [n, d_in] = addend + dy W; dweight [d_out, d_in] = dy^T x. */
static enum status linear_backward(struct device *device, int64_t n, int64_t d_in, int64_t d_out,
                                   const void *x, const void *weight, const void *dy,
                                   const void *addend, void *dx, void *dweight)
{
	TRY(product(device, n, d_in, d_out, {doubles(dy), d_out, 1}, {doubles(weight), 1, d_in},
	            addend, dx));
	return product(device, d_out, d_in, n, {doubles(dy), 1, d_out}, {doubles(x), 1, d_in}, NULL,
	               dweight);
}

/* ---- norms: a block per row ---- */

/* All threads' x added up, handed to all of them. */
static __device__ double block_sum(double x)
{
	__shared__ double parts[WARPS];

	x = warp_sum(x);
	__syncthreads();
	if (threadIdx.x % 32 == 0)
		parts[threadIdx.x / 32] = x;
	__syncthreads();
	x = 0;
	for (int i = 0; i < WARPS; i++)
		x += parts[i];
	return x;
}

static __global__ void __launch_bounds__(THREADS) norm_kernel(struct norm_linear_args a)
{
	const double *x = doubles(a.x) + blockIdx.x * a.d_in;
	double *x_norm = doubles(a.x_norm) + blockIdx.x * a.d_in, sum = 0;

	for (int64_t i = threadIdx.x; i < a.d_in; i += THREADS)
		sum += x[i] * x[i];
	const double r = 1 / sqrt(block_sum(sum) / (double)a.d_in + a.eps);
	for (int64_t i = threadIdx.x; i < a.d_in; i += THREADS)
		x_norm[i] = x[i] * r * doubles(a.norm_weight)[i];
	if (a.rstd && threadIdx.x == 0)
		doubles(a.rstd)[blockIdx.x] = r;
}

/* With u = x rstd: dx = rstd (w dy - u mean(u w dy)), dy being dx_norm. */
static __global__ void __launch_bounds__(THREADS)
        norm_backward_kernel(struct norm_linear_backward_args a)
{
	const int64_t d = a.forward.d_in, row = blockIdx.x * d;
	const double *x = doubles(a.forward.x) + row, *weight = doubles(a.forward.norm_weight);
	const double *dy = doubles(a.dx_norm) + row, r = doubles(a.forward.rstd)[blockIdx.x];
	double product = 0;

	for (int64_t i = threadIdx.x; i < d; i += THREADS)
		product += x[i] * weight[i] * dy[i];
	const double mean = r * block_sum(product) / (double)d;
	for (int64_t i = threadIdx.x; i < d; i += THREADS) {
		const double residual = a.dresidual ? doubles(a.dresidual)[row + i] : 0;

		doubles(a.dx)[row + i] = r * (weight[i] * dy[i] - x[i] * r * mean) + residual;
		atomicAdd(doubles(a.dnorm_weight) + i, dy[i] * x[i] * r);
	}
}

/* ---- biases: a block per row ---- */

static __global__ void __launch_bounds__(THREADS)
        bias_kernel(int64_t width, const double *bias, double *y)
{
	for (int64_t i = threadIdx.x; i < width; i += THREADS)
		y[blockIdx.x * width + i] += bias[i];
}

static __global__ void __launch_bounds__(THREADS)
        sum_rows_kernel(int64_t width, const double *rows, double *sums)
{
	for (int64_t i = threadIdx.x; i < width; i += THREADS)
		atomicAdd(sums + i, rows[blockIdx.x * width + i]);
}

/* y [n, width] += bias, unless that is NULL. */
static enum status add_bias(struct device *device, int64_t n, int64_t width, const float *bias,
                            void *y)
{
	return bias ? launch(device, bias_kernel, n, 0, width, doubles(bias), doubles(y))
	            : STATUS_OK;
}

/* dbias = the sum of n rows of dy, unless dbias is NULL. */
static enum status bias_gradient(struct device *device, int64_t n, int64_t width, const void *dy,
                                 float *dbias)
{
	if (!dbias)
		return STATUS_OK;
	TRY(device_fill(device, dbias, 0, (size_t)width * sizeof(double)));
	return launch(device, sum_rows_kernel, n, 0, width, doubles(dy), doubles(dbias));
}

/* ---- operations ---- */

REFERENCE(norm_linear)
{
	const struct norm_linear_args *a = static_cast<const struct norm_linear_args *>(args);

	if (a->norm_weight)
		TRY(launch(device, norm_kernel, a->n_tokens, 0, *a));
	TRY(linear(device, a->n_tokens, a->d_in, a->d_out, a->x_norm, a->weight, NULL, a->y));
	return add_bias(device, a->n_tokens, a->d_out, a->bias, a->y);
}

REFERENCE(norm_linear_backward)
{
	const struct norm_linear_backward_args *a =
	        static_cast<const struct norm_linear_backward_args *>(args);
	const struct norm_linear_args *f = &a->forward;

	TRY(bias_gradient(device, f->n_tokens, f->d_out, a->dy, f->bias ? a->dbias : NULL));
	if (!f->norm_weight)
		return linear_backward(device, f->n_tokens, f->d_in, f->d_out, f->x_norm, f->weight,
		                       a->dy, a->dresidual, a->dx, a->dweight);
	TRY(linear_backward(device, f->n_tokens, f->d_in, f->d_out, f->x_norm, f->weight, a->dy,
	                    NULL, a->dx_norm, a->dweight));
	TRY(device_fill(device, a->dnorm_weight, 0, (size_t)f->d_in * sizeof(double)));
	return launch(device, norm_backward_kernel, f->n_tokens, 0, *a);
}

REFERENCE(linear_residual)
{
	const struct linear_residual_args *a =
	        static_cast<const struct linear_residual_args *>(args);

	TRY(linear(device, a->n_tokens, a->d_in, a->d_out, a->x, a->weight, a->residual, a->y));
	return add_bias(device, a->n_tokens, a->d_out, a->bias, a->y);
}

REFERENCE(linear_residual_backward)
{
	const struct linear_residual_backward_args *a =
	        static_cast<const struct linear_residual_backward_args *>(args);

	TRY(bias_gradient(device, a->n_tokens, a->d_out, a->dy, a->dbias));
	return linear_backward(device, a->n_tokens, a->d_in, a->d_out, a->x, a->weight, a->dy, NULL,
	                       a->dx, a->dweight);
}
