/*
 * A layer: its parameters, its state, forward, backward and step. A stack of
 * layers (layers/stack.h) plans the memory; a layer only lists what it needs
 * and runs operations of kernels/kernels.h on it. It knows no backend.
 *
 * All layers are y = x + OutProj(Mix(InProj(RMSNorm(x)))); each is a Mix.
 */
#ifndef LAYERS_LAYER_H
#define LAYERS_LAYER_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/kernels.h"
#include "layers/pass.h"

enum { MAX_TENSORS = 24, MAX_LAYERS = 128, MAX_GOLDEN_NAMES = 32 };

/* Where a parameter's first value comes from. */
enum init {
	INIT_NORMAL, /* normal(0, 0.02) */
	INIT_ONES,
	INIT_ZEROS,
	INIT_GATE_BIAS,  /* log(uniform(1, max(L-1, 1))); L the chunk, for recurrence the training
	                    length */
	INIT_CONV,       /* uniform(-1/2, 1/2): 1/sqrt of the taps */
	INIT_TIME_STEP,  /* softplus of it is exp(uniform(log 0.001, log 0.1)) (Mamba-2) */
	INIT_LOG_RATE,   /* log(uniform(1, 16)) (Mamba-2) */
	INIT_MIX,        /* uniform(0, 1) */
	INIT_LOG_COUNT,  /* log(1), log(2), ... along a row (Mamba) */
	INIT_LRU_RATE,   /* exp(-8 softplus of it) is uniform(0.9, 0.999) (RG-LRU) */
	INIT_LOWER_BOUND /* sigmoid of it is uniform(0.01, 0.9): a layer between the first, whose
	                    bound is near 0, and the last (HGRN) */
};

enum storage { STORAGE_ACTIVATION, STORAGE_FP32 };

/* One tensor that a layer wants. With a dimension of 0 it takes no memory and its pointer is
 * NULL; so an index means the same tensor in every pass. */
struct tensor_spec {
	const char *name;
	enum storage storage;
	int n_dims;
	int64_t dims[4]; /* row-major */
	enum init init;  /* of parameters */
};

/* Rows that a run writes, and a column of parameters. */
static inline struct tensor_spec tensor_rows(const char *name, enum storage storage, int64_t n,
                                             int64_t width)
{
	return (struct tensor_spec){name, storage, 2, {n, width}, INIT_ZEROS};
}

static inline struct tensor_spec tensor_vector(const char *name, int64_t n, enum init init)
{
	return (struct tensor_spec){name, STORAGE_FP32, 1, {n}, init};
}

/* Elements of a tensor. */
int64_t tensor_count(const struct tensor_spec *spec);
/* Its element type on a backend, and its bytes there. */
enum dtype tensor_dtype(const struct tensor_spec *spec, const struct device *device);
size_t tensor_bytes(const struct tensor_spec *spec, const struct device *device);

/* What a golden file (the reference implementations) calls a part of one of our tensors. Entries of
 * the same name follow one another in the reference's tensor. */
struct golden_name {
	const char *name;     /* "q_proj.weight"; of a state "state.s" */
	int tensor;           /* index into the layer's parameters or states */
	int64_t first, count; /* rows of a parameter; of a state columns, its last dimension */
	bool is_state;
	bool transposed; /* the last two dimensions of a state */
	bool beside;     /* of a parameter: entries lie beside one another, not one after another */
};

static inline struct golden_name golden_rows(const char *name, int parameter, int64_t first,
                                             int64_t count)
{
	return (struct golden_name){.name = name, parameter, first, count};
}

static inline struct golden_name golden_columns(const char *name, int state, int64_t first,
                                                int64_t count, bool transposed)
{
	return (struct golden_name){name, state, first, count, true, transposed, false};
}

struct layer_class;

/* One layer of a stack. Filled by stack_configure(); plain data. */
struct layer_config {
	const struct layer_class *class;
	int64_t d_model;
	/* Arguments; 0 where the class has no such one. */
	int64_t n_heads; /* 1 where it has none */
	int64_t chunk;   /* RAT: L; the family: of the chunkwise form; 0: the kernel picks */
	int64_t window;  /* swa, RAT+: W (W+1 keys) */
	int64_t dilation, initial; /* RAT+: every how many tokens, and how many at the start, are
	                              kept */
	int64_t groups;            /* RAT: groups that share q and k */
	/* attention, swa: heads of keys and values, fewer than of queries; 0: as many. */
	int64_t kv_heads;
	int64_t rope; /* 1: rotary positions */

	int64_t ffn_width;      /* hidden width of an ffn; 0: 4 D */
	int64_t train_len;      /* L of the recurrence's gate-bias initialisation */
	bool prenorm, residual; /* true except for golden files of a mixer alone */
	float norm_eps;         /* of the pre-norm: 1e-6 */
};

/*
 * An argument of a class, as a pattern gives it: rat(chunk=16). Parsing, messages, --help and the
 * rows' columns follow from these tables.
 */
struct layer_argument {
	const char *name;         /* NULL ends a list */
	size_t offset;            /* of an int64_t in struct layer_config */
	int64_t fallback, least;  /* the value where nobody gives one; the smallest allowed */
	bool automatic;           /* 0 is allowed as well: the layer or its kernel chooses */
	const char *const *words; /* the two values by name, 0 first; NULL: a number */
	/* Two classes mean the same by an argument's name where this is the same. */
	const char *help;
};

/* The heads of a row: of queries, of keys and values, and their widths; -1: there are none. */
struct layer_widths {
	int64_t heads, kv_heads, d_k, d_v;
};

/* Memory of one layer, in the order of its spec lists. */
struct layer_memory {
	void *param[MAX_TENSORS];
	float *grad[MAX_TENSORS];   /* fp32, shaped as param; training only */
	void *state[MAX_TENSORS];   /* caches; NULL entries if capacity is 0 */
	void *saved[MAX_TENSORS];   /* forward activations */
	void *scratch[MAX_TENSORS]; /* of the backward pass; shared by all layers */
};

/* Saved tensors of every layer: InProj's output, OutProj's input, and what the backward of InProj
 * needs (empty outside training); and the scratch of its backward pass, their gradients. A layer's
 * own follow. One that works in place has its mix, or its dproj, where the other is. */
enum { SAVED_PROJ = 0, SAVED_MIX = 1, SAVED_X_NORM = 2, SAVED_RSTD = 3, SAVED_OTHER = 4 };
enum { SCRATCH_DMIX = 0, SCRATCH_DPROJ = 1, SCRATCH_DX_NORM = 2, SCRATCH_OTHER = 3 };

/* Sizes a layer is planned for. */
struct layer_shape {
	enum pass pass;
	int64_t batch;
	int64_t seq_len;     /* tokens of prefill or training; 1 while generating */
	int64_t capacity;    /* positions the state must be able to hold; 0 (always in training):
	                        no state */
	int64_t micro_batch; /* sequences that a model's prefill takes at a time (its activations
	                        are for these, its caches for batch); 0: all */
};

/* One run of one layer. */
struct layer_run {
	struct context *ctx;
	const struct layer_config *config;
	const struct layer_shape *shape;
	const struct layer_memory *memory;
	const int32_t *position; /* of a step; otherwise NULL */
	int64_t position_hint;
};

static inline int64_t layer_tokens(const struct layer_run *run)
{
	return run->shape->batch * run->shape->seq_len;
}

/* y [N, D] from x [N, D], of a sequence or a step. y must not alias x. */
enum status layer_forward(const struct layer_run *run, const void *x, void *y);
/* dx and every parameter's gradient. dx may alias dy. */
enum status layer_backward(const struct layer_run *run, const void *x, const void *dy, void *dx);

struct family_member;

/* Of softmax attention: which rows of in_proj make queries and keys, in heads of one width; and
 * which state holds keys, [B, H, slots, width]. */
struct score_parts {
	int64_t first_query, n_query, first_key, n_key, width;
	int key_state;
};

struct layer_class {
	const char *name;    /* "attention", "rat", ... as in the CSV */
	const char *summary; /* what it is, in a few words */
	/* A number in a pattern ("rat:16", "swa:1024") sets the first. */
	const struct layer_argument *arguments;
	const struct family_member *family; /* of the linear-attention family, or NULL */
	/* Its chunk is that of a form of the prefill, whose result is the same for all. */
	bool chunk_is_form;
	/* Heads where the user names no number; NULL: as wide as layers/stack.c chooses. */
	int64_t (*default_heads)(int64_t d_model);
	/* NULL: keys and values have as many heads as queries, and D / heads columns each. */
	struct layer_widths (*widths)(const struct layer_config *config);
	bool mixes; /* tokens with one another: all but the ffn */
	/* Parameters that are added to InProj's and OutProj's products; 0: none. */
	int in_bias, out_bias;
	/* Columns P of InProj's output, and M of the tensor that enters OutProj (NULL: D). */
	int64_t (*proj_width)(const struct layer_config *config);
	int64_t (*mix_width)(const struct layer_config *config);

	/* Whether its arguments go together: STATUS_INVALID with one line naming the layer, the
	 * argument and what is allowed. NULL: always. */
	enum status (*check)(const struct layer_config *config);

	/*
	 * The tensors it wants; each returns how many. For temporal-mixing
	 * layers saved[SAVED_PROJ] is the output of InProj [N, P] (q and k
	 * possibly rotated in place) and saved[SAVED_MIX] the input of OutProj [N, M].
	 */
	int (*parameters)(const struct layer_config *config, struct tensor_spec *specs);
	int (*state)(const struct layer_config *config, const struct layer_shape *shape,
	             struct tensor_spec *specs);
	int (*saved)(const struct layer_config *config, const struct layer_shape *shape,
	             struct tensor_spec *specs);
	int (*scratch)(const struct layer_config *config, const struct layer_shape *shape,
	               struct tensor_spec *specs);

	/* Of a layer that mixes tokens before it projects them: saved[SAVED_PROJ] from x, norm
	 * included; and dx from scratch[SCRATCH_DPROJ]. NULL: InProj is one product of the
	 * normalized x. */
	enum status (*in_proj)(const struct layer_run *run, const void *x);
	enum status (*in_proj_backward)(const struct layer_run *run, const void *x, const void *dy,
	                                void *dx);

	/* saved[SAVED_MIX] from saved[SAVED_PROJ]; fills the state if there is one. */
	enum status (*forward)(const struct layer_run *run);
	/* scratch[SCRATCH_DPROJ] from scratch[SCRATCH_DMIX], and its own parameters' gradients. */
	enum status (*backward)(const struct layer_run *run);
	/* The same as forward for one token per sequence, at *position. */
	enum status (*step)(const struct layer_run *run);

	/* Whether steps from `position` on can be run a second time: the first time has overwritten
	 * nothing that they read. NULL: never. */
	bool (*remembers)(const struct layer_config *config, int64_t position);

	/* Where its scores come from, for data that give them a shape. NULL: it has none. */
	struct score_parts (*scores)(const struct layer_config *config);

	/* Names of parameters and states in golden files, into names[MAX_GOLDEN_NAMES]; returns how
	 * many. */
	int (*golden_names)(const struct layer_config *config, struct golden_name *names);
};

/* The list of layers (layers/registry.c); ends with NULL. */
extern const struct layer_class *const layer_classes[];

/* The class called `name`, or NULL. */
const struct layer_class *layer_class_find(const char *name);

/* Arguments that several classes have. */
extern const char *const position_words[];

#define NO_ARGUMENTS ((const struct layer_argument[]){{0}})
#define ARGUMENT(word, field, ...)                                                                 \
	{                                                                                          \
		.name = word, .offset = offsetof(struct layer_config, field), __VA_ARGS__          \
	}
#define ARGUMENT_HEADS ARGUMENT("heads", n_heads, .least = 1, .automatic = true, .help = "heads H")
#define ARGUMENT_POSITION                                                                          \
	ARGUMENT("position", rope, .fallback = 1, .words = position_words,                         \
	         .help = "position encoding of q and k")

/* Every layer: parameter 0 is norm_weight [D] (fp32), parameter 1 in_proj [P, D],
 * parameter 2 out_proj [D, M]; others follow. The ffn's are called fc1 and fc2. */
enum { PARAM_NORM = 0, PARAM_IN_PROJ = 1, PARAM_OUT_PROJ = 2, PARAM_OTHER = 3 };

#endif
