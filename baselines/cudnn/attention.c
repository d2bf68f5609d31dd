/* Attention by cuDNN. */
#define _GNU_SOURCE
#include "baselines/cudnn/cudnn.h"

#include <string.h>

#include "baselines/cudnn/sdpa.h"
#include "kernels/kernels.h"

static struct sdpa_shape shape_of(const struct attention_args *a)
{
	struct sdpa_shape s;

	memset(&s, 0, sizeof s);
	s.batch = a->batch;
	s.n_heads = a->n_heads;
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

const char *cudnn_attention_unsupported(const void *args)
{
	const struct attention_args *a = args;
	const char *why;

	if (a->mask == MASK_CHUNK || a->own_score || a->gate.data || a->out_ungated.data)
		return "no chunk mask, own token or gate";
	if (a->q_heads != a->n_heads)
		return "no shared queries";
	const struct sdpa_shape shape = shape_of(a);
	return sdpa_plan(&shape, &why) ? NULL : why;
}

size_t cudnn_attention_workspace(const void *args)
{
	const struct sdpa_shape shape = shape_of(args);
	const char *why;
	const struct graph_plan *plan = sdpa_plan(&shape, &why);

	return plan ? plan->workspace : 0;
}

enum status cudnn_attention(const void *args, void *workspace)
{
	const struct attention_args *a = args;
	const struct sdpa_shape shape = shape_of(a);
	const struct sdpa_tensors tensors = {.q = a->q.data,
	                                     .k = a->k.data,
	                                     .v = a->v.data,
	                                     .out = a->out.data,
	                                     .lse = a->lse,
	                                     .scale = a->scale};

	return sdpa_run(&shape, &tensors, workspace);
}
