/*
 * One generated token of attention. A task is one head of one sequence: it
 * stores the rotated key and the value in the cache, then walks over the
 * visible slots in blocks with an online softmax. The cache is read once; the
 * rest is small beside that.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/vector_math.h"

enum { BLOCK_SLOTS = 256 };

/* The softmax of one head so far; out holds the numerator, relative to exp(max). */
struct online_softmax {
	float max, total;
	float *out;
};

/* scores_s = scale * q.key_s, four slots at a time: their sums do not wait for one another. */
static void dot_products(const struct attention_step_args *a, const float *q, const float *keys,
                         int64_t n, float *scores)
{
	int64_t stride = a->k_cache.token, s = 0;

	for (; s + 4 <= n; s += 4) {
		const float *k = keys + s * stride;
		float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;

#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
		for (int64_t i = 0; i < a->d_head; i++) {
			sum0 += q[i] * k[i];
			sum1 += q[i] * k[stride + i];
			sum2 += q[i] * k[2 * stride + i];
			sum3 += q[i] * k[3 * stride + i];
		}
		scores[s] = a->scale * sum0;
		scores[s + 1] = a->scale * sum1;
		scores[s + 2] = a->scale * sum2;
		scores[s + 3] = a->scale * sum3;
	}
	for (; s < n; s++) {
		const float *k = keys + s * stride;
		float sum = 0.0f;

#pragma omp simd reduction(+ : sum)
		for (int64_t i = 0; i < a->d_head; i++)
			sum += q[i] * k[i];
		scores[s] = a->scale * sum;
	}
}

/* out += sum of p_s values_s, four slots at a time: out is loaded and stored once for the four. */
static void add_values(const struct attention_step_args *a, const float *p, const float *values,
                       int64_t n, float *out)
{
	int64_t stride = a->v_cache.token, s = 0;

	for (; s + 4 <= n; s += 4) {
		const float *v = values + s * stride;
#pragma omp simd
		for (int64_t i = 0; i < a->d_head; i++)
			out[i] += p[s] * v[i] + p[s + 1] * v[stride + i] +
			          p[s + 2] * v[2 * stride + i] + p[s + 3] * v[3 * stride + i];
	}
	for (; s < n; s++) {
		const float *v = values + s * stride;
#pragma omp simd
		for (int64_t i = 0; i < a->d_head; i++)
			out[i] += p[s] * v[i];
	}
}

/* Adds n consecutive slots, at most BLOCK_SLOTS, to the softmax. */
static void attend_block(const struct attention_step_args *a, const float *q, const float *keys,
                         const float *values, int64_t n, struct online_softmax *state)
{
	float p[BLOCK_SLOTS], max = state->max, total = 0.0f;

	dot_products(a, q, keys, n, p);
	for (int64_t s = 0; s < n; s++)
		max = p[s] > max ? p[s] : max;
	float shrink = exp_f32(state->max - max);
#pragma omp simd reduction(+ : total)
	for (int64_t s = 0; s < n; s++) {
		p[s] = exp_f32(p[s] - max);
		total += p[s];
	}
	for (int64_t i = 0; i < a->d_head; i++)
		state->out[i] *= shrink;
	add_values(a, p, values, n, state->out);
	state->total = state->total * shrink + total;
	state->max = max;
}

static void attend_slots(const struct attention_step_args *a, int64_t b, int64_t h, const float *q,
                         int64_t first, int64_t end, struct online_softmax *state)
{
	for (int64_t s = first; s < end; s += BLOCK_SLOTS)
		attend_block(a, q, view_at(&a->k_cache, b, s, h), view_at(&a->v_cache, b, s, h),
		             end - s < BLOCK_SLOTS ? end - s : BLOCK_SLOTS, state);
}

/* rotation: of this position, or NULL. q: scratch [d]. */
static void step_head(const struct attention_step_args *a, int64_t b, int64_t h, int64_t position,
                      const float *rotation, float *q)
{
	int64_t d = a->d_head, slot = position % a->kv_slots;
	int64_t n = 1 + (a->window >= 0 && a->window < position ? a->window : position);
	int64_t first = (position + 1 - n) % a->kv_slots;
	struct online_softmax state = {.max = -FLT_MAX, .out = view_at(&a->out, b, 0, h)};

	chunk_rope_rotate(d, rotation, view_at(&a->q, b, 0, h), q);
	chunk_rope_rotate(d, rotation, view_at(&a->k, b, 0, h), view_at(&a->k_cache, b, slot, h));
	memcpy(view_at(&a->v_cache, b, slot, h), view_at(&a->v, b, 0, h),
	       (size_t)d * sizeof(float));
	memset(state.out, 0, (size_t)d * sizeof(float));
	if (first <= slot) {
		attend_slots(a, b, h, q, first, slot + 1, &state);
	} else {
		attend_slots(a, b, h, q, first, a->kv_slots, &state);
		attend_slots(a, b, h, q, 0, slot + 1, &state);
	}
	for (int64_t i = 0; i < d; i++)
		state.out[i] /= state.total;
}

/* The rotation, [d], and a rotated query for every head of every sequence. */
size_t cpu_attention_step_workspace(const void *args)
{
	const struct attention_step_args *a = args;

	return (size_t)((1 + a->batch * a->n_heads) * a->d_head) * sizeof(float);
}

enum status cpu_attention_step(const void *args, void *workspace)
{
	const struct attention_step_args *a = args;
	int64_t position = *a->position;
	float *rotation = a->rope ? workspace : NULL;
	float *queries = (float *)workspace + a->d_head;

	if (rotation)
		chunk_rope_table(a->d_head, position, 1, rotation);
#pragma omp parallel for collapse(2) schedule(static)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			step_head(a, b, h, position, rotation,
			          queries + (b * a->n_heads + h) * a->d_head);
	return STATUS_OK;
}
