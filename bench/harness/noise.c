#include "bench/harness/noise.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Thirds of fewer samples are no judges of drift. */
enum { MIN_DRIFT_SAMPLES = 9 };

/* Adds a reason to a message, after a semicolon. */
__attribute__((format(printf, 2, 3))) static void add_reason(struct variant *v, const char *format,
                                                             ...)
{
	const size_t length = strlen(v->message), left = sizeof v->message - length;
	va_list args;
	int n = snprintf(v->message + length, left, "%s", length ? "; " : "");

	if (n < 0 || (size_t)n >= left)
		return;
	va_start(args, format);
	vsnprintf(v->message + length + n, left - (size_t)n, format, args);
	va_end(args);
}

static bool throttled(const struct sample *s)
{
	return s->at.throttle > 0;
}

/* Median of the samples that are (not) throttled; NAN if there are fewer than three. */
static double median_where(const struct variant *v, bool held_down)
{
	double ms[MAX_SAMPLES];
	int n = 0;

	for (int i = 0; i < v->n_samples; i++)
		if (v->samples[i].at.throttle >= 0 && throttled(&v->samples[i]) == held_down)
			ms[n++] = v->samples[i].ms;
	return n < 3 ? NAN : median_of(ms, n);
}

/* How far the last third is from the first. */
static double drift_of(const double *ms, int count)
{
	const int third = count / 3;

	return count < MIN_DRIFT_SAMPLES
	               ? 0
	               : median_of(ms + count - third, third) / median_of(ms, third) - 1;
}

/* Share of the samples that other processes disturbed. */
static double disturbed_share(const struct variant *v)
{
	int n = 0;

	for (int i = 0; i < v->n_samples; i++)
		n += v->samples[i].at.switches > 0 && v->samples[i].at.others > 0;
	return (double)n / v->n_samples;
}

void judge_noise(struct variant *v, const struct measurement_rule *rule)
{
	double ms[MAX_SAMPLES];

	if (rule->precision <= 0 || v->n_samples == 0)
		return;
	latencies_of(v, ms);
	const struct summary s = summarize(ms, v->n_samples);
	const double width = relative_half_width(s.interval, s.median);
	const double drift = drift_of(ms, v->n_samples);
	const double held = median_where(v, true) / median_where(v, false) - 1;
	const double disturbed = disturbed_share(v);

	if (width > rule->precision) {
		v->status = STATUS_NOISY;
		add_reason(v, "the median is known to %.2g%%, asked for were %.2g%%", 100 * width,
		           100 * rule->precision);
	}
	if (fabs(drift) > 2 * rule->precision) {
		v->status = STATUS_NOISY;
		add_reason(v, "the last third of the samples is %+.1f%% from the first",
		           100 * drift);
	}
	if (fabs(held) > 2 * rule->precision) {
		v->status = STATUS_NOISY;
		add_reason(v, "samples with the clock held down are %+.1f%% from the others",
		           100 * held);
	}
	if (disturbed > 0.5) {
		v->status = STATUS_NOISY;
		add_reason(v, "other processes disturbed %.0f%% of the samples", 100 * disturbed);
	}
}

void throttle_text(int throttle, char text[64])
{
	static const struct {
		enum throttle bit;
		const char *word;
	} words[] = {{THROTTLE_POWER, "power"},
	             {THROTTLE_HEAT, "heat"},
	             {THROTTLE_HARDWARE, "hardware"}};
	size_t length = 0;

	snprintf(text, 64, "%s", throttle == THROTTLE_UNKNOWN ? "unknown" : "");
	for (size_t i = 0; throttle > 0 && i < sizeof words / sizeof *words; i++)
		if (throttle & (int)words[i].bit)
			length += (size_t)snprintf(text + length, 64 - length, "%s%s",
			                           length ? "+" : "", words[i].word);
}

void record_conditions(const struct variant *v, struct record *r, char reasons[64])
{
	double clock[MAX_SAMPLES], power[MAX_SAMPLES];
	int n_clock = 0, n_power = 0, n_known = 0, n_throttled = 0, bits = 0;

	for (int i = 0; i < v->n_samples; i++) {
		const struct conditions *at = &v->samples[i].at;

		if (!isnan(at->clock_mhz))
			clock[n_clock++] = at->clock_mhz;
		if (!isnan(at->power_w))
			power[n_power++] = at->power_w;
		if (at->throttle == THROTTLE_UNKNOWN)
			continue;
		n_known++;
		n_throttled += at->throttle > 0;
		bits |= at->throttle;
	}
	r->sm_clock_mhz = n_clock ? median_of(clock, n_clock) : NAN;
	r->power_w = n_power ? median_of(power, n_power) : NAN;
	r->throttled = n_known ? (double)n_throttled / n_known : NAN;
	throttle_text(v->n_samples && !n_known ? THROTTLE_UNKNOWN : bits, reasons);
	r->throttle_reasons = reasons;
}
