/*
 * What the kernels of the matrix recurrence's gradients share: how a problem is cut, where the
 * states between chunks are, and tiles of rows.
 *
 * A chunk is 64 tokens, a sub-chunk 16 of them. The states' rows are the channels of keys, taken
 * in panels of 64 or 128; their columns are the channels of values, taken in slabs of 32. Widths
 * are padded with zeros to whole panels and slabs. In memory a state is
 * [panel][slab][panel rows / 8][4][8][8]: pieces that are read at a time lie together, and an 8 x 8
 * matrix is 128 bytes, which is what a fragment of a product leaves and what ldmatrix reads, as it
 * is or transposed.
 */
#ifndef KERNELS_PORTABLE_MATRIX_BACKWARD_CUH
#define KERNELS_PORTABLE_MATRIX_BACKWARD_CUH

#include "kernels/portable/device.cuh"

namespace matrix_backward
{

constexpr int THREADS = 256, CHUNK = 64, SUB = 16, SUBS = CHUNK / SUB, SLAB = 32;

/* A tensor of tokens and heads, whose rows are whole pieces of 16 bytes. */
struct rows {
	struct view view;
	int64_t width;
};

/* The problem cut up, and the workspace. */
struct plan {
	struct rows q, k, v, dout, log_decay;
	int64_t chunks, panels, slabs;
	int64_t segments, per_segment; /* chunks that a sweep takes one after the other */
	bf16 *states, *gradients; /* [B, H, chunks]: before each chunk; of the state after each */
	float *ends;              /* [segments, B, H, rows, columns]: what a segment leaves, then
	                             what it starts from */
	float *decays;            /* [segments, B, H, rows] of a whole segment */
};

/* Both sweeps over the chunks: leave the states and their gradients, without the scale, and dh0. */
enum status sweep(struct device *device, const struct matrix_recurrence_backward_args &a,
                  const struct plan &p, int panel_rows);

static __device__ __forceinline__ bool decays_by_data(const struct matrix_recurrence_args &f)
{
	return f.decay == DECAY_SCALAR || f.decay == DECAY_DIAGONAL;
}

/* Where the piece of a state lies. */
template <int ROWS>
static __device__ __forceinline__ int64_t piece_at(const struct plan &p, int64_t sequence,
                                                   int64_t chunk, int64_t panel, int64_t slab)
{
	return (((sequence * p.chunks + chunk) * p.panels + panel) * p.slabs + slab) *
	       (ROWS * SLAB);
}

/* Element offset of 16-byte piece `piece` of a row in a tile, conflict-free. */
template <int WIDTH> static __device__ __forceinline__ int offset(int row, int piece)
{
	return row * WIDTH + (piece ^ (WIDTH == 32 ? row >> 1 & 3 : row & 7)) * 8;
}

/*
 * Where a lane's row of four 8 x 8 matrices begins, which are the first 16 rows and columns of a
 * tile: below each other before beside each other, or the other way round.
 */
template <int WIDTH> static __device__ __forceinline__ int lane_down()
{
	const int lane = threadIdx.x % WARP;

	return offset<WIDTH>(lane % 16, lane / 16);
}

template <int WIDTH> static __device__ __forceinline__ int lane_across()
{
	const int lane = threadIdx.x % WARP;

	return offset<WIDTH>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

/* The same from row `row` (a multiple of 16) and piece `piece` (even) on. */
template <int WIDTH>
static __device__ __forceinline__ const bf16 *down_first(const bf16 *tile, int row, int piece)
{
	return tile + ((row * WIDTH + lane_down<WIDTH>()) ^ 8 * piece);
}

template <int WIDTH>
static __device__ __forceinline__ const bf16 *across_first(const bf16 *tile, int row, int piece)
{
	return tile + ((row * WIDTH + lane_across<WIDTH>()) ^ 8 * piece);
}

/* Two neighbouring channels, the first of which is even. */
template <int WIDTH>
static __device__ __forceinline__ uint32_t *pair_at(bf16 *tile, int row, int channel)
{
	return reinterpret_cast<uint32_t *>(tile + offset<WIDTH>(row, channel / 8) + channel % 8);
}

/* `valid` tokens from `first` on and WIDTH channels from `column` on, in the background; zeros
 * elsewhere. */
template <int WIDTH>
static __device__ __forceinline__ void load_tile(bf16 *tile, const struct rows &x, int64_t b,
                                                 int64_t h, int64_t first, int valid,
                                                 int64_t column)
{
	constexpr int PIECES = WIDTH / 8, STEP = THREADS / PIECES;
	const int piece = threadIdx.x % PIECES;
	const int64_t channel = column + 8 * piece;
	const int limit = channel < x.width ? valid : 0;
	const bf16 *from = at(x.view, b, first + threadIdx.x / PIECES, h) + channel;

#pragma unroll
	for (int i = 0; i < CHUNK / STEP; i++) {
		const int row = i * STEP + threadIdx.x / PIECES;

		copy16_async(tile + offset<WIDTH>(row, piece), from + i * STEP * x.view.token,
		             row < limit);
	}
}

/* log2 of the decay of all of a state's rows; nothing is left after -256, and sums keep digits. */
static __device__ __forceinline__ float token_decay(const struct matrix_recurrence_args &f,
                                                    int64_t b, int64_t t, int64_t h, bool valid)
{
	if (!valid || f.decay == DECAY_NONE)
		return 0.0f;
	if (f.decay == DECAY_CONSTANT)
		return log1pf(-exp2f(-5.0f - (float)(f.first_head + h))) * LOG2E;
	const float x = __bfloat162float(*at(f.log_decay, b, t, h)) * LOG2E;
	return x < -256.0f ? -256.0f : x;
}

/* The decay between two sums of these; no more than 1, whatever their rounding. */
static __device__ __forceinline__ float decay_between(float earlier, float later)
{
	return exp2_fast(min_or_nan(later - earlier, 0.0f));
}

/* Sums up to each of a chunk's tokens, of which this lane has 2 lane and 2 lane + 1, and of all. */
struct token_sums {
	float first, second, all;
};

static __device__ __forceinline__ struct token_sums sum_tokens(float2 x)
{
	float total = x.x + x.y, before = 0.0f;

#pragma unroll
	for (int bit = 1; bit < WARP; bit *= 2) {
		const float other = __shfl_xor_sync(0xffffffffu, total, bit);

		if (threadIdx.x & bit)
			before += other;
		total += other;
	}
	return {before + x.x, before + x.x + x.y, total};
}

} // namespace matrix_backward

#endif
