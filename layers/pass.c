#include "layers/pass.h"

#include <string.h>

const struct pass_info passes[PASS_COUNT] = {
        [PASS_PREFILL] = {"prefill", "Prefill (forward, filling the cache)", .caches = true},
        [PASS_TRAIN] = {"train", "Training (forward and backward)"},
        [PASS_GENERATION] = {"generation", "Generation (one step at position T - 1)",
                             .caches = true, .step = true},
        [PASS_THROUGHPUT] = {"throughput", "Whole models (maximum throughput)", .caches = true,
                             .models = true},
        [PASS_KERNEL] = {.name = "kernel", .title = "Single operations"},
};

const char *pass_name(enum pass pass)
{
	return passes[pass].name;
}

enum pass pass_find(const char *name)
{
	enum pass pass = 0;

	while (pass < PASS_COUNT && strcmp(passes[pass].name, name) != 0)
		pass++;
	return pass;
}
