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
 *   read three chunks ahead (predicted: as if there were none)  1.045 ms, 4.1 TB/s
 *   o^T in two accumulators, so that all products of a chunk
 *     are in flight at once: too many registers. Now the old state's part of o^T decays
 *     while the tensor cores update the state, and v^T P^T is added to it
 *   64 x 64: one block per multiprocessor, then two             0.74, 0.55 ms
 *   2 sequences of 131072: 32 walks; then 33 segments of each   2.90, 1.63 ms
 * At 128 x 128 nothing is left but the memory's time. d_k = 256 fills the registers with
 * 64 channels of v, and q and k are read from L2 once per 64 of them.
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/hopper.h"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int CHUNK = 64, SCORE_SLOTS = 2;
constexpr float LOG2E = 1.44269504f;

/* DK: channels of q and k, rounded up; SLICES: state warpgroups, 64 channels of v each. */
template <int DK, int SLICES> struct shape {
	static constexpr int KEY_PANELS = DK / 64;
	static constexpr int THREADS = 128 * (2 + SLICES);
	static constexpr int BLOCKS = DK == 64 && SLICES == 1 ? 2 : 1; /* per multiprocessor */
	static constexpr int STAGE_PANELS = 2 * KEY_PANELS + SLICES;
	static constexpr int STAGES = STAGE_PANELS > 6 ? 2 : STAGE_PANELS == 4 ? 4 : 3;
	static constexpr int SCORE_WARPS = 4, STATE_WARPS = 4 * SLICES;
	static constexpr int PRODUCER_REGISTERS = 40;
	static constexpr int SCORE_REGISTERS = BLOCKS == 2 ? 72 : 88;
	static constexpr int STATE_REGISTERS = BLOCKS == 2 ? 128 : SLICES == 2 ? 192 : 240;

	/* Shared memory. A stage: panels of q, of k, of v. */
	static constexpr int Q = 0;
	static constexpr int K = KEY_PANELS * PANEL_BYTES;
	static constexpr int V = 2 * K;
	static constexpr int STAGE_BYTES = STAGE_PANELS * PANEL_BYTES;
	static constexpr int SCORES = STAGES * STAGE_BYTES;
	static constexpr int OUT = SCORES + SCORE_SLOTS * PANEL_BYTES;
	static constexpr int POWERS = OUT + SLICES * PANEL_BYTES;
	static constexpr int POWERS_BYTES = 1024; /* of a stage */
	static constexpr int BARRIERS = POWERS + STAGES * POWERS_BYTES;
	static constexpr int BYTES = BARRIERS + 256 + 1024; /* 1024: room to align the base */

	/* mbarriers, 8 bytes each. */
	static constexpr int FULL = BARRIERS;
	static constexpr int EMPTY = FULL + 8 * STAGES;
	static constexpr int SCORES_FULL = EMPTY + 8 * STAGES;
	static constexpr int SCORES_EMPTY = SCORES_FULL + 8 * SCORE_SLOTS;
};

/* What the warp of the decays leaves of each chunk, floats by token: G, scale 2^G, 2^(G_E - G),
 * and 2^(G_E). */
enum { LOG_DECAY = 0, FROM_START = 256, TO_END = 512, WHOLE = 768 };

struct parameters {
	CUtensorMap q, k, v, out;
	struct view log_decay;
	enum decay decay;
	float scale;
	const float *h0;
	float *final_state;
	float *states; /* [segments - 1][walks][DK/2 * 128 * SLICES] in the order of accumulators */
	float *wholes; /* [segments - 1][walks]: decay of a whole segment */
	int seq_len, n_heads, d_k, d_v, slices; /* slices: blocks across v's channels */
	int chunks, segment_chunks, segments;
	int walks; /* batch * n_heads * slices */
};

/* What a block does at a time: one segment of one walk. */
struct piece {
	int walk, segment, slice, b, h, first, last; /* chunks first .. last - 1 */
};

__device__ __forceinline__ piece locate(const parameters &p, int number)
{
	piece x;

	x.segment = number / p.walks;
	x.walk = number - x.segment * p.walks;
	const int pair = x.walk / p.slices;
	x.slice = x.walk - pair * p.slices;
	x.b = pair / p.n_heads;
	x.h = pair - x.b * p.n_heads;
	x.first = x.segment * p.segment_chunks;
	x.last = min(x.first + p.segment_chunks, p.chunks);
	return x;
}

/* Pieces of a pass: the first has nothing to find out about the last segment. */
template <bool OUTPUTS> __device__ __forceinline__ int piece_count(const parameters &p)
{
	return p.walks * (OUTPUTS ? p.segments : p.segments - 1);
}

template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ void produce(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
	constexpr int BYTES = ((OUTPUTS ? 2 : 1) * S::KEY_PANELS + SLICES) * PANEL_BYTES;
	const int count = piece_count<OUTPUTS>(p);
	slot_ring<S::STAGES> stage;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);

#pragma unroll 1
		for (int chunk = x.first; chunk < x.last; chunk++) {
			const uint32_t at = shared + stage.slot * S::STAGE_BYTES;
			const uint32_t full = shared + S::FULL + stage.slot * 8;

			barrier_wait(shared + S::EMPTY + stage.slot * 8, stage.parity ^ 1);
			barrier_arrive_expect(full, BYTES);
#pragma unroll
			for (int i = 0; i < S::KEY_PANELS; i++) {
				if (OUTPUTS)
					tensor_load(at + S::Q + i * PANEL_BYTES, &p.q, full, i * 64,
					            chunk * CHUNK, x.h, x.b);
				tensor_load(at + S::K + i * PANEL_BYTES, &p.k, full, i * 64,
				            chunk * CHUNK, x.h, x.b);
			}
#pragma unroll
			for (int i = 0; i < SLICES; i++)
				tensor_load(at + S::V + i * PANEL_BYTES, &p.v, full,
				            (x.slice * SLICES + i) * 64, chunk * CHUNK, x.h, x.b);
			stage.advance();
		}
	}
}

/* log2 decay of one token as it lies in memory, or for all of a head; those past the end do not
 * decay. */
struct token_decays {
	const __nv_bfloat16 *data;
	int64_t stride;
	int tokens;
	float constant;

	__device__ token_decays(const parameters &p, const piece &x)
	    : data(p.decay == DECAY_SCALAR
	                   ? static_cast<const __nv_bfloat16 *>(p.log_decay.data) +
	                             x.b * p.log_decay.batch + x.h * p.log_decay.head
	                   : NULL),
	      stride(p.log_decay.token), tokens(p.seq_len),
	      constant(p.decay == DECAY_CONSTANT
	                       ? log1pf(-exp2f(-5.0f - static_cast<float>(x.h))) * LOG2E
	                       : 0.0f)
	{
	}

	__device__ __nv_bfloat16 load(int token) const
	{
		return data && token < tokens ? data[token * stride] : __nv_bfloat16();
	}

	__device__ float log2(__nv_bfloat16 loaded, int token) const
	{
		return data ? __bfloat162float(loaded) * LOG2E : token < tokens ? constant : 0.0f;
	}
};

/* The powers of one chunk, this lane's two tokens decaying by 2^x0 and 2^x1, into its stage. */
template <int DK, int SLICES>
__device__ __forceinline__ void prepare_chunk(const parameters &p, uint32_t shared, int slot,
                                              uint32_t parity, float x0, float x1)
{
	using S = shape<DK, SLICES>;
	const uint32_t powers = shared + S::POWERS + slot * S::POWERS_BYTES;
	const int lane = threadIdx.x % 32;
	float sum = x0 + x1;

#pragma unroll
	for (int offset = 1; offset < 32; offset *= 2) {
		const float before = __shfl_up_sync(~0u, sum, offset);

		if (lane >= offset)
			sum += before;
	}
	const float end = __shfl_sync(~0u, sum, 31), g0 = sum - x1, g1 = sum;

	barrier_wait(shared + S::EMPTY + slot * 8, parity ^ 1);
	shared_store2(powers + LOG_DECAY + lane * 8, g0, g1);
	shared_store2(powers + FROM_START + lane * 8, p.scale * exp2_approx(g0),
	              p.scale * exp2_approx(g1));
	shared_store2(powers + TO_END + lane * 8, exp2_approx(end - g0), exp2_approx(end - g1));
	if (lane == 0)
		shared_store1(powers + WHOLE, exp2_approx(end));
	__syncwarp();
	if (lane == 0)
		barrier_arrive(shared + S::FULL + slot * 8);
}

/* Tokens 2 lane and 2 lane + 1 of each chunk. They are read AHEAD chunks at a time, that many
 * before they are needed: the copies keep the memory's queues full, and a load waits long. */
template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ void prepare_decays(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
	constexpr int AHEAD = 2;
	const int count = piece_count<OUTPUTS>(p), lane = threadIdx.x % 32;
	slot_ring<S::STAGES> stage;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);
		const token_decays decays(p, x);
		__nv_bfloat16 next[2 * AHEAD];

#pragma unroll
		for (int i = 0; i < 2 * AHEAD; i++)
			next[i] = decays.load((x.first + i / 2) * CHUNK + 2 * lane + i % 2);
#pragma unroll 1
		for (int group = x.first; group < x.last; group += AHEAD) {
			float now[2 * AHEAD];

#pragma unroll
			for (int i = 0; i < 2 * AHEAD; i++)
				now[i] = decays.log2(next[i],
				                     (group + i / 2) * CHUNK + 2 * lane + i % 2);
#pragma unroll
			for (int i = 0; i < 2 * AHEAD; i++)
				next[i] = decays.load((group + AHEAD + i / 2) * CHUNK + 2 * lane +
				                      i % 2);
#pragma unroll
			for (int i = 0; i < AHEAD && group + i < x.last; i++) {
				prepare_chunk<DK, SLICES>(p, shared, stage.slot, stage.parity,
				                          now[2 * i], now[2 * i + 1]);
				stage.advance();
			}
		}
	}
}

/* P = q k^T, decayed, of chunk after chunk, into the ring that the state's warpgroups read. */
template <int DK, int SLICES>
__device__ __forceinline__ void score(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
	const int count = piece_count<true>(p), lane = threadIdx.x % 32;
	const int warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4, column = 2 * (lane % 4);
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
			const uint64_t q = matrix_descriptor(at + S::Q, 16);
			const uint64_t k = matrix_descriptor(at + S::K, 16);
			float s[32], g[2];

			barrier_wait(shared + S::FULL + stage.slot * 8, stage.parity);
			pin(s);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < DK / 16; step++) {
				const int offset = (step / 4 * PANEL_BYTES + step % 4 * 32) / 16;

				wgmma_ss(s, q + offset, k + offset, step > 0);
			}
			wgmma_commit();
			g[0] = shared_float(powers + LOG_DECAY + row * 4);
			g[1] = shared_float(powers + LOG_DECAY + row * 4 + 32);
			wgmma_wait<0>();
			pin(s);
#pragma unroll
			for (int i = 0; i < 32; i += 4) {
				const int key = column + 2 * i;
				const float2 from = shared_float2(powers + LOG_DECAY + key * 4);

#pragma unroll
				for (int r = 0; r < 2; r++) {
					float *pair = &s[i + 2 * r];

					pair[0] = key <= row + 8 * r
					                  ? p.scale * pair[0] *
					                            exp2_approx(g[r] - from.x)
					                  : 0.0f;
					pair[1] = key + 1 <= row + 8 * r
					                  ? p.scale * pair[1] *
					                            exp2_approx(g[r] - from.y)
					                  : 0.0f;
				}
			}
			__syncwarp();
			if (lane == 0)
				barrier_arrive(shared + S::EMPTY + stage.slot * 8);
			barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
#pragma unroll
			for (int j = 0; j < 4; j++)
				store_matrix_x4(plain_block(scores, 16 * warp, 16 * j, lane),
				                pack_bf16(s[8 * j], s[8 * j + 1]),
				                pack_bf16(s[8 * j + 2], s[8 * j + 3]),
				                pack_bf16(s[8 * j + 4], s[8 * j + 5]),
				                pack_bf16(s[8 * j + 6], s[8 * j + 7]));
			fence_async_proxy();
			__syncwarp();
			if (lane == 0)
				barrier_arrive(shared + S::SCORES_FULL + slot.slot * 8);
			stage.advance();
			slot.advance();
		}
	}
}

/* A warpgroup of the state: 64 channels of v, all of k's. */
template <int DK, int SLICES, bool OUTPUTS> struct state_walk {
	using S = shape<DK, SLICES>;
	static constexpr int PARTS = DK > 128 ? DK / 128 : 1, WIDTH = DK / 2 / PARTS;

	const parameters &p;
	uint32_t shared;
	int warpgroup, warp, lane;
	slot_ring<S::STAGES> stage;
	slot_ring<SCORE_SLOTS> slot;
	float s[PARTS][WIDTH]; /* S^T: rows are channels of v, columns of k */

	__device__ void begin(const piece &x);
	__device__ void end(const piece &x, float whole);
	__device__ void visit(float *tensor, const piece &x, bool write);
	__device__ float walk(const piece &x, int chunk);
	__device__ void store(const piece &x, int chunk, const float (&o)[32]);

	__device__ float *segment_state(const piece &x, int segment) const
	{
		return p.states +
		       ((static_cast<int64_t>(segment) * p.walks + x.walk) * SLICES + warpgroup) *
		               (DK / 2 * 128) +
		       threadIdx.x % 128;
	}

	__device__ void release(int barrier) const
	{
		if (lane == 0)
			barrier_arrive(shared + barrier);
	}
};

/* Reads or writes this thread's elements of a [B, H, d_k, d_v] tensor. */
template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS>::visit(float *tensor,
                                                                       const piece &x, bool write)
{
	const int value = (x.slice * SLICES + warpgroup) * 64 + 16 * warp + lane / 4;
	const int key = 2 * (lane % 4);
	float *at = tensor + (static_cast<int64_t>(x.b) * p.n_heads + x.h) * p.d_k * p.d_v;

#pragma unroll
	for (int i = 0; i < PARTS * WIDTH; i++) {
		const int row = key + 8 * (i >> 2) + (i & 1), column = value + 8 * ((i >> 1) & 1);
		float &element = s[i / WIDTH][i % WIDTH];

		if (row < p.d_k && column < p.d_v) {
			if (write)
				at[static_cast<int64_t>(row) * p.d_v + column] = element;
			else
				element = at[static_cast<int64_t>(row) * p.d_v + column];
		}
	}
}

template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS>::begin(const piece &x)
{
#pragma unroll
	for (int i = 0; i < PARTS * WIDTH; i++)
		s[i / WIDTH][i % WIDTH] = 0.0f;
	if (x.segment == 0) {
		if (p.h0)
			visit(const_cast<float *>(p.h0), x, false);
	} else if (OUTPUTS) {
		const float *from = segment_state(x, x.segment - 1);

#pragma unroll
		for (int i = 0; i < PARTS * WIDTH; i++)
			s[i / WIDTH][i % WIDTH] = from[i * 128];
	}
}

template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS>::end(const piece &x, float whole)
{
	if (OUTPUTS) {
		if (p.final_state && x.segment == p.segments - 1)
			visit(p.final_state, x, true);
	} else {
		float *to = segment_state(x, x.segment);

#pragma unroll
		for (int i = 0; i < PARTS * WIDTH; i++)
			to[i * 128] = s[i / WIDTH][i % WIDTH];
		if (threadIdx.x == 128)
			p.wholes[x.segment * p.walks + x.walk] = whole;
	}
}

/* One chunk; returns its whole decay. */
template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ float state_walk<DK, SLICES, OUTPUTS>::walk(const piece &x, int chunk)
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

/* o^T is transposed on its way through shared memory. */
template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS>::store(const piece &x, int chunk,
                                                                       const float (&o)[32])
{
	const uint32_t staging = shared + S::OUT + warpgroup * PANEL_BYTES;
	const bool leader = threadIdx.x % 128 == 0;

	if (leader)
		store_wait_read();
	named_barrier_sync(1 + warpgroup, 128);
#pragma unroll
	for (int j = 0; j < 4; j++)
		store_transposed_x4(transposed_block(staging, 16 * j, 16 * warp, lane),
		                    pack_bf16(o[8 * j], o[8 * j + 1]),
		                    pack_bf16(o[8 * j + 2], o[8 * j + 3]),
		                    pack_bf16(o[8 * j + 4], o[8 * j + 5]),
		                    pack_bf16(o[8 * j + 6], o[8 * j + 7]));
	fence_async_proxy();
	named_barrier_sync(1 + warpgroup, 128);
	if (leader) {
		tensor_store(&p.out, staging, (x.slice * SLICES + warpgroup) * 64, chunk * CHUNK,
		             x.h, x.b);
		store_commit();
	}
}

template <int DK, int SLICES, bool OUTPUTS>
__global__ void __launch_bounds__(shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BLOCKS)
        walk_kernel(const __grid_constant__ parameters p)
{
	using S = shape<DK, SLICES>;
	extern __shared__ char unaligned[];
	const uint32_t shared = (shared_address(unaligned) + 1023) & ~1023u;

	if (threadIdx.x == 0) {
		for (int i = 0; i < S::STAGES; i++) {
			barrier_init(shared + S::FULL + 8 * i, 2); /* the copies, the decays */
			barrier_init(shared + S::EMPTY + 8 * i,
			             S::STATE_WARPS + (OUTPUTS ? S::SCORE_WARPS : 0));
		}
		for (int i = 0; i < SCORE_SLOTS; i++) {
			barrier_init(shared + S::SCORES_FULL + 8 * i, S::SCORE_WARPS);
			barrier_init(shared + S::SCORES_EMPTY + 8 * i, S::STATE_WARPS);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x < 128) {
		registers_decrease<S::PRODUCER_REGISTERS>();
		if (threadIdx.x == 0)
			produce<DK, SLICES, OUTPUTS>(p, shared);
		else if (threadIdx.x / 32 == 1)
			prepare_decays<DK, SLICES, OUTPUTS>(p, shared);
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

/* How a problem is cut. */
struct plan {
	int dk, slices; /* template arguments */
	int blocks_across, chunks, segment_chunks, segments, walks;
	int64_t state_floats; /* of a walk */
};

plan make_plan(const struct matrix_recurrence_args *a, int segment_chunks)
{
	plan x;

	x.dk = a->d_k <= 64 ? 64 : a->d_k <= 128 ? 128 : 256;
	x.slices = a->d_v <= 64 || x.dk == 256 ? 1 : 2; /* what registers hold */
	x.blocks_across = static_cast<int>((a->d_v + 64 * x.slices - 1) / (64 * x.slices));
	x.walks = static_cast<int>(a->batch * a->n_heads) * x.blocks_across;
	x.chunks = static_cast<int>((a->seq_len + CHUNK - 1) / CHUNK);
	x.state_floats = static_cast<int64_t>(x.dk) * 64 * x.slices;
	x.segment_chunks = segment_chunks ? segment_chunks : x.chunks;
	x.segments = (x.chunks + x.segment_chunks - 1) / x.segment_chunks;
	return x;
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

size_t plan_workspace(const plan &x)
{
	return static_cast<size_t>(x.segments - 1) * x.walks * (x.state_floats + 1) *
	               sizeof(float) +
	       256;
}

enum status fill_parameters(parameters &p, const struct matrix_recurrence_args *a, const plan &x,
                            void *workspace)
{
	enum status status = STATUS_OK;
	const auto encode = [&](CUtensorMap *map, const struct view *view, int64_t d) {
		if (status == STATUS_OK)
			status = tensor_map_encode(map, view, a->batch, a->seq_len, a->n_heads, d,
			                           CHUNK);
	};

	encode(&p.q, &a->q, a->d_k);
	encode(&p.k, &a->k, a->d_k);
	encode(&p.v, &a->v, a->d_v);
	encode(&p.out, &a->out, a->d_v);
	p.log_decay = a->log_decay;
	p.decay = a->decay;
	p.scale = a->scale;
	p.h0 = a->h0;
	p.final_state = a->final_state;
	p.states = static_cast<float *>(workspace);
	p.wholes = p.states + static_cast<int64_t>(x.segments - 1) * x.walks * x.state_floats;
	p.seq_len = static_cast<int>(a->seq_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.d_k = static_cast<int>(a->d_k);
	p.d_v = static_cast<int>(a->d_v);
	p.slices = x.blocks_across;
	p.chunks = x.chunks;
	p.segment_chunks = x.segment_chunks;
	p.segments = x.segments;
	p.walks = x.walks;
	return status;
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

/* Segments of the materialised form: four chunks, whose state is as large as their v. */
constexpr int MATERIALISED_CHUNKS = 4;

} // namespace

extern "C" const char *hopper_scalar_decay_unsupported(const void *args)
{
	const struct matrix_recurrence_args *a = recurrence(args);

	if (!cuda_is_hopper())
		return "needs compute capability 9.0";
	if (a->rule != RULE_PLAIN)
		return "only the plain rule";
	if (a->decay == DECAY_DIAGONAL)
		return "only decays that are the same for all channels";
	if (a->chunk && a->chunk != CHUNK)
		return "chunk must be 64, or 0";
	if (a->d_k > 256)
		return "d_k must be at most 256";
	if (!tensor_map_supports(&a->q) || !tensor_map_supports(&a->k) ||
	    !tensor_map_supports(&a->v) || !tensor_map_supports(&a->out))
		return "views must be 16-byte aligned";
	return NULL;
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

extern "C" size_t hopper_scalar_decay_materialise_workspace(const void *args)
{
	return plan_workspace(make_plan(recurrence(args), MATERIALISED_CHUNKS));
}

extern "C" enum status hopper_scalar_decay_materialise(const void *args, void *workspace)
{
	return run(recurrence(args), make_plan(recurrence(args), MATERIALISED_CHUNKS), workspace);
}
