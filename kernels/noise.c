/* Counter-based random numbers of the usual distributions. */
#include "kernels/noise.h"

#include <math.h>

void noise_normal(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float scale,
                  float *out)
{
#pragma omp parallel for schedule(static)
	for (int64_t i = 0; i < count; i++) {
		uint64_t bits = noise_bits(seed, stream, (uint64_t)(first + i));
		float angle = 6.28318531f * noise_unit(bits);

		out[i] = scale * sqrtf(-2.0f * logf(noise_unit(bits >> 32))) * cosf(angle);
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
