/*
 * The last pass of delta_backward.cu, a block per chunk and head: all that sums over the columns of
 * the state. 64 channels after the other: dout S^T, y S^T and e D^T, 32 columns at a time through a
 * ring of three stages (X1 and X2 on the way, with the first 64), then what the chunk's tokens give
 * each other. A warp takes 16 tokens and 32 channels, of three sums in fp32.
 *
 * Where decays differ by channel, their sums take the place of the stages, and the products between
 * tokens are split at the start of the queries' sub-chunk (dq, r) or at the end of the keys' (u).
 */
#ifndef KERNELS_PORTABLE_DELTA_GRADIENT_CUH
#define KERNELS_PORTABLE_DELTA_GRADIENT_CUH

#include "kernels/portable/delta_tiles.cuh"

namespace
{

/* A warp takes 16 tokens, and half of a slab's channels or of the tokens as keys. */
constexpr int GRADIENT_THREADS = 256, STAGES = 3, COLUMNS = 32;

enum { DOUT, ERRORS, VALUES, STATES, GRADIENTS, N_OPERANDS };

/* 32 columns of a chunk's tokens and of a slab's rows of the states. */
typedef bf16 stage[N_OPERANDS][CHUNK * COLUMNS];

struct gradient_memory {
	union {
		stage stages[STAGES];
		struct {
			float g[(CHUNK + 1) * STRIDE];
			float flow[CHUNK * STRIDE]; /* q dq + k r - beta k u */
		};
	};
	bf16 q[CHUNK * SLAB], k[CHUNK * SLAB];
	bf16 x1[CHUNK * CHUNK], x2[CHUNK * CHUNK]; /* X1, -X2, strictly lower */
	float own[CHUNK];                          /* x */
	float factors[WHOLE];
	float scalars[2 * CHUNK];
	float ends[SLAB];                 /* rowsum(S D) of channels */
	float written[CHUNK / SUB][SLAB]; /* sums of what tokens add to it */
	float totals[GRADIENT_THREADS], bonuses[GRADIENT_THREADS]; /* of a thread's rows */
	bool forgets[GRADIENT_THREADS];
	float sums[GRADIENT_THREADS / WARP];
	float rows[2][CHUNK]; /* dbeta and flows of the second half of channels */
	float bonus[SLAB];
};

/* Rows of dq, r and u, as products leave them. */
struct gradients {
	float q[TILES][4], r[TILES][4], u[TILES][4];
};

/* Where this thread is in the products: its warp's first token and first channel or key. */
struct corner {
	int token, channel, lane;
};

/* The same number, of which the compiler does not know that: what follows from it is computed where
 * it is used, and takes no registers elsewhere. */
static __device__ __forceinline__ int hidden(int x)
{
	asm volatile("" : "+r"(x));
	return x;
}

static __device__ __forceinline__ struct corner corner_of()
{
	const int thread = hidden(threadIdx.x), warp = thread / WARP;

	return {warp % (CHUNK / SUB) * SUB, warp / (CHUNK / SUB) * HALF, thread % WARP};
}

/* This lane's token and channel of element e of tile n. */
static __device__ __forceinline__ int token_of(struct corner c, int e)
{
	return c.token + c.lane / 4 + e / 2 * 8;
}

static __device__ __forceinline__ int channel_of(struct corner c, int n, int e)
{
	return c.channel + 8 * n + c.lane % 4 * 2 + e % 2;
}

/* Where this thread's parts of the next stage to load are; slab after slab, 32 columns a stage. */
template <bool DELTA> struct cursor {
	const bf16 *dout, *errors, *values, *states, *gradients;
	int column, place, slot;
	bool inside; /* the sequence */

	__device__ __forceinline__ cursor(const struct problem &p, const struct place &x)
	{
		const int row = threadIdx.x / (COLUMNS / 8);
		const int64_t t = x.first + row, state = (x.record * p.keys + row) * p.values;

		column = threadIdx.x % (COLUMNS / 8) * 8;
		place = swizzled<COLUMNS>(row, column / 8);
		slot = 0;
		inside = row < x.tokens;
		dout = at(p.a.dout, x.b, t, x.h) + column;
		errors = DELTA ? p.errors + (x.record * CHUNK + row) * p.values + column
		               : at(p.a.forward.v, x.b, t, x.h) + column;
		values = DELTA ? at(p.a.dv, x.b, t, x.h) + column : NULL;
		states = p.states + state + column;
		gradients = p.gradients + state + column;
	}

	__device__ __forceinline__ void load(stage (&stages)[STAGES], const struct problem &p)
	{
		bf16 *const to = stages[slot][0] + place;
		const bool valid = inside && column < p.a.forward.d_v;

		copy16_async(to + DOUT * CHUNK * COLUMNS, dout, valid);
		copy16_async(to + ERRORS * CHUNK * COLUMNS, errors, DELTA || valid);
		if (DELTA)
			copy16_async(to + VALUES * CHUNK * COLUMNS, values, valid);
		copy16_async(to + STATES * CHUNK * COLUMNS, states, true);
		copy16_async(to + GRADIENTS * CHUNK * COLUMNS, gradients, true);
		/* The next slab has the same tokens, and rows of the states further on. */
		column += COLUMNS;
		const bool wraps = column >= p.values;
		const int of_tokens = wraps ? COLUMNS - p.values : COLUMNS;
		const int of_states = wraps ? COLUMNS + (SLAB - 1) * p.values : COLUMNS;

		column -= wraps ? p.values : 0;
		dout += of_tokens;
		errors += of_tokens;
		values += of_tokens;
		states += of_states;
		gradients += of_states;
		slot = slot + 1 < STAGES ? slot + 1 : 0;
	}
};

/* X1 and X2 and the tokens' own x into shared memory. */
template <bool DIAGONAL, bool DELTA>
static __device__ __forceinline__ void
store_tokens(struct gradient_memory &m, const float (&x1)[TILES][4], const float (&x2)[TILES][4],
             float scale, struct corner c)
{

#pragma unroll
	for (int n = 0; n < TILES; n++) {
		if (c.channel + n / 2 * SUB > c.token)
			break;
#pragma unroll
		for (int half = 0; half < 2; half++) {
			const int t = token_of(c, 2 * half), first = channel_of(c, n, 0);
			float one[2], two[2];

#pragma unroll
			for (int i = 0; i < 2; i++) {
				const int s = first + i;
				const float power =
				        DIAGONAL || s > t ? 1.0f
				                          : exp2_fast(m.scalars[t] - m.scalars[s]);

				one[i] = scale * x1[n][2 * half + i];
				if (s == t)
					m.own[t] = one[i];
				one[i] = s < t ? power * one[i] : 0.0f;
				two[i] = s < t ? -power * x2[n][2 * half + i] : 0.0f;
			}
			own_pair<CHUNK>(m.x1, c.token + 8 * half, c.channel, 8 * n) =
			        pack(one[0], one[1]);
			if (DELTA)
				own_pair<CHUNK>(m.x2, c.token + 8 * half, c.channel, 8 * n) =
				        pack(two[0], two[1]);
		}
	}
}

/*
 * d = dout S^T, y S^T, e D^T of a slab's channels, m.ends; FIRST: also what store_tokens() stores,
 * of the first slab. The stages of the next slab are on their way afterwards, unless decays of
 * channels take their place. Synchronizes.
 */
template <bool DIAGONAL, bool DELTA, bool FIRST>
static __device__ __forceinline__ void
multiply_states(struct gradients &d, struct gradient_memory &m, const struct problem &p,
                const struct place &x, int slab, struct cursor<DELTA> &next, int &slot)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct corner c = corner_of();
	const int count = p.values / COLUMNS;
	/* Stages that may be loaded before this slab ends. */
	const int limit = DIAGONAL ? count : (p.keys / SLAB - slab) * count;
	float x1[TILES][4] = {}, x2[TILES][4] = {}, end = 0.0f;
	const auto load = [&](int step) {
		if (step < limit)
			next.load(m.stages, p);
		copy_commit();
	};

	load_rows<SLAB, GRADIENT_THREADS>(m.q, at(f.q, x.b, x.first, x.h) + slab * SLAB, f.q.token,
	                                  x.tokens, f.d_k - slab * SLAB);
	load_rows<SLAB, GRADIENT_THREADS>(m.k, at(f.k, x.b, x.first, x.h) + slab * SLAB, f.k.token,
	                                  x.tokens, f.d_k - slab * SLAB);
	if (DIAGONAL || FIRST) {
		load(0);
		load(1);
	}
	if (FIRST) {
		if (threadIdx.x < WHOLE)
			m.factors[threadIdx.x] =
			        p.factors[x.record * (WHOLE + p.keys) + threadIdx.x];
		if (!DIAGONAL)
			sum_scalar(m.scalars, f, x);
	}
#pragma unroll
	for (int i = 0; i < TILES * 4; i++)
		d.q[i / 4][i % 4] = d.r[i / 4][i % 4] = d.u[i / 4][i % 4] = 0.0f;
#pragma unroll 1
	for (int i = 0; i < count; i++) {
		const stage &from = m.stages[slot];

		copy_wait<1>();
		__syncthreads();
		load(i + 2);
		slot = slot + 1 < STAGES ? slot + 1 : 0;
#pragma unroll
		for (int step = 0; step < COLUMNS; step += 16) {
			uint32_t dout[4], y[4], e[4], b[4];

			left<COLUMNS>(dout, from[DOUT], c.token, step);
			left<COLUMNS>(e, from[ERRORS], c.token, step);
			if (DELTA)
				left<COLUMNS>(y, from[VALUES], c.token, step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				const int channel = c.channel + 8 * n;

				right_transposed<COLUMNS>(b, from[STATES], step, channel);
				multiply_add(d.q[n], dout, b[0], b[1]);
				multiply_add(d.q[n + 1], dout, b[2], b[3]);
				if (DELTA) {
					multiply_add(d.r[n], y, b[0], b[1]);
					multiply_add(d.r[n + 1], y, b[2], b[3]);
				}
				right_transposed<COLUMNS>(b, from[GRADIENTS], step, channel);
				multiply_add(d.u[n], e, b[0], b[1]);
				multiply_add(d.u[n + 1], e, b[2], b[3]);
				if (!FIRST || channel > c.token)
					continue;
				right_transposed<COLUMNS>(b, from[ERRORS], step, channel);
				multiply_add(x1[n], dout, b[0], b[1]);
				multiply_add(x1[n + 1], dout, b[2], b[3]);
				if (DELTA) {
					multiply_add(x2[n], y, b[0], b[1]);
					multiply_add(x2[n + 1], y, b[2], b[3]);
				}
			}
		}
		if (decays_by_data(f)) {
			const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
			float s[8], g[8];

			load8(s, from[STATES] + swizzled<COLUMNS>(row, piece));
			load8(g, from[GRADIENTS] + swizzled<COLUMNS>(row, piece));
#pragma unroll
			for (int j = 0; j < 8; j++)
				end += s[j] * g[j];
		}
	}
	end = group_sum(end, 4);
	if (threadIdx.x % 4 == 0)
		m.ends[threadIdx.x / 4] = end;
	if (FIRST)
		store_tokens<DIAGONAL, DELTA>(m, x1, x2, f.scale, c);
	/* q and k, which a later slab's third stage brings; the first slab's have been waited for.
	 */
	if (DIAGONAL || (!FIRST && count < 3))
		copy_wait<0>();
	else if (!FIRST)
		copy_wait<2>();
	__syncthreads();
}

/* The columns of an A fragment, of tokens first .. first + 15, times beta. */
static __device__ __forceinline__ void scale_columns(uint32_t (&a)[4], const float *beta)
{
	const float *mine = beta + 2 * (threadIdx.x % 4);

#pragma unroll
	for (int i = 0; i < 4; i++)
		a[i] = scaled(a[i], mine[i / 2 * 8], mine[i / 2 * 8 + 1]);
}

/* What tokens of the chunk give each other, where decays are in X1 and X2 already. */
static __device__ __forceinline__ void add_tokens(struct gradients &d, struct gradient_memory &m,
                                                  struct corner c)
{

#pragma unroll 1
	for (int step = 0; step < CHUNK; step += 16) {
		uint32_t one[4], two[4], q[4], k[4];

		if (step <= c.token) {
			left<CHUNK>(one, m.x1, c.token, step);
			left<CHUNK>(two, m.x2, c.token, step);
			scale_columns(one, m.factors + BETA + step);
			scale_columns(two, m.factors + BETA + step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				right<SLAB>(k, m.k, step, c.channel, 8 * n);
				multiply_add(d.q[n], one, k[0], k[1]);
				multiply_add(d.q[n + 1], one, k[2], k[3]);
				multiply_add(d.r[n], two, k[0], k[1]);
				multiply_add(d.r[n + 1], two, k[2], k[3]);
			}
		}
		if (step >= c.token) {
			left_transposed<CHUNK>(one, m.x1, c.token, step);
			left_transposed<CHUNK>(two, m.x2, c.token, step);
#pragma unroll
			for (int n = 0; n < TILES; n += 2) {
				right<SLAB>(q, m.q, step, c.channel, 8 * n);
				right<SLAB>(k, m.k, step, c.channel, 8 * n);
				multiply_add(d.u[n], one, q[0], q[1]);
				multiply_add(d.u[n + 1], one, q[2], q[3]);
				multiply_add(d.u[n], two, k[0], k[1]);
				multiply_add(d.u[n + 1], two, k[2], k[3]);
			}
		}
	}
}

/*
 * The same where decays differ by channel: to the tokens of this warp's sub-chunk as queries
 * relative to its start, as keys relative to its end.
 */
template <bool DELTA>
static __device__ __forceinline__ void
add_decayed_tokens(struct gradients &d, struct gradient_memory &m, bool mild, struct corner c)
{
	constexpr int LAG = DELTA ? 0 : 1;
	const int lane = c.lane;
	const float *start = m.g + c.token * STRIDE, *end = start + SUB * STRIDE;

#pragma unroll 1
	for (int step = 0; step < c.token + (mild ? SUB : 0); step += 16) {
		uint32_t one[4], two[4], k[4];

		left<CHUNK>(one, m.x1, c.token, step);
		if (DELTA) {
			left<CHUNK>(two, m.x2, c.token, step);
			scale_columns(one, m.factors + BETA + step);
			scale_columns(two, m.factors + BETA + step);
		}
#pragma unroll
		for (int n = 0; n < TILES; n += 2) {
			right<SLAB>(k, m.k, step, c.channel, 8 * n);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				const int channel = c.channel + 8 * n + lane / 4 + i / 2 * 8;
				const int row = step + 2 * (lane % 4) + i % 2 * 8;

				k[i] = decayed_rows(k[i], m.g + STRIDE + channel, row,
				                    start[channel], -1.0f);
			}
			multiply_add(d.q[n], one, k[0], k[1]);
			multiply_add(d.q[n + 1], one, k[2], k[3]);
			if (DELTA) {
				multiply_add(d.r[n], two, k[0], k[1]);
				multiply_add(d.r[n + 1], two, k[2], k[3]);
			}
		}
	}
#pragma unroll 1
	for (int step = c.token + (mild ? 0 : SUB); step < CHUNK; step += 16) {
		uint32_t one[4], two[4], q[4], k[4];

		left_transposed<CHUNK>(one, m.x1, c.token, step);
		if (DELTA)
			left_transposed<CHUNK>(two, m.x2, c.token, step);
#pragma unroll
		for (int n = 0; n < TILES; n += 2) {
			right<SLAB>(q, m.q, step, c.channel, 8 * n);
			if (DELTA)
				right<SLAB>(k, m.k, step, c.channel, 8 * n);
#pragma unroll
			for (int i = 0; i < 4; i++) {
				const int channel = c.channel + 8 * n + lane / 4 + i / 2 * 8;
				const int row = step + 2 * (lane % 4) + i % 2 * 8;
				const float *now = m.g + (row + 1 - LAG) * STRIDE + channel;
				const float a = exp2_fast(now[0] - end[channel]);
				const float b = exp2_fast(now[STRIDE] - end[channel]);

				q[i] = scaled(q[i], a, b);
				if (DELTA)
					k[i] = scaled(k[i], a, b);
			}
			multiply_add(d.u[n], one, q[0], q[1]);
			multiply_add(d.u[n + 1], one, q[2], q[3]);
			if (DELTA) {
				multiply_add(d.u[n], two, k[0], k[1]);
				multiply_add(d.u[n + 1], two, k[2], k[3]);
			}
		}
	}
}

static __device__ __forceinline__ float value_at(const bf16 *tile, int row, int column)
{
	return __bfloat162float(tile[element<64>(row, column)]);
}

/*
 * One of dq, r and u (which: 0, 1, 2) of what the tokens of this warp's sub-chunk give each other,
 * pair by pair, into its part of m.flow.
 */
static __device__ __noinline__ void add_pairs(struct gradient_memory &m, int which, int lag)
{
	const struct corner c = corner_of();
	const int channel = c.channel + threadIdx.x % WARP;
	const float *g = m.g + channel; /* of token t at t + 1 */

	for (int mine = c.token; mine < c.token + SUB; mine++) {
		float sum = 0.0f;

		if (which < 2) {
			const float now = g[(mine + 1 - (which == 0 ? lag : 0)) * STRIDE];
			const bf16 *weights = which == 0 ? m.x1 : m.x2;

			for (int s = c.token; s < mine; s++)
				sum += value_at(weights, mine, s) * m.factors[BETA + s] *
				       value_at(m.k, s, channel) *
				       exp2_fast(now - g[(s + 1) * STRIDE]);
		} else {
			const float now = g[(mine + 1) * STRIDE];

			for (int t = mine + 1; t < c.token + SUB; t++) {
				sum += value_at(m.x1, t, mine) * value_at(m.q, t, channel) *
				       exp2_fast(g[(t + 1 - lag) * STRIDE] - now);
				if (lag == 0)
					sum += value_at(m.x2, t, mine) * value_at(m.k, t, channel) *
					       exp2_fast(g[(t + 1) * STRIDE] - now);
			}
		}
		m.flow[mine * STRIDE + channel] = sum;
	}
	__syncwarp();
}

/* Adds this warp's part of m.flow. */
static __device__ __forceinline__ void add_flow(float (&d)[TILES][4],
                                                const struct gradient_memory &m, struct corner c)
{

#pragma unroll
	for (int i = 0; i < TILES * 4; i++)
		d[i / 4][i % 4] +=
		        m.flow[token_of(c, i % 4) * STRIDE + channel_of(c, i / 4, i % 4)];
	__syncwarp();
}

/* Where decays differ by channel: dq, r and u without the tokens' own parts, and the sums
 * m.written. */
template <bool DELTA>
static __device__ __forceinline__ void finish_decayed(struct gradients &d,
                                                      struct gradient_memory &m, float scale)
{
	constexpr int LAG = DELTA ? 0 : 1;
	const struct corner c = corner_of();
	const int lane = c.lane;
	const float *start = m.g + c.token * STRIDE, *end = start + SUB * STRIDE;
	const bool mild = decays_mildly(start + c.channel);

#pragma unroll
	for (int i = 0; i < TILES * 2; i++) {
		const int n = i / 2, channel = channel_of(c, n, i % 2);
		const float from = exp2_fast(start[channel]);
		const float to = exp2_fast(m.g[CHUNK * STRIDE + channel] - end[channel]);
		float sum = 0.0f;

#pragma unroll
		for (int e = i % 2; e < 4; e += 2) {
			const int t = token_of(c, e);

			d.q[n][e] *= scale * from;
			d.r[n][e] *= -from;
			d.u[n][e] *= to;
			const uint32_t ks =
			        own_pair<SLAB>(m.k, c.token + e / 2 * 8, c.channel, 8 * n);
			const float k = i % 2 ? high_half(ks) : low_half(ks);

			sum += m.factors[BETA + t] * k *
			       exp2_fast(end[channel] - m.g[(t + 1) * STRIDE + channel]) *
			       d.u[n][e];
		}
#pragma unroll
		for (int offset = 4; offset < WARP; offset *= 2)
			sum += __shfl_xor_sync(0xffffffffu, sum, offset);
		if (lane < 4)
			m.written[c.token / SUB][channel] = sum;
	}
	add_decayed_tokens<DELTA>(d, m, mild, c);
#pragma unroll
	for (int i = 0; i < TILES * 4; i++) {
		const int n = i / 4, e = i % 4, channel = channel_of(c, n, e);
		const float *now = m.g + (token_of(c, e) + 1) * STRIDE + channel;
		const float power = exp2_fast(now[-LAG * STRIDE] - start[channel]);

		d.q[n][e] *= power;
		d.r[n][e] *= power;
		d.u[n][e] *= exp2_fast(end[channel] - now[0]);
	}
	if (mild)
		return;
	add_pairs(m, 0, LAG);
	add_flow(d.q, m, c);
	if (DELTA) {
		add_pairs(m, 1, LAG);
		add_flow(d.r, m, c);
	}
	add_pairs(m, 2, LAG);
	add_flow(d.u, m, c);
}

/* Where they do not, the same; written[]: of this lane's two tokens what they add to the state. */
static __device__ __forceinline__ void
finish_undecayed(struct gradients &d, struct gradient_memory &m, float scale, float (&written)[2])
{
	const struct corner c = corner_of();

#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);
		const float from = m.factors[FROM_START + t], to = m.factors[TO_END + t];

#pragma unroll
		for (int n = 0; n < TILES; n++) {
			const uint32_t ks =
			        own_pair<SLAB>(m.k, c.token + 8 * half, c.channel, 8 * n);

#pragma unroll
			for (int e = 2 * half; e < 2 * half + 2; e++) {
				d.q[n][e] *= scale * from;
				d.r[n][e] *= -from;
				d.u[n][e] *= to;
			}
			written[half] += low_half(ks) * d.u[n][2 * half] +
			                 high_half(ks) * d.u[n][2 * half + 1];
		}
	}
	add_tokens(d, m, c);
}

/*
 * Log decay of a token that leaves less of the state than its rounding. Nothing flows through such
 * a token; sums that go on before it from what those after it add up to would keep their rounding.
 */
constexpr float FORGOTTEN = -16.0f;

/* A NaN is not forgotten. */
static __device__ __forceinline__ float flow_through(float flow, bool forgotten)
{
	return forgotten && !isnan(flow) ? 0.0f : flow;
}

/* dlog_decay of a slab's channels, from m.flow; dbonus. Synchronizes. */
template <bool DELTA>
static __device__ __forceinline__ void
store_decays(struct gradient_memory &m, const struct problem &p, const struct place &x, int slab)
{
	constexpr int PARTS = GRADIENT_THREADS / SLAB, ROWS = CHUNK / PARTS;
	const struct matrix_recurrence_args &f = p.a.forward;
	const int column = threadIdx.x % SLAB, part = threadIdx.x / SLAB, first = part * ROWS;
	const int64_t channel = slab * SLAB + column;
	float *mine = m.flow + first * STRIDE + column, sum = 0.0f, bonus = 0.0f;
	int last_forgotten = -1; /* the last of my rows that is */
	bool forgotten[ROWS];

#pragma unroll
	for (int t = 0; t < ROWS; t++) {
		forgotten[t] = first + t < x.tokens && channel < f.d_k &&
		               __bfloat162float(at(f.log_decay, x.b, x.first + first + t,
		                                   x.h)[channel]) < FORGOTTEN;
		last_forgotten = forgotten[t] ? t : last_forgotten;
	}
	__syncthreads();
#pragma unroll
	for (int t = ROWS - 1; t >= 0; t--) {
		sum = flow_through(sum + mine[t * STRIDE], forgotten[t]);
		mine[t * STRIDE] = sum;
	}
	m.totals[threadIdx.x] = sum;
	m.forgets[threadIdx.x] = last_forgotten >= 0;
	for (int t = first; !DELTA && t < first + ROWS; t++)
		bonus += m.own[t] * value_at(m.q, t, column) * value_at(m.k, t, column);
	m.bonuses[threadIdx.x] = bonus;
	__syncthreads();
	float end = exp2_fast(m.g[CHUNK * STRIDE + column]) * m.ends[column];

#pragma unroll
	for (int i = 0; i < CHUNK / SUB; i++)
		end += m.written[i][column];
	for (int i = PARTS - 1; i > part; i--)
		end = flow_through(end, m.forgets[i * SLAB + column]) + m.totals[i * SLAB + column];
#pragma unroll
	for (int t = 0; t < ROWS; t++)
		mine[t * STRIDE] += flow_through(end, t <= last_forgotten);
	/* Nothing decays, where rounding would leave something. */
	if (part == 0)
		mine[0] = flow_through(mine[0], x.first == 0 && !f.h0);
	if (!DELTA && part == 0 && slab * SLAB + column < f.d_k) {
		bonus = 0.0f;
		for (int i = 0; i < PARTS; i++)
			bonus += m.bonuses[i * SLAB + column];
		p.dbonus[((x.b * p.chunks + x.chunk) * f.n_heads + x.h) * f.d_k + slab * SLAB +
		         column] = bonus;
	}
	__syncthreads();
	for (int i = threadIdx.x; i < CHUNK * SLAB / 8; i += GRADIENT_THREADS) {
		const int t = i / (SLAB / 8), at_column = i % (SLAB / 8) * 8;
		const int64_t channel = slab * SLAB + at_column;
		float y[8];

		if (t >= x.tokens || channel >= f.d_k)
			continue;
		load8f(y, m.flow + t * STRIDE + at_column);
		store8(at(p.a.dlog_decay, x.b, x.first + t, x.h) + channel, y);
	}
}

/* dq and dk of a slab; the tokens' parts of dbeta and of the decays' gradients. */
template <bool DIAGONAL, bool DELTA>
static __device__ __forceinline__ void store_keys(struct gradients &d, struct gradient_memory &m,
                                                  const struct problem &p, const struct place &x,
                                                  int slab, float (&dbeta)[2], float (&flow)[2])
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct corner c = corner_of();
	const int64_t first = slab * SLAB + c.channel, width = f.d_k - first;

#pragma unroll
	for (int i = 0; i < TILES * 2; i++) {
		const int n = i / 2, half = i % 2, t = token_of(c, 2 * half);
		const int channel = channel_of(c, n, 0), row = c.token + 8 * half;
		const float beta = m.factors[BETA + t];
		const uint32_t qs = own_pair<SLAB>(m.q, row, c.channel, 8 * n);
		const uint32_t ks = own_pair<SLAB>(m.k, row, c.channel, 8 * n);

#pragma unroll
		for (int j = 0; j < 2; j++) {
			const int e = 2 * half + j;
			const float q = j ? high_half(qs) : low_half(qs);
			const float k = j ? high_half(ks) : low_half(ks);
			const float own = DELTA ? m.own[t] : m.own[t] * m.bonus[channel + j];
			const float of_query = q * d.q[n][e];
			const float of_key = k * d.r[n][e] - beta * k * d.u[n][e];

			if (!DIAGONAL)
				flow[half] += of_query + of_key;
			else
				m.flow[t * STRIDE + channel + j] =
				        DELTA ? of_query + of_key : of_key;
			d.q[n][e] += beta * own * k;
			d.u[n][e] += own * q;
			if (DELTA) {
				dbeta[half] += k * d.u[n][e];
				d.u[n][e] = d.r[n][e] + beta * d.u[n][e];
			} else {
				d.r[n][e] = of_query; /* it is the token before that decays it */
			}
		}
	}
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);
		const bool valid = t < x.tokens && width > 0;

		store_row(valid ? at(p.a.dq, x.b, x.first + t, x.h) + first : NULL, d.q, half,
		          width);
		store_row(valid ? at(p.a.dk, x.b, x.first + t, x.h) + first : NULL, d.u, half,
		          width);
	}
	if (DELTA)
		return;
	__syncthreads();
#pragma unroll
	for (int i = 0; i < TILES * 4; i++) {
		const int t = token_of(c, i % 4);

		if (t > 0)
			m.flow[(t - 1) * STRIDE + channel_of(c, i / 4, i % 4)] += d.r[i / 4][i % 4];
	}
}

/* dbeta, and dlog_decay where it is a scalar. `written` sums over all tokens and channels. */
static __device__ __forceinline__ void store_scalars(struct gradient_memory &m,
                                                     const struct problem &p, const struct place &x,
                                                     float (&dbeta)[2], float (&flow)[2],
                                                     float written)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct corner c = corner_of();
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

	written = group_sum(written, WARP);
	if (lane == 0)
		m.sums[warp] = written;
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);

		dbeta[half] = group_sum(dbeta[half], 4);
		flow[half] = group_sum(flow[half], 4);
		if (lane % 4 == 0 && c.channel > 0) {
			m.rows[0][t] = dbeta[half];
			m.rows[1][t] = flow[half];
		}
	}
	__syncthreads();
#pragma unroll
	for (int half = 0; half < 2; half++) {
		const int t = token_of(c, 2 * half);

		if (lane % 4 != 0 || c.channel > 0)
			continue;
		if (t < x.tokens)
			*at(p.a.dbeta, x.b, x.first + t, x.h) =
			        __float2bfloat16(dbeta[half] + m.rows[0][t]);
		m.scalars[t] = flow[half] + m.rows[1][t];
	}
	if (f.decay != DECAY_SCALAR)
		return;
	if ((int)threadIdx.x < CHUNK)
		m.totals[threadIdx.x] = (int)threadIdx.x < x.tokens
		                                ? __bfloat162float(*at(f.log_decay, x.b,
		                                                       x.first + threadIdx.x, x.h))
		                                : 0.0f;
	__syncthreads();
	if ((int)threadIdx.x >= x.tokens)
		return;
	float sum = 0.0f;

	for (int i = 0; i < GRADIENT_THREADS / WARP; i++)
		sum += m.sums[i];
#pragma unroll
	for (int t = CHUNK - 1; t >= 0; t--) {
		const float more = m.scalars[t];

		if (t >= (int)threadIdx.x)
			sum = flow_through(sum + more, m.totals[t] < FORGOTTEN);
	}
	/* Nothing decays, where rounding would leave something. */
	sum = flow_through(sum, x.first + threadIdx.x == 0 && !f.h0);
	*at(p.a.dlog_decay, x.b, x.first + threadIdx.x, x.h) = __float2bfloat16(sum);
}

template <bool DIAGONAL, bool DELTA>
static __global__ void __launch_bounds__(GRADIENT_THREADS, 2)
        gradient_kernel(const __grid_constant__ struct problem p)
{
	const struct matrix_recurrence_args &f = p.a.forward;
	const struct place x = place_of(p, blockIdx.x / p.chunks, blockIdx.x % p.chunks);
	auto &m = *reinterpret_cast<struct gradient_memory *>(shared_memory);
	float dbeta[2] = {}, flow[2] = {}, written[2] = {}, ends = 0.0f;
	struct cursor<DELTA> next(p, x);
	struct gradients d;
	int slot = 0;

#pragma unroll 1
	for (int slab = 0; slab < p.keys / SLAB; slab++) {
		if (slab == 0)
			multiply_states<DIAGONAL, DELTA, true>(d, m, p, x, slab, next, slot);
		else
			multiply_states<DIAGONAL, DELTA, false>(d, m, p, x, slab, next, slot);
		if (!DELTA && threadIdx.x < SLAB)
			m.bonus[threadIdx.x] =
			        slab * SLAB + threadIdx.x < f.d_k
			                ? f.bonus[x.h * f.d_k + slab * SLAB + threadIdx.x]
			                : 0.0f;
		if (DIAGONAL) {
			sum_diagonal<GRADIENT_THREADS>(m.g, m.totals, p, x, slab);
			finish_decayed<DELTA>(d, m, f.scale);
		} else {
			finish_undecayed(d, m, f.scale, written);
			ends += threadIdx.x < SLAB ? m.ends[threadIdx.x] : 0.0f;
		}
		store_keys<DIAGONAL, DELTA>(d, m, p, x, slab, dbeta, flow);
		if (DIAGONAL)
			store_decays<DELTA>(m, p, x, slab);
		/* q, k and, where decays took their place, the stages are free again. */
		__syncthreads();
	}
	if (!DELTA)
		return;
	copy_wait<0>();
	const struct corner c = corner_of();
	if (!DIAGONAL)
		ends *= m.factors[FROM_START + CHUNK - 1];
	store_scalars(m, p, x, dbeta, flow,
	              ends + m.factors[BETA + token_of(c, 0)] * written[0] +
	                      m.factors[BETA + token_of(c, 2)] * written[1]);
}

} // namespace

#endif
