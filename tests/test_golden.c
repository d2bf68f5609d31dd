/* The CPU backend against every golden file, and the check against a file it must not pass. */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <glob.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/golden_check.h"

/* Fewer files than this: the pattern below has missed some. */
enum { MIN_FILES = 19, MAX_FILES = 64 };

static void check(const char *path, int64_t chunk)
{
	struct golden_options options = {.backend = &cpu_backend, .chunk = chunk};
	struct golden_report report;
	enum status status = golden_check(&options, path, &report);

	for (int i = 0; i < report.n_results; i++)
		if (report.results[i].verdict != GOLDEN_PASS)
			print_error("%s, chunk %d: %s is %.2e off: %s\n", path, (int)chunk,
			            report.results[i].tensor, report.results[i].rel_err,
			            golden_verdict_name(report.results[i].verdict));
	if (status != STATUS_OK)
		fail_msg("%s: %s: %s", path, status_name(status), status_message());
	assert_int_equal(report.n_failed, 0);
	assert_string_equal(report.unsupported, "");
	assert_true(report.n_results > 0);
}

static void test_file(void **state)
{
	const char *path = *state;

	check(path, 0);
	/* Chunk lengths that T = 77 is, and is not, a multiple of; and the plain recurrence. */
	for (int64_t chunk = 1; strstr(path, "/op_") && chunk <= 128; chunk = chunk * 3 + 4)
		check(path, chunk);
}

/* Reads a whole file of at most a few MB; the caller frees it. */
static char *read_all(const char *path, size_t *size)
{
	FILE *file = fopen(path, "rb");
	char *bytes = malloc(4 << 20);

	assert_non_null(file);
	assert_non_null(bytes);
	*size = fread(bytes, 1, 4 << 20, file);
	assert_true(feof(file));
	fclose(file);
	return bytes;
}

/* Checks a copy of `path` in which the first `from` of the header reads `to`, as long. */
static enum status check_edited(const char *path, const char *from, const char *to,
                                struct golden_report *report)
{
	struct golden_options options = {.backend = &cpu_backend};
	char copy[] = "/tmp/golden-test-XXXXXX";
	int descriptor = mkstemp(copy);
	size_t size, i = 8;
	char *bytes = read_all(path, &size);

	assert_true(descriptor >= 0);
	while (i + strlen(from) < size && memcmp(bytes + i, from, strlen(from)) != 0)
		i++;
	assert_true(i + strlen(from) < size);
	memcpy(bytes + i, to, strlen(from));
	assert_int_equal(write(descriptor, bytes, size), size);
	close(descriptor);
	enum status status = golden_check(&options, copy, report);
	unlink(copy);
	free(bytes);
	return status;
}

static void test_tensor_that_nothing_compares(void **state)
{
	struct golden_report report;

	(void)state;
	assert_int_equal(check_edited("tests/golden/op_delta_rule.safetensors", "\"final_state\"",
	                              "\"final_stale\"", &report),
	                 STATUS_MISMATCH);
	assert_int_equal(report.n_failed, 1);
	assert_int_equal(golden_find(&report, "final_stale")->verdict, GOLDEN_NOT_COMPARED);
	assert_int_equal(golden_find(&report, "o")->verdict, GOLDEN_PASS);
}

static void test_missing_and_unknown_things(void **state)
{
	struct golden_report report;

	(void)state;
	assert_int_equal(check_edited("tests/golden/op_delta_rule.safetensors", "\"beta\"",
	                              "\"bela\"", &report),
	                 STATUS_INVALID);
	assert_int_equal(check_edited("tests/golden/op_delta_rule.safetensors", "delta_rule",
	                              "delta_roll", &report),
	                 STATUS_INVALID);
	assert_int_equal(check_edited("tests/golden/layer_swa.safetensors", "param.in_proj.weight",
	                              "param.in_broj.weight", &report),
	                 STATUS_INVALID);
	assert_int_equal(check_edited("tests/golden/layer_rat_L16.safetensors",
	                              "\"chunk_size\":\"16\"", "\"chunk_size\":\"-6\"", &report),
	                 STATUS_INVALID);
	assert_int_equal(check_edited("tests/golden/layer_swa.safetensors", "\"10000\"",
	                              "\"20000\"", &report),
	                 STATUS_INVALID);
}

/* One bit more in a stored value is a miss: the comparison does look at the numbers. */
static void test_expected_value_changed(void **state)
{
	struct golden_report report;
	struct golden_options options = {.backend = &cpu_backend};
	char copy[] = "/tmp/golden-test-XXXXXX";
	int descriptor = mkstemp(copy);
	size_t size;
	char *bytes = read_all("tests/golden/op_retention.safetensors", &size);

	(void)state;
	assert_true(descriptor >= 0);
	/* Values begin after the header; its tensors are k, o, q, v, so a third in is inside o. */
	uint32_t nan = 0x7fc00000;
	memcpy(bytes + size / 3 / 4 * 4, &nan, sizeof nan);
	assert_int_equal(write(descriptor, bytes, size), size);
	close(descriptor);
	assert_int_equal(golden_check(&options, copy, &report), STATUS_MISMATCH);
	assert_true(isnan(golden_find(&report, "o")->rel_err));
	unlink(copy);
	free(bytes);
}

int main(void)
{
	const struct CMUnitTest own[] = {
	        cmocka_unit_test(test_tensor_that_nothing_compares),
	        cmocka_unit_test(test_missing_and_unknown_things),
	        cmocka_unit_test(test_expected_value_changed),
	};
	struct CMUnitTest files[MAX_FILES];
	glob_t found;
	int failed;

	if (cpu_backend.open(0) != STATUS_OK)
		return 1;
	if (glob("tests/golden/*.safetensors", 0, NULL, &found) != 0 ||
	    found.gl_pathc < MIN_FILES || found.gl_pathc > MAX_FILES) {
		fprintf(stderr,
		        "tests/golden is incomplete (run this from the repository's root)\n");
		return 1;
	}
	for (size_t i = 0; i < found.gl_pathc; i++)
		files[i] = (struct CMUnitTest){found.gl_pathv[i], test_file, NULL, NULL,
		                               found.gl_pathv[i]};
	failed = _cmocka_run_group_tests("golden files", files, found.gl_pathc, NULL, NULL);
	failed += cmocka_run_group_tests_name("the check itself", own, NULL, NULL);
	globfree(&found);
	cpu_backend.close();
	return failed;
}
