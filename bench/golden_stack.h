/* Layers and models of golden files: in training, in prefill, and token by token. */
#ifndef BENCH_GOLDEN_STACK_H
#define BENCH_GOLDEN_STACK_H

#include "bench/golden_file.h"

enum status golden_stack(struct golden_file *check, bool is_model);

#endif
