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
#include "kernels/cpu/online_softmax.h"

/* rotation: of this position, or NULL. q: scratch [d]. */
static void step_head(const struct attention_step_args *a, int64_t b, int64_t h, int64_t position,
                      const float *rotation, float *q)
{
	int64_t d = a->d_head, slot = position % a->kv_slots;
	int64_t n = 1 + (a->window >= 0 && a->window < position ? a->window : position);
	int64_t first = (position + 1 - n) % a->kv_slots;
	struct online_softmax state = {.max = -FLT_MAX, .out = view_at(&a->out, b, 0, h)};
	struct cached_head cache = {b, h, d, &a->k_cache, &a->v_cache};

	chunk_rope_rotate(d, rotation, view_at(&a->q, b, 0, h), q);
	chunk_rope_rotate(d, rotation, view_at(&a->k, b, 0, h), view_at(&a->k_cache, b, slot, h));
	memcpy(view_at(&a->v_cache, b, slot, h), view_at(&a->v, b, 0, h),
	       (size_t)d * sizeof(float));
	memset(state.out, 0, (size_t)d * sizeof(float));
	if (first <= slot) {
		online_softmax_add(&state, &cache, q, a->scale, first, slot + 1);
	} else {
		online_softmax_add(&state, &cache, q, a->scale, first, a->kv_slots);
		online_softmax_add(&state, &cache, q, a->scale, 0, slot + 1);
	}
	for (int64_t i = 0; i < d; i++)
		state.out[i] /= state.total;
}

/* The rotation, [d], and a rotated query for every head of every sequence. */
size_t cpu_attention_step_workspace(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;

	return (size_t)((1 + a->batch * a->n_heads) * a->d_head) * sizeof(float);
}

enum status cpu_attention_step(struct device *device, const void *args, void *workspace)
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
