#define _POSIX_C_SOURCE 200809L
#include "bench/harness/bench.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "baselines/baselines.h"
#include "bench/harness/about.h"
#include "bench/harness/breakdown.h"
#include "bench/harness/ceilings.h"
#include "bench/harness/environment.h"
#include "bench/harness/measure.h"
#include "bench/harness/noise.h"
#include "bench/harness/print.h"
#include "bench/harness/plan_device.h"
#include "bench/harness/progress.h"
#include "bench/harness/record.h"
#include "bench/harness/samples.h"
#include "bench/harness/streams.h"

/* Exit codes. */
enum { EXIT_OK, EXIT_CASES_FAILED, EXIT_USAGE };

/* What --provider asks for, of one case. */
struct variants {
	int count;
	struct {
		char requested[MAX_WORD];
		struct provider_choice choice;
	} of[MAX_VARIANTS];
};

/* Everything about one run of a program. */
struct run {
	const struct driver *driver;
	const struct subject *subject;
	struct options options;
	struct device *device;
	struct environment environment;
	struct sweep sweep;
	struct planned (*plans)[MAX_VARIANTS]; /* [sweep.count] */
	struct variants variants;              /* of the case under way */
	struct group group;                    /* the cases that alternate now */
	int cases[MAX_GROUP];                  /* index in the sweep of each of its members */
	int plan_of[MAX_GROUP_VARIANTS];       /* index in plans[] of each of its variants */
	bool ceilings_again;                   /* they have been measured a second time */
	struct record_file file;
	struct sample_file samples;
	struct progress progress;
	int rows_by_status[STATUS_COUNT];
	double started, sampling_seconds, verifying_seconds;
};

/* Baselines are other people's kernels for GPUs. */
static enum status open_device(struct run *run, const struct backend *backend)
{
	const struct kernel *const *more = backend == &cpu_backend ? NULL : baseline_kernels;

	return backend->open(run->options.device, more, &run->device);
}

/* On the backend that the user names, or the first that works: a machine without a usable GPU
 * still has its CPU. */
static enum status open_backend(struct run *run)
{
	struct options *o = &run->options;
	const struct backend *named = backend_find(o->backend);
	enum status status = STATUS_INVALID;

	if (o->plan_for[0])
		return plan_device_open(o, &run->device);
	if (o->backend[0]) {
		status = named ? open_device(run, named)
		               : status_set(STATUS_INVALID,
		                            "--backend: this build has no '%s'; --list shows",
		                            o->backend);
		return plan_device_wanted(o, status) ? plan_device_open(o, &run->device) : status;
	}
	for (int i = 0; backends[i] && status != STATUS_OK; i++) {
		status = open_device(run, backends[i]);
		if (status == STATUS_OK)
			snprintf(o->backend, sizeof o->backend, "%s", backends[i]->name);
		else if (o->device[0])
			break; /* a certain device is not any other */
		else if (backends[i + 1])
			fprintf(stderr, "%s: %s not used: %s\n", run->driver->program,
			        backends[i]->name, status_message());
	}
	return status;
}

/* The providers that a case's only operation has on this backend. */
static void list_providers(struct run *run, enum operation operation)
{
	struct variants *list = &run->variants;

	list->count = 0;
	for (const struct kernel *k = run->device->kernels; k->run; k++)
		if (k->operation == operation && kernel_is_first(run->device->kernels, k) &&
		    list->count < MAX_VARIANTS)
			snprintf(list->of[list->count++].requested, MAX_WORD, "%s", k->provider);
}

/*
 * The variants of a case: each --provider, without any one
 * of the fastest; of a single operation each of its providers; of the baseline each --rival, too.
 */
static enum status make_variants(struct run *run, const struct bench_case *c)
{
	const struct words *wanted = &run->options.provider, *rivals = &run->options.rival;
	const bool single = run->subject->operation != NULL;
	const int operation = single ? (int)run->subject->operation(run->subject->self, c) : -1;
	struct variants *list = &run->variants;

	*list = (struct variants){.count = wanted->count};
	for (int i = 0; i < wanted->count; i++)
		snprintf(list->of[i].requested, MAX_WORD, "%s", wanted->word[i]);
	if (single && !options_given(&run->options, "provider"))
		list_providers(run, (enum operation)operation);
	for (int i = 0; c->is_baseline && i < rivals->count && list->count < MAX_VARIANTS; i++)
		snprintf(list->of[list->count++].requested, MAX_WORD, "%s", rivals->word[i]);
	for (int i = 0; i < list->count; i++) {
		struct provider_choice *choice = &list->of[i].choice;

		TRY(provider_choice_parse(choice, run->device, list->of[i].requested));
		/* A single operation never falls back on another provider. */
		for (int j = 0; single && j < choice->count; j++)
			if (choice->choice[j].operation < 0)
				choice->choice[j].operation = operation;
	}
	return STATUS_OK;
}

static enum status check_options(const struct options *options)
{
	if (options->samples > MAX_SAMPLES)
		return status_set(STATUS_INVALID, "--samples: at most %d", MAX_SAMPLES);
	if (options->provider.count + options->rival.count > MAX_VARIANTS)
		return status_set(STATUS_INVALID,
		                  "--provider and --rival: given more than %d times", MAX_VARIANTS);
	if (options->threads > 1024)
		return status_set(STATUS_INVALID, "--threads: at most 1024");
	if (options->resume && options->truncate)
		return status_set(STATUS_INVALID,
		                  "--truncate: starts anew, but --resume continues; give one");
	return STATUS_OK;
}

static enum status plan_case(struct run *run, struct bench_case *c, struct planned *planned,
                             const struct provider_choice *choice)
{
	struct context ctx = {.device = run->device, .choice = *choice};
	struct kernel_plan *work = calloc(1, sizeof *work);
	enum status status = STATUS_OOM;

	*planned = (struct planned){.roofline_ms = NAN};
	if (work && c->status == STATUS_OK)
		status = run->subject->plan(run->subject->self, &ctx, c,
		                            run->environment.device.memory_free,
		                            &planned->memory_bytes, work);
	else if (work)
		status = status_set(c->status, "%s", c->message);
	planned->status = status;
	if (status != STATUS_OK) {
		snprintf(planned->message, sizeof planned->message, "%s", status_message());
	} else {
		planned->flops = work->total.flops;
		planned->bytes_read = work->total.bytes_read;
		planned->bytes_written = work->total.bytes_written;
		planned->roofline_ms = ceilings_roofline_ms(&run->device->ceilings, work);
	}
	free(work);
	return status;
}

static enum status plan_all(struct run *run)
{
	run->plans = calloc((size_t)run->sweep.count, sizeof *run->plans);
	if (!run->plans)
		return status_set(STATUS_OOM, "no memory for %d plans", run->sweep.count);
	for (int i = 0; i < run->sweep.count; i++) {
		TRY(make_variants(run, &run->sweep.cases[i]));
		for (int v = 0; v < run->variants.count; v++)
			plan_case(run, &run->sweep.cases[i], &run->plans[i][v],
			          &run->variants.of[v].choice);
	}
	return STATUS_OK;
}

static void record_environment(const struct run *run, struct record *r)
{
	const struct environment *e = &run->environment;
	bool on_cpu = strcmp(run->device->backend->name, "cpu") == 0;

	r->run_id = e->run_id;
	r->git_sha = e->git_sha;
	r->git_dirty = e->git_dirty;
	r->build = e->build;
	r->host = e->host;
	r->device = e->device.name;
	r->driver = e->device.driver;
	r->cuda = on_cpu ? "" : e->device.runtime;
	r->runtime = e->device.runtime;
	r->backend = run->device->backend->name;
	r->dtype = dtype_name(run->device->activation);
	r->threads = omp_get_max_threads();
	r->memory_total_mib = (double)e->device.memory_total / (1 << 20);
	r->compiler = e->compiler;
	r->program = run->driver->program;
	r->build = e->build;
	r->duty = run->options.duty;
	r->precision_pct = 100 * run->options.precision;
	r->warm = run->options.warm;
	r->deterministic = run->options.deterministic;
	r->copy_gb_per_s = run->device->ceilings.copy_gb_per_s;
	r->read_gb_per_s = run->device->ceilings.read_gb_per_s;
	r->gemm_tflops = run->device->ceilings.gemm_tflops;
}

static void record_case(const struct bench_case *c, struct record *r)
{
	/* Of a single operation the name says everything. */
	r->pattern = strcmp(c->pattern, c->block) == 0 ? "" : c->pattern;
	r->block = c->block;
	r->pass = pass_name(c->pass);
	r->position = c->position;
	r->model = c->model;
	r->data = data_name(c->data);
	r->state_bytes_per_token = c->state_bytes_per_token;
#define COPY(name) r->name = c->name;
	CASE_SIZES(COPY)
}

static void record_plan(const struct planned *plan, struct record *r)
{
	if (plan->memory_bytes > 0)
		r->memory_bytes = (int64_t)plan->memory_bytes;
	if (plan->status != STATUS_OK)
		return;
	r->flops = plan->flops;
	r->bytes = plan->bytes_read + plan->bytes_written;
	r->roofline_ms = plan->roofline_ms;
}

static void record_measurement(const struct variant *v, const struct bench_case *c,
                               struct record *r)
{
	double ms[MAX_SAMPLES];

	if (v->predicted_ms > 0)
		r->predicted_ms = v->predicted_ms;
	r->rel_err = v->found.rel_err;
	if (!status_measured(v->status) || v->n_samples == 0)
		return;
	latencies_of(v, ms);
	const struct summary s = summarize(ms, v->n_samples);

	r->latency_ms = s.median;
	r->latency_low_ms = s.interval.low;
	r->latency_high_ms = s.interval.high;
	r->latency_p20_ms = s.p20;
	r->latency_p80_ms = s.p80;
	r->latency_min_ms = s.minimum;
	r->samples = s.count;
	r->prefill_ms = v->prefill_ms;
	r->tokens_per_s = 1e3 * (double)c->tokens / s.median;
	r->tflops = 1e-9 * v->plan.flops / s.median;
	r->gb_per_s = 1e-6 * (v->plan.bytes_read + v->plan.bytes_written) / s.median;
	r->roofline_pct = 100 * v->plan.roofline_ms / s.median;
	r->peak_mem_mib = (double)v->plan.memory_bytes / (1 << 20);
}

/* What the rows of a group borrow. */
struct row_text {
	char now[32], id[40], provider[64], providers[512], reasons[64];
	char baseline[MAX_PATTERN_TEXT + MAX_WORD];
};

/* What a row says of a variant, without its measurement. */
static struct record describe_variant(struct run *run, const struct variant *v,
                                      struct row_text *text)
{
	const struct bench_case *c = run->group.members[v->member].c;
	struct record r = record_empty();

	record_environment(run, &r);
	record_case(c, &r);
	record_plan(&v->plan, &r);
	time_utc(text->now);
	r.time_utc = text->now;
	r.case_id = text->id;
	r.requested = v->requested;
	describe_providers(&v->ctx, text->provider, sizeof text->provider, text->providers,
	                   sizeof text->providers);
	/* A single operation's is the one asked for, whatever it does and even if it could not run.
	 */
	r.provider = text->provider[0] || !run->subject->operation ? text->provider : v->requested;
	r.providers = text->providers;
	return r;
}

/* The pattern and the provider that a ratio is relative to. */
static void name_baseline(const struct run *run, char *text, size_t size)
{
	const struct variant *v = &run->group.variants[run->group.baseline];
	const struct bench_case *c = run->group.members[v->member].c;

	snprintf(text, size, "%s%s%s%s", c->pattern, v->requested[0] ? " [" : "", v->requested,
	         v->requested[0] ? "]" : "");
}

/* Whether a variant has a ratio: it and the baseline were measured in the same rounds. */
static bool has_ratio(const struct run *run, int index)
{
	const struct group *g = &run->group;
	double a[MAX_SAMPLES], b[MAX_SAMPLES];

	return g->baseline >= 0 && index != g->baseline && !g->variants[index].finished &&
	       status_measured(g->variants[index].status) &&
	       status_measured(g->variants[g->baseline].status) &&
	       paired_samples(&g->variants[g->baseline], &g->variants[index], a, b) > 0;
}

/* A row that says how many times faster than the baseline a variant is. */
static struct record ratio_row(struct run *run, int index, struct row_text *text)
{
	const struct group *g = &run->group;
	const struct variant *v = &g->variants[index];
	double a[MAX_SAMPLES], b[MAX_SAMPLES];
	const int n = paired_samples(&g->variants[g->baseline], v, a, b);
	const struct ratio ratio = ratio_bootstrap(a, b, n);
	const double width = relative_half_width(ratio.interval, ratio.ratio);
	const bool noisy = run->options.precision > 0 && width > run->options.precision;
	struct record r = describe_variant(run, v, text);

	name_baseline(run, text->baseline, sizeof text->baseline);
	r.baseline = text->baseline;
	r.ratio = ratio.ratio;
	r.ratio_low = ratio.interval.low;
	r.ratio_high = ratio.interval.high;
	r.samples = n;
	r.rel_err = v->found.rel_err;
	r.status = status_name(noisy ? STATUS_NOISY : STATUS_OK);
	r.message = noisy ? "the ratio is not known as well as was asked for" : "";
	return r;
}

/* The row of one variant; its samples are saved. */
static enum status variant_row(struct run *run, const struct variant *v, struct row_text *text,
                               struct record *r)
{
	*r = describe_variant(run, v, text);
	record_measurement(v, run->group.members[v->member].c, r);
	record_conditions(v, r, text->reasons);
	r->status = status_name(v->status);
	r->message = v->message;
	return samples_append(&run->samples, r, v);
}

/* A name that no other row of any file has. */
static void name_row(const struct run *run, const struct variant *v, int number, char id[40])
{
	const char *const parts[] = {run->environment.run_id, run->driver->program,
	                             run->group.members[v->member].c->pattern, v->requested};
	uint64_t hash = 14695981039346656037u;

	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
		for (const char *c = parts[i]; *c; c++)
			hash = (hash ^ (unsigned char)*c) * 1099511628211u;
	snprintf(id, 40, "%08x.%d.%d", (unsigned)(hash >> 32 ^ hash), run->cases[v->member],
	         number);
}

/* The rows of a group, saved at once, then printed. */
static enum status write_rows(struct run *run)
{
	enum { MAX_ROWS = 2 * MAX_GROUP_VARIANTS };
	static struct row_text text[MAX_ROWS];
	static struct record rows[MAX_ROWS];
	const struct bench_case *cases[MAX_ROWS];
	const struct group *g = &run->group;
	int n = 0;

	for (int ratios = 0; ratios < 2; ratios++)
		for (int i = 0; i < g->n_variants; i++) {
			const struct variant *v = &g->variants[i];

			if (v->finished || (ratios && !has_ratio(run, i)))
				continue;
			name_row(run, v, n, text[n].id);
			cases[n] = g->members[v->member].c;
			if (ratios)
				rows[n] = ratio_row(run, i, &text[n]);
			else
				TRY(variant_row(run, v, &text[n], &rows[n]));
			run->rows_by_status[ratios ? STATUS_OK : v->status] += !ratios;
			n++;
		}
	TRY(record_append(&run->file, rows, n));
	progress_clear(&run->progress);
	for (int i = 0; i < n; i++) {
		print_row(stdout, &rows[i], run->options.format.word[0]);
		if (run->subject->note)
			run->subject->note(run->subject->self, cases[i], &rows[i]);
	}
	return STATUS_OK;
}

/* Whether any of a case's variants can run it. */
static bool provider_takes(const struct run *run, int index)
{
	for (int i = 0; i < run->variants.count; i++)
		if (run->plans[index][i].status != STATUS_UNSUPPORTED)
			return true;
	return false;
}

/* What the cases of a series before this one have taught about a variant. */
static void recall(const struct run *run, int index, int variant, struct variant *v)
{
	for (int i = index - 1; i >= 0; i--) {
		const struct planned *plan = &run->plans[i][variant];

		if (plan->launch_per_roofline == 0 ||
		    !case_same_series(&run->sweep.cases[i], &run->sweep.cases[index]))
			continue;
		v->known_ratio = plan->launch_per_roofline;
		v->known_verify = plan->verify_ms_per_flop;
		return;
	}
}

static bool row_finished(struct run *run, const struct bench_case *c, const char *requested)
{
	struct record r = record_empty();

	record_environment(run, &r);
	record_case(c, &r);
	r.requested = requested;
	return record_done(&run->file, &r);
}

/* Adds the variants of a case to the group. */
static enum status add_variants(struct run *run, int member)
{
	const int index = run->cases[member];
	const struct bench_case *c = &run->sweep.cases[index];
	struct group *g = &run->group;

	TRY(make_variants(run, c));
	/* Of an operation's providers nobody asked for only those count that take the case. */
	const bool asked = !run->subject->operation || !provider_takes(run, index) ||
	                   options_given(&run->options, "provider");
	for (int i = 0; i < run->variants.count; i++) {
		struct variant *v = &g->variants[g->n_variants];
		const struct planned *plan = &run->plans[index][i];

		if (!asked && plan->status == STATUS_UNSUPPORTED)
			continue;
		if (g->n_variants == MAX_GROUP_VARIANTS)
			return status_set(STATUS_INVALID,
			                  "more than %d patterns and providers to compare; --apart "
			                  "measures each by itself",
			                  MAX_GROUP_VARIANTS);
		run->plan_of[g->n_variants++] = i;
		v->member = member;
		v->choice = run->variants.of[i].choice;
		v->ctx = (struct context){
		        .device = run->device, .choice = v->choice, .ranges = run->options.nvtx};
		v->plan = *plan;
		v->known_ratio = v->known_verify = v->predicted_ms = 0;
		v->sampling_seconds = v->verifying_seconds = 0;
		v->n_samples = 0;
		v->found = (struct accuracy){NAN, NAN};
		v->prefill_ms = NAN;
		v->status = plan->status;
		memcpy(v->requested, run->variants.of[i].requested, sizeof v->requested);
		memcpy(v->message, plan->message, sizeof v->message);
		v->finished = row_finished(run, c, v->requested);
		recall(run, index, i, v);
	}
	return STATUS_OK;
}

/* Whether two cases of an operation differ in nothing but their data. */
static bool same_but_data(const struct bench_case *a, const struct bench_case *b)
{
	struct bench_case like = *b;

	like.data = a->data;
	return case_same_series(a, &like) && a->seq_len == b->seq_len && a->batch == b->batch &&
	       a->d_k == b->d_k && a->d_v == b->d_v;
}

/* Whether two cases are compared: the same but for their patterns and what those say. */
static bool same_but_pattern(const struct bench_case *a, const struct bench_case *b)
{
	return a->pass == b->pass && a->data == b->data && a->seq_len == b->seq_len &&
	       a->batch == b->batch && a->d_model == b->d_model && a->prompt == b->prompt &&
	       a->generate == b->generate && strcmp(a->model, b->model) == 0;
}

/* The variant that ratios are relative to: the first, of the pattern that was named. */
static int find_baseline(const struct run *run)
{
	const struct group *g = &run->group;

	for (int i = 0; g->n_variants > 1 && i < g->n_variants; i++)
		if (g->members[g->variants[i].member].c->is_baseline)
			return i;
	return -1;
}

/* The group of a case and of those after it that it is compared with, as far as they are not
 * `taken`. */
static enum status make_group(struct run *run, int first, bool *taken)
{
	const struct bench_case *cases = run->sweep.cases;
	struct group *g = &run->group;
	const bool alternate = run->subject->clone && !run->options.apart;
	bool (*const compared)(const struct bench_case *, const struct bench_case *) =
	        run->subject->operation ? same_but_data : same_but_pattern;

	g->subject = run->subject;
	g->n_members = g->n_variants = 0;
	for (int i = first; i < run->sweep.count && g->n_members < MAX_GROUP; i++) {
		if (taken[i] || (i > first && !(alternate && compared(&cases[first], &cases[i]))))
			continue;
		taken[i] = true;
		run->cases[g->n_members] = i;
		g->members[g->n_members] = (struct member){run->subject->self, &cases[i]};
		g->n_members++;
		TRY(add_variants(run, g->n_members - 1));
	}
	g->baseline = find_baseline(run);
	return STATUS_OK;
}

/* Of a group that is resumed what has rows is not measured again, except beside a baseline: a ratio
 * wants both in the same rounds. Returns whether anything is left. */
static bool drop_finished(struct group *g)
{
	bool all = true, any_finished = false;

	for (int i = 0; i < g->n_variants; i++) {
		all = all && g->variants[i].finished;
		any_finished = any_finished || g->variants[i].finished;
	}
	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];

		v->finished = v->finished && (all || g->baseline < 0);
		/* Any status but OK keeps a variant from being measured. */
		if (v->finished)
			v->status = STATUS_SKIPPED;
	}
	return !all;
}

static enum status clone_members(struct group *g)
{
	for (int i = 1; i < g->n_members; i++) {
		g->members[i].self = g->subject->clone(g->subject->self);
		if (!g->members[i].self)
			return status_set(STATUS_OOM, "no memory for %d cases at once",
			                  g->n_members);
	}
	return STATUS_OK;
}

static void free_members(struct group *g)
{
	for (int i = 1; i < g->n_members; i++)
		if (g->members[i].self != g->subject->self)
			free(g->members[i].self);
}

/* Plans a group again with the ceilings of now. */
static void plan_again(struct run *run)
{
	struct group *g = &run->group;

	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];
		struct planned again;

		if (plan_case(run, &run->sweep.cases[run->cases[v->member]], &again, &v->choice) ==
		    STATUS_OK)
			v->plan.roofline_ms = again.roofline_ms;
	}
}

/* The most of its roofline that any variant reaches. */
static double most_of_roofline(const struct group *g)
{
	double most = 0, ms[MAX_SAMPLES];

	for (int i = 0; i < g->n_variants; i++) {
		const struct variant *v = &g->variants[i];

		if (!status_measured(v->status) || v->n_samples == 0)
			continue;
		latencies_of(v, ms);
		most = fmax(most, v->plan.roofline_ms / median_of(ms, v->n_samples));
	}
	return most;
}

/* Nobody is faster than a roofline: the ceilings were too low, or what was counted too much. */
static enum status check_rooflines(struct run *run)
{
	static const double limit = 1.05;
	struct group *g = &run->group;
	double ms[MAX_SAMPLES];

	if (run->options.precision <= 0 || most_of_roofline(g) <= limit)
		return STATUS_OK;
	if (!run->ceilings_again) {
		run->ceilings_again = true;
		TRY(ceilings_again(run->device));
		plan_again(run);
	}
	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];

		if (!status_measured(v->status) || v->n_samples == 0)
			continue;
		latencies_of(v, ms);
		const double share = v->plan.roofline_ms / median_of(ms, v->n_samples);
		const size_t length = strlen(v->message);

		if (share > limit)
			snprintf(v->message + length, sizeof v->message - length,
			         "%s%.0f%% of the roofline: the ceilings of this run are too low",
			         length ? "; " : "", 100 * share);
	}
	return STATUS_OK;
}

static void keep_experience(struct run *run)
{
	const struct group *g = &run->group;

	for (int i = 0; i < g->n_variants; i++)
		run->plans[run->cases[g->variants[i].member]][run->plan_of[i]] =
		        g->variants[i].plan;
}

/* Measures a group and writes its rows. */
static enum status run_group(struct run *run)
{
	const struct options *o = &run->options;
	struct group *g = &run->group;
	const struct bench_case *c = g->members[0].c;
	const struct measurement_rule rule = {
	        .samples = (int)o->samples,
	        .min_time = o->min_time,
	        .max_time = o->max_time,
	        .precision = o->precision,
	        .case_seconds = o->case_seconds,
	        .rows = o->rows,
	        .seed = (uint64_t)o->seed,
	        .warm = o->warm,
	        .burst = strcmp(o->duty, "burst") == 0,
	};
	char label[160];

	if (!drop_finished(g))
		return STATUS_OK;
	describe_case(c, label, sizeof label);
	progress_show(&run->progress, label);
	enum status status = clone_members(g);
	if (status == STATUS_OK)
		measure_group(g, &rule);
	if (status == STATUS_OK)
		status = check_rooflines(run);
	keep_experience(run);
	for (int i = 0; i < g->n_variants; i++) {
		run->sampling_seconds += g->variants[i].sampling_seconds;
		run->verifying_seconds += g->variants[i].verifying_seconds;
	}
	if (status == STATUS_OK)
		status = write_rows(run);
	free_members(g);
	return status;
}

/* What a case weighs in the progress line: a constant, and the launches. */
static double case_work(const struct run *run, int index)
{
	double ms = run->plans[index][0].roofline_ms;

	return 1e3 * run->options.max_time / 2 + (isnan(ms) ? 0 : 20 * ms);
}

static enum status run_all(struct run *run)
{
	double all_work = 0;
	enum status status = STATUS_OK;
	bool *taken = calloc((size_t)run->sweep.count, sizeof *taken);

	if (!taken)
		return status_set(STATUS_OOM, "no memory for %d cases", run->sweep.count);
	for (int i = 0; i < run->sweep.count; i++)
		all_work += case_work(run, i);
	progress_begin(&run->progress, run->sweep.count, all_work);
	for (int i = 0; status == STATUS_OK && i < run->sweep.count; i++) {
		if (taken[i])
			continue;
		status = make_group(run, i, taken);
		if (status == STATUS_OK)
			status = run_group(run);
		for (int m = 0; m < run->group.n_members; m++)
			progress_advance(&run->progress, case_work(run, run->cases[m]));
	}
	free(taken);
	progress_clear(&run->progress);
	return status;
}

static void print_totals(const struct run *run)
{
	const char *separator = "";

	fprintf(stderr, "%s: ", run->driver->program);
	for (int s = 0; s < STATUS_COUNT; s++) {
		if (run->rows_by_status[s] == 0)
			continue;
		fprintf(stderr, "%s%d %s", separator, run->rows_by_status[s],
		        status_name((enum status)s));
		separator = ", ";
	}
	if (*separator)
		fprintf(stderr, " in %.0f s, of which %.0f sampling and %.0f verifying",
		        seconds_now() - run->started, run->sampling_seconds,
		        run->verifying_seconds);
	fprintf(stderr, "%s -> %s\n", *separator ? "" : "nothing left to do", run->file.path);
}

static bool any_failed(const struct run *run)
{
	static const enum status failures[] = {STATUS_MISMATCH, STATUS_INVALID, STATUS_CUDA,
	                                       STATUS_IO};

	for (size_t i = 0; i < sizeof failures / sizeof failures[0]; i++)
		if (run->rows_by_status[failures[i]])
			return true;
	return false;
}

/* Where rows go: into the device's folder of runs/ unless the user says otherwise. "-" is standard
 * output, which then gets nothing else. */
static enum status name_output(struct run *run)
{
	struct options *o = &run->options;

	if (!o->out[0])
		snprintf(o->out, sizeof o->out, "runs/%s/%s", run->environment.device_folder,
		         run->driver->file);
	if (strcmp(o->out, "-") == 0 || strcmp(o->out, "/dev/stdout") == 0) {
		if (stdout_was_closed())
			return status_set(STATUS_IO, "--out: standard output is closed");
		snprintf(o->out, sizeof o->out, "/dev/stdout");
		snprintf(o->format.word[0], sizeof o->format.word[0], "none");
	}
	return STATUS_OK;
}

/* Options that need to know where the run takes place, and the sweep they make. */
static enum status make_sweep(struct run *run)
{
	const char *preset = strcmp(run->device->backend->name, "cpu") == 0 ? "small" : "paper";
	const struct subject *subject = run->subject;

	TRY(options_complete(&run->options, run->driver, preset));
	TRY(check_options(&run->options));
	if (run->options.threads > 0)
		omp_set_num_threads((int)run->options.threads);
	TRY(environment_read(&run->environment, run->device, run->options.run_id));
	subject->use(subject->self, run->device);
	if (subject->check)
		TRY(subject->check(subject->self, &run->options));
	if (subject->sweep)
		TRY(subject->sweep(subject->self, &run->options, &run->sweep));
	else
		TRY(sweep_create(&run->sweep, &run->options, subject->configure, subject->self));
	for (int i = 0; i < run->sweep.count; i++)
		TRY(make_variants(run, &run->sweep.cases[i])); /* complains early */
	return name_output(run);
}

/* A case with a longer launch is skipped, whatever its verification takes. */
static double longest_launch_ms(const struct run *run)
{
	const struct options *o = &run->options;
	const bool brief = o->case_seconds / (1 + SHORT_FLOOR) < 1;
	const int floor = run->driver->finds_batch ? MODEL_FLOOR : brief ? SHORT_FLOOR : LONG_FLOOR;
	const double launches = 1 + (o->samples > 0 ? (double)o->samples : floor);

	return o->case_seconds > 0 ? 1e3 * o->case_seconds / launches : INFINITY;
}

static enum status open_file(struct run *run)
{
	enum record_mode mode = run->options.resume     ? RECORD_RESUME
	                        : run->options.truncate ? RECORD_TRUNCATE
	                                                : RECORD_APPEND;
	const struct options *o = &run->options;
	const struct environment *e = &run->environment;
	const struct record_terms terms = {
	        .git_sha = e->git_sha,
	        .build = e->build,
	        .compiler = e->compiler,
	        .git_dirty = e->git_dirty,
	        .launch_ms = longest_launch_ms(run),
	        .memory_bytes = e->device.memory_free,
	        .any_batch = run->driver->finds_batch,
	};

	TRY(record_open(&run->file, o->out, mode, &terms));
	TRY(samples_open(&run->samples, o->out, mode));
	/* A resumed run is one run. */
	if (run->file.run_id[0])
		snprintf(run->environment.run_id, sizeof run->environment.run_id, "%s",
		         run->file.run_id);
	return STATUS_OK;
}

static int complain(const struct run *run, enum status status)
{
	fprintf(stderr, "%s: %s\n", run->driver->program, status_message());
	return status == STATUS_INVALID || status == STATUS_IO ? EXIT_USAGE : EXIT_CASES_FAILED;
}

static enum status measure_sweep(struct run *run)
{
	enum status status = open_file(run);

	if (status == STATUS_OK)
		status = ceilings_measure(run->device);
	if (status == STATUS_OK)
		status = plan_all(run);
	if (status == STATUS_OK) {
		print_header(stdout, run->options.format.word[0]);
		status = run_all(run);
	}
	if (status == STATUS_OK && run->subject->finish &&
	    strcmp(run->options.format.word[0], "table") == 0)
		run->subject->finish(run->subject->self, stdout);
	if (status == STATUS_OK)
		print_totals(run);
	return status;
}

/* The plan of every case, without running any. */
static enum status print_plans(struct run *run)
{
	plan_device_estimate(&run->device->ceilings, run->environment.device.name);
	TRY(plan_all(run));
	plan_device_print(stdout, run->device);
	for (int i = 0; i < run->sweep.count; i++) {
		char label[160];

		describe_case(&run->sweep.cases[i], label, sizeof label);
		TRY(make_variants(run, &run->sweep.cases[i]));
		for (int v = 0; v < run->variants.count; v++)
			print_plan(stdout, label, &run->sweep.cases[i], &run->plans[i][v],
			           run->environment.device.memory_free);
	}
	return STATUS_OK;
}

/* Whether the error of a case is one of its own, and the others can still be tried. */
static bool concerns_case(enum status status)
{
	return status == STATUS_OOM || status == STATUS_UNSUPPORTED;
}

/* The tables of one case, of each variant. */
static enum status print_breakdown(struct run *run, int index)
{
	const struct bench_case *c = &run->sweep.cases[index];
	const struct breakdown_rule rule = {run->environment.device.memory_free, run->options.rows,
	                                    (uint64_t)run->options.seed};
	enum status status = make_variants(run, c);

	for (int i = 0; status == STATUS_OK && i < run->variants.count; i++) {
		const char *requested = run->variants.of[i].requested;
		const struct planned *plan = &run->plans[index][i];
		const struct context ctx = {.device = run->device,
		                            .choice = run->variants.of[i].choice};
		char label[160];

		describe_case(c, label, sizeof label);
		printf("%s%s%s\n\n", label, requested[0] ? " by " : "", requested);
		status = plan->status == STATUS_OK
		                 ? breakdown_case(stdout, run->subject, c, &ctx, &rule)
		                 : status_set(plan->status, "%s", plan->message);
		if (concerns_case(status)) {
			printf("%s: %s\n\n", status_name(status), status_message());
			status = STATUS_OK;
		}
		fflush(stdout);
	}
	return status;
}

static enum status print_breakdowns(struct run *run)
{
	TRY(ceilings_measure(run->device));
	TRY(plan_all(run));
	for (int i = 0; i < run->sweep.count; i++)
		TRY(print_breakdown(run, i));
	return STATUS_OK;
}

static void release(struct run *run)
{
	record_close(&run->file);
	samples_close(&run->samples);
	sweep_release(&run->sweep);
	free(run->plans);
}

int bench_main(const struct driver *driver, const struct subject *subject, int argc, char **argv)
{
	static struct run run; /* with room for all samples of a case */

	streams_open();
	run = (struct run){.driver = driver,
	                   .subject = subject,
	                   .started = seconds_now(),
	                   .file = {.descriptor = -1},
	                   .samples = {.descriptor = -1}};
	enum status status = options_parse(&run.options, driver, argc, argv);

	if (status == STATUS_OK && run.options.help) {
		options_print_help(stdout, driver, run.options.preset);
		return stdout_finish() == STATUS_OK ? EXIT_OK : complain(&run, STATUS_IO);
	}
	if (status == STATUS_OK && run.options.version) {
		about_print(stdout, driver->program);
		return stdout_finish() == STATUS_OK ? EXIT_OK : complain(&run, STATUS_IO);
	}
	if (status == STATUS_OK)
		status = open_backend(&run);
	if (status != STATUS_OK)
		return complain(&run, status);
	run.device->deterministic = run.options.deterministic;
	status = make_sweep(&run);
	if (status == STATUS_OK && run.options.list)
		print_list(stdout, driver, &run.options, &run.environment, run.device);
	else if (status == STATUS_OK && run.options.dry_run)
		status = print_plans(&run);
	else if (status == STATUS_OK && run.options.breakdown)
		status = print_breakdowns(&run);
	else if (status == STATUS_OK)
		status = measure_sweep(&run);
	/* Rows are in their file; a caller who closed standard output wants nothing else. */
	if (status == STATUS_OK && !stdout_was_closed())
		status = stdout_finish();
	int code = status != STATUS_OK ? complain(&run, status)
	           : any_failed(&run)  ? EXIT_CASES_FAILED
	                               : EXIT_OK;

	release(&run);
	device_close(run.device);
	return code;
}
