/* Layers and stacks in full-sequence passes: against the fp64 reference, against each other in the
 * limits where they must agree, and against what was planned for them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"
#include "tests/stacks.h"
#include "tests/support.h"

static const double allowed = 2e-5, allowed_row = 1e-4;

static struct layer_shape prefill(int64_t batch, int64_t seq_len)
{
	return (struct layer_shape){PASS_PREFILL, batch, seq_len, seq_len, 0};
}

static struct layer_shape train(int64_t batch, int64_t seq_len)
{
	return (struct layer_shape){PASS_TRAIN, batch, seq_len, 0, 0};
}

static const char *const more_patterns[] = {
        "rat:1", "rat:64", "swa:0", "gla:1", "rat:5,swa:3", "attention,rat,recurrence", NULL};

/* Each registered layer, and more. */
static const char *pattern(int i)
{
	return pattern_at(more_patterns, i);
}

/* Runs one pass of a pattern and returns the worst row's error. */
static double error_of(const struct stack_options *options, struct layer_shape shape, uint64_t seed)
{
	struct fixture *f = fixture_open(NULL, options, shape, seed);
	double error;

	fixture_run(f);
	require_ok(stack_verify(&f->stack, &f->ctx, INT64_MAX, seed, &error));
	fixture_close(f);
	return error;
}

static void expect_small_error(const struct stack_options *options, struct layer_shape shape,
                               uint64_t seed)
{
	double error = error_of(options, shape, seed);

	if (!(error < allowed_row))
		fail_msg("%s, %s, B=%lld T=%lld: error %g", options->pattern, pass_name(shape.pass),
		         (long long)shape.batch, (long long)shape.seq_len, error);
}

static void test_agrees_with_reference(void **state)
{
	static const int64_t lengths[] = {64, 67, 83, 130};

	(void)state;
	for (int i = 0; pattern(i); i++)
		for (int j = 0; j < 4; j++) {
			struct stack_options options = small_options(pattern(i));

			options.rope = j != 2;
			expect_small_error(&options, prefill(1 + j % 3, lengths[j]), (uint64_t)j);
			expect_small_error(&options, train(1 + j % 3, lengths[j]), (uint64_t)j);
		}
}

static void test_without_cache_or_residual(void **state)
{
	(void)state;
	for (int i = 0; pattern(i); i++) {
		struct stack_options options = small_options(pattern(i));
		struct layer_shape shape = prefill(2, 65);

		options.residual = options.prenorm = false;
		shape.capacity = 0;
		expect_small_error(&options, shape, 5);
		expect_small_error(&options, train(2, 65), 5);
	}
}

static void test_single_token(void **state)
{
	static const char *const patterns[] = {"attention", "swa", "recurrence", "gla:1", "rat:1"};

	(void)state;
	for (int i = 0; i < 5; i++) {
		struct stack_options options = small_options(patterns[i]);

		expect_small_error(&options, prefill(3, 1), 7);
		/* The norm behind gla's single token removes q.k, whose gradient is all rounding.
		 */
		if (strcmp(patterns[i], "gla:1") != 0)
			expect_small_error(&options, train(3, 1), 7);
	}
}

/* InProj's output of layer 0 as doubles. */
static double *projection_of(const struct fixture *f, int64_t n, int64_t width)
{
	float *floats = read_floats(f, f->stack.memory[0].saved[SAVED_PROJ], 0, n * width);
	double *values = malloc((size_t)(n * width) * sizeof *values);

	assert_non_null(values);
	for (int64_t i = 0; i < n * width; i++)
		values[i] = floats[i];
	free(floats);
	return values;
}

/* Of RAT's InProj with two groups: z, and q, gate-scaled k, v, one per head and rotated. */
enum { ONE_B = 2, ONE_T = 37, ONE_H = 4, ONE_D = 48, ONE_DH = ONE_D / ONE_H, ONE_G = 2 };
enum { ONE_N = ONE_B * ONE_T, ONE_P = 3 * ONE_D + 2 * ONE_G * ONE_DH };

static void scale_by_gates(const double *proj, const float *bias, double *z, double *q, double *k,
                           double *v)
{
	for (int64_t n = 0; n < ONE_N; n++)
		for (int64_t i = 0; i < ONE_D; i++) {
			const double *row = proj + n * ONE_P;
			int64_t to = n * ONE_D + i,
			        grouped = i / ONE_DH % ONE_G * ONE_DH + i % ONE_DH;
			double keep = 1 - 1 / (1 + exp(-row[2 * ONE_D + i] - bias[i]));

			z[to] = row[i];
			v[to] = keep * row[ONE_D + i];
			q[to] = row[3 * ONE_D + grouped];
			k[to] = keep * row[3 * ONE_D + ONE_G * ONE_DH + grouped];
		}
	reference_rotate(ONE_B, ONE_T, ONE_H, ONE_DH, 0, 1, q, q);
	reference_rotate(ONE_B, ONE_T, ONE_H, ONE_DH, 0, 1, k, k);
}

/*
 * With L = 1 every token is its own chunk: it is attended to by all later ones
 * as (1-g) v and (1-g) k (k of group h mod G), the key rotated at its position
 * as q is; by itself through the product of the unrotated q and k, which is that of both
 * rotated at the same position. So RAT is causal attention over gate-scaled
 * k and v, its output times sigmoid(z).
 */
static void test_rat_of_chunk_1_is_attention(void **state)
{
	enum { COUNT = ONE_N * ONE_D };
	struct stack_options options = small_options("rat:1");
	/* Training leaves the projection unrotated. */
	struct fixture *f = fixture_open(NULL, &options, train(ONE_B, ONE_T), 11);
	double *z = new_doubles(5 * COUNT), *out = z + COUNT;
	double *q = out + COUNT, *k = q + COUNT, *v = k + COUNT;
	float *expected = malloc(sizeof(float) * COUNT), bias[ONE_D];

	(void)state;
	assert_non_null(expected);
	require_ok(stack_forward(&f->stack, &f->ctx));
	require_ok(stack_get_parameter(&f->stack, 0, PARAM_OTHER, bias));
	double *proj = projection_of(f, ONE_N, ONE_P);
	scale_by_gates(proj, bias, z, q, k, v);
	const struct reference_attention attention = {
	        .batch = ONE_B,
	        .n_heads = ONE_H,
	        .q_heads = ONE_H,
	        .d_head = ONE_DH,
	        .seq_len = ONE_T,
	        .kv_len = ONE_T,
	        .mask = MASK_CAUSAL,
	        .scale = 1 / sqrt(ONE_DH),
	        .q = q,
	        .k = k,
	        .v = v,
	        .gate = z,
	};
	require_ok(reference_attention_forward(&attention, 0, NULL, out, NULL, NULL));
	for (int64_t i = 0; i < COUNT; i++)
		expected[i] = (float)out[i];
	float *mix = read_floats(f, f->stack.memory[0].saved[SAVED_MIX], 0, COUNT);
	assert_true(float_error(COUNT, mix, expected) < allowed);
	free(mix);
	free(proj);
	free(z);
	free(expected);
	fixture_close(f);
}

/* With L = T there is no chunk before, each token attends to itself alone, and sigmoid(z) times
 * the running value remains: the recurrence with the same z, v, g. */
static void test_rat_of_one_chunk_is_recurrence(void **state)
{
	enum { B = 2, T = 45, D = 48 };
	struct stack_options rat_options = small_options("rat:45");
	struct stack_options options = small_options("recurrence");
	struct fixture *rat = fixture_open(NULL, &rat_options, prefill(B, T), 3);
	struct fixture *recurrence = fixture_open(NULL, &options, prefill(B, T), 3);
	int64_t width = stack_parameter_count(&rat->stack, 0, PARAM_IN_PROJ);
	float *values = malloc((size_t)width * sizeof *values);

	(void)state;
	assert_non_null(values);
	for (int i = 0; i <= PARAM_OTHER; i++) {
		/* The recurrence's InProj is the first 3D rows of RAT's. */
		require_ok(stack_get_parameter(&rat->stack, 0, i, values));
		require_ok(stack_set_parameter(&recurrence->stack, 0, i, values));
	}
	fixture_run(rat);
	fixture_run(recurrence);
	float *a = read_floats(rat, rat->stack.memory[0].saved[SAVED_MIX], 0, B * T * D);
	float *b =
	        read_floats(recurrence, recurrence->stack.memory[0].saved[SAVED_MIX], 0, B * T * D);
	assert_true(float_error(B * T * D, a, b) < allowed);
	free(a);
	free(b);
	free(values);
	fixture_close(rat);
	fixture_close(recurrence);
}

/* The first rows of the output depend on the first rows of the input alone, wherever the sequence
 * ends inside a chunk. */
static void test_ragged_end_is_causal(void **state)
{
	enum { T = 70, D = 48 };
	static const int64_t cuts[] = {64, 65, 66, 69};

	(void)state;
	for (int i = 0; pattern(i); i++) {
		struct stack_options options = small_options(pattern(i));
		struct fixture *whole = fixture_open(NULL, &options, prefill(1, T), 21);
		float *x = read_floats(whole, whole->stack.x, 0, T * D);

		fixture_run(whole);
		float *y = read_floats(whole, whole->stack.y, 0, T * D);
		for (int j = 0; j < 4; j++) {
			struct fixture *cut = fixture_open(NULL, &options, prefill(1, cuts[j]), 21);

			write_floats(cut, cut->stack.x, 0, x, cuts[j] * D);
			fixture_run(cut);
			float *part = read_floats(cut, cut->stack.y, 0, cuts[j] * D);
			assert_true(float_error(cuts[j] * D, part, y) < 5e-7);
			free(part);
			fixture_close(cut);
		}
		free(x);
		free(y);
		fixture_close(whole);
	}
}

/* A stack's forward and backward are its layers', run one after another. */
static void test_stack_is_its_layers(void **state)
{
	enum { B = 2, T = 33, D = 48, N = B * T, LAYERS = 3 };
	static const char *const names[LAYERS] = {"rat:8", "swa:5", "gla:4"};
	struct stack_options options = small_options("rat:8,swa:5,gla:4");
	struct fixture *stack = fixture_open(NULL, &options, train(B, T), 31), *layer[LAYERS];
	float *x = read_floats(stack, stack->stack.x, 0, N * D);
	float *dy = read_floats(stack, stack->stack.dy, 0, N * D);

	(void)state;
	fixture_run(stack);
	for (int i = 0; i < LAYERS; i++) {
		struct stack_options one = small_options(names[i]);

		layer[i] = fixture_open(NULL, &one, train(B, T), 1);
		copy_parameters(stack, i, layer[i], 0);
		write_floats(layer[i], layer[i]->stack.x, 0, x, N * D);
		require_ok(stack_forward(&layer[i]->stack, &layer[i]->ctx));
		free(x);
		x = read_floats(layer[i], layer[i]->stack.y, 0, N * D);
	}
	for (int i = LAYERS - 1; i >= 0; i--) {
		int64_t count = stack_parameter_count(&stack->stack, i, PARAM_IN_PROJ);
		float *a = malloc((size_t)count * sizeof *a),
		      *b = malloc((size_t)count * sizeof *b);

		write_floats(layer[i], layer[i]->stack.dy, 0, dy, N * D);
		/* The context's workspace is the last one allocated; each fixture has its own. */
		require_ok(stack_backward(&layer[i]->stack, &layer[i]->ctx));
		free(dy);
		dy = read_floats(layer[i], layer[i]->stack.dx, 0, N * D);
		require_ok(stack_get_gradient(&stack->stack, i, PARAM_IN_PROJ, a));
		require_ok(stack_get_gradient(&layer[i]->stack, 0, PARAM_IN_PROJ, b));
		assert_true(float_error(count, a, b) < allowed);
		free(a);
		free(b);
	}
	float *y = read_floats(stack, stack->stack.y, 0, N * D);
	float *dx = read_floats(stack, stack->stack.dx, 0, N * D);
	assert_true(float_error(N * D, y, x) < allowed);
	assert_true(float_error(N * D, dx, dy) < allowed);
	free(x);
	free(y);
	free(dx);
	free(dy);
	fixture_close(stack);
	for (int i = 0; i < LAYERS; i++)
		fixture_close(layer[i]);
}

/* Without positions, attention does not see the order of the tokens before; with them it does. */
static void test_position_none(void **state)
{
	enum { T = 20, D = 48 };

	(void)state;
	for (int rope = 0; rope < 2; rope++) {
		struct stack_options options = small_options("attention");

		options.rope = rope;
		struct fixture *f = fixture_open(NULL, &options, prefill(1, T), 41);
		float *x = read_floats(f, f->stack.x, 0, 2 * D);
		fixture_run(f);
		float *before =
		        read_floats(f, f->stack.memory[0].saved[SAVED_MIX], 2 * D, (T - 2) * D);
		write_floats(f, f->stack.x, 0, x + D, D);
		write_floats(f, f->stack.x, D, x, D);
		fixture_run(f);
		float *after =
		        read_floats(f, f->stack.memory[0].saved[SAVED_MIX], 2 * D, (T - 2) * D);
		double change = float_error((T - 2) * D, after, before);
		assert_true(rope ? change > 1e-3 : change < 1e-6);
		free(x);
		free(before);
		free(after);
		fixture_close(f);
	}
}

/* RAT with G groups is RAT with a group per head whose q and k repeat: head h as h mod G. */
static void test_groups_are_tiled(void **state)
{
	enum { B = 2, T = 26, D = 48, H = 4, DH = D / H };

	(void)state;
	for (int64_t groups = 1; groups <= H; groups *= 2) {
		struct stack_options options = small_options("rat");

		options.groups = groups;
		struct fixture *shared = fixture_open(NULL, &options, prefill(B, T), 51);
		options.groups = H;
		struct fixture *full = fixture_open(NULL, &options, prefill(B, T), 51);
		int64_t rows = 3 * D + 2 * groups * DH, full_rows = 5 * D;
		float *from = malloc((size_t)(rows * D) * sizeof *from);
		float *to = malloc((size_t)(full_rows * D) * sizeof *to);
		assert_int_equal(stack_parameter_count(&shared->stack, 0, PARAM_IN_PROJ), rows * D);
		assert_int_equal(stack_parameter_count(&full->stack, 0, PARAM_IN_PROJ),
		                 full_rows * D);
		copy_parameters(shared, 0, shared, 0);
		require_ok(stack_get_parameter(&shared->stack, 0, PARAM_IN_PROJ, from));
		memcpy(to, from, sizeof(float) * 3 * D * D);
		for (int64_t i = 0; i < 2 * D; i++) {
			int64_t part = i / D, h = i % D / DH;
			int64_t row = 3 * D + (part * groups + h % groups) * DH + i % DH;

			memcpy(to + (3 * D + i) * D, from + row * D, sizeof(float) * D);
		}
		require_ok(stack_set_parameter(&full->stack, 0, PARAM_IN_PROJ, to));
		fixture_run(shared);
		fixture_run(full);
		float *a = read_floats(shared, shared->stack.y, 0, B * T * D);
		float *b = read_floats(full, full->stack.y, 0, B * T * D);
		assert_true(float_error(B * T * D, a, b) < allowed);
		free(a);
		free(b);
		free(from);
		free(to);
		fixture_close(shared);
		fixture_close(full);
	}
}

/* ---- the memory plan ---- */

/* A backend that surrounds what it hands out with guard words, and knows how much that is. */
enum { GUARD_BYTES = 4096, GUARD = 0xa5 };
static size_t guarded_bytes;
static char *guarded;

static enum status allocate_guarded(size_t bytes, void **memory)
{
	void *all;
	enum status status = cpu_backend.allocate(bytes + 2 * GUARD_BYTES, &all);

	if (status != STATUS_OK)
		return status;
	memset(all, GUARD, bytes + 2 * GUARD_BYTES);
	guarded = (char *)all + GUARD_BYTES;
	guarded_bytes = bytes;
	*memory = guarded;
	return STATUS_OK;
}

static void release_guarded(void *memory)
{
	cpu_backend.release((char *)memory - GUARD_BYTES);
}

static void expect_guards_whole(void)
{
	for (size_t i = 0; i < GUARD_BYTES; i++) {
		assert_int_equal((unsigned char)guarded[i - GUARD_BYTES], GUARD);
		assert_int_equal((unsigned char)guarded[guarded_bytes + i], GUARD);
	}
}

/* The padding behind a tensor must keep the guard bytes it was allocated with. */
static void expect_padding_whole(const void *tensor, size_t bytes)
{
	const unsigned char *byte = tensor;

	for (size_t i = bytes; tensor && i % 256 != 0; i++)
		if (byte[i] != GUARD && byte[i] != 0xff)
			fail_msg("byte %zu behind a tensor of %zu is %#x", i - bytes, bytes,
			         byte[i]);
}

typedef int (*spec_list)(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs);

static void expect_tensors_whole(const struct stack *stack, int layer, spec_list list,
                                 void *const *tensors)
{
	struct tensor_spec specs[MAX_TENSORS];
	int n = list(&stack->layers[layer], &stack->shape, specs);

	for (int i = 0; i < n; i++)
		expect_padding_whole(tensors[i], tensor_bytes(&specs[i], stack->backend));
}

static void expect_layers_whole(const struct stack *stack)
{
	size_t row = sizeof(float) * (size_t)stack->d_model;
	size_t activation = row * (size_t)(stack->shape.batch * stack->shape.seq_len);

	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_class *class = stack->layers[i].class;

		expect_tensors_whole(stack, i, class->saved, stack->memory[i].saved);
		expect_tensors_whole(stack, i, class->state, stack->memory[i].state);
		expect_padding_whole(stack->layer_x[i], activation);
		expect_padding_whole(stack->layer_dy[i], activation);
		for (int j = 0; j < MAX_TENSORS; j++)
			expect_padding_whole(stack->memory[i].grad[j],
			                     sizeof(float) *
			                             (size_t)stack_parameter_count(stack, i, j));
	}
}

static void test_plan_is_what_is_written(void **state)
{
	struct backend backend = cpu_backend;

	(void)state;
	backend.allocate = allocate_guarded;
	backend.release = release_guarded;
	for (int i = 0; pattern(i); i++)
		for (int pass = 0; pass < 3; pass++) {
			struct stack_options options = small_options(pattern(i));
			struct layer_shape shapes[] = {
			        prefill(3, 67), train(3, 67), {PASS_GENERATION, 3, 1, 67, 0}};
			struct fixture *f = fixture_open(&backend, &options, shapes[pass], 61);
			struct memory_plan plan;

			require_ok(stack_plan(&f->stack, &f->ctx, &shapes[pass], &plan, NULL));
			assert_int_equal(plan.total, guarded_bytes);
			assert_int_equal(plan.total, plan.parameters + plan.gradients + plan.state +
			                                     plan.saved + plan.scratch +
			                                     plan.activations + plan.workspace +
			                                     plan.logits);
			if (pass == 2)
				require_ok(stack_fill_state(&f->stack, 66, 1));
			fixture_run(f);
			expect_guards_whole();
			expect_layers_whole(&f->stack);
			fixture_close(f);
		}
}

/* Caches per sequence and layer, as the specification counts them. */
static void test_sizes_of_caches(void **state)
{
	enum { D = 64, H = 4, T = 64, W = 7, L = 16, N = 128 };
	static const struct {
		const char *pattern;
		size_t bytes;
	} cases[] = {
	        {"attention", 2 * T * D * 4},
	        {"swa:7", 2 * (W + 1) * D * 4},
	        {"swa:100", 2 * T * D * 4},
	        {"rat:16", 2 * (T / L) * D * 4 + 2 * D * 4},
	        {"recurrence", D * 4},
	        {"gla", H * (D / 2 / H) * (D / H) * 4},
	        {"linear_attention", H * (D / H) * (D / H) * 4},
	        {"retnet", H * (D / H) * (2 * D / H) * 4},
	        {"mamba2", H * N * (2 * D / H) * 4 + 3 * (2 * N + 2 * D) * 4},
	        {"hgrn", D * 4},
	        {"hgrn2", H * (D / H) * (D / H) * 4},
	        {"rat:16,recurrence", 2 * (T / L) * D * 4 + 2 * D * 4 + D * 4},
	};

	(void)state;
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		struct stack_options options = small_options(cases[i].pattern);
		struct stack *stack = calloc(1, sizeof *stack);
		struct context ctx = {.backend = &cpu_backend};
		struct layer_shape shape = {PASS_GENERATION, 3, 1, T, 0};
		struct memory_plan plan;

		options.d_model = D;
		require_ok(stack_configure(stack, &cpu_backend, &options));
		require_ok(stack_plan(stack, &ctx, &shape, &plan, NULL));
		assert_int_equal(plan.state, 3 * cases[i].bytes);
		free(stack);
	}
}

/* The plan counts the operations that run: projections and visible pairs of attention. */
static void test_plan_counts_work(void **state)
{
	enum { B = 2, T = 40, D = 48, H = 4 };
	struct stack_options options = small_options("attention");
	struct stack *stack = calloc(1, sizeof *stack);
	struct context ctx = {.backend = &cpu_backend};
	struct layer_shape shape = prefill(B, T);
	struct memory_plan plan;
	struct kernel_plan work;
	double pairs = B * T * (T + 1) / 2.0, flops = 0;

	(void)state;
	require_ok(stack_configure(stack, &cpu_backend, &options));
	require_ok(stack_plan(stack, &ctx, &shape, &plan, &work));
	for (int i = 0; i < work.n_operations; i++) {
		const struct planned_operation *p = &work.operations[i];

		flops += p->cost.flops * (double)p->count;
		if (p->operation == OP_ATTENTION)
			assert_true(p->cost.flops == 4.0 * D * pairs);
	}
	assert_true(fabs(work.total.flops / flops - 1) < 1e-12);
	assert_true(work.total.flops >= 2.0 * B * T * D * 4 * D + 4.0 * D * pairs);
	assert_true(work.total.bytes_written >= 4.0 * B * T * D * 5);
	shape.pass = PASS_GENERATION;
	shape.seq_len = 1;
	require_ok(stack_plan(stack, &ctx, &shape, &plan, &work));
	assert_true(work.total.bytes_read >= 2.0 * 4 * B * (T - 1) * D);
	free(stack);
}

static void expect_refused(const struct stack_options *options, const char *word)
{
	struct stack *stack = calloc(1, sizeof *stack);

	assert_int_equal(stack_configure(stack, &cpu_backend, options), STATUS_INVALID);
	assert_non_null(strstr(status_message(), word));
	assert_null(strchr(status_message(), '\n'));
	free(stack);
}

static void test_bad_options(void **state)
{
	struct stack_options options = small_options("attention,nonsense");

	(void)state;
	expect_refused(&options, "--pattern: no layer 'nonsense' (allowed: attention, swa");
	options = small_options("");
	expect_refused(&options, "--pattern");
	options = small_options("rat,");
	expect_refused(&options, "--pattern");
	options = small_options("rat:x");
	expect_refused(&options, "rat:x");
	options = small_options("rat:0");
	expect_refused(&options, "--chunk");
	options = small_options("rat:99999999999999999999");
	expect_refused(&options, "--pattern");
	options = small_options("recurrence:4");
	expect_refused(&options, "recurrence takes no number");
	options = small_options("attention");
	options.n_heads = 5;
	expect_refused(&options, "--heads");
	options.n_heads = -1;
	expect_refused(&options, "--heads");
	options.n_heads = 16;
	expect_refused(&options, "even width");
	options.n_heads = 4;
	options.d_model = 0;
	expect_refused(&options, "--d-model");
	options = small_options("rat");
	options.groups = 3;
	expect_refused(&options, "--groups");
	options = small_options("swa");
	options.window = -1;
	expect_refused(&options, "--window");
	options = small_options("gla");
	options.n_heads = 48;
	expect_refused(&options, "--heads");
	options = small_options("rat");
	options.n_layers = MAX_LAYERS + 1;
	expect_refused(&options, "layers");
}

/* HGRN's states, before their norm, among its saved tensors. */
enum { SAVED_OUT_OF_FAMILY = SAVED_OTHER + 4 };

/* RetNet's layer answers to the name of its mechanism. */
static void test_alias(void **state)
{
	(void)state;
	assert_non_null(layer_class_find("retnet"));
	assert_ptr_equal(layer_class_find("retention"), layer_class_find("retnet"));
	assert_null(layer_class_find("retentive"));
}

/*
 * HGRN with a bound of 0 and no norm to speak of is the gated linear recurrence with silu on its
 * input: both reduce to h_t = f h_{t-1} + (1-f) x. Here by their references' InProj columns: the
 * same logits, silu(i) for v.
 */
static void test_hgrn_is_a_gated_recurrence(void **state)
{
	enum { T = 29, D = 48 };
	struct stack_options options = small_options("hgrn");
	struct fixture *f = fixture_open(NULL, &options, prefill(1, T), 71);
	float bound[D], *h = malloc(sizeof(float) * T * D);

	(void)state;
	assert_non_null(h);
	for (int i = 0; i < D; i++)
		bound[i] = -80;
	for (int i = PARAM_OTHER; i < MAX_TENSORS; i++)
		if (i != PARAM_OTHER && stack_parameter_count(&f->stack, 0, i) == D)
			require_ok(stack_set_parameter(&f->stack, 0, i, bound));
	fixture_run(f);
	double *proj = projection_of(f, T, 3 * D);
	for (int64_t t = 0; t < T; t++)
		for (int64_t i = 0; i < D; i++) {
			double x = proj[t * 3 * D + i], gate = proj[t * 3 * D + D + i];
			double keep = 1 / (1 + exp(-gate)), input = x / (1 + exp(-x));

			h[t * D + i] =
			        (float)(keep * (t ? h[(t - 1) * D + i] : 0) + (1 - keep) * input);
		}
	float *out = read_floats(f, f->stack.memory[0].saved[SAVED_OUT_OF_FAMILY], 0, T * D);
	assert_true(float_error(T * D, out, h) < allowed);
	free(out);
	free(proj);
	free(h);
	fixture_close(f);
}

static void test_chunk_longer_than_sequence(void **state)
{
	struct stack_options options = small_options("attention,rat:33");
	struct stack *stack = calloc(1, sizeof *stack);
	struct context ctx = {.backend = &cpu_backend};
	struct layer_shape shape = prefill(1, 32);
	struct memory_plan plan;

	(void)state;
	require_ok(stack_configure(stack, &cpu_backend, &options));
	assert_int_equal(stack_plan(stack, &ctx, &shape, &plan, NULL), STATUS_UNSUPPORTED);
	assert_non_null(strstr(status_message(), "33"));
	shape = prefill(1, 33);
	require_ok(stack_plan(stack, &ctx, &shape, &plan, NULL));
	shape = (struct layer_shape){PASS_PREFILL, 1, 20, 33, 0};
	require_ok(stack_plan(stack, &ctx, &shape, &plan, NULL));
	free(stack);
}

static void test_default_heads(void **state)
{
	static const struct {
		int64_t d_model, heads;
	} cases[] = {{2048, 16}, {1024, 8}, {512, 8}, {256, 4}, {1088, 17}, {48, 1}};

	(void)state;
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		struct stack_options options = small_options("rat,gla");
		struct stack *stack = calloc(1, sizeof *stack);

		options.d_model = cases[i].d_model;
		options.n_heads = 0;
		options.groups = 1;
		require_ok(stack_configure(stack, &cpu_backend, &options));
		assert_int_equal(stack->layers[0].n_heads, cases[i].heads);
		assert_int_equal(stack->layers[1].n_heads, 4);
		free(stack);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_agrees_with_reference),
	        cmocka_unit_test(test_without_cache_or_residual),
	        cmocka_unit_test(test_single_token),
	        cmocka_unit_test(test_rat_of_chunk_1_is_attention),
	        cmocka_unit_test(test_rat_of_one_chunk_is_recurrence),
	        cmocka_unit_test(test_ragged_end_is_causal),
	        cmocka_unit_test(test_stack_is_its_layers),
	        cmocka_unit_test(test_position_none),
	        cmocka_unit_test(test_groups_are_tiled),
	        cmocka_unit_test(test_plan_is_what_is_written),
	        cmocka_unit_test(test_sizes_of_caches),
	        cmocka_unit_test(test_plan_counts_work),
	        cmocka_unit_test(test_bad_options),
	        cmocka_unit_test(test_alias),
	        cmocka_unit_test(test_hgrn_is_a_gated_recurrence),
	        cmocka_unit_test(test_chunk_longer_than_sequence),
	        cmocka_unit_test(test_default_heads),
	};

	return cmocka_run_group_tests(tests, stacks_setup, stacks_teardown);
}
