/* fp64 RAT: the recurrence inside a chunk, its gradients, and one generated token. */
#include "kernels/reference/reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static enum status out_of_memory(size_t elements)
{
	return status_set(STATUS_OOM, "reference: no memory for %zu doubles", elements);
}

static int64_t n_chunks(const struct reference_rat_scan *s)
{
	return (s->seq_len + s->chunk - 1) / s->chunk;
}

/* Index into q and k [B, T, groups, d] of row (b, t) and channel c of D: head h reads group
 * h % groups. */
static int64_t grouped(const struct reference_rat_scan *s, int64_t row, int64_t c)
{
	return (row * s->groups + c / s->d_head % s->groups) * s->d_head + c % s->d_head;
}

static double gate_of(const struct reference_rat_scan *s, int64_t row, int64_t c)
{
	int64_t width = s->n_heads * s->d_head;

	return reference_sigmoid(s->gate[row * width + c] + s->gate_bias[c]);
}

/* kt and vt of every token, [B, T, D]. */
static void scan(const struct reference_rat_scan *s, double *k_scan, double *v_scan)
{
	int64_t width = s->n_heads * s->d_head;

#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < s->batch; b++)
		for (int64_t c = 0; c < width; c++) {
			double kt = 0, vt = 0;

			for (int64_t t = 0; t < s->seq_len; t++) {
				int64_t row = b * s->seq_len + t;
				double g = gate_of(s, row, c);

				if (t % s->chunk == 0)
					kt = vt = 0;
				kt = g * kt + (1 - g) * s->k[grouped(s, row, c)];
				vt = g * vt + (1 - g) * s->v[row * width + c];
				k_scan[row * width + c] = kt;
				v_scan[row * width + c] = vt;
			}
		}
}

/* scale * q_t . kt_t, [B, T, H]. */
static void own_scores(const struct reference_rat_scan *s, const double *k_scan, double *own_score)
{
	int64_t d = s->d_head;

	for (int64_t row = 0; row < s->batch * s->seq_len; row++)
		for (int64_t h = 0; h < s->n_heads; h++) {
			const double *q = s->q + grouped(s, row, h * d);
			const double *k = k_scan + (row * s->n_heads + h) * d;
			double sum = 0;

			for (int64_t i = 0; i < d; i++)
				sum += q[i] * k[i];
			own_score[row * s->n_heads + h] = s->scale * sum;
		}
}

/* to [B, C, D] = the last token of every chunk of from [B, T, D]. */
static void chunk_finals(const struct reference_rat_scan *s, const double *from, double *to)
{
	int64_t width = s->n_heads * s->d_head, chunks = n_chunks(s);

	for (int64_t b = 0; b < s->batch; b++)
		for (int64_t c = 0; c < chunks; c++) {
			int64_t end = (c + 1) * s->chunk;
			int64_t last = (end < s->seq_len ? end : s->seq_len) - 1;

			memcpy(to + (b * chunks + c) * width,
			       from + (b * s->seq_len + last) * width, sizeof *to * (size_t)width);
		}
}

/* to [B, D] = the last token of from [B, T, D]. */
static void last_token(const struct reference_rat_scan *s, const double *from, double *to)
{
	int64_t width = s->n_heads * s->d_head;

	for (int64_t b = 0; b < s->batch; b++)
		memcpy(to + b * width, from + ((b + 1) * s->seq_len - 1) * width,
		       sizeof *to * (size_t)width);
}

/* q_out [B, T, groups, d]: q at its chunk's position. */
static void rotate_queries(const struct reference_rat_scan *s, double *q_out)
{
	if (s->rope)
		reference_rotate(s->batch, s->seq_len, s->groups, s->d_head, 0, s->chunk, s->q,
		                 q_out);
	else
		memcpy(q_out, s->q,
		       sizeof *q_out * (size_t)(s->batch * s->seq_len * s->groups * s->d_head));
}

enum status reference_rat_scan_forward(const struct reference_rat_scan *s,
                                       const struct reference_rat_scan_out *out)
{
	if (reference_in_use())
		return reference_in_use()->rat_scan_forward(s, out);
	size_t count = (size_t)(s->batch * s->seq_len * s->n_heads * s->d_head);
	double *k_scan = malloc(2 * count * sizeof *k_scan);

	if (!k_scan)
		return out_of_memory(2 * count);
	double *v_scan = k_scan + count;
	scan(s, k_scan, v_scan);
	if (out->k_scan)
		memcpy(out->k_scan, k_scan, count * sizeof *k_scan);
	if (out->v_scan)
		memcpy(out->v_scan, v_scan, count * sizeof *v_scan);
	if (out->own_score)
		own_scores(s, k_scan, out->own_score);
	if (out->q_out)
		rotate_queries(s, out->q_out);
	chunk_finals(s, k_scan, out->k_chunk);
	chunk_finals(s, v_scan, out->v_chunk);
	if (s->rope)
		reference_rotate(s->batch, n_chunks(s), s->n_heads, s->d_head, 0, 1, out->k_chunk,
		                 out->k_chunk);
	if (out->k_state)
		last_token(s, k_scan, out->k_state);
	if (out->v_state)
		last_token(s, v_scan, out->v_state);
	free(k_scan);
	return STATUS_OK;
}

/* Direct gradients of kt and vt, before they flow back through time: from the own score (and its
 * share of dq), from vt's users, and from the chunk finals. dk_final is already rotated back. */
static void direct_gradients(const struct reference_rat_scan *s,
                             const struct reference_rat_scan_grads *grads, const double *k_scan,
                             const double *dk_final, double *dk_scan, double *dv_scan)
{
	int64_t width = s->n_heads * s->d_head, chunks = n_chunks(s);

	for (int64_t row = 0; row < s->batch * s->seq_len; row++)
		for (int64_t c = 0; c < width; c++) {
			double ds = s->scale * grads->down_score[row * s->n_heads + c / s->d_head];
			int64_t b = row / s->seq_len, t = row % s->seq_len;
			int64_t at = row * width + c;
			bool last = t == s->seq_len - 1 || (t + 1) % s->chunk == 0;
			int64_t final = (b * chunks + t / s->chunk) * width + c;

			grads->dq[grouped(s, row, c)] += ds * k_scan[at];
			dk_scan[at] = ds * s->q[grouped(s, row, c)] + (last ? dk_final[final] : 0);
			dv_scan[at] = grads->dv_scan[at] + (last ? grads->dv_chunk[final] : 0);
		}
}

/* Back through time: h_t = g h_{t-1} + (1-g) x_t for h in (kt, vt). dk_scan and dv_scan become
 * the gradients of k tiled to D and of v; dgate that of the logits. */
static void scan_backward(const struct reference_rat_scan *s, const double *k_scan,
                          const double *v_scan, double *dk_scan, double *dv_scan, double *dgate)
{
	int64_t width = s->n_heads * s->d_head;

#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < s->batch; b++)
		for (int64_t c = 0; c < width; c++) {
			double dkt = 0, dvt = 0; /* flowing in from token t + 1 */

			for (int64_t t = s->seq_len - 1; t >= 0; t--) {
				int64_t row = b * s->seq_len + t, at = row * width + c;
				bool first = t % s->chunk == 0;
				double g = gate_of(s, row, c);
				double k_before = first ? 0 : k_scan[at - width];
				double v_before = first ? 0 : v_scan[at - width];

				dkt += dk_scan[at];
				dvt += dv_scan[at];
				dgate[at] = g * (1 - g) *
				            (dkt * (k_before - s->k[grouped(s, row, c)]) +
				             dvt * (v_before - s->v[at]));
				dk_scan[at] = (1 - g) * dkt;
				dv_scan[at] = (1 - g) * dvt;
				dkt = first ? 0 : g * dkt;
				dvt = first ? 0 : g * dvt;
			}
		}
}

/* dq from the rotated queries, dk_final [B, C, D] from the rotated finals. */
static void rotate_back(const struct reference_rat_scan *s,
                        const struct reference_rat_scan_grads *grads, double *dk_final)
{
	int64_t chunks = n_chunks(s);

	memcpy(grads->dq, grads->dq_out,
	       sizeof(double) * (size_t)(s->batch * s->seq_len * s->groups * s->d_head));
	memcpy(dk_final, grads->dk_chunk,
	       sizeof(double) * (size_t)(s->batch * chunks * s->n_heads * s->d_head));
	if (!s->rope)
		return;
	reference_rotate_backward(s->batch, s->seq_len, s->groups, s->d_head, 0, s->chunk,
	                          grads->dq, grads->dq);
	reference_rotate_backward(s->batch, chunks, s->n_heads, s->d_head, 0, 1, dk_final,
	                          dk_final);
}

/* Sums the tiled dk over the heads of each group, and dgate over the tokens. */
static void sum_shared(const struct reference_rat_scan *s,
                       const struct reference_rat_scan_grads *grads, const double *dk_tiled)
{
	int64_t width = s->n_heads * s->d_head, rows = s->batch * s->seq_len;

	memset(grads->dk, 0, sizeof(double) * (size_t)(rows * s->groups * s->d_head));
	memset(grads->dgate_bias, 0, sizeof(double) * (size_t)width);
	for (int64_t row = 0; row < rows; row++)
		for (int64_t c = 0; c < width; c++) {
			grads->dk[grouped(s, row, c)] += dk_tiled[row * width + c];
			grads->dgate_bias[c] += grads->dgate[row * width + c];
		}
}

enum status reference_rat_scan_backward(const struct reference_rat_scan *s,
                                        const struct reference_rat_scan_grads *grads)
{
	size_t width = (size_t)(s->n_heads * s->d_head);
	size_t count = (size_t)(s->batch * s->seq_len) * width;
	size_t total = 3 * count + (size_t)(s->batch * n_chunks(s)) * width;
	double *k_scan = malloc(total * sizeof *k_scan);

	if (!k_scan)
		return out_of_memory(total);
	double *v_scan = k_scan + count, *dk_scan = v_scan + count, *dk_final = dk_scan + count;
	scan(s, k_scan, v_scan);
	rotate_back(s, grads, dk_final);
	direct_gradients(s, grads, k_scan, dk_final, dk_scan, grads->dv);
	scan_backward(s, k_scan, v_scan, dk_scan, grads->dv, grads->dgate);
	sum_shared(s, grads, dk_scan);
	free(k_scan);
	return STATUS_OK;
}

/* The running pair after the step's token, [B, D] each. */
static void advance(const struct reference_rat_step *s, double *k_state, double *v_state)
{
	int64_t width = s->n_heads * s->d_head;
	bool first = s->position % s->chunk == 0;

	for (int64_t b = 0; b < s->batch; b++)
		for (int64_t c = 0; c < width; c++) {
			int64_t at = b * width + c, group = c / s->d_head % s->groups;
			double g = reference_sigmoid(s->gate[at] + s->gate_bias[c]);
			double k = s->k[(b * s->groups + group) * s->d_head + c % s->d_head];

			k_state[at] = (first ? 0 : g * s->k_state[at]) + (1 - g) * k;
			v_state[at] = (first ? 0 : g * s->v_state[at]) + (1 - g) * s->v[at];
		}
}

enum status reference_rat_step(const struct reference_rat_step *s, double *out, double *k_state,
                               double *v_state)
{
	size_t n_q = (size_t)(s->batch * s->groups * s->d_head);
	size_t n_token = (size_t)(s->batch * s->n_heads * s->d_head);
	size_t n_own = (size_t)(s->batch * s->n_heads);
	double *q = malloc((n_q + 2 * n_token + n_own) * sizeof *q);

	if (!q)
		return out_of_memory(n_q + 2 * n_token + n_own);
	double *kt = q + n_q, *vt = kt + n_token, *own_score = vt + n_token;
	advance(s, kt, vt);
	struct reference_rat_scan token = {.batch = s->batch,
	                                   .seq_len = 1,
	                                   .n_heads = s->n_heads,
	                                   .groups = s->groups,
	                                   .d_head = s->d_head,
	                                   .scale = s->scale,
	                                   .q = s->q};
	own_scores(&token, kt, own_score);
	memcpy(q, s->q, n_q * sizeof *q);
	if (s->rope)
		reference_rotate(s->batch, 1, s->groups, s->d_head, s->position, s->chunk, q, q);
	/* Sequence by sequence, since only position/chunk of each one's slots are keys. */
	enum status status = STATUS_OK;
	for (int64_t b = 0; status == STATUS_OK && b < s->batch; b++) {
		int64_t width = s->n_heads * s->d_head;
		struct reference_attention a = {
		        .batch = 1,
		        .n_heads = s->n_heads,
		        .q_heads = s->groups,
		        .d_head = s->d_head,
		        .seq_len = 1,
		        .kv_len = s->position / s->chunk,
		        .mask = MASK_FULL,
		        .scale = s->scale,
		        .q = q + b * s->groups * s->d_head,
		        .k = s->k_chunk + b * s->chunk_slots * width,
		        .v = s->v_chunk + b * s->chunk_slots * width,
		        .own_score = own_score + b * s->n_heads,
		        .own_value = vt + b * width,
		        .gate = s->z + b * width,
		};
		status = reference_attention_forward(&a, 0, NULL, out + b * width, NULL, NULL);
	}
	if (k_state) {
		memcpy(k_state, kt, n_token * sizeof *kt);
		memcpy(v_state, vt, n_token * sizeof *vt);
	}
	free(q);
	return status;
}
