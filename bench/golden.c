/* Compares a device with golden files, a line per tensor. */
#include <stdio.h>
#include <string.h>

#include "bench/harness/streams.h"
#include "baselines/baselines.h"
#include "bench/golden_check.h"
#include "bench/harness/about.h"

static const char usage[] =
        "usage: golden [options] FILE...\n"
        "       golden --describe PATTERN [--d-model N]\n"
        "\n"
        "Runs the layers, models and operations that safetensors files describe and\n"
        "compares every tensor stored in them, a line each.\n"
        "\n"
        "  --backend NAME       cpu (default) or cuda\n"
        "  --device WHICH       its index, UUID or PCI address (default: the first)\n"
        "  --provider LIST      kernels to use, e.g. portable or attention=cudnn\n"
        "  --chunk N            chunk length of matrix_recurrence (0: the kernel picks)\n"
        "  --allow-unsupported  a file that cannot be run is no failure\n"
        "  --save OUT           write what was compared, as it is here, to a safetensors file;\n"
        "                       of one FILE\n"
        "  --describe PATTERN   list the parameters of 'rat(chunk=16)' and the like, as files\n"
        "                       have to call and shape them\n"
        "  --d-model N          D of --describe (256)\n"
        "\n"
        "Exit code: 0, all that was compared agrees; 1, something does not, or a file is no "
        "golden\n"
        "file; 2, wrong options; 3, of some file nothing could be compared.\n";

enum { EXIT_AGREES, EXIT_MISS, EXIT_USAGE, EXIT_NOTHING_COMPARED };

struct arguments {
	const char *backend, *device, *provider, *save, *describe;
	int64_t chunk, d_model;
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

/* Where an option that is a text goes; NULL: it is none. */
static const char **text_option(struct arguments *arguments, const char *option)
{
	const struct {
		const char *name, **place;
	} options[] = {
	        {"--backend", &arguments->backend},   {"--device", &arguments->device},
	        {"--provider", &arguments->provider}, {"--save", &arguments->save},
	        {"--describe", &arguments->describe},
	};

	for (size_t i = 0; i < sizeof options / sizeof *options; i++)
		if (strcmp(options[i].name, option) == 0)
			return options[i].place;
	return NULL;
}

/* Reads an option and its value; the exit code. */
static int read_option(struct arguments *arguments, const char *option, const char *value)
{
	const char **text = text_option(arguments, option);
	const bool is_chunk = strcmp(option, "--chunk") == 0;
	long long number;
	char extra;

	if (text) {
		*text = value;
		return EXIT_AGREES;
	}
	if (!is_chunk && strcmp(option, "--d-model") != 0)
		return refuse(option, "unknown; see --help");
	if (sscanf(value, "%lld%c", &number, &extra) != 1 || number < (is_chunk ? 0 : 1))
		return refuse(option, is_chunk ? "an integer from 0 is allowed"
		                               : "an integer from 1 is allowed");
	*(is_chunk ? &arguments->chunk : &arguments->d_model) = number;
	return EXIT_AGREES;
}

/* Reads the options; *first_file is the index of the first argument that is none. The exit code. */
static int read_options(int argc, char **argv, struct arguments *arguments, int *first_file)
{
	int i = 1;

	for (; i < argc && strncmp(argv[i], "--", 2) == 0; i++) {
		if (strcmp(argv[i], "--allow-unsupported") == 0) {
			arguments->allow_unsupported = true;
			continue;
		}
		if (i + 1 == argc)
			return refuse(argv[i], "unknown, or wants a value; see --help");
		const int code = read_option(arguments, argv[i], argv[i + 1]);
		if (code != EXIT_AGREES)
			return code;
		i++;
	}
	*first_file = i;
	if (arguments->describe)
		return i == argc ? EXIT_AGREES : refuse("--describe", "takes no file");
	if (arguments->save && i + 1 < argc)
		return refuse("--save", "is of one file");
	return i < argc ? EXIT_AGREES : refuse("FILE", "none is given; see --help");
}

static int describe(struct device *device, const struct arguments *arguments)
{
	return golden_describe(device, arguments->describe, arguments->d_model, stdout) == STATUS_OK
	               ? EXIT_AGREES
	               : refuse("--describe", status_message());
}

static int check_files(struct device *device, const struct arguments *arguments, char **paths)
{
	struct golden_options options = {
	        .device = device, .chunk = arguments->chunk, .save = arguments->save};
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
	struct arguments arguments = {
	        .backend = "cpu", .device = "", .provider = "", .d_model = 256};
	int first_file;

	streams_open();
	if (about_asked(argc, argv, "golden"))
		return EXIT_AGREES;
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
	code = arguments.describe ? describe(device, &arguments)
	                          : check_files(device, &arguments, argv + first_file);
	device_close(device);
	return finish(code);
}
