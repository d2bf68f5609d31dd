/*
 * The matrix recurrence of the delta rules (DeltaNet, Gated DeltaNet, KDA) and of RWKV-6's bonus,
 * chunkwise on the tensor cores, 64 tokens at a time, in the first two passes of delta_backward.cu,
 * which has the equations:
 *   1. prepare (delta_prepare.cuh): P, M, the chunk's decays and, where they differ by channel,
 *      the decayed q and k; a block per chunk and head;
 *   2. walk (delta_walk.cuh): the outputs, with the state on the chip; a block per head and 64
 *      columns.
 * What the first hands on is bf16 in the workspace. docs/kernels/delta.md.
 */
#include "kernels/portable/delta_prepare.cuh"
#include "kernels/portable/delta_walk.cuh"
#include "kernels/portable/kernels.h"

namespace
{

static struct problem problem_of(const void *args, void *workspace, size_t *bytes)
{
	struct matrix_recurrence_backward_args a = {};

	a.forward = *static_cast<const struct matrix_recurrence_args *>(args);
	return prepared_problem(a, workspace, bytes);
}

template <int KEYS, bool DIAGONAL, bool DELTA>
static enum status run(struct device *device, const struct problem &p)
{
	const struct matrix_recurrence_args *f = &p.a.forward;
	const int64_t heads = f->batch * f->n_heads;

	TRY((prepare<KEYS, DIAGONAL, DELTA>(device, "matrix_recurrence", p)));
	return launch(device, "matrix_recurrence", output_kernel<KEYS, DIAGONAL, DELTA>,
	              dim3((unsigned)(heads * p.column_blocks)), WALK_THREADS,
	              sizeof(struct output_memory<KEYS, DIAGONAL>), p);
}

template <int KEYS> static enum status run(struct device *device, const struct problem &p)
{
	if (is_bonus(&p.a.forward))
		return run<KEYS, true, false>(device, p);
	return p.a.forward.decay == DECAY_DIAGONAL ? run<KEYS, true, true>(device, p)
	                                           : run<KEYS, false, true>(device, p);
}

/* Of a block that walks. */
static size_t shared_bytes(const struct matrix_recurrence_args *f)
{
	if (f->decay == DECAY_DIAGONAL)
		return f->d_k <= 64 ? sizeof(struct output_memory<64, true>)
		                    : sizeof(struct output_memory<MAX_KEYS, true>);
	return f->d_k <= 64 ? sizeof(struct output_memory<64, false>)
	                    : sizeof(struct output_memory<MAX_KEYS, false>);
}

} // namespace

extern "C" const char *portable_delta_unsupported(const struct device *device, const void *args)
{
	const auto *f = static_cast<const struct matrix_recurrence_args *>(args);

	if (f->rule != RULE_DELTA && f->rule != RULE_BONUS)
		return "only the delta rule and the bonus";
	if (!is_known_decay(f->decay))
		return "an unknown decay";
	if (is_bonus(f) && f->decay != DECAY_DIAGONAL)
		return "the bonus only with diagonal decays";
	if (f->chunk && f->chunk != CHUNK)
		return "chunk must be 64, or 0";
	if (f->d_k > MAX_KEYS)
		return "d_k above 128 with the delta rule or the bonus";
	if (shared_bytes(f) > cuda_shared_limit(device))
		return "the GPU has too little shared memory";
	if (f->batch * f->n_heads >
	    INT32_MAX / max(divide_up(f->seq_len, CHUNK), divide_up(f->d_v, WALK_COLUMNS)))
		return "more chunks than a grid has blocks";
	if (f->decay == DECAY_DIAGONAL && !is_aligned(&f->log_decay))
		return "views must be 16-byte aligned";
	return either(check_widths(f->d_k, f->d_v), check_aligned(&f->q, &f->k, &f->v, &f->out));
}

extern "C" size_t portable_delta_workspace(const struct device *, const void *args)
{
	size_t bytes;

	problem_of(args, NULL, &bytes);
	return bytes;
}

extern "C" enum status portable_delta(struct device *device, const void *args, void *workspace)
{
	size_t bytes;
	const struct problem p = problem_of(
	        static_cast<const struct matrix_recurrence_args *>(args), workspace, &bytes);

	return p.keys == 64 ? run<64>(device, p) : run<MAX_KEYS>(device, p);
}
