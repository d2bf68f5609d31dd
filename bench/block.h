/* A benchmark of one block, or of a stack of blocks: what the harness runs is a struct stack. */
#ifndef BENCH_BLOCK_H
#define BENCH_BLOCK_H

#include "bench/harness/driver.h"

/* The main() of a program that measures blocks: a driver's program, summary, layers and defaults.
 */
int block_main(const struct driver *driver, int argc, char **argv);

#endif
