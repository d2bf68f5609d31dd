/*
 * A stack of layers, and a model: embedding, stack, final norm and head. Plans
 * all memory first, then takes it in one piece; runs forward, backward, step.
 *
 * Use: stack_configure (a pattern such as "rat,swa"), stack_plan, compare with
 * what is free, stack_allocate, stack_initialize, then any of the runs.
 *
 * Buffers (x, y, dy, dx, logits, ...) are in the backend's memory; read and write them with
 * backend_download_floats(stack->backend, stack->backend->activation, ...) and its twin.
 */
#ifndef LAYERS_STACK_H
#define LAYERS_STACK_H

#include "layers/layer.h"

/* What every layer of a stack is made from. */
struct stack_options {
	/* Layer names, comma separated, each with its own L or W if wanted ("rat:16,swa:1024");
	 * layer i is name i mod count. */
	const char *pattern;
	int64_t n_layers; /* 0: as many as the pattern names; an ffn does not count */
	bool ffn;         /* an ffn after each layer (models) */
	int64_t vocab;    /* > 0: a model with embedding and head */
	/* n_heads 0: GLA 4, Mamba-2 heads of 64, others of 128 (of 64 where D < 1024 or no multiple
	 * of 128) */
	int64_t d_model, n_heads;
	int64_t chunk, window, groups, train_len;
	bool rope, prenorm, residual;
	float norm_eps;
};

/* Bytes, by purpose. */
struct memory_plan {
	size_t parameters, gradients, state, saved, scratch, activations, workspace, logits;
	size_t total; /* what stack_allocate takes, alignment included */
};

struct stack_snapshot;

/* Fields below `arena` are for layers/ alone. */
struct stack {
	const struct backend *backend;
	int n_layers; /* ffn layers included */
	struct layer_config layers[MAX_LAYERS];
	int64_t vocab, d_model;

	struct layer_shape shape; /* what it is allocated for */
	struct layer_memory memory[MAX_LAYERS];
	void *x; /* [N, D] input of the stack (models: the embedding's output) */
	void *y; /* [N, D] output */
	/* Input of each layer, y last; those of layers that stack_keeps() are not overwritten. */
	void *layer_x[MAX_LAYERS + 1];
	void *dy, *dx;                  /* [N, D] training: gradient of y in, of x out */
	void *layer_dy[MAX_LAYERS + 1]; /* gradient of layer_x[i]; models keep only one */
	int32_t *position;              /* [1] device */
	/* models: */
	void *embedding;   /* [V, D] */
	float *final_norm; /* [D] */
	void *head;        /* [V, D] */
	float *d_embedding, *d_final_norm, *d_head;
	int32_t *tokens, *targets; /* [N] device */
	int32_t *next;             /* [B] the token each sequence continues with */
	void *last;                /* [B, D] y of the last position (prefill) */
	void *x_norm;              /* [N, D] of the head */
	float *rstd;               /* [N] */
	void *dx_norm;             /* [N, D] scratch */
	void *logits;              /* [N, V]; generation and prefill: [B, V] of the last position */
	float *loss, *losses;

	void *arena;
	struct memory_plan plan;
	void *workspace;
	size_t state_offset, output_offset; /* in the arena: caches; what a run writes */
	struct stack_snapshot *snapshot;
};

/* STATUS_INVALID with one line naming the option that is wrong and what is allowed. */
enum status stack_configure(struct stack *stack, const struct backend *backend,
                            const struct stack_options *options);

/* Bytes the stack needs for `shape` and the work of one run of shape.pass; takes nothing.
 * STATUS_UNSUPPORTED if a layer or an operation cannot do it. `work` may be NULL. */
enum status stack_plan(const struct stack *stack, const struct context *ctx,
                       const struct layer_shape *shape, struct memory_plan *plan,
                       struct kernel_plan *work);

/* Whether layer i's input and saved tensors outlive a run: all layers' in training and of a stack
 * that is no model, else only the last temporal-mixing layer's; the others share their memory. */
bool stack_keeps(const struct stack *stack, const struct layer_shape *shape, int i);

/* Takes the memory of the plan (giving back what the stack held) and sets ctx->workspace, so a
 * context serves one stack at a time; STATUS_OOM with the bytes wanted. */
enum status stack_allocate(struct stack *stack, struct context *ctx,
                           const struct layer_shape *shape);
/* Gives it back; a stack that holds none is left alone. */
void stack_release(struct stack *stack);

/* Random parameters (layer.h's enum init) and random x, dy, tokens, reproducible from `seed`. */
enum status stack_initialize(struct stack *stack, uint64_t seed);
/* Random caches of position `position`, as prefill would lay them out; sets *position. */
enum status stack_fill_state(struct stack *stack, int64_t position, uint64_t seed);
/* Sets *position on the device. */
enum status stack_set_position(struct stack *stack, int64_t position);
/* Tokens [B, T] of a model; in training its targets too: the token that follows, none for the
 * last. Generation (T = 1): the tokens that the next step reads. */
enum status stack_set_tokens(struct stack *stack, const int32_t *tokens);

/*
 * Parameters by index: layer i and its parameter's index in the class's list,
 * or layer LAYER_MODEL and one of enum model_parameter. Host arrays hold the
 * whole parameter as floats. STATUS_INVALID if there is none.
 */
enum { LAYER_MODEL = -1 };
enum model_parameter { MODEL_EMBEDDING, MODEL_FINAL_NORM, MODEL_HEAD, MODEL_PARAMETERS };

/* Elements of a parameter (0: there is none). */
int64_t stack_parameter_count(const struct stack *stack, int layer, int index);
enum status stack_set_parameter(struct stack *stack, int layer, int index, const float *values);
enum status stack_get_parameter(const struct stack *stack, int layer, int index, float *values);
enum status stack_get_gradient(const struct stack *stack, int layer, int index, float *values);

/*
 * The same by golden name, a row range of a parameter: in a stack of one layer
 * "in_proj.weight", in a model "backbone.layers.0.seq_layer.in_proj.weight",
 * "backbone.layers.0.hidden_layer.fc1.weight", "backbone.ln.weight", "embedding.wte.weight",
 * "head.lm_head.weight". STATUS_INVALID for an unknown name or a count that is not the range's.
 */
enum status stack_set_named(struct stack *stack, const char *name, const float *values,
                            int64_t count);
enum status stack_get_named_gradient(const struct stack *stack, const char *name, float *values,
                                     int64_t count);

/* x -> y, filling states. A model: tokens -> logits, in training of every position; otherwise of
 * the last one, and it picks the next token greedily and sets *position to T. */
enum status stack_forward(struct stack *stack, struct context *ctx);
/* After stack_forward in training: dy -> dx and all gradients. A model: computes the loss, replaces
 * the logits by their gradient, and goes on from there. */
enum status stack_backward(struct stack *stack, struct context *ctx);
/* One token per sequence at *position. A model also picks the next token greedily and advances
 * *position; a bare stack leaves it to the caller. */
enum status stack_step(struct stack *stack, struct context *ctx, int64_t position_hint);
/* One run of shape.pass, which is what stack_plan counts: prefill: forward; train: forward and
 * backward; generation: a step at position capacity - 1 (which the caller has set); throughput:
 * forward, then steps until capacity - T tokens have been picked. */
enum status stack_run(struct stack *stack, struct context *ctx);

/*
 * Verification. The worst row's ||a-b||/||b|| of the tensor that enters OutProj
 * in the buffers of the last run, and in training of dx without the residual's
 * part and of every parameter's gradient, against the fp64 reference; NaN or
 * Inf anywhere gives INFINITY. At least `min_rows` rows (all, if no more than that). For a
 * stack of several layers each layer is checked on its own input, and the
 * worst counts; of a model outside training only the last temporal-mixing layer, whose buffers
 * survive. For generation call stack_snapshot_state() before the step: the step's rows and
 * the state it wrote are then checked for the sequences of the snapshot. ctx is the run's: of
 * several layers on a device, the backward of some is run again.
 */
enum status stack_verify(struct stack *stack, const struct context *ctx, int64_t min_rows,
                         uint64_t seed, double *rel_err);
/* Keeps a copy of the states of some sequences (all, if that is cheap) for stack_verify(). */
enum status stack_snapshot_state(struct stack *stack, uint64_t seed);
/* Fills every buffer a run writes with NaN bytes (the caches too in prefill, which writes them). */
enum status stack_poison(struct stack *stack);

#endif
