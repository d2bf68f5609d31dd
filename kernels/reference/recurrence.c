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

/* One channel of one sequence, last token first; returns the gradient of h0, and adds to that of
 * the bias (or NULL). */
static double channel_backward(const struct device *device,
                               const struct recurrence_backward_args *a, int64_t b, int64_t i,
                               double *dgate_bias)
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
		double dout = at(&a->dout, b, t, 0)[i], x = at(&f->x, b, t, 0)[i], dgate;

		if (f->z.data)
			at(&a->dz, b, t, 0)[i] = dout * at(h, b, t, 0)[i] * z * (1 - z);
		dh += dout * z;
		at(&a->dx, b, t, 0)[i] = c.weight * dh;
		if (f->form == GATE_SIGMOID)
			dgate = dh * (before - x) * c.decay * c.weight;
		else
			dgate = has_before ? dh * before * c.decay : 0;
		if (dgate_bias)
			*dgate_bias += dgate;
		at(&a->dgate, b, t, 0)[i] =
		        dgate + (a->dgate_base.data ? at(&a->dgate_base, b, t, 0)[i] : 0);
		dh *= c.decay;
	}
	return dh;
}

enum status reference_recurrence_backward(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_backward_args *a = args;
	const struct recurrence_args *f = &a->forward;
	double *dgate_bias = f->gate_bias ? wide_out(a->dgate_bias) : NULL;

	if (dgate_bias)
		zero(f->d_model, dgate_bias);
		/* A channel's share of its bias is summed over the sequences in a fixed order. */
#pragma omp parallel for
	for (int64_t i = 0; i < f->d_model; i++)
		for (int64_t b = 0; b < f->batch; b++) {
			double dh0 = channel_backward(device, a, b, i,
			                              dgate_bias ? &dgate_bias[i] : NULL);

			if (a->dh0)
				wide_out(a->dh0)[b * f->d_model + i] = dh0;
		}
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
