/*
 * HGRN (arXiv 2311.04823), with real states as in HGRN2's code: h_t = f_t h_{t-1} + (1 - f_t)
 * silu(i_t), f_t = b + (1 - b) sigmoid(.) with a learned lower bound b per channel, then RMSNorm(h)
 * times silu(gate). InProj's columns are i, f, gate (D each). The paper makes a layer's bound of
 * its depth's share in a softmax over all layers; one layer alone has its own.
 */
#include "layers/linear_family.h"

static const struct family_member hgrn = {
        .decay = DECAY_DIAGONAL,
        .input = INPUT_FORGET_GATE,
        .output = OUTPUT_NORM_GATE,
        .vector_state = true,
        .norm_over_all = true,
        .key_part = 1,
        .value_factor = 1,
        .golden = {{"i_proj.weight", COLUMN_V},
                   {"f_proj.weight", COLUMN_DECAY},
                   {"g_proj.weight", COLUMN_GATE}},
};

const struct layer_class hgrn_layer = {.name = "hgrn",
                                       .summary = "HGRN, whose state is a vector",
                                       .arguments = NO_ARGUMENTS,
                                       .family = &hgrn,
                                       FAMILY_FUNCTIONS};
