/*
 * Verifies and times a group of cases that are compared with one another: the samples of all their
 * variants alternate, in a new random order every round.
 */
#ifndef BENCH_HARNESS_MEASURE_H
#define BENCH_HARNESS_MEASURE_H

#include <stdbool.h>
#include <stddef.h>

#include "bench/harness/bench.h"
#include "bench/harness/statistics.h"

enum {
	MAX_VARIANTS = 8,        /* of a case */
	MAX_GROUP = 16,          /* cases that alternate */
	MAX_GROUP_VARIANTS = 48, /* of them all */
	SHORT_FLOOR = 10,        /* samples at least, of what takes less than a second */
	LONG_FLOOR = 5,          /* of the rest */
	MODEL_FLOOR = 3,         /* of whole models */
	MANY_SAMPLES = 100       /* in place of min_time: all variants wait for the shortest */
};

/* What one launch of a case wants and does. */
struct planned {
	enum status status; /* not STATUS_OK: it cannot run, for the reason in message */
	char message[MAX_MESSAGE];
	size_t memory_bytes;
	double flops, bytes_read, bytes_written;
	double roofline_ms; /* NAN without ceilings */
	/* What it took once it was measured, which predicts the next case of its series (the same
	 * except for the sequence length); 0: unknown. */
	double launch_per_roofline, verify_ms_per_flop;
};

/* One launch. */
struct sample {
	double ms;
	int round, position; /* in the alternation: round 0 is the launch that was verified */
	struct conditions at;
};

/* One choice of providers for a case, and how it went. */
struct variant {
	char requested[MAX_WORD]; /* as --provider would have it */
	struct provider_choice choice;
	struct context ctx;
	struct planned plan;
	int member;         /* index of its case in the group */
	bool finished;      /* in a run that is resumed: not to be measured */
	double known_ratio; /* launch_per_roofline and verify_ms_per_flop of the series so far */
	double known_verify;
	double predicted_ms;
	enum status status; /* of the row */
	char message[MAX_MESSAGE];
	struct sample samples[MAX_SAMPLES];
	int n_samples;
	double sampling_seconds; /* spent on the samples, preparations included, */
	double verifying_seconds;
	struct accuracy found;
	double prefill_ms;
};

struct member {
	void *self; /* the subject's: what holds the memory of this case */
	const struct bench_case *c;
};

/* Cases that alternate. */
struct group {
	const struct subject *subject;
	int n_members, n_variants;
	struct member members[MAX_GROUP];
	struct variant variants[MAX_GROUP_VARIANTS]; /* those of a member follow one another */
	int baseline; /* variant that the others are compared with; -1: none */
};

struct measurement_rule {
	int samples;         /* of each variant, exactly; 0: by the rest of the rule */
	double min_time;     /* seconds of each variant's samples together, at least */
	double max_time;     /* seconds of sampling a variant, what lies between samples included,
	                        after which it ends once there are as many as the floor */
	double precision;    /* half width to reach of the 95% intervals of medians and ratios,
	                        relative; 0: any */
	double case_seconds; /* 0: no limit */
	int64_t rows;        /* to verify */
	uint64_t seed;
	bool warm;  /* caches stay as the last sample left them */
	bool burst; /* the device cools before each sample; otherwise it is kept busy */
};

/*
 * Runs the variants whose status is STATUS_OK on entry (their plans made, not finished), and leaves
 * each with a status, a message, and its samples. Members whose memory does not fit beside that of
 * the others, the baseline's first of all, are measured after them by themselves.
 */
void measure_group(struct group *group, const struct measurement_rule *rule);

/*
 * The rounds in which both variants were sampled in alternation: their latencies, in order, into
 * a[MAX_SAMPLES] and b[MAX_SAMPLES]; returns how many.
 */
int paired_samples(const struct variant *one, const struct variant *other, double *a, double *b);

/* The latencies of a variant in the order of its samples, into ms[MAX_SAMPLES]. */
void latencies_of(const struct variant *v, double *ms);

#endif
