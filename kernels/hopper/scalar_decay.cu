/*
 * The matrix-state recurrence S_t = a_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t for
 * decays a_t that are one number per head and token (Mamba-2), per head
 * (RetNet), or 1 (linear attention): chunkwise, 64 tokens at a time, with the
 * state on the chip.
 *
 * With G_t the sum of log2 a over the chunk's tokens up to t and E the chunk's last token,
 *   o_t = scale (sum_{s<=t} 2^(G_t - G_s) (q_t.k_s) v_s + 2^(G_t) q_t S),
 *   S <- 2^(G_E) S + sum_s 2^(G_E - G_s) k_s^T v_s;
 * no exponent is above 0, whatever the decay, and scores are decayed as fp32.
 *
 * A block walks along one sequence, head and slice of v's channels:
 *   producer   TMA: q, k, v of a chunk into a ring
 *   decays     (a warp) the powers of two of the same chunk
 *   scores     (a warpgroup) P = decayed q k^T, through shared memory, one chunk ahead
 *   state      (a warpgroup per 64 channels of v) keeps S^T as the accumulators of
 *              wgmma: o^T = S^T q^T, S^T from registers; + v^T P^T; S^T += (decayed v)^T k
 * so that the state never leaves the registers, and only the scores' warpgroup
 * waits for exponentials.
 *
 * Sequences that are too few to fill the machine are cut into segments: a first
 * pass finds what each segment adds to the state (from k and v alone), a scan
 * over the segments what state each begins with, and the second pass is
 * the same walk, seeded. Segments of four chunks are the textbook's materialised form.
 *
 * What was tried (one H200, copy 4.24 TB/s; 16 heads x 128, 262144 tokens, T = 4096 unless told):
 *   every chunk's state in memory (segments of four chunks)     2.61 ms
 *   the state on the chip, decays of a token read a chunk
 *     ahead: 1.03 ms where there are none to read, but          1.10 ms
 *   two at a time, two ahead (predicted: as if there were none) 1.045 ms, 4.1 TB/s
 *   o^T in two accumulators, so that all products of a chunk
 *     are in flight at once: too many registers. Now the old state's part of o^T decays
 *     while the tensor cores update the state, and v^T P^T is added to it
 *   64 x 64: one block per multiprocessor, then two             0.74, 0.55 ms
 *   2 sequences of 131072: 32 walks; then 33 segments of each   2.90, 1.63 ms
 * At 128 x 128 nothing is left but the memory's time. d_k = 256 fills the registers with
 * 64 channels of v, and q and k are read from L2 once per 64 of them.
 * wgmma in: walk_kernel
 */
#include "kernels/hopper/hopper.h"
#include "kernels/hopper/walk.cuh"

using namespace hopper;

namespace hopper
{

template <int DK, int SLICES, bool OUTPUTS, bool DELTA>
__device__ __forceinline__ float state_walk<DK, SLICES, OUTPUTS, DELTA>::walk(const piece &x,
                                                                              int chunk)
{
	const uint32_t at = shared + stage.slot * S::STAGE_BYTES;
	const uint32_t powers = shared + S::POWERS + stage.slot * S::POWERS_BYTES;
	const uint32_t values = at + S::V + warpgroup * PANEL_BYTES;
	const uint64_t q = matrix_descriptor(at + S::Q, 16);
	const uint64_t k = matrix_descriptor(at + S::K, PANEL_BYTES);
	const uint64_t v = matrix_descriptor(values, 16);
	const uint64_t scores = matrix_descriptor(shared + S::SCORES + slot.slot * PANEL_BYTES, 16);
	uint32_t decayed[16], packed[WIDTH / 2];
	float o[32];

	barrier_wait(shared + S::FULL + stage.slot * 8, stage.parity);
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
				packed[i] = pack_bf16(s[part][2 * i], s[part][2 * i + 1]);
				s[part][2 * i] *= whole;
				s[part][2 * i + 1] *= whole;
			}
			pin(packed);
			pin(s[part]);
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
	if (!OUTPUTS) {
#pragma unroll
		for (int part = 0; part < PARTS; part++) {
#pragma unroll
			for (int i = 0; i < WIDTH; i++)
				s[part][i] *= whole;
			pin(s[part]);
		}
	}
	pin(decayed);
	wgmma_fence();
#pragma unroll
	for (int part = 0; part < PARTS; part++)
#pragma unroll
		for (int step = 0; step < CHUNK / 16; step++)
			wgmma_rs(s[part], &decayed[4 * step],
			         k + (part * 2 * PANEL_BYTES + step * 2048) / 16, true);
	wgmma_commit();
	if (OUTPUTS) {
		wgmma_wait<1>(); /* o decays while the state is updated */
		pin(o);
		pin(packed);
#pragma unroll
		for (int i = 0; i < 32; i += 4) {
			const float2 power =
			        shared_float2(powers + FROM_START + (2 * i + 2 * (lane % 4)) * 4);

			o[i] *= power.x;
			o[i + 1] *= power.y;
			o[i + 2] *= power.x;
			o[i + 3] *= power.y;
		}
		barrier_wait(shared + S::SCORES_FULL + slot.slot * 8, slot.parity);
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
		pin(s[part]);
	pin(decayed);
	if (OUTPUTS) {
		pin(o);
		release(S::SCORES_EMPTY + slot.slot * 8);
		slot.advance();
	}
	__syncwarp();
	release(S::EMPTY + stage.slot * 8);
	stage.advance();
	if (OUTPUTS)
		store(x, chunk, o);
	return whole;
}

} // namespace hopper

namespace
{

/* P = q k^T, decayed, of chunk after chunk, into the ring that the state's warpgroups read. */
template <int DK, int SLICES>
__device__ __forceinline__ void score(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
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
			decay_scores(s, powers, p.scale, warp, lane);
			__syncwarp();
			if (lane == 0)
				barrier_arrive(shared + S::EMPTY + stage.slot * 8);
			barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
			store_scores(scores, s, warp, lane);
			fence_async_proxy();
			__syncwarp();
			if (lane == 0)
				barrier_arrive(shared + S::SCORES_FULL + slot.slot * 8);
			stage.advance();
			slot.advance();
		}
	}
}

template <int DK, int SLICES, bool OUTPUTS>
__global__ void __launch_bounds__(shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BLOCKS)
        walk_kernel(const __grid_constant__ parameters p)
{
	using S = shape<DK, SLICES>;
	extern __shared__ char unaligned[];
	const uint32_t shared = (shared_address(unaligned) + 1023) & ~1023u;

	if (threadIdx.x == 0)
		initialise_barriers<DK, SLICES, OUTPUTS, false>(shared);
	__syncthreads();
	if (threadIdx.x < 128) {
		registers_decrease<S::PRODUCER_REGISTERS>();
		if (threadIdx.x == 0)
			produce<DK, SLICES, OUTPUTS, false>(p, shared);
		else if (threadIdx.x / 32 == 1)
			prepare_decays<DK, SLICES, OUTPUTS, false>(p, shared);
	} else if (threadIdx.x >= 128 * (1 + SLICES)) {
		registers_decrease<S::SCORE_REGISTERS>();
		if (OUTPUTS)
			score<DK, SLICES>(p, shared);
	} else {
		registers_increase<S::STATE_REGISTERS>();
		state_walk<DK, SLICES, OUTPUTS> walk = {
		        p, shared, static_cast<int>(threadIdx.x / 128) - 1,
		        static_cast<int>(threadIdx.x / 32 % 4), static_cast<int>(threadIdx.x % 32)};
		const int count = piece_count<OUTPUTS>(p);

#pragma unroll 1
		for (int number = blockIdx.x; number < count; number += gridDim.x) {
			const piece x = locate(p, number);
			float whole = 1.0f;

			walk.begin(x);
#pragma unroll 1
			for (int chunk = x.first; chunk < x.last; chunk++)
				whole *= walk.walk(x, chunk);
			walk.end(x, whole);
		}
		if (OUTPUTS && threadIdx.x % 128 == 0)
			store_wait_read();
	}
}

/* What each segment added becomes the state after it; four elements a thread. */
__global__ void __launch_bounds__(256)
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
plan best_plan(const struct matrix_recurrence_args *a)
{
	const plan whole = make_plan(a, 0);
	const int blocks = cuda_sm_count(), waves = (whole.walks + blocks - 1) / blocks;

	if (3 * whole.walks >= 2 * waves * blocks || whole.chunks < 16)
		return whole;
	/* About eight pieces per block, none shorter than eight chunks. */
	int segments = (8 * blocks + whole.walks - 1) / whole.walks;
	if (segments > whole.chunks / 8)
		segments = whole.chunks / 8;
	return make_plan(a, (whole.chunks + segments - 1) / segments);
}

template <int DK, int SLICES, bool OUTPUTS> enum status launch_walk(const parameters &p, int pieces)
{
	const int bytes = shape<DK, SLICES>::BYTES;
	const int room = cuda_sm_count() * shape<DK, SLICES>::BLOCKS;
	const int blocks = pieces < room ? pieces : room;

	CUDA_TRY(cudaFuncSetAttribute(walk_kernel<DK, SLICES, OUTPUTS>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	walk_kernel<DK, SLICES, OUTPUTS>
	        <<<blocks, shape<DK, SLICES>::THREADS, bytes, cuda_stream()>>>(p);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

template <int DK, int SLICES>
enum status run_plan(const struct matrix_recurrence_args *a, const plan &x, void *workspace)
{
	parameters p;
	enum status status = fill_parameters(p, a, x, workspace);

	if (status == STATUS_OK && x.segments > 1) {
		const int64_t threads = x.walks * x.state_floats / 4;

		status = launch_walk<DK, SLICES, false>(p, x.walks * (x.segments - 1));
		if (status != STATUS_OK)
			return status;
		combine_kernel<<<static_cast<unsigned>((threads + 255) / 256), 256, 0,
		                 cuda_stream()>>>(p.states, p.wholes, x.walks,
		                                  static_cast<int>(x.state_floats), x.segments - 1);
		CUDA_TRY(cudaGetLastError());
	}
	if (status == STATUS_OK)
		status = launch_walk<DK, SLICES, true>(p, x.walks * x.segments);
	return status;
}

enum status run(const struct matrix_recurrence_args *a, const plan &x, void *workspace)
{
	if (x.dk == 64)
		return x.slices == 1 ? run_plan<64, 1>(a, x, workspace)
		                     : run_plan<64, 2>(a, x, workspace);
	if (x.dk == 256)
		return run_plan<256, 1>(a, x, workspace);
	return x.slices == 1 ? run_plan<128, 1>(a, x, workspace)
	                     : run_plan<128, 2>(a, x, workspace);
}

const struct matrix_recurrence_args *recurrence(const void *args)
{
	return static_cast<const struct matrix_recurrence_args *>(args);
}

/* The materialised form has the states before segments in memory. One is as long as the chunk that
 * was asked for, or four of ours, whose v is then as large as a state. */
plan materialised_plan(const struct matrix_recurrence_args *a)
{
	const int64_t length = a->chunk ? a->chunk : 4 * CHUNK;

	return make_plan(
	        a, static_cast<int>(((length < a->seq_len ? length : a->seq_len) + CHUNK - 1) /
	                            CHUNK));
}

} // namespace

/* Whatever the chunk. */
static const char *scalar_decay_unsupported(const struct matrix_recurrence_args *a)
{

	if (!cuda_is_hopper())
		return "needs compute capability 9.0";
	if (a->rule != RULE_PLAIN)
		return "only the plain rule";
	if (a->decay == DECAY_DIAGONAL)
		return "only decays that are the same for all channels";
	if (a->d_k > 256)
		return "d_k must be at most 256";
	if (a->n_heads > 1 && (!a->v.head || !a->out.head))
		return "heads must not share v";
	if (!tensor_map_supports(&a->q) || !tensor_map_supports(&a->k) ||
	    !tensor_map_supports(&a->v) || !tensor_map_supports(&a->out))
		return "views must be 16-byte aligned";
	return NULL;
}

extern "C" const char *hopper_scalar_decay_unsupported(const void *args)
{
	const struct matrix_recurrence_args *a = recurrence(args);
	const char *why = scalar_decay_unsupported(a);

	return !why && a->chunk && a->chunk != CHUNK ? "chunk must be 64, or 0" : why;
}

extern "C" size_t hopper_scalar_decay_workspace(const void *args)
{
	return plan_workspace(best_plan(recurrence(args)));
}

extern "C" enum status hopper_scalar_decay(const void *args, void *workspace)
{
	return run(recurrence(args), best_plan(recurrence(args)), workspace);
}

extern "C" size_t hopper_scalar_decay_onchip_workspace(const void *args)
{
	return plan_workspace(make_plan(recurrence(args), 0));
}

extern "C" enum status hopper_scalar_decay_onchip(const void *args, void *workspace)
{
	return run(recurrence(args), make_plan(recurrence(args), 0), workspace);
}

extern "C" const char *hopper_scalar_decay_materialise_unsupported(const void *args)
{
	const struct matrix_recurrence_args *a = recurrence(args);
	const char *why = scalar_decay_unsupported(a);

	return !why && a->chunk % CHUNK && a->chunk < a->seq_len
	               ? "chunk must be a multiple of 64, or T"
	               : why;
}

extern "C" size_t hopper_scalar_decay_materialise_workspace(const void *args)
{
	return plan_workspace(materialised_plan(recurrence(args)));
}

extern "C" enum status hopper_scalar_decay_materialise(const void *args, void *workspace)
{
	return run(recurrence(args), materialised_plan(recurrence(args)), workspace);
}
