/* fp64 projections: with a norm before them, with a residual, and GLA's gate. */
#include "kernels/reference/shared.h"

#include <cblas.h>
#include <omp.h>

/*
 * out [rows, columns] = beta out + a b, of matrices or transposed ones; leading dimensions are
 * those of the stored matrices. Every thread has its own rows, and BLAS no threads beside them.
 */
static void product(int64_t rows, int64_t columns, int64_t inner, const double *a,
                    int64_t a_leading, bool a_transposed, const double *b, int64_t b_leading,
                    bool b_transposed, double beta, double *out, int64_t out_leading)
{
	const int64_t slices = omp_get_max_threads();

	openblas_set_num_threads(1);
#pragma omp parallel for
	for (int64_t i = 0; i < slices; i++) {
		const int64_t first = rows * i / slices;

		cblas_dgemm(CblasRowMajor, a_transposed ? CblasTrans : CblasNoTrans,
		            b_transposed ? CblasTrans : CblasNoTrans,
		            (int)(rows * (i + 1) / slices - first), (int)columns, (int)inner, 1,
		            a + first * (a_transposed ? 1 : a_leading), (int)a_leading, b,
		            (int)b_leading, beta, out + first * out_leading, (int)out_leading);
	}
}

/* y [n, d_out] = beta y + x W^T; rows of x lie x_stride apart. */
static void linear(int64_t n, int64_t d_in, int64_t d_out, const double *x, int64_t x_stride,
                   const double *weight, double beta, double *y)
{
	product(n, d_out, d_in, x, x_stride, false, weight, d_in, true, beta, y, d_out);
}

/* dx = dy W, dweight [d_out, d_in] = dy^T x; rows of x and dx lie x_stride apart. */
static void linear_backward(int64_t n, int64_t d_in, int64_t d_out, const double *x,
                            int64_t x_stride, const double *weight, const double *dy, double *dx,
                            double *dweight)
{
	product(d_out, d_in, n, dy, d_out, true, x, x_stride, false, 0, dweight, d_in);
	product(n, d_in, d_out, dy, d_out, false, weight, d_in, false, 0, dx, x_stride);
}

/* y [n, width] += bias, unless that is NULL. */
static void add_bias(int64_t n, int64_t width, const float *bias, double *y)
{
#pragma omp parallel for
	for (int64_t row = 0; row < (bias ? n : 0); row++)
		add_scaled(width, 1, wide(bias), y + row * width);
}

/* sums = the sum of n rows. */
static void sum_rows(int64_t n, int64_t width, const double *rows, float *sums)
{
	double *to = wide_out(sums);

	zero(width, to);
#pragma omp parallel for reduction(+ : to[:width])
	for (int64_t row = 0; row < n; row++)
		add_scaled(width, 1, rows + row * width, to);
}

enum status reference_norm_linear(struct device *device, const void *args, void *workspace)
{
	const struct norm_linear_args *a = args;
	const double *norm_weight = wide(a->norm_weight);
	double *rstd = wide_out(a->rstd);
	int64_t d = a->d_in;

#pragma omp parallel for
	for (int64_t n = 0; n < (norm_weight ? a->n_tokens : 0); n++) {
		const double *x = (const double *)a->x + n * d;
		double *x_norm = (double *)a->x_norm + n * d, r = inverse_rms(d, a->eps, x);

		for (int64_t i = 0; i < d; i++)
			x_norm[i] = x[i] * r * norm_weight[i];
		if (rstd)
			rstd[n] = r;
	}
	linear(a->n_tokens, d, a->d_out, a->x_norm, d, a->weight, 0, a->y);
	add_bias(a->n_tokens, a->d_out, a->bias, a->y);
	return STATUS_OK;
}

enum status reference_norm_linear_backward(struct device *device, const void *args, void *workspace)
{
	const struct norm_linear_backward_args *a = args;
	const struct norm_linear_args *f = &a->forward;
	const double *x = f->x, *dresidual = a->dresidual;
	double *g = a->dx_norm, *dx = a->dx;
	int64_t d = f->d_in;

	linear_backward(f->n_tokens, d, f->d_out, f->x_norm, d, f->weight, a->dy, g,
	                wide_out(a->dweight));
	if (f->bias)
		sum_rows(f->n_tokens, f->d_out, a->dy, a->dbias);
	if (f->norm_weight) {
		double *dweight = wide_out(a->dnorm_weight);

		zero(d, dweight);
#pragma omp parallel for reduction(+ : dweight[:d])
		for (int64_t n = 0; n < f->n_tokens; n++)
			norm_row_backward(d, wide(f->rstd)[n], x + n * d, wide(f->norm_weight),
			                  g + n * d, g + n * d, dweight);
	}
#pragma omp parallel for
	for (int64_t i = 0; i < f->n_tokens * d; i++)
		dx[i] = g[i] + (dresidual ? dresidual[i] : 0);
	return STATUS_OK;
}

enum status reference_linear_residual(struct device *device, const void *args, void *workspace)
{
	const struct linear_residual_args *a = args;

	if (a->residual)
		memmove(a->y, a->residual, sizeof(double) * (size_t)(a->n_tokens * a->d_out));
	linear(a->n_tokens, a->d_in, a->d_out, a->x, a->d_in, a->weight, a->residual ? 1 : 0, a->y);
	add_bias(a->n_tokens, a->d_out, a->bias, a->y);
	return STATUS_OK;
}

enum status reference_linear_residual_backward(struct device *device, const void *args,
                                               void *workspace)
{
	const struct linear_residual_backward_args *a = args;

	linear_backward(a->n_tokens, a->d_in, a->d_out, a->x, a->d_in, a->weight, a->dy, a->dx,
	                wide_out(a->dweight));
	if (a->dbias)
		sum_rows(a->n_tokens, a->d_out, a->dy, a->dbias);
	return STATUS_OK;
}

/* log(sigmoid(x)) without cancellation. */
static double log_sigmoid(double x)
{
	return x >= 0 ? -log1p(exp(-x)) : x - log1p(exp(x));
}

/* What column i makes of its logit, and the slope there. */
static double low_rank_value(const struct decay_gate_args *a, int64_t i, double logit)
{
	if (a->form == LOW_RANK_DECAY)
		return log_sigmoid(logit) / a->normalizer;
	if (a->form == LOW_RANK_RATE)
		return -exp(wide(a->log_rate)[i / (a->d_out / a->n_heads)]) * softplus(logit);
	if (a->form == LOW_RANK_EXP)
		return -exp(logit);
	return a->form == LOW_RANK_STEP ? softplus(logit) : logit;
}

static double low_rank_slope(const struct decay_gate_args *a, int64_t i, double logit)
{
	if (a->form == LOW_RANK_DECAY)
		return sigmoid(-logit) / a->normalizer;
	if (a->form == LOW_RANK_EXP)
		return -exp(logit);
	if (a->form == LOW_RANK_STEP)
		return sigmoid(logit);
	return -exp(wide(a->log_rate)[i / (a->d_out / a->n_heads)]) * sigmoid(logit);
}

/* What is multiplied: x, or tanh(x) in new memory that the caller frees; x_stride apart. NULL:
 * there is none. */
static double *low_rank_input(const struct decay_gate_args *a)
{
	const double *x = a->x;
	double *input;

	if (!has_tanh(a->form))
		return (double *)a->x;
	input = take_doubles(a->n_tokens * a->x_stride);
	for (int64_t i = 0; input && i < a->n_tokens * a->rank; i++) {
		int64_t at = i / a->rank * a->x_stride + i % a->rank;

		input[at] = tanh(x[at]);
	}
	return input;
}

enum status reference_decay_gate(struct device *device, const void *args, void *workspace)
{
	const struct decay_gate_args *a = args;
	const double *bias = wide(a->bias);
	double *out = a->out, *input = low_rank_input(a);

	if (!input)
		return STATUS_OOM;
	linear(a->n_tokens, a->rank, a->d_out, input, a->x_stride, a->weight, 0, out);
#pragma omp parallel for
	for (int64_t i = 0; i < a->n_tokens * a->d_out; i++)
		out[i] = low_rank_value(a, i % a->d_out, out[i] + bias[i % a->d_out]);
	if (input != a->x)
		free(input);
	return STATUS_OK;
}

/* dlogit and dlog_rate. */
static void low_rank_backward(const struct decay_gate_backward_args *a, const double *input)
{
	const struct decay_gate_args *f = &a->forward;
	const bool rate = f->form == LOW_RANK_RATE;
	const double *dout = a->dout, *bias = wide(f->bias);
	double *dlogit = a->dlogit, none = 0, *dlog_rate = rate ? wide_out(a->dlog_rate) : &none;
	int64_t d_out = f->d_out, n_rates = rate ? f->n_heads : 1;

	linear(f->n_tokens, f->rank, d_out, input, f->x_stride, f->weight, 0, dlogit);
	zero(n_rates, dlog_rate);
#pragma omp parallel for reduction(+ : dlog_rate[:n_rates])
	for (int64_t i = 0; i < f->n_tokens * d_out; i++) {
		int64_t column = i % d_out;
		double logit = dlogit[i] + bias[column];

		/* The value is its own derivative with respect to log_rate. */
		if (rate)
			dlog_rate[column / (d_out / n_rates)] +=
			        dout[i] * low_rank_value(f, column, logit);
		dlogit[i] = dout[i] * low_rank_slope(f, column, logit);
	}
}

enum status reference_decay_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct decay_gate_backward_args *a = args;
	const struct decay_gate_args *f = &a->forward;
	const double *dlogit = is_logit(f->form) ? a->dout : a->dlogit;
	double *dbias = wide_out(a->dbias), *dx = a->dx, *input = low_rank_input(f);
	int64_t n = f->n_tokens, d_out = f->d_out;

	if (!input)
		return STATUS_OOM;
	if (!is_logit(f->form))
		low_rank_backward(a, input);
	zero(d_out, dbias);
#pragma omp parallel for reduction(+ : dbias[:d_out])
	for (int64_t i = 0; i < n * d_out; i++)
		dbias[i % d_out] += dlogit[i];
	linear_backward(n, f->rank, d_out, input, f->x_stride, f->weight, dlogit, dx,
	                wide_out(a->dweight));
	for (int64_t i = 0; has_tanh(f->form) && i < n * f->rank; i++) {
		int64_t at = i / f->rank * f->x_stride + i % f->rank;

		dx[at] *= 1 - input[at] * input[at];
	}
	if (input != f->x)
		free(input);
	return STATUS_OK;
}

enum status reference_block_linear(struct device *device, const void *args, void *workspace)
{
	const struct block_linear_args *a = args;
	int64_t blocks = a->n_blocks, in = a->d_in, out = a->d_out;

	for (int64_t g = 0; g < a->n_products * blocks; g++)
		product(a->n_tokens, out, in, (const double *)a->x + g % blocks * in, blocks * in,
		        false, (const double *)a->weight + g * in * out, out, false, 0,
		        (double *)a->y + g * out, a->n_products * blocks * out);
	return STATUS_OK;
}

enum status reference_block_linear_backward(struct device *device, const void *args,
                                            void *workspace)
{
	const struct block_linear_backward_args *a = args;
	const struct block_linear_args *f = &a->forward;
	int64_t blocks = f->n_blocks, in = f->d_in, out = f->d_out, n = f->n_tokens;
	int64_t row = f->n_products * blocks * out;

	if (a->dskip)
		memmove(a->dx, a->dskip, sizeof(double) * (size_t)(n * blocks * in));
	for (int64_t g = 0; g < f->n_products * blocks; g++) {
		const double *dy = (const double *)a->dy + g * out;

		product(in, out, n, (const double *)f->x + g % blocks * in, blocks * in, true, dy,
		        row, false, 0, wide_out(a->dweight) + g * in * out, out);
		product(n, in, out, dy, row, false, (const double *)f->weight + g * in * out, out,
		        true, a->dskip || g >= blocks ? 1 : 0, (double *)a->dx + g % blocks * in,
		        blocks * in);
	}
	return STATUS_OK;
}
