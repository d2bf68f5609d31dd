/*
 * Matrix products without a library, for where cuBLASLt does not start: it has
 * no PTX, so under CUDA_FORCE_PTX_JIT, or on an architecture newer than itself,
 * it has no code. Right in every case, fast in none.
 */
#include <mma.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/gemm.h"

using namespace nvcuda;

enum { TILE = 64, DEPTH = 16, THREADS = 128, STRIDE = DEPTH + 8, OUT_STRIDE = TILE + 4 };

/* Element (i, k) of an operand is at i * row + k * column. */
struct operand {
	const __nv_bfloat16 *data;
	int64_t row, column, rows, columns, batch;
};

static __device__ void load_tile(__nv_bfloat16 *tile, const struct operand &o, int64_t first_row,
                                 int64_t first_column)
{
	for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
		/* Neighbouring threads take neighbours in memory. */
		const int r = o.column == 1 ? i / DEPTH : i % TILE;
		const int c = o.column == 1 ? i % DEPTH : i / TILE;
		const int64_t row = first_row + r, column = first_column + c;
		const bool inside = row < o.rows && column < o.columns;

		tile[r * STRIDE + c] =
		        inside ? o.data[row * o.row + column * o.column] : __float2bfloat16(0.0f);
	}
}

/* A block's 64 x 64 of the product, 16 rows of it per warp. */
static __global__ void __launch_bounds__(THREADS)
        plain_gemm_kernel(struct operand a, struct operand b, struct gemm g)
{
	__shared__ __align__(32) __nv_bfloat16 left[TILE * STRIDE], right[TILE * STRIDE];
	__shared__ __align__(32) float out[TILE * OUT_STRIDE];
	const int64_t row = (int64_t)blockIdx.x * TILE, column = (int64_t)blockIdx.y * TILE;
	const int warp = threadIdx.x / 32;
	wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[TILE / 16];

	a.data += blockIdx.z * a.batch;
	b.data += blockIdx.z * b.batch;
	for (int i = 0; i < TILE / 16; i++)
		wmma::fill_fragment(sum[i], 0.0f);
	for (int64_t k = 0; k < g.inner; k += DEPTH) {
		__syncthreads();
		load_tile(left, a, row, k);
		load_tile(right, b, column, k);
		__syncthreads();
		wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> x;
		wmma::load_matrix_sync(x, left + warp * 16 * STRIDE, STRIDE);
		for (int i = 0; i < TILE / 16; i++) {
			wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major>
			        y;

			wmma::load_matrix_sync(y, right + i * 16 * STRIDE, STRIDE);
			wmma::mma_sync(sum[i], x, y, sum[i]);
		}
	}
	for (int i = 0; i < TILE / 16; i++)
		wmma::store_matrix_sync(out + warp * 16 * OUT_STRIDE + i * 16, sum[i], OUT_STRIDE,
		                        wmma::mem_row_major);
	__syncthreads();
	for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
		const int64_t r = row + i / TILE, c = column + i % TILE;
		const int64_t at = blockIdx.z * g.out_stride + r * g.out_leading + c;
		float y = g.scale * out[i / TILE * OUT_STRIDE + i % TILE];

		if (r >= g.rows || c >= g.columns)
			continue;
		if (g.out_type == DTYPE_BF16) {
			if (g.addend)
				y += __bfloat162float(
				        static_cast<const __nv_bfloat16 *>(g.addend)[at]);
			static_cast<__nv_bfloat16 *>(g.out)[at] = __float2bfloat16(y);
		} else {
			if (g.addend)
				y += static_cast<const float *>(g.addend)[at];
			static_cast<float *>(g.out)[at] = y;
		}
	}
}

enum status plain_gemm(struct device *device, const struct gemm *g)
{
	const struct operand a = {static_cast<const __nv_bfloat16 *>(g->a),
	                          g->a_transposed ? 1 : g->a_leading,
	                          g->a_transposed ? g->a_leading : 1,
	                          g->rows,
	                          g->inner,
	                          g->a_stride};
	const struct operand b = {static_cast<const __nv_bfloat16 *>(g->b),
	                          g->b_transposed ? g->b_leading : 1,
	                          g->b_transposed ? 1 : g->b_leading,
	                          g->columns,
	                          g->inner,
	                          g->b_stride};
	const dim3 grid((unsigned)((g->rows + TILE - 1) / TILE),
	                (unsigned)((g->columns + TILE - 1) / TILE), (unsigned)g->batch);

	plain_gemm_kernel<<<grid, THREADS, 0, cuda_stream(device)>>>(a, b, *g);
	return cuda_status(cudaGetLastError(), "plain_gemm", __FILE__, __LINE__);
}
