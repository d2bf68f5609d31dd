/* What a benchmark program prints for people: rows, plans, lists. */
#ifndef BENCH_HARNESS_PRINT_H
#define BENCH_HARNESS_PRINT_H

#include <stddef.h>
#include <stdio.h>

#include "bench/harness/environment.h"
#include "bench/harness/measure.h"
#include "bench/harness/options.h"
#include "bench/harness/record.h"

/* "rat prefill T=4096 B=64 L=16": the sizes that matter to a case. */
void describe_case(const struct bench_case *c, char *text, size_t size);

/* The providers that ran: of the operations that mix tokens ("cudnn", "portable+hopper"), and of
 * every operation ("attention=cudnn norm_linear=cublas"). */
void describe_providers(const struct context *ctx, char *mixing, size_t mixing_size, char *all,
                        size_t all_size);

/* Rows of results; format is one of those of --format. */
void print_header(FILE *file, const char *format);
void print_row(FILE *file, const struct record *record, const char *format);

/* One line of --dry-run: memory, work, and where the device's rates are known the least time, that
 * to expect, and what it makes a second. memory_free is what the device has, in bytes. */
void print_plan(FILE *file, const char *label, const struct bench_case *c,
                const struct planned *plan, size_t memory_free);

/* --list: backends, presets, passes, the device's providers of each operation, and where rows go.
 */
void print_list(FILE *file, const struct driver *driver, const struct options *options,
                const struct environment *environment, const struct device *device);

#endif
