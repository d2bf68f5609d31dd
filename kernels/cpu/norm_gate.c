/* GLA's, KDA's and RWKV-6's output stage: a norm of each head, times a curve of the output gate;
 * and its gradients. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* Of one head: what its norm takes off, by what it multiplies, and the head's weights and biases
 * (NULL: none). */
struct head {
	float mean, rstd;
	const float *weight, *bias;
};

static float mean_f32(int64_t d, const float *x)
{
	float sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++)
		sum += x[i];
	return sum / (float)d;
}

/* All but rstd. */
static struct head head_of(const struct norm_gate_args *a, int64_t h, const float *x)
{
	const int64_t own = h * a->d_head;

	if (a->norm == NORM_RMS)
		return (struct head){.weight = a->weight};
	return (struct head){
	        .mean = mean_f32(a->d_head, x), .weight = a->weight + own, .bias = a->bias + own};
}

static float head_rstd(int64_t d, float eps, float mean, const float *x)
{
	float sum = 0;

	if (mean == 0.0f)
		return 1.0f / sqrtf(dot_f32(d, x, x) / (float)d + eps);
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++)
		sum += (x[i] - mean) * (x[i] - mean);
	return 1.0f / sqrtf(sum / (float)d + eps);
}

/* The curve of `gate` is gate * sigmoid(gate) or, with `flat` 1, sigmoid(gate). */
static float curve_of(float flat, float gate)
{
	return (flat + (1.0f - flat) * gate) * sigmoid_f32(gate);
}

static float flatness(enum curve curve)
{
	return curve == CURVE_SIGMOID ? 1.0f : 0.0f;
}

enum status cpu_norm_gate(struct device *device, const void *args, void *workspace)
{
	const struct norm_gate_args *a = args;
	int64_t d = a->d_head;
	float flat = flatness(a->curve);

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		for (int64_t h = 0; h < a->n_heads; h++) {
			const float *x = (const float *)a->x + (n * a->n_heads + h) * d;
			const float *gate = (const float *)a->gate + n * a->gate_stride + h * d;
			float *out = (float *)a->out + (n * a->n_heads + h) * d;
			struct head k = head_of(a, h, x);

			k.rstd = head_rstd(d, a->eps, k.mean, x);
			if (a->rstd)
				a->rstd[n * a->n_heads + h] = k.rstd;
#pragma omp simd
			for (int64_t i = 0; i < d; i++)
				out[i] = ((x[i] - k.mean) * k.rstd * k.weight[i] +
				          (k.bias ? k.bias[i] : 0.0f)) *
				         curve_of(flat, gate[i]);
		}
	}
	return STATUS_OK;
}

/* Columns that have a weight, and a bias, of their own. */
static int64_t count_weights(const struct norm_gate_args *f)
{
	return f->norm == NORM_GROUP ? f->n_heads * f->d_head : f->d_head;
}

/* Doubles of dweight and then of dbias, per thread. */
size_t cpu_norm_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct norm_gate_backward_args *a = args;

	return sizeof(double) * (size_t)(omp_get_max_threads() * 2 * count_weights(&a->forward));
}

/*
 * With n = (x - mean) rstd w + b and s = silu(gate) = gate sigma, out = n s: dgate = dout n
 * s'(gate), s' = sigma (1 + gate (1 - sigma)), or with s = sigma, s' = sigma (1 - sigma); dweight
 * += dout s (x
 * - mean) rstd, dbias += dout s; and dx through the norm.
 */
static void head_backward(const struct norm_gate_backward_args *a, int64_t n, int64_t h,
                          double *dweight, double *dbias)
{
	const struct norm_gate_args *f = &a->forward;
	int64_t d = f->d_head, row = n * f->n_heads + h;
	const float *x = (const float *)f->x + row * d, *dout = (const float *)a->dout + row * d;
	const float *gate = (const float *)f->gate + n * f->gate_stride + h * d;
	float *dx = (float *)a->dx + row * d;
	float *dgate = (float *)a->dgate + n * f->gate_stride + h * d;
	float projection = 0, center = 0, flat = flatness(f->curve);
	struct head k = head_of(f, h, x);

	k.rstd = f->rstd[row];

#pragma omp simd reduction(+ : projection, center)
	for (int64_t i = 0; i < d; i++) {
		float g = gate[i], sigma = sigmoid_f32(g), x_hat = (x[i] - k.mean) * k.rstd;
		float factor = flat + (1.0f - flat) * g, dnorm = dout[i] * factor * sigma;

		dgate[i] = dout[i] * (x_hat * k.weight[i] + (k.bias ? k.bias[i] : 0.0f)) * sigma *
		           (1.0f - flat + factor * (1.0f - sigma));
		dweight[i] += dnorm * x_hat;
		dbias[i] += dnorm;
		dx[i] = dnorm * k.weight[i];
		projection += dx[i] * x_hat;
		center += dx[i];
	}
	projection /= (float)d;
	center = k.bias ? center / (float)d : 0.0f;
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		dx[i] = k.rstd * (dx[i] - center - (x[i] - k.mean) * k.rstd * projection);
}

enum status cpu_norm_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct norm_gate_backward_args *a = args;
	const struct norm_gate_args *f = &a->forward;
	int64_t width = count_weights(f), own = f->norm == NORM_GROUP ? f->d_head : 0;
	int n_threads = omp_get_max_threads();
	double *partial = workspace;

	memset(partial, 0, cpu_norm_gate_backward_workspace(device, args));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < f->n_tokens; n++)
		for (int64_t h = 0; h < f->n_heads; h++) {
			double *mine = partial + omp_get_thread_num() * 2 * width + h * own;

			head_backward(a, n, h, mine, mine + width);
		}
	add_shares(partial, n_threads, 2 * width, width, a->dweight);
	if (f->norm == NORM_GROUP)
		add_shares(partial + width, n_threads, 2 * width, width, a->dbias);
	return STATUS_OK;
}
