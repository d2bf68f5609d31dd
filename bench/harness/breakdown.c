#include "bench/harness/breakdown.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/ceilings.h"

enum { MAX_RUNS = 1024, SAMPLES = 5 };

/*
 * The operations of a launch in their order, with their shortest times. They are
 * seen through the profiler ranges around them, which the device's backend is for
 * that time replaced to catch; of nested ranges the innermost is the operation.
 */
struct trace {
	struct backend backend; /* first: a range gets the device alone */
	const struct backend *real;
	const char *open;
	int count, next;
	const char *name[MAX_RUNS];
	double ms[MAX_RUNS];
	enum status status;
};

static struct trace *trace_of(const struct device *device)
{
	return (struct trace *)(uintptr_t)device->backend;
}

static void begin_range(struct device *device, const char *name)
{
	struct trace *trace = trace_of(device);

	trace->open = name;
	trace->real->range_push(device, name);
	if (trace->status == STATUS_OK)
		trace->status = device_stopwatch_start(device);
}

static void end_range(struct device *device)
{
	struct trace *trace = trace_of(device);
	double ms = 0;

	trace->real->range_pop(device);
	if (!trace->open || trace->status != STATUS_OK)
		return;
	trace->status = device_stopwatch_stop(device, &ms);
	if (trace->next == MAX_RUNS)
		return;
	const int i = trace->next++;
	trace->ms[i] = i < trace->count ? fmin(trace->ms[i], ms) : ms;
	trace->name[i] = trace->open;
	trace->count = trace->next > trace->count ? trace->next : trace->count;
	trace->open = NULL;
}

/* One launch that is verified, with nothing in between, as a sample is. */
static enum status verify_launch(const struct subject *subject, const struct bench_case *c,
                                 struct context *ctx, const struct breakdown_rule *rule,
                                 struct accuracy *found)
{
	double prefill_ms;

	TRY(subject->warm_up(subject->self, ctx, c));
	TRY(subject->rewind(subject->self, ctx, c, true, &prefill_ms));
	TRY(subject->launch(subject->self, ctx, c));
	return subject->verify(subject->self, ctx, c, rule->rows, rule->seed, found);
}

static enum status trace_launches(const struct subject *subject, const struct bench_case *c,
                                  struct context *ctx, struct trace *trace)
{
	const struct backend *real = ctx->device->backend;
	double prefill_ms;
	enum status status = STATUS_OK;

	*trace = (struct trace){.backend = *real, .real = real};
	trace->backend.range_push = begin_range;
	trace->backend.range_pop = end_range;
	for (int i = 0; i < SAMPLES && status == STATUS_OK; i++) {
		status = subject->rewind(subject->self, ctx, c, false, &prefill_ms);
		if (status == STATUS_OK)
			status = device_flush_cache(ctx->device);
		trace->next = 0;
		trace->open = NULL;
		ctx->ranges = true;
		ctx->device->backend = &trace->backend;
		if (status == STATUS_OK)
			status = subject->launch(subject->self, ctx, c);
		ctx->device->backend = real;
		ctx->ranges = false;
		if (status == STATUS_OK)
			status = trace->status;
	}
	return status == STATUS_OK ? device_synchronize(ctx->device) : status;
}

/*
 * The planned operation that run i of the trace was. The plan counts runs of the same cost
 * together; where a name stands for runs of several costs and some of them repeat, the order is
 * lost: NULL.
 */
static const struct planned_operation *planned(const struct trace *trace,
                                               const struct kernel_plan *work, int i)
{
	const struct planned_operation *found = NULL;
	int before = 0, costs = 0;
	int64_t runs = 0;

	for (int j = 0; j < i; j++)
		before += strcmp(trace->name[j], trace->name[i]) == 0;
	for (int j = 0; j < work->n_operations; j++) {
		const struct planned_operation *p = &work->operations[j];

		if (strcmp(operation_name(p->operation), trace->name[i]) != 0)
			continue;
		if (costs == 0 || costs == before)
			found = p;
		costs++;
		runs += p->count;
	}
	return costs == 1 || runs == costs ? found : NULL;
}

static void print_operations(FILE *file, const struct trace *trace, const struct kernel_plan *work,
                             const struct ceilings *ceilings)
{
	double total = 0;

	fprintf(file, "| %-26s | %-9s | %9s | %8s | %9s | %8s |\n", "operation", "provider", "ms",
	        "GB/s", "TFLOP/s", "roofline");
	fprintf(file,
	        "|----------------------------|-----------|----------:|---------:|----------:|"
	        "---------:|\n");
	for (int i = 0; i < trace->count; i++) {
		const struct planned_operation *p = planned(trace, work, i);
		double ms = trace->ms[i];

		total += ms;
		fprintf(file, "| %-26s | %-9s | %9.4f |", trace->name[i], p ? p->provider : "", ms);
		if (p) {
			struct kernel_plan one = {.n_operations = 1, .operations = {*p}};

			one.operations[0].count = 1;
			fprintf(file, " %8.4g | %9.4g | %7.1f%% |\n",
			        1e-6 * (p->cost.bytes_read + p->cost.bytes_written) / ms,
			        1e-9 * p->cost.flops / ms,
			        100 * ceilings_roofline_ms(ceilings, &one) / ms);
		} else {
			fprintf(file, " %8s | %9s | %8s |\n", "", "", "");
		}
	}
	if (total > 0)
		fprintf(file, "| %-26s | %-9s | %9.4f | %8s | %9.4g | %7.1f%% |\n", "sum", "",
		        total, "", 1e-9 * work->total.flops / total,
		        100 * ceilings_roofline_ms(ceilings, work) / total);
}

enum status breakdown_case(FILE *file, const struct subject *subject, const struct bench_case *c,
                           const struct context *ctx, const struct breakdown_rule *rule)
{
	struct context planning = *ctx, running = *ctx;
	struct bench_case chosen = *c;
	struct kernel_plan *work = calloc(1, sizeof *work);
	struct trace *trace = calloc(1, sizeof *trace);
	size_t bytes = 0;
	struct accuracy found = {NAN, NAN};
	enum status status = work && trace ? subject->plan(subject->self, &planning, &chosen,
	                                                   rule->memory_free, &bytes, work)
	                                   : status_set(STATUS_OOM, "no memory for a plan");

	if (status == STATUS_OK && bytes > rule->memory_free)
		status = status_set(STATUS_OOM, "needs %zu bytes, %zu are free", bytes,
		                    rule->memory_free);
	if (status == STATUS_OK) {
		status = subject->acquire(subject->self, &running, &chosen, rule->seed);
		if (status == STATUS_OK)
			status = verify_launch(subject, &chosen, &running, rule, &found);
		if (status == STATUS_OK)
			status = trace_launches(subject, &chosen, &running, trace);
		subject->release(subject->self);
	}
	if (status == STATUS_OK) {
		print_operations(file, trace, work, &ctx->device->ceilings);
		fprintf(file, "\nrel_err %.2e, %.2f of the bound\n\n", found.rel_err, found.share);
	}
	free(trace);
	free(work);
	return status;
}
