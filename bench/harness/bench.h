/*
 * Runs a benchmark program: options, sweep, memory, verification, timing, rows.
 * It knows backends and operations but no layer: what a case runs is a struct
 * of function pointers, filled by bench/block.c and bench/throughput.c.
 */
#ifndef BENCH_HARNESS_BENCH_H
#define BENCH_HARNESS_BENCH_H

#include <stddef.h>
#include <stdio.h>

#include "bench/harness/case.h"
#include "bench/harness/driver.h"
#include "bench/harness/record.h"
#include "kernels/judge.h"
#include "kernels/kernels.h"

/*
 * What a case runs. The calls come in this order: configure for every case;
 * plan; and, for one case at a time, acquire, warm_up, any number of (rewind, launch),
 * verify after some of them, release. Only launch is timed; nothing in it allocates.
 * Each returns STATUS_OK or leaves a message.
 */
struct subject {
	void *self;
	/* Another self, so that several cases can have their memory at once and their samples
	 * alternate; to be freed; NULL: cases run one after the other. */
	void *(*clone)(void *self);
	/* verify costs the prepared state: it is called after the last launch where one variant
	 * alone has that. */
	bool verifies_last;
	/* Whether the options make sense together, before any case is made of them; or NULL. */
	enum status (*check)(void *self, const struct options *options);
	/* Makes the sweep where it is not the product of the options' lists; or NULL. */
	enum status (*sweep)(void *self, const struct options *options, struct sweep *sweep);
	/* The one operation of a case: without --provider each of its providers is measured that
	 * takes the case. NULL: each --provider is, and without any the fastest. */
	enum operation (*operation)(void *self, const struct bench_case *c);
	/* Told of every row, and of their end; or NULL. */
	void (*note)(void *self, const struct bench_case *c, const struct record *record);
	void (*finish)(void *self, FILE *file);
	/* Handed the device before anything else. */
	void (*use)(void *self, struct device *device);
	/* As in case.h. */
	configure_case configure;
	/* Bytes of device memory that the case wants, and the work of one launch; takes nothing.
	 * A case that leaves its batch open (NO_VALUE) gets the largest for memory_free. */
	enum status (*plan)(void *self, const struct context *ctx, struct bench_case *c,
	                    size_t memory_free, size_t *bytes, struct kernel_plan *work);
	/* Takes the memory, sets ctx->workspace, and fills parameters and inputs from `seed`. */
	enum status (*acquire)(void *self, struct context *ctx, const struct bench_case *c,
	                       uint64_t seed);
	/* What has to run once before anything is timed. */
	enum status (*warm_up)(void *self, struct context *ctx, const struct bench_case *c);
	/* Brings everything to where a launch starts. to_verify: also overwrites what the launch
	 * will write, and keeps what verify() needs of the state before it. *prefill_ms: the time
	 * of a prefill that this includes; left alone if there is none. */
	enum status (*rewind)(void *self, struct context *ctx, const struct bench_case *c,
	                      bool to_verify, double *prefill_ms);
	enum status (*launch)(void *self, struct context *ctx, const struct bench_case *c);
	/* The error in the buffers of the last launch, and its share of what is allowed
	 * (docs/verification.md); the message may say of which output. */
	enum status (*verify)(void *self, struct context *ctx, const struct bench_case *c,
	                      int64_t rows, uint64_t seed, struct accuracy *found);
	void (*release)(void *self);
};

/*
 * The main() of a benchmark program. Returns its exit code: 0; 1 if a case
 * failed (mismatch, or an error of the device); 2 if the options or the output are wrong.
 */
int bench_main(const struct driver *driver, const struct subject *subject, int argc, char **argv);

#endif
