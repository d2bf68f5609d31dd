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

/* d (64 x n) = [accumulate ? d : 0] + A B, n = 64, 128 or 256: A and B MN-major in shared memory.
 */
__device__ __forceinline__ void wgmma_ss_both_transposed(float (&d)[32], uint64_t a, uint64_t b,
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
	             "%32, %33, p, 1, 1, 1, 1;\n"
	             "}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
	               "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
	               "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
	               "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
	               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31])
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_ss_both_transposed(float (&d)[64], uint64_t a, uint64_t b,
                                                         bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %66, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, "
	             "%24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, "
	             "%40, %41, %42, %43, %44, %45, %46, %47, "
	             "%48, %49, %50, %51, %52, %53, %54, %55, "
	             "%56, %57, %58, %59, %60, %61, %62, %63}, "
	             "%64, %65, p, 1, 1, 1, 1;\n"
	             "}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
	               "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
	               "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
	               "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
	               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
	               "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
	               "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
	               "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),
	               "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
	               "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
	             : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ __forceinline__ void wgmma_ss_both_transposed(float (&d)[128], uint64_t a, uint64_t b,
                                                         bool accumulate)
{
	asm volatile("{\n"
	             ".reg .pred p;\n"
	             "setp.ne.b32 p, %130, 0;\n"
	             "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
	             "{%0, %1, %2, %3, %4, %5, %6, %7, "
	             "%8, %9, %10, %11, %12, %13, %14, %15, "
	             "%16, %17, %18, %19, %20, %21, %22, %23, "
	             "%24, %25, %26, %27, %28, %29, %30, %31, "
	             "%32, %33, %34, %35, %36, %37, %38, %39, "
	             "%40, %41, %42, %43, %44, %45, %46, %47, "
	             "%48, %49, %50, %51, %52, %53, %54, %55, "
	             "%56, %57, %58, %59, %60, %61, %62, %63, "
	             "%64, %65, %66, %67, %68, %69, %70, %71, "
	             "%72, %73, %74, %75, %76, %77, %78, %79, "
	             "%80, %81, %82, %83, %84, %85, %86, %87, "
	             "%88, %89, %90, %91, %92, %93, %94, %95, "
	             "%96, %97, %98, %99, %100, %101, %102, %103, "
	             "%104, %105, %106, %107, %108, %109, %110, %111, "
	             "%112, %113, %114, %115, %116, %117, %118, %119, "
	             "%120, %121, %122, %123, %124, %125, %126, %127}, "
	             "%128, %129, p, 1, 1, 1, 1;\n"
	             "}\n"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
	               "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
	               "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
	               "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
	               "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
	               "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
	               "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
	               "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
	               "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),
	               "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
	               "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]),
	               "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
	               "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),
	               "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
	               "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]),
	               "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
	               "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]),
	               "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]),
	               "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]),
	               "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
	               "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]),
	               "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),
	               "+f"(d[126]), "+f"(d[127])
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
