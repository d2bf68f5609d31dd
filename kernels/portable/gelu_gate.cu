/* x times gelu(gate), in the form with a tanh: gelu(z) = z sigmoid(u), u = 2 c (z + b z^3). Bound
 * by memory; a thread takes eight channels of one token. */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128 };

/* 2 sqrt(2/pi), and the weight of the cube. */
static constexpr float TWICE_ROOT = 1.5957691216057308f, CUBE = 0.044715f;

static __global__ void __launch_bounds__(THREADS)
        gelu_gate_kernel(const __grid_constant__ struct gelu_gate_args a)
{
	const int64_t index = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	const int64_t n = index / a.width, column = index % a.width;
	float gate[8], x[8];

	if (n >= a.n_tokens)
		return;
	load8(gate, static_cast<const bf16 *>(a.gate) + n * a.gate_stride + column);
	load8(x, static_cast<const bf16 *>(a.x) + index);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float z = gate[i];

		x[i] *= z * sigmoid(TWICE_ROOT * z * fmaf(CUBE * z, z, 1.0f));
	}
	store8(static_cast<bf16 *>(a.out) + index, x);
}

extern "C" const char *portable_gelu_gate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct gelu_gate_args *>(args);

	return either(check_widths(a->width, a->gate_stride), check_aligned(a->gate));
}

extern "C" enum status portable_gelu_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct gelu_gate_args *>(args);

	return launch_each(device, "gelu_gate", gelu_gate_kernel, a->n_tokens * (a->width / 8),
	                   THREADS, *a);
}

/* gelu'(z) = s + z s (1 - s) du/dz, s = sigmoid(u). */
static __global__ void __launch_bounds__(THREADS)
        gelu_gate_backward_kernel(const __grid_constant__ struct gelu_gate_backward_args a)
{
	const struct gelu_gate_args &f = a.forward;
	const int64_t index = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
	const int64_t n = index / f.width, strided = n * f.gate_stride + index % f.width;
	float gate[8], x[8], dout[8];

	if (n >= f.n_tokens)
		return;
	load8(gate, static_cast<const bf16 *>(f.gate) + strided);
	load8(x, static_cast<const bf16 *>(f.x) + index);
	load8(dout, static_cast<const bf16 *>(a.dout) + index);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float z = gate[i], square = CUBE * z * z;
		const float u = TWICE_ROOT * z * (1.0f + square), s = sigmoid(u);
		const float slope = TWICE_ROOT * fmaf(3.0f, square, 1.0f);

		gate[i] = dout[i] * x[i] * fmaf(z * s * sigmoid(-u), slope, s);
		x[i] = dout[i] * z * s;
	}
	store8(static_cast<bf16 *>(a.dgate) + strided, gate);
	store8(static_cast<bf16 *>(a.dx) + index, x);
}

extern "C" const char *portable_gelu_gate_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct gelu_gate_backward_args *>(args);
	const struct gelu_gate_args *f = &a->forward;

	return either(check_widths(f->width, f->gate_stride), check_aligned(f->gate, a->dgate));
}

extern "C" enum status portable_gelu_gate_backward(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct gelu_gate_backward_args *>(args);
	const int64_t threads = a->forward.n_tokens * (a->forward.width / 8);

	return launch_each(device, "gelu_gate_backward", gelu_gate_backward_kernel, threads,
	                   THREADS, *a);
}
