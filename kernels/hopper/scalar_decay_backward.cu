/*
 * Gradients of S_t = a S_{t-1} + k_t^T v_t, o_t = scale q_t S_t for decays without gradients of
 * their own: constants of a head (RetNet), or 1 (linear attention). Each of them is the same
 * recurrence of other tensors,
 *   dq_t = scale sum_{s<=t} a^(t-s) (do_t.v_s) k_s,
 *   dk_s = scale sum_{t>=s} a^(t-s) (v_s.do_t) q_t,
 *   dv_s = scale sum_{t>=s} a^(t-s) (k_s.q_t) do_t,
 * the last two from the last token on: three walks of plain_walk.cuh, states on the chip. Three
 * tensors are read and one is written in each, twelve in all, where a kernel of two sweeps would
 * move ten and have two states on the chip. The state that the walk of dv ends with is dh0.
 * Limit: memory. docs/kernels/scalar_decay.md.
 * wgmma in: walk_kernel
 */
#include <algorithm>

#include "kernels/hopper/kernels.h"
#include "kernels/hopper/plain_walk.cuh"

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
	w.dk.final_state = NULL;

	std::swap(w.dq.d_k, w.dq.d_v);
	std::swap(w.dk.d_k, w.dk.d_v);

	w.dv.q = f->k;
	w.dv.k = f->q;
	w.dv.v = x->dout;
	w.dv.out = x->dv;
	w.dv.final_state = x->dh0;
	return w;
}

template <bool backward>
enum status run(struct device *device, const struct matrix_recurrence_args *a, void *workspace)
{
	const plan x = best_plan(device, a);
	parameters p;

	TRY(fill_parameters(p, a, x, workspace));
	return run_walks<backward>(device, p, x);
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
	if (f->decay != DECAY_NONE && f->decay != DECAY_CONSTANT)
		return "only decays without gradients";
	if (f->h0)
		return "an initial state";
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
	const walks w = walks_of(gradients(args));

	return std::max({plan_workspace(best_plan(device, &w.dq)),
	                 plan_workspace(best_plan(device, &w.dk)),
	                 plan_workspace(best_plan(device, &w.dv))});
}

extern "C" enum status hopper_scalar_decay_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const walks w = walks_of(gradients(args));

	TRY(run<false>(device, &w.dq, workspace));
	TRY(run<true>(device, &w.dk, workspace));
	return run<true>(device, &w.dv, workspace);
}
