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

static inline float silu_f32(float x)
{
	return x * sigmoid_f32(x);
}

/* tanh(x) = x p(x^2) near 0, where 1 - 2 / (1 + e^2x) would cancel. */
static inline float tanh_f32(float x)
{
	float s = x * x, p = -1382.0f / 155925.0f;
	float far = 1.0f - 2.0f / (1.0f + exp_f32(2.0f * fabsf(x)));

	p = fmaf(p, s, 62.0f / 2835.0f);
	p = fmaf(p, s, -17.0f / 315.0f);
	p = fmaf(p, s, 2.0f / 15.0f);
	p = fmaf(p, s, -1.0f / 3.0f);
	return s < 0.1f ? fmaf(x * s, p, x) : copysignf(far, x);
}

/* In blocks: a sum of thousands of squares one by one loses a hundred units in its last place where
 * nothing is vectorised. */
static inline float dot_f32(int64_t n, const float *x, const float *y)
{
	enum { BLOCK = 256 };
	float sum = 0;

	for (int64_t from = 0; from < n; from += BLOCK) {
		const int64_t end = n - from < BLOCK ? n : from + BLOCK;
		float part = 0;

#pragma omp simd reduction(+ : part)
		for (int64_t i = from; i < end; i++)
			part += x[i] * y[i];
		sum += part;
	}
	return sum;
}

/* log(1 + e) for -1/2 <= e <= 1 as 2 atanh(e / (2 + e)): relatively accurate however small e is. */
static inline float log1p_f32(float e)
{
	float y = e / (2.0f + e), s = y * y;
	float p = 1.0f / 15.0f;

	p = fmaf(p, s, 1.0f / 13.0f);
	p = fmaf(p, s, 1.0f / 11.0f);
	p = fmaf(p, s, 1.0f / 9.0f);
	p = fmaf(p, s, 1.0f / 7.0f);
	p = fmaf(p, s, 1.0f / 5.0f);
	p = fmaf(p, s, 1.0f / 3.0f);
	return 2.0f * fmaf(p * s, y, y);
}

/* 1 - e^x for x <= 0, relatively accurate however close to 0 that is. */
static inline float one_minus_exp_f32(float x)
{
	float p = 1.0f / 9.0f;

	/* -x (1 + x/2 (1 + x/3 (...))) down to -1/2. */
	p = fmaf(p * x, 1.0f / 8.0f, 1.0f / 8.0f);
	p = fmaf(p * x, 1.0f / 7.0f, 1.0f / 7.0f);
	p = fmaf(p * x, 1.0f / 6.0f, 1.0f / 6.0f);
	p = fmaf(p * x, 1.0f / 5.0f, 1.0f / 5.0f);
	p = fmaf(p * x, 1.0f / 4.0f, 1.0f / 4.0f);
	p = fmaf(p * x, 1.0f / 3.0f, 1.0f / 3.0f);
	p = fmaf(p * x, 1.0f / 2.0f, 1.0f / 2.0f);
	return x > -0.5f ? -fmaf(p * x, x, x) : 1.0f - exp_f32(x);
}

static inline float log_sigmoid_f32(float x)
{
	float negative = x > 0.0f ? 0.0f : x;

	return negative - log1p_f32(exp_f32(-fabsf(x)));
}

/* log(x) for normal x > 0: x = 2^e m with m near 1, log(m) = 2 atanh((m - 1) / (m + 1)). */
static inline float log_f32(float x)
{
	uint32_t bits, m_bits;
	memcpy(&bits, &x, sizeof bits);
	m_bits = (bits - 0x3f3504f3u) & 0x007fffffu; /* from sqrt(1/2) to sqrt(2) */
	float e = (float)((int32_t)(bits - 0x3f3504f3u) >> 23), m;
	m_bits += 0x3f3504f3u;
	memcpy(&m, &m_bits, sizeof m);
	float y = (m - 1.0f) / (m + 1.0f), s = y * y;
	float p = 1.0f / 9.0f;
	p = fmaf(p, s, 1.0f / 7.0f);
	p = fmaf(p, s, 1.0f / 5.0f);
	p = fmaf(p, s, 1.0f / 3.0f);
	return fmaf(e, 0.693147181f, 2.0f * fmaf(p * s, y, y)) + (x - x);
}

#endif
