/* Memory plans of whole programs: cases that do not fit, and the largest batch that does. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "bench/block.h"
#include "bench/generate.h"
#include "bench/harness/csv.h"

static char path[] = "/tmp/test_planner_XXXXXX";

static int attention_main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "attention",
	        .summary = "for the tests",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "attention/swa",
	        .axes = "pattern,seq-len,tokens,window,heads,d-model,position",
	        .defaults = {{"pattern", "attention"}},
	};

	return block_main(&driver, argc, argv);
}

static int throughput_main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "throughput",
	        .summary = "for the tests",
	        .file = "table2.csv",
	        .passes = "throughput",
	        .axes = "pattern,model,prompt,generate,memory,chunk,window,groups,position",
	        .defaults = {{"batch", "0"}, {"samples", "1"}, {"chunk", "4"}},
	        .finds_batch = true,
	};
	static const struct model models[] = {{"tiny", 2, 64, 2, 256}};

	return generate_main(&driver, models, 1, argc, argv);
}

/* Runs a program in a child on one fresh file, its output thrown away; its exit code. */
static int run(int (*program)(int, char **), const char *line)
{
	char copy[256], *argv[32] = {(char *)"test", (char *)"--truncate", (char *)"--out", path};
	int argc = 4, status;

	snprintf(copy, sizeof copy, "%s", line);
	for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
		argv[argc++] = word;
	pid_t child = fork();
	if (child == 0) {
		int nowhere = open("/dev/null", O_WRONLY);

		dup2(nowhere, STDOUT_FILENO);
		dup2(nowhere, STDERR_FILENO);
		_exit(program(argc, argv));
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status));
	return WEXITSTATUS(status);
}

static void goes_on_after_what_does_not_fit(void **state)
{
	struct csv csv;

	(void)state;
	assert_int_equal(run(attention_main, "--backend cpu --preset tiny --pass generation "
	                                     "--seq-len 64,200000000,32"),
	                 0);
	assert_int_equal(csv_read(path, &csv), STATUS_OK);
	assert_int_equal(csv.n_rows, 3);
	assert_string_equal(csv_text(&csv, 0, "status"), "ok");
	assert_string_equal(csv_text(&csv, 1, "status"), "oom");
	assert_string_equal(csv_text(&csv, 2, "status"), "ok");
	/* Two sequences, k and v, 64 floats a token: the cache alone. */
	assert_true(csv_number(&csv, 1, "memory_bytes") >= 2 * 2 * 2e8 * 64 * 4);
	assert_non_null(strstr(csv_text(&csv, 1, "message"), "bytes"));
	assert_true(isnan(csv_number(&csv, 1, "latency_ms")));
	csv_release(&csv);
}

static void names_what_does_not_divide(void **state)
{
	static const char *const mistakes[] = {
	        "--d-model 96 --heads 5",
	        "--seq-len 1024 --tokens 1000",
	        "--pattern swa,swa",
	        "--pass generation --batch 0",
	};

	(void)state;
	for (size_t i = 0; i < sizeof mistakes / sizeof mistakes[0]; i++) {
		char line[128];

		snprintf(line, sizeof line, "--backend cpu --preset tiny %s", mistakes[i]);
		assert_int_equal(run(attention_main, line), 2);
	}
}

/* Memory and batch of the only row. */
static void only_row(double *bytes, int64_t *batch)
{
	struct csv csv;

	assert_int_equal(csv_read(path, &csv), STATUS_OK);
	assert_int_equal(csv.n_rows, 1);
	assert_string_equal(csv_text(&csv, 0, "status"), "ok");
	assert_true(csv_number(&csv, 0, "rel_err") < 1e-4);
	*bytes = csv_number(&csv, 0, "memory_bytes");
	*batch = (int64_t)csv_number(&csv, 0, "batch");
	csv_release(&csv);
}

static void finds_the_largest_batch(void **state)
{
	static const char *const patterns[] = {"rat", "attention", "rat,swa", "recurrence", "gla"};
	const double limit = 4 << 20;

	(void)state;
	for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
		char line[160];
		double bytes, more;
		int64_t batch, found;

		snprintf(line, sizeof line,
		         "--backend cpu --preset tiny --prompt 21 --generate 6 --memory 4 "
		         "--pattern %s",
		         patterns[i]);
		assert_int_equal(run(throughput_main, line), 0);
		only_row(&bytes, &batch);
		assert_true(bytes <= limit);
		/* A hundredth may be given up for prefilling several sequences at a time. */
		int64_t larger = batch + batch / 99 + 2;
		snprintf(line + strlen(line), sizeof line - strlen(line), " --batch %" PRId64,
		         larger);
		assert_int_equal(run(throughput_main, line), 0);
		only_row(&more, &found);
		assert_int_equal(found, larger);
		assert_true(more > limit);
	}
}

static int set_up(void **state)
{
	int descriptor = mkstemp(path);

	(void)state;
	return descriptor < 0 ? -1 : close(descriptor);
}

static int tear_down(void **state)
{
	(void)state;
	return unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(goes_on_after_what_does_not_fit),
	        cmocka_unit_test(names_what_does_not_divide),
	        cmocka_unit_test(finds_the_largest_batch),
	};

	return cmocka_run_group_tests_name("planner", tests, set_up, tear_down);
}
