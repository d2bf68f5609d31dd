/*
 * Rows of results and the file they go to. A row is on the disk as soon as it
 * is known; a file whose writer was killed is repaired and continued.
 */
#ifndef BENCH_HARNESS_RECORD_H
#define BENCH_HARNESS_RECORD_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "bench/harness/csv.h"
#include "kernels/status.h"

/*
 * The columns of the CSV, in its order. Rows with the same keys are measurements of the same case.
 * Times in milliseconds; compiler and runtime are versions.
 */
/* clang-format off */
#define RECORD_COLUMNS(TEXT, INTEGER, REAL) \
	TEXT(run_id, VALUE) \
	TEXT(case_id, VALUE) /* names the samples of a row in the file beside it */ \
	TEXT(time_utc, VALUE) TEXT(git_sha, VALUE) INTEGER(git_dirty, VALUE) \
	TEXT(build, VALUE) /* processor and sanitizers it was compiled for */ \
	TEXT(host, VALUE) TEXT(device, KEY) TEXT(driver, VALUE) \
	TEXT(cuda, VALUE) TEXT(backend, KEY) TEXT(program, VALUE) TEXT(block, KEY) \
	TEXT(pattern, KEY) \
	TEXT(provider, VALUE) /* of the operations that mix tokens, as they ran */ \
	TEXT(pass, KEY) TEXT(dtype, KEY) INTEGER(batch, KEY) INTEGER(seq_len, KEY) \
	INTEGER(chunk, KEY) INTEGER(window, KEY) INTEGER(groups, KEY) TEXT(position, KEY) \
	INTEGER(d_model, KEY) INTEGER(n_heads, KEY) INTEGER(kv_heads, KEY) \
	INTEGER(d_head, VALUE) INTEGER(d_k, KEY) INTEGER(d_v, KEY) \
	INTEGER(n_layers, VALUE) INTEGER(parameters, VALUE) \
	INTEGER(state_bytes_per_sequence, VALUE) REAL(state_bytes_per_token, VALUE) \
	TEXT(model, KEY) INTEGER(prompt, KEY) INTEGER(generate, KEY) \
	INTEGER(micro_batch, VALUE) REAL(latency_ms, VALUE) \
	REAL(latency_low_ms, VALUE) REAL(latency_high_ms, VALUE) /* 95% interval of the median */ \
	REAL(latency_p20_ms, VALUE) REAL(latency_p80_ms, VALUE) REAL(latency_min_ms, VALUE) \
	INTEGER(samples, VALUE) REAL(precision_pct, VALUE) /* asked for; 0: none */ \
	TEXT(baseline, KEY) /* of a ratio row: the pattern and provider it is relative to */ \
	REAL(ratio, VALUE) REAL(ratio_low, VALUE) REAL(ratio_high, VALUE) /* baseline / this */ \
	REAL(prefill_ms, VALUE) /* throughput: of the prompt, which tokens_per_s leaves out */ \
	REAL(tokens_per_s, VALUE) REAL(flops, VALUE) REAL(tflops, VALUE) \
	REAL(bytes, VALUE) REAL(gb_per_s, VALUE) REAL(roofline_ms, VALUE) \
	REAL(roofline_pct, VALUE) \
	REAL(predicted_ms, VALUE) /* of a launch, before it was measured */ \
	REAL(peak_mem_mib, VALUE) /* planned and taken */ \
	INTEGER(memory_bytes, VALUE) /* wanted, taken or not */ \
	REAL(rel_err, VALUE) REAL(sm_clock_mhz, VALUE) \
	REAL(throttled, VALUE) /* share of the samples; empty: unknown */ \
	TEXT(throttle_reasons, VALUE) REAL(power_w, VALUE) TEXT(duty, KEY) TEXT(data, KEY) \
	TEXT(status, VALUE) TEXT(message, VALUE) \
	TEXT(requested, KEY) /* --provider; empty: the fastest */ \
	TEXT(providers, VALUE) /* every operation's, as it ran: "attention=cudnn ..." */ \
	INTEGER(warm, KEY) INTEGER(deterministic, KEY) INTEGER(threads, KEY) REAL(memory_total_mib, VALUE) \
	REAL(copy_gb_per_s, VALUE) REAL(read_gb_per_s, VALUE) REAL(gemm_tflops, VALUE) \
	TEXT(compiler, VALUE) TEXT(runtime, VALUE)
/* clang-format on */

enum { RECORD_SCHEMA = 3 };

#define RECORD_TEXT(name, key)    const char *name;
#define RECORD_INTEGER(name, key) int64_t name;
#define RECORD_REAL(name, key)    double name;
#define RECORD_FIELDS             RECORD_COLUMNS(RECORD_TEXT, RECORD_INTEGER, RECORD_REAL)

/* The version of these columns, a number: what the column `schema` before them says. */
extern const char record_schema[];

/* One row. Strings are borrowed. Not a number, a negative integer and an empty string are empty
 * fields. */
struct record {
	RECORD_FIELDS
};

/* A record with every field empty. */
struct record record_empty(void);

/* A row of a file: columns that it does not have are empty, as are numbers that are none. */
struct record record_read(const struct csv *csv, int row);

/* A field by its column's name, as the CSV has it; number[] is room for it. */
const char *record_text(const struct record *record, const char *column, char number[32]);

/* Whether two rows have the same keys; any_batch: but for the batch. */
bool record_same_key(const struct record *a, const struct record *b, bool any_batch);

/* Whether the row's schema is this program's or that of an earlier one. */
bool record_schema_known(const struct csv *csv, int row);

/* The header, and a row, as lines of CSV. */
void record_print_header(FILE *file);
void record_print(FILE *file, const struct record *record);

/* A results file that rows are appended to. */
struct record_file {
	int descriptor; /* -1: none */
	char path[512];
	/* Resuming: the keys of finished rows, and the run they belong to. */
	int n_done;
	char **done;
	bool any_batch; /* a row is the same case whatever its batch */
	char run_id[128];
};

enum record_mode { RECORD_APPEND, RECORD_TRUNCATE, RECORD_RESUME };

/* What a row must have been measured with to be resumed as ours, and what a case may take now. */
struct record_terms {
	const char *git_sha, *build, *compiler;
	bool git_dirty;
	double launch_ms;    /* a launch that is predicted to take longer is skipped */
	size_t memory_bytes; /* a case that wants more is oom */
	bool any_batch;      /* a row is the same case whatever its batch */
};

/*
 * Opens `path` for appending, makes its folders, and keeps other programs from writing to it until
 * it is closed. Nothing of a file changes unless it is empty or its header is ours: the columns of
 * this program, or when it is truncated those of any schema that readers know. A row at the end
 * that was cut is removed (append and resume). A file below runs/ that has the columns of an
 * earlier program is moved aside, to NAME.old-1.csv.
 *
 * Resuming reads the keys of the rows that need not be measured again: those of the same build
 * that are ok, noisy or unsupported, and those that are skipped or oom and would be again. run_id
 * is that of the last of them.
 *
 * STATUS_IO or STATUS_INVALID with the file's name.
 */
enum status record_open(struct record_file *file, const char *path, enum record_mode mode,
                        const struct record_terms *terms);
void record_close(struct record_file *file);

/* Whether a row with the key of `record` is finished. */
bool record_done(const struct record_file *file, const struct record *record);

/* Appends n rows at once and forces them to the disk. */
enum status record_append(struct record_file *file, const struct record *records, int n);

/* Writes all of `text` to a file, whose name is for messages, and forces it to the disk. */
enum status record_write_all(int descriptor, const char *path, const char *text, size_t length);

#endif
