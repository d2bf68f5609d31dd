/*
 * A few pairs of a sequence and a head stand for all: the first, the last, and
 * some at random. Of each the inputs are downloaded, and the reference computes
 * sampled rows of the output - or all, where that costs no more. What it makes
 * of a case is kept for the other providers.
 */
#include "bench/kernel_check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "layers/noise.h"
#include "layers/verify.h"

enum {
	BLOCK_COUNT = 1 << 22,   /* elements that are downloaded together */
	PAIR_ELEMENTS = 1 << 22, /* of one tensor of all pairs, where two of them allow it */
	MOST_PAIRS = 8,
	STEP_PAIRS = 16,
	FEWEST_ROWS = 16,
	CHANNELS = 64,
	LINEAR_ROWS = 32
};

/* What the reference may cost for sampled rows: a second or two. */
static const double MOST_FLOPS = 4e9;

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

static void raise_to(double *worst, double error)
{
	/* Written so that a NaN raises it, too. */
	if (!(error <= *worst))
		*worst = isnan(error) ? INFINITY : error;
}

/* ---- memory of a check ---- */

/* Arrays that live as long as a check; a failed allocation shows in status. */
struct scratch {
	enum status status;
	int count;
	double *piece[32];
};

static double *take(struct scratch *s, int64_t count)
{
	if (s->status != STATUS_OK)
		return NULL;
	double *memory = malloc((size_t)larger(count, 1) * sizeof *memory);

	if (!memory)
		s->status = status_set(STATUS_OOM, "no memory for %lld doubles of a reference",
		                       (long long)count);
	else
		s->piece[s->count++] = memory;
	return memory;
}

static enum status finish(struct scratch *s)
{
	for (int i = 0; i < s->count; i++)
		free(s->piece[i]);
	return s->status;
}

/* ---- tensors ---- */

enum status check_finite(const struct backend *backend, const struct operand *operand,
                         double *worst)
{
	const size_t size = dtype_size(operand->dtype);
	enum status status = STATUS_OK;
	int64_t n_bad = 0;
	int bad = 0;

	if (backend->count_nonfinite) {
		status = backend->count_nonfinite(operand->dtype, operand->data, operand->count,
		                                  &n_bad);
		if (n_bad)
			*worst = INFINITY;
		return status;
	}
	float *block = malloc(BLOCK_COUNT * sizeof *block);
	if (!block)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < operand->count && status == STATUS_OK; i += BLOCK_COUNT) {
		const int64_t n = smaller(BLOCK_COUNT, operand->count - i);

		status = backend_download_floats(backend, operand->dtype, block,
		                                 (char *)operand->data + (size_t)i * size,
		                                 (size_t)n);
		if (status == STATUS_OK) {
#pragma omp parallel for reduction(| : bad)
			for (int64_t j = 0; j < n; j++)
				bad |= !isfinite(block[j]);
		}
	}
	free(block);
	if (bad)
		*worst = INFINITY;
	return status;
}

/* to [n, width]: tokens of the head that begins at element `first`, `stride` apart. */
static enum status download_strided(const struct backend *backend, const void *data, int64_t first,
                                    int64_t stride, int64_t width, int64_t n, double *to)
{
	const int64_t n_block = larger(BLOCK_COUNT / stride, 1);
	const size_t size = dtype_size(backend->activation);
	float *block = malloc((size_t)(n_block * stride) * sizeof *block);
	enum status status = STATUS_OK;

	if (!block)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < n && status == STATUS_OK; i += n_block) {
		const int64_t count = smaller(n_block, n - i);

		status = backend_download_floats(backend, backend->activation, block,
		                                 (const char *)data +
		                                         (size_t)(first + i * stride) * size,
		                                 (size_t)((count - 1) * stride + width));
		if (status == STATUS_OK) {
#pragma omp parallel for
			for (int64_t r = 0; r < count; r++)
				for (int64_t j = 0; j < width; j++)
					to[(i + r) * width + j] = block[r * stride + j];
		}
	}
	free(block);
	return status;
}

/* A sequence and a head. */
struct pair {
	int64_t b, h;
};

/* [n_tokens, width] of a pair from token `first` on, in new memory of the scratch. */
static double *head_of(struct scratch *s, const struct kernel_problem *p, const struct view *view,
                       struct pair pair, int64_t first, int64_t n_tokens, int64_t width)
{
	double *to = take(s, n_tokens * width);

	if (s->status == STATUS_OK)
		s->status = download_strided(p->backend, view->data,
		                             pair.b * view->batch + first * view->token +
		                                     pair.h * view->head,
		                             view->token, width, n_tokens, to);
	return to;
}

static double *floats_of(struct scratch *s, const struct kernel_problem *p, const float *data,
                         int64_t first, int64_t count)
{
	double *to = take(s, count);

	if (s->status == STATUS_OK)
		s->status = verify_download(p->backend, DTYPE_F32, data, first, count, to);
	return to;
}

/* ---- what to look at ---- */

/* `n` pairs of `batch` sequences and `n_heads` heads, at most; returns how many. */
static int pick_pairs(int64_t batch, int64_t n_heads, int64_t n, uint64_t seed, struct pair *pairs)
{
	int64_t picked[STEP_PAIRS];

	n = smaller(n, batch * n_heads);
	verify_pick(batch * n_heads, n, seed, picked);
	for (int64_t i = 0; i < n; i++)
		pairs[i] = (struct pair){picked[i] / n_heads, picked[i] % n_heads};
	return (int)n;
}

/* Pairs where each has a tensor of `elements`. */
static int pick_sequences(int64_t batch, int64_t n_heads, int64_t elements, uint64_t seed,
                          struct pair *pairs)
{
	const int64_t n = larger(smaller(PAIR_ELEMENTS / elements, MOST_PAIRS), 2);

	return pick_pairs(batch, n_heads, n, seed, pairs);
}

static int compare_integers(const void *a, const void *b)
{
	const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

/* Rows 0 .. seq_len-1 to compare: both sides of powers of two, where tiles and segments end, and
 * `n` spread at random; ascending. To be freed; returns how many. */
static int64_t pick_rows(int64_t seq_len, int64_t n, uint64_t seed, int64_t **rows)
{
	int64_t count = 0, distinct = 0;

	n = smaller(n, seq_len);
	*rows = malloc((size_t)(n + 128) * sizeof **rows);
	if (!*rows)
		return 0;
	verify_pick(seq_len, n, seed, *rows);
	count = n;
	for (int64_t edge = 1; n < seq_len && edge < seq_len; edge *= 2) {
		(*rows)[count++] = edge - 1;
		(*rows)[count++] = edge;
	}
	qsort(*rows, (size_t)count, sizeof **rows, compare_integers);
	for (int64_t i = 0; i < count; i++)
		if (i == 0 || (*rows)[i] != (*rows)[i - 1])
			(*rows)[distinct++] = (*rows)[i];
	return distinct;
}

/* Rows of each of `pairs` where a row costs `flops`. */
static int64_t rows_each(int64_t rows, int pairs, double flops)
{
	const double affordable = MOST_FLOPS / (flops * pairs);
	const int64_t wanted = rows / pairs;

	return larger(affordable < (double)wanted ? (int64_t)affordable : wanted, FEWEST_ROWS);
}

/* ---- comparisons ---- */

/* Rows [n, width] of a pair's output against what is expected. */
static enum status compare_rows(const struct kernel_problem *p, const struct view *view,
                                struct pair pair, int64_t n, const int64_t *rows, int64_t width,
                                const double *expected, double *worst)
{
	struct scratch s = {0};
	double *actual = take(&s, n * width);

	for (int64_t i = 0, run; i < n && s.status == STATUS_OK; i += run) {
		for (run = 1; i + run < n && rows[i + run] == rows[i] + run; run++)
			;
		s.status = download_strided(p->backend, view->data,
		                            pair.b * view->batch + rows[i] * view->token +
		                                    pair.h * view->head,
		                            view->token, width, run, actual + i * width);
	}
	if (s.status == STATUS_OK)
		raise_to(worst, verify_worst_row(n, width, actual, expected));
	return finish(&s);
}

/* All `n` rows of a pair from token 0 on. */
static enum status compare_head(const struct kernel_problem *p, const struct view *view,
                                struct pair pair, int64_t first, int64_t n, int64_t width,
                                const double *expected, double *worst)
{
	struct scratch s = {0};
	const double *actual = head_of(&s, p, view, pair, first, n, width);

	if (s.status == STATUS_OK)
		raise_to(worst, verify_worst_row(n, width, actual, expected));
	return finish(&s);
}

/* fp32 rows [n, width] from element `first` on. */
static enum status compare_floats(const struct kernel_problem *p, const float *data, int64_t first,
                                  int64_t n, int64_t width, const double *expected, double *worst)
{
	struct scratch s = {0};
	const double *actual = floats_of(&s, p, data, first, n * width);

	if (s.status == STATUS_OK)
		raise_to(worst, verify_worst_row(n, width, actual, expected));
	return finish(&s);
}

/* Room for what is expected of all pairs; *known: it is there already. */
static enum status take_expected(struct kernel_problem *p, int64_t count, bool *known)
{
	*known = p->expected != NULL;
	if (!*known)
		p->expected = malloc((size_t)count * sizeof *p->expected);
	return p->expected ? STATUS_OK
	                   : status_set(STATUS_OOM, "no memory for %lld doubles of a reference",
	                                (long long)count);
}

/* ---- attention ---- */

static enum status expect_attention(const struct kernel_problem *p, struct pair pair, int64_t n,
                                    const int64_t *rows, double *expected)
{
	const struct attention_args *a = &p->args.attention;
	const int64_t t = a->seq_len, d = a->d_head;
	const struct pair group = {pair.b, pair.h % a->q_heads};
	struct scratch s = {0};
	struct reference_attention r = {.batch = 1,
	                                .n_heads = 1,
	                                .q_heads = 1,
	                                .d_head = d,
	                                .seq_len = t,
	                                .kv_len = a->kv_len,
	                                .mask = a->mask,
	                                .window = a->window,
	                                .chunk = a->chunk,
	                                .scale = a->scale,
	                                .q = head_of(&s, p, &a->q, group, 0, t, d),
	                                .k = head_of(&s, p, &a->k, pair, 0, a->kv_len, d),
	                                .v = head_of(&s, p, &a->v, pair, 0, a->kv_len, d)};

	if (a->own_score) {
		const double *scores =
		        floats_of(&s, p, a->own_score, pair.b * t * a->n_heads, t * a->n_heads);
		double *own_score = take(&s, t);

		if (s.status == STATUS_OK)
			reference_get_columns(t, a->n_heads, pair.h, 1, scores, own_score);
		r.own_score = own_score;
		r.own_value = head_of(&s, p, &a->own_value, pair, 0, t, d);
	}
	if (a->gate.data)
		r.gate = head_of(&s, p, &a->gate, pair, 0, t, d);
	if (s.status == STATUS_OK)
		s.status = reference_attention_forward(&r, n, rows, expected, NULL, NULL);
	return finish(&s);
}

enum status check_attention(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	const struct attention_args *a = &p->args.attention;
	struct pair pairs[MOST_PAIRS];
	const int n_pairs =
	        pick_sequences(p->batch, p->n_heads, p->seq_len * p->d_head, seed, pairs);
	int64_t *list;
	const int64_t n = pick_rows(
	        p->seq_len, rows_each(rows, n_pairs, 4.0 * (double)p->d_head * (double)p->kv_len),
	        seed, &list);
	bool known;
	enum status status = take_expected(p, n_pairs * n * p->d_head, &known);

	if (status == STATUS_OK && !list)
		status = status_set(STATUS_OOM, "no memory to verify with");
	for (int i = 0; i < n_pairs && status == STATUS_OK; i++) {
		double *expected = p->expected + i * n * p->d_head;

		if (!known)
			status = expect_attention(p, pairs[i], n, list, expected);
		if (status == STATUS_OK)
			status = compare_rows(p, &a->out, pairs[i], n, list, p->d_head, expected,
			                      worst);
	}
	free(list);
	return status;
}

/* Fills the slot that a step will write with NaN, in the pairs that will be looked at. */
static enum status poison_slot(const struct kernel_problem *p, const struct view *cache,
                               int64_t slot, const struct pair *pairs, int n)
{
	const size_t size = dtype_size(p->backend->activation);
	enum status status = STATUS_OK;

	for (int i = 0; i < n && status == STATUS_OK; i++)
		status = p->backend->fill((char *)cache->data + (size_t)(pairs[i].b * cache->batch +
		                                                         slot * cache->token +
		                                                         pairs[i].h * cache->head) *
		                                                        size,
		                          0xff, (size_t)p->d_head * size);
	return status;
}

enum status keep_attention_step(struct kernel_problem *p, uint64_t seed)
{
	const struct attention_step_args *a = &p->args.attention_step;
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, p->n_heads, STEP_PAIRS, seed, pairs);
	enum status status = poison_slot(p, &a->k_cache, p->seq_len - 1, pairs, n);

	return status == STATUS_OK ? poison_slot(p, &a->v_cache, p->seq_len - 1, pairs, n) : status;
}

static enum status check_attention_pair(const struct kernel_problem *p, struct pair pair,
                                        double *worst)
{
	const struct attention_step_args *a = &p->args.attention_step;
	const int64_t d = p->d_head, last = p->seq_len - 1;
	struct scratch s = {0};
	double *out = take(&s, d), *k_stored = take(&s, d);
	const struct reference_attention_step r = {
	        .batch = 1,
	        .n_heads = 1,
	        .d_head = d,
	        .kv_slots = a->kv_slots,
	        .window = a->window,
	        .rope = a->rope,
	        .scale = a->scale,
	        .position = last,
	        .q = head_of(&s, p, &a->q, pair, 0, 1, d),
	        .k = head_of(&s, p, &a->k, pair, 0, 1, d),
	        .v = head_of(&s, p, &a->v, pair, 0, 1, d),
	        .k_cache = head_of(&s, p, &a->k_cache, pair, 0, a->kv_slots, d),
	        .v_cache = head_of(&s, p, &a->v_cache, pair, 0, a->kv_slots, d)};

	if (s.status == STATUS_OK)
		s.status = reference_attention_step(&r, out, k_stored);
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->out, pair, 0, 1, d, out, worst);
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->k_cache, pair, last, 1, d, k_stored, worst);
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->v_cache, pair, last, 1, d, r.v, worst);
	return finish(&s);
}

enum status check_attention_step(struct kernel_problem *p, int64_t rows, uint64_t seed,
                                 double *worst)
{
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, p->n_heads, STEP_PAIRS, seed, pairs);
	enum status status = STATUS_OK;

	(void)rows;
	for (int i = 0; i < n && status == STATUS_OK; i++)
		status = check_attention_pair(p, pairs[i], worst);
	return status;
}

/* ---- RAT ---- */

static enum status check_rat_scan_pair(const struct kernel_problem *p, struct pair pair,
                                       double *worst)
{
	const struct rat_scan_args *a = &p->args.rat_scan;
	const int64_t t = p->seq_len, d = p->d_head, n_chunks = p->kv_len;
	const struct pair group = {pair.b, pair.h % a->groups};
	struct scratch s = {0};
	const struct reference_rat_scan r = {.batch = 1,
	                                     .seq_len = t,
	                                     .n_heads = 1,
	                                     .groups = 1,
	                                     .d_head = d,
	                                     .chunk = a->chunk,
	                                     .rope = a->rope,
	                                     .scale = a->scale,
	                                     .v = head_of(&s, p, &a->v, pair, 0, t, d),
	                                     .gate = head_of(&s, p, &a->gate, pair, 0, t, d),
	                                     .q = head_of(&s, p, &a->q, group, 0, t, d),
	                                     .k = head_of(&s, p, &a->k, group, 0, t, d),
	                                     .gate_bias =
	                                             floats_of(&s, p, a->gate_bias, pair.h * d, d)};
	const struct reference_rat_scan_out out = {.v_scan = take(&s, t * d),
	                                           .own_score = take(&s, t),
	                                           .q_out = take(&s, t * d),
	                                           .k_chunk = take(&s, n_chunks * d),
	                                           .v_chunk = take(&s, n_chunks * d)};
	const double *scores =
	        floats_of(&s, p, a->own_score, pair.b * t * a->n_heads, t * a->n_heads);
	double *own_score = take(&s, t);

	if (s.status == STATUS_OK)
		s.status = reference_rat_scan_forward(&r, &out);
	if (s.status == STATUS_OK) {
		reference_get_columns(t, a->n_heads, pair.h, 1, scores, own_score);
		raise_to(worst, verify_worst_row(1, t, own_score, out.own_score));
		s.status = compare_head(p, &a->v_scan, pair, 0, t, d, out.v_scan, worst);
	}
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->q_out, group, 0, t, d, out.q_out, worst);
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->k_chunk, pair, 0, n_chunks, d, out.k_chunk, worst);
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->v_chunk, pair, 0, n_chunks, d, out.v_chunk, worst);
	return finish(&s);
}

enum status check_rat_scan(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	struct pair pairs[MOST_PAIRS];
	const int n = pick_sequences(p->batch, p->n_heads, p->seq_len * p->d_head, seed, pairs);
	enum status status = STATUS_OK;

	(void)rows;
	for (int i = 0; i < n && status == STATUS_OK; i++)
		status = check_rat_scan_pair(p, pairs[i], worst);
	return status;
}

/* Keeps `count` floats of each pair; pair (b, h) has them at (b*heads + h)*count. */
static enum status keep_floats(struct kernel_problem *p, const float *data, int64_t heads,
                               int64_t count, const struct pair *pairs, int n, double *to)
{
	enum status status = STATUS_OK;

	for (int i = 0; i < n && status == STATUS_OK; i++)
		status = verify_download(p->backend, DTYPE_F32, data,
		                         (pairs[i].b * heads + pairs[i].h) * count, count,
		                         to + i * count);
	return status;
}

static enum status take_before(struct kernel_problem *p, int64_t count)
{
	if (!p->before)
		p->before = malloc((size_t)count * sizeof *p->before);
	return p->before ? STATUS_OK : status_set(STATUS_OOM, "no memory to keep states in");
}

enum status keep_rat_step(struct kernel_problem *p, uint64_t seed)
{
	const struct rat_step_args *a = &p->args.rat_step;
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, p->n_heads, STEP_PAIRS, seed, pairs);
	enum status status = take_before(p, 2 * n * p->d_head);

	if (status == STATUS_OK)
		status = keep_floats(p, a->k_state, p->n_heads, p->d_head, pairs, n, p->before);
	if (status == STATUS_OK)
		status = keep_floats(p, a->v_state, p->n_heads, p->d_head, pairs, n,
		                     p->before + n * p->d_head);
	if (status == STATUS_OK && p->seq_len % p->chunk == 0)
		status = poison_slot(p, &a->v_chunk, p->kv_len - 1, pairs, n);
	if (status == STATUS_OK && p->seq_len % p->chunk == 0)
		status = poison_slot(p, &a->k_chunk, p->kv_len - 1, pairs, n);
	return status;
}

/* Compares a pair's step; k_before and v_before are its running state. */
static enum status check_rat_pair(const struct kernel_problem *p, struct pair pair,
                                  const double *k_before, const double *v_before, double *worst)
{
	const struct rat_step_args *a = &p->args.rat_step;
	const int64_t d = p->d_head, at = (pair.b * p->n_heads + pair.h) * d;
	const struct pair group = {pair.b, pair.h % a->groups};
	struct scratch s = {0};
	double *out = take(&s, d), *k_state = take(&s, d), *v_state = take(&s, d);
	const struct reference_rat_step r = {
	        .batch = 1,
	        .n_heads = 1,
	        .groups = 1,
	        .d_head = d,
	        .chunk = a->chunk,
	        .chunk_slots = a->chunk_slots,
	        .rope = a->rope,
	        .scale = a->scale,
	        .position = p->seq_len - 1,
	        .z = head_of(&s, p, &a->z, pair, 0, 1, d),
	        .v = head_of(&s, p, &a->v, pair, 0, 1, d),
	        .gate = head_of(&s, p, &a->gate, pair, 0, 1, d),
	        .q = head_of(&s, p, &a->q, group, 0, 1, d),
	        .k = head_of(&s, p, &a->k, group, 0, 1, d),
	        .gate_bias = floats_of(&s, p, a->gate_bias, pair.h * d, d),
	        .k_state = k_before,
	        .v_state = v_before,
	        .k_chunk = head_of(&s, p, &a->k_chunk, pair, 0, a->chunk_slots, d),
	        .v_chunk = head_of(&s, p, &a->v_chunk, pair, 0, a->chunk_slots, d)};

	if (s.status == STATUS_OK)
		s.status = reference_rat_step(&r, out, k_state, v_state);
	if (s.status == STATUS_OK)
		s.status = compare_head(p, &a->out, pair, 0, 1, d, out, worst);
	if (s.status == STATUS_OK)
		s.status = compare_floats(p, a->k_state, at, 1, d, k_state, worst);
	if (s.status == STATUS_OK)
		s.status = compare_floats(p, a->v_state, at, 1, d, v_state, worst);
	if (s.status == STATUS_OK && p->seq_len % p->chunk == 0)
		s.status = compare_head(p, &a->v_chunk, pair, p->kv_len - 1, 1, d, v_state, worst);
	if (s.status == STATUS_OK && p->seq_len % p->chunk == 0) {
		reference_rotate(1, 1, 1, d, p->kv_len - 1, 1, k_state, k_state);
		s.status = compare_head(p, &a->k_chunk, pair, p->kv_len - 1, 1, d, k_state, worst);
	}
	return finish(&s);
}

enum status check_rat_step(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, p->n_heads, STEP_PAIRS, seed, pairs);
	enum status status = STATUS_OK;

	(void)rows;
	for (int i = 0; i < n && status == STATUS_OK; i++)
		status = check_rat_pair(p, pairs[i], p->before + i * p->d_head,
		                        p->before + (n + i) * p->d_head, worst);
	return status;
}

/* ---- linear recurrence: heads are groups of channels ---- */

static int64_t channels_of(int64_t width)
{
	return width % CHANNELS == 0 ? CHANNELS : width;
}

/* A view of one head as several of `channels`. */
static struct view split(const struct view *view, int64_t channels)
{
	struct view v = *view;

	v.head = channels;
	return v;
}

static enum status expect_recurrence(const struct kernel_problem *p, struct pair pair,
                                     int64_t channels, double *expected)
{
	const struct recurrence_args *a = &p->args.recurrence;
	const struct view x = split(&a->x, channels), gate = split(&a->gate, channels),
	                  z = split(&a->z, channels);
	struct scratch s = {0};
	const struct reference_recurrence r = {
	        .batch = 1,
	        .seq_len = a->seq_len,
	        .d_model = channels,
	        .form = a->form,
	        .x = head_of(&s, p, &x, pair, 0, a->seq_len, channels),
	        .gate = head_of(&s, p, &gate, pair, 0, a->seq_len, channels),
	        .z = z.data ? head_of(&s, p, &z, pair, 0, a->seq_len, channels) : NULL,
	        .gate_bias = a->gate_bias
	                             ? floats_of(&s, p, a->gate_bias, pair.h * channels, channels)
	                             : NULL};

	if (s.status == STATUS_OK)
		reference_recurrence_forward(&r, expected, NULL, NULL);
	return finish(&s);
}

enum status check_recurrence(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	const struct recurrence_args *a = &p->args.recurrence;
	const int64_t channels = channels_of(a->d_model), count = a->seq_len * channels;
	const struct view out = split(&a->out, channels);
	struct pair pairs[MOST_PAIRS];
	const int n = pick_sequences(p->batch, a->d_model / channels, count, seed, pairs);
	bool known;
	enum status status = take_expected(p, n * count, &known);

	(void)rows;
	for (int i = 0; i < n && status == STATUS_OK; i++) {
		if (!known)
			status = expect_recurrence(p, pairs[i], channels, p->expected + i * count);
		if (status == STATUS_OK)
			status = compare_head(p, &out, pairs[i], 0, a->seq_len, channels,
			                      p->expected + i * count, worst);
	}
	return status;
}

/* Whole sequences: pairs with one head. */
enum status keep_recurrence_step(struct kernel_problem *p, uint64_t seed)
{
	const struct recurrence_step_args *a = &p->args.recurrence_step;
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, 1, STEP_PAIRS, seed, pairs);
	enum status status = take_before(p, n * a->d_model);

	return status == STATUS_OK ? keep_floats(p, a->h, 1, a->d_model, pairs, n, p->before)
	                           : status;
}

enum status check_recurrence_step(struct kernel_problem *p, int64_t rows, uint64_t seed,
                                  double *worst)
{
	const struct recurrence_step_args *a = &p->args.recurrence_step;
	const int64_t d = a->d_model;
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, 1, STEP_PAIRS, seed, pairs);
	struct scratch s = {0};
	double *out = take(&s, d), *h = take(&s, d);
	const double *bias = floats_of(&s, p, a->gate_bias, 0, d);

	(void)rows;
	for (int i = 0; i < n && s.status == STATUS_OK; i++) {
		struct scratch inputs = {0};
		const struct reference_recurrence r = {
		        .batch = 1,
		        .seq_len = 1,
		        .d_model = d,
		        .form = a->form,
		        .x = head_of(&inputs, p, &a->x, pairs[i], 0, 1, d),
		        .gate = head_of(&inputs, p, &a->gate, pairs[i], 0, 1, d),
		        .z = head_of(&inputs, p, &a->z, pairs[i], 0, 1, d),
		        .gate_bias = bias,
		        .h0 = p->before + i * d};

		if (inputs.status == STATUS_OK)
			reference_recurrence_forward(&r, out, NULL, h);
		s.status = finish(&inputs);
		if (s.status == STATUS_OK)
			s.status = compare_head(p, &a->out, pairs[i], 0, 1, d, out, worst);
		if (s.status == STATUS_OK)
			s.status = compare_floats(p, a->h, pairs[i].b * d, 1, d, h, worst);
	}
	return finish(&s);
}

/* ---- matrix-state recurrence ---- */

/* A head's log decays as the reference with this one head takes them: RetNet's are known. */
static const double *log_decay_of(struct scratch *s, const struct kernel_problem *p,
                                  const struct view *view, struct pair pair, int64_t n_tokens)
{
	const int64_t width = p->kind->decay == DECAY_DIAGONAL ? p->d_k : 1;

	if (p->kind->decay == DECAY_NONE)
		return NULL;
	if (p->kind->decay != DECAY_CONSTANT)
		return head_of(s, p, view, pair, 0, n_tokens, width);
	double *values = take(s, n_tokens);

	for (int64_t t = 0; s->status == STATUS_OK && t < n_tokens; t++)
		values[t] = log1p(-exp2(-5 - (double)pair.h));
	return values;
}

/* The problem of one pair. */
static struct reference_matrix matrix_of(struct scratch *s, const struct kernel_problem *p,
                                         struct pair pair, int64_t n_tokens, const struct view *q,
                                         const struct view *k, const struct view *v,
                                         const struct view *log_decay)
{
	return (struct reference_matrix){
	        .batch = 1,
	        .seq_len = n_tokens,
	        .n_heads = 1,
	        .d_k = p->d_k,
	        .d_v = p->d_v,
	        .decay = p->kind->decay == DECAY_CONSTANT ? DECAY_SCALAR : p->kind->decay,
	        .rule = p->kind->rule,
	        .scale = 1 / sqrt((double)p->d_k),
	        .q = head_of(s, p, q, pair, 0, n_tokens, p->d_k),
	        .k = head_of(s, p, k, pair, 0, n_tokens, p->d_k),
	        .v = head_of(s, p, v, pair, 0, n_tokens, p->d_v),
	        .log_decay = log_decay_of(s, p, log_decay, pair, n_tokens)};
}

static enum status expect_matrix(const struct kernel_problem *p, struct pair pair, int64_t n,
                                 const int64_t *rows, double *expected)
{
	const struct matrix_recurrence_args *a = &p->args.matrix;
	struct scratch s = {0};
	struct reference_matrix r =
	        matrix_of(&s, p, pair, p->seq_len, &a->q, &a->k, &a->v, &a->log_decay);

	if (a->rule == RULE_BONUS)
		r.bonus = floats_of(&s, p, a->bonus, pair.h * p->d_k, p->d_k);
	if (a->rule != RULE_DELTA) {
		if (s.status == STATUS_OK)
			s.status = reference_matrix_rows(&r, n, rows, expected);
		return finish(&s);
	}
	r.beta = head_of(&s, p, &a->beta, pair, 0, p->seq_len, 1);
	double *out = take(&s, p->seq_len * p->d_v);

	if (s.status == STATUS_OK)
		s.status = reference_matrix_forward(&r, out, NULL);
	for (int64_t i = 0; i < n && s.status == STATUS_OK; i++)
		memcpy(expected + i * p->d_v, out + rows[i] * p->d_v, (size_t)p->d_v * sizeof *out);
	return finish(&s);
}

enum status check_matrix(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	const struct matrix_recurrence_args *a = &p->args.matrix;
	struct pair pairs[MOST_PAIRS];
	const int n_pairs = pick_sequences(p->batch, p->n_heads, p->seq_len * p->d_v, seed, pairs);
	int64_t *list;
	const int64_t n = pick_rows(
	        p->seq_len,
	        rows_each(rows, n_pairs, 2.0 * (double)(p->d_k + p->d_v) * (double)p->seq_len),
	        seed, &list);
	bool known;
	enum status status = take_expected(p, n_pairs * n * p->d_v, &known);

	if (status == STATUS_OK && !list)
		status = status_set(STATUS_OOM, "no memory to verify with");
	for (int i = 0; i < n_pairs && status == STATUS_OK; i++) {
		double *expected = p->expected + i * n * p->d_v;

		if (!known)
			status = expect_matrix(p, pairs[i], n, list, expected);
		if (status == STATUS_OK)
			status = compare_rows(p, &a->out, pairs[i], n, list, p->d_v, expected,
			                      worst);
	}
	free(list);
	return status;
}

enum status keep_matrix_step(struct kernel_problem *p, uint64_t seed)
{
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, p->n_heads, STEP_PAIRS, seed, pairs);
	const int64_t size = p->d_k * p->d_v;
	enum status status = take_before(p, n * size);

	return status == STATUS_OK ? keep_floats(p, p->args.matrix_step.state, p->n_heads, size,
	                                         pairs, n, p->before)
	                           : status;
}

enum status check_matrix_step(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	const struct matrix_recurrence_step_args *a = &p->args.matrix_step;
	const int64_t size = p->d_k * p->d_v;
	struct pair pairs[STEP_PAIRS];
	const int n = pick_pairs(p->batch, p->n_heads, STEP_PAIRS, seed, pairs);
	enum status status = STATUS_OK;

	(void)rows;
	for (int i = 0; i < n && status == STATUS_OK; i++) {
		struct scratch s = {0};
		struct reference_matrix r =
		        matrix_of(&s, p, pairs[i], 1, &a->q, &a->k, &a->v, &a->log_decay);
		double *out = take(&s, p->d_v), *after = take(&s, size);

		r.h0 = p->before + i * size;
		if (s.status == STATUS_OK)
			s.status = reference_matrix_forward(&r, out, after);
		if (s.status == STATUS_OK)
			s.status = compare_head(p, &a->out, pairs[i], 0, 1, p->d_v, out, worst);
		if (s.status == STATUS_OK)
			s.status = compare_floats(p, a->state,
			                          (pairs[i].b * p->n_heads + pairs[i].h) * size,
			                          p->d_k, p->d_v, after, worst);
		status = finish(&s);
	}
	return status;
}

/* ---- products ---- */

/* y (and x_norm, with a norm) of some tokens. */
static enum status check_product(struct kernel_problem *p, const void *x, const float *norm_weight,
                                 const void *weight, const void *x_norm, const void *y,
                                 uint64_t seed, double *worst)
{
	const int64_t total = p->batch * p->seq_len, n = smaller(total, LINEAR_ROWS);
	const int64_t k = p->d_k, m = p->d_v;
	int64_t list[LINEAR_ROWS];
	struct scratch s = {0};
	double *in = take(&s, n * k), *normed = take(&s, n * k), *w = take(&s, k * m);
	double *expected = take(&s, n * m), *actual = take(&s, n * larger(k, m));

	verify_pick(total, n, seed, list);
	if (s.status == STATUS_OK)
		s.status = verify_download_rows(p->backend, x, k, 0, n, list, in);
	if (s.status == STATUS_OK)
		s.status = verify_download(p->backend, p->backend->activation, weight, 0, k * m, w);
	if (norm_weight) {
		const double *scale = floats_of(&s, p, norm_weight, 0, k);

		if (s.status == STATUS_OK) {
			reference_rms_norm(n, k, p->args.norm_linear.eps, in, scale, normed, NULL);
			s.status = verify_download_rows(p->backend, x_norm, k, 0, n, list, actual);
		}
		if (s.status == STATUS_OK)
			raise_to(worst, verify_worst_row(n, k, actual, normed));
	}
	if (s.status == STATUS_OK) {
		reference_linear(n, k, m, norm_weight ? normed : in, w, expected);
		s.status = verify_download_rows(p->backend, y, m, 0, n, list, actual);
	}
	if (s.status == STATUS_OK)
		raise_to(worst, verify_worst_row(n, m, actual, expected));
	return finish(&s);
}

enum status check_linear(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	const struct linear_residual_args *a = &p->args.linear;

	(void)rows;
	return check_product(p, a->x, NULL, a->weight, NULL, a->y, seed, worst);
}

enum status check_norm_linear(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst)
{
	const struct norm_linear_args *a = &p->args.norm_linear;

	(void)rows;
	return check_product(p, a->x, a->norm_weight, a->weight, a->x_norm, a->y, seed, worst);
}
