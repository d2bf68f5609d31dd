/* What the portable attention's forward and backward share: who sees whom, and tiles of rows. */
#ifndef KERNELS_PORTABLE_ATTENTION_TILE_CUH
#define KERNELS_PORTABLE_ATTENTION_TILE_CUH

#include "kernels/key_lists.h"
#include "kernels/portable/device.cuh"

struct interval {
	int first, end;
};

/* Heads that read one head of keys: head h reads number h / readers. */
static __host__ __device__ __forceinline__ int64_t readers(const struct attention_args &a)
{
	return a.n_heads / a.kv_heads;
}

/*
 * Keys come in lists, whose numbers are those of tokens unless DILATED, for MASK_DILATED
 * (key_lists.h): a kernel for the other masks has nothing of this.
 */
template <bool DILATED> constexpr int KEY_LISTS = DILATED ? N_KEY_LISTS : 1;

/* How many of tokens 0 .. end-1 are on the list. */
template <bool DILATED>
static __device__ __forceinline__ int list_length(const struct attention_args &a, int list,
                                                  int64_t end)
{
	return (int)(DILATED ? keys_before((enum key_list)list, a.dilation, a.initial, end) : end);
}

/* The token of a key's number; -1 from number `limit` on. */
template <bool DILATED>
static __device__ __forceinline__ int64_t list_token(const struct attention_args &a, int list,
                                                     int64_t key, int64_t limit)
{
	if (key >= limit)
		return -1;
	return DILATED ? key_token((enum key_list)list, a.dilation, a.initial, key) : key;
}

/* The keys of the list that query t sees. */
template <bool DILATED = false>
static __device__ __forceinline__ struct interval visible(const struct attention_args &a, int64_t t,
                                                          int list = 0)
{
	int64_t first = 0, end = a.kv_len;

	if (DILATED) {
		first = list == KEYS_KEPT || t <= a.window
		                ? 0
		                : list_length<true>(a, list, t - a.window);
		return {(int)first, list_length<true>(a, list, min(t + 1, end))};
	}

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

/* The same of keys of a list, of which rows number first .. first+ROWS-1 go to the tile. */
template <int D, int ROWS, int THREADS, bool DILATED>
static __device__ __forceinline__ void load_keys(bf16 *tile, const struct attention_args &a,
                                                 const struct view &v, int64_t b, int64_t h,
                                                 int list, int64_t first, int64_t limit)
{
	if constexpr (!DILATED)
		load_tile<D, ROWS, THREADS>(tile, v, b, h, first, limit);
	for (int i = threadIdx.x; DILATED && i < ROWS * D / 8; i += THREADS) {
		const int row = i / (D / 8), piece = i % (D / 8);
		const int64_t token = list_token<true>(a, list, first + row, limit);

		copy16_async(tile + swizzled<D>(row, piece),
		             at(v, b, max(token, (int64_t)0), h) + 8 * piece, token >= 0);
	}
}

#endif
