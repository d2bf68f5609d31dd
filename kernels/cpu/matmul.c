/*
 * Why not BLAS's own threads: they and OpenMP's wait by spinning, on the same cores. At 4096 x 512
 * x 1536 on two cores, with an OpenMP loop before each product as in a layer, OpenBLAS 0.3.21
 * reached 286 GFLOP/s with its threads, 444 with one call per OpenMP thread. The threads' blocks of
 * the result are disjoint: no sum is split, and runs repeat to the bit.
 */
#include "kernels/cpu/matmul.h"

#include <cblas.h>
#include <omp.h>

enum {
	TILE = 16,         /* edges of blocks are multiples of it, to suit the micro-kernels */
	MAX_GEMV_ROWS = 4, /* up to 4 rows, reading B for each is cheaper than packing it */
	MIN_PARALLEL_WORK = 1 << 16 /* multiply-adds worth waking the other threads for */
};

/* The threads' blocks: a grid of `rows` by `columns` over the result. */
struct grid {
	int rows, columns;
};

/* Each thread packs m/rows rows of A and n/columns columns of B: the grid with the least of both.
 */
static struct grid choose_grid(int64_t m, int64_t n, int n_threads)
{
	struct grid best = {n_threads, 1};
	double least = -1;

	for (int rows = 1; rows <= n_threads; rows++) {
		if (n_threads % rows != 0)
			continue;
		int columns = n_threads / rows;
		bool fits = m >= (int64_t)rows * TILE || rows == 1;
		double packed = (double)m / rows + (double)n / columns;

		if (fits && (least < 0 || packed < least)) {
			least = packed;
			best = (struct grid){rows, columns};
		}
	}
	return best;
}

/* Where part `index` of `parts` begins in `extent`. */
static int64_t part_begin(int64_t extent, int parts, int index)
{
	int64_t tiles = (extent + TILE - 1) / TILE;
	int64_t begin = tiles * index / parts * TILE;

	return begin < extent ? begin : extent;
}

struct product {
	bool transpose_a, transpose_b;
	int64_t m, n, k;
	const float *a, *b;
	float beta;
	float *c;
};

/* Rows m0..m1 and columns n0..n1 of the result, on one thread. */
static void multiply_block(const struct product *p, int64_t m0, int64_t m1, int64_t n0, int64_t n1)
{
	const float *a = p->a + (p->transpose_a ? m0 : m0 * p->k);
	const float *b = p->b + (p->transpose_b ? n0 * p->k : n0);
	float *c = p->c + m0 * p->n + n0;

	if (m1 == m0 || n1 == n0)
		return;
	if (p->transpose_b && !p->transpose_a && p->m <= MAX_GEMV_ROWS) {
		for (int64_t i = 0; i < m1 - m0; i++)
			cblas_sgemv(CblasRowMajor, CblasNoTrans, (blasint)(n1 - n0), (blasint)p->k,
			            1, b, (blasint)p->k, a + i * p->k, 1, p->beta, c + i * p->n, 1);
		return;
	}
	cblas_sgemm(CblasRowMajor, p->transpose_a ? CblasTrans : CblasNoTrans,
	            p->transpose_b ? CblasTrans : CblasNoTrans, (blasint)(m1 - m0),
	            (blasint)(n1 - n0), (blasint)p->k, 1, a,
	            (blasint)(p->transpose_a ? p->m : p->k), b,
	            (blasint)(p->transpose_b ? p->k : p->n), p->beta, c, (blasint)p->n);
}

void cpu_matmul(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float *a,
                const float *b, float beta, float *c)
{
	struct product product = {transpose_a, transpose_b, m, n, k, a, b, beta, c};
	bool parallel = (double)m * (double)n * (double)k >= MIN_PARALLEL_WORK;

#pragma omp parallel if (parallel)
	{
		struct grid grid = choose_grid(m, n, omp_get_num_threads());
		int row = omp_get_thread_num() / grid.columns;
		int column = omp_get_thread_num() % grid.columns;

		multiply_block(&product, part_begin(m, grid.rows, row),
		               part_begin(m, grid.rows, row + 1),
		               part_begin(n, grid.columns, column),
		               part_begin(n, grid.columns, column + 1));
	}
}
