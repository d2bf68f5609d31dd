/*
 * Gated linear attention (arXiv 2312.06635): S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t with log alpha
 * = logsigmoid(low-rank gate) / 16, o_t = q_t S_t / sqrt(d_k), then a per-head norm times
 * silu(output gate). InProj's columns are q, k (D/2 each), v (D), the gate's low-rank input (16),
 * the output gate (D).
 */
#include "layers/linear_family.h"

static const struct family_member gla = {
        .decay = DECAY_DIAGONAL,
        .input = INPUT_DECAY_GATE,
        .output = OUTPUT_NORM_GATE,
        .key_part = 2,
        .value_factor = 1,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V},
                   {"gk_proj.0.weight", COLUMN_DECAY},
                   {"g_proj.weight", COLUMN_GATE}},
};

static int64_t four_heads(int64_t d_model)
{
	return 4;
}

const struct layer_class gla_layer = {.name = "gla",
                                      .summary = "gated linear attention",
                                      .arguments = FAMILY_ARGUMENTS,
                                      .family = &gla,
                                      .default_heads = four_heads,
                                      FAMILY_FUNCTIONS};
