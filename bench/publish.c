/* Whether files of rows may be published: scripts/publish.sh asks before it copies anything. */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "bench/harness/csv.h"
#include "bench/harness/environment.h"
#include "bench/harness/record.h"
#include "bench/harness/streams.h"

static const char usage[] =
        "usage: publish FILE.csv...\n"
        "\n"
        "Says whether each file is one whole run that may be published: of one device, of one\n"
        "commit without changes, by a plain build, with no case that failed; and its samples,\n"
        "if there are any (latency.samples.csv of latency.csv), no larger than 20 MB. Prints\n"
        "the folder of the device and the commit, a line for each file; else the exit code is\n"
        "1, and what is wrong with a file is said.\n";

enum { MOST_SAMPLE_BYTES = 20000000, LINE = 512 };

/* What all rows of a file have to have in common. */
static const char *const common[] = {"run_id", "git_sha", "device", "backend", "build"};

static enum status refuse(const char *path, const char *what)
{
	return status_set(STATUS_INVALID, "%s: %s", path, what);
}

static enum status check_common(const char *path, const struct csv *csv)
{
	for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
		for (int row = 1; row < csv->n_rows; row++)
			if (strcmp(csv_text(csv, row, common[i]), csv_text(csv, 0, common[i])) != 0)
				return status_set(STATUS_INVALID,
				                  "%s: rows 1 and %d differ in %s: it is not one "
				                  "run",
				                  path, row + 1, common[i]);
	return STATUS_OK;
}

static enum status check_row(const char *path, const struct csv *csv, int row)
{
	static const enum status failures[] = {STATUS_MISMATCH, STATUS_INVALID, STATUS_IO,
	                                       STATUS_CUDA};
	const char *status = csv_text(csv, row, "status");

	if (!record_schema_known(csv, row))
		return refuse(path, "a schema that this program does not know");
	if (csv_number(csv, row, "git_dirty") != 0)
		return refuse(path, "measured with uncommitted changes");
	for (size_t i = 0; i < sizeof failures / sizeof failures[0]; i++)
		if (strcmp(status, status_name(failures[i])) == 0)
			return status_set(STATUS_INVALID, "%s: row %d is '%s': %.200s", path,
			                  row + 1, status, csv_text(csv, row, "message"));
	return STATUS_OK;
}

/* The build is its processor, and after that what makes it another one: sanitizers, flags. */
static enum status check_rows(const char *path, const struct csv *csv)
{
	if (csv->cut)
		return refuse(path, "its last row is cut; --resume completes it");
	if (csv->n_rows == 0)
		return refuse(path, "there are no rows");
	if (!csv_text(csv, 0, "run_id")[0] || !csv_text(csv, 0, "device")[0])
		return refuse(path, "its rows tell no run and no device");
	TRY(check_common(path, csv));
	for (int row = 0; row < csv->n_rows; row++)
		TRY(check_row(path, csv, row));
	if (strchr(csv_text(csv, 0, "build"), ' '))
		return status_set(STATUS_INVALID, "%s: measured by the build '%s'", path,
		                  csv_text(csv, 0, "build"));
	return STATUS_OK;
}

static enum status check_samples(const char *path)
{
	const size_t length = strlen(path);
	char samples[LINE];
	struct stat info;

	if (length < 4 || strcmp(path + length - 4, ".csv") != 0)
		return refuse(path, "the name does not end in .csv");
	snprintf(samples, sizeof samples, "%.*s.samples.csv", (int)length - 4, path);
	if (stat(samples, &info) == 0 && info.st_size > MOST_SAMPLE_BYTES)
		return status_set(STATUS_INVALID,
		                  "%s: %lld bytes are too many to publish; at most %d are allowed",
		                  samples, (long long)info.st_size, MOST_SAMPLE_BYTES);
	return STATUS_OK;
}

/* A file in runs/DEVICE/ is of that device. */
static enum status check_folder(const char *path, const char *device)
{
	const char *below = strncmp(path, "./", 2) == 0 ? path + 2 : path;
	const size_t length = strlen(device);

	if (strncmp(below, "runs/", 5) == 0 &&
	    !(strncmp(below + 5, device, length) == 0 && below[5 + length] == '/'))
		return status_set(STATUS_INVALID, "%s: its rows are of another device: %s", path,
		                  device);
	return STATUS_OK;
}

static enum status check_file(const char *path)
{
	struct csv csv;
	char device[128];

	TRY(csv_read(path, &csv));
	enum status status = check_rows(path, &csv);
	if (status == STATUS_OK)
		status = check_samples(path);
	if (status == STATUS_OK) {
		device_folder_name(device, sizeof device, csv_text(&csv, 0, "backend"),
		                   csv_text(&csv, 0, "device"));
		status = check_folder(path, device);
	}
	if (status == STATUS_OK)
		printf("%s %s\n", device, csv_text(&csv, 0, "git_sha"));
	csv_release(&csv);
	return status;
}

int main(int argc, char **argv)
{
	const bool help = argc == 2 && strcmp(argv[1], "--help") == 0;
	enum status status = STATUS_OK;

	streams_open();
	if (help || argc < 2) {
		fputs(usage, help ? stdout : stderr);
		return help && stdout_finish() == STATUS_OK ? 0 : 2;
	}
	for (int i = 1; status == STATUS_OK && i < argc; i++)
		status = check_file(argv[i]);
	if (status == STATUS_OK)
		status = stdout_finish();
	if (status != STATUS_OK)
		fprintf(stderr, "publish: %s\n", status_message());
	return status == STATUS_OK ? 0 : 1;
}
