/* Models: the loss and its gradients, and that following them teaches the model something. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "tests/stacks.h"

enum { B = 2, T = 33, N = B * T, D = 48, VOCAB = 40 };

static const char *const more_patterns[] = {"rat:6,swa:7", NULL};

/* Each registered layer, and more. */
static const char *pattern(int i)
{
	return pattern_at(more_patterns, i);
}

static struct fixture *open_model(const char *layers, bool ffn, struct layer_shape shape)
{
	struct stack_options options = small_options(layers);

	options.vocab = VOCAB;
	options.ffn = ffn;
	options.n_layers = 2;
	return fixture_open(NULL, &options, shape, 111);
}

static struct layer_shape training(void)
{
	return (struct layer_shape){PASS_TRAIN, B, T, 0, 0};
}

static double loss_of(const struct fixture *f)
{
	float loss;

	require_ok(f->ctx.backend->download(&loss, f->stack.loss, sizeof loss));
	return loss;
}

/* One parameter of a model with its gradient, copied. */
struct parameter {
	int layer, index;
	int64_t count;
	float *value, *gradient;
};

/* Slots for every parameter that a model could have; many are empty. */
static int parameter_slots(const struct fixture *f)
{
	return f->stack.n_layers * MAX_TENSORS + MODEL_PARAMETERS;
}

static struct parameter read_parameter(const struct fixture *f, int slot)
{
	int ends = f->stack.n_layers * MAX_TENSORS;
	struct parameter p = {.layer = slot < ends ? slot / MAX_TENSORS : LAYER_MODEL,
	                      .index = slot < ends ? slot % MAX_TENSORS : slot - ends};

	p.count = stack_parameter_count(&f->stack, p.layer, p.index);
	if (p.count == 0)
		return p;
	p.value = malloc((size_t)p.count * sizeof *p.value);
	p.gradient = malloc((size_t)p.count * sizeof *p.gradient);
	assert_true(p.value && p.gradient);
	require_ok(stack_get_parameter(&f->stack, p.layer, p.index, p.value));
	require_ok(stack_get_gradient(&f->stack, p.layer, p.index, p.gradient));
	return p;
}

static void free_parameter(struct parameter *p)
{
	free(p->value);
	free(p->gradient);
}

/* Sets the parameter to value + rate * gradient. */
static void set_moved(struct fixture *f, const struct parameter *p, double rate)
{
	float *moved = malloc((size_t)p->count * sizeof *moved);

	assert_non_null(moved);
	for (int64_t i = 0; i < p->count; i++)
		moved[i] = (float)(p->value[i] + rate * p->gradient[i]);
	require_ok(stack_set_parameter(&f->stack, p->layer, p->index, moved));
	free(moved);
}

static double length_of(const float *values, int64_t count)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += (double)values[i] * values[i];
	return sqrt(sum);
}

static double loss_after(struct fixture *f, const struct parameter *p, double rate)
{
	set_moved(f, p, rate);
	fixture_run(f);
	return loss_of(f);
}

/* Along each parameter's gradient g the loss changes by |g|^2: central differences, as far as fp32
 * can tell. Short ones: the norm behind linear attention is steep where a token's score is near 0.
 */
static void test_gradients_of_the_loss(void **state)
{
	(void)state;
	for (int i = 0; pattern(i); i++) {
		struct fixture *f = open_model(pattern(i), true, training());
		int n_checked = 0;

		fixture_run(f);
		for (int slot = 0; slot < parameter_slots(f); slot++) {
			struct parameter p = read_parameter(f, slot);

			if (p.count == 0)
				continue;
			double length = length_of(p.gradient, p.count);
			double step = fmin(2e-4 / length, 0.02 * length_of(p.value, p.count));
			double rate = step / length;
			double change = loss_after(f, &p, rate) - loss_after(f, &p, -rate);
			double expected = 2 * step * length;

			if (!(fabs(change - expected) < 0.02 * expected + 4e-6))
				fail_msg("%s, layer %d, parameter %d: loss changes by %g, not %g",
				         pattern(i), p.layer, p.index, change, expected);
			n_checked += expected > 1e-4;
			set_moved(f, &p, 0);
			fixture_run(f);
			free_parameter(&p);
		}
		assert_true(n_checked > 10);
		fixture_close(f);
	}
}

/* Plain gradient descent on one batch. */
static void test_loss_decreases(void **state)
{
	(void)state;
	for (int i = 0; pattern(i); i++) {
		struct fixture *f = open_model(pattern(i), true, training());
		double first = 0, last = 0;

		for (int step = 0; step < 30; step++) {
			fixture_run(f);
			last = loss_of(f);
			first = step == 0 ? last : first;
			for (int slot = 0; slot < parameter_slots(f); slot++) {
				struct parameter p = read_parameter(f, slot);

				if (p.count > 0)
					set_moved(f, &p, -0.3);
				free_parameter(&p);
			}
		}
		if (!(last < 0.6 * first))
			fail_msg("%s: the loss goes from %g to %g", pattern(i), first, last);
		fixture_close(f);
	}
}

/* The loss is the mean over all tokens but the last of each sequence, of the token that follows;
 * the head is RMSNorm and a product. */
static void test_loss_and_head(void **state)
{
	struct fixture *f = open_model("rat:6", true, training());
	int32_t tokens[N], targets[N];
	double *y = malloc(sizeof(double) * N * D), *norm = malloc(sizeof(double) * N * D);
	double *head = malloc(sizeof(double) * VOCAB * D);
	double *logits = malloc(sizeof(double) * N * VOCAB), weight[D];
	float *head_floats = malloc(sizeof(float) * VOCAB * D), weight_floats[D];
	float *expected = malloc(sizeof(float) * N * VOCAB);

	(void)state;
	for (int i = 0; i < N; i++)
		tokens[i] = (i * 7 + i / 5) % VOCAB;
	for (int i = 0; i < N; i++)
		targets[i] = i % T == T - 1 ? -1 : tokens[i + 1];
	require_ok(stack_set_tokens(&f->stack, tokens));
	require_ok(stack_forward(&f->stack, &f->ctx));
	float *y_floats = read_floats(f, f->stack.y, 0, N * D);
	float *actual = read_floats(f, f->stack.logits, 0, N * VOCAB);
	require_ok(stack_get_parameter(&f->stack, LAYER_MODEL, MODEL_HEAD, head_floats));
	require_ok(stack_get_parameter(&f->stack, LAYER_MODEL, MODEL_FINAL_NORM, weight_floats));
	for (int i = 0; i < N * D; i++)
		y[i] = y_floats[i];
	for (int i = 0; i < VOCAB * D; i++)
		head[i] = head_floats[i];
	for (int i = 0; i < D; i++)
		weight[i] = weight_floats[i];
	reference_rms_norm(N, D, 1e-6, y, weight, norm, NULL);
	reference_linear(N, D, VOCAB, norm, head, logits);
	for (int i = 0; i < N * VOCAB; i++)
		expected[i] = (float)logits[i];
	assert_true(float_error(N * VOCAB, actual, expected) < 2e-5);
	require_ok(stack_backward(&f->stack, &f->ctx));
	assert_true(fabs(loss_of(f) - reference_cross_entropy(N, VOCAB, logits, targets, NULL)) <
	            1e-5);
	free(y);
	free(norm);
	free(head);
	free(logits);
	free(head_floats);
	free(expected);
	free(y_floats);
	free(actual);
	fixture_close(f);
}

/* The embedding picks rows, and prefill's logits are those of training's last position. */
static void test_prefill_is_training_forward(void **state)
{
	static const bool ffns[] = {true, false};

	(void)state;
	for (int i = 0; pattern(i); i++) {
		struct fixture *train = open_model(pattern(i), ffns[i % 2], training());
		struct layer_shape shape = {PASS_PREFILL, B, T, T, 0};
		struct fixture *prefill = open_model(pattern(i), ffns[i % 2], shape);

		require_ok(stack_forward(&train->stack, &train->ctx));
		require_ok(stack_forward(&prefill->stack, &prefill->ctx));
		for (int64_t b = 0; b < B; b++) {
			float *all = read_floats(train, train->stack.logits,
			                         (b * T + T - 1) * VOCAB, VOCAB);
			float *last = read_floats(prefill, prefill->stack.logits, b * VOCAB, VOCAB);

			assert_true(float_error(VOCAB, last, all) < 2e-5);
			free(all);
			free(last);
		}
		fixture_close(train);
		fixture_close(prefill);
	}
}

/* Parameters by the names of golden files: ranges of rows, and what there is not. */
static void test_golden_names(void **state)
{
	enum { COUNT = 5 * D * D };
	struct fixture *f = open_model("rat:6,gla:4", true, training());
	float *values = random_floats(3, COUNT), *back = malloc(sizeof(float) * COUNT);
	struct stack *stack = &f->stack;

	(void)state;
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
	free(values);
	free(back);
	fixture_close(f);
}

/* The same seed gives the same model, whatever it is allocated for; another seed another one. */
static void test_initialization(void **state)
{
	struct stack_options options = small_options("rat,recurrence");
	struct layer_shape shape = {PASS_PREFILL, 1, 8, 8, 0};
	struct fixture *a = fixture_open(NULL, &options, training(), 1);
	struct fixture *b = fixture_open(NULL, &options, shape, 1);
	struct fixture *c = fixture_open(NULL, &options, shape, 2);
	float one[D], other[D], bias[D];

	(void)state;
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
	float *weights = malloc(sizeof(float) * 4 * D * D);
	require_ok(stack_get_parameter(&a->stack, 0, PARAM_IN_PROJ, weights));
	assert_true(fabs(length_of(weights, 4 * D * D) / sqrt(4.0 * D * D) / 0.02 - 1) < 0.05);
	free(weights);
	fixture_close(a);
	fixture_close(b);
	fixture_close(c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_gradients_of_the_loss),
	        cmocka_unit_test(test_loss_decreases),
	        cmocka_unit_test(test_loss_and_head),
	        cmocka_unit_test(test_prefill_is_training_forward),
	        cmocka_unit_test(test_golden_names),
	        cmocka_unit_test(test_initialization),
	};

	return cmocka_run_group_tests(tests, stacks_setup, stacks_teardown);
}
