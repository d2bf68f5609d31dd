/* Latency of Mamba-2's block, whose heads are 64 wide whatever the width. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "mamba2",
	        .summary = "latency of Mamba-2",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "mamba2",
	        .axes = "seq-len,tokens,chunk,heads,d-model",
	        .defaults = {{"pattern", "mamba2"}, {"heads", "0"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
