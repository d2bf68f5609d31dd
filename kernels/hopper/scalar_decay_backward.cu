/*
 * Gradients of S_t = a_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t for decays that are one number
 * per head and token (Mamba-2), per head (RetNet), or 1 (linear attention). With a(s, t) the
 * product of the decays after token s up to t,
 *   dq_t = scale sum_{s<=t} a(s, t) (do_t.v_s) k_s,
 *   dk_s = scale sum_{t>=s} a(s, t) (v_s.do_t) q_t,
 *   dv_s = scale sum_{t>=s} a(s, t) (k_s.q_t) do_t.
 *
 * Widths up to 128: a sweep forward gives dq, a sweep back dk, dv and dh0, and a last kernel sums
 * the gradients of the decays (gradient_walk.cuh). They move eleven tensors, or ten where decays
 * have no gradient and dq is the output of a plain walk. Wider heads of such decays take three
 * walks of plain_walk.cuh, as each of the three is the same recurrence of other tensors, the last
 * two from the last token on: twelve tensors, and states on the chip.
 * Limit: memory. docs/kernels/scalar_decay.md.
 * wgmma in: walk_kernel, gradient_kernel
 */
#include <algorithm>

#include "kernels/hopper/gradient_walk.cuh"
#include "kernels/hopper/kernels.h"

namespace
{

/* The recurrences that give dq, dk and dv. */
struct walks {
	struct matrix_recurrence_args dq, dk, dv;
};

walks walks_of(const struct matrix_recurrence_backward_args *x)
{
	const struct matrix_recurrence_args *f = &x->forward;
	walks w = {*f, *f, *f};

	w.dq.q = x->dout;
	w.dq.k = f->v;
	w.dq.v = f->k;
	w.dq.out = x->dq;
	w.dq.final_state = NULL;

	w.dk.q = f->v;
	w.dk.k = x->dout;
	w.dk.v = f->q;
	w.dk.out = x->dk;
	w.dk.h0 = NULL;
	w.dk.final_state = NULL;

	std::swap(w.dq.d_k, w.dq.d_v);
	std::swap(w.dk.d_k, w.dk.d_v);

	w.dv.q = f->k;
	w.dv.k = f->q;
	w.dv.v = x->dout;
	w.dv.out = x->dv;
	w.dv.h0 = NULL;
	w.dv.final_state = x->dh0;
	return w;
}

/* The walks of dq and of dk have states whose rows are the channels of keys. */
void transpose_states(parameters &p)
{
	p.key_stride = 1;
	p.value_stride = p.d_k;
}

bool fits_sweeps(const struct matrix_recurrence_args *f)
{
	return f->d_k <= 128 && f->d_v <= 128;
}

/* What lies in the workspace after what the segments of a walk need. */
struct room {
	size_t saved, sums, meets, bytes; /* offsets; sums of q.dq, then of k.dk */
	int64_t tokens;                   /* of sums */
	int borders;
};

room room_of(const struct matrix_recurrence_args *f, const plan &x)
{
	const int64_t slices = x.slices, chunks = x.chunks;
	const int64_t flows = f->decay == DECAY_SCALAR;
	const auto whole = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
	room r;

	r.borders = static_cast<int>((chunks - 1) / GROUP);
	r.tokens = slices * x.walks * f->seq_len;
	r.saved = whole(plan_workspace(x));
	r.sums = r.saved + whole(flows * x.walks * r.borders * x.state_floats * 2);
	r.meets = r.sums + whole(flows * 2 * r.tokens * sizeof(float));
	r.bytes = r.meets + whole(flows * x.walks * r.borders * slices * 4 * sizeof(float));
	return r;
}

/* ---- launches ---- */

template <bool backward>
enum status run_walk(struct device *device, const struct matrix_recurrence_args *a, bool transposed,
                     void *workspace)
{
	const plan x = best_plan(device, a);
	parameters p;

	TRY(fill_parameters(p, a, x, workspace));
	if (transposed)
		transpose_states(p);
	return run_walks<backward>(device, p, x);
}

template <bool backward, bool FLOWS, int DK, int SLICES>
enum status launch_sweep(struct device *device, const gradient_parameters &p, const plan &x)
{
	using S = walk_shape<DK, SLICES, gradient_rule<backward, FLOWS>>;

	TRY((find_segments<backward, DK, SLICES>(device, p, x)));
	return submit(device, gradient_kernel<backward, FLOWS, DK, SLICES>,
	              turns(device, x.walks * x.segments), S::THREADS, S::BYTES, p);
}

template <bool backward, bool FLOWS>
enum status run_sweep(struct device *device, const gradient_parameters &p, const plan &x)
{
	if (x.dk == 64)
		return x.slices == 1 ? launch_sweep<backward, FLOWS, 64, 1>(device, p, x)
		                     : launch_sweep<backward, FLOWS, 64, 2>(device, p, x);
	return x.slices == 1 ? launch_sweep<backward, FLOWS, 128, 1>(device, p, x)
	                     : launch_sweep<backward, FLOWS, 128, 2>(device, p, x);
}

/* What both sweeps are told. */
enum status fill_sweep(gradient_parameters &p, const struct matrix_recurrence_args *a,
                       const struct view &fourth, const plan &x, const room &r, char *workspace)
{
	TRY(fill_parameters(p, a, x, workspace));
	TRY(tensor_map_encode(&p.fourth, &fourth, a->batch, a->seq_len, a->n_heads, a->d_v, CHUNK));
	transpose_states(p);
	p.fourth_step = fourth.head ? 1 : 0;
	p.saved = reinterpret_cast<uint4 *>(workspace + r.saved);
	p.sums = reinterpret_cast<float *>(workspace + r.sums);
	p.meets = reinterpret_cast<float *>(workspace + r.meets);
	p.borders = r.borders;
	return STATUS_OK;
}

enum status run_flows(struct device *device, const struct matrix_recurrence_backward_args *x,
                      const plan &cut, const room &r, const gradient_parameters &last)
{
	const struct matrix_recurrence_args *f = &x->forward;
	flow_parameters p;

	p.to = x->dlog_decay;
	p.given = last.sums;
	p.gained = last.sums - r.tokens;
	p.meets = last.meets;
	p.scale = f->scale;
	p.starts_empty = !f->h0;
	p.seq_len = static_cast<int>(f->seq_len);
	p.n_heads = static_cast<int>(f->n_heads);
	p.walks = cut.walks;
	p.slices = cut.slices;
	p.borders = r.borders;
	const int64_t units = static_cast<int64_t>(cut.walks) * (r.borders + 1);
	return submit(device, flow_kernel, (units + FLOW_WARPS - 1) / FLOW_WARPS, 32 * FLOW_WARPS,
	              0, p);
}

template <bool FLOWS>
enum status run_sweeps(struct device *device, const struct matrix_recurrence_backward_args *x,
                       const walks &w, char *workspace)
{
	const struct matrix_recurrence_args *f = &x->forward;
	const plan cut = best_plan(device, &w.dq);
	const room r = room_of(f, cut);
	gradient_parameters p;

	if (FLOWS) {
		TRY(fill_sweep(p, &w.dq, f->q, cut, r, workspace));
		TRY((run_sweep<false, true>(device, p, cut)));
	} else {
		TRY(run_walk<false>(device, &w.dq, true, workspace));
	}
	TRY(fill_sweep(p, &w.dk, f->k, cut, r, workspace));
	TRY(tensor_map_encode(&p.own_out, &x->dv, f->batch, f->seq_len, f->n_heads, f->d_v, CHUNK));
	p.final_state = x->dh0;
	p.sums += r.tokens;
	TRY((run_sweep<true, FLOWS>(device, p, cut)));
	return FLOWS ? run_flows(device, x, cut, r, p) : STATUS_OK;
}

const struct matrix_recurrence_backward_args *gradients(const void *args)
{
	return static_cast<const struct matrix_recurrence_backward_args *>(args);
}

} // namespace

extern "C" const char *hopper_scalar_decay_backward_unsupported(const struct device *device,
                                                                const void *args)
{
	const struct matrix_recurrence_backward_args *x = gradients(args);
	const struct matrix_recurrence_args *f = &x->forward;
	const walks w = walks_of(x);

	if (f->rule != RULE_PLAIN)
		return "only the plain rule";
	if (f->decay == DECAY_SCALAR && !fits_sweeps(f))
		return "d_k and d_v must be at most 128 where decays have gradients";
	if (f->d_k > 256 || f->d_v > 256)
		return "d_k and d_v must be at most 256";
	if (const char *why = walk_unsupported(device, &w.dq))
		return why;
	if (const char *why = walk_unsupported(device, &w.dk))
		return why;
	return walk_unsupported(device, &w.dv);
}

extern "C" size_t hopper_scalar_decay_backward_workspace(const struct device *device,
                                                         const void *args)
{
	const struct matrix_recurrence_args *f = &gradients(args)->forward;
	const walks w = walks_of(gradients(args));
	const plan dq = best_plan(device, &w.dq);

	if (fits_sweeps(f))
		return room_of(f, dq).bytes;
	return std::max({plan_workspace(dq), plan_workspace(best_plan(device, &w.dk)),
	                 plan_workspace(best_plan(device, &w.dv))});
}

extern "C" enum status hopper_scalar_decay_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const struct matrix_recurrence_backward_args *x = gradients(args);
	const walks w = walks_of(x);

	if (x->forward.decay == DECAY_SCALAR)
		return run_sweeps<true>(device, x, w, static_cast<char *>(workspace));
	if (fits_sweeps(&x->forward))
		return run_sweeps<false>(device, x, w, static_cast<char *>(workspace));
	TRY(run_walk<false>(device, &w.dq, true, workspace));
	TRY(run_walk<true>(device, &w.dk, true, workspace));
	return run_walk<true>(device, &w.dv, false, workspace);
}
