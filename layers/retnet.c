/*
 * RetNet's multi-scale retention (arXiv 2307.08621): S_t = gamma_h S_{t-1} + k_t^T v_t with gamma_h
 * = 1 - 2^(-5-h), o_t = q_t S_t / sqrt(d), q and k rotated by their position, then a per-head norm
 * times silu(gate). InProj's columns are q, k (D each), v, gate (2D each). The rotation is RoPE's,
 * as the paper's without its pairing of neighbours; --position none leaves it out.
 */
#include "layers/linear_family.h"

static const struct family_member retnet = {
        .decay = DECAY_CONSTANT,
        .input = INPUT_ROTATED,
        .output = OUTPUT_NORM_GATE,
        .key_part = 1,
        .value_factor = 2,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V},
                   {"g_proj.weight", COLUMN_GATE}},
};

const struct layer_class retnet_layer = {
        .name = "retnet",
        .summary = "multi-scale retention (RetNet)",
        .arguments =
                (const struct layer_argument[]){
                        ARGUMENT_FORM, ARGUMENT_HEADS, ARGUMENT_POSITION, {0}},
        .family = &retnet,
        FAMILY_FUNCTIONS};
