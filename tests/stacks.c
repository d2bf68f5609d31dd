/* What the tests of layers share. */
#include "tests/stacks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>

#include "layers/noise.h"

int stacks_setup(void **state)
{
	(void)state;
	return cpu_backend.open(0) == STATUS_OK ? 0 : -1;
}

int stacks_teardown(void **state)
{
	(void)state;
	cpu_backend.close();
	return 0;
}

void require_ok(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

struct stack_options small_options(const char *pattern)
{
	return (struct stack_options){
	        .pattern = pattern,
	        .d_model = 48,
	        .n_heads = 4,
	        .chunk = 6,
	        .window = 7,
	        .groups = 2,
	        .train_len = 32,
	        .rope = true,
	        .prenorm = true,
	        .residual = true,
	        .norm_eps = 1e-6f,
	};
}

const char *pattern_at(const char *const *more, int i)
{
	int n = 0;

	while (layer_classes[n])
		n++;
	return i < n ? layer_classes[i]->name : more[i - n];
}

/* Makes the matrices larger, and the norms' weights something other than 1. */
static void spread_parameters(struct fixture *fixture, uint64_t seed)
{
	struct stack *stack = &fixture->stack;

	for (int layer = 0; layer < stack->n_layers; layer++)
		for (int i = 0; i < MAX_TENSORS; i++) {
			int64_t count = stack_parameter_count(stack, layer, i);
			bool vector = i == PARAM_NORM || i >= PARAM_OTHER;

			if (count == 0)
				continue;
			float *values = malloc((size_t)count * sizeof *values);
			assert_non_null(values);
			float *noise =
			        random_floats(seed + (uint64_t)(layer * MAX_TENSORS + i), count);
			require_ok(stack_get_parameter(stack, layer, i, values));
			for (int64_t j = 0; j < count; j++)
				values[j] = vector ? values[j] + 0.2f * noise[j] : 5 * values[j];
			require_ok(stack_set_parameter(stack, layer, i, values));
			free(values);
			free(noise);
		}
}

struct fixture *fixture_open(const struct backend *backend, const struct stack_options *options,
                             struct layer_shape shape, uint64_t seed)
{
	struct fixture *fixture = calloc(1, sizeof *fixture);

	assert_non_null(fixture);
	fixture->ctx.backend = backend ? backend : &cpu_backend;
	require_ok(stack_configure(&fixture->stack, fixture->ctx.backend, options));
	require_ok(stack_allocate(&fixture->stack, &fixture->ctx, &shape));
	require_ok(stack_poison(&fixture->stack));
	require_ok(stack_initialize(&fixture->stack, seed));
	spread_parameters(fixture, seed);
	return fixture;
}

void fixture_close(struct fixture *fixture)
{
	stack_release(&fixture->stack);
	free(fixture);
}

void fixture_run(struct fixture *fixture)
{
	require_ok(stack_run(&fixture->stack, &fixture->ctx));
}

float *read_floats(const struct fixture *fixture, const void *buffer, int64_t first, int64_t count)
{
	const struct backend *backend = fixture->ctx.backend;
	float *values = malloc((size_t)count * sizeof *values);

	assert_non_null(values);
	require_ok(backend_download_floats(backend, backend->activation, values,
	                                   (const char *)buffer +
	                                           (size_t)first * dtype_size(backend->activation),
	                                   (size_t)count));
	return values;
}

void write_floats(const struct fixture *fixture, void *buffer, int64_t first, const float *values,
                  int64_t count)
{
	const struct backend *backend = fixture->ctx.backend;

	require_ok(backend_upload_floats(backend, backend->activation,
	                                 (char *)buffer +
	                                         (size_t)first * dtype_size(backend->activation),
	                                 values, (size_t)count));
}

void copy_parameters(const struct fixture *from, int from_layer, struct fixture *to, int to_layer)
{
	for (int i = 0; i < MAX_TENSORS; i++) {
		int64_t count = stack_parameter_count(&from->stack, from_layer, i);

		assert_int_equal(count, stack_parameter_count(&to->stack, to_layer, i));
		if (count == 0)
			continue;
		float *values = malloc((size_t)count * sizeof *values);
		assert_non_null(values);
		require_ok(stack_get_parameter(&from->stack, from_layer, i, values));
		require_ok(stack_set_parameter(&to->stack, to_layer, i, values));
		free(values);
	}
}

double float_error(int64_t count, const float *a, const float *b)
{
	double difference = 0, length = 0;

	for (int64_t i = 0; i < count; i++) {
		difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
		length += (double)b[i] * b[i];
	}
	if (!isfinite(difference) || !isfinite(length))
		return INFINITY;
	return difference == 0 ? 0 : sqrt(difference / length);
}

float *random_floats(uint64_t seed, int64_t count)
{
	float *values = malloc((size_t)count * sizeof *values);

	assert_non_null(values);
	noise_normal(seed, 1u << 30, 0, count, 1.0f, values);
	return values;
}
