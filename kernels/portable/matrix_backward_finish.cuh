/*
 * A chunk of the matrix recurrence's gradients (matrix_recurrence_backward.cu): from the sums to
 * dq, dk and the gradient of the decays, in memory.
 */
#ifndef KERNELS_PORTABLE_MATRIX_BACKWARD_FINISH_CUH
#define KERNELS_PORTABLE_MATRIX_BACKWARD_FINISH_CUH

#include "kernels/portable/matrix_backward_slab.cuh"

namespace matrix_backward
{

/* ---- diagonal decays ---- */

/* dk = q dq - k dk, with the tiles as they have decayed. */
template <int PANEL>
static __device__ __forceinline__ void difference(float (&dk)[PANEL / 16][4],
                                                  const float (&dq)[PANEL / 16][4],
                                                  const struct place<PANEL> &x)
{
	const int row = 16 * (threadIdx.x / WARP % GROUPS) + threadIdx.x % WARP / 4;

#pragma unroll
	for (int n = 0; n < PANEL / 16; n++)
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int channel = channel_of<PANEL>(n);
			const uint32_t q = *pair_at<PANEL>(x.q, row + 8 * half, channel);
			const uint32_t k = *pair_at<PANEL>(x.k, row + 8 * half, channel);
			float &u = dk[n][2 * half], &w = dk[n][2 * half + 1];

			u = low_half(q) * dq[n][2 * half] - low_half(k) * u;
			w = high_half(q) * dq[n][2 * half + 1] - high_half(k) * w;
		}
}

/* A pair of channels in a tile of fp32 sums, without conflicts for fragments and for rows. */
template <int PANEL>
static __device__ __forceinline__ float2 *sum_at(float *tile, int row, int channel)
{
	return reinterpret_cast<float2 *>(tile + row * PANEL) + (channel / 2 ^ (row & 3) << 2);
}

template <int PANEL>
static __device__ __forceinline__ void store_sums(float *tile, const float (&d)[PANEL / 16][4])
{
	const int row = 16 * (threadIdx.x / WARP % GROUPS) + threadIdx.x % WARP / 4;

#pragma unroll
	for (int n = 0; n < PANEL / 16; n++)
#pragma unroll
		for (int half = 0; half < 2; half++)
			*sum_at<PANEL>(tile, row + 8 * half, channel_of<PANEL>(n)) =
			        make_float2(d[n][2 * half], d[n][2 * half + 1]);
}

/* dB inside the sub-chunks, fp32, as rows and as columns: pairs[sub][i][j], and [j][i] behind. */
template <int PANEL>
static __device__ __forceinline__ void spread_pairs(float *pairs, const struct place<PANEL> &x)
{
	for (int index = threadIdx.x; index < SUBS * SUB * SUB / 2; index += THREADS) {
		const int row = index / (SUB / 2), j = index % (SUB / 2) * 2, sub = row / SUB;
		const uint32_t pair = *pair_at<CHUNK>(x.scores, row, sub * SUB + j);
		float *const columns = pairs + (SUBS + sub) * SUB * SUB + row % SUB;

		pairs[row * SUB + j] = low_half(pair);
		pairs[row * SUB + j + 1] = high_half(pair);
		columns[j * SUB] = low_half(pair);
		columns[(j + 1) * SUB] = high_half(pair);
	}
}

/* A row of pairs times the vectors, of which only FROM .. END-1 count. */
template <int FROM, int END>
static __device__ __forceinline__ float2 weigh(const float *weights, const float2 (&x)[SUB])
{
	float2 sum = {};

#pragma unroll
	for (int i = FROM / 4; i < (END + 3) / 4; i++) {
		const float4 four = reinterpret_cast<const float4 *>(weights)[i];
		const float w[4] = {four.x, four.y, four.z, four.w};

#pragma unroll
		for (int e = 0; e < 4; e++)
			if (4 * i + e >= FROM && 4 * i + e < END) {
				sum.x += w[e] * x[4 * i + e].x;
				sum.y += w[e] * x[4 * i + e].y;
			}
	}
	return sum;
}

/* Calls visit(integral constant i) for i = FROM .. END-1, or backwards. */
template <int I> struct index {
	static constexpr int value = I;
};

template <int FROM, int END, typename Visit>
static __device__ __forceinline__ void upwards(const Visit &visit)
{
	if constexpr (FROM < END) {
		visit(index<FROM>());
		upwards<FROM + 1, END>(visit);
	}
}

template <int FROM, int END, typename Visit>
static __device__ __forceinline__ void downwards(const Visit &visit)
{
	if constexpr (FROM < END) {
		visit(index<END - 1>());
		downwards<FROM, END - 1>(visit);
	}
}

/* A strip's q dq - k dk, zeros for threads without a strip. */
template <int PANEL>
static __device__ __forceinline__ void load_flow(float2 (&flow)[SUB], float *tile,
                                                 const struct strip &s)
{
#pragma unroll
	for (int i = 0; i < SUB; i++)
		flow[i] = s.sub < SUBS ? *sum_at<PANEL>(tile, s.sub * SUB + i, s.channel)
		                       : make_float2(0.0f, 0.0f);
}

/* A strip of a tensor in memory, token after token. */
struct strip_cursor {
	bf16 *at;
	int64_t step;
	int valid; /* tokens of the strip */
};

template <int PANEL>
static __device__ __forceinline__ struct strip_cursor
cursor_of(const struct place<PANEL> &x, const struct rows &r, const struct strip &s)
{
	const bool inside = s.sub < SUBS && s.column < r.width;

	return {held(at(r.view, x.b, x.first + s.sub * SUB, x.h) + s.column), r.view.token,
	        inside ? x.valid - s.sub * SUB : 0};
}

/* Pairs of the strip's tokens, zeros outside. */
template <int PANEL>
static __device__ __forceinline__ void load_strip(uint32_t (&pairs)[SUB],
                                                  const struct place<PANEL> &x,
                                                  const struct rows &r, const struct strip &s)
{
	const struct strip_cursor c = cursor_of<PANEL>(x, r, s);

#pragma unroll
	for (int i = 0; i < SUB; i++)
		pairs[i] = i < c.valid ? *reinterpret_cast<const uint32_t *>(c.at + i * c.step) : 0;
}

static __device__ __forceinline__ void store_strip(const struct strip_cursor &c, int i, float2 pair,
                                                   float scale)
{
	if (i < c.valid)
		*reinterpret_cast<uint32_t *>(c.at + i * c.step) =
		        pack(scale * pair.x, scale * pair.y);
}

/* What a strip needs again from memory: decays, and for pairs inside the sub-chunk q and k. */
struct strip_values {
	uint32_t g[SUB], q[SUB], k[SUB];
};

static __device__ __forceinline__ float2 halves(uint32_t pair)
{
	return make_float2(low_half(pair), high_half(pair));
}

static __device__ __forceinline__ float2 exp2_both(float2 x)
{
	return make_float2(exp2_fast(x.x), exp2_fast(x.y));
}

/* Adds natural logarithms to those to the base of two. */
static __device__ __forceinline__ float2 add_decay(float2 sum, float2 one)
{
	return make_float2(fmaf(one.x, LOG2E, sum.x), fmaf(one.y, LOG2E, sum.y));
}

static __device__ __forceinline__ float2 product(float2 a, float2 b)
{
	return make_float2(a.x * b.x, a.y * b.y);
}

static __device__ __forceinline__ float2 sum(float2 a, float2 b)
{
	return make_float2(a.x + b.x, a.y + b.y);
}

/* Writes dq of a strip. EXACT: with the pairs inside the sub-chunk, and flow gets their q dq. */
template <int PANEL, bool EXACT>
static __device__ __forceinline__ void
finish_queries(float2 (&flow)[SUB], const struct strip_values &values, const struct strip &s,
               const struct strip_cursor &to, float scale)
{
	float *const tile = reinterpret_cast<float *>(shared_memory + layout<PANEL>::DQ);
	const float *const pairs =
	        reinterpret_cast<const float *>(shared_memory + layout<PANEL>::PAIRS) +
	        s.sub * SUB * SUB;
	float2 k[SUB] = {}, g = {};

	upwards<0, SUB>([&](auto at_token) {
		constexpr int i = decltype(at_token)::value;
		float2 d = *sum_at<PANEL>(tile, s.sub * SUB + i, s.channel);

		const float2 one = halves(values.g[i]);

		g = add_decay(g, one);
		d = product(d, exp2_both(g));
		if constexpr (EXACT) {
			const float2 a = exp2_both(add_decay({}, one));

			k[i] = halves(values.k[i]);
#pragma unroll
			for (int j = 0; j < i; j++)
				k[j] = product(k[j], a);
			const float2 near = weigh<0, i + 1>(pairs + i * SUB, k);

			d = sum(d, near);
			flow[i] = sum(flow[i], product(halves(values.q[i]), near));
		}
		store_strip(to, i, d, scale);
	});
}

/* The same of dk, backwards; flow loses k dk of the pairs. */
template <int PANEL, bool EXACT>
static __device__ __forceinline__ void
finish_keys(float2 (&flow)[SUB], const struct strip_values &values, const struct strip &s,
            const struct strip_cursor &to, float scale)
{
	float *const tile = reinterpret_cast<float *>(shared_memory + layout<PANEL>::DK);
	const float *const pairs =
	        reinterpret_cast<const float *>(shared_memory + layout<PANEL>::PAIRS) +
	        (SUBS + s.sub) * SUB * SUB;
	float2 q[SUB] = {}, g = {}, a = {};

	downwards<0, SUB>([&](auto at_token) {
		constexpr int j = decltype(at_token)::value;
		float2 d = *sum_at<PANEL>(tile, s.sub * SUB + j, s.channel);

		const float2 one = halves(values.g[j]);

		d = product(d, exp2_both(g));
		g = add_decay(g, one);
		if constexpr (EXACT) {
			q[j] = halves(values.q[j]);
#pragma unroll
			for (int i = j + 1; i < SUB; i++)
				q[i] = product(q[i], a);
			const float2 near = weigh<j, SUB>(pairs + j * SUB, q);
			const float2 lost = product(halves(values.k[j]), near);

			d = sum(d, near);
			flow[j] = make_float2(flow[j].x - lost.x, flow[j].y - lost.y);
			a = exp2_both(add_decay({}, one));
		}
		store_strip(to, j, d, scale);
	});
}

template <int PANEL, bool EXACT>
static __device__ __forceinline__ void
finish_both(float2 (&flow)[SUB], struct strip_values &values, const struct place<PANEL> &x,
            const struct plan &p, const struct strip &s, const struct outputs &o, float scale)
{
	if (s.sub >= SUBS)
		return;
	if (EXACT) {
		load_strip<PANEL>(values.q, x, p.q, s);
		load_strip<PANEL>(values.k, x, p.k, s);
	}
	finish_queries<PANEL, EXACT>(flow, values, s, cursor_of<PANEL>(x, o.dq, s), scale);
	finish_keys<PANEL, EXACT>(flow, values, s, cursor_of<PANEL>(x, o.dk, s), scale);
}

/* A first token has no state to decay, where rounding would leave something. */
static __device__ __forceinline__ float
only_if_decaying(float flow, const struct matrix_recurrence_args &f, int64_t t)
{
	return t == 0 && !f.h0 && !isnan(flow) ? 0.0f : flow;
}

/* What flows past the chunk's end or its start, of one channel: the F of a token behind it. */
template <int PANEL>
static __device__ __forceinline__ float flow_behind(const struct place<PANEL> &x, int channel,
                                                    float whole)
{
	float sum = 0.0f, product = 0.0f;

#pragma unroll
	for (int i = 0; i < GROUPS; i++) {
		sum += x.kept[i * PANEL + channel];
		product += i < 128 / PANEL ? x.flow[i * PANEL + channel] : 0.0f;
	}
	return whole * product + sum;
}

/* Diagonal: the sums of flow from each token on, to memory. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void finish_channels(float2 (&flow)[SUB],
                                                       const struct place<PANEL> &x,
                                                       const struct matrix_recurrence_args &f,
                                                       const struct strip &s, const struct rows &to)
{
	const bool busy = s.sub < SUBS;
	float2 rest = {};

	if (busy) {
		const float2 whole = decay_over<PANEL>(x, 0, SUBS, s.channel);

		rest = make_float2(flow_behind<PANEL>(x, s.channel, whole.x),
		                   flow_behind<PANEL>(x, s.channel + 1, whole.y));
	}
	__syncthreads();
	if (busy) {
		float2 all = {};

#pragma unroll
		for (int i = 0; i < SUB; i++)
			all = sum(all, flow[i]);
		*reinterpret_cast<float2 *>(x.flow + s.sub * PANEL + s.channel) = all;
	}
	__syncthreads();
	if (!busy)
		return;
	const struct strip_cursor cursor = cursor_of<PANEL>(x, to, s);
	const int64_t t = x.first + s.sub * SUB;
	for (int sub = SUBS - 1; sub > s.sub; sub--)
		rest = sum(rest,
		           *reinterpret_cast<const float2 *>(x.flow + sub * PANEL + s.channel));
#pragma unroll
	for (int i = SUB - 1; i >= 0; i--) {
		rest = sum(rest, flow[i]);
		if (i == 0)
			rest = make_float2(only_if_decaying(rest.x, f, t),
			                   only_if_decaying(rest.y, f, t));
		store_strip(cursor, i, rest, f.scale);
	}
}

/* Diagonal: dq, dk and dlog_decay of a panel from the sums, which are relative to the ends of
 * sub-chunks. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void
finish_diagonal(const float (&dq)[PANEL / 16][4], float (&dk)[PANEL / 16][4],
                const struct place<PANEL> &x, const struct matrix_recurrence_args &f,
                const struct plan &p, const struct strip &s, const struct outputs &o, bool mild)
{
	using L = layout<PANEL>;
	float *const dq_tile = reinterpret_cast<float *>(shared_memory + L::DQ);
	struct strip_values values;
	float2 flow[SUB];

	if (!mild)
		spread_pairs<PANEL>(reinterpret_cast<float *>(shared_memory + L::PAIRS), x);
	__syncthreads();
	store_sums<PANEL>(reinterpret_cast<float *>(shared_memory + L::DK), dk);
	load_strip<PANEL>(values.g, x, p.log_decay, s);
	/* Into dk's registers: the tiles are where dq's sums will be. */
	difference<PANEL>(dk, dq, x);
	__syncthreads();
	store_sums<PANEL>(dq_tile, dk);
	__syncthreads();
	load_flow<PANEL>(flow, dq_tile, s);
	__syncthreads();
	store_sums<PANEL>(dq_tile, dq);
	__syncthreads();
	if (mild)
		finish_both<PANEL, false>(flow, values, x, p, s, o, f.scale);
	else
		finish_both<PANEL, true>(flow, values, x, p, s, o, f.scale);
	finish_channels<PANEL>(flow, x, f, s, o.dlog_decay);
}

/* ---- channels that decay alike ---- */

/* Writes 16 tokens and half of the panel's channels. */
template <int PANEL>
static __device__ __forceinline__ void store_rows(const float (&d)[PANEL / 16][4],
                                                  const struct place<PANEL> &x,
                                                  const struct rows &to, int64_t panel, float scale)
{
	const int warp = threadIdx.x / WARP;
	const int row = 16 * (warp % GROUPS) + threadIdx.x % WARP / 4;
	const int64_t column = panel * PANEL + warp / GROUPS * (PANEL / 2) + 4 * (threadIdx.x % 4);
	bf16 *const place = at(to.view, x.b, x.first + row, x.h) + column;

#pragma unroll
	for (int half = 0; half < 2; half++)
#pragma unroll
		for (int n = 0; n < PANEL / 16; n += 2) {
			const uint2 four = trade_pairs(d[n] + 2 * half, d[n + 1] + 2 * half, scale);

			if (row + 8 * half < x.valid && column + 8 * n < to.width)
				*reinterpret_cast<uint2 *>(place + 8 * half * to.view.token +
				                           8 * n) = four;
		}
}

/* Channels that decay alike: adds a panel's q dq - k dk to the tokens' sums. Synchronizes. */
template <int PANEL>
static __device__ __forceinline__ void add_tokens(const float (&dq)[PANEL / 16][4],
                                                  const float (&dk)[PANEL / 16][4],
                                                  const struct place<PANEL> &x, bool first)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int row = 16 * (warp % GROUPS) + lane / 4;
	float base = 0.0f;

#pragma unroll
	for (int half = 0; half < 2; half++) {
		float sum = 0.0f;

#pragma unroll
		for (int n = 0; n < PANEL / 16; n++) {
			const int channel = channel_of<PANEL>(n);
			const uint32_t q = *pair_at<PANEL>(x.q, row + 8 * half, channel);
			const uint32_t k = *pair_at<PANEL>(x.k, row + 8 * half, channel);

			sum += low_half(q) * dq[n][2 * half] - low_half(k) * dk[n][2 * half];
			sum += high_half(q) * dq[n][2 * half + 1] -
			       high_half(k) * dk[n][2 * half + 1];
		}
		sum = group_sum(sum, 4);
		if (lane % 4 == 0)
			x.whole[warp / GROUPS * CHUNK + row + 8 * half] = sum;
	}
	if (threadIdx.x < PANEL)
		base = flow_behind<PANEL>(x, threadIdx.x, exp2_fast(x.g[CHUNK - 1]));
	base = group_sum(base, WARP);
	if (lane == 0)
		x.base[warp] = (first ? 0.0f : x.base[warp]) + base;
	__syncthreads();
	if (threadIdx.x < CHUNK)
		x.token[threadIdx.x] = (first ? 0.0f : x.token[threadIdx.x]) +
		                       x.whole[threadIdx.x] + x.whole[CHUNK + threadIdx.x];
	__syncthreads();
}

/* The sums of what flows from each token on, to memory, by the first warp. */
template <int PANEL>
static __device__ __forceinline__ void store_tokens(const struct place<PANEL> &x,
                                                    const struct matrix_recurrence_args &f,
                                                    const struct view &to)
{
	const int last = CHUNK - 1 - 2 * (int)threadIdx.x;
	float base = 0.0f;

	if (threadIdx.x >= WARP)
		return;
	for (int i = 0; i < THREADS / WARP; i++)
		base += x.base[i];
	const struct token_sums sums = sum_tokens(make_float2(x.token[last], x.token[last - 1]));
#pragma unroll
	for (int i = 0; i < 2; i++) {
		const float flow = base + (i ? sums.second : sums.first);
		const int64_t t = x.first + last - i;

		if (last - i < x.valid)
			*at(to, x.b, t, x.h) =
			        __float2bfloat16(f.scale * only_if_decaying(flow, f, t));
	}
}

} // namespace matrix_backward

#endif
