/*
 * One token per sequence, attended to by FlashAttention-3. The visible part of the cache is
 * handed over as a tensor of its own, so that no lengths have to be read from memory: the fastest
 * of its ways where all sequences are equally long.
 */
#define _GNU_SOURCE
#include "baselines/flash3/kernels.h"

#include "baselines/cudnn/step.h"
#include "baselines/flash3/library.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/tensor_map.h"

/* Visible slots, the first of them and how many; in a ring that has gone round they may be two
 * pieces, and then the first is negative. */
struct slots {
	int64_t first, count;
};

static struct slots visible(const struct attention_step_args *a)
{
	const int64_t last = a->position_hint;
	const int64_t count = a->window >= 0 && a->window < last ? a->window + 1 : last + 1;

	if (count == a->kv_slots)
		return (struct slots){0, count};
	return (struct slots){last % a->kv_slots - (count - 1), count};
}

static size_t query_bytes(const struct attention_step_args *a)
{
	return ((size_t)(a->batch * a->n_heads * a->d_head) * 2 + 255) / 256 * 256;
}

static struct flash3_tensor cache_of(const struct view *view, int64_t first)
{
	return (struct flash3_tensor){(char *)view->data + first * view->token * 2, view->batch,
	                              view->token, view->head};
}

static struct flash3_problem problem_of(const struct device *device,
                                        const struct attention_step_args *a, void *q)
{
	const struct slots slots = visible(a);
	const int64_t width = a->n_heads * a->d_head;

	return (struct flash3_problem){
	        .batch = (int)a->batch,
	        .n_heads = (int)a->n_heads,
	        .kv_heads = (int)a->kv_heads,
	        .d_head = (int)a->d_head,
	        .seq_len = 1,
	        .kv_len = (int)slots.count,
	        .window = -1,
	        .may_split = true,
	        .n_sm = cuda_sm_count(device),
	        .scale = a->scale,
	        .q = {q, width, width, a->d_head},
	        .k = cache_of(&a->k_cache, slots.first),
	        .v = cache_of(&a->v_cache, slots.first),
	        .out = {a->out.data, a->out.batch, a->out.token, a->out.head}};
}

const char *flash3_attention_step_unsupported(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;
	const char *why;

	if (!flash3_library_get(device, &why))
		return why;
	if (!cuda_is_hopper(device))
		return "needs compute capability 9.0";
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	if (a->position_hint < 0)
		return "the host must know the position";
	if (visible(a).first < 0)
		return "the window must be one piece of the cache";
	if (!tensor_map_supports(&a->k_cache) || !tensor_map_supports(&a->v_cache) ||
	    !tensor_map_supports(&a->out))
		return "views must be 16-byte aligned";
	return NULL;
}

size_t flash3_attention_step_workspace(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;
	const struct flash3_problem problem = problem_of(device, a, NULL);
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(device, &why);

	return query_bytes(a) + (flash3 ? flash3->workspace(&problem) : 0);
}

enum status flash3_attention_step(struct device *device, const void *args, void *workspace)
{
	const struct attention_step_args *a = args;
	const struct flash3_problem problem = problem_of(device, a, workspace);
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(device, &why);
	enum status status = flash3 ? cudnn_step_prepare(device, a, workspace, NULL, NULL)
	                            : status_set(STATUS_UNSUPPORTED, "%s", why);

	if (status != STATUS_OK)
		return status;
	CUDA_TRY(
	        flash3->forward(&problem, (char *)workspace + query_bytes(a), cuda_stream(device)));
	return STATUS_OK;
}
