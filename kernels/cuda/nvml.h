/* The few questions asked of NVIDIA's management library, opened at run time; all answers are
 * optional. */
#ifndef KERNELS_CUDA_NVML_H
#define KERNELS_CUDA_NVML_H

#include <stdbool.h>
#include <stddef.h>

/* The library and a GPU in it. Every function takes NULL for none. */
struct nvml;

/* Finds the GPU at `pci_bus_id`; NULL if the library or the GPU is not there. */
struct nvml *nvml_open(const char *pci_bus_id);
void nvml_close(struct nvml *nvml);

/* The driver's version, e.g. "580.159.03", or "" where unknown. */
void nvml_driver_version(const struct nvml *nvml, char *version, size_t size);

/* Whether the GPU's clock is held down now (power, heat, hardware slowdown); false if unknown. */
bool nvml_throttled(const struct nvml *nvml);

#endif
