#include "bench/generate.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/bench.h"
#include "bench/stack_case.h"

enum {
	MAX_PREFILL_TOKENS = 32768, /* prefilled at a time */
	N_CHECKED = 2,              /* sequences to verify: the first and the last */
	MAX_MODELS = 8
};

struct generation {
	const struct driver *driver;
	struct device *device;
	const struct model *models;
	int n_models;
	/* What rows call them: the name, and what options have changed, "1.3B/layers=12". */
	char names[MAX_MODELS][64];
	/* In place of a model's own; 0: none. */
	int64_t layers, vocab, ffn;
	size_t memory_limit;
	uint64_t seed;
	struct stack stack;
	bool allocated, prefilled;
	struct context largest; /* of the variant whose workspace all share */
	/* Tokens of the checked sequences: the prompt, then what the last launch picked. */
	int32_t *tokens[N_CHECKED];
	int32_t *next, *first; /* [batch]; picked last, and after the prompt */
};

static void use(void *self, struct device *device)
{
	((struct generation *)self)->device = device;
}

/* The index of a case's model. */
static int model_of(const struct generation *g, const struct bench_case *c)
{
	const size_t length = strcspn(c->model, "/");
	int i = 0;

	while (strlen(g->models[i].name) != length ||
	       strncmp(g->models[i].name, c->model, length) != 0)
		i++;
	return i;
}

/* Names a case's model, with every size that is not its own. */
static void name_model(struct generation *g, struct bench_case *c)
{
	const struct {
		const char *name;
		int64_t value, own;
	} sizes[] = {
	        {"layers", g->layers, g->models[model_of(g, c)].n_layers},
	        {"vocab", g->vocab, g->models[model_of(g, c)].vocab},
	        {"ffn", g->ffn, 4 * g->models[model_of(g, c)].d_model},
	};
	char *name = g->names[model_of(g, c)];
	const size_t size = sizeof g->names[0];
	char separator = '/';

	snprintf(name, size, "%s", g->models[model_of(g, c)].name);
	for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
		const size_t length = strlen(name);

		if (sizes[i].value == 0 || sizes[i].value == sizes[i].own)
			continue;
		snprintf(name + length, size - length, "%c%s=%" PRId64, separator, sizes[i].name,
		         sizes[i].value);
		separator = ',';
	}
	c->model = name;
}

static enum status check(void *self, const struct options *options)
{
	return stack_case_check(((struct generation *)self)->driver, options);
}

static enum status configure_model(struct generation *g, const struct bench_case *c,
                                   struct stack_options options)
{
	const struct model *model = &g->models[model_of(g, c)];

	options.n_layers = g->layers ? g->layers : model->n_layers;
	options.ffn = true;
	options.ffn_width = g->ffn;
	options.vocab = g->vocab ? g->vocab : model->vocab;
	return stack_configure(&g->stack, g->device, &options);
}

static enum status configure_stack(struct generation *g, const struct bench_case *c)
{
	return configure_model(g, c, stack_case_options(c));
}

static enum status configure(void *self, const struct options *options, struct bench_case *c)
{
	struct generation *g = self;

	c->prompt = options->prompt;
	c->generate = options->generate;
	c->seq_len = options->prompt + options->generate;
	c->batch = options->batch > 0 ? options->batch : NO_VALUE;
	if (c->generate < 2)
		return status_set(STATUS_INVALID, "--generate: at least 2 tokens, of which prefill "
		                                  "picks the first");
	g->layers = options->layers;
	g->vocab = options->vocab;
	g->ffn = options->ffn;
	c->d_model = g->models[model_of(g, c)].d_model;
	c->n_layers = g->layers ? g->layers : g->models[model_of(g, c)].n_layers;
	name_model(g, c);
	g->memory_limit = (size_t)options->memory << 20;
	g->seed = (uint64_t)options->seed;
	enum status status = configure_model(g, c, stack_case_given(c));

	stack_case_describe(&g->stack, status == STATUS_OK, c);
	/* "rat,swa" is called rat-swa. */
	pattern_names(c->pattern, '-', c->block, sizeof c->block);
	return status;
}

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static struct layer_shape shape_of(const struct bench_case *c)
{
	return (struct layer_shape){
	        .pass = PASS_THROUGHPUT,
	        .batch = c->batch,
	        .seq_len = c->prompt,
	        .capacity = c->seq_len,
	        .micro_batch = smaller(c->batch, c->micro_batch),
	};
}

static enum status bytes_for(struct generation *g, const struct context *ctx,
                             const struct bench_case *c, size_t *bytes)
{
	struct layer_shape shape = shape_of(c);
	struct memory_plan memory;

	TRY(stack_plan(&g->stack, ctx, &shape, &memory, NULL));
	*bytes = memory.total;
	return STATUS_OK;
}

/* Whether `value` in *size, one of the sizes of case c, still fits. */
static enum status try_size(struct generation *g, const struct context *ctx,
                            const struct bench_case *c, int64_t *size, int64_t value,
                            size_t available, bool *fits)
{
	size_t bytes = 0;

	*size = value;
	enum status status = bytes_for(g, ctx, c, &bytes);
	*fits = status == STATUS_OK && bytes <= available;
	return status == STATUS_OOM ? STATUS_OK : status;
}

/* Sets c->batch to the largest that fits into `available` bytes; 1 if none does. */
static enum status find_batch(struct generation *g, const struct context *ctx, struct bench_case *c,
                              size_t available)
{
	int64_t largest = 1, too_many = 2;
	bool fits = true;
	enum status status = STATUS_OK;

	while (status == STATUS_OK && too_many < INT32_MAX) {
		status = try_size(g, ctx, c, &c->batch, too_many, available, &fits);
		if (!fits)
			break;
		largest = too_many;
		too_many *= 2;
	}
	while (status == STATUS_OK && too_many - largest > 1) {
		int64_t middle = largest + (too_many - largest) / 2;

		status = try_size(g, ctx, c, &c->batch, middle, available, &fits);
		if (fits)
			largest = middle;
		else
			too_many = middle;
	}
	c->batch = largest;
	return status;
}

/*
 * Prefills as many sequences at a time as cost less than a hundredth of the
 * largest batch: their activations take memory from the caches.
 */
static enum status choose_batches(struct generation *g, const struct context *ctx,
                                  struct bench_case *c, size_t available)
{
	enum status status = find_batch(g, ctx, c, available);
	int64_t alone = c->batch;

	while (status == STATUS_OK && 2 * c->micro_batch * c->prompt <= MAX_PREFILL_TOKENS) {
		c->micro_batch *= 2;
		status = find_batch(g, ctx, c, available);
		if (c->batch >= alone - alone / 100 && c->batch >= c->micro_batch)
			continue;
		c->micro_batch /= 2;
		if (status == STATUS_OK)
			status = find_batch(g, ctx, c, available);
		break;
	}
	return status;
}

/* The same where the user chose the batch: as many as fit beside it. */
static enum status choose_micro_batch(struct generation *g, const struct context *ctx,
                                      struct bench_case *c, size_t available)
{
	enum status status = STATUS_OK;
	bool fits = true;

	while (status == STATUS_OK && fits &&
	       2 * c->micro_batch * c->prompt <= MAX_PREFILL_TOKENS && c->micro_batch < c->batch)
		status = try_size(g, ctx, c, &c->micro_batch, 2 * c->micro_batch, available, &fits);
	if (!fits)
		c->micro_batch /= 2;
	return status;
}

/* The host's memory is everybody's; on a device little else needs any. */
static size_t available_memory(const struct generation *g, size_t memory_free)
{
	bool host = strcmp(g->device->backend->name, "cpu") == 0;
	size_t available = memory_free - memory_free / (host ? 16 : 100);

	return g->memory_limit > 0 && g->memory_limit < available ? g->memory_limit : available;
}

/* All timed steps at the cost of the one in the middle. */
static enum status plan_steps(struct generation *g, const struct context *ctx,
                              const struct bench_case *c, struct kernel_plan *work)
{
	const struct layer_shape shape = shape_of(c);
	const double steps = (double)(c->generate - 1);
	enum status status =
	        stack_plan_step(&g->stack, ctx, &shape, c->prompt + c->generate / 2 - 1, work);

	for (int i = 0; i < work->n_operations; i++)
		work->operations[i].count *= c->generate - 1;
	work->total.flops *= steps;
	work->total.bytes_read *= steps;
	work->total.bytes_written *= steps;
	return status;
}

/* --memory is a promise: what needs more is not run, though the device may have it. */
static enum status check_memory(const struct generation *g, const struct bench_case *c,
                                size_t bytes)
{
	if (g->memory_limit == 0 || bytes <= g->memory_limit)
		return STATUS_OK;
	return status_set(STATUS_OOM,
	                  "%" PRId64
	                  " sequences need %zu bytes (%.1f MiB), --memory allows %zu MiB",
	                  c->batch, bytes, (double)bytes / (1 << 20), g->memory_limit >> 20);
}

static enum status plan(void *self, const struct context *ctx, struct bench_case *c,
                        size_t memory_free, size_t *bytes, struct kernel_plan *work)
{
	struct generation *g = self;

	c->micro_batch = 1;
	TRY(configure_stack(g, c));
	TRY((c->batch == NO_VALUE ? choose_batches : choose_micro_batch)(
	        g, ctx, c, available_memory(g, memory_free)));
	TRY(bytes_for(g, ctx, c, bytes));
	TRY(plan_steps(g, ctx, c, work));
	c->tokens = c->batch * (c->generate - 1);
	return check_memory(g, c, *bytes);
}

static void release(void *self)
{
	struct generation *g = self;

	stack_release(&g->stack);
	g->allocated = false;
	for (int i = 0; i < N_CHECKED; i++) {
		free(g->tokens[i]);
		g->tokens[i] = NULL;
	}
	free(g->next);
	free(g->first);
	g->next = g->first = NULL;
}

static enum status take_stack(struct generation *g, struct context *ctx, const struct bench_case *c,
                              const struct layer_shape *shape)
{
	g->allocated = g->prefilled = false;
	TRY(configure_stack(g, c));
	TRY(stack_allocate(&g->stack, ctx, shape));
	TRY(stack_initialize(&g->stack, g->seed));
	g->allocated = true;
	return STATUS_OK;
}

/* Takes the stack that generates unless it is there: verification has put another in its place.
 * Either way a variant gets the workspace that all share. */
static enum status require_stack(struct generation *g, struct context *ctx,
                                 const struct bench_case *c)
{
	const struct layer_shape shape = shape_of(c);

	if (!g->allocated)
		TRY(take_stack(g, &g->largest, c, &shape));
	ctx->workspace = g->largest.workspace;
	ctx->workspace_bytes = g->largest.workspace_bytes;
	return STATUS_OK;
}

static enum status acquire(void *self, struct context *ctx, const struct bench_case *c,
                           uint64_t seed)
{
	struct generation *g = self;
	bool enough = true;

	g->seed = seed;
	g->largest = *ctx;
	for (int i = 0; i < N_CHECKED; i++) {
		g->tokens[i] = malloc((size_t)c->seq_len * sizeof *g->tokens[i]);
		enough = enough && g->tokens[i];
	}
	g->next = malloc((size_t)c->batch * sizeof *g->next);
	g->first = malloc((size_t)c->batch * sizeof *g->first);
	if (!enough || !g->next || !g->first)
		return status_set(STATUS_OOM, "no memory for the tokens of %d sequences",
		                  N_CHECKED);
	return require_stack(g, ctx, c);
}

/* Index in the batch of a checked sequence. */
static int64_t checked_sequence(const struct bench_case *c, int i)
{
	return i == 0 ? 0 : c->batch - 1;
}

/* Reads the tokens that were picked for position `position`, as a server has to. */
static enum status read_next(struct generation *g, const struct bench_case *c, int64_t position)
{
	enum status status = device_download(g->device, g->next, g->stack.next,
	                                     (size_t)c->batch * sizeof *g->next);

	for (int i = 0; i < N_CHECKED; i++)
		g->tokens[i][position] = g->next[checked_sequence(c, i)];
	return status;
}

/* A few steps from whatever the caches hold: enough to have chosen and loaded every kernel. */
static enum status warm_up(void *self, struct context *ctx, const struct bench_case *c)
{
	struct generation *g = self;

	TRY(require_stack(g, ctx, c));
	TRY(stack_set_position(&g->stack, c->prompt));
	for (int64_t i = 0; i < smaller(2, c->generate - 1); i++)
		TRY(stack_step(&g->stack, ctx, c->prompt + i));
	return STATUS_OK;
}

/* Back to the end of the prompt: the caches still have it, or it is prefilled, timed apart. */
static enum status rewind_prompt(void *self, struct context *ctx, const struct bench_case *c,
                                 bool to_verify, double *prefill_ms)
{
	struct generation *g = self;
	size_t bytes = (size_t)c->prompt * sizeof *g->tokens[0];

	if (!to_verify && g->prefilled && stack_remembers(&g->stack, c->prompt)) {
		TRY(stack_set_position(&g->stack, c->prompt));
		return device_upload(g->device, g->stack.next, g->first,
		                     (size_t)c->batch * sizeof *g->first);
	}
	TRY(require_stack(g, ctx, c));
	if (to_verify)
		TRY(stack_poison(&g->stack));
	for (int i = 0; i < N_CHECKED; i++)
		TRY(device_download(g->device, g->tokens[i],
		                    g->stack.tokens + checked_sequence(c, i) * c->prompt, bytes));
	TRY(device_stopwatch_start(g->device));
	TRY(stack_forward(&g->stack, ctx));
	TRY(device_stopwatch_stop(g->device, prefill_ms));
	TRY(read_next(g, c, c->prompt));
	memcpy(g->first, g->next, (size_t)c->batch * sizeof *g->first);
	g->prefilled = true;
	return STATUS_OK;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	struct generation *g = self;

	for (int64_t p = c->prompt; p < c->seq_len - 1; p++) {
		TRY(stack_step(&g->stack, ctx, p));
		TRY(read_next(g, c, p + 1));
	}
	return STATUS_OK;
}

/* Logits of one row of stack.logits. */
static enum status download_logits(const struct generation *g, int64_t row, float *logits)
{
	size_t vocab = (size_t)g->stack.vocab;
	enum dtype dtype = g->device->activation;
	const char *from = (const char *)g->stack.logits + (size_t)row * vocab * dtype_size(dtype);

	return device_download_floats(g->device, dtype, logits, from, vocab);
}

/* What the logits of a model may be off by: its layers' roundings add up, and nothing tells by how
 * much. */
static const double LOGITS_FP32 = 5e-4, LOGITS_BF16 = 3e-2;

/* ||a - b|| / ||b||; anything that is not finite gives INFINITY. */
static double relative_error(const float *a, const float *b, int64_t count)
{
	double difference = 0, norm = 0;

	for (int64_t i = 0; i < count; i++) {
		difference += pow((double)a[i] - (double)b[i], 2);
		norm += pow(b[i], 2);
	}
	double error = difference == 0 ? 0 : sqrt(difference / norm);

	return isfinite(error) ? error : INFINITY;
}

/* A forward pass over all that the checked sequences have read; their last logits. */
static enum status forward_afresh(struct generation *g, struct context *ctx,
                                  const struct bench_case *c, float *logits)
{
	int64_t length = c->seq_len - 1;
	struct layer_shape shape = {
	        .pass = PASS_PREFILL, .batch = N_CHECKED, .seq_len = length, .capacity = 0};
	int32_t *tokens = malloc((size_t)(N_CHECKED * length) * sizeof *tokens);
	enum status status = tokens ? take_stack(g, ctx, c, &shape)
	                            : status_set(STATUS_OOM, "no memory for tokens");

	for (int i = 0; tokens && i < N_CHECKED; i++)
		memcpy(tokens + i * length, g->tokens[i], (size_t)length * sizeof *tokens);
	if (status == STATUS_OK)
		status = stack_set_tokens(&g->stack, tokens);
	free(tokens);
	if (status == STATUS_OK)
		status = stack_forward(&g->stack, ctx);
	for (int i = 0; status == STATUS_OK && i < N_CHECKED; i++)
		status = download_logits(g, i, logits + i * g->stack.vocab);
	return status;
}

/*
 * The logits of the last generated tokens against a fresh forward pass of the
 * same model over the whole sequences. It takes the place of the stack that
 * generated, which has all the memory; the next rewind brings that back.
 */
static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, struct accuracy *found)
{
	struct generation *g = self;
	int64_t vocab = g->stack.vocab;
	float *logits = malloc(2 * N_CHECKED * (size_t)vocab * sizeof *logits);
	float *fresh = logits + N_CHECKED * vocab;
	struct context apart = *ctx;
	enum status status = logits ? STATUS_OK : status_set(STATUS_OOM, "no memory for logits");

	for (int i = 0; status == STATUS_OK && i < N_CHECKED; i++)
		status = download_logits(g, checked_sequence(c, i), logits + i * vocab);
	stack_release(&g->stack);
	if (status == STATUS_OK)
		status = forward_afresh(g, &apart, c, fresh);
	stack_release(&g->stack);
	g->allocated = false;
	*found = (struct accuracy){0};
	for (int i = 0; status == STATUS_OK && i < N_CHECKED; i++)
		check_raise(&found->rel_err,
		            relative_error(logits + i * vocab, fresh + i * vocab, vocab));
	found->share =
	        found->rel_err / (g->device->activation == DTYPE_BF16 ? LOGITS_BF16 : LOGITS_FP32);
	free(logits);
	return status;
}

int generate_main(const struct driver *driver, const struct model *models, int n_models, int argc,
                  char **argv)
{
	static struct generation generation;
	const struct subject subject = {
	        .self = &generation,
	        .use = use,
	        .check = check,
	        .configure = configure,
	        .plan = plan,
	        .acquire = acquire,
	        .warm_up = warm_up,
	        .rewind = rewind_prompt,
	        .launch = launch,
	        .verify = verify,
	        .verifies_last = true,
	        .release = release,
	};

	generation.driver = driver;
	generation.models = models;
	generation.n_models = n_models;
	return bench_main(driver, &subject, argc, argv);
}
