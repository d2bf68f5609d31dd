/* fp64 linear recurrence, one channel after another. */
#include "kernels/reference/shared.h"

/* h_t = decay * h_{t-1} + weight * x_t. */
struct coefficients {
	double decay, weight;
};

static struct coefficients coefficients(const struct device *device,
                                        const struct recurrence_args *a, int64_t b, int64_t t,
                                        int64_t i)
{
	double gate = at(&a->gate, b, t, 0)[i];

	if (a->form == GATE_LOG_DECAY)
		return (struct coefficients){exp(gate), 1};
	double g = sigmoid(gate + (a->gate_bias ? wide(a->gate_bias)[i] : 0)) +
	           decay_jitter(device, (b * a->seq_len + t) * a->d_model + i);
	return (struct coefficients){g, 1 - g};
}

enum status reference_recurrence(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_args *a = args;

#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t i = 0; i < a->d_model; i++) {
			double state = a->h0 ? wide(a->h0)[b * a->d_model + i] : 0;

			for (int64_t t = 0; t < a->seq_len; t++) {
				struct coefficients c = coefficients(device, a, b, t, i);
				double z = a->z.data ? sigmoid(at(&a->z, b, t, 0)[i]) : 1;

				state = c.decay * state + c.weight * at(&a->x, b, t, 0)[i];
				if (a->h.data)
					at(&a->h, b, t, 0)[i] = state;
				at(&a->out, b, t, 0)[i] = z * state;
			}
			if (a->h_final)
				wide_out(a->h_final)[b * a->d_model + i] = state;
		}
	return STATUS_OK;
}

/* One channel of one sequence, last token first; returns the gradient of h0. */
static double channel_backward(const struct device *device,
                               const struct recurrence_backward_args *a, int64_t b, int64_t i)
{
	const struct recurrence_args *f = &a->forward;
	const struct view *h = f->h.data ? &f->h : &f->out;
	double dh = 0; /* flowing in from token t + 1 */

	for (int64_t t = f->seq_len - 1; t >= 0; t--) {
		/* Without a state before the first token nothing flows through its decay. */
		bool has_before = t > 0 || f->h0;
		double before = t > 0        ? at(h, b, t - 1, 0)[i]
		                : has_before ? wide(f->h0)[b * f->d_model + i]
		                             : 0;
		struct coefficients c = coefficients(device, f, b, t, i);
		double z = f->z.data ? sigmoid(at(&f->z, b, t, 0)[i]) : 1;
		double dout = at(&a->dout, b, t, 0)[i], x = at(&f->x, b, t, 0)[i];

		if (f->z.data)
			at(&a->dz, b, t, 0)[i] = dout * at(h, b, t, 0)[i] * z * (1 - z);
		dh += dout * z;
		at(&a->dx, b, t, 0)[i] = c.weight * dh;
		if (f->form == GATE_SIGMOID)
			at(&a->dgate, b, t, 0)[i] = dh * (before - x) * c.decay * c.weight;
		else
			at(&a->dgate, b, t, 0)[i] = has_before ? dh * before * c.decay : 0;
		dh *= c.decay;
	}
	return dh;
}

enum status reference_recurrence_backward(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_backward_args *a = args;
	const struct recurrence_args *f = &a->forward;
	double *dgate_bias = wide_out(a->dgate_bias);

#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t i = 0; i < f->d_model; i++) {
			double dh0 = channel_backward(device, a, b, i);

			if (a->dh0)
				wide_out(a->dh0)[b * f->d_model + i] = dh0;
		}
	if (!f->gate_bias)
		return STATUS_OK;
	zero(f->d_model, dgate_bias);
#pragma omp parallel for reduction(+ : dgate_bias[:f->d_model])
	for (int64_t n = 0; n < f->batch * f->seq_len; n++)
		add_scaled(f->d_model, 1, at(&a->dgate, n / f->seq_len, n % f->seq_len, 0),
		           dgate_bias);
	return STATUS_OK;
}

enum status reference_recurrence_step(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_step_args *a = args;
	const struct recurrence_args token = {
	        .batch = a->batch,
	        .seq_len = 1,
	        .d_model = a->d_model,
	        .form = a->form,
	        .x = a->x,
	        .gate = a->gate,
	        .z = a->z,
	        .gate_bias = a->gate_bias,
	        .h0 = a->h,
	        .out = a->out,
	        .h_final = a->h,
	};

	return reference_recurrence(device, &token, workspace);
}
