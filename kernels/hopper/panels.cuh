/*
 * What the chunkwise recurrences on wgmma share beyond ptx.cuh: operands whose
 * transpose lies in shared memory, and rings. All tiles are panels of 64
 * tokens x 64 channels, 128-byte swizzle: 8192 bytes.
 */
#ifndef KERNELS_HOPPER_PANELS_CUH
#define KERNELS_HOPPER_PANELS_CUH

#include "kernels/hopper/ptx.cuh"

namespace hopper
{

constexpr int PANEL_BYTES = 64 * 64 * 2;

/* Position in a ring of n slots; a full trip flips the parity. */
template <int n> struct slot_ring {
	int slot = 0;
	uint32_t parity = 0;

	__device__ __forceinline__ void advance()
	{
		if (++slot == n) {
			slot = 0;
			parity ^= 1;
		}
	}
};

/*
 * Address in a panel, for ldmatrix and stmatrix (x4, transposed), of the 16 tokens from
 * `token` x 16 channels from `channel`, seen as the matrix [channel][token]: the four registers
 * are then those of a wgmma A operand or accumulator with channels as rows.
 */
__device__ __forceinline__ uint32_t transposed_block(uint32_t panel, int token, int channel,
                                                     int lane)
{
	const int row = token + (lane >> 4) * 8 + (lane & 7);

	return panel + swizzle_128(row * 128 + channel * 2 + ((lane >> 3) & 1) * 16);
}

/* The same of the 16 tokens x 16 channels as they lie, [token][channel]. */
__device__ __forceinline__ uint32_t plain_block(uint32_t panel, int token, int channel, int lane)
{
	return panel + swizzle_128((token + (lane & 15)) * 128 + channel * 2 + (lane >> 4) * 16);
}

__device__ __forceinline__ void load_transposed_x4(uint32_t shared, uint32_t *r)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
	             : "r"(shared)
	             : "memory");
}

__device__ __forceinline__ void store_transposed_x4(uint32_t shared, uint32_t a, uint32_t b,
                                                    uint32_t c, uint32_t d)
{
	asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
	                     shared),
	             "r"(a), "r"(b), "r"(c), "r"(d)
	             : "memory");
}

__device__ __forceinline__ float shared_float(uint32_t shared)
{
	float value;

	asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(shared) : "memory");
	return value;
}

__device__ __forceinline__ float2 shared_float2(uint32_t shared)
{
	float2 value;

	asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
	             : "=f"(value.x), "=f"(value.y)
	             : "r"(shared)
	             : "memory");
	return value;
}

__device__ __forceinline__ void shared_store2(uint32_t shared, float x, float y)
{
	asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void shared_store1(uint32_t shared, float x)
{
	asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared), "f"(x) : "memory");
}

/* d (64 x 64) = [accumulate ? d : 0] + A B: A in registers, B K-major in shared memory. */
__device__ __forceinline__ void wgmma_rs_k_major(float (&d)[32], const uint32_t *a, uint64_t b,
                                                 bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %37, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, "
	             "%24, %25, %26, %27, %28, %29, %30, %31}, "
	             "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
	             "}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
	               "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
	               "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
	               "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
	               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}

/* d (64 x 64) = [accumulate ? d : 0] + A B: A MN-major, B K-major, both in shared memory. */
__device__ __forceinline__ void wgmma_ss_transposed(float (&d)[32], uint64_t a, uint64_t b,
                                                    bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %34, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, "
	             "%24, %25, %26, %27, %28, %29, %30, %31}, "
	             "%32, %33, p, 1, 1, 1, 0;\n"
	             "}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
	               "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
	               "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
	               "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
	               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31])
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

} // namespace hopper

#endif
