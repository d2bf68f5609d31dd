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

	return run_embedding(ctx, &args);
}

static struct norm_linear_args head_args(const struct stack *stack, int64_t n_tokens, const void *y,
                                         void *logits)
{
	return (struct norm_linear_args){
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
}

enum status model_head(const struct stack *stack, struct context *ctx, int64_t n_tokens,
                       const void *y, void *logits)
{
	const struct norm_linear_args args = head_args(stack, n_tokens, y, logits);

	return run_norm_linear(ctx, &args);
}

/* Columns of a head in which a row is moved: any that divide it, and no wider than kernels take. */
static int64_t column_group(int64_t width)
{
	int64_t group = 128;

	while (width % group != 0)
		group /= 2;
	return group;
}

/* A gather of strided rows is what OP_ROTATE does when it does not rotate. */
enum status model_take_last(const struct stack *stack, struct context *ctx, int64_t n_seq,
                            int64_t seq_len)
{
	int64_t d = stack->d_model, d_head = column_group(d);
	const struct rotate_args args = {
	        .batch = n_seq,
	        .seq_len = 1,
	        .n_heads = d / d_head,
	        .kv_heads = d / d_head,
	        .d_head = d_head,
	        .kv_slots = 1,
	        .q = {mixing_column(ctx, stack->y, (seq_len - 1) * d), seq_len * d, d, d_head},
	        .q_out = {stack->last, d, d, d_head},
	};

	return run_rotate(ctx, &args);
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

	return run_argmax(ctx, &args);
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
	        .forward = head_args(stack, tokens_of(stack), stack->y, NULL),
	        .dy = stack->logits,
	        .dx_norm = stack->dx_norm,
	        .dx = stack->dy,
	        .dnorm_weight = stack->d_final_norm,
	        .dweight = stack->d_head,
	};

	TRY(run_cross_entropy(ctx, &loss));
	return run_norm_linear_backward(ctx, &head);
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

	return run_embedding_backward(ctx, &args);
}
