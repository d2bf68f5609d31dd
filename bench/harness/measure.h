/* Verifies and times one case: all providers asked for, their samples alternating. */
#ifndef BENCH_HARNESS_MEASURE_H
#define BENCH_HARNESS_MEASURE_H

#include <stdbool.h>
#include <stddef.h>

#include "bench/harness/bench.h"
#include "bench/harness/statistics.h"

enum { MAX_VARIANTS = 8 };

/* What one launch of a case wants and does. */
struct planned {
	enum status status; /* not STATUS_OK: it cannot run, for the reason in message */
	char message[MAX_MESSAGE];
	size_t memory_bytes;
	double flops, bytes_read, bytes_written;
	double roofline_ms; /* NAN without ceilings */
};

/* One choice of providers for a case, and how it went. */
struct variant {
	char requested[MAX_WORD]; /* as --provider would have it */
	struct provider_choice choice;
	struct context ctx;
	struct planned plan;
	double predicted_ms;
	enum status status; /* of the row */
	char message[MAX_MESSAGE];
	double samples[MAX_SAMPLES]; /* milliseconds */
	int n_samples;
	double sampling_seconds; /* spent on the samples, preparations included */
	struct accuracy found;
	double prefill_ms;
};

struct measurement_rule {
	struct stopping_rule stop;
	double case_seconds; /* 0: no limit */
	int64_t rows;        /* to verify */
	uint64_t seed;
	bool warm;
};

/* What earlier cases of a series (the same but for the sequence length) took: it predicts the next
 * one. All zero before the first. */
struct experience {
	double launch_per_roofline[MAX_VARIANTS]; /* latency / roofline_ms */
	double verify_ms_per_flop;
};

/*
 * Runs those of variants[count] whose status is STATUS_OK on entry (their plans made), and leaves
 * each with a status, a message, and what was measured. experience is used and
 * updated.
 */
void measure_case(const struct subject *subject, const struct bench_case *c,
                  struct variant *variants, int count, const struct measurement_rule *rule,
                  struct experience *experience);

#endif
