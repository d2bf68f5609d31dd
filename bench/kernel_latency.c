/*
 * Single operations: every provider of each, on the same tensors. The cases of
 * the paper's preset are those that other libraries publish figures of; the
 * other presets take their lengths from --seq-len.
 */
#include "bench/kernel_bench.h"

static const struct case_row paper[] = {
        {.block = "attention_forward", .seq_len = {4096, 16384, 131072}},
        {.block = "attention_forward", .seq_len = {16384}, .n_heads = 32},
        {.block = "attention_forward", .seq_len = {16384, 131072}, .window = 1024},
        {.block = "attention_forward", .seq_len = {4096, 131072}, .chunk = 16, .groups = 2},
        {.block = "attention_decode", .seq_len = {256, 4096, 16384}},
        {.block = "attention_decode", .seq_len = {131072}, .batch = 16},
        {.block = "rat_scan_forward", .seq_len = {4096, 131072}, .chunk = 16, .groups = 2},
        {.block = "rat_decode", .seq_len = {4096, 131072}, .chunk = 16, .groups = 2},
        {.block = "recurrence_forward", .seq_len = {4096, 131072, 262144}},
        {.block = "gated_recurrence_forward", .seq_len = {4096, 131072, 262144}},
        {.block = "recurrence_step", .seq_len = {1}},
        {.block = "gla_forward", .seq_len = {4096, 131072}, .n_heads = 4},
        {.block = "gla_forward", .seq_len = {4096}, .n_heads = 16, .wide_keys = true},
        {.block = "rwkv6_forward", .seq_len = {4096}, .n_heads = 32},
        {.block = "scalar_decay_forward", .seq_len = {4096}},
        {.block = "retention_forward", .seq_len = {4096}},
        {.block = "linear_attention_forward", .seq_len = {4096}},
        {.block = "gated_delta_forward", .seq_len = {4096}},
        {.block = "gla_step", .seq_len = {1}, .n_heads = 4},
        {.block = "linear", .seq_len = {1}},
        {.block = "linear", .seq_len = {1}, .batch = 512},
        {.block = "norm_linear", .seq_len = {1}},
        {.block = "norm_linear", .seq_len = {1}, .batch = 512},
        {0},
};

static const struct case_row other[] = {
        {.block = "attention_forward"},
        {.block = "attention_forward", .window = 64},
        {.block = "attention_forward", .chunk = 16, .groups = 2},
        {.block = "attention_decode"},
        {.block = "rat_scan_forward", .chunk = 16, .groups = 2},
        {.block = "rat_decode", .chunk = 16, .groups = 2},
        {.block = "recurrence_forward"},
        {.block = "gated_recurrence_forward"},
        {.block = "recurrence_step", .seq_len = {1}},
        {.block = "gla_forward"},
        {.block = "rwkv6_forward"},
        {.block = "scalar_decay_forward"},
        {.block = "retention_forward"},
        {.block = "linear_attention_forward"},
        {.block = "gated_delta_forward"},
        {.block = "gla_step", .seq_len = {1}},
        {.block = "linear", .seq_len = {1}},
        {.block = "norm_linear", .seq_len = {1}},
        {0},
};

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "kernel_latency",
	        .summary = "single operations, every provider of each; d-model is split over the "
	                   "heads",
	        .file = "kernels.csv",
	        .passes = "kernel",
	        .patterns = "attention_forward/attention_decode/rat_scan_forward/rat_decode/"
	                    "recurrence_forward/gated_recurrence_forward/recurrence_step/"
	                    "gla_forward/rwkv6_forward/scalar_decay_forward/retention_forward/"
	                    "linear_attention_forward/gated_delta_forward/gla_step/linear/"
	                    "norm_linear",
	        .axes = "pattern,seq-len,tokens,chunk,window,heads,d-model",
	};

	return kernel_bench_main(&driver, paper, other, argc, argv);
}
