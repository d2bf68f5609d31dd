/*
 * Gradients of the plain matrix recurrence S_t = A_t S_{t-1} + k_t^T v_t,
 * o_t = scale q_t S_t, chunkwise on the tensor cores, the same in every run:
 *   1. and 2. the states S before the chunks and the gradients L of those after
 *      them (matrix_backward_sweep.cu);
 *   3. here, all chunks in parallel, with W_ij the decays from behind token j to
 *      token i, P_i from the chunk's start, R_j to its end, D of all of it,
 *      B = tril(q k^T W) and dB = tril(dout v^T):
 *        dq_i = P_i (S dout_i) + sum over j <= i of dB_ij W_ij k_j
 *        dk_j = R_j (L v_j)    + sum over i >= j of dB_ij W_ij q_i
 *        dv_j = (k_j R_j) L    + sum over i >= j of B_ij dout_i;
 *      and the gradient of log A_t, what flows through it, from S and the tokens
 *      before t to L and the tokens from t on:
 *        F_t = D rowsum(S L) + sum of k R (L v) + sum over i >= t of (q_i dq_i - k_i dk_i).
 * A pair of tokens on one side of t cancels in the last sum. Both of its terms are
 * made of the same rounded factors, and no sum is longer than a chunk.
 *
 * Decays of all channels alike multiply the scores. Diagonal decays between
 * sub-chunks of 16 tokens are split at the ends of sub-chunks: queries decay from the
 * end before theirs, keys to their own's end, and the sums, fp32, decay by whole
 * sub-chunks while they grow (Horner). Inside a sub-chunk the split at its end makes
 * one factor grow. It is taken if no channel of the panel decays by more than 2^-60 in a
 * sub-chunk; otherwise pairs are taken one by one, fp32, with products of the
 * decays. No other exponent is above zero, and none is a difference of sums.
 *
 * A block of eight warps takes a chunk of a head: the scores B of all panels of 64 or
 * 128 channels, then panel after panel, the last one first, slabs of 32 columns of S,
 * L, v and dout, one of them on its way. Warp w has the 16 tokens w % 4, and of them
 * half w / 4 of the panel's channels, of the slab's columns or of the other tokens.
 * From the second panel on dv is added to what is already in memory.
 *
 * What is not in whole pieces of 16 bytes is copied to the workspace first, so any
 * widths and strides will do. 128 registers, 97 KB of shared memory, two blocks on a
 * multiprocessor. Limits: docs/kernels/portable_matrix_backward.md.
 */
#include "kernels/portable/kernels.h"
#include "kernels/portable/matrix_backward_finish.cuh"

namespace
{

using namespace matrix_backward;

template <int PANEL, bool DIAGONAL>
static __global__ void __launch_bounds__(THREADS, 2)
        chunk_kernel(const __grid_constant__ struct matrix_recurrence_args f,
                     const __grid_constant__ struct plan p,
                     const __grid_constant__ struct outputs o)
{
	using L = layout<PANEL>;
	const struct place<PANEL> x = place_of<PANEL>(f, p);
	const int warp = threadIdx.x / WARP, slabs = (int)p.slabs;

	if (!DIAGONAL && threadIdx.x < WARP) {
		const int64_t t = x.first + 2 * threadIdx.x;
		const struct token_sums sums =
		        sum_tokens(make_float2(token_decay(f, x.b, t, x.h, t < f.seq_len),
		                               token_decay(f, x.b, t + 1, x.h, t + 1 < f.seq_len)));

		x.g[2 * threadIdx.x] = sums.first;
		x.g[2 * threadIdx.x + 1] = sums.second;
	}
	bool mild = true; /* of the panel at hand */
	{
		float scores[4][4] = {}, own[2][4] = {}, exact[SUB] = {};

#pragma unroll 1
		for (int64_t panel = 0; panel < p.panels; panel++) {
			const struct strip s = strip_of<PANEL>(panel);

			__syncthreads();
			load_keys<PANEL>(x, p, panel, DIAGONAL);
			if (panel == p.panels - 1) {
				load_slab<PANEL>(sources_of<PANEL>(x, f, p, o.dv, panel), 0);
				copy_wait<1>();
			} else {
				copy_wait<0>();
			}
			__syncthreads();
			if (DIAGONAL) {
				mild = sum_decays<PANEL>(x, s);
				if (mild)
					add_own<PANEL>(own, x);
				else
					add_exact<PANEL>(exact, x);
				__syncthreads();
				decay_tiles<PANEL>(x, s);
			}
			add_scores<PANEL, DIAGONAL>(scores, x, mild);
		}
		if (DIAGONAL)
			place_exact<PANEL>(scores, own, exact, x);
		store_scores<PANEL, DIAGONAL>(scores, x);
	}
#pragma unroll 1
	for (int64_t panel = p.panels - 1; panel >= 0; panel--) {
		const bool first = panel == p.panels - 1;
		const struct strip s = strip_of<PANEL>(panel);
		const struct sources from = sources_of<PANEL>(x, f, p, o.dv, panel);
		float dq[PANEL / 16][4] = {}, dk[PANEL / 16][4] = {}, products[4] = {};
		float dscores[4][4] = {};
		const struct lanes at = lanes_of();

		if (!first) {
			__syncthreads();
			load_keys<PANEL>(x, p, panel, DIAGONAL);
			load_slab<PANEL>(from, 0);
			copy_wait<1>();
			__syncthreads();
			if (DIAGONAL) {
				mild = sum_decays<PANEL>(x, s);
				decay_tiles<PANEL>(x, s);
			}
		}
#pragma unroll 1
		for (int slab = 0; slab < slabs; slab++) {
			const bf16 *const state = reinterpret_cast<const bf16 *>(
			        shared_memory + L::STAGES + slab % 2 * L::STAGE);
			const bf16 *const gradient = state + L::STATE;
			const bf16 *const dout = gradient + L::STATE, *const v = dout + L::VALUES;
			float dv[2][4] = {};

			copy_wait<0>();
			__syncthreads();
			if (slab + 1 < slabs)
				load_slab<PANEL>(from, slab + 1);
#pragma unroll
			for (int step = 0; step < SLAB / 16; step++) {
				const int group = warp % GROUPS;
				uint32_t left[4];

				load_matrices(left, down_first<SLAB>(dout, 16 * group, 2 * step));
				add_state<PANEL>(dq, left, state, step);
				if (first)
					add_dscores(dscores, left, v, at, step);
				load_matrices(left, down_first<SLAB>(v, 16 * group, 2 * step));
				add_state<PANEL>(dk, left, gradient, step);
			}
			value_gradients<PANEL, DIAGONAL>(dv, x, gradient, dout, at, first);
			store_values<PANEL>(dv, x, o.dv, from.dv, f.scale, slab, !first);
			if (decays_by_data(f))
				multiply_states<PANEL>(products, state, gradient);
		}
		if (!DIAGONAL)
			decay_sums<PANEL>(dq, dk, x);
		if (decays_by_data(f)) {
			store_products<PANEL>(products, x);
			sum_kept<PANEL, DIAGONAL>(dk, x);
		}
		__syncthreads();
		if (first) {
			store_scores<PANEL, DIAGONAL>(dscores, x);
			__syncthreads();
		}
		add_within<PANEL, DIAGONAL>(dq, dk, x, mild);
		if (DIAGONAL) {
			finish_diagonal<PANEL>(dq, dk, x, f, p, s, o, mild);
			continue;
		}
		if (decays_by_data(f)) {
			add_tokens<PANEL>(dq, dk, x, first);
			if (panel == 0)
				store_tokens<PANEL>(x, f, o.dlog_decay.view);
		}
		store_rows<PANEL>(dq, x, o.dq, panel, f.scale);
		store_rows<PANEL>(dk, x, o.dk, panel, f.scale);
	}
}

/* ---- tensors that are not whole pieces of 16 bytes ---- */

/* Copies an element of a token and head; zeros behind the width. */
static __global__ void __launch_bounds__(THREADS)
        copy_kernel(const __grid_constant__ struct matrix_recurrence_args f,
                    const __grid_constant__ struct rows from,
                    const __grid_constant__ struct rows to)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t column = index % to.width, token = index / to.width;
	const int64_t h = token % f.n_heads, t = token / f.n_heads % f.seq_len;
	const int64_t b = token / f.n_heads / f.seq_len;

	if (b < f.batch)
		at(to.view, b, t, h)[column] = column < from.width ? at(from.view, b, t, h)[column]
		                                                   : __float2bfloat16(0.0f);
}

static enum status copy(struct device *device, const struct matrix_recurrence_args &f,
                        const struct rows &from, const struct rows &to)
{
	return launch_each(device, "matrix_recurrence_backward", copy_kernel,
	                   f.batch * f.seq_len * f.n_heads * to.width, THREADS, f, from, to);
}

/* ---- the operation ---- */

constexpr int MAX_COPIES = 9;

/* A problem whose tensors are all whole pieces, and those that it has in place of the caller's. */
struct problem {
	struct plan plan;
	struct outputs outputs;
	int n_copied;
	struct {
		struct rows theirs, ours;
		bool output;
	} copied[MAX_COPIES];
	size_t bytes; /* of workspace */
};

/* Takes room in the workspace. */
static char *take(struct problem *problem, char *workspace, int64_t bytes)
{
	char *const room = workspace + problem->bytes;

	problem->bytes += (size_t)divide_up(bytes, 256) * 256;
	return room;
}

/* The tensor, or one like it in the workspace. */
static struct rows whole_rows(struct problem *problem, char *workspace,
                              const struct matrix_recurrence_args *f, const struct view &v,
                              int64_t width, bool output)
{
	const int64_t wide = divide_up(width, 8) * 8, row = f->n_heads * wide;

	if (is_aligned(&v) && width == wide)
		return {v, width};
	const struct rows ours = {
	        {take(problem, workspace, f->batch * f->seq_len * row * (int64_t)sizeof(bf16)),
	         f->seq_len * row, row, wide},
	        wide};
	problem->copied[problem->n_copied++] = {{v, width}, ours, output};
	return ours;
}

static int panel_rows(const struct matrix_recurrence_args *f)
{
	return f->d_k <= 64 ? 64 : 128;
}

static struct problem problem_of(const struct device *device,
                                 const struct matrix_recurrence_backward_args *a, void *workspace)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const int64_t rows = panel_rows(f), sequences = f->batch * f->n_heads;
	char *const memory = static_cast<char *>(workspace);
	struct problem x = {};
	struct plan &p = x.plan;
	const auto whole = [&](const struct view &v, int64_t width, bool output) {
		return whole_rows(&x, memory, f, v, width, output);
	};

	p.chunks = divide_up(f->seq_len, CHUNK);
	p.panels = divide_up(f->d_k, rows);
	p.slabs = divide_up(f->d_v, SLAB);
	/* Segments of at least two chunks, if the states alone do not give every multiprocessor a
	 * block: as many blocks as find room at a time, two on each. */
	const int64_t sms = cuda_sm_count(device);
	const int64_t blocks = sequences * p.panels * divide_up(p.slabs, 4);
	const int64_t wanted = blocks >= sms ? 1 : 2 * sms / blocks;
	p.per_segment = max(divide_up(p.chunks, wanted), min((int64_t)2, p.chunks));
	p.segments = divide_up(p.chunks, p.per_segment);

	const int64_t state = p.panels * rows * p.slabs * SLAB;
	const int64_t states = sequences * p.chunks * state * (int64_t)sizeof(bf16);
	const int64_t kept = p.segments > 1 ? p.segments * sequences * (int64_t)sizeof(float) : 0;
	p.states = reinterpret_cast<bf16 *>(take(&x, memory, states));
	p.gradients = reinterpret_cast<bf16 *>(take(&x, memory, states));
	p.ends = reinterpret_cast<float *>(take(&x, memory, kept * state));
	p.decays = reinterpret_cast<float *>(take(&x, memory, kept * p.panels * rows));
	p.q = whole(f->q, f->d_k, false);
	p.k = whole(f->k, f->d_k, false);
	p.v = whole(f->v, f->d_v, false);
	p.dout = whole(a->dout, f->d_v, false);
	x.outputs.dq = whole(a->dq, f->d_k, true);
	x.outputs.dk = whole(a->dk, f->d_k, true);
	x.outputs.dv = whole(a->dv, f->d_v, true);
	if (f->decay == DECAY_DIAGONAL) {
		p.log_decay = whole(f->log_decay, f->d_k, false);
		x.outputs.dlog_decay = whole(a->dlog_decay, f->d_k, true);
	} else {
		x.outputs.dlog_decay.view = a->dlog_decay;
	}
	return x;
}

template <int PANEL>
static enum status run(struct device *device, const struct matrix_recurrence_args *f,
                       const struct problem &x)
{
	const dim3 grid((unsigned)(f->batch * f->n_heads * x.plan.chunks));
	const size_t shared = (size_t)layout<PANEL>::BYTES;

	if (f->decay == DECAY_DIAGONAL)
		return launch(device, "matrix_recurrence_backward", chunk_kernel<PANEL, true>, grid,
		              THREADS, shared, *f, x.plan, x.outputs);
	return launch(device, "matrix_recurrence_backward", chunk_kernel<PANEL, false>, grid,
	              THREADS, shared, *f, x.plan, x.outputs);
}

} // namespace

extern "C" const char *portable_matrix_recurrence_backward_unsupported(const struct device *,
                                                                       const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);

	if (!is_known_decay(a->forward.decay))
		return "an unknown decay";
	return a->forward.rule != RULE_PLAIN ? "only the plain rule" : NULL;
}

extern "C" size_t portable_matrix_recurrence_backward_workspace(const struct device *device,
                                                                const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);

	return problem_of(device, a, NULL).bytes;
}

extern "C" enum status portable_matrix_recurrence_backward(struct device *device, const void *args,
                                                           void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *f = &a->forward;
	const struct problem x = problem_of(device, a, workspace);
	enum status status = STATUS_OK;

	for (int i = 0; i < x.n_copied && status == STATUS_OK; i++)
		if (!x.copied[i].output)
			status = copy(device, *f, x.copied[i].theirs, x.copied[i].ours);
	if (status == STATUS_OK)
		status = sweep(device, *a, x.plan, panel_rows(f));
	if (status == STATUS_OK)
		status = panel_rows(f) == 64 ? run<64>(device, f, x) : run<128>(device, f, x);
	for (int i = 0; i < x.n_copied && status == STATUS_OK; i++)
		if (x.copied[i].output)
			status = copy(device, *f, x.copied[i].ours, x.copied[i].theirs);
	return status;
}
