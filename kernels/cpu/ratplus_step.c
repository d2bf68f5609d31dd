/*
 * One generated token of RAT+. A task is one head of one sequence: it updates the running pair,
 * stores it in the cache, and walks over the kept tokens and the ring of recent ones with one
 * online softmax that starts from the running pair's own score. The visible part of the cache is
 * read once; the rest is small beside that.
 */
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/online_softmax.h"
#include "kernels/cpu/recurrence.h"
#include "kernels/key_lists.h"

/* The running pair after this token; zero before the first. */
static void advance(const struct ratplus_step_args *a, int64_t b, int64_t h, bool reset, float *kt,
                    float *vt)
{
	int64_t d = a->d_head;
	const float *k = view_at(&a->k, b, 0, h), *v = view_at(&a->v, b, 0, h);
	const float *gate = view_at(&a->gate, b, 0, h);

	if (reset) {
		memset(kt, 0, sizeof *kt * (size_t)d);
		memset(vt, 0, sizeof *vt * (size_t)d);
	}
#pragma omp simd
	for (int64_t i = 0; i < d; i++) {
		struct gate_pair g = sigmoid_gate(gate[i]);

		kt[i] = g.decay * kt[i] + g.input * k[i];
		vt[i] = g.decay * vt[i] + g.input * v[i];
	}
}

/* The ring's tokens first .. first+count-1, in one piece or two. */
static void add_ring(struct online_softmax *softmax, const struct cached_head *cache,
                     const float *q, float scale, int64_t first, int64_t count, int64_t slots)
{
	int64_t start = first % slots, whole = slots - start < count ? slots - start : count;

	online_softmax_add(softmax, cache, q, scale, start, start + whole);
	online_softmax_add(softmax, cache, q, scale, 0, count - whole);
}

/* rotation: of this position, or NULL. q: scratch [d]. */
static void step_head(const struct ratplus_step_args *a, int64_t b, int64_t h, int64_t position,
                      const float *rotation, float *q)
{
	int64_t d = a->d_head, recent = position < a->window ? position : a->window;
	int64_t slot = position % a->recent_slots;
	float *kt = a->k_state + (b * a->n_heads + h) * d;
	float *vt = a->v_state + (b * a->n_heads + h) * d;
	float *out = view_at(&a->out, b, 0, h), *key = view_at(&a->k_recent, b, slot, h);
	const float *z = view_at(&a->z, b, 0, h);
	struct cached_head kept = {b, h, d, &a->k_kept, &a->v_kept};
	struct cached_head ring = {b, h, d, &a->k_recent, &a->v_recent};

	advance(a, b, h, position == 0, kt, vt);
	chunk_rope_rotate(d, rotation, view_at(&a->q, b, 0, h), q);
	chunk_rope_rotate(d, rotation, kt, key);
	memcpy(view_at(&a->v_recent, b, slot, h), vt, sizeof *vt * (size_t)d);
	if (is_kept(a->dilation, a->initial, position)) {
		int64_t to = keys_before(KEYS_KEPT, a->dilation, a->initial, position);

		memcpy(view_at(&a->k_kept, b, to, h), key, sizeof *key * (size_t)d);
		memcpy(view_at(&a->v_kept, b, to, h), vt, sizeof *vt * (size_t)d);
	}
	float own = a->scale * dot_f32(d, q, key);
	/* own - own: 0, or NaN, which must not be lost where there is no other score. */
	struct online_softmax softmax = {.max = own, .total = exp_f32(own - own), .out = out};
	memcpy(out, vt, sizeof *out * (size_t)d);
	online_softmax_add(&softmax, &kept, q, a->scale, 0,
	                   keys_before(KEYS_KEPT, a->dilation, a->initial, position - recent));
	add_ring(&softmax, &ring, q, a->scale, position - recent, recent, a->recent_slots);
	float inverse = 1.0f / softmax.total;
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		out[i] *= inverse * sigmoid_f32(z[i]);
}

/* The rotation, [d], and a rotated query for every head of every sequence. */
size_t cpu_ratplus_step_workspace(const struct device *device, const void *args)
{
	const struct ratplus_step_args *a = args;

	return sizeof(float) * (size_t)((1 + a->batch * a->n_heads) * a->d_head);
}

enum status cpu_ratplus_step(struct device *device, const void *args, void *workspace)
{
	const struct ratplus_step_args *a = args;
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
