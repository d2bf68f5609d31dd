/*
 * Gradients of attention for sm_90a: d = 64 or 128, bf16 in and out, fp32 sums. Three kernels:
 *   prepare    takes the gate from the gradient of the output, forms delta and all gradients that
 *              need one query alone, pads the queries' statistics to whole tiles
 *   backward   persistent: 128 keys and one head that reads them at a time, whose dK and dV it
 *              holds, and the queries that see them in tiles of 64 (d = 64: 128)
 *   finish     turns the sums of dQ into bf16, and those of dK and dV where heads share keys
 * Roles in the second:
 *   warp 0      ticket -> 128 keys of a head; TMA: keys, queries
 *   warp 1 + w  sends what consumer warpgroup w leaves: its half of a tile of dQ, to be added in
 *               memory; at the end dK and dV, to be added too where heads share keys
 *   warp 3      TMA: values, gradients of outputs
 *   consumer    64 keys, scores transposed (a row is a key): P and dS are the register operands of
 *               dV += P^T dO, dK += dS^T Q. Both warpgroups' dS meet in shared memory for
 *               dQ = dS K, of which each forms a 64 x 64 block, a tile late, so that none waits
 * Shared memory: two places of keys, one of values, two of queries, gradients of outputs, dS (at
 * the end dK) and statistics; of each warpgroup dQ (at the end dV).
 * Products of a step, each beside what needs no tensor cores: dP = V dO^T beside the powers of the
 * scores; dV beside dS; dK, dQ of the tile before and S of the next while that dQ leaves. While
 * products read their operands an ordinary access of shared memory takes 200 cycles. So statistics
 * are fetched ahead, a fence comes after the product that needs nothing of what it publishes,
 * and part of the keys stay in registers.
 * dQ is summed in the order in which blocks come by: its last bits differ from run to run, unless
 * the device is to be deterministic. Then blocks add in the order of tickets, which begin at the
 * last keys: a block comes to a tile two steps after the one before it anyway.
 * Limit: shared memory. A step of 64 queries, d = 128, reads and writes 377 KB there, 92% of the
 * cycles that it takes (80% are the tensor cores'). docs/kernels/attention_backward.md.
 * may spill: attention_backward_kernel (the producer, once a unit)
 * wgmma in: attention_backward_kernel
 */
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"
#include "kernels/hopper/schedule.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int KEYS = 128, STAGES = 2, WARPGROUPS = 2;
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS, THREADS = 128 * (WARPGROUPS + 1);
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int BOTH_BARRIER = 1;     /* named: the two consumer warpgroups */
constexpr uint32_t NEXT = -1u;      /* so many steps back */
constexpr int ROW_BYTES = 128;      /* of a panel */
constexpr int SUM_FLOATS = 64 * 64; /* of what a warpgroup adds in memory at a time */
constexpr int PREPARED_ROWS = 64;   /* queries of a block of the first kernel */

/* Queries of a tile. */
template <int D> constexpr int QUERIES = D == 64 ? 128 : 64;

/* Of the D / 16 steps of the scores' product those whose keys a consumer holds in registers, and
 * of the N / 8 pieces of a tile's lse those that it fetches ahead: as many as fit. */
template <int D> constexpr int HELD = D == 64 ? 2 : 4;
template <int D> constexpr int LSE_AHEAD = D == 64 ? 6 : 4;

struct parameters {
	CUtensorMap q, k, v, dout, dk, dv;
	int seq_len, n_heads, q_heads, kv_heads, pairs; /* pairs: batch * n_heads */
	int sharing;                                    /* heads that read a head of keys */
	int sharers;                                    /* heads of the same queries */
	int seen_keys;                                  /* no query sees the keys after these */
	int window, chunk;
	enum mask mask;
	float scale, scale_log2; /* scale * log2(e) */
	int padded_len;          /* queries in whole tiles */
	const float *lse,
	        *delta; /* [pairs][padded_len], statistic_place of each 64; lse in base 2 */
	float *dq;      /* [batch * q_heads][tiles][WARPGROUPS][SUM_FLOATS], as accumulators lie */
	/* [batch * kv_heads][key_tiles][WARPGROUPS][D / 64][SUM_FLOATS] where heads share keys */
	float *dk_sums, *dv_sums;
	/* How often each of a warpgroup's sums in dq, and in dk_sums, has been added to, in order.
	 */
	int *dq_turns, *dk_turns;
	int key_tiles;
	int heads_per_group; /* pairs that share L2 */
	int *ticket;
};

/* mbarriers, 8 bytes each. */
enum {
	BAR_K_FULL,
	BAR_K_EMPTY = BAR_K_FULL + STAGES,
	BAR_V_FULL = BAR_K_EMPTY + STAGES,
	BAR_V_EMPTY,
	BAR_Q_FULL,                        /* queries and lse */
	BAR_DO_FULL = BAR_Q_FULL + STAGES, /* gradients of outputs and delta */
	BAR_ROWS_EMPTY = BAR_DO_FULL + STAGES,
	BAR_DS_FULL = BAR_ROWS_EMPTY + STAGES, /* of both warpgroups */
	BAR_DS_EMPTY = BAR_DS_FULL + STAGES,
	BAR_UNIT_FULL = BAR_DS_EMPTY + STAGES,
	BAR_UNIT_EMPTY = BAR_UNIT_FULL + SCHEDULE_SLOTS,
	BAR_OUT_FULL = BAR_UNIT_EMPTY + SCHEDULE_SLOTS, /* of a warpgroup: something may leave */
	BAR_OUT_EMPTY = BAR_OUT_FULL + WARPGROUPS,
	BAR_DK_LEFT = BAR_OUT_EMPTY + WARPGROUPS, /* dK of both has left the place of dS */
	BAR_COUNT
};

template <int D> struct shared_layout {
	static constexpr int KEYS_BYTES = KEYS * D * 2;
	static constexpr int ROWS_BYTES = QUERIES<D> * D * 2;
	static constexpr int DS_PANEL = KEYS * ROW_BYTES; /* 64 queries */
	static constexpr int DS_BYTES = QUERIES<D> / 64 * DS_PANEL;
	static constexpr int STATISTICS_BYTES = QUERIES<D> * 4;
	static constexpr int K = 0;
	static constexpr int V = K + STAGES * KEYS_BYTES;
	static constexpr int Q = V + KEYS_BYTES;
	static constexpr int DO = Q + STAGES * ROWS_BYTES;
	static constexpr int DS = DO + STAGES * ROWS_BYTES; /* [key][query]; at the end dK */
	static constexpr int OUT = DS + STAGES * DS_BYTES;  /* dQ; at the end dV */
	static constexpr int OUT_BYTES = SUM_FLOATS * 4;    /* of a warpgroup */
	static constexpr int LSE = OUT + WARPGROUPS * OUT_BYTES;
	static constexpr int DELTA = LSE + STAGES * STATISTICS_BYTES;
	static constexpr int UNITS = DELTA + STAGES * STATISTICS_BYTES;
	static constexpr int BARRIERS = UNITS + 8 * SCHEDULE_SLOTS;
	static constexpr int BYTES = BARRIERS + 8 * BAR_COUNT + 1024; /* to align the base */
};

static_assert(shared_layout<64>::BYTES <= 227 * 1024 && shared_layout<128>::BYTES <= 227 * 1024);

/* What one ticket stands for: tile n of the keys, for one sequence and head; n < 0: no more. */
struct unit {
	static constexpr int BYTES = 8; /* in shared memory */

	int n, pair;

	__device__ void store(uint32_t shared) const
	{
		shared_store(shared, n);
		shared_store(shared + 4, pair);
	}

	__device__ void load(uint32_t shared)
	{
		n = shared_load(shared);
		pair = shared_load(shared + 4);
	}

	__device__ bool is_work() const
	{
		return n >= 0;
	}
};

/* Tiles of queries, from first to end - 1. */
struct span {
	int first, end;
};

/* First and last query that sees a key; none: last < first. */
__device__ __forceinline__ int first_query(const parameters &p, int key)
{
	if (key >= p.seen_keys)
		return INT_MAX;
	if (p.mask == MASK_CHUNK)
		return (key + 1) * p.chunk;
	return p.mask == MASK_FULL ? 0 : key;
}

__device__ __forceinline__ int last_query(const parameters &p, int key)
{
	if (key >= p.seen_keys)
		return -1;
	return p.mask == MASK_WINDOW ? key + p.window : INT_MAX;
}

template <int D> __device__ __forceinline__ span query_tiles(const parameters &p, int n)
{
	const int first = first_query(p, n * KEYS);
	const int last = min(last_query(p, min(n * KEYS + KEYS, p.seen_keys) - 1), p.seq_len - 1);

	if (first > last)
		return {0, 0};
	return {first / QUERIES<D>, last / QUERIES<D> + 1};
}

/* The last tile of keys that tile m of the queries sees anything of. */
template <int D> __device__ __forceinline__ int last_key_tile(const parameters &p, int m)
{
	const int query = min(m * QUERIES<D> + QUERIES<D>, p.seq_len) - 1;
	int key = p.seen_keys - 1;

	if (p.mask == MASK_CHUNK)
		key = min(key, query / p.chunk - 1);
	else if (p.mask != MASK_FULL)
		key = min(key, query);
	return key / KEYS;
}

/* The longest first, or in order the last keys first. */
template <bool ordered> __device__ __forceinline__ unit locate(const parameters &p, int number)
{
	const int group = number / (p.heads_per_group * p.key_tiles);
	const int first_pair = group * p.heads_per_group;
	const int in_group = min(p.heads_per_group, p.pairs - first_pair);
	const int within = number - first_pair * p.key_tiles;
	const int n = within / in_group;

	return {ordered ? p.key_tiles - 1 - n : n, first_pair + within % in_group};
}

template <int D>
using schedule =
        unit_queue<unit, slot_ring<SCHEDULE_SLOTS>, shared_layout<D>::BARRIERS + BAR_UNIT_FULL * 8,
                   shared_layout<D>::UNITS>;

/* The sequence of a unit, its head, and the head of its keys. */
struct heads {
	int b, h, kv;
};

template <bool shared_keys>
__device__ __forceinline__ heads heads_of(const parameters &p, const unit &u)
{
	const int b = u.pair / p.n_heads, h = u.pair - b * p.n_heads;

	return {b, h, shared_keys ? h / p.sharing : h};
}

/* Loads tiles of rows with a statistic of each: queries, or gradients of outputs. */
template <int D> struct row_loader {
	using layout = shared_layout<D>;

	uint32_t shared, tiles, statistics, full; /* places, and the barriers of either kind */
	turn_ring<STAGES> at;

	__device__ void load(const CUtensorMap *map, const float *statistic, int m, int h, int b)
	{
		const uint32_t slot = at.slot(), barrier = full + slot * 8;

		barrier_wait(shared + layout::BARRIERS + (BAR_ROWS_EMPTY + slot) * 8,
		             at.parity() ^ 1);
		barrier_arrive_expect(barrier, layout::ROWS_BYTES + layout::STATISTICS_BYTES);
		load_panels<D, QUERIES<D>>(tiles + slot * layout::ROWS_BYTES, barrier, map,
		                           m * QUERIES<D>, h, b);
		bulk_load(statistics + slot * layout::STATISTICS_BYTES, statistic,
		          layout::STATISTICS_BYTES, barrier);
		at.advance();
	}
};

/* Where the statistics of tile m of a head begin. */
template <int D>
__device__ __forceinline__ int64_t statistics_of(const parameters &p, const heads &x, int m)
{
	return (static_cast<int64_t>(x.b) * p.n_heads + x.h) * p.padded_len + m * QUERIES<D>;
}

/* Warp 0, a thread: tickets, keys and queries. */
template <int D, bool shared_keys, bool ordered> struct query_producer {
	using layout = shared_layout<D>;

	const parameters &p;
	uint32_t shared;
	turn_ring<STAGES> k;

	__device__ void load_keys(int n, int b, int h)
	{
		const uint32_t barriers = shared + layout::BARRIERS + k.slot() * 8;

		barrier_wait(barriers + BAR_K_EMPTY * 8, k.parity() ^ 1);
		barrier_arrive_expect(barriers + BAR_K_FULL * 8, layout::KEYS_BYTES);
		load_panels<D, KEYS>(shared + layout::K + k.slot() * layout::KEYS_BYTES,
		                     barriers + BAR_K_FULL * 8, &p.k, n * KEYS, h, b);
		k.advance();
	}

	__device__ void run()
	{
		const int n_units = p.key_tiles * p.pairs;
		schedule<D> units = {shared};
		row_loader<D> rows = {shared, shared + layout::Q, shared + layout::LSE,
		                      shared + layout::BARRIERS + BAR_Q_FULL * 8};
		unit u = locate<ordered>(p, blockIdx.x);

		units.put(u);
		while (u.n >= 0) {
			const span m = query_tiles<D>(p, u.n);
			const heads x = heads_of<shared_keys>(p, u);
			const auto load = [&](int first, int end) {
				const float *lse = p.lse + statistics_of<D>(p, x, first);

#pragma unroll 1
				for (int i = first; i < end; i++) {
					rows.load(&p.q, lse, i, x.h % p.q_heads, x.b);
					lse += QUERIES<D>;
				}
			};
			const auto draw = [&] {
				const int number = gridDim.x + atomicAdd(p.ticket, 1);

				u = {-1, 0};
				if (number < n_units)
					u = locate<ordered>(p, number);
				units.put(u);
			};

			if (m.first < m.end)
				load_keys(u.n, x.b, x.kv);
			/* In order others may wait for the next unit: nobody holds it back. */
			if constexpr (ordered) {
				load(m.first, m.end);
				draw();
			} else {
				load(m.first, min(m.first + 1, m.end));
				draw();
				load(m.first + 1, m.end);
			}
		}
	}
};

/* The last warp of the producers, a thread: values and gradients of outputs. */
template <int D, bool shared_keys> struct gradient_producer {
	using layout = shared_layout<D>;

	const parameters &p;
	uint32_t shared;
	uint32_t v_parity;
	row_loader<D> rows;

	__device__ void run(const unit &u)
	{
		const span m = query_tiles<D>(p, u.n);
		const heads x = heads_of<shared_keys>(p, u);
		const float *delta = p.delta + statistics_of<D>(p, x, m.first);
		const uint32_t full = shared + layout::BARRIERS + BAR_V_FULL * 8;

		if (m.first == m.end)
			return;
		barrier_wait(shared + layout::BARRIERS + BAR_V_EMPTY * 8, v_parity ^ 1);
		v_parity ^= 1;
		barrier_arrive_expect(full, layout::KEYS_BYTES);
		load_panels<D, KEYS>(shared + layout::V, full, &p.v, u.n * KEYS, x.kv, x.b);
#pragma unroll 1
		for (int i = m.first; i < m.end; i++) {
			rows.load(&p.dout, delta, i, x.h, x.b);
			delta += QUERIES<D>;
		}
	}
};

/* Waits until a sum has been added to so often. */
__device__ __forceinline__ void await_turn(const int *turn, int mine)
{
	int now;

	do
		asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
		             : "=r"(now)
		             : "l"(turn)
		             : "memory");
	while (now != mine);
	asm volatile("fence.proxy.async;" ::: "memory");
}

/* What this thread has added to a sum, `pending` additions since aside, is there: the next may. */
template <int pending> __device__ __forceinline__ void pass_turn(int *turn)
{
	asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
	asm volatile("fence.proxy.async;" ::: "memory");
	asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

/* Warp 1 + w, a thread: sends off what consumer warpgroup w leaves. */
template <int D, bool shared_keys, bool ordered> struct sender {
	using layout = shared_layout<D>;

	const parameters &p;
	uint32_t shared;
	int w;
	uint32_t parity;

	__device__ uint32_t barrier(int which) const
	{
		return shared + layout::BARRIERS + which * 8;
	}

	__device__ uint32_t out() const
	{
		return shared + layout::OUT + w * layout::OUT_BYTES;
	}

	__device__ uint32_t dk() const
	{
		return shared + layout::DS + w * layout::OUT_BYTES;
	}

	__device__ void await_leaving()
	{
		barrier_wait(barrier(BAR_OUT_FULL + w), parity);
		parity ^= 1;
	}

	/* What leaves has been read. */
	__device__ void release() const
	{
		store_commit();
		store_wait_read();
		barrier_arrive(barrier(BAR_OUT_EMPTY + w));
	}

	/* A unit's share of each tile of dQ. A turn is passed on a step later, when the addition
	 * has had the time to arrive. */
	__device__ void add_queries(const unit &u, const span &m, int b, int h)
	{
		const int tiles = p.padded_len / QUERIES<D>;

		const int64_t tile = (static_cast<int64_t>(b) * p.q_heads + h % p.q_heads) * tiles;
		const int64_t place = (tile + m.first) * WARPGROUPS + w;
		float *to = p.dq + place * SUM_FLOATS;
		int *turn = p.dq_turns + place;

#pragma unroll 1
		for (int i = m.first; i < m.end; i++) {
			await_leaving();
			if (ordered)
				await_turn(turn, (last_key_tile<D>(p, i) - u.n) * p.sharers +
				                         h / p.q_heads);
			bulk_add(to, out(), layout::OUT_BYTES);
			release();
			if (ordered && i > m.first)
				pass_turn<1>(turn - WARPGROUPS);
			to += WARPGROUPS * SUM_FLOATS;
			turn += WARPGROUPS;
		}
		if (ordered && m.first < m.end)
			pass_turn<0>(turn - WARPGROUPS);
	}

	__device__ void store_keys(const unit &u, int b, int kv)
	{
		await_leaving();
#pragma unroll
		for (int panel = 0; panel < D / 64; panel++) {
			tensor_store(&p.dk, dk() + panel * PANEL_BYTES, panel * 64,
			             u.n * KEYS + w * 64, kv, b);
			tensor_store(&p.dv, out() + panel * PANEL_BYTES, panel * 64,
			             u.n * KEYS + w * 64, kv, b);
		}
		release();
	}

	/* Of heads that share keys, 64 columns at a time. */
	__device__ void add_keys(const unit &u, const heads &x)
	{
		const int64_t tile =
		        (static_cast<int64_t>(x.b) * p.kv_heads + x.kv) * p.key_tiles + u.n;
		const int64_t place = tile * WARPGROUPS + w;

		if (ordered)
			await_turn(p.dk_turns + place, x.h - x.kv * p.sharing);
#pragma unroll 1
		for (int i = 0; i < D / 64; i++) {
			const int64_t at = (place * (D / 64) + i) * SUM_FLOATS;

			await_leaving();
			bulk_add(p.dk_sums + at, dk(), layout::OUT_BYTES);
			bulk_add(p.dv_sums + at, out(), layout::OUT_BYTES);
			release();
		}
		if (ordered)
			pass_turn<0>(p.dk_turns + place);
	}

	__device__ void run(const unit &u)
	{
		const heads x = heads_of<shared_keys>(p, u);

		add_queries(u, query_tiles<D>(p, u.n), x.b, x.h);
		if constexpr (shared_keys)
			add_keys(u, x);
		else
			store_keys(u, x.b, x.kv);
		barrier_arrive(barrier(BAR_DK_LEFT));
	}
};

/* acc (64 keys x n queries) = A (64 x D) B (n x D)^T. Descriptors count in 16 bytes. */
template <int D, int n>
__device__ __forceinline__ void issue_scores(float (&acc)[n], uint64_t a, uint64_t b)
{
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < D / 16; step++) {
		const int panel = step / 4, within = step % 4 * 32;

		wgmma_ss(acc, a + (panel * KEYS * ROW_BYTES + within) / 16,
		         b + (panel * QUERIES<D> * ROW_BYTES + within) / 16, step > 0);
	}
	wgmma_commit();
}

/* The same, the first `held` / 4 steps of A from registers. */
template <int D, int n, int held>
__device__ __forceinline__ void issue_scores(float (&acc)[n], const uint32_t (&rows)[held],
                                             uint64_t a, uint64_t b)
{
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < D / 16; step++) {
		const int panel = step / 4, within = step % 4 * 32;
		const uint64_t columns = b + (panel * QUERIES<D> * ROW_BYTES + within) / 16;

		if (4 * step < held)
			wgmma_rs_k_major(acc, &rows[4 * step], columns, step > 0);
		else
			wgmma_ss(acc, a + (panel * KEYS * ROW_BYTES + within) / 16, columns,
			         step > 0);
	}
	wgmma_commit();
}

/* acc (64 keys x D) += A (64 x queries, registers) B (queries x D). */
template <int n, int operands>
__device__ __forceinline__ void issue_gradient(float (&acc)[n], const uint32_t (&a)[operands],
                                               uint64_t b)
{
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < operands / 4; step++)
		wgmma_rs(acc, &a[4 * step], b + step * 2048 / 16, true);
	wgmma_commit();
}

/* Where a query's statistic lies in those of 64: a thread's columns side by side, the two halves of
 * a quad in different banks. */
__device__ __forceinline__ int statistic_place(int query)
{
	const int i = query / 8, c = query / 2 % 4;

	return c * 16 + ((i / 2) ^ (c / 2)) * 4 + i % 2 * 2 + query % 2;
}

/* What there is of each query, for a thread's columns of n accumulators: the first `ahead` pieces
 * are fetched ahead of their use, for more there may be no registers. */
template <int n, int ahead> struct statistics {
	uint32_t own, flip; /* this thread's, and 16 where its pieces are swapped in pairs */
	float4 x[ahead];

	__device__ __forceinline__ float4 fetch(int j) const
	{
		return shared_float4(own + j / 4 * 256 + j % 4 * 16 + (j % 2 ? -flip : flip));
	}

	__device__ __forceinline__ void load(uint32_t tile)
	{
		own = tile + threadIdx.x % 4 * 64;
		flip = threadIdx.x % 4 / 2 * 16;
#pragma unroll
		for (int j = 0; j < ahead; j++)
			x[j] = fetch(j);
	}

	/* Of accumulators 8j, 8j + 1, 8j + 4 and 8j + 5, and of those two further. */
	__device__ __forceinline__ float4 at(int j) const
	{
		return j < ahead ? x[j] : fetch(j);
	}
};

/* `shared_keys`: several heads read the same. */
template <int D, bool shared_keys> struct consumer {
	using layout = shared_layout<D>;
	static constexpr int N = QUERIES<D> / 2; /* accumulators of a tile of scores */

	const parameters &p;
	uint32_t shared;
	int w;                      /* this warpgroup */
	turn_ring<STAGES> rows;     /* queries */
	turn_ring<STAGES> k;        /* and one place of values, whose parity k.turn is */
	uint32_t parities;          /* of dK's place, 1, and of what this warpgroup sends, 2 */
	uint32_t block;             /* this lane's row of a block of its warp, block_address */
	uint32_t out_place;         /* this thread's first 16 bytes of what its warpgroup sends */
	bool stored;                /* a dQ there has yet to be handed over */
	span all_seen;              /* queries that see all of the warpgroup's keys: first, last */
	uint32_t held[4 * HELD<D>]; /* the first 16 HELD columns of the warpgroup's keys */
	statistics<N, LSE_AHEAD<D>> lse; /* of the step's queries */

	__device__ uint32_t barrier(int which) const
	{
		return shared + layout::BARRIERS + which * 8;
	}

	/* One arrival per warp: each warp vouches for its own accesses. */
	__device__ void release(int which) const
	{
		warp_arrive(barrier(which));
	}

	__device__ uint32_t keys() const
	{
		return shared + layout::K + k.slot() * layout::KEYS_BYTES;
	}

	__device__ uint64_t rows_operand(int tile, uint32_t leading) const
	{
		return matrix_descriptor(shared + tile + rows.slot() * layout::ROWS_BYTES, leading);
	}

	__device__ void await_out_place()
	{
		barrier_wait(barrier(BAR_OUT_EMPTY + w), (parities / 2) ^ 1);
		parities ^= 2;
	}

	/* Of this step, or `back` steps before. */
	__device__ void await_queries(uint32_t back = 0) const
	{
		barrier_wait(barrier(BAR_Q_FULL + rows.slot(back)), rows.parity(back));
	}

	/* Address in a warpgroup's 64 swizzled rows of this warp's 16 x 16 block from column
	 * 16j (below 64) on, as ldmatrix and stmatrix (x4) want it from each lane. */
	__device__ uint32_t block_address(uint32_t tile, int j) const
	{
		return (tile + block) ^ (j * 32);
	}

	/* What was written to shared memory may leave, if it is anything. */
	__device__ void hand_over(bool written = true) const
	{
		fence_async_proxy();
		__syncwarp();
		if (written && threadIdx.x % 32 == 0)
			barrier_arrive(barrier(BAR_OUT_FULL + w));
	}

	__device__ void hold_keys();
	__device__ void load_lse(uint32_t back = 0);
	__device__ void powers(float (&s)[N], uint32_t (&probabilities)[N / 2], int m,
	                       int key) const;
	__device__ void differentiate(const uint32_t (&probabilities)[N / 2], const float (&dp)[N],
	                              const statistics<N, N / 8> &delta,
	                              uint32_t (&ds)[N / 2]) const;
	__device__ void store_ds(const uint32_t (&ds)[N / 2]) const;
	__device__ void issue_dq(float (&dq)[32]) const;
	__device__ void store_sums(uint32_t place, const float *x) const;
	__device__ void store_dq(const float (&dq)[32]);
	__device__ void store_keys(uint32_t place, const float (&x)[D / 2], float scale) const;
	__device__ void leave_keys(const float (&dk)[D / 2], const float (&dv)[D / 2]);
	template <bool first, bool last>
	__device__ void step(int m, int key, float (&s)[N], float (&dk)[D / 2], float (&dv)[D / 2]);
	__device__ void run(const unit &u);
};

template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::hold_keys()
{
	const uint32_t own = keys() + w * 64 * ROW_BYTES;

#pragma unroll
	for (int j = 0; j < HELD<D>; j++)
		load_matrix_x4(block_address(own + j / 4 * KEYS * ROW_BYTES, j % 4), held[4 * j],
		               held[4 * j + 1], held[4 * j + 2], held[4 * j + 3]);
}

/* Of the queries of this step, or `back` steps before. */
template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::load_lse(uint32_t back)
{
	lse.load(shared + layout::LSE + rows.slot(back) * layout::STATISTICS_BYTES);
}

/* Scores -> probabilities; `key` is the thread's first, the other is 8 further. */
template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::powers(float (&s)[N],
                                                                 uint32_t (&probabilities)[N / 2],
                                                                 int m, int key) const
{
	const int begin = m * QUERIES<D>, column = begin + 2 * (threadIdx.x & 3);

	if (begin < all_seen.first || begin + QUERIES<D> - 1 > all_seen.end) {
		const int first[2] = {first_query(p, key) - column,
		                      first_query(p, key + 8) - column};
		const int last[2] = {last_query(p, key) - column, last_query(p, key + 8) - column};
#pragma unroll
		for (int i = 0; i < N; i++) {
			const int at = 8 * (i >> 2) + (i & 1), r = (i >> 1) & 1;

			if (at < first[r] || at > last[r])
				s[i] = -INFINITY;
		}
	}
#pragma unroll
	for (int j = 0; j < N / 8; j++) {
		const float4 x = lse.at(j);
		const auto power = [&](int i, float l) {
			return exp2_approx(fmaf(s[8 * j + i], p.scale_log2, -l));
		};

		probabilities[4 * j] = pack_bf16(power(0, x.x), power(1, x.y));
		probabilities[4 * j + 1] = pack_bf16(power(2, x.x), power(3, x.y));
		probabilities[4 * j + 2] = pack_bf16(power(4, x.z), power(5, x.w));
		probabilities[4 * j + 3] = pack_bf16(power(6, x.z), power(7, x.w));
	}
}

/* P from its bf16, which is what dV sees: no room for it in fp32. */
template <int D, bool shared_keys>
__device__ __forceinline__ void
consumer<D, shared_keys>::differentiate(const uint32_t (&probabilities)[N / 2],
                                        const float (&dp)[N], const statistics<N, N / 8> &delta,
                                        uint32_t (&ds)[N / 2]) const
{
#pragma unroll
	for (int j = 0; j < N / 8; j++) {
		const float4 x = delta.at(j);
		const auto differ = [&](int i, float d0, float d1) {
			const uint32_t pair = probabilities[4 * j + i];

			ds[4 * j + i] = pack_bf16(low_bf16(pair) * (dp[8 * j + 2 * i] - d0),
			                          high_bf16(pair) * (dp[8 * j + 2 * i + 1] - d1));
		};

		differ(0, x.x, x.y);
		differ(1, x.x, x.y);
		differ(2, x.z, x.w);
		differ(3, x.z, x.w);
	}
}

/* [key][query], panels of 64 queries. */
template <int D, bool shared_keys>
__device__ __forceinline__ void
consumer<D, shared_keys>::store_ds(const uint32_t (&ds)[N / 2]) const
{
	const uint32_t place =
	        shared + layout::DS + rows.slot() * layout::DS_BYTES + w * 64 * ROW_BYTES;

#pragma unroll
	for (int j = 0; j < QUERIES<D> / 16; j++)
		store_matrix_x4(block_address(place + j / 4 * layout::DS_PANEL, j % 4), ds[4 * j],
		                ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3]);
}

/* dq (64 queries x 64 of D) = dS K of the tile before, over all its keys; d = 64: of warpgroup w
 * queries from 64w on, d = 128: columns from 64w on. */
template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::issue_dq(float (&dq)[32]) const
{
	const uint64_t ds =
	        matrix_descriptor(shared + layout::DS + rows.slot(1) * layout::DS_BYTES +
	                                  (D == 64 ? w * layout::DS_PANEL : 0),
	                          16);
	const uint64_t k = matrix_descriptor(keys() + (D == 64 ? 0 : w * KEYS * ROW_BYTES), 16);

	barrier_wait(barrier(BAR_DS_FULL + rows.slot(1)), rows.parity(1));
	pin(dq);
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < KEYS / 16; step++)
		wgmma_ss_both_transposed(dq, ds + step * 2048 / 16, k + step * 2048 / 16, step > 0);
	wgmma_commit();
}

/* 32 accumulators as they lie: 4 floats of every thread of the warpgroup, 8 times. */
template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::store_sums(uint32_t own,
                                                                     const float *x) const
{
#pragma unroll
	for (int j = 0; j < 8; j++)
		shared_store4(own + j * 128 * 16, x[4 * j], x[4 * j + 1], x[4 * j + 2],
		              x[4 * j + 3]);
}

template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::store_dq(const float (&dq)[32])
{
	await_out_place();
	store_sums(out_place, dq);
}

/* 64 keys x D, as panels of 64. */
template <int D, bool shared_keys>
__device__ __forceinline__ void
consumer<D, shared_keys>::store_keys(uint32_t place, const float (&x)[D / 2], float scale) const
{
#pragma unroll
	for (int j = 0; j < D / 16; j++) {
		const float *y = &x[8 * j];

		store_matrix_x4(block_address(place + j / 4 * PANEL_BYTES, j % 4),
		                pack_bf16(y[0] * scale, y[1] * scale),
		                pack_bf16(y[2] * scale, y[3] * scale),
		                pack_bf16(y[4] * scale, y[5] * scale),
		                pack_bf16(y[6] * scale, y[7] * scale));
	}
}

/* What the sender stores, or adds where heads share keys. */
template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::leave_keys(const float (&dk)[D / 2],
                                                                     const float (&dv)[D / 2])
{
	if constexpr (shared_keys) {
#pragma unroll
		for (int i = 0; i < D / 64; i++) {
			await_out_place();
			store_sums(out_place - layout::OUT + layout::DS, &dk[32 * i]);
			store_sums(out_place, &dv[32 * i]);
			hand_over();
		}
	} else {
		const uint32_t dk_place = shared + layout::DS + w * layout::OUT_BYTES;
		const uint32_t dv_place = shared + layout::OUT + w * layout::OUT_BYTES;

		store_keys(dk_place, dk, p.scale);
		await_out_place();
		store_keys(dv_place, dv, 1);
		hand_over();
	}
}

/*
 * Tile m of the queries; its scores have been issued, and those of the next
 * tile are, except after the last. dQ is that of the tile before, so that neither
 * warpgroup waits for the other's dS. What d = 64 fetches at other places is faster there, by 8%.
 */
template <int D, bool shared_keys>
template <bool first, bool last>
__device__ __forceinline__ void consumer<D, shared_keys>::step(int m, int key, float (&s)[N],
                                                               float (&dk)[D / 2],
                                                               float (&dv)[D / 2])
{
	constexpr uint32_t PANEL = QUERIES<D> * ROW_BYTES;
	const uint32_t own_rows = w * 64 * ROW_BYTES;
	const uint64_t q_columns = rows_operand(layout::Q, PANEL),
	               do_columns = rows_operand(layout::DO, PANEL);
	float dp[N], dq[32];
	statistics<N, N / 8> delta;
	uint32_t probabilities[N / 2], ds[N / 2];
	const auto load_delta = [&] {
		delta.load(shared + layout::DELTA + rows.slot() * layout::STATISTICS_BYTES);
	};

	barrier_wait(barrier(BAR_DO_FULL + rows.slot()), rows.parity());
	wgmma_wait<0>();
	pin(s);
	pin(dp);
	issue_scores<D>(dp, matrix_descriptor(shared + layout::V + own_rows, 16),
	                rows_operand(layout::DO, 16));
	powers(s, probabilities, m, key);
	if (D == 128)
		load_delta();
	if (!first)
		hand_over(stored);
	stored = !first;
	if (D == 64)
		load_delta();
	pin(probabilities);
	pin(dv);
	issue_gradient(dv, probabilities, do_columns);
	wgmma_wait<1>();
	pin(dp);
	if (last)
		release(BAR_V_EMPTY);
	differentiate(probabilities, dp, delta, ds);
	barrier_wait(barrier(BAR_DS_EMPTY + rows.slot()), rows.parity() ^ 1);
	store_ds(ds);
	pin(ds);
	pin(dk);
	issue_gradient(dk, ds, q_columns);
	fence_async_proxy();
	release(BAR_DS_FULL + rows.slot());
	if (D == 128 && !last)
		await_queries(NEXT);
	if (!first)
		issue_dq(dq);
	if (D == 128 && !last)
		load_lse(NEXT);
	wgmma_wait<first ? 0 : 1>();
	pin(dv);
	pin(probabilities);
	pin(dk);
	pin(ds);
	release(BAR_ROWS_EMPTY + rows.slot());
	rows.advance();
	if (!last) {
		if (D == 64) {
			await_queries();
			load_lse();
		}
		pin(s);
		issue_scores<D>(s, held, matrix_descriptor(keys() + own_rows, 16),
		                rows_operand(layout::Q, 16));
	}
	if (!first) {
		wgmma_wait<last ? 0 : 1>();
		pin(dq);
		release(BAR_DS_EMPTY + rows.slot(2));
		store_dq(dq);
	}
}

template <int D, bool shared_keys>
__device__ __forceinline__ void consumer<D, shared_keys>::run(const unit &u)
{
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const int key = u.n * KEYS + w * 64 + warp * 16 + lane / 4;
	const span tiles = query_tiles<D>(p, u.n);
	float s[N], dk[D / 2], dv[D / 2];

#pragma unroll
	for (int i = 0; i < D / 2; i++)
		dk[i] = dv[i] = 0;
	all_seen = {first_query(p, u.n * KEYS + w * 64 + 63), last_query(p, u.n * KEYS + w * 64)};
	if (tiles.first < tiles.end) {
		float dq[32];

		await_queries();
		load_lse();
		barrier_wait(barrier(BAR_K_FULL + k.slot()), k.parity());
		hold_keys();
		pin(s);
		issue_scores<D>(s, held, matrix_descriptor(keys() + w * 64 * ROW_BYTES, 16),
		                rows_operand(layout::Q, 16));
		barrier_wait(barrier(BAR_V_FULL), k.turn % 2);
		barrier_wait(barrier(BAR_DK_LEFT), (parities & 1) ^ 1);
		int m = tiles.first;
		const int last = tiles.end - 1;

		if (m == last) {
			step<true, true>(m, key, s, dk, dv);
		} else {
			step<true, false>(m, key, s, dk, dv);
#pragma unroll 1
			while (++m < last)
				step<false, false>(m, key, s, dk, dv);
			step<false, true>(m, key, s, dk, dv);
		}
		if (tiles.first + 1 < tiles.end)
			hand_over();
		issue_dq(dq);
		wgmma_wait<0>();
		pin(dq);
		release(BAR_DS_EMPTY + rows.slot(1));
		release(BAR_K_EMPTY + k.slot());
		store_dq(dq);
		hand_over();
		k.advance();
	} else {
		barrier_wait(barrier(BAR_DK_LEFT), (parities & 1) ^ 1);
	}
	parities ^= 1;
	/* Nobody reads dS any more. */
	named_barrier_sync(BOTH_BARRIER, 128 * WARPGROUPS);
	leave_keys(dk, dv);
}

template <int D, bool shared_keys, bool ordered>
__global__ void __launch_bounds__(THREADS, 1)
        attention_backward_kernel(const __grid_constant__ parameters p)
{
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);
	const uint32_t barriers = shared + shared_layout<D>::BARRIERS;
	const int warp = threadIdx.x / 32;

	if (threadIdx.x == 0) {
		const auto init = [&](int first, int count, int arrivals) {
			for (int i = first; i < first + count; i++)
				barrier_init(barriers + i * 8, arrivals);
		};

		init(BAR_K_FULL, STAGES, 1);
		init(BAR_K_EMPTY, STAGES, CONSUMER_WARPS);
		init(BAR_V_FULL, 1, 1);
		init(BAR_V_EMPTY, 1, CONSUMER_WARPS);
		init(BAR_Q_FULL, 2 * STAGES, 1);
		init(BAR_ROWS_EMPTY, 3 * STAGES, CONSUMER_WARPS);
		init(BAR_UNIT_FULL, SCHEDULE_SLOTS, 1);
		init(BAR_UNIT_EMPTY, SCHEDULE_SLOTS, CONSUMER_WARPS + WARPGROUPS + 1);
		init(BAR_OUT_FULL, WARPGROUPS, 4);
		init(BAR_OUT_EMPTY, WARPGROUPS, 1);
		init(BAR_DK_LEFT, 1, WARPGROUPS);
		barrier_init_fence();
	}
	__syncthreads();
	schedule<D> units = {shared};
	unit u;

	if (warp < 4) {
		const auto work_off = [&](auto &worker) {
			while (units.get(u)) {
				if (threadIdx.x % 32 == 0)
					worker.run(u);
				__syncwarp();
			}
		};

		registers_decrease<PRODUCER_REGISTERS>();
		if (threadIdx.x == 0) {
			query_producer<D, shared_keys, ordered>{p, shared, {}}.run();
		} else if (warp == 3) {
			gradient_producer<D, shared_keys> values = {p, shared, 0, {}};

			values.rows = {shared,
			               shared + shared_layout<D>::DO,
			               shared + shared_layout<D>::DELTA,
			               barriers + BAR_DO_FULL * 8,
			               {}};
			work_off(values);
		} else if (warp > 0) {
			sender<D, shared_keys, ordered> sums = {p, shared, warp - 1, 0};

			work_off(sums);
		}
	} else {
		registers_increase<CONSUMER_REGISTERS>();
		consumer<D, shared_keys> c = {p, shared, warpgroup_index()};

		c.block = plain_block(0, threadIdx.x / 32 % 4 * 16, 0, threadIdx.x % 32);
		c.out_place = shared + shared_layout<D>::OUT + c.w * shared_layout<D>::OUT_BYTES +
		              threadIdx.x % 128 * 16;
		keep(c.block);
		keep(c.out_place);
		while (units.get(u))
			c.run(u);
	}
}

/* ---- before and after */

/* A row of bf16 in memory. */
struct rows {
	char *data;
	int64_t batch, token, head; /* strides in bytes */

	__device__ char *at(int b, int t, int h) const
	{
		return data + b * batch + t * token + h * head;
	}
};

struct query_parameters {
	rows dout, o, gate, own_value, dgate, down_value; /* data NULL: none */
	int batch, seq_len, n_heads, padded_len;
	const float *forward_lse, *own_score;
	float *lse, *delta, *down_score;
	uint4 *gated; /* gradients of outputs before the gate [B, H, T, d], or NULL */
};

/* Sums [batch * heads][tiles][WARPGROUPS][SUM_FLOATS], whose tiles are of QUERIES tokens. */
struct sum_parameters {
	const float *sums;
	rows to;
	int tokens, tiles, heads;
	float scale;
};

/* Sum over the D/8 lanes that share a row. */
template <int D> __device__ __forceinline__ float row_sum(float x)
{
#pragma unroll
	for (int distance = D / 16; distance > 0; distance /= 2)
		x += __shfl_xor_sync(~0u, x, distance);
	return x;
}

/*
 * What needs one query alone: PREPARED_ROWS queries of a head, D/8 lanes to a
 * row. Queries after the last have an lse of infinity, so that all their
 * probabilities are 0. `extras`: gate or own values.
 */
template <int D, bool extras>
__global__ void __launch_bounds__(256) prepare_kernel(query_parameters p)
{
	constexpr int LANES = D / 8, PASSES = PREPARED_ROWS * LANES / 256;
	/* Heads first, which lie side by side. */
	const int tiles = p.padded_len / PREPARED_ROWS, tile = blockIdx.x / p.n_heads;
	const int h = blockIdx.x - tile * p.n_heads, b = tile / tiles;
	const int first = (tile - b * tiles) * PREPARED_ROWS, pair = b * p.n_heads + h;
	const int lane = threadIdx.x % LANES;
	uint4 dout[PASSES], o[PASSES], gate[PASSES], value[PASSES];

#pragma unroll
	for (int i = 0; i < PASSES; i++) {
		const int t = first + i * (256 / LANES) + threadIdx.x / LANES;
		const auto load = [&](const rows &from) {
			return t < p.seq_len && from.data
			               ? reinterpret_cast<const uint4 *>(from.at(b, t, h))[lane]
			               : make_uint4(0, 0, 0, 0);
		};

		dout[i] = load(p.dout);
		o[i] = load(p.o);
		if (extras) {
			gate[i] = load(p.gate);
			value[i] = load(p.own_value);
		}
	}
#pragma unroll
	for (int i = 0; i < PASSES; i++) {
		const int t = first + i * (256 / LANES) + threadIdx.x / LANES;
		const int64_t padded = static_cast<int64_t>(pair) * p.padded_len + first +
		                       statistic_place(t - first);
		const int64_t row = static_cast<int64_t>(pair) * p.seq_len + t;
		float x[8], y[8], products = 0;

		unpack_bf16(x, dout[i]);
		unpack_bf16(y, o[i]);
		if (extras && p.gate.data) {
			float g[8], dg[8];

			unpack_bf16(g, gate[i]);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				const float sigmoid =
				        reciprocal_approx(1 + exp2_approx(g[j] * -LOG2E));

				x[j] *= sigmoid;
				dg[j] = x[j] * y[j] * (1 - sigmoid);
			}
			dout[i] = pack_bf16(x);
			unpack_bf16(x, dout[i]);
			if (t < p.seq_len) {
				reinterpret_cast<uint4 *>(p.dgate.at(b, t, h))[lane] =
				        pack_bf16(dg);
				p.gated[row * LANES + lane] = dout[i];
			}
		}
#pragma unroll
		for (int j = 0; j < 8; j++)
			products = fmaf(x[j], y[j], products);
		const float delta = row_sum<D>(products);
		const float lse = t < p.seq_len ? p.forward_lse[row] : INFINITY;

		if (lane == 0) {
			p.delta[padded] = delta;
			p.lse[padded] = lse == -INFINITY ? INFINITY : lse * LOG2E;
		}
		if (extras && p.own_score) {
			const int64_t own =
			        (static_cast<int64_t>(b) * p.seq_len + t) * p.n_heads + h;
			const float weight =
			        t < p.seq_len ? exp2_approx((p.own_score[own] - lse) * LOG2E) : 0;
			float dweight = 0;

			unpack_bf16(y, value[i]);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				dweight = fmaf(x[j], y[j], dweight);
				x[j] *= weight;
			}
			dweight = row_sum<D>(dweight);
			if (t < p.seq_len) {
				reinterpret_cast<uint4 *>(p.down_value.at(b, t, h))[lane] =
				        pack_bf16(x);
				if (lane == 0)
					p.down_score[own] = weight * (dweight - delta);
			}
		}
	}
}

/* A tile of sums to bf16, and from the order of accumulators to rows. */
template <int D> __global__ void __launch_bounds__(256) finish_kernel(sum_parameters p)
{
	constexpr int PITCH = D / 2 + 4; /* pairs of a row in shared memory */
	__shared__ alignas(16) uint32_t tile[QUERIES<D> * PITCH];
	const int number = blockIdx.x / p.heads, h = blockIdx.x - number * p.heads;
	const int b = number / p.tiles, m = number - b * p.tiles, first = m * QUERIES<D>;
	const int64_t place = (static_cast<int64_t>(b) * p.heads + h) * p.tiles + m;
	const int w = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const int row = warp * 16 + lane / 4 + (D == 64 ? 64 * w : 0);
	const int column = (lane & 3) + (D == 64 ? 0 : 32 * w); /* in pairs */
	const float4 *from = reinterpret_cast<const float4 *>(p.sums) +
	                     (place * WARPGROUPS + w) * (SUM_FLOATS / 4) + threadIdx.x % 128;
	float4 x[8];

#pragma unroll
	for (int j = 0; j < 8; j++)
		x[j] = from[j * 128];
#pragma unroll
	for (int j = 0; j < 8; j++) {
		tile[row * PITCH + column + 4 * j] = pack_bf16(x[j].x * p.scale, x[j].y * p.scale);
		tile[(row + 8) * PITCH + column + 4 * j] =
		        pack_bf16(x[j].z * p.scale, x[j].w * p.scale);
	}
	__syncthreads();
#pragma unroll
	for (int i = threadIdx.x; i < QUERIES<D> * D / 8; i += 256) {
		const int t = i / (D / 8), piece = i % (D / 8);

		if (first + t < p.tokens)
			reinterpret_cast<uint4 *>(p.to.at(b, first + t, h))[piece] =
			        *reinterpret_cast<const uint4 *>(&tile[t * PITCH + piece * 4]);
	}
}

/* ---- host */

/* Bytes of queries, gradients and sums to keep in L2 at a time. */
constexpr int64_t L2_BUDGET = 40 << 20;

/* The workspace, in bytes from its start; zeros from the ticket to the turns'. */
struct plan {
	int64_t padded_len, key_tiles;
	size_t ticket, dq, dk, dv, dq_turns, dk_turns, zeros, lse, delta, gated, size;
};

struct plan make_plan(const struct attention_args *a)
{
	const int64_t pairs = a->batch * a->n_heads;
	size_t end = 0;
	const auto take = [&](int64_t bytes) {
		const size_t start = end;

		end += (static_cast<size_t>(bytes) + 255) / 256 * 256;
		return start;
	};
	struct plan plan;

	plan.padded_len = (a->seq_len + 127) / 128 * 128;
	plan.key_tiles = (a->kv_len + KEYS - 1) / KEYS;
	/* Of dQ a warpgroup adds 64 x 64 at a time, of dK and dV 64 rows. */
	const int64_t dq_sums = a->batch * a->q_heads * plan.padded_len * a->d_head / SUM_FLOATS;
	const int64_t tiles = a->batch * a->kv_heads * plan.key_tiles * WARPGROUPS;
	const int64_t dk_bytes =
	        a->n_heads == a->kv_heads ? 0 : tiles * (a->d_head / 64) * SUM_FLOATS * 4;

	plan.ticket = take(sizeof(int));
	plan.dq = take(dq_sums * SUM_FLOATS * 4);
	plan.dk = take(dk_bytes);
	plan.dv = take(dk_bytes);
	plan.dq_turns = take(dq_sums * 4);
	plan.dk_turns = take(tiles * 4);
	plan.zeros = end - plan.ticket;
	plan.lse = take(pairs * plan.padded_len * 4);
	plan.delta = take(pairs * plan.padded_len * 4);
	plan.gated = take(a->gate.data ? pairs * a->seq_len * a->d_head * 2 : 0);
	plan.size = end;
	return plan;
}

rows rows_of(const struct view &view)
{
	return {static_cast<char *>(view.data), view.batch * 2, view.token * 2, view.head * 2};
}

query_parameters fill_query_parameters(const struct attention_backward_args *args,
                                       const struct plan &plan, char *base)
{
	const struct attention_args *a = &args->forward;
	const rows none = {NULL, 0, 0, 0};
	const bool gate = a->gate.data != NULL, own = a->own_score != NULL;
	query_parameters p;

	p.dout = rows_of(args->dout);
	p.o = rows_of(gate ? a->out_ungated : a->out);
	p.gate = gate ? rows_of(a->gate) : none;
	p.dgate = gate ? rows_of(args->dgate) : none;
	p.own_value = own ? rows_of(a->own_value) : none;
	p.down_value = own ? rows_of(args->down_value) : none;
	p.batch = static_cast<int>(a->batch);
	p.seq_len = static_cast<int>(a->seq_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.padded_len = static_cast<int>(plan.padded_len);
	p.forward_lse = a->lse;
	p.own_score = a->own_score;
	p.lse = reinterpret_cast<float *>(base + plan.lse);
	p.delta = reinterpret_cast<float *>(base + plan.delta);
	p.down_score = args->down_score;
	p.gated = gate ? reinterpret_cast<uint4 *>(base + plan.gated) : NULL;
	return p;
}

template <int D>
enum status fill_parameters(parameters &p, const struct attention_backward_args *args,
                            const struct plan &plan, char *base)
{
	const struct attention_args *a = &args->forward;
	const struct view gated = {base + plan.gated, a->n_heads * a->seq_len * D, D,
	                           a->seq_len * D};
	enum status status = STATUS_OK;
	const auto encode = [&](CUtensorMap *map, const struct view *view, int64_t tokens,
	                        int64_t heads, int box) {
		if (status == STATUS_OK)
			status = tensor_map_encode(map, view, a->batch, tokens, heads, D, box);
	};

	encode(&p.q, &a->q, a->seq_len, a->q_heads, QUERIES<D>);
	encode(&p.dout, a->gate.data ? &gated : &args->dout, a->seq_len, a->n_heads, QUERIES<D>);
	encode(&p.k, &a->k, a->kv_len, a->kv_heads, KEYS);
	encode(&p.v, &a->v, a->kv_len, a->kv_heads, KEYS);
	encode(&p.dk, &args->dk, a->kv_len, a->kv_heads, 64);
	encode(&p.dv, &args->dv, a->kv_len, a->kv_heads, 64);
	p.seq_len = static_cast<int>(a->seq_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.q_heads = static_cast<int>(a->q_heads);
	p.kv_heads = static_cast<int>(a->kv_heads);
	p.sharing = static_cast<int>(a->n_heads / a->kv_heads);
	p.sharers = static_cast<int>(a->n_heads / a->q_heads);
	p.pairs = static_cast<int>(a->batch * a->n_heads);
	p.window = static_cast<int>(a->window < a->seq_len ? a->window : a->seq_len);
	p.chunk = static_cast<int>(a->chunk < a->seq_len ? a->chunk : a->seq_len);
	p.mask = a->mask;
	p.seen_keys = static_cast<int>(a->kv_len);
	if (a->mask == MASK_CHUNK && p.seen_keys > (a->seq_len - 1) / a->chunk)
		p.seen_keys = static_cast<int>((a->seq_len - 1) / a->chunk);
	p.scale = a->scale;
	p.scale_log2 = a->scale * 1.44269504f;
	p.padded_len = static_cast<int>(plan.padded_len);
	p.lse = reinterpret_cast<float *>(base + plan.lse);
	p.delta = reinterpret_cast<float *>(base + plan.delta);
	p.dq = reinterpret_cast<float *>(base + plan.dq);
	p.dk_sums = reinterpret_cast<float *>(base + plan.dk);
	p.dv_sums = reinterpret_cast<float *>(base + plan.dv);
	p.dq_turns = reinterpret_cast<int *>(base + plan.dq_turns);
	p.dk_turns = reinterpret_cast<int *>(base + plan.dk_turns);
	p.key_tiles = static_cast<int>(plan.key_tiles);
	/* Heads of the same queries run side by side, at the same tiles, and in order they wait for
	 * each other: all are in one group. */
	int64_t fit = L2_BUDGET / (a->seq_len * D * 8);
	if (p.sharers > 1)
		fit = (fit + a->n_heads) / a->n_heads * a->n_heads;
	p.heads_per_group = static_cast<int>(fit < 1 ? 1 : fit < p.pairs ? fit : p.pairs);
	p.ticket = reinterpret_cast<int *>(base + plan.ticket);
	return status;
}

/* Sums of a tensor of so many heads and tokens, QUERIES of them a tile. */
template <int D>
enum status finish(struct device *device, int64_t batch, const char *sums, const struct view &to,
                   int64_t tokens, int64_t tiles, int64_t heads, float scale)
{
	const sum_parameters p = {reinterpret_cast<const float *>(sums),
	                          rows_of(to),
	                          static_cast<int>(tokens),
	                          static_cast<int>(tiles),
	                          static_cast<int>(heads),
	                          scale};

	return submit(device, finish_kernel<D>, batch * heads * tiles, 256, 0, p);
}

template <int D> auto kernel_of(bool shared_keys, bool ordered)
{
	if (shared_keys)
		return ordered ? attention_backward_kernel<D, true, true>
		               : attention_backward_kernel<D, true, false>;
	return ordered ? attention_backward_kernel<D, false, true>
	               : attention_backward_kernel<D, false, false>;
}

template <int D>
enum status launch(struct device *device, const struct attention_backward_args *args,
                   void *workspace)
{
	const struct attention_args *a = &args->forward;
	const struct plan plan = make_plan(a);
	char *base = static_cast<char *>(workspace);
	const query_parameters queries = fill_query_parameters(args, plan, base);
	parameters p;
	enum status status = fill_parameters<D>(p, args, plan, base);
	const int64_t units = static_cast<int64_t>(p.key_tiles) * p.pairs;
	const int64_t prepare = a->batch * a->n_heads * (plan.padded_len / PREPARED_ROWS);
	const int64_t key_tiles = plan.key_tiles * KEYS / QUERIES<D>;

	if (status != STATUS_OK)
		return status;
	CUDA_TRY(cudaMemsetAsync(base + plan.ticket, 0, plan.zeros, cuda_stream(device)));
	status = submit(device,
	                a->gate.data || a->own_score ? prepare_kernel<D, true>
	                                             : prepare_kernel<D, false>,
	                prepare, 256, 0, queries);
	if (status == STATUS_OK)
		status = submit(device, kernel_of<D>(p.sharing > 1, device->deterministic),
		                turns(device, units), THREADS, shared_layout<D>::BYTES, p);
	if (status == STATUS_OK)
		status = finish<D>(device, a->batch, base + plan.dq, args->dq, a->seq_len,
		                   plan.padded_len / QUERIES<D>, a->q_heads, a->scale);
	if (status == STATUS_OK && p.sharing > 1)
		status = finish<D>(device, a->batch, base + plan.dk, args->dk, a->kv_len, key_tiles,
		                   a->kv_heads, a->scale);
	if (status == STATUS_OK && p.sharing > 1)
		status = finish<D>(device, a->batch, base + plan.dv, args->dv, a->kv_len, key_tiles,
		                   a->kv_heads, 1);
	return status;
}

} // namespace

extern "C" const char *hopper_attention_backward_unsupported(const struct device *device,
                                                             const void *args)
{
	const auto *x = static_cast<const struct attention_backward_args *>(args);
	const struct attention_args *a = &x->forward;

	if (!is_known_mask(a->mask))
		return "an unknown mask";
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	return check_views(device, &a->q, &a->k, &a->v, &a->out, &x->dout, &x->dq, &x->dk, &x->dv,
	                   &a->gate, &a->out_ungated, &x->dgate, &a->own_value, &x->down_value);
}

extern "C" size_t hopper_attention_backward_workspace(const struct device *, const void *args)
{
	return make_plan(&static_cast<const struct attention_backward_args *>(args)->forward).size;
}

extern "C" enum status hopper_attention_backward(struct device *device, const void *args,
                                                 void *workspace)
{
	const auto *x = static_cast<const struct attention_backward_args *>(args);

	return x->forward.d_head == 64 ? launch<64>(device, x, workspace)
	                               : launch<128>(device, x, workspace);
}
