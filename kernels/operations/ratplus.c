/* RAT+'s step; the rest of it are recurrences, rotations and attention. */
#include "kernels/key_lists.h"
#include "kernels/operation.h"

/* Where nobody says otherwise. */
enum { DILATION = 16, WINDOW = 256, INITIAL = 4 };

/* In a test any mask, and now and then a ring that holds every token. */
static void size_ratplus_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct ratplus_step_args *a = args;

	a->batch = s->batch;
	a->n_heads = s->n_heads;
	a->d_head = s->d_head;
	a->window = s->any ? s->window : WINDOW;
	a->dilation = s->any ? (int64_t)(s->bits >> 20 & 31) : DILATION;
	a->initial = s->any ? (int64_t)(s->bits >> 25 & 15) : INITIAL;
	a->rope = !s->any || s->bits & 3;
	a->scale = key_scale(s->d_head);
	a->position_hint = s->seq_len - 1;
	a->recent_slots = a->window < s->seq_len ? a->window + 1 : s->seq_len;
	a->kept_slots = 1 + keys_before(KEYS_KEPT, a->dilation, a->initial, s->seq_len);
}

/* The position, where the host knows it; else the last one that there are kept tokens for. */
static int64_t step_position(const struct ratplus_step_args *a)
{
	if (a->position_hint >= 0)
		return a->position_hint;
	return a->dilation > 0 ? a->dilation * a->kept_slots - 1 : a->recent_slots - 1;
}

/* Tokens before this one that are within the window, and kept ones older than that. */
static int64_t recent_seen(const struct ratplus_step_args *a)
{
	const int64_t position = step_position(a);

	return position < a->window ? position : a->window;
}

static int64_t kept_seen(const struct ratplus_step_args *a)
{
	return keys_before(KEYS_KEPT, a->dilation, a->initial, step_position(a) - recent_seen(a));
}

static void add_cache(struct operand_list *l, const struct ratplus_step_args *a, const char *name,
                      struct view *view, int64_t slots, int64_t seen, bool stored)
{
	const double width = (double)(a->batch * a->n_heads * a->d_head);
	struct operand *o = add_view(l, ROLE_STATE, name, view, SEQUENCES(a->batch), KEYS(slots),
	                             HEADS(a->n_heads), INNER(a->d_head));

	o->read = width * (double)seen;
	o->written = stored ? width : 0;
	o->side = name[0] == 'k' ? SIDE_KEYS : SIDE_NONE;
}

/* The running pair is not read at the first token. */
static void describe_ratplus_step(void *args, struct operand_list *l)
{
	struct ratplus_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), h = HEADS(a->n_heads), d = INNER(a->d_head);
	const struct dimension one = TOKENS(1);
	const int64_t position = step_position(a);
	const bool keeps = is_kept(a->dilation, a->initial, position);
	struct operand *o;

	cut_heads(l, &a->batch, &a->n_heads, NULL);
	add_position(l, &a->position, position + 1);
	add_view(l, ROLE_INPUT, "z", &a->z, b, one, h, d);
	add_view(l, ROLE_INPUT, "q", &a->q, b, one, h, d)->side = SIDE_QUERIES;
	add_view(l, ROLE_INPUT, "k", &a->k, b, one, h, d);
	add_view(l, ROLE_INPUT, "v", &a->v, b, one, h, d);
	add_view(l, ROLE_INPUT, "gate", &a->gate, b, one, h, d)->scale = 2;
	for (int i = 0; i < 2; i++) {
		o = add_array(l, ROLE_STATE, ELEMENT_FP32, i == 0 ? "k_state" : "v_state",
		              i == 0 ? (void *)&a->k_state : (void *)&a->v_state, INNER(1), b, h,
		              d);
		o->read = position > 0 ? o->read : 0;
	}
	add_cache(l, a, "k_kept", &a->k_kept, a->kept_slots, kept_seen(a), keeps);
	add_cache(l, a, "v_kept", &a->v_kept, a->kept_slots, kept_seen(a), keeps);
	add_cache(l, a, "k_recent", &a->k_recent, a->recent_slots, recent_seen(a), true);
	add_cache(l, a, "v_recent", &a->v_recent, a->recent_slots, recent_seen(a), true);
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, one, h, d);
	keeps_fp32(l);
}

/* Two recurrences of two multiply-adds, and 4 FLOPs for each element of a visible key. */
static double ratplus_step_flops(const void *args)
{
	const struct ratplus_step_args *a = args;
	const double width = (double)(a->batch * a->n_heads * a->d_head);

	return width * (2 * 4 + 4 * (double)(kept_seen(a) + recent_seen(a) + 1));
}

static const struct operation_form ratplus_step_variants[] = {{.name = "ratplus_decode"}, {0}};

DESCRIPTION(ratplus_step, .is_step = true, .variants = ratplus_step_variants);
