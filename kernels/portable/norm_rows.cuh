/*
 * How the norms of heads and groups go through memory. A row is a head of a token: a power of two
 * of lanes, or the whole block, holds it as `vectors` vectors of eight elements each. The device is
 * filled once, and a place in it keeps to one head of every `step`-th token; so it keeps the head's
 * weights, and the sums over its tokens, in registers. Consecutive places take consecutive rows.
 *
 * The rows to come are copied into a ring in shared memory: `stages` - 1 of them are under way
 * while one is worked on. A thread reads only what it copied itself, and needs no barrier.
 */
#ifndef KERNELS_PORTABLE_NORM_ROWS_CUH
#define KERNELS_PORTABLE_NORM_ROWS_CUH

#include <algorithm>
#include <numeric>

#include "kernels/portable/device.cuh"

namespace
{

constexpr int ROW_THREADS = 128, ROW_WARPS = ROW_THREADS / WARP, MOST_STAGES = 4;

/* Behind the ring: two sums of each warp, twice. */
constexpr size_t EXCHANGE_BYTES_OF_ROWS = 4 * ROW_WARPS * sizeof(float);

/* vectors 0: of a row too wide to be held; the block walks along it. A place steps by `step`
 * tokens, which are `slots` rows and `row_step` elements. */
struct row_plan {
	int lanes, vectors, stages;
	int64_t blocks, slots, step, row_step;
	size_t shared;
};

/*
 * Of `heads` rows per token, `tensors` of which are copied ahead. Of rows of two vectors a
 * multiprocessor has registers for `per_sm` blocks, of four for `per_sm_wide`.
 */
static inline struct row_plan plan_rows(const struct device *device, int64_t n_tokens,
                                        int64_t heads, int64_t width, int tensors, int per_sm,
                                        int per_sm_wide)
{
	const int64_t n = divide_up(width, 8);
	struct row_plan p = {};

	p.vectors = n <= 2 * WARP          ? 2
	            : n <= 4 * WARP        ? 4
	            : n <= 2 * ROW_THREADS ? 2
	            : n <= 4 * ROW_THREADS ? 4
	                                   : 0;
	p.lanes = n <= 4 * WARP ? lanes_for(divide_up(width, p.vectors)) : ROW_THREADS;
	const int64_t fit = p.vectors == 2 ? per_sm : per_sm_wide;
	const size_t stage = (size_t)(tensors * p.vectors * ROW_THREADS) * sizeof(vector8);
	/* One block may have all but all of a multiprocessor's. */
	const size_t ring = cuda_shared_limit(device) / (size_t)fit - 2048;

	p.stages = 2;
	while (p.vectors && p.stages < MOST_STAGES && (size_t)(p.stages + 1) * stage <= ring)
		p.stages++;
	p.shared = (size_t)p.stages * stage + EXCHANGE_BYTES_OF_ROWS;

	/* The places are whole tokens. */
	const int per_block = ROW_THREADS / p.lanes;
	const int64_t unit = heads / std::gcd(heads, (int64_t)per_block);
	const int64_t wanted = fit * cuda_sm_count(device);

	p.blocks = std::min(std::max<int64_t>(wanted / unit, 1),
	                    divide_up(n_tokens * heads, per_block * unit)) *
	           unit;
	p.slots = p.blocks * per_block;
	p.step = p.slots / heads;
	p.row_step = p.slots * width;
	return p;
}

/*
 * A thread's place: the head it keeps to and the first of its `own` tokens. Of a row it has the
 * vectors at `column`, column + apart, ... that are `inside` it.
 */
template <int V> struct row_place {
	int lanes, column, apart, own;
	bool inside[V], leads;
	int64_t slot, head, token;
};

template <int V, bool BLOCK>
static __device__ __forceinline__ struct row_place<V>
place_of(const struct row_plan &p, int64_t n_tokens, int64_t heads, int64_t width) {
	struct row_place<V> at;

	at.lanes = BLOCK ? ROW_THREADS : p.lanes;
	const int lane = held((int)threadIdx.x & (at.lanes - 1));

	at.leads = lane == 0;
	at.column = 8 * lane;
	at.apart = 8 * at.lanes;
	at.slot = ((int64_t)blockIdx.x * ROW_THREADS + threadIdx.x) / at.lanes;
	at.head = at.slot % heads;
	at.token = at.slot / heads;
	at.own = at.token < n_tokens ? held((int)divide_up(n_tokens - at.token, p.step)) : 0;
#pragma unroll
	for (int v = 0; v < V; v++)
		at.inside[v] = at.column + v * at.apart < width;
	return at;
}

/* This thread's first vector of a tensor in a stage; its others are ROW_THREADS apart. */
template <int V>
static __device__ __forceinline__ vector8 *ring_slot(int tensors, int stage, int tensor)
{
	return reinterpret_cast<vector8 *>(shared_memory) +
	       (stage * tensors + tensor) * V * ROW_THREADS + threadIdx.x;
}

/* Copies a row's vectors, the first of which is at `from`, in the background; zeros past its end,
 * or where it is not `there`. */
template <int V>
static __device__ __forceinline__ void copy_row(vector8 *to, const bf16 *from,
                                                const struct row_place<V> &at, bool there)
{
#pragma unroll
	for (int v = 0; v < V; v++)
		copy16_async(to + v * ROW_THREADS, from + v * at.apart, there && at.inside[v]);
}

/* Vector v of a row to where its first one goes. */
template <int V>
static __device__ __forceinline__ void store_row(bf16 *to, const float (&x)[8], int v,
                                                 const struct row_place<V> &at, bool there)
{
	const vector8 packed = pack8(x);

	if (there && at.inside[v])
		*reinterpret_cast<vector8 *>(to + v * at.apart) = packed;
}

/* Waits until at most `ahead` rows are under way. */
static __device__ __forceinline__ void wait_rows(int ahead)
{
	if (ahead == 1)
		copy_wait<1>();
	else if (ahead == 2)
		copy_wait<2>();
	else
		copy_wait<3>();
}

static __device__ __forceinline__ int next_stage(int stage, int stages)
{
	return stage + 1 == stages ? 0 : stage + 1;
}

/* Sums over a row's lanes, `parity` taking turns; all get them. */
template <bool BLOCK, int N>
static __device__ __forceinline__ void sum_rows(float (&x)[N], const struct row_plan &p, int parity)
{
	const int lanes = BLOCK ? WARP : p.lanes;

	for (int offset = lanes >> 1; offset > 0; offset >>= 1)
#pragma unroll
		for (int i = 0; i < N; i++)
			x[i] += __shfl_xor_sync(0xffffffffu, x[i], offset);
	if (!BLOCK)
		return;
	float *of_warps = reinterpret_cast<float *>(shared_memory + p.shared) -
	                  (2 * ROW_WARPS * (2 - parity));

	if (threadIdx.x % WARP == 0)
#pragma unroll
		for (int i = 0; i < N; i++)
			of_warps[i * ROW_WARPS + threadIdx.x / WARP] = x[i];
	__syncthreads();
#pragma unroll
	for (int i = 0; i < N; i++) {
		x[i] = 0.0f;
#pragma unroll
		for (int warp = 0; warp < ROW_WARPS; warp++)
			x[i] += of_warps[i * ROW_WARPS + warp];
	}
}

/* Eight floats of a parameter for each vector; zeros past the row's end. */
template <int V>
static __device__ __forceinline__ void load_columns(float (&x)[V][8], const float *row,
                                                    const struct row_place<V> &at)
{
#pragma unroll
	for (int v = 0; v < V; v++)
#pragma unroll
		for (int j = 0; j < 8; j++)
			x[v][j] = at.inside[v] ? row[at.column + v * at.apart + j] : 0.0f;
}

template <int V>
static __device__ __forceinline__ void store_columns(float *row, const float (&x)[V][8],
                                                     const struct row_place<V> &at)
{
#pragma unroll
	for (int v = 0; v < V; v++)
		if (at.inside[v])
			store8f(row + at.column + v * at.apart, x[v]);
}

/* The sums of all rows of the block, added up, to `to` [width]; the ring's copies are over. */
template <int V, bool BLOCK>
static __device__ __forceinline__ void
store_block_sums(float *to, const float (&sums)[V][8], const struct row_place<V> &at, int64_t width)
{
	if (BLOCK) {
		store_columns<V>(to, sums, at);
		return;
	}
	float *rows = reinterpret_cast<float *>(shared_memory);
	const int padded = V * at.apart;

	__syncthreads();
	store_columns<V>(rows + threadIdx.x / at.lanes * padded, sums, at);
	__syncthreads();
	for (int i = threadIdx.x; i < width; i += ROW_THREADS) {
		float sum = 0.0f;

#pragma unroll 1
		for (int row = 0; row < ROW_THREADS / at.lanes; row++)
			sum += rows[row * padded + i];
		to[i] = sum;
	}
}

/* Sum over the block, at the beginning of the shared memory; all threads get it. */
static __device__ __forceinline__ float block_sum(float x)
{
	float *of_warps = reinterpret_cast<float *>(shared_memory);

	x = group_sum(x, WARP);
	if (threadIdx.x % WARP == 0)
		of_warps[threadIdx.x / WARP] = x;
	__syncthreads();
	x = 0.0f;
#pragma unroll
	for (int i = 0; i < ROW_WARPS; i++)
		x += of_warps[i];
	__syncthreads();
	return x;
}

} // namespace

#endif
