/* Attention and its gradients by FlashAttention-3. */
#define _GNU_SOURCE
#include "baselines/flash3/kernels.h"

#include "baselines/flash3/library.h"
#include "baselines/plain_attention.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/tensor_map.h"

static struct flash3_tensor tensor_of(const struct view *view)
{
	return (struct flash3_tensor){view->data, view->batch, view->token, view->head};
}

static struct flash3_problem problem_of(const struct device *device, const struct attention_args *a)
{
	return (struct flash3_problem){.batch = (int)a->batch,
	                               .n_heads = (int)a->n_heads,
	                               .kv_heads = (int)a->kv_heads,
	                               .d_head = (int)a->d_head,
	                               .seq_len = (int)a->seq_len,
	                               .kv_len = (int)a->kv_len,
	                               .causal = a->mask != MASK_FULL,
	                               .window = a->mask == MASK_WINDOW ? (int)a->window : -1,
	                               .n_sm = cuda_sm_count(device),
	                               .scale = a->scale,
	                               .q = tensor_of(&a->q),
	                               .k = tensor_of(&a->k),
	                               .v = tensor_of(&a->v),
	                               .out = tensor_of(&a->out)};
}

/* What neither the forward nor the gradients can do. */
static const char *attention_unsupported(const struct device *device,
                                         const struct attention_args *a)
{
	const char *why;

	if (!flash3_library_get(device, &why))
		return why;
	if (!cuda_is_hopper(device))
		return "needs compute capability 9.0";
	why = check_plain_attention(a);
	if (why)
		return why;
	if (a->d_head != 64 && a->d_head != 128)
		return "head width must be 64 or 128";
	/* Its mask is aligned to the last key, not to the first. */
	if (a->mask != MASK_FULL && a->kv_len != a->seq_len)
		return "a causal mask needs as many keys as queries";
	if (!tensor_map_supports(&a->q) || !tensor_map_supports(&a->k) ||
	    !tensor_map_supports(&a->v) || !tensor_map_supports(&a->out))
		return "views must be 16-byte aligned";
	return NULL;
}

const char *flash3_attention_unsupported(const struct device *device, const void *args)
{
	const struct attention_args *a = args;

	return a->lse ? "its forward leaves no lse here" : attention_unsupported(device, a);
}

size_t flash3_attention_workspace(const struct device *device, const void *args)
{
	const struct flash3_problem problem = problem_of(device, args);
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(device, &why);

	return flash3 ? flash3->workspace(&problem) : 0;
}

enum status flash3_attention(struct device *device, const void *args, void *workspace)
{
	const struct flash3_problem problem = problem_of(device, args);
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(device, &why);

	if (!flash3)
		return status_set(STATUS_UNSUPPORTED, "%s", why);
	CUDA_TRY(flash3->forward(&problem, workspace, cuda_stream(device)));
	return STATUS_OK;
}

const char *flash3_attention_backward_unsupported(const struct device *device, const void *args)
{
	const struct attention_backward_args *x = args;
	const char *why = attention_unsupported(device, &x->forward);

	if (why)
		return why;
	if (!tensor_map_supports(&x->dout) || !tensor_map_supports(&x->dq) ||
	    !tensor_map_supports(&x->dk) || !tensor_map_supports(&x->dv))
		return "views must be 16-byte aligned";
	return NULL;
}

static struct flash3_gradients gradients_of(const struct device *device,
                                            const struct attention_backward_args *x)
{
	return (struct flash3_gradients){.forward = problem_of(device, &x->forward),
	                                 .dout = tensor_of(&x->dout),
	                                 .dq = tensor_of(&x->dq),
	                                 .dk = tensor_of(&x->dk),
	                                 .dv = tensor_of(&x->dv),
	                                 .lse = x->forward.lse,
	                                 .deterministic = device->deterministic};
}

size_t flash3_attention_backward_workspace(const struct device *device, const void *args)
{
	const struct flash3_gradients gradients = gradients_of(device, args);
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(device, &why);

	return flash3 ? flash3->backward_workspace(&gradients) : 0;
}

enum status flash3_attention_backward(struct device *device, const void *args, void *workspace)
{
	const struct flash3_gradients gradients = gradients_of(device, args);
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(device, &why);

	if (!flash3)
		return status_set(STATUS_UNSUPPORTED, "%s", why);
	CUDA_TRY(flash3->backward(&gradients, workspace, cuda_stream(device)));
	return STATUS_OK;
}
