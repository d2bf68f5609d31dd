/*
 * CUDA C++ on a processor, one block at a time, so that the portable kernels
 * can be tested on a machine without a GPU: every thread of a block is a fiber,
 * scheduled in a random order between barriers, which shows barriers that are
 * missing. Shared memory starts as NaN; asynchronous copies arrive only when
 * they are waited for, and what they will overwrite is NaN until then. Warp
 * operations that not all lanes reach, deadlocks, misaligned vectors and
 * copies that nobody waits for end the program.
 *
 * This folder comes before the project's in the include path: its
 * kernels/portable/ptx.cuh and launch.cuh take the place of the real ones.
 */
#ifndef TESTS_GPU_EMULATOR_EMULATOR_H
#define TESTS_GPU_EMULATOR_EMULATOR_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __align__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __noinline__
#undef __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__

using std::isnan;
using std::max;
using std::min;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
extern unsigned char shared_memory[];

enum { EMULATED_WARP = 32, EXCHANGE_BYTES = 64 };

/* Runs a kernel's body for every thread of every block. */
void emulate(dim3 grid, int threads, size_t shared, const std::function<void()> &body);

/* Ends the program with a message. */
[[noreturn]] void emulator_fail(const char *what);

int emulated_lane();
/* Memory through which the lanes of the current warp trade values. */
unsigned char (*emulated_exchange())[EXCHANGE_BYTES];
void emulated_warp_barrier();
void emulated_block_barrier();

void emulated_copy(void *shared, const void *global, bool valid);
void emulated_copy_commit();
void emulated_copy_wait(int n_pending);

inline void __syncthreads()
{
	emulated_block_barrier();
}

inline void __syncwarp()
{
	emulated_warp_barrier();
}

/* The value of another lane. */
template <typename T> T emulated_shuffle(T mine, int lane)
{
	unsigned char(*exchange)[EXCHANGE_BYTES] = emulated_exchange();
	T other;

	memcpy(exchange[emulated_lane()], &mine, sizeof mine);
	emulated_warp_barrier();
	memcpy(&other, exchange[lane % EMULATED_WARP], sizeof other);
	emulated_warp_barrier();
	return other;
}

template <typename T> T __shfl_xor_sync(unsigned, T mine, int mask)
{
	return emulated_shuffle(mine, emulated_lane() ^ mask);
}

inline int __all_sync(unsigned, int mine)
{
	int all = 1;

	for (int lane = 0; lane < EMULATED_WARP; lane++)
		all &= emulated_shuffle(mine, lane) != 0;
	return all;
}

inline float __uint_as_float(uint32_t bits)
{
	float value;

	memcpy(&value, &bits, sizeof value);
	return value;
}

inline float __expf(float x)
{
	return expf(x);
}

inline float __logf(float x)
{
	return logf(x);
}

inline float __fdividef(float a, float b)
{
	return a / b;
}

inline float rsqrtf(float x)
{
	return 1.0f / sqrtf(x);
}

inline void sincospif(float x, float *sine, float *cosine)
{
	*sine = (float)sin(M_PI * (double)x);
	*cosine = (float)cos(M_PI * (double)x);
}

template <typename T> T __ldg(const T *from)
{
	return *from;
}

#endif
