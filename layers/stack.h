/*
 * A stack of layers, and a model: embedding, stack, final norm and head. Plans
 * all memory first, then takes it in one piece; runs forward, backward, step.
 *
 * Use: stack_configure (a pattern such as "rat,swa"), stack_plan, compare with
 * what is free, stack_allocate, stack_initialize, then any of the runs.
 */
#ifndef LAYERS_STACK_H
#define LAYERS_STACK_H

#include "layers/layer.h"

/* What every layer of a stack is made from. */
struct stack_options {
	const char *pattern;      /* layer names, comma separated: layer i is name i mod count */
	int64_t n_layers;         /* 0: as many as the pattern names */
	bool ffn;                 /* an ffn after each layer (models) */
	int64_t vocab;            /* > 0: a model with embedding and head */
	int64_t d_model, n_heads; /* n_heads 0: GLA 4, others d_model / 128 or d_model / 64 */
	int64_t chunk, window, groups, train_len;
	bool rope, prenorm, residual;
	float norm_eps;
};

/* Bytes, by purpose. */
struct memory_plan {
	size_t parameters, gradients, state, saved, scratch, activations, workspace, logits;
	size_t total;
};

struct stack {
	const struct backend *backend;
	int n_layers;
	struct layer_config layers[MAX_LAYERS];
	int64_t vocab, d_model;

	struct layer_shape shape; /* what it is allocated for */
	struct layer_memory memory[MAX_LAYERS];
	void *x; /* [N, D] input of the stack (models: the embedding's output) */
	void *y; /* [N, D] output */
	void *layer_x[MAX_LAYERS + 1]; /* input of each layer; training keeps all */
	void *dy, *dx;                 /* [N, D] training: gradient of y in, of x out */
	int32_t *position;             /* [1] device */
	/* models: */
	void *embedding;   /* [V, D] */
	float *final_norm; /* [D] */
	void *head;        /* [V, D] */
	float *d_embedding, *d_final_norm, *d_head;
	int32_t *tokens, *targets; /* [N] device */
	void *x_norm;              /* [N, D] */
	float *rstd;               /* [N] */
	void *logits;              /* [N, V]; generation and prefill: [B, V] of the last position */
	float *loss, *losses;

	void *arena;
	struct memory_plan plan;
	void *workspace;
};

/* STATUS_INVALID with one line naming the option that is wrong and what is allowed. */
enum status stack_configure(struct stack *stack, const struct backend *backend,
                            const struct stack_options *options);

/* Bytes the stack needs for `shape` and the work of one run of shape.pass; takes nothing.
 * STATUS_UNSUPPORTED if a layer or an operation cannot do it. `work` may be NULL. */
enum status stack_plan(struct stack *stack, const struct context *ctx,
                       const struct layer_shape *shape, struct memory_plan *plan,
                       struct kernel_plan *work);

/* Takes the memory of the plan and sets ctx->workspace; STATUS_OOM with the bytes wanted. */
enum status stack_allocate(struct stack *stack, struct context *ctx,
                           const struct layer_shape *shape);
void stack_release(struct stack *stack);

/* Random parameters (layer.h's enum init) and random x, dy, tokens, reproducible from `seed`. */
enum status stack_initialize(struct stack *stack, uint64_t seed);
/* Random caches of position `position`, as prefill would lay them out; sets *position. */
enum status stack_fill_state(struct stack *stack, int64_t position, uint64_t seed);

/* x -> y (a model: tokens -> logits of the last position, or all in training), filling states. */
enum status stack_forward(struct stack *stack, struct context *ctx);
/* dy -> dx and all gradients (a model: from the loss), after stack_forward in training. */
enum status stack_backward(struct stack *stack, struct context *ctx);
/* One token per sequence at *position. A model also picks the next token greedily and advances
 * *position; a bare stack leaves it to the caller. */
enum status stack_step(struct stack *stack, struct context *ctx, int64_t position_hint);
/* Sets *position on the device. */
enum status stack_set_position(struct stack *stack, int64_t position);

/*
 * Verification. The worst row's ||a-b||/||b|| of the tensor that enters OutProj
 * in the buffers of the last run, and in training of dx without the residual's
 * part and of every parameter's gradient, against the fp64 reference; NaN or
 * Inf anywhere gives INFINITY. At least `min_rows` rows (all, if no more than that). For a
 * stack of several layers each layer is checked on its own input, and the
 * worst counts. For generation call stack_snapshot() before the step.
 */
enum status stack_verify(struct stack *stack, int64_t min_rows, uint64_t seed, double *rel_err);
/* Fills every buffer a run writes with NaN bytes. */
enum status stack_poison(struct stack *stack);

#endif
