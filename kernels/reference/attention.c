/* fp64 rotary positions and softmax attention: whole score rows, for a few rows at a time. */
#include "kernels/reference/shared.h"

#include <omp.h>

/* Rows that share a pass over the columns, and columns that stay in the cache meanwhile. */
enum { BLOCK_ROWS = 8, TILE = 64 };

/* A few rows (queries or, in the backward pass, keys), each with the range lo .. hi of columns it
 * is paired with. */
struct block {
	int n;
	int64_t index[BLOCK_ROWS]; /* position in the sequence */
	int64_t lo[BLOCK_ROWS], hi[BLOCK_ROWS];
	const struct attention_args *a;
	bool of_keys; /* the rows are keys, the columns queries */
};

/* Whether row r is paired with column s of its range. */
static bool is_pair(const struct block *block, int r, int64_t s)
{
	const int64_t row = block->index[r];

	return is_visible(block->a, block->of_keys ? s : row, block->of_keys ? row : s);
}

/* Up to BLOCK_ROWS rows of the list, from the one at `first` on; its rows NULL: 0, 1, ... */
static struct block
take_block(const struct attention_args *a, const struct row_list *list, int64_t first,
           void (*range)(const struct attention_args *, int64_t, int64_t *, int64_t *))
{
	struct block block = {.n = (int)smaller(BLOCK_ROWS, list->count - first),
	                      .a = a,
	                      .of_keys = range == seeing_queries};

	for (int r = 0; r < block.n; r++) {
		block.index[r] = list->rows ? list->rows[first + r] : first + r;
		range(a, block.index[r], &block.lo[r], &block.hi[r]);
	}
	return block;
}

static struct row_list all_queries_or(const struct attention_args *a, const struct row_list *rows)
{
	return rows ? *rows : (struct row_list){.count = a->seq_len};
}

/* w[r*ld + s] = x_r . y_s for every pair of the block, -infinity for what else is in the range;
 * rows of x and y are strided. */
static void products(const struct block *block, int64_t d, const double *x, int64_t x_stride,
                     const double *y, int64_t y_stride, int64_t ld, double *w)
{
	for (int64_t tile = 0; tile < ld; tile += TILE)
		for (int r = 0; r < block->n; r++)
			for (int64_t s = larger(tile, block->lo[r]);
			     s < smaller(tile + TILE, block->hi[r]); s++)
				w[r * ld + s] = is_pair(block, r, s)
				                        ? dot(d, x + block->index[r] * x_stride,
				                              y + s * y_stride)
				                        : -INFINITY;
}

/* acc[r*d + i] += sum over s of w[r*ld + s] * y_s[i]. */
static void weighted_sums(const struct block *block, int64_t d, const double *w, int64_t ld,
                          const double *y, int64_t y_stride, double *acc)
{
	for (int64_t tile = 0; tile < ld; tile += TILE)
		for (int r = 0; r < block->n; r++)
			for (int64_t s = larger(tile, block->lo[r]);
			     s < smaller(tile + TILE, block->hi[r]); s++)
				if (is_pair(block, r, s))
					add_scaled(d, w[r * ld + s], y + s * y_stride, acc + r * d);
}

/* Index into own_score and down_score [B, T, H]. */
static int64_t own(const struct attention_args *a, int64_t b, int64_t t, int64_t h)
{
	return (b * a->seq_len + t) * a->n_heads + h;
}

/* Index into lse [B, H, T]. */
static int64_t transposed(const struct attention_args *a, int64_t b, int64_t h, int64_t t)
{
	return (b * a->n_heads + h) * a->seq_len + t;
}

/* Probabilities p [n, kv_len], lse and ungated output o [n, d] of the queries of a block. */
static void attend(const struct attention_args *a, int64_t b, int64_t h, const struct block *block,
                   double *p, double *lse, double *o)
{
	int64_t d = a->d_head, ld = a->kv_len, kv = attention_kv_head(a, h);

	products(block, d, at(&a->q, b, 0, h % a->q_heads), a->q.token, at(&a->k, b, 0, kv),
	         a->k.token, ld, p);
	zero(block->n * d, o);
	for (int r = 0; r < block->n; r++) {
		int64_t t = block->index[r];
		const double *score = a->own_score ? wide(a->own_score) + own(a, b, t, h) : NULL;
		double own_p;

		lse[r] = softmax(a->scale, p + r * ld, block->lo[r], block->hi[r], score, &own_p);
		if (score)
			add_scaled(d, own_p, at(&a->own_value, b, t, h), o + r * d);
	}
	weighted_sums(block, d, p, ld, at(&a->v, b, 0, kv), a->v.token, o);
}

/* Attends with the queries of one block and writes what is wanted of the result. */
static void forward_block(const struct attention_args *a, int64_t b, int64_t h,
                          const struct block *block, double *scratch)
{
	double lse[BLOCK_ROWS], *o = scratch + BLOCK_ROWS * a->kv_len;

	attend(a, b, h, block, scratch, lse, o);
	for (int r = 0; r < block->n; r++, o += a->d_head) {
		int64_t t = block->index[r];

		if (a->lse)
			wide_out(a->lse)[transposed(a, b, h, t)] = lse[r];
		for (int64_t i = 0; i < a->d_head; i++) {
			double gate = a->gate.data ? sigmoid(at(&a->gate, b, t, h)[i]) : 1;

			at(&a->out, b, t, h)[i] = gate * o[i];
			if (a->out_ungated.data)
				at(&a->out_ungated, b, t, h)[i] = o[i];
		}
	}
}

enum status reference_attention(struct device *device, const void *args, void *workspace)
{
	const struct attention_args *a = args;
	const struct row_list queries = all_queries_or(a, device->rows);
	int64_t per_thread = BLOCK_ROWS * (a->kv_len + a->d_head);
	double *scratch = take_doubles(per_thread * omp_get_max_threads());

	(void)workspace;
	if (!scratch)
		return STATUS_OOM;
#pragma omp parallel for collapse(3) schedule(dynamic)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			for (int64_t i = 0; i < queries.count; i += BLOCK_ROWS) {
				struct block block = take_block(a, &queries, i, visible_keys);

				forward_block(a, b, h, &block,
				              scratch + per_thread * omp_get_thread_num());
			}
	free(scratch);
	return STATUS_OK;
}

/* What the gradients of every row and key are computed from. */
struct backward {
	const struct attention_backward_args *a;
	struct view o;   /* [B, T, H, d]: the forward's, before the gate */
	struct view d_o; /* [B, T, H, d]: gradient of o */
	double *delta;   /* [B, H, T] */
};

/* d_o and delta of every row. */
static void prepare(const struct backward *w)
{
	const struct attention_args *f = &w->a->forward;

#pragma omp parallel for collapse(3)
	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t h = 0; h < f->n_heads; h++)
			for (int64_t t = 0; t < f->seq_len; t++) {
				double *d_o = at(&w->d_o, b, t, h);

				for (int64_t i = 0; f->gate.data && i < f->d_head; i++)
					d_o[i] = at(&w->a->dout, b, t, h)[i] *
					         sigmoid(at(&f->gate, b, t, h)[i]);
				w->delta[transposed(f, b, h, t)] =
				        dot(f->d_head, d_o, at(&w->o, b, t, h));
			}
}

/* The gradients of the gate and of the own token of one row. */
static void backward_row(const struct backward *w, int64_t b, int64_t t, int64_t h)
{
	const struct attention_args *f = &w->a->forward;
	const double *o = at(&w->o, b, t, h), *d_o = at(&w->d_o, b, t, h);
	int64_t row = transposed(f, b, h, t), score = own(f, b, t, h);

	for (int64_t i = 0; f->gate.data && i < f->d_head; i++) {
		double gate = sigmoid(at(&f->gate, b, t, h)[i]);

		at(&w->a->dgate, b, t, h)[i] =
		        at(&w->a->dout, b, t, h)[i] * o[i] * gate * (1 - gate);
	}
	if (!f->own_score)
		return;
	double p = exp(wide(f->own_score)[score] - wide(f->lse)[row]);
	wide_out(w->a->down_score)[score] =
	        p * (dot(f->d_head, d_o, at(&f->own_value, b, t, h)) - w->delta[row]);
	for (int64_t i = 0; i < f->d_head; i++)
		at(&w->a->down_value, b, t, h)[i] = p * d_o[i];
}

/* p becomes the probability of a pair from its product, ds the gradient of that product from the
 * probability's. */
static void backward_pair(const struct backward *w, int64_t row, double *p, double *ds)
{
	const struct attention_args *f = &w->a->forward;

	*p = exp(f->scale * *p - wide(f->lse)[row]);
	*ds = f->scale * *p * (*ds - w->delta[row]);
}

/* Everything that belongs to a block of queries of one head: adds to dq. */
static void backward_queries(const struct backward *w, int64_t b, int64_t h,
                             const struct block *block, double *scratch)
{
	const struct attention_args *f = &w->a->forward;
	int64_t d = f->d_head, ld = f->kv_len, g = h % f->q_heads, kv = attention_kv_head(f, h);
	double *p = scratch, *ds = p + BLOCK_ROWS * ld, *dq = ds + BLOCK_ROWS * ld;

	products(block, d, at(&f->q, b, 0, g), f->q.token, at(&f->k, b, 0, kv), f->k.token, ld, p);
	products(block, d, at(&w->d_o, b, 0, h), w->d_o.token, at(&f->v, b, 0, kv), f->v.token, ld,
	         ds);
	for (int r = 0; r < block->n; r++) {
		backward_row(w, b, block->index[r], h);
		for (int64_t s = block->lo[r]; s < block->hi[r]; s++)
			backward_pair(w, transposed(f, b, h, block->index[r]), &p[r * ld + s],
			              &ds[r * ld + s]);
	}
	zero(block->n * d, dq);
	weighted_sums(block, d, ds, ld, at(&f->k, b, 0, kv), f->k.token, dq);
	for (int r = 0; r < block->n; r++)
		add_scaled(d, 1, dq + r * d, at(&w->a->dq, b, block->index[r], g));
}

/* Adds to acc, dk and dv of a block of keys, what the queries of head h give that see them. */
static void add_keys(const struct backward *w, int64_t b, int64_t h, const struct block *block,
                     double *scratch, double *acc)
{
	const struct attention_args *f = &w->a->forward;
	const double *q = at(&f->q, b, 0, h % f->q_heads), *d_o = at(&w->d_o, b, 0, h);
	int64_t d = f->d_head, ld = f->seq_len, kv = attention_kv_head(f, h);
	double *p = scratch, *ds = p + BLOCK_ROWS * ld;

	products(block, d, at(&f->k, b, 0, kv), f->k.token, q, f->q.token, ld, p);
	products(block, d, at(&f->v, b, 0, kv), f->v.token, d_o, w->d_o.token, ld, ds);
	for (int r = 0; r < block->n; r++)
		for (int64_t t = block->lo[r]; t < block->hi[r]; t++)
			backward_pair(w, transposed(f, b, h, t), &p[r * ld + t], &ds[r * ld + t]);
	weighted_sums(block, d, ds, ld, q, f->q.token, acc);
	weighted_sums(block, d, p, ld, d_o, w->d_o.token, acc + BLOCK_ROWS * d);
}

/* dk and dv of a block of keys of one key head, from all heads that read it. */
static void backward_keys(const struct backward *w, int64_t b, int64_t kv,
                          const struct block *block, double *scratch)
{
	const struct attention_args *f = &w->a->forward;
	int64_t d = f->d_head, readers = f->n_heads / f->kv_heads;
	double *acc = scratch + 2 * BLOCK_ROWS * f->seq_len;

	zero(2 * BLOCK_ROWS * d, acc);
	for (int64_t h = kv * readers; h < (kv + 1) * readers; h++)
		add_keys(w, b, h, block, scratch, acc);
	for (int r = 0; r < block->n; r++)
		for (int64_t i = 0; i < d; i++) {
			at(&w->a->dk, b, block->index[r], kv)[i] = acc[r * d + i];
			at(&w->a->dv, b, block->index[r], kv)[i] = acc[(BLOCK_ROWS + r) * d + i];
		}
}

/* Heads that share a query run one after another, so that dq is summed in a fixed order. */
static void all_queries(const struct backward *w, const struct row_list *queries, double *scratch,
                        int64_t per_thread)
{
	const struct attention_args *f = &w->a->forward;

#pragma omp parallel for collapse(3) schedule(dynamic)
	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t g = 0; g < f->q_heads; g++)
			for (int64_t i = 0; i < queries->count; i += BLOCK_ROWS) {
				struct block block = take_block(f, queries, i, visible_keys);

				for (int r = 0; r < block.n; r++)
					zero(f->d_head, at(&w->a->dq, b, block.index[r], g));
				for (int64_t h = g; h < f->n_heads; h += f->q_heads)
					backward_queries(w, b, h, &block,
					                 scratch +
					                         per_thread * omp_get_thread_num());
			}
}

static void all_keys(const struct backward *w, const struct row_list *keys, double *scratch,
                     int64_t per_thread)
{
	const struct attention_args *f = &w->a->forward;

#pragma omp parallel for collapse(3) schedule(dynamic)
	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t kv = 0; kv < f->kv_heads; kv++)
			for (int64_t i = 0; i < keys->count; i += BLOCK_ROWS) {
				struct block block = take_block(f, keys, i, seeing_queries);

				backward_keys(w, b, kv, &block,
				              scratch + per_thread * omp_get_thread_num());
			}
}

enum status reference_attention_backward(struct device *device, const void *args, void *workspace)
{
	const struct attention_backward_args *a = args;
	const struct attention_args *f = &a->forward;
	int64_t n_rows = f->batch * f->seq_len * f->n_heads, n_out = n_rows * f->d_head;
	int64_t n_keys = device->rows ? device->rows->count : 0;
	int64_t per_thread = 2 * BLOCK_ROWS * (larger(f->seq_len, f->kv_len) + f->d_head);
	double *delta = take_doubles(n_rows + n_out + per_thread * omp_get_max_threads());
	int64_t *memory = malloc((size_t)(n_keys + 1) * sizeof *memory);

	(void)workspace;
	if (delta && memory) {
		double *d_o = delta + n_rows, *scratch = d_o + n_out;
		const struct row_list queries = all_queries_or(f, device->rows);
		const struct row_list keys =
		        device->rows
		                ? (struct row_list){attention_keys_of_rows(f, device->rows, memory),
		                                    memory}
		                : (struct row_list){.count = f->kv_len};
		const struct backward w = {
		        .a = a,
		        .o = f->gate.data ? f->out_ungated : f->out,
		        .d_o = f->gate.data ? contiguous(d_o, f->seq_len, f->n_heads, f->d_head)
		                            : a->dout,
		        .delta = delta,
		};

		prepare(&w);
		all_queries(&w, &queries, scratch, per_thread);
		all_keys(&w, &keys, scratch, per_thread);
	}
	enum status status =
	        delta && memory ? STATUS_OK
	                        : status_set(STATUS_OOM, "no memory for a reference's gradients");
	free(delta);
	free(memory);
	return status;
}

/* One head attends to the last `count` tokens; q is rotated, w [count] scratch. */
static void step_head(const struct attention_step_args *a, int64_t b, int64_t h, int64_t count,
                      const double *q, double *w)
{
	int64_t first = *a->position + 1 - count, kv = h / (a->n_heads / a->kv_heads);
	double none, *out = at(&a->out, b, 0, h);

	for (int64_t i = 0; i < count; i++)
		w[i] = dot(a->d_head, q, at(&a->k_cache, b, (first + i) % a->kv_slots, kv));
	softmax(a->scale, w, 0, count, NULL, &none);
	zero(a->d_head, out);
	for (int64_t i = 0; i < count; i++)
		add_scaled(a->d_head, w[i], at(&a->v_cache, b, (first + i) % a->kv_slots, kv), out);
}

enum status reference_attention_step(struct device *device, const void *args, void *workspace)
{
	const struct attention_step_args *a = args;
	int64_t position = *a->position, slot = position % a->kv_slots;
	int64_t count = (a->window < 0 ? position : smaller(position, a->window)) + 1;
	int64_t n_q = a->batch * a->n_heads * a->d_head;
	double *q = take_doubles(n_q + count * omp_get_max_threads());
	const struct rotation turn = {a->batch, a->n_heads, a->d_head, a->rope, 1, a->rope_width};
	const struct rotation turn_key = {a->batch, a->kv_heads, a->d_head,
	                                  a->rope,  1,           a->rope_width};
	const struct rotation copy = {a->batch, a->kv_heads, a->d_head, false, 1, 0};
	const struct view rotated = contiguous(q, 1, a->n_heads, a->d_head);

	if (!q)
		return STATUS_OOM;
	rotate_token(&turn, position, &a->q, 0, &rotated, 0);
	rotate_token(&turn_key, position, &a->k, 0, &a->k_cache, slot);
	rotate_token(&copy, position, &a->v, 0, &a->v_cache, slot);
#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			step_head(a, b, h, count, at(&rotated, b, 0, h),
			          q + n_q + count * omp_get_thread_num());
	free(q);
	return STATUS_OK;
}

enum status reference_rotate(struct device *device, const void *args, void *workspace)
{
	const struct rotate_args *a = args;
	const struct rotation turn = {a->batch, a->n_heads, a->d_head, a->rope, 1, a->rope_width};
	const struct rotation turn_key = {a->batch, a->kv_heads, a->d_head,
	                                  a->rope,  1,           a->rope_width};
	const struct rotation copy = {a->batch, a->kv_heads, a->d_head, false, 1, 0};

#pragma omp parallel for
	for (int64_t t = 0; t < a->seq_len; t++) {
		if (a->q_out.data)
			rotate_token(&turn, t, &a->q, t, &a->q_out, t);
		if (a->k_out.data && t >= a->first_kv)
			rotate_token(&turn_key, t, &a->k, t, &a->k_out, t % a->kv_slots);
		if (a->v_out.data && t >= a->first_kv)
			rotate_token(&copy, t, &a->v, t, &a->v_out, t % a->kv_slots);
	}
	return STATUS_OK;
}

enum status reference_rotate_backward(struct device *device, const void *args, void *workspace)
{
	const struct rotate_backward_args *a = args;
	const struct rotation back = {a->batch, a->n_heads, a->d_head, a->rope, -1, a->rope_width};
	const struct rotation back_key = {a->batch, a->kv_heads, a->d_head,
	                                  a->rope,  -1,          a->rope_width};

#pragma omp parallel for
	for (int64_t t = 0; t < a->seq_len; t++) {
		rotate_token(&back, t, &a->dq_out, t, &a->dq, t);
		rotate_token(&back_key, t, &a->dk_out, t, &a->dk, t);
	}
	return STATUS_OK;
}

enum status reference_rotate_step(struct device *device, const void *args, void *workspace)
{
	const struct rotate_step_args *a = args;
	const struct rotation turn = {a->batch, a->n_heads, a->d_head, true, 1, 0};

	rotate_token(&turn, *a->position, &a->q, 0, &a->q_out, 0);
	rotate_token(&turn, *a->position, &a->k, 0, &a->k_out, 0);
	return STATUS_OK;
}
