/* What bench-kernels compares before it times: right results pass, wrong ones do not. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "bench/kernel.h"

enum { SEED = 7, ROWS = 64 };

static const double tolerance = 1e-4;

/* A kind at a size that has several pairs, chunks and tiles. */
static struct bench_case small_case(const struct kernel_kind *kind, int64_t chunk, int64_t window)
{
	struct bench_case c = {.batch = 3,
	                       .seq_len = 96,
	                       .n_heads = 4,
	                       .groups = 2,
	                       .d_head = 16,
	                       .d_k = kind->half_keys ? 8 : 16,
	                       .d_v = kind->widening ? 48 : 16,
	                       .chunk = chunk,
	                       .window = window};

	snprintf(c.block, sizeof c.block, "%s", kind->name);
	return c;
}

struct fixture {
	struct kernel_problem problem;
	struct context ctx;
	struct kernel_plan plan;
	char *memory;
};

static struct fixture *open_fixture(const struct bench_case *c)
{
	static char nowhere[256] __attribute__((aligned(256)));
	struct fixture *f = calloc(1, sizeof *f);
	struct kernel_problem *p = &f->problem;
	void *memory;

	assert_non_null(f);
	f->ctx = (struct context){.backend = &cpu_backend, .plan = &f->plan};
	kernel_problem_build(p, &cpu_backend, c, nowhere);
	assert_int_equal(kernel_run(&f->ctx, p->kind->operation, &p->args), STATUS_OK);
	assert_int_equal(cpu_backend.allocate(p->bytes + f->plan.workspace_bytes, &memory),
	                 STATUS_OK);
	f->memory = memory;
	kernel_problem_build(p, &cpu_backend, c, f->memory);
	f->ctx = (struct context){.backend = &cpu_backend,
	                          .workspace = f->memory + p->bytes,
	                          .workspace_bytes = f->plan.workspace_bytes};
	assert_int_equal(kernel_problem_fill(p, SEED), STATUS_OK);
	return f;
}

static void close_fixture(struct fixture *f)
{
	kernel_problem_release(&f->problem);
	cpu_backend.release(f->memory);
	free(f);
}

static void launch(struct fixture *f)
{
	assert_int_equal(kernel_problem_poison(&f->problem), STATUS_OK);
	assert_int_equal(kernel_problem_keep(&f->problem, SEED), STATUS_OK);
	assert_int_equal(kernel_run(&f->ctx, f->problem.kind->operation, &f->problem.args),
	                 STATUS_OK);
}

static double error(struct fixture *f)
{
	double rel_err = NAN;

	assert_int_equal(kernel_problem_check(&f->problem, ROWS, SEED, &rel_err), STATUS_OK);
	return rel_err;
}

/* Every output and every state, changed by a factor: each alone must be noticed. */
static void expect_noticed(struct fixture *f, float factor)
{
	for (int i = 0; i < f->problem.n_operands; i++) {
		const struct operand *o = &f->problem.operand[i];

		if (o->role == OPERAND_INPUT)
			continue;
		launch(f);
		for (int64_t j = 0; j < o->count; j++)
			((float *)o->data)[j] *= factor;
		assert_true(error(f) > 10 * tolerance);
	}
}

/* A NaN anywhere, even in a row that is not compared. */
static void expect_nan_noticed(struct fixture *f)
{
	for (int i = 0; i < f->problem.n_operands; i++) {
		const struct operand *o = &f->problem.operand[i];

		if (o->role == OPERAND_INPUT)
			continue;
		launch(f);
		((float *)o->data)[o->count / 3] = NAN;
		assert_true(isinf(error(f)));
	}
}

static void check_case(const struct bench_case *c)
{
	struct fixture *f = open_fixture(c);

	/* Twice: states move on, and what is expected of the others is kept. */
	for (int i = 0; i < 2; i++) {
		launch(f);
		assert_true(error(f) < tolerance);
	}
	expect_noticed(f, 1.05f);
	expect_noticed(f, 0);
	expect_nan_noticed(f);
	close_fixture(f);
}

static void test_kinds(void **state)
{
	(void)state;
	for (const struct kernel_kind *kind = kernel_kinds; kind->name; kind++) {
		const bool chunks =
		        kind->operation == OP_RAT_SCAN || kind->operation == OP_RAT_STEP;
		const struct bench_case c = small_case(kind, chunks ? 16 : NO_VALUE, NO_VALUE);

		print_message("%s\n", kind->name);
		check_case(&c);
	}
}

static void test_masks(void **state)
{
	const struct kernel_kind *kind = kernel_kind_find("attention_forward");
	const struct bench_case window = small_case(kind, NO_VALUE, 20);
	const struct bench_case chunks = small_case(kind, 16, NO_VALUE);

	(void)state;
	check_case(&window);
	check_case(&chunks);
}

/* A slot of the cache that a step leaves as it was. */
static void test_slot(void **state)
{
	static const char *const kinds[] = {"attention_decode", "rat_decode"};

	(void)state;
	for (int i = 0; i < 2; i++) {
		const struct bench_case c =
		        small_case(kernel_kind_find(kinds[i]), i ? 16 : NO_VALUE, NO_VALUE);
		struct fixture *f = open_fixture(&c);

		launch(f);
		assert_true(error(f) < tolerance);
		assert_int_equal(kernel_problem_keep(&f->problem, SEED), STATUS_OK);
		assert_false(error(f) < tolerance);
		close_fixture(f);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_kinds),
	        cmocka_unit_test(test_masks),
	        cmocka_unit_test(test_slot),
	};

	if (cpu_backend.open(0) != STATUS_OK)
		return 1;
	return cmocka_run_group_tests(tests, NULL, NULL);
}
