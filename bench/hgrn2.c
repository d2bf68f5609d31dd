/* Latency of HGRN2: HGRN's gates, a matrix state. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "hgrn2",
	        .summary = "latency of HGRN2, whose state is a matrix",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "hgrn2",
	        .axes = "seq-len,tokens,chunk,heads,d-model",
	        .defaults = {{"pattern", "hgrn2"}, {"chunk", "64"}},
	};

	return block_main(&driver, argc, argv);
}
