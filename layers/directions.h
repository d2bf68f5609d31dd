/* Scores of a stack's attention with a shape: sinks, heavy tails (kernels/data.h, docs/data.md). */
#ifndef LAYERS_DIRECTIONS_H
#define LAYERS_DIRECTIONS_H

#include "layers/stack.h"

/* To the inputs of a stack (x; of a model the embeddings, which are normal(0, scale)) and to the
 * projections that make queries and keys of them. */
enum status stack_add_directions(struct stack *stack, uint64_t seed, float scale);
/* To the keys in the caches. */
enum status stack_add_cached_directions(struct stack *stack, uint64_t seed);

#endif
