/* Matrix products of the dense operations: OpenBLAS on every thread's own block of the result. */
#ifndef KERNELS_CPU_MATMUL_H
#define KERNELS_CPU_MATMUL_H

#include <stdbool.h>
#include <stdint.h>

/*
 * C = op(A) op(B) + beta C, fp32, row-major and contiguous: op(A) [m, k], op(B) [k, n], C [m, n];
 * op transposes where asked, so a transposed A is stored [k, m] and a transposed B [n, k]. With
 * beta 0, C is not read. Called outside of parallel regions.
 */
void cpu_matmul(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float *a,
                const float *b, float beta, float *c);

#endif
