/*
 * The gate of the RG-LRU: with gates r and i, log a = -8 softplus(rate) r, and the input times
 * sqrt(1 - a^2) i, where 1 - a^2 comes from log a itself and never cancels. Elementwise; what
 * depends on the channel alone is computed once.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* Of each channel, [width]: -8 softplus(rate), and the derivative of its logarithm. */
struct rates {
	float *rate, *slope;
};

static struct rates fill_rates(const struct lru_gate_args *a, void *workspace)
{
	struct rates rates = {workspace, (float *)workspace + a->width};

	for (int64_t i = 0; i < a->width; i++) {
		double x = (double)a->rate[i];
		double softplus = x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
		double sigmoid = 1 / (1 + exp(-x));

		rates.rate[i] = (float)(-LRU_SHARPNESS * softplus);
		rates.slope[i] = softplus == 0 ? 1.0f : (float)(sigmoid / softplus);
	}
	return rates;
}

static size_t rates_bytes(const struct lru_gate_args *a)
{
	return 2 * sizeof(float) * (size_t)a->width;
}

/* Row n is its sequence's first. */
static bool is_first(const struct lru_gate_args *a, int64_t n)
{
	return n % a->seq_len + (a->position ? *a->position : 0) == 0;
}

size_t cpu_lru_gate_workspace(const struct device *device, const void *args)
{
	return rates_bytes(args);
}

static void token_forward(const struct lru_gate_args *a, const struct rates *rates, int64_t n)
{
	const float *logit = (const float *)a->logit + 2 * n * a->width, *input = logit + a->width;
	const float *bias = a->bias, *input_bias = bias + a->width;
	const float *x = (const float *)a->x + n * a->width;
	float *log_decay = (float *)a->log_decay + n * a->width;
	float *out = (float *)a->out + n * a->width;
	const bool first = is_first(a, n);

#pragma omp simd
	for (int64_t i = 0; i < a->width; i++) {
		float log = rates->rate[i] * sigmoid_f32(logit[i] + bias[i]);
		float scale = first ? 1.0f : sqrtf(one_minus_exp_f32(2.0f * log));

		log_decay[i] = log;
		out[i] = scale * sigmoid_f32(input[i] + input_bias[i]) * x[i];
	}
}

enum status cpu_lru_gate(struct device *device, const void *args, void *workspace)
{
	const struct lru_gate_args *a = args;
	const struct rates rates = fill_rates(a, workspace);

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->batch * a->seq_len; n++)
		token_forward(a, &rates, n);
	return STATUS_OK;
}

/* The rates, then each thread's shares of dbias and drate. */
size_t cpu_lru_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct lru_gate_backward_args *a = args;

	return rates_bytes(&a->forward) +
	       3 * sizeof(double) * (size_t)(a->forward.width * omp_get_max_threads());
}

/*
 * With l = log a and s = sqrt(1 - a^2): ds/dl = -a^2 / s. l is proportional to r and to
 * softplus(rate), whose derivatives are l times their own, so that l / s appears, which goes to 0
 * as l does.
 */
static void token_backward(const struct lru_gate_backward_args *a, const struct rates *rates,
                           int64_t n, double *share)
{
	const struct lru_gate_args *f = &a->forward;
	int64_t width = f->width, row = n * width;
	const float *logit = (const float *)f->logit + 2 * row, *input = logit + width;
	const float *bias = f->bias, *input_bias = bias + width, *x = (const float *)f->x + row;
	const float *dlog_decay = (const float *)a->dlog_decay + row;
	const float *dout = (const float *)a->dout + row;
	float *dlogit = (float *)a->dlogit + 2 * row, *dinput = dlogit + width;
	float *dx = (float *)a->dx + row;
	const float flows = is_first(f, n) ? 0.0f : 1.0f;

#pragma omp simd
	for (int64_t c = 0; c < width; c++) {
		float z = logit[c] + bias[c], y = input[c] + input_bias[c];
		float log = rates->rate[c] * sigmoid_f32(z), gate = sigmoid_f32(y);
		float root = sqrtf(one_minus_exp_f32(2.0f * log));
		float ratio = root == 0.0f ? 0.0f : log / root;
		float scale = flows == 0.0f ? 1.0f : root, dscaled = dout[c] * gate;
		float dlog =
		        dlog_decay[c] * log - flows * dscaled * x[c] * exp_f32(2.0f * log) * ratio;

		dx[c] = dscaled * scale;
		dlogit[c] = dlog * sigmoid_f32(-z);
		dinput[c] = dscaled * scale * x[c] * sigmoid_f32(-y);
		share[c] += dlogit[c];
		share[width + c] += dinput[c];
		share[2 * width + c] += dlog * rates->slope[c];
	}
}

enum status cpu_lru_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct lru_gate_backward_args *a = args;
	const struct lru_gate_args *f = &a->forward;
	const struct rates rates = fill_rates(f, workspace);
	double *shares = (double *)(rates.slope + f->width);
	int n_threads = omp_get_max_threads();
	int64_t width = f->width;

	memset(shares, 0, 3 * sizeof *shares * (size_t)(width * n_threads));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < f->batch * f->seq_len; n++)
		token_backward(a, &rates, n, shares + 3 * width * omp_get_thread_num());
	add_shares(shares, n_threads, 3 * width, 2 * width, a->dbias);
	add_shares(shares + 2 * width, n_threads, 3 * width, width, a->drate);
	return STATUS_OK;
}
