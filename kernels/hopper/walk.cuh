/*
 * The walk along a sequence that the matrix-state recurrences of scalar decays
 * share: the roles of a block, its shared memory, the copies and the decays that
 * run ahead, and the state that a warpgroup keeps in its accumulators. What is done with a
 * chunk is the rule's: plain_rule of scalar_decay.cu, delta_rule of delta_rule.cu. A rule is a
 * policy class with
 *   SOLVES             whether the scores' warpgroup also solves a triangular system: then a block
 *                      has room and registers for that, powers come with beta, unscaled, and a
 *                      segment finds its state by a walk through the chunks before it
 *   BACKWARD           whether the walk begins at the last token, and tokens see those after them;
 *                      it ends with a gradient, of the first state, and that is scaled
 *   FOURTH             whether a stage has a fourth tile, as wide as v's
 *   COPIES             whether the state is also left in shared memory, for the scores'
 *                      warpgroup, which then has an output of its own, as wide as k
 *   score(p, shared)   what the scores' warpgroup does, of all pieces of this block
 *   walk(w, x, chunk)  what a state's warpgroup does with a chunk; returns its whole decay
 *   approach(w, x, chunk)  of a rule that solves, with one slice: the same for the state alone
 *   finish(w, x)       of a rule that solves: stores the last chunk's outputs
 */
#ifndef KERNELS_HOPPER_WALK_CUH
#define KERNELS_HOPPER_WALK_CUH

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/hopper/triangle.cuh"
#include "kernels/kernels.h"

namespace hopper
{

constexpr int CHUNK = 64, SCORE_SLOTS = 2;

/* DK: channels of q and k, rounded up; SLICES: state warpgroups, 64 channels of v each. */
template <int DK, int SLICES, typename RULE> struct walk_shape {
	static constexpr bool SOLVES = RULE::SOLVES, COPIES = RULE::COPIES;
	static constexpr int KEY_PANELS = DK / 64;
	static constexpr int THREADS = 128 * (2 + SLICES);
	static constexpr int BLOCKS = DK == 64 && SLICES == 1 && !SOLVES && !RULE::FOURTH
	                                      ? 2
	                                      : 1; /* per multiprocessor */
	static constexpr int STAGE_PANELS = 2 * KEY_PANELS + SLICES * (RULE::FOURTH ? 2 : 1);
	static constexpr int STAGES = STAGE_PANELS > 6                               ? 2
	                              : STAGE_PANELS == 4 || (SOLVES && SLICES == 1) ? 4
	                                                                             : 3;
	static constexpr int SCORE_WARPS = 4, STATE_WARPS = 4 * SLICES;
	static constexpr int PREPARERS = SOLVES ? 3 : 2; /* of a stage: copies, decays, betas */
	static constexpr int LAUNCH_REGISTERS = 65536 / THREADS / BLOCKS / 8 * 8;
	static constexpr int PRODUCER_REGISTERS = SOLVES ? 32 : 40;
	static constexpr int SCORE_REGISTERS = COPIES                  ? 136
	                                       : BLOCKS == 2           ? 72
	                                       : SOLVES && SLICES == 1 ? 160
	                                       : SOLVES                ? 96
	                                                               : 88;
	static constexpr int STATE_REGISTERS = BLOCKS == 2   ? 128
	                                       : SLICES == 1 ? 240
	                                       : COPIES      ? 168
	                                                     : 192;

	/* Shared memory. A stage: panels of q, of k, of v, and of the fourth. */
	static constexpr int Q = 0;
	static constexpr int K = KEY_PANELS * PANEL_BYTES;
	static constexpr int V = 2 * K;
	static constexpr int FOURTH = V + SLICES * PANEL_BYTES;
	static constexpr int STAGE_BYTES = STAGE_PANELS * PANEL_BYTES;
	static constexpr int SCORES = STAGES * STAGE_BYTES;
	static constexpr int OUT = SCORES + SCORE_SLOTS * PANEL_BYTES;
	static constexpr int OUT_SLOTS = SOLVES ? 2 : 1; /* of a warpgroup */
	static constexpr int SOLVED =
	        OUT + SLICES * OUT_SLOTS * PANEL_BYTES; /* a ring beside the scores' */
	static constexpr int TRIANGLE = SOLVED + (SOLVES ? SCORE_SLOTS * PANEL_BYTES : 0);
	/* The copy: panels of 64 of v's channels x 64 of k's, [slice][key panel]. */
	static constexpr int COPY = TRIANGLE + (SOLVES ? TRIANGLE_BYTES : 0);
	static constexpr int OWN_OUT = COPY + (COPIES ? SLICES * KEY_PANELS * PANEL_BYTES : 0);
	/* Of two chunks in turn, sums of 16 of v's channels by token: [slice][warp][token]. */
	static constexpr int SUMS = OWN_OUT + (COPIES ? KEY_PANELS * PANEL_BYTES : 0);
	static constexpr int SUMS_BYTES = RULE::FOURTH ? STATE_WARPS * CHUNK * 4 : 0;
	static constexpr int POWERS = SUMS + 2 * SUMS_BYTES;
	static constexpr int POWERS_BYTES = SOLVES ? 1152 : 1024; /* of a stage */
	static constexpr int BARRIERS = POWERS + STAGES * POWERS_BYTES;
	static constexpr int BYTES = BARRIERS + 256 + 1024; /* 1024: room to align the base */

	/* mbarriers, 8 bytes each. */
	static constexpr int FULL = BARRIERS;
	static constexpr int EMPTY = FULL + 8 * STAGES;
	static constexpr int SCORES_FULL = EMPTY + 8 * STAGES;
	static constexpr int SCORES_EMPTY = SCORES_FULL + 8 * SCORE_SLOTS;
	static constexpr int COPY_FULL = SCORES_EMPTY + 8 * SCORE_SLOTS;
	static constexpr int COPY_EMPTY = COPY_FULL + 8;
};

/* What the warp of the decays leaves of each chunk, floats by token: G, 2^G (of the plain rule,
 * times the scale), 2^(G_E - G), and beta; and one 2^(G_E). Backward -G, and the powers change
 * places, the scale with them. */
enum { LOG_DECAY = 0, FROM_START = 256, TO_END = 512, WHOLE = 768, BETA = 784 };

struct parameters {
	CUtensorMap q, k, v, out;
	CUtensorMap fourth, own_out; /* of rules that have them */
	struct view log_decay, beta;
	enum decay decay;
	float scale;
	const float *h0;
	float *final_state;
	float *states; /* [segments - 1][walks][DK/2 * 128 * SLICES] in the order of accumulators */
	float *wholes; /* [segments - 1][walks]: decay of a whole segment */
	int *begins;   /* [segments][batch * n_heads]: where walks of segments begin; or NULL */
	uint8_t *lost; /* [segments][walks][64 * slices]: channels of v whose state is not finite */
	int seq_len, n_heads, d_k, d_v, slices;  /* slices: blocks across v's channels */
	int q_step, k_step, v_step, fourth_step; /* between heads: 0 where they share it */
	int key_stride, value_stride;            /* of h0 and final_state */
	int chunks, segment_chunks, segments;
	int walks; /* batch * n_heads * slices */
};

/* What a block does at a time: one segment of one walk, chunks first .. last - 1, after those from
 * `begin` on for the state that the first finds. */
struct piece {
	int walk, segment, slice, b, h, begin, first, last;
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
	x.begin = p.begins ? p.begins[x.segment * (p.walks / p.slices) + pair] : x.first;
	return x;
}

/* The tokens' chunk that is the index-th of the walk. */
template <typename RULE> __device__ __forceinline__ int chunk_of(const parameters &p, int index)
{
	return RULE::BACKWARD ? p.chunks - 1 - index : index;
}

/* Pieces of a pass: the first has nothing to find out about the last segment. */
template <bool OUTPUTS> __device__ __forceinline__ int piece_count(const parameters &p)
{
	return p.walks * (OUTPUTS ? p.segments : p.segments - 1);
}

template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void produce(const parameters &p, uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;
	constexpr bool FOURTH = OUTPUTS && RULE::FOURTH;
	const int count = piece_count<OUTPUTS>(p);
	slot_ring<S::STAGES> stage;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);

#pragma unroll 1
		for (int i = x.begin; i < x.last; i++) {
			const int token = chunk_of<RULE>(p, i) * CHUNK;
			const uint32_t at = shared + stage.slot * S::STAGE_BYTES;
			const uint32_t full = shared + S::FULL + stage.slot * 8;
			const bool outputs = OUTPUTS && (!S::SOLVES || i >= x.first);

			barrier_wait(shared + S::EMPTY + stage.slot * 8, stage.parity ^ 1);
			barrier_arrive_expect(full, ((outputs ? 2 : 1) * S::KEY_PANELS +
			                             (FOURTH ? 2 : 1) * SLICES) *
			                                    PANEL_BYTES);
#pragma unroll
			for (int j = 0; j < S::KEY_PANELS; j++) {
				if (outputs)
					tensor_load(at + S::Q + j * PANEL_BYTES, &p.q, full, j * 64,
					            token, x.h * p.q_step, x.b);
				tensor_load(at + S::K + j * PANEL_BYTES, &p.k, full, j * 64, token,
				            x.h * p.k_step, x.b);
			}
#pragma unroll
			for (int j = 0; j < SLICES; j++) {
				const int channel = (x.slice * SLICES + j) * 64;

				tensor_load(at + S::V + j * PANEL_BYTES, &p.v, full, channel, token,
				            x.h * p.v_step, x.b);
				if (FOURTH)
					tensor_load(at + S::FOURTH + j * PANEL_BYTES, &p.fourth,
					            full, channel, token, x.h * p.fourth_step, x.b);
			}
			stage.advance();
		}
	}
}

/* log2 decay of one token as it lies in memory, or for all of a head; those past the end, or
 * backward before the start, do not decay. It counts as no less than -256, which is nothing left,
 * lest a chunk's sums lose the others. */
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

	__device__ bool has(int token) const
	{
		return token >= 0 && token < tokens;
	}

	__device__ __nv_bfloat16 load(int token) const
	{
		return data && has(token) ? data[token * stride] : __nv_bfloat16();
	}

	__device__ float log2(__nv_bfloat16 loaded, int token) const
	{
		const float own = __bfloat162float(loaded) * LOG2E;

		return data ? (own < -256.0f ? -256.0f : own) : has(token) ? constant : 0.0f;
	}
};

/* The powers of one chunk, this lane's two tokens decaying by 2^x0 and 2^x1, into its stage. */
template <int DK, int SLICES, typename RULE>
__device__ __forceinline__ void prepare_chunk(const parameters &p, uint32_t shared, int slot,
                                              uint32_t parity, float x0, float x1)
{
	using S = walk_shape<DK, SLICES, RULE>;
	const uint32_t powers = shared + S::POWERS + slot * S::POWERS_BYTES;
	const float scale = RULE::SOLVES ? 1.0f : p.scale;
	const float sign = RULE::BACKWARD ? -1.0f : 1.0f;
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
	const float2 from_start = {exp2_approx(g0), exp2_approx(g1)};
	const float2 to_end = {exp2_approx(end - g0), exp2_approx(end - g1)};
	const float2 out = RULE::BACKWARD ? to_end : from_start,
	             in = RULE::BACKWARD ? from_start : to_end;

	shared_store2(powers + LOG_DECAY + lane * 8, sign * g0, sign * g1);
	shared_store2(powers + FROM_START + lane * 8, scale * out.x, scale * out.y);
	shared_store2(powers + TO_END + lane * 8, in.x, in.y);
	if (lane == 0)
		shared_store1(powers + WHOLE, exp2_approx(end));
	warp_arrive(shared + S::FULL + slot * 8);
}

/* Tokens 2 lane and 2 lane + 1 of each chunk. They are read AHEAD chunks at a time, that many
 * before they are needed: the copies keep the memory's queues full, and a load waits long. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void prepare_decays(const parameters &p, uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;
	constexpr int AHEAD = RULE::SOLVES ? 1 : 2;
	const int count = piece_count<OUTPUTS>(p), lane = threadIdx.x % 32;
	slot_ring<S::STAGES> stage;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);
		const token_decays decays(p, x);
		__nv_bfloat16 next[2 * AHEAD];
		const auto token_of = [&](int chunk, int i) {
			return chunk_of<RULE>(p, chunk + i / 2) * CHUNK + 2 * lane + i % 2;
		};
		const auto load = [&](int chunk) {
#pragma unroll
			for (int i = 0; i < 2 * AHEAD; i++)
				next[i] = decays.load(token_of(chunk, i));
		};

		load(x.begin);
#pragma unroll 1
		for (int group = x.begin; group < x.last; group += AHEAD) {
			float now[2 * AHEAD];

#pragma unroll
			for (int i = 0; i < 2 * AHEAD; i++)
				now[i] = decays.log2(next[i], token_of(group, i));
			load(group + AHEAD);
#pragma unroll
			for (int i = 0; i < AHEAD && group + i < x.last; i++) {
				prepare_chunk<DK, SLICES, RULE>(p, shared, stage.slot, stage.parity,
				                                now[2 * i], now[2 * i + 1]);
				stage.advance();
			}
		}
	}
}

/* beta of each chunk's tokens, 0 past the end, by a warp of its own. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void prepare_betas(const parameters &p, uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;
	const int count = piece_count<OUTPUTS>(p), lane = threadIdx.x % 32;
	slot_ring<S::STAGES> stage;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);
		const auto *data = static_cast<const __nv_bfloat16 *>(p.beta.data) +
		                   x.b * p.beta.batch + x.h * p.beta.head;
		__nv_bfloat16 next[2];
		const auto load = [&](int chunk) {
#pragma unroll
			for (int i = 0; i < 2; i++) {
				const int token = chunk_of<RULE>(p, chunk) * CHUNK + 2 * lane + i;

				next[i] = token < p.seq_len ? data[token * p.beta.token]
				                            : __nv_bfloat16();
			}
		};

		load(x.begin);
#pragma unroll 1
		for (int chunk = x.begin; chunk < x.last; chunk++) {
			const float beta[2] = {__bfloat162float(next[0]),
			                       __bfloat162float(next[1])};

			load(chunk + 1);
			barrier_wait(shared + S::EMPTY + stage.slot * 8, stage.parity ^ 1);
			shared_store2(shared + S::POWERS + stage.slot * S::POWERS_BYTES + BETA +
			                      lane * 8,
			              beta[0], beta[1]);
			warp_arrive(shared + S::FULL + stage.slot * 8);
			stage.advance();
		}
	}
}

/* s (64 x 64) = a b^T, both of DK channels. */
template <int DK>
__device__ __forceinline__ void issue_scores(float (&s)[32], uint32_t a, uint32_t b)
{
	const uint64_t left = matrix_descriptor(a, 16), right = matrix_descriptor(b, 16);

	pin(s);
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < DK / 16; step++) {
		const int offset = (step / 4 * PANEL_BYTES + step % 4 * 32) / 16;

		wgmma_ss(s, left + offset, right + offset, step > 0);
	}
	wgmma_commit();
}

/* scale 2^(G_t - G_s) of this thread's scores [t][s]; backward s is the later one. */
__device__ __forceinline__ void find_decays(float (&decay)[32], uint32_t powers, float scale,
                                            int warp, int lane)
{
	const int row = 16 * warp + lane / 4;
	const float g[2] = {shared_float(powers + LOG_DECAY + row * 4),
	                    shared_float(powers + LOG_DECAY + row * 4 + 32)};

#pragma unroll
	for (int i = 0; i < 32; i += 4) {
		const int key = 2 * (lane % 4) + 2 * i;
		const float2 from = shared_float2(powers + LOG_DECAY + key * 4);

#pragma unroll
		for (int r = 0; r < 2; r++) {
			decay[i + 2 * r] = scale * exp2_approx(g[r] - from.x);
			decay[i + 2 * r + 1] = scale * exp2_approx(g[r] - from.y);
		}
	}
}

/* s[t][s] as it has decayed; zero where s > t, backward where s < t. */
template <bool BACKWARD>
__device__ __forceinline__ void apply_decays(float (&s)[32], const float (&decay)[32], int warp,
                                             int lane)
{
	const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);

#pragma unroll
	for (int i = 0; i < 32; i++) {
		const int own = row + 8 * (i / 2 % 2), key = column + 8 * (i / 4) + i % 2;

		s[i] = (BACKWARD ? key >= own : key <= own) ? s[i] * decay[i] : 0.0f;
	}
}

template <bool BACKWARD = false>
__device__ __forceinline__ void decay_scores(float (&s)[32], uint32_t powers, float scale, int warp,
                                             int lane)
{
	float decay[32];

	find_decays(decay, powers, scale, warp, lane);
	apply_decays<BACKWARD>(s, decay, warp, lane);
}

__device__ __forceinline__ void store_scores(uint32_t panel, const float (&s)[32], int warp,
                                             int lane)
{
#pragma unroll
	for (int j = 0; j < 4; j++)
		store_block(plain_block(panel, 16 * warp, 16 * j, lane), &s[8 * j]);
}

/* A warpgroup of the state: 64 channels of v, all of k's. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE> struct state_walk {
	using S = walk_shape<DK, SLICES, RULE>;
	static constexpr int PARTS = DK > 128 ? DK / 128 : 1, WIDTH = DK / 2 / PARTS;
	static constexpr int SLICE_COUNT = SLICES;

	const parameters &p;
	uint32_t shared;
	int warpgroup, warp, lane;
	slot_ring<S::STAGES> stage;
	slot_ring<SCORE_SLOTS> slot;
	slot_ring<1> copy;
	float s[PARTS][WIDTH]; /* S^T: rows are channels of v, columns of k */
	slot_ring<S::OUT_SLOTS> out;
	float o[S::SOLVES ? 32 : 1]; /* of a rule that solves: the last chunk's outputs */

	__device__ void begin(const piece &x);
	__device__ void end(const piece &x, float whole);
	/* All pieces of this block. */
	__device__ void run();
	__device__ void visit(float *tensor, const piece &x, bool write);
	__device__ void store(const piece &x, int chunk, const float (&o)[32]);
	__device__ void note_lost(const piece &x) const;

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
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void
state_walk<DK, SLICES, OUTPUTS, RULE>::visit(float *tensor, const piece &x, bool write)
{
	const int value = (x.slice * SLICES + warpgroup) * 64 + 16 * warp + lane / 4;
	const int key = 2 * (lane % 4);
	float *at = tensor + (static_cast<int64_t>(x.b) * p.n_heads + x.h) * p.d_k * p.d_v +
	            key * p.key_stride + value * p.value_stride;

#pragma unroll
	for (int i = 0; i < PARTS * WIDTH; i++) {
		const int row = key + 8 * (i >> 2) + (i & 1), column = value + 8 * ((i >> 1) & 1);
		float &element = s[i / WIDTH][i % WIDTH];

		if (row < p.d_k && column < p.d_v) {
			float *place = at + (i & 1) * p.key_stride + (i & 2) * 4 * p.value_stride;

			if (write)
				*place = RULE::BACKWARD ? element * p.scale : element;
			else
				element = *place;
		}
		if (i % 4 == 3)
			at += 8 * p.key_stride;
	}
}

template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS, RULE>::begin(const piece &x)
{
#pragma unroll
	for (int i = 0; i < PARTS * WIDTH; i++)
		s[i / WIDTH][i % WIDTH] = 0.0f;
	if (x.begin == 0) {
		if (p.h0)
			visit(const_cast<float *>(p.h0), x, false);
	} else if (OUTPUTS && !S::SOLVES) {
		const float *from = segment_state(x, x.segment - 1);

#pragma unroll
		for (int i = 0; i < PARTS * WIDTH; i++)
			s[i / WIDTH][i % WIDTH] = from[i * 128];
	}
}

template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS, RULE>::end(const piece &x,
                                                                           float whole)
{
	if (OUTPUTS) {
		if (p.final_state && x.segment == p.segments - 1)
			visit(p.final_state, x, true);
		if (S::SOLVES && p.segments > 1)
			note_lost(x);
	} else {
		float *to = segment_state(x, x.segment);

#pragma unroll
		for (int i = 0; i < PARTS * WIDTH; i++)
			to[i * 128] = s[i / WIDTH][i % WIDTH];
		if (threadIdx.x == 128)
			p.wholes[x.segment * p.walks + x.walk] = whole;
	}
}

/* Of each channel of v, whether its state is not finite: a number times 0 is then not 0. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void
state_walk<DK, SLICES, OUTPUTS, RULE>::note_lost(const piece &x) const
{
	uint8_t *at = p.lost + (x.segment * p.walks + x.walk) * 64 * SLICES + warpgroup * 64 +
	              16 * warp + lane / 4;
	float zero[2] = {};

#pragma unroll
	for (int i = 0; i < PARTS * WIDTH; i++)
		zero[i / 2 % 2] = fmaf(s[i / WIDTH][i % WIDTH], 0.0f, zero[i / 2 % 2]);
#pragma unroll
	for (int r = 0; r < 2; r++) {
		zero[r] += __shfl_xor_sync(~0u, zero[r], 1);
		zero[r] += __shfl_xor_sync(~0u, zero[r], 2);
		if (lane % 4 == 0)
			at[8 * r] = zero[r] != 0.0f;
	}
}

/* o^T is transposed on its way through shared memory. With two slots there the copy before the last
 * has read its own when the last barrier is passed. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void
state_walk<DK, SLICES, OUTPUTS, RULE>::store(const piece &x, int chunk, const float (&o)[32])
{
	const uint32_t staging =
	        shared + S::OUT + (warpgroup * S::OUT_SLOTS + out.slot) * PANEL_BYTES;
	const bool leader = threadIdx.x % 128 == 0;

	if (S::OUT_SLOTS == 1) {
		if (leader)
			store_wait_read();
		named_barrier_sync(1 + warpgroup, 128);
	}
#pragma unroll
	for (int j = 0; j < 4; j++)
		store_transposed_block(transposed_block(staging, 16 * j, 16 * warp, lane),
		                       &o[8 * j]);
	fence_async_proxy();
	if (S::OUT_SLOTS > 1 && leader)
		store_wait_read();
	named_barrier_sync(1 + warpgroup, 128);
	out.advance();
	if (leader) {
		tensor_store(&p.out, staging, (x.slice * SLICES + warpgroup) * 64,
		             chunk_of<RULE>(p, chunk) * CHUNK, x.h, x.b);
		store_commit();
	}
}

template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void state_walk<DK, SLICES, OUTPUTS, RULE>::run()
{
	const int count = piece_count<OUTPUTS>(p);

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);
		float whole = 1.0f;

		begin(x);
		if constexpr (S::SOLVES && SLICES == 1)
#pragma unroll 1
			for (int chunk = x.begin; chunk < x.first; chunk++)
				RULE::approach(*this, x, chunk);
#pragma unroll 1
		for (int chunk = x.first; chunk < x.last; chunk++)
			whole *= RULE::walk(*this, x, chunk);
		if constexpr (S::SOLVES)
			RULE::finish(*this, x);
		end(x, whole);
	}
	if (OUTPUTS && threadIdx.x % 128 == 0)
		store_wait_read();
}

/* Before the roles part: the barriers, by one thread. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void initialise_barriers(uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;

	for (int i = 0; i < S::STAGES; i++) {
		barrier_init(shared + S::FULL + 8 * i, S::PREPARERS);
		barrier_init(shared + S::EMPTY + 8 * i,
		             S::STATE_WARPS + (OUTPUTS ? S::SCORE_WARPS : 0));
	}
	for (int i = 0; i < SCORE_SLOTS; i++) {
		barrier_init(shared + S::SCORES_FULL + 8 * i, S::SCORE_WARPS);
		barrier_init(shared + S::SCORES_EMPTY + 8 * i, S::STATE_WARPS);
	}
	barrier_init(shared + S::COPY_FULL, S::STATE_WARPS);
	barrier_init(shared + S::COPY_EMPTY, S::SCORE_WARPS);
	barrier_init_fence();
}

/* A block, once its barriers are there: each warpgroup in its role. */
template <int DK, int SLICES, bool OUTPUTS, typename RULE>
__device__ __forceinline__ void walk_block(const parameters &p, uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;

	if (threadIdx.x < 128) {
		registers_decrease<S::PRODUCER_REGISTERS>();
		if (threadIdx.x == 0)
			produce<DK, SLICES, OUTPUTS, RULE>(p, shared);
		else if (threadIdx.x / 32 == 1)
			prepare_decays<DK, SLICES, OUTPUTS, RULE>(p, shared);
		else if (S::SOLVES && threadIdx.x / 32 == 2)
			prepare_betas<DK, SLICES, OUTPUTS, RULE>(p, shared);
	} else if (threadIdx.x >= 128 * (1 + SLICES)) {
		if constexpr (S::SCORE_REGISTERS > S::LAUNCH_REGISTERS)
			registers_increase<S::SCORE_REGISTERS>();
		else
			registers_decrease<S::SCORE_REGISTERS>();
		if (OUTPUTS)
			RULE::template score<DK, SLICES>(p, shared);
	} else {
		registers_increase<S::STATE_REGISTERS>();
		state_walk<DK, SLICES, OUTPUTS, RULE>{
		        p, shared, static_cast<int>(threadIdx.x / 128) - 1,
		        static_cast<int>(threadIdx.x / 32 % 4), static_cast<int>(threadIdx.x % 32)}
		        .run();
	}
}

/* How a problem is cut. */
struct plan {
	int dk, slices; /* template arguments */
	int blocks_across, chunks, segment_chunks, segments, walks;
	int64_t state_floats; /* of a walk */
};

inline plan make_plan(const struct matrix_recurrence_args *a, int segment_chunks,
                      int most_slices = 2)
{
	plan x;

	x.dk = a->d_k <= 64 ? 64 : a->d_k <= 128 ? 128 : 256;
	x.slices = a->d_v <= 64 || x.dk == 256 ? 1 : most_slices; /* what registers hold */
	x.blocks_across = static_cast<int>((a->d_v + 64 * x.slices - 1) / (64 * x.slices));
	x.walks = static_cast<int>(a->batch * a->n_heads) * x.blocks_across;
	x.chunks = static_cast<int>((a->seq_len + CHUNK - 1) / CHUNK);
	x.state_floats = static_cast<int64_t>(x.dk) * 64 * x.slices;
	x.segment_chunks = segment_chunks ? segment_chunks : x.chunks;
	x.segments = (x.chunks + x.segment_chunks - 1) / x.segment_chunks;
	return x;
}

/* What all walks ask for, apart from the rule and the widths. */
inline const char *walk_unsupported(const struct device *device,
                                    const struct matrix_recurrence_args *a)
{
	if (a->decay != DECAY_NONE && a->decay != DECAY_CONSTANT && a->decay != DECAY_SCALAR)
		return "only decays that are the same for all channels";
	if (a->n_heads > 1 && !a->out.head)
		return "heads must not share an output";
	return check_views(device, &a->q, &a->k, &a->v, &a->out);
}

inline size_t plan_workspace(const plan &x)
{
	return static_cast<size_t>(x.segments - 1) * x.walks * (x.state_floats + 1) *
	               sizeof(float) +
	       256;
}

inline enum status fill_parameters(parameters &p, const struct matrix_recurrence_args *a,
                                   const plan &x, void *workspace)
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
	p.beta = a->beta;
	p.decay = a->decay;
	p.scale = a->scale;
	p.h0 = a->h0;
	p.final_state = a->final_state;
	p.states = static_cast<float *>(workspace);
	p.wholes = p.states + static_cast<int64_t>(x.segments - 1) * x.walks * x.state_floats;
	p.seq_len = static_cast<int>(a->seq_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.q_step = a->q.head ? 1 : 0;
	p.k_step = a->k.head ? 1 : 0;
	p.v_step = a->v.head ? 1 : 0;
	p.key_stride = static_cast<int>(a->d_v);
	p.value_stride = 1;
	p.d_k = static_cast<int>(a->d_k);
	p.d_v = static_cast<int>(a->d_v);
	p.slices = x.blocks_across;
	p.chunks = x.chunks;
	p.segment_chunks = x.segment_chunks;
	p.segments = x.segments;
	p.walks = x.walks;
	p.begins = NULL;
	p.lost = NULL;
	return status;
}

} // namespace hopper

#endif
