/* Cases of what the layers of the linear-attention family do besides their recurrence: the short
 * convolution, time step, forget gate, the norm behind a gate, one token's rotation. */
#include <stdlib.h>
#include <string.h>

#include "tests/operations.h"

static int64_t any_stride(struct trial *trial, int64_t width)
{
	return width + 8 * random_integer(&trial->random, 0, 2);
}

/* ---- short convolution ---- */

struct conv_trial {
	int64_t batch, seq_len, channels, stride;
	struct tensor *x, *weight, *bias;
	struct reference_conv reference;
};

static struct conv_trial new_conv(struct trial *trial, int64_t longest)
{
	struct conv_trial c = {.batch = random_integer(&trial->random, 1, 3),
	                       .seq_len = any_length(trial, longest),
	                       .channels = any_width(trial, 150)};

	c.stride = any_stride(trial, c.channels);
	c.x = trial_rows_input(trial, c.batch * c.seq_len, c.channels, c.stride, 1);
	c.weight = trial_flat_input(trial, DTYPE_F32, c.channels, CONV_WIDTH, 1);
	c.bias = trial_flat_input(trial, DTYPE_F32, 1, c.channels, 1);
	c.reference = (struct reference_conv){.batch = c.batch,
	                                      .seq_len = c.seq_len,
	                                      .channels = c.channels,
	                                      .n_readers = 1,
	                                      .x = c.x->values,
	                                      .weight = c.weight->values,
	                                      .bias = c.bias->values};
	trial_describe(trial, "B %ld, T %ld, %ld channels, stride %ld", (long)c.batch,
	               (long)c.seq_len, (long)c.channels, (long)c.stride);
	return c;
}

static struct short_conv_args conv_args(const struct conv_trial *c)
{
	return (struct short_conv_args){.batch = c->batch,
	                                .seq_len = c->seq_len,
	                                .channels = c->channels,
	                                .x_stride = c->stride,
	                                .x = data_of(c->x),
	                                .weight = data_of(c->weight),
	                                .bias = data_of(c->bias)};
}

static bool short_conv_case(struct trial *trial)
{
	struct conv_trial c = new_conv(trial, 70);
	enum dtype act = trial->backend->activation;
	int64_t n = c.batch * c.seq_len, kept = c.batch * CONV_HISTORY;
	struct tensor *out = trial_flat_output(trial, act, n, c.channels);
	struct tensor *history = random_bool(&trial->random)
	                                 ? trial_flat_output(trial, act, kept, c.channels)
	                                 : NULL;
	double *expected = trial_doubles(trial, n * c.channels);
	double *expected_history = trial_doubles(trial, kept * c.channels);
	struct short_conv_args args = conv_args(&c);

	args.out = data_of(out);
	args.history = data_of(history);
	reference_short_conv(&c.reference, expected, expected_history);
	if (!trial_run(trial, OP_SHORT_CONV, &args))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	if (history)
		trial_check(trial, history, "history", expected_history, trial->tolerance);
	return true;
}

static bool short_conv_backward_case(struct trial *trial)
{
	struct conv_trial c = new_conv(trial, 70);
	int64_t n = c.batch * c.seq_len, readers = random_integer(&trial->random, 1, 3);
	struct tensor *dout =
	        trial_flat_input(trial, trial->backend->activation, n, readers * c.channels, 1);
	struct tensor *dx = trial_rows_output(trial, n, c.channels, c.stride);
	struct tensor *dweight = trial_flat_output(trial, DTYPE_F32, c.channels, CONV_WIDTH);
	struct tensor *dbias = trial_flat_output(trial, DTYPE_F32, 1, c.channels);
	double *expected = trial_doubles(trial, n * c.channels);
	double *dw = trial_doubles(trial, c.channels * CONV_WIDTH);
	double *db = trial_doubles(trial, c.channels);

	c.reference.n_readers = readers;
	reference_short_conv_backward(&c.reference, dout->values, expected, dw, db);
	if (!trial_run(trial, OP_SHORT_CONV_BACKWARD,
	               &(struct short_conv_backward_args){conv_args(&c), readers, data_of(dout),
	                                                  data_of(dx), data_of(dweight),
	                                                  data_of(dbias)}))
		return false;
	trial_check(trial, dx, "dx", expected, trial->gradient_tolerance);
	trial_check(trial, dweight, "dweight", dw, trial->gradient_tolerance);
	trial_check(trial, dbias, "dbias", db, trial->gradient_tolerance);
	return true;
}

static bool short_conv_step_case(struct trial *trial)
{
	struct conv_trial c = new_conv(trial, 1);
	enum dtype act = trial->backend->activation;
	int64_t kept = c.batch * CONV_HISTORY;
	struct tensor *history = trial_flat_input(trial, act, kept, c.channels, 1);
	struct tensor *out = trial_flat_output(trial, act, c.batch, c.channels);
	double *expected = trial_doubles(trial, c.batch * c.channels);
	double *after = trial_doubles(trial, kept * c.channels);

	c.reference.history = history->values;
	reference_short_conv(&c.reference, expected, after);
	trial_expect_written(history);
	if (!trial_run(trial, OP_SHORT_CONV_STEP,
	               &(struct short_conv_step_args){c.batch, c.channels, c.stride, data_of(c.x),
	                                              data_of(c.weight), data_of(c.bias),
	                                              data_of(history), data_of(out)}))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	trial_check(trial, history, "history", after, trial->tolerance);
	return true;
}

/* ---- time step ---- */

struct time_step_trial {
	int64_t n, heads, d, logit_stride, x_stride;
	struct tensor *logit, *bias, *log_rate, *x;
};

static struct time_step_trial new_time_step(struct trial *trial)
{
	struct time_step_trial s = {.n = any_length(trial, 60),
	                            .heads = random_integer(&trial->random, 1, 9),
	                            .d = any_width(trial, 40)};

	s.logit_stride = any_stride(trial, s.heads);
	s.x_stride = any_stride(trial, s.heads * s.d);
	s.logit = trial_rows_input(trial, s.n, s.heads, s.logit_stride, 4);
	s.bias = trial_flat_input(trial, DTYPE_F32, 1, s.heads, 1);
	s.log_rate = trial_flat_input(trial, DTYPE_F32, 1, s.heads, 1);
	s.x = trial_rows_input(trial, s.n, s.heads * s.d, s.x_stride, 1);
	trial_describe(trial, "N %ld, H %ld, d %ld, strides %ld, %ld", (long)s.n, (long)s.heads,
	               (long)s.d, (long)s.logit_stride, (long)s.x_stride);
	return s;
}

static struct time_step_args time_step_args(const struct time_step_trial *s)
{
	return (struct time_step_args){.n_tokens = s->n,
	                               .n_heads = s->heads,
	                               .d_head = s->d,
	                               .logit_stride = s->logit_stride,
	                               .x_stride = s->x_stride,
	                               .logit = data_of(s->logit),
	                               .bias = data_of(s->bias),
	                               .log_rate = data_of(s->log_rate),
	                               .x = data_of(s->x)};
}

static bool time_step_case(struct trial *trial)
{
	struct time_step_trial s = new_time_step(trial);
	enum dtype act = trial->backend->activation;
	struct tensor *log_decay = trial_flat_output(trial, act, s.n, s.heads);
	struct tensor *out = trial_flat_output(trial, act, s.n, s.heads * s.d);
	double *expected = trial_doubles(trial, s.n * s.heads * s.d);
	double *expected_decay = trial_doubles(trial, s.n * s.heads);
	struct time_step_args args = time_step_args(&s);

	args.log_decay = data_of(log_decay);
	args.out = data_of(out);
	reference_time_step(s.n, s.heads, s.d, s.logit->values, s.bias->values, s.log_rate->values,
	                    s.x->values, expected_decay, expected);
	if (!trial_run(trial, OP_TIME_STEP, &args))
		return false;
	trial_check(trial, log_decay, "log_decay", expected_decay, trial->tolerance);
	trial_check(trial, out, "out", expected, trial->tolerance);
	return true;
}

static bool time_step_backward_case(struct trial *trial)
{
	struct time_step_trial s = new_time_step(trial);
	enum dtype act = trial->backend->activation;
	int64_t rows = s.n * s.heads, count = rows * s.d;
	struct tensor *dlog_decay = trial_flat_input(trial, act, s.n, s.heads, 1);
	struct tensor *dout = trial_flat_input(trial, act, s.n, s.heads * s.d, 1);
	bool has_skip = random_bool(&trial->random), in_place = random_bool(&trial->random);
	struct tensor *dskip =
	        has_skip ? trial_flat_input(trial, act, s.n, s.heads * s.d, 1) : NULL;
	struct tensor *dlogit = trial_rows_output(trial, s.n, s.heads, s.logit_stride);
	struct tensor *dx =
	        has_skip && in_place ? dskip : trial_flat_output(trial, act, s.n, s.heads * s.d);
	struct tensor *dbias = trial_flat_output(trial, DTYPE_F32, 1, s.heads);
	struct tensor *dlog_rate = trial_flat_output(trial, DTYPE_F32, 1, s.heads);
	double *expected = trial_doubles(trial, count),
	       *expected_logit = trial_doubles(trial, rows);
	double *db = trial_doubles(trial, s.heads), *dr = trial_doubles(trial, s.heads);

	reference_time_step_backward(s.n, s.heads, s.d, s.logit->values, s.bias->values,
	                             s.log_rate->values, s.x->values, dlog_decay->values,
	                             dout->values, expected_logit, db, dr, expected);
	for (int64_t i = 0; has_skip && i < count; i++)
		expected[i] += dskip->values[i];
	if (dx == dskip && dx)
		trial_expect_written(dx);
	if (!trial_run(trial, OP_TIME_STEP_BACKWARD,
	               &(struct time_step_backward_args){time_step_args(&s), data_of(dlog_decay),
	                                                 data_of(dout), data_of(dskip),
	                                                 data_of(dlogit), data_of(dx),
	                                                 data_of(dbias), data_of(dlog_rate)}))
		return false;
	trial_check(trial, dx, "dx", expected, trial->gradient_tolerance);
	trial->floor = 0.05; /* sums over channels and tokens may happen to be small */
	trial_check(trial, dlogit, "dlogit", expected_logit, trial->gradient_tolerance);
	trial_check(trial, dbias, "dbias", db, trial->gradient_tolerance);
	trial_check(trial, dlog_rate, "dlog_rate", dr, trial->gradient_tolerance);
	return true;
}

/* ---- forget gate ---- */

struct forget_trial {
	int64_t n, width, stride;
	bool has_key;
	struct tensor *logit, *x, *bound;
};

static struct forget_trial new_forget(struct trial *trial)
{
	struct forget_trial f = {.n = any_length(trial, 60),
	                         .width = any_width(trial, 150),
	                         .has_key = random_bool(&trial->random)};
	double scale = random_bool(&trial->random) ? 1 : 6;

	f.stride = any_stride(trial, f.width);
	f.logit = trial_rows_input(trial, f.n, f.width, f.stride, scale);
	f.x = trial_rows_input(trial, f.n, f.width, f.stride, 2);
	f.bound = trial_flat_input(trial, DTYPE_F32, 1, f.width, 3);
	trial_describe(trial, "N %ld, width %ld, stride %ld, key %d", (long)f.n, (long)f.width,
	               (long)f.stride, f.has_key);
	return f;
}

static struct forget_gate_args forget_args(const struct forget_trial *f)
{
	return (struct forget_gate_args){.n_tokens = f->n,
	                                 .width = f->width,
	                                 .stride = f->stride,
	                                 .logit = data_of(f->logit),
	                                 .x = data_of(f->x),
	                                 .bound = data_of(f->bound)};
}

static bool forget_gate_case(struct trial *trial)
{
	struct forget_trial f = new_forget(trial);
	enum dtype act = trial->backend->activation;
	struct tensor *log_decay = trial_flat_output(trial, act, f.n, f.width);
	struct tensor *key = f.has_key ? trial_flat_output(trial, act, f.n, f.width) : NULL;
	struct tensor *out = trial_flat_output(trial, act, f.n, f.width);
	double *decays = trial_doubles(trial, f.n * f.width);
	double *keys = trial_doubles(trial, f.n * f.width);
	double *expected = trial_doubles(trial, f.n * f.width);
	struct forget_gate_args args = forget_args(&f);

	args.log_decay = data_of(log_decay);
	args.key = data_of(key);
	args.out = data_of(out);
	reference_forget_gate(f.n, f.width, f.logit->values, f.bound->values, f.x->values, decays,
	                      f.has_key ? keys : NULL, expected);
	if (!trial_run(trial, OP_FORGET_GATE, &args))
		return false;
	trial_check(trial, log_decay, "log_decay", decays, trial->tolerance);
	trial_check(trial, out, "out", expected, trial->tolerance);
	if (key)
		trial_check(trial, key, "key", keys, trial->tolerance);
	return true;
}

static bool forget_gate_backward_case(struct trial *trial)
{
	struct forget_trial f = new_forget(trial);
	enum dtype act = trial->backend->activation;
	int64_t count = f.n * f.width;
	struct tensor *dlog_decay = trial_flat_input(trial, act, f.n, f.width, 1);
	struct tensor *dout = trial_flat_input(trial, act, f.n, f.width, 1);
	struct tensor *dkey = f.has_key ? trial_flat_input(trial, act, f.n, f.width, 1) : NULL;
	struct tensor *dlogit = trial_rows_output(trial, f.n, f.width, f.stride);
	struct tensor *dx = trial_rows_output(trial, f.n, f.width, f.stride);
	struct tensor *dbound = trial_flat_output(trial, DTYPE_F32, 1, f.width);
	double *expected = trial_doubles(trial, count), *logits = trial_doubles(trial, count);
	double *bounds = trial_doubles(trial, f.width);
	struct forget_gate_args args = forget_args(&f);

	args.key = data_of(dkey); /* not read */
	reference_forget_gate_backward(f.n, f.width, f.logit->values, f.bound->values, f.x->values,
	                               dlog_decay->values, values_of(dkey), dout->values, logits,
	                               bounds, expected);
	if (!trial_run(trial, OP_FORGET_GATE_BACKWARD,
	               &(struct forget_gate_backward_args){args, data_of(dlog_decay), data_of(dout),
	                                                   data_of(dkey), data_of(dlogit),
	                                                   data_of(dx), data_of(dbound)}))
		return false;
	trial_check(trial, dlogit, "dlogit", logits, trial->gradient_tolerance);
	trial_check(trial, dx, "dx", expected, trial->gradient_tolerance);
	trial_check(trial, dbound, "dbound", bounds, trial->gradient_tolerance);
	return true;
}

/* ---- the norm behind a gate ---- */

struct gate_norm_trial {
	struct gate_norm_args args;
	struct reference_gate_norm reference;
	int64_t width, group;
	struct tensor *x, *skip, *skip_weight, *gate, *weight;
};

static struct gate_norm_trial new_gate_norm(struct trial *trial)
{
	struct gate_norm_trial g = {0};
	struct gate_norm_args *a = &g.args;
	struct random *random = &trial->random;

	a->n_tokens = any_length(trial, 60);
	a->n_heads = random_integer(random, 1, 4);
	a->d_head = any_width(trial, 63) + 7 * !trial->narrow;
	a->groups = random_bool(random) ? 1 : a->n_heads;
	a->eps = 1e-5f;
	g.width = a->n_heads * a->d_head;
	g.group = g.width / a->groups;
	a->skip_stride = any_stride(trial, g.width);
	a->gate_stride = any_stride(trial, g.width);
	g.x = trial_flat_input(trial, trial->backend->activation, a->n_tokens, g.width, 1);
	if (random_bool(random)) {
		g.skip = trial_rows_input(trial, a->n_tokens, g.width, a->skip_stride, 1);
		g.skip_weight = trial_flat_input(trial, DTYPE_F32, 1, a->n_heads, 1);
	}
	if (random_bool(random))
		g.gate = trial_rows_input(trial, a->n_tokens, g.width, a->gate_stride, 3);
	g.weight = trial_flat_input(trial, DTYPE_F32, 1, g.group, 1);
	a->x = data_of(g.x);
	a->skip = data_of(g.skip);
	a->skip_weight = data_of(g.skip_weight);
	a->gate = data_of(g.gate);
	a->weight = data_of(g.weight);
	g.reference = (struct reference_gate_norm){
	        a->n_tokens,
	        a->n_heads,
	        a->d_head,
	        a->groups,
	        a->eps,
	        g.x->values,
	        values_of(g.skip),
	        values_of(g.skip_weight),
	        values_of(g.gate),
	        g.weight->values,
	};
	trial_describe(trial, "N %ld, H %ld, d %ld, %ld groups, skip %d, gate %d",
	               (long)a->n_tokens, (long)a->n_heads, (long)a->d_head, (long)a->groups,
	               g.skip != NULL, g.gate != NULL);
	return g;
}

static bool gate_norm_case(struct trial *trial)
{
	struct gate_norm_trial g = new_gate_norm(trial);
	int64_t n = g.args.n_tokens, groups = g.args.groups;
	struct tensor *rstd =
	        random_bool(&trial->random) ? trial_flat_output(trial, DTYPE_F32, n, groups) : NULL;
	struct tensor *out = trial_flat_output(trial, trial->backend->activation, n, g.width);
	double *expected = trial_doubles(trial, n * g.width);
	double *expected_rstd = trial_doubles(trial, n * groups);

	g.args.rstd = data_of(rstd);
	g.args.out = data_of(out);
	if (reference_gate_norm(&g.reference, expected, expected_rstd) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_GATE_NORM, &g.args))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	if (rstd)
		trial_check(trial, rstd, "rstd", expected_rstd, trial->tolerance);
	return true;
}

static bool gate_norm_backward_case(struct trial *trial)
{
	struct gate_norm_trial g = new_gate_norm(trial);
	const struct gate_norm_args *a = &g.args;
	enum dtype act = trial->backend->activation;
	int64_t n = a->n_tokens, count = n * g.width;
	double *forward = trial_doubles(trial, count), *r = trial_doubles(trial, n * a->groups);
	const struct reference_gate_norm_grads grads = {.dx = trial_doubles(trial, count),
	                                                .dskip = trial_doubles(trial, count),
	                                                .dskip_weight =
	                                                        trial_doubles(trial, a->n_heads),
	                                                .dgate = trial_doubles(trial, count),
	                                                .dweight = trial_doubles(trial, g.group)};

	if (reference_gate_norm(&g.reference, forward, r) != STATUS_OK)
		return false;
	struct tensor *rstd = trial_flat_values(trial, DTYPE_F32, n, a->groups, r);
	struct tensor *dout = trial_flat_input(trial, act, n, g.width, 1);
	struct tensor *dx = trial_flat_output(trial, act, n, g.width);
	struct tensor *dskip = g.skip ? trial_flat_output(trial, act, n, g.width) : NULL;
	struct tensor *dskip_weight =
	        g.skip ? trial_flat_output(trial, DTYPE_F32, 1, a->n_heads) : NULL;
	struct tensor *dgate = g.gate ? trial_rows_output(trial, n, g.width, a->gate_stride) : NULL;
	struct tensor *dweight = trial_flat_output(trial, DTYPE_F32, 1, g.group);
	if (reference_gate_norm_backward(&g.reference, dout->values, &grads) != STATUS_OK)
		return false;
	g.args.rstd = data_of(rstd);
	if (!trial_run(trial, OP_GATE_NORM_BACKWARD,
	               &(struct gate_norm_backward_args){g.args, data_of(dout), data_of(dx),
	                                                 data_of(dskip), data_of(dgate),
	                                                 data_of(dskip_weight), data_of(dweight)}))
		return false;
	trial_check(trial, dx, "dx", grads.dx, trial->gradient_tolerance);
	if (dgate)
		trial_check(trial, dgate, "dgate", grads.dgate, trial->gradient_tolerance);
	if (dskip)
		trial_check(trial, dskip, "dskip", grads.dskip, trial->gradient_tolerance);
	trial->floor = 0.05; /* a sum over all tokens may happen to be small */
	trial_check(trial, dweight, "dweight", grads.dweight, trial->gradient_tolerance);
	if (dskip_weight)
		trial_check(trial, dskip_weight, "dskip_weight", grads.dskip_weight,
		            trial->gradient_tolerance);
	return true;
}

/* ---- rotation of one token ---- */

static bool rotate_step_case(struct trial *trial)
{
	int64_t batch = random_integer(&trial->random, 1, 5);
	int64_t heads = random_integer(&trial->random, 1, 4), d = any_head(trial);
	double position = (double)random_integer(&trial->random, 0,
	                                         random_bool(&trial->random) ? 100 : 300000);
	struct tensor *counter = trial_flat_values(trial, DTYPE_I32, 1, 1, &position);
	struct tensor *q = trial_input(trial, batch, 1, heads, d, 1);
	struct tensor *k = trial_input(trial, batch, 1, heads, d, 1);
	double *expected_q = trial_doubles(trial, batch * heads * d);
	double *expected_k = trial_doubles(trial, batch * heads * d);

	trial_describe(trial, "B %ld, H %ld, d %ld, position %g", (long)batch, (long)heads, (long)d,
	               position);
	reference_rotate(batch, 1, heads, d, (int64_t)position, 1, q->values, expected_q);
	reference_rotate(batch, 1, heads, d, (int64_t)position, 1, k->values, expected_k);
	trial_expect_written(q);
	trial_expect_written(k);
	if (!trial_run(trial, OP_ROTATE_STEP,
	               &(struct rotate_step_args){batch, heads, d, data_of(counter), view_of(q),
	                                          view_of(k)}))
		return false;
	trial_check(trial, q, "q", expected_q, trial->tolerance);
	trial_check(trial, k, "k", expected_k, trial->tolerance);
	return true;
}

const struct operation_test family_tests[] = {
        {OP_ROTATE_STEP, 40, rotate_step_case},
        {OP_SHORT_CONV, 50, short_conv_case},
        {OP_SHORT_CONV_BACKWARD, 50, short_conv_backward_case},
        {OP_SHORT_CONV_STEP, 30, short_conv_step_case},
        {OP_TIME_STEP, 40, time_step_case},
        {OP_TIME_STEP_BACKWARD, 40, time_step_backward_case},
        {OP_FORGET_GATE, 50, forget_gate_case},
        {OP_FORGET_GATE_BACKWARD, 50, forget_gate_backward_case},
        {OP_GATE_NORM, 50, gate_norm_case},
        {OP_GATE_NORM_BACKWARD, 50, gate_norm_backward_case},
        {0},
};
