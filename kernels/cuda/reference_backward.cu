/*
 * The fp64 reference of gradients on the device, as naive as that of the
 * forward. A gradient of attention needs every query that sees a key; so that
 * sequences of any length can be checked, only the rows named are computed,
 * from the lse and the o that the forward left, which are verified themselves.
 */
#include "kernels/cuda/reference.cuh"

#include <cuda_bf16.h>
#include <math.h>

#include "kernels/cuda/gemm.h"

using namespace reference;

/* ---- dense ---- */

static __global__ void transpose_kernel(int64_t rows, int64_t columns, const double *from,
                                        double *to)
{
	FOR_ALL(i, rows * columns)
	to[i % columns * rows + i / columns] = from[i];
}

void reference::linear_input_gradient(int64_t n, int64_t d_in, int64_t d_out, const double *dy,
                                      const double *weight, double *dx)
{
	double *transposed = NULL;
	const enum status status = take(d_in * d_out, &transposed);

	note(status);
	if (status != STATUS_OK)
		return;
	transpose_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(d_out, d_in, weight, transposed);
	note_launch("reference transpose");
	note(gemm_double(n, d_in, d_out, dy, transposed, dx));
	release(transposed);
}

static __global__ void set_columns_kernel(int64_t n_rows, int64_t width, int64_t first,
                                          int64_t count, const double *from, double *to)
{
	FOR_ALL(i, n_rows * count)
	to[i / count * width + first + i % count] = from[i];
}

void reference::set_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count,
                            const double *from, double *to)
{
	set_columns_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(n_rows, width, first, count, from,
	                                                        to);
	note_launch("reference set_columns");
}

/* ---- attention ---- */

static __device__ bool sees(const struct reference_attention &a, int64_t t, int64_t key)
{
	switch (a.mask) {
	case MASK_CAUSAL:
		return key <= t;
	case MASK_WINDOW:
		return key <= t && t - key <= a.window;
	case MASK_CHUNK:
		return key < t / a.chunk;
	default:
		return true;
	}
}

/* What belongs to one query and head alone, a warp each: delta [H, T], the gradients of gate, own
 * score and own value, and d_o where a gate makes it another than dout. */
static __global__ void __launch_bounds__(THREADS)
        own_kernel(struct reference_attention a, struct reference_attention_left left,
                   const double *dout, struct reference_attention_grads grads, double *d_o,
                   double *delta)
{
	const int lane = threadIdx.x % 32;
	const int64_t d = a.d_head, warps = (int64_t)gridDim.x * (THREADS / 32);

	for (int64_t row = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / 32;
	     row < a.seq_len * a.n_heads; row += warps) {
		const int64_t t = row / a.n_heads, h = row % a.n_heads;
		double sum = 0, own = 0;

		for (int64_t i = lane; i < d; i += 32) {
			const double o = left.out[row * d + i];
			const double g = a.gate ? sigmoid64(a.gate[row * d + i]) : 1;
			const double x = dout[row * d + i] * g;

			if (a.gate) {
				d_o[row * d + i] = x;
				grads.dgate[row * d + i] = x * o * (1 - g);
			}
			if (a.own_score)
				own += x * a.own_value[row * d + i];
			sum += x * o;
		}
		sum = warp_sum(sum);
		own = warp_sum(own);
		if (lane == 0)
			delta[h * a.seq_len + t] = sum;
		if (!a.own_score)
			continue;
		const double p = exp(a.own_score[row] - left.lse[h * a.seq_len + t]);

		if (lane == 0)
			grads.down_score[row] = p * (own - sum);
		for (int64_t i = lane; i < d; i += 32)
			grads.down_value[row * d + i] = p * (a.gate ? d_o : dout)[row * d + i];
	}
}

constexpr int WARPS = 8, LANE_CHANNELS = MAX_HEAD / 32;

/* Adds the warps' sums and writes them. */
static __device__ void store_sums(double (&sum)[LANE_CHANNELS], int64_t d, double *to)
{
	__shared__ double parts[WARPS][MAX_HEAD];
	const int lane = threadIdx.x % 32;

	__syncthreads();
	for (int c = 0; c < LANE_CHANNELS; c++)
		parts[threadIdx.x / 32][32 * c + lane] = sum[c];
	__syncthreads();
	for (int64_t i = threadIdx.x; i < d; i += 32 * WARPS) {
		double total = 0;

		for (int w = 0; w < WARPS; w++)
			total += parts[w][i];
		to[i] = total;
	}
}

/* scale dS and P of one query and key, all lanes alike; the products are shared by the lanes. */
static __device__ void differentiate(const struct reference_attention &a, const double *q,
                                     const double *k, const double *v, const double *d_o,
                                     double lse, double delta, double *p, double *ds)
{
	double score = 0, dp = 0;

	for (int64_t i = threadIdx.x % 32; i < a.d_head; i += 32) {
		score += q[i] * k[i];
		dp += d_o[i] * v[i];
	}
	*p = exp(a.scale * warp_sum(score) - lse);
	*ds = a.scale * *p * (warp_sum(dp) - delta);
}

/* A block per query and column group of q; its warps share the keys. */
static __global__ void __launch_bounds__(32 * WARPS)
        queries_kernel(struct reference_attention a, const double *lse, const double *delta,
                       const double *d_o, const int64_t *queries, double *dq)
{
	const int64_t d = a.d_head, t = queries[blockIdx.x], group = blockIdx.y;
	const double *q = a.q + (t * a.q_heads + group) * d;
	double sum[LANE_CHANNELS] = {};

	for (int64_t h = group; h < a.n_heads; h += a.q_heads)
		for (int64_t s = threadIdx.x / 32; s < a.kv_len; s += WARPS) {
			const int64_t key = (s * a.n_heads + h) * d;
			double p, ds;

			if (!sees(a, t, s))
				continue;
			differentiate(a, q, a.k + key, a.v + key, d_o + (t * a.n_heads + h) * d,
			              lse[h * a.seq_len + t], delta[h * a.seq_len + t], &p, &ds);
			for (int64_t i = threadIdx.x % 32, c = 0; i < d; i += 32, c++)
				sum[c] += ds * a.k[key + i];
		}
	store_sums(sum, d, dq + (t * a.q_heads + group) * d);
}

/* A block per key and head; its warps share the queries. */
static __global__ void __launch_bounds__(32 * WARPS)
        keys_kernel(struct reference_attention a, const double *lse, const double *delta,
                    const double *d_o, const int64_t *keys, double *dk, double *dv)
{
	const int64_t d = a.d_head, s = keys[blockIdx.x], h = blockIdx.y;
	const int64_t key = (s * a.n_heads + h) * d;
	double k_sum[LANE_CHANNELS] = {}, v_sum[LANE_CHANNELS] = {};

	for (int64_t t = threadIdx.x / 32; t < a.seq_len; t += WARPS) {
		const double *q = a.q + (t * a.q_heads + h % a.q_heads) * d;
		const double *from = d_o + (t * a.n_heads + h) * d;
		double p, ds;

		if (!sees(a, t, s))
			continue;
		differentiate(a, q, a.k + key, a.v + key, from, lse[h * a.seq_len + t],
		              delta[h * a.seq_len + t], &p, &ds);
		for (int64_t i = threadIdx.x % 32, c = 0; i < d; i += 32, c++) {
			k_sum[c] += ds * q[i];
			v_sum[c] += p * from[i];
		}
	}
	store_sums(k_sum, d, dk + key);
	store_sums(v_sum, d, dv + key);
}

enum status reference::attention_backward_rows(const struct reference_attention *a,
                                               const struct reference_attention_left *left,
                                               const double *dout, int64_t n_queries,
                                               const int64_t *queries, int64_t n_keys,
                                               const int64_t *keys,
                                               const struct reference_attention_grads *grads)
{
	const int64_t rows = a->seq_len * a->n_heads;
	double *delta = NULL;

	if (a->d_head > MAX_HEAD || a->batch != 1)
		return status_set(STATUS_UNSUPPORTED, "reference: no such attention on the device");
	const enum status status = take(rows * (a->gate ? a->d_head + 1 : 1), &delta);
	if (status != STATUS_OK)
		return status;
	double *d_o = delta + rows;
	const double *ungated = a->gate ? d_o : dout;
	int64_t *query_list = upload_rows(n_queries, queries);
	int64_t *key_list = upload_rows(n_keys, keys);
	if (query_list && key_list) {
		own_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(*a, *left, dout, *grads, d_o,
		                                                delta);
		if (n_queries > 0)
			queries_kernel<<<dim3((unsigned)n_queries, (unsigned)a->q_heads),
			                 32 * WARPS, 0, cuda_stream()>>>(
			        *a, left->lse, delta, ungated, query_list, grads->dq);
		if (n_keys > 0)
			keys_kernel<<<dim3((unsigned)n_keys, (unsigned)a->n_heads), 32 * WARPS, 0,
			              cuda_stream()>>>(*a, left->lse, delta, ungated, key_list,
			                               grads->dk, grads->dv);
		note_launch("reference attention_backward");
	}
	cudaFree(query_list);
	cudaFree(key_list);
	release(delta);
	return report();
}

/* ---- recurrences ---- */

/* A block per chunk and head, a thread per channel; k_scan and v_scan [T, H, d] are scratch. dq
 * holds dq_out rotated back, dk zeros, dk_final dk_chunk rotated back. */
static __global__ void __launch_bounds__(MAX_HEAD)
        rat_scan_backward_kernel(struct reference_rat_scan s, struct reference_rat_scan_grads grads,
                                 const double *dk_final, double *k_scan, double *v_scan)
{
	const int64_t d = s.d_head, i = threadIdx.x, h = blockIdx.x % s.n_heads;
	const int64_t chunks = (s.seq_len + s.chunk - 1) / s.chunk;
	const int64_t c = blockIdx.x / s.n_heads % chunks, b = blockIdx.x / s.n_heads / chunks;
	const int64_t first = c * s.chunk;
	const int64_t end = first + s.chunk < s.seq_len ? first + s.chunk : s.seq_len;
	const int64_t final = ((b * chunks + c) * s.n_heads + h) * d + i;

	if (i >= d)
		return;
	double k = 0, v = 0, dkt = dk_final[final], dvt = grads.dv_chunk[final];
	for (int64_t t = first; t < end; t++) {
		const int64_t token = b * s.seq_len + t, at = (token * s.n_heads + h) * d + i;
		const double g = sigmoid64(s.gate[at] + s.gate_bias[h * d + i]);

		k = g * k + (1 - g) * s.k[(token * s.groups + h % s.groups) * d + i];
		v = g * v + (1 - g) * s.v[at];
		k_scan[at] = k;
		v_scan[at] = v;
	}
	for (int64_t t = end - 1; t >= first; t--) {
		const int64_t token = b * s.seq_len + t, at = (token * s.n_heads + h) * d + i;
		const int64_t shared_at = (token * s.groups + h % s.groups) * d + i;
		const int64_t before = at - s.n_heads * d;
		const double logit = s.gate[at] + s.gate_bias[h * d + i];
		const double g = sigmoid64(logit), input = sigmoid64(-logit);
		const double ds = s.scale * grads.down_score[token * s.n_heads + h];

		dkt += ds * s.q[shared_at];
		dvt += grads.dv_scan[at];
		atomicAdd(grads.dq + shared_at, ds * k_scan[at]);
		atomicAdd(grads.dk + shared_at, input * dkt);
		grads.dv[at] = input * dvt;
		grads.dgate[at] = g * input *
		                  (dkt * ((t > first ? k_scan[before] : 0) - s.k[shared_at]) +
		                   dvt * ((t > first ? v_scan[before] : 0) - s.v[at]));
		dkt *= g;
		dvt *= g;
	}
}

enum status reference::rat_scan_backward(const struct reference_rat_scan *s,
                                         const struct reference_rat_scan_grads *grads)
{
	const int64_t chunks = (s->seq_len + s->chunk - 1) / s->chunk;
	const int64_t count = s->batch * s->seq_len * s->n_heads * s->d_head;
	const int64_t finals = s->batch * chunks * s->n_heads * s->d_head;
	const int64_t shared = s->batch * s->seq_len * s->groups * s->d_head;
	double *scratch = NULL;

	if (s->d_head > MAX_HEAD)
		return status_set(STATUS_UNSUPPORTED, "reference: no such scan on the device");
	const enum status status = take(2 * count + finals, &scratch);
	if (status != STATUS_OK)
		return status;
	double *dk_final = scratch + 2 * count;
	if (s->rope) {
		cuda_reference.rotate_backward(s->batch, s->seq_len, s->groups, s->d_head, 0,
		                               s->chunk, grads->dq_out, grads->dq);
		cuda_reference.rotate_backward(s->batch, chunks, s->n_heads, s->d_head, 0, 1,
		                               grads->dk_chunk, dk_final);
	} else {
		set_columns(1, shared, 0, shared, grads->dq_out, grads->dq);
		set_columns(1, finals, 0, finals, grads->dk_chunk, dk_final);
	}
	note(cuda_status(
	        cudaMemsetAsync(grads->dk, 0, (size_t)shared * sizeof(double), cuda_stream()),
	        "reference rat_scan_backward", __FILE__, __LINE__));
	rat_scan_backward_kernel<<<(unsigned)(s->batch * chunks * s->n_heads),
	                           (unsigned)((s->d_head + 31) / 32 * 32), 0, cuda_stream()>>>(
	        *s, *grads, dk_final, scratch, scratch + count);
	note_launch("reference rat_scan_backward");
	release(scratch);
	return report();
}

/* A thread per sequence and channel; states [B, T, D] are scratch. */
static __global__ void recurrence_backward_kernel(struct reference_recurrence r, const double *dout,
                                                  struct reference_recurrence_grads grads,
                                                  double *__restrict__ states)
{
	FOR_ALL(index, r.batch * r.d_model)
	{
		const int64_t i = index % r.d_model, b = index / r.d_model;
		const double bias = r.gate_bias ? r.gate_bias[i] : 0;
		const double h0 = r.h0 ? r.h0[index] : 0;
		double h = h0, carry = 0;

#pragma unroll 4
		for (int64_t t = 0; t < r.seq_len; t++) {
			const int64_t at = (b * r.seq_len + t) * r.d_model + i;
			const double gate = r.gate[at] + bias;

			if (r.form == GATE_SIGMOID)
				h = sigmoid64(gate) * h + sigmoid64(-gate) * r.x[at];
			else
				h = exp(gate) * h + r.x[at];
			states[at] = h;
		}
#pragma unroll 4
		for (int64_t t = r.seq_len - 1; t >= 0; t--) {
			const int64_t at = (b * r.seq_len + t) * r.d_model + i;
			const double gate = r.gate[at] + bias, z = r.z ? sigmoid64(r.z[at]) : 1;
			const double before = t > 0 ? states[at - r.d_model] : h0;
			const double lambda = dout[at] * z + carry;

			if (r.z)
				grads.dz[at] = dout[at] * states[at] * z * (1 - z);
			if (r.form == GATE_SIGMOID) {
				const double g = sigmoid64(gate), input = sigmoid64(-gate);

				grads.dx[at] = input * lambda;
				grads.dgate[at] = lambda * (before - r.x[at]) * g * input;
				carry = g * lambda;
			} else {
				carry = exp(gate) * lambda;
				grads.dx[at] = lambda;
				grads.dgate[at] = carry * before;
			}
		}
	}
}

enum status reference::recurrence_backward(const struct reference_recurrence *r, const double *dout,
                                           const struct reference_recurrence_grads *grads)
{
	double *states = NULL;
	const enum status status = take(r->batch * r->seq_len * r->d_model, &states);

	if (status != STATUS_OK)
		return status;
	recurrence_backward_kernel<<<(unsigned)((r->batch * r->d_model + 31) / 32), 32, 0,
	                             cuda_stream()>>>(*r, dout, *grads, states);
	note_launch("reference recurrence_backward");
	release(states);
	return report();
}

/* ---- parameters, over all tokens ---- */

static __device__ double element(const void *tensor, enum dtype dtype, int64_t i)
{
	return dtype == DTYPE_BF16
	               ? (double)__bfloat162float(static_cast<const __nv_bfloat16 *>(tensor)[i])
	               : (double)static_cast<const float *>(tensor)[i];
}

constexpr int ROWS_AT_ONCE = 8, TOKEN_PARTS = 128;

/* A thread per column of x, for some rows of the result and a share of the tokens. */
static __global__ void __launch_bounds__(THREADS)
        weight_gradient_kernel(struct reference_gradient_of of, int64_t n_rows, const int64_t *rows,
                               double *sums)
{
	const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t first = (int64_t)blockIdx.y * ROWS_AT_ONCE;
	double sum[ROWS_AT_ONCE] = {};

	if (column >= of.d_in)
		return;
	for (int64_t n = blockIdx.z; n < of.n; n += TOKEN_PARTS) {
		const double x = element(of.x_norm, of.dtype, n * of.d_in + column);

#pragma unroll
		for (int r = 0; r < ROWS_AT_ONCE; r++)
			sum[r] += x * element(of.dy, of.dtype,
			                      n * of.d_out + rows[min(first + r, n_rows - 1)]);
	}
	for (int r = 0; r < ROWS_AT_ONCE && first + r < n_rows; r++)
		atomicAdd(sums + (first + r) * of.d_in + column, sum[r]);
}

/* Zeroed device memory, and its copy to the host at the end. */
static enum status take_zeros(int64_t count, double **memory)
{
	const enum status status = take(count, memory);

	if (status == STATUS_OK)
		note(cuda_status(
		        cudaMemsetAsync(*memory, 0, (size_t)count * sizeof(double), cuda_stream()),
		        "reference sums", __FILE__, __LINE__));
	return status;
}

enum status reference::weight_gradient_rows(const struct reference_gradient_of *of, int64_t n_rows,
                                            const int64_t *rows, double *host)
{
	double *sums = NULL;
	enum status status = take_zeros(n_rows * of->d_in, &sums);

	if (status != STATUS_OK)
		return status;
	int64_t *list = upload_rows(n_rows, rows);
	if (list)
		weight_gradient_kernel<<<
		        dim3((unsigned)((of->d_in + THREADS - 1) / THREADS),
		             (unsigned)((n_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE), TOKEN_PARTS),
		        THREADS, 0, cuda_stream()>>>(*of, n_rows, list, sums);
	note_launch("reference weight_gradient");
	status = cuda_reference.store(n_rows * of->d_in, sums, host);
	cudaFree(list);
	release(sums);
	return status;
}

/* columns of W, [n_columns, d_out]. */
static __global__ void pick_columns_kernel(struct reference_gradient_of of, const double *weight,
                                           int64_t n_columns, const int64_t *columns,
                                           double *picked)
{
	FOR_ALL(i, n_columns * of.d_out)
	picked[i] = weight[i % of.d_out * of.d_in + columns[i / of.d_out]];
}

/* A warp per token. */
static __global__ void __launch_bounds__(THREADS)
        norm_gradient_kernel(struct reference_gradient_of of, double eps, const double *picked,
                             int64_t n_columns, const int64_t *columns, double *sums)
{
	const int lane = threadIdx.x % 32;
	const int64_t warps = (int64_t)gridDim.x * (THREADS / 32);

	for (int64_t c = 0; c < n_columns; c += ROWS_AT_ONCE) {
		double total = 0; /* lane c of the warp: of column c */

		for (int64_t n = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / 32; n < of.n;
		     n += warps) {
			double square = 0, dot[ROWS_AT_ONCE] = {};

			for (int64_t i = lane; i < of.d_in; i += 32) {
				const double x = element(of.x, of.dtype, n * of.d_in + i);

				square += x * x;
			}
			for (int64_t i = lane; i < of.d_out; i += 32) {
				const double dy = element(of.dy, of.dtype, n * of.d_out + i);

#pragma unroll
				for (int r = 0; r < ROWS_AT_ONCE; r++)
					dot[r] += dy *
					          picked[min(c + r, n_columns - 1) * of.d_out + i];
			}
			const double rstd = 1 / sqrt(warp_sum(square) / (double)of.d_in + eps);
#pragma unroll
			for (int r = 0; r < ROWS_AT_ONCE; r++) {
				const double sum = warp_sum(dot[r]);

				if (lane == r && c + r < n_columns)
					total += sum * rstd *
					         element(of.x, of.dtype,
					                 n * of.d_in + columns[c + r]);
			}
		}
		if (lane < ROWS_AT_ONCE && c + lane < n_columns)
			atomicAdd(sums + c + lane, total);
	}
}

enum status reference::norm_gradient_columns(const struct reference_gradient_of *of, double eps,
                                             const double *weight, int64_t n_columns,
                                             const int64_t *columns, double *host)
{
	double *sums = NULL;
	enum status status = take_zeros(n_columns * (1 + of->d_out), &sums);

	if (status != STATUS_OK)
		return status;
	double *picked = sums + n_columns;
	int64_t *list = upload_rows(n_columns, columns);
	if (list) {
		pick_columns_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(*of, weight, n_columns,
		                                                         list, picked);
		norm_gradient_kernel<<<GRID / 8, THREADS, 0, cuda_stream()>>>(
		        *of, eps, picked, n_columns, list, sums);
	}
	note_launch("reference norm_gradient");
	status = cuda_reference.store(n_columns, sums, host);
	cudaFree(list);
	release(sums);
	return status;
}

static __global__ void column_sums_kernel(enum dtype dtype, const void *tensor, int64_t n,
                                          int64_t stride, int64_t count, double *sums)
{
	const int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	double sum = 0;

	if (column >= count)
		return;
	for (int64_t row = blockIdx.y; row < n; row += TOKEN_PARTS)
		sum += element(tensor, dtype, row * stride + column);
	atomicAdd(sums + column, sum);
}

enum status reference::column_sums(enum dtype dtype, const void *tensor, int64_t n, int64_t stride,
                                   int64_t count, double *host)
{
	double *sums = NULL;
	enum status status = take_zeros(count, &sums);

	if (status != STATUS_OK)
		return status;
	column_sums_kernel<<<dim3((unsigned)((count + THREADS - 1) / THREADS), TOKEN_PARTS),
	                     THREADS, 0, cuda_stream()>>>(dtype, tensor, n, stride, count, sums);
	note_launch("reference column_sums");
	status = cuda_reference.store(count, sums, host);
	release(sums);
	return status;
}
