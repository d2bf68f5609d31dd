/* Stands in for NVIDIA's management library: answers what a test has put here. */
int fake_nvml_status;
unsigned long long fake_nvml_reasons;
unsigned fake_nvml_milliwatts;

int nvmlInit_v2(void);
int nvmlShutdown(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *pci_bus_id, void **device);
int nvmlSystemGetDriverVersion(char *version, unsigned length);
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons);
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts);

int nvmlInit_v2(void)
{
	return 0;
}

int nvmlShutdown(void)
{
	return 0;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *pci_bus_id, void **device)
{
	(void)pci_bus_id;
	*device = &fake_nvml_status;
	return 0;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
	if (length > 0)
		version[0] = '\0';
	return 0;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons)
{
	(void)device;
	*reasons = fake_nvml_reasons;
	return fake_nvml_status;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts)
{
	(void)device;
	*milliwatts = fake_nvml_milliwatts;
	return fake_nvml_status;
}
