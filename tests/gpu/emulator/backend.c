/* The backend "cuda" of emulated GPUs: host memory, plain matrix products, the portable kernels.
 * Several can be open at once.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/portable/kernels.h"
#include "kernels/reference/reference.h"

/* A small device, so that small problems already fill it and long ones are cut up. */
enum { MULTIPROCESSORS = 8 };

/* What device->state points to. */
struct emulated {
	double started;
	struct device reference;
};

enum status cuda_activate(const struct device *device)
{
	return STATUS_OK;
}

cudaStream_t cuda_stream(const struct device *device)
{
	return NULL;
}

int cuda_sm_count(const struct device *device)
{
	return MULTIPROCESSORS;
}

/* Of the devices of compute capability 8.0 and newer that have least. */
size_t cuda_shared_limit(const struct device *device)
{
	return 99 << 10;
}

/* Only the portable kernels are there; the reference is the host's, whose memory this is. */
static enum status emulated_open(const char *which, const struct kernel *const *more,
                                 struct device **opened)
{
	struct device *device = calloc(1, sizeof *device);
	struct emulated *state = calloc(1, sizeof *state);

	*opened = NULL;
	if (!device || !state) {
		free(device);
		free(state);
		return status_set(STATUS_OOM, "no memory for a device");
	}
	*device = (struct device){.backend = &cuda_backend,
	                          .activation = DTYPE_BF16,
	                          .wide = DTYPE_F32,
	                          .kernels = portable_kernels,
	                          .state = state,
	                          .reference = &state->reference};
	state->reference = (struct device){.backend = &cuda_backend,
	                                   .activation = DTYPE_F64,
	                                   .wide = DTYPE_F64,
	                                   .kernels = reference_kernels,
	                                   .state = state};
	*opened = device;
	return STATUS_OK;
}

static void emulated_close(struct device *device)
{
	free(device->state);
	free(device);
}

static enum status emulated_info(struct device *device, struct device_info *info)
{
	*info = (struct device_info){.name = "emulated GPU",
	                             .driver = "none",
	                             .runtime = "none",
	                             .memory_total = (size_t)4 << 30,
	                             .memory_free = (size_t)4 << 30};
	return STATUS_OK;
}

static enum status emulated_allocate(struct device *device, size_t bytes, void **memory)
{
	*memory = aligned_alloc(256, (bytes + 256) / 256 * 256);
	return *memory ? STATUS_OK : status_set(STATUS_OOM, "no %zu bytes", bytes);
}

static void emulated_release(struct device *device, void *memory)
{
	free(memory);
}

static enum status emulated_copy_bytes(struct device *device, void *to, const void *from,
                                       size_t bytes)
{
	memcpy(to, from, bytes);
	return STATUS_OK;
}

static enum status emulated_fill(struct device *device, void *memory, int byte, size_t bytes)
{
	memset(memory, byte, bytes);
	return STATUS_OK;
}

static enum status emulated_nothing(struct device *device)
{
	return STATUS_OK;
}

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static enum status emulated_start(struct device *device)
{
	((struct emulated *)device->state)->started = now_ms();
	return STATUS_OK;
}

static enum status emulated_stop(struct device *device, double *milliseconds)
{
	*milliseconds = now_ms() - ((struct emulated *)device->state)->started;
	return STATUS_OK;
}

static enum status emulated_count_nonfinite(struct device *device, const struct gather *region,
                                            int64_t *n)
{
	*n = nonfinite_on_host(region);
	return STATUS_OK;
}

static enum status emulated_gather(struct device *device, const struct gather *gather, void *to)
{
	gather_on_host(gather, to);
	return STATUS_OK;
}

static enum status emulated_add(struct device *device, int64_t count, const void *from, void *to)
{
	for (int64_t i = 0; i < count && device->wide == DTYPE_F32; i++)
		((float *)to)[i] += ((const float *)from)[i];
	for (int64_t i = 0; i < count && device->wide == DTYPE_F64; i++)
		((double *)to)[i] += ((const double *)from)[i];
	return STATUS_OK;
}

static enum status emulated_add_directions(struct device *device, const struct strided *rows,
                                           const struct directions *directions)
{
	add_directions_on_host(rows, directions);
	return STATUS_OK;
}

static void emulated_push(struct device *device, const char *name)
{
}

static void emulated_pop(struct device *device)
{
}

static float element(const void *matrix, int64_t index)
{
	const uint32_t bits = (uint32_t)((const uint16_t *)matrix)[index] << 16;
	float value;

	memcpy(&value, &bits, sizeof value);
	return value;
}

/* One element of a product of bf16 matrices, no batch. */
static float product(const struct gemm *g, int64_t batch, int64_t row, int64_t column)
{
	const int64_t a_row = g->a_transposed ? 1 : g->a_leading;
	const int64_t a_step = g->a_transposed ? g->a_leading : 1;
	const int64_t b_column = g->b_transposed ? g->b_leading : 1;
	const int64_t b_step = g->b_transposed ? 1 : g->b_leading;
	const int64_t a = batch * g->a_stride + row * a_row;
	const int64_t b = batch * g->b_stride + column * b_column;
	float sum = 0.0f;

	for (int64_t k = 0; k < g->inner; k++)
		sum += element(g->a, a + k * a_step) * element(g->b, b + k * b_step);
	return g->scale * sum;
}

enum status gemm_run(struct device *device, const struct gemm *g, void *workspace)
{
	float *sums = malloc((size_t)g->columns * sizeof *sums);
	enum status status = STATUS_OK;

	if (!sums)
		return status_set(STATUS_OOM, "no memory for a row of a product");
	for (int64_t j = 0; j < g->batch * g->rows && status == STATUS_OK; j++) {
		const int64_t batch = j / g->rows, row = j % g->rows;
		const int64_t first = batch * g->out_stride + row * g->out_leading;

		for (int64_t i = 0; i < g->columns; i++)
			sums[i] = product(g, batch, row, i) +
			          (g->addend ? element(g->addend, first + i) : 0.0f);
		status = device_upload_floats(device, g->out_type,
		                              (char *)g->out +
		                                      (size_t)first * dtype_size(g->out_type),
		                              sums, (size_t)g->columns);
	}
	free(sums);
	return status;
}

static void emulated_conditions(struct device *device, struct conditions *conditions)
{
	*conditions = conditions_unknown();
}

const struct backend cuda_backend = {
        .name = "cuda",
        .activation = DTYPE_BF16,
        .open = emulated_open,
        .close = emulated_close,
        .info = emulated_info,
        .allocate = emulated_allocate,
        .release = emulated_release,
        .upload = emulated_copy_bytes,
        .download = emulated_copy_bytes,
        .fill = emulated_fill,
        .synchronize = emulated_nothing,
        .stopwatch_start = emulated_start,
        .stopwatch_stop = emulated_stop,
        .conditions = emulated_conditions,
        .flush_cache = emulated_nothing,
        .count_nonfinite = emulated_count_nonfinite,
        .gather = emulated_gather,
        .add = emulated_add,
        .add_directions = emulated_add_directions,
        .range_push = emulated_push,
        .range_pop = emulated_pop,
};
