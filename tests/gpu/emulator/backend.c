/* The backend "cuda" of an emulated GPU: host memory, plain matrix products, the portable kernels.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/gemm.h"

/* A small device, so that small problems already fill it and long ones are cut up. */
enum { MULTIPROCESSORS = 8 };

static double started;
static struct kernel portable_kernels[OP_COUNT + 1];

cudaStream_t cuda_stream(void)
{
	return NULL;
}

int cuda_sm_count(void)
{
	return MULTIPROCESSORS;
}

/* Only the portable kernels are there: others have names in the list, but no code was linked. */
static enum status emulated_open(int index)
{
	int count = 0;

	for (const struct kernel *k = cuda_kernels; k->provider && count < OP_COUNT; k++)
		if (strcmp(k->provider, "portable") == 0)
			portable_kernels[count++] = *k;
	return index == 0 ? STATUS_OK : status_set(STATUS_INVALID, "one GPU is emulated");
}

static void emulated_close(void)
{
}

static enum status emulated_info(struct device_info *info)
{
	*info = (struct device_info){.name = "emulated GPU",
	                             .driver = "none",
	                             .runtime = "none",
	                             .memory_total = (size_t)4 << 30,
	                             .memory_free = (size_t)4 << 30};
	return STATUS_OK;
}

static enum status emulated_allocate(size_t bytes, void **memory)
{
	*memory = aligned_alloc(256, (bytes + 256) / 256 * 256);
	return *memory ? STATUS_OK : status_set(STATUS_OOM, "no %zu bytes", bytes);
}

static enum status emulated_copy_bytes(void *to, const void *from, size_t bytes)
{
	memcpy(to, from, bytes);
	return STATUS_OK;
}

static enum status emulated_fill(void *memory, int byte, size_t bytes)
{
	memset(memory, byte, bytes);
	return STATUS_OK;
}

static enum status emulated_nothing(void)
{
	return STATUS_OK;
}

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static enum status emulated_start(void)
{
	started = now_ms();
	return STATUS_OK;
}

static enum status emulated_stop(double *milliseconds)
{
	*milliseconds = now_ms() - started;
	return STATUS_OK;
}

static void emulated_push(const char *name)
{
	(void)name;
}

static float element(const void *matrix, int64_t index)
{
	const uint32_t bits = (uint32_t)((const uint16_t *)matrix)[index] << 16;
	float value;

	memcpy(&value, &bits, sizeof value);
	return value;
}

/* One element of a product of bf16 matrices, no batch. */
static float product(const struct gemm *g, int64_t row, int64_t column)
{
	const int64_t a_row = g->a_transposed ? 1 : g->a_leading;
	const int64_t a_step = g->a_transposed ? g->a_leading : 1;
	const int64_t b_column = g->b_transposed ? g->b_leading : 1;
	const int64_t b_step = g->b_transposed ? 1 : g->b_leading;
	float sum = 0.0f;

	for (int64_t k = 0; k < g->inner; k++)
		sum += element(g->a, row * a_row + k * a_step) *
		       element(g->b, column * b_column + k * b_step);
	return g->scale * sum;
}

enum status gemm_run(const struct gemm *g, void *workspace)
{
	float *sums = malloc((size_t)g->columns * sizeof *sums);
	enum status status = STATUS_OK;

	(void)workspace;
	if (!sums)
		return status_set(STATUS_OOM, "no memory for a row of a product");
	for (int64_t row = 0; row < g->rows && status == STATUS_OK; row++) {
		const int64_t first = row * g->out_leading;

		for (int64_t i = 0; i < g->columns; i++)
			sums[i] = product(g, row, i) +
			          (g->addend ? element(g->addend, first + i) : 0.0f);
		status = backend_upload_floats(&cuda_backend, g->out_type,
		                               (char *)g->out +
		                                       (size_t)first * dtype_size(g->out_type),
		                               sums, (size_t)g->columns);
	}
	free(sums);
	return status;
}

const struct backend cuda_backend = {
        .name = "cuda",
        .activation = DTYPE_BF16,
        .open = emulated_open,
        .close = emulated_close,
        .info = emulated_info,
        .allocate = emulated_allocate,
        .release = free,
        .upload = emulated_copy_bytes,
        .download = emulated_copy_bytes,
        .fill = emulated_fill,
        .synchronize = emulated_nothing,
        .stopwatch_start = emulated_start,
        .stopwatch_stop = emulated_stop,
        .flush_cache = emulated_nothing,
        .range_push = emulated_push,
        .range_pop = emulated_close,
        .kernels = portable_kernels,
};
