/* Questions about a pattern of layers such as "rat:16,swa". */
#ifndef BENCH_PATTERN_H
#define BENCH_PATTERN_H

#include <stdbool.h>

/*
 * Whether an option ("chunk", "window", "groups", "position") matters to a
 * layer of the pattern. A number behind a name ("rat:16") has the last word on the
 * first option of that layer. Names that are no layers are passed over.
 */
bool pattern_tunes(const char *pattern, const char *option);

#endif
