/*
 * Every operation of every provider on a backend against the fp64 reference,
 * over random shapes, strides, options and numbers of threads; and a few
 * times with a NaN among the inputs, which must not be lost. A baseline that
 * has to be built and is not is left out.
 *
 * test_operations [BACKEND [FACTOR [OPERATION [PROVIDER]]]]: the backend
 * (default: $BACKEND, or cpu); how many times as many cases to run, below 1 for a
 * tool that makes each slow, and then a provider may be left without a case that
 * it supports; only the operations of that name, which may have a * in it; and
 * only that provider.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/operations.h"

/* One test of the program: an operation on a backend. */
struct subject {
	const struct operation_test *test;
	struct trial *trial;
	double factor;
	const char *provider; /* or NULL: all */
};

static void test_provider(struct subject *s, const char *provider)
{
	enum operation operation = s->test->operation;
	struct provider_choice *choice = &s->trial->ctx.choice;
	int n_run = 0, n_cases = (int)(s->test->n_cases * s->factor);
	int n_nan_cases = (int)(20 * s->factor);

	choice->count = 1;
	choice->choice[0].operation = operation;
	snprintf(choice->choice[0].provider, sizeof choice->choice[0].provider, "%s", provider);
	s->trial->worst = 0;
	for (int i = 0; i < n_cases + n_nan_cases; i++) {
		bool with_nan = i >= n_cases;

		trial_begin(s->trial, (uint64_t)operation << 32 | (uint64_t)i, with_nan);
		n_run += s->test->run(s->trial);
		trial_clear(s->trial);
	}
	print_message("%-26s %-9s %3d of %3d cases supported, worst error %3.0f%% of the allowed\n",
	              operation_name(operation), provider, n_run, n_cases + n_nan_cases,
	              100 * s->trial->worst);
	if (n_run == 0 && strstr(status_message(), "not built"))
		print_message("%s\n", status_message());
	else if (n_run == 0 && s->factor >= 1)
		fail_msg("%s from %s supports none of the cases", operation_name(operation),
		         provider);
}

static void test_operation(void **state)
{
	struct subject *s = *state;
	const struct kernel *kernels = s->trial->backend->kernels;

	s->trial->title = operation_name(s->test->operation);
	for (const struct kernel *k = kernels; k->run; k++)
		if (k->operation == s->test->operation && kernel_is_first(kernels, k) &&
		    (!s->provider || strcmp(s->provider, k->provider) == 0))
			test_provider(s, k->provider);
}

enum { MAX_TESTS = OP_COUNT + 8 };

/* Appends the operations of a list that the backend has; returns the new count. */
static size_t add_tests(struct CMUnitTest *tests, struct subject *subjects, size_t count,
                        const struct operation_test *list, const struct subject *common)
{
	for (; list->run; list++) {
		bool exists = false;

		for (const struct kernel *k = common->trial->backend->kernels; k->run; k++)
			exists |= k->operation == list->operation;
		if (!exists || count == MAX_TESTS)
			continue;
		subjects[count] = *common;
		subjects[count].test = list;
		tests[count] = (struct CMUnitTest){operation_name(list->operation), test_operation,
		                                   NULL, NULL, &subjects[count]};
		count++;
	}
	return count;
}

int main(int argc, char **argv)
{
	const struct operation_test *const lists[] = {
	        dense_tests, attention_tests, recurrent_tests, matrix_tests, family_tests, NULL};
	const char *backend = getenv("BACKEND");
	struct CMUnitTest tests[MAX_TESTS];
	struct subject subjects[MAX_TESTS];
	struct trial trial;
	const struct subject common = {.trial = &trial,
	                               .factor = argc > 2 ? atof(argv[2]) : 1,
	                               .provider = argc > 4 ? argv[4] : NULL};
	size_t count = 0;
	int failed;

	if (argc > 1)
		backend = argv[1];
	if (argc > 3)
		cmocka_set_test_filter(argv[3]);
	if (trial_open(&trial, backend ? backend : "cpu") != STATUS_OK) {
		fprintf(stderr, "%s\n", status_message());
		return 1;
	}
	for (const struct operation_test *const *list = lists; *list; list++)
		count = add_tests(tests, subjects, count, *list, &common);
	failed = _cmocka_run_group_tests("operations", tests, count, NULL, NULL);
	trial_close(&trial);
	return failed;
}
