#include "kernels/cpu/chunk_rope.h"

#include <math.h>
#include <string.h>

enum { BLOCK_ROWS = 64 };

/* One column pair of n rows: exact at the first, then turned by theta row by row; in double the
 * error of 64 turns is far below an ulp of the floats. */
static void fill_column(int64_t d, int64_t i, int64_t first, int64_t n, float *table)
{
	double theta = pow(10000.0, -2.0 * (double)i / (double)d);
	double c = cos((double)first * theta), s = sin((double)first * theta);
	double turn_c = cos(theta), turn_s = sin(theta);

	for (int64_t row = 0; row < n; row++) {
		double next = c * turn_c - s * turn_s;

		table[row * d + i] = (float)c;
		table[row * d + d / 2 + i] = (float)s;
		s = s * turn_c + c * turn_s;
		c = next;
	}
}

void chunk_rope_table(int64_t d, int64_t first, int64_t count, float *table)
{
#pragma omp parallel for schedule(static) if (count > BLOCK_ROWS)
	for (int64_t start = 0; start < count; start += BLOCK_ROWS) {
		int64_t n = count - start < BLOCK_ROWS ? count - start : BLOCK_ROWS;

		for (int64_t i = 0; i < d / 2; i++)
			fill_column(d, i, first + start, n, table + start * d);
	}
}

static void rotate(int64_t d, const float *row, const float *from, float *to, float sign)
{
	int64_t half = d / 2;

	if (!row) {
		if (to != from)
			memcpy(to, from, sizeof *to * (size_t)d);
		return;
	}
#pragma omp simd
	for (int64_t i = 0; i < half; i++) {
		float x1 = from[i], x2 = from[half + i], c = row[i], s = sign * row[half + i];

		to[i] = x1 * c - x2 * s;
		to[half + i] = x2 * c + x1 * s;
	}
}

void chunk_rope_rotate(int64_t d, const float *row, const float *from, float *to)
{
	rotate(d, row, from, to, 1);
}

void chunk_rope_unrotate(int64_t d, const float *row, const float *from, float *to)
{
	rotate(d, row, from, to, -1);
}
