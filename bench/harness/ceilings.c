#include "bench/harness/ceilings.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { REPEATS = 3, BLOCK_BYTES = 1 << 16, SMALLEST_GEMM = 1024, LARGEST_GEMM = 8192 };

/* A product that takes this long is large enough to show the device's rate. */
static const double LONG_ENOUGH_MS = 15;

/* Device memory with random floats in it, so that no unit saves power on zeros. */
static enum status take_random(const struct backend *backend, enum dtype dtype, size_t count,
                               void **memory)
{
	float *host = malloc(count * sizeof *host);
	uint32_t state = 1;

	*memory = NULL;
	if (!host)
		return status_set(STATUS_OOM, "no memory to measure the ceilings with");
	for (size_t i = 0; i < count; i++) {
		state = state * 1664525u + 1013904223u;
		host[i] = (float)(state >> 8) * 0x1p-24f - 0.5f;
	}
	enum status status = backend->allocate(count * dtype_size(dtype), memory);

	if (status == STATUS_OK)
		status = backend_upload_floats(backend, dtype, *memory, host, count);
	free(host);
	return status;
}

/* Shortest of several runs of one operation. */
static enum status time_operation(struct context *ctx, enum operation operation, const void *args,
                                  double *best_ms)
{
	*best_ms = INFINITY;
	for (int i = 0; i <= REPEATS; i++) {
		double ms;
		enum status status = ctx->backend->stopwatch_start();

		if (status == STATUS_OK)
			status = kernel_run(ctx, operation, args);
		if (status == STATUS_OK)
			status = ctx->backend->stopwatch_stop(&ms);
		if (status != STATUS_OK)
			return status;
		if (i > 0) /* the first warms up */
			*best_ms = fmin(*best_ms, ms);
	}
	return STATUS_OK;
}

/* Rate of the square product of `size`. */
static enum status measure_gemm(const struct backend *backend, int64_t size, double *ms)
{
	struct context ctx = {.backend = backend};
	struct kernel_plan plan = {0};
	size_t count = (size_t)(size * size);
	void *x, *weight = NULL, *y = NULL;
	enum status status = take_random(backend, backend->activation, count, &x);

	if (status == STATUS_OK)
		status = take_random(backend, backend->activation, count, &weight);
	if (status == STATUS_OK)
		status = backend->allocate(count * dtype_size(backend->activation), &y);
	struct linear_residual_args args = {
	        .n_tokens = size, .d_in = size, .d_out = size, .x = x, .weight = weight, .y = y};
	ctx.plan = &plan;
	if (status == STATUS_OK)
		status = kernel_run(&ctx, OP_LINEAR_RESIDUAL, &args);
	ctx.plan = NULL;
	ctx.workspace_bytes = plan.workspace_bytes;
	if (status == STATUS_OK && plan.workspace_bytes)
		status = backend->allocate(plan.workspace_bytes, &ctx.workspace);
	if (status == STATUS_OK)
		status = time_operation(&ctx, OP_LINEAR_RESIDUAL, &args, ms);
	backend->release(ctx.workspace);
	backend->release(y);
	backend->release(weight);
	backend->release(x);
	return status;
}

static void copy_blocks(char *to, const char *from, size_t bytes)
{
#pragma omp parallel for schedule(static)
	for (size_t i = 0; i < bytes; i += BLOCK_BYTES)
		memcpy(to + i, from + i, BLOCK_BYTES);
}

static uint64_t sum_words(const uint64_t *words, size_t count)
{
	uint64_t sum = 0;

#pragma omp parallel for simd schedule(static) reduction(+ : sum)
	for (size_t i = 0; i < count; i++)
		sum += words[i];
	return sum;
}

/* Bandwidth of the host's memory with two buffers of `bytes`, in place of a backend's own. */
static enum status time_host(const struct backend *backend, char *a, char *b, size_t bytes,
                             struct ceilings *ceilings)
{
	/* The sum must be used, or the reading is optimized away. */
	volatile uint64_t sink = 0;

	for (int i = 0; i <= REPEATS; i++) {
		double copy_ms, read_ms;

		backend->stopwatch_start();
		copy_blocks(a, b, bytes);
		backend->stopwatch_stop(&copy_ms);
		backend->stopwatch_start();
		sink += sum_words((const uint64_t *)(void *)b, bytes / sizeof(uint64_t));
		backend->stopwatch_stop(&read_ms);
		ceilings->copy_gb_per_s =
		        fmax(ceilings->copy_gb_per_s, 2e-6 * (double)bytes / copy_ms);
		ceilings->read_gb_per_s =
		        fmax(ceilings->read_gb_per_s, 1e-6 * (double)bytes / read_ms);
	}
	return STATUS_OK;
}

static enum status measure_host_bandwidth(const struct backend *backend, struct ceilings *ceilings)
{
	struct device_info info;
	void *a = NULL, *b = NULL;
	enum status status = backend->info(&info);
	/* Several times any cache, but never a large part of a small machine. */
	size_t bytes = (size_t)128 << 20;

	while (status == STATUS_OK && bytes > info.memory_free / 8 && bytes > BLOCK_BYTES)
		bytes /= 2;
	if (status == STATUS_OK)
		status = backend->allocate(bytes, &a);
	if (status == STATUS_OK)
		status = backend->allocate(bytes, &b);
	if (status == STATUS_OK)
		status = time_host(backend, a, b, bytes, ceilings);
	backend->release(a);
	backend->release(b);
	return status;
}

enum status ceilings_measure(struct ceilings *ceilings, const struct backend *backend)
{
	enum status status;

	*ceilings = (struct ceilings){0};
	if (backend->bandwidth)
		status = backend->bandwidth(&ceilings->copy_gb_per_s, &ceilings->read_gb_per_s);
	else
		status = measure_host_bandwidth(backend, ceilings);
	for (int64_t size = SMALLEST_GEMM; status == STATUS_OK && size <= LARGEST_GEMM; size *= 2) {
		double ms;

		status = measure_gemm(backend, size, &ms);
		if (status != STATUS_OK)
			break;
		ceilings->gemm_tflops =
		        fmax(ceilings->gemm_tflops, 2e-9 * pow((double)size, 3) / ms);
		if (ms >= LONG_ENOUGH_MS)
			break;
	}
	return status;
}

double ceilings_roofline_ms(const struct ceilings *ceilings, const struct kernel_plan *plan)
{
	double total = 0;

	for (int i = 0; i < plan->n_operations; i++) {
		const struct cost *cost = &plan->operations[i].cost;
		double bytes = cost->bytes_read + cost->bytes_written;
		double bandwidth = cost->bytes_written < 0.1 * bytes ? ceilings->read_gb_per_s
		                                                     : ceilings->copy_gb_per_s;
		double ms =
		        fmax(1e-9 * cost->flops / ceilings->gemm_tflops, 1e-6 * bytes / bandwidth);

		total += ms * (double)plan->operations[i].count;
	}
	return total;
}
