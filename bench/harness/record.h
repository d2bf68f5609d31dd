/*
 * Rows of results and the file they go to. A row is on the disk as soon as it
 * is known; a file whose writer was killed is repaired and continued.
 */
#ifndef BENCH_HARNESS_RECORD_H
#define BENCH_HARNESS_RECORD_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/status.h"

/*
 * One row, field by field as in the CSV, in its order. Strings are borrowed. Not a number, a
 * negative integer and an empty string are empty fields. Times in milliseconds.
 */
struct record {
	const char *run_id, *time_utc, *git_sha;
	int64_t git_dirty;
	const char *host, *device, *driver, *cuda, *backend, *program, *block, *pattern;
	const char *provider; /* of the operations that mix tokens, as they ran */
	const char *pass, *dtype;
	int64_t batch, seq_len, chunk, window, groups;
	const char *position;
	int64_t d_model, n_heads, d_head, d_k, d_v, n_layers;
	const char *model;
	int64_t prompt, generate, micro_batch;
	double latency_ms, latency_p20_ms, latency_p80_ms, latency_min_ms;
	int64_t samples;
	double prefill_ms; /* throughput: of the prompt, which tokens_per_s leaves out */
	double tokens_per_s, flops, tflops, bytes, gb_per_s, roofline_ms, roofline_pct;
	double predicted_ms;  /* of a launch, before it was measured */
	double peak_mem_mib;  /* planned and taken */
	int64_t memory_bytes; /* wanted, taken or not */
	double rel_err, sm_clock_mhz;
	int64_t throttled;
	const char *status, *message;
	const char *requested; /* --provider; empty: the fastest */
	const char *providers; /* every operation's, as it ran: "attention=cudnn ..." */
	int64_t warm, threads;
	double memory_total_mib, copy_gb_per_s, read_gb_per_s, gemm_tflops;
	const char *compiler, *runtime; /* library versions */
};

/* A record with every field empty. */
struct record record_empty(void);

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
	char run_id[128];
};

enum record_mode { RECORD_APPEND, RECORD_TRUNCATE, RECORD_RESUME };

/*
 * Opens `path` for appending and makes its folders. An existing file must have our columns,
 * unless it is truncated. A cut last line is removed (append and resume). Resuming reads the
 * keys of the rows that need not be measured again: those of the commit `git_sha` whose status is
 * ok, unsupported, oom or skipped; run_id is that of the last of them. STATUS_IO or
 * STATUS_INVALID with the file's name.
 */
enum status record_open(struct record_file *file, const char *path, enum record_mode mode,
                        const char *git_sha);
void record_close(struct record_file *file);

/* Whether a row with the key of `record` is finished. without_batch: whatever its batch. */
bool record_done(const struct record_file *file, const struct record *record, bool without_batch);

/* Appends a row and forces it to the disk. */
enum status record_append(struct record_file *file, const struct record *record);

#endif
