#include "bench/harness/ceilings.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
	REPEATS = 3,
	BLOCK_BYTES = 1 << 16,
	RANDOM_BLOCK = 1 << 16,
	SMALLEST_GEMM = 1024,
	LARGEST_GEMM = 8192
};

/* A product that takes this long is large enough to show the device's rate. */
static const double LONG_ENOUGH_MS = 15;

/* Device memory with random floats in it, the same over and over, so that no unit saves power on
 * zeros. */
static enum status take_random(struct device *device, int64_t count, void **memory)
{
	static float block[RANDOM_BLOCK];
	const enum dtype dtype = device->activation;
	uint32_t state = 1;

	for (int i = 0; i < RANDOM_BLOCK; i++) {
		state = state * 1664525u + 1013904223u;
		block[i] = (float)(state >> 8) * 0x1p-24f - 0.5f;
	}
	TRY(device_allocate(device, (size_t)count * dtype_size(dtype), memory));
	for (int64_t i = 0; i < count; i += RANDOM_BLOCK)
		TRY(device_upload_floats(
		        device, dtype, (char *)*memory + (size_t)i * dtype_size(dtype), block,
		        (size_t)(count - i < RANDOM_BLOCK ? count - i : RANDOM_BLOCK)));
	return STATUS_OK;
}

enum status product_take(struct product *p, struct device *device, int64_t n_tokens, int64_t d_in,
                         int64_t d_out)
{
	struct kernel_plan plan = {0};

	*p = (struct product){
	        .ctx = {.device = device, .plan = &plan},
	        .args = {.n_tokens = n_tokens, .d_in = d_in, .d_out = d_out},
	};
	TRY(take_random(device, n_tokens * d_in, &p->x));
	TRY(take_random(device, d_out * d_in, &p->weight));
	TRY(device_allocate(device, (size_t)(n_tokens * d_out) * dtype_size(device->activation),
	                    &p->args.y));
	p->args.x = p->x;
	p->args.weight = p->weight;
	enum status status = run_linear_residual(&p->ctx, &p->args);
	p->ctx.plan = NULL;
	p->ctx.workspace_bytes = plan.workspace_bytes;
	if (status == STATUS_OK && plan.workspace_bytes)
		status = device_allocate(device, plan.workspace_bytes, &p->ctx.workspace);
	return status;
}

void product_release(struct product *p)
{
	device_release(p->ctx.device, p->ctx.workspace);
	device_release(p->ctx.device, p->args.y);
	device_release(p->ctx.device, p->weight);
	device_release(p->ctx.device, p->x);
}

enum status product_time(struct product *p, int repeats, bool cold, double *best_ms)
{
	struct device *device = p->ctx.device;

	*best_ms = INFINITY;
	for (int i = 0; i <= repeats; i++) {
		double ms;

		if (cold)
			TRY(device_flush_cache(device));
		TRY(device_stopwatch_start(device));
		TRY(run_linear_residual(&p->ctx, &p->args));
		TRY(device_stopwatch_stop(device, &ms));
		if (i > 0) /* the first warms up */
			*best_ms = fmin(*best_ms, ms);
	}
	return STATUS_OK;
}

/* Time of the square product of `size`. */
static enum status measure_gemm(struct device *device, int64_t size, double *ms)
{
	struct product product;
	enum status status = product_take(&product, device, size, size, size);

	if (status == STATUS_OK)
		status = product_time(&product, REPEATS, false, ms);
	product_release(&product);
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
static enum status time_host(struct device *device, char *a, char *b, size_t bytes,
                             struct ceilings *ceilings)
{
	/* The sum must be used, or the reading is optimized away. */
	volatile uint64_t sink = 0;

	for (int i = 0; i <= REPEATS; i++) {
		double copy_ms, read_ms;

		device_stopwatch_start(device);
		copy_blocks(a, b, bytes);
		device_stopwatch_stop(device, &copy_ms);
		device_stopwatch_start(device);
		sink += sum_words((const uint64_t *)(void *)b, bytes / sizeof(uint64_t));
		device_stopwatch_stop(device, &read_ms);
		ceilings->copy_gb_per_s =
		        fmax(ceilings->copy_gb_per_s, 2e-6 * (double)bytes / copy_ms);
		ceilings->read_gb_per_s =
		        fmax(ceilings->read_gb_per_s, 1e-6 * (double)bytes / read_ms);
	}
	(void)sink;
	return STATUS_OK;
}

static enum status measure_host_bandwidth(struct device *device, struct ceilings *ceilings)
{
	struct device_info info;
	void *a = NULL, *b = NULL;
	enum status status = device_info(device, &info);
	/* Several times any cache, but never a large part of a small machine. */
	size_t bytes = (size_t)128 << 20;

	while (status == STATUS_OK && bytes > info.memory_free / 8 && bytes > BLOCK_BYTES)
		bytes /= 2;
	if (status == STATUS_OK)
		status = device_allocate(device, bytes, &a);
	if (status == STATUS_OK)
		status = device_allocate(device, bytes, &b);
	if (status == STATUS_OK)
		status = time_host(device, a, b, bytes, ceilings);
	device_release(device, a);
	device_release(device, b);
	return status;
}

enum status ceilings_measure(struct device *device)
{
	struct ceilings *ceilings = &device->ceilings;
	enum status status;

	if (ceilings->gemm_tflops > 0)
		return STATUS_OK;
	if (device->backend->bandwidth)
		status = device->backend->bandwidth(device, &ceilings->copy_gb_per_s,
		                                    &ceilings->read_gb_per_s);
	else
		status = measure_host_bandwidth(device, ceilings);
	for (int64_t size = SMALLEST_GEMM; status == STATUS_OK && size <= LARGEST_GEMM; size *= 2) {
		double ms;

		status = measure_gemm(device, size, &ms);
		if (status != STATUS_OK)
			break;
		ceilings->gemm_tflops =
		        fmax(ceilings->gemm_tflops, 2e-9 * pow((double)size, 3) / ms);
		if (ms >= LONG_ENOUGH_MS)
			break;
	}
	return status;
}

enum status ceilings_again(struct device *device)
{
	const struct ceilings before = device->ceilings;
	struct ceilings *now = &device->ceilings;

	*now = (struct ceilings){0};
	const enum status status = ceilings_measure(device);

	now->copy_gb_per_s = fmax(now->copy_gb_per_s, before.copy_gb_per_s);
	now->read_gb_per_s = fmax(now->read_gb_per_s, before.read_gb_per_s);
	now->gemm_tflops = fmax(now->gemm_tflops, before.gemm_tflops);
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
