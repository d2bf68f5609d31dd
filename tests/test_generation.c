/* Generation step by step equals the full sequence, at every position, for every layer, from
 * prompts of every length, and for models with their caches. */
#include "tests/stacks.h"

static const double allowed = 2e-5;

enum { D = 48 };

/* Beside each registered layer. */
static const char *const more[] = {"swa:0",
                                   "swa:1",
                                   "swa:100",
                                   "gla:16",
                                   "rat:1",
                                   "rat:2",
                                   "rat:16",
                                   "rat:37",
                                   "rat:38",
                                   "rat:5,swa:3",
                                   "attention,recurrence,rat:8,gla:4",
                                   "ratplus(dilation=4,window=6,initial=3)",
                                   "ratplus(dilation=1,window=2,initial=0)",
                                   "ratplus(dilation=0,window=5,initial=2)",
                                   "ratplus(dilation=0,window=9,initial=0)",
                                   "ratplus(dilation=16,window=0,initial=30)",
                                   "attention(kv_heads=1)",
                                   "attention(kv_heads=2),swa(window=5,kv_heads=1)",
                                   NULL};

/* Token t of every sequence of [B, T, D]. */
static float *take_token(const float *all, int64_t batch, int64_t seq_len, int64_t t)
{
	float *one = new_memory((size_t)(batch * D) * sizeof *one);

	for (int64_t b = 0; b < batch; b++)
		memcpy(one + b * D, all + (b * seq_len + t) * D, D * sizeof *one);
	return one;
}

/* The first `count` tokens of every sequence. */
static float *take_prompt(const float *all, int64_t batch, int64_t seq_len, int64_t count)
{
	float *prompt = new_memory((size_t)(batch * count * D) * sizeof *prompt);

	for (int64_t b = 0; b < batch; b++)
		memcpy(prompt + b * count * D, all + b * seq_len * D,
		       (size_t)(count * D) * sizeof *prompt);
	return prompt;
}

static void expect_token(const struct fixture *f, int64_t batch, int64_t seq_len, int64_t t,
                         const float *all, const char *layers)
{
	scoped float *expected = take_token(all, batch, seq_len, t);
	scoped float *actual = read_floats(f, f->stack.y, 0, batch * D);
	double error = float_error(batch * D, actual, expected);

	if (!(error < allowed))
		fail_msg("%s, B=%lld: token %lld differs by %g", layers, (long long)batch,
		         (long long)t, error);
}

/* Prefills `prompt` of T tokens, generates the others, and compares each with the full run. */
static void generate(const struct stack_options *options, int64_t batch, int64_t seq_len,
                     int64_t prompt, int64_t capacity)
{
	struct layer_shape whole = {PASS_PREFILL, batch, seq_len, capacity, 0};
	struct layer_shape steps = {PASS_THROUGHPUT, batch, prompt, capacity, 0};
	scoped_fixture struct fixture *full = fixture_open(NULL, options, whole, 71);
	scoped_fixture struct fixture *f = fixture_open(NULL, options, steps, 71);
	scoped float *x = read_floats(full, full->stack.x, 0, batch * seq_len * D);
	scoped float *start = take_prompt(x, batch, seq_len, prompt);

	fixture_run(full);
	scoped float *y = read_floats(full, full->stack.y, 0, batch * seq_len * D);
	write_floats(f, f->stack.x, 0, start, batch * prompt * D);
	require_ok(stack_forward(&f->stack, &f->ctx));
	for (int64_t t = prompt; t < seq_len; t++) {
		scoped float *token = take_token(x, batch, seq_len, t);

		write_floats(f, f->stack.x, 0, token, batch * D);
		require_ok(stack_set_position(&f->stack, t));
		require_ok(stack_step(&f->stack, &f->ctx, t));
		expect_token(f, batch, seq_len, t, y, options->pattern);
	}
}

TEST(test_every_position)
{
	for (int i = 0; pattern_at(more, i); i++) {
		struct stack_options options = small_options(pattern_at(more, i));

		generate(&options, 2, 40, 1, 40);
		options.rope = false;
		generate(&options, 1, 39, 1, 50);
	}
}

TEST(test_prompts_of_any_length)
{
	static const int64_t prompts[] = {2, 5, 6, 7, 8, 15, 16, 17, 33};

	for (int i = 0; pattern_at(more, i); i++)
		for (int j = 0; j < 9; j++) {
			struct stack_options options = small_options(pattern_at(more, i));

			generate(&options, 1 + j % 3, 38, prompts[j], 38 + j);
		}
}

/* Every number of groups, and heads of other widths. */
TEST(test_groups)
{
	for (int64_t heads = 1; heads <= 8; heads *= 2)
		for (int64_t groups = 1; groups <= heads; groups *= 2) {
			struct stack_options options = small_options("rat:5");

			options.n_heads = heads;
			options.groups = groups;
			generate(&options, 2, 18, 3, 18);
		}
}

/* ---- models ---- */

enum { VOCAB = 50 };

static struct stack_options model_options(const char *layers)
{
	struct stack_options options = small_options(layers);

	options.vocab = VOCAB;
	options.ffn = true;
	options.n_layers = 3;
	return options;
}

/* Copies every parameter: models of different shapes are initialized alike but for nothing. */
static void copy_model(const struct fixture *from, struct fixture *to)
{
	for (int i = 0; i < from->stack.n_layers; i++)
		copy_parameters(from, i, to, i);
	copy_parameters(from, LAYER_MODEL, to, LAYER_MODEL);
}

static int32_t *read_tokens(const struct fixture *f, int64_t batch)
{
	int32_t *tokens = new_memory((size_t)batch * sizeof *tokens);

	require_ok(device_download(f->ctx.device, tokens, f->stack.next,
	                           (size_t)batch * sizeof *tokens));
	return tokens;
}

static int32_t likeliest(const float *logits)
{
	int32_t best = 0;

	for (int32_t v = 1; v < VOCAB; v++)
		best = logits[v] > logits[best] ? v : best;
	return best;
}

/* Logits of the last of `count` tokens of each sequence, by a run over all of them. */
static float *full_logits(const struct stack_options *options, const struct fixture *model,
                          const int32_t *tokens, int64_t batch, int64_t seq_len, int64_t count)
{
	struct layer_shape shape = {PASS_PREFILL, batch, count, 64, 0};
	struct fixture *f = fixture_open(NULL, options, shape, 5);
	int32_t *start = new_memory((size_t)(batch * count) * sizeof *start);

	for (int64_t b = 0; b < batch; b++)
		memcpy(start + b * count, tokens + b * seq_len, (size_t)count * sizeof *start);
	copy_model(model, f);
	require_ok(stack_set_tokens(&f->stack, start));
	fixture_run(f);
	float *logits = read_floats(f, f->stack.logits, 0, batch * VOCAB);
	free(start);
	fixture_close(f);
	return logits;
}

/* Checks the model's logits and the token it chose; records the choice at position t. */
static void expect_choice(const struct stack_options *options, const struct fixture *model,
                          int32_t *tokens, int64_t batch, int64_t seq_len, int64_t t)
{
	scoped float *expected = full_logits(options, model, tokens, batch, seq_len, t);
	scoped float *actual = read_floats(model, model->stack.logits, 0, batch * VOCAB);
	int32_t *next = read_tokens(model, batch), position;
	double error = float_error(batch * VOCAB, actual, expected);

	if (!(error < allowed))
		fail_msg("%s: logits after token %lld differ by %g", options->pattern, (long long)t,
		         error);
	require_ok(device_download(model->ctx.device, &position, model->stack.position,
	                           sizeof position));
	assert_int_equal(position, t);
	for (int64_t b = 0; b < batch; b++) {
		assert_int_equal(next[b], likeliest(actual + b * VOCAB));
		if (t < seq_len)
			tokens[b * seq_len + t] = next[b];
	}
	free(next);
}

static void generate_text(const char *layers, int64_t micro_batch)
{
	enum { B = 5, PROMPT = 9, T = 24 };
	struct stack_options options = model_options(layers);
	struct layer_shape shape = {PASS_THROUGHPUT, B, PROMPT, T, micro_batch};
	scoped_fixture struct fixture *model = fixture_open(NULL, &options, shape, 81);
	int32_t tokens[B * T], prompt[B * PROMPT];

	for (int i = 0; i < B * PROMPT; i++) {
		prompt[i] = (i * 17 + 3) % VOCAB;
		tokens[i / PROMPT * T + i % PROMPT] = prompt[i];
	}
	require_ok(stack_set_tokens(&model->stack, prompt));
	require_ok(stack_forward(&model->stack, &model->ctx));
	expect_choice(&options, model, tokens, B, T, PROMPT);
	for (int64_t t = PROMPT; t < T; t++) {
		require_ok(stack_step(&model->stack, &model->ctx, t));
		expect_choice(&options, model, tokens, B, T, t + 1);
	}
}

TEST(test_models_generate)
{
	generate_text("attention", 0);
	generate_text("rat:6,swa:7", 0);
	generate_text("recurrence", 0);
	generate_text("gla", 0);
	generate_text("attention(kv_heads=1),swa(kv_heads=2)", 2);
	generate_text("ratplus(dilation=3,window=4,initial=2)", 0);
}

/* Prompts taken a few sequences at a time fill the same caches. */
TEST(test_micro_batches)
{
	generate_text("attention,rat:4,gla:8", 1);
	generate_text("rat:6,swa:7", 2);
	generate_text("recurrence", 4);
	generate_text("attention", 5);
	generate_text("swa", 9);
	generate_text("ratplus(dilation=3,window=4,initial=2)", 2);
}

/* One run of a throughput stack ends with as many tokens picked as were asked for. */
TEST(test_throughput_run)
{
	enum { B = 3, PROMPT = 10, T = 30 };
	struct stack_options options = model_options("rat:4");
	struct layer_shape shape = {PASS_THROUGHPUT, B, PROMPT, T, 2};
	scoped_fixture struct fixture *model = fixture_open(NULL, &options, shape, 91);
	struct memory_plan plan;
	struct kernel_plan work;
	int32_t position;

	require_ok(stack_plan(&model->stack, &model->ctx, &shape, &plan, &work));
	for (int i = 0; i < work.n_operations; i++)
		if (work.operations[i].operation == OP_RAT_STEP)
			assert_int_equal(work.operations[i].count, 3 * (T - PROMPT - 1));
	fixture_run(model);
	require_ok(device_download(model->ctx.device, &position, model->stack.position,
	                           sizeof position));
	assert_int_equal(position, T - 1);
}
