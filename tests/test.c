#include "tests/test.h"

#include <errno.h>

enum { MAX_TESTS = 32, MAX_FIXTURES = 4 };

static struct CMUnitTest tests[MAX_TESTS];
static size_t n_tests;
static struct {
	CMFixtureFunction setup, teardown;
} fixtures[MAX_FIXTURES];
static int n_fixtures, n_set_up;
static CMFixtureFunction before_each;

void tests_add(const char *name, CMUnitTestFunction function)
{
	if (n_tests == MAX_TESTS)
		abort();
	tests[n_tests++] = (struct CMUnitTest){name, function, NULL, NULL, NULL};
}

void tests_fixture(CMFixtureFunction setup, CMFixtureFunction teardown, CMFixtureFunction each)
{
	if (n_fixtures == MAX_FIXTURES)
		abort();
	fixtures[n_fixtures].setup = setup;
	fixtures[n_fixtures++].teardown = teardown;
	before_each = each ? each : before_each;
}

static int tear_down(void **state)
{
	int failed = 0;

	while (n_set_up > 0)
		failed |= fixtures[--n_set_up].teardown(state);
	return failed;
}

static int set_up(void **state)
{
	for (; n_set_up < n_fixtures; n_set_up++)
		if (fixtures[n_set_up].setup(state) != 0)
			return -1;
	return 0;
}

int tests_run(void)
{
	for (size_t i = 0; i < n_tests; i++)
		tests[i].setup_func = before_each;
	return _cmocka_run_group_tests(program_invocation_short_name, tests, n_tests, set_up,
	                               tear_down);
}

void *new_memory(size_t bytes)
{
	enum { ALIGNMENT = 256 }; /* a device's memory has it, and kernels rely on that */
	void *memory = aligned_alloc(ALIGNMENT, bytes / ALIGNMENT * ALIGNMENT + ALIGNMENT);

	assert_non_null(memory);
	return memory;
}

void require_ok(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

void expect_message(const char *what, const char *word)
{
	if (!strstr(status_message(), word) || strchr(status_message(), '\n'))
		fail_msg("'%s' gives '%s', which does not say '%s'", what, status_message(), word);
}
