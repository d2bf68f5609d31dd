#define _GNU_SOURCE
#include "baselines/cudnn/sdpa.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_backend.h"

enum id {
	ID_Q = 1,
	ID_K,
	ID_V,
	ID_OUT,
	ID_LSE,
	ID_SCALE,
	ID_QUERY_LENGTHS,
	ID_KEY_LENGTHS,
	ID_PADDING, /* what masked scores become; one number for each mask */
	ID_FUTURE,
	ID_PAST,
	ID_BOUND,
	ID_ONE,
	ID_DOUT,
	ID_DQ,
	ID_DK,
	ID_DV,
	ID_DQ_SUM,
	ID_DELTA
};

/* cuDNN before 9.10 wants masked scores to be the lowest number, later ones -infinity. */
enum { MINUS_INFINITY_SINCE = 91000 };

struct cached {
	struct sdpa_shape shape;
	struct graph_plan plan;
	char why[256]; /* there is no plan */
	struct cached *next;
};

/* What a device keeps. */
struct plans {
	struct cached *first;
};

void sdpa_strides(int64_t strides[3], const struct view *view)
{
	strides[0] = view->batch;
	strides[1] = view->token;
	strides[2] = view->head;
}

/* [B, heads, T, d] of a view. */
static struct graph_tensor tensor_of(struct graph *g, const struct sdpa_shape *s, int64_t heads,
                                     int64_t tokens, const int64_t strides[3], int64_t id)
{
	const int64_t dims[4] = {s->batch, heads, tokens, s->d_head};
	const int64_t steps[4] = {strides[0], strides[2], strides[1], 1};

	return graph_tensor(g, CUDNN_DATA_BFLOAT16, dims, steps, id);
}

static struct graph_tensor queries(struct graph *g, const struct sdpa_shape *s,
                                   const int64_t strides[3], int64_t id)
{
	return tensor_of(g, s, s->n_heads, s->seq_len, strides, id);
}

static struct graph_tensor keys(struct graph *g, const struct sdpa_shape *s,
                                const int64_t strides[3], int64_t id)
{
	return tensor_of(g, s, s->kv_heads, s->kv_len, strides, id);
}

/* [B, kv_heads, d, T]: keys, or values, as a product's right operand. */
static struct graph_tensor transposed(struct graph *g, const struct sdpa_shape *s,
                                      const int64_t strides[3], int64_t id)
{
	const int64_t dims[4] = {s->batch, s->kv_heads, s->d_head, s->kv_len};
	const int64_t steps[4] = {strides[0], strides[2], 1, strides[1]};

	return graph_tensor(g, CUDNN_DATA_BFLOAT16, dims, steps, id);
}

static struct graph_tensor lengths(struct graph *g, const struct sdpa_shape *s, int64_t id)
{
	const int64_t dims[4] = {s->batch, 1, 1, 1}, steps[4] = {1, 1, 1, 1};

	return graph_tensor(g, CUDNN_DATA_INT32, dims, steps, id);
}

static struct graph_tensor indices(struct graph *g, const struct graph_tensor *scores, int64_t axis,
                                   enum cudnn_data compute)
{
	return graph_pointwise(g, CUDNN_POINTWISE_GEN_INDEX, compute, CUDNN_DATA_INT32, axis,
	                       scores, NULL, NULL);
}

static struct graph_tensor compare(struct graph *g, enum cudnn_pointwise mode,
                                   const struct graph_tensor *a, const struct graph_tensor *b)
{
	return graph_pointwise(g, mode, CUDNN_DATA_BOOLEAN, CUDNN_DATA_BOOLEAN, -1, a, b, NULL);
}

/* Scores where `visible`, else the number called `id`. */
static struct graph_tensor keep(struct graph *g, const struct graph_tensor *scores,
                                const struct graph_tensor *visible, int64_t id)
{
	struct graph_tensor masked = graph_scalar(g, CUDNN_DATA_FLOAT, id);

	return graph_pointwise(g, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, CUDNN_DATA_FLOAT,
	                       -1, scores, &masked, visible);
}

/* Only the first lengths[b] queries and keys count. */
static struct graph_tensor mask_padding(struct graph *g, const struct graph_tensor *scores,
                                        const struct graph_tensor *query_lengths,
                                        const struct graph_tensor *key_lengths)
{
	struct graph_tensor row = indices(g, scores, 2, CUDNN_DATA_INT32);
	struct graph_tensor column = indices(g, scores, 3, CUDNN_DATA_INT32);
	struct graph_tensor in_row = compare(g, CUDNN_POINTWISE_CMP_LT, &row, query_lengths);
	struct graph_tensor in_column = compare(g, CUDNN_POINTWISE_CMP_LT, &column, key_lengths);
	struct graph_tensor both = compare(g, CUDNN_POINTWISE_LOGICAL_AND, &in_row, &in_column);

	return keep(g, scores, &both, ID_PADDING);
}

/* Keys up to the query: row >= column. */
static struct graph_tensor mask_future(struct graph *g, const struct graph_tensor *scores)
{
	struct graph_tensor row = indices(g, scores, 2, CUDNN_DATA_FLOAT);
	struct graph_tensor column = indices(g, scores, 3, CUDNN_DATA_FLOAT);
	struct graph_tensor visible = compare(g, CUDNN_POINTWISE_CMP_GE, &row, &column);

	return keep(g, scores, &visible, ID_FUTURE);
}

/* Keys less than `bound` before the query: column + bound > row. */
static struct graph_tensor mask_past(struct graph *g, const struct graph_tensor *scores)
{
	struct graph_tensor row = indices(g, scores, 2, CUDNN_DATA_FLOAT);
	struct graph_tensor column = indices(g, scores, 3, CUDNN_DATA_FLOAT);
	struct graph_tensor bound = graph_scalar(g, CUDNN_DATA_FLOAT, ID_BOUND);
	struct graph_tensor shifted = graph_pointwise(g, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT,
	                                              CUDNN_DATA_FLOAT, -1, &column, &bound, NULL);
	struct graph_tensor visible = compare(g, CUDNN_POINTWISE_CMP_GT, &shifted, &row);

	return keep(g, scores, &visible, ID_PAST);
}

/*
 * The probabilities, bf16, in the order of operations that cuDNN recognizes.
 * The logarithm is part of that even where nobody stores it.
 */
static struct graph_tensor softmax(struct graph *g, const struct sdpa_shape *s,
                                   const struct graph_tensor *scores)
{
	const enum cudnn_data f = CUDNN_DATA_FLOAT;
	const int64_t dims[4] = {s->batch, s->n_heads, s->seq_len, 1};
	const int64_t steps[4] = {s->n_heads * s->seq_len, s->seq_len, 1, 1};
	struct graph_tensor top = graph_reduce(g, CUDNN_REDUCE_MAX, scores);
	struct graph_tensor less =
	        graph_pointwise(g, CUDNN_POINTWISE_SUB, f, f, -1, scores, &top, NULL);
	struct graph_tensor terms =
	        graph_pointwise(g, CUDNN_POINTWISE_EXP, f, f, -1, &less, NULL, NULL);
	struct graph_tensor sum = graph_reduce(g, CUDNN_REDUCE_ADD, &terms);
	struct graph_tensor log =
	        graph_pointwise(g, CUDNN_POINTWISE_LOG, f, f, -1, &sum, NULL, NULL);

	if (s->stats) {
		struct graph_tensor lse = graph_tensor(g, f, dims, steps, ID_LSE);

		graph_pointwise_into(g, CUDNN_POINTWISE_ADD, f, -1, &top, &log, NULL, &lse);
	} else {
		graph_pointwise(g, CUDNN_POINTWISE_ADD, f, f, -1, &top, &log, NULL);
	}
	return graph_pointwise(g, CUDNN_POINTWISE_DIV, f, CUDNN_DATA_BFLOAT16, -1, &terms, &sum,
	                       NULL);
}

static void build_forward(struct graph *g, const struct sdpa_shape *s)
{
	struct graph_tensor q = queries(g, s, s->q, ID_Q);
	struct graph_tensor k = transposed(g, s, s->k, ID_K);
	struct graph_tensor v = keys(g, s, s->v, ID_V);
	struct graph_tensor out = queries(g, s, s->out, ID_OUT);
	struct graph_tensor scale = graph_scalar(g, CUDNN_DATA_FLOAT, ID_SCALE);
	struct graph_tensor query_lengths, key_lengths, *rows = NULL, *columns = NULL;

	if (s->padded) {
		query_lengths = lengths(g, s, ID_QUERY_LENGTHS);
		key_lengths = lengths(g, s, ID_KEY_LENGTHS);
		rows = &query_lengths;
		columns = &key_lengths;
	}
	struct graph_tensor scores = graph_product(g, &q, &k, rows, columns);
	scores = graph_pointwise(g, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, CUDNN_DATA_FLOAT, -1,
	                         &scores, &scale, NULL);
	if (s->padded)
		scores = mask_padding(g, &scores, rows, columns);
	if (s->mask != MASK_FULL)
		scores = mask_future(g, &scores);
	if (s->mask == MASK_WINDOW)
		scores = mask_past(g, &scores);
	struct graph_tensor p = softmax(g, s, &scores);
	graph_matmul(g, &p, &v, &out, rows, NULL, columns);
}

/* A number per query, [B, H, T, 1]. */
static struct graph_tensor per_query(struct graph *g, const struct sdpa_shape *s, int64_t id)
{
	const int64_t dims[4] = {s->batch, s->n_heads, s->seq_len, 1};
	const int64_t steps[4] = {s->n_heads * s->seq_len, s->seq_len, 1, 1};

	return graph_tensor(g, CUDNN_DATA_FLOAT, dims, steps, id);
}

/* delta = rowsum(dout * out), in memory because cuDNN computes it in a kernel of its own. */
static struct graph_tensor row_sums(struct graph *g, const struct sdpa_shape *s,
                                    const struct graph_tensor *dout)
{
	const enum cudnn_data f = CUDNN_DATA_FLOAT;
	struct graph_tensor out = queries(g, s, s->out, ID_OUT);
	struct graph_tensor one = graph_scalar(g, f, ID_ONE);
	struct graph_tensor delta = per_query(g, s, ID_DELTA);
	struct graph_tensor product =
	        graph_pointwise(g, CUDNN_POINTWISE_MUL, f, f, -1, dout, &out, NULL);
	struct graph_tensor sum = graph_reduce(g, CUDNN_REDUCE_ADD, &product);

	graph_pointwise_into(g, CUDNN_POINTWISE_MUL, f, -1, &sum, &one, NULL, &delta);
	return delta;
}

/* x^T right, where x [B, H, T, keys] is never stored; into `to`, summed over the heads that read
 * the same keys. */
static void multiply_transposed(struct graph *g, const struct sdpa_shape *s,
                                const struct graph_tensor *x, const struct graph_tensor *right,
                                const struct graph_tensor *to)
{
	const int64_t area = s->seq_len * s->kv_len;
	const int64_t dims[4] = {s->batch, s->n_heads, s->kv_len, s->seq_len};
	const int64_t steps[4] = {s->n_heads * area, area, 1, s->kv_len};
	struct graph_tensor left = graph_reshape(g, CUDNN_DATA_BFLOAT16, x, dims, steps);

	if (s->kv_heads == s->n_heads) {
		graph_matmul(g, &left, right, to, NULL, NULL, NULL);
		return;
	}
	const int64_t all[4] = {s->batch, s->n_heads, s->kv_len, s->d_head};
	struct graph_tensor apart = graph_virtual(g, CUDNN_DATA_BFLOAT16, all);
	graph_matmul(g, &left, right, &apart, NULL, NULL, NULL);
	graph_reduce_into(g, CUDNN_REDUCE_ADD, &apart, to);
}

/* The gradients, in the order of operations that cuDNN recognizes. */
static void build_backward(struct graph *g, const struct sdpa_shape *s)
{
	const enum cudnn_data f = CUDNN_DATA_FLOAT;
	const int64_t key_dims[4] = {s->batch, s->kv_heads, s->kv_len, s->d_head};
	const int64_t key_steps[4] = {s->k[0], s->k[2], s->k[1], 1};
	const int64_t dense[3] = {s->n_heads * s->seq_len * s->d_head, s->d_head,
	                          s->seq_len * s->d_head};
	const int64_t sum_dims[4] = {s->batch, s->n_heads, s->seq_len, s->d_head};
	const int64_t sum_steps[4] = {dense[0], dense[2], dense[1], 1};
	struct graph_tensor q = queries(g, s, s->q, ID_Q);
	struct graph_tensor k = transposed(g, s, s->k, ID_K), v = transposed(g, s, s->v, ID_V);
	struct graph_tensor dout = queries(g, s, s->dout, ID_DOUT);
	struct graph_tensor dq = queries(g, s, s->dq, ID_DQ);
	struct graph_tensor dk = keys(g, s, s->dk, ID_DK);
	struct graph_tensor dv = keys(g, s, s->dv, ID_DV);
	struct graph_tensor scale = graph_scalar(g, f, ID_SCALE);
	struct graph_tensor lse = per_query(g, s, ID_LSE);
	struct graph_tensor delta = row_sums(g, s, &dout);
	struct graph_tensor x = graph_product(g, &q, &k, NULL, NULL);

	x = graph_pointwise(g, CUDNN_POINTWISE_MUL, f, f, -1, &x, &scale, NULL);
	x = graph_pointwise(g, CUDNN_POINTWISE_SUB, f, f, -1, &x, &lse, NULL);
	if (s->mask != MASK_FULL)
		x = mask_future(g, &x);
	if (s->mask == MASK_WINDOW)
		x = mask_past(g, &x);
	struct graph_tensor p = graph_pointwise(g, CUDNN_POINTWISE_EXP, f, f, -1, &x, NULL, NULL);
	multiply_transposed(g, s, &p, &dout, &dv);
	x = graph_product(g, &dout, &v, NULL, NULL);
	x = graph_pointwise(g, CUDNN_POINTWISE_SUB, f, f, -1, &x, &delta, NULL);
	x = graph_pointwise(g, CUDNN_POINTWISE_MUL, f, f, -1, &x, &p, NULL);
	x = graph_pointwise(g, CUDNN_POINTWISE_MUL, f, f, -1, &x, &scale, NULL);
	multiply_transposed(g, s, &x, &q, &dk);
	struct graph_tensor k_rows = graph_reshape(g, CUDNN_DATA_BFLOAT16, &k, key_dims, key_steps);
	struct graph_tensor sum = graph_tensor(g, f, sum_dims, sum_steps, ID_DQ_SUM);
	graph_matmul(g, &x, &k_rows, &sum, NULL, NULL, NULL);
	graph_pointwise_into(g, CUDNN_POINTWISE_IDENTITY, f, -1, &sum, NULL, NULL, &dq);
}

/* A new entry, with a plan or the reason why there is none. */
static struct cached *make(struct plans *plans, const struct sdpa_shape *shape,
                           const struct cudnn_library *cudnn)
{
	struct cached *entry = calloc(1, sizeof *entry);
	struct graph graph;

	if (!entry)
		return NULL;
	entry->shape = *shape;
	graph_begin(&graph, cudnn);
	(shape->backward ? build_backward : build_forward)(&graph, shape);
	if (graph_plan(&graph, &entry->plan) != STATUS_OK)
		snprintf(entry->why, sizeof entry->why, "%s", status_message());
	graph_end(&graph);
	entry->next = plans->first;
	plans->first = entry;
	return entry;
}

static void release(void *memory)
{
	struct plans *plans = memory;

	while (plans->first) {
		struct cached *entry = plans->first;

		plans->first = entry->next;
		graph_plan_destroy(&entry->plan);
		free(entry);
	}
}

const struct graph_plan *sdpa_plan(const struct device *device, const struct sdpa_shape *shape,
                                   const char **why)
{
	/* Before the plans, so that it is closed after them. */
	const struct cudnn_library *cudnn = cudnn_library_get(device, why);

	if (!cudnn)
		return NULL;
	struct plans *plans = cuda_slot(device, sizeof *plans, release);
	struct cached *entry = plans ? plans->first : NULL;
	while (entry && memcmp(&entry->shape, shape, sizeof *shape) != 0)
		entry = entry->next;
	if (!entry && plans)
		entry = make(plans, shape, cudnn);
	*why = entry ? entry->why : "no memory for a cuDNN plan";
	return entry && entry->plan.plan ? &entry->plan : NULL;
}

/* One tensor of a run. */
struct pack {
	int count;
	int64_t ids[GRAPH_MAX_INPUTS];
	void *pointers[GRAPH_MAX_INPUTS];
};

static void add(struct pack *pack, int64_t id, const void *pointer)
{
	pack->ids[pack->count] = id;
	memcpy(&pack->pointers[pack->count++], &pointer, sizeof pointer);
}

enum status sdpa_run(struct device *device, const struct sdpa_shape *shape,
                     const struct sdpa_tensors *t, void *workspace)
{
	const char *why;
	const struct graph_plan *plan = sdpa_plan(device, shape, &why);
	const bool infinite = cudnn_library_version(device) >= MINUS_INFINITY_SINCE;
	const float masked = infinite ? -INFINITY : -FLT_MAX;
	const float bound = (float)(shape->window + 1), one = 1.0f;
	struct pack pack = {0};

	if (!plan)
		return status_set(STATUS_UNSUPPORTED, "%s", why);
	add(&pack, ID_Q, t->q);
	add(&pack, ID_K, t->k);
	add(&pack, ID_V, t->v);
	add(&pack, ID_OUT, t->out);
	add(&pack, ID_SCALE, &t->scale);
	if (shape->stats || shape->backward)
		add(&pack, ID_LSE, t->lse);
	if (shape->backward) {
		add(&pack, ID_ONE, &one);
		add(&pack, ID_DOUT, t->dout);
		add(&pack, ID_DQ, t->dq);
		add(&pack, ID_DK, t->dk);
		add(&pack, ID_DV, t->dv);
		add(&pack, ID_DQ_SUM, t->dq_sum);
		add(&pack, ID_DELTA, t->delta);
	}
	if (shape->padded) {
		add(&pack, ID_QUERY_LENGTHS, t->query_lengths);
		add(&pack, ID_KEY_LENGTHS, t->key_lengths);
		add(&pack, ID_PADDING, &masked);
	}
	if (shape->mask != MASK_FULL)
		add(&pack, ID_FUTURE, &masked);
	if (shape->mask == MASK_WINDOW) {
		add(&pack, ID_PAST, &masked);
		add(&pack, ID_BOUND, &bound);
	}
	return graph_run(plan, pack.count, pack.ids, pack.pointers, workspace);
}
