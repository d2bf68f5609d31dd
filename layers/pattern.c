#define _POSIX_C_SOURCE 200809L
#include "layers/pattern.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Names and arguments are words of this: what ends one. */
static const char separators[] = ",:()=";

/* Patterns that have a name: what it stands for is read in its place. */
static const struct {
	const char *name, *text;
} named_patterns[] = {
        /* arXiv 2403.19887, figure 2: the attention is the fifth of eight. */
        {"jamba", "mamba,mamba,mamba,mamba,attention,mamba,mamba,mamba"},
        {"griffin", "hawk,hawk,griffin_attention"}, /* arXiv 2402.19427 */
};

enum { N_NAMED_PATTERNS = sizeof named_patterns / sizeof *named_patterns };

static void append_name(char *list, size_t size, const char *name)
{
	snprintf(list + strlen(list), size - strlen(list), "%s%s", list[0] ? ", " : "", name);
}

static enum status unknown_layer(const char *name, size_t length)
{
	char allowed[256] = "";

	for (int i = 0; layer_classes[i]; i++)
		append_name(allowed, sizeof allowed, layer_classes[i]->name);
	for (int i = 0; i < N_NAMED_PATTERNS; i++)
		append_name(allowed, sizeof allowed, named_patterns[i].name);
	return status_set(STATUS_INVALID, "--pattern: no layer '%.*s' (allowed: %s)",
	                  (int)(length < 64 ? length : 64), name, allowed);
}

static enum status unknown_argument(const struct layer_class *class, const char *name,
                                    size_t length)
{
	char allowed[128] = "";

	for (const struct layer_argument *a = class->arguments; a->name; a++)
		append_name(allowed, sizeof allowed, a->name);
	return status_set(STATUS_INVALID, "--pattern: %s has no argument '%.*s' (allowed: %s)",
	                  class->name, (int)(length < 64 ? length : 64), name,
	                  allowed[0] ? allowed : "none");
}

/* A word of the text as a string; false if it is too long for any name. */
static bool take_word(char word[32], const char *text, size_t length)
{
	snprintf(word, 32, "%.*s", (int)length, text);
	return length < 32;
}

int argument_find(const struct layer_class *class, const char *name)
{
	for (int i = 0; class->arguments[i].name; i++)
		if (strcmp(class->arguments[i].name, name) == 0)
			return i;
	return -1;
}

int64_t *argument_of(struct layer_config *config, const struct layer_argument *argument)
{
	return (int64_t *)(void *)((char *)config + argument->offset);
}

enum status argument_check(const struct layer_class *class, const struct layer_argument *argument,
                           int64_t value)
{
	if ((value == 0 && argument->automatic) || (value >= argument->least && value <= INT32_MAX))
		return STATUS_OK;
	return status_set(STATUS_INVALID,
	                  "--pattern: %s: %s=%" PRId64 " (allowed: %" PRId64 " to %d%s)",
	                  class->name, argument->name, value, argument->least, INT32_MAX,
	                  argument->automatic ? ", 0: automatic" : "");
}

/* The value that *text begins with, which is then past it. */
static enum status parse_value(const struct layer_class *class,
                               const struct layer_argument *argument, const char **text,
                               int64_t *value)
{
	size_t length = strcspn(*text, separators);
	char word[32];
	const char *start = *text;
	char *end = word;

	*text += length;
	if (take_word(word, start, length) && length > 0 && !argument->words) {
		*value = strtoll(word, &end, 10);
		if (!*end && strspn(word, "0123456789") == length)
			return argument_check(class, argument, *value);
	}
	for (int i = 0; argument->words && argument->words[i]; i++)
		if (strcmp(argument->words[i], word) == 0) {
			*value = i;
			return STATUS_OK;
		}
	return status_set(STATUS_INVALID, "--pattern: %s: %s='%.*s' (allowed: %s%s%s)", class->name,
	                  argument->name, (int)(length < 64 ? length : 64), start,
	                  argument->words ? argument->words[0] : "a whole number",
	                  argument->words ? ", " : "", argument->words ? argument->words[1] : "");
}

/* What follows a name: ":16", or "(chunk=16,groups=2)". */
static enum status parse_arguments(struct pattern_item *item, const char **text)
{
	const struct layer_class *class = item->class;

	if (**text == ':') {
		if (!class->arguments[0].name)
			return status_set(STATUS_INVALID, "--pattern: %s takes no number '%.64s'",
			                  class->name, *text);
		++*text;
		item->given[0] = true;
		return parse_value(class, &class->arguments[0], text, &item->value[0]);
	}
	if (**text != '(')
		return STATUS_OK;
	do {
		const char *name = *text + 1;
		size_t length = strcspn(name, separators);
		char word[32];
		int i = take_word(word, name, length) ? argument_find(class, word) : -1;

		if (i < 0)
			return unknown_argument(class, name, length);
		*text = name + length;
		if (**text != '=' || item->given[i])
			return status_set(
			        STATUS_INVALID, "--pattern: %s: %s %s, as in %s(%s=%" PRId64 ")",
			        class->name, word,
			        item->given[i] ? "is given twice" : "has no value", class->name,
			        class->arguments[0].name, class->arguments[0].fallback);
		++*text;
		item->given[i] = true;
		TRY(parse_value(class, &class->arguments[i], text, &item->value[i]));
	} while (**text == ',');
	if (*(*text)++ != ')')
		return status_set(STATUS_INVALID, "--pattern: %s: a ')' is missing", class->name);
	return STATUS_OK;
}

static enum status parse_items(struct pattern *pattern, const char *text);

/* A layer with its arguments, or a pattern's name, with which *text begins and past which it is
 * then. */
static enum status parse_item(struct pattern *pattern, const char **text)
{
	const size_t length = strcspn(*text, separators);
	char name[32];
	const bool is_word = take_word(name, *text, length);

	for (int i = 0; is_word && i < N_NAMED_PATTERNS; i++)
		if (strcmp(name, named_patterns[i].name) == 0) {
			*text += length;
			return parse_items(pattern, named_patterns[i].text);
		}
	if (pattern->count == MAX_ITEMS)
		return status_set(STATUS_INVALID, "--pattern: more than %d layers", MAX_ITEMS);
	struct pattern_item *item = &pattern->item[pattern->count++];
	item->class = is_word ? layer_class_find(name) : NULL;
	if (!item->class)
		return unknown_layer(*text, length);
	*text += length;
	return parse_arguments(item, text);
}

static enum status parse_items(struct pattern *pattern, const char *text)
{
	while (true) {
		TRY(parse_item(pattern, &text));
		if (!*text)
			return STATUS_OK;
		if (*text++ != ',')
			return status_set(STATUS_INVALID,
			                  "--pattern: expected a comma at '%.64s', as in rat,swa",
			                  text - 1);
	}
}

enum status pattern_parse(struct pattern *pattern, const char *text)
{
	*pattern = (struct pattern){0};
	return parse_items(pattern, text);
}

void pattern_append(char *text, size_t size, const struct layer_config *config)
{
	struct layer_config copy = *config;
	const char *separator = "(";
	FILE *end;
	size_t length = strlen(text);

	if (length + 1 >= size)
		return;
	end = fmemopen(text + length, size - length, "w");
	if (!end)
		return;
	fputs(config->class->name, end);
	for (const struct layer_argument *a = config->class->arguments; a->name; a++) {
		int64_t value = *argument_of(&copy, a);

		if (value == 0 && a->automatic)
			continue;
		fprintf(end, "%s%s=", separator, a->name);
		if (a->words)
			fputs(a->words[value], end);
		else
			fprintf(end, "%" PRId64, value);
		separator = ",";
	}
	if (*separator == ',')
		fputc(')', end);
	fclose(end);
}
