#include "kernels/cpu/matrix_state.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/vector_math.h"

enum { COLUMNS = 64 }; /* of the state that are taken through a token together */

/* One token on n <= COLUMNS columns. */
struct columns {
	int64_t d_k, n;
	float *state;
	int64_t row; /* from one row of the state to the next */
};

static inline __attribute__((always_inline)) void advance_plain(const struct matrix_token *x,
                                                                const struct columns *c, float *out)
{
	float sum[COLUMNS] = {0};
	const float *v = x->v;

	for (int64_t i = 0; i < c->d_k; i++) {
		float decay = x->decay[i], k = x->k[i], q = x->q[i], *s = c->state + i * c->row;

#pragma omp simd
		for (int64_t j = 0; j < c->n; j++) {
			s[j] = decay * s[j] + k * v[j];
			sum[j] += q * s[j];
		}
	}
	memcpy(out, sum, sizeof *out * (size_t)c->n);
}

static inline __attribute__((always_inline)) void advance_bonus(const struct matrix_token *x,
                                                                const struct columns *c, float *out)
{
	float sum[COLUMNS] = {0};
	const float *v = x->v;

	for (int64_t i = 0; i < c->d_k; i++) {
		float decay = x->decay[i], k = x->k[i], q = x->q[i], *s = c->state + i * c->row;
		float bonus = x->bonus[i];

#pragma omp simd
		for (int64_t j = 0; j < c->n; j++) {
			float kv = k * v[j];

			sum[j] += q * (s[j] + bonus * kv);
			s[j] = decay * s[j] + kv;
		}
	}
	memcpy(out, sum, sizeof *out * (size_t)c->n);
}

static inline __attribute__((always_inline)) void advance_delta(const struct matrix_token *x,
                                                                const struct columns *c, float *out)
{
	float change[COLUMNS] = {0}, sum[COLUMNS] = {0};

	for (int64_t i = 0; i < c->d_k; i++) {
		float decay = x->decay[i], k = x->k[i], *s = c->state + i * c->row;

#pragma omp simd
		for (int64_t j = 0; j < c->n; j++) {
			s[j] *= decay;
			change[j] += k * s[j];
		}
	}
	for (int64_t j = 0; j < c->n; j++)
		change[j] = x->beta * (x->v[j] - change[j]);
	for (int64_t i = 0; i < c->d_k; i++) {
		float k = x->k[i], q = x->q[i], *s = c->state + i * c->row;

#pragma omp simd
		for (int64_t j = 0; j < c->n; j++) {
			s[j] += k * change[j];
			sum[j] += q * s[j];
		}
	}
	memcpy(out, sum, sizeof *out * (size_t)c->n);
}

static inline __attribute__((always_inline)) void
advance(enum rule rule, const struct matrix_token *x, const struct columns *c, float *out)
{
	switch (rule) {
	case RULE_BONUS:
		advance_bonus(x, c, out);
		return;
	case RULE_DELTA:
		advance_delta(x, c, out);
		return;
	default:
		advance_plain(x, c, out);
	}
}

void matrix_state_advance(enum rule rule, int64_t d_k, int64_t n, float scale,
                          const struct matrix_token *token, float *state, int64_t state_row,
                          float *out)
{
	for (int64_t first = 0; first < n; first += COLUMNS) {
		int64_t columns = n - first < COLUMNS ? n - first : COLUMNS;
		struct matrix_token block = *token;
		float sum[COLUMNS];

		block.v += first;
		/* A constant number of columns lets the sums stay in registers. */
		if (columns == COLUMNS)
			advance(rule, &block,
			        &(struct columns){d_k, COLUMNS, state + first, state_row}, sum);
		else
			advance(rule, &block,
			        &(struct columns){d_k, columns, state + first, state_row}, sum);
		for (int64_t j = 0; out && j < columns; j++)
			out[first + j] = scale * sum[j];
	}
}

void matrix_state_decay(enum decay form, const struct view *log_decay, int64_t b, int64_t t,
                        int64_t h, int64_t d_k, float *decay, float *log_sum)
{
	double constant = form == DECAY_CONSTANT ? exp2(-5.0 - (double)h) : 0.0;
	const float *log = log_decay->data ? view_at(log_decay, b, t, h) : NULL;
	float one_log = form == DECAY_SCALAR ? *log : (float)log1p(-constant);
	/* 1 - 2^(-5-h) is exact; the exponential of its logarithm would not be. */
	float one_decay = form == DECAY_SCALAR ? exp_f32(one_log) : (float)(1.0 - constant);

	if (form == DECAY_DIAGONAL) {
#pragma omp simd
		for (int64_t i = 0; i < d_k; i++)
			decay[i] = exp_f32(log[i]);
	} else {
		for (int64_t i = 0; i < d_k; i++)
			decay[i] = one_decay;
	}
	for (int64_t i = 0; log_sum && i < d_k; i++)
		log_sum[i] += form == DECAY_DIAGONAL ? log[i] : one_log;
}

void matrix_state_load(const struct matrix_recurrence_args *a, int64_t b, int64_t h, int64_t first,
                       int64_t n, float *state)
{
	if (!a->h0) {
		memset(state, 0, sizeof *state * (size_t)(a->d_k * n));
		return;
	}
	const float *from = a->h0 + (b * a->n_heads + h) * a->d_k * a->d_v + first;
	for (int64_t i = 0; i < a->d_k; i++)
		memcpy(state + i * n, from + i * a->d_v, sizeof *state * (size_t)n);
}
