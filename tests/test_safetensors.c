/* The safetensors reader on sound, truncated and hostile files. */
#include "tests/test.h"

#include <unistd.h>

#include "bench/safetensors.h"

/* An exact-size heap copy of length, header and `data_size` bytes 0, 1, 2, ...: an address
 * sanitizer sees any read past its end. */
static unsigned char *make_file(const char *header, size_t data_size, size_t *size)
{
	size_t length = strlen(header);
	unsigned char *bytes = new_memory(8 + length + data_size);

	for (int i = 0; i < 8; i++)
		bytes[i] = (unsigned char)((uint64_t)length >> (8 * i));
	for (size_t i = 0; i < length; i++)
		bytes[8 + i] = (unsigned char)header[i];
	for (size_t i = 0; i < data_size; i++)
		bytes[8 + length + i] = (unsigned char)i;
	*size = 8 + length + data_size;
	return bytes;
}

static enum status parse(const char *header, size_t data_size, struct safetensors *file)
{
	size_t size;
	unsigned char *bytes = make_file(header, data_size, &size);
	enum status status = safetensors_parse(bytes, size, file);

	free(bytes);
	return status;
}

/* The header must be refused with a message that says `reason`, and leave nothing behind. */
static void refuse(const char *header, size_t data_size, const char *reason)
{
	struct safetensors file;

	assert_int_equal(parse(header, data_size, &file), STATUS_INVALID);
	expect_message(header, reason);
	assert_int_equal(file.n_tensors, 0);
	assert_null(file.tensors);
	assert_null(file.data);
}

#define ENTRY(shape, begin, end)                                                                   \
	"{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

TEST(test_sound_file)
{
	const char *header = "{\"__metadata__\":{\"block\":\"rat\",\"chunk_size\":\"16\"},"
	                     "\"b\":{\"dtype\":\"I64\",\"shape\":[2,1],\"data_offsets\":[24,40]},"
	                     "\"a\":" ENTRY("[3,2]", "0", "24") "}   ";
	struct safetensors file;
	float second;
	int64_t last;

	require_ok(parse(header, 40, &file));
	assert_int_equal(file.n_tensors, 2);
	assert_string_equal(safetensors_metadata(&file, "chunk_size"), "16");
	assert_null(safetensors_metadata(&file, "absent"));
	assert_null(safetensors_find(&file, "absent"));

	const struct safetensor *a = safetensors_find(&file, "a"),
	                        *b = safetensors_find(&file, "b");
	assert_int_equal(a->n_dims, 2);
	assert_int_equal(a->dims[0], 3);
	assert_int_equal(a->dims[1], 2);
	assert_int_equal(a->count, 6);
	memcpy(&second, (unsigned char[]){4, 5, 6, 7}, sizeof second);
	assert_memory_equal(&a->data.f32[1], &second, sizeof second);
	assert_int_equal(b->dtype, SAFETENSORS_I64);
	memcpy(&last, (unsigned char[]){32, 33, 34, 35, 36, 37, 38, 39}, sizeof last);
	assert_int_equal(b->data.i64[1], last);
	safetensors_close(&file);
	assert_int_equal(file.n_tensors, 0);
}

TEST(test_scalars_and_empty_tensors)
{
	struct safetensors file;

	require_ok(parse("{\"a\":" ENTRY("[]", "0", "4") ",\"b\":" ENTRY("[0,7]", "4", "4") "}", 4,
	                 &file));
	assert_int_equal(safetensors_find(&file, "a")->count, 1);
	assert_int_equal(safetensors_find(&file, "b")->count, 0);
	safetensors_close(&file);
	require_ok(parse("{}", 0, &file));
	safetensors_close(&file);
}

/* An int64 behind one float lies where none may be read from; it is moved. */
TEST(test_unaligned_data)
{
	struct safetensors file;
	int64_t value;

	assert_int_equal(
	        parse("{\"a\":" ENTRY("[1]", "0", "4") ",\"b\":{\"dtype\":\"I64\",\"shape\":[1],"
	                                               "\"data_offsets\":[4,12]}}",
	              12, &file),
	        STATUS_OK);
	memcpy(&value, (unsigned char[]){4, 5, 6, 7, 8, 9, 10, 11}, sizeof value);
	const struct safetensor *b = safetensors_find(&file, "b");
	assert_int_equal((uintptr_t)b->data.i64 % sizeof value, 0);
	assert_int_equal(*b->data.i64, value);
	safetensors_close(&file);
}

/* Other types of floats are read as F32, from wherever they lie. */
TEST(test_other_floats)
{
	static const char *const header =
	        "{\"h\":{\"dtype\":\"F16\",\"shape\":[7],\"data_offsets\":[0,14]},"
	        "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[14,20]},"
	        "\"d\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[20,36]}}";
	static const uint16_t halves[] = {0x3c00, 0xc248, 0x0001, 0x83ff, 0x7bff, 0xfc00, 0x7e00};
	static const float values[] = {1, -3.140625f, 0x1p-24f, -1023 * 0x1p-24f, 65504, -INFINITY};
	static const uint16_t brains[] = {0x3f80, 0xc049, 0x7f80};
	const double doubles[] = {M_PI, -1e-3};
	struct safetensors file;
	size_t size;
	unsigned char *bytes = make_file(header, 36, &size), *data = bytes + size - 36;

	memcpy(data, halves, sizeof halves);
	memcpy(data + 14, brains, sizeof brains);
	memcpy(data + 20, doubles, sizeof doubles);
	require_ok(safetensors_parse(bytes, size, &file));
	free(bytes);
	const struct safetensor *h = safetensors_find(&file, "h");
	assert_int_equal(h->dtype, SAFETENSORS_F32);
	assert_int_equal(h->stored, STORED_F16);
	assert_memory_equal(h->data.f32, values, sizeof values);
	assert_true(isnan(h->data.f32[6]));
	const float *b = safetensors_find(&file, "b")->data.f32;
	assert_true(b[0] == 1 && b[1] == -3.140625f && b[2] == INFINITY);
	const float *d = safetensors_find(&file, "d")->data.f32;
	assert_true(d[0] == (float)M_PI && d[1] == -1e-3f);
	safetensors_close(&file);
}

/* What is written is read again. */
TEST(test_written_file)
{
	char path[] = "/tmp/safetensors-test-XXXXXX";
	const float floats[] = {1.5f, -2, 3};
	const int64_t integers[] = {1, INT64_MIN};
	struct safetensor tensors[] = {
	        {.name = "a \"b\"", .n_dims = 2, .dims = {3, 1}, .count = 3},
	        {.name = "i", .dtype = SAFETENSORS_I64, .n_dims = 1, .dims = {2}, .count = 2},
	};
	struct safetensors_metadata metadata[] = {{"block", "rat"}};
	const struct safetensors written = {2, tensors, 1, metadata, NULL};
	struct safetensors file;

	tensors[0].data.f32 = floats;
	tensors[1].data.i64 = integers;
	close(mkstemp(path));
	require_ok(safetensors_write(path, &written));
	require_ok(safetensors_open(path, &file));
	assert_int_equal(file.n_tensors, 2);
	assert_string_equal(safetensors_metadata(&file, "block"), "rat");
	const struct safetensor *a = safetensors_find(&file, "a \"b\"");
	assert_int_equal(a->dims[0], 3);
	assert_memory_equal(a->data.f32, floats, sizeof floats);
	assert_memory_equal(safetensors_find(&file, "i")->data.i64, integers, sizeof integers);
	safetensors_close(&file);
	unlink(path);
	assert_int_equal(safetensors_write("/nowhere/a", &written), STATUS_IO);
	expect_message("write", "/nowhere/a");
	if (access("/dev/full", W_OK) == 0)
		assert_int_equal(safetensors_write("/dev/full", &written), STATUS_IO);
}

TEST(test_hostile_headers)
{
	refuse("", 0, "not a JSON object");
	refuse("[1]", 0, "not a JSON object");
	refuse("{\"a\":", 0, "not a JSON object");
	refuse("{} {}", 0, "not a JSON object");
	refuse("{\"a\":3}", 0, "describes no tensor");
	refuse("{\"\":" ENTRY("[1]", "0", "4") "}", 4, "describes no tensor");
	refuse("{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "no dtype");
	refuse("{\"a\":{\"dtype\":\"F8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "'F8'");
	refuse("{\"a\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "4 bytes");
	refuse("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "shape");
	refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets");
	refuse("{\"a\":" ENTRY("[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, "at most 8");
	refuse("{\"a\":" ENTRY("[-1]", "0", "4") "}", 4, "no integer");
	refuse("{\"a\":" ENTRY("[1.5]", "0", "4") "}", 4, "no integer");
	refuse("{\"a\":" ENTRY("[1e300]", "0", "4") "}", 4, "no integer");
	refuse("{\"a\":" ENTRY("[\"1\"]", "0", "4") "}", 4, "no integer");
	refuse("{\"a\":" ENTRY("[4294967296,4294967296]", "0", "4") "}", 4, "overflows");
	/* 2^62 elements of 4 bytes: 2^64, which wraps to 0 bytes. */
	refuse("{\"a\":" ENTRY("[2147483648,2147483648]", "0", "0") "}", 0, "elements");
	refuse("{\"__metadata__\":[]}", 0, "not an object");
	refuse("{\"__metadata__\":{\"a\":1}}", 0, "not a string");
	refuse("{\"__metadata__\":{\"a\":\"1\"},\"__metadata__\":{}}", 0, "two entries");
}

TEST(test_hostile_offsets)
{
	refuse("{\"a\":" ENTRY("[2]", "0", "8") "}", 4, "ends at byte 8");
	refuse("{\"a\":" ENTRY("[1]", "9007199254740988", "9007199254740992") "}", 4, "ends at");
	refuse("{\"a\":" ENTRY("[1]", "0", "99999999999999999999") "}", 4, "data_offsets");
	refuse("{\"a\":" ENTRY("[1]", "-4", "0") "}", 4, "data_offsets");
	refuse("{\"a\":" ENTRY("[1]", "4", "0") "}", 4, "data_offsets");
	refuse("{\"a\":" ENTRY("[2]", "0", "4") "}", 4, "its shape 2");
	refuse("{\"a\":" ENTRY("[1]", "0", "5") "}", 5, "has 5 bytes");
	refuse("{\"a\":" ENTRY("[2]", "0", "8") ",\"b\":" ENTRY("[2]", "4", "12") "}", 12,
	       "overlaps");
	refuse("{\"a\":" ENTRY("[1]", "0", "4") ",\"b\":" ENTRY("[1]", "8", "12") "}", 12, "gap");
	refuse("{\"a\":" ENTRY("[1]", "0", "4") "}", 8, "4 bytes follow");
	refuse("{\"a\":" ENTRY("[1]", "0", "4") ",\"a\":" ENTRY("[1]", "4", "8") "}", 8,
	       "two tensors");
}

TEST(test_deep_nesting)
{
	enum { DEPTH = 100000 };
	char *header = new_memory(2 * DEPTH + 6);

	memcpy(header, "{\"a\":", 5);
	memset(header + 5, '[', DEPTH);
	header[5 + DEPTH] = '\0';
	refuse(header, 0, "nested deeper");
	free(header);
	/* Brackets inside a string are no nesting. */
	refuse("{\"[[[[[[\\\"[[[[\":3}", 0, "describes no tensor");
}

/* Every proper prefix of a sound file is refused. */
TEST(test_truncation)
{
	const char *header = "{\"__metadata__\":{\"k\":\"v\"},\"a\":" ENTRY("[4]", "0", "16") "}";
	struct safetensors file;
	size_t size;
	scoped unsigned char *bytes = make_file(header, 16, &size);

	for (size_t length = 0; length < size; length++) {
		scoped unsigned char *prefix = new_memory(length ? length : 1);

		memcpy(prefix, bytes, length);
		assert_int_equal(safetensors_parse(prefix, length, &file), STATUS_INVALID);
	}
	require_ok(safetensors_parse(bytes, size, &file));
	safetensors_close(&file);
}

TEST(test_header_longer_than_the_file)
{
	struct safetensors file;
	unsigned char bytes[16] = {9, 0, 0, 0, 0, 0, 0, 0, '{', '}'};

	assert_int_equal(safetensors_parse(bytes, 16, &file), STATUS_INVALID);
	assert_non_null(strstr(status_message(), "9 bytes in a file of 16"));
	memset(bytes, 0xff, 8);
	assert_int_equal(safetensors_parse(bytes, 16, &file), STATUS_INVALID);
	assert_non_null(strstr(status_message(), "more than"));
}

/* Flips each byte of a sound file's head in turn: whatever comes out, nothing is read outside. */
TEST(test_flipped_bytes)
{
	const char *header = "{\"__metadata__\":{\"k\":\"v\"},\"a\":" ENTRY("[4]", "0", "16") "}";
	size_t size;
	scoped unsigned char *bytes = make_file(header, 16, &size);

	for (size_t i = 0; i < 8 * size; i++) {
		struct safetensors file;

		bytes[i / 8] ^= (unsigned char)(1u << i % 8);
		if (safetensors_parse(bytes, size, &file) == STATUS_OK)
			safetensors_close(&file);
		bytes[i / 8] ^= (unsigned char)(1u << i % 8);
	}
}

TEST(test_files)
{
	char path[] = "/tmp/safetensors-test-XXXXXX";
	int descriptor = mkstemp(path);
	struct safetensors file;
	size_t size;
	unsigned char *bytes = make_file("{\"a\":" ENTRY("[4]", "0", "16") "}", 16, &size);

	assert_true(descriptor >= 0);
	assert_int_equal(write(descriptor, bytes, size), size);
	require_ok(safetensors_open(path, &file));
	assert_int_equal(file.tensors[0].count, 4);
	safetensors_close(&file);
	assert_int_equal(ftruncate(descriptor, (off_t)size - 1), 0);
	assert_int_equal(safetensors_open(path, &file), STATUS_INVALID);
	assert_non_null(strstr(status_message(), path));
	assert_int_equal(ftruncate(descriptor, 0), 0);
	assert_int_equal(safetensors_open(path, &file), STATUS_INVALID);
	close(descriptor);
	unlink(path);
	free(bytes);
	assert_int_equal(safetensors_open(path, &file), STATUS_IO);
	assert_int_equal(safetensors_open("/", &file), STATUS_IO);
}
