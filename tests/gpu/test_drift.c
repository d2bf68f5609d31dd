/*
 * A million tokens of the matrix recurrence, by every kernel that takes them, against the fp64
 * reference at rows from the first to the last: nothing drifts. In one head some channels
 * remember a million tokens and others ten, and now and then a token wipes a channel out.
 */
#include "tests/stacks.h"

#include "baselines/baselines.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/noise.h"

enum { TOKENS = (1 << 20) - 7, WIDTH = 64, COUNT = TOKENS * WIDTH };

static const int64_t rows[] = {0,          63,          64,         TOKENS / 16,
                               TOKENS / 2, TOKENS - 65, TOKENS - 2, TOKENS - 1};

enum { N_ROWS = COUNT_OF(rows) };

static const double tolerance = 1.5e-2;

static struct device *device;

static void *device_memory(size_t bytes)
{
	void *memory;

	require_ok(device_allocate(device, bytes ? bytes : 1, &memory));
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
	struct tensor t = {device_memory(count * 2), malloc(count * sizeof(double))};

	assert_non_null(t.values);
	require_ok(device_upload_floats(device, DTYPE_BF16, t.data, values, count));
	require_ok(device_download_doubles(device, DTYPE_BF16, t.values, t.data, count));
	return t;
}

static void release(struct tensor *t)
{
	device_release(device, t->data);
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

static struct view view_of(void *data, int64_t width)
{
	return (struct view){data, TOKENS * width, width, width};
}

/* The worst row's relative error; a NaN is infinitely wrong. */
static double worst_row(const float *out, const double *expected)
{
	double worst = 0;

	for (int r = 0; r < N_ROWS; r++) {
		double error = 0, norm = 0;

		for (int64_t i = 0; i < WIDTH; i++) {
			const double y = expected[rows[r] * WIDTH + i];

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
	const size_t bytes = kernel->workspace ? kernel->workspace(device, args) : 0;
	void *workspace = device_memory(bytes);
	float *out = new_memory(COUNT * sizeof *out);

	require_ok(device_fill(device, workspace, 0xff, bytes));
	require_ok(device_fill(device, args->out.data, 0xff, (size_t)COUNT * 2));
	require_ok(kernel->run(device, args, workspace));
	require_ok(device_synchronize(device));
	require_ok(device_download_floats(device, DTYPE_BF16, out, args->out.data, COUNT));
	const double error = worst_row(out, expected);
	print_message("%-9s %-19s chunk %3d: worst row %.1e\n", decay_name(args->decay),
	              kernel->provider, (int)args->chunk, error);
	assert_true(error <= tolerance);
	free(out);
	device_release(device, workspace);
}

/* What the fp64 reference makes of the tensors as they are on the host. */
static double *reference(const struct matrix_recurrence_args *args, const struct tensor *q,
                         const struct tensor *k, const struct tensor *v,
                         const struct tensor *log_decay, int64_t width)
{
	struct matrix_recurrence_args a = *args;
	struct context ctx = {.device = cpu->reference};
	double *out = new_memory(COUNT * sizeof *out);

	a.q = view_of(q->values, WIDTH);
	a.k = view_of(k->values, WIDTH);
	a.v = view_of(v->values, WIDTH);
	a.log_decay = view_of(log_decay->values, width);
	a.out = view_of(out, WIDTH);
	require_ok(run_matrix_recurrence(&ctx, &a));
	return out;
}

/* With these q, k, v. */
static void check_decay(enum decay decay, const struct tensor *q, const struct tensor *k,
                        const struct tensor *v)
{
	static const int64_t chunks[] = {0, 16, 256};
	const int64_t width = decay == DECAY_DIAGONAL ? WIDTH : 1;
	float *scratch = new_memory(COUNT * sizeof *scratch);

	struct tensor log_decay = decays(width, scratch);
	struct matrix_recurrence_args args = {
	        .batch = 1,
	        .seq_len = TOKENS,
	        .n_heads = 1,
	        .d_k = WIDTH,
	        .d_v = WIDTH,
	        .decay = decay,
	        .scale = 0.125f,
	        .q = view_of(q->data, WIDTH),
	        .k = view_of(k->data, WIDTH),
	        .v = view_of(v->data, WIDTH),
	        .log_decay = view_of(log_decay.data, width),
	        .out = view_of(device_memory((size_t)COUNT * 2), WIDTH),
	};

	free(scratch);
	double *expected = reference(&args, q, k, v, &log_decay, width);
	for (const struct kernel *kernel = device->kernels; kernel->run; kernel++)
		for (size_t i = 0; i < COUNT_OF(chunks); i++) {
			args.chunk = chunks[i];
			if (kernel->operation == OP_MATRIX_RECURRENCE &&
			    !(kernel->unsupported && kernel->unsupported(device, &args)))
				check_kernel(kernel, &args, expected);
		}
	free(expected);
	device_release(device, args.out.data);
	release(&log_decay);
}

TEST(test_drift)
{
	float *scratch = new_memory(COUNT * sizeof *scratch);

	struct tensor q = random_tensor(1, scratch), k = random_tensor(2, scratch);
	struct tensor v = random_tensor(3, scratch);
	free(scratch);
	check_decay(DECAY_DIAGONAL, &q, &k, &v);
	check_decay(DECAY_SCALAR, &q, &k, &v);
	release(&q);
	release(&k);
	release(&v);
}

static int open_device(void **state)
{
	if (cuda_backend.open(NULL, baseline_kernels, &device) == STATUS_OK)
		return 0;
	fprintf(stderr, "%s\n", status_message());
	return -1;
}

static int close_device(void **state)
{
	device_close(device);
	return 0;
}

FIXTURE(open_device, close_device, NULL)
