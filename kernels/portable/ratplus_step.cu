/*
 * RAT+'s generation step: the running pair of the recurrence, and attention to the kept tokens and
 * the ring of recent ones. Blocks share the tokens of one head as if the two caches were one, kept
 * tokens first; the first of them, split 0, updates the running pair, stores it and attends to it.
 *
 * Limit: memory, the visible part of the caches, read once.
 */
#include "kernels/key_lists.h"
#include "kernels/portable/decode.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/rope.cuh"

/* The running pair after this token, eight elements of it. */
struct running_pair {
	float k[8], v[8];
};

/* What the token sees beside itself: kept tokens older than the window, and those within it. */
struct seen {
	int64_t kept, recent;
};

static __device__ __forceinline__ struct seen seen_from(const struct ratplus_step_args &a,
                                                        int64_t position)
{
	const int64_t recent = min(position, a.window);

	return {keys_before(KEYS_KEPT, a.dilation, a.initial, position - recent), recent};
}

template <int D>
static __device__ __forceinline__ running_pair update(const struct ratplus_step_args &a, int64_t b,
                                                      int64_t h, int64_t position)
{
	const int column = threadIdx.x % (D / 8) * 8;
	const int64_t offset = (b * a.n_heads + h) * D + column;
	const bool keep = position > 0;
	running_pair pair;
	float gate[8], k[8], v[8];

	load8(gate, at(a.gate, b, 0, h) + column);
	load8(k, at(a.k, b, 0, h) + column);
	load8(v, at(a.v, b, 0, h) + column);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float g = sigmoid(gate[i]), rest = sigmoid(-gate[i]);

		pair.k[i] = rest * k[i] + (keep ? g * a.k_state[offset + i] : 0.0f);
		pair.v[i] = rest * v[i] + (keep ? g * a.v_state[offset + i] : 0.0f);
	}
	return pair;
}

/* To a cache's slot, eight elements of a lane. */
static __device__ __forceinline__ void store_slot(const struct view &k_cache,
                                                  const struct view &v_cache, int64_t b,
                                                  int64_t slot, int64_t h, int column,
                                                  const float (&k)[8], const float (&v)[8])
{
	store8(at(k_cache, b, slot, h) + column, k);
	store8(at(v_cache, b, slot, h) + column, v);
}

/* The first lanes of split 0 keep the running pair and, its key rotated, store it in the caches. */
template <int D>
static __device__ __forceinline__ void keep_pair(const struct ratplus_step_args &a,
                                                 const running_pair &pair, const float (&k)[8],
                                                 int64_t b, int64_t h, int64_t position)
{
	const int column = 8 * (threadIdx.x % (D / 8));
	const int64_t offset = (b * a.n_heads + h) * D + column;

	if (threadIdx.x >= D / 8)
		return;
	store8f(a.k_state + offset, pair.k);
	store8f(a.v_state + offset, pair.v);
	store_slot(a.k_recent, a.v_recent, b, position % a.recent_slots, h, column, k, pair.v);
	if (is_kept(a.dilation, a.initial, position))
		store_slot(a.k_kept, a.v_kept, b,
		           keys_before(KEYS_KEPT, a.dilation, a.initial, position), h, column, k,
		           pair.v);
}

/*
 * Split 0 updates the running pair and attends to it. Only what the first D / 8 lanes compute
 * counts: the others may read the state while it is being replaced.
 */
template <int D>
static __device__ __forceinline__ void
take_own_token(softmax_state &state, const float (&q)[8], const struct ratplus_step_args &a,
               const struct rope_table &table, int64_t b, int64_t h, int64_t position)
{
	const running_pair pair = update<D>(a, b, h, position);
	float k[8], dot = 0.0f;

#pragma unroll
	for (int i = 0; i < 8; i++)
		k[i] = pair.k[i];
	if (a.rope)
		rope_lanes(k, table, threadIdx.x % (D / 8), D / 8, position);
	keep_pair<D>(a, pair, k, b, h, position);
#pragma unroll
	for (int i = 0; i < 8; i++)
		dot += q[i] * k[i];
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
        ratplus_step_kernel(const __grid_constant__ struct ratplus_step_args a,
                            const __grid_constant__ struct rope_table table,
                            const __grid_constant__ struct decode_target target)
{
	const int64_t h = blockIdx.y, b = blockIdx.z, position = *a.position;
	const struct seen seen = seen_from(a, position);
	const int64_t all = seen.kept + seen.recent, part = divide_up(all, target.splits);
	const int64_t first = min(part * (int64_t)blockIdx.x, all);
	const int64_t end = min(part * ((int64_t)blockIdx.x + 1), all);
	/* The ring's tokens are numbered on from the last kept one. */
	const int64_t ring = position - seen.recent - seen.kept;
	const int column = threadIdx.x % (D / 8) * 8;
	softmax_state state = softmax_empty();
	float q[8];

	load8(q, at(a.q, b, 0, h) + column);
	if (a.rope)
		rope_lanes(q, table, column / 8, D / 8, position);
#pragma unroll
	for (int i = 0; i < 8; i++)
		q[i] *= a.scale * LOG2E;
	if (blockIdx.x == 0)
		take_own_token<D>(state, q, a, table, b, h, position);
	if (first < seen.kept)
		decode_range<D>(state, q, at(a.k_kept, b, 0, h) + column, a.k_kept.token,
		                at(a.v_kept, b, 0, h) + column, a.v_kept.token, first,
		                min(end, seen.kept), a.kept_slots);
	if (end > seen.kept)
		decode_range<D>(state, q, at(a.k_recent, b, 0, h) + column, a.k_recent.token,
		                at(a.v_recent, b, 0, h) + column, a.v_recent.token,
		                max(first, seen.kept) + ring, end + ring, a.recent_slots);
	decode_finish<D>(target, state, a.n_heads, b, h, blockIdx.x);
}

/* The most tokens that a step may see beside its own. */
static int64_t capacity(const struct ratplus_step_args *a)
{
	return a->kept_slots + (a->window < a->recent_slots ? a->window : a->recent_slots);
}

extern "C" const char *portable_ratplus_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct ratplus_step_args *>(args);

	return either(check_heads(a->d_head, a->n_heads, a->batch),
	              check_aligned(&a->z, &a->q, &a->k, &a->v, &a->gate, &a->k_kept, &a->v_kept,
	                            &a->k_recent, &a->v_recent, &a->out));
}

extern "C" size_t portable_ratplus_step_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct ratplus_step_args *>(args);

	return decode_workspace(device, a->batch, a->n_heads, a->d_head, capacity(a));
}

template <int D>
static enum status run(struct device *device, const struct ratplus_step_args *a,
                       const decode_target &target)
{
	const dim3 grid((unsigned)target.splits, (unsigned)a->n_heads, (unsigned)a->batch);
	enum status status = launch(device, "ratplus_step", ratplus_step_kernel<D>, grid,
	                            DECODE_THREADS, decode_shared(D), *a, rope_table_of(D), target);

	return status != STATUS_OK ? status
	                           : decode_launch_merge<D>(device, "ratplus_step", target,
	                                                    a->batch, a->n_heads);
}

extern "C" enum status portable_ratplus_step(struct device *device, const void *args,
                                             void *workspace)
{
	const auto *a = static_cast<const struct ratplus_step_args *>(args);
	decode_target target = {};

	target.out = a->out;
	target.gate = a->z;
	target.partial = static_cast<float *>(workspace);
	target.splits = decode_splits(device, a->batch, a->n_heads, capacity(a));
	return a->d_head == 64 ? run<64>(device, a, target) : run<128>(device, a, target);
}
