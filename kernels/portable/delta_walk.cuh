/*
 * The second pass of delta.cu and delta_backward.cu: walks through the chunks of a head, forward
 * for outputs, or for e and the state before every chunk, back for y = dv and the gradient D after
 * every chunk. Columns of the state are independent: a block takes 64 of one head, in fp32 in
 * registers; its warps are four quarters of the rows, or of the chunk's tokens, times two halves of
 * the columns.
 *
 * A chunk is a chain of products whose right operands pass through shared memory:
 *   forward: e = M (v - 2^G (k S)); out = scale 2^G (q S) + P (beta e);
 *            S = 2^(G_E) S + k^T (2^(G_E - G) beta e);
 *   back: x = 2^(G_E - G) (k D) + P^T dout; y = M^T (beta x);
 *         D = 2^(G_E) D + q^T (scale 2^G dout) - k^T (2^G y).
 * Where decays differ by channel they are in k and q already. What a product reads is loaded for
 * the next chunk as soon as it has been read. Limits: the latencies of a chain where heads are
 * few, the reads of q, k, P and M from L2 where they are many.
 */
#ifndef KERNELS_PORTABLE_DELTA_WALK_CUH
#define KERNELS_PORTABLE_DELTA_WALK_CUH

#include "kernels/portable/delta_tiles.cuh"

namespace
{

/* A block's columns of the state; a warp has half of them, and a quarter of the rows or tokens. */
constexpr int WALK_THREADS = 256, WALK_COLUMNS = 64;

/* The sizes of a problem, and room in the workspace for what prepare writes. */
static struct problem prepared_problem(const struct matrix_recurrence_backward_args &a,
                                       void *workspace, size_t *bytes)
{
	const struct matrix_recurrence_args *f = &a.forward;
	const bool bonus = is_bonus(f);
	struct problem p = {};

	p.a = a;
	p.chunks = divide_up(f->seq_len, CHUNK);
	p.keys = f->d_k <= 64 ? 64 : MAX_KEYS;
	p.column_blocks = divide_up(f->d_v, WALK_COLUMNS);
	p.values = (int)(p.column_blocks * WALK_COLUMNS);
	const int64_t records = f->batch * f->n_heads * p.chunks;
	const int64_t decayed = f->decay == DECAY_DIAGONAL ? records * CHUNK * p.keys : 0;

	*bytes = 0;
	p.factors = take<float>(bytes, workspace, records * (WHOLE + p.keys));
	p.scores = take<bf16>(bytes, workspace, records * CHUNK * CHUNK);
	p.inverse = take<bf16>(bytes, workspace, bonus ? 0 : records * CHUNK * CHUNK);
	p.q = take<bf16>(bytes, workspace, decayed);
	p.k_end = take<bf16>(bytes, workspace, decayed);
	p.k = take<bf16>(bytes, workspace, bonus ? 0 : decayed);
	return p;
}

/* Where this thread is in the products: its warp's part of rows, its first column, its lane. */
struct position {
	int part, column, lane;
};

static __device__ __forceinline__ struct position position_of()
{
	const int warp = threadIdx.x / WARP;

	return {warp % 4, warp / 4 * HALF, (int)threadIdx.x % WARP};
}

/* A warp's part of the state or its gradient. */
template <int KEYS> struct state {
	static constexpr int ROW_TILES = KEYS / 64;
	float x[ROW_TILES][TILES][4];

	/* The row of x[m][.][2 half]. */
	static __device__ __forceinline__ int row(struct position at, int m, int half)
	{
		return at.part * (KEYS / 4) + 16 * m + at.lane / 4 + 8 * half;
	}

	/* The column of x[.][n][0]. */
	static __device__ __forceinline__ int column(struct position at, int n)
	{
		return at.column + 8 * n + at.lane % 4 * 2;
	}

	__device__ __forceinline__ void to_tile(bf16 *tile) const
	{
		const struct position at = position_of();

#pragma unroll
		for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
			for (int i = 0; i < 2 * TILES; i++)
				own_pair<WALK_COLUMNS>(tile,
				                       at.part * (KEYS / 4) + 16 * m + i % 2 * 8,
				                       at.column, i / 2 * 8) =
				        pack(x[m][i / 2][i % 2 * 2], x[m][i / 2][i % 2 * 2 + 1]);
	}

	/* factors are those of a chunk, past whose end nothing decays. */
	template <bool DIAGONAL> __device__ __forceinline__ void decay(const float *factors)
	{
		const struct position at = position_of();

#pragma unroll
		for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
			for (int half = 0; half < 2; half++) {
				const float whole = DIAGONAL ? factors[WHOLE + row(at, m, half)]
				                             : factors[FROM_START + CHUNK - 1];

#pragma unroll
				for (int n = 0; n < TILES; n++) {
					x[m][n][2 * half] *= whole;
					x[m][n][2 * half + 1] *= whole;
				}
			}
	}

	/* x += keys^T values, tiles of 64 tokens. */
	__device__ __forceinline__ void add(const bf16 *keys, const bf16 *values)
	{
		const struct position at = position_of();

#pragma unroll
		for (int step = 0; step < CHUNK; step += 16) {
			uint32_t a[ROW_TILES][4], b[4];

#pragma unroll
			for (int m = 0; m < ROW_TILES; m++)
				left_transposed<KEYS>(a[m], keys, at.part * (KEYS / 4), step,
				                      16 * m);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				right<WALK_COLUMNS>(b, values, step, at.column, 8 * n);
#pragma unroll
				for (int m = 0; m < ROW_TILES; m++) {
					multiply_add(x[m][n], a[m], b[0], b[1]);
					multiply_add(x[m][n + 1], a[m], b[2], b[3]);
				}
			}
		}
	}

	/* From or, with STORE, to the state of a head in memory, NULL for zeros. */
	template <bool STORE>
	__device__ __forceinline__ void move(float *memory, const struct matrix_recurrence_args &f,
	                                     int64_t sequence, int64_t first)
	{
		const struct position at = position_of();

#pragma unroll
		for (int i = 0; i < ROW_TILES * TILES * 4; i++) {
			const int m = i / (4 * TILES), n = i / 4 % TILES, e = i % 4;
			const int64_t key = row(at, m, e / 2),
			              value = first + column(at, n) + e % 2;
			const int64_t place = (sequence * f.d_k + key) * f.d_v + value;
			const bool valid = memory && key < f.d_k && value < f.d_v;

			if (!STORE)
				x[m][n][e] = valid ? memory[place] : 0.0f;
			else if (valid)
				memory[place] = x[m][n][e];
		}
	}
};

/* 16 tokens and 32 columns of what walks pass from product to product. */
struct rows {
	float x[TILES][4];

	__device__ __forceinline__ void clear()
	{
#pragma unroll
		for (int i = 0; i < TILES * 4; i++)
			x[i / 4][i % 4] = 0.0f;
	}

	/* += this warp's rows of keys [64, INNER] times a tile [INNER, 64]. */
	template <int INNER, bool TRANSPOSED>
	__device__ __forceinline__ void add(const bf16 *keys, const bf16 *tile)
	{
		const struct position at = position_of();

#pragma unroll
		for (int step = 0; step < INNER; step += 16) {
			uint32_t a[4], b[4];

			if (TRANSPOSED)
				left_transposed<INNER>(a, keys, SUB * at.part, step);
			else
				left<INNER>(a, keys, SUB * at.part, step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				right<WALK_COLUMNS>(b, tile, step, at.column, 8 * n);
				multiply_add(x[n], a, b[0], b[1]);
				multiply_add(x[n + 1], a, b[2], b[3]);
			}
		}
	}

	/* Into their place in a tile, times factors of this lane's two tokens. */
	__device__ __forceinline__ void to_tile(bf16 *tile, float factor0, float factor1) const
	{
		const struct position at = position_of();

#pragma unroll
		for (int n = 0; n < TILES; n++) {
			own_pair<WALK_COLUMNS>(tile, SUB * at.part, at.column, 8 * n) =
			        pack(factor0 * x[n][0], factor0 * x[n][1]);
			own_pair<WALK_COLUMNS>(tile, SUB * at.part + 8, at.column, 8 * n) =
			        pack(factor1 * x[n][2], factor1 * x[n][3]);
		}
	}
};

/* This thread's part of tiles of 64 rows of W elements, one a chunk, in the background; zeros past
 * `rows` and where the first has no column. */
template <int W> struct stream {
	static constexpr int ROWS = WALK_THREADS / (W / 8); /* between a thread's rows */
	const bf16 *first;
	int64_t stride;
	int row, place;
	bool inside;

	/* From a view's token 0, or a matrix of the workspace. */
	__device__ __forceinline__ stream(const bf16 *from, int64_t stride_of_rows, int64_t width)
	{
		const int column = threadIdx.x % (W / 8) * 8;

		row = threadIdx.x / (W / 8);
		place = swizzled<W>(row, column / 8);
		first = from + row * stride_of_rows + column;
		stride = stride_of_rows;
		inside = column < width;
	}

	__device__ __forceinline__ void load(bf16 *tile, int64_t chunk, int rows) const
	{
		const bf16 *from = first + chunk * (CHUNK * stride);

#pragma unroll
		for (int i = 0; i < CHUNK / ROWS; i++)
			copy16_async(tile + place + i * ROWS * W, from + i * ROWS * stride,
			             inside && row + i * ROWS < rows);
	}
};

/* Whether a lower triangular [64, 64] has anything in that piece of a row. */
static __device__ __forceinline__ bool in_triangle(int row, int piece)
{
	return piece < 2 * (row / SUB + 1);
}

/* A lower triangle of the workspace, in the background; clear_above() has to be called too. */
static __device__ __forceinline__ void load_triangle(bf16 *tile, const bf16 *from)
{
#pragma unroll
	for (int j = 0; j < CHUNK * CHUNK / 8 / WALK_THREADS; j++) {
		const int i = threadIdx.x + j * WALK_THREADS;

		if (in_triangle(i / 8, i % 8))
			copy16_async(tile + swizzled<CHUNK>(i / 8, i % 8), from + 8 * i, true);
	}
}

static __device__ __forceinline__ void clear_above(bf16 *tile)
{
#pragma unroll
	for (int j = 0; j < CHUNK * CHUNK / 8 / WALK_THREADS; j++) {
		const int i = threadIdx.x + j * WALK_THREADS;

		if (!in_triangle(i / 8, i % 8))
			*reinterpret_cast<vector8 *>(tile + swizzled<CHUNK>(i / 8, i % 8)) = {};
	}
}

/* A tile of the state into its columns of the workspace. */
template <int KEYS>
static __device__ __forceinline__ void keep_state(bf16 *to, int stride, const bf16 *tile)
{
#pragma unroll
	for (int j = 0; j < KEYS * WALK_COLUMNS / 8 / WALK_THREADS; j++) {
		const int i = threadIdx.x + j * WALK_THREADS;
		const int row = i / (WALK_COLUMNS / 8), piece = i % (WALK_COLUMNS / 8);

		*reinterpret_cast<vector8 *>(to + row * stride + 8 * piece) =
		        load8(tile + swizzled<WALK_COLUMNS>(row, piece));
	}
}

/* k: two chunks' k; where decays differ by channel, k 2^G and k 2^(G_E - G) of one. */
template <int KEYS> struct forward_memory {
	bf16 k[2][CHUNK * KEYS];
	bf16 v[2][CHUNK * WALK_COLUMNS]; /* then what the chunk adds to the state */
	bf16 inverse[CHUNK * CHUNK];
	bf16 s[KEYS * WALK_COLUMNS];
	bf16 w[CHUNK * WALK_COLUMNS];
	float factors[2][WHOLE + KEYS];
};

/* With outputs. written: beta e, where that is not what the chunk adds to the state. */
template <int KEYS, bool DIAGONAL> struct output_memory : forward_memory<KEYS> {
	bf16 q[CHUNK * KEYS], scores[CHUNK * CHUNK];
	bf16 written[DIAGONAL ? 1 : CHUNK * WALK_COLUMNS];
};

/* OUTPUTS: out and the last state, in place of e and all states. */
template <int KEYS, bool DIAGONAL, bool DELTA, bool OUTPUTS>
static __device__ __forceinline__ void walk_forward(const struct problem &p, int64_t sequence,
                                                    int64_t column)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct place head = place_of(p, sequence, 0);
	const struct position at = position_of();
	const int row = SUB * at.part + at.lane / 4;
	auto &m = *reinterpret_cast<struct output_memory<KEYS, DIAGONAL> *>(shared_memory);
	const int64_t tokens = head.record * CHUNK;
	const struct stream<KEYS> k =
	        DIAGONAL ? stream<KEYS>(p.k + tokens * KEYS, KEYS, KEYS)
	                 : stream<KEYS>(::at(f.k, head.b, 0, head.h), f.k.token, f.d_k);
	const struct stream<KEYS> q =
	        DIAGONAL ? stream<KEYS>(p.q + tokens * KEYS, KEYS, KEYS)
	                 : stream<KEYS>(::at(f.q, head.b, 0, head.h), f.q.token, f.d_k);
	const struct stream<KEYS> ends(p.k_end + tokens * KEYS, KEYS, KEYS);
	const struct stream<WALK_COLUMNS> v(::at(f.v, head.b, 0, head.h) + column, f.v.token,
	                                    f.d_v - column);
	bf16 *const errors = p.errors + (tokens + row) * p.values + column + at.column;
	bf16 *const out = OUTPUTS ? ::at(f.out, head.b, row, head.h) + column + at.column : NULL;
	struct state<KEYS> s;

	const auto load_first = [&](int64_t chunk) {
		const int slot = chunk % 2;
		const int rows = (int)min((int64_t)CHUNK, f.seq_len - chunk * CHUNK);

		if (!DIAGONAL || DELTA)
			k.load(m.k[DIAGONAL ? 0 : slot], chunk, DIAGONAL ? CHUNK : rows);
		v.load(m.v[slot], chunk, rows);
		load_floats(m.factors[slot], p.factors + (head.record + chunk) * (WHOLE + KEYS),
		            WHOLE + KEYS);
		copy_commit();
	};
	const auto load_inverse = [&](int64_t chunk) {
		if (DELTA && chunk < p.chunks)
			load_triangle(m.inverse, p.inverse + (head.record + chunk) * CHUNK * CHUNK);
		if (OUTPUTS && chunk < p.chunks)
			q.load(m.q, chunk,
			       DIAGONAL ? CHUNK
			                : (int)min((int64_t)CHUNK, f.seq_len - chunk * CHUNK));
		copy_commit();
	};

	s.template move<false>(const_cast<float *>(f.h0), f, sequence, column);
	clear_above(m.inverse);
	if (OUTPUTS)
		clear_above(m.scores);
	load_first(0);
	load_inverse(0);
#pragma unroll 1
	for (int64_t chunk = 0; chunk < p.chunks; chunk++) {
		const int slot = chunk % 2;
		const int64_t record = head.record + chunk;
		const float *factors = m.factors[slot];
		/* What tokens read. */
		bf16 *const written = DIAGONAL || !DELTA ? m.v[slot] : m.written;
		struct rows d;

		s.to_tile(m.s);
		copy_wait<1>();
		__syncthreads();
		if (DIAGONAL)
			ends.load(m.k[1], chunk, CHUNK);
		if (OUTPUTS)
			load_triangle(m.scores, p.scores + record * CHUNK * CHUNK);
		copy_commit();
		if (!OUTPUTS)
			keep_state<KEYS>(p.states + record * KEYS * p.values + column, p.values,
			                 m.s);
		if (DELTA) {
			d.clear();
			d.template add<KEYS, false>(DIAGONAL ? m.k[0] : m.k[slot], m.s);
#pragma unroll
			for (int i = 0; i < 2 * TILES; i++) {
				const int n = i / 2, e = i % 2 * 2;
				const uint32_t pair = own_pair<WALK_COLUMNS>(
				        m.v[slot], SUB * at.part + 4 * e, at.column, 8 * n);
				const float power =
				        DIAGONAL ? 1.0f : factors[FROM_START + row + 4 * e];

				d.x[n][e] = low_half(pair) - power * d.x[n][e];
				d.x[n][e + 1] = high_half(pair) - power * d.x[n][e + 1];
			}
			d.to_tile(m.w, 1.0f, 1.0f);
		}
		copy_wait<1>();
		__syncthreads();
		if (chunk + 1 < p.chunks)
			load_first(chunk + 1);
		else
			copy_commit();
		if (DELTA) {
			bf16 *const to = errors + chunk * (CHUNK * p.values);

			d.clear();
			d.template add<CHUNK, false>(m.inverse, m.w);
			if (!OUTPUTS) {
				store_row(to, d.x, 0, HALF);
				store_row(to + 8 * p.values, d.x, 1, HALF);
			} else if (!DIAGONAL) {
				d.to_tile(m.written, factors[BETA + row], factors[BETA + row + 8]);
			}
			d.to_tile(m.v[slot],
			          factors[BETA + row] * (DIAGONAL ? 1.0f : factors[TO_END + row]),
			          factors[BETA + row + 8] *
			                  (DIAGONAL ? 1.0f : factors[TO_END + row + 8]));
		}
		if (OUTPUTS) {
			d.clear();
			d.template add<KEYS, false>(m.q, m.s);
#pragma unroll
			for (int i = 0; !DIAGONAL && i < TILES * 4; i++)
				d.x[i / 4][i % 4] *=
				        f.scale * factors[FROM_START + row + i % 4 / 2 * 8];
		}
		copy_wait<1>();
		__syncthreads();
		load_inverse(chunk + 1);
		if (OUTPUTS) {
			d.template add<CHUNK, false>(m.scores, written);
#pragma unroll
			for (int half = 0; half < 2; half++) {
				const int64_t t = chunk * CHUNK + 8 * half;

				store_row(t + row < f.seq_len ? out + t * f.out.token : NULL, d.x,
				          half, f.d_v - column - at.column);
			}
		}
		s.template decay<DIAGONAL>(factors);
		s.add(DIAGONAL ? m.k[1] : m.k[slot], m.v[slot]);
	}
	copy_wait<0>();
	if (OUTPUTS)
		s.template move<true>(f.final_state, f, sequence, column);
}

/*
 * k: two chunks' k; where decays differ by channel, k 2^G and k 2^(G_E - G) of one. beta x takes
 * the place of P, and y that of D, once those are read.
 */
template <int KEYS> struct reverse_memory {
	bf16 q[CHUNK * KEYS], k[2][CHUNK * KEYS];
	bf16 dout[2][CHUNK * WALK_COLUMNS];
	bf16 scores[CHUNK * CHUNK], inverse[CHUNK * CHUNK];
	bf16 d[KEYS * WALK_COLUMNS];
	float factors[2][WHOLE + KEYS];
};

template <int KEYS, bool DIAGONAL, bool DELTA>
static __device__ __forceinline__ void walk_back(const struct problem &p, int64_t sequence,
                                                 int64_t column)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct place head = place_of(p, sequence, 0);
	const struct position at = position_of();
	const int row = SUB * at.part + at.lane / 4;
	auto &m = *reinterpret_cast<struct reverse_memory<KEYS> *>(shared_memory);
	const int64_t tokens = head.record * CHUNK;
	/* k 2^(G_E - G) where decays differ by channel. */
	const struct stream<KEYS> k =
	        DIAGONAL ? stream<KEYS>(p.k_end + tokens * KEYS, KEYS, KEYS)
	                 : stream<KEYS>(::at(f.k, head.b, 0, head.h), f.k.token, f.d_k);
	const struct stream<KEYS> q =
	        DIAGONAL ? stream<KEYS>(p.q + tokens * KEYS, KEYS, KEYS)
	                 : stream<KEYS>(::at(f.q, head.b, 0, head.h), f.q.token, f.d_k);
	const struct stream<KEYS> starts(p.k + tokens * KEYS, KEYS, KEYS);
	const struct stream<WALK_COLUMNS> dout(::at(p.a.dout, head.b, 0, head.h) + column,
	                                       p.a.dout.token, f.d_v - column);
	bf16 *const dv = ::at(p.a.dv, head.b, row, head.h) + column + at.column;
	struct state<KEYS> s = {
	};

	const auto load_first = [&](int64_t chunk, int rows) {
		const int slot = chunk % 2;

		k.load(m.k[DIAGONAL ? 1 : slot], chunk, DIAGONAL ? CHUNK : rows);
		dout.load(m.dout[slot], chunk, rows);
		load_floats(m.factors[slot], p.factors + (head.record + chunk) * (WHOLE + KEYS),
		            WHOLE + KEYS);
		copy_commit();
	};
	const auto load_triangles = [&](int64_t chunk) {
		const int64_t from = (head.record + chunk) * CHUNK * CHUNK;

		if (chunk >= 0)
			load_triangle(m.scores, p.scores + from);
		copy_commit();
		if (DELTA && chunk >= 0)
			load_triangle(m.inverse, p.inverse + from);
		copy_commit();
	};

	clear_above(m.scores);
	clear_above(m.inverse);
	load_first(p.chunks - 1, (int)(f.seq_len - (p.chunks - 1) * CHUNK));
	load_triangles(p.chunks - 1);
#pragma unroll 1
	for (int64_t chunk = p.chunks - 1; chunk >= 0; chunk--) {
		const int slot = chunk % 2;
		const int rows = (int)min((int64_t)CHUNK, f.seq_len - chunk * CHUNK);
		const float *factors = m.factors[slot];
		struct rows d;

		s.to_tile(m.d);
		copy_wait<1>();
		__syncthreads();
		q.load(m.q, chunk, DIAGONAL ? CHUNK : rows);
		if (DIAGONAL && DELTA)
			starts.load(m.k[0], chunk, CHUNK);
		copy_commit();
		keep_state<KEYS>(p.gradients + (head.record + chunk) * KEYS * p.values + column,
		                 p.values, m.d);
		d.clear();
		d.template add<KEYS, false>(DIAGONAL ? m.k[1] : m.k[slot], m.d);
#pragma unroll
		for (int i = 0; !DIAGONAL && i < TILES * 4; i++)
			d.x[i / 4][i % 4] *= factors[TO_END + row + i % 4 / 2 * 8];
		d.template add<CHUNK, true>(m.scores, m.dout[slot]);
		if (DELTA) {
			__syncthreads();
			d.to_tile(m.scores, factors[BETA + row], factors[BETA + row + 8]);
		}
		copy_wait<1>();
		__syncthreads();
		if (chunk > 0)
			load_first(chunk - 1, CHUNK);
		else
			copy_commit();
#pragma unroll
		for (int i = 0; !DIAGONAL && i < CHUNK / dout.ROWS; i++) {
			const int t = dout.row + i * dout.ROWS;
			bf16 *piece = m.dout[slot] + dout.place + i * dout.ROWS * WALK_COLUMNS;
			float y[8];

			load8(y, piece);
#pragma unroll
			for (int j = 0; j < 8; j++)
				y[j] *= f.scale * factors[FROM_START + t];
			store8(piece, y);
		}
		if (DELTA) {
			d.clear();
			d.template add<CHUNK, true>(m.inverse, m.scores);
			d.to_tile(m.d, DIAGONAL ? -1.0f : -factors[FROM_START + row],
			          DIAGONAL ? -1.0f : -factors[FROM_START + row + 8]);
		}
#pragma unroll
		for (int half = 0; half < 2; half++) {
			bf16 *const to = dv + (chunk * CHUNK + 8 * half) * p.a.dv.token;

			store_row(row + 8 * half < rows ? to : NULL, d.x, half,
			          f.d_v - column - at.column);
		}
		copy_wait<1>();
		__syncthreads();
		if (DELTA)
			clear_above(m.scores);
		load_triangles(chunk - 1);
		s.template decay<DIAGONAL>(factors);
		s.add(m.q, m.dout[slot]);
		if (DELTA) {
			s.add(DIAGONAL ? m.k[0] : m.k[slot], m.d);
			__syncthreads();
		}
	}
	copy_wait<0>();
	s.template move<true>(p.a.dh0, f, sequence, column);
}

/* The first half of blocks walk back, which takes longer. */
template <int KEYS, bool DIAGONAL, bool DELTA>
static __global__ void __launch_bounds__(WALK_THREADS, 2)
        walk_kernel(const __grid_constant__ struct problem p)
{
	const int64_t walks = gridDim.x / 2, walk = blockIdx.x % walks;
	const int64_t sequence = walk / p.column_blocks;
	const int64_t column = walk % p.column_blocks * WALK_COLUMNS;

	if (blockIdx.x < walks)
		walk_back<KEYS, DIAGONAL, DELTA>(p, sequence, column);
	else
		walk_forward<KEYS, DIAGONAL, DELTA, false>(p, sequence, column);
}

template <int KEYS, bool DIAGONAL, bool DELTA>
static __global__ void __launch_bounds__(WALK_THREADS, 2)
        output_kernel(const __grid_constant__ struct problem p)
{
	walk_forward<KEYS, DIAGONAL, DELTA, true>(p, blockIdx.x / p.column_blocks,
	                                          blockIdx.x % p.column_blocks * WALK_COLUMNS);
}

} // namespace

#endif
