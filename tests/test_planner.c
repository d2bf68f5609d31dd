/* Memory plans of whole programs: cases that do not fit, and the largest batch that does. */
#include "tests/programs.h"

#include <inttypes.h>
#include <unistd.h>

#include "bench/block.h"
#include "bench/generate.h"
#include "bench/stack_case.h"

static char path[] = "/tmp/test_planner_XXXXXX";

static int attention_main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "attention",
	        .summary = "for the tests",
	        .layers = "attention,swa",
	        .defaults = {{"pattern", "attention"}},
	};

	return block_main(&driver, argc, argv);
}

static int hybrid_main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "hybrid",
	        .summary = "for the tests",
	        .defaults = {{"pattern", "rat,swa"}},
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
	        .axes = "pattern,model,prompt,generate,memory," ARGUMENT_AXES,
	        .defaults = {{"batch", "0"}, {"samples", "1"}},
	        .finds_batch = true,
	};
	static const struct model models[] = {{"tiny", 2, 64, 256}};

	return generate_main(&driver, models, 1, argc, argv);
}

/* Runs a program on one fresh file; its exit code. */
static int run(int (*program)(int, char **), const char *line)
{
	char copy[256], *argv[32] = {(char *)"test", (char *)"--truncate", (char *)"--out", path};

	snprintf(copy, sizeof copy, "%s", line);
	return program_finish(program_start(program, split_words(copy, argv, 4, 32), argv));
}

TEST(goes_on_after_what_does_not_fit)
{
	scoped_csv struct csv csv;

	assert_int_equal(run(attention_main, "--backend cpu --preset tiny --pass generation "
	                                     "--seq-len 64,200000000,32"),
	                 0);
	read_rows(&csv, path, 3);
	assert_string_equal(csv_text(&csv, 0, "status"), "ok");
	assert_string_equal(csv_text(&csv, 1, "status"), "oom");
	assert_string_equal(csv_text(&csv, 2, "status"), "ok");
	/* Two sequences, k and v, 64 floats a token: the cache alone. */
	assert_true(csv_number(&csv, 1, "memory_bytes") >= 2 * 2 * 2e8 * 64 * 4);
	assert_non_null(strstr(csv_text(&csv, 1, "message"), "bytes"));
	assert_true(isnan(csv_number(&csv, 1, "latency_ms")));
}

TEST(names_what_does_not_divide)
{
	static const char *const mistakes[] = {
	        "--d-model 96 --heads 5",
	        "--pass prefill,train --seq-len 1024 --tokens 1000",
	        "--pattern swa,swa",
	        "--pass generation --batch 0",
	};

	for (size_t i = 0; i < COUNT_OF(mistakes); i++) {
		char line[128];

		snprintf(line, sizeof line, "--backend cpu --preset tiny %s", mistakes[i]);
		assert_int_equal(run(attention_main, line), 2);
	}
}

static void expect_row(const char *line, const char *const (*expected)[2])
{
	char full[256];
	scoped_csv struct csv csv;

	snprintf(full, sizeof full,
	         "--backend cpu --preset tiny --seq-len 64 --pass prefill --max-time 0 %s", line);
	assert_int_equal(run(hybrid_main, full), 0);
	read_rows(&csv, path, 1);
	for (; (*expected)[0]; expected++)
		if (strcmp(csv_text(&csv, 0, (*expected)[0]), (*expected)[1]) != 0)
			fail_msg("%s: %s is '%s', not '%s'", line, (*expected)[0],
			         csv_text(&csv, 0, (*expected)[0]), (*expected)[1]);
}

TEST(rows_carry_what_ran)
{
	static const char *const attention[][2] = {{"block", "attention"},
	                                           {"pattern", "attention(heads=2,position=rope)"},
	                                           {"n_heads", "2"},
	                                           {"kv_heads", "2"},
	                                           {"d_k", "32"},
	                                           {"d_v", "32"},
	                                           {"chunk", ""},
	                                           {"parameters", "16448"},
	                                           {"state_bytes_per_sequence", "32768"},
	                                           {"state_bytes_per_token", "512"},
	                                           {NULL, NULL}};
	static const char *const grouped[][2] = {
	        {"pattern", "attention(heads=2,kv_heads=1,position=rope)"},
	        {"n_heads", "2"},
	        {"kv_heads", "1"},
	        {"parameters", "12352"},
	        {"state_bytes_per_sequence", "16384"},
	        {"state_bytes_per_token", "256"},
	        {NULL, NULL}};
	static const char *const gla[][2] = {{"pattern", "gla(heads=4)"},
	                                     {"n_heads", "4"},
	                                     {"d_k", "8"},
	                                     {"d_v", "16"},
	                                     {"chunk", ""},
	                                     {"state_bytes_per_sequence", "2048"},
	                                     {"state_bytes_per_token", "0"},
	                                     {NULL, NULL}};
	static const char *const gla8[][2] = {{"pattern", "gla(chunk=8,heads=2)"},
	                                      {"chunk", "8"},
	                                      {"n_heads", "2"},
	                                      {NULL, NULL}};
	static const char *const rat[][2] = {{"block", "hybrid"},
	                                     {"pattern",
	                                      "rat(chunk=8,groups=1,heads=2,position=none),"
	                                      "swa(window=3,heads=1,position=none),recurrence"},
	                                     {"n_heads", "2"},
	                                     {"chunk", "8"},
	                                     {"window", "3"},
	                                     {"groups", "1"},
	                                     {"position", "none"},
	                                     {NULL, NULL}};
	static const char *const mamba[][2] = {
	        {"n_heads", "2"}, {"kv_heads", "1"}, {"d_k", "128"}, {"d_v", "64"}, {NULL, NULL}};
	static const char *const recurrence[][2] = {
	        {"pattern", ""}, {"n_heads", ""}, {"d_head", ""}, {"d_k", ""}, {NULL, NULL}};

	expect_row("--pattern attention", attention);
	expect_row("--pattern attention(kv_heads=1)", grouped);
	expect_row("--pattern gla", gla);
	expect_row("--pattern gla --chunk 8 --heads 2", gla8);
	expect_row("--pattern rat:8,swa(heads=1),recurrence --heads 2 --groups 1 --window 3 "
	           "--position none",
	           rat);
	expect_row("--pattern mamba2", mamba);
	expect_row("--pattern recurrence", recurrence);
}

/* What no layer can be, and an option that two would understand differently. */
TEST(goes_on_after_what_is_impossible)
{
	static const char line[] = "--backend cpu --preset tiny --pass prefill --max-time 0";
	char full[256];
	struct csv csv;

	snprintf(full, sizeof full, "%s --seq-len 64 --pattern rat(groups=1|3)/attention:5", line);
	assert_int_equal(run(hybrid_main, full), 0);
	read_rows(&csv, path, 3);
	assert_string_equal(csv_text(&csv, 0, "status"), "ok");
	assert_string_equal(csv_text(&csv, 1, "status"), "unsupported");
	assert_string_equal(csv_text(&csv, 1, "message"),
	                    "rat: groups=3 (allowed: a divisor of 2 heads)");
	assert_string_equal(csv_text(&csv, 2, "message"),
	                    "attention: heads=5 (allowed: a divisor of D = 64)");
	csv_release(&csv);
	snprintf(full, sizeof full, "%s --pattern rat,retnet --chunk 8", line);
	assert_int_equal(run(hybrid_main, full), 2);
	snprintf(full, sizeof full, "%s --seq-len 64 --pattern rat,retnet:16 --chunk 8", line);
	assert_int_equal(run(hybrid_main, full), 0);
	snprintf(full, sizeof full, "%s --pattern rat,nonsense/rat", line);
	assert_int_equal(run(hybrid_main, full), 2);
}

/* Memory and batch of the only row. */
static void only_row(double *bytes, int64_t *batch)
{
	scoped_csv struct csv csv;

	read_rows(&csv, path, 1);
	assert_string_equal(csv_text(&csv, 0, "status"), "ok");
	assert_true(csv_number(&csv, 0, "rel_err") < 1e-4);
	*bytes = csv_number(&csv, 0, "memory_bytes");
	*batch = (int64_t)csv_number(&csv, 0, "batch");
}

TEST(finds_the_largest_batch)
{
	static const char *const patterns[] = {"rat:4", "attention", "rat:4,swa", "recurrence",
	                                       "gla"};
	const double limit = 4 << 20;

	for (size_t i = 0; i < COUNT_OF(patterns); i++) {
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

	return descriptor < 0 ? -1 : close(descriptor);
}

static int tear_down(void **state)
{
	return unlink(path);
}

FIXTURE(set_up, tear_down, NULL)
