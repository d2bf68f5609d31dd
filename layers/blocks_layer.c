/* libblocks: stacks of layers (layers/stack.h) on tensors of the caller's. */
#include "layers/blocks_device.h"

#include <stdlib.h>
#include <string.h>

#include "layers/stack.h"

enum { NAME_BYTES = 128, PATTERN_BYTES = 2048 };

struct blocks_layer {
	struct stack stack;
	struct context ctx;
	char pattern[PATTERN_BYTES], name[NAME_BYTES];
};

const char *blocks_layer_name(int i)
{
	for (int j = 0; j < i && i >= 0; j++)
		if (!layer_classes[j])
			return NULL;
	return i >= 0 && layer_classes[i] ? layer_classes[i]->name : NULL;
}

static struct stack_options options_of(const struct blocks_layer_options *o, const char *pattern)
{
	return (struct stack_options){
	        .pattern = pattern,
	        .d_model = o->d_model,
	        .train_len = o->seq_len > o->capacity ? o->seq_len : o->capacity,
	        .n_heads = -1,
	        .kv_heads = -1,
	        .chunk = -1,
	        .window = -1,
	        .groups = -1,
	        .rope = -1,
	        .prenorm = !o->mixer_only,
	        .residual = !o->mixer_only,
	        .norm_eps = o->norm_eps > 0 ? (float)o->norm_eps : 1e-6f,
	};
}

/* A prompt with room for more tokens is followed by steps. */
static struct layer_shape shape_of(const struct blocks_layer_options *o)
{
	static const enum pass passes_of[] = {[BLOCKS_TRAIN] = PASS_TRAIN,
	                                      [BLOCKS_PREFILL] = PASS_PREFILL,
	                                      [BLOCKS_GENERATION] = PASS_GENERATION,
	                                      [BLOCKS_DESCRIPTION] = PASS_KERNEL};
	struct layer_shape shape = {.pass = passes_of[o->pass],
	                            .batch = o->batch,
	                            .seq_len = o->seq_len,
	                            .capacity = o->capacity > 0 ? o->capacity : o->seq_len};

	if (shape.pass == PASS_PREFILL && shape.capacity > shape.seq_len)
		shape.pass = PASS_THROUGHPUT;
	return shape;
}

static enum status build(struct blocks_layer *layer, const struct blocks_device *device,
                         const char *pattern, const struct blocks_layer_options *given)
{
	struct blocks_layer_options options = {.size = sizeof options};

	blocks_fill(&options, given, given->size);
	if (options.pass > BLOCKS_DESCRIPTION)
		return status_set(STATUS_INVALID, "no pass %d", (int)options.pass);
	const struct stack_options stack_options = options_of(&options, pattern);
	const struct layer_shape shape = shape_of(&options);

	layer->ctx = (struct context){.device = device->device, .choice = device->choice};
	TRY(stack_configure(&layer->stack, device->device, &stack_options));
	stack_pattern(&layer->stack, layer->pattern, sizeof layer->pattern);
	/* A stack has no such pass. */
	layer->stack.shape.pass = shape.pass;
	if (shape.pass == PASS_KERNEL)
		return STATUS_OK;
	TRY(stack_allocate(&layer->stack, &layer->ctx, &shape));
	TRY(stack_initialize(&layer->stack, options.seed));
	if (shape.pass != PASS_TRAIN)
		TRY(stack_empty_state(&layer->stack));
	return STATUS_OK;
}

enum blocks_status blocks_layer_open(struct blocks_device *device, const char *pattern,
                                     const struct blocks_layer_options *options,
                                     struct blocks_layer **layer)
{
	struct blocks_layer *opened = calloc(1, sizeof *opened);

	*layer = NULL;
	if (!opened)
		return blocks_status_of(status_set(STATUS_OOM, "no memory for a layer"));
	const enum status status = build(opened, device, pattern, options);
	if (status == STATUS_OK)
		*layer = opened;
	else
		blocks_layer_close(opened);
	return blocks_status_of(status);
}

void blocks_layer_close(struct blocks_layer *layer)
{
	if (layer)
		stack_release(&layer->stack);
	free(layer);
}

const char *blocks_layer_pattern(const struct blocks_layer *layer)
{
	return layer->pattern;
}

/* ---- parameters ---- */

enum blocks_status blocks_layer_parameter(struct blocks_layer *layer, int i,
                                          struct blocks_parameter *parameter)
{
	struct tensor_spec shape;
	int same_as = i;

	if (i < 0 || !stack_name_at(&layer->stack, i, layer->name, sizeof layer->name, &same_as) ||
	    !stack_named_shape(&layer->stack, layer->name, &shape))
		return blocks_status_of(
		        status_set(STATUS_INVALID, "the layer has no parameter %d", i));
	struct blocks_parameter found = {
	        .name = layer->name, .n_dims = shape.n_dims, .same_as = same_as};
	for (int d = 0; d < BLOCKS_DIMS; d++)
		found.shape[d] = d < shape.n_dims ? shape.dims[d] : 1;
	blocks_fill(parameter, &found, sizeof found);
	return BLOCKS_OK;
}

/* Whether there are values, when all work has ended. */
static enum status require_values(const struct blocks_layer *layer)
{
	if (!layer->stack.arena)
		return status_set(STATUS_INVALID, "a layer opened for a description has no values");
	return device_synchronize(layer->stack.device);
}

enum blocks_status blocks_layer_set(struct blocks_layer *layer, const char *name,
                                    const float *values, int64_t count)
{
	TRY_BLOCKS(require_values(layer));
	return blocks_status_of(stack_set_named(&layer->stack, name, values, count));
}

enum blocks_status blocks_layer_get(struct blocks_layer *layer, const char *name, float *values,
                                    int64_t count)
{
	TRY_BLOCKS(require_values(layer));
	return blocks_status_of(stack_get_named(&layer->stack, name, values, count));
}

enum blocks_status blocks_layer_gradient(struct blocks_layer *layer, const char *name,
                                         float *values, int64_t count)
{
	TRY_BLOCKS(require_values(layer));
	return blocks_status_of(stack_get_named_gradient(&layer->stack, name, values, count));
}

/* ---- runs, on the caller's tensors in the place of the stack's ---- */

static void use_ends(struct stack *stack, const void *x, void *y)
{
	stack->x = stack->layer_x[0] = (void *)x;
	stack->y = stack->layer_x[stack->n_layers] = y;
}

static enum status require_pass(const struct blocks_layer *layer, bool allowed, const char *what)
{
	const enum pass pass = layer->stack.shape.pass;

	if (allowed && layer->stack.arena)
		return STATUS_OK;
	return status_set(STATUS_INVALID, "a layer opened for %s has no %s",
	                  pass == PASS_KERNEL ? "a description" : pass_name(pass), what);
}

enum blocks_status blocks_layer_forward(struct blocks_layer *layer, const void *x, void *y)
{
	TRY_BLOCKS(require_pass(layer, layer->stack.shape.pass != PASS_GENERATION, "forward"));
	use_ends(&layer->stack, x, y);
	return blocks_status_of(stack_forward(&layer->stack, &layer->ctx));
}

enum blocks_status blocks_layer_backward(struct blocks_layer *layer, const void *dy, void *dx)
{
	struct stack *stack = &layer->stack;

	TRY_BLOCKS(require_pass(layer, stack->shape.pass == PASS_TRAIN, "backward"));
	stack->dy = stack->layer_dy[stack->n_layers] = (void *)dy;
	stack->dx = stack->layer_dy[0] = dx;
	return blocks_status_of(stack_backward(stack, &layer->ctx));
}

enum blocks_status blocks_layer_step(struct blocks_layer *layer, int64_t position, const void *x,
                                     void *y)
{
	struct stack *stack = &layer->stack;
	const enum pass pass = stack->shape.pass;

	TRY_BLOCKS(require_pass(layer, pass == PASS_GENERATION || pass == PASS_THROUGHPUT, "step"));
	if (position < 0 || position >= stack->shape.capacity)
		return blocks_status_of(
		        status_set(STATUS_INVALID, "position %lld, but the state holds %lld",
		                   (long long)position, (long long)stack->shape.capacity));
	use_ends(stack, x, y);
	TRY_BLOCKS(stack_set_position(stack, position));
	return blocks_status_of(stack_step(stack, &layer->ctx, position));
}

enum blocks_status blocks_layer_clear(struct blocks_layer *layer)
{
	TRY_BLOCKS(require_pass(layer, layer->stack.shape.pass != PASS_TRAIN, "state"));
	return blocks_status_of(stack_empty_state(&layer->stack));
}

enum blocks_status blocks_layer_verify(struct blocks_layer *layer, double *share)
{
	enum { ROWS = 256 };
	struct accuracy found;
	const enum pass pass = layer->stack.shape.pass;

	TRY_BLOCKS(require_pass(layer, pass == PASS_TRAIN || pass == PASS_PREFILL, "verification"));
	TRY_BLOCKS(device_synchronize(layer->stack.device));
	TRY_BLOCKS(stack_verify(&layer->stack, &layer->ctx, ROWS, 1, &found));
	*share = found.share;
	return BLOCKS_OK;
}
