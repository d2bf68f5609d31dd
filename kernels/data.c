/* The names of kinds of data, and their directions for heads. */
#include "kernels/data.h"

#include <string.h>

static const char *const names[DATA_COUNT] = {"normal", "small", "sinks", "peaked", "zeros"};

const char *data_name(enum data data)
{
	return names[data];
}

enum data data_find(const char *name)
{
	int data = 0;

	while (data < DATA_COUNT && strcmp(names[data], name) != 0)
		data++;
	return (enum data)data;
}

float data_scale(enum data data)
{
	return data == DATA_ZEROS ? 0.0f : data == DATA_SMALL ? 0.02f : 1.0f;
}

bool data_has_directions(enum data data)
{
	return data == DATA_SINKS || data == DATA_PEAKED;
}

/* A query has its direction's signs; a key of strength s has s/sqrt(d) of them: over d elements,
 * divided by sqrt(d), their product is s. */
struct directions directions_of_heads(enum data data, bool keys, uint64_t seed, int64_t length,
                                      int64_t d)
{
	return (struct directions){.data = data,
	                           .keys = keys,
	                           .seed = seed,
	                           .length = length,
	                           .share = keys ? 1.0f / sqrtf((float)d) : 1.0f};
}
