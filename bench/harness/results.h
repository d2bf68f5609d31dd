/* Rows of results files read back: what the report, the comparison and the pictures share. */
#ifndef BENCH_HARNESS_RESULTS_H
#define BENCH_HARNESS_RESULTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bench/harness/record.h"
#include "kernels/status.h"
#include "layers/pass.h"

/* One row. Strings belong to the results. */
struct result {
	/* What varies with the block and its own options: "attention", "rat L=16",
	 * "rat-swa L=16 W=1024", "attention NoPE". */
	char series[96];
	/* What tells it from rows that would share its line and its point, " H=4 d_v=512": see
	 * results_tell_apart(). */
	char detail[256];
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
/*
 * Rows are shown as points of lines. Where two rows have the same line and the same point, the
 * details of all rows of that line get the column in which they differ: nothing hides anything.
 * The functions say what shares a line, or a point, without regard to details.
 */
typedef bool relates(const void *self, const struct result *a, const struct result *b);
enum status results_tell_apart(struct results *results, relates *same_line, relates *same_point,
                               const void *self);
void results_release(struct results *results);

/* The path of a file of results/paper in the checkout that the running program lies in, or below
 * the working directory; false if there is none. */
bool find_paper(char *path, size_t size, const char *name);

/* Whether it is a ratio to another row, its baseline, and has no latency of its own. */
bool result_is_ratio(const struct result *result);

/* Whether it was measured and verified: ok or noisy. */
bool result_ok(const struct result *result);

/* What was asked for with --provider or --rival, in short: "cudnn" of "attention=cudnn,
 * attention_step=cudnn"; "" where nothing was. */
void result_provider(const struct result *result, char *text, size_t size);

/* Whether two rows measure the same, wherever and by whichever kernels: those that were
 * asked for count, not those that ran. Whole models find their own batch. What the columns of an
 * old file do not tell is what its program did: as many key heads as heads, normal data. */
bool result_same_case(const struct result *a, const struct result *b);

/*
 * Whether two rows belong into one table: the same device, pass, dtype, conditions, baseline, width
 * and number of tokens (generation: sequences; whole models: prompt and generated tokens).
 */
bool result_same_table(const struct result *a, const struct result *b);

#endif
