#include "bench/kernel_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/bench.h"
#include "bench/harness/print.h"
#include "bench/kernel.h"

enum { MAX_CASES = 1024, MAX_NOTES = 4096 };

/* What the table at the end says of a row. */
struct note {
	char label[96], provider[MAX_WORD];
	double ms, tflops, gb_per_s, roofline_pct;
	bool ok;
};

struct kernel_bench {
	const struct case_row *paper, *other;
	const struct backend *backend;
	struct kernel_problem problem;
	char *memory;
	size_t workspace_bytes;
	uint64_t seed;
	int n_notes;
	struct note notes[MAX_NOTES];
};

static void use(void *self, const struct backend *backend)
{
	struct kernel_bench *bench = self;

	bench->backend = backend;
}

/* ---- cases ---- */

/* The default of an axis, or what the command line gives instead. */
static struct values axis(const struct options *o, const char *name, const struct values *list,
                          int64_t fallback)
{
	if (fallback == 0 || options_given(o, name))
		return *list;
	return (struct values){1, {fallback}};
}

static bool same_case(const struct bench_case *a, const struct bench_case *b)
{
	return a->seq_len == b->seq_len && a->batch == b->batch && a->d_k == b->d_k &&
	       case_same_series(a, b);
}

static bool wanted(const struct options *o, const char *block)
{
	for (int i = 0; i < o->pattern.count; i++)
		if (strcmp(o->pattern.word[i], block) == 0)
			return true;
	return o->pattern.count == 0;
}

/* Completes a case and adds it, once. */
static enum status add_case(const struct options *o, const struct case_row *row,
                            struct bench_case *c, struct sweep *sweep)
{
	const struct kernel_kind *kind = kernel_kind_find(row->block);
	const bool half = kind->half_keys && !row->wide_keys;
	const int64_t keys = half ? c->d_model / 2 : c->d_model;

	c->status = STATUS_OK;
	if (c->d_model % (2 * c->n_heads) != 0)
		return status_set(STATUS_INVALID, "--heads: %lld heads do not divide width %lld",
		                  (long long)c->n_heads, (long long)c->d_model);
	c->d_head = c->d_model / c->n_heads;
	c->d_k = kind->widening ? c->d_model : keys / c->n_heads;
	c->d_v = kind->widening ? kind->widening * c->d_model : c->d_head;
	if (kind->step)
		c->batch = row->batch && !options_given(o, "batch") ? row->batch : o->batch;
	else
		c->batch = (row->batch ? row->batch : o->tokens) / c->seq_len;
	c->tokens = kind->step ? c->batch : c->batch * c->seq_len;
	if (c->batch == 0)
		return status_set(STATUS_INVALID, "--seq-len: %lld is more than --tokens %lld",
		                  (long long)c->seq_len, (long long)o->tokens);
	for (int i = 0; i < sweep->count; i++)
		if (same_case(&sweep->cases[i], c))
			return STATUS_OK;
	if (sweep->count == MAX_CASES)
		return status_set(STATUS_INVALID, "the lists make a sweep of more than %d cases",
		                  MAX_CASES);
	sweep->cases[sweep->count++] = *c;
	return STATUS_OK;
}

static struct bench_case empty_case(const struct case_row *row)
{
	struct bench_case c = {.pass = "kernel",
	                       .pattern = row->block,
	                       .position = "",
	                       .model = "",
	                       .groups = row->groups ? row->groups : NO_VALUE,
	                       .window = row->window ? row->window : NO_VALUE,
	                       .chunk = NO_VALUE,
	                       .prompt = NO_VALUE,
	                       .generate = NO_VALUE,
	                       .n_layers = NO_VALUE,
	                       .micro_batch = NO_VALUE};

	snprintf(c.block, sizeof c.block, "%s", row->block);
	return c;
}

/* A row's cases: every combination of its lists, sequence length innermost. */
static enum status add_row(const struct options *o, const struct case_row *row, struct sweep *sweep)
{
	const struct values heads = axis(o, "heads", &o->heads, row->n_heads);
	/* Attention has chunks only in RAT's rows, matrix recurrences where the user says so. */
	const bool chunks = row->chunk ||
	                    (kernel_kind_find(row->block)->chunkwise && options_given(o, "chunk"));
	const struct values chunk =
	        chunks ? axis(o, "chunk", &o->chunk, row->chunk) : (struct values){1, {NO_VALUE}};
	struct values lengths = {0};
	enum status status = STATUS_OK;

	while (lengths.count < MAX_LENGTHS && row->seq_len[lengths.count]) {
		lengths.value[lengths.count] = row->seq_len[lengths.count];
		lengths.count++;
	}
	/* A length of one says that the length does not matter. */
	if (row->seq_len[0] == 0 || (options_given(o, "seq-len") && row->seq_len[0] != 1))
		lengths = o->seq_len;
	for (int w = 0; w < o->d_model.count; w++)
		for (int h = 0; h < heads.count; h++)
			for (int l = 0; l < chunk.count; l++)
				for (int t = 0; t < lengths.count && status == STATUS_OK; t++) {
					struct bench_case c = empty_case(row);

					c.d_model = o->d_model.value[w];
					c.n_heads = heads.value[h];
					c.chunk = chunk.value[l];
					c.seq_len = lengths.value[t];
					if (row->window && options_given(o, "window"))
						c.window = o->window.value[0];
					status = add_case(o, row, &c, sweep);
				}
	return status;
}

static enum status make_sweep(void *self, const struct options *o, struct sweep *sweep)
{
	struct kernel_bench *bench = self;
	const bool full = strcmp(o->preset, "paper") == 0;
	const struct case_row *rows = full ? bench->paper : bench->other;
	enum status status = STATUS_OK;

	*sweep = (struct sweep){.cases = calloc(MAX_CASES, sizeof *sweep->cases)};
	if (!sweep->cases)
		return status_set(STATUS_OOM, "no memory for a sweep");
	for (; rows->block && status == STATUS_OK; rows++)
		if (wanted(o, rows->block))
			status = add_row(o, rows, sweep);
	return status;
}

static enum operation operation_of(void *self, const struct bench_case *c)
{
	(void)self;
	return kernel_kind_find(c->block)->operation;
}

/* ---- a case ---- */

/* A place that tensors of a plan pretend to begin at. */
static char nowhere[256] __attribute__((aligned(256)));

static enum status plan(void *self, const struct context *ctx, struct bench_case *c,
                        size_t memory_free, size_t *bytes, struct kernel_plan *work)
{
	struct kernel_problem p;
	struct context planning = *ctx;

	(void)self;
	(void)memory_free;
	kernel_problem_build(&p, ctx->backend, c, nowhere);
	planning.plan = work;
	enum status status = kernel_run(&planning, p.kind->operation, &p.args);

	*bytes = p.bytes + work->workspace_bytes;
	return status;
}

static enum status acquire(void *self, struct context *ctx, const struct bench_case *c,
                           uint64_t seed)
{
	struct kernel_bench *bench = self;
	struct bench_case copy = *c;
	struct kernel_plan *work = calloc(1, sizeof *work);
	size_t bytes = 0;
	enum status status = work ? plan(self, ctx, &copy, 0, &bytes, work)
	                          : status_set(STATUS_OOM, "no memory for a plan");
	void *memory = NULL;

	if (status == STATUS_OK)
		status = ctx->backend->allocate(bytes, &memory);
	if (status == STATUS_OK) {
		bench->memory = memory;
		bench->seed = seed;
		bench->workspace_bytes = work->workspace_bytes;
		kernel_problem_build(&bench->problem, ctx->backend, c, bench->memory);
		ctx->workspace = bench->memory + bench->problem.bytes;
		ctx->workspace_bytes = work->workspace_bytes;
		status = kernel_problem_fill(&bench->problem, seed);
	}
	free(work);
	return status;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	struct kernel_bench *bench = self;

	(void)c;
	return kernel_run(ctx, bench->problem.kind->operation, &bench->problem.args);
}

/* Nothing of what a provider before this one has left may stand in for a result. */
static enum status rewind_to_launch(void *self, struct context *ctx, const struct bench_case *c,
                                    bool to_verify, double *prefill_ms)
{
	struct kernel_bench *bench = self;
	enum status status = STATUS_OK;

	(void)c;
	(void)prefill_ms;
	if (!to_verify)
		return STATUS_OK;
	if (bench->workspace_bytes > 0)
		status = ctx->backend->fill(ctx->workspace, 0xff, bench->workspace_bytes);
	if (status == STATUS_OK)
		status = kernel_problem_poison(&bench->problem);
	return status == STATUS_OK ? kernel_problem_keep(&bench->problem, bench->seed) : status;
}

static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, double *rel_err)
{
	struct kernel_bench *bench = self;

	(void)ctx;
	(void)c;
	return kernel_problem_check(&bench->problem, rows, seed, rel_err);
}

static void release(void *self)
{
	struct kernel_bench *bench = self;

	kernel_problem_release(&bench->problem);
	bench->backend->release(bench->memory);
	bench->memory = NULL;
}

/* ---- the table at the end ---- */

/* A case without the pass, which is the same for all, and with the widths of keys and values. */
static void label_case(const struct bench_case *c, char *label, size_t size)
{
	describe_case(c, label, size);
	const size_t block = strlen(c->block), pass = strlen(c->pass) + 1;
	const size_t rest = strlen(label + block + pass) + 1;

	memmove(label + block, label + block + pass, rest);
	if (c->d_k != c->d_head || c->d_v != c->d_head) {
		const size_t length = strlen(label);

		snprintf(label + length, size - length, " %lldx%lld", (long long)c->d_k,
		         (long long)c->d_v);
	}
}

static void note(void *self, const struct bench_case *c, const struct record *record)
{
	struct kernel_bench *bench = self;
	struct note *n = &bench->notes[bench->n_notes];

	if (bench->n_notes == MAX_NOTES)
		return;
	bench->n_notes++;
	label_case(c, n->label, sizeof n->label);
	snprintf(n->provider, sizeof n->provider, "%s", record->requested);
	n->ok = strcmp(record->status, status_name(STATUS_OK)) == 0;
	n->ms = record->latency_ms;
	n->tflops = record->tflops;
	n->gb_per_s = record->gb_per_s;
	n->roofline_pct = record->roofline_pct;
}

/* Whether a provider is somebody else's kernel. */
static bool is_public(const struct note *n)
{
	return strncmp(n->provider, "cudnn", 5) == 0 || strncmp(n->provider, "cublas", 6) == 0 ||
	       strncmp(n->provider, "flash3", 6) == 0;
}

/* The fastest public provider of a case; NAN if there is none. */
static double best_public(const struct kernel_bench *bench, const char *label)
{
	double best = NAN;

	for (int i = 0; i < bench->n_notes; i++) {
		const struct note *n = &bench->notes[i];

		if (n->ok && is_public(n) && strcmp(n->label, label) == 0)
			best = fmin(best, n->ms);
	}
	return best;
}

static void finish(void *self, FILE *file)
{
	const struct kernel_bench *bench = self;
	const char *last = "";

	fprintf(file, "\n%-60s %-18s %10s %8s %6s %6s %s\n", "operation", "provider", "ms",
	        "TFLOP/s", "TB/s", "roof", "x best public");
	for (int i = 0; i < bench->n_notes; i++) {
		const struct note *n = &bench->notes[i];
		const double best = best_public(bench, n->label);

		if (!n->ok)
			continue;
		fprintf(file, "%-60s %-18s %10.4g %8.1f %6.2f %5.0f%%",
		        strcmp(n->label, last) == 0 ? "" : n->label, n->provider, n->ms, n->tflops,
		        1e-3 * n->gb_per_s, n->roofline_pct);
		last = n->label;
		if (!isnan(best) && !is_public(n))
			fprintf(file, " %6.2f", best / n->ms);
		fputc('\n', file);
	}
}

int kernel_bench_main(const struct driver *driver, const struct case_row *paper,
                      const struct case_row *other, int argc, char **argv)
{
	static struct kernel_bench bench;
	static const struct subject subject = {
	        .self = &bench,
	        .sweep = make_sweep,
	        .operation = operation_of,
	        .note = note,
	        .finish = finish,
	        .use = use,
	        .plan = plan,
	        .acquire = acquire,
	        .warm_up = launch,
	        .rewind = rewind_to_launch,
	        .launch = launch,
	        .verify = verify,
	        .release = release,
	};

	bench.paper = paper;
	bench.other = other;
	return bench_main(driver, &subject, argc, argv);
}
