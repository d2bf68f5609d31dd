/* Names of operations and providers, and the dispatch from an operation to a kernel. */
#include "kernels/kernels.h"

#include <stdio.h>
#include <string.h>

static const char *const operation_names[OP_COUNT] = {
        [OP_NORM_LINEAR] = "norm_linear",
        [OP_NORM_LINEAR_BACKWARD] = "norm_linear_backward",
        [OP_LINEAR_RESIDUAL] = "linear_residual",
        [OP_LINEAR_RESIDUAL_BACKWARD] = "linear_residual_backward",
        [OP_ROTATE] = "rotate",
        [OP_ROTATE_BACKWARD] = "rotate_backward",
        [OP_ATTENTION] = "attention",
        [OP_ATTENTION_BACKWARD] = "attention_backward",
        [OP_ATTENTION_STEP] = "attention_step",
        [OP_RAT_SCAN] = "rat_scan",
        [OP_RAT_SCAN_BACKWARD] = "rat_scan_backward",
        [OP_RAT_STEP] = "rat_step",
        [OP_RECURRENCE] = "recurrence",
        [OP_RECURRENCE_BACKWARD] = "recurrence_backward",
        [OP_RECURRENCE_STEP] = "recurrence_step",
        [OP_MATRIX_RECURRENCE] = "matrix_recurrence",
        [OP_MATRIX_RECURRENCE_BACKWARD] = "matrix_recurrence_backward",
        [OP_MATRIX_RECURRENCE_STEP] = "matrix_recurrence_step",
        [OP_DECAY_GATE] = "decay_gate",
        [OP_DECAY_GATE_BACKWARD] = "decay_gate_backward",
        [OP_NORM_GATE] = "norm_gate",
        [OP_NORM_GATE_BACKWARD] = "norm_gate_backward",
        [OP_ROTATE_STEP] = "rotate_step",
        [OP_SHORT_CONV] = "short_conv",
        [OP_SHORT_CONV_BACKWARD] = "short_conv_backward",
        [OP_SHORT_CONV_STEP] = "short_conv_step",
        [OP_TIME_STEP] = "time_step",
        [OP_TIME_STEP_BACKWARD] = "time_step_backward",
        [OP_FORGET_GATE] = "forget_gate",
        [OP_FORGET_GATE_BACKWARD] = "forget_gate_backward",
        [OP_GATE_NORM] = "gate_norm",
        [OP_GATE_NORM_BACKWARD] = "gate_norm_backward",
        [OP_GELU] = "gelu",
        [OP_GELU_BACKWARD] = "gelu_backward",
        [OP_EMBEDDING] = "embedding",
        [OP_EMBEDDING_BACKWARD] = "embedding_backward",
        [OP_CROSS_ENTROPY] = "cross_entropy",
        [OP_ARGMAX] = "argmax",
};

const char *operation_name(enum operation operation)
{
	return operation < OP_COUNT ? operation_names[operation] : "unknown";
}

const char *mask_name(enum mask mask)
{
	static const char *const names[] = {"causal", "window", "chunk", "full"};

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
		if (strlen(operation_names[i]) == length &&
		    strncmp(operation_names[i], name, length) == 0)
			return i;
	return -1;
}

static bool provider_exists(const struct backend *backend, int operation, const char *provider)
{
	for (const struct kernel *k = backend->kernels; k->run; k++)
		if ((operation < 0 || (int)k->operation == operation) &&
		    strcmp(k->provider, provider) == 0)
			return true;
	return false;
}

static enum status parse_one_choice(struct provider_choice *choice, const struct backend *backend,
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
	if (!provider_exists(backend, operation, choice->choice[choice->count].provider))
		return status_set(
		        STATUS_INVALID, "--provider: backend %s has no %s%s'%s'", backend->name,
		        operation < 0 ? "provider " : operation_names[operation],
		        operation < 0 ? "" : " from ", choice->choice[choice->count].provider);
	choice->count++;
	return STATUS_OK;
}

enum status provider_choice_parse(struct provider_choice *choice, const struct backend *backend,
                                  const char *text)
{
	choice->count = 0;
	while (*text) {
		size_t length = strcspn(text, ",");
		enum status status = parse_one_choice(choice, backend, text, length);

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
	const char *why = "no kernel";

	for (const struct kernel *k = ctx->backend->kernels; k->run; k++) {
		if (k->operation != operation || (provider && strcmp(k->provider, provider) != 0))
			continue;
		const char *unsupported = k->unsupported ? k->unsupported(args) : NULL;
		if (!unsupported)
			return k;
		why = unsupported;
	}
	status_set(STATUS_UNSUPPORTED, "%s%s%s on %s: %s", operation_name(operation),
	           provider ? " from " : "", provider ? provider : "", ctx->backend->name, why);
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
		ctx->backend->range_push(name);
}

void context_range_pop(const struct context *ctx)
{
	if (ctx->ranges)
		ctx->backend->range_pop();
}

enum status kernel_run(struct context *ctx, enum operation operation, const void *args)
{
	const struct kernel *kernel = kernel_select(ctx, operation, args);
	enum status status;

	if (!kernel)
		return STATUS_UNSUPPORTED;
	ctx->ran[operation] = kernel->provider;
	size_t workspace = kernel->workspace ? kernel->workspace(args) : 0;
	if (ctx->plan) {
		if (workspace > ctx->plan->workspace_bytes)
			ctx->plan->workspace_bytes = workspace;
		return plan_add(ctx->plan, operation, kernel->provider,
		                kernel_cost(ctx->backend, operation, args));
	}
	if (workspace > ctx->workspace_bytes)
		return status_set(STATUS_INVALID,
		                  "%s from %s wants %zu bytes of workspace, has %zu",
		                  operation_name(operation), kernel->provider, workspace,
		                  ctx->workspace_bytes);
	context_range_push(ctx, operation_name(operation));
	status = kernel->run(args, ctx->workspace);
	context_range_pop(ctx);
	return status;
}

bool kernel_is_first(const struct kernel *kernels, const struct kernel *kernel)
{
	for (const struct kernel *k = kernels; k != kernel; k++)
		if (k->operation == kernel->operation && strcmp(k->provider, kernel->provider) == 0)
			return false;
	return true;
}
