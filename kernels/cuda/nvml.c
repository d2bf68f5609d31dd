#define _GNU_SOURCE
#include "kernels/cuda/nvml.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* From NVML's documentation: the reasons for which a clock is lower than it could be. */
enum {
	REASON_SOFTWARE_POWER_CAP = 0x4,
	REASON_HARDWARE_SLOWDOWN = 0x8,
	REASON_SOFTWARE_THERMAL = 0x20,
	REASON_HARDWARE_THERMAL = 0x40,
	REASON_POWER_BRAKE = 0x80,
	REASONS = REASON_SOFTWARE_POWER_CAP | REASON_HARDWARE_SLOWDOWN | REASON_SOFTWARE_THERMAL |
	          REASON_HARDWARE_THERMAL | REASON_POWER_BRAKE
};

struct nvml {
	void *library, *device;
	int (*shutdown)(void);
	int (*driver_version)(char *version, unsigned length);
	int (*throttle_reasons)(void *device, unsigned long long *reasons);
};

/* Function pointers come from dlsym() as object pointers; POSIX lets them be copied as bytes. */
static bool find(void *library, void *function, const char *name)
{
	void *symbol = dlsym(library, name);

	memcpy(function, &symbol, sizeof symbol);
	return symbol != NULL;
}

/* False, with nothing left to close, if something is missing. */
static bool find_gpu(struct nvml *nvml, const char *pci_bus_id)
{
	int (*init)(void);
	int (*handle)(const char *pci_bus_id, void **device);

	nvml->library = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
	if (!nvml->library)
		return false;
	if (find(nvml->library, &init, "nvmlInit_v2") &&
	    find(nvml->library, &nvml->shutdown, "nvmlShutdown") &&
	    find(nvml->library, &handle, "nvmlDeviceGetHandleByPciBusId_v2") &&
	    find(nvml->library, &nvml->driver_version, "nvmlSystemGetDriverVersion") &&
	    find(nvml->library, &nvml->throttle_reasons,
	         "nvmlDeviceGetCurrentClocksThrottleReasons") &&
	    init() == 0) {
		if (handle(pci_bus_id, &nvml->device) == 0)
			return true;
		nvml->shutdown();
	}
	dlclose(nvml->library);
	return false;
}

struct nvml *nvml_open(const char *pci_bus_id)
{
	struct nvml *nvml = calloc(1, sizeof *nvml);

	if (nvml && find_gpu(nvml, pci_bus_id))
		return nvml;
	free(nvml);
	return NULL;
}

void nvml_close(struct nvml *nvml)
{
	if (!nvml)
		return;
	nvml->shutdown();
	dlclose(nvml->library);
	free(nvml);
}

void nvml_driver_version(const struct nvml *nvml, char *version, size_t size)
{
	version[0] = '\0';
	if (nvml && nvml->driver_version(version, (unsigned)size) != 0)
		version[0] = '\0';
}

bool nvml_throttled(const struct nvml *nvml)
{
	unsigned long long reasons = 0;

	return nvml && nvml->throttle_reasons(nvml->device, &reasons) == 0 &&
	       (reasons & REASONS) != 0;
}
