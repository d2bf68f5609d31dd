#include "bench/harness/results.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Groups of q and k that a RAT has unless its series says otherwise. */
enum { USUAL_GROUPS = 2 };

static int64_t csv_integer(const struct csv *csv, int row, const char *name)
{
	double value = csv_number(csv, row, name);

	return value >= 0 && value < 9e15 ? (int64_t)value : -1;
}

static void append_option(char *series, size_t size, const char *name, int64_t value)
{
	size_t length = strlen(series);

	if (value >= 0)
		snprintf(series + length, size - length, " %s=%lld", name, (long long)value);
}

static void name_series(const struct csv *csv, int row, struct result *result)
{
	char *series = result->series;
	const char *pattern = csv_text(csv, row, "pattern");
	int64_t groups = csv_integer(csv, row, "groups");

	snprintf(series, sizeof result->series - 1, "%s", *pattern ? pattern : result->block);
	for (char *c = series; *c; c++)
		if (*c == ',')
			*c = '-';
	append_option(series, sizeof result->series, "L", result->chunk);
	append_option(series, sizeof result->series, "W", csv_integer(csv, row, "window"));
	append_option(series, sizeof result->series, "G", groups == USUAL_GROUPS ? -1 : groups);
	if (strcmp(csv_text(csv, row, "position"), "none") == 0) {
		size_t length = strlen(series);

		snprintf(series + length, sizeof result->series - length, " NoPE");
	}
}

static bool whole_model(const struct result *r)
{
	return strcmp(r->pass, "throughput") == 0;
}

static struct result read_row(const struct csv *csv, int row)
{
	struct result result = {
	        .program = csv_text(csv, row, "program"),
	        .block = csv_text(csv, row, "block"),
	        .pass = csv_text(csv, row, "pass"),
	        .dtype = csv_text(csv, row, "dtype"),
	        .model = csv_text(csv, row, "model"),
	        .provider = csv_text(csv, row, "provider"),
	        .requested = csv_text(csv, row, "requested"),
	        .device = csv_text(csv, row, "device"),
	        .driver = csv_text(csv, row, "driver"),
	        .time_utc = csv_text(csv, row, "time_utc"),
	        .git_sha = csv_text(csv, row, "git_sha"),
	        .status = csv_text(csv, row, "status"),
	        .message = csv_text(csv, row, "message"),
	        .batch = csv_integer(csv, row, "batch"),
	        .seq_len = csv_integer(csv, row, "seq_len"),
	        .chunk = csv_integer(csv, row, "chunk"),
	        .d_model = csv_integer(csv, row, "d_model"),
	        .n_heads = csv_integer(csv, row, "n_heads"),
	        .prompt = csv_integer(csv, row, "prompt"),
	        .generate = csv_integer(csv, row, "generate"),
	        .warm = csv_integer(csv, row, "warm"),
	        .threads = csv_integer(csv, row, "threads"),
	        .git_dirty = csv_integer(csv, row, "git_dirty"),
	        .throttled = csv_integer(csv, row, "throttled"),
	        .samples = csv_integer(csv, row, "samples"),
	        .latency_ms = csv_number(csv, row, "latency_ms"),
	        .latency_p20_ms = csv_number(csv, row, "latency_p20_ms"),
	        .latency_p80_ms = csv_number(csv, row, "latency_p80_ms"),
	        .tokens_per_s = csv_number(csv, row, "tokens_per_s"),
	        .flops = csv_number(csv, row, "flops"),
	        .bytes = csv_number(csv, row, "bytes"),
	};

	/* A block is no part of a model, whatever its preset is for. */
	if (!whole_model(&result))
		result.model = "";
	name_series(csv, row, &result);
	return result;
}

/* Adds a row, in the place of an earlier one of the same case. */
static void add_row(struct results *results, int first, const struct result *result)
{
	for (int i = first; i < results->count; i++) {
		struct result *earlier = &results->row[i];

		if (result_same_case(earlier, result) &&
		    strcmp(earlier->device, result->device) == 0) {
			*earlier = *result;
			return;
		}
	}
	results->row[results->count++] = *result;
}

enum status results_add(struct results *results, const char *path)
{
	static const char *const needed[] = {"block", "pass", "seq_len", "status"};
	struct csv csv;
	enum status status = csv_read(path, &csv);

	if (status != STATUS_OK)
		return status;
	for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
		if (csv_column(&csv, needed[i]) < 0) {
			csv_release(&csv);
			return status_set(STATUS_INVALID, "%s: no column '%s'", path, needed[i]);
		}
	size_t n_rows = (size_t)results->count + (size_t)csv.n_rows + 1;
	struct result *row = realloc(results->row, n_rows * sizeof *row);
	if (row)
		results->row = row;
	struct csv *files = realloc(results->files, ((size_t)results->n_files + 1) * sizeof *files);
	if (files)
		results->files = files;
	if (!row || !files) {
		csv_release(&csv);
		return status_set(STATUS_OOM, "%s: no memory for its rows", path);
	}
	results->files[results->n_files++] = csv;
	int first = results->count;
	for (int i = 0; i < csv.n_rows; i++) {
		struct result result = read_row(&csv, i);

		add_row(results, first, &result);
	}
	return STATUS_OK;
}

void results_release(struct results *results)
{
	for (int i = 0; i < results->n_files; i++)
		csv_release(&results->files[i]);
	free(results->files);
	free(results->row);
	*results = (struct results){0};
}

bool result_ok(const struct result *result)
{
	return strcmp(result->status, status_name(STATUS_OK)) == 0;
}

bool result_same_case(const struct result *a, const struct result *b)
{
	return strcmp(a->series, b->series) == 0 && strcmp(a->program, b->program) == 0 &&
	       strcmp(a->pass, b->pass) == 0 && strcmp(a->dtype, b->dtype) == 0 &&
	       strcmp(a->model, b->model) == 0 && strcmp(a->requested, b->requested) == 0 &&
	       (whole_model(a) || a->batch == b->batch) && a->seq_len == b->seq_len &&
	       a->d_model == b->d_model && a->n_heads == b->n_heads && a->prompt == b->prompt &&
	       a->generate == b->generate && a->warm == b->warm && a->threads == b->threads;
}

bool result_same_table(const struct result *a, const struct result *b)
{
	bool generation = strcmp(a->pass, "generation") == 0;
	bool sized =
	        whole_model(a) || (a->d_model == b->d_model &&
	                           (generation ? a->batch == b->batch
	                                       : a->batch * a->seq_len == b->batch * b->seq_len));

	return sized && strcmp(a->device, b->device) == 0 && strcmp(a->pass, b->pass) == 0 &&
	       strcmp(a->dtype, b->dtype) == 0 && a->prompt == b->prompt &&
	       a->generate == b->generate && a->warm == b->warm && a->threads == b->threads;
}
