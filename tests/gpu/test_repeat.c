/*
 * Every kernel that claims nothing else gives the same bits twice, at sizes
 * that fill the device: whole blocks in prefill and generation, by each
 * provider of the operation that mixes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_backend.h"
#include "layers/stack.h"

struct subject {
	const char *pattern;
	enum pass pass;
	int64_t batch, seq_len;
	const char *provider; /* of the mixing operation; NULL: the default */
};

static const struct subject subjects[] = {
        {"attention", PASS_PREFILL, 2, 2047, "attention=portable"},
        {"attention", PASS_PREFILL, 2, 2047, "attention=hopper"},
        {"swa:100", PASS_PREFILL, 1, 3001, "attention=portable"},
        {"rat:16", PASS_PREFILL, 2, 2047, "portable"},
        {"rat:64", PASS_PREFILL, 2, 2047, NULL},
        {"recurrence", PASS_PREFILL, 1, 65537, NULL},
        {"gla", PASS_PREFILL, 1, 4097, NULL},
        {"linear_attention", PASS_PREFILL, 1, 4097, NULL},
        {"retnet", PASS_PREFILL, 1, 4097, NULL},
        {"mamba2", PASS_PREFILL, 1, 4097, NULL},
        {"hgrn", PASS_PREFILL, 1, 4097, NULL},
        {"hgrn2", PASS_PREFILL, 1, 4097, NULL},
        {"attention", PASS_GENERATION, 7, 1500, "attention_step=portable"},
        {"attention", PASS_GENERATION, 7, 1500, "attention_step=hopper"},
        {"rat:16", PASS_GENERATION, 7, 1500, "portable"},
        {"gla", PASS_GENERATION, 7, 1500, NULL},
        {"recurrence", PASS_GENERATION, 7, 1500, NULL},
        {"retnet", PASS_GENERATION, 7, 1500, NULL},
        {"mamba2", PASS_GENERATION, 7, 1500, NULL},
        {"hgrn", PASS_GENERATION, 7, 1500, NULL},
        {"hgrn2", PASS_GENERATION, 7, 1500, NULL},
};

static void require(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

/* The output of one run, in new memory. */
static void *run_once(struct stack *stack, struct context *ctx, const struct subject *s)
{
	const size_t bytes = (size_t)(s->batch * stack->shape.seq_len * stack->d_model) * 2;
	void *y = malloc(bytes);

	assert_non_null(y);
	if (s->pass == PASS_GENERATION)
		require(stack_fill_state(stack, s->seq_len - 1, 5));
	require(stack_poison(stack));
	require(stack_run(stack, ctx));
	require(cuda_backend.synchronize());
	require(cuda_backend.download(y, stack->y, bytes));
	return y;
}

static void check_subject(const struct subject *s)
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
	struct context ctx = {.backend = &cuda_backend};

	if (provider_choice_parse(&ctx.choice, &cuda_backend, s->provider ? s->provider : "") !=
	    STATUS_OK)
		return;
	require(stack_configure(&stack, &cuda_backend, &options));
	const enum status status = stack_allocate(&stack, &ctx, &shape);
	if (status != STATUS_UNSUPPORTED) {
		require(status);
		require(stack_initialize(&stack, 1));
		void *once = run_once(&stack, &ctx, s), *twice = run_once(&stack, &ctx, s);
		const size_t bytes = (size_t)(s->batch * shape.seq_len * stack.d_model) * 2;
		const bool equal = memcmp(once, twice, bytes) == 0;

		free(once);
		free(twice);
		if (!equal)
			fail_msg("%s %s by %s: two runs differ", s->pattern, pass_name(s->pass),
			         s->provider ? s->provider : "default");
	}
	stack_release(&stack);
}

static void test_repeat(void **state)
{
	(void)state;
	for (size_t i = 0; i < sizeof subjects / sizeof *subjects; i++)
		check_subject(&subjects[i]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_repeat)};

	if (cuda_backend.open(0) != STATUS_OK) {
		fprintf(stderr, "%s\n", status_message());
		return 1;
	}
	const int failed = cmocka_run_group_tests_name("cuda repeat", tests, NULL, NULL);
	cuda_backend.close();
	return failed;
}
