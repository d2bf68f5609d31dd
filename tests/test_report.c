/* The programs report, compare and plotdata on small files of known content. */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Where the programs are: beside the folder of this test. */
static char programs[512];

static const char header[] =
        "schema,git_sha,git_dirty,time_utc,device,driver,program,block,pattern,pass,dtype,batch,"
        "seq_len,chunk,window,groups,position,d_model,n_heads,model,prompt,generate,latency_ms,"
        "latency_p20_ms,latency_p80_ms,samples,tokens_per_s,throttled,status,message,requested\n";

struct file {
	char path[64];
};

static struct file write_file(const char *rows)
{
	struct file file = {"/tmp/report-test-XXXXXX"};
	int descriptor = mkstemp(file.path);
	FILE *stream = fdopen(descriptor, "w");

	assert_non_null(stream);
	fputs(header, stream);
	fputs(rows, stream);
	assert_int_equal(fclose(stream), 0);
	return file;
}

/* Appends a block's row: the shape is the paper's unless d_model says otherwise. */
static void add_block(char *rows, const char *block, int chunk, const char *pass, int seq_len,
                      double ms, const char *status, const char *requested)
{
	char number[24] = "", latency[64] = ",,", groups[4] = "";

	if (chunk > 0) {
		snprintf(number, sizeof number, "%d", chunk);
		snprintf(groups, sizeof groups, "2");
	}
	if (ms > 0)
		snprintf(latency, sizeof latency, "%g,%g,%g", ms, 0.99 * ms, 1.01 * ms);
	snprintf(rows + strlen(rows), 400,
	         "1,0123456789abcdef,0,2030-01-02T03:04:05Z,Test GPU,1.0,%s,%s,,%s,bf16,%d,%d,%s,,"
	         "%s,rope,2048,16,1.3B,,,%s,9,,0,%s,\"a, \"\"quoted\"\" message\",%s\n",
	         block, block, pass, strcmp(pass, "generation") == 0 ? 512 : 262144 / seq_len,
	         seq_len, number, groups, latency, status, requested);
}

/* Runs a program with arguments; its output (to be freed) and exit code. */
static char *run(const char *arguments, int *code)
{
	char command[1024], *output = calloc(1, 1 << 16);

	assert_non_null(output);
	snprintf(command, sizeof command, "%s/%s 2>&1", programs, arguments);
	FILE *pipe = popen(command, "r");
	assert_non_null(pipe);
	size_t length = fread(output, 1, (1 << 16) - 1, pipe);
	output[length] = '\0';
	*code = WEXITSTATUS(pclose(pipe));
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

static char *report(const char *rows, const char *options, int *code)
{
	struct file file = write_file(rows);
	char arguments[256];

	snprintf(arguments, sizeof arguments, "report %s %s", options, file.path);
	char *output = run(arguments, code);
	unlink(file.path);
	return output;
}

static void test_latency_beside_the_paper(void **state)
{
	char rows[8192] = "";
	int code;

	(void)state;
	add_block(rows, "attention", 0, "prefill", 131072, 250, "ok", "");
	add_block(rows, "attention", 0, "prefill", 4096, 20, "ok", "");
	add_block(rows, "rat", 16, "prefill", 4096, 16, "ok", "");
	add_block(rows, "rat", 16, "prefill", 131072, 25, "ok", "");
	add_block(rows, "rat", 16, "prefill", 8192, 0, "skipped", "");
	char *output = report(rows, "--format terminal", &code);

	assert_int_equal(code, 0);
	expect_text(output, "Test GPU, bf16, D = 2048, 262144 tokens.");
	/* Sorted by T; ours, and the published milliseconds of the same shape. */
	expect_text(output, "     T  attention   rat L=16\n"
	                    "  4096  20.0 (38)  16.0 (46)\n"
	                    "  8192               skipped\n"
	                    "131072  250 (495)  25.0 (72)\n");
	/* 250 / 25 against 495 / 72. */
	expect_text(output, "     T    rat L=16\n"
	                    "  4096  1.25 (0.8)\n"
	                    "  8192            \n"
	                    "131072  10.0 (6.9)\n");
	expect_text(output, "Test GPU: commit 0123456789ab, 2030-01-02, driver 1.0\n");
	free(output);
}

static void test_markdown(void **state)
{
	char rows[4096] = "";
	int code;

	(void)state;
	add_block(rows, "recurrence", 0, "generation", 4096, 0.08, "ok", "");
	char *output = report(rows, "", &code);

	assert_int_equal(code, 0);
	expect_text(output, "### Generation");
	expect_text(output, "512 sequences");
	expect_text(output, "|    T |   recurrence |\n"
	                    "| ---: | ---: |\n"
	                    "| 4096 | 0.080 (0.35) |\n");
	expect_no_text(output, "times faster");
	free(output);
}

/* A repeated case counts as it was last; providers compared are lines of their own. */
static void test_repeated_rows_and_providers(void **state)
{
	char rows[8192] = "";
	int code;

	(void)state;
	add_block(rows, "attention", 0, "train", 8192, 100, "ok", "portable");
	add_block(rows, "attention", 0, "train", 8192, 80, "ok", "portable");
	add_block(rows, "attention", 0, "train", 8192, 60, "ok", "cudnn");
	add_block(rows, "recurrence", 0, "train", 8192, 30, "ok", "");
	char *output = report(rows, "--format terminal", &code);

	assert_int_equal(code, 0);
	expect_text(output, "   T  attention [portable]  attention [cudnn]  recurrence\n"
	                    "8192                  80.0               60.0        30.0\n");
	/* Against the fastest attention there is. */
	expect_text(output, "8192        2.00\n");
	expect_no_text(output, "In parentheses");
	free(output);
}

static void test_throughput(void **state)
{
	char rows[4096] = "";
	int code;
	static const char *const models[] = {"7B", "1.3B"};
	static const int widths[] = {4096, 2048};

	(void)state;
	for (int i = 0; i < 2; i++)
		for (int rat = 0; rat < 2; rat++)
			snprintf(rows + strlen(rows), 400,
			         "1,0123456789abcdef,1,2030-01-02T03:04:05Z,Test GPU,1.0,throughput"
			         ",%s,,throughput,bf16,%d,4096,%s,,%s,rope,%d,%d,%s,3072,1024,,,,1,"
			         "%d,1,ok,,\n",
			         rat ? "rat" : "attention", 100 + i, rat ? "16" : "",
			         rat ? "2" : "", widths[i], widths[i] / 128, models[i],
			         rat ? 40000 : 2000);
	char *output = report(rows, "--format terminal", &code);

	assert_int_equal(code, 0);
	expect_text(output, "    model           1.3B             7B\n"
	                    "attention    2000 (3152)     2000 (983)\n"
	                    " rat L=16  40000 (31170)  40000 (10103)\n");
	expect_text(output, "rat L=16  20.0 (9.9)  20.0 (10)\n");
	expect_text(output, "4 rows were measured while the clock was throttled.");
	expect_text(output, "0123456789ab with changes");
	free(output);
}

static void test_report_complains(void **state)
{
	int code;
	char *output = run("report", &code);

	(void)state;
	assert_int_equal(code, 2);
	free(output);
	output = run("report --colour red x.csv", &code);
	assert_int_equal(code, 2);
	expect_text(output, "--colour");
	free(output);
	output = run("report /nowhere/x.csv", &code);
	assert_int_equal(code, 2);
	expect_text(output, "/nowhere/x.csv");
	free(output);
	output = run("report README.md", &code);
	assert_int_equal(code, 2);
	free(output);
}

static char *compare(const char *before, const char *after, int *code)
{
	struct file files[] = {write_file(before), write_file(after)};
	char arguments[256];

	snprintf(arguments, sizeof arguments, "compare %s %s", files[0].path, files[1].path);
	char *output = run(arguments, code);
	unlink(files[0].path);
	unlink(files[1].path);
	return output;
}

static void test_compare(void **state)
{
	char before[4096] = "", after[4096] = "";
	int code;

	(void)state;
	add_block(before, "attention", 0, "prefill", 4096, 20, "ok", "");
	add_block(after, "attention", 0, "prefill", 4096, 19, "ok", "");
	add_block(before, "attention", 0, "prefill", 8192, 20, "ok", "");
	add_block(after, "attention", 0, "prefill", 8192, 20.1, "ok", "");
	add_block(before, "rat", 16, "prefill", 8192, 20, "ok", "");
	add_block(before, "rat", 64, "prefill", 8192, 0, "oom", "");
	add_block(after, "rat", 64, "prefill", 8192, 0, "oom", "");
	char *output = compare(before, after, &code);
	assert_int_equal(code, 0);
	expect_text(output, "0.950  faster\n");
	expect_text(output, "1.005  overlap\n");
	expect_text(output, "only in the first file");
	expect_text(output, "1 faster, 0 slower, 1 overlap, 2 without a verdict");
	free(output);

	/* The other way round it is a regression, and the exit code says so. */
	output = compare(after, before, &code);
	assert_int_equal(code, 1);
	expect_text(output, "slower\n");
	expect_text(output, "only in the second file");
	free(output);
}

static void test_compare_outcomes(void **state)
{
	char before[4096] = "", after[4096] = "";
	int code;

	(void)state;
	add_block(before, "rat", 16, "train", 8192, 20, "ok", "");
	add_block(after, "rat", 16, "train", 8192, 0, "mismatch", "");
	char *output = compare(before, after, &code);
	assert_int_equal(code, 1);
	expect_text(output, "another outcome");
	free(output);
}

static char *plotdata(const char *rows, const char *what, int *code)
{
	struct file file = write_file(rows);
	char arguments[256];

	snprintf(arguments, sizeof arguments, "plotdata %s results/paper/latency.csv %s", what,
	         file.path);
	char *output = run(arguments, code);
	unlink(file.path);
	return output;
}

static void test_plot_against_length(void **state)
{
	char rows[4096] = "";
	int code;

	(void)state;
	add_block(rows, "attention", 0, "prefill", 131072, 250, "ok", "");
	add_block(rows, "attention", 0, "prefill", 4096, 20, "ok", "");
	add_block(rows, "attention", 0, "prefill", 8192, 0, "oom", "");
	add_block(rows, "rat", 16, "prefill", 4096, 16, "ok", "");
	add_block(rows, "gla", 64, "prefill", 4096, 17, "ok", "`touch /tmp/x`");
	char *output = plotdata(rows, "prefill seq_len latency_ms", &code);

	assert_int_equal(code, 0);
	expect_text(output, "labels = \"'attention' 'rat L=16' 'gla L=64 [ touch /tmp/x ]'\"\n"
	                    "$data << EOD\n4096 20\n131072 250\n\n\n4096 16\n\n\n4096 17\n");
	/* Only of series that are ours too. */
	expect_text(output, "published_labels = \"'attention' 'rat L=16'\"\n$published << EOD\n"
	                    "4096 38\n32768 136\n131072 495\n\n\n4096 46\n");
	free(output);
	output = plotdata(rows, "train seq_len latency_ms", &code);
	assert_int_equal(code, 3);
	assert_string_equal(output, "");
	free(output);
}

/* At the T that has most chunk lengths; a series without any is a level line. */
static void test_plot_against_chunk(void **state)
{
	char rows[4096] = "";
	int code;

	(void)state;
	for (int chunk = 16; chunk <= 64; chunk *= 2)
		add_block(rows, "rat", chunk, "train", 8192, 1 + 160. / chunk, "ok", "");
	add_block(rows, "rat", 16, "train", 16384, 99, "ok", "");
	add_block(rows, "recurrence", 0, "train", 8192, 5, "ok", "");
	char *output = plotdata(rows, "train chunk latency_ms", &code);

	assert_int_equal(code, 0);
	expect_text(output, "T = 8192");
	expect_text(output, "labels = \"'rat' 'recurrence'\"\n$data << EOD\n"
	                    "16 11\n32 6\n64 3.5\n\n\n16 5\n64 5\n");
	free(output);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_latency_beside_the_paper),
	        cmocka_unit_test(test_markdown),
	        cmocka_unit_test(test_repeated_rows_and_providers),
	        cmocka_unit_test(test_throughput),
	        cmocka_unit_test(test_report_complains),
	        cmocka_unit_test(test_compare),
	        cmocka_unit_test(test_compare_outcomes),
	        cmocka_unit_test(test_plot_against_length),
	        cmocka_unit_test(test_plot_against_chunk),
	};
	const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;

	snprintf(programs, sizeof programs, "%.*s/..", slash ? (int)(slash - argv[0]) : 1,
	         slash ? argv[0] : ".");
	return cmocka_run_group_tests(tests, NULL, NULL);
}
