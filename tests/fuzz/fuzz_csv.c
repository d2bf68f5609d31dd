/* The CSV reader on arbitrary bytes: what it accepts, written again, reads the same. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/csv.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void write_line(FILE *stream, char **fields, int count)
{
	for (int i = 0; i < count; i++) {
		if (i > 0)
			putc(',', stream);
		csv_write_field(stream, fields[i]);
	}
	putc('\n', stream);
}

/* The file as csv_write_field() writes it; the caller frees it. */
static char *write_all(const struct csv *csv, size_t *length)
{
	char *text = NULL;
	FILE *stream = open_memstream(&text, length);

	if (!stream)
		abort();
	write_line(stream, csv->header, csv->n_columns);
	for (int row = 0; row < csv->n_rows; row++)
		write_line(stream, csv->fields + row * csv->n_columns, csv->n_columns);
	fclose(stream);
	return text;
}

static void compare(const struct csv *a, const struct csv *b)
{
	if (a->n_columns != b->n_columns || a->n_rows != b->n_rows || b->cut)
		abort();
	for (int i = 0; i < a->n_rows * a->n_columns; i++)
		if (strcmp(a->fields[i], b->fields[i]) != 0)
			abort();
}

/* A single column with an empty field is an empty line, which readers ignore. */
static int survives_writing(const struct csv *csv)
{
	return csv->n_columns > 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	struct csv csv, again;
	size_t length;

	if (csv_parse("fuzz", (const char *)bytes, size, &csv) != STATUS_OK)
		return 0;
	if (csv.whole_bytes > size)
		abort();
	for (int row = 0; row < csv.n_rows; row++) {
		csv_number(&csv, row, "latency_ms");
		csv_text(&csv, row, "block");
	}
	if (survives_writing(&csv)) {
		char *text = write_all(&csv, &length);

		if (csv_parse("again", text, length, &again) != STATUS_OK)
			abort();
		compare(&csv, &again);
		csv_release(&again);
		free(text);
	}
	csv_release(&csv);
	return 0;
}
