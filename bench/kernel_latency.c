/*
 * Single operations: every provider of each, on the same tensors. The cases of
 * the paper's preset are those that other libraries publish figures of; the
 * other presets take their lengths from --seq-len. Attention comes with every kind of data.
 */
#include "bench/kernel_bench.h"

static const struct case_row paper[] = {
        {.block = "attention_forward", .seq_len = {4096, 16384, 131072}, .every_data = true},
        {.block = "attention_forward", .seq_len = {16384}, .n_heads = 32, .every_data = true},
        {.block = "attention_forward",
         .seq_len = {16384, 131072},
         .window = 1024,
         .every_data = true},
        {.block = "attention_forward", .seq_len = {4096, 131072}, .chunk = 16, .every_data = true},
        {.block = "attention_forward", .seq_len = {16384}, .kv_heads = 8},
        {.block = "attention_forward", .seq_len = {16384}, .kv_heads = 2},
        {.block = "attention_backward", .seq_len = {4096, 16384, 131072}, .every_data = true},
        {.block = "attention_backward", .seq_len = {16384}, .kv_heads = 8},
        {.block = "attention_backward", .seq_len = {16384}, .kv_heads = 2},
        {.block = "attention_backward", .seq_len = {4096, 131072}, .chunk = 16, .every_data = true},
        {.block = "attention_decode", .seq_len = {256, 4096, 16384}, .every_data = true},
        {.block = "attention_decode", .seq_len = {131072}, .batch = 16},
        {.block = "attention_decode", .seq_len = {4096, 16384}, .kv_heads = 8},
        {.block = "attention_decode", .seq_len = {4096, 16384}, .kv_heads = 2},
        {.block = "rat_scan_forward", .seq_len = {4096, 131072}, .chunk = 16},
        {.block = "rat_decode", .seq_len = {4096, 131072}, .chunk = 16, .every_data = true},
        {.block = "recurrence_forward", .seq_len = {4096, 131072, 262144}},
        {.block = "gated_recurrence_forward", .seq_len = {4096, 131072, 262144}},
        {.block = "recurrence_step"},
        {.block = "gla_forward", .seq_len = {4096, 131072}, .n_heads = 4},
        {.block = "gla_forward", .seq_len = {4096}, .n_heads = 16, .wide_keys = true},
        {.block = "rwkv6_forward", .seq_len = {4096}, .n_heads = 32},
        {.block = "scalar_decay_forward", .seq_len = {4096}},
        {.block = "retention_forward", .seq_len = {4096}},
        {.block = "linear_attention_forward", .seq_len = {4096}},
        {.block = "gated_delta_forward", .seq_len = {4096}},
        {.block = "gla_step", .n_heads = 4},
        {.block = "linear"},
        {.block = "linear", .batch = 512},
        {.block = "norm_linear"},
        {.block = "norm_linear", .batch = 512},
        {0},
};

/* At other sizes every operation as it comes, and attention with RAT's chunks, in a window, and
 * with one head of keys for all. */
static const struct case_row other[] = {
        {.block = "attention_forward", .every_data = true},
        {.block = "attention_forward", .window = 64},
        {.block = "attention_forward", .chunk = 16},
        {.block = "attention_forward", .kv_heads = 1},
        {.block = "attention_backward", .every_data = true},
        {.block = "attention_backward", .window = 64},
        {.block = "attention_backward", .chunk = 16},
        {.block = "attention_backward", .kv_heads = 1},
        {.block = "attention_decode", .every_data = true},
        {.block = "attention_decode", .kv_heads = 1},
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
	        .axes = "pattern,seq-len,tokens,chunk,window,heads,d-model",
	};

	return kernel_bench_main(&driver, paper, other, true, argc, argv);
}
