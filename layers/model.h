/*
 * What makes a stack a model: the ffn layer between its mixing layers, the
 * embedding before them, final norm, head, loss and greedy choice after them.
 * Used by layers/stack.c alone.
 */
#ifndef LAYERS_MODEL_H
#define LAYERS_MODEL_H

#include "layers/stack.h"

extern const struct layer_class ffn_layer;

/* x [n_tokens, D] = rows of the embedding. */
enum status model_embed(const struct stack *stack, struct context *ctx, int64_t n_tokens,
                        const int32_t *tokens);
/* logits [n_tokens, V] = head(RMSNorm(y)). */
enum status model_head(const struct stack *stack, struct context *ctx, int64_t n_tokens,
                       const void *y, void *logits);
/* last [n_seq, D] = y's last position of each sequence of seq_len tokens. */
enum status model_take_last(const struct stack *stack, struct context *ctx, int64_t n_seq,
                            int64_t seq_len);
/* next [n_seq] = the likeliest tokens; *position += 1 unless NULL. */
enum status model_pick(const struct stack *stack, struct context *ctx, int64_t n_seq,
                       const void *logits, int32_t *next, int32_t *position);
/* Loss; its gradient in the logits' place; from there dy and the head's gradients. */
enum status model_loss_backward(const struct stack *stack, struct context *ctx);
/* The embedding's gradient from dx. */
enum status model_embed_backward(const struct stack *stack, struct context *ctx);

#endif
