/*
 * A stack of layers, and a model: embedding, stack, final norm and head. Plans
 * all memory first, then takes it in one piece; runs forward, backward, step.
 *
 * Use: stack_configure (a pattern such as "rat,swa"), stack_plan, compare with
 * what is free, stack_allocate, stack_initialize, then any of the runs.
 *
 * Buffers (x, y, dy, dx, logits, ...) are in the backend's memory; read and write them with
 * device_download_floats(stack->device, stack->device->activation, ...) and its twin.
 */
#ifndef LAYERS_STACK_H
#define LAYERS_STACK_H

#include "kernels/data.h"
#include "kernels/judge.h"
#include "layers/layer.h"

/* What every layer of a stack is made from. */
struct stack_options {
	/* layers/pattern.h; layer i is item i mod count. */
	const char *pattern;
	int64_t n_layers;  /* 0: as many as the pattern names; an ffn does not count */
	bool ffn;          /* an ffn after each layer (models) */
	int64_t ffn_width; /* of its hidden layer; 0: 4 D */
	int64_t vocab;     /* > 0: a model with embedding and head */
	int64_t d_model, train_len;
	/* Of layers that have such an argument and whose item does not say it. Negative, or 0 where
	 * that is not allowed: the class's default, a chunk being no longer than train_len and
	 * groups 1 where they do not divide the heads. Automatic heads: GLA 4, Mamba-2 heads of 64,
	 * others of 128 (64 where D < 1024 or no multiple of 128, 32 where D < 128). */
	int64_t n_heads, kv_heads, chunk, window, groups, rope;
	bool prenorm, residual;
	float norm_eps;
	enum data data; /* what inputs, parameters and caches are like */
};

/* Bytes, by purpose. */
struct memory_plan {
	size_t parameters, gradients, state, saved, scratch, activations, workspace, logits;
	size_t total; /* what stack_allocate takes, alignment included */
};

struct stack_snapshot;

/* Fields below `arena` are for layers/ alone. */
struct stack {
	struct device *device;
	int n_layers; /* ffn layers included */
	int period;   /* of them, after which the pattern begins again */
	struct layer_config layers[MAX_LAYERS];
	int64_t vocab, d_model;
	enum data data;

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
enum status stack_configure(struct stack *stack, struct device *device,
                            const struct stack_options *options);

/* What the stack is: its pattern with every argument but automatic ones ("rat(chunk=16,...),..."),
 * what the first layer that has an argument has for it (-1: none has), the heads of the first
 * layer, all its parameters, and the bytes of state of a sequence of `capacity` tokens, with what
 * each further token adds. The first three are known even if stack_configure() refused. */
void stack_pattern(const struct stack *stack, char *text, size_t size);
int64_t stack_argument(const struct stack *stack, const char *name);
struct layer_widths stack_widths(const struct stack *stack);
int64_t stack_parameters(const struct stack *stack);
int64_t stack_state_bytes(const struct stack *stack, int64_t capacity, double *per_token);

/* Bytes the stack needs for `shape` and the work of one run of shape.pass; takes nothing.
 * STATUS_UNSUPPORTED if a layer or an operation cannot do it, STATUS_OOM if no memory could hold
 * it. `work` may be NULL. */
enum status stack_plan(const struct stack *stack, const struct context *ctx,
                       const struct layer_shape *shape, struct memory_plan *plan,
                       struct kernel_plan *work);

/* The work of one step at `position` of a stack laid out for `shape`. */
enum status stack_plan_step(const struct stack *stack, const struct context *ctx,
                            const struct layer_shape *shape, int64_t position,
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
/* Caches as they are before the first token: zero; *position too. */
enum status stack_empty_state(struct stack *stack);
/* Sets *position on the device. */
enum status stack_set_position(struct stack *stack, int64_t position);
/* Whether the steps from `position` on can be run again after stack_set_position(): true where no
 * layer's state forgets. */
bool stack_remembers(const struct stack *stack, int64_t position);
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

/* What a parameter is; false if there is none. */
bool stack_parameter_spec(const struct stack *stack, int layer, int index,
                          struct tensor_spec *spec);
/* Elements of a parameter (0: there is none). */
int64_t stack_parameter_count(const struct stack *stack, int layer, int index);
enum status stack_set_parameter(struct stack *stack, int layer, int index, const float *values);
enum status stack_get_parameter(const struct stack *stack, int layer, int index, float *values);
enum status stack_get_gradient(const struct stack *stack, int layer, int index, float *values);

/*
 * The same by golden name, row ranges of a parameter: in a stack of one layer
 * "in_proj.weight", of several "layers.0.in_proj.weight", in a model
 * "backbone.layers.0.seq_layer.in_proj.weight", "backbone.layers.0.hidden_layer.fc1.weight",
 * "backbone.ln.weight", "embedding.wte.weight", "head.lm_head.weight". STATUS_INVALID for an
 * unknown name or a count that is not the range's. stack_named_shape: what the name means, with the
 * reference's sizes; false if nothing.
 */
bool stack_named_shape(const struct stack *stack, const char *name, struct tensor_spec *shape);
/* Name number `index` of all that parameters have; false: there are no more. *same_as: the number
 * of the first name of the same rows, `index` itself where this is it. */
bool stack_name_at(const struct stack *stack, int index, char *name, size_t size, int *same_as);
enum status stack_set_named(struct stack *stack, const char *name, const float *values,
                            int64_t count);
enum status stack_get_named(const struct stack *stack, const char *name, float *values,
                            int64_t count);
enum status stack_get_named_gradient(const struct stack *stack, const char *name, float *values,
                                     int64_t count);
/* A state, "state.s", as the reference lays it out. */
enum status stack_get_named_state(const struct stack *stack, const char *name, float *values,
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
 * Verification: how far what each operation of the last run has written is from the fp64 reference
 * on the inputs that the run left it (kernels/check.h), as kernels/judge.h has it. At least
 * `min_rows` rows
 * of each tensor (all, where that is cheap). Of a model the operations whose inputs survive are
 * checked. For generation call stack_snapshot_state() before the step. ctx is the run's. After
 * STATUS_OK status_message() says where the worst is: "dq of attention_backward, a row".
 */
enum status stack_verify(struct stack *stack, const struct context *ctx, int64_t min_rows,
                         uint64_t seed, struct accuracy *found);
/* Keeps states of some sequences (all, if that is cheap) for stack_verify(). */
enum status stack_snapshot_state(struct stack *stack, uint64_t seed);
/* Gives the copy back. */
void stack_forget_snapshot(struct stack *stack);
/* Fills every buffer a run writes with NaN bytes (the caches too in prefill, which writes them). */
enum status stack_poison(struct stack *stack);

#endif
