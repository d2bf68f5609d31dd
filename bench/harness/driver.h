/* What a benchmark program says about itself: the options that matter to it and their defaults. */
#ifndef BENCH_HARNESS_DRIVER_H
#define BENCH_HARNESS_DRIVER_H

#include <stdbool.h>
#include <stdio.h>

enum { MAX_DEFAULTS = 12 };

/* The value of an option where neither the user nor anything more specific gives one. */
struct option_default {
	const char *name, *value; /* the option's name without dashes; NULL ends a list */
};

struct driver {
	const char *program; /* "rat" */
	const char *summary; /* one line for --help */
	const char *file;    /* rows go to runs/<device>/<file> */
	const char *passes;  /* "prefill,train,generation": those it can do */
	/* Patterns that --pattern may name, separated by slashes; NULL: any. */
	const char *patterns;
	/* Of programs that measure layers: the layer that patterns consist of, one alone, or those,
	 * separated by commas; NULL: stacks of any. */
	const char *layers;
	/* Adds to --help and --list; or NULL. */
	void (*print_help)(FILE *file);
	/* Optional options that matter here: of "pattern,seq-len,tokens,chunk,window,groups,heads,
	 * d-model,position,model,prompt,generate". */
	const char *axes;
	/* Before the preset's. */
	struct option_default defaults[MAX_DEFAULTS];
	/* The batch is found by planning memory, so rows are the same case whatever it was. */
	bool finds_batch;
};

#endif
