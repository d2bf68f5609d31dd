/*
 * Gradients of the linear recurrence, in reverse over time:
 *   lambda_t = dh_t + g_{t+1} lambda_{t+1},  dh_t = dout_t sigmoid(z_t)
 *   dx = (1-g) lambda,  dlogit = lambda (h_{t-1} - x) g (1-g)     (sigmoid gate)
 *   dx = lambda,        dgate  = lambda h_{t-1} exp(gate)         (log decay)
 *   dz = dout h sigmoid'(z)
 * One task per sequence and block of channels, as in the forward.
 */
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/recurrence.h"
#include "kernels/cpu/shares.h"

/* dh = dout sigmoid(z), dz. */
static void output_gate_backward(int64_t n, const float *dout, const float *z, const float *h,
                                 float *dh, float *dz)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++) {
		struct gate_pair g = sigmoid_gate(z[i]);

		dh[i] = dout[i] * g.decay;
		dz[i] = dout[i] * h[i] * g.decay * g.input;
	}
}

/* carry: g_{t+1} lambda_{t+1} in, g_t lambda_t out. h_before NULL: zero. base, which may be dgate,
 * is added to it, or NULL. dbias accumulates. */
static void token_sigmoid(int64_t n, const float *x, const float *gate, const float *bias,
                          const float *h_before, const float *dh, const float *base, float *carry,
                          float *dx, float *dgate, double *dbias)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++) {
		struct gate_pair g = sigmoid_gate(bias ? gate[i] + bias[i] : gate[i]);
		float lambda = dh[i] + carry[i];
		float difference = h_before ? h_before[i] - x[i] : -x[i];
		float dlogit = lambda * difference * g.decay * g.input;

		dx[i] = lambda * g.input;
		dgate[i] = base ? base[i] + dlogit : dlogit;
		carry[i] = lambda * g.decay;
		dbias[i] += dlogit;
	}
}

static void token_log_decay(int64_t n, const float *gate, const float *h_before, const float *dh,
                            const float *base, float *carry, float *dx, float *dgate)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++) {
		float lambda = dh[i] + carry[i];
		float decayed = lambda * exp_f32(gate[i]);

		dx[i] = lambda;
		float dlog = h_before ? decayed * h_before[i] : 0.0f;

		dgate[i] = base ? base[i] + dlog : dlog;
		carry[i] = decayed;
	}
}

/* Scratch rows, [B, D] each. */
struct scratch {
	float *carry, *dh;
	double *dbias;
};

static struct scratch scratch_of(const struct recurrence_args *f, void *workspace)
{
	int64_t n = f->batch * f->d_model;
	double *dbias = workspace;

	return (struct scratch){
	        .carry = (float *)(dbias + n), .dh = (float *)(dbias + n) + n, .dbias = dbias};
}

size_t cpu_recurrence_backward_workspace(const struct device *device, const void *args)
{
	const struct recurrence_args *f = &((const struct recurrence_backward_args *)args)->forward;

	return (sizeof(double) + 2 * sizeof(float)) * (size_t)(f->batch * f->d_model);
}

/* The state before token t, channels from first on; NULL: zero. */
static const float *state_before(const struct recurrence_args *f, int64_t b, int64_t t,
                                 int64_t first)
{
	if (t > 0)
		return view_at(f->h.data ? &f->h : &f->out, b, t - 1, 0) + first;
	return f->h0 ? f->h0 + b * f->d_model + first : NULL;
}

static void run_token(const struct recurrence_backward_args *a, int64_t b, int64_t t, int64_t first,
                      int64_t n, const struct scratch *s)
{
	const struct recurrence_args *f = &a->forward;
	int64_t row = b * f->d_model + first;
	const float *x = view_at(&f->x, b, t, 0) + first;
	const float *gate = view_at(&f->gate, b, t, 0) + first;
	const float *dh = view_at(&a->dout, b, t, 0) + first;
	float *dx = view_at(&a->dx, b, t, 0) + first;
	float *dgate = view_at(&a->dgate, b, t, 0) + first;
	const float *base = a->dgate_base.data ? view_at(&a->dgate_base, b, t, 0) + first : NULL;

	if (f->z.data) {
		output_gate_backward(n, dh, view_at(&f->z, b, t, 0) + first,
		                     view_at(&f->h, b, t, 0) + first, s->dh + row,
		                     view_at(&a->dz, b, t, 0) + first);
		dh = s->dh + row;
	}
	if (f->form == GATE_SIGMOID)
		token_sigmoid(n, x, gate, f->gate_bias ? f->gate_bias + first : NULL,
		              state_before(f, b, t, first), dh, base, s->carry + row, dx, dgate,
		              s->dbias + row);
	else
		token_log_decay(n, gate, state_before(f, b, t, first), dh, base, s->carry + row, dx,
		                dgate);
}

/* All of sequence b, channels first .. first+n. */
static void run_channels(const struct recurrence_backward_args *a, int64_t b, int64_t first,
                         int64_t n, const struct scratch *s)
{
	const struct recurrence_args *f = &a->forward;
	int64_t row = b * f->d_model + first;

	memset(s->carry + row, 0, sizeof *s->carry * (size_t)n);
	memset(s->dbias + row, 0, sizeof *s->dbias * (size_t)n);
	for (int64_t t = f->seq_len - 1; t >= 0; t--)
		run_token(a, b, t, first, n, s);
	if (a->dh0)
		memcpy(a->dh0 + row, s->carry + row, sizeof *s->carry * (size_t)n);
}

enum status cpu_recurrence_backward(struct device *device, const void *args, void *workspace)
{
	const struct recurrence_backward_args *a = args;
	const struct recurrence_args *f = &a->forward;
	struct scratch s = scratch_of(f, workspace);
	int64_t n_blocks = channel_blocks(f->batch, f->d_model);

#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < f->batch * n_blocks; task++) {
		int64_t first = channel_block_start(f->d_model, n_blocks, task % n_blocks);
		int64_t end = channel_block_start(f->d_model, n_blocks, task % n_blocks + 1);

		run_channels(a, task / n_blocks, first, end - first, &s);
	}
	if (f->gate_bias)
		add_shares(s.dbias, f->batch, f->d_model, f->d_model, a->dgate_bias);
	return STATUS_OK;
}
