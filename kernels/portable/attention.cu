/*
 * Softmax attention on the tensor cores of any GPU from compute capability
 * 8.0: a block of four warps takes 128 queries of one head, 32 per warp, and
 * walks the visible keys in tiles of 64, two in flight, with an online
 * softmax in registers. The masks differ only in the interval of keys that a
 * query sees, whose ends never decrease from one query to the next; the dilated
 * one has two lists of keys, walked one after the other (key_lists.h), whose
 * rows are gathered as tiles are copied.
 */
#include "kernels/portable/attention_tile.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128, QUERIES = 128, WARP_QUERIES = 32, KEYS = 64, M_TILES = 2, KEY_TILES = 8 };

/* What a lane keeps of its warp's 32 queries: rows 16 i + 8 j + lane / 4. */
template <int D> struct accumulator {
	float o[M_TILES][D / 8][4];
	float maximum[M_TILES][2]; /* of the scores times scale and log2(e) */
	float sum[M_TILES][2];     /* over this lane's columns only */
};

/* Starts the softmax with the own token, or with nothing. */
template <int D>
static __device__ __forceinline__ void seed(accumulator<D> &acc, const struct attention_args &a,
                                            int64_t b, int64_t h, int64_t first)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int i = 0; i < 2 * M_TILES; i++) {
		const int64_t t = first + 8 * i + lane / 4;
		const bool own = a.own_score && t < a.seq_len;
		const bf16 *value = own ? at(a.own_value, b, t, h) + 2 * (lane % 4) : NULL;

		const float score =
		        own ? a.own_score[(b * a.seq_len + t) * a.n_heads + h] * LOG2E : -INFINITY;

		acc.maximum[i / 2][i % 2] = score;
		/* A row that sees no key has nothing else to carry a NaN. */
		acc.sum[i / 2][i % 2] = isnan(score) ? score : own && lane % 4 == 0 ? 1.0f : 0.0f;
#pragma unroll
		for (int n = 0; n < D / 8; n++) {
			const uint32_t pair =
			        own ? *reinterpret_cast<const uint32_t *>(value + 8 * n) : 0;

			acc.o[i / 2][n][2 * (i % 2)] = low_half(pair);
			acc.o[i / 2][n][2 * (i % 2) + 1] = high_half(pair);
		}
	}
}

/* s = q k^T of this warp's queries and one tile of keys. */
template <int D>
static __device__ __forceinline__ void scores(float (&s)[M_TILES][KEY_TILES][4], const bf16 *q,
                                              const bf16 *k)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int i = 0; i < M_TILES * KEY_TILES * 4; i++)
		s[i / (KEY_TILES * 4)][i / 4 % KEY_TILES][i % 4] = 0.0f;
#pragma unroll
	for (int step = 0; step < D / 16; step++) {
		uint32_t a[M_TILES][4], b[4];

#pragma unroll
		for (int m = 0; m < M_TILES; m++)
			load_matrices(a[m],
			              q + swizzled<D>(16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
		for (int n = 0; n < KEY_TILES / 2; n++) {
			load_matrices(b, k + swizzled<D>(16 * n + lane / 16 * 8 + lane % 8,
			                                 2 * step + lane / 8 % 2));
#pragma unroll
			for (int m = 0; m < M_TILES; m++) {
				multiply_add(s[m][2 * n], a[m], b[0], b[1]);
				multiply_add(s[m][2 * n + 1], a[m], b[2], b[3]);
			}
		}
	}
}

/* Scores of keys outside a query's interval become -infinity. */
template <bool DILATED>
static __device__ __forceinline__ void apply_mask(float (&s)[M_TILES][KEY_TILES][4],
                                                  const struct attention_args &a, int list,
                                                  int64_t first, int first_key)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int i = 0; i < 2 * M_TILES; i++) {
		const int64_t t = first + 8 * i + lane / 4;
		const struct interval keys = visible<DILATED>(a, t, list);

#pragma unroll
		for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
			for (int e = 0; e < 2; e++) {
				const int key = first_key + 8 * n + 2 * (lane % 4) + e;

				if (t >= a.seq_len || key < keys.first || key >= keys.end)
					s[i / 2][n][2 * (i % 2) + e] = -INFINITY;
			}
		}
	}
}

/* Turns scores into probabilities under the new maximum, to which acc is rescaled. */
template <int D>
static __device__ __forceinline__ void softmax(accumulator<D> &acc,
                                               float (&s)[M_TILES][KEY_TILES][4], float scale)
{
#pragma unroll
	for (int i = 0; i < 2 * M_TILES; i++) {
		const int m = i / 2, half = 2 * (i % 2);
		float top = s[m][0][half];

#pragma unroll
		for (int n = 0; n < KEY_TILES; n++)
			top = fmaxf(top, fmaxf(s[m][n][half], s[m][n][half + 1]));
		top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
		top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
		top = fmaxf(top * scale, acc.maximum[m][i % 2]);

		const float base = top == -INFINITY ? 0.0f : top;
		const float shrink = exp2_fast(acc.maximum[m][i % 2] - base);
		float sum = 0.0f;

		acc.maximum[m][i % 2] = top;
#pragma unroll
		for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
			for (int e = 0; e < 2; e++) {
				const float p = exp2_fast(fmaf(s[m][n][half + e], scale, -base));

				s[m][n][half + e] = p;
				sum += p;
			}
		}
		acc.sum[m][i % 2] = acc.sum[m][i % 2] * shrink + sum;
#pragma unroll
		for (int n = 0; n < D / 8; n++) {
			acc.o[m][n][half] *= shrink;
			acc.o[m][n][half + 1] *= shrink;
		}
	}
}

/* o += p v: the probabilities are already laid out as the product's left operand. */
template <int D>
static __device__ __forceinline__ void weigh(accumulator<D> &acc,
                                             const float (&p)[M_TILES][KEY_TILES][4], const bf16 *v)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int step = 0; step < KEYS / 16; step++) {
		uint32_t a[M_TILES][4], b[4];

#pragma unroll
		for (int m = 0; m < M_TILES; m++) {
#pragma unroll
			for (int i = 0; i < 4; i++) {
				const float *pair = &p[m][2 * step + i / 2][2 * (i % 2)];

				a[m][i] = pack(pair[0], pair[1]);
			}
		}
#pragma unroll
		for (int n = 0; n < D / 16; n++) {
			load_matrices_transposed(
			        b, v + swizzled<D>(16 * step + lane % 16, 2 * n + lane / 16));
#pragma unroll
			for (int m = 0; m < M_TILES; m++) {
				multiply_add(acc.o[m][2 * n], a[m], b[0], b[1]);
				multiply_add(acc.o[m][2 * n + 1], a[m], b[2], b[3]);
			}
		}
	}
}

/* Normalizes, stores lse, and leaves o in this warp's rows of `staging`, D + 4 floats each. */
template <int D>
static __device__ __forceinline__ void finish(accumulator<D> &acc, const struct attention_args &a,
                                              int64_t b, int64_t h, int64_t first, float *staging)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int i = 0; i < 2 * M_TILES; i++) {
		const int row = 8 * i + lane / 4;
		const float sum = group_sum(acc.sum[i / 2][i % 2], 4);
		const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;

		if (a.lse && lane % 4 == 0 && first + row < a.seq_len)
			a.lse[(b * a.n_heads + h) * a.seq_len + first + row] =
			        acc.maximum[i / 2][i % 2] * LN2 + logf(sum);
#pragma unroll
		for (int n = 0; n < D / 8; n++) {
			float *to = staging + row * (D + 4) + 8 * n + 2 * (lane % 4);

			to[0] = acc.o[i / 2][n][2 * (i % 2)] * inverse;
			to[1] = acc.o[i / 2][n][2 * (i % 2) + 1] * inverse;
		}
	}
	__syncwarp();
}

/* Writes this warp's rows, 16 bytes per lane, gated where there is a gate. */
template <int D>
static __device__ __forceinline__ void store(const struct attention_args &a, int64_t b, int64_t h,
                                             int64_t first, const float *staging)
{
	for (int i = threadIdx.x % WARP; i < WARP_QUERIES * D / 8; i += WARP) {
		const int row = i / (D / 8), column = i % (D / 8) * 8;
		const int64_t t = first + row;
		float o[8], z[8];

		if (t >= a.seq_len)
			break;
		load8f(o, staging + row * (D + 4) + column);
		if (a.out_ungated.data)
			store8(at(a.out_ungated, b, t, h) + column, o);
		if (a.gate.data) {
			load8(z, at(a.gate, b, t, h) + column);
#pragma unroll
			for (int j = 0; j < 8; j++)
				o[j] *= sigmoid(z[j]);
		}
		store8(at(a.out, b, t, h) + column, o);
	}
}

/* Where a warp is: its queries first .. last, of head h and sequence b, which read head kv of keys.
 */
struct place {
	int64_t b, h, kv, first, last;
};

/* The block's queries block_first .. block_last attend to all keys of a list that any of them sees.
 * All threads have left k and v behind. */
template <int D, bool DILATED>
static __device__ __forceinline__ void
walk(accumulator<D> &acc, const struct attention_args &a, const struct place &p, int list,
     int64_t block_first, int64_t block_last, const bf16 *warp_q, bf16 *k, bf16 *v)
{
	const int begin = visible<DILATED>(a, block_first, list).first / KEYS * KEYS;
	const int end = visible<DILATED>(a, block_last, list).end;
	const struct interval from = visible<DILATED>(a, p.first, list);
	const struct interval to = visible<DILATED>(a, p.last, list);
	const float scale = a.scale * LOG2E;
	float s[M_TILES][KEY_TILES][4];

	load_keys<D, KEYS, THREADS, DILATED>(k, a, a.k, p.b, p.kv, list, begin, end);
	load_keys<D, KEYS, THREADS, DILATED>(v, a, a.v, p.b, p.kv, list, begin, end);
	copy_commit();
	if (list == 0) /* while the first tiles are on their way */
		seed(acc, a, p.b, p.h, p.first);
	for (int key = begin; key < end; key += KEYS) {
		const int buffer = (key - begin) / KEYS % 2 * KEYS * D;
		bf16 *const next_k = k + (KEYS * D - buffer), *const next_v =
		                                                      v + (KEYS * D - buffer);

		copy_wait<0>();
		__syncthreads();
		if (key + KEYS < end) {
			load_keys<D, KEYS, THREADS, DILATED>(next_k, a, a.k, p.b, p.kv, list,
			                                     key + KEYS, end);
			load_keys<D, KEYS, THREADS, DILATED>(next_v, a, a.v, p.b, p.kv, list,
			                                     key + KEYS, end);
			copy_commit();
		}
		/* Without divisions it takes fewer registers to compute them again. */
		const struct interval earliest = DILATED ? from : visible(a, p.first);
		const struct interval latest = DILATED ? to : visible(a, p.last);
		if (p.first > p.last || key >= latest.end || key + KEYS <= earliest.first)
			continue;
		scores<D>(s, warp_q, k + buffer);
		if (key < latest.first || key + KEYS > earliest.end)
			apply_mask<DILATED>(s, a, list, p.first, key);
		softmax(acc, s, scale);
		weigh(acc, s, v + buffer);
	}
	copy_wait<0>();
	__syncthreads();
}

template <int D, bool DILATED>
static __global__ void __launch_bounds__(THREADS, 2)
        attention_kernel(const __grid_constant__ struct attention_args a)
{
	const int64_t h = blockIdx.y, b = blockIdx.z;
	/* The last queries see the most keys: they start first. */
	const int64_t block_first = (int64_t)(gridDim.x - 1 - blockIdx.x) * QUERIES;
	const int64_t block_last = min(block_first + QUERIES, a.seq_len) - 1;
	const int64_t first = block_first + threadIdx.x / WARP * WARP_QUERIES;
	const struct place p = {b, h, h / readers(a), first,
	                        min(first + WARP_QUERIES, a.seq_len) - 1};
	bf16 *const q = reinterpret_cast<bf16 *>(shared_memory);
	bf16 *const k = q + QUERIES * D, *const v = k + 2 * KEYS * D;
	const bf16 *const warp_q = q + threadIdx.x / WARP * WARP_QUERIES * D;
	accumulator<D> acc;

	load_tile<D, QUERIES, THREADS>(q, a.q, b, h % a.q_heads, block_first, a.seq_len);
	for (int list = 0; list < KEY_LISTS<DILATED>; list++)
		walk<D, DILATED>(acc, a, p, list, block_first, block_last, warp_q, k, v);
	float *staging = reinterpret_cast<float *>(shared_memory) +
	                 threadIdx.x / WARP * WARP_QUERIES * (D + 4);
	finish(acc, a, b, h, first, staging);
	store<D>(a, b, h, first, staging);
}

extern "C" const char *portable_attention_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct attention_args *>(args);

	if (!is_mask(a->mask))
		return "an unknown mask";
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	if (a->mask == MASK_CHUNK && !a->own_score)
		return "the chunk mask needs an own token";
	if (!(a->scale > 0.0f))
		return "scale must be positive";
	if (a->batch > 65535 || a->n_heads > 65535)
		return "more than 65535 sequences or heads";
	return check_aligned(&a->q, &a->k, &a->v, &a->own_value, &a->gate, &a->out,
	                     &a->out_ungated);
}

extern "C" enum status portable_attention(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct attention_args *>(args);
	const dim3 grid((unsigned)divide_up(a->seq_len, QUERIES), (unsigned)a->n_heads,
	                (unsigned)a->batch);
	const size_t shared = (QUERIES + 4 * KEYS) * (size_t)a->d_head * sizeof(bf16);

	const bool dilated = a->mask == MASK_DILATED;

	return launch(device, "attention",
	              a->d_head == 64
	                      ? dilated ? attention_kernel<64, true> : attention_kernel<64, false>
	              : dilated ? attention_kernel<128, true>
	                        : attention_kernel<128, false>,
	              grid, THREADS, shared, *a);
}
