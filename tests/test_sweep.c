/*
 * Whole runs of the harness with a subject that is no layer: every outcome has
 * its row, files survive a SIGKILL, variants alternate, mistakes leave nothing behind.
 */
#include "tests/programs.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench/harness/bench.h"
#include "bench/harness/statistics.h"
#include "bench/harness/record.h"

/* What a case does is in its sequence length; others are fine. */
enum { T_UNSUPPORTED = 1002, T_TOO_LARGE, T_WRONG, T_NAN, T_DEVICE_ERROR, T_TOO_SLOW, T_MISTAKE };

/* In memory shared with the child that runs. */
struct log {
	int launches, verified, poisoned, unverified_samples, nap_us;
	char order[256]; /* the variant of each launch, by the number of its choices */
};

static struct log *journal;
static char folder[] = "/tmp/test_sweep_XXXXXX", path[64], samples[64];

static const struct driver driver = {
        .program = "test",
        .summary = "a subject for the tests",
        .file = "test.csv",
        .passes = "prefill,generation",
        .axes = "seq-len,chunk",
        .defaults = {{"pass", "prefill"}, {"chunk", "1"}},
};

static void use(void *self, struct device *device)
{
}

static enum status configure(void *self, const struct options *options, struct bench_case *c)
{
	snprintf(c->block, sizeof c->block, "fake");
	/* The first chunk's is the pattern that ratios are relative to. */
	snprintf(c->pattern, sizeof c->pattern, c->chunk == 1 ? "attention" : "fake");
	c->is_baseline = c->chunk == 1;
	c->batch = c->tokens = 1;
	c->d_model = c->n_heads = NO_VALUE;
	if (c->seq_len == T_MISTAKE)
		return status_set(STATUS_INVALID, "--seq-len: not %d", T_MISTAKE);
	if (c->seq_len == T_UNSUPPORTED)
		return status_set(STATUS_UNSUPPORTED, "makes no sense");
	return STATUS_OK;
}

static enum status plan(void *self, const struct context *ctx, struct bench_case *c,
                        size_t memory_free, size_t *bytes, struct kernel_plan *work)
{
	struct cost cost = {.flops = c->seq_len == T_TOO_SLOW ? 1e18 : 1, .bytes_read = 8};

	*bytes = c->seq_len == T_TOO_LARGE ? (size_t)1 << 60 : 1;
	work->total = cost;
	work->n_operations = 1;
	work->operations[0] = (struct planned_operation){OP_GELU, "cpu", cost, 1};
	return STATUS_OK;
}

static enum status acquire(void *self, struct context *ctx, const struct bench_case *c,
                           uint64_t seed)
{
	return STATUS_OK;
}

static enum status warm_up(void *self, struct context *ctx, const struct bench_case *c)
{
	return STATUS_OK;
}

static enum status rewind_fake(void *self, struct context *ctx, const struct bench_case *c,
                               bool to_verify, double *prefill_ms)
{
	journal->poisoned = to_verify;
	return STATUS_OK;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	struct timespec nap = {0, 1000L * journal->nap_us};

	if (journal->launches < (int)sizeof journal->order - 1)
		journal->order[journal->launches] = (char)('0' + ctx->choice.count);
	journal->launches++;
	nanosleep(&nap, NULL);
	if (c->seq_len == T_DEVICE_ERROR)
		return status_set(STATUS_CUDA, "the device said no");
	return STATUS_OK;
}

static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, struct accuracy *found)
{
	/* The launch that is verified wrote into buffers that held nothing valid. */
	journal->unverified_samples += !journal->poisoned;
	journal->verified++;
	found->rel_err = c->seq_len == T_WRONG ? 0.5 : c->seq_len == T_NAN ? NAN : 1e-7;
	found->share = c->seq_len == T_WRONG ? 7 : c->seq_len == T_NAN ? NAN : 0.3;
	return STATUS_OK;
}

static void release(void *self)
{
}

static void *clone_fake(void *self)
{
	return calloc(1, 1);
}

static int fake_main(int argc, char **argv)
{
	static const struct subject subject = {
	        .clone = clone_fake,
	        .use = use,
	        .configure = configure,
	        .plan = plan,
	        .acquire = acquire,
	        .warm_up = warm_up,
	        .rewind = rewind_fake,
	        .launch = launch,
	        .verify = verify,
	        .release = release,
	};

	return bench_main(&driver, &subject, argc, argv);
}

/* Starts the program; the arguments end with NULL. */
static pid_t start(const char *const *arguments)
{
	char *argv[24] = {(char *)"test",       (char *)"--backend", (char *)"cpu",
	                  (char *)"--max-time", (char *)"0.001",     (char *)"--precision",
	                  (char *)"0"};
	int argc = 7;

	while (*arguments)
		argv[argc++] = (char *)*arguments++;
	return program_start(fake_main, argc, argv);
}

#define RUN(...) program_finish(start((const char *const[]){__VA_ARGS__, NULL}))

static int new_file(void **state)
{
	memset(journal, 0, sizeof *journal);
	unlink(path);
	unlink(samples);
	return 0;
}

/* The only row of a sequence length; fails if there is not exactly one. */
static int row_of(const struct csv *csv, int seq_len)
{
	int found = -1;

	for (int row = 0; row < csv->n_rows; row++) {
		if (csv_number(csv, row, "seq_len") != seq_len)
			continue;
		assert_int_equal(found, -1);
		found = row;
	}
	assert_true(found >= 0);
	return found;
}

static void expect_status(const struct csv *csv, int seq_len, const char *status, const char *hint)
{
	int row = row_of(csv, seq_len);

	assert_string_equal(csv_text(csv, row, "status"), status);
	assert_non_null(strstr(csv_text(csv, row, "message"), hint));
	/* Only what was verified has a latency. */
	assert_int_equal(isnan(csv_number(csv, row, "latency_ms")), strcmp(status, "ok") != 0);
}

TEST(gives_every_outcome_its_row)
{
	scoped_csv struct csv csv;

	assert_int_equal(RUN("--out", path, "--seq-len", "1..2+1,1002..1008+1,3"), 1);
	read_rows(&csv, path, 10);
	expect_status(&csv, 1, "ok", "");
	expect_status(&csv, 2, "ok", "");
	expect_status(&csv, 3, "ok", "");
	expect_status(&csv, T_UNSUPPORTED, "unsupported", "makes no sense");
	expect_status(&csv, T_MISTAKE, "unsupported", "--seq-len: not");
	expect_status(&csv, T_TOO_LARGE, "oom", "bytes");
	expect_status(&csv, T_WRONG, "mismatch", "0.5");
	expect_status(&csv, T_NAN, "mismatch", "nan");
	expect_status(&csv, T_DEVICE_ERROR, "cuda", "said no");
	expect_status(&csv, T_TOO_SLOW, "skipped", "--case-seconds");
	int row = row_of(&csv, 1);
	assert_true(csv_number(&csv, row, "rel_err") == 1e-7);
	assert_true(csv_number(&csv, row, "samples") >= 10);
	assert_true(csv_number(&csv, row, "latency_p20_ms") <=
	            csv_number(&csv, row, "latency_p80_ms"));
	assert_true(csv_number(&csv, row, "gemm_tflops") > 0);
	assert_true(csv_number(&csv, row_of(&csv, T_TOO_SLOW), "predicted_ms") > 1e4);
	assert_true(csv_number(&csv, row_of(&csv, T_TOO_LARGE), "memory_bytes") > 1e6);
	assert_true(strlen(csv_text(&csv, row, "git_sha")) > 0);
	assert_int_equal(journal->unverified_samples, 0);
}

TEST(measures_every_kind_of_data)
{
	static const char *const kinds[] = {"normal", "small", "sinks", "peaked", "zeros"};
	scoped_csv struct csv csv;

	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--truncate", "--data",
	                     "normal,small,sinks,peaked,zeros"),
	                 0);
	read_rows(&csv, path, COUNT_OF(kinds));
	for (int row = 0; row < csv.n_rows; row++) {
		const bool zeros = row == csv.n_rows - 1;

		assert_string_equal(csv_text(&csv, row, "data"), kinds[row]);
		/* Of zeros nothing is claimed. */
		assert_int_equal(csv_text(&csv, row, "rel_err")[0] == '\0', zeros);
		assert_int_equal(strstr(csv_text(&csv, row, "message"), "not verified") != NULL,
		                 zeros);
	}
}

TEST(alternates_samples_of_variants)
{
	scoped_csv struct csv csv;

	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--samples", "3", "--provider", "cpu",
	                     "--provider", "gelu=cpu,cpu"),
	                 0);
	/* The first sample of each is verified; from then on they take turns, in any order. */
	assert_int_equal(strlen(journal->order), 6);
	for (int i = 0; i < 6; i += 2)
		assert_int_equal(journal->order[i] + journal->order[i + 1], '1' + '2');
	assert_int_equal(journal->verified, 2);
	read_rows(&csv, path, 3);
	assert_string_equal(csv_text(&csv, 0, "requested"), "cpu");
	assert_string_equal(csv_text(&csv, 1, "requested"), "gelu=cpu,cpu");
	assert_string_equal(csv_text(&csv, 2, "baseline"), "attention [cpu]");
}

/* The chunk stands for a pattern: the same lengths alternate, and have a ratio to the baseline. */
TEST(compares_blocks_side_by_side)
{
	scoped_csv struct csv csv;

	assert_int_equal(
	        RUN("--out", path, "--seq-len", "1,2", "--chunk", "1,3,5", "--samples", "12"), 0);
	read_rows(&csv, path, 10);
	for (int row = 0; row < 10; row++) {
		/* Of each length three latencies, then two ratios. */
		const bool ratio = row % 5 > 2;

		assert_int_equal((int)csv_number(&csv, row, "seq_len"), 1 + row / 5);
		assert_int_equal(strlen(csv_text(&csv, row, "baseline")) > 0, ratio);
		assert_int_equal(isnan(csv_number(&csv, row, "latency_ms")), ratio);
		assert_int_equal((int)csv_number(&csv, row, "samples"), ratio ? 11 : 12);
		if (!ratio)
			continue;
		assert_string_equal(csv_text(&csv, row, "baseline"), "attention");
		assert_true(csv_number(&csv, row, "ratio_low") <= csv_number(&csv, row, "ratio"));
		assert_true(csv_number(&csv, row, "ratio_high") >= csv_number(&csv, row, "ratio"));
	}
	assert_int_equal(
	        RUN("--out", path, "--truncate", "--seq-len", "1", "--chunk", "1,3", "--apart"), 0);
	csv_release(&csv);
	read_rows(&csv, path, 2);
}

TEST(adds_unless_told_to_truncate)
{
	struct csv csv;

	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--run-id", "first"), 0);
	assert_int_equal(RUN("--out", path, "--seq-len", "2"), 0);
	read_rows(&csv, path, 2);
	assert_string_equal(csv_text(&csv, 0, "run_id"), "first");
	assert_string_not_equal(csv_text(&csv, 1, "run_id"), "first");
	csv_release(&csv);
	assert_int_equal(RUN("--out", path, "--seq-len", "3", "--truncate"), 0);
	read_rows(&csv, path, 1);
	csv_release(&csv);
}

static off_t file_size(void)
{
	struct stat info;

	return stat(path, &info) == 0 ? info.st_size : 0;
}

static int whole_rows(void)
{
	struct csv csv;

	if (csv_read(path, &csv) != STATUS_OK)
		return 0;
	int rows = csv.n_rows;
	csv_release(&csv);
	return rows;
}

/* Kills a run of forty cases after some rows; returns how many are in the file. */
static int kill_in_the_middle(void)
{
	journal->nap_us = 2000;
	pid_t child = start((const char *const[]){"--out", path, "--seq-len", "1..40+1", NULL});

	while (whole_rows() < 7 && waitpid(child, NULL, WNOHANG) == 0)
		nanosleep(&(struct timespec){0, 1000000}, NULL);
	kill(child, SIGKILL);
	assert_int_equal(program_finish(child), 128 + SIGKILL);
	journal->nap_us = 0;
	return whole_rows();
}

/* Every row has its samples, no sample lacks its row, and their median is the row's. */
static void expect_samples(const struct csv *rows)
{
	struct csv csv;
	int total = 0;

	require_ok(csv_read(samples, &csv));
	for (int row = 0; row < rows->n_rows; row++) {
		double ms[MAX_SAMPLES];
		int n = 0;

		for (int i = 0; i < csv.n_rows; i++)
			if (strcmp(csv_text(&csv, i, "case_id"), csv_text(rows, row, "case_id")) ==
			    0)
				ms[n++] = csv_number(&csv, i, "latency_ms");
		assert_int_equal(n, (int)csv_number(rows, row, "samples"));
		assert_true(fabs(median_of(ms, n) / csv_number(rows, row, "latency_ms") - 1) <
		            1e-5);
		total += n;
	}
	assert_int_equal(total, csv.n_rows);
	csv_release(&csv);
}

TEST(resumes_after_sigkill)
{
	/* As the kill left the file; the last line cut; and cut down to a quote's inside. */
	static const off_t cuts[] = {0, 1, 40};
	struct csv csv;

	for (size_t i = 0; i < COUNT_OF(cuts); i++) {
		new_file(state);
		int rows = kill_in_the_middle();

		assert_in_range(rows, 7, 39);
		assert_int_equal(truncate(path, file_size() - cuts[i]), 0);
		journal->verified = 0;
		assert_int_equal(RUN("--out", path, "--seq-len", "1..40+1", "--resume"), 0);
		/* Finished cases are not run again. */
		assert_int_equal(journal->verified, 40 - rows + (cuts[i] > 0));
		read_rows(&csv, path, 40);
		assert_false(csv.cut);
		for (int t = 1; t <= 40; t++)
			assert_string_equal(csv_text(&csv, row_of(&csv, t), "run_id"),
			                    csv_text(&csv, 0, "run_id"));
		expect_samples(&csv);
		csv_release(&csv);
	}
}

TEST(repairs_a_cut_header)
{
	assert_int_equal(RUN("--out", path, "--seq-len", "1"), 0);
	assert_int_equal(truncate(path, 20), 0);
	assert_int_equal(RUN("--out", path, "--seq-len", "1,2", "--resume"), 0);
	assert_int_equal(whole_rows(), 2);
}

TEST(tries_failed_cases_again)
{
	assert_int_equal(RUN("--out", path, "--seq-len", "1002..1007+1"), 1);
	journal->verified = 0;
	assert_int_equal(RUN("--out", path, "--seq-len", "1002..1007+1", "--resume"), 1);
	/* Mismatches and errors are not final; oom and skipped are, while the limits are. */
	assert_int_equal(journal->verified, 2);
	assert_int_equal(whole_rows(), 9);
}

TEST(writes_nothing_after_a_mistake)
{
	assert_int_equal(RUN("--out", path, "--seq-len", "0"), 2);
	assert_int_equal(RUN("--out", path, "--seq-len", "1008"), 2);
	assert_int_equal(RUN("--out", path, "--backend", "tpu"), 2);
	assert_int_equal(RUN("--out", path, "--device", "1"), 2);
	assert_int_equal(RUN("--out", path, "--provider", "nobody"), 2);
	assert_int_equal(RUN("--out", path, "--resume", "--truncate"), 2);
	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--dry-run"), 0);
	assert_int_equal(RUN("--out", path, "--list"), 0);
	assert_int_equal(access(path, F_OK), -1);
	assert_int_equal(journal->launches, 0);
}

TEST(breaks_down_without_rows)
{
	assert_int_equal(RUN("--out", path, "--seq-len", "1,2", "--breakdown"), 0);
	assert_int_equal(access(path, F_OK), -1);
	assert_int_equal(journal->verified, 2);
	/* A case that cannot run is said to, an error ends the program. */
	assert_int_equal(RUN("--seq-len", "1002,1003,1", "--breakdown"), 0);
	assert_int_equal(journal->verified, 3);
}

/* Writes the file anew. */
static void write_content(const char *content, size_t length)
{
	FILE *file = fopen(path, "wb");

	assert_non_null(file);
	assert_int_equal(fwrite(content, 1, length, file), length);
	assert_int_equal(fclose(file), 0);
}

/* What is in the file, to be freed. */
static char *read_content(size_t *length)
{
	FILE *file = fopen(path, "rb");
	char *content;

	assert_non_null(file);
	content = csv_read_bytes(file, length);
	assert_non_null(content);
	fclose(file);
	return content;
}

static void expect_content(const char *content, size_t length)
{
	size_t now;
	scoped char *bytes = read_content(&now);

	assert_int_equal(now, length);
	assert_memory_equal(bytes, content, length);
}

/* A file that is not ours is left alone, whatever the mode. */
static void expect_refusal(const char *content, size_t length)
{
	static const char *const modes[] = {"--warm", "--resume", "--truncate"};

	for (size_t i = 0; i < COUNT_OF(modes); i++) {
		write_content(content, length);
		assert_int_equal(RUN("--out", path, "--seq-len", "1", modes[i]), 2);
		expect_content(content, length);
	}
}

TEST(leaves_foreign_files_alone)
{
	static const char *const foreign[] = {
	        "precious, no newline",
	        "precious\n",
	        "\n",
	        "\n\n\nschema",
	        "s",
	        "schema",
	        "schema,other\n1,2\n",
	        "year,rain\n2025,\"1,5\"\n",
	        "two lines\nand a last one without its end",
	        "#include <stdio.h>\n\nint main(void)\n{\n\treturn 0;\n}\n",
	        "a \" quote that never ends\nmore\nmore\n",
	        "\xff\xfe\x01\x02\x7f",
	};
	static const char binary[] = "\x7f"
	                             "ELF\0\0\0\1\0no newline";

	for (size_t i = 0; i < COUNT_OF(foreign); i++)
		expect_refusal(foreign[i], strlen(foreign[i]));
	expect_refusal(binary, sizeof binary);
	assert_int_equal(journal->launches, 0);
}

/* Replaces every `from` by `to`. */
static void replace_bytes(char *text, size_t length, char from, char to)
{
	for (size_t i = 0; i < length; i++)
		text[i] = text[i] == from ? to : text[i];
}

TEST(leaves_files_alone_that_are_almost_ours)
{
	size_t length;

	assert_int_equal(RUN("--out", path, "--seq-len", "1..3+1"), 0);
	scoped char *ours = read_content(&length);
	scoped char *other = new_memory(length + 64);

	/* Line ends of another system, one line to us. */
	memcpy(other, ours, length);
	replace_bytes(other, length, '\n', '\r');
	expect_refusal(other, length);
	/* A schema that we do not know. */
	memcpy(other, ours, length);
	strchr(other, '\n')[1] = '9';
	expect_refusal(other, length);
	/* Something else at the end, which is no row that was cut. */
	memcpy(other, ours, length);
	memcpy(other + length, "a note", 6);
	expect_refusal(other, length + 6);
	memcpy(other + length, "3,\"a\nb", 6);
	expect_refusal(other, length + 6);
	/* A row with a field less. */
	memcpy(other, ours, length);
	other[length] = '\0';
	*strrchr(other, ',') = ' ';
	expect_refusal(other, length);
}

TEST(keeps_rows_whose_lines_end_in_two_bytes)
{
	size_t length, n = 0;

	assert_int_equal(RUN("--out", path, "--seq-len", "1..3+1"), 0);
	scoped char *ours = read_content(&length);
	scoped char *other = new_memory(2 * length);

	for (size_t i = 0; i < length; i++) {
		if (ours[i] == '\n')
			other[n++] = '\r';
		other[n++] = ours[i];
	}
	write_content(other, n);
	assert_int_equal(RUN("--out", path, "--seq-len", "1..4+1", "--resume"), 0);
	assert_int_equal(whole_rows(), 4);
}

/* The columns of an earlier program: nothing is added, but they may be replaced. */
TEST(replaces_its_own_old_files_only_when_told)
{
	static const char old[] = "schema,run_id,time_utc,git_sha,device,program,block,pass,"
	                          "seq_len,status\n1,a,b,c,d,e,f,prefill,1,ok\n";

	write_content(old, strlen(old));
	assert_int_equal(RUN("--out", path, "--seq-len", "1"), 2);
	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--resume"), 2);
	expect_content(old, strlen(old));
	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--truncate"), 0);
	assert_int_equal(whole_rows(), 1);
}

/* The folder that all programs share: a new program starts a new file and loses no old one. */
TEST(moves_old_files_below_runs_aside)
{
	static const char old[] = "schema,run_id,time_utc,git_sha,device,program,block,pass,"
	                          "seq_len,status\n1,a,b,c,d,e,f,prefill,1,ok\n";
	static const char *const made[] = {"runs/x/rows.old-1.csv", "runs/x/rows.old-2.csv",
	                                   "runs/x/rows.old-2.samples.csv", "runs/x/rows.csv",
	                                   "runs/x/rows.samples.csv"};
	scoped_csv struct csv csv;
	char home[4096];

	assert_non_null(getcwd(home, sizeof home));
	assert_int_equal(chdir(folder), 0);
	assert_true(mkdir("runs", 0777) == 0 && mkdir("runs/x", 0777) == 0);
	for (int i = 0; i < 2; i++) {
		FILE *file = fopen("runs/x/rows.csv", "w");

		fputs(old, file);
		fclose(file);
		if (i == 1)
			fclose(fopen("runs/x/rows.samples.csv", "w"));
		assert_int_equal(RUN("--out", "runs/x/rows.csv", "--seq-len", "1"), 0);
	}
	assert_int_equal(csv_read("runs/x/rows.csv", &csv), STATUS_OK);
	assert_int_equal(csv.n_rows, 1);
	for (size_t i = 0; i < COUNT_OF(made); i++)
		assert_int_equal(unlink(made[i]), 0);
	assert_true(rmdir("runs/x") == 0 && rmdir("runs") == 0);
	assert_int_equal(chdir(home), 0);
}

TEST(leaves_a_file_to_its_first_writer)
{
	assert_int_equal(RUN("--out", path, "--seq-len", "1"), 0);
	const int descriptor = open(path, O_RDONLY);
	size_t length;
	scoped char *before = read_content(&length);

	assert_int_equal(flock(descriptor, LOCK_EX), 0);
	assert_int_equal(RUN("--out", path, "--seq-len", "1,2"), 2);
	assert_int_equal(RUN("--out", path, "--seq-len", "1,2", "--resume"), 2);
	assert_int_equal(RUN("--out", path, "--seq-len", "1,2", "--truncate"), 2);
	expect_content(before, length);
	/* That of a killed one vanishes. */
	close(descriptor);
	assert_int_equal(RUN("--out", path, "--seq-len", "1,2", "--resume"), 0);
	assert_int_equal(whole_rows(), 2);
}

static int fake_with_closed_streams(int argc, char **argv)
{
	close(STDIN_FILENO);
	close(STDOUT_FILENO);
	close(STDERR_FILENO);
	return fake_main(argc, argv);
}

TEST(prints_nothing_into_its_rows)
{
	const char *const words[] = {"test",  "--backend", "cpu",       "--max-time", "0.001",
	                             "--out", path,        "--seq-len", "1..3+1"};
	scoped_csv struct csv csv;

	assert_int_equal(program_finish(program_start(fake_with_closed_streams, COUNT_OF(words),
	                                              (char **)words)),
	                 0);
	read_rows(&csv, path, 3);
	assert_false(csv.cut);
}

static int fake_into(const char *stream, int argc, char **argv)
{
	const int descriptor = open(stream, O_WRONLY | O_CREAT | O_APPEND, 0666);

	dup2(descriptor, STDOUT_FILENO);
	return fake_main(argc, argv);
}

static int fake_into_its_rows(int argc, char **argv)
{
	return fake_into(path, argc, argv);
}

static int fake_into_full_disk(int argc, char **argv)
{
	return fake_into("/dev/full", argc, argv);
}

/* Standard output that nobody reads any more. */
static int fake_into_broken_pipe(int argc, char **argv)
{
	int ends[2];

	if (pipe(ends) != 0)
		return 99;
	close(ends[0]);
	dup2(ends[1], STDOUT_FILENO);
	signal(SIGPIPE, SIG_DFL);
	setvbuf(stdout, NULL, _IONBF, 0);
	return fake_main(argc, argv);
}

TEST(saves_rows_whatever_becomes_of_what_is_printed)
{
	/* Of a table, the first line is its header: the run ends there. */
	const char *const words[] = {"test", "--backend", "cpu",    "--max-time", "0.001", "--out",
	                             path,   "--seq-len", "1..3+1", "--format",   "table"};
	int n = COUNT_OF(words);

	assert_int_equal(program_finish(program_start(fake_into_its_rows, n, (char **)words)), 2);
	assert_int_equal(file_size(), 0);
	assert_int_equal(program_finish(program_start(fake_into_full_disk, n, (char **)words)), 2);
	assert_int_equal(whole_rows(), 3);
	unlink(path);
	assert_int_equal(program_finish(program_start(fake_into_broken_pipe, n, (char **)words)),
	                 128 + SIGPIPE);
}

TEST(saves_a_row_before_it_prints_it)
{
	journal->nap_us = 2000;
	int ends[2];
	assert_int_equal(pipe(ends), 0);
	const char *const words[] = {"test", "--backend", "cpu",     "--max-time", "0.001", "--out",
	                             path,   "--seq-len", "1..40+1", "--format",   "csv"};
	const pid_t child = fork();

	if (child == 0) {
		close(ends[0]);
		dup2(ends[1], STDOUT_FILENO);
		signal(SIGPIPE, SIG_DFL);
		setvbuf(stdout, NULL, _IOLBF, 0);
		_exit(fake_main(COUNT_OF(words), (char **)words));
	}
	close(ends[1]);
	FILE *printed = fdopen(ends[0], "r");
	char line[4096];
	/* Reads the header and two rows, and goes away. */
	for (int i = 0; i < 3; i++) {
		assert_non_null(fgets(line, sizeof line, printed));
		assert_true(whole_rows() >= i);
	}
	fclose(printed);
	assert_int_equal(program_finish(child), 128 + SIGPIPE);
	assert_in_range(whole_rows(), 3, 39);
}

/* Changes a field of the only row. */
static void set_field(const char *column, const char *value)
{
	struct csv csv;
	FILE *file;

	read_rows(&csv, path, 1);
	file = fopen(path, "w");
	assert_non_null(file);
	for (int i = 0; i < csv.n_columns; i++)
		fprintf(file, "%s%s", i ? "," : "", csv.header[i]);
	for (int i = 0; i < csv.n_columns; i++) {
		fputc(i ? ',' : '\n', file);
		csv_write_field(file, strcmp(csv.header[i], column) == 0 ? value : csv.fields[i]);
	}
	fputc('\n', file);
	fclose(file);
	csv_release(&csv);
}

TEST(resumes_only_rows_of_its_own_build)
{
	static const char *const other[][2] = {
	        {"git_sha", "0123456"},
	        {"git_dirty", "2"},
	        {"build", "x86-64 address"},
	        {"compiler", "cc 1"},
	};

	assert_int_equal(RUN("--out", path, "--seq-len", "1"), 0);
	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--resume"), 0);
	assert_int_equal(whole_rows(), 1);
	for (size_t i = 0; i < COUNT_OF(other); i++) {
		set_field(other[i][0], other[i][1]);
		assert_int_equal(RUN("--out", path, "--seq-len", "1", "--resume"), 0);
		assert_int_equal(whole_rows(), 2);
		new_file(state);
		assert_int_equal(RUN("--out", path, "--seq-len", "1"), 0);
	}
}

TEST(tries_again_what_a_limit_no_longer_forbids)
{
	/* Predicted for 1007: about 1e18 operations. */
	assert_int_equal(RUN("--out", path, "--seq-len", "1007"), 0);
	assert_int_equal(RUN("--out", path, "--seq-len", "1007", "--resume"), 0);
	assert_int_equal(whole_rows(), 1);
	assert_int_equal(RUN("--out", path, "--seq-len", "1007", "--resume", "--case-seconds", "0"),
	                 0);
	assert_int_equal(whole_rows(), 2);
	assert_int_equal(journal->verified, 1);
	/* That it was skipped once does not hide that it has been measured since. */
	assert_int_equal(RUN("--out", path, "--seq-len", "1007", "--resume"), 0);
	assert_int_equal(whole_rows(), 2);
	/* A case that wanted more memory than was free then, and wants less than is free now. */
	new_file(state);
	assert_int_equal(RUN("--out", path, "--seq-len", "1003"), 0);
	assert_int_equal(RUN("--out", path, "--seq-len", "1003", "--resume"), 0);
	assert_int_equal(whole_rows(), 1);
	set_field("memory_bytes", "1");
	assert_int_equal(RUN("--out", path, "--seq-len", "1003", "--resume"), 0);
	assert_int_equal(whole_rows(), 2);
}

TEST(says_first_that_it_cannot_write)
{
	assert_int_equal(RUN("--out", "/proc/nowhere/x.csv", "--seq-len", "1"), 2);
	assert_int_equal(RUN("--out", folder, "--seq-len", "1"), 2);
	assert_int_equal(RUN("--out", "/dev/full", "--seq-len", "1"), 2);
	assert_int_equal(journal->launches, 0);
}

/* Opens a file of a folder as somebody who may not write there; the message must say so. */
static int open_as_nobody(int argc, char **argv)
{
	const struct record_terms terms = {.git_sha = "", .build = "", .compiler = ""};
	struct record_file file;

	if (getuid() == 0 && setuid(65534) != 0)
		return 99;
	if (record_open(&file, argv[0], RECORD_APPEND, &terms) != STATUS_IO)
		return 1;
	return strstr(status_message(), "Permission denied") && strstr(status_message(), argv[1])
	               ? 0
	               : 2;
}

TEST(says_that_it_may_not_write)
{
	char deeper[96];
	const char *words[] = {path, path};

	assert_int_equal(chmod(folder, 0555), 0);
	assert_int_equal(program_finish(program_start(open_as_nobody, 2, (char **)words)), 0);
	snprintf(deeper, sizeof deeper, "%s/sub/rows.csv", folder);
	words[0] = deeper;
	words[1] = "/sub";
	assert_int_equal(program_finish(program_start(open_as_nobody, 2, (char **)words)), 0);
	assert_int_equal(chmod(folder, 0777), 0);
	write_content("", 0);
	assert_int_equal(chmod(path, 0444), 0);
	words[0] = words[1] = path;
	assert_int_equal(program_finish(program_start(open_as_nobody, 2, (char **)words)), 0);
}

static int set_up(void **state)
{
	journal = mmap(NULL, sizeof *journal, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
	               -1, 0);
	if (journal == MAP_FAILED || !mkdtemp(folder))
		return -1;
	snprintf(path, sizeof path, "%s/rows.csv", folder);
	snprintf(samples, sizeof samples, "%s/rows.samples.csv", folder);
	return 0;
}

static int tear_down(void **state)
{
	new_file(state);
	return rmdir(folder);
}

FIXTURE(set_up, tear_down, new_file)
