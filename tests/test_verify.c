/* Verification itself: right runs pass with a small error, and each of many wrong ones is caught. A
 * mutant is a CPU backend of which one kernel spoils its result. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "tests/stacks.h"

enum { B = 2, T = 90, D = 48, N = B * T, MIN_ROWS = 1024 };

static const double allowed = 1e-4;

/* ---- mutants ---- */

/* Where an operation writes: rows of floats, `stride` apart. */
struct rows {
	float *data;
	int64_t n_rows, width, stride;
};

static struct rows rows_of_view(const struct view *view, int64_t batch, int64_t seq_len,
                                int64_t width)
{
	return (struct rows){view->data, batch * seq_len, width, view->token};
}

static struct rows attention_rows(const void *args)
{
	const struct attention_args *a = args;

	return rows_of_view(&a->out, a->batch, a->seq_len, a->n_heads * a->d_head);
}

static struct rows recurrence_rows(const void *args)
{
	const struct recurrence_args *a = args;

	return rows_of_view(&a->out, a->batch, a->seq_len, a->d_model);
}

static struct rows norm_gate_rows(const void *args)
{
	const struct norm_gate_args *a = args;
	int64_t width = a->n_heads * a->d_head;

	return (struct rows){a->out, a->n_tokens, width, width};
}

static struct rows residual_rows(const void *args)
{
	const struct linear_residual_args *a = args;

	return (struct rows){a->y, a->n_tokens, a->d_out, a->d_out};
}

static struct rows projection_rows(const void *args)
{
	const struct norm_linear_args *a = args;

	return (struct rows){a->y, a->n_tokens, a->d_out, a->d_out};
}

static struct rows dx_rows(const void *args)
{
	const struct norm_linear_backward_args *a = args;

	return (struct rows){a->dx, a->n_tokens, a->d_in, a->d_in};
}

static struct rows in_weight_rows(const void *args)
{
	const struct norm_linear_backward_args *a = args;

	return (struct rows){a->dweight, a->d_out, a->d_in, a->d_in};
}

static struct rows norm_weight_rows(const void *args)
{
	const struct norm_linear_backward_args *a = args;

	return (struct rows){a->dnorm_weight, 1, a->d_in, a->d_in};
}

static struct rows out_weight_rows(const void *args)
{
	const struct linear_residual_backward_args *a = args;

	return (struct rows){a->dweight, a->d_out, a->d_in, a->d_in};
}

static struct rows gate_bias_rows(const void *args)
{
	const struct rat_scan_backward_args *a = args;
	int64_t width = a->forward.n_heads * a->forward.d_head;

	return (struct rows){a->dgate_bias, 1, width, width};
}

static struct rows decay_weight_rows(const void *args)
{
	const struct decay_gate_backward_args *a = args;

	return (struct rows){a->dweight, a->forward.d_out, a->forward.rank, a->forward.rank};
}

static struct rows gate_norm_rows(const void *args)
{
	const struct gate_norm_args *a = args;
	int64_t width = a->n_heads * a->d_head;

	return (struct rows){a->out, a->n_tokens, width, width};
}

static struct rows matrix_out_rows(const void *args)
{
	const struct matrix_recurrence_args *a = args;

	return rows_of_view(&a->out, a->batch, a->seq_len, a->n_heads * a->d_v);
}

static struct rows conv_weight_rows(const void *args)
{
	const struct short_conv_backward_args *a = args;

	return (struct rows){a->dweight, a->forward.channels, CONV_WIDTH, CONV_WIDTH};
}

static struct rows bound_rows(const void *args)
{
	const struct forget_gate_backward_args *a = args;

	return (struct rows){a->dbound, 1, a->forward.width, a->forward.width};
}

static struct rows log_rate_rows(const void *args)
{
	const struct time_step_backward_args *a = args;

	return (struct rows){a->dlog_rate, 1, a->forward.n_heads, a->forward.n_heads};
}

static struct rows history_rows(const void *args)
{
	const struct short_conv_step_args *a = args;

	return (struct rows){a->history, a->batch * CONV_HISTORY, a->channels, a->channels};
}

static struct rows rotated_rows(const void *args)
{
	const struct rotate_step_args *a = args;

	return rows_of_view(&a->k, a->batch, 1, a->n_heads * a->d_head);
}

static struct rows attention_step_rows(const void *args)
{
	const struct attention_step_args *a = args;

	return rows_of_view(&a->out, a->batch, 1, a->n_heads * a->d_head);
}

static struct rows rat_step_rows(const void *args)
{
	const struct rat_step_args *a = args;

	return rows_of_view(&a->out, a->batch, 1, a->n_heads * a->d_head);
}

/* The slot of sequence 0, head 0 that the step at the last position writes. */
static struct rows key_slot_rows(const void *args)
{
	const struct attention_step_args *a = args;
	float *slot = view_at(&a->k_cache, 0, *a->position % a->kv_slots, 0);

	return (struct rows){slot, 1, a->d_head, a->d_head};
}

/* A slot that the step must leave alone. */
static struct rows old_slot_rows(const void *args)
{
	const struct attention_step_args *a = args;
	float *slot = view_at(&a->v_cache, a->batch - 1, (*a->position + 1) % a->kv_slots, 1);

	return (struct rows){slot, 1, a->d_head, a->d_head};
}

static struct rows chunk_slot_rows(const void *args)
{
	const struct rat_step_args *a = args;
	float *slot = view_at(&a->v_chunk, 0, *a->position / a->chunk, a->n_heads - 1);

	return (struct rows){slot, 1, a->d_head, a->d_head};
}

static struct rows running_rows(const void *args)
{
	const struct rat_step_args *a = args;
	int64_t width = a->n_heads * a->d_head;

	return (struct rows){a->k_state, a->batch, width, width};
}

static struct rows h_rows(const void *args)
{
	const struct recurrence_step_args *a = args;

	return (struct rows){a->h, a->batch, a->d_model, a->d_model};
}

static struct rows matrix_rows(const void *args)
{
	const struct matrix_recurrence_step_args *a = args;
	int64_t width = a->n_heads * a->d_k * a->d_v;

	return (struct rows){a->state, a->batch, width, width};
}

enum damage {
	ZEROED,        /* all of it is 0 */
	ROW_UNWRITTEN, /* one row is as it was before: poison */
	ONE_NAN,       /* one element is NaN */
	ONE_INF,
	ROW_WRONG,     /* one row is a hundredth too large */
	ELEMENT_WRONG, /* one element has the wrong sign */
	N_DAMAGES
};

static const char *const damage_names[N_DAMAGES] = {"zeroed", "row unwritten", "NaN",
                                                    "Inf",    "row wrong",     "element wrong"};

/* The mutant under test: written by the tests, read by its kernel. */
static struct {
	enum operation operation;
	struct rows (*rows)(const void *args);
	enum damage damage;
	double where; /* of the rows, from 0 to 1 */
} mutant;

static const struct kernel *original(enum operation operation)
{
	const struct kernel *k = cpu_kernels;

	while (k->operation != operation)
		k++;
	return k;
}

static void damage_row(float *row, int64_t width)
{
	int64_t largest = 0;

	for (int64_t i = 0; i < width; i++) {
		largest = fabsf(row[i]) > fabsf(row[largest]) ? i : largest;
		if (mutant.damage == ROW_UNWRITTEN)
			memset(&row[i], 0xff, sizeof row[i]);
		if (mutant.damage == ROW_WRONG)
			row[i] *= 1.01f;
	}
	if (mutant.damage == ONE_NAN)
		row[width / 2] = NAN;
	if (mutant.damage == ONE_INF)
		row[width - 1] = INFINITY;
	if (mutant.damage == ELEMENT_WRONG)
		row[largest] = -row[largest];
}

static enum status run_mutant(const void *args, void *workspace)
{
	enum status status = original(mutant.operation)->run(args, workspace);
	struct rows rows = mutant.rows(args);
	int64_t row = (int64_t)(mutant.where * (double)(rows.n_rows - 1));

	for (int64_t i = 0; i < rows.n_rows && mutant.damage == ZEROED; i++)
		memset(rows.data + i * rows.stride, 0, (size_t)rows.width * sizeof(float));
	if (mutant.damage != ZEROED)
		damage_row(rows.data + row * rows.stride, rows.width);
	return status;
}

enum { MAX_KERNELS = 64 };

/* The CPU backend with the mutant in front of its kernels. */
static struct backend mutated(struct kernel kernels[MAX_KERNELS])
{
	struct backend backend = cpu_backend;
	int n = 1;

	kernels[0] = *original(mutant.operation);
	kernels[0].run = run_mutant;
	for (const struct kernel *k = cpu_kernels; k->run; k++) {
		assert_true(n < MAX_KERNELS - 1);
		kernels[n++] = *k;
	}
	kernels[n].run = NULL;
	backend.kernels = kernels;
	return backend;
}

/* ---- runs ---- */

static struct layer_shape shape_of(enum pass pass)
{
	bool one = pass == PASS_GENERATION;

	return (struct layer_shape){pass, B, one ? 1 : T, pass == PASS_TRAIN ? 0 : T, 0};
}

/* The error that verification reports for one run. */
static double verified(const struct backend *backend, const struct stack_options *options,
                       struct layer_shape shape)
{
	struct fixture *f = fixture_open(backend, options, shape, 101);
	double error = -1;

	if (shape.pass == PASS_GENERATION) {
		require_ok(stack_fill_state(&f->stack, shape.capacity - 1, 3));
		require_ok(stack_snapshot_state(&f->stack, 5));
	}
	fixture_run(f);
	require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &error));
	fixture_close(f);
	return error;
}

static void test_right_runs_pass(void **state)
{
	static const char *const more[] = {"rat:45", "rat:15,swa:16", NULL};
	static const enum pass passes[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION};

	(void)state;
	for (int i = 0; pattern_at(more, i); i++)
		for (int j = 0; j < 3; j++) {
			struct stack_options options = small_options(pattern_at(more, i));
			double error = verified(NULL, &options, shape_of(passes[j]));

			if (!(error > 0 && error < allowed))
				fail_msg("%s %s: error %g", options.pattern, pass_name(passes[j]),
				         error);
		}
}

/* Damage to these rows must be reported, wherever it is: NaN and Inf as INFINITY, poison too. */
static void expect_damage_caught(const char *pattern, enum pass pass, enum operation operation,
                                 struct rows (*rows)(const void *args), enum damage damage)
{
	struct stack_options options = small_options(pattern);
	struct kernel kernels[MAX_KERNELS];

	for (int i = damage == ROW_WRONG || damage == ONE_NAN ? 0 : 2; i < 3; i++) {
		mutant.operation = operation;
		mutant.rows = rows;
		mutant.damage = damage;
		mutant.where = i / 2.0;
		struct backend backend = mutated(kernels);
		double error = verified(&backend, &options, shape_of(pass));
		bool infinite = damage >= ROW_UNWRITTEN && damage <= ONE_INF;
		double least = damage == ZEROED ? 0.5 : damage == ROW_WRONG ? 2e-3 : 1e-2;

		if (infinite ? error != (double)INFINITY : !(error > least))
			fail_msg("%s %s, %s: %s at %g of the rows gives %g", pattern,
			         pass_name(pass), operation_name(operation), damage_names[damage],
			         mutant.where, error);
	}
}

static void expect_caught(const char *pattern, enum pass pass, enum operation operation,
                          struct rows (*rows)(const void *args))
{
	for (int damage = 0; damage < N_DAMAGES; damage++)
		expect_damage_caught(pattern, pass, operation, rows, (enum damage)damage);
}

/* The same of rows behind which a norm takes a common factor out: not that one is too large. */
static void expect_caught_before_norm(const char *pattern, enum pass pass, enum operation operation,
                                      struct rows (*rows)(const void *args))
{
	for (int damage = 0; damage < N_DAMAGES; damage++)
		if (damage != ROW_WRONG)
			expect_damage_caught(pattern, pass, operation, rows, (enum damage)damage);
}

static void test_wrong_mixing_is_caught(void **state)
{
	static const enum pass passes[] = {PASS_PREFILL, PASS_TRAIN};

	(void)state;
	for (int i = 0; i < 2; i++) {
		expect_caught("attention", passes[i], OP_ATTENTION, attention_rows);
		expect_caught("swa", passes[i], OP_ATTENTION, attention_rows);
		expect_caught("rat", passes[i], OP_ATTENTION, attention_rows);
		expect_caught("recurrence", passes[i], OP_RECURRENCE, recurrence_rows);
		expect_caught("gla", passes[i], OP_NORM_GATE, norm_gate_rows);
	}
}

/* The linear-attention family: the recurrence itself, wherever the skip connection of Mamba-2 or
 * the norm might hide it, and what stands around it. */
static void test_wrong_family_is_caught(void **state)
{
	static const char *const matrices[] = {"linear_attention", "retention", "gla", "mamba2",
	                                       "hgrn2"};

	(void)state;
	for (int i = 0; i < 5; i++)
		expect_caught_before_norm(matrices[i], PASS_PREFILL, OP_MATRIX_RECURRENCE,
		                          matrix_out_rows);
	expect_caught_before_norm("hgrn", PASS_PREFILL, OP_RECURRENCE, recurrence_rows);
	expect_caught("mamba2", PASS_TRAIN, OP_GATE_NORM, gate_norm_rows);
	expect_caught("mamba2", PASS_TRAIN, OP_SHORT_CONV_BACKWARD, conv_weight_rows);
	expect_caught("mamba2", PASS_TRAIN, OP_TIME_STEP_BACKWARD, log_rate_rows);
	expect_caught("hgrn", PASS_TRAIN, OP_FORGET_GATE_BACKWARD, bound_rows);
	expect_caught("hgrn2", PASS_TRAIN, OP_FORGET_GATE_BACKWARD, bound_rows);
	expect_caught("mamba2", PASS_GENERATION, OP_SHORT_CONV_STEP, history_rows);
	expect_caught("retnet", PASS_GENERATION, OP_ROTATE_STEP, rotated_rows);
	expect_caught("hgrn", PASS_GENERATION, OP_RECURRENCE_STEP, h_rows);
}

/* Whichever layer of a stack is wrong. */
static void test_wrong_layer_of_a_stack_is_caught(void **state)
{
	(void)state;
	expect_caught("attention,recurrence", PASS_PREFILL, OP_ATTENTION, attention_rows);
	expect_caught("attention,recurrence", PASS_PREFILL, OP_RECURRENCE, recurrence_rows);
	expect_caught("attention,recurrence", PASS_TRAIN, OP_RECURRENCE, recurrence_rows);
}

static void test_wrong_projections_are_caught(void **state)
{
	(void)state;
	expect_caught("recurrence", PASS_PREFILL, OP_NORM_LINEAR, projection_rows);
	expect_caught("attention", PASS_PREFILL, OP_LINEAR_RESIDUAL, residual_rows);
	expect_caught("gla", PASS_GENERATION, OP_LINEAR_RESIDUAL, residual_rows);
}

static void test_wrong_gradients_are_caught(void **state)
{
	(void)state;
	expect_caught("attention", PASS_TRAIN, OP_NORM_LINEAR_BACKWARD, dx_rows);
	expect_caught("rat", PASS_TRAIN, OP_NORM_LINEAR_BACKWARD, in_weight_rows);
	expect_caught("swa", PASS_TRAIN, OP_NORM_LINEAR_BACKWARD, norm_weight_rows);
	expect_caught("recurrence", PASS_TRAIN, OP_LINEAR_RESIDUAL_BACKWARD, out_weight_rows);
	expect_caught("rat", PASS_TRAIN, OP_RAT_SCAN_BACKWARD, gate_bias_rows);
	expect_caught("gla", PASS_TRAIN, OP_DECAY_GATE_BACKWARD, decay_weight_rows);
}

static void test_wrong_steps_are_caught(void **state)
{
	(void)state;
	expect_caught("attention", PASS_GENERATION, OP_ATTENTION_STEP, attention_step_rows);
	expect_caught("rat", PASS_GENERATION, OP_RAT_STEP, rat_step_rows);
}

static void test_wrong_states_are_caught(void **state)
{
	(void)state;
	expect_caught("attention", PASS_GENERATION, OP_ATTENTION_STEP, key_slot_rows);
	expect_caught("swa", PASS_GENERATION, OP_ATTENTION_STEP, key_slot_rows);
	expect_caught("swa", PASS_GENERATION, OP_ATTENTION_STEP, old_slot_rows);
	/* Position 89 is the last of a chunk of 6, 10 and 15. */
	expect_caught("rat:15", PASS_GENERATION, OP_RAT_STEP, chunk_slot_rows);
	expect_caught("rat", PASS_GENERATION, OP_RAT_STEP, running_rows);
	expect_caught("recurrence", PASS_GENERATION, OP_RECURRENCE_STEP, h_rows);
	expect_caught("gla", PASS_GENERATION, OP_MATRIX_RECURRENCE_STEP, matrix_rows);
}

/* One wrong row in a thousand, wherever it is, when all rows are looked at. */
static void test_one_row_in_a_thousand(void **state)
{
	struct stack_options options = small_options("rat");
	struct layer_shape shape = {PASS_PREFILL, 1, 1000, 1000, 0};
	struct kernel kernels[MAX_KERNELS];

	(void)state;
	mutant.operation = OP_ATTENTION;
	mutant.rows = attention_rows;
	mutant.damage = ROW_WRONG;
	for (int i = 0; i <= 10; i++) {
		mutant.where = i / 10.0;
		struct backend backend = mutated(kernels);
		assert_true(verified(&backend, &options, shape) > 5e-3);
	}
	assert_true(verified(NULL, &options, shape) < allowed);
}

/* On larger shapes a sample is looked at: first and last rows of first and last sequence always, a
 * NaN wherever it is, and a tenth of the rows wrong cannot hide. */
static void test_samples(void **state)
{
	struct stack_options options = small_options("rat");
	struct layer_shape shape = {PASS_PREFILL, 12, 300, 300, 0};
	struct kernel kernels[MAX_KERNELS];

	(void)state;
	assert_true(verified(NULL, &options, shape) < allowed);
	mutant.operation = OP_ATTENTION;
	mutant.rows = attention_rows;
	for (int i = 0; i <= 8; i++) {
		struct backend backend;

		mutant.where = i / 8.0;
		mutant.damage = ONE_NAN;
		backend = mutated(kernels);
		assert_true(isinf(verified(&backend, &options, shape)));
		mutant.damage = ROW_WRONG;
		backend = mutated(kernels);
		assert_true(i % 8 != 0 || verified(&backend, &options, shape) > 5e-3);
	}
	mutant.damage = ZEROED;
	struct backend backend = mutated(kernels);
	assert_true(verified(&backend, &options, shape) > 0.5);
}

/* A buffer that nothing has written since it was poisoned. */
static void test_run_that_did_not_happen(void **state)
{
	static const enum pass passes[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION};

	(void)state;
	for (int i = 0; i < 3; i++) {
		struct stack_options options = small_options("rat,attention");
		struct fixture *f = fixture_open(NULL, &options, shape_of(passes[i]), 1);
		double error;

		if (passes[i] == PASS_GENERATION) {
			require_ok(stack_fill_state(&f->stack, T - 1, 3));
			assert_int_equal(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &error),
			                 STATUS_INVALID);
			require_ok(stack_snapshot_state(&f->stack, 5));
		}
		require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &error));
		assert_true(isinf(error));
		fixture_close(f);
	}
}

/* Of a model the last mixing layer is checked, in training every layer's forward. */
static void test_models(void **state)
{
	static const enum pass passes[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION,
	                                   PASS_THROUGHPUT};
	struct stack_options options = small_options("attention,rat");
	struct kernel kernels[MAX_KERNELS];

	(void)state;
	options.n_layers = 4;
	options.ffn = true;
	options.vocab = 64;
	for (int i = 0; i < 8; i++) {
		struct layer_shape shape = shape_of(passes[i % 4]);

		mutant.operation = i % 4 < 2 ? OP_ATTENTION : OP_RAT_STEP;
		mutant.rows = i % 4 < 2 ? attention_rows : rat_step_rows;
		mutant.damage = ROW_WRONG;
		mutant.where = 0;
		struct backend backend = mutated(kernels);
		if (passes[i % 4] == PASS_THROUGHPUT)
			shape.capacity = T + 5;
		struct fixture *f = fixture_open(i < 4 ? NULL : &backend, &options, shape, 101);
		double error;

		if (passes[i % 4] == PASS_GENERATION)
			require_ok(stack_fill_state(&f->stack, T - 1, 3));
		if (passes[i % 4] == PASS_THROUGHPUT) {
			fixture_run(f);
			require_ok(stack_snapshot_state(&f->stack, 5));
			require_ok(stack_step(&f->stack, &f->ctx, T + 4));
		} else {
			if (passes[i % 4] == PASS_GENERATION)
				require_ok(stack_snapshot_state(&f->stack, 5));
			fixture_run(f);
		}
		require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &error));
		assert_true(i < 4 ? error < allowed : error > 5e-3);
		fixture_close(f);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_right_runs_pass),
	        cmocka_unit_test(test_wrong_mixing_is_caught),
	        cmocka_unit_test(test_wrong_family_is_caught),
	        cmocka_unit_test(test_wrong_layer_of_a_stack_is_caught),
	        cmocka_unit_test(test_wrong_projections_are_caught),
	        cmocka_unit_test(test_wrong_gradients_are_caught),
	        cmocka_unit_test(test_wrong_steps_are_caught),
	        cmocka_unit_test(test_wrong_states_are_caught),
	        cmocka_unit_test(test_one_row_in_a_thousand),
	        cmocka_unit_test(test_samples),
	        cmocka_unit_test(test_run_that_did_not_happen),
	        cmocka_unit_test(test_models),
	};

	return cmocka_run_group_tests(tests, stacks_setup, stacks_teardown);
}
