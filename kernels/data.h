/*
 * What random inputs are like (docs/data.md): normal numbers, or such that attention scores have
 * the shape that trained models give them.
 *
 * Scores take their shape from a few directions. Queries and keys are noise, and each has a share
 * of the direction of its topic: where topics agree, the score is the key's strength; where not,
 * noise.
 */
#ifndef KERNELS_DATA_H
#define KERNELS_DATA_H

#include <math.h>
#include <stdbool.h>

#include "kernels/noise.h"

#ifdef __cplusplus
extern "C" {
#endif

enum data {
	DATA_NORMAL, /* normal(0, 1), or what an operand's description says */
	DATA_SMALL,  /* 0.02 times that */
	DATA_SINKS,  /* the first tokens and a few others have large scores with every query */
	DATA_PEAKED, /* heavy tails: each query has a few keys with much larger scores */
	DATA_ZEROS,
	DATA_COUNT
};

/* "normal,small,sinks,peaked,zeros": the words of --data. */
#define DATA_WORDS "normal,small,sinks,peaked,zeros"

/* "peaked". */
const char *data_name(enum data data);
/* DATA_COUNT if there is none of this name. */
enum data data_find(const char *name);
/* What normal inputs are multiplied with. */
float data_scale(enum data data);
/* Whether queries and keys have directions. */
bool data_has_directions(enum data data);

enum { DATA_TOPICS = 16, SINK_TOKENS = 4, TOKENS_PER_LATER_SINK = 1024 };

/* What is spanned by directions: a head, or the channels of a model from which projections make
 * queries and keys. */
enum space { SPACE_HEAD, SPACE_MODEL_QUERIES, SPACE_MODEL_KEYS };

/* The directions of some queries, or of some keys. */
struct directions {
	enum data data;
	bool keys;
	enum space space;
	uint64_t seed;
	int64_t length; /* tokens of a sequence; strengths depend on how far a key is along it */
	/* Of heads whose pairs (i, i + half) positions turn: the last `slow` of them alone have a
	 * direction. 0: all channels. */
	int64_t half, slow;
	/* Of each element of a query: how much of its direction's sign; of a key: how much for each
	 * unit of strength. */
	float share;
};

/* ---- the parts, for the host and a device ---- */

enum {
	SEED_OF_SIGNS = 1,
	STREAM_SIGNS = 1 << 21, /* and of each topic in each space one more */
	STREAM_QUERIES = STREAM_SIGNS + 3 * DATA_TOPICS,
	STREAM_KEYS
};

NOISE_FUNCTION uint64_t direction_bits(const struct directions *d, int64_t sequence,
                                       int64_t position, int64_t head)
{
	const uint64_t stream = (d->keys ? STREAM_KEYS : STREAM_QUERIES) + ((uint64_t)head << 32);

	return noise_bits(d->seed, stream, (uint64_t)(sequence * d->length + position));
}

/* -1 or 1: element `channel` of a topic's direction, the same for queries and keys of any seed. */
NOISE_FUNCTION float direction_sign(enum space space, int topic, int64_t channel)
{
	const uint64_t stream = STREAM_SIGNS + (uint64_t)space * DATA_TOPICS + (uint64_t)topic;

	return noise_bits(SEED_OF_SIGNS, stream, (uint64_t)channel) & 1 ? 1.0f : -1.0f;
}

/* The same, 0 where the direction has nothing. */
NOISE_FUNCTION float direction_element(const struct directions *d, int topic, int64_t channel)
{
	const bool fast = d->half > 0 && channel % d->half < d->half - d->slow;

	return fast ? 0.0f : direction_sign(d->space, topic, channel);
}

static inline int data_topics(enum data data)
{
	return data == DATA_PEAKED ? DATA_TOPICS : 1;
}

NOISE_FUNCTION int direction_topic(enum data data, uint64_t bits)
{
	return data == DATA_PEAKED ? (int)(bits >> 48) % DATA_TOPICS : 0;
}

/*
 * What a key adds to the scores of the queries of its topic. Peaked: exponentially distributed with
 * a mean of 5. Half of the topics get stronger along a sequence and half weaker, so that maxima
 * grow late whichever way a kernel walks along the keys.
 */
NOISE_FUNCTION float key_strength(const struct directions *d, int64_t position, uint64_t bits)
{
	const float along = (float)position / (float)d->length;

	if (d->data == DATA_SINKS)
		return position < SINK_TOKENS                      ? 12.0f
		       : (bits >> 24) % TOKENS_PER_LATER_SINK == 0 ? 8.0f
		                                                   : 0.0f;
	const float slope = direction_topic(d->data, bits) % 2 ? 1.5f - along : 0.5f + along;

	return -5.0f * slope * logf(noise_unit(bits));
}

/* What a row's elements have of its direction; *topic: which. */
NOISE_FUNCTION float direction_share(const struct directions *d, int64_t sequence, int64_t position,
                                     int64_t head, int *topic)
{
	const uint64_t bits = direction_bits(d, sequence, position, head);

	*topic = direction_topic(d->data, bits);
	return d->share * (d->keys ? key_strength(d, position, bits) : 1.0f);
}

/* ---- whole tensors ---- */

/* Of queries and keys of heads `d` wide, whose scores are divided by the root of d. */
struct directions directions_of_heads(enum data data, bool keys, uint64_t seed, int64_t length,
                                      int64_t d);

#ifdef __cplusplus
}
#endif

#endif
