#define _GNU_SOURCE
#include "bench/harness/record.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/harness/case.h"

const char record_schema[] = "3";

enum kind { KIND_TEXT, KIND_INTEGER, KIND_REAL };

struct column {
	const char *name;
	size_t offset;
	enum kind kind;
	bool key;
};

enum { VALUE, KEY };
#define TEXT(name, key)    {#name, offsetof(struct record, name), KIND_TEXT, key},
#define INTEGER(name, key) {#name, offsetof(struct record, name), KIND_INTEGER, key},
#define REAL(name, key)    {#name, offsetof(struct record, name), KIND_REAL, key},

static const struct column columns[] = {RECORD_COLUMNS(TEXT, INTEGER, REAL)};

enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

struct record record_read(const struct csv *csv, int row)
{
	struct record record = {0};

	for (int i = 0; i < N_COLUMNS; i++) {
		const char *name = columns[i].name;
		void *field = (char *)&record + columns[i].offset;
		double number = columns[i].kind == KIND_TEXT ? 0 : csv_number(csv, row, name);

		if (columns[i].kind == KIND_TEXT)
			*(const char **)field = csv_text(csv, row, name);
		else if (columns[i].kind == KIND_INTEGER)
			*(int64_t *)field =
			        number >= 0 && number < 9e15 ? (int64_t)number : NO_VALUE;
		else
			*(double *)field = number;
	}
	return record;
}

struct record record_empty(void)
{
	const struct csv nothing = {0};

	return record_read(&nothing, 0);
}

/* A field as the CSV has it, before quoting; number[] is room for it. */
static const char *field_text(const struct record *record, const struct column *column,
                              char number[32])
{
	const void *field = (const char *)record + column->offset;

	number[0] = '\0';
	if (column->kind == KIND_TEXT)
		return *(const char *const *)field;
	if (column->kind == KIND_INTEGER && *(const int64_t *)field >= 0)
		snprintf(number, 32, "%" PRId64, *(const int64_t *)field);
	if (column->kind == KIND_REAL && !isnan(*(const double *)field))
		snprintf(number, 32, "%.7g", *(const double *)field);
	return number;
}

/* The text that two rows of the same case have in common; to be freed. */
static char *key_of_record(const struct record_file *file, const struct record *record)
{
	char *key = NULL, number[32];
	size_t length;
	FILE *text = open_memstream(&key, &length);

	if (!text)
		return NULL;
	for (int i = 0; i < N_COLUMNS; i++)
		if (columns[i].key && !(file->any_batch && strcmp(columns[i].name, "batch") == 0))
			fprintf(text, "%s=%s\n", columns[i].name,
			        field_text(record, &columns[i], number));
	return fclose(text) == 0 ? key : NULL;
}

static bool row_finished(const struct csv *csv, int row, const char *git_sha)
{
	static const enum status finished[] = {STATUS_OK, STATUS_NOISY, STATUS_UNSUPPORTED,
	                                       STATUS_OOM, STATUS_SKIPPED};
	const char *status = csv_text(csv, row, "status");

	if (strcmp(csv_text(csv, row, "git_sha"), git_sha) != 0)
		return false;
	for (size_t i = 0; i < sizeof finished / sizeof finished[0]; i++)
		if (strcmp(status, status_name(finished[i])) == 0)
			return true;
	return false;
}

static enum status read_done(struct record_file *file, const struct csv *csv, const char *git_sha)
{
	file->done = calloc((size_t)csv->n_rows + 1, sizeof *file->done);
	if (!file->done)
		return status_set(STATUS_OOM, "%s: no memory for its keys", file->path);
	for (int row = 0; row < csv->n_rows; row++) {
		if (!row_finished(csv, row, git_sha))
			continue;
		const struct record record = record_read(csv, row);
		char *key = key_of_record(file, &record);

		if (!key)
			return status_set(STATUS_OOM, "%s: no memory for its keys", file->path);
		file->done[file->n_done++] = key;
		snprintf(file->run_id, sizeof file->run_id, "%s", csv_text(csv, row, "run_id"));
	}
	return STATUS_OK;
}

static bool columns_match(const struct csv *csv)
{
	if (csv->n_columns != N_COLUMNS + 1 || strcmp(csv->header[0], "schema") != 0)
		return false;
	for (int i = 0; i < N_COLUMNS; i++)
		if (strcmp(csv->header[i + 1], columns[i].name) != 0)
			return false;
	return true;
}

/* Writes all of `text` and forces it to the disk. */
static enum status write_all(const struct record_file *file, const char *text, size_t length)
{
	while (length > 0) {
		ssize_t written = write(file->descriptor, text, length);

		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0)
			return status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
		text += written;
		length -= (size_t)written;
	}
	/* A pipe or a terminal has no disk behind it. */
	if (fsync(file->descriptor) != 0 && errno != EINVAL && errno != EROFS)
		return status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
	return STATUS_OK;
}

void record_print_header(FILE *file)
{
	fputs("schema", file);
	for (int i = 0; i < N_COLUMNS; i++)
		fprintf(file, ",%s", columns[i].name);
	fputc('\n', file);
}

void record_print(FILE *file, const struct record *record)
{
	char number[32];

	fputs(record_schema, file);
	for (int i = 0; i < N_COLUMNS; i++) {
		fputc(',', file);
		csv_write_field(file, field_text(record, &columns[i], number));
	}
	fputc('\n', file);
}

/*
 * Appends a row (NULL: the header) in one write: a reader never sees half of it, and a writer
 * that is killed cuts at most this line.
 */
static enum status append_line(const struct record_file *file, const struct record *record)
{
	char *line = NULL;
	size_t length;
	FILE *text = open_memstream(&line, &length);

	if (!text)
		return status_set(STATUS_OOM, "no memory for a row");
	if (record)
		record_print(text, record);
	else
		record_print_header(text);
	if (fclose(text) != 0)
		return status_set(STATUS_OOM, "no memory for a row");
	enum status status = write_all(file, line, length);

	free(line);
	return status;
}

/* Makes the folders that `path` is in. */
static enum status make_folders(const char *path)
{
	char folder[512];

	for (size_t i = 1; i < sizeof folder && path[i]; i++) {
		if (path[i] != '/')
			continue;
		snprintf(folder, sizeof folder, "%.*s", (int)i, path);
		if (mkdir(folder, 0777) != 0 && errno != EEXIST)
			return status_set(STATUS_IO, "%s: %s", folder, strerror(errno));
	}
	return STATUS_OK;
}

/* Checks what the file holds, repairs its end, and writes the header of an empty one. */
static enum status adopt_content(struct record_file *file, enum record_mode mode,
                                 const char *git_sha)
{
	struct csv csv;
	struct stat info;
	enum status status = STATUS_OK;

	if (fstat(file->descriptor, &info) != 0 || !S_ISREG(info.st_mode))
		return append_line(file, NULL);
	if (mode == RECORD_TRUNCATE && ftruncate(file->descriptor, 0) != 0)
		return status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
	TRY(csv_read(file->path, &csv));
	if (csv.cut && ftruncate(file->descriptor, (off_t)csv.whole_bytes) != 0)
		status = status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
	else if (csv.n_columns == 0)
		status = append_line(file, NULL);
	else if (!columns_match(&csv))
		status = status_set(STATUS_INVALID,
		                    "--out: %s has other columns than this program writes "
		                    "(schema %s); move it away, name another file with --out, "
		                    "or replace it with --truncate",
		                    file->path, record_schema);
	else if (mode == RECORD_RESUME)
		status = read_done(file, &csv, git_sha);
	csv_release(&csv);
	return status;
}

enum status record_open(struct record_file *file, const char *path, enum record_mode mode,
                        const char *git_sha, bool any_batch)
{
	*file = (struct record_file){.descriptor = -1, .any_batch = any_batch};
	snprintf(file->path, sizeof file->path, "%s", path);
	TRY(make_folders(path));
	file->descriptor = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
	if (file->descriptor < 0) /* perhaps a pipe, which cannot be read */
		file->descriptor = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (file->descriptor < 0)
		return status_set(STATUS_IO, "--out: %s cannot be written: %s", path,
		                  strerror(errno));
	enum status status = adopt_content(file, mode, git_sha);
	if (status != STATUS_OK)
		record_close(file);
	return status;
}

void record_close(struct record_file *file)
{
	if (file->descriptor >= 0)
		close(file->descriptor);
	for (int i = 0; i < file->n_done; i++)
		free(file->done[i]);
	free(file->done);
	*file = (struct record_file){.descriptor = -1};
}

bool record_done(const struct record_file *file, const struct record *record)
{
	char *key = key_of_record(file, record);
	bool found = false;

	for (int i = 0; key && !found && i < file->n_done; i++)
		found = strcmp(file->done[i], key) == 0;
	free(key);
	return found;
}

enum status record_append(struct record_file *file, const struct record *record)
{
	return append_line(file, record);
}
