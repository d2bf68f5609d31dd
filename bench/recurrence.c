/* Latency of the gated linear recurrence, the paper's RNN. */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "recurrence",
	        .summary = "latency of the gated linear recurrence",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "recurrence",
	        .axes = "seq-len,tokens,d-model",
	        .defaults = {{"pattern", "recurrence"}},
	};

	return block_main(&driver, argc, argv);
}
