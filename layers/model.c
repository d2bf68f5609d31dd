/* The two ends of a model. */
#include "layers/model.h"

#include "layers/mixing.h"

static int64_t tokens_of(const struct stack *stack)
{
	return stack->shape.batch * stack->shape.seq_len;
}

enum status model_embed(const struct stack *stack, struct context *ctx, int64_t n_tokens,
                        const int32_t *tokens)
{
	const struct embedding_args args = {
	        .n_tokens = n_tokens,
	        .vocab = stack->vocab,
	        .d_model = stack->d_model,
	        .tokens = tokens,
	        .table = stack->embedding,
	        .y = stack->x,
	};

	return kernel_run(ctx, OP_EMBEDDING, &args);
}

enum status model_head(const struct stack *stack, struct context *ctx, int64_t n_tokens,
                       const void *y, void *logits)
{
	const struct norm_linear_args args = {
	        .n_tokens = n_tokens,
	        .d_in = stack->d_model,
	        .d_out = stack->vocab,
	        .eps = stack->layers[0].norm_eps,
	        .x = y,
	        .norm_weight = stack->final_norm,
	        .weight = stack->head,
	        .x_norm = stack->x_norm,
	        .rstd = stack->rstd,
	        .y = logits,
	};

	return kernel_run(ctx, OP_NORM_LINEAR, &args);
}

/* A gather of strided rows is what OP_ROTATE does when it does not rotate. */
enum status model_take_last(const struct stack *stack, struct context *ctx, int64_t n_seq,
                            int64_t seq_len)
{
	int64_t d = stack->d_model, d_head = d / stack->layers[0].n_heads;
	const struct rotate_args args = {
	        .batch = n_seq,
	        .seq_len = 1,
	        .n_heads = stack->layers[0].n_heads,
	        .d_head = d_head,
	        .kv_slots = 1,
	        .q = {mixing_column(ctx, stack->y, (seq_len - 1) * d), seq_len * d, d, d_head},
	        .q_out = {stack->last, d, d, d_head},
	};

	return kernel_run(ctx, OP_ROTATE, &args);
}

enum status model_pick(const struct stack *stack, struct context *ctx, int64_t n_seq,
                       const void *logits, int32_t *next, int32_t *position)
{
	const struct argmax_args args = {
	        .n_tokens = n_seq,
	        .vocab = stack->vocab,
	        .logits = logits,
	        .tokens = next,
	        .position = position,
	};

	return kernel_run(ctx, OP_ARGMAX, &args);
}

enum status model_loss_backward(const struct stack *stack, struct context *ctx)
{
	const struct cross_entropy_args loss = {
	        .n_tokens = tokens_of(stack),
	        .vocab = stack->vocab,
	        .logits = stack->logits,
	        .want_gradient = true,
	        .targets = stack->targets,
	        .loss = stack->loss,
	        .losses = stack->losses,
	};
	const struct norm_linear_backward_args head = {
	        .n_tokens = tokens_of(stack),
	        .d_in = stack->d_model,
	        .d_out = stack->vocab,
	        .x = stack->y,
	        .x_norm = stack->x_norm,
	        .weight = stack->head,
	        .norm_weight = stack->final_norm,
	        .rstd = stack->rstd,
	        .dy = stack->logits,
	        .dx_norm = stack->dx_norm,
	        .dx = stack->dy,
	        .dnorm_weight = stack->d_final_norm,
	        .dweight = stack->d_head,
	};
	enum status status = kernel_run(ctx, OP_CROSS_ENTROPY, &loss);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_LINEAR_BACKWARD, &head);
	return status;
}

enum status model_embed_backward(const struct stack *stack, struct context *ctx)
{
	const struct embedding_backward_args args = {
	        .n_tokens = tokens_of(stack),
	        .vocab = stack->vocab,
	        .d_model = stack->d_model,
	        .tokens = stack->tokens,
	        .dy = stack->dx,
	        .dtable = stack->d_embedding,
	};

	return kernel_run(ctx, OP_EMBEDDING_BACKWARD, &args);
}
