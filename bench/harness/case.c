#include "bench/harness/case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CASES = 10000 };

/* The lists of the product, outermost first. A list without values stands for one NO_VALUE or "",
 * so that every case has exactly one value from each. */
enum axis {
	AXIS_MODEL,
	AXIS_PATTERN,
	AXIS_PASS,
	AXIS_D_MODEL,
	AXIS_HEADS,
	AXIS_GROUPS,
	AXIS_POSITION,
	AXIS_WINDOW,
	AXIS_CHUNK,
	AXIS_SEQ_LEN,
	N_AXES
};

static int at_least_one(int count)
{
	return count ? count : 1;
}

static void axis_counts(const struct options *o, int counts[N_AXES])
{
	counts[AXIS_MODEL] = at_least_one(o->model.count);
	counts[AXIS_PATTERN] = at_least_one(o->pattern.count);
	counts[AXIS_PASS] = at_least_one(o->pass.count);
	counts[AXIS_D_MODEL] = at_least_one(o->d_model.count);
	counts[AXIS_HEADS] = at_least_one(o->heads.count);
	counts[AXIS_GROUPS] = at_least_one(o->groups.count);
	counts[AXIS_POSITION] = at_least_one(o->position.count);
	counts[AXIS_WINDOW] = at_least_one(o->window.count);
	counts[AXIS_CHUNK] = at_least_one(o->chunk.count);
	counts[AXIS_SEQ_LEN] = at_least_one(o->seq_len.count);
}

static const char *word_at(const struct words *words, int i)
{
	return words->count ? words->word[i] : "";
}

static int64_t value_at(const struct values *values, int i)
{
	return values->count ? values->value[i] : NO_VALUE;
}

static struct bench_case case_at(const struct options *o, const int i[N_AXES])
{
	return (struct bench_case){
	        .pass = word_at(&o->pass, i[AXIS_PASS]),
	        .pattern = word_at(&o->pattern, i[AXIS_PATTERN]),
	        .position = word_at(&o->position, i[AXIS_POSITION]),
	        .model = word_at(&o->model, i[AXIS_MODEL]),
	        .seq_len = value_at(&o->seq_len, i[AXIS_SEQ_LEN]),
	        .chunk = value_at(&o->chunk, i[AXIS_CHUNK]),
	        .window = value_at(&o->window, i[AXIS_WINDOW]),
	        .groups = value_at(&o->groups, i[AXIS_GROUPS]),
	        .d_model = value_at(&o->d_model, i[AXIS_D_MODEL]),
	        .n_heads = value_at(&o->heads, i[AXIS_HEADS]),
	        .batch = NO_VALUE,
	        .prompt = NO_VALUE,
	        .generate = NO_VALUE,
	        .d_head = NO_VALUE,
	        .n_layers = NO_VALUE,
	        .d_k = NO_VALUE,
	        .d_v = NO_VALUE,
	        .tokens = NO_VALUE,
	        .micro_batch = NO_VALUE,
	};
}

bool case_same_series(const struct bench_case *a, const struct bench_case *b)
{
	return strcmp(a->pass, b->pass) == 0 && strcmp(a->pattern, b->pattern) == 0 &&
	       strcmp(a->position, b->position) == 0 && strcmp(a->model, b->model) == 0 &&
	       strcmp(a->block, b->block) == 0 && a->chunk == b->chunk && a->window == b->window &&
	       a->groups == b->groups && a->d_model == b->d_model && a->n_heads == b->n_heads &&
	       a->prompt == b->prompt && a->generate == b->generate;
}

static bool sweep_has(const struct sweep *sweep, const struct bench_case *c)
{
	for (int i = 0; i < sweep->count; i++)
		if (sweep->cases[i].seq_len == c->seq_len && sweep->cases[i].batch == c->batch &&
		    case_same_series(&sweep->cases[i], c))
			return true;
	return false;
}

static enum status sweep_append(struct sweep *sweep, const struct options *options,
                                const int index[N_AXES], configure_case configure, void *self)
{
	struct bench_case c = case_at(options, index);
	enum status status = configure(self, options, &c);

	if (status != STATUS_OK && status != STATUS_UNSUPPORTED)
		return status;
	c.status = status;
	if (status != STATUS_OK)
		snprintf(c.message, sizeof c.message, "%s", status_message());
	if (!sweep_has(sweep, &c))
		sweep->cases[sweep->count++] = c;
	return STATUS_OK;
}

enum status sweep_create(struct sweep *sweep, const struct options *options,
                         configure_case configure, void *self)
{
	int counts[N_AXES], index[N_AXES] = {0};
	int64_t product = 1;
	enum status status = STATUS_OK;

	*sweep = (struct sweep){0};
	axis_counts(options, counts);
	for (int a = 0; a < N_AXES; a++) {
		product *= counts[a];
		if (product > MAX_CASES)
			return status_set(STATUS_INVALID,
			                  "the lists make a sweep of more than %d cases",
			                  MAX_CASES);
	}
	sweep->cases = calloc((size_t)product, sizeof *sweep->cases);
	if (!sweep->cases)
		return status_set(STATUS_OOM, "no memory for a sweep");
	for (int64_t n = 0; status == STATUS_OK && n < product; n++) {
		int64_t rest = n;

		for (int a = N_AXES - 1; a >= 0; a--) {
			index[a] = (int)(rest % counts[a]);
			rest /= counts[a];
		}
		status = sweep_append(sweep, options, index, configure, self);
	}
	if (status != STATUS_OK)
		sweep_release(sweep);
	return status;
}

void sweep_release(struct sweep *sweep)
{
	free(sweep->cases);
	*sweep = (struct sweep){0};
}
