/* One token per sequence: rotates q and k, fills the cache, attends to it. */
#include "kernels/portable/decode.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/rope.cuh"

/* Split 0 takes the new token itself, from its registers; that of the first head that reads the
 * key stores it in the cache. */
template <int D>
static __device__ __forceinline__ void
take_own_token(softmax_state &state, const float (&q)[8], const struct attention_step_args &a,
               const struct rope_table &table, int64_t b, int64_t h, int64_t position)
{
	const int lane = threadIdx.x % (D / 8);
	const int64_t readers = a.n_heads / a.kv_heads, kv = h / readers;
	const vector8 value = load8(at(a.v, b, 0, kv) + 8 * lane);
	float k[8], dot = 0.0f;

	load8(k, at(a.k, b, 0, kv) + 8 * lane);
	if (a.rope)
		rope_lanes(k, table, lane, (int)a.rope_width / 8, position);
	const vector8 key = pack8(k);
	unpack8(k, key);
#pragma unroll
	for (int i = 0; i < 8; i++)
		dot += q[i] * k[i];
	dot = group_sum(dot, D / 8);
	if (threadIdx.x >= D / 8)
		return;
	if (h % readers == 0) {
		const int64_t slot = position % a.kv_slots;

		*reinterpret_cast<vector8 *>(at(a.k_cache, b, slot, kv) + 8 * lane) = key;
		*reinterpret_cast<vector8 *>(at(a.v_cache, b, slot, kv) + 8 * lane) = value;
	}
	state.maximum = dot;
	state.sum = 1.0f;
	unpack8(state.o, value);
}

template <int D>
static __global__ void __launch_bounds__(DECODE_THREADS)
        attention_step_kernel(const __grid_constant__ struct attention_step_args a,
                              const __grid_constant__ struct rope_table table,
                              const __grid_constant__ struct decode_target target)
{
	const int64_t h = blockIdx.y, b = blockIdx.z, position = *a.position;
	const int64_t kv = h / (a.n_heads / a.kv_heads);
	const int64_t cached = a.window < 0 ? position : min(position, a.window);
	const int64_t part = divide_up(cached, target.splits), oldest = position - cached;
	const int64_t first = oldest + min(part * (int64_t)blockIdx.x, cached);
	const int64_t end = oldest + min(part * ((int64_t)blockIdx.x + 1), cached);
	const int lane = threadIdx.x % (D / 8);
	softmax_state state = softmax_empty();
	float q[8];

	load8(q, at(a.q, b, 0, h) + 8 * lane);
	if (a.rope)
		rope_lanes(q, table, lane, (int)a.rope_width / 8, position);
#pragma unroll
	for (int i = 0; i < 8; i++)
		q[i] *= a.scale * LOG2E;
	if (blockIdx.x == 0)
		take_own_token<D>(state, q, a, table, b, h, position);
	decode_range<D>(state, q, at(a.k_cache, b, 0, kv) + 8 * lane, a.k_cache.token,
	                at(a.v_cache, b, 0, kv) + 8 * lane, a.v_cache.token, first, end,
	                a.kv_slots);
	decode_finish<D>(target, state, a.n_heads, b, h, blockIdx.x);
}

static int64_t capacity(const struct attention_step_args *a)
{
	return a->window >= 0 && a->window < a->kv_slots ? a->window : a->kv_slots;
}

extern "C" const char *portable_attention_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);

	if (a->rope_width % 16 || a->rope_width & (a->rope_width - 1) || a->rope_width > a->d_head)
		return "columns that turn must be a power of two from 16 on";
	return either(check_heads(a->d_head, a->n_heads, a->batch),
	              check_aligned(&a->q, &a->k, &a->v, &a->k_cache, &a->v_cache, &a->out));
}

extern "C" size_t portable_attention_step_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);

	return decode_workspace(device, a->batch, a->n_heads, a->d_head, capacity(a));
}

template <int D>
static enum status run(struct device *device, const struct attention_step_args *a,
                       const decode_target &target)
{
	const dim3 grid((unsigned)target.splits, (unsigned)a->n_heads, (unsigned)a->batch);
	struct attention_step_args turned = *a;

	turned.rope_width = turned_width(a->rope_width, D);
	enum status status =
	        launch(device, "attention_step", attention_step_kernel<D>, grid, DECODE_THREADS,
	               decode_shared(D), turned, rope_table_of(turned.rope_width), target);

	return status != STATUS_OK ? status
	                           : decode_launch_merge<D>(device, "attention_step", target,
	                                                    a->batch, a->n_heads);
}

extern "C" enum status portable_attention_step(struct device *device, const void *args,
                                               void *workspace)
{
	const auto *a = static_cast<const struct attention_step_args *>(args);
	decode_target target = {};

	target.out = a->out;
	target.partial = static_cast<float *>(workspace);
	target.splits = decode_splits(device, a->batch, a->n_heads, capacity(a));
	return a->d_head == 64 ? run<64>(device, a, target) : run<128>(device, a, target);
}
