/*
 * What test_ptx.c runs on a device, which must be active: one small kernel for each group of
 * wrappers in kernels/hopper/ptx.cuh. Arrays are the host's; outputs are
 * there on return. bf16 numbers travel as their bits.
 */
#ifndef TESTS_GPU_PTX_H
#define TESTS_GPU_PTX_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
	PTX_M = 64,  /* rows of a product */
	PTX_K = 128, /* its depth */
	PTX_BOX = 64 /* rows of a box of a tensor */
};

/*
 * d [64, n] = [accumulate ? d : 0] + a b with n = 64 or 128. a is [64, 128];
 * b is [n, 128] (K-major) with a in shared memory, else [128, n] (MN-major)
 * with a in registers.
 */
enum status ptx_product(struct device *device, int n, bool registers, bool accumulate,
                        const uint16_t *a, const uint16_t *b, float *d);

/*
 * The 64 x 64 box of head h, sequence b that starts at column `column`, token
 * `token` of from [batch, tokens, heads, d]: as it lies in shared memory to
 * `box`, and stored at the same place of `to`, of the same shape; but not stored
 * if it begins in front of the tensor, which only a load may.
 */
enum status ptx_copy_box(struct device *device, int64_t batch, int64_t tokens, int64_t heads,
                         int64_t d, int column, int token, int h, int b, const uint16_t *from,
                         uint16_t *box, uint16_t *to);

/* to = from, `count` bytes (a multiple of 16) by a bulk load. */
enum status ptx_bulk_load(struct device *device, int count, const uint8_t *from, uint8_t *to);

/* A producer hands 0, 1, ... count-1 to a consumer through a ring of two slots; what it received.
 */
enum status ptx_ring(struct device *device, int count, int *received);

/* Two warps that only arrive and one that waits, `rounds` times; what it saw of each lane [64]. */
enum status ptx_named_barriers(struct device *device, int rounds, int *seen);

/* Lane l's registers [32, 4]: stored as four matrices (512 bytes), and loaded back. */
enum status ptx_matrices(struct device *device, const uint32_t *registers, uint16_t *stored,
                         uint32_t *loaded);

/* d [16, 16] += a b, a [16, 16], b [16, 16] K-major, by one warp and two mma. */
enum status ptx_warp_product(struct device *device, const uint16_t *a, const uint16_t *b, float *d);

/* y[i] of 256 threads after they gave up or took registers; x is [200]. */
enum status ptx_registers(struct device *device, const uint32_t *x, uint32_t *y);

/* pack_bf16 of (x[0], x[1]), its halves, exp2_approx and reciprocal_approx of both. */
enum status ptx_arithmetic(struct device *device, const float *x, uint32_t *pair, float *y);

#ifdef __cplusplus
}
#endif

#endif
