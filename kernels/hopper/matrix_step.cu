/*
 * One token of the matrix-state recurrence, every decay and rule: the fp32
 * state is read once and written once.
 *
 * A block takes 4 * LANES columns of one head's state, all rows of them. Each thread
 * asks for its HELD rows of 16 bytes before anything else, so that the
 * block's whole slice is under way while q, k and the decays are prepared in shared
 * memory. The delta rule needs the column sums k S before it can write a row,
 * and has the rows still in registers.
 *
 * Limit: memory. 0.522 ms for 512 sequences of 4 heads, 256 x 512 (1.98 GHz); a copy of as many
 * bytes takes 0.507. docs/kernels/matrix_step.md.
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int MAX_ROWS = 1024; /* of a state: what fits in shared memory */

/* What a row of the state is multiplied by; `extra` is q k, times the bonus where there is one. */
struct coefficients {
	float decay, key, query, extra;
};

__device__ __forceinline__ float bf16_at(const struct view &v, int64_t b, int64_t h, int64_t i)
{
	return __bfloat162float(
	        static_cast<const __nv_bfloat16 *>(v.data)[b * v.batch + h * v.head + i]);
}

template <enum rule RULE>
__device__ __forceinline__ coefficients
row_coefficients(const struct matrix_recurrence_step_args &a, int64_t b, int64_t h, int i)
{
	coefficients c = {1.0f, bf16_at(a.k, b, h, i), a.scale * bf16_at(a.q, b, h, i), 0.0f};

	if (a.decay == DECAY_CONSTANT)
		c.decay = 1.0f - exp2f(-5.0f - static_cast<float>(h));
	else if (a.decay != DECAY_NONE)
		c.decay = __expf(bf16_at(a.log_decay, b, h, a.decay == DECAY_DIAGONAL ? i : 0));
	if (RULE == RULE_BONUS)
		c.extra = c.query * c.key * a.bonus[h * a.d_k + i];
	else if (RULE == RULE_DELTA)
		c.extra = c.query * c.key;
	return c;
}

__device__ __forceinline__ void add_scaled(float4 &sum, float factor, const float4 &x)
{
	sum.x = fmaf(factor, x.x, sum.x);
	sum.y = fmaf(factor, x.y, sum.y);
	sum.z = fmaf(factor, x.z, sum.z);
	sum.w = fmaf(factor, x.w, sum.w);
}

__device__ __forceinline__ float4 scaled(float factor, const float4 &x)
{
	return {factor * x.x, factor * x.y, factor * x.z, factor * x.w};
}

/* The sum over the block's groups of lanes, for every thread; `scratch` holds one per thread. */
template <int THREADS, int LANES>
__device__ __forceinline__ float4 sum_groups(float4 mine, float4 *scratch)
{
	float4 sum = {};

	scratch[threadIdx.x] = mine;
	__syncthreads();
#pragma unroll
	for (int i = 0; i < THREADS / LANES; i++)
		add_scaled(sum, 1.0f, scratch[i * LANES + threadIdx.x % LANES]);
	__syncthreads();
	return sum;
}

/* Rows first .. first + HELD * GROUPS - 1, this thread's of them. */
template <int GROUPS, int HELD>
__device__ __forceinline__ void load_rows(float4 (&s)[HELD], const float *state, int first, int d_k,
                                          int64_t d_v, bool valid)
{
#pragma unroll
	for (int r = 0; r < HELD; r++) {
		s[r] = {};
		if (valid && first + r * GROUPS < d_k)
			s[r] = *reinterpret_cast<const float4 *>(state +
			                                         (first + r * GROUPS) * d_v);
	}
}

template <int THREADS, int LANES, int HELD, enum rule RULE>
__global__ void __launch_bounds__(THREADS)
        step_kernel(const __grid_constant__ struct matrix_recurrence_step_args a)
{
	constexpr int GROUPS = THREADS / LANES;
	extern __shared__ float4 step_memory[];
	float4 *scratch = step_memory;
	coefficients *rows = reinterpret_cast<coefficients *>(step_memory + THREADS);
	const int64_t h = blockIdx.y, b = blockIdx.z;
	const int d_k = static_cast<int>(a.d_k), group = threadIdx.x / LANES;
	const int64_t column = (blockIdx.x * LANES + threadIdx.x % LANES) * 4;
	const bool valid = column < a.d_v;
	float *state = a.state + (b * a.n_heads + h) * a.d_k * a.d_v + column;
	float4 s[HELD], v = {}, o = {}, correction = {};
	float extra = 0.0f;

	load_rows<GROUPS, HELD>(s, state, group, d_k, a.d_v, valid);
	if (valid) {
		const uint2 pair = *reinterpret_cast<const uint2 *>(
		        static_cast<const __nv_bfloat16 *>(a.v.data) + b * a.v.batch +
		        h * a.v.head + column);

		v = {low_bf16(pair.x), high_bf16(pair.x), low_bf16(pair.y), high_bf16(pair.y)};
	}
	for (int i = threadIdx.x; i < d_k; i += THREADS)
		rows[i] = row_coefficients<RULE>(a, b, h, i);
	__syncthreads();
	if (RULE == RULE_DELTA) {
#pragma unroll
		for (int r = 0; r < HELD; r++) {
			if (group + r * GROUPS >= d_k)
				break;
			const coefficients c = rows[group + r * GROUPS];

			s[r] = scaled(c.decay, s[r]);
			add_scaled(correction, -c.key, s[r]);
			add_scaled(o, c.query, s[r]);
		}
		for (int i = 0; i < d_k; i++)
			extra += rows[i].extra;
		correction = sum_groups<THREADS, LANES>(correction, scratch);
		add_scaled(correction, 1.0f, v);
		v = scaled(bf16_at(a.beta, b, h, 0), correction);
	}
	for (int first = group; first < d_k; first += HELD * GROUPS) {
		if (RULE != RULE_DELTA && first != group)
			load_rows<GROUPS, HELD>(s, state, first, d_k, a.d_v, valid);
#pragma unroll
		for (int r = 0; r < HELD; r++) {
			const int i = first + r * GROUPS;

			if (!valid || i >= d_k)
				break;
			const coefficients c = rows[i];

			if (RULE == RULE_BONUS) {
				add_scaled(o, c.query, s[r]);
				add_scaled(o, c.extra, v);
			}
			if (RULE != RULE_DELTA)
				s[r] = scaled(c.decay, s[r]);
			add_scaled(s[r], c.key, v);
			if (RULE == RULE_PLAIN)
				add_scaled(o, c.query, s[r]);
			*reinterpret_cast<float4 *>(state + i * a.d_v) = s[r];
		}
	}
	o = sum_groups<THREADS, LANES>(o, scratch);
	if (RULE == RULE_DELTA)
		add_scaled(o, extra, v);
	if (group == 0 && valid)
		*reinterpret_cast<uint2 *>(static_cast<__nv_bfloat16 *>(a.out.data) +
		                           b * a.out.batch + h * a.out.head + column) =
		        make_uint2(pack_bf16(o.x, o.y), pack_bf16(o.z, o.w));
}

template <int THREADS, int LANES, int HELD, enum rule RULE>
enum status launch_step(struct device *device, const struct matrix_recurrence_step_args *a)
{
	const dim3 grid(static_cast<unsigned>((a->d_v + 4 * LANES - 1) / (4 * LANES)),
	                static_cast<unsigned>(a->n_heads), static_cast<unsigned>(a->batch));
	const size_t bytes = (THREADS + static_cast<size_t>(a->d_k)) * sizeof(float4);

	step_kernel<THREADS, LANES, HELD, RULE><<<grid, THREADS, bytes, cuda_stream(device)>>>(*a);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

/* 256 threads of 16 columns' lanes: 16 rows at a time, as many of them held as there are. */
template <enum rule RULE>
enum status run_step(struct device *device, const struct matrix_recurrence_step_args *a)
{
	if (a->d_k <= 64)
		return launch_step<256, 16, 4, RULE>(device, a);
	if (a->d_k <= 128)
		return launch_step<256, 16, 8, RULE>(device, a);
	return launch_step<256, 16, 16, RULE>(device, a);
}

} // namespace

extern "C" const char *hopper_matrix_recurrence_step_unsupported(const struct device *device,
                                                                 const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_step_args *>(args);

	if (!is_known_decay(a->decay))
		return "an unknown decay";
	if (!is_known_rule(a->rule))
		return "an unknown rule";
	if (a->d_v % 4 || a->d_k > (a->rule == RULE_DELTA ? 256 : MAX_ROWS))
		return "d_v must be a multiple of 4, d_k at most 1024, 256 under the delta rule";
	if (a->batch > 65535 || a->n_heads > 65535)
		return "more than 65535 sequences or heads";
	if (reinterpret_cast<uintptr_t>(a->state) % 16)
		return "the state must be 16-byte aligned";
	return check_views(device, &a->v, &a->out);
}

extern "C" enum status hopper_matrix_recurrence_step(struct device *device, const void *args,
                                                     void *)
{
	const auto *a = static_cast<const struct matrix_recurrence_step_args *>(args);

	switch (a->rule) {
	case RULE_BONUS:
		return run_step<RULE_BONUS>(device, a);
	case RULE_DELTA:
		return run_step<RULE_DELTA>(device, a);
	default:
		return run_step<RULE_PLAIN>(device, a);
	}
}
