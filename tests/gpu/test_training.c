/*
 * Training on the device at a size whose gradients are checked there by
 * samples: the check passes what the kernels compute, and nothing that has
 * been spoilt afterwards.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda_backend.h"
#include "layers/mixing.h"
#include "tests/stacks.h"

enum { BATCH = 3, SEQ_LEN = 2999, D_MODEL = 512, HEADS = 4, MIN_ROWS = 300 };

static const double allowed = 1.5e-2;

static const char *const patterns[] = {"attention", "swa:200",    "rat:16",
                                       "rat:100",   "recurrence", "rat:16,attention"};

static struct fixture *trained(const char *pattern)
{
	struct stack_options options = small_options(pattern);
	struct layer_shape shape = {.pass = PASS_TRAIN, .batch = BATCH, .seq_len = SEQ_LEN};

	options.d_model = D_MODEL;
	options.n_heads = HEADS;
	struct fixture *f = fixture_open(&cuda_backend, &options, shape, 11);
	fixture_run(f);
	return f;
}

static double check(struct fixture *f)
{
	double error;

	require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 5, &error));
	return error;
}

static void set_gradient(struct fixture *f, int layer, int i, int64_t count, float value)
{
	float *values = malloc((size_t)count * sizeof *values);

	assert_non_null(values);
	for (int64_t j = 0; j < count; j++)
		values[j] = value;
	require_ok(backend_upload_floats(&cuda_backend, DTYPE_F32, f->stack.memory[layer].grad[i],
	                                 values, (size_t)count));
	free(values);
}

static void test_passes(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
		struct fixture *f = trained(patterns[i]);

		/* With weights as they are in training: the fixture's larger ones make a sharp
		 * softmax of rounded scores. */
		require_ok(stack_initialize(&f->stack, 11));
		fixture_run(f);
		double error = check(f);

		print_message("%-20s %.2e\n", patterns[i], error);
		assert_true(error <= allowed);
		fixture_close(f);
	}
}

/* Every parameter's gradient, of every layer, is looked at. */
static void test_parameters(void **state)
{
	(void)state;
	for (size_t p = 0; p < sizeof patterns / sizeof *patterns; p++) {
		struct fixture *f = trained(patterns[p]);

		for (int layer = 0; layer < f->stack.n_layers; layer++)
			for (int i = 0; i < MAX_TENSORS; i++) {
				int64_t count = stack_parameter_count(&f->stack, layer, i);

				if (count == 0)
					continue;
				set_gradient(f, layer, i, count, 0);
				assert_true(check(f) > 0.9);
				fixture_run(f);
			}
		fixture_close(f);
	}
}

/* dx without the layer's part; a row of dproj that is another's; a single NaN. */
static void test_activations(void **state)
{
	(void)state;
	for (size_t p = 0; p < sizeof patterns / sizeof *patterns; p++) {
		struct fixture *f = trained(patterns[p]);
		int64_t count = (int64_t)BATCH * SEQ_LEN * D_MODEL;
		float *dy = read_floats(f, f->stack.layer_dy[1], 0, count);
		int64_t width = 2 * D_MODEL;

		write_floats(f, f->stack.layer_dy[0], 0, dy, count);
		free(dy);
		assert_true(check(f) > 0.1);
		fixture_run(f);
		void *dproj = f->stack.memory[0].scratch[SCRATCH_DPROJ];
		float *row = read_floats(f, dproj, count, width);
		write_floats(f, dproj, 0, row, width);
		free(row);
		assert_true(check(f) > 0.1);
		fixture_run(f);
		set_gradient(f, 0, PARAM_IN_PROJ, 1, NAN);
		assert_true(check(f) > 0.9);
		fixture_close(f);
	}
}

static int open_device(void **state)
{
	(void)state;
	if (cuda_backend.open(0) == STATUS_OK)
		return 0;
	fprintf(stderr, "%s\n", status_message());
	return -1;
}

static int close_device(void **state)
{
	(void)state;
	cuda_backend.close();
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_passes),
	        cmocka_unit_test(test_parameters),
	        cmocka_unit_test(test_activations),
	};

	return cmocka_run_group_tests(tests, open_device, close_device);
}
