/* A register-blocked matrix product for operands that are already in cache, within one thread. */
#ifndef KERNELS_CPU_BLOCK_PRODUCT_H
#define KERNELS_CPU_BLOCK_PRODUCT_H

#include <stdint.h>

/* A matrix whose element (i, j) is at data[i * row + j * column]. */
struct block {
	const float *data;
	int64_t row, column;
};

/* C [m, n] = A B; A [m, k], B [k, n] with rows b_row apart, C with rows c_row apart. */
void block_product(int64_t m, int64_t n, int64_t k, struct block a, const float *b, int64_t b_row,
                   float *c, int64_t c_row);

/* C = Diag(keep) C + A B; keep [m], or NULL: C += A B. */
void block_product_add(int64_t m, int64_t n, int64_t k, struct block a, const float *b,
                       int64_t b_row, const float *keep, float *c, int64_t c_row);

#endif
