/*
 * Gradients of RAT's scan, in reverse over each chunk:
 *   lambda_t = dv_scan_t + g_{t+1} lambda_{t+1}   (+ dv_chunk at the chunk's end)
 *   mu_t = scale down_score_t q_t + g_{t+1} mu_{t+1}   (+ dk_chunk, rotated back, at its end)
 *   dv = (1-g) lambda,  dk = sum over the group's heads of (1-g) mu
 *   dlogit = (lambda (vt_{t-1} - v) + mu (kt_{t-1} - k)) g (1-g)
 *   dq = dq_out rotated back + sum over the group's heads of scale down_score kt
 * A task is the heads of one group in one chunk: it alone writes that group's
 * dq and dk. The running pair is computed again, from checkpoints every
 * SEGMENT tokens, so a chunk of any length needs little scratch.
 */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/chunk_rope.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/recurrence.h"
#include "kernels/cpu/shares.h"

enum { SEGMENT = 64 };

/* A thread's memory: rows of d channels. The pair of row s is kt and then vt, 2d wide. */
struct scratch {
	double *dgate_bias; /* [H*d] */
	float *checkpoints; /* [segments, 2d]: the pair before each segment */
	float *pairs;       /* [SEGMENT + 1, 2d]: before each token of a segment and after it */
	float *carry;       /* [2d]: g mu, g lambda of the token after */
};

static int64_t count_chunks(const struct rat_scan_args *f)
{
	return (f->seq_len + f->chunk - 1) / f->chunk;
}

static int64_t count_segments(const struct rat_scan_args *f)
{
	int64_t chunk = f->chunk < f->seq_len ? f->chunk : f->seq_len;

	return (chunk + SEGMENT - 1) / SEGMENT;
}

static size_t scratch_bytes(const struct rat_scan_args *f)
{
	int64_t rows = count_segments(f) + SEGMENT + 2;
	size_t bytes = sizeof(double) * (size_t)(f->n_heads * f->d_head) +
	               sizeof(float) * (size_t)(rows * 2 * f->d_head);

	return (bytes + 63) / 64 * 64;
}

static struct scratch scratch_of(const struct rat_scan_args *f, char *memory)
{
	struct scratch s = {.dgate_bias = (double *)memory};

	s.checkpoints = (float *)(s.dgate_bias + f->n_heads * f->d_head);
	s.pairs = s.checkpoints + count_segments(f) * 2 * f->d_head;
	s.carry = s.pairs + (SEGMENT + 1) * 2 * f->d_head;
	return s;
}

/* Scratch of every thread, then the rotation of every chunk, [C, d]. */
size_t cpu_rat_scan_backward_workspace(const struct device *device, const void *args)
{
	const struct rat_scan_args *f = &((const struct rat_scan_backward_args *)args)->forward;

	return scratch_bytes(f) * (size_t)omp_get_max_threads() +
	       sizeof(float) * (size_t)(count_chunks(f) * f->d_head);
}

/* to = the pair after token t of head h, from the pair before it; to may be from. */
static void advance(const struct rat_scan_args *f, int64_t b, int64_t t, int64_t h,
                    const float *from, float *to)
{
	int64_t d = f->d_head;
	const float *k = view_at(&f->k, b, t, h % f->groups), *v = view_at(&f->v, b, t, h);
	const float *gate = view_at(&f->gate, b, t, h), *bias = f->gate_bias + h * d;

#pragma omp simd
	for (int64_t i = 0; i < d; i++) {
		struct gate_pair g = sigmoid_gate(gate[i] + bias[i]);

		to[i] = g.decay * from[i] + g.input * k[i];
		to[d + i] = g.decay * from[d + i] + g.input * v[i];
	}
}

/* carry += the gradients of the chunk's final pair. */
static void seed_carry(const struct rat_scan_backward_args *a, int64_t b, int64_t c, int64_t h,
                       const float *row, float *carry)
{
	int64_t d = a->forward.d_head;

	chunk_rope_unrotate(d, row, view_at(&a->dk_chunk, b, c, h), carry);
	memcpy(carry + d, view_at(&a->dv_chunk, b, c, h), sizeof *carry * (size_t)d);
}

/* Token t of head h; `before` and `after` are its pairs. Adds to dq and dk. */
static void token_backward(const struct rat_scan_backward_args *a, int64_t b, int64_t t, int64_t h,
                           const float *before, const float *after, const struct scratch *s)
{
	const struct rat_scan_args *f = &a->forward;
	int64_t d = f->d_head, group = h % f->groups;
	const float *q = view_at(&f->q, b, t, group), *k = view_at(&f->k, b, t, group);
	const float *v = view_at(&f->v, b, t, h), *gate = view_at(&f->gate, b, t, h);
	const float *dv_scan = view_at(&a->dv_scan, b, t, h), *bias = f->gate_bias + h * d;
	float *dq = view_at(&a->dq, b, t, group), *dk = view_at(&a->dk, b, t, group);
	float *dv = view_at(&a->dv, b, t, h), *dgate = view_at(&a->dgate, b, t, h);
	float *carry = s->carry;
	double *dbias = s->dgate_bias + h * d;
	float ds = f->scale * a->down_score[(b * f->seq_len + t) * f->n_heads + h];

#pragma omp simd
	for (int64_t i = 0; i < d; i++) {
		struct gate_pair g = sigmoid_gate(gate[i] + bias[i]);
		float mu = ds * q[i] + carry[i], lambda = dv_scan[i] + carry[d + i];
		float dlogit = (lambda * (before[d + i] - v[i]) + mu * (before[i] - k[i])) *
		               g.decay * g.input;

		dq[i] += ds * after[i];
		dk[i] += g.input * mu;
		dv[i] = g.input * lambda;
		dgate[i] = dlogit;
		dbias[i] += dlogit;
		carry[i] = g.decay * mu;
		carry[d + i] = g.decay * lambda;
	}
}

/* Tokens first .. end of one chunk, head h. */
static void head_backward(const struct rat_scan_backward_args *a, int64_t b, int64_t first,
                          int64_t end, int64_t h, const struct scratch *s)
{
	const struct rat_scan_args *f = &a->forward;
	int64_t width = 2 * f->d_head, last = (end - first - 1) / SEGMENT;
	size_t bytes = sizeof(float) * (size_t)width;

	memset(s->checkpoints, 0, bytes);
	for (int64_t segment = 0; segment < last; segment++) {
		float *next = s->checkpoints + (segment + 1) * width;
		int64_t start = first + segment * SEGMENT;

		advance(f, b, start, h, next - width, next);
		for (int64_t t = start + 1; t < start + SEGMENT; t++)
			advance(f, b, t, h, next, next);
	}
	for (int64_t segment = last; segment >= 0; segment--) {
		int64_t start = first + segment * SEGMENT;
		int64_t n = end - start < SEGMENT ? end - start : SEGMENT;

		memcpy(s->pairs, s->checkpoints + segment * width, bytes);
		for (int64_t i = 0; i < n; i++)
			advance(f, b, start + i, h, s->pairs + i * width,
			        s->pairs + (i + 1) * width);
		for (int64_t i = n - 1; i >= 0; i--)
			token_backward(a, b, start + i, h, s->pairs + i * width,
			               s->pairs + (i + 1) * width, s);
	}
}

/* The heads of `group` in chunk c of sequence b. row: the chunk's rotation, or NULL. */
static void group_backward(const struct rat_scan_backward_args *a, int64_t b, int64_t c,
                           int64_t group, const float *row, const struct scratch *s)
{
	const struct rat_scan_args *f = &a->forward;
	int64_t first = c * f->chunk;
	int64_t end = first + f->chunk < f->seq_len ? first + f->chunk : f->seq_len;

	for (int64_t t = first; t < end; t++) {
		chunk_rope_unrotate(f->d_head, row, view_at(&a->dq_out, b, t, group),
		                    view_at(&a->dq, b, t, group));
		memset(view_at(&a->dk, b, t, group), 0, sizeof(float) * (size_t)f->d_head);
	}
	for (int64_t h = group; h < f->n_heads; h += f->groups) {
		seed_carry(a, b, c, h, row, s->carry);
		head_backward(a, b, first, end, h, s);
	}
}

enum status cpu_rat_scan_backward(struct device *device, const void *args, void *workspace)
{
	const struct rat_scan_backward_args *a = args;
	const struct rat_scan_args *f = &a->forward;
	int n_threads = omp_get_max_threads();
	size_t bytes = scratch_bytes(f);
	float *table = f->rope ? (float *)((char *)workspace + bytes * (size_t)n_threads) : NULL;

	if (table)
		chunk_rope_table(f->d_head, 0, count_chunks(f), table);
	memset(workspace, 0, bytes * (size_t)n_threads);
#pragma omp parallel for collapse(3) schedule(static) num_threads(n_threads)
	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t c = 0; c < count_chunks(f); c++)
			for (int64_t group = 0; group < f->groups; group++) {
				char *memory =
				        (char *)workspace + bytes * (size_t)omp_get_thread_num();
				struct scratch s = scratch_of(f, memory);

				group_backward(a, b, c, group, table ? table + c * f->d_head : NULL,
				               &s);
			}
	add_shares(workspace, n_threads, (int64_t)(bytes / sizeof(double)), f->n_heads * f->d_head,
	           a->dgate_bias);
	return STATUS_OK;
}
