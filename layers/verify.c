/*
 * Verification of a run by its links: each operation that the run consisted of is computed again
 * by the fp64 reference, from its inputs as the run left them, and compared with what it wrote
 * (kernels/check.h). No operation can be wrong unseen; that the links hang together as they should
 * is what golden tensors of whole layers hold (tests/golden).
 *
 * A link can be checked while nobody has overwritten its inputs. In a stack of blocks nobody does.
 * A model outside training keeps the last layers alone: of it those are checked.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/check.h"
#include "layers/stack.h"

/* Rows of a step's outputs that are compared. */
enum { STEP_ROWS = 1024, MAX_STEP_CALLS = 16 * MAX_LAYERS };

/* States as they were before a step: the checks of its operations, which have begun. */
struct stack_snapshot {
	int count;
	enum operation operations[MAX_STEP_CALLS];
	struct check *checks[MAX_STEP_CALLS];
};

/* Where an operand lies: bytes from `first` to `end`; of a matrix of rows `stride` apart it has the
 * first `width` bytes of each. */
struct place {
	uintptr_t first, end, stride, width;
	/* Its rows, along the dimensions outside of the last: how many, how far apart. */
	int64_t count[OPERAND_DIMS - 1], apart[OPERAND_DIMS - 1], row;
};

static struct place place_of(const struct operand *o, const struct device *device)
{
	const size_t size = dtype_size(operand_dtype(o, device));
	const int64_t *n = o->size, *s = o->stride;
	/* The tokens of a view are rows of a wider tensor; so are those of a plain matrix. */
	const int64_t row = o->view ? s[1] : s[2];
	const int64_t wide = o->view ? (n[2] - 1) * s[2] + n[3] : n[3];
	const uintptr_t first = (uintptr_t)operand_data(o);

	struct place place = {.first = first,
	                      .end = first + (size_t)operand_span(o) * size,
	                      .stride = (size_t)row * size,
	                      .width = (size_t)wide * size,
	                      .row = n[3] * (int64_t)size};

	for (int i = 0; i < OPERAND_DIMS - 1; i++) {
		place.count[i] = n[i];
		place.apart[i] = n[i] > 1 ? s[i] * (int64_t)size : 0;
	}
	return place;
}

/* Whether two are parts of one tensor: along each dimension rows lie as far apart, unless there is
 * one. *apart: how far; 0: there is one of both. */
static bool same_tensor(const struct place *a, const struct place *b, int64_t *apart)
{
	for (int i = 0; i < OPERAND_DIMS - 1; i++) {
		apart[i] = a->apart[i] ? a->apart[i] : b->apart[i];
		if (b->apart[i] && b->apart[i] != apart[i])
			return false;
	}
	return true;
}

/* Whether rows of a and b meet, b's being `offset` bytes further, along the dimensions that are not
 * `done`: the widest first, and along it only two differences can be those of two rows that do. */
static bool rows_meet(const struct place *a, const struct place *b, const int64_t *apart,
                      int64_t offset, unsigned done)
{
	int widest = -1;

	for (int i = 0; i < OPERAND_DIMS - 1; i++)
		if (!(done >> i & 1) && apart[i] && (widest < 0 || apart[i] > apart[widest]))
			widest = i;
	if (widest < 0)
		return offset < a->row && -offset < b->row;
	const int64_t step = apart[widest], down = offset / step - (offset % step < 0);
	for (int64_t rows = down; rows <= down + 1; rows++)
		if (rows < a->count[widest] && -rows < b->count[widest] &&
		    rows_meet(a, b, apart, offset - rows * step, done | 1u << widest))
			return true;
	return false;
}

/* Whether what lies within a dimension is no longer than its rows are apart. */
static bool nests(const struct place *p, const int64_t *apart)
{
	for (int i = 0; i < OPERAND_DIMS - 1; i++) {
		int64_t span = p->row;

		for (int j = 0; j < OPERAND_DIMS - 1; j++)
			if (apart[j] < apart[i] || (j > i && apart[j] == apart[i]))
				span += (p->count[j] - 1) * apart[j];
		if (apart[i] && span > apart[i])
			return false;
	}
	return true;
}

/* Parts of one tensor, such as columns side by side and slots of a cache, share no element though
 * their spans cross. */
static bool overlap(const struct place *a, const struct place *b)
{
	int64_t apart[OPERAND_DIMS - 1];

	if (a->first >= b->end || b->first >= a->end)
		return false;
	if (same_tensor(a, b, apart) && nests(a, apart) && nests(b, apart))
		return rows_meet(a, b, apart, (int64_t)(b->first - a->first), 0);
	if (a->stride != b->stride || a->stride == 0)
		return true;
	const uintptr_t between = a->first < b->first ? b->first - a->first : a->first - b->first;
	const uintptr_t left = a->first < b->first ? a->width : b->width;
	const uintptr_t right = a->first < b->first ? b->width : a->width;
	const uintptr_t aside = between % a->stride;

	return aside < left || a->stride - aside < right;
}

/* ---- which links can be checked ---- */

/* Whether an operation after number `index` of the list writes there. */
static bool written_later(const struct device *device, const struct call_list *list, int index,
                          const struct place *place)
{
	for (int later = index; later < list->count; later++) {
		union any_args args = list->calls[later].args;
		struct operand_list operands;

		operation_describe(list->calls[later].operation, &args, &operands);
		for (int i = 0; i < operands.count; i++) {
			const struct operand *o = &operands.operand[i];

			if (!operand_data(o) || operand_count(o) == 0 ||
			    !(operand_is_written(o) || o->role == ROLE_SCRATCH))
				continue;
			const struct place there = place_of(o, device);
			if (overlap(place, &there))
				return true;
		}
	}
	return false;
}

/*
 * Whether an input of an operation is gone: overwritten by a later one or by itself. A state and
 * a position are kept from before. *ignored: its outputs that are gone. With no output left it is
 * lost as well.
 */
static bool is_lost(const struct device *device, const struct call_list *list, int index,
                    uint32_t *ignored)
{
	union any_args args = list->calls[index].args;
	struct operand_list operands;
	bool left = false;

	*ignored = 0;
	operation_describe(list->calls[index].operation, &args, &operands);
	for (int i = 0; i < operands.count; i++) {
		const struct operand *o = &operands.operand[i];
		const bool written = operand_is_written(o);

		if (!operand_data(o) || operand_count(o) == 0 || operand_is_position(o) ||
		    (!written && !operand_is_read(o)))
			continue;
		const struct place place = place_of(o, device);
		const bool gone = written_later(device, list, written ? index + 1 : index, &place);
		if (gone && !written)
			return true;
		if (gone)
			*ignored |= UINT32_C(1) << i;
		left = left || (written && !gone);
	}
	return !left;
}

/* The operations of one run of the stack's pass; of generation, and of what a model generates after
 * its prompt, of a step. calls is to be freed. */
static enum status list_calls(const struct stack *stack, const struct context *ctx,
                              struct call_list *list)
{
	const bool step =
	        stack->shape.pass == PASS_GENERATION || stack->shape.pass == PASS_THROUGHPUT;
	struct stack *copy = malloc(sizeof *copy);
	struct kernel_plan *plan = calloc(1, sizeof *plan);
	struct context planning = *ctx;
	enum status status = STATUS_OK;

	*list = (struct call_list){0};
	if (!copy || !plan) {
		status = status_set(STATUS_OOM, "no memory to verify with");
	} else {
		*copy = *stack;
		planning.plan = plan;
		planning.list = list;
		status = step ? stack_step(copy, &planning, stack->shape.capacity - 1)
		              : stack_run(copy, &planning);
	}
	free(copy);
	free(plan);
	return status;
}

/* Whether an operation of a model belongs to its ends, which are held by the loss and the tokens.
 */
static bool is_end(enum operation operation)
{
	return operation == OP_EMBEDDING || operation == OP_EMBEDDING_BACKWARD ||
	       operation == OP_CROSS_ENTROPY || operation == OP_ARGMAX;
}

/* ---- the checks ---- */

/* The worst so far, and the operation whose output has the largest share of its bound. */
struct verdict {
	struct check_result worst;
	enum operation operation;
};

static void take(struct verdict *verdict, enum operation operation,
                 const struct check_result *result)
{
	if (!(result->share <= verdict->worst.share))
		verdict->operation = operation;
	judge_raise(&verdict->worst, result->share, result->name, result->test);
	check_raise(&verdict->worst.rel_err, result->rel_err);
}

static enum status verify_call(const struct stack *stack, const struct operation_call *call,
                               const struct check_options *options, struct verdict *verdict)
{
	struct check_options of_kernel = *options;
	struct check_result result = {0};

	of_kernel.kernel = call->kernel;
	enum status status =
	        check_operation(stack->device, call->operation, &call->args, &of_kernel, &result);

	take(verdict, call->operation, &result);
	return status;
}

static enum status verify_run(const struct stack *stack, const struct call_list *list,
                              int64_t min_rows, uint64_t seed, struct verdict *verdict)
{
	struct check_options options = {.rows = min_rows, .seed = seed};
	int n = 0;

	for (int i = 0; i < list->count; i++) {
		const struct operation_call *call = &list->calls[i];

		if (is_end(call->operation))
			continue;
		if (!is_lost(stack->device, list, i, &options.ignored)) {
			TRY(verify_call(stack, call, &options, verdict));
			n++;
		} else if (stack->vocab == 0) {
			return status_set(STATUS_UNSUPPORTED,
			                  "%s: what it read or wrote is gone: no check",
			                  operation_name(call->operation));
		}
	}
	return n > 0 ? STATUS_OK
	             : status_set(STATUS_UNSUPPORTED, "nothing is left of the run to check");
}

static enum status verify_step(const struct stack *stack, struct verdict *verdict)
{
	const struct stack_snapshot *snapshot = stack->snapshot;

	if (!snapshot)
		return status_set(STATUS_INVALID, "no snapshot was taken before the step");
	if (snapshot->count == 0)
		return status_set(STATUS_UNSUPPORTED, "nothing is left of the step to check");
	for (int i = 0; i < snapshot->count; i++) {
		struct check_result result = {0};
		enum status status = check_end(snapshot->checks[i], &result);

		take(verdict, snapshot->operations[i], &result);
		TRY(status);
	}
	return STATUS_OK;
}

enum status stack_verify(struct stack *stack, const struct context *ctx, int64_t min_rows,
                         uint64_t seed, struct accuracy *found)
{
	const enum pass pass = stack->shape.pass;
	struct call_list list;
	struct verdict verdict = {0};
	enum status status;

	if (pass == PASS_GENERATION || pass == PASS_THROUGHPUT) {
		status = verify_step(stack, &verdict);
	} else {
		status = list_calls(stack, ctx, &list);
		if (status == STATUS_OK)
			status = verify_run(stack, &list, min_rows, seed, &verdict);
		free(list.calls);
	}
	*found = (struct accuracy){verdict.worst.rel_err, verdict.worst.share};
	if (status == STATUS_OK && verdict.worst.name)
		status_set(STATUS_OK, "%.*s of %s, %s", (int)strcspn(verdict.worst.name, "|"),
		           verdict.worst.name, operation_name(verdict.operation),
		           verdict.worst.test);
	return status;
}

void stack_forget_snapshot(struct stack *stack)
{
	for (int i = 0; stack->snapshot && i < stack->snapshot->count; i++)
		check_free(stack->snapshot->checks[i]);
	free(stack->snapshot);
	stack->snapshot = NULL;
}

enum status stack_snapshot_state(struct stack *stack, uint64_t seed)
{
	const struct context ctx = {.device = stack->device};
	struct check_options options = {.rows = STEP_ROWS, .seed = seed};
	struct call_list list;
	enum status status = list_calls(stack, &ctx, &list);

	stack_forget_snapshot(stack);
	stack->snapshot = calloc(1, sizeof *stack->snapshot);
	if (!stack->snapshot || list.count > MAX_STEP_CALLS)
		status = status_set(STATUS_OOM, "no memory to verify with");
	for (int i = 0; i < list.count && status == STATUS_OK; i++) {
		const struct operation_call *call = &list.calls[i];
		struct stack_snapshot *s = stack->snapshot;

		if (is_end(call->operation) || is_lost(stack->device, &list, i, &options.ignored))
			continue;
		s->operations[s->count] = call->operation;
		status = check_begin(&s->checks[s->count++], stack->device, call->operation,
		                     &call->args, &options);
	}
	free(list.calls);
	return status;
}
