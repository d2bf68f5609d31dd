/* Each head of q or k to length 1, as the delta rules want them. */
#include "kernels/operation.h"

enum { L2_FLOPS = 3 /* square, add; times the inverse length */ };

static void size_l2_norm(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct l2_norm_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->n_heads = s->n_heads;
	a->d_head = s->d_head;
	a->eps = 1e-6f;
}

static void describe_l2_norm(void *args, struct operand_list *l)
{
	struct l2_norm_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), d = INNER(a->d_head);

	cut_heads(l, &a->batch, &a->n_heads, NULL);
	add_view(l, ROLE_INPUT, "x|q", &a->x, b, t, h, d);
	add_view(l, ROLE_OUTPUT, "y|o", &a->y, b, t, h, d)->alias = "x";
	optional(add_floats(l, ROLE_OUTPUT, "inverse", &a->inverse, b, t, h), false);
	keeps_fp32(l);
}

static double l2_norm_flops(const void *args)
{
	const struct l2_norm_args *a = args;

	return L2_FLOPS * (double)(a->batch * a->seq_len * a->n_heads * a->d_head);
}

static const struct operation_form l2_norm_variants[] = {
        {.name = "l2_norm_forward", .golden = "l2_norm"}, {.name = NULL}};

DESCRIPTION(l2_norm, .variants = l2_norm_variants);

static void describe_l2_norm_backward(void *args, struct operand_list *l)
{
	struct l2_norm_backward_args *x = args;
	struct l2_norm_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), d = INNER(a->d_head);

	describe_l2_norm(a, l);
	forward_ends(l, "y|inverse");
	operand_find(l, "x")->read = 0;
	add_view(l, ROLE_INPUT, "dy|do", &x->dy, b, t, h, d);
	add_view(l, ROLE_OUTPUT, "dx|dq", &x->dx, b, t, h, d)->alias = "dy";
	keeps_fp32(l);
}

BACKWARD(l2_norm, L2_NORM, 2);
