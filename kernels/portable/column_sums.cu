#include "kernels/portable/column_sums.cuh"

#include "kernels/portable/device.cuh"

enum { ROWS = 32 };

/* A block takes 32 columns, a warp every 32nd row of them. */
static __global__ void __launch_bounds__(ROWS *WARP)
        column_sums_kernel(const float *parts, int64_t n_rows, int64_t stride, int64_t width,
                           float *sums)
{
	float *shared = reinterpret_cast<float *>(shared_memory);
	const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP;
	const int64_t column = (int64_t)blockIdx.x * WARP + lane;
	float sum = 0.0f;

	if (column < width) {
#pragma unroll 4
		for (int64_t row = first; row < n_rows; row += ROWS)
			sum += parts[row * stride + column];
	}
	shared[first * (WARP + 1) + lane] = sum;
	__syncthreads();
	sum = group_sum(shared[lane * (WARP + 1) + first], WARP);
	if (lane == 0 && (int64_t)blockIdx.x * WARP + first < width)
		sums[(int64_t)blockIdx.x * WARP + first] = sum;
}

enum status column_sums(struct device *device, const char *operation, const float *parts,
                        int64_t n_rows, int64_t stride, int64_t width, float *sums)
{
	return launch(device, operation, column_sums_kernel, dim3((unsigned)divide_up(width, WARP)),
	              ROWS * WARP, ROWS * (WARP + 1) * sizeof(float), parts, n_rows, stride, width,
	              sums);
}

/* A warp per part. */
static __global__ void __launch_bounds__(WARP)
        part_sums_kernel(const float *columns, int64_t width, float *sums)
{
	float sum = 0.0f;

	for (int64_t i = threadIdx.x; i < width; i += WARP)
		sum += columns[blockIdx.x * width + i];
	sum = group_sum(sum, WARP);
	if (threadIdx.x == 0)
		sums[blockIdx.x] = sum;
}

enum status part_sums(struct device *device, const char *operation, const float *columns,
                      int64_t n_parts, int64_t width, float *sums)
{
	return launch(device, operation, part_sums_kernel, dim3((unsigned)n_parts), WARP, 0,
	              columns, width, sums);
}
