#include "bench/kernel_bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/bench.h"
#include "bench/harness/print.h"
#include "kernels/check.h"
#include "kernels/problem.h"

enum {
	MAX_CASES = 1024,
	MAX_NOTES = 4096,
	CHECKED_ROWS = 1024,
	GATE_RANK = 16,
	VOCABULARY = 32000,
	/* Of rows that no list has. */
	PAPER_LENGTH = 4096,
	DEFAULT_WINDOW = 1024,
	DEFAULT_CHUNK = 16,
	DEFAULT_GROUPS = 2
};

/* What the table at the end says of a row. */
struct note {
	char label[128], provider[MAX_WORD];
	char series[128]; /* the label without what data are like */
	enum data data;
	double ms, tflops, gb_per_s, roofline_pct;
	bool ok;
};

struct kernel_bench {
	const struct case_row *paper, *other;
	bool all;
	struct device *device;
	struct problem problem;
	struct check *check; /* of the launch under way */
	void *memory;
	int n_notes;
	struct note notes[MAX_NOTES];
};

/* Another, which holds no memory yet. */
static void *clone(void *self)
{
	struct kernel_bench *copy = calloc(1, sizeof *copy);

	if (copy)
		copy->device = ((struct kernel_bench *)self)->device;
	return copy;
}

static void use(void *self, struct device *device)
{
	((struct kernel_bench *)self)->device = device;
}

/* ---- forms of operations ---- */

/* An operation in one of its forms. */
struct form {
	enum operation operation;
	const struct operation_form *variant;
	char name[MAX_WORD];
};

/* The form number `index` of all; false behind the last. */
static bool form_at(int index, struct form *form)
{
	static const struct operation_form only_one = {0};

	for (int op = 0; op < OP_COUNT; op++) {
		const struct operation_form *v = operation_forms((enum operation)op);
		int n = 0;

		while (v[n].name)
			n++;
		if (index < (n ? n : 1)) {
			form->operation = (enum operation)op;
			form->variant = n ? &v[index] : &only_one;
			form_name(form->operation, form->variant, form->name, MAX_WORD);
			return true;
		}
		index -= n ? n : 1;
	}
	return false;
}

/* The form of a name; attention's are told apart by their mask. False if there is none. */
static bool form_find(const char *name, enum mask mask, struct form *form)
{
	struct form any;
	bool found = false;

	for (int i = 0; form_at(i, &any); i++) {
		if (strcmp(any.name, name) != 0 || (found && any.variant->mask != mask))
			continue;
		*form = any;
		found = true;
	}
	return found;
}

static enum mask mask_of(bool window, bool chunk)
{
	return window ? MASK_WINDOW : chunk ? MASK_CHUNK : MASK_CAUSAL;
}

static struct form form_of_case(const struct bench_case *c)
{
	struct form form = {0};

	form_find(c->block, mask_of(c->window != NO_VALUE, c->chunk != NO_VALUE), &form);
	return form;
}

/* The operands of a form at some small sizes. */
static void operands_of(const struct form *form, struct operand_list *list)
{
	const struct sizes small = {1, 2, 2, 1, 1, 4, 4, 4, 8, 8, 8, 2, 2, 1, 4, false, 0};
	static union any_args args;

	args = (union any_args){0};
	operation_describes(form->operation)->size(&args, &small, form->variant);
	operation_describe(form->operation, &args, list);
}

/* Whether a sequence's length makes a difference: the operation mixes tokens, or has a cache. */
static bool has_length(const struct form *form)
{
	struct operand_list list;

	operands_of(form, &list);
	for (int i = 0; i < list.count; i++)
		for (int d = 0; d < OPERAND_DIMS; d++)
			if ((list.operand[i].axis[d] == AXIS_TOKEN &&
			     list.operand[i].size[d] > 1) ||
			    list.operand[i].axis[d] == AXIS_KEY)
				return true;
	return false;
}

/* Whether the operation has scores, which data can give a shape. */
static bool has_scores(const struct form *form)
{
	struct operand_list list;
	bool found = false;

	operands_of(form, &list);
	for (int i = 0; i < list.count; i++)
		found = found || list.operand[i].side != SIDE_NONE;
	return found;
}

static bool is_step(const struct form *form)
{
	return operation_describes(form->operation)->is_step;
}

/* A chunk length is asked for where it is RAT's, or that of a recurrence in chunks. */
static bool takes_chunk(const struct form *form)
{
	return form->variant->chunks || form->operation == OP_MATRIX_RECURRENCE ||
	       form->operation == OP_MATRIX_RECURRENCE_BACKWARD;
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

/* Sizes that follow from others. */
static enum status complete_case(const struct options *o, const struct case_row *row,
                                 const struct form *form, struct bench_case *c)
{
	const bool half = form->variant->half_keys && !row->wide_keys;
	const int64_t keys = half ? c->d_model / 2 : c->d_model;
	const int64_t widening = form->variant->widening;

	/* Where there are no scores it makes no difference what they are like. */
	if (data_has_directions(c->data) && !has_scores(form))
		c->data = DATA_NORMAL;
	if (c->n_heads < 1 || c->d_model % (2 * c->n_heads) != 0)
		return status_set(STATUS_INVALID,
		                  "--heads: %lld (allowed: a number that divides half the width of "
		                  "%lld)",
		                  (long long)c->n_heads, (long long)c->d_model);
	if (c->kv_heads != NO_VALUE && c->n_heads % c->kv_heads != 0) {
		c->status = STATUS_UNSUPPORTED;
		snprintf(c->message, sizeof c->message, "%lld heads of keys for %lld of queries",
		         (long long)c->kv_heads, (long long)c->n_heads);
	}
	c->d_head = c->d_model / c->n_heads;
	c->d_k = widening ? c->d_model : keys / c->n_heads;
	c->d_v = widening ? widening * c->d_model : c->d_head;
	if (is_step(form)) {
		c->batch = row->batch && !options_given(o, "batch") ? row->batch : o->batch;
		c->tokens = c->batch;
		return c->batch > 0 ? STATUS_OK
		                    : status_set(STATUS_INVALID,
		                                 "--batch: a step needs at least 1 sequence");
	}
	c->batch = (row->batch ? row->batch : o->tokens) / c->seq_len;
	c->tokens = c->batch * c->seq_len;
	return c->batch > 0
	               ? STATUS_OK
	               : status_set(STATUS_INVALID, "--seq-len: %lld is more than --tokens %lld",
	                            (long long)c->seq_len,
	                            (long long)(row->batch ? row->batch : o->tokens));
}

/* Completes a case and adds it, once; an impossible one with the reason. */
static enum status add_case(const struct options *o, const struct case_row *row,
                            const struct form *form, struct bench_case *c, struct sweep *sweep)
{
	c->status = complete_case(o, row, form, c);
	if (c->status != STATUS_OK) {
		c->status = STATUS_UNSUPPORTED;
		snprintf(c->message, sizeof c->message, "%s", status_message());
	}
	for (int i = 0; i < sweep->count; i++)
		if (same_case(&sweep->cases[i], c))
			return STATUS_OK;
	if (sweep->count == MAX_CASES)
		return status_set(STATUS_INVALID, "the lists make a sweep of more than %d cases",
		                  MAX_CASES);
	sweep->cases[sweep->count++] = *c;
	return STATUS_OK;
}

/* A case for each --data, side by side. */
static enum status add_all_data(const struct options *o, const struct case_row *row,
                                const struct form *form, const struct bench_case *c,
                                struct sweep *sweep)
{
	const bool every = row->every_data && !options_given(o, "data");
	const int count = every ? DATA_ZEROS : o->data.count;

	for (int i = 0; i < count; i++) {
		struct bench_case one = *c;

		one.data = every ? (enum data)i : data_find(o->data.word[i]);
		TRY(add_case(o, row, form, &one, sweep));
	}
	return STATUS_OK;
}

/* The lengths of a row: its own, or those of --seq-len; one where a length makes no difference. */
static struct values lengths_of(const struct options *o, const struct case_row *row,
                                const struct form *form)
{
	struct values lengths = {0};

	if (!has_length(form))
		return (struct values){1, {1}};
	while (lengths.count < MAX_LENGTHS && row->seq_len[lengths.count]) {
		lengths.value[lengths.count] = row->seq_len[lengths.count];
		lengths.count++;
	}
	return lengths.count == 0 || options_given(o, "seq-len") ? o->seq_len : lengths;
}

/* A row's cases: every combination of its lists, sequence length innermost. */
static enum status add_row(const struct options *o, const struct case_row *row,
                           const struct form *form, struct sweep *sweep)
{
	const struct values heads = axis(o, "heads", &o->heads, row->n_heads);
	const bool chunks = row->chunk || form->variant->chunks ||
	                    (takes_chunk(form) && options_given(o, "chunk"));
	const struct values chunk =
	        chunks ? axis(o, "chunk", &o->chunk, row->chunk ? row->chunk : DEFAULT_CHUNK)
	               : (struct values){1, {NO_VALUE}};
	const struct values lengths = lengths_of(o, row, form);
	struct bench_case c = case_empty();

	c.pass = PASS_KERNEL;
	c.position = c.model = "";
	c.groups = form->variant->chunks ? DEFAULT_GROUPS : NO_VALUE;
	c.kv_heads = row->kv_heads ? row->kv_heads : NO_VALUE;
	if (row->window)
		c.window = options_given(o, "window") ? o->window.value[0] : row->window;
	snprintf(c.block, sizeof c.block, "%s", row->block);
	snprintf(c.pattern, sizeof c.pattern, "%s", row->block);
	for (int w = 0; w < o->d_model.count; w++)
		for (int h = 0; h < heads.count; h++)
			for (int l = 0; l < chunk.count; l++)
				for (int t = 0; t < lengths.count; t++) {
					c.d_model = o->d_model.value[w];
					c.n_heads = heads.value[h];
					c.chunk = chunk.value[l];
					c.seq_len = lengths.value[t];
					TRY(add_all_data(o, row, form, &c, sweep));
				}
	return STATUS_OK;
}

static enum status add_rows_of(const struct options *o, const struct case_row *rows,
                               struct sweep *sweep)
{
	for (; rows->block; rows++) {
		const enum mask mask = mask_of(rows->window, rows->chunk);
		struct form form;

		if (!wanted(o, rows->block))
			continue;
		if (!form_find(rows->block, mask, &form))
			return status_set(STATUS_INVALID, "no operation is called '%s'",
			                  rows->block);
		TRY(add_row(o, rows, &form, sweep));
	}
	return STATUS_OK;
}

static bool is_listed(const struct case_row *rows, const char *name)
{
	for (; rows->block; rows++)
		if (strcmp(rows->block, name) == 0)
			return true;
	return false;
}

/* A row for every form that is in no list. */
static enum status add_others(const struct options *o, const struct case_row *rows, bool full,
                              struct sweep *sweep)
{
	struct form form;

	for (int i = 0; form_at(i, &form); i++) {
		const struct case_row row = {
		        .block = form.name,
		        .seq_len = {full ? PAPER_LENGTH : 0},
		        .window = form.variant->mask == MASK_WINDOW ? DEFAULT_WINDOW : 0};

		if (wanted(o, form.name) && !is_listed(rows, form.name) &&
		    form.variant->mask != MASK_FULL)
			TRY(add_row(o, &row, &form, sweep));
	}
	return STATUS_OK;
}

/* Every word of --pattern must be the name of a form. */
static enum status check_patterns(const struct options *o)
{
	struct form form;

	for (int i = 0; i < o->pattern.count; i++)
		if (!form_find(o->pattern.word[i], MASK_CAUSAL, &form))
			return status_set(STATUS_INVALID,
			                  "--pattern: no operation is called '%.64s' (allowed: the "
			                  "operations of --list, gla_forward and the like)",
			                  o->pattern.word[i]);
	return STATUS_OK;
}

static enum status make_sweep(void *self, const struct options *o, struct sweep *sweep)
{
	struct kernel_bench *bench = self;
	const bool full = strcmp(o->preset, "paper") == 0;
	const struct case_row *rows = full ? bench->paper : bench->other;

	TRY(check_patterns(o));
	*sweep = (struct sweep){.cases = calloc(MAX_CASES, sizeof *sweep->cases)};
	if (!sweep->cases)
		return status_set(STATUS_OOM, "no memory for a sweep");
	TRY(add_rows_of(o, rows, sweep));
	if (bench->all)
		TRY(add_others(o, rows, full, sweep));
	return sweep_expect_possible(sweep);
}

static enum operation operation_of(void *self, const struct bench_case *c)
{
	return form_of_case(c).operation;
}

/* ---- a case ---- */

static void plan_problem(struct problem *p, struct device *device, const struct bench_case *c,
                         uint64_t seed, void *memory)
{
	const struct form form = form_of_case(c);
	const struct problem_form how = {
	        .variant = form.variant,
	        .sizes = {.batch = c->batch,
	                  .seq_len = c->seq_len,
	                  .n_heads = c->n_heads,
	                  .groups = c->groups == NO_VALUE ? c->n_heads : c->groups,
	                  .kv_heads = c->kv_heads == NO_VALUE ? c->n_heads : c->kv_heads,
	                  .d_head = c->d_head,
	                  .d_k = c->d_k,
	                  .d_v = c->d_v,
	                  .width = c->d_model,
	                  .d_in = c->d_k,
	                  .d_out = c->d_v,
	                  .rank = GATE_RANK,
	                  .chunk = c->chunk == NO_VALUE ? 0 : c->chunk,
	                  .window = c->window,
	                  .vocab = VOCABULARY},
	        .seed = seed,
	        .data = c->data,
	};

	problem_plan(p, device, form.operation, &how, memory);
}

/* As stacks of layers do it: before a product of sizes is formed that no memory holds. */
static enum status check_sizes(const struct bench_case *c)
{
	const int64_t widest = c->d_v > c->d_model ? c->d_v : c->d_model;

	if (c->seq_len > INT32_MAX || c->batch > INT32_MAX)
		return status_set(STATUS_UNSUPPORTED,
		                  "batch %lld, sequence of %lld: both are counted in 32 bits",
		                  (long long)c->batch, (long long)c->seq_len);
	if (elements_fit(c->batch, c->seq_len, widest) && elements_fit(c->batch, c->d_k, widest) &&
	    elements_fit(1, widest, c->d_model))
		return STATUS_OK;
	return status_set(
	        STATUS_OOM,
	        "batch %lld, sequence of %lld, D = %lld: a tensor would be larger than any memory",
	        (long long)c->batch, (long long)c->seq_len, (long long)c->d_model);
}

static enum status plan(void *self, const struct context *ctx, struct bench_case *c,
                        size_t memory_free, size_t *bytes, struct kernel_plan *work)
{
	struct problem p;
	struct context planning = *ctx;

	TRY(check_sizes(c));
	plan_problem(&p, ctx->device, c, 0, NULL);
	planning.plan = work;
	enum status status = kernel_run(&planning, p.operation, &p.args);

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

	if (status == STATUS_OK)
		status = device_allocate(ctx->device, bytes, &bench->memory);
	if (status == STATUS_OK) {
		plan_problem(&bench->problem, ctx->device, c, seed, bench->memory);
		ctx->workspace = (char *)bench->memory + bench->problem.bytes;
		ctx->workspace_bytes = work->workspace_bytes;
		status = problem_fill(&bench->problem, false);
	}
	free(work);
	return status;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	struct kernel_bench *bench = self;

	return kernel_run(ctx, bench->problem.operation, &bench->problem.args);
}

/* Nothing of what a provider before this one has left may stand in for a result. */
static enum status rewind_to_launch(void *self, struct context *ctx, const struct bench_case *c,
                                    bool to_verify, double *prefill_ms)
{
	struct kernel_bench *bench = self;
	const struct check_options options = {
	        .rows = CHECKED_ROWS,
	        .seed = bench->problem.form.seed,
	        .kernel = kernel_select(ctx, bench->problem.operation, &bench->problem.args)};

	if (!to_verify)
		return STATUS_OK;
	check_free(bench->check);
	bench->check = NULL;
	if (ctx->workspace_bytes > 0)
		TRY(device_fill(ctx->device, ctx->workspace, 0xff, ctx->workspace_bytes));
	TRY(problem_poison(&bench->problem));
	return check_begin(&bench->check, ctx->device, bench->problem.operation,
	                   &bench->problem.args, &options);
}

static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, struct accuracy *found)
{
	struct kernel_bench *bench = self;
	struct check_result result = {0};
	enum status status = check_end(bench->check, &result);

	*found = (struct accuracy){result.rel_err, result.share};
	if (status == STATUS_OK && result.name)
		status_set(STATUS_OK, "%.*s, %s", (int)strcspn(result.name, "|"), result.name,
		           result.test);
	return status;
}

static void release(void *self)
{
	struct kernel_bench *bench = self;

	check_free(bench->check);
	bench->check = NULL;
	problem_free(&bench->problem);
	device_release(bench->device, bench->memory);
	bench->memory = NULL;
}

/* ---- the table at the end ---- */

/* A case without the pass, which is the same for all, and with the widths of keys and values. */
static void label_case(const struct bench_case *c, char *label, size_t size)
{
	describe_case(c, label, size);
	const size_t block = strlen(c->block), pass = strlen(passes[c->pass].name) + 1;
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
	struct bench_case plain = *c;

	if (bench->n_notes == MAX_NOTES)
		return;
	bench->n_notes++;
	plain.data = DATA_NORMAL;
	n->data = c->data;
	label_case(c, n->label, sizeof n->label);
	label_case(&plain, n->series, sizeof n->series);
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

/* Of one provider the times of a case on each kind of data. */
struct spread {
	double ms[DATA_COUNT]; /* NAN: not measured */
	int count;
};

static struct spread spread_of(const struct kernel_bench *bench, const struct note *like)
{
	struct spread spread = {.count = 0};

	for (int d = 0; d < DATA_COUNT; d++)
		spread.ms[d] = NAN;
	for (int i = 0; i < bench->n_notes; i++) {
		const struct note *n = &bench->notes[i];

		if (!n->ok || strcmp(n->series, like->series) != 0 ||
		    strcmp(n->provider, like->provider) != 0)
			continue;
		spread.count += isnan(spread.ms[n->data]);
		spread.ms[n->data] = n->ms;
	}
	return spread;
}

/* Whether a note is the first of its case and provider, whatever its data. */
static bool is_first(const struct kernel_bench *bench, const struct note *note)
{
	for (const struct note *n = bench->notes; n < note; n++)
		if (n->ok && strcmp(n->series, note->series) == 0 &&
		    strcmp(n->provider, note->provider) == 0)
			return false;
	return note->ok;
}

static void print_spread(FILE *file, const struct note *note, const struct spread *spread)
{
	double loss = 0;

	fprintf(file, "%-60s %-18s", note->series, note->provider);
	for (int d = 0; d < DATA_COUNT; d++) {
		if (isnan(spread->ms[d]))
			fprintf(file, " %9s", "");
		else
			fprintf(file, " %9.4g", spread->ms[d]);
		loss = fmax(loss, spread->ms[d] / spread->ms[DATA_NORMAL] - 1);
	}
	if (!isnan(spread->ms[DATA_NORMAL]))
		fprintf(file, " %6.1f%%", 100 * loss);
	fputc('\n', file);
}

/* What difference the data make, where a case was measured on several kinds of them. */
static void print_spreads(const struct kernel_bench *bench, FILE *file)
{
	bool any = false;

	for (int i = 0; i < bench->n_notes; i++) {
		const struct note *n = &bench->notes[i];
		const struct spread spread = spread_of(bench, n);

		if (spread.count < 2 || !is_first(bench, n))
			continue;
		if (!any) {
			fprintf(file, "\n%-60s %-18s", "ms by data", "provider");
			for (int d = 0; d < DATA_COUNT; d++)
				fprintf(file, " %9s", data_name((enum data)d));
			fputs(" largest loss against normal\n", file);
		}
		any = true;
		print_spread(file, n, &spread);
	}
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
	print_spreads(bench, file);
}

int kernel_bench_main(const struct driver *driver, const struct case_row *paper,
                      const struct case_row *other, bool all, int argc, char **argv)
{
	static struct kernel_bench bench;
	static const struct subject subject = {
	        .self = &bench,
	        .clone = clone,
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
	bench.all = all;
	return bench_main(driver, &subject, argc, argv);
}
