/*
 * The fp64 reference on the device: the forward functions of kernels/reference
 * once more, as naive kernels that share nothing with the ones they judge.
 * Long sequences would keep the host busy for minutes.
 */
#include "kernels/cuda/reference.cuh"

#include <cuda_bf16.h>
#include <math.h>

#include "kernels/cuda/gemm.h"

using namespace reference;

enum { MAX_STATE_ROWS = 256 };

/* An error of a function that returns none; the next one that does reports it. */
static enum status pending = STATUS_OK;

void reference::note(enum status status)
{
	if (pending == STATUS_OK)
		pending = status;
}

enum status reference::report()
{
	const enum status status = pending;

	pending = STATUS_OK;
	return status;
}

void reference::note_launch(const char *function)
{
	note(cuda_status(cudaGetLastError(), function, __FILE__, __LINE__));
}

static __device__ double warp_max(double x)
{
	for (int lane = 16; lane > 0; lane /= 2)
		x = fmax(x, __shfl_xor_sync(0xffffffffu, x, lane));
	return x;
}

/* ---- memory ---- */

enum status reference::take(int64_t count, double **memory)
{
	void *taken = NULL;
	const cudaError_t error = cudaMalloc(&taken, (size_t)count * sizeof(double) + 1);

	*memory = static_cast<double *>(taken);
	return cuda_status(error, "memory for the reference", __FILE__, __LINE__);
}

void reference::release(double *memory)
{
	cudaFree(memory);
}

template <typename T> static __global__ void load_kernel(const T *tensor, int64_t count, double *to)
{
	FOR_ALL(i, count)
	to[i] = (double)(float)tensor[i];
}

static enum status load(enum dtype dtype, const void *tensor, int64_t count, double *to)
{
	if (dtype == DTYPE_BF16)
		load_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(
		        static_cast<const __nv_bfloat16 *>(tensor), count, to);
	else
		load_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(static_cast<const float *>(tensor),
		                                                 count, to);
	note_launch("reference load");
	return report();
}

static enum status store(int64_t count, const double *from, double *host)
{
	const enum status status = cuda_backend.download(host, from, (size_t)count * sizeof *host);
	const enum status earlier = report();

	return earlier == STATUS_OK ? status : earlier;
}

static __global__ void get_columns_kernel(int64_t n_rows, int64_t width, int64_t first,
                                          int64_t count, const double *from, double *to)
{
	FOR_ALL(i, n_rows * count)
	to[i] = from[i / count * width + first + i % count];
}

static void get_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count,
                        const double *from, double *to)
{
	get_columns_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(n_rows, width, first, count, from,
	                                                        to);
	note_launch("reference get_columns");
}

static __global__ void get_rows_kernel(int64_t width, int64_t n_rows, const int64_t *rows,
                                       const double *from, double *to)
{
	FOR_ALL(i, n_rows * width)
	to[i] = from[rows[i / width] * width + i % width];
}

/* The list of rows on the device; NULL after an error. To be freed by cudaFree(). */
int64_t *reference::upload_rows(int64_t n_rows, const int64_t *rows)
{
	const size_t bytes = (size_t)n_rows * sizeof *rows;
	void *memory = NULL;
	enum status status =
	        cuda_status(cudaMalloc(&memory, bytes + 1), "memory for rows", __FILE__, __LINE__);

	if (status == STATUS_OK)
		status = cuda_backend.upload(memory, rows, bytes);
	if (status != STATUS_OK) {
		note(status);
		cudaFree(memory);
		return NULL;
	}
	return static_cast<int64_t *>(memory);
}

static void get_rows(int64_t width, int64_t n_rows, const int64_t *rows, const double *from,
                     double *to)
{
	int64_t *list = upload_rows(n_rows, rows);

	if (!list)
		return;
	get_rows_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(width, n_rows, list, from, to);
	note_launch("reference get_rows");
	cudaFree(list);
}

static __global__ void round_kernel(bool to_bf16, int64_t count, double *x)
{
	FOR_ALL(i, count)
	x[i] = to_bf16 ? (double)__bfloat162float(__double2bfloat16(x[i])) : (double)(float)x[i];
}

static void round_to(enum dtype dtype, int64_t count, double *x)
{
	round_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(dtype == DTYPE_BF16, count, x);
	note_launch("reference round");
}

/* ---- dense ---- */

static void linear(int64_t n, int64_t d_in, int64_t d_out, const double *x, const double *weight,
                   double *y)
{
	note(gemm_double(n, d_out, d_in, x, weight, y));
}

/* A block per row. */
static __global__ void __launch_bounds__(THREADS)
        rms_norm_kernel(int64_t d, double eps, const double *x, const double *weight, double *y)
{
	__shared__ double sums[THREADS / 32];
	const double *from = x + blockIdx.x * d;
	double sum = 0;

	for (int64_t i = threadIdx.x; i < d; i += THREADS)
		sum += from[i] * from[i];
	sum = warp_sum(sum);
	if (threadIdx.x % 32 == 0)
		sums[threadIdx.x / 32] = sum;
	__syncthreads();
	sum = 0;
	for (int i = 0; i < THREADS / 32; i++)
		sum += sums[i];
	for (int64_t i = threadIdx.x; i < d; i += THREADS)
		y[blockIdx.x * d + i] = from[i] / sqrt(sum / (double)d + eps) * weight[i];
}

static void rms_norm(int64_t n, int64_t d, double eps, const double *x, const double *weight,
                     double *y)
{
	rms_norm_kernel<<<(unsigned)n, THREADS, 0, cuda_stream()>>>(d, eps, x, weight, y);
	note_launch("reference rms_norm");
}

/* A thread per token and pair of channels, for all heads; y may be x. */
static __global__ void rotate_kernel(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d,
                                     int64_t first, int64_t period, double sign, const double *x,
                                     double *y)
{
	const int64_t half = d / 2;

	FOR_ALL(index, batch * seq_len * half)
	{
		const int64_t i = index % half, token = index / half;
		const double position = (double)((first + token % seq_len) / period);
		double s, c;

		sincos(position * pow(10000.0, -2 * (double)i / (double)d), &s, &c);
		s *= sign;
		for (int64_t h = 0; h < n_heads; h++) {
			const int64_t at = (token * n_heads + h) * d + i;
			const double a = x[at], b = x[at + half];

			y[at] = a * c - b * s;
			y[at + half] = b * c + a * s;
		}
	}
}

static void rotate(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head, int64_t first,
                   int64_t period, const double *x, double *y)
{
	rotate_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(batch, seq_len, n_heads, d_head, first,
	                                                   period, 1, x, y);
	note_launch("reference rotate");
}

static void rotate_backward(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
                            int64_t first, int64_t period, const double *dy, double *dx)
{
	rotate_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(batch, seq_len, n_heads, d_head, first,
	                                                   period, -1, dy, dx);
	note_launch("reference rotate_backward");
}

static __global__ void decay_gate_kernel(int64_t n, int64_t rank, int64_t d_out, double normalizer,
                                         const double *x, const double *weight, const double *bias,
                                         double *log_decay)
{
	FOR_ALL(index, n * d_out)
	{
		const int64_t row = index / d_out, column = index % d_out;
		double logit = bias[column];

		for (int64_t i = 0; i < rank; i++)
			logit += x[row * rank + i] * weight[column * rank + i];
		log_decay[index] = (fmin(logit, 0.0) - log1p(exp(-fabs(logit)))) / normalizer;
	}
}

static void decay_gate(int64_t n, int64_t rank, int64_t d_out, double normalizer, const double *x,
                       const double *weight, const double *bias, double *log_decay)
{
	decay_gate_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(n, rank, d_out, normalizer, x,
	                                                       weight, bias, log_decay);
	note_launch("reference decay_gate");
}

static __global__ void times_silu_kernel(int64_t count, const double *gate, double *x)
{
	FOR_ALL(i, count)
	x[i] *= gate[i] * sigmoid64(gate[i]);
}

static void norm_gate(int64_t n, int64_t n_heads, int64_t d_head, double eps, const double *x,
                      const double *weight, const double *gate, double *out)
{
	rms_norm(n * n_heads, d_head, eps, x, weight, out);
	times_silu_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(n * n_heads * d_head, gate, out);
	note_launch("reference norm_gate");
}

/* ---- attention ---- */

enum { ROWS = 8, KEYS = 32 };

/* First visible key, and the one behind the last. */
static __device__ void visible_keys(const struct reference_attention &a, int64_t t, int64_t *lo,
                                    int64_t *hi)
{
	*lo = 0;
	*hi = a.kv_len;
	if (a.mask == MASK_CAUSAL || a.mask == MASK_WINDOW)
		*hi = t + 1 < a.kv_len ? t + 1 : a.kv_len;
	if (a.mask == MASK_WINDOW)
		*lo = t > a.window ? t - a.window : 0;
	if (a.mask == MASK_CHUNK)
		*hi = t / a.chunk < a.kv_len ? t / a.chunk : a.kv_len;
}

/*
 * A block takes one head of ROWS consecutive rows of the list, which must lie in
 * one sequence; warp r computes the probabilities of row r, thread i sums
 * channel i of all of them. Softmax online, KEYS at a time.
 */
static __global__ void __launch_bounds__(ROWS * 32)
        attention_kernel(struct reference_attention a, int64_t n_rows, const int64_t *rows,
                         double *out)
{
	extern __shared__ double shared[];
	const int64_t d = a.d_head, h = blockIdx.y, first = (int64_t)blockIdx.x * ROWS;
	const int n = (int)(n_rows - first < ROWS ? n_rows - first : ROWS);
	const int r = threadIdx.x / 32, lane = threadIdx.x % 32, channel = threadIdx.x;
	double *q = shared, *k = q + ROWS * d; /* [ROWS][d], [KEYS][d + 1] */
	double *p = k + KEYS * (d + 1);        /* [ROWS][KEYS], then factors, sums [ROWS] */
	double *factors = p + ROWS * KEYS, *sums = factors + ROWS;
	const int64_t b = rows[first] / a.seq_len;
	const int64_t row = rows[first + (r < n ? r : 0)], q_head = h % a.q_heads;
	int64_t lo, hi, least = a.kv_len, most = 0;
	double max = -INFINITY, sum = 0, total[ROWS] = {};

	for (int i = 0; i < n; i++) {
		visible_keys(a, rows[first + i] % a.seq_len, &lo, &hi);
		least = lo < least ? lo : least;
		most = hi > most ? hi : most;
	}
	visible_keys(a, row % a.seq_len, &lo, &hi);
	for (int64_t i = lane; i < d; i += 32)
		q[r * d + i] = a.q[(row * a.q_heads + q_head) * d + i];
	if (a.own_score) {
		max = a.own_score[row * a.n_heads + h];
		sum = lane == 0 ? 1 : 0;
		for (int i = 0; i < n && channel < d; i++)
			total[i] = a.own_value[(rows[first + i] * a.n_heads + h) * d + channel];
	}
	for (int64_t tile = least; tile < most; tile += KEYS) {
		const int keys = (int)(most - tile < KEYS ? most - tile : KEYS);
		const int64_t kv = ((b * a.kv_len + tile) * a.n_heads + h) * d;

		__syncthreads();
		for (int64_t i = threadIdx.x; i < keys * d; i += ROWS * 32)
			k[i / d * (d + 1) + i % d] = a.k[kv + i / d * a.n_heads * d + i % d];
		__syncthreads();
		const bool visible = lane < keys && tile + lane >= lo && tile + lane < hi;
		double score = 0;
		for (int64_t i = 0; i < d; i++)
			score += q[r * d + i] * k[(lane < keys ? lane : 0) * (d + 1) + i];
		score = visible ? score * a.scale : -INFINITY;
		const double new_max = fmax(max, warp_max(score));
		const double factor = max == -INFINITY ? 0 : exp(max - new_max);
		const double probability = visible ? exp(score - new_max) : 0;
		/* A NaN among the scores hides from fmax(), but not from the sum. */
		max = new_max;
		sum = sum * factor + probability;
		p[r * KEYS + lane] = probability;
		if (lane == 0)
			factors[r] = factor;
		__syncthreads();
		if (channel < d) {
			for (int i = 0; i < ROWS; i++)
				total[i] *= factors[i];
			for (int s = 0; s < keys; s++) {
				const double v = a.v[kv + s * a.n_heads * d + channel];

				for (int i = 0; i < ROWS; i++)
					total[i] += p[i * KEYS + s] * v;
			}
		}
	}
	sum = warp_sum(sum);
	if (lane == 0)
		sums[r] = sum;
	__syncthreads();
	for (int i = 0; i < n && channel < d; i++) {
		const int64_t from = (rows[first + i] * a.n_heads + h) * d + channel;
		const double gate = a.gate ? sigmoid64(a.gate[from]) : 1;

		out[((first + i) * a.n_heads + h) * d + channel] = gate * total[i] / sums[i];
	}
}

static enum status attention_forward(const struct reference_attention *a, int64_t n_rows,
                                     const int64_t *rows, double *out)
{
	const size_t shared =
	        (size_t)(ROWS * a->d_head + KEYS * (a->d_head + 1) + ROWS * KEYS + 2 * ROWS) *
	        sizeof(double);
	int64_t *list;

	if (a->d_head > MAX_HEAD || a->batch != 1 || !rows)
		return status_set(STATUS_UNSUPPORTED, "reference: no such attention on the device");
	CUDA_TRY(cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                              (int)shared));
	list = upload_rows(n_rows, rows);
	if (list)
		attention_kernel<<<dim3((unsigned)((n_rows + ROWS - 1) / ROWS),
		                        (unsigned)a->n_heads),
		                   ROWS * 32, shared, cuda_stream()>>>(*a, n_rows, list, out);
	note_launch("reference attention");
	cudaFree(list);
	return report();
}

/* ---- recurrences ---- */

/* A block per sequence, chunk and head, a thread per channel. */
static __global__ void __launch_bounds__(MAX_HEAD)
        rat_scan_kernel(struct reference_rat_scan s, struct reference_rat_scan_out out)
{
	__shared__ double parts[MAX_HEAD / 32];
	const int64_t d = s.d_head, i = threadIdx.x, h = blockIdx.x % s.n_heads;
	const int64_t chunks = (s.seq_len + s.chunk - 1) / s.chunk;
	const int64_t c = blockIdx.x / s.n_heads % chunks, b = blockIdx.x / s.n_heads / chunks;
	const int64_t end = (c + 1) * s.chunk < s.seq_len ? (c + 1) * s.chunk : s.seq_len;
	const bool has_channel = i < d;
	double k = 0, v = 0;

	for (int64_t t = c * s.chunk; t < end; t++) {
		const int64_t token = b * s.seq_len + t, at = (token * s.n_heads + h) * d + i;
		const int64_t shared_at = (token * s.groups + h % s.groups) * d + i;
		double score = 0;

		if (has_channel) {
			const double g = sigmoid64(s.gate[at] + s.gate_bias[h * d + i]);

			k = g * k + (1 - g) * s.k[shared_at];
			v = g * v + (1 - g) * s.v[at];
			out.v_scan[at] = v;
			score = s.q[shared_at] * k;
		}
		score = warp_sum(score);
		if (i % 32 == 0)
			parts[i / 32] = score;
		__syncthreads();
		if (i == 0) {
			for (int w = 1; w < (int)blockDim.x / 32; w++)
				score += parts[w];
			out.own_score[token * s.n_heads + h] = s.scale * score;
		}
		__syncthreads();
	}
	if (has_channel) {
		out.k_chunk[((b * chunks + c) * s.n_heads + h) * d + i] = k;
		out.v_chunk[((b * chunks + c) * s.n_heads + h) * d + i] = v;
	}
}

static enum status rat_scan_forward(const struct reference_rat_scan *s,
                                    const struct reference_rat_scan_out *out)
{
	const int64_t chunks = (s->seq_len + s->chunk - 1) / s->chunk;

	if (s->d_head > MAX_HEAD || out->k_scan || out->k_state || out->v_state || !out->v_scan ||
	    !out->own_score || !out->q_out)
		return status_set(STATUS_UNSUPPORTED, "reference: no such scan on the device");
	rat_scan_kernel<<<(unsigned)(s->batch * chunks * s->n_heads),
	                  (unsigned)((s->d_head + 31) / 32 * 32), 0, cuda_stream()>>>(*s, *out);
	note_launch("reference rat_scan");
	if (!s->rope) {
		const int64_t width = s->groups * s->d_head;

		get_columns(s->batch * s->seq_len, width, 0, width, s->q, out->q_out);
		return report();
	}
	rotate(s->batch, s->seq_len, s->groups, s->d_head, 0, s->chunk, s->q, out->q_out);
	rotate(s->batch, chunks, s->n_heads, s->d_head, 0, 1, out->k_chunk, out->k_chunk);
	return report();
}

/* A thread per sequence and channel. */
static __global__ void recurrence_kernel(struct reference_recurrence r, double *__restrict__ out)
{
	const double *__restrict__ gates = r.gate, *__restrict__ inputs = r.x;

	FOR_ALL(index, r.batch * r.d_model)
	{
		const int64_t i = index % r.d_model, b = index / r.d_model;
		const double bias = r.gate_bias ? r.gate_bias[i] : 0;
		double h = r.h0 ? r.h0[index] : 0;

#pragma unroll 8
		for (int64_t t = 0; t < r.seq_len; t++) {
			const int64_t at = (b * r.seq_len + t) * r.d_model + i;
			const double gate = gates[at] + bias;

			if (r.form == GATE_SIGMOID)
				h = sigmoid64(gate) * h + sigmoid64(-gate) * inputs[at];
			else
				h = exp(gate) * h + inputs[at];
			out[at] = r.z ? sigmoid64(r.z[at]) * h : h;
		}
	}
}

static void recurrence_forward(const struct reference_recurrence *r, double *out)
{
	recurrence_kernel<<<(unsigned)((r->batch * r->d_model + 31) / 32), 32, 0, cuda_stream()>>>(
	        *r, out);
	note_launch("reference recurrence");
}

/* ---- the linear-attention family's gates ---- */

static __device__ double silu64(double x)
{
	return x * sigmoid64(x);
}

static __global__ void short_conv_kernel(struct reference_conv c, double *out)
{
	FOR_ALL(index, c.batch * c.seq_len * c.n_readers * c.channels)
	{
		const int64_t i = index % c.channels, n = index / c.channels / c.n_readers;
		double sum = c.bias[i];

		for (int64_t j = 0; j < CONV_WIDTH; j++)
			if (n % c.seq_len + j >= CONV_HISTORY)
				sum += c.weight[i * CONV_WIDTH + j] *
				       c.x[(n - CONV_HISTORY + j) * c.channels + i];
		out[index] = silu64(sum);
	}
}

/* Sequences start without a history. */
static void short_conv(const struct reference_conv *c, double *out)
{
	short_conv_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(*c, out);
	note_launch("reference short_conv");
}

static __global__ void time_step_kernel(int64_t n, int64_t n_heads, int64_t d_head,
                                        const double *logit, const double *bias,
                                        const double *log_rate, const double *x, double *log_decay,
                                        double *out)
{
	FOR_ALL(i, n * n_heads * d_head)
	{
		const int64_t row = i / d_head, h = row % n_heads;
		const double shifted = logit[row] + bias[h];
		const double dt = fmax(shifted, 0.0) + log1p(exp(-fabs(shifted)));

		out[i] = dt * x[i];
		if (i % d_head == 0)
			log_decay[row] = -exp(log_rate[h]) * dt;
	}
}

static void time_step(int64_t n, int64_t n_heads, int64_t d_head, const double *logit,
                      const double *bias, const double *log_rate, const double *x,
                      double *log_decay, double *out)
{
	time_step_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(n, n_heads, d_head, logit, bias,
	                                                      log_rate, x, log_decay, out);
	note_launch("reference time_step");
}

static __global__ void forget_gate_kernel(int64_t count, int64_t width, const double *logit,
                                          const double *bound, const double *x, double *log_decay,
                                          double *key, double *out)
{
	FOR_ALL(i, count)
	{
		const double input = sigmoid64(-bound[i % width]) * sigmoid64(-logit[i]);

		log_decay[i] = log1p(-input);
		if (key)
			key[i] = input;
		out[i] = silu64(x[i]) * (key ? 1 : input);
	}
}

static void forget_gate(int64_t n, int64_t width, const double *logit, const double *bound,
                        const double *x, double *log_decay, double *key, double *out)
{
	forget_gate_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(n * width, width, logit, bound, x,
	                                                        log_decay, key, out);
	note_launch("reference forget_gate");
}

static __global__ void gated_kernel(struct reference_gate_norm g, double *u)
{
	FOR_ALL(i, g.n * g.n_heads * g.d_head)
	{
		const double skip =
		        g.skip ? g.skip_weight[i / g.d_head % g.n_heads] * g.skip[i] : 0;

		u[i] = (g.x[i] + skip) * (g.gate ? silu64(g.gate[i]) : 1);
	}
}

static void gated(const struct reference_gate_norm *g, double *u)
{
	gated_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(*g, u);
	note_launch("reference gated");
}

/* ---- the matrix recurrence ---- */

static __global__ void exp_kernel(int64_t count, const double *x, double *y)
{
	FOR_ALL(i, count)
	y[i] = exp(x[i]);
}

/* The state's rows are dealt to 16 lanes, its columns to groups of lanes and to blocks. */
enum { LANES = 16, COLUMNS = THREADS / LANES, LANE_ROWS = MAX_STATE_ROWS / LANES };

static __global__ void __launch_bounds__(THREADS)
        matrix_kernel(struct reference_matrix m, const double *factors, double *out)
{
	const int lane = threadIdx.x % LANES;
	const int64_t j = (int64_t)blockIdx.y * COLUMNS + threadIdx.x / LANES;
	const int64_t h = blockIdx.x % m.n_heads, b = blockIdx.x / m.n_heads;
	const bool has_column = j < m.d_v;
	const int n_rows = (int)((m.d_k - lane + LANES - 1) / LANES);
	double state[LANE_ROWS];

#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		state[r] =
		        m.h0 && has_column && r < n_rows
		                ? m.h0[((b * m.n_heads + h) * m.d_k + r * LANES + lane) * m.d_v + j]
		                : 0;
	for (int64_t t = 0; t < m.seq_len; t++) {
		const int64_t row = (b * m.seq_len + t) * m.n_heads + h;
		const double v = has_column ? m.v[row * m.d_v + j] : 0;
		double factor = m.decay == DECAY_CONSTANT ? 1 - exp2(-5 - (double)h) : 1, sum = 0;

		if (m.decay == DECAY_SCALAR)
			factor = factors[row];
#pragma unroll
		for (int r = 0; r < LANE_ROWS; r++) {
			const int64_t at = row * m.d_k + r * LANES + lane;

			if (r >= n_rows)
				continue;
			if (m.decay == DECAY_DIAGONAL)
				factor = factors[at];
			state[r] = factor * state[r] + m.k[at] * v;
			sum += m.q[at] * state[r];
		}
		for (int i = LANES / 2; i > 0; i /= 2)
			sum += __shfl_xor_sync(0xffffffffu, sum, i);
		if (lane == 0 && has_column)
			out[row * m.d_v + j] = m.scale * sum;
	}
}

static enum status matrix_forward(const struct reference_matrix *m, double *out)
{
	const int64_t per_token = m->decay == DECAY_DIAGONAL ? m->d_k
	                          : m->decay == DECAY_SCALAR ? 1
	                                                     : 0;
	const int64_t count = m->batch * m->seq_len * m->n_heads * per_token;
	double *factors = NULL;

	if (m->rule != RULE_PLAIN || m->d_k > MAX_STATE_ROWS)
		return status_set(STATUS_UNSUPPORTED,
		                  "reference: no such matrix recurrence on the device");
	if (count > 0) {
		const enum status status = take(count, &factors);

		if (status != STATUS_OK)
			return status;
		exp_kernel<<<GRID, THREADS, 0, cuda_stream()>>>(count, m->log_decay, factors);
	}
	matrix_kernel<<<dim3((unsigned)(m->batch * m->n_heads),
	                     (unsigned)((m->d_v + COLUMNS - 1) / COLUMNS)),
	                THREADS, 0, cuda_stream()>>>(*m, factors, out);
	note_launch("reference matrix recurrence");
	release(factors);
	return report();
}

const struct reference_device cuda_reference = {
        .take = take,
        .release = release,
        .load = load,
        .store = store,
        .get_columns = get_columns,
        .get_rows = get_rows,
        .round = round_to,
        .linear = linear,
        .rms_norm = rms_norm,
        .rotate = rotate,
        .attention_forward = attention_forward,
        .rat_scan_forward = rat_scan_forward,
        .recurrence_forward = recurrence_forward,
        .matrix_forward = matrix_forward,
        .decay_gate = decay_gate,
        .norm_gate = norm_gate,
        .short_conv = short_conv,
        .time_step = time_step,
        .forget_gate = forget_gate,
        .gated = gated,
        .linear_input_gradient = linear_input_gradient,
        .set_columns = set_columns,
        .rotate_backward = rotate_backward,
        .attention_backward_rows = attention_backward_rows,
        .rat_scan_backward = rat_scan_backward,
        .recurrence_backward = recurrence_backward,
        .weight_gradient_rows = weight_gradient_rows,
        .norm_gradient_columns = norm_gradient_columns,
        .column_sums = column_sums,
};
