/* The list of backends, element types, and transfers that convert them. */
#include "kernels/backend.h"

#include <stdlib.h>
#include <string.h>

#ifdef WITH_CUDA
extern const struct backend cuda_backend;
#endif

const struct backend *const backends[] = {
#ifdef WITH_CUDA
        &cuda_backend,
#endif
        &cpu_backend,
        NULL,
};

const struct backend *backend_find(const char *name)
{
	for (int i = 0; backends[i]; i++)
		if (strcmp(backends[i]->name, name) == 0)
			return backends[i];
	return NULL;
}

size_t dtype_size(enum dtype dtype)
{
	return dtype == DTYPE_BF16 ? 2 : 4;
}

const char *dtype_name(enum dtype dtype)
{
	static const char *const names[] = {"fp32", "bf16", "int32"};

	return names[dtype];
}

/* Round to nearest, ties to even; a NaN stays a (quiet) NaN. */
static inline uint16_t bf16_from_float(float value)
{
	uint32_t bits;

	memcpy(&bits, &value, sizeof bits);
	uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
	uint32_t quiet = bits >> 16 | 0x40u;
	return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static inline float float_from_bf16(uint16_t value)
{
	uint32_t bits = (uint32_t)value << 16;
	float result;

	memcpy(&result, &bits, sizeof result);
	return result;
}

/* Elements converted at a time: bounds the staging memory of a transfer of any size. */
enum { STAGING_COUNT = 8 << 20 };

static size_t staging_count(size_t count)
{
	return count < STAGING_COUNT ? count : STAGING_COUNT;
}

static enum status staging_allocate(uint16_t **staging, size_t count)
{
	*staging = malloc((staging_count(count) + 1) * sizeof **staging);
	if (!*staging)
		return status_set(STATUS_OOM, "no memory to convert %zu elements", count);
	return STATUS_OK;
}

static enum status upload_bf16(const struct backend *backend, uint16_t *device, const float *host,
                               size_t count)
{
	uint16_t *staging;
	enum status status = staging_allocate(&staging, count);

	for (size_t done = 0; status == STATUS_OK && done < count;) {
		size_t n = staging_count(count - done);
		const float *from = host + done;

#pragma omp parallel for simd schedule(static)
		for (size_t i = 0; i < n; i++)
			staging[i] = bf16_from_float(from[i]);
		status = backend->upload(device + done, staging, n * sizeof *staging);
		done += n;
	}
	free(staging);
	return status;
}

static enum status download_bf16(const struct backend *backend, float *host, const uint16_t *device,
                                 size_t count)
{
	uint16_t *staging;
	enum status status = staging_allocate(&staging, count);

	for (size_t done = 0; status == STATUS_OK && done < count;) {
		size_t n = staging_count(count - done);
		float *to = host + done;

		status = backend->download(staging, device + done, n * sizeof *staging);
		if (status != STATUS_OK)
			break;
#pragma omp parallel for simd schedule(static)
		for (size_t i = 0; i < n; i++)
			to[i] = float_from_bf16(staging[i]);
		done += n;
	}
	free(staging);
	return status;
}

enum status backend_upload_floats(const struct backend *backend, enum dtype dtype, void *device,
                                  const float *host, size_t count)
{
	if (dtype == DTYPE_F32)
		return backend->upload(device, host, count * sizeof *host);
	if (dtype == DTYPE_BF16)
		return upload_bf16(backend, device, host, count);
	return status_set(STATUS_INVALID, "floats cannot be stored as %s", dtype_name(dtype));
}

enum status backend_download_floats(const struct backend *backend, enum dtype dtype, float *host,
                                    const void *device, size_t count)
{
	if (dtype == DTYPE_F32)
		return backend->download(host, device, count * sizeof *host);
	if (dtype == DTYPE_BF16)
		return download_bf16(backend, host, device, count);
	return status_set(STATUS_INVALID, "%s cannot be read as floats", dtype_name(dtype));
}
