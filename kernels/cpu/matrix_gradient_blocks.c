/*
 * A block of up to SUB_CHUNK tokens of the plain and bonus rules backwards.
 * With S before the block, L the gradient of the state after it, P_i and R_j
 * the products of the decays from the block's start to i and from j+1 to its
 * end, D that of the whole block, and W the decays between two tokens:
 *   dA_ij = do_i.v_j
 *   dq_i = (S do_i) P_i + sum over j <= i of W_ij k_j dA_ij
 *   dk_j = (L v_j) R_j + sum over i >= j of W_ij q_i dA_ij
 *   dv_j = (k_j R_j) L + sum over i >= j of A_ij do_i
 *   L' = D L + sum over i of (q_i P_i)^T do_i
 * where do has the scale. The gradient of log decay l is everything that
 * crosses it: the paths from S or from a token before l to a token from l on
 * or to L. They are summed as they are, without the usual difference of
 * q dq and k dk, which cancels where the decay is strong.
 * (RULE_BONUS: the decays that reach q_i end at i-1, a lag of one.)
 */
#include <string.h>

#include "kernels/cpu/block_product.h"
#include "kernels/cpu/matrix_gradient.h"
#include "kernels/cpu/matrix_state.h"
#include "kernels/cpu/vector_math.h"

struct scratch {
	float *decay;        /* [SUB_CHUNK, d_k] */
	float *log_total;    /* [d_k] */
	float *total;        /* [d_k]: D */
	float *q_decayed;    /* [SUB_CHUNK, d_k]: q P */
	float *k_decayed;    /* [SUB_CHUNK, d_k]: k R */
	float *dq, *dk;      /* [SUB_CHUNK, d_k] */
	float *dlog;         /* [SUB_CHUNK, d_k] */
	float *from_state;   /* [SUB_CHUNK, d_k]: the paths from S to each token */
	float *to_state;     /* [SUB_CHUNK, d_k]: from each token to L */
	float *adjoint;      /* [SUB_CHUNK, d_k]: of one key's part in the state after each token */
	float *row;          /* [d_k] */
	float *columns;      /* [d_k, SUB_CHUNK] */
	float *v_columns;    /* [d_v, SUB_CHUNK] */
	float *dout;         /* [SUB_CHUNK, d_v]: scaled */
	float *dout_columns; /* [d_v, SUB_CHUNK] */
	float *score;        /* [SUB_CHUNK, SUB_CHUNK]: A transposed, row j */
	float *dscore;       /* [SUB_CHUNK, SUB_CHUNK]: dA transposed */
};

static struct scratch lay_out(const struct matrix_recurrence_args *a, struct scratch_arena *arena)
{
	int64_t keys = SUB_CHUNK * a->d_k, values = SUB_CHUNK * a->d_v;
	int64_t scores = SUB_CHUNK * SUB_CHUNK;

	return (struct scratch){
	        .decay = scratch_take(arena, keys),
	        .log_total = scratch_take(arena, a->d_k),
	        .total = scratch_take(arena, a->d_k),
	        .q_decayed = scratch_take(arena, keys),
	        .k_decayed = scratch_take(arena, keys),
	        .dq = scratch_take(arena, keys),
	        .dk = scratch_take(arena, keys),
	        .dlog = scratch_take(arena, keys),
	        .from_state = scratch_take(arena, keys),
	        .to_state = scratch_take(arena, keys),
	        .adjoint = scratch_take(arena, keys),
	        .row = scratch_take(arena, a->d_k),
	        .columns = scratch_take(arena, keys),
	        .v_columns = scratch_take(arena, values),
	        .dout = scratch_take(arena, values),
	        .dout_columns = scratch_take(arena, values),
	        .score = scratch_take(arena, scores),
	        .dscore = scratch_take(arena, scores),
	};
}

static size_t block_scratch(const struct matrix_recurrence_args *a)
{
	struct scratch_arena arena = {0};

	lay_out(a, &arena);
	return arena.used;
}

/* to = x y, elementwise; to may be x. */
static void multiply(int64_t n, const float *x, const float *y, float *to)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		to[i] = x[i] * y[i];
}

static void add(int64_t n, const float *x, float *to)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		to[i] += x[i];
}

static void fill(int64_t n, float value, float *to)
{
	for (int64_t i = 0; i < n; i++)
		to[i] = value;
}

/* Decays of the span's tokens, D, and k R. */
static void load_decays(const struct matrix_recurrence_args *a, const struct matrix_span *span,
                        const struct scratch *s)
{
	int64_t d = a->d_k;

	fill(d, 0, s->log_total);
	for (int64_t i = 0; i < span->n; i++)
		matrix_state_decay(a->decay, &a->log_decay, span->b, span->t + i, span->h, d,
		                   s->decay + i * d, s->log_total);
#pragma omp simd
	for (int64_t c = 0; c < d; c++)
		s->total[c] = exp_f32(s->log_total[c]);
	fill(d, 1, s->row);
	for (int64_t j = span->n - 1; j >= 0; j--) {
		multiply(d, view_at(&a->k, span->b, span->t + j, span->h), s->row,
		         s->k_decayed + j * d);
		multiply(d, s->row, s->decay + j * d, s->row);
	}
}

static void block_advance(const struct matrix_recurrence_args *a, const struct matrix_span *span,
                          float *memory, float *state)
{
	struct scratch s = lay_out(a, &(struct scratch_arena){.memory = memory});

	load_decays(a, span, &s);
	block_product_add(a->d_k, a->d_v, span->n, (struct block){s.k_decayed, 1, a->d_k},
	                  view_at(&a->v, span->b, span->t, span->h), a->v.token, s.total, state,
	                  a->d_v);
}

/* columns [d, SUB_CHUNK] = the transpose of n rows of d, `stride` apart; other columns zero. */
static void transpose(int64_t n, int64_t d, const float *rows, int64_t stride, float *columns)
{
	memset(columns, 0, sizeof *columns * (size_t)(d * SUB_CHUNK));
	for (int64_t i = 0; i < n; i++)
		for (int64_t c = 0; c < d; c++)
			columns[c * SUB_CHUNK + i] = rows[i * stride + c];
}

/* rows [n, d] = the transpose of columns [d, SUB_CHUNK]. */
static void transpose_back(int64_t n, int64_t d, const float *columns, float *rows)
{
	for (int64_t i = 0; i < n; i++)
		for (int64_t c = 0; c < d; c++)
			rows[i * d + c] = columns[c * SUB_CHUNK + i];
}

/* dout, its transpose, that of v, and dA. */
static void load_values(const struct matrix_recurrence_backward_args *a,
                        const struct matrix_span *span, const struct scratch *s)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const float *v = view_at(&f->v, span->b, span->t, span->h);
	int64_t d = f->d_v;

	for (int64_t i = 0; i < span->n; i++) {
		const float *dout = view_at(&a->dout, span->b, span->t + i, span->h);

		for (int64_t j = 0; j < d; j++)
			s->dout[i * d + j] = f->scale * dout[j];
	}
	transpose(span->n, d, s->dout, d, s->dout_columns);
	transpose(span->n, d, v, f->v.token, s->v_columns);
	block_product(span->n, SUB_CHUNK, d, (struct block){v, f->v.token, 1}, s->dout_columns,
	              SUB_CHUNK, s->dscore, SUB_CHUNK);
}

/* The parts of dq and dk through the states at the block's ends, and the paths they stand for. */
static void keys_through_states(const struct matrix_recurrence_args *a,
                                const struct matrix_span *span, const float *before,
                                const float *dstate, const struct scratch *s)
{
	int64_t d = a->d_k, n = span->n, lag = a->rule == RULE_BONUS;

	block_product(d, SUB_CHUNK, a->d_v, (struct block){before, a->d_v, 1}, s->dout_columns,
	              SUB_CHUNK, s->columns, SUB_CHUNK);
	transpose_back(n, d, s->columns, s->dq);
	block_product(d, SUB_CHUNK, a->d_v, (struct block){dstate, a->d_v, 1}, s->v_columns,
	              SUB_CHUNK, s->columns, SUB_CHUNK);
	transpose_back(n, d, s->columns, s->dk);
	fill(d, 1, s->row);
	for (int64_t i = 0; i < n; i++) {
		const float *q = view_at(&a->q, span->b, span->t + i, span->h);

		if (i >= lag)
			multiply(d, s->row, s->decay + (i - lag) * d, s->row);
		multiply(d, q, s->row, s->q_decayed + i * d);
		multiply(d, s->q_decayed + i * d, s->dq + i * d, s->from_state + i * d);
		multiply(d, s->dq + i * d, s->row, s->dq + i * d);
	}
	fill(d, 1, s->row);
	for (int64_t j = n - 1; j >= 0; j--) {
		multiply(d, s->k_decayed + j * d, s->dk + j * d, s->to_state + j * d);
		multiply(d, s->dk + j * d, s->row, s->dk + j * d);
		multiply(d, s->row, s->decay + j * d, s->row);
	}
}

/* dlog of every token: the paths between the states and between a state and a token. */
static void decays_through_states(const struct matrix_recurrence_args *a, int64_t n,
                                  const float *before, const float *dstate, const struct scratch *s)
{
	int64_t d = a->d_k;
	bool lag = a->rule == RULE_BONUS;

	for (int64_t c = 0; c < d; c++) {
		float sum = 0;

#pragma omp simd reduction(+ : sum)
		for (int64_t j = 0; j < a->d_v; j++)
			sum += before[c * a->d_v + j] * dstate[c * a->d_v + j];
		s->row[c] = s->total[c] * sum;
	}
	for (int64_t l = 0; l < n; l++) {
		memcpy(s->dlog + l * d, s->row, sizeof(float) * (size_t)d);
		add(d, s->to_state + l * d, s->row);
	}
	fill(d, 0, s->row);
	for (int64_t l = n - 1; l >= 0; l--) {
		if (!lag)
			add(d, s->from_state + l * d, s->row);
		add(d, s->row, s->dlog + l * d);
		if (lag)
			add(d, s->from_state + l * d, s->row);
	}
}

/*
 * adjoint row m, for j <= m < n: the gradient of key j's part of the state
 * after token m, through the queries of the block.
 */
static void adjoints_of_key(const struct matrix_recurrence_args *a, const struct matrix_span *span,
                            int64_t j, const struct scratch *s)
{
	int64_t d = a->d_k, n = span->n, lag = a->rule == RULE_BONUS;

	fill(d, 0, s->adjoint + (n - 1) * d);
	for (int64_t m = n - 1 - lag; m >= j; m--) {
		const float *q = view_at(&a->q, span->b, span->t + m + lag, span->h);
		float weight = s->dscore[j * SUB_CHUNK + m + lag], *to = s->adjoint + m * d;

		if (m == n - 1) {
#pragma omp simd
			for (int64_t c = 0; c < d; c++)
				to[c] = weight * q[c];
			continue;
		}
		const float *decay = s->decay + (m + 1) * d, *next = to + d;
#pragma omp simd
		for (int64_t c = 0; c < d; c++)
			to[c] = weight * q[c] + decay[c] * next[c];
	}
}

/* dq += dscore k; returns q.k. */
static float query_backward(int64_t d, const float *q, const float *k, float dscore, float *dq)
{
	float sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t c = 0; c < d; c++) {
		dq[c] += dscore * k[c];
		sum += q[c] * k[c];
	}
	return sum;
}

/* k *= decay; dlog += k adjoint. */
static void decay_backward(int64_t d, const float *decay, const float *adjoint, float *k,
                           float *dlog)
{
#pragma omp simd
	for (int64_t c = 0; c < d; c++) {
		k[c] *= decay[c];
		dlog[c] += k[c] * adjoint[c];
	}
}

/* Score, dq, dk and dbonus of a token with itself under RULE_BONUS. */
static void own_bonus_backward(int64_t d, const float *q, const float *k, const float *bonus,
                               float *score, float dscore, float *dq, float *dk, double *dbonus)
{
	float sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t c = 0; c < d; c++) {
		sum += q[c] * k[c] * bonus[c];
		dq[c] += dscore * bonus[c] * k[c];
		dk[c] += dscore * bonus[c] * q[c];
		dbonus[c] += dscore * q[c] * k[c];
	}
	*score = sum;
}

/* All that token j does as a key within the block: row j of `score`, and its shares of dq, dk,
 * dlog. */
static void key_within_block(const struct matrix_recurrence_args *a, const struct matrix_span *span,
                             int64_t j, const struct scratch *s, double *dbonus)
{
	int64_t d = a->d_k;
	bool lag = a->rule == RULE_BONUS;
	const float *q = view_at(&a->q, span->b, span->t + j, span->h);
	const float *dscore = s->dscore + j * SUB_CHUNK;
	float *k = s->row, *score = s->score + j * SUB_CHUNK;

	memcpy(k, view_at(&a->k, span->b, span->t + j, span->h), sizeof *k * (size_t)d);
	adjoints_of_key(a, span, j, s);
	add(d, s->adjoint + j * d, s->dk + j * d);
	if (lag)
		own_bonus_backward(d, q, k, a->bonus + span->h * d, score + j, dscore[j],
		                   s->dq + j * d, s->dk + j * d, dbonus);
	else
		score[j] = query_backward(d, q, k, dscore[j], s->dq + j * d);
	for (int64_t i = j + 1; i < span->n; i++) {
		float *dlog = s->dlog + i * d, *dq = s->dq + i * d;

		q = view_at(&a->q, span->b, span->t + i, span->h);
		if (lag)
			score[i] = query_backward(d, q, k, dscore[i], dq);
		decay_backward(d, s->decay + i * d, s->adjoint + i * d, k, dlog);
		if (!lag)
			score[i] = query_backward(d, q, k, dscore[i], dq);
	}
}

/* dv, straight into its view, and the gradient of the state before the block. */
static void values_and_state(const struct matrix_recurrence_backward_args *a,
                             const struct matrix_span *span, const struct scratch *s, float *dstate)
{
	const struct matrix_recurrence_args *f = &a->forward;
	int64_t n = span->n, d_k = f->d_k, d_v = f->d_v;
	float *dv = view_at(&a->dv, span->b, span->t, span->h);

	block_product(n, d_v, d_k, (struct block){s->k_decayed, d_k, 1}, dstate, d_v, dv,
	              a->dv.token);
	block_product_add(n, d_v, n, (struct block){s->score, SUB_CHUNK, 1}, s->dout, d_v, NULL, dv,
	                  a->dv.token);
	block_product_add(d_k, d_v, n, (struct block){s->q_decayed, 1, d_k}, s->dout, d_v, s->total,
	                  dstate, d_v);
}

/* dq, dk and dlog_decay, from scratch to their views. */
static void write_keys(const struct matrix_recurrence_backward_args *a,
                       const struct matrix_span *span, const struct scratch *s)
{
	int64_t d = a->forward.d_k, b = span->b, h = span->h;
	size_t bytes = sizeof(float) * (size_t)d;

	for (int64_t i = 0; i < span->n; i++) {
		const float *dlog = s->dlog + i * d;
		float sum = 0;

		memcpy(view_at(&a->dq, b, span->t + i, h), s->dq + i * d, bytes);
		memcpy(view_at(&a->dk, b, span->t + i, h), s->dk + i * d, bytes);
		if (a->forward.decay == DECAY_DIAGONAL)
			memcpy(view_at(&a->dlog_decay, b, span->t + i, h), dlog, bytes);
		if (a->forward.decay != DECAY_SCALAR)
			continue;
#pragma omp simd reduction(+ : sum)
		for (int64_t c = 0; c < d; c++)
			sum += dlog[c];
		*view_at(&a->dlog_decay, b, span->t + i, h) = sum;
	}
}

static void block_backward(const struct matrix_recurrence_backward_args *a,
                           const struct matrix_span *span, float *memory, const float *before,
                           const float *after, float *dstate, double *dbonus)
{
	const struct matrix_recurrence_args *f = &a->forward;
	struct scratch s = lay_out(f, &(struct scratch_arena){.memory = memory});

	load_decays(f, span, &s);
	load_values(a, span, &s);
	keys_through_states(f, span, before, dstate, &s);
	decays_through_states(f, span->n, before, dstate, &s);
	memset(s.score, 0, sizeof(float) * SUB_CHUNK * SUB_CHUNK);
	for (int64_t j = 0; j < span->n; j++)
		key_within_block(f, span, j, &s, dbonus);
	values_and_state(a, span, &s, dstate);
	write_keys(a, span, &s);
}

const struct matrix_gradient matrix_gradient_blocks = {block_scratch, block_advance,
                                                       block_backward};
