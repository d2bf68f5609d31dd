/*
 * Mamba's selective scan, N = 16. A thread owns the states of a channel (PARTS 1) or, where
 * channels are few, four of them (PARTS 4: the warps of a block are the parts of the same 32
 * channels), in registers with their rates. Tiles of eight tokens of u, dt and z come to shared
 * memory by asynchronous copies; B and C of a tile, which all channels of a block read, are
 * unpacked to fp32 there. So everything is read once, and no lane waits for another. Parts of y are
 * added in their order after the next tile's barrier.
 *
 * Where even that leaves multiprocessors idle, time is cut into segments: a pass from zero leaves
 * each segment's state and its sum of dt (the decay of all its states), a short kernel carries
 * states across, and the pass proper starts from them. Its order does not depend on timing.
 *
 * Limit: 16 exponentials a token and channel; 18 operations of the special function units take 2.9
 * times as long as eight bytes of memory. Not timed yet.
 */
#include "kernels/portable/kernels.h"
#include "kernels/portable/selective_scan.cuh"

namespace
{

constexpr int THREADS = 128, WARPS = THREADS / WARP, TOKENS = 8;
constexpr int CHOSEN = 2 * SCAN_STATE; /* B and C of a token */

template <int PARTS> struct shape {
	static constexpr int CHANNELS = THREADS / PARTS, OWN = SCAN_STATE / PARTS;
	static constexpr int TILE = TOKENS * CHANNELS;
	/* One more where a tile's u and z are read after the next tile's barrier. */
	static constexpr int AHEAD = 2, STAGES = PARTS == 1 ? AHEAD + 1 : AHEAD + 2;
	static constexpr int COPIES = 3 * STAGES * TILE; /* bf16 */
	static constexpr int PARTIAL = PARTS == 1 ? 0 : PARTS * TILE;
	static constexpr size_t BYTES = COPIES * sizeof(bf16) +
	                                2 * TOKENS * CHOSEN * sizeof(float) +
	                                2 * PARTIAL * sizeof(float);
};

/* Where a thread is: its sequence, segment, and channel, of which it has states from `first` on. */
struct place {
	int64_t b, segment, base; /* base: the block's first channel */
	int64_t start, end;       /* tokens */
	int local, first;         /* local: its channel's number in the block */
};

template <int PARTS>
static __device__ __forceinline__ struct place find_place(const struct selective_scan_args &a,
                                                          const struct scan_segments &s)
{
	using S = shape<PARTS>;
	const int64_t slabs = (a.channels + S::CHANNELS - 1) / S::CHANNELS;
	const int64_t row = blockIdx.x / slabs;
	struct place p;

	p.base = blockIdx.x % slabs * S::CHANNELS;
	p.b = row % a.batch;
	p.segment = row / a.batch;
	p.start = p.segment * s.length;
	p.end = min(p.start + s.length, a.seq_len);
	p.local = PARTS == 1 ? (int)threadIdx.x : (int)threadIdx.x % WARP;
	p.first = PARTS == 1 ? 0 : (int)threadIdx.x / WARP * S::OWN;
	return p;
}

/* u, dt and, if there are `tensors` = 3, z of the tile from token t on; zeros after the segment and
 * beyond the channels. */
template <int PARTS>
static __device__ __forceinline__ void copy_tile(bf16 *to, const struct selective_scan_args &a,
                                                 const struct place &p, int64_t t, int tensors)
{
	using S = shape<PARTS>;
	constexpr int PIECES = S::TILE / 8, ROW = S::CHANNELS / 8;

#pragma unroll
	for (int i = 0; i < (3 * PIECES + THREADS - 1) / THREADS; i++) {
		const int piece = i * THREADS + (int)threadIdx.x, tensor = piece / PIECES;
		const int row = piece % PIECES / ROW, column = piece % ROW * 8;
		const struct view &v = tensor == 0 ? a.u : tensor == 1 ? a.dt : a.z;

		if (tensor >= tensors)
			break;
		const bool valid = t + row < p.end && p.base + column < a.channels;
		copy16_async(to + piece * 8,
		             valid ? at(v, p.b, t + row, 0) + p.base + column : at(v, 0, 0, 0),
		             valid);
	}
	copy_commit();
}

/* A thread's pair of B or C of the tile from token t on. */
static __device__ __forceinline__ uint32_t load_chosen(const struct selective_scan_args &a,
                                                       const struct place &p, int64_t t)
{
	const int row = (int)threadIdx.x / SCAN_STATE, pair = (int)threadIdx.x % SCAN_STATE;
	const struct view &v = pair < SCAN_STATE / 2 ? a.b : a.c;

	if (t + row >= p.end)
		return 0;
	return *reinterpret_cast<const uint32_t *>(at(v, p.b, t + row, 0) +
	                                           2 * (pair % (SCAN_STATE / 2)));
}

static __device__ __forceinline__ float element(const bf16 *from)
{
	return __bfloat162float(*from);
}

/* One token: h = 2^(rate dt) h + dt u B; adds h C to y. */
template <int OWN, bool READS>
static __device__ __forceinline__ void advance(float (&h)[OWN], const float (&rate)[OWN], float dt,
                                               float in, const float *b, float &y)
{
#pragma unroll
	for (int n = 0; n < OWN; n += 4) {
		const float4 b4 = *reinterpret_cast<const float4 *>(b + n);
		const float4 c4 = *reinterpret_cast<const float4 *>(b + n + SCAN_STATE);
		const float bs[4] = {b4.x, b4.y, b4.z, b4.w}, cs[4] = {c4.x, c4.y, c4.z, c4.w};

#pragma unroll
		for (int j = 0; j < 4; j++) {
			h[n + j] = fmaf(exp2_fast(rate[n + j] * dt), h[n + j], in * bs[j]);
			if (READS)
				y = fmaf(h[n + j], cs[j], y);
		}
	}
}

/* y of a token and channel without its skip becomes the output. */
template <int PARTS>
static __device__ __forceinline__ void store_output(const struct selective_scan_args &a,
                                                    const struct place &p, const bf16 *tile,
                                                    int64_t t, int row, float skip, float y)
{
	using S = shape<PARTS>;
	const int64_t channel = p.base + p.local;

	if (t + row >= p.end || channel >= a.channels)
		return;
	y = fmaf(skip, element(tile + row * S::CHANNELS + p.local), y);
	if (a.z.data)
		y *= scan_silu(element(tile + 2 * S::TILE + row * S::CHANNELS + p.local));
	at(a.out, p.b, t + row, 0)[channel] = __float2bfloat16(y);
}

/* Adds the parts of a tile's y up; a warp has every WARPS-th token. */
template <int PARTS>
static __device__ __forceinline__ void store_sums(const struct selective_scan_args &a,
                                                  const struct place &p, const bf16 *tile,
                                                  const float *partial, int64_t t, float skip)
{
	using S = shape<PARTS>;

#pragma unroll
	for (int row = (int)threadIdx.x / WARP; row < TOKENS; row += WARPS) {
		float y = 0.0f;

#pragma unroll
		for (int part = 0; part < PARTS; part++)
			y += partial[(part * TOKENS + row) * S::CHANNELS + p.local];
		store_output<PARTS>(a, p, tile, t, row, skip, y);
	}
}

template <int OWN>
static __device__ __forceinline__ void store_border(const struct selective_scan_args &a,
                                                    const struct place &p, int64_t t,
                                                    const float (&h)[OWN])
{
#pragma unroll
	for (int n = 0; n < OWN; n++)
		*scan_border(a, p.b, t, p.first + n, p.base + p.local) = h[n];
}

/* Where a segment starts: carried across, given, or zero. */
template <int OWN>
static __device__ __forceinline__ void
load_start(float (&h)[OWN], const struct selective_scan_args &a, const struct scan_segments &s,
           const struct place &p)
{
	const float *from =
	        s.count > 1 ? s.ends + p.segment * a.batch * SCAN_STATE * a.channels : a.h0;

#pragma unroll
	for (int n = 0; n < OWN; n++)
		h[n] = from ? from[scan_index(a, p.b, p.first + n, p.base + p.local)] : 0.0f;
}

/* LOCAL: a segment from zero, of which the last state and the sum of dt are stored. */
template <int PARTS, bool LOCAL>
static __global__ void __launch_bounds__(THREADS)
        scan_kernel(const __grid_constant__ struct selective_scan_args a,
                    const __grid_constant__ struct scan_segments s)
{
	using S = shape<PARTS>;
	const struct place p = find_place<PARTS>(a, s);
	const int64_t channel = p.base + p.local;
	const bool has_channel = channel < a.channels;
	const int tensors = !LOCAL && a.z.data ? 3 : 2;
	bf16 *const tiles = reinterpret_cast<bf16 *>(shared_memory);
	float *const chosen = reinterpret_cast<float *>(tiles + S::COPIES);
	float *const partial = chosen + 2 * TOKENS * CHOSEN;
	float h[S::OWN] = {}, rate[S::OWN] = {}, skip = 0.0f, steps = 0.0f;

	if (has_channel) {
#pragma unroll
		for (int n = 0; n < S::OWN; n++)
			rate[n] = scan_rate(a, channel, p.first + n);
		skip = a.skip ? a.skip[channel] : 0.0f;
		if (!LOCAL)
			load_start(h, a, s, p);
	}
	for (int i = 0; i < S::AHEAD; i++)
		copy_tile<PARTS>(tiles + i * 3 * S::TILE, a, p, p.start + i * TOKENS, tensors);
	uint32_t next = load_chosen(a, p, p.start);
	int stage = 0, filled = S::AHEAD, turn = 0, last = 0;
	for (int64_t t = p.start; t < p.end; t += TOKENS) {
		const bf16 *tile = tiles + stage * 3 * S::TILE + p.local;
		const float *bc = chosen + turn * TOKENS * CHOSEN + p.first;
		float *const to = partial + turn * S::PARTIAL + p.first / S::OWN * S::TILE;

		*reinterpret_cast<float2 *>(chosen + turn * TOKENS * CHOSEN + 2 * threadIdx.x) =
		        make_float2(low_half(next), high_half(next));
		copy_wait<S::AHEAD - 1>();
		__syncthreads();
		if (PARTS > 1 && !LOCAL && t > p.start)
			store_sums<PARTS>(a, p, tiles + last * 3 * S::TILE,
			                  partial + (turn ^ 1) * S::PARTIAL, t - TOKENS, skip);
		copy_tile<PARTS>(tiles + filled * 3 * S::TILE, a, p, t + S::AHEAD * TOKENS,
		                 tensors);
		next = load_chosen(a, p, t + TOKENS);
		if (!LOCAL && a.borders && has_channel && t % SCAN_CHUNK == 0)
			store_border(a, p, t, h);
#pragma unroll
		for (int row = 0; row < TOKENS; row++) {
			const float u = element(tile + row * S::CHANNELS);
			const float dt = element(tile + S::TILE + row * S::CHANNELS);
			float y = 0.0f;

			advance<S::OWN, !LOCAL>(h, rate, dt, dt * u, bc + row * CHOSEN, y);
			if (LOCAL)
				steps += dt;
			else if (PARTS > 1)
				to[row * S::CHANNELS + p.local] = y;
			else
				store_output<PARTS>(a, p, tile - p.local, t, row, skip, y);
		}
		last = stage;
		stage = stage + 1 == S::STAGES ? 0 : stage + 1;
		filled = filled + 1 == S::STAGES ? 0 : filled + 1;
		turn ^= 1;
	}
	copy_wait<0>();
	if (PARTS > 1 && !LOCAL) {
		__syncthreads();
		store_sums<PARTS>(a, p, tiles + last * 3 * S::TILE,
		                  partial + (turn ^ 1) * S::PARTIAL,
		                  p.start + (p.end - p.start - 1) / TOKENS * TOKENS, skip);
	}
	if (!has_channel)
		return;
	float *const out = LOCAL ? s.ends : a.h_final && p.end == a.seq_len ? a.h_final : NULL;
	const int64_t row = (LOCAL ? p.segment * a.batch : 0) + p.b;
#pragma unroll
	for (int n = 0; n < S::OWN; n++)
		if (out)
			out[scan_index(a, row, p.first + n, channel)] = h[n];
	if (LOCAL && p.first == 0)
		s.steps[row * a.channels + channel] = steps;
}

/* The state with which each segment starts takes the place of what the segment makes of zero. */
static __global__ void __launch_bounds__(THREADS)
        carry_kernel(const __grid_constant__ struct selective_scan_args a,
                     const __grid_constant__ struct scan_segments s)
{
	const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t width = a.batch * SCAN_STATE * a.channels;
	const int64_t channel = i % a.channels, b = i / (SCAN_STATE * a.channels);

	if (i >= width)
		return;
	const float rate = scan_rate(a, channel, (int)(i / a.channels % SCAN_STATE));
	float h = a.h0 ? a.h0[i] : 0.0f;
#pragma unroll 4
	for (int64_t segment = 0; segment < s.count; segment++) {
		float *const end = s.ends + segment * width + i;
		const bool follows = segment + 1 < s.count;
		const float made = follows ? *end : 0.0f;
		const float steps =
		        follows ? s.steps[(segment * a.batch + b) * a.channels + channel] : 0.0f;

		*end = h;
		h = fmaf(exp2_fast(rate * steps), h, made);
	}
}

static int64_t count_slabs(const struct selective_scan_args *a, int parts)
{
	return a->batch * divide_up(a->channels, THREADS / parts);
}

/* Whether channels alone make eight warps a multiprocessor. */
static bool has_many(const struct device *device, const struct selective_scan_args *a)
{
	return a->batch * a->channels >= (int64_t)8 * WARP * cuda_sm_count(device);
}

static struct scan_segments segments_of(const struct device *device,
                                        const struct selective_scan_args *a, void *workspace)
{
	/* Two passes take twice as long as one: two segments would gain nothing. */
	return cut_scan(device, a, count_slabs(a, 4), has_many(device, a) ? 0 : 2, 3, workspace);
}

static enum status run_segments(struct device *device, const struct selective_scan_args *a,
                                const struct scan_segments &s)
{
	const enum status status = launch(device, "selective_scan", scan_kernel<4, true>,
	                                  dim3((unsigned)((s.count - 1) * count_slabs(a, 4))),
	                                  THREADS, shape<4>::BYTES, *a, s);

	if (status != STATUS_OK)
		return status;
	return launch_each(device, "selective_scan", carry_kernel,
	                   a->batch * SCAN_STATE * a->channels, THREADS, *a, s);
}

template <int PARTS>
static enum status run(struct device *device, const struct selective_scan_args *a,
                       const struct scan_segments &s)
{
	return launch(device, "selective_scan", scan_kernel<PARTS, false>,
	              dim3((unsigned)(s.count * count_slabs(a, PARTS))), THREADS,
	              shape<PARTS>::BYTES, *a, s);
}

} // namespace

extern "C" const char *portable_selective_scan_unsupported(const struct device *device,
                                                           const void *args)
{
	const auto *a = static_cast<const struct selective_scan_args *>(args);

	if (a->state != SCAN_STATE)
		return "a state must have 16 numbers";
	if (segments_of(device, a, NULL).count * count_slabs(a, 4) > INT32_MAX)
		return "too many channels";
	return either(check_widths(a->channels),
	              check_aligned(&a->u, &a->dt, &a->z, &a->b, &a->c, &a->out));
}

extern "C" size_t portable_selective_scan_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct selective_scan_args *>(args);
	const struct scan_segments s = segments_of(device, a, NULL);

	return scan_segment_bytes(a, &s);
}

extern "C" enum status portable_selective_scan(struct device *device, const void *args,
                                               void *workspace)
{
	const auto *a = static_cast<const struct selective_scan_args *>(args);
	const struct scan_segments s = segments_of(device, a, workspace);

	const enum status status = s.count > 1 ? run_segments(device, a, s) : STATUS_OK;

	if (status != STATUS_OK)
		return status;
	return has_many(device, a) ? run<1>(device, a, s) : run<4>(device, a, s);
}

/* ---- one token ---- */

constexpr int MANY = 64, SEQUENCES = 4, STEPS_PER_SM = 5;

/* The 16 rates of a channel. */
static __device__ __forceinline__ void load_rates(float (&rate)[SCAN_STATE], const float *log_rate)
{
#pragma unroll
	for (int n = 0; n < SCAN_STATE; n += 4) {
		const float4 four = *reinterpret_cast<const float4 *>(log_rate + n);

		rate[n] = -LOG2E * __expf(four.x);
		rate[n + 1] = -LOG2E * __expf(four.y);
		rate[n + 2] = -LOG2E * __expf(four.z);
		rate[n + 3] = -LOG2E * __expf(four.w);
	}
}

/* A channel of one sequence, whose 16 numbers are on their way together. */
static __device__ __forceinline__ void run_step(const struct selective_scan_step_args &a, int64_t b,
                                                int64_t channel, const float (&rate)[SCAN_STATE],
                                                float skip)
{
	/* Formed anew for each sequence: 16 addresses would take 32 registers. */
	const int64_t apart = held((int)a.channels);
	float *const state = a.h + b * SCAN_STATE * a.channels + channel;
	float h[SCAN_STATE];

#pragma unroll
	for (int n = 0; n < SCAN_STATE; n++)
		h[n] = state[n * apart];
	const float u = element(at(a.u, b, 0, 0) + channel);
	const float dt = element(at(a.dt, b, 0, 0) + channel);
	float y = skip * u;
#pragma unroll
	for (int n = 0; n < SCAN_STATE; n += 8) {
		float bs[8], cs[8];

		load8(bs, at(a.b, b, 0, 0) + n);
		load8(cs, at(a.c, b, 0, 0) + n);
#pragma unroll
		for (int j = 0; j < 8; j++) {
			const float next =
			        fmaf(exp2_fast(rate[n + j] * dt), h[n + j], dt * u * bs[j]);

			state[(n + j) * apart] = next;
			y = fmaf(next, cs[j], y);
		}
	}
	if (a.z.data)
		y *= scan_silu(element(at(a.z, b, 0, 0) + channel));
	at(a.out, b, 0, 0)[channel] = __float2bfloat16(y);
}

/* A thread has a channel of `sequences` sequences, whose rates it reads once. */
static __global__ void __launch_bounds__(THREADS, STEPS_PER_SM)
        step_kernel(const __grid_constant__ struct selective_scan_step_args a, int sequences)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t first = index / a.channels * sequences, channel = index % a.channels;
	const int64_t end = min(first + sequences, a.batch);
	float rate[SCAN_STATE];

	if (first >= a.batch)
		return;
	load_rates(rate, a.log_rate + channel * SCAN_STATE);
	const float skip = a.skip ? a.skip[channel] : 0.0f;
#pragma unroll 1
	for (int64_t b = first; b < end; b++)
		run_step(a, b, channel, rate, skip);
}

extern "C" const char *portable_selective_scan_step_unsupported(const struct device *,
                                                                const void *args)
{
	const auto *a = static_cast<const struct selective_scan_step_args *>(args);

	if (a->state != SCAN_STATE)
		return "a state must have 16 numbers";
	if (a->channels > INT32_MAX)
		return "too many channels";
	return either(check_aligned(a->log_rate), check_aligned(&a->b, &a->c));
}

extern "C" enum status portable_selective_scan_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct selective_scan_step_args *>(args);
	const int sequences = a->batch < MANY ? 1 : SEQUENCES;

	return launch_each(device, "selective_scan_step", step_kernel,
	                   divide_up(a->batch, sequences) * a->channels, THREADS, *a, sequences);
}
