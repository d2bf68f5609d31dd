/* What the tests of whole programs share: runs in a child, and the rows that they write. */
#ifndef TESTS_PROGRAMS_H
#define TESTS_PROGRAMS_H

#include "tests/test.h"

#include <sys/types.h>

#include "bench/harness/csv.h"

/* Starts a program in a child, its output thrown away. */
pid_t program_start(int (*program)(int argc, char **argv), int argc, char **argv);
/* Its exit code, or 128 and the signal that ended it. */
int program_finish(pid_t child);

/* Where the programs of this build are: beside the folder of the running test. */
const char *programs_folder(void);

/* What a line of the shell prints, its errors too, until the next call; *code, if it is not NULL:
 * its exit code. */
const char *shell(int *code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Adds the words of a line to argv, which has room for `most`; how many it holds then. */
int split_words(char *line, char **argv, int argc, int most);

/* Reads a file that must have `rows` rows, for csv_release(). */
void read_rows(struct csv *csv, const char *path, int rows);

/* A table that is released at the end of its scope. */
#define scoped_csv __attribute__((cleanup(csv_release)))

#endif
