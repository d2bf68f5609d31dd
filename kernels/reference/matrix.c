/* fp64 matrix-state recurrence, token by token; the backward pass recomputes the states in
 * segments of about sqrt(T) tokens from states kept at their beginnings. */
#include "kernels/reference/reference.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

/* Pointers to one token of one head, and its decay per row of the state. */
struct token {
	const double *q, *k, *v;
	double beta;
	int64_t row; /* (b*T + t)*H + h */
};

static struct token token_at(const struct reference_matrix *m, int64_t b, int64_t h, int64_t t)
{
	int64_t row = (b * m->seq_len + t) * m->n_heads + h;

	return (struct token){.q = m->q + row * m->d_k,
	                      .k = m->k + row * m->d_k,
	                      .v = m->v + row * m->d_v,
	                      .beta = m->beta ? m->beta[row] : 1,
	                      .row = row};
}

/* A_t of row i of the state. */
static double decay_of(const struct reference_matrix *m, int64_t row, int64_t i)
{
	switch (m->decay) {
	case DECAY_CONSTANT:
		return 1 - exp2(-5 - (double)(row % m->n_heads));
	case DECAY_SCALAR:
		return exp(m->log_decay[row]);
	case DECAY_DIAGONAL:
		return exp(m->log_decay[row * m->d_k + i]);
	default:
		return 1;
	}
}

/* to = A_t from, [d_k, d_v]. */
static void decay_state(const struct reference_matrix *m, const struct token *x, const double *from,
                        double *to)
{
	for (int64_t i = 0; i < m->d_k; i++) {
		double a = decay_of(m, x->row, i);

		for (int64_t j = 0; j < m->d_v; j++)
			to[i * m->d_v + j] = a * from[i * m->d_v + j];
	}
}

/* y [d_v] = x S. */
static void row_times_state(const struct reference_matrix *m, const double *x, const double *state,
                            double *y)
{
	memset(y, 0, sizeof *y * (size_t)m->d_v);
	for (int64_t i = 0; i < m->d_k; i++)
		for (int64_t j = 0; j < m->d_v; j++)
			y[j] += x[i] * state[i * m->d_v + j];
}

/* y [d_k] = S x. */
static void state_times_column(const struct reference_matrix *m, const double *state,
                               const double *x, double *y)
{
	for (int64_t i = 0; i < m->d_k; i++) {
		double sum = 0;

#pragma omp simd reduction(+ : sum)
		for (int64_t j = 0; j < m->d_v; j++)
			sum += state[i * m->d_v + j] * x[j];
		y[i] = sum;
	}
}

/* S += scale * x^T y. */
static void add_outer(const struct reference_matrix *m, double scale, const double *x,
                      const double *y, double *state)
{
	for (int64_t i = 0; i < m->d_k; i++)
		for (int64_t j = 0; j < m->d_v; j++)
			state[i * m->d_v + j] += scale * x[i] * y[j];
}

static double dot(int64_t count, const double *x, const double *y)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += x[i] * y[i];
	return sum;
}

/* What is written to the state at key k: v, or beta (v - k S) with the decayed S. */
static void written_value(const struct reference_matrix *m, const struct token *x,
                          const double *decayed, double *value)
{
	if (m->rule != RULE_DELTA) {
		memcpy(value, x->v, sizeof *value * (size_t)m->d_v);
		return;
	}
	row_times_state(m, x->k, decayed, value);
	for (int64_t j = 0; j < m->d_v; j++)
		value[j] = x->beta * (x->v[j] - value[j]);
}

/* after = A_t before + k^T (what is written); value [d_v] is scratch. */
static void advance(const struct reference_matrix *m, const struct token *x, const double *before,
                    double *after, double *value)
{
	decay_state(m, x, before, after);
	written_value(m, x, after, value);
	add_outer(m, 1, x->k, value, after);
}

/* sum_i q_i u_i k_i of RWKV-6's bonus. */
static double bonus_weight(const struct reference_matrix *m, const struct token *x)
{
	const double *u = m->bonus + x->row % m->n_heads * m->d_k;
	double sum = 0;

	for (int64_t i = 0; i < m->d_k; i++)
		sum += x->q[i] * u[i] * x->k[i];
	return sum;
}

/* o_t [d_v] from the states around the token. */
static void read_output(const struct reference_matrix *m, const struct token *x,
                        const double *before, const double *after, double *out)
{
	double bonus = m->rule == RULE_BONUS ? bonus_weight(m, x) : 0;

	row_times_state(m, x->q, m->rule == RULE_BONUS ? before : after, out);
	for (int64_t j = 0; j < m->d_v; j++)
		out[j] = m->scale * (out[j] + bonus * x->v[j]);
}

static void first_state(const struct reference_matrix *m, int64_t b, int64_t h, double *state)
{
	size_t size = (size_t)(m->d_k * m->d_v);

	if (m->h0)
		memcpy(state, m->h0 + (size_t)(b * m->n_heads + h) * size, size * sizeof *state);
	else
		memset(state, 0, size * sizeof *state);
}

/* One head of one sequence; scratch of two states and a value. */
static void head_forward(const struct reference_matrix *m, int64_t b, int64_t h, double *scratch,
                         double *out, double *final_state)
{
	int64_t size = m->d_k * m->d_v;
	double *before = scratch, *after = scratch + size, *value = after + size;

	first_state(m, b, h, before);
	for (int64_t t = 0; t < m->seq_len; t++) {
		struct token x = token_at(m, b, h, t);
		double *swap = before;

		advance(m, &x, before, after, value);
		read_output(m, &x, before, after, out + x.row * m->d_v);
		before = after;
		after = swap;
	}
	if (final_state)
		memcpy(final_state + (b * m->n_heads + h) * size, before,
		       sizeof *before * (size_t)size);
}

/* Scratch for every thread, or NULL with a message. */
static double *allocate_scratch(int64_t per_thread)
{
	size_t count = (size_t)per_thread * (size_t)omp_get_max_threads();
	double *scratch = malloc(count * sizeof *scratch);

	if (!scratch)
		status_set(STATUS_OOM, "reference: no memory for %zu doubles", count);
	return scratch;
}

enum status reference_matrix_forward(const struct reference_matrix *m, double *out,
                                     double *final_state)
{
	if (reference_in_use())
		return reference_in_use()->matrix_forward(m, out);
	int64_t per_thread = 2 * m->d_k * m->d_v + m->d_v;
	double *scratch = allocate_scratch(per_thread);

	if (!scratch)
		return STATUS_OOM;
#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < m->batch; b++)
		for (int64_t h = 0; h < m->n_heads; h++)
			head_forward(m, b, h, scratch + per_thread * omp_get_thread_num(), out,
			             final_state);
	free(scratch);
	return STATUS_OK;
}

/* Decays the weights of a row's sum past token x; false if nothing is left of them. */
static bool decay_weights(const struct reference_matrix *m, const struct token *x, double *weight)
{
	bool any = false;

	for (int64_t i = 0; m->decay != DECAY_NONE && i < m->d_k; i++) {
		weight[i] *= decay_of(m, x->row, i);
		any = any || fabs(weight[i]) > 1e-20;
	}
	return any || m->decay == DECAY_NONE;
}

/*
 * o_t = scale * sum over s <= t of (w_s . k_s) v_s, the last s first: w_t = q_t, and each step back
 * multiplies w by the decay it passes. With a bonus t itself counts u, and its decay is not passed.
 */
static void sum_row(const struct reference_matrix *m, int64_t b, int64_t h, int64_t t,
                    double *weight, double *out)
{
	const bool bonus = m->rule == RULE_BONUS;
	bool any = true;

	memcpy(weight, token_at(m, b, h, t).q, sizeof *weight * (size_t)m->d_k);
	memset(out, 0, sizeof *out * (size_t)m->d_v);
	for (int64_t s = t; any && s >= 0; s--) {
		const struct token x = token_at(m, b, h, s);
		const double score = m->scale * (bonus && s == t ? bonus_weight(m, &x)
		                                                 : dot(m->d_k, weight, x.k));

		for (int64_t j = 0; j < m->d_v; j++)
			out[j] += score * x.v[j];
		any = (bonus && s == t) || decay_weights(m, &x, weight);
	}
	for (int64_t i = 0; any && m->h0 && i < m->d_k; i++)
		for (int64_t j = 0; j < m->d_v; j++)
			out[j] += m->scale * weight[i] *
			          m->h0[((b * m->n_heads + h) * m->d_k + i) * m->d_v + j];
}

enum status reference_matrix_rows(const struct reference_matrix *m, int64_t n_rows,
                                  const int64_t *rows, double *out)
{
	double *scratch = allocate_scratch(m->d_k);

	if (!scratch)
		return STATUS_OOM;
#pragma omp parallel for collapse(2) schedule(dynamic)
	for (int64_t i = 0; i < n_rows; i++)
		for (int64_t h = 0; h < m->n_heads; h++)
			sum_row(m, rows[i] / m->seq_len, h, rows[i] % m->seq_len,
			        scratch + m->d_k * omp_get_thread_num(),
			        out + (i * m->n_heads + h) * m->d_v);
	free(scratch);
	return STATUS_OK;
}

/* Scratch of one head's backward pass. */
struct scratch {
	double *kept;           /* states before every segment's first token */
	double *states;         /* states around the tokens of one segment */
	double *dstate;         /* gradient of the state after the token, then before it */
	double *decayed;        /* A_t S_{t-1} */
	double *value, *dvalue; /* [d_v] */
	double *column;         /* [d_k] */
};

static int64_t segment_length(const struct reference_matrix *m)
{
	return (int64_t)ceil(sqrt((double)m->seq_len));
}

static int64_t scratch_size(const struct reference_matrix *m)
{
	int64_t length = segment_length(m);
	int64_t n_states = (m->seq_len + length - 1) / length + length + 1 + 2;

	return n_states * m->d_k * m->d_v + 2 * m->d_v + m->d_k;
}

static struct scratch split_scratch(const struct reference_matrix *m, double *memory)
{
	int64_t size = m->d_k * m->d_v, length = segment_length(m);
	struct scratch s = {.kept = memory};

	s.states = s.kept + (m->seq_len + length - 1) / length * size;
	s.dstate = s.states + (length + 1) * size;
	s.decayed = s.dstate + size;
	s.value = s.decayed + size;
	s.dvalue = s.value + m->d_v;
	s.column = s.dvalue + m->d_v;
	return s;
}

/* dq, and what the output gives to dstate (after the token), dk and dv; for the bonus the state
 * before the token is read, so dstate waits until backward_state has passed the decay. */
static void backward_output(const struct reference_matrix *m,
                            const struct reference_matrix_grads *grads, const struct token *x,
                            const double *d_o, const double *before, const double *after,
                            struct scratch *s)
{
	double *dq = grads->dq + x->row * m->d_k, *dk = grads->dk + x->row * m->d_k;
	double *dv = grads->dv + x->row * m->d_v;
	int64_t head = x->row % m->n_heads;
	double dv_o = dot(m->d_v, x->v, d_o);

	state_times_column(m, m->rule == RULE_BONUS ? before : after, d_o, dq);
	memset(dk, 0, sizeof *dk * (size_t)m->d_k);
	memset(dv, 0, sizeof *dv * (size_t)m->d_v);
	if (m->rule == RULE_BONUS) {
		const double *u = m->bonus + head * m->d_k;
		double weight = bonus_weight(m, x);

		for (int64_t i = 0; i < m->d_k; i++) {
			dq[i] += u[i] * x->k[i] * dv_o;
			dk[i] = m->scale * u[i] * x->q[i] * dv_o;
			grads->dbonus[head * m->d_k + i] += m->scale * x->q[i] * x->k[i] * dv_o;
		}
		for (int64_t j = 0; j < m->d_v; j++)
			dv[j] = m->scale * weight * d_o[j];
	} else {
		add_outer(m, m->scale, x->q, d_o, s->dstate);
	}
	for (int64_t i = 0; i < m->d_k; i++)
		dq[i] *= m->scale;
}

/* Through S = decayed + k^T value: adds to dk, dv, dbeta; dstate becomes that of `decayed`. */
static void backward_write(const struct reference_matrix *m,
                           const struct reference_matrix_grads *grads, const struct token *x,
                           const double *before, struct scratch *s)
{
	double *dk = grads->dk + x->row * m->d_k, *dv = grads->dv + x->row * m->d_v;

	decay_state(m, x, before, s->decayed);
	written_value(m, x, s->decayed, s->value);
	row_times_state(m, x->k, s->dstate, s->dvalue);
	state_times_column(m, s->dstate, s->value, s->column);
	for (int64_t i = 0; i < m->d_k; i++)
		dk[i] += s->column[i];
	for (int64_t j = 0; j < m->d_v; j++)
		dv[j] += x->beta * s->dvalue[j];
	if (m->rule != RULE_DELTA)
		return;
	row_times_state(m, x->k, s->decayed, s->value);
	for (int64_t j = 0; j < m->d_v; j++)
		s->value[j] = x->v[j] - s->value[j];
	grads->dbeta[x->row] = dot(m->d_v, s->dvalue, s->value);
	state_times_column(m, s->decayed, s->dvalue, s->column);
	for (int64_t i = 0; i < m->d_k; i++)
		dk[i] -= x->beta * s->column[i];
	add_outer(m, -x->beta, x->k, s->dvalue, s->dstate);
}

/* Through decayed = A_t before: dlog_decay; dstate becomes that of `before`. */
static void backward_decay(const struct reference_matrix *m,
                           const struct reference_matrix_grads *grads, const struct token *x,
                           struct scratch *s)
{
	double sum = 0;

	for (int64_t i = 0; i < m->d_k; i++) {
		double row = dot(m->d_v, s->dstate + i * m->d_v, s->decayed + i * m->d_v);

		if (m->decay == DECAY_DIAGONAL)
			grads->dlog_decay[x->row * m->d_k + i] = row;
		sum += row;
	}
	if (m->decay == DECAY_SCALAR)
		grads->dlog_decay[x->row] = sum;
	decay_state(m, x, s->dstate, s->dstate);
}

/* The states around tokens first .. end of a segment, from the one kept at its beginning. */
static void recompute_segment(const struct reference_matrix *m, int64_t b, int64_t h, int64_t first,
                              int64_t end, struct scratch *s)
{
	int64_t size = m->d_k * m->d_v;

	memcpy(s->states, s->kept + first / segment_length(m) * size,
	       sizeof *s->states * (size_t)size);
	for (int64_t t = first; t < end; t++) {
		struct token x = token_at(m, b, h, t);
		double *before = s->states + (t - first) * size;

		advance(m, &x, before, before + size, s->value);
	}
}

/* Fills s->kept by running through the whole sequence. */
static void keep_states(const struct reference_matrix *m, int64_t b, int64_t h, struct scratch *s)
{
	int64_t size = m->d_k * m->d_v, length = segment_length(m);

	first_state(m, b, h, s->kept);
	for (int64_t first = 0; first + length < m->seq_len; first += length) {
		recompute_segment(m, b, h, first, first + length, s);
		memcpy(s->kept + (first / length + 1) * size, s->states + length * size,
		       sizeof *s->kept * (size_t)size);
	}
}

static void head_backward(const struct reference_matrix *m, const double *dout,
                          const struct reference_matrix_grads *grads, int64_t b, int64_t h,
                          double *memory)
{
	int64_t size = m->d_k * m->d_v, length = segment_length(m);
	struct scratch s = split_scratch(m, memory);

	keep_states(m, b, h, &s);
	memset(s.dstate, 0, sizeof *s.dstate * (size_t)size);
	for (int64_t first = (m->seq_len - 1) / length * length; first >= 0; first -= length) {
		int64_t end = first + length < m->seq_len ? first + length : m->seq_len;

		recompute_segment(m, b, h, first, end, &s);
		for (int64_t t = end - 1; t >= first; t--) {
			struct token x = token_at(m, b, h, t);
			const double *before = s.states + (t - first) * size;
			const double *d_o = dout + x.row * m->d_v;

			backward_output(m, grads, &x, d_o, before, before + size, &s);
			backward_write(m, grads, &x, before, &s);
			backward_decay(m, grads, &x, &s);
			if (m->rule == RULE_BONUS)
				add_outer(m, m->scale, x.q, d_o, s.dstate);
		}
	}
	if (grads->dh0)
		memcpy(grads->dh0 + (b * m->n_heads + h) * size, s.dstate,
		       sizeof *s.dstate * (size_t)size);
}

enum status reference_matrix_backward(const struct reference_matrix *m, const double *dout,
                                      const struct reference_matrix_grads *grads)
{
	int64_t per_thread = scratch_size(m);
	double *scratch = allocate_scratch(per_thread);

	if (!scratch)
		return STATUS_OOM;
	if (m->rule == RULE_BONUS)
		memset(grads->dbonus, 0, sizeof(double) * (size_t)(m->n_heads * m->d_k));
		/* Sequences one after another: dbonus is summed over them. */
#pragma omp parallel for
	for (int64_t h = 0; h < m->n_heads; h++)
		for (int64_t b = 0; b < m->batch; b++)
			head_backward(m, dout, grads, b, h,
			              scratch + per_thread * omp_get_thread_num());
	free(scratch);
	return STATUS_OK;
}
