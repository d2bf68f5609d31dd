/* The programs report and plotdata on small files of known content. */
#include "tests/test.h"

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

/* Runs a program with arguments, which must end with this code; its output, until the next run. */
static const char *run(int code, const char *format, ...)
{
	static char output[1 << 16];
	char arguments[512], command[1100];
	va_list list;

	va_start(list, format);
	vsnprintf(arguments, sizeof arguments, format, list);
	va_end(list);
	snprintf(command, sizeof command, "%s/%s 2>&1", programs, arguments);
	FILE *pipe = popen(command, "r");
	assert_non_null(pipe);
	output[fread(output, 1, sizeof output - 1, pipe)] = '\0';
	assert_int_equal(WEXITSTATUS(pclose(pipe)), code);
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

static const char *report(int code, const char *rows, const char *options)
{
	struct file file = write_file(rows);
	const char *output = run(code, "report %s %s", options, file.path);

	unlink(file.path);
	return output;
}

TEST(test_latency_beside_the_paper)
{
	char rows[8192] = "";

	add_block(rows, "attention", 0, "prefill", 131072, 250, "ok", "");
	add_block(rows, "attention", 0, "prefill", 4096, 20, "ok", "");
	add_block(rows, "rat", 16, "prefill", 4096, 16, "ok", "");
	add_block(rows, "rat", 16, "prefill", 131072, 25, "ok", "");
	add_block(rows, "rat", 16, "prefill", 8192, 0, "skipped", "");
	const char *output = report(0, rows, "--format terminal");
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
}

TEST(test_markdown)
{
	char rows[4096] = "";

	add_block(rows, "recurrence", 0, "generation", 4096, 0.08, "ok", "");
	const char *output = report(0, rows, "");
	expect_text(output, "### Generation");
	expect_text(output, "512 sequences");
	expect_text(output, "|    T |   recurrence |\n"
	                    "| ---: | ---: |\n"
	                    "| 4096 | 0.080 (0.35) |\n");
	expect_no_text(output, "times faster");
}

/* A repeated case counts as it was last; providers compared are lines of their own. */
TEST(test_repeated_rows_and_providers)
{
	char rows[8192] = "";

	add_block(rows, "attention", 0, "train", 8192, 100, "ok", "portable");
	add_block(rows, "attention", 0, "train", 8192, 80, "ok", "portable");
	add_block(rows, "attention", 0, "train", 8192, 60, "ok", "cudnn");
	add_block(rows, "recurrence", 0, "train", 8192, 30, "ok", "");
	const char *output = report(0, rows, "--format terminal");
	expect_text(output, "   T  attention [portable]  attention [cudnn]  recurrence\n"
	                    "8192                  80.0               60.0        30.0\n");
	/* Against the fastest attention there is. */
	expect_text(output, "8192        2.00\n");
	expect_no_text(output, "In parentheses");
}

TEST(test_throughput)
{
	char rows[4096] = "";
	static const char *const models[] = {"7B", "1.3B"};
	static const int widths[] = {4096, 2048};

	for (int i = 0; i < 2; i++)
		for (int rat = 0; rat < 2; rat++)
			snprintf(rows + strlen(rows), 400,
			         "1,0123456789abcdef,1,2030-01-02T03:04:05Z,Test GPU,1.0,throughput"
			         ",%s,,throughput,bf16,%d,4096,%s,,%s,rope,%d,%d,%s,3072,1024,,,,1,"
			         "%d,1,ok,,\n",
			         rat ? "rat" : "attention", 100 + i, rat ? "16" : "",
			         rat ? "2" : "", widths[i], widths[i] / 128, models[i],
			         rat ? 40000 : 2000);
	const char *output = report(0, rows, "--format terminal");
	expect_text(output, "    model           1.3B             7B\n"
	                    "attention    2000 (3152)     2000 (983)\n"
	                    " rat L=16  40000 (31170)  40000 (10103)\n");
	expect_text(output, "rat L=16  20.0 (9.9)  20.0 (10)\n");
	expect_text(output, "4 rows were measured while the clock was throttled.");
	expect_text(output, "0123456789ab with changes");
}

TEST(test_report_complains)
{
	run(2, "report");
	expect_text(run(2, "report --colour red x.csv"), "--colour");
	expect_text(run(2, "report /nowhere/x.csv"), "/nowhere/x.csv");
	run(2, "report README.md");
}

static const char *plotdata(int code, const char *rows, const char *what)
{
	struct file file = write_file(rows);
	const char *output = run(code, "plotdata %s results/paper/latency.csv %s", what, file.path);

	unlink(file.path);
	return output;
}

TEST(test_plot_against_length)
{
	char rows[4096] = "";

	add_block(rows, "attention", 0, "prefill", 131072, 250, "ok", "");
	add_block(rows, "attention", 0, "prefill", 4096, 20, "ok", "");
	add_block(rows, "attention", 0, "prefill", 8192, 0, "oom", "");
	add_block(rows, "rat", 16, "prefill", 4096, 16, "ok", "");
	add_block(rows, "gla", 64, "prefill", 4096, 17, "ok", "`touch /tmp/x`");
	const char *output = plotdata(0, rows, "prefill seq_len latency_ms");
	expect_text(output, "labels = \"'attention' 'rat L=16' 'gla L=64 [ touch /tmp/x ]'\"\n"
	                    "$data << EOD\n4096 20\n131072 250\n\n\n4096 16\n\n\n4096 17\n");
	/* Only of series that are ours too. */
	expect_text(output, "published_labels = \"'attention' 'rat L=16'\"\n$published << EOD\n"
	                    "4096 38\n32768 136\n131072 495\n\n\n4096 46\n");
	output = plotdata(3, rows, "train seq_len latency_ms");
	assert_string_equal(output, "");
}

TEST(test_files_that_are_not_understood)
{
	const char *output = report(
	        2, "4,,,,GPU,,rat,rat,,prefill,bf16,1,8192,16,,2,rope,64,2,,,,9,9,9,9,,,ok,,\n",
	        "");
	expect_text(output, "schema 4 is of a later program");
	output = report(
	        2, "1,,,,GPU,,rat,rat,,warmup,bf16,1,8192,16,,2,rope,64,2,,,,9,9,9,9,,,ok,,\n", "");
	expect_text(output, "no pass is called 'warmup'");
}

/* At the T that has most chunk lengths; a series without any is a level line. */
TEST(test_plot_against_chunk)
{
	char rows[4096] = "";

	for (int chunk = 16; chunk <= 64; chunk *= 2)
		add_block(rows, "rat", chunk, "train", 8192, 1 + 160. / chunk, "ok", "");
	add_block(rows, "rat", 16, "train", 16384, 99, "ok", "");
	add_block(rows, "recurrence", 0, "train", 8192, 5, "ok", "");
	const char *output = plotdata(0, rows, "train chunk latency_ms");
	expect_text(output, "T = 8192");
	expect_text(output, "labels = \"'rat' 'recurrence'\"\n$data << EOD\n"
	                    "16 11\n32 6\n64 3.5\n\n\n16 5\n64 5\n");
}

int main(int argc, char **argv)
{
	const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;

	snprintf(programs, sizeof programs, "%.*s/..", slash ? (int)(slash - argv[0]) : 1,
	         slash ? argv[0] : ".");
	return tests_run();
}
