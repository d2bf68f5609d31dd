#include "kernels/cuda/device.h"

#include <cuda_bf16.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/data.h"
#include "kernels/noise.h"

static __device__ uint64_t now_ns()
{
	uint64_t t;

	asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
	return t;
}

static __global__ void hold_kernel(const volatile int *gate, int ticket, uint64_t limit_ns)
{
	const uint64_t begin = now_ns();

	while (*gate < ticket && now_ns() - begin < limit_ns)
		;
}

static __global__ void spin_kernel(uint64_t ns)
{
	const uint64_t begin = now_ns();

	while (now_ns() - begin < ns)
		;
}

static __device__ int multiprocessor()
{
	int id;

	asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
	return id;
}

/* Waits for a tick of the timer, which some devices advance in steps of a microsecond. */
static __device__ clock_start read_clocks()
{
	const uint64_t before = now_ns();
	uint64_t now;

	while ((now = now_ns()) == before)
		;
	return {static_cast<uint64_t>(clock64()), now};
}

/* Identifiers may have gaps: one beyond n has no start. */
static __global__ void clock_start_kernel(clock_start *starts, int n)
{
	if (multiprocessor() < n)
		starts[multiprocessor()] = read_clocks();
}

/* A single block; what it leaves behind is nothing but zeros. */
static __global__ void clock_stop_kernel(clock_start *starts, int n, uint64_t ns,
                                         clock_sample *sample)
{
	clock_start begin = {}, end;

	if (multiprocessor() < n)
		begin = starts[multiprocessor()];
	if (begin.nanoseconds == 0)
		begin = read_clocks();
	do
		end = read_clocks();
	while (end.nanoseconds - begin.nanoseconds < ns);
	sample->cycles = end.cycles - begin.cycles;
	sample->nanoseconds = end.nanoseconds - begin.nanoseconds;
	for (int i = 0; i < n; i++)
		starts[i] = {};
}

/* Blocks of memory that one thread block moves at a time, UNROLL vectors per thread. */
enum { THREADS = 256, UNROLL = 8, BLOCKS_PER_SM = 8 };

static __global__ void __launch_bounds__(THREADS) read_kernel(const uint4 *buffer, size_t count)
{
	const size_t stride = (size_t)gridDim.x * THREADS * UNROLL;
	uint32_t seen = 0;

	for (size_t i = (size_t)blockIdx.x * THREADS * UNROLL + threadIdx.x; i < count;
	     i += stride) {
		uint4 v[UNROLL];

#pragma unroll
		for (int j = 0; j < UNROLL; j++)
			v[j] = i + j * THREADS < count ? buffer[i + j * THREADS]
			                               : make_uint4(0, 0, 0, 0);
#pragma unroll
		for (int j = 0; j < UNROLL; j++)
			seen += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
	}
	/* All but never true: it only keeps the loads from being optimized away. */
	if (seen == 0x9e3779b9u)
		__nanosleep(1);
}

static __global__ void __launch_bounds__(THREADS)
        copy_kernel(uint4 *to, const uint4 *from, size_t count)
{
	const size_t stride = (size_t)gridDim.x * THREADS * UNROLL;

	for (size_t i = (size_t)blockIdx.x * THREADS * UNROLL + threadIdx.x; i < count;
	     i += stride) {
		uint4 v[UNROLL];

#pragma unroll
		for (int j = 0; j < UNROLL; j++)
			if (i + j * THREADS < count)
				v[j] = from[i + j * THREADS];
#pragma unroll
		for (int j = 0; j < UNROLL; j++)
			if (i + j * THREADS < count)
				to[i + j * THREADS] = v[j];
	}
}

/* A counter, scrambled (the finalizer of MurmurHash3). */
static __device__ uint32_t scramble(uint32_t x)
{
	x ^= x >> 16;
	x *= 0x85ebca6bu;
	x ^= x >> 13;
	x *= 0xc2b2ae35u;
	return x ^ x >> 16;
}

static __global__ void random_kernel(__nv_bfloat16 *memory, size_t count, uint32_t seed)
{
	const size_t stride = (size_t)gridDim.x * blockDim.x;

	for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
		const uint32_t bits = scramble((uint32_t)i + scramble(seed + (uint32_t)(i >> 32)));

		memory[i] = __float2bfloat16((float)(int32_t)bits * 0x1p-31f);
	}
}

/* kernels/noise.c, in the device's arithmetic. */
template <typename T>
static __global__ void normal_kernel(T *memory, int64_t count, float scale, uint64_t seed,
                                     uint64_t noise_stream)
{
	const int64_t stride = (int64_t)gridDim.x * blockDim.x;

	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
		const uint64_t bits = noise_bits(seed, noise_stream, (uint64_t)i);
		const float angle = 6.28318531f * noise_unit(bits);

		memory[i] = (T)(scale * sqrtf(-2.0f * logf(noise_unit(bits >> 32))) * cosf(angle));
	}
}

/* A warp for a row after the other. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
        add_directions_kernel(const __grid_constant__ struct strided rows,
                              const __grid_constant__ struct directions d, int64_t n_rows)
{
	const int64_t *n = rows.size, *s = rows.stride, warps = (int64_t)gridDim.x * (THREADS / 32);

	for (int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; row < n_rows;
	     row += warps) {
		const int64_t i = row / (n[1] * n[2]), j = row / n[2] % n[1], k = row % n[2];
		T *to = static_cast<T *>(rows.data) + i * s[0] + j * s[1] + k * s[2];
		int topic;
		const float share = direction_share(&d, i, j, k, &topic);

		for (int64_t c = threadIdx.x % 32; share != 0.0f && c < n[3]; c += 32)
			to[c * s[3]] =
			        (T)((float)to[c * s[3]] + share * direction_element(&d, topic, c));
	}
}

/* Element `index` of the dense tensor is at the sum of its coordinates times their strides. */
static __device__ int64_t gathered_place(const struct gather &g, const int64_t *list, int64_t index)
{
	int64_t place = 0;

	for (int d = GATHER_DIMS - 1; d >= 0; d--) {
		const int64_t i = index % g.size[d];

		place += (list && d == g.listed ? list[i] : i) * g.stride[d];
		index /= g.size[d];
	}
	return place;
}

template <typename T>
static __global__ void count_nonfinite_kernel(const __grid_constant__ struct gather g,
                                              int64_t count, unsigned long long *found)
{
	const int64_t stride = (int64_t)gridDim.x * blockDim.x;
	unsigned long long mine = 0;

	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
		mine += !isfinite(
		        (float)static_cast<const T *>(g.from)[gathered_place(g, NULL, i)]);
	if (mine > 0)
		atomicAdd(found, mine);
}

static __device__ double jittered(const struct gather &g, int64_t i, double value)
{
	return g.jitter > 0 ? gather_jittered(&g, i, value) : value;
}

static __device__ int32_t jittered(const struct gather &g, int64_t i, int32_t value)
{
	return value;
}

template <typename From, typename To>
static __global__ void gather_kernel(const __grid_constant__ struct gather g, const int64_t *list,
                                     int64_t count, To *to)
{
	const int64_t stride = (int64_t)gridDim.x * blockDim.x;

	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
		to[i] = jittered(
		        g, i, (To) static_cast<const From *>(g.from)[gathered_place(g, list, i)]);
}

template <typename T> static __global__ void add_kernel(int64_t count, const T *from, T *to)
{
	const int64_t stride = (int64_t)gridDim.x * blockDim.x;

	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
		to[i] += from[i];
}

/* Calls launch(element) with an element of the type, which must be a floating-point one. */
template <typename Launch> static cudaError_t for_type(enum dtype dtype, Launch launch)
{
	switch (dtype) {
	case DTYPE_BF16:
		launch(__nv_bfloat16());
		break;
	case DTYPE_F32:
		launch(float());
		break;
	case DTYPE_F64:
		launch(double());
		break;
	default:
		return cudaErrorInvalidValue;
	}
	return cudaGetLastError();
}

static unsigned grid_of(const struct device *device)
{
	return (unsigned)(cuda_sm_count(device) * BLOCKS_PER_SM);
}

cudaError_t code_is_present()
{
	cudaFuncAttributes attributes;

	return cudaFuncGetAttributes(&attributes, spin_kernel);
}

cudaError_t submit_hold(struct device *device, const int *gate, int ticket, uint64_t limit_ns)
{
	hold_kernel<<<1, 1, 0, cuda_stream(device)>>>(gate, ticket, limit_ns);
	return cudaGetLastError();
}

cudaError_t submit_spin(struct device *device, uint64_t ns)
{
	spin_kernel<<<1, 1, 0, cuda_stream(device)>>>(ns);
	return cudaGetLastError();
}

cudaError_t clock_starts_take(int n, struct clock_start **starts)
{
	const size_t bytes = n * sizeof **starts;
	const cudaError_t error = cudaMalloc(reinterpret_cast<void **>(starts), bytes);

	return error != cudaSuccess ? error : cudaMemset(*starts, 0, bytes);
}

cudaError_t submit_clock_start(struct device *device, struct clock_start *starts)
{
	clock_start_kernel<<<cuda_sm_count(device), 1, 0, cuda_stream(device)>>>(
	        starts, cuda_sm_count(device));
	return cudaGetLastError();
}

cudaError_t submit_clock_stop(struct device *device, struct clock_start *starts, uint64_t ns,
                              struct clock_sample *sample)
{
	clock_stop_kernel<<<1, 1, 0, cuda_stream(device)>>>(starts, cuda_sm_count(device), ns,
	                                                    sample);
	return cudaGetLastError();
}

cudaError_t submit_read(struct device *device, const void *buffer, size_t bytes)
{
	read_kernel<<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
	        static_cast<const uint4 *>(buffer), bytes / sizeof(uint4));
	return cudaGetLastError();
}

cudaError_t submit_copy(struct device *device, void *to, const void *from, size_t bytes)
{
	copy_kernel<<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
	        static_cast<uint4 *>(to), static_cast<const uint4 *>(from), bytes / sizeof(uint4));
	return cudaGetLastError();
}

cudaError_t submit_random(struct device *device, void *memory, size_t count, uint32_t seed)
{
	random_kernel<<<1024, THREADS, 0, cuda_stream(device)>>>(
	        static_cast<__nv_bfloat16 *>(memory), count, seed);
	return cudaGetLastError();
}

cudaError_t submit_normal(struct device *device, void *memory, enum dtype dtype, int64_t count,
                          float scale, uint64_t seed, uint64_t noise_stream)
{
	return for_type(dtype, [&](auto element) {
		normal_kernel<<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
		        static_cast<decltype(element) *>(memory), count, scale, seed, noise_stream);
	});
}

cudaError_t submit_add_directions(struct device *device, const struct strided *rows,
                                  const struct directions *directions)
{
	return for_type(rows->dtype, [&](auto element) {
		add_directions_kernel<decltype(element)>
		        <<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
		                *rows, *directions, rows->size[0] * rows->size[1] * rows->size[2]);
	});
}

static int64_t count_of(const struct gather *gather)
{
	return gather->size[0] * gather->size[1] * gather->size[2] * gather->size[3];
}

cudaError_t submit_count_nonfinite(struct device *device, const struct gather *region,
                                   unsigned long long *found)
{
	return for_type(region->dtype, [&](auto element) {
		count_nonfinite_kernel<decltype(element)>
		        <<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
		                *region, count_of(region), found);
	});
}

cudaError_t submit_gather(struct device *device, const struct gather *gather, const int64_t *list,
                          void *to)
{
	const int64_t count = count_of(gather);

	if (gather->dtype == DTYPE_I32) {
		gather_kernel<int32_t><<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
		        *gather, list, count, static_cast<int32_t *>(to));
		return cudaGetLastError();
	}
	return for_type(gather->dtype, [&](auto element) {
		gather_kernel<decltype(element)>
		        <<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
		                *gather, list, count, static_cast<double *>(to));
	});
}

cudaError_t submit_add(struct device *device, int64_t count, const void *from, void *to)
{
	return for_type(device->wide, [&](auto element) {
		add_kernel<<<grid_of(device), THREADS, 0, cuda_stream(device)>>>(
		        count, static_cast<const decltype(element) *>(from),
		        static_cast<decltype(element) *>(to));
	});
}
