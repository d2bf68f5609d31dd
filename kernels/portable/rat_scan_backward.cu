/*
 * Gradients of RAT's scan, in reverse over each chunk; with a the decay,
 *   lambda_t = dv_scan_t + a_{t+1} lambda_{t+1}    (+ dv_chunk at the chunk's end)
 *   mu_t = scale down_score_t q_t + a_{t+1} mu_{t+1}   (+ dk_chunk, rotated back, at its end)
 *   dv = (1-a) lambda,  dk = sum over the group's heads of (1-a) mu
 *   dlogit = (lambda (vt_{t-1} - v) + mu (kt_{t-1} - k)) a (1-a)
 *   dq = dq_out rotated back + sum over the group's heads of scale down_score kt
 *
 * A block takes the heads of one group in one chunk after another; a thread
 * four channels of a head. The running pair is computed again: a walk through
 * the chunk leaves its difference to each token in shared memory, then the
 * tokens are taken from the last to the first. The heads' shares of dq and dk
 * meet in shared memory. A chunk longer than STRETCH first leaves the pair in
 * the workspace once per stretch.
 *
 * Reads v, gate, dv_scan, writes dv, dgate, each [N, D]; the rest is small.
 *
 * Limit: instructions, 80 for each element of v: 2.8 ms for 262144 tokens x 2048, L = 16; memory
 * would take 1.5. 16 bytes are spilled, once per chunk. docs/kernels/portable_rat_scan_backward.md.
 * may spill: rat_scan_backward_kernel
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/kernels.h"
#include "kernels/portable/rope.cuh"

namespace
{

constexpr int THREADS = 256, BLOCKS_PER_SM = 2;
constexpr int SEGMENT = 4, STRETCH = 16;

struct work {
	uint32_t items, chunks; /* chunks of all sequences, of one */
	int64_t stretches;      /* per chunk */
	int heads;              /* of a group at a time */
	float *bias_parts;      /* [blocks of a group, H*d] */
	float4 *pairs;          /* [B*chunks, stretches, H*d/4, 2], from the second stretch on */
};

static __device__ __forceinline__ uint2 load4(const bf16 *from)
{
	return *reinterpret_cast<const uint2 *>(from);
}

/* Of a tensor that nobody writes meanwhile. */
static __device__ __forceinline__ uint2 load4_constant(const bf16 *from)
{
	return __ldg(reinterpret_cast<const uint2 *>(from));
}

static __device__ __forceinline__ void unpack4(float (&x)[4], uint2 v)
{
	x[0] = low_half(v.x);
	x[1] = high_half(v.x);
	x[2] = low_half(v.y);
	x[3] = high_half(v.y);
}

static __device__ __forceinline__ uint2 pack4(const float (&x)[4])
{
	return make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

static __device__ __forceinline__ void store4(bf16 *to, const float (&x)[4])
{
	*reinterpret_cast<uint2 *>(to) = pack4(x);
}

static __device__ __forceinline__ float4 vector_of(const float (&x)[4])
{
	return make_float4(x[0], x[1], x[2], x[3]);
}

static __device__ __forceinline__ void set(float (&x)[4], float4 v)
{
	x[0] = v.x;
	x[1] = v.y;
	x[2] = v.z;
	x[3] = v.w;
}

/* The tensors that a block reads and writes, where its chunk begins: of each of its heads, and of
 * the group. In shared memory, for their addresses take many instructions. */
enum head_tensor { GATE, V, DV_SCAN, DOWN_SCORE, DV, DGATE, HEAD_TENSORS };
enum group_tensor { K, Q, DQ_OUT, DQ, DK, GROUP_TENSORS };

struct places {
	void *head[THREADS / 16][HEAD_TENSORS], *group[GROUP_TENSORS + 1]; /* 16-byte aligned */
};

/* First in shared memory. */
static __device__ __forceinline__ struct places *places_of()
{
	return reinterpret_cast<struct places *>(shared_memory);
}

/* Where a thread works: the sequence, the head, the group, its first channel, and which of the
 * block's heads it is. */
struct place {
	int b, h, group, column, slot;
};

static __device__ __forceinline__ void *find_head(const struct rat_scan_backward_args &a,
                                                  int tensor, int64_t b, int64_t t, int64_t h)
{
	const struct rat_scan_args &f = a.forward;

	switch (tensor) {
	case GATE:
		return at(f.gate, b, t, h);
	case V:
		return at(f.v, b, t, h);
	case DV_SCAN:
		return at(a.dv_scan, b, t, h);
	case DOWN_SCORE:
		return const_cast<float *>(a.down_score) + (b * f.seq_len + t) * f.n_heads + h;
	case DV:
		return at(a.dv, b, t, h);
	default:
		return at(a.dgate, b, t, h);
	}
}

static __device__ __forceinline__ void *find_group(const struct rat_scan_backward_args &a,
                                                   int tensor, int64_t b, int64_t t, int64_t group)
{
	switch (tensor) {
	case K:
		return at(a.forward.k, b, t, group);
	case Q:
		return at(a.forward.q, b, t, group);
	case DQ_OUT:
		return at(a.dq_out, b, t, group);
	case DQ:
		return at(a.dq, b, t, group);
	default:
		return at(a.dk, b, t, group);
	}
}

/* Token t of the chunk, from `column` on, of one of those tensors. */
static __device__ __forceinline__ bf16 *row_of(void *tensor, const struct view &v, int t,
                                               int column)
{
	return static_cast<bf16 *>(tensor) + (int64_t)t * (int)v.token + column;
}

/* `tokens` strides of a tensor; a few of them fit 32 bits. */
static __device__ __forceinline__ int stride_of(const struct view &v, int tokens)
{
	return tokens * (int)v.token;
}

/* Tokens of a segment that are read on the way forward, and on the way back. */
struct ahead {
	uint2 gate[SEGMENT], k[SEGMENT], v[SEGMENT];
};

struct behind {
	uint2 gate[SEGMENT], k[SEGMENT], q[SEGMENT], dv_scan[SEGMENT];
	float ds[SEGMENT];
};

/* The n <= SEGMENT tokens from t on; those missing repeat the last. */
static __device__ __forceinline__ void load(struct ahead &s, const struct rat_scan_backward_args &a,
                                            const struct place &p, int t, int n)
{
	const struct rat_scan_args &f = a.forward;
	const bf16 *gate = row_of(places_of()->head[p.slot][GATE], f.gate, t, p.column);
	const bf16 *v = row_of(places_of()->head[p.slot][V], f.v, t, p.column);
	const bf16 *k = row_of(places_of()->group[K], f.k, t, p.column);

#pragma unroll
	for (int i = 0; i < SEGMENT; i++) {
		const int row = min(i, n - 1);

		s.gate[i] = load4_constant(gate + stride_of(f.gate, row));
		s.k[i] = load4_constant(k + stride_of(f.k, row));
		s.v[i] = load4_constant(v + stride_of(f.v, row));
	}
}

static __device__ __forceinline__ void
load(struct behind &s, const struct rat_scan_backward_args &a, const struct place &p, int t, int n)
{
	const struct rat_scan_args &f = a.forward;
	const bf16 *gate = row_of(places_of()->head[p.slot][GATE], f.gate, t, p.column);
	const bf16 *dv_scan = row_of(places_of()->head[p.slot][DV_SCAN], a.dv_scan, t, p.column);
	const bf16 *k = row_of(places_of()->group[K], f.k, t, p.column);
	const bf16 *q = row_of(places_of()->group[Q], f.q, t, p.column);
	const float *down_score =
	        static_cast<const float *>(places_of()->head[p.slot][DOWN_SCORE]) +
	        (int64_t)t * (int)f.n_heads;

#pragma unroll
	for (int i = 0; i < SEGMENT; i++) {
		const int row = min(i, n - 1);

		s.gate[i] = load4_constant(gate + stride_of(f.gate, row));
		s.k[i] = load4_constant(k + stride_of(f.k, row));
		s.q[i] = load4_constant(q + stride_of(f.q, row));
		s.dv_scan[i] = load4_constant(dv_scan + stride_of(a.dv_scan, row));
		s.ds[i] = f.scale * __ldg(down_score + row * (int)f.n_heads);
	}
}

/*
 * The pair after the n tokens from t on, from the pair before them. steps
 * [STRETCH], blockDim.x apart: where KEEP, the pair before each token less
 * the token, as bf16: what is made of it is stored as bf16.
 */
template <bool KEEP>
static __device__ __forceinline__ void walk(float (&k)[4], float (&v)[4], const float4 *biases,
                                            const struct rat_scan_backward_args &a,
                                            const struct place &p, int t, int n, uint4 *steps)
{
	struct ahead now, next;
	float bias[4];

	set(bias, biases[0]);
	load(now, a, p, t, min(n, SEGMENT));
	for (int first = 0; first < n; first += SEGMENT) {
		if (first + SEGMENT < n)
			load(next, a, p, t + first + SEGMENT, min(n - first - SEGMENT, SEGMENT));
#pragma unroll
		for (int i = 0; i < SEGMENT; i++) {
			float logit[4], x[4], y[4], x_step[4], y_step[4];

			if (first + i >= n)
				break;
			unpack4(logit, now.gate[i]);
			unpack4(x, now.k[i]);
			unpack4(y, now.v[i]);
#pragma unroll
			for (int j = 0; j < 4; j++) {
				const float decay = sigmoids_of(bias[j] - LOG2E * logit[j]).of;

				x_step[j] = k[j] - x[j];
				y_step[j] = v[j] - y[j];
				k[j] = x[j] + decay * x_step[j];
				v[j] = y[j] + decay * y_step[j];
			}
			if (KEEP) {
				const uint2 kept_k = pack4(x_step), kept_v = pack4(y_step);

				steps[(first + i) * blockDim.x] =
				        make_uint4(kept_k.x, kept_k.y, kept_v.x, kept_v.y);
			}
		}
		now = next;
	}
}

/*
 * The n tokens of a segment from t on, from the last to the first: mu and
 * lambda are the gradients that flow in behind them and out before them. The
 * head's shares of dq and dk go to `parts`.
 */
static __device__ __forceinline__ void
differentiate(const struct rat_scan_backward_args &a, const struct place &p, const struct behind &s,
              int t, int n, const uint4 *steps, float (&mu)[4], float (&lambda)[4], float4 *biases,
              bool active, float4 *parts, int part_stride)
{
	bf16 *const to_dv = row_of(places_of()->head[p.slot][DV], a.dv, t, p.column);
	bf16 *const to_dgate = row_of(places_of()->head[p.slot][DGATE], a.dgate, t, p.column);
	float bias[4], dbias[4];

	set(bias, biases[0]);
	set(dbias, biases[blockDim.x]);
#pragma unroll
	for (int i = SEGMENT - 1; i >= 0; i--) {
		float logit[4], x[4], qs[4], dvs[4], k_step[4], v_step[4];
		float dq[4], dk[4], dv[4], dgate[4];

		if (i >= n)
			continue;
		const uint4 step = steps[i * blockDim.x];
		unpack4(logit, s.gate[i]);
		unpack4(x, s.k[i]);
		unpack4(qs, s.q[i]);
		unpack4(dvs, s.dv_scan[i]);
		unpack4(k_step, make_uint2(step.x, step.y));
		unpack4(v_step, make_uint2(step.z, step.w));
#pragma unroll
		for (int j = 0; j < 4; j++) {
			const struct sigmoids g = sigmoids_of(bias[j] - LOG2E * logit[j]);

			mu[j] += s.ds[i] * qs[j];
			lambda[j] += dvs[j];
			dq[j] = s.ds[i] * (x[j] + g.of * k_step[j]);
			dk[j] = g.of_minus * mu[j];
			dv[j] = g.of_minus * lambda[j];
			mu[j] *= g.of;
			lambda[j] *= g.of;
			dgate[j] = g.of_minus * (lambda[j] * v_step[j] + mu[j] * k_step[j]);
			dbias[j] += dgate[j];
		}
		if (!active)
			continue;
		parts[i * part_stride] = vector_of(dq);
		parts[(SEGMENT + i) * part_stride] = vector_of(dk);
		store4(to_dv + stride_of(a.dv, i), dv);
		store4(to_dgate + stride_of(a.dgate, i), dgate);
	}
	biases[blockDim.x] = vector_of(dbias);
}

/* Four channels of a row rotated back, by the chunk's angles. */
template <int D>
static __device__ __forceinline__ void unrotate(float (&x)[4], const bf16 *row, int column,
                                                const float2 *angles, bool rope)
{
	const bool low = column < D / 2;
	float partner[4];

	unpack4(x, load4(row + column));
	if (!rope)
		return;
	unpack4(partner, load4(row + (low ? column + D / 2 : column - D / 2)));
#pragma unroll
	for (int i = 0; i < 4; i++) {
		const float2 angle = angles[(low ? column : column - D / 2) + i]; /* cos, sin */

		x[i] = x[i] * angle.x + (low ? partner[i] : -partner[i]) * angle.y;
	}
}

/* dq and dk of n tokens from t on: the sums over the heads' shares in shared memory,
 * [2][SEGMENT][heads][D / 4]. More heads than fit in a block come in batches. */
template <int D>
static __device__ __forceinline__ void
sum_heads(const struct rat_scan_backward_args &a, const struct place &p, const float4 *parts,
          int heads, int slots, bool first_batch, int t, int n, const float2 *angles)
{
	constexpr int LANES = D / 4;

	for (int i = threadIdx.x; i < 2 * SEGMENT * LANES; i += blockDim.x) {
		const int lane = i % LANES, token = i / LANES % SEGMENT;
		const bool is_dk = i / LANES / SEGMENT;
		const float4 *part = parts + (i / LANES * heads) * LANES + lane;
		float sum[4] = {};
		bf16 *const to = row_of(places_of()->group[is_dk ? DK : DQ], is_dk ? a.dk : a.dq,
		                        t + token, 4 * lane);

		if (token >= n)
			continue;
		if (!first_batch)
			unpack4(sum, load4(to));
		else if (!is_dk)
			unrotate<D>(sum, row_of(places_of()->group[DQ_OUT], a.dq_out, t + token, 0),
			            4 * lane, angles, a.forward.rope);
#pragma unroll 4
		for (int s = 0; s < slots; s++) {
			const float4 share = part[s * LANES];

			sum[0] += share.x;
			sum[1] += share.y;
			sum[2] += share.z;
			sum[3] += share.w;
		}
		store4(to, sum);
	}
}

/* Where a thread keeps the pair before a stretch of a chunk. */
static __device__ __forceinline__ float4 *pair_of(const struct work &w,
                                                  const struct rat_scan_args &f, uint32_t item,
                                                  int stretch, const struct place &p)
{
	const int64_t row = (item * w.stretches + stretch) * f.n_heads + p.h;

	return w.pairs + (row * f.d_head + p.column) / 2;
}

template <int D>
static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        rat_scan_backward_kernel(const __grid_constant__ struct rat_scan_backward_args a,
                                 const __grid_constant__ struct work w,
                                 const __grid_constant__ struct rope_table table)
{
	constexpr int LANES = D / 4;
	const struct rat_scan_args &f = a.forward;
	const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
	const int heads_of_group = (int)(f.n_heads / f.groups);
	float2 *const angles = reinterpret_cast<float2 *>(shared_memory + sizeof(struct places));
	float4 *const parts = reinterpret_cast<float4 *>(angles + D / 2);
	/* A thread's own: steps of its tokens, the biases of its channels times -log2(e), and their
	 * gradients. */
	uint4 *const all_steps = reinterpret_cast<uint4 *>(parts + 2 * SEGMENT * w.heads * LANES);
	uint4 *const steps = all_steps + threadIdx.x;
	float4 *const biases =
	        reinterpret_cast<float4 *>(all_steps + STRETCH * blockDim.x) + threadIdx.x;
	struct place p;

	p.slot = slot;
	p.group = blockIdx.y;
	p.column = 4 * lane;
	for (int batch = 0; batch < heads_of_group; batch += w.heads) {
		const int slots = min(w.heads, heads_of_group - batch);
		const bool active = slot < slots;
		float bias[4];

		/* Threads without a head do as the group's first and keep quiet. */
		p.h = p.group + (active ? batch + slot : 0) * (int)f.groups;
#pragma unroll
		for (int i = 0; i < 4; i++)
			bias[i] = -LOG2E * f.gate_bias[p.h * D + p.column + i];
		biases[0] = vector_of(bias);
		biases[blockDim.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
		for (uint32_t item = blockIdx.x; item < w.items; item += gridDim.x) {
			const uint32_t chunk = item % w.chunks;
			const int begin = (int)(chunk * f.chunk);
			const int end = (int)min(begin + f.chunk, f.seq_len);
			const int last = (end - begin - 1) / STRETCH;
			float k[4] = {}, v[4] = {}, mu[4], lambda[4];

			p.b = (int)(item / w.chunks);
			for (int i = threadIdx.x; f.rope && i < D / 2; i += blockDim.x) {
				float sine, cosine;

				rope_angle(cosine, sine, table, i, chunk);
				angles[i] = make_float2(cosine, sine);
			}
			/* A head's first lanes find its tensors. */
			for (int i = lane; i < HEAD_TENSORS; i += LANES)
				places_of()->head[slot][i] = find_head(a, i, p.b, begin, p.h);
			if (threadIdx.x < GROUP_TENSORS)
				places_of()->group[threadIdx.x] =
				        find_group(a, threadIdx.x, p.b, begin, p.group);
			__syncthreads();
			for (int s = 0; s < last; s++) {
				walk<false>(k, v, biases, a, p, s * STRETCH, STRETCH, NULL);
				if (active) {
					float4 *const to = pair_of(w, f, item, s + 1, p);

					to[0] = vector_of(k);
					to[1] = vector_of(v);
				}
			}
			unrotate<D>(mu, at(a.dk_chunk, p.b, chunk, p.h), p.column, angles, f.rope);
			unpack4(lambda, load4(at(a.dv_chunk, p.b, chunk, p.h) + p.column));
			for (int stretch = last; stretch >= 0; stretch--) {
				const int first = stretch * STRETCH;
				const int n = min(STRETCH, end - begin - first);
				const int final = (n - 1) / SEGMENT;

				if (stretch < last && stretch > 0 && active) {
					const float4 *const from = pair_of(w, f, item, stretch, p);

					set(k, from[0]);
					set(v, from[1]);
				}
				for (int i = 0; stretch == 0 && i < 4; i++)
					k[i] = v[i] = 0.0f;
				walk<true>(k, v, biases, a, p, first, n, steps);
				struct behind now;
				load(now, a, p, first + final * SEGMENT, n - final * SEGMENT);
				for (int s = final; s >= 0; s--) {
					const int t = first + s * SEGMENT;
					const int tokens = min(SEGMENT, n - s * SEGMENT);

					differentiate(a, p, now, t, tokens,
					              steps + s * SEGMENT * blockDim.x, mu, lambda,
					              biases, active, parts + slot * LANES + lane,
					              w.heads * LANES);
					if (s > 0)
						load(now, a, p, t - SEGMENT, SEGMENT);
					__syncthreads();
					sum_heads<D>(a, p, parts, w.heads, slots, batch == 0, t,
					             tokens, angles);
					__syncthreads();
				}
			}
		}
		if (active)
			*reinterpret_cast<float4 *>(w.bias_parts +
			                            (blockIdx.x * f.n_heads + p.h) * D + p.column) =
			        biases[blockDim.x];
	}
}

/* Threads per head, heads of a group at a time, threads per block. */
static int lanes_of(const struct rat_scan_args *f)
{
	return (int)f->d_head / 4;
}

static int heads_at_once(const struct rat_scan_args *f)
{
	const int64_t most = THREADS / lanes_of(f), heads = f->n_heads / f->groups;

	return (int)(heads < most ? heads : most);
}

static int64_t blocks_of(const struct device *device, const struct rat_scan_args *f)
{
	const int64_t items = f->batch * divide_up(f->seq_len, f->chunk);
	const int64_t wanted = divide_up((int64_t)BLOCKS_PER_SM * cuda_sm_count(device), f->groups);

	return items < wanted ? items : wanted;
}

static struct work work_of(const struct device *device, const struct rat_scan_args *f,
                           void *workspace)
{
	const int64_t chunk = f->chunk < f->seq_len ? f->chunk : f->seq_len;
	struct work w;

	w.chunks = (uint32_t)divide_up(f->seq_len, f->chunk);
	w.items = (uint32_t)f->batch * w.chunks;
	w.stretches = divide_up(chunk, STRETCH);
	w.heads = heads_at_once(f);
	w.bias_parts = static_cast<float *>(workspace);
	w.pairs = reinterpret_cast<float4 *>(w.bias_parts +
	                                     blocks_of(device, f) * f->n_heads * f->d_head);
	return w;
}

} // namespace

extern "C" const char *portable_rat_scan_backward_unsupported(const struct device *,
                                                              const void *args)
{
	const auto *a = static_cast<const struct rat_scan_backward_args *>(args);
	const struct rat_scan_args *f = &a->forward;
	const struct view *const views[] = {&f->v,       &f->gate,   &f->q,        &f->k,
	                                    &a->dv_scan, &a->dq_out, &a->dk_chunk, &a->dv_chunk,
	                                    &a->dv,      &a->dgate,  &a->dq,       &a->dk};

	if (f->d_head != 64 && f->d_head != 128)
		return "head width must be 64 or 128";
	if (f->groups > 65535)
		return "more than 65535 groups";
	for (const struct view *v : views) {
		if (v->token > INT32_MAX / SEGMENT)
			return "rows too far apart";
		if (const char *why = check_aligned(v))
			return why;
	}
	return NULL;
}

extern "C" size_t portable_rat_scan_backward_workspace(const struct device *device,
                                                       const void *args)
{
	const struct rat_scan_args *f =
	        &static_cast<const struct rat_scan_backward_args *>(args)->forward;
	const struct work w = work_of(device, f, NULL);
	const int64_t pairs = w.stretches > 1 ? w.items * w.stretches : 0;

	return (size_t)((blocks_of(device, f) + 2 * pairs) * f->n_heads * f->d_head) *
	       sizeof(float);
}

extern "C" enum status portable_rat_scan_backward(struct device *device, const void *args,
                                                  void *workspace)
{
	const auto *a = static_cast<const struct rat_scan_backward_args *>(args);
	const struct rat_scan_args *f = &a->forward;
	const struct work w = work_of(device, f, workspace);
	const int threads = (int)divide_up(w.heads * lanes_of(f), WARP) * WARP;
	const size_t shared = 2 * SEGMENT * (size_t)(w.heads * lanes_of(f)) * sizeof(float4) +
	                      (STRETCH + 2) * (size_t)threads * sizeof(float4) +
	                      (size_t)f->d_head / 2 * sizeof(float2) + sizeof(struct places);
	const dim3 grid((unsigned)blocks_of(device, f), (unsigned)f->groups);
	enum status status = launch(device, "rat_scan_backward",
	                            f->d_head == 64 ? rat_scan_backward_kernel<64>
	                                            : rat_scan_backward_kernel<128>,
	                            grid, threads, shared, *a, w, rope_table_of(f->d_head));

	if (status != STATUS_OK)
		return status;
	return column_sums(device, "rat_scan_backward", w.bias_parts, grid.x,
	                   f->n_heads * f->d_head, f->n_heads * f->d_head, a->dgate_bias);
}
