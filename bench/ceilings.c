/* What the device can do at best: memory bandwidth, and products of the projections' shapes. */
#include <inttypes.h>
#include <stdio.h>

#include "bench/harness/streams.h"
#include "bench/harness/ceilings.h"

static const char usage[] =
        "usage: ceilings [BACKEND [DEVICE]]\n"
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

static enum status time_product(struct product *p, const char *name)
{
	struct linear_residual_args *args = &p->args;
	const int64_t most = args->n_tokens;
	double ms;

	for (args->n_tokens = most < 512 ? most : 512;; args->n_tokens *= 2) {
		TRY(product_time(p, REPEATS, true, &ms));
		if (args->n_tokens * 2 > most || ms > LONG_ENOUGH_MS)
			break;
	}
	printf("%-26s %7" PRId64 " x %" PRId64 " x %" PRId64 ": %.3f ms, %.1f TFLOP/s\n", name,
	       args->n_tokens, args->d_in, args->d_out, ms,
	       2e-9 * (double)args->n_tokens * (double)args->d_in * (double)args->d_out / ms);
	return STATUS_OK;
}

static enum status measure_product(struct device *device, size_t i)
{
	struct product product;
	enum status status = product_take(&product, device, products[i].n_tokens, products[i].d_in,
	                                  products[i].d_out);

	if (status == STATUS_OK)
		status = time_product(&product, products[i].name);
	product_release(&product);
	return status;
}

static enum status measure_all(struct device *device)
{
	struct device_info info;
	struct conditions conditions;
	const struct ceilings *ceilings = &device->ceilings;

	TRY(ceilings_measure(device));
	TRY(device_info(device, &info));
	device_conditions(device, &conditions);
	printf("%s, driver %s, %s\n", info.name, info.driver, info.runtime);
	printf("copy %.0f GB/s, read %.0f GB/s, products %.1f TFLOP/s, SM clock %.0f MHz%s\n",
	       ceilings->copy_gb_per_s, ceilings->read_gb_per_s, ceilings->gemm_tflops,
	       conditions.clock_mhz, conditions.throttle > 0 ? ", throttled" : "");
	for (size_t i = 0; i < sizeof products / sizeof products[0]; i++)
		TRY(measure_product(device, i));
	return STATUS_OK;
}

int main(int argc, char **argv)
{
	const struct backend *backend = argc > 1 ? backend_find(argv[1]) : backends[0];
	struct device *device;

	streams_open();
	if (argc > 3 || !backend) {
		fputs(usage, stderr);
		return 2;
	}
	enum status status = backend->open(argc > 2 ? argv[2] : NULL, NULL, &device);
	if (status == STATUS_OK) {
		status = measure_all(device);
		device_close(device);
	}
	if (status == STATUS_OK)
		status = stdout_finish();
	if (status != STATUS_OK)
		fprintf(stderr, "ceilings: %s: %s\n", status_name(status), status_message());
	return status == STATUS_OK ? 0 : 1;
}
