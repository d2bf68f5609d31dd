/*
 * The linear-attention family: layers around one recurrence, a matrix S per head or, in HGRN, a
 * vector h over all channels,
 *   S_t = A_t S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t;      h_t = a_t h_{t-1} + v_t,  o_t = h_t,
 * which differ in the decay, in what InProj's output goes through before the recurrence, and in
 * what its output goes through before OutProj. A member is a row of such choices, in a file of its
 * own; layers/linear_family.c runs and verifies all of them.
 *
 * v, the gate and o are as wide as the member's paper has them: D, or 2 D in RetNet and Mamba-2,
 * whose blocks have 8 D^2 and 6 D^2 parameters where the others have the 4 D^2 of attention.
 */
#ifndef LAYERS_LINEAR_FAMILY_H
#define LAYERS_LINEAR_FAMILY_H

#include "layers/layer.h"

/* Between InProj and the recurrence. */
enum family_input {
	INPUT_AS_IS,       /* q, k, v are InProj's */
	INPUT_ROTATED,     /* RoPE on q and k */
	INPUT_DECAY_GATE,  /* a low-rank gate makes the decays */
	INPUT_FORGET_GATE, /* the forget gate makes the decays, and k = 1 - f or, of a vector state,
	                      v = (1 - f) silu(v); silu on q */
	INPUT_CONVOLVED /* short convolution on q, k, v; time steps make the decays and scale v */
};

/* Between the recurrence and OutProj. */
enum family_output {
	OUTPUT_NORM,      /* RMSNorm */
	OUTPUT_NORM_GATE, /* RMSNorm, then times silu(gate) */
	OUTPUT_GATE_NORM  /* plus the skip connection, times silu(gate), then RMSNorm */
};

struct family_member {
	enum decay decay;
	enum family_input input;
	enum family_output output;
	bool vector_state;
	bool unscaled;      /* scale 1, not d_k^-1/2 */
	bool norm_over_all; /* one norm over all channels, not one per head */
	/* q and k: one head of shared_keys columns that all heads read, or else D / key_part
	 * columns that the heads divide. */
	int64_t key_part, shared_keys;
	int64_t value_factor;   /* v, the gate and o are value_factor D wide */
	const char *decay_name; /* of InProj's rows that the decay is made of, in golden files */
};

enum status family_check(const struct layer_config *config);
int family_parameters(const struct layer_config *config, struct tensor_spec *specs);
int family_state(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs);
int family_saved(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs);
int family_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   struct tensor_spec *specs);
enum status family_forward(struct context *ctx, const struct layer_config *config,
                           const struct layer_shape *shape, struct layer_memory *memory,
                           const void *x, void *y);
enum status family_backward(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const void *x, const void *dy, void *dx);
enum status family_step(struct context *ctx, const struct layer_config *config,
                        const struct layer_shape *shape, struct layer_memory *memory,
                        const int32_t *position, int64_t position_hint, const void *x, void *y);
int family_golden_names(const struct layer_config *config, struct golden_name *names);
/* Columns of v, the gate and o. */
int64_t family_value_width(const struct layer_config *config);

/* layers/linear_reference.c */
enum status family_reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix);
enum status family_reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix);
enum status family_reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad);

/* What the classes of all members have in common. */
#define FAMILY_FUNCTIONS                                                                           \
	.check = family_check, .parameters = family_parameters, .state = family_state,             \
	.saved = family_saved, .scratch = family_scratch, .forward = family_forward,               \
	.backward = family_backward, .step = family_step, .reference_anywhere = true,              \
	.reference_mix = family_reference_mix, .reference_step = family_reference_step,            \
	.reference_mix_backward = family_reference_mix_backward, .mix_width = family_value_width,  \
	.golden_names = family_golden_names

/* ---- for linear_family.c and linear_reference.c alone ---- */

/* Column blocks of InProj's output, in order; a member leaves out what it has no use for. */
enum family_column { COLUMN_Q, COLUMN_K, COLUMN_V, COLUMN_DECAY, COLUMN_GATE, N_FAMILY_COLUMNS };

enum {
	PARAM_OUT_NORM = PARAM_OTHER,
	PARAM_GK_WEIGHT, /* INPUT_DECAY_GATE */
	PARAM_GK_BIAS,
	PARAM_BOUND,       /* INPUT_FORGET_GATE: the gates' lower bounds, logits */
	PARAM_CONV_WEIGHT, /* INPUT_CONVOLVED */
	PARAM_CONV_BIAS,
	PARAM_DT_BIAS,
	PARAM_LOG_RATE,
	PARAM_SKIP, /* OUTPUT_GATE_NORM */
	N_FAMILY_PARAMS
};

/* STATE_CONV only behind INPUT_CONVOLVED. */
enum { STATE_S, STATE_CONV, N_FAMILY_STATES };

enum { GATE_RANK = 16, GATE_NORMALIZER = 16 };
static const float family_norm_eps = 1e-5f;

static inline const struct family_member *family_member(const struct layer_config *config)
{
	return config->class->family;
}

int64_t family_column_width(const struct layer_config *config, enum family_column column);
int64_t family_first_column(const struct layer_config *config, enum family_column column);
/* All of InProj's columns. */
int64_t family_proj_width(const struct layer_config *config);
/* Of one head. */
int64_t family_key_width(const struct layer_config *config);
/* Elements of log_decay per token. */
int64_t family_decay_width(const struct layer_config *config);
/* Columns that the short convolution takes: q, k, v. */
int64_t family_conv_width(const struct layer_config *config);
/* Parts of a row of o that are normalized each by itself. */
int64_t family_norm_groups(const struct layer_config *config);

#endif
