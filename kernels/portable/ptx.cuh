/*
 * The machine instructions that CUDA C++ has no name for: asynchronous copies
 * to shared memory, matrix fragments, tensor-core products. Compute
 * capability 8.0 and newer.
 *
 * Fragments of mma.m16n8k16, lane l of a warp, g = l / 4, c = l % 4, pairs low half first:
 *   A: a[0] = (g, 2c..), a[1] = (g + 8, 2c..), a[2] = (g, 2c + 8..), a[3] = (g + 8, 2c + 8..)
 *   B: b0 = (k 2c.., n g), b1 = (k 2c + 8.., n g)
 *   D: d[0], d[1] = (g, 2c), (g, 2c + 1); d[2], d[3] = the same of row g + 8
 */
#ifndef KERNELS_PORTABLE_PTX_CUH
#define KERNELS_PORTABLE_PTX_CUH

#include <cuda_runtime.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t shared_address(const void *shared)
{
	return (uint32_t)__cvta_generic_to_shared(shared);
}

/* Copies 16 bytes to shared memory in the background; zeros if not `valid` (nothing is read). */
static __device__ __forceinline__ void copy16_async(void *shared, const void *global, bool valid)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
	             "l"(global), "r"(valid ? 16 : 0)
	             : "memory");
}

/* Closes a group of copies. */
static __device__ __forceinline__ void copy_commit()
{
	asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N of this thread's groups are still under way. */
template <int N> static __device__ __forceinline__ void copy_wait()
{
	asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. */
static __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
	             : "r"(shared_address(row))
	             : "memory");
}

/* The same, each matrix transposed. */
static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *row)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
	             : "r"(shared_address(row))
	             : "memory");
}

/* d += a b, bf16 operands, fp32 sums. */
static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1)
{
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
	             "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A pointer or number that is to be kept from here on, not formed anew wherever it is used. */
template <typename T> static __device__ __forceinline__ T *held(T *pointer)
{
	asm volatile("" : "+l"(pointer));
	return pointer;
}

static __device__ __forceinline__ int held(int number)
{
	asm volatile("" : "+r"(number));
	return number;
}

static __device__ __forceinline__ int64_t held(int64_t number)
{
	asm volatile("" : "+l"(number));
	return number;
}

/* Two products of bf16. */
static __device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b)
{
	uint32_t y;

	asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
	return y;
}

/* 2^x in one instruction; 0 below -126. */
static __device__ __forceinline__ float exp2_fast(float x)
{
	float y;

	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* log2(x) in one instruction, to about 2^-22 near 1. */
static __device__ __forceinline__ float log2_fast(float x)
{
	float y;

	asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 1 / x in one instruction, to about 2^-23; 0 above 2^126. */
static __device__ __forceinline__ float reciprocal_fast(float x)
{
	float y;

	asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 1 / sqrt(x) in one instruction, to about 2^-22; infinite below 2^-126. */
static __device__ __forceinline__ float rsqrt_fast(float x)
{
	float y;

	asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* The smaller, or NaN if one of them is. */
static __device__ __forceinline__ float min_or_nan(float a, float b)
{
	float y;

	asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
	return y;
}

/* Eight bytes that other blocks write and read meanwhile, in one piece; no order beside them. */
static __device__ __forceinline__ uint64_t load_relaxed(const uint64_t *from)
{
	uint64_t value;

	asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
	return value;
}

static __device__ __forceinline__ void store_relaxed(uint64_t *to, uint64_t value)
{
	asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

/* Counts up *ticket; returns what it was. */
static __device__ __forceinline__ uint32_t take_ticket(uint32_t *ticket)
{
	return atomicAdd(ticket, 1u);
}

#endif
