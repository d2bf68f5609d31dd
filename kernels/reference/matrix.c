/* fp64 matrix-state recurrence, token by token; the backward pass recomputes the states in
 * segments of about sqrt(T) tokens from states kept at their beginnings. */
#include "kernels/reference/shared.h"

#include <omp.h>

/* One token of one head. */
struct token {
	const double *q, *k, *v;
	double beta;
	int64_t b, t, h;
};

static struct token token_at(const struct matrix_recurrence_args *m, int64_t b, int64_t h,
                             int64_t t)
{
	return (struct token){.q = at(&m->q, b, t, h),
	                      .k = at(&m->k, b, t, h),
	                      .v = at(&m->v, b, t, h),
	                      .beta = m->rule == RULE_DELTA ? *at(&m->beta, b, t, h) : 1,
	                      .b = b,
	                      .t = t,
	                      .h = h};
}

/* to = A_t from, [d_k, d_v]. */
static void decay_state(const struct matrix_recurrence_args *m, const struct token *x,
                        const double *from, double *to)
{
	for (int64_t i = 0; i < m->d_k; i++) {
		double a = decay_of(m, x->b, x->t, x->h, i);

		for (int64_t j = 0; j < m->d_v; j++)
			to[i * m->d_v + j] = a * from[i * m->d_v + j];
	}
}

/* y [d_v] = x S. */
static void row_times_state(const struct matrix_recurrence_args *m, const double *x,
                            const double *state, double *y)
{
	zero(m->d_v, y);
	for (int64_t i = 0; i < m->d_k; i++)
		add_scaled(m->d_v, x[i], state + i * m->d_v, y);
}

/* y [d_k] = S x. */
static void state_times_column(const struct matrix_recurrence_args *m, const double *state,
                               const double *x, double *y)
{
	for (int64_t i = 0; i < m->d_k; i++)
		y[i] = dot(m->d_v, state + i * m->d_v, x);
}

/* S += scale * x^T y. */
static void add_outer(const struct matrix_recurrence_args *m, double scale, const double *x,
                      const double *y, double *state)
{
	for (int64_t i = 0; i < m->d_k; i++)
		add_scaled(m->d_v, scale * x[i], y, state + i * m->d_v);
}

/* What is written to the state at key k: v, or beta (v - k S) with the decayed S. */
static void written_value(const struct matrix_recurrence_args *m, const struct token *x,
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
static void advance(const struct matrix_recurrence_args *m, const struct token *x,
                    const double *before, double *after, double *value)
{
	decay_state(m, x, before, after);
	written_value(m, x, after, value);
	add_outer(m, 1, x->k, value, after);
}

/* sum_i q_i u_i k_i of RWKV-6's bonus. */
static double bonus_weight(const struct matrix_recurrence_args *m, const struct token *x)
{
	const double *u = wide(m->bonus) + x->h * m->d_k;
	double sum = 0;

	for (int64_t i = 0; i < m->d_k; i++)
		sum += x->q[i] * u[i] * x->k[i];
	return sum;
}

/* o_t [d_v] from the states around the token. */
static void read_output(const struct matrix_recurrence_args *m, const struct token *x,
                        const double *before, const double *after, double *out)
{
	double bonus = m->rule == RULE_BONUS ? bonus_weight(m, x) : 0;

	row_times_state(m, x->q, m->rule == RULE_BONUS ? before : after, out);
	for (int64_t j = 0; j < m->d_v; j++)
		out[j] = m->scale * (out[j] + bonus * x->v[j]);
}

static void first_state(const struct matrix_recurrence_args *m, int64_t b, int64_t h, double *state)
{
	int64_t size = m->d_k * m->d_v;

	if (m->h0)
		memcpy(state, wide(m->h0) + (b * m->n_heads + h) * size,
		       sizeof *state * (size_t)size);
	else
		zero(size, state);
}

/* One head of one sequence; scratch of two states and a value. */
static void head_forward(const struct matrix_recurrence_args *m, int64_t b, int64_t h,
                         double *scratch)
{
	int64_t size = m->d_k * m->d_v;
	double *before = scratch, *after = scratch + size, *value = after + size;

	first_state(m, b, h, before);
	for (int64_t t = 0; t < m->seq_len; t++) {
		struct token x = token_at(m, b, h, t);
		double *swap = before;

		advance(m, &x, before, after, value);
		read_output(m, &x, before, after, at(&m->out, b, t, h));
		before = after;
		after = swap;
	}
	if (m->final_state)
		memcpy(wide_out(m->final_state) + (b * m->n_heads + h) * size, before,
		       sizeof *before * (size_t)size);
}

enum status reference_matrix_recurrence(struct device *device, const void *args, void *workspace)
{
	const struct matrix_recurrence_args *a = args;
	int64_t per_thread = 2 * a->d_k * a->d_v + a->d_v;
	double *scratch = take_doubles(per_thread * omp_get_max_threads());

	if (!scratch)
		return STATUS_OOM;
#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			head_forward(a, b, h, scratch + per_thread * omp_get_thread_num());
	free(scratch);
	return STATUS_OK;
}

enum status reference_matrix_recurrence_step(struct device *device, const void *args,
                                             void *workspace)
{
	const struct matrix_recurrence_step_args *a = args;
	const struct matrix_recurrence_args token = {
	        .batch = a->batch,
	        .seq_len = 1,
	        .n_heads = a->n_heads,
	        .d_k = a->d_k,
	        .d_v = a->d_v,
	        .decay = a->decay,
	        .rule = a->rule,
	        .scale = a->scale,
	        .q = a->q,
	        .k = a->k,
	        .v = a->v,
	        .log_decay = a->log_decay,
	        .bonus = a->bonus,
	        .beta = a->beta,
	        .h0 = a->state,
	        .out = a->out,
	        .final_state = a->state,
	        .first_head = a->first_head,
	};

	return reference_matrix_recurrence(device, &token, workspace);
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

static int64_t segment_length(const struct matrix_recurrence_args *m)
{
	return (int64_t)ceil(sqrt((double)m->seq_len));
}

static int64_t scratch_size(const struct matrix_recurrence_args *m)
{
	int64_t length = segment_length(m);
	int64_t n_states = (m->seq_len + length - 1) / length + length + 1 + 2;

	return n_states * m->d_k * m->d_v + 2 * m->d_v + m->d_k;
}

static struct scratch split_scratch(const struct matrix_recurrence_args *m, double *memory)
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
 * before the token is read, so dstate waits until backward_decay has passed the decay. */
static void backward_output(const struct matrix_recurrence_backward_args *a, const struct token *x,
                            const double *d_o, const double *before, const double *after,
                            struct scratch *s)
{
	const struct matrix_recurrence_args *m = &a->forward;
	double *dq = at(&a->dq, x->b, x->t, x->h), *dk = at(&a->dk, x->b, x->t, x->h);
	double *dv = at(&a->dv, x->b, x->t, x->h);
	double dv_o = dot(m->d_v, x->v, d_o);

	state_times_column(m, m->rule == RULE_BONUS ? before : after, d_o, dq);
	zero(m->d_k, dk);
	zero(m->d_v, dv);
	if (m->rule == RULE_BONUS) {
		const double *u = wide(m->bonus) + x->h * m->d_k;
		double *dbonus = wide_out(a->dbonus) + x->h * m->d_k;
		double weight = bonus_weight(m, x);

		for (int64_t i = 0; i < m->d_k; i++) {
			dq[i] += u[i] * x->k[i] * dv_o;
			dk[i] = m->scale * u[i] * x->q[i] * dv_o;
			dbonus[i] += m->scale * x->q[i] * x->k[i] * dv_o;
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
static void backward_write(const struct matrix_recurrence_backward_args *a, const struct token *x,
                           const double *before, struct scratch *s)
{
	const struct matrix_recurrence_args *m = &a->forward;
	double *dk = at(&a->dk, x->b, x->t, x->h), *dv = at(&a->dv, x->b, x->t, x->h);

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
	*at(&a->dbeta, x->b, x->t, x->h) = dot(m->d_v, s->dvalue, s->value);
	state_times_column(m, s->decayed, s->dvalue, s->column);
	for (int64_t i = 0; i < m->d_k; i++)
		dk[i] -= x->beta * s->column[i];
	add_outer(m, -x->beta, x->k, s->dvalue, s->dstate);
}

/* Through decayed = A_t before: dlog_decay; dstate becomes that of `before`. */
static void backward_decay(const struct matrix_recurrence_backward_args *a, const struct token *x,
                           struct scratch *s)
{
	const struct matrix_recurrence_args *m = &a->forward;
	double sum = 0;

	for (int64_t i = 0; i < m->d_k; i++) {
		double row = dot(m->d_v, s->dstate + i * m->d_v, s->decayed + i * m->d_v);

		if (m->decay == DECAY_DIAGONAL)
			at(&a->dlog_decay, x->b, x->t, x->h)[i] = row;
		sum += row;
	}
	if (m->decay == DECAY_SCALAR)
		*at(&a->dlog_decay, x->b, x->t, x->h) = sum;
	decay_state(m, x, s->dstate, s->dstate);
}

/* The states around tokens first .. end of a segment, from the one kept at its beginning. */
static void recompute_segment(const struct matrix_recurrence_args *m, int64_t b, int64_t h,
                              int64_t first, int64_t end, struct scratch *s)
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
static void keep_states(const struct matrix_recurrence_args *m, int64_t b, int64_t h,
                        struct scratch *s)
{
	int64_t size = m->d_k * m->d_v, length = segment_length(m);

	first_state(m, b, h, s->kept);
	for (int64_t first = 0; first + length < m->seq_len; first += length) {
		recompute_segment(m, b, h, first, first + length, s);
		memcpy(s->kept + (first / length + 1) * size, s->states + length * size,
		       sizeof *s->kept * (size_t)size);
	}
}

static void head_backward(const struct matrix_recurrence_backward_args *a, int64_t b, int64_t h,
                          double *memory)
{
	const struct matrix_recurrence_args *m = &a->forward;
	int64_t size = m->d_k * m->d_v, length = segment_length(m);
	struct scratch s = split_scratch(m, memory);

	keep_states(m, b, h, &s);
	zero(size, s.dstate);
	for (int64_t first = (m->seq_len - 1) / length * length; first >= 0; first -= length) {
		int64_t end = first + length < m->seq_len ? first + length : m->seq_len;

		recompute_segment(m, b, h, first, end, &s);
		for (int64_t t = end - 1; t >= first; t--) {
			struct token x = token_at(m, b, h, t);
			const double *before = s.states + (t - first) * size;
			const double *d_o = at(&a->dout, b, t, h);

			backward_output(a, &x, d_o, before, before + size, &s);
			backward_write(a, &x, before, &s);
			backward_decay(a, &x, &s);
			if (m->rule == RULE_BONUS)
				add_outer(m, m->scale, x.q, d_o, s.dstate);
		}
	}
	if (a->dh0)
		memcpy(wide_out(a->dh0) + (b * m->n_heads + h) * size, s.dstate,
		       sizeof *s.dstate * (size_t)size);
}

/* Keeps the states of about 2 sqrt(T) tokens per thread. Sequences run one after another: dbonus is
 * summed over them. */
enum status reference_matrix_recurrence_backward(struct device *device, const void *args,
                                                 void *workspace)
{
	const struct matrix_recurrence_backward_args *a = args;
	const struct matrix_recurrence_args *m = &a->forward;
	int64_t per_thread = scratch_size(m);
	double *scratch = take_doubles(per_thread * omp_get_max_threads());

	if (!scratch)
		return STATUS_OOM;
	if (m->rule == RULE_BONUS)
		zero(m->n_heads * m->d_k, wide_out(a->dbonus));
#pragma omp parallel for
	for (int64_t h = 0; h < m->n_heads; h++)
		for (int64_t b = 0; b < m->batch; b++)
			head_backward(a, b, h, scratch + per_thread * omp_get_thread_num());
	free(scratch);
	return STATUS_OK;
}
