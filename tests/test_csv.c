/* The CSV reader and writer: what is written is read back, and what is broken is said to be. */
#include "tests/programs.h"

#include <unistd.h>

static enum status parse(const char *text, struct csv *csv)
{
	return csv_parse("test.csv", text, strlen(text), csv);
}

TEST(reads_plain_fields)
{
	scoped_csv struct csv csv;

	require_ok(parse("a,b,c\n1,,x y\n2,3,\n", &csv));
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
}

TEST(reads_quotes_and_line_endings)
{
	scoped_csv struct csv csv;

	require_ok(parse("a,b\r\n\"x,\"\"y\"\"\nz\",2\r\n\n\"\",\"\"\n", &csv));
	assert_int_equal(csv.n_rows, 2);
	assert_string_equal(csv_text(&csv, 0, "a"), "x,\"y\"\nz");
	assert_string_equal(csv_text(&csv, 0, "b"), "2");
	assert_string_equal(csv_text(&csv, 1, "b"), "");
}

TEST(leaves_out_a_cut_line)
{
	static const char whole[] = "a,b\n1,2\n3,\"4,\n5\"\n6,7\n";
	struct csv csv;

	/* Wherever the file is cut, the rows before the cut are there, and only they. */
	for (size_t length = 0; length < sizeof whole; length++) {
		require_ok(csv_parse("test.csv", whole, length, &csv));
		assert_int_equal(csv.cut, length > 0 && csv.whole_bytes != length);
		assert_true(csv.whole_bytes <= length);
		assert_int_equal(csv.n_rows, length < 8    ? 0
		                             : length < 17 ? 1
		                             : length < 21 ? 2
		                                           : 3);
		csv_release(&csv);
	}
}

TEST(refuses_what_is_broken)
{
	static const char *const broken[] = {
	        "a,b\n1\n", "a,b\n1,2,3\n", "a,b\n1,\"2\"x\n", "a,b\n1,2\"2\n", "a\n\"x\"\ry\n",
	};
	struct csv csv;

	for (size_t i = 0; i < COUNT_OF(broken); i++) {
		assert_int_equal(parse(broken[i], &csv), STATUS_INVALID);
		assert_non_null(strstr(status_message(), "test.csv: line 2"));
		assert_null(csv.text);
	}
	assert_int_equal(csv_parse("test.csv", "a\0b\n", 4, &csv), STATUS_INVALID);
	assert_int_equal(csv_read("/nonexistent/file.csv", &csv), STATUS_IO);
	require_ok(parse("", &csv));
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

TEST(reads_back_what_it_wrote)
{
	enum { ROWS = 200, COLUMNS = 3, SIZE = 9 };
	static char fields[ROWS + 1][COLUMNS][SIZE];
	char path[] = "/tmp/test_csv_XXXXXX";
	int descriptor = mkstemp(path);
	FILE *file = fdopen(descriptor, "w");
	struct csv csv;

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
	require_ok(csv_read(path, &csv));
	assert_int_equal(csv.n_rows, ROWS);
	for (int row = 0; row < ROWS; row++)
		for (int i = 0; i < COLUMNS; i++)
			assert_string_equal(csv_text(&csv, row, fields[0][i]), fields[row + 1][i]);
	csv_release(&csv);
	unlink(path);
}
