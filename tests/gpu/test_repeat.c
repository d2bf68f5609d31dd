/*
 * On a device that is to be deterministic every kernel gives the same bits twice, at sizes
 * that fill it: whole blocks in prefill, training and generation, by each
 * provider of the operation that mixes. And many times in a row at small
 * sizes that no tile divides, where a lost turn of a ring would show:
 *
 *   REPEATS=10000 test_repeat test_many_repeats
 *
 * runs each block that often, and only the test of that name.
 */
#include "tests/gpu/gpu.h"

#include "layers/stack.h"

struct subject {
	const char *pattern;
	enum pass pass;
	int64_t batch, seq_len;
	const char *provider; /* of the mixing operation; NULL: the default */
};

enum { DEFAULT_REPEATS = 200 };

static const struct subject subjects[] = {
        {"attention", PASS_PREFILL, 2, 2047, "attention=portable"},
        {"attention", PASS_PREFILL, 2, 2047, "attention=hopper"},
        {"swa:100", PASS_PREFILL, 1, 3001, "attention=portable"},
        {"rat:16", PASS_PREFILL, 2, 2047, "portable"},
        {"rat:64", PASS_PREFILL, 2, 2047, NULL},
        {"rat:3000", PASS_PREFILL, 1, 9001, "hopper"},
        {"ratplus", PASS_PREFILL, 2, 3001, NULL},
        {"recurrence", PASS_PREFILL, 1, 65537, "portable"},
        {"recurrence", PASS_PREFILL, 1, 65537, "hopper"},
        {"recurrence", PASS_PREFILL, 9, 3001, "hopper"},
        {"gla", PASS_PREFILL, 1, 4097, NULL},
        {"linear_attention", PASS_PREFILL, 1, 4097, NULL},
        {"retnet", PASS_PREFILL, 1, 4097, NULL},
        {"mamba2", PASS_PREFILL, 1, 4097, NULL},
        {"hgrn", PASS_PREFILL, 1, 4097, NULL},
        {"hgrn2", PASS_PREFILL, 1, 4097, NULL},
        {"delta_net", PASS_PREFILL, 1, 4097, NULL},
        {"gated_delta_net", PASS_PREFILL, 1, 4097, NULL},
        {"kda", PASS_PREFILL, 1, 4097, NULL},
        {"rwkv6", PASS_PREFILL, 1, 4097, NULL},
        {"hawk", PASS_PREFILL, 1, 4097, NULL},
        {"attention", PASS_TRAIN, 2, 2047, "portable"},
        {"attention(kv_heads=1)", PASS_TRAIN, 2, 2047, "portable"},
        {"attention", PASS_TRAIN, 2, 2047, "attention_backward=hopper"},
        {"attention", PASS_TRAIN, 1, 16385, "attention_backward=hopper"},
        {"attention(kv_heads=2)", PASS_TRAIN, 2, 5001, "attention_backward=hopper"},
        {"swa:100", PASS_TRAIN, 2, 2047, "attention_backward=hopper"},
        {"swa:100", PASS_TRAIN, 2, 2047, "portable"},
        {"rat:16", PASS_TRAIN, 2, 2047, "attention_backward=hopper"},
        {"rat:16", PASS_TRAIN, 1, 40001, "attention_backward=hopper"},
        {"rat:16", PASS_TRAIN, 2, 2047, "portable"},
        {"ratplus", PASS_TRAIN, 2, 2047, NULL},
        {"recurrence", PASS_TRAIN, 1, 65537, "portable"},
        {"gla", PASS_TRAIN, 1, 2049, NULL},
        {"linear_attention", PASS_TRAIN, 9, 3001, NULL},
        {"retnet", PASS_TRAIN, 1, 4097, NULL},
        {"mamba2", PASS_TRAIN, 1, 4097, NULL},
        {"mamba2", PASS_TRAIN, 3, 3001, NULL},
        {"hgrn2", PASS_TRAIN, 9, 2049, NULL},
        {"hawk", PASS_TRAIN, 1, 2049, NULL},
        {"griffin_attention:100", PASS_TRAIN, 2, 2047, "portable"},
        {"attention", PASS_GENERATION, 7, 1500, "attention_step=portable"},
        {"attention", PASS_GENERATION, 7, 1500, "attention_step=hopper"},
        {"attention(kv_heads=1)", PASS_GENERATION, 7, 1500, "attention_step=hopper"},
        {"rat:16", PASS_GENERATION, 7, 1500, "portable"},
        {"rat:16", PASS_GENERATION, 7, 1500, "hopper"},
        {"rat:16", PASS_GENERATION, 1, 60001, NULL},
        {"ratplus", PASS_GENERATION, 7, 6001, NULL},
        {"attention", PASS_GENERATION, 1, 6001, NULL},
        /* So many that the last pairs are cut, at a time when every block streams. */
        {"attention(kv_heads=2)", PASS_GENERATION, 512, 4096, NULL},
        {"attention(kv_heads=8)", PASS_GENERATION, 256, 4096, NULL},
        {"gla", PASS_GENERATION, 7, 1500, NULL},
        {"recurrence", PASS_GENERATION, 7, 1500, NULL},
        {"retnet", PASS_GENERATION, 7, 1500, NULL},
        {"mamba2", PASS_GENERATION, 7, 1500, NULL},
        {"hgrn", PASS_GENERATION, 7, 1500, NULL},
        {"hgrn2", PASS_GENERATION, 7, 1500, NULL},
        {"delta_net", PASS_GENERATION, 7, 1500, NULL},
        {"gated_delta_net", PASS_GENERATION, 7, 1500, NULL},
        {"kda", PASS_GENERATION, 7, 1500, NULL},
        {"griffin", PASS_GENERATION, 7, 1500, NULL},
};

static const struct subject small_subjects[] = {
        {"attention", PASS_PREFILL, 3, 333, "attention=hopper"},
        {"swa:100", PASS_PREFILL, 2, 513, "attention=hopper"},
        {"rat:16", PASS_PREFILL, 2, 777, "attention=hopper"},
        {"rat:2", PASS_PREFILL, 1, 999, "attention=hopper"},
        {"mamba2", PASS_TRAIN, 2, 777, NULL},
        {"rat:2", PASS_GENERATION, 1, 5001, NULL},
        {"attention", PASS_GENERATION, 5, 999, NULL},
};

static size_t output_bytes(const struct stack *stack, const struct subject *s)
{
	return (size_t)(s->batch * stack->shape.seq_len * stack->d_model) * 2;
}

/* What is compared: y, or in training dx. */
static void *output(const struct stack *stack)
{
	return stack->shape.pass == PASS_TRAIN ? stack->dx : stack->y;
}

/* The output of one run, which finds NaN there. */
static void run_once(struct stack *stack, struct context *ctx, const struct subject *s, void *y)
{
	const size_t bytes = output_bytes(stack, s);

	if (s->pass == PASS_GENERATION)
		require_ok(stack_fill_state(stack, s->seq_len - 1, 5));
	require_ok(device_fill(device, output(stack), 0xff, bytes));
	require_ok(stack_run(stack, ctx));
	require_ok(device_synchronize(device));
	require_ok(device_download(device, y, output(stack), bytes));
}

/* Runs again `repeats` times; NULL, or how the outputs differ. */
static const char *difference(struct stack *stack, struct context *ctx, const struct subject *s,
                              int repeats)
{
	const size_t bytes = output_bytes(stack, s);
	void *once = new_memory(bytes), *again = new_memory(bytes);
	static char text[80];
	int n_different = 0;

	require_ok(stack_poison(stack));
	run_once(stack, ctx, s, once);
	for (int i = 0; i < repeats; i++) {
		if (i == 0)
			require_ok(stack_poison(stack));
		run_once(stack, ctx, s, again);
		n_different += memcmp(once, again, bytes) != 0;
	}
	free(once);
	free(again);
	snprintf(text, sizeof text, "%d of %d further runs differ", n_different, repeats);
	return n_different ? text : NULL;
}

static void check_subject(const struct subject *s, int repeats)
{
	static struct stack stack;
	const struct stack_options options = {.pattern = s->pattern,
	                                      .d_model = 1024,
	                                      .window = 1024,
	                                      .groups = 2,
	                                      .train_len = s->seq_len,
	                                      .rope = true,
	                                      .prenorm = true,
	                                      .residual = true,
	                                      .norm_eps = 1e-6f};
	const struct layer_shape shape = {
	        .pass = s->pass,
	        .batch = s->batch,
	        .seq_len = s->pass == PASS_GENERATION ? 1 : s->seq_len,
	        .capacity = s->seq_len,
	};
	struct context ctx = {.device = device};
	const char *complaint = NULL;

	if (provider_choice_parse(&ctx.choice, device, s->provider ? s->provider : "") != STATUS_OK)
		return;
	device->deterministic = true;
	require_ok(stack_configure(&stack, device, &options));
	const enum status status = stack_allocate(&stack, &ctx, &shape);
	if (status != STATUS_UNSUPPORTED) {
		require_ok(status);
		require_ok(stack_initialize(&stack, 1));
		complaint = difference(&stack, &ctx, s, repeats);
	}
	stack_release(&stack);
	if (complaint)
		fail_msg("%s %s by %s: %s", s->pattern, pass_name(s->pass),
		         s->provider ? s->provider : "default", complaint);
}

TEST(test_repeat)
{
	for (size_t i = 0; i < COUNT_OF(subjects); i++)
		check_subject(&subjects[i], 1);
}

TEST(test_many_repeats)
{
	const char *repeats = getenv("REPEATS");

	for (size_t i = 0; i < COUNT_OF(small_subjects); i++)
		check_subject(&small_subjects[i], repeats ? atoi(repeats) : DEFAULT_REPEATS);
}
