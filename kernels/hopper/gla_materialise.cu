/*
 * Gated linear attention with the states before the chunks in memory, for chunks of any number of
 * records (64 tokens, gla.cuh) up to the whole sequence, which is the parallel form. Four kernels:
 *
 *   prepare  every record by itself (gla_prepare.cu)
 *   between  the scores of a record's queries with the keys of the chunk's earlier records. The
 *            keys are decayed to their record's end; from there on the queries are decayed,
 *            by one record more at a time, so that all exponents are <= 0. At last the queries as
 *            decayed from the chunk's start replace those of the record
 *   states   S before every chunk (gla.cu)
 *   outputs  nothing but products, of all chunks in parallel: o^T = S^T q^T + sum over the chunk's
 *            records of v^T scores^T
 *
 * Shared memory: `between` has a record's queries, a ring of two of keys, scores; `outputs` a ring
 * of left and right panels, filled by a producer thread for one or two warpgroups.
 *
 * Limit: memory for short chunks (the states), scores for long ones. 3.25 ms for chunks of 256 at
 * 4 heads x 256/512, T = 4096; gla.cu's of 64 on the chip take 1.87.
 * docs/kernels/gla_materialise.md.
 * wgmma in: between_kernel, output_kernel
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/gla.cuh"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

/* How a sequence is cut, and what is kept of it. */
struct cut {
	int sequences, records, chunks, per_chunk; /* records and chunks of a sequence */
	int64_t pairs;                             /* of records of a chunk */
	bool from_zero;                            /* the state before the first chunk is zero */
	unsigned char *prepared;
	unsigned char *states; /* [sequences, chunks, d_v / 64, d_k / 64] panels */
	unsigned char *scores; /* [sequences, chunks, pairs] panels [query, key] */
	unsigned char *rest;   /* for the states' kernel */
	size_t bytes;
};

cut make_cut(const struct device *device, const struct matrix_recurrence_args *a, void *workspace)
{
	const int64_t length = !a->chunk ? RECORD : a->chunk > a->seq_len ? a->seq_len : a->chunk;
	const auto panels = [](int64_t count) { return static_cast<size_t>(count) * PANEL_BYTES; };
	cut c;

	c.sequences = static_cast<int>(a->batch * a->n_heads);
	c.records = static_cast<int>((a->seq_len + RECORD - 1) / RECORD);
	c.per_chunk = static_cast<int>((length + RECORD - 1) / RECORD);
	c.chunks = (c.records + c.per_chunk - 1) / c.per_chunk;
	c.pairs = static_cast<int64_t>(c.per_chunk) * (c.per_chunk - 1) / 2;
	c.from_zero = !a->h0;
	const int64_t chunks = static_cast<int64_t>(c.sequences) * c.chunks;
	const size_t prepared = static_cast<size_t>(c.sequences) * static_cast<size_t>(c.records) *
	                        record_bytes(static_cast<int>(a->d_k), 1);
	const size_t states = panels(chunks * (a->d_v / 64) * (a->d_k / 64));
	const size_t scores = panels(chunks * c.pairs);
	c.prepared = static_cast<unsigned char *>(workspace);
	c.states = c.prepared + prepared;
	c.scores = c.states + states;
	c.rest = c.scores + scores;
	c.bytes = prepared + states + scores + gla_states_workspace(device, a);
	return c;
}

/* Panel number of the scores of a chunk's record i with its record j < i. */
__device__ __forceinline__ int64_t pair_number(const cut &c, int64_t chunk, int i, int j)
{
	return chunk * c.pairs + static_cast<int64_t>(i) * (i - 1) / 2 + j;
}

/* ---- between */

template <int DK> struct between_layout {
	using R = record<DK>;
	static constexpr int QUERIES = 0, SCORES = DK / 64 * PANEL_BYTES;
	static constexpr int KEYS = SCORES + PANEL_BYTES; /* a ring of keys and decays */
	static constexpr int KEYS_BYTES = R::BYTES - R::KEYS;
	static constexpr int STAGE_BYTES = (KEYS_BYTES + 1023) / 1024 * 1024, STAGES = 2;
	static constexpr int FACTORS = KEYS + STAGES * STAGE_BYTES;      /* fp32 [d_k] */
	static constexpr int BARRIERS = FACTORS + DK * 4;                /* queries, keys */
	static constexpr int BYTES = BARRIERS + (1 + STAGES) * 8 + 1024; /* 1024: room to align */
};

/* 64 channels of a warp's 16 queries, as a left operand, times their factors. */
__device__ __forceinline__ void decay_queries(uint32_t (&left)[16], const uint32_t *q,
                                              uint32_t factors, int lane)
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float2 f = shared_float2(factors + (8 * i + 2 * (lane % 4)) * 4);

#pragma unroll
		for (int row = 0; row < 2; row++) {
			const uint32_t pair = q[2 * i + row];

			left[2 * i + row] = pack_bf16(f.x * low_bf16(pair), f.y * high_bf16(pair));
		}
	}
}

template <int DK>
__global__ void __launch_bounds__(128, 2) between_kernel(const __grid_constant__ cut c)
{
	using layout = between_layout<DK>;
	using R = record<DK>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const bool leader = threadIdx.x == 0;
	const int64_t chunk = blockIdx.x / (c.per_chunk - 1);
	const int number = static_cast<int>(blockIdx.x % (c.per_chunk - 1)) + 1; /* in its chunk */
	const int in_sequence = static_cast<int>(chunk % c.chunks) * c.per_chunk + number;
	unsigned char *own = c.prepared + (chunk / c.chunks * c.records + in_sequence) *
	                                          static_cast<int64_t>(R::BYTES);
	const uint32_t staging = shared + layout::SCORES, factors = shared + layout::FACTORS;
	uint32_t q[DK / 4], left[2][16];
	float s[32];
	/* Keys of the record `back` before this one. */
	const auto load_keys = [&](int back) {
		const int stage = (back - 1) % layout::STAGES;
		const uint32_t full = shared + layout::BARRIERS + 8 * (1 + stage);

		barrier_arrive_expect(full, layout::KEYS_BYTES);
		bulk_load(shared + layout::KEYS + stage * layout::STAGE_BYTES,
		          own - back * static_cast<int64_t>(R::BYTES) + R::KEYS, layout::KEYS_BYTES,
		          full);
	};

	if (in_sequence >= c.records)
		return;
	if (leader) {
		for (int i = 0; i < 1 + layout::STAGES; i++)
			barrier_init(shared + layout::BARRIERS + 8 * i, 1);
		barrier_init_fence();
		barrier_arrive_expect(shared + layout::BARRIERS, DK / 64 * PANEL_BYTES);
		bulk_load(shared + layout::QUERIES, own + R::QUERIES, DK / 64 * PANEL_BYTES,
		          shared + layout::BARRIERS);
		load_keys(1);
	}
	for (int i = threadIdx.x; i < DK; i += 128)
		shared_store1(factors + 4 * i, 1.0f);
	__syncthreads();
	barrier_wait(shared + layout::BARRIERS, 0);
#pragma unroll
	for (int i = 0; i < DK / 16; i++)
		load_matrix_x4(plain_block(shared + layout::QUERIES + i / 4 * PANEL_BYTES,
		                           16 * warp, 16 * (i % 4), lane),
		               q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
#pragma unroll 1
	for (int back = 1; back <= number; back++) {
		const int stage = (back - 1) % layout::STAGES;
		const uint32_t keys = shared + layout::KEYS + stage * layout::STAGE_BYTES;
		const uint64_t right = matrix_descriptor(keys, 16);

		/* The factors are as of this record; the other stage and the staging are free. */
		if (leader) {
			store_wait_read();
			if (back < number)
				load_keys(back + 1);
		}
		barrier_wait(shared + layout::BARRIERS + 8 * (1 + stage),
		             (back - 1) / layout::STAGES % 2);
#pragma unroll
		for (int panel = 0; panel < DK / 64; panel++) {
			if (panel >= 2) {
				wgmma_wait<1>();
				pin(left[panel % 2]);
			}
			decay_queries(left[panel % 2], &q[16 * panel], factors + panel * 256, lane);
			pin(left[panel % 2]);
			wgmma_fence();
#pragma unroll
			for (int step = 0; step < 4; step++)
				wgmma_rs_k_major(s, &left[panel % 2][4 * step],
				                 right + (panel * PANEL_BYTES + step * 32) / 16,
				                 panel + step > 0);
			wgmma_commit();
		}
		wgmma_wait<0>();
		pin(s);
		pin(left[0]);
		pin(left[1]);
		__syncthreads(); /* all have read the factors, and the staging is free */
#pragma unroll
		for (int i = 0; i < 4; i++)
			store_block(plain_block(staging, 16 * warp, 16 * i, lane), &s[8 * i]);
		for (int i = threadIdx.x; i < DK; i += 128) {
			const float decay = shared_float(keys + R::DECAYS - R::KEYS + 4 * i);

			shared_store1(factors + 4 * i, decay * shared_float(factors + 4 * i));
		}
		fence_async_proxy();
		__syncthreads();
		if (leader) {
			bulk_store(c.scores + pair_number(c, chunk, number, number - back) *
			                              PANEL_BYTES,
			           staging, PANEL_BYTES);
			store_commit();
		}
	}
	if (!c.from_zero || chunk % c.chunks > 0) {
#pragma unroll
		for (int panel = 0; panel < DK / 64; panel++) {
			const uint32_t at = shared + layout::QUERIES + panel * PANEL_BYTES;

			decay_queries(left[0], &q[16 * panel], factors + panel * 256, lane);
#pragma unroll
			for (int i = 0; i < 4; i++)
				store_matrix_x4(plain_block(at, 16 * warp, 16 * i, lane),
				                left[0][4 * i], left[0][4 * i + 1],
				                left[0][4 * i + 2], left[0][4 * i + 3]);
		}
		fence_async_proxy();
		__syncthreads();
		if (leader) {
			bulk_store(own + R::QUERIES, shared + layout::QUERIES,
			           DK / 64 * PANEL_BYTES);
			store_commit();
		}
	}
	if (leader)
		store_wait_read();
}

/* ---- outputs */

struct output_parameters : cut {
	CUtensorMap v, out;
	int n_heads, key_panels, slices, rows; /* rows: groups of records of a chunk */
	int items;
	int64_t record_bytes;
	int own_scores; /* their place in a record */
};

/* A warpgroup takes WIDTH times 64 columns of v, the block RECORDS records of a chunk. */
template <int WARPGROUPS, int WIDTH, int RECORDS> struct output_layout {
	static constexpr int LEFT = WARPGROUPS * WIDTH; /* panels of a stage; then the records' */
	static constexpr int STAGE_BYTES = (LEFT + RECORDS) * PANEL_BYTES;
	static constexpr int STAGES = LEFT + RECORDS > 4 ? 4 : 5;
	static constexpr int OUT = STAGES * STAGE_BYTES;
	static constexpr int BARRIERS = OUT + WARPGROUPS * PANEL_BYTES; /* full, empty */
	static constexpr int BYTES = BARRIERS + STAGES * 16 + 1024;     /* 1024: room to align */
};

/* What a block computes at a time: some columns of v of up to RECORDS records of a chunk. */
struct output_item {
	int64_t chunk; /* of all */
	int sequence;
	int slice, first; /* record of the chunk */
	int count;        /* records; 0: past the end */
	int record;       /* the chunk's first, of its sequence */
	bool has_state;
};

template <int RECORDS>
__device__ __forceinline__ output_item locate(const output_parameters &p, int number)
{
	output_item x;

	x.slice = number % p.slices;
	number /= p.slices;
	x.first = (p.rows - 1 - number % p.rows) * RECORDS; /* the longest first */
	x.chunk = number / p.rows;
	x.sequence = static_cast<int>(x.chunk / p.chunks);
	const int chunk = static_cast<int>(x.chunk % p.chunks);
	x.record = chunk * p.per_chunk;
	x.count = min(min(p.per_chunk, p.records - x.record) - x.first, RECORDS);
	x.has_state = chunk > 0 || !p.from_zero;
	return x;
}

template <int WARPGROUPS, int WIDTH, int RECORDS>
__device__ __forceinline__ void produce(const output_parameters &p, uint32_t shared)
{
	using layout = output_layout<WARPGROUPS, WIDTH, RECORDS>;
	constexpr int LEFT = layout::LEFT;
	slot_ring<layout::STAGES> r;

#pragma unroll 1
	for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
		const output_item x = locate<RECORDS>(p, number);
		const int b = x.sequence / p.n_heads, h = x.sequence % p.n_heads;
		const int steps = x.has_state ? p.key_panels : 0;
		const unsigned char *records =
		        p.prepared +
		        (static_cast<int64_t>(x.sequence) * p.records + x.record) * p.record_bytes;

		/* The state's panels, then the chunk's records. */
#pragma unroll 1
		for (int i = -steps; x.count > 0 && i < x.first + x.count; i++) {
			const int skipped = max(i - x.first, 0); /* earlier queries */
			const uint32_t full = shared + layout::BARRIERS + r.slot * 8;
			const uint32_t empty = full + layout::STAGES * 8;
			const uint32_t stage = shared + r.slot * layout::STAGE_BYTES;

			barrier_wait(empty, r.parity ^ 1);
			barrier_arrive_expect(full, (LEFT + x.count - skipped) * PANEL_BYTES);
#pragma unroll
			for (int w = 0; w < LEFT; w++) {
				const int panel = x.slice * LEFT + w;

				if (i < 0)
					bulk_load(stage + w * PANEL_BYTES,
					          p.states + ((x.chunk * p.slices * LEFT + panel) *
					                              p.key_panels +
					                      i + steps) *
					                             PANEL_BYTES,
					          PANEL_BYTES, full);
				else
					tensor_load(stage + w * PANEL_BYTES, &p.v, full, panel * 64,
					            (x.record + i) * RECORD, h, b);
			}
			for (int j = skipped; j < x.count; j++) {
				const unsigned char *own = records + (x.first + j) * p.record_bytes;
				const unsigned char *from =
				        i < 0 ? own + (i + steps) * PANEL_BYTES
				        : i == x.first + j
				                ? own + p.own_scores
				                : p.scores +
				                          pair_number(p, x.chunk, x.first + j, i) *
				                                  PANEL_BYTES;

				bulk_load(stage + (LEFT + j) * PANEL_BYTES, from, PANEL_BYTES,
				          full);
			}
			r.advance();
		}
	}
}

/*
 * o^T += left right^T of a stage: 64 columns of v per left panel, a record from FIRST on per right
 * panel. STATE: left is S^T, else v, transposed on the way.
 */
template <bool STATE, int FIRST, int WIDTH, int RECORDS>
__device__ __forceinline__ void multiply(float (&o)[WIDTH][RECORDS][32], uint32_t left,
                                         uint32_t right)
{
	const auto pin_all = [&] {
#pragma unroll
		for (int i = 0; i < WIDTH * RECORDS; i++)
			pin(o[i / RECORDS][i % RECORDS]);
	};

	pin_all();
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < 4; step++)
#pragma unroll
		for (int w = 0; w < WIDTH; w++)
#pragma unroll
			for (int j = FIRST; j < RECORDS; j++) {
				const uint32_t a = left + w * PANEL_BYTES;
				const uint64_t b = matrix_descriptor(right + j * PANEL_BYTES, 16) +
				                   step * 32 / 16;

				if (STATE)
					wgmma_ss(o[w][j], matrix_descriptor(a, 16) + step * 32 / 16,
					         b, true);
				else
					wgmma_ss_transposed(o[w][j],
					                    matrix_descriptor(a, PANEL_BYTES) +
					                            step * 2048 / 16,
					                    b, true);
			}
	wgmma_commit();
	wgmma_wait<0>();
	pin_all();
}

template <int WARPGROUPS, int WIDTH, int RECORDS>
__device__ __forceinline__ void consume(const output_parameters &p, uint32_t shared)
{
	using layout = output_layout<WARPGROUPS, WIDTH, RECORDS>;
	const int warpgroup = WARPGROUPS == 1 ? 0 : threadIdx.x / 128 - 1;
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const uint32_t staging = shared + layout::OUT + warpgroup * PANEL_BYTES;
	slot_ring<layout::STAGES> r;
	float o[WIDTH][RECORDS][32];
	/* The stage's panels, once they are there; they are given back. */
	const auto left = [&] {
		barrier_wait(shared + layout::BARRIERS + r.slot * 8, r.parity);
		return shared + r.slot * layout::STAGE_BYTES + warpgroup * WIDTH * PANEL_BYTES;
	};
	const auto right = [&] {
		return shared + r.slot * layout::STAGE_BYTES + layout::LEFT * PANEL_BYTES;
	};
	const auto release = [&] {
		if (lane == 0)
			barrier_arrive(shared + layout::BARRIERS + (layout::STAGES + r.slot) * 8);
		r.advance();
	};

#pragma unroll 1
	for (int number = blockIdx.x; number < p.items; number += gridDim.x) {
		const output_item x = locate<RECORDS>(p, number);
		const int steps = x.has_state ? p.key_panels : 0;

		if (x.count <= 0)
			continue;
#pragma unroll
		for (int i = 0; i < WIDTH * RECORDS * 32; i++)
			o[i / 32 / RECORDS][i / 32 % RECORDS][i % 32] = 0.0f;
#pragma unroll 1
		for (int i = 0; i < steps; i++) {
			multiply<true, 0>(o, left(), right());
			release();
		}
#pragma unroll 1
		for (int i = 0; i <= x.first; i++) {
			multiply<false, 0>(o, left(), right());
			release();
		}
		if (RECORDS == 2 && x.count == 2) { /* the second with itself */
			multiply<false, RECORDS - 1>(o, left(), right());
			release();
		}
#pragma unroll
		for (int j = 0; j < RECORDS; j++) {
			if (j >= x.count)
				break;
#pragma unroll
			for (int w = 0; w < WIDTH; w++) {
				begin_output(warp, lane, 1 + warpgroup);
				stage_output(o[w][j], staging, 0, warp, lane);
				end_output(&p.out, staging, warp, lane, 1 + warpgroup,
				           ((x.slice * WARPGROUPS + warpgroup) * WIDTH + w) * 64,
				           (x.record + x.first + j) * RECORD,
				           x.sequence % p.n_heads, x.sequence / p.n_heads);
			}
		}
	}
	if (warp == 0 && lane == 0)
		store_wait_read();
}

template <int WARPGROUPS, int WIDTH, int RECORDS>
__global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
        output_kernel(const __grid_constant__ output_parameters p)
{
	using layout = output_layout<WARPGROUPS, WIDTH, RECORDS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0) {
		for (int i = 0; i < layout::STAGES; i++) {
			barrier_init(shared + layout::BARRIERS + i * 8, 1);
			barrier_init(shared + layout::BARRIERS + (layout::STAGES + i) * 8,
			             4 * WARPGROUPS);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x < 128) {
		if (WARPGROUPS == 2)
			registers_decrease<40>();
		if (threadIdx.x == 0)
			produce<WARPGROUPS, WIDTH, RECORDS>(p, shared);
	} else {
		if (WARPGROUPS == 2)
			registers_increase<232>();
		consume<WARPGROUPS, WIDTH, RECORDS>(p, shared);
	}
}

/* ---- host */

template <int DK> enum status launch_between(struct device *device, const cut &c)
{
	const int64_t blocks = static_cast<int64_t>(c.sequences) * c.chunks * (c.per_chunk - 1);

	return submit(device, between_kernel<DK>, blocks, 128, between_layout<DK>::BYTES, c);
}

template <int WARPGROUPS, int WIDTH, int RECORDS>
enum status launch_outputs(struct device *device, output_parameters &p, int64_t d_v)
{
	p.slices = static_cast<int>(d_v / (64 * WARPGROUPS * WIDTH));
	p.rows = (p.per_chunk + RECORDS - 1) / RECORDS;
	p.items = p.sequences * p.chunks * p.rows * p.slices;
	return submit(device, output_kernel<WARPGROUPS, WIDTH, RECORDS>, turns(device, p.items),
	              128 * (WARPGROUPS + 1), output_layout<WARPGROUPS, WIDTH, RECORDS>::BYTES, p);
}

enum status outputs(struct device *device, const struct matrix_recurrence_args *a, const cut &c)
{
	output_parameters p = {};
	enum status status = gla_encode_values(&p.v, &p.out, a);

	if (status != STATUS_OK)
		return status;
	static_cast<cut &>(p) = c;
	p.n_heads = static_cast<int>(a->n_heads);
	p.key_panels = static_cast<int>(a->d_k / 64);
	p.record_bytes = static_cast<int64_t>(record_bytes(static_cast<int>(a->d_k), 1));
	p.own_scores = p.key_panels * PANEL_BYTES;
	if (c.per_chunk == 1)
		return a->d_v == 64    ? launch_outputs<1, 1, 1>(device, p, a->d_v)
		       : a->d_v == 128 ? launch_outputs<2, 1, 1>(device, p, a->d_v)
		                       : launch_outputs<2, 2, 1>(device, p, a->d_v);
	return a->d_v == 64    ? launch_outputs<1, 1, 2>(device, p, a->d_v)
	       : a->d_v == 128 ? launch_outputs<2, 1, 2>(device, p, a->d_v)
	                       : launch_outputs<2, 2, 2>(device, p, a->d_v);
}

} // namespace

extern "C" const char *hopper_gla_materialise_unsupported(const struct device *device,
                                                          const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	const char *why = gla_unsupported(device, a);

	if (!why && a->chunk % RECORD && a->chunk < a->seq_len)
		why = "chunk must be 16, 32, a multiple of 64, or T";
	return why;
}

extern "C" size_t hopper_gla_materialise_workspace(const struct device *device, const void *args)
{
	return make_cut(device, static_cast<const struct matrix_recurrence_args *>(args), NULL)
	        .bytes;
}

extern "C" enum status hopper_gla_materialise(struct device *device, const void *args,
                                              void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const cut c = make_cut(device, a, workspace);
	enum status status = gla_prepare(device, a, 1, c.prepared);

	if (status == STATUS_OK && c.per_chunk > 1)
		status = a->d_k == 64    ? launch_between<64>(device, c)
		         : a->d_k == 128 ? launch_between<128>(device, c)
		                         : launch_between<256>(device, c);
	if (status == STATUS_OK && (c.chunks > 1 || a->h0 || a->final_state))
		status = gla_states(device, a, c.prepared, c.per_chunk, c.states, c.rest);
	return status == STATUS_OK ? outputs(device, a, c) : status;
}
