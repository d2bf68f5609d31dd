/* What the reference's files share, and nobody else. */
#ifndef KERNELS_REFERENCE_SHARED_H
#define KERNELS_REFERENCE_SHARED_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/noise.h"
#include "kernels/reference/common.h"
#include "kernels/reference/reference.h"

/* `count` doubles for free(), or NULL with a message. */
static inline double *take_doubles(int64_t count)
{
	double *memory = malloc((size_t)count * sizeof *memory + 1);

	if (!memory)
		status_set(STATUS_OOM, "no memory for %lld doubles of a reference",
		           (long long)count);
	return memory;
}

static inline void zero(int64_t count, double *x)
{
	memset(x, 0, sizeof *x * (size_t)count);
}

static inline double dot(int64_t count, const double *x, const double *y)
{
	double sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < count; i++)
		sum += x[i] * y[i];
	return sum;
}

static inline void add_scaled(int64_t count, double weight, const double *x, double *sum)
{
#pragma omp simd
	for (int64_t i = 0; i < count; i++)
		sum[i] += weight * x[i];
}

/* What decay number i is off by in a probe. */
static inline double decay_jitter(const struct device *device, int64_t i)
{
	return device->decay_jitter > 0
	               ? device->decay_jitter * noise_sign(device->decay_seed, 0, (uint64_t)i)
	               : 0;
}

/* log(1 + e^x) without cancellation. */
static inline double softplus(double x)
{
	return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

static inline double silu(double x)
{
	return x * sigmoid(x);
}

static inline double silu_derivative(double x)
{
	double s = sigmoid(x);

	return s * (1 + x * (1 - s));
}

/* Turns raw products w[lo .. hi] into probabilities, the own score (or NULL) included; returns the
 * logarithm of the denominator. */
static inline double softmax(double scale, double *w, int64_t lo, int64_t hi,
                             const double *own_score, double *own_probability)
{
	double max = own_score ? *own_score : -INFINITY, sum = 0;

	for (int64_t s = lo; s < hi; s++) {
		w[s] *= scale;
		max = w[s] > max ? w[s] : max;
	}
	for (int64_t s = lo; s < hi; s++) {
		w[s] = exp(w[s] - max);
		sum += w[s];
	}
	*own_probability = own_score ? exp(*own_score - max) : 0;
	sum += *own_probability;
	for (int64_t s = lo; s < hi; s++)
		w[s] /= sum;
	*own_probability /= sum;
	return max + log(sum);
}

/* 1 / sqrt(mean(x^2) + eps). */
static inline double inverse_rms(int64_t d, double eps, const double *x)
{
	double sum = 0;

	for (int64_t i = 0; i < d; i++)
		sum += x[i] * x[i];
	return 1 / sqrt(sum / (double)d + eps);
}

/* One row of an RMSNorm: with u = x r, r the inverse of its rms, dx = r (w dy - u mean(u w dy)),
 * and dy u is added to dweight. dx may be dy. */
static inline void norm_row_backward(int64_t d, double r, const double *x, const double *weight,
                                     const double *dy, double *dx, double *dweight)
{
	double mean = 0;

	for (int64_t i = 0; i < d; i++) {
		mean += x[i] * r * weight[i] * dy[i] / (double)d;
		dweight[i] += dy[i] * x[i] * r;
	}
	for (int64_t i = 0; i < d; i++)
		dx[i] = r * (weight[i] * dy[i] - x[i] * r * mean);
}

/* What is rotated, and which way: sign 1, or -1 for the gradient; rope false: copied. Of a head the
 * first `width` columns turn, 0: all. */
struct rotation {
	int64_t batch, n_heads, d_head;
	bool rope;
	double sign;
	int64_t width;
};

/* Token t of every sequence of `from`, at this position, to token t_out of `to`; the views may be
 * the same: every pair (x_i, x_{i+w/2}) of w columns turns by sign * position * 10000^(-2i/w). */
static inline void rotate_token(const struct rotation *r, int64_t position, const struct view *from,
                                int64_t t, const struct view *to, int64_t t_out)
{
	int64_t width = !r->rope ? 0 : r->width > 0 ? r->width : r->d_head;
	int64_t half = width / 2, n = r->batch * r->n_heads;

	for (int64_t j = 0; width < r->d_head && j < n; j++)
		memmove(at(to, j / r->n_heads, t_out, j % r->n_heads) + width,
		        at(from, j / r->n_heads, t, j % r->n_heads) + width,
		        sizeof(double) * (size_t)(r->d_head - width));
	for (int64_t i = 0; i < half; i++) {
		double angle = (double)position * pow(10000, -2 * (double)i / (double)width);
		double c = cos(angle), s = r->sign * sin(angle);

		for (int64_t j = 0; j < n; j++) {
			const double *x = at(from, j / r->n_heads, t, j % r->n_heads);
			double *y = at(to, j / r->n_heads, t_out, j % r->n_heads);
			double x1 = x[i], x2 = x[i + half];

			y[i] = x1 * c - x2 * s;
			y[i + half] = x2 * c + x1 * s;
		}
	}
}

#endif
