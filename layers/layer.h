/*
 * A layer: its parameters, its state, forward, backward and step. A stack of
 * layers (layers/stack.h) plans the memory; a layer only lists what it needs
 * and runs operations of kernels/kernels.h on it. It knows no backend.
 *
 * The temporal-mixing layers are y = x + OutProj(Mix(InProj(RMSNorm(x)))).
 */
#ifndef LAYERS_LAYER_H
#define LAYERS_LAYER_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/kernels.h"

enum { MAX_TENSORS = 24, MAX_LAYERS = 128, MAX_GOLDEN_NAMES = 16 };

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

/* Elements of a tensor. */
int64_t tensor_count(const struct tensor_spec *spec);
/* Its element type on a backend, and its bytes there. */
enum dtype tensor_dtype(const struct tensor_spec *spec, const struct backend *backend);
size_t tensor_bytes(const struct tensor_spec *spec, const struct backend *backend);

/* The name a golden file (the reference implementations) gives to rows of one of our parameters. */
struct golden_name {
	const char *name;    /* e.g. "q_proj.weight" */
	int parameter;       /* index into the layer's parameters */
	int64_t row, n_rows; /* of the parameter's first dimension */
};

struct layer_class;

/* One layer of a stack. Filled by stack_configure(); plain data. */
struct layer_config {
	const struct layer_class *class;
	int64_t d_model, n_heads;
	int64_t chunk;  /* RAT: L; GLA: chunk length of the chunkwise form; 0: the kernel picks */
	int64_t window; /* swa: W (W+1 keys) */
	int64_t groups; /* RAT: groups that share q and k */
	int64_t train_len;      /* L of the recurrence's gate-bias initialisation */
	bool rope;              /* --position rope */
	bool prenorm, residual; /* true but for layer_gla's golden file */
	float norm_eps;         /* of the pre-norm: 1e-6 */
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
 * needs (empty outside training). A layer's own follow. */
enum { SAVED_PROJ = 0, SAVED_MIX = 1, SAVED_X_NORM = 2, SAVED_RSTD = 3, SAVED_OTHER = 4 };

enum pass { PASS_PREFILL, PASS_TRAIN, PASS_GENERATION, PASS_THROUGHPUT, PASS_KERNEL };

/* "prefill", "train", "generation", "throughput", "kernel". */
const char *pass_name(enum pass pass);

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

struct family_member;

/* What a run has left of one sequence. */
struct layer_run {
	const struct backend *backend;
	const struct layer_memory *memory;
	int64_t sequence;
};

struct layer_class {
	const char *name; /* "attention", "rat", ... as in the CSV */
	/* Which options matter to it: a subset of "chunk,window,groups,position". A number in a
	 * pattern ("rat:16", "swa:1024") sets the first of them. */
	const char *tunables;
	const struct family_member *family; /* of the linear-attention family, or NULL */
	/* Heads where the user names no number; NULL: as wide as layers/stack.c chooses. */
	int64_t (*default_heads)(int64_t d_model);
	/* Columns M of the tensor that enters OutProj; NULL: D. */
	int64_t (*mix_width)(const struct layer_config *config);

	/* STATUS_INVALID with one line naming the option and what is allowed. */
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

	/* y [N, D] from x [N, D]; fills the state if there is one. y must not alias x. */
	enum status (*forward)(struct context *ctx, const struct layer_config *config,
	                       const struct layer_shape *shape, struct layer_memory *memory,
	                       const void *x, void *y);
	/* dx and every parameter's gradient. dx may alias dy. */
	enum status (*backward)(struct context *ctx, const struct layer_config *config,
	                        const struct layer_shape *shape, struct layer_memory *memory,
	                        const void *x, const void *dy, void *dx);
	/* One token per sequence, at *position; x, y [B, D]. */
	enum status (*step)(struct context *ctx, const struct layer_config *config,
	                    const struct layer_shape *shape, struct layer_memory *memory,
	                    const int32_t *position, int64_t position_hint, const void *x, void *y);

	/*
	 * The fp64 reference, independent of the kernels, on the host; NULL for
	 * layers that mix no tokens. Parameters and states are doubles in the
	 * order and shape of the spec lists.
	 *
	 * reference_anywhere: reference_mix touches doubles only through functions that run
	 * anywhere (kernels/reference/reference.h), so it can be given those of a device.
	 *
	 * reference_mix: rows of the tensor that enters OutProj, from all of
	 * InProj's output. proj [n_seq, T, P] (unrotated), rows: indices into n_seq*T.
	 */
	bool reference_anywhere;
	enum status (*reference_mix)(const struct layer_config *config, const double *const *param,
	                             int64_t n_seq, int64_t seq_len, const double *proj,
	                             int64_t n_rows, const int64_t *rows, double *mix);
	/* The same tensor for one generated token of n_seq sequences. proj [n_seq, P];
	 * state[i] [n_seq, ...] as before the step in, as after it out. */
	enum status (*reference_step)(const struct layer_config *config,
	                              const struct layer_shape *shape, const double *const *param,
	                              int64_t n_seq, int64_t position, const double *proj,
	                              double *const *state, double *mix);
	/* Gradients of sum(dy * y): dproj [N, P] from dmix [N, M]; those of the parameters that act
	 * inside Mix are added to grad[i] (others are left alone), shaped as param[i]. */
	enum status (*reference_mix_backward)(const struct layer_config *config,
	                                      const double *const *param, int64_t batch,
	                                      int64_t seq_len, const double *proj,
	                                      const double *dmix, double *dproj,
	                                      double *const *grad);

	/*
	 * For sequences too long for the host; NULL where there is no such way.
	 * reference_dproj_rows: rows of dproj, [n_rows, P], of one sequence, on the device in use.
	 * Of the run it takes what would need every pair of tokens, which is verified by itself.
	 * summed_columns: the first column of dproj whose sum over the tokens, and its neighbours',
	 * is the gradient of parameter `index`; -1 if it is none.
	 */
	enum status (*reference_dproj_rows)(const struct layer_config *config,
	                                    const double *const *param, const struct layer_run *run,
	                                    int64_t seq_len, const double *proj, const double *dmix,
	                                    int64_t n_rows, const int64_t *rows, double *dproj);
	int64_t (*summed_columns)(const struct layer_config *config, int index);

	/* Names of the parameters in golden files, into names[MAX_GOLDEN_NAMES]; returns how many.
	 */
	int (*golden_names)(const struct layer_config *config, struct golden_name *names);
};

/* The list of layers (layers/registry.c); ends with NULL. */
extern const struct layer_class *const layer_classes[];

/* The class called `name`, or NULL. */
const struct layer_class *layer_class_find(const char *name);

/* Every temporal-mixing layer: parameter 0 is norm_weight [D] (fp32), parameter 1 in_proj [P, D],
 * parameter 2 out_proj [D, M]; others follow. ffn: 0 norm_weight, 1 fc1 [4D, D], 2 fc2 [D, 4D]. */
enum { PARAM_NORM = 0, PARAM_IN_PROJ = 1, PARAM_OUT_PROJ = 2, PARAM_OTHER = 3 };

#endif
