#include "kernels/cpu/block_product.h"

#include <stdbool.h>
#include <string.h>

/* A tile keeps ROWS x VECTORS accumulators in registers. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum { VECTORS = 2 };

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

/* One product: what every tile of it shares. */
struct product {
	int64_t k;
	struct block a;
	const float *b;
	int64_t b_row;
	bool add;
	const float *keep;
	float *c;
	int64_t c_row;
};

static inline vec load(const float *from)
{
	vec x;

	memcpy(&x, from, sizeof x);
	return x;
}

/* What is already in row i of C, where it counts. */
static inline vec initial(const struct product *p, int64_t i, const float *c)
{
	if (!p->add)
		return (vec){0};
	return p->keep ? p->keep[i] * load(c) : load(c);
}

/* The tile at (i, j), rows x vectors: constants, so that the accumulators become registers. */
static inline __attribute__((always_inline)) void tile(const struct product *p, int64_t i,
                                                       int64_t j, const int rows, const int vectors)
{
	const float *a = p->a.data + i * p->a.row, *b = p->b + j;
	float *c = p->c + i * p->c_row + j;
	int64_t k = p->k, a_row = p->a.row, a_column = p->a.column, b_row = p->b_row;
	vec sum[ROWS][VECTORS];

	for (int r = 0; r < rows; r++)
		for (int v = 0; v < vectors; v++)
			sum[r][v] = initial(p, i + r, c + r * p->c_row + v * LANES);
	for (int64_t x = 0; x < k; x++, a += a_column, b += b_row) {
		vec b_vec[VECTORS];

		for (int v = 0; v < vectors; v++)
			b_vec[v] = load(b + v * LANES);
		for (int r = 0; r < rows; r++)
			for (int v = 0; v < vectors; v++)
				sum[r][v] += a[r * a_row] * b_vec[v];
	}
	for (int r = 0; r < rows; r++)
		for (int v = 0; v < vectors; v++)
			memcpy(c + r * p->c_row + v * LANES, &sum[r][v], sizeof sum[r][v]);
}

static void column_of_tiles(const struct product *p, int64_t m, int64_t j, int vectors)
{
	int64_t i = 0;

	for (; i + ROWS <= m; i += ROWS)
		if (vectors == VECTORS)
			tile(p, i, j, ROWS, VECTORS);
		else
			tile(p, i, j, ROWS, 1);
	for (; i < m; i++)
		if (vectors == VECTORS)
			tile(p, i, j, 1, VECTORS);
		else
			tile(p, i, j, 1, 1);
}

/* Columns first .. n, fewer than a vector. */
static void last_columns(const struct product *p, int64_t m, int64_t first, int64_t n)
{
	for (int64_t i = 0; i < m; i++) {
		const float *a = p->a.data + i * p->a.row;
		float *c = p->c + i * p->c_row;

		for (int64_t j = first; j < n; j++) {
			float sum = p->add ? (p->keep ? p->keep[i] * c[j] : c[j]) : 0.0f;

			for (int64_t x = 0; x < p->k; x++)
				sum += a[x * p->a.column] * p->b[x * p->b_row + j];
			c[j] = sum;
		}
	}
}

static void run(const struct product *p, int64_t m, int64_t n)
{
	int64_t j = 0;

	for (; j + VECTORS * LANES <= n; j += VECTORS * LANES)
		column_of_tiles(p, m, j, VECTORS);
	for (; j + LANES <= n; j += LANES)
		column_of_tiles(p, m, j, 1);
	if (j < n)
		last_columns(p, m, j, n);
}

void block_product(int64_t m, int64_t n, int64_t k, struct block a, const float *b, int64_t b_row,
                   float *c, int64_t c_row)
{
	run(&(struct product){k, a, b, b_row, false, NULL, c, c_row}, m, n);
}

void block_product_add(int64_t m, int64_t n, int64_t k, struct block a, const float *b,
                       int64_t b_row, const float *keep, float *c, int64_t c_row)
{
	run(&(struct product){k, a, b, b_row, true, keep, c, c_row}, m, n);
}
