/* The ceilings of the device's memory, measured. */
#ifndef KERNELS_CUDA_BANDWIDTH_H
#define KERNELS_CUDA_BANDWIDTH_H

#include "kernels/device.h"

/* struct backend's bandwidth(): the best of several copies, bytes read and written, and of several
 * readings, of buffers far larger than the cache. */
enum status bandwidth_measure(struct device *device, double *copy_gb_per_s, double *read_gb_per_s);

#endif
