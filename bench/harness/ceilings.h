/* What the device can do at best, measured at the start of a run, and what that allows a plan. */
#ifndef BENCH_HARNESS_CEILINGS_H
#define BENCH_HARNESS_CEILINGS_H

#include "kernels/kernels.h"

struct ceilings {
	double copy_gb_per_s; /* bytes read and written */
	double read_gb_per_s; /* bytes only read */
	double gemm_tflops;   /* of the backend's own matrix products */
};

/* Measures for less than a second. Takes and returns device memory. */
enum status ceilings_measure(struct ceilings *ceilings, const struct backend *backend);

/*
 * The least time of a plan in milliseconds: the sum over its operations of the larger of FLOPs /
 * GEMM rate and bytes / bandwidth; the bandwidth is that of reading where writes are under a
 * tenth of the bytes, otherwise that of copying (README, "Counting work").
 */
double ceilings_roofline_ms(const struct ceilings *ceilings, const struct kernel_plan *plan);

#endif
