/* fp64 embedding, GELU, loss, and the choice of the next token. */
#include "kernels/reference/shared.h"

enum status reference_embedding(struct device *device, const void *args, void *workspace)
{
	const struct embedding_args *a = args;
	const double *table = a->table;
	double *y = a->y;
	int64_t d = a->d_model;

	for (int64_t n = 0; n < a->n_tokens; n++)
		memcpy(y + n * d, table + a->tokens[n] * d, sizeof *y * (size_t)d);
	return STATUS_OK;
}

enum status reference_embedding_backward(struct device *device, const void *args, void *workspace)
{
	const struct embedding_backward_args *a = args;
	const double *dy = a->dy;
	double *dtable = wide_out(a->dtable);
	int64_t d = a->d_model;

	zero(a->vocab * d, dtable);
	for (int64_t n = 0; n < a->n_tokens; n++)
		add_scaled(d, 1, dy + n * d, dtable + a->tokens[n] * d);
	return STATUS_OK;
}

enum status reference_gelu(struct device *device, const void *args, void *workspace)
{
	const struct gelu_args *a = args;
	const double *x = a->x;
	double *y = a->y;

#pragma omp parallel for
	for (int64_t i = 0; i < a->count; i++)
		y[i] = x[i] * (1 + erf(x[i] / sqrt(2))) / 2;
	return STATUS_OK;
}

enum status reference_gelu_backward(struct device *device, const void *args, void *workspace)
{
	const struct gelu_backward_args *a = args;
	const double inverse_sqrt_2_pi = 0.39894228040143267794;
	const double *x = a->x, *dy = a->dy;
	double *dx = a->dx;

#pragma omp parallel for
	for (int64_t i = 0; i < a->count; i++)
		dx[i] = dy[i] * ((1 + erf(x[i] / sqrt(2))) / 2 +
		                 x[i] * exp(-x[i] * x[i] / 2) * inverse_sqrt_2_pi);
	return STATUS_OK;
}

/* The lowest index of the largest of a row; a row that has a NaN gives the first NaN's. */
static int64_t largest(int64_t count, const double *x)
{
	int64_t best = 0;

	for (int64_t i = 1; i < count; i++)
		if (x[i] > x[best] || (isnan(x[i]) && !isnan(x[best])))
			best = i;
	return best;
}

/* log of the sum of e^logit over one row; the largest of them is the 1 of log1p. */
static double log_sum_exp(int64_t count, const double *logits)
{
	int64_t top = largest(count, logits);
	double others = 0;

	for (int64_t i = 0; i < count; i++)
		if (i != top)
			others += exp(logits[i] - logits[top]);
	return logits[top] + log1p(others);
}

/* Without any target the loss and its gradient are 0. */
enum status reference_cross_entropy(struct device *device, const void *args, void *workspace)
{
	const struct cross_entropy_args *a = args;
	double *loss = wide_out(a->loss);
	int64_t counted = 0;

	*loss = 0;
	for (int64_t n = 0; n < a->n_tokens; n++)
		counted += a->targets[n] >= 0;
#pragma omp parallel for reduction(+ : loss[:1])
	for (int64_t n = 0; n < a->n_tokens; n++) {
		double *row = (double *)a->logits + n * a->vocab;
		int32_t target = a->targets[n];

		if (target < 0) {
			zero(a->want_gradient ? a->vocab : 0, row);
			continue;
		}
		double lse = log_sum_exp(a->vocab, row);
		*loss += (lse - row[target]) / (double)counted;
		for (int64_t j = 0; a->want_gradient && j < a->vocab; j++)
			row[j] = (exp(row[j] - lse) - (j == target)) / (double)counted;
	}
	return STATUS_OK;
}

enum status reference_argmax(struct device *device, const void *args, void *workspace)
{
	const struct argmax_args *a = args;
	const double *logits = a->logits;

	for (int64_t n = 0; n < a->n_tokens; n++)
		a->tokens[n] = (int32_t)largest(a->vocab, logits + n * a->vocab);
	if (a->position)
		++*a->position;
	return STATUS_OK;
}
