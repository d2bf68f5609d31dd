/* Recurrences whose state is a vector or, per head, a matrix. */
#include "kernels/operation.h"

/* Chunk length that is counted where the kernel may pick its own. */
enum { DEFAULT_CHUNK = 64 };

/* ---- the vector ---- */

/* h = g h + (1-g) x is two multiply-adds, exp(gate) h + x one. */
static double vector_flops(enum gate_form form, double elements)
{
	return (form == GATE_SIGMOID ? 4 : 2) * elements;
}

/* Gate logits and their bias, or log decays, which have none. */
static void add_gate(struct operand_list *l, struct view *gate, const float **bias,
                     enum gate_form form, const struct dimension dims[4])
{
	struct operand *o =
	        add_view(l, ROLE_INPUT, "gate|g", gate, dims[0], dims[1], dims[2], dims[3]);

	o->exponent = true;
	o->decay = form == GATE_LOG_DECAY;
	o->draw = form == GATE_LOG_DECAY ? DRAW_LOG_DECAY : DRAW_NORMAL;
	o->scale = form == GATE_LOG_DECAY ? 1 : 2;
	if (form == GATE_LOG_DECAY)
		return;
	uniform(optional(add_vector(l, ROLE_PARAMETER, "gate_bias", bias, dims[3]), true), 5);
}

static void size_recurrence(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct recurrence_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->d_model = s->width;
	a->form = v->form;
}

static void describe_recurrence(void *args, struct operand_list *l)
{
	struct recurrence_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len), one = INNER(1);
	const struct dimension d = CHANNELS(a->d_model), dims[] = {b, t, one, d};

	add_option(l, &a->form);
	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->d_model);
	add_view(l, ROLE_INPUT, "x", &a->x, b, t, one, d);
	add_gate(l, &a->gate, &a->gate_bias, a->form, dims);
	optional(add_view(l, ROLE_INPUT, "z", &a->z, b, t, one, d), a->form == GATE_SIGMOID);
	add_floats(l, ROLE_INPUT, "h0", &a->h0, one, b, d)->optional = true;
	add_view(l, ROLE_OUTPUT, "h", &a->h, b, t, one, d)->optional = true;
	add_view(l, ROLE_OUTPUT, "out|o", &a->out, b, t, one, d);
	add_floats(l, ROLE_OUTPUT, "h_final|final_state", &a->h_final, one, b, d)->optional = true;
	keeps_fp32(l);
}

static double recurrence_flops(const void *args)
{
	const struct recurrence_args *a = args;

	return vector_flops(a->form, (double)(a->batch * a->seq_len * a->d_model));
}

/* HGRN's vector form, of which other libraries have kernels; the paper's, as its block runs it. */
static const struct operation_form recurrence_variants[] = {
        {"recurrence_forward", "hgrn", .form = GATE_LOG_DECAY},
        {"gated_recurrence_forward", .form = GATE_SIGMOID},
        {0}};

DESCRIPTION(recurrence, .variants = recurrence_variants);

static void describe_recurrence_backward(void *args, struct operand_list *l)
{
	struct recurrence_backward_args *x = args;
	struct recurrence_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len), one = INNER(1);
	const struct dimension d = CHANNELS(a->d_model);
	struct operand *o;

	describe_recurrence(a, l);
	forward_ends(l, a->z.data || a->h.data ? "h" : "out");
	add_view(l, ROLE_INPUT, "dout|do", &x->dout, b, t, one, d);
	optional(add_view(l, ROLE_INPUT, "dgate_base", &x->dgate_base, b, t, one, d), false);
	add_view(l, ROLE_OUTPUT, "dx", &x->dx, b, t, one, d);
	o = add_view(l, ROLE_OUTPUT, "dgate|dg", &x->dgate, b, t, one, d);
	o->alias = o->base = "dgate_base";
	if (a->z.data)
		add_view(l, ROLE_OUTPUT, "dz", &x->dz, b, t, one, d);
	if (a->gate_bias)
		add_vector(l, ROLE_GRADIENT, "dgate_bias", &x->dgate_bias, d);
	optional(add_floats(l, ROLE_OUTPUT, "dh0", &x->dh0, one, b, d), false);
}

BACKWARD(recurrence, RECURRENCE, 2.5);

static void size_recurrence_step(void *args, const struct sizes *s, const struct operation_form *v)
{
	struct recurrence_step_args *a = args;

	a->batch = s->batch;
	a->d_model = s->width;
	a->form = v->form;
}

static void describe_recurrence_step(void *args, struct operand_list *l)
{
	struct recurrence_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), one = INNER(1), d = CHANNELS(a->d_model);
	const struct dimension dims[] = {b, one, one, d};

	add_option(l, &a->form);
	cut_along(l, AXIS_SEQUENCE, &a->batch);
	cut_along(l, AXIS_CHANNEL, &a->d_model);
	add_view(l, ROLE_INPUT, "x", &a->x, b, one, one, d);
	add_gate(l, &a->gate, &a->gate_bias, a->form, dims);
	optional(add_view(l, ROLE_INPUT, "z", &a->z, b, one, one, d), a->form == GATE_SIGMOID);
	add_floats(l, ROLE_STATE, "h", &a->h, one, b, d);
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, one, one, d);
	keeps_fp32(l);
}

static double recurrence_step_flops(const void *args)
{
	const struct recurrence_step_args *a = args;

	return vector_flops(a->form, (double)(a->batch * a->d_model));
}

static const struct operation_form recurrence_step_variants[] = {
        {"recurrence_step", .form = GATE_SIGMOID}, {"log_decay_step", .form = GATE_LOG_DECAY}, {0}};

DESCRIPTION(recurrence_step, .is_step = true, .variants = recurrence_step_variants);

/* ---- the matrix ---- */

static void size_matrix_recurrence(void *args, const struct sizes *s,
                                   const struct operation_form *v)
{
	struct matrix_recurrence_args *a = args;

	a->batch = s->batch;
	a->seq_len = s->seq_len;
	a->n_heads = s->n_heads;
	a->d_k = s->d_k;
	a->d_v = s->d_v;
	a->decay = v->decay;
	a->rule = v->rule;
	/* The benchmark's 0 leaves the chunk to the kernel. */
	a->chunk = s->any && s->bits >> 40 & 1 ? 0 : s->chunk;
	a->scale = key_scale(s->d_k);
}

/* Where a problem can be cut: a head's values are columns of its state, each apart from the others.
 */
static void cut_matrix(struct operand_list *l, int64_t *batch, int64_t *n_heads, int64_t *d_v,
                       int64_t *first_head)
{
	cut_along(l, AXIS_SEQUENCE, batch);
	cut_along(l, AXIS_HEAD, n_heads);
	cut_along(l, AXIS_CHANNEL, d_v);
	l->first_head = first_head;
}

/* Elements of log_decay for one token and head. */
static int64_t decay_width(enum decay decay, int64_t d_k)
{
	return decay == DECAY_DIAGONAL ? d_k : 1;
}

static bool has_decay(enum decay decay)
{
	return decay == DECAY_DIAGONAL || decay == DECAY_SCALAR;
}

/* RetNet's. */
static double log_decay_of_head(int64_t head)
{
	return log1p(-exp2(-5 - (double)head));
}

/* The inputs of both forms of the arguments, of which the step's has one token and no chunk. */
struct matrix_inputs {
	int64_t n_heads, d_k, d_v;
	enum decay decay;
	enum rule rule;
	struct view *q, *k, *v, *log_decay, *beta;
	const float **bonus;
};

static void add_matrix_inputs(struct operand_list *l, const struct matrix_inputs *a,
                              struct dimension b, struct dimension t)
{
	const struct dimension h = HEADS(a->n_heads), k = INNER(a->d_k), v = CHANNELS(a->d_v);
	const bool may_share = a->decay == DECAY_SCALAR && a->rule == RULE_PLAIN;
	struct operand *o;

	o = add_view(l, ROLE_INPUT, "q", a->q, b, t, h, k);
	o->may_share = may_share;
	o->by_element = true;
	o = add_view(l, ROLE_INPUT, "k", a->k, b, t, h, k);
	o->may_share = may_share;
	o->by_element = true;
	/* Long keys would let the states of a delta rule grow. */
	o->draw = a->rule == RULE_DELTA ? DRAW_UNIT : DRAW_NORMAL;
	add_view(l, ROLE_INPUT, "v", a->v, b, t, h, v);
	if (has_decay(a->decay))
		log_of_decay(add_view(l, ROLE_INPUT, "log_decay|g|gk|w", a->log_decay, b, t, h,
		                      INNER(decay_width(a->decay, a->d_k))))
		        ->draw = DRAW_LOG_DECAY;
	if (a->rule == RULE_BONUS) {
		uniform(add_floats(l, ROLE_PARAMETER, "bonus|u", a->bonus, INNER(1), h, k), 2);
	}
	if (a->rule == RULE_DELTA)
		add_view(l, ROLE_INPUT, "beta", a->beta, b, t, h, INNER(1))->draw = DRAW_UNIFORM;
}

static void describe_matrix_recurrence(void *args, struct operand_list *l)
{
	struct matrix_recurrence_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), k = INNER(a->d_k), v = CHANNELS(a->d_v);

	add_option(l, &a->decay);
	add_option(l, &a->rule);
	cut_matrix(l, &a->batch, &a->n_heads, &a->d_v, &a->first_head);
	l->log_decay_of_head = a->decay == DECAY_CONSTANT ? log_decay_of_head : NULL;
	add_matrix_inputs(l,
	                  &(struct matrix_inputs){a->n_heads, a->d_k, a->d_v, a->decay, a->rule,
	                                          &a->q, &a->k, &a->v, &a->log_decay, &a->beta,
	                                          &a->bonus},
	                  b, t);
	add_array(l, ROLE_INPUT, ELEMENT_FP32, "h0", &a->h0, b, h, k, v)->optional = true;
	add_view(l, ROLE_OUTPUT, "out|o", &a->out, b, t, h, v);
	add_array(l, ROLE_OUTPUT, ELEMENT_FP32, "final_state", &a->final_state, b, h, k, v)
	        ->optional = true;
}

/*
 * FLOPs of one token and head of the plain recurrence: the rank-one update and the read, 2 d_k d_v
 * each; the delta rule also reads k S before; the bonus adds (q.(u*k)) v to the output.
 */
static double plain_flops(enum rule rule, double d_k, double d_v)
{
	return (rule == RULE_DELTA ? 6 : 4) * d_k * d_v +
	       (rule == RULE_BONUS ? 2 * (d_k + d_v) : 0);
}

/*
 * In chunks of n, to 4 d_k d_v between chunks come the n/2 pairs that a token sees within its own
 * (the bonus among them): 2 n (d_k + d_v) / 2. The delta rule is counted as its plain recurrence:
 * what a chunkwise form of it adds (a triangular solve) is the kernel's choice.
 */
static double matrix_recurrence_flops(const void *args)
{
	const struct matrix_recurrence_args *a = args;
	const double d_k = (double)a->d_k, d_v = (double)a->d_v;
	const double tokens = (double)(a->batch * a->seq_len * a->n_heads);
	const int64_t chunk = a->chunk == 0 ? DEFAULT_CHUNK : a->chunk;
	const int64_t n = chunk < a->seq_len ? chunk : a->seq_len;

	if (chunk == 1 || a->rule == RULE_DELTA)
		return tokens * plain_flops(a->rule, d_k, d_v);
	return tokens * ((double)n * (d_k + d_v) + 4 * d_k * d_v);
}

static const struct operation_form matrix_recurrence_variants[] = {
        {"gla_forward", "gla|gla_strong_decay", .decay = DECAY_DIAGONAL, .half_keys = true},
        {"rwkv6_forward", "rwkv6", .decay = DECAY_DIAGONAL, .rule = RULE_BONUS},
        {"scalar_decay_forward", "scalar_decay", .decay = DECAY_SCALAR},
        {"retention_forward", "retention", .decay = DECAY_CONSTANT},
        {"linear_attention_forward", "linear_attention", .decay = DECAY_NONE},
        {"gated_delta_forward", "gated_delta_rule", .decay = DECAY_SCALAR, .rule = RULE_DELTA},
        {"delta_forward", "delta_rule", .decay = DECAY_NONE, .rule = RULE_DELTA},
        {"kda_forward", "kda", .decay = DECAY_DIAGONAL, .rule = RULE_DELTA},
        {0}};

DESCRIPTION(matrix_recurrence, .variants = matrix_recurrence_variants);

static void describe_matrix_recurrence_backward(void *args, struct operand_list *l)
{
	struct matrix_recurrence_backward_args *x = args;
	struct matrix_recurrence_args *a = &x->forward;
	const struct dimension b = SEQUENCES(a->batch), t = TOKENS(a->seq_len);
	const struct dimension h = HEADS(a->n_heads), k = INNER(a->d_k), v = CHANNELS(a->d_v);

	describe_matrix_recurrence(a, l);
	forward_ends(l, "");
	/* What belongs to keys sums over the columns of the state. */
	l->apart = ALONG(AXIS_SEQUENCE) | ALONG(AXIS_HEAD);
	add_view(l, ROLE_INPUT, "dout|do", &x->dout, b, t, h, v);
	add_view(l, ROLE_OUTPUT, "dq", &x->dq, b, t, h, k);
	add_view(l, ROLE_OUTPUT, "dk", &x->dk, b, t, h, k);
	add_view(l, ROLE_OUTPUT, "dv", &x->dv, b, t, h, v);
	if (has_decay(a->decay))
		add_view(l, ROLE_OUTPUT, "dlog_decay|dg|dgk|dw", &x->dlog_decay, b, t, h,
		         INNER(decay_width(a->decay, a->d_k)))
		        ->summed = true;
	if (a->rule == RULE_DELTA)
		add_view(l, ROLE_OUTPUT, "dbeta", &x->dbeta, b, t, h, INNER(1));
	if (a->rule == RULE_BONUS)
		add_floats(l, ROLE_GRADIENT, "dbonus|du", &x->dbonus, INNER(1), h, k);
	add_array(l, ROLE_OUTPUT, ELEMENT_FP32, "dh0", &x->dh0, b, h, k, v)->optional = true;
}

BACKWARD(matrix_recurrence, MATRIX_RECURRENCE, 2.5);

static void size_matrix_recurrence_step(void *args, const struct sizes *s,
                                        const struct operation_form *v)
{
	struct matrix_recurrence_step_args *a = args;

	a->batch = s->batch;
	a->n_heads = s->n_heads;
	a->d_k = s->d_k;
	a->d_v = s->d_v;
	a->decay = v->decay;
	a->rule = v->rule;
	a->scale = key_scale(s->d_k);
}

static void describe_matrix_recurrence_step(void *args, struct operand_list *l)
{
	struct matrix_recurrence_step_args *a = args;
	const struct dimension b = SEQUENCES(a->batch), h = HEADS(a->n_heads), one = TOKENS(1);
	const struct dimension k = INNER(a->d_k), v = CHANNELS(a->d_v);

	add_option(l, &a->decay);
	add_option(l, &a->rule);
	cut_matrix(l, &a->batch, &a->n_heads, &a->d_v, &a->first_head);
	add_matrix_inputs(l,
	                  &(struct matrix_inputs){a->n_heads, a->d_k, a->d_v, a->decay, a->rule,
	                                          &a->q, &a->k, &a->v, &a->log_decay, &a->beta,
	                                          &a->bonus},
	                  b, one);
	add_array(l, ROLE_STATE, ELEMENT_FP32, "state", &a->state, b, h, k, v);
	add_view(l, ROLE_OUTPUT, "out", &a->out, b, one, h, v);
	keeps_fp32(l);
}

static double matrix_recurrence_step_flops(const void *args)
{
	const struct matrix_recurrence_step_args *a = args;

	return (double)(a->batch * a->n_heads) *
	       plain_flops(a->rule, (double)a->d_k, (double)a->d_v);
}

static const struct operation_form matrix_step_variants[] = {
        {"gla_step", .decay = DECAY_DIAGONAL, .half_keys = true},
        {"rwkv6_step", .decay = DECAY_DIAGONAL, .rule = RULE_BONUS},
        {"scalar_decay_step", .decay = DECAY_SCALAR},
        {"retention_step", .decay = DECAY_CONSTANT},
        {"linear_attention_step", .decay = DECAY_NONE},
        {"gated_delta_step", .decay = DECAY_SCALAR, .rule = RULE_DELTA},
        {"delta_step", .decay = DECAY_NONE, .rule = RULE_DELTA},
        {"kda_step", .decay = DECAY_DIAGONAL, .rule = RULE_DELTA},
        {0}};

DESCRIPTION(matrix_recurrence_step, .is_step = true, .variants = matrix_step_variants);
