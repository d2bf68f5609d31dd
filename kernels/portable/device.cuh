/* What the portable kernels share: vectors of bf16, views, reductions over lanes. */
#ifndef KERNELS_PORTABLE_DEVICE_CUH
#define KERNELS_PORTABLE_DEVICE_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#include "kernels/kernels.h"
#include "kernels/portable/launch.cuh"
#include "kernels/portable/ptx.cuh"

typedef __nv_bfloat16 bf16;

enum { WARP = 32 };

static constexpr float LOG2E = 1.4426950408889634f;
static constexpr float LN2 = 0.6931471805599453f;

/* Eight bf16, moved as 16 bytes. */
struct alignas(16) vector8 {
	uint32_t pair[4];
};

/* The element of a bf16 view at (b, t, h). */
static __device__ __forceinline__ bf16 *at(const struct view &v, int64_t b, int64_t t, int64_t h)
{
	return static_cast<bf16 *>(v.data) + b * v.batch + t * v.token + h * v.head;
}

static __device__ __forceinline__ vector8 load8(const void *from)
{
	return *static_cast<const vector8 *>(from);
}

static __device__ __forceinline__ float low_half(uint32_t pair)
{
	return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float high_half(uint32_t pair)
{
	return __uint_as_float(pair & 0xffff0000u);
}

static __device__ __forceinline__ uint32_t pack(float low, float high)
{
	const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);

	return *reinterpret_cast<const uint32_t *>(&both);
}

static __device__ __forceinline__ void unpack8(float (&x)[8], const vector8 &v)
{
#pragma unroll
	for (int i = 0; i < 4; i++) {
		x[2 * i] = low_half(v.pair[i]);
		x[2 * i + 1] = high_half(v.pair[i]);
	}
}

static __device__ __forceinline__ void load8(float (&x)[8], const void *from)
{
	unpack8(x, load8(from));
}

static __device__ __forceinline__ vector8 pack8(const float (&x)[8])
{
	vector8 v;

#pragma unroll
	for (int i = 0; i < 4; i++)
		v.pair[i] = pack(x[2 * i], x[2 * i + 1]);
	return v;
}

static __device__ __forceinline__ void store8(void *to, const float (&x)[8])
{
	*static_cast<vector8 *>(to) = pack8(x);
}

static __device__ __forceinline__ void load8f(float (&x)[8], const float *from)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		x[i] = from[i];
}

static __device__ __forceinline__ void store8f(float *to, const float (&x)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		to[i] = x[i];
}

static __device__ __forceinline__ float sigmoid(float x)
{
	return reciprocal_fast(1.0f + exp2_fast(-LOG2E * x));
}

/*
 * sigmoid(x) and sigmoid(-x), neither from the other: where one is close to 1
 * the other keeps its digits. x comes times -log2(e).
 */
struct sigmoids {
	float of, of_minus;
};

static __device__ __forceinline__ struct sigmoids sigmoids_of(float minus_x_log2e)
{
	/* Bounded, lest the product be infinity times zero. */
	const float e = exp2_fast(min_or_nan(minus_x_log2e, 100.0f));
	const float of = reciprocal_fast(1.0f + e);

	return {of, e * of};
}

/* Sum over groups of `width` neighbouring lanes (a power of two); all lanes get it. */
static __device__ __forceinline__ float group_sum(float x, int width)
{
	for (int offset = width / 2; offset > 0; offset /= 2)
		x += __shfl_xor_sync(0xffffffffu, x, offset);
	return x;
}

/*
 * Sixteen sums over the 32 lanes at once: lane l returns the sum of all lanes'
 * x[l / 2], with half the exchanges that sixteen reductions would take.
 */
static __device__ __forceinline__ float scatter_sum(float (&x)[WARP / 2])
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int half = WARP / 4; half > 0; half /= 2) {
		const bool upper = lane & (2 * half);

#pragma unroll
		for (int i = 0; i < half; i++) {
			const float keep = upper ? x[i + half] : x[i];
			const float give = upper ? x[i] : x[i + half];

			x[i] = keep + __shfl_xor_sync(0xffffffffu, give, 2 * half);
		}
	}
	return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

/* log(1 + e), where e is small by its series. */
static __device__ __forceinline__ float log_1_plus(float e)
{
	return fabsf(e) < 0.01f ? e * (1.0f - e * (0.5f - e * 0.33333333f)) : __logf(1.0f + e);
}

/* log(1 + e^x). */
static __device__ __forceinline__ float softplus(float x)
{
	return fmaxf(x, 0.0f) + log_1_plus(__expf(-fabsf(x)));
}

/* tanh(x), and 1 - tanh(x)^2 without cancellation. */
struct tanh_pair {
	float value, slope;
};

/* By its series near 0, where 1 - e^-2|x| would cancel. */
static __device__ __forceinline__ struct tanh_pair tanh_of(float x)
{
	const float e = __expf(-2.0f * fabsf(x)), inverse = __fdividef(1.0f, 1.0f + e);
	const float s = x * x;
	const float near =
	        x * (1.0f -
	             s * (0.33333333f - s * (0.13333333f - s * (0.053968254f - s * 0.021869488f))));

	return {s < 0.1f ? near : copysignf((1.0f - e) * inverse, x), 4.0f * e * inverse * inverse};
}

static __host__ __device__ __forceinline__ int64_t divide_up(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

/* launch() with a thread for each of `items`, and no shared memory. */
template <typename... Parameters, typename... Arguments>
static enum status launch_each(struct device *device, const char *operation,
                               void (*kernel)(Parameters...), int64_t items, int threads,
                               Arguments... arguments)
{
	return launch(device, operation, kernel, dim3((unsigned)(divide_up(items, threads))),
	              threads, 0, arguments...);
}

/* Lanes that take a row of `width` elements, eight at a time: a power of two. */
static inline int lanes_for(int64_t width)
{
	int lanes = 1;

	while (lanes < WARP && 8 * lanes < width)
		lanes *= 2;
	return lanes;
}

/* Into how many shares `rows` are cut that each of `columns` blocks takes, for that many blocks on
 * a multiprocessor. */
static inline int64_t count_shares(const struct device *device, int64_t rows, int per_sm,
                                   int64_t columns)
{
	const int64_t wanted = divide_up((int64_t)per_sm * cuda_sm_count(device), columns);

	return rows < wanted ? rows : wanted;
}

/* ---- for unsupported(): NULL, or what is amiss ---- */

static inline bool is_aligned(const void *tensor)
{
	return reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
}

static inline bool is_aligned(const struct view *v)
{
	return is_aligned(v->data) && v->batch % 8 == 0 && v->token % 8 == 0 && v->head % 8 == 0;
}

/* Of pointers to tensors and of views: whether they can be read and written 16 bytes at a time. */
template <typename... Tensors> static const char *check_aligned(const Tensors *...tensors)
{
	return (is_aligned(tensors) && ...) ? NULL : "views must be 16-byte aligned";
}

template <typename... Widths> static const char *check_widths(Widths... widths)
{
	return ((widths % 8 == 0) && ...) ? NULL : "widths must be multiples of 8";
}

static inline const char *either(const char *why, const char *else_why)
{
	return why ? why : else_why;
}

/* Of kernels that know two widths of heads, and have a grid of heads and sequences. */
static inline const char *check_heads(int64_t d_head, int64_t n_heads, int64_t batch)
{
	if (d_head != 64 && d_head != 128)
		return "head width must be 64 or 128";
	return batch > 65535 || n_heads > 65535 ? "more than 65535 sequences or heads" : NULL;
}

#endif
