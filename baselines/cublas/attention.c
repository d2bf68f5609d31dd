/* Attention as two batched products by cuBLASLt with a softmax kernel between them. */
#define _GNU_SOURCE
#include "baselines/cublas/cublas.h"

#include "baselines/cublas/softmax.h"
#include "kernels/cuda/gemm.h"
#include "kernels/kernels.h"

/* Elements from one row of scores to the next: a multiple of 8, for products by tensor cores. */
static int64_t score_stride(const struct attention_args *a)
{
	return (a->kv_len + 7) / 8 * 8;
}

static const void *sequence(const struct view *view, int64_t b)
{
	return (const char *)view->data + b * view->batch * 2;
}

const char *cublas_attention_unsupported(const void *args)
{
	const struct attention_args *a = args;

	if (a->mask == MASK_CHUNK || a->own_score || a->gate.data || a->out_ungated.data)
		return "no chunk mask, own token or gate";
	if (a->q_heads != a->n_heads)
		return "no shared queries";
	if (a->batch * a->n_heads * a->seq_len > INT32_MAX)
		return "more than 2^31 rows of scores";
	return NULL;
}

size_t cublas_attention_workspace(const void *args)
{
	const struct attention_args *a = args;

	return GEMM_WORKSPACE + (size_t)(a->batch * a->n_heads * a->seq_len * score_stride(a)) * 2;
}

/* scores [H, T, kv_len] = scale q k^T of one sequence. */
static enum status multiply_keys(const struct attention_args *a, int64_t b, void *scores,
                                 void *workspace)
{
	const int64_t stride = score_stride(a);
	const struct gemm g = {.rows = a->seq_len,
	                       .columns = a->kv_len,
	                       .inner = a->d_head,
	                       .a = sequence(&a->q, b),
	                       .b = sequence(&a->k, b),
	                       .b_transposed = true,
	                       .a_leading = a->q.token,
	                       .b_leading = a->k.token,
	                       .out_leading = stride,
	                       .out = scores,
	                       .out_type = DTYPE_BF16,
	                       .scale = a->scale,
	                       .batch = a->n_heads,
	                       .a_stride = a->q.head,
	                       .b_stride = a->k.head,
	                       .out_stride = a->seq_len * stride};

	return gemm_run(&g, workspace);
}

/* out [H, T, d] = probabilities v of one sequence. */
static enum status multiply_values(const struct attention_args *a, int64_t b,
                                   const void *probabilities, void *workspace)
{
	const int64_t stride = score_stride(a);
	const struct gemm g = {.rows = a->seq_len,
	                       .columns = a->d_head,
	                       .inner = a->kv_len,
	                       .a = probabilities,
	                       .b = sequence(&a->v, b),
	                       .a_leading = stride,
	                       .b_leading = a->v.token,
	                       .out_leading = a->out.token,
	                       .out = (char *)a->out.data + b * a->out.batch * 2,
	                       .out_type = DTYPE_BF16,
	                       .scale = 1.0f,
	                       .batch = a->n_heads,
	                       .a_stride = a->seq_len * stride,
	                       .b_stride = a->v.head,
	                       .out_stride = a->out.head};

	return gemm_run(&g, workspace);
}

enum status cublas_attention(const void *args, void *workspace)
{
	const struct attention_args *a = args;
	char *scores = (char *)workspace + GEMM_WORKSPACE;
	const int64_t bytes = a->n_heads * a->seq_len * score_stride(a) * 2;
	enum status status = STATUS_OK;

	for (int64_t b = 0; status == STATUS_OK && b < a->batch; b++)
		status = multiply_keys(a, b, scores + b * bytes, workspace);
	if (status == STATUS_OK)
		status = cublas_softmax(a, scores, score_stride(a));
	for (int64_t b = 0; status == STATUS_OK && b < a->batch; b++)
		status = multiply_values(a, b, scores + b * bytes, workspace);
	return status;
}
