/* fp64 short convolution, time step, forget gate, and the norm behind a gate. */
#include <math.h>
#include <string.h>

#include "kernels/reference/reference.h"

static double silu(double x)
{
	return x * reference_sigmoid(x);
}

static double silu_derivative(double x)
{
	double s = reference_sigmoid(x);

	return s * (1 + x * (1 - s));
}

/* Whether there is a token t: also before the sequence where its history is known. */
static bool has_token(const struct reference_conv *c, int64_t t)
{
	return t >= 0 || c->history != NULL;
}

/* x of channel i at token t; 0 where there is none. */
static double conv_input(const struct reference_conv *c, int64_t b, int64_t t, int64_t i)
{
	if (t < 0)
		return has_token(c, t)
		               ? c->history[(b * CONV_HISTORY + CONV_HISTORY + t) * c->channels + i]
		               : 0;
	return c->x[(b * c->seq_len + t) * c->channels + i];
}

static double conv_sum(const struct reference_conv *c, int64_t b, int64_t t, int64_t i)
{
	double sum = c->bias[i];

	for (int64_t j = 0; j < CONV_WIDTH; j++) {
		int64_t from = t - CONV_HISTORY + j;

		if (has_token(c, from))
			sum += c->weight[i * CONV_WIDTH + j] * conv_input(c, b, from, i);
	}
	return sum;
}

void reference_short_conv(const struct reference_conv *c, double *out, double *history)
{
	int64_t row = c->n_readers * c->channels;

	if (reference_in_use()) {
		reference_in_use()->short_conv(c, out);
		return;
	}
#pragma omp parallel for
	for (int64_t n = 0; n < c->batch * c->seq_len; n++)
		for (int64_t i = 0; i < row; i++)
			out[n * row + i] =
			        silu(conv_sum(c, n / c->seq_len, n % c->seq_len, i % c->channels));
	for (int64_t b = 0; history && b < c->batch; b++)
		for (int64_t j = 0; j < CONV_HISTORY; j++)
			for (int64_t i = 0; i < c->channels; i++)
				history[(b * CONV_HISTORY + j) * c->channels + i] =
				        conv_input(c, b, c->seq_len - CONV_HISTORY + j, i);
}

/* The gradient of channel i of token n before the activation. */
static double conv_sum_gradient(const struct reference_conv *c, int64_t n, int64_t i,
                                const double *dout)
{
	double sum = 0;

	for (int64_t r = 0; r < c->n_readers; r++)
		sum += dout[(n * c->n_readers + r) * c->channels + i];
	return sum * silu_derivative(conv_sum(c, n / c->seq_len, n % c->seq_len, i));
}

void reference_short_conv_backward(const struct reference_conv *c, const double *dout, double *dx,
                                   double *dweight, double *dbias)
{
	memset(dx, 0, sizeof *dx * (size_t)(c->batch * c->seq_len * c->channels));
	memset(dweight, 0, sizeof *dweight * (size_t)(c->channels * CONV_WIDTH));
	memset(dbias, 0, sizeof *dbias * (size_t)c->channels);
#pragma omp parallel for
	for (int64_t i = 0; i < c->channels; i++)
		for (int64_t n = 0; n < c->batch * c->seq_len; n++) {
			int64_t b = n / c->seq_len, t = n % c->seq_len;
			double dsum = conv_sum_gradient(c, n, i, dout);

			dbias[i] += dsum;
			for (int64_t j = 0; j < CONV_WIDTH; j++) {
				int64_t back = CONV_HISTORY - j;

				if (t < back)
					continue;
				dweight[i * CONV_WIDTH + j] += dsum * conv_input(c, b, t - back, i);
				dx[(n - back) * c->channels + i] +=
				        dsum * c->weight[i * CONV_WIDTH + j];
			}
		}
}

static double softplus(double x)
{
	return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

void reference_time_step(int64_t n, int64_t n_heads, int64_t d_head, const double *logit,
                         const double *bias, const double *log_rate, const double *x,
                         double *log_decay, double *out)
{
	if (reference_in_use()) {
		reference_in_use()->time_step(n, n_heads, d_head, logit, bias, log_rate, x,
		                              log_decay, out);
		return;
	}
#pragma omp parallel for
	for (int64_t row = 0; row < n * n_heads; row++) {
		double dt = softplus(logit[row] + bias[row % n_heads]);

		log_decay[row] = -exp(log_rate[row % n_heads]) * dt;
		for (int64_t i = row * d_head; i < (row + 1) * d_head; i++)
			out[i] = dt * x[i];
	}
}

void reference_time_step_backward(int64_t n, int64_t n_heads, int64_t d_head, const double *logit,
                                  const double *bias, const double *log_rate, const double *x,
                                  const double *dlog_decay, const double *dout, double *dlogit,
                                  double *dbias, double *dlog_rate, double *dx)
{
	memset(dbias, 0, sizeof *dbias * (size_t)n_heads);
	memset(dlog_rate, 0, sizeof *dlog_rate * (size_t)n_heads);
	for (int64_t row = 0; row < n * n_heads; row++) {
		int64_t h = row % n_heads;
		double shifted = logit[row] + bias[h], rate = exp(log_rate[h]);
		double dt = softplus(shifted), ddt = -rate * dlog_decay[row];

		for (int64_t i = row * d_head; i < (row + 1) * d_head; i++) {
			ddt += dout[i] * x[i];
			dx[i] = dt * dout[i];
		}
		dlogit[row] = ddt * reference_sigmoid(shifted);
		dbias[h] += dlogit[row];
		dlog_rate[h] -= dlog_decay[row] * rate * dt;
	}
}

void reference_forget_gate(int64_t n, int64_t width, const double *logit, const double *bound,
                           const double *x, double *log_decay, double *key, double *out)
{
	if (reference_in_use()) {
		reference_in_use()->forget_gate(n, width, logit, bound, x, log_decay, key, out);
		return;
	}
#pragma omp parallel for
	for (int64_t i = 0; i < n * width; i++) {
		double input = reference_sigmoid(-bound[i % width]) * reference_sigmoid(-logit[i]);

		log_decay[i] = log1p(-input);
		if (key)
			key[i] = input;
		out[i] = silu(x[i]) * (key ? 1 : input);
	}
}

void reference_forget_gate_backward(int64_t n, int64_t width, const double *logit,
                                    const double *bound, const double *x, const double *dlog_decay,
                                    const double *dkey, const double *dout, double *dlogit,
                                    double *dbound, double *dx)
{
	memset(dbound, 0, sizeof *dbound * (size_t)width);
	for (int64_t i = 0; i < n * width; i++) {
		double rest = reference_sigmoid(-bound[i % width]);
		double closed = reference_sigmoid(-logit[i]), input = rest * closed;
		double dinput =
		        -dlog_decay[i] / (1 - input) + (dkey ? dkey[i] : dout[i] * silu(x[i]));

		dlogit[i] = -dinput * input * (1 - closed);
		dbound[i % width] -= dinput * input * (1 - rest);
		dx[i] = dout[i] * (dkey ? 1 : input) * silu_derivative(x[i]);
	}
}

/* Element i of x + skip_weight * skip, before the gate. */
static double skipped(const struct reference_gate_norm *g, int64_t i)
{
	return g->x[i] + (g->skip ? g->skip_weight[i / g->d_head % g->n_heads] * g->skip[i] : 0);
}

/* Before the norm. */
static void gated(const struct reference_gate_norm *g, double *u)
{
	if (reference_in_use()) {
		reference_in_use()->gated(g, u);
		return;
	}
#pragma omp parallel for
	for (int64_t i = 0; i < g->n * g->n_heads * g->d_head; i++)
		u[i] = skipped(g, i) * (g->gate ? silu(g->gate[i]) : 1);
}

enum status reference_gate_norm(const struct reference_gate_norm *g, double *out, double *rstd)
{
	int64_t width = g->n_heads * g->d_head;
	double *u;
	enum status status = reference_take(g->n * width, &u);

	if (status != STATUS_OK)
		return status;
	gated(g, u);
	reference_rms_norm(g->n * g->groups, width / g->groups, g->eps, u, g->weight, out, rstd);
	reference_release(u);
	return STATUS_OK;
}

enum status reference_gate_norm_backward(const struct reference_gate_norm *g, const double *dout,
                                         const struct reference_gate_norm_grads *grads)
{
	int64_t width = g->n_heads * g->d_head, count = g->n * width;
	double *u, *du;
	enum status status = reference_take(2 * count, &u);

	if (status != STATUS_OK)
		return status;
	du = u + count;
	gated(g, u);
	reference_rms_norm_backward(g->n * g->groups, width / g->groups, g->eps, u, g->weight, dout,
	                            du, grads->dweight);
	if (g->skip)
		memset(grads->dskip_weight, 0, sizeof *du * (size_t)g->n_heads);
	for (int64_t i = 0; i < count; i++) {
		int64_t h = i / g->d_head % g->n_heads;

		grads->dx[i] = du[i] * (g->gate ? silu(g->gate[i]) : 1);
		if (g->gate)
			grads->dgate[i] = du[i] * skipped(g, i) * silu_derivative(g->gate[i]);
		if (g->skip) {
			grads->dskip[i] = grads->dx[i] * g->skip_weight[h];
			grads->dskip_weight[h] += grads->dx[i] * g->skip[i];
		}
	}
	reference_release(u);
	return STATUS_OK;
}
