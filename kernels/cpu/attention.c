/*
 * Softmax attention on the CPU: tiled, with an online softmax (Milakov and
 * Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
 *
 * A thread takes QUERIES queries of one head, keeps them transposed as panels
 * (queries in the lanes) and walks over tiles of KEYS keys, copied once per
 * tile into layouts the product streams through:
 *   S^T = K Q^T   K rows broadcast, contraction over d;
 *   P^T = exp(S^T - max), every reduction lane by lane;
 *   O^T = V^T P^T   V broadcast, contraction over the keys.
 * Scores are in units of log2 (the scale carries log2 e). The keys of MASK_DILATED are walked list
 * by list (key_lists.h), gathered as tiles are copied.
 */
#include "kernels/cpu/kernels_cpu.h"

#include <float.h>
#include <math.h>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/vector_math.h"

enum { QUERIES = 8 * PANEL, KEYS = 256 };

/* One thread's buffers. */
struct scratch {
	float *q;      /* [QUERIES / PANEL][d][PANEL], scaled */
	float *k;      /* [KEYS][d] */
	float *v;      /* [d_pad / ROWS][KEYS][ROWS] */
	float *scores; /* [KEYS][PANEL]: S, then P */
	float *sums;   /* [QUERIES / PANEL][d_pad][PANEL]: O before division */
	float *max;    /* [QUERIES] running maximum */
	float *total;  /* [QUERIES] running denominator */
};

static size_t scratch_carve(struct scratch *s, float *base, int64_t d)
{
	int64_t d_pad = round_up(d, PANEL);
	float **const parts[] = {&s->q, &s->k, &s->v, &s->scores, &s->sums, &s->max, &s->total};
	const int64_t counts[] = {QUERIES * d,     KEYS * d, KEYS * d_pad, KEYS * PANEL,
	                          QUERIES * d_pad, QUERIES,  QUERIES};
	size_t offset = 0;

	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
		*parts[i] = base ? base + offset : NULL;
		offset += (size_t)round_up(counts[i], 64);
	}
	return offset;
}

/* What one thread works on: queries first .. first+n-1 of head h, sequence b, and a list of keys.
 */
struct tile {
	int64_t b, h, first, n;
	enum key_list list;
};

size_t cpu_attention_workspace(const struct device *device, const void *args)
{
	const struct attention_args *a = args;
	struct scratch unused;

	return (size_t)omp_get_max_threads() * scratch_carve(&unused, NULL, a->d_head) *
	       sizeof(float);
}

static void load_queries(const struct attention_args *a, const struct tile *tile, struct scratch *s)
{
	int64_t d = a->d_head, d_pad = round_up(d, PANEL), padded = round_up(tile->n, PANEL);

	for (int64_t p = 0; p < padded; p += PANEL)
		pack_transposed(s->q + p * d,
		                view_at(&a->q, tile->b, tile->first + p, tile->h % a->q_heads),
		                a->q.token, min_i64(tile->n - p, PANEL), d, a->scale * LOG2_E);
	memset(s->sums, 0, (size_t)(padded * d_pad) * sizeof(float));
	for (int64_t i = 0; i < padded; i++) {
		bool own = a->own_score && i < tile->n;
		int64_t token = tile->b * a->seq_len + tile->first + i;

		s->max[i] = own ? a->own_score[token * a->n_heads + tile->h] * LOG2_E : -FLT_MAX;
		s->total[i] = own ? 1.0f : 0.0f;
	}
}

/* Spreads one value over s->v; the constant size makes each copy one instruction. */
static void pack_value(float *to, const float *v, int64_t d)
{
	int64_t i = 0, d_pad = round_up(d, PANEL);

	for (; i + ROWS <= d; i += ROWS)
		memcpy(to + i * KEYS, v + i, ROWS * sizeof(float));
	for (; i < d_pad; i++)
		to[i / ROWS * ROWS * KEYS + i % ROWS] = i < d ? v[i] : 0.0f;
}

/* Copies keys first .. first+n-1 into s->k, padded to ROWS with zeros, and their values into s->v.
 */
static void load_keys(const struct attention_args *a, const struct tile *tile, int64_t first,
                      int64_t n, struct scratch *s)
{
	int64_t d = a->d_head, kv = tile->h / (a->n_heads / a->kv_heads);

	for (int64_t j = 0; j < n; j++) {
		int64_t token = list_token(a, tile->list, first + j);

		memcpy(s->k + j * d, view_at(&a->k, tile->b, token, kv), (size_t)d * sizeof(float));
		pack_value(s->v + j * ROWS, view_at(&a->v, tile->b, token, kv), d);
	}
	memset(s->k + n * d, 0, (size_t)((round_up(n, ROWS) - n) * d) * sizeof(float));
}

/* Scores of keys begin .. end-1 of the tile; begin is a multiple of ROWS, end is rounded up to one.
 */
static __attribute__((noinline)) void score(const struct scratch *s, const float *q, int64_t d,
                                            int64_t begin, int64_t end)
{
	for (int64_t j = begin; j < end; j += ROWS) {
		vec acc[ROWS][VECTORS] = {0};

		multiply(acc, d, s->k + j * d, d, 1, q);
		store_rows(acc, s->scores + j * PANEL);
	}
}

/* Sets the scores that queries from t on do not see to minus infinity; key 0 of the tile is
 * `first`. */
static void mask_scores(const struct attention_args *a, enum key_list list, float *scores,
                        int64_t t, int64_t first, int64_t begin, int64_t end)
{
	int32_t low[PANEL], high[PANEL];

	for (int i = 0; i < PANEL; i++) {
		low[i] = (int32_t)min_i64(max_i64(first_key(a, list, t + i) - first, 0), KEYS);
		high[i] = (int32_t)min_i64(max_i64(end_key(a, list, t + i) - first, 0), KEYS);
	}
	for (int32_t j = (int32_t)begin; j < end; j++) {
		float *row = scores + j * PANEL;
#pragma omp simd
		for (int i = 0; i < PANEL; i++)
			row[i] = j >= low[i] && j < high[i] ? row[i] : -INFINITY;
	}
}

/* Scores to probabilities; updates the running maximum and denominator and returns by how much
 * earlier sums shrink. */
static void softmax(float *scores, int64_t begin, int64_t end, float *max, float *total,
                    vec shrink[VECTORS])
{
	for (int j = 0; j < VECTORS; j++) {
		vec *m = (vec *)(max + j * LANES), *l = (vec *)(total + j * LANES);
		vec new_max = *m, sum = {0};

		for (int64_t i = begin; i < end; i++)
			new_max = max_vec(*(const vec *)(scores + i * PANEL + j * LANES), new_max);
		for (int64_t i = begin; i < end; i++) {
			vec *p = (vec *)(scores + i * PANEL + j * LANES);

			*p = exp2_vec(*p - new_max);
			sum += *p;
		}
		shrink[j] = exp2_vec(*m - new_max);
		*l = *l * shrink[j] + sum;
		*m = new_max;
	}
}

static __attribute__((noinline)) void add_values(const struct scratch *s, float *sums,
                                                 int64_t d_pad, int64_t begin, int64_t end,
                                                 const vec shrink[VECTORS])
{
	for (int64_t i = 0; i < d_pad; i += ROWS) {
		vec acc[ROWS][VECTORS];

		load_rows(acc, sums + i * PANEL);
		for (int r = 0; r < ROWS; r++)
			for (int j = 0; j < VECTORS; j++)
				acc[r][j] *= shrink[j];
		multiply(acc, end - begin, s->v + i * KEYS + begin * ROWS, 1, ROWS,
		         s->scores + begin * PANEL);
		store_rows(acc, sums + i * PANEL);
	}
}

/* Panel p (its first query within the tile) attends to the loaded keys first .. first+n-1. */
static void attend(const struct attention_args *a, const struct tile *tile, int64_t p,
                   int64_t first, int64_t n, struct scratch *s)
{
	int64_t d = a->d_head, d_pad = round_up(d, PANEL);
	int64_t t = tile->first + p, last = min_i64(t + PANEL, tile->first + tile->n) - 1;
	int64_t begin = max_i64(first_key(a, tile->list, t) - first, 0) / ROWS * ROWS;
	int64_t end = min_i64(end_key(a, tile->list, last) - first, n);
	vec shrink[VECTORS];

	if (begin >= end)
		return;
	score(s, s->q + p * d, d, begin, end);
	if (first_key(a, tile->list, last) > first + begin ||
	    end_key(a, tile->list, t) < first + end)
		mask_scores(a, tile->list, s->scores, t, first, begin, end);
	softmax(s->scores, begin, end, s->max + p, s->total + p, shrink);
	add_values(s, s->sums + p * d_pad, d_pad, begin, end, shrink);
}

/* out = o: the sums over the denominator, transposed back. */
static void store_sums(const struct attention_args *a, const struct tile *tile,
                       const struct scratch *s)
{
	int64_t d = a->d_head, d_pad = round_up(d, PANEL);

	for (int64_t i = 0; i < tile->n; i++) {
		const float *sums = s->sums + i / PANEL * PANEL * d_pad + i % PANEL;
		float *out = view_at(&a->out, tile->b, tile->first + i, tile->h);
		float weight = 1.0f / s->total[i];

		for (int64_t c = 0; c < d; c++)
			out[c] = sums[c * PANEL] * weight;
	}
}

/* out += p_own * own_value. */
static void add_own_values(const struct attention_args *a, const struct tile *tile,
                           const struct scratch *s)
{
	for (int64_t i = 0; i < tile->n; i++) {
		int64_t t = tile->first + i;
		const float *own = view_at(&a->own_value, tile->b, t, tile->h);
		float score = a->own_score[(tile->b * a->seq_len + t) * a->n_heads + tile->h];
		float weight = exp_f32((score * LOG2_E - s->max[i]) * LN_2) / s->total[i];
		float *out = view_at(&a->out, tile->b, t, tile->h);

#pragma omp simd
		for (int64_t c = 0; c < a->d_head; c++)
			out[c] += weight * own[c];
	}
}

/* Keeps o where it is wanted, then out *= sigmoid(gate). */
static void apply_gate(const struct attention_args *a, const struct tile *tile)
{
	for (int64_t i = 0; i < tile->n; i++) {
		int64_t t = tile->first + i;
		float *out = view_at(&a->out, tile->b, t, tile->h);

		if (a->out_ungated.data)
			memcpy(view_at(&a->out_ungated, tile->b, t, tile->h), out,
			       (size_t)a->d_head * sizeof(float));
		if (!a->gate.data)
			continue;
		const float *gate = view_at(&a->gate, tile->b, t, tile->h);
#pragma omp simd
		for (int64_t c = 0; c < a->d_head; c++)
			out[c] *= sigmoid_f32(gate[c]);
	}
}

/* One pass per input: short loops leave the processor room to fetch rows ahead. */
static void store_queries(const struct attention_args *a, const struct tile *tile,
                          const struct scratch *s)
{
	store_sums(a, tile, s);
	if (a->own_score)
		add_own_values(a, tile, s);
	apply_gate(a, tile);
	if (!a->lse)
		return;
	float *lse = a->lse + (tile->b * a->n_heads + tile->h) * a->seq_len + tile->first;
	for (int64_t i = 0; i < tile->n; i++)
		lse[i] = (s->max[i] + log2f(s->total[i])) * LN_2;
}

/* To all keys of the tile's list. */
static void attend_list(const struct attention_args *a, const struct tile *tile, struct scratch *s)
{
	int64_t end = end_key(a, tile->list, tile->first + tile->n - 1);

	for (int64_t first = first_key(a, tile->list, tile->first); first < end; first += KEYS) {
		int64_t n = min_i64(KEYS, end - first);

		load_keys(a, tile, first, n, s);
		for (int64_t p = 0; p < tile->n; p += PANEL)
			attend(a, tile, p, first, n, s);
	}
}

static void attend_tile(const struct attention_args *a, struct tile *tile, struct scratch *s)
{
	load_queries(a, tile, s);
	for (int list = 0; list < n_key_lists(a); list++) {
		tile->list = (enum key_list)list;
		attend_list(a, tile, s);
	}
	store_queries(a, tile, s);
}

enum status cpu_attention(struct device *device, const void *args, void *workspace)
{
	const struct attention_args *a = args;
	int64_t heads = a->batch * a->n_heads;
	int64_t n_tiles = (a->seq_len + QUERIES - 1) / QUERIES;

#pragma omp parallel
	{
		struct scratch s;
		size_t size = scratch_carve(&s, NULL, a->d_head);

		scratch_carve(&s, (float *)workspace + (size_t)omp_get_thread_num() * size,
		              a->d_head);
		/* Late queries see the most keys: they go first, so that the ends meet. */
#pragma omp for schedule(dynamic, 1)
		for (int64_t i = 0; i < heads * n_tiles; i++) {
			int64_t first = (n_tiles - 1 - i / heads) * QUERIES;
			struct tile tile = {.b = i % heads / a->n_heads,
			                    .h = i % a->n_heads,
			                    .first = first,
			                    .n = min_i64(QUERIES, a->seq_len - first)};

			attend_tile(a, &tile, &s);
		}
	}
	return STATUS_OK;
}
