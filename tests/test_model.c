/* Models: the loss and its gradients, and that following them teaches the model something. */
#include "tests/stacks.h"

#include "kernels/noise.h"

enum { B = 2, T = 33, N = B * T, D = 48, VOCAB = 40 };

/* Beside each registered layer. */
static const char *const more[] = {"rat:6,swa:7", NULL};

static struct fixture *open_model(struct device *device, const char *layers, bool ffn,
                                  struct layer_shape shape)
{
	struct stack_options options = small_options(layers);

	options.vocab = VOCAB;
	options.ffn = ffn;
	options.n_layers = 2;
	return fixture_open(device, &options, shape, 111);
}

static double loss_of(const struct fixture *f)
{
	struct device *device = f->ctx.device;
	double loss;

	require_ok(device_download_doubles(device, device->wide, &loss, f->stack.loss, 1));
	return loss;
}

/* Sets the parameter to value + rate * gradient. */
static void set_moved(struct fixture *f, const struct parameter *p, const float *value,
                      const float *gradient, double rate)
{
	scoped float *moved = new_memory((size_t)p->count * sizeof *moved);

	for (int64_t i = 0; i < p->count; i++)
		moved[i] = (float)(value[i] + rate * gradient[i]);
	require_ok(stack_set_parameter(&f->stack, p->layer, p->index, moved));
}

static double length_of(const float *values, int64_t count)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += (double)values[i] * values[i];
	return sqrt(sum);
}

static double loss_after(struct fixture *f, const struct parameter *p, const float *value,
                         const float *gradient, double rate)
{
	set_moved(f, p, value, gradient, rate);
	fixture_run(f);
	return loss_of(f);
}

/* Along each parameter's gradient g the loss changes by |g|^2: central differences, as far as fp32
 * can tell. Short ones: the norm after linear attention is steep where a token's score is near 0.
 */
TEST(test_gradients_of_the_loss)
{
	for (int i = 0; pattern_at(more, i); i++) {
		scoped_fixture struct fixture *f =
		        open_model(cpu, pattern_at(more, i), true, shape_of(PASS_TRAIN, B, T));
		struct parameter p = NO_PARAMETER;
		int n_checked = 0;

		fixture_run(f);
		while (next_parameter(f, &p)) {
			scoped float *value = read_parameter(f, &p), *dvalue = read_gradient(f, &p);
			double length = length_of(dvalue, p.count);
			double step = fmin(2e-4 / length, 0.02 * length_of(value, p.count));
			double rate = step / length;
			double change = loss_after(f, &p, value, dvalue, rate) -
			                loss_after(f, &p, value, dvalue, -rate);
			double expected = 2 * step * length;

			if (!(fabs(change - expected) < 0.02 * expected + 4e-6))
				fail_msg("%s, layer %d, parameter %d: loss changes by %g, not %g",
				         pattern_at(more, i), p.layer, p.index, change, expected);
			n_checked += expected > 1e-4;
			loss_after(f, &p, value, dvalue, 0);
		}
		assert_true(n_checked > 10);
	}
}

/* Plain gradient descent on one batch. */
TEST(test_loss_decreases)
{
	for (int i = 0; pattern_at(more, i); i++) {
		scoped_fixture struct fixture *f =
		        open_model(cpu, pattern_at(more, i), true, shape_of(PASS_TRAIN, B, T));
		double first = 0, last = 0;

		for (int step = 0; step < 30; step++) {
			fixture_run(f);
			last = loss_of(f);
			first = step == 0 ? last : first;
			for (struct parameter p = NO_PARAMETER; next_parameter(f, &p);) {
				scoped float *value = read_parameter(f, &p),
				             *dvalue = read_gradient(f, &p);

				set_moved(f, &p, value, dvalue, -0.3);
			}
		}
		if (!(last < 0.6 * first))
			fail_msg("%s: the loss goes from %g to %g", pattern_at(more, i), first,
			         last);
	}
}

/* The loss is the mean over all tokens but the last of each sequence, of the token that follows. */
static double expected_loss(const int32_t *tokens, const double *logits)
{
	double sum = 0;

	for (int n = 0; n < N; n++) {
		double denominator = 0;

		for (int v = 0; v < VOCAB; v++)
			denominator += exp(logits[n * VOCAB + v]);
		if (n % T != T - 1)
			sum += log(denominator) - logits[n * VOCAB + tokens[n + 1]];
	}
	return sum / (N - B);
}

/* The head is RMSNorm and a product. */
static void expected_logits(const float *y, const float *weight, const float *head, double *logits)
{
	for (int n = 0; n < N; n++) {
		double squares = 0;

		for (int i = 0; i < D; i++)
			squares += (double)y[n * D + i] * y[n * D + i];
		for (int v = 0; v < VOCAB; v++) {
			double sum = 0;

			for (int i = 0; i < D; i++)
				sum += (double)y[n * D + i] * weight[i] * head[v * D + i];
			logits[n * VOCAB + v] = sum / sqrt(squares / D + 1e-6);
		}
	}
}

TEST(test_loss_and_head)
{
	scoped_fixture struct fixture *f =
	        open_model(cpu, "rat:6", true, shape_of(PASS_TRAIN, B, T));
	int32_t tokens[N];
	scoped double *logits = new_memory(sizeof(double) * N * VOCAB);
	float *head = new_memory(sizeof(float) * VOCAB * D), weight[D];
	scoped float *expected = new_memory(sizeof(float) * N * VOCAB);

	for (int i = 0; i < N; i++)
		tokens[i] = (i * 7 + i / 5) % VOCAB;
	require_ok(stack_set_tokens(&f->stack, tokens));
	require_ok(stack_forward(&f->stack, &f->ctx));
	scoped float *y = read_floats(f, f->stack.y, 0, N * D);
	scoped float *actual = read_floats(f, f->stack.logits, 0, N * VOCAB);
	require_ok(stack_get_parameter(&f->stack, LAYER_MODEL, MODEL_HEAD, head));
	require_ok(stack_get_parameter(&f->stack, LAYER_MODEL, MODEL_FINAL_NORM, weight));
	expected_logits(y, weight, head, logits);
	for (int i = 0; i < N * VOCAB; i++)
		expected[i] = (float)logits[i];
	assert_true(float_error(N * VOCAB, actual, expected) < 2e-5);
	require_ok(stack_backward(&f->stack, &f->ctx));
	assert_true(fabs(loss_of(f) - expected_loss(tokens, logits)) < 1e-5);
	free(head);
}

/* The whole model in fp64: its loss, and all gradients. */
TEST(test_agrees_with_reference)
{
	for (int i = 0; pattern_at(more, i); i++) {
		scoped_fixture struct fixture *f = open_model(cpu, pattern_at(more, i), i % 2 == 0,
		                                              shape_of(PASS_TRAIN, B, T));
		scoped_fixture struct fixture *reference =
		        open_model(cpu->reference, pattern_at(more, i), i % 2 == 0,
		                   shape_of(PASS_TRAIN, B, T));

		fixture_run(f);
		fixture_run(reference);
		double error = worst_gradient_error(f, reference);
		if (!(error < 1e-4) || !(fabs(loss_of(f) - loss_of(reference)) < 1e-5))
			fail_msg("%s: a gradient differs by %g; loss %g, not %g",
			         pattern_at(more, i), error, loss_of(f), loss_of(reference));
	}
}

/* Other tokens for the batch that the model was opened with. */
static void set_batch(struct fixture *f, int batch)
{
	int32_t tokens[N];

	for (int i = 0; i < N; i++)
		tokens[i] = (int32_t)(noise_bits(9, (uint64_t)batch, (uint64_t)i) % VOCAB);
	require_ok(stack_set_tokens(&f->stack, tokens));
}

static float *all_gradients(const struct fixture *f, int64_t *count)
{
	float *values = NULL;

	*count = 0;
	for (struct parameter p = NO_PARAMETER; next_parameter(f, &p);) {
		scoped float *gradient = read_gradient(f, &p);

		float *longer = realloc(values, (size_t)(*count + p.count) * sizeof *values);
		assert_non_null(longer);
		values = longer;
		memcpy(values + *count, gradient, (size_t)p.count * sizeof *values);
		*count += p.count;
	}
	return values;
}

/*
 * Two batches: the gradients of parameters are the sum of each one's, those of activations the
 * second's alone. The memory is planned with a context that accumulates, which needs more.
 */
TEST(test_accumulation)
{
	for (int i = 0; pattern_at(more, i); i++) {
		scoped_fixture struct fixture *f =
		        open_model(cpu, pattern_at(more, i), true, shape_of(PASS_TRAIN, B, T));
		struct layer_shape shape = shape_of(PASS_TRAIN, B, T);
		float *gradients[3], *dx[2];
		int64_t count;

		f->ctx.accumulate = true;
		require_ok(stack_allocate(&f->stack, &f->ctx, &shape));
		require_ok(stack_poison(&f->stack));
		require_ok(stack_initialize(&f->stack, 5));
		/* Batch 1; then batch 0 in its place, and batch 1 added. */
		for (int run = 0; run < 3; run++) {
			f->ctx.accumulate = run == 2;
			set_batch(f, run != 1);
			fixture_run(f);
			gradients[run] = all_gradients(f, &count);
			if (run != 1)
				dx[run / 2] = read_floats(f, f->stack.dx, 0, N * D);
		}
		for (int64_t j = 0; j < count; j++)
			gradients[0][j] += gradients[1][j];
		if (!(float_error(count, gradients[2], gradients[0]) < 1e-6))
			fail_msg("%s: the sum of two batches' gradients is not theirs",
			         pattern_at(more, i));
		assert_memory_equal(dx[0], dx[1], sizeof(float) * N * D);
		for (int j = 0; j < 3; j++)
			free(gradients[j]);
		free(dx[0]);
		free(dx[1]);
	}
}

/* The embedding picks rows, and prefill's logits are those of training's last position. */
TEST(test_prefill_is_training_forward)
{
	static const bool ffns[] = {true, false};

	for (int i = 0; pattern_at(more, i); i++) {
		scoped_fixture struct fixture *train = open_model(
		        cpu, pattern_at(more, i), ffns[i % 2], shape_of(PASS_TRAIN, B, T));
		struct layer_shape shape = {PASS_PREFILL, B, T, T, 0};
		scoped_fixture struct fixture *prefill =
		        open_model(cpu, pattern_at(more, i), ffns[i % 2], shape);

		require_ok(stack_forward(&train->stack, &train->ctx));
		require_ok(stack_forward(&prefill->stack, &prefill->ctx));
		for (int64_t b = 0; b < B; b++) {
			scoped float *all = read_floats(train, train->stack.logits,
			                                (b * T + T - 1) * VOCAB, VOCAB);
			scoped float *last =
			        read_floats(prefill, prefill->stack.logits, b * VOCAB, VOCAB);

			assert_true(float_error(VOCAB, last, all) < 2e-5);
		}
	}
}

/* Parameters by the names of golden files: ranges of rows, and what there is not. */
TEST(test_golden_names)
{
	enum { COUNT = 5 * D * D };
	scoped_fixture struct fixture *f =
	        open_model(cpu, "rat:6,gla:4", true, shape_of(PASS_TRAIN, B, T));
	scoped float *values = random_floats(3, COUNT), *back = malloc(sizeof(float) * COUNT);
	struct stack *stack = &f->stack;

	require_ok(stack_set_named(stack, "backbone.layers.0.seq_layer.in_proj.weight", values,
	                           3 * D * D + 4 * D * D / 4));
	require_ok(stack_get_parameter(stack, 0, PARAM_IN_PROJ, back));
	assert_memory_equal(back, values, sizeof(float) * (3 * D * D + 4 * D * D / 4));
	require_ok(stack_set_named(stack, "backbone.layers.1.hidden_layer.fc2.weight", values,
	                           4 * D * D));
	require_ok(stack_get_parameter(stack, 3, PARAM_OUT_PROJ, back));
	assert_memory_equal(back, values, sizeof(float) * 4 * D * D);
	require_ok(
	        stack_set_named(stack, "backbone.layers.1.seq_layer.v_proj.weight", values, D * D));
	require_ok(stack_get_parameter(stack, 2, PARAM_IN_PROJ, back));
	assert_memory_equal(back + D * D, values, sizeof(float) * D * D);
	fixture_run(f);
	require_ok(stack_get_named_gradient(stack, "backbone.layers.1.seq_layer.v_proj.weight",
	                                    values, D * D));
	require_ok(stack_get_gradient(stack, 2, PARAM_IN_PROJ, back));
	assert_memory_equal(back + D * D, values, sizeof(float) * D * D);
	assert_int_equal(stack_set_named(stack, "backbone.ln.weight", values, D - 1),
	                 STATUS_INVALID);
	assert_int_equal(stack_set_named(stack, "in_proj.weight", values, D), STATUS_INVALID);
	assert_int_equal(
	        stack_set_named(stack, "backbone.layers.2.seq_layer.in_proj.weight", values, D * D),
	        STATUS_INVALID);
	assert_int_equal(stack_set_named(stack, "backbone.layers.-1.seq_layer.in_proj.weight",
	                                 values, D * D),
	                 STATUS_INVALID);
	assert_int_equal(stack_get_parameter(stack, 0, 23, values), STATUS_INVALID);
	assert_int_equal(stack_get_parameter(stack, 99, 0, values), STATUS_INVALID);
}

/* The same seed gives the same model, whatever it is allocated for; another seed another one. */
TEST(test_initialization)
{
	struct stack_options options = small_options("rat,recurrence");
	struct layer_shape shape = {PASS_PREFILL, 1, 8, 8, 0};
	scoped_fixture struct fixture *a =
	        fixture_open(NULL, &options, shape_of(PASS_TRAIN, B, T), 1);
	scoped_fixture struct fixture *b = fixture_open(NULL, &options, shape, 1);
	scoped_fixture struct fixture *c = fixture_open(NULL, &options, shape, 2);
	float one[D], other[D], bias[D];

	require_ok(stack_initialize(&a->stack, 9));
	require_ok(stack_initialize(&b->stack, 9));
	require_ok(stack_initialize(&c->stack, 10));
	for (int layer = 0; layer < 2; layer++) {
		float longest = layer == 0 ? 5 : 31; /* L - 1; the training length less 1 */
		float largest = 0, smallest = 9;

		require_ok(stack_get_parameter(&a->stack, layer, PARAM_OTHER, one));
		require_ok(stack_get_parameter(&b->stack, layer, PARAM_OTHER, other));
		require_ok(stack_get_parameter(&c->stack, layer, PARAM_OTHER, bias));
		assert_memory_equal(one, other, sizeof one);
		assert_memory_not_equal(one, bias, sizeof one);
		for (int i = 0; i < D; i++) {
			largest = fmaxf(largest, one[i]);
			smallest = fminf(smallest, one[i]);
		}
		assert_true(largest <= logf(longest) && largest > logf(0.8f * longest));
		assert_true(smallest >= 0 && smallest < logf(0.3f * longest));
	}
	scoped float *weights = malloc(sizeof(float) * 4 * D * D);
	require_ok(stack_get_parameter(&a->stack, 0, PARAM_IN_PROJ, weights));
	assert_true(fabs(length_of(weights, 4 * D * D) / sqrt(4.0 * D * D) / 0.02 - 1) < 0.05);
}
