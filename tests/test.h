/* The frame of every test program. Included first. */
#ifndef TESTS_TEST_H
#define TESTS_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/status.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* TEST(name) { ... } is a test of its program, in the order of the file. */
#define TEST(name)                                                                                 \
	static void name(void **state);                                                            \
	__attribute__((constructor)) static void add_##name(void)                                  \
	{                                                                                          \
		tests_add(#name, name);                                                            \
	}                                                                                          \
	static void name(void **state)

/* What is done before the first test of the program, and after the last; `each` before each. */
#define FIXTURE(setup, teardown, each)                                                             \
	__attribute__((constructor)) static void add_fixture(void)                                 \
	{                                                                                          \
		tests_fixture(setup, teardown, each);                                              \
	}

void tests_add(const char *name, CMUnitTestFunction function);
void tests_fixture(CMFixtureFunction setup, CMFixtureFunction teardown, CMFixtureFunction each);
/* Runs them all, as main() does where a program has none; how many failed. */
int tests_run(void);

/* A pointer that is freed at the end of its scope. */
#define scoped __attribute__((cleanup(free_scoped)))

static inline void free_scoped(void *pointer)
{
	free(*(void **)pointer);
}

/* New memory; a test without any fails. */
void *new_memory(size_t bytes);

/* Fails unless status is STATUS_OK, with its message. */
void require_ok(enum status status);
/* Fails unless the message of the last error is one line that says `word`; `what` gave it. */
void expect_message(const char *what, const char *word);

#endif
