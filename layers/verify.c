/* Verification of forward and backward passes against the fp64 reference. */
#include "layers/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"
#include "layers/noise.h"

/* Elements that are looked at together, and the sequences that a sample of rows comes from at
 * least: each of them costs the InProj of all its tokens. */
enum { BLOCK_COUNT = 1 << 20, SAMPLED_SEQUENCES = 8 };

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

void verify_raise(double *worst, double error)
{
	/* Written so that a NaN raises it, too. */
	if (!(error <= *worst))
		*worst = isnan(error) ? INFINITY : error;
}

/* ---- downloads ---- */

enum status verify_download(const struct backend *backend, enum dtype dtype, const void *tensor,
                            int64_t first, int64_t count, double *out)
{
	const char *from = (const char *)tensor + (size_t)first * dtype_size(dtype);
	float *block = malloc((size_t)smaller(BLOCK_COUNT, count) * sizeof *block + 1);
	enum status status = STATUS_OK;

	if (!block)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < count && status == STATUS_OK; i += BLOCK_COUNT) {
		int64_t n = smaller(BLOCK_COUNT, count - i);

		status = backend_download_floats(backend, dtype, block,
		                                 from + (size_t)i * dtype_size(dtype), (size_t)n);
		if (status != STATUS_OK)
			break;
#pragma omp parallel for simd
		for (int64_t j = 0; j < n; j++)
			out[i + j] = block[j];
	}
	free(block);
	return status;
}

enum status verify_download_rows(const struct backend *backend, const void *tensor, int64_t width,
                                 int64_t first, int64_t n_rows, const int64_t *rows, double *out)
{
	enum status status = STATUS_OK;

	for (int64_t i = 0, run; i < n_rows && status == STATUS_OK; i += run) {
		for (run = 1; i + run < n_rows && rows[i + run] == rows[i] + run; run++)
			;
		status = verify_download(backend, backend->activation, tensor,
		                         (first + rows[i]) * width, run * width, out + i * width);
	}
	return status;
}

/* The host's way of backend->count_nonfinite. */
static enum status count_nonfinite(const struct backend *backend, enum dtype dtype,
                                   const void *tensor, int64_t count, int64_t *n)
{
	float *block = malloc((size_t)smaller(BLOCK_COUNT, count) * sizeof *block + 1);
	enum status status = STATUS_OK;

	*n = 0;
	if (!block)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < count && status == STATUS_OK; i += BLOCK_COUNT) {
		int64_t length = smaller(BLOCK_COUNT, count - i);

		status = backend_download_floats(
		        backend, dtype, block, (const char *)tensor + (size_t)i * dtype_size(dtype),
		        (size_t)length);
		for (int64_t j = 0; j < length && status == STATUS_OK; j++)
			*n += !isfinite(block[j]);
	}
	free(block);
	return status;
}

enum status verify_finite(const struct backend *backend, enum dtype dtype, const void *tensor,
                          int64_t count, double *worst)
{
	int64_t n = 0;
	enum status status = backend->count_nonfinite
	                             ? backend->count_nonfinite(dtype, tensor, count, &n)
	                             : count_nonfinite(backend, dtype, tensor, count, &n);

	if (n > 0)
		*worst = INFINITY;
	return status;
}

/* ---- a layer in fp64 ---- */

enum status verify_load(const struct backend *backend, enum dtype dtype, const void *tensor,
                        int64_t first, int64_t count, double *to)
{
	const char *from = (const char *)tensor + (size_t)first * dtype_size(dtype);

	if (reference_in_use())
		return reference_in_use()->load(dtype, from, count, to);
	return verify_download(backend, dtype, tensor, first, count, to);
}

enum status verify_store(int64_t count, const double *from, double *host)
{
	if (reference_in_use())
		return reference_in_use()->store(count, from, host);
	mixing_copy(count, from, host);
	return STATUS_OK;
}

bool verify_layer(const struct stack *stack, int layer)
{
	return stack->layers[layer].class->reference_mix &&
	       stack_keeps(stack, &stack->shape, layer);
}

enum status subject_open(struct subject *subject, const struct stack *stack, int layer)
{
	const struct layer_config *config = &stack->layers[layer];
	struct tensor_spec specs[MAX_TENSORS];
	int n = config->class->parameters(config, specs);
	enum status status = STATUS_OK;

	*subject = (struct subject){
	        .stack = stack,
	        .layer = layer,
	        .config = config,
	        .d_model = config->d_model,
	        .d_mix = mixing_width(config),
	        .d_proj = specs[PARAM_IN_PROJ].dims[0],
	};
	for (int i = 0; i < n && status == STATUS_OK; i++) {
		int64_t count = tensor_count(&specs[i]);

		status = reference_take(count, &subject->param[i]);
		if (status == STATUS_OK)
			status = verify_load(
			        stack->backend, tensor_dtype(&specs[i], stack->backend),
			        stack->memory[layer].param[i], 0, count, subject->param[i]);
	}
	return status;
}

void subject_close(struct subject *subject)
{
	for (int i = 0; i < MAX_TENSORS; i++)
		reference_release(subject->param[i]);
}

void verify_project(const struct subject *subject, int64_t n, const double *x, double *x_norm,
                    double *proj)
{
	int64_t d = subject->d_model;
	enum dtype dtype = subject->stack->backend->activation;

	if (subject->config->prenorm)
		reference_rms_norm(n, d, subject->config->norm_eps, x, subject->param[PARAM_NORM],
		                   x_norm, NULL);
	else
		reference_get_columns(n, d, 0, d, x, x_norm);
	if (dtype == DTYPE_BF16)
		reference_round(dtype, n * d, x_norm);
	reference_linear(n, d, subject->d_proj, x_norm, subject->param[PARAM_IN_PROJ], proj);
	if (dtype == DTYPE_BF16)
		reference_round(dtype, n * subject->d_proj, proj);
}

/* ---- errors of rows ---- */

static double length_of(int64_t width, const double *row)
{
	double sum = 0;

	for (int64_t i = 0; i < width; i++)
		sum += row[i] * row[i];
	return sqrt(sum);
}

static double distance(int64_t width, const double *a, const double *b)
{
	double sum = 0;

	for (int64_t i = 0; i < width; i++)
		sum += (a[i] - b[i]) * (a[i] - b[i]);
	return sqrt(sum);
}

static double relative(double error, double length)
{
	if (!isfinite(error) || !isfinite(length))
		return INFINITY;
	return error == 0 ? 0 : error / length;
}

double verify_row_error(int64_t width, const double *actual, const double *expected, double floor)
{
	return relative(distance(width, actual, expected), fmax(length_of(width, expected), floor));
}

static double floor_of(int64_t n_rows, int64_t width, const double *expected)
{
	return n_rows == 0 ? 0 : 1e-2 * length_of(n_rows * width, expected) / sqrt((double)n_rows);
}

double verify_worst_row(int64_t n_rows, int64_t width, const double *actual, const double *expected)
{
	double worst = 0, floor = floor_of(n_rows, width, expected);

	for (int64_t i = 0; i < n_rows; i++)
		verify_raise(&worst, verify_row_error(width, actual + i * width,
		                                      expected + i * width, floor));
	return worst;
}

double verify_worst_sum(int64_t n_rows, int64_t width, double *actual, const double *base,
                        const double *expected, enum dtype dtype)
{
	double worst = 0, floor = floor_of(n_rows, width, expected);
	double unit = dtype == DTYPE_BF16 ? 0x1p-9 : 0x1p-24;

	if (!base)
		return verify_worst_row(n_rows, width, actual, expected);
	for (int64_t i = 0; i < n_rows; i++) {
		double *row = actual + i * width;
		double rounding = unit * length_of(width, row);

		for (int64_t j = 0; j < width; j++)
			row[j] -= base[i * width + j];
		double error = distance(width, row, expected + i * width) - rounding;
		verify_raise(&worst, relative(error < 0 ? 0 : error,
		                              fmax(length_of(width, expected + i * width), floor)));
	}
	return worst;
}

/* ---- what to look at ---- */

void verify_pick(int64_t total, int64_t n, uint64_t seed, int64_t *picked)
{
	for (int64_t i = 0; i < n; i++) {
		int64_t from = i * total / n, to = (i + 1) * total / n;

		picked[i] =
		        from + (int64_t)(noise_bits(seed, 0, (uint64_t)i) % (uint64_t)(to - from));
	}
	if (n > 1) {
		picked[0] = 0;
		picked[n - 1] = total - 1;
	}
}

/* Marks t and its neighbours, unless that leaves fewer than `keep` of *left to choose. */
static void mark_edge(bool *marked, int64_t seq_len, int64_t t, int64_t keep, int64_t *left)
{
	for (int64_t i = larger(t - 1, 0); i < smaller(t + 1, seq_len) && *left > keep; i++) {
		*left -= !marked[i];
		marked[i] = true;
	}
}

void verify_pick_rows(const struct layer_config *config, int64_t seq_len, int64_t n, uint64_t seed,
                      bool *marked, int64_t *rows)
{
	const int64_t steps[] = {larger(config->chunk, 1), config->window + 1, 64, 128};
	int64_t left = n, n_rows = 0;

	memset(marked, 0, (size_t)seq_len * sizeof *marked);
	mark_edge(marked, seq_len, 0, 0, &left);
	mark_edge(marked, seq_len, seq_len, 0, &left);
	for (int64_t k = 1; k <= 8; k *= 2)
		for (int s = 0; s < (int)(sizeof steps / sizeof steps[0]); s++)
			mark_edge(marked, seq_len, k * steps[s], n / 2, &left);
	for (uint64_t i = 0; left > 0; i++) {
		int64_t t = (int64_t)(noise_bits(seed, 1, i) % (uint64_t)seq_len);

		left -= !marked[t];
		marked[t] = true;
	}
	for (int64_t t = 0; t < seq_len; t++)
		if (marked[t])
			rows[n_rows++] = t;
}

/* ---- forward ---- */

void sequence_release(struct sequence *s)
{
	free(s->rows);
	free(s->marked);
	free(s->host);
	reference_release(s->memory);
}

static double *take(double **next, int64_t count)
{
	double *taken = *next;

	*next += count;
	return taken;
}

enum status sequence_take(struct sequence *s, const struct subject *subject, int64_t seq_len,
                          int64_t n_rows, bool train)
{
	int64_t d = subject->d_model, p = subject->d_proj, tokens = train ? seq_len : 0;
	int64_t m = subject->d_mix;
	int64_t grad = train ? d * larger(m, p) : 0;
	double *next;

	*s = (struct sequence){.seq_len = seq_len, .n_rows = n_rows};
	s->rows = malloc((size_t)n_rows * sizeof *s->rows);
	s->marked = malloc((size_t)seq_len * sizeof *s->marked);
	s->host = malloc((size_t)(n_rows * (m + 2 * d + larger(m, d))) * sizeof *s->host);
	if (!s->rows || !s->marked || !s->host)
		return status_set(STATUS_OOM, "no memory to verify with");
	enum status status = reference_take(seq_len * (2 * d + p) + n_rows * (m + 2 * d) +
	                                            tokens * (3 * d + m + p) + grad,
	                                    &s->memory);
	if (status != STATUS_OK)
		return status;
	next = s->memory;
	s->x = take(&next, seq_len * d);
	s->x_norm = take(&next, seq_len * d);
	s->proj = take(&next, seq_len * p);
	s->mix = take(&next, n_rows * m);
	s->branch = take(&next, n_rows * d);
	s->x_rows = take(&next, n_rows * d);
	s->dy = take(&next, tokens * d);
	s->dmix = take(&next, tokens * m);
	s->dproj = take(&next, tokens * p);
	s->dx_norm = take(&next, tokens * d);
	s->dx = take(&next, tokens * d);
	s->grad = take(&next, grad);
	next = s->host;
	s->mix_host = take(&next, n_rows * m);
	s->branch_host = take(&next, n_rows * d);
	s->x_host = take(&next, n_rows * d);
	s->actual = take(&next, n_rows * larger(m, d));
	return STATUS_OK;
}

/* What the sequence's rows should have been. */
static enum status expect_rows(const struct subject *subject, int64_t sequence, struct sequence *s)
{
	const struct stack *stack = subject->stack;
	const struct layer_config *config = subject->config;
	int64_t d = subject->d_model, count = s->n_rows * d;
	enum status status = verify_load(stack->backend, stack->backend->activation,
	                                 stack->layer_x[subject->layer], sequence * s->seq_len * d,
	                                 s->seq_len * d, s->x);

	if (status != STATUS_OK)
		return status;
	verify_project(subject, s->seq_len, s->x, s->x_norm, s->proj);
	status = config->class->reference_mix(config, (const double *const *)subject->param, 1,
	                                      s->seq_len, s->proj, s->n_rows, s->rows, s->mix);
	if (status != STATUS_OK)
		return status;
	reference_linear(s->n_rows, subject->d_mix, d, s->mix, subject->param[PARAM_OUT_PROJ],
	                 s->branch);
	reference_get_rows(d, s->n_rows, s->rows, s->x, s->x_rows);
	status = verify_store(s->n_rows * subject->d_mix, s->mix, s->mix_host);
	if (status == STATUS_OK)
		status = verify_store(count, s->branch, s->branch_host);
	return status == STATUS_OK ? verify_store(count, s->x_rows, s->x_host) : status;
}

enum status verify_rows(const struct subject *subject, int64_t sequence, struct sequence *s,
                        double *worst)
{
	const struct stack *stack = subject->stack;
	int64_t d = subject->d_model, m = subject->d_mix, first = sequence * s->seq_len;
	enum status status = expect_rows(subject, sequence, s);

	if (status == STATUS_OK)
		status = verify_download_rows(stack->backend,
		                              stack->memory[subject->layer].saved[SAVED_MIX], m,
		                              first, s->n_rows, s->rows, s->actual);
	if (status != STATUS_OK)
		return status;
	verify_raise(worst, verify_worst_row(s->n_rows, m, s->actual, s->mix_host));
	status = verify_download_rows(stack->backend, stack->layer_x[subject->layer + 1], d, first,
	                              s->n_rows, s->rows, s->actual);
	if (status == STATUS_OK)
		verify_raise(worst, verify_worst_sum(s->n_rows, d, s->actual,
		                                     subject->config->residual ? s->x_host : NULL,
		                                     s->branch_host, stack->backend->activation));
	return status;
}

/* Sequences whose activations the last forward pass has left. */
static int64_t sequences_left(const struct stack *stack)
{
	int64_t part = stack->shape.micro_batch;

	if (part <= 0 || stack->shape.pass == PASS_TRAIN)
		return stack->shape.batch;
	return (stack->shape.batch - 1) % part + 1;
}

enum status verify_outputs_finite(const struct subject *subject, int64_t n_tokens, double *worst)
{
	const struct stack *stack = subject->stack;
	void *const *saved = stack->memory[subject->layer].saved;
	const struct {
		const void *data;
		int64_t width;
	} tensors[] = {{saved[SAVED_PROJ], subject->d_proj},
	               {saved[SAVED_MIX], subject->d_mix},
	               {stack->layer_x[subject->layer + 1], subject->d_model}};
	enum status status = STATUS_OK;

	for (int i = 0; i < 3 && status == STATUS_OK; i++)
		status = verify_finite(stack->backend, stack->backend->activation, tensors[i].data,
		                       n_tokens * tensors[i].width, worst);
	return status;
}

enum status verify_forward(const struct subject *subject, int64_t min_rows, uint64_t seed,
                           double *worst)
{
	int64_t batch = sequences_left(subject->stack), seq_len = subject->stack->shape.seq_len;
	bool all = batch * seq_len <= min_rows;
	int64_t n = all ? batch : larger(SAMPLED_SEQUENCES, (min_rows + seq_len - 1) / seq_len);
	struct sequence s;

	n = smaller(n, batch);
	int64_t n_rows = all ? seq_len : smaller((min_rows + n - 1) / n, seq_len);
	int64_t *sequences = malloc((size_t)n * sizeof *sequences);
	enum status status = sequence_take(&s, subject, seq_len, n_rows, false);

	if (!sequences)
		status = status_set(STATUS_OOM, "no memory to verify with");
	if (status == STATUS_OK) {
		verify_pick(batch, n, seed, sequences);
		status = verify_outputs_finite(subject, batch * seq_len, worst);
	}
	for (int64_t i = 0; i < n && status == STATUS_OK; i++) {
		verify_pick_rows(subject->config, seq_len, n_rows, seed + (uint64_t)i, s.marked,
		                 s.rows);
		status = verify_rows(subject, sequences[i], &s, worst);
	}
	free(sequences);
	sequence_release(&s);
	return status;
}

/* ---- all of it ---- */

static enum status verify_subject(const struct subject *subject, int64_t min_rows, uint64_t seed,
                                  double *worst)
{
	switch (subject->stack->shape.pass) {
	case PASS_TRAIN:
		return verify_train(subject, min_rows, seed, worst);
	case PASS_PREFILL:
		return verify_forward(subject, min_rows, seed, worst);
	default:
		return verify_step(subject, worst);
	}
}

/* One layer, its reference on `device`, or on the host. */
static enum status verify_on(const struct reference_device *device, const struct stack *stack,
                             const struct context *ctx, int layer, int64_t min_rows, uint64_t seed,
                             double *worst)
{
	struct subject subject;

	reference_use(device);
	enum status status = subject_open(&subject, stack, layer);
	subject.ctx = ctx;
	if (status == STATUS_OK)
		status = verify_subject(&subject, min_rows, seed, worst);
	subject_close(&subject);
	reference_use(NULL);
	return status;
}

/* A training step of more elements than this is not computed again on the host where there is a
 * device: it would take minutes. */
enum { MOST_ON_HOST = 1 << 22 };

static bool is_large(const struct stack *stack)
{
	const struct layer_shape *shape = &stack->shape;

	return shape->batch * shape->seq_len * stack->d_model > MOST_ON_HOST;
}

/* The reference's other place, where this layer's can run there. */
static const struct reference_device *device_for(const struct stack *stack, int layer)
{
	const struct layer_class *class = stack->layers[layer].class;
	bool can = class->reference_anywhere;

	if (stack->shape.pass == PASS_TRAIN)
		can = class->reference_dproj_rows && is_large(stack);
	else if (stack->shape.pass != PASS_PREFILL)
		can = false;
	return can ? stack->backend->reference : NULL;
}

static enum status verify_one(const struct stack *stack, const struct context *ctx, int layer,
                              int64_t min_rows, uint64_t seed, double *worst)
{
	const struct reference_device *device = device_for(stack, layer);
	bool only_there =
	        stack->shape.pass == PASS_TRAIN && is_large(stack) && stack->backend->reference;

	if (only_there && !device)
		return status_set(STATUS_UNSUPPORTED, "%s: no check of so many tokens' gradients",
		                  stack->layers[layer].class->name);
	enum status status = verify_on(device, stack, ctx, layer, min_rows, seed, worst);
	if (device && !only_there && (status == STATUS_OOM || status == STATUS_UNSUPPORTED))
		status = verify_on(NULL, stack, ctx, layer, min_rows, seed, worst);
	return status;
}

enum status stack_verify(struct stack *stack, const struct context *ctx, int64_t min_rows,
                         uint64_t seed, double *rel_err)
{
	enum status status = STATUS_OK;

	*rel_err = 0;
	for (int i = 0; i < stack->n_layers && status == STATUS_OK; i++)
		if (verify_layer(stack, i))
			status = verify_one(stack, ctx, i, min_rows, seed, rel_err);
	return status;
}
