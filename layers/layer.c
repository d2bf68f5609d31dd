/* Sizes of tensors and names of passes. */
#include "layers/layer.h"

int64_t tensor_count(const struct tensor_spec *spec)
{
	int64_t count = 1;

	for (int i = 0; i < spec->n_dims; i++)
		count *= spec->dims[i];
	return count;
}

enum dtype tensor_dtype(const struct tensor_spec *spec, const struct backend *backend)
{
	return spec->storage == STORAGE_FP32 ? DTYPE_F32 : backend->activation;
}

size_t tensor_bytes(const struct tensor_spec *spec, const struct backend *backend)
{
	return (size_t)tensor_count(spec) * dtype_size(tensor_dtype(spec, backend));
}

const char *pass_name(enum pass pass)
{
	static const char *const names[] = {
	        [PASS_PREFILL] = "prefill",       [PASS_TRAIN] = "train",
	        [PASS_GENERATION] = "generation", [PASS_THROUGHPUT] = "throughput",
	        [PASS_KERNEL] = "kernel",
	};

	return names[pass];
}
