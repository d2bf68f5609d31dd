/* The CPU against every golden file, and the check against a file it must not pass. */
#include "tests/test.h"

#include <glob.h>
#include <unistd.h>

#include "bench/golden_check.h"

/* Fewer files than this: the pattern below has missed some. */
enum { MIN_FILES = 32, MAX_FILES = 64 };

static struct device *device;

static enum status check_file(const char *path, int64_t chunk, struct golden_report *report)
{
	const struct golden_options options = {.device = device, .chunk = chunk};

	return golden_check(&options, path, report);
}

static void check(const char *path, int64_t chunk)
{
	struct golden_report report;
	enum status status = check_file(path, chunk, &report);

	for (int i = 0; i < report.n_results; i++)
		if (report.results[i].verdict != GOLDEN_PASS)
			print_error("%s, chunk %d: %s is %.2e off: %s\n", path, (int)chunk,
			            report.results[i].tensor, report.results[i].rel_err,
			            golden_verdict_name(report.results[i].verdict));
	if (status != STATUS_OK)
		fail_msg("%s: %s: %s", path, status_name(status), status_message());
	assert_int_equal(report.n_failed, 0);
	assert_string_equal(report.unsupported, "");
	assert_int_equal(report.n_results, report.count[GOLDEN_PASS]);
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

/* What every pass of a layer is compared with. */
TEST(test_passes_of_a_layer)
{
	static const char *const results[] = {
	        "y",
	        "dx",
	        "grad.D",
	        "y (prefill)",
	        "y_step",
	        "state.s (prefill)",
	        "state.s (steps)",
	        "state.conv (prefill)",
	        "state.conv (steps)",
	};
	struct golden_report report;

	require_ok(check_file("tests/golden/layer_mamba2.safetensors", 0, &report));
	for (size_t i = 0; i < COUNT_OF(results); i++)
		assert_non_null(golden_find(&report, results[i]));
	require_ok(check_file("tests/golden/layer_swa.safetensors", 0, &report));
	assert_non_null(golden_find(&report, "y - x (steps)"));
	require_ok(check_file("tests/golden/model_rat_swa.safetensors", 0, &report));
	assert_non_null(golden_find(&report, "logits (prefill)"));
	assert_non_null(golden_find(&report, "logits (steps)"));
}

/* Reads a whole file of at most a few MB; the caller frees it. */
static char *read_all(const char *path, size_t *size)
{
	FILE *file = fopen(path, "rb");
	char *bytes = new_memory(4 << 20);

	assert_non_null(file);
	*size = fread(bytes, 1, 4 << 20, file);
	assert_true(feof(file));
	fclose(file);
	return bytes;
}

/* Checks a file of these bytes, and frees them. */
static enum status check_bytes(char *bytes, size_t size, struct golden_report *report)
{
	char copy[] = "/tmp/golden-test-XXXXXX";
	int descriptor = mkstemp(copy);

	assert_true(descriptor >= 0);
	assert_int_equal(write(descriptor, bytes, size), size);
	close(descriptor);
	enum status status = check_file(copy, 0, report);
	unlink(copy);
	free(bytes);
	return status;
}

/* The first place of `text` in the file's header. */
static char *find_text(char *bytes, size_t size, const char *text)
{
	size_t i = 8;

	while (i + strlen(text) < size && memcmp(bytes + i, text, strlen(text)) != 0)
		i++;
	assert_true(i + strlen(text) < size);
	return bytes + i;
}

/* Checks a copy of `path` in which the first `from` of the header reads `to`, as long. */
static enum status check_edited(const char *path, const char *from, const char *to,
                                struct golden_report *report)
{
	size_t size;
	char *bytes = read_all(path, &size);

	assert_int_equal(strlen(from), strlen(to));
	for (char *byte = find_text(bytes, size, from); *to; to++)
		*byte++ = *to;
	return check_bytes(bytes, size, report);
}

/* Such a copy is refused with a message that says `reason`. */
static void refuse(const char *path, const char *from, const char *to, const char *reason)
{
	struct golden_report report;

	assert_int_equal(check_edited(path, from, to, &report), STATUS_INVALID);
	expect_message(path, reason);
}

static const char delta[] = "tests/golden/op_delta_rule.safetensors";
static const char swa[] = "tests/golden/layer_swa.safetensors";
static const char mamba2[] = "tests/golden/layer_mamba2.safetensors";

TEST(test_tensor_that_nothing_compares)
{
	struct golden_report report;

	assert_int_equal(check_edited(delta, "\"final_state\"", "\"final_stale\"", &report),
	                 STATUS_MISMATCH);
	assert_int_equal(report.n_failed, 1);
	assert_int_equal(golden_find(&report, "final_stale")->verdict, GOLDEN_NOT_COMPARED);
	assert_int_equal(golden_find(&report, "o")->verdict, GOLDEN_PASS);
	assert_int_equal(check_edited(mamba2, "\"state.s\"", "\"state.z\"", &report),
	                 STATUS_MISMATCH);
	assert_int_equal(report.n_failed, 1);
	assert_int_equal(golden_find(&report, "state.z")->verdict, GOLDEN_NOT_COMPARED);
}

TEST(test_missing_and_unknown_things)
{
	refuse(delta, "\"beta\"", "\"bela\"", "no tensor 'beta'");
	refuse(delta, "\"beta\"", "\"btea\"", "no tensor 'beta'");
	refuse(swa, "\"block\"", "\"blonk\"", "names no block");
	refuse(swa, "param.in_proj.weight", "param.in_broj.weight",
	       "param.in_broj.weight of the file is not in the layer");
	refuse(swa, "param.in_proj.weight", "parat.in_proj.weight",
	       "rows 0..383 of the parameter in_proj of layer 0");
	refuse("tests/golden/layer_gla.safetensors", "param.v_proj.weight", "parat.v_proj.weight",
	       "rows 128..255 of the parameter in_proj");
	refuse("tests/golden/layer_gla.safetensors", "mixer only", "mixed only",
	       "parameter norm_weight");
	refuse("tests/golden/model_rat.safetensors", "param.head.", "parat.head.",
	       "parameter head of layer -1");
	refuse("tests/golden/layer_rat_L16.safetensors", "\"chunk_size\":\"16\"",
	       "\"chunk_size\":\"-6\"", "chunk_size is -6");
	refuse(swa, "\"10000\"", "\"20000\"", "rope_base");
	refuse(mamba2, "\"norm_before_gate\":\"0\"", "\"norm_before_gate\":\"1\"",
	       "norm_before_gate");
}

/* As many elements, and another shape. */
TEST(test_wrong_shapes)
{
	refuse(swa, "\"param.in_proj.weight\":{\"dtype\":\"F32\",\"shape\":[384,128]",
	       "\"param.in_proj.weight\":{\"dtype\":\"F32\",\"shape\":[128,384]",
	       "is [128, 384], not [384, 128]");
	refuse(swa, "\"y\":{\"dtype\":\"F32\",\"shape\":[1,100,128]",
	       "\"y\":{\"dtype\":\"F32\",\"shape\":[1,128,100]", "'y' is [1, 128, 100]");
	refuse(mamba2, "\"state.s\":{\"dtype\":\"F32\",\"shape\":[2,2,64,128]",
	       "\"state.s\":{\"dtype\":\"F32\",\"shape\":[2,2,128,64]", "not [2, 2, 64, 128]");
	refuse(delta, "\"beta\":{\"dtype\":\"F32\",\"shape\":[2,77,2]",
	       "\"beta\":{\"dtype\":\"F32\",\"shape\":[77,2,2]", "'beta' is [77, 2, 2]");
}

/* Nothing of the file is compared, and nothing has failed. */
static void expect_unsupported(const char *path, const char *from, const char *to,
                               const char *reason)
{
	struct golden_report report;

	require_ok(check_edited(path, from, to, &report));
	assert_non_null(strstr(report.unsupported, reason));
	assert_true(report.count[GOLDEN_UNSUPPORTED] > 0);
	assert_int_equal(report.count[GOLDEN_UNSUPPORTED], report.n_results);
	assert_int_equal(report.n_failed, 0);
}

TEST(test_what_does_not_exist)
{
	expect_unsupported(delta, "\"delta_rule\"", "\"delta_roll\"", "no operation 'delta_roll'");
	expect_unsupported(swa, "local_attention", "focal_attention", "no block 'focal_attention'");
}

/* A file of a forward pass alone is no training. */
TEST(test_forward_only)
{
	struct golden_report report;

	assert_int_equal(check_edited(mamba2, "\"dy\"", "\"dq\"", &report), STATUS_MISMATCH);
	assert_null(golden_find(&report, "y"));
	assert_int_equal(golden_find(&report, "y_step")->verdict, GOLDEN_PASS);
	assert_int_equal(golden_find(&report, "y (prefill)")->verdict, GOLDEN_PASS);
	assert_int_equal(golden_find(&report, "dx")->verdict, GOLDEN_NOT_COMPARED);
}

/* One number of a stored tensor is NaN: the result, and no other, is a miss. */
TEST(test_expected_value_changed)
{
	static const struct {
		const char *path, *tensor, *result;
	} cases[] = {
	        {"tests/golden/op_retention.safetensors", "o", "o"},
	        {delta, "final_state", "final_state"},
	        {delta, "dbeta", "dbeta"},
	        {mamba2, "y_step", "y_step"},
	        {mamba2, "grad.in_proj.weight", "grad.in_proj.weight"},
	        {swa, "dx", "dx - dy"},
	};
	const float nan = NAN;
	struct golden_report report;

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		char name[64];
		size_t size, begin, end;
		uint64_t header;
		char *bytes = read_all(cases[i].path, &size);

		snprintf(name, sizeof name, "\"%s\":", cases[i].tensor);
		char *entry = find_text(bytes, size, name);
		entry = find_text(entry - 8, size - (size_t)(entry - bytes), "offsets\":[");
		assert_int_equal(sscanf(entry, "offsets\":[%zu,%zu", &begin, &end), 2);
		memcpy(&header, bytes, sizeof header);
		memcpy(bytes + 8 + header + end - sizeof nan, &nan, sizeof nan);
		assert_int_equal(check_bytes(bytes, size, &report), STATUS_MISMATCH);
		assert_true(isnan(golden_find(&report, cases[i].result)->rel_err));
		assert_int_equal(report.n_failed, 1);
	}
}

int main(void)
{
	struct CMUnitTest files[MAX_FILES];
	glob_t found;
	int failed;

	if (cpu_backend.open(NULL, NULL, &device) != STATUS_OK)
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
	failed += tests_run();
	globfree(&found);
	device_close(device);
	return failed;
}
