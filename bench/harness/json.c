#include "bench/harness/json.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Bytes of the UTF-8 character that `text` begins with; 0: it is none. Overlong forms, surrogates
 * and what is behind U+10FFFF are none. */
static int character_length(const unsigned char *text)
{
	const unsigned char first = text[0];
	const int length = first < 0x80   ? 1
	                   : first < 0xc2 ? 0
	                   : first < 0xe0 ? 2
	                   : first < 0xf0 ? 3
	                   : first < 0xf5 ? 4
	                                  : 0;
	const unsigned char least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
	const unsigned char most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;

	if (length > 1 && (text[1] < least || text[1] > most))
		return 0;
	for (int i = 2; i < length; i++)
		if (text[i] < 0x80 || text[i] > 0xbf)
			return 0;
	return length;
}

void json_print_text(FILE *file, const char *text)
{
	const unsigned char *at = (const unsigned char *)text;

	fputc('"', file);
	while (*at) {
		const int length = character_length(at);

		if (length == 0)
			fputs("\\ufffd", file);
		else if (*at == '"' || *at == '\\')
			fprintf(file, "\\%c", *at);
		else if (*at < 0x20)
			fprintf(file, "\\u%04x", *at);
		else
			fwrite(at, 1, (size_t)length, file);
		at += length ? length : 1;
	}
	fputc('"', file);
}

static void print_name(FILE *file, const char *name)
{
	fputc(',', file);
	json_print_text(file, name);
	fputc(':', file);
}

static void print_text(FILE *file, const char *name, const char *text)
{
	if (!text[0])
		return;
	print_name(file, name);
	json_print_text(file, text);
}

static void print_integer(FILE *file, const char *name, int64_t number)
{
	if (number < 0)
		return;
	print_name(file, name);
	fprintf(file, "%" PRId64, number);
}

static void print_real(FILE *file, const char *name, double number)
{
	if (isnan(number))
		return;
	print_name(file, name);
	if (isinf(number))
		fputs("null", file);
	else
		fprintf(file, "%.7g", number);
}

void json_print_record(FILE *file, const struct record *record)
{
	fprintf(file, "{\"schema\":%s", record_schema);
#define TEXT(name, key)    print_text(file, #name, record->name);
#define INTEGER(name, key) print_integer(file, #name, record->name);
#define REAL(name, key)    print_real(file, #name, record->name);
	RECORD_COLUMNS(TEXT, INTEGER, REAL)
	fputs("}\n", file);
}
