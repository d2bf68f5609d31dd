/* One point of a sweep, and the sweep: every combination of the options' lists. */
#ifndef BENCH_HARNESS_CASE_H
#define BENCH_HARNESS_CASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bench/harness/options.h"
#include "kernels/data.h"
#include "kernels/status.h"
#include "layers/pass.h"

/* A size that a block does not have; an empty field in the CSV. */
enum { NO_VALUE = -1 };

/* A pattern of as many layers as there may be, each with all its arguments. */
enum { MAX_MESSAGE = 512, MAX_PATTERN_TEXT = 2560 };

/* Sizes that a case and its row have. The first line is what a program is asked for, the rest what
 * configure makes of that; micro_batch: sequences of a model that are prefilled at a time. */
/* clang-format off */
#define CASE_SIZES(X) \
	X(batch) X(seq_len) X(chunk) X(window) X(groups) X(kv_heads) X(d_model) X(n_heads) X(prompt) \
	X(generate) X(d_head) X(n_layers) X(d_k) X(d_v) X(parameters) X(state_bytes_per_sequence) \
	X(micro_batch)
/* clang-format on */

struct bench_case {
	enum pass pass;
	/* As --pattern has it; after configure with all arguments that are not automatic. */
	char pattern[MAX_PATTERN_TEXT];
	const char *position; /* "rope", "none"; "" where a block has no positions */
	const char *model;    /* "1.3B", or "" */
	enum data data;
#define CASE_SIZE(name) int64_t name;
	CASE_SIZES(CASE_SIZE)
	bool is_baseline; /* its pattern is the one that ratios are relative to */
	/* For the row alone; set by configure. */
	char block[MAX_WORD]; /* "rat", "hybrid", ... */
	double state_bytes_per_token;
	int64_t tokens; /* that one launch processes */
	/* STATUS_UNSUPPORTED, with the reason, if the combination is impossible. */
	enum status status;
	char message[MAX_MESSAGE];
};

/* A case that says nothing yet. */
struct bench_case case_empty(void);

struct sweep {
	int count;
	struct bench_case *cases;
};

/*
 * Completes a case: sets to NO_VALUE (or "") what does not matter to its block, and fills in the
 * rest. STATUS_INVALID, STATUS_UNSUPPORTED: the combination is impossible, with one line that says
 * why.
 */
typedef enum status (*configure_case)(void *self, const struct options *options,
                                      struct bench_case *c);

/*
 * The cartesian product of the options' lists, sequence length innermost;
 * cases that configure makes equal appear once. Strings point into *options.
 * Impossible cases remain, with their status; if there are only such, or too
 * many cases, STATUS_INVALID.
 */
enum status sweep_create(struct sweep *sweep, const struct options *options,
                         configure_case configure, void *self);
/* STATUS_INVALID if no case of a sweep is possible, for the reason of the first. */
enum status sweep_expect_possible(const struct sweep *sweep);
void sweep_release(struct sweep *sweep);

/* A pattern without arguments in parentheses: "rat(chunk=16),swa" is "rat,swa"; `separator`
 * instead of the commas. */
void pattern_names(const char *pattern, char separator, char *text, size_t size);

/* Whether two cases differ in nothing but sequence length and batch. */
bool case_same_series(const struct bench_case *a, const struct bench_case *b);

#endif
