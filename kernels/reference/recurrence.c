/* fp64 linear recurrence, one channel after another. */
#include "kernels/reference/reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* h_t = decay * h_{t-1} + weight * x_t. */
struct coefficients {
	double decay, weight;
};

static struct coefficients coefficients(const struct reference_recurrence *r, int64_t at,
                                        int64_t channel)
{
	if (r->form == GATE_LOG_DECAY)
		return (struct coefficients){exp(r->gate[at]), 1};
	double g = reference_sigmoid(r->gate[at] + (r->gate_bias ? r->gate_bias[channel] : 0));
	return (struct coefficients){g, 1 - g};
}

void reference_recurrence_forward(const struct reference_recurrence *r, double *out, double *h,
                                  double *h_final)
{
	if (reference_in_use()) {
		reference_in_use()->recurrence_forward(r, out);
		return;
	}
	int64_t width = r->d_model;

#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < r->batch; b++)
		for (int64_t i = 0; i < width; i++) {
			double state = r->h0 ? r->h0[b * width + i] : 0;

			for (int64_t t = 0; t < r->seq_len; t++) {
				int64_t at = (b * r->seq_len + t) * width + i;
				struct coefficients c = coefficients(r, at, i);

				state = c.decay * state + c.weight * r->x[at];
				if (h)
					h[at] = state;
				out[at] = (r->z ? reference_sigmoid(r->z[at]) : 1) * state;
			}
			if (h_final)
				h_final[b * width + i] = state;
		}
}

/* One channel of one sequence, last token first; returns the gradient of h0. */
static double channel_backward(const struct reference_recurrence *r, const double *dout,
                               const double *h, const struct reference_recurrence_grads *grads,
                               int64_t b, int64_t i)
{
	int64_t width = r->d_model;
	double dh = 0; /* flowing in from token t + 1 */

	for (int64_t t = r->seq_len - 1; t >= 0; t--) {
		int64_t at = (b * r->seq_len + t) * width + i;
		/* Without a state before the first token nothing flows through its decay. */
		bool has_before = t > 0 || r->h0;
		double before = t > 0 ? h[at - width] : has_before ? r->h0[b * width + i] : 0;
		struct coefficients c = coefficients(r, at, i);
		double z = r->z ? reference_sigmoid(r->z[at]) : 1;

		if (r->z)
			grads->dz[at] = dout[at] * h[at] * z * (1 - z);
		dh += dout[at] * z;
		grads->dx[at] = c.weight * dh;
		if (r->form == GATE_SIGMOID)
			grads->dgate[at] = dh * (before - r->x[at]) * c.decay * c.weight;
		else
			grads->dgate[at] = has_before ? dh * before * c.decay : 0;
		dh *= c.decay;
	}
	return dh;
}

enum status reference_recurrence_backward(const struct reference_recurrence *r, const double *dout,
                                          const struct reference_recurrence_grads *grads)
{
	int64_t width = r->d_model;
	size_t count = (size_t)(r->batch * r->seq_len * width);
	double *h = malloc(2 * count * sizeof *h);

	if (!h)
		return status_set(STATUS_OOM, "reference: no memory for %zu doubles", 2 * count);
	reference_recurrence_forward(r, h + count, h, NULL);
#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < r->batch; b++)
		for (int64_t i = 0; i < width; i++) {
			double dh0 = channel_backward(r, dout, h, grads, b, i);

			if (grads->dh0)
				grads->dh0[b * width + i] = dh0;
		}
	if (r->gate_bias) {
		memset(grads->dgate_bias, 0, sizeof(double) * (size_t)width);
		for (size_t at = 0; at < count; at++)
			grads->dgate_bias[at % (size_t)width] += grads->dgate[at];
	}
	free(h);
	return STATUS_OK;
}
