/*
 * The fp64 reference on the device, of operations that are too much for the host's
 * (kernels/check.h): products and what mixes many tokens. Its kernels are naive, and share nothing
 * with the ones they judge; they are fast enough for one long sequence with few heads, or a few
 * thousand rows.
 */
#ifndef KERNELS_CUDA_REFERENCE_CUH
#define KERNELS_CUDA_REFERENCE_CUH

#include <cuda_runtime.h>
#include <math.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/reference/common.h"

#define REFERENCE(name)                                                                            \
	enum status cuda_reference_##name(struct device *device, const void *args, void *workspace)
REFERENCE(norm_linear);
REFERENCE(norm_linear_backward);
REFERENCE(linear_residual);
REFERENCE(linear_residual_backward);
REFERENCE(attention);
REFERENCE(attention_backward);
REFERENCE(matrix_recurrence);
REFERENCE(matrix_recurrence_backward);

namespace reference
{

constexpr int THREADS = 256, WARPS = THREADS / 32;
/* Channels of a head, and rows of a matrix state. */
constexpr int MAX_HEAD = THREADS, MAX_STATE_ROWS = 256;

/* What a pointer of an argument struct holds here. */
static __host__ __device__ __forceinline__ const double *doubles(const void *tensor)
{
	return static_cast<const double *>(tensor);
}

static __host__ __device__ __forceinline__ double *doubles(void *tensor)
{
	return static_cast<double *>(tensor);
}

static __host__ __device__ __forceinline__ int64_t quotient_up(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

static __device__ __forceinline__ double warp_sum(double x)
{
	for (int lane = 16; lane > 0; lane /= 2)
		x += __shfl_xor_sync(0xffffffffu, x, lane);
	return x;
}

/* Memory for doubles (or as many int64_t) that lasts as long as the variable; releasing it waits
 * for the kernels that use it. */
class scratch
{
	struct device *device;
	void *memory = NULL;

      public:
	const enum status status;

	scratch(struct device *of, int64_t count)
	    : device(of), status(device_allocate(of, (size_t)count * sizeof(double) + 1, &memory))
	{
	}
	scratch(const scratch &) = delete;
	~scratch()
	{
		if (status == STATUS_OK)
			device_release(device, memory);
	}
	double *data() const
	{
		return static_cast<double *>(memory);
	}
};

template <typename... Parameters, typename... Arguments>
static enum status launch(struct device *device, void (*kernel)(Parameters...), int64_t blocks,
                          size_t shared, Arguments... arguments)
{
	if (blocks == 0)
		return STATUS_OK;
	if (shared > 48 << 10)
		CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
		                              cudaFuncAttributeMaxDynamicSharedMemorySize,
		                              (int)shared));
	kernel<<<(unsigned)blocks, THREADS, shared, cuda_stream(device)>>>(
	        static_cast<Parameters>(arguments)...);
	return cuda_status(cudaGetLastError(), "reference", __FILE__, __LINE__);
}

} // namespace reference

#endif
