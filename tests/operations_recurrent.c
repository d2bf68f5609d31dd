/* Cases of the linear recurrence. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/operations.h"

/* A recurrence's tensors, arguments and reference. */
struct recurrence_trial {
	struct recurrence_args args;
	struct reference_recurrence reference;
	int64_t count; /* B*T*D */
	struct tensor *x, *gate, *z, *gate_bias, *h0, *h, *out, *h_final;
};

/* Gate logits, or log decays from 0 to -20. */
static struct tensor *any_gate(struct trial *trial, enum gate_form form, int64_t batch,
                               int64_t seq_len, int64_t width)
{
	int64_t count = batch * seq_len * width;
	double *values = random_doubles(&trial->random, count, 3);
	double depth = pow(10, random_uniform(&trial->random, -2, 1));
	struct tensor *gate;

	for (int64_t i = 0; form == GATE_LOG_DECAY && i < count; i++)
		values[i] = fmax(-20, -depth * fabs(values[i]));
	gate = trial_input_values(trial, batch, seq_len, 1, width, values);
	free(values);
	return gate;
}

/* A recurrence of these sizes; `train`: with all that a backward reads. */
static struct recurrence_trial recurrence_of(struct trial *trial, int64_t batch, int64_t n,
                                             int64_t width, bool train)
{
	struct random *random = &trial->random;
	struct recurrence_trial x = {0};
	struct recurrence_args *a = &x.args;

	a->form = random_bool(random) ? GATE_SIGMOID : GATE_LOG_DECAY;
	a->batch = batch;
	a->seq_len = n;
	a->d_model = width;
	x.count = batch * n * width;
	x.x = trial_input(trial, batch, n, 1, width, 1);
	x.gate = any_gate(trial, a->form, batch, n, width);
	if (random_bool(random))
		x.z = trial_input(trial, batch, n, 1, width, 2);
	if (a->form == GATE_SIGMOID && random_bool(random))
		x.gate_bias = trial_flat_input(trial, DTYPE_F32, 1, width, 3);
	if (random_bool(random))
		x.h0 = trial_flat_input(trial, DTYPE_F32, batch, width, 1);
	if (random_bool(random) || (train && x.z))
		x.h = trial_output(trial, batch, n, 1, width);
	if (random_bool(random))
		x.h_final = trial_flat_output(trial, DTYPE_F32, batch, width);
	x.out = trial_output(trial, batch, n, 1, width);
	trial_describe(trial, "form %d, B %ld, T %ld, D %ld, z %d, bias %d, h0 %d, h %d",
	               (int)a->form, (long)batch, (long)n, (long)width, x.z != NULL,
	               x.gate_bias != NULL, x.h0 != NULL, x.h != NULL);
	a->x = view_of(x.x);
	a->gate = view_of(x.gate);
	a->z = view_of(x.z);
	a->gate_bias = data_of(x.gate_bias);
	a->h0 = data_of(x.h0);
	a->h = view_of(x.h);
	a->out = view_of(x.out);
	a->h_final = data_of(x.h_final);
	x.reference = (struct reference_recurrence){
	        batch,           n,
	        width,           a->form,
	        x.x->values,     x.gate->values,
	        values_of(x.z),  values_of(x.gate_bias),
	        values_of(x.h0),
	};
	return x;
}

static struct recurrence_trial new_recurrence(struct trial *trial, bool train)
{
	struct random *random = &trial->random;
	/* Most are short; a few have many tiles of time, as kernels cut it. */
	bool is_long = !train && random_integer(random, 0, 4) == 0;
	int64_t batch = random_integer(random, 1, is_long ? 2 : 4);
	int64_t n = is_long ? random_integer(random, 200, 6000) : any_length(trial, 200);
	int64_t width = any_width(trial, is_long ? 80 : 300);

	return recurrence_of(trial, batch, n, width, train);
}

static bool run_recurrence(struct trial *trial, struct recurrence_trial *x)
{
	double *out = trial_doubles(trial, x->count), *h = trial_doubles(trial, x->count);
	double *h_final = trial_doubles(trial, x->args.batch * x->args.d_model);

	reference_recurrence_forward(&x->reference, out, h, h_final);
	if (!trial_run(trial, OP_RECURRENCE, &x->args))
		return false;
	trial_check(trial, x->out, "out", out, trial->tolerance);
	if (x->h)
		trial_check(trial, x->h, "h", h, trial->tolerance);
	if (x->h_final)
		trial_check(trial, x->h_final, "h_final", h_final, trial->tolerance);
	return true;
}

static bool recurrence_case(struct trial *trial)
{
	struct recurrence_trial x = new_recurrence(trial, false);

	return run_recurrence(trial, &x);
}

/* Errors must not grow with time. */
static bool million_tokens_case(struct trial *trial)
{
	if (trial->with_nan)
		return true;
	struct recurrence_trial x = recurrence_of(trial, 1, 1 << 20, 8, false);

	return run_recurrence(trial, &x);
}

static bool recurrence_backward_case(struct trial *trial)
{
	struct recurrence_trial x = new_recurrence(trial, true);
	int64_t batch = x.args.batch, n = x.args.seq_len, width = x.args.d_model;

	if (!run_recurrence(trial, &x))
		return false;
	struct tensor *dout = trial_input(trial, batch, n, 1, width, 1);
	struct tensor *dx = trial_output(trial, batch, n, 1, width);
	struct tensor *dgate = trial_output(trial, batch, n, 1, width);
	struct tensor *dz = x.z ? trial_output(trial, batch, n, 1, width) : NULL;
	struct tensor *dbias = x.gate_bias ? trial_flat_output(trial, DTYPE_F32, 1, width) : NULL;
	struct tensor *dh0 = random_bool(&trial->random)
	                             ? trial_flat_output(trial, DTYPE_F32, batch, width)
	                             : NULL;
	struct reference_recurrence_grads grads = {
	        trial_doubles(trial, x.count), trial_doubles(trial, x.count),
	        trial_doubles(trial, x.count), trial_doubles(trial, width),
	        trial_doubles(trial, batch * width)};
	if (reference_recurrence_backward(&x.reference, dout->values, &grads) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_RECURRENCE_BACKWARD,
	               &(struct recurrence_backward_args){x.args, view_of(dout), view_of(dx),
	                                                  view_of(dgate), view_of(dz),
	                                                  data_of(dbias), data_of(dh0)}))
		return false;
	trial_check(trial, dx, "dx", grads.dx, trial->gradient_tolerance);
	trial_check(trial, dgate, "dgate", grads.dgate, trial->gradient_tolerance);
	if (dz)
		trial_check(trial, dz, "dz", grads.dz, trial->gradient_tolerance);
	trial->floor = 0.05; /* a sum over all tokens may happen to be small */
	if (dbias)
		trial_check(trial, dbias, "dgate_bias", grads.dgate_bias,
		            trial->gradient_tolerance);
	if (dh0)
		trial_check(trial, dh0, "dh0", grads.dh0, trial->gradient_tolerance);
	return true;
}

static bool recurrence_step_case(struct trial *trial)
{
	struct random *random = &trial->random;
	enum gate_form form = random_bool(random) ? GATE_SIGMOID : GATE_LOG_DECAY;
	int64_t batch = random_integer(random, 1, 9), width = any_width(trial, 300);
	bool bias = form == GATE_SIGMOID && random_bool(random);
	struct tensor *x = trial_input(trial, batch, 1, 1, width, 1);
	struct tensor *gate = any_gate(trial, form, batch, 1, width);
	struct tensor *z = random_bool(random) ? trial_input(trial, batch, 1, 1, width, 2) : NULL;
	struct tensor *gate_bias = bias ? trial_flat_input(trial, DTYPE_F32, 1, width, 2) : NULL;
	struct tensor *h = trial_flat_input(trial, DTYPE_F32, batch, width, 1);
	struct tensor *out = trial_output(trial, batch, 1, 1, width);
	double *expected = trial_doubles(trial, batch * width);
	double *h_after = trial_doubles(trial, batch * width);
	struct reference_recurrence r = {batch,        1,
	                                 width,        form,
	                                 x->values,    gate->values,
	                                 values_of(z), values_of(gate_bias),
	                                 h->values};

	trial_describe(trial, "form %d, B %ld, D %ld, z %d, bias %d", (int)form, (long)batch,
	               (long)width, z != NULL, bias);
	reference_recurrence_forward(&r, expected, NULL, h_after);
	trial_expect_written(h);
	if (!trial_run(trial, OP_RECURRENCE_STEP,
	               &(struct recurrence_step_args){batch, width, form, view_of(x), view_of(gate),
	                                              view_of(z), data_of(gate_bias), data_of(h),
	                                              view_of(out)}))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	trial_check(trial, h, "h", h_after, trial->tolerance);
	return true;
}

const struct operation_test recurrent_tests[] = {
        {OP_RECURRENCE, 100, recurrence_case},
        {OP_RECURRENCE, 2, million_tokens_case},
        {OP_RECURRENCE_BACKWARD, 100, recurrence_backward_case},
        {OP_RECURRENCE_STEP, 50, recurrence_step_case},
        {0},
};
