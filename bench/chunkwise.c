/* Linear attention in chunks, by products alone and by fused kernels, against softmax attention:
 * how long a sequence must be before it pays. */
#include "bench/kernel_bench.h"

static const struct case_row paper[] = {
        {.block = "attention_forward",
         .seq_len = {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}},
        {.block = "linear_attention_forward",
         .seq_len = {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536},
         .chunk = 64},
        {.block = "linear_attention_forward",
         .seq_len = {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536},
         .chunk = 128},
        {0},
};

static const struct case_row other[] = {
        {.block = "attention_forward"},
        {.block = "linear_attention_forward", .chunk = 64},
        {.block = "linear_attention_forward", .chunk = 128},
        {0},
};

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "chunkwise",
	        .summary = "linear attention in chunks against attention, every provider of both",
	        .file = "chunkwise.csv",
	        .passes = "kernel",
	        .patterns = "attention_forward/linear_attention_forward",
	        .axes = "pattern,seq-len,tokens,chunk,heads,d-model",
	};

	return kernel_bench_main(&driver, paper, other, false, argc, argv);
}
