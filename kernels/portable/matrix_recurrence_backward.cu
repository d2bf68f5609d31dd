/*
 * Gradients of the plain matrix recurrence S_t = A_t S_{t-1} + k_t^T v_t,
 * o_t = scale q_t S_t, token by token with the states in registers:
 *   1. forward in time:  dq_t = scale S_t dout_t;
 *   2. backward in time: G_t = scale q_t^T dout_t + A_{t+1} G_{t+1},
 *      dk_t = G_t v_t, dv_t = k_t G_t, dh0 = A_1 G_1;
 *   3. the gradient of log A_t, a row of the state each:
 *      F_t = F_{t+1} + q_t dq_t - k_t dk_t, from F_t = rowsum(S_{t-1} A_t G_t) at
 *      every CHUNK-th token, so that no long sum cancels.
 * A block takes COLUMNS columns of the values, a warp 16 of them, a lane every
 * 32nd row. Sums over columns meet in shared memory, TOKENS tokens at a time,
 * those of the blocks in the third pass. The states between chunks are kept
 * as bf16 in the workspace.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 256, WARPS = THREADS / WARP, WARP_COLUMNS = 16;
constexpr int COLUMNS = WARPS * WARP_COLUMNS, MAX_ROWS = 256, TOKENS = 4, CHUNK = 64;

struct work {
	int64_t column_blocks, bounds; /* bounds between chunks, per sequence */
	float *dq, *dk;                /* [column_blocks, B, T, H, d_k] */
	float *flow;                   /* [column_blocks, B, H, bounds, d_k]: F behind each bound */
	bf16 *states;                  /* [B, H, bounds, d_k, d_v] before each bound */
};

/* TOKENS tokens in shared memory. */
struct group {
	float q[TOKENS][MAX_ROWS], k[TOKENS][MAX_ROWS], decay[TOKENS][MAX_ROWS];
	float v[TOKENS][COLUMNS], dout[TOKENS][COLUMNS];
	float sums[TOKENS][WARPS][MAX_ROWS]; /* the warps' shares of dq or dk */
	float dv[TOKENS][COLUMNS];
};

static __device__ __forceinline__ bool decays_by_data(const struct matrix_recurrence_args &f)
{
	return f.decay == DECAY_SCALAR || f.decay == DECAY_DIAGONAL;
}

static __device__ __forceinline__ float decay_of(const struct matrix_recurrence_args &f, int64_t b,
                                                 int64_t t, int64_t h, int row)
{
	if (f.decay == DECAY_NONE)
		return 1.0f;
	if (f.decay == DECAY_CONSTANT)
		return 1.0f - exp2_fast(-5.0f - (float)h);
	return __expf(__bfloat162float(
	        *(at(f.log_decay, b, t, h) + (f.decay == DECAY_DIAGONAL ? row : 0))));
}

/* Tokens t .. t+n-1; zeros where the state has no row or no column. */
static __device__ __forceinline__ void load_group(struct group &g,
                                                  const struct matrix_recurrence_backward_args &a,
                                                  int64_t b, int64_t h, int64_t first_column,
                                                  int64_t t, int n)
{
	const struct matrix_recurrence_args &f = a.forward;

	for (int i = threadIdx.x; i < n * MAX_ROWS; i += THREADS) {
		const int m = i / MAX_ROWS, row = i % MAX_ROWS;
		const bool valid = row < f.d_k;

		g.q[m][row] = valid ? f.scale * __bfloat162float(at(f.q, b, t + m, h)[row]) : 0.0f;
		g.k[m][row] = valid ? __bfloat162float(at(f.k, b, t + m, h)[row]) : 0.0f;
		g.decay[m][row] = valid ? decay_of(f, b, t + m, h, row) : 0.0f;
	}
	for (int i = threadIdx.x; i < n * COLUMNS; i += THREADS) {
		const int m = i / COLUMNS, column = i % COLUMNS;
		const bool valid = first_column + column < f.d_v;

		g.v[m][column] =
		        valid ? __bfloat162float(at(f.v, b, t + m, h)[first_column + column])
		              : 0.0f;
		g.dout[m][column] =
		        valid ? __bfloat162float(at(a.dout, b, t + m, h)[first_column + column])
		              : 0.0f;
	}
}

static __device__ __forceinline__ void load_columns(float (&x)[WARP_COLUMNS], const float *from)
{
#pragma unroll
	for (int i = 0; i < WARP_COLUMNS / 4; i++) {
		const float4 v = reinterpret_cast<const float4 *>(from)[i];

		x[4 * i] = v.x;
		x[4 * i + 1] = v.y;
		x[4 * i + 2] = v.z;
		x[4 * i + 3] = v.w;
	}
}

/* parts of tokens t .. t+n-1 = factor times the sums over the warps. */
static __device__ __forceinline__ void store_sums(const struct group &g,
                                                  const struct matrix_recurrence_args &f,
                                                  float *parts, int64_t b, int64_t h, int64_t t,
                                                  int n, float factor)
{
	for (int i = threadIdx.x; i < n * MAX_ROWS; i += THREADS) {
		const int m = i / MAX_ROWS, row = i % MAX_ROWS;
		float sum = 0.0f;

		if (row >= f.d_k)
			continue;
#pragma unroll
		for (int w = 0; w < WARPS; w++)
			sum += g.sums[m][w][row];
		parts[(((blockIdx.x * f.batch + b) * f.seq_len + t + m) * f.n_heads + h) * f.d_k +
		      row] = factor * sum;
	}
}

/* Where a lane's columns of row `row` of the state behind `bound` are kept. */
static __device__ __forceinline__ bf16 *kept_state(const struct work &w,
                                                   const struct matrix_recurrence_args &f,
                                                   int64_t b, int64_t h, int64_t bound, int row,
                                                   int64_t column)
{
	return w.states + (((b * f.n_heads + h) * w.bounds + bound) * f.d_k + row) * f.d_v + column;
}

template <int LANE_ROWS>
static __global__ void __launch_bounds__(THREADS, 1)
        forward_kernel(const __grid_constant__ struct matrix_recurrence_backward_args a,
                       const __grid_constant__ struct work w)
{
	const struct matrix_recurrence_args &f = a.forward;
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int64_t h = blockIdx.y, b = blockIdx.z, first_column = blockIdx.x * COLUMNS;
	const int64_t column = first_column + warp * WARP_COLUMNS;
	struct group &g = *reinterpret_cast<struct group *>(shared_memory);
	float s[LANE_ROWS][WARP_COLUMNS];

#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
#pragma unroll
		for (int c = 0; c < WARP_COLUMNS; c++) {
			const int row = lane + WARP * r;
			const bool valid = f.h0 && row < f.d_k && column + c < f.d_v;

			s[r][c] = valid ? f.h0[((b * f.n_heads + h) * f.d_k + row) * f.d_v +
			                       column + c]
			                : 0.0f;
		}
	for (int64_t t = 0; t < f.seq_len; t += TOKENS) {
		const int n = (int)min((int64_t)TOKENS, f.seq_len - t);

		__syncthreads();
		load_group(g, a, b, h, first_column, t, n);
		__syncthreads();
		for (int m = 0; m < n; m++) {
			float v[WARP_COLUMNS], dout[WARP_COLUMNS];

			load_columns(v, g.v[m] + warp * WARP_COLUMNS);
			load_columns(dout, g.dout[m] + warp * WARP_COLUMNS);
#pragma unroll
			for (int r = 0; r < LANE_ROWS; r++) {
				const float k = g.k[m][lane + WARP * r];
				const float decay = g.decay[m][lane + WARP * r];
				float sum = 0.0f;

#pragma unroll
				for (int c = 0; c < WARP_COLUMNS; c++) {
					s[r][c] = decay * s[r][c] + k * v[c];
					sum += s[r][c] * dout[c];
				}
				g.sums[m][warp][lane + WARP * r] = sum;
			}
		}
		if (decays_by_data(f) && (t + n) % CHUNK == 0 && t + n < f.seq_len)
#pragma unroll
			for (int r = 0; r < LANE_ROWS; r++) {
				bf16 *const to = kept_state(w, f, b, h, (t + n) / CHUNK - 1,
				                            lane + WARP * r, column);

#pragma unroll
				for (int c = 0; c < WARP_COLUMNS; c++)
					if (lane + WARP * r < f.d_k && column + c < f.d_v)
						to[c] = __float2bfloat16(s[r][c]);
			}
		__syncthreads();
		store_sums(g, f, w.dq, b, h, t, n, f.scale);
	}
}

template <int LANE_ROWS>
static __global__ void __launch_bounds__(THREADS, 1)
        backward_kernel(const __grid_constant__ struct matrix_recurrence_backward_args a,
                        const __grid_constant__ struct work w)
{
	const struct matrix_recurrence_args &f = a.forward;
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const int64_t h = blockIdx.y, b = blockIdx.z, first_column = blockIdx.x * COLUMNS;
	const int64_t column = first_column + warp * WARP_COLUMNS;
	struct group &g = *reinterpret_cast<struct group *>(shared_memory);
	float grad[LANE_ROWS][WARP_COLUMNS] = {}; /* A_{t+1} G_{t+1} */

	for (int64_t t = (f.seq_len - 1) / TOKENS * TOKENS; t >= 0; t -= TOKENS) {
		const int n = (int)min((int64_t)TOKENS, f.seq_len - t);

		__syncthreads();
		if (decays_by_data(f) && (t + n) % CHUNK == 0 && t + n < f.seq_len) {
			const int64_t bound = (t + n) / CHUNK - 1;

#pragma unroll
			for (int r = 0; r < LANE_ROWS; r++) {
				const int row = lane + WARP * r;
				const bf16 *from = kept_state(w, f, b, h, bound, row, column);
				float sum = 0.0f;

#pragma unroll
				for (int c = 0; c < WARP_COLUMNS; c++)
					if (row < f.d_k && column + c < f.d_v)
						sum += __bfloat162float(from[c]) * grad[r][c];
				g.sums[0][warp][row] = sum;
			}
			__syncthreads();
			for (int row = threadIdx.x; row < f.d_k; row += THREADS) {
				float sum = 0.0f;

				for (int i = 0; i < WARPS; i++)
					sum += g.sums[0][i][row];
				w.flow[(((blockIdx.x * f.batch + b) * f.n_heads + h) * w.bounds +
				        bound) *
				               f.d_k +
				       row] = sum;
			}
			__syncthreads();
		}
		load_group(g, a, b, h, first_column, t, n);
		__syncthreads();
		for (int m = n - 1; m >= 0; m--) {
			float v[WARP_COLUMNS], dout[WARP_COLUMNS], dv[WARP_COLUMNS] = {};

			load_columns(v, g.v[m] + warp * WARP_COLUMNS);
			load_columns(dout, g.dout[m] + warp * WARP_COLUMNS);
#pragma unroll
			for (int r = 0; r < LANE_ROWS; r++) {
				const float q = g.q[m][lane + WARP * r];
				const float k = g.k[m][lane + WARP * r];
				const float decay = g.decay[m][lane + WARP * r];
				float sum = 0.0f;

#pragma unroll
				for (int c = 0; c < WARP_COLUMNS; c++) {
					grad[r][c] += q * dout[c];
					sum += grad[r][c] * v[c];
					dv[c] += grad[r][c] * k;
					grad[r][c] *= decay;
				}
				g.sums[m][warp][lane + WARP * r] = sum;
			}
			const float sum = scatter_sum(dv);
			if (lane % 2 == 0)
				g.dv[m][warp * WARP_COLUMNS + lane / 2] = sum;
		}
		__syncthreads();
		store_sums(g, f, w.dk, b, h, t, n, 1.0f);
		for (int i = threadIdx.x; i < n * COLUMNS; i += THREADS)
			if (first_column + i % COLUMNS < f.d_v)
				at(a.dv, b, t + i / COLUMNS, h)[first_column + i % COLUMNS] =
				        __float2bfloat16(g.dv[i / COLUMNS][i % COLUMNS]);
	}
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
#pragma unroll
		for (int c = 0; c < WARP_COLUMNS; c++) {
			const int row = lane + WARP * r;

			if (a.dh0 && row < f.d_k && column + c < f.d_v)
				a.dh0[((b * f.n_heads + h) * f.d_k + row) * f.d_v + column + c] =
				        grad[r][c];
		}
}

/* A block per chunk and head, a thread per row of the state: adds the shares of dq and dk, and runs
 * F through the chunk. */
static __global__ void __launch_bounds__(MAX_ROWS, 4)
        finish_kernel(const __grid_constant__ struct matrix_recurrence_backward_args a,
                      const __grid_constant__ struct work w)
{
	const struct matrix_recurrence_args &f = a.forward;
	const int64_t h = blockIdx.y, b = blockIdx.z, first = (int64_t)blockIdx.x * CHUNK;
	const int64_t end = min(first + CHUNK, f.seq_len), stride = f.batch * f.seq_len * f.n_heads;
	const int row = threadIdx.x;
	const bool valid = row < f.d_k;
	float *sums = reinterpret_cast<float *>(shared_memory);
	float flow = 0.0f;

	for (int64_t i = 0; valid && decays_by_data(f) && end < f.seq_len && i < w.column_blocks;
	     i++)
		flow += w.flow[(((i * f.batch + b) * f.n_heads + h) * w.bounds + blockIdx.x) *
		                       f.d_k +
		               row];
	for (int64_t t = end - 1; t >= first; t--) {
		const int64_t token = (b * f.seq_len + t) * f.n_heads + h;
		float dq = 0.0f, dk = 0.0f;

		for (int64_t i = 0; valid && i < w.column_blocks; i++) {
			dq += w.dq[(i * stride + token) * f.d_k + row];
			dk += w.dk[(i * stride + token) * f.d_k + row];
		}
		if (valid) {
			flow += __bfloat162float(at(f.q, b, t, h)[row]) * dq -
			        __bfloat162float(at(f.k, b, t, h)[row]) * dk;
			at(a.dq, b, t, h)[row] = __float2bfloat16(dq);
			at(a.dk, b, t, h)[row] = __float2bfloat16(dk);
		}
		if (t == 0 && !f.h0 && !isnan(flow))
			flow = 0.0f; /* nothing decays, where rounding would leave something */
		if (f.decay == DECAY_DIAGONAL && valid)
			at(a.dlog_decay, b, t, h)[row] = __float2bfloat16(flow);
		if (f.decay != DECAY_SCALAR)
			continue;
		const float sum = group_sum(flow, WARP);
		__syncthreads();
		if (row % WARP == 0)
			sums[row / WARP] = sum;
		__syncthreads();
		if (row == 0) {
			float total = 0.0f;

			for (int i = 0; i < MAX_ROWS / WARP; i++)
				total += sums[i];
			*at(a.dlog_decay, b, t, h) = __float2bfloat16(total);
		}
	}
}

static struct work work_of(const struct matrix_recurrence_args *f, void *workspace)
{
	const bool by_data = f->decay == DECAY_SCALAR || f->decay == DECAY_DIAGONAL;
	const int64_t rows = f->batch * f->seq_len * f->n_heads * f->d_k;
	struct work w;

	w.column_blocks = divide_up(f->d_v, COLUMNS);
	w.bounds = by_data ? divide_up(f->seq_len, CHUNK) - 1 : 0;
	w.dq = static_cast<float *>(workspace);
	w.dk = w.dq + w.column_blocks * rows;
	w.flow = w.dk + w.column_blocks * rows;
	w.states = reinterpret_cast<bf16 *>(w.flow + w.column_blocks * f->batch * f->n_heads *
	                                                     w.bounds * f->d_k);
	return w;
}

template <int LANE_ROWS>
static enum status run(struct device *device, const struct matrix_recurrence_backward_args *a,
                       const struct work &w)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const dim3 grid((unsigned)w.column_blocks, (unsigned)f->n_heads, (unsigned)f->batch);
	const dim3 chunks((unsigned)divide_up(f->seq_len, CHUNK), (unsigned)f->n_heads,
	                  (unsigned)f->batch);
	enum status status = launch(device, "matrix_recurrence_backward", forward_kernel<LANE_ROWS>,
	                            grid, THREADS, sizeof(struct group), *a, w);

	if (status == STATUS_OK)
		status = launch(device, "matrix_recurrence_backward", backward_kernel<LANE_ROWS>,
		                grid, THREADS, sizeof(struct group), *a, w);
	if (status != STATUS_OK)
		return status;
	return launch(device, "matrix_recurrence_backward", finish_kernel, chunks, MAX_ROWS,
	              MAX_ROWS / WARP * sizeof(float), *a, w);
}

} // namespace

extern "C" const char *portable_matrix_recurrence_backward_unsupported(const struct device *,
                                                                       const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *f = &a->forward;

	if (f->rule != RULE_PLAIN)
		return "only the plain rule";
	if (!is_known_decay(f->decay))
		return "an unknown decay";
	if (f->d_k > MAX_ROWS)
		return "d_k above 256";
	return f->batch > 65535 || f->n_heads > 65535 ? "more than 65535 sequences or heads" : NULL;
}

extern "C" size_t portable_matrix_recurrence_backward_workspace(const struct device *,
                                                                const void *args)
{
	const struct matrix_recurrence_args *f =
	        &static_cast<const struct matrix_recurrence_backward_args *>(args)->forward;
	const struct work w = work_of(f, NULL);
	const int64_t states = f->batch * f->n_heads * w.bounds * f->d_k * f->d_v;

	return (size_t)(reinterpret_cast<const char *>(w.states + states) - (const char *)NULL);
}

extern "C" enum status portable_matrix_recurrence_backward(struct device *device, const void *args,
                                                           void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct work w = work_of(&a->forward, workspace);

	if (a->forward.d_k <= 32)
		return run<1>(device, a, w);
	if (a->forward.d_k <= 64)
		return run<2>(device, a, w);
	return a->forward.d_k <= 128 ? run<4>(device, a, w) : run<8>(device, a, w);
}
