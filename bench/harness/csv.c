#include "bench/harness/csv.h"

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Where the parser stands. It unquotes in place: `write` never overtakes `read`. */
struct parser {
	const char *name;
	char *read, *end, *write;
	int line;
	char **fields;
	size_t n_fields, capacity;
};

static enum status append_field(struct parser *p, char *field)
{
	if (p->n_fields == p->capacity) {
		size_t capacity = p->capacity ? 2 * p->capacity : 256;
		char **fields = realloc(p->fields, capacity * sizeof *fields);

		if (!fields)
			return status_set(STATUS_OOM, "%s: no memory for %zu fields", p->name,
			                  capacity);
		p->fields = fields;
		p->capacity = capacity;
	}
	p->fields[p->n_fields++] = field;
	return STATUS_OK;
}

/* The rest of a quoted field, after its opening quote. *closed false: the bytes ended first. */
static enum status parse_quoted(struct parser *p, bool *closed)
{
	*closed = false;
	while (p->read < p->end) {
		char c = *p->read++;

		if (c == '"' && p->read < p->end && *p->read == '"') {
			p->read++;
		} else if (c == '"') {
			*closed = true;
			if (p->read < p->end && !strchr(",\r\n", *p->read))
				return status_set(STATUS_INVALID,
				                  "%s: line %d: text after a closing quote",
				                  p->name, p->line);
			return STATUS_OK;
		}
		if (c == '\n')
			p->line++;
		*p->write++ = c;
	}
	return STATUS_OK;
}

static enum status parse_plain(struct parser *p)
{
	while (p->read < p->end && *p->read != ',' && *p->read != '\n') {
		char c = *p->read++;

		if (c == '"')
			return status_set(STATUS_INVALID, "%s: line %d: a quote inside a field",
			                  p->name, p->line);
		if (c == '\r' && p->read < p->end && *p->read == '\n')
			break;
		*p->write++ = c;
	}
	return STATUS_OK;
}

/* One line into p->fields. *whole false: it lacks its line break. */
static enum status parse_line(struct parser *p, bool *whole)
{
	*whole = false;
	while (true) {
		char *field = p->write;
		bool closed = true;

		if (p->read < p->end && *p->read == '"') {
			p->read++;
			TRY(parse_quoted(p, &closed));
		} else {
			TRY(parse_plain(p));
		}
		if (closed && p->end - p->read >= 2 && p->read[0] == '\r' && p->read[1] == '\n')
			p->read++;
		/* A carriage return may be the last byte of a file that was cut. */
		if (!closed || p->read == p->end || (*p->read == '\r' && p->read + 1 == p->end))
			return STATUS_OK;
		char separator = *p->read++;

		*p->write++ = '\0';
		TRY(append_field(p, field));
		if (separator == '\n') {
			p->line++;
			*whole = true;
			return STATUS_OK;
		}
		if (separator != ',')
			return status_set(STATUS_INVALID, "%s: line %d: a stray carriage return",
			                  p->name, p->line);
	}
}

static enum status parse_all(struct parser *p, struct csv *csv)
{
	char *start = p->read;

	while (p->read < p->end) {
		size_t before = p->n_fields;
		int line = p->line;
		bool whole;

		TRY(parse_line(p, &whole));
		if (!whole) {
			csv->cut = true;
			p->n_fields = before;
			return STATUS_OK;
		}
		csv->whole_bytes = (size_t)(p->read - start);
		if (p->n_fields - before == 1 && p->fields[before][0] == '\0') {
			p->n_fields = before; /* an empty line */
			continue;
		}
		if (csv->n_columns == 0)
			csv->n_columns = (int)(p->n_fields - before);
		else if (p->n_fields - before != (size_t)csv->n_columns)
			return status_set(STATUS_INVALID,
			                  "%s: line %d has %zu fields, the header %d", p->name,
			                  line, p->n_fields - before, csv->n_columns);
	}
	return STATUS_OK;
}

enum status csv_parse(const char *name, const char *bytes, size_t length, struct csv *csv)
{
	*csv = (struct csv){0};
	if (length > INT32_MAX)
		return status_set(STATUS_INVALID, "%s: %zu bytes are no results file", name,
		                  length);
	if (length && memchr(bytes, '\0', length))
		return status_set(STATUS_INVALID, "%s: contains a NUL byte", name);
	csv->text = malloc(length + 1);
	if (!csv->text)
		return status_set(STATUS_OOM, "%s: no memory for %zu bytes", name, length);
	if (length)
		memcpy(csv->text, bytes, length);
	struct parser p = {.name = name,
	                   .read = csv->text,
	                   .end = csv->text + length,
	                   .write = csv->text,
	                   .line = 1};
	enum status status = parse_all(&p, csv);

	if (status != STATUS_OK) {
		free(p.fields);
		free(csv->text);
		*csv = (struct csv){0};
		return status;
	}
	csv->header = p.fields;
	if (csv->n_columns) {
		csv->n_rows = (int)(p.n_fields / (size_t)csv->n_columns) - 1;
		csv->fields = p.fields + csv->n_columns;
	}
	return STATUS_OK;
}

char *csv_read_bytes(FILE *file, size_t *length)
{
	size_t capacity = 1 << 16;
	char *bytes = malloc(capacity);

	*length = 0;
	while (bytes) {
		*length += fread(bytes + *length, 1, capacity - *length, file);
		if (*length < capacity)
			break;
		char *larger = realloc(bytes, capacity *= 2);

		if (!larger)
			free(bytes);
		bytes = larger;
	}
	if (bytes && ferror(file)) {
		free(bytes);
		return NULL;
	}
	return bytes;
}

enum status csv_read(const char *path, struct csv *csv)
{
	FILE *file = fopen(path, "rb");
	size_t length;

	*csv = (struct csv){0};
	if (!file)
		return status_set(STATUS_IO, "%s: %s", path, strerror(errno));
	char *bytes = csv_read_bytes(file, &length);
	enum status status = bytes ? csv_parse(path, bytes, length, csv)
	                           : status_set(STATUS_IO, "%s: %s", path, strerror(errno));

	free(bytes);
	fclose(file);
	return status;
}

void csv_release(struct csv *csv)
{
	free(csv->header);
	free(csv->text);
	*csv = (struct csv){0};
}

int csv_column(const struct csv *csv, const char *name)
{
	for (int i = 0; i < csv->n_columns; i++)
		if (strcmp(csv->header[i], name) == 0)
			return i;
	return -1;
}

const char *csv_text(const struct csv *csv, int row, const char *name)
{
	int column = csv_column(csv, name);

	return column < 0 ? "" : csv->fields[(size_t)row * (size_t)csv->n_columns + (size_t)column];
}

double csv_number(const struct csv *csv, int row, const char *name)
{
	const char *text = csv_text(csv, row, name);
	char *end;
	double value = strtod(text, &end);

	return end == text || *end ? NAN : value;
}

void csv_write_field(FILE *file, const char *text)
{
	if (!text[strcspn(text, ",\"\r\n")]) {
		fputs(text, file);
		return;
	}
	fputc('"', file);
	for (; *text; text++) {
		if (*text == '"')
			fputc('"', file);
		fputc(*text, file);
	}
	fputc('"', file);
}
