/* Latency of gated linear attention, which has four heads whatever the width. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "gla",
	        .summary = "latency of gated linear attention",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "gla",
	        .axes = "seq-len,tokens,chunk,heads,d-model",
	        .defaults = {{"pattern", "gla"}, {"heads", "4"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
