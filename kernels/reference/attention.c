/* fp64 softmax attention: whole score rows, for a few rows at a time. */
#include "kernels/reference/reference.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

/* Rows that share a pass over the columns, and columns that stay in the cache meanwhile. */
enum { BLOCK_ROWS = 8, TILE = 64 };

/* A few rows (queries or, in the backward pass, keys), each with the range lo .. hi of columns it
 * is paired with. */
struct block {
	int n;
	int64_t index[BLOCK_ROWS]; /* position in the sequence */
	int64_t lo[BLOCK_ROWS], hi[BLOCK_ROWS];
};

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

static enum status out_of_memory(double elements)
{
	return status_set(STATUS_OOM, "reference: no memory for %.0f doubles", elements);
}

/* The keys lo .. hi that query t sees. */
static void visible_keys(const struct reference_attention *a, int64_t t, int64_t *lo, int64_t *hi)
{
	*lo = 0;
	*hi = a->kv_len;
	if (a->mask == MASK_CAUSAL)
		*hi = smaller(t + 1, a->kv_len);
	if (a->mask == MASK_CHUNK)
		*hi = smaller(t / a->chunk, a->kv_len);
	if (a->mask == MASK_WINDOW) {
		*lo = larger(0, t - a->window);
		*hi = smaller(t + 1, a->kv_len);
	}
}

/* The queries lo .. hi that see key s. */
static void seeing_queries(const struct reference_attention *a, int64_t s, int64_t *lo, int64_t *hi)
{
	*lo = 0;
	*hi = a->seq_len;
	if (a->mask == MASK_CAUSAL)
		*lo = s;
	if (a->mask == MASK_CHUNK)
		*lo = (s + 1) * a->chunk;
	if (a->mask == MASK_WINDOW) {
		*lo = s;
		*hi = smaller(s + a->window + 1, a->seq_len);
	}
	*lo = smaller(*lo, *hi);
}

static double dot(const double *x, const double *y, int64_t d)
{
	double sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++)
		sum += x[i] * y[i];
	return sum;
}

static void add_scaled(double *acc, double w, const double *y, int64_t d)
{
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		acc[i] += w * y[i];
}

/* w[r*ld + s] = x_r . y_s for every pair of the block; rows of x and y are strided. */
static void products(const struct block *block, int64_t d, const double *x, int64_t x_stride,
                     const double *y, int64_t y_stride, int64_t ld, double *w)
{
	for (int64_t tile = 0; tile < ld; tile += TILE)
		for (int r = 0; r < block->n; r++)
			for (int64_t s = larger(tile, block->lo[r]);
			     s < smaller(tile + TILE, block->hi[r]); s++)
				w[r * ld + s] =
				        dot(x + block->index[r] * x_stride, y + s * y_stride, d);
}

/* acc[r*d + i] += sum over s of w[r*ld + s] * y_s[i]. */
static void weighted_sums(const struct block *block, int64_t d, const double *w, int64_t ld,
                          const double *y, int64_t y_stride, double *acc)
{
	for (int64_t tile = 0; tile < ld; tile += TILE)
		for (int r = 0; r < block->n; r++)
			for (int64_t s = larger(tile, block->lo[r]);
			     s < smaller(tile + TILE, block->hi[r]); s++)
				add_scaled(acc + r * d, w[r * ld + s], y + s * y_stride, d);
}

/* Turns raw products w[lo .. hi] into probabilities, the own score included; returns the lse. */
static double softmax(const struct reference_attention *a, double *w, int64_t lo, int64_t hi,
                      const double *own_score, double *own_probability)
{
	double max = own_score ? *own_score : -INFINITY, sum = 0;

	for (int64_t s = lo; s < hi; s++) {
		w[s] *= a->scale;
		max = w[s] > max ? w[s] : max;
	}
	for (int64_t s = lo; s < hi; s++) {
		w[s] = exp(w[s] - max);
		sum += w[s];
	}
	*own_probability = own_score ? exp(*own_score - max) : 0;
	sum += *own_probability;
	for (int64_t s = lo; s < hi; s++)
		w[s] /= sum;
	*own_probability /= sum;
	return max + log(sum);
}

/* Probabilities, lse and ungated output o [n, d] of the queries of a block in sequence b. */
static void attend(const struct reference_attention *a, int64_t b, int64_t h,
                   const struct block *block, double *p, double *own_p, double *lse, double *o)
{
	int64_t d = a->d_head, kv_stride = a->n_heads * d, q_stride = a->q_heads * d;
	const double *q = a->q + b * a->seq_len * q_stride + h % a->q_heads * d;
	const double *k = a->k + b * a->kv_len * kv_stride + h * d;
	const double *v = a->v + b * a->kv_len * kv_stride + h * d;

	products(block, d, q, q_stride, k, kv_stride, a->kv_len, p);
	memset(o, 0, sizeof(double) * (size_t)(block->n * d));
	for (int r = 0; r < block->n; r++) {
		int64_t row = (b * a->seq_len + block->index[r]) * a->n_heads + h;

		lse[r] = softmax(a, p + r * a->kv_len, block->lo[r], block->hi[r],
		                 a->own_score ? a->own_score + row : NULL, &own_p[r]);
		if (a->own_score)
			add_scaled(o + r * d, own_p[r], a->own_value + row * d, d);
	}
	weighted_sums(block, d, p, a->kv_len, v, kv_stride, o);
}

/* Up to BLOCK_ROWS of the rows from `first` on that lie in one sequence, *b. */
static struct block take_queries(const struct reference_attention *a, int64_t n_rows,
                                 const int64_t *rows, int64_t first, int64_t *b)
{
	struct block block = {0};

	for (int64_t i = first; i < n_rows && block.n < BLOCK_ROWS; i++) {
		int64_t row = rows ? rows[i] : i;

		if (block.n == 0)
			*b = row / a->seq_len;
		if (row / a->seq_len != *b)
			break;
		block.index[block.n] = row % a->seq_len;
		visible_keys(a, row % a->seq_len, &block.lo[block.n], &block.hi[block.n]);
		block.n++;
	}
	return block;
}

/* Where each block of the list of rows begins; returns how many there are. */
static int64_t split_rows(const struct reference_attention *a, int64_t n_rows, const int64_t *rows,
                          int64_t *starts)
{
	int64_t n_blocks = 0, b;

	for (int64_t i = 0; i < n_rows; n_blocks++) {
		starts[n_blocks] = i;
		i += take_queries(a, n_rows, rows, i, &b).n;
	}
	return n_blocks;
}

/* Attends with the queries of one block and writes what is wanted of the result. */
static void forward_block(const struct reference_attention *a, int64_t n_rows, const int64_t *rows,
                          int64_t first, int64_t h, double *scratch, double *out,
                          double *out_ungated, double *lse)
{
	int64_t b = 0, d = a->d_head;
	struct block block = take_queries(a, n_rows, rows, first, &b);
	double own_p[BLOCK_ROWS], block_lse[BLOCK_ROWS];
	double *o = scratch + BLOCK_ROWS * a->kv_len;

	attend(a, b, h, &block, scratch, own_p, block_lse, o);
	for (int r = 0; r < block.n; r++) {
		int64_t to = (first + r) * a->n_heads + h;
		int64_t from = (b * a->seq_len + block.index[r]) * a->n_heads + h;

		if (lse)
			lse[to] = block_lse[r];
		for (int64_t i = 0; i < d; i++) {
			double gate = a->gate ? reference_sigmoid(a->gate[from * d + i]) : 1;

			out[to * d + i] = gate * o[r * d + i];
			if (out_ungated)
				out_ungated[to * d + i] = o[r * d + i];
		}
	}
}

enum status reference_attention_forward(const struct reference_attention *a, int64_t n_rows,
                                        const int64_t *rows, double *out, double *out_ungated,
                                        double *lse)
{
	if (reference_in_use())
		return reference_in_use()->attention_forward(a, n_rows, rows, out);
	int64_t n = rows ? n_rows : a->batch * a->seq_len;
	size_t per_thread = (size_t)(BLOCK_ROWS * (a->kv_len + a->d_head));
	size_t scratch_count = per_thread * (size_t)omp_get_max_threads();
	double *scratch = malloc(scratch_count * sizeof *scratch);
	int64_t *starts = malloc((size_t)(n + 1) * sizeof *starts);

	if (!scratch || !starts) {
		free(scratch);
		free(starts);
		return out_of_memory((double)scratch_count + (double)n);
	}
	int64_t n_blocks = split_rows(a, n, rows, starts);
#pragma omp parallel for collapse(2) schedule(dynamic)
	for (int64_t h = 0; h < a->n_heads; h++)
		for (int64_t i = 0; i < n_blocks; i++)
			forward_block(a, n, rows, starts[i], h,
			              scratch + per_thread * (size_t)omp_get_thread_num(), out,
			              out_ungated, lse);
	free(scratch);
	free(starts);
	return STATUS_OK;
}

/* What the pass over the queries leaves for the pass over the keys. */
struct backward {
	const struct reference_attention *a;
	const double *dout;
	const struct reference_attention_grads *grads;
	double *d_o;         /* [B, T, H, d]: gradient of the ungated output */
	double *lse, *delta; /* [B, H, T] */
};

static void *thread_slice(double *scratch, size_t per_thread)
{
	return scratch + per_thread * (size_t)omp_get_thread_num();
}

/* d_o of one row from the gate, and the gate's own gradient. */
static void backward_gate(const struct backward *w, int64_t row, const double *o)
{
	int64_t d = w->a->d_head;

	for (int64_t i = 0; i < d; i++) {
		double dout = w->dout[row * d + i], gate = 1;

		if (w->a->gate) {
			gate = reference_sigmoid(w->a->gate[row * d + i]);
			w->grads->dgate[row * d + i] = dout * o[i] * gate * (1 - gate);
		}
		w->d_o[row * d + i] = dout * gate;
	}
}

/* The own token's gradients of one row, given its probability and the row's delta. */
static void backward_own(const struct backward *w, int64_t row, double own_p, double delta)
{
	int64_t d = w->a->d_head;
	const double *d_o = w->d_o + row * d, *own_value = w->a->own_value + row * d;

	w->grads->down_score[row] = own_p * (dot(d_o, own_value, d) - delta);
	for (int64_t i = 0; i < d; i++)
		w->grads->down_value[row * d + i] = own_p * d_o[i];
}

/* Everything that belongs to a block of queries of one head: adds to dq (zeroed by the caller). */
static void backward_queries(const struct backward *w, int64_t b, int64_t h,
                             const struct block *block, double *scratch)
{
	const struct reference_attention *a = w->a;
	int64_t d = a->d_head, ld = a->kv_len, stride = a->n_heads * d;
	double *p = scratch, *ds = p + BLOCK_ROWS * ld, *o = ds + BLOCK_ROWS * ld;
	double own_p[BLOCK_ROWS], lse[BLOCK_ROWS];

	attend(a, b, h, block, p, own_p, lse, o);
	for (int r = 0; r < block->n; r++)
		backward_gate(w, (b * a->seq_len + block->index[r]) * a->n_heads + h, o + r * d);
	products(block, d, w->d_o + b * a->seq_len * stride + h * d, stride,
	         a->v + b * ld * stride + h * d, stride, ld, ds);
	for (int r = 0; r < block->n; r++) {
		int64_t row = (b * a->seq_len + block->index[r]) * a->n_heads + h;
		int64_t at = (b * a->n_heads + h) * a->seq_len + block->index[r];
		double delta = dot(w->d_o + row * d, o + r * d, d);

		for (int64_t s = block->lo[r]; s < block->hi[r]; s++)
			ds[r * ld + s] = a->scale * p[r * ld + s] * (ds[r * ld + s] - delta);
		if (a->own_score)
			backward_own(w, row, own_p[r], delta);
		w->lse[at] = lse[r];
		w->delta[at] = delta;
	}
	memset(o, 0, sizeof(double) * (size_t)(block->n * d));
	weighted_sums(block, d, ds, ld, a->k + b * ld * stride + h * d, stride, o);
	for (int r = 0; r < block->n; r++)
		add_scaled(w->grads->dq + ((b * a->seq_len + block->index[r]) * a->q_heads +
		                           h % a->q_heads) *
		                                  d,
		           1, o + r * d, d);
}

/* dk and dv of a block of keys of one head, from all queries that see them. */
static void backward_keys(const struct backward *w, int64_t b, int64_t h, const struct block *block,
                          double *scratch)
{
	const struct reference_attention *a = w->a;
	int64_t d = a->d_head, ld = a->seq_len, stride = a->n_heads * d;
	int64_t q_stride = a->q_heads * d;
	const double *q = a->q + b * a->seq_len * q_stride + h % a->q_heads * d;
	const double *d_o = w->d_o + b * a->seq_len * stride + h * d;
	const double *lse = w->lse + (b * a->n_heads + h) * a->seq_len;
	const double *delta = w->delta + (b * a->n_heads + h) * a->seq_len;
	double *p = scratch, *ds = p + BLOCK_ROWS * ld, *acc = ds + BLOCK_ROWS * ld;
	int64_t first = b * a->kv_len * stride + h * d;

	products(block, d, a->k + first, stride, q, q_stride, ld, p);
	products(block, d, a->v + first, stride, d_o, stride, ld, ds);
	for (int r = 0; r < block->n; r++)
		for (int64_t t = block->lo[r]; t < block->hi[r]; t++) {
			p[r * ld + t] = exp(a->scale * p[r * ld + t] - lse[t]);
			ds[r * ld + t] = a->scale * p[r * ld + t] * (ds[r * ld + t] - delta[t]);
		}
	memset(acc, 0, sizeof(double) * (size_t)(2 * BLOCK_ROWS * d));
	weighted_sums(block, d, ds, ld, q, q_stride, acc);
	weighted_sums(block, d, p, ld, d_o, stride, acc + BLOCK_ROWS * d);
	for (int r = 0; r < block->n; r++) {
		int64_t to = first + block->index[r] * stride;

		memcpy(w->grads->dk + to, acc + r * d, sizeof(double) * (size_t)d);
		memcpy(w->grads->dv + to, acc + (BLOCK_ROWS + r) * d, sizeof(double) * (size_t)d);
	}
}

/* Heads that share a query run one after another, so that dq is summed in a fixed order. */
static void all_queries(const struct backward *w, double *scratch, size_t per_thread)
{
	const struct reference_attention *a = w->a;

#pragma omp parallel for collapse(3) schedule(dynamic)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t g = 0; g < a->q_heads; g++)
			for (int64_t t = 0; t < a->seq_len; t += BLOCK_ROWS) {
				int64_t same, first = b * a->seq_len + t;
				struct block block = take_queries(
				        a, smaller(first + BLOCK_ROWS, (b + 1) * a->seq_len), NULL,
				        first, &same);

				for (int64_t h = g; h < a->n_heads; h += a->q_heads)
					backward_queries(w, b, h, &block,
					                 thread_slice(scratch, per_thread));
			}
}

static void all_keys(const struct backward *w, double *scratch, size_t per_thread)
{
	const struct reference_attention *a = w->a;

#pragma omp parallel for collapse(3) schedule(dynamic)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			for (int64_t s = 0; s < a->kv_len; s += BLOCK_ROWS) {
				struct block block = {.n = (int)smaller(BLOCK_ROWS, a->kv_len - s)};

				for (int r = 0; r < block.n; r++) {
					block.index[r] = s + r;
					seeing_queries(a, s + r, &block.lo[r], &block.hi[r]);
				}
				backward_keys(w, b, h, &block, thread_slice(scratch, per_thread));
			}
}

enum status reference_attention_backward(const struct reference_attention *a, const double *dout,
                                         const struct reference_attention_grads *grads)
{
	int64_t tokens = a->batch * a->seq_len, longest = larger(a->seq_len, a->kv_len);
	size_t n_rows = (size_t)(tokens * a->n_heads), n_out = n_rows * (size_t)a->d_head;
	size_t per_thread = (size_t)(2 * BLOCK_ROWS * (longest + a->d_head));
	size_t n_scratch = per_thread * (size_t)omp_get_max_threads();
	double *memory = malloc((n_out + 2 * n_rows + n_scratch) * sizeof *memory);
	struct backward w = {a, dout, grads, memory, NULL, NULL};

	if (!memory)
		return out_of_memory((double)(n_out + 2 * n_rows + n_scratch));
	w.lse = memory + n_out;
	w.delta = w.lse + n_rows;
	memset(grads->dq, 0, sizeof(double) * (size_t)(tokens * a->q_heads * a->d_head));
	all_queries(&w, w.delta + n_rows, per_thread);
	all_keys(&w, w.delta + n_rows, per_thread);
	free(memory);
	return STATUS_OK;
}

/* The last `count` tokens up to s->position, gathered from a ring of slots into [B, count, H, d];
 * the newest is `newest` [B, H, d]. */
static void gather_ring(const struct reference_attention_step *s, int64_t count,
                        const double *cache, const double *newest, double *keys)
{
	int64_t width = s->n_heads * s->d_head;
	size_t bytes = sizeof(double) * (size_t)width;

	for (int64_t b = 0; b < s->batch; b++) {
		for (int64_t i = 0; i < count - 1; i++) {
			int64_t slot = (s->position - count + 1 + i) % s->kv_slots;

			memcpy(keys + (b * count + i) * width,
			       cache + (b * s->kv_slots + slot) * width, bytes);
		}
		memcpy(keys + (b * count + count - 1) * width, newest + b * width, bytes);
	}
}

enum status reference_attention_step(const struct reference_attention_step *s, double *out,
                                     double *k_stored)
{
	int64_t count = s->window < 0 ? s->position + 1 : smaller(s->position, s->window) + 1;
	size_t n_token = (size_t)(s->batch * s->n_heads * s->d_head);
	double *q = malloc(n_token * (size_t)(2 + 2 * count) * sizeof *q);

	if (!q)
		return out_of_memory((double)n_token * (double)(2 + 2 * count));
	double *k = q + n_token, *keys = k + n_token, *values = keys + n_token * (size_t)count;
	memcpy(q, s->q, n_token * sizeof *q);
	memcpy(k, s->k, n_token * sizeof *k);
	if (s->rope) {
		reference_rotate(s->batch, 1, s->n_heads, s->d_head, s->position, 1, q, q);
		reference_rotate(s->batch, 1, s->n_heads, s->d_head, s->position, 1, k, k);
	}
	if (k_stored)
		memcpy(k_stored, k, n_token * sizeof *k);
	gather_ring(s, count, s->k_cache, k, keys);
	gather_ring(s, count, s->v_cache, s->v, values);
	struct reference_attention a = {.batch = s->batch,
	                                .n_heads = s->n_heads,
	                                .q_heads = s->n_heads,
	                                .d_head = s->d_head,
	                                .seq_len = 1,
	                                .kv_len = count,
	                                .mask = MASK_FULL,
	                                .scale = s->scale,
	                                .q = q,
	                                .k = keys,
	                                .v = values};
	enum status status = reference_attention_forward(&a, 0, NULL, out, NULL, NULL);
	free(q);
	return status;
}
