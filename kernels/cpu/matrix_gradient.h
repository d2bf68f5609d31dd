/*
 * The two ways through the backward pass of the matrix-state recurrence: blocks of tokens for the
 * plain and bonus rules, single tokens for the delta rules. The driver keeps
 * the states (matrix_recurrence_backward.c).
 */
#ifndef KERNELS_CPU_MATRIX_GRADIENT_H
#define KERNELS_CPU_MATRIX_GRADIENT_H

#include "kernels/cpu/scratch.h"
#include "kernels/kernels.h"

/* n tokens from t on, of head h of sequence b. */
struct matrix_span {
	int64_t b, h, t, n;
};

struct matrix_gradient {
	/* Floats of scratch a thread needs. */
	size_t (*scratch)(const struct matrix_recurrence_args *a);
	/* The state [d_k, d_v] after the span from that before it; in place. */
	void (*advance)(const struct matrix_recurrence_args *a, const struct matrix_span *span,
	                float *scratch, float *state);
	/* Writes the span's gradients. dstate: of the state after it in, before it out. dbonus
	 * [d_k] of this head accumulates. */
	void (*backward)(const struct matrix_recurrence_backward_args *a,
	                 const struct matrix_span *span, float *scratch, const float *before,
	                 const float *after, float *dstate, double *dbonus);
};

extern const struct matrix_gradient matrix_gradient_blocks, matrix_gradient_delta;

#endif
