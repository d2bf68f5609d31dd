#include "kernels/cpu/online_softmax.h"

#include "kernels/cpu/vector_math.h"

enum { BLOCK_SLOTS = 256 };

/* p_s = scale * q.key_s, four slots at a time: their sums do not wait for one another. */
static void dot_products(int64_t d, const float *q, const float *keys, int64_t stride, float scale,
                         int64_t n, float *p)
{
	int64_t s = 0;

	for (; s + 4 <= n; s += 4) {
		const float *k = keys + s * stride;
		float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;

#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
		for (int64_t i = 0; i < d; i++) {
			sum0 += q[i] * k[i];
			sum1 += q[i] * k[stride + i];
			sum2 += q[i] * k[2 * stride + i];
			sum3 += q[i] * k[3 * stride + i];
		}
		p[s] = scale * sum0;
		p[s + 1] = scale * sum1;
		p[s + 2] = scale * sum2;
		p[s + 3] = scale * sum3;
	}
	for (; s < n; s++)
		p[s] = scale * dot_f32(d, q, keys + s * stride);
}

/* out += the sum of p_s value_s, four slots at a time: out is loaded and stored once for the four.
 */
static void add_values(int64_t d, const float *p, const float *values, int64_t stride, int64_t n,
                       float *out)
{
	int64_t s = 0;

	for (; s + 4 <= n; s += 4) {
		const float *v = values + s * stride;

#pragma omp simd
		for (int64_t i = 0; i < d; i++)
			out[i] += p[s] * v[i] + p[s + 1] * v[stride + i] +
			          p[s + 2] * v[2 * stride + i] + p[s + 3] * v[3 * stride + i];
	}
	for (; s < n; s++) {
		const float *v = values + s * stride;

#pragma omp simd
		for (int64_t i = 0; i < d; i++)
			out[i] += p[s] * v[i];
	}
}

/* n slots from `first` on, at most BLOCK_SLOTS. */
static void add_block(struct online_softmax *softmax, const struct cached_head *cache,
                      const float *q, float scale, int64_t first, int64_t n)
{
	float p[BLOCK_SLOTS], max = softmax->max, total = 0;

	dot_products(cache->d, q, view_at(cache->k, cache->b, first, cache->h), cache->k->token,
	             scale, n, p);
	for (int64_t s = 0; s < n; s++)
		max = p[s] > max ? p[s] : max;
	float shrink = exp_f32(softmax->max - max);
#pragma omp simd reduction(+ : total)
	for (int64_t s = 0; s < n; s++) {
		p[s] = exp_f32(p[s] - max);
		total += p[s];
	}
	for (int64_t i = 0; i < cache->d; i++)
		softmax->out[i] *= shrink;
	add_values(cache->d, p, view_at(cache->v, cache->b, first, cache->h), cache->v->token, n,
	           softmax->out);
	softmax->total = softmax->total * shrink + total;
	softmax->max = max;
}

void online_softmax_add(struct online_softmax *softmax, const struct cached_head *cache,
                        const float *q, float scale, int64_t first, int64_t end)
{
	for (int64_t s = first; s < end; s += BLOCK_SLOTS)
		add_block(softmax, cache, q, scale, s,
		          end - s < BLOCK_SLOTS ? end - s : BLOCK_SLOTS);
}
