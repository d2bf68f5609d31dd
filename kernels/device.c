/* The list of backends, element types, and transfers that convert them. */
#include "kernels/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/data.h"

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

struct conditions conditions_unknown(void)
{
	return (struct conditions){.clock_mhz = NAN,
	                           .throttle = THROTTLE_UNKNOWN,
	                           .power_w = NAN,
	                           .switches = -1,
	                           .others = -1};
}

bool elements_fit(int64_t a, int64_t b, int64_t c)
{
	int64_t product;

	return !__builtin_mul_overflow(a, b, &product) &&
	       !__builtin_mul_overflow(product, c, &product) && product <= INT64_C(1) << 42;
}

size_t dtype_size(enum dtype dtype)
{
	static const size_t sizes[] = {4, 2, 4, 8};

	return sizes[dtype];
}

const char *dtype_name(enum dtype dtype)
{
	static const char *const names[] = {"fp32", "bf16", "int32", "fp64"};

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

#define CONVERT(to_type, from_type, expression)                                                    \
	do {                                                                                       \
		const from_type *x = from;                                                         \
		to_type *y = to; /* NOLINT(bugprone-macro-parentheses) */                          \
                                                                                                   \
		_Pragma("omp parallel for simd schedule(static)") for (size_t i = 0; i < count;    \
		                                                       i++) y[i] = expression;     \
	} while (0)

/* `count` elements of one floating-point type as another. */
static void convert(enum dtype to_dtype, void *to, enum dtype from_dtype, const void *from,
                    size_t count)
{
	if (to_dtype == DTYPE_BF16 && from_dtype == DTYPE_F32)
		CONVERT(uint16_t, float, bf16_from_float(x[i]));
	else if (to_dtype == DTYPE_BF16)
		CONVERT(uint16_t, double, bf16_from_float((float)x[i]));
	else if (to_dtype == DTYPE_F32 && from_dtype == DTYPE_BF16)
		CONVERT(float, uint16_t, float_from_bf16(x[i]));
	else if (to_dtype == DTYPE_F32)
		CONVERT(float, double, (float)x[i]);
	else if (from_dtype == DTYPE_BF16)
		CONVERT(double, uint16_t, float_from_bf16(x[i]));
	else
		CONVERT(double, float, x[i]);
}

/* Elements converted at a time: bounds the staging memory of a transfer of any size. */
enum { STAGING_COUNT = 8 << 20 };

static size_t staging_count(size_t count)
{
	return count < STAGING_COUNT ? count : STAGING_COUNT;
}

static enum status staging_allocate(void **staging, enum dtype dtype, size_t count)
{
	*staging = malloc((staging_count(count) + 1) * dtype_size(dtype));
	if (!*staging)
		return status_set(STATUS_OOM, "no memory to convert %zu elements", count);
	return STATUS_OK;
}

/* From elements of one floating-point type on the host to those of another on the device. */
static enum status upload_as(struct device *device, enum dtype dtype, void *to,
                             enum dtype host_dtype, const void *host, size_t count)
{
	void *staging;

	if (dtype == host_dtype)
		return device_upload(device, to, host, count * dtype_size(dtype));
	if (dtype == DTYPE_I32)
		return status_set(STATUS_INVALID, "%s cannot be stored as %s",
		                  dtype_name(host_dtype), dtype_name(dtype));
	enum status status = staging_allocate(&staging, dtype, count);
	for (size_t done = 0; status == STATUS_OK && done < count;) {
		const size_t n = staging_count(count - done);

		convert(dtype, staging, host_dtype,
		        (const char *)host + done * dtype_size(host_dtype), n);
		status = device_upload(device, (char *)to + done * dtype_size(dtype), staging,
		                       n * dtype_size(dtype));
		done += n;
	}
	free(staging);
	return status;
}

static enum status download_as(struct device *device, enum dtype dtype, const void *from,
                               enum dtype host_dtype, void *host, size_t count)
{
	void *staging;

	if (dtype == host_dtype)
		return device_download(device, host, from, count * dtype_size(dtype));
	if (dtype == DTYPE_I32)
		return status_set(STATUS_INVALID, "%s cannot be read as %s", dtype_name(dtype),
		                  dtype_name(host_dtype));
	enum status status = staging_allocate(&staging, dtype, count);
	for (size_t done = 0; status == STATUS_OK && done < count;) {
		const size_t n = staging_count(count - done);

		status = device_download(device, staging,
		                         (const char *)from + done * dtype_size(dtype),
		                         n * dtype_size(dtype));
		if (status == STATUS_OK)
			convert(host_dtype, (char *)host + done * dtype_size(host_dtype), dtype,
			        staging, n);
		done += n;
	}
	free(staging);
	return status;
}

enum status device_upload_floats(struct device *device, enum dtype dtype, void *to,
                                 const float *host, size_t count)
{
	return upload_as(device, dtype, to, DTYPE_F32, host, count);
}

enum status device_download_floats(struct device *device, enum dtype dtype, float *host,
                                   const void *from, size_t count)
{
	return download_as(device, dtype, from, DTYPE_F32, host, count);
}

enum status device_upload_doubles(struct device *device, enum dtype dtype, void *to,
                                  const double *host, size_t count)
{
	return upload_as(device, dtype, to, DTYPE_F64, host, count);
}

enum status device_download_doubles(struct device *device, enum dtype dtype, double *host,
                                    const void *from, size_t count)
{
	return download_as(device, dtype, from, DTYPE_F64, host, count);
}

enum status device_gather(struct device *device, const struct gather *gather, void *to)
{
	return device->backend->gather(device, gather, to);
}

static int64_t gather_index(const struct gather *g, int dimension, int64_t i)
{
	return g->list && g->listed == dimension ? g->list[i] : i;
}

static int64_t gather_rows(const struct gather *g)
{
	return g->size[0] * g->size[1] * g->size[2];
}

/* The first element of row number `row` of all dimensions but the last. */
static const char *gather_row(const struct gather *g, int64_t row)
{
	const int64_t i = row / (g->size[1] * g->size[2]), j = row / g->size[2] % g->size[1];
	const int64_t k = row % g->size[2];
	const int64_t at = gather_index(g, 0, i) * g->stride[0] +
	                   gather_index(g, 1, j) * g->stride[1] +
	                   gather_index(g, 2, k) * g->stride[2];

	return (const char *)g->from + (size_t)at * dtype_size(g->dtype);
}

static double element(enum dtype dtype, const void *at)
{
	return dtype == DTYPE_F64   ? *(const double *)at
	       : dtype == DTYPE_F32 ? (double)*(const float *)at
	                            : (double)float_from_bf16(*(const uint16_t *)at);
}

static double jittered(const struct gather *g, int64_t i, double value)
{
	return g->jitter > 0 ? gather_jittered(g, i, value) : value;
}

void gather_on_host(const struct gather *g, void *to)
{
	const int64_t n_rows = gather_rows(g), width = g->size[3];
	const size_t size = dtype_size(g->dtype);

#pragma omp parallel for schedule(static)
	for (int64_t row = 0; row < n_rows; row++) {
		const char *from = gather_row(g, row);

		for (int64_t l = 0; l < width; l++) {
			const char *at =
			        from + (size_t)(gather_index(g, 3, l) * g->stride[3]) * size;

			if (g->dtype == DTYPE_I32)
				memcpy((int32_t *)to + row * width + l, at, size);
			else
				((double *)to)[row * width + l] =
				        jittered(g, row * width + l, element(g->dtype, at));
		}
	}
}

int64_t nonfinite_on_host(const struct gather *gather)
{
	const int64_t n_rows = gather_rows(gather);
	int64_t n = 0;

#pragma omp parallel for schedule(static) reduction(+ : n)
	for (int64_t row = 0; row < n_rows; row++)
		for (int64_t l = 0; l < gather->size[3]; l++)
			n += !isfinite(
			        element(gather->dtype, gather_row(gather, row) +
			                                       (size_t)(l * gather->stride[3]) *
			                                               dtype_size(gather->dtype)));
	return n;
}

static void add_to_element(enum dtype dtype, void *at, float x)
{
	if (dtype == DTYPE_F64)
		*(double *)at += (double)x;
	else if (dtype == DTYPE_F32)
		*(float *)at += x;
	else
		*(uint16_t *)at = bf16_from_float(float_from_bf16(*(uint16_t *)at) + x);
}

void add_directions_on_host(const struct strided *rows, const struct directions *directions)
{
	const int64_t *n = rows->size, *s = rows->stride;
	const size_t size = dtype_size(rows->dtype);

#pragma omp parallel for schedule(static)
	for (int64_t row = 0; row < n[0] * n[1] * n[2]; row++) {
		const int64_t i = row / (n[1] * n[2]), j = row / n[2] % n[1], k = row % n[2];
		char *to = (char *)rows->data + (size_t)(i * s[0] + j * s[1] + k * s[2]) * size;
		int topic;
		const float share = direction_share(directions, i, j, k, &topic);

		for (int64_t c = 0; share != 0 && c < n[3]; c++)
			add_to_element(rows->dtype, to + (size_t)(c * s[3]) * size,
			               share * direction_element(directions, topic, c));
	}
}
