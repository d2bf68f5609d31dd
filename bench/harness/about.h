/* What a program says about itself under --version. */
#ifndef BENCH_HARNESS_ABOUT_H
#define BENCH_HARNESS_ABOUT_H

#include <stdbool.h>
#include <stdio.h>

/* The version, the commit, the compiler, and whether there is CUDA in it. */
void about_print(FILE *file, const char *program);

/* For programs without an options table: prints that if --version is the only argument, and says
 * whether it was. */
bool about_asked(int argc, char **argv, const char *program);

#endif
