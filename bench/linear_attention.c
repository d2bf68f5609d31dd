/* Latency of linear attention. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "linear_attention",
	        .summary = "latency of linear attention, with a norm for its normalizer",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "linear_attention",
	        .axes = "seq-len,tokens,chunk,heads,d-model",
	        .defaults = {{"pattern", "linear_attention"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
