/* Standard input, output and error of a program, whatever its caller made of them. */
#ifndef BENCH_HARNESS_STREAMS_H
#define BENCH_HARNESS_STREAMS_H

#include <stdbool.h>

#include "kernels/status.h"

/*
 * Opens those that the caller closed on /dev/null: otherwise the first file that the program
 * opens becomes its standard output, and what is printed ends up in it. The first call of main().
 */
void streams_open(void);

/* Whether standard output was closed when streams_open() was called. */
bool stdout_was_closed(void);

/* The last call of a program whose product is what it prints. STATUS_IO if standard output did
 * not take all of it. */
enum status stdout_finish(void);

#endif
