/* Batches of products by cuBLASLt (kernels/cuda/gemm.h) of matrices inside larger tensors. */
#ifndef BASELINES_CUBLAS_PRODUCT_H
#define BASELINES_CUBLAS_PRODUCT_H

#include "kernels/cuda/gemm.h"

/* bf16 matrices; elements from one row, and from one matrix, to the next. */
struct matrices {
	void *data;
	int64_t row, apart;
	bool transposed; /* as read: stored as the transpose */
};

static inline struct matrices transpose(struct matrices m)
{
	m.transposed = true;
	return m;
}

/* out [rows, columns] = scale * a [rows, inner] b [inner, columns], `batch` of them. */
static inline struct gemm product(int64_t batch, int64_t rows, int64_t inner, int64_t columns,
                                  float scale, struct matrices a, struct matrices b,
                                  struct matrices out)
{
	return (struct gemm){.rows = rows,
	                     .columns = columns,
	                     .inner = inner,
	                     .a = a.data,
	                     .b = b.data,
	                     .a_transposed = a.transposed,
	                     .b_transposed = b.transposed,
	                     .a_leading = a.row,
	                     .b_leading = b.row,
	                     .out_leading = out.row,
	                     .out = out.data,
	                     .out_type = DTYPE_BF16,
	                     .scale = scale,
	                     .batch = batch,
	                     .a_stride = a.apart,
	                     .b_stride = b.apart,
	                     .out_stride = out.apart};
}

#endif
