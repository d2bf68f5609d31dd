/*
 * (I + A)^-1 diag(beta) of a strictly lower triangular A, 64 x 64, by the four warps of a
 * warpgroup, warp w's 16 rows of A in its registers as accumulators have them; into a panel, for
 * wgmma.
 *
 * Blocks are 16 x 16. Each warp inverts its diagonal block by substitution, fp32, a column a lane;
 * then, D the inverses of these, warp w takes row block w from the diagonal leftwards, in TF32:
 * T_ww = D_w, T_wj = sum_{j<m<=w} T_wm (-A_mj D_j). (bf16 products would cost more than rounding
 * the result does, and Neumann's series overflows where keys are alike.) Every product's result is
 * an operand of the next as it lies in registers, and blocks that there are not are computed like
 * the others, without a branch. A warp's steps, with a barrier of the four after the first two:
 * invert_diagonal, scale_columns, solve_rows.
 *
 * Shared memory, TRIANGLE_BYTES: rows BLOCK_STRIDE apart, the blocks of the diagonal, transposed:
 * of A, then D; and the six below it as -A_mj D_j, in the registers' order of mma_1688's second
 * operand. A lane has of a block's rows g, g + 8 and columns 2c, 2c + 1, 2c + 8, 2c + 9 (g = lane /
 * 4, c = lane % 4), eight floats in the order of accumulators; as operands columns 2c and 2c + 1
 * stand for c and c + 4.
 */
#ifndef KERNELS_HOPPER_TRIANGLE_CUH
#define KERNELS_HOPPER_TRIANGLE_CUH

#include "kernels/hopper/panels.cuh"

namespace hopper
{

/* Of fp32: no bank conflicts between rows. */
constexpr int BLOCK_STRIDE = 20, BLOCK_BYTES = 16 * BLOCK_STRIDE * 4;
constexpr int TRIANGLE_BYTES = 4 * BLOCK_BYTES + 6 * 1024;

/* Of an array with a number for each token those of this thread's columns of a 64 x 64 accumulator,
 * 16 j + 8 half + {0, 1}. */
__device__ __forceinline__ float2 token_pair(uint32_t array, int j, int half, int lane)
{
	return shared_float2(array + (16 * j + 8 * half + 2 * (lane % 4)) * 4);
}

__device__ __forceinline__ uint32_t diagonal_block(uint32_t blocks, int i)
{
	return blocks + i * BLOCK_BYTES;
}

__device__ __forceinline__ uint32_t lower_block(uint32_t blocks, int i, int j, int lane)
{
	return blocks + 4 * BLOCK_BYTES + (i * (i - 1) / 2 + j) * 1024 + lane * 16;
}

/* A's diagonal block, of which what is not below the diagonal is never read, into its place. */
__device__ __forceinline__ void store_diagonal(uint32_t block, const float *a, int lane)
{
	const uint32_t to = block + (2 * (lane % 4) * BLOCK_STRIDE + lane / 4) * 4;

#pragma unroll
	for (int i = 0; i < 8; i++)
		shared_store1(to + ((i / 4 * 8 + i % 2) * BLOCK_STRIDE + i / 2 % 2 * 8) * 4, a[i]);
}

/* The inverse of I plus a strictly lower block, both transposed, in its place; by one warp: a
 * column a lane, and each element of it as soon as it is known taken from those below. */
__device__ __forceinline__ void invert_diagonal(uint32_t block, int lane)
{
	const int column = lane % 16;
	float x[16];

	__syncwarp();
#pragma unroll
	for (int i = 0; i < 16; i++)
		x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
	for (int j = 0; j < 15; j++) {
#pragma unroll
		for (int i = (j + 1) / 4 * 4; i < 16; i += 4) {
			const float4 a = shared_float4(block + (j * BLOCK_STRIDE + i) * 4);

			if (i > j)
				x[i] = fmaf(-a.x, x[j], x[i]);
			if (i + 1 > j)
				x[i + 1] = fmaf(-a.y, x[j], x[i + 1]);
			if (i + 2 > j)
				x[i + 2] = fmaf(-a.z, x[j], x[i + 2]);
			x[i + 3] = fmaf(-a.w, x[j], x[i + 3]);
		}
	}
	__syncwarp();
	if (lane < 16) {
#pragma unroll
		for (int i = 0; i < 16; i += 4)
			shared_store4(block + (column * BLOCK_STRIDE + i) * 4, round_tf32(x[i]),
			              round_tf32(x[i + 1]), round_tf32(x[i + 2]),
			              round_tf32(x[i + 3]));
	}
}

/* Row blocks' products with the inverses of the columns' diagonal blocks: -A_wj D_j, of row block
 * w = warp. They are computed transposed, and so are right operands as they come. Those that there
 * are not, j >= w, are computed like the others, of anything, and not stored. */
__device__ __forceinline__ void scale_columns(uint32_t blocks, const float (&a)[32], int warp,
                                              int lane)
{
	float2 upper[3][2], lower[3];
	float d[3][2][4] = {};

#pragma unroll
	for (int j = 0; j < 3; j++) {
		const uint32_t inverse =
		        diagonal_block(blocks, j) + (lane / 4 * BLOCK_STRIDE + lane % 4 * 2) * 4;

		upper[j][0] = shared_float2(inverse);
		upper[j][1] = shared_float2(inverse + 32);
		lower[j] = shared_float2(inverse + 8 * BLOCK_STRIDE * 4 + 32);
	}
#pragma unroll
	for (int h = 0; h < 2; h++)
#pragma unroll
		for (int half = 0; half < 2; half++)
#pragma unroll
			for (int j = 0; j < 3; j++) {
				const float2 under = h ? lower[j] : float2{}; /* D's upper half */

				mma_1688(d[j][half], upper[j][h].x, under.x, upper[j][h].y, under.y,
				         round_tf32(-a[8 * j + 4 * h + 2 * half]),
				         round_tf32(-a[8 * j + 4 * h + 2 * half + 1]));
			}
#pragma unroll
	for (int j = 0; j < 3; j++) {
		if (j >= warp)
			break;
#pragma unroll
		for (int half = 0; half < 2; half++)
			shared_store4(lower_block(blocks, warp, j, lane) + 512 * half,
			              round_tf32(d[j][half][0]), round_tf32(d[j][half][1]),
			              round_tf32(d[j][half][2]), round_tf32(d[j][half][3]));
	}
}

/* A block of the inverse, its columns times beta, into the panel that wgmma reads. */
__device__ __forceinline__ void store_solved(uint32_t panel, const float (&t)[2][4], int i, int j,
                                             uint32_t beta, int lane)
{
	float x[8];

#pragma unroll
	for (int half = 0; half < 2; half++) {
		const float2 b = token_pair(beta, j, half, lane);

#pragma unroll
		for (int r = 0; r < 2; r++) {
			x[4 * half + 2 * r] = t[half][2 * r] * b.x;
			x[4 * half + 2 * r + 1] = t[half][2 * r + 1] * b.y;
		}
	}
	store_block(plain_block(panel, 16 * i, 16 * j, lane), x);
}

/* Row block w = warp of (I + A)^-1 diag(beta) into a panel, from the blocks: from the diagonal
 * leftwards T_ww = D_w, T_wj = sum_{j<m<=w} T_wm (-A_mj D_j). Here, too, blocks that there are not
 * are computed, of some that there are. */
__device__ __forceinline__ void solve_rows(uint32_t blocks, uint32_t panel, uint32_t beta, int warp,
                                           int lane)
{
	const uint32_t inverse =
	        diagonal_block(blocks, warp) + (lane % 4 * 2 * BLOCK_STRIDE + lane / 4) * 4;
	float t[4][2][4] = {}; /* by the distance from the diagonal */
	float4 right[6][2];

#pragma unroll
	for (int half = 0; half < 2; half++)
#pragma unroll
		for (int r = half; r < 2; r++)
#pragma unroll
			for (int e = 0; e < 2; e++)
				t[0][half][2 * r + e] = shared_float(
				        inverse + ((8 * half + e) * BLOCK_STRIDE + 8 * r) * 4);
#pragma unroll
	for (int back = 1; back < 4; back++)
#pragma unroll
		for (int m = 0; m < back; m++) {
			const uint32_t at =
			        lower_block(blocks, max(warp - m, 1), max(warp - back, 0), lane);

#pragma unroll
			for (int h = 0; h < 2; h++)
				right[back * (back - 1) / 2 + m][h] = shared_float4(at + 512 * h);
		}
#pragma unroll
	for (int back = 1; back < 4; back++) {
#pragma unroll
		for (int m = 0; m < back; m++)
#pragma unroll
			for (int h = 0; h < 2; h++) {
				const float4 x = right[back * (back - 1) / 2 + m][h];

				mma_1688(t[back][0], t[m][h][0], t[m][h][2], t[m][h][1], t[m][h][3],
				         x.x, x.y);
				mma_1688(t[back][1], t[m][h][0], t[m][h][2], t[m][h][1], t[m][h][3],
				         x.z, x.w);
			}
#pragma unroll
		for (int half = 0; half < 2; half++)
#pragma unroll
			for (int i = 0; i < 4; i++)
				t[back][half][i] = round_tf32(t[back][half][i]);
	}
#pragma unroll
	for (int back = 0; back < 4; back++) {
		if (back > warp)
			break;
		store_solved(panel, t[back], warp, warp - back, beta, lane);
	}
}

} // namespace hopper

#endif
