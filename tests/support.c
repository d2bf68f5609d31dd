#include "tests/support.h"

#include <math.h>
#include <omp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Bytes of 0xff are NaN in fp32 and bf16, and -1 in int32. */
enum { POISON = 0xff, GUARD_ELEMENTS = 64, MAX_THREADS = 4 };

uint64_t random_bits(struct random *random)
{
	uint64_t z = random->state += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

double random_uniform(struct random *random, double lo, double hi)
{
	return lo + (hi - lo) * ((double)(random_bits(random) >> 11) * 0x1p-53);
}

double random_normal(struct random *random)
{
	double u = random_uniform(random, 1e-12, 1), v = random_uniform(random, 0, 1);

	return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

int64_t random_integer(struct random *random, int64_t lo, int64_t hi)
{
	return lo + (int64_t)(random_bits(random) % (uint64_t)(hi - lo + 1));
}

bool random_bool(struct random *random)
{
	return random_integer(random, 0, 1) == 1;
}

int64_t random_choice(struct random *random, const int64_t *choices, int count)
{
	return choices[random_integer(random, 0, count - 1)];
}

static void *allocate(size_t bytes)
{
	void *memory = calloc(1, bytes ? bytes : 1);

	assert_non_null(memory);
	return memory;
}

double *new_doubles(int64_t count)
{
	return allocate((size_t)count * sizeof(double));
}

double *random_doubles(struct random *random, int64_t count, double scale)
{
	double *values = new_doubles(count);

	for (int64_t i = 0; i < count; i++)
		values[i] = scale * random_normal(random);
	return values;
}

/* An array of a case. */
struct array {
	struct array *next;
	double values[];
};

double *trial_doubles(struct trial *trial, int64_t count)
{
	struct array *array = allocate(sizeof *array + (size_t)count * sizeof(double));

	array->next = trial->arrays;
	trial->arrays = array;
	for (int64_t i = 0; i < count; i++)
		array->values[i] = NAN;
	return array->values;
}

static void free_arrays(struct trial *trial)
{
	while (trial->arrays) {
		struct array *next = trial->arrays->next;

		free(trial->arrays);
		trial->arrays = next;
	}
}

static double norm(int64_t count, const double *a)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += a[i] * a[i];
	return sqrt(sum);
}

static double distance(int64_t count, const double *a, const double *b)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += (a[i] - b[i]) * (a[i] - b[i]);
	return sqrt(sum);
}

/* difference / scale, INFINITY unless both are finite. */
static double quotient(double difference, double scale)
{
	if (!isfinite(difference) || !isfinite(scale))
		return INFINITY;
	return difference == 0 ? 0 : difference / scale;
}

double relative_error(int64_t count, const double *a, const double *b, double floor)
{
	return quotient(distance(count, a, b), fmax(norm(count, b), floor * sqrt((double)count)));
}

double worst_row_error(int64_t n_rows, int64_t width, const double *a, const double *b,
                       double floor)
{
	double typical = norm(n_rows * width, b) / sqrt((double)(n_rows * width)), worst = 0;

	for (int64_t i = 0; i < n_rows; i++)
		worst = fmax(worst, relative_error(width, a + i * width, b + i * width,
		                                   fmax(floor, 0.1 * typical)));
	return worst;
}

static void require(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

enum status trial_open(struct trial *trial, const char *name)
{
	enum status status;

	*trial = (struct trial){.backend = backend_find(name)};
	if (!trial->backend)
		return status_set(STATUS_INVALID, "no backend '%s' in this build", name);
	status = trial->backend->open(0);
	if (status != STATUS_OK)
		return status;
	trial->ctx.backend = trial->backend;
	trial->narrow = trial->backend->activation == DTYPE_BF16;
	trial->tolerance = trial->narrow ? TOLERANCE_BF16 : TOLERANCE_FP32;
	trial->gradient_tolerance = trial->narrow ? TOLERANCE_BF16_GRADIENT : TOLERANCE_FP32;
	return STATUS_OK;
}

void trial_close(struct trial *trial)
{
	trial->backend->close();
}

void trial_describe(struct trial *trial, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(trial->label, sizeof trial->label, format, arguments);
	va_end(arguments);
}

int64_t any_length(struct trial *trial, int64_t longest)
{
	/* One token, a few, or many. */
	switch (random_integer(&trial->random, 0, 5)) {
	case 0:
		return 1;
	case 1:
		return random_integer(&trial->random, 1, longest < 9 ? longest : 9);
	default:
		return random_integer(&trial->random, 1, longest);
	}
}

int64_t any_width(struct trial *trial, int64_t widest)
{
	if (trial->narrow)
		return 8 * random_integer(&trial->random, 1, widest / 8);
	return any_length(trial, widest);
}

int64_t any_head(struct trial *trial)
{
	static const int64_t any[] = {2, 4, 6, 8, 10, 16, 24, 32, 40, 64, 128};
	static const int64_t narrow[] = {64, 128};

	if (trial->narrow)
		return random_choice(&trial->random, narrow, 2);
	return random_choice(&trial->random, any, sizeof any / sizeof *any);
}

static int64_t view_offset(const struct tensor *x, int64_t b, int64_t t, int64_t h)
{
	return x->first + b * x->view.batch + t * x->view.token + h * x->view.head;
}

static int64_t element_count(const struct tensor *x)
{
	return x->batch * x->tokens * x->heads * x->width;
}

/* Calls visit(x, offset in the allocation, index in values) for each element. */
static void for_each_element(struct tensor *x, void *data,
                             void (*visit)(struct tensor *x, void *data, int64_t offset,
                                           int64_t index))
{
	int64_t index = 0;

	for (int64_t b = 0; b < x->batch; b++)
		for (int64_t t = 0; t < x->tokens; t++)
			for (int64_t h = 0; h < x->heads; h++)
				for (int64_t i = 0; i < x->width; i++)
					visit(x, data, view_offset(x, b, t, h) + i, index++);
}

static void set_float(struct tensor *x, void *data, int64_t offset, int64_t index)
{
	((float *)data)[offset] = (float)x->values[index];
}

static void set_int(struct tensor *x, void *data, int64_t offset, int64_t index)
{
	((int32_t *)data)[offset] = (int32_t)x->values[index];
}

static void get_float(struct tensor *x, void *data, int64_t offset, int64_t index)
{
	x->values[index] = ((const float *)data)[offset];
}

static void get_int(struct tensor *x, void *data, int64_t offset, int64_t index)
{
	x->values[index] = ((const int32_t *)data)[offset];
}

/* Writes x->values, poison around them, to the device. */
static void upload_values(struct trial *trial, struct tensor *x)
{
	size_t count = x->bytes / dtype_size(x->dtype);
	void *host = allocate(count * sizeof(float));

	memset(host, POISON, count * sizeof(float));
	if (x->dtype == DTYPE_I32) {
		for_each_element(x, host, set_int);
		require(trial->backend->upload(x->memory, host, x->bytes));
	} else {
		for_each_element(x, host, set_float);
		require(backend_upload_floats(trial->backend, x->dtype, x->memory, host, count));
	}
	free(host);
}

/* Reads x->values back, rounded to their type, and remembers every byte of the allocation. */
static void download_values(struct trial *trial, struct tensor *x)
{
	size_t count = x->bytes / dtype_size(x->dtype);
	void *host = allocate(count * sizeof(float));

	require(trial->backend->synchronize());
	require(trial->backend->download(x->before, x->memory, x->bytes));
	if (x->dtype == DTYPE_I32) {
		memcpy(host, x->before, x->bytes);
		for_each_element(x, host, get_int);
	} else {
		require(backend_download_floats(trial->backend, x->dtype, host, x->memory, count));
		for_each_element(x, host, get_float);
	}
	free(host);
}

/* A tensor of given strides in an allocation with poison before and after it. */
static struct tensor *new_tensor(struct trial *trial, enum dtype dtype, const int64_t shape[4],
                                 int64_t batch_stride, int64_t token_stride, int64_t head_stride)
{
	struct tensor *x = allocate(sizeof *x);
	int64_t last;

	*x = (struct tensor){.dtype = dtype,
	                     .batch = shape[0],
	                     .tokens = shape[1],
	                     .heads = shape[2],
	                     .width = shape[3],
	                     .view = {NULL, batch_stride, token_stride, head_stride},
	                     .first = GUARD_ELEMENTS,
	                     .next = trial->tensors};
	trial->tensors = x;
	last = view_offset(x, x->batch - 1, x->tokens - 1, x->heads - 1) + x->width;
	x->bytes = (size_t)(last + GUARD_ELEMENTS) * dtype_size(dtype);
	x->values = new_doubles(element_count(x));
	x->before = allocate(x->bytes);
	void *memory;
	require(trial->backend->allocate(x->bytes, &memory));
	x->memory = memory;
	x->view.data = x->memory + (size_t)x->first * dtype_size(dtype);
	require(trial->backend->fill(x->memory, POISON, x->bytes));
	require(trial->backend->synchronize());
	memset(x->before, POISON, x->bytes);
	return x;
}

static struct tensor *as_output(struct tensor *x)
{
	x->role = OUTPUT;
	return x;
}

static struct tensor *as_input(struct trial *trial, struct tensor *x, const double *values)
{
	memcpy(x->values, values, (size_t)element_count(x) * sizeof *values);
	upload_values(trial, x);
	download_values(trial, x);
	return x;
}

static struct tensor *as_random(struct trial *trial, struct tensor *x, double scale)
{
	double *values = random_doubles(&trial->random, element_count(x), scale);

	if (trial->nan_pending && random_integer(&trial->random, 0, 2) == 0) {
		values[random_integer(&trial->random, 0, element_count(x) - 1)] = NAN;
		trial->nan_pending = false;
	}
	as_input(trial, x, values);
	free(values);
	return x;
}

/* Nothing, or a few elements (whole 16-byte groups of bf16 for tensor cores). */
static int64_t random_pad(struct trial *trial)
{
	int64_t pad = random_integer(&trial->random, 0, 4);

	return trial->narrow ? 8 * (pad / 2) : pad;
}

/* [batch][tokens][heads] or, now and then, [batch][heads][tokens], with gaps. */
static struct tensor *random_view(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                                  int64_t width)
{
	int64_t shape[4] = {batch, tokens, heads, width};
	int64_t inner = width + random_pad(trial);

	if (random_integer(&trial->random, 0, 3) == 0) {
		int64_t head_stride = tokens * inner + random_pad(trial);

		return new_tensor(trial, trial->backend->activation, shape,
		                  heads * head_stride + random_pad(trial), inner, head_stride);
	}
	int64_t token_stride = heads * inner + random_pad(trial);
	return new_tensor(trial, trial->backend->activation, shape,
	                  tokens * token_stride + random_pad(trial), token_stride, inner);
}

static struct tensor *flat(struct trial *trial, enum dtype dtype, int64_t rows, int64_t width,
                           int64_t stride)
{
	int64_t shape[4] = {1, rows, 1, width};

	return new_tensor(trial, dtype, shape, rows * stride, stride, width);
}

struct tensor *trial_input(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                           int64_t width, double scale)
{
	return as_random(trial, random_view(trial, batch, tokens, heads, width), scale);
}

struct tensor *trial_input_values(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                                  int64_t width, const double *values)
{
	return as_input(trial, random_view(trial, batch, tokens, heads, width), values);
}

struct tensor *trial_by_head_values(struct trial *trial, int64_t batch, int64_t tokens,
                                    int64_t heads, int64_t width, const double *values)
{
	int64_t shape[4] = {batch, tokens, heads, width};

	return as_input(trial,
	                new_tensor(trial, trial->backend->activation, shape, heads * tokens * width,
	                           width, tokens * width),
	                values);
}

struct tensor *trial_output(struct trial *trial, int64_t batch, int64_t tokens, int64_t heads,
                            int64_t width)
{
	return as_output(random_view(trial, batch, tokens, heads, width));
}

struct tensor *trial_flat_input(struct trial *trial, enum dtype dtype, int64_t rows, int64_t width,
                                double scale)
{
	return as_random(trial, flat(trial, dtype, rows, width, width), scale);
}

struct tensor *trial_flat_values(struct trial *trial, enum dtype dtype, int64_t rows, int64_t width,
                                 const double *values)
{
	return as_input(trial, flat(trial, dtype, rows, width, width), values);
}

struct tensor *trial_flat_output(struct trial *trial, enum dtype dtype, int64_t rows, int64_t width)
{
	return as_output(flat(trial, dtype, rows, width, width));
}

struct tensor *trial_rows_input(struct trial *trial, int64_t rows, int64_t width, int64_t stride,
                                double scale)
{
	return as_random(trial, flat(trial, trial->backend->activation, rows, width, stride),
	                 scale);
}

struct tensor *trial_rows_output(struct trial *trial, int64_t rows, int64_t width, int64_t stride)
{
	return as_output(flat(trial, trial->backend->activation, rows, width, stride));
}

void trial_expect_written(struct tensor *tensor)
{
	tensor->role = OUTPUT;
	tensor->in_place = true;
}

void trial_expect_scratch(struct tensor *tensor)
{
	tensor->role = SCRATCH;
}

/* Poisoned workspace of exactly `bytes`, followed by as many guard bytes as one page. */
static void *new_workspace(struct trial *trial, size_t bytes, size_t guard)
{
	void *workspace;

	require(trial->backend->allocate(bytes + guard, &workspace));
	require(trial->backend->fill(workspace, POISON, bytes + guard));
	return workspace;
}

static void check_guard(struct trial *trial, const char *workspace, size_t bytes, size_t guard)
{
	unsigned char *found = allocate(guard);

	require(trial->backend->download(found, workspace + bytes, guard));
	for (size_t i = 0; i < guard; i++)
		if (found[i] != POISON)
			fail_msg("%s, %s: wrote %zu bytes past its workspace of %zu", trial->title,
			         trial->label, i + 1, bytes);
	free(found);
}

bool trial_run(struct trial *trial, enum operation operation, const void *args)
{
	const size_t guard = 4096;
	const struct kernel *kernel = kernel_select(&trial->ctx, operation, args);

	if (!kernel) {
		for (struct tensor *x = trial->tensors; x; x = x->next)
			x->role = INPUT;
		return false;
	}
	size_t bytes = kernel->workspace ? kernel->workspace(args) : 0;
	char *workspace = new_workspace(trial, bytes, guard);
	trial->ctx.workspace = workspace;
	trial->ctx.workspace_bytes = bytes;
	enum status status = kernel_run(&trial->ctx, operation, args);
	if (status == STATUS_OK)
		status = trial->backend->synchronize();
	if (status != STATUS_OK)
		fail_msg("%s, %s: %s", trial->title, trial->label, status_message());
	check_guard(trial, workspace, bytes, guard);
	trial->backend->release(workspace);
	return true;
}

/* Copies one element's bytes from the allocation as it was (data) over those found, so that only
 * what lies outside the view is left to differ. */
static void mask_element(struct tensor *x, void *data, int64_t offset, int64_t index)
{
	size_t size = dtype_size(x->dtype);

	(void)index;
	memcpy((unsigned char *)data + (size_t)offset * size, x->before + (size_t)offset * size,
	       size);
}

/* Fails unless every byte outside the view, or everywhere, is as before. */
static void check_unchanged(struct trial *trial, struct tensor *x, bool everywhere,
                            const char *name)
{
	unsigned char *found = allocate(x->bytes);

	require(trial->backend->download(found, x->memory, x->bytes));
	if (!everywhere)
		for_each_element(x, found, mask_element);
	for (size_t i = 0; i < x->bytes; i++)
		if (found[i] != x->before[i])
			fail_msg("%s, %s: %s: touched element %lld of an allocation whose "
			         "%s begins at %lld",
			         trial->title, trial->label, name,
			         (long long)(i / dtype_size(x->dtype)),
			         everywhere ? "input" : "output", (long long)x->first);
	free(found);
}

/* Both zero where both are NaN. */
static void drop_common_nans(int64_t count, double *a, double *b)
{
	for (int64_t i = 0; i < count; i++)
		if (isnan(a[i]) && isnan(b[i]))
			a[i] = b[i] = 0;
}

/* A kernel may spread a NaN further than the reference, but must not swallow it. */
static void check_nans(struct trial *trial, const struct tensor *tensor, const char *name,
                       const double *expected)
{
	for (int64_t i = 0; i < element_count(tensor); i++)
		if (isnan(expected[i]) && !isnan(tensor->values[i]))
			fail_msg("%s, %s: %s swallows a NaN", trial->title, trial->label, name);
}

void trial_check(struct trial *trial, struct tensor *tensor, const char *name,
                 const double *expected, double tolerance)
{
	int64_t rows = tensor->batch * tensor->tokens * tensor->heads;
	int64_t count = element_count(tensor);
	double *a = trial_doubles(trial, count), *b = trial_doubles(trial, count);

	check_unchanged(trial, tensor, false, name);
	download_values(trial, tensor);
	tensor->role = INPUT;
	if (trial->with_nan) {
		check_nans(trial, tensor, name, expected);
		return;
	}
	memcpy(a, tensor->values, (size_t)count * sizeof *a);
	memcpy(b, expected, (size_t)count * sizeof *b);
	if (tensor->in_place)
		drop_common_nans(count, a, b);
	double error = relative_error(count, a, b, trial->floor);
	double row_error = worst_row_error(rows, tensor->width, a, b, trial->floor);
	if (!(error <= tolerance) || !(row_error <= ROW_SLACK * tolerance))
		fail_msg("%s, %s: %s differs by %.3g, its worst row by %.3g (allowed %.3g, %.3g)",
		         trial->title, trial->label, name, error, row_error, tolerance,
		         ROW_SLACK * tolerance);
	trial->worst = fmax(trial->worst, fmax(error, row_error / ROW_SLACK) / tolerance);
}

/* Releases the newest tensor. */
static void release_tensor(struct trial *trial)
{
	struct tensor *x = trial->tensors;

	trial->tensors = x->next;
	trial->backend->release(x->memory);
	free(x->before);
	free(x->values);
	free(x);
}

void trial_clear(struct trial *trial)
{
	while (trial->tensors) {
		struct tensor *x = trial->tensors;

		if (x->role == OUTPUT)
			fail_msg("%s, %s: the test checks not all outputs", trial->title,
			         trial->label);
		check_unchanged(trial, x, x->role == INPUT, "an unchecked tensor");
		release_tensor(trial);
	}
	free_arrays(trial);
}

void trial_begin(struct trial *trial, uint64_t seed, bool with_nan)
{
	/* What a case that failed has left behind. */
	while (trial->tensors)
		release_tensor(trial);
	free_arrays(trial);
	trial->floor = 0;
	trial->with_nan = trial->nan_pending = with_nan;
	trial->random.state = seed;
	omp_set_num_threads((int)random_integer(&trial->random, 1, MAX_THREADS));
	snprintf(trial->label, sizeof trial->label, "seed %llu", (unsigned long long)seed);
}
