/* Compares a device with golden files, a line per tensor. */
#include <stdio.h>
#include <string.h>

#include "bench/harness/streams.h"
#include "baselines/baselines.h"
#include "bench/golden_check.h"

static const char usage[] =
        "usage: golden [options] FILE...\n"
        "\n"
        "Runs the layers, models and operations that safetensors files describe and\n"
        "compares every tensor stored in them, a line each.\n"
        "\n"
        "  --backend NAME       cpu (default) or cuda\n"
        "  --device WHICH       its index, UUID or PCI address (default: the first)\n"
        "  --provider LIST      kernels to use, e.g. portable or attention=cudnn\n"
        "  --chunk N            chunk length of matrix_recurrence (0: the kernel picks)\n"
        "  --allow-unsupported  a file that cannot be run is no failure\n"
        "\n"
        "Exit code: 0, all that was compared agrees; 1, something does not, or a file is no "
        "golden\n"
        "file; 2, wrong options; 3, of some file nothing could be compared.\n";

enum { EXIT_AGREES, EXIT_MISS, EXIT_USAGE, EXIT_NOTHING_COMPARED };

struct arguments {
	const char *backend, *device, *provider;
	int64_t chunk;
	bool allow_unsupported;
};

struct totals {
	int n_passed, n_failed, n_unsupported, n_files_unsupported;
};

/* Says what is wrong with which argument; the exit code. */
static int refuse(const char *argument, const char *message)
{
	fprintf(stderr, "golden: %s: %s\n", argument, message);
	return EXIT_USAGE;
}

static void print_result(const char *file, const struct golden_result *result)
{
	char error[16] = "";

	if (result->verdict == GOLDEN_PASS || result->verdict == GOLDEN_MISS)
		snprintf(error, sizeof error, "%.1e", result->rel_err);
	printf("%-36s %-52s %8s  %s\n", file, result->tensor, error,
	       golden_verdict_name(result->verdict));
}

static void check_one(const struct golden_options *options, const char *path, struct totals *totals)
{
	const char *slash = strrchr(path, '/'), *file = slash ? slash + 1 : path;
	struct golden_report report;
	enum status status = golden_check(options, path, &report);
	bool compared = report.count[GOLDEN_PASS] + report.n_failed > 0;

	for (int i = 0; i < report.n_results && compared; i++)
		print_result(file, &report.results[i]);
	totals->n_passed += report.count[GOLDEN_PASS];
	totals->n_unsupported += report.count[GOLDEN_UNSUPPORTED];
	totals->n_failed += report.n_failed;
	if (report.unsupported[0])
		printf("%-36s unsupported: %s\n", file, report.unsupported);
	if (status != STATUS_OK && status != STATUS_MISMATCH) {
		printf("%-36s %s: %s\n", file, status_name(status), status_message());
		totals->n_failed++;
	} else if (!compared) {
		totals->n_files_unsupported++;
	}
}

/* Reads the options; *first_file is the index of the first argument that is none. The exit code. */
static int read_options(int argc, char **argv, struct arguments *arguments, int *first_file)
{
	int i = 1;

	for (; i < argc && strncmp(argv[i], "--", 2) == 0; i++) {
		const char *option = argv[i];
		long long number;
		char extra;

		if (strcmp(option, "--allow-unsupported") == 0) {
			arguments->allow_unsupported = true;
			continue;
		}
		if (i + 1 == argc)
			return refuse(option, "unknown, or wants a value; see --help");
		const char *value = argv[++i];
		if (strcmp(option, "--backend") == 0)
			arguments->backend = value;
		else if (strcmp(option, "--device") == 0)
			arguments->device = value;
		else if (strcmp(option, "--provider") == 0)
			arguments->provider = value;
		else if (strcmp(option, "--chunk") != 0)
			return refuse(option, "unknown; see --help");
		else if (sscanf(value, "%lld%c", &number, &extra) != 1 || number < 0)
			return refuse("--chunk", "an integer from 0 is allowed");
		else
			arguments->chunk = number;
	}
	*first_file = i;
	return i < argc ? EXIT_AGREES : refuse("FILE", "none is given; see --help");
}

static int check_files(struct device *device, const struct arguments *arguments, char **paths)
{
	struct golden_options options = {.device = device, .chunk = arguments->chunk};
	struct totals totals = {0};

	if (provider_choice_parse(&options.choice, device, arguments->provider) != STATUS_OK)
		return refuse(device->backend->name, status_message());
	for (; *paths; paths++)
		check_one(&options, *paths, &totals);
	printf("%d tensors passed, %d failed, %d unsupported; nothing to compare in %d files\n",
	       totals.n_passed, totals.n_failed, totals.n_unsupported, totals.n_files_unsupported);
	if (totals.n_failed > 0)
		return EXIT_MISS;
	return totals.n_files_unsupported > 0 && !arguments->allow_unsupported
	               ? EXIT_NOTHING_COMPARED
	               : EXIT_AGREES;
}

/* The exit code of a program whose output has to arrive. */
static int finish(int code)
{
	return stdout_finish() == STATUS_OK ? code : refuse("output", status_message());
}

int main(int argc, char **argv)
{
	struct arguments arguments = {.backend = "cpu", .device = "", .provider = ""};
	int first_file;

	streams_open();
	if (argc == 2 && strcmp(argv[1], "--help") == 0) {
		fputs(usage, stdout);
		return finish(EXIT_AGREES);
	}
	int code = read_options(argc, argv, &arguments, &first_file);
	if (code != EXIT_AGREES)
		return code;
	const struct backend *backend = backend_find(arguments.backend);
	if (!backend)
		return refuse("--backend", "this build has no such backend");
	struct device *device;
	/* The baselines' kernels are of the GPU. */
	if (backend->open(arguments.device, backend == &cpu_backend ? NULL : baseline_kernels,
	                  &device) != STATUS_OK)
		return refuse(arguments.backend, status_message());
	code = check_files(device, &arguments, argv + first_file);
	device_close(device);
	return finish(code);
}
