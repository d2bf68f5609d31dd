/* RAT inside a chunk, and its step. */
#include "kernels/operation.h"

/* h = g h + (1-g) x is two multiply-adds, of keys and of values. */
static double scan_flops(double elements)
{
	return 2 * 4 * elements;
}

static void size_rat_scan(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct rat_scan_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->n_heads = s->n_heads;
	a->groups = s->groups;
	a->d_head = s->d_head;
	a->chunk = s->chunk;
	a->rope = !s->any || s->bits & 3;
	a->scale = key_scale(s->d_head);
}

static void describe_rat_scan(void *args, struct operand_list *l)
{
	struct rat_scan_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), g = GROUPS(a->groups), d = INNER(a->d_head);
	const struct dimension chunks = KEYS(divide_up(a->seq_len, a->chunk));

	cut_heads(l, &a->batch, &a->n_heads, &a->groups);
	l->token_step = a->chunk;
	l->extent[AXIS_TOKEN] = &a->seq_len;
	add_view(l, ROLE_INPUT, "v", &a->v, b, t, h, d);
	exponent(add_view(l, ROLE_INPUT, "gate", &a->gate, b, t, h, d))->scale = 2;
	add_view(l, ROLE_INPUT, "q", &a->q, b, t, g, d);
	add_view(l, ROLE_INPUT, "k", &a->k, b, t, g, d);
	uniform(add_floats(l, ROLE_PARAMETER, "gate_bias", &a->gate_bias, INNER(1), h, d), 3);
	add_view(l, ROLE_OUTPUT, "v_scan", &a->v_scan, b, t, h, d);
	add_floats(l, ROLE_OUTPUT, "own_score", &a->own_score, b, t, h);
	add_view(l, ROLE_OUTPUT, "q_out", &a->q_out, b, t, g, d)->alias = "q";
	add_view(l, ROLE_OUTPUT, "k_chunk", &a->k_chunk, b, chunks, h, d);
	add_view(l, ROLE_OUTPUT, "v_chunk", &a->v_chunk, b, chunks, h, d);
	add_floats(l, ROLE_OUTPUT, "k_state", &a->k_state, b, h, d)->optional = true;
	add_floats(l, ROLE_OUTPUT, "v_state", &a->v_state, b, h, d)->optional = true;
	keeps_fp32(l);
}

/* The own score's product is counted by the attention that uses it, as a visible pair. */
static double rat_scan_flops(const void *args)
{
	const struct rat_scan_args *a = args;

	return scan_flops((double)(a->batch * a->seq_len * a->n_heads * a->d_head));
}

static const struct operation_form rat_scan_variants[] = {
        {.name = "rat_scan_forward", .chunks = true}, {0}};

DESCRIPTION(rat_scan, .variants = rat_scan_variants);

static void describe_rat_scan_backward(void *args, struct operand_list *l)
{
	struct rat_scan_backward_args *x = args;
	struct rat_scan_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), g = GROUPS(a->groups), d = INNER(a->d_head);
	const struct dimension chunks = KEYS(divide_up(a->seq_len, a->chunk));

	describe_rat_scan(a, l);
	forward_ends(l, "");
	/* q is read as it was projected: the forward must not have rotated it in place. */
	l->sums_groups = true;
	add_view(l, ROLE_INPUT, "dv_scan", &x->dv_scan, b, t, h, d);
	/* Times keys of the scan. */
	add_floats(l, ROLE_INPUT, "down_score", &x->down_score, b, t, h)->factor = true;
	add_view(l, ROLE_INPUT, "dq_out", &x->dq_out, b, t, g, d);
	add_view(l, ROLE_INPUT, "dk_chunk", &x->dk_chunk, b, chunks, h, d);
	add_view(l, ROLE_INPUT, "dv_chunk", &x->dv_chunk, b, chunks, h, d);
	add_view(l, ROLE_OUTPUT, "dv", &x->dv, b, t, h, d);
	add_view(l, ROLE_OUTPUT, "dgate", &x->dgate, b, t, h, d);
	add_view(l, ROLE_OUTPUT, "dq", &x->dq, b, t, g, d);
	add_view(l, ROLE_OUTPUT, "dk", &x->dk, b, t, g, d);
	add_floats(l, ROLE_GRADIENT, "dgate_bias", &x->dgate_bias, INNER(1), h, d);
}

BACKWARD(rat_scan, RAT_SCAN, 2.5);

static void size_rat_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct rat_step_args *a = args;

	a->batch = s->batch;
	a->n_heads = s->n_heads;
	a->groups = s->groups;
	a->d_head = s->d_head;
	a->chunk = s->chunk;
	a->chunk_slots = divide_up(s->seq_len, s->chunk);
	a->rope = !s->any || s->bits & 3;
	a->scale = key_scale(s->d_head);
	a->position_hint = s->seq_len - 1;
}

/* The position, where the host knows it; else the last one that there are slots for. */
static int64_t step_position(const struct rat_step_args *a)
{
	return a->position_hint >= 0 ? a->position_hint : a->chunk * a->chunk_slots - 1;
}

/* The running pair is not read where a chunk begins, and is stored where one ends. */
static void describe_rat_step(void *args, struct operand_list *l)
{
	struct rat_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), h = HEADS(a->n_heads), d = INNER(a->d_head);
	const struct dimension one = TOKENS(1), g = GROUPS(a->groups), slots = KEYS(a->chunk_slots);
	const int64_t position = step_position(a);
	const double width = (double)(a->batch * a->n_heads * a->d_head);
	struct operand *o;

	cut_heads(l, &a->batch, &a->n_heads, &a->groups);
	add_position(l, &a->position, position + 1);
	add_view(l, ROLE_INPUT, "z", &a->z, b, one, h, d);
	add_view(l, ROLE_INPUT, "v", &a->v, b, one, h, d);
	add_view(l, ROLE_INPUT, "gate", &a->gate, b, one, h, d)->scale = 2;
	add_view(l, ROLE_INPUT, "q", &a->q, b, one, g, d)->side = SIDE_QUERIES;
	add_view(l, ROLE_INPUT, "k", &a->k, b, one, g, d);
	uniform(add_floats(l, ROLE_PARAMETER, "gate_bias", &a->gate_bias, INNER(1), h, d), 3);
	for (int i = 0; i < 2; i++) {
		o = add_array(l, ROLE_STATE, ELEMENT_FP32, i == 0 ? "k_state" : "v_state",
		              i == 0 ? (void *)&a->k_state : (void *)&a->v_state, INNER(1), b, h,
		              d);
		o->read = position % a->chunk != 0 ? width : 0;
	}
	for (int i = 0; i < 2; i++) {
		o = add_view(l, ROLE_STATE, i == 0 ? "k_chunk" : "v_chunk",
		             i == 0 ? &a->k_chunk : &a->v_chunk, b, slots, h, d);
		o->read = width * (double)(position / a->chunk);
		o->written = position % a->chunk == a->chunk - 1 ? width : 0;
		o->side = i == 0 ? SIDE_KEYS : SIDE_NONE;
	}
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, one, h, d);
	keeps_fp32(l);
}

static double rat_step_flops(const void *args)
{
	const struct rat_step_args *a = args;
	const double width = (double)(a->batch * a->n_heads * a->d_head);

	return scan_flops(width) + 4 * width * (double)(step_position(a) / a->chunk + 1);
}

static const struct operation_form rat_step_variants[] = {{.name = "rat_decode", .chunks = true},
                                                          {0}};

DESCRIPTION(rat_step, .is_step = true, .variants = rat_step_variants);
