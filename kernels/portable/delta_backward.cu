/*
 * Gradients of the matrix recurrence of the delta rules (DeltaNet, Gated DeltaNet, KDA) and of
 * RWKV-6's bonus, chunkwise on the tensor cores, 64 tokens at a time, without atomics.
 *
 * Of a chunk, S the state before it, D the gradient of the state after it, G_t the sum of the log2
 * decays up to token t, of each channel (one for all where the decay is a scalar), E its last:
 *   A_ts = sum_c k_t k_s 2^(G_t - G_s), s < t;  P_ts = scale sum_c q_t k_s 2^(G_t - G_s), s <= t;
 *   M = (I + A diag(beta))^-1;  e = M (v - (k 2^G) S), which is written as k^T (beta e);
 *   S' = 2^(G_E) S + (k 2^(G_E - G))^T (beta e);
 *   x = P^T dout + (k 2^(G_E - G)) D;  y = M^T (beta x) = dv;
 *   D' = 2^(G_E) D + scale (q 2^G)^T dout - (k 2^G)^T y.
 * With X1_ts = scale dout_t.e_s, X2_ts = y_t.e_s, s < t, and x_t = X1_tt:
 *   dq = scale 2^G (dout S^T) + (X1 beta 2^(G_t - G_s)) k + beta x k;
 *   r  = -2^G (y S^T) - (X2 beta 2^(G_t - G_s)) k;
 *   u  = 2^(G_E - G) (e D^T) + (X1 2^(G_t - G_s))^T q - (X2 2^(G_t - G_s))^T k + x q;
 *   dk = r + beta u;  dbeta = k.u;
 *   dlog_decay_t = sum_{i >= t} (q dq + k r - beta k u)_i + 2^(G_E) rowsum(S D)
 *                  + sum_s beta k 2^(G_E - G_s) (e D^T)_s, without the terms with x, which cancel.
 * The bonus is the same with e = v, beta = 1, no y and M, G_(t-1) in the place of q's G_t, and x
 * times the bonus. Every exponent is <= 0, except inside a sub-chunk of 16 tokens that decays by
 * no more than 2^-MILD; other sub-chunks are taken pair by pair within.
 *
 *   1. prepare: P, M, the chunk's decays and, where they differ by channel, the decayed q and k;
 *      a block per chunk and head;
 *   2. forward walk: e, and S before every chunk;
 *   3. reverse walk: dv, and D behind every chunk. In both a block takes 32 columns of the state
 *      of one head, in fp32 in registers, a warp a quarter of the rows;
 *   4. gradient: all that sums over columns; a block per chunk and head.
 * What passes hand on is bf16, in the workspace; channels and columns are padded with zeros.
 * docs/kernels/delta_backward.md.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128, CHUNK = 64, SUB = 16;
constexpr int SLAB = 64;    /* channels at a time where there is a block per chunk */
constexpr int COLUMNS = 32; /* of the state, of a block that walks; of v at a time */
constexpr int STRIDE = 68;  /* of fp32 tiles of 64 columns */
constexpr int MILD = 60;
constexpr int MAX_KEYS = 128;
/* Of a chunk: beta, 2^G and 2^(G_E - G) of its tokens, then 2^(G_E) of the channels. */
constexpr int BETA = 0, FROM_START = CHUNK, TO_END = 2 * CHUNK, WHOLE = 3 * CHUNK;

struct problem {
	struct matrix_recurrence_backward_args a;
	int64_t chunks, column_blocks;
	int keys, values; /* d_k and d_v, padded */
	/* Of every sequence, head and chunk: */
	float *factors;           /* [WHOLE + keys] */
	bf16 *scores, *inverse;   /* [64, 64]: P, M */
	bf16 *q, *k, *k_end;      /* [64, keys]: scale q 2^G, k 2^G, k 2^(G_E - G) */
	bf16 *states, *gradients; /* [keys, values]: S, D */
	bf16 *errors;             /* [64, values]: e */
	float *dbonus;            /* [B, chunks, H, d_k] */
};

/* A chunk of a head. */
struct place {
	int64_t b, h, sequence, chunk, record, first;
	int tokens;
};

static __device__ __forceinline__ struct place place_of(const struct problem &p, int64_t sequence,
                                                        int64_t chunk)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	struct place x;

	x.sequence = sequence;
	x.b = sequence / f.n_heads;
	x.h = sequence % f.n_heads;
	x.chunk = chunk;
	x.record = sequence * p.chunks + chunk;
	x.first = chunk * CHUNK;
	x.tokens = (int)min((int64_t)CHUNK, f.seq_len - x.first);
	return x;
}

/* ---- tiles of bf16 in shared memory ---- */

/* Element offset of 16-byte piece `piece` of a row in a tile of W-wide rows, conflict-free. */
template <int W> static __device__ __forceinline__ int swizzled(int row, int piece)
{
	return row * W + (W == 32 ? piece ^ (row >> 1 & 3) : piece ^ (row & 7)) * 8;
}

template <int W> static __device__ __forceinline__ int element(int row, int column)
{
	return swizzled<W>(row, column / 8) + column % 8;
}

/* The offset of what lies `column` columns, a multiple of 8 that sets no bit of the column there,
 * right of an offset. */
template <int W> static __device__ __forceinline__ int moved(int offset, int column)
{
	constexpr int SWIZZLED = W == 32 ? 24 : 56;

	return (offset ^ (column & SWIZZLED)) + (column & ~63);
}

/* A fragment, rows row .. row + 15, inner k .. k + 15, of a tile [row, inner]. Here and below,
 * places are multiples of 16. */
template <int W>
static __device__ __forceinline__ void left(uint32_t (&a)[4], const bf16 *tile, int row, int k)
{
	const int lane = threadIdx.x % WARP;

	load_matrices(a, tile + row * W + moved<W>(swizzled<W>(lane % 16, lane / 16), k));
}

/* The same of a tile [inner, row]; of row + more, more below 32 and row a multiple of 32. */
template <int W>
static __device__ __forceinline__ void left_transposed(uint32_t (&a)[4], const bf16 *tile, int row,
                                                       int k, int more = 0)
{
	const int lane = threadIdx.x % WARP;
	const int place = swizzled<W>(lane / 16 * 8 + lane % 8, lane / 8 % 2);

	load_matrices_transposed(a, tile + k * W + moved<W>(moved<W>(place, row), more));
}

/* B fragments of columns n .. n + 7 (b[0], b[1]) and n + 8 .. n + 15 of a tile [inner, column];
 * of n + more, as above. */
template <int W>
static __device__ __forceinline__ void right(uint32_t (&b)[4], const bf16 *tile, int k, int n,
                                             int more = 0)
{
	const int lane = threadIdx.x % WARP;
	const int place = swizzled<W>(lane % 16, lane / 16);

	load_matrices_transposed(b, tile + k * W + moved<W>(moved<W>(place, n), more));
}

/* The same of a tile [column, inner]. */
template <int W>
static __device__ __forceinline__ void right_transposed(uint32_t (&b)[4], const bf16 *tile, int k,
                                                        int n)
{
	const int lane = threadIdx.x % WARP;

	load_matrices(b, tile + n * W +
	                         moved<W>(swizzled<W>(lane / 16 * 8 + lane % 8, lane / 8 % 2), k));
}

/* The same number, of which the compiler does not know that: what follows from it is computed where
 * it is used, and takes no registers elsewhere. */
static __device__ __forceinline__ int hidden(int x)
{
	asm volatile("" : "+r"(x));
	return x;
}

/* 64 rows of W elements from a view, zeros past `rows` and `width`, in the background. */
template <int W, int N = THREADS>
static __device__ __forceinline__ void load_rows(bf16 *tile, const bf16 *from, int64_t stride,
                                                 int rows, int64_t width, int thread)
{
#pragma unroll
	for (int j = 0; j < CHUNK * W / 8 / N; j++) {
		const int i = thread + j * N, row = i / (W / 8), column = i % (W / 8) * 8;
		const bool valid = row < rows && column < width;

		copy16_async(tile + swizzled<W>(row, column / 8),
		             from + (valid ? row * stride + column : 0), valid);
	}
}

/* ROWS rows of W elements of a matrix of the workspace, in the background. */
template <int W, int ROWS, int N = THREADS>
static __device__ __forceinline__ void load_dense(bf16 *tile, const bf16 *from, int64_t stride,
                                                  int thread)
{
#pragma unroll
	for (int j = 0; j < ROWS * W / 8 / N; j++) {
		const int i = thread + j * N, row = i / (W / 8), piece = i % (W / 8);

		copy16_async(tile + swizzled<W>(row, piece), from + row * stride + 8 * piece, true);
	}
}

/* `count` floats of the workspace, up to four a thread, in the background. */
static __device__ __forceinline__ void load_floats(float *to, const float *from, int count)
{
	const int i = 4 * threadIdx.x;

	if (i < count)
		copy16_async(to + i, from + i, true);
}

/* The pair at (row, column) of a tile. */
template <int W>
static __device__ __forceinline__ uint32_t &pair_at(bf16 *tile, int row, int column)
{
	return *reinterpret_cast<uint32_t *>(tile + element<W>(row, column));
}

/* This lane's pair of a product's 8 x 8 block at row, column + more; more below 32, column a
 * multiple of 32. */
template <int W>
static __device__ __forceinline__ uint32_t &own_pair(bf16 *tile, int row, int column, int more = 0)
{
	const int lane = threadIdx.x % WARP;
	const int place = swizzled<W>(lane / 4, 0) + 2 * (lane % 4);

	return *reinterpret_cast<uint32_t *>(tile + row * W +
	                                     moved<W>(moved<W>(place, column), more));
}

/*
 * Writes one of the two row halves of a product of N / 8 tiles: this lane's row begins at `row`,
 * NULL to write nothing; `width` columns. The four lanes of a row trade pairs first, so that they
 * write 32 bytes side by side.
 */
template <int N>
static __device__ __forceinline__ void store_row(bf16 *row, const float (&d)[N][4], int half,
                                                 int64_t width)
{
	const int c = threadIdx.x % 4;

#pragma unroll
	for (int n = 0; n < N; n += 2) {
		const uint32_t a = pack(d[n][2 * half], d[n][2 * half + 1]);
		const uint32_t b = pack(d[n + 1][2 * half], d[n + 1][2 * half + 1]);
		const uint32_t far = __shfl_xor_sync(0xffffffffu, c < 2 ? b : a, 2);
		const uint32_t low = c < 2 ? a : far, high = c < 2 ? far : b;
		const uint32_t near = __shfl_xor_sync(0xffffffffu, c % 2 ? low : high, 1);
		const int column = 8 * n + 4 * c;

		if (row && column < width)
			*reinterpret_cast<uint2 *>(row + column) =
			        make_uint2(c % 2 ? near : low, c % 2 ? high : near);
	}
}

/* ---- decays ---- */

static __device__ __forceinline__ bool decays_by_data(const struct matrix_recurrence_args &f)
{
	return f.decay == DECAY_SCALAR || f.decay == DECAY_DIAGONAL;
}

/* log2 decay of a token where it is the same for all channels. */
static __device__ __forceinline__ float scalar_decay(const struct matrix_recurrence_args &f,
                                                     const struct place &x, int row)
{
	if (row >= x.tokens || f.decay == DECAY_NONE)
		return 0.0f;
	if (f.decay == DECAY_CONSTANT)
		return log1pf(-exp2f(-5.0f - (float)(f.first_head + x.h))) * LOG2E;
	return __bfloat162float(*at(f.log_decay, x.b, x.first + row, x.h)) * LOG2E;
}

/* g[t] = G_t, g [2 * 64] with scratch. Synchronizes. */
static __device__ void sum_scalar(float *g, const struct matrix_recurrence_args &f,
                                  const struct place &x)
{
	float *single = g + CHUNK, sum = 0.0f;

	if (threadIdx.x < CHUNK)
		single[threadIdx.x] = scalar_decay(f, x, threadIdx.x);
	__syncthreads();
	if (threadIdx.x < CHUNK) {
#pragma unroll
		for (int row = 0; row < CHUNK; row++) {
			const float more = single[row];

			sum += row <= (int)threadIdx.x ? more : 0.0f;
		}
		g[threadIdx.x] = sum;
	}
	__syncthreads();
}

/* g[(t + 1) * STRIDE + c] = G_t of a slab's channels, row 0 zero; `totals` [N]. Synchronizes. */
template <int N>
static __device__ void sum_diagonal(float *g, float *totals, const struct problem &p,
                                    const struct place &x, int slab)
{
	constexpr int ROWS = CHUNK / (N / SLAB);
	const struct matrix_recurrence_args &f = p.a.forward;
	const int channel = threadIdx.x % SLAB, part = threadIdx.x / SLAB;

	for (int i = threadIdx.x; i < CHUNK * SLAB / 8; i += N) {
		const int row = i / (SLAB / 8), column = i % (SLAB / 8) * 8;
		const int64_t first = slab * SLAB + column;
		float y[8] = {};

		if (row < x.tokens && first < f.d_k)
			load8(y, at(f.log_decay, x.b, x.first + row, x.h) + first);
#pragma unroll
		for (int j = 0; j < 8; j++)
			g[(row + 1) * STRIDE + column + j] = y[j] * LOG2E;
	}
	__syncthreads();
	float *mine = g + (part * ROWS + 1) * STRIDE + channel, sum = 0.0f;

#pragma unroll 8
	for (int row = 0; row < ROWS; row++) {
		sum += mine[row * STRIDE];
		mine[row * STRIDE] = sum;
	}
	totals[threadIdx.x] = sum;
	if (part == 0)
		g[channel] = 0.0f;
	__syncthreads();
	if (part > 0) {
		float before = 0.0f;

		for (int i = 0; i < part; i++)
			before += totals[i * SLAB + channel];
#pragma unroll 8
		for (int row = 0; row < ROWS; row++)
			mine[row * STRIDE] += before;
	}
	__syncthreads();
}

/* Whether none of 32 channels decays by more than 2^-MILD inside a sub-chunk, from the row before
 * it on. */
static __device__ __forceinline__ bool decays_mildly(const float *before)
{
	const float *mine = before + threadIdx.x % WARP;

	return __all_sync(0xffffffffu, mine[0] - mine[SUB * STRIDE] <= MILD);
}

static __device__ __forceinline__ uint32_t scaled(uint32_t pair, float x, float y)
{
	return pack(low_half(pair) * x, high_half(pair) * y);
}

/* The register of a B fragment, of tokens row and row + 1, times 2^(sign (G - reference)). */
static __device__ __forceinline__ uint32_t decayed_rows(uint32_t pair, const float *g, int row,
                                                        float reference, float sign)
{
	return scaled(pair, exp2_fast(sign * (g[row * STRIDE] - reference)),
	              exp2_fast(sign * (g[(row + 1) * STRIDE] - reference)));
}

/* ---- 1. prepare ---- */

struct prepare_memory {
	union {
		struct {
			float g[(CHUNK + 1) * STRIDE];
			float totals[THREADS];
		};
		float system[CHUNK * STRIDE];
	};
	float pairs[CHUNK / SUB][2][SUB * SUB]; /* within sub-chunks, of A and P */
	float products[SUB * CHUNK];
	float beta[CHUNK], own[CHUNK];
	float scalars[2 * CHUNK];
	bf16 q[CHUNK * SLAB], k[CHUNK * SLAB];
};

/* Adds one slab's part of A and P of the pairs in this warp's sub-chunk, exactly; s < t. */
static __device__ __noinline__ void add_pairs(struct prepare_memory &m, int lag, bool delta)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

	for (int i = lane; i < SUB * SUB; i += WARP) {
		const int t = SUB * warp + i / SUB, s = SUB * warp + i % SUB;
		float a = 0.0f, b = 0.0f;

		if (s >= t)
			continue;
		for (int c = 0; c < SLAB; c += 2) {
			const uint32_t k = pair_at<SLAB>(m.k, s, c), q = pair_at<SLAB>(m.q, t, c);
			const uint32_t l = pair_at<SLAB>(m.k, t, c);
			const float *now = m.g + (t + 1 - lag) * STRIDE + c;
			const float *then = m.g + (s + 1) * STRIDE + c;
			const float x = low_half(k) * exp2_fast(now[0] - then[0]);
			const float y = high_half(k) * exp2_fast(now[1] - then[1]);

			b += low_half(q) * x + high_half(q) * y;
			if (delta)
				a += low_half(l) * x + high_half(l) * y;
		}
		m.pairs[warp][0][i] += a;
		m.pairs[warp][1][i] += b;
	}
	__syncwarp();
}

/* One slab's part of A and P where decays differ by channel. */
template <bool DELTA>
static __device__ __forceinline__ void add_decayed(float (&a)[8][4], float (&b)[8][4],
                                                   struct prepare_memory &m)
{
	constexpr int LAG = DELTA ? 0 : 1;
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	const int row = SUB * warp + lane / 4;
	const float *reference = m.g + SUB * warp * STRIDE;
	const bool first_mild = decays_mildly(reference);
	const bool mild = decays_mildly(reference + WARP) && first_mild;

#pragma unroll
	for (int step = 0; step < SLAB / 16; step++) {
		uint32_t q[4], k[4];

		left<SLAB>(q, m.q, SUB * warp, 16 * step);
		left<SLAB>(k, m.k, SUB * warp, 16 * step);
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int channel = 16 * step + 2 * (lane % 4) + 8 * (i / 2);
			const float *now = m.g + (row + 8 * (i % 2) + 1 - LAG) * STRIDE + channel;
			const float x = exp2_fast(now[0] - reference[channel]);
			const float y = exp2_fast(now[1] - reference[channel + 1]);

			q[i] = scaled(q[i], x, y);
			k[i] = scaled(k[i], x, y);
		}
#pragma unroll
		for (int n = 0; n < 8; n++) {
			uint32_t to[2];

			if (n / 2 > warp || (n / 2 == warp && !mild))
				break;
#pragma unroll
			for (int i = 0; i < 2; i++) {
				const int s = 8 * n + lane / 4;
				const int channel = 16 * step + 2 * (lane % 4) + 8 * i;
				const float *then = m.g + (s + 1) * STRIDE + channel;

				to[i] = scaled(pair_at<SLAB>(m.k, s, channel),
				               exp2_fast(reference[channel] - then[0]),
				               exp2_fast(reference[channel + 1] - then[1]));
			}
			if (DELTA)
				multiply_add(a[n], k, to[0], to[1]);
			multiply_add(b[n], q, to[0], to[1]);
		}
	}
	if (!mild)
		add_pairs(m, LAG, DELTA);
}

/* One slab's part where they do not: undecayed products. */
static __device__ __forceinline__ void add_undecayed(float (&a)[8][4], float (&b)[8][4],
                                                     const struct prepare_memory &m)
{
	const int warp = threadIdx.x / WARP;

#pragma unroll
	for (int step = 0; step < SLAB / 16; step++) {
		uint32_t q[4], k[4], to[4];

		left<SLAB>(q, m.q, SUB * warp, 16 * step);
		left<SLAB>(k, m.k, SUB * warp, 16 * step);
#pragma unroll
		for (int n = 0; n < 4; n++) {
			if (n > warp)
				break;
			right_transposed<SLAB>(to, m.k, 16 * step, 16 * n);
			multiply_add(a[2 * n], k, to[0], to[1]);
			multiply_add(a[2 * n + 1], k, to[2], to[3]);
			multiply_add(b[2 * n], q, to[0], to[1]);
			multiply_add(b[2 * n + 1], q, to[2], to[3]);
		}
	}
}

/* The slab's decayed q and k, and the chunk's decays of its channels, into the workspace. */
template <bool DELTA>
static __device__ __forceinline__ void store_decayed(const struct problem &p, const struct place &x,
                                                     const struct prepare_memory &m, int slab)
{
	constexpr int LAG = DELTA ? 0 : 1;
	const float *end = m.g + CHUNK * STRIDE;

	for (int i = threadIdx.x; i < CHUNK * SLAB / 8; i += THREADS) {
		const int row = i / (SLAB / 8), column = i % (SLAB / 8) * 8;
		const int64_t to = (x.record * CHUNK + row) * p.keys + slab * SLAB + column;
		const float *now = m.g + (row + 1) * STRIDE + column;
		float q[8], k[8], y[8];

		load8(q, m.q + swizzled<SLAB>(row, column / 8));
		load8(k, m.k + swizzled<SLAB>(row, column / 8));
#pragma unroll
		for (int j = 0; j < 8; j++) {
			q[j] *= p.a.forward.scale * exp2_fast(now[j - LAG * STRIDE]);
			y[j] = k[j] * exp2_fast(end[column + j] - now[j]);
			k[j] *= exp2_fast(now[j]);
		}
		store8(p.q + to, q);
		store8(p.k_end + to, y);
		if (DELTA)
			store8(p.k + to, k);
	}
	if (threadIdx.x < SLAB)
		p.factors[x.record * (WHOLE + p.keys) + WHOLE + slab * SLAB + threadIdx.x] =
		        exp2_fast(end[threadIdx.x]);
}

/* Adds to own[t] the slab's part of sum_c q_t bonus k_t. */
static __device__ __forceinline__ void add_own(struct prepare_memory &m, const struct problem &p,
                                               const struct place &x, int slab)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const int t = threadIdx.x / 2, first = threadIdx.x % 2 * (SLAB / 2);
	float sum = 0.0f;

	for (int i = 0; i < SLAB / 2; i += 8) {
		float q[8], k[8];

		load8(q, m.q + swizzled<SLAB>(t, (first + i) / 8));
		load8(k, m.k + swizzled<SLAB>(t, (first + i) / 8));
#pragma unroll
		for (int j = 0; j < 8; j++) {
			const int64_t channel = slab * SLAB + first + i + j;

			if (channel < f.d_k)
				sum += q[j] * k[j] * f.bonus[x.h * f.d_k + channel];
		}
	}
	sum = group_sum(sum, 2);
	if (threadIdx.x % 2 == 0)
		m.own[t] += sum;
}

/* The inverse of I plus a strictly lower 16 x 16 block of the system, in its place; by one warp. */
static __device__ __forceinline__ void invert_block(float *block)
{
	const int lane = threadIdx.x % WARP, column = lane % SUB;
	float x[SUB];

#pragma unroll
	for (int r = 0; r < SUB; r++) {
		float even = r == column ? 1.0f : 0.0f, odd = 0.0f;

#pragma unroll
		for (int j = 0; j < r; j += 2) {
			even = fmaf(-block[r * STRIDE + j], x[j], even);
			if (j + 1 < r)
				odd = fmaf(-block[r * STRIDE + j + 1], x[j + 1], odd);
		}
		x[r] = even + odd;
	}
	__syncwarp();
	if (lane < SUB)
#pragma unroll
		for (int r = 0; r < SUB; r++)
			block[r * STRIDE + column] = x[r];
}

/* Four rows of `to` = sign a b: a [4, inner], b [inner, columns]; a lane every 32nd column. */
static __device__ __forceinline__ void multiply_fp32(float *to, int to_stride, const float *a,
                                                     const float *b, int b_stride, int inner,
                                                     int columns, float sign)
{
	for (int column = threadIdx.x % WARP; column < columns; column += WARP) {
		float sum[4] = {};

#pragma unroll 2
		for (int i = 0; i < inner; i += 4) {
			float y[4];

#pragma unroll
			for (int j = 0; j < 4; j++)
				y[j] = b[(i + j) * b_stride + column];
#pragma unroll
			for (int r = 0; r < 4; r++) {
				const float4 x =
				        *reinterpret_cast<const float4 *>(a + r * STRIDE + i);

				sum[r] += x.x * y[0] + x.y * y[1] + x.z * y[2] + x.w * y[3];
			}
		}
#pragma unroll
		for (int r = 0; r < 4; r++)
			to[r * to_stride + column] = sign * sum[r];
	}
}

/* The inverse of I plus the strictly lower system, in its place: with D_i the inverses of blocks on
 * the diagonal, block row i is -D_i (A_i. T) left of it. Synchronizes. */
static __device__ void invert(struct prepare_memory &m)
{
	const int warp = threadIdx.x / WARP;

	__syncthreads();
	invert_block(m.system + warp * SUB * (STRIDE + 1));
	for (int i = 1; i < CHUNK / SUB; i++) {
		float *row = m.system + (i * SUB + 4 * warp) * STRIDE;

		__syncthreads();
		multiply_fp32(m.products + 4 * warp * CHUNK, CHUNK, row, m.system, STRIDE, i * SUB,
		              i * SUB, 1.0f);
		__syncthreads();
		multiply_fp32(row, STRIDE, row + i * SUB, m.products, CHUNK, SUB, i * SUB, -1.0f);
	}
	__syncthreads();
}

template <bool DIAGONAL, bool DELTA>
static __global__ void __launch_bounds__(THREADS, 3)
        prepare_kernel(const __grid_constant__ struct problem p)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct place x = place_of(p, blockIdx.x / p.chunks, blockIdx.x % p.chunks);
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	struct prepare_memory &m = *reinterpret_cast<struct prepare_memory *>(shared_memory);
	float *factors = p.factors + x.record * (WHOLE + p.keys);
	float a[8][4] = {}, b[8][4] = {}; /* 16 rows of A and P */

	if (threadIdx.x < CHUNK) {
		const int t = threadIdx.x;
		const float beta = !DELTA || t >= x.tokens
		                           ? 1.0f
		                           : __bfloat162float(*at(f.beta, x.b, x.first + t, x.h));

		m.beta[t] = beta;
		m.own[t] = 0.0f;
		factors[BETA + t] = beta;
	}
	for (int i = threadIdx.x; DIAGONAL && i < 2 * CHUNK * SUB; i += THREADS)
		(&m.pairs[0][0][0])[i] = 0.0f;
	if (!DIAGONAL) {
		sum_scalar(m.scalars, f, x);
		if (threadIdx.x < CHUNK) {
			factors[FROM_START + threadIdx.x] = exp2_fast(m.scalars[threadIdx.x]);
			factors[TO_END + threadIdx.x] =
			        exp2_fast(m.scalars[CHUNK - 1] - m.scalars[threadIdx.x]);
		}
	}
	for (int slab = 0; slab < p.keys / SLAB; slab++) {
		__syncthreads();
		load_rows<SLAB>(m.q, at(f.q, x.b, x.first, x.h) + slab * SLAB, f.q.token, x.tokens,
		                f.d_k - slab * SLAB, threadIdx.x);
		load_rows<SLAB>(m.k, at(f.k, x.b, x.first, x.h) + slab * SLAB, f.k.token, x.tokens,
		                f.d_k - slab * SLAB, threadIdx.x);
		copy_commit();
		if (DIAGONAL)
			sum_diagonal<THREADS>(m.g, m.totals, p, x, slab);
		copy_wait<0>();
		__syncthreads();
		if (DIAGONAL) {
			add_decayed<DELTA>(a, b, m);
			store_decayed<DELTA>(p, x, m, slab);
		} else {
			add_undecayed(a, b, m);
		}
		if (!DELTA)
			add_own(m, p, x, slab);
		else if (DIAGONAL && threadIdx.x % 2 == 0) {
			/* The token's own score, which pairs and other references leave out. */
			const int t = threadIdx.x / 2;
			float sum = 0.0f;

			for (int i = 0; i < SLAB; i += 8) {
				float y[8], z[8];

				load8(y, m.q + swizzled<SLAB>(t, i / 8));
				load8(z, m.k + swizzled<SLAB>(t, i / 8));
#pragma unroll
				for (int j = 0; j < 8; j++)
					sum += y[j] * z[j];
			}
			m.own[t] += sum;
		}
	}
	__syncthreads();
	/* Lower triangles, decayed, into the system and the workspace. */
#pragma unroll
	for (int n = 0; n < 8; n++) {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int t = SUB * warp + lane / 4 + 8 * (i / 2);
			const int s = 8 * n + 2 * (lane % 4) + i % 2;
			float factor = 1.0f;

			if (DIAGONAL && n / 2 == warp) {
				const int pair = t % SUB * SUB + s % SUB;

				a[n][i] = (s < t ? a[n][i] : 0.0f) + m.pairs[warp][0][pair];
				b[n][i] = (s < t ? b[n][i] : 0.0f) + m.pairs[warp][1][pair];
				if (s == t)
					b[n][i] = m.own[t];
			}
			if (!DIAGONAL && s <= t)
				factor = exp2_fast(m.scalars[t] - m.scalars[s]);
			b[n][i] = s <= t ? f.scale * factor * b[n][i] : 0.0f;
			if (DELTA)
				m.system[t * STRIDE + s] =
				        s < t ? m.beta[s] * factor * a[n][i] : 0.0f;
		}
	}
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = SUB * warp + lane / 4 + 8 * half;

		store_row(p.scores + (x.record * CHUNK + t) * CHUNK, b, half, CHUNK);
	}
	if (!DELTA)
		return;
	invert(m);
	for (int i = threadIdx.x; i < CHUNK * CHUNK / 8; i += THREADS) {
		const int row = i / (CHUNK / 8), column = i % (CHUNK / 8) * 8;
		float y[8];

		load8f(y, m.system + row * STRIDE + column);
		store8(p.inverse + x.record * CHUNK * CHUNK + 8 * i, y);
	}
}

/* ---- 2. the walks ---- */

/* A block's columns of the state; a warp has half of them, and a quarter of the rows or tokens. */
constexpr int WALK_THREADS = 256, WALK_COLUMNS = 64, HALF = 32, TILES = HALF / 8;

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
			float *const place = memory + (sequence * f.d_k + key) * f.d_v + value;
			const bool valid = memory && key < f.d_k && value < f.d_v;

			if (!STORE)
				x[m][n][e] = valid ? *place : 0.0f;
			else if (valid)
				*place = x[m][n][e];
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

template <int KEYS, bool DIAGONAL, bool DELTA>
static __device__ __forceinline__ void walk_forward(const struct problem &p, int64_t sequence,
                                                    int64_t column)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct place head = place_of(p, sequence, 0);
	const struct position at = position_of();
	const int row = SUB * at.part + at.lane / 4;
	auto &m = *reinterpret_cast<struct forward_memory<KEYS> *>(shared_memory);
	const int64_t tokens = head.record * CHUNK;
	const struct stream<KEYS> k =
	        DIAGONAL ? stream<KEYS>(p.k + tokens * KEYS, KEYS, KEYS)
	                 : stream<KEYS>(::at(f.k, head.b, 0, head.h), f.k.token, f.d_k);
	const struct stream<KEYS> ends(p.k_end + tokens * KEYS, KEYS, KEYS);
	const struct stream<WALK_COLUMNS> v(::at(f.v, head.b, 0, head.h) + column, f.v.token,
	                                    f.d_v - column);
	bf16 *const errors = p.errors + (tokens + row) * p.values + column + at.column;
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
		copy_commit();
	};

	s.template move<false>(const_cast<float *>(f.h0), f, sequence, column);
	clear_above(m.inverse);
	load_first(0);
	load_inverse(0);
#pragma unroll 1
	for (int64_t chunk = 0; chunk < p.chunks; chunk++) {
		const int slot = chunk % 2;
		const int64_t record = head.record + chunk;
		const float *factors = m.factors[slot];
		struct rows d;

		s.to_tile(m.s);
		copy_wait<1>();
		__syncthreads();
		if (DIAGONAL)
			ends.load(m.k[1], chunk, CHUNK);
		copy_commit();
		keep_state<KEYS>(p.states + record * KEYS * p.values + column, p.values, m.s);
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
			store_row(to, d.x, 0, HALF);
			store_row(to + 8 * p.values, d.x, 1, HALF);
			d.to_tile(m.v[slot],
			          factors[BETA + row] * (DIAGONAL ? 1.0f : factors[TO_END + row]),
			          factors[BETA + row + 8] *
			                  (DIAGONAL ? 1.0f : factors[TO_END + row + 8]));
		}
		copy_wait<1>();
		__syncthreads();
		load_inverse(chunk + 1);
		s.template decay<DIAGONAL>(factors);
		s.add(DIAGONAL ? m.k[1] : m.k[slot], m.v[slot]);
	}
	copy_wait<0>();
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
		walk_forward<KEYS, DIAGONAL, DELTA>(p, sequence, column);
}

/* ---- 3. gradients that sum over columns ---- */

/* A warp takes 16 tokens, and half of a slab's channels or of the tokens as keys. */
constexpr int GRADIENT_THREADS = 256, STAGES = 3;

enum { DOUT, ERRORS, VALUES, STATES, GRADIENTS, N_OPERANDS };

/* 32 columns of a chunk's tokens and of a slab's rows of the states. */
typedef bf16 stage[N_OPERANDS][CHUNK * COLUMNS];

struct gradient_memory {
	union {
		stage stages[STAGES];
		struct {
			float g[(CHUNK + 1) * STRIDE];
			float flow[CHUNK * STRIDE]; /* q dq + k r - beta k u */
		};
	};
	bf16 q[CHUNK * SLAB], k[CHUNK * SLAB];
	bf16 x1[CHUNK * CHUNK], x2[CHUNK * CHUNK]; /* X1, -X2, strictly lower */
	float own[CHUNK];                          /* x */
	float factors[WHOLE];
	float scalars[2 * CHUNK];
	float ends[SLAB];                 /* rowsum(S D) of channels */
	float written[CHUNK / SUB][SLAB]; /* sums of what tokens add to it */
	float totals[GRADIENT_THREADS], bonuses[GRADIENT_THREADS];
	float sums[GRADIENT_THREADS / WARP];
	float rows[2][CHUNK]; /* dbeta and flows of the second half of channels */
	float bonus[SLAB];
};

/* Rows of dq, r and u, as products leave them. */
struct gradients {
	float q[TILES][4], r[TILES][4], u[TILES][4];
};

/* Where this thread is in the products: its warp's first token and first channel or key. */
struct corner {
	int token, channel, lane;
};

static __device__ __forceinline__ struct corner corner_of()
{
	const int thread = hidden(threadIdx.x), warp = thread / WARP;

	return {warp % (CHUNK / SUB) * SUB, warp / (CHUNK / SUB) * HALF, thread % WARP};
}

/* This lane's token and channel of element e of tile n. */
static __device__ __forceinline__ int token_of(struct corner c, int e)
{
	return c.token + c.lane / 4 + e / 2 * 8;
}

static __device__ __forceinline__ int channel_of(struct corner c, int n, int e)
{
	return c.channel + 8 * n + c.lane % 4 * 2 + e % 2;
}

/* Where this thread's parts of the next stage to load are; slab after slab, 32 columns a stage. */
template <bool DELTA> struct cursor {
	const bf16 *dout, *errors, *values, *states, *gradients;
	int column, place, slot;
	bool inside; /* the sequence */

	__device__ __forceinline__ cursor(const struct problem &p, const struct place &x)
	{
		const int row = threadIdx.x / (COLUMNS / 8);
		const int64_t t = x.first + row, state = (x.record * p.keys + row) * p.values;

		column = threadIdx.x % (COLUMNS / 8) * 8;
		place = swizzled<COLUMNS>(row, column / 8);
		slot = 0;
		inside = row < x.tokens;
		dout = at(p.a.dout, x.b, t, x.h) + column;
		errors = DELTA ? p.errors + (x.record * CHUNK + row) * p.values + column
		               : at(p.a.forward.v, x.b, t, x.h) + column;
		values = DELTA ? at(p.a.dv, x.b, t, x.h) + column : NULL;
		states = p.states + state + column;
		gradients = p.gradients + state + column;
	}

	__device__ __forceinline__ void load(stage (&stages)[STAGES], const struct problem &p)
	{
		bf16 *const to = stages[slot][0] + place;
		const bool valid = inside && column < p.a.forward.d_v;

		copy16_async(to + DOUT * CHUNK * COLUMNS, dout, valid);
		copy16_async(to + ERRORS * CHUNK * COLUMNS, errors, DELTA || valid);
		if (DELTA)
			copy16_async(to + VALUES * CHUNK * COLUMNS, values, valid);
		copy16_async(to + STATES * CHUNK * COLUMNS, states, true);
		copy16_async(to + GRADIENTS * CHUNK * COLUMNS, gradients, true);
		/* The next slab has the same tokens, and rows of the states further on. */
		column += COLUMNS;
		const bool wraps = column >= p.values;
		const int of_tokens = wraps ? COLUMNS - p.values : COLUMNS;
		const int of_states = wraps ? COLUMNS + (SLAB - 1) * p.values : COLUMNS;

		column -= wraps ? p.values : 0;
		dout += of_tokens;
		errors += of_tokens;
		values += of_tokens;
		states += of_states;
		gradients += of_states;
		slot = slot + 1 < STAGES ? slot + 1 : 0;
	}
};

/* X1 and X2 and the tokens' own x into shared memory. */
template <bool DIAGONAL, bool DELTA>
static __device__ __forceinline__ void
store_tokens(struct gradient_memory &m, const float (&x1)[TILES][4], const float (&x2)[TILES][4],
             float scale, struct corner c)
{

#pragma unroll
	for (int n = 0; n < TILES; n++) {
		if (c.channel + n / 2 * SUB > c.token)
			break;
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int t = token_of(c, 2 * half), first = channel_of(c, n, 0);
			float one[2], two[2];

#pragma unroll
			for (int i = 0; i < 2; i++) {
				const int s = first + i;
				const float power =
				        DIAGONAL || s > t ? 1.0f
				                          : exp2_fast(m.scalars[t] - m.scalars[s]);

				one[i] = scale * x1[n][2 * half + i];
				if (s == t)
					m.own[t] = one[i];
				one[i] = s < t ? power * one[i] : 0.0f;
				two[i] = s < t ? -power * x2[n][2 * half + i] : 0.0f;
			}
			own_pair<CHUNK>(m.x1, c.token + 8 * half, c.channel, 8 * n) =
			        pack(one[0], one[1]);
			if (DELTA)
				own_pair<CHUNK>(m.x2, c.token + 8 * half, c.channel, 8 * n) =
				        pack(two[0], two[1]);
		}
	}
}

/*
 * d = dout S^T, y S^T, e D^T of a slab's channels, m.ends; FIRST: also what store_tokens() stores,
 * of the first slab. The stages of the next slab are on their way afterwards, unless decays of
 * channels take their place. Synchronizes.
 */
template <bool DIAGONAL, bool DELTA, bool FIRST>
static __device__ __forceinline__ void
multiply_states(struct gradients &d, struct gradient_memory &m, const struct problem &p,
                const struct place &x, int slab, struct cursor<DELTA> &next, int &slot)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct corner c = corner_of();
	const int count = p.values / COLUMNS;
	/* Stages that may be loaded before this slab ends. */
	const int limit = DIAGONAL ? count : (p.keys / SLAB - slab) * count;
	float x1[TILES][4] = {}, x2[TILES][4] = {}, end = 0.0f;
	const auto load = [&](int step) {
		if (step < limit)
			next.load(m.stages, p);
		copy_commit();
	};

	load_rows<SLAB, GRADIENT_THREADS>(m.q, at(f.q, x.b, x.first, x.h) + slab * SLAB, f.q.token,
	                                  x.tokens, f.d_k - slab * SLAB, threadIdx.x);
	load_rows<SLAB, GRADIENT_THREADS>(m.k, at(f.k, x.b, x.first, x.h) + slab * SLAB, f.k.token,
	                                  x.tokens, f.d_k - slab * SLAB, threadIdx.x);
	if (DIAGONAL || FIRST) {
		load(0);
		load(1);
	}
#pragma unroll
	for (int i = 0; i < TILES * 4; i++)
		d.q[i / 4][i % 4] = d.r[i / 4][i % 4] = d.u[i / 4][i % 4] = 0.0f;
#pragma unroll 1
	for (int i = 0; i < count; i++) {
		const stage &from = m.stages[slot];

		copy_wait<1>();
		__syncthreads();
		load(i + 2);
		slot = slot + 1 < STAGES ? slot + 1 : 0;
#pragma unroll
		for (int step = 0; step < COLUMNS; step += 16) {
			uint32_t dout[4], y[4], e[4], b[4];

			left<COLUMNS>(dout, from[DOUT], c.token, step);
			left<COLUMNS>(e, from[ERRORS], c.token, step);
			if (DELTA)
				left<COLUMNS>(y, from[VALUES], c.token, step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				const int channel = c.channel + 8 * n;

				right_transposed<COLUMNS>(b, from[STATES], step, channel);
				multiply_add(d.q[n], dout, b[0], b[1]);
				multiply_add(d.q[n + 1], dout, b[2], b[3]);
				if (DELTA) {
					multiply_add(d.r[n], y, b[0], b[1]);
					multiply_add(d.r[n + 1], y, b[2], b[3]);
				}
				right_transposed<COLUMNS>(b, from[GRADIENTS], step, channel);
				multiply_add(d.u[n], e, b[0], b[1]);
				multiply_add(d.u[n + 1], e, b[2], b[3]);
				if (!FIRST || channel > c.token)
					continue;
				right_transposed<COLUMNS>(b, from[ERRORS], step, channel);
				multiply_add(x1[n], dout, b[0], b[1]);
				multiply_add(x1[n + 1], dout, b[2], b[3]);
				if (DELTA) {
					multiply_add(x2[n], y, b[0], b[1]);
					multiply_add(x2[n + 1], y, b[2], b[3]);
				}
			}
		}
		if (decays_by_data(f)) {
			const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
			float s[8], g[8];

			load8(s, from[STATES] + swizzled<COLUMNS>(row, piece));
			load8(g, from[GRADIENTS] + swizzled<COLUMNS>(row, piece));
#pragma unroll
			for (int j = 0; j < 8; j++)
				end += s[j] * g[j];
		}
	}
	end = group_sum(end, 4);
	if (threadIdx.x % 4 == 0)
		m.ends[threadIdx.x / 4] = end;
	if (FIRST)
		store_tokens<DIAGONAL, DELTA>(m, x1, x2, f.scale, c);
	/* q and k, which a later slab's third stage brings; the first slab's have been waited for.
	 */
	if (DIAGONAL || (!FIRST && count < 3))
		copy_wait<0>();
	else if (!FIRST)
		copy_wait<2>();
	__syncthreads();
}

/* The columns of an A fragment, of tokens first .. first + 15, times beta. */
static __device__ __forceinline__ void scale_columns(uint32_t (&a)[4], const float *beta)
{
	const float *mine = beta + 2 * (threadIdx.x % 4);

#pragma unroll
	for (int i = 0; i < 4; i++)
		a[i] = scaled(a[i], mine[i / 2 * 8], mine[i / 2 * 8 + 1]);
}

/* What tokens of the chunk give each other, where decays are in X1 and X2 already. */
static __device__ __forceinline__ void add_tokens(struct gradients &d, struct gradient_memory &m,
                                                  struct corner c)
{

#pragma unroll 1
	for (int step = 0; step < CHUNK; step += 16) {
		uint32_t one[4], two[4], q[4], k[4];

		if (step <= c.token) {
			left<CHUNK>(one, m.x1, c.token, step);
			left<CHUNK>(two, m.x2, c.token, step);
			scale_columns(one, m.factors + BETA + step);
			scale_columns(two, m.factors + BETA + step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				right<SLAB>(k, m.k, step, c.channel, 8 * n);
				multiply_add(d.q[n], one, k[0], k[1]);
				multiply_add(d.q[n + 1], one, k[2], k[3]);
				multiply_add(d.r[n], two, k[0], k[1]);
				multiply_add(d.r[n + 1], two, k[2], k[3]);
			}
		}
		if (step >= c.token) {
			left_transposed<CHUNK>(one, m.x1, c.token, step);
			left_transposed<CHUNK>(two, m.x2, c.token, step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				right<SLAB>(q, m.q, step, c.channel, 8 * n);
				right<SLAB>(k, m.k, step, c.channel, 8 * n);
				multiply_add(d.u[n], one, q[0], q[1]);
				multiply_add(d.u[n + 1], one, q[2], q[3]);
				multiply_add(d.u[n], two, k[0], k[1]);
				multiply_add(d.u[n + 1], two, k[2], k[3]);
			}
		}
	}
}

/*
 * The same where decays differ by channel: to the tokens of this warp's sub-chunk as queries
 * relative to its start, as keys relative to its end.
 */
template <bool DELTA>
static __device__ __forceinline__ void
add_decayed_tokens(struct gradients &d, struct gradient_memory &m, bool mild, struct corner c)
{
	constexpr int LAG = DELTA ? 0 : 1;
	const int lane = c.lane;
	const float *start = m.g + c.token * STRIDE, *end = start + SUB * STRIDE;

#pragma unroll 1
	for (int step = 0; step < c.token + (mild ? SUB : 0); step += 16) {
		uint32_t one[4], two[4], k[4];

		left<CHUNK>(one, m.x1, c.token, step);
		if (DELTA) {
			left<CHUNK>(two, m.x2, c.token, step);
			scale_columns(one, m.factors + BETA + step);
			scale_columns(two, m.factors + BETA + step);
		}
#pragma unroll
		for (int n = 0; n < TILES; n += 2) {
			right<SLAB>(k, m.k, step, c.channel, 8 * n);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				const int channel = c.channel + 8 * n + lane / 4 + i / 2 * 8;
				const int row = step + 2 * (lane % 4) + i % 2 * 8;

				k[i] = decayed_rows(k[i], m.g + STRIDE + channel, row,
				                    start[channel], -1.0f);
			}
			multiply_add(d.q[n], one, k[0], k[1]);
			multiply_add(d.q[n + 1], one, k[2], k[3]);
			if (DELTA) {
				multiply_add(d.r[n], two, k[0], k[1]);
				multiply_add(d.r[n + 1], two, k[2], k[3]);
			}
		}
	}
#pragma unroll 1
	for (int step = c.token + (mild ? 0 : SUB); step < CHUNK; step += 16) {
		uint32_t one[4], two[4], q[4], k[4];

		left_transposed<CHUNK>(one, m.x1, c.token, step);
		if (DELTA)
			left_transposed<CHUNK>(two, m.x2, c.token, step);
#pragma unroll
		for (int n = 0; n < TILES; n += 2) {
			right<SLAB>(q, m.q, step, c.channel, 8 * n);
			if (DELTA)
				right<SLAB>(k, m.k, step, c.channel, 8 * n);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				const int channel = c.channel + 8 * n + lane / 4 + i / 2 * 8;
				const int row = step + 2 * (lane % 4) + i % 2 * 8;
				const float *now = m.g + (row + 1 - LAG) * STRIDE + channel;
				const float a = exp2_fast(now[0] - end[channel]);
				const float b = exp2_fast(now[STRIDE] - end[channel]);

				q[i] = scaled(q[i], a, b);
				if (DELTA)
					k[i] = scaled(k[i], a, b);
			}
			multiply_add(d.u[n], one, q[0], q[1]);
			multiply_add(d.u[n + 1], one, q[2], q[3]);
			if (DELTA) {
				multiply_add(d.u[n], two, k[0], k[1]);
				multiply_add(d.u[n + 1], two, k[2], k[3]);
			}
		}
	}
}

static __device__ __forceinline__ float value_at(const bf16 *tile, int row, int column)
{
	return __bfloat162float(tile[element<64>(row, column)]);
}

/*
 * One of dq, r and u (which: 0, 1, 2) of what the tokens of this warp's sub-chunk give each other,
 * pair by pair, into its part of m.flow.
 */
static __device__ __noinline__ void add_pairs(struct gradient_memory &m, int which, int lag)
{
	const struct corner c = corner_of();
	const int channel = c.channel + threadIdx.x % WARP;
	const float *g = m.g + channel; /* of token t at t + 1 */

	for (int mine = c.token; mine < c.token + SUB; mine++) {
		float sum = 0.0f;

		if (which < 2) {
			const float now = g[(mine + 1 - (which == 0 ? lag : 0)) * STRIDE];
			const bf16 *weights = which == 0 ? m.x1 : m.x2;

			for (int s = c.token; s < mine; s++)
				sum += value_at(weights, mine, s) * m.factors[BETA + s] *
				       value_at(m.k, s, channel) *
				       exp2_fast(now - g[(s + 1) * STRIDE]);
		} else {
			const float now = g[(mine + 1) * STRIDE];

			for (int t = mine + 1; t < c.token + SUB; t++) {
				sum += value_at(m.x1, t, mine) * value_at(m.q, t, channel) *
				       exp2_fast(g[(t + 1 - lag) * STRIDE] - now);
				if (lag == 0)
					sum += value_at(m.x2, t, mine) * value_at(m.k, t, channel) *
					       exp2_fast(g[(t + 1) * STRIDE] - now);
			}
		}
		m.flow[mine * STRIDE + channel] = sum;
	}
	__syncwarp();
}

/* Adds this warp's part of m.flow. */
static __device__ __forceinline__ void add_flow(float (&d)[TILES][4],
                                                const struct gradient_memory &m, struct corner c)
{

#pragma unroll
	for (int i = 0; i < TILES * 4; i++)
		d[i / 4][i % 4] +=
		        m.flow[token_of(c, i % 4) * STRIDE + channel_of(c, i / 4, i % 4)];
	__syncwarp();
}

/* Where decays differ by channel: dq, r and u without the tokens' own parts, and the sums
 * m.written. */
template <bool DELTA>
static __device__ __forceinline__ void finish_decayed(struct gradients &d,
                                                      struct gradient_memory &m, float scale)
{
	constexpr int LAG = DELTA ? 0 : 1;
	const struct corner c = corner_of();
	const int lane = c.lane;
	const float *start = m.g + c.token * STRIDE, *end = start + SUB * STRIDE;
	const bool mild = decays_mildly(start + c.channel);

#pragma unroll
	for (int i = 0; i < TILES * 2; i++) {
		const int n = i / 2, channel = channel_of(c, n, i % 2);
		const float from = exp2_fast(start[channel]);
		const float to = exp2_fast(m.g[CHUNK * STRIDE + channel] - end[channel]);
		float sum = 0.0f;

#pragma unroll
		for (int e = i % 2; e < 4; e += 2) {
			const int t = token_of(c, e);

			d.q[n][e] *= scale * from;
			d.r[n][e] *= -from;
			d.u[n][e] *= to;
			const uint32_t ks =
			        own_pair<SLAB>(m.k, c.token + e / 2 * 8, c.channel, 8 * n);
			const float k = i % 2 ? high_half(ks) : low_half(ks);

			sum += m.factors[BETA + t] * k *
			       exp2_fast(end[channel] - m.g[(t + 1) * STRIDE + channel]) *
			       d.u[n][e];
		}
#pragma unroll
		for (int offset = 4; offset < WARP; offset *= 2)
			sum += __shfl_xor_sync(0xffffffffu, sum, offset);
		if (lane < 4)
			m.written[c.token / SUB][channel] = sum;
	}
	add_decayed_tokens<DELTA>(d, m, mild, c);
#pragma unroll
	for (int i = 0; i < TILES * 4; i++) {
		const int n = i / 4, e = i % 4, channel = channel_of(c, n, e);
		const float *now = m.g + (token_of(c, e) + 1) * STRIDE + channel;
		const float power = exp2_fast(now[-LAG * STRIDE] - start[channel]);

		d.q[n][e] *= power;
		d.r[n][e] *= power;
		d.u[n][e] *= exp2_fast(end[channel] - now[0]);
	}
	if (mild)
		return;
	add_pairs(m, 0, LAG);
	add_flow(d.q, m, c);
	if (DELTA) {
		add_pairs(m, 1, LAG);
		add_flow(d.r, m, c);
	}
	add_pairs(m, 2, LAG);
	add_flow(d.u, m, c);
}

/* Where they do not, the same; written[]: of this lane's two tokens what they add to the state. */
static __device__ __forceinline__ void
finish_undecayed(struct gradients &d, struct gradient_memory &m, float scale, float (&written)[2])
{
	const struct corner c = corner_of();

#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);
		const float from = m.factors[FROM_START + t], to = m.factors[TO_END + t];

#pragma unroll
		for (int n = 0; n < TILES; n++) {
			const uint32_t ks =
			        own_pair<SLAB>(m.k, c.token + 8 * half, c.channel, 8 * n);

#pragma unroll
			for (int e = 2 * half; e < 2 * half + 2; e++) {
				d.q[n][e] *= scale * from;
				d.r[n][e] *= -from;
				d.u[n][e] *= to;
			}
			written[half] += low_half(ks) * d.u[n][2 * half] +
			                 high_half(ks) * d.u[n][2 * half + 1];
		}
	}
	add_tokens(d, m, c);
}

/* dlog_decay of a slab's channels, from m.flow; dbonus. Synchronizes. */
template <bool DELTA>
static __device__ __forceinline__ void
store_decays(struct gradient_memory &m, const struct problem &p, const struct place &x, int slab)
{
	constexpr int PARTS = GRADIENT_THREADS / SLAB, ROWS = CHUNK / PARTS;
	const struct matrix_recurrence_args &f = p.a.forward;
	const int column = threadIdx.x % SLAB, part = threadIdx.x / SLAB, first = part * ROWS;
	float *mine = m.flow + first * STRIDE + column, sum = 0.0f, bonus = 0.0f;

	__syncthreads();
#pragma unroll
	for (int t = ROWS - 1; t >= 0; t--) {
		sum += mine[t * STRIDE];
		mine[t * STRIDE] = sum;
	}
	m.totals[threadIdx.x] = sum;
	for (int t = first; !DELTA && t < first + ROWS; t++)
		bonus += m.own[t] * value_at(m.q, t, column) * value_at(m.k, t, column);
	m.bonuses[threadIdx.x] = bonus;
	__syncthreads();
	float end = exp2_fast(m.g[CHUNK * STRIDE + column]) * m.ends[column];

#pragma unroll
	for (int i = 0; i < CHUNK / SUB; i++)
		end += m.written[i][column];
	for (int i = part + 1; i < PARTS; i++)
		end += m.totals[i * SLAB + column];
#pragma unroll
	for (int t = 0; t < ROWS; t++)
		mine[t * STRIDE] += end;
	/* Nothing decays, where rounding would leave something. */
	if (part == 0 && x.first == 0 && !f.h0 && !isnan(mine[0]))
		mine[0] = 0.0f;
	if (!DELTA && part == 0 && slab * SLAB + column < f.d_k) {
		bonus = 0.0f;
		for (int i = 0; i < PARTS; i++)
			bonus += m.bonuses[i * SLAB + column];
		p.dbonus[((x.b * p.chunks + x.chunk) * f.n_heads + x.h) * f.d_k + slab * SLAB +
		         column] = bonus;
	}
	__syncthreads();
	for (int i = threadIdx.x; i < CHUNK * SLAB / 8; i += GRADIENT_THREADS) {
		const int t = i / (SLAB / 8), at_column = i % (SLAB / 8) * 8;
		const int64_t channel = slab * SLAB + at_column;
		float y[8];

		if (t >= x.tokens || channel >= f.d_k)
			continue;
		load8f(y, m.flow + t * STRIDE + at_column);
		store8(at(p.a.dlog_decay, x.b, x.first + t, x.h) + channel, y);
	}
}

/* dq and dk of a slab; the tokens' parts of dbeta and of the decays' gradients. */
template <bool DIAGONAL, bool DELTA>
static __device__ __forceinline__ void store_keys(struct gradients &d, struct gradient_memory &m,
                                                  const struct problem &p, const struct place &x,
                                                  int slab, float (&dbeta)[2], float (&flow)[2])
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct corner c = corner_of();
	const int64_t first = slab * SLAB + c.channel, width = f.d_k - first;

#pragma unroll
	for (int i = 0; i < TILES * 2; i++) {
		const int n = i / 2, half = i % 2, t = token_of(c, 2 * half);
		const int channel = channel_of(c, n, 0), row = c.token + 8 * half;
		const float beta = m.factors[BETA + t];
		const uint32_t qs = own_pair<SLAB>(m.q, row, c.channel, 8 * n);
		const uint32_t ks = own_pair<SLAB>(m.k, row, c.channel, 8 * n);

#pragma unroll
		for (int j = 0; j < 2; j++) {
			const int e = 2 * half + j;
			const float q = j ? high_half(qs) : low_half(qs);
			const float k = j ? high_half(ks) : low_half(ks);
			const float own = DELTA ? m.own[t] : m.own[t] * m.bonus[channel + j];
			const float of_query = q * d.q[n][e];
			const float of_key = k * d.r[n][e] - beta * k * d.u[n][e];

			if (!DIAGONAL)
				flow[half] += of_query + of_key;
			else
				m.flow[t * STRIDE + channel + j] =
				        DELTA ? of_query + of_key : of_key;
			d.q[n][e] += beta * own * k;
			d.u[n][e] += own * q;
			if (DELTA) {
				dbeta[half] += k * d.u[n][e];
				d.u[n][e] = d.r[n][e] + beta * d.u[n][e];
			} else {
				d.r[n][e] = of_query; /* it is the token before that decays it */
			}
		}
	}
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);
		const bool valid = t < x.tokens && width > 0;

		store_row(valid ? at(p.a.dq, x.b, x.first + t, x.h) + first : NULL, d.q, half,
		          width);
		store_row(valid ? at(p.a.dk, x.b, x.first + t, x.h) + first : NULL, d.u, half,
		          width);
	}
	if (DELTA)
		return;
	__syncthreads();
#pragma unroll
	for (int i = 0; i < TILES * 4; i++) {
		const int t = token_of(c, i % 4);

		if (t > 0)
			m.flow[(t - 1) * STRIDE + channel_of(c, i / 4, i % 4)] += d.r[i / 4][i % 4];
	}
}

/* dbeta, and dlog_decay where it is a scalar. `written` sums over all tokens and channels. */
static __device__ __forceinline__ void store_scalars(struct gradient_memory &m,
                                                     const struct problem &p, const struct place &x,
                                                     float (&dbeta)[2], float (&flow)[2],
                                                     float written)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct corner c = corner_of();
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

	written = group_sum(written, WARP);
	if (lane == 0)
		m.sums[warp] = written;
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);

		dbeta[half] = group_sum(dbeta[half], 4);
		flow[half] = group_sum(flow[half], 4);
		if (lane % 4 == 0 && c.channel > 0) {
			m.rows[0][t] = dbeta[half];
			m.rows[1][t] = flow[half];
		}
	}
	__syncthreads();
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);

		if (lane % 4 != 0 || c.channel > 0)
			continue;
		if (t < x.tokens)
			*at(p.a.dbeta, x.b, x.first + t, x.h) =
			        __float2bfloat16(dbeta[half] + m.rows[0][t]);
		m.scalars[t] = flow[half] + m.rows[1][t];
	}
	if (f.decay != DECAY_SCALAR)
		return;
	__syncthreads();
	if ((int)threadIdx.x >= x.tokens)
		return;
	float sum = 0.0f;

	for (int i = 0; i < GRADIENT_THREADS / WARP; i++)
		sum += m.sums[i];
#pragma unroll
	for (int t = CHUNK - 1; t >= 0; t--) {
		const float more = m.scalars[t];

		sum += t >= (int)threadIdx.x ? more : 0.0f;
	}
	if (x.first + threadIdx.x == 0 && !f.h0 && !isnan(sum))
		sum = 0.0f; /* nothing decays, where rounding would leave something */
	*at(p.a.dlog_decay, x.b, x.first + threadIdx.x, x.h) = __float2bfloat16(sum);
}

template <bool DIAGONAL, bool DELTA>
static __global__ void __launch_bounds__(GRADIENT_THREADS, 2)
        gradient_kernel(const __grid_constant__ struct problem p)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct place x = place_of(p, blockIdx.x / p.chunks, blockIdx.x % p.chunks);
	auto &m = *reinterpret_cast<struct gradient_memory *>(shared_memory);
	float dbeta[2] = {}, flow[2] = {}, written[2] = {}, ends = 0.0f;
	struct cursor<DELTA> next(p, x);
	struct gradients d;
	int slot = 0;

	if (threadIdx.x < WHOLE)
		m.factors[threadIdx.x] = p.factors[x.record * (WHOLE + p.keys) + threadIdx.x];
	if (!DIAGONAL)
		sum_scalar(m.scalars, f, x);
#pragma unroll 1
	for (int slab = 0; slab < p.keys / SLAB; slab++) {
		if (slab == 0)
			multiply_states<DIAGONAL, DELTA, true>(d, m, p, x, slab, next, slot);
		else
			multiply_states<DIAGONAL, DELTA, false>(d, m, p, x, slab, next, slot);
		if (!DELTA && threadIdx.x < SLAB)
			m.bonus[threadIdx.x] =
			        slab * SLAB + threadIdx.x < f.d_k
			                ? f.bonus[x.h * f.d_k + slab * SLAB + threadIdx.x]
			                : 0.0f;
		if (DIAGONAL) {
			sum_diagonal<GRADIENT_THREADS>(m.g, m.totals, p, x, slab);
			finish_decayed<DELTA>(d, m, f.scale);
		} else {
			finish_undecayed(d, m, f.scale, written);
			ends += threadIdx.x < SLAB ? m.ends[threadIdx.x] : 0.0f;
		}
		store_keys<DIAGONAL, DELTA>(d, m, p, x, slab, dbeta, flow);
		if (DIAGONAL)
			store_decays<DELTA>(m, p, x, slab);
		/* q, k and, where decays took their place, the stages are free again. */
		__syncthreads();
	}
	if (!DELTA)
		return;
	copy_wait<0>();
	const struct corner c = corner_of();
	if (!DIAGONAL)
		ends *= m.factors[FROM_START + CHUNK - 1];
	store_scalars(m, p, x, dbeta, flow,
	              ends + m.factors[BETA + token_of(c, 0)] * written[0] +
	                      m.factors[BETA + token_of(c, 2)] * written[1]);
}

/* ---- the operation ---- */

static bool is_bonus(const struct matrix_recurrence_args *f)
{
	return f->rule == RULE_BONUS;
}

/* Takes bytes of the workspace, in order. */
template <typename T> static T *take(size_t *used, void *workspace, int64_t count)
{
	char *at = static_cast<char *>(workspace) + *used;

	*used += (size_t)divide_up(count * (int64_t)sizeof(T), 256) * 256;
	return reinterpret_cast<T *>(at);
}

static struct problem problem_of(const struct matrix_recurrence_backward_args *a, void *workspace,
                                 size_t *bytes)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const bool diagonal = f->decay == DECAY_DIAGONAL, bonus = is_bonus(f);
	struct problem p = {};

	p.a = *a;
	p.chunks = divide_up(f->seq_len, CHUNK);
	p.keys = f->d_k <= 64 ? 64 : MAX_KEYS;
	p.column_blocks = divide_up(f->d_v, WALK_COLUMNS);
	p.values = (int)(p.column_blocks * WALK_COLUMNS);
	const int64_t records = f->batch * f->n_heads * p.chunks, keys = CHUNK * p.keys;
	const int64_t decayed = diagonal ? records * keys : 0;

	*bytes = 0;
	p.factors = take<float>(bytes, workspace, records * (WHOLE + p.keys));
	p.dbonus = take<float>(bytes, workspace, bonus ? records * f->d_k : 0);
	p.scores = take<bf16>(bytes, workspace, records * CHUNK * CHUNK);
	p.inverse = take<bf16>(bytes, workspace, bonus ? 0 : records * CHUNK * CHUNK);
	p.q = take<bf16>(bytes, workspace, decayed);
	p.k_end = take<bf16>(bytes, workspace, decayed);
	p.k = take<bf16>(bytes, workspace, bonus ? 0 : decayed);
	p.states = take<bf16>(bytes, workspace, records * p.keys * p.values);
	p.gradients = take<bf16>(bytes, workspace, records * p.keys * p.values);
	p.errors = take<bf16>(bytes, workspace, bonus ? 0 : records * CHUNK * p.values);
	return p;
}

template <int KEYS, bool DIAGONAL, bool DELTA>
static enum status run(struct device *device, const struct problem &p)
{
	const char *name = "matrix_recurrence_backward";
	const struct matrix_recurrence_args *f = &p.a.forward;
	const int64_t heads = f->batch * f->n_heads;
	const dim3 chunks((unsigned)(heads * p.chunks));
	const dim3 walks((unsigned)(2 * heads * p.column_blocks));
	enum status status = launch(device, name, prepare_kernel<DIAGONAL, DELTA>, chunks, THREADS,
	                            sizeof(struct prepare_memory), p);

	if (status == STATUS_OK)
		status = launch(device, name, walk_kernel<KEYS, DIAGONAL, DELTA>, walks,
		                WALK_THREADS,
		                max(sizeof(struct forward_memory<KEYS>),
		                    sizeof(struct reverse_memory<KEYS>)),
		                p);
	if (status == STATUS_OK)
		status = launch(device, name, gradient_kernel<DIAGONAL, DELTA>, chunks,
		                GRADIENT_THREADS, sizeof(struct gradient_memory), p);
	if (status == STATUS_OK && !DELTA)
		status = column_sums(device, name, p.dbonus, f->batch * p.chunks,
		                     f->n_heads * f->d_k, f->n_heads * f->d_k, p.a.dbonus);
	return status;
}

template <int KEYS> static enum status run(struct device *device, const struct problem &p)
{
	if (is_bonus(&p.a.forward))
		return run<KEYS, true, false>(device, p);
	return p.a.forward.decay == DECAY_DIAGONAL ? run<KEYS, true, true>(device, p)
	                                           : run<KEYS, false, true>(device, p);
}

} // namespace

extern "C" const char *portable_delta_backward_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *f = &a->forward;

	if (f->rule == RULE_PLAIN)
		return "not the plain rule";
	if (is_bonus(f) && f->decay != DECAY_DIAGONAL)
		return "the bonus only with diagonal decays";
	if (f->d_k > MAX_KEYS)
		return "d_k above 128 with the delta rule or the bonus";
	if (f->batch * f->n_heads >
	    INT32_MAX / max(divide_up(f->seq_len, CHUNK), 2 * divide_up(f->d_v, WALK_COLUMNS)))
		return "more chunks than a grid has blocks";
	if (f->decay == DECAY_DIAGONAL &&
	    !(is_aligned(&f->log_decay) && is_aligned(&a->dlog_decay)))
		return "views must be 16-byte aligned";
	return either(check_widths(f->d_k, f->d_v),
	              check_aligned(&f->q, &f->k, &f->v, &a->dout, &a->dq, &a->dk, &a->dv));
}

extern "C" size_t portable_delta_backward_workspace(const struct device *, const void *args)
{
	size_t bytes;

	problem_of(static_cast<const struct matrix_recurrence_backward_args *>(args), NULL, &bytes);
	return bytes;
}

extern "C" enum status portable_delta_backward(struct device *device, const void *args,
                                               void *workspace)
{
	size_t bytes;
	const struct problem p =
	        problem_of(static_cast<const struct matrix_recurrence_backward_args *>(args),
	                   workspace, &bytes);

	return p.keys == 64 ? run<64>(device, p) : run<MAX_KEYS>(device, p);
}
