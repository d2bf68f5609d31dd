#include "bench/harness/case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CASES = 10000 };

struct bench_case case_empty(void)
{
#define NONE(name) .name = NO_VALUE,
	return (struct bench_case){
	        CASE_SIZES(NONE).pass = PASS_COUNT, .position = "",     .model = "",
	        .state_bytes_per_token = NAN,       .tokens = NO_VALUE,
	};
}

/* Takes an index into a list off *n. A list without values stands for one NO_VALUE or "", so that
 * every case has exactly one value from each. */
static int64_t next_index(int count, int64_t *n)
{
	int64_t i = *n % (count ? count : 1);

	*n /= count ? count : 1;
	return i;
}

static const char *next_word(const struct words *words, int64_t *n)
{
	int64_t i = next_index(words->count, n);

	return words->count ? words->word[i] : "";
}

static int64_t next_value(const struct values *values, int64_t *n)
{
	int64_t i = next_index(values->count, n);

	return values->count ? values->value[i] : NO_VALUE;
}

/* Number n of the product, whose innermost list comes first here. */
static struct bench_case case_at(const struct options *o, int64_t n)
{
	struct bench_case c = case_empty();

	c.seq_len = next_value(&o->seq_len, &n);
	c.data = o->data.count ? data_find(next_word(&o->data, &n)) : DATA_NORMAL;
	c.chunk = next_value(&o->chunk, &n);
	c.window = next_value(&o->window, &n);
	c.position = next_word(&o->position, &n);
	c.groups = next_value(&o->groups, &n);
	c.kv_heads = next_value(&o->kv_heads, &n);
	c.n_heads = next_value(&o->heads, &n);
	c.d_model = next_value(&o->d_model, &n);
	c.pass = pass_find(next_word(&o->pass, &n));
	snprintf(c.pattern, sizeof c.pattern, "%s", next_word(&o->pattern, &n));
	c.model = next_word(&o->model, &n);
	return c;
}

/* How many cases there are; more than MAX_CASES: too many. */
static int64_t count_cases(const struct options *o)
{
	const int counts[] = {o->seq_len.count,  o->data.count,     o->chunk.count,
	                      o->window.count,   o->position.count, o->groups.count,
	                      o->kv_heads.count, o->heads.count,    o->d_model.count,
	                      o->pass.count,     o->pattern.count,  o->model.count};
	int64_t product = 1;

	for (size_t i = 0; i < sizeof counts / sizeof *counts && product <= MAX_CASES; i++)
		product *= counts[i] ? counts[i] : 1;
	return product;
}

void pattern_names(const char *pattern, char separator, char *text, size_t size)
{
	size_t length = 0;
	int depth = 0;

	for (; *pattern && length + 1 < size; pattern++) {
		depth += *pattern == '(';
		if (depth == 0)
			text[length++] = *pattern == ',' ? separator : *pattern;
		depth -= *pattern == ')';
	}
	text[length] = '\0';
}

bool case_same_series(const struct bench_case *a, const struct bench_case *b)
{
	return a->pass == b->pass && strcmp(a->pattern, b->pattern) == 0 &&
	       strcmp(a->position, b->position) == 0 && strcmp(a->model, b->model) == 0 &&
	       strcmp(a->block, b->block) == 0 && a->chunk == b->chunk && a->window == b->window &&
	       a->groups == b->groups && a->kv_heads == b->kv_heads && a->d_model == b->d_model &&
	       a->n_heads == b->n_heads && a->prompt == b->prompt && a->generate == b->generate &&
	       a->data == b->data;
}

static bool sweep_has(const struct sweep *sweep, const struct bench_case *c)
{
	for (int i = 0; i < sweep->count; i++)
		if (sweep->cases[i].seq_len == c->seq_len && sweep->cases[i].batch == c->batch &&
		    case_same_series(&sweep->cases[i], c))
			return true;
	return false;
}

static enum status sweep_append(struct sweep *sweep, const struct options *options, int64_t n,
                                configure_case configure, void *self)
{
	struct bench_case c = case_at(options, n);

	c.is_baseline =
	        strcmp(c.pattern, options->baseline[0] ? options->baseline : "attention") == 0;
	enum status status = configure(self, options, &c);

	if (status != STATUS_OK && status != STATUS_INVALID && status != STATUS_UNSUPPORTED)
		return status;
	if (status != STATUS_OK) {
		c.status = STATUS_UNSUPPORTED;
		snprintf(c.message, sizeof c.message, "%s", status_message());
	}
	if (!sweep_has(sweep, &c))
		sweep->cases[sweep->count++] = c;
	return STATUS_OK;
}

enum status sweep_expect_possible(const struct sweep *sweep)
{
	for (int i = 0; i < sweep->count; i++)
		if (sweep->cases[i].status == STATUS_OK)
			return STATUS_OK;
	return status_set(STATUS_INVALID, "%s",
	                  sweep->count ? sweep->cases[0].message : "the sweep has no cases");
}

enum status sweep_create(struct sweep *sweep, const struct options *options,
                         configure_case configure, void *self)
{
	const int64_t count = count_cases(options);
	enum status status = STATUS_OK;

	*sweep = (struct sweep){0};
	if (count > MAX_CASES)
		return status_set(STATUS_INVALID, "the lists make a sweep of more than %d cases",
		                  MAX_CASES);
	sweep->cases = calloc((size_t)count, sizeof *sweep->cases);
	if (!sweep->cases)
		return status_set(STATUS_OOM, "no memory for a sweep");
	for (int64_t n = 0; status == STATUS_OK && n < count; n++)
		status = sweep_append(sweep, options, n, configure, self);
	if (status == STATUS_OK)
		status = sweep_expect_possible(sweep);
	if (status != STATUS_OK)
		sweep_release(sweep);
	return status;
}

void sweep_release(struct sweep *sweep)
{
	free(sweep->cases);
	*sweep = (struct sweep){0};
}
