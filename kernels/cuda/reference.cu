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

static bool is_known(const struct attention_args &a)
{
	return is_mask(a.mask);
}

static bool is_known(const struct matrix_recurrence_args &a)
{
	return is_known_decay(a.decay) && is_known_rule(a.rule);
}

/* `unsupported` where a size of the forward's is more than `most`, or an option unknown. */
#define WIDE(forward, size, most)                                                                  \
	[](const struct device *, const void *args) -> const char * {                              \
		const auto *a = static_cast<const struct forward##_args *>(args);                  \
                                                                                                   \
		return !is_known(*a) ? "an unknown option" : a->size > most ? "too wide" : NULL;   \
	}

const struct kernel cuda_reference_kernels[] = {
        {OP_NORM_LINEAR, "reference", NULL, NULL, run<cuda_reference_norm_linear>, false},
        {OP_NORM_LINEAR_BACKWARD, "reference", NULL, NULL, run<cuda_reference_norm_linear_backward>,
         false},
        {OP_LINEAR_RESIDUAL, "reference", NULL, NULL, run<cuda_reference_linear_residual>, false},
        {OP_LINEAR_RESIDUAL_BACKWARD, "reference", NULL, NULL,
         run<cuda_reference_linear_residual_backward>, false},
        {OP_ATTENTION, "reference", WIDE(attention, d_head, MAX_HEAD), NULL,
         run<cuda_reference_attention>, false},
        {OP_ATTENTION_BACKWARD, "reference", WIDE(attention, d_head, MAX_HEAD), NULL,
         run<cuda_reference_attention_backward>, false},
        {OP_MATRIX_RECURRENCE, "reference", WIDE(matrix_recurrence, d_k, MAX_STATE_ROWS), NULL,
         run<cuda_reference_matrix_recurrence>, false},
        {OP_MATRIX_RECURRENCE_BACKWARD, "reference", WIDE(matrix_recurrence, d_k, MAX_STATE_ROWS),
         NULL, run<cuda_reference_matrix_recurrence_backward>, false},
        {}};
