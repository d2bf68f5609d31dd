/* Latency of multi-scale retention. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "retention",
	        .summary = "latency of multi-scale retention (RetNet without its rotation)",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "retention",
	        .axes = "seq-len,tokens,chunk,heads,d-model",
	        .defaults = {{"pattern", "retention"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
