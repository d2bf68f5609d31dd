/* Random numbers that depend on (seed, stream, index) alone, so they can be made in any order. */
#ifndef LAYERS_NOISE_H
#define LAYERS_NOISE_H

#include <stdint.h>

#include "kernels/noise.h"

/* out[i] = element first + i of a stream of normal(0, scale). */
void noise_normal(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float scale,
                  float *out);
/* Likewise, uniform in [low, high). */
void noise_uniform(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float low,
                   float high, float *out);

#endif
