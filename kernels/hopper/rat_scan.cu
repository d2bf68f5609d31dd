/*
 * RAT inside a chunk for sm_90a: one pass over v, gate, q and k.
 *
 * Time is cut into units of whole chunks. A block draws units by ticket; its
 * producer warp streams their rows, eight at a time, through a ring of stages
 * with bulk copies (a row of a tensor each). A consumer warp owns 128
 * channels, four a lane, and runs both recurrences in registers for any chunk
 * length; a block owns up to 2048 channels, so that the q and k of a token are
 * read once for all heads. The own scores of eight rows are summed over lanes
 * together. Each row of q is rotated by one of the warps that have it.
 *
 * cos and sin of a chunk's position follow from those of the chunk before by
 * one complex product, exact ones start each unit.
 *
 * Chunks too long to give every multiprocessor a unit are cut. Then a first
 * run over v, gate and k reduces each piece to its product of decays and its
 * states from zero, and a short scan gives each piece the states it starts with.
 *
 * Shared memory: a ring of up to eight stages (v, gate, k, q), then their headers and barriers.
 *
 * Limit: memory. 0.926 ms at D = 2048, 262144 tokens, L = 16 (1.98 GHz), 95% of a copy's bandwidth.
 * docs/kernels/rat_scan.md.
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"
#include "kernels/kernels.h"
#include "kernels/portable/rope.cuh"

using namespace hopper;

namespace
{

constexpr int ROWS = 8;         /* of a stage */
constexpr int BATCH = 2;        /* rows that a warp has in flight */
constexpr int WARP_WIDTH = 128; /* channels of a warp */
constexpr int MAX_WARPS = 16, MAX_STAGES = 8;
constexpr int BLOCK_RESERVE =
        1024; /* bytes of shared memory that each block costs beside its own */
constexpr int MIN_UNIT = 8, MAX_UNIT = 64; /* tokens of a unit, before they become whole chunks */
constexpr int MIN_PIECE = 64, MAX_PIECE = 1024; /* tokens of a piece of a chunk that is cut */
/* A cut chunk is read twice: only done if whole ones would leave this much idle. */
constexpr double MIN_EFFICIENCY = 0.6;

/* How the work is cut. */
struct cut {
	int slabs, slab_width; /* of channels */
	int group_length;      /* tokens of whole chunks; a multiple of the chunk length */
	int pieces;            /* of a group; more than one only if it is one chunk */
	int piece_length;
	int per_sequence; /* pieces of a sequence */
	int64_t units;    /* of all sequences and slabs */
};

struct parameters {
	struct rat_scan_args a;
	struct cut cut;
	int stages, stage_bytes, row_bytes, group_bytes; /* of v, of q and k */
	bool rotate;                                     /* q, here */
	int *ticket;
	float *decay, *v_end, *k_end; /* out of the first run [B, pieces, D] */
	float *v_start, *k_start;     /* what follows from them [B, pieces, D], or NULL */
};

/* Words of a stage's header. */
enum { HEAD_ROWS, HEAD_FIRST, HEAD_B, HEAD_SLAB, HEAD_PIECE, HEAD_FLAGS, HEAD_WORDS = 8 };
enum { FLAG_FIRST = 1, FLAG_LAST = 2 }; /* stage of its unit */

/* Behind the stages: headers, barriers (full, empty). */
__host__ __device__ constexpr int tail_bytes(int stages)
{
	return stages * (HEAD_WORDS * 4 + 16);
}

struct unit {
	int b, slab, piece;
	int first, end; /* tokens; empty where a ragged chunk has fewer pieces */
};

__device__ __forceinline__ unit unit_at(const parameters &p, int64_t index)
{
	const struct cut &c = p.cut;
	unit u;
	const int64_t row = index / c.slabs;

	u.slab = static_cast<int>(index - row * c.slabs);
	u.b = static_cast<int>(row / c.per_sequence);
	u.piece = static_cast<int>(row - static_cast<int64_t>(u.b) * c.per_sequence);
	const int group = u.piece / c.pieces, part = u.piece - group * c.pieces;
	const int64_t begin = static_cast<int64_t>(group) * c.group_length;
	const int64_t end = begin + min(static_cast<int64_t>(part + 1) * c.piece_length,
	                                static_cast<int64_t>(c.group_length));

	u.first = static_cast<int>(min(begin + static_cast<int64_t>(part) * c.piece_length, end));
	u.end = static_cast<int>(min(end, p.a.seq_len));
	return u;
}

/* One warp: rows of v, gate, k and q, a lane for each row of each tensor. */
template <bool REDUCE> struct producer {
	const parameters &p;
	uint32_t shared, headers, full, empty;
	int lane;
	ring_position stage = {};

	__device__ void post(const unit &u, int t, int rows)
	{
		const uint32_t header = headers + stage.slot * HEAD_WORDS * 4;
		const int channel = u.slab * p.cut.slab_width;
		const int64_t width = p.a.n_heads * p.a.d_head;
		const int bytes = static_cast<int>(
		        min(width - channel, static_cast<int64_t>(p.cut.slab_width)) * 2);

		barrier_wait(empty + stage.slot * 8, stage.parity ^ 1);
		if (lane == 0) {
			shared_store(header + HEAD_ROWS * 4, rows);
			shared_store(header + HEAD_FIRST * 4, t);
			shared_store(header + HEAD_B * 4, u.b);
			shared_store(header + HEAD_SLAB * 4, u.slab);
			shared_store(header + HEAD_PIECE * 4, u.piece);
			shared_store(header + HEAD_FLAGS * 4,
			             (t == u.first ? FLAG_FIRST : 0) |
			                     (t + rows == u.end ? FLAG_LAST : 0));
			if (rows > 0)
				barrier_arrive_expect(
				        full + stage.slot * 8,
				        rows * (2 * bytes + (REDUCE ? 1 : 2) * p.group_bytes));
			else
				barrier_arrive(full + stage.slot * 8);
		}
		__syncwarp();
		copy(u.b, t, rows, channel, bytes);
		stage.advance(p.stages);
	}

	__device__ void copy(int b, int t, int rows, int channel, int bytes)
	{
		const int row = lane / 4, tensor = lane % 4;
		const bool wide = tensor < 2;
		const struct view &v = tensor == 0   ? p.a.v
		                       : tensor == 1 ? p.a.gate
		                       : tensor == 2 ? p.a.k
		                                     : p.a.q;
		uint32_t to = shared + stage.slot * p.stage_bytes;

		if (row >= rows || (REDUCE && tensor == 3))
			return;
		to += wide ? (tensor * ROWS + row) * p.row_bytes
		           : 2 * ROWS * p.row_bytes + ((tensor - 2) * ROWS + row) * p.group_bytes;
		const int total = wide ? bytes : p.group_bytes,
		          head = static_cast<int>(p.a.d_head) * 2;
		const bf16 *from = at(v, b, t + row, wide ? channel / p.a.d_head : 0);

		if (v.head * 2 == head)
			bulk_load(to, from, total, full + stage.slot * 8);
		else
			for (int i = 0; i < total; i += head, from += v.head)
				bulk_load(to + i, from, head, full + stage.slot * 8);
	}

	__device__ void run()
	{
		/* The first unit is the block's own, so that nobody draws two while another has
		 * none. */
		int64_t index = blockIdx.x;

		while (index < p.cut.units) {
			const int64_t next = ticket();
			const unit u = unit_at(p, index);

			for (int t = u.first; t < u.end; t += ROWS)
				post(u, t, min(ROWS, u.end - t));
			index = next;
		}
		post(unit{}, 0, 0);
	}

	__device__ int64_t ticket()
	{
		int drawn = 0;

		if (lane == 0)
			drawn = atomicAdd(p.ticket, 1);
		return static_cast<int64_t>(gridDim.x) + __shfl_sync(0xFFFFFFFFu, drawn, 0);
	}
};

/* Four neighboring channels. */
struct pairs {
	uint32_t pair[2];

	__device__ __forceinline__ float operator[](int i) const
	{
		return i % 2 ? high_bf16(pair[i / 2]) : low_bf16(pair[i / 2]);
	}
};

__device__ __forceinline__ pairs load_pairs(uint32_t shared)
{
	pairs x;

	asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
	             : "=r"(x.pair[0]), "=r"(x.pair[1])
	             : "r"(shared));
	return x;
}

__device__ __forceinline__ void store_four(bf16 *to, const float (&x)[4])
{
	*reinterpret_cast<uint2 *>(to) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

__device__ __forceinline__ void store_floats(float *to, const float (&x)[4])
{
	*reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void load_floats(float (&x)[4], const float *from)
{
	const float4 packed = *reinterpret_cast<const float4 *>(from);

	x[0] = packed.x;
	x[1] = packed.y;
	x[2] = packed.z;
	x[3] = packed.w;
}

/* cos and sin of the four angles of a lane. */
struct turn {
	float cosine[4], sine[4];
};

__device__ __forceinline__ turn turn_at(const struct rope_table &table, int first, int position)
{
	const float x = static_cast<float>(position);
	turn r;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		const float turns = x * table.high[first + i];
		const float rest =
		        fmaf(x, table.high[first + i], -turns) + x * table.low[first + i];

		sincospif(2.0f * (turns - rintf(turns) + rest), &r.sine[i], &r.cosine[i]);
	}
	return r;
}

/* One chunk further. */
__device__ __forceinline__ void advance(turn &r, const turn &by)
{
#pragma unroll
	for (int i = 0; i < 4; i++) {
		const float cosine = r.cosine[i];

		r.cosine[i] = cosine * by.cosine[i] - r.sine[i] * by.sine[i];
		r.sine[i] = r.sine[i] * by.cosine[i] + cosine * by.sine[i];
	}
}

/*
 * Sums of eight values over the 2^log lanes of a head: pairs of lanes exchange halves of their
 * values until each has one, that of row `lane % 8`.
 */
template <int LANES> __device__ __forceinline__ float sum_rows(float (&x)[ROWS], int lane)
{
#pragma unroll
	for (int step = 4; step > 0; step /= 2) {
		const bool upper = lane & step;

#pragma unroll
		for (int i = 0; i < step; i++) {
			const float keep = upper ? x[i + step] : x[i];
			const float give = upper ? x[i] : x[i + step];

			x[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, give, step);
		}
	}
#pragma unroll
	for (int offset = 8; offset < LANES; offset *= 2)
		x[0] += __shfl_xor_sync(0xFFFFFFFFu, x[0], offset);
	return x[0];
}

/* A lane's four channels, and where it is in its unit. */
template <int D, bool REDUCE> struct consumer {
	static constexpr int LANES = D / 4; /* of a head */

	const parameters &p;
	const struct rope_table &table;
	int lane, column; /* channel in the slab */
	turn by, now;
	float v[4], k[4], bias[4], product[4];
	int b, h, group, channel; /* in the head */
	bool active;
	int rotated; /* rows of a stage whose q this warp may have to rotate, as bits */
	bool rotates_none;
	int chunk, left; /* chunk index, and tokens to its end */

	__device__ void begin(int t, int unit_b, int slab, int piece)
	{
		const int all = slab * p.cut.slab_width + column;
		const int64_t carry = (static_cast<int64_t>(unit_b) * p.cut.per_sequence + piece) *
		                              p.a.n_heads * D +
		                      all;

		b = unit_b;
		active = column < p.cut.slab_width && all < p.a.n_heads * D;
		h = active ? all / D : 0;
		channel = all % D;
		group = static_cast<int>(h % p.a.groups);
		chunk = static_cast<int>(t / p.a.chunk);
		left = static_cast<int>(
		        min((chunk + 1) * static_cast<int64_t>(p.a.chunk), p.a.seq_len) - t);
		rotated = 0;
		if (!REDUCE && active && p.rotate)
			for (int j = 0; j < ROWS; j++)
				rotated |= (j % (p.a.n_heads / p.a.groups) == h / p.a.groups) << j;
		rotates_none = !__any_sync(0xFFFFFFFFu, rotated);
#pragma unroll
		for (int i = 0; i < 4; i++) {
			v[i] = k[i] = bias[i] = 0.0f;
			product[i] = 1.0f;
			now.cosine[i] = 1.0f;
			now.sine[i] = 0.0f;
		}
		if (active)
			load_floats(bias, p.a.gate_bias + all);
#pragma unroll
		for (int i = 0; i < 4; i++)
			bias[i] *= hopper::LOG2E;
		if (!REDUCE && active && p.v_start) {
			load_floats(v, p.v_start + carry);
			load_floats(k, p.k_start + carry);
		}
		if (!REDUCE && p.a.rope)
			now = turn_at(table, channel % (D / 2), chunk);
	}

	__device__ void reduced(int slab, int piece) const
	{
		const int64_t carry =
		        (static_cast<int64_t>(b) * p.cut.per_sequence + piece) * p.a.n_heads * D +
		        slab * p.cut.slab_width + column;

		if (!active)
			return;
		store_floats(p.decay + carry, product);
		store_floats(p.v_end + carry, v);
		store_floats(p.k_end + carry, k);
	}

	/* x rotated to the current chunk; its partners are half a head away. */
	__device__ __forceinline__ void rotate(float (&to)[4], const float (&x)[4]) const
	{
		const bool lower = channel < D / 2;

#pragma unroll
		for (int i = 0; i < 4; i++) {
			const float partner = __shfl_xor_sync(0xFFFFFFFFu, x[i], LANES / 2);

			to[i] = x[i] * now.cosine[i] + (lower ? -partner : partner) * now.sine[i];
		}
	}

	/* The chunk's last pair becomes a key and a value; after the last token also the state. */
	__device__ __forceinline__ void end_chunk(int t)
	{
		float rotated_k[4];

		rotate(rotated_k, k);
		if (active) {
			store_four(at(p.a.k_chunk, b, chunk, h) + channel, rotated_k);
			store_four(at(p.a.v_chunk, b, chunk, h) + channel, v);
			if (t + 1 == p.a.seq_len) {
				const int64_t offset = (b * p.a.n_heads + h) * D + channel;

				if (p.a.k_state)
					store_floats(p.a.k_state + offset, k);
				if (p.a.v_state)
					store_floats(p.a.v_state + offset, v);
			}
		}
		chunk++;
		left = static_cast<int>(min(static_cast<int64_t>(p.a.chunk), p.a.seq_len - t - 1));
		advance(now, by);
#pragma unroll
		for (int i = 0; i < 4; i++)
			v[i] = k[i] = 0.0f;
	}

	/* One token: `w` is 1 - g. Returns the lane's part of q.k. */
	__device__ __forceinline__ float token(const float (&w)[4], const pairs &new_v,
	                                       const pairs &new_k, const pairs &q)
	{
		float dot = 0.0f;

#pragma unroll
		for (int i = 0; i < 4; i++) {
			v[i] = fmaf(w[i], new_v[i] - v[i], v[i]);
			k[i] = fmaf(w[i], new_k[i] - k[i], k[i]);
			if (REDUCE)
				product[i] = fmaf(-w[i], product[i], product[i]);
			else
				dot = fmaf(q[i], k[i], dot);
		}
		return dot;
	}

	/* What one token leaves behind, but its score. */
	__device__ __forceinline__ void emit(int t, int j, const pairs &q)
	{
		if (active)
			store_four(at(p.a.v_scan, b, t, h) + channel, v);
		if (!rotates_none && __any_sync(0xFFFFFFFFu, rotated >> j & 1)) {
			const float x[4] = {q[0], q[1], q[2], q[3]};
			float turned[4];

			rotate(turned, x);
			if (rotated >> j & 1)
				store_four(at(p.a.q_out, b, t, group) + channel, turned);
		}
		if (--left == 0)
			end_chunk(t);
	}

	/* Rows first .. first + BATCH of a stage: all that does not wait for the row before comes
	 * first. Rows from `count` on hold nothing and are not used. */
	__device__ __forceinline__ void batch(uint32_t stage, int t, int first, int count,
	                                      float (&dot)[ROWS])
	{
		const uint32_t vs = stage + first * p.row_bytes + column * 2;
		const uint32_t ks = stage + 2 * ROWS * p.row_bytes + first * p.group_bytes +
		                    (group * D + channel) * 2;
		pairs new_v[BATCH], new_k[BATCH], q[BATCH];
		float w[BATCH][4];

#pragma unroll
		for (int j = 0; j < BATCH; j++) {
			const pairs gate = load_pairs(vs + (ROWS + j) * p.row_bytes);

			new_v[j] = load_pairs(vs + j * p.row_bytes);
			new_k[j] = load_pairs(ks + j * p.group_bytes);
			q[j] = REDUCE ? pairs{} : load_pairs(ks + (ROWS + j) * p.group_bytes);
#pragma unroll
			for (int i = 0; i < 4; i++)
				w[j][i] = one_minus_sigmoid2(fmaf(gate[i], hopper::LOG2E, bias[i]));
		}
#pragma unroll
		for (int j = 0; j < BATCH; j++) {
			if (first + j >= count)
				break;
			dot[first + j] = token(w[j], new_v[j], new_k[j], q[j]);
			if (!REDUCE)
				emit(t + first + j, first + j, q[j]);
		}
	}

	/* A stage of rows from token t on. */
	__device__ __forceinline__ void rows(uint32_t stage, int t, int count)
	{
		float dot[ROWS] = {};

#pragma unroll
		for (int first = 0; first < ROWS; first += BATCH)
			if (first < count)
				batch(stage, t, first, count, dot);
		if (!REDUCE) {
			const float score = p.a.scale * sum_rows<LANES>(dot, lane);
			const int j = lane % ROWS;

			if (active && lane % LANES < ROWS && j < count)
				p.a.own_score[(b * p.a.seq_len + t + j) * p.a.n_heads + h] = score;
		}
	}
};

template <int D, bool REDUCE>
__global__ void __launch_bounds__((MAX_WARPS + 1) * 32, 1)
        rat_scan_kernel(const __grid_constant__ parameters p,
                        const __grid_constant__ struct rope_table table)
{
	const uint32_t shared = hopper::shared_address(shared_memory);
	const uint32_t headers = shared + p.stages * p.stage_bytes;
	const uint32_t full = headers + p.stages * HEAD_WORDS * 4, empty = full + p.stages * 8;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32 - 1;

	if (threadIdx.x == 0) {
		for (int s = 0; s < p.stages; s++) {
			barrier_init(full + s * 8, 1);
			barrier_init(empty + s * 8, warps);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (warp == warps) {
		producer<REDUCE>{p, shared, headers, full, empty, lane}.run();
		return;
	}

	consumer<D, REDUCE> mine = {p, table, lane, warp * WARP_WIDTH + 4 * lane};
	ring_position stage;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		mine.by.cosine[i] = 1.0f;
		mine.by.sine[i] = 0.0f;
	}
	if (!REDUCE && p.a.rope)
		mine.by = turn_at(table, mine.column % (D / 2), 1);
	for (;;) {
		const uint32_t header = headers + stage.slot * HEAD_WORDS * 4;

		barrier_wait(full + stage.slot * 8, stage.parity);
		const int count = shared_load(header + HEAD_ROWS * 4);
		if (count == 0)
			return;
		const int t = shared_load(header + HEAD_FIRST * 4);
		const int flags = shared_load(header + HEAD_FLAGS * 4);
		if (flags & FLAG_FIRST)
			mine.begin(t, shared_load(header + HEAD_B * 4),
			           shared_load(header + HEAD_SLAB * 4),
			           shared_load(header + HEAD_PIECE * 4));
		mine.rows(shared + stage.slot * p.stage_bytes, t, count);
		if (REDUCE && (flags & FLAG_LAST))
			mine.reduced(shared_load(header + HEAD_SLAB * 4),
			             shared_load(header + HEAD_PIECE * 4));
		__syncwarp();
		if (lane == 0)
			barrier_arrive(empty + stage.slot * 8);
		stage.advance(p.stages);
	}
}

/* The states with which the pieces of a chunk start. */
__global__ void __launch_bounds__(64)
        carry_kernel(const float *__restrict__ decay, const float *__restrict__ v_end,
                     const float *__restrict__ k_end, float *__restrict__ v_start,
                     float *__restrict__ k_start, int64_t batch, int64_t width, int per_sequence,
                     int pieces)
{
	const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
	const int64_t b = i / width;
	float v = 0.0f, k = 0.0f;

	if (b >= batch)
		return;
#pragma unroll 8
	for (int piece = 0; piece < per_sequence; piece++) {
		const int64_t at = (b * per_sequence + piece) * width + i % width;

		if (piece % pieces == 0)
			v = k = 0.0f;
		v_start[at] = v;
		k_start[at] = k;
		v = fmaf(decay[at], v, v_end[at]);
		k = fmaf(decay[at], k, k_end[at]);
	}
}

int64_t round_up(int64_t a, int64_t b)
{
	return divide_up(a, b) * b;
}

int stage_bytes(const struct rat_scan_args *a, int slab_width)
{
	return static_cast<int>(round_up(ROWS * 4 * (slab_width + a->groups * a->d_head), 128));
}

/* The part of the device that `units` equal units keep busy. */
double efficiency(const struct device *device, int64_t units)
{
	const int64_t blocks = cuda_sm_count(device);

	return static_cast<double>(units) / static_cast<double>(round_up(units, blocks));
}

/* A length that gives every multiprocessor a few parts of so many tokens. */
int64_t part_length(const struct device *device, int64_t tokens, int64_t least, int64_t most)
{
	const int64_t length = round_up(tokens / (4 * cuda_sm_count(device)), ROWS);

	return length < least ? least : length > most ? most : length;
}

struct cut cut_of(const struct device *device, const struct rat_scan_args *a)
{
	const int64_t width = a->n_heads * a->d_head, tokens = a->batch * a->seq_len;
	const int64_t chunk = a->chunk < a->seq_len ? a->chunk : a->seq_len;
	const int64_t unit = round_up(part_length(device, tokens, MIN_UNIT, MAX_UNIT), a->chunk);
	const int64_t piece = part_length(device, tokens, MIN_PIECE, MAX_PIECE);
	const int64_t units = a->batch * divide_up(a->seq_len, unit);
	const int64_t fewest = divide_up(width, MAX_WARPS * WARP_WIDTH);
	struct cut c = {};

	/* As many channels a block as keep the device busy. */
	c.slabs = static_cast<int>(fewest);
	while (efficiency(device, units * c.slabs) < MIN_EFFICIENCY && c.slabs < 4 * fewest &&
	       width >= 4 * c.slabs * WARP_WIDTH)
		c.slabs *= 2;
	c.group_length = static_cast<int>(unit);
	c.pieces = 1;
	if (chunk >= 2 * piece && efficiency(device, units * c.slabs) < MIN_EFFICIENCY) {
		c.slabs = static_cast<int>(fewest);
		c.pieces = static_cast<int>(divide_up(chunk, piece));
	}
	c.piece_length = c.pieces > 1 ? static_cast<int>(piece) : c.group_length;
	c.slab_width = static_cast<int>(round_up(divide_up(width, c.slabs), WARP_WIDTH));
	c.slabs = static_cast<int>(divide_up(width, c.slab_width));
	c.per_sequence = static_cast<int>(divide_up(a->seq_len, c.group_length)) * c.pieces;
	c.units = a->batch * c.per_sequence * c.slabs;
	return c;
}

/* Blocks of a multiprocessor, as many as share 16 consumer warps, and the stages of each. */
struct occupancy {
	int blocks, stages;
};

struct occupancy occupancy_of(const struct device *device, const struct rat_scan_args *a,
                              const struct cut &c)
{
	const int64_t stage = stage_bytes(a, c.slab_width);
	const int64_t all = static_cast<int64_t>(cuda_shared_limit(device)) + BLOCK_RESERVE;
	struct occupancy o;

	for (o.blocks = MAX_WARPS * WARP_WIDTH / c.slab_width; o.blocks > 0; o.blocks--) {
		const int64_t room = all / o.blocks - BLOCK_RESERVE - tail_bytes(MAX_STAGES);

		o.stages = static_cast<int>(room / stage < MAX_STAGES ? room / stage : MAX_STAGES);
		if (o.stages >= 2)
			break;
	}
	return o;
}

/* Ticket of either run, then the carries. */
constexpr int64_t TICKET_BYTES = 256;

template <int D, bool REDUCE>
enum status run(struct device *device, const parameters &p, int warps, int blocks_per_sm)
{
	const int bytes = p.stages * p.stage_bytes + tail_bytes(p.stages);
	const int64_t most = static_cast<int64_t>(blocks_per_sm) * cuda_sm_count(device);
	const int blocks = static_cast<int>(p.cut.units < most ? p.cut.units : most);

	return launch(device, "rat_scan", rat_scan_kernel<D, REDUCE>, dim3(blocks),
	              (warps + 1) * 32, bytes, p, rope_table_of(D));
}

/* Whether rows of q are overwritten that another block still has to read. */
bool overwritten(const struct rat_scan_args *a, const struct cut &c)
{
	return c.slabs > 1 && a->q_out.data == a->q.data;
}

template <int D>
enum status scan(struct device *device, const struct rat_scan_args *a, void *workspace)
{
	const int64_t width = a->n_heads * a->d_head;
	parameters p = {};
	struct occupancy occupancy;

	p.a = *a;
	p.cut = cut_of(device, a);
	occupancy = occupancy_of(device, a, p.cut);
	p.row_bytes = p.cut.slab_width * 2;
	p.group_bytes = static_cast<int>(a->groups * a->d_head * 2);
	p.stage_bytes = stage_bytes(a, p.cut.slab_width);
	p.stages = occupancy.stages;
	p.rotate = !overwritten(a, p.cut) && (a->rope || a->q_out.data != a->q.data);
	p.ticket = static_cast<int *>(workspace);
	const int warps = p.cut.slab_width / WARP_WIDTH;
	enum status status = STATUS_OK;

	CUDA_TRY(cudaMemsetAsync(p.ticket, 0, TICKET_BYTES, cuda_stream(device)));
	if (p.cut.pieces > 1) {
		const int64_t count = a->batch * p.cut.per_sequence * width;

		p.decay = reinterpret_cast<float *>(static_cast<char *>(workspace) + TICKET_BYTES);
		p.v_end = p.decay + count;
		p.k_end = p.v_end + count;
		p.v_start = p.k_end + count;
		p.k_start = p.v_start + count;
		status = run<D, true>(device, p, warps, occupancy.blocks);
		if (status == STATUS_OK)
			status = launch(device, "rat_scan", carry_kernel,
			                dim3((unsigned)divide_up(a->batch * width, 64)), 64, 0,
			                p.decay, p.v_end, p.k_end, p.v_start, p.k_start, a->batch,
			                width, p.cut.per_sequence, p.cut.pieces);
		p.ticket++;
	}
	if (status == STATUS_OK)
		status = run<D, false>(device, p, warps, occupancy.blocks);
	if (status != STATUS_OK || !overwritten(a, p.cut))
		return status;

	return rotate_queries(device, a);
}

} // namespace

extern "C" const char *hopper_rat_scan_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct rat_scan_args *>(args);

	if (!cuda_is_hopper(device))
		return "needs compute capability 9.0";
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	if (a->seq_len >= INT32_MAX / 4 || a->chunk >= INT32_MAX / 4)
		return "the sequence is too long";
	if (occupancy_of(device, a, cut_of(device, a)).blocks == 0)
		return "too many groups";
	return check_aligned(&a->v, &a->gate, &a->q, &a->k, &a->q_out, &a->v_scan, &a->k_chunk,
	                     &a->v_chunk);
}

extern "C" size_t hopper_rat_scan_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct rat_scan_args *>(args);
	const struct cut c = cut_of(device, a);

	return TICKET_BYTES + (c.pieces > 1
	                               ? 5 * sizeof(float) *
	                                         static_cast<size_t>(a->batch * c.per_sequence *
	                                                             a->n_heads * a->d_head)
	                               : 0);
}

extern "C" enum status hopper_rat_scan(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct rat_scan_args *>(args);

	return a->d_head == 64 ? scan<64>(device, a, workspace) : scan<128>(device, a, workspace);
}
