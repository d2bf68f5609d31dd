/*
 * The parts of verification share this: one layer in fp64, and the errors of
 * rows. Used by layers/verify*.c alone.
 */
#ifndef LAYERS_VERIFY_H
#define LAYERS_VERIFY_H

#include "layers/stack.h"

/* One layer of a stack, with its parameters as doubles where the reference runs. */
struct subject {
	const struct stack *stack;
	const struct context *ctx; /* of the run */
	int layer;
	const struct layer_config *config;
	int64_t d_model, d_proj, d_mix;
	double *param[MAX_TENSORS];
};

/* Downloads the parameters; the caller closes the subject whatever the status. */
enum status subject_open(struct subject *subject, const struct stack *stack, int layer);
void subject_close(struct subject *subject);

/* The layers that stack_verify() looks at: they mix tokens, and their buffers survive. */
bool verify_layer(const struct stack *stack, int layer);

/* `count` elements of a tensor from `first` on. */
enum status verify_download(const struct backend *backend, enum dtype dtype, const void *tensor,
                            int64_t first, int64_t count, double *out);
/* Rows of an activation tensor [.., width], counted from row `first`. */
enum status verify_download_rows(const struct backend *backend, const void *tensor, int64_t width,
                                 int64_t first, int64_t n_rows, const int64_t *rows, double *out);

/* x_norm [n, D] and proj [n, P] from x [n, D], where the reference runs. Both are what a backend
 * stores, and rounded as it must round them where its activations are bf16. */
void verify_project(const struct subject *subject, int64_t n, const double *x, double *x_norm,
                    double *proj);

/* ||a - b|| / ||b||, or over `floor` if that is more; INFINITY unless all is finite. */
double verify_row_error(int64_t width, const double *actual, const double *expected, double floor);
/* The worst row's, where the floor is a hundredth of the rows' rms length: a row that is nothing
 * but cancellation must not count. */
double verify_worst_row(int64_t n_rows, int64_t width, const double *actual,
                        const double *expected);
/*
 * The same for what a residual sum has added to `base`: of actual - base against
 * expected, after allowing each row the rounding of the sum to `dtype`.
 * base NULL: nothing was added to. Overwrites actual.
 */
double verify_worst_sum(int64_t n_rows, int64_t width, double *actual, const double *base,
                        const double *expected, enum dtype dtype);
/* *worst = INFINITY if an element of proj, mix or y, n_tokens rows of each, is NaN or Inf. */
enum status verify_outputs_finite(const struct subject *subject, int64_t n_tokens, double *worst);

/* *worst = error if that is more, INFINITY if it is a NaN. */
void verify_raise(double *worst, double error);
/* *worst = INFINITY if any of `count` elements is NaN or Inf. */
enum status verify_finite(const struct backend *backend, enum dtype dtype, const void *tensor,
                          int64_t count, double *worst);
/* Elements of a tensor as doubles, where the reference runs; its doubles on the host. */
enum status verify_load(const struct backend *backend, enum dtype dtype, const void *tensor,
                        int64_t first, int64_t count, double *to);
enum status verify_store(int64_t count, const double *from, double *host);

/* The fp64 tensors of one sequence of T tokens, of which `rows` are looked at: where the reference
 * runs, and the rows on the host. */
struct sequence {
	int64_t seq_len, n_rows;
	int64_t *rows;
	bool *marked;
	double *memory, *host;
	double *x, *x_norm, *proj;               /* [T, D], [T, D], [T, P] */
	double *mix, *branch, *x_rows;           /* [n_rows, M], [n_rows, D]: expected mix, OutProj
	                                            of it */
	double *mix_host, *branch_host, *x_host; /* the same on the host */
	double *actual;                          /* host [n_rows, M] */
	double *dy, *dmix, *dproj;               /* training: [T, D], [T, D], [T, P] */
	double *dx_norm, *dx, *grad;             /* [T, D], [T, D], the largest parameter */
};

enum status sequence_take(struct sequence *s, const struct subject *subject, int64_t seq_len,
                          int64_t n_rows, bool train);
void sequence_release(struct sequence *s);
/* Mix and y of the sequence's rows: what was computed, and what should have been. */
enum status verify_rows(const struct subject *subject, int64_t sequence, struct sequence *s,
                        double *worst);
/* `n` rows of a sequence, ascending: first, last, both sides of chunk, tile and window edges, and
 * random ones; at least half are random. */
void verify_pick_rows(const struct layer_config *config, int64_t seq_len, int64_t n, uint64_t seed,
                      bool *marked, int64_t *rows);

/* `n` of 0..total-1, ascending and distinct, spread at random, 0 and total-1 among them. */
void verify_pick(int64_t total, int64_t n, uint64_t seed, int64_t *picked);

/* Checks rows of what the last forward pass has left; raises *worst. */
enum status verify_forward(const struct subject *subject, int64_t min_rows, uint64_t seed,
                           double *worst);
/* Checks a layer's training step: every row on the host, a sample of them on a device. */
enum status verify_train(const struct subject *subject, int64_t min_rows, uint64_t seed,
                         double *worst);
/* Checks a layer's step against the snapshot; raises *worst. */
enum status verify_step(const struct subject *subject, double *worst);

#endif
