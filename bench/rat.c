/* Latency of RAT: a recurrence within chunks, attention between them. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "rat",
	        .summary = "latency of RAT",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "rat",
	        .axes = "seq-len,tokens,chunk,groups,heads,d-model,position",
	        .defaults = {{"pattern", "rat"}, {"chunk", "16,64,128"}},
	};

	return block_main(&driver, argc, argv);
}
