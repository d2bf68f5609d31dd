/* Before another library's decode: rotation, the cache, and how much of it there is. */
#include "baselines/cudnn/step.h"
#include "kernels/portable/rope.cuh"

enum { THREADS = 128 };

/* d / 8 neighbouring lanes take one head of one sequence, and its key and value if it is the first
 * that reads them. */
template <int D>
static __global__ void __launch_bounds__(THREADS)
        cudnn_step_kernel(const __grid_constant__ struct attention_step_args a,
                          const __grid_constant__ struct rope_table table, bf16 *q_out,
                          int32_t *query_lengths, int32_t *key_lengths)
{
	const int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / (D / 8);
	const bool valid = row < a.batch * a.n_heads;
	const int64_t b = valid ? row / a.n_heads : 0, h = valid ? row % a.n_heads : 0;
	const int64_t position = *a.position, slot = position % a.kv_slots;
	const int64_t readers = a.n_heads / a.kv_heads, kv = h / readers;
	const int lane = threadIdx.x % (D / 8);
	float q[8], k[8], v[8];

	load8(q, at(a.q, b, 0, h) + 8 * lane);
	load8(k, at(a.k, b, 0, kv) + 8 * lane);
	load8(v, at(a.v, b, 0, kv) + 8 * lane);
	if (a.rope) {
		rope_lanes(q, table, lane, D / 8, position);
		rope_lanes(k, table, lane, D / 8, position);
	}
	if (!valid)
		return;
	store8(q_out + row * D + 8 * lane, q);
	if (h % readers == 0) {
		store8(at(a.k_cache, b, slot, kv) + 8 * lane, k);
		store8(at(a.v_cache, b, slot, kv) + 8 * lane, v);
	}
	if (lane == 0 && h == 0 && key_lengths) {
		query_lengths[b] = 1;
		key_lengths[b] = (int32_t)(a.window < 0 ? position : min(position, a.window)) + 1;
	}
}

extern "C" enum status cudnn_step_prepare(struct device *device,
                                          const struct attention_step_args *a, void *q_out,
                                          int32_t *query_lengths, int32_t *key_lengths)
{
	const int64_t threads = a->batch * a->n_heads * (a->d_head / 8);

	return launch(device, "attention_step",
	              a->d_head == 64 ? cudnn_step_kernel<64> : cudnn_step_kernel<128>,
	              dim3((unsigned)divide_up(threads, THREADS)), THREADS, 0, *a,
	              rope_table_of(a->d_head), static_cast<bf16 *>(q_out), query_lengths,
	              key_lengths);
}
