/* Mamba's selective scan. */
#include "kernels/operation.h"

enum {
	STATE = 16, /* the benchmark's N, which is Mamba's */
	/* Of each of the N numbers: times the rate, exp; decay and add the input; read. */
	STATE_FLOPS = 6,
	INPUT_FLOPS = 1, /* dt u */
	SKIP_FLOPS = 2,  /* times its weight, add */
	GATE_FLOPS = 5   /* exp, add, divide; times z, times y */
};

/* Most tests have the usual number of states. */
static int64_t any_state(const struct sizes *s)
{
	const uint64_t bits = s->bits >> 16;

	return s->any && bits % 4 == 0 ? 1 + (int64_t)((bits >> 2) % 24) : STATE;
}

static void size_selective_scan(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct selective_scan_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->channels = s->width;
	a->state = any_state(s);
}

/* The inputs of both forms of the arguments, of which the step's has one token. */
struct scan_inputs {
	int64_t channels, state;
	struct view *u, *dt, *z, *b, *c;
	const float **log_rate, **skip;
};

static void add_scan_inputs(struct operand_list *l, const struct scan_inputs *a, struct dimension b,
                            struct dimension t)
{
	const struct dimension one = INNER(1), d = CHANNELS(a->channels), n = INNER(a->state);

	add_view(l, ROLE_INPUT, "u", a->u, b, t, one, d);
	uniform(log_of_decay(add_view(l, ROLE_INPUT, "dt", a->dt, b, t, one, d)), 0.2);
	optional(add_view(l, ROLE_INPUT, "z", a->z, b, t, one, d), true)->scale = 2;
	add_view(l, ROLE_INPUT, "b", a->b, b, t, one, n);
	add_view(l, ROLE_INPUT, "c", a->c, b, t, one, n);
	/* Rates of 1 to 16. */
	uniform(exponent(add_floats(l, ROLE_PARAMETER, "log_rate", a->log_rate, one, d, n)),
	        log(16));
	optional(add_vector(l, ROLE_PARAMETER, "skip", a->skip, d), true);
}

static void describe_selective_scan(void *args, struct operand_list *l)
{
	struct selective_scan_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len), one = INNER(1);
	const struct dimension d = CHANNELS(a->channels), n = INNER(a->state);
	const struct dimension borders = KEYS(divide_up(a->seq_len, SCAN_CHUNK));

	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->channels);
	add_scan_inputs(l,
	                &(struct scan_inputs){a->channels, a->state, &a->u, &a->dt, &a->z, &a->b,
	                                      &a->c, &a->log_rate, &a->skip},
	                b, t);
	add_floats(l, ROLE_INPUT, "h0", &a->h0, b, n, d)->optional = true;
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, t, one, d);
	add_array(l, ROLE_OUTPUT, ELEMENT_FP32, "borders", &a->borders, b, borders, n, d)
	        ->optional = true;
	add_floats(l, ROLE_OUTPUT, "h_final", &a->h_final, b, n, d)->optional = true;
	keeps_fp32(l);
}

/* Of one token and channel. */
static double scan_flops(int64_t state, bool skip, bool gate)
{
	return STATE_FLOPS * (double)state + INPUT_FLOPS + (skip ? SKIP_FLOPS : 0) +
	       (gate ? GATE_FLOPS : 0);
}

static double selective_scan_flops(const void *args)
{
	const struct selective_scan_args *a = args;

	return scan_flops(a->state, a->skip, a->z.data) *
	       (double)(a->batch * a->seq_len * a->channels);
}

DESCRIPTION(selective_scan);

static void describe_selective_scan_backward(void *args, struct operand_list *l)
{
	struct selective_scan_backward_args *x = args;
	struct selective_scan_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len), one = INNER(1);
	const struct dimension d = CHANNELS(a->channels), n = INNER(a->state);

	describe_selective_scan(a, l);
	forward_ends(l, "borders");
	/* The first border. */
	operand_find(l, "h0")->read = 0;
	add_view(l, ROLE_INPUT, "dout", &x->dout, b, t, one, d);
	add_view(l, ROLE_OUTPUT, "du", &x->du, b, t, one, d);
	add_view(l, ROLE_OUTPUT, "ddt", &x->ddt, b, t, one, d);
	if (a->z.data)
		add_view(l, ROLE_OUTPUT, "dz", &x->dz, b, t, one, d);
	add_view(l, ROLE_OUTPUT, "db", &x->db, b, t, one, n);
	add_view(l, ROLE_OUTPUT, "dc", &x->dc, b, t, one, n);
	add_floats(l, ROLE_GRADIENT, "dlog_rate", &x->dlog_rate, one, d, n);
	if (a->skip)
		add_vector(l, ROLE_GRADIENT, "dskip", &x->dskip, d);
	optional(add_floats(l, ROLE_OUTPUT, "dh0", &x->dh0, b, n, d), false);
	keeps_fp32(l);
}

BACKWARD(selective_scan, SELECTIVE_SCAN, 2.5);

static void size_selective_scan_step(void *args, const struct sizes *s,
                                     const struct operation_form *v)
{
	struct selective_scan_step_args *a = args;

	a->batch = s->batch;
	a->channels = s->width;
	a->state = any_state(s);
}

static void describe_selective_scan_step(void *args, struct operand_list *l)
{
	struct selective_scan_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), one = INNER(1);
	const struct dimension d = CHANNELS(a->channels), n = INNER(a->state);

	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->channels);
	add_scan_inputs(l,
	                &(struct scan_inputs){a->channels, a->state, &a->u, &a->dt, &a->z, &a->b,
	                                      &a->c, &a->log_rate, &a->skip},
	                b, one);
	add_floats(l, ROLE_STATE, "h", &a->h, b, n, d);
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, one, one, d);
	keeps_fp32(l);
}

static double selective_scan_step_flops(const void *args)
{
	const struct selective_scan_step_args *a = args;

	return scan_flops(a->state, a->skip, a->z.data) * (double)(a->batch * a->channels);
}

DESCRIPTION(selective_scan_step, .is_step = true);
