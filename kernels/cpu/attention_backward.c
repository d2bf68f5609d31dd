/*
 * Backward of softmax attention on the CPU: tiled, the probabilities recomputed
 * from the logarithm of the denominator (FlashAttention-2, arXiv 2307.08691).
 *
 * A thread takes one head of keys and walks over tiles of KEYS keys, kept transposed
 * as panels (keys in the lanes); for each it walks over the queries that see it, of
 * one head that reads these keys after the other:
 *   S = Q K^T, dP = dO V^T     query rows broadcast, contraction over d;
 *   P = exp(S - lse), dS = P (dP - delta);
 *   dV^T += dO^T P, dK^T += Q^T dS   contraction over the queries;
 *   dQ += dS K                 contraction over the keys.
 * dQ goes to a buffer of the item's own and is summed over items afterwards, in
 * a fixed order. Scores are in units of log2; the scale of dS is applied where
 * dK and dQ are stored.
 */
#include "kernels/cpu/kernels_cpu.h"

#include <math.h>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/vector_math.h"

enum { QUERIES = 64, KEYS = 256 };

/* One thread's buffers. */
struct scratch {
	float *k_lanes; /* [KEYS / PANEL][d][PANEL], scaled */
	float *v_lanes; /* [KEYS / PANEL][d][PANEL] */
	float *k;       /* [d_pad / PANEL][KEYS][PANEL] */
	float *dk, *dv; /* [KEYS / PANEL][d_pad][PANEL] */
	float *q;       /* [QUERIES][d_pad] */
	float *dout;    /* [QUERIES][d_pad], through the gate */
	float *p;       /* [QUERIES][PANEL]: S, then P */
	float *ds;      /* [KEYS / PANEL][QUERIES][PANEL] */
	float *lse;     /* [QUERIES], in units of log2 */
	float *delta;   /* [QUERIES] */
};

/* The workspace, shared and private parts. Items split a head's key tiles when heads are few. */
struct plan {
	const struct attention_backward_args *args;
	int64_t d, d_pad, padded_len; /* queries rounded up to ROWS */
	int64_t readers;              /* heads that read a head of keys */
	int64_t splits, items;        /* items = batch * kv_heads * splits */
	float *delta;                 /* [B, H, T] rowsum(do * o) */
	float *dq;                    /* [items][readers][d_pad / PANEL][padded_len][PANEL] */
	float *scratch;               /* [threads][scratch_size] */
	size_t scratch_size, size;    /* floats */
};

/* What one thread works on: keys first .. first+n-1 of head kv, sequence b; queries of head h, and
 * this item's share of their dq. */
struct tile {
	int64_t b, h, kv, first, n;
	enum key_list list;
	float *dq;
};

static size_t scratch_carve(struct scratch *s, float *base, int64_t d)
{
	int64_t d_pad = round_up(d, PANEL);
	float **const parts[] = {&s->k_lanes, &s->v_lanes, &s->k,  &s->dk,  &s->dv,   &s->q,
	                         &s->dout,    &s->p,       &s->ds, &s->lse, &s->delta};
	const int64_t counts[] = {KEYS * d,       KEYS * d,        KEYS * d_pad,    KEYS * d_pad,
	                          KEYS * d_pad,   QUERIES * d_pad, QUERIES * d_pad, QUERIES * PANEL,
	                          KEYS * QUERIES, QUERIES,         QUERIES};
	size_t offset = 0;

	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
		*parts[i] = base ? base + offset : NULL;
		offset += (size_t)round_up(counts[i], 64);
	}
	return offset;
}

static struct plan make_plan(const struct attention_backward_args *args, float *base)
{
	const struct attention_args *a = &args->forward;
	int64_t heads = a->batch * a->kv_heads, threads = omp_get_max_threads();
	int64_t tiles = max_i64((a->kv_len + KEYS - 1) / KEYS, 1);
	struct plan p = {.args = args, .d = a->d_head, .d_pad = round_up(a->d_head, PANEL)};
	struct scratch unused;

	p.readers = a->n_heads / a->kv_heads;
	p.padded_len = round_up(a->seq_len, ROWS);
	p.splits = heads >= 2 * threads ? 1 : min_i64((4 * threads + heads - 1) / heads, tiles);
	p.items = heads * p.splits;
	p.scratch_size = scratch_carve(&unused, NULL, p.d);
	size_t delta_size = (size_t)round_up(a->batch * a->n_heads * a->seq_len, 64);
	size_t dq_size = (size_t)round_up(p.items * p.readers * p.padded_len * p.d_pad, 64);
	p.size = delta_size + dq_size + (size_t)threads * p.scratch_size;
	if (base) {
		p.delta = base;
		p.dq = p.delta + delta_size;
		p.scratch = p.dq + dq_size;
	}
	return p;
}

size_t cpu_attention_backward_workspace(const struct device *device, const void *args)
{
	return make_plan(args, NULL).size * sizeof(float);
}

/* What needs one query only: delta, and the gradients of the gate and of the own token. */
static void differentiate_query(const struct plan *p, int64_t b, int64_t t, int64_t h)
{
	const struct attention_args *a = &p->args->forward;
	int64_t row = (b * a->n_heads + h) * a->seq_len + t;
	const float *o = view_at(a->gate.data ? &a->out_ungated : &a->out, b, t, h);
	const float *dout = view_at(&p->args->dout, b, t, h);
	float delta = 0.0f;

	if (a->gate.data) {
		const float *gate = view_at(&a->gate, b, t, h);
		float *dgate = view_at(&p->args->dgate, b, t, h);
#pragma omp simd reduction(+ : delta)
		for (int64_t i = 0; i < p->d; i++) {
			float g = sigmoid_f32(gate[i]);
			float x = dout[i] * o[i] * g;

			dgate[i] = x * (1.0f - g);
			delta += x;
		}
	} else {
#pragma omp simd reduction(+ : delta)
		for (int64_t i = 0; i < p->d; i++)
			delta += dout[i] * o[i];
	}
	p->delta[row] = delta;
	if (a->own_score) {
		int64_t own = (b * a->seq_len + t) * a->n_heads + h;
		const float *gate = a->gate.data ? view_at(&a->gate, b, t, h) : NULL;
		const float *value = view_at(&a->own_value, b, t, h);
		float *dvalue = view_at(&p->args->down_value, b, t, h);
		float weight = exp_f32(a->own_score[own] - a->lse[row]), dweight = 0.0f;

#pragma omp simd reduction(+ : dweight)
		for (int64_t i = 0; i < p->d; i++) {
			float x = gate ? dout[i] * sigmoid_f32(gate[i]) : dout[i];

			dvalue[i] = weight * x;
			dweight += x * value[i];
		}
		p->args->down_score[own] = weight * (dweight - delta);
	}
}

static void load_keys(const struct attention_args *a, const struct tile *tile, struct scratch *s)
{
	int64_t d = a->d_head, d_pad = round_up(d, PANEL), n = tile->n;
	int64_t padded = round_up(n, PANEL);

	memset(s->k, 0, (size_t)(KEYS * d_pad) * sizeof(float));
	for (int64_t j = 0; j < padded; j++) {
		int64_t token = j < n ? list_token(a, tile->list, tile->first + j) : -1;
		const float *k = j < n ? view_at(&a->k, tile->b, token, tile->kv) : NULL;
		const float *v = j < n ? view_at(&a->v, tile->b, token, tile->kv) : NULL;

		pack_lane(s->k_lanes + j / PANEL * PANEL * d, j % PANEL, k, d, a->scale * LOG2_E);
		pack_lane(s->v_lanes + j / PANEL * PANEL * d, j % PANEL, v, d, 1.0f);
		for (int64_t i = 0; k && i < d; i += PANEL)
			memcpy(s->k + i * KEYS + j * PANEL, k + i,
			       (size_t)min_i64(PANEL, d - i) * sizeof(float));
	}
	memset(s->dk, 0, (size_t)(padded * d_pad) * sizeof(float));
	memset(s->dv, 0, (size_t)(padded * d_pad) * sizeof(float));
}

/* Queries t .. t+n-1 and what is known of them; rows up to a multiple of ROWS are zero. */
static void load_queries(const struct plan *p, const struct tile *tile, int64_t t, int64_t n,
                         struct scratch *s)
{
	const struct attention_args *a = &p->args->forward;
	int64_t row = (tile->b * a->n_heads + tile->h) * a->seq_len + t;

	memset(s->q, 0, (size_t)(QUERIES * p->d_pad) * sizeof(float));
	memset(s->dout, 0, (size_t)(QUERIES * p->d_pad) * sizeof(float));
	memset(s->lse, 0, QUERIES * sizeof(float));
	memset(s->delta, 0, QUERIES * sizeof(float));
	for (int64_t i = 0; i < n; i++) {
		const float *dout = view_at(&p->args->dout, tile->b, t + i, tile->h);
		float *to = s->dout + i * p->d_pad;

		memcpy(s->q + i * p->d_pad, view_at(&a->q, tile->b, t + i, tile->h % a->q_heads),
		       (size_t)p->d * sizeof(float));
		memcpy(to, dout, (size_t)p->d * sizeof(float));
		if (a->gate.data) {
			const float *gate = view_at(&a->gate, tile->b, t + i, tile->h);
#pragma omp simd
			for (int64_t c = 0; c < p->d; c++)
				to[c] *= sigmoid_f32(gate[c]);
		}
		s->lse[i] = a->lse[row + i] * LOG2_E;
		s->delta[i] = p->delta[row + i];
	}
}

/* Lanes of keys first .. first+PANEL-1, `j`th vector, that query t does not see. */
static ivec hidden_lanes(const struct attention_args *a, enum key_list list, int64_t t,
                         int64_t first, int j)
{
	int32_t low = (int32_t)min_i64(max_i64(first_key(a, list, t) - first, 0), PANEL);
	int32_t high = (int32_t)min_i64(max_i64(end_key(a, list, t) - first, 0), PANEL);
	ivec lane = {0};

	for (int i = 0; i < LANES; i++)
		lane[i] = j * LANES + i;
	return (lane < low) | (lane >= high);
}

/*
 * P and dS of query rows begin .. end-1 (multiples of ROWS) of the loaded ones,
 * the first being token t, and panel p (its first key within the tile).
 */
static __attribute__((noinline)) void differentiate_scores(const struct attention_args *a,
                                                           const struct tile *tile,
                                                           const struct scratch *s, int64_t t,
                                                           int64_t begin, int64_t end, int64_t p,
                                                           bool masked)
{
	int64_t d = a->d_head, d_pad = round_up(d, PANEL);
	float *ds = s->ds + p * QUERIES;

	for (int64_t i = begin; i < end; i += ROWS) {
		vec scores[ROWS][VECTORS] = {0}, dp[ROWS][VECTORS] = {0};

		multiply(scores, d, s->q + i * d_pad, d_pad, 1, s->k_lanes + p * d);
		store_rows(scores, s->p + i * PANEL);
		multiply(dp, d, s->dout + i * d_pad, d_pad, 1, s->v_lanes + p * d);
		store_rows(dp, ds + i * PANEL);
	}
	for (int64_t i = begin; i < end; i++)
		for (int j = 0; j < VECTORS; j++) {
			vec *x = (vec *)(s->p + i * PANEL + j * LANES);
			vec *dx = (vec *)(ds + i * PANEL + j * LANES);

			*x = exp2_vec(*x - s->lse[i]);
			if (masked)
				*x = clear_lanes(
				        *x, hidden_lanes(a, tile->list, t + i, tile->first + p, j));
			*dx = *x * (*dx - s->delta[i]);
		}
}

/* sums^T [d_pad][PANEL] += rows^T b, where rows [n][d_pad] and b is a panel of n rows. */
static __attribute__((noinline)) void add_product(float *sums, const float *rows, const float *b,
                                                  int64_t n, int64_t d_pad)
{
	for (int64_t i = 0; i < d_pad; i += ROWS) {
		vec acc[ROWS][VECTORS];

		load_rows(acc, sums + i * PANEL);
		multiply(acc, n, rows + i, 1, d_pad, b);
		store_rows(acc, sums + i * PANEL);
	}
}

/* dQ of the n loaded queries, the first being token t, from the panels begin .. end-1 of the tile.
 */
static __attribute__((noinline)) void add_dq(const struct plan *p, const struct tile *tile,
                                             const struct scratch *s, int64_t t, int64_t n,
                                             int64_t begin, int64_t end)
{
	for (int64_t c = 0; c < p->d_pad; c += PANEL)
		for (int64_t i = 0; i < n; i += ROWS) {
			float *dq = tile->dq + c * p->padded_len + (t + i) * PANEL;
			vec acc[ROWS][VECTORS];

			load_rows(acc, dq);
			for (int64_t k = begin; k < end; k += PANEL)
				multiply(acc, PANEL, s->ds + k * QUERIES + i * PANEL, PANEL, 1,
				         s->k + c * KEYS + k * PANEL);
			store_rows(acc, dq);
		}
}

/* Everything that queries t .. t+n-1 contribute through the loaded keys. */
static void differentiate_queries(const struct plan *p, const struct tile *tile, int64_t t,
                                  int64_t n, struct scratch *s)
{
	const struct attention_args *a = &p->args->forward;
	const enum key_list list = tile->list;
	int64_t visible_begin = max_i64(first_key(a, list, t) - tile->first, 0) / PANEL * PANEL;
	int64_t visible_end = min_i64(end_key(a, list, t + n - 1) - tile->first, tile->n);

	if (visible_begin >= visible_end)
		return;
	load_queries(p, tile, t, n, s);
	for (int64_t k = visible_begin; k < visible_end; k += PANEL) {
		int64_t first = tile->first + k, begin = 0, end = n;

		while (end_key(a, list, t + begin) <= first)
			begin++;
		while (first_key(a, list, t + end - 1) >= first + PANEL)
			end--;
		begin = begin / ROWS * ROWS;
		int64_t padded_end = round_up(end, ROWS);
		float *ds = s->ds + k * QUERIES;
		bool masked = first_key(a, list, t + end - 1) > first ||
		              end_key(a, list, t + begin) < first + PANEL;

		memset(ds, 0, (size_t)(begin * PANEL) * sizeof(float));
		memset(ds + padded_end * PANEL, 0,
		       (size_t)((QUERIES - padded_end) * PANEL) * sizeof(float));
		differentiate_scores(a, tile, s, t, begin, padded_end, k, masked);
		add_product(s->dv + k * p->d_pad, s->dout + begin * p->d_pad, s->p + begin * PANEL,
		            end - begin, p->d_pad);
		add_product(s->dk + k * p->d_pad, s->q + begin * p->d_pad, ds + begin * PANEL,
		            end - begin, p->d_pad);
	}
	add_dq(p, tile, s, t, n, visible_begin, visible_end);
}

static void store_keys(const struct plan *p, const struct tile *tile, const struct scratch *s)
{
	const struct attention_args *a = &p->args->forward;

	for (int64_t j = 0; j < tile->n; j++) {
		int64_t lane = j / PANEL * PANEL * p->d_pad + j % PANEL;
		int64_t token = list_token(a, tile->list, tile->first + j);
		float *dk = view_at(&p->args->dk, tile->b, token, tile->kv);
		float *dv = view_at(&p->args->dv, tile->b, token, tile->kv);

		for (int64_t i = 0; i < p->d; i++)
			dk[i] = s->dk[lane + i * PANEL] * a->scale;
		for (int64_t i = 0; i < p->d; i++)
			dv[i] = s->dv[lane + i * PANEL];
	}
}

/* A tile of keys: its dk and dv, and what it adds to dq of all its readers. */
static void differentiate_tile(const struct plan *p, struct tile *tile, float *dq,
                               struct scratch *s)
{
	const struct attention_args *a = &p->args->forward;

	load_keys(a, tile, s);
	for (int64_t reader = 0; reader < p->readers; reader++) {
		tile->h = tile->kv * p->readers + reader;
		tile->dq = dq + reader * p->padded_len * p->d_pad;
		for (int64_t t = 0; t < a->seq_len; t += QUERIES)
			differentiate_queries(p, tile, t, min_i64(QUERIES, a->seq_len - t), s);
	}
	store_keys(p, tile, s);
}

/* Tiles split, split + splits, ... of a head of keys, of every list: their dk and dv, and dq of all
 * its readers into the item's buffer. */
static void differentiate_item(const struct plan *p, int64_t item, struct scratch *s)
{
	const struct attention_args *a = &p->args->forward;
	int64_t heads = a->batch * a->kv_heads, head = item % heads, split = item / heads;
	int64_t dq_size = p->padded_len * p->d_pad;
	float *dq = p->dq + item * p->readers * dq_size;
	struct tile tile = {.b = head / a->kv_heads, .kv = head % a->kv_heads};

	memset(dq, 0, (size_t)(p->readers * dq_size) * sizeof(float));
	for (int list = 0; list < n_key_lists(a); list++) {
		int64_t length = list_length(a, (enum key_list)list, a->kv_len);

		tile.list = (enum key_list)list;
		for (tile.first = split * KEYS; tile.first < length;
		     tile.first += p->splits * KEYS) {
			tile.n = min_i64(KEYS, length - tile.first);
			differentiate_tile(p, &tile, dq, s);
		}
	}
}

/* dq of token t: the sum over the heads that share its q and over the items of each. */
static void sum_dq(const struct plan *p, int64_t b, int64_t t)
{
	const struct attention_args *a = &p->args->forward;
	int64_t heads = a->batch * a->kv_heads;

	for (int64_t g = 0; g < a->q_heads; g++) {
		float *dq = view_at(&p->args->dq, b, t, g);

		memset(dq, 0, (size_t)p->d * sizeof(float));
		for (int64_t h = g; h < a->n_heads; h += a->q_heads)
			for (int64_t split = 0; split < p->splits; split++) {
				int64_t item = split * heads + b * a->kv_heads + h / p->readers;
				const float *part = p->dq + (item * p->readers + h % p->readers) *
				                                    p->padded_len * p->d_pad;
#pragma omp simd
				for (int64_t i = 0; i < p->d; i++)
					dq[i] += a->scale * part[i / PANEL * PANEL * p->padded_len +
					                         t * PANEL + i % PANEL];
			}
	}
}

enum status cpu_attention_backward(struct device *device, const void *args, void *workspace)
{
	const struct plan p = make_plan(args, workspace);
	const struct attention_args *a = &p.args->forward;

#pragma omp parallel
	{
		struct scratch s;

		scratch_carve(&s, p.scratch + (size_t)omp_get_thread_num() * p.scratch_size, p.d);
#pragma omp for schedule(static)
		for (int64_t i = 0; i < a->batch * a->seq_len; i++)
			for (int64_t h = 0; h < a->n_heads; h++)
				differentiate_query(&p, i / a->seq_len, i % a->seq_len, h);
#pragma omp for schedule(dynamic, 1)
		for (int64_t i = 0; i < p.items; i++)
			differentiate_item(&p, i, &s);
#pragma omp for schedule(static)
		for (int64_t i = 0; i < a->batch * a->seq_len; i++)
			sum_dq(&p, i / a->seq_len, i % a->seq_len);
	}
	return STATUS_OK;
}
