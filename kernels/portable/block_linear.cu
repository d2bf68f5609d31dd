/*
 * Block-diagonal products by cuBLASLt: of each of the n_products a batch of n_blocks matrices,
 * which are columns of the rows of x and y. Of dx several products are added up in bf16, one after
 * another, and dskip comes last: it may be larger than they are.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/product.cuh"

enum { THREADS = 256 };

/* Elements from one token of y to the next. */
static int64_t y_row(const struct block_linear_args *f)
{
	return f->n_products * f->n_blocks * f->d_out;
}

static int64_t x_row(const struct block_linear_args *f)
{
	return f->n_blocks * f->d_in;
}

/* Product p's matrices. */
static const bf16 *weights(const struct block_linear_args *f, int64_t p)
{
	return static_cast<const bf16 *>(f->weight) + p * f->n_blocks * f->d_in * f->d_out;
}

extern "C" const char *portable_block_linear_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct block_linear_args *>(args);

	return check_widths(a->d_in, a->d_out);
}

extern "C" size_t portable_block_linear_workspace(const struct device *, const void *)
{
	return GEMM_WORKSPACE;
}

extern "C" enum status portable_block_linear(struct device *device, const void *args,
                                             void *workspace)
{
	const auto *a = static_cast<const struct block_linear_args *>(args);
	enum status status = STATUS_OK;

	for (int64_t p = 0; p < a->n_products && status == STATUS_OK; p++) {
		struct gemm g = product(
		        a->n_tokens, a->d_in, a->d_out, {a->x, false}, {weights(a, p), false},
		        static_cast<bf16 *>(a->y) + p * a->n_blocks * a->d_out, DTYPE_BF16);

		g.a_leading = x_row(a);
		g.out_leading = y_row(a);
		g.batch = a->n_blocks;
		g.a_stride = a->d_in;
		g.b_stride = a->d_in * a->d_out;
		g.out_stride = a->d_out;
		status = gemm_run(device, &g, workspace);
	}
	return status;
}

extern "C" const char *portable_block_linear_backward_unsupported(const struct device *,
                                                                  const void *args)
{
	const auto *a = static_cast<const struct block_linear_backward_args *>(args);

	return check_widths(a->forward.d_in, a->forward.d_out);
}

extern "C" size_t portable_block_linear_backward_workspace(const struct device *, const void *)
{
	return GEMM_WORKSPACE;
}

/* dx = addend (or NULL) + dy weight^T of product p. */
static enum status input_gradient(struct device *device, const struct block_linear_backward_args *a,
                                  int64_t p, const void *addend, void *workspace)
{
	const struct block_linear_args *f = &a->forward;
	const bf16 *dy = static_cast<const bf16 *>(a->dy) + p * f->n_blocks * f->d_out;
	struct gemm g = product(f->n_tokens, f->d_out, f->d_in, {dy, false}, {weights(f, p), true},
	                        a->dx, DTYPE_BF16);

	g.a_leading = y_row(f);
	g.out_leading = x_row(f);
	g.batch = f->n_blocks;
	g.a_stride = f->d_out;
	g.b_stride = f->d_in * f->d_out;
	g.out_stride = f->d_in;
	g.addend = addend;
	return gemm_run(device, &g, workspace);
}

/* dx += dskip; a thread takes eight elements. */
static __global__ void __launch_bounds__(THREADS)
        skip_kernel(bf16 *dx, const bf16 *dskip, int64_t count)
{
	const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	float v[8], skip[8];

	if (i >= count)
		return;
	load8(v, dx + i);
	load8(skip, dskip + i);
#pragma unroll
	for (int j = 0; j < 8; j++)
		v[j] += skip[j];
	store8(dx + i, v);
}

static enum status add_skip(struct device *device, const struct block_linear_backward_args *a)
{
	const int64_t count = a->forward.n_tokens * x_row(&a->forward);

	return launch_each(device, "block_linear_backward", skip_kernel, count / 8, THREADS,
	                   static_cast<bf16 *>(a->dx), static_cast<const bf16 *>(a->dskip), count);
}

/* dweight = x^T dy of product p. */
static enum status weight_gradient(struct device *device,
                                   const struct block_linear_backward_args *a, int64_t p,
                                   void *workspace)
{
	const struct block_linear_args *f = &a->forward;
	const bf16 *dy = static_cast<const bf16 *>(a->dy) + p * f->n_blocks * f->d_out;
	struct gemm g = product(f->d_in, f->n_tokens, f->d_out, {f->x, true}, {dy, false},
	                        a->dweight + p * f->n_blocks * f->d_in * f->d_out, DTYPE_F32);

	g.a_leading = x_row(f);
	g.b_leading = y_row(f);
	g.batch = f->n_blocks;
	g.a_stride = f->d_in;
	g.b_stride = f->d_out;
	g.out_stride = f->d_in * f->d_out;
	return gemm_run(device, &g, workspace);
}

extern "C" enum status portable_block_linear_backward(struct device *device, const void *args,
                                                      void *workspace)
{
	const auto *a = static_cast<const struct block_linear_backward_args *>(args);
	const bool alone = a->forward.n_products == 1;
	enum status status = STATUS_OK;

	for (int64_t p = 0; p < a->forward.n_products && status == STATUS_OK; p++) {
		status = input_gradient(device, a, p,
		                        p > 0   ? a->dx
		                        : alone ? a->dskip
		                                : NULL,
		                        workspace);
		if (status == STATUS_OK)
			status = weight_gradient(device, a, p, workspace);
	}
	return status == STATUS_OK && a->dskip && !alone ? add_skip(device, a) : status;
}
