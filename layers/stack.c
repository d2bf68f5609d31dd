/* Stacks: configuration, memory, and the runs. */
#include "layers/stack.h"

#include <stdlib.h>
#include <string.h>

#include "layers/model.h"
#include "layers/pattern.h"

enum {
	ALIGNMENT = 256,
	MAX_WIDTH = 1 << 24 /* beyond any model; its square still counts parameters */
};

/* ---- configuration ---- */

/* Heads of a layer where the user names no number. */
static int64_t default_heads(const struct layer_class *class, int64_t d_model)
{
	int64_t width = d_model >= 1024 && d_model % 128 == 0 ? 128 : d_model < 128 ? 32 : 64;

	if (class->default_heads)
		return class->default_heads(d_model);
	return d_model % width == 0 ? d_model / width : 1;
}

/* The value that the options have for an argument; -1: none. */
static int64_t general_value(const struct stack_options *options,
                             const struct layer_argument *argument)
{
	const struct {
		const char *name;
		int64_t value;
	} values[] = {
	        {"heads", options->n_heads}, {"kv_heads", options->kv_heads},
	        {"chunk", options->chunk},   {"window", options->window},
	        {"groups", options->groups}, {"position", options->rope},
	};

	for (size_t i = 0; i < sizeof values / sizeof values[0]; i++)
		if (strcmp(values[i].name, argument->name) == 0 && values[i].value >= 0 &&
		    (values[i].value > 0 || argument->least == 0))
			return values[i].value;
	return -1;
}

/* What an item, or else the options, say of its argument i; -1: nothing. */
static int64_t said_value(const struct stack_options *options, const struct pattern_item *item,
                          int i)
{
	return item->given[i] ? item->value[i] : general_value(options, &item->class->arguments[i]);
}

/* Defaults give way to sizes: a chunk is no longer than the sequence, and groups divide heads. */
static void adapt_defaults(struct layer_config *config, const struct stack_options *options,
                           const struct pattern_item *item)
{
	for (int i = 0; item->class->arguments[i].name; i++) {
		const char *name = item->class->arguments[i].name;

		if (said_value(options, item, i) >= 0)
			continue;
		if (strcmp(name, "chunk") == 0 && config->train_len > 0 &&
		    config->chunk > config->train_len)
			config->chunk = config->train_len;
		if (strcmp(name, "groups") == 0 && config->n_heads % config->groups != 0)
			config->groups = 1;
	}
}

static void configure_layer(struct layer_config *config, const struct stack_options *options,
                            const struct pattern_item *item)
{
	const struct layer_argument *arguments = item->class->arguments;

	*config = (struct layer_config){
	        .class = item->class,
	        .d_model = options->d_model,
	        .n_heads = 1,
	        .ffn_width = options->ffn_width,
	        .train_len = options->train_len,
	        .prenorm = options->prenorm,
	        .residual = options->residual,
	        .norm_eps = options->norm_eps,
	};
	for (int i = 0; arguments[i].name; i++) {
		const int64_t said = said_value(options, item, i);

		*argument_of(config, &arguments[i]) = said >= 0 ? said : arguments[i].fallback;
	}
	if (config->n_heads == 0)
		config->n_heads = default_heads(config->class, options->d_model);
	adapt_defaults(config, options, item);
	/* One pattern for what is the same. */
	if (config->kv_heads == config->n_heads)
		config->kv_heads = 0;
}

/* Most layers that mix tokens. */
static int64_t most_layers(const struct stack_options *options)
{
	return MAX_LAYERS / (options->ffn ? 2 : 1);
}

/* Layers 0 .. n - 1, each with its ffn where there are any. */
static void configure_layers(struct stack *stack, const struct stack_options *options,
                             const struct pattern *pattern, int64_t n)
{
	for (int64_t i = 0; i < n; i++) {
		struct layer_config *config = &stack->layers[stack->n_layers++];

		configure_layer(config, options, &pattern->item[i % pattern->count]);
		if (options->ffn) {
			stack->layers[stack->n_layers] = *config;
			stack->layers[stack->n_layers++].class = &ffn_layer;
		}
		if (i < pattern->count)
			stack->period = stack->n_layers;
	}
}

enum status stack_configure(struct stack *stack, struct device *device,
                            const struct stack_options *options)
{
	const int64_t most = most_layers(options);
	struct pattern pattern;

	memset(stack, 0, sizeof *stack);
	TRY(pattern_parse(&pattern, options->pattern));
	const int64_t n = options->n_layers ? options->n_layers : pattern.count;
	stack->device = device;
	stack->vocab = options->vocab;
	stack->d_model = options->d_model;
	stack->data = options->data;
	configure_layers(stack, options, &pattern, n < most ? n : most);
	if (options->d_model < 1 || options->d_model > MAX_WIDTH)
		return status_set(STATUS_INVALID, "--d-model: %lld (allowed: 1 to %d)",
		                  (long long)options->d_model, MAX_WIDTH);
	if (n < 1 || n > most)
		return status_set(STATUS_INVALID, "%s%lld layers (allowed: 1 to %lld)",
		                  options->n_layers ? "--layers: " : "", (long long)n,
		                  (long long)most);
	for (int i = 0; i < stack->period; i++)
		if (stack->layers[i].class->check)
			TRY(stack->layers[i].class->check(&stack->layers[i]));
	return STATUS_OK;
}

void stack_pattern(const struct stack *stack, char *text, size_t size)
{
	text[0] = '\0';
	for (int i = 0; i < stack->period; i++) {
		if (!stack->layers[i].class->mixes)
			continue;
		if (i > 0)
			strncat(text, ",", size - strlen(text) - 1);
		pattern_append(text, size, &stack->layers[i]);
	}
}

int64_t stack_argument(const struct stack *stack, const char *name)
{
	for (int i = 0; i < stack->period; i++) {
		struct layer_config config = stack->layers[i];
		int argument = argument_find(config.class, name);

		if (argument >= 0)
			return *argument_of(&config, &config.class->arguments[argument]);
	}
	return -1;
}

struct layer_widths stack_widths(const struct stack *stack)
{
	const struct layer_config *first = &stack->layers[0];
	int64_t h = first->n_heads, d = first->d_model / h;

	if (argument_find(first->class, "heads") < 0)
		return (struct layer_widths){-1, -1, -1, -1};
	return first->class->widths ? first->class->widths(first)
	                            : (struct layer_widths){h, h, d, d};
}

int64_t stack_parameters(const struct stack *stack)
{
	int64_t count = stack->vocab > 0 ? (2 * stack->vocab + 1) * stack->d_model : 0;
	struct tensor_spec specs[MAX_TENSORS];

	for (int i = 0; i < stack->n_layers; i++)
		for (int j = stack->layers[i].class->parameters(&stack->layers[i], specs); j > 0;
		     j--)
			count += tensor_count(&specs[j - 1]);
	return count;
}

/* Bytes of one layer's state of one sequence of `capacity` tokens. */
static int64_t state_bytes(const struct stack *stack, int i, int64_t capacity)
{
	const struct layer_config *config = &stack->layers[i];
	const struct layer_shape shape = {
	        .pass = PASS_GENERATION, .batch = 1, .seq_len = 1, .capacity = capacity};
	struct tensor_spec specs[MAX_TENSORS];
	int64_t bytes = 0;

	for (int j = config->class->state(config, &shape, specs); j > 0; j--)
		bytes += (int64_t)tensor_bytes(&specs[j - 1], stack->device);
	return bytes;
}

int64_t stack_state_bytes(const struct stack *stack, int64_t capacity, double *per_token)
{
	int64_t bytes = 0;

	*per_token = 0;
	for (int i = 0; i < stack->n_layers; i++) {
		/* Whole chunks, of which each adds as much as the next. */
		int64_t more = stack->layers[i].chunk > 0 ? stack->layers[i].chunk : 1;
		int64_t now = state_bytes(stack, i, capacity);

		bytes += now;
		*per_token += (double)(state_bytes(stack, i, capacity + more) - now) / (double)more;
	}
	return bytes;
}

/* ---- shapes ---- */

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static bool is_model(const struct stack *stack)
{
	return stack->vocab > 0;
}

/* Sequences that one forward pass takes. */
static int64_t forward_batch(const struct layer_shape *shape)
{
	bool in_parts = shape->micro_batch > 0 && shape->pass != PASS_TRAIN;

	return in_parts ? smaller(shape->micro_batch, shape->batch) : shape->batch;
}

static struct layer_shape forward_shape(const struct layer_shape *shape)
{
	struct layer_shape forward = *shape;

	forward.batch = forward_batch(shape);
	return forward;
}

static struct layer_shape step_shape(const struct layer_shape *shape)
{
	struct layer_shape step = *shape;

	step.seq_len = 1;
	return step;
}

/* The shapes that the runs of a pass have: forward, step, or both; returns how many. */
static int run_shapes(const struct layer_shape *shape, struct layer_shape shapes[2])
{
	int n = 0;

	if (shape->pass != PASS_GENERATION)
		shapes[n++] = forward_shape(shape);
	if (shape->pass == PASS_GENERATION || shape->pass == PASS_THROUGHPUT)
		shapes[n++] = step_shape(shape);
	return n;
}

/* Tokens of the largest run. */
static int64_t most_tokens(const struct layer_shape *shape)
{
	struct layer_shape shapes[2];
	int64_t most = 0;

	for (int i = run_shapes(shape, shapes) - 1; i >= 0; i--) {
		int64_t tokens = shapes[i].batch * shapes[i].seq_len;

		most = tokens > most ? tokens : most;
	}
	return most;
}

static int last_mixing_layer(const struct stack *stack)
{
	int last = stack->n_layers - 1;

	while (last > 0 && !stack->layers[last].class->mixes)
		last--;
	return last;
}

bool stack_keeps(const struct stack *stack, const struct layer_shape *shape, int i)
{
	return shape->pass == PASS_TRAIN || !is_model(stack) || i == last_mixing_layer(stack);
}

bool stack_remembers(const struct stack *stack, int64_t position)
{
	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];

		if (config->class->mixes &&
		    !(config->class->remembers && config->class->remembers(config, position)))
			return false;
	}
	return true;
}

/* ---- memory ---- */

/* Hands out memory from `base` on; with a made-up base this only counts. */
struct arena {
	char *base;
	size_t used;
};

static void *take(struct arena *arena, size_t bytes, size_t *purpose)
{
	void *memory = arena->base + arena->used;

	if (bytes == 0)
		return NULL;
	bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	arena->used += bytes;
	*purpose += bytes;
	return memory;
}

typedef int (*spec_function)(const struct layer_config *config, const struct layer_shape *shape,
                             struct tensor_spec *specs);

/* Takes a layer's tensors of one kind, each as large as the largest run needs it. */
static void take_tensors(struct arena *arena, const struct stack *stack,
                         const struct layer_config *config, spec_function list,
                         const struct layer_shape *shape, void **tensors, size_t *purpose)
{
	struct tensor_spec specs[2][MAX_TENSORS];
	struct layer_shape shapes[2];
	int n_shapes = run_shapes(shape, shapes), n = 0;

	for (int s = 0; s < n_shapes; s++)
		n = list(config, &shapes[s], specs[s]);
	for (int i = 0; i < n; i++) {
		size_t bytes = tensor_bytes(&specs[0][i], stack->device);

		if (n_shapes == 2 && tensor_bytes(&specs[1][i], stack->device) > bytes)
			bytes = tensor_bytes(&specs[1][i], stack->device);
		tensors[i] = take(arena, bytes, purpose);
	}
}

/* Every parameter, or the gradient of every one. */
static void lay_out_parameters(struct stack *stack, bool gradients, struct arena *arena,
                               size_t *purpose)
{
	size_t wide = dtype_size(stack->device->wide);
	size_t element = gradients ? wide : dtype_size(stack->device->activation);
	struct tensor_spec specs[MAX_TENSORS];

	for (int i = 0; i < stack->n_layers; i++)
		for (int j = stack->layers[i].class->parameters(&stack->layers[i], specs) - 1;
		     j >= 0; j--)
			if (gradients)
				stack->memory[i].grad[j] = take(
				        arena, (size_t)tensor_count(&specs[j]) * wide, purpose);
			else
				stack->memory[i].param[j] = take(
				        arena, tensor_bytes(&specs[j], stack->device), purpose);
	if (!is_model(stack))
		return;
	size_t table = (size_t)(stack->vocab * stack->d_model) * element;
	void *embedding = take(arena, table, purpose);
	void *final_norm = take(arena, (size_t)stack->d_model * wide, purpose);
	void *head = take(arena, table, purpose);
	if (gradients) {
		stack->d_embedding = embedding;
		stack->d_final_norm = final_norm;
		stack->d_head = head;
	} else {
		stack->embedding = embedding;
		stack->final_norm = final_norm;
		stack->head = head;
	}
}

static void lay_out_state(struct stack *stack, const struct layer_shape *shape, struct arena *arena,
                          size_t *purpose)
{
	struct tensor_spec specs[MAX_TENSORS];

	for (int i = 0; i < stack->n_layers; i++)
		for (int j = stack->layers[i].class->state(&stack->layers[i], shape, specs) - 1;
		     j >= 0; j--)
			stack->memory[i].state[j] =
			        take(arena, tensor_bytes(&specs[j], stack->device), purpose);
}

/* What the user supplies: it outlives every run. */
static void lay_out_inputs(struct stack *stack, const struct layer_shape *shape,
                           struct arena *arena, struct memory_plan *plan)
{
	size_t n = (size_t)(shape->batch * shape->seq_len);
	size_t activations = (size_t)(most_tokens(shape) * stack->d_model) *
	                     dtype_size(stack->device->activation);

	stack->position = take(arena, sizeof(int32_t), &plan->activations);
	if (is_model(stack)) {
		stack->tokens = take(arena, n * sizeof(int32_t), &plan->activations);
		stack->next =
		        take(arena, (size_t)shape->batch * sizeof(int32_t), &plan->activations);
		if (shape->pass == PASS_TRAIN)
			stack->targets = take(arena, n * sizeof(int32_t), &plan->activations);
		return;
	}
	stack->layer_x[0] = take(arena, activations, &plan->activations);
	if (shape->pass == PASS_TRAIN)
		stack->layer_dy[stack->n_layers] = take(arena, activations, &plan->activations);
}

/* Inputs of the layers, and in training their gradients. A model outside training takes turns
 * between two buffers, but for the layer whose input is to survive. */
static void lay_out_activations(struct stack *stack, const struct layer_shape *shape,
                                struct arena *arena, struct memory_plan *plan)
{
	size_t bytes = (size_t)(most_tokens(shape) * stack->d_model) *
	               dtype_size(stack->device->activation);
	int n = stack->n_layers;
	bool train = shape->pass == PASS_TRAIN, all = train || !is_model(stack);
	void *turns[2] = {NULL, NULL};

	for (int i = 0; i < 2 && !all; i++)
		turns[i] = take(arena, bytes, &plan->activations);
	for (int i = is_model(stack) ? 0 : 1; i <= n; i++)
		stack->layer_x[i] = all || stack_keeps(stack, shape, i)
		                            ? take(arena, bytes, &plan->activations)
		                            : turns[i % 2];
	if (train && is_model(stack))
		stack->layer_dy[n] = take(arena, bytes, &plan->activations);
	for (int i = 0; i < n && train; i++)
		stack->layer_dy[i] = is_model(stack) ? stack->layer_dy[n]
		                                     : take(arena, bytes, &plan->activations);
	stack->x = stack->layer_x[0];
	stack->y = stack->layer_x[n];
	stack->dx = stack->layer_dy[0];
	stack->dy = stack->layer_dy[n];
}

/* Saved tensors of every layer, and the scratch of the backward pass. In a model what need not
 * survive the layer's own run shares one place, as large as the neediest layer; a stack of blocks
 * keeps all, so that all can be verified. */
static void lay_out_layers(struct stack *stack, const struct layer_shape *shape,
                           struct arena *arena, struct memory_plan *plan)
{
	struct arena shared = *arena, end = *arena;
	size_t ignored = 0;

	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];
		struct arena scratch = shared;

		if (!stack_keeps(stack, shape, i))
			take_tensors(&scratch, stack, config, config->class->saved, shape,
			             stack->memory[i].saved, &ignored);
		if (shape->pass == PASS_TRAIN && is_model(stack))
			take_tensors(&scratch, stack, config, config->class->scratch, shape,
			             stack->memory[i].scratch, &ignored);
		if (scratch.used > end.used)
			end = scratch;
	}
	*(shape->pass == PASS_TRAIN ? &plan->scratch : &plan->saved) += end.used - arena->used;
	*arena = end;
	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];

		if (stack_keeps(stack, shape, i))
			take_tensors(arena, stack, config, config->class->saved, shape,
			             stack->memory[i].saved, &plan->saved);
		if (shape->pass == PASS_TRAIN && !is_model(stack))
			take_tensors(arena, stack, config, config->class->scratch, shape,
			             stack->memory[i].scratch, &plan->scratch);
	}
}

/* The end of a model. In training every position has logits, otherwise the last one. */
static void lay_out_model(struct stack *stack, const struct layer_shape *shape, struct arena *arena,
                          struct memory_plan *plan)
{
	size_t element = dtype_size(stack->device->activation);
	bool train = shape->pass == PASS_TRAIN;
	size_t rows = (size_t)(train ? shape->batch * shape->seq_len : shape->batch);
	size_t bytes = rows * (size_t)stack->d_model * element,
	       wide = dtype_size(stack->device->wide);

	if (!is_model(stack))
		return;
	stack->logits = take(arena, rows * (size_t)stack->vocab * element, &plan->logits);
	stack->x_norm = take(arena, bytes, &plan->activations);
	if (!train) {
		stack->last = take(arena, bytes, &plan->activations);
		return;
	}
	stack->rstd = take(arena, rows * wide, &plan->activations);
	stack->losses = take(arena, rows * wide, &plan->activations);
	stack->loss = take(arena, wide, &plan->activations);
	stack->dx_norm = take(arena, bytes, &plan->activations);
}

/* Gives every tensor its place behind `base`, and says how much that is. Parameters and inputs
 * come first, then the caches, then what a run writes. */
static void lay_out(struct stack *stack, const struct layer_shape *shape, void *base,
                    size_t workspace, struct memory_plan *plan)
{
	struct arena arena = {base, 0};

	memset(plan, 0, sizeof *plan);
	/* No pointer is left of a pass that has more tensors. */
	memset((char *)stack + offsetof(struct stack, memory), 0,
	       offsetof(struct stack, arena) - offsetof(struct stack, memory));
	stack->shape = *shape;
	if (shape->pass == PASS_TRAIN)
		stack->shape.capacity = 0;
	shape = &stack->shape;
	lay_out_parameters(stack, false, &arena, &plan->parameters);
	lay_out_inputs(stack, shape, &arena, plan);
	stack->state_offset = arena.used;
	lay_out_state(stack, shape, &arena, &plan->state);
	stack->output_offset = arena.used;
	lay_out_layers(stack, shape, &arena, plan);
	lay_out_activations(stack, shape, &arena, plan);
	if (shape->pass == PASS_TRAIN)
		lay_out_parameters(stack, true, &arena, &plan->gradients);
	lay_out_model(stack, shape, &arena, plan);
	stack->workspace = take(&arena, workspace, &plan->workspace);
	plan->total = arena.used;
}

/* ---- plans ---- */

/* Tokens of the longest sequence. */
static int64_t longest_of(const struct layer_shape *shape)
{
	return shape->seq_len > shape->capacity ? shape->seq_len : shape->capacity;
}

/* A step takes no notice of the chunks that the family's forms are computed in. What is shorter
 * than the sequence that the stack is made for may be a part of it. */
static bool chunk_is_too_long(const struct layer_config *config, const struct layer_shape *shape)
{
	const int64_t longest = longest_of(shape);

	if (config->class->chunk_is_form && shape->pass == PASS_GENERATION)
		return false;
	return config->chunk > longest && config->chunk > config->train_len;
}

/* STATUS_OOM where a tensor of this shape would be larger than any memory, before somebody forms
 * the product: columns of every token, a matrix of every sequence, and weights. */
static enum status check_elements(const struct stack *stack, const struct layer_shape *shape)
{
	const int64_t d = stack->d_model, longest = longest_of(shape);
	int64_t widest = shape->pass == PASS_TRAIN && stack->vocab > d ? stack->vocab : d;

	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];
		const int64_t columns = config->class->proj_width(config);

		widest = columns > widest ? columns : widest;
	}
	if (elements_fit(shape->batch, longest, widest) && elements_fit(shape->batch, d, widest) &&
	    elements_fit(1, d, stack->vocab > widest ? stack->vocab : widest))
		return STATUS_OK;
	return status_set(
	        STATUS_OOM,
	        "batch %lld, sequence of %lld, D = %lld: a tensor would be larger than any memory",
	        (long long)shape->batch, (long long)longest, (long long)d);
}

static enum status check_shape(const struct stack *stack, const struct layer_shape *shape)
{
	const int64_t longest = longest_of(shape);

	if (shape->batch < 1 || shape->seq_len < 1 || shape->capacity < 0)
		return status_set(STATUS_INVALID,
		                  "batch %lld, sequence of %lld (allowed: 1 or more)",
		                  (long long)shape->batch, (long long)shape->seq_len);
	if (shape->pass == PASS_KERNEL)
		return status_set(STATUS_UNSUPPORTED, "a stack of layers has no pass %s",
		                  pass_name(shape->pass));
	if (shape->pass == PASS_THROUGHPUT && shape->capacity <= shape->seq_len)
		return status_set(STATUS_INVALID, "a cache of %lld leaves nothing to generate",
		                  (long long)shape->capacity);
	if (shape->pass != PASS_TRAIN && shape->capacity > 0 && shape->capacity < shape->seq_len)
		return status_set(STATUS_INVALID, "a cache of %lld is too short for %lld tokens",
		                  (long long)shape->capacity, (long long)shape->seq_len);
	if (shape->micro_batch > 0 && !is_model(stack))
		return status_set(STATUS_INVALID, "only a model's prefill can be cut into parts");
	if (shape->pass == PASS_GENERATION && (shape->seq_len != 1 || shape->capacity == 0))
		return status_set(STATUS_INVALID,
		                  "generation needs a cache, and takes one token at a time");
	if (longest > INT32_MAX || shape->batch > INT32_MAX)
		return status_set(STATUS_UNSUPPORTED,
		                  "batch %lld, sequence of %lld: both are counted in 32 bits",
		                  (long long)shape->batch, (long long)longest);
	for (int i = 0; i < stack->n_layers; i++)
		if (chunk_is_too_long(&stack->layers[i], shape))
			return status_set(STATUS_UNSUPPORTED,
			                  "%s: a chunk of %lld is longer than the sequence of %lld",
			                  stack->layers[i].class->name,
			                  (long long)stack->layers[i].chunk, (long long)longest);
	return check_elements(stack, shape);
}

static enum status plan_add_repeated(struct kernel_plan *plan, const struct kernel_plan *more,
                                     int64_t times)
{
	if (plan->n_operations + more->n_operations > MAX_PLANNED_OPERATIONS)
		return status_set(STATUS_INVALID, "plan holds more than %d distinct operations",
		                  MAX_PLANNED_OPERATIONS);
	for (int i = 0; i < more->n_operations; i++) {
		struct planned_operation *added = &plan->operations[plan->n_operations++];

		*added = more->operations[i];
		added->count *= times;
	}
	plan->total.flops += more->total.flops * (double)times;
	plan->total.bytes_read += more->total.bytes_read * (double)times;
	plan->total.bytes_written += more->total.bytes_written * (double)times;
	if (more->workspace_bytes > plan->workspace_bytes)
		plan->workspace_bytes = more->workspace_bytes;
	return STATUS_OK;
}

/* Plans a step at `position`. */
static enum status plan_step(struct stack *stack, const struct context *ctx, int64_t position,
                             struct kernel_plan *work)
{
	struct context planning = *ctx;

	planning.plan = work;
	planning.ranges = false;
	return stack_step(stack, &planning, position);
}

/* Forward, then all steps at the cost of the one in the middle; the last one's workspace is the
 * largest. */
static enum status plan_throughput(struct stack *stack, struct context *ctx,
                                   struct kernel_plan *work)
{
	int64_t first = stack->shape.seq_len, end = stack->shape.capacity - 1;
	struct kernel_plan middle = {0}, last = {0};

	TRY(stack_forward(stack, ctx));
	if (first == end)
		return STATUS_OK;
	TRY(plan_step(stack, ctx, (first + end - 1) / 2, &middle));
	TRY(plan_step(stack, ctx, end, &last));
	if (last.workspace_bytes > middle.workspace_bytes)
		middle.workspace_bytes = last.workspace_bytes;
	return plan_add_repeated(work, &middle, end - first);
}

/* An address that no tensor has, for plans: never dereferenced, and as aligned as a real one. */
static void *made_up_address(void)
{
	return (void *)((uintptr_t)1 << 30);
}

/* Lays the stack out at a made-up address and plans one run. */
static enum status plan_work(struct stack *stack, const struct context *ctx,
                             const struct layer_shape *shape, struct kernel_plan *work)
{
	struct context planning = *ctx;
	struct memory_plan ignored;

	memset(work, 0, sizeof *work);
	planning.plan = work;
	planning.ranges = false;
	lay_out(stack, shape, made_up_address(), 0, &ignored);
	if (shape->pass == PASS_THROUGHPUT)
		return plan_throughput(stack, &planning, work);
	return stack_run(stack, &planning);
}

enum status stack_plan(const struct stack *stack, const struct context *ctx,
                       const struct layer_shape *shape, struct memory_plan *plan,
                       struct kernel_plan *work)
{
	enum status status = check_shape(stack, shape);
	struct stack *copy = malloc(sizeof *copy);
	struct kernel_plan own_work = {0};

	work = work ? work : &own_work;
	if (!copy)
		status = status_set(STATUS_OOM, "no memory to plan with");
	if (status == STATUS_OK) {
		*copy = *stack;
		status = plan_work(copy, ctx, shape, work);
	}
	if (status == STATUS_OK)
		lay_out(copy, shape, made_up_address(), work->workspace_bytes, plan);
	free(copy);
	return status;
}

enum status stack_plan_step(const struct stack *stack, const struct context *ctx,
                            const struct layer_shape *shape, int64_t position,
                            struct kernel_plan *work)
{
	struct stack *copy = malloc(sizeof *copy);
	struct memory_plan ignored;

	if (!copy)
		return status_set(STATUS_OOM, "no memory to plan with");
	enum status status = check_shape(stack, shape);
	if (status == STATUS_OK) {
		*copy = *stack;
		memset(work, 0, sizeof *work);
		lay_out(copy, shape, made_up_address(), 0, &ignored);
		status = plan_step(copy, ctx, position, work);
	}
	free(copy);
	return status;
}

enum status stack_allocate(struct stack *stack, struct context *ctx,
                           const struct layer_shape *shape)
{
	struct memory_plan plan;
	enum status status = stack_plan(stack, ctx, shape, &plan, NULL);

	stack_release(stack);
	TRY(status);
	TRY(device_allocate(stack->device, plan.total, &stack->arena));
	lay_out(stack, shape, stack->arena, plan.workspace, &stack->plan);
	ctx->workspace = stack->workspace;
	ctx->workspace_bytes = plan.workspace;
	return STATUS_OK;
}

void stack_release(struct stack *stack)
{
	if (stack->arena)
		device_release(stack->device, stack->arena);
	stack->arena = NULL;
	stack_forget_snapshot(stack);
}

enum status stack_poison(struct stack *stack)
{
	bool fills_state =
	        stack->shape.pass == PASS_PREFILL || stack->shape.pass == PASS_THROUGHPUT;
	size_t from = fills_state ? stack->state_offset : stack->output_offset;

	return device_fill(stack->device, (char *)stack->arena + from, 0xff,
	                   stack->plan.total - from);
}

/* ---- runs ---- */

enum status stack_set_position(struct stack *stack, int64_t position)
{
	int32_t value = (int32_t)position;

	return device_upload(stack->device, stack->position, &value, sizeof value);
}

/* A layer's memory as sequences first ... see it. */
static struct layer_memory memory_from(const struct stack *stack, int i, int64_t first)
{
	const struct layer_config *config = &stack->layers[i];
	struct layer_memory memory = stack->memory[i];
	struct tensor_spec specs[MAX_TENSORS];
	int n = config->class->state(config, &stack->shape, specs);

	for (int j = 0; j < n; j++) {
		size_t bytes = tensor_bytes(&specs[j], stack->device);

		if (memory.state[j])
			memory.state[j] = (char *)memory.state[j] +
			                  bytes / (size_t)stack->shape.batch * (size_t)first;
	}
	return memory;
}

/* All layers' forward; with a position, a step. */
static enum status forward_layers(struct stack *stack, struct context *ctx, int64_t first,
                                  const struct layer_shape *shape, const int32_t *position,
                                  int64_t position_hint)
{
	enum status status = STATUS_OK;

	for (int i = 0; i < stack->n_layers && status == STATUS_OK; i++) {
		const struct layer_memory memory = memory_from(stack, i, first);
		const struct layer_run run = {ctx,     &stack->layers[i], shape,
		                              &memory, position,          position_hint};

		context_range_push(ctx, stack->layers[i].class->name);
		status = layer_forward(&run, stack->layer_x[i], stack->layer_x[i + 1]);
		context_range_pop(ctx);
	}
	return status;
}

/* A model's forward of shape->batch sequences from `first` on. */
static enum status forward_part(struct stack *stack, struct context *ctx, int64_t first,
                                const struct layer_shape *shape)
{
	int64_t n = shape->batch * shape->seq_len;
	size_t row = (size_t)stack->vocab * dtype_size(stack->device->activation);
	char *logits = (char *)stack->logits + (size_t)first * row;

	TRY(model_embed(stack, ctx, n, stack->tokens + first * shape->seq_len));
	TRY(forward_layers(stack, ctx, first, shape, NULL, 0));
	if (shape->pass == PASS_TRAIN)
		return model_head(stack, ctx, n, stack->y, stack->logits);
	TRY(model_take_last(stack, ctx, shape->batch, shape->seq_len));
	TRY(model_head(stack, ctx, shape->batch, stack->last, logits));
	return model_pick(stack, ctx, shape->batch, logits, stack->next + first, NULL);
}

enum status stack_forward(struct stack *stack, struct context *ctx)
{
	struct layer_shape shape = forward_shape(&stack->shape);
	int64_t part = shape.batch;

	if (!is_model(stack) && part == stack->shape.batch)
		return forward_layers(stack, ctx, 0, &shape, NULL, 0);
	for (int64_t b = 0; b < stack->shape.batch; b += part) {
		shape.batch = smaller(part, stack->shape.batch - b);
		TRY(forward_part(stack, ctx, b, &shape));
	}
	return shape.pass == PASS_TRAIN || ctx->plan ? STATUS_OK
	                                             : stack_set_position(stack, shape.seq_len);
}

enum status stack_backward(struct stack *stack, struct context *ctx)
{
	enum status status = is_model(stack) ? model_loss_backward(stack, ctx) : STATUS_OK;

	for (int i = stack->n_layers - 1; i >= 0 && status == STATUS_OK; i--) {
		const struct layer_config *config = &stack->layers[i];
		const struct layer_run run = {.ctx = ctx,
		                              .config = config,
		                              .shape = &stack->shape,
		                              .memory = &stack->memory[i]};

		context_range_push(ctx, config->class->name);
		status = layer_backward(&run, stack->layer_x[i], stack->layer_dy[i + 1],
		                        stack->layer_dy[i]);
		context_range_pop(ctx);
	}
	if (status == STATUS_OK && is_model(stack))
		status = model_embed_backward(stack, ctx);
	return status;
}

enum status stack_step(struct stack *stack, struct context *ctx, int64_t position_hint)
{
	const struct layer_shape shape = step_shape(&stack->shape);

	if (is_model(stack))
		TRY(model_embed(stack, ctx, shape.batch, stack->next));
	TRY(forward_layers(stack, ctx, 0, &shape, stack->position, position_hint));
	if (!is_model(stack))
		return STATUS_OK;
	TRY(model_head(stack, ctx, shape.batch, stack->y, stack->logits));
	return model_pick(stack, ctx, shape.batch, stack->logits, stack->next, stack->position);
}

enum status stack_run(struct stack *stack, struct context *ctx)
{
	const struct layer_shape *shape = &stack->shape;

	if (shape->pass == PASS_GENERATION)
		return stack_step(stack, ctx, shape->capacity - 1);
	TRY(stack_forward(stack, ctx));
	if (shape->pass == PASS_TRAIN)
		return stack_backward(stack, ctx);
	for (int64_t p = shape->seq_len; shape->pass == PASS_THROUGHPUT && p < shape->capacity - 1;
	     p++) {
		if (!is_model(stack))
			TRY(stack_set_position(stack, p));
		TRY(stack_step(stack, ctx, p));
	}
	return STATUS_OK;
}
