/*
 * The matrix-state recurrence S_t = A_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t,
 * chunkwise on the tensor cores, for every decay A that is a scalar or a diagonal:
 *   1. each chunk's own contribution to the state, all chunks in parallel;
 *   2. a scan over the chunks, which leaves the state before each one;
 *   3. each chunk's outputs from that state and its own tokens, in parallel.
 * With G_t the sum of log2 A over the chunk's tokens up to t, every factor is
 * 2^(difference of G) with an exponent <= 0, so that no decay is too strong: across
 * sub-chunks of 16 tokens the difference is split at the later sub-chunk's
 * start. Inside a sub-chunk it is split at the middle, where one of the two
 * factors exceeds 1, if the sub-chunk decays mildly; otherwise it is taken
 * pair by pair.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum {
	THREADS = 128,
	ROWS = 64,       /* tokens of a chunk at most */
	SLAB = 64,       /* channels of q and k, or of v, taken at a time */
	STRIDE = 72,     /* of tiles in shared memory: no bank conflicts between rows */
	SUB = 16,        /* tokens of a sub-chunk, one per warp */
	SCAN_CHUNKS = 4, /* chunks read ahead by the scan */
	MILD = 60        /* log2 of a decay whose inverse can be a factor in bf16 */
};

/* How the sequence is cut and what is kept of each chunk. */
struct chunks {
	int64_t length, count, slabs;
	bf16 *states;  /* [B, H, count, d_k, d_v]: contributions, then the states before the chunks
	                */
	float *decays; /* [B, H, count, d_k]: product of the chunk's decays */
};

static struct chunks cut(const struct matrix_recurrence_args *a, void *workspace)
{
	struct chunks c;

	c.length = a->chunk ? a->chunk : (int64_t)ROWS;
	c.count = divide_up(a->seq_len, c.length);
	c.slabs = divide_up(a->d_k, SLAB);
	c.decays = static_cast<float *>(workspace);
	c.states = reinterpret_cast<bf16 *>(
	        c.decays + divide_up(a->batch * a->n_heads * c.count * a->d_k, 64) * 64);
	return c;
}

/* One block's chunk: sequence, head, first token, tokens. */
struct place {
	int64_t b, h, chunk, first;
	int rows;
};

static __device__ __forceinline__ struct place place_of(const struct matrix_recurrence_args &a,
                                                        const struct chunks &c, int64_t chunk,
                                                        int64_t sequence)
{
	struct place p;

	p.b = sequence / a.n_heads;
	p.h = sequence % a.n_heads;
	p.chunk = sequence * c.count + chunk;
	p.first = chunk * c.length;
	p.rows = (int)min(c.length, a.seq_len - p.first);
	return p;
}

/* Columns first .. first+63 of `rows` rows of memory, zeros elsewhere, in the background. */
static __device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *from, int64_t stride,
                                                 int64_t rows, int64_t first, int64_t width)
{
	for (int i = threadIdx.x; i < ROWS * SLAB / 8; i += THREADS) {
		const int row = i / (SLAB / 8), column = i % (SLAB / 8) * 8;
		const bool valid = row < rows && first + column < width;

		copy16_async(tile + row * STRIDE + column,
		             from + (valid ? row * stride + first + column : 0), valid);
	}
}

/*
 * Cumulative log2 decays of the chunk, g[token * STRIDE + channel], for one
 * slab of channels; tokens past the end decay no further. Synchronizes.
 */
static __device__ void sum_diagonal(float *g, const struct matrix_recurrence_args &a,
                                    const struct place &p, int64_t slab)
{
	for (int i = threadIdx.x; i < ROWS * SLAB / 8; i += THREADS) {
		const int row = i / (SLAB / 8), column = i % (SLAB / 8) * 8;
		const bool valid = row < p.rows && slab * SLAB + column < a.d_k;
		float x[8] = {};

		if (valid)
			load8(x, at(a.log_decay, p.b, p.first + row, p.h) + slab * SLAB + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			g[row * STRIDE + column + j] = x[j] * LOG2E;
	}
	__syncthreads();
	if (threadIdx.x < SLAB) {
		float sum = 0.0f;

#pragma unroll 8
		for (int row = 0; row < ROWS; row++) {
			sum += g[row * STRIDE + threadIdx.x];
			g[row * STRIDE + threadIdx.x] = sum;
		}
	}
	__syncthreads();
}

/* log2 decay of a token where it is the same for all channels. */
static __device__ __forceinline__ float scalar_decay(const struct matrix_recurrence_args &a,
                                                     const struct place &p, int row)
{
	if (row >= p.rows || a.decay == DECAY_NONE)
		return 0.0f;
	if (a.decay == DECAY_CONSTANT)
		return log1pf(-exp2f(-5.0f - (float)p.h)) * LOG2E;
	return __bfloat162float(*at(a.log_decay, p.b, p.first + row, p.h)) * LOG2E;
}

/* The same sums for all channels: g[token]. Synchronizes. */
static __device__ void sum_scalar(float *g, const struct matrix_recurrence_args &a,
                                  const struct place &p)
{
	float *single = g + ROWS, sum = 0.0f;

	if (threadIdx.x < ROWS)
		single[threadIdx.x] = scalar_decay(a, p, threadIdx.x);
	__syncthreads();
	if (threadIdx.x < ROWS) {
		for (int row = 0; row <= (int)threadIdx.x; row++)
			sum += single[row];
		g[threadIdx.x] = sum;
	}
	__syncthreads();
}

/* Cumulative log2 decay of a token and a slab's channel. */
template <bool DIAGONAL>
static __device__ __forceinline__ float cumulative(const float *g, int row, int channel)
{
	return DIAGONAL ? g[row * STRIDE + channel] : g[row];
}

/* k of one slab, each token decayed to the chunk's end; and the chunk's whole decay. */
template <bool DIAGONAL>
static __device__ void decayed_keys(bf16 *keys, const float *g,
                                    const struct matrix_recurrence_args &a, const struct chunks &c,
                                    const struct place &p, int64_t slab)
{
	for (int i = threadIdx.x; i < ROWS * SLAB / 8; i += THREADS) {
		const int row = i / (SLAB / 8), column = i % (SLAB / 8) * 8;
		const bool valid = row < p.rows && slab * SLAB + column < a.d_k;
		float x[8] = {};

		if (valid)
			load8(x, at(a.k, p.b, p.first + row, p.h) + slab * SLAB + column);
#pragma unroll
		for (int j = 0; j < 8; j++)
			x[j] *= exp2_fast(cumulative<DIAGONAL>(g, ROWS - 1, column + j) -
			                  cumulative<DIAGONAL>(g, row, column + j));
		store8(keys + row * STRIDE + column, x);
	}
	for (int i = threadIdx.x; i < SLAB && slab * SLAB + i < a.d_k; i += THREADS)
		c.decays[p.chunk * a.d_k + slab * SLAB + i] =
		        exp2_fast(cumulative<DIAGONAL>(g, ROWS - 1, i));
}

/* d += a b for 16 rows of a, 64 columns of b = tile [64, STRIDE] rows 16 step .. 16 step + 15. */
static __device__ __forceinline__ void
multiply_tile(float (&d)[SLAB / 8][4], const uint32_t (&a)[4], const bf16 *tile, int step)
{
	const int lane = threadIdx.x % WARP;
	uint32_t b[4];

#pragma unroll
	for (int n = 0; n < SLAB / 16; n++) {
		load_matrices_transposed(b, tile + (16 * step + lane % 16) * STRIDE + 16 * n +
		                                    lane / 16 * 8);
		multiply_add(d[2 * n], a, b[0], b[1]);
		multiply_add(d[2 * n + 1], a, b[2], b[3]);
	}
}

/*
 * Writes one of the two row halves of 16 x 64 products, times `factor`: this lane's
 * row begins at `row`, NULL to write nothing. The four lanes of a row trade
 * pairs first, so that they write 32 bytes side by side.
 */
static __device__ __forceinline__ void store_row(bf16 *row, const float (&d)[SLAB / 8][4], int half,
                                                 float factor, int64_t first, int64_t width)
{
	const int c = threadIdx.x % 4;

#pragma unroll
	for (int n = 0; n < SLAB / 8; n += 2) {
		const uint32_t a = pack(factor * d[n][2 * half], factor * d[n][2 * half + 1]);
		const uint32_t b =
		        pack(factor * d[n + 1][2 * half], factor * d[n + 1][2 * half + 1]);
		const uint32_t far = __shfl_xor_sync(0xffffffffu, c < 2 ? b : a, 2);
		const uint32_t low = c < 2 ? a : far, high = c < 2 ? far : b;
		const uint32_t near = __shfl_xor_sync(0xffffffffu, c % 2 ? low : high, 1);
		const int64_t column = first + 8 * n + 4 * c;

		if (row && column < width)
			*reinterpret_cast<uint2 *>(row + column) =
			        make_uint2(c % 2 ? near : low, c % 2 ? high : near);
	}
}

/* Starts loading v of the chunk, columns first .. first + 63. */
static __device__ __forceinline__ void load_values(bf16 *tile,
                                                   const struct matrix_recurrence_args &a,
                                                   const struct place &p, int64_t first)
{
	load_tile(tile, at(a.v, p.b, p.first, p.h), a.v.token, p.rows, first, a.d_v);
	copy_commit();
}

/* 1. The chunk's contribution to 64 rows of the state: (decayed k)^T v, 16 rows per warp. */
template <bool DIAGONAL>
static __global__ void __launch_bounds__(THREADS)
        contribution_kernel(const __grid_constant__ struct matrix_recurrence_args a,
                            const __grid_constant__ struct chunks c)
{
	const struct place p = place_of(a, c, blockIdx.x, blockIdx.z);
	const int64_t slab = blockIdx.y;
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	float *g = reinterpret_cast<float *>(shared_memory);
	bf16 *keys = reinterpret_cast<bf16 *>(g + ROWS * STRIDE), *values = keys + ROWS * STRIDE;
	uint32_t left[ROWS / 16][4];

	load_values(values, a, p, 0);
	if (DIAGONAL)
		sum_diagonal(g, a, p, slab);
	else
		sum_scalar(g, a, p);
	decayed_keys<DIAGONAL>(keys, g, a, c, p, slab);
	__syncthreads();
#pragma unroll
	for (int step = 0; step < ROWS / 16; step++)
		load_matrices_transposed(left[step],
		                         keys + (16 * step + lane / 16 * 8 + lane % 8) * STRIDE +
		                                 16 * warp + lane / 8 % 2 * 8);
	for (int64_t first = 0; first < a.d_v; first += SLAB) {
		const bf16 *tile = values + first / SLAB % 2 * ROWS * STRIDE;
		float d[SLAB / 8][4] = {};

		copy_wait<0>();
		__syncthreads();
		if (first + SLAB < a.d_v)
			load_values(values + (first / SLAB + 1) % 2 * ROWS * STRIDE, a, p,
			            first + SLAB);
#pragma unroll
		for (int step = 0; step < ROWS / 16; step++)
			multiply_tile(d, left[step], tile, step);
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int64_t row = slab * SLAB + 16 * warp + 8 * half + lane / 4;

			store_row(row < a.d_k ? c.states + (p.chunk * a.d_k + row) * a.d_v : NULL,
			          d, half, 1.0f, first, a.d_v);
		}
	}
}

/* 2. Eight columns of one row of a state, chunk after chunk. */
static __global__ void __launch_bounds__(THREADS)
        scan_kernel(const __grid_constant__ struct matrix_recurrence_args a,
                    const __grid_constant__ struct chunks c)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t column = index % (a.d_v / 8) * 8, row = index / (a.d_v / 8);
	const int64_t sequence = row / a.d_k;
	const int64_t offset = row * a.d_v + column;
	float state[8] = {};

	if (sequence >= a.batch * a.n_heads)
		return;
	const float *decay = c.decays + sequence * c.count * a.d_k + row % a.d_k;
	bf16 *at_chunk = c.states + (sequence * c.count * a.d_k + row % a.d_k) * a.d_v + column;
	if (a.h0)
		load8f(state, a.h0 + offset);
	for (int64_t i = 0; i < c.count; i += SCAN_CHUNKS) {
		vector8 added[SCAN_CHUNKS];
		float factor[SCAN_CHUNKS];

#pragma unroll
		for (int j = 0; j < SCAN_CHUNKS; j++) {
			const int64_t chunk = min(i + j, c.count - 1);

			added[j] = load8(at_chunk + chunk * a.d_k * a.d_v);
			factor[j] = decay[chunk * a.d_k];
		}
#pragma unroll
		for (int j = 0; j < SCAN_CHUNKS; j++) {
			float x[8];

			if (i + j >= c.count)
				break;
			store8(at_chunk + (i + j) * a.d_k * a.d_v, state);
			unpack8(x, added[j]);
#pragma unroll
			for (int e = 0; e < 8; e++)
				state[e] = factor[j] * state[e] + x[e];
		}
	}
	if (a.final_state)
		store8f(a.final_state + offset, state);
}

/* A pair of neighbouring channels of q: zero outside the chunk and past the last channel. */
static __device__ __forceinline__ uint32_t query_pair(const struct matrix_recurrence_args &a,
                                                      const struct place &p, int row,
                                                      int64_t channel)
{
	return row < p.rows && channel < a.d_k ? *reinterpret_cast<const uint32_t *>(
	                                                 at(a.q, p.b, p.first + row, p.h) + channel)
	                                       : 0;
}

/* A pair of bf16, and what their rounding left out. */
struct exact_pair {
	uint32_t rounded, rest;
};

/* Both channels of a pair times 2^x, 2^y. */
static __device__ __forceinline__ exact_pair decayed(uint32_t pair, float x, float y)
{
	const float low = low_half(pair) * exp2_fast(x), high = high_half(pair) * exp2_fast(y);
	const uint32_t rounded = pack(low, high);

	return {rounded, pack(low - low_half(rounded), high - high_half(rounded))};
}

/*
 * Scores inside this warp's sub-chunk, one slab's part, exactly: sum[t] of lane
 * l gains q_t k_s 2^(G_t - G_s) for s = l / 2 <= t. Two channels per lane.
 */
static __device__ void add_diagonal(float (&sum)[SUB], const struct matrix_recurrence_args &a,
                                    const struct place &p, const float *g, const bf16 *keys,
                                    int64_t slab)
{
	const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * SUB;
	float g0[SUB], g1[SUB];
	uint32_t k[SUB];

#pragma unroll
	for (int s = 0; s < SUB; s++) {
		g0[s] = g[(first + s) * STRIDE + 2 * lane];
		g1[s] = g[(first + s) * STRIDE + 2 * lane + 1];
		k[s] = *reinterpret_cast<const uint32_t *>(keys + (first + s) * STRIDE + 2 * lane);
	}
#pragma unroll
	for (int t = 0; t < SUB; t++) {
		const uint32_t q = query_pair(a, p, first + t, slab * SLAB + 2 * lane);
		float x[SUB];

#pragma unroll
		for (int s = 0; s < SUB; s++)
			x[s] = s > t ? 0.0f
			             : low_half(q) * low_half(k[s]) * exp2_fast(g0[t] - g0[s]) +
			                       high_half(q) * high_half(k[s]) *
			                               exp2_fast(g1[t] - g1[s]);
		sum[t] += scatter_sum(x);
	}
}

/* q of one k16 step times 2^(G - G of the reference row), and what rounding left out. */
static __device__ __forceinline__ void decayed_queries(uint32_t (&left)[4], uint32_t (&rest)[4],
                                                       const uint32_t (&q)[4], const float *g,
                                                       const float *reference, int step)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int row = SUB * warp + lane / 4, channel = 16 * step + 2 * (lane % 4);

#pragma unroll
	for (int i = 0; i < 4; i++) {
		const float *now = g + (row + 8 * (i % 2)) * STRIDE + channel + 8 * (i / 2);
		const float *then = reference + channel + 8 * (i / 2);
		const exact_pair pair = decayed(q[i], now[0] - then[0], now[1] - then[1]);

		left[i] = pair.rounded;
		rest[i] = pair.rest;
	}
}

/* k of one k16 step, keys 8 n .. 8 n + 7, times 2^(G of the reference row - G). */
static __device__ __forceinline__ void decayed_tile(exact_pair (&right)[2], const float *g,
                                                    const bf16 *keys, const float *reference, int n,
                                                    int step)
{
	const int lane = threadIdx.x % WARP, channel = 16 * step + 2 * (lane % 4);

#pragma unroll
	for (int i = 0; i < 2; i++) {
		const int offset = (8 * n + lane / 4) * STRIDE + channel + 8 * i;
		const float *then = reference + channel + 8 * i;

		right[i] = decayed(*reinterpret_cast<const uint32_t *>(keys + offset),
		                   then[0] - g[offset], then[1] - g[offset + 1]);
	}
}

/* One k16 step of the scores between sub-chunks, decays split at this sub-chunk's start. */
static __device__ __forceinline__ void add_between(float (&s)[ROWS / 8][4], const uint32_t (&q)[4],
                                                   const float *g, const bf16 *keys, int step)
{
	const int warp = threadIdx.x / WARP;
	const float *start = g + (SUB * warp - 1) * STRIDE;
	uint32_t left[4], rest[4];
	exact_pair right[2];

	if (warp == 0)
		return;
	decayed_queries(left, rest, q, g, start, step);
#pragma unroll
	for (int n = 0; n < ROWS / 8 - 2; n++) {
		if (n >= 2 * warp)
			break;
		decayed_tile(right, g, keys, start, n, step);
		multiply_add(s[n], left, right[0].rounded, right[1].rounded);
	}
}

/*
 * One k16 step of the scores inside the sub-chunk, decays split at its middle:
 * mild ones only. The first tokens of a sequence have few scores, which can
 * all be small: they keep what rounding would cost.
 */
static __device__ __forceinline__ void add_inside(float (&s)[ROWS / 8][4], const uint32_t (&q)[4],
                                                  const float *g, const bf16 *keys, int step)
{
	const int warp = threadIdx.x / WARP;
	const float *middle = g + (SUB * warp + SUB / 2) * STRIDE;
	uint32_t left[4], rest[4];
	exact_pair right[2];

	decayed_queries(left, rest, q, g, middle, step);
#pragma unroll
	for (int n = 0; n < ROWS / 8; n++) {
		if (n / 2 != warp)
			continue;
		decayed_tile(right, g, keys, middle, n, step);
		multiply_add(s[n], left, right[0].rounded, right[1].rounded);
		multiply_add(s[n], rest, right[0].rounded, right[1].rounded);
		multiply_add(s[n], left, right[0].rest, right[1].rest);
	}
}

/* Whether no channel of the slab decays by more than 2^-MILD inside this warp's sub-chunk. */
static __device__ __forceinline__ bool decays_mildly(const float *g)
{
	const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * SUB;
	const float *begin = g + first * STRIDE + 2 * lane, *end = begin + (SUB - 1) * STRIDE;

	return __all_sync(0xffffffffu, begin[0] - end[0] <= MILD && begin[1] - end[1] <= MILD);
}

/* One k16 step of the scores where no channel decays differently: undecayed products. */
static __device__ __forceinline__ void
add_undecayed(float (&s)[ROWS / 8][4], const uint32_t (&q)[4], const bf16 *keys, int step)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	uint32_t k[4];

#pragma unroll
	for (int n = 0; n < ROWS / 16; n++) {
		if (n > warp)
			break;
		load_matrices(k, keys + (16 * n + lane / 16 * 8 + lane % 8) * STRIDE + 16 * step +
		                         lane / 8 % 2 * 8);
		multiply_add(s[2 * n], q, k[0], k[1]);
		multiply_add(s[2 * n + 1], q, k[2], k[3]);
	}
}

/*
 * The part of the scores of this warp's 16 queries that one slab gives, and
 * the slab's q decayed from the chunk's start, kept for the state's product.
 */
template <bool DIAGONAL>
static __device__ void add_slab(float (&s)[ROWS / 8][4], float (&inside)[SUB], bf16 *queries,
                                int64_t queries_stride, const struct matrix_recurrence_args &a,
                                const struct place &p, const float *g, const bf16 *keys,
                                int64_t slab)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const bool mild = DIAGONAL && decays_mildly(g);

#pragma unroll
	for (int step = 0; step < SLAB / 16; step++) {
		uint32_t q[4];

#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int row = SUB * warp + lane / 4 + 8 * (i % 2);
			const int channel = 16 * step + 2 * (lane % 4) + 8 * (i / 2);

			q[i] = query_pair(a, p, row, slab * SLAB + channel);
			*reinterpret_cast<uint32_t *>(queries + row * queries_stride + slab * SLAB +
			                              channel) =
			        decayed(q[i], cumulative<DIAGONAL>(g, row, channel),
			                cumulative<DIAGONAL>(g, row, channel + 1))
			                .rounded;
		}
		if (DIAGONAL)
			add_between(s, q, g, keys, step);
		else
			add_undecayed(s, q, keys, step);
		if (DIAGONAL && mild)
			add_inside(s, q, g, keys, step);
	}
	if (DIAGONAL && !mild)
		add_diagonal(inside, a, p, g, keys, slab);
}

/*
 * Adds the exact scores inside the sub-chunk, lane l's s = l / 2, to those of the
 * tensor cores, of which only those of keys up to the query count.
 */
static __device__ __forceinline__ void place_diagonal(float (&s)[ROWS / 8][4],
                                                      const float (&inside)[SUB], float *scratch)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	float *mine = scratch + warp * SUB * (SUB + 1);

#pragma unroll
	for (int t = 0; t < SUB; t++)
		if (lane % 2 == 0)
			mine[t * (SUB + 1) + lane / 2] = inside[t];
	__syncwarp();
#pragma unroll
	for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int t = lane / 4 + 8 * (i / 2);
			const int key = 8 * (n % 2) + 2 * (lane % 4) + i % 2;

			if (n / 2 == warp)
				s[n][i] = (key <= t ? s[n][i] : 0.0f) + mine[t * (SUB + 1) + key];
		}
	}
}

/* Undecayed scores times 2^(G_t - G_s); those of later keys become zero. */
static __device__ __forceinline__ void decay_scores(float (&s)[ROWS / 8][4], const float *g)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

#pragma unroll
	for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int row = SUB * warp + lane / 4 + 8 * (i / 2);
			const int key = 8 * n + 2 * (lane % 4) + i % 2;

			s[n][i] = key <= row ? s[n][i] * exp2_fast(g[row] - g[key]) : 0.0f;
		}
	}
}

/* Tile number i of the output's products: v of a slice of columns, then the state's slabs. */
static __device__ __forceinline__ void load_operand(bf16 *tile,
                                                    const struct matrix_recurrence_args &a,
                                                    const struct chunks &c, const struct place &p,
                                                    int64_t i)
{
	const int64_t first = i / (c.slabs + 1) * SLAB, slab = i % (c.slabs + 1) - 1;

	if (slab < 0) {
		load_values(tile, a, p, first);
		return;
	}
	load_tile(tile, c.states + (p.chunk * a.d_k + slab * SLAB) * a.d_v, a.d_v,
	          a.d_k - slab * SLAB, first, a.d_v);
	copy_commit();
}

/* Writes 64 columns of this warp's 16 tokens, and clears them for the next slice. */
static __device__ __forceinline__ void store_slice(float (&o)[SLAB / 8][4],
                                                   const struct matrix_recurrence_args &a,
                                                   const struct place &p, int64_t first)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int row = SUB * warp + 8 * half + lane / 4;

		store_row(row < p.rows ? at(a.out, p.b, p.first + row, p.h) : NULL, o, half,
		          a.scale, first, a.d_v);
	}
#pragma unroll
	for (int i = 0; i < SLAB / 8 * 4; i++)
		o[i / 4][i % 4] = 0.0f;
}

/* o = scores v + (decayed q) state, slice after slice of o's columns. */
static __device__ void multiply_out(const float (&s)[ROWS / 8][4], const bf16 *queries,
                                    int64_t queries_stride, bf16 *tiles,
                                    const struct matrix_recurrence_args &a, const struct chunks &c,
                                    const struct place &p)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int64_t count = divide_up(a.d_v, SLAB) * (c.slabs + 1);
	float o[SLAB / 8][4] = {};
	uint32_t left[4];

	load_operand(tiles, a, c, p, 0);
	for (int64_t i = 0; i < count; i++) {
		const int64_t slab = i % (c.slabs + 1) - 1;
		const bf16 *tile = tiles + i % 2 * ROWS * STRIDE;

		copy_wait<0>();
		__syncthreads();
		if (i + 1 < count)
			load_operand(tiles + (i + 1) % 2 * ROWS * STRIDE, a, c, p, i + 1);
#pragma unroll
		for (int step = 0; step < ROWS / 16; step++) {
			if (slab < 0) {
#pragma unroll
				for (int j = 0; j < 4; j++) {
					const float *pair = &s[2 * step + j / 2][2 * (j % 2)];

					left[j] = pack(pair[0], pair[1]);
				}
			} else {
				load_matrices(left,
				              queries + (SUB * warp + lane % 16) * queries_stride +
				                      slab * SLAB + 16 * step + lane / 16 * 8);
			}
			multiply_tile(o, left, tile, step);
		}
		if (slab == c.slabs - 1)
			store_slice(o, a, p, i / (c.slabs + 1) * SLAB);
	}
}

/* 3. The outputs of one chunk. */
template <bool DIAGONAL>
static __global__ void __launch_bounds__(THREADS)
        output_kernel(const __grid_constant__ struct matrix_recurrence_args a,
                      const __grid_constant__ struct chunks c)
{
	const struct place p = place_of(a, c, blockIdx.x, blockIdx.z);
	const int64_t queries_stride = c.slabs * SLAB + 8;
	float *g = reinterpret_cast<float *>(shared_memory);
	bf16 *keys = reinterpret_cast<bf16 *>(g + ROWS * STRIDE);
	bf16 *queries = keys + ROWS * STRIDE;
	float s[ROWS / 8][4] = {}, inside[SUB] = {};

	for (int64_t slab = 0; slab < c.slabs; slab++) {
		load_tile(keys, at(a.k, p.b, p.first, p.h), a.k.token, p.rows, slab * SLAB, a.d_k);
		copy_commit();
		copy_wait<0>();
		if (DIAGONAL)
			sum_diagonal(g, a, p, slab);
		else
			sum_scalar(g, a, p);
		add_slab<DIAGONAL>(s, inside, queries, queries_stride, a, p, g, keys, slab);
		__syncthreads();
	}
	if (DIAGONAL)
		place_diagonal(s, inside, g);
	else
		decay_scores(s, g);
	__syncthreads();
	multiply_out(s, queries, queries_stride, reinterpret_cast<bf16 *>(g), a, c, p);
}

extern "C" const char *portable_matrix_recurrence_unsupported(const struct device *,
                                                              const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->rule != RULE_PLAIN)
		return "only the plain rule";
	if (!is_known_decay(a->decay))
		return "an unknown decay";
	if (a->chunk == 1 || a->chunk > ROWS)
		return "chunk must be 2 to 64";
	if (a->d_k % 8 || a->d_v % 8 || a->d_k > 512)
		return "head widths must be multiples of 8, d_k at most 512";
	if (a->batch * a->n_heads > 65535)
		return "more than 65535 sequences times heads";
	if (a->decay == DECAY_DIAGONAL && !is_aligned(&a->log_decay))
		return "views must be 16-byte aligned";
	return check_aligned(&a->q, &a->k, &a->v, &a->out);
}

extern "C" size_t portable_matrix_recurrence_workspace(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const struct chunks c = cut(a, NULL);
	const int64_t rows = a->batch * a->n_heads * c.count * a->d_k;

	return (size_t)(divide_up(rows, 64) * 64) * sizeof(float) +
	       (size_t)(rows * a->d_v) * sizeof(bf16);
}

template <bool DIAGONAL>
static enum status run(struct device *device, const struct matrix_recurrence_args *a,
                       const struct chunks &c)
{
	const unsigned sequences = (unsigned)(a->batch * a->n_heads);
	const int64_t scans = a->batch * a->n_heads * a->d_k * (a->d_v / 8);
	const size_t g = ROWS * STRIDE * sizeof(float), tile = ROWS * STRIDE * sizeof(bf16);
	const size_t queries = ROWS * (size_t)(c.slabs * SLAB + 8) * sizeof(bf16);
	enum status status = launch(device, "matrix_recurrence", contribution_kernel<DIAGONAL>,
	                            dim3((unsigned)c.count, (unsigned)c.slabs, sequences), THREADS,
	                            g + 3 * tile, *a, c);

	if (status == STATUS_OK)
		status = launch_each(device, "matrix_recurrence", scan_kernel, scans, THREADS, *a,
		                     c);
	if (status == STATUS_OK)
		status = launch(device, "matrix_recurrence", output_kernel<DIAGONAL>,
		                dim3((unsigned)c.count, 1, sequences), THREADS, g + tile + queries,
		                *a, c);
	return status;
}

extern "C" enum status portable_matrix_recurrence(struct device *device, const void *args,
                                                  void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const struct chunks c = cut(a, workspace);

	return a->decay == DECAY_DIAGONAL ? run<true>(device, a, c) : run<false>(device, a, c);
}
