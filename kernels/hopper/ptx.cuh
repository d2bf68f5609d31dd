/*
 * Thin wrappers over the sm_90a instructions our kernels use. Each says the
 * fact about it that is easiest to get wrong. Sources: the PTX ISA, sections
 * on wgmma, cp.async.bulk, mbarrier and setmaxnreg.
 */
#ifndef KERNELS_HOPPER_PTX_CUH
#define KERNELS_HOPPER_PTX_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

namespace hopper
{

/* Shared-memory address of a generic pointer, as the instructions below want it. */
__device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
	return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ int shared_load(uint32_t shared)
{
	int value;

	asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
	return value;
}

__device__ __forceinline__ void shared_store(uint32_t shared, int value)
{
	asm volatile("st.shared.s32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
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

__device__ __forceinline__ float4 shared_float4(uint32_t shared)
{
	float4 value;

	asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
	             : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
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

__device__ __forceinline__ uint4 shared_load_16(uint32_t shared)
{
	uint4 x;

	asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
	             : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
	             : "r"(shared)
	             : "memory");
	return x;
}

__device__ __forceinline__ void shared_store_16(uint32_t shared, uint4 x)
{
	asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y),
	             "r"(x.z), "r"(x.w)
	             : "memory");
}

__device__ __forceinline__ void shared_store4(uint32_t shared, float x, float y, float z, float w)
{
	asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(x), "f"(y),
	             "f"(z), "f"(w)
	             : "memory");
}

/* ---- mbarrier: a consumer first waits on parity 0, a producer on parity 1 (which passes at once).
 */

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals)
{
	asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

/* After the inits, before any other thread or the copy engine uses them (then __syncthreads). */
__device__ __forceinline__ void barrier_init_fence()
{
	asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier)
{
	asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* One arrival that also announces `bytes`. The count is of whole boxes: what lies
 * outside the tensor is filled with zeros and counts too. */
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes)
{
	asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
	             "r"(bytes)
	             : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity)
{
	asm volatile("{\n"
	             ".reg .pred done;\n"
	             "again:\n"
	             "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
	             "@done bra.uni ready;\n"
	             "bra.uni again;\n"
	             "ready:\n"
	             "}\n" ::"r"(barrier),
	             "r"(parity)
	             : "memory");
}

/* Whether the phase is over, without waiting. */
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity)
{
	uint32_t done;

	asm volatile("{\n"
	             ".reg .pred done;\n"
	             "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
	             "selp.u32 %0, 1, 0, done;\n"
	             "}\n"
	             : "=r"(done)
	             : "r"(barrier), "r"(parity)
	             : "memory");
	return done;
}

/*
 * Adds one to a counter in global memory, or sets it to zero if it is `last`;
 * returns what it was. Releases this block's writes before it (those of other
 * threads after a barrier) and acquires those of the increments before.
 */
__device__ __forceinline__ int increment_wrapping(unsigned int *counter, int last)
{
	int before;

	asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
	             : "=r"(before)
	             : "l"(counter), "r"(last)
	             : "memory");
	return before;
}

/* ---- overlap with the kernel before in the stream, for kernels launched with
 * launch_early(). What only kernels before that one wrote may be read at once. */

/* Until the kernel before has ended and its writes are visible. */
__device__ __forceinline__ void wait_for_previous()
{
	asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* The next kernel may begin when every block has said so or ended. Only after
 * wait_for_previous(): so a kernel that begins early finds all except its direct predecessor done.
 */
__device__ __forceinline__ void let_next_begin()
{
	asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* ---- named barriers: 16 per block, 0 is __syncthreads; `threads` counts arrivers and waiters. */

__device__ __forceinline__ void named_barrier_sync(int id, int threads)
{
	asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads)
{
	asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- registers: every warp of the warpgroup executes it; needs __launch_bounds__(threads, 1). */

template <int count> __device__ __forceinline__ void registers_increase()
{
	asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count> __device__ __forceinline__ void registers_decrease()
{
	asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

/* ---- bulk copies. Shared addresses 128-byte aligned (1024 with the 128-byte swizzle). */

__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap *map)
{
	asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Box of a 4-D tensor into shared memory, completing on `barrier`. */
__device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap *map,
                                            uint32_t barrier, int c0, int c1, int c2, int c3)
{
	asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
	             "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
	             "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
	             : "memory");
}

/* The same under an L2 policy. */
__device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap *map,
                                            uint32_t barrier, int c0, int c1, int c2, int c3,
                                            uint64_t policy)
{
	asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
	             ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
	             "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
	             : "memory");
}

/* Box of a 4-D tensor from shared memory; what lies after the tensor's end is not written.
 * Negative coordinates, which a load takes, are an illegal instruction here. */
__device__ __forceinline__ void tensor_store(const CUtensorMap *map, uint32_t shared, int c0,
                                             int c1, int c2, int c3)
{
	asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group "
	             "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
	             "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
	             : "memory");
}

/* `bytes` (a multiple of 16) of contiguous memory, completing on `barrier`. */
__device__ __forceinline__ void bulk_load(uint32_t shared, const void *global, uint32_t bytes,
                                          uint32_t barrier)
{
	asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
	             "[%0], [%1], %2, [%3];" ::"r"(shared),
	             "l"(global), "r"(bytes), "r"(barrier)
	             : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void *global)
{
	asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

/* For bulk_load: what is read once leaves the L2 cache before anything else. */
__device__ __forceinline__ uint64_t policy_evict_first()
{
	uint64_t policy;

	asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
	return policy;
}

/* The same under an L2 policy. */
__device__ __forceinline__ void bulk_load(uint32_t shared, const void *global, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy)
{
	asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
	             ".L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared),
	             "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
	             : "memory");
}

/* `bytes` (a multiple of 16) of shared memory to contiguous memory. */
__device__ __forceinline__ void bulk_store(void *global, uint32_t shared, uint32_t bytes)
{
	asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
	             "r"(shared), "r"(bytes)
	             : "memory");
}

/* Adds `bytes` (a multiple of 16) of fp32 in shared memory to contiguous memory. */
__device__ __forceinline__ void bulk_add(float *global, uint32_t shared, uint32_t bytes)
{
	asm volatile(
	        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
	                global),
	        "r"(shared), "r"(bytes)
	        : "memory");
}

__device__ __forceinline__ void store_commit()
{
	asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until the source in shared memory may be overwritten (the writes need not have landed). */
__device__ __forceinline__ void store_wait_read()
{
	asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* In EVERY thread that wrote shared memory the ordinary way, before the barrier
 * after which wgmma or a bulk store reads it. */
__device__ __forceinline__ void fence_async_proxy()
{
	asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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

/* ---- matrices in shared memory. 128-byte swizzle: the 16-byte piece index (address
 * bits 4..6) is xor-ed with the row modulo 8 (bits 7..9). */

__device__ __forceinline__ uint32_t swizzle_128(uint32_t offset)
{
	return offset ^ ((offset >> 3) & 0x70);
}

__device__ __forceinline__ void store_matrix_x4(uint32_t shared, uint32_t a, uint32_t b, uint32_t c,
                                                uint32_t d)
{
	asm volatile(
	        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
	        "r"(a), "r"(b), "r"(c), "r"(d)
	        : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32_t shared, uint32_t &a, uint32_t &b,
                                               uint32_t &c, uint32_t &d)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
	             : "r"(shared)
	             : "memory");
}

__device__ __forceinline__ void load_transposed_x4(uint32_t shared, uint32_t *r)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
	             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
	             : "r"(shared)
	             : "memory");
}

/* A warp's 8 x 8 matrix, row lane/4 and columns 2(lane%4) and the next in each lane, transposed. */
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x)
{
	uint32_t y;

	asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
	return y;
}

__device__ __forceinline__ void store_transposed_x4(uint32_t shared, uint32_t a, uint32_t b,
                                                    uint32_t c, uint32_t d)
{
	asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
	                     shared),
	             "r"(a), "r"(b), "r"(c), "r"(d)
	             : "memory");
}

/* ---- wgmma. Do not touch accumulators or A registers between the issue and the wait. */

/*
 * Descriptor of a 128-byte-swizzled bf16 operand; tiles 1024-byte aligned.
 * K-major (rows of 64 elements along K): stride 1024 between 8-row groups;
 * the next 16 along K is +32 bytes, the next 64 the next panel.
 * MN-major (rows of 64 elements along M or N, one row per k): `leading` is the
 * bytes between 64-wide panels; the next 16 along K is +2048 bytes.
 */
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading)
{
	uint64_t descriptor = (shared & 0x3FFFF) >> 4;

	descriptor |= static_cast<uint64_t>(leading >> 4) << 16;
	descriptor |= static_cast<uint64_t>(1024 >> 4) << 32;
	descriptor |= static_cast<uint64_t>(1) << 62;
	return descriptor;
}

/* Before the first wgmma, and after any ordinary write to its registers. */
__device__ __forceinline__ void wgmma_fence()
{
	asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
	asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most `pending` of this warpgroup's groups are in flight. */
template <int pending> __device__ __forceinline__ void wgmma_wait()
{
	asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* Pins accumulators to their registers across asynchronous use. */
template <int count> __device__ __forceinline__ void pin(float (&registers)[count])
{
#pragma unroll
	for (int i = 0; i < count; i++)
		asm volatile("" : "+f"(registers[i])::"memory");
}

template <int count> __device__ __forceinline__ void pin(uint32_t (&registers)[count])
{
#pragma unroll
	for (int i = 0; i < count; i++)
		asm volatile("" : "+r"(registers[i])::"memory");
}

/* Keeps a value in a register: it is not computed anew where it is used. */
__device__ __forceinline__ void keep(uint32_t &value)
{
	asm volatile("" : "+r"(value));
}

/*
 * The registers of an accumulator of 8 to 128 floats, as inline assembly names them: the list in
 * the instruction, where they come first, and the operands after it.
 */
#define REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_16                                                                               \
	REGISTERS_8                                                                                \
	", "                                                                                       \
	"%8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32                                                                               \
	"%0, %1, %2, %3, %4, %5, %6, %7, "                                                         \
	"%8, %9, %10, %11, %12, %13, %14, %15, "                                                   \
	"%16, %17, %18, %19, %20, %21, %22, %23, "                                                 \
	"%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                               \
	REGISTERS_32                                                                               \
	", "                                                                                       \
	"%32, %33, %34, %35, %36, %37, %38, %39, "                                                 \
	"%40, %41, %42, %43, %44, %45, %46, %47, "                                                 \
	"%48, %49, %50, %51, %52, %53, %54, %55, "                                                 \
	"%56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128                                                                              \
	REGISTERS_64                                                                               \
	", "                                                                                       \
	"%64, %65, %66, %67, %68, %69, %70, %71, "                                                 \
	"%72, %73, %74, %75, %76, %77, %78, %79, "                                                 \
	"%80, %81, %82, %83, %84, %85, %86, %87, "                                                 \
	"%88, %89, %90, %91, %92, %93, %94, %95, "                                                 \
	"%96, %97, %98, %99, %100, %101, %102, %103, "                                             \
	"%104, %105, %106, %107, %108, %109, %110, %111, "                                         \
	"%112, %113, %114, %115, %116, %117, %118, %119, "                                         \
	"%120, %121, %122, %123, %124, %125, %126, %127"
#define OPERANDS_8(d, i)                                                                           \
	"+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]),                  \
	        "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define OPERANDS_16(d, i) OPERANDS_8(d, i), OPERANDS_8(d, (i) + 8)
#define OPERANDS_32(d, i)                                                                          \
	OPERANDS_8(d, i), OPERANDS_8(d, (i) + 8), OPERANDS_8(d, (i) + 16), OPERANDS_8(d, (i) + 24)
#define OPERANDS_64(d, i)  OPERANDS_32(d, i), OPERANDS_32(d, (i) + 32)
#define OPERANDS_128(d, i) OPERANDS_64(d, i), OPERANDS_64(d, (i) + 64)

/*
 * d (64 x n, fp32) = [accumulate ? d : 0] + A B, 16 deep, n = 2 * count.
 * Thread t, warp w = t/32, lane l: d[i] is row 16w + l/4 + 8((i>>1)&1), column 8(i>>2) + 2(l&3) +
 * (i&1).
 * `_ss`: A and B in shared memory. `_rs`: A in registers (the accumulator layout converted to bf16
 * pairs), B in shared memory. `majors`: 0 for an operand in shared memory that is K-major, 1 for
 * one that is MN-major. The numbers are those of the operands after the accumulator's.
 */
#define WGMMA_SS(name, count, n, a_at, b_at, p_at, majors)                                         \
	__device__ __forceinline__ void name(float(&d)[count], uint64_t a, uint64_t b,             \
	                                     bool accumulate)                                      \
	{                                                                                          \
		asm volatile("{\n"                                                                 \
		             ".reg .pred p;\n"                                                     \
		             "setp.ne.b32 p, %" #p_at ", 0;\n"                                     \
		             "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "           \
		             "{" REGISTERS_##count "}, "                                           \
		                                   "%" #a_at ", %" #b_at ", p, 1, 1, " majors      \
		                                   ";\n"                                           \
		                                   "}\n"                                           \
		             : OPERANDS_##count(d, 0)                                              \
		             : "l"(a), "l"(b), "r"((int)accumulate));                              \
	}

#define WGMMA_RS(name, count, n, a0_at, a1_at, a2_at, a3_at, b_at, p_at, majors)                   \
	__device__ __forceinline__ void name(float(&d)[count], const uint32_t *a, uint64_t b,      \
	                                     bool accumulate)                                      \
	{                                                                                          \
		asm volatile("{\n"                                                                 \
		             ".reg .pred p;\n"                                                     \
		             "setp.ne.b32 p, %" #p_at ", 0;\n"                                     \
		             "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "           \
		             "{" REGISTERS_##count "}, "                                           \
		                                   "{%" #a0_at ", %" #a1_at ", %" #a2_at           \
		                                   ", %" #a3_at "}, "                              \
		                                   "%" #b_at ", p, 1, 1, " majors ";\n"            \
		                                   "}\n"                                           \
		             : OPERANDS_##count(d, 0)                                              \
		             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                 \
		               "r"((int)accumulate));                                              \
	}

/* A and B K-major. */
WGMMA_SS(wgmma_ss, 32, 64, 32, 33, 34, "0, 0")
WGMMA_SS(wgmma_ss, 64, 128, 64, 65, 66, "0, 0")

/* A MN-major, B K-major. */
WGMMA_SS(wgmma_ss_transposed, 8, 16, 8, 9, 10, "1, 0")
WGMMA_SS(wgmma_ss_transposed, 16, 32, 16, 17, 18, "1, 0")
WGMMA_SS(wgmma_ss_transposed, 32, 64, 32, 33, 34, "1, 0")

/* A K-major, B MN-major. */
WGMMA_SS(wgmma_ss_b_transposed, 32, 64, 32, 33, 34, "0, 1")
WGMMA_SS(wgmma_ss_b_transposed, 64, 128, 64, 65, 66, "0, 1")

/* A and B MN-major. */
WGMMA_SS(wgmma_ss_both_transposed, 32, 64, 32, 33, 34, "1, 1")
WGMMA_SS(wgmma_ss_both_transposed, 64, 128, 64, 65, 66, "1, 1")
WGMMA_SS(wgmma_ss_both_transposed, 128, 256, 128, 129, 130, "1, 1")

/* B MN-major. */
WGMMA_RS(wgmma_rs, 32, 64, 32, 33, 34, 35, 36, 37, "1")
WGMMA_RS(wgmma_rs, 64, 128, 64, 65, 66, 67, 68, 69, "1")

/* B K-major. */
WGMMA_RS(wgmma_rs_k_major, 8, 16, 8, 9, 10, 11, 12, 13, "0")
WGMMA_RS(wgmma_rs_k_major, 16, 32, 16, 17, 18, 19, 20, 21, "0")
WGMMA_RS(wgmma_rs_k_major, 32, 64, 32, 33, 34, 35, 36, 37, "0")
WGMMA_RS(wgmma_rs_k_major, 64, 128, 64, 65, 66, 67, 68, 69, "0")

/*
 * d (16 x 8) += A (16 x 16) B (16 x 8), bf16 operands, a warp. Lane l, g = l / 4, c = l % 4: a0, a1
 * = rows g, g + 8 of columns 2c, 2c + 1, a2, a3 of columns 2c + 8, 2c + 9; b0, b1 = the same of B's
 * column g; d[0], d[1] = row g, columns 2c, 2c + 1, d[2], d[3] of row g + 8.
 */
__device__ __forceinline__ void mma_16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1)
{
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
	             "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	             : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The same 8 deep (the second operand of two registers), in TF32: of each operand the leading 10
 * bits of the fraction. a0, a1 = rows g, g + 8 of column c, a2, a3 of column c + 4; b0, b1 = rows
 * c, c + 4 of B's column g. */
__device__ __forceinline__ void mma_1688(float (&d)[4], float a0, float a1, float a2, float a3,
                                         float b0, float b1)
{
	asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
	             "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
	             : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	             : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
	               "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)),
	               "r"(__float_as_uint(b1)));
}

/* ---- arithmetic */

__device__ __forceinline__ float round_tf32(float x)
{
	uint32_t y;

	asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
	return __uint_as_float(y);
}

constexpr float LOG2E = 1.44269504f;

__device__ __forceinline__ float exp2_approx(float x)
{
	float y;

	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 1/x to about a unit in the last place; 0 for x above 2^126. */
__device__ __forceinline__ float reciprocal_approx(float x)
{
	float y;

	asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 1 / (1 + e^x), of x log2(e): one minus the sigmoid, to all digits. */
__device__ __forceinline__ float one_minus_sigmoid2(float x)
{
	return reciprocal_approx(1.0f + exp2_approx(x));
}

/* Two floats as a bf16 pair, the first in the low half. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
	uint32_t pair;

	asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
	return pair;
}

__device__ __forceinline__ float low_bf16(uint32_t pair)
{
	return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_bf16(uint32_t pair)
{
	return __uint_as_float(pair & 0xFFFF0000u);
}

/* Eight neighboring channels. */
__device__ __forceinline__ void unpack_bf16(float (&x)[8], const uint4 &packed)
{
	const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};

#pragma unroll
	for (int i = 0; i < 4; i++) {
		x[2 * i] = low_bf16(pairs[i]);
		x[2 * i + 1] = high_bf16(pairs[i]);
	}
}

__device__ __forceinline__ uint4 pack_bf16(const float (&x)[8])
{
	return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
	                  pack_bf16(x[6], x[7]));
}

} // namespace hopper

#endif
