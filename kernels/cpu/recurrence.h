/* What the forward and the backward pass of the linear recurrence share. */
#ifndef KERNELS_CPU_RECURRENCE_H
#define KERNELS_CPU_RECURRENCE_H

#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"

/* h_t = decay * h_{t-1} + input * x_t. */
struct gate_pair {
	float decay, input;
};

/* Both factors of a sigmoid gate; 1 - g without cancellation. */
static inline struct gate_pair sigmoid_gate(float logit)
{
	float e = exp_f32(-logit);
	float g = 1.0f / (1.0f + e);

	return (struct gate_pair){g, e * g};
}

/*
 * How many blocks a row of `width` channels is cut into so that batch * blocks
 * tasks fill the threads evenly; blocks are multiples of 64 channels, whole
 * cache lines, unless one block is all.
 */
int64_t channel_blocks(int64_t batch, int64_t width);

/* First channel of block `block` of `n_blocks`; the end of the row for block n_blocks. */
int64_t channel_block_start(int64_t width, int64_t n_blocks, int64_t block);

#endif
