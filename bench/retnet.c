/* Latency of RetNet's multi-scale retention. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "retnet",
	        .summary = "latency of multi-scale retention (RetNet)",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "retnet/retention",
	        .axes = "seq-len,tokens,chunk,position,heads,d-model",
	        .defaults = {{"pattern", "retnet"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
