#include "bench/golden_operation.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/operation.h"

/* The operation that golden files call `name`, and its variant; NO_OPERATION if there is none. */
static int find_operation(const char *name, const struct operation_form **variant)
{
	for (int op = 0; op < OP_COUNT; op++) {
		if (operation_describes((enum operation)op)->forward != NO_OPERATION)
			continue;
		*variant = operation_forms((enum operation)op);
		for (; (*variant)->name; ++*variant) {
			const struct operand names = {.name = (*variant)->golden};

			if (names.name && operand_is(&names, name))
				return op;
		}
	}
	return NO_OPERATION;
}

static int backward_of(int forward)
{
	for (int op = 0; op < OP_COUNT; op++)
		if (operation_describes((enum operation)op)->forward == forward)
			return op;
	return NO_OPERATION;
}

/* The file's tensor that an operand is, or NULL. */
static const struct safetensor *stored_operand(const struct golden_file *check,
                                               const struct operand *o)
{
	for (int i = 0; i < check->file.n_tensors; i++)
		if (operand_is(o, check->file.tensors[i].name))
			return &check->file.tensors[i];
	return NULL;
}

/* The sizes of the stored tensors. Which dimension is which size shows where the sizes asked for
 * are all different. */
static struct sizes stored_sizes(const struct golden_file *check, enum operation op,
                                 const struct operation_form *variant)
{
	struct sizes sizes = {.chunk = check->options->chunk}, probe = {.batch = 2,
	                                                                .seq_len = 3,
	                                                                .n_heads = 5,
	                                                                .d_k = 7,
	                                                                .d_v = 11,
	                                                                .width = 13};
	const int64_t *const asked[] = {&probe.batch, &probe.seq_len, &probe.n_heads,
	                                &probe.d_k,   &probe.d_v,     &probe.width};
	int64_t *const found[] = {&sizes.batch, &sizes.seq_len, &sizes.n_heads,
	                          &sizes.d_k,   &sizes.d_v,     &sizes.width};
	union any_args args = {0};
	struct operand_list list;

	operation_describes(op)->size(&args, &probe, variant);
	operation_describe(op, &args, &list);
	for (int i = 0; i < list.count; i++) {
		const struct operand *o = &list.operand[i];
		const struct safetensor *tensor = stored_operand(check, o);
		int d = golden_next_dim(OPERAND_DIMS, o->size, 0);

		for (int j = 0; tensor && j < tensor->n_dims && d < OPERAND_DIMS; j++) {
			for (size_t k = 0; k < sizeof found / sizeof *found; k++)
				if (o->size[d] == *asked[k])
					*found[k] = tensor->dims[j];
			d = golden_next_dim(OPERAND_DIMS, o->size, d + 1);
		}
	}
	return sizes;
}

/* Gives an operand that has no memory yet some, NaN or what the file stores. */
static enum status bind(struct golden_file *check, struct operand *o, void **memory)
{
	const struct safetensor *tensor = stored_operand(check, o);
	enum dtype dtype = operand_dtype(o, check->device);
	size_t bytes = (size_t)operand_count(o) * dtype_size(dtype);
	const float *values;

	if (operand_data(o) || o->role == ROLE_UNREAD || (o->optional && !tensor))
		return STATUS_OK;
	TRY(device_allocate(check->device, bytes, memory));
	TRY(device_fill(check->device, *memory, 0xff, bytes));
	operand_set(o, *memory);
	if (!operand_is_read(o))
		return STATUS_OK;
	if (!tensor)
		return status_set(STATUS_INVALID, "the file has no tensor '%s'", o->name);
	golden_mark(check, tensor->name);
	TRY(golden_floats(check, tensor->name, OPERAND_DIMS, o->size, &values));
	return device_upload_floats(check->device, dtype, *memory, values, (size_t)tensor->count);
}

static enum status compare_outputs(struct golden_file *check, const struct operand_list *list,
                                   bool gradient)
{
	for (int i = 0; i < list->count; i++) {
		const struct operand *o = &list->operand[i];
		const struct safetensor *tensor = stored_operand(check, o);
		const float *expected;
		float *actual;

		if (!tensor || !operand_is_written(o))
			continue;
		TRY(golden_floats(check, tensor->name, OPERAND_DIMS, o->size, &expected));
		TRY(golden_allocate(check, tensor->count, &actual));
		TRY(device_download_floats(check->device, operand_dtype(o, check->device), actual,
		                           operand_data(o), (size_t)tensor->count));
		golden_compare(check, tensor->name, tensor->name, gradient, actual, expected,
		               tensor->count);
	}
	return STATUS_OK;
}

/* Plans an operation's workspace, takes it, runs, and waits. */
static enum status run_operation(struct golden_file *check, enum operation operation,
                                 const void *args, void **workspace)
{
	struct context ctx = check->ctx;
	struct kernel_plan plan = {0};

	ctx.plan = &plan;
	TRY(kernel_run(&ctx, operation, args));
	ctx.plan = NULL;
	ctx.workspace_bytes = plan.workspace_bytes;
	TRY(device_allocate(check->device, ctx.workspace_bytes + 1, workspace));
	ctx.workspace = *workspace;
	TRY(kernel_run(&ctx, operation, args));
	return device_synchronize(check->device);
}

/* Runs an operation on the file's inputs, those operands of args apart that are bound already, and
 * compares its outputs. memory[MAX_OPERANDS + 1] is the caller's to release. */
static enum status run_and_compare(struct golden_file *check, enum operation op,
                                   union any_args *args, bool gradient, void **memory)
{
	struct operand_list list;

	operation_describe(op, args, &list);
	for (int i = 0; i < list.count; i++)
		TRY(bind(check, &list.operand[i], &memory[i]));
	TRY(run_operation(check, op, args, &memory[MAX_OPERANDS]));
	return compare_outputs(check, &list, gradient);
}

enum status golden_operation(struct golden_file *check)
{
	const char *name = safetensors_metadata(&check->file, "op");
	const struct operation_form *variant;
	int op = find_operation(name, &variant), backward;
	union any_args forward_args = {0}, args = {0};
	void *memory[2 * (MAX_OPERANDS + 1)] = {0};

	if (op == NO_OPERATION)
		return status_set(STATUS_UNSUPPORTED, "no operation '%.64s'", name);
	const struct description *d = operation_describes((enum operation)op);
	backward = backward_of(op);
	const struct sizes sizes = stored_sizes(check, (enum operation)op, variant);
	d->size(&forward_args, &sizes, variant);
	enum status status =
	        run_and_compare(check, (enum operation)op, &forward_args, false, memory);
	if (status == STATUS_OK && safetensors_find(&check->file, "do") &&
	    backward != NO_OPERATION) {
		memcpy(&args, &forward_args, d->args_size);
		status = run_and_compare(check, (enum operation)backward, &args, true,
		                         memory + MAX_OPERANDS + 1);
	}
	for (int i = 0; i < 2 * (MAX_OPERANDS + 1); i++)
		if (memory[i])
			device_release(check->device, memory[i]);
	return status;
}
