/*
 * Gated linear attention, forward, for sm_90a: S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t,
 * o_t = scale q_t S_t, bf16 in and out, states in fp32. Chunks of 64, 32 or 16 tokens; two kernels:
 *   prepare  (gla_prepare.cu) every 64 tokens become a record (gla.cuh): q decayed from the chunk's
 *            start, k decayed to its end, scores inside it, its whole decay (how: gla_chunk.cuh)
 *   recur    a block takes 128 (64) columns of v of one sequence and head through all its chunks.
 *            A producer thread loads records, a cluster of blocks each record once; a consumer
 *            warpgroup per 64 columns keeps the state transposed, as fp32 accumulators [64 columns
 *            of v, d_k]: rounded to bf16 it is the left operand of o^T = S^T q^T, and no copy of it
 *            goes through shared memory. Then o^T += v^T scores^T, S^T = S^T Diag(decay) + v^T k.
 * Widths up to 128 take one kernel, `fused`, in which a warpgroup of the block prepares.
 *
 * Shared memory: two or three stages of a record and its columns of v, then outputs, barriers.
 *
 * Sequences times heads that are too few to fill the device are cut into segments: `recur` first
 * runs without queries for what a segment adds to a state, then all segments start from the sum of
 * those before them. All exponents are <= 0 except inside a sub-chunk that decays mildly.
 *
 * Limit: the operands' way through memory between the kernels (at 128/128 one kernel takes 2.21 ms,
 * two 2.84) and the wait for the tensor cores in each chunk: 1.87 ms at 4 heads x 256/512, T = 4096
 * (1.97 GHz), whose bytes take 0.9. docs/kernels/gla.md.
 * wgmma in: recur_kernel, fused_kernel
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/gla.cuh"
#include "kernels/hopper/gla_chunk.cuh"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int CLUSTER = 2; /* blocks at most */

/* What `recur` is run for: what each segment adds to the state; the outputs; the states before
 * chunks of several records (gla_materialise.cu); the gradient of v, from the last record on:
 *   dv = P^T dout + k dS,  dS <- Diag(decay) dS + q^T dout
 * of the same records, whose queries and keys change places. */
enum pass { ADDED, OUTPUTS, STATES, VALUES_GRADIENT };

/* The record that is taken as the index-th. */
template <pass PASS> __device__ __forceinline__ int record_of(int records, int index)
{
	return PASS == VALUES_GRADIENT ? records - 1 - index : index;
}

/* ---- recur */

struct recur_parameters {
	CUtensorMap v, out;
	int n_heads, records, slices, d_v; /* records: of a sequence and head */
	int cluster;                       /* slices that load a record together */
	int segments, per_segment;         /* to run; records of each */
	const unsigned char *prepared;
	const float *h0; /* or NULL */
	float *states;   /* [B, H, segments - 1, d_v / 64, d_k / 8, 128, 4]: what a segment adds */
	float *decays;   /* [B, H, segments - 1, d_k]: its whole decay */
	float *final_state;          /* or NULL */
	unsigned char *chunk_states; /* gla.cuh's, of chunks of per_chunk records; of STATES */
	int chunks, per_chunk;
};

struct fused_parameters : recur_parameters {
	CUtensorMap q, k, log_decay;
	int q_step, k_step; /* between heads: 0 where they share q or k */
	float scale;
	const float *bonus; /* [H, d_k] or NULL */
};

/* Of a stage: a record of PARTS chunks, and the columns of v that the block takes. */
template <int DK, int WARPGROUPS, int PARTS, pass PASS> struct recur_layout {
	using R = record<DK, PARTS>;
	static constexpr bool FUSED = false;
	static constexpr int FIRST_CONSUMER = 1;                      /* warpgroup */
	static constexpr int SKIPPED = PASS == OUTPUTS ? 0 : R::KEYS; /* of a record */
	static constexpr int QUERIES = R::QUERIES, SCORES = R::SCORES;
	static constexpr int KEYS = R::KEYS - SKIPPED, DECAYS = R::DECAYS - SKIPPED;
	static constexpr int V = (R::BYTES - SKIPPED + 1023) / 1024 * 1024;
	static constexpr int STAGE_BYTES = V + WARPGROUPS * PANEL_BYTES;
	static constexpr int STAGES = DK == 256 && PASS == OUTPUTS ? 2 : 3;
	static constexpr int OUT = STAGES * STAGE_BYTES;
	static constexpr int OUT_BYTES = (PASS == STATES ? DK / 64 : 1) * PANEL_BYTES;
	static constexpr int BARRIERS = OUT + WARPGROUPS * OUT_BYTES; /* full, empty */
	static constexpr int BYTES = BARRIERS + STAGES * 16 + 1024;   /* 1024: room to align */
};

/* The same where the block prepares its chunks: the scores replace the log decays. */
template <int DK, int WARPGROUPS, int PARTS> struct fused_layout {
	static constexpr bool FUSED = true;
	static constexpr int FIRST_CONSUMER = 2;
	static constexpr int WIDTH = DK / 64 * PANEL_BYTES;
	static constexpr int QUERIES = 0, SCORES = WIDTH, KEYS = 2 * WIDTH, V = 3 * WIDTH;
	static constexpr int LOADED = V + WARPGROUPS * PANEL_BYTES;
	static constexpr int DECAYS = LOADED;
	static constexpr int STAGE_BYTES = LOADED + (PARTS * DK * 4 + 1023) / 1024 * 1024;
	static constexpr int STAGES = 3;
	static constexpr int OUT = STAGES * STAGE_BYTES;
	static constexpr int EXCHANGE = OUT + WARPGROUPS * PANEL_BYTES;
	static constexpr int BARRIERS = EXCHANGE + 2 * EXCHANGE_BYTES; /* full, empty, ready */
	static constexpr int BYTES = BARRIERS + STAGES * 24 + 1024;
};

/* What one block computes. */
struct item {
	int sequence, segment, slice, first, last; /* records first .. last - 1 */
};

__device__ __forceinline__ item locate(const recur_parameters &p)
{
	item t;

	t.slice = blockIdx.x % p.slices;
	t.segment = blockIdx.x / p.slices % p.segments;
	t.sequence = blockIdx.x / p.slices / p.segments;
	t.first = t.segment * p.per_segment;
	t.last = min(t.first + p.per_segment, p.records);
	return t;
}

/* What follows FIRST of a record; the blocks of a cluster load a part each, for all of them. */
template <int FIRST, int END>
__device__ __forceinline__ void load_record(const recur_parameters &p, uint32_t stage, int slice,
                                            const unsigned char *from, uint32_t full)
{
	const int bytes = (END - FIRST) / p.cluster;
	const int part = FIRST + slice % p.cluster * bytes;

	if (p.cluster == 1)
		bulk_load(stage + part - FIRST, from + part, bytes, full);
	else
		bulk_load_multicast(stage + part - FIRST, from + part, bytes, full,
		                    static_cast<uint16_t>((1 << p.cluster) - 1));
}

template <int DK, int WARPGROUPS, int PARTS, pass PASS>
__device__ __forceinline__ void produce(const recur_parameters &p, uint32_t shared)
{
	using layout = recur_layout<DK, WARPGROUPS, PARTS, PASS>;
	using R = record<DK, PARTS>;
	constexpr int RECORD_BYTES = R::BYTES - layout::SKIPPED;
	const item t = locate(p);
	const int b = t.sequence / p.n_heads, h = t.sequence % p.n_heads;
	const unsigned char *records =
	        p.prepared + static_cast<int64_t>(t.sequence) * p.records * R::BYTES;
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int number = t.first; number < t.last; number++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t empty = full + layout::STAGES * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;

		barrier_wait(empty, r.parity ^ 1);
		barrier_arrive_expect(full, RECORD_BYTES + WARPGROUPS * PANEL_BYTES);
		load_record<layout::SKIPPED, R::BYTES>(
		        p, stage, t.slice, records + static_cast<int64_t>(number) * R::BYTES, full);
#pragma unroll
		for (int w = 0; w < WARPGROUPS; w++)
			tensor_load(stage + layout::V + w * PANEL_BYTES, &p.v, full,
			            (t.slice * WARPGROUPS + w) * 64, number * RECORD, h, b);
		r.advance();
	}
}

/* S^T of 64 columns of v and all channels. */
template <int DK> struct state {
	float x[DK / 2];
};

/* Where element i of this thread lies in a [d_k, d_v] state whose first column is this warp's. */
__device__ __forceinline__ int64_t state_offset(int i, int lane, int d_v)
{
	return static_cast<int64_t>(8 * (i >> 2) + 2 * (lane & 3) + (i & 1)) * d_v + lane / 4 +
	       8 * ((i >> 1) & 1);
}

/* Where this thread's part of what a segment adds to the state lies: 128 threads side by side. */
template <int DK>
__device__ __forceinline__ float4 *segment_state(const recur_parameters &p, int64_t number,
                                                 int column)
{
	return reinterpret_cast<float4 *>(p.states) +
	       (number * (p.d_v / 64) + column / 64) * (DK / 8) * 128 + threadIdx.x % 128;
}

/* The state before the first chunk: h0, and what the segments before this one made of it. */
template <int DK>
__device__ __forceinline__ void seed(state<DK> &s, const recur_parameters &p, const item &t,
                                     int column, int warp, int lane)
{
	const float *h0 = p.h0 + static_cast<int64_t>(t.sequence) * DK * p.d_v + column + 16 * warp;

#pragma unroll
	for (int i = 0; i < DK / 2; i++)
		s.x[i] = p.h0 ? h0[state_offset(i, lane, p.d_v)] : 0.0f;
#pragma unroll 1
	for (int segment = 0; segment < t.segment; segment++) {
		const int64_t number =
		        static_cast<int64_t>(t.sequence) * (p.segments - 1) + segment;
		const float4 *added = segment_state<DK>(p, number, column);
		const float *decays = p.decays + number * DK + 2 * (lane & 3);

#pragma unroll
		for (int i = 0; i < DK / 8; i++) {
			const float4 x = added[128 * i];
			const float2 decay = *reinterpret_cast<const float2 *>(decays + 8 * i);

			s.x[4 * i] = fmaf(s.x[4 * i], decay.x, x.x);
			s.x[4 * i + 1] = fmaf(s.x[4 * i + 1], decay.y, x.y);
			s.x[4 * i + 2] = fmaf(s.x[4 * i + 2], decay.x, x.z);
			s.x[4 * i + 3] = fmaf(s.x[4 * i + 3], decay.y, x.w);
		}
	}
}

/*
 * o^T (64 columns of v x a chunk's tokens) = S^T q^T for the state as it is, then the state
 * decayed to the chunk's end: 64 channels at a time become a left operand, of which
 * two are under way.
 */
template <int DK, bool OUTPUT, int WIDTH>
__device__ __forceinline__ void read_state(float (&o)[WIDTH], uint32_t (&left)[2][16], state<DK> &s,
                                           uint64_t queries, uint32_t decays, int lane)
{
#pragma unroll
	for (int panel = 0; panel < DK / 64; panel++) {
		if (OUTPUT) {
			if (panel >= 2) {
				wgmma_wait<1>();
				pin(left[panel % 2]);
			}
#pragma unroll
			for (int i = 0; i < 16; i++)
				left[panel % 2][i] = pack_bf16(s.x[32 * panel + 2 * i],
				                               s.x[32 * panel + 2 * i + 1]);
			pin(left[panel % 2]);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < 4; step++)
				wgmma_rs_k_major(o, &left[panel % 2][4 * step],
				                 queries + (panel * PANEL_BYTES + step * 32) / 16,
				                 panel + step > 0);
			wgmma_commit();
		}
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const float2 decay =
			        shared_float2(decays + (64 * panel + 8 * i + 2 * (lane & 3)) * 4);

			s.x[32 * panel + 4 * i] *= decay.x;
			s.x[32 * panel + 4 * i + 1] *= decay.y;
			s.x[32 * panel + 4 * i + 2] *= decay.x;
			s.x[32 * panel + 4 * i + 3] *= decay.y;
		}
	}
}

/* The state, as it is, for the products of the chunk that begins at record `number`. */
template <int DK>
__device__ __forceinline__ void store_state(const recur_parameters &p, const state<DK> &s,
                                            uint32_t staging, int warp, int lane, int barrier,
                                            int sequence, int number, int column)
{
	begin_output(warp, lane, barrier);
#pragma unroll
	for (int i = 0; i < DK / 16; i++)
		store_block(
		        plain_block(staging + i / 4 * PANEL_BYTES, 16 * warp, 16 * (i % 4), lane),
		        &s.x[8 * i]);
	fence_async_proxy();
	named_barrier_sync(barrier, 128);
	if (warp == 0 && lane == 0) {
		const int64_t tile =
		        (static_cast<int64_t>(sequence) * p.chunks + number / p.per_chunk) *
		                (p.d_v / 64) +
		        column / 64;

		bulk_store(p.chunk_states + tile * (DK / 64 * PANEL_BYTES), staging,
		           DK / 64 * PANEL_BYTES);
		store_commit();
	}
}

template <typename layout, int DK, int WARPGROUPS, int PARTS, pass PASS>
__device__ __forceinline__ void consume(const recur_parameters &p, uint32_t shared)
{
	constexpr bool BACK = PASS == VALUES_GRADIENT, OUTPUT = PASS == OUTPUTS || BACK;
	constexpr int QUERIES = BACK ? layout::KEYS : layout::QUERIES;
	constexpr int KEYS = BACK ? layout::QUERIES : layout::KEYS;
	constexpr int TOKENS = RECORD / PARTS; /* of a chunk */
	const int warpgroup = WARPGROUPS == 1 ? 0 : threadIdx.x / 128 - layout::FIRST_CONSUMER;
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, channel = threadIdx.x % 128;
	const item t = locate(p);
	const int b = t.sequence / p.n_heads, h = t.sequence % p.n_heads;
	const int column = (t.slice * WARPGROUPS + warpgroup) * 64;
	slot_ring<layout::STAGES> r;
	state<DK> s;
	float o[TOKENS / 2], decay[(DK + 127) / 128];
	uint32_t left[2][16];

#pragma unroll
	for (float &x : decay)
		x = 1.0f;
	if (PASS != ADDED) {
		seed<DK>(s, p, t, column, warp, lane);
	} else {
#pragma unroll
		for (float &x : s.x)
			x = 0.0f;
	}
#pragma unroll 1
	for (int number = t.first; number < t.last; number++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t empty = full + layout::STAGES * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;

		barrier_wait(full, r.parity);
		if (layout::FUSED)
			barrier_wait(full + 2 * layout::STAGES * 8, r.parity);
		if constexpr (PASS == STATES) {
			if (number % p.per_chunk == 0)
				store_state<DK>(
				        p, s, shared + layout::OUT + warpgroup * layout::OUT_BYTES,
				        warp, lane, 1 + warpgroup, t.sequence, number, column);
		}
#pragma unroll 1
		for (int part = 0; part < PARTS; part++) {
			const uint32_t decays = stage + layout::DECAYS + part * DK * 4;
			const uint32_t rows = part * TOKENS * 128; /* of a panel, in bytes */
			const uint64_t values = matrix_descriptor(
			        stage + layout::V + warpgroup * PANEL_BYTES + rows, PANEL_BYTES);
			const uint64_t keys = matrix_descriptor(stage + KEYS + rows, PANEL_BYTES);

			wgmma_wait<0>();
			pin(s.x);
			read_state<DK, OUTPUT>(o, left, s,
			                       matrix_descriptor(stage + QUERIES + rows, 16),
			                       decays, lane);
			if (PASS == ADDED && warpgroup == 0) {
#pragma unroll
				for (int i = 0; i < (DK + 127) / 128; i++)
					if (channel + 128 * i < DK)
						decay[i] *= shared_float(decays +
						                         (channel + 128 * i) * 4);
			}
			if (OUTPUT) {
				const uint64_t scores = matrix_descriptor(
				        stage + layout::SCORES + rows + part * TOKENS * 2, 16);

				wgmma_fence();
#pragma unroll
				for (int step = 0; step < TOKENS / 16; step++) {
					if constexpr (BACK)
						wgmma_ss_both_transposed(
						        o, values + step * 2048 / 16,
						        scores + step * 2048 / 16, true);
					else
						wgmma_ss_transposed(o, values + step * 2048 / 16,
						                    scores + step * 32 / 16, true);
				}
				wgmma_commit();
				wgmma_wait<0>();
				pin(o);
				pin(left[0]);
				pin(left[1]);
			}
			pin(s.x);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < TOKENS / 16; step++)
				wgmma_ss_both_transposed(s.x, values + step * 2048 / 16,
				                         keys + step * 2048 / 16, true);
			wgmma_commit();
			if (OUTPUT && part == 0)
				begin_output(warp, lane, 1 + warpgroup);
			if (OUTPUT)
				stage_output(o, shared + layout::OUT + warpgroup * PANEL_BYTES,
				             part * TOKENS, warp, lane);
			if (PARTS > 1) {
				wgmma_wait<0>();
				pin(s.x);
			}
		}
		if (OUTPUT)
			end_output(&p.out, shared + layout::OUT + warpgroup * PANEL_BYTES, warp,
			           lane, 1 + warpgroup, column,
			           record_of<PASS>(p.records, number) * RECORD, h, b);
		wgmma_wait<0>();
		pin(s.x);
		if (!layout::FUSED && lane < p.cluster)
			barrier_arrive_at(empty, lane);
		if (layout::FUSED && lane == 0)
			barrier_arrive(empty);
		r.advance();
	}
	if (PASS != ADDED && warp == 0 && lane == 0)
		store_wait_read();
	if (PASS == ADDED) {
		const int64_t number = static_cast<int64_t>(t.sequence) * p.segments + t.segment;
		float4 *to = segment_state<DK>(p, number, column);

#pragma unroll
		for (int i = 0; i < DK / 8; i++)
			to[128 * i] = make_float4(s.x[4 * i], s.x[4 * i + 1], s.x[4 * i + 2],
			                          s.x[4 * i + 3]);
#pragma unroll
		for (int i = 0; i < (DK + 127) / 128; i++)
			if (t.slice == 0 && warpgroup == 0 && channel + 128 * i < DK)
				p.decays[number * DK + channel + 128 * i] = decay[i];
	} else if (p.final_state && t.last == p.records) {
		float *to = p.final_state + static_cast<int64_t>(t.sequence) * DK * p.d_v + column +
		            16 * warp;

#pragma unroll
		for (int i = 0; i < DK / 2; i++)
			to[state_offset(i, lane, p.d_v)] = s.x[i];
	}
}

template <int DK, int WARPGROUPS, int PARTS, pass PASS>
__global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
        recur_kernel(const __grid_constant__ recur_parameters p)
{
	using layout = recur_layout<DK, WARPGROUPS, PARTS, PASS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0) {
		for (int i = 0; i < layout::STAGES; i++) {
			barrier_init(shared + layout::BARRIERS + i * 8, 1);
			barrier_init(shared + layout::BARRIERS + (layout::STAGES + i) * 8,
			             4 * WARPGROUPS * p.cluster);
		}
		barrier_init_fence();
	}
	cluster_sync();
	if (threadIdx.x < 128) {
		if (WARPGROUPS == 2)
			registers_decrease<24>();
		if (threadIdx.x == 0)
			produce<DK, WARPGROUPS, PARTS, PASS>(p, shared);
	} else {
		if (WARPGROUPS == 2)
			registers_increase<240>();
		consume<layout, DK, WARPGROUPS, PARTS, PASS>(p, shared);
	}
	/* Others may still load into this block's memory and arrive at its barriers. */
	__syncwarp();
	cluster_sync();
}

/* ---- fused: one block prepares and takes all columns of v, at most 128 */

template <typename layout, int DK, int WARPGROUPS, pass PASS>
__device__ __forceinline__ void produce_fused(const fused_parameters &p, uint32_t shared)
{
	const int b = blockIdx.x / p.n_heads, h = blockIdx.x % p.n_heads;
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int number = 0; number < p.records; number++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t empty = full + layout::STAGES * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;
		const int token = record_of<PASS>(p.records, number) * RECORD;

		barrier_wait(empty, r.parity ^ 1);
		barrier_arrive_expect(full, layout::LOADED);
#pragma unroll
		for (int i = 0; i < DK / 64; i++) {
			const uint32_t at = stage + i * PANEL_BYTES;

			tensor_load(at + layout::SCORES, &p.log_decay, full, i * 64, token, h, b);
			tensor_load(at + layout::QUERIES, &p.q, full, i * 64, token, h * p.q_step,
			            b);
			tensor_load(at + layout::KEYS, &p.k, full, i * 64, token, h * p.k_step, b);
		}
#pragma unroll
		for (int w = 0; w < WARPGROUPS; w++)
			tensor_load(stage + layout::V + w * PANEL_BYTES, &p.v, full, w * 64, token,
			            h, b);
		r.advance();
	}
}

/* The warpgroup that turns what was loaded into operands. */
template <typename layout, int DK, int WARPGROUPS, int PARTS, bool BONUS, pass PASS>
__device__ __forceinline__ void prepare_fused(const fused_parameters &p, uint32_t shared)
{
	constexpr int BARRIER = 1 + WARPGROUPS; /* the consumers have one each from 1 on */
	const auto sync = [] { named_barrier_sync(BARRIER, 128); };
	const float *bonus = BONUS ? p.bonus + blockIdx.x % p.n_heads * DK : NULL;
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int number = 0; number < p.records; number++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;
		chunk_scores s = {};

		barrier_wait(full, r.parity);
#pragma unroll 1
		for (int i = 0; i < DK / 64; i++) {
			const uint32_t at = stage + i * PANEL_BYTES;
			const panel t = {at + layout::QUERIES, at + layout::SCORES,
			                 at + layout::KEYS};

			prepare_panel<BONUS ? 1 : SLABS, SUBS / PARTS, BONUS>(
			        s, t, shared + layout::EXCHANGE + i % 2 * EXCHANGE_BYTES,
			        {p.scale, bonus + 64 * i}, record_of<PASS>(p.records, number) == 0,
			        sync, [&](int part, int channel, float x, float y) {
				        shared_store2(stage + layout::DECAYS +
				                              (part * DK + i * 64 + channel) * 4,
				                      x, y);
			        });
		}
		sync();
		store_scores<BONUS>(stage + layout::SCORES, s);
		warp_publish(full + 2 * layout::STAGES * 8);
		r.advance();
	}
}

template <int DK, int WARPGROUPS, int PARTS, bool BONUS, pass PASS = OUTPUTS>
__global__ void __launch_bounds__(128 * (WARPGROUPS + 2), 1)
        fused_kernel(const __grid_constant__ fused_parameters p)
{
	using layout = fused_layout<DK, WARPGROUPS, PARTS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0) {
		for (int i = 0; i < layout::STAGES; i++) {
			barrier_init(shared + layout::BARRIERS + i * 8, 1);
			barrier_init(shared + layout::BARRIERS + (layout::STAGES + i) * 8,
			             4 * WARPGROUPS);
			barrier_init(shared + layout::BARRIERS + (2 * layout::STAGES + i) * 8, 4);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x < 128) {
		registers_decrease<24>();
		if (threadIdx.x == 0)
			produce_fused<layout, DK, WARPGROUPS, PASS>(p, shared);
	} else if (threadIdx.x < 256) {
		if (WARPGROUPS == 2) /* of one there are 168 from the start */
			registers_increase<168>();
		prepare_fused<layout, DK, WARPGROUPS, PARTS, BONUS, PASS>(p, shared);
	} else {
		registers_increase<WARPGROUPS == 2 ? 160 : 240>();
		consume<layout, DK, WARPGROUPS, PARTS, PASS>(p, shared);
	}
}

/* ---- host */

/* How the work is cut, and where the workspace's parts begin, in bytes. */
struct plan {
	int parts, records, slices, segments, per_segment; /* parts: chunks of a record */
	size_t states, decays, bytes;
};

/*
 * As many segments as make the whole soonest done: a segment takes as many steps as it has
 * records, in as many waves as the blocks need; the run without queries costs two fifths.
 */
void choose_segments(const struct device *device, plan &c, int64_t sequences)
{
	const int64_t sms = cuda_sm_count(device), blocks = sequences * c.slices;
	double best = 0;

	c.segments = 1;
	c.per_segment = c.records;
	for (int wanted = 1; wanted <= 32 && wanted <= c.records; wanted++) {
		const int per = (c.records + wanted - 1) / wanted,
		          segments = (c.records + per - 1) / per;
		const double waves = static_cast<double>((blocks * segments + sms - 1) / sms);
		const double before =
		        static_cast<double>((blocks * (segments - 1) + sms - 1) / sms);
		const double cost = per * (waves + 0.4 * before);

		if (wanted == 1 || cost < 0.95 * best) {
			best = cost;
			c.segments = segments;
			c.per_segment = per;
		}
	}
}

plan make_plan(const struct device *device, const struct matrix_recurrence_args *a)
{
	const int64_t sequences = a->batch * a->n_heads;
	plan c;

	c.parts = a->chunk && a->chunk < RECORD ? static_cast<int>(RECORD / a->chunk) : 1;
	c.records = static_cast<int>((a->seq_len + RECORD - 1) / RECORD);
	c.slices = a->d_v == 64 ? 1 : static_cast<int>(a->d_v / 128);
	choose_segments(device, c, sequences);
	const size_t before = static_cast<size_t>(sequences * (c.segments - 1) * a->d_k);
	c.states = static_cast<size_t>(sequences * c.records) *
	           record_bytes(static_cast<int>(a->d_k), c.parts);
	c.decays = c.states + before * static_cast<size_t>(a->d_v) * sizeof(float);
	c.bytes = c.decays + before * sizeof(float);
	return c;
}

template <int DK, int WARPGROUPS, int PARTS, pass PASS>
enum status recur(struct device *device, const recur_parameters &p, int64_t sequences)
{
	const auto kernel = recur_kernel<DK, WARPGROUPS, PARTS, PASS>;
	const int bytes = recur_layout<DK, WARPGROUPS, PARTS, PASS>::BYTES;

	CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	cudaLaunchAttribute cluster = {};
	cudaLaunchConfig_t config = {};

	cluster.id = cudaLaunchAttributeClusterDimension;
	cluster.val.clusterDim.x = static_cast<unsigned>(p.cluster);
	cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
	config.gridDim = dim3(static_cast<unsigned>(sequences * p.segments * p.slices));
	config.blockDim = dim3(128 * (WARPGROUPS + 1));
	config.dynamicSmemBytes = static_cast<size_t>(bytes);
	config.stream = cuda_stream(device);
	config.attrs = &cluster;
	config.numAttrs = 1;
	CUDA_TRY(cudaLaunchKernelEx(&config, kernel, p));
	return STATUS_OK;
}

/* What both ways of running it have in common. */
enum status fill_parameters(recur_parameters &p, const struct matrix_recurrence_args *a,
                            const plan &c)
{
	p.n_heads = static_cast<int>(a->n_heads);
	p.records = c.records;
	p.slices = c.slices;
	p.cluster = c.slices < CLUSTER ? c.slices : CLUSTER;
	p.d_v = static_cast<int>(a->d_v);
	p.segments = c.segments;
	p.per_segment = c.per_segment;
	p.h0 = a->h0;
	p.final_state = a->final_state;
	return gla_encode_values(&p.v, &p.out, a);
}

/* The segments first, where there is more than one. */
template <int DK, int WARPGROUPS, int PARTS, pass PASS>
enum status recur_twice(struct device *device, recur_parameters &p, const plan &c,
                        int64_t sequences)
{
	enum status status = STATUS_OK;

	p.segments = c.segments - 1;
	if (p.segments > 0)
		status = recur<DK, WARPGROUPS, PARTS, ADDED>(device, p, sequences);
	p.segments = c.segments;
	return status == STATUS_OK ? recur<DK, WARPGROUPS, PARTS, PASS>(device, p, sequences)
	                           : status;
}

template <int DK, int WARPGROUPS>
enum status run_staged(struct device *device, const struct matrix_recurrence_args *a,
                       unsigned char *workspace)
{
	const plan c = make_plan(device, a);
	const int64_t sequences = a->batch * a->n_heads;
	recur_parameters p = {};
	enum status status = fill_parameters(p, a, c);

	if (status == STATUS_OK)
		status = gla_prepare(device, a, c.parts, workspace);
	if (status != STATUS_OK)
		return status;
	p.prepared = workspace;
	p.states = reinterpret_cast<float *>(workspace + c.states);
	p.decays = reinterpret_cast<float *>(workspace + c.decays);
	return c.parts == 1   ? recur_twice<DK, WARPGROUPS, 1, OUTPUTS>(device, p, c, sequences)
	       : c.parts == 2 ? recur_twice<DK, WARPGROUPS, 2, OUTPUTS>(device, p, c, sequences)
	                      : recur_twice<DK, WARPGROUPS, 4, OUTPUTS>(device, p, c, sequences);
}

template <int DK, int WARPGROUPS>
enum status run_states(struct device *device, const struct matrix_recurrence_args *a,
                       unsigned char *records, int per_chunk, unsigned char *states,
                       unsigned char *workspace)
{
	const plan c = make_plan(device, a);
	recur_parameters p = {};
	enum status status = fill_parameters(p, a, c);

	if (status != STATUS_OK)
		return status;
	p.prepared = records;
	p.states = reinterpret_cast<float *>(workspace);
	p.decays = reinterpret_cast<float *>(workspace + c.decays - c.states);
	p.chunk_states = states;
	p.per_chunk = per_chunk;
	p.chunks = (c.records + per_chunk - 1) / per_chunk;
	return recur_twice<DK, WARPGROUPS, 1, STATES>(device, p, c, a->batch * a->n_heads);
}

template <int DK, int WARPGROUPS, int PARTS, bool BONUS, pass PASS = OUTPUTS>
enum status launch_fused(struct device *device, const fused_parameters &p, int64_t sequences)
{
	return submit(device, fused_kernel<DK, WARPGROUPS, PARTS, BONUS, PASS>, sequences,
	              128 * (WARPGROUPS + 2), fused_layout<DK, WARPGROUPS, PARTS>::BYTES, p);
}

/* All of a sequence by one block. */
enum status fill_fused(fused_parameters &p, const struct matrix_recurrence_args *a, plan c)
{
	c.segments = 1;
	c.per_segment = c.records;
	TRY(fill_parameters(p, a, c));
	p.q_step = a->q.head ? 1 : 0;
	p.k_step = a->k.head ? 1 : 0;
	p.scale = a->scale;
	p.bonus = a->bonus;
	return gla_encode_inputs(&p.q, &p.k, &p.log_decay, a);
}

template <int DK, int WARPGROUPS>
enum status run_fused(struct device *device, const struct matrix_recurrence_args *a)
{
	const int64_t sequences = a->batch * a->n_heads;
	const plan c = make_plan(device, a);
	fused_parameters p = {};

	TRY(fill_fused(p, a, c));
	if (a->rule == RULE_BONUS)
		return launch_fused<DK, WARPGROUPS, 1, true>(device, p, sequences);
	return c.parts == 1   ? launch_fused<DK, WARPGROUPS, 1, false>(device, p, sequences)
	       : c.parts == 2 ? launch_fused<DK, WARPGROUPS, 2, false>(device, p, sequences)
	                      : launch_fused<DK, WARPGROUPS, 4, false>(device, p, sequences);
}

/* The recurrence whose output is dv, of the same records. */
struct matrix_recurrence_args values_gradient(const struct matrix_recurrence_backward_args *a)
{
	struct matrix_recurrence_args f = a->forward;

	f.v = a->dout;
	f.out = a->dv;
	f.h0 = NULL;
	f.final_state = NULL;
	f.chunk = 0;
	return f;
}

template <int DK, int WARPGROUPS>
enum status run_values_gradient(struct device *device, const struct matrix_recurrence_args *f)
{
	fused_parameters p = {};

	TRY(fill_fused(p, f, make_plan(device, f)));
	return launch_fused<DK, WARPGROUPS, 1, false, VALUES_GRADIENT>(device, p,
	                                                               f->batch * f->n_heads);
}

} // namespace

namespace hopper
{

const char *gla_values_gradient_unsupported(const struct device *device,
                                            const struct matrix_recurrence_backward_args *a)
{
	const struct matrix_recurrence_args forward = a->forward, back = values_gradient(a);
	const char *why = hopper_gla_fused_unsupported(device, &back);

	return why ? why : check_views(device, &forward.v);
}

enum status gla_values_gradient(struct device *device,
                                const struct matrix_recurrence_backward_args *a)
{
	const struct matrix_recurrence_args f = values_gradient(a);

	if (f.d_v == 64)
		return f.d_k == 64 ? run_values_gradient<64, 1>(device, &f)
		                   : run_values_gradient<128, 1>(device, &f);
	return f.d_k == 64 ? run_values_gradient<64, 2>(device, &f)
	                   : run_values_gradient<128, 2>(device, &f);
}

size_t gla_states_workspace(const struct device *device, const struct matrix_recurrence_args *a)
{
	const plan c = make_plan(device, a);

	return c.bytes - c.states;
}

enum status gla_states(struct device *device, const struct matrix_recurrence_args *a,
                       unsigned char *records, int per_chunk, unsigned char *states,
                       unsigned char *workspace)
{
	const auto run = a->d_v == 64    ? (a->d_k == 64 ? run_states<64, 1> : run_states<128, 1>)
	                 : a->d_k == 64  ? run_states<64, 2>
	                 : a->d_k == 128 ? run_states<128, 2>
	                                 : run_states<256, 2>;

	return run(device, a, records, per_chunk, states, workspace);
}

} // namespace hopper

extern "C" const char *hopper_gla_staged_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	const char *why = gla_unsupported(device, a);

	if (!why && a->chunk != 0 && a->chunk != 16 && a->chunk != 32 && a->chunk != 64)
		why = "chunk must be 16, 32 or 64";
	return why;
}

extern "C" size_t hopper_gla_staged_workspace(const struct device *device, const void *args)
{
	return make_plan(device, static_cast<const struct matrix_recurrence_args *>(args)).bytes;
}

extern "C" enum status hopper_gla_staged(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	auto *memory = static_cast<unsigned char *>(workspace);

	if (a->d_v == 64)
		return a->d_k == 64 ? run_staged<64, 1>(device, a, memory)
		                    : run_staged<128, 1>(device, a, memory);
	return a->d_k == 64    ? run_staged<64, 2>(device, a, memory)
	       : a->d_k == 128 ? run_staged<128, 2>(device, a, memory)
	                       : run_staged<256, 2>(device, a, memory);
}

extern "C" const char *hopper_gla_fused_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const char *why = hopper_gla_staged_unsupported(device, args);

	if (!why && (a->d_k > 128 || a->d_v > 128))
		why = "head widths must be at most 128";
	if (!why && a->rule == RULE_BONUS && a->chunk && a->chunk != RECORD)
		why = "chunk must be 64 with a bonus";
	return why;
}

extern "C" enum status hopper_gla_fused(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->d_v == 64)
		return a->d_k == 64 ? run_fused<64, 1>(device, a) : run_fused<128, 1>(device, a);
	return a->d_k == 64 ? run_fused<64, 2>(device, a) : run_fused<128, 2>(device, a);
}

/* Fused where that can be, unless the sequences are too few and must be cut; materialised where
 * the chunks are longer than a record. */
static bool fuses(const struct device *device, const void *args)
{
	return !hopper_gla_fused_unsupported(device, args) &&
	       make_plan(device, static_cast<const struct matrix_recurrence_args *>(args))
	                       .segments == 1;
}

extern "C" const char *hopper_gla_unsupported(const struct device *device, const void *args)
{
	return hopper_gla_staged_unsupported(device, args)
	               ? hopper_gla_materialise_unsupported(device, args)
	               : NULL;
}

extern "C" size_t hopper_gla_workspace(const struct device *device, const void *args)
{
	if (hopper_gla_staged_unsupported(device, args))
		return hopper_gla_materialise_workspace(device, args);
	return fuses(device, args) ? 0 : hopper_gla_staged_workspace(device, args);
}

extern "C" enum status hopper_gla(struct device *device, const void *args, void *workspace)
{
	if (hopper_gla_staged_unsupported(device, args))
		return hopper_gla_materialise(device, args, workspace);
	return fuses(device, args) ? hopper_gla_fused(device, args, workspace)
	                           : hopper_gla_staged(device, args, workspace);
}
