#include "bench/golden_file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of outputs and of gradients. */
static const double tolerance_fp32[] = {2e-5, 2e-5}, tolerance_fp16[] = {2e-3, 4e-3},
                    tolerance_bf16[] = {1.5e-2, 3e-2};

const char *golden_suffix(const struct safetensor *tensor, const char *prefix)
{
	size_t length = strlen(prefix);

	return strncmp(tensor->name, prefix, length) == 0 ? tensor->name + length : NULL;
}

void golden_mark(struct golden_file *check, const char *name)
{
	const struct safetensor *tensor = safetensors_find(&check->file, name);

	if (tensor)
		check->used[tensor - check->file.tensors] = true;
}

void golden_print_shape(int n_dims, const int64_t *dims, char text[96])
{
	int length = snprintf(text, 96, "[");

	for (int i = 0; i < n_dims && length < 64; i++)
		length += snprintf(text + length, 96 - (size_t)length, "%s%lld", i ? ", " : "",
		                   (long long)dims[i]);
	snprintf(text + length, 96 - (size_t)length, "]");
}

int golden_next_dim(int n_dims, const int64_t *dims, int i)
{
	while (i < n_dims && dims[i] == 1)
		i++;
	return i;
}

static bool has_shape(const struct safetensor *tensor, int n_dims, const int64_t *dims)
{
	int i = golden_next_dim(tensor->n_dims, tensor->dims, 0),
	    j = golden_next_dim(n_dims, dims, 0);

	while (i < tensor->n_dims && j < n_dims && tensor->dims[i] == dims[j]) {
		i = golden_next_dim(tensor->n_dims, tensor->dims, i + 1);
		j = golden_next_dim(n_dims, dims, j + 1);
	}
	return i == tensor->n_dims && j == n_dims;
}

enum status golden_require(const struct golden_file *check, const char *name,
                           enum safetensors_dtype dtype, int n_dims, const int64_t *dims,
                           const struct safetensor **tensor)
{
	char actual[96], wanted[96];

	*tensor = safetensors_find(&check->file, name);
	if (!*tensor)
		return status_set(STATUS_INVALID, "the file has no tensor '%s'", name);
	if ((*tensor)->dtype != dtype)
		return status_set(STATUS_INVALID, "tensor '%s' has the wrong dtype", name);
	if ((*tensor)->count < 1)
		return status_set(STATUS_INVALID, "tensor '%s' is empty", name);
	if (has_shape(*tensor, n_dims, dims))
		return STATUS_OK;
	golden_print_shape((*tensor)->n_dims, (*tensor)->dims, actual);
	golden_print_shape(n_dims, dims, wanted);
	return status_set(STATUS_INVALID, "tensor '%s' is %s, not %s", name, actual, wanted);
}

enum status golden_floats(const struct golden_file *check, const char *name, int n_dims,
                          const int64_t *dims, const float **values)
{
	const struct safetensor *tensor;

	TRY(golden_require(check, name, SAFETENSORS_F32, n_dims, dims, &tensor));
	*values = tensor->data.f32;
	return STATUS_OK;
}

struct golden_memory {
	struct golden_memory *next;
	float values[];
};

enum status golden_allocate(struct golden_file *check, int64_t count, float **values)
{
	struct golden_memory *memory =
	        malloc(sizeof *memory + (size_t)count * sizeof memory->values[0]);

	if (!memory)
		return status_set(STATUS_OOM, "no memory for %lld floats", (long long)count);
	memory->next = check->memory;
	check->memory = memory;
	*values = memory->values;
	return STATUS_OK;
}

void golden_free(struct golden_file *check)
{
	while (check->memory) {
		struct golden_memory *next = check->memory->next;

		free(check->memory);
		check->memory = next;
	}
}

static void add_result(struct golden_file *check, const char *tensor, double rel_err,
                       double tolerance, enum golden_verdict verdict)
{
	struct golden_report *report = check->report;

	report->count[verdict]++;
	report->n_failed += verdict == GOLDEN_MISS || verdict == GOLDEN_NOT_COMPARED;
	if (report->n_results == GOLDEN_MAX_RESULTS)
		return;
	struct golden_result *result = &report->results[report->n_results++];
	*result = (struct golden_result){
	        .rel_err = rel_err, .tolerance = tolerance, .verdict = verdict};
	snprintf(result->tensor, sizeof result->tensor, "%s", tensor);
}

/* Of what a device computes in 16 bits, or the file stores in them. */
static double tolerance_of(const struct golden_file *check, const struct safetensor *expected,
                           bool gradient)
{
	if (check->device->activation == DTYPE_BF16 ||
	    (expected && expected->stored == STORED_BF16))
		return tolerance_bf16[gradient];
	return (expected && expected->stored == STORED_F16 ? tolerance_fp16
	                                                   : tolerance_fp32)[gradient];
}

/* Keeps a tensor for golden_options.save; it has the stored one's shape, if it is as large. */
static void keep(struct golden_file *check, const struct safetensor *stored, const char *label,
                 const float *actual, int64_t count)
{
	float *copy = NULL;

	if (!check->options->save || check->n_saved == GOLDEN_MAX_RESULTS ||
	    golden_allocate(check, count, &copy) != STATUS_OK)
		return;
	char *name = check->saved_names[check->n_saved];
	struct safetensor *saved = &check->saved[check->n_saved++];
	memcpy(copy, actual, (size_t)count * sizeof *copy);
	*saved = (struct safetensor){.n_dims = 1, .dims = {count}};
	if (stored && stored->count == count)
		*saved = *stored;
	snprintf(name, sizeof check->saved_names[0], "%s", label);
	saved->name = name;
	saved->count = count;
	saved->data.f32 = copy;
}

void golden_compare(struct golden_file *check, const char *name, const char *label, bool gradient,
                    const float *actual, const float *expected, int64_t count)
{
	const struct safetensor *stored = safetensors_find(&check->file, name);
	const double tolerance = tolerance_of(check, stored, gradient);
	double difference = 0, norm = 0;

	for (int64_t i = 0; i < count; i++) {
		double d = (double)actual[i] - (double)expected[i];

		difference += d * d;
		norm += (double)expected[i] * (double)expected[i];
	}
	double rel_err = difference == 0 && norm == 0 ? 0 : sqrt(difference / norm);
	keep(check, stored, label, actual, count);
	golden_mark(check, name);
	add_result(check, label, rel_err, tolerance,
	           rel_err <= tolerance ? GOLDEN_PASS : GOLDEN_MISS);
}

void golden_add_unused(struct golden_file *check)
{
	enum golden_verdict verdict =
	        check->report->unsupported[0] ? GOLDEN_UNSUPPORTED : GOLDEN_NOT_COMPARED;

	for (int i = 0; i < check->file.n_tensors; i++)
		if (!check->used[i])
			add_result(check, check->file.tensors[i].name, NAN, NAN, verdict);
}

enum status golden_forgive(struct golden_file *check, enum status status)
{
	struct golden_report *report = check->report;

	if (status != STATUS_UNSUPPORTED)
		return status;
	if (!report->unsupported[0])
		snprintf(report->unsupported, sizeof report->unsupported, "%s", status_message());
	return STATUS_OK;
}
