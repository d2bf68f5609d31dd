/*
 * Training on the device at a size whose gradients are checked there by
 * samples: the check passes what the kernels compute, and nothing that has
 * been spoilt afterwards.
 */
#include "tests/gpu/gpu.h"

#include "layers/mixing.h"
#include "tests/stacks.h"

enum { BATCH = 3, SEQ_LEN = 2999, D_MODEL = 512, HEADS = 4, MIN_ROWS = 300 };

static const char *const patterns[] = {
        "attention",  "attention(kv_heads=1)", "swa:200", "rat:16", "rat:100",
        "recurrence", "rat:16,attention"};

static struct fixture *trained(const char *pattern)
{
	struct stack_options options = small_options(pattern);
	struct layer_shape shape = {.pass = PASS_TRAIN, .batch = BATCH, .seq_len = SEQ_LEN};

	options.d_model = D_MODEL;
	options.n_heads = HEADS;
	struct fixture *f = fixture_open(device, &options, shape, 11);
	fixture_run(f);
	return f;
}

/* The error as a share of what is allowed. */
static double check(struct fixture *f)
{
	struct accuracy found;

	require_ok(stack_verify(&f->stack, &f->ctx, MIN_ROWS, 5, &found));
	return found.share;
}

static void set_gradient(struct fixture *f, int layer, int i, int64_t count, float value)
{
	scoped float *values = new_memory((size_t)count * sizeof *values);

	for (int64_t j = 0; j < count; j++)
		values[j] = value;
	require_ok(device_upload_floats(device, DTYPE_F32, f->stack.memory[layer].grad[i], values,
	                                (size_t)count));
}

TEST(test_passes)
{
	for (size_t i = 0; i < COUNT_OF(patterns); i++) {
		scoped_fixture struct fixture *f = trained(patterns[i]);

		/* With weights as they are in training: the fixture's larger ones make a sharp
		 * softmax of rounded scores. */
		require_ok(stack_initialize(&f->stack, 11));
		fixture_run(f);
		double error = check(f);

		print_message("%-20s %.2e\n", patterns[i], error);
		assert_true(error <= 1);
	}
}

/* Every parameter's gradient, of every layer, is looked at. */
TEST(test_parameters)
{
	for (size_t p = 0; p < COUNT_OF(patterns); p++) {
		scoped_fixture struct fixture *f = trained(patterns[p]);

		for (struct parameter q = NO_PARAMETER; next_parameter(f, &q);) {
			set_gradient(f, q.layer, q.index, q.count, 0);
			assert_true(check(f) > 1);
			fixture_run(f);
		}
	}
}

/* dx without the layer's part; a row of dproj that is another's; a single NaN. */
TEST(test_activations)
{
	for (size_t p = 0; p < COUNT_OF(patterns); p++) {
		scoped_fixture struct fixture *f = trained(patterns[p]);
		int64_t count = (int64_t)BATCH * SEQ_LEN * D_MODEL;
		float *dy = read_floats(f, f->stack.layer_dy[1], 0, count);
		int64_t width = 2 * D_MODEL;

		write_floats(f, f->stack.layer_dy[0], 0, dy, count);
		free(dy);
		assert_true(check(f) > 1);
		fixture_run(f);
		void *dproj = f->stack.memory[0].scratch[SCRATCH_DPROJ];
		float *row = read_floats(f, dproj, count, width);
		write_floats(f, dproj, 0, row, width);
		free(row);
		assert_true(check(f) > 1);
		fixture_run(f);
		set_gradient(f, 0, PARAM_IN_PROJ, 1, NAN);
		assert_true(check(f) > 1);
	}
}
