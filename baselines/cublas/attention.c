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

/* Heads that read one head of keys: head h reads number h / readers. */
static int64_t readers(const struct attention_args *a)
{
	return a->n_heads / a->kv_heads;
}

/* Every `step`th head of a sequence, from `first` on. */
static struct matrices heads_of(const struct view *view, int64_t b, int64_t first, int64_t step)
{
	return (struct matrices){(char *)view->data + (b * view->batch + first * view->head) * 2,
	                         view->token, step * view->head, false};
}

/* The scores of reader number `reader` of each head of keys, of those of one sequence. */
static struct matrices scores_of(const struct attention_args *a, void *scores, int64_t reader)
{
	const int64_t head = a->seq_len * score_stride(a);

	return (struct matrices){(char *)scores + reader * head * 2, score_stride(a),
	                         readers(a) * head, false};
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

/* scores [H, T, kv_len] = scale q k^T of one sequence, for one reader of each head of keys. */
static enum status multiply_keys(struct device *device, const struct attention_args *a, int64_t b,
                                 int64_t reader, void *scores, void *workspace)
{
	const struct gemm g =
	        product(a->kv_heads, a->seq_len, a->d_head, a->kv_len, a->scale,
	                heads_of(&a->q, b, reader, readers(a)), transpose(heads_of(&a->k, b, 0, 1)),
	                scores_of(a, scores, reader));

	return gemm_run(device, &g, workspace);
}

/* out [H, T, d] = probabilities v of one sequence, likewise. */
static enum status multiply_values(struct device *device, const struct attention_args *a, int64_t b,
                                   int64_t reader, void *probabilities, void *workspace)
{
	const struct gemm g = product(a->kv_heads, a->seq_len, a->kv_len, a->d_head, 1,
	                              scores_of(a, probabilities, reader), heads_of(&a->v, b, 0, 1),
	                              heads_of(&a->out, b, reader, readers(a)));

	return gemm_run(device, &g, workspace);
}

enum status cublas_attention(struct device *device, const void *args, void *workspace)
{
	const struct attention_args *a = args;
	char *scores = (char *)workspace + GEMM_WORKSPACE;
	const int64_t bytes = a->n_heads * a->seq_len * score_stride(a) * 2;
	const int64_t products = a->batch * readers(a);
	enum status status = STATUS_OK;

	for (int64_t i = 0; status == STATUS_OK && i < products; i++)
		status = multiply_keys(device, a, i / readers(a), i % readers(a),
		                       scores + i / readers(a) * bytes, workspace);
	if (status == STATUS_OK)
		status = cublas_softmax(device, a, scores, score_stride(a));
	for (int64_t i = 0; status == STATUS_OK && i < products; i++)
		status = multiply_values(device, a, i / readers(a), i % readers(a),
		                         scores + i / readers(a) * bytes, workspace);
	return status;
}
