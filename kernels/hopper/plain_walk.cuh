/*
 * The plain rule's walk along a sequence (walk.cuh), forward or backward: S_t = a_t S_{t-1} + k_t^T
 * v_t, o_t = scale q_t S_t, chunkwise. scalar_decay.cu has the formulas; backward every token sees
 * itself and those after it, and decays count from a token to a later one.
 *   producer   TMA: q, k, v of a chunk into a ring
 *   decays     (a warp) the powers of two of the same chunk
 *   scores     (a warpgroup) P = decayed q k^T, through shared memory, one chunk ahead
 *   state      (a warpgroup per 64 channels of v) keeps S^T as the accumulators of wgmma:
 *              o^T = S^T q^T, S^T from registers; + v^T P^T; S^T += (decayed v)^T k
 * so that the state never leaves the registers, and only the scores' warpgroup waits for
 * exponentials. Sequences too few to fill the machine are cut into segments: a first pass finds
 * what each adds to the state, a scan what each begins with, and the second pass is the same walk,
 * seeded.
 */
#ifndef KERNELS_HOPPER_PLAIN_WALK_CUH
#define KERNELS_HOPPER_PLAIN_WALK_CUH

#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/walk.cuh"

namespace
{

using namespace hopper;

template <bool backward> struct plain_rule {
	static constexpr bool SOLVES = false, BACKWARD = backward, FOURTH = false, COPIES = false;

	template <int DK, int SLICES>
	static __device__ void score(const parameters &p, uint32_t shared);
	template <int DK, int SLICES, bool OUTPUTS>
	static __device__ float walk(state_walk<DK, SLICES, OUTPUTS, plain_rule> &w, const piece &x,
	                             int chunk);
};

template <int DK, int SLICES> using shape = walk_shape<DK, SLICES, plain_rule<false>>;

/* P = q k^T, decayed, of chunk after chunk, into the ring that the state's warpgroups read. */
template <int DK, int SLICES, typename RULE>
__device__ __forceinline__ void score_chunks(const parameters &p, uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;
	const int count = piece_count<true>(p), lane = threadIdx.x % 32;
	const int warp = threadIdx.x / 32 % 4;
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
			float s[32];

			barrier_wait(shared + S::FULL + stage.slot * 8, stage.parity);
			issue_scores<DK>(s, at + S::Q, at + S::K);
			wgmma_wait<0>();
			pin(s);
			decay_scores<RULE::BACKWARD>(s, powers, p.scale, warp, lane);
			warp_arrive(shared + S::EMPTY + stage.slot * 8);
			barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
			store_scores(scores, s, warp, lane);
			warp_publish(shared + S::SCORES_FULL + slot.slot * 8);
			stage.advance();
			slot.advance();
		}
	}
}

template <bool backward>
template <int DK, int SLICES>
__device__ __forceinline__ void plain_rule<backward>::score(const parameters &p, uint32_t shared)
{
	score_chunks<DK, SLICES, plain_rule>(p, shared);
}

/* A warp's 16 channels of v by a chunk's tokens, as an operand of the update, as they have decayed
 * at its end. */
__device__ __forceinline__ void load_decayed(uint32_t (&decayed)[16], uint32_t values,
                                             uint32_t powers, int warp, int lane)
{
#pragma unroll
	for (int j = 0; j < 4; j++) {
		load_transposed_x4(transposed_block(values, 16 * j, 16 * warp, lane),
		                   &decayed[4 * j]);
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const float2 power = shared_float2(
			        powers + TO_END + (16 * j + 8 * half + 2 * (lane % 4)) * 4);
#pragma unroll
			for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; i++)
				decayed[i] = pack_bf16(low_bf16(decayed[i]) * power.x,
				                       high_bf16(decayed[i]) * power.y);
		}
	}
}

/* What a state from before the chunk gives to its tokens, the columns. */
__device__ __forceinline__ void decay_outputs(float (&o)[32], uint32_t powers, int lane)
{
#pragma unroll
	for (int i = 0; i < 32; i += 4) {
		const float2 power =
		        shared_float2(powers + FROM_START + (2 * i + 2 * (lane % 4)) * 4);

		o[i] *= power.x;
		o[i + 1] *= power.y;
		o[i + 2] *= power.x;
		o[i + 3] *= power.y;
	}
}

template <bool backward>
template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ float
plain_rule<backward>::walk(state_walk<DK, SLICES, OUTPUTS, plain_rule> &w, const piece &x,
                           int chunk)
{
	using W = state_walk<DK, SLICES, OUTPUTS, plain_rule>;
	using S = typename W::S;
	constexpr int PARTS = W::PARTS, WIDTH = W::WIDTH;
	const uint32_t at = w.shared + w.stage.slot * S::STAGE_BYTES;
	const uint32_t powers = w.shared + S::POWERS + w.stage.slot * S::POWERS_BYTES;
	const uint32_t values = at + S::V + w.warpgroup * PANEL_BYTES;
	const uint64_t q = matrix_descriptor(at + S::Q, 16);
	const uint64_t k = matrix_descriptor(at + S::K, PANEL_BYTES);
	const uint64_t v = matrix_descriptor(values, 16);
	const uint64_t scores =
	        matrix_descriptor(w.shared + S::SCORES + w.slot.slot * PANEL_BYTES, 16);
	uint32_t decayed[16], packed[WIDTH / 2];
	float o[32];

	barrier_wait(w.shared + S::FULL + w.stage.slot * 8, w.stage.parity);
	const float whole = shared_float(powers + WHOLE);
	if (OUTPUTS) {
#pragma unroll
		for (int part = 0; part < PARTS; part++) {
			if (part > 0) {
				wgmma_wait<0>(); /* for `packed` */
				pin(o);
				pin(packed);
			}
#pragma unroll
			for (int i = 0; i < WIDTH / 2; i++) {
				packed[i] = pack_bf16(w.s[part][2 * i], w.s[part][2 * i + 1]);
				w.s[part][2 * i] *= whole;
				w.s[part][2 * i + 1] *= whole;
			}
			pin(packed);
			pin(w.s[part]);
			pin(o);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < WIDTH / 8; step++)
				wgmma_rs_k_major(o, &packed[4 * step],
				                 q + (part * 2 * PANEL_BYTES +
				                      step / 4 * PANEL_BYTES + step % 4 * 32) /
				                                 16,
				                 part > 0 || step > 0);
			wgmma_commit();
		}
	}
	load_decayed(decayed, values, powers, w.warp, w.lane);
	if (!OUTPUTS) {
#pragma unroll
		for (int part = 0; part < PARTS; part++) {
#pragma unroll
			for (int i = 0; i < WIDTH; i++)
				w.s[part][i] *= whole;
			pin(w.s[part]);
		}
	}
	pin(decayed);
	wgmma_fence();
#pragma unroll
	for (int part = 0; part < PARTS; part++)
#pragma unroll
		for (int step = 0; step < CHUNK / 16; step++)
			wgmma_rs(w.s[part], &decayed[4 * step],
			         k + (part * 2 * PANEL_BYTES + step * 2048) / 16, true);
	wgmma_commit();
	if (OUTPUTS) {
		wgmma_wait<1>(); /* o decays while the state is updated */
		pin(o);
		pin(packed);
		decay_outputs(o, powers, w.lane);
		barrier_wait(w.shared + S::SCORES_FULL + w.slot.slot * 8, w.slot.parity);
		pin(o);
		wgmma_fence();
#pragma unroll
		for (int step = 0; step < CHUNK / 16; step++)
			wgmma_ss_transposed(o, v + step * 2048 / 16, scores + step * 32 / 16, true);
		wgmma_commit();
	}
	wgmma_wait<0>();
#pragma unroll
	for (int part = 0; part < PARTS; part++)
		pin(w.s[part]);
	pin(decayed);
	if (OUTPUTS) {
		pin(o);
		w.release(S::SCORES_EMPTY + w.slot.slot * 8);
		w.slot.advance();
	}
	__syncwarp();
	w.release(S::EMPTY + w.stage.slot * 8);
	w.stage.advance();
	if (OUTPUTS)
		w.store(x, chunk, o);
	return whole;
}

template <bool backward, int DK, int SLICES, bool OUTPUTS>
__global__ void __launch_bounds__(shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BLOCKS)
        walk_kernel(const __grid_constant__ parameters p)
{
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0)
		initialise_barriers<DK, SLICES, OUTPUTS, plain_rule<backward>>(shared);
	__syncthreads();
	walk_block<DK, SLICES, OUTPUTS, plain_rule<backward>>(p, shared);
}

/* What each segment added becomes the state after it; four elements a thread. */
static __global__ void __launch_bounds__(256)
        combine_kernel(float *states, const float *wholes, int walks, int size, int segments)
{
	const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
	const int64_t step = static_cast<int64_t>(walks) * size / 4;
	float4 *at = reinterpret_cast<float4 *>(states) + index;
	const float *whole = wholes + index * 4 / size;
	float4 state = {};

	if (index >= step)
		return;
#pragma unroll 4
	for (int segment = 0; segment < segments; segment++) {
		const float4 added = at[segment * step];
		const float decay = whole[segment * walks];

		state.x = fmaf(decay, state.x, added.x);
		state.y = fmaf(decay, state.y, added.y);
		state.z = fmaf(decay, state.z, added.z);
		state.w = fmaf(decay, state.w, added.w);
		at[segment * step] = state;
	}
}

/* Segments so that the blocks are evenly busy: a first pass over k and v costs half as much again,
 * and is worth it where less than two thirds of the machine had work. */
inline plan best_plan(const struct device *device, const struct matrix_recurrence_args *a)
{
	const plan whole = make_plan(a, 0);
	const int blocks = cuda_sm_count(device), waves = (whole.walks + blocks - 1) / blocks;

	if (3 * whole.walks >= 2 * waves * blocks || whole.chunks < 16)
		return whole;
	/* About eight pieces per block, none shorter than eight chunks. */
	int segments = (8 * blocks + whole.walks - 1) / whole.walks;
	if (segments > whole.chunks / 8)
		segments = whole.chunks / 8;
	return make_plan(a, (whole.chunks + segments - 1) / segments);
}

template <bool backward, int DK, int SLICES, bool OUTPUTS>
enum status launch_walk(struct device *device, const parameters &p, int pieces)
{
	const int room = cuda_sm_count(device) * shape<DK, SLICES>::BLOCKS;
	const int blocks = pieces < room ? pieces : room;

	return submit(device, walk_kernel<backward, DK, SLICES, OUTPUTS>, blocks,
	              shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BYTES, p);
}

/* What the segments of the walks begin with, if they are more than one. */
template <bool backward, int DK, int SLICES>
enum status find_segments(struct device *device, const parameters &p, const plan &x)
{
	const int64_t threads = x.walks * x.state_floats / 4;

	if (x.segments == 1)
		return STATUS_OK;
	TRY((launch_walk<backward, DK, SLICES, false>(device, p, x.walks * (x.segments - 1))));
	return submit(device, combine_kernel, (threads + 255) / 256, 256, 0, p.states,
	              static_cast<const float *>(p.wholes), x.walks,
	              static_cast<int>(x.state_floats), x.segments - 1);
}

template <bool backward, int DK, int SLICES>
enum status run_segments(struct device *device, const parameters &p, const plan &x)
{
	TRY((find_segments<backward, DK, SLICES>(device, p, x)));
	return launch_walk<backward, DK, SLICES, true>(device, p, x.walks * x.segments);
}

template <bool backward>
enum status run_walks(struct device *device, const parameters &p, const plan &x)
{
	if (x.dk == 64)
		return x.slices == 1 ? run_segments<backward, 64, 1>(device, p, x)
		                     : run_segments<backward, 64, 2>(device, p, x);
	if (x.dk == 256)
		return run_segments<backward, 256, 1>(device, p, x);
	return x.slices == 1 ? run_segments<backward, 128, 1>(device, p, x)
	                     : run_segments<backward, 128, 2>(device, p, x);
}

} // namespace

#endif
