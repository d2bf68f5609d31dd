/*
 * Gradients of softmax attention on the tensor cores of any GPU from compute
 * capability 8.0, without atomics, so that they are the same in every run:
 *   1. what needs one query only: delta, the gate's and the own token's
 *      gradients, and do = dout sigmoid(gate) where there is a gate;
 *   2. dk, dv: a block holds 64 keys and walks the queries that see them, of
 *      one head that reads these keys after the other,
 *        S^T = K Q^T, dP^T = V dO^T, P = exp(S - lse), dS = P (dP - delta),
 *        dV += P^T dO, dK += dS^T Q;
 *   3. dq: a block holds 64 queries and walks the keys they see, for every
 *      head that shares the queries' columns, dQ += dS K.
 * S and dP are computed twice, seven products instead of the five that a
 * single walk with a sum of dq in memory needs. The keys of the dilated mask are
 * two lists (key_lists.h): blocks of the second step have tiles of one of them,
 * those of the third walk both.
 */
#include "kernels/portable/attention_tile.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128;
constexpr int TILE = 64, N_TILES = TILE / 8; /* keys of a block and queries at a time, or reverse */

/* The arguments, and where dO and delta are. */
struct problem {
	struct attention_backward_args a;
	struct view dout; /* through the gate */
	float *delta;     /* [B, H, T] */
};

/* ---- what needs one query only ---- */

template <int D>
static __global__ void __launch_bounds__(THREADS)
        prepare_kernel(const __grid_constant__ struct problem p)
{
	constexpr int LANES = D / 8;
	const struct attention_args &f = p.a.forward;
	const int64_t item = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
	const int64_t n_items = f.batch * f.seq_len * f.n_heads;
	const bool valid = item < n_items;
	const int64_t h = valid ? item % f.n_heads : 0, row = valid ? item / f.n_heads : 0;
	const int64_t b = row / f.seq_len, t = row % f.seq_len;
	const int column = 8 * (threadIdx.x % LANES);
	float d_out[8], o[8], value[8], weight = 0.0f, dot_own = 0.0f, delta = 0.0f;

	load8(d_out, at(p.a.dout, b, t, h) + column);
	load8(o, at(f.gate.data ? f.out_ungated : f.out, b, t, h) + column);
	if (f.gate.data) {
		float z[8];

		load8(z, at(f.gate, b, t, h) + column);
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const float g = sigmoid(z[i]);

			d_out[i] *= g;
			z[i] = d_out[i] * o[i] * (1.0f - g);
		}
		/* delta must be that of dP, which is made from what is stored: they may cancel. */
		const vector8 stored = pack8(d_out);

		unpack8(d_out, stored);
		if (valid) {
			store8(at(p.a.dgate, b, t, h) + column, z);
			*reinterpret_cast<vector8 *>(at(p.dout, b, t, h) + column) = stored;
		}
	}
#pragma unroll
	for (int i = 0; i < 8; i++)
		delta += d_out[i] * o[i];
	delta = group_sum(delta, LANES);
	const int64_t at_query = (b * f.n_heads + h) * f.seq_len + t;
	if (f.own_score) {
		const int64_t own = row * f.n_heads + h;

		weight = exp2_fast((f.own_score[own] - f.lse[at_query]) * LOG2E);
		load8(value, at(f.own_value, b, t, h) + column);
#pragma unroll
		for (int i = 0; i < 8; i++) {
			dot_own += d_out[i] * value[i];
			value[i] = weight * d_out[i];
		}
		dot_own = group_sum(dot_own, LANES);
		if (valid)
			store8(at(p.a.down_value, b, t, h) + column, value);
		if (valid && column == 0)
			p.a.down_score[own] = weight * (dot_own - delta);
	}
	if (valid && column == 0)
		p.delta[at_query] = delta;
}

/* ---- products of tiles ---- */

/* s = a b^T: 16 rows of one tile with the 64 of another. */
template <int D>
static __device__ __forceinline__ void multiply_rows(float (&s)[N_TILES][4], const bf16 *a,
                                                     const bf16 *b)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int i = 0; i < N_TILES * 4; i++)
		s[i / 4][i % 4] = 0.0f;
#pragma unroll
	for (int step = 0; step < D / 16; step++) {
		uint32_t left[4], right[4];

		load_matrices(left, a + swizzled<D>(lane % 16, 2 * step + lane / 16));
#pragma unroll
		for (int n = 0; n < N_TILES / 2; n++) {
			load_matrices(right, b + swizzled<D>(16 * n + lane / 16 * 8 + lane % 8,
			                                     2 * step + lane / 8 % 2));
			multiply_add(s[2 * n], left, right[0], right[1]);
			multiply_add(s[2 * n + 1], left, right[2], right[3]);
		}
	}
}

/* sums += p b: p [16, 64] in registers, rounded to bf16, b the 64 rows of a tile. */
template <int D>
static __device__ __forceinline__ void add_weighted(float (&sums)[D / 8][4],
                                                    const float (&p)[N_TILES][4], const bf16 *b)
{
	const int lane = threadIdx.x % WARP;

#pragma unroll
	for (int step = 0; step < TILE / 16; step++) {
		uint32_t left[4], right[4];

#pragma unroll
		for (int i = 0; i < 4; i++) {
			const float *pair = &p[2 * step + i / 2][2 * (i % 2)];

			left[i] = pack(pair[0], pair[1]);
		}
#pragma unroll
		for (int n = 0; n < D / 16; n++) {
			load_matrices_transposed(
			        right, b + swizzled<D>(16 * step + lane % 16, 2 * n + lane / 16));
			multiply_add(sums[2 * n], left, right[0], right[1]);
			multiply_add(sums[2 * n + 1], left, right[2], right[3]);
		}
	}
}

/* Writes this warp's 16 rows, times `factor`, by way of its own `staging`; row i to the token that
 * token_of(i) says, unless that is negative. */
template <int D, typename F>
static __device__ __forceinline__ void store_rows(const struct view &to, int64_t b, int64_t h,
                                                  const F &token_of, const float (&x)[D / 8][4],
                                                  float factor, bf16 *staging)
{
	const int lane = threadIdx.x % WARP;

	__syncwarp();
#pragma unroll
	for (int n = 0; n < D / 8; n++) {
#pragma unroll
		for (int half = 0; half < 2; half++)
			*reinterpret_cast<uint32_t *>(
			        staging + swizzled<D>(lane / 4 + 8 * half, n) + 2 * (lane % 4)) =
			        pack(x[n][2 * half] * factor, x[n][2 * half + 1] * factor);
	}
	__syncwarp();
	for (int i = lane; i < 16 * D / 8; i += WARP) {
		const int row = i / (D / 8), piece = i % (D / 8);
		const int64_t token = token_of(row);

		if (token >= 0)
			*reinterpret_cast<vector8 *>(at(to, b, token, h) + 8 * piece) =
			        load8(staging + swizzled<D>(row, piece));
	}
}

/* ---- dk, dv ---- */

/* The queries that see some of keys first .. end-1 of a list. */
template <bool DILATED>
static __device__ __forceinline__ struct interval viewers(const struct attention_args &f, int list,
                                                          int64_t first, int64_t end)
{
	int64_t begin = 0, limit = f.seq_len;

	if (DILATED) {
		begin = list_token<true>(f, list, first, end);
		if (list == KEYS_RECENT)
			limit = min(list_token<true>(f, list, end - 1, end) + f.window + 1, limit);
		return {(int)begin, (int)limit};
	}

	if (f.mask == MASK_CHUNK)
		begin = (first + 1) * f.chunk;
	else if (f.mask != MASK_FULL)
		begin = first;
	if (f.mask == MASK_WINDOW)
		limit = min(end + f.window, f.seq_len);
	return {(int)min(begin, f.seq_len), (int)limit};
}

/* Whether all queries first .. end-1 see all of the keys of a list. */
template <bool DILATED>
static __device__ __forceinline__ bool all_visible(const struct attention_args &f, int list,
                                                   int64_t first, int64_t end, struct interval keys)
{
	return end <= f.seq_len && visible<DILATED>(f, end - 1, list).first <= keys.first &&
	       visible<DILATED>(f, first, list).end >= keys.end;
}

/* Whether query t sees the key of a token of a list; this saves divisions. */
static __device__ __forceinline__ bool sees_token(const struct attention_args &f, int list,
                                                  int64_t t, int64_t token)
{
	return token >= 0 && token <= t && (list == KEYS_KEPT || t - token <= f.window);
}

/* lse in units of log2, and delta, of 64 queries. */
static __device__ __forceinline__ void load_statistics(float *statistics, const struct problem &p,
                                                       int64_t b, int64_t h, int64_t first)
{
	const struct attention_args &f = p.a.forward;
	const int64_t row = (b * f.n_heads + h) * f.seq_len + first;
	const int i = threadIdx.x % TILE;
	const bool valid = first + i < f.seq_len;

	if (threadIdx.x < TILE)
		statistics[i] = valid ? f.lse[row + i] * LOG2E : 0.0f;
	else
		statistics[TILE + i] = valid ? p.delta[row + i] : 0.0f;
}

/* Queries from token t on of head h: q, dout, and their statistics. */
template <int D>
static __device__ __forceinline__ void load_queries(const struct problem &p, bf16 *q, bf16 *dout,
                                                    float *statistics, int64_t b, int64_t h, int t)
{
	const struct attention_args &f = p.a.forward;

	load_tile<D, TILE, THREADS>(q, f.q, b, h % f.q_heads, t, f.seq_len);
	load_tile<D, TILE, THREADS>(dout, p.dout, b, h, t, f.seq_len);
	load_statistics(statistics, p, b, h, t);
}

/* The first `kept` blocks have tiles of the first list. */
template <int D, bool DILATED>
static __global__ void __launch_bounds__(THREADS, 2)
        keys_kernel(const __grid_constant__ struct problem p, int kept)
{
	const struct attention_args &f = p.a.forward;
	const int list = DILATED && (int)blockIdx.x >= kept ? KEYS_RECENT : KEYS_KEPT;
	const int64_t kv = blockIdx.y, b = blockIdx.z;
	const int64_t first = (int64_t)(blockIdx.x - (list == KEYS_KEPT ? 0 : kept)) * TILE;
	const int64_t length = DILATED ? list_length<DILATED>(f, list, f.kv_len) : f.kv_len;
	const int64_t end = min(first + TILE, length);
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	const struct interval queries = viewers<DILATED>(f, list, first, end);
	const struct interval keys = {(int)first, (int)first + TILE};
	bf16 *const k = reinterpret_cast<bf16 *>(shared_memory), *const v = k + TILE * D;
	bf16 *const q = v + TILE * D, *const dout = q + 2 * TILE * D;
	float *const statistics = reinterpret_cast<float *>(dout + 2 * TILE * D);
	bf16 *const my_k = k + warp * 16 * D, *const my_v = v + warp * 16 * D;
	const float scale = f.scale * LOG2E;
	float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[N_TILES][4], dp[N_TILES][4];

	load_keys<D, TILE, THREADS, DILATED>(k, f, f.k, b, kv, list, first, end);
	load_keys<D, TILE, THREADS, DILATED>(v, f, f.v, b, kv, list, first, end);
	int64_t token[2]; /* of the lane's keys, for the dilated mask */
#pragma unroll
	for (int i = 0; i < 2; i++)
		token[i] = DILATED ? list_token<DILATED>(f, list,
		                                         first + warp * 16 + lane / 4 + i * 8, end)
		                   : 0;
	int t = queries.first, buffer = 0;
	int64_t h = kv * readers(f), end_head = t < queries.end ? h + readers(f) : h;
	if (h < end_head)
		load_queries<D>(p, q, dout, statistics, b, h, t);
	copy_commit();
	for (int next; h < end_head; t = next, buffer ^= 1) {
		const float *lse = statistics + buffer * 2 * TILE, *delta = lse + TILE;
		const int64_t next_head = t + TILE < queries.end ? h : h + 1;

		next = next_head == h ? t + TILE : queries.first;
		copy_wait<0>();
		__syncthreads();
		if (next_head < end_head) {
			const int other = buffer ^ 1;

			load_queries<D>(p, q + other * TILE * D, dout + other * TILE * D,
			                statistics + other * 2 * TILE, b, next_head, next);
			copy_commit();
		}
		const bool all = all_visible<DILATED>(f, list, t, t + TILE, keys);
		multiply_rows<D>(s, my_k, q + buffer * TILE * D);
		multiply_rows<D>(dp, my_v, dout + buffer * TILE * D);
#pragma unroll
		for (int n = 0; n < N_TILES; n++) {
#pragma unroll
			for (int e = 0; e < 4; e++) {
				const int column = 8 * n + 2 * (lane % 4) + e % 2;
				const int key = (int)first + warp * 16 + lane / 4 + e / 2 * 8;

				s[n][e] = exp2_fast(fmaf(s[n][e], scale, -lse[column]));
				if (!all) {
					const struct interval seen =
					        DILATED ? interval() : visible(f, t + column);
					const bool hidden =
					        DILATED ? !sees_token(f, list, t + column,
					                              token[e / 2])
					                : key < seen.first || key >= seen.end;

					if (t + column >= f.seq_len || hidden)
						s[n][e] = 0.0f;
				}
				dp[n][e] = s[n][e] * (dp[n][e] - delta[column]);
			}
		}
		add_weighted<D>(dv, s, dout + buffer * TILE * D);
		add_weighted<D>(dk, dp, q + buffer * TILE * D);
		h = next_head;
	}
	copy_wait<0>();
	__syncthreads();
	const auto token_of = [&](int row) {
		return list_token<DILATED>(f, list, first + warp * 16 + row, end);
	};
	store_rows<D>(p.a.dk, b, kv, token_of, dk, f.scale, my_k);
	store_rows<D>(p.a.dv, b, kv, token_of, dv, 1.0f, my_v);
}

/* ---- dq ---- */

template <int D, bool DILATED>
static __global__ void __launch_bounds__(THREADS, 2)
        queries_kernel(const __grid_constant__ struct problem p)
{
	const struct attention_args &f = p.a.forward;
	const int64_t group = blockIdx.y, b = blockIdx.z;
	/* The last queries see the most keys: they start first. */
	const int64_t first = (int64_t)(gridDim.x - 1 - blockIdx.x) * TILE;
	const int64_t end = min(first + TILE, f.seq_len);
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	bf16 *const q = reinterpret_cast<bf16 *>(shared_memory), *const dout = q + TILE * D;
	bf16 *const k = dout + TILE * D, *const v = k + 2 * TILE * D;
	bf16 *const my_q = q + warp * 16 * D, *const my_dout = dout + warp * 16 * D;
	const float scale = f.scale * LOG2E;
	float dq[D / 8][4] = {}, s[N_TILES][4], dp[N_TILES][4];

	load_tile<D, TILE, THREADS>(q, f.q, b, group, first, end);
	copy_commit();
	/* Every head that shares the queries, and for each every list of keys. */
	for (int64_t turn = 0; turn < f.n_heads / f.q_heads * KEY_LISTS<DILATED>; turn++) {
		const int64_t h = group + turn / KEY_LISTS<DILATED> * f.q_heads;
		const int list = (int)(turn % KEY_LISTS<DILATED>);
		const int64_t kv = h / readers(f);
		const struct interval keys = {visible<DILATED>(f, first, list).first / TILE * TILE,
		                              visible<DILATED>(f, end - 1, list).end};
		float lse[2], delta[2];

		if (keys.first >= keys.end)
			continue;
#pragma unroll
		for (int i = 0; i < 2; i++) {
			const int64_t t = min(first + warp * 16 + lane / 4 + 8 * i, f.seq_len - 1);
			const int64_t row = (b * f.n_heads + h) * f.seq_len + t;

			lse[i] = f.lse[row] * LOG2E;
			delta[i] = p.delta[row];
		}
		__syncthreads();
		load_tile<D, TILE, THREADS>(dout, p.dout, b, h, first, end);
		load_keys<D, TILE, THREADS, DILATED>(k, f, f.k, b, kv, list, keys.first, keys.end);
		load_keys<D, TILE, THREADS, DILATED>(v, f, f.v, b, kv, list, keys.first, keys.end);
		copy_commit();
		for (int key = keys.first, buffer = 0; key < keys.end; key += TILE, buffer ^= 1) {
			copy_wait<0>();
			__syncthreads();
			if (key + TILE < keys.end) {
				const int other = (buffer ^ 1) * TILE * D;

				load_keys<D, TILE, THREADS, DILATED>(k + other, f, f.k, b, kv, list,
				                                     key + TILE, keys.end);
				load_keys<D, TILE, THREADS, DILATED>(v + other, f, f.v, b, kv, list,
				                                     key + TILE, keys.end);
				copy_commit();
			}
			const bool all = all_visible<DILATED>(f, list, first, first + TILE,
			                                      {key, key + TILE});
			multiply_rows<D>(s, my_q, k + buffer * TILE * D);
			multiply_rows<D>(dp, my_dout, v + buffer * TILE * D);
#pragma unroll
			for (int half = 0; half < 2; half++) {
				const int64_t t = first + warp * 16 + lane / 4 + 8 * half;
				const struct interval seen = visible<DILATED>(f, t, list);

#pragma unroll
				for (int i = 0; i < 2 * N_TILES; i++) {
					const int n = i / 2, e = 2 * half + i % 2;
					const int at_key = key + 8 * n + 2 * (lane % 4) + i % 2;
					float probability =
					        exp2_fast(fmaf(s[n][e], scale, -lse[half]));

					if (!all && (t >= f.seq_len || at_key < seen.first ||
					             at_key >= seen.end))
						probability = 0.0f;
					s[n][e] = probability * (dp[n][e] - delta[half]);
				}
			}
			add_weighted<D>(dq, s, k + buffer * TILE * D);
		}
	}
	copy_wait<0>();
	__syncthreads();
	const auto token_of = [&](int row) {
		const int64_t t = first + warp * 16 + row;

		return t < end ? t : (int64_t)-1;
	};
	store_rows<D>(p.a.dq, b, group, token_of, dq, f.scale, my_q);
}

/* ---- the operation ---- */

static struct problem problem_of(const struct attention_backward_args *a, void *workspace)
{
	const struct attention_args *f = &a->forward;
	const int64_t width = f->n_heads * f->d_head;
	struct problem p = {*a, a->dout, NULL};
	bf16 *gated = static_cast<bf16 *>(workspace);

	if (f->gate.data) {
		p.dout = {gated, f->seq_len * width, width, f->d_head};
		gated += f->batch * f->seq_len * width;
	}
	p.delta = reinterpret_cast<float *>(gated);
	return p;
}

template <int D, bool DILATED>
static enum status run(struct device *device, const struct problem &p)
{
	const struct attention_args *f = &p.a.forward;
	const int64_t threads = f->batch * f->seq_len * f->n_heads * (D / 8);
	const size_t shared = 6 * TILE * D * sizeof(bf16);
	const int64_t kept =
	        DILATED ? keys_before(KEYS_KEPT, f->dilation, f->initial, f->kv_len) : f->kv_len;
	const int64_t kept_tiles = divide_up(kept, TILE);
	const int64_t tiles = kept_tiles + divide_up(f->kv_len - kept, TILE);
	const dim3 keys((unsigned)tiles, (unsigned)f->kv_heads, (unsigned)f->batch);
	const dim3 queries((unsigned)divide_up(f->seq_len, TILE), (unsigned)f->q_heads,
	                   (unsigned)f->batch);
	enum status status =
	        launch_each(device, "attention_backward", prepare_kernel<D>, threads, THREADS, p);

	if (status == STATUS_OK && f->kv_len > 0)
		status = launch(device, "attention_backward", keys_kernel<D, DILATED>, keys,
		                THREADS, shared + 4 * TILE * sizeof(float), p, (int)kept_tiles);
	if (status == STATUS_OK)
		status = launch(device, "attention_backward", queries_kernel<D, DILATED>, queries,
		                THREADS, shared, p);
	return status;
}

} // namespace

extern "C" const char *portable_attention_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct attention_backward_args *>(args);
	const struct attention_args *f = &a->forward;

	if (!is_mask(f->mask))
		return "an unknown mask";
	return either(check_heads(f->d_head, f->n_heads, f->batch),
	              check_aligned(&f->q, &f->k, &f->v, &f->own_value, &f->gate, &f->out,
	                            &f->out_ungated, &a->dout, &a->dq, &a->dk, &a->dv, &a->dgate,
	                            &a->down_value));
}

extern "C" size_t portable_attention_backward_workspace(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct attention_backward_args *>(args);
	const struct attention_args *f = &a->forward;
	const int64_t rows = f->batch * f->seq_len * f->n_heads;

	return (size_t)rows * sizeof(float) +
	       (f->gate.data ? (size_t)(rows * f->d_head) * sizeof(bf16) : 0);
}

extern "C" enum status portable_attention_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	const auto *a = static_cast<const struct attention_backward_args *>(args);
	const struct problem p = problem_of(a, workspace);

	const bool dilated = a->forward.mask == MASK_DILATED;

	if (a->forward.d_head == 64)
		return dilated ? run<64, true>(device, p) : run<64, false>(device, p);
	return dilated ? run<128, true>(device, p) : run<128, false>(device, p);
}
