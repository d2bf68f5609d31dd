/*
 * Gradients of parameters, which are sums over tokens: each thread adds to a share of its own, in
 * fp64, and the shares are added in the threads' order.
 */
#ifndef KERNELS_CPU_SHARES_H
#define KERNELS_CPU_SHARES_H

#include <omp.h>
#include <stdint.h>
#include <string.h>

/* to[i] = the sum of shares[s * stride + i], for i < width. */
static inline void add_shares(const double *shares, int64_t n_shares, int64_t stride, int64_t width,
                              float *to)
{
	for (int64_t i = 0; i < width; i++) {
		double sum = 0;

		for (int64_t s = 0; s < n_shares; s++)
			sum += shares[s * stride + i];
		to[i] = (float)sum;
	}
}

/* Bytes of workspace of sum_rows(). */
static inline size_t sum_rows_bytes(int64_t width)
{
	return sizeof(double) * (size_t)(width * omp_get_max_threads());
}

/* to = the sum of n rows: the gradient of a bias. */
static inline void sum_rows(int64_t n, int64_t width, const float *rows, void *workspace, float *to)
{
	int n_threads = omp_get_max_threads();
	double *shares = workspace;

	memset(shares, 0, sum_rows_bytes(width));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t row = 0; row < n; row++) {
		double *mine = shares + width * omp_get_thread_num();

#pragma omp simd
		for (int64_t i = 0; i < width; i++)
			mine[i] += (double)rows[row * width + i];
	}
	add_shares(shares, n_threads, width, width, to);
}

#endif
