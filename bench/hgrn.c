/* Latency of HGRN: a vector state. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "hgrn",
	        .summary = "latency of HGRN, whose state is a vector",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "hgrn",
	        .axes = "seq-len,tokens,heads,d-model",
	        .defaults = {{"pattern", "hgrn"}},
	};

	return block_main(&driver, argc, argv);
}
