/*
 * The matrix-state recurrence S_t = a_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t for decays a_t
 * that are one number per head and token (Mamba-2), per head (RetNet), or 1 (linear attention):
 * chunkwise, 64 tokens at a time, with the state on the chip. With G_t the sum of log2 a over the
 * chunk's tokens up to t and E the chunk's last token,
 *   o_t = scale (sum_{s<=t} 2^(G_t - G_s) (q_t.k_s) v_s + 2^(G_t) q_t S),
 *   S <- 2^(G_E) S + sum_s 2^(G_E - G_s) k_s^T v_s;
 * no exponent is above 0, whatever the decay, and scores are decayed as fp32.
 *
 * The walk is plain_walk.cuh's. Segments of four chunks are the textbook's materialised form.
 * Limit: memory. 1.043 ms at 16 heads x 128, 262144 tokens (1.95 GHz), 96% of a copy's bandwidth;
 * d_k = 256 reads q and k once per 64 channels of v. docs/kernels/scalar_decay.md.
 * wgmma in: walk_kernel
 */
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/plain_walk.cuh"

namespace
{

const struct matrix_recurrence_args *recurrence(const void *args)
{
	return static_cast<const struct matrix_recurrence_args *>(args);
}

/* The materialised form has the states before segments in memory. One is as long as the chunk that
 * was asked for, or four of ours, whose v is then as large as a state. */
plan materialised_plan(const struct matrix_recurrence_args *a)
{
	const int64_t length = a->chunk ? a->chunk : 4 * CHUNK;

	return make_plan(
	        a, static_cast<int>(((length < a->seq_len ? length : a->seq_len) + CHUNK - 1) /
	                            CHUNK));
}

enum status run(struct device *device, const struct matrix_recurrence_args *a, const plan &x,
                void *workspace)
{
	parameters p;

	TRY(fill_parameters(p, a, x, workspace));
	return run_walks<false>(device, p, x);
}

} // namespace

/* Whatever the chunk. */
static const char *scalar_decay_unsupported(const struct device *device,
                                            const struct matrix_recurrence_args *a)
{
	if (a->rule != RULE_PLAIN)
		return "only the plain rule";
	if (a->d_k > 256)
		return "d_k must be at most 256";
	return walk_unsupported(device, a);
}

extern "C" const char *hopper_scalar_decay_unsupported(const struct device *device,
                                                       const void *args)
{
	const struct matrix_recurrence_args *a = recurrence(args);
	const char *why = scalar_decay_unsupported(device, a);

	return !why && a->chunk && a->chunk != CHUNK ? "chunk must be 64, or 0" : why;
}

extern "C" size_t hopper_scalar_decay_workspace(const struct device *device, const void *args)
{
	return plan_workspace(best_plan(device, recurrence(args)));
}

extern "C" enum status hopper_scalar_decay(struct device *device, const void *args, void *workspace)
{
	return run(device, recurrence(args), best_plan(device, recurrence(args)), workspace);
}

extern "C" const char *hopper_scalar_decay_onchip_unsupported(const struct device *device,
                                                              const void *args)
{
	return hopper_scalar_decay_unsupported(device, args);
}

extern "C" size_t hopper_scalar_decay_onchip_workspace(const struct device *, const void *args)
{
	return plan_workspace(make_plan(recurrence(args), 0));
}

extern "C" enum status hopper_scalar_decay_onchip(struct device *device, const void *args,
                                                  void *workspace)
{
	return run(device, recurrence(args), make_plan(recurrence(args), 0), workspace);
}

extern "C" const char *hopper_scalar_decay_materialise_unsupported(const struct device *device,
                                                                   const void *args)
{
	const struct matrix_recurrence_args *a = recurrence(args);
	const char *why = scalar_decay_unsupported(device, a);

	return !why && a->chunk % CHUNK && a->chunk < a->seq_len
	               ? "chunk must be a multiple of 64, or T"
	               : why;
}

extern "C" size_t hopper_scalar_decay_materialise_workspace(const struct device *, const void *args)
{
	return plan_workspace(materialised_plan(recurrence(args)));
}

extern "C" enum status hopper_scalar_decay_materialise(struct device *device, const void *args,
                                                       void *workspace)
{
	return run(device, recurrence(args), materialised_plan(recurrence(args)), workspace);
}
