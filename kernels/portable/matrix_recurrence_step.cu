/*
 * One token of the matrix-state recurrence: the state is read, updated and
 * multiplied by q in one pass. A block takes 64 columns of one head's state:
 * 16 lanes of 4 columns, 16 rows at a time.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 256, LANES = 16, GROUPS = THREADS / LANES, COLUMNS = 4 * LANES, UNROLL = 4 };

/* The factor of row i of the state. */
static __device__ __forceinline__ float decay_of(const struct matrix_recurrence_step_args &a,
                                                 int64_t b, int64_t h, int64_t i)
{
	if (a.decay == DECAY_NONE)
		return 1.0f;
	if (a.decay == DECAY_CONSTANT)
		return 1.0f - exp2f(-5.0f - (float)h);
	return __expf(
	        __bfloat162float(at(a.log_decay, b, 0, h)[a.decay == DECAY_DIAGONAL ? i : 0]));
}

/* The sum over the block's groups of lanes, for the lanes of the first. */
static __device__ __forceinline__ float4 sum_groups(float4 mine)
{
	float4 *shared = reinterpret_cast<float4 *>(shared_memory);
	float4 sum = {};

	shared[threadIdx.x] = mine;
	__syncthreads();
	for (int i = 0; threadIdx.x < LANES && i < GROUPS; i++) {
		const float4 x = shared[i * LANES + threadIdx.x];

		sum.x += x.x;
		sum.y += x.y;
		sum.z += x.z;
		sum.w += x.w;
	}
	return sum;
}

static __global__ void __launch_bounds__(THREADS)
        step_kernel(const __grid_constant__ struct matrix_recurrence_step_args a)
{
	const int64_t h = blockIdx.y, b = blockIdx.z;
	const int64_t column = (int64_t)blockIdx.x * COLUMNS + threadIdx.x % LANES * 4;
	const bool valid = column < a.d_v;
	const bf16 *q = at(a.q, b, 0, h), *k = at(a.k, b, 0, h);
	float *state = a.state + (b * a.n_heads + h) * a.d_k * a.d_v + column;
	float4 v = {}, o = {};

	if (valid) {
		const uint2 pair = *reinterpret_cast<const uint2 *>(at(a.v, b, 0, h) + column);

		v = {low_half(pair.x), high_half(pair.x), low_half(pair.y), high_half(pair.y)};
	}
#pragma unroll UNROLL
	for (int64_t i = threadIdx.x / LANES; valid && i < a.d_k; i += GROUPS) {
		float4 *row = reinterpret_cast<float4 *>(state + i * a.d_v);
		const float decay = decay_of(a, b, h, i), key = __bfloat162float(k[i]);
		const float query = a.scale * __bfloat162float(q[i]);
		float4 s = *row;

		s.x = decay * s.x + key * v.x;
		s.y = decay * s.y + key * v.y;
		s.z = decay * s.z + key * v.z;
		s.w = decay * s.w + key * v.w;
		*row = s;
		o.x += query * s.x;
		o.y += query * s.y;
		o.z += query * s.z;
		o.w += query * s.w;
	}
	o = sum_groups(o);
	if (threadIdx.x < LANES && valid)
		*reinterpret_cast<uint2 *>(at(a.out, b, 0, h) + column) =
		        make_uint2(pack(o.x, o.y), pack(o.z, o.w));
}

extern "C" const char *portable_matrix_recurrence_step_unsupported(const struct device *,
                                                                   const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_step_args *>(args);

	if (a->rule != RULE_PLAIN)
		return "only the plain rule";
	if (!is_known_decay(a->decay))
		return "an unknown decay";
	if (a->d_v % 8)
		return "d_v must be a multiple of 8";
	if (a->batch > 65535 || a->n_heads > 65535)
		return "more than 65535 sequences or heads";
	return check_aligned(&a->v, &a->out, a->state);
}

extern "C" enum status portable_matrix_recurrence_step(struct device *device, const void *args,
                                                       void *)
{
	const auto *a = static_cast<const struct matrix_recurrence_step_args *>(args);
	const dim3 grid((unsigned)divide_up(a->d_v, COLUMNS), (unsigned)a->n_heads,
	                (unsigned)a->batch);

	return launch(device, "matrix_recurrence_step", step_kernel, grid, THREADS,
	              THREADS * sizeof(float4), *a);
}
