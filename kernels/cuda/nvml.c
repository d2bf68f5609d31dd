#define _GNU_SOURCE
#include "kernels/cuda/nvml.h"

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/device.h"

/* From NVML's documentation: the reasons for which a clock is lower than it could be. */
static const struct {
	unsigned long long bit;
	enum throttle reason;
} reasons[] = {
        {0x4, THROTTLE_POWER},     /* software power cap */
        {0x8, THROTTLE_HARDWARE},  /* hardware slowdown */
        {0x20, THROTTLE_HEAT},     /* software thermal slowdown */
        {0x40, THROTTLE_HEAT},     /* hardware thermal slowdown */
        {0x80, THROTTLE_HARDWARE}, /* power brake */
};

/* nvmlFieldValue_t, and the field that is the power of now. */
struct field_value {
	unsigned field, scope;
	long long timestamp, latency_us;
	unsigned type;
	int status;
	union {
		double real;
		unsigned integer;
		unsigned long long wide;
	} value;
};

enum { FIELD_POWER_INSTANT = 186 };

struct nvml {
	void *library, *device;
	int (*shutdown)(void);
	int (*driver_version)(char *version, unsigned length);
	int (*throttle_reasons)(void *device, unsigned long long *reasons);
	/* NULL where the library has none: */
	int (*power_usage)(void *device, unsigned *milliwatts);
	int (*field_values)(void *device, int count, struct field_value *values);
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

	const char *named = getenv("NVML_LIBRARY");

	nvml->library = dlopen(named ? named : "libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
	if (!nvml->library)
		return false;
	find(nvml->library, &nvml->power_usage, "nvmlDeviceGetPowerUsage");
	find(nvml->library, &nvml->field_values, "nvmlDeviceGetFieldValues");
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

static int throttle_now(const struct nvml *nvml)
{
	unsigned long long bits = 0;
	int throttle = 0;

	if (nvml->throttle_reasons(nvml->device, &bits) != 0)
		return THROTTLE_UNKNOWN;
	for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
		if (bits & reasons[i].bit)
			throttle |= (int)reasons[i].reason;
	return throttle;
}

static double power_now(const struct nvml *nvml)
{
	struct field_value instant = {.field = FIELD_POWER_INSTANT};
	unsigned milliwatts;

	if (nvml->field_values && nvml->field_values(nvml->device, 1, &instant) == 0 &&
	    instant.status == 0)
		return 1e-3 * instant.value.integer;
	if (nvml->power_usage && nvml->power_usage(nvml->device, &milliwatts) == 0)
		return 1e-3 * milliwatts;
	return NAN;
}

void nvml_read(const struct nvml *nvml, struct nvml_reading *reading)
{
	reading->throttle = nvml ? throttle_now(nvml) : THROTTLE_UNKNOWN;
	reading->power_w = nvml ? power_now(nvml) : NAN;
}
