/* Latency of stacks that interleave blocks, such as RAT and a sliding window. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "hybrid",
	        .summary = "latency of interleaved blocks",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .axes = "pattern,seq-len,tokens,chunk,window,groups,heads,d-model,position",
	        .defaults = {{"pattern", "rat,swa/attention,swa"}},
	};

	return block_main(&driver, argc, argv);
}
