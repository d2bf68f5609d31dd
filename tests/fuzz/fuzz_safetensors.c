/* The safetensors reader on arbitrary bytes: whatever it accepts can be read to the last element.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bench/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

/* Touches the first and last byte of a tensor and walks its dimensions. */
static void use(const struct safetensor *tensor)
{
	size_t element = tensor->dtype == SAFETENSORS_F32 ? sizeof(float) : sizeof(int64_t);
	const char *data =
	        (const char *)(tensor->dtype == SAFETENSORS_F32 ? (const void *)tensor->data.f32
	                                                        : (const void *)tensor->data.i64);
	int64_t count = 1;

	for (int i = 0; i < tensor->n_dims; i++)
		count *= tensor->dims[i];
	if (count != tensor->count || (uintptr_t)data % element != 0)
		abort();
	if (count > 0 && data[0] + data[(size_t)count * element - 1] == 1000)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	struct safetensors file;

	if (safetensors_parse(bytes, size, &file) != STATUS_OK) {
		if (file.n_tensors != 0 || file.data || status_message()[0] == '\0')
			abort();
		return 0;
	}
	for (int i = 0; i < file.n_tensors; i++) {
		use(&file.tensors[i]);
		if (!safetensors_find(&file, file.tensors[i].name))
			abort();
	}
	for (int i = 0; i < file.n_metadata; i++)
		if (!safetensors_metadata(&file, file.metadata[i].key))
			abort();
	safetensors_close(&file);
	return 0;
}
