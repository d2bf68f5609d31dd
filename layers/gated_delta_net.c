/*
 * Gated DeltaNet (arXiv 2412.06464): DeltaNet (layers/delta_net.c) whose state decays first, S <-
 * exp(g_t) S with g_t = -rate softplus(. + bias), one per head as in Mamba-2; its values are 2D
 * wide, and the per-head norm is followed by silu(gate). InProj's columns are q, k (D each), v
 * (2D), the decay, beta (one per head each), the gate (2D).
 */
#include "layers/linear_family.h"

static const struct family_member gated_delta_net = {
        .decay = DECAY_SCALAR,
        .input = INPUT_DELTA,
        .output = OUTPUT_NORM_GATE,
        .key_part = 1,
        .value_factor = 2,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V},
                   {"a_proj.weight", COLUMN_DECAY},
                   {"b_proj.weight", COLUMN_BETA},
                   {"g_proj.weight", COLUMN_GATE}},
};

const struct layer_class gated_delta_net_layer = {
        .name = "gated_delta_net",
        .summary = "Gated DeltaNet, the delta rule with a decay per head",
        .arguments = FAMILY_ARGUMENTS,
        .family = &gated_delta_net,
        FAMILY_FUNCTIONS};
