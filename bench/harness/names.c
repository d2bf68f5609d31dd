#include "bench/harness/names.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* What two cases that look alike may differ in. Shown if not all cases agree. */
static const struct {
	const char *label;
	size_t offset;
	bool is_text;
} details[] = {
        {"H=", offsetof(struct result, n_heads), false},
        {"Hkv=", offsetof(struct result, kv_heads), false},
        {"dk=", offsetof(struct result, d_k), false},
        {"dv=", offsetof(struct result, d_v), false},
        {"prompt=", offsetof(struct result, prompt), false},
        {"generate=", offsetof(struct result, generate), false},
        {"threads=", offsetof(struct result, threads), false},
        {"warm=", offsetof(struct result, warm), false},
        {"", offsetof(struct result, dtype), true},
        {"", offsetof(struct result, data), true},
        {"", offsetof(struct result, duty), true},
};

enum { N_DETAILS = sizeof details / sizeof *details };

static const void *field(const struct result *r, size_t index)
{
	return (const char *)r + details[index].offset;
}

static bool same_detail(const struct result *a, const struct result *b, size_t index)
{
	const void *one = field(a, index), *other = field(b, index);

	return details[index].is_text
	               ? strcmp(*(const char *const *)one, *(const char *const *)other) == 0
	               : *(const int64_t *)one == *(const int64_t *)other;
}

static void name_case(const struct result *r, char name[NAME_SIZE])
{
	append_word(name, NAME_SIZE, "%s", r->series);
	if (r->model[0])
		append_word(name, NAME_SIZE, "%s", r->model);
	if (r->requested[0])
		append_word(name, NAME_SIZE, "[%s]", r->requested);
	append_word(name, NAME_SIZE, "%s", pass_name(r->kind));
	if (r->d_model >= 0)
		append_word(name, NAME_SIZE, "D=%lld", (long long)r->d_model);
	append_word(name, NAME_SIZE, "T=%lld", (long long)r->seq_len);
	if (!passes[r->kind].models && r->batch >= 0)
		append_word(name, NAME_SIZE, "B=%lld", (long long)r->batch);
}

static void add_detail(const struct result *r, size_t index, char name[NAME_SIZE])
{
	const void *value = field(r, index);

	if (details[index].is_text && **(const char *const *)value)
		append_word(name, NAME_SIZE, "%s", *(const char *const *)value);
	else if (!details[index].is_text && *(const int64_t *)value >= 0)
		append_word(name, NAME_SIZE, "%s%lld", details[index].label,
		            (long long)*(const int64_t *)value);
}

void name_cases(const struct result *const *example, int count, char (*name)[NAME_SIZE])
{
	bool shown[N_DETAILS] = {false};

	for (int i = 0; i < count; i++)
		name_case(example[i], name[i]);
	for (int i = 0; i < count; i++)
		for (int j = 0; j < i; j++) {
			if (strcmp(name[i], name[j]) != 0)
				continue;
			for (size_t k = 0; k < N_DETAILS; k++)
				shown[k] = shown[k] || !same_detail(example[i], example[j], k);
		}
	for (int i = 0; i < count; i++)
		for (size_t k = 0; k < N_DETAILS; k++)
			if (shown[k])
				add_detail(example[i], k, name[i]);
}

void append_word(char *text, size_t size, const char *format, ...)
{
	size_t length = strlen(text);
	va_list list;

	if (length > 0 && length + 1 < size) {
		text[length++] = ' ';
		text[length] = '\0';
	}
	va_start(list, format);
	vsnprintf(text + length, size - length, format, list);
	va_end(list);
}
