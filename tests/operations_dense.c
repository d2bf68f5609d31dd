/* Cases of the operations that mix no tokens. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/operations.h"

static const double norm_eps = 1e-6;

/* A magnitude from 1/100 to 100. */
static double any_scale(struct trial *trial)
{
	return pow(10, random_uniform(&trial->random, -2, 2));
}

/* Channels of a norm: with one or two there is no gradient but rounding noise. */
static int64_t any_normed_width(struct trial *trial, int64_t widest)
{
	return any_width(trial, widest - 7) + 7 * !trial->narrow;
}

/* Sizes of a projection: any, or wide ones of a few tokens, for which there are other kernels. */
static void any_projection(struct trial *trial, int64_t *n, int64_t *in, int64_t *out)
{
	bool few = random_integer(&trial->random, 0, 2) == 0;
	int64_t widest = few ? 2600 : 150;

	*n = any_length(trial, few ? 9 : 70);
	*in = any_normed_width(trial, widest);
	*out = any_width(trial, widest);
}

static bool norm_linear_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t n, in, out;

	any_projection(trial, &n, &in, &out);
	bool norm = random_bool(&trial->random), want_rstd = norm && random_bool(&trial->random);
	struct tensor *x = trial_flat_input(trial, act, n, in, any_scale(trial));
	struct tensor *weight = trial_flat_input(trial, act, out, in, 1);
	struct tensor *norm_weight = norm ? trial_flat_input(trial, DTYPE_F32, 1, in, 1) : NULL;
	struct tensor *x_norm = norm ? trial_flat_output(trial, act, n, in) : x;
	struct tensor *rstd = want_rstd ? trial_flat_output(trial, DTYPE_F32, n, 1) : NULL;
	struct tensor *y = trial_flat_output(trial, act, n, out);
	double *expected_norm = trial_doubles(trial, n * in), *expected = trial_doubles(trial, n);
	double *expected_y = trial_doubles(trial, n * out);

	trial_describe(trial, "N %ld, %ld -> %ld, norm %d", (long)n, (long)in, (long)out, norm);
	if (!trial_run(trial, OP_NORM_LINEAR,
	               &(struct norm_linear_args){n, in, out, (float)norm_eps, data_of(x),
	                                          data_of(norm_weight), data_of(weight),
	                                          data_of(x_norm), data_of(rstd), data_of(y)}))
		return false;
	if (norm) {
		reference_rms_norm(n, in, (float)norm_eps, x->values, norm_weight->values,
		                   expected_norm, expected);
		trial_check(trial, x_norm, "x_norm", expected_norm, trial->tolerance);
	}
	reference_linear(n, in, out, norm ? expected_norm : x->values, weight->values, expected_y);
	trial_check(trial, y, "y", expected_y, trial->tolerance);
	if (want_rstd)
		trial_check(trial, rstd, "rstd", expected, trial->tolerance);
	return true;
}

/* The three places a residual's gradient may come from. */
enum residual { RESIDUAL_NONE, RESIDUAL_APART, RESIDUAL_IN_PLACE };

/* The output [n, width] that the residual is added to: the residual itself, or another tensor. */
static struct tensor *residual_output(struct trial *trial, struct tensor *in_place, int64_t n,
                                      int64_t width)
{
	if (!in_place)
		return trial_flat_output(trial, trial->backend->activation, n, width);
	trial_expect_written(in_place);
	return in_place;
}

static void add(int64_t count, double *to, const double *from)
{
	for (int64_t i = 0; from && i < count; i++)
		to[i] += from[i];
}

static bool norm_linear_backward_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t n = any_length(trial, 70), out = any_width(trial, 150);
	int64_t in = any_normed_width(trial, 150);
	bool norm = random_bool(&trial->random);
	enum residual kind = (enum residual)random_integer(&trial->random, 0, 2);
	double *normed = trial_doubles(trial, n * in), *r = trial_doubles(trial, n);
	struct tensor *x = trial_flat_input(trial, act, n, in, any_scale(trial));
	struct tensor *weight = trial_flat_input(trial, act, out, in, 1);
	struct tensor *dy = trial_flat_input(trial, act, n, out, any_scale(trial));
	struct tensor *residual =
	        kind == RESIDUAL_NONE ? NULL : trial_flat_input(trial, act, n, in, 1);
	struct tensor *norm_weight = norm ? trial_flat_input(trial, DTYPE_F32, 1, in, 1) : NULL;
	struct tensor *x_norm = x, *rstd = NULL, *dnorm_weight = NULL;
	struct tensor *scratch = trial_flat_output(trial, act, n, in);
	struct tensor *dweight = trial_flat_output(trial, DTYPE_F32, out, in);
	double *dx = trial_doubles(trial, n * in), *dw = trial_doubles(trial, out * in);
	double *dxn = trial_doubles(trial, n * in), *dnw = trial_doubles(trial, in);

	trial_describe(trial, "N %ld, %ld -> %ld, norm %d, residual %d", (long)n, (long)in,
	               (long)out, norm, (int)kind);
	if (norm) {
		reference_rms_norm(n, in, norm_eps, x->values, norm_weight->values, normed, r);
		x_norm = trial_flat_values(trial, act, n, in, normed);
		rstd = trial_flat_values(trial, DTYPE_F32, n, 1, r);
		dnorm_weight = trial_flat_output(trial, DTYPE_F32, 1, in);
	}
	reference_linear_backward(n, in, out, x_norm->values, weight->values, dy->values, dxn, dw);
	if (norm)
		reference_rms_norm_backward(n, in, norm_eps, x->values, norm_weight->values, dxn,
		                            dx, dnw);
	else
		memcpy(dx, dxn, (size_t)(n * in) * sizeof *dx);
	add(n * in, dx, values_of(residual));
	struct tensor *dx_out =
	        residual_output(trial, kind == RESIDUAL_IN_PLACE ? residual : NULL, n, in);
	trial_expect_scratch(scratch);
	if (!trial_run(trial, OP_NORM_LINEAR_BACKWARD,
	               &(struct norm_linear_backward_args){
	                       n, in, out, data_of(x), data_of(x_norm), data_of(weight),
	                       data_of(norm_weight), data_of(rstd), data_of(dy), data_of(residual),
	                       data_of(scratch), data_of(dx_out), data_of(dnorm_weight),
	                       data_of(dweight)}))
		return false;
	trial_check(trial, dx_out, "dx", dx, trial->gradient_tolerance);
	trial_check(trial, dweight, "dweight", dw, trial->gradient_tolerance);
	if (norm)
		trial_check(trial, dnorm_weight, "dnorm_weight", dnw, trial->gradient_tolerance);
	return true;
}

static bool linear_residual_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t n, in, out;

	any_projection(trial, &n, &in, &out);
	enum residual kind = (enum residual)random_integer(&trial->random, 0, 2);
	struct tensor *x = trial_flat_input(trial, act, n, in, any_scale(trial));
	struct tensor *weight = trial_flat_input(trial, act, out, in, 1);
	struct tensor *residual =
	        kind == RESIDUAL_NONE ? NULL : trial_flat_input(trial, act, n, out, 1);
	double *y = trial_doubles(trial, n * out);

	trial_describe(trial, "N %ld, %ld -> %ld, residual %d", (long)n, (long)in, (long)out,
	               (int)kind);
	reference_linear(n, in, out, x->values, weight->values, y);
	add(n * out, y, values_of(residual));
	struct tensor *y_out =
	        residual_output(trial, kind == RESIDUAL_IN_PLACE ? residual : NULL, n, out);
	if (!trial_run(trial, OP_LINEAR_RESIDUAL,
	               &(struct linear_residual_args){n, in, out, data_of(x), data_of(weight),
	                                              data_of(residual), data_of(y_out)}))
		return false;
	trial_check(trial, y_out, "y", y, trial->tolerance);
	return true;
}

static bool linear_residual_backward_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t n = any_length(trial, 70), in = any_width(trial, 150), out = any_width(trial, 150);
	struct tensor *x = trial_flat_input(trial, act, n, in, any_scale(trial));
	struct tensor *weight = trial_flat_input(trial, act, out, in, 1);
	struct tensor *dy = trial_flat_input(trial, act, n, out, any_scale(trial));
	struct tensor *dx_out = trial_flat_output(trial, act, n, in);
	struct tensor *dweight = trial_flat_output(trial, DTYPE_F32, out, in);
	double *dx = trial_doubles(trial, n * in), *dw = trial_doubles(trial, out * in);

	trial_describe(trial, "N %ld, %ld -> %ld", (long)n, (long)in, (long)out);
	reference_linear_backward(n, in, out, x->values, weight->values, dy->values, dx, dw);
	if (!trial_run(trial, OP_LINEAR_RESIDUAL_BACKWARD,
	               &(struct linear_residual_backward_args){n, in, out, data_of(x),
	                                                       data_of(weight), data_of(dy),
	                                                       data_of(dx_out), data_of(dweight)}))
		return false;
	trial_check(trial, dx_out, "dx", dx, trial->gradient_tolerance);
	trial_check(trial, dweight, "dweight", dw, trial->gradient_tolerance);
	return true;
}

static bool decay_gate_case(struct trial *trial)
{
	int64_t n = any_length(trial, 60), rank = any_width(trial, 40), out = any_width(trial, 90);
	int64_t stride = rank + 8 * random_integer(&trial->random, 0, 2);
	struct tensor *x = trial_rows_input(trial, n, rank, stride, 1);
	struct tensor *weight =
	        trial_flat_input(trial, trial->backend->activation, out, rank, any_scale(trial));
	struct tensor *bias = trial_flat_input(trial, DTYPE_F32, 1, out, 1);
	struct tensor *log_decay = trial_flat_output(trial, trial->backend->activation, n, out);
	double *expected = trial_doubles(trial, n * out);

	trial_describe(trial, "N %ld, %ld -> %ld, stride %ld", (long)n, (long)rank, (long)out,
	               (long)stride);
	reference_decay_gate(n, rank, out, 16, x->values, weight->values, bias->values, expected);
	if (!trial_run(trial, OP_DECAY_GATE,
	               &(struct decay_gate_args){n, rank, out, stride, 16, data_of(x),
	                                         data_of(weight), data_of(bias),
	                                         data_of(log_decay)}))
		return false;
	trial_check(trial, log_decay, "log_decay", expected, trial->tolerance);
	return true;
}

static bool decay_gate_backward_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t n = any_length(trial, 60), rank = any_width(trial, 40), out = any_width(trial, 90);
	int64_t stride = rank + 8 * random_integer(&trial->random, 0, 2);
	double normalizer = random_uniform(&trial->random, 1, 16);
	struct tensor *x = trial_rows_input(trial, n, rank, stride, 1);
	struct tensor *weight = trial_flat_input(trial, act, out, rank, 1);
	struct tensor *bias = trial_flat_input(trial, DTYPE_F32, 1, out, 1);
	double *forward = trial_doubles(trial, n * out);
	double *dx = trial_doubles(trial, n * rank), *dw = trial_doubles(trial, out * rank);
	double *db = trial_doubles(trial, out);

	normalizer = (float)normalizer;
	trial_describe(trial, "N %ld, %ld -> %ld, stride %ld", (long)n, (long)rank, (long)out,
	               (long)stride);
	reference_decay_gate(n, rank, out, normalizer, x->values, weight->values, bias->values,
	                     forward);
	struct tensor *log_decay = trial_flat_values(trial, act, n, out, forward);
	struct tensor *dlog_decay = trial_flat_input(trial, act, n, out, any_scale(trial));
	struct tensor *dx_out = trial_rows_output(trial, n, rank, stride);
	struct tensor *dlogit = trial_flat_output(trial, act, n, out);
	struct tensor *dweight = trial_flat_output(trial, DTYPE_F32, out, rank);
	struct tensor *dbias = trial_flat_output(trial, DTYPE_F32, 1, out);
	trial_expect_scratch(dlogit);
	if (reference_decay_gate_backward(n, rank, out, normalizer, x->values, weight->values,
	                                  bias->values, dlog_decay->values, dx, dw,
	                                  db) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_DECAY_GATE_BACKWARD,
	               &(struct decay_gate_backward_args){{n, rank, out, stride, (float)normalizer,
	                                                   data_of(x), data_of(weight),
	                                                   data_of(bias), data_of(log_decay)},
	                                                  data_of(dlog_decay),
	                                                  data_of(dx_out),
	                                                  data_of(dlogit),
	                                                  data_of(dweight),
	                                                  data_of(dbias)}))
		return false;
	trial_check(trial, dx_out, "dx", dx, trial->gradient_tolerance);
	trial_check(trial, dweight, "dweight", dw, trial->gradient_tolerance);
	trial_check(trial, dbias, "dbias", db, trial->gradient_tolerance);
	return true;
}

/* Arguments of norm_gate that its forward and backward share. */
struct norm_gate_shape {
	int64_t n, heads, d, width, stride;
	struct tensor *x, *weight, *gate;
};

static struct norm_gate_shape norm_gate_shape(struct trial *trial)
{
	struct norm_gate_shape s = {.n = any_length(trial, 60),
	                            .heads = random_integer(&trial->random, 1, 4),
	                            .d = any_normed_width(trial, 70)};

	s.width = s.heads * s.d;
	s.stride = s.width + 8 * random_integer(&trial->random, 0, 2);
	s.x = trial_flat_input(trial, trial->backend->activation, s.n, s.width, any_scale(trial));
	s.weight = trial_flat_input(trial, DTYPE_F32, 1, s.d, 1);
	s.gate = trial_rows_input(trial, s.n, s.width, s.stride, 3);
	trial_describe(trial, "N %ld, H %ld, d %ld, stride %ld", (long)s.n, (long)s.heads,
	               (long)s.d, (long)s.stride);
	return s;
}

static bool norm_gate_case(struct trial *trial)
{
	struct norm_gate_shape s = norm_gate_shape(trial);
	struct tensor *rstd = random_bool(&trial->random)
	                              ? trial_flat_output(trial, DTYPE_F32, s.n, s.heads)
	                              : NULL;
	struct tensor *out = trial_flat_output(trial, trial->backend->activation, s.n, s.width);
	double *expected = trial_doubles(trial, s.n * s.width);
	double *expected_rstd = trial_doubles(trial, s.n * s.heads);

	reference_norm_gate(s.n, s.heads, s.d, 1e-5f, s.x->values, s.weight->values, s.gate->values,
	                    expected, expected_rstd);
	if (!trial_run(trial, OP_NORM_GATE,
	               &(struct norm_gate_args){s.n, s.heads, s.d, s.stride, 1e-5f, data_of(s.x),
	                                        data_of(s.weight), data_of(s.gate), data_of(rstd),
	                                        data_of(out)}))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	if (rstd)
		trial_check(trial, rstd, "rstd", expected_rstd, trial->tolerance);
	return true;
}

static bool norm_gate_backward_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	struct norm_gate_shape s = norm_gate_shape(trial);
	double *forward = trial_doubles(trial, s.n * s.width);
	double *forward_rstd = trial_doubles(trial, s.n * s.heads);
	double *dx = trial_doubles(trial, s.n * s.width);
	double *dgate = trial_doubles(trial, s.n * s.width), *dw = trial_doubles(trial, s.d);

	reference_norm_gate(s.n, s.heads, s.d, 1e-5f, s.x->values, s.weight->values, s.gate->values,
	                    forward, forward_rstd);
	struct tensor *rstd = trial_flat_values(trial, DTYPE_F32, s.n, s.heads, forward_rstd);
	struct tensor *out = trial_flat_values(trial, act, s.n, s.width, forward);
	struct tensor *dout = trial_flat_input(trial, act, s.n, s.width, 1);
	struct tensor *dx_out = trial_flat_output(trial, act, s.n, s.width);
	struct tensor *dgate_out = trial_rows_output(trial, s.n, s.width, s.stride);
	struct tensor *dweight = trial_flat_output(trial, DTYPE_F32, 1, s.d);
	if (reference_norm_gate_backward(s.n, s.heads, s.d, 1e-5f, s.x->values, s.weight->values,
	                                 s.gate->values, dout->values, dx, dgate, dw) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_NORM_GATE_BACKWARD,
	               &(struct norm_gate_backward_args){
	                       {s.n, s.heads, s.d, s.stride, 1e-5f, data_of(s.x), data_of(s.weight),
	                        data_of(s.gate), data_of(rstd), data_of(out)},
	                       data_of(dout),
	                       data_of(dx_out),
	                       data_of(dgate_out),
	                       data_of(dweight)}))
		return false;
	trial_check(trial, dx_out, "dx", dx, trial->gradient_tolerance);
	trial_check(trial, dgate_out, "dgate", dgate, trial->gradient_tolerance);
	trial_check(trial, dweight, "dweight", dw, trial->gradient_tolerance);
	return true;
}

static bool gelu_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t count = any_width(trial, 5000);
	struct tensor *x = trial_flat_input(trial, act, 1, count, 3);
	bool in_place = random_bool(&trial->random);
	struct tensor *y = in_place ? x : trial_flat_output(trial, act, 1, count);
	double *expected = trial_doubles(trial, count);

	trial_describe(trial, "%ld elements, in place %d", (long)count, in_place);
	trial->floor = 0.01; /* 1 + erf(x) vanishes on the left */
	reference_gelu(count, x->values, expected);
	if (in_place)
		trial_expect_written(x);
	if (!trial_run(trial, OP_GELU, &(struct gelu_args){count, data_of(x), data_of(y)}))
		return false;
	trial_check(trial, y, "y", expected, trial->tolerance);
	return true;
}

static bool gelu_backward_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t count = any_width(trial, 5000);
	struct tensor *x = trial_flat_input(trial, act, 1, count, 3);
	struct tensor *dy = trial_flat_input(trial, act, 1, count, 1);
	bool in_place = random_bool(&trial->random);
	struct tensor *dx = in_place ? dy : trial_flat_output(trial, act, 1, count);
	double *expected = trial_doubles(trial, count);

	trial_describe(trial, "%ld elements, in place %d", (long)count, in_place);
	trial->floor = 0.01; /* 1 + erf(x) vanishes on the left */
	reference_gelu_backward(count, x->values, dy->values, expected);
	if (in_place)
		trial_expect_written(dy);
	if (!trial_run(trial, OP_GELU_BACKWARD,
	               &(struct gelu_backward_args){count, data_of(x), data_of(dy), data_of(dx)}))
		return false;
	trial_check(trial, dx, "dx", expected, trial->gradient_tolerance);
	return true;
}

/* n tokens below vocab; some of them -1 if `ignored`. values receives them too. */
static struct tensor *any_tokens(struct trial *trial, int64_t n, int64_t vocab, bool ignored,
                                 int32_t *tokens)
{
	double *values = trial_doubles(trial, n);

	for (int64_t i = 0; i < n; i++) {
		bool ignore = ignored && i > 0 && random_integer(&trial->random, 0, 3) == 0;

		tokens[i] = ignore ? -1 : (int32_t)random_integer(&trial->random, 0, vocab - 1);
		values[i] = tokens[i];
	}
	return trial_flat_values(trial, DTYPE_I32, n, 1, values);
}

enum { MAX_TOKENS = 70 };

static bool embedding_case(struct trial *trial)
{
	enum dtype act = trial->backend->activation;
	int64_t n = any_length(trial, MAX_TOKENS), d = any_width(trial, 100);
	int64_t vocab = random_integer(&trial->random, 1, 50);
	int32_t host[MAX_TOKENS];
	struct tensor *tokens = any_tokens(trial, n, vocab, false, host);
	struct tensor *table = trial_flat_input(trial, act, vocab, d, 1);
	struct tensor *y = trial_flat_output(trial, act, n, d);
	double *expected = trial_doubles(trial, n * d);

	trial_describe(trial, "N %ld, vocab %ld, D %ld", (long)n, (long)vocab, (long)d);
	reference_embedding(n, d, host, table->values, expected);
	if (!trial_run(trial, OP_EMBEDDING,
	               &(struct embedding_args){n, vocab, d, data_of(tokens), data_of(table),
	                                        data_of(y)}))
		return false;
	trial_check(trial, y, "y", expected, trial->tolerance);
	return true;
}

static bool embedding_backward_case(struct trial *trial)
{
	int64_t n = any_length(trial, MAX_TOKENS), d = any_width(trial, 100);
	int64_t vocab = random_integer(&trial->random, 1, 50);
	int32_t host[MAX_TOKENS];
	struct tensor *tokens = any_tokens(trial, n, vocab, false, host);
	struct tensor *dy = trial_flat_input(trial, trial->backend->activation, n, d, 1);
	struct tensor *dtable = trial_flat_output(trial, DTYPE_F32, vocab, d);
	double *expected = trial_doubles(trial, vocab * d);

	trial_describe(trial, "N %ld, vocab %ld, D %ld", (long)n, (long)vocab, (long)d);
	reference_embedding_backward(n, vocab, d, host, dy->values, expected);
	if (!trial_run(trial, OP_EMBEDDING_BACKWARD,
	               &(struct embedding_backward_args){n, vocab, d, data_of(tokens), data_of(dy),
	                                                 data_of(dtable)}))
		return false;
	trial_check(trial, dtable, "dtable", expected, trial->gradient_tolerance);
	return true;
}

static bool cross_entropy_case(struct trial *trial)
{
	int64_t n = any_length(trial, MAX_TOKENS), vocab = any_width(trial, 300);
	bool want_gradient = random_bool(&trial->random);
	int32_t host[MAX_TOKENS];
	struct tensor *targets = any_tokens(trial, n, vocab, true, host);
	struct tensor *logits =
	        trial_flat_input(trial, trial->backend->activation, n, vocab, any_scale(trial));
	struct tensor *loss = trial_flat_output(trial, DTYPE_F32, 1, 1);
	struct tensor *losses = trial_flat_output(trial, DTYPE_F32, n, 1);
	double *expected = trial_doubles(trial, n * vocab);

	trial_describe(trial, "N %ld, vocab %ld, gradient %d", (long)n, (long)vocab, want_gradient);
	double expected_loss = reference_cross_entropy(n, vocab, logits->values, host, expected);
	trial_expect_scratch(losses);
	if (want_gradient)
		trial_expect_written(logits);
	if (!trial_run(trial, OP_CROSS_ENTROPY,
	               &(struct cross_entropy_args){n, vocab, data_of(logits), want_gradient,
	                                            data_of(targets), data_of(loss),
	                                            data_of(losses)}))
		return false;
	/* A loss near zero is the difference of two logits: its error is absolute. */
	trial_check(trial, loss, "loss", &expected_loss,
	            trial->tolerance * (1 + 1 / fmax(expected_loss, 1e-30)));
	if (want_gradient)
		trial_check(trial, logits, "the gradient", expected, trial->gradient_tolerance);
	return true;
}

static bool argmax_case(struct trial *trial)
{
	int64_t n = any_length(trial, MAX_TOKENS), vocab = any_width(trial, 300);
	bool has_position = random_bool(&trial->random);
	double *values = random_doubles(&trial->random, n * vocab, 1), *tokens;
	double position = 41, next = 42;

	trial_describe(trial, "N %ld, vocab %ld", (long)n, (long)vocab);
	/* Few distinct values, so that the largest comes more than once. */
	for (int64_t i = 0; i < n * vocab; i++)
		values[i] = floor(4 * values[i]) / 4;
	tokens = trial_doubles(trial, n);
	for (int64_t i = 0; i < n; i++) {
		tokens[i] = 0;
		for (int64_t j = 0; j < vocab; j++)
			if (values[i * vocab + j] > values[i * vocab + (int64_t)tokens[i]])
				tokens[i] = (double)j;
	}
	struct tensor *logits =
	        trial_flat_values(trial, trial->backend->activation, n, vocab, values);
	struct tensor *tokens_out = trial_flat_output(trial, DTYPE_I32, n, 1);
	struct tensor *counter =
	        has_position ? trial_flat_values(trial, DTYPE_I32, 1, 1, &position) : NULL;
	free(values);
	if (has_position)
		trial_expect_written(counter);
	if (!trial_run(trial, OP_ARGMAX,
	               &(struct argmax_args){n, vocab, data_of(logits), data_of(tokens_out),
	                                     data_of(counter)}))
		return false;
	trial_check(trial, tokens_out, "tokens", tokens, 0);
	if (has_position)
		trial_check(trial, counter, "position", &next, 0);
	return true;
}

const struct operation_test dense_tests[] = {
        {OP_NORM_LINEAR, 40, norm_linear_case},
        {OP_NORM_LINEAR_BACKWARD, 40, norm_linear_backward_case},
        {OP_LINEAR_RESIDUAL, 40, linear_residual_case},
        {OP_LINEAR_RESIDUAL_BACKWARD, 40, linear_residual_backward_case},
        {OP_DECAY_GATE, 40, decay_gate_case},
        {OP_DECAY_GATE_BACKWARD, 40, decay_gate_backward_case},
        {OP_NORM_GATE, 40, norm_gate_case},
        {OP_NORM_GATE_BACKWARD, 40, norm_gate_backward_case},
        {OP_GELU, 40, gelu_case},
        {OP_GELU_BACKWARD, 40, gelu_backward_case},
        {OP_EMBEDDING, 30, embedding_case},
        {OP_EMBEDDING_BACKWARD, 30, embedding_backward_case},
        {OP_CROSS_ENTROPY, 40, cross_entropy_case},
        {OP_ARGMAX, 40, argmax_case},
        {0},
};
