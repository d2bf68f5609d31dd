/*
 * One generated token of RAT. A task is one head of one sequence: it updates
 * the running pair, then attends to the stored chunks in blocks with an online
 * softmax that starts from the running pair's own score.
 */
#include <math.h>
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/recurrence.h"

enum { BLOCK_SLOTS = 64 };

/* softmax(own, scores)-weighted values so far: o / sum, relative to exp(max). */
struct online_softmax {
	float max, sum;
};

static float dot(int64_t d, const float *x, const float *y)
{
	float sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++)
		sum += x[i] * y[i];
	return sum;
}

/* The running pair after this token; zero before the first token of a chunk. */
static void advance(const struct rat_step_args *a, int64_t b, int64_t h, bool reset, float *kt,
                    float *vt)
{
	int64_t d = a->d_head;
	const float *k = view_at(&a->k, b, 0, h % a->groups), *v = view_at(&a->v, b, 0, h);
	const float *gate = view_at(&a->gate, b, 0, h), *bias = a->gate_bias + h * d;

	if (reset) {
		memset(kt, 0, sizeof *kt * (size_t)d);
		memset(vt, 0, sizeof *vt * (size_t)d);
	}
#pragma omp simd
	for (int64_t i = 0; i < d; i++) {
		struct gate_pair g = sigmoid_gate(gate[i] + bias[i]);

		kt[i] = g.decay * kt[i] + g.input * k[i];
		vt[i] = g.decay * vt[i] + g.input * v[i];
	}
}

/* Adds n stored chunks from slot `first` on to the softmax and to out, its running numerator. */
static void attend_block(const struct rat_step_args *a, int64_t b, int64_t h, int64_t first,
                         int64_t n, const float *q, struct online_softmax *s, float *out)
{
	int64_t d = a->d_head;
	float score[BLOCK_SLOTS], max = s->max;

	for (int64_t i = 0; i < n; i++) {
		score[i] = a->scale * dot(d, q, view_at(&a->k_chunk, b, first + i, h));
		max = score[i] > max ? score[i] : max;
	}
	float rescale = exp_f32(s->max - max);
	s->sum *= rescale;
	for (int64_t i = 0; i < d; i++)
		out[i] *= rescale;
	for (int64_t i = 0; i < n; i++) {
		const float *v = view_at(&a->v_chunk, b, first + i, h);
		float p = exp_f32(score[i] - max);

		s->sum += p;
#pragma omp simd
		for (int64_t j = 0; j < d; j++)
			out[j] += p * v[j];
	}
	s->max = max;
}

/* rotation: of this chunk, or NULL. q: scratch [d]. */
static void step_head(const struct rat_step_args *a, int64_t b, int64_t h, int64_t position,
                      const float *rotation, float *q)
{
	int64_t d = a->d_head, chunk = position / a->chunk;
	float *kt = a->k_state + (b * a->n_heads + h) * d;
	float *vt = a->v_state + (b * a->n_heads + h) * d;
	float *out = view_at(&a->out, b, 0, h);
	const float *z = view_at(&a->z, b, 0, h), *q_raw = view_at(&a->q, b, 0, h % a->groups);

	advance(a, b, h, position % a->chunk == 0, kt, vt);
	struct online_softmax s = {.max = a->scale * dot(d, q_raw, kt), .sum = 1};
	memcpy(out, vt, sizeof *out * (size_t)d);
	chunk_rope_rotate(d, rotation, q_raw, q);
	for (int64_t first = 0; first < chunk; first += BLOCK_SLOTS)
		attend_block(a, b, h, first,
		             chunk - first < BLOCK_SLOTS ? chunk - first : BLOCK_SLOTS, q, &s, out);
	float inverse = 1.0f / s.sum;
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		out[i] *= inverse * sigmoid_f32(z[i]);
	if (position % a->chunk != a->chunk - 1)
		return;
	chunk_rope_rotate(d, rotation, kt, view_at(&a->k_chunk, b, chunk, h));
	memcpy(view_at(&a->v_chunk, b, chunk, h), vt, sizeof *vt * (size_t)d);
}

/* The rotation, [d], and a rotated query for every head of every sequence. */
size_t cpu_rat_step_workspace(const void *args)
{
	const struct rat_step_args *a = args;

	return sizeof(float) * (size_t)((1 + a->batch * a->n_heads) * a->d_head);
}

enum status cpu_rat_step(const void *args, void *workspace)
{
	const struct rat_step_args *a = args;
	int64_t position = *a->position;
	float *rotation = a->rope ? workspace : NULL;
	float *queries = (float *)workspace + a->d_head;

	if (rotation)
		chunk_rope_table(a->d_head, position / a->chunk, 1, rotation);
#pragma omp parallel for collapse(2) schedule(static)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			step_head(a, b, h, position, rotation,
			          queries + (b * a->n_heads + h) * a->d_head);
	return STATUS_OK;
}
