/*
 * Whole runs of the harness with a subject that is no layer: every outcome has
 * its row, files survive a SIGKILL, variants alternate, mistakes leave nothing behind.
 */
#include "tests/programs.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench/harness/bench.h"

/* What a case does is in its sequence length; others are fine. */
enum { T_UNSUPPORTED = 1002, T_TOO_LARGE, T_WRONG, T_NAN, T_DEVICE_ERROR, T_TOO_SLOW, T_MISTAKE };

/* In memory shared with the child that runs. */
struct log {
	int launches, verified, poisoned, unverified_samples, nap_us;
	char order[256]; /* the variant of each launch, by the number of its choices */
};

static struct log *journal;
static char folder[] = "/tmp/test_sweep_XXXXXX", path[64];

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

static int fake_main(int argc, char **argv)
{
	static const struct subject subject = {
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
	char *argv[24] = {(char *)"test", (char *)"--backend", (char *)"cpu", (char *)"--max-time",
	                  (char *)"0.001"};
	int argc = 5;

	while (*arguments)
		argv[argc++] = (char *)*arguments++;
	return program_start(fake_main, argc, argv);
}

#define RUN(...) program_finish(start((const char *const[]){__VA_ARGS__, NULL}))

static int new_file(void **state)
{
	memset(journal, 0, sizeof *journal);
	unlink(path);
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
	assert_true(csv_number(&csv, row, "samples") >= 3);
	assert_true(csv_number(&csv, row, "latency_p20_ms") <=
	            csv_number(&csv, row, "latency_p80_ms"));
	assert_true(csv_number(&csv, row, "gemm_tflops") > 0);
	assert_true(csv_number(&csv, row_of(&csv, T_TOO_SLOW), "predicted_ms") > 1e4);
	assert_true(csv_number(&csv, row_of(&csv, T_TOO_LARGE), "memory_bytes") > 1e6);
	assert_true(strlen(csv_text(&csv, row, "git_sha")) > 0);
	assert_int_equal(journal->unverified_samples, 0);
}

TEST(alternates_samples_of_variants)
{
	scoped_csv struct csv csv;

	assert_int_equal(RUN("--out", path, "--seq-len", "1", "--samples", "3", "--provider", "cpu",
	                     "--provider", "gelu=cpu,cpu"),
	                 0);
	/* The first sample of each is verified; from then on they take turns. */
	assert_string_equal(journal->order, "121212");
	assert_int_equal(journal->verified, 2);
	read_rows(&csv, path, 2);
	assert_string_equal(csv_text(&csv, 0, "requested"), "cpu");
	assert_string_equal(csv_text(&csv, 1, "requested"), "gelu=cpu,cpu");
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
	/* unsupported, oom and skipped are final; mismatches and errors are not. */
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

TEST(says_first_that_it_cannot_write)
{
	FILE *file = fopen(path, "w");

	/* Somebody's table with other columns is not touched. */
	fputs("year,rain\n2025,\"1,5\"\n", file);
	fclose(file);
	assert_int_equal(RUN("--out", path, "--seq-len", "1"), 2);
	assert_int_equal(file_size(), 21);
	assert_int_equal(RUN("--out", "/proc/nowhere/x.csv", "--seq-len", "1"), 2);
	assert_int_equal(RUN("--out", folder, "--seq-len", "1"), 2);
	assert_int_equal(journal->launches, 0);
}

static int set_up(void **state)
{
	journal = mmap(NULL, sizeof *journal, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
	               -1, 0);
	if (journal == MAP_FAILED || !mkdtemp(folder))
		return -1;
	snprintf(path, sizeof path, "%s/rows.csv", folder);
	return 0;
}

static int tear_down(void **state)
{
	new_file(state);
	return rmdir(folder);
}

FIXTURE(set_up, tear_down, new_file)
