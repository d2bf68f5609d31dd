/*
 * Attention forward for sm_90a: d = 64 or 128, bf16 in and out, fp32 softmax.
 *
 * One persistent kernel for every mask. A block is a producer warp and two
 * consumer warpgroups of 64 query rows each; keys and values stream through
 * two-stage rings in tiles of 128. Each mask is an interval of visible keys
 * per query, so only tiles that an end of the interval cuts pay for masking.
 *
 *   producer   ticket -> tile; TMA: K, Q, then K and V alternately, and for RAT
 *              the own values (through the K ring) and the gates (the V ring)
 *   consumer   S = Q K(n); O += P V(n+1) issued behind it; softmax of S while
 *              the second product runs
 *
 * Tiles are handed out longest first, heads in groups whose keys and values
 * fit in L2.
 *
 * What was tried (one H200, 16 heads x 128, 262144 tokens, causal; TFLOP/s at
 * T = 4096 / 16384 / 131072; cuDNN 9.19 in the same run: 535 / 586 / 565):
 *   products and softmax one after the other,
 *     two warpgroups taking turns by named barriers        540 / 587 / 594
 *   the same without turns                                 550 / 593 / 599
 *   softmax under the second product, turns                534 / 577 / 590
 *   softmax under the second product, no turns             556 / 604 / 600
 *   and O rescaled only when a maximum grows by over 8
 *     (predicted: 64 of 420 instructions saved, +5%)       571 / 625 / 635
 *   and the producer's loop kept rolled (no spills, fewer
 *     registers moved)                                     580 / 635 / 643
 *   a quarter of the exponentials as cubics on the
 *     multiply-add units (predicted +3%)                   548 / 599 / 598
 * The turns cost more than they order: the hardware interleaves two
 * warpgroups well enough by itself. The issue slots, not the exponential unit,
 * are what the products wait for. At d = 64 exponentials and products are
 * equally long, and a third warpgroup hides what is left: 449 -> 477 TFLOP/s at
 * T = 16384 with 32 heads (cuDNN 453).
 */
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/hopper.h"
#include "kernels/hopper/ptx.cuh"
#include "kernels/kernels.h"
#include "kernels/hopper/tensor_map.h"

using namespace hopper;

namespace
{

constexpr int TILE_N = 128, STAGES = 2, SCHEDULE_SLOTS = 2;

/* Of a head width: how many consumer warpgroups, and the registers of a thread of either kind. */
template <int D> struct shape {
	static constexpr int WARPGROUPS = D == 64 ? 3 : 2;
	static constexpr int TILE_M = 64 * WARPGROUPS;
	static constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
	static constexpr int THREADS = 128 * (WARPGROUPS + 1);
	static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 40;
	static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : 232;
};

struct parameters {
	CUtensorMap q, k, v, own_value, gate, out;
	int seq_len, kv_len, n_heads, q_heads, pairs; /* pairs: batch * n_heads */
	int window, chunk;
	enum mask mask;
	float scale_log2; /* scale * log2(e) */
	const float *own_score;
	bool has_gate;
	float *lse;
	__nv_bfloat16 *ungated;
	int64_t ungated_batch, ungated_token, ungated_head;
	int m_tiles, heads_per_group; /* batch*head pairs whose K and V share L2 */
	int *ticket;
};

template <int D> struct shared_layout {
	static constexpr int ROWS_BYTES =
	        shape<D>::TILE_M * D * 2;                 /* of queries, own values, gates */
	static constexpr int KEYS_BYTES = TILE_N * D * 2; /* of keys, values */
	static constexpr int STAGE_BYTES = ROWS_BYTES > KEYS_BYTES ? ROWS_BYTES : KEYS_BYTES;
	static constexpr int Q = 0;
	static constexpr int K = Q + ROWS_BYTES;
	static constexpr int V = K + STAGES * STAGE_BYTES;
	static constexpr int O = V + STAGES * STAGE_BYTES;
	static constexpr int BARRIERS = O + ROWS_BYTES;
	static constexpr int BYTES = BARRIERS + 256 + 1024; /* 1024: room to align the base */
};

/* mbarriers, 8 bytes each, then the tile numbers. */
enum {
	BAR_Q_FULL,
	BAR_Q_EMPTY,
	BAR_K_FULL,
	BAR_K_EMPTY = BAR_K_FULL + STAGES,
	BAR_V_FULL = BAR_K_EMPTY + STAGES,
	BAR_V_EMPTY = BAR_V_FULL + STAGES,
	BAR_TILE_FULL = BAR_V_EMPTY + STAGES,
	BAR_TILE_EMPTY = BAR_TILE_FULL + SCHEDULE_SLOTS,
	BAR_COUNT = BAR_TILE_EMPTY + SCHEDULE_SLOTS
};

/* Position in a ring of n slots; a full trip flips the parity. */
template <int n> struct ring {
	int slot = 0;
	uint32_t parity = 0;

	__device__ void advance()
	{
		if (++slot == n) {
			slot = 0;
			parity ^= 1;
		}
	}
};

struct tile {
	int m, b, h;         /* query tile, sequence, head */
	int n_first, n_last; /* key tiles, visited from the first down to the last; none if first <
	                        last */
};

/* First and last visible key of query t; none visible: last < first. */
__device__ __forceinline__ void visible(const parameters &p, int t, int &first, int &last)
{
	const int end = p.kv_len - 1;

	first = 0;
	last = end;
	if (p.mask == MASK_CHUNK) {
		last = min(t / p.chunk - 1, end);
	} else if (p.mask != MASK_FULL) {
		last = min(t, end);
		if (p.mask == MASK_WINDOW)
			first = max(t - p.window, 0);
	}
}

template <int D> __device__ __forceinline__ tile locate(const parameters &p, int number)
{
	constexpr int TILE_M = shape<D>::TILE_M;
	const int group = number / (p.heads_per_group * p.m_tiles);
	const int first_pair = group * p.heads_per_group;
	const int in_group = min(p.heads_per_group, p.pairs - first_pair);
	const int within = number - first_pair * p.m_tiles;
	const int pair = first_pair + within % in_group;
	tile t;
	int first, last, unused;

	t.m = p.m_tiles - 1 - within / in_group;
	t.b = pair / p.n_heads;
	t.h = pair - t.b * p.n_heads;
	visible(p, t.m * TILE_M, first, unused);
	visible(p, min(t.m * TILE_M + TILE_M, p.seq_len) - 1, unused, last);
	t.n_first = last >= 0 ? last / TILE_N : -1;
	t.n_last = first / TILE_N;
	return t;
}

/* A tile of `rows` x D into a stage, as D/64 swizzled panels. */
template <int D, int rows>
__device__ __forceinline__ void load_tile(uint32_t stage, uint32_t full, const CUtensorMap *map,
                                          int token, int head, int batch)
{
	barrier_arrive_expect(full, rows * D * 2);
#pragma unroll
	for (int panel = 0; panel < D / 64; panel++)
		tensor_load(stage + panel * rows * 128, map, full, panel * 64, token, head, batch);
}

/* The producer's side of one ring: its stages and barriers are at fixed places. */
template <int D, int STAGES_AT, int FULL, int EMPTY> struct load_ring : ring<STAGES> {
	template <int rows>
	__device__ void load(uint32_t shared, const CUtensorMap *map, int token, int head,
	                     int batch)
	{
		const uint32_t barrier = shared + shared_layout<D>::BARRIERS + slot * 8;

		barrier_wait(barrier + EMPTY * 8, parity ^ 1);
		load_tile<D, rows>(shared + STAGES_AT + slot * shared_layout<D>::STAGE_BYTES,
		                   barrier + FULL * 8, map, token, head, batch);
		advance();
	}
};

template <int D> __device__ __forceinline__ void produce(const parameters &p, uint32_t shared)
{
	using layout = shared_layout<D>;
	constexpr int TILE_M = shape<D>::TILE_M;
	const int n_tiles = p.m_tiles * p.pairs;
	ring<SCHEDULE_SLOTS> schedule;
	load_ring<D, layout::K, BAR_K_FULL, BAR_K_EMPTY> k;
	load_ring<D, layout::V, BAR_V_FULL, BAR_V_EMPTY> v;
	const uint32_t barriers = shared + layout::BARRIERS;
	uint32_t q_parity = 1;

	for (int number = blockIdx.x;; number = gridDim.x + atomicAdd(p.ticket, 1)) {
		barrier_wait(barriers + (BAR_TILE_EMPTY + schedule.slot) * 8, schedule.parity ^ 1);
		shared_store(barriers + BAR_COUNT * 8 + schedule.slot * 4, number);
		barrier_arrive(barriers + (BAR_TILE_FULL + schedule.slot) * 8);
		schedule.advance();
		if (number >= n_tiles)
			return;
		const tile t = locate<D>(p, number);
		const int q_head = t.h % p.q_heads;
		if (t.n_first >= t.n_last) {
			k.template load<TILE_N>(shared, &p.k, t.n_first * TILE_N, t.h, t.b);
			barrier_wait(barriers + BAR_Q_EMPTY * 8, q_parity);
			q_parity ^= 1;
			load_tile<D, TILE_M>(shared + layout::Q, barriers + BAR_Q_FULL * 8, &p.q,
			                     t.m * TILE_M, q_head, t.b);
#pragma unroll 1 /* unrolled it outgrows the producer's registers */
			for (int n = t.n_first; n > t.n_last; n--) {
				k.template load<TILE_N>(shared, &p.k, (n - 1) * TILE_N, t.h, t.b);
				v.template load<TILE_N>(shared, &p.v, n * TILE_N, t.h, t.b);
			}
			v.template load<TILE_N>(shared, &p.v, t.n_last * TILE_N, t.h, t.b);
		}
		if (p.own_score)
			k.template load<TILE_M>(shared, &p.own_value, t.m * TILE_M, t.h, t.b);
		if (p.has_gate)
			v.template load<TILE_M>(shared, &p.gate, t.m * TILE_M, t.h, t.b);
	}
}

/* S (64 x 128) = Q K^T of one stage. Descriptors count in 16 bytes. */
template <int D>
__device__ __forceinline__ void issue_scores(float (&s)[64], uint64_t q, uint64_t k)
{
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < D / 16; step++) {
		const int panel = step / 4, within = step % 4 * 32;

		wgmma_ss(s, q + (panel * shape<D>::TILE_M * 128 + within) / 16,
		         k + (panel * TILE_N * 128 + within) / 16, step > 0);
	}
	wgmma_commit();
}

/* O (64 x D) += P V of one stage. */
template <int D>
__device__ __forceinline__ void issue_values(float (&o)[D / 2], const uint32_t (&p)[32], uint64_t v)
{
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < TILE_N / 16; step++)
		wgmma_rs(o, &p[4 * step], v + step * 2048 / 16, true);
	wgmma_commit();
}

/* The running softmax of the two rows a thread holds; base 2, scores times scale_log2. */
struct softmax {
	float max[2], sum[2];
};

/* Hides what is outside [first, last] of each row; `column` is the thread's first one. */
__device__ __forceinline__ void apply_mask(float (&s)[64], const int (&first)[2],
                                           const int (&last)[2], int column)
{
#pragma unroll
	for (int i = 0; i < 64; i++) {
		const int row = (i >> 1) & 1, c = column + 8 * (i >> 2) + (i & 1);

		if (c > last[row] || c < first[row])
			s[i] = -INFINITY;
	}
}

/* s -> exp2(s*scale - max); updates the softmax and gives the factor for O. The maximum
 * may lag by up to 8: what counts is that no power overflows, and then O need not move. */
__device__ __forceinline__ void exponentiate(float (&s)[64], softmax &state, float (&rescale)[2],
                                             float scale)
{
#pragma unroll
	for (int row = 0; row < 2; row++) {
		float top[4] = {s[2 * row], s[2 * row + 1], s[2 * row + 4], s[2 * row + 5]};
#pragma unroll
		for (int i = 8; i < 64; i += 8) {
			top[0] = fmaxf(top[0], s[i + 2 * row]);
			top[1] = fmaxf(top[1], s[i + 2 * row + 1]);
			top[2] = fmaxf(top[2], s[i + 2 * row + 4]);
			top[3] = fmaxf(top[3], s[i + 2 * row + 5]);
		}
		float m = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
		m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
		m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
		m = m * scale - state.max[row] > 8.0f ? m * scale : state.max[row];
		/* A row may see nothing of its first tiles: then all powers are of -inf, not NaN.
		 */
		const float safe = m == -INFINITY ? 0.0f : m;
		rescale[row] = exp2_approx(state.max[row] - safe);
		state.max[row] = m;
		float sum[2] = {0, 0};
#pragma unroll
		for (int i = 0; i < 64; i += 4) {
			s[i + 2 * row] = exp2_approx(fmaf(s[i + 2 * row], scale, -safe));
			s[i + 2 * row + 1] = exp2_approx(fmaf(s[i + 2 * row + 1], scale, -safe));
			sum[0] += s[i + 2 * row];
			sum[1] += s[i + 2 * row + 1];
		}
		state.sum[row] = fmaf(state.sum[row], rescale[row], sum[0] + sum[1]);
	}
}

__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[32], const float (&s)[64])
{
#pragma unroll
	for (int i = 0; i < 32; i++)
		p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

/* What a consumer warpgroup carries from tile to tile. */
template <int D> struct consumer {
	static constexpr int TILE_M = shape<D>::TILE_M;

	const parameters &p;
	uint32_t shared, barriers;
	int warpgroup, lane, warp;
	ring<STAGES> k, v;
	uint32_t q_parity;

	__device__ uint32_t stage(int base, int slot) const
	{
		return shared + base + slot * shared_layout<D>::STAGE_BYTES;
	}

	/* One arrival per warp: each warp vouches for its own reads. */
	__device__ void release(int barrier) const
	{
		if (lane == 0)
			barrier_arrive(barriers + barrier * 8);
	}

	__device__ void attend(const tile &t, float (&o)[D / 2], softmax &state);
	__device__ void settle(float (&o)[D / 2], uint32_t (&probabilities)[32],
	                       const float (&s)[64], const float (&rescale)[2], bool in_flight);
	__device__ void finish(const tile &t, float (&o)[D / 2], softmax &state, float (&own)[2]);
	__device__ void store(const tile &t, float (&o)[D / 2]);
};

template <int D>
__device__ __forceinline__ void consumer<D>::attend(const tile &t, float (&o)[D / 2],
                                                    softmax &state)
{
	const uint64_t q =
	        matrix_descriptor(shared + shared_layout<D>::Q + warpgroup * 64 * 128, 16);
	const uint64_t k_operand = matrix_descriptor(shared + shared_layout<D>::K, 16);
	const uint64_t v_operand = matrix_descriptor(shared + shared_layout<D>::V, 128 * 128);
	const int row = t.m * TILE_M + warpgroup * 64 + warp * 16 + lane / 4;
	int first[2], last[2], wg_first, wg_last, unused;
	float s[64], rescale[2];
	uint32_t probabilities[32];

	visible(p, row, first[0], last[0]);
	visible(p, row + 8, first[1], last[1]);
	/* Tiles inside [wg_first, wg_last] are visible to all 64 rows. */
	visible(p, t.m * TILE_M + warpgroup * 64, unused, wg_last);
	visible(p, t.m * TILE_M + warpgroup * 64 + 63, wg_first, unused);
	const auto cut = [&](int n) {
		return n * TILE_N + TILE_N - 1 > wg_last || n * TILE_N < wg_first;
	};
	const int column = 2 * (lane & 3);

	barrier_wait(barriers + BAR_Q_FULL * 8, q_parity);
	q_parity ^= 1;
	barrier_wait(barriers + (BAR_K_FULL + k.slot) * 8, k.parity);
	pin(s);
	issue_scores<D>(s, q, k_operand + k.slot * (shared_layout<D>::STAGE_BYTES / 16));
	wgmma_wait<0>();
	pin(s);
	release(BAR_K_EMPTY + k.slot);
	k.advance();
	if (cut(t.n_first))
		apply_mask(s, first, last, t.n_first * TILE_N + column);
	exponentiate(s, state, rescale, p.scale_log2);
	pin(s);

	/*
	 * The wait for the last product stands at the head of the loop, behind
	 * the back edge: anywhere in the block of the exponentials ptxas moves it
	 * in front of them, and the product then runs with nothing beside it.
	 */
	for (int n = t.n_first - 1; n >= t.n_last; n--) {
		settle(o, probabilities, s, rescale, n < t.n_first - 1);
		barrier_wait(barriers + (BAR_K_FULL + k.slot) * 8, k.parity);
		pin(s);
		issue_scores<D>(s, q, k_operand + k.slot * (shared_layout<D>::STAGE_BYTES / 16));
		barrier_wait(barriers + (BAR_V_FULL + v.slot) * 8, v.parity);
		pin(o);
		pin(probabilities);
		issue_values<D>(o, probabilities,
		                v_operand + v.slot * (shared_layout<D>::STAGE_BYTES / 16));
		wgmma_wait<1>();
		pin(s);
		release(BAR_K_EMPTY + k.slot);
		k.advance();
		if (cut(n))
			apply_mask(s, first, last, n * TILE_N + column);
		exponentiate(s, state, rescale, p.scale_log2);
		pin(s);
	}
	settle(o, probabilities, s, rescale, t.n_first > t.n_last);
	release(BAR_Q_EMPTY);
	barrier_wait(barriers + (BAR_V_FULL + v.slot) * 8, v.parity);
	pin(o);
	pin(probabilities);
	issue_values<D>(o, probabilities,
	                v_operand + v.slot * (shared_layout<D>::STAGE_BYTES / 16));
	wgmma_wait<0>();
	pin(o);
	release(BAR_V_EMPTY + v.slot);
	v.advance();
}

/* After the product in flight, if any: O to the new maximum, S to the next product's operand. */
template <int D>
__device__ __forceinline__ void
consumer<D>::settle(float (&o)[D / 2], uint32_t (&probabilities)[32], const float (&s)[64],
                    const float (&rescale)[2], bool in_flight)
{
	wgmma_wait<0>();
	pin(o);
	pin(probabilities);
	if (in_flight) {
		release(BAR_V_EMPTY + v.slot);
		v.advance();
	}
	pack_probabilities(probabilities, s);
	if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
		for (int i = 0; i < D / 2; i++)
			o[i] *= rescale[(i >> 1) & 1];
	}
}

/* Address in a swizzled tile of the 16 x 16 block of this warp's rows that starts at
 * column 16j, as stmatrix and ldmatrix (x4) want it from each lane. */
template <int rows>
__device__ __forceinline__ uint32_t block_address(uint32_t tile, int row0, int lane, int j)
{
	const int row = row0 + (lane & 15), piece = 2 * (j % 4) + (lane >> 4);

	return tile + (j / 4) * rows * 128 + swizzle_128(row * 128 + piece * 16);
}

__device__ __forceinline__ float sigmoid_fast(float x)
{
	return __fdividef(1.0f, 1.0f + __expf(-x));
}

/* o = (o + own * value) / sum, then the gate; the log of the sum where wanted. */
template <int D>
__device__ __forceinline__ void consumer<D>::finish(const tile &t, float (&o)[D / 2],
                                                    softmax &state, float (&own)[2])
{
	const int row0 = warpgroup * 64 + warp * 16, row = t.m * TILE_M + row0 + lane / 4;
	float inverse[2];

#pragma unroll
	for (int r = 0; r < 2; r++) {
		float sum = state.sum[r];

		sum += __shfl_xor_sync(~0u, sum, 1);
		sum += __shfl_xor_sync(~0u, sum, 2);
		own[r] = p.own_score ? exp2_approx(own[r] - state.max[r]) : 0.0f;
		sum += own[r];
		inverse[r] = 1.0f / sum;
		if (p.lse && lane % 4 == 0 && row + 8 * r < p.seq_len)
			p.lse[static_cast<int64_t>(t.b * p.n_heads + t.h) * p.seq_len + row +
			      8 * r] = (state.max[r] + log2f(sum)) * 0.693147181f;
	}
	if (p.own_score) {
		barrier_wait(barriers + (BAR_K_FULL + k.slot) * 8, k.parity);
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			uint32_t value[4];

			load_matrix_x4(block_address<TILE_M>(stage(shared_layout<D>::K, k.slot),
			                                     row0, lane, j),
			               value[0], value[1], value[2], value[3]);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				o[8 * j + 2 * i] =
				        fmaf(own[i & 1], low_bf16(value[i]), o[8 * j + 2 * i]);
				o[8 * j + 2 * i + 1] =
				        fmaf(own[i & 1], high_bf16(value[i]), o[8 * j + 2 * i + 1]);
			}
		}
		release(BAR_K_EMPTY + k.slot);
		k.advance();
	}
#pragma unroll
	for (int i = 0; i < D / 2; i++)
		o[i] *= inverse[(i >> 1) & 1];
	if (p.ungated) {
#pragma unroll
		for (int i = 0; i < D / 2; i += 2) {
			const int token = row + 8 * ((i >> 1) & 1);

			if (token < p.seq_len)
				*reinterpret_cast<uint32_t *>(
				        p.ungated + t.b * p.ungated_batch +
				        token * p.ungated_token + t.h * p.ungated_head +
				        8 * (i >> 2) + 2 * (lane & 3)) = pack_bf16(o[i], o[i + 1]);
		}
	}
	if (p.has_gate) {
		barrier_wait(barriers + (BAR_V_FULL + v.slot) * 8, v.parity);
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			uint32_t gate[4];

			load_matrix_x4(block_address<TILE_M>(stage(shared_layout<D>::V, v.slot),
			                                     row0, lane, j),
			               gate[0], gate[1], gate[2], gate[3]);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				o[8 * j + 2 * i] *= sigmoid_fast(low_bf16(gate[i]));
				o[8 * j + 2 * i + 1] *= sigmoid_fast(high_bf16(gate[i]));
			}
		}
		release(BAR_V_EMPTY + v.slot);
		v.advance();
	}
}

/* Through shared memory, so that each warpgroup's 64 rows leave as whole boxes. */
template <int D>
__device__ __forceinline__ void consumer<D>::store(const tile &t, float (&o)[D / 2])
{
	const uint32_t staging = shared + shared_layout<D>::O;
	const bool leader = warp == 0 && lane == 0;

	if (leader)
		store_wait_read();
	named_barrier_sync(3 + warpgroup, 128);
#pragma unroll
	for (int j = 0; j < D / 16; j++)
		store_matrix_x4(block_address<TILE_M>(staging, warpgroup * 64 + warp * 16, lane, j),
		                pack_bf16(o[8 * j], o[8 * j + 1]),
		                pack_bf16(o[8 * j + 2], o[8 * j + 3]),
		                pack_bf16(o[8 * j + 4], o[8 * j + 5]),
		                pack_bf16(o[8 * j + 6], o[8 * j + 7]));
	fence_async_proxy();
	named_barrier_sync(3 + warpgroup, 128);
	if (leader) {
#pragma unroll
		for (int panel = 0; panel < D / 64; panel++)
			tensor_store(&p.out, staging + panel * TILE_M * 128 + warpgroup * 64 * 128,
			             panel * 64, t.m * TILE_M + warpgroup * 64, t.h, t.b);
		store_commit();
	}
}

template <int D>
__device__ __forceinline__ void consume(const parameters &p, uint32_t shared, uint32_t barriers)
{
	const int n_tiles = p.m_tiles * p.pairs;
	consumer<D> c = {p,
	                 shared,
	                 barriers,
	                 static_cast<int>(threadIdx.x / 128) - 1,
	                 static_cast<int>(threadIdx.x % 32),
	                 static_cast<int>(threadIdx.x / 32 % 4)};
	ring<SCHEDULE_SLOTS> schedule;

	c.q_parity = 0;
	while (true) {
		barrier_wait(barriers + (BAR_TILE_FULL + schedule.slot) * 8, schedule.parity);
		const int number = shared_load(barriers + BAR_COUNT * 8 + schedule.slot * 4);
		__syncwarp();
		c.release(BAR_TILE_EMPTY + schedule.slot);
		schedule.advance();
		if (number >= n_tiles)
			break;
		const tile t = locate<D>(p, number);
		float o[D / 2], own[2];
		softmax state = {{-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
		for (int i = 0; i < D / 2; i++)
			o[i] = 0;
		if (p.own_score) {
#pragma unroll
			for (int r = 0; r < 2; r++) {
				const int token = min(t.m * shape<D>::TILE_M + c.warpgroup * 64 +
				                              c.warp * 16 + c.lane / 4 + 8 * r,
				                      p.seq_len - 1);

				own[r] = p.own_score[(static_cast<int64_t>(t.b) * p.seq_len +
				                      token) *
				                             p.n_heads +
				                     t.h] *
				         1.44269504f;
				state.max[r] = own[r];
			}
		}
		if (t.n_first >= t.n_last)
			c.attend(t, o, state);
		c.finish(t, o, state, own);
		c.store(t, o);
	}
	if (c.warp == 0 && c.lane == 0)
		store_wait_read();
}

template <int D>
__global__ void __launch_bounds__(shape<D>::THREADS, 1)
        attention_kernel(const __grid_constant__ parameters p)
{
	extern __shared__ char unaligned[];
	const uint32_t shared = (shared_address(unaligned) + 1023) & ~1023u;
	const uint32_t barriers = shared + shared_layout<D>::BARRIERS;

	if (threadIdx.x == 0) {
		barrier_init(barriers + BAR_Q_FULL * 8, 1);
		barrier_init(barriers + BAR_Q_EMPTY * 8, shape<D>::CONSUMER_WARPS);
		for (int i = 0; i < STAGES; i++) {
			barrier_init(barriers + (BAR_K_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_K_EMPTY + i) * 8, shape<D>::CONSUMER_WARPS);
			barrier_init(barriers + (BAR_V_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_V_EMPTY + i) * 8, shape<D>::CONSUMER_WARPS);
		}
		for (int i = 0; i < SCHEDULE_SLOTS; i++) {
			barrier_init(barriers + (BAR_TILE_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_TILE_EMPTY + i) * 8, shape<D>::CONSUMER_WARPS);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x < 128) {
		registers_decrease<shape<D>::PRODUCER_REGISTERS>();
		if (threadIdx.x == 0)
			produce<D>(p, shared);
	} else {
		registers_increase<shape<D>::CONSUMER_REGISTERS>();
		consume<D>(p, shared, barriers);
	}
}

/* Bytes of keys and values to keep in L2 at a time. */
constexpr int64_t L2_BUDGET = 32 << 20;

enum status fill_parameters(parameters &p, const struct attention_args *a, int tile_m, int *ticket)
{
	enum status status = STATUS_OK;
	const auto encode = [&](CUtensorMap *map, const struct view *view, int64_t tokens,
	                        int64_t heads, int box) {
		if (status == STATUS_OK)
			status = tensor_map_encode(map, view, a->batch, tokens, heads, a->d_head,
			                           box);
	};

	encode(&p.q, &a->q, a->seq_len, a->q_heads, tile_m);
	encode(&p.k, &a->k, a->kv_len, a->n_heads, TILE_N);
	encode(&p.v, &a->v, a->kv_len, a->n_heads, TILE_N);
	encode(&p.out, &a->out, a->seq_len, a->n_heads, 64);
	if (a->own_score)
		encode(&p.own_value, &a->own_value, a->seq_len, a->n_heads, tile_m);
	if (a->gate.data)
		encode(&p.gate, &a->gate, a->seq_len, a->n_heads, tile_m);
	p.seq_len = static_cast<int>(a->seq_len);
	p.kv_len = static_cast<int>(a->kv_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.q_heads = static_cast<int>(a->q_heads);
	p.pairs = static_cast<int>(a->batch * a->n_heads);
	p.window = static_cast<int>(a->window);
	p.chunk = static_cast<int>(a->chunk);
	p.mask = a->mask;
	p.scale_log2 = a->scale * 1.44269504f;
	p.own_score = a->own_score;
	p.has_gate = a->gate.data != NULL;
	p.lse = a->lse;
	p.ungated = static_cast<__nv_bfloat16 *>(a->out_ungated.data);
	p.ungated_batch = a->out_ungated.batch;
	p.ungated_token = a->out_ungated.token;
	p.ungated_head = a->out_ungated.head;
	p.m_tiles = static_cast<int>((a->seq_len + tile_m - 1) / tile_m);
	const int64_t pair_bytes = a->kv_len * a->d_head * 4;
	const int64_t fit = pair_bytes ? L2_BUDGET / pair_bytes : p.pairs;
	p.heads_per_group = static_cast<int>(fit < 1 ? 1 : fit < p.pairs ? fit : p.pairs);
	p.ticket = ticket;
	return status;
}

template <int D> enum status launch(const struct attention_args *a, int *ticket)
{
	const int bytes = shared_layout<D>::BYTES;
	parameters p;
	enum status status = fill_parameters(p, a, shape<D>::TILE_M, ticket);
	const int64_t tiles = static_cast<int64_t>(p.m_tiles) * p.pairs;
	const int blocks = static_cast<int>(tiles < cuda_sm_count() ? tiles : cuda_sm_count());

	if (status != STATUS_OK)
		return status;
	CUDA_TRY(cudaFuncSetAttribute(attention_kernel<D>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	CUDA_TRY(cudaMemsetAsync(ticket, 0, sizeof *ticket, cuda_stream()));
	attention_kernel<D><<<blocks, shape<D>::THREADS, bytes, cuda_stream()>>>(p);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

} // namespace

extern "C" const char *hopper_attention_unsupported(const void *args)
{
	const struct attention_args *a = static_cast<const struct attention_args *>(args);

	if (!cuda_is_hopper())
		return "needs compute capability 9.0";
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	if (!tensor_map_supports(&a->q) || !tensor_map_supports(&a->k) ||
	    !tensor_map_supports(&a->v) || !tensor_map_supports(&a->out) ||
	    (a->own_score && !tensor_map_supports(&a->own_value)) ||
	    (a->gate.data && !tensor_map_supports(&a->gate)))
		return "views must be 16-byte aligned";
	return NULL;
}

extern "C" size_t hopper_attention_workspace(const void *args)
{
	(void)args;
	return 256; /* the ticket counter */
}

extern "C" enum status hopper_attention(const void *args, void *workspace)
{
	const struct attention_args *a = static_cast<const struct attention_args *>(args);
	int *ticket = static_cast<int *>(workspace);

	return a->d_head == 64 ? launch<64>(a, ticket) : launch<128>(a, ticket);
}
