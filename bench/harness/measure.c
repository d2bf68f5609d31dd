#include "bench/harness/measure.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "bench/harness/progress.h"

/* Launch / roofline of a case nothing is known about yet. */
static const double UNKNOWN_LAUNCH_PER_ROOFLINE = 4;
static void fail(struct variant *v, enum status status)
{
	v->status = status;
	snprintf(v->message, sizeof v->message, "%s", status_message());
}

static void check_memory(struct variant *v)
{
	struct device_info info;

	if (device_info(v->ctx.device, &info) != STATUS_OK ||
	    v->plan.memory_bytes <= info.memory_free)
		return;
	fail(v, status_set(STATUS_OOM, "needs %zu bytes (%.1f GiB), %.1f GiB are free",
	                   v->plan.memory_bytes, (double)v->plan.memory_bytes / (1 << 30),
	                   (double)info.memory_free / (1 << 30)));
}

static void check_time(struct variant *v, int index, const struct measurement_rule *rule,
                       const struct experience *experience)
{
	double ratio = experience->launch_per_roofline[index];

	if (ratio == 0)
		ratio = UNKNOWN_LAUNCH_PER_ROOFLINE;
	v->predicted_ms = v->plan.roofline_ms * ratio;
	int launches = 1 + (rule->stop.samples > 0 ? rule->stop.samples : MIN_SAMPLES);
	double seconds = 1e-3 * (launches * v->predicted_ms +
	                         v->plan.flops * experience->verify_ms_per_flop);

	if (rule->case_seconds > 0 && seconds > rule->case_seconds)
		fail(v, status_set(STATUS_SKIPPED,
		                   "predicted to take %.1f s (%.3g ms a launch); --case-seconds "
		                   "allows %g",
		                   seconds, v->predicted_ms, rule->case_seconds));
}

/* One timed launch. */
static enum status take_sample(const struct subject *subject, const struct bench_case *c,
                               struct variant *v, bool warm, bool to_verify)
{
	struct device *device = v->ctx.device;
	double ms, before = seconds_now();
	enum status status = subject->rewind(subject->self, &v->ctx, c, to_verify, &v->prefill_ms);

	if (status == STATUS_OK && !warm)
		status = device_flush_cache(device);
	if (status == STATUS_OK)
		status = device_stopwatch_start(device);
	context_range_push(&v->ctx, "sample");
	if (status == STATUS_OK)
		status = subject->launch(subject->self, &v->ctx, c);
	context_range_pop(&v->ctx);
	if (status == STATUS_OK)
		status = device_stopwatch_stop(device, &ms);
	if (status == STATUS_OK)
		v->samples[v->n_samples++] = ms;
	v->sampling_seconds += seconds_now() - before;
	return status;
}

/*
 * Warms up, takes the first sample, and verifies what that very launch wrote.
 * A launch that disagrees with the reference is not timed any further.
 */
static enum status begin_variant(const struct subject *subject, const struct bench_case *c,
                                 struct variant *v, const struct measurement_rule *rule,
                                 struct experience *experience)
{
	context_range_push(&v->ctx, "warm_up");
	enum status status = subject->warm_up(subject->self, &v->ctx, c);

	if (status == STATUS_OK)
		status = device_synchronize(v->ctx.device);
	context_range_pop(&v->ctx);
	if (status == STATUS_OK)
		status = take_sample(subject, c, v, rule->warm, true);
	if (status != STATUS_OK)
		return status;
	double before = seconds_now();

	context_range_push(&v->ctx, "verify");
	status_set(STATUS_OK, "%s", "");
	status = subject->verify(subject->self, &v->ctx, c, rule->rows, rule->seed, &v->found);
	context_range_pop(&v->ctx);
	experience->verify_ms_per_flop = 1e3 * (seconds_now() - before) / v->plan.flops;
	/* Written so that NaN is a mismatch. */
	if (status == STATUS_OK && !(v->found.share <= 1)) {
		char where[MAX_MESSAGE];

		snprintf(where, sizeof where, "%s", status_message());
		v->n_samples = 0;
		return status_set(STATUS_MISMATCH, "rel_err %.3g%s%s, %.3g times what is allowed",
		                  v->found.rel_err, where[0] ? " in " : "", where, v->found.share);
	}
	if (status == STATUS_OK && status_message()[0])
		snprintf(v->message, sizeof v->message, "worst: %.*s, %.2f of its bound",
		         MAX_MESSAGE - 64, status_message(), v->found.share);
	return status;
}

static bool satisfied(struct variant *v, const struct stopping_rule *stop)
{
	return v->status != STATUS_OK ||
	       samples_suffice(stop, v->samples, v->n_samples, v->sampling_seconds);
}

static bool may_go_on(const struct variant *v, const struct stopping_rule *stop)
{
	return v->status == STATUS_OK && stop->samples == 0 && v->n_samples < MAX_SAMPLES &&
	       v->sampling_seconds < stop->max_time;
}

/*
 * Samples of the variants, one of each in turn, until all have enough: one that has settled goes
 * on beside the others while its time lasts, since the device's clock drifts.
 */
static void sample_alternately(const struct subject *subject, const struct bench_case *c,
                               struct variant *variants, int count,
                               const struct measurement_rule *rule)
{
	bool all = false;

	while (!all) {
		all = true;
		for (int i = 0; i < count; i++)
			all = all && satisfied(&variants[i], &rule->stop);
		for (int i = 0; i < count && !all; i++) {
			struct variant *v = &variants[i];

			if (satisfied(v, &rule->stop) && !may_go_on(v, &rule->stop))
				continue;
			enum status status = take_sample(subject, c, v, rule->warm, false);

			if (status != STATUS_OK)
				fail(v, status);
		}
	}
}

/* Takes the memory of the variant that wants most; all share it. */
static enum status acquire(const struct subject *subject, const struct bench_case *c,
                           struct variant *variants, int count, uint64_t seed)
{
	struct variant *largest = NULL;

	for (int i = 0; i < count; i++)
		if (variants[i].status == STATUS_OK &&
		    (!largest || variants[i].plan.memory_bytes > largest->plan.memory_bytes))
			largest = &variants[i];
	if (!largest)
		return STATUS_OK;
	enum status status = subject->acquire(subject->self, &largest->ctx, c, seed);

	for (int i = 0; i < count; i++) {
		if (variants[i].status != STATUS_OK)
			continue;
		variants[i].ctx.workspace = largest->ctx.workspace;
		variants[i].ctx.workspace_bytes = largest->ctx.workspace_bytes;
		if (status != STATUS_OK)
			fail(&variants[i], status);
	}
	return status;
}

static void learn(struct experience *experience, struct variant *v, int index)
{
	if (v->status != STATUS_OK || v->n_samples == 0)
		return;
	double median = summarize(v->samples, v->n_samples).median;

	experience->launch_per_roofline[index] = median / v->plan.roofline_ms;
}

void measure_case(const struct subject *subject, const struct bench_case *c,
                  struct variant *variants, int count, const struct measurement_rule *rule,
                  struct experience *experience)
{
	bool any = false;

	for (int i = 0; i < count; i++) {
		struct variant *v = &variants[i];

		if (v->status == STATUS_OK)
			check_memory(v);
		if (v->status == STATUS_OK)
			check_time(v, i, rule, experience);
		any = any || v->status == STATUS_OK;
	}
	if (!any)
		return;
	enum status status = acquire(subject, c, variants, count, rule->seed);

	for (int i = 0; status == STATUS_OK && i < count; i++) {
		if (variants[i].status != STATUS_OK)
			continue;
		enum status begun = begin_variant(subject, c, &variants[i], rule, experience);

		if (begun != STATUS_OK)
			fail(&variants[i], begun);
	}
	if (status == STATUS_OK)
		sample_alternately(subject, c, variants, count, rule);
	for (int i = 0; i < count; i++)
		learn(experience, &variants[i], i);
	subject->release(subject->self);
}
