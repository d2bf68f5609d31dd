/*
 * A million tokens of the matrix recurrence, by every kernel that takes them, against the fp64
 * reference at rows from the first to the last: nothing drifts. In one head some channels
 * remember a million tokens and others ten, and now and then a token wipes a channel out.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/reference/reference.h"
#include "layers/noise.h"

enum { TOKENS = (1 << 20) - 7, WIDTH = 64, COUNT = TOKENS * WIDTH };

static const int64_t rows[] = {0,          63,          64,         TOKENS / 16,
                               TOKENS / 2, TOKENS - 65, TOKENS - 2, TOKENS - 1};

enum { N_ROWS = sizeof rows / sizeof *rows };

static const double tolerance = 1.5e-2;

static void require(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

static void *device_memory(size_t bytes)
{
	void *memory;

	require(cuda_backend.allocate(bytes ? bytes : 1, &memory));
	return memory;
}

/* A tensor [1, TOKENS, 1, width], on the device and, as it was rounded there, here. */
struct tensor {
	void *data;
	double *values;
};

static struct tensor new_tensor(const float *values, int64_t width)
{
	const size_t count = (size_t)(TOKENS * width);
	float *rounded = malloc(count * sizeof *rounded);
	struct tensor t = {device_memory(count * 2), malloc(count * sizeof(double))};

	assert_true(rounded && t.values);
	require(backend_upload_floats(&cuda_backend, DTYPE_BF16, t.data, values, count));
	require(backend_download_floats(&cuda_backend, DTYPE_BF16, rounded, t.data, count));
	for (size_t i = 0; i < count; i++)
		t.values[i] = rounded[i];
	free(rounded);
	return t;
}

static void release(struct tensor *t)
{
	cuda_backend.release(t->data);
	free(t->values);
}

static struct tensor random_tensor(uint64_t stream, float *scratch)
{
	noise_normal(1, stream, 0, COUNT, 1, scratch);
	return new_tensor(scratch, WIDTH);
}

/* Time scales from 10 to 10^6 tokens over the channels; a hundredth of a percent are wiped out. */
static struct tensor decays(int64_t width, float *scratch)
{
	noise_uniform(1, 9, 0, TOKENS * width, 0, 1, scratch);
	for (int64_t i = 0; i < TOKENS * width; i++) {
		const double scale = width == 1 ? 1e5 : pow(10, 1 + (double)(i % width % 6));

		scratch[i] =
		        scratch[i] < 1e-4f && i % width % 2 ? -20 : (float)(-scratch[i] / scale);
	}
	return new_tensor(scratch, width);
}

static struct view view_of(const struct tensor *t, int64_t width)
{
	return (struct view){t->data, TOKENS * width, width, width};
}

/* The worst row's relative error; a NaN is infinitely wrong. */
static double worst_row(const float *out, const double *expected)
{
	double worst = 0;

	for (int r = 0; r < N_ROWS; r++) {
		double error = 0, norm = 0;

		for (int64_t i = 0; i < WIDTH; i++) {
			const double y = expected[r * WIDTH + i];

			error += pow(out[rows[r] * WIDTH + i] - y, 2);
			norm += y * y;
		}
		error = sqrt(error / norm);
		if (!(error <= worst))
			worst = isnan(error) ? INFINITY : error;
	}
	return worst;
}

static void check_kernel(const struct kernel *kernel, const struct matrix_recurrence_args *args,
                         const double *expected)
{
	const size_t bytes = kernel->workspace ? kernel->workspace(args) : 0;
	void *workspace = device_memory(bytes);
	float *out = malloc(COUNT * sizeof *out);

	assert_non_null(out);
	require(cuda_backend.fill(workspace, 0xff, bytes));
	require(cuda_backend.fill(args->out.data, 0xff, (size_t)COUNT * 2));
	require(kernel->run(args, workspace));
	require(cuda_backend.synchronize());
	require(backend_download_floats(&cuda_backend, DTYPE_BF16, out, args->out.data, COUNT));
	const double error = worst_row(out, expected);
	print_message("%-9s %-19s chunk %3d: worst row %.1e\n", decay_name(args->decay),
	              kernel->provider, (int)args->chunk, error);
	assert_true(error <= tolerance);
	free(out);
	cuda_backend.release(workspace);
}

/* With these q, k, v. */
static void check_decay(enum decay decay, const struct tensor *q, const struct tensor *k,
                        const struct tensor *v)
{
	static const int64_t chunks[] = {0, 16, 256};
	const int64_t width = decay == DECAY_DIAGONAL ? WIDTH : 1;
	float *scratch = malloc(COUNT * sizeof *scratch);
	double expected[N_ROWS * WIDTH];

	assert_non_null(scratch);
	struct tensor log_decay = decays(width, scratch);
	struct matrix_recurrence_args args = {
	        .batch = 1,
	        .seq_len = TOKENS,
	        .n_heads = 1,
	        .d_k = WIDTH,
	        .d_v = WIDTH,
	        .decay = decay,
	        .scale = 0.125f,
	        .q = view_of(q, WIDTH),
	        .k = view_of(k, WIDTH),
	        .v = view_of(v, WIDTH),
	        .log_decay = view_of(&log_decay, width),
	        .out = {device_memory((size_t)COUNT * 2), COUNT, WIDTH, WIDTH},
	};

	free(scratch);
	require(reference_matrix_rows(&(struct reference_matrix){.batch = 1,
	                                                         .seq_len = TOKENS,
	                                                         .n_heads = 1,
	                                                         .d_k = WIDTH,
	                                                         .d_v = WIDTH,
	                                                         .decay = decay,
	                                                         .scale = 0.125,
	                                                         .q = q->values,
	                                                         .k = k->values,
	                                                         .v = v->values,
	                                                         .log_decay = log_decay.values},
	                              N_ROWS, rows, expected));
	for (const struct kernel *kernel = cuda_backend.kernels; kernel->run; kernel++)
		for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
			args.chunk = chunks[i];
			if (kernel->operation == OP_MATRIX_RECURRENCE &&
			    !(kernel->unsupported && kernel->unsupported(&args)))
				check_kernel(kernel, &args, expected);
		}
	cuda_backend.release(args.out.data);
	release(&log_decay);
}

static void test_drift(void **state)
{
	float *scratch = malloc(COUNT * sizeof *scratch);

	(void)state;
	assert_non_null(scratch);
	struct tensor q = random_tensor(1, scratch), k = random_tensor(2, scratch);
	struct tensor v = random_tensor(3, scratch);
	free(scratch);
	check_decay(DECAY_DIAGONAL, &q, &k, &v);
	check_decay(DECAY_SCALAR, &q, &k, &v);
	release(&q);
	release(&k);
	release(&v);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_drift)};

	if (cuda_backend.open(0) != STATUS_OK) {
		fprintf(stderr, "%s\n", status_message());
		return 1;
	}
	const int failed = cmocka_run_group_tests_name("cuda drift", tests, NULL, NULL);
	cuda_backend.close();
	return failed;
}
