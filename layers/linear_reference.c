/* The linear-attention family in fp64: what verification compares a run with. */
#include <math.h>

#include "kernels/reference/reference.h"
#include "layers/linear_family.h"
#include "layers/mixing.h"

/* InProj's columns apart, what is made of them, and the recurrence's output; or the gradients of
 * all these. */
struct tensors {
	double *memory;
	double *column[N_FAMILY_COLUMNS];
	double *q, *k, *v;     /* what the recurrence reads; a column, or their own */
	double *x;             /* v behind the convolution, before its time step */
	double *log_decay, *o; /* o [n, D] */
};

/* What a run starts from. */
struct problem {
	const struct layer_config *config;
	const struct family_member *member;
	const double *const *param;
	int64_t n_seq, seq_len, position;
	const double *state; /* of a step, before it; or NULL */
};

static int64_t tokens_of(const struct problem *p)
{
	return p->n_seq * p->seq_len;
}

/* `count` doubles behind those taken before; without memory this only counts. */
static double *cut(double *memory, int64_t *taken, int64_t count)
{
	double *start = memory ? memory + *taken : NULL;

	*taken += count;
	return start;
}

static int64_t lay_out(const struct problem *p, struct tensors *t)
{
	const struct layer_config *config = p->config;
	int64_t n = tokens_of(p), d = family_value_width(config), taken = 0;
	int64_t keys = n * config->n_heads * family_key_width(config);
	bool conv = p->member->input == INPUT_CONVOLVED, vector = p->member->vector_state;
	bool forget = p->member->input == INPUT_FORGET_GATE;

	for (enum family_column i = 0; i < N_FAMILY_COLUMNS; i++)
		t->column[i] = cut(t->memory, &taken, n * family_column_width(config, i));
	t->q = t->column[COLUMN_Q];
	t->k = t->column[COLUMN_K];
	t->v = t->column[COLUMN_V];
	if (conv || (forget && !vector)) {
		t->q = cut(t->memory, &taken, keys);
		t->k = cut(t->memory, &taken, keys);
	}
	if (conv || vector)
		t->v = cut(t->memory, &taken, n * d);
	t->x = cut(t->memory, &taken, conv ? n * d : 0);
	t->log_decay = cut(t->memory, &taken, n * family_decay_width(config));
	t->o = cut(t->memory, &taken, n * d);
	return taken;
}

static enum status take_tensors(const struct problem *p, struct tensors *t)
{
	*t = (struct tensors){0};
	enum status status = reference_take(lay_out(p, t), &t->memory);

	if (status == STATUS_OK)
		lay_out(p, t);
	return status;
}

/* ---- between InProj and the recurrence ---- */

static struct reference_conv conv_of(const struct problem *p, const struct tensors *t,
                                     enum family_column block)
{
	int64_t first = family_first_column(p->config, block);

	return (struct reference_conv){
	        .batch = p->n_seq,
	        .seq_len = p->seq_len,
	        .channels = family_column_width(p->config, block),
	        .n_readers = block == COLUMN_V ? 1 : p->config->n_heads,
	        .x = t->column[block],
	        .weight = p->param[PARAM_CONV_WEIGHT] + first * CONV_WIDTH,
	        .bias = p->param[PARAM_CONV_BIAS] + first,
	};
}

/* One block of columns; a step's history (all blocks', as in the layer's state) moves on in place.
 */
static enum status convolve(const struct problem *p, const struct tensors *t,
                            enum family_column block, double *out, double *history)
{
	struct reference_conv c = conv_of(p, t, block);
	int64_t n = p->n_seq * CONV_HISTORY, width = family_conv_width(p->config);
	int64_t first = family_first_column(p->config, block);
	double *before = NULL;
	enum status status = STATUS_OK;

	if (!history) {
		reference_short_conv(&c, out, NULL);
		return STATUS_OK;
	}
	status = reference_take(2 * n * c.channels, &before);
	if (status != STATUS_OK)
		return status;
	reference_get_columns(n, width, first, c.channels, history, before);
	c.history = before;
	reference_short_conv(&c, out, before + n * c.channels);
	reference_set_columns(n, width, first, c.channels, before + n * c.channels, history);
	reference_release(before);
	return STATUS_OK;
}

static enum status prepare_convolved(const struct problem *p, const struct tensors *t,
                                     double *history)
{
	int64_t h = p->config->n_heads;
	enum status status = convolve(p, t, COLUMN_Q, t->q, history);

	if (status == STATUS_OK)
		status = convolve(p, t, COLUMN_K, t->k, history);
	if (status == STATUS_OK)
		status = convolve(p, t, COLUMN_V, t->x, history);
	if (status == STATUS_OK)
		reference_time_step(tokens_of(p), h, family_value_width(p->config) / h,
		                    t->column[COLUMN_DECAY], p->param[PARAM_DT_BIAS],
		                    p->param[PARAM_LOG_RATE], t->x, t->log_decay, t->v);
	return status;
}

/* history: the convolution's state of a step, or NULL. */
static enum status prepare(const struct problem *p, const double *proj, const struct tensors *t,
                           double *history)
{
	const struct layer_config *config = p->config;
	int64_t n = tokens_of(p), d_k = family_key_width(config), h = config->n_heads;
	bool vector = p->member->vector_state;

	for (enum family_column i = 0; i < N_FAMILY_COLUMNS; i++)
		reference_get_columns(n, family_proj_width(config), family_first_column(config, i),
		                      family_column_width(config, i), proj, t->column[i]);
	switch (p->member->input) {
	case INPUT_ROTATED:
		if (config->rope) {
			reference_rotate(p->n_seq, p->seq_len, h, d_k, p->position, 1, t->q, t->q);
			reference_rotate(p->n_seq, p->seq_len, h, d_k, p->position, 1, t->k, t->k);
		}
		return STATUS_OK;
	case INPUT_DECAY_GATE:
		reference_decay_gate(n, GATE_RANK, family_decay_width(config), GATE_NORMALIZER,
		                     t->column[COLUMN_DECAY], p->param[PARAM_GK_WEIGHT],
		                     p->param[PARAM_GK_BIAS], t->log_decay);
		return STATUS_OK;
	case INPUT_FORGET_GATE:
		reference_forget_gate(n, config->d_model, t->column[COLUMN_DECAY],
		                      p->param[PARAM_BOUND],
		                      t->column[vector ? COLUMN_V : COLUMN_Q], t->log_decay,
		                      vector ? NULL : t->k, vector ? t->v : t->q);
		return STATUS_OK;
	case INPUT_CONVOLVED:
		return prepare_convolved(p, t, history);
	default:
		return STATUS_OK;
	}
}

static void convolved_backward(const struct problem *p, const struct tensors *t,
                               const struct tensors *g, double *const *dparam)
{
	static const enum family_column blocks[] = {COLUMN_Q, COLUMN_K, COLUMN_V};
	const double *const dout[] = {g->q, g->k, g->x};
	int64_t h = p->config->n_heads, d = family_value_width(p->config);

	/* dx of the time step goes where v was, which is no longer needed; g->x holds the skip's.
	 */
	reference_time_step_backward(tokens_of(p), h, d / h, t->column[COLUMN_DECAY],
	                             p->param[PARAM_DT_BIAS], p->param[PARAM_LOG_RATE], t->x,
	                             g->log_decay, g->v, g->column[COLUMN_DECAY],
	                             dparam[PARAM_DT_BIAS], dparam[PARAM_LOG_RATE], t->v);
	mixing_add(tokens_of(p) * d, t->v, g->x);
	for (int i = 0; i < 3; i++) {
		const struct reference_conv c = conv_of(p, t, blocks[i]);
		int64_t first = family_first_column(p->config, blocks[i]);

		reference_short_conv_backward(&c, dout[i], g->column[blocks[i]],
		                              dparam[PARAM_CONV_WEIGHT] + first * CONV_WIDTH,
		                              dparam[PARAM_CONV_BIAS] + first);
	}
}

static enum status prepare_backward(const struct problem *p, const struct tensors *t,
                                    const struct tensors *g, double *const *dparam)
{
	const struct layer_config *config = p->config;
	int64_t n = tokens_of(p), d_k = family_key_width(config), h = config->n_heads;
	bool vector = p->member->vector_state;

	switch (p->member->input) {
	case INPUT_ROTATED:
		if (config->rope) {
			reference_rotate_backward(p->n_seq, p->seq_len, h, d_k, 0, 1, g->q, g->q);
			reference_rotate_backward(p->n_seq, p->seq_len, h, d_k, 0, 1, g->k, g->k);
		}
		return STATUS_OK;
	case INPUT_DECAY_GATE:
		return reference_decay_gate_backward(
		        n, GATE_RANK, family_decay_width(config), GATE_NORMALIZER,
		        t->column[COLUMN_DECAY], p->param[PARAM_GK_WEIGHT], p->param[PARAM_GK_BIAS],
		        g->log_decay, g->column[COLUMN_DECAY], dparam[PARAM_GK_WEIGHT],
		        dparam[PARAM_GK_BIAS]);
	case INPUT_FORGET_GATE:
		reference_forget_gate_backward(
		        n, config->d_model, t->column[COLUMN_DECAY], p->param[PARAM_BOUND],
		        t->column[vector ? COLUMN_V : COLUMN_Q], g->log_decay, vector ? NULL : g->k,
		        vector ? g->v : g->q, g->column[COLUMN_DECAY], dparam[PARAM_BOUND],
		        g->column[vector ? COLUMN_V : COLUMN_Q]);
		return STATUS_OK;
	case INPUT_CONVOLVED:
		convolved_backward(p, t, g, dparam);
		return STATUS_OK;
	default:
		return STATUS_OK;
	}
}

/* ---- the recurrence ---- */

static struct reference_recurrence vector_of(const struct problem *p, const struct tensors *t)
{
	return (struct reference_recurrence){
	        .batch = p->n_seq,
	        .seq_len = p->seq_len,
	        .d_model = family_value_width(p->config),
	        .form = GATE_LOG_DECAY,
	        .x = t->v,
	        .gate = t->log_decay,
	        .h0 = p->state,
	};
}

static struct reference_matrix matrix_of(const struct problem *p, const struct tensors *t)
{
	int64_t d_k = family_key_width(p->config);
	bool data_dependent = family_decay_width(p->config) > 0;

	return (struct reference_matrix){
	        .batch = p->n_seq,
	        .seq_len = p->seq_len,
	        .n_heads = p->config->n_heads,
	        .d_k = d_k,
	        .d_v = family_value_width(p->config) / p->config->n_heads,
	        .decay = p->member->decay,
	        .rule = RULE_PLAIN,
	        .scale = p->member->unscaled ? 1 : 1 / sqrt((double)d_k),
	        .q = t->q,
	        .k = t->k,
	        .v = t->v,
	        .log_decay = data_dependent ? t->log_decay : NULL,
	        .h0 = p->state,
	};
}

/* final_state: of a step, or NULL. */
static enum status recur(const struct problem *p, const struct tensors *t, double *final_state)
{
	if (p->member->vector_state) {
		const struct reference_recurrence r = vector_of(p, t);

		reference_recurrence_forward(&r, t->o, NULL, final_state);
		return STATUS_OK;
	}
	const struct reference_matrix m = matrix_of(p, t);

	return reference_matrix_forward(&m, t->o, final_state);
}

static enum status recur_backward(const struct problem *p, const struct tensors *t,
                                  const struct tensors *g)
{
	if (p->member->vector_state) {
		const struct reference_recurrence r = vector_of(p, t);
		const struct reference_recurrence_grads grads = {.dx = g->v, .dgate = g->log_decay};

		return reference_recurrence_backward(&r, g->o, &grads);
	}
	const struct reference_matrix m = matrix_of(p, t);
	const struct reference_matrix_grads grads = {
	        .dq = g->q, .dk = g->k, .dv = g->v, .dlog_decay = g->log_decay};

	return reference_matrix_backward(&m, g->o, &grads);
}

/* ---- between the recurrence and OutProj ---- */

static struct reference_gate_norm gate_norm_of(const struct problem *p, const struct tensors *t)
{
	bool gated = p->member->output == OUTPUT_GATE_NORM;

	return (struct reference_gate_norm){
	        .n = tokens_of(p),
	        .n_heads = p->config->n_heads,
	        .d_head = family_value_width(p->config) / p->config->n_heads,
	        .groups = family_norm_groups(p->config),
	        .eps = family_norm_eps,
	        .x = t->o,
	        .skip = gated ? t->x : NULL,
	        .skip_weight = p->param[PARAM_SKIP],
	        .gate = gated ? t->column[COLUMN_GATE] : NULL,
	        .weight = p->param[PARAM_OUT_NORM],
	};
}

/* All of mix [n, D], in the place of v, which is no longer needed. */
static enum status finish(const struct problem *p, const struct tensors *t)
{
	int64_t groups = family_norm_groups(p->config);

	if (p->member->output == OUTPUT_NORM_GATE) {
		reference_norm_gate(tokens_of(p), groups, family_value_width(p->config) / groups,
		                    family_norm_eps, t->o, p->param[PARAM_OUT_NORM],
		                    t->column[COLUMN_GATE], t->v, NULL);
		return STATUS_OK;
	}
	const struct reference_gate_norm g = gate_norm_of(p, t);

	return reference_gate_norm(&g, t->v, NULL);
}

static enum status finish_backward(const struct problem *p, const struct tensors *t,
                                   const double *dmix, const struct tensors *g,
                                   double *const *dparam)
{
	int64_t groups = family_norm_groups(p->config);

	if (p->member->output == OUTPUT_NORM_GATE)
		return reference_norm_gate_backward(
		        tokens_of(p), groups, family_value_width(p->config) / groups,
		        family_norm_eps, t->o, p->param[PARAM_OUT_NORM], t->column[COLUMN_GATE],
		        dmix, g->o, g->column[COLUMN_GATE], dparam[PARAM_OUT_NORM]);
	const struct reference_gate_norm forward = gate_norm_of(p, t);
	const struct reference_gate_norm_grads grads = {
	        .dx = g->o,
	        .dskip = g->x,
	        .dskip_weight = dparam[PARAM_SKIP],
	        .dgate = g->column[COLUMN_GATE],
	        .dweight = dparam[PARAM_OUT_NORM],
	};

	return reference_gate_norm_backward(&forward, dmix, &grads);
}

/* ---- the three references ---- */

enum status family_reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix)
{
	const struct problem p = {config, family_member(config), param, n_seq, seq_len, 0, NULL};
	struct tensors t;
	enum status status = take_tensors(&p, &t);

	if (status != STATUS_OK)
		return status;
	status = prepare(&p, proj, &t, NULL);
	if (status == STATUS_OK)
		status = recur(&p, &t, NULL);
	if (status == STATUS_OK)
		status = finish(&p, &t);
	if (status == STATUS_OK)
		reference_get_rows(family_value_width(config), n_rows, rows, t.v, mix);
	reference_release(t.memory);
	return status;
}

enum status family_reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix)
{
	struct tensor_spec specs[MAX_TENSORS];
	struct layer_shape one = *shape;
	struct problem p = {config, family_member(config), param, n_seq, 1, position, NULL};
	struct tensors t;
	double *before = NULL;

	one.batch = n_seq;
	family_state(config, &one, specs);
	int64_t count = tensor_count(&specs[STATE_S]);
	enum status status = take_tensors(&p, &t);
	if (status == STATUS_OK)
		status = reference_take(count, &before);
	if (status == STATUS_OK)
		status = prepare(&p, proj, &t,
		                 p.member->input == INPUT_CONVOLVED ? state[STATE_CONV] : NULL);
	if (status == STATUS_OK) {
		mixing_copy(count, state[STATE_S], before);
		p.state = before;
		status = recur(&p, &t, state[STATE_S]);
	}
	if (status == STATUS_OK)
		status = finish(&p, &t);
	if (status == STATUS_OK)
		mixing_copy(n_seq * family_value_width(config), t.v, mix);
	reference_release(before);
	reference_release(t.memory);
	return status;
}

/* Forward, then the three parts backwards; dparam is overwritten. */
static enum status backward_through(const struct problem *p, const double *proj, const double *dmix,
                                    const struct tensors *t, const struct tensors *g,
                                    double *const *dparam)
{
	enum status status = prepare(p, proj, t, NULL);

	if (status == STATUS_OK)
		status = recur(p, t, NULL);
	if (status == STATUS_OK)
		status = finish_backward(p, t, dmix, g, dparam);
	if (status == STATUS_OK)
		status = recur_backward(p, t, g);
	if (status == STATUS_OK)
		status = prepare_backward(p, t, g, dparam);
	return status;
}

enum status family_reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad)
{
	const struct problem p = {config, family_member(config), param, batch, seq_len, 0, NULL};
	struct tensor_spec specs[MAX_TENSORS];
	struct tensors t, g = {0};
	double *dparam[N_FAMILY_PARAMS] = {0};
	enum status status = take_tensors(&p, &t);

	family_parameters(config, specs);
	if (status == STATUS_OK)
		status = take_tensors(&p, &g);
	for (int i = PARAM_OTHER; i < N_FAMILY_PARAMS && status == STATUS_OK; i++)
		status = reference_take(tensor_count(&specs[i]), &dparam[i]);
	if (status == STATUS_OK)
		status = backward_through(&p, proj, dmix, &t, &g, dparam);
	for (enum family_column i = 0; i < N_FAMILY_COLUMNS && status == STATUS_OK; i++)
		reference_set_columns(batch * seq_len, family_proj_width(config),
		                      family_first_column(config, i),
		                      family_column_width(config, i), g.column[i], dproj);
	for (int i = PARAM_OTHER; i < N_FAMILY_PARAMS; i++) {
		if (status == STATUS_OK)
			mixing_add(tensor_count(&specs[i]), dparam[i], grad[i]);
		reference_release(dparam[i]);
	}
	reference_release(g.memory);
	reference_release(t.memory);
	return status;
}
