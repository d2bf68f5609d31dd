/* Where the time of a block goes: each of its operations by itself, against what the device allows.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/ceilings.h"
#include "layers/stack.h"

static const char usage[] =
        "usage: operations BACKEND PATTERN PASS SEQ_LEN [TOKENS [D_MODEL [PROVIDERS]]]\n"
        "\n"
        "Runs a block or stack, such as rat:16 or attention,swa:1024, and prints the time of\n"
        "each operation, its rates, and its part of the roofline. PASS is prefill, train or\n"
        "generation; TOKENS (262144; generation 512) are all tokens of a pass, D_MODEL is 2048,\n"
        "PROVIDERS are as for the other programs. Every operation is timed by itself, after\n"
        "the one before it has ended. The last line is the error against the fp64 reference.\n";

enum { MAX_RUNS = 256, SAMPLES = 5, MIN_ROWS = 256 };

/*
 * The operations of a pass in their order, with their shortest times. They are
 * seen through the profiler ranges around them; of nested ranges the innermost
 * is the operation.
 */
static struct {
	const struct backend *backend;
	const char *open;
	int count, next;
	const char *name[MAX_RUNS];
	double ms[MAX_RUNS];
	enum status status;
} trace;

static void begin_range(const char *name)
{
	trace.open = name;
	trace.backend->range_push(name);
	if (trace.status == STATUS_OK)
		trace.status = trace.backend->stopwatch_start();
}

static void end_range(void)
{
	double ms = 0;

	trace.backend->range_pop();
	if (!trace.open || trace.status != STATUS_OK || trace.next == MAX_RUNS)
		return;
	trace.status = trace.backend->stopwatch_stop(&ms);
	const int i = trace.next++;
	trace.ms[i] = i < trace.count ? fmin(trace.ms[i], ms) : ms;
	trace.name[i] = trace.open;
	trace.count = trace.next > trace.count ? trace.next : trace.count;
	trace.open = NULL;
}

struct setting {
	struct stack_options stack;
	struct layer_shape shape;
	int64_t seq_len;
	const char *providers;
};

static bool parse(int argc, char **argv, struct setting *s)
{
	*s = (struct setting){0};
	if (argc < 5 || argc > 8)
		return false;
	s->seq_len = atoll(argv[4]);
	s->shape.pass = strcmp(argv[3], "train") == 0        ? PASS_TRAIN
	                : strcmp(argv[3], "generation") == 0 ? PASS_GENERATION
	                                                     : PASS_PREFILL;
	const bool generates = s->shape.pass == PASS_GENERATION;
	const int64_t tokens = argc > 5 ? atoll(argv[5]) : generates ? 512 : 262144;
	if (s->seq_len < 1 || tokens < 1 || (!generates && tokens < s->seq_len))
		return false;
	s->shape.seq_len = generates ? 1 : s->seq_len;
	s->shape.batch = tokens / s->shape.seq_len;
	s->shape.capacity = s->shape.pass == PASS_TRAIN ? 0 : s->seq_len;
	s->stack = (struct stack_options){.pattern = argv[2],
	                                  .d_model = argc > 6 ? atoll(argv[6]) : 2048,
	                                  .window = 1024,
	                                  .groups = 2,
	                                  .chunk = 0,
	                                  .train_len = s->seq_len,
	                                  .rope = true,
	                                  .prenorm = true,
	                                  .residual = true,
	                                  .norm_eps = 1e-6f};
	s->providers = argc > 7 ? argv[7] : "";
	return true;
}

/* One pass after a warm-up, the stack's outputs poisoned before it: only what it writes counts. */
static enum status run_passes(struct stack *stack, struct context *ctx)
{
	enum status status = stack_poison(stack);

	for (int i = 0; i <= SAMPLES && status == STATUS_OK; i++) {
		ctx->ranges = i > 0;
		trace.next = 0;
		trace.status = trace.backend->flush_cache();
		status = stack_run(stack, ctx);
		if (status == STATUS_OK)
			status = trace.status;
	}
	return status == STATUS_OK ? trace.backend->synchronize() : status;
}

/* The planned operation of this name, NULL if there are several of different cost. */
static const struct planned_operation *planned(const struct kernel_plan *work, const char *name)
{
	const struct planned_operation *found = NULL;

	for (int i = 0; i < work->n_operations; i++) {
		const struct planned_operation *p = &work->operations[i];

		if (strcmp(operation_name(p->operation), name) != 0)
			continue;
		if (found)
			return NULL;
		found = p;
	}
	return found;
}

static void print_times(const struct kernel_plan *work, const struct ceilings *ceilings)
{
	double total = 0;

	printf("%-26s %-9s %10s %10s %10s %10s\n", "operation", "provider", "ms", "GB/s", "TFLOP/s",
	       "roofline");
	for (int i = 0; i < trace.count; i++) {
		const struct planned_operation *p = planned(work, trace.name[i]);

		total += trace.ms[i];
		printf("%-26s %-9s %10.4f", trace.name[i], p ? p->provider : "", trace.ms[i]);
		if (p) {
			struct kernel_plan one = {.n_operations = 1, .operations = {*p}};

			one.operations[0].count = 1;
			printf(" %10.0f %10.1f %9.1f%%",
			       1e-6 * (p->cost.bytes_read + p->cost.bytes_written) / trace.ms[i],
			       1e-9 * p->cost.flops / trace.ms[i],
			       100 * ceilings_roofline_ms(ceilings, &one) / trace.ms[i]);
		}
		printf("\n");
	}
	printf("%-26s %-9s %10.4f\n", "sum", "", total);
}

static enum status measure(struct setting *s, const struct backend *backend)
{
	static struct stack stack;
	struct backend traced = *backend;
	struct context ctx = {.backend = &traced};
	struct kernel_plan work = {0};
	struct memory_plan memory;
	struct ceilings ceilings;
	double rel_err = NAN;

	traced.range_push = begin_range;
	traced.range_pop = end_range;
	enum status status = provider_choice_parse(&ctx.choice, backend, s->providers);
	if (status == STATUS_OK)
		status = ceilings_measure(&ceilings, backend);
	if (status == STATUS_OK)
		status = stack_configure(&stack, &traced, &s->stack);
	if (status == STATUS_OK)
		status = stack_plan(&stack, &ctx, &s->shape, &memory, &work);
	if (status == STATUS_OK)
		status = stack_allocate(&stack, &ctx, &s->shape);
	if (status != STATUS_OK)
		return status;
	status = stack_initialize(&stack, 1);
	if (status == STATUS_OK && s->shape.pass == PASS_GENERATION)
		status = stack_fill_state(&stack, s->seq_len - 1, 2);
	if (status == STATUS_OK)
		status = run_passes(&stack, &ctx);
	if (status == STATUS_OK)
		print_times(&work, &ceilings);
	if (status == STATUS_OK && s->shape.pass != PASS_GENERATION)
		status = stack_verify(&stack, MIN_ROWS, 3, &rel_err);
	if (status == STATUS_OK && s->shape.pass != PASS_GENERATION)
		printf("rel_err %.2e\n", rel_err);
	stack_release(&stack);
	return status;
}

int main(int argc, char **argv)
{
	struct setting setting;

	if (!parse(argc, argv, &setting)) {
		fputs(usage, stderr);
		return 2;
	}
	trace.backend = backend_find(argv[1]);
	if (!trace.backend) {
		fprintf(stderr, "operations: no backend '%s' in this build\n", argv[1]);
		return 2;
	}
	enum status status = trace.backend->open(0);
	if (status == STATUS_OK) {
		status = measure(&setting, trace.backend);
		trace.backend->close();
	}
	if (status != STATUS_OK)
		fprintf(stderr, "operations: %s: %s\n", status_name(status), status_message());
	return status == STATUS_OK ? 0 : 1;
}
