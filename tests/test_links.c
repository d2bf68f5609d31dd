/*
 * What verification rests on: that a run is a chain of operations, each of which can be computed
 * again from what the run has left. So what an operation reads has been written, and nothing
 * writes over it afterwards; and each operation's outputs are what the fp64 reference makes of its
 * inputs. Both are found by the descriptions of the operations, and both must fail if a description
 * lies. (This program is linked with --wrap=operation_describe.)
 */
#include "tests/stacks.h"

#include "kernels/check.h"
#include "kernels/reference/reference.h"

enum { B = 2, T = 67, WORD = 4 };

static const double allowed = 1;

/* ---- lies ---- */

/* What the description of an operation says of an operand, in place of the truth; name NULL:
 * nothing. */
static struct lie {
	enum operation operation;
	const char *name;
	enum { NARROWER, SCRATCH } about;
} lie;

void __real_operation_describe(enum operation id, void *args, struct operand_list *list);
void __wrap_operation_describe(enum operation id, void *args, struct operand_list *list);

void __wrap_operation_describe(enum operation id, void *args, struct operand_list *list)
{
	__real_operation_describe(id, args, list);
	struct operand *o = lie.name && lie.operation == id ? operand_find(list, lie.name) : NULL;

	if (o && lie.about == SCRATCH)
		o->role = ROLE_SCRATCH;
	else if (o)
		o->size[OPERAND_DIMS - 1]--;
}

/* ---- runs ---- */

/* Memory with room behind it, NaN bytes: who reads too far finds them and nothing breaks. */
enum { ROOM = 1 << 20 };

static enum status allocate_with_room(struct device *device, size_t bytes, void **memory)
{
	enum status status = cpu_backend.allocate(device, bytes + ROOM, memory);

	if (status == STATUS_OK)
		memset(*memory, 0xff, bytes + ROOM);
	return status;
}

static struct fixture *run_of(struct device *device, const char *pattern, enum pass pass)
{
	struct stack_options options = small_options(pattern);
	struct fixture *f = fixture_open(device, &options, shape_of(pass, B, T), 7);

	if (pass == PASS_GENERATION)
		require_ok(stack_fill_state(&f->stack, T - 1, 3));
	fixture_run(f);
	return f;
}

/* The operations of a run, in order. */
static struct call_list calls_of(struct fixture *f)
{
	struct call_list calls = {0};
	struct kernel_plan work = {0};
	struct context planning = f->ctx;

	planning.plan = &work;
	planning.list = &calls;
	require_ok(stack_run(&f->stack, &planning));
	return calls;
}

/* ---- what is read has been written, and stays ---- */

/* Of every word of a stack's memory the call that has written it last, counted from 1. */
enum { UNWRITTEN = -1, FROM_OUTSIDE = 0 };

struct shadow {
	const char *base;
	int64_t n_words;
	int *writer;
};

static struct shadow shadow_of(const struct stack *stack)
{
	const bool fills_state = stack->shape.pass == PASS_PREFILL;
	const size_t given = fills_state ? stack->state_offset : stack->output_offset;
	struct shadow shadow = {stack->arena, (int64_t)(stack->plan.total / WORD), NULL};

	shadow.writer = malloc((size_t)shadow.n_words * sizeof *shadow.writer);
	assert_non_null(shadow.writer);
	for (int64_t i = 0; i < shadow.n_words; i++)
		shadow.writer[i] = i < (int64_t)(given / WORD) ? FROM_OUTSIDE : UNWRITTEN;
	return shadow;
}

/* The words of one row of an operand. */
static int *row_of(const struct shadow *shadow, const struct operand *o, int64_t row)
{
	const int64_t *n = o->size, *stride = o->stride;
	const int64_t at = row / (n[1] * n[2]) * stride[0] + row / n[2] % n[1] * stride[1] +
	                   row % n[2] * stride[2];

	return shadow->writer + ((const char *)operand_data(o) - shadow->base) / WORD + at;
}

/* Whether all words of an operand were written by calls lo .. hi. */
static bool is_written(const struct shadow *shadow, const struct operand *o, int lo, int hi)
{
	const int64_t width = o->size[OPERAND_DIMS - 1];

	for (int64_t row = 0; row < operand_count(o) / width; row++)
		for (int64_t i = 0; i < width; i++) {
			const int writer = row_of(shadow, o, row)[i];

			if (writer < lo || writer > hi)
				return false;
		}
	return true;
}

static void write_operand(const struct shadow *shadow, const struct operand *o, int call)
{
	const int64_t width = o->size[OPERAND_DIMS - 1];

	for (int64_t row = 0; row < operand_count(o) / width; row++)
		for (int64_t i = 0; i < width; i++)
			row_of(shadow, o, row)[i] = call;
}

/* One call's operands: reading before the run's end, or after it, when nobody may have written to
 * what was only read. False, and which operand, if that does not hold. */
static bool call_holds(const struct shadow *shadow, const struct operation_call *call, int number,
                       bool after, char *why, size_t size)
{
	union any_args args = call->args;
	struct operand_list list;

	operation_describe(call->operation, &args, &list);
	for (int i = 0; i < list.count; i++) {
		const struct operand *o = &list.operand[i];
		const bool read = operand_is_read(o) && o->read > 0 && operand_data(o) &&
		                  !(after && o->role == ROLE_STATE);

		if (!read || is_written(shadow, o, FROM_OUTSIDE, number - 1))
			continue;
		snprintf(why, size, "%s of %s is %s", o->name, operation_name(call->operation),
		         after ? "overwritten" : "read before it is written");
		return false;
	}
	for (int i = 0; i < list.count && !after; i++)
		if (operand_is_written(&list.operand[i]) && operand_data(&list.operand[i]))
			write_operand(shadow, &list.operand[i], number);
	return true;
}

static bool links_hold(struct fixture *f, char *why, size_t size)
{
	struct shadow shadow = shadow_of(&f->stack);
	struct call_list calls = calls_of(f);
	bool hold = true;

	for (int i = 0; i < 2 * calls.count && hold; i++)
		hold = call_holds(&shadow, &calls.calls[i % calls.count], i % calls.count + 1,
		                  i >= calls.count, why, size);
	free(calls.calls);
	free(shadow.writer);
	return hold;
}

static const enum pass tried[] = {PASS_PREFILL, PASS_TRAIN, PASS_GENERATION};

static const char *const more_patterns[] = {"rat:1",
                                            "rat:67",
                                            "swa:100",
                                            "ratplus(dilation=4,window=6,initial=3)",
                                            "ratplus(dilation=0,window=5,initial=2)",
                                            NULL};

TEST(test_links)
{
	for (int i = 0; pattern_at(more_patterns, i); i++)
		for (int j = 0; j < 3; j++) {
			const char *pattern = pattern_at(more_patterns, i);
			scoped_fixture struct fixture *f = run_of(cpu, pattern, tried[j]);
			char why[128];

			if (!links_hold(f, why, sizeof why))
				fail_msg("%s, %s: %s", pattern, pass_name(tried[j]), why);
		}
}

/* ---- each operation is right ---- */

/* The worst error of all operations of a run that has no states to begin with. */
static double worst_error(struct device *device, const char *pattern, enum pass pass)
{
	const struct check_options options = {.rows = 1024, .seed = 1, .everything = true};
	struct fixture *f = run_of(device, pattern, pass);
	struct call_list calls = calls_of(f);
	struct check_result result = {0};

	for (int i = 0; i < calls.count; i++)
		require_ok(check_operation(device, calls.calls[i].operation, &calls.calls[i].args,
		                           &options, &result));
	free(calls.calls);
	fixture_close(f);
	return result.share;
}

/* The reference of attention as if one token's keys lay a head behind the other's. */
static enum status wrong_stride(struct device *device, const void *args, void *workspace)
{
	struct attention_args a = *(const struct attention_args *)args;

	a.k.token = a.k.head;
	return reference_attention(device, &a, workspace);
}

TEST(test_operations_of_a_run)
{
	const struct kernel wrong[] = {{OP_ATTENTION, "reference", NULL, NULL, wrong_stride, false},
	                               {0}};
	struct device mutant = mutant_of(cpu->reference, wrong), device = *cpu;

	for (int i = 0; layer_classes[i]; i++)
		assert_true(worst_error(cpu, layer_classes[i]->name, PASS_TRAIN) < allowed);
	device.reference = &mutant;
	assert_true(worst_error(&device, "recurrence", PASS_TRAIN) < allowed);
	assert_true(worst_error(&device, "attention", PASS_TRAIN) > 0.1);
	mutant_free(&mutant);
}

/* A description that takes an input for narrower than it is makes the check fail. */
TEST(test_narrower_inputs)
{
	static const struct {
		enum operation operation;
		const char *name;
	} lies[] = {
	        {OP_NORM_LINEAR, "norm_weight"},
	        {OP_NORM_LINEAR, "weight"},
	        {OP_ATTENTION, "k"},
	        {OP_ATTENTION_BACKWARD, "dout"},
	        {OP_ATTENTION_BACKWARD, "lse"},
	        {OP_LINEAR_RESIDUAL_BACKWARD, "dy"},
	};
	struct backend backend = cpu_backend;
	struct device device = *cpu;

	backend.allocate = allocate_with_room;
	device.backend = &backend;
	assert_true(worst_error(&device, "attention", PASS_TRAIN) < allowed);
	for (size_t i = 0; i < COUNT_OF(lies); i++) {
		lie = (struct lie){lies[i].operation, lies[i].name, NARROWER};
		double error = worst_error(&device, "attention", PASS_TRAIN);
		lie.name = NULL;
		if (!(error > 0.1))
			fail_msg("%s of %s: error %g", lies[i].name,
			         operation_name(lies[i].operation), error);
	}
}

/* One that takes an output for narrower, or for scratch, breaks the chain. */
TEST(test_missing_outputs)
{
	static const struct {
		const char *pattern;
		enum operation operation;
		const char *name;
	} lies[] = {
	        {"attention", OP_ATTENTION, "lse"},
	        {"attention", OP_ATTENTION, "out"},
	        {"attention", OP_ATTENTION_BACKWARD, "dv"},
	        {"rat", OP_RAT_SCAN, "own_score"},
	        {"mamba", OP_SELECTIVE_SCAN, "borders"},
	        {"mamba2", OP_TIME_STEP, "log_decay"},
	        {"ratplus", OP_RECURRENCE_BACKWARD, "dgate"},
	        {"gla", OP_MATRIX_RECURRENCE_BACKWARD, "dlog_decay"},
	        {"kda", OP_DECAY_GATE, "out"},
	        {"gated_delta_net", OP_DELTA_GATE, "beta"},
	        {"delta_net", OP_L2_NORM, "inverse"},
	        {"rwkv6", OP_TOKEN_SHIFT, "out"},
	        {"rwkv6", OP_TOKEN_SHIFT_BACKWARD, "dmix"},
	        {"hawk", OP_BLOCK_LINEAR, "y"},
	        {"hawk", OP_LRU_GATE, "log_decay"},
	};

	for (size_t i = 0; i < COUNT_OF(lies); i++)
		for (int scratch = 0; scratch < 2; scratch++) {
			scoped_fixture struct fixture *f = run_of(cpu, lies[i].pattern, PASS_TRAIN);
			char why[128];

			assert_true(links_hold(f, why, sizeof why));
			lie = (struct lie){lies[i].operation, lies[i].name,
			                   scratch ? SCRATCH : NARROWER};
			const bool hold = links_hold(f, why, sizeof why);
			lie.name = NULL;
			if (hold)
				fail_msg("%s of %s is not missed", lies[i].name,
				         operation_name(lies[i].operation));
		}
}
