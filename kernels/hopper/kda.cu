/*
 * The delta rule whose decays differ by channel (KDA), forward, on sm_90a:
 *   S <- Diag(a_t) S; v'_t = beta_t (v_t - k_t S); S <- S + k_t^T v'_t; o_t = scale q_t S,
 * chunkwise, 64 tokens at a time. With G_t the sums of log2 a over the chunk's tokens up to t, each
 * channel by itself, q+ = scale q 2^(G_t), k+ = k 2^(G_t), kE = k 2^(G_E - G_t), and
 *   A_ts = beta_t sum_c k_tc k_sc 2^(G_tc - G_sc), s < t,  P the same with scale q, s <= t:
 *   v' = (I + A)^-1 diag(beta) (v - k+ S);  o = q+ S + P v';  S <- Diag(2^(G_E)) S + kE^T v'.
 *
 * Two kernels:
 *   prepare  a warpgroup, every 64 tokens of a sequence and head by themselves: a record of q+, k+,
 *            kE, P, the inverse times diag(beta), and 2^(G_E). A panel of 64 channels at a time, as
 *            GLA's (gla_chunk.cuh): exponents are <= 0 except inside a sub-chunk of 16 tokens that
 *            decays mildly. The inverse is triangle.cuh's
 *   walk     a block keeps the state of a sequence and head, 64 channels of v a warpgroup,
 *            transposed as fp32 accumulators: x = S^T k+^T, o = S^T q+^T; v' = (v - x) M^T;
 *            o += v' P^T; S^T = S^T Diag(2^(G_E)) + v' kE. A thread loads records and v
 * Limit: the records' way through memory, 3.3 KB of a token and head at 128 x 128.
 * docs/kernels/delta_rule.md.
 * wgmma in: walk_kernel
 */
#include "kernels/hopper/gla_chunk.cuh"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/hopper/triangle.cuh"

using namespace hopper;

namespace
{

/* Byte offsets; panels of 64 channels or tokens, 128-byte swizzle. */
template <int DK> struct kda_record {
	static constexpr int WIDTH = DK / 64 * PANEL_BYTES;
	static constexpr int QUERIES = 0, PLUS = WIDTH, KEYS = 2 * WIDTH; /* q+, k+, kE */
	static constexpr int SCORES = 3 * WIDTH, SOLVED = SCORES + PANEL_BYTES;
	static constexpr int DECAYS = SOLVED + PANEL_BYTES; /* fp32 [DK] */
	static constexpr int BYTES = DECAYS + DK * 4;
};

struct kda_parameters {
	CUtensorMap q, k, log_decay, v, out;
	struct view beta;
	int seq_len, n_heads, chunks, d_k, d_v, slices; /* slices: blocks across v's channels */
	int records, walks;
	int q_step, k_step; /* between heads: 0 where they share q or k */
	float scale;
	const float *h0;
	float *final_state;
	unsigned char *prepared;
};

/* ---- prepare */

struct prepare_layout {
	static constexpr int STAGES = 2, BLOCKS = 2; /* blocks of a multiprocessor */
	static constexpr int Q = 0, G = PANEL_BYTES,
	                     K = 2 * PANEL_BYTES; /* of a stage, as loaded */
	static constexpr int PLUS = 3 * PANEL_BYTES, STAGE_BYTES = 4 * PANEL_BYTES;
	static constexpr int SOLVED = STAGES * STAGE_BYTES;
	static constexpr int TRIANGLE = SOLVED + PANEL_BYTES;
	static constexpr int EXCHANGE = TRIANGLE + TRIANGLE_BYTES;
	static constexpr int BETA = EXCHANGE + STAGES * EXCHANGE_BYTES;
	static constexpr int BARRIERS = BETA + RECORD * 4;
	static constexpr int BYTES = BARRIERS + STAGES * 8 + 1024; /* 1024: room to align */
};

template <int DK> using cursor = panel_cursor<DK, prepare_layout::STAGES>;

template <int DK>
__device__ __forceinline__ void load_panel(const kda_parameters &p, uint32_t shared, cursor<DK> &at)
{
	using L = prepare_layout;
	const int sequence = at.number / p.chunks, token = at.number % p.chunks * RECORD;
	const int b = sequence / p.n_heads, h = sequence % p.n_heads;
	const uint32_t full = shared + L::BARRIERS + at.stage.slot * 8;
	const uint32_t stage = shared + at.stage.slot * L::STAGE_BYTES;

	if (at.number >= p.records)
		return;
	barrier_arrive_expect(full, 3 * PANEL_BYTES);
	tensor_load(stage + L::G, &p.log_decay, full, at.panel * 64, token, h, b);
	tensor_load(stage + L::Q, &p.q, full, at.panel * 64, token, h * p.q_step, b);
	tensor_load(stage + L::K, &p.k, full, at.panel * 64, token, h * p.k_step, b);
	at.advance();
}

/* Products of this warp's 16 queries, of A and P each. */
struct kda_scores {
	chunk_scores a, p;
};

/* A slab on its way: q and k decayed from the start of their sub-chunk, k to its end. */
struct kda_slab {
	fragment decays; /* transposed */
	bool exact;      /* its products inside the sub-chunk need more than one factor */
	values q, plus, right;
};

/* As GLA's (gla_chunk.cuh), with k for queries, too. */
__device__ __forceinline__ void begin_kda_slab(kda_slab &x, kda_scores &s, const panel &t,
                                               int number, uint32_t shown, float scale)
{
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const uint32_t own = slab_offset(warp, number);
	const selection until = select([](int t, int u) { return u <= t; });
	const selection after = select([](int t, int u) { return u > t; });
	values grown;
	float inverse[8], whole[8];

	x.q = unpack(load_fragment(t.q + own), scale);
	x.plus = unpack(load_fragment(t.k + own), 1.0f);
	x.right = x.plus;
	/* Scores with the tokens' own keys, exactly: where decays are strong there are no others.
	 */
#pragma unroll
	for (int i = 0; i < 16; i++)
		s.p.own[i / 8] = fmaf(x.q.x[i / 8][i % 8], x.plus.x[i / 8][i % 8], s.p.own[i / 8]);
#pragma unroll
	for (int i = 0; i < 4; i++) {
		float begin[4], end[4];

		sum_decays(begin, until, x.decays, i);
		sum_decays(end, after, x.decays, i);
#pragma unroll
		for (int j = 0; j < 2; j++)
			inverse[2 * i + j] = x.exact ? 0.0f : exp2_approx(-begin[j] - end[j]);
#pragma unroll
		for (int j = 0; j < 4; j++) {
			const float factor = exp2_approx(begin[j]);

			x.q.x[j / 2][2 * i + j % 2] *= factor;
			x.plus.x[j / 2][2 * i + j % 2] *= factor;
			x.right.x[j / 2][2 * i + j % 2] *= exp2_approx(end[j]);
			if (j >= 2)
				whole[2 * i + j % 2] = factor;
		}
	}
	if (lane >= 28) /* its second row is the last */
		store_floats(shown + warp * 128, whole);
	grown = x.right;
	scale_by(grown, inverse);
	add_scores(s.p.inside, x.q, grown);
	add_scores(s.a.inside, x.plus, grown);
	store_fragment(t.decays + own, pack(x.right));
}

/* After the barrier: products with earlier sub-chunks; q+, k+ and kE. */
template <typename Keep>
__device__ __forceinline__ void end_kda_slab(kda_slab &x, kda_scores &s, const panel &t,
                                             uint32_t plus, int number, uint32_t shown, Keep keep)
{
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const uint32_t own = slab_offset(warp, number);

#pragma unroll
	for (int j = SUBS - 2; j >= 0; j--) {
		float decay[8];

		if (j >= warp)
			continue;
		const fragment keys = load_fragment(t.decays + slab_offset(j, number));

		add_scores(s.p.between[j], pack(x.q), keys);
		add_scores(s.a.between[j], pack(x.plus), keys);
		load_floats(decay, shown + j * 128);
		scale_by(x.q, decay);
		scale_by(x.plus, decay);
	}
	store_fragment(t.q + own, pack(x.q));
	store_fragment(plus + own, pack(x.plus));
#pragma unroll
	for (int j = 1; j < SUBS; j++) {
		float decay[8];

		if (j <= warp)
			continue;
		load_floats(decay, shown + j * 128);
		scale_by(x.right, decay);
	}
	store_fragment(t.k + own, pack(x.right));
	if (warp == 0 && lane < 4) {
		float whole[8], decay[8];

		load_floats(whole, shown);
#pragma unroll
		for (int j = 1; j < SUBS; j++) {
			load_floats(decay, shown + j * 128);
#pragma unroll
			for (int i = 0; i < 8; i++)
				whole[i] *= decay[i];
		}
#pragma unroll
		for (int i = 0; i < 4; i++)
			keep(32 * number + 8 * i + 2 * lane, whole[2 * i], whole[2 * i + 1]);
	}
}

/* The inverse times diag(beta) into its panel, of the products. Synchronizes. */
__device__ __forceinline__ void solve(const kda_scores &s, uint32_t shared)
{
	using L = prepare_layout;
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const uint32_t beta = shared + L::BETA, blocks = shared + L::TRIANGLE;
	const uint32_t own = beta + (16 * warp + lane / 4) * 4;
	const float factor[2] = {shared_float(own), shared_float(own + 32)};
	float a[32], inside[8];

#pragma unroll
	for (int i = 0; i < 8; i++) {
		inside[i] = factor[i / 2 % 2] * s.a.inside[i / 4][i % 4];
#pragma unroll
		for (int j = 0; j < SUBS - 1; j++)
			a[8 * j + i] = factor[i / 2 % 2] * s.a.between[j][i / 4][i % 4];
		a[24 + i] = 0.0f;
	}
	store_diagonal(diagonal_block(blocks, warp), inside, lane);
	invert_diagonal(diagonal_block(blocks, warp), lane);
	__syncthreads();
	scale_columns(blocks, a, warp, lane);
	__syncthreads();
	solve_rows(blocks, shared + L::SOLVED, beta, warp, lane);
}

template <int DK>
__global__ void __launch_bounds__(128, prepare_layout::BLOCKS)
        prepare_kernel(const __grid_constant__ kda_parameters p)
{
	using L = prepare_layout;
	using R = kda_record<DK>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);
	const bool leader = threadIdx.x == 0;
	cursor<DK> now, ahead;
	kda_scores s = {};

	if (leader) {
		for (int i = 0; i < L::STAGES; i++)
			barrier_init(shared + L::BARRIERS + i * 8, 1);
		barrier_init_fence();
		for (int i = 0; i < L::STAGES; i++)
			load_panel<DK>(p, shared, ahead);
	}
	/* The inverse's upper blocks are zero, and stay so. */
	for (int i = threadIdx.x; i < PANEL_BYTES / 16; i += 128)
		shared_store4(shared + L::SOLVED + 16 * i, 0.0f, 0.0f, 0.0f, 0.0f);
	__syncthreads();
#pragma unroll 1
	for (bool loaded = true; now.number < p.records; loaded = false) {
		unsigned char *to = p.prepared + static_cast<int64_t>(now.number) * R::BYTES;
		const uint32_t stage = shared + now.stage.slot * L::STAGE_BYTES;
		const uint32_t shown = shared + L::EXCHANGE + now.stage.slot * EXCHANGE_BYTES +
		                       threadIdx.x % 4 * 32;
		const panel t = {stage + L::Q, stage + L::G, stage + L::K};
		const int sequence = now.number / p.chunks;
		const int token = now.number % p.chunks * RECORD + static_cast<int>(threadIdx.x);
		const bool last = now.panel == DK / 64 - 1;
		/* A sequence's first tokens have few scores, which can all be small. */
		const bool start = now.number % p.chunks == 0 && threadIdx.x < 32;

		if (now.panel == 0 && threadIdx.x < RECORD)
			shared_store1(
			        shared + L::BETA + threadIdx.x * 4,
			        token < p.seq_len
			                ? __bfloat162float(static_cast<const __nv_bfloat16 *>(
			                          p.beta.data)[sequence / p.n_heads * p.beta.batch +
			                                       token * p.beta.token +
			                                       sequence % p.n_heads * p.beta.head])
			                : 0.0f);
		barrier_wait(shared + L::BARRIERS + now.stage.slot * 8, now.stage.parity);
		kda_slab x[SLABS];
#pragma unroll
		for (int i = 0; i < SLABS; i++) {
			const uint32_t own = slab_offset(threadIdx.x / 32 % 4, i);
			slab decays;

			look_at_slab(decays, t, i, start);
			x[i].decays = decays.decays;
			x[i].exact = decays.exact;
			if (x[i].exact) {
				const fragment k = load_fragment(t.k + own);

				add_halves<false>(s.p.inside, load_fragment(t.q + own), k,
				                  x[i].decays, p.scale);
				add_halves<false>(s.a.inside, k, k, x[i].decays, 1.0f);
			}
		}
#pragma unroll
		for (int i = 0; i < SLABS; i++) /* no branches: slabs overlap */
			begin_kda_slab(x[i], s, t, i, shown + i * SUBS * 128, p.scale);
		__syncthreads();
		/* The stage before this one, once it has been stored. */
		if (leader && !loaded) {
			store_wait_read();
			load_panel<DK>(p, shared, ahead);
		}
#pragma unroll
		for (int i = 0; i < SLABS; i++)
			end_kda_slab(x[i], s, t, stage + L::PLUS, i, shown + i * SUBS * 128,
			             [&](int channel, float y, float z) {
				             auto *decays =
				                     reinterpret_cast<float2 *>(to + R::DECAYS);

				             decays[(now.panel * 64 + channel) / 2] = {y, z};
			             });
		if (last) {
			__syncthreads();                   /* the decays' tile has been read */
			store_scores<true>(t.decays, s.p); /* the own ones in their place */
			solve(s, shared);
			s = {};
		}
		fence_async_proxy();
		__syncthreads();
		if (leader) {
			const int at = now.panel * PANEL_BYTES;

			bulk_store(to + R::QUERIES + at, t.q, PANEL_BYTES);
			bulk_store(to + R::PLUS + at, stage + L::PLUS, PANEL_BYTES);
			bulk_store(to + R::KEYS + at, t.k, PANEL_BYTES);
			if (last) {
				bulk_store(to + R::SCORES, t.decays, PANEL_BYTES);
				bulk_store(to + R::SOLVED, shared + L::SOLVED, PANEL_BYTES);
			}
			store_commit();
		}
		now.advance();
	}
	if (leader)
		store_wait_read();
}

/* ---- walk */

/* A stage: a record and 64 channels of v a warpgroup. Outputs have two slots a warpgroup. */
template <int DK, int SLICES> struct walk_layout {
	using R = kda_record<DK>;
	static constexpr int THREADS = 128 * (1 + SLICES);
	static constexpr int V = (R::BYTES + 1023) / 1024 * 1024;
	static constexpr int LOADED = R::BYTES + SLICES * PANEL_BYTES;
	static constexpr int STAGE_BYTES = V + SLICES * PANEL_BYTES;
	static constexpr int STAGES = DK == 64 ? 3 : 2, OUT_SLOTS = 2;
	static constexpr int OUT = STAGES * STAGE_BYTES;
	static constexpr int FULL = OUT + SLICES * OUT_SLOTS * PANEL_BYTES;
	static constexpr int EMPTY = FULL + STAGES * 8;
	static constexpr int BYTES = EMPTY + STAGES * 8 + 1024; /* 1024: room to align */
};

/* Of a sequence and head, `slice` counts blocks across v's channels. */
struct walk_place {
	int sequence, b, h, slice;
};

__device__ __forceinline__ walk_place locate_walk(const kda_parameters &p, int number)
{
	const int sequence = number / p.slices;

	return {sequence, sequence / p.n_heads, sequence % p.n_heads, number % p.slices};
}

template <int DK, int SLICES>
__device__ __forceinline__ void produce(const kda_parameters &p, uint32_t shared)
{
	using L = walk_layout<DK, SLICES>;
	using R = kda_record<DK>;
	slot_ring<L::STAGES> ring;

#pragma unroll 1
	for (int number = blockIdx.x; number < p.walks; number += gridDim.x) {
		const walk_place x = locate_walk(p, number);
		const unsigned char *records =
		        p.prepared + static_cast<int64_t>(x.sequence) * p.chunks * R::BYTES;

#pragma unroll 1
		for (int chunk = 0; chunk < p.chunks; chunk++) {
			const uint32_t stage = shared + ring.slot * L::STAGE_BYTES;
			const uint32_t full = shared + L::FULL + ring.slot * 8;

			barrier_wait(shared + L::EMPTY + ring.slot * 8, ring.parity ^ 1);
			barrier_arrive_expect(full, L::LOADED);
			bulk_load(stage, records + static_cast<int64_t>(chunk) * R::BYTES, R::BYTES,
			          full);
#pragma unroll
			for (int i = 0; i < SLICES; i++)
				tensor_load(stage + L::V + i * PANEL_BYTES, &p.v, full,
				            (x.slice * SLICES + i) * 64, chunk * RECORD, x.h, x.b);
			ring.advance();
		}
	}
}

/* A warpgroup: 64 channels of v, all of k's. */
template <int DK, int SLICES> struct kda_walk {
	using L = walk_layout<DK, SLICES>;
	using R = kda_record<DK>;

	const kda_parameters &p;
	uint32_t shared;
	int warpgroup, warp, lane;
	slot_ring<L::STAGES> stage;
	slot_ring<L::OUT_SLOTS> slot;
	float s[DK / 2]; /* S^T: rows are channels of v, columns of k */

	__device__ void run();
	__device__ void visit(float *tensor, const walk_place &x, bool write);
	__device__ void step(const walk_place &x, int chunk);
	__device__ void store(const walk_place &x, int chunk, const float (&o)[32]);
};

/* Reads or writes this thread's elements of a [B, H, d_k, d_v] tensor. */
template <int DK, int SLICES>
__device__ __forceinline__ void kda_walk<DK, SLICES>::visit(float *tensor, const walk_place &x,
                                                            bool write)
{
	const int value = (x.slice * SLICES + warpgroup) * 64 + 16 * warp + lane / 4;
	float *at = tensor + static_cast<int64_t>(x.sequence) * p.d_k * p.d_v;

#pragma unroll
	for (int i = 0; i < DK / 2; i++) {
		const int row = 2 * (lane % 4) + 8 * (i >> 2) + (i & 1);
		const int column = value + 8 * ((i >> 1) & 1);

		if (row < p.d_k && column < p.d_v) {
			float *place = at + static_cast<int64_t>(row) * p.d_v + column;

			if (write)
				*place = s[i];
			else
				s[i] = *place;
		}
	}
}

/* o^T is transposed on its way through shared memory. The copy before the last has read its slot
 * when the last barrier is passed. */
template <int DK, int SLICES>
__device__ __forceinline__ void kda_walk<DK, SLICES>::store(const walk_place &x, int chunk,
                                                            const float (&o)[32])
{
	const uint32_t staging =
	        shared + L::OUT + (warpgroup * L::OUT_SLOTS + slot.slot) * PANEL_BYTES;
	const bool leader = threadIdx.x % 128 == 0;

#pragma unroll
	for (int j = 0; j < 4; j++)
		store_transposed_block(transposed_block(staging, 16 * j, 16 * warp, lane),
		                       &o[8 * j]);
	fence_async_proxy();
	if (leader)
		store_wait_read();
	named_barrier_sync(1 + warpgroup, 128);
	slot.advance();
	if (leader) {
		tensor_store(&p.out, staging, (x.slice * SLICES + warpgroup) * 64, chunk * RECORD,
		             x.h, x.b);
		store_commit();
	}
}

template <int DK, int SLICES>
__device__ __forceinline__ void kda_walk<DK, SLICES>::step(const walk_place &x, int chunk)
{
	const uint32_t at = shared + stage.slot * L::STAGE_BYTES;
	const uint32_t decays = at + R::DECAYS + 2 * (lane % 4) * 4;
	const uint32_t values = at + L::V + warpgroup * PANEL_BYTES;
	const uint64_t q = matrix_descriptor(at + R::QUERIES, 16),
	               plus = matrix_descriptor(at + R::PLUS, 16),
	               k = matrix_descriptor(at + R::KEYS, PANEL_BYTES),
	               scores = matrix_descriptor(at + R::SCORES, 16),
	               solved = matrix_descriptor(at + R::SOLVED, 16);
	uint32_t packed[DK / 4], moved[16];
	float y[32], o[32];

	barrier_wait(shared + L::FULL + stage.slot * 8, stage.parity);
#pragma unroll
	for (int i = 0; i < DK / 2; i += 4) {
		const float2 decay = shared_float2(decays + 2 * i * 4);

		packed[i / 2] = pack_bf16(s[i], s[i + 1]);
		packed[i / 2 + 1] = pack_bf16(s[i + 2], s[i + 3]);
		s[i] *= decay.x;
		s[i + 1] *= decay.y;
		s[i + 2] *= decay.x;
		s[i + 3] *= decay.y;
	}
	pin(packed);
	pin(s);
	pin(y);
	pin(o);
	wgmma_fence();
	issue_panels(y, packed, plus);
	wgmma_commit();
	issue_panels(o, packed, q);
	wgmma_commit();
	wgmma_wait<1>();
	pin(y);
#pragma unroll
	for (int j = 0; j < 4; j++)
		load_transposed_x4(transposed_block(values, 16 * j, 16 * warp, lane),
		                   &moved[4 * j]);
#pragma unroll
	for (int i = 0; i < 16; i++)
		moved[i] = pack_bf16(low_bf16(moved[i]) - y[2 * i],
		                     high_bf16(moved[i]) - y[2 * i + 1]);
	pin(moved);
	pin(y);
	wgmma_fence();
#pragma unroll
	for (int j = 0; j < RECORD / 16; j++)
		wgmma_rs_k_major(y, &moved[4 * j], solved + j * 32 / 16, j > 0);
	wgmma_commit();
	wgmma_wait<0>();
	pin(o);
	pin(packed);
	pin(y);
	pin(moved);
#pragma unroll
	for (int i = 0; i < 16; i++)
		moved[i] = pack_bf16(y[2 * i], y[2 * i + 1]);
	pin(moved);
	pin(o);
	pin(s);
	wgmma_fence();
#pragma unroll
	for (int j = 0; j < RECORD / 16; j++)
		wgmma_rs_k_major(o, &moved[4 * j], scores + j * 32 / 16, true);
	wgmma_commit();
#pragma unroll
	for (int j = 0; j < RECORD / 16; j++)
		wgmma_rs(s, &moved[4 * j], k + j * 2048 / 16, true);
	wgmma_commit();
	wgmma_wait<1>(); /* outputs leave while the state is updated */
	pin(o);
	store(x, chunk, o);
	wgmma_wait<0>();
	pin(s);
	pin(moved);
	warp_arrive(shared + L::EMPTY + stage.slot * 8);
	stage.advance();
}

template <int DK, int SLICES> __device__ __forceinline__ void kda_walk<DK, SLICES>::run()
{
#pragma unroll 1
	for (int number = blockIdx.x; number < p.walks; number += gridDim.x) {
		const walk_place x = locate_walk(p, number);

#pragma unroll
		for (float &element : s)
			element = 0.0f;
		if (p.h0)
			visit(const_cast<float *>(p.h0), x, false);
#pragma unroll 1
		for (int chunk = 0; chunk < p.chunks; chunk++)
			step(x, chunk);
		if (p.final_state)
			visit(p.final_state, x, true);
	}
	if (threadIdx.x % 128 == 0)
		store_wait_read();
}

template <int DK, int SLICES>
__global__ void __launch_bounds__(walk_layout<DK, SLICES>::THREADS, 1)
        walk_kernel(const __grid_constant__ kda_parameters p)
{
	using L = walk_layout<DK, SLICES>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0) {
		for (int i = 0; i < L::STAGES; i++) {
			barrier_init(shared + L::FULL + 8 * i, 1);
			barrier_init(shared + L::EMPTY + 8 * i, 4 * SLICES);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x < 128) {
		registers_decrease<24>();
		if (threadIdx.x == 0)
			produce<DK, SLICES>(p, shared);
	} else {
		if (SLICES == 2) /* of one there are 255 from the start */
			registers_increase<240>();
		kda_walk<DK, SLICES>{p, shared, static_cast<int>(threadIdx.x / 128) - 1,
		                     static_cast<int>(threadIdx.x / 32 % 4),
		                     static_cast<int>(threadIdx.x % 32)}
		        .run();
	}
}

/* ---- host */

int64_t chunks_of(const struct matrix_recurrence_args *a)
{
	return (a->seq_len + RECORD - 1) / RECORD;
}

enum status fill(kda_parameters &p, const struct matrix_recurrence_args *a, void *workspace)
{
	const auto encode = [&](CUtensorMap *map, const struct view *view, int64_t d) {
		return tensor_map_encode(map, view, a->batch, a->seq_len, a->n_heads, d, RECORD);
	};

	TRY(encode(&p.q, &a->q, a->d_k));
	TRY(encode(&p.k, &a->k, a->d_k));
	TRY(encode(&p.log_decay, &a->log_decay, a->d_k));
	TRY(encode(&p.v, &a->v, a->d_v));
	TRY(encode(&p.out, &a->out, a->d_v));
	p.beta = a->beta;
	p.seq_len = static_cast<int>(a->seq_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.chunks = static_cast<int>(chunks_of(a));
	p.d_k = static_cast<int>(a->d_k);
	p.d_v = static_cast<int>(a->d_v);
	p.records = static_cast<int>(a->batch) * p.n_heads * p.chunks;
	p.q_step = a->q.head ? 1 : 0;
	p.k_step = a->k.head ? 1 : 0;
	p.scale = a->scale;
	p.h0 = a->h0;
	p.final_state = a->final_state;
	p.prepared = static_cast<unsigned char *>(workspace);
	return STATUS_OK;
}

template <int DK, int SLICES> enum status run_walks(struct device *device, kda_parameters &p)
{
	p.slices = (p.d_v + 64 * SLICES - 1) / (64 * SLICES);
	p.walks = p.records / p.chunks * p.slices;
	return submit(device, walk_kernel<DK, SLICES>, turns(device, p.walks),
	              walk_layout<DK, SLICES>::THREADS, walk_layout<DK, SLICES>::BYTES, p);
}

template <int DK>
enum status run_kda(struct device *device, const struct matrix_recurrence_args *a, void *workspace)
{
	const int resident = prepare_layout::BLOCKS * cuda_sm_count(device);
	const int64_t walks = a->batch * a->n_heads * ((a->d_v + 127) / 128);
	kda_parameters p = {};

	TRY(fill(p, a, workspace));
	TRY(submit(device, prepare_kernel<DK>, p.records < resident ? p.records : resident, 128,
	           prepare_layout::BYTES, p));
	/* Two blocks for 128 channels of v where they are all in one wave. */
	return a->d_v <= 64 || 2 * walks <= cuda_sm_count(device) ? run_walks<DK, 1>(device, p)
	                                                          : run_walks<DK, 2>(device, p);
}

} // namespace

extern "C" const char *hopper_kda_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->rule != RULE_DELTA || a->decay != DECAY_DIAGONAL)
		return "only the delta rule with a diagonal decay";
	if (a->chunk && a->chunk != RECORD)
		return "chunk must be 64, or 0";
	if (a->d_k > 128)
		return "d_k must be at most 128";
	if (a->n_heads > 1 && (!a->v.head || !a->out.head || !a->log_decay.head))
		return "heads must not share v or their decays";
	if (a->batch * a->n_heads * chunks_of(a) > INT32_MAX / 2)
		return "more chunks than a grid has blocks";
	return check_views(device, &a->q, &a->k, &a->v, &a->out, &a->log_decay);
}

extern "C" size_t hopper_kda_workspace(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const int64_t records = a->batch * a->n_heads * chunks_of(a);

	return static_cast<size_t>(records) *
	       (a->d_k <= 64 ? kda_record<64>::BYTES : kda_record<128>::BYTES);
}

extern "C" enum status hopper_kda(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	return a->d_k <= 64 ? run_kda<64>(device, a, workspace)
	                    : run_kda<128>(device, a, workspace);
}
