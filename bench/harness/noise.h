/* Whether a variant's samples can be believed, and what its row says of their conditions. */
#ifndef BENCH_HARNESS_NOISE_H
#define BENCH_HARNESS_NOISE_H

#include "bench/harness/measure.h"
#include "bench/harness/record.h"

/*
 * Makes a variant that was measured STATUS_NOISY, and adds why to its message, if a precision was
 * asked for and
 * - the 95% interval of its median is wider,
 * - its first and its last third differ by more than twice that,
 * - samples while the clock was held down and the others differ by more than twice that, or
 * - most samples were disturbed by other processes.
 */
void judge_noise(struct variant *v, const struct measurement_rule *rule);

/* Clock, throttling and power of a row; `reasons` is room for what it borrows. */
void record_conditions(const struct variant *v, struct record *r, char reasons[64]);

/* The bits of conditions.throttle in words: "", "power", "power+heat", or "unknown". */
void throttle_text(int throttle, char text[64]);

#endif
