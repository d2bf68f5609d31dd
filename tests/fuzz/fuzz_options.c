/* The parsers of options and of patterns on arbitrary arguments, one per line. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/case.h"
#include "bench/harness/options.h"
#include "layers/pattern.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

enum { MAX_ARGV = 64 };

static const struct driver driver = {
        .program = "fuzz",
        .summary = "every option there is",
        .file = "fuzz.csv",
        .passes = "prefill,train,generation",
        .axes = "pattern,seq-len,tokens,chunk,window,groups,heads,d-model,position,model,prompt,"
                "generate",
};

/* Two layers stand for all. */
static const char *const words[] = {"none", "rope", NULL};
static const struct layer_argument arguments[] = {
        {.name = "chunk", .offset = offsetof(struct layer_config, chunk), .automatic = true},
        {.name = "position", .offset = offsetof(struct layer_config, rope), .words = words},
        {0}};
static const struct layer_class rat = {.name = "rat", .arguments = arguments};
static const struct layer_class hgrn = {.name = "hgrn", .arguments = NO_ARGUMENTS};
const struct layer_class *const layer_classes[] = {&rat, &hgrn, NULL};

const struct layer_class *layer_class_find(const char *name)
{
	for (int i = 0; layer_classes[i]; i++)
		if (strcmp(layer_classes[i]->name, name) == 0)
			return layer_classes[i];
	return NULL;
}

/* A pattern that can be read is read again from what its layers are called in full. */
static void check_pattern(const char *text)
{
	struct pattern pattern, again;
	char full[MAX_PATTERN_TEXT] = "";

	if (pattern_parse(&pattern, text) != STATUS_OK)
		return;
	for (int i = 0; i < pattern.count; i++) {
		struct layer_config config = {.class = pattern.item[i].class};

		for (int a = 0; config.class->arguments[a].name; a++)
			*argument_of(&config, &config.class->arguments[a]) =
			        pattern.item[i].value[a];
		if (i > 0)
			strcat(full, ",");
		pattern_append(full, sizeof full, &config);
	}
	if (pattern_parse(&again, full) != STATUS_OK || again.count != pattern.count)
		abort();
	for (int i = 0; i < pattern.count; i++)
		if (memcmp(again.item[i].value, pattern.item[i].value,
		           sizeof again.item[i].value) != 0)
			abort();
}

static void check_values(const struct values *values)
{
	if (values->count < 0 || values->count > MAX_VALUES)
		abort();
	for (int i = 0; i < values->count; i++)
		if (values->value[i] < 0)
			abort();
}

static void check_words(const struct words *words)
{
	if (words->count < 0 || words->count > MAX_WORDS)
		abort();
	for (int i = 0; i < words->count; i++)
		if (!memchr(words->word[i], '\0', MAX_WORD))
			abort();
}

static void check(const struct options *options)
{
	check_values(&options->seq_len);
	check_values(&options->chunk);
	check_values(&options->window);
	check_values(&options->d_model);
	check_words(&options->pass);
	check_words(&options->pattern);
	for (int i = 0; i < options->pattern.count; i++)
		check_pattern(options->pattern.word[i]);
	check_words(&options->provider);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	static const char *const presets[] = {"paper", "small", "tiny"};
	char *text = malloc(size + 1), *argv[MAX_ARGV + 2] = {"fuzz"};
	struct options options;
	int argc = 1;

	if (!text)
		return 0;
	memcpy(text, bytes, size);
	text[size] = '\0';
	for (char *word = strtok(text, "\n"); word && argc <= MAX_ARGV; word = strtok(NULL, "\n"))
		argv[argc++] = word;
	if (options_parse(&options, &driver, argc, argv) == STATUS_OK) {
		check(&options);
		if (options_complete(&options, &driver, presets[size % 3]) == STATUS_OK)
			check(&options);
	}
	free(text);
	return 0;
}
