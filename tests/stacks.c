/* What the tests of layers share. */
#include "tests/stacks.h"

#include "kernels/noise.h"

struct device *cpu;

static int open_cpu(void **state)
{
	return cpu_backend.open("", NULL, &cpu) == STATUS_OK ? 0 : -1;
}

static int close_cpu(void **state)
{
	device_close(cpu);
	return 0;
}

FIXTURE(open_cpu, close_cpu, NULL)

struct device mutant_of(const struct device *device, const struct kernel *first)
{
	const struct kernel *const own[] = {device->kernels, NULL};
	struct device mutant = *device;

	mutant.kernels = kernels_joined(first, own);
	mutant.others = NULL;
	assert_non_null(mutant.kernels);
	return mutant;
}

void mutant_free(struct device *mutant)
{
	free((struct kernel *)mutant->kernels);
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

struct layer_shape shape_of(enum pass pass, int64_t batch, int64_t seq_len)
{
	const bool train = pass == PASS_TRAIN;

	return (struct layer_shape){pass, batch, pass == PASS_GENERATION ? 1 : seq_len,
	                            train ? 0 : seq_len, 0};
}

const char *pattern_at(const char *const *more, int i)
{
	int n = 0;

	while (layer_classes[n])
		n++;
	return i < n ? layer_classes[i]->name : more[i - n];
}

bool next_parameter(const struct fixture *fixture, struct parameter *p)
{
	do {
		if (++p->index == MAX_TENSORS) {
			p->index = 0;
			p->layer++;
		}
		if (p->layer == fixture->stack.n_layers)
			return false;
		p->count = stack_parameter_count(&fixture->stack, p->layer, p->index);
	} while (p->count == 0);
	return true;
}

float *read_parameter(const struct fixture *fixture, const struct parameter *p)
{
	float *values = new_memory((size_t)p->count * sizeof *values);

	require_ok(stack_get_parameter(&fixture->stack, p->layer, p->index, values));
	return values;
}

float *read_gradient(const struct fixture *fixture, const struct parameter *p)
{
	float *values = new_memory((size_t)p->count * sizeof *values);

	require_ok(stack_get_gradient(&fixture->stack, p->layer, p->index, values));
	return values;
}

/* Makes the matrices of layers larger, and the norms' weights something other than 1. */
static void spread_parameters(struct fixture *fixture, uint64_t seed)
{
	struct parameter p = NO_PARAMETER;

	while (next_parameter(fixture, &p)) {
		const bool vector = p.index == PARAM_NORM || p.index >= PARAM_OTHER;

		if (p.layer == LAYER_MODEL)
			continue;
		scoped float *values = read_parameter(fixture, &p);
		scoped float *noise =
		        random_floats(seed + (uint64_t)(p.layer * MAX_TENSORS + p.index), p.count);
		for (int64_t j = 0; j < p.count; j++)
			values[j] = vector ? values[j] + 0.2f * noise[j] : 5 * values[j];
		require_ok(stack_set_parameter(&fixture->stack, p.layer, p.index, values));
	}
}

struct fixture *fixture_open(struct device *device, const struct stack_options *options,
                             struct layer_shape shape, uint64_t seed)
{
	struct fixture *fixture = calloc(1, sizeof *fixture);

	assert_non_null(fixture);
	fixture->ctx.device = device ? device : cpu;
	require_ok(stack_configure(&fixture->stack, fixture->ctx.device, options));
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
	struct device *device = fixture->ctx.device;
	float *values = new_memory((size_t)count * sizeof *values);

	require_ok(device_download_floats(device, device->activation, values,
	                                  (const char *)buffer +
	                                          (size_t)first * dtype_size(device->activation),
	                                  (size_t)count));
	return values;
}

void write_floats(const struct fixture *fixture, void *buffer, int64_t first, const float *values,
                  int64_t count)
{
	struct device *device = fixture->ctx.device;

	require_ok(device_upload_floats(device, device->activation,
	                                (char *)buffer +
	                                        (size_t)first * dtype_size(device->activation),
	                                values, (size_t)count));
}

void copy_parameters(const struct fixture *from, int from_layer, struct fixture *to, int to_layer)
{
	for (int i = 0; i < MAX_TENSORS; i++) {
		int64_t count = stack_parameter_count(&from->stack, from_layer, i);

		assert_int_equal(count, stack_parameter_count(&to->stack, to_layer, i));
		if (count == 0)
			continue;
		scoped float *values = new_memory((size_t)count * sizeof *values);
		require_ok(stack_get_parameter(&from->stack, from_layer, i, values));
		require_ok(stack_set_parameter(&to->stack, to_layer, i, values));
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

double row_float_error(int64_t n_rows, int64_t width, const float *a, const float *b)
{
	double total = 0, worst = 0;

	for (int64_t i = 0; i < n_rows * width; i++)
		total += (double)b[i] * b[i];
	for (int64_t n = 0; n < n_rows; n++) {
		double difference = 0, length = 0;

		for (int64_t i = n * width; i < (n + 1) * width; i++) {
			difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
			length += (double)b[i] * b[i];
		}
		length = fmax(length, 0.01 * total / (double)n_rows);
		if (!isfinite(difference) || !isfinite(length))
			return INFINITY;
		if (difference > 0)
			worst = fmax(worst, sqrt(difference / length));
	}
	return worst;
}

double worst_gradient_error(const struct fixture *a, const struct fixture *b)
{
	struct parameter p = NO_PARAMETER;
	double worst = 0;

	while (next_parameter(a, &p)) {
		scoped float *left = read_gradient(a, &p), *right = read_gradient(b, &p);

		worst = fmax(worst, float_error(p.count, left, right));
	}
	return worst;
}

float *random_floats(uint64_t seed, int64_t count)
{
	float *values = new_memory((size_t)count * sizeof *values);

	noise_normal(seed, 1u << 30, 0, count, 1.0f, values);
	return values;
}
