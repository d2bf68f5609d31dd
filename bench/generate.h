/* A benchmark of whole models: prefill of prompts, then generation with the caches. */
#ifndef BENCH_GENERATE_H
#define BENCH_GENERATE_H

#include <stdint.h>

#include "bench/harness/driver.h"

/* A model as docs/models.md has it. */
struct model {
	const char *name;
	int64_t n_layers, d_model, vocab;
};

/* The main() of a program that measures models[n_models], at most eight; --layers, --vocab and
 * --ffn take the place of their own sizes. */
int generate_main(const struct driver *driver, const struct model *models, int n_models, int argc,
                  char **argv);

#endif
