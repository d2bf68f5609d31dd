/*
 * Linear attention: S_t = S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(d), then a per-head norm in
 * place of the normalizer, as in the GLA paper (arXiv 2312.06635, section 2): no feature map, no
 * decay, no gate. InProj's columns are q, k, v (D each).
 */
#include "layers/linear_family.h"

static const struct family_member linear_attention = {
        .decay = DECAY_NONE,
        .input = INPUT_AS_IS,
        .output = OUTPUT_NORM,
        .key_part = 1,
        .value_factor = 1,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V}},
};

const struct layer_class linear_attention_layer = {
        .name = "linear_attention",
        .summary = "linear attention, with a norm for its normalizer",
        .arguments = FAMILY_ARGUMENTS,
        .family = &linear_attention,
        FAMILY_FUNCTIONS};
