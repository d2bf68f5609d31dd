/*
 * The two sweeps that give the gradients of the plain rule with decays that channels share. Both
 * are walks (walk.cuh) of a state whose rows are channels of keys and whose columns are channels
 * of values:
 *   forward   S, from v and k, gives dq^T = S dout^T
 *   back      dS, from dout and q, gives dk^T = dS v^T and dv = k dS
 * and what the tokens of a chunk give each other. The names of walk.cuh stand for
 *             q      k      v   fourth   out   own_out
 *   forward   dout   v      k   q        dq
 *   back      v      dout   q   k        dk    dv
 * Roles:
 *   producer   walk.cuh's, as are the decays'
 *   scores     (a warpgroup) forward plain_walk.cuh's; back v dout^T, through shared memory, and
 *              k q^T, which stays in registers: it sums dv, and reads dS in bf16 in shared memory
 *   state      (a warpgroup per 64 channels of keys) keeps S or dS as the accumulators of wgmma,
 *              and gives dq or dk as plain_walk.cuh gives its output
 *
 * The gradient of a log decay is what flows through it, from the state and the tokens before it to
 * the tokens from it on. For the tokens t of a group of chunks that ends with token E it is
 *   sum over i = t .. E of (q_i.dq_i - k_i.dk_i)  +  <S_E, dS_E>,
 * S_E the state after E. The forward sweep leaves S_E in bf16, the sweep back multiplies it with
 * dS_E; q.dq and k.dk are of the fp32 dq and dk. Two tokens of a chunk cancel in that sum to the
 * last bits, because both sweeps round the same scores; two of a group's chunks to the roundings
 * of S and dS. The groups keep those from adding up.
 *
 * Limit: memory: eleven tensors, and the states that are left, which are as much as a twelfth.
 * docs/kernels/scalar_decay.md.
 */
#ifndef KERNELS_HOPPER_GRADIENT_WALK_CUH
#define KERNELS_HOPPER_GRADIENT_WALK_CUH

#include "kernels/hopper/plain_walk.cuh"

namespace
{

/* Chunks after whose last token the two states meet. */
constexpr int GROUP = 4;

struct gradient_parameters : parameters {
	float *sums;  /* [slice][walk][T] of q.dq or of k.dk; NULL where decays have no gradient */
	uint4 *saved; /* [walk][border][slice][DK/16][128], in the order of accumulators */
	float *meets; /* [walk][border][slice][warp]: parts of <S, dS> */
	int borders;  /* between groups */
};

/* FLOWS: whether the decays have a gradient. */
template <bool backward, bool FLOWS> struct gradient_rule {
	static constexpr bool SOLVES = false, BACKWARD = backward, FOURTH = true, COPIES = backward;

	template <int DK, int SLICES>
	static __device__ void score(const parameters &p, uint32_t shared);
	template <int DK, int SLICES, bool OUTPUTS>
	static __device__ float walk(state_walk<DK, SLICES, OUTPUTS, gradient_rule> &w,
	                             const piece &x, int chunk);
};

/* ---- the scores' warpgroup of the sweep back ---- */

/* o (64 tokens x DK) as bf16 through shared memory to a chunk of own_out. */
template <int DK, int SLICES, typename RULE>
__device__ __forceinline__ void store_own(const parameters &p, uint32_t shared, const piece &x,
                                          int chunk, const float (&o)[DK / 2], int warp, int lane)
{
	using S = walk_shape<DK, SLICES, RULE>;
	const uint32_t staging = shared + S::OWN_OUT;
	const bool leader = threadIdx.x % 128 == 0;

	if (leader)
		store_wait_read();
	named_barrier_sync(1 + SLICES, 128);
#pragma unroll
	for (int j = 0; j < DK / 16; j++)
		store_block(
		        plain_block(staging + j / 4 * PANEL_BYTES, 16 * warp, 16 * (j % 4), lane),
		        &o[8 * j]);
	fence_async_proxy();
	named_barrier_sync(1 + SLICES, 128);
	if (leader) {
#pragma unroll
		for (int j = 0; j < S::KEY_PANELS; j++)
			tensor_store(&p.own_out, staging + j * PANEL_BYTES, j * 64,
			             chunk_of<RULE>(p, chunk) * CHUNK, x.h, x.b);
		store_commit();
	}
}

/* The scores of both kinds, and dv. */
template <int DK, int SLICES, typename RULE>
__device__ __forceinline__ void score_and_sum(const parameters &p, uint32_t shared)
{
	using S = walk_shape<DK, SLICES, RULE>;
	const int count = piece_count<true>(p), lane = threadIdx.x % 32;
	const int warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4;
	const uint64_t state = matrix_descriptor(shared + S::COPY, PANEL_BYTES);
	slot_ring<S::STAGES> stage;
	slot_ring<SCORE_SLOTS> slot;
	slot_ring<1> copy;

#pragma unroll 1
	for (int number = blockIdx.x; number < count; number += gridDim.x) {
		const piece x = locate(p, number);

#pragma unroll 1
		for (int chunk = x.first; chunk < x.last; chunk++) {
			const uint32_t at = shared + stage.slot * S::STAGE_BYTES;
			const uint32_t powers = shared + S::POWERS + stage.slot * S::POWERS_BYTES;
			const uint32_t scores = shared + S::SCORES + slot.slot * PANEL_BYTES;
			const uint64_t key = matrix_descriptor(at + S::FOURTH, 16);
			const uint64_t dout = matrix_descriptor(at + S::K, PANEL_BYTES);
			uint32_t packed[16];
			float o[DK / 2];

			barrier_wait(shared + S::FULL + stage.slot * 8, stage.parity);
			{
				float s[32], own[32], decay[32];

				issue_scores<DK>(s, at + S::Q, at + S::K);
				issue_scores<64 * SLICES>(own, at + S::FOURTH, at + S::V);
				find_decays(decay, powers, p.scale, warp, lane);
				wgmma_wait<1>();
				pin(s);
				apply_decays<true>(s, decay, warp, lane);
				barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8,
				             slot.parity ^ 1);
				store_scores(scores, s, warp, lane);
				warp_publish(shared + S::SCORES_FULL + slot.slot * 8);
				wgmma_wait<0>();
				pin(own);
				apply_decays<true>(own, decay, warp, lane);
#pragma unroll
				for (int i = 0; i < 16; i++)
					packed[i] = pack_bf16(own[2 * i], own[2 * i + 1]);
			}
			barrier_wait(shared + S::COPY_FULL, copy.parity);
			pin(o);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < 4 * SLICES; step++)
				wgmma_ss_b_transposed(
				        o, key + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16,
				        state + (step / 4 * S::KEY_PANELS * PANEL_BYTES +
				                 step % 4 * 2048) /
				                        16,
				        step > 0);
			wgmma_commit();
			const float power[2] = {shared_float(powers + FROM_START + row * 4),
			                        shared_float(powers + FROM_START + row * 4 + 32)};
			wgmma_wait<0>();
			pin(o);
			warp_arrive(shared + S::COPY_EMPTY);
#pragma unroll
			for (int i = 0; i < DK / 2; i++)
				o[i] *= power[i / 2 % 2];
			pin(o);
			pin(packed);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < CHUNK / 16; step++)
				wgmma_rs(o, &packed[4 * step], dout + step * 2048 / 16, true);
			wgmma_commit();
			wgmma_wait<0>();
			pin(o);
			pin(packed);
			warp_arrive(shared + S::EMPTY + stage.slot * 8);
			stage.advance();
			slot.advance();
			copy.advance();
			store_own<DK, SLICES, RULE>(p, shared, x, chunk, o, warp, lane);
		}
	}
	if (threadIdx.x % 128 == 0)
		store_wait_read();
}

template <bool backward, bool FLOWS>
template <int DK, int SLICES>
__device__ __forceinline__ void gradient_rule<backward, FLOWS>::score(const parameters &p,
                                                                      uint32_t shared)
{
	if constexpr (backward)
		score_and_sum<DK, SLICES, gradient_rule>(p, shared);
	else
		score_chunks<DK, SLICES, gradient_rule>(p, shared);
}

/* ---- the states' warpgroups ---- */

/* Where this thread's part of the state before a chunk lies. */
template <typename W>
__device__ __forceinline__ int64_t border_of(const W &w, const gradient_parameters &p,
                                             const piece &x, int chunk)
{
	return (static_cast<int64_t>(x.walk) * p.borders + chunk / GROUP - 1) * W::SLICE_COUNT +
	       w.warpgroup;
}

__device__ __forceinline__ bool is_border(const gradient_parameters &p, int chunk)
{
	return chunk % GROUP == 0 && chunk > 0 && chunk < p.chunks;
}

/* Forward, before a chunk: leaves the state that the sweep back asks for. */
template <int DK, typename W>
__device__ __forceinline__ void save_state(const W &w, const gradient_parameters &p, const piece &x,
                                           int chunk, const uint32_t (&packed)[DK / 4])
{
	if (!is_border(p, chunk))
		return;
	uint4 *to = p.saved + border_of(w, p, x, chunk) * (DK / 16 * 128) + threadIdx.x % 128;
#pragma unroll
	for (int i = 0; i < DK / 16; i++)
		to[i * 128] = make_uint4(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2],
		                         packed[4 * i + 3]);
}

/* Back, before the chunk ahead of `chunk`, the state's gradient is at hand. A warp's part of <S,
 * dS>. The state of the next border is fetched a chunk before it is asked for. */
template <int DK, typename W>
__device__ __forceinline__ void meet_state(const W &w, const gradient_parameters &p, const piece &x,
                                           int chunk, const float (&s)[DK / 2])
{
	if (is_border(p, chunk - 1) && threadIdx.x % 128 < DK)
		prefetch_l2(reinterpret_cast<const char *>(p.saved + border_of(w, p, x, chunk - 1) *
		                                                             (DK / 16 * 128)) +
		            threadIdx.x % 128 * 128);
	if (!is_border(p, chunk))
		return;
	const int64_t border = border_of(w, p, x, chunk);
	const uint4 *from = p.saved + border * (DK / 16 * 128) + threadIdx.x % 128;
	uint4 before[DK / 16];
	float sum = 0.0f;

#pragma unroll
	for (int i = 0; i < DK / 16; i++)
		before[i] = from[i * 128];
#pragma unroll
	for (int i = 0; i < DK / 16; i++) {
		float x8[8];

		unpack_bf16(x8, before[i]);
#pragma unroll
		for (int j = 0; j < 8; j++)
			sum = fmaf(x8[j], s[8 * i + j], sum);
	}
#pragma unroll
	for (int offset = 16; offset > 0; offset /= 2)
		sum += __shfl_xor_sync(~0u, sum, offset);
	if (w.lane == 0)
		p.meets[border * 4 + w.warp] = sum;
}

/* Back: dS as the scores' warpgroup reads it, rows of keys' channels. */
template <int DK, typename W>
__device__ __forceinline__ void copy_state(const W &w, const uint32_t (&packed)[DK / 4],
                                           uint32_t parity)
{
	using S = typename W::S;
	const uint32_t to = w.shared + S::COPY + w.warpgroup * S::KEY_PANELS * PANEL_BYTES;

	barrier_wait(w.shared + S::COPY_EMPTY, parity ^ 1);
#pragma unroll
	for (int j = 0; j < DK / 16; j++)
		store_matrix_x4(
		        plain_block(to + j / 4 * PANEL_BYTES, 16 * w.warp, 16 * (j % 4), w.lane),
		        packed[4 * j], packed[4 * j + 1], packed[4 * j + 2], packed[4 * j + 3]);
	warp_publish(w.shared + S::COPY_FULL);
}

/* Adds up the upper or the lower half of 2 half sums with the lane that is 2 half away. */
template <int half> __device__ __forceinline__ void trade_halves(float (&sum)[16], int lane)
{
	const bool upper = lane & 2 * half;

#pragma unroll
	for (int i = 0; i < half; i++) {
		const float given = upper ? sum[i] : sum[i + half];
		const float kept = upper ? sum[i + half] : sum[i];

		sum[i] = kept + __shfl_xor_sync(~0u, given, 2 * half);
	}
}

/* The sums over this warp's 16 channels of o^T times the fourth tile: of tokens 2 lane and 2 lane
 * + 1. Each exchange leaves a lane with half of the tokens. */
__device__ __forceinline__ float2 sum_channels(const float (&o)[32], uint32_t tile, int warp,
                                               int lane)
{
	float sum[16];

#pragma unroll
	for (int j = 0; j < 4; j++) {
		const float *at = &o[8 * j];
		uint32_t x[4];

		load_transposed_x4(transposed_block(tile, 16 * j, 16 * warp, lane), x);
		sum[4 * j] = at[0] * low_bf16(x[0]) + at[2] * low_bf16(x[1]);
		sum[4 * j + 1] = at[1] * high_bf16(x[0]) + at[3] * high_bf16(x[1]);
		sum[4 * j + 2] = at[4] * low_bf16(x[2]) + at[6] * low_bf16(x[3]);
		sum[4 * j + 3] = at[5] * high_bf16(x[2]) + at[7] * high_bf16(x[3]);
	}
	trade_halves<8>(sum, lane);
	trade_halves<4>(sum, lane);
	trade_halves<2>(sum, lane);
	return make_float2(sum[0], sum[1]);
}

/* The sums of a chunk's four warps, once all have been here, to memory. */
template <typename W>
__device__ __forceinline__ void store_sums(const W &w, const gradient_parameters &p, const piece &x,
                                           int token, uint32_t sums)
{
	if (w.warp >= 2)
		return;
	const int own = 32 * w.warp + w.lane;
	float sum = 0.0f;

#pragma unroll
	for (int i = 0; i < 4; i++)
		sum += shared_float(sums + (i * CHUNK + own) * 4);
	if (token + own < p.seq_len)
		p.sums[(static_cast<int64_t>(w.warpgroup) * p.walks + x.walk) * p.seq_len + token +
		       own] = sum;
}

template <bool backward, bool FLOWS>
template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ float
gradient_rule<backward, FLOWS>::walk(state_walk<DK, SLICES, OUTPUTS, gradient_rule> &w,
                                     const piece &x, int chunk)
{
	using S = walk_shape<DK, SLICES, gradient_rule>;
	/* No room for the operands of two products at once. */
	constexpr bool TIGHT = backward && DK == 128 && SLICES == 2;
	const gradient_parameters &p = static_cast<const gradient_parameters &>(w.p);
	const int tokens = chunk_of<gradient_rule>(p, chunk);
	const uint32_t at = w.shared + w.stage.slot * S::STAGE_BYTES;
	const uint32_t powers = w.shared + S::POWERS + w.stage.slot * S::POWERS_BYTES;
	const uint32_t values = at + S::V + w.warpgroup * PANEL_BYTES;
	const uint32_t sums = w.shared + S::SUMS + w.slot.slot * S::SUMS_BYTES + w.warpgroup * 1024;
	const uint64_t q = matrix_descriptor(at + S::Q, 16);
	const uint64_t k = matrix_descriptor(at + S::K, PANEL_BYTES);
	const uint64_t v = matrix_descriptor(values, 16);
	const uint64_t scores =
	        matrix_descriptor(w.shared + S::SCORES + w.slot.slot * PANEL_BYTES, 16);
	float(&s)[DK / 2] = w.s[0];
	uint32_t decayed[16], packed[DK / 4], read = 0;
	float o[32];

	barrier_wait(w.shared + S::FULL + w.stage.slot * 8, w.stage.parity);
	const float whole = shared_float(powers + WHOLE);
	if (backward && FLOWS)
		meet_state<DK>(w, p, x, tokens + 1, s);
#pragma unroll
	for (int i = 0; i < DK / 4; i++) {
		packed[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
		s[2 * i] *= whole;
		s[2 * i + 1] *= whole;
	}
	if (!backward && FLOWS)
		save_state<DK>(w, p, x, tokens, packed);
	pin(packed);
	pin(s);
	pin(o);
	wgmma_fence();
	issue_panels(o, packed, q);
	wgmma_commit();
	if constexpr (backward) {
		copy_state<DK>(w, packed, w.copy.parity);
		w.copy.advance();
	}
	if (TIGHT) {
		wgmma_wait<0>();
		pin(o);
		pin(packed);
	}
	load_decayed(decayed, values, powers, w.warp, w.lane);
	pin(decayed);
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < CHUNK / 16; step++)
		wgmma_rs(s, &decayed[4 * step], k + step * 2048 / 16, true);
	wgmma_commit();
	if (!TIGHT) {
		wgmma_wait<1>();
		pin(o);
		pin(packed);
	}
	/* o decays while the state is updated. */
	decay_outputs(o, powers, w.lane);
	barrier_wait(w.shared + S::SCORES_FULL + w.slot.slot * 8, w.slot.parity);
	pin(o);
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < CHUNK / 16; step++)
		wgmma_ss_transposed(o, v + step * 2048 / 16, scores + step * 32 / 16, true);
	wgmma_commit();
	wgmma_wait<0>();
	pin(s);
	pin(decayed);
	pin(o);
	w.release(S::SCORES_EMPTY + w.slot.slot * 8);
	w.slot.advance();
	if (FLOWS) {
		const float2 two =
		        sum_channels(o, at + S::FOURTH + w.warpgroup * PANEL_BYTES, w.warp, w.lane);

		shared_store2(sums + w.warp * 256 + w.lane * 8, two.x, two.y);
		read = __float_as_uint(two.x) | __float_as_uint(two.y);
	}
	warp_arrive_read(w.shared + S::EMPTY + w.stage.slot * 8, read);
	w.stage.advance();
	w.store(x, chunk, o);
	if (FLOWS)
		store_sums(w, p, x, tokens * CHUNK, sums);
	return whole;
}

template <bool backward, bool FLOWS, int DK, int SLICES>
__global__ void __launch_bounds__(walk_shape<DK, SLICES, gradient_rule<backward, FLOWS>>::THREADS,
                                  1) gradient_kernel(const __grid_constant__ gradient_parameters p)
{
	using rule = gradient_rule<backward, FLOWS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0)
		initialise_barriers<DK, SLICES, true, rule>(shared);
	__syncthreads();
	walk_block<DK, SLICES, true, rule>(p, shared);
}

/* ---- the decays' gradients ---- */

struct flow_parameters {
	struct view to;
	const float *gained, *given; /* the sums of q.dq and of k.dk, [slice][walk][T] */
	const float *meets;
	float scale;
	bool starts_empty; /* no h0: a first token has no state to decay */
	int seq_len, n_heads, walks, slices, borders;
};

constexpr int FLOW_WARPS = 8, FLOW_TOKENS = GROUP * CHUNK, FLOW_TILES = FLOW_TOKENS / 32;

/* A group of a walk. Neighbours are heads, whose gradients lie side by side. */
struct flow_unit {
	int walk, group, h, b;
	bool exists;
};

__device__ __forceinline__ flow_unit unit_of(const flow_parameters &p, int warp)
{
	const int64_t number = static_cast<int64_t>(blockIdx.x) * FLOW_WARPS + warp;
	const int groups = p.borders + 1;
	flow_unit x;

	x.h = static_cast<int>(number % p.n_heads);
	x.group = static_cast<int>(number / p.n_heads % groups);
	x.b = static_cast<int>(number / p.n_heads / groups);
	x.walk = x.b * p.n_heads + x.h;
	x.exists = x.walk < p.walks;
	return x;
}

/* A unit by a warp: the sums from each token on, 32 tokens at a time from the last. */
__device__ __forceinline__ void sum_flows(const flow_parameters &p, const flow_unit &x,
                                          __nv_bfloat16 (&to)[FLOW_TOKENS][FLOW_WARPS])
{
	const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	const int first = x.group * FLOW_TOKENS;
	const int64_t border = static_cast<int64_t>(x.walk) * p.borders + x.group;
	float flow[FLOW_TILES] = {}, rest = 0.0f;

	for (int slice = 0; slice < p.slices; slice++) {
		const int64_t at =
		        (static_cast<int64_t>(slice) * p.walks + x.walk) * p.seq_len + first + lane;

#pragma unroll
		for (int i = 0; i < FLOW_TILES; i++)
			if (first + 32 * i + lane < p.seq_len)
				flow[i] += p.gained[at + 32 * i] - p.given[at + 32 * i];
	}
	if (x.group < p.borders)
		for (int i = 0; i < 4 * p.slices; i++)
			rest += p.meets[border * 4 * p.slices + i];
	rest *= p.scale;
#pragma unroll
	for (int i = FLOW_TILES - 1; i >= 0; i--) {
		float sum = flow[i];

#pragma unroll
		for (int offset = 1; offset < 32; offset *= 2) {
			const float after = __shfl_down_sync(~0u, sum, offset);

			if (lane + offset < 32)
				sum += after;
		}
		sum += rest;
		rest = __shfl_sync(~0u, sum, 0);
		if (first + 32 * i + lane == 0 && p.starts_empty && !isnan(sum))
			sum = 0.0f;
		to[32 * i + lane][warp] = __float2bfloat16(sum);
	}
}

static __global__ void __launch_bounds__(32 * FLOW_WARPS)
        flow_kernel(const __grid_constant__ flow_parameters p)
{
	__shared__ __nv_bfloat16 tile[FLOW_TOKENS][FLOW_WARPS];
	const int column = threadIdx.x % FLOW_WARPS;
	const flow_unit own = unit_of(p, threadIdx.x / 32), out = unit_of(p, column);

	if (own.exists)
		sum_flows(p, own, tile);
	__syncthreads();
	if (!out.exists)
		return;
	__nv_bfloat16 *to =
	        static_cast<__nv_bfloat16 *>(p.to.data) + out.b * p.to.batch + out.h * p.to.head;
	for (int i = threadIdx.x / FLOW_WARPS; i < FLOW_TOKENS; i += 32) {
		const int64_t token = out.group * FLOW_TOKENS + i;

		if (token < p.seq_len)
			to[token * p.to.token] = tile[i][column];
	}
}

} // namespace

#endif
