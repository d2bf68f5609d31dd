/*
 * Matrix products by cuBLASLt: bf16 in, fp32 accumulation, bf16 or fp32 out.
 *
 * The algorithm of each shape is the fastest of cuBLASLt's suggestions, timed
 * on random data of its own with a cold cache at the shape's first use, which
 * therefore takes a moment and must not be inside a timed region.
 */
#ifndef KERNELS_CUDA_GEMM_H
#define KERNELS_CUDA_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace that every product is given. */
enum { GEMM_WORKSPACE = 64 << 20 };

/*
 * out [rows, columns] = a [rows, inner] b [inner, columns] + addend, row-major;
 * a_transposed: a is stored [inner, rows]; b_transposed: b is stored
 * [columns, inner]. Leading dimensions are those of the stored matrices. With
 * batch > 1, products i = 0 .. batch-1 of matrices whose first elements are i
 * times the strides apart.
 */
struct gemm {
	int64_t rows, columns, inner;
	const void *a, *b; /* bf16 */
	bool a_transposed, b_transposed;
	int64_t a_leading, b_leading, out_leading;
	const void *addend; /* as out, or NULL; may be out itself */
	void *out;
	enum dtype out_type; /* BF16 or F32 */
	float scale;         /* factor of the product */
	int64_t batch, a_stride, b_stride, out_stride;
};

/* Runs a product on a device that is active; workspace is GEMM_WORKSPACE bytes. STATUS_UNSUPPORTED
 * if cuBLASLt has no algorithm. */
enum status gemm_run(struct device *device, const struct gemm *gemm, void *workspace);

/* The same without cuBLASLt, which it stands in for where that does not start. */
enum status plain_gemm(struct device *device, const struct gemm *gemm);

#ifdef __cplusplus
}
#endif

#endif
