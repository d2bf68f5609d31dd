/*
 * Latency of layers, and of stacks that interleave them, such as RAT and a sliding window. The
 * program of one layer is this one by another name: build/rat is build/hybrid with a pattern.
 */
#include <string.h>

#include "bench/block.h"
#include "bench/stack_case.h"

/* What programs measure where that is not their layer as it is by itself; build/hybrid is first. */
static const struct {
	const char *program, *layers;
	struct option_default defaults[2];
} usual[] = {
        {"hybrid", NULL, {{"pattern", "rat,swa/attention,swa"}}},
        {"attention", "attention,swa", {{"pattern", "attention/swa"}}},
        {"rat", "rat", {{"pattern", "rat"}, {"chunk", "16,64,128"}}},
};

int main(int argc, char **argv)
{
	const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
	const char *name = slash ? slash + 1 : argc > 0 ? argv[0] : "";
	const struct layer_class *class = layer_class_find(name);
	struct driver driver = {
	        .program = class ? name : usual[0].program,
	        .summary = class ? class->summary : "stacks of interleaved layers",
	        .layers = class ? class->name : NULL,
	        .defaults = {class ? (struct option_default){"pattern", class->name}
	                           : usual[0].defaults[0]},
	};

	for (size_t i = 1; class && i < sizeof usual / sizeof usual[0]; i++)
		if (strcmp(usual[i].program, name) == 0) {
			driver.layers = usual[i].layers;
			memcpy(driver.defaults, usual[i].defaults, sizeof usual[i].defaults);
		}
	return block_main(&driver, argc, argv);
}
