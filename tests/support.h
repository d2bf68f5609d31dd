/*
 * What the tests of operations share: reproducible random numbers, errors
 * that no NaN slips through, and tensors on a backend that lie inside larger
 * ones, are poisoned before they are written, and are guarded all around.
 *
 * A case makes its tensors with trial_... functions, runs an operation, checks
 * each output, and ends with trial_clear(), which also proves that nothing but
 * outputs has changed.
 */
#ifndef TESTS_SUPPORT_H
#define TESTS_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/kernels.h"

/* Random numbers (splitmix64). */
struct random {
	uint64_t state;
};

uint64_t random_bits(struct random *random);
/* Uniform in lo .. hi. */
double random_uniform(struct random *random, double lo, double hi);
double random_normal(struct random *random);
/* An integer, lo <= i <= hi. */
int64_t random_integer(struct random *random, int64_t lo, int64_t hi);
bool random_bool(struct random *random);
/* One of `count` choices. */
int64_t random_choice(struct random *random, const int64_t *choices, int count);
/* count normal numbers times `scale`, in new memory. */
double *random_doubles(struct random *random, int64_t count, double scale);

/* count zeros in new memory; fails the test if there is none. */
double *new_doubles(int64_t count);

/*
 * ||a-b|| / ||b||; INFINITY if either holds a NaN or Inf. Elements that are differences of terms of
 * the size `floor` may all but vanish; ||b|| counts as if its root mean square were at least that
 * (0: no such thing). Two zero arrays differ by 0.
 */
double relative_error(int64_t count, const double *a, const double *b, double floor);
/* The worst row's; a row below a tenth of the root mean square of all is held against that
 * instead: rounding noise in a row that ought to vanish is no error. */
double worst_row_error(int64_t n_rows, int64_t width, const double *a, const double *b,
                       double floor);

/* ||a-b||/||b|| that a kernel may have; a worst row may have ROW_SLACK times that. */
#define TOLERANCE_FP32          2e-5
#define TOLERANCE_BF16          1.5e-2
#define TOLERANCE_BF16_GRADIENT 3e-2
enum { ROW_SLACK = 5 };

/* A tensor [batch, tokens, heads, width] on the backend, inside a larger allocation. */
struct tensor {
	enum dtype dtype;
	int64_t batch, tokens, heads, width;
	struct view view; /* view.data NULL: the tensor is absent */
	double *values;   /* contiguous, as stored; of outputs once they have been checked */
	enum tensor_role { INPUT, OUTPUT, SCRATCH } role;
	char *memory;          /* the allocation, on the device */
	unsigned char *before; /* its bytes as they must remain outside the view */
	size_t bytes;
	int64_t first; /* elements from memory to the view */
	bool in_place; /* held values before it became an output */
	struct tensor *next;
};

/* Where and what is being tested. */
struct trial {
	const struct backend *backend;
	struct context ctx;
	struct random random;
	const char *title; /* the operation under test */
	char label[256];   /* the case under test, for messages */
	bool narrow; /* only shapes that tensor cores like: widths and strides multiples of 8 */
	double tolerance, gradient_tolerance;
	double floor; /* of relative_error(), for the rest of the case */
	/* Some input holds a NaN: outputs are only checked to hold one wherever the reference does.
	 */
	bool with_nan;
	bool nan_pending; /* that input is still to be made */
	double worst;     /* error over tolerance, of all checks so far */
	struct tensor *tensors;
	struct array *arrays;
};

/* Opens the backend called `name`; bf16 tolerances and narrow shapes where it computes in bf16. */
enum status trial_open(struct trial *trial, const char *name);
void trial_close(struct trial *trial);

/* Memory for `count` doubles, NaN, until the case ends. */
double *trial_doubles(struct trial *trial, int64_t count);

/* Begins a case: its random numbers, a number of threads, a label; perhaps with a NaN somewhere. */
void trial_begin(struct trial *trial, uint64_t seed, bool with_nan);
void trial_describe(struct trial *trial, const char *format, ...)
        __attribute__((format(printf, 2, 3)));

/* Sizes of a random case, as the backend likes them. */
int64_t any_length(struct trial *trial, int64_t longest); /* tokens: 1 .. longest */
int64_t any_width(struct trial *trial, int64_t widest);   /* channels */
int64_t any_head(struct trial *trial);                    /* width of a head; even */

/* A [batch, tokens, heads, width] activation with random strides between its rows, holding `scale`
 * times normal numbers. */
struct tensor *trial_input(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                           int64_t width, double scale);
/* The same with given values (contiguous; kept by the caller). */
struct tensor *trial_input_values(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                                  int64_t width, const double *values);
/* The same, each head's rows side by side ([batch][heads][tokens][width]) without gaps. */
struct tensor *trial_by_head_values(struct trial *trial, int64_t batch, int64_t tokens,
                                    int64_t heads, int64_t width, const double *values);
struct tensor *trial_output(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                            int64_t width);
/* Contiguous ones, [rows, width], of any type. */
struct tensor *trial_flat_input(struct trial *trial, enum dtype dtype, int64_t rows, int64_t width,
                                double scale);
struct tensor *trial_flat_values(struct trial *trial, enum dtype dtype, int64_t rows, int64_t width,
                                 const double *values);
struct tensor *trial_flat_output(struct trial *trial, enum dtype dtype, int64_t rows,
                                 int64_t width);
/* Rows `stride` elements apart. */
struct tensor *trial_rows_input(struct trial *trial, int64_t rows, int64_t width, int64_t stride,
                                double scale);
struct tensor *trial_rows_output(struct trial *trial, int64_t rows, int64_t width, int64_t stride);

/* The tensor is written in place (it must be checked; NaN that are expected must be found), or is
 * scratch. */
void trial_expect_written(struct tensor *tensor);
void trial_expect_scratch(struct tensor *tensor);

/* What goes into an argument struct; an absent tensor is NULL. */
static inline struct view view_of(const struct tensor *tensor)
{
	return tensor ? tensor->view : (struct view){0};
}

static inline void *data_of(const struct tensor *tensor)
{
	return tensor ? tensor->view.data : NULL;
}

/* The values of an input, or NULL. */
static inline const double *values_of(const struct tensor *tensor)
{
	return tensor ? tensor->values : NULL;
}

/* Runs the operation with exactly the workspace it asks for, poisoned and guarded. False if no
 * kernel supports the arguments: then the case is to be abandoned. */
bool trial_run(struct trial *trial, enum operation operation, const void *args);

/* Compares an output with `expected` (contiguous) and proves that nothing around it was touched.
 * Afterwards the tensor is an input, with what was computed as its values. */
void trial_check(struct trial *trial, struct tensor *tensor, const char *name,
                 const double *expected, double tolerance);

/* Proves that inputs are as they were, and releases everything. */
void trial_clear(struct trial *trial);

#endif
