/*
 * Compares a device with a golden file: a layer, a model or one operation,
 * whose inputs, outputs and gradients another project's code has computed.
 */
#ifndef BENCH_GOLDEN_CHECK_H
#define BENCH_GOLDEN_CHECK_H

#include <stdio.h>

#include "kernels/kernels.h"

enum { GOLDEN_MAX_RESULTS = 128 };

enum golden_verdict {
	GOLDEN_PASS,
	GOLDEN_MISS,         /* compared, and too far off or not finite */
	GOLDEN_UNSUPPORTED,  /* there is no such block or operation, or the device cannot run it */
	GOLDEN_NOT_COMPARED, /* stored in the file, but nothing here used it: a failure */
	GOLDEN_VERDICTS
};

/* "pass", "MISS", "unsupported", "NOT COMPARED". */
const char *golden_verdict_name(enum golden_verdict verdict);

struct golden_result {
	char tensor[96];  /* what was compared: its name in the file, "y - x", "state.s (steps)" */
	double rel_err;   /* ||a - b|| / ||b||; NAN where nothing was compared */
	double tolerance; /* likewise */
	enum golden_verdict verdict;
};

struct golden_report {
	int n_results, count[GOLDEN_VERDICTS]; /* how many have each verdict */
	int n_failed;                          /* misses and tensors not compared */
	char unsupported[256]; /* what could not be run, and why; "" if everything was */
	struct golden_result results[GOLDEN_MAX_RESULTS];
};

struct golden_options {
	struct device *device;
	struct provider_choice choice;
	int64_t chunk;    /* chunk length of matrix_recurrence; 0: the kernel picks */
	const char *save; /* a file for what was compared, as it is here; NULL: none */
};

/*
 * Runs what the file at `path` describes and compares every tensor it stores:
 * an operation forward and backward; a layer or a model in training, in prefill,
 * and token by token, with the states that the latter two leave.
 * fp32 must agree to 2e-5; bf16, on the device or in the file, to 1.5e-2 (outputs) and 3e-2
 * (gradients), what the file has in fp16 to 2e-3 and 4e-3. Gradients are compared where the file
 * has them.
 * Layers with a residual are compared as y - x and dx - dy. STATUS_OK if
 * nothing failed, though what is unsupported is not compared; STATUS_MISMATCH if
 * something did; otherwise the reason why the file could not be used, and the
 * report holds what was found until then.
 */
enum status golden_check(const struct golden_options *options, const char *path,
                         struct golden_report *report);

/* Prints the parameters of a pattern, "rat(chunk=16)", as golden files have to call and shape them,
 * a line each. */
enum status golden_describe(struct device *device, const char *pattern, int64_t d_model,
                            FILE *file);

/* The result for `tensor`, or NULL. */
const struct golden_result *golden_find(const struct golden_report *report, const char *tensor);

#endif
