/* x times gelu(gate), in the form with a tanh: gelu(z) = z sigmoid(2 u), u = c (z + b z^3). */
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/vector_math.h"

/* 2 sqrt(2/pi), and the weight of the cube. */
static const float twice_root = 1.59576912f, cube = 0.044715f;

enum status cpu_gelu_gate(struct device *device, const void *args, void *workspace)
{
	const struct gelu_gate_args *a = args;

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		const float *gate = (const float *)a->gate + n * a->gate_stride;
		const float *x = (const float *)a->x + n * a->width;
		float *out = (float *)a->out + n * a->width;

#pragma omp simd
		for (int64_t i = 0; i < a->width; i++) {
			float z = gate[i], u = twice_root * z * fmaf(cube * z, z, 1.0f);

			out[i] = x[i] * z * sigmoid_f32(u);
		}
	}
	return STATUS_OK;
}

/* gelu'(z) = s + z s (1 - s) du/dz, s = sigmoid(u). */
enum status cpu_gelu_gate_backward(struct device *device, const void *args, void *workspace)
{
	const struct gelu_gate_backward_args *a = args;
	const struct gelu_gate_args *f = &a->forward;

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < f->n_tokens; n++) {
		const float *gate = (const float *)f->gate + n * f->gate_stride;
		const float *x = (const float *)f->x + n * f->width;
		const float *dout = (const float *)a->dout + n * f->width;
		float *dgate = (float *)a->dgate + n * f->gate_stride;
		float *dx = (float *)a->dx + n * f->width;

#pragma omp simd
		for (int64_t i = 0; i < f->width; i++) {
			float z = gate[i], square = cube * z * z;
			float u = twice_root * z * (1.0f + square), s = sigmoid_f32(u);
			float slope = twice_root * fmaf(3.0f, square, 1.0f);

			dgate[i] = dout[i] * x[i] * fmaf(z * s * sigmoid_f32(-u), slope, s);
			dx[i] = dout[i] * z * s;
		}
	}
	return STATUS_OK;
}
