/*
 * Slow, obvious fp64 versions of every operation of kernels/kernels.h, on the host: provider
 * "reference" of the device handle whose floating-point tensors all hold doubles (struct device,
 * reference). They share no code with any other kernel: tests compare kernels with them, and layers
 * use them to verify what a timed run has left in its buffers.
 *
 * Those that need scratch memory allocate it and return STATUS_OOM, with a message, if there is
 * none. They use OpenMP and must not be called from inside a parallel region.
 */
#ifndef KERNELS_REFERENCE_REFERENCE_H
#define KERNELS_REFERENCE_REFERENCE_H

#include "kernels/kernels.h"

extern const struct kernel reference_kernels[];

#define X(constant, name)                                                                          \
	enum status reference_##name(struct device *device, const void *args, void *workspace);
OPERATIONS(X)
#undef X

#endif
