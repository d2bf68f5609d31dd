/* One token of the matrix-state recurrence. A task is a block of columns of one head's state. */
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/matrix_state.h"
#include "kernels/cpu/recurrence.h"

/* The decay of every head, [B, H, d_k]. */
size_t cpu_matrix_recurrence_step_workspace(const struct device *device, const void *args)
{
	const struct matrix_recurrence_step_args *a = args;

	return sizeof(float) * (size_t)(a->batch * a->n_heads * a->d_k);
}

/* Columns first .. first+n of head h of sequence b. */
static void step_columns(const struct matrix_recurrence_step_args *a, int64_t b, int64_t h,
                         int64_t first, int64_t n, const float *decay)
{
	struct matrix_token token = {.q = view_at(&a->q, b, 0, h),
	                             .k = view_at(&a->k, b, 0, h),
	                             .v = view_at(&a->v, b, 0, h) + first,
	                             .decay = decay,
	                             .bonus = a->bonus ? a->bonus + h * a->d_k : NULL,
	                             .beta = a->rule == RULE_DELTA ? *view_at(&a->beta, b, 0, h)
	                                                           : 0.0f};
	float *state = a->state + (b * a->n_heads + h) * a->d_k * a->d_v + first;

	matrix_state_advance(a->rule, a->d_k, n, a->scale, &token, state, a->d_v,
	                     view_at(&a->out, b, 0, h) + first);
}

enum status cpu_matrix_recurrence_step(struct device *device, const void *args, void *workspace)
{
	const struct matrix_recurrence_step_args *a = args;
	int64_t n_heads = a->batch * a->n_heads, n_blocks = channel_blocks(n_heads, a->d_v);
	float *decay = workspace;

#pragma omp parallel for schedule(static)
	for (int64_t head = 0; head < n_heads; head++)
		matrix_state_decay(a->decay, &a->log_decay, head / a->n_heads, 0, head % a->n_heads,
		                   a->d_k, decay + head * a->d_k, NULL);
#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < n_heads * n_blocks; task++) {
		int64_t head = task / n_blocks, block = task % n_blocks;
		int64_t first = channel_block_start(a->d_v, n_blocks, block);
		int64_t end = channel_block_start(a->d_v, n_blocks, block + 1);

		step_columns(a, head / a->n_heads, head % a->n_heads, first, end - first,
		             decay + head * a->d_k);
	}
	return STATUS_OK;
}
