/*
 * Each token has a part of the direction of a query's topic and, in its strength, of a key's. The
 * norm before a layer leaves of x = noise + q + k s, s being the strength, q and k s over the root
 * of 2 + s^2; in_proj takes q to queries and k to keys, in the direction of the topic in a head.
 * The strongest score is bounded by the norm, at `most_score`. Rotation turns a head's slowest
 * pairs least: only these have a direction, lest the first tokens be lost to the last.
 */
#include "layers/directions.h"

#include <math.h>
#include <stdlib.h>

/* What is left of a query's direction behind the norm, where keys are weak. */
static const float QUERY_LEFT = 0.7071f;

/* Of the sinks' strength of 12 a token has 3; of heavy tails the usual token has a third. */
static float token_share(enum data data)
{
	return data == DATA_SINKS ? 0.25f : 0.06f;
}

/* The score of a key of any strength, in multiples of which the norm leaves less than one. */
static float most_score(enum data data)
{
	return data == DATA_SINKS ? 13.0f : 40.0f;
}

/* Directions in a head: all of it, or a sixteenth of its pairs. */
static struct directions in_head(const struct stack *stack, const struct layer_config *config,
                                 const struct score_parts *parts)
{
	struct directions d = {.data = stack->data, .space = SPACE_HEAD};

	if (config->rope) {
		d.half = parts->width / 2;
		d.slow = d.half >= 16 ? d.half / 16 : 1;
	}
	return d;
}

/* What in_proj has for queries, and for keys: the product of both makes the most score. */
static float gain(const struct directions *d, int64_t width)
{
	const float channels = d->half > 0 ? 2.0f * (float)d->slow : (float)width;

	return sqrtf(most_score(d->data) * sqrtf((float)width) / (QUERY_LEFT * channels));
}

/* ---- tokens ---- */

static enum status add_to_tokens(struct stack *stack, void *x, int64_t sequences, int64_t length,
                                 bool keys, float share, uint64_t seed)
{
	const int64_t d = stack->d_model;
	const struct directions directions = {
	        .data = stack->data,
	        .keys = keys,
	        .space = keys ? SPACE_MODEL_KEYS : SPACE_MODEL_QUERIES,
	        .seed = seed,
	        .length = length,
	        .share = share,
	};
	const struct strided rows = {
	        .dtype = stack->device->activation,
	        .data = x,
	        .size = {sequences, length, 1, d},
	        .stride = {length * d, d, d, 1},
	};

	return stack->device->backend->add_directions(stack->device, &rows, &directions);
}

/* ---- projections ---- */

/* Signs of every topic's direction in the model, [topics][D]. */
static void make_signs(enum data data, enum space space, int64_t d, float *signs)
{
	for (int topic = 0; topic < data_topics(data); topic++)
		for (int64_t i = 0; i < d; i++)
			signs[topic * d + i] = direction_sign(space, topic, i);
}

/* To the row of a head's channel, what it takes of each topic's direction in the model. */
static void add_to_row(const struct directions *head, int64_t channel, float gain,
                       const float *signs, int64_t d, float *row)
{
	for (int topic = 0; topic < data_topics(head->data); topic++) {
		const float share = gain * direction_element(head, topic, channel) / (float)d;

		for (int64_t i = 0; i < d; i++)
			row[i] += share * signs[topic * d + i];
	}
}

/* Rows first .. first+count-1 of in_proj, which make queries or keys. */
static enum status add_to_rows(struct stack *stack, int layer, const struct directions *head,
                               enum space space, int64_t first, int64_t count, int64_t width)
{
	const enum dtype dtype = stack->device->activation;
	const int64_t d = stack->d_model;
	float *row = malloc((size_t)d * (DATA_TOPICS + 1) * sizeof *row);
	enum status status = STATUS_OK;

	if (!row)
		return status_set(STATUS_OOM, "no memory for a row");
	float *signs = row + d;

	make_signs(stack->data, space, d, signs);
	for (int64_t i = 0; i < count && status == STATUS_OK; i++) {
		void *place = (char *)stack->memory[layer].param[PARAM_IN_PROJ] +
		              (size_t)((first + i) * d) * dtype_size(dtype);

		if (direction_element(head, 0, i % width) == 0)
			continue;
		status = device_download_floats(stack->device, dtype, row, place, (size_t)d);
		add_to_row(head, i % width, gain(head, width), signs, d, row);
		if (status == STATUS_OK)
			status = device_upload_floats(stack->device, dtype, place, row, (size_t)d);
	}
	free(row);
	return status;
}

enum status stack_add_directions(struct stack *stack, uint64_t seed, float scale)
{
	const bool model = stack->vocab > 0, step = stack->shape.pass == PASS_GENERATION;
	void *x = model ? stack->embedding : stack->x;
	const int64_t sequences = model ? 1 : stack->shape.batch;
	const int64_t length = model ? stack->vocab : stack->shape.seq_len;

	TRY(add_to_tokens(stack, x, sequences, length, false, scale, seed));
	/* The token of a step is the last of its sequence, and nobody's sink. */
	if (model || !step)
		TRY(add_to_tokens(stack, x, sequences, length, true,
		                  scale * token_share(stack->data), seed));
	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];

		if (!config->class->scores)
			continue;
		const struct score_parts p = config->class->scores(config);
		const struct directions head = in_head(stack, config, &p);

		TRY(add_to_rows(stack, i, &head, SPACE_MODEL_QUERIES, p.first_query, p.n_query,
		                p.width));
		TRY(add_to_rows(stack, i, &head, SPACE_MODEL_KEYS, p.first_key, p.n_key, p.width));
	}
	return STATUS_OK;
}

/* ---- caches ---- */

enum status stack_add_cached_directions(struct stack *stack, uint64_t seed)
{
	struct tensor_spec specs[MAX_TENSORS];

	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];

		if (!config->class->scores)
			continue;
		const struct score_parts p = config->class->scores(config);
		config->class->state(config, &stack->shape, specs);
		const int64_t *n = specs[p.key_state].dims;
		struct directions d = in_head(stack, config, &p);

		d.keys = true;
		d.seed = seed + (uint64_t)i;
		d.length = n[2];
		d.share = gain(&d, p.width) / most_score(d.data);
		const struct strided rows = {
		        .dtype = tensor_dtype(&specs[p.key_state], stack->device),
		        .data = stack->memory[i].state[p.key_state],
		        .size = {n[0], n[2], n[1], n[3]},
		        .stride = {n[1] * n[2] * n[3], n[3], n[2] * n[3], 1},
		};
		if (rows.data)
			TRY(stack->device->backend->add_directions(stack->device, &rows, &d));
	}
	return STATUS_OK;
}
