/* Memory plans of whole programs: cases that do not fit, and the largest batch that does. */
#include "tests/programs.h"

#include <inttypes.h>
#include <sys/resource.h>
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
	        .axes = "pattern,model,layers,vocab,ffn,prompt,generate,memory," ARGUMENT_AXES,
	        .defaults = {{"batch", "0"}, {"samples", "1"}},
	        .finds_batch = true,
	};
	static const struct model models[] = {{"tiny", 2, 64, 256}, {"other", 1, 64, 256}};

	return generate_main(&driver, models, 2, argc, argv);
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
static void only_row(const char *status, double *bytes, int64_t *batch)
{
	scoped_csv struct csv csv;

	read_rows(&csv, path, 1);
	assert_string_equal(csv_text(&csv, 0, "status"), status);
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
		only_row("ok", &bytes, &batch);
		assert_true(bytes <= limit);
		/* A hundredth may be given up for prefilling several sequences at a time. */
		int64_t larger = batch + batch / 99 + 2;
		snprintf(line + strlen(line), sizeof line - strlen(line), " --batch %" PRId64,
		         larger);
		assert_int_equal(run(throughput_main, line), 0);
		/* More than --memory allows is not run, whoever chose the batch. */
		only_row("oom", &more, &found);
		assert_int_equal(found, larger);
		assert_true(more > limit);
	}
}

/* A line of whole models that is right. */
#define MODELS "--backend cpu --preset tiny --prompt 12 --generate 4 --memory 4 "

TEST(measures_every_provider_of_a_model)
{
	scoped_csv struct csv csv;

	/* Verification takes the stack away, and the next variant begins with none. */
	assert_int_equal(run(throughput_main, MODELS "--pattern attention --provider cpu "
	                                             "--provider attention=cpu --provider cpu"),
	                 0);
	read_rows(&csv, path, 3);
	for (int row = 0; row < 3; row++) {
		assert_string_equal(csv_text(&csv, row, "status"), "ok");
		assert_true(csv_number(&csv, row, "rel_err") < 1e-4);
	}
}

TEST(keeps_to_the_memory_allowed)
{
	double bytes;
	int64_t batch;

	assert_int_equal(run(throughput_main, "--backend cpu --preset tiny --memory 1 --layers 4 "
	                                      "--vocab 2000 --pattern attention"),
	                 0);
	only_row("oom", &bytes, &batch);
	assert_int_equal(batch, 1);
	assert_true(bytes > 1 << 20);
}

TEST(takes_chunks_as_long_as_the_text)
{
	scoped_csv struct csv csv;

	/* Prompt and answer are 16 tokens, and verification reads 15 of them again. */
	assert_int_equal(run(throughput_main, MODELS "--pattern rat --chunk 15,16,17"), 0);
	read_rows(&csv, path, 3);
	assert_string_equal(csv_text(&csv, 0, "status"), "ok");
	assert_string_equal(csv_text(&csv, 1, "status"), "ok");
	assert_string_equal(csv_text(&csv, 2, "status"), "unsupported");
	assert_non_null(strstr(csv_text(&csv, 2, "message"), "chunk of 17"));
}

TEST(changes_the_sizes_of_a_model)
{
	static const struct {
		const char *line, *model;
		double layers, parameters;
	} cases[] = {
	        {"", "tiny", 2, 2 * (4 * 64 * 64 + 64 + 8 * 64 * 64 + 64) + 2 * 256 * 64 + 64},
	        {"--layers 3", "tiny/layers=3", 3,
	         3 * (4 * 64 * 64 + 64 + 8 * 64 * 64 + 64) + 2 * 256 * 64 + 64},
	        {"--layers 1 --vocab 100 --ffn 32", "tiny/layers=1,vocab=100,ffn=32", 1,
	         4 * 64 * 64 + 64 + 2 * 64 * 32 + 64 + 2 * 100 * 64 + 64},
	        /* What a model has anyway does not change its name. */
	        {"--layers 2 --vocab 256 --ffn 256", "tiny", 2,
	         2 * (4 * 64 * 64 + 64 + 8 * 64 * 64 + 64) + 2 * 256 * 64 + 64},
	};

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		char line[256];
		scoped_csv struct csv csv;

		snprintf(line, sizeof line, MODELS "--pattern attention %s", cases[i].line);
		assert_int_equal(run(throughput_main, line), 0);
		read_rows(&csv, path, 1);
		assert_string_equal(csv_text(&csv, 0, "status"), "ok");
		assert_string_equal(csv_text(&csv, 0, "model"), cases[i].model);
		assert_true(csv_number(&csv, 0, "n_layers") == cases[i].layers);
		assert_true(csv_number(&csv, 0, "parameters") == cases[i].parameters);
	}
	assert_int_equal(run(throughput_main, MODELS "--pattern attention --layers 65"), 2);
}

TEST(refuses_sizes_that_overflow)
{
	static const struct {
		const char *line, *status, *hint;
	} cases[] = {
	        {"--pass generation --batch 262144 --seq-len 1099511627776,8 --d-model 8",
	         "unsupported", "32 bits"},
	        {"--pass generation --batch 4294967296 --seq-len 8", "unsupported", "32 bits"},
	        {"--pass generation --batch 1 --seq-len 2147483648,8", "unsupported", "32 bits"},
	        {"--pass generation --batch 2147483647 --seq-len 2147483647 --d-model 8", "oom",
	         "any memory"},
	        {"--pass prefill --tokens 1099511627776 --seq-len 1024 --d-model 16777216", "oom",
	         "any memory"},
	        {"--pass train --tokens 1099511627776 --seq-len 1073741824 --d-model 64", "oom",
	         "any memory"},
	        {"--pass prefill --d-model 16777216 --seq-len 64 --tokens 64", "oom", "any memory"},
	};

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		char line[256];
		scoped_csv struct csv csv;

		snprintf(line, sizeof line, "--backend cpu --preset tiny --max-time 0 %s",
		         cases[i].line);
		assert_int_equal(run(attention_main, line), 0);
		require_ok(csv_read(path, &csv));
		if (strcmp(csv_text(&csv, 0, "status"), cases[i].status) != 0 ||
		    !strstr(csv_text(&csv, 0, "message"), cases[i].hint))
			fail_msg("%s: %s: %s", cases[i].line, csv_text(&csv, 0, "status"),
			         csv_text(&csv, 0, "message"));
	}
	assert_int_equal(run(attention_main,
	                     "--backend cpu --preset tiny --d-model 2147483647 --seq-len 64"),
	                 2);
}

/* What a layer chooses by itself fits the sequence and the heads; what the user says stands. */
TEST(defaults_give_way)
{
	static const struct {
		const char *line, *status, *pattern;
	} cases[] = {
	        {"--pattern rat --seq-len 8", "ok", "rat(chunk=8,groups=2,heads=2,position=rope)"},
	        {"--pattern rat --seq-len 64 --heads 1", "ok",
	         "rat(chunk=16,groups=1,heads=1,position=rope)"},
	        {"--pattern rat --seq-len 64 --heads 1 --groups 2", NULL, NULL},
	        {"--pattern rat:16 --seq-len 8", "unsupported",
	         "rat(chunk=16,groups=2,heads=2,position=rope)"},
	        {"--pattern gla --seq-len 8", "ok", "gla(heads=4)"},
	        {"--pattern gla --seq-len 8 --pass generation", "ok", "gla(heads=4)"},
	        {"--pattern gla:16 --seq-len 8 --pass generation", "ok", "gla(chunk=16,heads=4)"},
	        {"--pattern gla:16 --seq-len 8", "unsupported", "gla(chunk=16,heads=4)"},
	        {"--pattern rat --seq-len 8 --pass generation", "ok",
	         "rat(chunk=8,groups=2,heads=2,position=rope)"},
	};

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		char line[256];
		scoped_csv struct csv csv = {0};

		snprintf(line, sizeof line,
		         "--backend cpu --preset tiny --max-time 0 --pass prefill %s",
		         cases[i].line);
		assert_int_equal(run(hybrid_main, line), cases[i].status ? 0 : 2);
		if (!cases[i].status)
			continue;
		read_rows(&csv, path, 1);
		if (strcmp(csv_text(&csv, 0, "status"), cases[i].status) != 0)
			fail_msg("%s: %s", cases[i].line, csv_text(&csv, 0, "message"));
		assert_string_equal(csv_text(&csv, 0, "pattern"), cases[i].pattern);
	}
}

#ifndef __SANITIZE_ADDRESS__ /* whose shadow needs terabytes of addresses */
/* Leaves room for plans, and for nothing that is measured. */
static int limited_main(int argc, char **argv)
{
	FILE *file = fopen("/proc/self/statm", "r");
	unsigned long pages = 0;

	if (!file || fscanf(file, "%lu", &pages) != 1 || fclose(file) != 0)
		return -1;
	const rlim_t bytes = pages * (rlim_t)sysconf(_SC_PAGESIZE) + (32 << 20);
	const struct rlimit limit = {bytes, bytes};

	return setrlimit(RLIMIT_AS, &limit) == 0 ? attention_main(argc, argv) : -1;
}

/* Under `ulimit -v` too there is a row for what does not fit, and an end. */
TEST(keeps_to_a_limit_of_addresses)
{
	double bytes;
	int64_t batch;

	assert_int_equal(
	        run(limited_main, "--backend cpu --preset tiny --pass prefill --seq-len 64"), 0);
	only_row("oom", &bytes, &batch);
	assert_true(bytes > 1 << 19);
}
#endif

static int layer_main(const char *layer, int argc, char **argv)
{
	const struct driver driver = {
	        .program = layer,
	        .summary = "for the tests",
	        .layers = layer,
	        .defaults = {{"pattern", layer}},
	};

	return block_main(&driver, argc, argv);
}

static int gla_main(int argc, char **argv)
{
	return layer_main("gla", argc, argv);
}

static int retnet_main(int argc, char **argv)
{
	return layer_main("retnet", argc, argv);
}

/* A layer's own program measures the same as build/hybrid does under its name. */
TEST(a_layer_is_the_same_in_every_program)
{
	static const struct {
		int (*program)(int, char **);
		const char *name;
	} layers[] = {{gla_main, "gla"}, {retnet_main, "retnet"}};
	static const char line[] =
	        "--backend cpu --preset tiny --max-time 0 --seq-len 64 --pass prefill,generation";
	static const char *const same[] = {"block",   "pattern",      "batch",     "chunk",
	                                   "n_heads", "d_k",          "d_v",       "flops",
	                                   "bytes",   "memory_bytes", "parameters"};

	for (size_t i = 0; i < COUNT_OF(layers); i++) {
		char full[256];
		scoped_csv struct csv own;
		scoped_csv struct csv hybrid;

		assert_int_equal(run(layers[i].program, line), 0);
		read_rows(&own, path, 2);
		snprintf(full, sizeof full, "%s --pattern %s", line, layers[i].name);
		assert_int_equal(run(hybrid_main, full), 0);
		read_rows(&hybrid, path, 2);
		for (int row = 0; row < 2; row++)
			for (size_t s = 0; s < COUNT_OF(same); s++)
				assert_string_equal(csv_text(&own, row, same[s]),
				                    csv_text(&hybrid, row, same[s]));
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
