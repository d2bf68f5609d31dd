/*
 * The projections of up to 8 tokens for sm_90a: norm_linear and linear_residual of generation with
 * a small batch.
 *
 * One block a multiprocessor, with a run of neighboring outputs, which it takes in units of eight.
 *   producer   (a thread) streams the weights, 1024 channels a stage, a bulk copy for each row
 *   warps      eight, each with some of a stage's channels: m16n8k16 on the tensor cores, tokens
 *              times weights; their sums meet in shared memory
 * A token's norm is a factor of its outputs, applied there: nobody waits for it.
 *
 * Shared memory: a ring of three or four stages, rows 64 bytes longer than their data, so that the
 * eight lanes of a phase hit all banks; the tokens; static: sums and barriers. A sum does not mind
 * the order of its terms: a lane takes eight neighboring channels with one load, and they serve as
 * channels 2c, 2c + 1, 2c + 8, 2c + 9 of two products.
 *
 * Overlap: the ring is full before the kernel ahead has ended, and takes a third of the shared
 * memory, so that the kernels ahead and after have blocks on the same multiprocessor. The next one
 * may begin shortly before the last weights are asked for.
 *
 * Limit: the bytes of the weights, and how kernels overlap: 11.3 us to 6656 outputs with the norm,
 * D = 2048, one token. From nine tokens on cuBLASLt is faster. docs/kernels/linear.md.
 */
#include <algorithm>
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int WARPS = 8, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 32;
constexpr int MAX_TOKENS = 8, ROWS = 8; /* outputs of a unit */
constexpr int SLAB = 1024, PIECE = 32;  /* channels of a stage, of a warp's turn in it */
constexpr int PAD = 64, SLAB_BYTES = SLAB * 2 + PAD, STAGE_BYTES = ROWS * SLAB_BYTES;
constexpr int MIN_STAGES = 3, MAX_STAGES = 4;
/* Bytes of a block where that is possible, so that two blocks of step.cu have room beside it. */
constexpr int SHARED_SHARE = 79 * 1024;
constexpr int LEAD = 4; /* stages still to be asked for when the next kernel may begin */

struct parameters {
	int tokens, d_in, d_out, stages;
	int rows, rest; /* outputs of every block; so many blocks have one more */
	float eps;
	const __nv_bfloat16 *x, *weight, *residual;
	const float *norm_weight; /* or NULL */
	__nv_bfloat16 *x_norm, *y;
	float *rstd;
};

/* In static shared memory; the ring and then the tokens are in dynamic. */
struct exchange {
	float sum[2][WARPS][MAX_TOKENS * ROWS]; /* of two units in turn */
	float squares[WARPS][MAX_TOKENS];
	uint64_t full[MAX_STAGES], empty[MAX_STAGES], tokens;
};

__host__ __device__ constexpr int token_bytes(int d_in)
{
	return d_in * 2 + PAD;
}

__host__ __device__ constexpr int shared_bytes(int stages, int tokens, int d_in)
{
	return stages * STAGE_BYTES + tokens * token_bytes(d_in);
}

/* The weights of a block, whose outputs are neighbors: slabs of its units, in a ring of stages. */
struct stream {
	const parameters &p;
	uint32_t ring, tokens, full, empty, taken; /* `taken`: the tokens have arrived */
	int slabs, first, count;                   /* slabs of a unit, outputs of this block */

	__device__ stream(const parameters &p, uint32_t shared, const exchange &x)
	    : p(p), ring(shared), tokens(shared + p.stages * STAGE_BYTES),
	      full(shared_address(x.full)), empty(shared_address(x.empty)),
	      taken(shared_address(&x.tokens)), slabs((p.d_in + SLAB - 1) / SLAB),
	      first(blockIdx.x * p.rows + min(static_cast<int>(blockIdx.x), p.rest)),
	      count(p.rows + (static_cast<int>(blockIdx.x) < p.rest))
	{
	}

	__device__ int units() const
	{
		return (count + ROWS - 1) / ROWS;
	}

	/* Outputs of a unit; only the last has fewer than ROWS. */
	__device__ int height(int unit) const
	{
		return min(ROWS, count - unit * ROWS);
	}

	__device__ int width(int slab) const
	{
		return min(SLAB, p.d_in - slab * SLAB);
	}

	__device__ uint32_t rows(int stage) const
	{
		return ring + stage * STAGE_BYTES;
	}

	__device__ void open() const
	{
#pragma unroll 1
		for (int i = 0; i < p.stages; i++) {
			barrier_init(full + i * 8, 1);
			barrier_init(empty + i * 8, WARPS);
		}
		barrier_init_fence();
	}
};

/* Where the walk over the slabs of all units is, and its place in the ring. */
struct place {
	int unit = 0, slab = 0;
	ring_position stage;

	__device__ void advance(const stream &s)
	{
		if (++slab == s.slabs) {
			slab = 0;
			unit++;
		}
		stage.advance(s.p.stages);
	}
};

/* Sends for a slab and goes on. One thread. */
__device__ __forceinline__ void request(const stream &s, place &at, uint64_t policy)
{
	const int bytes = s.width(at.slab) * 2, height = s.height(at.unit);
	const __nv_bfloat16 *row = s.p.weight +
	                           static_cast<int64_t>(s.first + at.unit * ROWS) * s.p.d_in +
	                           at.slab * SLAB;

	const uint32_t full = s.full + at.stage.slot * 8;
	uint32_t to = s.rows(at.stage.slot);

	barrier_arrive_expect(full, height * bytes);
	if (height == ROWS) {
#pragma unroll
		for (int i = 0; i < ROWS; i++, row += s.p.d_in)
			bulk_load(to + i * SLAB_BYTES, row, bytes, full, policy);
	} else {
#pragma unroll 1
		for (int i = 0; i < height; i++, row += s.p.d_in, to += SLAB_BYTES)
			bulk_load(to, row, bytes, full, policy);
	}
	at.advance(s);
}

/* The producer, one thread. */
__device__ __forceinline__ void produce(const stream &s)
{
	const uint64_t policy = policy_evict_first();
	const int total = s.units() * s.slabs;
	place at;

#pragma unroll 1
	for (int i = 0; i < total; i++) {
		if (i >= s.p.stages) {
			if (i + LEAD >= total) {
				wait_for_previous();
				let_next_begin();
			}
			barrier_wait(s.empty + at.stage.slot * 8, at.stage.parity ^ 1);
		}
		request(s, at, policy);
	}
	wait_for_previous();
	let_next_begin();
}

/* Sends for the tokens. One thread. */
__device__ __forceinline__ void request_tokens(const stream &s)
{
	const int bytes = s.p.d_in * 2;

	barrier_arrive_expect(s.taken, s.p.tokens * bytes);
#pragma unroll 1
	for (int n = 0; n < s.p.tokens; n++)
		bulk_load(s.tokens + n * token_bytes(s.p.d_in),
		          s.p.x + static_cast<int64_t>(n) * s.p.d_in, bytes, s.taken);
}

/* Eight channels times `scale` and their weights. */
__device__ __forceinline__ uint4 weigh(const uint4 &packed, const float4 &low, const float4 &high,
                                       float scale)
{
	float v[8];

	unpack_bf16(v, packed);
	return make_uint4(pack_bf16(v[0] * (scale * low.x), v[1] * (scale * low.y)),
	                  pack_bf16(v[2] * (scale * low.z), v[3] * (scale * low.w)),
	                  pack_bf16(v[4] * (scale * high.x), v[5] * (scale * high.y)),
	                  pack_bf16(v[6] * (scale * high.z), v[7] * (scale * high.w)));
}

__device__ __forceinline__ float sum_of_squares(const uint4 &packed)
{
	float v[8], sum = 0.0f;

	unpack_bf16(v, packed);
#pragma unroll
	for (int i = 0; i < 8; i++)
		sum = fmaf(v[i], v[i], sum);
	return sum;
}

/* The norm's weights of this thread's first eight channels; the others are fetched on the way. */
struct norm_weights {
	float4 low, high;
};

__device__ __forceinline__ norm_weights norm_weights_at(const parameters &p, int k)
{
	const float4 *weight = reinterpret_cast<const float4 *>(p.norm_weight + k);

	return {weight[0], weight[1]};
}

/* Multiplies the tokens by the norm's weights where they are, and sums their squares. */
__device__ __forceinline__ void weigh_tokens(const stream &s, exchange &x,
                                             const norm_weights &first)
{
#pragma unroll 1
	for (int n = 0; n < s.p.tokens; n++) {
		const uint32_t token = s.tokens + n * token_bytes(s.p.d_in);
		float squares = 0.0f;

#pragma unroll 1
		for (int k = threadIdx.x * 8; k < s.p.d_in; k += CONSUMERS * 8) {
			const norm_weights weights =
			        k < CONSUMERS * 8 ? first : norm_weights_at(s.p, k);
			const uint4 v = shared_load_16(token + k * 2);

			squares += sum_of_squares(v);
			shared_store_16(token + k * 2, weigh(v, weights.low, weights.high, 1.0f));
		}
#pragma unroll
		for (int offset = 16; offset > 0; offset /= 2)
			squares += __shfl_xor_sync(~0u, squares, offset);
		if (threadIdx.x % 32 == 0)
			x.squares[threadIdx.x / 32][n] = squares;
	}
}

/* 1 / rms of a token. */
__device__ __forceinline__ float rstd_of(const parameters &p, const exchange &x, int n)
{
	float sum = 0.0f;

#pragma unroll
	for (int w = 0; w < WARPS; w++)
		sum += x.squares[w][n];
	return rsqrtf(sum / static_cast<float>(p.d_in) + p.eps);
}

/* The normalized tokens are an output too; the last blocks, which may have an output less, write
 * one each. */
__device__ __forceinline__ void write_normalized(const parameters &p, const exchange &x)
{
	for (int n = gridDim.x - 1 - blockIdx.x; n < p.tokens; n += gridDim.x) {
		const int64_t at = static_cast<int64_t>(n) * p.d_in;
		const float rstd = rstd_of(p, x, n);

#pragma unroll 1
		for (int k = threadIdx.x * 8; k < p.d_in; k += CONSUMERS * 8) {
			const norm_weights weights = norm_weights_at(p, k);

			*reinterpret_cast<uint4 *>(p.x_norm + at + k) =
			        weigh(*reinterpret_cast<const uint4 *>(p.x + at + k), weights.low,
			              weights.high, rstd);
		}
		if (p.rstd && threadIdx.x == 0)
			p.rstd[n] = rstd;
	}
}

/* left, right += 32 channels, of which this lane's eight may not be there. `token` and `row` are
 * this lane's. */
__device__ __forceinline__ void multiply(float (&left)[4], float (&right)[4], uint32_t token,
                                         uint32_t row, bool valid = true)
{
	const uint4 zero = make_uint4(0, 0, 0, 0);
	const uint4 w = valid ? shared_load_16(row) : zero,
	            x = valid ? shared_load_16(token) : zero;

	mma_16816(left, x.x, 0, x.y, 0, w.x, w.y);
	mma_16816(right, x.z, 0, x.w, 0, w.z, w.w);
}

/* d += this warp's pieces of a stage, in sums that do not wait for each other. `token` and `row`
 * are this lane's in its first piece, which begins `channel` channels into the slab. */
__device__ __forceinline__ void multiply_stage(float (&d)[4][4], uint32_t token, uint32_t row,
                                               int channel, int width)
{
	constexpr int STEP = WARPS * PIECE, PIECES = SLAB / STEP;

	if (width == SLAB) {
#pragma unroll
		for (int i = 0; i < PIECES; i++)
			multiply(d[i % 2 * 2], d[i % 2 * 2 + 1], token + i * STEP * 2,
			         row + i * STEP * 2);
		return;
	}
#pragma unroll 1
	for (int i = 0; i < PIECES; i++)
		multiply(d[0], d[1], token + i * STEP * 2, row + i * STEP * 2,
		         channel + i * STEP < width);
}

/* This warp's part of a unit's outputs, into sum[token][output]. */
__device__ __forceinline__ void multiply_unit(const stream &s, place &at, float *sum)
{
	const parameters &p = s.p;
	const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
	const int channel = threadIdx.x / 32 * PIECE + c * 8;
	/* Tokens that are not there repeat the last one; their results are dropped. */
	uint32_t token = s.tokens + min(g, p.tokens - 1) * token_bytes(p.d_in) + channel * 2;
	float d[4][4] = {};

#pragma unroll 1
	for (int i = 0; i < s.slabs; i++, token += SLAB * 2) {
		barrier_wait(s.full + at.stage.slot * 8, at.stage.parity);
		multiply_stage(d, token, s.rows(at.stage.slot) + g * SLAB_BYTES + channel * 2,
		               channel, s.width(i));
		warp_arrive(s.empty + at.stage.slot * 8);
		at.advance(s);
	}
#pragma unroll
	for (int i = 0; i < 2; i++)
		d[0][i] += d[1][i] + d[2][i] + d[3][i];
	*reinterpret_cast<float2 *>(sum + g * ROWS + 2 * c) = make_float2(d[0][0], d[0][1]);
}

/* The residual of one output of a unit, or 0. */
__device__ __forceinline__ __nv_bfloat16 residual_of(const stream &s, int token, int unit, int row)
{
	if (!s.p.residual || token >= s.p.tokens || unit * ROWS + row >= s.count)
		return __ushort_as_bfloat16(0);
	return s.p.residual[static_cast<int64_t>(token) * s.p.d_out + s.first + unit * ROWS + row];
}

__device__ __forceinline__ void consume(const stream &s, exchange &x)
{
	const parameters &p = s.p;
	/* Of the thread that adds up one output of one token. */
	const int token = threadIdx.x / ROWS, row = threadIdx.x % ROWS, warp = threadIdx.x / 32;
	norm_weights weights = {};
	place at;

	if (threadIdx.x == 0) {
		barrier_init(s.taken, 1);
		barrier_init_fence();
	}
	if (p.norm_weight)
		weights = norm_weights_at(p, min(static_cast<int>(threadIdx.x) * 8, p.d_in - 8));
	__syncthreads();
	wait_for_previous();
	if (threadIdx.x == 0)
		request_tokens(s);
	__nv_bfloat16 residual = residual_of(s, token, 0, row);
	barrier_wait(s.taken, 0);
	if (p.norm_weight) {
		weigh_tokens(s, x, weights);
		named_barrier_sync(1, CONSUMERS);
		write_normalized(p, x);
	}
	const float factor = p.norm_weight && token < p.tokens ? rstd_of(p, x, token) : 1.0f;
#pragma unroll 1
	for (int unit = 0; unit < s.units(); unit++) {
		const __nv_bfloat16 next = residual_of(s, token, unit + 1, row);
		float sum = 0.0f;

		multiply_unit(s, at, x.sum[unit % 2][warp]);
		named_barrier_sync(1, CONSUMERS);
		if (token < p.tokens && row < s.height(unit)) {
#pragma unroll
			for (int w = 0; w < WARPS; w++)
				sum += x.sum[unit % 2][w][threadIdx.x];
			p.y[static_cast<int64_t>(token) * p.d_out + s.first + unit * ROWS + row] =
			        __float2bfloat16(sum * factor + __bfloat162float(residual));
		}
		residual = next;
	}
}

/* One kernel for both operations, so that the second finds the code of the first in the caches. */
__global__ void __launch_bounds__(THREADS, 2) linear_kernel(const __grid_constant__ parameters p)
{
	extern __shared__ __align__(128) char memory[];
	__shared__ exchange x;
	const stream s(p, shared_address(memory), x);

	if (threadIdx.x >= CONSUMERS) {
		if (threadIdx.x == CONSUMERS)
			s.open();
		__syncthreads();
		if (threadIdx.x == CONSUMERS)
			produce(s);
		return;
	}
	consume(s, x);
}

/* Stages of the ring beside that many tokens; less than MIN_STAGES: they are too many. */
int stages_beside(const struct device *device, int64_t tokens, int64_t d_in)
{
	const int64_t other = static_cast<int64_t>(sizeof(exchange)) +
	                      tokens * token_bytes(static_cast<int>(d_in));
	const int64_t room = static_cast<int64_t>(cuda_shared_limit(device)) - other;
	const int64_t stages =
	        std::min(room / STAGE_BYTES,
	                 std::max<int64_t>((SHARED_SHARE - other) / STAGE_BYTES, MIN_STAGES));

	return static_cast<int>(std::clamp<int64_t>(stages, 0, MAX_STAGES));
}

/* What both operations have. */
template <typename Args> parameters parameters_of(const Args *a)
{
	parameters p = {};

	p.tokens = static_cast<int>(a->n_tokens);
	p.d_in = static_cast<int>(a->d_in);
	p.d_out = static_cast<int>(a->d_out);
	p.x = static_cast<const __nv_bfloat16 *>(a->x);
	p.weight = static_cast<const __nv_bfloat16 *>(a->weight);
	p.y = static_cast<__nv_bfloat16 *>(a->y);
	return p;
}

enum status run(struct device *device, parameters &p)
{
	const int blocks = std::min(cuda_sm_count(device), p.d_out / ROWS);

	p.rows = p.d_out / blocks;
	p.rest = p.d_out % blocks;
	p.stages = stages_beside(device, p.tokens, p.d_in);
	return launch_early(device, linear_kernel, blocks, THREADS,
	                    shared_bytes(p.stages, p.tokens, p.d_in), p);
}

const char *unsupported_sizes(const struct device *device, int64_t n_tokens, int64_t d_in,
                              int64_t d_out)
{
	if (!cuda_is_hopper(device))
		return "needs compute capability 9.0";
	if (n_tokens > MAX_TOKENS)
		return "more than 8 tokens";
	if (d_in % 8 || d_out % 8)
		return "widths must be multiples of 8";
	if (d_in > 1 << 20 || d_out > 1 << 24)
		return "more than 2^20 inputs or 2^24 outputs";
	return stages_beside(device, n_tokens, d_in) < MIN_STAGES
	               ? "the tokens do not fit in shared memory"
	               : NULL;
}

} // namespace

extern "C" const char *hopper_norm_linear_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct norm_linear_args *>(args);

	if (a->bias)
		return "a bias";
	return unsupported_sizes(device, a->n_tokens, a->d_in, a->d_out);
}

extern "C" enum status hopper_norm_linear(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct norm_linear_args *>(args);
	parameters p = parameters_of(a);

	p.eps = a->eps;
	p.norm_weight = a->norm_weight;
	p.x_norm = static_cast<__nv_bfloat16 *>(a->x_norm);
	p.rstd = a->rstd;
	return run(device, p);
}

extern "C" const char *hopper_linear_residual_unsupported(const struct device *device,
                                                          const void *args)
{
	const auto *a = static_cast<const struct linear_residual_args *>(args);

	if (a->bias)
		return "a bias";
	return unsupported_sizes(device, a->n_tokens, a->d_in, a->d_out);
}

extern "C" enum status hopper_linear_residual(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct linear_residual_args *>(args);
	parameters p = parameters_of(a);

	p.residual = static_cast<const __nv_bfloat16 *>(a->residual);
	return run(device, p);
}
