/* What forward, backward and step of the matrix-state recurrence share. */
#ifndef KERNELS_CPU_MATRIX_STATE_H
#define KERNELS_CPU_MATRIX_STATE_H

#include "kernels/kernels.h"

/* Tokens whose pairwise decays are multiplied out one by one: chunks are cut into these. */
enum { SUB_CHUNK = 16 };

/* The per-token inputs of any of the three argument structs, for one head of one sequence. */
struct matrix_token {
	const float *q, *k, *v; /* [d_k], [d_k], [columns] */
	const float *decay;     /* [d_k]: A_t, not its logarithm */
	const float *bonus;     /* [d_k] iff RULE_BONUS */
	float beta;             /* of RULE_DELTA */
};

/*
 * One token of the plain recurrence on n columns of the state [d_k, n], rows
 * state_row apart, in place. out [n] gets scale * the output; NULL: not wanted.
 */
void matrix_state_advance(enum rule rule, int64_t d_k, int64_t n, float scale,
                          const struct matrix_token *token, float *state, int64_t state_row,
                          float *out);

/* decay [d_k] = A_t of token t; log_sum [d_k], unless NULL, += its logarithm. */
void matrix_state_decay(enum decay form, const struct view *log_decay, int64_t b, int64_t t,
                        int64_t h, int64_t d_k, float *decay, float *log_sum);

/* The state before the first token: rows [d_k] of n columns from column `first`; h0 may be NULL. */
void matrix_state_load(const struct matrix_recurrence_args *a, int64_t b, int64_t h, int64_t first,
                       int64_t n, float *state);

#endif
