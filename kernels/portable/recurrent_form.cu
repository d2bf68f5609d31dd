/*
 * The matrix-state recurrence token by token, its recurrent form: every decay, every rule.
 *   S <- A_t S;  v' = v_t, or beta_t (v_t - k_t S);  S <- S + k_t^T v';  o_t = scale q_t S,
 * and with a bonus o_t = scale q_t (S_{t-1} + bonus * k_t^T v_t).
 *
 * A block takes 32 columns of v of one sequence and head through all tokens. Each column of the
 * state lies in the registers of 8 neighbouring lanes; q, k and decays of 8 tokens at a time are in
 * shared memory, as fp32, the next 8 on their way in registers. No tensor core is of use: three
 * multiply-adds per token and element of the state are what it takes. Tokens past the end
 * have k = q = 0 and do not decay.
 *
 * Limit: instructions. 61 ms at 4 heads x 256/512, 262144 tokens, T = 4096.
 * docs/kernels/portable_recurrent_form.md.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 256, LANES = 8, COLUMNS = THREADS / LANES, TOKENS = 8 };

/* In shared memory: rows of q, k and decays, `rows` floats a token. */
struct tile {
	float *q, *k, *decay;
	float (*v)[COLUMNS], (*out)[COLUMNS];
	float *beta, *bonus;
};

template <int ROWS> static __device__ __forceinline__ struct tile shared_tile()
{
	float *memory = reinterpret_cast<float *>(shared_memory);
	struct tile t;

	t.q = memory;
	t.k = t.q + TOKENS * ROWS;
	t.decay = t.k + TOKENS * ROWS;
	t.bonus = t.decay + TOKENS * ROWS;
	t.v = reinterpret_cast<float(*)[COLUMNS]>(t.bonus + ROWS);
	t.out = t.v + TOKENS;
	t.beta = reinterpret_cast<float *>(t.out + TOKENS);
	return t;
}

template <int ROWS> static size_t shared_bytes()
{
	return (3 * TOKENS * ROWS + ROWS + 2 * TOKENS * COLUMNS + TOKENS) * sizeof(float);
}

/* A thread's part of a tile: eight rows of q, k and decays of EIGHTS tokens, an element of v. */
template <int ROWS> struct on_the_way {
	static constexpr int EIGHTS = (TOKENS * ROWS / 8 + THREADS - 1) / THREADS;

	vector8 q[EIGHTS], k[EIGHTS], decay[EIGHTS];
	float scalar[EIGHTS]; /* log decay of all rows */
	float v, beta;
};

/* log decay of a token where all channels have the same. */
static __device__ __forceinline__ float scalar_decay(const struct matrix_recurrence_args &a,
                                                     int64_t b, int64_t token, int64_t h)
{
	if (a.decay == DECAY_CONSTANT)
		return log1pf(-exp2f(-5.0f - (float)h));
	return a.decay == DECAY_SCALAR ? __bfloat162float(*at(a.log_decay, b, token, h)) : 0.0f;
}

template <int ROWS>
static __device__ __forceinline__ void fetch(struct on_the_way<ROWS> &x,
                                             const struct matrix_recurrence_args &a, int64_t b,
                                             int64_t first, int64_t h, int64_t column)
{
#pragma unroll
	for (int i = 0; i < x.EIGHTS; i++) {
		const int number = threadIdx.x + i * THREADS, row = number % (ROWS / 8) * 8;
		const int64_t token = first + number / (ROWS / 8);
		const bool exists = number < TOKENS * ROWS / 8 && token < a.seq_len;
		const bool valid = exists && row < a.d_k;
		const vector8 zero = {};

		x.q[i] = valid ? load8(at(a.q, b, token, h) + row) : zero;
		x.k[i] = valid ? load8(at(a.k, b, token, h) + row) : zero;
		x.decay[i] = valid && a.decay == DECAY_DIAGONAL
		                     ? load8(at(a.log_decay, b, token, h) + row)
		                     : zero;
		x.scalar[i] = exists ? scalar_decay(a, b, token, h) : 0.0f;
	}
	const int64_t own = column + threadIdx.x % COLUMNS, token = first + threadIdx.x / COLUMNS;
	const int64_t of_beta = first + threadIdx.x;

	x.v = own < a.d_v && token < a.seq_len ? __bfloat162float(at(a.v, b, token, h)[own]) : 0.0f;
	x.beta = a.rule == RULE_DELTA && threadIdx.x < TOKENS && of_beta < a.seq_len
	                 ? __bfloat162float(*at(a.beta, b, of_beta, h))
	                 : 0.0f;
}

static __device__ __forceinline__ void place8(float *to, const float (&x)[8])
{
	reinterpret_cast<float4 *>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
	reinterpret_cast<float4 *>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <int ROWS>
static __device__ __forceinline__ void place(const struct tile &t, const struct on_the_way<ROWS> &x,
                                             float scale)
{
#pragma unroll
	for (int i = 0; i < x.EIGHTS; i++) {
		const int number = threadIdx.x + i * THREADS;
		float q[8], k[8], decay[8];

		if (number >= TOKENS * ROWS / 8)
			break;
		unpack8(q, x.q[i]);
		unpack8(k, x.k[i]);
		unpack8(decay, x.decay[i]);
#pragma unroll
		for (int j = 0; j < 8; j++) {
			q[j] *= scale;
			decay[j] = __expf(decay[j] + x.scalar[i]);
		}
		place8(t.q + 8 * number, q);
		place8(t.k + 8 * number, k);
		place8(t.decay + 8 * number, decay);
	}
	t.v[threadIdx.x / COLUMNS][threadIdx.x % COLUMNS] = x.v;
	if (threadIdx.x < TOKENS)
		t.beta[threadIdx.x] = x.beta;
}

/* Row number i of a lane's: four neighbours, then those of the other lanes. */
static __device__ __forceinline__ int row_of(int i, int lane)
{
	return i / 4 * 4 * LANES + 4 * lane + i % 4;
}

/* The state's column `at` [d_k, stride d_v] to or from registers. */
template <int ROWS, bool WRITE>
static __device__ __forceinline__ void visit_state(float (&s)[ROWS / LANES], float *at,
                                                   const struct matrix_recurrence_args &a, int lane)
{
#pragma unroll
	for (int i = 0; i < ROWS / LANES; i++) {
		const int row = row_of(i, lane);

		if (row < a.d_k && WRITE)
			at[row * a.d_v] = s[i];
		else if (row < a.d_k)
			s[i] = at[row * a.d_v];
	}
}

/* One token; returns this lane's part of o. */
template <int ROWS, enum rule RULE>
static __device__ __forceinline__ float take_token(float (&s)[ROWS / LANES], const struct tile &t,
                                                   int token, float v, int lane)
{
	const float4 *q = reinterpret_cast<const float4 *>(t.q + token * ROWS) + lane;
	const float4 *k = reinterpret_cast<const float4 *>(t.k + token * ROWS) + lane;
	const float4 *decay = reinterpret_cast<const float4 *>(t.decay + token * ROWS) + lane;
	const float4 *bonus = reinterpret_cast<const float4 *>(t.bonus) + lane;
	float4 o = {};

	if (RULE == RULE_DELTA) {
		float4 sum = {};

#pragma unroll
		for (int i = 0; i < ROWS / LANES; i += 4) {
			const float4 x = k[i / 4 * LANES], d = decay[i / 4 * LANES];

			s[i] *= d.x;
			s[i + 1] *= d.y;
			s[i + 2] *= d.z;
			s[i + 3] *= d.w;
			sum.x += x.x * s[i];
			sum.y += x.y * s[i + 1];
			sum.z += x.z * s[i + 2];
			sum.w += x.w * s[i + 3];
		}
		v = t.beta[token] * (v - group_sum(sum.x + sum.y + sum.z + sum.w, LANES));
	}
#pragma unroll
	for (int i = 0; i < ROWS / LANES; i += 4) {
		const float4 x = k[i / 4 * LANES], y = q[i / 4 * LANES];
		const float4 d = RULE == RULE_DELTA ? make_float4(1.0f, 1.0f, 1.0f, 1.0f)
		                                    : decay[i / 4 * LANES];

		if (RULE == RULE_BONUS) {
			const float4 u = bonus[i / 4 * LANES];

			o.x += y.x * (s[i] + u.x * x.x * v);
			o.y += y.y * (s[i + 1] + u.y * x.y * v);
			o.z += y.z * (s[i + 2] + u.z * x.z * v);
			o.w += y.w * (s[i + 3] + u.w * x.w * v);
		}
		s[i] = d.x * s[i] + x.x * v;
		s[i + 1] = d.y * s[i + 1] + x.y * v;
		s[i + 2] = d.z * s[i + 2] + x.z * v;
		s[i + 3] = d.w * s[i + 3] + x.w * v;
		if (RULE != RULE_BONUS) {
			o.x += y.x * s[i];
			o.y += y.y * s[i + 1];
			o.z += y.z * s[i + 2];
			o.w += y.w * s[i + 3];
		}
	}
	return o.x + o.y + o.z + o.w;
}

template <int ROWS, enum rule RULE>
static __global__ void __launch_bounds__(THREADS, ROWS > 256 ? 1 : 2)
        recurrent_kernel(const __grid_constant__ struct matrix_recurrence_args a)
{
	const int64_t slices = divide_up(a.d_v, COLUMNS), sequence = blockIdx.x / slices;
	const int64_t b = sequence / a.n_heads, h = sequence % a.n_heads;
	const int64_t column = blockIdx.x % slices * COLUMNS;
	const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
	const struct tile t = shared_tile<ROWS>();
	struct on_the_way<ROWS> next;
	float s[ROWS / LANES] = {};

	fetch(next, a, b, 0, h, column);
	if (a.h0 && column + own < a.d_v)
		visit_state<ROWS, false>(
		        s, const_cast<float *>(a.h0) + sequence * a.d_k * a.d_v + column + own, a,
		        lane);
	for (int i = threadIdx.x; i < ROWS; i += THREADS)
		t.bonus[i] = RULE == RULE_BONUS && i < a.d_k ? a.bonus[h * a.d_k + i] : 0.0f;
	for (int64_t first = 0; first < a.seq_len; first += TOKENS) {
		place(t, next, a.scale);
		__syncthreads();
		fetch(next, a, b, first + TOKENS, h, column);
#pragma unroll 1
		for (int token = 0; token < TOKENS; token++) {
			const float o = group_sum(
			        take_token<ROWS, RULE>(s, t, token, t.v[token][own], lane), LANES);

			if (lane == 0)
				t.out[token][own] = o;
		}
		__syncthreads();
		const int64_t token = first + threadIdx.x / COLUMNS;
		const int64_t to = column + threadIdx.x % COLUMNS;

		if (token < a.seq_len && to < a.d_v)
			at(a.out, b, token, h)[to] = __float2bfloat16(
			        t.out[threadIdx.x / COLUMNS][threadIdx.x % COLUMNS]);
	}
	if (a.final_state && column + own < a.d_v)
		visit_state<ROWS, true>(s, a.final_state + sequence * a.d_k * a.d_v + column + own,
		                        a, lane);
}

extern "C" const char *portable_recurrent_form_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (!is_known_decay(a->decay))
		return "an unknown decay";
	if (!is_known_rule(a->rule))
		return "an unknown rule";
	if (a->chunk > 1)
		return "chunk must be 1 with this rule, or 0";
	if (a->d_k % 8 || a->d_k > 512)
		return "d_k must be a multiple of 8, at most 512";
	if (a->batch * a->n_heads * divide_up(a->d_v, COLUMNS) > 0x7fffffff)
		return "more columns than a grid has blocks";
	if (a->decay == DECAY_DIAGONAL && !is_aligned(&a->log_decay))
		return "views must be 16-byte aligned";
	return check_aligned(&a->q, &a->k);
}

template <int ROWS, enum rule RULE>
static enum status run(struct device *device, const struct matrix_recurrence_args *a)
{
	const int64_t blocks = a->batch * a->n_heads * divide_up(a->d_v, COLUMNS);

	return launch(device, "matrix_recurrence", recurrent_kernel<ROWS, RULE>,
	              dim3((unsigned)blocks), THREADS, shared_bytes<ROWS>(), *a);
}

template <int ROWS>
static enum status run_rule(struct device *device, const struct matrix_recurrence_args *a)
{
	return a->rule == RULE_PLAIN   ? run<ROWS, RULE_PLAIN>(device, a)
	       : a->rule == RULE_BONUS ? run<ROWS, RULE_BONUS>(device, a)
	                               : run<ROWS, RULE_DELTA>(device, a);
}

extern "C" enum status portable_recurrent_form(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	return a->d_k <= 64    ? run_rule<64>(device, a)
	       : a->d_k <= 128 ? run_rule<128>(device, a)
	       : a->d_k <= 256 ? run_rule<256>(device, a)
	                       : run_rule<512>(device, a);
}
