/* The few questions asked of NVIDIA's management library, opened at run time; all answers are
 * optional. */
#ifndef KERNELS_CUDA_NVML_H
#define KERNELS_CUDA_NVML_H

#include <stdbool.h>
#include <stddef.h>

/* The library and a GPU in it. Every function takes NULL for none. */
struct nvml;

/* Finds the GPU at `pci_bus_id`; NULL if the library or the GPU is not there. The library is
 * libnvidia-ml.so.1, or the one that NVML_LIBRARY names. */
struct nvml *nvml_open(const char *pci_bus_id);
void nvml_close(struct nvml *nvml);

/* The driver's version, e.g. "580.159.03", or "" where unknown. */
void nvml_driver_version(const struct nvml *nvml, char *version, size_t size);

struct nvml_reading {
	int throttle;   /* bits of enum throttle (kernels/device.h); THROTTLE_UNKNOWN */
	double power_w; /* of the board, at once where it can tell, else of the last second; NAN */
};

/* How it is now. What cannot be asked is unknown. */
void nvml_read(const struct nvml *nvml, struct nvml_reading *reading);

#endif
