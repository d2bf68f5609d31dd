/*
 * What the kernels of generation share: how their blocks divide the keys of all pairs (a sequence
 * and a head of keys), and merge what they have of one. The pairs go out whole by ticket, the last
 * of them in pieces, so that all blocks end together.
 */
#ifndef KERNELS_HOPPER_STEP_CUH
#define KERNELS_HOPPER_STEP_CUH

#include <algorithm>
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/ptx.cuh"
#include "kernels/kernels.h"

namespace hopper
{

constexpr int TILE = 64; /* keys */
/* Tiles that are loaded ahead of the wait for the kernel before. */
constexpr int EARLY = 1;
/* Of few pairs: fewer blocks, beside which a projection fits (linear.cu), with one piece each. */
constexpr int FEW_BLOCKS_PER_SM = 2;
/*
 * Where there is a pair for every block, the last ones are cut into TAIL_PIECES so that all blocks
 * end together. Fewer pairs are all cut: each block gets up to ROUNDS pieces, of at least SHORTEST
 * tiles where one round would do, and no pair more than MAX_PIECES.
 */
constexpr int TAIL_PIECES = 8, ROUNDS = 32, SHORTEST = 8, MAX_PIECES = 64;
constexpr int MAX_BLOCKS = 1024;

struct bf16_view {
	__nv_bfloat16 *data;
	int64_t batch, head;
	__device__ __nv_bfloat16 *at(int b, int h) const
	{
		return data + b * batch + h * head;
	}
};

/* The keys of earlier tokens: `count` of them, in slots first, first + 1, ... modulo slots. */
struct history {
	int count, first, tiles; /* tiles per pair, at least one */
};

/* Chunks of work, drawn in this order: `whole` pairs, then the pieces, `length` tiles each, of the
 * rest. */
struct schedule {
	int whole, pieces, length, chunks;
};

/* p: pairs, cut, pieces and round, from split_of(). */
template <typename Parameters>
__device__ __forceinline__ schedule schedule_of(const Parameters &p, const history &past)
{
	schedule s;

	s.whole = p.pairs - p.cut;
	s.length = max((past.tiles + p.pieces - 1) / p.pieces,
	               min((past.tiles + p.round - 1) / p.round, SHORTEST));
	s.pieces = (past.tiles + s.length - 1) / s.length;
	s.chunks = s.whole + p.cut * s.pieces;
	return s;
}

/* Tiles [first, end) of one pair; a negative pair: no more work. */
struct work {
	int pair, first, end;
};

__device__ __forceinline__ work chunk_at(const schedule &s, const history &past, int chunk)
{
	if (chunk < s.whole)
		return {chunk, 0, past.tiles};
	const int cut = (chunk - s.whole) / s.pieces;
	const int first = (chunk - s.whole - cut * s.pieces) * s.length;

	return {s.whole + cut, first, min(first + s.length, past.tiles)};
}

__device__ __forceinline__ void store_eight(__nv_bfloat16 *target, const float (&x)[8])
{
	*reinterpret_cast<uint4 *>(target) = pack_bf16(x);
}

/* An online softmax over some keys: o is unnormalized, base-2 maximum. */
struct partial {
	float max, sum, o[8];
};

__device__ __forceinline__ void merge(partial &a, float max, float sum, const float (&o)[8])
{
	const float top = fmaxf(a.max, max), safe = top == -INFINITY ? 0.0f : top;
	const float ours = exp2_approx(a.max - safe), theirs = exp2_approx(max - safe);

	a.max = top;
	a.sum = a.sum * ours + sum * theirs;
#pragma unroll
	for (int i = 0; i < 8; i++)
		a.o[i] = a.o[i] * ours + o[i] * theirs;
}

__device__ __forceinline__ void unpack_four(float *x, const float4 &four)
{
	x[0] = four.x;
	x[1] = four.y;
	x[2] = four.z;
	x[3] = four.w;
}

/* cos and sin of the rotation at `position`; the angle in double, for it grows with the position.
 */
template <int D> __device__ __forceinline__ void fill_table(float *table, int position)
{
	if (threadIdx.x < D / 2) {
		const double angle = position * exp2(threadIdx.x * (-2.0 / D) * 13.287712379549449);
		const double turns = angle * 0.15915494309189535;
		float sine, cosine;

		sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
		table[threadIdx.x] = cosine;
		table[D / 2 + threadIdx.x] = sine;
	}
}

/* How many blocks; how many pairs are cut, and into how many pieces: at most, and for each block to
 * have one. */
struct split {
	int blocks, cut, pieces, round;
};

inline split split_of(const struct device *device, int64_t pairs, int blocks_per_sm)
{
	split s;

	const bool few = 2 * pairs <= cuda_sm_count(device);

	s.blocks = std::min((few ? FEW_BLOCKS_PER_SM : blocks_per_sm) * cuda_sm_count(device),
	                    MAX_BLOCKS);
	s.cut = static_cast<int>(std::min<int64_t>(pairs, s.blocks));
	s.round = s.blocks / s.cut;
	s.pieces = TAIL_PIECES;
	if (few) {
		s.pieces = s.round = std::min(s.round, MAX_PIECES);
	} else if (pairs < s.blocks) {
		const int rounds = std::min(MAX_PIECES * s.cut / s.blocks, ROUNDS);

		s.pieces = std::max(rounds * s.blocks / s.cut, std::min(s.round, MAX_PIECES));
		s.round = std::min(s.round, s.pieces);
	}
	return s;
}

inline bf16_view of(const struct view &v)
{
	return {static_cast<__nv_bfloat16 *>(v.data), v.batch, v.head};
}

inline bool aligned(const void *data)
{
	return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline bool aligned(const struct view &v)
{
	return aligned(v.data) && v.batch % 8 == 0 && v.head % 8 == 0;
}

} // namespace hopper

#endif
