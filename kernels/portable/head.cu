/* What follows the logits: the loss, and the greedy choice. One block per row of logits. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 256, WARPS = THREADS / WARP };

/* Calls visit(index, value) for this thread's share of a row, 16 bytes at a time where rows are
 * aligned. */
template <typename Visitor>
static __device__ __forceinline__ void visit_row(const bf16 *row, int64_t count, Visitor visit)
{
	if (count % 8 || reinterpret_cast<uintptr_t>(row) % 16) {
		for (int64_t i = threadIdx.x; i < count; i += THREADS)
			visit(i, __bfloat162float(row[i]));
		return;
	}
	for (int64_t i = 8 * (int64_t)threadIdx.x; i < count; i += 8 * THREADS) {
		float x[8];

		load8(x, row + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			visit(i + j, x[j]);
	}
}

/* A sum of exponentials, relative to its largest term. NaN stays. */
struct exponentials {
	float maximum, sum;
};

static __device__ __forceinline__ void exponentials_merge(exponentials &a, float maximum, float sum)
{
	const float top = fmaxf(a.maximum, maximum), base = top == -INFINITY ? 0.0f : top;

	a.sum = a.sum * exp2_fast((a.maximum - base) * LOG2E) +
	        sum * exp2_fast((maximum - base) * LOG2E);
	a.maximum = top;
}

/* Replaces every element of this thread's share of a row by change(index, element). */
template <typename Change>
static __device__ __forceinline__ void change_row(bf16 *row, int64_t count, Change change)
{
	if (count % 8 || reinterpret_cast<uintptr_t>(row) % 16) {
		for (int64_t i = threadIdx.x; i < count; i += THREADS)
			row[i] = __float2bfloat16(change(i, __bfloat162float(row[i])));
		return;
	}
	for (int64_t i = 8 * (int64_t)threadIdx.x; i < count; i += 8 * THREADS) {
		float x[8];

		load8(x, row + i);
#pragma unroll
		for (int j = 0; j < 8; j++)
			x[j] = change(i + j, x[j]);
		store8(row + i, x);
	}
}

/* How many rows have a target; one block. */
static __global__ void __launch_bounds__(THREADS)
        count_kernel(const int32_t *targets, int64_t n_tokens, float *n_valid)
{
	float *shared = reinterpret_cast<float *>(shared_memory);
	int count = 0;

	for (int64_t n = threadIdx.x; n < n_tokens; n += THREADS)
		count += targets[n] >= 0;
	shared[threadIdx.x] = (float)count;
	__syncthreads();
	if (threadIdx.x != 0)
		return;
	for (int i = 1; i < THREADS; i++)
		count += (int)shared[i];
	*n_valid = (float)count;
}

/* The row's loss, and its gradient (softmax - one_hot(target)) / n_valid in place of the logits. */
static __global__ void __launch_bounds__(THREADS)
        loss_kernel(const __grid_constant__ struct cross_entropy_args a, const float *n_valid)
{
	const int64_t n = blockIdx.x, target = a.targets[n];
	bf16 *row = static_cast<bf16 *>(a.logits) + n * a.vocab;
	float *shared = reinterpret_cast<float *>(shared_memory);
	exponentials e = {-INFINITY, 0.0f};

	if (target < 0) {
		if (threadIdx.x == 0)
			a.losses[n] = 0.0f;
		if (a.want_gradient)
			change_row(row, a.vocab, [](int64_t, float) { return 0.0f; });
		return;
	}
	visit_row(row, a.vocab, [&](int64_t, float x) { exponentials_merge(e, x, 1.0f); });
	for (int offset = WARP / 2; offset > 0; offset /= 2) {
		const float maximum = __shfl_xor_sync(0xffffffffu, e.maximum, offset);
		const float sum = __shfl_xor_sync(0xffffffffu, e.sum, offset);

		exponentials_merge(e, maximum, sum);
	}
	if (threadIdx.x % WARP == 0) {
		shared[threadIdx.x / WARP * 2] = e.maximum;
		shared[threadIdx.x / WARP * 2 + 1] = e.sum;
	}
	__syncthreads();
	e = {shared[0], shared[1]};
	for (int w = 1; w < WARPS; w++)
		exponentials_merge(e, shared[2 * w], shared[2 * w + 1]);
	if (threadIdx.x == 0)
		a.losses[n] = e.maximum + logf(e.sum) - __bfloat162float(row[target]);
	if (!a.want_gradient)
		return;
	const float scale = 1.0f / *n_valid, factor = scale / e.sum;
	__syncthreads(); /* the loss has been read */
	change_row(row, a.vocab, [=](int64_t i, float x) {
		const float p = exp2_fast((x - e.maximum) * LOG2E) * factor;

		return i == target ? p - scale : p;
	});
}

/* The mean over the rows that have a target, by one block, in a fixed order. */
static __global__ void __launch_bounds__(THREADS)
        mean_kernel(const float *losses, const int32_t *targets, int64_t n_tokens, float *loss)
{
	double *shared = reinterpret_cast<double *>(shared_memory);
	double sum = 0.0, count = 0.0;

	for (int64_t n = threadIdx.x; n < n_tokens; n += THREADS) {
		sum += targets[n] >= 0 ? (double)losses[n] : 0.0;
		count += targets[n] >= 0 ? 1.0 : 0.0;
	}
	shared[threadIdx.x] = sum;
	shared[THREADS + threadIdx.x] = count;
	__syncthreads();
	if (threadIdx.x != 0)
		return;
	for (int i = 1; i < THREADS; i++) {
		sum += shared[i];
		count += shared[THREADS + i];
	}
	*loss = (float)(sum / count);
}

extern "C" size_t portable_cross_entropy_workspace(const struct device *, const void *)
{
	return sizeof(float);
}

extern "C" enum status portable_cross_entropy(struct device *device, const void *args,
                                              void *workspace)
{
	const auto *a = static_cast<const struct cross_entropy_args *>(args);
	float *n_valid = static_cast<float *>(workspace);
	enum status status = STATUS_OK;

	if (a->want_gradient)
		status = launch(device, "cross_entropy", count_kernel, dim3(1), THREADS,
		                THREADS * sizeof(float), a->targets, a->n_tokens, n_valid);
	if (status == STATUS_OK)
		status = launch(device, "cross_entropy", loss_kernel, dim3((unsigned)a->n_tokens),
		                THREADS, 2 * WARPS * sizeof(float), *a, n_valid);
	if (status != STATUS_OK)
		return status;
	return launch(device, "cross_entropy", mean_kernel, dim3(1), THREADS,
	              2 * THREADS * sizeof(double), a->losses, a->targets, a->n_tokens, a->loss);
}

/* The better of two candidates: a NaN, else the larger value; then the lower index. */
static __device__ __forceinline__ void prefer(float &best, int &index, float value, int other)
{
	const bool equal = value == best || (isnan(value) && isnan(best));
	const bool larger = !isnan(best) && (isnan(value) || value > best);

	if (larger || (equal && other < index)) {
		best = value;
		index = other;
	}
}

static __global__ void __launch_bounds__(THREADS)
        argmax_kernel(const __grid_constant__ struct argmax_args a)
{
	const bf16 *row = static_cast<const bf16 *>(a.logits) + (int64_t)blockIdx.x * a.vocab;
	float *values = reinterpret_cast<float *>(shared_memory);
	int *indices = reinterpret_cast<int *>(values + WARPS);
	float best = -INFINITY;
	int index = 0x7fffffff;

	visit_row(row, a.vocab, [&](int64_t i, float x) { prefer(best, index, x, (int)i); });
	for (int offset = WARP / 2; offset > 0; offset /= 2) {
		const float value = __shfl_xor_sync(0xffffffffu, best, offset);
		const int other = __shfl_xor_sync(0xffffffffu, index, offset);

		prefer(best, index, value, other);
	}
	if (threadIdx.x % WARP == 0) {
		values[threadIdx.x / WARP] = best;
		indices[threadIdx.x / WARP] = index;
	}
	__syncthreads();
	if (threadIdx.x != 0)
		return;
	for (int w = 1; w < WARPS; w++)
		prefer(best, index, values[w], indices[w]);
	a.tokens[blockIdx.x] = index;
	if (a.position && blockIdx.x == 0)
		*a.position += 1;
}

extern "C" enum status portable_argmax(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct argmax_args *>(args);

	return launch(device, "argmax", argmax_kernel, dim3((unsigned)a->n_tokens), THREADS,
	              WARPS * (sizeof(float) + sizeof(int)), *a);
}
