/* Latency of softmax attention: over all tokens, and in a sliding window (swa). */
#include "bench/block.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "attention",
	        .summary = "latency of causal and of sliding-window attention",
	        .file = "latency.csv",
	        .passes = "prefill,train,generation",
	        .patterns = "attention/swa",
	        .axes = "pattern,seq-len,tokens,window,heads,d-model,position",
	        .defaults = {{"pattern", "attention/swa"}},
	};

	return block_main(&driver, argc, argv);
}
