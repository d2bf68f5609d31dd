#include "bench/golden_check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/safetensors.h"
#include "layers/stack.h"

/* Bound on every size in the metadata: products of a few cannot overflow. */
enum { MAX_SIZE = 1 << 20 };

static const double tolerance_fp32 = 2e-5, tolerance_bf16 = 1.5e-2, tolerance_bf16_gradient = 3e-2;

/* One check in progress. */
struct check {
	const struct backend *backend;
	const struct golden_options *options;
	struct safetensors file;
	bool *used; /* [file.n_tensors]: an input or a parameter, or compared */
	struct context ctx;
	struct golden_report *report;
};

const char *golden_verdict_name(enum golden_verdict verdict)
{
	static const char *const names[] = {"pass", "MISS", "unsupported", "NOT COMPARED"};

	return names[verdict];
}

const struct golden_result *golden_find(const struct golden_report *report, const char *tensor)
{
	for (int i = 0; i < report->n_results; i++)
		if (strcmp(report->results[i].tensor, tensor) == 0)
			return &report->results[i];
	return NULL;
}

/* -------- tensors of the file, and verdicts about them -------- */

static bool has_prefix(const char *text, const char *prefix)
{
	return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* Notes that a tensor is an input, a parameter, or compared. */
static void mark(struct check *check, const char *name)
{
	const struct safetensor *tensor = safetensors_find(&check->file, name);

	if (tensor)
		check->used[tensor - check->file.tensors] = true;
}

/* A tensor that must be there, with `count` elements of that type. */
static enum status require(const struct check *check, const char *name,
                           enum safetensors_dtype dtype, int64_t count,
                           const struct safetensor **tensor)
{
	*tensor = safetensors_find(&check->file, name);
	if (!*tensor)
		return status_set(STATUS_INVALID, "the file has no tensor '%s'", name);
	if ((*tensor)->dtype != dtype)
		return status_set(STATUS_INVALID, "tensor '%s' has the wrong dtype", name);
	if ((*tensor)->count != count)
		return status_set(STATUS_INVALID, "tensor '%s' has %lld elements, not %lld", name,
		                  (long long)(*tensor)->count, (long long)count);
	return STATUS_OK;
}

static enum status require_floats(const struct check *check, const char *name, int64_t count,
                                  const float **values)
{
	const struct safetensor *tensor;
	enum status status = require(check, name, SAFETENSORS_F32, count, &tensor);

	*values = status == STATUS_OK ? tensor->data.f32 : NULL;
	return status;
}

static void add_result(struct check *check, const char *tensor, double rel_err, double tolerance,
                       enum golden_verdict verdict)
{
	struct golden_report *report = check->report;

	report->n_failed += verdict == GOLDEN_MISS || verdict == GOLDEN_NOT_COMPARED;
	if (report->n_results == GOLDEN_MAX_RESULTS)
		return;
	struct golden_result *result = &report->results[report->n_results++];
	*result = (struct golden_result){
	        .rel_err = rel_err, .tolerance = tolerance, .verdict = verdict};
	snprintf(result->tensor, sizeof result->tensor, "%s", tensor);
}

/*
 * Notes ||actual - expected|| / ||expected|| for the stored tensor `name`, less
 * the tensor `residual` unless that is NULL. A NaN anywhere is a miss.
 */
static void compare(struct check *check, const char *name, const char *residual, bool gradient,
                    const float *actual, const float *expected, int64_t count)
{
	double difference = 0, norm = 0, tolerance = tolerance_fp32;

	for (int64_t i = 0; i < count; i++) {
		double d = (double)actual[i] - (double)expected[i];

		difference += d * d;
		norm += (double)expected[i] * (double)expected[i];
	}
	if (check->backend->activation == DTYPE_BF16)
		tolerance = gradient ? tolerance_bf16_gradient : tolerance_bf16;
	double rel_err = difference == 0 && norm == 0 ? 0 : sqrt(difference / norm);
	char label[96];
	snprintf(label, sizeof label, "%s%s%s", name, residual ? " - " : "",
	         residual ? residual : "");
	mark(check, name);
	add_result(check, label, rel_err, tolerance,
	           rel_err <= tolerance ? GOLDEN_PASS : GOLDEN_MISS);
}

/* Notes every tensor that nothing has used so far. */
static void add_unused(struct check *check, enum golden_verdict verdict)
{
	for (int i = 0; i < check->file.n_tensors; i++) {
		if (check->used[i])
			continue;
		check->used[i] = true;
		add_result(check, check->file.tensors[i].name, NAN, NAN, verdict);
	}
}

/* -------- metadata -------- */

/* What is built into the blocks; a file that says otherwise is no test of them. */
static enum status check_fixed_metadata(const struct check *check)
{
	static const struct safetensors_metadata fixed[] = {
	        {"rope_base", "10000"},    {"ffn_act", "gelu_erf"},
	        {"expand_k", "0.5"},       {"expand_v", "1.0"},
	        {"out_norm_eps", "1e-05"}, {"gate_logit_normalizer", "16"},
	        {"norm_eps", "1e-06"},     {"gate_low_rank_dim", "16"},
	};

	for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
		const char *value = safetensors_metadata(&check->file, fixed[i].key);

		if (value && strcmp(value, fixed[i].value) != 0)
			return status_set(STATUS_INVALID, "%s is %.32s, but only %s is built in",
			                  fixed[i].key, value, fixed[i].value);
	}
	return STATUS_OK;
}

/* The integer that metadata `key` holds, or `absent`; negative if it holds anything else. */
static int64_t metadata_integer(const struct check *check, const char *key, int64_t absent)
{
	const char *text = safetensors_metadata(&check->file, key);
	char *end;

	if (!text)
		return absent;
	long long value = strtoll(text, &end, 10);
	return *text == '\0' || *end != '\0' || value > MAX_SIZE ? -1 : value;
}

/* Our name for a block, from the first `length` characters of the reference's. */
static void block_name(const char *reference, size_t length, char name[32])
{
	snprintf(name, 32, "%.*s", (int)length, reference);
	if (strcmp(name, "rnn") == 0)
		snprintf(name, 32, "recurrence");
	else if (strcmp(name, "local_attention") == 0)
		snprintf(name, 32, "swa");
}

/* A pattern for the stack ("rat,swa") from the reference's name ("rat-swa"). */
static void block_pattern(const char *reference, char *pattern, size_t size)
{
	size_t used = 0;

	pattern[0] = '\0';
	while (*reference && used < size) {
		size_t length = strcspn(reference, "-");
		char name[32];

		block_name(reference, length, name);
		used += (size_t)snprintf(pattern + used, size - used, "%s%s", used ? "," : "",
		                         name);
		reference += length + (reference[length] == '-');
	}
}

static struct stack_options stack_options_of(const struct check *check, const char *pattern)
{
	const char *position = safetensors_metadata(&check->file, "position");
	int64_t d_model = metadata_integer(check, "d_model", 0);
	int64_t d_head = metadata_integer(check, "d_head", 0);

	return (struct stack_options){
	        .pattern = pattern,
	        .d_model = d_model,
	        .n_heads = metadata_integer(check, "n_heads", d_head > 0 ? d_model / d_head : 0),
	        .chunk = metadata_integer(check, "chunk_size", 0),
	        .window = metadata_integer(check, "window", 0),
	        .groups = metadata_integer(check, "n_groups", 0),
	        .rope = !position || strcmp(position, "none") != 0,
	        .prenorm = true,
	        .residual = true,
	        .norm_eps = 1e-6f,
	};
}

/* -------- layers and models -------- */

/* Inputs and parameters need no verdict, whether or not the backend gets to use them. */
static void mark_inputs(struct check *check)
{
	mark(check, "x");
	mark(check, "dy");
	mark(check, "tokens");
	for (int i = 0; i < check->file.n_tensors; i++)
		if (has_prefix(check->file.tensors[i].name, "param."))
			check->used[i] = true;
}

/*
 * Takes the stack's memory for training or, where the backend has no backward
 * pass, for prefill; its outputs are NaN until something writes them.
 */
static enum status prepare_stack(struct check *check, struct stack *stack,
                                 struct layer_shape *shape)
{
	enum status status = stack_allocate(stack, &check->ctx, shape);

	if (status == STATUS_UNSUPPORTED && shape->pass == PASS_TRAIN) {
		shape->pass = PASS_PREFILL;
		shape->capacity = shape->seq_len;
		status = stack_allocate(stack, &check->ctx, shape);
	}
	if (status == STATUS_OK)
		status = stack_initialize(stack, 1);
	if (status == STATUS_OK)
		status = stack_poison(stack);
	return status;
}

static enum status set_parameters(struct check *check, struct stack *stack)
{
	enum status status = STATUS_OK;

	for (int i = 0; status == STATUS_OK && i < check->file.n_tensors; i++) {
		const struct safetensor *tensor = &check->file.tensors[i];
		const float *values;

		if (!has_prefix(tensor->name, "param."))
			continue;
		status = require_floats(check, tensor->name, tensor->count, &values);
		if (status == STATUS_OK)
			status = stack_set_named(stack, tensor->name + strlen("param."), values,
			                         tensor->count);
	}
	return status;
}

static enum status compare_parameter_gradients(struct check *check, struct stack *stack)
{
	enum status status = STATUS_OK;

	for (int i = 0; status == STATUS_OK && i < check->file.n_tensors; i++) {
		const struct safetensor *tensor = &check->file.tensors[i];
		const float *expected;
		float *actual;

		if (!has_prefix(tensor->name, "grad."))
			continue;
		status = require_floats(check, tensor->name, tensor->count, &expected);
		if (status != STATUS_OK)
			break;
		actual = malloc((size_t)tensor->count * sizeof *actual + 1);
		if (!actual)
			return status_set(STATUS_OOM, "no memory for '%s'", tensor->name);
		status = stack_get_named_gradient(stack, tensor->name + strlen("grad."), actual,
		                                  tensor->count);
		if (status == STATUS_OK)
			compare(check, tensor->name, NULL, true, actual, expected, tensor->count);
		free(actual);
	}
	return status;
}

/*
 * Compares an activation of the stack with the stored tensor of that name.
 * Where the stored one contains `residual` (else NULL), the parts without it are
 * compared: theirs less the residual, and ours too if our layer has one.
 */
static enum status compare_activation(struct check *check, const struct stack *stack,
                                      const char *name, const char *residual, const void *device,
                                      int64_t count)
{
	bool subtract = residual && stack->layers[0].residual;
	const float *stored, *shortcut = NULL;
	enum status status = require_floats(check, name, count, &stored);

	if (status == STATUS_OK && residual)
		status = require_floats(check, residual, count, &shortcut);
	if (status != STATUS_OK)
		return status;
	float *actual = malloc(2 * (size_t)count * sizeof *actual + 1);
	if (!actual)
		return status_set(STATUS_OOM, "no memory for '%s'", name);
	float *expected = actual + count;
	status = backend_download_floats(check->backend, check->backend->activation, actual, device,
	                                 (size_t)count);
	for (int64_t i = 0; i < count; i++) {
		expected[i] = stored[i] - (shortcut ? shortcut[i] : 0);
		actual[i] -= subtract ? shortcut[i] : 0;
	}
	if (status == STATUS_OK)
		compare(check, name, residual, strcmp(name, "dx") == 0, actual, expected, count);
	free(actual);
	return status;
}

/* [B, T, D] of a layer's or [B, T] of a model's input. */
static enum status input_shape(struct check *check, const char *name, int n_dims,
                               struct layer_shape *shape)
{
	const struct safetensor *input = safetensors_find(&check->file, name);

	if (!input || input->n_dims != n_dims || input->count < 1)
		return status_set(STATUS_INVALID, "the file has no tensor '%s' of %d dimensions",
		                  name, n_dims);
	mark_inputs(check);
	*shape = (struct layer_shape){
	        .pass = PASS_TRAIN, .batch = input->dims[0], .seq_len = input->dims[1]};
	return STATUS_OK;
}

static enum status upload(struct check *check, const char *name, int64_t count, void *device)
{
	const float *values;
	enum status status = require_floats(check, name, count, &values);

	if (status != STATUS_OK)
		return status;
	return backend_upload_floats(check->backend, check->backend->activation, device, values,
	                             (size_t)count);
}

static enum status run_layer(struct check *check, struct stack *stack, struct layer_shape *shape,
                             bool theirs_has_residual)
{
	int64_t count = shape->batch * shape->seq_len * stack->d_model;
	enum status status = prepare_stack(check, stack, shape);

	if (status == STATUS_OK)
		status = set_parameters(check, stack);
	if (status == STATUS_OK)
		status = upload(check, "x", count, stack->x);
	if (status == STATUS_OK && shape->pass == PASS_TRAIN)
		status = upload(check, "dy", count, stack->dy);
	if (status == STATUS_OK)
		status = stack_forward(stack, &check->ctx);
	if (status == STATUS_OK)
		status = compare_activation(check, stack, "y", theirs_has_residual ? "x" : NULL,
		                            stack->y, count);
	if (status == STATUS_OK && shape->pass != PASS_TRAIN)
		status = status_set(STATUS_UNSUPPORTED, "no backward pass");
	if (status == STATUS_OK)
		status = stack_backward(stack, &check->ctx);
	if (status == STATUS_OK)
		status = compare_activation(check, stack, "dx", theirs_has_residual ? "dy" : NULL,
		                            stack->dx, count);
	if (status == STATUS_OK)
		status = compare_parameter_gradients(check, stack);
	return status;
}

/* The layer of the file. In bf16 it runs without its residual: y - x of a rounded y is noise. */
static enum status check_layer(struct check *check)
{
	const char *block = safetensors_metadata(&check->file, "block");
	char pattern[32];
	struct stack stack = {0};
	struct layer_shape shape;
	enum status status = input_shape(check, "x", 3, &shape);

	block_name(block, strlen(block), pattern);
	if (status != STATUS_OK)
		return status;
	struct stack_options options = stack_options_of(check, pattern);
	bool theirs_has_residual = strcmp(pattern, "gla") != 0;
	options.prenorm = theirs_has_residual;
	options.residual = theirs_has_residual && check->backend->activation == DTYPE_F32;
	status = stack_configure(&stack, check->backend, &options);
	if (status == STATUS_OK)
		status = run_layer(check, &stack, &shape, theirs_has_residual);
	stack_release(&stack);
	return status;
}

/* The file's tokens as int32; the caller frees them. */
static enum status read_tokens(struct check *check, const struct layer_shape *shape, int64_t vocab,
                               int32_t **tokens)
{
	int64_t count = shape->batch * shape->seq_len;
	const struct safetensor *stored;
	enum status status = require(check, "tokens", SAFETENSORS_I64, count, &stored);

	*tokens = NULL;
	if (status != STATUS_OK)
		return status;
	*tokens = malloc((size_t)count * sizeof **tokens);
	if (!*tokens)
		return status_set(STATUS_OOM, "no memory for %lld tokens", (long long)count);
	for (int64_t i = 0; i < count; i++) {
		int64_t token = stored->data.i64[i];

		if (token < 0 || token >= vocab)
			return status_set(STATUS_INVALID, "token %lld is not below vocab_size %lld",
			                  (long long)token, (long long)vocab);
		(*tokens)[i] = (int32_t)token;
	}
	return STATUS_OK;
}

static enum status train_model(struct check *check, struct stack *stack, int64_t n_logits)
{
	const float *expected;
	float loss = NAN;
	enum status status = stack_forward(stack, &check->ctx);

	if (status == STATUS_OK)
		status = compare_activation(check, stack, "logits", NULL, stack->logits, n_logits);
	if (status == STATUS_OK)
		status = stack_backward(stack, &check->ctx);
	if (status == STATUS_OK)
		status = require_floats(check, "loss", 1, &expected);
	if (status == STATUS_OK)
		status = check->backend->download(&loss, stack->loss, sizeof loss);
	if (status != STATUS_OK)
		return status;
	compare(check, "loss", NULL, false, &loss, expected, 1);
	return compare_parameter_gradients(check, stack);
}

/* Rows of the logits by prefill, which yields those of the last position alone: one prompt after
 * another, each a token longer. */
static enum status prefill_model(struct check *check, struct stack *stack, struct layer_shape shape,
                                 const int32_t *tokens, float *logits)
{
	int64_t vocab = stack->vocab, seq_len = shape.seq_len;
	int32_t *prompt = malloc((size_t)(shape.batch * seq_len) * sizeof *prompt);
	float *last = malloc((size_t)(shape.batch * vocab) * sizeof *last);
	enum status status = prompt && last ? STATUS_OK : status_set(STATUS_OOM, "no memory");

	for (int64_t t = 1; status == STATUS_OK && t <= seq_len; t++) {
		stack_release(stack);
		shape.seq_len = t;
		shape.capacity = seq_len;
		for (int64_t b = 0; b < shape.batch; b++)
			memcpy(prompt + b * t, tokens + b * seq_len, (size_t)t * sizeof *prompt);
		status = prepare_stack(check, stack, &shape);
		if (status == STATUS_OK)
			status = set_parameters(check, stack);
		if (status == STATUS_OK)
			status = stack_set_tokens(stack, prompt);
		if (status == STATUS_OK)
			status = stack_forward(stack, &check->ctx);
		if (status == STATUS_OK)
			status = backend_download_floats(check->backend, check->backend->activation,
			                                 last, stack->logits,
			                                 (size_t)(shape.batch * vocab));
		for (int64_t b = 0; status == STATUS_OK && b < shape.batch; b++)
			memcpy(logits + (b * seq_len + t - 1) * vocab, last + b * vocab,
			       (size_t)vocab * sizeof *last);
	}
	free(prompt);
	free(last);
	return status;
}

static enum status prefill_and_compare(struct check *check, struct stack *stack,
                                       const struct layer_shape *shape, const int32_t *tokens,
                                       int64_t n_logits)
{
	const float *expected;
	enum status status = require_floats(check, "logits", n_logits, &expected);

	if (status != STATUS_OK)
		return status;
	float *logits = malloc((size_t)n_logits * sizeof *logits);
	if (!logits)
		return status_set(STATUS_OOM, "no memory for the logits");
	status = prefill_model(check, stack, *shape, tokens, logits);
	if (status == STATUS_OK) {
		compare(check, "logits", NULL, false, logits, expected, n_logits);
		status = status_set(STATUS_UNSUPPORTED, "no backward pass");
	}
	free(logits);
	return status;
}

static enum status run_model(struct check *check, struct stack *stack, struct layer_shape *shape)
{
	int64_t n_logits = shape->batch * shape->seq_len * stack->vocab;
	int32_t *tokens;
	enum status status = read_tokens(check, shape, stack->vocab, &tokens);

	if (status == STATUS_OK)
		status = prepare_stack(check, stack, shape);
	if (status == STATUS_OK)
		status = set_parameters(check, stack);
	if (status == STATUS_OK)
		status = stack_set_tokens(stack, tokens);
	if (status == STATUS_OK)
		status = shape->pass == PASS_TRAIN
		                 ? train_model(check, stack, n_logits)
		                 : prefill_and_compare(check, stack, shape, tokens, n_logits);
	free(tokens);
	return status;
}

static enum status check_model(struct check *check)
{
	char pattern[128];
	struct stack stack = {0};
	struct layer_shape shape;
	enum status status = input_shape(check, "tokens", 2, &shape);

	if (status != STATUS_OK)
		return status;
	block_pattern(safetensors_metadata(&check->file, "model"), pattern, sizeof pattern);
	struct stack_options options = stack_options_of(check, pattern);
	options.n_layers = metadata_integer(check, "n_layers", 0);
	options.vocab = metadata_integer(check, "vocab_size", 0);
	options.ffn = true;
	if (options.vocab < 1 || metadata_integer(check, "d_ffn", -1) != 4 * options.d_model)
		return status_set(STATUS_INVALID, "vocab_size is missing, or d_ffn not 4 d_model");
	status = stack_configure(&stack, check->backend, &options);
	if (status == STATUS_OK)
		status = run_model(check, &stack, &shape);
	stack_release(&stack);
	return status;
}

/* -------- operations -------- */

/* A tensor of an operation: its name in the file, and where it is on the device. */
struct slot {
	const char *name; /* NULL: this operation has no such tensor */
	enum { INPUT, OUTPUT, GRADIENT } role;
	bool fp32;     /* whatever the activations are */
	bool optional; /* exists only if the file stores it */
	int64_t count;
	void *memory;
};

static enum status open_slot(struct check *check, struct slot *slot)
{
	const struct safetensor *stored;
	enum dtype dtype = slot->fp32 ? DTYPE_F32 : check->backend->activation;
	size_t bytes = (size_t)slot->count * dtype_size(dtype);
	enum status status;

	if (!slot->name || (slot->optional && !safetensors_find(&check->file, slot->name)))
		return STATUS_OK;
	status = check->backend->allocate(bytes, &slot->memory);
	if (status == STATUS_OK)
		status = check->backend->fill(slot->memory, 0xff, bytes);
	if (status != STATUS_OK || slot->role != INPUT)
		return status;
	mark(check, slot->name);
	status = require(check, slot->name, SAFETENSORS_F32, slot->count, &stored);
	if (status == STATUS_OK)
		status = backend_upload_floats(check->backend, dtype, slot->memory,
		                               stored->data.f32, (size_t)slot->count);
	return status;
}

static enum status open_slots(struct check *check, struct slot *slots, int n_slots)
{
	enum status status = STATUS_OK;

	for (int i = 0; status == STATUS_OK && i < n_slots; i++)
		status = open_slot(check, &slots[i]);
	return status;
}

static void close_slots(const struct check *check, const struct slot *slots, int n_slots)
{
	for (int i = 0; i < n_slots; i++)
		if (slots[i].memory)
			check->backend->release(slots[i].memory);
}

/* Compares those slots of a role that the file stores. */
static enum status compare_slots(struct check *check, const struct slot *slots, int n_slots,
                                 int role)
{
	enum status status = STATUS_OK;

	for (int i = 0; status == STATUS_OK && i < n_slots; i++) {
		const struct slot *slot = &slots[i];
		const float *expected;

		if (!slot->memory || (int)slot->role != role ||
		    !safetensors_find(&check->file, slot->name))
			continue;
		status = require_floats(check, slot->name, slot->count, &expected);
		if (status != STATUS_OK)
			break;
		float *actual = malloc((size_t)slot->count * sizeof *actual + 1);
		if (!actual)
			return status_set(STATUS_OOM, "no memory for '%s'", slot->name);
		status = backend_download_floats(
		        check->backend, slot->fp32 ? DTYPE_F32 : check->backend->activation, actual,
		        slot->memory, (size_t)slot->count);
		if (status == STATUS_OK)
			compare(check, slot->name, NULL, role == GRADIENT, actual, expected,
			        slot->count);
		free(actual);
	}
	return status;
}

/* Plans an operation's workspace, takes it, runs, waits, and gives it back. */
static enum status run_operation(struct check *check, enum operation operation, const void *args)
{
	struct context *ctx = &check->ctx;
	struct kernel_plan plan = {0};
	enum status status;

	ctx->plan = &plan;
	status = kernel_run(ctx, operation, args);
	ctx->plan = NULL;
	if (status != STATUS_OK)
		return status;
	ctx->workspace_bytes = plan.workspace_bytes;
	status = check->backend->allocate(ctx->workspace_bytes + 1, &ctx->workspace);
	if (status != STATUS_OK)
		return status;
	status = kernel_run(ctx, operation, args);
	if (status == STATUS_OK)
		status = check->backend->synchronize();
	check->backend->release(ctx->workspace);
	ctx->workspace = NULL;
	ctx->workspace_bytes = 0;
	return status;
}

/* Runs the forward pass and compares; then, if the file has the gradients of one, the backward. */
static enum status run_both_passes(struct check *check, const struct slot *slots, int n_slots,
                                   enum operation forward, const void *args,
                                   enum operation backward, const void *backward_args)
{
	enum status status = run_operation(check, forward, args);

	if (status == STATUS_OK)
		status = compare_slots(check, slots, n_slots, OUTPUT);
	if (status != STATUS_OK || !safetensors_find(&check->file, "do"))
		return status;
	status = run_operation(check, backward, backward_args);
	if (status == STATUS_OK)
		status = compare_slots(check, slots, n_slots, GRADIENT);
	return status;
}

/* A packed [B, T, H, d] tensor. */
static struct view packed(void *data, int64_t seq_len, int64_t n_heads, int64_t d)
{
	return (struct view){data, seq_len * n_heads * d, n_heads * d, d};
}

/* The operations that are forms of the matrix-state recurrence. */
struct matrix_form {
	const char *op;
	enum decay decay;
	enum rule rule;
	const char *log_decay, *dlog_decay; /* names in the file */
};

static const struct matrix_form matrix_forms[] = {
        {"linear_attention", DECAY_NONE, RULE_PLAIN, NULL, NULL},
        {"retention", DECAY_CONSTANT, RULE_PLAIN, NULL, NULL},
        {"scalar_decay", DECAY_SCALAR, RULE_PLAIN, "g", "dg"},
        {"gla", DECAY_DIAGONAL, RULE_PLAIN, "gk", "dgk"},
        {"gla_strong_decay", DECAY_DIAGONAL, RULE_PLAIN, "gk", "dgk"},
        {"rwkv6", DECAY_DIAGONAL, RULE_BONUS, "w", "dw"},
        {"delta_rule", DECAY_NONE, RULE_DELTA, NULL, NULL},
        {"gated_delta_rule", DECAY_SCALAR, RULE_DELTA, "g", "dg"},
};

/* What the slots of a matrix-state recurrence hold. */
enum matrix_slot { Q, K, V, G, U, BETA, H0, O, H1, DO, DQ, DK, DV, DG, DU, DBETA, DH0, N_MATRIX };

/* Its sizes: those of the stored q and v, which name all. */
static enum status matrix_sizes(const struct check *check, struct matrix_recurrence_args *sizes)
{
	const struct safetensor *q = safetensors_find(&check->file, "q");
	const struct safetensor *v = safetensors_find(&check->file, "v");

	if (!q || !v || q->n_dims != 4 || v->n_dims != 4 || q->count < 1 || v->count < 1)
		return status_set(STATUS_INVALID, "the file has no q and v of 4 dimensions");
	*sizes = (struct matrix_recurrence_args){
	        .batch = q->dims[0],
	        .seq_len = q->dims[1],
	        .n_heads = q->dims[2],
	        .d_k = q->dims[3],
	        .d_v = v->dims[3],
	        .chunk = check->options->chunk,
	        .scale = 1 / sqrtf((float)q->dims[3]),
	};
	return STATUS_OK;
}

static void matrix_slots(const struct matrix_form *form, const struct matrix_recurrence_args *sizes,
                         bool trains, struct slot slots[N_MATRIX])
{
	int64_t rows = sizes->batch * sizes->seq_len * sizes->n_heads;
	int64_t keys = rows * sizes->d_k, values = rows * sizes->d_v;
	int64_t decays = form->decay == DECAY_DIAGONAL ? keys : rows;
	int64_t bonus = sizes->n_heads * sizes->d_k;
	int64_t state = sizes->batch * sizes->n_heads * sizes->d_k * sizes->d_v;
	const char *u = form->rule == RULE_BONUS ? "u" : NULL;
	const char *beta = form->rule == RULE_DELTA ? "beta" : NULL;

	slots[Q] = (struct slot){"q", INPUT, false, false, keys, NULL};
	slots[K] = (struct slot){"k", INPUT, false, false, keys, NULL};
	slots[V] = (struct slot){"v", INPUT, false, false, values, NULL};
	slots[G] = (struct slot){form->log_decay, INPUT, false, false, decays, NULL};
	slots[U] = (struct slot){u, INPUT, true, false, bonus, NULL};
	slots[BETA] = (struct slot){beta, INPUT, false, false, rows, NULL};
	slots[H0] = (struct slot){"h0", INPUT, true, true, state, NULL};
	slots[O] = (struct slot){"o", OUTPUT, false, false, values, NULL};
	slots[H1] = (struct slot){"final_state", OUTPUT, true, true, state, NULL};
	if (!trains)
		return;
	slots[DO] = (struct slot){"do", INPUT, false, false, values, NULL};
	slots[DQ] = (struct slot){"dq", GRADIENT, false, false, keys, NULL};
	slots[DK] = (struct slot){"dk", GRADIENT, false, false, keys, NULL};
	slots[DV] = (struct slot){"dv", GRADIENT, false, false, values, NULL};
	slots[DG] = (struct slot){form->dlog_decay, GRADIENT, false, false, decays, NULL};
	slots[DU] = (struct slot){u ? "du" : NULL, GRADIENT, true, false, bonus, NULL};
	slots[DBETA] = (struct slot){beta ? "dbeta" : NULL, GRADIENT, false, false, rows, NULL};
	slots[DH0] = (struct slot){"dh0", GRADIENT, true, true, state, NULL};
}

/* The arguments of both passes, from sizes and slots. */
static struct matrix_recurrence_backward_args matrix_args(const struct matrix_form *form,
                                                          struct matrix_recurrence_args forward,
                                                          const struct slot *slots)
{
	int64_t t = forward.seq_len, h = forward.n_heads, d_k = forward.d_k, d_v = forward.d_v;
	int64_t d_decay = form->decay == DECAY_DIAGONAL ? d_k : 1;

	forward.decay = form->decay;
	forward.rule = form->rule;
	forward.q = packed(slots[Q].memory, t, h, d_k);
	forward.k = packed(slots[K].memory, t, h, d_k);
	forward.v = packed(slots[V].memory, t, h, d_v);
	forward.log_decay = packed(slots[G].memory, t, h, d_decay);
	forward.bonus = slots[U].memory;
	forward.beta = packed(slots[BETA].memory, t, h, 1);
	forward.h0 = slots[H0].memory;
	forward.out = packed(slots[O].memory, t, h, d_v);
	forward.final_state = slots[H1].memory;
	return (struct matrix_recurrence_backward_args){
	        .forward = forward,
	        .dout = packed(slots[DO].memory, t, h, d_v),
	        .dq = packed(slots[DQ].memory, t, h, d_k),
	        .dk = packed(slots[DK].memory, t, h, d_k),
	        .dv = packed(slots[DV].memory, t, h, d_v),
	        .dlog_decay = packed(slots[DG].memory, t, h, d_decay),
	        .dbeta = packed(slots[DBETA].memory, t, h, 1),
	        .dbonus = slots[DU].memory,
	        .dh0 = slots[DH0].memory,
	};
}

static enum status check_matrix_recurrence(struct check *check, const struct matrix_form *form)
{
	struct slot slots[N_MATRIX] = {0};
	struct matrix_recurrence_args sizes;
	enum status status = matrix_sizes(check, &sizes);

	if (status != STATUS_OK)
		return status;
	matrix_slots(form, &sizes, safetensors_find(&check->file, "do") != NULL, slots);
	status = open_slots(check, slots, N_MATRIX);
	if (status == STATUS_OK) {
		struct matrix_recurrence_backward_args args = matrix_args(form, sizes, slots);

		status = run_both_passes(check, slots, N_MATRIX, OP_MATRIX_RECURRENCE,
		                         &args.forward, OP_MATRIX_RECURRENCE_BACKWARD, &args);
	}
	close_slots(check, slots, N_MATRIX);
	return status;
}

/* What the slots of HGRN's vector recurrence hold. */
enum vector_slot { XX, XG, XH0, XO, XH1, XDO, XDX, XDG, XDH0, N_VECTOR };

static struct recurrence_backward_args vector_args(const struct safetensor *x,
                                                   const struct slot *slots)
{
	int64_t t = x->dims[1], d = x->dims[2];

	return (struct recurrence_backward_args){
	        .forward = {.batch = x->dims[0],
	                    .seq_len = t,
	                    .d_model = d,
	                    .form = GATE_LOG_DECAY,
	                    .x = packed(slots[XX].memory, t, 1, d),
	                    .gate = packed(slots[XG].memory, t, 1, d),
	                    .h0 = slots[XH0].memory,
	                    .out = packed(slots[XO].memory, t, 1, d),
	                    .h_final = slots[XH1].memory},
	        .dout = packed(slots[XDO].memory, t, 1, d),
	        .dx = packed(slots[XDX].memory, t, 1, d),
	        .dgate = packed(slots[XDG].memory, t, 1, d),
	        .dh0 = slots[XDH0].memory,
	};
}

static enum status check_vector_recurrence(struct check *check)
{
	const struct safetensor *x = safetensors_find(&check->file, "x");

	if (!x || x->n_dims != 3 || x->count < 1)
		return status_set(STATUS_INVALID, "the file has no x of 3 dimensions");
	bool trains = safetensors_find(&check->file, "do") != NULL;
	int64_t count = x->count, state = x->dims[0] * x->dims[2];
	struct slot slots[N_VECTOR] = {
	        [XX] = {"x", INPUT, false, false, count, NULL},
	        [XG] = {"g", INPUT, false, false, count, NULL},
	        [XH0] = {"h0", INPUT, true, true, state, NULL},
	        [XO] = {"o", OUTPUT, false, false, count, NULL},
	        [XH1] = {"final_state", OUTPUT, true, true, state, NULL},
	        [XDO] = {trains ? "do" : NULL, INPUT, false, false, count, NULL},
	        [XDX] = {trains ? "dx" : NULL, GRADIENT, false, false, count, NULL},
	        [XDG] = {trains ? "dg" : NULL, GRADIENT, false, false, count, NULL},
	        [XDH0] = {trains ? "dh0" : NULL, GRADIENT, true, true, state, NULL},
	};
	enum status status = open_slots(check, slots, N_VECTOR);

	if (status == STATUS_OK) {
		struct recurrence_backward_args args = vector_args(x, slots);

		status = run_both_passes(check, slots, N_VECTOR, OP_RECURRENCE, &args.forward,
		                         OP_RECURRENCE_BACKWARD, &args);
	}
	close_slots(check, slots, N_VECTOR);
	return status;
}

static enum status check_operation(struct check *check)
{
	const char *op = safetensors_metadata(&check->file, "op");

	if (strcmp(op, "hgrn") == 0)
		return check_vector_recurrence(check);
	for (size_t i = 0; i < sizeof matrix_forms / sizeof *matrix_forms; i++)
		if (strcmp(op, matrix_forms[i].op) == 0)
			return check_matrix_recurrence(check, &matrix_forms[i]);
	return status_set(STATUS_INVALID, "no operation is called '%.64s'", op);
}

/* -------- the whole file -------- */

static enum status check_file(struct check *check)
{
	enum status status = check_fixed_metadata(check);

	if (status != STATUS_OK)
		return status;
	if (safetensors_metadata(&check->file, "block"))
		return check_layer(check);
	if (safetensors_metadata(&check->file, "model"))
		return check_model(check);
	if (safetensors_metadata(&check->file, "op"))
		return check_operation(check);
	return status_set(STATUS_INVALID, "the metadata names no block, model or op");
}

enum status golden_check(const struct golden_options *options, const char *path,
                         struct golden_report *report)
{
	struct check check = {
	        .backend = options->backend,
	        .options = options,
	        .ctx = {.backend = options->backend, .choice = options->choice},
	        .report = report,
	};
	enum status status = safetensors_open(path, &check.file);

	*report = (struct golden_report){0};
	if (status != STATUS_OK)
		return status;
	check.used = calloc((size_t)check.file.n_tensors + 1, sizeof *check.used);
	status = check.used ? check_file(&check) : status_set(STATUS_OOM, "no memory");
	if (status == STATUS_UNSUPPORTED) {
		snprintf(report->unsupported, sizeof report->unsupported, "%s", status_message());
		add_unused(&check, GOLDEN_UNSUPPORTED);
		status = STATUS_OK;
	}
	if (status == STATUS_OK)
		add_unused(&check, GOLDEN_NOT_COMPARED);
	free(check.used);
	safetensors_close(&check.file);
	if (status == STATUS_OK && report->n_failed > 0)
		status = status_set(STATUS_MISMATCH, "%d tensors of %s", report->n_failed, path);
	return status;
}
