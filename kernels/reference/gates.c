/* fp64 gates and norms of the linear family: norm_gate, short_conv, time_step, forget_gate,
 * gate_norm; and Hawk's, lru_gate and gelu_gate. */
#include "kernels/reference/shared.h"

#include <omp.h>

static double curve_of(enum curve curve, double x)
{
	return curve == CURVE_SILU ? silu(x) : curve == CURVE_SIGMOID ? sigmoid(x) : x;
}

static double curve_derivative(enum curve curve, double x)
{
	return curve == CURVE_SILU      ? silu_derivative(x)
	       : curve == CURVE_SIGMOID ? sigmoid(x) * sigmoid(-x)
	                                : 1;
}

/* What the norm of a head makes of it, before weights; returns 1 / the root that it divides by. */
static double normalize(const struct norm_gate_args *a, const double *x, double *normed)
{
	int64_t d = a->d_head;
	double mean = 0;

	for (int64_t i = 0; a->norm == NORM_GROUP && i < d; i++)
		mean += x[i] / (double)d;
	for (int64_t i = 0; i < d; i++)
		normed[i] = x[i] - mean;
	double r = inverse_rms(d, a->eps, normed);
	for (int64_t i = 0; i < d; i++)
		normed[i] *= r;
	return r;
}

/* The first of head h's weights or biases. */
static int64_t first_weight(const struct norm_gate_args *a, int64_t h)
{
	return a->norm == NORM_GROUP ? h * a->d_head : 0;
}

static double bias_of(const struct norm_gate_args *a, int64_t column)
{
	return a->norm == NORM_GROUP ? wide(a->bias)[column] : 0;
}

enum status reference_norm_gate(struct device *device, const void *args, void *workspace)
{
	const struct norm_gate_args *a = args;
	int64_t d = a->d_head, heads = a->n_heads;

#pragma omp parallel for
	for (int64_t row = 0; row < a->n_tokens * heads; row++) {
		int64_t h = row % heads;
		const double *x = (const double *)a->x + row * d;
		const double *weight = wide(a->weight) + first_weight(a, h);
		const double *gate = (const double *)a->gate + row / heads * a->gate_stride + h * d;
		double *out = (double *)a->out + row * d, r = normalize(a, x, out);

		for (int64_t i = 0; i < d; i++)
			out[i] = (out[i] * weight[i] + bias_of(a, h * d + i)) *
			         curve_of(a->curve, gate[i]);
		if (a->rstd)
			wide_out(a->rstd)[row] = r;
	}
	return STATUS_OK;
}

/* One head; `normed` is that of the forward. Adds to dweight, and to dbias where there is one. */
static void norm_gate_head_backward(const struct norm_gate_backward_args *a, int64_t row,
                                    double *normed, double *dweight, double *dbias)
{
	const struct norm_gate_args *f = &a->forward;
	int64_t d = f->d_head, h = row % f->n_heads, own = first_weight(f, h);
	int64_t first = row / f->n_heads * f->gate_stride + h * d;
	const double *weight = wide(f->weight) + own, *gate = (const double *)f->gate + first;
	const double *dout = (const double *)a->dout + row * d;
	double *dx = (double *)a->dx + row * d, *dgate = (double *)a->dgate + first;
	double r = normalize(f, (const double *)f->x + row * d, normed), mean = 0;

	for (int64_t i = 0; i < d; i++) {
		dgate[i] = dout[i] * (normed[i] * weight[i] + bias_of(f, h * d + i)) *
		           curve_derivative(f->curve, gate[i]);
		dx[i] = dout[i] * curve_of(f->curve, gate[i]);
		if (f->norm == NORM_GROUP)
			dbias[h * d + i] += dx[i];
	}
	for (int64_t i = 0; i < d; i++)
		normed[i] /= r;
	norm_row_backward(d, r, normed, weight, dx, dx, dweight + own);
	for (int64_t i = 0; f->norm == NORM_GROUP && i < d; i++)
		mean += dx[i] / (double)d;
	for (int64_t i = 0; i < d; i++)
		dx[i] -= mean;
}

enum status reference_norm_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct norm_gate_backward_args *a = args;
	const struct norm_gate_args *f = &a->forward;
	const bool group = f->norm == NORM_GROUP;
	int64_t d = f->d_head, width = group ? f->n_heads * d : d, biases = group ? width : 1;
	double none = 0, *dweight = wide_out(a->dweight),
	       *dbias = group ? wide_out(a->dbias) : &none;
	double *scratch = take_doubles(d * omp_get_max_threads());

	if (!scratch)
		return STATUS_OOM;
	zero(width, dweight);
	zero(biases, dbias);
#pragma omp parallel for reduction(+ : dweight[:width], dbias[:biases])
	for (int64_t row = 0; row < f->n_tokens * f->n_heads; row++)
		norm_gate_head_backward(a, row, scratch + d * omp_get_thread_num(), dweight, dbias);
	free(scratch);
	return STATUS_OK;
}

/* x of channel i at token t, 0 before the sequence. */
static double conv_input(const struct short_conv_args *a, int64_t b, int64_t t, int64_t i)
{
	return t < 0 ? 0 : ((const double *)a->x)[(b * a->seq_len + t) * a->x_stride + i];
}

/* Of token n, before the activation. */
static double conv_sum(const struct short_conv_args *a, int64_t n, int64_t i)
{
	double sum = a->bias ? wide(a->bias)[i] : 0;

	for (int64_t j = 0; j < CONV_WIDTH; j++) {
		int64_t t = n % a->seq_len - CONV_HISTORY + j;

		if (t >= 0)
			sum += wide(a->weight)[i * CONV_WIDTH + j] *
			       conv_input(a, n / a->seq_len, t, i);
	}
	return sum;
}

enum status reference_short_conv(struct device *device, const void *args, void *workspace)
{
	const struct short_conv_args *a = args;
	int64_t c = a->channels;

#pragma omp parallel for
	for (int64_t n = 0; n < a->batch * a->seq_len; n++)
		for (int64_t i = 0; i < c; i++)
			((double *)a->out)[n * c + i] = curve_of(a->curve, conv_sum(a, n, i));
	for (int64_t j = 0; a->history && j < a->batch * CONV_HISTORY; j++)
		for (int64_t i = 0; i < c; i++)
			((double *)a->history)[j * c + i] =
			        conv_input(a, j / CONV_HISTORY,
			                   a->seq_len - CONV_HISTORY + j % CONV_HISTORY, i);
	return STATUS_OK;
}

/* The gradient of channel i of token n before the activation. */
static double conv_sum_gradient(const struct short_conv_backward_args *a, int64_t n, int64_t i)
{
	const double *dout = a->dout;
	double sum = 0;

	for (int64_t r = 0; r < a->n_readers; r++)
		sum += dout[(n * a->n_readers + r) * a->forward.channels + i];
	return sum * curve_derivative(a->forward.curve, conv_sum(&a->forward, n, i));
}

enum status reference_short_conv_backward(struct device *device, const void *args, void *workspace)
{
	const struct short_conv_backward_args *a = args;
	const struct short_conv_args *f = &a->forward;
	double *dx = a->dx, *dweight = wide_out(a->dweight);
	double *dbias = f->bias ? wide_out(a->dbias) : NULL;

	zero(f->channels * CONV_WIDTH, dweight);
	if (dbias)
		zero(f->channels, dbias);
#pragma omp parallel for
	for (int64_t i = 0; i < f->channels; i++)
		for (int64_t n = 0; n < f->batch * f->seq_len; n++) {
			int64_t t = n % f->seq_len;
			double dsum = conv_sum_gradient(a, n, i);

			if (dbias)
				dbias[i] += dsum;
			dx[n * f->x_stride + i] = 0;
			for (int64_t j = 0; j < CONV_WIDTH; j++) {
				int64_t tap = i * CONV_WIDTH + j, back = CONV_HISTORY - j;

				if (t < back)
					continue;
				dweight[tap] += dsum * conv_input(f, n / f->seq_len, t - back, i);
				dx[(n - back) * f->x_stride + i] += dsum * wide(f->weight)[tap];
			}
		}
	return STATUS_OK;
}

enum status reference_short_conv_step(struct device *device, const void *args, void *workspace)
{
	const struct short_conv_step_args *a = args;
	int64_t c = a->channels;

	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t i = 0; i < c; i++) {
			double *history = (double *)a->history + b * CONV_HISTORY * c + i;
			double x = ((const double *)a->x)[b * a->x_stride + i];
			double sum = a->bias ? wide(a->bias)[i] : 0;

			for (int64_t j = 0; j < CONV_WIDTH; j++)
				sum += wide(a->weight)[i * CONV_WIDTH + j] *
				       (j < CONV_HISTORY ? history[j * c] : x);
			for (int64_t j = 0; j < CONV_HISTORY; j++)
				history[j * c] = j < CONV_HISTORY - 1 ? history[(j + 1) * c] : x;
			((double *)a->out)[b * c + i] = curve_of(a->curve, sum);
		}
	return STATUS_OK;
}

enum status reference_time_step(struct device *device, const void *args, void *workspace)
{
	const struct time_step_args *a = args;
	int64_t heads = a->n_heads, d = a->d_head;

#pragma omp parallel for
	for (int64_t row = 0; row < a->n_tokens * heads; row++) {
		int64_t n = row / heads, h = row % heads;
		const double *x = (const double *)a->x + n * a->x_stride + h * d;
		double logit = ((const double *)a->logit)[n * a->logit_stride + h];
		double dt = softplus(logit + wide(a->bias)[h]);

		((double *)a->log_decay)[row] = -exp(wide(a->log_rate)[h]) * dt;
		for (int64_t i = 0; i < d; i++)
			((double *)a->out)[row * d + i] = dt * x[i];
	}
	return STATUS_OK;
}

enum status reference_time_step_backward(struct device *device, const void *args, void *workspace)
{
	const struct time_step_backward_args *a = args;
	const struct time_step_args *f = &a->forward;
	int64_t heads = f->n_heads, d = f->d_head;
	double *dbias = wide_out(a->dbias), *dlog_rate = wide_out(a->dlog_rate);

	zero(heads, dbias);
	zero(heads, dlog_rate);
#pragma omp parallel for reduction(+ : dbias[:heads], dlog_rate[:heads])
	for (int64_t row = 0; row < f->n_tokens * heads; row++) {
		int64_t n = row / heads, h = row % heads, logit = n * f->logit_stride + h;
		const double *x = (const double *)f->x + n * f->x_stride + h * d;
		const double *dout = (const double *)a->dout + row * d;
		const double *dskip = a->dskip ? (const double *)a->dskip + row * d : NULL;
		double *dx = (double *)a->dx + row * d, *dlogit = (double *)a->dlogit + logit;
		double shifted = ((const double *)f->logit)[logit] + wide(f->bias)[h];
		double dt = softplus(shifted), dlog_decay = ((const double *)a->dlog_decay)[row];
		double rate = exp(wide(f->log_rate)[h]), ddt = -rate * dlog_decay;

		for (int64_t i = 0; i < d; i++) {
			ddt += dout[i] * x[i];
			dx[i] = dt * dout[i] + (dskip ? dskip[i] : 0);
		}
		*dlogit = ddt * sigmoid(shifted);
		dbias[h] += *dlogit;
		dlog_rate[h] -= dlog_decay * rate * dt;
	}
	return STATUS_OK;
}

enum status reference_delta_gate(struct device *device, const void *args, void *workspace)
{
	const struct delta_gate_args *a = args;
	const double *logit = a->logit, *decay_logit = a->decay_logit;
	double *beta = a->beta, *log_decay = a->log_decay;
	int64_t heads = a->n_heads;

#pragma omp parallel for
	for (int64_t i = 0; i < a->n_tokens * heads; i++) {
		int64_t h = i % heads, from = i / heads * a->stride + h;

		beta[i] = sigmoid(logit[from]);
		if (decay_logit)
			log_decay[i] = -exp(wide(a->log_rate)[h]) *
			               softplus(decay_logit[from] + wide(a->bias)[h]);
	}
	return STATUS_OK;
}

/* The gradients of what makes the decay. */
static void delta_decay_backward(const struct delta_gate_backward_args *a)
{
	const struct delta_gate_args *f = &a->forward;
	const double *decay_logit = f->decay_logit, *dlog_decay = a->dlog_decay;
	double *ddecay_logit = a->ddecay_logit;
	double *dbias = wide_out(a->dbias), *dlog_rate = wide_out(a->dlog_rate);
	int64_t heads = f->n_heads;

	zero(heads, dbias);
	zero(heads, dlog_rate);
#pragma omp parallel for reduction(+ : dbias[:heads], dlog_rate[:heads])
	for (int64_t i = 0; i < f->n_tokens * heads; i++) {
		int64_t h = i % heads, from = i / heads * f->stride + h;
		double logit = decay_logit[from] + wide(f->bias)[h];
		double rate = exp(wide(f->log_rate)[h]);

		ddecay_logit[from] = -rate * dlog_decay[i] * sigmoid(logit);
		dbias[h] += ddecay_logit[from];
		dlog_rate[h] -= rate * dlog_decay[i] * softplus(logit);
	}
}

enum status reference_delta_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct delta_gate_backward_args *a = args;
	const struct delta_gate_args *f = &a->forward;
	const double *logit = f->logit, *dbeta = a->dbeta;
	double *dlogit = a->dlogit;
	int64_t heads = f->n_heads;

#pragma omp parallel for
	for (int64_t i = 0; i < f->n_tokens * heads; i++) {
		int64_t from = i / heads * f->stride + i % heads;

		dlogit[from] = dbeta[i] * sigmoid(logit[from]) * sigmoid(-logit[from]);
	}
	if (f->decay_logit)
		delta_decay_backward(a);
	return STATUS_OK;
}

enum status reference_forget_gate(struct device *device, const void *args, void *workspace)
{
	const struct forget_gate_args *a = args;
	int64_t width = a->width;

#pragma omp parallel for
	for (int64_t i = 0; i < a->n_tokens * width; i++) {
		int64_t from = i / width * a->stride + i % width;
		double x = ((const double *)a->x)[from], logit = ((const double *)a->logit)[from];
		double input = sigmoid(-wide(a->bound)[i % width]) * sigmoid(-logit);

		((double *)a->log_decay)[i] = log1p(-input);
		if (a->key)
			((double *)a->key)[i] = input;
		((double *)a->out)[i] = silu(x) * (a->key ? 1 : input);
	}
	return STATUS_OK;
}

enum status reference_forget_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct forget_gate_backward_args *a = args;
	const struct forget_gate_args *f = &a->forward;
	const double *dlog_decay = a->dlog_decay, *dkey = f->key ? a->dkey : NULL, *dout = a->dout;
	double *dbound = wide_out(a->dbound);
	int64_t width = f->width;

	zero(width, dbound);
#pragma omp parallel for reduction(+ : dbound[:width])
	for (int64_t i = 0; i < f->n_tokens * width; i++) {
		int64_t from = i / width * f->stride + i % width;
		double x = ((const double *)f->x)[from];
		double rest = sigmoid(-wide(f->bound)[i % width]);
		double closed = sigmoid(-((const double *)f->logit)[from]), input = rest * closed;
		double dinput = -dlog_decay[i] / (1 - input) + (dkey ? dkey[i] : dout[i] * silu(x));

		((double *)a->dlogit)[from] = -dinput * input * (1 - closed);
		((double *)a->dx)[from] = dout[i] * (dkey ? 1 : input) * silu_derivative(x);
		dbound[i % width] -= dinput * input * (1 - rest);
	}
	return STATUS_OK;
}

/* Column i of row n of x + skip_weight * skip, before the gate. */
static double skipped(const struct gate_norm_args *a, int64_t n, int64_t i)
{
	const double *skip = a->skip;

	return ((const double *)a->x)[n * a->n_heads * a->d_head + i] +
	       (skip ? wide(a->skip_weight)[i / a->d_head] * skip[n * a->skip_stride + i] : 0);
}

static double gate_logit(const struct gate_norm_args *a, int64_t n, int64_t i)
{
	return ((const double *)a->gate)[n * a->gate_stride + i];
}

/* u [H*d] of row n, before the norm. */
static void gated(const struct gate_norm_args *a, int64_t n, double *u)
{
	for (int64_t i = 0; i < a->n_heads * a->d_head; i++)
		u[i] = skipped(a, n, i) * (a->gate ? silu(gate_logit(a, n, i)) : 1);
}

enum status reference_gate_norm(struct device *device, const void *args, void *workspace)
{
	const struct gate_norm_args *a = args;
	int64_t width = a->n_heads * a->d_head, d = width / a->groups;

#pragma omp parallel for
	for (int64_t n = 0; n < a->n_tokens; n++) {
		double *out = (double *)a->out + n * width;

		gated(a, n, out);
		for (int64_t g = 0; g < a->groups; g++) {
			double r = inverse_rms(d, a->eps, out + g * d);

			for (int64_t i = 0; i < d; i++)
				out[g * d + i] *= r * wide(a->weight)[i];
			if (a->rstd)
				wide_out(a->rstd)[n * a->groups + g] = r;
		}
	}
	return STATUS_OK;
}

/* Row n from du [H*d], the gradient before the norm; adds to dskip_weight. */
static void gated_backward(const struct gate_norm_backward_args *a, int64_t n, const double *du,
                           double *dskip_weight)
{
	const struct gate_norm_args *f = &a->forward;
	int64_t width = f->n_heads * f->d_head;

	for (int64_t i = 0; i < width; i++) {
		double logit = f->gate ? gate_logit(f, n, i) : 0;
		double dx = du[i] * (f->gate ? silu(logit) : 1);

		if (f->gate)
			((double *)a->dgate)[n * f->gate_stride + i] =
			        du[i] * skipped(f, n, i) * silu_derivative(logit);
		if (f->skip) {
			double skip = ((const double *)f->skip)[n * f->skip_stride + i];

			((double *)a->dskip)[n * width + i] =
			        dx * wide(f->skip_weight)[i / f->d_head];
			dskip_weight[i / f->d_head] += dx * skip;
		}
		((double *)a->dx)[n * width + i] =
		        dx + (a->dresidual ? ((const double *)a->dresidual)[n * width + i] : 0);
	}
}

enum status reference_gate_norm_backward(struct device *device, const void *args, void *workspace)
{
	const struct gate_norm_backward_args *a = args;
	const struct gate_norm_args *f = &a->forward;
	int64_t width = f->n_heads * f->d_head, d = width / f->groups;
	double *scratch = take_doubles(2 * width * omp_get_max_threads());
	double *dweight = wide_out(a->dweight), none = 0;
	double *dskip_weight = f->skip ? wide_out(a->dskip_weight) : &none;
	int64_t n_skip = f->skip ? f->n_heads : 1;

	if (!scratch)
		return STATUS_OOM;
	zero(d, dweight);
	zero(n_skip, dskip_weight);
#pragma omp parallel for reduction(+ : dweight[:d], dskip_weight[:n_skip])
	for (int64_t n = 0; n < f->n_tokens; n++) {
		const double *dout = (const double *)a->dout + n * width;
		double *u = scratch + 2 * width * omp_get_thread_num();

		gated(f, n, u);
		for (int64_t g = 0; g < f->groups; g++)
			norm_row_backward(d, inverse_rms(d, f->eps, u + g * d), u + g * d,
			                  wide(f->weight), dout + g * d, u + width + g * d,
			                  dweight);
		gated_backward(a, n, u + width, dskip_weight);
	}
	free(scratch);
	return STATUS_OK;
}

/* Of one channel of one token: the gates r and i, the logarithm of the decay, and the scale of the
 * input, sqrt(1 - a^2). */
struct lru {
	double r, i, log_decay, scale;
	bool first; /* of its sequence */
};

static struct lru lru_of(const struct lru_gate_args *a, int64_t n, int64_t channel)
{
	const double *logit = (const double *)a->logit + n * 2 * a->width + channel;
	const double *bias = wide(a->bias) + channel;
	struct lru u = {.r = sigmoid(logit[0] + bias[0]),
	                .i = sigmoid(logit[a->width] + bias[a->width]),
	                .first = n % a->seq_len + (a->position ? *a->position : 0) == 0};

	u.log_decay = -LRU_SHARPNESS * softplus(wide(a->rate)[channel]) * u.r;
	u.scale = u.first ? 1 : sqrt(-expm1(2 * u.log_decay));
	return u;
}

enum status reference_lru_gate(struct device *device, const void *args, void *workspace)
{
	const struct lru_gate_args *a = args;
	const double *x = a->x;

#pragma omp parallel for
	for (int64_t j = 0; j < a->batch * a->seq_len * a->width; j++) {
		const struct lru u = lru_of(a, j / a->width, j % a->width);

		((double *)a->log_decay)[j] = u.log_decay;
		((double *)a->out)[j] = u.scale * u.i * x[j];
	}
	return STATUS_OK;
}

/* d sqrt(1 - e^(2 l)) / dl = -e^(2 l) / sqrt(1 - e^(2 l)); without a decay nothing flows. */
enum status reference_lru_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct lru_gate_backward_args *a = args;
	const struct lru_gate_args *f = &a->forward;
	const double *x = f->x, *dlog_decay = a->dlog_decay, *dout = a->dout;
	double *dlogit = a->dlogit, *dx = a->dx;
	double *dbias = wide_out(a->dbias), *drate = wide_out(a->drate);
	int64_t width = f->width;

	zero(2 * width, dbias);
	zero(width, drate);
#pragma omp parallel for reduction(+ : dbias[:2 * width], drate[:width])
	for (int64_t j = 0; j < f->batch * f->seq_len * width; j++) {
		int64_t n = j / width, c = j % width;
		const struct lru u = lru_of(f, n, c);
		double *to = dlogit + n * 2 * width + c, rate = wide(f->rate)[c];
		double slope = u.first || u.scale == 0 ? 0 : -exp(2 * u.log_decay) / u.scale;
		double dlog = dlog_decay[j] + dout[j] * u.i * x[j] * slope;

		dx[j] = dout[j] * u.scale * u.i;
		to[0] = dlog * u.log_decay * (1 - u.r);
		to[width] = dout[j] * u.scale * x[j] * u.i * (1 - u.i);
		dbias[c] += to[0];
		dbias[width + c] += to[width];
		drate[c] -= dlog * LRU_SHARPNESS * u.r * sigmoid(rate);
	}
	return STATUS_OK;
}

/* Of gelu in its form with a tanh: the argument of the tanh, and its slope. */
static const double gelu_cube = 0.044715;

static double gelu_argument(double z)
{
	return sqrt(2 / acos(-1)) * (z + gelu_cube * z * z * z);
}

static double gelu_argument_slope(double z)
{
	return sqrt(2 / acos(-1)) * (1 + 3 * gelu_cube * z * z);
}

enum status reference_gelu_gate(struct device *device, const void *args, void *workspace)
{
	const struct gelu_gate_args *a = args;
	int64_t width = a->width;

#pragma omp parallel for
	for (int64_t j = 0; j < a->n_tokens * width; j++) {
		double z = ((const double *)a->gate)[j / width * a->gate_stride + j % width];

		/* (1 + tanh u) / 2 = sigmoid(2 u). */
		((double *)a->out)[j] =
		        ((const double *)a->x)[j] * z * sigmoid(2 * gelu_argument(z));
	}
	return STATUS_OK;
}

enum status reference_gelu_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct gelu_gate_backward_args *a = args;
	const struct gelu_gate_args *f = &a->forward;
	const double *x = f->x, *dout = a->dout;
	int64_t width = f->width;

#pragma omp parallel for
	for (int64_t j = 0; j < f->n_tokens * width; j++) {
		int64_t at_row = j / width * f->gate_stride + j % width;
		double z = ((const double *)f->gate)[at_row], u = 2 * gelu_argument(z);
		double slope =
		        sigmoid(u) + z * sigmoid(u) * sigmoid(-u) * 2 * gelu_argument_slope(z);

		((double *)a->dgate)[at_row] = dout[j] * x[j] * slope;
		((double *)a->dx)[j] = dout[j] * z * sigmoid(u);
	}
	return STATUS_OK;
}
