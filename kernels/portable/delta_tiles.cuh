/*
 * What the passes of delta.cu and delta_backward.cu share: the problem and what of it is in the
 * workspace, tiles of bf16 in shared memory, sums of decays.
 */
#ifndef KERNELS_PORTABLE_DELTA_TILES_CUH
#define KERNELS_PORTABLE_DELTA_TILES_CUH

#include "kernels/portable/device.cuh"

namespace
{

constexpr int THREADS = 128, CHUNK = 64, SUB = 16;
constexpr int SLAB = 64;                   /* channels at a time where there is a block per chunk */
constexpr int STRIDE = 68;                 /* of fp32 tiles of 64 columns */
constexpr int HALF = 32, TILES = HALF / 8; /* columns of a warp's products, of 8 each */
/* log2 of a decay whose inverse can be a factor in bf16, and sums of such products in fp32. */
constexpr int MILD = 90;
constexpr int MAX_KEYS = 128;
/* Of a chunk: beta, 2^G and 2^(G_E - G) of its tokens, then 2^(G_E) of the channels. */
constexpr int BETA = 0, FROM_START = CHUNK, TO_END = 2 * CHUNK, WHOLE = 3 * CHUNK;

struct problem {
	struct matrix_recurrence_backward_args a;
	int64_t chunks, column_blocks;
	int keys, values; /* d_k and d_v, padded */
	/* Of every sequence, head and chunk: */
	float *factors;           /* [WHOLE + keys] */
	bf16 *scores, *inverse;   /* [64, 64]: P, M; nothing above the diagonal blocks */
	bf16 *q, *k, *k_end;      /* [64, keys]: scale q 2^G, k 2^G, k 2^(G_E - G) */
	bf16 *states, *gradients; /* [keys, values]: S, D */
	bf16 *errors;             /* [64, values]: e */
	float *dbonus;            /* [B, chunks, H, d_k] */
};

static inline bool is_bonus(const struct matrix_recurrence_args *f)
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

/* The place `column` columns right of another: a multiple of 8, none of whose bits the other's
 * column has set. */
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

/* 64 rows of W elements from a view, zeros past `rows` and `width`, in the background. */
template <int W, int N = THREADS>
static __device__ __forceinline__ void load_rows(bf16 *tile, const bf16 *from, int64_t stride,
                                                 int rows, int64_t width)
{
#pragma unroll
	for (int j = 0; j < CHUNK * W / 8 / N; j++) {
		const int i = threadIdx.x + j * N, row = i / (W / 8), column = i % (W / 8) * 8;
		const bool valid = row < rows && column < width;

		copy16_async(tile + swizzled<W>(row, column / 8),
		             from + (valid ? row * stride + column : 0), valid);
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

static __host__ __device__ __forceinline__ bool
decays_by_data(const struct matrix_recurrence_args &f)
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

} // namespace

#endif
