/* libblocks: versions, errors and devices. */
#include "layers/blocks_device.h"

#include <stdlib.h>
#include <string.h>

#include "version.h" /* written by make */

static const char reference_name[] = "reference";

const char *blocks_version(void)
{
	return VERSION;
}

const char *blocks_message(void)
{
	return status_message();
}

const char *blocks_backend(int i)
{
	int n = 0;

	while (backends[n])
		n++;
	return i < 0 || i > n ? NULL : i == n ? reference_name : backends[i]->name;
}

enum blocks_status blocks_status_of(enum status status)
{
	switch (status) {
	case STATUS_OK:
	case STATUS_NOISY:
		return BLOCKS_OK;
	case STATUS_OOM:
		return BLOCKS_OOM;
	case STATUS_UNSUPPORTED:
		return BLOCKS_UNSUPPORTED;
	case STATUS_CUDA:
		return BLOCKS_DEVICE;
	default:
		return BLOCKS_INVALID;
	}
}

void blocks_fill(void *to, const void *from, size_t bytes)
{
	size_t known;

	memcpy(&known, to, sizeof known);
	if (bytes < known)
		known = bytes;
	if (known > sizeof known)
		memcpy((char *)to + sizeof known, (const char *)from + sizeof known,
		       known - sizeof known);
}

/* Other people's kernels (baselines/), in the library with which rivals are measured: make peers.
 * In libblocks itself there are none. */
extern const struct kernel *const baseline_kernels[] __attribute__((weak));

enum blocks_status blocks_device_open(const char *backend, const char *which,
                                      struct blocks_device **device)
{
	const bool reference = strcmp(backend, reference_name) == 0;
	const struct backend *found = reference ? &cpu_backend : backend_find(backend);

	*device = NULL;
	if (!found)
		return blocks_status_of(
		        status_set(STATUS_INVALID, "this build has no backend '%.64s'", backend));
	struct blocks_device *opened = calloc(1, sizeof *opened);
	if (!opened)
		return blocks_status_of(status_set(STATUS_OOM, "no memory for a device"));
	const enum status status = found->open(which, baseline_kernels, &opened->opened);
	if (status != STATUS_OK) {
		free(opened);
		return blocks_status_of(status);
	}
	opened->device = reference ? opened->opened->reference : opened->opened;
	*device = opened;
	return BLOCKS_OK;
}

void blocks_device_close(struct blocks_device *device)
{
	if (!device)
		return;
	if (device->workspace)
		device_release(device->device, device->workspace);
	device_close(device->opened);
	free(device);
}

enum blocks_dtype blocks_device_activation(const struct blocks_device *device)
{
	return (enum blocks_dtype)device->device->activation;
}

enum blocks_dtype blocks_device_wide(const struct blocks_device *device)
{
	return (enum blocks_dtype)device->device->wide;
}

enum blocks_status blocks_device_set_stream(struct blocks_device *device, void *stream)
{
	const struct backend *backend = device->device->backend;

	if (!backend->use_stream)
		return blocks_status_of(
		        status_set(STATUS_UNSUPPORTED, "backend %s has no streams", backend->name));
	TRY_BLOCKS(device_synchronize(device->device));
	return blocks_status_of(backend->use_stream(device->opened, stream));
}

enum blocks_status blocks_device_set_provider(struct blocks_device *device, const char *list)
{
	return blocks_status_of(provider_choice_parse(&device->choice, device->device, list));
}

enum blocks_status blocks_allocate(struct blocks_device *device, size_t bytes, void **memory)
{
	return blocks_status_of(device_allocate(device->device, bytes, memory));
}

void blocks_release(struct blocks_device *device, void *memory)
{
	if (memory)
		device_release(device->device, memory);
}

enum blocks_status blocks_upload(struct blocks_device *device, void *to, const void *host,
                                 size_t bytes)
{
	return blocks_status_of(device_upload(device->device, to, host, bytes));
}

enum blocks_status blocks_download(struct blocks_device *device, void *host, const void *from,
                                   size_t bytes)
{
	return blocks_status_of(device_download(device->device, host, from, bytes));
}

enum blocks_status blocks_synchronize(struct blocks_device *device)
{
	return blocks_status_of(device_synchronize(device->device));
}
