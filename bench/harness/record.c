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
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/harness/case.h"

static const char schema[] = "3"; /* RECORD_SCHEMA */

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
			        number >= 0 && number < 9.2e18 ? (int64_t)number : NO_VALUE;
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

const char *record_text(const struct record *record, const char *column, char number[32])
{
	number[0] = '\0';
	for (int i = 0; i < N_COLUMNS; i++)
		if (strcmp(columns[i].name, column) == 0)
			return field_text(record, &columns[i], number);
	return number;
}

bool record_same_key(const struct record *a, const struct record *b, bool any_batch)
{
	char of_a[32], of_b[32];

	for (int i = 0; i < N_COLUMNS; i++)
		if (columns[i].key && !(any_batch && strcmp(columns[i].name, "batch") == 0) &&
		    strcmp(field_text(a, &columns[i], of_a), field_text(b, &columns[i], of_b)) != 0)
			return false;
	return true;
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

/* Whether the row is of the same commit, changes to it, and compiler as what runs now. */
static bool same_build(const struct record *row, const struct record_terms *terms)
{
	return strcmp(row->git_sha, terms->git_sha) == 0 && strcmp(row->build, terms->build) == 0 &&
	       strcmp(row->compiler, terms->compiler) == 0 &&
	       row->git_dirty == (int64_t)terms->git_dirty;
}

/* Whether measuring the case again could only repeat the row. */
static bool row_finished(const struct record *row, const struct record_terms *terms)
{
	static const enum status final[] = {STATUS_OK, STATUS_NOISY, STATUS_UNSUPPORTED};

	if (!same_build(row, terms))
		return false;
	for (size_t i = 0; i < sizeof final / sizeof final[0]; i++)
		if (strcmp(row->status, status_name(final[i])) == 0)
			return true;
	/* The limits of now decide about those that ran into a limit then. */
	if (strcmp(row->status, status_name(STATUS_SKIPPED)) == 0)
		return row->predicted_ms > terms->launch_ms;
	return strcmp(row->status, status_name(STATUS_OOM)) == 0 && row->memory_bytes >= 0 &&
	       (uint64_t)row->memory_bytes > terms->memory_bytes;
}

static enum status read_done(struct record_file *file, const struct csv *csv,
                             const struct record_terms *terms)
{
	file->done = calloc((size_t)csv->n_rows + 1, sizeof *file->done);
	if (!file->done)
		return status_set(STATUS_OOM, "%s: no memory for its keys", file->path);
	for (int row = 0; row < csv->n_rows; row++) {
		const struct record record = record_read(csv, row);

		if (!row_finished(&record, terms))
			continue;
		char *key = key_of_record(file, &record);

		if (!key)
			return status_set(STATUS_OOM, "%s: no memory for its keys", file->path);
		file->done[file->n_done++] = key;
		snprintf(file->run_id, sizeof file->run_id, "%s", record.run_id);
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

bool record_schema_known(const struct csv *csv, int row)
{
	const double number = csv_number(csv, row, "schema");

	return number >= 1 && number <= RECORD_SCHEMA && number == (int)number;
}

/* Whether this program or an earlier one wrote the file. */
static bool is_ours(const struct csv *csv)
{
	static const char *const needed[] = {"run_id", "time_utc", "git_sha", "device", "program",
	                                     "block",  "pass",     "seq_len", "status"};

	if (csv->n_columns == 0 || strcmp(csv->header[0], "schema") != 0)
		return false;
	for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++)
		if (csv_column(csv, needed[i]) < 0)
			return false;
	for (int row = 0; row < csv->n_rows; row++)
		if (!record_schema_known(csv, row))
			return false;
	return true;
}

enum status record_write_all(int descriptor, const char *path, const char *text, size_t length)
{
	while (length > 0) {
		ssize_t written = write(descriptor, text, length);

		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0)
			return status_set(STATUS_IO, "%s: %s", path, strerror(errno));
		text += written;
		length -= (size_t)written;
	}
	/* A pipe or a terminal has no disk behind it. */
	if (fsync(descriptor) != 0 && errno != EINVAL && errno != EROFS)
		return status_set(STATUS_IO, "%s: %s", path, strerror(errno));
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

	fputs(schema, file);
	for (int i = 0; i < N_COLUMNS; i++) {
		fputc(',', file);
		csv_write_field(file, field_text(record, &columns[i], number));
	}
	fputc('\n', file);
}

/*
 * Appends rows (NULL: the header) in one write: a reader never sees half of one, and a writer
 * that is killed cuts at most one line.
 */
static enum status append_lines(const struct record_file *file, const struct record *records, int n)
{
	char *line = NULL;
	size_t length;
	FILE *text = open_memstream(&line, &length);

	if (!text)
		return status_set(STATUS_OOM, "no memory for rows");
	if (!records)
		record_print_header(text);
	for (int i = 0; records && i < n; i++)
		record_print(text, &records[i]);
	if (fclose(text) != 0)
		return status_set(STATUS_OOM, "no memory for rows");
	enum status status = record_write_all(file->descriptor, file->path, line, length);

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

/* What a file holds. Of all but CONTENT_FOREIGN there is a use: see record_open(). */
enum content {
	CONTENT_EMPTY,
	CONTENT_CUT_HEADER, /* the beginning of our header and nothing else */
	CONTENT_CURRENT,    /* our columns; perhaps a row that was cut at the end */
	CONTENT_OLD,        /* the columns of an earlier program */
	CONTENT_FOREIGN,
};

/* All bytes of the file, by its descriptor: its name may mean another file by now. */
static enum status read_content(const struct record_file *file, off_t size, char **bytes,
                                size_t *length)
{
	const int copy = size <= INT32_MAX ? dup(file->descriptor) : -1;
	FILE *stream = copy >= 0 ? fdopen(copy, "rb") : NULL;

	if (!stream) {
		if (copy >= 0)
			close(copy);
		return status_set(STATUS_INVALID, "--out: %s is too large for a results file",
		                  file->path);
	}
	rewind(stream);
	*bytes = csv_read_bytes(stream, length);
	const int error = errno;
	fclose(stream);
	return *bytes ? STATUS_OK
	              : status_set(STATUS_IO, "--out: %s: %s", file->path, strerror(error));
}

/* Whether the bytes begin our header and hold nothing else. */
static bool is_cut_header(const char *bytes, size_t length)
{
	char *header = NULL;
	size_t header_length = 0;
	FILE *text = open_memstream(&header, &header_length);
	bool is = false;

	if (!text)
		return false;
	record_print_header(text);
	if (fclose(text) == 0)
		is = length >= strlen("schema,") && length < header_length &&
		     memcmp(bytes, header, length) == 0;
	free(header);
	return is;
}

/* Whether what follows the last whole line is the beginning of a row of ours. */
static bool is_cut_row(const char *bytes, size_t length)
{
	const size_t n = strlen(schema);

	return length == 0 || ((length < n || memcmp(bytes, schema, n) == 0) &&
	                       (length <= n || bytes[n] == ',') && !memchr(bytes, '\n', length));
}

static enum content classify(const struct csv *csv, const char *bytes, size_t length)
{
	if (length == 0)
		return CONTENT_EMPTY;
	if (csv->n_columns == 0)
		return is_cut_header(bytes, length) ? CONTENT_CUT_HEADER : CONTENT_FOREIGN;
	if (!is_ours(csv))
		return CONTENT_FOREIGN;
	if (!columns_match(csv))
		return CONTENT_OLD;
	return is_cut_row(bytes + csv->whole_bytes, length - csv->whole_bytes) ? CONTENT_CURRENT
	                                                                       : CONTENT_FOREIGN;
}

static enum status cut_file(const struct record_file *file, size_t length)
{
	if (ftruncate(file->descriptor, (off_t)length) != 0)
		return status_set(STATUS_IO, "--out: %s: %s", file->path, strerror(errno));
	return STATUS_OK;
}

static enum status refuse_foreign(const struct record_file *file)
{
	return status_set(STATUS_INVALID,
	                  "--out: %s is no results file of this program and is left as it is; "
	                  "name another file",
	                  file->path);
}

static bool below_runs(const char *path)
{
	path += strncmp(path, "./", 2) == 0 ? 2 : 0;
	return strncmp(path, "runs/", 5) == 0;
}

/* Goes on with a file whose content is known, as `mode` wants; nothing has changed until here. */
static enum status use_content(struct record_file *file, enum content content,
                               enum record_mode mode, const struct csv *csv,
                               const struct record_terms *terms)
{
	if (content == CONTENT_FOREIGN)
		return refuse_foreign(file);
	if (content == CONTENT_OLD && mode != RECORD_TRUNCATE)
		return status_set(STATUS_INVALID,
		                  "--out: %s has other columns than this program writes "
		                  "(schema %s); move it away, name another file with --out, "
		                  "or replace it with --truncate",
		                  file->path, schema);
	if (content != CONTENT_CURRENT || mode == RECORD_TRUNCATE) {
		TRY(cut_file(file, 0));
		return append_lines(file, NULL, 0);
	}
	if (csv->cut)
		TRY(cut_file(file, csv->whole_bytes));
	return mode == RECORD_RESUME ? read_done(file, csv, terms) : STATUS_OK;
}

/* Moves a file with old columns aside, and the samples beside it: the next open finds none. */
static enum status move_aside(const struct record_file *file)
{
	static const char *const kinds[] = {".csv", ".samples.csv"};
	const char *dot = strrchr(file->path, '.');
	const int stem = (int)(dot && strcmp(dot, kinds[0]) == 0 ? dot - file->path
	                                                         : (long)strlen(file->path));
	char from[sizeof file->path + 16], to[sizeof from + 16];
	int n = 0;

	do
		snprintf(to, sizeof to, "%.*s.old-%d.csv", stem, file->path, ++n);
	while (access(to, F_OK) == 0);
	if (rename(file->path, to) != 0)
		return status_set(STATUS_IO, "--out: %s: %s", file->path, strerror(errno));
	fprintf(stderr, "%s has the columns of an earlier program: moved to %s\n", file->path, to);
	snprintf(from, sizeof from, "%.*s%s", stem, file->path, kinds[1]);
	snprintf(to, sizeof to, "%.*s.old-%d%s", stem, file->path, n, kinds[1]);
	if (rename(from, to) != 0 && errno != ENOENT)
		return status_set(STATUS_IO, "--out: %s: %s", from, strerror(errno));
	return STATUS_OK;
}

/* Checks what the file holds, repairs its end, and writes the header of an empty one. *moved: it
 * was of an earlier program, and there is none now. */
static enum status adopt_content(struct record_file *file, enum record_mode mode,
                                 const struct record_terms *terms, off_t size, bool *moved)
{
	struct csv csv;
	char *bytes;
	size_t length;

	TRY(read_content(file, size, &bytes, &length));
	/* What is no CSV at all is nobody's results. */
	enum content content = CONTENT_FOREIGN;
	if (csv_parse(file->path, bytes, length, &csv) == STATUS_OK)
		content = classify(&csv, bytes, length);
	free(bytes);
	*moved = content == CONTENT_OLD && mode != RECORD_TRUNCATE && below_runs(file->path);
	enum status status =
	        *moved ? move_aside(file) : use_content(file, content, mode, &csv, terms);

	csv_release(&csv);
	return status;
}

/* One writer at a time: the lock goes with the descriptor, so that of a killed one vanishes. */
static enum status lock_file(const struct record_file *file, const struct stat *info)
{
	struct stat named;

	if (flock(file->descriptor, LOCK_EX | LOCK_NB) != 0) {
		if (errno == EWOULDBLOCK)
			return status_set(STATUS_IO, "--out: another program is writing %s",
			                  file->path);
		return STATUS_OK; /* a file system without locks */
	}
	if (stat(file->path, &named) != 0 || named.st_ino != info->st_ino ||
	    named.st_dev != info->st_dev)
		return status_set(STATUS_IO, "--out: another program has just moved %s",
		                  file->path);
	return STATUS_OK;
}

/* Rows and what is printed would overwrite each other. "-" prints nothing else. */
static enum status check_streams(const struct record_file *file, const struct stat *info)
{
	static const char *const names[] = {"standard input", "standard output", "standard error"};
	struct stat stream;

	for (int i = STDOUT_FILENO; i <= STDERR_FILENO; i++) {
		if (i == STDOUT_FILENO && strcmp(file->path, "/dev/stdout") == 0)
			continue;
		if (fstat(i, &stream) == 0 && stream.st_ino == info->st_ino &&
		    stream.st_dev == info->st_dev)
			return status_set(STATUS_INVALID, "--out: %s is %s as well", file->path,
			                  names[i]);
	}
	return STATUS_OK;
}

static enum status open_descriptor(struct record_file *file, struct stat *info)
{
	const char *path = file->path;
	const bool exists = stat(path, info) == 0;

	if (!exists)
		TRY(make_folders(path));
	if (exists && S_ISBLK(info->st_mode))
		return status_set(STATUS_INVALID, "--out: %s is a disk", path);
	/* A pipe cannot be read, nor can it be made. */
	const int flags = exists && !S_ISREG(info->st_mode) ? O_WRONLY : O_RDWR | O_CREAT;

	file->descriptor = open(path, flags | O_APPEND | O_CLOEXEC, 0666);
	if (file->descriptor < 0 || fstat(file->descriptor, info) != 0)
		return status_set(STATUS_IO, "--out: %s cannot be written: %s", path,
		                  strerror(errno));
	return STATUS_OK;
}

static enum status open_file(struct record_file *file, enum record_mode mode,
                             const struct record_terms *terms, bool *moved)
{
	struct stat info;

	*moved = false;
	TRY(open_descriptor(file, &info));
	if (!S_ISREG(info.st_mode))
		return append_lines(file, NULL, 0);
	TRY(check_streams(file, &info));
	TRY(lock_file(file, &info));
	/* Its size before the lock may be another's. */
	if (fstat(file->descriptor, &info) != 0)
		return status_set(STATUS_IO, "--out: %s: %s", file->path, strerror(errno));
	return adopt_content(file, mode, terms, info.st_size, moved);
}

enum status record_open(struct record_file *file, const char *path, enum record_mode mode,
                        const struct record_terms *terms)
{
	const struct record_file none = {.descriptor = -1, .any_batch = terms->any_batch};
	enum status status;
	bool moved;

	do {
		*file = none;
		snprintf(file->path, sizeof file->path, "%s", path);
		status = open_file(file, mode, terms, &moved);
		if (status != STATUS_OK || moved)
			record_close(file);
	} while (status == STATUS_OK && moved);
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

enum status record_append(struct record_file *file, const struct record *records, int n)
{
	return append_lines(file, records, n);
}
