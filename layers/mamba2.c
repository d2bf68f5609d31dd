/*
 * Mamba-2 (arXiv 2405.21060, section 7). A short convolution with silu runs over C, B and x; then,
 * with dt = softplus(. + bias) and a rate per head,
 *   S_t = exp(-rate dt_t) S_{t-1} + B_t^T (dt_t x_t),   o_t = C_t S_t + skip x_t,
 * and RMSNorm(o silu(z)) over all channels. C is the family's q and B its k, 128 wide and shared by
 * the heads; x is its v, z its gate, both 2D wide, in heads of 64. InProj's columns are C, B, x, dt
 * (one per head), z.
 */
#include "layers/linear_family.h"

static const struct family_member mamba2 = {
        .decay = DECAY_SCALAR,
        .input = INPUT_CONVOLVED,
        .output = OUTPUT_GATE_NORM,
        .unscaled = true,
        .norm_over_all = true,
        .shared_keys = 128,
        .value_factor = 2,
        .golden = {{"in_proj.weight", COLUMN_GATE},
                   {"in_proj.weight", COLUMN_V},
                   {"in_proj.weight", COLUMN_K},
                   {"in_proj.weight", COLUMN_Q},
                   {"in_proj.weight", COLUMN_DECAY}},
        .golden_values_first = true,
};

static int64_t heads_of_64(int64_t d_model)
{
	return d_model % 32 == 0 ? d_model / 32 : 1;
}

const struct layer_class mamba2_layer = {.name = "mamba2",
                                         .summary = "Mamba-2",
                                         .arguments = FAMILY_ARGUMENTS,
                                         .family = &mamba2,
                                         .default_heads = heads_of_64,
                                         FAMILY_FUNCTIONS};
