/* Matrix products (kernels/cuda/gemm.h) of dense matrices. */
#ifndef KERNELS_PORTABLE_PRODUCT_CUH
#define KERNELS_PORTABLE_PRODUCT_CUH

#include "kernels/cuda/gemm.h"

/* A stored matrix: as it is, or to be read as its transpose. */
struct factor {
	const void *data;
	bool transposed;
};

/* out [rows, columns] = a [rows, inner] b [inner, columns]. */
static inline struct gemm product(int64_t rows, int64_t inner, int64_t columns, struct factor a,
                                  struct factor b, void *out, enum dtype out_type)
{
	struct gemm g = {};

	g.rows = rows;
	g.columns = columns;
	g.inner = inner;
	g.a = a.data;
	g.a_transposed = a.transposed;
	g.a_leading = a.transposed ? rows : inner;
	g.b = b.data;
	g.b_transposed = b.transposed;
	g.b_leading = b.transposed ? inner : columns;
	g.out = out;
	g.out_leading = columns;
	g.out_type = out_type;
	g.scale = 1.0f;
	g.batch = 1;
	return g;
}

#endif
