/* Attention as two batched products by cuBLASLt with a softmax kernel between them. */
#define _GNU_SOURCE
#include "baselines/cublas/kernels.h"

#include "baselines/cublas/product.h"
#include "baselines/cublas/softmax.h"
#include "baselines/plain_attention.h"

/* Elements from one row of scores to the next: a multiple of 8, for products by tensor cores. */
static int64_t score_stride(const struct attention_args *a)
{
	return (a->kv_len + 7) / 8 * 8;
}

/* All heads of a sequence. */
static struct matrices heads_of(const struct view *view, int64_t b)
{
	return (struct matrices){(char *)view->data + b * view->batch * 2, view->token, view->head,
	                         false};
}

static struct matrices scores_of(const struct attention_args *a, void *scores)
{
	return (struct matrices){scores, score_stride(a), a->seq_len * score_stride(a), false};
}

const char *cublas_attention_unsupported(const struct device *device, const void *args)
{
	const struct attention_args *a = args;

	(void)device;
	if (a->batch * a->n_heads * a->seq_len > INT32_MAX)
		return "more than 2^31 rows of scores";
	return check_plain_attention(a);
}

size_t cublas_attention_workspace(const struct device *device, const void *args)
{
	const struct attention_args *a = args;

	(void)device;
	return GEMM_WORKSPACE + (size_t)(a->batch * a->n_heads * a->seq_len * score_stride(a)) * 2;
}

/* scores [H, T, kv_len] = scale q k^T of one sequence. */
static enum status multiply_keys(struct device *device, const struct attention_args *a, int64_t b,
                                 void *scores, void *workspace)
{
	const struct gemm g =
	        product(a->n_heads, a->seq_len, a->d_head, a->kv_len, a->scale, heads_of(&a->q, b),
	                transpose(heads_of(&a->k, b)), scores_of(a, scores));

	return gemm_run(device, &g, workspace);
}

/* out [H, T, d] = probabilities v of one sequence. */
static enum status multiply_values(struct device *device, const struct attention_args *a, int64_t b,
                                   void *probabilities, void *workspace)
{
	const struct gemm g =
	        product(a->n_heads, a->seq_len, a->kv_len, a->d_head, 1,
	                scores_of(a, probabilities), heads_of(&a->v, b), heads_of(&a->out, b));

	return gemm_run(device, &g, workspace);
}

enum status cublas_attention(struct device *device, const void *args, void *workspace)
{
	const struct attention_args *a = args;
	char *scores = (char *)workspace + GEMM_WORKSPACE;
	const int64_t bytes = a->n_heads * a->seq_len * score_stride(a) * 2;
	enum status status = STATUS_OK;

	for (int64_t b = 0; status == STATUS_OK && b < a->batch; b++)
		status = multiply_keys(device, a, b, scores + b * bytes, workspace);
	if (status == STATUS_OK)
		status = cublas_softmax(device, a, scores, score_stride(a));
	for (int64_t b = 0; status == STATUS_OK && b < a->batch; b++)
		status = multiply_values(device, a, b, scores + b * bytes, workspace);
	return status;
}
