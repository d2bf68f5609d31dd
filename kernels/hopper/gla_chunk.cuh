/*
 * Gated linear attention: what chunks need before their state is known, 64 tokens at a time: one
 * chunk of 64, two of 32 or four of 16. Four warps turn tiles of q, k and log decays in
 * shared memory, where they lie, into the operands of the chunks' products: q decayed from its
 * chunk's start, k decayed to its end, and the scores between a chunk's tokens.
 *
 * With G_t the sum of log2 decays up to token t, every factor is 2^(difference of
 * G). A warp owns a sub-chunk of 16 tokens: q is decayed from the sub-chunk's start, k to its end,
 * and the decays of whole sub-chunks between them are multiplied in one after the
 * other, so that all exponents are <= 0 and no decay is too strong. Inside the
 * sub-chunk one of two factors exceeds 1; if the sub-chunk's decay is too strong for
 * that, it is halved again and again, at exponents <= 0.
 *
 * With RWKV-6's bonus a query sees the state before its own token decayed it: its exponent ends a
 * token earlier, and its score with its own key has the bonus in the place of a decay.
 *
 * A tile is 64 tokens x 64 channels with the 128-byte swizzle, a slab half of its
 * channels. Fragments of 16 tokens x a slab are as ldmatrix gives them: lane l has rows l / 4 and
 * l / 4 + 8 and of each group of 8 channels the pair 2 (l % 4).
 */
#ifndef KERNELS_HOPPER_GLA_CHUNK_CUH
#define KERNELS_HOPPER_GLA_CHUNK_CUH

#include "kernels/hopper/gla.cuh"
#include "kernels/hopper/panels.cuh"
#include "kernels/hopper/ptx.cuh"

namespace hopper
{

constexpr int SUB = 16, SUBS = RECORD / SUB; /* tokens; sub-chunks of a record */
constexpr int SLABS = 2;                     /* of a tile */
constexpr int EXCHANGE_BYTES = SLABS * SUBS * 32 * 4;
constexpr float MILD = 60; /* log2 of a decay whose inverse may be a factor */

/* Tiles of one chunk and 64 channels. */
struct panel {
	uint32_t q, decays, k;
};

/* Scores of this warp's 16 queries: with the keys of earlier sub-chunks, and with its own; with
 * their own keys this lane's part where there is a bonus. */
struct chunk_scores {
	float between[SUBS - 1][2][4], inside[2][4];
	float own[2];
};

/* How the tokens are taken. */
struct chunk_form {
	float scale;
	const float *bonus; /* of the tile's channels */
};

/* pair[row half][group of channels]. */
struct fragment {
	uint32_t pair[2][4];
};

/* The same elements in fp32: x[half][channel]. */
struct values {
	float x[2][8];
};

__device__ __forceinline__ values unpack(const fragment &f, float factor)
{
	values v;

#pragma unroll
	for (int i = 0; i < 8; i++) {
		v.x[i / 4][2 * (i % 4)] = factor * low_bf16(f.pair[i / 4][i % 4]);
		v.x[i / 4][2 * (i % 4) + 1] = factor * high_bf16(f.pair[i / 4][i % 4]);
	}
	return v;
}

__device__ __forceinline__ fragment pack(const values &v)
{
	fragment f;

#pragma unroll
	for (int i = 0; i < 8; i++)
		f.pair[i / 4][i % 4] =
		        pack_bf16(v.x[i / 4][2 * (i % 4)], v.x[i / 4][2 * (i % 4) + 1]);
	return f;
}

/* The panels that a block of `prepare` takes: all of a record, then of its next. */
template <int DK, int STAGES> struct panel_cursor {
	int number = blockIdx.x, panel = 0;
	ring_position stage;

	__device__ void advance()
	{
		if (++panel == DK / 64) {
			panel = 0;
			number += gridDim.x;
		}
		stage.advance(STAGES);
	}
};

/* Zeros and ones, member(token, u): the left operand of sums of decays over tokens u. */
struct selection {
	uint32_t a[4];
};

template <typename Member> __device__ __forceinline__ selection select(Member member)
{
	const int row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
	const auto pair = [&](int t, int u) {
		return (member(t, u) ? 0x3f80u : 0u) | (member(t, u + 1) ? 0x3f800000u : 0u);
	};

	return {{pair(row, column), pair(row + 8, column), pair(row, column + 8),
	         pair(row + 8, column + 8)}};
}

/*
 * Sums over the selected tokens, for channels 2i, 2i + 1 of both rows, by the
 * tensor cores: of log2 decays. `transposed` are the natural ones.
 */
__device__ __forceinline__ void sum_decays(float (&sum)[4], const selection &of,
                                           const fragment &transposed, int i)
{
	float d[4] = {};

	mma_16816(d, of.a[0], of.a[1], of.a[2], of.a[3], transposed.pair[0][i],
	          transposed.pair[1][i]);
#pragma unroll
	for (int j = 0; j < 4; j++)
		sum[j] = LOG2E * d[j];
}

/* What tf32 leaves out. */
__device__ __forceinline__ float rest(float x)
{
	return x - __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

/* s [16 queries, 16 keys] += q k^T of two channels of q [row half, channel] and k. */
__device__ __forceinline__ void add_pair(float (&s)[2][4], const float (&q)[4], const float (&k)[4])
{
#pragma unroll
	for (int n = 0; n < 2; n++)
		mma_1688(s[n], q[0], q[2], q[1], q[3], k[2 * n], k[2 * n + 1]);
}

/* The same nearly in fp32. */
__device__ __forceinline__ void add_pair_exactly(float (&s)[2][4], const float (&q)[4],
                                                 const float (&k)[4])
{
	add_pair(s, q, k);
	add_pair(s, {rest(q[0]), rest(q[1]), rest(q[2]), rest(q[3])}, k);
	add_pair(s, q, {rest(k[0]), rest(k[1]), rest(k[2]), rest(k[3])});
}

/* s [16 queries, 16 keys] += q k^T over one slab. */
__device__ __forceinline__ void add_scores(float (&s)[2][4], const values &q, const values &k)
{
#pragma unroll
	for (int i = 0; i < 8; i += 2)
		add_pair(s, {q.x[0][i], q.x[0][i + 1], q.x[1][i], q.x[1][i + 1]},
		         {k.x[0][i], k.x[0][i + 1], k.x[1][i], k.x[1][i + 1]});
}

/* The same of bf16 operands. */
__device__ __forceinline__ void add_scores(float (&s)[2][4], const fragment &q, const fragment &k)
{
#pragma unroll
	for (int n = 0; n < 2; n++) {
#pragma unroll
		for (int i = 0; i < 4; i += 2)
			mma_16816(s[n], q.pair[0][i], q.pair[1][i], q.pair[0][i + 1],
			          q.pair[1][i + 1], k.pair[n][i], k.pair[n][i + 1]);
	}
}

/*
 * Scores inside a sub-chunk whatever its decay, one slab's part, nearly in fp32: halves of
 * 8, then 4, 2, 1 tokens, queries of the later decayed from its start, keys of the
 * earlier to its end; at last, without a bonus, each token with itself.
 */
template <bool BONUS>
__device__ __forceinline__ void add_halves(float (&s)[2][4], const fragment &queries,
                                           const fragment &keys, const fragment &transposed,
                                           float scale)
{
	const int row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);

#pragma unroll 1
	for (int half = SUB / 2; half >= (BONUS ? 1 : 0); half /= 2) {
		const selection of = select([&](int t, int u) {
			const int middle = (t & -2 * half) + half;

			return t & half ? u >= middle && u < t + !BONUS : u > t && u < middle;
		});
		float part[2][4] = {};

#pragma unroll
		for (int i = 0; i < 4; i++) {
			float q[4], k[4], f[4];

			sum_decays(f, of, transposed, i);
#pragma unroll
			for (int j = 0; j < 4; j++) {
				const bool later = (row + 8 * (j / 2)) & half;
				const uint32_t q_pair = queries.pair[j / 2][i],
				               k_pair = keys.pair[j / 2][i];

				q[j] = scale * (j % 2 ? high_bf16(q_pair) : low_bf16(q_pair));
				k[j] = j % 2 ? high_bf16(k_pair) : low_bf16(k_pair);
				if (half > 0) {
					q[j] = later ? q[j] * exp2_approx(f[j]) : 0.0f;
					k[j] = later ? 0.0f : k[j] * exp2_approx(f[j]);
				}
			}
			add_pair_exactly(part, q, k);
		}
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const int t = row + 8 * (i % 4 / 2), key = 8 * (i / 4) + column + i % 2;
			const bool together =
			        half ? (t & -2 * half) == (key & -2 * half) : t == key;

			s[i / 4][i % 4] += together ? part[i / 4][i % 4] : 0.0f;
		}
		if (half == 0)
			break;
	}
}

__device__ __forceinline__ void scale_by(values &v, const values &factor)
{
#pragma unroll
	for (int i = 0; i < 16; i++)
		v.x[i / 8][i % 8] *= factor.x[i / 8][i % 8];
}

__device__ __forceinline__ void scale_by(values &v, const float (&factor)[8])
{
#pragma unroll
	for (int i = 0; i < 16; i++)
		v.x[i / 8][i % 8] *= factor[i % 8];
}

__device__ __forceinline__ void load_floats(float (&x)[8], uint32_t shared)
{
#pragma unroll
	for (int i = 0; i < 8; i += 4) {
		const uint4 y = shared_load_16(shared + 4 * i);

		x[i] = __uint_as_float(y.x);
		x[i + 1] = __uint_as_float(y.y);
		x[i + 2] = __uint_as_float(y.z);
		x[i + 3] = __uint_as_float(y.w);
	}
}

__device__ __forceinline__ void store_floats(uint32_t shared, const float (&x)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i += 4)
		shared_store_16(shared + 4 * i,
		                make_uint4(__float_as_uint(x[i]), __float_as_uint(x[i + 1]),
		                           __float_as_uint(x[i + 2]), __float_as_uint(x[i + 3])));
}

/* What lane l tells ldmatrix and stmatrix: row l % 8 of group l / 8 of a slab; 8 rows on, 1024 on.
 */
__device__ __forceinline__ uint32_t slab_offset(int sub, int number)
{
	const int lane = threadIdx.x % 32;

	return swizzle_128((SUB * sub + lane % 8) * 128 + (4 * number + lane / 8) * 16);
}

__device__ __forceinline__ fragment load_fragment(uint32_t shared)
{
	fragment f;

#pragma unroll
	for (int half = 0; half < 2; half++)
		load_matrix_x4(shared + 1024 * half, f.pair[half][0], f.pair[half][1],
		               f.pair[half][2], f.pair[half][3]);
	return f;
}

/* Each group transposed: channels as rows, tokens as columns. */
__device__ __forceinline__ fragment load_transposed(uint32_t shared)
{
	fragment f;

#pragma unroll
	for (int half = 0; half < 2; half++)
		load_transposed_x4(shared + 1024 * half, f.pair[half]);
	return f;
}

__device__ __forceinline__ void store_fragment(uint32_t shared, const fragment &f)
{
#pragma unroll
	for (int half = 0; half < 2; half++)
		store_matrix_x4(shared + 1024 * half, f.pair[half][0], f.pair[half][1],
		                f.pair[half][2], f.pair[half][3]);
}

/* A slab on its way. */
struct slab {
	fragment decays;    /* transposed */
	bool exact;         /* its scores need more than one product */
	values left, right; /* q from, k to the borders of its sub-chunk */
};

/* Loads a slab's decays; if they are strong, its scores will have to be exact. */
__device__ __forceinline__ void look_at_slab(slab &x, const panel &t, int number, bool exact)
{
	const selection all = select([](int, int) { return true; });

	x.decays = load_transposed(t.decays + slab_offset(threadIdx.x / 32 % 4, number));
#pragma unroll
	for (int i = 0; i < 4; i++) {
		float sum[4];

		sum_decays(sum, all, x.decays, i);
		exact = exact || !(sum[0] >= -MILD) || !(sum[1] >= -MILD);
	}
	x.exact = __any_sync(~0u, exact);
}

/* This lane's part of the tokens' scores with their own keys. */
__device__ __forceinline__ void add_own(chunk_scores &s, const values &q, const values &k,
                                        const float *bonus)
{
#pragma unroll
	for (int i = 0; i < 8; i += 2) {
		const float2 u = *reinterpret_cast<const float2 *>(bonus + 4 * i);

#pragma unroll
		for (int half = 0; half < 2; half++) {
			s.own[half] = fmaf(q.x[half][i] * k.x[half][i], u.x, s.own[half]);
			s.own[half] = fmaf(q.x[half][i + 1] * k.x[half][i + 1], u.y, s.own[half]);
		}
	}
}

/*
 * Scores inside the sub-chunk unless they have to be exact. Its decay is shown to the other
 * warps, and k as decayed to its end in the tile of log decays. No branches: slabs overlap.
 */
template <bool BONUS>
__device__ __forceinline__ void begin_slab(slab &x, chunk_scores &s, const panel &t, int number,
                                           uint32_t shown, const chunk_form &form)
{
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const uint32_t own = slab_offset(warp, number);
	const selection before = select([](int t, int u) { return u < t + !BONUS; });
	const selection after = select([](int t, int u) { return u > t; });
	const selection all = select([](int, int) { return true; });
	values grown;
	float inverse[8], whole[8];

	x.left = unpack(load_fragment(t.q + own), form.scale);
	x.right = unpack(load_fragment(t.k + own), 1.0f);
	if (BONUS)
		add_own(s, x.left, x.right, form.bonus + 32 * number + 2 * (lane % 4));
#pragma unroll
	for (int i = 0; i < 4; i++) {
		float begin[4], end[4], total[4];

		if (BONUS)
			sum_decays(total, all, x.decays, i);
		sum_decays(begin, before, x.decays, i);
		sum_decays(end, after, x.decays, i);
#pragma unroll
		for (int j = 0; j < 2; j++)
			inverse[2 * i + j] = x.exact ? 0.0f
			                     : BONUS ? exp2_approx(-total[j])
			                             : exp2_approx(-begin[j] - end[j]);
#pragma unroll
		for (int j = 0; j < 4; j++) {
			const float factor = exp2_approx(begin[j]);

			x.left.x[j / 2][2 * i + j % 2] *= factor;
			x.right.x[j / 2][2 * i + j % 2] *= exp2_approx(end[j]);
			if (j >= 2)
				whole[2 * i + j % 2] = BONUS ? exp2_approx(total[j]) : factor;
		}
	}
	if (lane >= 28) /* its second row is the last */
		store_floats(shown + warp * 128, whole);
	grown = x.right;
	scale_by(grown, inverse);
	add_scores(s.inside, x.left, grown);
	store_fragment(t.decays + own, pack(x.right));
}

/* After the barrier: scores with earlier sub-chunks, of which a chunk has SPAN; q and k become
 * operands in place. */
template <int SPAN, typename Keep>
__device__ __forceinline__ void end_slab(slab &x, chunk_scores &s, const panel &t, int number,
                                         uint32_t shown, Keep keep)
{
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
	const int first = warp & -SPAN, after = first + SPAN; /* of the chunk, after the chunk */
	const uint32_t own = slab_offset(warp, number);

#pragma unroll
	for (int j = SUBS - 2; j >= 0; j--) {
		float decay[8];

		if (j >= warp || j < first)
			continue;
		add_scores(s.between[j], pack(x.left),
		           load_fragment(t.decays + slab_offset(j, number)));
		load_floats(decay, shown + j * 128);
		scale_by(x.left, decay);
	}
	store_fragment(t.q + own, pack(x.left));
#pragma unroll
	for (int j = 1; j < SUBS; j++) {
		float decay[8];

		if (j <= warp || j >= after)
			continue;
		load_floats(decay, shown + j * 128);
		scale_by(x.right, decay);
	}
	store_fragment(t.k + own, pack(x.right));
	if (warp == first && lane < 4) {
		float whole[8], decay[8];

		load_floats(whole, shown + first * 128);
#pragma unroll
		for (int j = 1; j < SUBS; j++) {
			if (j <= first || j >= after)
				continue;
			load_floats(decay, shown + j * 128);
#pragma unroll
			for (int i = 0; i < 8; i++)
				whole[i] *= decay[i];
		}
#pragma unroll
		for (int i = 0; i < 4; i++)
			keep(first / SPAN, 32 * number + 8 * i + 2 * lane, whole[2 * i],
			     whole[2 * i + 1]);
	}
}

/*
 * One tile: adds its part to the scores; q and k become operands in place. WIDE slabs are
 * under way at once. `sync` is a barrier of the four warps, keep(i, c, x, y) gets chunk i's
 * decays of channels c and c + 1. `start`: the tokens are the first of their sequence, which have
 * few scores, which can all be small: those are exact.
 */
template <int WIDE, int SPAN, bool BONUS, typename Sync, typename Keep>
__device__ __forceinline__ void prepare_panel(chunk_scores &s, const panel &t, uint32_t exchange,
                                              const chunk_form &form, bool start, Sync sync,
                                              Keep keep)
{
	const bool exact = start && threadIdx.x / 32 % 4 == 0;
	const uint32_t shown = exchange + threadIdx.x % 4 * 32;

#pragma unroll 1
	for (int first = 0; first < SLABS; first += WIDE) {
		slab x[WIDE];

#pragma unroll
		for (int i = 0; i < WIDE; i++)
			look_at_slab(x[i], t, first + i, exact);
#pragma unroll
		for (int i = 0; i < WIDE; i++) {
			const uint32_t own = slab_offset(threadIdx.x / 32 % 4, first + i);

			if (x[i].exact)
				add_halves<BONUS>(s.inside, load_fragment(t.q + own),
				                  load_fragment(t.k + own), x[i].decays,
				                  form.scale);
		}
#pragma unroll
		for (int i = 0; i < WIDE; i++)
			begin_slab<BONUS>(x[i], s, t, first + i, shown + (first + i) * SUBS * 128,
			                  form);
		sync();
#pragma unroll
		for (int i = 0; i < WIDE; i++)
			end_slab<SPAN>(x[i], s, t, first + i, shown + (first + i) * SUBS * 128,
			               keep);
	}
}

/* The scores of this warp's queries, [query, key], into a tile; those of later keys are zero. */
template <bool BONUS> __device__ __forceinline__ void store_scores(uint32_t tile, chunk_scores &s)
{
	const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;

	if (BONUS) {
#pragma unroll
		for (float &x : s.own) {
			x += __shfl_xor_sync(~0u, x, 1);
			x += __shfl_xor_sync(~0u, x, 2);
		}
	}

#pragma unroll
	for (int n = 0; n < RECORD / 8; n++) {
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int row = lane / 4 + 8 * half, key = 8 * (n % 2) + 2 * (lane % 4);
			float x[2];

#pragma unroll
			for (int i = 0; i < 2; i++) {
				const float before =
				        n / 2 < SUBS - 1 && n / 2 < warp
				                ? s.between[n / 2 % (SUBS - 1)][n % 2][2 * half + i]
				                : 0.0f;

				x[i] = n / 2 == warp && key + i <= row
				               ? s.inside[n % 2][2 * half + i]
				               : before;
				if (BONUS && n / 2 == warp && key + i == row)
					x[i] = s.own[half];
			}
			shared_store(tile + swizzle_128((SUB * warp + row) * 128 + 16 * n +
			                                4 * (lane % 4)),
			             static_cast<int>(pack_bf16(x[0], x[1])));
		}
	}
}

} // namespace hopper

#endif
