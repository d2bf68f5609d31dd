/* The main() of the programs that measure single operations: kernel_latency, chunkwise. */
#ifndef BENCH_KERNEL_BENCH_H
#define BENCH_KERNEL_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "bench/harness/driver.h"

enum { MAX_LENGTHS = 8 };

/* An operation in one of its forms at some sizes; what the command line gives takes their place. */
struct case_row {
	const char *block;            /* form_name(); NULL ends a list */
	int64_t seq_len[MAX_LENGTHS]; /* none: those of --seq-len, where a length matters */
	int64_t n_heads;              /* 0: --heads */
	int64_t kv_heads;             /* of keys and values; 0: as many as n_heads */
	bool wide_keys;               /* keys as wide as values, whatever the form */
	int64_t batch;                /* of steps, else tokens; 0: --batch, --tokens */
	int64_t window, chunk;        /* 0: none */
	bool every_data;              /* without --data: every kind of it that is verified */
};

/*
 * Measures every provider of each case's operation, their samples alternating:
 * the cases of `paper` under that preset, those of `other` under the others and, where `all` is
 * set, every form of every operation that neither has. Widths are --d-model's. Ends with a
 * table of all. Returns the exit code.
 */
int kernel_bench_main(const struct driver *driver, const struct case_row *paper,
                      const struct case_row *other, bool all, int argc, char **argv);

#endif
