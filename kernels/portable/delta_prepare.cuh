/*
 * The first pass of delta.cu and delta_backward.cu, a block per chunk and head: P, M, the factors
 * of tokens and channels and, where decays differ by channel, q and k decayed. A warp takes 16
 * tokens as queries; to earlier sub-chunks their decay is split at the start of their own.
 *
 * M, the inverse of I plus a strictly lower triangle, is made in fp32: a warp inverts a 16 x 16
 * block on the diagonal by substitution, a column a lane; then block row i of the inverse follows
 * from those above. bf16 products would cost more than rounding the result does, and Neumann's
 * series overflows where keys are alike.
 */
#ifndef KERNELS_PORTABLE_DELTA_PREPARE_CUH
#define KERNELS_PORTABLE_DELTA_PREPARE_CUH

#include "kernels/portable/delta_tiles.cuh"

namespace
{

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
	struct {
		bf16 q[CHUNK * SLAB], k[CHUNK * SLAB];
	} slabs[MAX_KEYS / SLAB]; /* as many as d_k has; last, for the rest is not allocated */
};

/* Adds one slab's part of A and P of the pairs in this warp's sub-chunk, exactly; s < t. */
static __device__ __noinline__ void add_pairs(struct prepare_memory &m, int slab, int lag,
                                              bool delta)
{
	const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

	for (int i = lane; i < SUB * SUB; i += WARP) {
		const int t = SUB * warp + i / SUB, s = SUB * warp + i % SUB;
		float a = 0.0f, b = 0.0f;

		if (s >= t)
			continue;
		for (int c = 0; c < SLAB; c += 2) {
			const uint32_t k = pair_at<SLAB>(m.slabs[slab].k, s, c),
			               q = pair_at<SLAB>(m.slabs[slab].q, t, c);
			const uint32_t l = pair_at<SLAB>(m.slabs[slab].k, t, c);
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
                                                   struct prepare_memory &m, int slab)
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

		left<SLAB>(q, m.slabs[slab].q, SUB * warp, 16 * step);
		left<SLAB>(k, m.slabs[slab].k, SUB * warp, 16 * step);
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

				to[i] = scaled(pair_at<SLAB>(m.slabs[slab].k, s, channel),
				               exp2_fast(reference[channel] - then[0]),
				               exp2_fast(reference[channel + 1] - then[1]));
			}
			if (DELTA)
				multiply_add(a[n], k, to[0], to[1]);
			multiply_add(b[n], q, to[0], to[1]);
		}
	}
	if (!mild)
		add_pairs(m, slab, LAG, DELTA);
}

/* One slab's part where they do not: undecayed products. */
static __device__ __forceinline__ void add_undecayed(float (&a)[8][4], float (&b)[8][4],
                                                     const struct prepare_memory &m, int slab)
{
	const int warp = threadIdx.x / WARP;

#pragma unroll
	for (int step = 0; step < SLAB / 16; step++) {
		uint32_t q[4], k[4], to[4];

		left<SLAB>(q, m.slabs[slab].q, SUB * warp, 16 * step);
		left<SLAB>(k, m.slabs[slab].k, SUB * warp, 16 * step);
#pragma unroll
		for (int n = 0; n < 4; n++) {
			if (n > warp)
				break;
			right_transposed<SLAB>(to, m.slabs[slab].k, 16 * step, 16 * n);
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

		load8(q, m.slabs[slab].q + swizzled<SLAB>(row, column / 8));
		load8(k, m.slabs[slab].k + swizzled<SLAB>(row, column / 8));
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

/* Adds to own[t] the slab's part of q_t.k_t, with the bonus if there is one. */
template <bool DELTA>
static __device__ __forceinline__ void add_own(struct prepare_memory &m, const struct problem &p,
                                               const struct place &x, int slab)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const int t = threadIdx.x / 2, first = threadIdx.x % 2 * (SLAB / 2);
	float sum = 0.0f;

	for (int i = first; i < first + SLAB / 2; i += 8) {
		const int64_t channel = slab * SLAB + i;
		float q[8], k[8];

		load8(q, m.slabs[slab].q + swizzled<SLAB>(t, i / 8));
		load8(k, m.slabs[slab].k + swizzled<SLAB>(t, i / 8));
		for (int j = 0; j < 8 && channel < f.d_k; j++)
			sum += q[j] * k[j] * (DELTA ? 1.0f : f.bonus[x.h * f.d_k + channel + j]);
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

	for (int slab = 0; slab < p.keys / SLAB; slab++) {
		load_rows<SLAB>(m.slabs[slab].q, at(f.q, x.b, x.first, x.h) + slab * SLAB,
		                f.q.token, x.tokens, f.d_k - slab * SLAB);
		load_rows<SLAB>(m.slabs[slab].k, at(f.k, x.b, x.first, x.h) + slab * SLAB,
		                f.k.token, x.tokens, f.d_k - slab * SLAB);
	}
	copy_commit();
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
		if (DIAGONAL)
			sum_diagonal<THREADS>(m.g, m.totals, p, x, slab);
		copy_wait<0>();
		__syncthreads();
		if (DIAGONAL) {
			add_decayed<DELTA>(a, b, m, slab);
			store_decayed<DELTA>(p, x, m, slab);
		} else {
			add_undecayed(a, b, m, slab);
		}
		/* Pairs leave the tokens' own scores out, and the bonus changes them. */
		if (DIAGONAL)
			add_own<DELTA>(m, p, x, slab);
	}
	__syncthreads();
	/* Lower triangles, decayed, into the system and the workspace, whose blocks above the
	 * diagonal nobody reads. */
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

		store_row(p.scores + (x.record * CHUNK + t) * CHUNK, b, half, SUB * (warp + 1));
	}
	if (!DELTA)
		return;
	invert(m);
	for (int i = threadIdx.x; i < CHUNK * CHUNK / 8; i += THREADS) {
		const int row = i / (CHUNK / 8), column = i % (CHUNK / 8) * 8;
		float y[8];

		if (column / SUB > row / SUB)
			continue;
		load8f(y, m.system + row * STRIDE + column);
		store8(p.inverse + x.record * CHUNK * CHUNK + 8 * i, y);
	}
}

template <int KEYS, bool DIAGONAL, bool DELTA>
static enum status prepare(struct device *device, const char *operation, const struct problem &p)
{
	const struct matrix_recurrence_args *f = &p.a.forward;
	const size_t shared = sizeof(struct prepare_memory) -
	                      (MAX_KEYS - KEYS) / SLAB * sizeof(prepare_memory::slabs[0]);

	return launch(device, operation, prepare_kernel<DIAGONAL, DELTA>,
	              dim3((unsigned)(f->batch * f->n_heads * p.chunks)), THREADS, shared, p);
}

} // namespace

#endif
