/* What lies between the products of chunkwise linear attention: decays, the causal mask, and the
 * recurrence from chunk to chunk. Every step reads and writes memory: nothing is fused. */
#include "baselines/cublas/chunkwise.h"
#include "kernels/portable/device.cuh"

/* AHEAD: chunks that a thread of the scan reads before it needs them. */
enum { THREADS = 256, AHEAD = 8, STATES = 4 };

static __global__ void __launch_bounds__(THREADS)
        sum_decays_kernel(const __grid_constant__ struct matrix_recurrence_args a, int64_t chunk,
                          float *decay)
{
	const int64_t chunks = divide_up(a.seq_len, chunk);
	const int64_t item = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t h = item % a.n_heads, c = item / a.n_heads % chunks,
	              b = item / a.n_heads / chunks;
	float sum = 0.0f;

	if (b >= a.batch)
		return;
	for (int64_t t = c * chunk; t < min((c + 1) * chunk, a.seq_len); t++) {
		sum += a.decay == DECAY_SCALAR ? __bfloat162float(*at(a.log_decay, b, t, h))
		                               : log1pf(-exp2f(-5.0f - (float)h));
		decay[(h * a.batch + b) * a.seq_len + t] = sum;
	}
}

static __global__ void __launch_bounds__(THREADS)
        scale_kernel(const __grid_constant__ struct view x, int64_t batch, int64_t seq_len,
                     int64_t head, int64_t width, int64_t chunk, bool to_end, const float *decay,
                     bf16 *to)
{
	const int64_t vectors = width / 8;
	const int64_t item = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t row = item / vectors, i = item % vectors * 8;
	const int64_t b = row / seq_len, t = row % seq_len;
	float values[8];

	if (b >= batch)
		return;
	const int64_t last = min((t / chunk + 1) * chunk, seq_len) - 1;
	const float *const d = decay + b * seq_len;
	const float factor = expf(to_end ? d[last] - d[t] : d[t]);

	load8(values, at(x, b, t, head) + i);
#pragma unroll
	for (int j = 0; j < 8; j++)
		values[j] *= factor;
	store8(to + row * width + i, values);
}

static __global__ void __launch_bounds__(THREADS)
        mask_kernel(int64_t count, int64_t rows, int64_t stride, const float *decay,
                    int64_t decay_stride, bf16 *scores)
{
	const int64_t vectors = stride / 8;
	const int64_t item = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t row = item / vectors, first = item % vectors * 8;
	const int64_t m = row / rows, i = row % rows;
	float values[8];

	if (m >= count)
		return;
	bf16 *const place = scores + row * stride + first;
	load8(values, place);
#pragma unroll
	for (int j = 0; j < 8; j++) {
		if (first + j > i)
			values[j] = 0.0f;
		else if (decay)
			values[j] *= expf(decay[m * decay_stride + i] -
			                  decay[m * decay_stride + first + j]);
	}
	store8(place, values);
}

/* Four elements of the state of one sequence and head, chunk after chunk. */
static __global__ void __launch_bounds__(THREADS)
        scan_kernel(const __grid_constant__ struct matrix_recurrence_args a, int64_t chunk,
                    const float *decay, bf16 *states)
{
	const int64_t size = a.d_k * a.d_v, chunks = divide_up(a.seq_len, chunk);
	const int64_t item = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t sequence = item / (size / STATES), i = item % (size / STATES) * STATES;
	const int64_t h = sequence / a.batch, b = sequence % a.batch;
	const int64_t whole = (b * a.n_heads + h) * size + i;
	float state[STATES] = {};

	if (h >= a.n_heads)
		return;
	bf16 *const place = states + sequence * chunks * size + i;
	for (int j = 0; j < STATES && a.h0; j++)
		state[j] = a.h0[whole + j];
	for (int64_t c = 0; c < chunks; c += AHEAD) {
		uint2 added[AHEAD];

#pragma unroll
		for (int k = 0; k < AHEAD; k++)
			if (c + k < chunks)
				added[k] = *reinterpret_cast<const uint2 *>(place + (c + k) * size);
#pragma unroll
		for (int k = 0; k < AHEAD; k++) {
			if (c + k >= chunks)
				break;
			const int64_t last = min((c + k + 1) * chunk, a.seq_len) - 1;
			const float factor =
			        decay ? expf(decay[sequence * a.seq_len + last]) : 1.0f;
			const float x[STATES] = {low_half(added[k].x), high_half(added[k].x),
			                         low_half(added[k].y), high_half(added[k].y)};

			*reinterpret_cast<uint2 *>(place + (c + k) * size) =
			        make_uint2(pack(state[0], state[1]), pack(state[2], state[3]));
#pragma unroll
			for (int j = 0; j < STATES; j++)
				state[j] = factor * state[j] + x[j];
		}
	}
	for (int j = 0; j < STATES && a.final_state; j++)
		a.final_state[whole + j] = state[j];
}

extern "C" enum status chunkwise_sum_decays(struct device *device,
                                            const struct matrix_recurrence_args *a, int64_t chunk,
                                            float *decay)
{
	return launch_each(device, "matrix_recurrence", sum_decays_kernel,
	                   a->batch * a->n_heads * divide_up(a->seq_len, chunk), THREADS, *a, chunk,
	                   decay);
}

extern "C" enum status chunkwise_scale(struct device *device,
                                       const struct matrix_recurrence_args *a, const struct view *x,
                                       int64_t head, int64_t width, int64_t chunk, bool to_end,
                                       const float *decay, void *to)
{
	return launch_each(device, "matrix_recurrence", scale_kernel,
	                   a->batch * a->seq_len * width / 8, THREADS, *x, a->batch, a->seq_len,
	                   head, width, chunk, to_end, decay, static_cast<bf16 *>(to));
}

extern "C" enum status chunkwise_mask(struct device *device, int64_t count, int64_t rows,
                                      int64_t stride, const float *decay, int64_t decay_stride,
                                      void *scores)
{
	return launch_each(device, "matrix_recurrence", mask_kernel, count * rows * stride / 8,
	                   THREADS, count, rows, stride, decay, decay_stride,
	                   static_cast<bf16 *>(scores));
}

extern "C" enum status chunkwise_scan(struct device *device, const struct matrix_recurrence_args *a,
                                      int64_t chunk, const float *decay, void *states)
{
	return launch_each(device, "matrix_recurrence", scan_kernel,
	                   a->batch * a->n_heads * a->d_k * a->d_v / STATES, THREADS, *a, chunk,
	                   decay, static_cast<bf16 *>(states));
}
