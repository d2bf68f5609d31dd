/*
 * One generated token of RAT. A task is one head of one sequence: it updates
 * the running pair, then attends to the stored chunks with an online softmax
 * that starts from the running pair's own score.
 */
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/online_softmax.h"
#include "kernels/cpu/recurrence.h"

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
	float own = a->scale * dot_f32(d, q_raw, kt);
	/* own - own: 0, or NaN, which must not be lost where there is no other score. */
	struct online_softmax softmax = {.max = own, .total = exp_f32(own - own), .out = out};
	struct cached_head cache = {b, h, d, &a->k_chunk, &a->v_chunk};
	memcpy(out, vt, sizeof *out * (size_t)d);
	chunk_rope_rotate(d, rotation, q_raw, q);
	online_softmax_add(&softmax, &cache, q, a->scale, 0, chunk);
	float inverse = 1.0f / softmax.total;
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		out[i] *= inverse * sigmoid_f32(z[i]);
	if (position % a->chunk != a->chunk - 1)
		return;
	chunk_rope_rotate(d, rotation, kt, view_at(&a->k_chunk, b, chunk, h));
	memcpy(view_at(&a->v_chunk, b, chunk, h), vt, sizeof *vt * (size_t)d);
}

/* The rotation, [d], and a rotated query for every head of every sequence. */
size_t cpu_rat_step_workspace(const struct device *device, const void *args)
{
	const struct rat_step_args *a = args;

	return sizeof(float) * (size_t)((1 + a->batch * a->n_heads) * a->d_head);
}

enum status cpu_rat_step(struct device *device, const void *args, void *workspace)
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
