/*
 * Gated linear attention, forward, for sm_90a: S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t,
 * o_t = scale q_t S_t, bf16 in and out, states in fp32. Chunks of 64 tokens; two kernels:
 *
 *   prepare  every chunk by itself: q decayed from the chunk's start, k decayed to its
 *            end, the 64 x 64 scores inside it and its whole decay, in the order and
 *            swizzle in which the second kernel's products read them from shared memory
 *   recur    a block takes 128 (64) columns of v of one sequence and head through all
 *            its chunks. The state stays on chip, transposed, as fp32 accumulators
 *            [64 columns of v, d_k] of each warpgroup: rounded to bf16 it is the left
 *            operand of o^T = S^T q^T, and no copy of it goes through shared memory.
 *            Then o^T += v^T scores^T, S^T = S^T Diag(decay) + v^T k.
 *
 * Where sequences times heads are too few to fill the device, each is cut into
 * segments: `recur` first runs without queries for what a segment adds to a state, and
 * then all segments start from the sum of those before them.
 *
 * Decays. With G_t the sum of log2 alpha up to token t, every factor is
 * 2^(difference of G). In `prepare` a warp owns a sub-chunk of 16 tokens: q is decayed from
 * the sub-chunk's start, k to its end, and the decays of whole sub-chunks between them
 * are multiplied in one after the other, so that all exponents are <= 0 and no decay
 * is too strong. Inside the sub-chunk one of two factors exceeds 1; if the
 * sub-chunk's decay is too strong for that, it is halved again and again, at exponents <= 0.
 *
 * What was tried (one H200; 4 heads x 256/512, 262144 tokens, T = 4096 / 131072; the portable
 * kernels take 9.5 / 10.8 ms, the bytes 0.9):
 *   two kernels as above, one block at a time, scores by one product   2.37 / 2.81 ms
 *   the scores of a chunk's first tokens nearly in fp32, because the
 *     norm behind it magnifies what cancels there; clusters of two     2.20 / 2.70 ms
 *   clusters of four (predicted: half the reads from L2)               2.14 / 3.66 ms
 *   prepare takes two panels of channels at once (predicted: more
 *     bytes under way)                                                 2.10 / 2.68 ms
 *   the cluster's barriers without release at cluster scope, which
 *     made every warp wait for its own stores in each chunk            1.84 / 2.32 ms
 * Widths up to 128 (16 heads x 128/128): two kernels 2.83 ms, one kernel 2.21 ms.
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/gla_chunk.cuh"
#include "kernels/hopper/hopper.h"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int CLUSTER = 2; /* blocks at most */
constexpr int PREPARE_WIDE = 2, PREPARE_BLOCKS = 3;

/* What `prepare` leaves of a chunk, byte offsets: panels of 64 channels, 128-byte swizzle. */
template <int DK> struct record {
	static constexpr int QUERIES = 0;
	static constexpr int SCORES = DK / 64 * PANEL_BYTES; /* [query, key] */
	static constexpr int KEYS = SCORES + PANEL_BYTES;
	static constexpr int DECAYS = KEYS + DK / 64 * PANEL_BYTES; /* fp32 [d_k] */
	static constexpr int BYTES = DECAYS + DK * 4;
};

/* ---- prepare */

struct prepare_parameters {
	CUtensorMap q, k, log_decay;
	int n_heads, chunks, total; /* chunks of a sequence and head; of all */
	float scale;
	unsigned char *records;
};

struct prepare_layout {
	static constexpr int STAGES = 2, STAGE_BYTES = 3 * PANEL_BYTES;
	static constexpr int EXCHANGE = STAGES * STAGE_BYTES;
	static constexpr int BARRIERS = EXCHANGE + STAGES * EXCHANGE_BYTES;
	static constexpr int BYTES = BARRIERS + STAGES * 8 + 1024; /* 1024: room to align */
};

/* The tiles that a block takes: all panels of a chunk, then its next chunk. */
template <int DK> struct cursor {
	int chunk = blockIdx.x, panel = 0;
	int stage = 0;
	uint32_t parity = 0;

	__device__ void advance()
	{
		if (++panel == DK / 64) {
			panel = 0;
			chunk += gridDim.x;
		}
		if (++stage == prepare_layout::STAGES) {
			stage = 0;
			parity ^= 1;
		}
	}
};

template <int DK>
__device__ __forceinline__ void load_panel(const prepare_parameters &p, uint32_t shared,
                                           cursor<DK> &at)
{
	const int sequence = at.chunk / p.chunks, token = at.chunk % p.chunks * CHUNK;
	const int b = sequence / p.n_heads, h = sequence % p.n_heads;
	const uint32_t full = shared + prepare_layout::BARRIERS + at.stage * 8;
	const uint32_t stage = shared + at.stage * prepare_layout::STAGE_BYTES;

	if (at.chunk >= p.total)
		return;
	barrier_arrive_expect(full, 3 * PANEL_BYTES);
	tensor_load(stage, &p.log_decay, full, at.panel * 64, token, h, b);
	tensor_load(stage + PANEL_BYTES, &p.q, full, at.panel * 64, token, h, b);
	tensor_load(stage + 2 * PANEL_BYTES, &p.k, full, at.panel * 64, token, h, b);
	at.advance();
}

template <int DK>
__global__ void __launch_bounds__(128, PREPARE_BLOCKS)
        prepare_kernel(const __grid_constant__ prepare_parameters p)
{
	using layout = prepare_layout;
	extern __shared__ char unaligned[];
	const uint32_t shared = (shared_address(unaligned) + 1023) & ~1023u;
	const bool leader = threadIdx.x == 0;
	cursor<DK> now, ahead;
	chunk_scores s = {};

	if (leader) {
		for (int i = 0; i < layout::STAGES; i++)
			barrier_init(shared + layout::BARRIERS + i * 8, 1);
		barrier_init_fence();
		for (int i = 0; i < layout::STAGES; i++)
			load_panel<DK>(p, shared, ahead);
	}
	__syncthreads();
#pragma unroll 1
	for (bool loaded = true; now.chunk < p.total; loaded = false) {
		unsigned char *record_at =
		        p.records + static_cast<int64_t>(now.chunk) * record<DK>::BYTES;
		const uint32_t stage = shared + now.stage * layout::STAGE_BYTES;
		const panel t = {stage + PANEL_BYTES, stage, stage + 2 * PANEL_BYTES};

		barrier_wait(shared + layout::BARRIERS + now.stage * 8, now.parity);
		prepare_panel<PREPARE_WIDE>(
		        s, t, shared + layout::EXCHANGE + now.stage * EXCHANGE_BYTES, p.scale,
		        now.chunk % p.chunks == 0,
		        [&] {
			        __syncthreads();
			        /* The stage before this one, once it has been stored. */
			        if (leader && !loaded) {
				        store_wait_read();
				        load_panel<DK>(p, shared, ahead);
				        loaded = true;
			        }
		        },
		        [&](int channel, float x, float y) {
			        auto *decays =
			                reinterpret_cast<float *>(record_at + record<DK>::DECAYS);

			        *reinterpret_cast<float2 *>(decays + now.panel * 64 + channel) =
			                make_float2(x, y);
		        });
		const bool last = now.panel == DK / 64 - 1;
		if (last) {
			__syncthreads();
			store_scores(t.decays, s);
			s = {};
		}
		fence_async_proxy();
		__syncthreads();
		if (leader) {
			bulk_store(record_at + record<DK>::QUERIES + now.panel * PANEL_BYTES, t.q,
			           PANEL_BYTES);
			bulk_store(record_at + record<DK>::KEYS + now.panel * PANEL_BYTES, t.k,
			           PANEL_BYTES);
			if (last)
				bulk_store(record_at + record<DK>::SCORES, t.decays, PANEL_BYTES);
			store_commit();
		}
		now.advance();
	}
	if (leader)
		store_wait_read();
}

/* ---- recur */

struct recur_parameters {
	CUtensorMap v, out;
	int n_heads, chunks, slices, d_v;
	int cluster;               /* slices that load a record together */
	int segments, per_segment; /* to run; chunks of each */
	const unsigned char *records;
	const float *h0; /* or NULL */
	float *states;   /* [B, H, segments - 1, d_v / 64, d_k / 8, 128, 4]: what a segment adds */
	float *decays;   /* [B, H, segments - 1, d_k]: its whole decay */
	float *final_state; /* or NULL */
};

struct fused_parameters : recur_parameters {
	CUtensorMap q, k, log_decay;
	float scale;
};

/* Of a stage: a record, and the columns of v that the block takes. */
template <int DK, int WARPGROUPS> struct recur_layout {
	static constexpr bool FUSED = false;
	static constexpr int FIRST_CONSUMER = 1; /* warpgroup */
	static constexpr int QUERIES = record<DK>::QUERIES, SCORES = record<DK>::SCORES;
	static constexpr int KEYS = record<DK>::KEYS, DECAYS = record<DK>::DECAYS;
	static constexpr int V = (record<DK>::BYTES + 1023) / 1024 * 1024;
	static constexpr int STAGE_BYTES = V + WARPGROUPS * PANEL_BYTES;
	static constexpr int STAGES = DK == 256 ? 2 : 3;
	static constexpr int OUT = STAGES * STAGE_BYTES;
	static constexpr int BARRIERS = OUT + WARPGROUPS * PANEL_BYTES; /* full, empty */
	static constexpr int BYTES = BARRIERS + STAGES * 16 + 1024;     /* 1024: room to align */
};

/* The same where the block prepares its chunks: the scores replace the log decays. */
template <int DK, int WARPGROUPS> struct fused_layout {
	static constexpr bool FUSED = true;
	static constexpr int FIRST_CONSUMER = 2;
	static constexpr int WIDTH = DK / 64 * PANEL_BYTES;
	static constexpr int QUERIES = 0, SCORES = WIDTH, KEYS = 2 * WIDTH, V = 3 * WIDTH;
	static constexpr int LOADED = V + WARPGROUPS * PANEL_BYTES;
	static constexpr int DECAYS = LOADED;
	static constexpr int STAGE_BYTES = LOADED + 1024;
	static constexpr int STAGES = 3;
	static constexpr int OUT = STAGES * STAGE_BYTES;
	static constexpr int EXCHANGE = OUT + WARPGROUPS * PANEL_BYTES;
	static constexpr int BARRIERS = EXCHANGE + 2 * EXCHANGE_BYTES; /* full, empty, ready */
	static constexpr int BYTES = BARRIERS + STAGES * 24 + 1024;
};

/* What one block computes. */
struct item {
	int sequence, segment, slice, first, last; /* chunks first .. last - 1 */
};

__device__ __forceinline__ item locate(const recur_parameters &p)
{
	item t;

	t.slice = blockIdx.x % p.slices;
	t.segment = blockIdx.x / p.slices % p.segments;
	t.sequence = blockIdx.x / p.slices / p.segments;
	t.first = t.segment * p.per_segment;
	t.last = min(t.first + p.per_segment, p.chunks);
	return t;
}

/* What follows FIRST of a record; the blocks of a cluster load a part each, for all of them. */
template <int DK, int FIRST>
__device__ __forceinline__ void load_record(const recur_parameters &p, uint32_t stage, int slice,
                                            const unsigned char *from, uint32_t full)
{
	const int bytes = (record<DK>::BYTES - FIRST) / p.cluster;
	const int part = FIRST + slice % p.cluster * bytes;

	if (p.cluster == 1)
		bulk_load(stage + part, from + part, bytes, full);
	else
		bulk_load_multicast(stage + part, from + part, bytes, full,
		                    static_cast<uint16_t>((1 << p.cluster) - 1));
}

template <int DK, int WARPGROUPS, bool OUTPUT>
__device__ __forceinline__ void produce(const recur_parameters &p, uint32_t shared)
{
	using layout = recur_layout<DK, WARPGROUPS>;
	constexpr int FIRST = OUTPUT ? record<DK>::QUERIES : record<DK>::KEYS;
	constexpr int RECORD_BYTES = record<DK>::BYTES - FIRST;
	const item t = locate(p);
	const int b = t.sequence / p.n_heads, h = t.sequence % p.n_heads;
	const unsigned char *records =
	        p.records + static_cast<int64_t>(t.sequence) * p.chunks * record<DK>::BYTES;
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int chunk = t.first; chunk < t.last; chunk++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t empty = full + layout::STAGES * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;

		barrier_wait(empty, r.parity ^ 1);
		barrier_arrive_expect(full, RECORD_BYTES + WARPGROUPS * PANEL_BYTES);
		load_record<DK, FIRST>(p, stage, t.slice,
		                       records + static_cast<int64_t>(chunk) * record<DK>::BYTES,
		                       full);
#pragma unroll
		for (int w = 0; w < WARPGROUPS; w++)
			tensor_load(stage + layout::V + w * PANEL_BYTES, &p.v, full,
			            (t.slice * WARPGROUPS + w) * 64, chunk * CHUNK, h, b);
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
 * o^T (64 columns of v x 64 tokens) = S^T q^T for the state as it is, then the state
 * decayed to the chunk's end: 64 channels at a time become a left operand, of which
 * two are under way.
 */
template <int DK, bool OUTPUT>
__device__ __forceinline__ void read_state(float (&o)[32], uint32_t (&left)[2][16], state<DK> &s,
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

/* o^T through shared memory, transposed on the way, and out as a box of 64 x 64. */
__device__ __forceinline__ void store_output(const recur_parameters &p, float (&o)[32],
                                             uint32_t staging, int warp, int lane, int barrier,
                                             int column, int token, int h, int b)
{
	const bool leader = warp == 0 && lane == 0;

	if (leader)
		store_wait_read();
	named_barrier_sync(barrier, 128);
#pragma unroll
	for (int n = 0; n < 8; n += 2)
		store_transposed_x4(transposed_block(staging, 8 * n, 16 * warp, lane),
		                    pack_bf16(o[4 * n], o[4 * n + 1]),
		                    pack_bf16(o[4 * n + 2], o[4 * n + 3]),
		                    pack_bf16(o[4 * n + 4], o[4 * n + 5]),
		                    pack_bf16(o[4 * n + 6], o[4 * n + 7]));
	fence_async_proxy();
	named_barrier_sync(barrier, 128);
	if (leader) {
		tensor_store(&p.out, staging, column, token, h, b);
		store_commit();
	}
}

template <typename layout, int DK, int WARPGROUPS, bool OUTPUT>
__device__ __forceinline__ void consume(const recur_parameters &p, uint32_t shared)
{
	const int warpgroup = threadIdx.x / 128 - layout::FIRST_CONSUMER;
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, channel = threadIdx.x % 128;
	const item t = locate(p);
	const int b = t.sequence / p.n_heads, h = t.sequence % p.n_heads;
	const int column = (t.slice * WARPGROUPS + warpgroup) * 64;
	slot_ring<layout::STAGES> r;
	state<DK> s;
	float o[32], decay[(DK + 127) / 128];
	uint32_t left[2][16];

#pragma unroll
	for (float &x : decay)
		x = 1.0f;
	if (OUTPUT) {
		seed<DK>(s, p, t, column, warp, lane);
	} else {
#pragma unroll
		for (float &x : s.x)
			x = 0.0f;
	}
#pragma unroll 1
	for (int chunk = t.first; chunk < t.last; chunk++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t empty = full + layout::STAGES * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;
		const uint32_t decays = stage + layout::DECAYS;
		const uint64_t values =
		        matrix_descriptor(stage + layout::V + warpgroup * PANEL_BYTES, PANEL_BYTES);
		const uint64_t keys = matrix_descriptor(stage + layout::KEYS, PANEL_BYTES);

		barrier_wait(full, r.parity);
		if (layout::FUSED)
			barrier_wait(full + 2 * layout::STAGES * 8, r.parity);
		wgmma_wait<0>();
		pin(s.x);
		read_state<DK, OUTPUT>(o, left, s, matrix_descriptor(stage + layout::QUERIES, 16),
		                       decays, lane);
		if (!OUTPUT && warpgroup == 0) {
#pragma unroll
			for (int i = 0; i < (DK + 127) / 128; i++)
				if (channel + 128 * i < DK)
					decay[i] *= shared_float(decays + (channel + 128 * i) * 4);
		}
		if (OUTPUT) {
			const uint64_t scores = matrix_descriptor(stage + layout::SCORES, 16);

			wgmma_fence();
#pragma unroll
			for (int step = 0; step < CHUNK / 16; step++)
				wgmma_ss_transposed(o, values + step * 2048 / 16,
				                    scores + step * 32 / 16, true);
			wgmma_commit();
			wgmma_wait<0>();
			pin(o);
			pin(left[0]);
			pin(left[1]);
		}
		pin(s.x);
		wgmma_fence();
#pragma unroll
		for (int step = 0; step < CHUNK / 16; step++)
			wgmma_ss_both_transposed(s.x, values + step * 2048 / 16,
			                         keys + step * 2048 / 16, true);
		wgmma_commit();
		if (OUTPUT) {
			store_output(p, o, shared + layout::OUT + warpgroup * PANEL_BYTES, warp,
			             lane, 1 + warpgroup, column, chunk * CHUNK, h, b);
		}
		wgmma_wait<0>();
		pin(s.x);
		if (!layout::FUSED && lane < p.cluster)
			barrier_arrive_at(empty, lane);
		if (layout::FUSED && lane == 0)
			barrier_arrive(empty);
		r.advance();
	}
	if (OUTPUT && warp == 0 && lane == 0)
		store_wait_read();
	if (!OUTPUT) {
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
	} else if (p.final_state && t.last == p.chunks) {
		float *to = p.final_state + static_cast<int64_t>(t.sequence) * DK * p.d_v + column +
		            16 * warp;

#pragma unroll
		for (int i = 0; i < DK / 2; i++)
			to[state_offset(i, lane, p.d_v)] = s.x[i];
	}
}

template <int DK, int WARPGROUPS, bool OUTPUT>
__global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
        recur_kernel(const __grid_constant__ recur_parameters p)
{
	using layout = recur_layout<DK, WARPGROUPS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = (shared_address(unaligned) + 1023) & ~1023u;

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
			produce<DK, WARPGROUPS, OUTPUT>(p, shared);
	} else {
		if (WARPGROUPS == 2)
			registers_increase<240>();
		consume<layout, DK, WARPGROUPS, OUTPUT>(p, shared);
	}
	/* Others may still load into this block's memory and arrive at its barriers. */
	__syncwarp();
	cluster_sync();
}

/* ---- fused: one block prepares and takes all columns of v, at most 128 */

template <int DK, int WARPGROUPS>
__device__ __forceinline__ void produce_fused(const fused_parameters &p, uint32_t shared)
{
	using layout = fused_layout<DK, WARPGROUPS>;
	const int b = blockIdx.x / p.n_heads, h = blockIdx.x % p.n_heads;
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int chunk = 0; chunk < p.chunks; chunk++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t empty = full + layout::STAGES * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;

		barrier_wait(empty, r.parity ^ 1);
		barrier_arrive_expect(full, layout::LOADED);
#pragma unroll
		for (int i = 0; i < DK / 64; i++) {
			const uint32_t at = stage + i * PANEL_BYTES;

			tensor_load(at + layout::SCORES, &p.log_decay, full, i * 64, chunk * CHUNK,
			            h, b);
			tensor_load(at + layout::QUERIES, &p.q, full, i * 64, chunk * CHUNK, h, b);
			tensor_load(at + layout::KEYS, &p.k, full, i * 64, chunk * CHUNK, h, b);
		}
#pragma unroll
		for (int w = 0; w < WARPGROUPS; w++)
			tensor_load(stage + layout::V + w * PANEL_BYTES, &p.v, full, w * 64,
			            chunk * CHUNK, h, b);
		r.advance();
	}
}

/* The warpgroup that turns what was loaded into operands. */
template <int DK, int WARPGROUPS>
__device__ __forceinline__ void prepare_fused(const fused_parameters &p, uint32_t shared)
{
	using layout = fused_layout<DK, WARPGROUPS>;
	constexpr int BARRIER = 1 + WARPGROUPS; /* the consumers have one each from 1 on */
	const auto sync = [] { named_barrier_sync(BARRIER, 128); };
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int chunk = 0; chunk < p.chunks; chunk++) {
		const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
		const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;
		chunk_scores s = {};

		barrier_wait(full, r.parity);
#pragma unroll 1
		for (int number = 0; number < DK / 64; number++) {
			const uint32_t at = stage + number * PANEL_BYTES;
			const panel t = {at + layout::QUERIES, at + layout::SCORES,
			                 at + layout::KEYS};

			prepare_panel<SLABS>(
			        s, t, shared + layout::EXCHANGE + number % 2 * EXCHANGE_BYTES,
			        p.scale, chunk == 0, sync, [&](int channel, float x, float y) {
				        shared_store2(stage + layout::DECAYS +
				                              (number * 64 + channel) * 4,
				                      x, y);
			        });
		}
		sync();
		store_scores(stage + layout::SCORES, s);
		fence_async_proxy();
		__syncwarp();
		if (threadIdx.x % 32 == 0)
			barrier_arrive(full + 2 * layout::STAGES * 8);
		r.advance();
	}
}

template <int DK, int WARPGROUPS>
__global__ void __launch_bounds__(128 * (WARPGROUPS + 2), 1)
        fused_kernel(const __grid_constant__ fused_parameters p)
{
	using layout = fused_layout<DK, WARPGROUPS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = (shared_address(unaligned) + 1023) & ~1023u;

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
			produce_fused<DK, WARPGROUPS>(p, shared);
	} else if (threadIdx.x < 256) {
		if (WARPGROUPS == 2) /* of one there are 168 from the start */
			registers_increase<168>();
		prepare_fused<DK, WARPGROUPS>(p, shared);
	} else {
		registers_increase<WARPGROUPS == 2 ? 160 : 240>();
		consume<layout, DK, WARPGROUPS, true>(p, shared);
	}
}

/* ---- host */

/* How the work is cut, and where the workspace's parts begin, in bytes. */
struct plan {
	int chunks, slices, segments, per_segment;
	size_t states, decays, bytes;
};

/*
 * As many segments as make the whole soonest done: a segment takes as many steps as it has
 * chunks, in as many waves as the blocks need; the run without queries costs two fifths.
 */
void choose_segments(plan &c, int64_t sequences)
{
	const int64_t sms = cuda_sm_count(), blocks = sequences * c.slices;
	double best = 0;

	c.segments = 1;
	c.per_segment = c.chunks;
	for (int wanted = 1; wanted <= 32 && wanted <= c.chunks; wanted++) {
		const int per = (c.chunks + wanted - 1) / wanted,
		          segments = (c.chunks + per - 1) / per;
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

plan make_plan(const struct matrix_recurrence_args *a)
{
	const int64_t sequences = a->batch * a->n_heads;
	const size_t record_bytes = a->d_k == 64    ? record<64>::BYTES
	                            : a->d_k == 128 ? record<128>::BYTES
	                                            : record<256>::BYTES;
	plan c;

	c.chunks = static_cast<int>((a->seq_len + CHUNK - 1) / CHUNK);
	c.slices = a->d_v == 64 ? 1 : static_cast<int>(a->d_v / 128);
	choose_segments(c, sequences);
	const size_t before = static_cast<size_t>(sequences * (c.segments - 1) * a->d_k);
	c.states = static_cast<size_t>(sequences * c.chunks) * record_bytes;
	c.decays = c.states + before * static_cast<size_t>(a->d_v) * sizeof(float);
	c.bytes = c.decays + before * sizeof(float);
	return c;
}

enum status encode_inputs(CUtensorMap *q, CUtensorMap *k, CUtensorMap *log_decay,
                          const struct matrix_recurrence_args *a)
{
	const auto encode = [&](CUtensorMap *map, const struct view *view) {
		return tensor_map_encode(map, view, a->batch, a->seq_len, a->n_heads, a->d_k,
		                         CHUNK);
	};
	enum status status = encode(q, &a->q);

	if (status == STATUS_OK)
		status = encode(k, &a->k);
	return status == STATUS_OK ? encode(log_decay, &a->log_decay) : status;
}

template <int DK>
enum status prepare(const struct matrix_recurrence_args *a, const plan &c, unsigned char *records)
{
	const int64_t total = a->batch * a->n_heads * c.chunks,
	              resident = PREPARE_BLOCKS * cuda_sm_count();
	prepare_parameters p = {};
	enum status status = encode_inputs(&p.q, &p.k, &p.log_decay, a);

	if (status != STATUS_OK)
		return status;
	p.n_heads = static_cast<int>(a->n_heads);
	p.chunks = c.chunks;
	p.total = static_cast<int>(total);
	p.scale = a->scale;
	p.records = records;
	CUDA_TRY(cudaFuncSetAttribute(prepare_kernel<DK>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize,
	                              prepare_layout::BYTES));
	prepare_kernel<DK><<<static_cast<unsigned>(total < resident ? total : resident), 128,
	                     prepare_layout::BYTES, cuda_stream()>>>(p);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

template <int DK, int WARPGROUPS, bool OUTPUT>
enum status recur(const recur_parameters &p, int64_t sequences)
{
	const int bytes = recur_layout<DK, WARPGROUPS>::BYTES;

	CUDA_TRY(cudaFuncSetAttribute(recur_kernel<DK, WARPGROUPS, OUTPUT>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	cudaLaunchAttribute cluster = {};
	cudaLaunchConfig_t config = {};

	cluster.id = cudaLaunchAttributeClusterDimension;
	cluster.val.clusterDim.x = static_cast<unsigned>(p.cluster);
	cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
	config.gridDim = dim3(static_cast<unsigned>(sequences * p.segments * p.slices));
	config.blockDim = dim3(128 * (WARPGROUPS + 1));
	config.dynamicSmemBytes = static_cast<size_t>(bytes);
	config.stream = cuda_stream();
	config.attrs = &cluster;
	config.numAttrs = 1;
	CUDA_TRY(cudaLaunchKernelEx(&config, recur_kernel<DK, WARPGROUPS, OUTPUT>, p));
	return STATUS_OK;
}

/* What both ways of running it have in common. */
enum status fill_parameters(recur_parameters &p, const struct matrix_recurrence_args *a,
                            const plan &c)
{
	const enum status status =
	        tensor_map_encode(&p.v, &a->v, a->batch, a->seq_len, a->n_heads, a->d_v, CHUNK);

	p.n_heads = static_cast<int>(a->n_heads);
	p.chunks = c.chunks;
	p.slices = c.slices;
	p.cluster = c.slices < CLUSTER ? c.slices : CLUSTER;
	p.d_v = static_cast<int>(a->d_v);
	p.segments = c.segments;
	p.per_segment = c.per_segment;
	p.h0 = a->h0;
	p.final_state = a->final_state;
	return status == STATUS_OK ? tensor_map_encode(&p.out, &a->out, a->batch, a->seq_len,
	                                               a->n_heads, a->d_v, CHUNK)
	                           : status;
}

template <int DK, int WARPGROUPS>
enum status run_staged(const struct matrix_recurrence_args *a, unsigned char *workspace)
{
	const plan c = make_plan(a);
	const int64_t sequences = a->batch * a->n_heads;
	recur_parameters p = {};
	enum status status = fill_parameters(p, a, c);

	if (status == STATUS_OK)
		status = prepare<DK>(a, c, workspace);
	p.records = workspace;
	p.states = reinterpret_cast<float *>(workspace + c.states);
	p.decays = reinterpret_cast<float *>(workspace + c.decays);
	p.segments = c.segments - 1;
	if (status == STATUS_OK && p.segments > 0)
		status = recur<DK, WARPGROUPS, false>(p, sequences);
	p.segments = c.segments;
	return status == STATUS_OK ? recur<DK, WARPGROUPS, true>(p, sequences) : status;
}

template <int DK, int WARPGROUPS> enum status run_fused(const struct matrix_recurrence_args *a)
{
	const int bytes = fused_layout<DK, WARPGROUPS>::BYTES;
	plan c = make_plan(a);
	fused_parameters p = {};

	c.segments = 1;
	c.per_segment = c.chunks;
	enum status status = fill_parameters(p, a, c);
	if (status == STATUS_OK)
		status = encode_inputs(&p.q, &p.k, &p.log_decay, a);
	if (status != STATUS_OK)
		return status;
	p.scale = a->scale;
	CUDA_TRY(cudaFuncSetAttribute(fused_kernel<DK, WARPGROUPS>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	fused_kernel<DK, WARPGROUPS><<<static_cast<unsigned>(a->batch * a->n_heads),
	                               128 * (WARPGROUPS + 2), bytes, cuda_stream()>>>(p);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

} // namespace

extern "C" const char *hopper_gla_staged_unsupported(const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (!cuda_is_hopper())
		return "needs compute capability 9.0";
	if (a->decay != DECAY_DIAGONAL || a->rule != RULE_PLAIN)
		return "only a diagonal decay and the plain rule";
	if (a->chunk != 0 && a->chunk != CHUNK)
		return "chunk must be 64";
	if (a->d_k != 64 && a->d_k != 128 && a->d_k != 256)
		return "d_k must be 64, 128 or 256";
	if (a->d_v != 64 && a->d_v != 128 && a->d_v != 256 && a->d_v != 512)
		return "d_v must be 64, 128, 256 or 512";
	if (!tensor_map_supports(&a->q) || !tensor_map_supports(&a->k) ||
	    !tensor_map_supports(&a->v) || !tensor_map_supports(&a->out) ||
	    !tensor_map_supports(&a->log_decay))
		return "views must be 16-byte aligned";
	if (a->n_heads > 1 && (a->q.head == 0 || a->k.head == 0))
		return "heads must not share q or k";
	if (a->batch * a->n_heads * ((a->seq_len + CHUNK - 1) / CHUNK + 4 * 32) > 0x7fffffff)
		return "more chunks than a grid has blocks";
	return NULL;
}

extern "C" size_t hopper_gla_staged_workspace(const void *args)
{
	return make_plan(static_cast<const struct matrix_recurrence_args *>(args)).bytes;
}

extern "C" enum status hopper_gla_staged(const void *args, void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	auto *memory = static_cast<unsigned char *>(workspace);

	if (a->d_v == 64)
		return a->d_k == 64    ? run_staged<64, 1>(a, memory)
		       : a->d_k == 128 ? run_staged<128, 1>(a, memory)
		                       : run_staged<256, 1>(a, memory);
	return a->d_k == 64    ? run_staged<64, 2>(a, memory)
	       : a->d_k == 128 ? run_staged<128, 2>(a, memory)
	                       : run_staged<256, 2>(a, memory);
}

extern "C" const char *hopper_gla_fused_unsupported(const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const char *why = hopper_gla_staged_unsupported(args);

	if (!why && (a->d_k > 128 || a->d_v > 128))
		why = "head widths must be at most 128";
	return why;
}

extern "C" enum status hopper_gla_fused(const void *args, void *)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->d_v == 64)
		return a->d_k == 64 ? run_fused<64, 1>(a) : run_fused<128, 1>(a);
	return a->d_k == 64 ? run_fused<64, 2>(a) : run_fused<128, 2>(a);
}

/* Fused where that can be, unless the sequences are too few and must be cut. */
static bool fuses(const void *args)
{
	return !hopper_gla_fused_unsupported(args) &&
	       make_plan(static_cast<const struct matrix_recurrence_args *>(args)).segments == 1;
}

extern "C" const char *hopper_gla_unsupported(const void *args)
{
	return hopper_gla_staged_unsupported(args);
}

extern "C" size_t hopper_gla_workspace(const void *args)
{
	return fuses(args) ? 0 : hopper_gla_staged_workspace(args);
}

extern "C" enum status hopper_gla(const void *args, void *workspace)
{
	return fuses(args) ? hopper_gla_fused(args, workspace) : hopper_gla_staged(args, workspace);
}
