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
 * The inverse T, by blocks of 16 x 16: each warp inverts a diagonal block by substitution, fp32, a
 * column a lane; then, D the diagonal blocks' inverses, warp w takes row block w from the diagonal
 * leftwards, T_ww = D_w, T_wj = sum_{j<m<=w} T_wm (-A_mj D_j), TF32. A's blocks stay in the
 * registers that k k^T came in, and every product's result is an operand of the next as it lies in
 * registers.
 *
 * Roles and shared memory are the walk's (walk.cuh); the inverse and the scores have a ring each,
 * and go through it together. Walks too few for the machine are cut into segments, and each begins
 * so many chunks early that of the state before nothing is left: no state goes through memory, and
 * where gates are weak the last one's walk is the whole sequence. docs/kernels/delta_rule.md.
 * wgmma in: delta_kernel
 */
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/walk.cuh"

using namespace hopper;

namespace
{

struct delta_rule {
	static constexpr bool SOLVES = true, BACKWARD = false;

	template <int DK, int SLICES>
	static __device__ void score(const parameters &p, uint32_t shared);
	/* A chunk, with its outputs or for the state alone. */
	template <int DK, int SLICES>
	static __device__ float walk(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x,
	                             int chunk)
	{
		return step<DK, SLICES, true>(w, x, chunk);
	}
	template <int DK, int SLICES>
	static __device__ void approach(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x,
	                                int chunk)
	{
		step<DK, SLICES, false>(w, x, chunk);
	}
	template <int DK, int SLICES>
	static __device__ void finish(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x)
	{
		if (SLICES == 1)
			w.store(x, x.last - 1, w.o);
	}
	template <int DK, int SLICES, bool OUTPUTS>
	static __device__ float step(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x,
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
__device__ __forceinline__ float delta_rule::step(state_walk<DK, SLICES, true, delta_rule> &w,
                                                  const piece &x, int chunk)
{
	using S = typename state_walk<DK, SLICES, true, delta_rule>::S;
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
	/* Whether o goes on while the residual is formed: where there are registers for both. With
	 * one slice it leaves while the next chunk's x is computed, with two while the state is. */
	constexpr bool OVERLAP = DK == 64 || SLICES == 1;
	uint32_t packed[DK / 4], moved[16], decayed[16];
	float y[32], (&o)[32] = w.o;

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
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < DK / 16; step++)
		wgmma_rs_k_major(y, &packed[4 * step],
		                 keys + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16, step > 0);
	wgmma_commit();
	if (OUTPUTS) {
		if (SLICES == 1 && chunk > x.first)
			w.store(x, chunk - 1, o);
		pin(o);
		wgmma_fence();
#pragma unroll
		for (int step = 0; step < DK / 16; step++)
			wgmma_rs_k_major(o, &packed[4 * step],
			                 q + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16,
			                 step > 0);
		wgmma_commit();
	}
	wgmma_wait<OUTPUTS && OVERLAP ? 1 : 0>();
	pin(y);
	if (OUTPUTS && !OVERLAP)
		pin(o);
	if (!OUTPUTS || !OVERLAP)
		pin(packed);
#pragma unroll
	for (int j = 0; j < 4; j++)
		load_transposed_x4(transposed_block(values, 16 * j, 16 * w.warp, w.lane),
		                   &moved[4 * j]);
#pragma unroll
	for (int i = 0; i < 16; i += 2) {
		const float2 power = token_pair(powers + FROM_START, i / 4, i / 2 % 2, w.lane);

#pragma unroll
		for (int r = i; r < i + 2; r++)
			moved[r] = pack_bf16(fmaf(-power.x, y[2 * r], low_bf16(moved[r])),
			                     fmaf(-power.y, y[2 * r + 1], high_bf16(moved[r])));
	}
	barrier_wait(w.shared + S::SCORES_FULL + w.slot.slot * 8, w.slot.parity);
	pin(moved);
	pin(y);
	wgmma_fence();
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs_k_major(y, &moved[4 * j], solved + j * 32 / 16, j > 0);
	wgmma_commit();
	if (OUTPUTS && OVERLAP) {
		wgmma_wait<1>();
		pin(o);
		pin(packed);
	}
	if (OUTPUTS) {
#pragma unroll
		for (int i = 0; i < 32; i += 4) {
			const float2 power =
			        token_pair(powers + FROM_START, i / 8, i / 4 % 2, w.lane);
			const float x0 = w.p.scale * power.x, x1 = w.p.scale * power.y;

			o[i] *= x0;
			o[i + 1] *= x1;
			o[i + 2] *= x0;
			o[i + 3] *= x1;
		}
	}
	wgmma_wait<0>();
	pin(y);
	pin(moved);
#pragma unroll
	for (int i = 0; i < 16; i += 2) {
		const float2 power = token_pair(powers + TO_END, i / 4, i / 2 % 2, w.lane);

#pragma unroll
		for (int r = i; r < i + 2; r++) {
			moved[r] = pack_bf16(y[2 * r], y[2 * r + 1]);
			decayed[r] = pack_bf16(y[2 * r] * power.x, y[2 * r + 1] * power.y);
		}
	}
	pin(decayed);
	pin(w.s[0]);
	if (OUTPUTS) {
		pin(moved);
		pin(o);
	}
	wgmma_fence();
	if (OUTPUTS) {
#pragma unroll
		for (int j = 0; j < CHUNK / 16; j++)
			wgmma_rs_k_major(o, &moved[4 * j], scores + j * 32 / 16, true);
		wgmma_commit();
	}
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs(w.s[0], &decayed[4 * j], k + j * 2048 / 16, true);
	wgmma_commit();
	if (OUTPUTS && SLICES == 2) {
		wgmma_wait<1>();
		pin(o);
		pin(moved);
		w.store(x, chunk, o);
	}
	wgmma_wait<0>();
	pin(w.s[0]);
	pin(decayed);
	if (OUTPUTS && SLICES == 1) {
		pin(o);
		pin(moved);
	}
	w.release(S::SCORES_EMPTY + w.slot.slot * 8);
	w.slot.advance();
	__syncwarp();
	w.release(S::EMPTY + w.stage.slot * 8);
	w.stage.advance();
	return whole;
}

/* ---- the triangular inverse, by blocks of 16 x 16, fp32. Shared memory has, rows BLOCK_STRIDE
 * apart, those of the diagonal transposed: of A, then their inverses D; and the six below it as
 * -A_mj D_j, in the registers' order of mma_1688's second operand. A lane has of a block's rows
 * g, g + 8 and columns 2c, 2c + 1, 2c + 8, 2c + 9 (g = lane / 4, c = lane % 4), eight floats in the
 * order of accumulators; as operands columns 2c and 2c + 1 stand for c and c + 4. */

__device__ __forceinline__ uint32_t diagonal_block(uint32_t blocks, int i)
{
	return blocks + i * BLOCK_BYTES;
}

__device__ __forceinline__ uint32_t lower_block(uint32_t blocks, int i, int j, int lane)
{
	return blocks + 4 * BLOCK_BYTES + (i * (i - 1) / 2 + j) * 1024 + lane * 16;
}

/*
 * This warp's 16 rows of A = beta 2^(G_t - G_s) k k^T and of the scores scale 2^(G_t - G_s) q k^T,
 * from the products; no exponent that counts is above 0. A's diagonal block goes to shared memory,
 * where what is not below the diagonal is never read; the scores go to their panel.
 */
__device__ __forceinline__ void decay_products(float (&a)[32], float (&s)[32], uint32_t powers,
                                               uint32_t blocks, uint32_t scores, float scale,
                                               int warp, int lane)
{
	const int own = lane / 4, row = 16 * warp + own, key = 2 * (lane % 4);
	const uint32_t log_decay = powers + LOG_DECAY;
	const float g[2] = {shared_float(log_decay + row * 4),
	                    shared_float(log_decay + row * 4 + 32)};
	const float beta[2] = {shared_float(powers + BETA + row * 4),
	                       shared_float(powers + BETA + row * 4 + 32)};
	float2 from[2] = {token_pair(log_decay, 0, 0, lane), token_pair(log_decay, 0, 1, lane)};

#pragma unroll
	for (int j = 0; j < 4; j++) {
		float2 next[2];

		if (j > warp)
			break;
#pragma unroll
		for (int half = 0; half < 2; half++)
			next[half] = token_pair(log_decay, j < 3 ? j + 1 : 0, half, lane);
#pragma unroll
		for (int half = 0; half < 2; half++)
#pragma unroll
			for (int r = 0; r < 2; r++) {
				const int i = 8 * j + 4 * half + 2 * r;
				const float x0 = exp2_approx(g[r] - from[half].x);
				const float x1 = exp2_approx(g[r] - from[half].y);

				a[i] *= beta[r] * x0;
				a[i + 1] *= beta[r] * x1;
				s[i] *= scale * x0;
				s[i + 1] *= scale * x1;
			}
		if (j == warp) {
			const uint32_t to =
			        diagonal_block(blocks, warp) + (key * BLOCK_STRIDE + own) * 4;

#pragma unroll
			for (int i = 0; i < 8; i++) {
				const int column = i / 4 * 8 + i % 2, below = i / 2 % 2 * 8;

				shared_store1(to + (column * BLOCK_STRIDE + below) * 4,
				              a[8 * j + i]);
				if (key + column > own + below)
					s[8 * j + i] = 0.0f;
			}
		}
		store_block(plain_block(scores, 16 * warp, 16 * j, lane), &s[8 * j]);
#pragma unroll
		for (int half = 0; half < 2; half++)
			from[half] = next[half];
	}
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

__device__ __forceinline__ int piece_chunks(const parameters &p, int number)
{
	const piece x = locate(p, number);

	return x.last - x.begin;
}

/* Of chunk after chunk the scores and the inverse, for which nobody waits but the state. */
template <int DK, int SLICES>
__device__ __forceinline__ void delta_rule::score(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
	/* Whether the next chunk's products run beside a solution: where registers hold both. */
	constexpr bool AHEAD = SLICES == 1;
	const int count = piece_count<true>(p), lane = threadIdx.x % 32;
	const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
	const uint32_t blocks = shared + S::BLOCKS_16;
	slot_ring<S::STAGES> stage;
	slot_ring<SCORE_SLOTS> slot;
	float a[32], s[32];
	const auto issue = [&](const slot_ring<S::STAGES> &of) {
		const uint32_t at = shared + of.slot * S::STAGE_BYTES;

		barrier_wait(shared + S::FULL + of.slot * 8, of.parity);
		issue_scores<DK>(a, at + S::K, at + S::K);
		issue_scores<DK>(s, at + S::Q, at + S::K);
	};
	int number = blockIdx.x, left = piece_chunks(p, number);

	if (AHEAD)
		issue(stage);
#pragma unroll 1
	while (left > 0) {
		const uint32_t powers = shared + S::POWERS + stage.slot * S::POWERS_BYTES;
		const uint32_t scores = shared + S::SCORES + slot.slot * PANEL_BYTES;
		const uint32_t solved = shared + S::SOLVED + slot.slot * PANEL_BYTES;
		const uint32_t empty = shared + S::EMPTY + stage.slot * 8;

		if (!AHEAD)
			issue(stage);
		wgmma_wait<0>();
		pin(a);
		pin(s);
		barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
		decay_products(a, s, powers, blocks, scores, p.scale, warp, lane);
		invert_diagonal(diagonal_block(blocks, warp), lane);
		named_barrier_sync(4, 128);
		scale_columns(blocks, a, warp, lane);
		if (--left == 0) {
			number += gridDim.x;
			left = number < count ? piece_chunks(p, number) : 0;
		}
		if (left > 0)
			stage.advance();
		if (AHEAD) /* after the last chunk its own once more, for nobody */
			issue(stage);
		named_barrier_sync(4, 128);
		solve_rows(blocks, solved, powers + BETA, warp, lane);
		warp_arrive(empty);
		warp_publish(shared + S::SCORES_FULL + slot.slot * 8);
		slot.advance();
	}
	if (AHEAD) {
		wgmma_wait<0>();
		pin(a);
		pin(s);
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
	/* The upper blocks of the inverse and the scores are zero, and stay so. */
	for (int i = threadIdx.x; i < SCORE_SLOTS * PANEL_BYTES / 16; i += S::THREADS) {
		shared_store4(shared + S::SOLVED + 16 * i, 0.0f, 0.0f, 0.0f, 0.0f);
		shared_store4(shared + S::SCORES + 16 * i, 0.0f, 0.0f, 0.0f, 0.0f);
	}
	fence_async_proxy();
	__syncthreads();
	walk_block<DK, SLICES, true, delta_rule>(p, shared);
}

/* ---- segments, for walks too few to fill the machine. A segment's walk begins so many chunks
 * earlier that of the state before them nothing is left. */

/* Bits of decay after which that is so: fp32 has 149 between 1 and its least number. */
constexpr float FORGOTTEN = 160.0f;

constexpr int SCAN_WARPS = 32, SCAN_CHUNKS = 2; /* chunks of a warp at a time */

/*
 * Where the walk of a segment begins: from its first chunk back until the decays in between leave
 * nothing, or to the sequence's start. Between them I - beta k^T k must not expand: 0 <= beta |k|^2
 * <= 2; otherwise, too, from the start.
 */
__global__ void __launch_bounds__(32 * SCAN_WARPS)
        begins_kernel(const __grid_constant__ parameters p, struct view k)
{
	__shared__ float sums[SCAN_WARPS * SCAN_CHUNKS];
	const int pairs = p.walks / p.slices, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	const int first = static_cast<int>(blockIdx.x) / pairs * p.segment_chunks;
	piece x = {};
	float sum = 0.0f;
	bool expands = false;
	int begin = first;

	x.b = static_cast<int>(blockIdx.x) % pairs / p.n_heads;
	x.h = static_cast<int>(blockIdx.x) % p.n_heads;
	const token_decays decays(p, x);

	while (begin > 0 && !(sum <= -FORGOTTEN)) {
		float own[SCAN_CHUNKS] = {};

#pragma unroll
		for (int i = 0; i < 2 * SCAN_CHUNKS; i++) {
			const int chunk = begin - 1 - SCAN_CHUNKS * warp - i / 2;
			const int token = chunk * CHUNK + 2 * lane + i % 2;

			own[i / 2] += decays.log2(decays.load(token), token);
		}
#pragma unroll
		for (int i = 0; i < SCAN_CHUNKS; i++) {
#pragma unroll
			for (int offset = 16; offset > 0; offset /= 2)
				own[i] += __shfl_xor_sync(~0u, own[i], offset);
			if (lane == 0)
				sums[SCAN_CHUNKS * warp + i] = own[i];
		}
		__syncthreads();
		for (int i = 0; i < SCAN_WARPS * SCAN_CHUNKS && begin > 0 && !(sum <= -FORGOTTEN);
		     i++, begin--)
			sum += sums[i];
		__syncthreads();
	}
	const auto *keys =
	        static_cast<const __nv_bfloat16 *>(k.data) + x.b * k.batch + x.h * k.head;
	const auto *betas = static_cast<const __nv_bfloat16 *>(p.beta.data) + x.b * p.beta.batch +
	                    x.h * p.beta.head;
	const int channel = threadIdx.x % 16 * 8;

#pragma unroll 4
	for (int token = begin * CHUNK + static_cast<int>(threadIdx.x) / 16;
	     begin > 0 && token < first * CHUNK; token += 2 * SCAN_WARPS) {
		const float beta = __bfloat162float(betas[token * p.beta.token]);
		float square = 0.0f;

#pragma unroll
		for (int i = 0; i < 8; i++) {
			if (channel + i < p.d_k) {
				const float e =
				        __bfloat162float(keys[token * k.token + channel + i]);

				square = fmaf(e, e, square);
			}
		}
#pragma unroll
		for (int offset = 8; offset > 0; offset /= 2)
			square += __shfl_xor_sync(~0u, square, offset);
		expands |= !(beta >= 0.0f && beta * square <= 2.0f);
	}
	if (__syncthreads_or(expands))
		begin = 0;
	if (threadIdx.x == 0)
		p.begins[blockIdx.x] = begin;
}

/* What is not finite does not decay: after a segment that leaves such a state the channels
 * concerned are NaN, whatever walks that began later made of them. */
__global__ void __launch_bounds__(128)
        lose_kernel(const __grid_constant__ parameters p, struct view out, int width)
{
	const piece x = locate(p, p.walks + static_cast<int>(blockIdx.x));
	const int channel = x.slice * width + static_cast<int>(threadIdx.x);
	bool lost = false;

	if (x.begin > 0 && static_cast<int>(threadIdx.x) < width && channel < p.d_v)
		for (int segment = 0; segment < x.segment; segment++)
			lost |= p.lost[(segment * p.walks + x.walk) * width + threadIdx.x] != 0;
	if (!lost)
		return;
	auto *at = static_cast<__nv_bfloat16 *>(const_cast<void *>(out.data)) + x.b * out.batch +
	           x.h * out.head + channel;
	for (int token = x.first * CHUNK; token < min(x.last * CHUNK, p.seq_len); token++)
		at[token * out.token] = __float2bfloat16(NAN);
	if (p.final_state && x.segment == p.segments - 1)
		for (int i = 0; i < p.d_k; i++)
			p.final_state[((static_cast<int64_t>(x.b) * p.n_heads + x.h) * p.d_k + i) *
			                      p.d_v +
			              channel] = NAN;
}

/* Few walks are cut in two, 64 channels of v each, and then, where states decay, into segments of
 * at least LEAST_SEGMENT chunks, so that there is a block for each multiprocessor. */
constexpr int LEAST_SEGMENT = 8;

plan delta_plan(const struct device *device, const struct matrix_recurrence_args *a)
{
	const int blocks = cuda_sm_count(device);
	plan x = make_plan(a, 0);

	if (2 * x.walks <= blocks)
		x = make_plan(a, 0, 1);
	const int segments = min(blocks / x.walks, x.chunks / LEAST_SEGMENT);
	return segments > 1 && a->decay != DECAY_NONE
	               ? make_plan(a, (x.chunks + segments - 1) / segments, x.slices)
	               : x;
}

template <int DK, int SLICES>
enum status launch_delta(struct device *device, const parameters &p, const plan &x)
{
	return submit(device, delta_kernel<DK, SLICES>, turns(device, x.walks * x.segments),
	              shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BYTES, p);
}

enum status launch_walks(struct device *device, const parameters &p, const plan &x)
{
	if (x.dk == 64)
		return x.slices == 1 ? launch_delta<64, 1>(device, p, x)
		                     : launch_delta<64, 2>(device, p, x);
	return x.slices == 1 ? launch_delta<128, 1>(device, p, x)
	                     : launch_delta<128, 2>(device, p, x);
}

enum status run_segments(struct device *device, const struct matrix_recurrence_args *a,
                         parameters &p, const plan &x, void *workspace)
{
	const int pairs = x.walks / x.blocks_across;

	p.begins = static_cast<int *>(workspace);
	p.lost = reinterpret_cast<uint8_t *>(p.begins + x.segments * pairs);
	TRY(submit(device, begins_kernel, x.segments * pairs, 32 * SCAN_WARPS, 0, p, a->k));
	TRY(launch_walks(device, p, x));
	return submit(device, lose_kernel, (x.segments - 1) * x.walks, 128, 0, p, a->out,
	              64 * x.slices);
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

extern "C" size_t hopper_delta_rule_workspace(const struct device *device, const void *args)
{
	const plan x = delta_plan(device, static_cast<const struct matrix_recurrence_args *>(args));

	return x.segments > 1
	               ? static_cast<size_t>(x.segments) * x.walks * (sizeof(int) + 64 * x.slices)
	               : 0;
}

extern "C" enum status hopper_delta_rule(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const plan x = delta_plan(device, a);
	parameters p;

	TRY(fill_parameters(p, a, x, NULL));
	return x.segments > 1 ? run_segments(device, a, p, x, workspace)
	                      : launch_walks(device, p, x);
}
