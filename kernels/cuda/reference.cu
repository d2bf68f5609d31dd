/* The list of the device's reference. */
#include "kernels/cuda/reference.cuh"

using namespace reference;

/* On the current device, of which a process may have several. */
template <enum status (*reference)(struct device *, const void *, void *)>
static enum status run(struct device *device, const void *args, void *workspace)
{
	const enum status status = cuda_activate(device);

	return status == STATUS_OK ? reference(device, args, workspace) : status;
}

/* `unsupported` where a size is more than `most`. */
#define WIDE(name, size, most)                                                                     \
	[](const struct device *, const void *args) -> const char * {                              \
		return static_cast<const struct name##_args *>(args)->size > most ? "too wide"     \
		                                                                  : NULL;          \
	}

const struct kernel cuda_reference_kernels[] = {
        {OP_NORM_LINEAR, "reference", NULL, NULL, run<cuda_reference_norm_linear>},
        {OP_NORM_LINEAR_BACKWARD, "reference", NULL, NULL,
         run<cuda_reference_norm_linear_backward>},
        {OP_LINEAR_RESIDUAL, "reference", NULL, NULL, run<cuda_reference_linear_residual>},
        {OP_LINEAR_RESIDUAL_BACKWARD, "reference", NULL, NULL,
         run<cuda_reference_linear_residual_backward>},
        {OP_ATTENTION, "reference", WIDE(attention, d_head, MAX_HEAD), NULL,
         run<cuda_reference_attention>},
        {OP_ATTENTION_BACKWARD, "reference", WIDE(attention_backward, forward.d_head, MAX_HEAD),
         NULL, run<cuda_reference_attention_backward>},
        {OP_MATRIX_RECURRENCE, "reference", WIDE(matrix_recurrence, d_k, MAX_STATE_ROWS), NULL,
         run<cuda_reference_matrix_recurrence>},
        {OP_MATRIX_RECURRENCE_BACKWARD, "reference",
         WIDE(matrix_recurrence_backward, forward.d_k, MAX_STATE_ROWS), NULL,
         run<cuda_reference_matrix_recurrence_backward>},
        {}};
