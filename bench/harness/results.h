/* Rows of results files read back: what the report, the comparison and the pictures share. */
#ifndef BENCH_HARNESS_RESULTS_H
#define BENCH_HARNESS_RESULTS_H

#include <stdbool.h>
#include <stdint.h>

#include "bench/harness/record.h"
#include "kernels/status.h"
#include "layers/pass.h"

/* One row. Strings belong to the results. */
struct result {
	/* What varies with the block and its own options: "attention", "rat L=16",
	 * "rat-swa L=16 W=1024", "attention NoPE". */
	char series[96];
	enum pass kind;
	/* `pattern` is empty of a file that tells less than the columns of the case, `model` of
	 * what is no whole model. */
	union {
		struct record record;
		struct {
			RECORD_FIELDS
		};
	};
};

struct results {
	int count;
	struct result *row;
	int n_files;
	struct csv *files;
};

/*
 * Adds the rows of a CSV file. A case that the file has several times counts
 * once, as it was last. STATUS_IO, STATUS_INVALID (no results file, or of a later
 * program), STATUS_OOM.
 */
enum status results_add(struct results *results, const char *path);

/* The same, but every row stays, for those who tell the runs of a file apart. */
enum status results_add_all(struct results *results, const char *path);
void results_release(struct results *results);

/* Whether it was measured and verified: ok or noisy. */
bool result_ok(const struct result *result);

/* Whether two rows measure the same, wherever and by whichever kernels: those that were
 * asked for count, not those that ran. Whole models find their own batch. What the columns of an
 * old file do not tell is what its program did: as many key heads as heads, normal data. */
bool result_same_case(const struct result *a, const struct result *b);

/*
 * Whether two rows belong into one table: the same device, pass, dtype, width
 * and number of tokens (generation: sequences; whole models: prompt and
 * generated tokens), so that they differ in series and sequence length alone.
 */
bool result_same_table(const struct result *a, const struct result *b);

#endif
