/* Cuts a kernel's workspace into arrays of floats; without memory it only counts. */
#ifndef KERNELS_CPU_SCRATCH_H
#define KERNELS_CPU_SCRATCH_H

#include <stddef.h>
#include <stdint.h>

struct scratch_arena {
	float *memory; /* NULL: only count */
	size_t used;   /* floats */
};

/* The next `count` floats, on a cache line of their own; NULL without memory. */
static inline float *scratch_take(struct scratch_arena *arena, int64_t count)
{
	float *start = arena->memory ? arena->memory + arena->used : NULL;

	arena->used += ((size_t)count + 15) / 16 * 16;
	return start;
}

#endif
