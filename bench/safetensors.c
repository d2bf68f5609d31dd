#include "bench/safetensors.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Far above any real header, far below what could exhaust memory or the parser's stack. */
enum {
	LENGTH_BYTES = 8,
	MAX_HEADER_BYTES = 8 << 20,
	MAX_HEADER_DEPTH = 3,
	MAX_FILE_TENSORS = 4096,
	MAX_ELEMENT = sizeof(int64_t)
};

/* A tensor and where its data lies, while the header is read. */
struct entry {
	struct safetensor tensor;
	size_t begin, end;
};

/* By enum safetensors_stored. */
static const struct {
	const char *name;
	size_t bytes;
} stored_types[] = {
        [STORED_F32] = {"F32", 4}, [STORED_I64] = {"I64", 8},   [STORED_F64] = {"F64", 8},
        [STORED_F16] = {"F16", 2}, [STORED_BF16] = {"BF16", 2},
};

enum { N_STORED = sizeof stored_types / sizeof *stored_types };

/* Bytes of an element in memory. */
static size_t element_size(enum safetensors_dtype dtype)
{
	return dtype == SAFETENSORS_F32 ? sizeof(float) : sizeof(int64_t);
}

static float float_of_bits(uint32_t bits)
{
	float value;

	memcpy(&value, &bits, sizeof value);
	return value;
}

/* Sign, 5 bits of exponent, 10 of fraction. */
static float float_of_half(uint16_t half)
{
	const uint32_t sign = (uint32_t)(half & 0x8000) << 16, fraction = half & 0x3ff;
	const uint32_t exponent = half >> 10 & 31;

	if (exponent == 31)
		return float_of_bits(sign | 0x7f800000u | fraction << 13);
	if (exponent == 0) {
		const float small = (float)fraction * 0x1p-24f;

		return sign ? -small : small;
	}
	return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Element i of floats that are stored as another type; the bytes lie anywhere. */
static float stored_float(enum safetensors_stored stored, const char *bytes, size_t i)
{
	uint16_t narrow;
	double wide;

	if (stored == STORED_F64) {
		memcpy(&wide, bytes + i * sizeof wide, sizeof wide);
		return (float)wide;
	}
	memcpy(&narrow, bytes + i * sizeof narrow, sizeof narrow);
	return stored == STORED_F16 ? float_of_half(narrow) : float_of_bits((uint32_t)narrow << 16);
}

static char *copy_string(const char *text)
{
	size_t bytes = strlen(text) + 1;
	char *copy = malloc(bytes);

	if (copy)
		memcpy(copy, text, bytes);
	return copy;
}

/* The JSON parser recurses; so the nesting is bounded before it sees the text. */
static bool too_deep(const char *text, size_t length)
{
	bool in_string = false;
	int depth = 0;

	for (size_t i = 0; i < length; i++) {
		if (in_string) {
			in_string = text[i] != '"';
			i += text[i] == '\\';
		} else if (text[i] == '"') {
			in_string = true;
		} else if (text[i] == '{' || text[i] == '[') {
			if (++depth > MAX_HEADER_DEPTH)
				return true;
		} else if (text[i] == '}' || text[i] == ']') {
			depth--;
		}
	}
	return false;
}

/* Parses the header's text, which must be one JSON object. The caller deletes *json. */
static enum status parse_json(const char *bytes, size_t length, cJSON **json)
{
	char *text = malloc(length + 1);
	const char *end = NULL;

	if (!text)
		return status_set(STATUS_OOM, "no memory for a header of %zu bytes", length);
	/* A terminated copy: the parser may look one byte past what it is told. */
	memcpy(text, bytes, length);
	text[length] = '\0';
	*json = cJSON_ParseWithLengthOpts(text, length + 1, &end, false);
	bool clean = cJSON_IsObject(*json) && end + strspn(end, " \t\r\n") == text + length;
	free(text);
	if (clean)
		return STATUS_OK;
	cJSON_Delete(*json);
	return status_set(STATUS_INVALID, "the header is not a JSON object");
}

/* A JSON number that is an integer from 0 to 2^53, which doubles hold exactly. */
static bool read_integer(const cJSON *json, int64_t *value)
{
	const double limit = 9007199254740992.0;

	if (!cJSON_IsNumber(json) || !(json->valuedouble >= 0 && json->valuedouble <= limit))
		return false;
	*value = (int64_t)json->valuedouble;
	return (double)*value == json->valuedouble;
}

static enum status read_dtype(const cJSON *json, struct safetensor *tensor)
{
	const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(json, "dtype"));

	if (!name)
		return status_set(STATUS_INVALID, "tensor '%.64s' has no dtype", tensor->name);
	int type = 0;
	while (type < N_STORED && strcmp(name, stored_types[type].name) != 0)
		type++;
	if (type == N_STORED)
		return status_set(
		        STATUS_INVALID,
		        "tensor '%.64s': dtype '%.16s' is none of F32, F64, F16, BF16, I64",
		        tensor->name, name);
	tensor->stored = (enum safetensors_stored)type;
	tensor->dtype = type == STORED_I64 ? SAFETENSORS_I64 : SAFETENSORS_F32;
	return STATUS_OK;
}

static enum status read_shape(const cJSON *json, struct safetensor *tensor)
{
	const cJSON *shape = cJSON_GetObjectItemCaseSensitive(json, "shape"), *dim;

	if (!cJSON_IsArray(shape) || cJSON_GetArraySize(shape) > SAFETENSORS_MAX_DIMS)
		return status_set(STATUS_INVALID,
		                  "tensor '%.64s': shape is not an array of at most %d sizes",
		                  tensor->name, SAFETENSORS_MAX_DIMS);
	tensor->count = 1;
	cJSON_ArrayForEach(dim, shape)
	{
		int64_t size;

		if (!read_integer(dim, &size))
			return status_set(STATUS_INVALID, "tensor '%.64s': a size is no integer",
			                  tensor->name);
		if (size > 0 && tensor->count > INT64_MAX / size)
			return status_set(STATUS_INVALID, "tensor '%.64s': the shape overflows",
			                  tensor->name);
		tensor->dims[tensor->n_dims++] = size;
		tensor->count *= size;
	}
	return STATUS_OK;
}

static enum status read_offsets(const cJSON *json, size_t data_size, struct entry *entry)
{
	const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(json, "data_offsets");
	const char *name = entry->tensor.name;
	size_t element = stored_types[entry->tensor.stored].bytes;
	int64_t begin, end;

	if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
	    !read_integer(offsets->child, &begin) || !read_integer(offsets->child->next, &end) ||
	    begin > end)
		return status_set(STATUS_INVALID,
		                  "tensor '%.64s': data_offsets is not [begin, end]", name);
	if ((uint64_t)end > data_size)
		return status_set(STATUS_INVALID,
		                  "tensor '%.64s' ends at byte %lld of the data, which has %zu",
		                  name, (long long)end, data_size);
	/* Divided, not multiplied: count times the element's size may overflow. */
	size_t bytes = (size_t)(end - begin);
	if (bytes % element != 0 || bytes / element != (uint64_t)entry->tensor.count)
		return status_set(STATUS_INVALID,
		                  "tensor '%.64s' has %zu bytes, its shape %lld elements", name,
		                  bytes, (long long)entry->tensor.count);
	entry->begin = (size_t)begin;
	entry->end = (size_t)end;
	return STATUS_OK;
}

static enum status read_tensor(const cJSON *json, size_t data_size, struct entry *entry)
{
	*entry = (struct entry){.tensor.name = json->string};
	if (json->string[0] == '\0' || !cJSON_IsObject(json))
		return status_set(STATUS_INVALID, "entry '%.64s' describes no tensor",
		                  json->string);
	TRY(read_dtype(json, &entry->tensor));
	TRY(read_shape(json, &entry->tensor));
	return read_offsets(json, data_size, entry);
}

static int compare_entries(const void *left, const void *right)
{
	const struct entry *a = left, *b = right;

	if (a->begin != b->begin)
		return a->begin < b->begin ? -1 : 1;
	return (a->end > b->end) - (a->end < b->end);
}

/* Sorts by position; the tensors must fill the data without overlap or gap. */
static enum status check_layout(struct entry *entries, int n_entries, size_t data_size)
{
	size_t position = 0;

	qsort(entries, (size_t)n_entries, sizeof *entries, compare_entries);
	for (int i = 0; i < n_entries; i++) {
		if (entries[i].begin != position)
			return status_set(
			        STATUS_INVALID, "tensor '%.64s' %s", entries[i].tensor.name,
			        entries[i].begin < position ? "overlaps another" : "follows a gap");
		position = entries[i].end;
		for (int j = 0; j < i; j++)
			if (strcmp(entries[i].tensor.name, entries[j].tensor.name) == 0)
				return status_set(STATUS_INVALID, "two tensors '%.64s'",
				                  entries[i].tensor.name);
	}
	if (position != data_size)
		return status_set(STATUS_INVALID, "%zu bytes follow the last tensor",
		                  data_size - position);
	return STATUS_OK;
}

static enum status take_metadata(const cJSON *json, struct safetensors *file)
{
	const cJSON *item;

	if (!cJSON_IsObject(json))
		return status_set(STATUS_INVALID, "__metadata__ is not an object");
	file->metadata = calloc((size_t)cJSON_GetArraySize(json) + 1, sizeof *file->metadata);
	if (!file->metadata)
		return status_set(STATUS_OOM, "no memory for the metadata");
	cJSON_ArrayForEach(item, json)
	{
		struct safetensors_metadata *entry = &file->metadata[file->n_metadata++];

		if (!cJSON_IsString(item))
			return status_set(STATUS_INVALID, "metadata '%.64s' is not a string",
			                  item->string);
		entry->key = copy_string(item->string);
		entry->value = copy_string(item->valuestring);
		if (!entry->key || !entry->value)
			return status_set(STATUS_OOM, "no memory for the metadata");
	}
	return STATUS_OK;
}

/* Bytes that a tensor takes in memory, aligned for any type. */
static size_t memory_bytes(const struct safetensor *tensor)
{
	const size_t bytes = (size_t)tensor->count * element_size(tensor->dtype);

	return (bytes + MAX_ELEMENT - 1) / MAX_ELEMENT * MAX_ELEMENT;
}

/* Copies a tensor's data to where its type may lie. */
static void take_data(struct safetensor *tensor, const char *data, void *to)
{
	if (tensor->stored == STORED_F32 || tensor->stored == STORED_I64)
		memcpy(to, data, (size_t)tensor->count * element_size(tensor->dtype));
	else
		for (size_t i = 0; i < (size_t)tensor->count; i++)
			((float *)to)[i] = stored_float(tensor->stored, data, i);
	if (tensor->dtype == SAFETENSORS_F32)
		tensor->data.f32 = to;
	else
		tensor->data.i64 = to;
}

/* Copies the data, and makes the entries the file's tensors, owning their names. */
static enum status take_tensors(const struct entry *entries, int n_entries, const char *data,
                                struct safetensors *file)
{
	size_t bytes = 0, used = 0;

	for (int i = 0; i < n_entries; i++)
		bytes += memory_bytes(&entries[i].tensor);
	file->data = malloc(bytes + 1);
	file->tensors = calloc((size_t)n_entries + 1, sizeof *file->tensors);
	if (!file->data || !file->tensors)
		return status_set(STATUS_OOM, "no memory for %zu bytes of tensors", bytes);
	for (int i = 0; i < n_entries; i++) {
		struct safetensor *tensor = &file->tensors[i];

		*tensor = entries[i].tensor;
		tensor->name = copy_string(entries[i].tensor.name);
		file->n_tensors++;
		if (!tensor->name)
			return status_set(STATUS_OOM, "no memory for a tensor's name");
		take_data(tensor, data + entries[i].begin, (char *)file->data + used);
		used += memory_bytes(tensor);
	}
	return STATUS_OK;
}

static enum status read_header(const cJSON *header, const char *data, size_t data_size,
                               struct safetensors *file)
{
	int n_entries = 0, n_items = cJSON_GetArraySize(header);
	enum status status = STATUS_OK;
	struct entry *entries;
	const cJSON *item;

	if (n_items > MAX_FILE_TENSORS)
		return status_set(STATUS_INVALID, "more than %d tensors", MAX_FILE_TENSORS);
	entries = calloc((size_t)n_items + 1, sizeof *entries);
	if (!entries)
		return status_set(STATUS_OOM, "no memory for %d tensors", n_items);
	cJSON_ArrayForEach(item, header)
	{
		if (strcmp(item->string, "__metadata__") != 0)
			status = read_tensor(item, data_size, &entries[n_entries++]);
		else if (file->metadata)
			status = status_set(STATUS_INVALID, "two entries '__metadata__'");
		else
			status = take_metadata(item, file);
		if (status != STATUS_OK)
			break;
	}
	if (status == STATUS_OK)
		status = check_layout(entries, n_entries, data_size);
	if (status == STATUS_OK)
		status = take_tensors(entries, n_entries, data, file);
	free(entries);
	return status;
}

/* The header's length, or STATUS_INVALID if `size` bytes cannot hold it. */
static enum status header_length(const unsigned char *bytes, size_t size, size_t *length)
{
	uint64_t value = 0;

	if (size < LENGTH_BYTES)
		return status_set(STATUS_INVALID, "%zu bytes are too few for a safetensors file",
		                  size);
	for (int i = 0; i < LENGTH_BYTES; i++)
		value |= (uint64_t)bytes[i] << (8 * i);
	if (value > MAX_HEADER_BYTES)
		return status_set(STATUS_INVALID, "a header of %llu bytes, more than %d",
		                  (unsigned long long)value, MAX_HEADER_BYTES);
	if (value > size - LENGTH_BYTES)
		return status_set(STATUS_INVALID, "a header of %llu bytes in a file of %zu",
		                  (unsigned long long)value, size);
	*length = (size_t)value;
	return STATUS_OK;
}

enum status safetensors_parse(const void *bytes, size_t size, struct safetensors *file)
{
	const char *text = (const char *)bytes + LENGTH_BYTES;
	size_t length = 0;
	cJSON *header = NULL;

	*file = (struct safetensors){0};
	TRY(header_length(bytes, size, &length));
	if (too_deep(text, length))
		return status_set(STATUS_INVALID, "the header is nested deeper than %d",
		                  MAX_HEADER_DEPTH);
	TRY(parse_json(text, length, &header));
	enum status status = read_header(header, text + length, size - LENGTH_BYTES - length, file);
	cJSON_Delete(header);
	if (status != STATUS_OK)
		safetensors_close(file);
	return status;
}

/* The rest of a stream, which the caller frees; NULL with errno set if it cannot be read. */
static char *read_stream(FILE *stream, size_t *size)
{
	size_t capacity = 0;
	char *bytes = NULL;

	*size = 0;
	do {
		if (*size == capacity) {
			char *larger = realloc(bytes, capacity = 2 * capacity + (1 << 20));

			if (!larger) {
				free(bytes);
				return NULL;
			}
			bytes = larger;
		}
		*size += fread(bytes + *size, 1, capacity - *size, stream);
	} while (!feof(stream) && !ferror(stream));
	if (!ferror(stream))
		return bytes;
	free(bytes);
	return NULL;
}

enum status safetensors_open(const char *path, struct safetensors *file)
{
	FILE *stream = fopen(path, "rb");
	size_t size;

	*file = (struct safetensors){0};
	if (!stream)
		return status_set(STATUS_IO, "%s: %s", path, strerror(errno));
	char *bytes = read_stream(stream, &size);
	int error = errno;
	fclose(stream);
	if (!bytes)
		return status_set(STATUS_IO, "%s: %s", path, strerror(error));
	enum status status = safetensors_parse(bytes, size, file);
	free(bytes);
	if (status != STATUS_OK) {
		char reason[256];

		snprintf(reason, sizeof reason, "%s", status_message());
		status_set(status, "%s: %s", path, reason);
	}
	return status;
}

/* ---- writing ---- */

static size_t tensor_bytes(const struct safetensor *tensor)
{
	return (size_t)tensor->count * element_size(tensor->dtype);
}

static void add_entry(cJSON *header, const struct safetensor *tensor, size_t begin)
{
	cJSON *entry = cJSON_AddObjectToObject(header, tensor->name);

	cJSON_AddStringToObject(entry, "dtype", tensor->dtype == SAFETENSORS_F32 ? "F32" : "I64");
	cJSON *shape = cJSON_AddArrayToObject(entry, "shape");
	for (int d = 0; d < tensor->n_dims; d++)
		cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)tensor->dims[d]));
	cJSON *offsets = cJSON_AddArrayToObject(entry, "data_offsets");
	cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)begin));
	cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)(begin + tensor_bytes(tensor))));
}

/* The header as text, which cJSON_free() releases; NULL without memory. */
static char *print_header(const struct safetensors *file)
{
	cJSON *header = cJSON_CreateObject();
	cJSON *metadata = cJSON_AddObjectToObject(header, "__metadata__");
	size_t begin = 0;

	for (int i = 0; i < file->n_metadata; i++)
		cJSON_AddStringToObject(metadata, file->metadata[i].key, file->metadata[i].value);
	for (int i = 0; i < file->n_tensors; i++) {
		add_entry(header, &file->tensors[i], begin);
		begin += tensor_bytes(&file->tensors[i]);
	}
	char *text = cJSON_PrintUnformatted(header);
	cJSON_Delete(header);
	return text;
}

static bool write_tensor(const struct safetensor *tensor, FILE *stream)
{
	const void *data = tensor->dtype == SAFETENSORS_F32 ? (const void *)tensor->data.f32
	                                                    : (const void *)tensor->data.i64;
	const size_t bytes = tensor_bytes(tensor);

	return fwrite(data, 1, bytes, stream) == bytes;
}

static enum status cannot_write(const char *path)
{
	return status_set(STATUS_IO, "%s: %s", path, strerror(errno));
}

enum status safetensors_write(const char *path, const struct safetensors *file)
{
	FILE *stream = fopen(path, "wb");
	unsigned char length[LENGTH_BYTES];

	if (!stream)
		return cannot_write(path);
	char *header = print_header(file);
	for (int i = 0; i < LENGTH_BYTES && header; i++)
		length[i] = (unsigned char)((uint64_t)strlen(header) >> (8 * i));
	bool good = header && fwrite(length, LENGTH_BYTES, 1, stream) == 1 &&
	            fputs(header, stream) >= 0;
	for (int i = 0; i < file->n_tensors && good; i++)
		good = write_tensor(&file->tensors[i], stream);
	cJSON_free(header);
	good = fclose(stream) == 0 && good;
	return good ? STATUS_OK : cannot_write(path);
}

void safetensors_close(struct safetensors *file)
{
	for (int i = 0; i < file->n_tensors; i++)
		free(file->tensors[i].name);
	for (int i = 0; i < file->n_metadata; i++) {
		free(file->metadata[i].key);
		free(file->metadata[i].value);
	}
	free(file->tensors);
	free(file->metadata);
	free(file->data);
	*file = (struct safetensors){0};
}

const struct safetensor *safetensors_find(const struct safetensors *file, const char *name)
{
	for (int i = 0; i < file->n_tensors; i++)
		if (strcmp(file->tensors[i].name, name) == 0)
			return &file->tensors[i];
	return NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key)
{
	for (int i = 0; i < file->n_metadata; i++)
		if (strcmp(file->metadata[i].key, key) == 0)
			return file->metadata[i].value;
	return NULL;
}
