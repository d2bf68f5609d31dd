/* Counter-based random numbers: a 64-bit finalizer (splitmix64) over the counter. */
#include "layers/noise.h"

#include <math.h>

static const uint64_t odd_step = 0x9e3779b97f4a7c15u;

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

uint64_t noise_bits(uint64_t seed, uint64_t stream, uint64_t index)
{
	return mix(mix(mix(seed + odd_step) + stream * odd_step) + (index + 1) * odd_step);
}

/* In (0, 1], from the upper or the lower half of the bits. */
static float unit(uint64_t half)
{
	return (float)((half & 0xffffffu) + 1) * 0x1p-24f;
}

void noise_normal(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float scale,
                  float *out)
{
#pragma omp parallel for schedule(static)
	for (int64_t i = 0; i < count; i++) {
		uint64_t bits = noise_bits(seed, stream, (uint64_t)(first + i));
		float angle = 6.28318531f * unit(bits);

		out[i] = scale * sqrtf(-2.0f * logf(unit(bits >> 32))) * cosf(angle);
	}
}

void noise_uniform(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float low,
                   float high, float *out)
{
#pragma omp parallel for schedule(static)
	for (int64_t i = 0; i < count; i++) {
		uint64_t bits = noise_bits(seed, stream, (uint64_t)(first + i)) >> 40;

		out[i] = low + (high - low) * ((float)bits * 0x1p-24f);
	}
}
