/* Names of operations and providers, and the dispatch from an operation to a kernel. */
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/operation.h"

const char *mask_name(enum mask mask)
{
	static const char *const names[] = {"causal", "window", "chunk", "full", "dilated"};

	return names[mask];
}

const char *decay_name(enum decay decay)
{
	static const char *const names[] = {"none", "constant", "scalar", "diagonal"};

	return names[decay];
}

const char *rule_name(enum rule rule)
{
	static const char *const names[] = {"plain", "bonus", "delta"};

	return names[rule];
}

static int operation_find(const char *name, size_t length)
{
	for (int i = 0; i < OP_COUNT; i++)
		if (strlen(operation_name(i)) == length &&
		    strncmp(operation_name(i), name, length) == 0)
			return i;
	return -1;
}

static bool provider_exists(const struct device *device, int operation, const char *provider)
{
	for (const struct kernel *k = device->kernels; k->run; k++)
		if ((operation < 0 || (int)k->operation == operation) &&
		    strcmp(k->provider, provider) == 0)
			return true;
	return false;
}

static enum status parse_one_choice(struct provider_choice *choice, struct device *device,
                                    const char *text, size_t length)
{
	const char *equals = memchr(text, '=', length);
	const char *provider = equals ? equals + 1 : text;
	size_t provider_length = length - (size_t)(provider - text);
	int operation = -1;

	if (choice->count == MAX_PROVIDER_CHOICES)
		return status_set(STATUS_INVALID, "--provider: more than %d choices",
		                  MAX_PROVIDER_CHOICES);
	if (equals) {
		operation = operation_find(text, (size_t)(equals - text));
		if (operation < 0)
			return status_set(STATUS_INVALID, "--provider: no operation '%.*s'",
			                  (int)(equals - text), text);
	}
	if (provider_length == 0 || provider_length >= sizeof choice->choice[0].provider)
		return status_set(STATUS_INVALID, "--provider: '%.*s' names no provider",
		                  (int)length, text);
	choice->choice[choice->count].operation = operation;
	snprintf(choice->choice[choice->count].provider, sizeof choice->choice[0].provider, "%.*s",
	         (int)provider_length, provider);
	if (!provider_exists(device, operation, choice->choice[choice->count].provider))
		return status_set(STATUS_INVALID, "--provider: backend %s has no %s%s'%s'",
		                  device->backend->name,
		                  operation < 0 ? "provider " : operation_name(operation),
		                  operation < 0 ? "" : " from ",
		                  choice->choice[choice->count].provider);
	choice->count++;
	return STATUS_OK;
}

enum status provider_choice_parse(struct provider_choice *choice, struct device *device,
                                  const char *text)
{
	choice->count = 0;
	while (*text) {
		size_t length = strcspn(text, ",");
		enum status status = parse_one_choice(choice, device, text, length);

		if (status != STATUS_OK)
			return status;
		text += length + (text[length] == ',');
	}
	return STATUS_OK;
}

/* The provider chosen for exactly this operation, or NULL. */
static const char *binding_choice(const struct provider_choice *choice, enum operation operation)
{
	for (int i = choice->count - 1; i >= 0; i--)
		if (choice->choice[i].operation == (int)operation)
			return choice->choice[i].provider;
	return NULL;
}

static const struct kernel *first_supporting(const struct context *ctx, enum operation operation,
                                             const void *args, const char *provider)
{
	const struct device *device = ctx->device;
	const char *why = NULL;

	for (const struct kernel *k = device->kernels; k->run; k++) {
		if (k->operation != operation || (provider && strcmp(k->provider, provider) != 0))
			continue;
		const char *unsupported = k->unsupported ? k->unsupported(device, args) : NULL;
		if (!unsupported)
			return k;
		/* That a library is missing is not why nothing else takes it. */
		if (!why || !device->others || k < device->others)
			why = unsupported;
	}
	status_set(STATUS_UNSUPPORTED, "%s%s%s on %s: %s", operation_name(operation),
	           provider ? " from " : "", provider ? provider : "", device->backend->name,
	           why ? why : "no kernel");
	return NULL;
}

const struct kernel *kernel_select(const struct context *ctx, enum operation operation,
                                   const void *args)
{
	const char *binding = binding_choice(&ctx->choice, operation);

	if (binding)
		return first_supporting(ctx, operation, args, binding);
	for (int i = 0; i < ctx->choice.count; i++) {
		if (ctx->choice.choice[i].operation >= 0)
			continue;
		const struct kernel *k =
		        first_supporting(ctx, operation, args, ctx->choice.choice[i].provider);
		if (k)
			return k;
	}
	return first_supporting(ctx, operation, args, NULL);
}

static enum status plan_add(struct kernel_plan *plan, enum operation operation,
                            const char *provider, struct cost cost)
{
	plan->total.flops += cost.flops;
	plan->total.bytes_read += cost.bytes_read;
	plan->total.bytes_written += cost.bytes_written;
	for (int i = 0; i < plan->n_operations; i++) {
		struct planned_operation *p = &plan->operations[i];

		if (p->operation == operation && p->provider == provider &&
		    memcmp(&p->cost, &cost, sizeof cost) == 0) {
			p->count++;
			return STATUS_OK;
		}
	}
	if (plan->n_operations == MAX_PLANNED_OPERATIONS)
		return status_set(STATUS_INVALID, "plan holds more than %d distinct operations",
		                  MAX_PLANNED_OPERATIONS);
	plan->operations[plan->n_operations++] =
	        (struct planned_operation){operation, provider, cost, 1};
	return STATUS_OK;
}

void context_range_push(const struct context *ctx, const char *name)
{
	if (ctx->ranges)
		ctx->device->backend->range_push(ctx->device, name);
}

void context_range_pop(const struct context *ctx)
{
	if (ctx->ranges)
		ctx->device->backend->range_pop(ctx->device);
}

static enum status list_add(struct call_list *list, enum operation operation,
                            const struct kernel *kernel, const void *args)
{
	if (list->count == list->capacity) {
		const int capacity = list->capacity ? 2 * list->capacity : 32;
		struct operation_call *grown =
		        realloc(list->calls, (size_t)capacity * sizeof *grown);

		if (!grown)
			return status_set(STATUS_OOM, "no memory for a list of operations");
		list->calls = grown;
		list->capacity = capacity;
	}
	struct operation_call *call = &list->calls[list->count++];
	call->operation = operation;
	call->kernel = kernel;
	memset(&call->args, 0, sizeof call->args);
	memcpy(&call->args, args, operation_describes(operation)->args_size);
	return STATUS_OK;
}

enum { ALIGNMENT = 256 };

static size_t aligned(size_t bytes)
{
	return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Bytes of the gradients of parameters, each aligned. */
static size_t gradient_bytes(const struct context *ctx, struct operand_list *list)
{
	size_t bytes = 0;

	for (int i = 0; i < list->count; i++)
		if (list->operand[i].role == ROLE_GRADIENT && operand_data(&list->operand[i]))
			bytes += aligned((size_t)operand_count(&list->operand[i]) *
			                 dtype_size(ctx->device->wide));
	return bytes;
}

/* Runs with gradients of parameters in the workspace, and adds them to where they belong. */
static enum status run_accumulating(struct context *ctx, const struct kernel *kernel,
                                    const void *args, size_t workspace)
{
	union any_args copy;
	struct operand_list list;
	void *sums[MAX_OPERANDS];
	char *place = (char *)ctx->workspace + aligned(workspace);

	memcpy(&copy, args, operation_describes(kernel->operation)->args_size);
	operation_describe(kernel->operation, &copy, &list);
	for (int i = 0; i < list.count; i++) {
		struct operand *o = &list.operand[i];

		sums[i] = o->role == ROLE_GRADIENT ? operand_data(o) : NULL;
		if (!sums[i])
			continue;
		operand_set(o, place);
		place += aligned((size_t)operand_count(o) * dtype_size(ctx->device->wide));
	}
	enum status status = kernel->run(ctx->device, &copy, ctx->workspace);
	for (int i = 0; i < list.count && status == STATUS_OK; i++)
		if (sums[i])
			status = ctx->device->backend->add(ctx->device,
			                                   operand_count(&list.operand[i]),
			                                   operand_data(&list.operand[i]), sums[i]);
	return status;
}

/* Bytes that kernel_run() wants for a kernel. */
static size_t workspace_of(const struct context *ctx, const struct kernel *kernel, const void *args)
{
	const size_t own = kernel->workspace ? kernel->workspace(ctx->device, args) : 0;
	union any_args copy;
	struct operand_list list;

	if (!ctx->accumulate)
		return own;
	memcpy(&copy, args, operation_describes(kernel->operation)->args_size);
	operation_describe(kernel->operation, &copy, &list);
	return aligned(own) + gradient_bytes(ctx, &list);
}

enum status kernel_run(struct context *ctx, enum operation operation, const void *args)
{
	const struct kernel *kernel = kernel_select(ctx, operation, args);
	enum status status = STATUS_OK;

	if (!kernel)
		return STATUS_UNSUPPORTED;
	ctx->ran[operation] = kernel->provider;
	const size_t workspace = workspace_of(ctx, kernel, args);
	if (ctx->plan) {
		if (workspace > ctx->plan->workspace_bytes)
			ctx->plan->workspace_bytes = workspace;
		if (ctx->list)
			status = list_add(ctx->list, operation, kernel, args);
		return status == STATUS_OK ? plan_add(ctx->plan, operation, kernel->provider,
		                                      kernel_cost(ctx->device, operation, args))
		                           : status;
	}
	if (workspace > ctx->workspace_bytes)
		return status_set(STATUS_INVALID,
		                  "%s from %s wants %zu bytes of workspace, has %zu",
		                  operation_name(operation), kernel->provider, workspace,
		                  ctx->workspace_bytes);
	context_range_push(ctx, operation_name(operation));
	if (ctx->accumulate)
		status = run_accumulating(ctx, kernel, args,
		                          kernel->workspace ? kernel->workspace(ctx->device, args)
		                                            : 0);
	else
		status = kernel->run(ctx->device, args, ctx->workspace);
	context_range_pop(ctx);
	return status;
}

size_t kernels_count(const struct kernel *kernels)
{
	size_t count = 0;

	while (kernels[count].run)
		count++;
	return count;
}

struct kernel *kernels_joined(const struct kernel *kernels, const struct kernel *const *more)
{
	static const struct kernel *const none[] = {NULL};
	size_t count = kernels_count(kernels);

	more = more ? more : none;
	for (int i = 0; more[i]; i++)
		count += kernels_count(more[i]);
	struct kernel *joined = calloc(count + 1, sizeof *joined);
	struct kernel *to = joined;
	for (const struct kernel *k = kernels; joined && k->run; k++)
		*to++ = *k;
	for (int i = 0; joined && more[i]; i++)
		for (const struct kernel *k = more[i]; k->run; k++)
			*to++ = *k;
	return joined;
}

bool kernel_is_first(const struct kernel *kernels, const struct kernel *kernel)
{
	for (const struct kernel *k = kernels; k != kernel; k++)
		if (k->operation == kernel->operation && strcmp(k->provider, kernel->provider) == 0)
			return false;
	return true;
}
