/* What the reference of the host and that of the device have in common: neither judges the other.
 */
#ifndef KERNELS_REFERENCE_COMMON_H
#define KERNELS_REFERENCE_COMMON_H

#include <math.h>

#include "kernels/kernels.h"

#ifdef __CUDACC__
#define REFERENCE_FUNCTION static inline __host__ __device__
#else
#define REFERENCE_FUNCTION static inline
#endif

REFERENCE_FUNCTION double *at(const struct view *v, int64_t b, int64_t t, int64_t h)
{
	return (double *)v->data + b * v->batch + t * v->token + h * v->head;
}

/* A contiguous [B, n_tokens, n_heads, d] tensor. */
REFERENCE_FUNCTION struct view contiguous(double *data, int64_t n_tokens, int64_t n_heads,
                                          int64_t d)
{
	const struct view view = {data, n_tokens * n_heads * d, n_heads * d, d};

	return view;
}

/* Accurate at both ends. */
REFERENCE_FUNCTION double sigmoid(double x)
{
	return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

REFERENCE_FUNCTION int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

REFERENCE_FUNCTION int64_t larger(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

/* The key and value head that head h reads. */
REFERENCE_FUNCTION int64_t attention_kv_head(const struct attention_args *a, int64_t h)
{
	return h / (a->n_heads / a->kv_heads);
}

/* The keys lo .. hi among which query t sees some. */
REFERENCE_FUNCTION void visible_keys(const struct attention_args *a, int64_t t, int64_t *lo,
                                     int64_t *hi)
{
	*lo = a->mask == MASK_WINDOW ? larger(0, t - a->window) : 0;
	*hi = smaller(a->mask == MASK_FULL    ? a->kv_len
	              : a->mask == MASK_CHUNK ? t / a->chunk
	                                      : t + 1,
	              a->kv_len);
}

/* Whether query t sees key s, one of the keys that visible_keys() names. */
REFERENCE_FUNCTION bool is_visible(const struct attention_args *a, int64_t t, int64_t s)
{
	return a->mask != MASK_DILATED || t - s <= a->window || s < a->initial ||
	       (a->dilation > 0 && (s + 1) % a->dilation == 0);
}

/* The queries lo .. hi of which some see key s. */
REFERENCE_FUNCTION void seeing_queries(const struct attention_args *a, int64_t s, int64_t *lo,
                                       int64_t *hi)
{
	const int64_t first = a->mask == MASK_FULL    ? 0
	                      : a->mask == MASK_CHUNK ? (s + 1) * a->chunk
	                                              : s;

	*hi = a->mask == MASK_WINDOW ? smaller(s + a->window + 1, a->seq_len) : a->seq_len;
	*lo = smaller(first, *hi);
}

/* The key whose gradient is computed beside the query of token t (struct device, rows): the token's
 * own, or its chunk; -1 if there is none. */
REFERENCE_FUNCTION int64_t attention_key_of_row(const struct attention_args *a, int64_t t)
{
	const int64_t key = a->mask == MASK_CHUNK ? t / a->chunk : t;

	return key < a->kv_len ? key : -1;
}

/* Keys of the rows, each once, into keys [rows->count]; how many. */
static inline int64_t attention_keys_of_rows(const struct attention_args *a,
                                             const struct row_list *rows, int64_t *keys)
{
	int64_t count = 0;

	for (int64_t i = 0; i < rows->count; i++) {
		const int64_t key = attention_key_of_row(a, rows->rows[i]);

		if (key >= 0 && (count == 0 || keys[count - 1] != key))
			keys[count++] = key;
	}
	return count;
}

/* Row i of A_t, the decay of a head's state. */
REFERENCE_FUNCTION double decay_of(const struct matrix_recurrence_args *m, int64_t b, int64_t t,
                                   int64_t h, int64_t i)
{
	switch (m->decay) {
	case DECAY_CONSTANT:
		return 1 - exp2(-5 - (double)(m->first_head + h));
	case DECAY_SCALAR:
		return exp(*at(&m->log_decay, b, t, h));
	case DECAY_DIAGONAL:
		return exp(at(&m->log_decay, b, t, h)[i]);
	default:
		return 1;
	}
}

#endif
