/*
 * Gradients of gated linear attention, S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = scale q_t
 * S_t: two sweeps with the states on the chip, forward for dq, back for dk and the decays'
 * gradients, and a pass of gla.cu's fused kernel from the last token on for dv.
 *
 * A block takes a sequence and head through its chunks of 64 tokens, as four sub-chunks of 16. With
 * sums of log2 decays inside a sub-chunk, `upto` a token and `after` it, and dP = scale dout v^T
 * for its pairs of tokens that see each other,
 *   dq = scale 2^upto (S dout) + 2^-after sum of dP (2^after k),
 *   S <- 2^all S + (2^after k)^T v,
 *   dk = scale 2^after (dS v) + 2^after sum of dP (2^-after q),
 *   dS <- 2^all dS + (2^upto q)^T dout.
 * All exponents are <= 0 except -after, which is at most 60 where a warp's 16 channels decay
 * mildly in the sub-chunk. Elsewhere that warp takes the pairs one by one.
 *
 * The gradient of the log decay of a token and channel is what flows through it: the sum over the
 * tokens i from it on of q_i dq_i - k_i dk_i, over at most GROUP chunks, to which the states'
 * rowsum(S dS) is added at the end of a group. The sweep back keeps that sum in registers. Of
 * q dq it is given what the state had, as bf16, which the forward sweep leaves; of pairs inside a
 * sub-chunk it forms both terms from the same rounded factors, so that they cancel.
 *
 * Roles, z and y the two of dout and v, x and w the two of k and q:
 *             z      y      x   w
 *   forward   dout   v      k   q
 *   back      v      dout   q   k
 *   producer   a thread: tiles into a ring of two stages
 *   scores     (a warpgroup) a warp per sub-chunk: dP by mma.sync, back in both orders
 *   state      (a warpgroup per 64 channels of keys) keeps S or dS, rows of channels, as the
 *              accumulators of wgmma; its results take the places of its own tiles
 * Limit: memory. docs/kernels/gla.md.
 * wgmma in: sweep_kernel
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/gla.cuh"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/tensor_map.h"

using namespace hopper;

namespace
{

constexpr int CHUNK = 64, SUB = 16, SUBS = CHUNK / SUB, STAGES = 2, SLOTS = 2;
/* Chunks after whose last token the two states meet. */
constexpr int GROUP = 2;
constexpr float MILD = 60; /* log2 of a decay whose inverse may be a factor */

/* KEYS, VALUES: panels of 64 channels; a warpgroup for each of the keys'. */
template <int KEYS, int VALUES, bool BACK> struct layout {
	static constexpr int THREADS = 128 * (2 + KEYS);
	static constexpr int Z = 0, Y = VALUES * PANEL_BYTES, X = 2 * Y;
	static constexpr int W = X + KEYS * PANEL_BYTES, G = W + KEYS * PANEL_BYTES;
	static constexpr int FLOW = G + KEYS * PANEL_BYTES;
	static constexpr int STAGE_BYTES = FLOW + (BACK ? KEYS * PANEL_BYTES : 0);
	/* dP, rows of the tokens that results are of; back, their transposes besides. */
	static constexpr int SCORES = STAGES * STAGE_BYTES;
	static constexpr int SLOT_BYTES = (BACK ? 2 : 1) * PANEL_BYTES;
	static constexpr int BARRIERS = SCORES + SLOTS * SLOT_BYTES;
	static constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * STAGES;
	static constexpr int SCORES_FULL = EMPTY + 8 * STAGES;
	static constexpr int SCORES_EMPTY = SCORES_FULL + 8 * SLOTS;
	static constexpr int BYTES = BARRIERS + 256 + 1024; /* 1024: room to align the base */
};

struct parameters {
	CUtensorMap z, y, x, w, log_decay;
	CUtensorMap out;  /* dq or dk */
	CUtensorMap flow; /* of q dq, what is the state's: written forward, read back */
	CUtensorMap dlog_decay;
	const float *h0; /* or NULL */
	float *dh0;      /* or NULL */
	uint4 *saved;    /* [walk][border][warpgroup][d_v/16][128], in the order of accumulators */
	float scale;
	bool starts_empty; /* no h0: a first token has no state to decay */
	int seq_len, n_heads, d_k, d_v, chunks, borders, walks;
	int x_step, w_step; /* between heads: 0 where they share it */
};

template <bool BACK> __device__ __forceinline__ int chunk_of(const parameters &p, int index)
{
	return BACK ? p.chunks - 1 - index : index;
}

template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void produce(const parameters &p, uint32_t shared)
{
	using L = layout<KEYS, VALUES, BACK>;
	slot_ring<STAGES> stage;

#pragma unroll 1
	for (int walk = blockIdx.x; walk < p.walks; walk += gridDim.x) {
		const int b = walk / p.n_heads, h = walk - b * p.n_heads;

#pragma unroll 1
		for (int i = 0; i < p.chunks; i++) {
			const int token = chunk_of<BACK>(p, i) * CHUNK;
			const uint32_t at = shared + stage.slot * L::STAGE_BYTES;
			const uint32_t full = shared + L::FULL + stage.slot * 8;

			barrier_wait(shared + L::EMPTY + stage.slot * 8, stage.parity ^ 1);
			barrier_arrive_expect(full, L::STAGE_BYTES);
#pragma unroll
			for (int j = 0; j < VALUES; j++) {
				tensor_load(at + L::Z + j * PANEL_BYTES, &p.z, full, j * 64, token,
				            h, b);
				tensor_load(at + L::Y + j * PANEL_BYTES, &p.y, full, j * 64, token,
				            h, b);
			}
#pragma unroll
			for (int j = 0; j < KEYS; j++) {
				const uint32_t panel = at + j * PANEL_BYTES;

				tensor_load(panel + L::X, &p.x, full, j * 64, token, h * p.x_step,
				            b);
				tensor_load(panel + L::W, &p.w, full, j * 64, token, h * p.w_step,
				            b);
				tensor_load(panel + L::G, &p.log_decay, full, j * 64, token, h, b);
				if (BACK)
					tensor_load(panel + L::FLOW, &p.flow, full, j * 64, token,
					            h, b);
			}
			stage.advance();
		}
	}
}

/* A warp's sub-chunk of dP, [token of z][token of y], chunk after chunk. */
template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void score(const parameters &p, uint32_t shared)
{
	using L = layout<KEYS, VALUES, BACK>;
	const int first = threadIdx.x / 32 % 4 * SUB, lane = threadIdx.x % 32;
	slot_ring<STAGES> stage;
	slot_ring<SLOTS> slot;

#pragma unroll 1
	for (int walk = blockIdx.x; walk < p.walks; walk += gridDim.x) {
#pragma unroll 1
		for (int chunk = 0; chunk < p.chunks; chunk++) {
			const uint32_t at = shared + stage.slot * L::STAGE_BYTES;
			const uint32_t to = shared + L::SCORES + slot.slot * L::SLOT_BYTES;
			float s[8] = {};

			barrier_wait(shared + L::FULL + stage.slot * 8, stage.parity);
#pragma unroll
			for (int i = 0; i < 4 * VALUES; i++) {
				const uint32_t panel = at + i / 4 * PANEL_BYTES;
				uint32_t a[4], b[4];

				load_matrix_x4(plain_block(panel + L::Z, first, i % 4 * 16, lane),
				               a[0], a[1], a[2], a[3]);
				load_matrix_x4(plain_block(panel + L::Y, first, i % 4 * 16, lane),
				               b[0], b[1], b[2], b[3]);
				mma_16816(*reinterpret_cast<float(*)[4]>(&s[0]), a[0], a[1], a[2],
				          a[3], b[0], b[2]);
				mma_16816(*reinterpret_cast<float(*)[4]>(&s[4]), a[0], a[1], a[2],
				          a[3], b[1], b[3]);
			}
#pragma unroll
			for (int i = 0; i < 8; i++) {
				const int row = lane / 4 + 8 * (i / 2 % 2);
				const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;

				s[i] = (BACK ? column >= row : column <= row) ? p.scale * s[i]
				                                              : 0.0f;
			}
			warp_arrive_read(shared + L::EMPTY + stage.slot * 8, __float_as_uint(s[0]));
			barrier_wait(shared + L::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
			store_block(plain_block(to, first, first, lane), s);
			if (BACK)
				store_transposed_block(
				        transposed_block(to + PANEL_BYTES, first, first, lane), s);
			warp_publish(shared + L::SCORES_FULL + slot.slot * 8);
			stage.advance();
			slot.advance();
		}
	}
}

/* ---- the states' warpgroups: 16 channels x 16 tokens of a warp are eight numbers of a thread, as
 * they lie in an accumulator, or four pairs as they lie in an operand */

__device__ __forceinline__ void unpack_operand(float (&x)[8], const uint32_t (&pairs)[4])
{
#pragma unroll
	for (int i = 0; i < 4; i++) {
		x[2 * i] = low_bf16(pairs[i]);
		x[2 * i + 1] = high_bf16(pairs[i]);
	}
}

/* x 2^exponent as an operand, and what rounding has left of it. */
__device__ __forceinline__ void scale_operand(uint32_t (&pairs)[4], const float (&x)[8],
                                              const float (&exponent)[8], float sign)
{
#pragma unroll
	for (int i = 0; i < 4; i++)
		pairs[i] = pack_bf16(x[2 * i] * exp2_approx(sign * exponent[2 * i]),
		                     x[2 * i + 1] * exp2_approx(sign * exponent[2 * i + 1]));
}

/* The sums of log2 decays up to each token of a sub-chunk and after it. */
struct decay_sums {
	float upto[8], after[8], all[2]; /* all: of the thread's two channels */
	bool mild;                       /* of all of the warp's channels */
};

/* ones: the right operand that has a one where a token is up to another. */
__device__ __forceinline__ void sum_decays(decay_sums &d, uint32_t tile, const uint32_t (&ones)[4],
                                           int lane)
{
	constexpr uint32_t BOTH = 0x3f803f80u;
	uint32_t g[4];

	load_transposed_x4(tile, g);
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const uint32_t *one = &ones[2 * half];
		float upto[4] = {}, after[4] = {};

		mma_16816(upto, g[0], g[1], g[2], g[3], one[0], one[1]);
		mma_16816(after, g[0], g[1], g[2], g[3], one[0] ^ BOTH, one[1] ^ BOTH);
#pragma unroll
		for (int i = 0; i < 4; i++) {
			d.upto[4 * half + i] = LOG2E * upto[i];
			d.after[4 * half + i] = LOG2E * after[i];
		}
	}
	d.all[0] = d.upto[0] + d.after[0];
	d.all[1] = d.upto[2] + d.after[2];
	d.mild = __all_sync(~0u, d.all[0] >= -MILD && d.all[1] >= -MILD);
}

/*
 * sum[o] = sum over the sub-chunk's tokens u of dP x_u 2^(decay between o and u), those of u up to
 * o, or LATER those from it on; dP from the panel's row o and column u.
 */
template <bool LATER>
__device__ __forceinline__ void sum_pairs(float (&sum)[8], const float (&x)[8],
                                          const float (&upto)[8], uint32_t panel, int first,
                                          int lane)
{
#pragma unroll
	for (float &y : sum)
		y = 0.0f;
		/* Of each lane of the quad its tokens 2 j, 2 j + 1 and those 8 later. */
#pragma unroll 1
	for (int j = 0; j < 4; j++) {
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const int row = i / 2 % 2, u = 8 * (i / 4) + 2 * j + i % 2;
			const float value = __shfl_sync(~0u, x[i], (lane & ~3) + j);
			const float decay = __shfl_sync(~0u, upto[i], (lane & ~3) + j);

#pragma unroll
			for (int k = 0; k < 4; k++) {
				const int at = 4 * (k / 2) + 2 * row + k % 2;
				const int own = 8 * (k / 2) + 2 * (lane % 4) + k % 2;
				const uint32_t pair = static_cast<uint32_t>(
				        shared_load(panel + swizzle_128((first + own) * 128 +
				                                        (first + u) / 2 * 4)));
				const float weight = i % 2 ? high_bf16(pair) : low_bf16(pair);
				const float between = LATER ? decay - upto[at] : upto[at] - decay;

				if (LATER ? u >= own : u <= own)
					sum[at] =
					        fmaf(weight * value, exp2_approx(between), sum[at]);
			}
		}
	}
}

/* Sums over the tokens from each on; `rest` is that of the next token, and becomes that of the
 * first. */
__device__ __forceinline__ void sum_from_end(float (&x)[8], float (&rest)[2])
{
	const int lane = threadIdx.x % 4;

#pragma unroll
	for (int row = 0; row < 2; row++) {
#pragma unroll
		for (int half = 1; half >= 0; half--) {
			float &first = x[4 * half + 2 * row], &second = x[4 * half + 2 * row + 1];
			float sum = first + second;

#pragma unroll
			for (int offset = 1; offset < 4; offset *= 2) {
				const float after = __shfl_down_sync(~0u, sum, offset);

				if (lane + offset < 4)
					sum += after;
			}
			const float next = __shfl_down_sync(~0u, sum, 1);

			second += (lane < 3 ? next : 0.0f) + rest[row];
			first += second;
			rest[row] = __shfl_sync(~0u, first, threadIdx.x % 32 & ~3);
		}
	}
}

/* A sub-chunk of this warp's 16 channels: where its tokens' blocks lie in the stage. */
template <int KEYS, int VALUES, bool BACK> struct sweep {
	using L = layout<KEYS, VALUES, BACK>;
	static constexpr int WIDTH = 32 * VALUES; /* of the accumulators */

	const parameters &p;
	uint32_t shared;
	int warpgroup, warp, lane;
	uint32_t ones[4];
	slot_ring<STAGES> stage;
	slot_ring<SLOTS> slot;
	float s[WIDTH]; /* rows are channels of keys, columns of values */
	float rest[2];  /* back: what flows through the next token, of the thread's two channels */

	__device__ void run();
	__device__ void begin(int b, int h);
	__device__ void end(int b, int h);
	__device__ void cross_border(int walk, int chunk);
	__device__ void advance(uint32_t at, uint32_t scores, int first, bool clear);
	__device__ void leave(uint32_t at, int chunk, int b, int h);

	__device__ bool is_border(int chunk) const
	{
		return chunk % GROUP == 0 && chunk > 0 && chunk < p.chunks;
	}

	/* This warpgroup's part of the state before a chunk. */
	__device__ uint4 *border_state(int walk, int chunk) const
	{
		const int64_t border = static_cast<int64_t>(walk) * p.borders + chunk / GROUP - 1;

		return p.saved + (border * KEYS + warpgroup) * (WIDTH / 8 * 128);
	}

	__device__ float *element(float *tensor, int b, int h, int i) const
	{
		const int row = 64 * warpgroup + 16 * warp + lane / 4 + 8 * (i / 2 % 2);
		const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
		const int64_t head = static_cast<int64_t>(b) * p.n_heads + h;

		return row < p.d_k && column < p.d_v
		               ? tensor + (head * p.d_k + row) * p.d_v + column
		               : NULL;
	}

	__device__ uint32_t block(uint32_t at, int tile, int first) const
	{
		return transposed_block(at + tile + warpgroup * PANEL_BYTES, first, 16 * warp,
		                        lane);
	}
};

template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void sweep<KEYS, VALUES, BACK>::begin(int b, int h)
{
	rest[0] = rest[1] = 0.0f;
#pragma unroll
	for (int i = 0; i < WIDTH; i++) {
		const float *from =
		        BACK || !p.h0 ? NULL : element(const_cast<float *>(p.h0), b, h, i);

		s[i] = from ? *from : 0.0f;
	}
}

template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void sweep<KEYS, VALUES, BACK>::end(int b, int h)
{
#pragma unroll
	for (int i = 0; BACK && i < WIDTH; i++) {
		float *to = p.dh0 ? element(p.dh0, b, h, i) : NULL;

		if (to)
			*to = p.scale * s[i];
	}
}

/* Between two chunks, of which `chunk` is the second: forward leaves the state there, back
 * multiplies it with its gradient. What that needs is fetched a chunk before. */
template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void sweep<KEYS, VALUES, BACK>::cross_border(int walk, int chunk)
{
	if (BACK && is_border(chunk - 1))
		prefetch_l2(border_state(walk, chunk - 1) + threadIdx.x % 128 * (WIDTH / 8));
	if (!is_border(chunk))
		return;
	uint4 *at = border_state(walk, chunk) + threadIdx.x % 128;
	if (!BACK) {
#pragma unroll
		for (int i = 0; i < WIDTH / 8; i++)
			at[128 * i] = make_uint4(pack_bf16(s[8 * i], s[8 * i + 1]),
			                         pack_bf16(s[8 * i + 2], s[8 * i + 3]),
			                         pack_bf16(s[8 * i + 4], s[8 * i + 5]),
			                         pack_bf16(s[8 * i + 6], s[8 * i + 7]));
		return;
	}
	float sum[2] = {};
#pragma unroll
	for (int i = 0; i < WIDTH / 8; i++) {
		float x[8];

		unpack_bf16(x, at[128 * i]);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum[j / 2 % 2] = fmaf(x[j], s[8 * i + j], sum[j / 2 % 2]);
	}
#pragma unroll
	for (int row = 0; row < 2; row++) {
		sum[row] += __shfl_xor_sync(~0u, sum[row], 1);
		sum[row] += __shfl_xor_sync(~0u, sum[row], 2);
		rest[row] = p.scale * sum[row];
	}
}

/* One sub-chunk, whose first token of the chunk is `first`. clear: the first of all is among them,
 * and has no state to decay. */
template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void sweep<KEYS, VALUES, BACK>::advance(uint32_t at, uint32_t scores,
                                                                   int first, bool clear)
{
	const uint64_t z = matrix_descriptor(at + L::Z + first * 128, 16);
	const uint64_t y = matrix_descriptor(at + L::Y + first * 128, PANEL_BYTES);
	const uint32_t diagonal = first * 128 + first * 2;
	uint32_t packed[WIDTH / 2], pairs[4], taken[4], near_x[4], near_w[4];
	float state[8], inside[8], other[8], x[8], w[8];
	decay_sums d;

	sum_decays(d, block(at, L::G, first), ones, lane);
	load_transposed_x4(block(at, L::X, first), pairs);
	unpack_operand(x, pairs);
	load_transposed_x4(block(at, L::W, first), pairs);
	unpack_operand(w, pairs);
	scale_operand(taken, x, BACK ? d.upto : d.after, 1.0f);
	if (BACK) {
		scale_operand(near_x, x, d.after, d.mild ? -1.0f : 1.0f);
		scale_operand(near_w, w, d.after, 1.0f);
	}
	const float decay[2] = {exp2_approx(d.all[0]), exp2_approx(d.all[1])};
#pragma unroll
	for (int i = 0; i < WIDTH / 2; i++) {
		packed[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
		s[2 * i] *= decay[i % 2];
		s[2 * i + 1] *= decay[i % 2];
	}
	pin(packed);
	pin(s);
	pin(taken);
	pin(near_x);
	pin(near_w);
	pin(state);
	pin(inside);
	pin(other);
	wgmma_fence();
	issue_panels(state, packed, z);
	wgmma_rs_k_major(inside, BACK ? near_x : taken, matrix_descriptor(scores + diagonal, 16),
	                 false);
	if (BACK)
		wgmma_rs_k_major(other, near_w,
		                 matrix_descriptor(scores + PANEL_BYTES + diagonal, 16), false);
	wgmma_rs(s, taken, y, true);
	wgmma_commit();
	wgmma_wait<0>();
	pin(s);
	pin(packed);
	pin(taken);
	pin(near_x);
	pin(near_w);
	pin(state);
	pin(inside);
	pin(other);
	float rounded_x[8], rounded_w[8];

	if (BACK) {
		unpack_operand(rounded_x, near_x);
		unpack_operand(rounded_w, near_w);
	}
	if (!d.mild) {
		sum_pairs<BACK>(inside, x, d.upto, scores, first, lane);
		if (BACK)
			sum_pairs<false>(other, w, d.upto, scores + PANEL_BYTES, first, lane);
	}
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float far = p.scale * exp2_approx(BACK ? d.after[i] : d.upto[i]) * state[i];
		const float grown = exp2_approx(BACK ? d.after[i] : -d.after[i]);

		if (BACK)
			other[i] = d.mild ? rounded_x[i] * other[i] - rounded_w[i] * inside[i]
			                  : x[i] * other[i] - w[i] * inside[i];
		inside[i] = far + (d.mild ? grown * inside[i] : inside[i]);
		state[i] = w[i] * far;
	}
	store_transposed_block(block(at, L::X, first), inside);
	if (!BACK) {
		store_transposed_block(block(at, L::W, first), state);
		return;
	}
	load_transposed_x4(block(at, L::FLOW, first), pairs);
	unpack_operand(x, pairs);
#pragma unroll
	for (int i = 0; i < 8; i++)
		other[i] += x[i] - state[i];
	sum_from_end(other, rest);
	const bool none = clear && lane % 4 == 0;
#pragma unroll
	for (int i = 0; i < 4; i += 2)
		other[i] = none && !isnan(other[i]) ? 0.0f : other[i];
	store_transposed_block(block(at, L::G, first), other);
}

/* The results leave from the places of x and of w or the decays; then those are free. */
template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void sweep<KEYS, VALUES, BACK>::leave(uint32_t at, int chunk, int b,
                                                                 int h)
{
	const uint32_t panel = at + warpgroup * PANEL_BYTES;

	fence_async_proxy();
	named_barrier_sync(1 + warpgroup, 128);
	if (threadIdx.x % 128 == 0) {
		tensor_store(&p.out, panel + L::X, 64 * warpgroup, chunk * CHUNK, h, b);
		if (BACK)
			tensor_store(&p.dlog_decay, panel + L::G, 64 * warpgroup, chunk * CHUNK, h,
			             b);
		else
			tensor_store(&p.flow, panel + L::W, 64 * warpgroup, chunk * CHUNK, h, b);
		store_commit();
		store_wait_read();
	}
}

template <int KEYS, int VALUES, bool BACK>
__device__ __forceinline__ void sweep<KEYS, VALUES, BACK>::run()
{
	/* Of the right operand rows are tokens that are summed, columns those that they are summed
	 * for. */
#pragma unroll
	for (int i = 0; i < 4; i++) {
		const int token = 8 * (i / 2) + lane / 4, summed = 8 * (i % 2) + 2 * (lane % 4);

		ones[i] =
		        (summed <= token ? 0x3f80u : 0u) | (summed + 1 <= token ? 0x3f800000u : 0u);
	}
#pragma unroll 1
	for (int walk = blockIdx.x; walk < p.walks; walk += gridDim.x) {
		const int b = walk / p.n_heads, h = walk - b * p.n_heads;

		begin(b, h);
#pragma unroll 1
		for (int i = 0; i < p.chunks; i++) {
			const int chunk = chunk_of<BACK>(p, i);
			const uint32_t at = shared + stage.slot * L::STAGE_BYTES;
			const uint32_t scores = shared + L::SCORES + slot.slot * L::SLOT_BYTES;

			cross_border(walk, BACK ? chunk + 1 : chunk);
			barrier_wait(shared + L::FULL + stage.slot * 8, stage.parity);
			barrier_wait(shared + L::SCORES_FULL + slot.slot * 8, slot.parity);
#pragma unroll 1
			for (int j = 0; j < SUBS; j++)
				advance(at, scores, (BACK ? SUBS - 1 - j : j) * SUB,
				        p.starts_empty && chunk == 0 && j == SUBS - 1);
			leave(at, chunk, b, h);
			warp_arrive(shared + L::SCORES_EMPTY + slot.slot * 8);
			warp_arrive(shared + L::EMPTY + stage.slot * 8);
			stage.advance();
			slot.advance();
		}
		end(b, h);
	}
}

template <int KEYS, int VALUES, bool BACK>
__global__ void __launch_bounds__(layout<KEYS, VALUES, BACK>::THREADS, 1)
        sweep_kernel(const __grid_constant__ parameters p)
{
	using L = layout<KEYS, VALUES, BACK>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0) {
		for (int i = 0; i < STAGES; i++) {
			barrier_init(shared + L::FULL + 8 * i, 1);
			barrier_init(shared + L::EMPTY + 8 * i, 4 + 4 * KEYS);
		}
		for (int i = 0; i < SLOTS; i++) {
			barrier_init(shared + L::SCORES_FULL + 8 * i, 4);
			barrier_init(shared + L::SCORES_EMPTY + 8 * i, 4 * KEYS);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x < 128) {
		registers_decrease<40>();
		if (threadIdx.x == 0)
			produce<KEYS, VALUES, BACK>(p, shared);
	} else if (threadIdx.x >= 128 * (1 + KEYS)) {
		registers_decrease<72>();
		score<KEYS, VALUES, BACK>(p, shared);
	} else {
		registers_increase<KEYS == 2 ? 200 : 240>();
		sweep<KEYS, VALUES, BACK>{p, shared, static_cast<int>(threadIdx.x / 128) - 1,
		                          static_cast<int>(threadIdx.x / 32 % 4),
		                          static_cast<int>(threadIdx.x % 32)}
		        .run();
	}
}

/* ---- host */

/* Tokens beyond which sequences and heads have to be as many as half of the multiprocessors: they
 * are not cut into segments. */
constexpr int LONG = 1024;

int panels(int64_t channels)
{
	return channels <= 64 ? 1 : 2;
}

/* Where the workspace's parts begin, in bytes. */
struct room {
	size_t saved, flow, bytes;
	int chunks, borders;
};

room room_of(const struct matrix_recurrence_args *f)
{
	const auto whole = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
	const size_t walks = static_cast<size_t>(f->batch * f->n_heads);
	room r;

	r.chunks = static_cast<int>((f->seq_len + CHUNK - 1) / CHUNK);
	r.borders = (r.chunks - 1) / GROUP;
	r.saved = 0;
	r.flow = whole(walks * r.borders * panels(f->d_k) * panels(f->d_v) * PANEL_BYTES);
	r.bytes = r.flow + whole(walks * f->seq_len * f->d_k * 2);
	return r;
}

/* Of q dq, what is the state's: [B, T, H, d_k]. */
struct view flow_of(const struct matrix_recurrence_args *f, const room &r, char *workspace)
{
	const int64_t token = f->n_heads * f->d_k;

	return {workspace + r.flow, f->seq_len * token, token, f->d_k};
}

template <int KEYS, int VALUES, bool BACK>
enum status launch_sweep(struct device *device, const parameters &p)
{
	using L = layout<KEYS, VALUES, BACK>;

	return submit(device, sweep_kernel<KEYS, VALUES, BACK>, turns(device, p.walks), L::THREADS,
	              L::BYTES, p);
}

template <bool BACK>
enum status run_sweep(struct device *device, const struct matrix_recurrence_backward_args *a,
                      char *workspace)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const room r = room_of(f);
	const struct view flow = flow_of(f, r, workspace);
	enum status status = STATUS_OK;
	parameters p;
	const auto encode = [&](CUtensorMap *map, const struct view &view, int64_t d) {
		if (status == STATUS_OK)
			status = tensor_map_encode(map, &view, f->batch, f->seq_len, f->n_heads, d,
			                           CHUNK);
	};

	encode(&p.z, BACK ? f->v : a->dout, f->d_v);
	encode(&p.y, BACK ? a->dout : f->v, f->d_v);
	encode(&p.x, BACK ? f->q : f->k, f->d_k);
	encode(&p.w, BACK ? f->k : f->q, f->d_k);
	encode(&p.log_decay, f->log_decay, f->d_k);
	encode(&p.out, BACK ? a->dk : a->dq, f->d_k);
	encode(&p.flow, flow, f->d_k);
	encode(&p.dlog_decay, a->dlog_decay, f->d_k);
	p.h0 = f->h0;
	p.dh0 = a->dh0;
	p.saved = reinterpret_cast<uint4 *>(workspace + r.saved);
	p.scale = f->scale;
	p.starts_empty = !f->h0;
	p.seq_len = static_cast<int>(f->seq_len);
	p.n_heads = static_cast<int>(f->n_heads);
	p.d_k = static_cast<int>(f->d_k);
	p.d_v = static_cast<int>(f->d_v);
	p.chunks = r.chunks;
	p.borders = r.borders;
	p.walks = static_cast<int>(f->batch * f->n_heads);
	p.x_step = (BACK ? f->q : f->k).head ? 1 : 0;
	p.w_step = (BACK ? f->k : f->q).head ? 1 : 0;
	TRY(status);
	if (panels(f->d_k) == 1)
		return panels(f->d_v) == 1 ? launch_sweep<1, 1, BACK>(device, p)
		                           : launch_sweep<1, 2, BACK>(device, p);
	return panels(f->d_v) == 1 ? launch_sweep<2, 1, BACK>(device, p)
	                           : launch_sweep<2, 2, BACK>(device, p);
}

} // namespace

extern "C" const char *hopper_gla_backward_unsupported(const struct device *device,
                                                       const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *f = &a->forward;

	if (f->decay != DECAY_DIAGONAL || f->rule != RULE_PLAIN)
		return "only diagonal decays and the plain rule";
	if (f->d_k > 128 || f->d_v > 128)
		return "d_k and d_v must be at most 128";
	if (f->seq_len > LONG && 2 * f->batch * f->n_heads < cuda_sm_count(device))
		return "too few sequences and heads for their length";
	if (f->n_heads > 1 && (!f->v.head || !a->dq.head || !a->dk.head || !a->dlog_decay.head))
		return "heads must not share v or an output";
	if (const char *why = gla_values_gradient_unsupported(device, a))
		return why;
	return check_views(device, &a->dq, &a->dk, &a->dlog_decay);
}

extern "C" size_t hopper_gla_backward_workspace(const struct device *, const void *args)
{
	return room_of(&static_cast<const struct matrix_recurrence_backward_args *>(args)->forward)
	        .bytes;
}

extern "C" enum status hopper_gla_backward(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	auto *memory = static_cast<char *>(workspace);

	TRY(run_sweep<false>(device, a, memory));
	TRY(run_sweep<true>(device, a, memory));
	return gla_values_gradient(device, a);
}
