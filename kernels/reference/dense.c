/* fp64 projections, norms, rotary embedding, gates, GELU, embedding and loss. */
#include "kernels/reference/reference.h"

#include <cblas.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

void reference_get_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count,
                           const double *from, double *to)
{
	if (reference_in_use()) {
		reference_in_use()->get_columns(n_rows, width, first, count, from, to);
		return;
	}
	for (int64_t n = 0; n < n_rows; n++)
		memcpy(to + n * count, from + n * width + first, sizeof *to * (size_t)count);
}

void reference_set_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count,
                           const double *from, double *to)
{
	for (int64_t n = 0; n < n_rows; n++)
		memcpy(to + n * width + first, from + n * count, sizeof *to * (size_t)count);
}

double reference_sigmoid(double x)
{
	return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

/* How many of `count` rows fall to slice `i` of `n`, and the first of them. */
static int64_t slice(int64_t count, int64_t i, int64_t n, int64_t *first)
{
	*first = count * i / n;
	return count * (i + 1) / n - *first;
}

void reference_linear(int64_t n, int64_t d_in, int64_t d_out, const double *x, const double *weight,
                      double *y)
{
	if (reference_in_use()) {
		reference_in_use()->linear(n, d_in, d_out, x, weight, y);
		return;
	}
	int slices = omp_get_max_threads();

#pragma omp parallel for
	for (int i = 0; i < slices; i++) {
		int64_t first, rows = slice(n, i, slices, &first);

		cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)d_out,
		            (int)d_in, 1, x + first * d_in, (int)d_in, weight, (int)d_in, 0,
		            y + first * d_out, (int)d_out);
	}
}

void reference_linear_backward(int64_t n, int64_t d_in, int64_t d_out, const double *x,
                               const double *weight, const double *dy, double *dx, double *dweight)
{
	int slices = omp_get_max_threads();

#pragma omp parallel for
	for (int i = 0; i < slices; i++) {
		int64_t first, rows = slice(n, i, slices, &first);

		if (dx)
			cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)rows, (int)d_in,
			            (int)d_out, 1, dy + first * d_out, (int)d_out, weight,
			            (int)d_in, 0, dx + first * d_in, (int)d_in);
		rows = slice(d_out, i, slices, &first);
		if (dweight)
			cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)rows, (int)d_in,
			            (int)n, 1, dy + first, (int)d_out, x, (int)d_in, 0,
			            dweight + first * d_in, (int)d_in);
	}
}

/* 1 / sqrt(mean(x^2) + eps). */
static double inverse_rms(int64_t d, double eps, const double *x)
{
	double sum = 0;

	for (int64_t i = 0; i < d; i++)
		sum += x[i] * x[i];
	return 1 / sqrt(sum / (double)d + eps);
}

void reference_rms_norm(int64_t n, int64_t d, double eps, const double *x, const double *weight,
                        double *y, double *rstd)
{
	if (reference_in_use()) {
		reference_in_use()->rms_norm(n, d, eps, x, weight, y);
		return;
	}
#pragma omp parallel for
	for (int64_t row = 0; row < n; row++) {
		double r = inverse_rms(d, eps, x + row * d);

		for (int64_t i = 0; i < d; i++)
			y[row * d + i] = x[row * d + i] * r * weight[i];
		if (rstd)
			rstd[row] = r;
	}
}

/* dx of one row: with u = x r, dx = r (w dy - u mean(u w dy)). */
static void rms_norm_row_backward(int64_t d, double eps, const double *x, const double *weight,
                                  const double *dy, double *dx)
{
	double r = inverse_rms(d, eps, x), mean = 0;

	for (int64_t i = 0; i < d; i++)
		mean += x[i] * r * weight[i] * dy[i] / (double)d;
	for (int64_t i = 0; i < d; i++)
		dx[i] = r * (weight[i] * dy[i] - x[i] * r * mean);
}

void reference_rms_norm_backward(int64_t n, int64_t d, double eps, const double *x,
                                 const double *weight, const double *dy, double *dx,
                                 double *dweight)
{
	if (dweight)
		memset(dweight, 0, sizeof *dweight * (size_t)d);
	for (int64_t row = 0; row < n; row++) {
		double r = inverse_rms(d, eps, x + row * d);

		if (dx)
			rms_norm_row_backward(d, eps, x + row * d, weight, dy + row * d,
			                      dx + row * d);
		for (int64_t i = 0; dweight && i < d; i++)
			dweight[i] += dy[row * d + i] * x[row * d + i] * r;
	}
}

/* Rotates every pair (x_i, x_{i+d/2}) by sign * position * 10000^(-2i/d). */
static void rotate_all(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d, int64_t first,
                       int64_t period, double sign, const double *x, double *y)
{
	int64_t half = d / 2;

#pragma omp parallel for collapse(2)
	for (int64_t t = 0; t < seq_len; t++)
		for (int64_t i = 0; i < half; i++) {
			double position = (double)((first + t) / period);
			double angle = position * pow(10000, -2 * (double)i / (double)d);
			double c = cos(angle), s = sign * sin(angle);

			for (int64_t b = 0; b < batch; b++)
				for (int64_t h = 0; h < n_heads; h++) {
					int64_t at = ((b * seq_len + t) * n_heads + h) * d + i;
					double x1 = x[at], x2 = x[at + half];

					y[at] = x1 * c - x2 * s;
					y[at + half] = x2 * c + x1 * s;
				}
		}
}

void reference_rotate(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
                      int64_t first, int64_t period, const double *x, double *y)
{
	if (reference_in_use()) {
		reference_in_use()->rotate(batch, seq_len, n_heads, d_head, first, period, x, y);
		return;
	}
	rotate_all(batch, seq_len, n_heads, d_head, first, period, 1, x, y);
}

void reference_rotate_backward(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
                               int64_t first, int64_t period, const double *dy, double *dx)
{
	rotate_all(batch, seq_len, n_heads, d_head, first, period, -1, dy, dx);
}

/* log(sigmoid(x)) without cancellation. */
static double log_sigmoid(double x)
{
	return x >= 0 ? -log1p(exp(-x)) : x - log1p(exp(x));
}

void reference_decay_gate(int64_t n, int64_t rank, int64_t d_out, double normalizer,
                          const double *x, const double *weight, const double *bias,
                          double *log_decay)
{
	if (reference_in_use()) {
		reference_in_use()->decay_gate(n, rank, d_out, normalizer, x, weight, bias,
		                               log_decay);
		return;
	}
	reference_linear(n, rank, d_out, x, weight, log_decay);
#pragma omp parallel for
	for (int64_t i = 0; i < n * d_out; i++)
		log_decay[i] = log_sigmoid(log_decay[i] + bias[i % d_out]) / normalizer;
}

enum status reference_decay_gate_backward(int64_t n, int64_t rank, int64_t d_out, double normalizer,
                                          const double *x, const double *weight, const double *bias,
                                          const double *dlog_decay, double *dx, double *dweight,
                                          double *dbias)
{
	double *dlogit = malloc((size_t)(n * d_out) * sizeof *dlogit);

	if (!dlogit)
		return status_set(STATUS_OOM, "reference: no memory for %lld doubles",
		                  (long long)(n * d_out));
	reference_linear(n, rank, d_out, x, weight, dlogit);
	memset(dbias, 0, sizeof *dbias * (size_t)d_out);
	for (int64_t i = 0; i < n * d_out; i++) {
		double logit = dlogit[i] + bias[i % d_out];

		dlogit[i] = dlog_decay[i] * reference_sigmoid(-logit) / normalizer;
		dbias[i % d_out] += dlogit[i];
	}
	reference_linear_backward(n, rank, d_out, x, weight, dlogit, dx, dweight);
	free(dlogit);
	return STATUS_OK;
}

void reference_norm_gate(int64_t n, int64_t n_heads, int64_t d_head, double eps, const double *x,
                         const double *weight, const double *gate, double *out, double *rstd)
{
	if (reference_in_use()) {
		reference_in_use()->norm_gate(n, n_heads, d_head, eps, x, weight, gate, out);
		return;
	}
	reference_rms_norm(n * n_heads, d_head, eps, x, weight, out, rstd);
	for (int64_t i = 0; i < n * n_heads * d_head; i++)
		out[i] *= gate[i] * reference_sigmoid(gate[i]);
}

enum status reference_norm_gate_backward(int64_t n, int64_t n_heads, int64_t d_head, double eps,
                                         const double *x, const double *weight, const double *gate,
                                         const double *dout, double *dx, double *dgate,
                                         double *dweight)
{
	int64_t count = n * n_heads * d_head;
	double *dnorm = malloc((size_t)count * sizeof *dnorm);

	if (!dnorm)
		return status_set(STATUS_OOM, "reference: no memory for %lld doubles",
		                  (long long)count);
	reference_rms_norm(n * n_heads, d_head, eps, x, weight, dnorm, NULL);
	for (int64_t i = 0; i < count; i++) {
		double s = reference_sigmoid(gate[i]);

		dgate[i] = dout[i] * dnorm[i] * s * (1 + gate[i] * (1 - s));
		dnorm[i] = dout[i] * gate[i] * s;
	}
	reference_rms_norm_backward(n * n_heads, d_head, eps, x, weight, dnorm, dx, dweight);
	free(dnorm);
	return STATUS_OK;
}

void reference_gelu(int64_t count, const double *x, double *y)
{
#pragma omp parallel for
	for (int64_t i = 0; i < count; i++)
		y[i] = x[i] * (1 + erf(x[i] / sqrt(2))) / 2;
}

void reference_gelu_backward(int64_t count, const double *x, const double *dy, double *dx)
{
	const double inverse_sqrt_2_pi = 0.39894228040143267794;

#pragma omp parallel for
	for (int64_t i = 0; i < count; i++)
		dx[i] = dy[i] * ((1 + erf(x[i] / sqrt(2))) / 2 +
		                 x[i] * exp(-x[i] * x[i] / 2) * inverse_sqrt_2_pi);
}

void reference_embedding(int64_t n, int64_t d, const int32_t *tokens, const double *table,
                         double *y)
{
	for (int64_t i = 0; i < n; i++)
		memcpy(y + i * d, table + tokens[i] * d, sizeof *y * (size_t)d);
}

void reference_embedding_backward(int64_t n, int64_t vocab, int64_t d, const int32_t *tokens,
                                  const double *dy, double *dtable)
{
	memset(dtable, 0, sizeof *dtable * (size_t)(vocab * d));
	for (int64_t i = 0; i < n; i++)
		for (int64_t j = 0; j < d; j++)
			dtable[tokens[i] * d + j] += dy[i * d + j];
}

/* log of the sum of e^logit over one row; the largest of them is the 1 of log1p. */
static double log_sum_exp(int64_t count, const double *logits)
{
	int64_t largest = 0;
	double others = 0;

	for (int64_t i = 1; i < count; i++)
		largest = logits[i] > logits[largest] ? i : largest;
	for (int64_t i = 0; i < count; i++)
		if (i != largest)
			others += exp(logits[i] - logits[largest]);
	return logits[largest] + log1p(others);
}

double reference_cross_entropy(int64_t n, int64_t vocab, const double *logits,
                               const int32_t *targets, double *dlogits)
{
	double loss = 0;
	int64_t counted = 0;

	for (int64_t i = 0; i < n; i++)
		counted += targets[i] >= 0;
	if (dlogits)
		memset(dlogits, 0, sizeof *dlogits * (size_t)(n * vocab));
	for (int64_t i = 0; i < n; i++) {
		const double *row = logits + i * vocab;

		if (targets[i] < 0)
			continue;
		double lse = log_sum_exp(vocab, row);
		loss += (lse - row[targets[i]]) / (double)counted;
		for (int64_t j = 0; dlogits && j < vocab; j++)
			dlogits[i * vocab + j] =
			        (exp(row[j] - lse) - (j == targets[i])) / (double)counted;
	}
	return loss;
}
