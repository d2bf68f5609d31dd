/*
 * CSV files as RFC 4180 has them: a header line, fields quoted where they hold
 * a comma, a quote or a line break, quotes doubled inside quotes.
 */
#ifndef BENCH_HARNESS_CSV_H
#define BENCH_HARNESS_CSV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "kernels/status.h"

/* A whole file in memory. All strings belong to it. */
struct csv {
	int n_columns, n_rows; /* the header is not a row */
	char **header;         /* [n_columns] */
	char **fields;         /* [n_rows * n_columns], unquoted */
	/* The file does not end with a line break, because its writer was killed or still
	 * writes. The last line is then not among the rows: even when it has all its fields, the
	 * last of them may be cut. */
	bool cut;
	size_t whole_bytes; /* length of the file up to the end of the last whole line */
	char *text;         /* what the strings point into */
};

/*
 * Reads a file. STATUS_IO if it cannot be read, STATUS_INVALID (with the line's
 * number) if a row has another number of fields than the header, a quote is out of
 * place, or there is a NUL byte. An empty file is a csv without columns and rows; empty lines
 * are ignored. After an error nothing needs to be released.
 */
enum status csv_read(const char *path, struct csv *csv);

/* What is left of an open file, to be freed; NULL, with errno, if it cannot be read or there is no
 * memory. */
char *csv_read_bytes(FILE *file, size_t *length);

/* The same as csv_read from `length` bytes of memory; `name` stands for the file in messages. */
enum status csv_parse(const char *name, const char *bytes, size_t length, struct csv *csv);

void csv_release(struct csv *csv);

/* Index of the column called `name`, or -1. */
int csv_column(const struct csv *csv, const char *name);

/* A field by its column's name; "" where there is no such column. */
const char *csv_text(const struct csv *csv, int row, const char *name);

/* The same as a number; NAN where it is empty or no number. */
double csv_number(const struct csv *csv, int row, const char *name);

/* Writes one field, quoted if it must be. The caller writes commas and line breaks. */
void csv_write_field(FILE *file, const char *text);

#endif
