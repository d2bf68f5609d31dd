/* What the portable attention's forward and backward share: who sees whom, and tiles of rows. */
#ifndef KERNELS_PORTABLE_ATTENTION_TILE_CUH
#define KERNELS_PORTABLE_ATTENTION_TILE_CUH

#include "kernels/portable/device.cuh"

struct interval {
	int first, end;
};

/* Heads that read one head of keys: head h reads number h / readers. */
static __host__ __device__ __forceinline__ int64_t readers(const struct attention_args &a)
{
	return a.n_heads / a.kv_heads;
}

/* The keys that query t sees. */
static __device__ __forceinline__ struct interval visible(const struct attention_args &a, int64_t t)
{
	int64_t first = 0, end = a.kv_len;

	if (a.mask == MASK_CHUNK)
		end = t / a.chunk;
	else if (a.mask != MASK_FULL)
		end = t + 1;
	if (a.mask == MASK_WINDOW && t > a.window)
		first = t - a.window;
	return {(int)first, (int)min(end, a.kv_len)};
}

/* Element offset of 16-byte piece `piece` of a row in a tile of D-wide rows, conflict-free. */
template <int D> static __device__ __forceinline__ int swizzled(int row, int piece)
{
	return row * D + (piece ^ (row & 7)) * 8;
}

/* Rows first .. first+ROWS-1 of head h, by a block of THREADS; zeros from row `limit` on. */
template <int D, int ROWS, int THREADS>
static __device__ __forceinline__ void load_tile(bf16 *tile, const struct view &v, int64_t b,
                                                 int64_t h, int64_t first, int64_t limit)
{
	for (int i = threadIdx.x; i < ROWS * D / 8; i += THREADS) {
		const int row = i / (D / 8), piece = i % (D / 8);
		const bool valid = first + row < limit;

		copy16_async(tile + swizzled<D>(row, piece),
		             at(v, b, valid ? first + row : 0, h) + 8 * piece, valid);
	}
}

#endif
