/*
 * Gradients of parameters, which are sums over tokens: each thread adds to a share of its own, in
 * fp64, and the shares are added in the threads' order.
 */
#ifndef KERNELS_CPU_SHARES_H
#define KERNELS_CPU_SHARES_H

#include <stdint.h>

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

#endif
