/* Every backward of the fp64 reference against central differences of its forward: this is what
 * makes the reference fit to judge the kernels. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "tests/support.h"

static const double step = 1e-4, allowed = 1e-7;

enum { MAX_ARRAYS = 24 };

/* The arrays of one case, freed together. */
struct pool {
	struct random random;
	int count;
	double *arrays[MAX_ARRAYS];
};

static double *keep(struct pool *pool, double *array)
{
	assert_true(pool->count < MAX_ARRAYS);
	return pool->arrays[pool->count++] = array;
}

static double *random_array(struct pool *pool, int64_t count)
{
	return keep(pool, random_doubles(&pool->random, count, 1));
}

/* A gradient's destination: NaN wherever it is not overwritten. */
static double *poisoned(struct pool *pool, int64_t count)
{
	double *array = keep(pool, new_doubles(count));

	for (int64_t i = 0; i < count; i++)
		array[i] = NAN;
	return array;
}

static void free_pool(struct pool *pool)
{
	while (pool->count > 0)
		free(pool->arrays[--pool->count]);
}

static double dot(int64_t count, const double *a, const double *b)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += a[i] * b[i];
	return sum;
}

/* The gradient of loss(problem) with respect to input [count], which the problem points to. */
static void check(const char *name, double (*loss)(void *problem), void *problem,
                  const double *input, const double *gradient, int64_t count)
{
	double *differences = new_doubles(count);
	double *x = (double *)input;

	for (int64_t i = 0; i < count; i++) {
		double value = x[i];

		x[i] = value + step;
		double above = loss(problem);
		x[i] = value - step;
		double below = loss(problem);
		x[i] = value;
		differences[i] = (above - below) / (2 * step);
	}
	double error = relative_error(count, gradient, differences, 0);
	if (!(error <= allowed))
		fail_msg("%s: gradient differs from central differences by %.3g", name, error);
	free(differences);
}

struct attention_problem {
	struct reference_attention a;
	const double *dout;
	double *out;
};

static double attention_loss(void *problem)
{
	struct attention_problem *p = problem;
	const struct reference_attention *a = &p->a;

	assert_int_equal(reference_attention_forward(a, 0, NULL, p->out, NULL, NULL), STATUS_OK);
	return dot(a->batch * a->seq_len * a->n_heads * a->d_head, p->out, p->dout);
}

static void attention_case(struct reference_attention a, bool own, bool gated)
{
	struct pool pool = {.random = {7 + a.mask}};
	int64_t rows = a.batch * a.seq_len * a.n_heads, n = rows * a.d_head;
	int64_t n_q = a.batch * a.seq_len * a.q_heads * a.d_head;
	int64_t n_kv = a.batch * a.kv_len * a.n_heads * a.d_head;

	a.q = random_array(&pool, n_q);
	a.k = random_array(&pool, n_kv);
	a.v = random_array(&pool, n_kv);
	a.own_score = own ? random_array(&pool, rows) : NULL;
	a.own_value = own ? random_array(&pool, n) : NULL;
	a.gate = gated ? random_array(&pool, n) : NULL;
	struct attention_problem p = {a, random_array(&pool, n), poisoned(&pool, n)};
	struct reference_attention_grads grads = {poisoned(&pool, n_q),  poisoned(&pool, n_kv),
	                                          poisoned(&pool, n_kv), poisoned(&pool, n),
	                                          poisoned(&pool, rows), poisoned(&pool, n)};
	assert_int_equal(reference_attention_backward(&a, p.dout, &grads), STATUS_OK);
	check("attention dq", attention_loss, &p, a.q, grads.dq, n_q);
	check("attention dk", attention_loss, &p, a.k, grads.dk, n_kv);
	check("attention dv", attention_loss, &p, a.v, grads.dv, n_kv);
	if (gated)
		check("attention dgate", attention_loss, &p, a.gate, grads.dgate, n);
	if (own) {
		check("attention down_score", attention_loss, &p, a.own_score, grads.down_score,
		      rows);
		check("attention down_value", attention_loss, &p, a.own_value, grads.down_value, n);
	}
	free_pool(&pool);
}

static void attention_gradients(void **state)
{
	struct reference_attention a = {.batch = 2,
	                                .n_heads = 2,
	                                .q_heads = 2,
	                                .d_head = 3,
	                                .seq_len = 13,
	                                .kv_len = 13,
	                                .window = 4,
	                                .chunk = 4,
	                                .scale = 0.6};

	(void)state;
	a.mask = MASK_CAUSAL;
	attention_case(a, false, false);
	attention_case(a, false, true);
	a.mask = MASK_WINDOW;
	attention_case(a, false, false);
	a.window = 40;
	attention_case(a, true, false);
	a.mask = MASK_FULL;
	a.kv_len = 10;
	attention_case(a, false, false);
	a.mask = MASK_CHUNK;
	a.n_heads = 4;
	a.kv_len = 4;
	attention_case(a, true, true);
	a.q_heads = 1;
	attention_case(a, true, false);
}

struct rat_problem {
	struct reference_rat_scan s;
	struct reference_rat_scan_out out;
	struct reference_rat_scan_grads grads;
};

static double rat_loss(void *problem)
{
	struct rat_problem *p = problem;
	const struct reference_rat_scan *s = &p->s;
	int64_t tokens = s->batch * s->seq_len, width = s->n_heads * s->d_head;
	int64_t chunks = s->batch * ((s->seq_len + s->chunk - 1) / s->chunk);

	assert_int_equal(reference_rat_scan_forward(s, &p->out), STATUS_OK);
	return dot(tokens * width, p->out.v_scan, p->grads.dv_scan) +
	       dot(tokens * s->n_heads, p->out.own_score, p->grads.down_score) +
	       dot(tokens * s->groups * s->d_head, p->out.q_out, p->grads.dq_out) +
	       dot(chunks * width, p->out.k_chunk, p->grads.dk_chunk) +
	       dot(chunks * width, p->out.v_chunk, p->grads.dv_chunk);
}

static void rat_case(int64_t seq_len, int64_t chunk, int64_t groups, bool rope)
{
	enum { B = 2, H = 4, D = 2 };
	struct pool pool = {.random = {(uint64_t)(seq_len + chunk)}};
	int64_t n = B * seq_len * H * D, n_q = B * seq_len * groups * D;
	int64_t n_chunks = B * ((seq_len + chunk - 1) / chunk) * H * D;
	struct rat_problem p = {
	        .s = {B, seq_len, H, groups, D, chunk, rope, 0.7, random_array(&pool, n),
	              random_array(&pool, n), random_array(&pool, n_q), random_array(&pool, n_q),
	              random_array(&pool, H * D)},
	        .out = {.v_scan = poisoned(&pool, n),
	                .own_score = poisoned(&pool, B * seq_len * H),
	                .q_out = poisoned(&pool, n_q),
	                .k_chunk = poisoned(&pool, n_chunks),
	                .v_chunk = poisoned(&pool, n_chunks)},
	        .grads = {random_array(&pool, n), random_array(&pool, B * seq_len * H),
	                  random_array(&pool, n_q), random_array(&pool, n_chunks),
	                  random_array(&pool, n_chunks), poisoned(&pool, n), poisoned(&pool, n),
	                  poisoned(&pool, n_q), poisoned(&pool, n_q), poisoned(&pool, H * D)}};

	assert_int_equal(reference_rat_scan_backward(&p.s, &p.grads), STATUS_OK);
	check("rat_scan dv", rat_loss, &p, p.s.v, p.grads.dv, n);
	check("rat_scan dgate", rat_loss, &p, p.s.gate, p.grads.dgate, n);
	check("rat_scan dq", rat_loss, &p, p.s.q, p.grads.dq, n_q);
	check("rat_scan dk", rat_loss, &p, p.s.k, p.grads.dk, n_q);
	check("rat_scan dgate_bias", rat_loss, &p, p.s.gate_bias, p.grads.dgate_bias, H * D);
	free_pool(&pool);
}

static void rat_gradients(void **state)
{
	(void)state;
	rat_case(11, 4, 2, true);
	rat_case(11, 4, 4, false);
	rat_case(7, 1, 2, true);
	rat_case(6, 6, 1, true);
}

struct recurrence_problem {
	struct reference_recurrence r;
	const double *dout;
	double *out;
};

static double recurrence_loss(void *problem)
{
	struct recurrence_problem *p = problem;

	reference_recurrence_forward(&p->r, p->out, NULL, NULL);
	return dot(p->r.batch * p->r.seq_len * p->r.d_model, p->out, p->dout);
}

static void recurrence_case(enum gate_form form, bool z, bool bias, bool h0)
{
	enum { B = 2, T = 9, D = 3, N = B * T * D };
	struct pool pool = {.random = {11}};
	struct reference_recurrence r = {B,
	                                 T,
	                                 D,
	                                 form,
	                                 random_array(&pool, N),
	                                 random_array(&pool, N),
	                                 z ? random_array(&pool, N) : NULL,
	                                 bias ? random_array(&pool, D) : NULL,
	                                 h0 ? random_array(&pool, B * D) : NULL};
	struct recurrence_problem p = {r, random_array(&pool, N), poisoned(&pool, N)};
	struct reference_recurrence_grads grads = {poisoned(&pool, N), poisoned(&pool, N),
	                                           poisoned(&pool, N), poisoned(&pool, D),
	                                           poisoned(&pool, B * D)};

	assert_int_equal(reference_recurrence_backward(&r, p.dout, &grads), STATUS_OK);
	check("recurrence dx", recurrence_loss, &p, r.x, grads.dx, N);
	check("recurrence dgate", recurrence_loss, &p, r.gate, grads.dgate, N);
	if (z)
		check("recurrence dz", recurrence_loss, &p, r.z, grads.dz, N);
	if (bias)
		check("recurrence dgate_bias", recurrence_loss, &p, r.gate_bias, grads.dgate_bias,
		      D);
	if (h0)
		check("recurrence dh0", recurrence_loss, &p, r.h0, grads.dh0, B * D);
	free_pool(&pool);
}

static void recurrence_gradients(void **state)
{
	(void)state;
	recurrence_case(GATE_SIGMOID, true, true, true);
	recurrence_case(GATE_SIGMOID, false, false, false);
	recurrence_case(GATE_LOG_DECAY, false, false, true);
	recurrence_case(GATE_LOG_DECAY, true, false, false);
}

struct matrix_problem {
	struct reference_matrix m;
	const double *dout;
	double *out;
};

static double matrix_loss(void *problem)
{
	struct matrix_problem *p = problem;
	const struct reference_matrix *m = &p->m;

	assert_int_equal(reference_matrix_forward(m, p->out, NULL), STATUS_OK);
	return dot(m->batch * m->seq_len * m->n_heads * m->d_v, p->out, p->dout);
}

/* Log decays have to stay below zero. */
static double *random_decays(struct pool *pool, int64_t count)
{
	double *decays = random_array(pool, count);

	for (int64_t i = 0; i < count; i++)
		decays[i] = -fabs(decays[i]) - 0.01;
	return decays;
}

static void matrix_case(enum decay decay, enum rule rule, bool h0)
{
	/* T is neither a square nor a multiple of the segments that the backward pass cuts. */
	enum { B = 2, T = 11, H = 2, K = 3, V = 4, ROWS = B * T * H };
	struct pool pool = {.random = {(uint64_t)(100 + decay * 10 + rule)}};
	int64_t n_decay = decay == DECAY_DIAGONAL ? ROWS * K : ROWS;
	bool data_dependent = decay == DECAY_DIAGONAL || decay == DECAY_SCALAR;
	struct reference_matrix m = {
	        .batch = B,
	        .seq_len = T,
	        .n_heads = H,
	        .d_k = K,
	        .d_v = V,
	        .decay = decay,
	        .rule = rule,
	        .scale = 0.8,
	        .q = random_array(&pool, ROWS * K),
	        .k = random_array(&pool, ROWS * K),
	        .v = random_array(&pool, ROWS * V),
	        .log_decay = data_dependent ? random_decays(&pool, n_decay) : NULL,
	        .bonus = rule == RULE_BONUS ? random_array(&pool, H * K) : NULL,
	        .beta = rule == RULE_DELTA ? random_array(&pool, ROWS) : NULL,
	        .h0 = h0 ? random_array(&pool, B * H * K * V) : NULL};
	struct matrix_problem p = {m, random_array(&pool, ROWS * V), poisoned(&pool, ROWS * V)};
	struct reference_matrix_grads grads = {
	        poisoned(&pool, ROWS * K),     poisoned(&pool, ROWS * K), poisoned(&pool, ROWS * V),
	        poisoned(&pool, n_decay),      poisoned(&pool, H * K),    poisoned(&pool, ROWS),
	        poisoned(&pool, B * H * K * V)};

	/* Contracting keys: a delta rule with long ones grows without bound. */
	for (int64_t i = 0; rule == RULE_DELTA && i < ROWS * K; i++)
		((double *)m.k)[i] *= 0.3;
	assert_int_equal(reference_matrix_backward(&m, p.dout, &grads), STATUS_OK);
	check("matrix dq", matrix_loss, &p, m.q, grads.dq, ROWS * K);
	check("matrix dk", matrix_loss, &p, m.k, grads.dk, ROWS * K);
	check("matrix dv", matrix_loss, &p, m.v, grads.dv, ROWS * V);
	if (data_dependent)
		check("matrix dlog_decay", matrix_loss, &p, m.log_decay, grads.dlog_decay, n_decay);
	if (rule == RULE_BONUS)
		check("matrix dbonus", matrix_loss, &p, m.bonus, grads.dbonus, H * K);
	if (rule == RULE_DELTA)
		check("matrix dbeta", matrix_loss, &p, m.beta, grads.dbeta, ROWS);
	if (h0)
		check("matrix dh0", matrix_loss, &p, m.h0, grads.dh0, B * H * K * V);
	free_pool(&pool);
}

static void matrix_gradients(void **state)
{
	(void)state;
	for (int decay = DECAY_NONE; decay <= DECAY_DIAGONAL; decay++)
		for (int rule = RULE_PLAIN; rule <= RULE_DELTA; rule++)
			for (int h0 = 0; h0 < 2; h0++)
				matrix_case((enum decay)decay, (enum rule)rule, h0 == 1);
}

struct conv_problem {
	struct reference_conv c;
	const double *dout;
	double *out;
};

static double conv_loss(void *problem)
{
	struct conv_problem *p = problem;

	reference_short_conv(&p->c, p->out, NULL);
	return dot(p->c.batch * p->c.seq_len * p->c.n_readers * p->c.channels, p->out, p->dout);
}

static void short_conv_gradients(void **state)
{
	enum { B = 2, T = 7, C = 3, N = B * T * C };

	(void)state;
	for (int64_t readers = 1; readers <= 2; readers++) {
		struct pool pool = {.random = {41}};
		struct conv_problem p = {.c = {.batch = B,
		                               .seq_len = T,
		                               .channels = C,
		                               .n_readers = readers,
		                               .x = random_array(&pool, N),
		                               .weight = random_array(&pool, C * CONV_WIDTH),
		                               .bias = random_array(&pool, C)},
		                         .dout = random_array(&pool, readers * N),
		                         .out = poisoned(&pool, readers * N)};
		double *dx = poisoned(&pool, N), *dweight = poisoned(&pool, C * CONV_WIDTH);
		double *dbias = poisoned(&pool, C);

		reference_short_conv_backward(&p.c, p.dout, dx, dweight, dbias);
		check("short_conv dx", conv_loss, &p, p.c.x, dx, N);
		check("short_conv dweight", conv_loss, &p, p.c.weight, dweight, C * CONV_WIDTH);
		check("short_conv dbias", conv_loss, &p, p.c.bias, dbias, C);
		free_pool(&pool);
	}
}

enum { STEP_N = 5, STEP_H = 2, STEP_D = 3, STEP_ROWS = STEP_N * STEP_H };

struct time_step_problem {
	const double *logit, *bias, *log_rate, *x, *dlog_decay, *dout;
	double *log_decay, *out;
};

static double time_step_loss(void *problem)
{
	struct time_step_problem *p = problem;

	reference_time_step(STEP_N, STEP_H, STEP_D, p->logit, p->bias, p->log_rate, p->x,
	                    p->log_decay, p->out);
	return dot(STEP_ROWS, p->log_decay, p->dlog_decay) +
	       dot(STEP_ROWS * STEP_D, p->out, p->dout);
}

static void time_step_gradients(void **state)
{
	struct pool pool = {.random = {42}};
	struct time_step_problem p = {.logit = random_array(&pool, STEP_ROWS),
	                              .bias = random_array(&pool, STEP_H),
	                              .log_rate = random_array(&pool, STEP_H),
	                              .x = random_array(&pool, STEP_ROWS * STEP_D),
	                              .dlog_decay = random_array(&pool, STEP_ROWS),
	                              .dout = random_array(&pool, STEP_ROWS * STEP_D),
	                              .log_decay = poisoned(&pool, STEP_ROWS),
	                              .out = poisoned(&pool, STEP_ROWS * STEP_D)};
	double *dlogit = poisoned(&pool, STEP_ROWS), *dbias = poisoned(&pool, STEP_H);
	double *dlog_rate = poisoned(&pool, STEP_H), *dx = poisoned(&pool, STEP_ROWS * STEP_D);

	(void)state;
	reference_time_step_backward(STEP_N, STEP_H, STEP_D, p.logit, p.bias, p.log_rate, p.x,
	                             p.dlog_decay, p.dout, dlogit, dbias, dlog_rate, dx);
	check("time_step dlogit", time_step_loss, &p, p.logit, dlogit, STEP_ROWS);
	check("time_step dbias", time_step_loss, &p, p.bias, dbias, STEP_H);
	check("time_step dlog_rate", time_step_loss, &p, p.log_rate, dlog_rate, STEP_H);
	check("time_step dx", time_step_loss, &p, p.x, dx, STEP_ROWS * STEP_D);
	free_pool(&pool);
}

enum { FORGET_N = 6, FORGET_W = 4, FORGET_COUNT = FORGET_N * FORGET_W };

struct forget_problem {
	const double *logit, *bound, *x, *dlog_decay, *dkey, *dout;
	double *log_decay, *key, *out;
};

static double forget_loss(void *problem)
{
	struct forget_problem *p = problem;

	reference_forget_gate(FORGET_N, FORGET_W, p->logit, p->bound, p->x, p->log_decay, p->key,
	                      p->out);
	return dot(FORGET_COUNT, p->log_decay, p->dlog_decay) + dot(FORGET_COUNT, p->out, p->dout) +
	       (p->key ? dot(FORGET_COUNT, p->key, p->dkey) : 0);
}

static void forget_gate_gradients(void **state)
{
	(void)state;
	for (int key = 0; key < 2; key++) {
		struct pool pool = {.random = {43}};
		struct forget_problem p = {.logit = random_array(&pool, FORGET_COUNT),
		                           .bound = random_array(&pool, FORGET_W),
		                           .x = random_array(&pool, FORGET_COUNT),
		                           .dlog_decay = random_array(&pool, FORGET_COUNT),
		                           .dkey = key ? random_array(&pool, FORGET_COUNT) : NULL,
		                           .dout = random_array(&pool, FORGET_COUNT),
		                           .log_decay = poisoned(&pool, FORGET_COUNT),
		                           .key = key ? poisoned(&pool, FORGET_COUNT) : NULL,
		                           .out = poisoned(&pool, FORGET_COUNT)};
		double *dlogit = poisoned(&pool, FORGET_COUNT), *dbound = poisoned(&pool, FORGET_W);
		double *dx = poisoned(&pool, FORGET_COUNT);

		reference_forget_gate_backward(FORGET_N, FORGET_W, p.logit, p.bound, p.x,
		                               p.dlog_decay, p.dkey, p.dout, dlogit, dbound, dx);
		check("forget_gate dlogit", forget_loss, &p, p.logit, dlogit, FORGET_COUNT);
		check("forget_gate dbound", forget_loss, &p, p.bound, dbound, FORGET_W);
		check("forget_gate dx", forget_loss, &p, p.x, dx, FORGET_COUNT);
		free_pool(&pool);
	}
}

struct gate_norm_problem {
	struct reference_gate_norm g;
	const double *dout;
	double *out;
};

static double gate_norm_loss(void *problem)
{
	struct gate_norm_problem *p = problem;

	assert_int_equal(reference_gate_norm(&p->g, p->out, NULL), STATUS_OK);
	return dot(p->g.n * p->g.n_heads * p->g.d_head, p->out, p->dout);
}

static void gate_norm_case(bool skip, bool gate, int64_t groups)
{
	enum { N = 4, H = 2, D = 3, COUNT = N * H * D };
	struct pool pool = {.random = {44}};
	struct gate_norm_problem p = {.g = {N, H, D, groups, 0.1, random_array(&pool, COUNT),
	                                    skip ? random_array(&pool, COUNT) : NULL,
	                                    skip ? random_array(&pool, H) : NULL,
	                                    gate ? random_array(&pool, COUNT) : NULL,
	                                    random_array(&pool, H * D / groups)},
	                              .dout = random_array(&pool, COUNT),
	                              .out = poisoned(&pool, COUNT)};
	const struct reference_gate_norm_grads grads = {
	        poisoned(&pool, COUNT), poisoned(&pool, COUNT), poisoned(&pool, H),
	        poisoned(&pool, COUNT), poisoned(&pool, H * D / groups)};

	assert_int_equal(reference_gate_norm_backward(&p.g, p.dout, &grads), STATUS_OK);
	check("gate_norm dx", gate_norm_loss, &p, p.g.x, grads.dx, COUNT);
	check("gate_norm dweight", gate_norm_loss, &p, p.g.weight, grads.dweight, H * D / groups);
	if (skip) {
		check("gate_norm dskip", gate_norm_loss, &p, p.g.skip, grads.dskip, COUNT);
		check("gate_norm dskip_weight", gate_norm_loss, &p, p.g.skip_weight,
		      grads.dskip_weight, H);
	}
	if (gate)
		check("gate_norm dgate", gate_norm_loss, &p, p.g.gate, grads.dgate, COUNT);
	free_pool(&pool);
}

static void gate_norm_gradients(void **state)
{
	(void)state;
	for (int64_t groups = 1; groups <= 2; groups++)
		for (int i = 0; i < 4; i++)
			gate_norm_case(i & 1, i & 2, groups);
}

/* Functions of x, a weight and perhaps a bias or gate, on N rows. */
struct dense_problem {
	int64_t n, d_in, d_out;
	const double *x, *weight, *other, *dy;
	const int32_t *tokens;
	double *y;
};

static double linear_loss(void *problem)
{
	struct dense_problem *p = problem;

	reference_linear(p->n, p->d_in, p->d_out, p->x, p->weight, p->y);
	return dot(p->n * p->d_out, p->y, p->dy);
}

static double rms_norm_loss(void *problem)
{
	struct dense_problem *p = problem;

	reference_rms_norm(p->n, p->d_in, 0.1, p->x, p->weight, p->y, NULL);
	return dot(p->n * p->d_in, p->y, p->dy);
}

static double decay_gate_loss(void *problem)
{
	struct dense_problem *p = problem;

	reference_decay_gate(p->n, p->d_in, p->d_out, 16, p->x, p->weight, p->other, p->y);
	return dot(p->n * p->d_out, p->y, p->dy);
}

static double norm_gate_loss(void *problem)
{
	struct dense_problem *p = problem;

	reference_norm_gate(p->n / 2, 2, p->d_in, 0.1, p->x, p->weight, p->other, p->y, NULL);
	return dot(p->n * p->d_in, p->y, p->dy);
}

static double gelu_loss(void *problem)
{
	struct dense_problem *p = problem;

	reference_gelu(p->n, p->x, p->y);
	return dot(p->n, p->y, p->dy);
}

static double embedding_loss(void *problem)
{
	struct dense_problem *p = problem;

	reference_embedding(p->n, p->d_out, p->tokens, p->weight, p->y);
	return dot(p->n * p->d_out, p->y, p->dy);
}

static double cross_entropy_loss(void *problem)
{
	struct dense_problem *p = problem;

	return reference_cross_entropy(p->n, p->d_in, p->x, p->tokens, NULL);
}

static void linear_gradients(void **state)
{
	enum { N = 7, IN = 5, OUT = 4 };
	struct pool pool = {.random = {21}};
	struct dense_problem p = {.n = N,
	                          .d_in = IN,
	                          .d_out = OUT,
	                          .x = random_array(&pool, N * IN),
	                          .weight = random_array(&pool, OUT * IN),
	                          .other = random_array(&pool, OUT),
	                          .dy = random_array(&pool, N * OUT),
	                          .y = poisoned(&pool, N * OUT)};
	double *dx = poisoned(&pool, N * IN), *dweight = poisoned(&pool, OUT * IN);
	double *dbias = poisoned(&pool, OUT);

	(void)state;
	reference_linear_backward(N, IN, OUT, p.x, p.weight, p.dy, dx, dweight);
	check("linear dx", linear_loss, &p, p.x, dx, N * IN);
	check("linear dweight", linear_loss, &p, p.weight, dweight, OUT * IN);
	assert_int_equal(reference_decay_gate_backward(N, IN, OUT, 16, p.x, p.weight, p.other, p.dy,
	                                               dx, dweight, dbias),
	                 STATUS_OK);
	check("decay_gate dx", decay_gate_loss, &p, p.x, dx, N * IN);
	check("decay_gate dweight", decay_gate_loss, &p, p.weight, dweight, OUT * IN);
	check("decay_gate dbias", decay_gate_loss, &p, p.other, dbias, OUT);
	free_pool(&pool);
}

static void norm_gradients(void **state)
{
	enum { N = 6, D = 5 };
	struct pool pool = {.random = {22}};
	struct dense_problem p = {.n = N,
	                          .d_in = D,
	                          .x = random_array(&pool, N * D),
	                          .weight = random_array(&pool, D),
	                          .other = random_array(&pool, N * D),
	                          .dy = random_array(&pool, N * D),
	                          .y = poisoned(&pool, N * D)};
	double *dx = poisoned(&pool, N * D), *dweight = poisoned(&pool, D);
	double *dgate = poisoned(&pool, N * D);

	(void)state;
	reference_rms_norm_backward(N, D, 0.1, p.x, p.weight, p.dy, dx, dweight);
	check("rms_norm dx", rms_norm_loss, &p, p.x, dx, N * D);
	check("rms_norm dweight", rms_norm_loss, &p, p.weight, dweight, D);
	assert_int_equal(reference_norm_gate_backward(N / 2, 2, D, 0.1, p.x, p.weight, p.other,
	                                              p.dy, dx, dgate, dweight),
	                 STATUS_OK);
	check("norm_gate dx", norm_gate_loss, &p, p.x, dx, N * D);
	check("norm_gate dgate", norm_gate_loss, &p, p.other, dgate, N * D);
	check("norm_gate dweight", norm_gate_loss, &p, p.weight, dweight, D);
	free_pool(&pool);
}

static void model_gradients(void **state)
{
	enum { N = 9, V = 6, D = 3 };
	static const int32_t tokens[N] = {3, 0, 3, 5, 1, 1, 3, 2, 0};
	static const int32_t targets[N] = {3, -1, 3, 5, 1, -1, 3, 2, 0};
	struct pool pool = {.random = {23}};
	struct dense_problem p = {.n = N,
	                          .d_in = V,
	                          .d_out = D,
	                          .x = random_array(&pool, N * V),
	                          .weight = random_array(&pool, V * D),
	                          .dy = random_array(&pool, N * V),
	                          .tokens = tokens,
	                          .y = poisoned(&pool, N * V)};
	double *dtable = poisoned(&pool, V * D), *dx = poisoned(&pool, N * V);

	(void)state;
	reference_embedding_backward(N, V, D, tokens, p.dy, dtable);
	check("embedding dtable", embedding_loss, &p, p.weight, dtable, V * D);
	p.tokens = targets;
	reference_cross_entropy(N, V, p.x, targets, dx);
	check("cross_entropy dlogits", cross_entropy_loss, &p, p.x, dx, N * V);
	p.n = N * V;
	reference_gelu_backward(N * V, p.x, p.dy, dx);
	check("gelu dx", gelu_loss, &p, p.x, dx, N * V);
	free_pool(&pool);
}

/* A rotation is orthogonal: rotating back undoes it, and the length stays. */
static void rotation_inverts(void **state)
{
	enum { B = 2, T = 9, H = 3, D = 8, N = B * T * H * D };
	struct pool pool = {.random = {24}};
	double *x = random_array(&pool, N), *y = poisoned(&pool, N), *back = poisoned(&pool, N);

	(void)state;
	reference_rotate(B, T, H, D, 5, 2, x, y);
	assert_true(relative_error(N, y, x, 0) > 0.1);
	assert_true(fabs(dot(N, y, y) / dot(N, x, x) - 1) < 1e-12);
	reference_rotate_backward(B, T, H, D, 5, 2, y, back);
	assert_true(relative_error(N, back, x, 0) < 1e-14);
	free_pool(&pool);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(attention_gradients),   cmocka_unit_test(rat_gradients),
	        cmocka_unit_test(recurrence_gradients),  cmocka_unit_test(matrix_gradients),
	        cmocka_unit_test(linear_gradients),      cmocka_unit_test(norm_gradients),
	        cmocka_unit_test(short_conv_gradients),  cmocka_unit_test(time_step_gradients),
	        cmocka_unit_test(forget_gate_gradients), cmocka_unit_test(gate_norm_gradients),
	        cmocka_unit_test(model_gradients),       cmocka_unit_test(rotation_inverts),
	};

	/* The cases are tiny: waking a second thread would cost more than it does. */
	omp_set_num_threads(1);
	return cmocka_run_group_tests_name("gradients", tests, NULL, NULL);
}
