/* fp64 L2 norm of the heads of q and k. */
#include "kernels/reference/shared.h"

enum status reference_l2_norm(struct device *device, const void *args, void *workspace)
{
	const struct l2_norm_args *a = args;

#pragma omp parallel for
	for (int64_t row = 0; row < a->batch * a->seq_len * a->n_heads; row++) {
		int64_t n = row / a->n_heads, b = n / a->seq_len, t = n % a->seq_len;
		const double *x = at(&a->x, b, t, row % a->n_heads);
		double *y = at(&a->y, b, t, row % a->n_heads);
		double inverse = 1 / sqrt(dot(a->d_head, x, x) + (double)a->eps);

		for (int64_t i = 0; i < a->d_head; i++)
			y[i] = x[i] * inverse;
		if (a->inverse)
			wide_out(a->inverse)[row] = inverse;
	}
	return STATUS_OK;
}

enum status reference_l2_norm_backward(struct device *device, const void *args, void *workspace)
{
	const struct l2_norm_backward_args *a = args;
	const struct l2_norm_args *f = &a->forward;

#pragma omp parallel for
	for (int64_t row = 0; row < f->batch * f->seq_len * f->n_heads; row++) {
		int64_t n = row / f->n_heads, b = n / f->seq_len, t = n % f->seq_len;
		const double *y = at(&f->y, b, t, row % f->n_heads);
		const double *dy = at(&a->dy, b, t, row % f->n_heads);
		double *dx = at(&a->dx, b, t, row % f->n_heads);
		double inverse = wide(f->inverse)[row], along = dot(f->d_head, y, dy);

		for (int64_t i = 0; i < f->d_head; i++)
			dx[i] = inverse * (dy[i] - y[i] * along);
	}
	return STATUS_OK;
}
