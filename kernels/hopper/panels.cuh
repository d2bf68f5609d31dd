/*
 * Tiles as panels of 64 tokens x 64 channels, 128-byte swizzle, 8192 bytes: where their blocks of
 * 16 x 16 lie, and accumulators into them.
 */
#ifndef KERNELS_HOPPER_PANELS_CUH
#define KERNELS_HOPPER_PANELS_CUH

#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"

namespace hopper
{

constexpr int PANEL_BYTES = 64 * 64 * 2;

/* Where the dynamic shared memory's tiles begin: 1024 bytes more are asked for. */
__device__ __forceinline__ uint32_t aligned_base(const void *dynamic)
{
	return (shared_address(dynamic) + 1023) & ~1023u;
}

/* A tile of `rows` x D, as D/64 swizzled panels. */
template <int D, int rows>
__device__ __forceinline__ void load_panels(uint32_t tile, uint32_t full, const CUtensorMap *map,
                                            int token, int head, int batch)
{
#pragma unroll
	for (int panel = 0; panel < D / 64; panel++)
		tensor_load(tile + panel * rows * 128, map, full, panel * 64, token, head, batch);
}

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

/* Of the warpgroups after the producer's; the shuffle tells the compiler that it is uniform. */
__device__ __forceinline__ int warpgroup_index()
{
	return static_cast<int>(__shfl_sync(~0u, threadIdx.x / 128, 0)) - 1;
}

/* acc (64 x n) = A B^T: A in registers, such as a state, B's channels in panels. Fence before it,
 * commit after it. */
template <int n, int operands>
__device__ __forceinline__ void issue_panels(float (&acc)[n], const uint32_t (&a)[operands],
                                             uint64_t b)
{
#pragma unroll
	for (int step = 0; step < operands / 4; step++)
		wgmma_rs_k_major(acc, &a[4 * step],
		                 b + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16, step > 0);
}

/* 16 x 16 of a wgmma accumulator, eight floats of a thread, as bf16 into such a block. */
__device__ __forceinline__ void store_block(uint32_t block, const float *x)
{
	store_matrix_x4(block, pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
	                pack_bf16(x[6], x[7]));
}

__device__ __forceinline__ void store_transposed_block(uint32_t block, const float *x)
{
	store_transposed_x4(block, pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
	                    pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

} // namespace hopper

#endif
