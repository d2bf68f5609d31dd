#define _GNU_SOURCE
#include "bench/harness/samples.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench/harness/noise.h"

static const char header[] =
        "run_id,case_id,round,position,latency_ms,sm_clock_mhz,throttle,power_w,switches,others\n";

void samples_path(const char *rows, char *path, size_t size)
{
	const char *dot = strrchr(rows, '.');
	const bool csv = dot && strcmp(dot, ".csv") == 0;

	snprintf(path, size, "%.*s.samples.csv", (int)(csv ? dot - rows : (long)strlen(rows)),
	         rows);
}

/* The number, or an empty field. */
static void print_known(FILE *text, double value)
{
	if (isnan(value))
		fputc(',', text);
	else
		fprintf(text, ",%.7g", value);
}

static void print_sample(FILE *text, const struct record *record, const struct sample *s)
{
	char throttle[64];

	throttle_text(s->at.throttle, throttle);
	csv_write_field(text, record->run_id);
	fputc(',', text);
	csv_write_field(text, record->case_id);
	fprintf(text, ",%d,%d", s->round, s->position);
	print_known(text, s->ms);
	print_known(text, s->at.clock_mhz);
	fprintf(text, ",%s", throttle);
	print_known(text, s->at.power_w);
	print_known(text, s->at.switches < 0 ? NAN : (double)s->at.switches);
	print_known(text, s->at.others < 0 ? NAN : (double)s->at.others);
	fputc('\n', text);
}

enum status samples_append(const struct sample_file *file, const struct record *record,
                           const struct variant *v)
{
	char *lines = NULL;
	size_t length;
	FILE *text;

	if (file->descriptor < 0 || v->n_samples == 0)
		return STATUS_OK;
	text = open_memstream(&lines, &length);
	if (!text)
		return status_set(STATUS_OOM, "no memory for samples");
	for (int i = 0; i < v->n_samples; i++)
		print_sample(text, record, &v->samples[i]);
	if (fclose(text) != 0)
		return status_set(STATUS_OOM, "no memory for samples");
	const enum status status = record_write_all(file->descriptor, file->path, lines, length);

	free(lines);
	return status;
}

/* Whether a row of `rows` has this case_id. */
static bool has_row(const struct csv *rows, const char *case_id)
{
	for (int i = rows->n_rows - 1; i >= 0; i--)
		if (strcmp(csv_text(rows, i, "case_id"), case_id) == 0)
			return true;
	return false;
}

/* Bytes of the first n lines; no field of samples has a line break. */
static size_t lines_end(const struct sample_file *file, int n)
{
	char bytes[1 << 14];
	size_t end = 0;

	while (n > 0) {
		const ssize_t count = pread(file->descriptor, bytes, sizeof bytes, (off_t)end);
		ssize_t i = 0;

		if (count <= 0)
			break;
		while (i < count && n > 0)
			n -= bytes[i++] == '\n';
		end += (size_t)i;
	}
	return end;
}

/* Removes a cut line, then the samples without a row, from the end. */
static enum status drop_orphans(const struct sample_file *file, const struct csv *samples,
                                const struct csv *rows)
{
	int kept = samples->n_rows;

	while (kept > 0 && !has_row(rows, csv_text(samples, kept - 1, "case_id")))
		kept--;
	if (ftruncate(file->descriptor, (off_t)lines_end(file, kept + 1)) != 0)
		return status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
	return STATUS_OK;
}

/* Whether the file is empty, even of a header that is cut, or begins with our header. */
static bool is_ours(const struct csv *samples)
{
	return samples->n_columns == 0 ||
	       (samples->n_columns == 10 && strcmp(samples->header[1], "case_id") == 0 &&
	        strcmp(samples->header[4], "latency_ms") == 0);
}

static enum status continue_file(const struct sample_file *file, const char *rows_path)
{
	struct csv samples, rows;
	enum status status = csv_read(file->path, &samples);

	if (status != STATUS_OK)
		return status;
	if (!is_ours(&samples))
		status =
		        status_set(STATUS_INVALID, "%s holds no samples; move it away", file->path);
	if (status == STATUS_OK && samples.n_columns == 0)
		status = ftruncate(file->descriptor, 0) == 0
		                 ? record_write_all(file->descriptor, file->path, header,
		                                    sizeof header - 1)
		                 : status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
	else if (status == STATUS_OK && csv_read(rows_path, &rows) == STATUS_OK) {
		status = drop_orphans(file, &samples, &rows);
		csv_release(&rows);
	}
	csv_release(&samples);
	return status;
}

enum status samples_open(struct sample_file *file, const char *rows, enum record_mode mode)
{
	struct stat info;

	*file = (struct sample_file){.descriptor = -1};
	if (stat(rows, &info) == 0 && !S_ISREG(info.st_mode))
		return STATUS_OK;
	samples_path(rows, file->path, sizeof file->path);
	file->descriptor = open(file->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
	if (file->descriptor < 0)
		return status_set(STATUS_IO, "%s cannot be written: %s", file->path,
		                  strerror(errno));
	enum status status = continue_file(file, rows);

	if (status == STATUS_OK && mode == RECORD_TRUNCATE)
		status = ftruncate(file->descriptor, sizeof header - 1) == 0
		                 ? STATUS_OK
		                 : status_set(STATUS_IO, "%s: %s", file->path, strerror(errno));
	if (status != STATUS_OK)
		samples_close(file);
	return status;
}

void samples_close(struct sample_file *file)
{
	if (file->descriptor >= 0)
		close(file->descriptor);
	*file = (struct sample_file){.descriptor = -1};
}
