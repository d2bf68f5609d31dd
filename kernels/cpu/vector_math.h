/*
 * Branch-free elementary functions that gcc vectorises inside `omp simd`
 * loops. fp32, a few ulp; NaN in gives NaN out.
 */
#ifndef KERNELS_CPU_VECTOR_MATH_H
#define KERNELS_CPU_VECTOR_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x: Cody-Waite reduction by ln 2, then a degree-6 polynomial. 0 below -87.3; x above 88.3
 * saturates near FLT_MAX. */
static inline float exp_f32(float x)
{
	float z = x < -87.3f ? -87.3f : x;
	z = z > 88.3f ? 88.3f : z;
	float n = rintf(z * 1.44269504f);
	float r = fmaf(n, -0.693359375f, z);
	r = fmaf(n, 2.12194440e-4f, r);
	float p = 1.9875691500e-4f;
	p = fmaf(p, r, 1.3981999507e-3f);
	p = fmaf(p, r, 8.3334519073e-3f);
	p = fmaf(p, r, 4.1665795894e-2f);
	p = fmaf(p, r, 1.6666665459e-1f);
	p = fmaf(p, r, 5.0000001201e-1f);
	p = fmaf(p, r * r, r) + 1.0f;
	uint32_t bits = ((uint32_t)(int32_t)n + 127u) << 23;
	float scale;
	memcpy(&scale, &bits, sizeof scale);
	return x < -87.3f ? 0.0f : p * scale;
}

/* 1 / (1 + e^-x). */
static inline float sigmoid_f32(float x)
{
	return 1.0f / (1.0f + exp_f32(-x));
}

#endif
