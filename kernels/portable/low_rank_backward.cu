/*
 * Gradients of the gates of low rank. Bound by memory, at small ranks by the gradient of the gate
 * and the gate itself, from which its slope is taken: that of what was rounded is off by no more
 * than a rounding.
 *
 * Of a rank of up to 16 one kernel does all of it. A warp has 64 columns of every token, a block
 * all of them. The gradient of the logits goes, in bf16, through a tile in shared memory into two
 * products, with the weights and with x; the warps' shares of dx are added there, those of dweight
 * and dbias stay in registers from tile to tile. A vector of the next tile is loaded as soon as
 * that of this one is used.
 *
 * Of other ranks one kernel leaves dlogit and sums it, and the products are cuBLASLt's.
 */
#include <algorithm>

#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/product.cuh"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 8, ROWS = 4;
constexpr char NAME[] = "decay_gate_backward";

static __device__ __forceinline__ const bf16 *elements(const void *tensor)
{
	return static_cast<const bf16 *>(tensor);
}

/* What the slope is made of: factor (1 - 2^-x), x = reach out. Where x is small that cancels, and
 * its series is taken. */
struct slope_terms {
	float reach, factor, linear, quadratic;
};

/* By what softplus is -1/N, -e^log_rate or 1 times the gate: that times log2(e) is x. */
template <enum low_rank FORM>
static __device__ __forceinline__ struct slope_terms terms_of(const struct decay_gate_args &f,
                                                              int64_t column)
{
	float reach = LOG2E, factor = 1.0f;

	if (FORM == LOW_RANK_DECAY) {
		reach = -LOG2E * f.normalizer;
		factor = 1.0f / f.normalizer;
	}
	if (FORM == LOW_RANK_RATE) {
		const float log_rate = f.log_rate[column / (f.d_out / f.n_heads)];

		reach = -LOG2E * __expf(-log_rate);
		factor = -__expf(log_rate);
	}
	return {reach, factor, LN2 * factor, -0.5f * LN2 * LN2 * factor};
}

/* A token's dlogit from its dout and out. */
template <enum low_rank FORM>
static __device__ __forceinline__ float dlogit_of(float dout, float out,
                                                  const struct slope_terms &s)
{
	if (FORM == LOW_RANK_LOGIT || FORM == LOW_RANK_TANH)
		return dout;
	/* -exp(logit) is its own derivative. */
	if (FORM == LOW_RANK_EXP)
		return dout * out;
	const float x = s.reach * out, far = fmaf(-s.factor, exp2_fast(-x), s.factor);

	return dout * (x < 0.02f ? x * fmaf(s.quadratic, x, s.linear) : far);
}

/* What is read but for dout. */
template <enum low_rank FORM> static __device__ constexpr bool reads_out()
{
	return FORM != LOW_RANK_LOGIT && FORM != LOW_RANK_TANH;
}

/*
 * A thread's eight columns of rows blockIdx.y, blockIdx.y + gridDim.y, ..., ROWS of them loaded at
 * once: dlogit, unless that is dout, and parts [gridDim.y, 1 or 2, d_out] of dbias and, of a rate,
 * of what becomes dlog_rate: a decay is its own derivative with respect to that.
 */
template <enum low_rank FORM>
static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        slope_kernel(const __grid_constant__ struct decay_gate_backward_args a, float *parts)
{
	const struct decay_gate_args &f = a.forward;
	const int64_t column = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t step = gridDim.y;
	float sum[8] = {}, rates[8] = {};

	if (column >= f.d_out)
		return;
	const struct slope_terms s = terms_of<FORM>(f, column);
	for (int64_t n = blockIdx.y; n < f.n_tokens; n += ROWS * step) {
		vector8 douts[ROWS] = {}, outs[ROWS] = {};

#pragma unroll
		for (int i = 0; i < ROWS; i++) {
			const int64_t place = (n + i * step) * f.d_out + column;

			if (n + i * step >= f.n_tokens)
				continue;
			douts[i] = load8(elements(a.dout) + place);
			if (reads_out<FORM>())
				outs[i] = load8(elements(f.out) + place);
		}
#pragma unroll
		for (int i = 0; i < ROWS; i++) {
			float d[8], out[8];

			unpack8(d, douts[i]);
			unpack8(out, outs[i]);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				if (FORM == LOW_RANK_RATE)
					rates[j] = fmaf(d[j], out[j], rates[j]);
				d[j] = dlogit_of<FORM>(d[j], out[j], s);
				sum[j] += d[j];
			}
			if (reads_out<FORM>() && n + i * step < f.n_tokens)
				store8(static_cast<bf16 *>(a.dlogit) + (n + i * step) * f.d_out +
				               column,
				       d);
		}
	}
	parts += blockIdx.y * (FORM == LOW_RANK_RATE ? 2 : 1) * f.d_out + column;
	store8f(parts, sum);
	if (FORM == LOW_RANK_RATE)
		store8f(parts + f.d_out, rates);
}

/* to [n_tokens, rank] = tanh(x). */
static __global__ void __launch_bounds__(THREADS)
        tanh_kernel(const __grid_constant__ struct decay_gate_args f, bf16 *to)
{
	const int64_t index = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float x[8];

	if (index >= f.n_tokens * f.rank)
		return;
	load8(x, elements(f.x) + index / f.rank * f.x_stride + index % f.rank);
#pragma unroll
	for (int j = 0; j < 8; j++)
		x[j] = tanh_of(x[j]).value;
	store8(to + index, x);
}

/* dx, of tanh(x), becomes that of x. */
static __global__ void __launch_bounds__(THREADS)
        tanh_slope_kernel(const __grid_constant__ struct decay_gate_backward_args a)
{
	const struct decay_gate_args &f = a.forward;
	const int64_t index = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t place = index / f.rank * f.x_stride + index % f.rank;
	float x[8], dx[8];

	if (index >= f.n_tokens * f.rank)
		return;
	load8(x, elements(f.x) + place);
	load8(dx, static_cast<const bf16 *>(a.dx) + place);
#pragma unroll
	for (int j = 0; j < 8; j++)
		dx[j] *= tanh_of(x[j]).slope;
	store8(static_cast<bf16 *>(a.dx) + place, dx);
}

/* ---- ranks of up to 16 ---- */

constexpr int RANK = 16, TOKENS = 16, COLUMNS = 64, MOST_WARPS = 16;
/* Elements of a row of a tile, and of x, so that eight rows lie in different banks. */
constexpr int PITCH = COLUMNS + 8, X_PITCH = RANK + 8;
constexpr int VECTORS = TOKENS * COLUMNS / 8 / WARP; /* of a tile, that a lane has */

/* The shared memory: the weights as each lane wants them, the warps' shares of dx, a tile of each
 * warp, and two of x. */
struct narrow_places {
	vector8 *weights; /* of this lane, WARP apart */
	float *dx;
	bf16 *tile, *x;
};

static __device__ __forceinline__ struct narrow_places narrow_places_of(int warps)
{
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	auto *weights = reinterpret_cast<vector8 *>(shared_memory);
	auto *dx = reinterpret_cast<float *>(weights + warps * COLUMNS / 16 * WARP);
	auto *tiles = reinterpret_cast<bf16 *>(dx + warps * TOKENS * RANK);

	return {weights + warp * COLUMNS / 16 * WARP + lane, dx, tiles + warp * TOKENS * PITCH,
	        tiles + warps * TOKENS * PITCH};
}

static size_t narrow_shared(int warps)
{
	return (size_t)(warps * COLUMNS / 16 * WARP) * sizeof(vector8) +
	       (size_t)(warps * TOKENS * RANK) * sizeof(float) +
	       (size_t)(warps * TOKENS * PITCH + 2 * TOKENS * X_PITCH) * sizeof(bf16);
}

/* Copies the rows of x of a tile in the background; zeros for what is not there. */
static __device__ __forceinline__ void copy_x(bf16 *to, const struct decay_gate_args &f,
                                              int64_t token)
{
	const int lane = threadIdx.x % WARP;
	const int64_t n = token + lane / 2, r = lane % 2 * 8;

	copy16_async(to + lane / 2 * X_PITCH + r, elements(f.x) + n * f.x_stride + r,
	             n < f.n_tokens && r < f.rank);
	copy_commit();
}

/* A warp's columns of the weights as the right sides of products over 16 columns: of the first
 * eight ranks and of the others. */
static __device__ __forceinline__ void store_weights(vector8 *to, const struct decay_gate_args &f,
                                                     int64_t first)
{
	const int lane = threadIdx.x % WARP;

	for (int k = 0; k < COLUMNS / 16; k++) {
		vector8 right;

#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int64_t column = first + 16 * k + 8 * (i % 2) + lane % 4 * 2;
			const int r = i / 2 * 8 + lane / 4;
			const bf16 *w = elements(f.weight) + column * f.rank + r;
			const bool there = r < f.rank && column < f.d_out;

			right.pair[i] =
			        there ? pack(__bfloat162float(w[0]), __bfloat162float(w[f.rank]))
			              : 0;
		}
		to[k * WARP] = right;
	}
}

/* The sum over the lanes that have the same columns; lanes 0 .. 7 store theirs. */
static __device__ __forceinline__ void store_lane_sums(float *to, float (&sum)[8], bool there)
{
#pragma unroll
	for (int j = 0; j < 8; j++) {
		sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 8);
		sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 16);
	}
	if (there && threadIdx.x % WARP < 8)
		store8f(to, sum);
}

/* dx of a tile from the warps' shares, two neighbours a thread. */
static __device__ __forceinline__ void store_dx(const struct decay_gate_backward_args &a,
                                                const float *shares, int64_t token, int warps)
{
	const struct decay_gate_args &f = a.forward;

	for (int i = threadIdx.x; i < TOKENS * RANK / 2; i += blockDim.x) {
		const int64_t n = token + i / (RANK / 2), r = i % (RANK / 2) * 2;
		float low = 0.0f, high = 0.0f;

		for (int warp = 0; warp < warps; warp++) {
			const float *share = shares + warp * TOKENS * RANK + 2 * i;

			low += share[0];
			high += share[1];
		}
		if (n < f.n_tokens && r < f.rank)
			*reinterpret_cast<uint32_t *>(static_cast<bf16 *>(a.dx) + n * f.x_stride +
			                              r) = pack(low, high);
	}
}

/* parts [gridDim.x, d_out (rank + 1)]: dweight and dbias. */
template <enum low_rank FORM>
static __global__ void __launch_bounds__(MOST_WARPS *WARP, 1)
        narrow_backward_kernel(const __grid_constant__ struct decay_gate_backward_args a,
                               float *parts)
{
	const struct decay_gate_args &f = a.forward;
	const int warps = (int)blockDim.x / WARP, warp = threadIdx.x / WARP;
	const int lane = threadIdx.x % WARP;
	const struct narrow_places to = narrow_places_of(warps);
	const int64_t first = (int64_t)warp * COLUMNS, column = first + lane % 8 * 8;
	const int step = (int)gridDim.x * TOKENS;
	const bool inside = column < f.d_out;
	const struct slope_terms s = terms_of<FORM>(f, inside ? column : 0);
	float dweight[COLUMNS / 16][RANK / 8][4] = {}, sum[8] = {};
	vector8 douts[VECTORS], outs[VECTORS] = {};
	int64_t token = (int64_t)blockIdx.x * TOKENS;
	/* The lane's first row of the tile to be loaded, and how many rows there are from it on. */
	int64_t place = (token + lane / 8) * f.d_out + column;
	int rows = inside ? (int)min(f.n_tokens - token - lane / 8, (int64_t)1 << 30) : 0;
	const auto load = [&](int i) {
		const bool there = 4 * i < rows;
		const int64_t at = place + i * 4 * (int)f.d_out;

		douts[i] = {};
		if (there)
			douts[i] = load8(elements(a.dout) + at);
		if (!reads_out<FORM>())
			return;
		outs[i] = {};
		if (there)
			outs[i] = load8(elements(f.out) + at);
	};

	store_weights(to.weights, f, first);
#pragma unroll
	for (int i = 0; i < VECTORS; i++)
		load(i);
	if (warp == 0) {
		copy_x(to.x, f, token);
		copy_wait<0>();
	}
	__syncthreads();
	for (int parity = 0; token < f.n_tokens; token += step, parity ^= 1) {
		float dx[RANK / 8][4] = {};
		uint32_t left[4], x[4];

		place += step * f.d_out;
		rows -= step;
		if (warp == 0)
			copy_x(to.x + (parity ^ 1) * TOKENS * X_PITCH, f, token + step);
#pragma unroll
		for (int i = 0; i < VECTORS; i++) {
			float d[8], out[8];

			unpack8(d, douts[i]);
			unpack8(out, outs[i]);
			load(i);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				d[j] = dlogit_of<FORM>(d[j], out[j], s);
				sum[j] += d[j];
			}
			store8(to.tile + (lane / 8 + 4 * i) * PITCH + lane % 8 * 8, d);
		}
		__syncwarp();
		load_matrices_transposed(x, to.x + parity * TOKENS * X_PITCH + lane % 16 * X_PITCH +
		                                    lane / 16 * 8);
#pragma unroll
		for (int k = 0; k < COLUMNS / 16; k++) {
			const vector8 right = to.weights[k * WARP];

			/* dx: tokens by columns. */
			load_matrices(left, to.tile + lane % 16 * PITCH + 16 * k + lane / 16 * 8);
#pragma unroll
			for (int n = 0; n < RANK / 8; n++)
				multiply_add(dx[n], left, right.pair[2 * n], right.pair[2 * n + 1]);
			/* dweight: columns by tokens. */
			load_matrices_transposed(left, to.tile +
			                                       (lane % 8 + lane / 16 * 8) * PITCH +
			                                       16 * k + lane / 8 % 2 * 8);
#pragma unroll
			for (int n = 0; n < RANK / 8; n++)
				multiply_add(dweight[k][n], left, x[2 * n], x[2 * n + 1]);
		}
		/* The shares of the tile before have been added. */
		__syncthreads();
#pragma unroll
		for (int i = 0; i < RANK / 8 * 4; i++) {
			const int row = lane / 4 + i / 2 % 2 * 8;

			to.dx[warp * TOKENS * RANK + row * RANK + i / 4 * 8 + lane % 4 * 2 +
			      i % 2] = dx[i / 4][i % 4];
		}
		if (warp == 0)
			copy_wait<0>();
		__syncthreads();
		store_dx(a, to.dx, token, warps);
	}
	parts += blockIdx.x * f.d_out * (f.rank + 1);
#pragma unroll
	for (int i = 0; i < COLUMNS / 16 * RANK / 8 * 4; i++) {
		const int64_t own = first + i / 8 * 16 + i / 2 % 2 * 8 + lane / 4;
		const int64_t r = i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;

		if (own < f.d_out && r < f.rank)
			parts[own * f.rank + r] = dweight[i / 8][i / 4 % 2][i % 4];
	}
	store_lane_sums(parts + f.d_out * f.rank + column, sum, inside);
}

/* ---- launches ---- */

/* Whether one kernel does it all. */
static bool is_narrow(const struct decay_gate_args *f)
{
	const bool plain = !has_tanh(f->form) && f->form != LOW_RANK_RATE;

	return plain && f->rank <= RANK && f->d_out <= MOST_WARPS * COLUMNS;
}

static int narrow_warps(const struct decay_gate_args *f)
{
	return (int)divide_up(f->d_out, COLUMNS);
}

/* Rows of partial sums, and what is in one. */
static int64_t count_parts(const struct device *device, const struct decay_gate_args *f)
{
	if (is_narrow(f))
		return count_shares(device, divide_up(f->n_tokens, TOKENS),
		                    MOST_WARPS / narrow_warps(f), 1);
	return count_shares(device, f->n_tokens, BLOCKS_PER_SM, divide_up(f->d_out, 8 * THREADS));
}

static int64_t part_size(const struct decay_gate_args *f)
{
	return f->d_out * ((is_narrow(f) ? f->rank : 0) + (f->form == LOW_RANK_RATE ? 2 : 1));
}

using backward_kernel = void (*)(struct decay_gate_backward_args, float *);

static backward_kernel slope_kernel_of(enum low_rank form)
{
	switch (form) {
	case LOW_RANK_DECAY:
		return slope_kernel<LOW_RANK_DECAY>;
	case LOW_RANK_RATE:
		return slope_kernel<LOW_RANK_RATE>;
	case LOW_RANK_EXP:
		return slope_kernel<LOW_RANK_EXP>;
	case LOW_RANK_STEP:
		return slope_kernel<LOW_RANK_STEP>;
	default:
		return slope_kernel<LOW_RANK_LOGIT>;
	}
}

static backward_kernel narrow_kernel_of(enum low_rank form)
{
	switch (form) {
	case LOW_RANK_DECAY:
		return narrow_backward_kernel<LOW_RANK_DECAY>;
	case LOW_RANK_STEP:
		return narrow_backward_kernel<LOW_RANK_STEP>;
	default:
		return narrow_backward_kernel<LOW_RANK_LOGIT>;
	}
}

/* The first stage of all sums, and of a narrow rank dx. */
static enum status sum_tokens(struct device *device, const struct decay_gate_backward_args *a,
                              float *parts)
{
	const struct decay_gate_args *f = &a->forward;
	const unsigned rows = (unsigned)count_parts(device, f);
	const int warps = narrow_warps(f);

	if (is_narrow(f))
		return launch(device, NAME, narrow_kernel_of(f->form), dim3(rows), warps * WARP,
		              narrow_shared(warps), *a, parts);
	return launch(device, NAME, slope_kernel_of(f->form),
	              dim3((unsigned)divide_up(f->d_out, 8 * THREADS), rows), THREADS, 0, *a,
	              parts);
}

/* The second: dbias and dlog_rate, and of a narrow rank dweight. */
static enum status add_parts(struct device *device, const struct decay_gate_backward_args *a,
                             float *parts)
{
	const struct decay_gate_args *f = &a->forward;
	const int64_t rows = count_parts(device, f), stride = part_size(f), d_out = f->d_out;
	float *columns = parts + rows * stride;
	enum status status = STATUS_OK;

	if (is_narrow(f)) {
		status =
		        column_sums(device, NAME, parts, rows, stride, d_out * f->rank, a->dweight);
		parts += d_out * f->rank;
	}
	if (status == STATUS_OK)
		status = column_sums(device, NAME, parts, rows, stride, d_out, a->dbias);
	if (status != STATUS_OK || f->form != LOW_RANK_RATE)
		return status;
	status = column_sums(device, NAME, parts + d_out, rows, stride, d_out, columns);
	if (status != STATUS_OK)
		return status;
	return part_sums(device, NAME, columns, f->n_heads, d_out / f->n_heads, a->dlog_rate);
}

} // namespace

extern "C" const char *portable_decay_gate_backward_unsupported(const struct device *,
                                                                const void *args)
{
	const auto *a = static_cast<const struct decay_gate_backward_args *>(args);
	const struct decay_gate_args *f = &a->forward;

	if (!is_known_low_rank(f->form))
		return "an unknown gate of low rank";
	if (f->form == LOW_RANK_RATE && f->d_out / f->n_heads % 8)
		return "widths must be multiples of 8";
	return either(check_widths(f->rank, f->x_stride, f->d_out), check_aligned(f->x, a->dx));
}

/* Bytes of partial sums and of products, which take turns; after them is tanh(x). */
static size_t low_rank_sums(const struct device *device, const struct decay_gate_args *f)
{
	const size_t parts =
	        (size_t)(count_parts(device, f) * part_size(f) + f->d_out) * sizeof(float);

	return is_narrow(f) ? parts : (std::max(parts, (size_t)GEMM_WORKSPACE) + 255) / 256 * 256;
}

extern "C" size_t portable_decay_gate_backward_workspace(const struct device *device,
                                                         const void *args)
{
	const auto *a = static_cast<const struct decay_gate_backward_args *>(args);
	const struct decay_gate_args *f = &a->forward;

	return low_rank_sums(device, f) +
	       (has_tanh(f->form) ? (size_t)(f->n_tokens * f->rank) * sizeof(bf16) : 0);
}

extern "C" enum status portable_decay_gate_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const auto *a = static_cast<const struct decay_gate_backward_args *>(args);
	const struct decay_gate_args *f = &a->forward;
	const void *dlogit = is_logit(f->form) ? a->dout : a->dlogit;
	const int64_t threads = f->n_tokens * (f->rank / 8);
	const bool tanh = has_tanh(f->form);
	float *parts = static_cast<float *>(workspace);
	auto *input =
	        reinterpret_cast<bf16 *>(static_cast<char *>(workspace) + low_rank_sums(device, f));
	enum status status = sum_tokens(device, a, parts);

	if (status == STATUS_OK)
		status = add_parts(device, a, parts);
	if (status != STATUS_OK || is_narrow(f))
		return status;
	if (tanh)
		status = launch_each(device, NAME, tanh_kernel, threads, THREADS, *f, input);
	/* dweight = dlogit^T x, or tanh(x). */
	struct gemm g = product(f->d_out, f->n_tokens, f->rank, {dlogit, true},
	                        {tanh ? input : f->x, false}, a->dweight, DTYPE_F32);
	g.b_leading = tanh ? f->rank : f->x_stride;
	if (status == STATUS_OK)
		status = gemm_run(device, &g, workspace);
	/* dx = dlogit W. */
	g = product(f->n_tokens, f->d_out, f->rank, {dlogit, false}, {f->weight, false}, a->dx,
	            DTYPE_BF16);
	g.out_leading = f->x_stride;
	if (status == STATUS_OK)
		status = gemm_run(device, &g, workspace);
	if (status != STATUS_OK || !tanh)
		return status;
	return launch_each(device, NAME, tanh_slope_kernel, threads, THREADS, *a);
}
