/*
 * Gradients of RAT's scan, in reverse over each chunk; with a the decay,
 *   lambda_t = dv_scan_t + a_{t+1} lambda_{t+1}    (+ dv_chunk at the chunk's end)
 *   mu_t = scale down_score_t q_t + a_{t+1} mu_{t+1}   (+ dk_chunk, rotated back, at its end)
 *   dv = (1-a) lambda,  dk = sum over the group's heads of (1-a) mu
 *   dlogit = (lambda (vt_{t-1} - v) + mu (kt_{t-1} - k)) a (1-a)
 *   dq = dq_out rotated back + sum over the group's heads of scale down_score kt
 *
 * A block takes the heads of one group in one chunk after another; a thread
 * four channels of a head. The running pair is computed again: a first walk
 * through the chunk leaves it in shared memory every SEGMENT tokens, then the
 * segments are taken from the last to the first, each with its tokens in
 * registers. The heads' shares of dq and dk meet in shared memory. A chunk
 * longer than STRETCH first leaves the pair in the workspace once per stretch.
 *
 * Reads v, gate, dv_scan, writes dv, dgate, each [N, D]; the rest is small.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/portable.h"
#include "kernels/portable/rope.cuh"

namespace
{

constexpr int THREADS = 256, BLOCKS_PER_SM = 2;
constexpr int SEGMENT = 4, STRETCH = 32, SEGMENTS = STRETCH / SEGMENT;

struct work {
	int64_t chunks, stretches; /* per sequence, per chunk */
	int heads;                 /* of a group at a time */
	float *bias_parts;         /* [blocks of a group, H*d] */
	float4 *pairs;             /* [B*chunks, stretches, H*d/4, 2], from the second stretch on */
};

static __device__ __forceinline__ uint2 load4(const bf16 *from)
{
	return *reinterpret_cast<const uint2 *>(from);
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

/* 1 - a and a of a logit, both exact. */
static __device__ __forceinline__ void shares(float &share, float &decay, float logit)
{
	float e = __expf(-logit);

	if (e > 1e30f) /* its product with the decay would be infinity times zero */
		e = 1e30f;
	decay = __fdividef(1.0f, 1.0f + e);
	share = e * decay;
}

/* Where a thread works: its head, and the first of its four channels in it. */
struct place {
	int64_t b, first, end, h, group;
	int column;
};

/* The pair after token t, from the pair before it. */
static __device__ __forceinline__ void advance(float (&k)[4], float (&v)[4], const float (&bias)[4],
                                               uint2 gate, uint2 new_k, uint2 new_v)
{
	float logit[4], ks[4], vs[4], share, decay;

	unpack4(logit, gate);
	unpack4(ks, new_k);
	unpack4(vs, new_v);
#pragma unroll
	for (int i = 0; i < 4; i++) {
		shares(share, decay, logit[i] + bias[i]);
		k[i] = ks[i] + decay * (k[i] - ks[i]);
		v[i] = vs[i] + decay * (v[i] - vs[i]);
	}
}

/* The pair after tokens first .. end-1. */
static __device__ __forceinline__ void walk(float (&k)[4], float (&v)[4], const float (&bias)[4],
                                            const struct rat_scan_args &f, const struct place &p,
                                            int64_t first, int64_t end)
{
	for (int64_t t = first; t < end; t += SEGMENT) {
		uint2 gate[SEGMENT], ks[SEGMENT], vs[SEGMENT];

#pragma unroll
		for (int i = 0; i < SEGMENT; i++) {
			const int64_t row = min(t + i, end - 1);

			gate[i] = load4(at(f.gate, p.b, row, p.h) + p.column);
			ks[i] = load4(at(f.k, p.b, row, p.group) + p.column);
			vs[i] = load4(at(f.v, p.b, row, p.h) + p.column);
		}
#pragma unroll
		for (int i = 0; i < SEGMENT; i++)
			if (t + i < end)
				advance(k, v, bias, gate[i], ks[i], vs[i]);
	}
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
          int heads, int slots, bool first_batch, int64_t t, int n, const float2 *angles)
{
	constexpr int LANES = D / 4;

	for (int i = threadIdx.x; i < 2 * SEGMENT * LANES; i += blockDim.x) {
		const int lane = i % LANES, token = i / LANES % SEGMENT;
		const bool is_dk = i / LANES / SEGMENT;
		const float4 *part = parts + (i / LANES * heads) * LANES + lane;
		float sum[4] = {};
		bf16 *const to = at(is_dk ? a.dk : a.dq, p.b, t + token, p.group) + 4 * lane;

		if (token >= n)
			continue;
		if (!first_batch)
			unpack4(sum, load4(to));
		else if (!is_dk)
			unrotate<D>(sum, at(a.dq_out, p.b, t + token, p.group), 4 * lane, angles,
			            a.forward.rope);
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
	float4 *const parts = reinterpret_cast<float4 *>(shared_memory);
	float4 *const checkpoints = parts + 2 * SEGMENT * w.heads * LANES;
	float2 *const angles = reinterpret_cast<float2 *>(checkpoints + 2 * SEGMENTS * blockDim.x);
	struct place p;

	p.group = blockIdx.y;
	p.column = 4 * lane;
	for (int batch = 0; batch < heads_of_group; batch += w.heads) {
		const int slots = min(w.heads, heads_of_group - batch);
		const bool active = slot < slots;
		float bias[4], dbias[4] = {};

		/* Threads without a head do as the group's first and keep quiet. */
		p.h = p.group + (active ? batch + slot : 0) * f.groups;
#pragma unroll
		for (int i = 0; i < 4; i++)
			bias[i] = f.gate_bias[p.h * D + p.column + i];
		for (int64_t item = blockIdx.x; item < f.batch * w.chunks; item += gridDim.x) {
			const int64_t chunk = item % w.chunks;
			float4 *const pairs = w.pairs +
			                      (item * w.stretches * f.n_heads + p.h) * LANES * 2 +
			                      2 * lane;
			const int64_t pair_stride = f.n_heads * LANES * 2;
			float k[4] = {}, v[4] = {}, mu[4], lambda[4];

			p.b = item / w.chunks;
			p.first = chunk * f.chunk;
			p.end = min(p.first + f.chunk, f.seq_len);
			const int last = (int)((p.end - p.first - 1) / STRETCH);

			__syncthreads();
			for (int i = threadIdx.x; f.rope && i < D / 2; i += blockDim.x) {
				float sine, cosine;

				rope_angle(cosine, sine, table, i, chunk);
				angles[i] = make_float2(cosine, sine);
			}
			__syncthreads();
			for (int s = 0; s < last; s++) {
				const int64_t first = p.first + s * STRETCH;

				walk(k, v, bias, f, p, first, first + STRETCH);
				if (active) {
					pairs[(s + 1) * pair_stride] = vector_of(k);
					pairs[(s + 1) * pair_stride + 1] = vector_of(v);
				}
			}
			unrotate<D>(mu, at(a.dk_chunk, p.b, chunk, p.h), p.column, angles, f.rope);
			unpack4(lambda, load4(at(a.dv_chunk, p.b, chunk, p.h) + p.column));
			for (int stretch = last; stretch >= 0; stretch--) {
				const int64_t first = p.first + stretch * STRETCH;
				const int n = (int)min((int64_t)STRETCH, p.end - first);
				const int final = (n - 1) / SEGMENT;

				if (stretch < last && stretch > 0 && active) {
					set(k, pairs[stretch * pair_stride]);
					set(v, pairs[stretch * pair_stride + 1]);
				}
				for (int i = 0; stretch == 0 && i < 4; i++)
					k[i] = v[i] = 0.0f;
				for (int s = 0; s < final; s++) {
					checkpoints[2 * s * blockDim.x + threadIdx.x] =
					        vector_of(k);
					checkpoints[(2 * s + 1) * blockDim.x + threadIdx.x] =
					        vector_of(v);
					walk(k, v, bias, f, p, first + s * SEGMENT,
					     first + (s + 1) * SEGMENT);
				}
				for (int s = final; s >= 0; s--) {
					const int64_t t = first + s * SEGMENT;
					const int tokens = (int)min((int64_t)SEGMENT, p.end - t);
					uint2 q[SEGMENT], dv_scan[SEGMENT], ks[SEGMENT],
					        vs[SEGMENT], gate[SEGMENT];
					uint2 k_step[SEGMENT], v_step[SEGMENT];
					float ds[SEGMENT];

#pragma unroll
					for (int i = 0; i < SEGMENT; i++) {
						const int64_t row = min(t + i, p.end - 1);

						gate[i] =
						        load4(at(f.gate, p.b, row, p.h) + p.column);
						ks[i] = load4(at(f.k, p.b, row, p.group) +
						              p.column);
						vs[i] = load4(at(f.v, p.b, row, p.h) + p.column);
						q[i] = load4(at(f.q, p.b, row, p.group) + p.column);
						dv_scan[i] = load4(at(a.dv_scan, p.b, row, p.h) +
						                   p.column);
						ds[i] = f.scale * a.down_score[(p.b * f.seq_len +
						                                row) * f.n_heads +
						                               p.h];
					}
					if (s < final) {
						set(k,
						    checkpoints[2 * s * blockDim.x + threadIdx.x]);
						set(v, checkpoints[(2 * s + 1) * blockDim.x +
						                   threadIdx.x]);
					}
					/* Differences of the pair before a token to the token. */
#pragma unroll
					for (int i = 0; i < SEGMENT; i++) {
						float x[4], y[4];

						unpack4(x, ks[i]);
						unpack4(y, vs[i]);
#pragma unroll
						for (int j = 0; j < 4; j++) {
							x[j] = k[j] - x[j];
							y[j] = v[j] - y[j];
						}
						k_step[i] = pack4(x);
						v_step[i] = pack4(y);
						if (i < SEGMENT - 1)
							advance(k, v, bias, gate[i], ks[i], vs[i]);
					}
#pragma unroll
					for (int i = SEGMENT - 1; i >= 0; i--) {
						float logit[4], x[4], qs[4], dvs[4], k_steps[4],
						        v_steps[4], dq[4], dk[4], dv[4], dgate[4];

						if (i >= tokens)
							continue;
						unpack4(logit, gate[i]);
						unpack4(x, ks[i]);
						unpack4(qs, q[i]);
						unpack4(dvs, dv_scan[i]);
						unpack4(k_steps, k_step[i]);
						unpack4(v_steps, v_step[i]);
#pragma unroll
						for (int j = 0; j < 4; j++) {
							float share, decay;

							shares(share, decay, logit[j] + bias[j]);
							mu[j] += ds[i] * qs[j];
							lambda[j] += dvs[j];
							dq[j] = ds[i] * (x[j] + decay * k_steps[j]);
							dk[j] = share * mu[j];
							dv[j] = share * lambda[j];
							mu[j] *= decay;
							lambda[j] *= decay;
							dgate[j] = share * (lambda[j] * v_steps[j] +
							                    mu[j] * k_steps[j]);
							dbias[j] += dgate[j];
						}
						if (!active)
							continue;
						parts[(i * w.heads + slot) * LANES + lane] =
						        vector_of(dq);
						parts[((SEGMENT + i) * w.heads + slot) * LANES +
						      lane] = vector_of(dk);
						store4(at(a.dv, p.b, t + i, p.h) + p.column, dv);
						store4(at(a.dgate, p.b, t + i, p.h) + p.column,
						       dgate);
					}
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
			        vector_of(dbias);
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

static int64_t blocks_of(const struct rat_scan_args *f)
{
	const int64_t items = f->batch * divide_up(f->seq_len, f->chunk);
	const int64_t wanted = divide_up((int64_t)BLOCKS_PER_SM * cuda_sm_count(), f->groups);

	return items < wanted ? items : wanted;
}

static struct work work_of(const struct rat_scan_args *f, void *workspace)
{
	const int64_t chunk = f->chunk < f->seq_len ? f->chunk : f->seq_len;
	struct work w;

	w.chunks = divide_up(f->seq_len, f->chunk);
	w.stretches = divide_up(chunk, STRETCH);
	w.heads = heads_at_once(f);
	w.bias_parts = static_cast<float *>(workspace);
	w.pairs = reinterpret_cast<float4 *>(w.bias_parts + blocks_of(f) * f->n_heads * f->d_head);
	return w;
}

} // namespace

extern "C" const char *portable_rat_scan_backward_unsupported(const void *args)
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
	return views_are_aligned(views, 12) ? NULL : "views must be 16-byte aligned";
}

extern "C" size_t portable_rat_scan_backward_workspace(const void *args)
{
	const struct rat_scan_args *f =
	        &static_cast<const struct rat_scan_backward_args *>(args)->forward;
	const struct work w = work_of(f, NULL);
	const int64_t pairs = w.stretches > 1 ? f->batch * w.chunks * w.stretches : 0;

	return (size_t)((blocks_of(f) + 2 * pairs) * f->n_heads * f->d_head) * sizeof(float);
}

extern "C" enum status portable_rat_scan_backward(const void *args, void *workspace)
{
	const auto *a = static_cast<const struct rat_scan_backward_args *>(args);
	const struct rat_scan_args *f = &a->forward;
	const struct work w = work_of(f, workspace);
	const int threads = (int)divide_up(w.heads * lanes_of(f), WARP) * WARP;
	const size_t shared = 2 * SEGMENT * (size_t)(w.heads * lanes_of(f)) * sizeof(float4) +
	                      2 * SEGMENTS * (size_t)threads * sizeof(float4) +
	                      (size_t)f->d_head / 2 * sizeof(float2);
	const dim3 grid((unsigned)blocks_of(f), (unsigned)f->groups);
	enum status status = launch("rat_scan_backward",
	                            f->d_head == 64 ? rat_scan_backward_kernel<64>
	                                            : rat_scan_backward_kernel<128>,
	                            grid, threads, shared, *a, w, rope_table_of(f->d_head));

	if (status != STATUS_OK)
		return status;
	return column_sums("rat_scan_backward", w.bias_parts, grid.x, f->n_heads * f->d_head,
	                   f->n_heads * f->d_head, a->dgate_bias);
}
