#define _GNU_SOURCE
#include "kernels/cuda/bandwidth.h"

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"

enum { REPEATS = 5 };

static const size_t LARGEST_BUFFER = (size_t)2 << 30;

enum way { COPY_BY_DRIVER, COPY_BY_KERNEL, READ };

static cudaError_t move(enum way way, void *to, const void *from, size_t bytes)
{
	switch (way) {
	case COPY_BY_DRIVER:
		return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_stream());
	case COPY_BY_KERNEL:
		return device_copy(cuda_stream(), to, from, bytes);
	default:
		return device_read(cuda_stream(), from, bytes);
	}
}

/* Raises *best to the rate of the fastest of several runs; the first only warms up. */
static enum status time_way(enum way way, void *to, const void *from, size_t bytes, double *best)
{
	for (int i = 0; i <= REPEATS; i++) {
		double milliseconds = 0.0;
		enum status status = cuda_backend.stopwatch_start();

		if (status == STATUS_OK)
			CUDA_TRY(move(way, to, from, bytes));
		if (status == STATUS_OK)
			status = cuda_backend.stopwatch_stop(&milliseconds);
		if (status != STATUS_OK)
			return status;
		const double rate = 1e-6 * (double)bytes / milliseconds * (way == READ ? 1.0 : 2.0);
		if (i > 0 && rate > *best)
			*best = rate;
	}
	return STATUS_OK;
}

static enum status time_all(void *a, void *b, size_t bytes, double *copy, double *read)
{
	*copy = 0.0;
	*read = 0.0;
	CUDA_TRY(device_random(cuda_stream(), b, bytes / 2, 1));
	enum status status = time_way(COPY_BY_DRIVER, a, b, bytes, copy);

	if (status == STATUS_OK)
		status = time_way(COPY_BY_KERNEL, a, b, bytes, copy);
	if (status == STATUS_OK)
		status = time_way(READ, a, b, bytes, read);
	return status;
}

enum status bandwidth_measure(double *copy_gb_per_s, double *read_gb_per_s)
{
	size_t bytes = LARGEST_BUFFER, available = 0, total = 0;
	void *a = NULL, *b = NULL;

	CUDA_TRY(cudaMemGetInfo(&available, &total));
	while (bytes > available / 4)
		bytes /= 2;
	enum status status = cuda_backend.allocate(bytes, &a);
	if (status == STATUS_OK)
		status = cuda_backend.allocate(bytes, &b);
	if (status == STATUS_OK)
		status = time_all(a, b, bytes, copy_gb_per_s, read_gb_per_s);
	cuda_backend.release(a);
	cuda_backend.release(b);
	return status;
}
