/*
 * The linear recurrence h_t = a_t h_{t-1} + u_t, channel by channel. Time is
 * cut into segments when channels alone do not fill the device: each segment
 * is first reduced to its decay and its state from zero, a short scan carries
 * states across segments, and each segment is then run with its true start.
 * A thread owns eight channels of one segment.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

enum { THREADS = 128, ROWS = 4, MIN_SEGMENT = 32, THREADS_PER_SM = 1024 };

/* How time is cut, and what one segment tells another: [n, B, D] each. */
struct segments {
	int64_t length, count;
	float *decay, *state, *start;
};

static struct segments cut(const struct device *device, const struct recurrence_args *a,
                           void *workspace)
{
	const int64_t per_sequence = divide_up(a->batch * a->d_model, 8);
	const int64_t wanted =
	        divide_up((int64_t)THREADS_PER_SM * cuda_sm_count(device), per_sequence);
	const int64_t most = divide_up(a->seq_len, MIN_SEGMENT);
	struct segments s;

	s.length = divide_up(a->seq_len, wanted < most ? wanted : most);
	s.count = divide_up(a->seq_len, s.length);
	s.decay = static_cast<float *>(workspace);
	s.state = s.decay + s.count * a->batch * a->d_model;
	s.start = s.state + s.count * a->batch * a->d_model;
	return s;
}

/* The segment, sequence and first channel of a thread; false if it has none. */
struct place {
	int64_t segment, b, channel, first, end;
};

static __device__ __forceinline__ bool find_place(struct place &p, const struct recurrence_args &a,
                                                  const struct segments &s)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t row = index / (a.d_model / 8);

	p.channel = index % (a.d_model / 8) * 8;
	p.b = row % a.batch;
	p.segment = row / a.batch;
	p.first = p.segment * s.length;
	p.end = min(p.first + s.length, a.seq_len);
	return p.segment < s.count;
}

/* h = decay h + input of one channel and token. */
static __device__ __forceinline__ void coefficients(float &decay, float &input, float gate,
                                                    float bias, float x, enum gate_form form)
{
	if (form == GATE_SIGMOID) {
		decay = sigmoid(gate + bias);
		input = sigmoid(-gate - bias) * x;
	} else {
		decay = __expf(gate);
		input = x;
	}
}

static __device__ __forceinline__ void load_bias(float (&bias)[8], const float *from,
                                                 int64_t channel)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		bias[i] = from ? from[channel + i] : 0.0f;
}

/* A segment's product of decays, and its last state when it starts from zero. */
static __global__ void __launch_bounds__(THREADS)
        reduce_kernel(const __grid_constant__ struct recurrence_args a,
                      const __grid_constant__ struct segments s)
{
	struct place p;
	float bias[8], product[8], h[8];

	if (!find_place(p, a, s))
		return;
	load_bias(bias, a.gate_bias, p.channel);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		product[i] = 1.0f;
		h[i] = 0.0f;
	}
	for (int64_t t = p.first; t < p.end; t += ROWS) {
		vector8 x[ROWS], gate[ROWS];

#pragma unroll
		for (int j = 0; j < ROWS; j++) {
			x[j] = load8(at(a.x, p.b, min(t + j, p.end - 1), 0) + p.channel);
			gate[j] = load8(at(a.gate, p.b, min(t + j, p.end - 1), 0) + p.channel);
		}
#pragma unroll
		for (int j = 0; j < ROWS; j++) {
			float xs[8], gates[8], decay, input;

			if (t + j >= p.end)
				break;
			unpack8(xs, x[j]);
			unpack8(gates, gate[j]);
#pragma unroll
			for (int i = 0; i < 8; i++) {
				coefficients(decay, input, gates[i], bias[i], xs[i], a.form);
				product[i] *= decay;
				h[i] = decay * h[i] + input;
			}
		}
	}
	const int64_t offset = (p.segment * a.batch + p.b) * a.d_model + p.channel;
	store8f(s.decay + offset, product);
	store8f(s.state + offset, h);
}

/* The state with which each segment starts. */
static __global__ void __launch_bounds__(THREADS)
        carry_kernel(const __grid_constant__ struct segments s, const float *h0, int64_t width)
{
	const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;

	if (i >= width)
		return;
	float h = h0 ? h0[i] : 0.0f;
#pragma unroll 8
	for (int64_t segment = 0; segment < s.count; segment++) {
		const int64_t offset = segment * width + i;

		s.start[offset] = h;
		h = __ldg(s.decay + offset) * h + __ldg(s.state + offset);
	}
}

/* One token: advances h, and writes what is wanted of it. */
static __device__ __forceinline__ void emit(const struct recurrence_args &a, const struct place &p,
                                            int64_t t, float (&h)[8], const float (&bias)[8],
                                            const vector8 &x, const vector8 &gate, const vector8 &z)
{
	float xs[8], gates[8], zs[8], decay, input;

	unpack8(xs, x);
	unpack8(gates, gate);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		coefficients(decay, input, gates[i], bias[i], xs[i], a.form);
		h[i] = decay * h[i] + input;
	}
	if (a.h.data)
		store8(at(a.h, p.b, t, 0) + p.channel, h);
	if (!a.z.data) {
		store8(at(a.out, p.b, t, 0) + p.channel, h);
		return;
	}
	unpack8(zs, z);
#pragma unroll
	for (int i = 0; i < 8; i++)
		zs[i] = sigmoid(zs[i]) * h[i];
	store8(at(a.out, p.b, t, 0) + p.channel, zs);
}

static __global__ void __launch_bounds__(THREADS)
        apply_kernel(const __grid_constant__ struct recurrence_args a,
                     const __grid_constant__ struct segments s)
{
	struct place p;
	float bias[8], h[8];

	if (!find_place(p, a, s))
		return;
	load_bias(bias, a.gate_bias, p.channel);
	load_bias(h, s.count > 1 ? s.start + p.segment * a.batch * a.d_model : a.h0,
	          p.b * a.d_model + p.channel);
	for (int64_t t = p.first; t < p.end; t += ROWS) {
		vector8 x[ROWS], gate[ROWS], z[ROWS] = {};

#pragma unroll
		for (int j = 0; j < ROWS; j++) {
			const int64_t row = min(t + j, p.end - 1);

			x[j] = load8(at(a.x, p.b, row, 0) + p.channel);
			gate[j] = load8(at(a.gate, p.b, row, 0) + p.channel);
			if (a.z.data)
				z[j] = load8(at(a.z, p.b, row, 0) + p.channel);
		}
#pragma unroll
		for (int j = 0; j < ROWS; j++)
			if (t + j < p.end)
				emit(a, p, t + j, h, bias, x[j], gate[j], z[j]);
	}
	if (a.h_final && p.end == a.seq_len)
		store8f(a.h_final + p.b * a.d_model + p.channel, h);
}

extern "C" const char *portable_recurrence_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct recurrence_args *>(args);

	if (!is_known_gate(a->form))
		return "an unknown form of gate";
	return either(check_widths(a->d_model),
	              check_aligned(&a->x, &a->gate, &a->z, &a->h, &a->out));
}

extern "C" size_t portable_recurrence_workspace(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct recurrence_args *>(args);
	const struct segments s = cut(device, a, NULL);

	return s.count == 1 ? 0 : 3 * (size_t)(s.count * a->batch * a->d_model) * sizeof(float);
}

extern "C" enum status portable_recurrence(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct recurrence_args *>(args);
	const struct segments s = cut(device, a, workspace);
	const int64_t width = a->batch * a->d_model;
	const dim3 grid((unsigned)divide_up(s.count * a->batch * (a->d_model / 8), THREADS));
	enum status status = STATUS_OK;

	if (s.count > 1) {
		status = launch(device, "recurrence", reduce_kernel, grid, THREADS, 0, *a, s);
		if (status == STATUS_OK)
			status = launch_each(device, "recurrence", carry_kernel, width, THREADS, s,
			                     a->h0, width);
	}
	if (status == STATUS_OK)
		status = launch(device, "recurrence", apply_kernel, grid, THREADS, 0, *a, s);
	return status;
}

static __global__ void __launch_bounds__(THREADS)
        step_kernel(const __grid_constant__ struct recurrence_step_args a)
{
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t b = index / (a.d_model / 8), channel = index % (a.d_model / 8) * 8;
	float bias[8], x[8], gate[8], z[8], h[8], decay, input;

	if (b >= a.batch)
		return;
	load_bias(bias, a.gate_bias, channel);
	load8(x, at(a.x, b, 0, 0) + channel);
	load8(gate, at(a.gate, b, 0, 0) + channel);
	load8f(h, a.h + b * a.d_model + channel);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		coefficients(decay, input, gate[i], bias[i], x[i], a.form);
		h[i] = decay * h[i] + input;
	}
	store8f(a.h + b * a.d_model + channel, h);
	if (a.z.data) {
		load8(z, at(a.z, b, 0, 0) + channel);
#pragma unroll
		for (int i = 0; i < 8; i++)
			h[i] *= sigmoid(z[i]);
	}
	store8(at(a.out, b, 0, 0) + channel, h);
}

extern "C" const char *portable_recurrence_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct recurrence_step_args *>(args);

	if (!is_known_gate(a->form))
		return "an unknown form of gate";
	return either(check_widths(a->d_model), check_aligned(&a->x, &a->gate, &a->z, &a->out));
}

extern "C" enum status portable_recurrence_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct recurrence_step_args *>(args);
	const dim3 grid((unsigned)divide_up(a->batch * (a->d_model / 8), THREADS));

	return launch(device, "recurrence_step", step_kernel, grid, THREADS, 0, *a);
}
