/* The cases of single operations: what is impossible has its row, and its reason names what was
 * typed. */
#include "tests/programs.h"

#include <unistd.h>

#include "bench/kernel_bench.h"

static char path[] = "/tmp/test_kernel_bench_XXXXXX";

static int kernels_main(int argc, char **argv)
{
	static const struct case_row none[] = {{0}};
	static const struct driver driver = {
	        .program = "kernel_latency",
	        .summary = "for the tests",
	        .file = "kernels.csv",
	        .passes = "kernel",
	        .axes = "pattern,seq-len,tokens,chunk,window,heads,d-model",
	};

	return kernel_bench_main(&driver, none, none, true, argc, argv);
}

/* Runs it on one fresh file; its exit code. */
static int run(const char *line)
{
	char copy[256], *argv[32] = {(char *)"test",      (char *)"--truncate",
	                             (char *)"--out",     path,
	                             (char *)"--preset",  (char *)"tiny",
	                             (char *)"--backend", (char *)"cpu"};

	snprintf(copy, sizeof copy, "--max-time 0 %s", line);
	return program_finish(program_start(kernels_main, split_words(copy, argv, 8, 32), argv));
}

static void expect_row(const struct csv *csv, int row, const char *status, const char *hint)
{
	assert_string_equal(csv_text(csv, row, "status"), status);
	if (!strstr(csv_text(csv, row, "message"), hint))
		fail_msg("'%s' does not say '%s'", csv_text(csv, row, "message"), hint);
}

TEST(goes_on_after_what_is_impossible)
{
	scoped_csv struct csv csv;

	assert_int_equal(run("--pattern rotate --seq-len 64 --heads 0,2,3,64"), 0);
	read_rows(&csv, path, 4);
	expect_row(&csv, 0, "unsupported", "--heads: 0");
	expect_row(&csv, 1, "ok", "");
	expect_row(&csv, 2, "unsupported", "--heads: 3");
	expect_row(&csv, 3, "unsupported", "--heads: 64");
}

TEST(ends_where_nothing_is_possible)
{
	assert_int_equal(run("--pattern rotate --heads 0"), 2);
	assert_int_equal(run("--pattern recurrence_step --batch 0"), 2);
	assert_int_equal(run("--pattern rotate --seq-len 1024 --tokens 512"), 2);
	/* Others take no notice of --batch. */
	assert_int_equal(run("--pattern gelu --batch 0"), 0);
}

TEST(says_which_option_is_wrong)
{
	scoped_csv struct csv csv;

	assert_int_equal(run("--pattern recurrence_step/rotate --batch 0 --seq-len 64,1024"), 0);
	read_rows(&csv, path, 3);
	for (int row = 0; row < 3; row++) {
		const bool step = strcmp(csv_text(&csv, row, "block"), "recurrence_step") == 0;
		const bool fits = csv_number(&csv, row, "seq_len") == 64;

		expect_row(&csv, row, !step && fits ? "ok" : "unsupported",
		           step   ? "--batch:"
		           : fits ? ""
		                  : "--seq-len: 1024 is more than --tokens 512");
	}
}

TEST(refuses_sizes_that_overflow)
{
	scoped_csv struct csv csv;

	assert_int_equal(run("--pattern rotate --seq-len 64,2147483648,1073741824 --d-model 8192 "
	                     "--tokens 68719476736 --case-seconds 0.001"),
	                 0);
	read_rows(&csv, path, 3);
	expect_row(&csv, 0, "oom", "any memory");
	expect_row(&csv, 1, "unsupported", "32 bits");
	expect_row(&csv, 2, "oom", "any memory");
}

static int set_up(void **state)
{
	int descriptor = mkstemp(path);

	return descriptor < 0 ? -1 : close(descriptor);
}

static int tear_down(void **state)
{
	return unlink(path);
}

FIXTURE(set_up, tear_down, NULL)
