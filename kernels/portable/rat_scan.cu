/*
 * RAT inside a chunk. A thread runs the recurrence of eight channels of one
 * chunk in registers; d / 8 neighbouring lanes hold a head and sum its own
 * scores. The scanned keys never leave the registers but at a chunk's end.
 */
#include "kernels/portable/kernels.h"
#include "kernels/portable/rope.cuh"

enum { THREADS = 128, ROWS = 4 };

/* What one thread reads of one token. */
struct token8 {
	vector8 v, gate, k, q;
};

static __device__ __forceinline__ token8 load_token(const struct rat_scan_args &a, int64_t b,
                                                    int64_t t, int64_t h, int column)
{
	const int64_t group = h % a.groups;

	return {load8(at(a.v, b, t, h) + column), load8(at(a.gate, b, t, h) + column),
	        load8(at(a.k, b, t, group) + column), load8(at(a.q, b, t, group) + column)};
}

/* Advances k and v by one token and returns this lane's part of q.k. */
static __device__ __forceinline__ float advance(float (&k)[8], float (&v)[8], const token8 &token,
                                                const float (&bias)[8])
{
	float gate[8], new_k[8], new_v[8], q[8], dot = 0.0f;

	unpack8(gate, token.gate);
	unpack8(new_k, token.k);
	unpack8(new_v, token.v);
	unpack8(q, token.q);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float g = sigmoid(gate[i] + bias[i]);

		k[i] = new_k[i] + g * (k[i] - new_k[i]);
		v[i] = new_v[i] + g * (v[i] - new_v[i]);
		dot += q[i] * k[i];
	}
	return dot;
}

/* The chunk's last pair becomes a key and a value; after the last token also the state. */
static __device__ __forceinline__ void store_chunk(const struct rat_scan_args &a,
                                                   const struct rope_table &table,
                                                   const float (&k)[8], const float (&v)[8],
                                                   bool valid, int64_t b, int64_t chunk, int64_t h,
                                                   int lane, int lanes)
{
	const int64_t offset = (b * a.n_heads + h) * a.d_head + 8 * lane;
	float rotated[8];

#pragma unroll
	for (int i = 0; i < 8; i++)
		rotated[i] = k[i];
	if (a.rope)
		rope_lanes(rotated, table, lane, lanes, chunk);
	if (!valid)
		return;
	store8(at(a.k_chunk, b, chunk, h) + 8 * lane, rotated);
	store8(at(a.v_chunk, b, chunk, h) + 8 * lane, v);
	if ((chunk + 1) * a.chunk < a.seq_len)
		return;
	if (a.k_state)
		store8f(a.k_state + offset, k);
	if (a.v_state)
		store8f(a.v_state + offset, v);
}

/* Consecutive threads take consecutive channels, then heads, chunks, sequences. */
template <int D>
static __global__ void __launch_bounds__(THREADS)
        rat_scan_kernel(const __grid_constant__ struct rat_scan_args a,
                        const __grid_constant__ struct rope_table table)
{
	constexpr int LANES = D / 8;
	const int64_t chunks = divide_up(a.seq_len, a.chunk);
	const int64_t item = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
	const bool valid = item < a.batch * chunks * a.n_heads;
	const int64_t h = valid ? item % a.n_heads : 0, row = valid ? item / a.n_heads : 0;
	const int64_t chunk = row % chunks, b = row / chunks, first = chunk * a.chunk;
	const int64_t end = min(first + a.chunk, a.seq_len);
	const int lane = threadIdx.x % LANES;
	float k[8] = {}, v[8] = {}, bias[8];

	load8f(bias, a.gate_bias + h * D + 8 * lane);
	for (int64_t i = 0; i < a.chunk; i += ROWS) {
		token8 token[ROWS];

#pragma unroll
		for (int j = 0; j < ROWS; j++)
			token[j] = load_token(a, b, min(first + i + j, end - 1), h, 8 * lane);
#pragma unroll
		for (int j = 0; j < ROWS; j++) {
			const int64_t t = first + i + j;
			float dot = 0.0f;

			if (t < end)
				dot = advance(k, v, token[j], bias);
			dot = group_sum(dot, LANES);
			if (t >= end || !valid)
				continue;
			store8(at(a.v_scan, b, t, h) + 8 * lane, v);
			if (lane == 0)
				a.own_score[(b * a.seq_len + t) * a.n_heads + h] = a.scale * dot;
		}
	}
	store_chunk(a, table, k, v, valid, b, chunk, h, lane, LANES);
}

extern "C" const char *portable_rat_scan_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct rat_scan_args *>(args);

	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	return check_aligned(&a->v, &a->gate, &a->q, &a->k, &a->q_out, &a->v_scan, &a->k_chunk,
	                     &a->v_chunk);
}

/* q is rotated by a second kernel, because it may be in the place that the first one reads. */
extern "C" enum status portable_rat_scan(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct rat_scan_args *>(args);
	const int64_t chunks = divide_up(a->seq_len, a->chunk);
	const int64_t threads = a->batch * chunks * a->n_heads * (a->d_head / 8);
	enum status status = launch_each(
	        device, "rat_scan", a->d_head == 64 ? rat_scan_kernel<64> : rat_scan_kernel<128>,
	        threads, THREADS, *a, rope_table_of(a->d_head));

	return status == STATUS_OK ? rotate_queries(device, a) : status;
}
