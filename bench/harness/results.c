#include "bench/harness/results.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/case.h"

enum { LAST_SCHEMA = 3 };

/*
 * What the layers of a row have for an argument: "16", or "16|64" where they differ; "" if none
 * has it. The pattern says, or in old files the column of the argument.
 */
static void argument_values(const struct csv *csv, int row, const char *name, char *text,
                            size_t size)
{
	const char *at = csv_text(csv, row, "pattern");
	const size_t name_length = strlen(name);
	size_t length = 0, first = 0;
	bool differ = false;

	snprintf(text, size, "%s", strchr(at, '(') ? "" : csv_text(csv, row, name));
	for (at = strpbrk(at, "(,"); at; at = strpbrk(at + 1, "(,")) {
		if (strncmp(at + 1, name, name_length) != 0 || at[1 + name_length] != '=')
			continue;
		const char *value = at + 1 + name_length + 1;
		size_t value_length = strcspn(value, ",)");

		first = first ? first : value_length;
		differ = differ ||
		         (length > 0 && (first != value_length || memcmp(text, value, first) != 0));
		if (length + value_length + 2 > size)
			break;
		length += (size_t)snprintf(text + length, size - length, "%s%.*s",
		                           length ? "|" : "", (int)value_length, value);
	}
	if (length > 0 && !differ)
		text[first] = '\0';
}

static void name_series(const struct csv *csv, int row, struct result *result)
{
	static const struct {
		const char *argument, *label, *usual; /* usual: a value that goes without saying */
	} told[] = {{"chunk", "L=", ""},
	            {"window", "W=", ""},
	            {"groups", "G=", "2"}, /* of q and k of a RAT */
	            {"position", "", "rope"}};
	const char *pattern = csv_text(csv, row, "pattern");
	char *series = result->series, value[64];
	const size_t size = sizeof result->series;

	pattern_names(*pattern ? pattern : result->block, '-', series, size);
	for (size_t i = 0; i < sizeof told / sizeof *told; i++) {
		argument_values(csv, row, told[i].argument, value, sizeof value);
		if (strcmp(value, told[i].usual) == 0 || !value[0])
			continue;
		size_t length = strlen(series);
		snprintf(series + length, size - length, " %s%s", told[i].label,
		         strcmp(value, "none") == 0 ? "NoPE" : value);
	}
}

static struct result read_row(const struct csv *csv, int row)
{
	struct result result = {.record = record_read(csv, row)};

	result.kind = pass_find(result.pass);
	if (!(csv_number(csv, row, "schema") > 1))
		result.pattern = "";
	/* A block is no part of a model, whatever its preset is for. */
	if (!passes[result.kind].models)
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

/* Whether it is a results file that we understand. */
static enum status check_file(const char *path, const struct csv *csv)
{
	static const char *const needed[] = {"block", "pass", "seq_len", "status"};

	for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
		if (csv_column(csv, needed[i]) < 0)
			return status_set(STATUS_INVALID, "%s: no column '%s'", path, needed[i]);
	for (int row = 0; row < csv->n_rows; row++) {
		if (csv_number(csv, row, "schema") > LAST_SCHEMA)
			return status_set(STATUS_INVALID,
			                  "%s: schema %.32s is of a later program; schema %d is "
			                  "the last that this one knows",
			                  path, csv_text(csv, row, "schema"), LAST_SCHEMA);
		if (pass_find(csv_text(csv, row, "pass")) == PASS_COUNT)
			return status_set(STATUS_INVALID, "%s: row %d: no pass is called '%.32s'",
			                  path, row + 1, csv_text(csv, row, "pass"));
	}
	return STATUS_OK;
}

static enum status add_file(struct results *results, const char *path, bool all)
{
	struct csv csv;

	TRY(csv_read(path, &csv));
	enum status status = check_file(path, &csv);
	if (status != STATUS_OK) {
		csv_release(&csv);
		return status;
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

		/* None of the rows before the end is an earlier one of the same case. */
		add_row(results, all ? results->count : first, &result);
	}
	return STATUS_OK;
}

enum status results_add(struct results *results, const char *path)
{
	return add_file(results, path, false);
}

enum status results_add_all(struct results *results, const char *path)
{
	return add_file(results, path, true);
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
	return strcmp(result->status, status_name(STATUS_OK)) == 0 ||
	       strcmp(result->status, status_name(STATUS_NOISY)) == 0;
}

/* Sizes that old files have of layers without such a one, and new ones have not, or the other way
 * round. */
static bool same_if_known(int64_t a, int64_t b)
{
	return a == b || a < 0 || b < 0;
}

static bool same_text_if_known(const char *a, const char *b)
{
	return !a[0] || !b[0] || strcmp(a, b) == 0;
}

/* Heads of keys and values; files that do not tell are older than grouped heads. */
static int64_t kv_heads_of(const struct result *r)
{
	return r->kv_heads < 0 ? r->n_heads : r->kv_heads;
}

/* The data of files that do not tell were normal. */
static const char *data_of(const struct result *r)
{
	return r->data[0] ? r->data : "normal";
}

/* The same conditions of measuring. */
static bool same_conditions(const struct result *a, const struct result *b)
{
	return a->kind == b->kind && strcmp(a->dtype, b->dtype) == 0 && a->warm == b->warm &&
	       a->threads == b->threads && same_text_if_known(a->duty, b->duty) &&
	       strcmp(data_of(a), data_of(b)) == 0 && strcmp(a->baseline, b->baseline) == 0;
}

bool result_same_case(const struct result *a, const struct result *b)
{
	return same_conditions(a, b) && strcmp(a->series, b->series) == 0 &&
	       same_text_if_known(a->pattern, b->pattern) && strcmp(a->model, b->model) == 0 &&
	       strcmp(a->requested, b->requested) == 0 &&
	       (passes[a->kind].models || a->batch == b->batch) && a->seq_len == b->seq_len &&
	       a->d_model == b->d_model && same_if_known(a->n_heads, b->n_heads) &&
	       same_if_known(kv_heads_of(a), kv_heads_of(b)) && same_if_known(a->d_k, b->d_k) &&
	       same_if_known(a->d_v, b->d_v) && a->prompt == b->prompt &&
	       a->generate == b->generate;
}

bool result_same_table(const struct result *a, const struct result *b)
{
	const struct pass_info *pass = &passes[a->kind];
	bool sized =
	        pass->models || (a->d_model == b->d_model &&
	                         (pass->step ? a->batch == b->batch
	                                     : a->batch * a->seq_len == b->batch * b->seq_len));

	return sized && a->kind == b->kind && strcmp(a->device, b->device) == 0 &&
	       strcmp(a->dtype, b->dtype) == 0 && a->prompt == b->prompt &&
	       a->generate == b->generate && a->warm == b->warm && a->threads == b->threads;
}
