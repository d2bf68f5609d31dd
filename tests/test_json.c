/* Rows as JSON lines: another parser reads back what the record holds. */
#include "tests/test.h"

#include <cjson/cJSON.h>

#include "bench/harness/json.h"

static void free_json(cJSON **json)
{
	cJSON_Delete(*json);
}

#define scoped_json __attribute__((cleanup(free_json)))

/* A record as it is printed; to be freed. */
static char *printed(const struct record *record)
{
	char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);

	json_print_record(file, record);
	fclose(file);
	return text;
}

static const char *text_of(const cJSON *json, const char *name)
{
	const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(json, name));

	assert_non_null(text);
	return text;
}

static double number_of(const cJSON *json, const char *name)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(json, name);

	assert_true(cJSON_IsNumber(item));
	return item->valuedouble;
}

TEST(writes_one_object_a_line)
{
	struct record record = record_empty();

	record.block = "rat";
	record.pattern = "rat(chunk=16)";
	record.batch = 0;
	record.seq_len = 4096;
	record.latency_ms = 0.25;
	record.flops = 1.5e15;
	scoped char *line = printed(&record);
	scoped_json cJSON *json = cJSON_Parse(line);

	assert_non_null(json);
	assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
	assert_string_equal(text_of(json, "pattern"), "rat(chunk=16)");
	assert_true(number_of(json, "schema") >= 3);
	assert_true(number_of(json, "batch") == 0);
	assert_true(number_of(json, "seq_len") == 4096);
	assert_true(number_of(json, "latency_ms") == 0.25);
	assert_true(number_of(json, "flops") == 1.5e15);
	/* Schema, two texts, two integers, two reals. */
	assert_int_equal(cJSON_GetArraySize(json), 7);
}

TEST(leaves_out_what_is_empty)
{
	struct record record = record_empty();
	scoped char *line = printed(&record);

	assert_non_null(strstr(line, "{\"schema\":"));
	assert_null(strchr(line, ','));
}

TEST(has_no_number_that_is_none)
{
	struct record record = record_empty();

	record.rel_err = INFINITY;
	record.latency_ms = NAN;
	scoped char *line = printed(&record);
	scoped_json cJSON *json = cJSON_Parse(line);

	assert_true(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(json, "rel_err")));
	assert_int_equal(cJSON_GetArraySize(json), 2);
}

TEST(escapes_texts)
{
	/* What a text is, and what another parser must read. */
	static const char *const texts[][2] = {
	        {"a \"quoted\" \\ path", "a \"quoted\" \\ path"},
	        {"line\nbreak\ttab\x01", "line\nbreak\ttab\x01"},
	        {"\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80",
	         "\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"},
	        {"\xe9t\xe9", "\xef\xbf\xbdt\xef\xbf\xbd"},
	        {"cut \xe2\x82", "cut \xef\xbf\xbd\xef\xbf\xbd"},
	        {"overlong \xc0\xaf", "overlong \xef\xbf\xbd\xef\xbf\xbd"},
	        {"surrogate \xed\xa0\x80", "surrogate \xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
	        {"beyond \xf4\x90\x80\x80",
	         "beyond \xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
	};

	for (size_t i = 0; i < COUNT_OF(texts); i++) {
		struct record record = record_empty();

		record.message = texts[i][0];
		scoped char *line = printed(&record);
		scoped_json cJSON *json = cJSON_Parse(line);

		if (!json)
			fail_msg("no JSON: %s", line);
		assert_string_equal(text_of(json, "message"), texts[i][1]);
		for (const char *c = line; c[1]; c++)
			assert_true((unsigned char)*c >= 0x20);
	}
}
