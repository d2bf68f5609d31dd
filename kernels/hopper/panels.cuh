/*
 * What the chunkwise recurrences on wgmma share beyond ptx.cuh: operands whose
 * transpose lies in shared memory, rings, copies to and from several blocks. All tiles are panels
 * of 64 tokens x 64 channels, 128-byte swizzle: 8192 bytes.
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

/* d (64 x n) = [accumulate ? d : 0] + A B, n = 16, 32 or 64: A in registers, B K-major in shared
 * memory. */
__device__ __forceinline__ void wgmma_rs_k_major(float (&d)[8], const uint32_t *a, uint64_t b,
                                                 bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %13, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
	             "{" REGISTERS_8 "}, "
	             "{%8, %9, %10, %11}, %12, p, 1, 1, 0;\n"
	             "}\n"
	             : OPERANDS_8(d, 0)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_rs_k_major(float (&d)[16], const uint32_t *a, uint64_t b,
                                                 bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %21, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
	             "{" REGISTERS_16 "}, "
	             "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n"
	             "}\n"
	             : OPERANDS_16(d, 0)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_rs_k_major(float (&d)[32], const uint32_t *a, uint64_t b,
                                                 bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %37, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{" REGISTERS_32 "}, "
	             "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
	             "}\n"
	             : OPERANDS_32(d, 0)
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}

/* The same: A MN-major, B K-major, both in shared memory. */
__device__ __forceinline__ void wgmma_ss_transposed(float (&d)[8], uint64_t a, uint64_t b,
                                                    bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %10, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
	             "{" REGISTERS_8 "}, "
	             "%8, %9, p, 1, 1, 1, 0;\n"
	             "}\n"
	             : OPERANDS_8(d, 0)
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_ss_transposed(float (&d)[16], uint64_t a, uint64_t b,
                                                    bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %18, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
	             "{" REGISTERS_16 "}, "
	             "%16, %17, p, 1, 1, 1, 0;\n"
	             "}\n"
	             : OPERANDS_16(d, 0)
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_ss_transposed(float (&d)[32], uint64_t a, uint64_t b,
                                                    bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %34, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{" REGISTERS_32 "}, "
	             "%32, %33, p, 1, 1, 1, 0;\n"
	             "}\n"
	             : OPERANDS_32(d, 0)
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

/* d (64 x n) = [accumulate ? d : 0] + A B, n = 64, 128 or 256: A and B MN-major in shared memory.
 */
__device__ __forceinline__ void wgmma_ss_both_transposed(float (&d)[32], uint64_t a, uint64_t b,
                                                         bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %34, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{" REGISTERS_32 "}, "
	             "%32, %33, p, 1, 1, 1, 1;\n"
	             "}\n"
	             : OPERANDS_32(d, 0)
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_ss_both_transposed(float (&d)[64], uint64_t a, uint64_t b,
                                                         bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %66, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
	             "{" REGISTERS_64 "}, "
	             "%64, %65, p, 1, 1, 1, 1;\n"
	             "}\n"
	             : OPERANDS_64(d, 0)
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_ss_both_transposed(float (&d)[128], uint64_t a, uint64_t b,
                                                         bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %130, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
	             "{" REGISTERS_128 "}, "
	             "%128, %129, p, 1, 1, 1, 1;\n"
	             "}\n"
	             : OPERANDS_128(d, 0)
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

/* ---- clusters of blocks */

/* Until all threads of all blocks of the cluster are here. */
__device__ __forceinline__ void cluster_sync()
{
	asm volatile("barrier.cluster.arrive.release.aligned;\n"
	             "barrier.cluster.wait.acquire.aligned;" ::
	                     : "memory");
}

/* Arrives at the barrier that lies at the same place in block `rank` of the cluster. */
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank)
{
	asm volatile("{\n"
	             ".reg .b32 there;\n"
	             "mapa.shared::cluster.u32 there, %0, %1;\n"
	             "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
	             "}\n" ::"r"(barrier),
	             "r"(rank)
	             : "memory");
}

/* bulk_load to the same place in, and completing on the same barrier of, each block of `mask`. */
__device__ __forceinline__ void bulk_load_multicast(uint32_t shared, const void *global,
                                                    uint32_t bytes, uint32_t barrier, uint16_t mask)
{
	asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
	             ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared),
	             "l"(global), "r"(bytes), "r"(barrier), "h"(mask)
	             : "memory");
}

/* `bytes` (a multiple of 16) of shared memory to contiguous memory. */
__device__ __forceinline__ void bulk_store(void *global, uint32_t shared, uint32_t bytes)
{
	asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
	             "r"(shared), "r"(bytes)
	             : "memory");
}

} // namespace hopper

#endif
