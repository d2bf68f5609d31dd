/* The passes that are measured, and all that a program has to know of each. */
#ifndef LAYERS_PASS_H
#define LAYERS_PASS_H

#include <stdbool.h>

enum pass { PASS_PREFILL, PASS_TRAIN, PASS_GENERATION, PASS_THROUGHPUT, PASS_KERNEL, PASS_COUNT };

struct pass_info {
	const char *name;  /* in CSV and --pass */
	const char *title; /* of tables */
	bool caches;       /* leaves or reads states */
	bool step;         /* one token of each sequence, at the last position of its state */
	bool models;       /* of whole models, whose batch is found and whose measure is tokens/s */
};

/* Indexed by enum pass. */
extern const struct pass_info passes[PASS_COUNT];

/* "prefill", "train", "generation", "throughput", "kernel". */
const char *pass_name(enum pass pass);

/* The pass called `name`; PASS_COUNT: none is. */
enum pass pass_find(const char *name);

#endif
