/* What an operation wrote, against the fp64 reference: the checks that bench/kernel.c lists. */
#ifndef BENCH_KERNEL_CHECK_H
#define BENCH_KERNEL_CHECK_H

#include "bench/kernel.h"

/* *worst = INFINITY if the operand holds a NaN or Inf. */
enum status check_finite(const struct backend *backend, const struct operand *operand,
                         double *worst);

/* struct kernel_kind's check(); the gated recurrence is a form of the recurrence. */
enum status check_attention(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_attention_step(struct kernel_problem *p, int64_t rows, uint64_t seed,
                                 double *worst);
enum status check_rat_scan(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_rat_step(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_recurrence(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_recurrence_step(struct kernel_problem *p, int64_t rows, uint64_t seed,
                                  double *worst);
enum status check_matrix(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_matrix_step(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_linear(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
enum status check_norm_linear(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);

/* struct kernel_kind's keep(). */
enum status keep_attention_step(struct kernel_problem *p, uint64_t seed);
enum status keep_rat_step(struct kernel_problem *p, uint64_t seed);
enum status keep_recurrence_step(struct kernel_problem *p, uint64_t seed);
enum status keep_matrix_step(struct kernel_problem *p, uint64_t seed);

#endif
