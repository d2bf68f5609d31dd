/* The CPU against every golden file, and the check against a file it must not pass. */
#include "tests/test.h"

#include <glob.h>
#include <unistd.h>

#include "bench/golden_check.h"
#include "bench/safetensors.h"

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
	       "no tensor 'param.in_proj.weight' [384, 128]");
	refuse("tests/golden/layer_gla.safetensors", "param.v_proj.weight", "parat.v_proj.weight",
	       "no tensor 'param.v_proj.weight'");
	refuse("tests/golden/layer_gla.safetensors", "mixer only", "mixed only",
	       "no tensor 'param.input_norm.weight' [128]");
	refuse("tests/golden/model_rat.safetensors", "param.head.", "parat.head.",
	       "no tensor 'param.head.lm_head.weight'");
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

/* Opens a golden file, writes the tensors that `keep` takes, and checks what is there then. */
static enum status check_some(const char *path, bool (*keep)(const char *name),
                              const struct golden_options *options, struct golden_report *report)
{
	char copy[] = "/tmp/golden-test-XXXXXX";
	struct safetensors file, some;

	close(mkstemp(copy));
	require_ok(safetensors_open(path, &file));
	some = file;
	some.tensors = calloc((size_t)file.n_tensors, sizeof *some.tensors);
	some.n_tensors = 0;
	for (int i = 0; i < file.n_tensors; i++)
		if (keep(file.tensors[i].name))
			some.tensors[some.n_tensors++] = file.tensors[i];
	require_ok(safetensors_write(copy, &some));
	free(some.tensors);
	safetensors_close(&file);
	enum status status = golden_check(options, copy, report);
	unlink(copy);
	return status;
}

static bool is_forward(const char *name)
{
	return name[0] != 'd' && strncmp(name, "grad.", 5) != 0 && strcmp(name, "loss") != 0;
}

static bool is_not_one_gradient(const char *name)
{
	return strcmp(name, "grad.out_proj.weight") != 0 && strcmp(name, "dx") != 0 &&
	       strcmp(name, "dq") != 0;
}

/* Gradients are compared where there are some: all, a few, none. */
TEST(test_gradients_are_optional)
{
	static const char *const paths[] = {
	        "tests/golden/layer_mamba2.safetensors", "tests/golden/layer_swa.safetensors",
	        "tests/golden/op_gla.safetensors", "tests/golden/model_rat.safetensors"};
	const struct golden_options options = {.device = device};
	struct golden_report report;

	for (size_t i = 0; i < COUNT_OF(paths); i++) {
		require_ok(check_some(paths[i], is_forward, &options, &report));
		assert_true(report.count[GOLDEN_PASS] > 0);
		assert_int_equal(report.n_results, report.count[GOLDEN_PASS]);
		for (int j = 0; j < report.n_results; j++)
			assert_true(is_forward(report.results[j].tensor));
		require_ok(check_some(paths[i], is_not_one_gradient, &options, &report));
		assert_int_equal(report.n_results, report.count[GOLDEN_PASS]);
	}
}

/* What was computed here is written out, under the names of the results. */
TEST(test_results_are_saved)
{
	char out[] = "/tmp/golden-test-XXXXXX";
	const struct golden_options options = {.device = device, .save = out};
	struct golden_report report;
	struct safetensors saved, stored;

	close(mkstemp(out));
	require_ok(golden_check(&options, "tests/golden/layer_gla.safetensors", &report));
	require_ok(safetensors_open(out, &saved));
	require_ok(safetensors_open("tests/golden/layer_gla.safetensors", &stored));
	assert_int_equal(saved.n_tensors, report.n_results);
	assert_string_equal(safetensors_metadata(&saved, "block"), "gla");
	const struct safetensor *y = safetensors_find(&saved, "y"),
	                        *theirs = safetensors_find(&stored, "y");
	assert_int_equal(y->n_dims, theirs->n_dims);
	assert_memory_equal(y->dims, theirs->dims, sizeof y->dims);
	for (int64_t i = 0; i < y->count; i++)
		assert_true(fabsf(y->data.f32[i] - theirs->data.f32[i]) < 1e-3f);
	assert_memory_not_equal(y->data.f32, theirs->data.f32, (size_t)y->count * sizeof(float));
	assert_non_null(safetensors_find(&saved, "grad.q_proj.weight"));
	safetensors_close(&saved);
	safetensors_close(&stored);
	unlink(out);
}

/* A tensor's floats as doubles, or as the upper halves of them that bf16 is; returns the bytes. */
static size_t store_as(const struct safetensor *t, size_t width, char *to)
{
	for (int64_t i = 0; i < t->count; i++, to += width) {
		const float value = t->data.f32[i];
		const double wide = value;

		if (width == sizeof wide)
			memcpy(to, &wide, width);
		else
			memcpy(to, (const char *)&value + sizeof value - width, width);
	}
	return (size_t)t->count * width;
}

/* Checks a file whose "o" is stored in a type that is `width` bytes wide, the rest as F32. */
static enum status check_stored_as(const char *type, size_t width, struct golden_report *report)
{
	struct safetensors file;
	scoped char *header = new_memory(1 << 16), *data = new_memory((size_t)16 << 20);
	char *at = header + sprintf(header, "{\"__metadata__\":{\"op\":\"gla\"}");
	size_t end = 0;

	require_ok(safetensors_open("tests/golden/op_gla.safetensors", &file));
	for (int i = 0; i < file.n_tensors; i++) {
		const struct safetensor *t = &file.tensors[i];
		const bool is_o = strcmp(t->name, "o") == 0;
		const size_t begin = end;

		end += store_as(t, is_o ? width : sizeof(float), data + begin);
		at += sprintf(at, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name,
		              is_o ? type : "F32");
		for (int d = 0; d < t->n_dims; d++)
			at += sprintf(at, "%s%d", d ? "," : "", (int)t->dims[d]);
		at += sprintf(at, "],\"data_offsets\":[%zu,%zu]}", begin, end);
	}
	*at++ = '}';
	const uint64_t length = (uint64_t)(at - header);
	char *whole = new_memory(sizeof length + length + end);
	memcpy(whole, &length, sizeof length);
	memcpy(whole + sizeof length, header, length);
	memcpy(whole + sizeof length + length, data, end);
	safetensors_close(&file);
	return check_bytes(whole, sizeof length + length + end, report);
}

TEST(test_other_types_of_floats)
{
	struct golden_report report;

	require_ok(check_stored_as("F64", 8, &report));
	assert_true(golden_find(&report, "o")->tolerance < 1e-4);
	require_ok(check_stored_as("F32", 4, &report));
	require_ok(check_stored_as("BF16", 2, &report));
	assert_true(golden_find(&report, "o")->rel_err > 1e-4);
	assert_true(golden_find(&report, "dq")->tolerance < 1e-4);
}

/* A pattern's parameters, as files call them. */
TEST(test_described)
{
	char *text = NULL;
	size_t size;
	FILE *file = open_memstream(&text, &size);

	require_ok(golden_describe(device, "gla(heads=2)", 64, file));
	fclose(file);
	assert_non_null(strstr(text, "gla(heads=2), d_model 64\n"));
	assert_non_null(strstr(text, "param.q_proj.weight "));
	assert_non_null(strstr(text, "[32, 64]\n"));
	assert_non_null(strstr(text, "also param.norm.weight, param.o_norm.weight\n"));
	free(text);
	assert_int_equal(golden_describe(device, "brick", 64, stdout), STATUS_INVALID);
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
