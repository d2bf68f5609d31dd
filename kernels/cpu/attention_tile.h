/*
 * What the tiled attention kernels share: the register-blocked product, the
 * vector exponential, the lists of keys and the range of each that a query sees.
 *
 * A panel is a small matrix whose rows are PANEL floats, aligned to a vector.
 * The `lanes` of a panel are the queries (forward) or the keys (backward), so
 * that every reduction of the softmax is a lane-by-lane operation.
 */
#ifndef KERNELS_CPU_ATTENTION_TILE_H
#define KERNELS_CPU_ATTENTION_TILE_H

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

#include "kernels/key_lists.h"

/* The product keeps ROWS x VECTORS accumulators; they must fit the registers. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum { VECTORS = 2, PANEL = VECTORS * LANES };

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(float))));

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

static inline int64_t min_i64(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static inline int64_t max_i64(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

static inline int64_t round_up(int64_t n, int64_t multiple)
{
	return (n + multiple - 1) / multiple * multiple;
}

/* Keys come in lists, whose numbers are those of tokens except with MASK_DILATED (key_lists.h). */
static inline int n_key_lists(const struct attention_args *a)
{
	return a->mask == MASK_DILATED ? N_KEY_LISTS : 1;
}

/* How many of tokens 0 .. end-1 are on the list. */
static inline int64_t list_length(const struct attention_args *a, enum key_list list, int64_t end)
{
	return a->mask == MASK_DILATED ? keys_before(list, a->dilation, a->initial, end) : end;
}

/* The token of a key's number. */
static inline int64_t list_token(const struct attention_args *a, enum key_list list, int64_t key)
{
	return a->mask == MASK_DILATED ? key_token(list, a->dilation, a->initial, key) : key;
}

/* Keys first .. end-1 of the list are visible to query t. Both grow with t. */
static inline int64_t first_key(const struct attention_args *a, enum key_list list, int64_t t)
{
	if (a->mask == MASK_DILATED)
		return list == KEYS_KEPT ? 0 : list_length(a, list, max_i64(t - a->window, 0));
	return a->mask == MASK_WINDOW ? max_i64(t - a->window, 0) : 0;
}

static inline int64_t end_key(const struct attention_args *a, enum key_list list, int64_t t)
{
	switch (a->mask) {
	case MASK_DILATED:
		return list_length(a, list, min_i64(t + 1, a->kv_len));
	case MASK_CHUNK:
		return min_i64(t / a->chunk, a->kv_len);
	case MASK_FULL:
		return a->kv_len;
	default:
		return min_i64(t + 1, a->kv_len);
	}
}

/* A plain loop is how C spells a maximum of vectors; gcc makes it one instruction. */
static inline vec max_vec(vec a, vec b)
{
	vec r = a;

	for (int i = 0; i < LANES; i++)
		r[i] = a[i] > b[i] ? a[i] : b[i];
	return r;
}

static inline vec splat(float x)
{
	return x + (vec){0};
}

/* x where the lane of `drop` is 0, else 0. */
static inline vec clear_lanes(vec x, ivec drop)
{
	return (vec)((ivec)x & ~drop);
}

/* 2^x for x < 128, to 2 ulp: Cephes' polynomial on [-1/2, 1/2]; 0 below -126, NaN for NaN. */
static inline vec exp2_vec(vec x)
{
	/* Adding 1.5 * 2^23 + 127 leaves the biased exponent in the low bits. */
	const float magic = 12582912.0f + 127.0f;
	vec t = x + magic;
	vec r = x - (t - magic);
	vec p = splat(1.535336188e-4f);

	p = p * r + 1.339887440e-3f;
	p = p * r + 9.618437358e-3f;
	p = p * r + 5.550332471e-2f;
	p = p * r + 2.402264791e-1f;
	p = p * r + 6.931472029e-1f;
	p = p * r + 1.0f;
	vec scale = (vec)((ivec)t << 23);
	return clear_lanes(p * scale, x < -126.0f);
}

/*
 * acc += A B: A[i][k] is a[i * row + k * step], i < ROWS, k < n; B is a panel of n rows.
 * The functions that call it are noinline: within a larger function gcc spills acc.
 */
static inline void multiply(vec acc[ROWS][VECTORS], int64_t n, const float *a, int64_t row,
                            int64_t step, const float *b)
{
	for (int64_t k = 0; k < n; k++) {
		vec b_row[VECTORS];

		for (int j = 0; j < VECTORS; j++)
			b_row[j] = *(const vec *)(b + k * PANEL + j * LANES);
		for (int i = 0; i < ROWS; i++) {
			float x = a[i * row + k * step];

			for (int j = 0; j < VECTORS; j++)
				acc[i][j] += x * b_row[j];
		}
	}
}

static inline void load_rows(vec acc[ROWS][VECTORS], const float *c)
{
	for (int i = 0; i < ROWS; i++)
		for (int j = 0; j < VECTORS; j++)
			acc[i][j] = *(const vec *)(c + i * PANEL + j * LANES);
}

static inline void store_rows(vec acc[ROWS][VECTORS], float *c)
{
	for (int i = 0; i < ROWS; i++)
		for (int j = 0; j < VECTORS; j++)
			*(vec *)(c + i * PANEL + j * LANES) = acc[i][j];
}

/* A row of d floats, times factor, becomes a lane of a panel; row NULL: zeros. */
static inline void pack_lane(float *panel, int64_t lane, const float *row, int64_t d, float factor)
{
	for (int64_t i = 0; row && i < d; i++)
		panel[i * PANEL + lane] = row[i] * factor;
	for (int64_t i = 0; !row && i < d; i++)
		panel[i * PANEL + lane] = 0.0f;
}

/*
 * Transposes n rows of d floats, `stride` apart, times factor, into a panel of
 * d rows whose lanes from n on are zero.
 */
static inline void pack_transposed(float *panel, const float *rows, int64_t stride, int64_t n,
                                   int64_t d, float factor)
{
	for (int64_t lane = 0; lane < PANEL; lane++)
		pack_lane(panel, lane, lane < n ? rows + lane * stride : NULL, d, factor);
}

#endif
