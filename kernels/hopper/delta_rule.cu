/*
 * The delta rule on sm_90a, DeltaNet and with decays that are one number per head and token
 * Gated DeltaNet:
 *   S <- a_t S; v'_t = beta_t (v_t - k_t S); S <- S + k_t^T v'_t; o_t = scale q_t S,
 * chunkwise, 64 tokens at a time, with the state on the chip.
 *
 * With G_t the sum of log2 a over the chunk's tokens up to t and S the state before the chunk,
 *   (I + A) v' = diag(beta) (v - diag(2^G) k S),  A_ts = beta_t 2^(G_t - G_s) k_t.k_s, s < t,
 * and from there on v' takes the place of v in the plain rule. The triangular
 * inverse does not depend on the state: one warpgroup computes it ahead, while
 * the state's warpgroups go through four dependent products per chunk:
 *   x = S^T k^T, o = S^T q^T;  v' = (v - 2^G x) ((I + A)^-1 diag(beta))^T;
 *   o += v' P^T;  S^T += (decayed v') k
 * all transposed, so that every left operand is already in the registers.
 *
 * The inverse: each warp inverts a diagonal block of 16 by substitution, fp32, a column a
 * lane; then, D the diagonal blocks' inverses, block column j of the inverse is T_jj = D_j,
 * T_ij = sum_{j<=m<i} (-D_i A_im) T_mj: a warp a column, TF32.
 *
 * Roles and shared memory are the walk's (walk.cuh); the inverse and the scores have a ring each.
 * Limit: the inverse. 2.55 ms at 16 heads x 128, T = 4096 (1.98 GHz), whose bytes take 1.03.
 * docs/kernels/delta_rule.md.
 * wgmma in: delta_kernel
 */
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/walk.cuh"

using namespace hopper;

namespace
{

struct delta_rule {
	static constexpr bool SOLVES = true, BACKWARD = false, FOURTH = false, COPIES = false;

	template <int DK, int SLICES>
	static __device__ void score(const parameters &p, uint32_t shared);
	template <int DK, int SLICES, bool OUTPUTS>
	static __device__ float walk(state_walk<DK, SLICES, OUTPUTS, delta_rule> &w, const piece &x,
	                             int chunk);
};

template <int DK, int SLICES> using shape = walk_shape<DK, SLICES, delta_rule>;

/* The numbers of a thread of a chunk's tokens: those of its columns of a 64 x 64 accumulator,
 * 16 j + 8 half + {0, 1}. */
__device__ __forceinline__ float2 token_pair(uint32_t array, int j, int half, int lane)
{
	return shared_float2(array + (16 * j + 8 * half + 2 * (lane % 4)) * 4);
}

template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ float delta_rule::walk(state_walk<DK, SLICES, OUTPUTS, delta_rule> &w,
                                                  const piece &x, int chunk)
{
	using S = typename state_walk<DK, SLICES, OUTPUTS, delta_rule>::S;
	const uint32_t at = w.shared + w.stage.slot * S::STAGE_BYTES;
	const uint32_t powers = w.shared + S::POWERS + w.stage.slot * S::POWERS_BYTES;
	const uint32_t values = at + S::V + w.warpgroup * PANEL_BYTES;
	const uint64_t q = matrix_descriptor(at + S::Q, 16),
	               keys = matrix_descriptor(at + S::K, 16);
	const uint64_t k = matrix_descriptor(at + S::K, PANEL_BYTES);
	const uint64_t scores =
	        matrix_descriptor(w.shared + S::SCORES + w.slot.slot * PANEL_BYTES, 16);
	const uint64_t solved =
	        matrix_descriptor(w.shared + S::SOLVED + w.slot.slot * PANEL_BYTES, 16);
	uint32_t packed[DK / 4], moved[16], decayed[16];
	float y[32], o[32];

	barrier_wait(w.shared + S::FULL + w.stage.slot * 8, w.stage.parity);
	const float whole = shared_float(powers + WHOLE);
#pragma unroll
	for (int i = 0; i < DK / 4; i++) {
		packed[i] = pack_bf16(w.s[0][2 * i], w.s[0][2 * i + 1]);
		w.s[0][2 * i] *= whole;
		w.s[0][2 * i + 1] *= whole;
	}
	pin(packed);
	pin(w.s[0]);
	pin(y);
	pin(o);
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < DK / 16; step++)
		wgmma_rs_k_major(y, &packed[4 * step],
		                 keys + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16, step > 0);
#pragma unroll
	for (int step = 0; step < DK / 16; step++)
		wgmma_rs_k_major(o, &packed[4 * step],
		                 q + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16, step > 0);
	wgmma_commit();
	wgmma_wait<0>(); /* both: the packed state'w.s registers are needed */
	pin(y);
	pin(o);
	pin(packed);
#pragma unroll
	for (int j = 0; j < 4; j++) {
		load_transposed_x4(transposed_block(values, 16 * j, 16 * w.warp, w.lane),
		                   &moved[4 * j]);
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const float2 power = token_pair(powers + FROM_START, j, half, w.lane);
#pragma unroll
			for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; i++)
				moved[i] = pack_bf16(
				        fmaf(-power.x, y[2 * i], low_bf16(moved[i])),
				        fmaf(-power.y, y[2 * i + 1], high_bf16(moved[i])));
		}
	}
	barrier_wait(w.shared + S::SOLVED_FULL + w.slot.slot * 8, w.slot.parity);
	pin(moved);
	pin(y);
	wgmma_fence();
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs_k_major(y, &moved[4 * j], solved + j * 32 / 16, j > 0);
	wgmma_commit();
#pragma unroll
	for (int i = 0; i < 32; i += 4) {
		const float2 power = token_pair(powers + FROM_START, i / 8, i / 4 % 2, w.lane);
		const float x0 = w.p.scale * power.x, x1 = w.p.scale * power.y;

		o[i] *= x0;
		o[i + 1] *= x1;
		o[i + 2] *= x0;
		o[i + 3] *= x1;
	}
	wgmma_wait<0>();
	pin(y);
	pin(moved);
#pragma unroll
	for (int i = 0; i < 16; i++) {
		const float2 power = token_pair(powers + TO_END, i / 4, i / 2 % 2, w.lane);

		moved[i] = pack_bf16(y[2 * i], y[2 * i + 1]);
		decayed[i] = pack_bf16(y[2 * i] * power.x, y[2 * i + 1] * power.y);
	}
	barrier_wait(w.shared + S::SCORES_FULL + w.slot.slot * 8, w.slot.parity);
	pin(moved);
	pin(decayed);
	pin(o);
	pin(w.s[0]);
	wgmma_fence();
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs_k_major(o, &moved[4 * j], scores + j * 32 / 16, true);
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs(w.s[0], &decayed[4 * j], k + j * 2048 / 16, true);
	wgmma_commit();
	wgmma_wait<0>();
	pin(o);
	pin(w.s[0]);
	pin(moved);
	pin(decayed);
	__syncwarp();
	w.release(S::SCORES_EMPTY + w.slot.slot * 8);
	w.slot.advance();
	w.release(S::EMPTY + w.stage.slot * 8);
	w.stage.advance();
	w.store(x, chunk, o);
	return whole;
}

/* ---- the triangular inverse. Blocks are 16 x 16, of fp32 rounded to TF32. */

/* Lower blocks in the order (0,0), (1,0), (1,1), ...; then (1,0), (2,0), (2,1) of the inverse. */
__device__ __forceinline__ uint32_t lower_block(uint32_t blocks, int i, int j)
{
	return blocks + (i * (i + 1) / 2 + j) * BLOCK_BYTES;
}

__device__ __forceinline__ uint32_t inverse_block(uint32_t blocks, int i, int j)
{
	return i == j ? lower_block(blocks, i, i)
	              : blocks + (10 + i * (i - 1) / 2 + j) * BLOCK_BYTES;
}

__device__ __forceinline__ float round_tf32(float x)
{
	uint32_t y;

	asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
	return __uint_as_float(y);
}

/* The inverse of I plus a strictly lower block, in its place; by one warp. */
__device__ __forceinline__ void invert_diagonal(uint32_t block, int lane)
{
	const int column = lane % 16;
	float x[16];

#pragma unroll
	for (int r = 0; r < 16; r++) {
		float even = r == column ? 1.0f : 0.0f, odd = 0.0f;

#pragma unroll
		for (int j = 0; j < r; j += 2) {
			const float2 a = shared_float2(block + (r * BLOCK_STRIDE + j) * 4);

			even = fmaf(-a.x, x[j], even);
			if (j + 1 < r)
				odd = fmaf(-a.y, x[j + 1], odd);
		}
		x[r] = even + odd;
	}
	__syncwarp();
	if (lane < 16) {
#pragma unroll
		for (int r = 0; r < 16; r++)
			shared_store1(block + (r * BLOCK_STRIDE + column) * 4, round_tf32(x[r]));
	}
	__syncwarp();
}

/* d (the two halves of 16 columns, as mma.m16n8 leaves them) += a b. */
__device__ __forceinline__ void multiply_blocks(float (&d)[2][4], uint32_t a, uint32_t b, int lane)
{
	const int g = lane / 4, c = lane % 4;

#pragma unroll
	for (int step = 0; step < 16; step += 8) {
		const uint32_t left = a + (g * BLOCK_STRIDE + step + c) * 4;
		const float a0 = shared_float(left);
		const float a1 = shared_float(left + 8 * BLOCK_STRIDE * 4);
		const float a2 = shared_float(left + 16);
		const float a3 = shared_float(left + 8 * BLOCK_STRIDE * 4 + 16);

#pragma unroll
		for (int half = 0; half < 2; half++) {
			const uint32_t right = b + ((step + c) * BLOCK_STRIDE + 8 * half + g) * 4;
			const float b0 = shared_float(right);
			const float b1 = shared_float(right + 4 * BLOCK_STRIDE * 4);

			asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
			             "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
			             "{%0, %1, %2, %3};"
			             : "+f"(d[half][0]), "+f"(d[half][1]), "+f"(d[half][2]),
			               "+f"(d[half][3])
			             : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)),
			               "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
			               "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
		}
	}
}

__device__ __forceinline__ void store_block(uint32_t block, const float (&d)[2][4], float sign,
                                            int lane)
{
#pragma unroll
	for (int half = 0; half < 2; half++)
#pragma unroll
		for (int r = 0; r < 2; r++)
			shared_store2(block + ((lane / 4 + 8 * r) * BLOCK_STRIDE + 8 * half +
			                       2 * (lane % 4)) *
			                              4,
			              round_tf32(sign * d[half][2 * r]),
			              round_tf32(sign * d[half][2 * r + 1]));
}

/* A block of the inverse, its columns times beta, into the panel that wgmma reads. */
__device__ __forceinline__ void store_solved(uint32_t panel, const float (&d)[2][4], int i, int j,
                                             uint32_t beta, int lane)
{
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int column = 16 * j + 8 * half + 2 * (lane % 4);
		const float2 b = shared_float2(beta + column * 4);

#pragma unroll
		for (int r = 0; r < 2; r++)
			shared_store(
			        panel + swizzle_128((16 * i + lane / 4 + 8 * r) * 128 + column * 2),
			        static_cast<int>(
			                pack_bf16(d[half][2 * r] * b.x, d[half][2 * r + 1] * b.y)));
	}
}

/* This warp's 16 rows of A from the products k k^T, into blocks. */
__device__ __forceinline__ void store_system(uint32_t blocks, const float (&s)[32], uint32_t powers,
                                             int warp, int lane)
{
	const int row = 16 * warp + lane / 4;
	float g[2], beta[2];

#pragma unroll
	for (int r = 0; r < 2; r++) {
		g[r] = shared_float(powers + LOG_DECAY + (row + 8 * r) * 4);
		beta[r] = shared_float(powers + BETA + (row + 8 * r) * 4);
	}
#pragma unroll
	for (int n = 0; n < 8; n++) {
		const int key = 8 * n + 2 * (lane % 4);
		const float2 from = shared_float2(powers + LOG_DECAY + key * 4);

		if (n / 2 > warp)
			break;
#pragma unroll
		for (int r = 0; r < 2; r++) {
			const int t = row + 8 * r;
			const float *pair = &s[4 * n + 2 * r];

			shared_store2(
			        lower_block(blocks, warp, n / 2) +
			                ((lane / 4 + 8 * r) * BLOCK_STRIDE + key % 16) * 4,
			        key < t ? round_tf32(beta[r] * pair[0] * exp2_approx(g[r] - from.x))
			                : 0.0f,
			        key + 1 < t
			                ? round_tf32(beta[r] * pair[1] * exp2_approx(g[r] - from.y))
			                : 0.0f);
		}
	}
	__syncwarp();
}

/* (I + A)^-1 diag(beta) into a panel, from the blocks of A; by the four warps of a warpgroup. */
__device__ __forceinline__ void solve(uint32_t blocks, uint32_t panel, uint32_t beta, int warp,
                                      int lane)
{
	invert_diagonal(lower_block(blocks, warp, warp), lane);
	for (int m = 0; m < warp; m++) {
		float d[2][4] = {};

		multiply_blocks(d, lower_block(blocks, warp, warp), lower_block(blocks, warp, m),
		                lane);
		__syncwarp();
		store_block(lower_block(blocks, warp, m), d, -1.0f, lane);
	}
	named_barrier_sync(4, 128);
	for (int i = warp; i < 4; i++) {
		float d[2][4] = {};

		if (i == warp) {
#pragma unroll
			for (int n = 0; n < 4; n++) {
				const float2 pair =
				        shared_float2(lower_block(blocks, i, i) +
				                      ((lane / 4 + 8 * (n % 2)) * BLOCK_STRIDE +
				                       8 * (n / 2) + 2 * (lane % 4)) *
				                              4);

				d[n / 2][2 * (n % 2)] = pair.x;
				d[n / 2][2 * (n % 2) + 1] = pair.y;
			}
		}
		for (int m = warp; m < i; m++)
			multiply_blocks(d, lower_block(blocks, i, m),
			                inverse_block(blocks, m, warp), lane);
		if (i > warp && i < 3) {
			store_block(inverse_block(blocks, i, warp), d, 1.0f, lane);
			__syncwarp();
		}
		store_solved(panel, d, i, warp, beta, lane);
	}
}

/* Of chunk after chunk: first the inverse, for which the state waits first, then the scores. */
template <int DK, int SLICES>
__device__ __forceinline__ void delta_rule::score(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
	const int count = piece_count<true>(p), lane = threadIdx.x % 32;
	const int warp = threadIdx.x / 32 % 4;
	const uint32_t blocks = shared + S::BLOCKS_16;
	slot_ring<S::STAGES> stage;
	slot_ring<SCORE_SLOTS> slot;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);

#pragma unroll 1
		for (int chunk = x.first; chunk < x.last; chunk++) {
			const uint32_t at = shared + stage.slot * S::STAGE_BYTES;
			const uint32_t powers = shared + S::POWERS + stage.slot * S::POWERS_BYTES;
			const uint32_t scores = shared + S::SCORES + slot.slot * PANEL_BYTES;
			const uint32_t solved = shared + S::SOLVED + slot.slot * PANEL_BYTES;
			float s[32];

			barrier_wait(shared + S::FULL + stage.slot * 8, stage.parity);
			issue_scores<DK>(s, at + S::K, at + S::K);
			wgmma_wait<0>();
			pin(s);
			/* The other warps may still read the last chunk's blocks. */
			named_barrier_sync(4, 128);
			store_system(blocks, s, powers, warp, lane);
			barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
			solve(blocks, solved, powers + BETA, warp, lane);
			warp_publish(shared + S::SOLVED_FULL + slot.slot * 8);
			issue_scores<DK>(s, at + S::Q, at + S::K);
			wgmma_wait<0>();
			pin(s);
			decay_scores(s, powers, p.scale, warp, lane);
			warp_arrive(shared + S::EMPTY + stage.slot * 8);
			store_scores(scores, s, warp, lane);
			warp_publish(shared + S::SCORES_FULL + slot.slot * 8);
			stage.advance();
			slot.advance();
		}
	}
}

template <int DK, int SLICES>
__global__ void __launch_bounds__(shape<DK, SLICES>::THREADS, 1)
        delta_kernel(const __grid_constant__ parameters p)
{
	using S = shape<DK, SLICES>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0)
		initialise_barriers<DK, SLICES, true, delta_rule>(shared);
	/* The inverse's upper blocks are zero, and stay so. */
	for (int i = threadIdx.x; i < SCORE_SLOTS * PANEL_BYTES / 8; i += S::THREADS)
		shared_store2(shared + S::SOLVED + 8 * i, 0.0f, 0.0f);
	fence_async_proxy();
	__syncthreads();
	walk_block<DK, SLICES, true, delta_rule>(p, shared);
}

template <int DK, int SLICES>
enum status run_delta(struct device *device, const struct matrix_recurrence_args *a)
{
	const plan x = make_plan(a, 0);
	parameters p;
	enum status status = fill_parameters(p, a, x, NULL);

	if (status != STATUS_OK)
		return status;
	return submit(device, delta_kernel<DK, SLICES>, turns(device, x.walks),
	              shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BYTES, p);
}

} // namespace

extern "C" const char *hopper_delta_rule_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->rule != RULE_DELTA)
		return "only the delta rule";
	if (a->chunk && a->chunk != CHUNK)
		return "chunk must be 64, or 0";
	if (a->d_k > 128)
		return "d_k must be at most 128";
	return walk_unsupported(device, a);
}

extern "C" enum status hopper_delta_rule(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->d_k <= 64)
		return a->d_v <= 64 ? run_delta<64, 1>(device, a) : run_delta<64, 2>(device, a);
	return a->d_v <= 64 ? run_delta<128, 1>(device, a) : run_delta<128, 2>(device, a);
}
