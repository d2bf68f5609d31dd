/* One query's attention to keys and values in a cache, which is read once. */
#ifndef KERNELS_CPU_ONLINE_SOFTMAX_H
#define KERNELS_CPU_ONLINE_SOFTMAX_H

#include "kernels/kernels.h"

/* The softmax so far: the result is out / total, both relative to exp(max). */
struct online_softmax {
	float max, total;
	float *out; /* [d] */
};

/* One head of one sequence of a cache, [B, slots, H, d]. */
struct cached_head {
	int64_t b, h, d;
	const struct view *k, *v;
};

/* Adds slots first .. end-1 with the scores scale * q.k. */
void online_softmax_add(struct online_softmax *softmax, const struct cached_head *cache,
                        const float *q, float scale, int64_t first, int64_t end);

#endif
