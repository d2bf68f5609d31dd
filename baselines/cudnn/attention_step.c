/*
 * One token per sequence, attended to by cuDNN. Lengths are in device memory,
 * as the position is; only a cache that the host knows to be full needs none.
 */
#define _GNU_SOURCE
#include "baselines/cudnn/kernels.h"

#include <string.h>

#include "baselines/cudnn/sdpa.h"
#include "baselines/cudnn/step.h"

/* The workspace's parts. */
struct parts {
	size_t query_lengths, key_lengths, plan; /* offsets; q is at 0 */
};

static size_t round_up(size_t bytes)
{
	return (bytes + 255) / 256 * 256;
}

static struct parts parts_of(const struct attention_step_args *a)
{
	const size_t q = round_up((size_t)(a->batch * a->n_heads * a->d_head) * 2);
	const size_t lengths = round_up((size_t)a->batch * sizeof(int32_t));

	return (struct parts){q, q + lengths, q + 2 * lengths};
}

static struct sdpa_shape shape_of(const struct attention_step_args *a)
{
	struct sdpa_shape s;

	memset(&s, 0, sizeof s);
	s.batch = a->batch;
	s.n_heads = a->n_heads;
	s.kv_heads = a->kv_heads;
	s.d_head = a->d_head;
	s.seq_len = 1;
	s.kv_len = a->kv_slots;
	s.mask = MASK_FULL;
	s.padded = a->position_hint < a->kv_slots - 1;
	s.q[0] = a->n_heads * a->d_head;
	s.q[1] = a->n_heads * a->d_head;
	s.q[2] = a->d_head;
	sdpa_strides(s.k, &a->k_cache);
	sdpa_strides(s.v, &a->v_cache);
	sdpa_strides(s.out, &a->out);
	return s;
}

const char *cudnn_attention_step_unsupported(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;
	const char *why;

	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	if (a->rope && a->rope_width > 0 && a->rope_width != a->d_head)
		return "a part of a head that is rotated";
	if (a->window >= 0 && a->window != a->kv_slots - 1)
		return "the window must fill the cache";
	const struct sdpa_shape shape = shape_of(a);
	return sdpa_plan(device, &shape, &why) ? NULL : why;
}

/* The larger of what the plans with and without lengths want: a cache fills while it is used. */
size_t cudnn_attention_step_workspace(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;
	struct sdpa_shape shape = shape_of(a);
	size_t most = 0;
	const char *why;

	for (shape.padded = 0; shape.padded < 2; shape.padded++) {
		const struct graph_plan *plan = sdpa_plan(device, &shape, &why);

		if (plan && plan->workspace > most)
			most = plan->workspace;
	}
	return parts_of(a).plan + most;
}

enum status cudnn_attention_step(struct device *device, const void *args, void *workspace)
{
	const struct attention_step_args *a = args;
	const struct parts parts = parts_of(a);
	const struct sdpa_shape shape = shape_of(a);
	char *memory = workspace;
	int32_t *query_lengths = (int32_t *)(void *)(memory + parts.query_lengths);
	int32_t *key_lengths = (int32_t *)(void *)(memory + parts.key_lengths);
	const struct sdpa_tensors tensors = {.q = memory,
	                                     .k = a->k_cache.data,
	                                     .v = a->v_cache.data,
	                                     .out = a->out.data,
	                                     .query_lengths = query_lengths,
	                                     .key_lengths = key_lengths,
	                                     .scale = a->scale};
	enum status status = cudnn_step_prepare(device, a, memory, query_lengths, key_lengths);

	return status == STATUS_OK ? sdpa_run(device, &shape, &tensors, memory + parts.plan)
	                           : status;
}
