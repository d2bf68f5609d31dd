#define _GNU_SOURCE
#include "bench/harness/options.h"

#include <assert.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/data.h"

#define LARGEST ((int64_t)1 << 40)

enum kind {
	KIND_FLAG,
	KIND_TEXT,
	KIND_CHOICE, /* one word of those that `argument` lists */
	KIND_WORDS,
	KIND_INTEGER,
	KIND_INTEGERS,
	KIND_COUNT, /* an integer that kernels keep in 32 bits */
	KIND_COUNTS,
	KIND_REAL,
	KIND_FRACTION, /* 0.01, or 1% */
};

struct option_spec {
	const char *name;
	enum kind kind;
	size_t offset;
	/* KIND_TEXT, KIND_CHOICE: bytes of the array. Numbers: the smallest allowed. */
	int64_t limit;
	bool axis;            /* matters only to drivers that name it */
	const char *argument; /* as --help shows it; for words that are fixed, those allowed */
	const char *fallback; /* the value where nobody gives one; NULL: none */
	const char *help;
};

#define AT(field) offsetof(struct options, field)

static const struct option_spec specs[] = {
        {"backend", KIND_TEXT, AT(backend), MAX_WORD, false, "NAME", NULL,
         "where to run: cpu, cuda (default: a GPU if there is one)"},
        {"device", KIND_TEXT, AT(device), MAX_WORD, false, "INDEX|UUID|PCI-ID", NULL,
         "which device of the backend (default: its first)"},
        {"preset", KIND_TEXT, AT(preset), MAX_WORD, false, "NAME", NULL,
         "sizes to start from (default: paper on a GPU, small on a CPU)"},
        {"pass", KIND_WORDS, AT(pass), 0, false, "LIST", NULL, "what to measure"},
        {"pattern", KIND_WORDS, AT(pattern), 0, true, "P/P...", NULL,
         "layers or stacks of layers, such as rat,swa/attention,swa; with arguments:\n"
         "rat(chunk=16,groups=2),swa(window=256), the first alone: rat:16,swa:256; lists\n"
         "of values: rat(chunk=16|64)"},
        {"model", KIND_WORDS, AT(model), 0, true, "1.3B,7B,13B,tiny", NULL,
         "models: 24, 32, 40 and 4 layers of D = 2048, 4096, 5120 and 256"},
        {"layers", KIND_COUNT, AT(layers), 1, true, "N", NULL,
         "mixing layers, in place of the model's"},
        {"vocab", KIND_COUNT, AT(vocab), 1, true, "N", NULL,
         "words of the vocabulary, in place of the model's"},
        {"ffn", KIND_COUNT, AT(ffn), 1, true, "N", NULL,
         "width of the feed-forward layers, in place of 4 D"},
        {"seq-len", KIND_INTEGERS, AT(seq_len), 1, true, "LIST", NULL, "sequence lengths T"},
        {"tokens", KIND_INTEGER, AT(tokens), 1, true, "N", NULL,
         "tokens of a prefill or training step: the batch is N / T"},
        {"prompt", KIND_INTEGER, AT(prompt), 1, true, "N", NULL, "tokens of each prompt"},
        {"generate", KIND_INTEGER, AT(generate), 1, true, "N", NULL,
         "tokens to generate after each prompt"},
        {"memory", KIND_INTEGER, AT(memory), 0, true, "MIB", NULL,
         "memory that the batch may fill (0: all that is free)"},
        {"batch", KIND_INTEGER, AT(batch), 0, false, "N", NULL,
         "sequences that generate at once (throughput: 0, the most that fit)"},
        {"chunk", KIND_COUNTS, AT(chunk), 1, true, "LIST", NULL,
         "the argument chunk of layers that have one and do not say it"},
        {"window", KIND_COUNTS, AT(window), 0, true, "LIST", NULL, "the argument window, likewise"},
        {"groups", KIND_COUNTS, AT(groups), 1, true, "LIST", NULL, "the argument groups, likewise"},
        {"heads", KIND_COUNTS, AT(heads), 0, true, "LIST", NULL,
         "the argument heads, likewise (0: as many as the layer has by itself)"},
        {"kv-heads", KIND_COUNTS, AT(kv_heads), 0, true, "LIST", NULL,
         "the argument kv_heads, likewise"},
        {"d-model", KIND_COUNTS, AT(d_model), 1, true, "LIST", NULL, "model width D"},
        {"position", KIND_WORDS, AT(position), 0, true, "rope,none", NULL,
         "the argument position, likewise"},
        {"provider", KIND_WORDS, AT(provider), 0, false, "LIST", "",
         "implementations, such as portable or attention=cudnn; given several times, each\n"
         "is measured, their samples alternating"},
        {"threads", KIND_INTEGER, AT(threads), 0, false, "N", "0",
         "CPU threads (0: all, or OMP_NUM_THREADS)"},
        {"samples", KIND_INTEGER, AT(samples), 0, false, "N", "0",
         "samples to take of each (0: until they are precise, at least 10, or 5 of what takes a\n"
         "second, or 3 of whole models)"},
        {"min-time", KIND_REAL, AT(min_time), 0, false, "SECONDS", NULL,
         "least time of sampling, or 100 samples"},
        {"max-time", KIND_REAL, AT(max_time), 0, false, "SECONDS", NULL,
         "most time of sampling a variant, cache flushes included, beyond the least number"},
        {"precision", KIND_FRACTION, AT(precision), 0, false, "FRACTION", NULL,
         "half-width of the 95% interval, relative, that a row has to reach, such as 1%\n"
         "(0: none)"},
        {"duty", KIND_CHOICE, AT(duty), MAX_WORD, false, "burst,sustained", "sustained",
         "whether the device may cool between samples"},
        {"data", KIND_WORDS, AT(data), 0, false, DATA_WORDS, "normal",
         "what inputs are like (docs/data.md); sinks and peaked: attention scores as trained\n"
         "models have them; zeros cannot be verified"},
        {"baseline", KIND_TEXT, AT(baseline), MAX_WORD, false, "PATTERN", NULL,
         "what ratios compare with (default: attention where the sweep has it)"},
        {"rival", KIND_WORDS, AT(rival), 0, false, "LIST", NULL,
         "implementations, as --provider has them, that the baseline is measured with besides;\n"
         "may be given several times"},
        {"apart", KIND_FLAG, AT(apart), 0, false, NULL, NULL,
         "measure each case by itself (default: samples of different blocks alternate)"},
        {"case-seconds", KIND_REAL, AT(case_seconds), 0, false, "SECONDS", "20",
         "skip cases predicted to take longer (0: none)"},
        {"rows", KIND_INTEGER, AT(rows), 1, false, "N", "1024",
         "rows of each case to verify against the fp64 reference"},
        {"seed", KIND_INTEGER, AT(seed), 0, false, "N", "1", "of the random data"},
        {"warm", KIND_FLAG, AT(warm), 0, false, NULL, NULL,
         "leave caches as the last sample left them (default: cold)"},
        {"deterministic", KIND_FLAG, AT(deterministic), 0, false, NULL, NULL,
         "only kernels that give the same bits at every run"},
        {"nvtx", KIND_FLAG, AT(nvtx), 0, false, NULL, NULL,
         "mark phases, layers and operations for a profiler; samples then include that"},
        {"resume", KIND_FLAG, AT(resume), 0, false, NULL, NULL,
         "continue an interrupted run: repair the file, skip cases it has"},
        {"truncate", KIND_FLAG, AT(truncate), 0, false, NULL, NULL,
         "start the file anew (default: add to it)"},
        {"out", KIND_TEXT, AT(out), MAX_PATH, false, "FILE", NULL,
         "CSV to write to; - is standard output"},
        {"format", KIND_WORDS, AT(format), 0, false, "table,csv,jsonl,none", "table",
         "what to print on standard output"},
        {"run-id", KIND_TEXT, AT(run_id), MAX_WORD, false, "ID", NULL,
         "name of the run in each row (default: $RUN_ID, or time and chance)"},
        {"list", KIND_FLAG, AT(list), 0, false, NULL, NULL,
         "list backends, presets and implementations, and stop"},
        {"dry-run", KIND_FLAG, AT(dry_run), 0, false, NULL, NULL,
         "list the cases with their bytes, FLOPs and least time, run nothing"},
        {"plan-for", KIND_CHOICE, AT(plan_for), MAX_WORD, false, "h200,h100,a100,rtx4090", NULL,
         "the GPU that --dry-run plans for; it need not be here (default: the one that is\n"
         "here; of --backend cuda without any: h200)"},
        {"breakdown", KIND_FLAG, AT(breakdown), 0, false, NULL, NULL,
         "time each operation of a case by itself and print tables, write no rows"},
        {"version", KIND_FLAG, AT(version), 0, false, NULL, NULL,
         "the program's version, commit and compiler"},
        {"help", KIND_FLAG, AT(help), 0, false, NULL, NULL, "this text"},
};

enum { N_SPECS = sizeof specs / sizeof specs[0] };

static_assert(N_SPECS <= 64, "options.set and options.given have one bit per option");

enum { N_PRESETS = 3 };

static const struct {
	const char *name, *summary;
} presets[N_PRESETS] = {
        {"paper", "the published experiment: D = 2048, 16 heads, 262144 tokens; for a GPU"},
        {"small", "the same at a size for a CPU: D = 128, 2 heads, 8192 tokens; minutes"},
        {"tiny", "everything once, for tests of the programs themselves; seconds"},
};

/* What each of them sets, of programs with these passes alone if it names any: layers have heads of
 * their own. */
static const struct {
	const char *passes, *option, *value[N_PRESETS];
} preset_values[] = {
        {NULL, "d-model", {"2048", "128", "64"}},
        {"kernel", "heads", {"16", "2", "2"}},
        {NULL, "tokens", {"262144", "8192", "512"}},
        {NULL, "seq-len", {"4096..262144*2", "512..8192*2", "64..256*2"}},
        {NULL, "batch", {"512", "8", "2"}},
        {NULL, "window", {"1024", "128", "16"}},
        {NULL, "min-time", {"0.05", "0.05", "0"}},
        {NULL, "max-time", {"0.5", "0.3", "0.02"}},
        {NULL, "precision", {"2%", "2%", "0"}},
        {NULL, "case-seconds", {NULL, "60", NULL}},
        {NULL, "model", {"1.3B", "tiny", "tiny"}},
        {NULL, "prompt", {"3072", "384", "20"}},
        {NULL, "generate", {"1024", "128", "4"}},
        {NULL, "memory", {"0", "128", "32"}},
};

enum { N_PRESET_VALUES = sizeof preset_values / sizeof preset_values[0] };

/* Whether `word` of `length` is one of the words of `list`, which `separator` separates. */
static bool list_has(const char *list, char separator, const char *word, size_t length)
{
	while (true) {
		const char *end = strchrnul(list, separator);

		if ((size_t)(end - list) == length && strncmp(list, word, length) == 0)
			return true;
		if (!*end)
			return false;
		list = end + 1;
	}
}

static bool driver_has(const struct driver *driver, const struct option_spec *spec)
{
	return !spec->axis || list_has(driver->axes, ',', spec->name, strlen(spec->name));
}

static enum status parse_integer(const char *name, const char **text, int64_t minimum,
                                 int64_t maximum, int64_t *value)
{
	char *end;

	errno = 0;
	*value = strtoll(*text, &end, 10);
	if (end == *text)
		return status_set(STATUS_INVALID, "--%s: a number is missing at '%s'", name, *text);
	if (errno == ERANGE || *value < minimum || *value > maximum)
		return status_set(STATUS_INVALID,
		                  "--%s: %.*s is not between %" PRId64 " and %" PRId64, name,
		                  (int)(end - *text), *text, minimum, maximum);
	*text = end;
	return STATUS_OK;
}

static enum status append_value(struct values *values, const char *name, int64_t value)
{
	if (values->count == MAX_VALUES)
		return status_set(STATUS_INVALID, "--%s: more than %d values", name, MAX_VALUES);
	values->value[values->count++] = value;
	return STATUS_OK;
}

/* The rest of a range, from `first`: "..last*factor" or "..last+step". */
static enum status parse_range(struct values *values, const char *name, const char **text,
                               int64_t first, int64_t maximum)
{
	int64_t last, step;

	*text += 2;
	TRY(parse_integer(name, text, first, maximum, &last));
	char how = **text;
	if (how != '*' && how != '+')
		return status_set(
		        STATUS_INVALID,
		        "--%s: a range needs its step, as in 512..8192*2 or 512..2048+512", name);
	++*text;
	TRY(parse_integer(name, text, how == '*' ? 2 : 1, maximum, &step));
	if (how == '*' && first == 0)
		return status_set(STATUS_INVALID, "--%s: 0 times anything stays 0", name);
	for (int64_t value = first; value <= last;) {
		TRY(append_value(values, name, value));
		if (how == '*' ? value > maximum / step : value > maximum - step)
			break;
		value = how == '*' ? value * step : value + step;
	}
	return STATUS_OK;
}

enum status values_parse(struct values *values, const char *name, const char *text, int64_t minimum,
                         int64_t maximum)
{
	values->count = 0;
	while (true) {
		int64_t value;

		TRY(parse_integer(name, &text, minimum, maximum, &value));
		if (strncmp(text, "..", 2) == 0)
			TRY(parse_range(values, name, &text, value, maximum));
		else
			TRY(append_value(values, name, value));
		if (!*text)
			return STATUS_OK;
		if (*text++ != ',')
			return status_set(STATUS_INVALID,
			                  "--%s: expected a comma at '%s', as in 512,1024", name,
			                  text - 1);
	}
}

static enum status append_word(struct words *words, const char *name, const char *word,
                               size_t length)
{
	if (words->count == MAX_WORDS)
		return status_set(STATUS_INVALID, "--%s: more than %d values", name, MAX_WORDS);
	if (length >= MAX_WORD)
		return status_set(STATUS_INVALID, "--%s: a value longer than %d characters", name,
		                  MAX_WORD - 1);
	snprintf(words->word[words->count++], MAX_WORD, "%.*s", (int)length, word);
	return STATUS_OK;
}

/* Words of `text`; each must be in `allowed` unless that is NULL. */
static enum status parse_words(struct words *words, const char *name, const char *text,
                               char separator, const char *allowed)
{
	words->count = 0;
	while (true) {
		const char *end = strchrnul(text, separator);
		size_t length = (size_t)(end - text);

		TRY(append_word(words, name, text, length));
		if (length == 0 || (allowed && !list_has(allowed, separator, text, length)))
			return status_set(STATUS_INVALID, "--%s: '%.*s' is not one of %s", name,
			                  (int)length, text, allowed ? allowed : "the patterns");
		if (!*end)
			return STATUS_OK;
		text = end + 1;
	}
}

/*
 * Appends a pattern, once for each value of a list in it: "rat(chunk=16|64)" is two patterns. The
 * values of the last list vary fastest.
 */
static enum status append_patterns(struct words *words, const char *name, const char *pattern,
                                   size_t length)
{
	const char *bar = memchr(pattern, '|', length), *end = pattern + length, *first = bar;

	if (!bar)
		return append_word(words, name, pattern, length);
	while (first > pattern && !strchr("=:(,", first[-1]))
		first--;
	const char *rest = bar;
	while (rest < end && !strchr("),", *rest))
		rest++;
	for (const char *value = first; value <= rest;) {
		char one[MAX_WORD];
		size_t size = strcspn(value, "|),");

		size = size < (size_t)(rest - value) ? size : (size_t)(rest - value);
		int written = snprintf(one, sizeof one, "%.*s%.*s%.*s", (int)(first - pattern),
		                       pattern, (int)size, value, (int)(end - rest), rest);

		if (written >= (int)sizeof one)
			return status_set(STATUS_INVALID, "--%s: a value longer than %d characters",
			                  name, MAX_WORD - 1);
		TRY(append_patterns(words, name, one, (size_t)written));
		value += size + 1;
	}
	return STATUS_OK;
}

static enum status parse_patterns(struct words *words, const struct driver *driver,
                                  const char *name, const char *text)
{
	if (driver->patterns)
		return parse_words(words, name, text, '/', driver->patterns);
	words->count = 0;
	while (true) {
		const char *end = strchrnul(text, '/');

		TRY(append_patterns(words, name, text, (size_t)(end - text)));
		if (!*end)
			return STATUS_OK;
		text = end + 1;
	}
}

static enum status parse_word_option(struct options *options, const struct driver *driver,
                                     const struct option_spec *spec, const char *text)
{
	struct words *words = (struct words *)((char *)options + spec->offset);

	if (words == &options->pass)
		return parse_words(words, spec->name, text, ',', driver->passes);
	if (words == &options->pattern)
		return parse_patterns(words, driver, spec->name, text);
	if (words != &options->provider && words != &options->rival)
		return parse_words(words, spec->name, text, ',', spec->argument);
	return append_word(words, spec->name, text, strlen(text));
}

static enum status parse_real(const char *name, const char *text, double *value)
{
	char *end;

	*value = strtod(text, &end);
	if (end == text || *end || !isfinite(*value) || *value < 0)
		return status_set(STATUS_INVALID, "--%s: '%s' is not a number from 0 on", name,
		                  text);
	return STATUS_OK;
}

/* A fraction of one, which may be written in percent. */
static enum status parse_fraction(const char *name, const char *text, double *value)
{
	char *end;

	*value = strtod(text, &end);
	const bool percent = end != text && *end == '%';

	if (percent) {
		*value /= 100;
		end++;
	}
	if (end == text || *end || !(*value >= 0 && *value < 1))
		return status_set(STATUS_INVALID,
		                  "--%s: '%s' is not a fraction below 1, such as 0.01 or 1%%", name,
		                  text);
	return STATUS_OK;
}

static enum status parse_text(const struct option_spec *spec, const char *text, char *field)
{
	size_t length = strlen(text);

	if (length == 0 || length >= (size_t)spec->limit)
		return status_set(STATUS_INVALID, "--%s: needs 1 to %" PRId64 " characters",
		                  spec->name, spec->limit - 1);
	memcpy(field, text, length + 1);
	return STATUS_OK;
}

static enum status parse_choice(const struct option_spec *spec, const char *text, char *field)
{
	if (!list_has(spec->argument, ',', text, strlen(text)))
		return status_set(STATUS_INVALID, "--%s: '%.100s' is not one of %s", spec->name,
		                  text, spec->argument);
	return parse_text(spec, text, field);
}

static enum status set_option(struct options *options, const struct driver *driver, int index,
                              const char *text)
{
	const struct option_spec *spec = &specs[index];
	void *field = (char *)options + spec->offset;
	const bool counts = spec->kind == KIND_COUNT || spec->kind == KIND_COUNTS;
	const int64_t most = counts ? INT32_MAX : LARGEST;
	const char *rest = text;

	options->set |= UINT64_C(1) << index;
	switch (spec->kind) {
	case KIND_FLAG:
		*(bool *)field = true;
		return STATUS_OK;
	case KIND_TEXT:
		return parse_text(spec, text, field);
	case KIND_CHOICE:
		return parse_choice(spec, text, field);
	case KIND_WORDS:
		return parse_word_option(options, driver, spec, text);
	case KIND_INTEGERS:
	case KIND_COUNTS:
		return values_parse(field, spec->name, text, spec->limit, most);
	case KIND_REAL:
		return parse_real(spec->name, text, field);
	case KIND_FRACTION:
		return parse_fraction(spec->name, text, field);
	case KIND_INTEGER:
	case KIND_COUNT:
		TRY(parse_integer(spec->name, &rest, spec->limit, most, field));
		if (*rest)
			return status_set(STATUS_INVALID, "--%s: '%s' is not a whole number",
			                  spec->name, text);
	}
	return STATUS_OK;
}

enum status options_parse(struct options *options, const struct driver *driver, int argc,
                          char **argv)
{
	struct option long_options[N_SPECS + 1] = {{0}};
	int c, index;

	*options = (struct options){0};
	for (int i = 0; i < N_SPECS; i++)
		long_options[i] = (struct option){
		        specs[i].name, specs[i].kind == KIND_FLAG ? no_argument : required_argument,
		        NULL, i + 1};
	optind = 0;
	opterr = 0;
	while ((c = getopt_long(argc, argv, "+:", long_options, &index)) != -1) {
		if (c == ':')
			return status_set(STATUS_INVALID, "%s: needs a value", argv[optind - 1]);
		if (c == '?')
			return status_set(
			        STATUS_INVALID,
			        "%.100s: no such option, or not like this; --help lists them",
			        argv[optind - 1]);
		TRY(set_option(options, driver, c - 1, optarg));
		if (!driver_has(driver, &specs[c - 1]))
			fprintf(stderr, "%s: --%s means nothing here\n", driver->program,
			        specs[c - 1].name);
	}
	if (optind < argc)
		return status_set(STATUS_INVALID, "'%.100s': options begin with --", argv[optind]);
	options->given = options->set;
	return STATUS_OK;
}

static int spec_find(const char *name)
{
	for (int i = 0; i < N_SPECS; i++)
		if (strcmp(specs[i].name, name) == 0)
			return i;
	return -1;
}

bool options_given(const struct options *options, const char *name)
{
	const int index = spec_find(name);

	return index >= 0 && (options->given >> index & 1);
}

/* The value of an option under a preset; NULL: it has none. */
static const char *preset_value(const struct driver *driver, const struct option_spec *spec,
                                int preset)
{
	for (size_t i = 0; i < N_PRESET_VALUES; i++) {
		const char *passes = preset_values[i].passes;

		if (strcmp(preset_values[i].option, spec->name) == 0 &&
		    (!passes || strcmp(passes, driver->passes) == 0))
			return preset_values[i].value[preset];
	}
	return NULL;
}

/* The value of an option where nobody gives one: the driver's, the preset's or the built-in one;
 * NULL: none. */
static const char *default_of(const struct driver *driver, const struct option_spec *spec,
                              int preset)
{
	const struct option_default *own = driver->defaults;
	const char *value = preset_value(driver, spec, preset);

	for (int i = 0; i < MAX_DEFAULTS && own[i].name; i++)
		if (strcmp(own[i].name, spec->name) == 0)
			return own[i].value;
	if (value)
		return value;
	return spec->offset == AT(pass) ? driver->passes : spec->fallback;
}

/* N_PRESETS: there is none of that name. */
static int preset_find(const char *name)
{
	int preset = 0;

	while (preset < N_PRESETS && strcmp(presets[preset].name, name) != 0)
		preset++;
	return preset;
}

enum status options_complete(struct options *options, const struct driver *driver,
                             const char *preset_name)
{
	if (!options->preset[0])
		snprintf(options->preset, sizeof options->preset, "%s", preset_name);
	const int preset = preset_find(options->preset);
	if (preset == N_PRESETS)
		return status_set(STATUS_INVALID, "--preset: '%s' is not one of paper,small,tiny",
		                  options->preset);
	for (int i = 0; i < N_SPECS; i++) {
		const char *value = default_of(driver, &specs[i], preset);

		if (value && !(options->set >> i & 1))
			TRY(set_option(options, driver, i, value));
	}
	return STATUS_OK;
}

void options_print_presets(FILE *file, const struct driver *driver)
{
	for (int p = 0; p < N_PRESETS; p++) {
		fprintf(file, "preset %-8s %s\n%15s", presets[p].name, presets[p].summary, "");
		for (size_t i = 0; i < N_PRESET_VALUES; i++) {
			const struct option_spec *spec = &specs[spec_find(preset_values[i].option)];
			const char *value = default_of(driver, spec, p);

			if (value && driver_has(driver, spec))
				fprintf(file, " --%s %s", spec->name, value);
		}
		fputc('\n', file);
	}
}

/* A text behind the column of options, in which its lines begin. */
static void print_indented(FILE *file, const char *text)
{
	for (; *text; text++) {
		fputc(*text, file);
		if (*text == '\n')
			fprintf(file, "%31s", "");
	}
}

/* What an option is by itself, in brackets: under the preset, or under each where that makes a
 * difference. */
static void print_default(FILE *file, const struct driver *driver, const struct option_spec *spec,
                          int preset)
{
	const char *value = default_of(driver, spec, preset == N_PRESETS ? 0 : preset);
	bool same = true;

	for (int p = 0; p < N_PRESETS && preset == N_PRESETS; p++) {
		const char *other = default_of(driver, spec, p);

		same = same && (other == value || (other && value && strcmp(other, value) == 0));
	}
	if (same && value && value[0])
		fprintf(file, " [%s]", value);
	for (int p = 0; p < N_PRESETS && !same; p++) {
		print_indented(file, p ? ", " : "\n[");
		value = default_of(driver, spec, p);
		fprintf(file, "%s: %s%s", presets[p].name, value ? value : "none",
		        p + 1 < N_PRESETS ? "" : "]");
	}
}

void options_print_help(FILE *file, const struct driver *driver, const char *preset)
{
	fprintf(file, "%s: %s\n\n", driver->program, driver->summary);
	for (int i = 0; i < N_SPECS; i++) {
		const struct option_spec *spec = &specs[i];
		char left[64];

		if (!driver_has(driver, spec))
			continue;
		snprintf(left, sizeof left, "--%s %s", spec->name,
		         spec->argument ? spec->argument : "");
		fprintf(file, "  %-28s ", left);
		if (strlen(left) > 28)
			print_indented(file, "\n");
		print_indented(file, spec->help);
		print_default(file, driver, spec, preset_find(preset));
		fputc('\n', file);
	}
	fputs("\nLISTs are comma separated; numbers may be ranges: 512..8192*2, 512..2048+512.\n\n",
	      file);
	for (int i = 0; i < N_PRESETS; i++)
		fprintf(file, "preset %-8s %s\n", presets[i].name, presets[i].summary);
	if (driver->print_help)
		driver->print_help(file);
}
