/* Cases of the matrix-state recurrence. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/operations.h"

/* A matrix recurrence's tensors and sizes. */
struct matrix_trial {
	struct matrix_recurrence_args args;
	struct reference_matrix reference;
	int64_t rows; /* B*T*H */
	bool shared;  /* q and k are those of all heads */
	struct tensor *q, *k, *v, *log_decay, *bonus, *beta, *h0, *out, *final_state;
};

/* Log decays that hardly decay, that wipe the state out (-20), or both in one tensor. */
static struct tensor *any_decay(struct trial *trial, int64_t batch, int64_t seq_len,
                                int64_t n_heads, int64_t width)
{
	int64_t count = batch * seq_len * n_heads * width;
	int64_t kind = random_integer(&trial->random, 0, 3);
	double *values = trial_doubles(trial, count);

	for (int64_t i = 0; i < count; i++) {
		double weak = random_uniform(&trial->random, -0.1, 0);
		double strong = random_uniform(&trial->random, -20, 0);
		bool is_strong = kind == 1 || (kind == 2 && random_bool(&trial->random));

		values[i] = kind == 3 ? -20 * (double)random_bool(&trial->random)
		                      : (is_strong ? strong : weak);
	}
	return trial_input_values(trial, batch, seq_len, n_heads, width, values);
}

/* Keys; of unit length for a delta rule, which long ones would make grow without bound. */
static struct tensor *any_keys(struct trial *trial, const struct matrix_recurrence_args *a)
{
	int64_t rows = a->batch * a->seq_len * a->n_heads;
	double *values = random_doubles(&trial->random, rows * a->d_k, 1);
	struct tensor *keys;

	for (int64_t row = 0; a->rule == RULE_DELTA && row < rows; row++) {
		double sum = 0;

		for (int64_t i = 0; i < a->d_k; i++)
			sum += values[row * a->d_k + i] * values[row * a->d_k + i];
		for (int64_t i = 0; i < a->d_k; i++)
			values[row * a->d_k + i] /= sqrt(sum);
	}
	keys = trial_input_values(trial, a->batch, a->seq_len, a->n_heads, a->d_k, values);
	free(values);
	return keys;
}

static struct tensor *any_beta(struct trial *trial, const struct matrix_recurrence_args *a)
{
	int64_t rows = a->batch * a->seq_len * a->n_heads;
	double *values = trial_doubles(trial, rows);

	for (int64_t i = 0; i < rows; i++)
		values[i] = random_uniform(&trial->random, 0, 1);
	return trial_input_values(trial, a->batch, a->seq_len, a->n_heads, 1, values);
}

static void any_matrix_inputs(struct trial *trial, struct matrix_trial *x)
{
	struct matrix_recurrence_args *a = &x->args;

	x->shared =
	        a->decay == DECAY_SCALAR && a->rule == RULE_PLAIN && random_bool(&trial->random);
	if (x->shared) {
		x->q = trial_input(trial, a->batch, a->seq_len, 1, a->d_k, 1);
		x->k = trial_input(trial, a->batch, a->seq_len, 1, a->d_k, 1);
	} else {
		x->q = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_k, 1);
		x->k = any_keys(trial, a);
	}
	x->v = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_v, 1);
	if (a->decay == DECAY_SCALAR || a->decay == DECAY_DIAGONAL)
		x->log_decay = any_decay(trial, a->batch, a->seq_len, a->n_heads,
		                         a->decay == DECAY_DIAGONAL ? a->d_k : 1);
	if (a->rule == RULE_BONUS)
		x->bonus = trial_flat_input(trial, DTYPE_F32, a->n_heads, a->d_k, 1);
	if (a->rule == RULE_DELTA)
		x->beta = any_beta(trial, a);
	if (random_bool(&trial->random))
		x->h0 = trial_flat_input(trial, DTYPE_F32, a->batch * a->n_heads, a->d_k * a->d_v,
		                         1);
}

/* Sizes, and every decay with every rule. What is chunkwise on tensor cores cuts wide heads into
 * slices and long sequences into segments, so these come now and then. */
static void any_matrix_shape(struct trial *trial, struct matrix_recurrence_args *a, int64_t longest)
{
	static const int64_t widths[] = {8, 40, 64, 72, 128, 136, 256};
	static const int64_t chunks[] = {0, 16, 32, 64, 128, 256};
	struct random *random = &trial->random;

	a->batch = random_integer(random, 1, 3);
	a->seq_len = any_length(trial, longest);
	a->n_heads = random_integer(random, 1, 4);
	a->d_k = trial->narrow ? any_head(trial) : any_width(trial, 70);
	a->d_v = trial->narrow ? any_head(trial) : any_width(trial, 140);
	a->decay = (enum decay)random_integer(random, DECAY_NONE, DECAY_DIAGONAL);
	a->rule = (enum rule)random_integer(random, RULE_PLAIN, RULE_DELTA);
	if (random_integer(random, 0, 3) == 0) { /* gated linear attention, more often */
		a->decay = DECAY_DIAGONAL;
		a->rule = RULE_PLAIN;
	}
	if (random_integer(random, 0, 3) == 0)
		a->rule = RULE_PLAIN;
	a->chunk = random_integer(random, 0, random_bool(random) ? 70 : 2 * a->seq_len);
	if (trial->narrow && random_bool(random))
		a->chunk = random_choice(random, chunks, 6);
	if (trial->narrow && random_integer(random, 0, 3) == 0) {
		a->d_k = random_choice(random, widths, 7);
		a->d_v = random_choice(random, widths, 7);
	}
	if (trial->narrow && longest > 1 && random_integer(random, 0, 9) == 0) {
		a->batch = 1;
		a->seq_len = random_integer(random, 150, 1400);
	}
	if (random_integer(random, 0, 9) == 0) /* the parallel form */
		a->chunk = a->seq_len;
	a->scale = (float)(1 / sqrt((double)a->d_k));
}

/* q or k as the operation sees it: without a stride between heads if they share it. */
static struct view row_view(const struct matrix_trial *x, const struct tensor *tensor)
{
	struct view view = view_of(tensor);

	view.head = x->shared ? 0 : view.head;
	return view;
}

/* Its values, one row per head. */
static const double *row_values(struct trial *trial, const struct matrix_trial *x,
                                const struct tensor *tensor)
{
	int64_t d = x->args.d_k, heads = x->args.n_heads;
	int64_t rows = x->args.batch * x->args.seq_len * heads;
	double *values;

	if (!x->shared)
		return tensor->values;
	values = trial_doubles(trial, rows * d);
	for (int64_t row = 0; row < rows; row++)
		memcpy(values + row * d, tensor->values + row / heads * d,
		       (size_t)d * sizeof *values);
	return values;
}

static void matrix_reference(struct trial *trial, struct matrix_trial *x)
{
	const struct matrix_recurrence_args *a = &x->args;

	x->reference = (struct reference_matrix){.batch = a->batch,
	                                         .seq_len = a->seq_len,
	                                         .n_heads = a->n_heads,
	                                         .d_k = a->d_k,
	                                         .d_v = a->d_v,
	                                         .decay = a->decay,
	                                         .rule = a->rule,
	                                         .scale = a->scale,
	                                         .q = row_values(trial, x, x->q),
	                                         .k = row_values(trial, x, x->k),
	                                         .v = values_of(x->v),
	                                         .log_decay = values_of(x->log_decay),
	                                         .bonus = values_of(x->bonus),
	                                         .beta = values_of(x->beta),
	                                         .h0 = values_of(x->h0)};
}

static struct matrix_trial new_matrix(struct trial *trial)
{
	struct matrix_trial x = {0};
	struct matrix_recurrence_args *a = &x.args;

	any_matrix_shape(trial, a, 150);
	any_matrix_inputs(trial, &x);
	x.rows = a->batch * a->seq_len * a->n_heads;
	x.out = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_v);
	if (random_bool(&trial->random))
		x.final_state =
		        trial_flat_output(trial, DTYPE_F32, a->batch * a->n_heads, a->d_k * a->d_v);
	trial_describe(trial,
	               "%s decay, %s rule, B %ld, T %ld, H %ld, %ld x %ld, chunk %ld, h0 %d, "
	               "shared %d",
	               decay_name(a->decay), rule_name(a->rule), (long)a->batch, (long)a->seq_len,
	               (long)a->n_heads, (long)a->d_k, (long)a->d_v, (long)a->chunk, x.h0 != NULL,
	               x.shared);
	a->q = row_view(&x, x.q);
	a->k = row_view(&x, x.k);
	a->v = view_of(x.v);
	a->log_decay = view_of(x.log_decay);
	a->bonus = data_of(x.bonus);
	a->beta = view_of(x.beta);
	a->h0 = data_of(x.h0);
	a->out = view_of(x.out);
	a->final_state = data_of(x.final_state);
	matrix_reference(trial, &x);
	return x;
}

/* Rows by themselves are those of the whole sequence. */
static void check_rows(const struct matrix_trial *x, const double *out)
{
	const struct matrix_recurrence_args *a = &x->args;
	const int64_t rows[] = {0, (a->batch * a->seq_len) / 2, a->batch * a->seq_len - 1};
	const int64_t width = a->n_heads * a->d_v;
	double *alone = new_doubles(3 * width);

	assert_int_equal(reference_matrix_rows(&x->reference, 3, rows, alone), STATUS_OK);
	for (int i = 0; i < 3; i++)
		assert_true(relative_error(width, alone + i * width, out + rows[i] * width, 0) <
		            1e-9);
	free(alone);
}

static bool run_matrix(struct trial *trial, struct matrix_trial *x)
{
	const struct matrix_recurrence_args *a = &x->args;
	double *out = trial_doubles(trial, x->rows * a->d_v);
	double *final_state = trial_doubles(trial, a->batch * a->n_heads * a->d_k * a->d_v);

	if (reference_matrix_forward(&x->reference, out, final_state) != STATUS_OK)
		return false;
	if (a->rule != RULE_DELTA && !trial->with_nan)
		check_rows(x, out);
	if (!trial_run(trial, OP_MATRIX_RECURRENCE, a))
		return false;
	trial_check(trial, x->out, "out", out, trial->tolerance);
	if (x->final_state)
		trial_check(trial, x->final_state, "final_state", final_state, trial->tolerance);
	return true;
}

static bool matrix_case(struct trial *trial)
{
	struct matrix_trial x = new_matrix(trial);

	return run_matrix(trial, &x);
}

static bool matrix_backward_case(struct trial *trial)
{
	struct matrix_trial x = new_matrix(trial);
	const struct matrix_recurrence_args *a = &x.args;
	int64_t n_decay = x.log_decay ? x.log_decay->width : 0;
	int64_t size = a->d_k * a->d_v;
	struct tensor *dlog_decay = NULL, *dbeta = NULL, *dbonus = NULL, *dh0 = NULL;

	if (!run_matrix(trial, &x))
		return false;
	struct tensor *dout = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_v, 1);
	struct tensor *dq = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_k);
	struct tensor *dk = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_k);
	struct tensor *dv = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_v);
	if (x.log_decay)
		dlog_decay = trial_output(trial, a->batch, a->seq_len, a->n_heads, n_decay);
	if (x.beta)
		dbeta = trial_output(trial, a->batch, a->seq_len, a->n_heads, 1);
	if (x.bonus)
		dbonus = trial_flat_output(trial, DTYPE_F32, a->n_heads, a->d_k);
	if (random_bool(&trial->random))
		dh0 = trial_flat_output(trial, DTYPE_F32, a->batch * a->n_heads, size);
	struct reference_matrix_grads grads = {
	        .dq = trial_doubles(trial, x.rows * a->d_k),
	        .dk = trial_doubles(trial, x.rows * a->d_k),
	        .dv = trial_doubles(trial, x.rows * a->d_v),
	        .dlog_decay = trial_doubles(trial, x.rows * n_decay),
	        .dbonus = trial_doubles(trial, a->n_heads * a->d_k),
	        .dbeta = trial_doubles(trial, x.rows),
	        .dh0 = trial_doubles(trial, a->batch * a->n_heads * size)};
	if (reference_matrix_backward(&x.reference, dout->values, &grads) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_MATRIX_RECURRENCE_BACKWARD,
	               &(struct matrix_recurrence_backward_args){
	                       x.args, view_of(dout), view_of(dq), view_of(dk), view_of(dv),
	                       view_of(dlog_decay), view_of(dbeta), data_of(dbonus), data_of(dh0)}))
		return false;
	trial_check(trial, dq, "dq", grads.dq, trial->gradient_tolerance);
	trial_check(trial, dk, "dk", grads.dk, trial->gradient_tolerance);
	trial_check(trial, dv, "dv", grads.dv, trial->gradient_tolerance);
	if (dlog_decay)
		trial_check(trial, dlog_decay, "dlog_decay", grads.dlog_decay,
		            trial->gradient_tolerance);
	if (dbeta)
		trial_check(trial, dbeta, "dbeta", grads.dbeta, trial->gradient_tolerance);
	if (dbonus)
		trial_check(trial, dbonus, "dbonus", grads.dbonus, trial->gradient_tolerance);
	if (dh0)
		trial_check(trial, dh0, "dh0", grads.dh0, trial->gradient_tolerance);
	return true;
}

static bool matrix_step_case(struct trial *trial)
{
	struct matrix_trial x = {0};
	struct matrix_recurrence_args *a = &x.args;

	any_matrix_shape(trial, a, 1);
	any_matrix_inputs(trial, &x);
	int64_t size = a->batch * a->n_heads * a->d_k * a->d_v;
	struct tensor *state =
	        trial_flat_input(trial, DTYPE_F32, a->batch * a->n_heads, a->d_k * a->d_v, 1);
	struct tensor *out = trial_output(trial, a->batch, 1, a->n_heads, a->d_v);
	double *expected = trial_doubles(trial, a->batch * a->n_heads * a->d_v);
	double *after = trial_doubles(trial, size);

	trial_describe(trial, "%s decay, %s rule, B %ld, H %ld, %ld x %ld", decay_name(a->decay),
	               rule_name(a->rule), (long)a->batch, (long)a->n_heads, (long)a->d_k,
	               (long)a->d_v);
	matrix_reference(trial, &x);
	x.reference.h0 = state->values;
	if (reference_matrix_forward(&x.reference, expected, after) != STATUS_OK)
		return false;
	trial_expect_written(state);
	if (!trial_run(trial, OP_MATRIX_RECURRENCE_STEP,
	               &(struct matrix_recurrence_step_args){
	                       a->batch, a->n_heads, a->d_k, a->d_v, a->decay, a->rule, a->scale,
	                       row_view(&x, x.q), row_view(&x, x.k), view_of(x.v),
	                       view_of(x.log_decay), view_of(x.beta), data_of(x.bonus),
	                       data_of(state), view_of(out)}))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	trial_check(trial, state, "state", after, trial->tolerance);
	return true;
}

const struct operation_test matrix_tests[] = {
        {OP_MATRIX_RECURRENCE, 180, matrix_case},
        {OP_MATRIX_RECURRENCE_BACKWARD, 180, matrix_backward_case},
        {OP_MATRIX_RECURRENCE_STEP, 60, matrix_step_case},
        {0},
};
