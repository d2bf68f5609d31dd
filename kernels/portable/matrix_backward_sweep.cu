/*
 * The state before each chunk and the gradient of the state after each, from
 * two sweeps over the chunks, forward and backward in time:
 *   S' = D S + sum over j of (k_j R_j)^T v_j,
 *   L' = D L + sum over i of (q_i P_i)^T dout_i,
 * where P_i is the decay from the chunk's start to token i, R_j that from behind
 * token j to the chunk's end, D that of the whole chunk. (The scale is left to
 * who reads L.)
 *
 * A block holds 64 or 128 rows and columns of a state in registers, fp32; each of its eight warps a
 * quarter of the rows and half of the columns. Before a chunk it writes them, bf16, in the layout
 * of matrix_backward.cuh, while the tiles of the chunk after it arrive. P and R multiply the
 * tile of q or k where it lies; their logarithms are sums of decays, so no
 * exponent is above zero.
 *
 * Where there are fewer blocks than multiprocessors, time is cut into segments: a
 * sweep from zero leaves each segment's end, a scan turns these into the segments'
 * starts, and a second sweep writes the states.
 *
 * Limited by memory: of a token and head of 128 x 128, 512 bytes of operands, 256 of diagonal
 * decays and 512 of states against 65 kFLOP. Registers: 128, two blocks on a multiprocessor.
 */
#include "kernels/portable/matrix_backward.cuh"

namespace
{

using namespace matrix_backward;

enum sweep_kind { STATES, GRADIENTS };

template <int ROWS, int COLUMNS, bool DIAGONAL> struct layout {
	static constexpr int X = CHUNK * ROWS, G = DIAGONAL ? X : 0, Y = CHUNK * COLUMNS;
	static constexpr int STAGE = X + G + Y; /* elements */
	static constexpr int FLOATS = SUBS * ROWS + ROWS;
	static constexpr size_t BYTES = 2 * STAGE * sizeof(bf16) + FLOATS * sizeof(float);
};

/* One block's part: tile of the state, sequence, head, chunks. */
struct part {
	int64_t panel, column, b, h, sequence, segment, first, end;
};

template <int COLUMNS>
static __device__ __forceinline__ struct part part_of(const struct matrix_recurrence_args &f,
                                                      const struct plan &p)
{
	const int64_t across = divide_up(p.slabs * SLAB, COLUMNS);
	const int64_t tile = blockIdx.x % (across * p.panels);
	const int64_t rest = blockIdx.x / (across * p.panels);
	const int64_t sequences = f.batch * f.n_heads;
	struct part x;

	x.panel = tile / across;
	x.column = tile % across * COLUMNS;
	x.sequence = rest % sequences;
	x.segment = rest / sequences;
	x.b = x.sequence / f.n_heads;
	x.h = x.sequence % f.n_heads;
	x.first = x.segment * p.per_segment;
	x.end = min(x.first + p.per_segment, p.chunks);
	return x;
}

template <int ROWS, int COLUMNS, bool DIAGONAL>
static __device__ __forceinline__ void
load_chunk(bf16 *stage, const struct matrix_recurrence_args &f, const struct plan &p,
           const struct part &x, const struct rows &keys, const struct rows &values, int64_t chunk)
{
	using L = layout<ROWS, COLUMNS, DIAGONAL>;
	const int64_t first = chunk * CHUNK;
	const int valid = (int)min((int64_t)CHUNK, f.seq_len - first);

	load_tile<ROWS>(stage, keys, x.b, x.h, first, valid, x.panel * ROWS);
	if (DIAGONAL)
		load_tile<ROWS>(stage + L::X, p.log_decay, x.b, x.h, first, valid, x.panel * ROWS);
	load_tile<COLUMNS>(stage + L::X + L::G, values, x.b, x.h, first, valid, x.column);
	copy_commit();
}

/*
 * Multiplies the tile by P (GRADIENTS) or R (STATES), each channel by its own; a
 * thread takes a sub-chunk of two channels. whole: the chunk's decay. Synchronizes.
 */
template <int ROWS, sweep_kind KIND>
static __device__ __forceinline__ void decay_channels(bf16 *tile, bf16 *decays, float *sums,
                                                      float *whole)
{
	const int sub = threadIdx.x / (ROWS / 2), channel = threadIdx.x % (ROWS / 2) * 2;
	const bool busy = sub < SUBS;
	uint32_t g[SUB] = {};
	float x = 0.0f, y = 0.0f;

	if (busy) {
#pragma unroll
		for (int i = 0; i < SUB; i++) {
			g[i] = *pair_at<ROWS>(decays, sub * SUB + i, channel);
			x += low_half(g[i]);
			y += high_half(g[i]);
		}
		*reinterpret_cast<float2 *>(sums + sub * ROWS + channel) = make_float2(x, y);
	}
	__syncthreads();
	if (!busy)
		return;
	float all_x = 0.0f, all_y = 0.0f;
	x = y = 0.0f;
#pragma unroll
	for (int i = 0; i < SUBS; i++) {
		const float2 sum = *reinterpret_cast<const float2 *>(sums + i * ROWS + channel);

		all_x += sum.x;
		all_y += sum.y;
		if (KIND == STATES ? i > sub : i < sub) {
			x += sum.x;
			y += sum.y;
		}
	}
	if (sub == 0)
		*reinterpret_cast<float2 *>(whole + channel) =
		        make_float2(exp2_fast(all_x * LOG2E), exp2_fast(all_y * LOG2E));
#pragma unroll
	for (int n = 0; n < SUB; n++) {
		const int i = KIND == STATES ? SUB - 1 - n : n;
		uint32_t *const pair = pair_at<ROWS>(tile, sub * SUB + i, channel);

		if (KIND == GRADIENTS) {
			x += low_half(g[i]);
			y += high_half(g[i]);
		}
		*pair = multiply_pairs(*pair, pack(exp2_fast(x * LOG2E), exp2_fast(y * LOG2E)));
		if (KIND == STATES) {
			x += low_half(g[i]);
			y += high_half(g[i]);
		}
	}
}

/* The same where all channels decay alike; `mine` are this lane's two tokens. Synchronizes. */
template <int ROWS, sweep_kind KIND>
static __device__ __forceinline__ void decay_tokens(bf16 *tile, float2 mine, float *factors,
                                                    float *whole)
{
	if (threadIdx.x < WARP) {
		const struct token_sums sum = sum_tokens(mine);
		float *const two = factors + 2 * threadIdx.x;

		two[0] = KIND == STATES ? decay_between(sum.first, sum.all) : exp2_fast(sum.first);
		two[1] =
		        KIND == STATES ? decay_between(sum.second, sum.all) : exp2_fast(sum.second);
		if (threadIdx.x == 0)
			factors[CHUNK] = exp2_fast(sum.all);
	}
	__syncthreads();
	for (int i = threadIdx.x; i < ROWS; i += THREADS)
		whole[i] = factors[CHUNK];
#pragma unroll
	for (int i = 0; i < CHUNK * ROWS / 8 / THREADS; i++) {
		const int index = i * THREADS + threadIdx.x, row = index / (ROWS / 8);
		bf16 *const piece = tile + offset<ROWS>(row, index % (ROWS / 8));
		const uint32_t factor = pack(factors[row], factors[row]);
		vector8 x = load8(piece);

#pragma unroll
		for (int e = 0; e < 4; e++)
			x.pair[e] = multiply_pairs(x.pair[e], factor);
		*reinterpret_cast<vector8 *>(piece) = x;
	}
}

/* Calls visit(row, column, two sums) for every pair of the block's tile that this lane holds. */
template <int ROWS, int COLUMNS, typename Visit>
static __device__ __forceinline__ void each_pair(float (&sums)[ROWS / 64][COLUMNS / 16][4],
                                                 const Visit &visit)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

#pragma unroll
	for (int m = 0; m < ROWS / 64; m++)
#pragma unroll
		for (int n = 0; n < COLUMNS / 16; n++)
#pragma unroll
			for (int half = 0; half < 2; half++)
				visit(warp % 4 * (ROWS / 4) + 16 * m + 8 * half + lane / 4,
				      warp / 4 * (COLUMNS / 2) + 8 * n + 2 * (lane % 4),
				      sums[m][n][2 * half], sums[m][n][2 * half + 1]);
}

/* The block's tile of the state, rounded. */
template <int ROWS, int COLUMNS>
static __device__ __forceinline__ void
write_state(bf16 *states, const float (&sums)[ROWS / 64][COLUMNS / 16][4], const struct plan &p,
            const struct part &x, int64_t chunk)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int slab = (int)(x.column / SLAB) + warp / 4 * (COLUMNS / 2 / SLAB);
	bf16 *const to = states + piece_at<ROWS>(p, x.sequence, chunk, x.panel, slab) +
	                 warp % 4 * (ROWS / 4 * SLAB) + 2 * lane;

#pragma unroll
	for (int n = 0; n < COLUMNS / 16; n++) {
		if (slab + n / 4 >= p.slabs)
			break;
#pragma unroll
		for (int m = 0; m < ROWS / 64; m++)
#pragma unroll
			for (int half = 0; half < 2; half++)
				*reinterpret_cast<uint32_t *>(
				        to + n / 4 * (ROWS * SLAB) +
				        ((2 * m + half) * (SLAB / 8) + n % 4) * 64) =
				        pack(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
	}
}

/* sums += tile^T values. */
template <int ROWS, int COLUMNS>
static __device__ __forceinline__ void add_chunk(float (&sums)[ROWS / 64][COLUMNS / 16][4],
                                                 const bf16 *tile, const bf16 *values)
{
	const int warp = threadIdx.x / WARP;

#pragma unroll
	for (int step = 0; step < CHUNK / 16; step++) {
		uint32_t left[ROWS / 64][4], right[4];

#pragma unroll
		for (int m = 0; m < ROWS / 64; m++)
			load_matrices_transposed(
			        left[m], across_first<ROWS>(tile, 16 * step,
			                                    warp % 4 * (ROWS / 32) + 2 * m));
#pragma unroll
		for (int n = 0; n < COLUMNS / 32; n++) {
			load_matrices_transposed(
			        right, down_first<COLUMNS>(values, 16 * step,
			                                   warp / 4 * (COLUMNS / 16) + 2 * n));
#pragma unroll
			for (int m = 0; m < ROWS / 64; m++) {
				multiply_add(sums[m][2 * n], left[m], right[0], right[1]);
				multiply_add(sums[m][2 * n + 1], left[m], right[2], right[3]);
			}
		}
	}
}

/* This lane's two tokens of a chunk. */
static __device__ __forceinline__ float2 two_decays(const struct matrix_recurrence_args &f,
                                                    const struct part &x, int64_t chunk)
{
	const int64_t t = chunk * CHUNK + 2 * (threadIdx.x % WARP);

	return make_float2(token_decay(f, x.b, t, x.h, t < f.seq_len),
	                   token_decay(f, x.b, t + 1, x.h, t + 1 < f.seq_len));
}

/* LOCAL: from zero, and only the segment's end and its decay are kept. */
template <int ROWS, int COLUMNS, bool DIAGONAL, sweep_kind KIND, bool LOCAL>
static __global__ void __launch_bounds__(THREADS, 2)
        sweep_kernel(const __grid_constant__ struct matrix_recurrence_backward_args a,
                     const __grid_constant__ struct plan p)
{
	using L = layout<ROWS, COLUMNS, DIAGONAL>;
	const struct matrix_recurrence_args &f = a.forward;
	const struct rows &keys = KIND == STATES ? p.k : p.q;
	const struct rows &values = KIND == STATES ? p.v : p.dout;
	const struct part x = part_of<COLUMNS>(f, p);
	const int64_t n_rows = p.panels * ROWS, n_columns = p.slabs * SLAB;
	const int64_t kept = x.segment * f.batch * f.n_heads + x.sequence;
	bf16 *const stages = reinterpret_cast<bf16 *>(shared_memory);
	float *const scratch = reinterpret_cast<float *>(stages + 2 * L::STAGE);
	float *const whole = scratch + SUBS * ROWS;
	float sums[ROWS / 64][COLUMNS / 16][4] = {};
	float decay = 1.0f; /* of the segment and a row, one for each of the first ROWS threads */
	float2 decays = {}; /* of the first warp */

	const int64_t step = KIND == STATES ? 1 : -1;
	const int64_t begin = KIND == STATES ? x.first : x.end - 1;
	load_chunk<ROWS, COLUMNS, DIAGONAL>(stages, f, p, x, keys, values, begin);
	if (!DIAGONAL && threadIdx.x < WARP)
		decays = two_decays(f, x, begin);
	if (!LOCAL && p.segments > 1) {
		const float *start =
		        p.ends + (kept * n_rows + x.panel * ROWS) * n_columns + x.column;

		each_pair<ROWS, COLUMNS>(sums, [&](int row, int column, float &u, float &v) {
			if (x.column + column < n_columns) {
				u = start[row * n_columns + column];
				v = start[row * n_columns + column + 1];
			}
		});
	} else if (!LOCAL && KIND == STATES && f.h0) {
		each_pair<ROWS, COLUMNS>(sums, [&](int row, int column, float &u, float &v) {
			const int64_t i = x.panel * ROWS + row, j = x.column + column;
			const float *from = f.h0 + (x.sequence * f.d_k + i) * f.d_v + j;

			u = i < f.d_k && j < f.d_v ? from[0] : 0.0f;
			v = i < f.d_k && j + 1 < f.d_v ? from[1] : 0.0f;
		});
	}
	for (int64_t n = 0; n < x.end - x.first; n++) {
		const int64_t chunk = begin + n * step;
		bf16 *const tile = stages + n % 2 * L::STAGE;

		if (!LOCAL)
			write_state<ROWS, COLUMNS>(KIND == STATES ? p.states : p.gradients, sums, p,
			                           x, chunk);
		copy_wait<0>();
		__syncthreads();
		const float2 now = decays;
		if (n + 1 < x.end - x.first) {
			load_chunk<ROWS, COLUMNS, DIAGONAL>(stages + (n + 1) % 2 * L::STAGE, f, p,
			                                    x, keys, values, chunk + step);
			if (!DIAGONAL && threadIdx.x < WARP)
				decays = two_decays(f, x, chunk + step);
		}
		if (DIAGONAL)
			decay_channels<ROWS, KIND>(tile, tile + L::X, scratch, whole);
		else if (f.decay != DECAY_NONE)
			decay_tokens<ROWS, KIND>(tile, now, scratch, whole);
		__syncthreads();
		if (f.decay != DECAY_NONE)
			each_pair<ROWS, COLUMNS>(sums, [&](int row, int, float &u, float &v) {
				u *= whole[row];
				v *= whole[row];
			});
		if (LOCAL && f.decay != DECAY_NONE && threadIdx.x < ROWS)
			decay *= whole[threadIdx.x];
		add_chunk<ROWS, COLUMNS>(sums, tile, tile + L::X + L::G);
	}
	if (LOCAL) {
		float *end = p.ends + (kept * n_rows + x.panel * ROWS) * n_columns + x.column;

		each_pair<ROWS, COLUMNS>(sums, [&](int row, int column, float &u, float &v) {
			if (x.column + column < n_columns)
				*reinterpret_cast<float2 *>(end + row * n_columns + column) =
				        make_float2(u, v);
		});
		if (x.column == 0 && threadIdx.x < ROWS)
			p.decays[kept * n_rows + x.panel * ROWS + threadIdx.x] = decay;
		return;
	}
	if (KIND == GRADIENTS && x.first == 0 && a.dh0)
		each_pair<ROWS, COLUMNS>(sums, [&](int row, int column, float &u, float &v) {
			const int64_t i = x.panel * ROWS + row, j = x.column + column;
			float *to = a.dh0 + (x.sequence * f.d_k + i) * f.d_v + j;

			if (i < f.d_k && j < f.d_v)
				to[0] = f.scale * u;
			if (i < f.d_k && j + 1 < f.d_v)
				to[1] = f.scale * v;
		});
}

/* An element of the state, segment after segment: the end that each leaves from zero becomes the
 * state that it starts from. */
template <sweep_kind KIND>
static __global__ void __launch_bounds__(THREADS)
        start_kernel(const __grid_constant__ struct matrix_recurrence_args f,
                     const __grid_constant__ struct plan p, const __grid_constant__ int64_t n_rows)
{
	const int64_t n_columns = p.slabs * SLAB, sequences = f.batch * f.n_heads;
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t column = index % n_columns, row = index / n_columns % n_rows;
	const int64_t sequence = index / n_columns / n_rows;
	float state = 0.0f;

	if (sequence >= sequences)
		return;
	if (KIND == STATES && f.h0 && row < f.d_k && column < f.d_v)
		state = f.h0[(sequence * f.d_k + row) * f.d_v + column];
	for (int64_t n = 0; n < p.segments; n++) {
		const int64_t segment = KIND == STATES ? n : p.segments - 1 - n;
		const int64_t kept = (segment * sequences + sequence) * n_rows + row;
		float *const at_segment = p.ends + kept * n_columns + column;
		const float end = *at_segment;

		*at_segment = state;
		state = p.decays[kept] * state + end;
	}
}

template <int ROWS, int COLUMNS, bool DIAGONAL, sweep_kind KIND>
static enum status run(struct device *device, const struct matrix_recurrence_backward_args &a,
                       const struct plan &p)
{
	using L = layout<ROWS, COLUMNS, DIAGONAL>;
	const int64_t sequences = a.forward.batch * a.forward.n_heads;
	const int64_t tiles = divide_up(p.slabs * SLAB, COLUMNS) * p.panels;
	const dim3 grid((unsigned)(tiles * sequences * p.segments));
	enum status status = STATUS_OK;

	if (p.segments > 1) {
		status = launch(device, "matrix_recurrence_backward",
		                sweep_kernel<ROWS, COLUMNS, DIAGONAL, KIND, true>, grid, THREADS,
		                L::BYTES, a, p);
		if (status == STATUS_OK)
			status = launch_each(device, "matrix_recurrence_backward",
			                     start_kernel<KIND>,
			                     sequences * p.panels * ROWS * p.slabs * SLAB, THREADS,
			                     a.forward, p, p.panels * ROWS);
	}
	if (status != STATUS_OK)
		return status;
	return launch(device, "matrix_recurrence_backward",
	              sweep_kernel<ROWS, COLUMNS, DIAGONAL, KIND, false>, grid, THREADS, L::BYTES,
	              a, p);
}

template <int ROWS, int COLUMNS>
static enum status run_both(struct device *device, const struct matrix_recurrence_backward_args &a,
                            const struct plan &p)
{
	const bool diagonal = a.forward.decay == DECAY_DIAGONAL;
	const enum status status = diagonal ? run<ROWS, COLUMNS, true, STATES>(device, a, p)
	                                    : run<ROWS, COLUMNS, false, STATES>(device, a, p);

	if (status != STATUS_OK)
		return status;
	return diagonal ? run<ROWS, COLUMNS, true, GRADIENTS>(device, a, p)
	                : run<ROWS, COLUMNS, false, GRADIENTS>(device, a, p);
}

} // namespace

enum status matrix_backward::sweep(struct device *device,
                                   const struct matrix_recurrence_backward_args &a,
                                   const struct plan &p, int panel_rows)
{
	const bool wide = p.slabs * SLAB > 64;

	if (panel_rows == 64)
		return wide ? run_both<64, 128>(device, a, p) : run_both<64, 64>(device, a, p);
	return wide ? run_both<128, 128>(device, a, p) : run_both<128, 64>(device, a, p);
}
