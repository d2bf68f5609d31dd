/* What the tests of layers share: a stack with its context, opened in one call, and its tensors as
 * floats. Every function fails the running test on an error. */
#ifndef TESTS_STACKS_H
#define TESTS_STACKS_H

#include "layers/stack.h"
#include "tests/test.h"

/* A stack and its context; not on the (small) program stack of a thread. */
struct fixture {
	struct stack stack;
	struct context ctx;
};

/* The CPU, from before the first test until after the last. */
extern struct device *cpu;

/* Options of a small stack: D = 48 in 4 heads, L = 6, W = 7, two groups. */
struct stack_options small_options(const char *pattern);

/* That of a pass over `seq_len` tokens; of a step, to the last of them. */
struct layer_shape shape_of(enum pass pass, int64_t batch, int64_t seq_len);

/* Pattern number i: every registered layer by itself, then those of `more`, which ends with NULL;
 * NULL after the last. So a new layer is tested without a word. */
const char *pattern_at(const char *const *more, int i);

/* The device with some kernels before its own; `first` ends with an entry whose run is NULL. For
 * mutant_free(). */
struct device mutant_of(const struct device *device, const struct kernel *first);
void mutant_free(struct device *mutant);

/* Configures, allocates, poisons what runs write, and initializes. `device` NULL: the CPU. The
 * weights are five times as large as in training, so that scores are not all alike. */
struct fixture *fixture_open(struct device *device, const struct stack_options *options,
                             struct layer_shape shape, uint64_t seed);
void fixture_close(struct fixture *fixture);

/* A fixture that is closed at the end of its scope. */
#define scoped_fixture __attribute__((cleanup(close_scoped)))

static inline void close_scoped(struct fixture **fixture)
{
	fixture_close(*fixture);
}

/* The pass's run: forward, forward and backward, or a step at the last position. */
void fixture_run(struct fixture *fixture);

/* `count` floats of a buffer from element `first` on, in new memory; and back. */
float *read_floats(const struct fixture *fixture, const void *buffer, int64_t first, int64_t count);
void write_floats(const struct fixture *fixture, void *buffer, int64_t first, const float *values,
                  int64_t count);

/* One of a stack's parameters: struct parameter p = NO_PARAMETER; while (next_parameter(f, &p)) ...
 * The model's own are first. */
struct parameter {
	int layer, index;
	int64_t count;
};
#define NO_PARAMETER                                                                               \
	{                                                                                          \
		LAYER_MODEL, -1, 0                                                                 \
	}
bool next_parameter(const struct fixture *fixture, struct parameter *p);
/* Its values, or its gradient, in new memory. */
float *read_parameter(const struct fixture *fixture, const struct parameter *p);
float *read_gradient(const struct fixture *fixture, const struct parameter *p);

/* Copies the parameters of one layer into another of the same shape. */
void copy_parameters(const struct fixture *from, int from_layer, struct fixture *to, int to_layer);

/* ||a - b|| / ||b||; INFINITY unless all is finite. */
double float_error(int64_t count, const float *a, const float *b);
/* The worst row's; a row below a tenth of the root mean square of all is held against that instead:
 * rounding noise in a row that ought to vanish is no error. */
double row_float_error(int64_t n_rows, int64_t width, const float *a, const float *b);
/* Of all parameters' gradients, each as a whole. */
double worst_gradient_error(const struct fixture *a, const struct fixture *b);

/* `count` normal numbers in new memory. */
float *random_floats(uint64_t seed, int64_t count);

#endif
