/*
 * Reads and writes safetensors files: an 8-byte little-endian header length, a JSON
 * header, raw row-major tensors. Only the element types of golden files.
 * Everything the header says is checked before it is believed, so a truncated
 * or hostile file yields STATUS_INVALID with a message and nothing else.
 */
#ifndef BENCH_SAFETENSORS_H
#define BENCH_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/status.h"

enum { SAFETENSORS_MAX_DIMS = 8 };

/* What memory holds, and what the file does: other floating-point types are read as F32. */
enum safetensors_dtype { SAFETENSORS_F32, SAFETENSORS_I64 };
enum safetensors_stored { STORED_F32, STORED_I64, STORED_F64, STORED_F16, STORED_BF16 };

struct safetensor {
	char *name;
	enum safetensors_dtype dtype;
	enum safetensors_stored stored;
	int n_dims;
	int64_t dims[SAFETENSORS_MAX_DIMS];
	int64_t count; /* elements: the product of dims */
	union {        /* by dtype; aligned for it */
		const float *f32;
		const int64_t *i64;
	} data;
};

struct safetensors_metadata {
	char *key, *value;
};

/* A whole file in memory; owns everything it points to. */
struct safetensors {
	int n_tensors;
	struct safetensor *tensors; /* in the order of their data */
	int n_metadata;
	struct safetensors_metadata *metadata;
	void *data;
};

/*
 * Reads the file at `path`. STATUS_IO if it cannot be read, STATUS_INVALID if
 * it is no sound safetensors file, STATUS_OOM; *file is then empty. The caller
 * releases it with safetensors_close().
 */
enum status safetensors_open(const char *path, struct safetensors *file);

/* The same from `size` bytes of memory, which are copied. */
enum status safetensors_parse(const void *bytes, size_t size, struct safetensors *file);

void safetensors_close(struct safetensors *file);

/* Writes the tensors, in this order, and the metadata; floats as F32. STATUS_IO if it cannot. */
enum status safetensors_write(const char *path, const struct safetensors *file);

/* The tensor called `name`, or NULL. */
const struct safetensor *safetensors_find(const struct safetensors *file, const char *name);

/* The metadata's value for `key`, or NULL. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);

#endif
