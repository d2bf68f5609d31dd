#include "bench/golden_check.h"

#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "bench/golden_operation.h"
#include "bench/golden_stack.h"

const char *golden_verdict_name(enum golden_verdict verdict)
{
	static const char *const names[] = {"pass", "MISS", "unsupported", "NOT COMPARED"};

	return names[verdict];
}

const struct golden_result *golden_find(const struct golden_report *report, const char *tensor)
{
	for (int i = 0; i < report->n_results; i++)
		if (strcmp(report->results[i].tensor, tensor) == 0)
			return &report->results[i];
	return NULL;
}

static enum status check_file(struct golden_file *check)
{
	if (safetensors_metadata(&check->file, "block"))
		return golden_stack(check, false);
	if (safetensors_metadata(&check->file, "model"))
		return golden_stack(check, true);
	if (safetensors_metadata(&check->file, "op"))
		return golden_operation(check);
	if (safetensors_metadata(&check->file, "train_curve"))
		return status_set(STATUS_UNSUPPORTED, "no training curves");
	return status_set(STATUS_INVALID, "the metadata names no block, model or op");
}

/* Writes what was compared, with the file's metadata. */
static enum status save(struct golden_file *check)
{
	const struct safetensors saved = {.n_tensors = check->n_saved,
	                                  .tensors = check->saved,
	                                  .n_metadata = check->file.n_metadata,
	                                  .metadata = check->file.metadata};

	return safetensors_write(check->options->save, &saved);
}

/* All of a check whose file is open. */
static enum status check_opened(struct golden_file *check)
{
	check->used = calloc((size_t)check->file.n_tensors + 1, sizeof *check->used);
	enum status status = check->used ? check_file(check) : status_set(STATUS_OOM, "no memory");

	status = golden_forgive(check, status);
	if (status == STATUS_OK)
		golden_add_unused(check);
	if (status == STATUS_OK && check->options->save)
		status = save(check);
	free(check->used);
	golden_free(check);
	return status;
}

enum status golden_check(const struct golden_options *options, const char *path,
                         struct golden_report *report)
{
	struct golden_file *check = calloc(1, sizeof *check);

	*report = (struct golden_report){0};
	if (!check)
		return status_set(STATUS_OOM, "no memory");
	check->device = options->device;
	check->options = options;
	check->ctx = (struct context){.device = options->device, .choice = options->choice};
	check->report = report;
	enum status status = safetensors_open(path, &check->file);
	if (status == STATUS_OK)
		status = check_opened(check);
	safetensors_close(&check->file);
	free(check);
	if (status == STATUS_OK && report->n_failed > 0)
		status = status_set(STATUS_MISMATCH, "%d tensors of %s", report->n_failed, path);
	return status;
}
