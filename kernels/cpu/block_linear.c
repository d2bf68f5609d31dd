/*
 * Block-diagonal products. A task is one product of BLOCK_TOKENS tokens by OpenBLAS, on one thread;
 * of the gradient of the weights all tokens of one block, so that sums are in one order.
 */
#include <cblas.h>

#include "kernels/cpu/kernels_cpu.h"

enum { BLOCK_TOKENS = 128 };

/* out [m, n] = beta out + a b, where a and b may be stored transposed. */
static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_leading,
                    CBLAS_TRANSPOSE a_transposed, const float *b, int64_t b_leading,
                    CBLAS_TRANSPOSE b_transposed, float beta, float *out, int64_t out_leading)
{
	cblas_sgemm(CblasRowMajor, a_transposed, b_transposed, (blasint)m, (blasint)n, (blasint)k,
	            1, a, (blasint)a_leading, b, (blasint)b_leading, beta, out,
	            (blasint)out_leading);
}

static int64_t count_tiles(const struct block_linear_args *a)
{
	return (a->n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static int64_t tile_size(const struct block_linear_args *a, int64_t first)
{
	return a->n_tokens - first < BLOCK_TOKENS ? a->n_tokens - first : BLOCK_TOKENS;
}

enum status cpu_block_linear(struct device *device, const void *args, void *workspace)
{
	const struct block_linear_args *a = args;
	int64_t blocks = a->n_blocks, in = a->d_in, out = a->d_out, all = a->n_products * blocks;

#pragma omp parallel for collapse(2) schedule(static)
	for (int64_t tile = 0; tile < count_tiles(a); tile++)
		for (int64_t g = 0; g < all; g++) {
			int64_t first = tile * BLOCK_TOKENS;

			product(tile_size(a, first), out, in,
			        (const float *)a->x + (first * blocks + g % blocks) * in,
			        blocks * in, CblasNoTrans, (const float *)a->weight + g * in * out,
			        out, CblasNoTrans, 0, (float *)a->y + (first * all + g) * out,
			        all * out);
		}
	return STATUS_OK;
}

/* Block h of dx, of some tokens, from all products. */
static void input_gradient(const struct block_linear_backward_args *a, int64_t first, int64_t h)
{
	const struct block_linear_args *f = &a->forward;
	int64_t blocks = f->n_blocks, in = f->d_in, out = f->d_out, all = f->n_products * blocks;
	int64_t n = tile_size(f, first), at = (first * blocks + h) * in;
	const float *dskip = a->dskip ? (const float *)a->dskip + at : NULL;
	float *dx = (float *)a->dx + at;

	for (int64_t t = 0; dskip && t < n; t++)
		for (int64_t i = 0; i < in; i++)
			dx[t * blocks * in + i] = dskip[t * blocks * in + i];
	for (int64_t g = h; g < all; g += blocks)
		product(n, in, out, (const float *)a->dy + (first * all + g) * out, all * out,
		        CblasNoTrans, (const float *)f->weight + g * in * out, out, CblasTrans,
		        dskip || g >= blocks ? 1.0f : 0.0f, dx, blocks * in);
}

enum status cpu_block_linear_backward(struct device *device, const void *args, void *workspace)
{
	const struct block_linear_backward_args *a = args;
	const struct block_linear_args *f = &a->forward;
	int64_t blocks = f->n_blocks, in = f->d_in, out = f->d_out, all = f->n_products * blocks;

#pragma omp parallel
	{
#pragma omp for collapse(2) schedule(static)
		for (int64_t tile = 0; tile < count_tiles(f); tile++)
			for (int64_t h = 0; h < blocks; h++)
				input_gradient(a, tile * BLOCK_TOKENS, h);
#pragma omp for schedule(static)
		for (int64_t g = 0; g < all; g++)
			product(in, out, f->n_tokens, (const float *)f->x + g % blocks * in,
			        blocks * in, CblasTrans, (const float *)a->dy + g * out, all * out,
			        CblasNoTrans, 0, a->dweight + g * in * out, out);
	}
	return STATUS_OK;
}
