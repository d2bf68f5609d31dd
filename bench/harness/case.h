/* One point of a sweep, and the sweep: every combination of the options' lists. */
#ifndef BENCH_HARNESS_CASE_H
#define BENCH_HARNESS_CASE_H

#include <stdbool.h>
#include <stdint.h>

#include "bench/harness/options.h"
#include "kernels/status.h"

/* A size that a block does not have; an empty field in the CSV. */
enum { NO_VALUE = -1 };

enum { MAX_MESSAGE = 512 };

struct bench_case {
	const char *pass;     /* one of the driver's passes */
	const char *pattern;  /* as --pattern has it */
	const char *position; /* "rope", "none"; "" where a block has no positions */
	const char *model;    /* "1.3B", or "" */
	int64_t batch, seq_len, chunk, window, groups, d_model, n_heads;
	int64_t prompt, generate; /* NO_VALUE but for models */
	/* For the row alone; set by configure. */
	char block[MAX_WORD]; /* "rat", "hybrid", ... */
	int64_t d_head, n_layers;
	int64_t d_k, d_v;    /* of single operations */
	int64_t tokens;      /* that one launch processes */
	int64_t micro_batch; /* sequences of a model that are prefilled at a time */
	/* STATUS_UNSUPPORTED, with the reason, if the combination makes no sense. */
	enum status status;
	char message[MAX_MESSAGE];
};

struct sweep {
	int count;
	struct bench_case *cases;
};

/*
 * Completes a case: sets to NO_VALUE (or "") what does not matter to its block, and fills in
 * block, batch, tokens, d_head, n_layers. STATUS_UNSUPPORTED: the combination makes no sense;
 * STATUS_INVALID: the options are wrong, with one line naming the option.
 */
typedef enum status (*configure_case)(void *self, const struct options *options,
                                      struct bench_case *c);

/*
 * The cartesian product of the options' lists, sequence length innermost;
 * cases that configure makes equal appear once. Strings point into *options.
 * STATUS_INVALID as from configure, or if there are too many cases.
 */
enum status sweep_create(struct sweep *sweep, const struct options *options,
                         configure_case configure, void *self);
void sweep_release(struct sweep *sweep);

/* Whether two cases differ in nothing but sequence length and batch. */
bool case_same_series(const struct bench_case *a, const struct bench_case *b);

#endif
