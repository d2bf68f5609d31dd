/* Gates of low rank: a decay of x W^T + bias, or these logits themselves, of x or of tanh(x); and
 * their gradients. */
#include <cblas.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* Tokens are taken in blocks whose logits stay in cache between the product and the gate. */
enum { BLOCK_TOKENS = 64 };

static int64_t count_blocks(const struct decay_gate_args *a)
{
	return (a->n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

static int64_t block_size(const struct decay_gate_args *a, int64_t first)
{
	return a->n_tokens - first < BLOCK_TOKENS ? a->n_tokens - first : BLOCK_TOKENS;
}

/* Rows of a block that are multiplied. */
struct rows {
	const float *data;
	int stride;
};

/* Floats of a block of tanh(x), in whole cache lines; 0: x is multiplied as it is. */
static int64_t tanh_floats(const struct decay_gate_args *a)
{
	return has_tanh(a->form) ? (BLOCK_TOKENS * a->rank + 15) / 16 * 16 : 0;
}

/* x of n tokens from `first` on, or tanh(x) in `space`. */
static struct rows input_of(const struct decay_gate_args *a, int64_t first, int64_t n, float *space)
{
	const float *x = (const float *)a->x + first * a->x_stride;

	if (!has_tanh(a->form))
		return (struct rows){x, (int)a->x_stride};
	for (int64_t t = 0; t < n; t++)
#pragma omp simd
		for (int64_t i = 0; i < a->rank; i++)
			space[t * a->rank + i] = tanh_f32(x[t * a->x_stride + i]);
	return (struct rows){space, (int)a->rank};
}

/* to [n, d_out] = x W^T for n rows, without the bias. */
static void project(const struct decay_gate_args *a, struct rows x, int64_t n, float *to)
{
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)n, (int)a->d_out, (int)a->rank, 1,
	            x.data, x.stride, a->weight, (int)a->rank, 0, to, (int)a->d_out);
}

/* Columns of each rate, of which there are n_heads or none. */
static int64_t rate_width(const struct decay_gate_args *a)
{
	return a->form == LOW_RANK_RATE ? a->d_out / a->n_heads : a->d_out;
}

/* Of n logits x without their bias, in their place: factor logsigmoid(logit), */
static void log_sigmoids(int64_t n, const float *bias, float factor, float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] = log_sigmoid_f32(x[i] + bias[i]) * factor;
}

/* factor logsigmoid(-logit), which is -factor softplus(logit), */
static void softpluses(int64_t n, const float *bias, float factor, float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] = factor * log_sigmoid_f32(-x[i] - bias[i]);
}

/* -exp(logit), */
static void negative_powers(int64_t n, const float *bias, float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] = -exp_f32(x[i] + bias[i]);
}

/* the logit. */
static void add_bias(int64_t n, const float *bias, float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] += bias[i];
}

/* What a row of logits without their bias makes, in its place. */
static void finish_row(const struct decay_gate_args *a, float *row)
{
	const int64_t d = rate_width(a);

	if (a->form == LOW_RANK_DECAY)
		log_sigmoids(a->d_out, a->bias, 1.0f / a->normalizer, row);
	else if (a->form == LOW_RANK_EXP)
		negative_powers(a->d_out, a->bias, row);
	else if (is_logit(a->form))
		add_bias(a->d_out, a->bias, row);
	else if (a->form == LOW_RANK_STEP)
		softpluses(a->d_out, a->bias, -1.0f, row);
	else
		for (int64_t h = 0; h < a->n_heads; h++)
			softpluses(d, a->bias + h * d, expf(a->log_rate[h]), row + h * d);
}

size_t cpu_decay_gate_workspace(const struct device *device, const void *args)
{
	return sizeof(float) * (size_t)(tanh_floats(args) * omp_get_max_threads());
}

enum status cpu_decay_gate(struct device *device, const void *args, void *workspace)
{
	const struct decay_gate_args *a = args;

#pragma omp parallel for schedule(static)
	for (int64_t block = 0; block < count_blocks(a); block++) {
		int64_t first = block * BLOCK_TOKENS, n = block_size(a, first);
		int64_t space = tanh_floats(a) * omp_get_thread_num();
		float *out = (float *)a->out + first * a->d_out;

		project(a, input_of(a, first, n, (float *)workspace + space), n, out);
		for (int64_t t = 0; t < n; t++)
			finish_row(a, out + t * a->d_out);
	}
	return STATUS_OK;
}

/* Each thread's share of dbias and of dlog_rate, channel by channel [d_out], and of dweight
 * [d_out, rank]; and its block of tanh(x). */
struct partial {
	double *dbias, *drate;
	float *dweight, *space;
};

static size_t partial_bytes(const struct decay_gate_args *f)
{
	size_t bytes = (size_t)f->d_out * (2 * sizeof(double) + (size_t)f->rank * sizeof(float)) +
	               (size_t)tanh_floats(f) * sizeof(float);

	return (bytes + 63) / 64 * 64;
}

static struct partial partial_of(const struct decay_gate_args *f, void *workspace, int thread)
{
	double *dbias = (double *)((char *)workspace + partial_bytes(f) * (size_t)thread);

	float *dweight = (float *)(dbias + 2 * f->d_out);

	return (struct partial){dbias, dbias + f->d_out, dweight, dweight + f->d_out * f->rank};
}

size_t cpu_decay_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct decay_gate_backward_args *a = args;

	return partial_bytes(&a->forward) * (size_t)omp_get_max_threads();
}

/* Of n logits x without their bias, in their place: dout times the slope of factor
 * logsigmoid(logit), */
static void log_sigmoid_slopes(int64_t n, const float *bias, const float *dout, float factor,
                               float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] = dout[i] * factor * sigmoid_f32(-x[i] - bias[i]);
}

/* of -exp(logit), */
static void negative_power_slopes(int64_t n, const float *bias, const float *dout, float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] = -dout[i] * exp_f32(x[i] + bias[i]);
}

/* of softplus(logit). */
static void softplus_slopes(int64_t n, const float *bias, const float *dout, float *x)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		x[i] = dout[i] * sigmoid_f32(x[i] + bias[i]);
}

/*
 * A row of logits without their bias becomes dlogit: of GLA dlog_decay / normalizer *
 * sigmoid(-logit). The logit is computed again: sigmoid(-logit) = 1 - exp(log_decay * normalizer)
 * would cancel where the gate is open. A decay is its own derivative with respect to log_rate.
 */
static void slope_row(const struct decay_gate_args *f, const float *dout, float *row, double *drate)
{
	const int64_t d = rate_width(f);

	if (f->form == LOW_RANK_DECAY)
		log_sigmoid_slopes(f->d_out, f->bias, dout, 1.0f / f->normalizer, row);
	else if (f->form == LOW_RANK_EXP)
		negative_power_slopes(f->d_out, f->bias, dout, row);
	else if (f->form == LOW_RANK_STEP)
		softplus_slopes(f->d_out, f->bias, dout, row);
	else
		for (int64_t h = 0; h < f->n_heads; h++) {
			float rate = expf(f->log_rate[h]);

#pragma omp simd
			for (int64_t i = h * d; i < (h + 1) * d; i++) {
				float logit = row[i] + f->bias[i], scaled = rate * dout[i];

				drate[i] += scaled * log_sigmoid_f32(-logit);
				row[i] = -scaled * sigmoid_f32(logit);
			}
		}
}

/* Where dlogit is: of logits it is the output's gradient. */
static float *dlogit_of(const struct decay_gate_backward_args *a)
{
	return is_logit(a->forward.form) ? (float *)a->dout : a->dlogit;
}

static void logit_backward(const struct decay_gate_backward_args *a, struct rows x, int64_t first,
                           int64_t n, const struct partial *sum)
{
	const struct decay_gate_args *f = &a->forward;
	float *dlogit = dlogit_of(a) + first * f->d_out;
	const float *dout = (const float *)a->dout + first * f->d_out;

	if (!is_logit(f->form))
		project(f, x, n, dlogit);
	for (int64_t t = 0; t < n; t++, dlogit += f->d_out, dout += f->d_out) {
		if (!is_logit(f->form))
			slope_row(f, dout, dlogit, sum->drate);
#pragma omp simd
		for (int64_t i = 0; i < f->d_out; i++)
			sum->dbias[i] += dlogit[i];
	}
}

static void block_backward(const struct decay_gate_backward_args *a, int64_t first, int64_t n,
                           const struct partial *sum)
{
	const struct decay_gate_args *f = &a->forward;
	const float *dlogit = dlogit_of(a) + first * f->d_out;
	int tokens = (int)n, rank = (int)f->rank, d_out = (int)f->d_out;
	const struct rows x = input_of(f, first, n, sum->space);
	float *dx = (float *)a->dx + first * f->x_stride;

	logit_backward(a, x, first, n, sum);
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, tokens, rank, d_out, 1, dlogit,
	            d_out, f->weight, rank, 0, dx, (int)f->x_stride);
	cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, d_out, rank, tokens, 1, dlogit, d_out,
	            x.data, x.stride, 1, sum->dweight, rank);
	for (int64_t t = 0; has_tanh(f->form) && t < n; t++)
#pragma omp simd
		for (int64_t i = 0; i < f->rank; i++) {
			float y = x.data[t * f->rank + i];

			dx[t * f->x_stride + i] *= (1.0f - y) * (1.0f + y);
		}
}

static void add_partials(const struct decay_gate_backward_args *a, void *workspace, int n_threads)
{
	const struct decay_gate_args *f = &a->forward;

	memset(a->dweight, 0, sizeof *a->dweight * (size_t)(f->d_out * f->rank));
	add_shares(workspace, n_threads, (int64_t)(partial_bytes(f) / sizeof(double)), f->d_out,
	           a->dbias);
	for (int thread = 0; thread < n_threads; thread++) {
		struct partial sum = partial_of(f, workspace, thread);

		for (int64_t i = 0; i < f->d_out * f->rank; i++)
			a->dweight[i] += sum.dweight[i];
	}
	for (int64_t h = 0, d = rate_width(f); f->form == LOW_RANK_RATE && h < f->n_heads; h++) {
		double rate = 0;

		for (int thread = 0; thread < n_threads; thread++)
			for (int64_t i = h * d; i < (h + 1) * d; i++)
				rate += partial_of(f, workspace, thread).drate[i];
		a->dlog_rate[h] = (float)rate;
	}
}

enum status cpu_decay_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct decay_gate_backward_args *a = args;
	int n_threads = omp_get_max_threads();

	memset(workspace, 0, partial_bytes(&a->forward) * (size_t)n_threads);
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t block = 0; block < count_blocks(&a->forward); block++) {
		struct partial sum = partial_of(&a->forward, workspace, omp_get_thread_num());
		int64_t first = block * BLOCK_TOKENS;

		block_backward(a, first, block_size(&a->forward, first), &sum);
	}
	add_partials(a, workspace, n_threads);
	return STATUS_OK;
}
