/* Options: lists, ranges, presets, and one clear line for everything that is wrong. */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bench/harness/case.h"
#include "bench/harness/options.h"

static const struct driver driver = {
        .program = "test",
        .summary = "a driver for the tests",
        .file = "test.csv",
        .passes = "prefill,train",
        .patterns = "rat/attention",
        .axes = "pattern,seq-len,tokens,chunk,window,groups,heads,d-model,position",
        .defaults = {{"pattern", "rat"}, {"chunk", "16,64"}},
};

enum { MAX_ARGUMENTS = 16 };

/* Parses a command line given as one string; arguments are separated by blanks. */
static enum status parse(struct options *options, const char *line)
{
	char copy[256], *argv[MAX_ARGUMENTS + 2] = {(char *)"test"};
	int argc = 1;

	snprintf(copy, sizeof copy, "%s", line);
	for (char *word = strtok(copy, " "); word && argc <= MAX_ARGUMENTS;
	     word = strtok(NULL, " "))
		argv[argc++] = word;
	return options_parse(options, &driver, argc, argv);
}

static void expect_values(const char *text, int count, const int64_t *expected)
{
	struct values values;

	assert_int_equal(values_parse(&values, "seq-len", text, 1, 1 << 20), STATUS_OK);
	assert_int_equal(values.count, count);
	for (int i = 0; i < count; i++)
		assert_int_equal(values.value[i], expected[i]);
}

static void parses_lists_and_ranges(void **state)
{
	(void)state;
	expect_values("1,2,3", 3, (int64_t[]){1, 2, 3});
	expect_values("4096..131072*2", 6, (int64_t[]){4096, 8192, 16384, 32768, 65536, 131072});
	expect_values("512..2048+512", 4, (int64_t[]){512, 1024, 1536, 2048});
	expect_values("7,512..1500*3,9", 3, (int64_t[]){7, 512, 9});
	expect_values("5..5*2", 1, (int64_t[]){5});
	expect_values("1000000..1048576*2", 1, (int64_t[]){1000000});
}

/* What is wrong, the option that the message must name, and a word that helps. */
struct mistake {
	const char *line, *option, *hint;
};

static void expect_mistakes(const struct mistake *mistakes, size_t count)
{
	struct options options;

	for (size_t i = 0; i < count; i++) {
		enum status status = parse(&options, mistakes[i].line);

		if (status == STATUS_OK)
			status = options_complete(&options, &driver, "small");
		if (status != STATUS_INVALID)
			fail_msg("accepted: %s", mistakes[i].line);
		if (!strstr(status_message(), mistakes[i].option) ||
		    !strstr(status_message(), mistakes[i].hint) || strchr(status_message(), '\n'))
			fail_msg("'%s' gives '%s'", mistakes[i].line, status_message());
	}
}

static void names_the_option_that_is_wrong(void **state)
{
	static const struct mistake mistakes[] = {
	        {"--nonsense 3", "--nonsense", "--help"},
	        {"-x", "-x", "--help"},
	        {"--seq-len", "--seq-len", "value"},
	        {"--warm=yes", "--warm", "--help"},
	        {"file", "file", "--"},
	        {"--seq-len 0", "--seq-len", "between 1 and"},
	        {"--seq-len -4", "--seq-len", "between 1 and"},
	        {"--seq-len 12x", "--seq-len", "comma"},
	        {"--seq-len ,", "--seq-len", "number"},
	        {"--seq-len 1,", "--seq-len", "number"},
	        {"--seq-len 99999999999999999999", "--seq-len", "between"},
	        {"--seq-len 8..4*2", "--seq-len", "between 8 and"},
	        {"--seq-len 1..4", "--seq-len", "step"},
	        {"--seq-len 1..4*1", "--seq-len", "between 2 and"},
	        {"--seq-len 1..4+0", "--seq-len", "between 1 and"},
	        {"--seq-len 1..1000+1", "--seq-len", "64"},
	        {"--window 0..4*2", "--window", "stays 0"},
	        {"--chunk 0", "--chunk", "between 1 and"},
	        {"--tokens 1,2", "--tokens", "whole number"},
	        {"--tokens 1e3", "--tokens", "whole number"},
	        {"--pass forward", "--pass", "prefill,train"},
	        {"--pass prefill,", "--pass", "prefill,train"},
	        {"--pass generation", "--pass", "prefill,train"},
	        {"--pattern rnn", "--pattern", "rat/attention"},
	        {"--position alibi", "--position", "rope,none"},
	        {"--preset huge", "--preset", "paper,small,tiny"},
	        {"--format xml", "--format", "table,csv,none"},
	        {"--max-time -1", "--max-time", "from 0"},
	        {"--max-time nan", "--max-time", "from 0"},
	        {"--max-time 1s", "--max-time", "from 0"},
	        {"--rows 0", "--rows", "between 1 and"},
	};

	(void)state;
	expect_mistakes(mistakes, sizeof mistakes / sizeof mistakes[0]);
}

static void prefers_user_to_driver_to_preset(void **state)
{
	struct options options;

	(void)state;
	assert_int_equal(parse(&options, "--d-model 512 --pass train --warm"), STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "paper"), STATUS_OK);
	assert_int_equal(options.d_model.count, 1);
	assert_int_equal(options.d_model.value[0], 512);
	assert_int_equal(options.heads.value[0], 16);
	assert_int_equal(options.tokens, 262144);
	assert_int_equal(options.seq_len.count, 7);
	assert_int_equal(options.chunk.count, 2);
	assert_int_equal(options.groups.value[0], 2);
	assert_int_equal(options.pass.count, 1);
	assert_string_equal(options.pass.word[0], "train");
	assert_string_equal(options.position.word[0], "rope");
	assert_string_equal(options.preset, "paper");
	assert_true(options.warm);
	assert_false(options.resume);
}

static void tells_what_was_given(void **state)
{
	struct options options;

	(void)state;
	assert_int_equal(parse(&options, "--seq-len 8"), STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "tiny"), STATUS_OK);
	assert_true(options_given(&options, "seq-len"));
	assert_false(options_given(&options, "tokens"));
	assert_false(options_given(&options, "chunk"));
	assert_false(options_given(&options, "no-such-option"));
}

static void keeps_every_provider(void **state)
{
	struct options options;

	(void)state;
	assert_int_equal(parse(&options, "--provider portable --provider attention=cudnn,hopper"),
	                 STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "tiny"), STATUS_OK);
	assert_int_equal(options.provider.count, 2);
	assert_string_equal(options.provider.word[1], "attention=cudnn,hopper");
	assert_int_equal(parse(&options, ""), STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "tiny"), STATUS_OK);
	assert_int_equal(options.provider.count, 1);
	assert_string_equal(options.provider.word[0], "");
}

static void helps_with_every_option(void **state)
{
	char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);

	(void)state;
	options_print_help(file, &driver);
	fclose(file);
	assert_non_null(strstr(text, "--seq-len"));
	assert_non_null(strstr(text, "what to measure: prefill,train"));
	assert_non_null(strstr(text, "preset paper"));
	assert_null(strstr(text, "--model"));
	free(text);
}

/* Chunks longer than T make no sense; attention has no chunk; T = 3 is a mistake. */
static enum status configure(void *self, const struct options *options, struct bench_case *c)
{
	(void)options;
	++*(int *)self;
	c->batch = 1;
	snprintf(c->block, sizeof c->block, "%s", c->pattern);
	if (strcmp(c->pattern, "attention") == 0)
		c->chunk = NO_VALUE;
	if (c->seq_len == 3)
		return status_set(STATUS_INVALID, "--seq-len: not 3");
	if (c->chunk > c->seq_len)
		return status_set(STATUS_UNSUPPORTED, "too long");
	return STATUS_OK;
}

static void sweeps_every_combination_once(void **state)
{
	struct options options;
	struct sweep sweep;
	int calls = 0, unsupported = 0;

	(void)state;
	assert_int_equal(parse(&options, "--pattern rat/attention --seq-len 32,64 --chunk 16,64"),
	                 STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "tiny"), STATUS_OK);
	assert_int_equal(sweep_create(&sweep, &options, configure, &calls), STATUS_OK);
	/* Two passes; rat: two chunks by two lengths; attention: two lengths. */
	assert_int_equal(calls, 16);
	assert_int_equal(sweep.count, 12);
	for (int i = 0; i < sweep.count; i++)
		unsupported += sweep.cases[i].status == STATUS_UNSUPPORTED;
	assert_int_equal(unsupported, 2);
	assert_int_equal(sweep.cases[0].seq_len, 32);
	assert_int_equal(sweep.cases[1].seq_len, 64);
	assert_true(case_same_series(&sweep.cases[0], &sweep.cases[1]));
	assert_false(case_same_series(&sweep.cases[1], &sweep.cases[2]));
	sweep_release(&sweep);
}

static void refuses_a_sweep_with_a_mistake(void **state)
{
	struct options options;
	struct sweep sweep;
	int calls = 0;

	(void)state;
	assert_int_equal(parse(&options, "--seq-len 4,3"), STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "tiny"), STATUS_OK);
	assert_int_equal(sweep_create(&sweep, &options, configure, &calls), STATUS_INVALID);
	assert_null(sweep.cases);
	assert_int_equal(parse(&options, "--seq-len 1..64+1 --chunk 1..64+1 --heads 1..64+1"),
	                 STATUS_OK);
	assert_int_equal(options_complete(&options, &driver, "tiny"), STATUS_OK);
	assert_int_equal(sweep_create(&sweep, &options, configure, &calls), STATUS_INVALID);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(parses_lists_and_ranges),
	        cmocka_unit_test(names_the_option_that_is_wrong),
	        cmocka_unit_test(prefers_user_to_driver_to_preset),
	        cmocka_unit_test(tells_what_was_given),
	        cmocka_unit_test(keeps_every_provider),
	        cmocka_unit_test(helps_with_every_option),
	        cmocka_unit_test(sweeps_every_combination_once),
	        cmocka_unit_test(refuses_a_sweep_with_a_mistake),
	};

	return cmocka_run_group_tests_name("options", tests, NULL, NULL);
}
