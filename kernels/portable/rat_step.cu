/* RAT's generation step: the running pair of the chunk, and attention to the finished chunks. */
#include "kernels/portable/decode.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/rope.cuh"

/* The running pair after this token, eight elements of it. */
struct running_pair {
	float k[8], v[8];
};

template <int D>
static __device__ __forceinline__ running_pair update(const struct rat_step_args &a, int64_t b,
                                                      int64_t h, int64_t position)
{
	const int column = threadIdx.x % (D / 8) * 8;
	const int64_t offset = (b * a.n_heads + h) * D + column;
	const bool keep = position % a.chunk != 0;
	running_pair pair;
	float gate[8], bias[8], k[8], v[8];

	load8(gate, at(a.gate, b, 0, h) + column);
	load8f(bias, a.gate_bias + h * D + column);
	load8(k, at(a.k, b, 0, h % a.groups) + column);
	load8(v, at(a.v, b, 0, h) + column);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float g = sigmoid(gate[i] + bias[i]);
		const float rest = sigmoid(-gate[i] - bias[i]);

		pair.k[i] = rest * k[i] + (keep ? g * a.k_state[offset + i] : 0.0f);
		pair.v[i] = rest * v[i] + (keep ? g * a.v_state[offset + i] : 0.0f);
	}
	return pair;
}

/* The first lanes of split 0 keep the running pair, and at a chunk's end store it as a key. */
template <int D>
static __device__ __forceinline__ void
keep_pair(const struct rat_step_args &a, const struct rope_table &table, const running_pair &pair,
          int64_t b, int64_t h, int64_t position)
{
	const int lane = threadIdx.x % (D / 8);
	const int64_t offset = (b * a.n_heads + h) * D + 8 * lane, slot = position / a.chunk;
	float k[8];

#pragma unroll
	for (int i = 0; i < 8; i++)
		k[i] = pair.k[i];
	if (a.rope)
		rope_lanes(k, table, lane, D / 8, slot);
	if (threadIdx.x >= D / 8)
		return;
	store8f(a.k_state + offset, pair.k);
	store8f(a.v_state + offset, pair.v);
	if (position % a.chunk != a.chunk - 1)
		return;
	store8(at(a.k_chunk, b, slot, h) + 8 * lane, k);
	store8(at(a.v_chunk, b, slot, h) + 8 * lane, pair.v);
}

/*
 * Split 0 updates the running pair and attends to it; own scores are not
 * rotated. Only what the first D / 8 lanes compute counts: the others may read
 * the state while it is being replaced.
 */
template <int D>
static __device__ __forceinline__ void
take_own_token(softmax_state &state, const float (&q)[8], const struct rat_step_args &a,
               const struct rope_table &table, int64_t b, int64_t h, int64_t position)
{
	const running_pair pair = update<D>(a, b, h, position);
	float dot = 0.0f;

	keep_pair<D>(a, table, pair, b, h, position);
#pragma unroll
	for (int i = 0; i < 8; i++)
		dot += q[i] * pair.k[i];
	dot = group_sum(dot, D / 8);
	if (threadIdx.x >= D / 8)
		return;
	state.maximum = dot;
	state.sum = 1.0f;
#pragma unroll
	for (int i = 0; i < 8; i++)
		state.o[i] = pair.v[i];
}

template <int D>
static __global__ void __launch_bounds__(DECODE_THREADS)
        rat_step_kernel(const __grid_constant__ struct rat_step_args a,
                        const __grid_constant__ struct rope_table table,
                        const __grid_constant__ struct decode_target target)
{
	const int64_t h = blockIdx.y, b = blockIdx.z, position = *a.position;
	const int64_t chunks = position / a.chunk, part = divide_up(chunks, target.splits);
	const int64_t first = min(part * (int64_t)blockIdx.x, chunks);
	const int64_t end = min(part * ((int64_t)blockIdx.x + 1), chunks);
	const int lane = threadIdx.x % (D / 8);
	softmax_state state = softmax_empty();
	float q[8];

	load8(q, at(a.q, b, 0, h % a.groups) + 8 * lane);
#pragma unroll
	for (int i = 0; i < 8; i++)
		q[i] *= a.scale * LOG2E;
	if (blockIdx.x == 0)
		take_own_token<D>(state, q, a, table, b, h, position);
	if (a.rope)
		rope_lanes(q, table, lane, D / 8, chunks);
	decode_range<D>(state, q, at(a.k_chunk, b, 0, h) + 8 * lane, a.k_chunk.token,
	                at(a.v_chunk, b, 0, h) + 8 * lane, a.v_chunk.token, first, end,
	                a.chunk_slots);
	decode_finish<D>(target, state, a.n_heads, b, h, blockIdx.x);
}

extern "C" const char *portable_rat_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct rat_step_args *>(args);

	return either(check_heads(a->d_head, a->n_heads, a->batch),
	              check_aligned(&a->z, &a->v, &a->gate, &a->q, &a->k, &a->k_chunk, &a->v_chunk,
	                            &a->out));
}

extern "C" size_t portable_rat_step_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct rat_step_args *>(args);

	return decode_workspace(device, a->batch, a->n_heads, a->d_head, a->chunk_slots);
}

template <int D>
static enum status run(struct device *device, const struct rat_step_args *a,
                       const decode_target &target)
{
	const dim3 grid((unsigned)target.splits, (unsigned)a->n_heads, (unsigned)a->batch);
	enum status status = launch(device, "rat_step", rat_step_kernel<D>, grid, DECODE_THREADS,
	                            decode_shared(D), *a, rope_table_of(D), target);

	return status != STATUS_OK
	               ? status
	               : decode_launch_merge<D>(device, "rat_step", target, a->batch, a->n_heads);
}

extern "C" enum status portable_rat_step(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct rat_step_args *>(args);
	decode_target target = {};

	target.out = a->out;
	target.gate = a->z;
	target.partial = static_cast<float *>(workspace);
	target.splits = decode_splits(device, a->batch, a->n_heads, a->chunk_slots);
	return a->d_head == 64 ? run<64>(device, a, target) : run<128>(device, a, target);
}
