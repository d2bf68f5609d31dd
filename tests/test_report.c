/* The programs report and plotdata on small files of known content. */
#include "tests/programs.h"

#include <unistd.h>

#include "bench/harness/record.h"

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
	char arguments[512];
	va_list list;
	int ended;

	va_start(list, format);
	vsnprintf(arguments, sizeof arguments, format, list);
	va_end(list);
	const char *output = shell(&ended, "%s/%s", programs_folder(), arguments);
	assert_int_equal(ended, code);
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

TEST(test_html)
{
	char rows[4096] = "";

	add_block(rows, "recurrence", 0, "generation", 4096, 0.08, "ok", "a<b>&c");
	add_block(rows, "attention", 0, "generation", 4096, 0.8, "ok", "portable");
	const char *output = report(0, rows, "--format html");
	expect_text(output, "<h3>Generation");
	expect_text(output, "<tr><th scope=\"row\">4096</th><td>");
	expect_text(output, "a&#60;b&#62;&#38;c");
	expect_text(output, "</td></tr></tbody>\n</table></div>\n");
	expect_text(output, "</li>\n</ul>\n");
	expect_no_text(output, "|");
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
	expect_text(output, "row 1: schema '4' is unknown; this program reads schemas 1 to 3");
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

/* The columns of a record. */
enum { VALUE, KEY };
#define TEXT_COLUMN(name, key)    {#name, offsetof(struct record, name), 't', key},
#define INTEGER_COLUMN(name, key) {#name, offsetof(struct record, name), 'i', key},
#define REAL_COLUMN(name, key)    {#name, offsetof(struct record, name), 'r', key},

static const struct {
	const char *name;
	size_t offset;
	char kind;
	bool key;
} record_columns[] = {RECORD_COLUMNS(TEXT_COLUMN, INTEGER_COLUMN, REAL_COLUMN)};

/* A row with all that a row must have. */
static struct record make_record(const char *pass, double ms)
{
	struct record r = record_empty();

	r.block = "attention";
	r.pattern = "attention(a=1)";
	r.pass = pass;
	r.status = "ok";
	r.device = "GPU";
	r.dtype = "bf16";
	r.git_sha = "0123456789abcdef";
	r.run_id = "run";
	r.batch = 2;
	r.seq_len = 64;
	r.d_model = 128;
	r.latency_ms = ms;
	r.tokens_per_s = ms;
	return r;
}

/* Writes rows of this program; the file is to be unlinked. */
static struct file write_records(const struct record *records, int count)
{
	struct file file = {"/tmp/report-test-XXXXXX"};
	FILE *stream = fdopen(mkstemp(file.path), "w");

	assert_non_null(stream);
	record_print_header(stream);
	for (int i = 0; i < count; i++)
		record_print(stream, &records[i]);
	assert_int_equal(fclose(stream), 0);
	return file;
}

/* Two rows that differ in one key are two numbers of the report, whichever key that is. */
TEST(test_report_shows_every_case)
{
	for (size_t i = 0; i < COUNT_OF(record_columns); i++) {
		const char *name = record_columns[i].name;
		const bool model = strcmp(name, "model") == 0 || strcmp(name, "prompt") == 0 ||
		                   strcmp(name, "generate") == 0;
		const char *pass = model ? "throughput" : "prefill";
		struct record records[] = {make_record(pass, 111), make_record(pass, 222)};

		if (!record_columns[i].key)
			continue;
		for (int j = 0; j < 2; j++) {
			void *field = (char *)&records[j] + record_columns[i].offset;

			if (strcmp(name, "pass") == 0)
				*(const char **)field = j ? "prefill" : "train";
			else if (record_columns[i].kind == 't')
				*(const char **)field = j ? "some" : "others";
			else
				*(int64_t *)field = 8 + 8 * j;
			records[j].ratio = 111 * (j + 1);
			records[j].ratio_low = records[j].ratio_high = 1;
		}
		struct file file = write_records(records, 2);
		const char *output = run(0, "report --format terminal %s", file.path);

		unlink(file.path);
		if (!strstr(output, "111") || !strstr(output, "222"))
			fail_msg("rows that differ in %s alone hide one another:\n%s", name,
			         output);
	}
}

/* What differs is in the names of all lines of the series, and of no other. */
TEST(test_lines_that_differ_in_heads)
{
	struct record records[7];

	for (int i = 0; i < 3; i++) {
		records[2 * i] = make_record("prefill", 10 + i);
		records[2 * i + 1] = make_record("prefill", 20 + i);
		records[2 * i + 1].seq_len = 128;
		records[2 * i + 1].batch = 1;
		records[2 * i].n_heads = records[2 * i + 1].n_heads = 2 << i;
		records[2 * i].d_v = records[2 * i + 1].d_v = 64 >> i;
	}
	records[6] = make_record("prefill", 5);
	records[6].block = records[6].pattern = "recurrence";
	struct file file = write_records(records, 7);
	const char *output = run(0, "report --format terminal %s", file.path);

	expect_text(output, "   T  attention H=2  attention H=4  attention H=8  recurrence\n"
	                    "  64           10.0           11.0           12.0        5.00\n"
	                    " 128           20.0           21.0           22.0            \n");
	output = run(0, "plotdata prefill seq_len latency_ms results/paper/latency.csv %s",
	             file.path);
	expect_text(output, "'attention H=2' 'attention H=4' 'attention H=8' 'recurrence'");
	expect_text(output, "64 10\n128 20\n\n\n64 11\n128 21\n\n\n64 12\n128 22\n\n\n64 5\n");
	unlink(file.path);
}

TEST(test_two_files_of_one_case)
{
	struct record records[] = {make_record("prefill", 111), make_record("prefill", 222)};

	records[1].git_sha = "fedcba9876543210";
	struct file first = write_records(records, 1), second = write_records(records + 1, 1);
	const char *output = run(0, "report %s %s", first.path, second.path);

	unlink(first.path);
	unlink(second.path);
	expect_text(output,
	            "attention commit 0123456789abcdef | attention commit fedcba9876543210");
	expect_text(output, "111 |                               222 |");
}

/* Work is the same whoever does it: one line, and a point for each length. */
TEST(test_work_of_providers)
{
	struct record records[] = {make_record("prefill", 1), make_record("prefill", 2)};

	records[0].flops = records[1].flops = 1e9;
	records[0].requested = "portable";
	records[1].requested = "cudnn";
	struct file file = write_records(records, 2);
	const char *output =
	        run(0, "plotdata prefill seq_len flops results/paper/latency.csv %s", file.path);

	unlink(file.path);
	expect_text(output, "\nlabels = \"'attention'\"\n$data << EOD\n64 1e+09\n\n\nEOD\n");
}

TEST(test_says_what_is_in_no_picture)
{
	struct record records[] = {make_record("prefill", 1), make_record("prefill", 2),
	                           make_record("prefill", 3)};

	records[1].seq_len = 32;
	records[1].batch = 4;
	records[2].d_model = 256;
	struct file file = write_records(records, 3);
	const char *output = run(
	        0, "plotdata prefill seq_len latency_ms results/paper/latency.csv %s", file.path);

	unlink(file.path);
	expect_text(output, "1 rows of other shapes or conditions are not shown");
}

TEST(test_ratios_have_their_table)
{
	struct record records[] = {make_record("prefill", NAN), make_record("prefill", 7)};

	records[0].block = records[0].pattern = "recurrence";
	records[0].baseline = "attention";
	records[0].ratio = 2.5;
	records[0].ratio_low = 2.25;
	records[0].ratio_high = 2.75;
	struct file file = write_records(records, 2);
	const char *output = run(0, "report --format terminal %s", file.path);

	unlink(file.path);
	expect_text(output, "times faster than attention\n");
	expect_text(output, "   T            recurrence\n  64  2.500 [2.250, 2.750]\n");
	expect_text(output, "   T  attention\n  64       7.00\n");
}

TEST(test_known_schemas)
{
	static const char *const unknown[] = {"", "0", "4", "999", "1.5", "x", "-1"};
	char row[400];

	for (size_t i = 0; i < COUNT_OF(unknown); i++) {
		snprintf(row, sizeof row,
		         "%s,,,,GPU,,rat,rat,,prefill,bf16,1,8192,16,,2,rope,64,2,,,,9,9,9,9,,,"
		         "ok,,\n",
		         unknown[i]);
		expect_text(report(2, row, ""), "is unknown");
	}
	for (int i = 1; i <= RECORD_SCHEMA; i++) {
		row[0] = '\0';
		snprintf(row, sizeof row,
		         "%d,,,,GPU,,rat,rat,,prefill,bf16,1,8192,16,,2,rope,64,2,,,,9,9,9,9,,,"
		         "ok,,\n",
		         i);
		expect_text(report(0, row, "--format terminal"), "8192      9.00\n");
	}
}

/* The published files of the tree show all their rows: none is lost between file and table. */
TEST(test_report_of_many_operations)
{
	static const char path[] = "results/h200/kernels.csv";
	scoped_csv struct csv csv;
	const char *output = run(0, "report --format terminal %s", path);

	require_ok(csv_read(path, &csv));
	for (int row = 0; row < csv.n_rows; row++) {
		char number[32];
		const double ms = csv_number(&csv, row, "latency_ms");
		const int decimals = ms >= 99.95 ? 0 : ms >= 9.995 ? 1 : ms >= 0.9995 ? 2 : 3;

		snprintf(number, sizeof number, "%.*f", decimals, ms);
		expect_text(output, isnan(ms) ? csv_text(&csv, row, "status") : number);
	}
}

TEST(test_output_that_cannot_be_written)
{
	struct record record = make_record("prefill", 1);
	struct file file = write_records(&record, 1);

	run(2, "report %s >/dev/full", file.path);
	run(2, "report --help >/dev/full");
	run(2, "report %s >&-", file.path);
	run(2, "plotdata prefill seq_len latency_ms results/paper/latency.csv %s >/dev/full",
	    file.path);
	unlink(file.path);
}

TEST(test_report_outside_the_checkout)
{
	char rows[4096] = "";

	add_block(rows, "attention", 0, "prefill", 4096, 20, "ok", "");
	struct file file = write_file(rows);
	/* The published numbers of its own checkout, wherever it runs. */
	expect_text(shell(NULL, "cd / && %s/report %s", programs_folder(), file.path), "20.0 (38)");
	/* A copy of the program has none, and says so. */
	const char *output = shell(NULL, "cp %s/report %s.copy && cd / && %s.copy %s; rm %s.copy",
	                           programs_folder(), file.path, file.path, file.path, file.path);
	expect_text(output, "no published numbers");
	expect_text(output, "| 4096 |      20.0 |");
	unlink(file.path);
}
