#include "kernels/cuda/device.h"

#include <cuda_bf16.h>

#include "kernels/cuda/cuda_backend.h"
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

/* Both ends wait for a tick of the timer, which some devices advance in steps of a microsecond. */
static __global__ void clock_kernel(uint64_t ns, struct clock_sample *sample)
{
	uint64_t before = now_ns(), begin, end;

	while ((begin = now_ns()) == before)
		;
	const uint64_t cycles = clock64();
	do {
		before = now_ns();
		while ((end = now_ns()) == before)
			;
	} while (end - begin < ns);
	sample->cycles = clock64() - cycles;
	sample->nanoseconds = end - begin;
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

/* layers/noise.c, in the device's arithmetic. */
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

template <typename T>
static __global__ void count_nonfinite_kernel(const T *memory, int64_t count,
                                              unsigned long long *found)
{
	const int64_t stride = (int64_t)gridDim.x * blockDim.x;
	unsigned long long mine = 0;

	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
		mine += !isfinite((float)memory[i]);
	if (mine > 0)
		atomicAdd(found, mine);
}

cudaError_t device_code_present()
{
	cudaFuncAttributes attributes;

	return cudaFuncGetAttributes(&attributes, spin_kernel);
}

cudaError_t device_hold(cudaStream_t stream, const int *gate, int ticket, uint64_t limit_ns)
{
	hold_kernel<<<1, 1, 0, stream>>>(gate, ticket, limit_ns);
	return cudaGetLastError();
}

cudaError_t device_spin(cudaStream_t stream, uint64_t ns)
{
	spin_kernel<<<1, 1, 0, stream>>>(ns);
	return cudaGetLastError();
}

cudaError_t device_clock(cudaStream_t stream, uint64_t ns, struct clock_sample *sample)
{
	clock_kernel<<<1, 1, 0, stream>>>(ns, sample);
	return cudaGetLastError();
}

cudaError_t device_read(cudaStream_t stream, const void *buffer, size_t bytes)
{
	read_kernel<<<(unsigned)(cuda_sm_count() * BLOCKS_PER_SM), THREADS, 0, stream>>>(
	        static_cast<const uint4 *>(buffer), bytes / sizeof(uint4));
	return cudaGetLastError();
}

cudaError_t device_copy(cudaStream_t stream, void *to, const void *from, size_t bytes)
{
	copy_kernel<<<(unsigned)(cuda_sm_count() * BLOCKS_PER_SM), THREADS, 0, stream>>>(
	        static_cast<uint4 *>(to), static_cast<const uint4 *>(from), bytes / sizeof(uint4));
	return cudaGetLastError();
}

cudaError_t device_random(cudaStream_t stream, void *memory, size_t count, uint32_t seed)
{
	random_kernel<<<1024, THREADS, 0, stream>>>(static_cast<__nv_bfloat16 *>(memory), count,
	                                            seed);
	return cudaGetLastError();
}

cudaError_t device_normal(cudaStream_t stream, void *memory, bool bf16, int64_t count, float scale,
                          uint64_t seed, uint64_t noise_stream)
{
	const unsigned blocks = (unsigned)(cuda_sm_count() * BLOCKS_PER_SM);

	if (bf16)
		normal_kernel<<<blocks, THREADS, 0, stream>>>(static_cast<__nv_bfloat16 *>(memory),
		                                              count, scale, seed, noise_stream);
	else
		normal_kernel<<<blocks, THREADS, 0, stream>>>(static_cast<float *>(memory), count,
		                                              scale, seed, noise_stream);
	return cudaGetLastError();
}

cudaError_t device_count_nonfinite(cudaStream_t stream, const void *memory, bool bf16,
                                   int64_t count, unsigned long long *found)
{
	const unsigned blocks = (unsigned)(cuda_sm_count() * BLOCKS_PER_SM);

	if (bf16)
		count_nonfinite_kernel<<<blocks, THREADS, 0, stream>>>(
		        static_cast<const __nv_bfloat16 *>(memory), count, found);
	else
		count_nonfinite_kernel<<<blocks, THREADS, 0, stream>>>(
		        static_cast<const float *>(memory), count, found);
	return cudaGetLastError();
}
