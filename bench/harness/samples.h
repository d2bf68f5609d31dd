/*
 * The samples behind the rows: a CSV beside the results file, a line for each timed launch, so that
 * every median and interval can be computed again. "latency.csv" has "latency.samples.csv".
 */
#ifndef BENCH_HARNESS_SAMPLES_H
#define BENCH_HARNESS_SAMPLES_H

#include "bench/harness/measure.h"
#include "bench/harness/record.h"

struct sample_file {
	int descriptor; /* -1: none, as for rows that go to a pipe */
	char path[528];
};

/* The name of the file beside `rows`, a results file. */
void samples_path(const char *rows, char *path, size_t size);

/*
 * Opens the file beside `rows`. Truncating starts it anew. Otherwise samples whose case has no row
 * in `rows`, which a killed run has left, are removed from its end. STATUS_INVALID if the file is
 * not one of samples.
 */
enum status samples_open(struct sample_file *file, const char *rows, enum record_mode mode);
void samples_close(struct sample_file *file);

/* Appends the samples of a variant whose row is `record` (run_id and case_id) and forces them to
 * the disk: before the row, which may not be there without them. */
enum status samples_append(const struct sample_file *file, const struct record *record,
                           const struct variant *v);

#endif
