/*
 * Verification of training steps: dx without the residual's part, and the
 * gradient of every parameter.
 *
 * On the host everything is computed again. On a device, for runs too large
 * for that, by links of which none can be wrong unseen:
 *   - rows of dproj and of dx, from x and dy through whole sequences in fp64;
 *     of the run only the softmax's denominators and the mix are used, whose
 *     rows the forward's check has seen;
 *   - rows of every weight's gradient from the run's own dproj, mix and x_norm,
 *     over all tokens; the norm's and the biases' likewise.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"
#include "layers/verify.h"

/* Sequences, rows of all of them together, and rows of a weight's gradient that are looked at. */
enum { SAMPLED_SEQUENCES = 4, SAMPLED_ROWS = 256, GRADIENT_ROWS = 16 };

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* ---- everything ---- */

/* dx of one sequence, and the parameters' gradients added to grads; s holds its forward pass. */
static enum status verify_sequence_backward(const struct subject *subject, int64_t sequence,
                                            struct sequence *s, double *const *grads, double *worst)
{
	const struct stack *stack = subject->stack;
	const struct layer_config *config = subject->config;
	int64_t d = subject->d_model, p = subject->d_proj, m = subject->d_mix, t = s->seq_len;
	double *const *param = subject->param, *dx = config->prenorm ? s->dx : s->dx_norm;
	enum dtype dtype = stack->backend->activation;
	enum status status =
	        verify_download(stack->backend, dtype, stack->layer_dy[subject->layer + 1],
	                        sequence * t * d, t * d, s->dy);

	if (status != STATUS_OK)
		return status;
	reference_linear_backward(t, m, d, s->mix, param[PARAM_OUT_PROJ], s->dy, s->dmix, s->grad);
	mixing_add(d * m, s->grad, grads[PARAM_OUT_PROJ]);
	status = config->class->reference_mix_backward(config, (const double *const *)param, 1, t,
	                                               s->proj, s->dmix, s->dproj, grads);
	if (status != STATUS_OK)
		return status;
	reference_linear_backward(t, d, p, s->x_norm, param[PARAM_IN_PROJ], s->dproj, s->dx_norm,
	                          s->grad);
	mixing_add(p * d, s->grad, grads[PARAM_IN_PROJ]);
	if (config->prenorm) {
		reference_rms_norm_backward(t, d, config->norm_eps, s->x, param[PARAM_NORM],
		                            s->dx_norm, s->dx, s->grad);
		mixing_add(d, s->grad, grads[PARAM_NORM]);
	}
	status = verify_download(stack->backend, dtype, stack->layer_dy[subject->layer],
	                         sequence * t * d, t * d, s->actual);
	if (status == STATUS_OK)
		verify_raise(worst, verify_worst_sum(t, d, s->actual,
		                                     config->residual ? s->dy : NULL, dx, dtype));
	return status;
}

static enum status verify_gradients(const struct subject *subject, double *const *grads,
                                    double *worst)
{
	struct tensor_spec specs[MAX_TENSORS];
	int n = subject->config->class->parameters(subject->config, specs);
	enum status status = STATUS_OK;

	for (int i = 0; i < n && status == STATUS_OK; i++) {
		int64_t count = tensor_count(&specs[i]);
		int64_t rows = specs[i].n_dims > 1 ? specs[i].dims[0] : 1;
		double *actual = NULL;

		if (count == 0)
			continue;
		status = reference_take(count, &actual);
		if (status == STATUS_OK)
			status = verify_download(subject->stack->backend, DTYPE_F32,
			                         subject->stack->memory[subject->layer].grad[i], 0,
			                         count, actual);
		if (status == STATUS_OK)
			verify_raise(worst, verify_worst_row(rows, count / rows, actual, grads[i]));
		free(actual);
	}
	return status;
}

/* Whether the gradients that went into and came out of a layer are both still there. */
static bool has_gradients(const struct subject *subject)
{
	const struct stack *stack = subject->stack;

	return stack->layer_dy[subject->layer] != stack->layer_dy[subject->layer + 1];
}

static enum status verify_all_sequences(const struct subject *subject, struct sequence *s,
                                        double *const *grads, double *worst)
{
	const struct layer_shape *shape = &subject->stack->shape;
	bool backward = has_gradients(subject);
	enum status status = verify_outputs_finite(subject, shape->batch * shape->seq_len, worst);

	for (int64_t t = 0; t < s->seq_len; t++)
		s->rows[t] = t;
	for (int64_t b = 0; b < shape->batch && status == STATUS_OK; b++) {
		status = verify_rows(subject, b, s, worst);
		if (status == STATUS_OK && backward)
			status = verify_sequence_backward(subject, b, s, grads, worst);
	}
	return status == STATUS_OK && backward ? verify_gradients(subject, grads, worst) : status;
}

static enum status verify_all(const struct subject *subject, double *worst)
{
	struct tensor_spec specs[MAX_TENSORS];
	int64_t seq_len = subject->stack->shape.seq_len;
	int n = subject->config->class->parameters(subject->config, specs);
	double *grads[MAX_TENSORS] = {0};
	struct sequence s;
	enum status status = sequence_take(&s, subject, seq_len, seq_len, true);

	for (int i = 0; i < n && status == STATUS_OK; i++) {
		status = reference_take(tensor_count(&specs[i]), &grads[i]);
		if (status == STATUS_OK)
			memset(grads[i], 0, (size_t)tensor_count(&specs[i]) * sizeof(double));
	}
	if (status == STATUS_OK)
		status = verify_all_sequences(subject, &s, grads, worst);
	for (int i = 0; i < n; i++)
		free(grads[i]);
	sequence_release(&s);
	return status;
}

/* ---- a sample ---- */

/* A sampled sequence: the fp64 tensors where the reference runs, and rows of it on the host. */
struct sample {
	int64_t seq_len, n_rows;
	int64_t *rows;
	bool *marked;
	double *memory, *host;
	double *x, *x_norm, *proj; /* [T, D], [T, D or M], [T, P] */
	double *dy, *dmix; /* [T, D], [T, M]: in the places of x and x_norm, which are done with */
	double *dproj, *dx_norm;                       /* [n_rows, P], [n_rows, D] */
	double *dproj_host, *dx_norm_host, *dx, *norm; /* the same; [n_rows, D], [D] */
	double *actual, *base;                         /* [n_rows, P], [n_rows, D] */
};

static double *take(double **next, int64_t count)
{
	double *taken = *next;

	*next += count;
	return taken;
}

static void sample_release(struct sample *s)
{
	free(s->rows);
	free(s->marked);
	free(s->host);
	reference_release(s->memory);
}

static enum status sample_take(struct sample *s, const struct subject *subject, int64_t seq_len,
                               int64_t n_rows)
{
	int64_t d = subject->d_model, p = subject->d_proj, m = subject->d_mix;
	double *next;

	*s = (struct sample){.seq_len = seq_len, .n_rows = n_rows};
	s->rows = malloc((size_t)n_rows * sizeof *s->rows);
	s->marked = malloc((size_t)seq_len * sizeof *s->marked);
	s->host = malloc((size_t)(n_rows * (2 * p + 4 * d) + d) * sizeof *s->host);
	if (!s->rows || !s->marked || !s->host)
		return status_set(STATUS_OOM, "no memory to verify with");
	enum status status =
	        reference_take(seq_len * (d + (m > d ? m : d) + p) + n_rows * (p + d), &s->memory);
	if (status != STATUS_OK)
		return status;
	next = s->memory;
	s->x = take(&next, seq_len * d);
	s->x_norm = take(&next, seq_len * (m > d ? m : d));
	s->proj = take(&next, seq_len * p);
	s->dy = s->x;
	s->dmix = s->x_norm;
	s->dproj = take(&next, n_rows * p);
	s->dx_norm = take(&next, n_rows * d);
	next = s->host;
	s->dproj_host = take(&next, n_rows * p);
	s->dx_norm_host = take(&next, n_rows * d);
	s->dx = take(&next, n_rows * d);
	s->actual = take(&next, n_rows * p);
	s->base = take(&next, n_rows * d);
	s->norm = take(&next, d);
	return STATUS_OK;
}

/* The sequence's rows of dproj and of the gradient behind the norm, as they should be. */
static enum status expect_gradients(const struct subject *subject, int64_t sequence,
                                    struct sample *s)
{
	const struct stack *stack = subject->stack;
	const struct layer_run run = {stack->backend, &stack->memory[subject->layer], sequence};
	const struct reference_device *device = reference_in_use();
	enum dtype dtype = stack->backend->activation;
	int64_t d = subject->d_model, p = subject->d_proj, m = subject->d_mix, t = s->seq_len;
	enum status status = verify_load(stack->backend, dtype, stack->layer_x[subject->layer],
	                                 sequence * t * d, t * d, s->x);

	if (status == STATUS_OK)
		verify_project(subject, t, s->x, s->x_norm, s->proj);
	if (status == STATUS_OK)
		status = verify_load(stack->backend, dtype, stack->layer_dy[subject->layer + 1],
		                     sequence * t * d, t * d, s->dy);
	if (status != STATUS_OK)
		return status;
	device->linear_input_gradient(t, m, d, s->dy, subject->param[PARAM_OUT_PROJ], s->dmix);
	if (dtype == DTYPE_BF16)
		reference_round(dtype, t * m, s->dmix);
	status = subject->config->class->reference_dproj_rows(
	        subject->config, (const double *const *)subject->param, &run, t, s->proj, s->dmix,
	        s->n_rows, s->rows, s->dproj);
	if (status != STATUS_OK)
		return status;
	device->linear_input_gradient(s->n_rows, d, p, s->dproj, subject->param[PARAM_IN_PROJ],
	                              s->dx_norm);
	status = verify_store(s->n_rows * p, s->dproj, s->dproj_host);
	return status == STATUS_OK ? verify_store(s->n_rows * d, s->dx_norm, s->dx_norm_host)
	                           : status;
}

/* Whether dproj of this layer is still there: the layers share its place, and the first ends. */
static bool has_dproj(const struct subject *subject)
{
	return subject->layer == 0;
}

/* The gradients of a layer's parameters, one behind the other; to be freed. */
static enum status download_gradients(const struct subject *subject,
                                      const struct tensor_spec *specs, int n, double **gradients)
{
	const struct stack *stack = subject->stack;
	enum status status = STATUS_OK;
	int64_t total = 0, next = 0;

	for (int i = 0; i < n; i++)
		total += tensor_count(&specs[i]);
	*gradients = malloc((size_t)total * sizeof **gradients);
	if (!*gradients)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int i = 0; i < n && status == STATUS_OK; i++) {
		int64_t count = tensor_count(&specs[i]);

		if (count > 0)
			status = verify_download(stack->backend, DTYPE_F32,
			                         stack->memory[subject->layer].grad[i], 0, count,
			                         *gradients + next);
		next += count;
	}
	return status;
}

/*
 * Where dproj is lost, the layer's backward once more, from what the run has
 * left. Its gradients then stand for the run's, each of which they must equal.
 */
static enum status restore_dproj(const struct subject *subject, double *worst)
{
	const struct stack *stack = subject->stack;
	struct layer_memory memory = stack->memory[subject->layer];
	struct context ctx = *subject->ctx;
	struct tensor_spec specs[MAX_TENSORS];
	int n = subject->config->class->parameters(subject->config, specs);
	double *before = NULL, *after = NULL;
	enum status status = download_gradients(subject, specs, n, &before);
	int64_t next = 0;

	ctx.ranges = false;
	if (status == STATUS_OK)
		status = subject->config->class->backward(&ctx, subject->config, &stack->shape,
		                                          &memory, stack->layer_x[subject->layer],
		                                          stack->layer_dy[subject->layer + 1],
		                                          stack->layer_dy[subject->layer]);
	if (status == STATUS_OK)
		status = download_gradients(subject, specs, n, &after);
	for (int i = 0; i < n && status == STATUS_OK; i++) {
		int64_t count = tensor_count(&specs[i]);

		if (count > 0)
			verify_raise(worst,
			             verify_row_error(count, before + next, after + next, 0));
		next += count;
	}
	free(before);
	free(after);
	return status;
}

/* The sequence's rows of a scratch tensor that the backward has left. */
static enum status verify_scratch(const struct subject *subject, int tensor, int64_t width,
                                  int64_t first, struct sample *s, const double *expected,
                                  double *worst)
{
	const struct stack *stack = subject->stack;
	enum status status =
	        verify_download_rows(stack->backend, stack->memory[subject->layer].scratch[tensor],
	                             width, first, s->n_rows, s->rows, s->actual);

	if (status == STATUS_OK)
		verify_raise(worst, verify_worst_row(s->n_rows, width, s->actual, expected));
	return status;
}

static enum status verify_sample(const struct subject *subject, int64_t sequence, struct sample *s,
                                 double *worst)
{
	const struct stack *stack = subject->stack;
	const struct layer_config *config = subject->config;
	int64_t d = subject->d_model, p = subject->d_proj, first = sequence * s->seq_len;
	double *dx = config->prenorm ? s->dx : s->dx_norm_host;
	enum status status = expect_gradients(subject, sequence, s);

	if (status == STATUS_OK && has_dproj(subject))
		status = verify_scratch(subject, SCRATCH_DPROJ, p, first, s, s->dproj_host, worst);
	/* Before the norm, without the residual, in which dx hides where it is small. */
	if (status == STATUS_OK && has_dproj(subject) && config->prenorm)
		status = verify_scratch(subject, SCRATCH_DMIX, d, first, s, s->dx_norm_host, worst);
	if (status == STATUS_OK && config->prenorm) {
		/* Its x is needed once only, and borrows the place of what is compared later. */
		status = verify_store(d, subject->param[PARAM_NORM], s->norm);
		if (status == STATUS_OK)
			status =
			        verify_download_rows(stack->backend, stack->layer_x[subject->layer],
			                             d, first, s->n_rows, s->rows, s->base);
		if (status == STATUS_OK)
			reference_rms_norm_backward(s->n_rows, d, config->norm_eps, s->base,
			                            s->norm, s->dx_norm_host, s->dx, NULL);
	}
	if (status == STATUS_OK)
		status = verify_download_rows(stack->backend, stack->layer_dy[subject->layer], d,
		                              first, s->n_rows, s->rows, s->actual);
	if (status == STATUS_OK && config->residual)
		status = verify_download_rows(stack->backend, stack->layer_dy[subject->layer + 1],
		                              d, first, s->n_rows, s->rows, s->base);
	if (status == STATUS_OK)
		verify_raise(worst, verify_worst_sum(s->n_rows, d, s->actual,
		                                     config->residual ? s->base : NULL, dx,
		                                     stack->backend->activation));
	return status;
}

/* Rows of dweight = dy^T x_norm over all tokens. */
static enum status verify_weight(const struct subject *subject, int index,
                                 const struct reference_gradient_of *of, uint64_t seed,
                                 double *worst)
{
	const struct stack *stack = subject->stack;
	int64_t n = smaller(GRADIENT_ROWS, of->d_out), d = of->d_in, rows[GRADIENT_ROWS];
	double *expected = malloc((size_t)(2 * n * d) * sizeof *expected);

	if (!expected)
		return status_set(STATUS_OOM, "no memory to verify with");
	verify_pick(of->d_out, n, seed, rows);
	enum status status = reference_in_use()->weight_gradient_rows(of, n, rows, expected);
	for (int64_t i = 0; i < n && status == STATUS_OK; i++)
		status = verify_download(stack->backend, DTYPE_F32,
		                         stack->memory[subject->layer].grad[index], rows[i] * d, d,
		                         expected + (n + i) * d);
	if (status == STATUS_OK)
		verify_raise(worst, verify_worst_row(n, d, expected + n * d, expected));
	free(expected);
	return status;
}

/* Some columns of the norm's gradient. */
static enum status verify_norm(const struct subject *subject,
                               const struct reference_gradient_of *of, uint64_t seed, double *worst)
{
	const struct stack *stack = subject->stack;
	int64_t n = smaller(GRADIENT_ROWS, of->d_in), columns[GRADIENT_ROWS];
	double expected[GRADIENT_ROWS], actual[GRADIENT_ROWS];

	verify_pick(of->d_in, n, seed, columns);
	enum status status = reference_in_use()->norm_gradient_columns(
	        of, subject->config->norm_eps, subject->param[PARAM_IN_PROJ], n, columns, expected);
	for (int64_t i = 0; i < n && status == STATUS_OK; i++)
		status = verify_download(stack->backend, DTYPE_F32,
		                         stack->memory[subject->layer].grad[PARAM_NORM], columns[i],
		                         1, actual + i);
	if (status == STATUS_OK)
		verify_raise(worst, verify_row_error(n, actual, expected, 0));
	return status;
}

/* A parameter that is added to columns of proj: the sum of dproj's over all tokens. */
static enum status verify_bias(const struct subject *subject, int index, int64_t count,
                               int64_t n_tokens, double *worst)
{
	const struct stack *stack = subject->stack;
	const struct layer_memory *memory = &stack->memory[subject->layer];
	int64_t first = subject->config->class->summed_columns(subject->config, index);
	enum dtype dtype = stack->backend->activation;
	double *expected = malloc((size_t)(2 * count) * sizeof *expected);

	if (!expected)
		return status_set(STATUS_OOM, "no memory to verify with");
	enum status status =
	        first < 0 ? status_set(STATUS_UNSUPPORTED, "no check of a parameter's gradient")
	                  : reference_in_use()->column_sums(
	                            dtype,
	                            (const char *)memory->scratch[SCRATCH_DPROJ] +
	                                    (size_t)first * dtype_size(dtype),
	                            n_tokens, subject->d_proj, count, expected);
	if (status == STATUS_OK)
		status = verify_download(stack->backend, DTYPE_F32, memory->grad[index], 0, count,
		                         expected + count);
	if (status == STATUS_OK)
		verify_raise(worst, verify_row_error(count, expected + count, expected, 0));
	free(expected);
	return status;
}

static enum status verify_parameters(const struct subject *subject, uint64_t seed, double *worst)
{
	const struct stack *stack = subject->stack;
	const struct layer_memory *memory = &stack->memory[subject->layer];
	const struct layer_config *config = subject->config;
	int64_t d = subject->d_model, n_tokens = stack->shape.batch * stack->shape.seq_len;
	const void *x = stack->layer_x[subject->layer];
	const struct reference_gradient_of in = {
	        .dtype = stack->backend->activation,
	        .n = n_tokens,
	        .d_in = d,
	        .d_out = subject->d_proj,
	        .x = x,
	        .x_norm = config->prenorm ? memory->saved[SAVED_X_NORM] : x,
	        .dy = memory->scratch[SCRATCH_DPROJ],
	};
	const struct reference_gradient_of out = {
	        .dtype = stack->backend->activation,
	        .n = n_tokens,
	        .d_in = subject->d_mix,
	        .d_out = d,
	        .x_norm = memory->saved[SAVED_MIX],
	        .dy = stack->layer_dy[subject->layer + 1],
	};
	struct tensor_spec specs[MAX_TENSORS];
	int n = config->class->parameters(config, specs);
	enum status status = verify_weight(subject, PARAM_OUT_PROJ, &out, seed, worst);

	for (int i = 0; i < n && status == STATUS_OK; i++)
		if (tensor_count(&specs[i]) > 0)
			status = verify_finite(stack->backend, DTYPE_F32, memory->grad[i],
			                       tensor_count(&specs[i]), worst);
	if (status == STATUS_OK && !has_dproj(subject))
		status = restore_dproj(subject, worst);
	if (status == STATUS_OK)
		status = verify_weight(subject, PARAM_IN_PROJ, &in, seed, worst);
	if (status == STATUS_OK && config->prenorm)
		status = verify_norm(subject, &in, seed, worst);
	for (int i = PARAM_OTHER; i < n && status == STATUS_OK; i++)
		status = verify_bias(subject, i, tensor_count(&specs[i]), n_tokens, worst);
	return status;
}

static enum status verify_sampled(const struct subject *subject, int64_t min_rows, uint64_t seed,
                                  double *worst)
{
	const struct stack *stack = subject->stack;
	int64_t batch = stack->shape.batch, seq_len = stack->shape.seq_len;
	int64_t n = smaller(SAMPLED_SEQUENCES, batch), sequences[SAMPLED_SEQUENCES];
	struct sample s;
	enum status status = verify_forward(subject, min_rows, seed, worst);

	if (status != STATUS_OK || !has_gradients(subject))
		return status;
	verify_pick(batch, n, seed, sequences);
	status = sample_take(&s, subject, seq_len, smaller(SAMPLED_ROWS / n, seq_len));
	for (int64_t i = 0; i < n && status == STATUS_OK; i++) {
		verify_pick_rows(subject->config, seq_len, s.n_rows, seed + (uint64_t)i, s.marked,
		                 s.rows);
		status = verify_sample(subject, sequences[i], &s, worst);
	}
	sample_release(&s);
	if (status == STATUS_OK)
		status = verify_finite(stack->backend, stack->backend->activation,
		                       stack->layer_dy[subject->layer],
		                       batch * seq_len * subject->d_model, worst);
	return status == STATUS_OK ? verify_parameters(subject, seed, worst) : status;
}

enum status verify_train(const struct subject *subject, int64_t min_rows, uint64_t seed,
                         double *worst)
{
	return reference_in_use() ? verify_sampled(subject, min_rows, seed, worst)
	                          : verify_all(subject, worst);
}
