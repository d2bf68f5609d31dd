/* One golden file under check: its tensors and metadata, and the verdicts about them. */
#ifndef BENCH_GOLDEN_FILE_H
#define BENCH_GOLDEN_FILE_H

#include "bench/golden_check.h"
#include "bench/safetensors.h"

/* One check in progress. */
struct golden_file {
	struct device *device;
	const struct golden_options *options;
	struct safetensors file;
	bool *used;                   /* [file.n_tensors]: an input or a parameter, or compared */
	struct golden_memory *memory; /* what golden_allocate() has given, until the check's end */
	struct context ctx;
	struct golden_report *report;
	/* What is to be written out (golden_options.save), by label. */
	int n_saved;
	struct safetensor saved[GOLDEN_MAX_RESULTS];
	char saved_names[GOLDEN_MAX_RESULTS][96];
};

/* What follows a prefix of a tensor's name, or NULL. */
const char *golden_suffix(const struct safetensor *tensor, const char *prefix);
/* Skips dimensions of 1: they mean nothing, and projects differ in where they have some. */
int golden_next_dim(int n_dims, const int64_t *dims, int i);

/* "[2, 64, 128]". */
void golden_print_shape(int n_dims, const int64_t *dims, char text[96]);

/* A tensor that must be there, of that type and, dimensions of 1 apart, of that shape. */
enum status golden_require(const struct golden_file *check, const char *name,
                           enum safetensors_dtype dtype, int n_dims, const int64_t *dims,
                           const struct safetensor **tensor);
enum status golden_floats(const struct golden_file *check, const char *name, int n_dims,
                          const int64_t *dims, const float **values);
/* Memory for `count` floats that the check gives back. */
enum status golden_allocate(struct golden_file *check, int64_t count, float **values);
void golden_free(struct golden_file *check);

/* Notes that a tensor is an input, a parameter, or compared. */
void golden_mark(struct golden_file *check, const char *name);
/* Notes ||actual - expected|| / ||expected|| for the stored tensor `name`, whose result is called
 * `label`. A NaN anywhere is a miss. What is stored in 16 bits may be off by as much as they lose.
 */
void golden_compare(struct golden_file *check, const char *name, const char *label, bool gradient,
                    const float *actual, const float *expected, int64_t count);
/* Notes every tensor that nothing has used. */
void golden_add_unused(struct golden_file *check);
/* STATUS_UNSUPPORTED is no failure: its message is kept. */
enum status golden_forgive(struct golden_file *check, enum status status);

#endif
