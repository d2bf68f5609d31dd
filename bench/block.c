#include "bench/block.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "bench/harness/bench.h"
#include "bench/pattern.h"
#include "layers/stack.h"

/* One of these per program: about 200 KiB, so not on a thread's small stack. */
struct block {
	const struct backend *backend;
	struct stack stack;
};

static void use(void *self, const struct backend *backend)
{
	((struct block *)self)->backend = backend;
}

/* Unset sizes become 0, which is how a stack is told to choose. */
static int64_t size_or_zero(int64_t value)
{
	return value == NO_VALUE ? 0 : value;
}

static enum status configure_stack(struct block *block, const struct bench_case *c)
{
	struct stack_options options = {
	        .pattern = c->pattern,
	        .d_model = c->d_model,
	        .n_heads = size_or_zero(c->n_heads),
	        .chunk = size_or_zero(c->chunk),
	        .window = size_or_zero(c->window),
	        .groups = size_or_zero(c->groups),
	        .train_len = c->seq_len,
	        .rope = strcmp(c->position, "none") != 0,
	        .prenorm = true,
	        .residual = true,
	        .norm_eps = 1e-6f,
	};

	return stack_configure(&block->stack, block->backend, &options);
}

static enum status set_batch(const struct options *options, struct bench_case *c)
{
	if (strcmp(c->pass, "generation") == 0) {
		c->batch = c->tokens = options->batch;
		if (c->batch == 0)
			return status_set(STATUS_INVALID, "--batch: generation needs at least 1");
		return STATUS_OK;
	}
	c->batch = options->tokens / c->seq_len;
	c->tokens = c->batch * c->seq_len;
	if (c->batch == 0)
		return status_set(STATUS_INVALID,
		                  "--seq-len: %" PRId64 " is more than --tokens %" PRId64,
		                  c->seq_len, options->tokens);
	return STATUS_OK;
}

/* The columns that name the block; "rat" by itself, "hybrid" for a stack. */
static void describe_block(const struct stack *stack, struct bench_case *c)
{
	const struct layer_config *first = &stack->layers[0];

	snprintf(c->block, sizeof c->block, "%s",
	         stack->n_layers > 1 ? "hybrid" : first->class->name);
	c->n_layers = stack->n_layers;
	c->n_heads = first->n_heads;
	c->d_head = c->d_model / first->n_heads;
	if (!pattern_tunes(c->pattern, "window"))
		c->window = NO_VALUE;
	if (!pattern_tunes(c->pattern, "groups"))
		c->groups = NO_VALUE;
	if (!pattern_tunes(c->pattern, "position"))
		c->position = "";
	if (!pattern_tunes(c->pattern, "chunk"))
		c->chunk = NO_VALUE;
}

static enum status configure(void *self, const struct options *options, struct bench_case *c)
{
	struct block *block = self;
	c->model = "";
	enum status status = set_batch(options, c);

	if (status == STATUS_OK)
		status = configure_stack(block, c);
	if (status != STATUS_OK)
		return status;
	describe_block(&block->stack, c);
	for (int i = 0; i < block->stack.n_layers; i++) {
		const struct layer_config *layer = &block->stack.layers[i];

		if (strstr(layer->class->tunables, "chunk") && layer->chunk > c->seq_len)
			return status_set(STATUS_UNSUPPORTED,
			                  "a chunk of %" PRId64 " is longer than T = %" PRId64,
			                  layer->chunk, c->seq_len);
	}
	return STATUS_OK;
}

static struct layer_shape shape_of(const struct bench_case *c)
{
	struct layer_shape shape = {
	        .pass = PASS_PREFILL,
	        .batch = c->batch,
	        .seq_len = c->seq_len,
	        .capacity = c->seq_len,
	};

	if (strcmp(c->pass, "train") == 0) {
		shape.pass = PASS_TRAIN;
		shape.capacity = 0;
	} else if (strcmp(c->pass, "generation") == 0) {
		shape.pass = PASS_GENERATION;
		shape.seq_len = 1;
	}
	return shape;
}

static enum status plan(void *self, const struct context *ctx, struct bench_case *c,
                        size_t memory_free, size_t *bytes, struct kernel_plan *work)
{
	struct block *block = self;
	struct layer_shape shape = shape_of(c);
	struct memory_plan memory;
	enum status status = configure_stack(block, c);

	(void)memory_free;
	if (status == STATUS_OK)
		status = stack_plan(&block->stack, ctx, &shape, &memory, work);
	if (status == STATUS_OK)
		*bytes = memory.total;
	return status;
}

static enum status acquire(void *self, struct context *ctx, const struct bench_case *c,
                           uint64_t seed)
{
	struct block *block = self;
	struct layer_shape shape = shape_of(c);
	enum status status = configure_stack(block, c);

	if (status == STATUS_OK)
		status = stack_allocate(&block->stack, ctx, &shape);
	if (status == STATUS_OK)
		status = stack_initialize(&block->stack, seed);
	if (status == STATUS_OK && shape.pass == PASS_GENERATION)
		status = stack_fill_state(&block->stack, c->seq_len - 1, seed + 1);
	return status;
}

static enum status rewind_block(void *self, struct context *ctx, const struct bench_case *c,
                                bool to_verify, double *prefill_ms)
{
	struct block *block = self;
	enum status status;

	(void)ctx;
	(void)prefill_ms;
	if (!to_verify)
		return STATUS_OK;
	status = stack_poison(&block->stack);
	if (status == STATUS_OK && strcmp(c->pass, "generation") == 0)
		status = stack_snapshot_state(&block->stack, (uint64_t)c->seq_len);
	return status;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	(void)c;
	return stack_run(&((struct block *)self)->stack, ctx);
}

static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, double *rel_err)
{
	(void)c;
	return stack_verify(&((struct block *)self)->stack, ctx, rows, seed, rel_err);
}

static void release(void *self)
{
	stack_release(&((struct block *)self)->stack);
}

int block_main(const struct driver *driver, int argc, char **argv)
{
	static struct block block;
	const struct subject subject = {
	        .self = &block,
	        .use = use,
	        .configure = configure,
	        .plan = plan,
	        .acquire = acquire,
	        .warm_up = launch,
	        .rewind = rewind_block,
	        .launch = launch,
	        .verify = verify,
	        .release = release,
	};

	return bench_main(driver, &subject, argc, argv);
}
