/* Softmax attention, its step, and the rotation of queries and keys. */
#include <math.h>

#include "kernels/key_lists.h"
#include "kernels/operation.h"

enum { ROTATE_FLOPS = 3 /* 4 multiplications and 2 additions for two elements */ };
/* RAT+ where nobody says otherwise. */
enum { DILATION = 16, DILATED_WINDOW = 256, INITIAL = 4 };

static bool same_place(const struct view *a, const struct view *b)
{
	return a->data == b->data && a->token == b->token && a->head == b->head &&
	       a->batch == b->batch;
}

/* ---- rotate ---- */

/* Columns of a head that turn. */
static double turned(bool rope, int64_t rope_width, int64_t d_head)
{
	return !rope ? 0 : (double)(rope_width > 0 ? rope_width : d_head);
}

/* Now and then a half of the head. */
static int64_t any_rope_width(const struct sizes *s)
{
	return s->any && s->d_head % 4 == 0 && s->bits >> 12 & 1 ? s->d_head / 2 : 0;
}

static void size_rotate(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct rotate_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->n_heads = s->n_heads;
	a->kv_heads = s->kv_heads;
	a->d_head = s->d_head;
	a->rope = !s->any || s->bits & 3;
	a->rope_width = any_rope_width(s);
	a->kv_slots = s->seq_len;
	/* Now and then a ring that holds the last tokens alone. */
	if (s->any && s->bits & 4)
		a->kv_slots = 1 + (int64_t)((s->bits >> 3) % (uint64_t)(2 * s->seq_len));
	a->first_kv = a->kv_slots < a->seq_len ? a->seq_len - a->kv_slots : 0;
}

/* An input and where it goes: `count` tokens of it, which need not move if they are there. Of keys
 * and values, which may go to a cache, or of queries. */
static void add_moved(struct operand_list *l, const char *name, struct view *from, const char *out,
                      struct view *to, const struct rotate_args *a, bool rotated, bool cached)
{
	const struct dimension heads = cached ? KV_HEADS(a->kv_heads) : HEADS(a->n_heads);
	const int64_t count = cached ? a->seq_len - a->first_kv : a->seq_len;
	const double columns = same_place(from, to) ? turned(rotated, a->rope_width, a->d_head)
	                                            : (double)a->d_head;
	const double moved = to->data ? (double)(a->batch * heads.size) * columns : 0;
	struct operand *o = add_view(l, ROLE_INPUT, name, from, SEQUENCES(a->batch),
	                             TOKENS(a->seq_len), heads, INNER(a->d_head));

	o->read = moved * (double)count;
	o = add_view(l, cached ? ROLE_STATE : ROLE_OUTPUT, out, to, SEQUENCES(a->batch),
	             cached ? KEYS(a->kv_slots) : TOKENS(a->seq_len), heads, INNER(a->d_head));
	o->optional = true;
	o->usual = rotated; /* values are only copied */
	o->read = 0;
	o->written = moved * (double)count;
	if (!cached || (a->kv_slots == a->seq_len && a->first_kv == 0)) {
		o->alias = name;
		o->role = ROLE_OUTPUT;
	}
}

static void describe_rotate(void *args, struct operand_list *l)
{
	struct rotate_args *a = args;

	cut_kv_heads(l, &a->batch, &a->n_heads, NULL, &a->kv_heads);
	add_moved(l, "q", &a->q, "q_out", &a->q_out, a, a->rope, false);
	add_moved(l, "k", &a->k, "k_out", &a->k_out, a, a->rope, true);
	add_moved(l, "v", &a->v, "v_out", &a->v_out, a, false, true);
	keeps_fp32(l);
}

static double rotate_flops(const void *args)
{
	const struct rotate_args *a = args;
	const double width = (double)a->batch * turned(a->rope, a->rope_width, a->d_head);
	const double q = a->q_out.data ? (double)(a->n_heads * a->seq_len) : 0;
	const double k = a->k_out.data ? (double)(a->kv_heads * (a->seq_len - a->first_kv)) : 0;

	return ROTATE_FLOPS * width * (q + k);
}

DESCRIPTION(rotate);

static void size_rotate_backward(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct rotate_backward_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->n_heads = s->n_heads;
	a->kv_heads = s->kv_heads;
	a->d_head = s->d_head;
	a->rope = !s->any || s->bits & 3;
	a->rope_width = any_rope_width(s);
}

static void describe_rotate_backward(void *args, struct operand_list *l)
{
	struct rotate_backward_args *a = args;
	struct view *const from[] = {&a->dq_out, &a->dk_out}, *const to[] = {&a->dq, &a->dk};
	static const char *const from_names[] = {"dq_out", "dk_out"}, *const to_names[] = {"dq",
	                                                                                   "dk"};
	const struct dimension heads[] = {HEADS(a->n_heads), KV_HEADS(a->kv_heads)};

	cut_kv_heads(l, &a->batch, &a->n_heads, NULL, &a->kv_heads);
	for (int i = 0; i < 2; i++) {
		const double part =
		        same_place(from[i], to[i])
		                ? turned(a->rope, a->rope_width, a->d_head) / (double)a->d_head
		                : 1;
		struct operand *o =
		        add_view(l, ROLE_INPUT, from_names[i], from[i], SEQUENCES(a->batch),
		                 TOKENS(a->seq_len), heads[i], INNER(a->d_head));

		o->read *= part;
		o = add_view(l, ROLE_OUTPUT, to_names[i], to[i], SEQUENCES(a->batch),
		             TOKENS(a->seq_len), heads[i], INNER(a->d_head));
		o->alias = from_names[i];
		o->written *= part;
	}
	keeps_fp32(l);
}

static double rotate_backward_flops(const void *args)
{
	const struct rotate_backward_args *a = args;

	const double tokens = (double)(a->batch * a->seq_len);

	return ROTATE_FLOPS * tokens * (double)(a->n_heads + a->kv_heads) *
	       turned(a->rope, a->rope_width, a->d_head);
}

DESCRIPTION(rotate_backward);

static void size_rotate_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct rotate_step_args *a = args;

	a->batch = s->batch;
	a->n_heads = s->n_heads;
	a->d_head = s->d_head;
}

static void describe_rotate_step(void *args, struct operand_list *l)
{
	struct rotate_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), h = HEADS(a->n_heads);

	cut_heads(l, &a->batch, &a->n_heads, NULL);
	add_position(l, &a->position, 10000);
	add_view(l, ROLE_INPUT, "q", &a->q, b, TOKENS(1), h, INNER(a->d_head));
	add_view(l, ROLE_INPUT, "k", &a->k, b, TOKENS(1), h, INNER(a->d_head));
	add_view(l, ROLE_OUTPUT, "q_out", &a->q_out, b, TOKENS(1), h, INNER(a->d_head))->alias =
	        "q";
	add_view(l, ROLE_OUTPUT, "k_out", &a->k_out, b, TOKENS(1), h, INNER(a->d_head))->alias =
	        "k";
	keeps_fp32(l);
}

static double rotate_step_flops(const void *args)
{
	const struct rotate_step_args *a = args;

	return ROTATE_FLOPS * 2 * (double)(a->batch * a->n_heads * a->d_head);
}

DESCRIPTION(rotate_step, .is_step = true);

/* ---- attention ---- */

static struct operand *add_queries(struct operand_list *l, struct view *q, struct dimension b,
                                   struct dimension t, struct dimension h, struct dimension d)
{
	struct operand *o = add_view(l, ROLE_INPUT, "q", q, b, t, h, d);

	o->draw = DRAW_SCORES;
	o->side = SIDE_QUERIES;
	return o;
}

/* RAT+'s mask; in a test any, without dilated or without initial keys now and then. */
static void size_dilated(struct attention_args *a, const struct sizes *s)
{
	a->dilation = s->chunk > 0 ? s->chunk : DILATION;
	a->window = s->window >= 0 && s->any ? s->window : DILATED_WINDOW;
	a->initial = INITIAL;
	if (!s->any)
		return;
	a->dilation = s->bits >> 20 & 7 ? 1 + (int64_t)((s->bits >> 24) % 40) : 0;
	a->initial = s->bits >> 32 & 1 ? (int64_t)((s->bits >> 33) % 100) : 0;
}

static void size_attention(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct attention_args *a = args;

	a->batch = s->batch;
	a->n_heads = s->n_heads;
	a->q_heads = v->mask == MASK_CHUNK ? s->groups : s->n_heads;
	a->kv_heads = v->mask == MASK_CHUNK ? s->n_heads : s->kv_heads;
	a->d_head = s->d_head;
	a->seq_len = a->kv_len = s->seq_len;
	a->mask = v->mask;
	a->window = s->window;
	a->chunk = s->chunk;
	a->scale = key_scale(s->d_head);
	if (v->mask == MASK_CHUNK)
		a->kv_len = divide_up(s->seq_len, s->chunk);
	if (v->mask == MASK_FULL && s->any)
		a->kv_len = 1 + (int64_t)(s->bits % 300);
	if (v->mask == MASK_DILATED)
		size_dilated(a, s);
}

static void describe_attention(void *args, struct operand_list *l)
{
	struct attention_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), d = INNER(a->d_head), s = KEYS(a->kv_len);
	const struct dimension kv = KV_HEADS(a->kv_heads);
	struct operand *o;

	add_option(l, &a->mask);
	cut_kv_heads(l, &a->batch, &a->n_heads, &a->q_heads, &a->kv_heads);
	exponent(add_queries(l, &a->q, b, t, GROUPS(a->q_heads), d));
	exponent(add_view(l, ROLE_INPUT, "k", &a->k, b, s, kv, d))->side = SIDE_KEYS;
	add_view(l, ROLE_INPUT, "v", &a->v, b, s, kv, d);
	/* Chunk 0 sees no key: it needs the token's own. */
	o = add_floats(l, ROLE_INPUT, "own_score", &a->own_score, b, t, h);
	o->optional = a->mask != MASK_CHUNK;
	o->draw = DRAW_SCORES;
	if (a->own_score)
		add_view(l, ROLE_INPUT, "own_value", &a->own_value, b, t, h, d);
	optional(add_view(l, ROLE_INPUT, "gate", &a->gate, b, t, h, d),
	         a->mask == MASK_CHUNK || a->mask == MASK_DILATED);
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, t, h, d);
	add_view(l, ROLE_OUTPUT, "out_ungated", &a->out_ungated, b, t, h, d)->optional = true;
	add_floats(l, ROLE_OUTPUT, "lse", &a->lse, b, h, t)->optional = true;
}

/* sum over t < n of min(t + 1, limit). */
static double triangle(int64_t n, int64_t limit)
{
	const double rising = (double)(n < limit ? n : limit);

	return rising * (rising + 1) / 2 + ((double)n - rising) * (double)limit;
}

/* Each key is seen by itself and the queries after it, by all or by those within the window. */
static double dilated_pairs(const struct attention_args *a)
{
	double pairs = 0;

	for (int64_t s = 0; s < a->kv_len && s < a->seq_len; s++) {
		const int64_t later = a->seq_len - s;
		const bool kept = is_kept(a->dilation, a->initial, s);

		pairs += (double)(kept || later <= a->window ? later : a->window + 1);
	}
	return pairs;
}

/*
 * Keys visible to all queries of one sequence and head, the query's own token included where it has
 * a score of its own: RAT's query t sees t/chunk chunks and itself.
 */
static double visible_pairs(const struct attention_args *a)
{
	const int64_t t = a->seq_len, kv = a->kv_len;
	const double own = a->own_score ? (double)t : 0;
	int64_t whole, rest;

	switch (a->mask) {
	case MASK_CAUSAL:
		return own + triangle(t, kv);
	case MASK_WINDOW:
		return own + triangle(t, a->window < kv ? a->window + 1 : kv);
	case MASK_CHUNK:
		whole = t / a->chunk;
		rest = t % a->chunk;
		return own + (double)a->chunk * (double)whole * (double)(whole - 1) / 2 +
		       (double)rest * (double)whole;
	case MASK_DILATED:
		return own + dilated_pairs(a);
	case MASK_FULL:
		break;
	}
	return own + (double)t * (double)kv;
}

/* q k^T and p v: 4 d FLOPs for each visible pair. */
static double attention_flops(const void *args)
{
	const struct attention_args *a = args;

	return 4 * (double)a->d_head * (double)(a->batch * a->n_heads) * visible_pairs(a);
}

/* The benchmark tells its masks by --window and --chunk; the names of their rows are the same. */
static const struct operation_form attention_variants[] = {
        {"attention_forward", .mask = MASK_CAUSAL},
        {"attention_forward", .mask = MASK_WINDOW},
        {"attention_forward", .mask = MASK_CHUNK, .chunks = true},
        {"attention_forward", .mask = MASK_FULL},
        {"dilated_forward", .mask = MASK_DILATED},
        {0}};

DESCRIPTION(attention, .variants = attention_variants);

static void describe_attention_backward(void *args, struct operand_list *l)
{
	struct attention_backward_args *x = args;
	struct attention_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), d = INNER(a->d_head), s = KEYS(a->kv_len);
	const struct dimension kv = KV_HEADS(a->kv_heads);

	describe_attention(a, l);
	forward_ends(l, a->gate.data ? "lse|out_ungated" : "lse|out");
	l->sums_groups = true;
	add_view(l, ROLE_INPUT, "dout|do", &x->dout, b, t, h, d);
	/* dS = P (dP - delta), where one key may have all the weight; dP is a sum over d. */
	add_view(l, ROLE_OUTPUT, "dq", &x->dq, b, t, GROUPS(a->q_heads), d);
	add_view(l, ROLE_OUTPUT, "dk", &x->dk, b, s, kv, d);
	add_view(l, ROLE_OUTPUT, "dv", &x->dv, b, s, kv, d);
	if (a->gate.data)
		add_view(l, ROLE_OUTPUT, "dgate", &x->dgate, b, t, h, d);
	if (a->own_score) {
		add_floats(l, ROLE_OUTPUT, "down_score", &x->down_score, b, t, h);
		add_view(l, ROLE_OUTPUT, "down_value", &x->down_value, b, t, h, d);
	}
}

BACKWARD(attention, ATTENTION, 2.5);

static void size_attention_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct attention_step_args *a = args;

	a->batch = s->batch;
	a->n_heads = s->n_heads;
	a->kv_heads = s->kv_heads;
	/* Now and then many heads that read the same keys. */
	if (s->any && s->bits & 8)
		a->n_heads = s->kv_heads * (1 + (int64_t)((s->bits >> 4) % 40));
	a->d_head = s->d_head;
	a->rope = !s->any || s->bits & 3;
	a->rope_width = any_rope_width(s);
	a->scale = key_scale(s->d_head);
	a->window = s->any && s->bits & 4 ? s->window : -1;
	a->position_hint = s->seq_len - 1;
	a->kv_slots = a->window >= 0 && a->window < s->seq_len ? a->window + 1 : s->seq_len;
}

/* The position, where the host knows it; else the last one that the caches can hold. */
static int64_t step_position(int64_t hint, int64_t capacity)
{
	return hint >= 0 ? hint : capacity - 1;
}

static int64_t others_seen(const struct attention_step_args *a)
{
	const int64_t position = step_position(a->position_hint, a->kv_slots);

	return a->window >= 0 && a->window < position ? a->window : position;
}

/* The token's own key and value come from the projection; the others from the cache. */
static void describe_attention_step(void *args, struct operand_list *l)
{
	struct attention_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), h = HEADS(a->n_heads), d = INNER(a->d_head);
	const struct dimension kv = KV_HEADS(a->kv_heads);
	const double width = (double)(a->batch * a->kv_heads * a->d_head);
	struct view *const caches[] = {&a->k_cache, &a->v_cache};

	cut_kv_heads(l, &a->batch, &a->n_heads, NULL, &a->kv_heads);
	add_position(l, &a->position, step_position(a->position_hint, a->kv_slots) + 1);
	add_queries(l, &a->q, b, TOKENS(1), h, d);
	add_view(l, ROLE_INPUT, "k", &a->k, b, TOKENS(1), kv, d);
	add_view(l, ROLE_INPUT, "v", &a->v, b, TOKENS(1), kv, d);
	for (int i = 0; i < 2; i++) {
		struct operand *o = add_view(l, ROLE_STATE, i == 0 ? "k_cache" : "v_cache",
		                             caches[i], b, KEYS(a->kv_slots), kv, d);

		o->exponent = i == 0;
		o->exact = true;

		o->read = width * (double)others_seen(a);
		o->written = width;
		o->side = i == 0 ? SIDE_KEYS : SIDE_NONE;
	}
	/* The token's own key may be the one that the cache gets, rounded. */
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, TOKENS(1), h, d);
}

static double attention_step_flops(const void *args)
{
	const struct attention_step_args *a = args;

	return 4 * (double)(a->batch * a->n_heads * a->d_head) * (double)(others_seen(a) + 1);
}

static const struct operation_form attention_step_variants[] = {{.name = "attention_decode"}, {0}};

DESCRIPTION(attention_step, .is_step = true, .variants = attention_step_variants);
