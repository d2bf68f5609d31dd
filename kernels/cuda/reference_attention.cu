/*
 * fp64 softmax attention on the device. A gradient of a key needs every query that sees it; so that
 * sequences of any length can be checked, only the rows that device->rows names are computed, from
 * the lse and the o that the forward left.
 *
 * A block computes one row or key; its warps share what that is paired with.
 */
#include <vector>

#include "kernels/cuda/reference.cuh"

using namespace reference;

/* Channels of a head that belong to a lane: 32 apart. */
constexpr int LANE_CHANNELS = MAX_HEAD / 32;

/* Indices of the rows to compute on the device, or NULL: all. */
struct list {
	int64_t count;
	const int64_t *rows;
};

/* A block's row (or key) of one head of one sequence. */
struct place {
	int64_t row, h, b;

	__device__ place(const struct list &list, int64_t n_heads)
	{
		row = blockIdx.x % list.count;
		row = list.rows ? list.rows[row] : row;
		h = blockIdx.x / list.count % n_heads;
		b = blockIdx.x / list.count / n_heads;
	}
};

static __device__ double dot(int64_t d, const double *x, const double *y)
{
	double sum = 0;

#pragma unroll 4
	for (int64_t i = threadIdx.x % 32; i < d; i += 32)
		sum += x[i] * y[i];
	return warp_sum(sum);
}

static __device__ void add_scaled(int64_t d, double weight, const double *x,
                                  double (&sum)[LANE_CHANNELS])
{
#pragma unroll
	for (int c = 0; c < LANE_CHANNELS; c++) {
		const int64_t i = 32 * c + threadIdx.x % 32;

		if (i < d)
			sum[c] += weight * x[i];
	}
}

/* What the warps have summed: thread i gets channel i. */
static __device__ double channel_sum(const double (&sum)[LANE_CHANNELS])
{
	__shared__ double parts[WARPS][MAX_HEAD];
	double total = 0;

	__syncthreads();
	for (int c = 0; c < LANE_CHANNELS; c++)
		parts[threadIdx.x / 32][32 * c + threadIdx.x % 32] = sum[c];
	__syncthreads();
	for (int warp = 0; warp < WARPS; warp++)
		total += parts[warp][threadIdx.x];
	return total;
}

/* Index into lse and delta [B, H, T]. */
static __device__ int64_t statistic(const struct attention_args &a, int64_t b, int64_t t, int64_t h)
{
	return (b * a.n_heads + h) * a.seq_len + t;
}

/* Index into own_score and down_score [B, T, H]. */
static __device__ int64_t own(const struct attention_args &a, int64_t b, int64_t t, int64_t h)
{
	return (b * a.seq_len + t) * a.n_heads + h;
}

/* ---- forward ---- */

/* A warp's online softmax: weights relative to e^max. */
struct softmax {
	double max, sum, o[LANE_CHANNELS];

	/* A NaN hides from fmax(), but not from the sum. */
	__device__ void raise(double to)
	{
		const double before = max,
		             factor = before == -INFINITY ? 1 : exp(before - fmax(before, to));

		max = fmax(max, to);
		sum *= factor;
		for (int c = 0; c < LANE_CHANNELS; c++)
			o[c] *= factor;
	}
	__device__ void add(int64_t d, double score, const double *value)
	{
		raise(score);
		sum += exp(score - max);
		add_scaled(d, exp(score - max), value, o);
	}
};

/* The sums of all warps, relative to the largest maximum; the sum's are handed to all threads. */
static __device__ void merge(struct softmax *s)
{
	__shared__ double maxima[WARPS], sums[WARPS];
	const int warp = threadIdx.x / 32;

	maxima[warp] = s->max;
	__syncthreads();
	for (int i = 0; i < WARPS; i++)
		s->raise(maxima[i]);
	sums[warp] = s->sum;
	__syncthreads();
	s->sum = 0;
	for (int i = 0; i < WARPS; i++)
		s->sum += sums[i];
}

static __global__ void __launch_bounds__(THREADS)
        attention_kernel(struct attention_args a, struct list rows)
{
	const struct place p(rows, a.n_heads);
	const int warp = threadIdx.x / 32, i = threadIdx.x;
	const int64_t kv = attention_kv_head(&a, p.h);
	struct softmax s = {-INFINITY, 0, {}};
	int64_t lo, hi;

	visible_keys(&a, p.row, &lo, &hi);
	if (a.own_score && warp == 0)
		s.add(a.d_head, doubles(a.own_score)[own(a, p.b, p.row, p.h)],
		      at(&a.own_value, p.b, p.row, p.h));
	for (int64_t key = lo + warp; key < hi; key += WARPS) {
		if (!is_visible(&a, p.row, key))
			continue;
		s.add(a.d_head,
		      a.scale * dot(a.d_head, at(&a.q, p.b, p.row, p.h % a.q_heads),
		                    at(&a.k, p.b, key, kv)),
		      at(&a.v, p.b, key, kv));
	}
	merge(&s);
	const double o = channel_sum(s.o) / s.sum;
	if (a.lse && i == 0)
		doubles(a.lse)[statistic(a, p.b, p.row, p.h)] = s.max + log(s.sum);
	if (i >= a.d_head)
		return;
	if (a.out_ungated.data)
		at(&a.out_ungated, p.b, p.row, p.h)[i] = o;
	at(&a.out, p.b, p.row, p.h)[i] =
	        a.gate.data ? sigmoid(at(&a.gate, p.b, p.row, p.h)[i]) * o : o;
}

/* Indices to the device. */
static enum status upload_list(struct device *device, int64_t count, const int64_t *rows,
                               const scratch &memory, struct list *list)
{
	*list = {count, static_cast<const int64_t *>(static_cast<void *>(memory.data()))};
	TRY(memory.status);
	return device_upload(device, memory.data(), rows, (size_t)count * sizeof *rows);
}

REFERENCE(attention)
{
	const struct attention_args *a = static_cast<const struct attention_args *>(args);
	const int64_t count = device->rows ? device->rows->count : 0;
	const scratch memory(device, count);
	struct list rows = {a->seq_len, NULL};

	if (device->rows)
		TRY(upload_list(device, count, device->rows->rows, memory, &rows));
	return launch(device, attention_kernel, a->batch * a->n_heads * rows.count, 0, *a, rows);
}

/* ---- backward ---- */

/* What the pass over all rows leaves for the others: d_o, the gradient of the ungated output
 * (dout itself without a gate), and delta [B, H, T]. */
struct backward {
	struct attention_backward_args a;
	struct view d_o;
	double *delta;
};

/* A warp per token and head. */
static __global__ void __launch_bounds__(THREADS) delta_kernel(struct backward w)
{
	const struct attention_args &a = w.a.forward;
	const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, h = row % a.n_heads;
	const int64_t b = row / a.n_heads / a.seq_len, t = row / a.n_heads % a.seq_len;

	if (b >= a.batch)
		return;
	for (int64_t i = threadIdx.x % 32; a.gate.data && i < a.d_head; i += 32)
		at(&w.d_o, b, t, h)[i] =
		        at(&w.a.dout, b, t, h)[i] * sigmoid(at(&a.gate, b, t, h)[i]);
	/* A lane reads what it has written. */
	const double delta = dot(a.d_head, at(&w.d_o, b, t, h),
	                         at(a.gate.data ? &a.out_ungated : &a.out, b, t, h));
	if (threadIdx.x % 32 == 0)
		w.delta[statistic(a, b, t, h)] = delta;
}

/* The gradients of the gate and of the own score and value of a row: a warp. */
static __device__ void own_gradients(const struct backward &w, int64_t b, int64_t t, int64_t h)
{
	const struct attention_args &a = w.a.forward;
	const double *d_o = at(&w.d_o, b, t, h);

	for (int64_t i = threadIdx.x % 32; a.gate.data && i < a.d_head; i += 32)
		at(&w.a.dgate, b, t, h)[i] =
		        d_o[i] * at(&a.out_ungated, b, t, h)[i] * sigmoid(-at(&a.gate, b, t, h)[i]);
	if (!a.own_score)
		return;
	const double p =
	        exp(doubles(a.own_score)[own(a, b, t, h)] - doubles(a.lse)[statistic(a, b, t, h)]);
	for (int64_t i = threadIdx.x % 32; i < a.d_head; i += 32)
		at(&w.a.down_value, b, t, h)[i] = p * d_o[i];
	const double dp = dot(a.d_head, d_o, at(&a.own_value, b, t, h));
	if (threadIdx.x % 32 == 0)
		doubles(w.a.down_score)[own(a, b, t, h)] =
		        p * (dp - w.delta[statistic(a, b, t, h)]);
}

/* The probability of query t and key s, and the gradient of their product. */
static __device__ double differentiate(const struct backward &w, int64_t b, int64_t h, int64_t t,
                                       int64_t s, double *ds)
{
	const struct attention_args &a = w.a.forward;
	const int64_t kv = attention_kv_head(&a, h);
	const double product = dot(a.d_head, at(&a.q, b, t, h % a.q_heads), at(&a.k, b, s, kv));
	const double dp = dot(a.d_head, at(&w.d_o, b, t, h), at(&a.v, b, s, kv));
	const double p = exp(a.scale * product - doubles(a.lse)[statistic(a, b, t, h)]);

	*ds = a.scale * p * (dp - w.delta[statistic(a, b, t, h)]);
	return p;
}

/* The place's head is one of the queries'. */
static __global__ void __launch_bounds__(THREADS)
        queries_kernel(struct backward w, struct list rows)
{
	const struct attention_args &a = w.a.forward;
	const struct place p(rows, a.q_heads);
	const int warp = threadIdx.x / 32;
	double dq[LANE_CHANNELS] = {}, ds;
	int64_t lo, hi;

	visible_keys(&a, p.row, &lo, &hi);
	for (int64_t h = p.h; h < a.n_heads; h += a.q_heads) {
		if (warp == 0)
			own_gradients(w, p.b, p.row, h);
		for (int64_t s = lo + warp; s < hi; s += WARPS) {
			if (!is_visible(&a, p.row, s))
				continue;
			differentiate(w, p.b, h, p.row, s, &ds);
			add_scaled(a.d_head, ds, at(&a.k, p.b, s, attention_kv_head(&a, h)), dq);
		}
	}
	const double sum = channel_sum(dq);
	if (threadIdx.x < a.d_head)
		at(&w.a.dq, p.b, p.row, p.h)[threadIdx.x] = sum;
}

/* The place's head is one of the keys'. */
static __global__ void __launch_bounds__(THREADS) keys_kernel(struct backward w, struct list keys)
{
	const struct attention_args &a = w.a.forward;
	const struct place key(keys, a.kv_heads);
	const int64_t readers = a.n_heads / a.kv_heads;
	double dk[LANE_CHANNELS] = {}, dv[LANE_CHANNELS] = {}, ds;
	int64_t lo, hi;

	seeing_queries(&a, key.row, &lo, &hi);
	for (int64_t h = key.h * readers; h < (key.h + 1) * readers; h++)
		for (int64_t t = lo + threadIdx.x / 32; t < hi; t += WARPS) {
			if (!is_visible(&a, t, key.row))
				continue;
			const double p = differentiate(w, key.b, h, t, key.row, &ds);

			add_scaled(a.d_head, ds, at(&a.q, key.b, t, h % a.q_heads), dk);
			add_scaled(a.d_head, p, at(&w.d_o, key.b, t, h), dv);
		}
	const double k_sum = channel_sum(dk), v_sum = channel_sum(dv);
	if (threadIdx.x >= a.d_head)
		return;
	at(&w.a.dk, key.b, key.row, key.h)[threadIdx.x] = k_sum;
	at(&w.a.dv, key.b, key.row, key.h)[threadIdx.x] = v_sum;
}

REFERENCE(attention_backward)
{
	const struct attention_backward_args *a =
	        static_cast<const struct attention_backward_args *>(args);
	const struct attention_args *f = &a->forward;
	const int64_t n_rows = f->batch * f->seq_len * f->n_heads;
	const int64_t count = device->rows ? device->rows->count : 0;
	const scratch memory(device, n_rows * (f->gate.data ? 1 + f->d_head : 1));
	const scratch row_memory(device, count), key_memory(device, count);
	struct backward w = {*a, a->dout, memory.data()};
	struct list rows = {f->seq_len, NULL}, keys = {f->kv_len, NULL};
	std::vector<int64_t> key_list((size_t)count);

	TRY(memory.status);
	if (f->gate.data)
		w.d_o = contiguous(memory.data() + n_rows, f->seq_len, f->n_heads, f->d_head);
	if (device->rows) {
		const int64_t n_keys = attention_keys_of_rows(f, device->rows, key_list.data());

		TRY(upload_list(device, count, device->rows->rows, row_memory, &rows));
		TRY(upload_list(device, n_keys, key_list.data(), key_memory, &keys));
	}
	TRY(launch(device, delta_kernel, quotient_up(n_rows, WARPS), 0, w));
	TRY(launch(device, queries_kernel, f->batch * f->q_heads * rows.count, 0, w, rows));
	return launch(device, keys_kernel, f->batch * f->kv_heads * keys.count, 0, w, keys);
}
