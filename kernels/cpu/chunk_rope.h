/* RAT's rotary embedding: its positions are chunk indices. */
#ifndef KERNELS_CPU_CHUNK_ROPE_H
#define KERNELS_CPU_CHUNK_ROPE_H

#include <stdint.h>

/*
 * table [count, d]: row c holds cos and then sin of (first + c) theta_i, i < d/2,
 * theta_i = 10000^(-2i/d), from angles in double. d even.
 */
void chunk_rope_table(int64_t d, int64_t first, int64_t count, float *table);

/* (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), rotate-half; `row` of a table, or NULL: a copy.
 * to may be from. */
void chunk_rope_rotate(int64_t d, const float *row, const float *from, float *to);

/* The inverse rotation, which is also the gradient. */
void chunk_rope_unrotate(int64_t d, const float *row, const float *from, float *to);

#endif
