/*
 * Attention of one query per sequence and head to a cache, as used by the
 * steps of attention and RAT. A row of D elements is spread over D / 8 lanes;
 * each such group of lanes walks its own keys with an online softmax of its
 * own, and the groups are merged at the end. Long caches are split over
 * blocks, whose partial results a second kernel merges.
 */
#ifndef KERNELS_PORTABLE_DECODE_CUH
#define KERNELS_PORTABLE_DECODE_CUH

#include "kernels/portable/device.cuh"

enum { DECODE_THREADS = 128, DECODE_KEYS = 4, DECODE_MIN_SPLIT = 128 };

/* A softmax under way: eight elements of sum_s p_s v_s, the scores' maximum (times log2 e) and
 * sum_s p_s. */
struct softmax_state {
	float maximum, sum, o[8];
};

/* Everything about a decode but where its query and own token come from. */
struct decode_target {
	struct view out;  /* [B, 1, H, d] */
	struct view gate; /* logits, or data NULL */
	float *partial;   /* [B, H, splits, d + 2], used iff splits > 1 */
	int splits;
};

/* Number of parts in which to cut caches of `capacity` keys so that the device is busy. */
static inline int decode_splits(const struct device *device, int64_t batch, int64_t n_heads,
                                int64_t capacity)
{
	const int64_t wanted = divide_up(8 * (int64_t)cuda_sm_count(device), batch * n_heads);
	const int64_t most = divide_up(capacity, DECODE_MIN_SPLIT);

	return (int)(wanted < most ? wanted : most > 1 ? most : 1);
}

static inline size_t decode_workspace(const struct device *device, int64_t batch, int64_t n_heads,
                                      int64_t d_head, int64_t capacity)
{
	const int splits = decode_splits(device, batch, n_heads, capacity);

	return splits == 1
	               ? 0
	               : (size_t)(batch * n_heads * splits) * (size_t)(d_head + 2) * sizeof(float);
}

/* Adds the softmax `other` to `state`. */
static __device__ __forceinline__ void softmax_merge(softmax_state &state,
                                                     const softmax_state &other)
{
	const float top = fmaxf(state.maximum, other.maximum);
	const float base = top == -INFINITY ? 0.0f : top;
	const float mine = exp2_fast(state.maximum - base),
	            theirs = exp2_fast(other.maximum - base);

	state.maximum = top;
	state.sum = state.sum * mine + other.sum * theirs;
#pragma unroll
	for (int i = 0; i < 8; i++)
		state.o[i] = state.o[i] * mine + other.o[i] * theirs;
}

static __device__ __forceinline__ softmax_state softmax_empty()
{
	softmax_state state = {-INFINITY, 0.0f, {}};

	return state;
}

/* The scores of DECODE_KEYS keys join the softmax together. */
static __device__ __forceinline__ void softmax_add(softmax_state &state,
                                                   const float (&score)[DECODE_KEYS],
                                                   const vector8 (&value)[DECODE_KEYS])
{
	float top = state.maximum;

#pragma unroll
	for (int i = 0; i < DECODE_KEYS; i++)
		top = fmaxf(top, score[i]);
	const float base = top == -INFINITY ? 0.0f : top;
	const float shrink = exp2_fast(state.maximum - base);

	state.maximum = top;
	state.sum *= shrink;
#pragma unroll
	for (int j = 0; j < 8; j++)
		state.o[j] *= shrink;
#pragma unroll
	for (int i = 0; i < DECODE_KEYS; i++) {
		const float p = exp2_fast(score[i] - base);
		float v[8];

		unpack8(v, value[i]);
		state.sum += p;
#pragma unroll
		for (int j = 0; j < 8; j++)
			state.o[j] += p * v[j];
	}
}

/*
 * Attends to the cache's tokens first .. end-1, token t in slot t % slots
 * (end - first <= slots). k and v point at this lane's eight elements of slot
 * 0, q holds the same elements times scale and log2 e.
 */
template <int D>
static __device__ __forceinline__ void
decode_range(softmax_state &state, const float (&q)[8], const bf16 *k, int64_t k_stride,
             const bf16 *v, int64_t v_stride, int64_t first, int64_t end, int64_t slots)
{
	constexpr int GROUPS = DECODE_THREADS / (D / 8);
	const int group = threadIdx.x / (D / 8);
	const int64_t first_slot = first % slots, count = end - first;

	for (int64_t i = 0; i < count; i += GROUPS * DECODE_KEYS) {
		vector8 key[DECODE_KEYS], value[DECODE_KEYS];
		float score[DECODE_KEYS];

#pragma unroll
		for (int j = 0; j < DECODE_KEYS; j++) {
			const int64_t token = min(i + GROUPS * j + group, count - 1);
			const int64_t slot = first_slot + token < slots
			                             ? first_slot + token
			                             : first_slot + token - slots;

			key[j] = load8(k + slot * k_stride);
			value[j] = load8(v + slot * v_stride);
		}
#pragma unroll
		for (int j = 0; j < DECODE_KEYS; j++) {
			float x[8], dot = 0.0f;

			unpack8(x, key[j]);
#pragma unroll
			for (int e = 0; e < 8; e++)
				dot += q[e] * x[e];
			dot = group_sum(dot, D / 8);
			score[j] = i + GROUPS * j + group < count ? dot : -INFINITY;
		}
		softmax_add(state, score, value);
	}
}

/* Merges the block's groups; the result is in its first D / 8 lanes. */
template <int D> static __device__ __forceinline__ void decode_merge(softmax_state &state)
{
	float *shared = reinterpret_cast<float *>(shared_memory);
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

	for (int offset = WARP / 2; offset >= D / 8; offset /= 2) {
		softmax_state other;

		other.maximum = __shfl_xor_sync(0xffffffffu, state.maximum, offset);
		other.sum = __shfl_xor_sync(0xffffffffu, state.sum, offset);
#pragma unroll
		for (int i = 0; i < 8; i++)
			other.o[i] = __shfl_xor_sync(0xffffffffu, state.o[i], offset);
		softmax_merge(state, other);
	}
	if (lane < D / 8) {
		float *to = shared + (warp * (D / 8) + lane) * 10;

		to[0] = state.maximum;
		to[1] = state.sum;
		for (int i = 0; i < 8; i++)
			to[2 + i] = state.o[i];
	}
	__syncthreads();
	for (int w = 1; w < DECODE_THREADS / WARP; w++) {
		const float *from = shared + (w * (D / 8) + lane % (D / 8)) * 10;
		softmax_state other = {from[0], from[1], {}};

		for (int i = 0; i < 8; i++)
			other.o[i] = from[2 + i];
		if (warp == 0)
			softmax_merge(state, other);
	}
}

/* Stores a finished softmax: o / sum, gated where there is a gate. */
static __device__ __forceinline__ void decode_store(const decode_target &target,
                                                    const softmax_state &state, int64_t b,
                                                    int64_t h, int column)
{
	float o[8], z[8];

#pragma unroll
	for (int i = 0; i < 8; i++)
		o[i] = state.o[i] / state.sum;
	if (target.gate.data) {
		load8(z, at(target.gate, b, 0, h) + column);
#pragma unroll
		for (int i = 0; i < 8; i++)
			o[i] *= sigmoid(z[i]);
	}
	store8(at(target.out, b, 0, h) + column, o);
}

/* The end of a decode kernel: merges the block, stores the result or this split's part of it. */
template <int D>
static __device__ __forceinline__ void decode_finish(const decode_target &target,
                                                     softmax_state &state, int64_t n_heads,
                                                     int64_t b, int64_t h, int split)
{
	const int lane = threadIdx.x;

	decode_merge<D>(state);
	if (lane >= D / 8)
		return;
	if (target.splits == 1) {
		decode_store(target, state, b, h, 8 * lane);
		return;
	}
	float *partial =
	        target.partial + ((b * n_heads + h) * target.splits + split) * (int64_t)(D + 2);
	for (int i = 0; i < 8; i++)
		partial[8 * lane + i] = state.o[i];
	if (lane == 0) {
		partial[D] = state.maximum;
		partial[D + 1] = state.sum;
	}
}

/* Merges the splits; D / 8 lanes per head. */
template <int D>
static __global__ void __launch_bounds__(DECODE_THREADS)
        decode_merge_kernel(const __grid_constant__ decode_target target, int64_t batch,
                            int64_t n_heads)
{
	const int64_t row = ((int64_t)blockIdx.x * DECODE_THREADS + threadIdx.x) / (D / 8);
	const int lane = threadIdx.x % (D / 8);
	softmax_state state = softmax_empty();

	if (row >= batch * n_heads)
		return;
	for (int split = 0; split < target.splits; split++) {
		const float *from = target.partial + (row * target.splits + split) * (D + 2);
		softmax_state other = {from[D], from[D + 1], {}};

		load8f(other.o, from + 8 * lane);
		softmax_merge(state, other);
	}
	decode_store(target, state, row / n_heads, row % n_heads, 8 * lane);
}

/* Bytes of dynamic shared memory that a decode kernel needs. */
static inline size_t decode_shared(int64_t d_head)
{
	return DECODE_THREADS / WARP * (size_t)(d_head / 8) * 10 * sizeof(float);
}

template <int D>
static enum status decode_launch_merge(struct device *device, const char *operation,
                                       const decode_target &target, int64_t batch, int64_t n_heads)
{
	const dim3 grid((unsigned)divide_up(batch * n_heads * (D / 8), DECODE_THREADS));

	if (target.splits == 1)
		return STATUS_OK;
	return launch(device, operation, decode_merge_kernel<D>, grid, DECODE_THREADS, 0, target,
	              batch, n_heads);
}

#endif
