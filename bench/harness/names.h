/* Cases in a few words, as tables name them. */
#ifndef BENCH_HARNESS_NAMES_H
#define BENCH_HARNESS_NAMES_H

#include <stddef.h>

#include "bench/harness/results.h"

enum { NAME_SIZE = 224 };

/*
 * Names cases by a row of each: "rat L=16 prefill D=2048 T=4096 B=64". Cases that would be called
 * the same are told apart by what they differ in: heads, widths of heads, data and so on. name[]
 * is empty on entry.
 */
void name_cases(const struct result *const *example, int count, char (*name)[NAME_SIZE]);

/* Appends to text[size], after a blank unless it is empty. */
void append_word(char *text, size_t size, const char *format, ...)
        __attribute__((format(printf, 3, 4)));

#endif
