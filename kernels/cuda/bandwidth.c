#define _GNU_SOURCE
#include "kernels/cuda/bandwidth.h"

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"

enum { REPEATS = 5 };

static const size_t LARGEST_BUFFER = (size_t)2 << 30;

enum way { COPY_BY_DRIVER, COPY_BY_KERNEL, READ };

static cudaError_t move(struct device *device, enum way way, void *to, const void *from,
                        size_t bytes)
{
	switch (way) {
	case COPY_BY_DRIVER:
		return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
		                       cuda_stream(device));
	case COPY_BY_KERNEL:
		return submit_copy(device, to, from, bytes);
	default:
		return submit_read(device, from, bytes);
	}
}

/* Raises *best to the rate of the fastest of several runs; the first only warms up. */
static enum status time_way(struct device *device, enum way way, void *to, const void *from,
                            size_t bytes, double *best)
{
	for (int i = 0; i <= REPEATS; i++) {
		double milliseconds = 0.0;
		enum status status = device_stopwatch_start(device);

		if (status == STATUS_OK)
			CUDA_TRY(move(device, way, to, from, bytes));
		if (status == STATUS_OK)
			status = device_stopwatch_stop(device, &milliseconds);
		if (status != STATUS_OK)
			return status;
		const double rate = 1e-6 * (double)bytes / milliseconds * (way == READ ? 1.0 : 2.0);
		if (i > 0 && rate > *best)
			*best = rate;
	}
	return STATUS_OK;
}

static enum status time_all(struct device *device, void *a, void *b, size_t bytes, double *copy,
                            double *read)
{
	*copy = 0.0;
	*read = 0.0;
	CUDA_TRY(submit_random(device, b, bytes / 2, 1));
	enum status status = time_way(device, COPY_BY_DRIVER, a, b, bytes, copy);

	if (status == STATUS_OK)
		status = time_way(device, COPY_BY_KERNEL, a, b, bytes, copy);
	if (status == STATUS_OK)
		status = time_way(device, READ, a, b, bytes, read);
	return status;
}

enum status bandwidth_measure(struct device *device, double *copy_gb_per_s, double *read_gb_per_s)
{
	size_t bytes = LARGEST_BUFFER, available = 0, total = 0;
	void *a = NULL, *b = NULL;

	CUDA_TRY(cudaMemGetInfo(&available, &total));
	while (bytes > available / 4)
		bytes /= 2;
	enum status status = device_allocate(device, bytes, &a);
	if (status == STATUS_OK)
		status = device_allocate(device, bytes, &b);
	if (status == STATUS_OK)
		status = time_all(device, a, b, bytes, copy_gb_per_s, read_gb_per_s);
	device_release(device, a);
	device_release(device, b);
	return status;
}
