/*
 * One generated token of attention. A task is one head of keys of one sequence: it
 * stores the rotated key and the value in the cache, then walks over the
 * visible slots in blocks with an online softmax for each head that reads them.
 * The cache is read once; the rest is small beside that.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/online_softmax.h"

/* Slots that stay in the cache of a core until every head has read them. */
enum { SHARED_SLOTS = 64 };

/* The heads first .. first + count - 1, which read the same keys, and their softmax so far. */
struct readers {
	int64_t first, count, d;
	const float *q; /* [count, d], rotated */
	struct online_softmax *softmax;
};

/* All readers attend to slots first .. end-1. */
static void attend(const struct readers *r, const struct cached_head *cache, float scale,
                   int64_t first, int64_t end)
{
	const int64_t step = r->count > 1 ? SHARED_SLOTS : end - first;

	for (int64_t slot = first; slot < end; slot += step)
		for (int64_t i = 0; i < r->count; i++)
			online_softmax_add(&r->softmax[i], cache, r->q + i * r->d, scale, slot,
			                   slot + step < end ? slot + step : end);
}

/* Columns of a head that turn. */
static int64_t turned(const struct attention_step_args *a)
{
	return a->rope_width > 0 ? a->rope_width : a->d_head;
}

/* A head of q or k, by the rotation of this position, or NULL. */
static void rotate(const struct attention_step_args *a, const float *rotation, const float *from,
                   float *to)
{
	int64_t width = turned(a);

	chunk_rope_rotate(width, rotation, from, to);
	memcpy(to + width, from + width, (size_t)(a->d_head - width) * sizeof(float));
}

/* rotation: of this position, or NULL. q: scratch [r->count, d]. */
static void step_heads(const struct attention_step_args *a, int64_t b, int64_t kv, int64_t position,
                       const float *rotation, const struct readers *r, float *q)
{
	int64_t d = a->d_head, slot = position % a->kv_slots;
	int64_t n = 1 + (a->window >= 0 && a->window < position ? a->window : position);
	int64_t first = (position + 1 - n) % a->kv_slots;
	struct cached_head cache = {b, kv, d, &a->k_cache, &a->v_cache};

	rotate(a, rotation, view_at(&a->k, b, 0, kv), view_at(&a->k_cache, b, slot, kv));
	memcpy(view_at(&a->v_cache, b, slot, kv), view_at(&a->v, b, 0, kv),
	       (size_t)d * sizeof(float));
	for (int64_t i = 0; i < r->count; i++) {
		float *out = view_at(&a->out, b, 0, r->first + i);

		rotate(a, rotation, view_at(&a->q, b, 0, r->first + i), q + i * d);
		r->softmax[i] = (struct online_softmax){.max = -FLT_MAX, .out = out};
		memset(out, 0, (size_t)d * sizeof(float));
	}
	if (first <= slot) {
		attend(r, &cache, a->scale, first, slot + 1);
	} else {
		attend(r, &cache, a->scale, first, a->kv_slots);
		attend(r, &cache, a->scale, 0, slot + 1);
	}
	for (int64_t i = 0; i < r->count; i++)
		for (int64_t c = 0; c < d; c++)
			r->softmax[i].out[c] /= r->softmax[i].total;
}

/* A softmax and a rotated query for every head of every sequence, and the rotation, [d]. */
size_t cpu_attention_step_workspace(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;
	const size_t heads = (size_t)(a->batch * a->n_heads), d = (size_t)a->d_head;

	return heads * sizeof(struct online_softmax) + (heads + 1) * d * sizeof(float);
}

enum status cpu_attention_step(struct device *device, const void *args, void *workspace)
{
	const struct attention_step_args *a = args;
	int64_t position = *a->position, readers = a->n_heads / a->kv_heads, d = a->d_head;
	struct online_softmax *softmax = workspace;
	float *queries = (float *)(void *)(softmax + a->batch * a->n_heads);
	float *rotation = a->rope ? queries + a->batch * a->n_heads * d : NULL;

	if (rotation)
		chunk_rope_table(turned(a), position, 1, rotation);
#pragma omp parallel for collapse(2) schedule(static)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t kv = 0; kv < a->kv_heads; kv++) {
			int64_t first = kv * readers, row = b * a->n_heads + first;
			float *q = queries + row * d;
			const struct readers r = {first, readers, d, q, softmax + row};

			step_heads(a, b, kv, position, rotation, &r, q);
		}
	return STATUS_OK;
}
