/*
 * The linear-attention family: layers around one recurrence, a matrix S per head or, in HGRN, a
 * vector h over all channels,
 *   S_t = A_t S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t;      h_t = a_t h_{t-1} + v_t,  o_t = h_t,
 * which differ in the decay, in what InProj's output goes through before the recurrence, and in
 * what its output goes through before OutProj. A member is a row of such choices, in a file of its
 * own; layers/linear_family.c runs all of them.
 *
 * The delta rules write v - k S in the place of v (kernels/kernels.h).
 *
 * v, the gate and o are as wide as the member's paper has them: D, or 2 D in RetNet, Mamba-2 and
 * Gated DeltaNet, whose blocks have 8 D^2, 6 D^2 and 8 D^2 parameters where the others have the 4
 * D^2 of attention.
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
	INPUT_CONVOLVED, /* short convolution on q, k, v; time steps make the decays and scale v */
	INPUT_DELTA /* short convolution on q, k, v; q and k to length 1; the delta rule with what
	               it writes of a token, beta, and time steps for decays, if it has these: of
	               a diagonal decay from a low-rank gate */
};

/* Between the recurrence and OutProj. */
enum family_output {
	OUTPUT_NORM,         /* RMSNorm */
	OUTPUT_NORM_GATE,    /* RMSNorm, then times silu(gate) */
	OUTPUT_NORM_SIGMOID, /* RMSNorm, then times sigmoid(low-rank gate) */
	OUTPUT_GATE_NORM     /* plus the skip connection, times silu(gate), then RMSNorm */
};

/* Column blocks of InProj's output, in order; a member leaves out what it has no use for. */
enum family_column {
	COLUMN_Q,
	COLUMN_K,
	COLUMN_V,
	COLUMN_DECAY,
	COLUMN_BETA,
	COLUMN_GATE,
	N_FAMILY_COLUMNS
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
	int64_t value_factor; /* v, the gate and o are value_factor D wide */
	/* In golden files: the names of InProj's rows in the reference's order, and whether values
	 * come before keys in the state. */
	struct {
		const char *name;
		enum family_column column;
	} golden[N_FAMILY_COLUMNS];
	bool golden_values_first;
};

enum status family_check(const struct layer_config *config);
struct layer_widths family_widths(const struct layer_config *config);
int family_parameters(const struct layer_config *config, struct tensor_spec *specs);
int family_state(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs);
int family_saved(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs);
int family_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   struct tensor_spec *specs);
/* Of a sequence, and of a step. */
enum status family_forward(const struct layer_run *run);
enum status family_backward(const struct layer_run *run);
int family_golden_names(const struct layer_config *config, struct golden_name *names);
/* Columns of InProj's output; of v, the gate and o. */
int64_t family_proj_width(const struct layer_config *config);
int64_t family_value_width(const struct layer_config *config);

/* What the classes of all members have in common. */
#define FAMILY_FUNCTIONS                                                                           \
	.check = family_check, .proj_width = family_proj_width, .parameters = family_parameters,   \
	.state = family_state, .saved = family_saved, .scratch = family_scratch,                   \
	.forward = family_forward, .backward = family_backward, .step = family_forward,            \
	.chunk_is_form = true, .mixes = true, .mix_width = family_value_width,                     \
	.golden_names = family_golden_names, .widths = family_widths

#define ARGUMENT_FORM                                                                              \
	ARGUMENT("chunk", chunk, .least = 1, .automatic = true,                                    \
	         .help = "chunk length C of the chunkwise form")
/* What most of them can be told. */
#define FAMILY_ARGUMENTS ((const struct layer_argument[]){ARGUMENT_FORM, ARGUMENT_HEADS, {0}})

#endif
