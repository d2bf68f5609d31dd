/*
 * RAT's scan inside chunks. Chunks are independent, so a task is a chunk of a
 * sequence; with fewer chunks than threads it is one head of it. The running
 * pair lives in the chunk's slot of k_chunk and v_chunk, where it ends up.
 */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/recurrence.h"

static int64_t count_chunks(const struct rat_scan_args *a)
{
	return (a->seq_len + a->chunk - 1) / a->chunk;
}

/* One token of one head; kt and vt are the running pair. Returns q.kt. */
static float advance(int64_t d, const float *q, const float *k, const float *v, const float *gate,
                     const float *bias, float *kt, float *vt, float *v_scan)
{
	float score = 0;

#pragma omp simd reduction(+ : score)
	for (int64_t i = 0; i < d; i++) {
		struct gate_pair g = sigmoid_gate(gate[i] + bias[i]);

		kt[i] = g.decay * kt[i] + g.input * k[i];
		vt[i] = g.decay * vt[i] + g.input * v[i];
		v_scan[i] = vt[i];
		score += q[i] * kt[i];
	}
	return score;
}

/* Heads first_head .. end_head of chunk c of sequence b. */
static void scan_chunk(const struct rat_scan_args *a, int64_t b, int64_t c, int64_t first_head,
                       int64_t end_head)
{
	int64_t d = a->d_head, first = c * a->chunk;
	int64_t end = first + a->chunk < a->seq_len ? first + a->chunk : a->seq_len;

	for (int64_t h = first_head; h < end_head; h++) {
		memset(view_at(&a->k_chunk, b, c, h), 0, sizeof(float) * (size_t)d);
		memset(view_at(&a->v_chunk, b, c, h), 0, sizeof(float) * (size_t)d);
	}
	for (int64_t t = first; t < end; t++)
		for (int64_t h = first_head; h < end_head; h++) {
			int64_t group = h % a->groups;
			float score = advance(
			        d, view_at(&a->q, b, t, group), view_at(&a->k, b, t, group),
			        view_at(&a->v, b, t, h), view_at(&a->gate, b, t, h),
			        a->gate_bias + h * d, view_at(&a->k_chunk, b, c, h),
			        view_at(&a->v_chunk, b, c, h), view_at(&a->v_scan, b, t, h));

			a->own_score[(b * a->seq_len + t) * a->n_heads + h] = a->scale * score;
		}
}

/* Copies the running pair of the last chunk out if wanted, then rotates the chunk's key. */
static void finish_chunk(const struct rat_scan_args *a, int64_t b, int64_t c, int64_t first_head,
                         int64_t end_head, const float *row)
{
	size_t bytes = sizeof(float) * (size_t)a->d_head;
	bool last = c == count_chunks(a) - 1;

	for (int64_t h = first_head; h < end_head; h++) {
		float *k = view_at(&a->k_chunk, b, c, h);
		int64_t slot = (b * a->n_heads + h) * a->d_head;

		if (last && a->k_state)
			memcpy(a->k_state + slot, k, bytes);
		if (last && a->v_state)
			memcpy(a->v_state + slot, view_at(&a->v_chunk, b, c, h), bytes);
		chunk_rope_rotate(a->d_head, row, k, k);
	}
}

static void rotate_queries(const struct rat_scan_args *a, const float *table)
{
	if (!table && a->q_out.data == a->q.data)
		return;
#pragma omp parallel for collapse(2) schedule(static)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t t = 0; t < a->seq_len; t++)
			for (int64_t group = 0; group < a->groups; group++)
				chunk_rope_rotate(a->d_head,
				                  table ? table + t / a->chunk * a->d_head : NULL,
				                  view_at(&a->q, b, t, group),
				                  view_at(&a->q_out, b, t, group));
}

/* The rotation of every chunk, [C, d]. */
size_t cpu_rat_scan_workspace(const struct device *device, const void *args)
{
	const struct rat_scan_args *a = args;

	return a->rope ? sizeof(float) * (size_t)(count_chunks(a) * a->d_head) : 0;
}

enum status cpu_rat_scan(struct device *device, const void *args, void *workspace)
{
	const struct rat_scan_args *a = args;
	int64_t n_chunks = count_chunks(a);
	bool few = a->batch * n_chunks < 2 * omp_get_max_threads();
	int64_t heads = few ? 1 : a->n_heads, n_blocks = a->n_heads / heads;
	float *table = a->rope ? workspace : NULL;

	if (table)
		chunk_rope_table(a->d_head, 0, n_chunks, table);
#pragma omp parallel for collapse(3) schedule(static)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t c = 0; c < n_chunks; c++)
			for (int64_t block = 0; block < n_blocks; block++) {
				int64_t h = block * heads;

				scan_chunk(a, b, c, h, h + heads);
				finish_chunk(a, b, c, h, h + heads,
				             table ? table + c * a->d_head : NULL);
			}
	rotate_queries(a, table);
	return STATUS_OK;
}
