/* Latency of Mamba-2's block, of inner width D. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "mamba2",
	        .summary = "latency of Mamba-2, of inner width D",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "mamba2",
	        .axes = "seq-len,tokens,chunk,heads,d-model",
	        .defaults = {{"pattern", "mamba2"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
