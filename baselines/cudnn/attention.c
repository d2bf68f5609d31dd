/* Attention by cuDNN. */
#define _GNU_SOURCE
#include "baselines/cudnn/kernels.h"

#include <string.h>

#include "baselines/cudnn/sdpa.h"
#include "baselines/plain_attention.h"

static struct sdpa_shape shape_of(const struct attention_args *a)
{
	struct sdpa_shape s;

	memset(&s, 0, sizeof s);
	s.batch = a->batch;
	s.n_heads = a->n_heads;
	s.kv_heads = a->kv_heads;
	s.d_head = a->d_head;
	s.seq_len = a->seq_len;
	s.kv_len = a->kv_len;
	s.mask = a->mask;
	s.window = a->mask == MASK_WINDOW ? a->window : 0;
	s.stats = a->lse != NULL;
	sdpa_strides(s.q, &a->q);
	sdpa_strides(s.k, &a->k);
	sdpa_strides(s.v, &a->v);
	sdpa_strides(s.out, &a->out);
	return s;
}

static struct sdpa_tensors tensors_of(const struct attention_args *a)
{
	return (struct sdpa_tensors){.q = a->q.data,
	                             .k = a->k.data,
	                             .v = a->v.data,
	                             .out = a->out.data,
	                             .lse = a->lse,
	                             .scale = a->scale};
}

const char *cudnn_attention_unsupported(const struct device *device, const void *args)
{
	const char *why = check_plain_attention(args);

	if (why)
		return why;
	const struct sdpa_shape shape = shape_of(args);
	return sdpa_plan(device, &shape, &why) ? NULL : why;
}

size_t cudnn_attention_workspace(const struct device *device, const void *args)
{
	const struct sdpa_shape shape = shape_of(args);
	const char *why;
	const struct graph_plan *plan = sdpa_plan(device, &shape, &why);

	return plan ? plan->workspace : 0;
}

enum status cudnn_attention(struct device *device, const void *args, void *workspace)
{
	const struct sdpa_shape shape = shape_of(args);
	const struct sdpa_tensors tensors = tensors_of(args);

	return sdpa_run(device, &shape, &tensors, workspace);
}

/* From this version on cuDNN sets the sums of dq to zero itself. */
enum { CLEARS_SUMS_SINCE = 90600, ALIGNMENT = 256 };

static struct sdpa_shape backward_shape_of(const struct attention_backward_args *a)
{
	struct sdpa_shape s = shape_of(&a->forward);

	s.stats = 0;
	s.backward = 1;
	sdpa_strides(s.dout, &a->dout);
	sdpa_strides(s.dq, &a->dq);
	sdpa_strides(s.dk, &a->dk);
	sdpa_strides(s.dv, &a->dv);
	return s;
}

/* Bytes of dq's sums and of delta, in front of cuDNN's own workspace. */
static size_t sums_bytes(const struct attention_args *a)
{
	return (size_t)(a->batch * a->n_heads * a->seq_len * a->d_head) * sizeof(float);
}

static size_t delta_bytes(const struct attention_args *a)
{
	size_t bytes = (size_t)(a->batch * a->n_heads * a->seq_len) * sizeof(float);

	return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

const char *cudnn_attention_backward_unsupported(const struct device *device, const void *args)
{
	const struct attention_backward_args *a = args;
	const char *why = check_plain_attention(&a->forward);

	if (why)
		return why;
	const struct sdpa_shape shape = backward_shape_of(a);
	if (!sdpa_plan(device, &shape, &why))
		return why;
	return cudnn_library_version(device) < CLEARS_SUMS_SINCE ? "cuDNN is older than 9.6" : NULL;
}

size_t cudnn_attention_backward_workspace(const struct device *device, const void *args)
{
	const struct attention_backward_args *a = args;
	const struct sdpa_shape shape = backward_shape_of(a);
	const char *why;
	const struct graph_plan *plan = sdpa_plan(device, &shape, &why);

	return plan ? sums_bytes(&a->forward) + delta_bytes(&a->forward) + plan->workspace : 0;
}

enum status cudnn_attention_backward(struct device *device, const void *args, void *workspace)
{
	const struct attention_backward_args *a = args;
	const struct attention_args *f = &a->forward;
	const struct sdpa_shape shape = backward_shape_of(a);
	char *delta = (char *)workspace + sums_bytes(f), *rest = delta + delta_bytes(f);
	struct sdpa_tensors tensors = tensors_of(f);

	tensors.dout = a->dout.data;
	tensors.dq = a->dq.data;
	tensors.dk = a->dk.data;
	tensors.dv = a->dv.data;
	tensors.dq_sum = workspace;
	tensors.delta = (float *)delta;
	return sdpa_run(device, &shape, &tensors, rest);
}
