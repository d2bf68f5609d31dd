/*
 * Gradients of the matrix recurrence of the delta rules (DeltaNet, Gated DeltaNet, KDA) and of
 * RWKV-6's bonus, chunkwise on the tensor cores, 64 tokens at a time, without atomics.
 *
 * Of a chunk, S the state before it, D the gradient of the state after it, G_t the sum of the log2
 * decays up to token t, of each channel (one for all where the decay is a scalar), E the last t:
 *   A_ts = sum_c k_t k_s 2^(G_t - G_s), s < t;  P_ts = scale sum_c q_t k_s 2^(G_t - G_s), s <= t;
 *   M = (I + A diag(beta))^-1;  e = M (v - (k 2^G) S), which is written as k^T (beta e);
 *   S' = 2^(G_E) S + (k 2^(G_E - G))^T (beta e);
 *   x = P^T dout + (k 2^(G_E - G)) D;  y = M^T (beta x) = dv;
 *   D' = 2^(G_E) D + scale (q 2^G)^T dout - (k 2^G)^T y.
 * With X1_ts = scale dout_t.e_s and X2_ts = y_t.e_s, s < t, and o_t = scale dout_t.e_t:
 *   dq = scale 2^G (dout S^T) + (X1 beta 2^(G_t - G_s)) k + beta o k;
 *   r  = -2^G (y S^T) - (X2 beta 2^(G_t - G_s)) k;
 *   u  = 2^(G_E - G) (e D^T) + (X1 2^(G_t - G_s))^T q - (X2 2^(G_t - G_s))^T k + o q;
 *   dk = r + beta u;  dbeta = k.u;
 *   dlog_decay_t = sum_{i >= t} (q dq + k r - beta k u)_i + 2^(G_E) rowsum(S D)
 *                  + sum_s beta k 2^(G_E - G_s) (e D^T)_s, without the terms with o, which cancel.
 * The bonus is the same with e = v, beta = 1, no y and M, G_(t-1) in the place of q's G_t, and o
 * times the bonus. dv is rounded to bf16 before it is used as y.
 *
 * No decay is too strong: every exponent is <= 0, but inside a sub-chunk of 16 tokens that decays
 * by no more than 2^-MILD. Inside other sub-chunks decays of channels are taken pair by pair.
 *
 *   1. prepare (delta_prepare.cuh): P, M, the chunk's decays and, where they differ by channel,
 *      the decayed q and k; a block per chunk and head;
 *   2. walk (delta_walk.cuh): forward for e and S before every chunk, and at the same time back
 *      for dv and D after every chunk; a block per head, 64 columns and direction;
 *   3. gradient (delta_gradient.cuh): all that sums over columns; a block per chunk and head.
 * What passes hand on is bf16 in the workspace, 1.5 KB for each token of a head of 128 x 128, 2.3
 * where decays differ by channel; channels and columns are padded with zeros.
 * docs/kernels/delta_backward.md.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/delta_gradient.cuh"
#include "kernels/portable/delta_prepare.cuh"
#include "kernels/portable/delta_walk.cuh"
#include "kernels/portable/kernels.h"

namespace
{

static struct problem problem_of(const struct matrix_recurrence_backward_args *a, void *workspace,
                                 size_t *bytes)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const bool bonus = is_bonus(f);
	struct problem p = prepared_problem(*a, workspace, bytes);
	const int64_t records = f->batch * f->n_heads * p.chunks;

	p.dbonus = take<float>(bytes, workspace, bonus ? records * f->d_k : 0);
	p.states = take<bf16>(bytes, workspace, records * p.keys * p.values);
	p.gradients = take<bf16>(bytes, workspace, records * p.keys * p.values);
	p.errors = take<bf16>(bytes, workspace, bonus ? 0 : records * CHUNK * p.values);
	return p;
}

template <int KEYS, bool DIAGONAL, bool DELTA>
static enum status run(struct device *device, const struct problem &p)
{
	const char *name = "matrix_recurrence_backward";
	const struct matrix_recurrence_args *f = &p.a.forward;
	const int64_t heads = f->batch * f->n_heads;
	const dim3 chunks((unsigned)(heads * p.chunks));
	const dim3 walks((unsigned)(2 * heads * p.column_blocks));
	enum status status = prepare<KEYS, DIAGONAL, DELTA>(device, name, p);

	if (status == STATUS_OK)
		status = launch(device, name, walk_kernel<KEYS, DIAGONAL, DELTA>, walks,
		                WALK_THREADS,
		                max(sizeof(struct forward_memory<KEYS>),
		                    sizeof(struct reverse_memory<KEYS>)),
		                p);
	if (status == STATUS_OK)
		status = launch(device, name, gradient_kernel<DIAGONAL, DELTA>, chunks,
		                GRADIENT_THREADS, sizeof(struct gradient_memory), p);
	if (status == STATUS_OK && !DELTA)
		status = column_sums(device, name, p.dbonus, f->batch * p.chunks,
		                     f->n_heads * f->d_k, f->n_heads * f->d_k, p.a.dbonus);
	return status;
}

template <int KEYS> static enum status run(struct device *device, const struct problem &p)
{
	if (is_bonus(&p.a.forward))
		return run<KEYS, true, false>(device, p);
	return p.a.forward.decay == DECAY_DIAGONAL ? run<KEYS, true, true>(device, p)
	                                           : run<KEYS, false, true>(device, p);
}

} // namespace

extern "C" const char *portable_delta_backward_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *f = &a->forward;

	if (f->rule != RULE_DELTA && f->rule != RULE_BONUS)
		return "only the delta rule and the bonus";
	if (f->decay != DECAY_NONE && f->decay != DECAY_CONSTANT && !decays_by_data(*f))
		return "an unknown decay";
	if (is_bonus(f) && f->decay != DECAY_DIAGONAL)
		return "the bonus only with diagonal decays";
	if (f->d_k > MAX_KEYS)
		return "d_k above 128 with the delta rule or the bonus";
	if (f->batch * f->n_heads >
	    INT32_MAX / max(divide_up(f->seq_len, CHUNK), 2 * divide_up(f->d_v, WALK_COLUMNS)))
		return "more chunks than a grid has blocks";
	if (f->decay == DECAY_DIAGONAL &&
	    !(is_aligned(&f->log_decay) && is_aligned(&a->dlog_decay)))
		return "views must be 16-byte aligned";
	return either(check_widths(f->d_k, f->d_v),
	              check_aligned(&f->q, &f->k, &f->v, &a->dout, &a->dq, &a->dk, &a->dv));
}

extern "C" size_t portable_delta_backward_workspace(const struct device *, const void *args)
{
	size_t bytes;

	problem_of(static_cast<const struct matrix_recurrence_backward_args *>(args), NULL, &bytes);
	return bytes;
}

extern "C" enum status portable_delta_backward(struct device *device, const void *args,
                                               void *workspace)
{
	size_t bytes;
	const struct problem p =
	        problem_of(static_cast<const struct matrix_recurrence_backward_args *>(args),
	                   workspace, &bytes);

	return p.keys == 64 ? run<64>(device, p) : run<MAX_KEYS>(device, p);
}
