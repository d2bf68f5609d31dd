/* Publishing a run: what is copied, and that whatever is not one whole clean run changes nothing.
 */
#include "tests/programs.h"

#include <sys/stat.h>
#include <unistd.h>

#include "bench/harness/record.h"

/* A checkout with the scripts and one commit. */
static char checkout[] = "/tmp/test_publish_XXXXXX", commit[64];

/* The same as shell(), in the checkout. */
#define in_checkout(code, format, ...)                                                             \
	shell(code, "cd %s && { " format "\n}", checkout, ##__VA_ARGS__)

/* A row as a clean run of the commit has it. */
static struct record clean_row(int64_t seq_len)
{
	struct record r = record_empty();

	r.run_id = "one";
	r.time_utc = "2030-01-02T03:04:05Z";
	r.git_sha = commit;
	r.git_dirty = 0;
	r.build = "x86-64-v3";
	r.device = "Some GPU";
	r.backend = "cuda";
	r.program = "attention";
	r.block = r.pattern = "attention";
	r.pass = "prefill";
	r.dtype = "bf16";
	r.batch = 4096 / seq_len;
	r.seq_len = seq_len;
	r.d_model = 64;
	r.latency_ms = 1 + (double)seq_len;
	r.status = "ok";
	return r;
}

/* Two rows, in a file of a run; the second may be another. */
static void write_rows(const char *name, const struct record *second)
{
	char path[256];
	const struct record first = clean_row(64), usual = clean_row(128);

	in_checkout(NULL, "mkdir -p \"$(dirname '%s')\"", name);
	snprintf(path, sizeof path, "%s/%s", checkout, name);
	FILE *file = fopen(path, "w");
	assert_non_null(file);
	record_print_header(file);
	record_print(file, &first);
	record_print(file, second ? second : &usual);
	assert_int_equal(fclose(file), 0);
}

static const char *publish(int expected, const char *run)
{
	int code;
	const char *output =
	        in_checkout(&code, "BUILD=%s scripts/publish.sh %s", programs_folder(), run);

	if (code != expected)
		fail_msg("exit code %d: %s", code, output);
	return output;
}

static void expect_nothing_published(const char *hint)
{
	const char *output = publish(1, "runs/some-gpu");

	if (!strstr(output, hint))
		fail_msg("'%s' is missing from: %s", hint, output);
	assert_string_equal(in_checkout(NULL, "ls -A results"), "paper\n");
}

TEST(copies_rows_samples_and_pictures)
{
	int code;

	write_rows("runs/some-gpu/try 1/latency.csv", NULL);
	in_checkout(NULL, "echo samples > 'runs/some-gpu/try 1/latency.samples.csv'");
	write_rows("runs/some-gpu/try 1/latency.old-1.csv", NULL);
	/* What an earlier run left is of that run. */
	in_checkout(NULL, "mkdir -p results/some-gpu; cd results/some-gpu; touch latency_train.png "
	                  "throughput.png table2.csv");
	publish(0, "'runs/some-gpu/try 1/'");
	assert_string_equal(in_checkout(NULL, "ls results/some-gpu"),
	                    "latency.csv\nlatency.samples.csv\nlatency_prefill.png\ntable2.csv\n"
	                    "throughput.png\n");
	in_checkout(&code, "cmp 'runs/some-gpu/try 1/latency.csv' results/some-gpu/latency.csv");
	assert_int_equal(code, 0);
	/* A run without samples leaves none of another beside it. */
	in_checkout(NULL, "rm 'runs/some-gpu/try 1/latency.samples.csv'");
	publish(0, "'runs/some-gpu/try 1/latency.csv'");
	in_checkout(&code, "test -e results/some-gpu/latency.samples.csv");
	assert_int_equal(code, 1);
}

TEST(refuses_what_is_no_whole_clean_run)
{
	static const char *const failures[] = {"mismatch", "invalid", "io", "cuda"};
	struct record row = clean_row(128);

	row.git_dirty = 1;
	write_rows("runs/some-gpu/latency.csv", &row);
	expect_nothing_published("uncommitted changes");
	row = clean_row(128);
	row.run_id = "two";
	write_rows("runs/some-gpu/latency.csv", &row);
	expect_nothing_published("differ in run_id");
	row = clean_row(128);
	row.device = "Another GPU";
	write_rows("runs/some-gpu/latency.csv", &row);
	expect_nothing_published("differ in device");
	for (size_t i = 0; i < COUNT_OF(failures); i++) {
		row = clean_row(128);
		row.status = failures[i];
		write_rows("runs/some-gpu/latency.csv", &row);
		expect_nothing_published(failures[i]);
	}
	/* One bad file keeps the good ones back. */
	write_rows("runs/some-gpu/family.csv", NULL);
	expect_nothing_published("latency.csv");
}

TEST(refuses_rows_of_another_place)
{
	char usual[sizeof commit];

	write_rows("runs/other-gpu/latency.csv", NULL);
	assert_non_null(strstr(publish(1, "runs/other-gpu"), "of another device: some-gpu"));
	assert_non_null(strstr(publish(1, "runs/nowhere"), "no file"));
	publish(2, "");
	/* A commit that this repository has never seen. */
	strcpy(usual, commit);
	strcpy(commit, "0123456789012345678901234567890123456789");
	write_rows("runs/some-gpu/latency.csv", NULL);
	strcpy(commit, usual);
	expect_nothing_published("does not know the commit");
}

TEST(refuses_cut_files_and_large_samples)
{
	write_rows("runs/some-gpu/latency.csv", NULL);
	in_checkout(NULL, "truncate -s -1 runs/some-gpu/latency.csv");
	expect_nothing_published("cut");
	write_rows("runs/some-gpu/latency.csv", NULL);
	in_checkout(NULL, "truncate -s 20000001 runs/some-gpu/latency.samples.csv");
	expect_nothing_published("too many to publish");
	in_checkout(NULL, "truncate -s 20000000 runs/some-gpu/latency.samples.csv");
	publish(0, "runs/some-gpu");
	in_checkout(NULL, "echo year,rain > runs/some-gpu/latency.csv; rm -r results/some-gpu");
	expect_nothing_published("latency.csv");
}

TEST(refuses_builds_of_another_kind)
{
	struct record row = clean_row(64);

	row.build = "x86-64-v3 address";
	write_rows("runs/some-gpu/latency.csv", &row);
	expect_nothing_published("differ in build");
}

static int new_runs(void **state)
{
	in_checkout(NULL, "rm -rf runs results/some-gpu");
	return 0;
}

static int set_up(void **state)
{
	char home[2048];
	int code;

	if (!mkdtemp(checkout) || !getcwd(home, sizeof home))
		return -1;
	in_checkout(
	        &code,
	        "cp -r %s/scripts %s/plots . && mkdir results && cp -r %s/results/paper results && "
	        "git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m c",
	        home, home, home);
	snprintf(commit, sizeof commit, "%.40s", in_checkout(NULL, "git rev-parse HEAD"));
	return code;
}

static int tear_down(void **state)
{
	in_checkout(NULL, "rm -rf %s", checkout);
	return 0;
}

FIXTURE(set_up, tear_down, new_runs)
