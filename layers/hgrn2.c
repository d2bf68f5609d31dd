/*
 * HGRN2 (arXiv 2404.07904): gated linear attention whose key is what the forget gate leaves, S_t =
 * Diag(f_t) S_{t-1} + (1 - f_t)^T v_t, f_t = b + (1 - b) sigmoid(.) with a learned lower bound b
 * per channel (layers/hgrn.c), o_t = silu(q_t) S_t / sqrt(d), then RMSNorm over all channels.
 * InProj's columns are q, v, f (D each).
 */
#include "layers/linear_family.h"

static const struct family_member hgrn2 = {
        .decay = DECAY_DIAGONAL,
        .input = INPUT_FORGET_GATE,
        .output = OUTPUT_NORM,
        .norm_over_all = true,
        .key_part = 1,
        .value_factor = 1,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"i_proj.weight", COLUMN_V},
                   {"f_proj.weight", COLUMN_DECAY}},
};

const struct layer_class hgrn2_layer = {.name = "hgrn2",
                                        .summary = "HGRN2, whose state is a matrix",
                                        .arguments = FAMILY_ARGUMENTS,
                                        .family = &hgrn2,
                                        FAMILY_FUNCTIONS};
