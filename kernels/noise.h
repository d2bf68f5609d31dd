/* Random bits that depend on (seed, stream, index) alone, so they can be made in any order and
 * anywhere: a 64-bit finalizer (splitmix64) over a counter. */
#ifndef KERNELS_NOISE_H
#define KERNELS_NOISE_H

#include <stdint.h>

#ifdef __CUDACC__
#define NOISE_FUNCTION static inline __host__ __device__
#else
#define NOISE_FUNCTION static inline
#endif

NOISE_FUNCTION uint64_t noise_mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

/* 64 random bits: element `index` of a stream. */
NOISE_FUNCTION uint64_t noise_bits(uint64_t seed, uint64_t stream, uint64_t index)
{
	const uint64_t odd_step = 0x9e3779b97f4a7c15u;

	return noise_mix(noise_mix(noise_mix(seed + odd_step) + stream * odd_step) +
	                 (index + 1) * odd_step);
}

/* In (0, 1], from the upper or the lower half of the bits. */
NOISE_FUNCTION float noise_unit(uint64_t half)
{
	return (float)((half & 0xffffffu) + 1) * 0x1p-24f;
}

/* A number of either sign, about 1, never near 0. */
NOISE_FUNCTION double noise_sign(uint64_t seed, uint64_t stream, uint64_t index)
{
	const uint64_t bits = noise_bits(seed, stream, index);
	const double size = 0.5 + (double)noise_unit(bits);

	return bits >> 63 ? size : -size;
}

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = element first + i of a stream of normal(0, scale). */
void noise_normal(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float scale,
                  float *out);
/* Likewise, uniform in [low, high). */
void noise_uniform(uint64_t seed, uint64_t stream, int64_t first, int64_t count, float low,
                   float high, float *out);

#ifdef __cplusplus
}
#endif

#endif
