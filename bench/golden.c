/* Compares a backend with golden files, a line per tensor. */
#include <stdio.h>
#include <string.h>

#include "bench/golden_check.h"

static const char usage[] =
        "usage: golden [--backend NAME] [--provider LIST] [--chunk N] FILE...\n"
        "\n"
        "Runs the layers, models and operations that safetensors files describe and\n"
        "compares every tensor stored in them: a line each, exit code 1 on a miss.\n"
        "\n"
        "  --backend NAME    cpu (default) or cuda\n"
        "  --provider LIST   kernels to use, e.g. portable or attention=cudnn\n"
        "  --chunk N         chunk length of matrix_recurrence (0: the kernel picks)\n";

struct totals {
	int n_passed, n_failed, n_unsupported;
};

/* Says what is wrong with which argument; the exit code. */
static int refuse(const char *argument, const char *message)
{
	fprintf(stderr, "golden: %s: %s\n", argument, message);
	return 2;
}

static void print_result(const char *file, const struct golden_result *result)
{
	if (result->verdict == GOLDEN_PASS || result->verdict == GOLDEN_MISS)
		printf("%-36s %-52s %8.1e  %s\n", file, result->tensor, result->rel_err,
		       golden_verdict_name(result->verdict));
	else
		printf("%-36s %-52s %8s  %s\n", file, result->tensor, "",
		       golden_verdict_name(result->verdict));
}

static void check_one(const struct golden_options *options, const char *path, struct totals *totals)
{
	const char *slash = strrchr(path, '/'), *file = slash ? slash + 1 : path;
	struct golden_report report;
	enum status status = golden_check(options, path, &report);

	for (int i = 0; i < report.n_results; i++) {
		print_result(file, &report.results[i]);
		totals->n_passed += report.results[i].verdict == GOLDEN_PASS;
		totals->n_unsupported += report.results[i].verdict == GOLDEN_UNSUPPORTED;
	}
	totals->n_failed += report.n_failed;
	if (report.unsupported[0])
		printf("%-36s unsupported: %s\n", file, report.unsupported);
	if (status != STATUS_OK && status != STATUS_MISMATCH) {
		printf("%-36s %s: %s\n", file, status_name(status), status_message());
		totals->n_failed++;
	}
}

/* Reads the options; *first_file is the index of the first argument that is none. 0, or the exit
 * code. */
static int read_options(int argc, char **argv, const char **backend, const char **provider,
                        int64_t *chunk, int *first_file)
{
	int i = 1;

	for (; i < argc && strncmp(argv[i], "--", 2) == 0; i += 2) {
		char extra;
		long long number;

		if (i + 1 == argc)
			return refuse(argv[i], "wants a value; see --help");
		if (strcmp(argv[i], "--backend") == 0)
			*backend = argv[i + 1];
		else if (strcmp(argv[i], "--provider") == 0)
			*provider = argv[i + 1];
		else if (strcmp(argv[i], "--chunk") != 0)
			return refuse(argv[i], "only --backend, --provider and --chunk are known");
		else if (sscanf(argv[i + 1], "%lld%c", &number, &extra) != 1 || number < 0)
			return refuse("--chunk", "an integer from 0 is allowed");
		else
			*chunk = number;
	}
	*first_file = i;
	return i < argc ? 0 : refuse("FILE", "none is given; see --help");
}

int main(int argc, char **argv)
{
	const char *backend_name = "cpu", *provider = "";
	struct golden_options options = {0};
	struct totals totals = {0};
	int first_file;

	if (argc == 2 && strcmp(argv[1], "--help") == 0) {
		fputs(usage, stdout);
		return 0;
	}
	int code = read_options(argc, argv, &backend_name, &provider, &options.chunk, &first_file);
	if (code != 0)
		return code;
	options.backend = backend_find(backend_name);
	if (!options.backend)
		return refuse("--backend", "this build has no such backend");
	if (provider_choice_parse(&options.choice, options.backend, provider) != STATUS_OK ||
	    options.backend->open(0) != STATUS_OK)
		return refuse(backend_name, status_message());
	for (int i = first_file; i < argc; i++)
		check_one(&options, argv[i], &totals);
	options.backend->close();
	printf("%d tensors passed, %d failed, %d unsupported\n", totals.n_passed, totals.n_failed,
	       totals.n_unsupported);
	return totals.n_failed > 0;
}
