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

enum status golden_check(const struct golden_options *options, const char *path,
                         struct golden_report *report)
{
	struct golden_file check = {
	        .device = options->device,
	        .options = options,
	        .ctx = {.device = options->device, .choice = options->choice},
	        .report = report,
	};
	enum status status = safetensors_open(path, &check.file);

	*report = (struct golden_report){0};
	if (status != STATUS_OK)
		return status;
	check.used = calloc((size_t)check.file.n_tensors + 1, sizeof *check.used);
	status = check.used ? check_file(&check) : status_set(STATUS_OOM, "no memory");
	status = golden_forgive(&check, status);
	if (status == STATUS_OK)
		golden_add_unused(&check);
	free(check.used);
	golden_free(&check);
	safetensors_close(&check.file);
	if (status == STATUS_OK && report->n_failed > 0)
		status = status_set(STATUS_MISMATCH, "%d tensors of %s", report->n_failed, path);
	return status;
}
