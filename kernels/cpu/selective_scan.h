/* What the forward and the backward pass of the selective scan share. */
#ifndef KERNELS_CPU_SELECTIVE_SCAN_H
#define KERNELS_CPU_SELECTIVE_SCAN_H

#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"

/* Channels of a task: a few vectors, whose states remain in cache. */
enum { SCAN_CHANNELS = 32 };

/* Blocks of channels, and the size of that from `first` on. */
static inline int64_t scan_blocks(const struct selective_scan_args *a)
{
	return (a->channels + SCAN_CHANNELS - 1) / SCAN_CHANNELS;
}

static inline int64_t scan_block_size(const struct selective_scan_args *a, int64_t first)
{
	return a->channels - first < SCAN_CHANNELS ? a->channels - first : SCAN_CHANNELS;
}

/* State before token SCAN_CHUNK * j of sequence b, [N, channels]. */
static inline float *scan_border(const struct selective_scan_args *a, int64_t b, int64_t j)
{
	const int64_t per_sequence = (a->seq_len + SCAN_CHUNK - 1) / SCAN_CHUNK;

	return a->borders + (b * per_sequence + j) * a->state * a->channels;
}

/* rate [N, SCAN_CHANNELS]: the negative rates of channels from `first` on. */
void scan_rates(const struct selective_scan_args *a, int64_t first, int64_t count, float *rate);

#endif
