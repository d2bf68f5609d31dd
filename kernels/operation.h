/*
 * What there is to know about an operation, said once: its sizes, its operands and its FLOPs.
 * Bytes, plans, random data, poison, guards, checks, golden files, the benchmark of single
 * operations and the test of all providers follow from this (kernels/problem.h, kernels/check.h).
 *
 * An operation is described in kernels/operations/ by a struct description that is called
 * name_description, as OPERATIONS (kernels/kernels.h) wants it.
 */
#ifndef KERNELS_OPERATION_H
#define KERNELS_OPERATION_H

#include <math.h>

#include "kernels/kernels.h"

enum role {
	ROLE_INPUT,
	ROLE_PARAMETER, /* a weight, bias or the like; read */
	ROLE_STATE,     /* read and written: a cache, a recurrent state */
	ROLE_OUTPUT,
	ROLE_GRADIENT, /* of a parameter: fp32; overwritten, or added to (context.accumulate) */
	ROLE_SCRATCH,
	ROLE_UNREAD /* of a backward: an output of the forward that it has no use for */
};

enum element { ELEMENT_ACTIVATION, ELEMENT_FP32, ELEMENT_INT32 };

/* What a dimension counts. Along every axis except INNER a problem can be cut into parts. */
enum axis {
	AXIS_INNER,
	AXIS_SEQUENCE,
	AXIS_TOKEN,
	AXIS_HEAD,
	AXIS_GROUP,   /* of heads: head h belongs to group h % groups */
	AXIS_KV_HEAD, /* head h belongs to number h / (heads / kv_heads) */
	AXIS_ROW,     /* tokens of all sequences, for operations that do not mix them */
	AXIS_CHANNEL,
	AXIS_IN,  /* columns of a product's input */
	AXIS_OUT, /* columns of its output */
	AXIS_KEY, /* keys, slots of a cache, chunks */
	N_AXES
};

enum draw {
	DRAW_NORMAL,    /* normal(0, scale) */
	DRAW_SCORES,    /* the same; a hard case has scores that overflow a naive exponential */
	DRAW_UNIFORM,   /* uniform in 0 .. scale */
	DRAW_LOG_DECAY, /* logsigmoid(normal(0, 1)) / 16; a hard case has some down to -20 */
	DRAW_UNIT,      /* normal(0, 1), rows scaled to length 1 */
	DRAW_INTEGER    /* uniform in 0 .. scale - 1; of one position: scale - 1 */
};

/* A softmax takes the products of these with one another; position in dimension 1. */
enum side { SIDE_NONE, SIDE_QUERIES, SIDE_KEYS };

enum { MAX_OPERANDS = 32, OPERAND_DIMS = 4 };

struct operand {
	const char *name; /* of the field; further names in golden files after a '|': "out|o" */
	enum role role;
	enum element element;
	void *location;    /* of the pointer in the argument struct */
	struct view *view; /* whose data that is; NULL: a plain pointer */
	int64_t *row;      /* of a plain one: where its rows' stride is kept; NULL: dense */
	int64_t size[OPERAND_DIMS], stride[OPERAND_DIMS]; /* elements, outermost dimension first */
	enum axis axis[OPERAND_DIMS];
	bool optional;     /* may be absent (NULL) whatever else is there */
	bool usual;        /* of an optional one: the benchmark has it */
	bool from_forward; /* of a backward: what the forward has left */
	bool may_share;    /* heads may all read the same rows: a head stride of 0 */
	enum draw draw;
	float scale;
	enum side side;
	const char *alias; /* of an output: the input whose place it may take */
	/* Of an output: between it and the inputs kernels keep everything in fp32. Otherwise they
	 * may round what they multiply to the activations' type. */
	bool exact;
	/* Of an input: what kernels make of it goes into an exponential, in fp32; and that is by
	 * what a state is multiplied, token by token. */
	bool exponent, decay;
	/* Of an fp32 input: kernels round what it is multiplied with, which they made themselves.
	 */
	bool factor;
	/* Of an input: kernels round what they make of it element by element, and no weight of all
	 * its row. */
	bool by_element;
	/* Of an output: kernels make it by summing over the tokens after it. */
	bool summed;
	const char *base; /* of an output: the input that is added to it, and apart from which it is
	                     judged */
	unsigned apart;   /* of an output: axes along which a part of it is what that part of the
	                     problem gives; bits 1 << axis */
	double read, written; /* elements that must be moved */
};

/* Filled by describe(). */
struct operand_list {
	int count;
	struct operand operand[MAX_OPERANDS];
	/* Where the argument struct keeps the size of an axis; NULL: the operation has none. */
	int64_t *extent[N_AXES];
	/* Axes along which outputs can be cut, unless they say otherwise. What lacks one of
	 * SEQUENCE and ROW is a sum over it. */
	unsigned apart;
	/* Sequences can be cut into parts at multiples of so many tokens; 0: they cannot. */
	int64_t token_step;
	bool sums_groups; /* outputs of a group, or of a key head, are sums over its heads */
	/* Options among several: where the argument struct keeps them. */
	int n_options;
	unsigned *options[2];
	/* The first head's number, for what counts heads; NULL: nothing does. */
	int64_t *first_head;
	/* The logarithm of a head's decay, which is the same for all tokens; NULL: there is none.
	 */
	double (*log_decay_of_head)(int64_t head);
};

/* Sizes to choose from; an operation takes those it has. */
struct sizes {
	int64_t batch, seq_len, n_heads, groups, kv_heads, d_head;
	int64_t d_k, d_v, width;   /* of keys and values of a head; of all channels */
	int64_t d_in, d_out, rank; /* of products */
	int64_t chunk, window, vocab;
	bool any; /* options that have no size may be drawn from `bits` */
	uint64_t bits;
};

/* A form that an operation comes in. */
struct operation_form {
	const char *name;   /* in the benchmark of single operations: "gla_forward" */
	const char *golden; /* metadata `op` of golden files, separated by '|', or NULL */
	enum mask mask;
	enum gate_form form;
	enum decay decay;
	enum rule rule;
	enum low_rank low_rank;
	enum curve curve;
	enum norm norm;
	enum shift shift;
	bool half_keys;   /* the benchmark's keys are half as wide as values */
	bool chunks;      /* of RAT: in chunks, with groups of heads */
	int64_t widening; /* products: the benchmark's d_out / d_in; 0: 1 */
};

enum { NO_OPERATION = -1 };

/* An operation with no variants comes in one form, called by its name. */
struct description {
	const char *name;
	size_t args_size;
	int forward;  /* of a backward: the operation whose args are the first member of its own;
	                 else  NO_OPERATION */
	bool is_step; /* one token for each of a batch of sequences */
	const struct operation_form
	        *variants; /* ends with a name of NULL; a backward has its forward's */
	/* Sizes and options of `args`, which is zero; pointers remain NULL. */
	void (*size)(void *args, const struct sizes *sizes, const struct operation_form *variant);
	/* The operands for these sizes and options. A NULL pointer is an absent operand: it is
	 * listed all the same if it may be there. A pointer that must equal another's is set. */
	void (*describe)(void *args, struct operand_list *list);
	/* A multiply-add is 2. Products: 2 N K M forward, twice that backward. Mixing: the
	 * multiply-adds of the recurrence or of the visible pairs alone; backward 2.5 times.
	 * Elementwise: an exponential, logarithm, erf or division being one; backward twice. */
	double (*flops)(const void *args);
};

/* The description of an operation. */
const struct description *operation_describes(enum operation id);

/* The operands of args, which is not written to but through list->extent and operand_set(). */
void operation_describe(enum operation id, void *args, struct operand_list *list);

/* The variants of an operation, a backward's being its forward's; ends with a name of NULL. */
const struct operation_form *operation_forms(enum operation id);
/* A variant's name in the benchmark: "gla_forward", of the backward "gla_backward". */
void form_name(enum operation id, const struct operation_form *variant, char *name, size_t size);

/* ---- operands ---- */

void *operand_data(const struct operand *operand);
/* A dense tensor at `data`, or none; strides where the operation keeps some. */
void operand_set(struct operand *operand, void *data);
/* The same with strides, innermost 1. */
void operand_set_strided(struct operand *operand, void *data, const int64_t stride[OPERAND_DIMS]);
/* The operand of this name, "q" or any after a '|'; NULL if there is none. */
struct operand *operand_find(struct operand_list *list, const char *name);
/* Whether `name` is one of the names of an operand. */
bool operand_is(const struct operand *operand, const char *name);
int64_t operand_count(const struct operand *operand);
enum dtype operand_dtype(const struct operand *operand, const struct device *device);
/* Elements of the span that the operand lies in: the last one's offset, plus 1. */
int64_t operand_span(const struct operand *operand);
bool operand_is_written(const struct operand *operand);
/* Whether it is the position of a step: one integer. */
bool operand_is_position(const struct operand *operand);
bool operand_is_read(const struct operand *operand);

/* ---- for describe() ---- */

struct dimension {
	enum axis axis;
	int64_t size;
};

#define SEQUENCES(n) ((struct dimension){AXIS_SEQUENCE, n})
#define TOKENS(n)    ((struct dimension){AXIS_TOKEN, n})
#define HEADS(n)     ((struct dimension){AXIS_HEAD, n})
#define GROUPS(n)    ((struct dimension){AXIS_GROUP, n})
#define KV_HEADS(n)  ((struct dimension){AXIS_KV_HEAD, n})
#define ROWS(n)      ((struct dimension){AXIS_ROW, n})
#define CHANNELS(n)  ((struct dimension){AXIS_CHANNEL, n})
#define INS(n)       ((struct dimension){AXIS_IN, n})
#define OUTS(n)      ((struct dimension){AXIS_OUT, n})
#define KEYS(n)      ((struct dimension){AXIS_KEY, n})
#define INNER(n)     ((struct dimension){AXIS_INNER, n})
#define ALONG(axis)  (1u << (axis))

/* Adds a [B, T, H, d] view. */
struct operand *add_view(struct operand_list *list, enum role role, const char *name,
                         struct view *view, struct dimension b, struct dimension t,
                         struct dimension h, struct dimension d);
/* Adds a plain pointer, whose address is `location`; unused leading dimensions are INNER(1). */
struct operand *add_array(struct operand_list *list, enum role role, enum element element,
                          const char *name, void *location, struct dimension a, struct dimension b,
                          struct dimension c, struct dimension d);
/* The usual cases of it: rows [n, width], `row` apart (NULL: dense), of activations; a vector. */
struct operand *add_rows(struct operand_list *list, enum role role, const char *name,
                         void *location, int64_t *row, struct dimension n, struct dimension width);
struct operand *add_vector(struct operand_list *list, enum role role, const char *name,
                           void *location, struct dimension n);
/* Dense fp32 [a, b, c]. */
struct operand *add_floats(struct operand_list *list, enum role role, const char *name,
                           void *location, struct dimension a, struct dimension b,
                           struct dimension c);
/* The position of a step, drawn as the last of `capacity`. */
struct operand *add_position(struct operand_list *list, void *location, int64_t capacity);

/* The axis has this extent, and problems can be cut along it. */
static inline void cut_along(struct operand_list *list, enum axis axis, int64_t *extent)
{
	list->extent[axis] = extent;
	list->apart |= ALONG(axis);
}

/* An option of an enum type. */
static inline void add_option(struct operand_list *list, void *option)
{
	list->options[list->n_options++] = (unsigned *)option;
}

/* The usual cuts of what mixes tokens in heads; `groups` may be NULL. */
static inline void cut_heads(struct operand_list *list, int64_t *batch, int64_t *heads,
                             int64_t *groups)
{
	cut_along(list, AXIS_SEQUENCE, batch);
	cut_along(list, AXIS_HEAD, heads);
	if (groups)
		cut_along(list, AXIS_GROUP, groups);
}

/* The same of attention, whose keys and values have heads of their own. */
static inline void cut_kv_heads(struct operand_list *list, int64_t *batch, int64_t *heads,
                                int64_t *groups, int64_t *kv_heads)
{
	cut_heads(list, batch, heads, groups);
	cut_along(list, AXIS_KV_HEAD, kv_heads);
}

/* Drawn from 0 .. scale. */
static inline struct operand *uniform(struct operand *operand, double scale)
{
	operand->draw = DRAW_UNIFORM;
	operand->scale = (float)scale;
	return operand;
}

/* Integers, drawn from 0 .. limit - 1. */
static inline struct operand *integers(struct operand *operand, int64_t limit)
{
	operand->element = ELEMENT_INT32;
	operand->draw = DRAW_INTEGER;
	operand->scale = (float)limit;
	return operand;
}

/* The operand may be absent; `usual`: the benchmark has it. */
static inline struct operand *optional(struct operand *operand, bool usual)
{
	operand->optional = true;
	operand->usual = usual;
	return operand;
}

/* Kernels keep all in fp32 between the inputs and the outputs listed so far. */
static inline void keeps_fp32(struct operand_list *list)
{
	for (int i = 0; i < list->count; i++)
		list->operand[i].exact = true;
}

/* It is the logarithm of a decay. */
static inline struct operand *log_of_decay(struct operand *operand)
{
	operand->exponent = operand->decay = true;
	return operand;
}

/* It goes into an exponential. */
static inline struct operand *exponent(struct operand *operand)
{
	operand->exponent = true;
	return operand;
}

/* What has been listed so far is a forward's, the list a backward's: outputs named in `reads`
 * (separated by '|') are read, the others are not. */
void forward_ends(struct operand_list *list, const char *reads);

/* What queries are multiplied with. */
static inline float key_scale(int64_t d)
{
	return (float)(1 / sqrt((double)d));
}

static inline int64_t divide_up(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

/* The description of `op`, from its functions size_op, describe_op and op_flops. */
#define DESCRIPTION(op, ...) DESCRIBED(op, NO_OPERATION, size_##op, op##_flops, __VA_ARGS__)
#define DESCRIBED(op, forward_of, size_function, flops_function, ...)                              \
	const struct description op##_description = {.name = #op,                                  \
	                                             .args_size = sizeof(struct op##_args),        \
	                                             .forward = forward_of,                        \
	                                             .size = size_function,                        \
	                                             .describe = describe_##op,                    \
	                                             .flops = flops_function,                      \
	                                             __VA_ARGS__}
/* Of the backward of `op`, OP_CONSTANT, sized like it; its FLOPs are `times` as many, or those of
 * op_backward_flops. */
#define BACKWARD(op, CONSTANT, times)                                                              \
	static double op##_backward_flops(const void *args)                                        \
	{                                                                                          \
		return (times)*op##_flops(args);                                                   \
	}                                                                                          \
	BACKWARD_OF(op, CONSTANT, size_##op)
#define BACKWARD_OF(op, CONSTANT, size_function)                                                   \
	DESCRIBED(op##_backward, OP_##CONSTANT, size_function, op##_backward_flops)

#define X(constant, name) extern const struct description name##_description;
OPERATIONS(X)
#undef X

#endif
