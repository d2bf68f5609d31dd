/* RWKV's token shift: each channel of a token, mixed with that of the token before. */
#include "kernels/operation.h"

enum {
	DIFFERENCE_FLOPS = 1, /* once for all outputs */
	MIX_FLOPS = 2         /* of an output: times the mix, add */
};

/* RWKV-6 has one constant mix, and five that vary. */
static int64_t usual_outputs(enum shift form)
{
	return form == SHIFT_VARIABLE ? 5 : 1;
}

static int64_t count_outputs(const struct sizes *s, enum shift form)
{
	return s->any ? 1 + (int64_t)(s->bits % 5) : usual_outputs(form);
}

static double shift_flops(int64_t elements, int64_t n_out)
{
	return (double)elements * (double)(DIFFERENCE_FLOPS + MIX_FLOPS * n_out);
}

static void size_token_shift(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct token_shift_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->width = s->width;
	a->form = v->shift;
	a->n_out = count_outputs(s, a->form);
}

/* The mixes, which are parameters or a token's. */
static void add_mixes(struct operand_list *l, enum shift form, const float **weight,
                      const void **mix, const struct dimension dims[4])
{
	if (form == SHIFT_CONSTANT)
		uniform(add_floats(l, ROLE_PARAMETER, "weight", weight, INNER(1), dims[0], dims[3]),
		        1);
	else
		add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "mix", mix, dims[0], dims[1], dims[2],
		          dims[3]);
}

static void describe_token_shift(void *args, struct operand_list *l)
{
	struct token_shift_args *a = args;
	const struct dimension n = INNER(a->n_out), b = SEQUENCES(a->batch);
	const struct dimension t = TOKENS(a->seq_len), c = CHANNELS(a->width);
	const struct dimension dims[] = {n, b, t, c};

	add_option(l, &a->form);
	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->width);
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "x", &a->x, INNER(1), b, t, c);
	add_mixes(l, a->form, &a->weight, &a->mix, dims);
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "out", &a->out, n, b, t, c);
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "last", &a->last, INNER(1), INNER(1), b, c)
	        ->optional = true;
	keeps_fp32(l);
}

static double token_shift_flops(const void *args)
{
	const struct token_shift_args *a = args;

	return shift_flops(a->batch * a->seq_len * a->width, a->n_out);
}

static const struct operation_form token_shift_variants[] = {
        {"token_shift", .shift = SHIFT_CONSTANT}, {"variable_shift", .shift = SHIFT_VARIABLE}, {0}};

DESCRIPTION(token_shift, .variants = token_shift_variants);

static void describe_token_shift_backward(void *args, struct operand_list *l)
{
	struct token_shift_backward_args *x = args;
	struct token_shift_args *a = &x->forward;
	const struct dimension n = INNER(a->n_out), b = SEQUENCES(a->batch);
	const struct dimension t = TOKENS(a->seq_len), c = CHANNELS(a->width), one = INNER(1);
	struct operand *o;

	describe_token_shift(a, l);
	forward_ends(l, "");
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "dout", &x->dout, n, b, t, c);
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "dresidual", &x->dresidual, one, b, t, c)
	        ->optional = true;
	o = add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "dx", &x->dx, one, b, t, c);
	o->alias = o->base = "dresidual";
	if (a->form == SHIFT_VARIABLE)
		add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "dmix", &x->dmix, n, b, t, c);
	else
		add_floats(l, ROLE_GRADIENT, "dweight", &x->dweight, one, n, c);
	keeps_fp32(l);
}

static double token_shift_backward_flops(const void *args)
{
	const struct token_shift_backward_args *x = args;
	const struct token_shift_args *a = &x->forward;

	return 2 * token_shift_flops(args) +
	       (x->dresidual ? (double)(a->batch * a->seq_len * a->width) : 0);
}

BACKWARD_OF(token_shift, TOKEN_SHIFT, size_token_shift);

static void size_token_shift_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct token_shift_step_args *a = args;

	a->batch = s->batch;
	a->width = s->width;
	a->form = v->shift;
	a->n_out = count_outputs(s, a->form);
}

static void describe_token_shift_step(void *args, struct operand_list *l)
{
	struct token_shift_step_args *a = args;
	const struct dimension n = INNER(a->n_out), b = SEQUENCES(a->batch), one = INNER(1);
	const struct dimension c = CHANNELS(a->width), dims[] = {n, one, b, c};
	const bool moves = a->form == SHIFT_CONSTANT;
	struct operand *o;

	add_option(l, &a->form);
	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->width);
	add_array(l, ROLE_INPUT, ELEMENT_ACTIVATION, "x", &a->x, one, one, b, c);
	add_mixes(l, a->form, &a->weight, &a->mix, dims);
	if (moves)
		add_array(l, ROLE_STATE, ELEMENT_ACTIVATION, "state", &a->state, one, one, b, c);
	o = add_array(l, moves ? ROLE_OUTPUT : ROLE_INPUT, ELEMENT_ACTIVATION, "before", &a->before,
	              one, one, b, c);
	o->optional = o->usual = moves;
	add_array(l, ROLE_OUTPUT, ELEMENT_ACTIVATION, "out", &a->out, n, one, b, c);
	keeps_fp32(l);
}

static double token_shift_step_flops(const void *args)
{
	const struct token_shift_step_args *a = args;

	return shift_flops(a->batch * a->width, a->n_out);
}

static const struct operation_form token_shift_step_variants[] = {
        {"token_shift_step", .shift = SHIFT_CONSTANT},
        {"variable_shift_step", .shift = SHIFT_VARIABLE},
        {0}};

DESCRIPTION(token_shift_step, .is_step = true, .variants = token_shift_step_variants);
