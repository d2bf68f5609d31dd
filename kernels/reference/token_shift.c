/* fp64 token shift of RWKV. */
#include "kernels/reference/shared.h"

/* Where output n of row r (a sequence's token) has channel i; rows [n_out, rows, width]. */
static int64_t place(const struct token_shift_args *a, int64_t n, int64_t r, int64_t i)
{
	return (n * a->batch * a->seq_len + r) * a->width + i;
}

static double mix_of(const struct token_shift_args *a, int64_t n, int64_t r, int64_t i)
{
	return a->form == SHIFT_CONSTANT ? wide(a->weight)[n * a->width + i]
	                                 : ((const double *)a->mix)[place(a, n, r, i)];
}

/* x_{t-1} - x_t. */
static double difference(const struct token_shift_args *a, int64_t r, int64_t i)
{
	const double *x = (const double *)a->x + r * a->width + i;

	return (r % a->seq_len == 0 ? 0 : x[-a->width]) - *x;
}

enum status reference_token_shift(struct device *device, const void *args, void *workspace)
{
	const struct token_shift_args *a = args;
	int64_t rows = a->batch * a->seq_len;
	const double *x = a->x;

#pragma omp parallel for
	for (int64_t r = 0; r < rows; r++)
		for (int64_t i = 0; i < a->width; i++) {
			for (int64_t n = 0; n < a->n_out; n++)
				((double *)a->out)[place(a, n, r, i)] =
				        x[r * a->width + i] +
				        difference(a, r, i) * mix_of(a, n, r, i);
			if (a->last && r % a->seq_len == a->seq_len - 1)
				((double *)a->last)[r / a->seq_len * a->width + i] =
				        x[r * a->width + i];
		}
	return STATUS_OK;
}

/* dx of channel i of row r: what its own outputs and those of the token after it pass back. */
static double shift_gradient(const struct token_shift_backward_args *a, int64_t r, int64_t i)
{
	const struct token_shift_args *f = &a->forward;
	const double *dout = a->dout;
	double sum = 0;

	for (int64_t n = 0; n < f->n_out; n++) {
		sum += dout[place(f, n, r, i)] * (1 - mix_of(f, n, r, i));
		if (r % f->seq_len < f->seq_len - 1)
			sum += dout[place(f, n, r + 1, i)] * mix_of(f, n, r + 1, i);
	}
	return sum;
}

enum status reference_token_shift_backward(struct device *device, const void *args, void *workspace)
{
	const struct token_shift_backward_args *a = args;
	const struct token_shift_args *f = &a->forward;
	const double *dout = a->dout, *dresidual = a->dresidual;
	const bool constant = f->form == SHIFT_CONSTANT;
	double *dx = a->dx, *dweight = constant ? wide_out(a->dweight) : NULL;
	int64_t width = f->width;

	if (constant)
		zero(f->n_out * width, dweight);
#pragma omp parallel for
	for (int64_t i = 0; i < width; i++)
		for (int64_t r = 0; r < f->batch * f->seq_len; r++) {
			dx[r * width + i] = shift_gradient(a, r, i) +
			                    (dresidual ? dresidual[r * width + i] : 0);
			for (int64_t n = 0; n < f->n_out; n++) {
				double dmix = dout[place(f, n, r, i)] * difference(f, r, i);

				if (constant)
					dweight[n * width + i] += dmix;
				else
					((double *)a->dmix)[place(f, n, r, i)] = dmix;
			}
		}
	return STATUS_OK;
}

enum status reference_token_shift_step(struct device *device, const void *args, void *workspace)
{
	const struct token_shift_step_args *a = args;
	const bool moves = a->form == SHIFT_CONSTANT;
	int64_t count = a->batch * a->width;
	const double *x = a->x, *before = moves ? a->state : a->before, *mix = a->mix;

	for (int64_t j = 0; j < count; j++) {
		double old = before[j];

		for (int64_t n = 0; n < a->n_out; n++) {
			double m = moves ? wide(a->weight)[n * a->width + j % a->width]
			                 : mix[n * count + j];

			((double *)a->out)[n * count + j] = x[j] + (old - x[j]) * m;
		}
		if (moves && a->before)
			((double *)a->before)[j] = old;
		if (moves)
			((double *)a->state)[j] = x[j];
	}
	return STATUS_OK;
}
