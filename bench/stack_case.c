#include "bench/stack_case.h"

#include <inttypes.h>
#include <string.h>

#include "layers/pattern.h"

/* Options of the command line, and the argument that each sets. */
static const struct {
	const char *option, *argument;
} settings[] = {{"chunk", "chunk"}, {"window", "window"},     {"groups", "groups"},
                {"heads", "heads"}, {"kv-heads", "kv_heads"}, {"position", "position"}};

enum { N_SETTINGS = sizeof settings / sizeof settings[0] };

/* The argument of an item that an option would set, or NULL. */
static const struct layer_argument *set_by(const struct pattern_item *item, int setting)
{
	int i = argument_find(item->class, settings[setting].argument);

	return i >= 0 && !item->given[i] ? &item->class->arguments[i] : NULL;
}

/* Whether an option means something to a pattern; STATUS_INVALID if it means two things. */
static enum status check_option(const struct pattern *pattern, int setting, bool *matters)
{
	const struct pattern_item *first = NULL;

	for (int i = 0; i < pattern->count; i++) {
		const struct pattern_item *item = &pattern->item[i];
		const struct layer_argument *argument = set_by(item, setting);

		if (!argument)
			continue;
		if (first && strcmp(set_by(first, setting)->help, argument->help) != 0)
			return status_set(STATUS_INVALID,
			                  "--%s: %s's is the %s, %s's the %s; say which, as in "
			                  "%s(%s=64)",
			                  settings[setting].option, first->class->name,
			                  set_by(first, setting)->help, item->class->name,
			                  argument->help, item->class->name, argument->name);
		first = item;
		*matters = true;
	}
	return STATUS_OK;
}

/* Whether `name` is one of a list with commas. */
static bool named(const char *list, const char *name)
{
	size_t length = strlen(name);

	for (const char *at = strstr(list, name); at; at = strstr(at + 1, name))
		if ((at == list || at[-1] == ',') && (at[length] == ',' || !at[length]))
			return true;
	return false;
}

enum status stack_case_check(const struct driver *driver, const struct options *options)
{
	bool matters[N_SETTINGS] = {false};

	for (int p = 0; p < options->pattern.count; p++) {
		struct pattern pattern;

		TRY(pattern_parse(&pattern, options->pattern.word[p]));
		if (driver->layers &&
		    (pattern.count > 1 || !named(driver->layers, pattern.item[0].class->name)))
			return status_set(STATUS_INVALID,
			                  "--pattern: '%s' is for build/hybrid (allowed: one of "
			                  "%s, with arguments)",
			                  options->pattern.word[p], driver->layers);
		for (int i = 0; i < N_SETTINGS; i++)
			if (options_given(options, settings[i].option))
				TRY(check_option(&pattern, i, &matters[i]));
	}
	for (int i = 0; i < N_SETTINGS; i++)
		if (options_given(options, settings[i].option) && !matters[i])
			fprintf(stderr, "%s: --%s means nothing here\n", driver->program,
			        settings[i].option);
	return STATUS_OK;
}

struct stack_options stack_case_options(const struct bench_case *c)
{
	return (struct stack_options){
	        .pattern = c->pattern,
	        .d_model = c->d_model,
	        .train_len = c->seq_len,
	        .n_heads = NO_VALUE,
	        .kv_heads = NO_VALUE,
	        .chunk = NO_VALUE,
	        .window = NO_VALUE,
	        .groups = NO_VALUE,
	        .rope = NO_VALUE,
	        .prenorm = true,
	        .residual = true,
	        .norm_eps = 1e-6f,
	        .data = c->data,
	};
}

struct stack_options stack_case_given(const struct bench_case *c)
{
	struct stack_options stack = stack_case_options(c);

	stack.n_heads = c->n_heads;
	stack.kv_heads = c->kv_heads;
	stack.chunk = c->chunk;
	stack.window = c->window;
	stack.groups = c->groups;
	if (c->position[0])
		stack.rope = strcmp(c->position, position_words[0]) != 0;
	return stack;
}

void stack_case_describe(const struct stack *stack, bool possible, struct bench_case *c)
{
	const struct layer_widths widths = stack_widths(stack);
	const int64_t chunk = stack_argument(stack, "chunk");
	const int64_t position = stack_argument(stack, "position");

	stack_pattern(stack, c->pattern, sizeof c->pattern);
	c->n_heads = widths.heads;
	c->kv_heads = widths.kv_heads;
	c->d_k = widths.d_k;
	c->d_v = widths.d_v;
	c->d_head = widths.heads > 0 ? stack->d_model / widths.heads : NO_VALUE;
	c->chunk = chunk > 0 ? chunk : NO_VALUE;
	c->window = stack_argument(stack, "window");
	c->groups = stack_argument(stack, "groups");
	c->position = position < 0 ? "" : position_words[position];
	if (!possible)
		return;
	c->parameters = stack_parameters(stack);
	if (c->seq_len > INT32_MAX) /* no stack runs it */
		return;
	c->state_bytes_per_sequence =
	        stack_state_bytes(stack, c->seq_len, &c->state_bytes_per_token);
}

void stack_case_help(FILE *file)
{
	fputs("\nLayers, their arguments and, in brackets, what these are by themselves:\n", file);
	for (int i = 0; layer_classes[i]; i++) {
		const struct layer_class *class = layer_classes[i];

		fprintf(file, "  %-17s %s\n", class->name, class->summary);
		for (const struct layer_argument *a = class->arguments; a->name; a++) {
			fprintf(file, "    %-15s %s ", a->name, a->help);
			if (a->words)
				fprintf(file, "[%s]\n", a->words[a->fallback]);
			else if (a->automatic && a->fallback == 0)
				fputs("[automatic]\n", file);
			else
				fprintf(file, "[%" PRId64 "]\n", a->fallback);
		}
	}
}
