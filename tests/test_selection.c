/* Which kernel runs, and what is said where none does. */
#include "tests/test.h"

#include "kernels/kernels.h"

static const char *too_wide(const struct device *device, const void *args)
{
	return ((const struct gelu_args *)args)->count > 100 ? "wider than 100" : NULL;
}

static const char *odd(const struct device *device, const void *args)
{
	return ((const struct gelu_args *)args)->count % 2 ? "width must be even" : NULL;
}

static const char *missing(const struct device *device, const void *args)
{
	return "the library is not built";
}

static enum status run(struct device *device, const void *args, void *workspace)
{
	return STATUS_OK;
}

static const struct kernel narrow[] = {{OP_GELU, "narrow", too_wide, NULL, run, false}, {0}};
static const struct kernel even[] = {{OP_GELU, "even", odd, NULL, run, false}, {0}};
static const struct kernel library[] = {{OP_GELU, "library", missing, NULL, run, false},
                                        {OP_ARGMAX, "library", missing, NULL, run, false},
                                        {0}};

/* What is said of an operation `count` wide, or who runs it; "" for any provider. */
static const char *selected(enum operation operation, int64_t count, const char *provider)
{
	static const struct kernel *const more[] = {even, library, NULL};
	scoped struct kernel *kernels = kernels_joined(narrow, more);
	struct device device = {.backend = &cpu_backend, .kernels = kernels};
	struct context ctx = {.device = &device};
	const struct gelu_args args = {.count = count};

	assert_non_null(kernels);
	device.others = kernels + kernels_count(narrow) + kernels_count(even);
	require_ok(provider_choice_parse(&ctx.choice, &device, provider));
	const struct kernel *kernel = kernel_select(&ctx, operation, &args);
	return kernel ? kernel->provider : status_message();
}

TEST(the_first_that_takes_it_runs)
{
	assert_string_equal(selected(OP_GELU, 99, ""), "narrow");
	assert_string_equal(selected(OP_GELU, 200, ""), "even");
	assert_string_equal(selected(OP_GELU, 99, "library"), "narrow");
}

/* A library that is missing is not why nothing of the backend's own takes it. */
TEST(the_reason_is_that_of_the_last_resort)
{
	assert_string_equal(selected(OP_GELU, 201, ""), "gelu on cpu: width must be even");
	assert_string_equal(selected(OP_GELU, 201, "narrow"), "gelu on cpu: width must be even");
	assert_string_equal(selected(OP_GELU, 201, "gelu=narrow"),
	                    "gelu from narrow on cpu: wider than 100");
}

TEST(a_library_speaks_for_itself)
{
	assert_string_equal(selected(OP_GELU, 201, "gelu=library"),
	                    "gelu from library on cpu: the library is not built");
	assert_string_equal(selected(OP_ARGMAX, 1, ""), "argmax on cpu: the library is not built");
	assert_string_equal(selected(OP_EMBEDDING, 1, ""), "embedding on cpu: no kernel");
}
