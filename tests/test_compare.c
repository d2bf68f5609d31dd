/* Verdicts: the statistics, build/compare on files of known content, and bench/compare.sh with
 * programs that only pretend to measure. */
#include "tests/programs.h"

#include <unistd.h>

#include "bench/harness/verdict.h"

/* --- statistics --- */

/* In hundredths, so that the interval reads off the table of the signed-rank test. */
static struct ratio ratio_of(int count, const double *hundredths)
{
	double pairs[64];

	for (int i = 0; i < count; i++)
		pairs[i] = hundredths[i] / 100;
	return ratio_of_pairs(pairs, count, true, &usual_rule);
}

static void expect_log(double ratio, double hundredths)
{
	assert_true(fabs(100 * log(ratio) - hundredths) < 1e-9);
}

TEST(test_interval_of_ten_pairs)
{
	const double pairs[] = {3, 1, 10, 5, 4, 2, 9, 6, 8, 7};
	const struct ratio ratio = ratio_of(10, pairs);

	/* Of the 55 means the 9th from either end: P(W <= 8) = 2.44% for ten ranks. */
	expect_log(ratio.value, 5.5);
	expect_log(ratio.low, 3);
	expect_log(ratio.high, 8);
	assert_false(ratio.assumed);
	assert_int_equal(ratio.pairs, 10);
}

TEST(test_interval_of_six_pairs_is_their_range)
{
	const double pairs[] = {4, -2, 0, 1, 3, 2};
	const struct ratio ratio = ratio_of(6, pairs);

	expect_log(ratio.low, -2);
	expect_log(ratio.high, 4);
}

/* A wild pair among twelve leaves the interval where it was. */
TEST(test_wild_pair)
{
	const double pairs[] = {0, 1, -1, 2, -2, 1.5, -1.5, .5, -.5, 1, -1, 300};
	const struct ratio ratio = ratio_of(12, pairs);

	assert_true(ratio.high < 1.03 && ratio.low > 0.97);
}

TEST(test_few_pairs_need_an_assumption)
{
	const double one[] = {20}, apart[] = {-80, 80};
	struct ratio ratio = ratio_of(1, one);

	assert_true(ratio.assumed);
	expect_log(ratio.high, 20 + 1.959964 * sqrt(2) * 12);
	assert_int_equal(verdict_of(&ratio, &usual_rule), VERDICT_UNCLEAR);
	/* What was seen widens it. */
	ratio = ratio_of(2, apart);
	expect_log(ratio.low, -80);
	expect_log(ratio.high, 80);

	double many[40];
	for (int i = 0; i < 40; i++)
		many[i] = 0.1;
	ratio = ratio_of_pairs(many, 40, false, &usual_rule);
	assert_true(ratio.assumed);
	expect_log(ratio.low, 10 - 1.959964 * sqrt(2) * 12);
	assert_false(ratio_is_narrow(&ratio, &usual_rule));
}

TEST(test_nothing_is_unclear)
{
	const struct ratio ratio = ratio_of(0, NULL);

	assert_true(isnan(ratio.value));
	assert_int_equal(verdict_of(&ratio, &usual_rule), VERDICT_UNCLEAR);
	assert_false(ratio_is_narrow(&ratio, &usual_rule));
}

TEST(test_verdicts)
{
	static const struct {
		double low, high;
		enum verdict verdict;
	} known[] = {
	        {1.011, 1.2, VERDICT_SLOWER},  {1.009, 1.2, VERDICT_UNCLEAR},
	        {0.8, 0.99, VERDICT_FASTER},   {0.8, 0.995, VERDICT_UNCLEAR},
	        {0.98, 1.02, VERDICT_SAME},    {0.96, 1.02, VERDICT_UNCLEAR},
	        {0.98, 1.04, VERDICT_UNCLEAR}, {1.012, 1.02, VERDICT_SLOWER},
	        {0.9709, 1.03, VERDICT_SAME},  {0.5, 2, VERDICT_UNCLEAR},
	};

	for (size_t i = 0; i < COUNT_OF(known); i++) {
		const struct ratio ratio = {10, 1, known[i].low, known[i].high, false};

		assert_int_equal(verdict_of(&ratio, &usual_rule), known[i].verdict);
	}
}

/* The width alone ends the sampling: where the interval lies must not. */
TEST(test_narrow_wherever_it_lies)
{
	for (int i = 0; i < 15; i++) {
		const double at = 0.5 + 0.1 * i;
		const struct ratio narrow = {10, at, at / 1.019, at * 1.019, false};
		const struct ratio wide = {10, at, at / 1.021, at * 1.021, false};

		assert_true(ratio_is_narrow(&narrow, &usual_rule));
		assert_false(ratio_is_narrow(&wide, &usual_rule));
	}
}

/* Uniform in 0 ... 1. */
static double chance(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (double)(*state >> 11) * 0x1p-53;
}

/* Noise of processes as it is met: normal, of 3%, and in one of ten cases ten times that. */
static double noise(uint64_t *state)
{
	double sum = -6;

	for (int i = 0; i < 12; i++)
		sum += chance(state);
	return sum * (chance(state) < 0.1 ? 0.3 : 0.03);
}

/* A comparison that measures on until the interval is narrow, of programs `truth` apart. */
static struct ratio compare_until_narrow(uint64_t *state, double truth, int most)
{
	double pairs[200], sorted[200];
	struct ratio ratio = {0};

	for (int n = 1; n <= most; n++) {
		pairs[n - 1] = log(truth) + noise(state) - noise(state);
		memcpy(sorted, pairs, sizeof sorted);
		if (n < MIN_PAIRS)
			continue;
		ratio = ratio_of_pairs(sorted, n, true, &usual_rule);
		if (ratio_is_narrow(&ratio, &usual_rule))
			break;
	}
	return ratio;
}

TEST(test_error_rates_of_the_rule)
{
	enum { TRIALS = 1000 };
	uint64_t seed = 1;
	int covered = 0, wrong = 0, found = 0, opposite = 0;

	for (int i = 0; i < TRIALS; i++) {
		struct ratio ratio = compare_until_narrow(&seed, 1, 100);
		enum verdict verdict = verdict_of(&ratio, &usual_rule);

		covered += ratio.low <= 1 && ratio.high >= 1;
		wrong += verdict == VERDICT_SLOWER || verdict == VERDICT_FASTER;
		ratio = compare_until_narrow(&seed, 1.05, 100);
		verdict = verdict_of(&ratio, &usual_rule);
		found += verdict == VERDICT_SLOWER;
		opposite += verdict == VERDICT_FASTER;
	}
	/* Stopping by the width costs some coverage; the margin makes up for it. */
	assert_true(covered > 0.92 * TRIALS);
	assert_true(wrong < 0.02 * TRIALS);
	assert_true(found > 0.9 * TRIALS);
	assert_int_equal(opposite, 0);
}

/* --- files --- */

static const char header[] =
        "schema,run_id,time_utc,git_sha,build,device,backend,compiler,threads,program,block,"
        "pattern,"
        "pass,dtype,batch,seq_len,d_model,n_heads,kv_heads,d_k,d_v,latency_ms,latency_min_ms,"
        "latency_p20_ms,latency_p80_ms,"
        "tokens_per_s,baseline,sm_clock_mhz,duty,data,status,message,provider,requested,model\n";

/* A row; what is left out is usual or empty. */
struct row {
	const char *run, *time, *block, *pass, *status, *device, *build, *compiler, *baseline,
	        *duty, *data, *provider, *requested, *model;
	double ms, min_ms, p20_ms, p80_ms, clock, tokens_per_s;
	int threads, kv_heads, d_k;
};

/* Rows that differ in the milliseconds alone. */
static const struct row ten = {.ms = 10}, eleven = {.ms = 11}, fifteen = {.ms = 15};

static const char *or_else(const char *text, const char *otherwise)
{
	return text ? text : otherwise;
}

static void print_positive(FILE *file, const char *format, double value)
{
	if (value > 0)
		fprintf(file, format, value);
	fputc(',', file);
}

static void write_row(FILE *file, const struct row *r)
{
	fprintf(file, "3,%s,%s,0123456789abcdef,%s,%s,cpu,%s,%d,hybrid,%s,,%s,fp32,4,128,64,2,",
	        or_else(r->run, ""), or_else(r->time, ""), or_else(r->build, ""),
	        or_else(r->device, "Test CPU"), or_else(r->compiler, "gcc 15"),
	        r->threads ? r->threads : 2, or_else(r->block, "attention"),
	        or_else(r->pass, "prefill"));
	print_positive(file, "%.0f", r->kv_heads);
	print_positive(file, "%.0f", r->d_k);
	print_positive(file, "%.0f", r->d_k);
	print_positive(file, "%.7g", r->ms);
	print_positive(file, "%.7g", r->min_ms);
	print_positive(file, "%.7g", r->p20_ms);
	print_positive(file, "%.7g", r->p80_ms);
	print_positive(file, "%.7g", r->tokens_per_s);
	fprintf(file, "%s,", or_else(r->baseline, ""));
	print_positive(file, "%.7g", r->clock);
	fprintf(file, "%s,%s,%s,,%s,%s,%s\n", or_else(r->duty, ""), or_else(r->data, ""),
	        or_else(r->status, "ok"), or_else(r->provider, ""), or_else(r->requested, ""),
	        or_else(r->model, ""));
}

/* A folder of this program, empty before each test, whose name has a blank. */
static char folder[64] = "/tmp/compare test XXXXXX";

static int make_folder(void **state)
{
	return mkdtemp(folder) ? 0 : -1;
}

static int empty_folder(void **state)
{
	char command[160];

	snprintf(command, sizeof command, "find '%s' -mindepth 1 -delete", folder);
	return system(command);
}

static int remove_folder(void **state)
{
	return empty_folder(state) == 0 ? rmdir(folder) : -1;
}

/* A file in the folder, begun with `text`; fclose() ends it. */
static FILE *begin_with(const char *name, const char *text)
{
	char path[128];

	snprintf(path, sizeof path, "%s/%s", folder, name);
	FILE *file = fopen(path, "w");
	assert_non_null(file);
	fputs(text, file);
	return file;
}

/* A file of rows, begun. */
static FILE *begin(const char *name)
{
	return begin_with(name, header);
}

static void write_text(const char *name, const char *text, const char *more)
{
	FILE *file = begin_with(name, text);

	fputs(more, file);
	assert_int_equal(fclose(file), 0);
}

static void write_rows(const char *name, int count, const struct row *rows)
{
	FILE *file = begin(name);

	for (int i = 0; i < count; i++)
		write_row(file, &rows[i]);
	assert_int_equal(fclose(file), 0);
}

/* Runs a command in the folder, which must end with this code; its output, until the next. */
static const char *run(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

static const char *run(int code, const char *format, ...)
{
	char command[1536];
	va_list list;
	int ended;

	va_start(list, format);
	vsnprintf(command, sizeof command, format, list);
	va_end(list);
	const char *output = shell(&ended, "cd '%s' && { %s; }", folder, command);
	if (ended != code)
		fail_msg("exit code %d instead of %d:\n%s", ended, code, output);
	return output;
}

static void expect_text(const char *output, const char *text)
{
	if (!strstr(output, text))
		fail_msg("'%s' is missing from:\n%s", text, output);
}

static void expect_no_text(const char *output, const char *text)
{
	if (strstr(output, text))
		fail_msg("'%s' is not expected in:\n%s", text, output);
}

static const char *compare(int code, const char *arguments)
{
	return run(code, "'%s'/compare %s", programs_folder(), arguments);
}

/* Two files of one row each, compared with these options. */
static const char *compare_rows(int code, struct row base, struct row new, const char *options)
{
	char arguments[256];

	base.run = or_else(base.run, "a");
	new.run = or_else(new.run, "b");
	write_rows("base.csv", 1, &base);
	write_rows("new.csv", 1, &new);
	snprintf(arguments, sizeof arguments, "%s base.csv new.csv", options);
	return compare(code, arguments);
}

/* Runs of two sides that took turns, the new one `ratio` times slower, within a few percent. */
static void write_pairs(int count, double ratio, bool alternate)
{
	FILE *side[] = {begin("base.csv"), begin("new.csv")};

	for (int i = 0; i < count; i++)
		for (int new = 0; new < 2; new ++) {
			char name[32], time[32];
			const int at = alternate ? 2 * i + new : i + new *count;

			snprintf(name, sizeof name, "%s-%d", new ? "new" : "base", i);
			snprintf(time, sizeof time, "2030-01-02T03:%02d:%02dZ", at / 60, at % 60);
			write_row(side[new],
			          &(struct row){.run = name,
			                        .time = time,
			                        .ms = (1 + 0.001 * (i % 4)) * (new ? ratio : 1),
			                        .min_ms = 0.5});
		}
	assert_int_equal(fclose(side[0]) | fclose(side[1]), 0);
}

TEST(test_two_plain_files)
{
	const struct row restless = {.ms = 15, .p20_ms = 12, .p80_ms = 20};
	const char *output = compare_rows(1, ten, eleven, "");

	expect_text(output, "1.100  0.789 - 1.534       1  unclear\n");
	expect_text(output, "deviate by 12%, or as much as samples do: of the 6 pairs of runs that "
	                    "it takes, 1 are here");
	compare_rows(0, ten, eleven, "--allow-unclear");
	output = compare_rows(1, ten, fifteen, "");
	expect_text(output, "slower\n0 same, 0 faster, 1 slower, 0 unclear, 0 failed\n");
	output = compare_rows(0, fifteen, ten, "");
	expect_text(output, "faster\n");
	/* Samples that scatter by 30% make any run of that machine doubtful. */
	output = compare_rows(1, ten, restless, "");
	expect_text(output, "unclear\n");
	output = compare_rows(1, ten, eleven, "--deviation 1");
	expect_text(output, "slower\n");
}

TEST(test_pairs_that_took_turns)
{
	write_pairs(8, 1.05, true);
	const char *output = compare(1, "base.csv new.csv");
	expect_text(output, "1.050  1.050 - 1.050       8  slower\n");
	expect_no_text(output, "assumption");
	expect_text(compare(0, "new.csv base.csv"), "faster\n");
	/* The least sample is another number. */
	expect_text(compare(0, "--of min base.csv new.csv"),
	            "1.000  1.000 - 1.000       8  same\n");
	assert_string_equal(compare(0, "--wide base.csv new.csv"), "");

	write_pairs(8, 1.05, false);
	output = compare(1, "base.csv new.csv");
	expect_text(output, "the runs did not take turns");
	expect_text(output, "unclear\n");
	assert_string_equal(compare(0, "--wide base.csv new.csv"), "attention prefill\n");
}

TEST(test_a_file_a_run)
{
	for (int i = 0; i < 6; i++) {
		char name[32], time[32];

		snprintf(time, sizeof time, "2030-01-02T03:04:%02dZ", i);
		for (int new = 0; new < 2; new ++) {
			/* Without a run_id a file is a run. */
			snprintf(name, sizeof name, "%c%d.csv", new ? 'b' : 'a', i);
			write_rows(name, 1, &(struct row){.time = time, .ms = 10});
		}
	}
	const char *output = compare(0, "--base a?.csv --new b?.csv");
	expect_text(output, "1.000  1.000 - 1.000       6  same\n");
	output = compare(1, "--base a?.csv --new b0.csv b1.csv");
	expect_text(output, "       2  unclear\n");
	expect_text(output, "base: 4 runs without a partner are not used\n");
}

TEST(test_one_file_with_itself)
{
	const struct row rows[] = {
	        {.run = "a", .time = "2030-01-02T03:04:05Z", .ms = 10},
	        {.run = "a", .time = "2030-01-02T03:04:06Z", .block = "swa", .status = "oom"},
	};

	write_rows("f.csv", 2, rows);
	const char *output = compare(0, "f.csv f.csv");
	expect_text(output, "same run\n");
	expect_text(output, "base: 1 of 1 oom new: 1 of 1 oom\n");
	expect_text(output, "0 unclear, 0 failed, 1 same run, 1 not compared\n");
	write_rows("f.csv", 1, &ten);
	expect_text(compare(0, "f.csv f.csv"), "1 same run\n");
}

TEST(test_outcomes)
{
	const struct row mismatch = {.status = "mismatch"};
	const struct row noisy = {.ms = 10, .status = "noisy"};
	const struct row rat = {.ms = 10, .block = "rat"};
	const struct row by_portable = {.ms = 10, .provider = "portable"};
	const struct row by_hopper = {.ms = 10, .provider = "hopper"};
	const struct row model = {.tokens_per_s = 2000, .pass = "throughput", .model = "7B"};
	struct row slow_model = model;

	slow_model.tokens_per_s = 1000;
	const char *output = compare_rows(1, ten, mismatch, "");
	expect_text(output, "failed  new: 1 of 1 mismatch\n");
	/* noisy is measured. */
	output = compare_rows(1, ten, noisy, "");
	expect_text(output, "unclear\n");
	expect_text(output, "new: 1 rows are noisy by their own account\n");
	output = compare_rows(2, rat, ten, "");
	expect_text(output, "only in base: ok\n");
	expect_text(output, "only in new: ok\n");
	expect_text(output, "no case in common");
	output = compare_rows(1, by_portable, by_hopper, "");
	expect_text(output, "by hopper, was portable\n");
	output = compare_rows(1, model, slow_model, "");
	expect_text(output, "       2000       1000   2.000");
	expect_text(output, "slower\n");
}

/* What tells two cases apart. */
TEST(test_keys)
{
	static const struct row other[] = {
	        {.ms = 9, .kv_heads = 1},           {.ms = 9, .d_k = 32},
	        {.ms = 9, .data = "sinks"},         {.ms = 9, .duty = "sustained"},
	        {.ms = 9, .requested = "portable"},
	};
	const struct row plain = {
	        .ms = 9, .kv_heads = 2, .d_k = 16, .duty = "burst", .data = "normal"};
	const struct row old = {.ms = 9};

	for (size_t i = 0; i < COUNT_OF(other); i++) {
		struct row row = other[i];

		row.d_k = row.d_k ? row.d_k : plain.d_k;
		row.duty = or_else(row.duty, plain.duty);
		expect_text(compare_rows(2, plain, row, ""), "no case in common");
	}
	/* An old file tells less of the same case. */
	expect_text(compare_rows(1, old, plain, ""), "1 unclear");
}

TEST(test_names_tell_cases_apart)
{
	const struct row rows[] = {{.run = "a", .ms = 1, .d_k = 16, .kv_heads = 2},
	                           {.run = "a", .ms = 2, .d_k = 32, .kv_heads = 2}};

	write_rows("f.csv", 2, rows);
	const char *output = compare(0, "f.csv f.csv");
	expect_text(output, "attention prefill D=64 T=128 B=4 d_k=16 ");
	expect_text(output, "attention prefill D=64 T=128 B=4 d_k=32 ");
}

TEST(test_nothing_is_dropped_in_silence)
{
	const struct row base[] = {{.run = "a", .ms = 10},
	                           {.run = "a", .ms = 20},
	                           {.run = "a", .ms = 3, .baseline = "attention"}};
	const struct row new[] = {{.run = "b", .ms = 20}};

	write_rows("base.csv", 3, base);
	write_rows("new.csv", 1, new);
	const char *output = compare(1, "base.csv new.csv");
	expect_text(output, "         20         20   1.000");
	expect_text(output, "base: of 1 cases that a run has twice the last counts\n");
	expect_text(output, "base: 1 rows of ratios between blocks are not compared\n");
}

TEST(test_refusals)
{
	static const struct {
		struct row new;
		const char *message, *allow;
	} refused[] = {
	        {{.ms = 10, .device = "Other CPU"}, "the devices differ", "device"},
	        {{.ms = 10, .build = "x86-64-v3"}, "the builds differ", "build"},
	        {{.ms = 10, .compiler = "clang 21"}, "the compilers differ", "build"},
	        {{.ms = 10, .threads = 1}, "the threads differ: 2 and 1", "build"},
	        {{.ms = 10, .clock = 1700}, "the clocks differ", "clock"},
	};
	const struct row base = {.ms = 10, .clock = 1980, .build = "native"};
	const struct row nearly = {.ms = 10, .clock = 1950};
	const struct row dirty = {.ms = 10, .build = "native dirty:0123abcd"};

	for (size_t i = 0; i < COUNT_OF(refused); i++) {
		char option[64];

		expect_text(compare_rows(2, base, refused[i].new, ""), refused[i].message);
		snprintf(option, sizeof option, "--allow-different clock,%s", refused[i].allow);
		expect_text(compare_rows(1, base, refused[i].new, option), "1 unclear");
	}
	/* What a file does not tell is not held against it. */
	compare_rows(1, base, ten, "");
	compare_rows(1, base, nearly, "");
	/* Nor are uncommitted changes. */
	compare_rows(1, base, dirty, "");
}

TEST(test_cycles)
{
	const struct row base = {.ms = 10, .clock = 1980}, slow = {.ms = 11, .clock = 1800};

	expect_text(compare_rows(1, base, slow, "--cycles"), "1.98e+07   1.98e+07   1.000");
	const char *output = compare_rows(1, base, eleven, "--cycles");
	expect_text(output, "1.100");
	expect_text(output, "1 cases have no clock");
}

TEST(test_compare_complains)
{
	static const char *const wrong[] = {
	        "",
	        "f.csv",
	        "f.csv f.csv f.csv",
	        "--base f.csv",
	        "--colour",
	        "--of mean f.csv f.csv",
	        "--margin x f.csv f.csv",
	        "--base",
	        "--same -1 f.csv f.csv",
	        "--allow-different colour f.csv f.csv",
	        "f.csv nowhere.csv",
	        "f.csv --base f.csv --new f.csv",
	};

	write_rows("f.csv", 1, &(struct row){.run = "a", .ms = 10});
	for (size_t i = 0; i < COUNT_OF(wrong); i++) {
		const char *output = compare(2, wrong[i]);

		assert_true(strncmp(output, "compare: ", 9) == 0);
		assert_ptr_equal(strchr(output, '\n'), output + strlen(output) - 1);
	}
	expect_text(compare(0, "--help"), "--allow-different");
	compare(2, "f.csv f.csv > /dev/full");
}

/* The same cases in the columns of two schemas; and two layers that differ in an argument. */
TEST(test_schemas)
{
	static const char columns[] =
	        "schema,device,program,block,pattern,pass,dtype,batch,seq_len,chunk,window,groups,"
	        "position,d_model,n_heads,latency_ms,status\n";
	static const char old[] =
	        "1,GPU,rat,rat,,prefill,bf16,1,8192,16,,2,rope,64,2,9,ok\n"
	        "1,GPU,hybrid,hybrid,\"rat,swa\",prefill,bf16,1,8192,16,8,1,none,64,"
	        "2,9,ok\n"
	        "1,GPU,recurrence,recurrence,,prefill,bf16,1,8192,,,,,64,2,9,ok\n";
	static const char new[] =
	        "2,GPU,hybrid,rat,\"rat(chunk=16,groups=2,heads=2,position=rope)\",prefill,bf16,1,"
	        "8192,16,,2,rope,64,2,8,ok\n"
	        "2,GPU,hybrid,hybrid,\"rat(chunk=16,groups=1,heads=2,position=none),swa(window=8,"
	        "heads=2,position=none)\",prefill,bf16,1,8192,16,8,1,none,64,2,8,ok\n"
	        "2,GPU,hybrid,recurrence,,prefill,bf16,1,8192,,,,,64,,8,ok\n"
	        "2,GPU,hybrid,hybrid,\"rat(chunk=16,groups=2),rat(chunk=64,groups=2)\",prefill,"
	        "bf16,1,"
	        "8192,16,,2,rope,64,2,8,ok\n";

	write_text("old.csv", columns, old);
	write_text("new.csv", columns, new);
	const char *output = compare(1, "old.csv new.csv");
	expect_text(output, "rat-swa L=16 W=8 G=1 NoPE");
	expect_text(output, "rat-rat L=16|64");
	expect_text(output, "3 unclear, 0 failed, 1 not compared");
}

/* --- bench/compare.sh --- */

/* Pretends to be build/hybrid: refuses the layer `unknown`, and writes rows whose latency is in the
 * file `ms` beside it. That of the layer `loud` differs from run to run on the new side. */
static const char pretender[] =
        "#!/bin/sh\n"
        "here=$(dirname \"$0\"); out= id= pattern=x\n"
        "while [ $# -gt 0 ]; do\n"
        "\tcase $1 in\n"
        "\t--list) echo 'backend now: cpu'; exit ;;\n"
        "\t--out) out=$2; shift ;;\n"
        "\t--run-id) id=$2; shift ;;\n"
        "\t--pattern) pattern=$2; shift ;;\n"
        "\t--dry-run) case $pattern in *unknown*) echo 'no such layer' >&2; exit 2 ;; esac; exit "
        ";;\n"
        "\tesac\n"
        "\tshift\n"
        "done\n"
        "read -r ms <\"$here/ms\"\n"
        "[ \"$ms\" != crash ] || kill -SEGV $$\n"
        "now=$(date -u +%Y-%m-%dT%H:%M:%S.%N)\n"
        "[ -e \"$out\" ] || echo 'schema,run_id,time_utc,device,block,pass,seq_len,latency_ms,"
        "latency_min_ms,status' >\"$out\"\n"
        "for block in $(echo \"$pattern\" | tr / ' '); do\n"
        "\tloud=; n=$(grep -c loud \"$out\")\n"
        "\tcase $block$out in loud*new.csv) loud=.$((n % 7)) ;; esac\n"
        "\techo \"3,$id,$now,CPU,$block,prefill,8,$ms$loud,$ms$loud,ok\" >>\"$out\"\n"
        "done\n";

/* A repository with two commits, whose Makefile "builds" the pretender; the second is slower. The
 * third cannot be built. */
static void make_repository(void)
{
	write_text("hybrid.sh", pretender, "");
	run(0, "printf 'build/hybrid: hybrid.sh ms\\n\\tmkdir -p build && cp ms build/ms && "
	       "install -m 755 hybrid.sh build/hybrid\\n' > Makefile");
	run(0,
	    "git init -q . && git config user.name t && git config user.email t@example.com && "
	    "echo build/ > .gitignore && echo 10 > ms && git add -A && git commit -qm one && "
	    "git tag one && echo 11 > ms && git commit -qam two && git tag two && "
	    "echo 'build/hybrid: ; @echo no rule for this; false' > Makefile && "
	    "git commit -qam three && git tag three && git checkout -q two && make -s && "
	    "ln -s '%s/compare' build/compare",
	    programs_folder());
}

/* make compare with these variables, as the Makefile calls it. */
static const char *make_compare(int code, const char *variables)
{
	char here[512];

	assert_non_null(getcwd(here, sizeof here));
	return run(code, "%s PAIRS=${PAIRS:-6..8} '%s/bench/compare.sh' build", variables, here);
}

static void expect_clean(void)
{
	run(0, "test \"$(git worktree list | wc -l)\" = 1 && ! ls -d build/comparison/tree.*");
}

TEST(test_commits)
{
	make_repository();
	const char *output = make_compare(1, "LC_ALL=de_DE.UTF-8 BASE=one PATTERNS='a b unknown'");
	expect_text(output, "unknown is left out, base refuses it: no such layer\n");
	expect_text(output, "1.100  1.100 - 1.100       6  slower\n");
	expect_text(output, "0 same, 0 faster, 2 slower, 0 unclear, 0 failed\n");
	expect_clean();
	expect_text(make_compare(0, "BASE=two NEW=one PATTERNS=a"), "faster\n");
	expect_text(make_compare(0, "BASE=two NEW=two PATTERNS=a"), "same\n");
	/* A command line instead of patterns. */
	expect_text(
	        make_compare(1, "BASE=one PROGRAM='hybrid --pattern c; build/hybrid --pattern d'"),
	        "2 slower");
	expect_clean();
}

/* What is decided is not measured again. */
TEST(test_undecided_cases_go_on)
{
	make_repository();
	const char *output = make_compare(1, "BASE=two PATTERNS='quiet loud'");
	expect_text(output, "quiet prefill T=8 ");
	expect_text(output, "base  an unknown commit, 7 runs from");
	expect_text(output, "1.000  1.000 - 1.000       6  same\n");
	expect_text(output, "       7  unclear\n");
}

TEST(test_commits_that_cannot_be_compared)
{
	make_repository();
	const char *output = make_compare(2, "BASE=nowhere");
	assert_string_equal(output, "compare: 'nowhere' is neither a commit of this repository nor "
	                            "a folder of programs\n");
	output = make_compare(2, "BASE=three");
	expect_text(output, "no rule for this\n");
	expect_text(output, "compare: three cannot be built\n");
	expect_clean();
	make_compare(2, "BASE=");
	make_compare(2, "BASE=one PAIRS=many");
	make_compare(2, "BASE=one MINUTES=-1");
	make_compare(2, "BASE=one PATTERNS=unknown");
	make_compare(2, "BASE=one VERDICT=--colour");
	expect_clean();
}

/* A new program that dies is a regression, an old one that does is a mistake. */
TEST(test_programs_that_die)
{
	make_repository();
	run(0, "cp -r build crash && echo crash > crash/ms");
	expect_text(make_compare(1, "BASE=build NEW=crash PATTERNS=a"),
	            "compare: new: hybrid ended with code 139\n");
	expect_text(make_compare(2, "BASE=crash NEW=build PATTERNS=a"), "compare: base: hybrid");
	expect_clean();
}

/* Interrupted, it takes its worktrees away. */
TEST(test_interrupted)
{
	make_repository();
	char here[512];

	assert_non_null(getcwd(here, sizeof here));
	run(0,
	    "BASE=one PATTERNS=a PAIRS=500..500 '%s/bench/compare.sh' build & pid=$!; "
	    "while [ ! -s build/comparison/new.csv ]; do sleep 0.05; done; "
	    "kill -TERM $pid; wait $pid; test $? = 143",
	    here);
	expect_clean();
}

FIXTURE(make_folder, remove_folder, empty_folder)
