/* --breakdown: where the time of a case goes, operation by operation. */
#ifndef BENCH_HARNESS_BREAKDOWN_H
#define BENCH_HARNESS_BREAKDOWN_H

#include <stdio.h>

#include "bench/harness/bench.h"

struct breakdown_rule {
	size_t memory_free;
	int64_t rows; /* to verify */
	uint64_t seed;
};

/*
 * Runs a case by the providers of ctx->choice, verifies it, and prints a Markdown table of its
 * operations: the shortest time of a few launches with cold caches, each operation timed by itself
 * after the one before it has ended, and what that is of the device's ceilings. The sum therefore
 * exceeds the latency of the case, whose operations overlap at their ends.
 */
enum status breakdown_case(FILE *file, const struct subject *subject, const struct bench_case *c,
                           const struct context *ctx, const struct breakdown_rule *rule);

#endif
