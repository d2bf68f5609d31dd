/*
 * Kimi Delta Attention (arXiv 2510.26692): DeltaNet (layers/delta_net.c) whose state decays first,
 * channel by channel, S <- Diag(exp(g_t)) S with g_t = -rate softplus(low-rank gate + bias), a rate
 * per head; and a per-head norm, times sigmoid(low-rank output gate). The gates' rank is a head's
 * width. InProj's columns are q, k, v (D each), the decay's low-rank input (d), beta (one per
 * head), the output gate's (d).
 */
#include "layers/linear_family.h"

static const struct family_member kda = {
        .decay = DECAY_DIAGONAL,
        .input = INPUT_DELTA,
        .output = OUTPUT_NORM_SIGMOID,
        .key_part = 1,
        .value_factor = 1,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V},
                   {"f_proj.0.weight", COLUMN_DECAY},
                   {"b_proj.weight", COLUMN_BETA},
                   {"g_proj.0.weight", COLUMN_GATE}},
};

const struct layer_class kda_layer = {
        .name = "kda",
        .summary = "Kimi Delta Attention, the delta rule with a decay per channel",
        .arguments = FAMILY_ARGUMENTS,
        .family = &kda,
        FAMILY_FUNCTIONS};
