/*
 * DeltaNet (arXiv 2406.06484). A short convolution with silu runs over q, k and v, and q and k are
 * taken to length 1 per head; with beta_t = sigmoid(.), one per head,
 *   S_t = S_{t-1} + k_t^T beta_t (v_t - k_t S_{t-1}),   o_t = q_t S_t / sqrt(d),
 * then a per-head norm. InProj's columns are q, k, v (D each), beta (one per head).
 */
#include "layers/linear_family.h"

static const struct family_member delta_net = {
        .decay = DECAY_NONE,
        .input = INPUT_DELTA,
        .output = OUTPUT_NORM,
        .key_part = 1,
        .value_factor = 1,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V},
                   {"b_proj.weight", COLUMN_BETA}},
};

const struct layer_class delta_net_layer = {.name = "delta_net",
                                            .summary = "DeltaNet, the delta rule",
                                            .arguments = FAMILY_ARGUMENTS,
                                            .family = &delta_net,
                                            FAMILY_FUNCTIONS};
