/* What stands before and after a recurrence: gates, norms, the short convolution, discretizations.
 */
#include "kernels/operation.h"

enum {
	NORM_FLOPS = 4,         /* square, add; times rstd, times weight */
	CENTER_FLOPS = 3,       /* of the mean: add, subtract; bias */
	SILU_GATE_FLOPS = 5,    /* exp, add, divide; times the gate, times x */
	SIGMOID_GATE_FLOPS = 4, /* exp, add, divide; times x */
	BIAS_FLOPS = 1,
	LOG_DECAY_FLOPS = 5,    /* bias; exp, add, log; divide, or times the rate */
	EXP_DECAY_FLOPS = 3,    /* bias; exp, negate */
	TANH_FLOPS = 4,         /* exp, add, divide; from 1 */
	SOFTPLUS_FLOPS = 4,     /* bias; exp, add, log */
	SIGMOID_FLOPS = 3,      /* exp, add, divide */
	SILU_FLOPS = 4,         /* exp, add, divide; times x */
	TIME_STEP_FLOPS = 5,    /* bias; exp, add, log; times the rate */
	FORGET_GATE_FLOPS = 12, /* exp, add, divide; times 1-b, subtract, log; silu; times 1-f */
	SKIP_FLOPS = 2,         /* times its weight, add */
	/* Twice bias, exp, add, divide; times the rate; exp of twice that, subtract, root; times
	   the gate, times x. */
	LRU_GATE_FLOPS = 15,
	/* Square, times its factor, plus 1, times z; exp, add, divide; times z, times x. */
	GELU_GATE_FLOPS = 9
};

/* ---- gates of low rank ---- */

static void size_decay_gate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct decay_gate_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->rank = a->x_stride = s->rank;
	a->form = v->low_rank;
	a->d_out = s->width;
	if (a->form == LOW_RANK_DECAY)
		a->normalizer = 16;
	if (a->form != LOW_RANK_RATE)
		return;
	a->n_heads = s->n_heads;
	a->d_out = s->n_heads * s->d_head;
}

/* Columns of the output; those of a head belong together where it has a rate. */
static struct dimension low_rank_columns(const struct decay_gate_args *a)
{
	return a->form == LOW_RANK_RATE ? INNER(a->d_out) : OUTS(a->d_out);
}

static void describe_decay_gate(void *args, struct operand_list *l)
{
	struct decay_gate_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), rank = INNER(a->rank);
	const struct dimension out = low_rank_columns(a);

	add_option(l, &a->form);
	cut_along(l, AXIS_ROW, &a->n_tokens);
	if (a->form != LOW_RANK_RATE)
		cut_along(l, AXIS_OUT, &a->d_out);
	add_rows(l, ROLE_INPUT, "x", &a->x, &a->x_stride, n, rank);
	add_rows(l, ROLE_PARAMETER, "weight", &a->weight, NULL, out, rank);
	add_vector(l, ROLE_PARAMETER, "bias", &a->bias, out);
	if (a->form == LOW_RANK_RATE)
		add_vector(l, ROLE_PARAMETER, "log_rate", &a->log_rate, INNER(a->n_heads));
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, n, out);
	keeps_fp32(l);
}

static double decay_gate_flops(const void *args)
{
	const struct decay_gate_args *a = args;
	const double n = (double)a->n_tokens, m = (double)a->d_out;

	const double of_column = is_logit(a->form)          ? BIAS_FLOPS
	                         : a->form == LOW_RANK_EXP  ? EXP_DECAY_FLOPS
	                         : a->form == LOW_RANK_STEP ? SOFTPLUS_FLOPS
	                                                    : LOG_DECAY_FLOPS;
	const double of_input = has_tanh(a->form) ? TANH_FLOPS : 0;

	return 2 * n * (double)a->rank * m + of_input * n * (double)a->rank + of_column * n * m;
}

static const struct operation_form low_rank_variants[] = {
        {"decay_gate", .low_rank = LOW_RANK_DECAY},
        {"rate_gate", .low_rank = LOW_RANK_RATE},
        {"low_rank_gate", .low_rank = LOW_RANK_LOGIT},
        {"tanh_gate", .low_rank = LOW_RANK_TANH},
        {"exp_gate", .low_rank = LOW_RANK_EXP},
        {"low_rank_step", .low_rank = LOW_RANK_STEP},
        {0}};

DESCRIPTION(decay_gate, .variants = low_rank_variants);

static void describe_decay_gate_backward(void *args, struct operand_list *l)
{
	struct decay_gate_backward_args *b = args;
	struct decay_gate_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), rank = INNER(a->rank);
	const struct dimension out = low_rank_columns(a);

	describe_decay_gate(a, l);
	forward_ends(l, is_logit(a->form) ? "" : "out");
	operand_find(l, "bias")->read = 0;
	add_rows(l, ROLE_INPUT, "dout", &b->dout, NULL, n, out);
	if (!is_logit(a->form))
		add_rows(l, ROLE_SCRATCH, "dlogit", &b->dlogit, NULL, n, out);
	add_rows(l, ROLE_OUTPUT, "dx", &b->dx, &a->x_stride, n, rank);
	add_floats(l, ROLE_GRADIENT, "dweight", &b->dweight, INNER(1), out, rank);
	add_vector(l, ROLE_GRADIENT, "dbias", &b->dbias, out);
	if (a->form == LOW_RANK_RATE)
		add_vector(l, ROLE_GRADIENT, "dlog_rate", &b->dlog_rate, INNER(a->n_heads));
}

BACKWARD(decay_gate, DECAY_GATE, 2);

/* Now and then a test has a few tokens of a model's width, or of more than a block can hold. */
static void widen(const struct sizes *s, int64_t *n_tokens, int64_t *d_head)
{
	const uint64_t bits = s->bits >> 8;

	if (!s->any || bits % 8 != 0)
		return;
	*d_head = 512 + 8 * (int64_t)((bits >> 3) % 3200);
	*n_tokens = 1 + *n_tokens % 32;
}

/* ---- norm, then gate ---- */

static void size_norm_gate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct norm_gate_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->n_heads = s->n_heads;
	a->d_head = s->d_head;
	widen(s, &a->n_tokens, &a->d_head);
	a->curve = v->curve;
	a->norm = v->norm;
	/* A group of two has nothing but signs left, whose gradient is all rounding. */
	if (a->norm == NORM_GROUP && a->d_head < 3)
		a->d_head = 4;
	a->gate_stride = a->n_heads * a->d_head;
	a->eps = 1e-5f;
}

/* Columns that have a weight of their own. */
static int64_t norm_width(const struct norm_gate_args *a)
{
	return a->norm == NORM_GROUP ? a->n_heads * a->d_head : a->d_head;
}

static void describe_norm_gate(void *args, struct operand_list *l)
{
	struct norm_gate_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), width = INNER(a->n_heads * a->d_head);

	add_option(l, &a->curve);
	add_option(l, &a->norm);
	cut_along(l, AXIS_ROW, &a->n_tokens);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, n, width);
	uniform(add_vector(l, ROLE_PARAMETER, "weight", &a->weight, INNER(norm_width(a))), 2);
	if (a->norm == NORM_GROUP)
		add_vector(l, ROLE_PARAMETER, "bias", &a->bias, width);
	add_rows(l, ROLE_INPUT, "gate", &a->gate, &a->gate_stride, n, width)->scale = 2;
	add_floats(l, ROLE_OUTPUT, "rstd", &a->rstd, INNER(1), n, INNER(a->n_heads))->optional =
	        true;
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, n, width);
	keeps_fp32(l);
}

static double norm_gate_flops(const void *args)
{
	const struct norm_gate_args *a = args;

	return (NORM_FLOPS + (a->norm == NORM_GROUP ? CENTER_FLOPS : 0) +
	        (a->curve == CURVE_SILU ? SILU_GATE_FLOPS : SIGMOID_GATE_FLOPS)) *
	       (double)(a->n_tokens * a->n_heads * a->d_head);
}

static const struct operation_form norm_gate_variants[] = {
        {"norm_gate", .curve = CURVE_SILU},
        {"norm_sigmoid_gate", .curve = CURVE_SIGMOID},
        {"group_norm_gate", .curve = CURVE_SILU, .norm = NORM_GROUP},
        {0}};

DESCRIPTION(norm_gate, .variants = norm_gate_variants);

static void describe_norm_gate_backward(void *args, struct operand_list *l)
{
	struct norm_gate_backward_args *b = args;
	struct norm_gate_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), width = INNER(a->n_heads * a->d_head);

	describe_norm_gate(a, l);
	forward_ends(l, "rstd");
	add_rows(l, ROLE_INPUT, "dout", &b->dout, NULL, n, width);
	add_rows(l, ROLE_OUTPUT, "dx", &b->dx, NULL, n, width);
	add_rows(l, ROLE_OUTPUT, "dgate", &b->dgate, &a->gate_stride, n, width);
	add_vector(l, ROLE_GRADIENT, "dweight", &b->dweight, INNER(norm_width(a)));
	if (a->norm == NORM_GROUP)
		add_vector(l, ROLE_GRADIENT, "dbias", &b->dbias, width);
	keeps_fp32(l);
}

BACKWARD(norm_gate, NORM_GATE, 2);

/* ---- the short convolution ---- */

static void size_short_conv(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct short_conv_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->channels = a->x_stride = s->width;
	a->curve = v->curve;
}

/* [B*T, channels] rows, as the sequences that they are. */
static struct operand *add_sequences(struct operand_list *l, enum role role, const char *name,
                                     void *location, int64_t *row, struct dimension b,
                                     struct dimension t, struct dimension c)
{
	struct operand *o =
	        add_array(l, role, ELEMENT_ACTIVATION, name, location, INNER(1), b, t, c);

	o->row = row;
	if (row) {
		o->stride[2] = *row;
		o->stride[1] = *row * t.size;
	}
	return o;
}

static void describe_short_conv(void *args, struct operand_list *l)
{
	struct short_conv_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension c = CHANNELS(a->channels);

	add_option(l, &a->curve);
	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->channels);
	add_sequences(l, ROLE_INPUT, "x", &a->x, &a->x_stride, b, t, c);
	add_floats(l, ROLE_PARAMETER, "weight", &a->weight, INNER(1), c, INNER(CONV_WIDTH));
	optional(add_vector(l, ROLE_PARAMETER, "bias", &a->bias, c), true);
	add_sequences(l, ROLE_OUTPUT, "out", &a->out, NULL, b, t, c);
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "history", &a->history, INNER(1), b,
	          INNER(CONV_HISTORY), c)
	        ->optional = true;
	keeps_fp32(l);
}

static double conv_flops(enum curve curve, int64_t count)
{
	return (2 * CONV_WIDTH + (curve == CURVE_SILU ? SILU_FLOPS : 0)) * (double)count;
}

static double short_conv_flops(const void *args)
{
	const struct short_conv_args *a = args;

	return conv_flops(a->curve, a->batch * a->seq_len * a->channels);
}

static const struct operation_form short_conv_variants[] = {
        {"short_conv", .curve = CURVE_SILU}, {"plain_conv", .curve = CURVE_NONE}, {0}};

DESCRIPTION(short_conv, .variants = short_conv_variants);

static void size_short_conv_backward(void *args, const struct sizes *s,
                                     const struct operation_form *v)
{
	size_short_conv(args, s, v);
	((struct short_conv_backward_args *)args)->n_readers =
	        s->any ? 1 + (int64_t)(s->bits % 4) : 1;
}

static void describe_short_conv_backward(void *args, struct operand_list *l)
{
	struct short_conv_backward_args *x = args;
	struct short_conv_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension c = CHANNELS(a->channels);

	describe_short_conv(a, l);
	forward_ends(l, "");
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "dout", &x->dout, b, t, INNER(x->n_readers),
	          c);
	add_sequences(l, ROLE_OUTPUT, "dx", &x->dx, &a->x_stride, b, t, c);
	add_floats(l, ROLE_GRADIENT, "dweight", &x->dweight, INNER(1), c, INNER(CONV_WIDTH));
	if (a->bias)
		add_vector(l, ROLE_GRADIENT, "dbias", &x->dbias, c);
	keeps_fp32(l);
}

/* Adds the readers' gradients up first. */
static double short_conv_backward_flops(const void *args)
{
	const struct short_conv_backward_args *x = args;
	const struct short_conv_args *a = &x->forward;
	const int64_t count = a->batch * a->seq_len * a->channels;

	return 2 * conv_flops(a->curve, count) + (double)((x->n_readers - 1) * count);
}

BACKWARD_OF(short_conv, SHORT_CONV, size_short_conv_backward);

static void size_short_conv_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct short_conv_step_args *a = args;

	a->batch = s->batch;
	a->channels = a->x_stride = s->width;
	a->curve = v->curve;
}

static void describe_short_conv_step(void *args, struct operand_list *l)
{
	struct short_conv_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), c = CHANNELS(a->channels);

	add_option(l, &a->curve);
	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->channels);
	add_rows(l, ROLE_INPUT, "x", &a->x, &a->x_stride, b, c);
	add_floats(l, ROLE_PARAMETER, "weight", &a->weight, INNER(1), c, INNER(CONV_WIDTH));
	optional(add_vector(l, ROLE_PARAMETER, "bias", &a->bias, c), true);
	add_array(l, ROLE_STATE, ELEMENT_ACTIVATION, "history", &a->history, INNER(1), b,
	          INNER(CONV_HISTORY), c);
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, b, c);
	keeps_fp32(l);
}

static double short_conv_step_flops(const void *args)
{
	const struct short_conv_step_args *a = args;

	return conv_flops(a->curve, a->batch * a->channels);
}

static const struct operation_form short_conv_step_variants[] = {
        {"short_conv_step", .curve = CURVE_SILU}, {"plain_conv_step", .curve = CURVE_NONE}, {0}};

DESCRIPTION(short_conv_step, .is_step = true, .variants = short_conv_step_variants);

/* ---- Mamba-2's time step ---- */

static void size_time_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct time_step_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->n_heads = a->logit_stride = s->n_heads;
	a->d_head = s->d_head;
	a->x_stride = s->n_heads * s->d_head;
}

static void describe_time_step(void *args, struct operand_list *l)
{
	struct time_step_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), h = INNER(a->n_heads);
	const struct dimension width = INNER(a->n_heads * a->d_head);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	add_rows(l, ROLE_INPUT, "logit", &a->logit, &a->logit_stride, n, h);
	add_vector(l, ROLE_PARAMETER, "bias", &a->bias, h);
	add_vector(l, ROLE_PARAMETER, "log_rate", &a->log_rate, h);
	add_rows(l, ROLE_INPUT, "x", &a->x, &a->x_stride, n, width);
	add_rows(l, ROLE_OUTPUT, "log_decay", &a->log_decay, NULL, n, h);
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, n, width);
	keeps_fp32(l);
}

static double time_step_flops(const void *args)
{
	const struct time_step_args *a = args;
	const double rows = (double)(a->n_tokens * a->n_heads);

	return TIME_STEP_FLOPS * rows + rows * (double)a->d_head;
}

DESCRIPTION(time_step);

static void describe_time_step_backward(void *args, struct operand_list *l)
{
	struct time_step_backward_args *b = args;
	struct time_step_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), h = INNER(a->n_heads);
	const struct dimension width = INNER(a->n_heads * a->d_head);
	struct operand *o;

	describe_time_step(a, l);
	forward_ends(l, "");
	add_rows(l, ROLE_INPUT, "dlog_decay", &b->dlog_decay, NULL, n, h);
	add_rows(l, ROLE_INPUT, "dout", &b->dout, NULL, n, width);
	add_rows(l, ROLE_INPUT, "dskip", &b->dskip, NULL, n, width)->optional = true;
	add_rows(l, ROLE_OUTPUT, "dlogit", &b->dlogit, &a->logit_stride, n, h);
	o = add_rows(l, ROLE_OUTPUT, "dx", &b->dx, NULL, n, width);
	o->alias = o->base = "dskip";
	add_vector(l, ROLE_GRADIENT, "dbias", &b->dbias, h);
	add_vector(l, ROLE_GRADIENT, "dlog_rate", &b->dlog_rate, h);
	keeps_fp32(l);
}

static double time_step_backward_flops(const void *args)
{
	const struct time_step_backward_args *b = args;
	const struct time_step_args *a = &b->forward;
	const double skip = b->dskip ? (double)(a->n_tokens * a->n_heads * a->d_head) : 0;

	return 2 * time_step_flops(args) + skip;
}

BACKWARD_OF(time_step, TIME_STEP, size_time_step);

/* ---- what a delta rule writes and keeps ---- */

static void size_delta_gate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct delta_gate_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->n_heads = a->stride = s->n_heads;
}

static void describe_delta_gate(void *args, struct operand_list *l)
{
	struct delta_gate_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), h = HEADS(a->n_heads);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_HEAD, &a->n_heads);
	add_rows(l, ROLE_INPUT, "logit", &a->logit, &a->stride, n, h);
	optional(add_rows(l, ROLE_INPUT, "decay_logit", &a->decay_logit, &a->stride, n, h), true);
	if (a->decay_logit) {
		add_vector(l, ROLE_PARAMETER, "bias", &a->bias, h);
		add_vector(l, ROLE_PARAMETER, "log_rate", &a->log_rate, h);
	}
	add_rows(l, ROLE_OUTPUT, "beta", &a->beta, NULL, n, h);
	if (a->decay_logit)
		add_rows(l, ROLE_OUTPUT, "log_decay", &a->log_decay, NULL, n, h);
	keeps_fp32(l);
}

static double delta_gate_flops(const void *args)
{
	const struct delta_gate_args *a = args;

	return (SIGMOID_FLOPS + (a->decay_logit ? TIME_STEP_FLOPS : 0)) *
	       (double)(a->n_tokens * a->n_heads);
}

DESCRIPTION(delta_gate);

static void describe_delta_gate_backward(void *args, struct operand_list *l)
{
	struct delta_gate_backward_args *b = args;
	struct delta_gate_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), h = HEADS(a->n_heads);

	describe_delta_gate(a, l);
	forward_ends(l, "");
	add_rows(l, ROLE_INPUT, "dbeta", &b->dbeta, NULL, n, h);
	add_rows(l, ROLE_OUTPUT, "dlogit", &b->dlogit, &a->stride, n, h);
	if (a->decay_logit) {
		add_rows(l, ROLE_INPUT, "dlog_decay", &b->dlog_decay, NULL, n, h);
		add_rows(l, ROLE_OUTPUT, "ddecay_logit", &b->ddecay_logit, &a->stride, n, h);
		add_vector(l, ROLE_GRADIENT, "dbias", &b->dbias, h);
		add_vector(l, ROLE_GRADIENT, "dlog_rate", &b->dlog_rate, h);
	}
	keeps_fp32(l);
}

BACKWARD(delta_gate, DELTA_GATE, 2);

/* ---- HGRN's forget gate ---- */

static void size_forget_gate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct forget_gate_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->width = a->stride = s->width;
}

static void describe_forget_gate(void *args, struct operand_list *l)
{
	struct forget_gate_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), c = CHANNELS(a->width);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_CHANNEL, &a->width);
	add_rows(l, ROLE_INPUT, "logit", &a->logit, &a->stride, n, c);
	add_rows(l, ROLE_INPUT, "x", &a->x, &a->stride, n, c);
	add_vector(l, ROLE_PARAMETER, "bound", &a->bound, c);
	add_rows(l, ROLE_OUTPUT, "log_decay", &a->log_decay, NULL, n, c);
	add_rows(l, ROLE_OUTPUT, "key", &a->key, NULL, n, c)->optional = true;
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, n, c);
	keeps_fp32(l);
}

static double forget_gate_flops(const void *args)
{
	const struct forget_gate_args *a = args;

	return FORGET_GATE_FLOPS * (double)(a->n_tokens * a->width);
}

DESCRIPTION(forget_gate);

static void describe_forget_gate_backward(void *args, struct operand_list *l)
{
	struct forget_gate_backward_args *b = args;
	struct forget_gate_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), c = CHANNELS(a->width);

	describe_forget_gate(a, l);
	forward_ends(l, "");
	add_rows(l, ROLE_INPUT, "dlog_decay", &b->dlog_decay, NULL, n, c);
	add_rows(l, ROLE_INPUT, "dout", &b->dout, NULL, n, c);
	if (a->key)
		add_rows(l, ROLE_INPUT, "dkey", &b->dkey, NULL, n, c);
	add_rows(l, ROLE_OUTPUT, "dlogit", &b->dlogit, &a->stride, n, c);
	add_rows(l, ROLE_OUTPUT, "dx", &b->dx, &a->stride, n, c);
	add_vector(l, ROLE_GRADIENT, "dbound", &b->dbound, c);
	keeps_fp32(l);
}

BACKWARD(forget_gate, FORGET_GATE, 2);

/* ---- gate, then norm ---- */

static void size_gate_norm(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct gate_norm_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->n_heads = s->n_heads;
	a->d_head = s->d_head;
	widen(s, &a->n_tokens, &a->d_head);
	a->groups = s->any && s->bits & 1 ? 1 : s->n_heads;
	a->skip_stride = a->gate_stride = a->n_heads * a->d_head;
	a->eps = 1e-5f;
}

static void describe_gate_norm(void *args, struct operand_list *l)
{
	struct gate_norm_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), width = INNER(a->n_heads * a->d_head);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, n, width);
	optional(add_rows(l, ROLE_INPUT, "skip", &a->skip, &a->skip_stride, n, width), true);
	if (a->skip)
		add_vector(l, ROLE_PARAMETER, "skip_weight", &a->skip_weight, INNER(a->n_heads));
	optional(add_rows(l, ROLE_INPUT, "gate", &a->gate, &a->gate_stride, n, width), true);
	uniform(add_vector(l, ROLE_PARAMETER, "weight", &a->weight,
	                   INNER(a->n_heads * a->d_head / a->groups)),
	        2);
	add_floats(l, ROLE_OUTPUT, "rstd", &a->rstd, INNER(1), n, INNER(a->groups))->optional =
	        true;
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, n, width);
	keeps_fp32(l);
}

static double gate_norm_flops(const void *args)
{
	const struct gate_norm_args *a = args;

	return (NORM_FLOPS + (a->gate ? SILU_GATE_FLOPS : 0) + (a->skip ? SKIP_FLOPS : 0)) *
	       (double)(a->n_tokens * a->n_heads * a->d_head);
}

DESCRIPTION(gate_norm);

static void describe_gate_norm_backward(void *args, struct operand_list *l)
{
	struct gate_norm_backward_args *b = args;
	struct gate_norm_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), width = INNER(a->n_heads * a->d_head);
	struct operand *o;

	describe_gate_norm(a, l);
	forward_ends(l, "rstd");
	add_rows(l, ROLE_INPUT, "dout", &b->dout, NULL, n, width);
	add_rows(l, ROLE_INPUT, "dresidual", &b->dresidual, NULL, n, width)->optional = true;
	o = add_rows(l, ROLE_OUTPUT, "dx", &b->dx, NULL, n, width);
	o->alias = o->base = "dresidual";
	if (a->skip) {
		add_rows(l, ROLE_OUTPUT, "dskip", &b->dskip, NULL, n, width);
		add_vector(l, ROLE_GRADIENT, "dskip_weight", &b->dskip_weight, INNER(a->n_heads));
	}
	if (a->gate)
		add_rows(l, ROLE_OUTPUT, "dgate", &b->dgate, &a->gate_stride, n, width);
	add_vector(l, ROLE_GRADIENT, "dweight", &b->dweight,
	           INNER(a->n_heads * a->d_head / a->groups));
	keeps_fp32(l);
}

static double gate_norm_backward_flops(const void *args)
{
	const struct gate_norm_backward_args *b = args;
	const struct gate_norm_args *a = &b->forward;
	const double residual = b->dresidual ? (double)(a->n_tokens * a->n_heads * a->d_head) : 0;

	return 2 * gate_norm_flops(args) + residual;
}

BACKWARD_OF(gate_norm, GATE_NORM, size_gate_norm);

/* ---- block-diagonal products ---- */

static void size_block_linear(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct block_linear_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->n_blocks = s->n_heads;
	a->n_products = s->any ? 1 + (int64_t)(s->bits % 3) : 2;
	a->d_in = s->any ? s->d_in : s->d_head;
	a->d_out = s->any ? s->d_out : s->d_head;
}

static void describe_block_linear(void *args, struct operand_list *l)
{
	struct block_linear_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), p = INNER(a->n_products);
	const struct dimension h = HEADS(a->n_blocks), in = INNER(a->d_in), out = INNER(a->d_out);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_HEAD, &a->n_blocks);
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "x", &a->x, INNER(1), n, h, in);
	add_array(l, ROLE_PARAMETER, ELEMENT_ACTIVATION, "weight", &a->weight, p, h, in, out)
	        ->scale = 0.1f;
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "y", &a->y, n, p, h, out);
	keeps_fp32(l);
}

static double block_linear_flops(const void *args)
{
	const struct block_linear_args *a = args;

	return 2 * (double)(a->n_tokens * a->n_products * a->n_blocks) *
	       (double)(a->d_in * a->d_out);
}

DESCRIPTION(block_linear);

static void describe_block_linear_backward(void *args, struct operand_list *l)
{
	struct block_linear_backward_args *b = args;
	struct block_linear_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), p = INNER(a->n_products);
	const struct dimension h = HEADS(a->n_blocks), in = INNER(a->d_in), out = INNER(a->d_out);

	describe_block_linear(a, l);
	forward_ends(l, "");
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "dy", &b->dy, n, p, h, out);
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "dskip", &b->dskip, INNER(1), n, h, in)
	        ->optional = true;
	add_array(l, ROLE_GRADIENT, ELEMENT_FP32, "dweight", &b->dweight, p, h, in, out);
	keeps_fp32(l);
	/* Kernels may round the products before they add them up. */
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "dx", &b->dx, INNER(1), n, h, in)->base =
	        "dskip";
}

static double block_linear_backward_flops(const void *args)
{
	const struct block_linear_backward_args *b = args;
	const struct block_linear_args *a = &b->forward;

	return 2 * block_linear_flops(a) +
	       (b->dskip ? (double)(a->n_tokens * a->n_blocks * a->d_in) : 0);
}

BACKWARD_OF(block_linear, BLOCK_LINEAR, size_block_linear);

/* ---- the gate of the RG-LRU ---- */

static void size_lru_gate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct lru_gate_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->width = s->width;
}

static void describe_lru_gate(void *args, struct operand_list *l)
{
	struct lru_gate_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension c = CHANNELS(a->width), gates = INNER(2);

	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->width);
	optional(add_position(l, &a->position, 100), false);
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "logit", &a->logit, b, t, gates, c);
	add_floats(l, ROLE_PARAMETER, "bias", &a->bias, INNER(1), gates, c);
	add_vector(l, ROLE_PARAMETER, "rate", &a->rate, c)->scale = 3;
	add_sequences(l, ROLE_INPUT, "x", &a->x, NULL, b, t, c);
	add_sequences(l, ROLE_OUTPUT, "log_decay", &a->log_decay, NULL, b, t, c);
	add_sequences(l, ROLE_OUTPUT, "out", &a->out, NULL, b, t, c);
	keeps_fp32(l);
}

static double lru_gate_flops(const void *args)
{
	const struct lru_gate_args *a = args;

	return LRU_GATE_FLOPS * (double)(a->batch * a->seq_len * a->width);
}

DESCRIPTION(lru_gate);

static void describe_lru_gate_backward(void *args, struct operand_list *l)
{
	struct lru_gate_backward_args *x = args;
	struct lru_gate_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension c = CHANNELS(a->width), gates = INNER(2);

	describe_lru_gate(a, l);
	forward_ends(l, "");
	add_sequences(l, ROLE_INPUT, "dlog_decay", &x->dlog_decay, NULL, b, t, c);
	add_sequences(l, ROLE_INPUT, "dout", &x->dout, NULL, b, t, c);
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "dlogit", &x->dlogit, b, t, gates, c);
	add_sequences(l, ROLE_OUTPUT, "dx", &x->dx, NULL, b, t, c);
	add_floats(l, ROLE_GRADIENT, "dbias", &x->dbias, INNER(1), gates, c);
	add_vector(l, ROLE_GRADIENT, "drate", &x->drate, c);
	keeps_fp32(l);
}

BACKWARD(lru_gate, LRU_GATE, 2);

/* ---- a gate of gelu ---- */

static void size_gelu_gate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct gelu_gate_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->width = a->gate_stride = s->width;
}

static void describe_gelu_gate(void *args, struct operand_list *l)
{
	struct gelu_gate_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), c = CHANNELS(a->width);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_CHANNEL, &a->width);
	add_rows(l, ROLE_INPUT, "gate", &a->gate, &a->gate_stride, n, c)->scale = 2;
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, n, c);
	add_rows(l, ROLE_OUTPUT, "out", &a->out, NULL, n, c);
	keeps_fp32(l);
}

static double gelu_gate_flops(const void *args)
{
	const struct gelu_gate_args *a = args;

	return GELU_GATE_FLOPS * (double)(a->n_tokens * a->width);
}

DESCRIPTION(gelu_gate);

static void describe_gelu_gate_backward(void *args, struct operand_list *l)
{
	struct gelu_gate_backward_args *b = args;
	struct gelu_gate_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), c = CHANNELS(a->width);

	describe_gelu_gate(a, l);
	forward_ends(l, "");
	add_rows(l, ROLE_INPUT, "dout", &b->dout, NULL, n, c);
	add_rows(l, ROLE_OUTPUT, "dgate", &b->dgate, &a->gate_stride, n, c);
	add_rows(l, ROLE_OUTPUT, "dx", &b->dx, NULL, n, c);
	keeps_fp32(l);
}

BACKWARD(gelu_gate, GELU_GATE, 2);
