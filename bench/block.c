#include "bench/block.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "bench/harness/bench.h"
#include "bench/stack_case.h"

/* One of these per program: about 200 KiB, so not on a thread's small stack. */
struct block {
	struct driver driver;
	struct device *device;
	struct stack stack;
};

/* Another, which holds no memory yet. */
static void *clone(void *self)
{
	struct block *copy = calloc(1, sizeof *copy);

	if (copy) {
		copy->driver = ((struct block *)self)->driver;
		copy->device = ((struct block *)self)->device;
	}
	return copy;
}

static void use(void *self, struct device *device)
{
	((struct block *)self)->device = device;
}

static enum status check(void *self, const struct options *options)
{
	return stack_case_check(&((struct block *)self)->driver, options);
}

static enum status configure_stack(struct block *block, const struct bench_case *c)
{
	const struct stack_options options = stack_case_options(c);

	return stack_configure(&block->stack, block->device, &options);
}

static enum status set_batch(const struct options *options, struct bench_case *c)
{
	if (passes[c->pass].step) {
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

static enum status configure(void *self, const struct options *options, struct bench_case *c)
{
	struct block *block = self;
	const struct stack_options given = stack_case_given(c);
	enum status batch = set_batch(options, c);
	enum status status = stack_configure(&block->stack, block->device, &given);

	c->model = "";
	snprintf(c->block, sizeof c->block, "%s",
	         block->stack.n_layers > 1 ? "hybrid" : block->stack.layers[0].class->name);
	c->n_layers = block->stack.n_layers;
	stack_case_describe(&block->stack, status == STATUS_OK, c);
	return status == STATUS_OK ? batch : status;
}

static struct layer_shape shape_of(const struct bench_case *c)
{
	return (struct layer_shape){
	        .pass = c->pass,
	        .batch = c->batch,
	        .seq_len = passes[c->pass].step ? 1 : c->seq_len,
	        .capacity = passes[c->pass].caches ? c->seq_len : 0,
	};
}

static enum status plan(void *self, const struct context *ctx, struct bench_case *c,
                        size_t memory_free, size_t *bytes, struct kernel_plan *work)
{
	struct block *block = self;
	struct layer_shape shape = shape_of(c);
	struct memory_plan memory;

	TRY(configure_stack(block, c));
	TRY(stack_plan(&block->stack, ctx, &shape, &memory, work));
	*bytes = memory.total;
	return STATUS_OK;
}

static enum status acquire(void *self, struct context *ctx, const struct bench_case *c,
                           uint64_t seed)
{
	struct block *block = self;
	struct layer_shape shape = shape_of(c);

	TRY(configure_stack(block, c));
	TRY(stack_allocate(&block->stack, ctx, &shape));
	TRY(stack_initialize(&block->stack, seed));
	return passes[c->pass].step ? stack_fill_state(&block->stack, c->seq_len - 1, seed + 1)
	                            : STATUS_OK;
}

static enum status rewind_block(void *self, struct context *ctx, const struct bench_case *c,
                                bool to_verify, double *prefill_ms)
{
	struct block *block = self;

	if (!to_verify)
		return STATUS_OK;
	TRY(stack_poison(&block->stack));
	return passes[c->pass].step ? stack_snapshot_state(&block->stack, (uint64_t)c->seq_len)
	                            : STATUS_OK;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	return stack_run(&((struct block *)self)->stack, ctx);
}

static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, struct accuracy *found)
{
	return stack_verify(&((struct block *)self)->stack, ctx, rows, seed, found);
}

static void release(void *self)
{
	stack_release(&((struct block *)self)->stack);
}

int block_main(const struct driver *driver, int argc, char **argv)
{
	static struct block block;
	static char file[MAX_WORD];
	const struct subject subject = {
	        .self = &block,
	        .clone = clone,
	        .use = use,
	        .check = check,
	        .configure = configure,
	        .plan = plan,
	        .acquire = acquire,
	        .warm_up = launch,
	        .rewind = rewind_block,
	        .launch = launch,
	        .verify = verify,
	        .release = release,
	};

	block.driver = *driver;
	/* Trials of one program do not mix with the run of all, which is latency.csv. */
	snprintf(file, sizeof file, "%s.csv", driver->program);
	block.driver.file = file;
	block.driver.passes = "prefill,train,generation";
	block.driver.axes = "pattern,seq-len,tokens,d-model," ARGUMENT_AXES;
	block.driver.print_help = stack_case_help;
	return bench_main(&block.driver, &subject, argc, argv);
}
