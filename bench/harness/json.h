/* A row as one line of JSON. */
#ifndef BENCH_HARNESS_JSON_H
#define BENCH_HARNESS_JSON_H

#include <stdio.h>

#include "bench/harness/record.h"

/*
 * An object with the columns of the CSV by name, in its order; numbers are numbers, empty fields
 * are left out. What is infinite, as rel_err may be, is null: JSON has no such number. Bytes that
 * are not UTF-8 become U+FFFD.
 */
void json_print_record(FILE *file, const struct record *record);

/* A string with its quotes. */
void json_print_text(FILE *file, const char *text);

#endif
