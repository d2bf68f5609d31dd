/* Options: lists, ranges, presets, and one clear line for everything that is wrong. */
#include "tests/programs.h"

#include "bench/harness/case.h"
#include "bench/harness/options.h"

static const struct driver driver = {
        .program = "test",
        .summary = "a driver for the tests",
        .file = "test.csv",
        .passes = "prefill,train",
        .patterns = "rat/attention",
        .axes = "pattern,seq-len,tokens,chunk,window,groups,heads,kv-heads,d-model,position",
        .defaults = {{"pattern", "rat"}, {"chunk", "16,64"}},
};

enum { MAX_ARGUMENTS = 16 };

/* Parses a command line given as one string; arguments are separated by blanks. */
static enum status parse(struct options *options, const char *line)
{
	char copy[256], *argv[MAX_ARGUMENTS + 2] = {(char *)"test"};

	snprintf(copy, sizeof copy, "%s", line);
	return options_parse(options, &driver, split_words(copy, argv, 1, MAX_ARGUMENTS + 1), argv);
}

/* Parses a command line that is right, for a device of this preset. */
static struct options completed(const char *line, const char *preset)
{
	struct options options;

	require_ok(parse(&options, line));
	require_ok(options_complete(&options, &driver, preset));
	return options;
}

static void expect_values(const char *text, int count, const int64_t *expected)
{
	struct values values;

	require_ok(values_parse(&values, "seq-len", text, 1, 1 << 20));
	assert_int_equal(values.count, count);
	for (int i = 0; i < count; i++)
		assert_int_equal(values.value[i], expected[i]);
}

TEST(parses_lists_and_ranges)
{
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
		expect_message(mistakes[i].line, mistakes[i].option);
		expect_message(mistakes[i].line, mistakes[i].hint);
	}
}

TEST(names_the_option_that_is_wrong)
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
	        {"--data random", "--data", "normal,small,sinks,peaked,zeros"},
	        {"--preset huge", "--preset", "paper,small,tiny"},
	        {"--format xml", "--format", "table,csv,jsonl,none"},
	        {"--max-time -1", "--max-time", "from 0"},
	        {"--max-time nan", "--max-time", "from 0"},
	        {"--max-time 1s", "--max-time", "from 0"},
	        {"--kv-heads 2147483648", "--kv-heads", "between 0 and 2147483647"},
	        {"--heads 4294967296", "--heads", "between 0 and 2147483647"},
	        {"--layers 0", "--layers", "between 1 and"},
	        {"--ffn 1,2", "--ffn", "whole number"},
	        {"--plan-for h20", "--plan-for", "h200,h100,a100,rtx4090"},
	        {"--rows 0", "--rows", "between 1 and"},
	        {"--precision 1", "--precision", "1%"},
	        {"--precision 100%", "--precision", "1%"},
	        {"--precision -1%", "--precision", "1%"},
	        {"--precision nan", "--precision", "1%"},
	        {"--precision %", "--precision", "1%"},
	        {"--precision 1%%", "--precision", "1%"},
	        {"--duty idle", "--duty", "burst,sustained"},
	        {"--duty burst,sustained", "--duty", "burst,sustained"},
	        {"--duty=", "--duty", "burst,sustained"},
	        {"--baseline=", "--baseline", "characters"},
	};

	expect_mistakes(mistakes, COUNT_OF(mistakes));
}

TEST(prefers_user_to_driver_to_preset)
{
	struct options options = completed("--d-model 512 --pass train --warm", "paper");

	assert_int_equal(options.d_model.count, 1);
	assert_int_equal(options.d_model.value[0], 512);
	/* Layers have heads of their own. */
	assert_int_equal(options.heads.count, 0);
	assert_int_equal(options.tokens, 262144);
	assert_int_equal(options.seq_len.count, 7);
	assert_int_equal(options.chunk.count, 2);
	assert_int_equal(options.groups.count, 0);
	assert_int_equal(options.pass.count, 1);
	assert_string_equal(options.pass.word[0], "train");
	assert_int_equal(options.position.count, 0);
	assert_string_equal(options.preset, "paper");
	assert_true(options.warm);
	assert_false(options.resume);
}

TEST(takes_fractions_and_choices)
{
	struct options options = completed("", "paper");

	assert_float_equal(options.precision, 0.02, 1e-12);
	assert_string_equal(options.duty, "sustained");
	assert_string_equal(options.baseline, "");
	assert_false(options.apart);
	options = completed("", "tiny");
	assert_true(options.precision == 0);
	options = completed("--precision 0.5% --duty burst --baseline swa(window=64) --apart",
	                    "paper");
	assert_float_equal(options.precision, 0.005, 1e-12);
	assert_string_equal(options.duty, "burst");
	assert_string_equal(options.baseline, "swa(window=64)");
	assert_true(options.apart);
	options = completed("--precision 0.25", "paper");
	assert_float_equal(options.precision, 0.25, 1e-12);
}

TEST(tells_what_was_given)
{
	struct options options = completed("--seq-len 8", "tiny");

	assert_true(options_given(&options, "seq-len"));
	assert_false(options_given(&options, "tokens"));
	assert_false(options_given(&options, "chunk"));
	assert_false(options_given(&options, "no-such-option"));
}

TEST(keeps_every_provider)
{
	struct options options =
	        completed("--provider portable --provider attention=cudnn,hopper", "tiny");

	assert_int_equal(options.provider.count, 2);
	assert_string_equal(options.provider.word[1], "attention=cudnn,hopper");
	options = completed("", "tiny");
	assert_int_equal(options.provider.count, 1);
	assert_string_equal(options.provider.word[0], "");
}

/* What a function prints; to be freed. */
static char *help_of(const char *preset)
{
	char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);

	options_print_help(file, &driver, preset);
	fclose(file);
	return text;
}

TEST(helps_with_every_option)
{
	scoped char *text = help_of("");

	assert_non_null(strstr(text, "--seq-len"));
	assert_non_null(strstr(text, "what to measure [prefill,train]"));
	assert_non_null(strstr(text, "preset paper"));
	assert_null(strstr(text, "--model"));
}

TEST(helps_with_defaults)
{
	scoped char *any = help_of("");
	scoped char *tiny = help_of("tiny");

	/* The driver's, which no preset changes; the presets'; the built-in one. */
	assert_non_null(strstr(any, "do not say it [16,64]\n"));
	assert_non_null(strstr(any, "model width D\n                               [paper: 2048, "
	                            "small: 128, tiny: 64]\n"));
	assert_non_null(strstr(
	        any,
	        "(0: none)\n                               [paper: 20, small: 60, tiny: 20]\n"));
	assert_non_null(strstr(any, "of the random data [1]\n"));
	assert_non_null(strstr(tiny, "model width D [64]\n"));
	assert_non_null(strstr(tiny, "do not say it [16,64]\n"));
}

TEST(spells_out_presets)
{
	scoped char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);

	options_print_presets(file, &driver);
	fclose(file);
	assert_non_null(strstr(text, "preset small"));
	assert_non_null(strstr(text, "--d-model 128 --tokens 8192"));
	assert_non_null(strstr(text, "--seq-len 4096..262144*2"));
	assert_non_null(strstr(text, "--case-seconds 60"));
	/* Options of other programs. */
	assert_null(strstr(text, "--generate"));
}

TEST(writes_out_lists_of_arguments)
{
	static const char *const expected[] = {
	        "rat(chunk=16,groups=1),swa:3",
	        "rat(chunk=16,groups=2),swa:3",
	        "rat(chunk=64,groups=1),swa:3",
	        "rat(chunk=64,groups=2),swa:3",
	        "gla",
	        "rat:1",
	        "rat:",
	};
	struct driver any = driver;
	struct options options;
	char *argv[] = {(char *)"test", (char *)"--pattern",
	                (char *)"rat(chunk=16|64,groups=1|2),swa:3/gla/rat:1|"};

	any.patterns = NULL;
	require_ok(options_parse(&options, &any, 3, argv));
	assert_int_equal(options.pattern.count, 7);
	for (int i = 0; i < options.pattern.count; i++)
		assert_string_equal(options.pattern.word[i], expected[i]);
	argv[2] = (char *)"rat(a=1|2|3|4,b=1|2|3|4,c=1|2|3|4,d=1|2)";
	assert_int_equal(options_parse(&options, &any, 3, argv), STATUS_INVALID);
	assert_non_null(strstr(status_message(), "--pattern"));
}

/* Chunks longer than T make no sense; attention has no chunk; T = 3 is a mistake. */
static enum status configure(void *self, const struct options *options, struct bench_case *c)
{
	++*(int *)self;
	c->batch = 1;
	snprintf(c->block, sizeof c->block, "%.100s", c->pattern);
	if (strcmp(c->pattern, "attention") == 0)
		c->chunk = NO_VALUE;
	if (c->seq_len == 3)
		return status_set(STATUS_INVALID, "--seq-len: not 3");
	if (c->chunk > c->seq_len)
		return status_set(STATUS_UNSUPPORTED, "too long");
	return STATUS_OK;
}

TEST(sweeps_every_combination_once)
{
	struct options options;
	struct sweep sweep;
	int calls = 0, unsupported = 0;

	options = completed("--pattern rat/attention --seq-len 32,64 --chunk 16,64", "tiny");
	require_ok(sweep_create(&sweep, &options, configure, &calls));
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
	options = completed("--pattern attention --seq-len 32 --chunk 1 --pass train --kv-heads "
	                    "1,2",
	                    "tiny");
	require_ok(sweep_create(&sweep, &options, configure, &calls));
	assert_int_equal(sweep.count, 2);
	assert_int_equal(sweep.cases[1].kv_heads, 2);
	assert_false(case_same_series(&sweep.cases[0], &sweep.cases[1]));
	sweep_release(&sweep);
}

TEST(refuses_a_sweep_that_is_impossible)
{
	struct options options;
	struct sweep sweep;
	int calls = 0;

	options = completed("--seq-len 17,3", "tiny");
	require_ok(sweep_create(&sweep, &options, configure, &calls));
	assert_int_equal(sweep.cases[1].status, STATUS_UNSUPPORTED);
	assert_string_equal(sweep.cases[1].message, "--seq-len: not 3");
	sweep_release(&sweep);
	options = completed("--seq-len 3", "tiny");
	assert_int_equal(sweep_create(&sweep, &options, configure, &calls), STATUS_INVALID);
	assert_null(sweep.cases);
	options = completed("--seq-len 1..64+1 --chunk 1..64+1 --heads 1..64+1", "tiny");
	assert_int_equal(sweep_create(&sweep, &options, configure, &calls), STATUS_INVALID);
}
