/* What the tests of layers share: a stack with its context, opened in one call, and its tensors as
 * floats. Every function fails the running test on an error. */
#ifndef TESTS_STACKS_H
#define TESTS_STACKS_H

#include "layers/stack.h"

/* A stack allocated on the CPU; not on the (small) program stack of a thread. */
struct fixture {
	struct stack stack;
	struct context ctx;
};

/* cmocka's setup and teardown of a group: opens and closes the CPU backend. */
int stacks_setup(void **state);
int stacks_teardown(void **state);

/* Options of a small stack: D = 48 in 4 heads, L = 6, W = 7, two groups. */
struct stack_options small_options(const char *pattern);

/* Pattern number i: every registered layer by itself, then those of `more`, which ends with NULL;
 * NULL behind the last. So a new layer is tested without a word. */
const char *pattern_at(const char *const *more, int i);

/* Configures, allocates, poisons what runs write, and initializes. `backend` NULL: the CPU. The
 * weights are five times as large as in training, so that scores are not all alike. */
struct fixture *fixture_open(const struct backend *backend, const struct stack_options *options,
                             struct layer_shape shape, uint64_t seed);
void fixture_close(struct fixture *fixture);

/* The pass's run: forward, forward and backward, or a step at the last position. */
void fixture_run(struct fixture *fixture);

/* `count` floats of a buffer from element `first` on, in new memory; and back. */
float *read_floats(const struct fixture *fixture, const void *buffer, int64_t first, int64_t count);
void write_floats(const struct fixture *fixture, void *buffer, int64_t first, const float *values,
                  int64_t count);

/* Copies the parameters of one layer into another of the same shape. */
void copy_parameters(const struct fixture *from, int from_layer, struct fixture *to, int to_layer);

/* ||a - b|| / ||b||; INFINITY unless all is finite. */
double float_error(int64_t count, const float *a, const float *b);

/* `count` normal numbers in new memory. */
float *random_floats(uint64_t seed, int64_t count);

/* Fails unless status is STATUS_OK, with its message. */
void require_ok(enum status status);

#endif
