/* What the device can do at best: memory bandwidth, and products of the projections' shapes. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "bench/harness/ceilings.h"

static const char usage[] =
        "usage: ceilings [BACKEND]\n"
        "\n"
        "Prints the bandwidth of copying and of reading, the rate of matrix products that\n"
        "rooflines use, and those of the projections of blocks of width 2048.\n";

enum { REPEATS = 5 };

/* Weights [d_out, d_in] of the blocks; tokens as in prefill, reduced where that takes too long. */
static const struct {
	const char *name;
	int64_t n_tokens, d_in, d_out;
} products[] = {
        {"attention in, prefill", 262144, 2048, 6144},
        {"rat in, prefill", 262144, 2048, 6656},
        {"out, prefill", 262144, 2048, 2048},
        {"attention in, generation", 512, 2048, 6144},
        {"out, generation", 512, 2048, 2048},
};

/* Slow devices get fewer tokens: this much time per product is enough. */
static const double LONG_ENOUGH_MS = 20;

static enum status time_product(struct context *ctx, const struct linear_residual_args *args,
                                double *best_ms)
{
	const struct backend *backend = ctx->backend;

	*best_ms = INFINITY;
	for (int i = 0; i <= REPEATS; i++) {
		double ms = INFINITY;
		enum status status = backend->flush_cache();

		if (status == STATUS_OK)
			status = backend->stopwatch_start();
		if (status == STATUS_OK)
			status = kernel_run(ctx, OP_LINEAR_RESIDUAL, args);
		if (status == STATUS_OK)
			status = backend->stopwatch_stop(&ms);
		if (status != STATUS_OK)
			return status;
		if (i > 0) /* the first warms up */
			*best_ms = fmin(*best_ms, ms);
	}
	return STATUS_OK;
}

/* Fills an activation tensor with the same random numbers over and over. */
static enum status fill_random(const struct backend *backend, void *tensor, int64_t count)
{
	enum { BLOCK = 1 << 16 };
	static float block[BLOCK];
	uint32_t state = 1;
	enum status status = STATUS_OK;

	for (int i = 0; i < BLOCK; i++) {
		state = state * 1664525u + 1013904223u;
		block[i] = (float)(state >> 8) * 0x1p-24f - 0.5f;
	}
	for (int64_t i = 0; i < count && status == STATUS_OK; i += BLOCK)
		status = backend_upload_floats(
		        backend, backend->activation,
		        (char *)tensor + (size_t)i * dtype_size(backend->activation), block,
		        (size_t)(count - i < BLOCK ? count - i : BLOCK));
	return status;
}

static enum status allocate_random(const struct backend *backend, int64_t count, void **tensor)
{
	enum status status =
	        backend->allocate((size_t)count * dtype_size(backend->activation), tensor);

	return status == STATUS_OK ? fill_random(backend, *tensor, count) : status;
}

static enum status run_product(struct context *ctx, const char *name,
                               struct linear_residual_args *args)
{
	const int64_t most = args->n_tokens;
	double ms = INFINITY;
	enum status status = STATUS_OK;

	for (args->n_tokens = most < 512 ? most : 512;; args->n_tokens *= 2) {
		status = time_product(ctx, args, &ms);
		if (status != STATUS_OK || args->n_tokens * 2 > most || ms > LONG_ENOUGH_MS)
			break;
	}
	if (status == STATUS_OK)
		printf("%-26s %7" PRId64 " x %" PRId64 " x %" PRId64 ": %.3f ms, %.1f TFLOP/s\n",
		       name, args->n_tokens, args->d_in, args->d_out, ms,
		       2e-9 * (double)args->n_tokens * (double)args->d_in * (double)args->d_out /
		               ms);
	return status;
}

static enum status measure_product(const struct backend *backend, size_t i)
{
	struct kernel_plan plan = {0};
	struct context ctx = {.backend = backend, .plan = &plan};
	const int64_t n = products[i].n_tokens, d_in = products[i].d_in, d_out = products[i].d_out;
	struct linear_residual_args args = {.n_tokens = n, .d_in = d_in, .d_out = d_out};
	void *x = NULL, *weight = NULL;
	enum status status = kernel_run(&ctx, OP_LINEAR_RESIDUAL, &args);

	ctx.plan = NULL;
	ctx.workspace_bytes = plan.workspace_bytes;
	if (status == STATUS_OK && plan.workspace_bytes > 0)
		status = backend->allocate(plan.workspace_bytes, &ctx.workspace);
	if (status == STATUS_OK)
		status = allocate_random(backend, n * d_in, &x);
	if (status == STATUS_OK)
		status = allocate_random(backend, d_out * d_in, &weight);
	if (status == STATUS_OK)
		status = backend->allocate((size_t)(n * d_out) * dtype_size(backend->activation),
		                           &args.y);
	args.x = x;
	args.weight = weight;
	if (status == STATUS_OK)
		status = run_product(&ctx, products[i].name, &args);
	backend->release(args.y);
	backend->release(weight);
	backend->release(x);
	backend->release(ctx.workspace);
	return status;
}

static enum status measure_all(const struct backend *backend)
{
	struct device_info info;
	struct ceilings ceilings;
	enum status status = ceilings_measure(&ceilings, backend);

	if (status == STATUS_OK)
		status = backend->info(&info);
	if (status != STATUS_OK)
		return status;
	printf("%s, driver %s, %s\n", info.name, info.driver, info.runtime);
	printf("copy %.0f GB/s, read %.0f GB/s, products %.1f TFLOP/s, SM clock %.0f MHz%s\n",
	       ceilings.copy_gb_per_s, ceilings.read_gb_per_s, ceilings.gemm_tflops,
	       info.sm_clock_mhz, info.throttled ? ", throttled" : "");
	for (size_t i = 0; i < sizeof products / sizeof products[0] && status == STATUS_OK; i++)
		status = measure_product(backend, i);
	return status;
}

int main(int argc, char **argv)
{
	const struct backend *backend = argc > 1 ? backend_find(argv[1]) : backends[0];

	if (argc > 2 || !backend) {
		fputs(usage, stderr);
		return 2;
	}
	enum status status = backend->open(0);
	if (status == STATUS_OK) {
		status = measure_all(backend);
		backend->close();
	}
	if (status != STATUS_OK)
		fprintf(stderr, "ceilings: %s: %s\n", status_name(status), status_message());
	return status == STATUS_OK ? 0 : 1;
}
