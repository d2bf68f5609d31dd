/* The options parser on arbitrary arguments, one per line. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/options.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

enum { MAX_ARGUMENTS = 64 };

static const struct driver driver = {
        .program = "fuzz",
        .summary = "every option there is",
        .file = "fuzz.csv",
        .passes = "prefill,train,generation",
        .axes = "pattern,seq-len,tokens,chunk,window,groups,heads,d-model,position,model,prompt,"
                "generate",
};

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
	check_words(&options->provider);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	static const char *const presets[] = {"paper", "small", "tiny"};
	char *text = malloc(size + 1), *argv[MAX_ARGUMENTS + 2] = {"fuzz"};
	struct options options;
	int argc = 1;

	if (!text)
		return 0;
	memcpy(text, bytes, size);
	text[size] = '\0';
	for (char *word = strtok(text, "\n"); word && argc <= MAX_ARGUMENTS;
	     word = strtok(NULL, "\n"))
		argv[argc++] = word;
	if (options_parse(&options, &driver, argc, argv) == STATUS_OK) {
		check(&options);
		if (options_complete(&options, &driver, presets[size % 3]) == STATUS_OK)
			check(&options);
	}
	free(text);
	return 0;
}
