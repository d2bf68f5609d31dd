/*
 * Attention forward for sm_90a: d = 64 or 128, bf16 in and out, fp32 softmax; every mask
 * except the dilated one.
 *
 * One persistent block per multiprocessor: a producer warpgroup and two consumer warpgroups
 * (d = 64: three) of 64 query rows each.
 *   warp 0     ticket -> unit of query tiles; TMA: K and V alternately, tiles of 128
 *   warp 1 + w serves consumer warpgroup w: fetches queries and, for RAT, own values and gates of
 *              its next 64 rows, sends off its outputs
 *   consumer   S = Q K(n); O += P V(n+1) issued after it; softmax of S while the second product
 *              runs. O begins as the own value
 *
 * Shared memory: rings of two stages (d = 64: four) of keys and of values; of each consumer
 * queries, own values (then O before the gate) and gates (then O); units, own scores, barriers.
 *
 * Invariants. A mask is an interval of visible keys per query, so only tiles that an end of the
 * interval cuts are masked. RESIDENT: keys that fit in the ring stay there for a unit. The softmax
 * keeps the maximum it has while no power is huge; only where the powers of a tile sum to over 2^80
 * is it moved, and only where they sum to infinity are the scores formed again (by mma, which a
 * warp can do alone): nothing waits for a maximum. Units go out longest first, heads in groups
 * whose keys fit in L2; those that read the same keys side by side.
 *
 * Limit: the tensor pipe, busy 94% of its cycles at d = 128, T = 131072 (692 TFLOP/s at 1.43 GHz);
 * at T = 4096 (623 TFLOP/s) the start and the end of a query tile. docs/kernels/attention.md.
 * wgmma in: attention_kernel
 */
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"
#include "kernels/hopper/schedule.cuh"
#include "kernels/kernels.h"
#include "kernels/hopper/tensor_map.h"

using namespace hopper;

namespace
{

/* A thread's sum of a tile's powers over this and the maximum is moved. It leaves 2^47 to where
 * fp32 ends, for 2^20 keys and values of 2^27. Scores may grow by 55 before any maximum moves, and
 * by 87 before any are formed again. */
constexpr float HUGE_SUM = 1208925819614629174706176.0f; /* 2^80 */

constexpr int TILE_N = 128, MAX_STAGES = 4;

/* Of a head width: how many consumer warpgroups, key tiles in a ring, and the registers of a thread
 * of either kind. */
template <int D> struct shape {
	static constexpr int WARPGROUPS = D == 64 ? 3 : 2;
	static constexpr int TILE_M = 64 * WARPGROUPS;
	static constexpr int STAGES = D == 64 ? 4 : 2;
	static constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
	static constexpr int THREADS = 128 * (WARPGROUPS + 1);
	static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 40;
	static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : 232;
};

struct parameters {
	CUtensorMap q, k, v, own_value, gate, out, ungated;
	int seq_len, kv_len, n_heads, q_heads, pairs; /* pairs: batch * n_heads */
	int readers;                                  /* heads that read a head of keys */
	int window;
	uint32_t chunk_magic, chunk_shift; /* t / chunk = t * magic >> shift */
	enum mask mask;
	float scale_log2; /* scale * log2(e) */
	const float *own_score;
	bool has_gate, has_ungated;
	float *lse;
	int m_tiles, tiles_per_unit, units_per_pair;
	int heads_per_group; /* batch*head pairs whose K and V share L2 */
	int *ticket;
};

/* mbarriers, 8 bytes each; from BAR_ROWS on a set for each consumer warpgroup. */
enum {
	BAR_K_FULL,
	BAR_K_EMPTY = BAR_K_FULL + MAX_STAGES,
	BAR_V_FULL = BAR_K_EMPTY + MAX_STAGES,
	BAR_V_EMPTY = BAR_V_FULL + MAX_STAGES,
	BAR_UNIT_FULL = BAR_V_EMPTY + MAX_STAGES,
	BAR_UNIT_EMPTY = BAR_UNIT_FULL + SCHEDULE_SLOTS,
	BAR_ROWS = BAR_UNIT_EMPTY + SCHEDULE_SLOTS
};

enum {
	ROWS_Q_FULL,   /* queries and own scores are there */
	ROWS_Q_EMPTY,  /* and read */
	ROWS_OWN_FULL, /* own values are there */
	ROWS_OWN_EMPTY,
	ROWS_OUT_READY, /* the last output has left, the gates are there */
	ROWS_OUT_FULL,  /* outputs may leave */
	ROWS_COUNT
};

template <int D> struct shared_layout {
	static constexpr int ROWS_BYTES = 64 * D * 2; /* of a warpgroup's queries, values, gates */
	static constexpr int KEYS_BYTES = TILE_N * D * 2; /* of keys, values */
	static constexpr int Q = 0;
	static constexpr int K = Q + shape<D>::WARPGROUPS * ROWS_BYTES;
	static constexpr int V = K + shape<D>::STAGES * KEYS_BYTES;
	static constexpr int OWN =
	        V + shape<D>::STAGES * KEYS_BYTES; /* own values, then O before the gate */
	static constexpr int OUT = OWN + shape<D>::WARPGROUPS * ROWS_BYTES; /* gates, then O */
	static constexpr int BARRIERS = OUT + shape<D>::WARPGROUPS * ROWS_BYTES;
	static constexpr int BARRIER_COUNT = BAR_ROWS + shape<D>::WARPGROUPS * ROWS_COUNT;
	static constexpr int UNITS = (BARRIERS + BARRIER_COUNT * 8 + 15) / 16 * 16;
	static constexpr int SCORES = UNITS + 16 * SCHEDULE_SLOTS; /* own scores */
	static constexpr int BYTES =
	        SCORES + shape<D>::TILE_M * 4 + 1024; /* 1024: to align the base */
};

/* What one ticket stands for: `count` query tiles of a sequence and head, from tile m down. */
struct unit {
	static constexpr int BYTES = 16; /* in shared memory */

	int m, count, pair;

	__device__ void store(uint32_t shared) const
	{
		shared_store(shared, m);
		shared_store(shared + 4, count);
		shared_store(shared + 8, pair);
	}

	__device__ void load(uint32_t shared)
	{
		m = shared_load(shared);
		count = shared_load(shared + 4);
		pair = shared_load(shared + 8);
	}

	__device__ bool is_work() const
	{
		return count > 0;
	}
};

/* Key tiles that a query tile sees, visited from the first down to the last; none if first < last.
 */
struct span {
	int first, last;
};

/* Where the 64 rows of a warpgroup are. */
struct place {
	int token, b, h;
};

/* First and last visible key of query t; none visible: last < first. */
__device__ __forceinline__ void visible(const parameters &p, int t, int &first, int &last)
{
	const int end = p.kv_len - 1;

	first = 0;
	last = end;
	if (p.mask == MASK_CHUNK) {
		const uint64_t chunk = static_cast<uint64_t>(t) * p.chunk_magic >> p.chunk_shift;

		last = min(static_cast<int>(chunk) - 1, end);
	} else if (p.mask != MASK_FULL) {
		last = min(t, end);
		if (p.mask == MASK_WINDOW)
			first = max(t - p.window, 0);
	}
}

__device__ __forceinline__ unit locate(const parameters &p, int number)
{
	const int group = number / (p.heads_per_group * p.units_per_pair);
	const int first_pair = group * p.heads_per_group;
	const int in_group = min(p.heads_per_group, p.pairs - first_pair);
	const int within = number - first_pair * p.units_per_pair;
	const int pair = first_pair + within % in_group;
	const int m = (p.units_per_pair - 1 - within / in_group) * p.tiles_per_unit;
	unit u;

	u.count = min(p.tiles_per_unit, p.m_tiles - m);
	u.m = m + u.count - 1;
	u.pair = pair;
	return u;
}

template <int D> __device__ __forceinline__ span key_tiles(const parameters &p, int m)
{
	constexpr int TILE_M = shape<D>::TILE_M;
	int first, last, unused;

	visible(p, m * TILE_M, first, unused);
	visible(p, min(m * TILE_M + TILE_M, p.seq_len) - 1, unused, last);
	return {last >= 0 ? last / TILE_N : -1, first / TILE_N};
}

/* A tile of `rows` x D, as D/64 swizzled panels. */
template <int D, int rows>
__device__ __forceinline__ void load_tile(uint32_t stage, uint32_t full, const CUtensorMap *map,
                                          int token, int head, int batch)
{
	barrier_arrive_expect(full, rows * D * 2);
	load_panels<D, rows>(stage, full, map, token, head, batch);
}

template <int D>
__device__ __forceinline__ void store_rows(const CUtensorMap *map, uint32_t rows, int token,
                                           int head, int batch)
{
#pragma unroll
	for (int panel = 0; panel < D / 64; panel++)
		tensor_store(map, rows + panel * 64 * 128, panel * 64, token, head, batch);
}

template <int D>
using schedule =
        unit_queue<unit, turn_ring<SCHEDULE_SLOTS>, shared_layout<D>::BARRIERS + BAR_UNIT_FULL * 8,
                   shared_layout<D>::UNITS>;

/* The producer's side of one ring: its stages and barriers are at fixed places. */
template <int D, int STAGES_AT, int FULL, int EMPTY>
struct load_ring : turn_ring<shape<D>::STAGES> {
	__device__ uint32_t next_free(uint32_t shared) const
	{
		const uint32_t barrier = shared + shared_layout<D>::BARRIERS + this->slot() * 8;

		barrier_wait(barrier + EMPTY * 8, this->parity() ^ 1);
		return barrier + FULL * 8;
	}

	__device__ void load(uint32_t shared, const CUtensorMap *map, int n, int b, int h)
	{
		const uint32_t full = next_free(shared);

		load_tile<D, TILE_N>(shared + STAGES_AT +
		                             this->slot() * shared_layout<D>::KEYS_BYTES,
		                     full, map, n * TILE_N, h, b);
		this->turn++;
	}

	/* A turn of a slot that nobody will read. */
	__device__ void skip(uint32_t shared)
	{
		barrier_arrive(next_free(shared));
		this->turn++;
	}
};

/* Thread 0: tickets, keys and values. */
template <int D, bool RESIDENT>
__device__ __forceinline__ void produce(const parameters &p, uint32_t shared)
{
	using layout = shared_layout<D>;
	const int n_units = p.units_per_pair * p.pairs;
	const unit end = {0, 0, 0};
	schedule<D> units = {shared};
	load_ring<D, layout::K, BAR_K_FULL, BAR_K_EMPTY> k;
	load_ring<D, layout::V, BAR_V_FULL, BAR_V_EMPTY> v;
	unit u = locate(p, blockIdx.x);

	units.put(u);
	while (u.count > 0) {
		const int number = gridDim.x + atomicAdd(p.ticket, 1);
		const unit next = number < n_units ? locate(p, number) : end;
		const span n = key_tiles<D>(p, u.m);
		const int b = u.pair / p.n_heads, h = (u.pair - b * p.n_heads) / p.readers;

		units.put(next);
		if (RESIDENT) {
			/* Tile i in slot i, for all query tiles of the unit. */
			const span lowest = key_tiles<D>(p, u.m - u.count + 1);
#pragma unroll 1
			for (int i = 0; i < shape<D>::STAGES; i++) {
				if (i >= lowest.last && i <= n.first) {
					k.load(shared, &p.k, i, b, h);
					v.load(shared, &p.v, i, b, h);
				} else {
					k.skip(shared);
					v.skip(shared);
				}
			}
		} else if (n.first >= n.last) {
			k.load(shared, &p.k, n.first, b, h);
#pragma unroll 1 /* unrolled it outgrows the producer's registers */
			for (int i = n.first; i > n.last; i--) {
				k.load(shared, &p.k, i - 1, b, h);
				v.load(shared, &p.v, i, b, h);
			}
			v.load(shared, &p.v, n.last, b, h);
		}
		u = next;
	}
}

/*
 * Warp 1 + w: the rows of consumer warpgroup w. Queries, own scores and own
 * values of a tile come while the tile before is being worked on, and so do
 * the gates, once that tile's outputs, which take their place, have left.
 */
template <int D> struct server {
	using layout = shared_layout<D>;

	const parameters &p;
	uint32_t shared;
	int warpgroup;
	uint32_t parity; /* of what the consumers leave for the next tile */

	__device__ uint32_t barrier(int which) const
	{
		return shared + layout::BARRIERS + (BAR_ROWS + warpgroup * ROWS_COUNT + which) * 8;
	}

	__device__ uint32_t rows(int base) const
	{
		return shared + base + warpgroup * layout::ROWS_BYTES;
	}

	__device__ void fetch_queries(const place &at, const span &n) const;
	__device__ void fetch_own_values(const place &at) const;
	__device__ void send(const place &at) const;
	__device__ void fetch_gates(const place &at) const;
	__device__ void run();
};

/* By the whole warp: own scores, in base 2, then the queries; nothing of a tile without keys. */
template <int D> __device__ void server<D>::fetch_queries(const place &at, const span &n) const
{
	const uint32_t scores = shared + layout::SCORES + warpgroup * 64 * 4;
	const int lane = threadIdx.x % 32;
	float score[2];

	if (p.own_score) {
		const float *from =
		        p.own_score + static_cast<int64_t>(at.b) * p.seq_len * p.n_heads + at.h;

#pragma unroll
		for (int r = 0; r < 2; r++)
			score[r] = LOG2E *
			           from[min(at.token + lane + 32 * r, p.seq_len - 1) * p.n_heads];
	}
	barrier_wait(barrier(ROWS_Q_EMPTY), parity);
	if (p.own_score) {
		shared_store(scores + lane * 4, __float_as_int(score[0]));
		shared_store(scores + (lane + 32) * 4, __float_as_int(score[1]));
	}
	__syncwarp();
	if (lane != 0)
		return;
	if (n.first >= n.last)
		load_tile<D, 64>(rows(layout::Q), barrier(ROWS_Q_FULL), &p.q, at.token,
		                 at.h % p.q_heads, at.b);
	else
		barrier_arrive(barrier(ROWS_Q_FULL));
}

template <int D> __device__ void server<D>::fetch_own_values(const place &at) const
{
	if (p.own_score && threadIdx.x % 32 == 0) {
		barrier_wait(barrier(ROWS_OWN_EMPTY), parity);
		load_tile<D, 64>(rows(layout::OWN), barrier(ROWS_OWN_FULL), &p.own_value, at.token,
		                 at.h, at.b);
	}
}

/* The outputs of a tile; returns when their place is free. */
template <int D> __device__ void server<D>::send(const place &at) const
{
	if (threadIdx.x % 32 == 0) {
		barrier_wait(barrier(ROWS_OUT_FULL), parity);
		store_rows<D>(&p.out, rows(layout::OUT), at.token, at.h, at.b);
		if (p.has_ungated)
			store_rows<D>(&p.ungated, rows(layout::OWN), at.token, at.h, at.b);
		store_commit();
		store_wait_read();
	}
}

template <int D> __device__ void server<D>::fetch_gates(const place &at) const
{
	if (threadIdx.x % 32 != 0)
		return;
	if (p.has_gate)
		load_tile<D, 64>(rows(layout::OUT), barrier(ROWS_OUT_READY), &p.gate, at.token,
		                 at.h, at.b);
	else
		barrier_arrive(barrier(ROWS_OUT_READY));
}

template <int D> __device__ __forceinline__ void server<D>::run()
{
	schedule<D> units = {shared};
	unit u = {0, 0, 0};
	place before = {-1, 0, 0};

	while (true) {
		const bool more = u.count > 0 || units.get(u);
		const int b = u.pair / p.n_heads, h = u.pair - b * p.n_heads;
		const place now = {u.m * shape<D>::TILE_M + warpgroup * 64, b, h};

		if (more) {
			if (!p.has_ungated)
				fetch_own_values(now);
			fetch_queries(now, key_tiles<D>(p, u.m));
		}
		if (before.token >= 0)
			send(before);
		if (!more)
			return;
		if (p.has_ungated)
			fetch_own_values(now);
		fetch_gates(now);
		before = now;
		u.m--;
		u.count--;
		parity ^= 1;
	}
}

/* S (64 rows, COUNT = 64 or 32 floats of a thread: 128 or the first 64 columns) = Q K^T of one
 * stage. Descriptors count in 16 bytes. */
template <int D, int COUNT>
__device__ __forceinline__ void issue_scores(float (&s)[COUNT], uint64_t q, uint64_t k)
{
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < D / 16; step++) {
		const int panel = step / 4, within = step % 4 * 32;

		wgmma_ss(s, q + (panel * 64 * 128 + within) / 16,
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

/* Hides what queries `row` and `row` + 8 do not see; `column` is the thread's first key. */
template <int COUNT>
__device__ __forceinline__ void apply_mask(float (&s)[COUNT], const parameters &p, int row,
                                           int column)
{
	int first[2], last[2];

	visible(p, row, first[0], last[0]);
	visible(p, row + 8, first[1], last[1]);
	last[0] -= column;
	last[1] -= column;
#pragma unroll
	for (int i = 0; i < COUNT; i++) {
		if (8 * (i >> 2) + (i & 1) > last[(i >> 1) & 1])
			s[i] = -INFINITY;
	}
	if (p.mask == MASK_WINDOW) {
		first[0] -= column;
		first[1] -= column;
#pragma unroll
		for (int i = 0; i < COUNT; i++) {
			if (8 * (i >> 2) + (i & 1) < first[(i >> 1) & 1])
				s[i] = -INFINITY;
		}
	}
}

/* s -> exp2(s*scale - max) with the maximum up to date; gives the factor for O. */
template <int COUNT>
__device__ __forceinline__ void exponentiate(float (&s)[COUNT], softmax &state, float (&rescale)[2],
                                             float scale)
{
#pragma unroll
	for (int row = 0; row < 2; row++) {
		float top[4] = {s[2 * row], s[2 * row + 1], s[2 * row + 4], s[2 * row + 5]};
#pragma unroll
		for (int i = 8; i < COUNT; i += 8) {
			top[0] = fmaxf(top[0], s[i + 2 * row]);
			top[1] = fmaxf(top[1], s[i + 2 * row + 1]);
			top[2] = fmaxf(top[2], s[i + 2 * row + 4]);
			top[3] = fmaxf(top[3], s[i + 2 * row + 5]);
		}
		float m = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
		m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
		m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
		m = fmaxf(m * scale, state.max[row]);
		/* A row may see nothing of its first tiles: then all powers are of -inf, not NaN.
		 */
		const float safe = m == -INFINITY ? 0.0f : m;
		rescale[row] = exp2_approx(state.max[row] - safe);
		state.max[row] = m;
		float sum[2] = {0, 0};
#pragma unroll
		for (int i = 0; i < COUNT; i += 4) {
			s[i + 2 * row] = exp2_approx(fmaf(s[i + 2 * row], scale, -safe));
			s[i + 2 * row + 1] = exp2_approx(fmaf(s[i + 2 * row + 1], scale, -safe));
			sum[0] += s[i + 2 * row];
			sum[1] += s[i + 2 * row + 1];
		}
		state.sum[row] = fmaf(state.sum[row], rescale[row], sum[0] + sum[1]);
	}
}

/*
 * The same with the maximum as it was, which is as good while no power is huge;
 * or false, with the powers in s, and no sum taken. (A maximum of -inf gives NaN or inf, and
 * false.)
 */
template <int COUNT>
__device__ __forceinline__ bool exponentiate_lazily(float (&s)[COUNT], softmax &state, float scale)
{
	float sum[2][2] = {{0, 0}, {0, 0}};

#pragma unroll
	for (int i = 0; i < COUNT; i++) {
		const int row = (i >> 1) & 1;

		s[i] = exp2_approx(fmaf(s[i], scale, -state.max[row]));
		sum[row][i & 1] += s[i];
	}
	sum[0][0] += sum[0][1];
	sum[1][0] += sum[1][1];
	if (!__all_sync(~0u, sum[0][0] <= HUGE_SUM && sum[1][0] <= HUGE_SUM))
		return false;
	state.sum[0] += sum[0][0];
	state.sum[1] += sum[1][0];
	return true;
}

/*
 * Powers of such a maximum, divided by the power of two in their sum, which changes no digit of
 * them; the maximum follows. False where a power is infinite or NaN.
 */
template <int COUNT>
__device__ __forceinline__ bool move_maximum(float (&s)[COUNT], softmax &state, float (&rescale)[2])
{
	float sum[2] = {0, 0};

#pragma unroll
	for (int i = 0; i < COUNT; i++)
		sum[(i >> 1) & 1] += s[i];
	if (!__all_sync(~0u, sum[0] < INFINITY && sum[1] < INFINITY))
		return false;
#pragma unroll
	for (int row = 0; row < 2; row++) {
		float most = fmaxf(1, sum[row]);

		most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
		most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
		/* 2^-126 is the least that is no subnormal number. */
		const int exponent = min((__float_as_int(most) >> 23) - 127, 126);
		rescale[row] = __int_as_float((127 - exponent) << 23);
		state.max[row] += static_cast<float>(exponent);
		state.sum[row] = (state.sum[row] + sum[row]) * rescale[row];
#pragma unroll
		for (int i = 0; i < COUNT; i += 4) {
			s[i + 2 * row] *= rescale[row];
			s[i + 2 * row + 1] *= rescale[row];
		}
	}
	return true;
}

__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[32], const float (&s)[64])
{
#pragma unroll
	for (int i = 0; i < 32; i++)
		p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

/* Address in a swizzled 64-row tile of the 16 x 16 block of this warp's rows that starts at
 * column 16j, as stmatrix and ldmatrix (x4) want it from each lane. */
__device__ __forceinline__ uint32_t block_address(uint32_t tile, int j)
{
	const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
	const int row = warp * 16 + (lane & 15), piece = 2 * (j % 4) + (lane >> 4);

	return tile + (j / 4) * 64 * 128 + swizzle_128(row * 128 + piece * 16);
}

/* The first 64 columns of S. */
__device__ __forceinline__ float (&low_half(float (&s)[64]))[32]
{
	return reinterpret_cast<float(&)[32]>(s);
}

/* Eight columns of S, as an accumulator of mma. */
__device__ __forceinline__ float (&part(float (&s)[64], int i))[4]
{
	return reinterpret_cast<float(&)[4]>(s[4 * i]);
}

/*
 * S of this warp's 16 rows once more, by the older instructions, which need no
 * other warp; in the same registers as issue_scores leaves it.
 */
template <int D>
__device__ __forceinline__ void repeat_scores(float (&s)[64], uint32_t q, uint32_t k)
{
	const int lane = threadIdx.x % 32, key = (lane >> 4) * 8 + (lane & 7);

#pragma unroll
	for (int i = 0; i < 64; i++)
		s[i] = 0;
#pragma unroll 1
	for (int step = 0; step < D / 16; step++) {
		const int piece = 2 * (step % 4) + (lane >> 3 & 1);
		const uint32_t block =
		        k + step / 4 * TILE_N * 128 + swizzle_128(key * 128 + piece * 16);
		uint32_t a[4], b[4];

		load_matrix_x4(block_address(q, step), a[0], a[1], a[2], a[3]);
#pragma unroll
		for (int j = 0; j < TILE_N / 16; j++) {
			load_matrix_x4(block + j * 16 * 128, b[0], b[1], b[2], b[3]);
			mma_16816(part(s, 2 * j), a[0], a[1], a[2], a[3], b[0], b[1]);
			mma_16816(part(s, 2 * j + 1), a[0], a[1], a[2], a[3], b[2], b[3]);
		}
	}
}

/* What a consumer warpgroup carries from tile to tile. */
template <int D, bool RESIDENT> struct consumer {
	using layout = shared_layout<D>;
	static constexpr int TILE_M = shape<D>::TILE_M;

	const parameters &p;
	uint32_t shared, rows; /* rows: this warpgroup's barriers */
	uint32_t own, out;     /* and tiles */
	/* Key tile being read; RESIDENT: tile n is in slot n, for a unit. */
	turn_ring<shape<D>::STAGES> keys;
	uint32_t parity; /* of this warpgroup's barriers */

	/* One arrival per warp: each warp vouches for its own reads. */
	__device__ void release(uint32_t barrier) const
	{
		if (threadIdx.x % 32 == 0)
			barrier_arrive(barrier);
	}

	/* Key tile n, the one before `back` others; waits for it and moves the operand there. */
	__device__ uint64_t wait_tile(int full, uint64_t operand, int n, int back = 0) const
	{
		const uint32_t slot = RESIDENT ? n : keys.slot(back);
		const uint32_t parity = RESIDENT ? keys.turn % 2 : keys.parity(back);

		barrier_wait(shared + layout::BARRIERS + (full + slot) * 8, parity);
		return operand + slot * (layout::KEYS_BYTES / 16);
	}

	__device__ void release_tile(int empty, int back = 0) const
	{
		if (!RESIDENT)
			release(shared + layout::BARRIERS + (empty + keys.slot(back)) * 8);
	}

	/* Every slot at the end of a unit; also one not read must not be left before it was given.
	 */
	__device__ void release_all(int full, int empty) const
	{
#pragma unroll
		for (int n = 0; RESIDENT && n < shape<D>::STAGES; n++) {
			wait_tile(full, 0, n);
			release(shared + layout::BARRIERS + (empty + n) * 8);
		}
	}

	/* Of the key tiles of query tile m those that this warpgroup sees something of; at least
	 * one. */
	__device__ span seen_by(int m, const span &n) const
	{
		const int row = m * TILE_M + warpgroup_index() * 64;
		int lowest, highest, unused;

		if (row >= p.seq_len)
			return {n.first, n.first};
		visible(p, row, lowest, unused);
		visible(p, row + 63, unused, highest);
		highest = min(max(highest / TILE_N, n.last), n.first);
		return {highest, max(min(lowest / TILE_N, highest), n.last)};
	}

	/* Key tiles that only other warpgroups see. */
	__device__ void skip(int count)
	{
#pragma unroll 1
		for (; count > 0; count--) {
			wait_tile(BAR_K_FULL, 0, 0);
			release_tile(BAR_K_EMPTY);
			wait_tile(BAR_V_FULL, 0, 0);
			release_tile(BAR_V_EMPTY);
			keys.turn++;
		}
	}

	__device__ void begin(float (&o)[D / 2]);
	__device__ void attend(const unit &u, const span &n_tiles, float (&o)[D / 2],
	                       softmax &state);
	__device__ void settle(float (&o)[D / 2], uint32_t (&probabilities)[32],
	                       const float (&s)[64], const float (&rescale)[2], bool in_flight);
	__device__ void finish(const unit &u, float (&o)[D / 2], softmax &state);
	__device__ void run(unit u);
};

/* O before any key: the own value, whose weight is 1 when its score is the maximum; or 0. */
template <int D, bool RESIDENT>
__device__ __forceinline__ void consumer<D, RESIDENT>::begin(float (&o)[D / 2])
{
	if (p.own_score) {
		uint32_t loaded = 0;

		barrier_wait(rows + ROWS_OWN_FULL * 8, parity);
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			uint32_t value[4];

			load_matrix_x4(block_address(own, j), value[0], value[1], value[2],
			               value[3]);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				o[8 * j + 2 * i] = low_bf16(value[i]);
				o[8 * j + 2 * i + 1] = high_bf16(value[i]);
			}
			loaded |= value[0];
		}
		/* The next own values come by TMA, which does not wait for plain reads. */
		fence_async_proxy();
		warp_arrive_read(rows + ROWS_OWN_EMPTY * 8, loaded);
	} else {
#pragma unroll
		for (int i = 0; i < D / 2; i++)
			o[i] = 0;
	}
}

template <int D, bool RESIDENT>
__device__ __forceinline__ void consumer<D, RESIDENT>::attend(const unit &u, const span &n_tiles,
                                                              float (&o)[D / 2], softmax &state)
{
	const int warpgroup = warpgroup_index(), warp = threadIdx.x / 32 % 4;
	const int lane = threadIdx.x % 32;
	const uint32_t q_tile = shared + layout::Q + warpgroup * layout::ROWS_BYTES;
	const uint64_t q = matrix_descriptor(q_tile, 16);
	const uint64_t k_operand = matrix_descriptor(shared + layout::K, 16);
	const uint64_t v_operand = matrix_descriptor(shared + layout::V, 128 * 128);
	const int row = u.m * TILE_M + warpgroup * 64 + warp * 16 + lane / 4;
	int wg_first, wg_last, highest, unused;
	float s[64], rescale[2];
	uint32_t probabilities[32];
	uint64_t operand;

	/* Tiles inside [wg_first, wg_last] are visible to all 64 rows. */
	visible(p, u.m * TILE_M + warpgroup * 64, unused, wg_last);
	visible(p, u.m * TILE_M + warpgroup * 64 + 63, wg_first, highest);
	const auto cut = [&](int n) {
		return n * TILE_N + TILE_N - 1 > wg_last || n * TILE_N < wg_first;
	};

	/* Whether every row has a maximum; then it moves only where it must. */
	const auto has_maximum = [&]() {
		return __all_sync(~0u, state.max[0] != -INFINITY && state.max[1] != -INFINITY);
	};
	/* Scores of key tile n, all or the first half of them, to probabilities. */
	const auto soften = [&](auto &scores, int n, bool lazily) {
		const int column = n * TILE_N + 2 * (lane & 3);

		if (cut(n))
			apply_mask(scores, p, row, column);
		rescale[0] = rescale[1] = 1;
		if (!lazily || !exponentiate_lazily(scores, state, p.scale_log2)) {
			const bool moved = lazily && move_maximum(scores, state, rescale);

			if (lazily && !moved) {
				const uint32_t slot = RESIDENT ? n : keys.slot();

				repeat_scores<D>(s, q_tile,
				                 shared + layout::K + slot * layout::KEYS_BYTES);
				if (cut(n))
					apply_mask(scores, p, row, column);
			}
			if (!moved)
				exponentiate(scores, state, rescale, p.scale_log2);
		}
		release_tile(BAR_K_EMPTY);
	};

	begin(o);
	pin(o);
	operand = wait_tile(BAR_K_FULL, k_operand, n_tiles.first);
	pin(s);
	if (RESIDENT && highest < n_tiles.first * TILE_N + 64) {
		float low[32];

		pin(low);
		issue_scores<D>(low, q, operand);
		wgmma_wait<0>();
		pin(low);
#pragma unroll
		for (int i = 0; i < 32; i++)
			s[i] = low[i];
		soften(low_half(s), n_tiles.first, has_maximum());
#pragma unroll
		for (int i = 32; i < 64; i++)
			s[i] = 0;
	} else {
		issue_scores<D>(s, q, operand);
		wgmma_wait<0>();
		pin(s);
		soften(s, n_tiles.first, has_maximum());
	}
	pin(s);

	/*
	 * The wait for the last product stands at the head of the loop, after
	 * the back edge: anywhere in the block of the exponentials ptxas moves it
	 * in front of them, and the product then runs with nothing beside it.
	 */
	for (int n = n_tiles.first - 1; n >= n_tiles.last; n--) {
		settle(o, probabilities, s, rescale, n < n_tiles.first - 1);
		if (!RESIDENT)
			keys.turn++;
		const bool lazily = has_maximum();
		operand = wait_tile(BAR_K_FULL, k_operand, n);
		pin(s);
		issue_scores<D>(s, q, operand);
		operand = wait_tile(BAR_V_FULL, v_operand, n + 1, 1);
		pin(o);
		pin(probabilities);
		issue_values<D>(o, probabilities, operand);
		wgmma_wait<1>();
		pin(s);
		soften(s, n, lazily);
		pin(s);
	}
	settle(o, probabilities, s, rescale, n_tiles.first > n_tiles.last);
	release(rows + ROWS_Q_EMPTY * 8);
	if (u.count == 1)
		release_all(BAR_K_FULL, BAR_K_EMPTY);
	operand = wait_tile(BAR_V_FULL, v_operand, n_tiles.last);
	pin(o);
	pin(probabilities);
	issue_values<D>(o, probabilities, operand);
	wgmma_wait<0>();
	pin(o);
	release_tile(BAR_V_EMPTY);
	if (!RESIDENT)
		keys.turn++;
}

/* After the product in flight, if any: O to the new maximum, S to the next product's operand. */
template <int D, bool RESIDENT>
__device__ __forceinline__ void
consumer<D, RESIDENT>::settle(float (&o)[D / 2], uint32_t (&probabilities)[32],
                              const float (&s)[64], const float (&rescale)[2], bool in_flight)
{
	wgmma_wait<0>();
	pin(o);
	pin(probabilities);
	if (in_flight)
		release_tile(BAR_V_EMPTY, 1);
	pack_probabilities(probabilities, s);
	if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
		for (int i = 0; i < D / 2; i++)
			o[i] *= rescale[(i >> 1) & 1];
	}
}

/*
 * O / sum, then the gate; the log of the sum where wanted. Outputs take the
 * place of what was read from there, block by block, and the warp that serves
 * this warpgroup stores them.
 */
template <int D, bool RESIDENT>
__device__ __forceinline__ void consumer<D, RESIDENT>::finish(const unit &u, float (&o)[D / 2],
                                                              softmax &state)
{
	const int warpgroup = warpgroup_index(), warp = threadIdx.x / 32 % 4;
	const int lane = threadIdx.x % 32;
	const int row = u.m * TILE_M + warpgroup * 64 + warp * 16 + lane / 4;
	float sum[2], inverse[2];

#pragma unroll
	for (int r = 0; r < 2; r++) {
		sum[r] = state.sum[r];
		sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
		sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
		inverse[r] = reciprocal_approx(sum[r]);
		if (p.lse && lane % 4 == 0 && row + 8 * r < p.seq_len)
			p.lse[static_cast<int64_t>(u.pair) * p.seq_len + row + 8 * r] =
			        (state.max[r] + log2f(sum[r])) * 0.693147181f;
	}
	barrier_wait(rows + ROWS_OUT_READY * 8, parity);
	if (p.has_ungated) {
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			float scaled[8];

#pragma unroll
			for (int i = 0; i < 8; i++)
				scaled[i] = o[8 * j + i] * inverse[(i >> 1) & 1];
			store_block(block_address(own, j), scaled);
		}
	}
	if (p.has_gate) {
		uint32_t gate[D / 4];

#pragma unroll
		for (int j = 0; j < D / 16; j++)
			load_matrix_x4(block_address(out, j), gate[4 * j], gate[4 * j + 1],
			               gate[4 * j + 2], gate[4 * j + 3]);
#pragma unroll
		for (int i = 0; i < D / 2; i++) {
			const uint32_t pair = gate[i >> 1];
			const float x = i & 1 ? high_bf16(pair) : low_bf16(pair);
			const float row_sum = sum[(i >> 1) & 1];

			/* sigmoid(x) / sum = 1 / (sum + sum e^-x) */
			o[i] *= reciprocal_approx(fmaf(row_sum, exp2_approx(x * -LOG2E), row_sum));
		}
#pragma unroll
		for (int j = 0; j < D / 16; j++)
			store_block(block_address(out, j), &o[8 * j]);
	} else {
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
#pragma unroll
			for (int i = 0; i < 8; i++)
				o[8 * j + i] *= inverse[(i >> 1) & 1];
			store_block(block_address(out, j), &o[8 * j]);
		}
	}
	fence_async_proxy();
	__syncwarp();
	release(rows + ROWS_OUT_FULL * 8);
}

/* The query tiles of a unit. */
template <int D, bool RESIDENT> __device__ __forceinline__ void consumer<D, RESIDENT>::run(unit u)
{
	const int warpgroup = warpgroup_index(), warp = threadIdx.x / 32 % 4;
	const int lane = threadIdx.x % 32;

#pragma unroll 1
	for (; u.count > 0; u.count--, u.m--) {
		const span n = key_tiles<D>(p, u.m);
		float o[D / 2];
		softmax state = {{-INFINITY, -INFINITY}, {0, 0}};

		barrier_wait(rows + ROWS_Q_FULL * 8, parity);
		if (p.own_score) {
#pragma unroll
			for (int r = 0; r < 2; r++) {
				state.max[r] = __int_as_float(shared_load(
				        shared + layout::SCORES +
				        (warpgroup * 64 + warp * 16 + lane / 4 + 8 * r) * 4));
				/* A row that sees no key has nothing else to carry a NaN. */
				state.sum[r] = isnan(state.max[r]) ? state.max[r]
				               : lane % 4 == 0     ? 1.0f
				                                   : 0.0f;
			}
			__syncwarp();
		}
		if (n.first >= n.last && TILE_M > TILE_N && !RESIDENT) {
			const span seen = seen_by(u.m, n);

			skip(n.first - seen.first);
			attend(u, seen, o, state);
			skip(seen.last - n.last);
		} else if (n.first >= n.last) {
			attend(u, n, o, state);
		} else {
			release(rows + ROWS_Q_EMPTY * 8);
			if (u.count == 1)
				release_all(BAR_K_FULL, BAR_K_EMPTY);
			begin(o);
		}
		if (u.count == 1)
			release_all(BAR_V_FULL, BAR_V_EMPTY);
		finish(u, o, state);
		parity ^= 1;
	}
	if (RESIDENT)
		keys.turn++;
}

template <int D, bool RESIDENT>
__global__ void __launch_bounds__(shape<D>::THREADS, 1)
        attention_kernel(const __grid_constant__ parameters p)
{
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);
	const uint32_t barriers = shared + shared_layout<D>::BARRIERS;
	const int warp = threadIdx.x / 32;

	if (threadIdx.x == 0) {
		for (int i = 0; i < MAX_STAGES; i++) {
			barrier_init(barriers + (BAR_K_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_K_EMPTY + i) * 8, shape<D>::CONSUMER_WARPS);
			barrier_init(barriers + (BAR_V_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_V_EMPTY + i) * 8, shape<D>::CONSUMER_WARPS);
		}
		for (int i = 0; i < SCHEDULE_SLOTS; i++) {
			barrier_init(barriers + (BAR_UNIT_FULL + i) * 8, 1);
			barrier_init(barriers + (BAR_UNIT_EMPTY + i) * 8,
			             shape<D>::CONSUMER_WARPS + shape<D>::WARPGROUPS);
		}
		for (int i = 0; i < shape<D>::WARPGROUPS; i++) {
			const uint32_t rows = barriers + (BAR_ROWS + i * ROWS_COUNT) * 8;

			barrier_init(rows + ROWS_Q_FULL * 8, 1);
			barrier_init(rows + ROWS_Q_EMPTY * 8, 4);
			barrier_init(rows + ROWS_OWN_FULL * 8, 1);
			barrier_init(rows + ROWS_OWN_EMPTY * 8, 4);
			barrier_init(rows + ROWS_OUT_READY * 8, 1);
			barrier_init(rows + ROWS_OUT_FULL * 8, 4);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (warp < 4) {
		registers_decrease<shape<D>::PRODUCER_REGISTERS>();
		if (threadIdx.x == 0)
			produce<D, RESIDENT>(p, shared);
		else if (warp > 0 && warp <= shape<D>::WARPGROUPS)
			server<D>{p, shared, warp - 1, 1}.run();
	} else {
		registers_increase<shape<D>::CONSUMER_REGISTERS>();
		using layout = shared_layout<D>;
		const int warpgroup = warpgroup_index();
		consumer<D, RESIDENT> c = {p, shared,
		                           barriers + (BAR_ROWS + warpgroup * ROWS_COUNT) * 8,
		                           shared + layout::OWN + warpgroup * layout::ROWS_BYTES,
		                           shared + layout::OUT + warpgroup * layout::ROWS_BYTES};
		schedule<D> units = {shared};
		unit u;

		c.parity = 0;
		while (units.get(u))
			c.run(u);
	}
}

/* Bytes of keys and values to keep in L2 at a time. */
constexpr int64_t L2_BUDGET = 32 << 20;

/* Multiplier and shift that divide any t < 2^31 by `chunk`. */
void set_chunk(parameters &p, int64_t chunk)
{
	uint32_t log2 = 0;

	while ((static_cast<int64_t>(1) << log2) < chunk)
		log2++;
	p.chunk_shift = 31 + log2;
	p.chunk_magic = static_cast<uint32_t>(
	        ((static_cast<uint64_t>(1) << p.chunk_shift) + chunk - 1) / chunk);
}

/* Query tiles of a ticket: as many as leave every block a dozen tickets. */
int tiles_per_unit(const struct device *device, int64_t m_tiles, int64_t pairs)
{
	const int64_t share = m_tiles * pairs / (12 * cuda_sm_count(device));

	return static_cast<int>(share < 1 ? 1 : share < m_tiles ? share : m_tiles);
}

enum status fill_parameters(const struct device *device, parameters &p,
                            const struct attention_args *a, int tile_m, bool resident, int *ticket)
{
	enum status status = STATUS_OK;
	const auto encode = [&](CUtensorMap *map, const struct view *view, int64_t tokens,
	                        int64_t heads, int box) {
		if (status == STATUS_OK)
			status = tensor_map_encode(map, view, a->batch, tokens, heads, a->d_head,
			                           box);
	};

	encode(&p.q, &a->q, a->seq_len, a->q_heads, 64);
	encode(&p.k, &a->k, a->kv_len, a->kv_heads, TILE_N);
	encode(&p.v, &a->v, a->kv_len, a->kv_heads, TILE_N);
	encode(&p.out, &a->out, a->seq_len, a->n_heads, 64);
	if (a->own_score)
		encode(&p.own_value, &a->own_value, a->seq_len, a->n_heads, 64);
	if (a->gate.data)
		encode(&p.gate, &a->gate, a->seq_len, a->n_heads, 64);
	if (a->out_ungated.data)
		encode(&p.ungated, &a->out_ungated, a->seq_len, a->n_heads, 64);
	p.seq_len = static_cast<int>(a->seq_len);
	p.kv_len = static_cast<int>(a->kv_len);
	p.n_heads = static_cast<int>(a->n_heads);
	p.q_heads = static_cast<int>(a->q_heads);
	p.pairs = static_cast<int>(a->batch * a->n_heads);
	p.readers = static_cast<int>(a->n_heads / a->kv_heads);
	p.window = static_cast<int>(a->window);
	set_chunk(p, a->mask == MASK_CHUNK ? a->chunk : 1);
	p.mask = a->mask;
	p.scale_log2 = a->scale * 1.44269504f;
	p.own_score = a->own_score;
	p.has_gate = a->gate.data != NULL;
	p.has_ungated = a->out_ungated.data != NULL;
	p.lse = a->lse;
	p.m_tiles = static_cast<int>((a->seq_len + tile_m - 1) / tile_m);
	const int most = resident ? tiles_per_unit(device, p.m_tiles, p.pairs) : 1;
	p.units_per_pair = (p.m_tiles + most - 1) / most;
	p.tiles_per_unit = (p.m_tiles + p.units_per_pair - 1) / p.units_per_pair;
	p.units_per_pair = (p.m_tiles + p.tiles_per_unit - 1) / p.tiles_per_unit;
	const int64_t pair_bytes = a->kv_len * a->d_head * 4;
	const int64_t fit = pair_bytes ? L2_BUDGET * p.readers / pair_bytes : p.pairs;
	const int64_t wave = (cuda_sm_count(device) + p.units_per_pair - 1) / p.units_per_pair;
	const int64_t group = !resident && wave < fit ? wave : fit;
	p.heads_per_group = static_cast<int>(group < 1 ? 1 : group < p.pairs ? group : p.pairs);
	p.ticket = ticket;
	return status;
}

template <int D, bool RESIDENT>
enum status launch(struct device *device, const struct attention_args *a, int *ticket)
{
	parameters p;
	enum status status = fill_parameters(device, p, a, shape<D>::TILE_M, RESIDENT, ticket);
	const int64_t units = static_cast<int64_t>(p.units_per_pair) * p.pairs;

	if (status != STATUS_OK)
		return status;
	CUDA_TRY(cudaMemsetAsync(ticket, 0, sizeof *ticket, cuda_stream(device)));
	return submit(device, attention_kernel<D, RESIDENT>, turns(device, units),
	              shape<D>::THREADS, shared_layout<D>::BYTES, p);
}

/* Keys stay where query after query sees few of them, as with one key a chunk. */
template <int D>
enum status launch(struct device *device, const struct attention_args *a, int *ticket)
{
	const bool resident = a->own_score && a->kv_len <= shape<D>::STAGES * TILE_N;

	return resident ? launch<D, true>(device, a, ticket) : launch<D, false>(device, a, ticket);
}

} // namespace

extern "C" const char *hopper_attention_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct attention_args *>(args);

	if (!is_known_mask(a->mask))
		return "an unknown mask";
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	return check_views(device, &a->q, &a->k, &a->v, &a->out, &a->own_value, &a->gate,
	                   &a->out_ungated);
}

extern "C" size_t hopper_attention_workspace(const struct device *, const void *args)
{
	(void)args;
	return 256; /* the ticket counter */
}

extern "C" enum status hopper_attention(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct attention_args *>(args);
	int *ticket = static_cast<int *>(workspace);

	return a->d_head == 64 ? launch<64>(device, a, ticket) : launch<128>(device, a, ticket);
}
