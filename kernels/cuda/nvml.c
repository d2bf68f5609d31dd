#define _GNU_SOURCE
#include "kernels/cuda/nvml.h"

#include <dlfcn.h>
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

static struct {
	void *library, *device;
	int (*shutdown)(void);
	int (*driver_version)(char *version, unsigned length);
	int (*throttle_reasons)(void *device, unsigned long long *reasons);
} nvml;

/* Function pointers come from dlsym() as object pointers; POSIX lets them be copied as bytes. */
static bool find(void *function, const char *name)
{
	void *symbol = dlsym(nvml.library, name);

	memcpy(function, &symbol, sizeof symbol);
	return symbol != NULL;
}

bool nvml_open(const char *pci_bus_id)
{
	int (*init)(void);
	int (*handle)(const char *pci_bus_id, void **device);

	nvml_close();
	nvml.library = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
	if (!nvml.library)
		return false;
	if (find(&init, "nvmlInit_v2") && find(&nvml.shutdown, "nvmlShutdown") &&
	    find(&handle, "nvmlDeviceGetHandleByPciBusId_v2") &&
	    find(&nvml.driver_version, "nvmlSystemGetDriverVersion") &&
	    find(&nvml.throttle_reasons, "nvmlDeviceGetCurrentClocksThrottleReasons") &&
	    init() == 0) {
		if (handle(pci_bus_id, &nvml.device) == 0)
			return true;
		nvml.shutdown();
	}
	dlclose(nvml.library);
	memset(&nvml, 0, sizeof nvml);
	return false;
}

void nvml_close(void)
{
	if (!nvml.library)
		return;
	nvml.shutdown();
	dlclose(nvml.library);
	memset(&nvml, 0, sizeof nvml);
}

void nvml_driver_version(char *version, size_t size)
{
	version[0] = '\0';
	if (nvml.library && nvml.driver_version(version, (unsigned)size) != 0)
		version[0] = '\0';
}

bool nvml_throttled(void)
{
	unsigned long long reasons = 0;

	return nvml.library && nvml.throttle_reasons(nvml.device, &reasons) == 0 &&
	       (reasons & REASONS) != 0;
}
