#define _GNU_SOURCE
#include "bench/harness/results.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/harness/case.h"

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
	} told[] = {{"chunk", "L=", ""},       {"window", "W=", ""},
	            {"dilation", "dil=", ""},  /* of RAT+, */
	            {"initial", "P=", "4"},    /* and how many tokens at the start it keeps */
	            {"groups", "G=", "2"},     /* of q and k of a RAT */
	            {"kv_heads", "KV=", NULL}, /* NULL: as many as heads */
	            {"position", "", "rope"}};
	const char *pattern = csv_text(csv, row, "pattern");
	char *series = result->series, value[64];
	const size_t size = sizeof result->series;

	pattern_names(*pattern ? pattern : result->block, '-', series, size);
	for (size_t i = 0; i < sizeof told / sizeof *told; i++) {
		argument_values(csv, row, told[i].argument, value, sizeof value);
		const char *usual = told[i].usual ? told[i].usual : csv_text(csv, row, "n_heads");
		if (strcmp(value, usual) == 0 || !value[0])
			continue;
		size_t length = strlen(series);
		snprintf(series + length, size - length, " %s%s", told[i].label,
		         strcmp(value, "none") == 0 ? "NoPE" : value);
	}
	/* Old files know no other data than normal. */
	const char *data = csv_text(csv, row, "data");

	if (data[0] && strcmp(data, "normal") != 0)
		snprintf(series + strlen(series), size - strlen(series), " %s", data);
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
	const bool any_batch = passes[result->kind].models;

	for (int i = first; i < results->count; i++) {
		struct result *earlier = &results->row[i];

		if (record_same_key(&earlier->record, &result->record, any_batch)) {
			*earlier = *result;
			return;
		}
	}
	results->row[results->count++] = *result;
}

/* Whether it is a results file that we understand. */
static enum status check_file(const char *path, const struct csv *csv)
{
	static const char *const needed[] = {"schema", "block", "pass", "seq_len", "status"};

	for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
		if (csv_column(csv, needed[i]) < 0)
			return status_set(STATUS_INVALID, "%s: no column '%s'", path, needed[i]);
	for (int row = 0; row < csv->n_rows; row++) {
		if (!record_schema_known(csv, row))
			return status_set(STATUS_INVALID,
			                  "%s: row %d: schema '%.32s' is unknown; this program "
			                  "reads schemas 1 to %d",
			                  path, row + 1, csv_text(csv, row, "schema"),
			                  RECORD_SCHEMA);
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

/*
 * In what rows can differ that share a line and a point, what matters most first, and how a name
 * says so. Every column that is a key is here; the last ones tell apart what different runs say
 * of one case.
 */
static const struct {
	const char *column, *label;
} details[] = {
        {"n_heads", "H="},
        {"kv_heads", "H_kv="},
        {"d_k", "d_k="},
        {"d_v", "d_v="},
        {"chunk", "L="},
        {"window", "W="},
        {"groups", "G="},
        {"position", "position="},
        {"d_model", "D="},
        {"seq_len", "T="},
        {"batch", "B="},
        {"requested", "by "},
        {"baseline", "against "},
        {"duty", "duty="},
        {"data", "data="},
        {"warm", "warm="},
        {"deterministic", "deterministic="},
        {"threads", "threads="},
        {"dtype", ""},
        {"model", ""},
        {"prompt", "prompt="},
        {"generate", "generate="},
        {"pass", ""},
        {"backend", ""},
        {"device", ""},
        {"block", ""},
        {"pattern", ""},
        {"git_sha", "commit "},
        {"build", ""},
        {"run_id", "run "},
};

enum { N_DETAILS = sizeof details / sizeof details[0] };

static bool detail_differs(const struct result *a, const struct result *b, int detail)
{
	char of_a[32], of_b[32];
	const char *column = details[detail].column;

	return strcmp(record_text(&a->record, column, of_a),
	              record_text(&b->record, column, of_b)) != 0;
}

/* Adds to a set of details one that tells two rows apart, unless it has such a one. */
static void tell_pair_apart(const struct result *a, const struct result *b, uint64_t *set)
{
	int first = N_DETAILS;

	for (int i = N_DETAILS - 1; i >= 0; i--) {
		if (!detail_differs(a, b, i))
			continue;
		if (*set & (uint64_t)1 << i)
			return;
		first = i;
	}
	if (first < N_DETAILS)
		*set |= (uint64_t)1 << first;
}

/* A text that does not fit is no name: the number of the row then is. */
static void name_details(struct result *result, uint64_t set, int row)
{
	const size_t size = sizeof result->detail;
	size_t length = 0;
	char number[32];

	result->detail[0] = '\0';
	for (int i = 0; i < N_DETAILS && length < size; i++) {
		const char *text = record_text(&result->record, details[i].column, number);

		if (set & (uint64_t)1 << i && text[0])
			length += (size_t)snprintf(result->detail + length, size - length, " %s%s",
			                           details[i].label, text);
	}
	if (length >= size)
		snprintf(result->detail, size, " #%d", row + 1);
}

enum status results_tell_apart(struct results *results, relates *same_line, relates *same_point,
                               const void *self)
{
	const int n = results->count;
	int *leader = calloc((size_t)n + 1, sizeof *leader); /* the first row of the line */
	uint64_t *set = calloc((size_t)n + 1, sizeof *set);  /* of each leader */

	_Static_assert(N_DETAILS <= 64, "a bit for each");
	for (int i = 0; leader && set && i < n; i++) {
		const struct result *row = &results->row[i];

		while (leader[i] < i && !same_line(self, &results->row[leader[i]], row))
			leader[i]++;
		for (int j = leader[i]; j < i; j++)
			if (leader[j] == leader[i] && same_point(self, &results->row[j], row))
				tell_pair_apart(&results->row[j], row, &set[leader[i]]);
	}
	for (int i = 0; leader && set && i < n; i++)
		name_details(&results->row[i], set[leader[i]], i);
	const bool done = leader && set;

	free(leader);
	free(set);
	return done ? STATUS_OK : status_set(STATUS_OOM, "no memory for the names of %d rows", n);
}

bool find_paper(char *path, size_t size, const char *name)
{
	char folder[PATH_MAX];
	const ssize_t length = readlink("/proc/self/exe", folder, sizeof folder - 1);

	folder[length > 0 ? length : 0] = '\0';
	/* build/report, or deeper where BUILD is. */
	for (char *slash = strrchr(folder, '/'); slash; slash = strrchr(folder, '/')) {
		*slash = '\0';
		if ((size_t)snprintf(path, size, "%s/results/paper/%s", folder, name) < size &&
		    access(path, R_OK) == 0)
			return true;
	}
	snprintf(path, size, "results/paper/%s", name);
	return access(path, R_OK) == 0;
}

bool result_is_ratio(const struct result *result)
{
	return result->baseline[0] != '\0';
}

bool result_ok(const struct result *result)
{
	return strcmp(result->status, status_name(STATUS_OK)) == 0 ||
	       strcmp(result->status, status_name(STATUS_NOISY)) == 0;
}

void result_provider(const struct result *result, char *text, size_t size)
{
	const char *first = strchr(result->requested, '=');
	size_t length = first ? strcspn(first + 1, ",") : 0;

	for (const char *at = first; at; at = strchr(at + 1, '='))
		if (strcspn(at + 1, ",") != length || strncmp(at + 1, first + 1, length) != 0)
			length = 0; /* several */
	if (length > 0)
		snprintf(text, size, "%.*s", (int)length, first + 1);
	else
		snprintf(text, size, "%s", result->requested);
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

/* A GPU does not mind how many threads the host has. */
static bool same_threads(const struct result *a, const struct result *b)
{
	return a->threads == b->threads ||
	       (strcmp(a->backend, "cuda") == 0 && strcmp(b->backend, "cuda") == 0);
}

/* The same conditions of measuring. */
static bool same_conditions(const struct result *a, const struct result *b)
{
	return a->kind == b->kind && strcmp(a->dtype, b->dtype) == 0 && a->warm == b->warm &&
	       (a->deterministic > 0) == (b->deterministic > 0) && same_threads(a, b) &&
	       same_text_if_known(a->duty, b->duty) && strcmp(data_of(a), data_of(b)) == 0 &&
	       strcmp(a->baseline, b->baseline) == 0;
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

	return sized && same_conditions(a, b) && strcmp(a->device, b->device) == 0 &&
	       a->prompt == b->prompt && a->generate == b->generate;
}
