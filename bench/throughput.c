/*
 * Maximum throughput of whole models (the paper's Table 2): prefill of a
 * prompt, then generation at the largest batch whose memory fits.
 */
#include "bench/generate.h"
#include "bench/stack_case.h"

int main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "throughput",
	        .summary = "tokens per second of whole models at the largest batch",
	        .file = "table2.csv",
	        .passes = "throughput",
	        .axes = "pattern,model,layers,vocab,ffn,prompt,generate,memory," ARGUMENT_AXES,
	        .print_help = stack_case_help,
	        .defaults = {{"pattern",
	                      "rat/attention/attention(kv_heads=8|2)/rat,swa/attention,swa"},
	                     {"batch", "0"},
	                     {"case-seconds", "600"}},
	        .finds_batch = true,
	};
	static const struct model models[] = {
	        {"1.3B", 24, 2048, 32000},
	        {"7B", 32, 4096, 32000},
	        {"13B", 40, 5120, 32000},
	        {"tiny", 4, 256, 4096},
	};

	return generate_main(&driver, models, sizeof models / sizeof models[0], argc, argv);
}
