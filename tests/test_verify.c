/* Verification itself: right runs pass with a small error, and each of many wrong ones is caught. A
 * mutant is the CPU with a kernel that spoils its result. */
#include "tests/stacks.h"

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/operation.h"

enum { B = 2, T = 90, D = 48, N = B * T, MIN_ROWS = 1024 };

static const double allowed = 1;

/* ---- mutants ---- */

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

/* What is spoilt: an operand of an operation, or of a cache one slot of a head. */
struct target {
	const char *pattern;
	enum pass pass;
	enum operation operation;
	const char *operand;
	bool one_slot;
	int sequence, slot, head;
};

#define WHOLE(pattern, pass, operation, operand)                                                   \
	{                                                                                          \
		pattern, PASS_##pass, OP_##operation, operand, false, 0, 0, 0                      \
	}
#define SLOT(pattern, pass, operation, operand, ...)                                               \
	{                                                                                          \
		pattern, PASS_##pass, OP_##operation, operand, true, __VA_ARGS__                   \
	}

/* The mutant under test: written by the tests, read by its kernel. */
static struct {
	struct target target;
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
		if (mutant.damage == ZEROED)
			row[i] = 0;
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

/* Row i of an operand: all heads of a token, or one row of a matrix. */
static float *row_of(const struct operand *o, int64_t i, int64_t *n_rows, int64_t *width)
{
	int last = OPERAND_DIMS - 1, first = 0;
	float *row = operand_data(o);

	while (first < last && o->axis[first] != AXIS_HEAD)
		first++;
	for (*width = 1; last >= first; last--) {
		assert_true(o->size[last] == 1 || o->stride[last] == *width);
		*width *= o->size[last];
	}
	for (*n_rows = 1; last >= 0; last--) {
		row += i / *n_rows % o->size[last] * o->stride[last];
		*n_rows *= o->size[last];
	}
	return row;
}

static void damage_operand(const struct operand *o)
{
	const struct target *t = &mutant.target;
	int64_t n_rows = 1, width = o->size[3];

	if (t->one_slot) {
		float *slot = (float *)operand_data(o) + t->sequence * o->stride[0] +
		              t->slot * o->stride[1] + t->head * o->stride[2];

		damage_row(slot, width);
		return;
	}
	row_of(o, 0, &n_rows, &width);
	const int64_t wrong = (int64_t)(mutant.where * (double)(n_rows - 1));
	for (int64_t i = 0; i < n_rows; i++)
		if (mutant.damage == ZEROED || i == wrong)
			damage_row(row_of(o, i, &n_rows, &width), width);
}

static enum status run_mutant(struct device *device, const void *args, void *workspace)
{
	const enum operation operation = mutant.target.operation;
	const enum status status = original(operation)->run(device, args, workspace);
	struct operand_list list;
	union any_args copy;

	memcpy(&copy, args, operation_describes(operation)->args_size);
	operation_describe(operation, &copy, &list);
	const struct operand *o = operand_find(&list, mutant.target.operand);
	/* Not every form of an operation has it. */
	if (o && operand_data(o))
		damage_operand(o);
	return status;
}

/* The CPU with the mutant before its kernels. */
static struct device mutated(void)
{
	struct kernel kernels[2] = {*original(mutant.target.operation)};

	kernels[0].run = run_mutant;
	return mutant_of(cpu, kernels);
}

/* ---- runs ---- */

/* The error that verification reports for one run; of a throughput stack, for a step after it. */
static double verified(struct device *device, const struct stack_options *options,
                       struct layer_shape shape)
{
	scoped_fixture struct fixture *f = fixture_open(device, options, shape, 101);
	const bool steps = shape.pass == PASS_THROUGHPUT;
	struct accuracy found = {-1, -1};

	if (steps)
		fixture_run(f);
	if (shape.pass == PASS_GENERATION)
		require_ok(stack_fill_state(&f->stack, shape.capacity - 1, 3));
	if (steps || shape.pass == PASS_GENERATION)
		require_ok(stack_snapshot_state(&f->stack, 5));
	if (steps)
		require_ok(stack_step(&f->stack, &f->ctx, shape.capacity - 1));
	else
		fixture_run(f);
	require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &found));
	return found.share;
}

static double mutant_verified(const struct stack_options *options, struct layer_shape shape)
{
	struct device device = mutated();
	double error = verified(&device, options, shape);

	mutant_free(&device);
	return error;
}

TEST(test_right_runs_pass)
{
	static const char *const more[] = {"rat:45", "rat:15,swa:16", NULL};
	static const enum pass tried[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION};

	for (int i = 0; pattern_at(more, i); i++)
		for (int j = 0; j < 3; j++) {
			struct stack_options options = small_options(pattern_at(more, i));
			double error = verified(NULL, &options, shape_of(tried[j], B, T));

			if (!(error > 0 && error < allowed))
				fail_msg("%s %s: error %g", options.pattern, pass_name(tried[j]),
				         error);
		}
}

/* Damage must be reported, wherever it is: NaN and Inf as INFINITY, poison too. */
static void expect_damage_caught(const struct target *target, enum damage damage)
{
	struct stack_options options = small_options(target->pattern);

	for (int i = damage == ROW_WRONG || damage == ONE_NAN ? 0 : 2; i < 3; i++) {
		mutant.target = *target;
		mutant.damage = damage;
		mutant.where = i / 2.0;
		double error = mutant_verified(&options, shape_of(target->pass, B, T));
		bool infinite = damage >= ROW_UNWRITTEN && damage <= ONE_INF;
		double least = damage == ZEROED ? 0.5 : damage == ROW_WRONG ? 2e-3 : 1e-2;

		if (infinite ? error != (double)INFINITY : !(error > least))
			fail_msg("%s %s, %s of %s: %s at %g of the rows gives %g", target->pattern,
			         pass_name(target->pass), target->operand,
			         operation_name(target->operation), damage_names[damage],
			         mutant.where, error);
	}
}

static void expect_caught(const struct target *targets, size_t count)
{
	for (size_t i = 0; i < count; i++)
		for (int damage = 0; damage < N_DAMAGES; damage++)
			expect_damage_caught(&targets[i], (enum damage)damage);
}

/* A test that all of these are caught. */
#define CAUGHT(name, ...)                                                                          \
	TEST(name)                                                                                 \
	{                                                                                          \
		static const struct target targets[] = {__VA_ARGS__};                              \
		expect_caught(targets, COUNT_OF(targets));                                         \
	}

CAUGHT(test_wrong_mixing_is_caught, WHOLE("attention", PREFILL, ATTENTION, "out"),
       WHOLE("swa", PREFILL, ATTENTION, "out"), WHOLE("rat", PREFILL, ATTENTION, "out"),
       WHOLE("recurrence", PREFILL, RECURRENCE, "out"), WHOLE("gla", PREFILL, NORM_GATE, "out"),
       WHOLE("attention", TRAIN, ATTENTION, "out"), WHOLE("swa", TRAIN, ATTENTION, "out"),
       WHOLE("rat", TRAIN, ATTENTION, "out"), WHOLE("recurrence", TRAIN, RECURRENCE, "out"),
       WHOLE("gla", TRAIN, NORM_GATE, "out"))

/* The linear-attention family: the recurrence itself, though the skip connection of Mamba-2 or the
 * norm after it may hide it from the output, and what stands around it. */
CAUGHT(test_wrong_family_is_caught, WHOLE("linear_attention", PREFILL, MATRIX_RECURRENCE, "out"),
       WHOLE("retention", PREFILL, MATRIX_RECURRENCE, "out"),
       WHOLE("gla", PREFILL, MATRIX_RECURRENCE, "out"),
       WHOLE("mamba2", PREFILL, MATRIX_RECURRENCE, "out"),
       WHOLE("hgrn2", PREFILL, MATRIX_RECURRENCE, "out"), WHOLE("hgrn", PREFILL, RECURRENCE, "out"),
       WHOLE("mamba2", TRAIN, GATE_NORM, "out"),
       WHOLE("mamba2", TRAIN, SHORT_CONV_BACKWARD, "dweight"),
       WHOLE("mamba2", TRAIN, TIME_STEP_BACKWARD, "dlog_rate"),
       WHOLE("hgrn", TRAIN, FORGET_GATE_BACKWARD, "dbound"),
       WHOLE("hgrn2", TRAIN, FORGET_GATE_BACKWARD, "dbound"),
       WHOLE("mamba2", GENERATION, SHORT_CONV_STEP, "history"),
       WHOLE("retnet", GENERATION, ROTATE_STEP, "k_out"),
       WHOLE("hgrn", GENERATION, RECURRENCE_STEP, "h"))

/* RAT+: its recurrences, what fills its caches, attention, and the gate's two gradients. */
CAUGHT(test_wrong_ratplus_is_caught, WHOLE("ratplus", PREFILL, RECURRENCE, "out"),
       WHOLE("ratplus", PREFILL, ROTATE, "k_out"), WHOLE("ratplus", PREFILL, ATTENTION, "out"),
       WHOLE("ratplus", TRAIN, ATTENTION_BACKWARD, "dk"),
       WHOLE("ratplus", TRAIN, RECURRENCE_BACKWARD, "dgate"),
       WHOLE("ratplus", GENERATION, RATPLUS_STEP, "out"),
       WHOLE("ratplus", GENERATION, RATPLUS_STEP, "v_state"))

/* The delta rules: the recurrence, and what makes its keys, writes and decays. */
CAUGHT(test_wrong_delta_rule_is_caught, WHOLE("delta_net", PREFILL, MATRIX_RECURRENCE, "out"),
       WHOLE("gated_delta_net", PREFILL, L2_NORM, "y"),
       WHOLE("kda", PREFILL, MATRIX_RECURRENCE, "out"), WHOLE("kda", PREFILL, DECAY_GATE, "out"),
       WHOLE("delta_net", TRAIN, L2_NORM_BACKWARD, "dx"),
       WHOLE("gated_delta_net", TRAIN, DELTA_GATE_BACKWARD, "dlog_rate"),
       WHOLE("kda", TRAIN, DECAY_GATE_BACKWARD, "dweight"),
       WHOLE("kda", TRAIN, MATRIX_RECURRENCE_BACKWARD, "dbeta"),
       WHOLE("delta_net", GENERATION, DELTA_GATE, "beta"),
       WHOLE("gated_delta_net", GENERATION, MATRIX_RECURRENCE_STEP, "state"))

/* RWKV-6: what its tokens are mixed with, its decays and its group norm. */
CAUGHT(test_wrong_token_shift_is_caught, WHOLE("rwkv6", PREFILL, TOKEN_SHIFT, "out"),
       WHOLE("rwkv6", PREFILL, TOKEN_SHIFT, "last"), WHOLE("rwkv6", PREFILL, DECAY_GATE, "out"),
       WHOLE("rwkv6", PREFILL, NORM_GATE, "out"), WHOLE("rwkv6", TRAIN, TOKEN_SHIFT_BACKWARD, "dx"),
       WHOLE("rwkv6", TRAIN, TOKEN_SHIFT_BACKWARD, "dmix"),
       WHOLE("rwkv6", TRAIN, GATE_NORM_BACKWARD, "dx"),
       WHOLE("rwkv6", TRAIN, NORM_GATE_BACKWARD, "dbias"),
       WHOLE("rwkv6", GENERATION, TOKEN_SHIFT_STEP, "state"))

/* Mamba: the scan, and the time step and what else the token chooses. */
CAUGHT(test_wrong_scan_is_caught, WHOLE("mamba", PREFILL, SELECTIVE_SCAN, "out"),
       WHOLE("mamba", PREFILL, DECAY_GATE, "out"), WHOLE("mamba", PREFILL, NORM_LINEAR, "y"),
       WHOLE("mamba", TRAIN, SELECTIVE_SCAN, "borders"),
       WHOLE("mamba", TRAIN, SELECTIVE_SCAN_BACKWARD, "ddt"),
       WHOLE("mamba", TRAIN, SELECTIVE_SCAN_BACKWARD, "db"),
       WHOLE("mamba", TRAIN, SELECTIVE_SCAN_BACKWARD, "dlog_rate"),
       WHOLE("mamba", GENERATION, SELECTIVE_SCAN_STEP, "h"))

/* Hawk: the gates' products, what they make, and the gate of its output. */
CAUGHT(test_wrong_hawk_is_caught, WHOLE("hawk", PREFILL, BLOCK_LINEAR, "y"),
       WHOLE("hawk", PREFILL, LRU_GATE, "log_decay"), WHOLE("hawk", PREFILL, GELU_GATE, "out"),
       WHOLE("hawk", TRAIN, NORM_LINEAR_BACKWARD, "dbias"),
       WHOLE("hawk", TRAIN, LINEAR_RESIDUAL_BACKWARD, "dbias"),
       WHOLE("hawk", TRAIN, BLOCK_LINEAR_BACKWARD, "dweight"),
       WHOLE("hawk", TRAIN, LRU_GATE_BACKWARD, "drate"),
       WHOLE("hawk", TRAIN, GELU_GATE_BACKWARD, "dgate"),
       WHOLE("hawk", GENERATION, LRU_GATE, "out"),
       WHOLE("griffin_attention", GENERATION, ATTENTION_STEP, "k_cache"),
       WHOLE("griffin_attention", TRAIN, ROTATE_BACKWARD, "dq"))

/* Whichever layer of a stack is wrong. */
CAUGHT(test_wrong_layer_of_a_stack_is_caught,
       WHOLE("attention,recurrence", PREFILL, ATTENTION, "out"),
       WHOLE("attention,recurrence", PREFILL, RECURRENCE, "out"),
       WHOLE("attention,recurrence", TRAIN, RECURRENCE, "out"))

CAUGHT(test_wrong_projections_are_caught, WHOLE("recurrence", PREFILL, NORM_LINEAR, "y"),
       WHOLE("attention", PREFILL, LINEAR_RESIDUAL, "y"),
       WHOLE("gla", GENERATION, LINEAR_RESIDUAL, "y"))

CAUGHT(test_wrong_gradients_are_caught, WHOLE("attention", TRAIN, NORM_LINEAR_BACKWARD, "dx"),
       WHOLE("rat", TRAIN, NORM_LINEAR_BACKWARD, "dweight"),
       WHOLE("swa", TRAIN, NORM_LINEAR_BACKWARD, "dnorm_weight"),
       WHOLE("recurrence", TRAIN, LINEAR_RESIDUAL_BACKWARD, "dweight"),
       WHOLE("rat", TRAIN, RAT_SCAN_BACKWARD, "dgate_bias"),
       WHOLE("gla", TRAIN, DECAY_GATE_BACKWARD, "dweight"))

CAUGHT(test_wrong_steps_are_caught, WHOLE("attention", GENERATION, ATTENTION_STEP, "out"),
       WHOLE("rat", GENERATION, RAT_STEP, "out"))

enum { LAST = T - 1, SLOTS_OF_SWA = 8 };

/* The states of steps at position T - 1: the slot that the step writes, and an old one that it
 * must leave alone; RAT's position is the last of a chunk of 6, 10 and 15. */
CAUGHT(test_wrong_states_are_caught,
       SLOT("attention", GENERATION, ATTENTION_STEP, "k_cache", 0, LAST, 0),
       SLOT("swa", GENERATION, ATTENTION_STEP, "k_cache", 0, LAST % SLOTS_OF_SWA, 0),
       SLOT("swa", GENERATION, ATTENTION_STEP, "v_cache", B - 1, T % SLOTS_OF_SWA, 1),
       SLOT("rat:15", GENERATION, RAT_STEP, "v_chunk", 0, LAST / 15, 3),
       SLOT("ratplus", GENERATION, RATPLUS_STEP, "k_recent", 0, LAST % SLOTS_OF_SWA, 0),
       WHOLE("rat", GENERATION, RAT_STEP, "k_state"),
       WHOLE("recurrence", GENERATION, RECURRENCE_STEP, "h"),
       WHOLE("gla", GENERATION, MATRIX_RECURRENCE_STEP, "state"))

/* One wrong row in a thousand, wherever it is, when all rows are looked at. */
TEST(test_one_row_in_a_thousand)
{
	struct stack_options options = small_options("rat");
	struct layer_shape shape = {PASS_PREFILL, 1, 1000, 1000, 0};

	mutant.target = (struct target){.operation = OP_ATTENTION, .operand = "out"};
	mutant.damage = ROW_WRONG;
	for (int i = 0; i <= 10; i++) {
		mutant.where = i / 10.0;
		assert_true(mutant_verified(&options, shape) > 5e-3);
	}
	assert_true(verified(NULL, &options, shape) < allowed);
}

/* On larger shapes a sample is looked at: first and last rows of first and last sequence always, a
 * NaN wherever it is, and a tenth of the rows wrong cannot hide. */
TEST(test_samples)
{
	struct stack_options options = small_options("rat");
	struct layer_shape shape = {PASS_PREFILL, 12, 300, 300, 0};

	assert_true(verified(NULL, &options, shape) < allowed);
	mutant.target = (struct target){.operation = OP_ATTENTION, .operand = "out"};
	for (int i = 0; i <= 8; i++) {
		mutant.where = i / 8.0;
		mutant.damage = ONE_NAN;
		assert_true(isinf(mutant_verified(&options, shape)));
		mutant.damage = ROW_WRONG;
		assert_true(i % 8 != 0 || mutant_verified(&options, shape) > 5e-3);
	}
	mutant.damage = ZEROED;
	assert_true(mutant_verified(&options, shape) > 0.5);
}

/* A buffer that nothing has written since it was poisoned. */
TEST(test_run_that_did_not_happen)
{
	static const enum pass tried[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION};

	for (int i = 0; i < 3; i++) {
		struct stack_options options = small_options("rat,attention");
		scoped_fixture struct fixture *f =
		        fixture_open(NULL, &options, shape_of(tried[i], B, T), 1);
		struct accuracy found;

		if (tried[i] == PASS_GENERATION) {
			require_ok(stack_fill_state(&f->stack, T - 1, 3));
			assert_int_equal(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &found),
			                 STATUS_INVALID);
			require_ok(stack_snapshot_state(&f->stack, 5));
		}
		require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 7, &found));
		assert_true(isinf(found.share));
	}
}

/* Of a model the last mixing layer is checked, in training every layer's forward. */
TEST(test_models)
{
	static const enum pass tried[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION,
	                                  PASS_THROUGHPUT};
	struct stack_options options = small_options("attention,rat");

	options.n_layers = 4;
	options.ffn = true;
	options.vocab = 64;
	mutant.damage = ROW_WRONG;
	mutant.where = 0;
	for (int i = 0; i < 4; i++) {
		struct layer_shape shape = shape_of(tried[i], B, T);

		mutant.target = (struct target){.operation = i < 2 ? OP_ATTENTION : OP_RAT_STEP,
		                                .operand = "out"};
		shape.capacity += tried[i] == PASS_THROUGHPUT ? 5 : 0;
		assert_true(verified(cpu, &options, shape) < allowed);
		assert_true(mutant_verified(&options, shape) > 5e-3);
	}
}
