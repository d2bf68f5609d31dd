/* Single operations of golden files, bound by their descriptions. */
#ifndef BENCH_GOLDEN_OPERATION_H
#define BENCH_GOLDEN_OPERATION_H

#include "bench/golden_file.h"

/* The forward pass and, if the file has the gradient of its output, the backward. */
enum status golden_operation(struct golden_file *check);

#endif
