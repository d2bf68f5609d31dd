/*
 * Gradients of Mamba's selective scan, N = 16 (the equations are in kernels/kernels.h). A block
 * takes 64 channels of a sequence or a segment of it backwards, chunk by chunk; four warps share 32
 * channels, each having four numbers of their states. Of a chunk all that is read comes to shared
 * memory once. From the border before it the states before every eighth token are computed and kept
 * in shared memory; from these, eight tokens at a time, states and decays in registers, and lambda
 * runs back through them. Sums over the numbers of a state go through shared memory, in their
 * order; dB and dC over 32 channels by exchanges of lanes, over two warps in shared memory, and
 * over blocks by a second kernel, from a share for each. Gradients of rates and skips leave a row
 * of shares for each segment. No order depends on timing.
 *
 * Segments are cut as in the forward pass: a pass from zero leaves a segment's lambda and its sum
 * of dt, a short kernel carries lambda across.
 *
 * Limit: 32 exponentials a token and channel, and what the shares of dB and dC move: 4 bytes
 * beside 15. Not timed yet.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/selective_scan.cuh"

namespace
{

constexpr int THREADS = 256, BLOCKS_PER_SM = 2, CHANNELS = 64, PARTS = 4, OWN = SCAN_STATE / PARTS;
constexpr int TOKENS = 8, PIECES = SCAN_CHUNK / TOKENS, CHOSEN = 2 * SCAN_STATE;
constexpr int ROWS_APART = THREADS / CHANNELS; /* of a piece, that one thread finishes */

/* Tensors of a chunk; sums over a state. */
enum { U, DT, DOUT, Z, TENSORS };
enum { LAMBDA_B, KEPT, Y, SUMS };

struct chunk_memory {
	bf16 data[TENSORS][SCAN_CHUNK][CHANNELS];
	float chosen[SCAN_CHUNK][CHOSEN];                      /* B and C */
	float states[PIECES - 1][SCAN_STATE][CHANNELS];        /* before pieces 1, 2, ... */
	float sums[SUMS][PARTS][TOKENS][CHANNELS];             /* of a piece */
	float dy[2][TOKENS][CHANNELS];                         /* of a piece and the next */
	float dchosen[THREADS / WARP / PARTS][TOKENS][CHOSEN]; /* of 32 channels */
};

struct work {
	struct scan_segments segments;
	float *chosen; /* [slabs, B * T, CHOSEN]: shares of dB and dC */
	float *rates;  /* [count * B, channels, N] */
	float *skips;  /* [count * B, channels] */
};

struct place {
	int64_t b, segment, slab, base, start, end;
	int local, part; /* the thread's channel in the block, and which states of it */
};

static __device__ __forceinline__ struct place find_place(const struct selective_scan_args &a,
                                                          const struct scan_segments &s,
                                                          int64_t first_segment, int channels)
{
	const int64_t slabs = (a.channels + channels - 1) / channels;
	const int64_t row = blockIdx.x / slabs;
	const int warp = (int)threadIdx.x / WARP;
	struct place p;

	p.slab = blockIdx.x % slabs;
	p.base = p.slab * channels;
	p.b = row % a.batch;
	p.segment = row / a.batch + first_segment;
	p.start = p.segment * s.length;
	p.end = min(p.start + s.length, a.seq_len);
	p.local = warp / PARTS * WARP + (int)threadIdx.x % WARP;
	p.part = warp % PARTS;
	return p;
}

static __device__ __forceinline__ float element(const bf16 *from)
{
	return __bfloat162float(*from);
}

/* What is read of the chunk from token t on; zeros after the sequence and beyond the channels. */
static __device__ __forceinline__ void load_chunk(struct chunk_memory &m,
                                                  const struct selective_scan_backward_args &x,
                                                  const struct place &p, int64_t t)
{
	constexpr int ROW = CHANNELS / 8, COPIES = SCAN_CHUNK * ROW / THREADS;
	const struct selective_scan_args &a = x.forward;
	const int column = (int)threadIdx.x % ROW * 8;

#pragma unroll
	for (int tensor = 0; tensor < TENSORS; tensor++) {
		const struct view &v = tensor == U      ? a.u
		                       : tensor == DT   ? a.dt
		                       : tensor == DOUT ? x.dout
		                                        : a.z;

		if (tensor == Z && !a.z.data)
			break;
#pragma unroll
		for (int i = 0; i < COPIES; i++) {
			const int row = (i * THREADS + (int)threadIdx.x) / ROW;
			const bool valid = t + row < p.end && p.base + column < a.channels;

			copy16_async(&m.data[tensor][row][column],
			             valid ? at(v, p.b, t + row, 0) + p.base + column
			                   : at(v, 0, 0, 0),
			             valid);
		}
	}
	copy_commit();
#pragma unroll
	for (int i = 0; i < SCAN_CHUNK * SCAN_STATE / THREADS; i++) {
		const int index = i * THREADS + (int)threadIdx.x;
		const int row = index / SCAN_STATE, pair = index % SCAN_STATE;
		const int64_t token = min(t + row, p.end - 1);
		const bf16 *from = pair < SCAN_STATE / 2 ? at(a.b, p.b, token, 0)
		                                         : at(a.c, p.b, token, 0) - SCAN_STATE;
		const uint32_t two =
		        t + row < p.end ? *reinterpret_cast<const uint32_t *>(from + 2 * pair) : 0;

		*reinterpret_cast<float2 *>(&m.chosen[row][2 * pair]) =
		        make_float2(low_half(two), high_half(two));
	}
	copy_wait<0>();
}

/* Four of a token's B or, from SCAN_STATE on, C. */
static __device__ __forceinline__ void load_four(float (&to)[OWN], const float *from)
{
	const float4 four = *reinterpret_cast<const float4 *>(from);

	to[0] = four.x;
	to[1] = four.y;
	to[2] = four.z;
	to[3] = four.w;
}

/* Token `row` of the chunk: h moves on by it; decay is by what it is multiplied. */
static __device__ __forceinline__ void advance(float (&h)[OWN], float (&decay)[OWN],
                                               const float (&rate)[OWN],
                                               const struct chunk_memory &m, const struct place &p,
                                               int row)
{
	const float dt = element(&m.data[DT][row][p.local]);
	const float in = dt * element(&m.data[U][row][p.local]);
	float b[OWN];

	load_four(b, &m.chosen[row][OWN * p.part]);
#pragma unroll
	for (int n = 0; n < OWN; n++) {
		decay[n] = exp2_fast(rate[n] * dt);
		h[n] = fmaf(decay[n], h[n], in * b[n]);
	}
}

/* The states before all pieces of the chunk from token t on; the first remains in `border`. */
static __device__ __forceinline__ void keep_states(struct chunk_memory &m,
                                                   const float (&border)[OWN],
                                                   const float (&rate)[OWN], const struct place &p,
                                                   int pieces)
{
	float h[OWN], decay[OWN];

#pragma unroll
	for (int n = 0; n < OWN; n++)
		h[n] = border[n];
	for (int piece = 1; piece < pieces; piece++) {
#pragma unroll
		for (int row = 0; row < TOKENS; row++)
			advance(h, decay, rate, m, p, (piece - 1) * TOKENS + row);
#pragma unroll
		for (int n = 0; n < OWN; n++)
			m.states[piece - 1][OWN * p.part + n][p.local] = h[n];
	}
}

/* dy = dout silu(z) of a piece; each thread has every ROWS_APART-th token of a channel. */
static __device__ __forceinline__ void gate_gradients(struct chunk_memory &m, bool gated, int turn,
                                                      int first)
{
	const int channel = (int)threadIdx.x % CHANNELS;

#pragma unroll
	for (int row = (int)threadIdx.x / CHANNELS; row < TOKENS; row += ROWS_APART) {
		float dy = element(&m.data[DOUT][first + row][channel]);

		if (gated)
			dy *= scan_silu(element(&m.data[Z][first + row][channel]));
		m.dy[turn][row][channel] = dy;
	}
}

/* What a thread carries backwards, and sums over tokens. */
struct carried {
	float lambda[OWN]; /* times the decay of the token after */
	float rates[OWN];  /* of a chunk */
};

/* One token of a piece; adds what it has of dB and dC to `chosen`. */
static __device__ __forceinline__ void
reverse_token(struct chunk_memory &m, struct carried &c, const float (&before)[OWN],
              const float (&after)[OWN], const float (&decay)[OWN], const float (&rate)[OWN],
              const struct place &p, int turn, int first, int row, float *chosen)
{
	const float dy = m.dy[turn][row][p.local];
	const float dt = element(&m.data[DT][first + row][p.local]);
	const float in = dt * element(&m.data[U][first + row][p.local]);
	float b[OWN], to_y[OWN], lambda_b = 0.0f, kept = 0.0f, y = 0.0f;

	load_four(b, &m.chosen[first + row][OWN * p.part]);
	load_four(to_y, &m.chosen[first + row][SCAN_STATE + OWN * p.part]);
#pragma unroll
	for (int n = 0; n < OWN; n++) {
		const float lambda = fmaf(to_y[n], dy, c.lambda[n]);

		c.lambda[n] = decay[n] * lambda;
		const float through = c.lambda[n] * before[n];
		kept = fmaf(rate[n], through, kept);
		c.rates[n] = fmaf(dt, through, c.rates[n]);
		lambda_b = fmaf(lambda, b[n], lambda_b);
		y = fmaf(to_y[n], after[n], y);
		chosen[n] = lambda * in;
		chosen[OWN + n] = dy * after[n];
	}
	m.sums[LAMBDA_B][p.part][row][p.local] = lambda_b;
	m.sums[KEPT][p.part][row][p.local] = kept * LN2;
	m.sums[Y][p.part][row][p.local] = y;
}

/* scatter_sum(), unrolled for certain. */
template <int HALF = WARP / 4>
static __device__ __forceinline__ float sum_lanes(float (&x)[WARP / 2], int lane)
{
	if constexpr (HALF == 0) {
		return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
	} else {
		const bool upper = lane & (2 * HALF);

#pragma unroll
		for (int i = 0; i < HALF; i++) {
			const float low = x[i], high = x[i + HALF];

			x[i] = (upper ? high : low) +
			       __shfl_xor_sync(0xffffffffu, upper ? low : high, 2 * HALF);
		}
		return sum_lanes<HALF / 2>(x, lane);
	}
}

/* Two tokens of a piece, the later first; before, decay: of the piece. */
static __device__ __forceinline__ void reverse_pair(struct chunk_memory &m, struct carried &c,
                                                    const float (&before)[TOKENS + 1][OWN],
                                                    const float (&decay)[TOKENS][OWN],
                                                    const float (&rate)[OWN], const struct place &p,
                                                    int turn, int first, int row, int n_tokens)
{
	float chosen[WARP / 2]; /* dB and dC of the earlier token, then of the later */

#pragma unroll
	for (int i = 0; i < WARP / 2; i++)
		chosen[i] = 0.0f;
	if (first + row + 1 < n_tokens)
		reverse_token(m, c, before[row + 1], before[row + 2], decay[row + 1], rate, p, turn,
		              first, row + 1, chosen + 2 * OWN);
	if (first + row < n_tokens)
		reverse_token(m, c, before[row], before[row + 1], decay[row], rate, p, turn, first,
		              row, chosen);
	const int lane = (int)threadIdx.x % WARP, index = lane / 2, i = index % (2 * OWN);
	const float sum = sum_lanes(chosen, lane);

	if (lane % 2 == 0)
		m.dchosen[p.local / WARP][row + index / (2 * OWN)]
		         [i / OWN * SCAN_STATE + OWN * p.part + i % OWN] = sum;
}

/* The piece from token `first` of the chunk on, from the states `h` before it. */
static __device__ __forceinline__ void
reverse_piece(struct chunk_memory &m, struct carried &c, const float (&h)[OWN],
              const float (&rate)[OWN], const struct place &p, int turn, int first, int n_tokens)
{
	float before[TOKENS + 1][OWN], decay[TOKENS][OWN];

#pragma unroll
	for (int n = 0; n < OWN; n++)
		before[0][n] = h[n];
#pragma unroll
	for (int row = 0; row < TOKENS; row++) {
#pragma unroll
		for (int n = 0; n < OWN; n++)
			before[row + 1][n] = before[row][n];
		advance(before[row + 1], decay[row], rate, m, p, first + row);
	}
	/* dy is there. */
	__syncthreads();
#pragma unroll
	for (int row = TOKENS - 2; row >= 0; row -= 2)
		reverse_pair(m, c, before, decay, rate, p, turn, first, row, n_tokens);
}

/* Gradients of a piece, whose first token is t, from the sums; returns the thread's part of dskip.
 */
static __device__ __forceinline__ float finish_piece(const struct chunk_memory &m,
                                                     const struct selective_scan_backward_args &x,
                                                     const struct work &w, const struct place &p,
                                                     int turn, int first, int64_t t)
{
	const struct selective_scan_args &a = x.forward;
	const int local = (int)threadIdx.x % CHANNELS;
	const int64_t channel = p.base + local;
	const float skip = a.skip && channel < a.channels ? a.skip[channel] : 0.0f;
	float dskip = 0.0f;

#pragma unroll
	for (int row = (int)threadIdx.x / CHANNELS; row < TOKENS; row += ROWS_APART) {
		float sum[SUMS] = {};

		if (t + row >= p.end || channel >= a.channels)
			break;
#pragma unroll
		for (int i = 0; i < SUMS; i++)
#pragma unroll
			for (int part = 0; part < PARTS; part++)
				sum[i] += m.sums[i][part][row][local];
		const float u = element(&m.data[U][first + row][local]);
		const float dt = element(&m.data[DT][first + row][local]);
		const float dy = m.dy[turn][row][local];
		at(x.du, p.b, t + row, 0)[channel] =
		        __float2bfloat16(fmaf(skip, dy, dt * sum[LAMBDA_B]));
		at(x.ddt, p.b, t + row, 0)[channel] =
		        __float2bfloat16(fmaf(u, sum[LAMBDA_B], sum[KEPT]));
		dskip = fmaf(dy, u, dskip);
		if (!a.z.data)
			continue;
		const float z = element(&m.data[Z][first + row][local]), g = sigmoid(z);
		const float dout = element(&m.data[DOUT][first + row][local]);
		at(x.dz, p.b, t + row, 0)[channel] = __float2bfloat16(dout * fmaf(skip, u, sum[Y]) *
		                                                      g * fmaf(z, 1.0f - g, 1.0f));
	}
	const int row = (int)threadIdx.x / CHOSEN, i = (int)threadIdx.x % CHOSEN;
	if (t + row < p.end)
		w.chosen[((p.slab * a.batch + p.b) * a.seq_len + t + row) * CHOSEN + i] =
		        m.dchosen[0][row][i] + m.dchosen[1][row][i];
	return dskip;
}

static_assert(TOKENS * CHOSEN == THREADS, "a thread has one share of dB or dC of a piece");

/* Sums that a block has at its end: of rates and, by four threads a channel, of skips. */
static __device__ __forceinline__ void store_shares(struct chunk_memory &m,
                                                    const struct selective_scan_args &a,
                                                    const struct work &w, const struct place &p,
                                                    const float (&rates)[OWN],
                                                    const float (&rate)[OWN], float dskip)
{
	const int64_t row = p.segment * a.batch + p.b, channel = p.base + p.local;
	const int64_t own = p.base + threadIdx.x;
	float *const parts = &m.sums[0][0][0][0];

	if (channel < a.channels) {
#pragma unroll
		for (int n = 0; n < OWN; n++)
			w.rates[(row * a.channels + channel) * SCAN_STATE + OWN * p.part + n] =
			        rate[n] * LN2 * rates[n];
	}
	__syncthreads();
	parts[threadIdx.x] = dskip;
	__syncthreads();
	if (!a.skip || threadIdx.x >= CHANNELS || own >= a.channels)
		return;
	float sum = 0.0f;
#pragma unroll
	for (int i = 0; i < ROWS_APART; i++)
		sum += parts[i * CHANNELS + threadIdx.x];
	w.skips[row * a.channels + own] = sum;
}

static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        backward_kernel(const __grid_constant__ struct selective_scan_backward_args x,
                        const __grid_constant__ struct work w)
{
	const struct selective_scan_args &a = x.forward;
	struct chunk_memory &m = *reinterpret_cast<struct chunk_memory *>(shared_memory);
	const struct place p = find_place(a, w.segments, 0, CHANNELS);
	const int64_t channel = p.base + p.local;
	const bool has_channel = channel < a.channels;
	float rate[OWN] = {}, rates[OWN] = {}, dskip = 0.0f;
	struct carried c = {};
	int turn = 0;

	if (has_channel) {
#pragma unroll
		for (int n = 0; n < OWN; n++) {
			const int64_t row = p.segment * a.batch + p.b;

			rate[n] = scan_rate(a, channel, OWN * p.part + n);
			if (w.segments.count > 1)
				c.lambda[n] = w.segments.ends[scan_index(a, row, OWN * p.part + n,
				                                         channel)];
		}
	}
	for (int64_t t = p.start + (p.end - p.start - 1) / SCAN_CHUNK * SCAN_CHUNK; t >= p.start;
	     t -= SCAN_CHUNK) {
		const int n_tokens = (int)min(p.end - t, (int64_t)SCAN_CHUNK);
		const int pieces = (n_tokens + TOKENS - 1) / TOKENS;
		float border[OWN] = {}, of_skips = 0.0f;

		__syncthreads();
		load_chunk(m, x, p, t);
		if (has_channel) {
#pragma unroll
			for (int n = 0; n < OWN; n++)
				border[n] = *scan_border(a, p.b, t, OWN * p.part + n, channel);
		}
		__syncthreads();
		keep_states(m, border, rate, p, pieces);
		for (int piece = pieces - 1; piece >= 0; piece--) {
			const int first = piece * TOKENS;
			float h[OWN];

			gate_gradients(m, a.z.data, turn, first);
#pragma unroll
			for (int n = 0; n < OWN; n++)
				h[n] = piece > 0 ? m.states[piece - 1][OWN * p.part + n][p.local]
				                 : border[n];
			reverse_piece(m, c, h, rate, p, turn, first, n_tokens);
			__syncthreads();
			of_skips += finish_piece(m, x, w, p, turn, first, t + first);
			turn ^= 1;
		}
		dskip += of_skips;
#pragma unroll
		for (int n = 0; n < OWN; n++) {
			rates[n] += c.rates[n];
			c.rates[n] = 0.0f;
		}
	}
	store_shares(m, a, w, p, rates, rate, dskip);
	if (x.dh0 && p.segment == 0 && has_channel) {
#pragma unroll
		for (int n = 0; n < OWN; n++)
			x.dh0[scan_index(a, p.b, OWN * p.part + n, channel)] = c.lambda[n];
	}
}

/* lambda of a segment, times the decay of its first token, when nothing comes after it; a warp has
 * 32 channels. */
static __global__ void __launch_bounds__(THREADS)
        local_kernel(const __grid_constant__ struct selective_scan_backward_args x,
                     const __grid_constant__ struct work w)
{
	const struct selective_scan_args &a = x.forward;
	const struct place p = find_place(a, w.segments, 1, CHANNELS);
	const int64_t channel = p.base + p.local, row = p.segment * a.batch + p.b;
	float rate[OWN], lambda[OWN] = {}, steps = 0.0f;

	if (channel >= a.channels)
		return;
#pragma unroll
	for (int n = 0; n < OWN; n++)
		rate[n] = scan_rate(a, channel, OWN * p.part + n);
#pragma unroll 4
	for (int64_t t = p.end - 1; t >= p.start; t--) {
		const float dt = element(at(a.dt, p.b, t, 0) + channel);
		const uint2 four =
		        *reinterpret_cast<const uint2 *>(at(a.c, p.b, t, 0) + OWN * p.part);
		const float to_y[OWN] = {low_half(four.x), high_half(four.x), low_half(four.y),
		                         high_half(four.y)};
		float dy = element(at(x.dout, p.b, t, 0) + channel);

		if (a.z.data)
			dy *= scan_silu(element(at(a.z, p.b, t, 0) + channel));
		steps += dt;
#pragma unroll
		for (int n = 0; n < OWN; n++)
			lambda[n] = exp2_fast(rate[n] * dt) * fmaf(to_y[n], dy, lambda[n]);
	}
#pragma unroll
	for (int n = 0; n < OWN; n++)
		w.segments.ends[scan_index(a, row, OWN * p.part + n, channel)] = lambda[n];
	if (p.part == 0)
		w.segments.steps[row * a.channels + channel] = steps;
}

/* What comes from after each segment takes the place of what the segment makes of nothing. */
static __global__ void __launch_bounds__(THREADS)
        carry_kernel(const __grid_constant__ struct selective_scan_args a,
                     const __grid_constant__ struct scan_segments s)
{
	const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t width = a.batch * SCAN_STATE * a.channels;
	const int64_t channel = i % a.channels, b = i / (SCAN_STATE * a.channels);
	float lambda = 0.0f;

	if (i >= width)
		return;
	const float rate = scan_rate(a, channel, (int)(i / a.channels % SCAN_STATE));
#pragma unroll 4
	for (int64_t segment = s.count - 1; segment >= 0; segment--) {
		float *const end = s.ends + segment * width + i;
		const float made = segment > 0 ? *end : 0.0f;
		const float steps =
		        segment > 0 ? s.steps[(segment * a.batch + b) * a.channels + channel]
		                    : 0.0f;

		*end = lambda;
		lambda = fmaf(exp2_fast(rate * steps), lambda, made);
	}
}

/* dB and dC of a token: a thread adds the shares of one of their numbers up. */
static __global__ void __launch_bounds__(THREADS)
        chosen_kernel(const __grid_constant__ struct selective_scan_backward_args x,
                      const float *shares, int64_t slabs)
{
	const struct selective_scan_args &a = x.forward;
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t n = index / CHOSEN, tokens = a.batch * a.seq_len;
	const int i = (int)(index % CHOSEN);
	const struct view &v = i < SCAN_STATE ? x.db : x.dc;
	float sum = 0.0f;

	if (n >= tokens)
		return;
#pragma unroll 4
	for (int64_t slab = 0; slab < slabs; slab++)
		sum += shares[slab * tokens * CHOSEN + index];
	at(v, n / a.seq_len, n % a.seq_len, 0)[i % SCAN_STATE] = __float2bfloat16(sum);
}

static int64_t count_slabs(const struct selective_scan_args *f)
{
	return divide_up(f->channels, CHANNELS);
}

static struct scan_segments segments_of(const struct device *device,
                                        const struct selective_scan_args *f, void *workspace)
{
	return cut_scan(device, f, f->batch * count_slabs(f), BLOCKS_PER_SM, 2, workspace);
}

static struct work work_of(const struct selective_scan_args *f, const struct scan_segments *s)
{
	struct work w = {};

	w.segments = *s;
	w.chosen = s->ends + scan_segment_bytes(f, s) / sizeof(float);
	w.rates = w.chosen + count_slabs(f) * f->batch * f->seq_len * CHOSEN;
	w.skips = w.rates + s->count * f->batch * f->channels * SCAN_STATE;
	return w;
}

static enum status run_segments(struct device *device, const struct selective_scan_backward_args *x,
                                const struct work &w)
{
	const struct selective_scan_args *f = &x->forward;
	const int64_t blocks = (w.segments.count - 1) * f->batch * count_slabs(f);
	const enum status status = launch(device, "selective_scan_backward", local_kernel,
	                                  dim3((unsigned)blocks), THREADS, 0, *x, w);

	if (status != STATUS_OK)
		return status;
	return launch_each(device, "selective_scan_backward", carry_kernel,
	                   f->batch * SCAN_STATE * f->channels, THREADS, *f, w.segments);
}

/* The shares of the blocks, added up. */
static enum status add_shares(struct device *device, const struct selective_scan_backward_args *x,
                              const struct work &w)
{
	const struct selective_scan_args *f = &x->forward;
	const int64_t rows = w.segments.count * f->batch, rates = f->channels * SCAN_STATE;
	enum status status =
	        launch_each(device, "selective_scan_backward", chosen_kernel,
	                    f->batch * f->seq_len * CHOSEN, THREADS, *x, w.chosen, count_slabs(f));

	if (status == STATUS_OK)
		status = column_sums(device, "selective_scan_backward", w.rates, rows, rates, rates,
		                     x->dlog_rate);
	if (status == STATUS_OK && f->skip)
		status = column_sums(device, "selective_scan_backward", w.skips, rows, f->channels,
		                     f->channels, x->dskip);
	return status;
}

} // namespace

extern "C" const char *portable_selective_scan_backward_unsupported(const struct device *device,
                                                                    const void *args)
{
	const auto *x = static_cast<const struct selective_scan_backward_args *>(args);
	const struct selective_scan_args *f = &x->forward;

	if (f->state != SCAN_STATE)
		return "a state must have 16 numbers";
	if (segments_of(device, f, NULL).count * f->batch * count_slabs(f) > INT32_MAX ||
	    divide_up(f->batch * f->seq_len * CHOSEN, THREADS) > INT32_MAX)
		return "too many tokens or channels";
	return either(check_widths(f->channels),
	              check_aligned(&f->u, &f->dt, &f->z, &f->b, &f->c, &x->dout));
}

extern "C" size_t portable_selective_scan_backward_workspace(const struct device *device,
                                                             const void *args)
{
	const auto *x = static_cast<const struct selective_scan_backward_args *>(args);
	const struct selective_scan_args *f = &x->forward;
	const struct scan_segments s = segments_of(device, f, NULL);
	const int64_t shares = count_slabs(f) * f->batch * f->seq_len * CHOSEN;
	const int64_t sums = s.count * f->batch * f->channels * (SCAN_STATE + 1);

	return scan_segment_bytes(f, &s) + (size_t)(shares + sums) * sizeof(float);
}

extern "C" enum status portable_selective_scan_backward(struct device *device, const void *args,
                                                        void *workspace)
{
	const auto *x = static_cast<const struct selective_scan_backward_args *>(args);
	const struct selective_scan_args *f = &x->forward;
	const struct scan_segments s = segments_of(device, f, workspace);
	const struct work w = work_of(f, &s);
	const int64_t blocks = s.count * f->batch * count_slabs(f);
	enum status status = s.count > 1 ? run_segments(device, x, w) : STATUS_OK;

	if (status == STATUS_OK)
		status =
		        launch(device, "selective_scan_backward", backward_kernel,
		               dim3((unsigned)blocks), THREADS, sizeof(struct chunk_memory), *x, w);
	return status == STATUS_OK ? add_shares(device, x, w) : status;
}
