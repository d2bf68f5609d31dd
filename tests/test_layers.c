/* Layers and stacks in full-sequence passes: against the fp64 reference, against each other in the
 * limits where they must agree, and against what was planned for them. */
#include "tests/stacks.h"

#include "layers/mixing.h"

static const double allowed = 2e-5, allowed_row = 1e-4;

/* Beside each registered layer. */
static const char *const more[] = {"rat:1",
                                   "rat:64",
                                   "swa:0",
                                   "gla:1",
                                   "rat:5,swa:3",
                                   "attention,rat,recurrence",
                                   "attention(kv_heads=2)",
                                   "attention(kv_heads=1,position=none)",
                                   "swa(kv_heads=1)",
                                   "ratplus(dilation=4,window=6,initial=3)",
                                   "ratplus(dilation=1,window=2,initial=0)",
                                   "ratplus(dilation=0,window=5,initial=2)",
                                   "ratplus(dilation=0,window=9,initial=0)",
                                   "ratplus(dilation=16,window=0,initial=30)",
                                   NULL};

/* The same stack on the device and on its fp64 reference. */
struct pair {
	struct fixture *actual, *expected;
	const char *pattern;
	struct layer_shape shape;
};

static struct pair pair_open(const struct stack_options *options, struct layer_shape shape,
                             uint64_t seed)
{
	return (struct pair){fixture_open(cpu, options, shape, seed),
	                     fixture_open(cpu->reference, options, shape, seed), options->pattern,
	                     shape};
}

static void pair_close(struct pair *pair)
{
	fixture_close(pair->actual);
	fixture_close(pair->expected);
}

static void expect_small(const struct pair *p, const char *what, double error, double most)
{
	if (!(error < most))
		fail_msg("%s, %s, B=%lld T=%lld: %s differs by %g", p->pattern,
		         pass_name(p->shape.pass), (long long)p->shape.batch,
		         (long long)p->shape.seq_len, what, error);
}

/* `count` elements of one of a layer's tensors, as floats. */
static float *read_tensor(const struct fixture *f, const struct tensor_spec *spec, const void *from)
{
	struct device *device = f->ctx.device;
	size_t count = (size_t)tensor_count(spec);
	float *values = new_memory(count * sizeof *values);

	require_ok(device_download_floats(device, tensor_dtype(spec, device), values, from, count));
	return values;
}

/* Rows of an activation; what `base` holds is subtracted first (NULL: nothing). */
static void expect_rows(const struct pair *p, const char *what, const void *actual,
                        const void *expected, const void *base, const void *expected_base,
                        int64_t n_rows, int64_t width)
{
	scoped float *a = read_floats(p->actual, actual, 0, n_rows * width);
	scoped float *b = read_floats(p->expected, expected, 0, n_rows * width);

	if (base) {
		scoped float *from_a = read_floats(p->actual, base, 0, n_rows * width);
		scoped float *from_b = read_floats(p->expected, expected_base, 0, n_rows * width);

		for (int64_t i = 0; i < n_rows * width; i++) {
			a[i] -= from_a[i];
			b[i] -= from_b[i];
		}
	}
	expect_small(p, what, row_float_error(n_rows, width, a, b), allowed_row);
}

/* What enters OutProj of every layer, and y; of the first n_rows rows. */
static void expect_same_forward(const struct pair *p, int64_t n_rows)
{
	const struct stack *a = &p->actual->stack, *b = &p->expected->stack;

	for (int i = 0; i < a->n_layers; i++)
		expect_rows(p, "mix", a->memory[i].saved[SAVED_MIX], b->memory[i].saved[SAVED_MIX],
		            NULL, NULL, n_rows, mixing_width(&a->layers[i]));
	expect_rows(p, "y", a->y, b->y, NULL, NULL, n_rows, a->d_model);
}

static void expect_same_backward(const struct pair *p)
{
	const struct stack *a = &p->actual->stack, *b = &p->expected->stack;
	int64_t n_rows = p->shape.batch * p->shape.seq_len;

	for (int i = 0; i < a->n_layers; i++) {
		bool residual = a->layers[i].residual;

		expect_rows(p, "dx", a->layer_dy[i], b->layer_dy[i],
		            residual ? a->layer_dy[i + 1] : NULL, b->layer_dy[i + 1], n_rows,
		            a->d_model);
	}
	expect_small(p, "a gradient", worst_gradient_error(p->actual, p->expected), allowed_row);
}

static void expect_same_state(const struct pair *p)
{
	const struct stack *a = &p->actual->stack, *b = &p->expected->stack;
	struct tensor_spec specs[MAX_TENSORS];

	for (int i = 0; i < a->n_layers; i++) {
		const struct layer_config *config = &a->layers[i];

		for (int j = config->class->state(config, &a->shape, specs) - 1; j >= 0; j--) {
			if (!a->memory[i].state[j])
				continue;
			scoped float *left =
			        read_tensor(p->actual, &specs[j], a->memory[i].state[j]);
			scoped float *right =
			        read_tensor(p->expected, &specs[j], b->memory[i].state[j]);
			expect_small(p, specs[j].name,
			             float_error(tensor_count(&specs[j]), left, right), allowed);
		}
	}
}

/* Runs one pass of a pattern on both, and compares all that it has written. */
static void expect_agreement(const struct stack_options *options, struct layer_shape shape,
                             uint64_t seed)
{
	struct pair pair = pair_open(options, shape, seed);

	/* Slots that no token of a prompt fills are as they were. */
	require_ok(stack_fill_state(&pair.actual->stack, 0, seed));
	require_ok(stack_fill_state(&pair.expected->stack, 0, seed));
	fixture_run(pair.actual);
	fixture_run(pair.expected);
	expect_same_forward(&pair, shape.batch * shape.seq_len);
	expect_same_state(&pair);
	if (shape.pass == PASS_TRAIN)
		expect_same_backward(&pair);
	pair_close(&pair);
}

TEST(test_agrees_with_reference)
{
	static const int64_t lengths[] = {64, 67, 83, 130};

	for (int i = 0; pattern_at(more, i); i++)
		for (int j = 0; j < 4; j++) {
			struct stack_options options = small_options(pattern_at(more, i));

			options.rope = j != 2;
			expect_agreement(&options, shape_of(PASS_PREFILL, 1 + j % 3, lengths[j]),
			                 (uint64_t)j);
			expect_agreement(&options, shape_of(PASS_TRAIN, 1 + j % 3, lengths[j]),
			                 (uint64_t)j);
		}
}

/* A prompt, then token by token: every step's output, and the caches that the last one leaves. */
TEST(test_steps_agree_with_reference)
{
	enum { B = 2, T = 64, END = 77, D = 48 };

	for (int i = 0; pattern_at(more, i); i++) {
		struct stack_options options = small_options(pattern_at(more, i));
		struct layer_shape shape = {PASS_THROUGHPUT, B, T, END, 0};
		struct pair pair = pair_open(&options, shape, (uint64_t)i);
		struct fixture *both[] = {pair.actual, pair.expected};

		for (int j = 0; j < 2; j++) {
			require_ok(stack_fill_state(&both[j]->stack, 0, 1));
			require_ok(stack_forward(&both[j]->stack, &both[j]->ctx));
		}
		for (int64_t t = T; t < END; t++) {
			scoped float *x = random_floats((uint64_t)t, B * D);

			for (int j = 0; j < 2; j++) {
				write_floats(both[j], both[j]->stack.x, 0, x, B * D);
				require_ok(stack_set_position(&both[j]->stack, t));
				require_ok(stack_step(&both[j]->stack, &both[j]->ctx, t));
			}
			expect_same_forward(&pair, B);
		}
		expect_same_state(&pair);
		pair_close(&pair);
	}
}

TEST(test_without_cache_or_residual)
{
	for (int i = 0; pattern_at(more, i); i++) {
		struct stack_options options = small_options(pattern_at(more, i));
		struct layer_shape shape = shape_of(PASS_PREFILL, 2, 65);

		options.residual = options.prenorm = false;
		shape.capacity = 0;
		expect_agreement(&options, shape, 5);
		expect_agreement(&options, shape_of(PASS_TRAIN, 2, 65), 5);
	}
}

TEST(test_single_token)
{
	static const char *const patterns[] = {"attention", "swa", "recurrence", "gla:1", "rat:1"};

	for (int i = 0; i < 5; i++) {
		struct stack_options options = small_options(patterns[i]);

		expect_agreement(&options, shape_of(PASS_PREFILL, 3, 1), 7);
		/* The norm after gla's single token removes q.k, whose gradient is all rounding.
		 */
		if (strcmp(patterns[i], "gla:1") != 0)
			expect_agreement(&options, shape_of(PASS_TRAIN, 3, 1), 7);
	}
}

/* InProj's output of layer 0 as doubles. */
static double *projection_of(const struct fixture *f, int64_t n, int64_t width)
{
	float *floats = read_floats(f, f->stack.memory[0].saved[SAVED_PROJ], 0, n * width);
	double *values = new_memory((size_t)(n * width) * sizeof *values);

	for (int64_t i = 0; i < n * width; i++)
		values[i] = floats[i];
	free(floats);
	return values;
}

/* Of RAT's InProj with two groups: z, and q, gate-scaled k, v, one per head and rotated. */
enum { ONE_B = 2, ONE_T = 37, ONE_H = 4, ONE_D = 48, ONE_DH = ONE_D / ONE_H, ONE_G = 2 };
enum { ONE_N = ONE_B * ONE_T, ONE_P = 3 * ONE_D + 2 * ONE_G * ONE_DH };

static struct view one_view(double *heads)
{
	return (struct view){heads, ONE_T * ONE_D, ONE_D, ONE_DH};
}

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
	struct context reference = {.device = cpu->reference};
	const struct view heads_of_q = one_view(q), heads_of_k = one_view(k);
	const struct rotate_args rotate = {.batch = ONE_B,
	                                   .seq_len = ONE_T,
	                                   .n_heads = ONE_H,
	                                   .kv_heads = ONE_H,
	                                   .d_head = ONE_DH,
	                                   .rope = true,
	                                   .kv_slots = ONE_T,
	                                   .q = heads_of_q,
	                                   .k = heads_of_k,
	                                   .q_out = heads_of_q,
	                                   .k_out = heads_of_k};
	require_ok(run_rotate(&reference, &rotate));
}

/*
 * With L = 1 every token is its own chunk: it is attended to by all later ones
 * as (1-g) v and (1-g) k (k of group h mod G), the key rotated at its position
 * as q is; by itself through the product of the unrotated q and k, which is that of both
 * rotated at the same position. So RAT is causal attention over gate-scaled
 * k and v, its output times sigmoid(z).
 */
TEST(test_rat_of_chunk_1_is_attention)
{
	enum { COUNT = ONE_N * ONE_D };
	struct stack_options options = small_options("rat:1");
	scoped_fixture struct fixture *f =
	        fixture_open(NULL, &options, shape_of(PASS_TRAIN, ONE_B, ONE_T), 11);
	double *z = new_memory(5 * COUNT * sizeof *z), *out = z + COUNT;
	double *q = out + COUNT, *k = q + COUNT, *v = k + COUNT;
	float *expected = new_memory(sizeof(float) * COUNT), bias[ONE_D];

	require_ok(stack_forward(&f->stack, &f->ctx));
	require_ok(stack_get_parameter(&f->stack, 0, PARAM_OTHER, bias));
	scoped double *proj = projection_of(f, ONE_N, ONE_P);
	scale_by_gates(proj, bias, z, q, k, v);
	struct context reference = {.device = cpu->reference};
	const struct attention_args attention = {
	        .batch = ONE_B,
	        .n_heads = ONE_H,
	        .q_heads = ONE_H,
	        .kv_heads = ONE_H,
	        .d_head = ONE_DH,
	        .seq_len = ONE_T,
	        .kv_len = ONE_T,
	        .mask = MASK_CAUSAL,
	        .scale = 1 / sqrtf(ONE_DH),
	        .q = one_view(q),
	        .k = one_view(k),
	        .v = one_view(v),
	        .gate = one_view(z),
	        .out = one_view(out),
	};
	require_ok(run_attention(&reference, &attention));
	for (int64_t i = 0; i < COUNT; i++)
		expected[i] = (float)out[i];
	scoped float *mix = read_floats(f, f->stack.memory[0].saved[SAVED_MIX], 0, COUNT);
	assert_true(float_error(COUNT, mix, expected) < allowed);
	free(z);
	free(expected);
}

/* With L = T there is no chunk before, each token attends to itself alone, and sigmoid(z) times
 * the running value remains: the recurrence with the same z, v, g. */
TEST(test_rat_of_one_chunk_is_recurrence)
{
	enum { B = 2, T = 45, D = 48 };
	struct stack_options rat_options = small_options("rat:45");
	struct stack_options options = small_options("recurrence");
	scoped_fixture struct fixture *rat =
	        fixture_open(NULL, &rat_options, shape_of(PASS_PREFILL, B, T), 3);
	scoped_fixture struct fixture *recurrence =
	        fixture_open(NULL, &options, shape_of(PASS_PREFILL, B, T), 3);
	int64_t width = stack_parameter_count(&rat->stack, 0, PARAM_IN_PROJ);
	scoped float *values = new_memory((size_t)width * sizeof *values);

	for (int i = 0; i <= PARAM_OTHER; i++) {
		/* The recurrence's InProj is the first 3D rows of RAT's. */
		require_ok(stack_get_parameter(&rat->stack, 0, i, values));
		require_ok(stack_set_parameter(&recurrence->stack, 0, i, values));
	}
	fixture_run(rat);
	fixture_run(recurrence);
	scoped float *a = read_floats(rat, rat->stack.memory[0].saved[SAVED_MIX], 0, B * T * D);
	scoped float *b =
	        read_floats(recurrence, recurrence->stack.memory[0].saved[SAVED_MIX], 0, B * T * D);
	assert_true(float_error(B * T * D, a, b) < allowed);
}

/* Two devices of the backend are open beside the suite's: each runs a stack of its own, in turns,
 * and gives what the suite's gives; one is closed while the other goes on. */
TEST(test_several_devices)
{
	enum { B = 2, T = 40, D = 48, COUNT = B * T * D };
	const struct layer_shape shape = shape_of(PASS_TRAIN, B, T);
	struct stack_options options[] = {small_options("rat:6"), small_options("gla")};
	struct device *device[2], *none;
	struct fixture *f[2];
	float *expected[2];

	for (int i = 0; i < 2; i++) {
		scoped_fixture struct fixture *alone = fixture_open(NULL, &options[i], shape, 7);

		fixture_run(alone);
		expected[i] = read_floats(alone, alone->stack.dx, 0, COUNT);
		require_ok(cpu_backend.open("0", NULL, &device[i]));
		f[i] = fixture_open(device[i], &options[i], shape, 7);
	}
	for (int run = 0; run < 3; run++)
		for (int i = 0; i < 2; i++) {
			/* The third run is the second device's alone. */
			if (run == 2 && i == 0) {
				fixture_close(f[0]);
				device_close(device[0]);
				continue;
			}
			fixture_run(f[i]);
			scoped float *dx = read_floats(f[i], f[i]->stack.dx, 0, COUNT);
			assert_true(float_error(COUNT, dx, expected[i]) < allowed);
		}
	fixture_close(f[1]);
	device_close(device[1]);
	free(expected[0]);
	free(expected[1]);
	assert_int_equal(cpu_backend.open("1", NULL, &none), STATUS_INVALID);
}

/* The first rows of the output depend on the first rows of the input alone, wherever the sequence
 * ends inside a chunk. */
TEST(test_ragged_end_is_causal)
{
	enum { T = 70, D = 48 };
	static const int64_t cuts[] = {64, 65, 66, 69};

	for (int i = 0; pattern_at(more, i); i++) {
		struct stack_options options = small_options(pattern_at(more, i));
		scoped_fixture struct fixture *whole =
		        fixture_open(NULL, &options, shape_of(PASS_PREFILL, 1, T), 21);
		scoped float *x = read_floats(whole, whole->stack.x, 0, T * D);

		fixture_run(whole);
		scoped float *y = read_floats(whole, whole->stack.y, 0, T * D);
		for (int j = 0; j < 4; j++) {
			scoped_fixture struct fixture *cut = fixture_open(
			        NULL, &options, shape_of(PASS_PREFILL, 1, cuts[j]), 21);

			write_floats(cut, cut->stack.x, 0, x, cuts[j] * D);
			fixture_run(cut);
			scoped float *part = read_floats(cut, cut->stack.y, 0, cuts[j] * D);
			assert_true(float_error(cuts[j] * D, part, y) < 5e-7);
		}
	}
}

/* A stack's forward and backward are its layers', run one after another. */
TEST(test_stack_is_its_layers)
{
	enum { B = 2, T = 33, D = 48, N = B * T, LAYERS = 3 };
	static const char *const names[LAYERS] = {"rat:8", "swa:5", "gla:4"};
	struct stack_options options = small_options("rat:8,swa:5,gla:4");
	struct fixture *stack = fixture_open(NULL, &options, shape_of(PASS_TRAIN, B, T), 31),
	               *layer[LAYERS];
	float *x = read_floats(stack, stack->stack.x, 0, N * D);
	float *dy = read_floats(stack, stack->stack.dy, 0, N * D);

	fixture_run(stack);
	for (int i = 0; i < LAYERS; i++) {
		struct stack_options one = small_options(names[i]);

		layer[i] = fixture_open(NULL, &one, shape_of(PASS_TRAIN, B, T), 1);
		copy_parameters(stack, i, layer[i], 0);
		write_floats(layer[i], layer[i]->stack.x, 0, x, N * D);
		require_ok(stack_forward(&layer[i]->stack, &layer[i]->ctx));
		free(x);
		x = read_floats(layer[i], layer[i]->stack.y, 0, N * D);
	}
	for (int i = LAYERS - 1; i >= 0; i--) {
		int64_t count = stack_parameter_count(&stack->stack, i, PARAM_IN_PROJ);
		scoped float *a = malloc((size_t)count * sizeof *a),
		             *b = malloc((size_t)count * sizeof *b);

		write_floats(layer[i], layer[i]->stack.dy, 0, dy, N * D);
		/* The context's workspace is the last one allocated; each fixture has its own. */
		require_ok(stack_backward(&layer[i]->stack, &layer[i]->ctx));
		free(dy);
		dy = read_floats(layer[i], layer[i]->stack.dx, 0, N * D);
		require_ok(stack_get_gradient(&stack->stack, i, PARAM_IN_PROJ, a));
		require_ok(stack_get_gradient(&layer[i]->stack, 0, PARAM_IN_PROJ, b));
		assert_true(float_error(count, a, b) < allowed);
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
TEST(test_position_none)
{
	enum { T = 20, D = 48 };

	for (int rope = 0; rope < 2; rope++) {
		struct stack_options options = small_options("attention");

		options.rope = rope;
		scoped_fixture struct fixture *f =
		        fixture_open(NULL, &options, shape_of(PASS_PREFILL, 1, T), 41);
		scoped float *x = read_floats(f, f->stack.x, 0, 2 * D);
		fixture_run(f);
		scoped float *before =
		        read_floats(f, f->stack.memory[0].saved[SAVED_MIX], 2 * D, (T - 2) * D);
		write_floats(f, f->stack.x, 0, x + D, D);
		write_floats(f, f->stack.x, D, x, D);
		fixture_run(f);
		scoped float *after =
		        read_floats(f, f->stack.memory[0].saved[SAVED_MIX], 2 * D, (T - 2) * D);
		double change = float_error((T - 2) * D, after, before);
		assert_true(rope ? change > 1e-3 : change < 1e-6);
	}
}

/* RAT with G groups is RAT with a group per head whose q and k repeat: head h as h mod G. */
TEST(test_groups_are_tiled)
{
	enum { B = 2, T = 26, D = 48, H = 4, DH = D / H };

	for (int64_t groups = 1; groups <= H; groups *= 2) {
		struct stack_options options = small_options("rat");

		options.groups = groups;
		scoped_fixture struct fixture *shared =
		        fixture_open(NULL, &options, shape_of(PASS_PREFILL, B, T), 51);
		options.groups = H;
		scoped_fixture struct fixture *full =
		        fixture_open(NULL, &options, shape_of(PASS_PREFILL, B, T), 51);
		int64_t rows = 3 * D + 2 * groups * DH, full_rows = 5 * D;
		scoped float *from = malloc((size_t)(rows * D) * sizeof *from);
		scoped float *to = malloc((size_t)(full_rows * D) * sizeof *to);
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
		scoped float *a = read_floats(shared, shared->stack.y, 0, B * T * D);
		scoped float *b = read_floats(full, full->stack.y, 0, B * T * D);
		assert_true(float_error(B * T * D, a, b) < allowed);
	}
}

/* Attention with fewer heads of keys is attention whose heads of v and k repeat: head h reads
 * number h / (heads / kv_heads). */
TEST(test_keys_are_grouped_side_by_side)
{
	enum { B = 2, T = 26, D = 48, H = 4, DH = D / H };
	static const char *const patterns[] = {"attention", "swa"};

	for (int i = 0; i < 4; i++) {
		const int64_t kv = 1 + i / 2;
		struct stack_options options = small_options(patterns[i % 2]);

		options.kv_heads = kv;
		scoped_fixture struct fixture *shared =
		        fixture_open(NULL, &options, shape_of(PASS_PREFILL, B, T), 51);
		options.kv_heads = H;
		scoped_fixture struct fixture *full =
		        fixture_open(NULL, &options, shape_of(PASS_PREFILL, B, T), 51);
		const int64_t columns = kv * DH, rows = D + 2 * columns;
		scoped float *from = malloc((size_t)(rows * D) * sizeof *from);
		scoped float *to = malloc((size_t)(3 * D * D) * sizeof *to);

		assert_int_equal(stack_parameter_count(&shared->stack, 0, PARAM_IN_PROJ), rows * D);
		assert_int_equal(stack_parameter_count(&full->stack, 0, PARAM_IN_PROJ), 3 * D * D);
		copy_parameters(shared, 0, shared, 0);
		require_ok(stack_get_parameter(&shared->stack, 0, PARAM_IN_PROJ, from));
		for (int64_t row = 0; row < 3 * D; row++) {
			const int64_t block = row / D, h = row % D / DH;
			const int64_t grouped = h / (H / kv) * DH + row % DH;
			const int64_t source = block == 0   ? grouped
			                       : block == 1 ? columns + row % D
			                                    : columns + D + grouped;

			memcpy(to + row * D, from + source * D, sizeof(float) * D);
		}
		require_ok(stack_set_parameter(&full->stack, 0, PARAM_IN_PROJ, to));
		fixture_run(shared);
		fixture_run(full);
		scoped float *a = read_floats(shared, shared->stack.y, 0, B * T * D);
		scoped float *b = read_floats(full, full->stack.y, 0, B * T * D);
		assert_true(float_error(B * T * D, a, b) < allowed);
	}
}

/* ---- the memory plan ---- */

/* A stack of which nothing is allocated; to be freed. */
static struct stack *configured(const struct stack_options *options)
{
	struct stack *stack = calloc(1, sizeof *stack);

	assert_non_null(stack);
	require_ok(stack_configure(stack, cpu, options));
	return stack;
}

/* A backend that surrounds what it hands out with guard words, and knows how much that is. */
enum { GUARD_BYTES = 4096, GUARD = 0xa5 };
static size_t guarded_bytes;
static char *guarded;

static enum status allocate_guarded(struct device *device, size_t bytes, void **memory)
{
	void *all;
	enum status status = cpu_backend.allocate(device, bytes + 2 * GUARD_BYTES, &all);

	if (status != STATUS_OK)
		return status;
	memset(all, GUARD, bytes + 2 * GUARD_BYTES);
	guarded = (char *)all + GUARD_BYTES;
	guarded_bytes = bytes;
	*memory = guarded;
	return STATUS_OK;
}

static void release_guarded(struct device *device, void *memory)
{
	cpu_backend.release(device, (char *)memory - GUARD_BYTES);
}

static void expect_guards_whole(void)
{
	for (size_t i = 0; i < GUARD_BYTES; i++) {
		assert_int_equal((unsigned char)guarded[i - GUARD_BYTES], GUARD);
		assert_int_equal((unsigned char)guarded[guarded_bytes + i], GUARD);
	}
}

/* The padding after a tensor must keep the guard bytes it was allocated with. */
static void expect_padding_whole(const void *tensor, size_t bytes)
{
	const unsigned char *byte = tensor;

	for (size_t i = bytes; tensor && i % 256 != 0; i++)
		if (byte[i] != GUARD && byte[i] != 0xff)
			fail_msg("byte %zu after a tensor of %zu is %#x", i - bytes, bytes,
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
		expect_padding_whole(tensors[i], tensor_bytes(&specs[i], stack->device));
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

TEST(test_plan_is_what_is_written)
{
	struct backend backend = cpu_backend;
	struct device device = *cpu;

	device.backend = &backend;
	backend.allocate = allocate_guarded;
	backend.release = release_guarded;
	for (int i = 0; pattern_at(more, i); i++)
		for (int pass = 0; pass < 3; pass++) {
			struct stack_options options = small_options(pattern_at(more, i));
			struct layer_shape shapes[] = {shape_of(PASS_PREFILL, 3, 67),
			                               shape_of(PASS_TRAIN, 3, 67),
			                               {PASS_GENERATION, 3, 1, 67, 0}};
			scoped_fixture struct fixture *f =
			        fixture_open(&device, &options, shapes[pass], 61);
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
		}
}

/* Caches per sequence and layer, as the specification counts them. */
TEST(test_sizes_of_caches)
{
	enum { D = 64, H = 4, T = 64, W = 7, L = 16, N = 128 };
	static const struct {
		const char *pattern;
		size_t bytes;
	} cases[] = {
	        {"attention", 2 * T * D * 4},
	        {"swa:7", 2 * (W + 1) * D * 4},
	        {"swa:100", 2 * T * D * 4},
	        {"attention(kv_heads=1)", 2 * T * (D / H) * 4},
	        {"swa(window=7,kv_heads=2)", 2 * (W + 1) * 2 * (D / H) * 4},
	        {"rat:16", 2 * (T / L) * D * 4 + 2 * D * 4},
	        {"recurrence", D * 4},
	        {"gla", H * (D / 2 / H) * (D / H) * 4},
	        {"linear_attention", H * (D / H) * (D / H) * 4},
	        {"retnet", H * (D / H) * (2 * D / H) * 4},
	        {"mamba", 16 * 2 * D * 4 + 3 * 2 * D * 4},
	        {"mamba2", H * N * (2 * D / H) * 4 + 3 * (2 * N + 2 * D) * 4},
	        {"hgrn", D * 4},
	        {"hgrn2", H * (D / H) * (D / H) * 4},
	        {"delta_net", H * (D / H) * (D / H) * 4 + 3 * 3 * D * 4},
	        {"gated_delta_net", H * (D / H) * (2 * D / H) * 4 + 3 * 4 * D * 4},
	        {"kda", H * (D / H) * (D / H) * 4 + 3 * 3 * D * 4},
	        {"rwkv6", H * (D / 2 / H) * (D / H) * 4 + D * 4},
	        /* Of 64 tokens 4 and the last of every 16 are kept. */
	        {"ratplus(dilation=16,window=7,initial=4)", 2 * (8 + W + 1) * D * 4 + 2 * D * 4},
	        {"ratplus(dilation=1,window=99,initial=0)", 2 * (T + T) * D * 4 + 2 * D * 4},
	        {"ratplus(dilation=0,window=7,initial=0)", 2 * (1 + W + 1) * D * 4 + 2 * D * 4},
	        {"hawk", D * 4 + 3 * D * 4},
	        {"griffin_attention:8", 2 * 8 * (D / H) * 4},
	        {"rat:16,recurrence", 2 * (T / L) * D * 4 + 2 * D * 4 + D * 4},
	};

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		struct stack_options options = small_options(cases[i].pattern);
		struct context ctx = {.device = cpu};
		struct layer_shape shape = {PASS_GENERATION, 3, 1, T, 0};
		struct memory_plan plan;

		options.d_model = D;
		scoped struct stack *stack = configured(&options);
		require_ok(stack_plan(stack, &ctx, &shape, &plan, NULL));
		assert_int_equal(plan.state, 3 * cases[i].bytes);
	}
}

/* The plan counts the operations that run: projections and visible pairs of attention. */
TEST(test_plan_counts_work)
{
	enum { B = 2, T = 40, D = 48, H = 4 };
	struct stack_options options = small_options("attention");
	struct context ctx = {.device = cpu};
	struct layer_shape shape = shape_of(PASS_PREFILL, B, T);
	struct memory_plan plan;
	struct kernel_plan work;
	double pairs = B * T * (T + 1) / 2.0, flops = 0;

	scoped struct stack *stack = configured(&options);
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
}

static void expect_refused(const struct stack_options *options, const char *word)
{
	scoped struct stack *stack = new_memory(sizeof *stack);

	assert_int_equal(stack_configure(stack, cpu, options), STATUS_INVALID);
	expect_message(options->pattern, word);
}

TEST(test_bad_options)
{
	struct stack_options options = small_options("attention,nonsense");

	expect_refused(&options, "--pattern: no layer 'nonsense' (allowed: attention, swa");
	options = small_options("");
	expect_refused(&options, "--pattern");
	options = small_options("rat,");
	expect_refused(&options, "--pattern");
	options = small_options("rat:x");
	expect_refused(&options, "rat: chunk='x'");
	options = small_options("attention");
	options.n_heads = 5;
	expect_refused(&options, "attention: heads=5");
	options.n_heads = 16;
	expect_refused(&options, "even width");
	options.n_heads = 4;
	options.d_model = 0;
	expect_refused(&options, "--d-model");
	options = small_options("rat");
	options.groups = 3;
	expect_refused(&options, "rat: groups=3");
	options = small_options("gla");
	options.n_heads = 48;
	expect_refused(&options, "gla: heads=48");
	options = small_options("rat");
	options.n_layers = MAX_LAYERS + 1;
	expect_refused(&options, "layers");
}

/* HGRN's states, before their norm, among its saved tensors. */
enum { SAVED_OUT_OF_FAMILY = SAVED_OTHER + 4 };

/* RetNet's layer answers to the name of its mechanism. */
TEST(test_alias)
{
	assert_non_null(layer_class_find("retnet"));
	assert_ptr_equal(layer_class_find("retention"), layer_class_find("retnet"));
	assert_null(layer_class_find("retentive"));
}

/*
 * HGRN with a bound of 0 and no norm to speak of is the gated linear recurrence with silu on its
 * input: both reduce to h_t = f h_{t-1} + (1-f) x. Here by their references' InProj columns: the
 * same logits, silu(i) for v.
 */
TEST(test_hgrn_is_a_gated_recurrence)
{
	enum { T = 29, D = 48 };
	struct stack_options options = small_options("hgrn");
	scoped_fixture struct fixture *f =
	        fixture_open(NULL, &options, shape_of(PASS_PREFILL, 1, T), 71);
	float bound[D], *h = new_memory(sizeof(float) * T * D);

	for (int i = 0; i < D; i++)
		bound[i] = -80;
	for (int i = PARAM_OTHER; i < MAX_TENSORS; i++)
		if (i != PARAM_OTHER && stack_parameter_count(&f->stack, 0, i) == D)
			require_ok(stack_set_parameter(&f->stack, 0, i, bound));
	fixture_run(f);
	scoped double *proj = projection_of(f, T, 3 * D);
	for (int64_t t = 0; t < T; t++)
		for (int64_t i = 0; i < D; i++) {
			double x = proj[t * 3 * D + i], gate = proj[t * 3 * D + D + i];
			double keep = 1 / (1 + exp(-gate)), input = x / (1 + exp(-x));

			h[t * D + i] =
			        (float)(keep * (t ? h[(t - 1) * D + i] : 0) + (1 - keep) * input);
		}
	scoped float *out = read_floats(f, f->stack.memory[0].saved[SAVED_OUT_OF_FAMILY], 0, T * D);
	assert_true(float_error(T * D, out, h) < allowed);
	free(h);
}

TEST(test_chunk_longer_than_sequence)
{
	struct stack_options options = small_options("attention,rat:33");
	struct context ctx = {.device = cpu};
	struct layer_shape shape = shape_of(PASS_PREFILL, 1, 32);
	struct memory_plan plan;

	scoped struct stack *stack = configured(&options);
	assert_int_equal(stack_plan(stack, &ctx, &shape, &plan, NULL), STATUS_UNSUPPORTED);
	assert_non_null(strstr(status_message(), "33"));
	shape = shape_of(PASS_PREFILL, 1, 33);
	require_ok(stack_plan(stack, &ctx, &shape, &plan, NULL));
	shape = (struct layer_shape){PASS_PREFILL, 1, 20, 33, 0};
	require_ok(stack_plan(stack, &ctx, &shape, &plan, NULL));
}

TEST(test_default_heads)
{
	static const struct {
		int64_t d_model, heads;
	} cases[] = {{2048, 16}, {1024, 8}, {512, 8}, {256, 4}, {1088, 17}, {48, 1}};

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		struct stack_options options = small_options("rat,gla");

		options.d_model = cases[i].d_model;
		options.n_heads = 0;
		options.groups = 1;
		scoped struct stack *stack = configured(&options);
		assert_int_equal(stack->layers[0].n_heads, cases[i].heads);
		assert_int_equal(stack->layers[1].n_heads, 4);
	}
}

/* Two handles, a stack on each, run alternately: the results of one alone. */
TEST(test_two_devices)
{
	enum { T = 40, D = 48, RUNS = 3 };
	static const char *const patterns[] = {"rat:6,gla", "attention,mamba2"};
	struct device *devices[2];
	struct fixture *f[2];

	for (int i = 0; i < 2; i++) {
		struct stack_options options = small_options(patterns[i]);

		require_ok(cpu_backend.open("", NULL, &devices[i]));
		f[i] = fixture_open(devices[i], &options, shape_of(PASS_TRAIN, 2, T), 81);
	}
	for (int run = 0; run < 2 * RUNS; run++) {
		require_ok(stack_poison(&f[run % 2]->stack));
		fixture_run(f[run % 2]);
	}
	for (int i = 0; i < 2; i++) {
		struct stack_options options = small_options(patterns[i]);
		scoped_fixture struct fixture *alone =
		        fixture_open(cpu, &options, shape_of(PASS_TRAIN, 2, T), 81);

		fixture_run(alone);
		scoped float *y = read_floats(f[i], f[i]->stack.y, 0, 2 * T * D);
		scoped float *expected = read_floats(alone, alone->stack.y, 0, 2 * T * D);
		assert_memory_equal(y, expected, sizeof(float) * 2 * T * D);
		assert_true(worst_gradient_error(f[i], alone) == 0);
		fixture_close(f[i]);
	}
	for (int i = 0; i < 2; i++)
		device_close(devices[i]);
}
