/* L2 norm of the heads of q and k. */
#include <math.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/vector_math.h"

enum status cpu_l2_norm(struct device *device, const void *args, void *workspace)
{
	const struct l2_norm_args *a = args;
	int64_t heads = a->n_heads, tokens = a->batch * a->seq_len;

#pragma omp parallel for schedule(static)
	for (int64_t row = 0; row < tokens * heads; row++) {
		int64_t b = row / heads / a->seq_len, t = row / heads % a->seq_len, h = row % heads;
		const float *x = view_at(&a->x, b, t, h);
		float *y = view_at(&a->y, b, t, h);
		float inverse = 1.0f / sqrtf(dot_f32(a->d_head, x, x) + a->eps);

#pragma omp simd
		for (int64_t i = 0; i < a->d_head; i++)
			y[i] = x[i] * inverse;
		if (a->inverse)
			a->inverse[row] = inverse;
	}
	return STATUS_OK;
}

enum status cpu_l2_norm_backward(struct device *device, const void *args, void *workspace)
{
	const struct l2_norm_backward_args *a = args;
	const struct l2_norm_args *f = &a->forward;
	int64_t heads = f->n_heads, tokens = f->batch * f->seq_len;

#pragma omp parallel for schedule(static)
	for (int64_t row = 0; row < tokens * heads; row++) {
		int64_t b = row / heads / f->seq_len, t = row / heads % f->seq_len, h = row % heads;
		const float *y = view_at(&f->y, b, t, h), *dy = view_at(&a->dy, b, t, h);
		float *dx = view_at(&a->dx, b, t, h);
		float inverse = f->inverse[row], along = dot_f32(f->d_head, y, dy);

#pragma omp simd
		for (int64_t i = 0; i < f->d_head; i++)
			dx[i] = inverse * (dy[i] - y[i] * along);
	}
	return STATUS_OK;
}
