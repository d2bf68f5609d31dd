/* What the device can do at best, measured at the start of a run, and what that allows a plan. */
#ifndef BENCH_HARNESS_CEILINGS_H
#define BENCH_HARNESS_CEILINGS_H

#include "kernels/kernels.h"

/* A product with tensors of its own. */
struct product {
	struct context ctx;
	struct linear_residual_args args; /* of fewer tokens, if the caller likes */
	void *x, *weight;
};

/* Takes its memory; whatever the outcome, product_release() gives it back. */
enum status product_take(struct product *p, struct device *device, int64_t n_tokens, int64_t d_in,
                         int64_t d_out);
void product_release(struct product *p);
/* The shortest time of several runs; cold: none finds its tensors in a cache. */
enum status product_time(struct product *p, int repeats, bool cold, double *best_ms);

/* Measures device->ceilings for less than a second, once. Takes and returns device memory; what
 * there is no memory to measure remains 0, and standard error says so. */
enum status ceilings_measure(struct device *device);
/* Measures them once more and keeps the better of both. */
enum status ceilings_again(struct device *device);

/*
 * The least time of a plan in milliseconds: the sum over its operations of the larger of FLOPs /
 * GEMM rate and bytes / bandwidth; the bandwidth is that of reading where writes are under a
 * tenth of the bytes, otherwise that of copying (docs/models.md).
 */
double ceilings_roofline_ms(const struct ceilings *ceilings, const struct kernel_plan *plan);

#endif
