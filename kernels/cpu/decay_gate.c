/* GLA's decay: log_decay = logsigmoid(x W^T + bias) / normalizer, and its gradients. */
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

/* to [n, d_out] = x W^T for n tokens from `first` on, without the bias. */
static void project(const struct decay_gate_args *a, int64_t first, int64_t n, float *to)
{
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)n, (int)a->d_out, (int)a->rank, 1,
	            (const float *)a->x + first * a->x_stride, (int)a->x_stride, a->weight,
	            (int)a->rank, 0, to, (int)a->d_out);
}

enum status cpu_decay_gate(struct device *device, const void *args, void *workspace)
{
	const struct decay_gate_args *a = args;
	float inverse = 1.0f / a->normalizer;

#pragma omp parallel for schedule(static)
	for (int64_t block = 0; block < count_blocks(a); block++) {
		int64_t first = block * BLOCK_TOKENS, n = block_size(a, first);
		float *log_decay = (float *)a->log_decay + first * a->d_out;

		project(a, first, n, log_decay);
		for (int64_t t = 0; t < n; t++, log_decay += a->d_out)
#pragma omp simd
			for (int64_t i = 0; i < a->d_out; i++)
				log_decay[i] = log_sigmoid_f32(log_decay[i] + a->bias[i]) * inverse;
	}
	return STATUS_OK;
}

/* Each thread's share of dweight [d_out, rank] and dbias [d_out]. */
struct partial {
	double *dbias;
	float *dweight;
};

static size_t partial_bytes(const struct decay_gate_args *f)
{
	size_t bytes = (size_t)f->d_out * (sizeof(double) + (size_t)f->rank * sizeof(float));

	return (bytes + 63) / 64 * 64;
}

static struct partial partial_of(const struct decay_gate_args *f, void *workspace, int thread)
{
	double *dbias = (double *)((char *)workspace + partial_bytes(f) * (size_t)thread);

	return (struct partial){dbias, (float *)(dbias + f->d_out)};
}

size_t cpu_decay_gate_backward_workspace(const struct device *device, const void *args)
{
	const struct decay_gate_backward_args *a = args;

	return partial_bytes(&a->forward) * (size_t)omp_get_max_threads();
}

/*
 * dlogit = dlog_decay / normalizer * sigmoid(-logit). The logit is computed
 * again: sigmoid(-logit) = 1 - exp(log_decay * normalizer) would cancel where
 * the gate is open.
 */
static void logit_backward(const struct decay_gate_backward_args *a, int64_t first, int64_t n,
                           double *dbias)
{
	const struct decay_gate_args *f = &a->forward;
	float inverse = 1.0f / f->normalizer;
	float *dlogit = (float *)a->dlogit + first * f->d_out;
	const float *dlog_decay = (const float *)a->dlog_decay + first * f->d_out;

	project(f, first, n, dlogit);
	for (int64_t t = 0; t < n; t++, dlogit += f->d_out, dlog_decay += f->d_out)
#pragma omp simd
		for (int64_t i = 0; i < f->d_out; i++) {
			dlogit[i] = dlog_decay[i] * inverse * sigmoid_f32(-dlogit[i] - f->bias[i]);
			dbias[i] += dlogit[i];
		}
}

static void block_backward(const struct decay_gate_backward_args *a, int64_t first, int64_t n,
                           const struct partial *sum)
{
	const struct decay_gate_args *f = &a->forward;
	const float *dlogit = (const float *)a->dlogit + first * f->d_out;
	int tokens = (int)n, rank = (int)f->rank, d_out = (int)f->d_out, stride = (int)f->x_stride;

	logit_backward(a, first, n, sum->dbias);
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, tokens, rank, d_out, 1, dlogit,
	            d_out, f->weight, rank, 0, (float *)a->dx + first * f->x_stride, stride);
	cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, d_out, rank, tokens, 1, dlogit, d_out,
	            (const float *)f->x + first * f->x_stride, stride, 1, sum->dweight, rank);
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
