#define _POSIX_C_SOURCE 200809L
#include "bench/harness/bench.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "baselines/baselines.h"
#include "bench/harness/breakdown.h"
#include "bench/harness/ceilings.h"
#include "bench/harness/environment.h"
#include "bench/harness/measure.h"
#include "bench/harness/progress.h"
#include "bench/harness/record.h"
#include "bench/harness/print.h"

/* Exit codes. */
enum { EXIT_OK, EXIT_CASES_FAILED, EXIT_USAGE };

/* Everything about one run of a program. */
struct run {
	const struct driver *driver;
	const struct subject *subject;
	struct options options;
	struct device *device;
	struct environment environment;
	struct sweep sweep;
	struct planned (*plans)[MAX_VARIANTS]; /* [sweep.count] */
	struct variant variants[MAX_VARIANTS]; /* of the case under way */
	int n_variants;
	struct record_file file;
	struct progress progress;
	int rows_by_status[STATUS_COUNT];
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

	if (o->backend[0])
		return named ? open_device(run, named)
		             : status_set(STATUS_INVALID,
		                          "--backend: this build has no '%s'; --list shows",
		                          o->backend);
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
	run->n_variants = 0;
	for (const struct kernel *k = run->device->kernels; k->run; k++)
		if (k->operation == operation && kernel_is_first(run->device->kernels, k) &&
		    run->n_variants < MAX_VARIANTS)
			snprintf(run->variants[run->n_variants++].requested, MAX_WORD, "%s",
			         k->provider);
}

/*
 * The variants of a case, without their plans: each --provider, without any one
 * of the fastest; of a single operation each of its providers.
 */
static enum status make_variants(struct run *run, const struct bench_case *c)
{
	const struct words *wanted = &run->options.provider;
	const bool single = run->subject->operation != NULL;
	const int operation = single ? (int)run->subject->operation(run->subject->self, c) : -1;

	memset(run->variants, 0, sizeof run->variants);
	run->n_variants = wanted->count;
	for (int i = 0; i < wanted->count; i++)
		snprintf(run->variants[i].requested, MAX_WORD, "%s", wanted->word[i]);
	if (single && !options_given(&run->options, "provider"))
		list_providers(run, (enum operation)operation);
	for (int i = 0; i < run->n_variants; i++) {
		struct variant *v = &run->variants[i];

		TRY(provider_choice_parse(&v->choice, run->device, v->requested));
		/* A single operation never falls back on another provider. */
		for (int j = 0; single && j < v->choice.count; j++)
			if (v->choice.choice[j].operation < 0)
				v->choice.choice[j].operation = operation;
	}
	return STATUS_OK;
}

static enum status check_options(const struct options *options)
{
	if (options->samples > MAX_SAMPLES)
		return status_set(STATUS_INVALID, "--samples: at most %d", MAX_SAMPLES);
	if (options->provider.count > MAX_VARIANTS)
		return status_set(STATUS_INVALID, "--provider: given more than %d times",
		                  MAX_VARIANTS);
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
		for (int v = 0; v < run->n_variants; v++)
			plan_case(run, &run->sweep.cases[i], &run->plans[i][v],
			          &run->variants[v].choice);
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
	r->warm = run->options.warm;
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
	r->state_bytes_per_token = c->state_bytes_per_token;
#define COPY(name) r->name = c->name;
	CASE_SIZES(COPY)
}

static void record_plan(const struct planned *plan, struct record *r)
{
	if (plan->status != STATUS_OK)
		return;
	r->memory_bytes = (int64_t)plan->memory_bytes;
	r->flops = plan->flops;
	r->bytes = plan->bytes_read + plan->bytes_written;
	r->roofline_ms = plan->roofline_ms;
}

static void record_measurement(struct variant *v, const struct bench_case *c, struct record *r)
{
	if (v->predicted_ms > 0)
		r->predicted_ms = v->predicted_ms;
	r->rel_err = v->found.rel_err;
	if (v->status != STATUS_OK || v->n_samples == 0)
		return;
	struct summary s = summarize(v->samples, v->n_samples);

	r->latency_ms = s.median;
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

/* The row of one variant, written and printed. */
static enum status write_row(struct run *run, const struct bench_case *c, struct variant *v,
                             const struct device_info *before)
{
	struct record r = record_empty();
	struct device_info after = *before;
	char now[32], provider[64], providers[512];

	record_environment(run, &r);
	record_case(c, &r);
	record_plan(&v->plan, &r);
	record_measurement(v, c, &r);
	device_info(run->device, &after);
	time_utc(now);
	r.time_utc = now;
	r.requested = v->requested;
	describe_providers(&v->ctx, provider, sizeof provider, providers, sizeof providers);
	/* A single operation's is the one asked for, whatever it does and even if it could not run.
	 */
	r.provider = provider[0] || !run->subject->operation ? provider : v->requested;
	r.providers = providers;
	r.sm_clock_mhz = after.sm_clock_mhz > 0 ? after.sm_clock_mhz : NAN;
	r.throttled = before->throttled || after.throttled;
	r.status = status_name(v->status);
	r.message = v->message;
	run->rows_by_status[v->status]++;
	progress_clear(&run->progress);
	print_row(stdout, &r, run->options.format.word[0]);
	if (run->subject->note)
		run->subject->note(run->subject->self, c, &r);
	return record_append(&run->file, &r);
}

/* Whether any of a case's variants can run it. */
static bool provider_takes(const struct run *run, int index)
{
	for (int i = 0; i < run->n_variants; i++)
		if (run->plans[index][i].status != STATUS_UNSUPPORTED)
			return true;
	return false;
}

/* Prepares the variants for a case; returns whether any has still to be measured. */
static bool reset_variants(struct run *run, int index, bool *finished)
{
	const struct bench_case *c = &run->sweep.cases[index];
	/* Of an operation's providers nobody asked for only those count that take the case. */
	const bool asked = !run->subject->operation || !provider_takes(run, index) ||
	                   options_given(&run->options, "provider");
	bool any = false;

	for (int i = 0; i < run->n_variants; i++) {
		struct variant *v = &run->variants[i];
		struct record r = record_empty();

		record_environment(run, &r);
		record_case(c, &r);
		r.requested = v->requested;
		finished[i] = record_done(&run->file, &r) ||
		              (!asked && run->plans[index][i].status == STATUS_UNSUPPORTED);
		v->ctx = (struct context){
		        .device = run->device, .choice = v->choice, .ranges = run->options.nvtx};
		v->plan = run->plans[index][i];
		v->predicted_ms = 0;
		v->n_samples = 0;
		v->sampling_seconds = 0;
		v->found = (struct accuracy){NAN, NAN};
		v->prefill_ms = NAN;
		/* Any status but OK keeps a finished variant from being measured. */
		v->status = finished[i] ? STATUS_SKIPPED : v->plan.status;
		memcpy(v->message, v->plan.message, sizeof v->message);
		any = any || !finished[i];
	}
	return any;
}

static enum status run_case(struct run *run, int index, struct experience *experience)
{
	const struct bench_case *c = &run->sweep.cases[index];
	const struct options *o = &run->options;
	struct measurement_rule rule = {
	        .stop = {(int)o->samples, o->min_time, o->max_time, o->noise},
	        .case_seconds = o->case_seconds,
	        .rows = o->rows,
	        .seed = (uint64_t)o->seed,
	        .warm = o->warm,
	};
	struct device_info before = run->environment.device;
	bool finished[MAX_VARIANTS];
	char label[160];

	TRY(make_variants(run, c));
	if (!reset_variants(run, index, finished))
		return STATUS_OK;
	describe_case(c, label, sizeof label);
	progress_show(&run->progress, label);
	device_info(run->device, &before);
	measure_case(run->subject, c, run->variants, run->n_variants, &rule, experience);
	for (int i = 0; i < run->n_variants; i++)
		if (!finished[i])
			TRY(write_row(run, c, &run->variants[i], &before));
	return STATUS_OK;
}

/* What a case weighs in the progress line: a constant, and the launches. */
static double case_work(const struct run *run, int index)
{
	double ms = run->plans[index][0].roofline_ms;

	return 1e3 * run->options.max_time / 2 + (isnan(ms) ? 0 : 20 * ms);
}

static enum status run_all(struct run *run)
{
	struct experience experience = {0};
	double all_work = 0;
	enum status status = STATUS_OK;

	for (int i = 0; i < run->sweep.count; i++)
		all_work += case_work(run, i);
	progress_begin(&run->progress, run->sweep.count, all_work);
	for (int i = 0; status == STATUS_OK && i < run->sweep.count; i++) {
		if (i > 0 && !case_same_series(&run->sweep.cases[i - 1], &run->sweep.cases[i]))
			experience = (struct experience){0};
		status = run_case(run, i, &experience);
		progress_advance(&run->progress, case_work(run, i));
	}
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

/* Where rows go: into the device's folder unless the user says otherwise. "-" is standard output,
 * which then gets nothing else. */
static void name_output(struct run *run)
{
	struct options *o = &run->options;

	if (!o->out[0])
		snprintf(o->out, sizeof o->out, "results/%s/%s", run->environment.device_folder,
		         run->driver->file);
	if (strcmp(o->out, "-") == 0) {
		snprintf(o->out, sizeof o->out, "/dev/stdout");
		snprintf(o->format.word[0], sizeof o->format.word[0], "none");
	}
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
	name_output(run);
	return STATUS_OK;
}

static enum status open_file(struct run *run)
{
	enum record_mode mode = run->options.resume     ? RECORD_RESUME
	                        : run->options.truncate ? RECORD_TRUNCATE
	                                                : RECORD_APPEND;

	TRY(record_open(&run->file, run->options.out, mode, run->environment.git_sha,
	                run->driver->finds_batch));
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
	print_header(stdout, run->options.format.word[0]);
	if (status == STATUS_OK)
		status = run_all(run);
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
	TRY(plan_all(run));
	for (int i = 0; i < run->sweep.count; i++) {
		char label[160];

		describe_case(&run->sweep.cases[i], label, sizeof label);
		TRY(make_variants(run, &run->sweep.cases[i]));
		for (int v = 0; v < run->n_variants; v++)
			print_plan(stdout, label, &run->plans[i][v],
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

	for (int i = 0; status == STATUS_OK && i < run->n_variants; i++) {
		const struct variant *v = &run->variants[i];
		const struct planned *plan = &run->plans[index][i];
		const struct context ctx = {.device = run->device, .choice = v->choice};
		char label[160];

		describe_case(c, label, sizeof label);
		printf("%s%s%s\n\n", label, v->requested[0] ? " by " : "", v->requested);
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
	sweep_release(&run->sweep);
	free(run->plans);
}

int bench_main(const struct driver *driver, const struct subject *subject, int argc, char **argv)
{
	static struct run run; /* with room for all samples of a case */

	run = (struct run){.driver = driver, .subject = subject, .file = {.descriptor = -1}};
	enum status status = options_parse(&run.options, driver, argc, argv);

	if (status == STATUS_OK && run.options.help) {
		options_print_help(stdout, driver);
		return EXIT_OK;
	}
	if (status == STATUS_OK)
		status = open_backend(&run);
	if (status != STATUS_OK)
		return complain(&run, status);
	status = make_sweep(&run);
	if (status == STATUS_OK && run.options.list)
		print_list(stdout, driver, &run.options, &run.environment, run.device);
	else if (status == STATUS_OK && run.options.dry_run)
		status = print_plans(&run);
	else if (status == STATUS_OK && run.options.breakdown)
		status = print_breakdowns(&run);
	else if (status == STATUS_OK)
		status = measure_sweep(&run);
	int code = status != STATUS_OK ? complain(&run, status)
	           : any_failed(&run)  ? EXIT_CASES_FAILED
	                               : EXIT_OK;

	release(&run);
	device_close(run.device);
	return code;
}
