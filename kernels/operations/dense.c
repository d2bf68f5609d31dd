/* Products with weights, and what a model has around its layers. */
#include "kernels/operation.h"

enum {
	NORM_FLOPS = 4,            /* square, add; times rstd, times weight */
	GELU_FLOPS = 5,            /* divide, erf, add, halve, times x */
	SOFTMAX_LOSS_FLOPS = 4,    /* maximum, subtract, exp, add */
	SOFTMAX_GRADIENT_FLOPS = 1 /* divide by the sum */
};

static double product(int64_t n, int64_t k, int64_t m)
{
	return 2 * (double)n * (double)k * (double)m;
}

/* One per element of what is added to a product, if it is there. */
static double additions(bool there, int64_t n, int64_t m)
{
	return there ? (double)n * (double)m : 0;
}

/* ---- norm_linear ---- */

static void size_norm_linear(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct norm_linear_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->d_in = s->d_in;
	a->d_out = s->d_out;
	a->eps = 1e-6f;
}

static void describe_norm_linear(void *args, struct operand_list *l)
{
	struct norm_linear_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), in = INS(a->d_in), out = OUTS(a->d_out);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	l->extent[AXIS_IN] = &a->d_in;
	cut_along(l, AXIS_OUT, &a->d_out);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, n, in);
	uniform(optional(add_vector(l, ROLE_PARAMETER, "norm_weight", &a->norm_weight, in), true),
	        2);
	add_rows(l, ROLE_PARAMETER, "weight", &a->weight, NULL, out, in)->scale = 0.02f;
	optional(add_vector(l, ROLE_PARAMETER, "bias", &a->bias, out), false);
	if (a->norm_weight) {
		add_rows(l, ROLE_OUTPUT, "x_norm", &a->x_norm, NULL, n, in);
		add_vector(l, ROLE_OUTPUT, "rstd", &a->rstd, n)->optional = true;
	} else {
		a->x_norm = (void *)a->x;
	}
	keeps_fp32(l);
	/* The product's input is x_norm, rounded. */
	add_rows(l, ROLE_OUTPUT, "y", &a->y, NULL, n, out);
}

static double norm_linear_flops(const void *args)
{
	const struct norm_linear_args *a = args;
	const double norm = a->norm_weight ? NORM_FLOPS * (double)a->n_tokens * (double)a->d_in : 0;

	return product(a->n_tokens, a->d_in, a->d_out) + norm +
	       additions(a->bias != NULL, a->n_tokens, a->d_out);
}

static const struct operation_form norm_linear_variants[] = {{"norm_linear", .widening = 3}, {0}};

DESCRIPTION(norm_linear, .variants = norm_linear_variants);

static void describe_norm_linear_backward(void *args, struct operand_list *l)
{
	struct norm_linear_backward_args *b = args;
	struct norm_linear_args *a = &b->forward;
	const struct dimension n = ROWS(a->n_tokens), in = INS(a->d_in), out = OUTS(a->d_out);
	struct operand *o;

	describe_norm_linear(a, l);
	forward_ends(l, "x_norm|rstd");
	if (a->norm_weight)
		operand_find(l, "rstd")->optional = false;
	add_rows(l, ROLE_INPUT, "dy", &b->dy, NULL, n, out);
	add_rows(l, ROLE_INPUT, "dresidual", &b->dresidual, NULL, n, in)->optional = true;
	add_rows(l, ROLE_SCRATCH, "dx_norm", &b->dx_norm, NULL, n, in);
	o = add_rows(l, ROLE_OUTPUT, "dx", &b->dx, NULL, n, in);
	o->alias = o->base = "dresidual";
	/* A column's sum over the tokens needs no other column of x. */
	if (a->norm_weight)
		add_vector(l, ROLE_GRADIENT, "dnorm_weight", &b->dnorm_weight, in)->apart =
		        ALONG(AXIS_IN);
	add_floats(l, ROLE_GRADIENT, "dweight", &b->dweight, INNER(1), out, in);
	if (a->bias)
		add_vector(l, ROLE_GRADIENT, "dbias", &b->dbias, out)->apart = ALONG(AXIS_OUT);
	operand_find(l, "bias")->read = 0;
	/* x is read by the norm alone, x_norm by the product. */
	if (!a->norm_weight)
		operand_find(l, "x")->read = (double)(a->n_tokens * a->d_in);
}

static double norm_linear_backward_flops(const void *args)
{
	const struct norm_linear_backward_args *b = args;
	const struct norm_linear_args *a = &b->forward;
	/* A bias's gradient is one addition per element, as the bias is. */
	return 2 * norm_linear_flops(a) - additions(a->bias != NULL, a->n_tokens, a->d_out) +
	       additions(b->dresidual != NULL, a->n_tokens, a->d_in);
}

BACKWARD_OF(norm_linear, NORM_LINEAR, size_norm_linear);

/* ---- linear_residual ---- */

static void size_linear_residual(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct linear_residual_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->d_in = s->d_in;
	a->d_out = s->d_out;
}

static void describe_linear_residual(void *args, struct operand_list *l)
{
	struct linear_residual_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), in = INS(a->d_in), out = OUTS(a->d_out);
	struct operand *o;

	cut_along(l, AXIS_ROW, &a->n_tokens);
	l->extent[AXIS_IN] = &a->d_in;
	cut_along(l, AXIS_OUT, &a->d_out);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, n, in);
	add_rows(l, ROLE_PARAMETER, "weight", &a->weight, NULL, out, in)->scale = 0.02f;
	optional(add_vector(l, ROLE_PARAMETER, "bias", &a->bias, out), false);
	add_rows(l, ROLE_INPUT, "residual", &a->residual, NULL, n, out)->optional = true;
	/* Kernels may round the product before they add to it. */
	o = add_rows(l, ROLE_OUTPUT, "y", &a->y, NULL, n, out);
	o->alias = o->base = "residual";
}

static double linear_residual_flops(const void *args)
{
	const struct linear_residual_args *a = args;

	return product(a->n_tokens, a->d_in, a->d_out) +
	       additions(a->residual != NULL, a->n_tokens, a->d_out) +
	       additions(a->bias != NULL, a->n_tokens, a->d_out);
}

static const struct operation_form linear_variants[] = {{"linear", .widening = 3}, {0}};

DESCRIPTION(linear_residual, .variants = linear_variants);

static void size_linear_residual_backward(void *args, const struct sizes *s,
                                          const struct operation_form *v)
{
	struct linear_residual_backward_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->d_in = s->d_in;
	a->d_out = s->d_out;
}

static void describe_linear_residual_backward(void *args, struct operand_list *l)
{
	struct linear_residual_backward_args *a = args;
	const struct dimension n = ROWS(a->n_tokens), in = INS(a->d_in), out = OUTS(a->d_out);

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_IN, &a->d_in);
	cut_along(l, AXIS_OUT, &a->d_out);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, n, in);
	add_rows(l, ROLE_PARAMETER, "weight", &a->weight, NULL, out, in)->scale = 0.02f;
	add_rows(l, ROLE_INPUT, "dy", &a->dy, NULL, n, out);
	add_rows(l, ROLE_OUTPUT, "dx", &a->dx, NULL, n, in);
	add_floats(l, ROLE_GRADIENT, "dweight", &a->dweight, INNER(1), out, in);
	optional(add_vector(l, ROLE_GRADIENT, "dbias", &a->dbias, out), false);
	keeps_fp32(l);
}

static double linear_residual_backward_flops(const void *args)
{
	const struct linear_residual_backward_args *a = args;

	return 2 * product(a->n_tokens, a->d_in, a->d_out) +
	       additions(a->dbias != NULL, a->n_tokens, a->d_out);
}

static const struct operation_form linear_backward_variants[] = {{"linear_backward", .widening = 3},
                                                                 {0}};

DESCRIPTION(linear_residual_backward, .variants = linear_backward_variants);

/* ---- gelu ---- */

static void size_gelu(void *args, const struct sizes *s, const struct operation_form *v)
{
	((struct gelu_args *)args)->count = s->batch * s->seq_len * s->width;
}

static void describe_gelu(void *args, struct operand_list *l)
{
	struct gelu_args *a = args;

	cut_along(l, AXIS_ROW, &a->count);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, INNER(1), ROWS(a->count));
	/* 1 + erf(x) vanishes on the left. */
	add_rows(l, ROLE_OUTPUT, "y", &a->y, NULL, INNER(1), ROWS(a->count))->alias = "x";
	keeps_fp32(l);
}

static double gelu_flops(const void *args)
{
	return GELU_FLOPS * (double)((const struct gelu_args *)args)->count;
}

DESCRIPTION(gelu);

static void size_gelu_backward(void *args, const struct sizes *s, const struct operation_form *v)
{
	((struct gelu_backward_args *)args)->count = s->batch * s->seq_len * s->width;
}

static void describe_gelu_backward(void *args, struct operand_list *l)
{
	struct gelu_backward_args *a = args;

	cut_along(l, AXIS_ROW, &a->count);
	add_rows(l, ROLE_INPUT, "x", &a->x, NULL, INNER(1), ROWS(a->count));
	add_rows(l, ROLE_INPUT, "dy", &a->dy, NULL, INNER(1), ROWS(a->count));
	add_rows(l, ROLE_OUTPUT, "dx", &a->dx, NULL, INNER(1), ROWS(a->count))->alias = "dy";
	keeps_fp32(l);
}

static double gelu_backward_flops(const void *args)
{
	return 2 * GELU_FLOPS * (double)((const struct gelu_backward_args *)args)->count;
}

DESCRIPTION(gelu_backward);

/* ---- embedding ---- */

static void size_embedding(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct embedding_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->vocab = s->vocab;
	a->d_model = s->width;
}

static void describe_embedding(void *args, struct operand_list *l)
{
	struct embedding_args *a = args;
	struct operand *table;

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_CHANNEL, &a->d_model);
	integers(add_vector(l, ROLE_INPUT, "tokens", &a->tokens, ROWS(a->n_tokens)), a->vocab);
	table = add_rows(l, ROLE_PARAMETER, "table", &a->table, NULL, INNER(a->vocab),
	                 CHANNELS(a->d_model));
	table->read = (double)(a->n_tokens * a->d_model);
	add_rows(l, ROLE_OUTPUT, "y", &a->y, NULL, ROWS(a->n_tokens), CHANNELS(a->d_model));
	keeps_fp32(l);
}

static double embedding_flops(const void *args)
{
	return 0;
}

DESCRIPTION(embedding);

static void size_embedding_backward(void *args, const struct sizes *s,
                                    const struct operation_form *v)
{
	struct embedding_backward_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->vocab = s->vocab;
	a->d_model = s->width;
}

static void describe_embedding_backward(void *args, struct operand_list *l)
{
	struct embedding_backward_args *a = args;

	cut_along(l, AXIS_ROW, &a->n_tokens);
	cut_along(l, AXIS_CHANNEL, &a->d_model);
	integers(add_vector(l, ROLE_INPUT, "tokens", &a->tokens, ROWS(a->n_tokens)), a->vocab);
	add_rows(l, ROLE_INPUT, "dy", &a->dy, NULL, ROWS(a->n_tokens), CHANNELS(a->d_model));
	add_floats(l, ROLE_GRADIENT, "dtable", &a->dtable, INNER(1), INNER(a->vocab),
	           CHANNELS(a->d_model));
	keeps_fp32(l);
}

/* One addition per element. */
static double embedding_backward_flops(const void *args)
{
	const struct embedding_backward_args *a = args;

	return (double)a->n_tokens * (double)a->d_model;
}

DESCRIPTION(embedding_backward);

/* ---- the end of a model ---- */

static void size_cross_entropy(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct cross_entropy_args *a = args;

	a->n_tokens = s->batch * s->seq_len;
	a->vocab = s->vocab;
	a->want_gradient = !s->any || s->bits & 1;
}

static void describe_cross_entropy(void *args, struct operand_list *l)
{
	struct cross_entropy_args *a = args;
	const enum role role = a->want_gradient ? ROLE_STATE : ROLE_INPUT;

	l->extent[AXIS_ROW] = &a->n_tokens;
	add_rows(l, role, "logits", &a->logits, NULL, ROWS(a->n_tokens), INNER(a->vocab));
	integers(add_vector(l, ROLE_INPUT, "targets", &a->targets, ROWS(a->n_tokens)), a->vocab);
	add_vector(l, ROLE_OUTPUT, "loss", &a->loss, INNER(1));
	add_vector(l, ROLE_SCRATCH, "losses", &a->losses, ROWS(a->n_tokens));
	keeps_fp32(l);
}

static double cross_entropy_flops(const void *args)
{
	const struct cross_entropy_args *a = args;

	return (SOFTMAX_LOSS_FLOPS + (a->want_gradient ? SOFTMAX_GRADIENT_FLOPS : 0)) *
	       (double)a->n_tokens * (double)a->vocab;
}

DESCRIPTION(cross_entropy);

static void size_argmax(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct argmax_args *a = args;

	a->n_tokens = s->batch;
	a->vocab = s->vocab;
}

static void describe_argmax(void *args, struct operand_list *l)
{
	struct argmax_args *a = args;

	l->extent[AXIS_ROW] = &a->n_tokens;
	add_rows(l, ROLE_INPUT, "logits", &a->logits, NULL, ROWS(a->n_tokens), INNER(a->vocab));
	integers(add_vector(l, ROLE_OUTPUT, "tokens", &a->tokens, ROWS(a->n_tokens)), a->vocab);
	integers(add_vector(l, ROLE_STATE, "position", &a->position, INNER(1)), 100)->optional =
	        true;
}

/* One comparison per logit. */
static double argmax_flops(const void *args)
{
	const struct argmax_args *a = args;

	return (double)a->n_tokens * (double)a->vocab;
}

DESCRIPTION(argmax, .is_step = true);
