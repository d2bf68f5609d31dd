/* The CSV reader and writer: what is written is read back, and what is broken is said to be. */
#define _GNU_SOURCE
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "bench/harness/csv.h"

static enum status parse(const char *text, struct csv *csv)
{
	return csv_parse("test.csv", text, strlen(text), csv);
}

static void reads_plain_fields(void **state)
{
	struct csv csv;

	(void)state;
	assert_int_equal(parse("a,b,c\n1,,x y\n2,3,\n", &csv), STATUS_OK);
	assert_int_equal(csv.n_columns, 3);
	assert_int_equal(csv.n_rows, 2);
	assert_false(csv.cut);
	assert_int_equal(csv.whole_bytes, strlen("a,b,c\n1,,x y\n2,3,\n"));
	assert_int_equal(csv_column(&csv, "c"), 2);
	assert_int_equal(csv_column(&csv, "d"), -1);
	assert_string_equal(csv_text(&csv, 0, "c"), "x y");
	assert_string_equal(csv_text(&csv, 0, "d"), "");
	assert_true(csv_number(&csv, 1, "b") == 3);
	assert_true(isnan(csv_number(&csv, 0, "b")));
	assert_true(isnan(csv_number(&csv, 0, "c")));
	csv_release(&csv);
}

static void reads_quotes_and_line_endings(void **state)
{
	struct csv csv;

	(void)state;
	assert_int_equal(parse("a,b\r\n\"x,\"\"y\"\"\nz\",2\r\n\n\"\",\"\"\n", &csv), STATUS_OK);
	assert_int_equal(csv.n_rows, 2);
	assert_string_equal(csv_text(&csv, 0, "a"), "x,\"y\"\nz");
	assert_string_equal(csv_text(&csv, 0, "b"), "2");
	assert_string_equal(csv_text(&csv, 1, "b"), "");
	csv_release(&csv);
}

static void leaves_out_a_cut_line(void **state)
{
	static const char whole[] = "a,b\n1,2\n3,\"4,\n5\"\n6,7\n";
	struct csv csv;

	(void)state;
	/* Wherever the file is cut, the rows before the cut are there, and only they. */
	for (size_t length = 0; length < sizeof whole; length++) {
		assert_int_equal(csv_parse("test.csv", whole, length, &csv), STATUS_OK);
		assert_int_equal(csv.cut, length > 0 && csv.whole_bytes != length);
		assert_true(csv.whole_bytes <= length);
		assert_int_equal(csv.n_rows, length < 8    ? 0
		                             : length < 17 ? 1
		                             : length < 21 ? 2
		                                           : 3);
		csv_release(&csv);
	}
}

static void refuses_what_is_broken(void **state)
{
	static const char *const broken[] = {
	        "a,b\n1\n", "a,b\n1,2,3\n", "a,b\n1,\"2\"x\n", "a,b\n1,2\"2\n", "a\n\"x\"\ry\n",
	};
	struct csv csv;

	(void)state;
	for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
		assert_int_equal(parse(broken[i], &csv), STATUS_INVALID);
		assert_non_null(strstr(status_message(), "test.csv: line 2"));
		assert_null(csv.text);
	}
	assert_int_equal(csv_parse("test.csv", "a\0b\n", 4, &csv), STATUS_INVALID);
	assert_int_equal(csv_read("/nonexistent/file.csv", &csv), STATUS_IO);
	assert_int_equal(parse("", &csv), STATUS_OK);
	assert_int_equal(csv.n_columns, 0);
	csv_release(&csv);
}

/* Random text of the characters that matter to the format. */
static void random_text(char *text, size_t size)
{
	static const char alphabet[] = "a,\"\n\r b";
	size_t length = (size_t)rand() % size;

	for (size_t i = 0; i < length; i++)
		text[i] = alphabet[(size_t)rand() % (sizeof alphabet - 1)];
	text[length] = '\0';
}

static void reads_back_what_it_wrote(void **state)
{
	enum { ROWS = 200, COLUMNS = 3, SIZE = 9 };
	static char fields[ROWS + 1][COLUMNS][SIZE];
	char path[] = "/tmp/test_csv_XXXXXX";
	int descriptor = mkstemp(path);
	FILE *file = fdopen(descriptor, "w");
	struct csv csv;

	(void)state;
	srand(1);
	for (int row = 0; row <= ROWS; row++) {
		for (int i = 0; i < COLUMNS; i++) {
			random_text(fields[row][i], SIZE);
			if (row == 0)
				snprintf(fields[0][i], SIZE, "%c", 'a' + i);
			csv_write_field(file, fields[row][i]);
			fputc(i + 1 < COLUMNS ? ',' : '\n', file);
		}
	}
	fclose(file);
	assert_int_equal(csv_read(path, &csv), STATUS_OK);
	assert_int_equal(csv.n_rows, ROWS);
	for (int row = 0; row < ROWS; row++)
		for (int i = 0; i < COLUMNS; i++)
			assert_string_equal(csv_text(&csv, row, fields[0][i]), fields[row + 1][i]);
	csv_release(&csv);
	unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(reads_plain_fields),
	        cmocka_unit_test(reads_quotes_and_line_endings),
	        cmocka_unit_test(leaves_out_a_cut_line),
	        cmocka_unit_test(refuses_what_is_broken),
	        cmocka_unit_test(reads_back_what_it_wrote),
	};

	return cmocka_run_group_tests_name("csv", tests, NULL, NULL);
}
