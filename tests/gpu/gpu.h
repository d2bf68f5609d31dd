/* The GPU, from before the first test of a program until after the last. */
#ifndef TESTS_GPU_GPU_H
#define TESTS_GPU_GPU_H

#include "kernels/cuda/cuda_backend.h"
#include "tests/test.h"

static struct device *device;

static int open_device(void **state)
{
	if (cuda_backend.open(NULL, NULL, &device) == STATUS_OK)
		return 0;
	fprintf(stderr, "%s\n", status_message());
	return -1;
}

static int close_device(void **state)
{
	device_close(device);
	return 0;
}

FIXTURE(open_device, close_device, NULL)

#endif
