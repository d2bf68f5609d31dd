#include "bench/harness/measure.h"

#include <malloc.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "bench/harness/noise.h"
#include "bench/harness/progress.h"

/* A launch from which on few samples have to do. */
static const double LONG_MS = 1e3;
/* Launch / roofline of a case nothing is known about yet. */
static const double UNKNOWN_LAUNCH_PER_ROOFLINE = 4;
/* A device that is kept busy is so for this long before the first round. */
static const double RAMP_SECONDS = 0.2;
/* The pause before a sample in bursts: this long, or so many times the sample. */
static const double COOL_SECONDS = 0.05, COOL_SAMPLES = 4;

static void fail(struct variant *v, enum status status)
{
	v->status = status;
	snprintf(v->message, sizeof v->message, "%s", status_message());
}

void latencies_of(const struct variant *v, double *ms)
{
	for (int i = 0; i < v->n_samples; i++)
		ms[i] = v->samples[i].ms;
}

int paired_samples(const struct variant *one, const struct variant *other, double *a, double *b)
{
	int i = 0, j = 0, n = 0;

	while (i < one->n_samples && j < other->n_samples) {
		const int left = one->samples[i].round, right = other->samples[j].round;

		if (left == right && left > 0) {
			a[n] = one->samples[i].ms;
			b[n++] = other->samples[j].ms;
		}
		i += left <= right;
		j += right <= left;
	}
	return n;
}

/* ---- what a group may do ---- */

static size_t memory_of(const struct group *g, int member)
{
	size_t largest = 0;

	for (int i = 0; i < g->n_variants; i++) {
		const struct variant *v = &g->variants[i];

		if (v->member == member && v->status == STATUS_OK && v->plan.memory_bytes > largest)
			largest = v->plan.memory_bytes;
	}
	return largest;
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

static int floor_of(const struct bench_case *c, double ms)
{
	if (passes[c->pass].models)
		return MODEL_FLOOR;
	return ms < LONG_MS ? SHORT_FLOOR : LONG_FLOOR;
}

static void check_time(struct variant *v, const struct bench_case *c,
                       const struct measurement_rule *rule)
{
	const double ratio = v->known_ratio > 0 ? v->known_ratio : UNKNOWN_LAUNCH_PER_ROOFLINE;

	v->predicted_ms = v->plan.roofline_ms * ratio;
	const int floor = floor_of(c, v->predicted_ms);
	const int launches = 1 + (rule->samples > 0 ? rule->samples : floor);
	const double seconds =
	        1e-3 * (launches * v->predicted_ms + v->plan.flops * v->known_verify);

	if (rule->case_seconds > 0 && seconds > rule->case_seconds)
		fail(v, status_set(STATUS_SKIPPED,
		                   "predicted to take %.1f s (%.3g ms a launch); --case-seconds "
		                   "allows %g",
		                   seconds, v->predicted_ms, rule->case_seconds));
}

/* ---- one launch ---- */

static void cool(const struct variant *v)
{
	double seconds = COOL_SECONDS;

	if (v->n_samples > 0)
		seconds = fmax(seconds, 1e-3 * COOL_SAMPLES * v->samples[v->n_samples - 1].ms);
	const struct timespec pause = {(time_t)seconds, (long)(1e9 * fmod(seconds, 1))};

	nanosleep(&pause, NULL);
}

/* A launch, timed; *sample holds its round and position already. */
static enum status time_launch(struct group *g, struct variant *v,
                               const struct measurement_rule *rule, struct sample *sample)
{
	const struct subject *subject = g->subject;
	const struct member *m = &g->members[v->member];
	const bool to_verify = sample->round == 0;
	struct device *device = v->ctx.device;

	TRY(subject->rewind(m->self, &v->ctx, m->c, to_verify, &v->prefill_ms));
	if (!rule->warm)
		TRY(device_flush_cache(device));
	if (rule->burst) {
		TRY(device_synchronize(device));
		cool(v);
	}
	TRY(device_stopwatch_start(device));
	context_range_push(&v->ctx, "sample");
	enum status status = subject->launch(m->self, &v->ctx, m->c);

	context_range_pop(&v->ctx);
	if (status == STATUS_OK)
		status = device_stopwatch_stop(device, &sample->ms);
	if (status == STATUS_OK)
		device_conditions(device, &sample->at);
	return status;
}

static enum status take_sample(struct group *g, struct variant *v,
                               const struct measurement_rule *rule, int round, int position)
{
	struct sample sample = {.round = round, .position = position};
	const double before = seconds_now();
	const enum status status = time_launch(g, v, rule, &sample);

	if (status == STATUS_OK)
		v->samples[v->n_samples++] = sample;
	v->sampling_seconds += seconds_now() - before;
	return status;
}

/* ---- verification ---- */

/* The reference takes and returns gigabytes; while it does, pages that stay need not be cleared
 * again. */
static void keep_pages(bool keep)
{
#ifdef __GLIBC__
	mallopt(M_MMAP_MAX, keep ? 0 : 65536);
	mallopt(M_TRIM_THRESHOLD, keep ? -1 : 128 << 10);
	if (!keep)
		malloc_trim(0);
#endif
}

/* Whether what the last launch wrote is right; a variant that is wrong keeps no sample. */
static enum status verify_variant(struct group *g, struct variant *v,
                                  const struct measurement_rule *rule)
{
	const struct subject *subject = g->subject;
	const struct member *m = &g->members[v->member];
	const double before = seconds_now();

	context_range_push(&v->ctx, "verify");
	status_set(STATUS_OK, "%s", "");
	keep_pages(true);
	enum status status =
	        subject->verify(m->self, &v->ctx, m->c, rule->rows, rule->seed, &v->found);
	keep_pages(false);
	context_range_pop(&v->ctx);
	v->verifying_seconds = seconds_now() - before;
	v->plan.verify_ms_per_flop = 1e3 * v->verifying_seconds / v->plan.flops;
	/* Written so that NaN is a mismatch. */
	if (status == STATUS_OK && !(v->found.share <= 1)) {
		char where[MAX_MESSAGE];

		snprintf(where, sizeof where, "%s", status_message());
		v->n_samples = 0;
		return status_set(STATUS_MISMATCH, "rel_err %.3g%s%s, %.3g times what is allowed",
		                  v->found.rel_err, where[0] ? " in " : "", where, v->found.share);
	}
	if (status == STATUS_OK && m->c->data == DATA_ZEROS) {
		/* A kernel that does nothing right makes zeros of zeros, too. */
		v->found = (struct accuracy){NAN, NAN};
		snprintf(v->message, sizeof v->message, "zeros: finite, otherwise not verified");
	} else if (status == STATUS_OK && status_message()[0]) {
		snprintf(v->message, sizeof v->message, "worst: %.*s, %.2f of its bound",
		         MAX_MESSAGE - 64, status_message(), v->found.share);
	}
	return status;
}

/* Whether a variant is verified after its last launch, and not the first: where that would cost a
 * state that the others of its member need, too, it cannot wait. */
static bool verified_last(const struct group *g, const struct variant *v)
{
	int sharing = 0;

	for (int i = 0; i < g->n_variants; i++)
		sharing += g->variants[i].member == v->member && g->variants[i].status == STATUS_OK;
	return g->subject->verifies_last && sharing == 1;
}

/* Warms up and takes the sample of round 0, whose output is verified now or, by subjects that would
 * have to prepare everything again, after the last launch. */
static enum status begin_variant(struct group *g, struct variant *v,
                                 const struct measurement_rule *rule)
{
	const struct subject *subject = g->subject;
	const struct member *m = &g->members[v->member];

	context_range_push(&v->ctx, "warm_up");
	enum status status = subject->warm_up(m->self, &v->ctx, m->c);

	if (status == STATUS_OK)
		status = device_synchronize(v->ctx.device);
	context_range_pop(&v->ctx);
	if (status == STATUS_OK)
		status = take_sample(g, v, rule, 0, 0);
	if (status == STATUS_OK && !verified_last(g, v))
		status = verify_variant(g, v, rule);
	return status;
}

/* ---- rounds ---- */

static bool runs(const struct variant *v)
{
	return v->status == STATUS_OK;
}

/* Whether the intervals of a variant's median and of its ratio are as narrow as was asked for. */
static bool precise(const struct group *g, const struct variant *v,
                    const struct measurement_rule *rule)
{
	double a[MAX_SAMPLES], b[MAX_SAMPLES];

	if (rule->precision <= 0)
		return true;
	latencies_of(v, a);
	const struct summary s = summarize(a, v->n_samples);

	if (relative_half_width(s.interval, s.median) > rule->precision)
		return false;
	if (g->baseline < 0 || v == &g->variants[g->baseline] || !runs(&g->variants[g->baseline]))
		return true;
	const int n = paired_samples(&g->variants[g->baseline], v, a, b);
	if (n == 0)
		return true;
	const struct ratio r = ratio_quick(a, b, n);

	return relative_half_width(r.interval, r.ratio) <= rule->precision;
}

static double total_ms(const struct variant *v)
{
	double total = 0;

	for (int i = 0; i < v->n_samples; i++)
		total += v->samples[i].ms;
	return total;
}

/* Whether a variant has as many samples as it must. */
static bool has_floor(const struct group *g, const struct variant *v,
                      const struct measurement_rule *rule)
{
	const double ms = total_ms(v);

	if (rule->samples > 0)
		return v->n_samples >= rule->samples;
	return v->n_samples >= floor_of(g->members[v->member].c, ms / v->n_samples) &&
	       (1e-3 * ms >= rule->min_time || v->n_samples >= MANY_SAMPLES);
}

/*
 * Whether another round is needed. All variants take part in every round (except that those of
 * seconds leave), or the rest would be measured beside other neighbours than before; so their time
 * is one account.
 */
static bool enough(const struct group *g, const struct measurement_rule *rule)
{
	double spent = 0, allowed = 0;
	bool full = rule->samples > 0, all_precise = true;

	for (int i = 0; i < g->n_variants; i++) {
		const struct variant *v = &g->variants[i];

		if (!runs(v))
			continue;
		if (!has_floor(g, v, rule))
			return false;
		full = full || v->n_samples == MAX_SAMPLES;
		spent += v->sampling_seconds;
		allowed += rule->max_time;
	}
	if (full || spent >= allowed)
		return true;
	for (int i = 0; i < g->n_variants && all_precise; i++)
		all_precise = !runs(&g->variants[i]) || precise(g, &g->variants[i], rule);
	return all_precise;
}

static uint32_t next_random(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(*state >> 33);
}

/* Whether a variant that takes seconds has had its share while others still need rounds. */
static bool leaves(const struct group *g, const struct variant *v,
                   const struct measurement_rule *rule)
{
	return rule->samples == 0 && v->n_samples > 0 && total_ms(v) / v->n_samples >= LONG_MS &&
	       has_floor(g, v, rule) && v->sampling_seconds >= rule->max_time;
}

/* The variants of the next round, in random order; returns how many. */
static int shuffle(const struct group *g, const struct measurement_rule *rule, int *order,
                   uint64_t *state)
{
	int n = 0;

	for (int i = 0; i < g->n_variants; i++)
		if (runs(&g->variants[i]) && !leaves(g, &g->variants[i], rule))
			order[n++] = i;
	for (int i = n - 1; i > 0; i--) {
		const int j = (int)(next_random(state) % (uint32_t)(i + 1)), kept = order[i];

		order[i] = order[j];
		order[j] = kept;
	}
	return n;
}

/* Launches that are not kept, until the device is as warm as it will be. */
static void ramp(struct group *g, const struct measurement_rule *rule, uint64_t *state)
{
	const double began = seconds_now();
	int order[MAX_GROUP_VARIANTS];

	while (seconds_now() - began < RAMP_SECONDS) {
		const int n = shuffle(g, rule, order, state);

		if (n == 0)
			return;
		for (int i = 0; i < n && seconds_now() - began < RAMP_SECONDS; i++) {
			struct sample ignored = {.round = 1};
			struct variant *v = &g->variants[order[i]];
			const enum status status = time_launch(g, v, rule, &ignored);

			if (status != STATUS_OK)
				fail(v, status);
		}
	}
}

static void sample_rounds(struct group *g, const struct measurement_rule *rule)
{
	uint64_t state = rule->seed;
	int order[MAX_GROUP_VARIANTS];

	if (!rule->burst && rule->samples == 0 && rule->min_time > 0 && !g->subject->verifies_last)
		ramp(g, rule, &state);
	for (int round = 1; !enough(g, rule); round++) {
		const int n = shuffle(g, rule, order, &state);

		for (int i = 0; i < n; i++) {
			struct variant *v = &g->variants[order[i]];
			const enum status status = take_sample(g, v, rule, round, i);

			if (status != STATUS_OK)
				fail(v, status);
		}
		if (n == 0)
			return;
	}
}

/* ---- memory ---- */

/* Takes the memory of a member's variant that wants most; its others share it. */
static void acquire(struct group *g, int member, uint64_t seed)
{
	const struct member *m = &g->members[member];
	struct variant *largest = NULL;

	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];

		if (v->member == member && runs(v) &&
		    (!largest || v->plan.memory_bytes > largest->plan.memory_bytes))
			largest = v;
	}
	if (!largest)
		return;
	const enum status status = g->subject->acquire(m->self, &largest->ctx, m->c, seed);

	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];

		if (v->member != member || !runs(v))
			continue;
		v->ctx.workspace = largest->ctx.workspace;
		v->ctx.workspace_bytes = largest->ctx.workspace_bytes;
		if (status != STATUS_OK)
			fail(v, status);
	}
}

/* Members whose memory fits at once: all of *wanted, or those that stay after the largest, one
 * after the other, have been left for later; the baseline's goes last. */
static void choose_members(const struct group *g, const bool *wanted, bool *chosen)
{
	const int kept = g->baseline >= 0 ? g->variants[g->baseline].member : -1;
	struct device_info info = {0};
	int count = 0;

	for (int i = 0; i < g->n_members; i++) {
		chosen[i] = wanted[i] && memory_of(g, i) > 0;
		count += chosen[i];
	}
	if (count < 2 || device_info(g->variants[0].ctx.device, &info) != STATUS_OK)
		return;
	while (count > 1) {
		size_t total = 0;
		int largest = -1;

		for (int i = 0; i < g->n_members; i++) {
			if (!chosen[i])
				continue;
			total += memory_of(g, i);
			if (i != kept && (largest < 0 || memory_of(g, i) > memory_of(g, largest)))
				largest = i;
		}
		if (total <= info.memory_free)
			return;
		/* A baseline that leaves room for nobody is measured alone, and they together. */
		if (count == 2 && kept >= 0 && chosen[kept])
			largest = kept;
		chosen[largest] = false;
		count--;
	}
}

static void learn(struct variant *v)
{
	double ms[MAX_SAMPLES];

	if (v->n_samples == 0)
		return;
	latencies_of(v, ms);
	v->plan.launch_per_roofline = median_of(ms, v->n_samples) / v->plan.roofline_ms;
}

/* The chosen members, their samples alternating. */
static void measure_members(struct group *g, const bool *chosen,
                            const struct measurement_rule *rule)
{
	enum status put_off[MAX_GROUP_VARIANTS];

	/* Whoever is not chosen keeps still. */
	for (int i = 0; i < g->n_variants; i++) {
		put_off[i] = g->variants[i].status;
		if (!chosen[g->variants[i].member])
			g->variants[i].status = STATUS_SKIPPED;
	}
	for (int i = 0; i < g->n_members; i++)
		if (chosen[i])
			acquire(g, i, rule->seed);
	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];
		const enum status status = runs(v) ? begin_variant(g, v, rule) : STATUS_OK;

		if (status != STATUS_OK)
			fail(v, status);
	}
	sample_rounds(g, rule);
	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];
		enum status status = STATUS_OK;

		if (runs(v) && isnan(v->found.share))
			status = verify_variant(g, v, rule);
		if (status != STATUS_OK)
			fail(v, status);
		if (runs(v))
			learn(v);
		if (!chosen[v->member])
			v->status = put_off[i];
		else if (runs(v))
			judge_noise(v, rule);
	}
	for (int i = 0; i < g->n_members; i++)
		if (chosen[i])
			g->subject->release(g->members[i].self);
}

void measure_group(struct group *g, const struct measurement_rule *rule)
{
	bool wanted[MAX_GROUP], chosen[MAX_GROUP];

	for (int i = 0; i < g->n_variants; i++) {
		struct variant *v = &g->variants[i];

		if (runs(v))
			check_memory(v);
		if (runs(v))
			check_time(v, g->members[v->member].c, rule);
	}
	for (int i = 0; i < g->n_members; i++)
		wanted[i] = memory_of(g, i) > 0;
	for (bool any = true; any;) {
		any = false;
		choose_members(g, wanted, chosen);
		for (int i = 0; i < g->n_members; i++) {
			any = any || chosen[i];
			wanted[i] = wanted[i] && !chosen[i];
		}
		if (any)
			measure_members(g, chosen, rule);
	}
}
