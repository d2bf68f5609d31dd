/* Every member of the linear-attention family: its tensors, and its three passes. */
#include "layers/linear_family.h"

#include <math.h>

#include "layers/mixing.h"

enum {
	PARAM_OUT_NORM = PARAM_OTHER,
	PARAM_GK_WEIGHT,   /* a decay of low rank */
	PARAM_GK_BIAS,     /* INPUT_DECAY_GATE */
	PARAM_BOUND,       /* INPUT_FORGET_GATE: the gates' lower bounds, logits */
	PARAM_CONV_WEIGHT, /* INPUT_CONVOLVED, INPUT_DELTA */
	PARAM_CONV_BIAS,   /* INPUT_CONVOLVED */
	PARAM_DT_BIAS,     /* time steps */
	PARAM_LOG_RATE,
	PARAM_SKIP,     /* OUTPUT_GATE_NORM */
	PARAM_G_WEIGHT, /* OUTPUT_NORM_SIGMOID */
	PARAM_G_BIAS,
	N_FAMILY_PARAMS
};

/* STATE_CONV only behind a convolution. */
enum { STATE_S, STATE_CONV, N_FAMILY_STATES };

enum { GATE_RANK = 16, GATE_NORMALIZER = 16 };
static const float family_norm_eps = 1e-5f, length_eps = 1e-6f;

static const struct family_member *family_member(const struct layer_config *config)
{
	return config->class->family;
}

/* Saved: what the recurrence reads where that is not InProj's output, and what it writes. */
enum {
	SAVED_CONV = SAVED_OTHER, /* q, k, x behind the convolution */
	SAVED_KEY,                /* k of the forget gate, or rotated; q and k of length 1 */
	SAVED_INPUT,              /* v of the time steps or of HGRN; q of HGRN-2, or rotated */
	SAVED_LOG_DECAY,
	SAVED_OUT,
	SAVED_OUT_RSTD,
	SAVED_BETA,
	SAVED_INVERSE, /* 1 / the lengths of q and k */
	SAVED_GATE,    /* logits of the low-rank gate */
	N_SAVED
};
/* Gradients of those, and of what InProj's columns cannot hold: one dq and dk per head. Those of q
 * and k of length 1 are both in the first. */
enum {
	SCRATCH_DOUT = SCRATCH_OTHER,
	SCRATCH_DLOG_DECAY,
	SCRATCH_DLOGIT,
	SCRATCH_DQ,
	SCRATCH_DK,
	SCRATCH_DV,
	SCRATCH_DX, /* behind the convolution: of x, or of q, k, v */
	SCRATCH_DSKIP,
	SCRATCH_DBETA,
	SCRATCH_DGATE,
	N_SCRATCH
};

/* ---- widths ---- */

int64_t family_value_width(const struct layer_config *config)
{
	return family_member(config)->value_factor * config->d_model;
}

/* Of one head. */
static int64_t key_width(const struct layer_config *config)
{
	const struct family_member *m = family_member(config);

	return m->shared_keys ? m->shared_keys : config->d_model / m->key_part / config->n_heads;
}

/* Columns of q, and of k. */
static int64_t key_columns(const struct layer_config *config)
{
	const struct family_member *m = family_member(config);

	return m->shared_keys ? m->shared_keys : config->d_model / m->key_part;
}

/* Whether a short convolution runs over q, k and v. */
static bool convolves(const struct layer_config *config)
{
	const enum family_input input = family_member(config)->input;

	return input == INPUT_CONVOLVED || input == INPUT_DELTA;
}

static bool is_delta(const struct layer_config *config)
{
	return family_member(config)->input == INPUT_DELTA;
}

/* Whether the decays come from a low-rank gate. */
static bool has_low_rank_decay(const struct layer_config *config)
{
	const struct family_member *m = family_member(config);

	return m->input == INPUT_DECAY_GATE ||
	       (m->input == INPUT_DELTA && m->decay == DECAY_DIAGONAL);
}

static bool has_low_rank_gate(const struct layer_config *config)
{
	return family_member(config)->output == OUTPUT_NORM_SIGMOID;
}

/* GLA's rank, or one head of values. */
static int64_t gate_rank(const struct layer_config *config)
{
	return is_delta(config) ? family_value_width(config) / config->n_heads : GATE_RANK;
}

/* Elements of log_decay per token. */
static int64_t decay_width(const struct layer_config *config)
{
	if (has_low_rank_decay(config))
		return key_columns(config);
	switch (family_member(config)->input) {
	case INPUT_FORGET_GATE:
		return config->d_model;
	case INPUT_CONVOLVED:
		return config->n_heads;
	case INPUT_DELTA:
		return family_member(config)->decay == DECAY_SCALAR ? config->n_heads : 0;
	default:
		return 0;
	}
}

/* Columns of what softplus makes a time step, which the rates multiply; 0: there are none. */
static int64_t time_step_width(const struct layer_config *config)
{
	return convolves(config) ? decay_width(config) : 0;
}

static int64_t column_width(const struct layer_config *config, enum family_column column)
{
	const struct family_member *m = family_member(config);
	bool derives_keys = m->input == INPUT_FORGET_GATE;

	switch (column) {
	case COLUMN_Q:
		return m->vector_state ? 0 : key_columns(config);
	case COLUMN_K:
		return m->vector_state || derives_keys ? 0 : key_columns(config);
	case COLUMN_DECAY:
		return has_low_rank_decay(config) ? gate_rank(config) : decay_width(config);
	case COLUMN_BETA:
		return is_delta(config) ? config->n_heads : 0;
	case COLUMN_GATE:
		return m->output == OUTPUT_NORM    ? 0
		       : has_low_rank_gate(config) ? gate_rank(config)
		                                   : family_value_width(config);
	default:
		return family_value_width(config);
	}
}

static int64_t first_column(const struct layer_config *config, enum family_column column)
{
	int64_t first = 0;

	for (enum family_column i = 0; i < column; i++)
		first += column_width(config, i);
	return first;
}

int64_t family_proj_width(const struct layer_config *config)
{
	return first_column(config, N_FAMILY_COLUMNS);
}

/* Columns that the short convolution takes: q, k, v. */
static int64_t conv_width(const struct layer_config *config)
{
	return first_column(config, COLUMN_DECAY);
}

/* Parts of a row of o that are normalized each by itself. */
static int64_t norm_groups(const struct layer_config *config)
{
	return family_member(config)->norm_over_all ? 1 : config->n_heads;
}

/* All heads' keys, side by side. */
static int64_t key_span(const struct layer_config *config)
{
	return config->n_heads * key_width(config);
}

static bool rotates(const struct layer_config *config)
{
	return family_member(config)->input == INPUT_ROTATED && config->rope;
}

/* ---- tensors ---- */

enum status family_check(const struct layer_config *config)
{
	const struct family_member *m = family_member(config);

	if (m->key_part > 1 && config->d_model % (m->key_part * config->n_heads) != 0)
		return status_set(STATUS_INVALID,
		                  "%s: heads=%lld (allowed: a divisor of its keys' width, %lld / "
		                  "%lld)",
		                  config->class->name, (long long)config->n_heads,
		                  (long long)config->d_model, (long long)m->key_part);
	return mixing_check(config);
}

struct layer_widths family_widths(const struct layer_config *config)
{
	const struct family_member *m = family_member(config);
	int64_t h = config->n_heads;

	return (struct layer_widths){h, m->shared_keys ? 1 : h, key_width(config),
	                             family_value_width(config) / h};
}

int family_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t d = family_value_width(config), h = config->n_heads;
	int64_t decay = decay_width(config);
	int64_t rank = gate_rank(config), low_rank = has_low_rank_decay(config) ? decay : 0;
	int64_t gk_bias = m->input == INPUT_DECAY_GATE ? decay : 0;
	int64_t forget = m->input == INPUT_FORGET_GATE ? decay : 0;
	int64_t conv = convolves(config) ? conv_width(config) : 0;
	int64_t conv_bias = m->input == INPUT_CONVOLVED ? conv : 0;
	int64_t steps = time_step_width(config), rates = steps > 0 ? h : 0;
	int64_t skip = m->output == OUTPUT_GATE_NORM ? h : 0;
	int64_t gate = has_low_rank_gate(config) ? d : 0;
	const struct tensor_spec own[] = {
	        {"out_norm", STORAGE_FP32, 1, {d / norm_groups(config)}, INIT_ONES},
	        {"gk_weight", STORAGE_ACTIVATION, 2, {low_rank, rank}, INIT_NORMAL},
	        {"gk_bias", STORAGE_FP32, 1, {gk_bias}, INIT_ZEROS},
	        {"lower_bound", STORAGE_FP32, 1, {forget}, INIT_LOWER_BOUND},
	        {"conv_weight", STORAGE_FP32, 2, {conv, CONV_WIDTH}, INIT_CONV},
	        {"conv_bias", STORAGE_FP32, 1, {conv_bias}, INIT_ZEROS},
	        {"dt_bias", STORAGE_FP32, 1, {steps}, INIT_TIME_STEP},
	        {"log_rate", STORAGE_FP32, 1, {rates}, INIT_LOG_RATE},
	        {"skip", STORAGE_FP32, 1, {skip}, INIT_ONES},
	        {"g_weight", STORAGE_ACTIVATION, 2, {gate, rank}, INIT_NORMAL},
	        {"g_bias", STORAGE_FP32, 1, {gate}, INIT_ZEROS},
	};

	mixing_parameters(config, specs);
	for (int i = PARAM_OTHER; i < N_FAMILY_PARAMS; i++)
		specs[i] = own[i - PARAM_OTHER];
	return N_FAMILY_PARAMS;
}

int family_state(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t h = config->n_heads, d = shape->capacity > 0 ? family_value_width(config) : 0;
	const struct tensor_spec matrix = {
	        "s", STORAGE_FP32, 4, {shape->batch, h, key_width(config), d / h}, INIT_ZEROS};
	const struct tensor_spec vector = {"h", STORAGE_FP32, 2, {shape->batch, d}, INIT_ZEROS};

	specs[STATE_S] = m->vector_state ? vector : matrix;
	if (!convolves(config))
		return STATE_CONV;
	specs[STATE_CONV] =
	        (struct tensor_spec){"conv",
	                             STORAGE_ACTIVATION,
	                             3,
	                             {shape->batch, CONV_HISTORY, d > 0 ? conv_width(config) : 0},
	                             INIT_ZEROS};
	return N_FAMILY_STATES;
}

int family_saved(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t d = family_value_width(config), n = shape->batch * shape->seq_len;
	bool forget = m->input == INPUT_FORGET_GATE, conv = m->input == INPUT_CONVOLVED;
	bool delta = is_delta(config), derives_keys = delta || (forget && !m->vector_state);
	int64_t rotated = rotates(config) ? n : 0, kept = shape->pass == PASS_TRAIN ? n : 0;

	mixing_saved(config, shape, specs);
	specs[SAVED_CONV] = tensor_rows("conv", STORAGE_ACTIVATION, convolves(config) ? n : 0,
	                                conv_width(config));
	specs[SAVED_KEY] = tensor_rows("key", STORAGE_ACTIVATION, derives_keys ? n : rotated,
	                               (delta ? 2 : 1) * key_span(config));
	specs[SAVED_INPUT] = tensor_rows("input", STORAGE_ACTIVATION, forget || conv ? n : rotated,
	                                 rotated ? key_span(config) : d);
	specs[SAVED_LOG_DECAY] =
	        tensor_rows("log_decay", STORAGE_ACTIVATION, n, decay_width(config));
	specs[SAVED_OUT] = tensor_rows("out", STORAGE_ACTIVATION, n, d);
	specs[SAVED_OUT_RSTD] = tensor_rows("out_rstd", STORAGE_FP32, kept, norm_groups(config));
	specs[SAVED_BETA] = tensor_rows("beta", STORAGE_ACTIVATION, delta ? n : 0, config->n_heads);
	specs[SAVED_INVERSE] =
	        tensor_rows("inverse", STORAGE_FP32, delta ? kept : 0, 2 * config->n_heads);
	specs[SAVED_GATE] =
	        tensor_rows("gate", STORAGE_ACTIVATION, has_low_rank_gate(config) ? n : 0, d);
	return N_SAVED;
}

int family_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t d = family_value_width(config), n = shape->batch * shape->seq_len;
	int64_t decay = decay_width(config), keys = key_span(config);
	bool forget = m->input == INPUT_FORGET_GATE, conv = m->input == INPUT_CONVOLVED;
	bool delta = is_delta(config);
	int64_t apart = (forget && !m->vector_state) || conv || rotates(config) ? n : 0;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DOUT] = tensor_rows("dout", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOG_DECAY] = tensor_rows("dlog_decay", STORAGE_ACTIVATION, n, decay);
	specs[SCRATCH_DLOGIT] = tensor_rows("dlogit", STORAGE_ACTIVATION,
	                                    has_low_rank_decay(config) ? n : 0, decay);
	specs[SCRATCH_DQ] =
	        tensor_rows("dq", STORAGE_ACTIVATION, delta ? n : apart, (delta ? 2 : 1) * keys);
	specs[SCRATCH_DK] = tensor_rows("dk", STORAGE_ACTIVATION, apart, keys);
	specs[SCRATCH_DV] =
	        tensor_rows("dv", STORAGE_ACTIVATION, m->vector_state || conv ? n : 0, d);
	specs[SCRATCH_DX] = tensor_rows("dx", STORAGE_ACTIVATION, convolves(config) ? n : 0,
	                                delta ? conv_width(config) : d);
	specs[SCRATCH_DSKIP] = tensor_rows("dskip", STORAGE_ACTIVATION, conv ? n : 0, d);
	specs[SCRATCH_DBETA] =
	        tensor_rows("dbeta", STORAGE_ACTIVATION, delta ? n : 0, config->n_heads);
	specs[SCRATCH_DGATE] =
	        tensor_rows("dgate", STORAGE_ACTIVATION, has_low_rank_gate(config) ? n : 0, d);
	return N_SCRATCH;
}

/* ---- views ---- */

static enum family_input input_of(const struct layer_run *r)
{
	return family_member(r->config)->input;
}

static bool has_vector(const struct layer_run *r)
{
	return family_member(r->config)->vector_state;
}

/* A block of columns of InProj's output or of its gradient, as a plain pointer. */
static void *column(const struct layer_run *r, void *proj, enum family_column column)
{
	return mixing_column(r->ctx, proj, first_column(r->config, column));
}

/* The same as heads. */
static struct view columns(const struct layer_run *r, void *proj, enum family_column column)
{
	return mixing_columns(r, proj, family_proj_width(r->config),
	                      first_column(r->config, column),
	                      column_width(r->config, column) / r->config->n_heads);
}

/* The same of a vector state: all channels as one head. */
static struct view as_vector(struct view view)
{
	view.head = view.token;
	return view;
}

/* q or k behind the convolution, which all heads read. */
static struct view shared_keys(const struct layer_run *r, enum family_column column)
{
	return mixing_columns(r, r->memory->saved[SAVED_CONV], conv_width(r->config),
	                      first_column(r->config, column), 0);
}

/* q, k or v, or their gradients, behind the convolution of a delta rule. */
static struct view convolved(const struct layer_run *r, void *tensor, enum family_column column)
{
	return mixing_columns(r, tensor, conv_width(r->config), first_column(r->config, column),
	                      column_width(r->config, column) / r->config->n_heads);
}

/* q or k of a delta rule in a tensor of both, heads of q before those of k. */
static struct view unit_keys(const struct layer_run *r, void *tensor, enum family_column column)
{
	int64_t keys = key_span(r->config);

	return mixing_columns(r, tensor, 2 * keys, column == COLUMN_K ? keys : 0,
	                      key_width(r->config));
}

/* What the recurrence reads. */
static struct view query(const struct layer_run *r)
{
	if (is_delta(r->config))
		return unit_keys(r, r->memory->saved[SAVED_KEY], COLUMN_Q);
	if (input_of(r) == INPUT_CONVOLVED)
		return shared_keys(r, COLUMN_Q);
	if (input_of(r) == INPUT_FORGET_GATE || rotates(r->config))
		return mixing_heads(r, r->memory->saved[SAVED_INPUT], key_span(r->config));
	return columns(r, r->memory->saved[SAVED_PROJ], COLUMN_Q);
}

static struct view key(const struct layer_run *r)
{
	if (is_delta(r->config))
		return unit_keys(r, r->memory->saved[SAVED_KEY], COLUMN_K);
	if (input_of(r) == INPUT_CONVOLVED)
		return shared_keys(r, COLUMN_K);
	if (input_of(r) == INPUT_FORGET_GATE || rotates(r->config))
		return mixing_heads(r, r->memory->saved[SAVED_KEY], key_span(r->config));
	return columns(r, r->memory->saved[SAVED_PROJ], COLUMN_K);
}

static struct view value(const struct layer_run *r)
{
	if (is_delta(r->config))
		return convolved(r, r->memory->saved[SAVED_CONV], COLUMN_V);
	if (input_of(r) == INPUT_CONVOLVED || has_vector(r))
		return mixing_heads(r, r->memory->saved[SAVED_INPUT],
		                    family_value_width(r->config));
	return columns(r, r->memory->saved[SAVED_PROJ], COLUMN_V);
}

/* The gradient of query() or key(). */
static struct view key_gradient(const struct layer_run *r, int scratch, enum family_column column)
{
	bool apart = input_of(r) == INPUT_CONVOLVED || input_of(r) == INPUT_FORGET_GATE ||
	             rotates(r->config);

	if (is_delta(r->config))
		return unit_keys(r, r->memory->scratch[SCRATCH_DQ], column);
	return apart ? mixing_heads(r, r->memory->scratch[scratch], key_span(r->config))
	             : columns(r, r->memory->scratch[SCRATCH_DPROJ], column);
}

/* ---- between InProj and the recurrence ---- */

static struct decay_gate_args decay_args(const struct layer_run *r)
{
	bool rate = is_delta(r->config);

	return (struct decay_gate_args){
	        .n_tokens = layer_tokens(r),
	        .rank = gate_rank(r->config),
	        .d_out = decay_width(r->config),
	        .x_stride = family_proj_width(r->config),
	        .form = rate ? LOW_RANK_RATE : LOW_RANK_DECAY,
	        .n_heads = r->config->n_heads,
	        .normalizer = GATE_NORMALIZER,
	        .x = column(r, r->memory->saved[SAVED_PROJ], COLUMN_DECAY),
	        .weight = r->memory->param[PARAM_GK_WEIGHT],
	        .bias = r->memory->param[rate ? PARAM_DT_BIAS : PARAM_GK_BIAS],
	        .log_rate = r->memory->param[PARAM_LOG_RATE],
	        .out = r->memory->saved[SAVED_LOG_DECAY],
	};
}

static struct delta_gate_args delta_args(const struct layer_run *r)
{
	void *proj = r->memory->saved[SAVED_PROJ];
	struct delta_gate_args args = {
	        .n_tokens = layer_tokens(r),
	        .n_heads = r->config->n_heads,
	        .stride = family_proj_width(r->config),
	        .logit = column(r, proj, COLUMN_BETA),
	        .beta = r->memory->saved[SAVED_BETA],
	};

	if (family_member(r->config)->decay != DECAY_SCALAR)
		return args;
	args.decay_logit = column(r, proj, COLUMN_DECAY);
	args.bias = r->memory->param[PARAM_DT_BIAS];
	args.log_rate = r->memory->param[PARAM_LOG_RATE];
	args.log_decay = r->memory->saved[SAVED_LOG_DECAY];
	return args;
}

/* q and k side by side, as so many heads more. */
static struct l2_norm_args l2_args(const struct layer_run *r)
{
	return (struct l2_norm_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = 2 * r->config->n_heads,
	        .d_head = key_width(r->config),
	        .eps = length_eps,
	        .x = convolved(r, r->memory->saved[SAVED_CONV], COLUMN_Q),
	        .y = query(r),
	        .inverse = r->memory->saved[SAVED_INVERSE],
	};
}

/* The columns that the forget gate takes its x from: HGRN's input, HGRN-2's query. */
static enum family_column forget_input(const struct layer_run *r)
{
	return has_vector(r) ? COLUMN_V : COLUMN_Q;
}

static struct forget_gate_args forget_args(const struct layer_run *r)
{
	return (struct forget_gate_args){
	        .n_tokens = layer_tokens(r),
	        .width = family_value_width(r->config),
	        .stride = family_proj_width(r->config),
	        .logit = column(r, r->memory->saved[SAVED_PROJ], COLUMN_DECAY),
	        .x = column(r, r->memory->saved[SAVED_PROJ], forget_input(r)),
	        .bound = r->memory->param[PARAM_BOUND],
	        .log_decay = r->memory->saved[SAVED_LOG_DECAY],
	        .key = r->memory->saved[SAVED_KEY],
	        .out = r->memory->saved[SAVED_INPUT],
	};
}

static struct short_conv_args conv_args(const struct layer_run *r)
{
	return (struct short_conv_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .channels = conv_width(r->config),
	        .x_stride = family_proj_width(r->config),
	        .x = r->memory->saved[SAVED_PROJ],
	        .weight = r->memory->param[PARAM_CONV_WEIGHT],
	        .bias = r->memory->param[PARAM_CONV_BIAS],
	        .out = r->memory->saved[SAVED_CONV],
	        .history = r->memory->state[STATE_CONV],
	};
}

/* The values behind the convolution. */
static void *convolved_values(const struct layer_run *r)
{
	return column(r, r->memory->saved[SAVED_CONV], COLUMN_V);
}

static struct time_step_args time_step_args(const struct layer_run *r)
{
	return (struct time_step_args){
	        .n_tokens = layer_tokens(r),
	        .n_heads = r->config->n_heads,
	        .d_head = family_value_width(r->config) / r->config->n_heads,
	        .logit_stride = family_proj_width(r->config),
	        .x_stride = conv_width(r->config),
	        .logit = column(r, r->memory->saved[SAVED_PROJ], COLUMN_DECAY),
	        .bias = r->memory->param[PARAM_DT_BIAS],
	        .log_rate = r->memory->param[PARAM_LOG_RATE],
	        .x = convolved_values(r),
	        .log_decay = r->memory->saved[SAVED_LOG_DECAY],
	        .out = r->memory->saved[SAVED_INPUT],
	};
}

static enum status rotate(const struct layer_run *r)
{
	const struct rotate_args args = {
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = r->config->n_heads,
	        .kv_heads = r->config->n_heads,
	        .d_head = key_width(r->config),
	        .rope = true,
	        .kv_slots = r->shape->seq_len,
	        .q = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_Q),
	        .k = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_K),
	        .q_out = query(r),
	        .k_out = key(r),
	};

	return run_rotate(r->ctx, &args);
}

/* What is the same for a sequence and for a token. */
static enum status run_gates(const struct layer_run *r)
{
	if (is_delta(r->config)) {
		const struct l2_norm_args lengths = l2_args(r);
		const struct delta_gate_args args = delta_args(r);

		TRY(run_l2_norm(r->ctx, &lengths));
		TRY(run_delta_gate(r->ctx, &args));
	}
	if (has_low_rank_decay(r->config)) {
		const struct decay_gate_args args = decay_args(r);

		return run_decay_gate(r->ctx, &args);
	}
	if (input_of(r) == INPUT_FORGET_GATE) {
		const struct forget_gate_args args = forget_args(r);

		return run_forget_gate(r->ctx, &args);
	}
	if (input_of(r) == INPUT_CONVOLVED) {
		const struct time_step_args args = time_step_args(r);

		return run_time_step(r->ctx, &args);
	}
	return STATUS_OK;
}

static enum status rotate_token(const struct layer_run *r)
{
	const struct rotate_step_args args = {
	        .batch = r->shape->batch,
	        .n_heads = r->config->n_heads,
	        .d_head = key_width(r->config),
	        .position = r->position,
	        .q = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_Q),
	        .k = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_K),
	        .q_out = query(r),
	        .k_out = key(r),
	};

	return run_rotate_step(r->ctx, &args);
}

static enum status convolve(const struct layer_run *r)
{
	const struct short_conv_args args = conv_args(r);

	return mixing_convolve(r, &args);
}

static enum status prepare(const struct layer_run *r)
{
	if (rotates(r->config))
		TRY((r->position ? rotate_token : rotate)(r));
	if (convolves(r->config))
		TRY(convolve(r));
	return run_gates(r);
}

/* Element `first` of a tensor that argument structs call float. */
static float *element(const struct layer_run *r, const float *tensor, int64_t first)
{
	if (!tensor)
		return NULL;
	return (float *)((char *)tensor + (size_t)first * dtype_size(r->ctx->device->wide));
}

/* The convolution's backward for `channels` columns from `first` on, whose output's gradient dout
 * is the sum of n_readers. */
static enum status conv_backward(const struct layer_run *r, int64_t first, int64_t channels,
                                 int64_t n_readers, const void *dout)
{
	struct short_conv_backward_args args = {
	        .forward = conv_args(r),
	        .n_readers = n_readers,
	        .dout = dout,
	        .dx = mixing_column(r->ctx, r->memory->scratch[SCRATCH_DPROJ], first),
	        .dweight = r->memory->grad[PARAM_CONV_WEIGHT],
	        .dbias = r->memory->grad[PARAM_CONV_BIAS],
	};

	args.forward.channels = channels;
	args.forward.x = mixing_column(r->ctx, r->memory->saved[SAVED_PROJ], first);
	args.forward.weight = element(r, args.forward.weight, first * CONV_WIDTH);
	args.forward.bias = element(r, args.forward.bias, first);
	args.dweight = element(r, args.dweight, first * CONV_WIDTH);
	args.dbias = element(r, args.dbias, first);
	return run_short_conv_backward(r->ctx, &args);
}

/* The same for one block of columns. */
static enum status block_backward(const struct layer_run *r, enum family_column block,
                                  int64_t n_readers, const void *dout)
{
	return conv_backward(r, first_column(r->config, block), column_width(r->config, block),
	                     n_readers, dout);
}

static enum status convolved_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	const struct time_step_backward_args steps = {
	        .forward = time_step_args(r),
	        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
	        .dout = scratch[SCRATCH_DV],
	        .dskip = scratch[SCRATCH_DSKIP],
	        .dlogit = column(r, scratch[SCRATCH_DPROJ], COLUMN_DECAY),
	        .dx = scratch[SCRATCH_DX],
	        .dbias = r->memory->grad[PARAM_DT_BIAS],
	        .dlog_rate = r->memory->grad[PARAM_LOG_RATE],
	};

	TRY(run_time_step_backward(r->ctx, &steps));
	TRY(block_backward(r, COLUMN_Q, r->config->n_heads, scratch[SCRATCH_DQ]));
	TRY(block_backward(r, COLUMN_K, r->config->n_heads, scratch[SCRATCH_DK]));
	return block_backward(r, COLUMN_V, 1, scratch[SCRATCH_DX]);
}

/* Of all but a low-rank decay. */
static enum status delta_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	struct delta_gate_backward_args gate = {
	        .forward = delta_args(r),
	        .dbeta = scratch[SCRATCH_DBETA],
	        .dlogit = column(r, scratch[SCRATCH_DPROJ], COLUMN_BETA),
	};
	const struct l2_norm_backward_args lengths = {
	        .forward = l2_args(r),
	        .dy = key_gradient(r, SCRATCH_DQ, COLUMN_Q),
	        .dx = convolved(r, scratch[SCRATCH_DX], COLUMN_Q),
	};

	if (gate.forward.decay_logit) {
		gate.dlog_decay = scratch[SCRATCH_DLOG_DECAY];
		gate.ddecay_logit = column(r, scratch[SCRATCH_DPROJ], COLUMN_DECAY);
		gate.dbias = r->memory->grad[PARAM_DT_BIAS];
		gate.dlog_rate = r->memory->grad[PARAM_LOG_RATE];
	}
	TRY(run_delta_gate_backward(r->ctx, &gate));
	TRY(run_l2_norm_backward(r->ctx, &lengths));
	return conv_backward(r, 0, conv_width(r->config), 1, scratch[SCRATCH_DX]);
}

static enum status rotate_backward(const struct layer_run *r)
{
	void *dproj = r->memory->scratch[SCRATCH_DPROJ];
	const struct rotate_backward_args args = {
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = r->config->n_heads,
	        .kv_heads = r->config->n_heads,
	        .d_head = key_width(r->config),
	        .rope = true,
	        .dq_out = key_gradient(r, SCRATCH_DQ, COLUMN_Q),
	        .dk_out = key_gradient(r, SCRATCH_DK, COLUMN_K),
	        .dq = columns(r, dproj, COLUMN_Q),
	        .dk = columns(r, dproj, COLUMN_K),
	};

	return run_rotate_backward(r->ctx, &args);
}

static enum status prepare_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	void *ddecay = column(r, scratch[SCRATCH_DPROJ], COLUMN_DECAY);

	if (rotates(r->config))
		return rotate_backward(r);
	if (input_of(r) == INPUT_CONVOLVED)
		return convolved_backward(r);
	if (is_delta(r->config))
		TRY(delta_backward(r));
	if (has_low_rank_decay(r->config)) {
		const int bias = is_delta(r->config) ? PARAM_DT_BIAS : PARAM_GK_BIAS;
		const struct decay_gate_backward_args args = {
		        .forward = decay_args(r),
		        .dout = scratch[SCRATCH_DLOG_DECAY],
		        .dx = ddecay,
		        .dlogit = scratch[SCRATCH_DLOGIT],
		        .dweight = r->memory->grad[PARAM_GK_WEIGHT],
		        .dbias = r->memory->grad[bias],
		        .dlog_rate = r->memory->grad[PARAM_LOG_RATE],
		};

		return run_decay_gate_backward(r->ctx, &args);
	}
	if (input_of(r) == INPUT_FORGET_GATE) {
		const struct forget_gate_backward_args args = {
		        .forward = forget_args(r),
		        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
		        .dout = scratch[has_vector(r) ? SCRATCH_DV : SCRATCH_DQ],
		        .dkey = scratch[SCRATCH_DK],
		        .dlogit = ddecay,
		        .dx = column(r, scratch[SCRATCH_DPROJ], forget_input(r)),
		        .dbound = r->memory->grad[PARAM_BOUND],
		};

		return run_forget_gate_backward(r->ctx, &args);
	}
	return STATUS_OK;
}

/* ---- the recurrence ---- */

static struct recurrence_args vector_args(const struct layer_run *r)
{
	int64_t d = family_value_width(r->config);

	return (struct recurrence_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .d_model = d,
	        .form = GATE_LOG_DECAY,
	        .x = as_vector(value(r)),
	        .gate = as_vector(mixing_heads(r, r->memory->saved[SAVED_LOG_DECAY], d)),
	        .out = as_vector(mixing_heads(r, r->memory->saved[SAVED_OUT], d)),
	        .h_final = r->memory->state[STATE_S],
	};
}

static struct matrix_recurrence_args matrix_args(const struct layer_run *r)
{
	int64_t d_k = key_width(r->config);

	return (struct matrix_recurrence_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = r->config->n_heads,
	        .d_k = d_k,
	        .d_v = family_value_width(r->config) / r->config->n_heads,
	        .decay = family_member(r->config)->decay,
	        .rule = is_delta(r->config) ? RULE_DELTA : RULE_PLAIN,
	        .chunk = r->config->chunk,
	        .scale = family_member(r->config)->unscaled ? 1.0f : 1.0f / sqrtf((float)d_k),
	        .q = query(r),
	        .k = key(r),
	        .v = value(r),
	        .log_decay =
	                mixing_heads(r, r->memory->saved[SAVED_LOG_DECAY], decay_width(r->config)),
	        .beta = mixing_heads(r, r->memory->saved[SAVED_BETA], r->config->n_heads),
	        .out = mixing_heads(r, r->memory->saved[SAVED_OUT], family_value_width(r->config)),
	        .final_state = r->memory->state[STATE_S],
	};
}

static enum status recur_vector(const struct layer_run *r)
{
	const struct recurrence_args args = vector_args(r);

	return mixing_recur(r, &args);
}

static enum status recur_matrix(const struct layer_run *r)
{
	const struct matrix_recurrence_args args = matrix_args(r);

	return mixing_recur_matrix(r, &args);
}

/* The gradient of value(). */
static struct view value_gradient(const struct layer_run *r)
{
	if (is_delta(r->config))
		return convolved(r, r->memory->scratch[SCRATCH_DX], COLUMN_V);
	if (input_of(r) == INPUT_CONVOLVED || has_vector(r))
		return mixing_heads(r, r->memory->scratch[SCRATCH_DV],
		                    family_value_width(r->config));
	return columns(r, r->memory->scratch[SCRATCH_DPROJ], COLUMN_V);
}

static enum status recur_backward(const struct layer_run *r)
{
	const struct view dout =
	        mixing_heads(r, r->memory->scratch[SCRATCH_DOUT], family_value_width(r->config));
	const struct view dlog_decay =
	        mixing_heads(r, r->memory->scratch[SCRATCH_DLOG_DECAY], decay_width(r->config));

	if (has_vector(r)) {
		const struct recurrence_backward_args args = {
		        .forward = vector_args(r),
		        .dout = as_vector(dout),
		        .dx = as_vector(value_gradient(r)),
		        .dgate = as_vector(dlog_decay),
		};

		return run_recurrence_backward(r->ctx, &args);
	}
	const struct matrix_recurrence_backward_args args = {
	        .forward = matrix_args(r),
	        .dout = dout,
	        .dq = key_gradient(r, SCRATCH_DQ, COLUMN_Q),
	        .dk = key_gradient(r, SCRATCH_DK, COLUMN_K),
	        .dv = value_gradient(r),
	        .dlog_decay = dlog_decay,
	        .dbeta = mixing_heads(r, r->memory->scratch[SCRATCH_DBETA], r->config->n_heads),
	};

	return run_matrix_recurrence_backward(r->ctx, &args);
}

/* ---- between the recurrence and OutProj ---- */

/* The logits of a low-rank gate. */
static struct decay_gate_args gate_logit_args(const struct layer_run *r)
{
	return (struct decay_gate_args){
	        .n_tokens = layer_tokens(r),
	        .rank = gate_rank(r->config),
	        .d_out = family_value_width(r->config),
	        .x_stride = family_proj_width(r->config),
	        .form = LOW_RANK_LOGIT,
	        .x = column(r, r->memory->saved[SAVED_PROJ], COLUMN_GATE),
	        .weight = r->memory->param[PARAM_G_WEIGHT],
	        .bias = r->memory->param[PARAM_G_BIAS],
	        .out = r->memory->saved[SAVED_GATE],
	};
}

static struct norm_gate_args norm_gate_args(const struct layer_run *r)
{
	int64_t groups = norm_groups(r->config);
	bool low_rank = has_low_rank_gate(r->config);

	return (struct norm_gate_args){
	        .n_tokens = layer_tokens(r),
	        .n_heads = groups,
	        .d_head = family_value_width(r->config) / groups,
	        .gate_stride =
	                low_rank ? family_value_width(r->config) : family_proj_width(r->config),
	        .curve = low_rank ? CURVE_SIGMOID : CURVE_SILU,
	        .eps = family_norm_eps,
	        .x = r->memory->saved[SAVED_OUT],
	        .weight = r->memory->param[PARAM_OUT_NORM],
	        .gate = low_rank ? r->memory->saved[SAVED_GATE]
	                         : column(r, r->memory->saved[SAVED_PROJ], COLUMN_GATE),
	        .rstd = r->memory->saved[SAVED_OUT_RSTD],
	        .out = r->memory->saved[SAVED_MIX],
	};
}

/* With a skip connection from the values before their time steps, or the norm alone. */
static struct gate_norm_args gate_norm_args(const struct layer_run *r)
{
	bool gated = family_member(r->config)->output == OUTPUT_GATE_NORM;

	return (struct gate_norm_args){
	        .n_tokens = layer_tokens(r),
	        .n_heads = r->config->n_heads,
	        .d_head = family_value_width(r->config) / r->config->n_heads,
	        .groups = norm_groups(r->config),
	        .skip_stride = gated ? conv_width(r->config) : 0,
	        .gate_stride = gated ? family_proj_width(r->config) : 0,
	        .eps = family_norm_eps,
	        .x = r->memory->saved[SAVED_OUT],
	        .skip = gated ? convolved_values(r) : NULL,
	        .skip_weight = r->memory->param[PARAM_SKIP],
	        .gate = gated ? column(r, r->memory->saved[SAVED_PROJ], COLUMN_GATE) : NULL,
	        .weight = r->memory->param[PARAM_OUT_NORM],
	        .rstd = r->memory->saved[SAVED_OUT_RSTD],
	        .out = r->memory->saved[SAVED_MIX],
	};
}

/* Whether the gate follows the norm. */
static bool gates_norm(const struct layer_run *r)
{
	return family_member(r->config)->output == OUTPUT_NORM_GATE || has_low_rank_gate(r->config);
}

static enum status finish(const struct layer_run *r)
{
	if (has_low_rank_gate(r->config)) {
		const struct decay_gate_args args = gate_logit_args(r);

		TRY(run_decay_gate(r->ctx, &args));
	}
	if (gates_norm(r)) {
		const struct norm_gate_args args = norm_gate_args(r);

		return run_norm_gate(r->ctx, &args);
	}
	const struct gate_norm_args args = gate_norm_args(r);

	return run_gate_norm(r->ctx, &args);
}

static enum status norm_gate_backward(const struct layer_run *r, void *dgate)
{
	void *const *scratch = r->memory->scratch;
	const bool low_rank = has_low_rank_gate(r->config);
	const struct norm_gate_backward_args norm = {
	        .forward = norm_gate_args(r),
	        .dout = scratch[SCRATCH_DMIX],
	        .dx = scratch[SCRATCH_DOUT],
	        .dgate = low_rank ? scratch[SCRATCH_DGATE] : dgate,
	        .dweight = r->memory->grad[PARAM_OUT_NORM],
	};
	const struct decay_gate_backward_args logit = {
	        .forward = gate_logit_args(r),
	        .dout = scratch[SCRATCH_DGATE],
	        .dx = dgate,
	        .dweight = r->memory->grad[PARAM_G_WEIGHT],
	        .dbias = r->memory->grad[PARAM_G_BIAS],
	};

	TRY(run_norm_gate_backward(r->ctx, &norm));
	return low_rank ? run_decay_gate_backward(r->ctx, &logit) : STATUS_OK;
}

static enum status finish_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	void *dgate = column(r, scratch[SCRATCH_DPROJ], COLUMN_GATE);

	if (gates_norm(r))
		return norm_gate_backward(r, dgate);
	const struct gate_norm_backward_args args = {
	        .forward = gate_norm_args(r),
	        .dout = scratch[SCRATCH_DMIX],
	        .dx = scratch[SCRATCH_DOUT],
	        .dskip = scratch[SCRATCH_DSKIP],
	        .dgate = dgate,
	        .dskip_weight = r->memory->grad[PARAM_SKIP],
	        .dweight = r->memory->grad[PARAM_OUT_NORM],
	};

	return run_gate_norm_backward(r->ctx, &args);
}

/* ---- the passes ---- */

enum status family_forward(const struct layer_run *r)
{
	TRY(prepare(r));
	TRY((has_vector(r) ? recur_vector : recur_matrix)(r));
	return finish(r);
}

enum status family_backward(const struct layer_run *r)
{
	TRY(finish_backward(r));
	TRY(recur_backward(r));
	return prepare_backward(r);
}

/* The convolution's part of what one block of InProj's columns is called. */
static int conv_golden_names(const struct layer_config *config, enum family_column column,
                             struct golden_name *names)
{
	static const char *const of_delta[] = {
	        [COLUMN_Q] = "q_conv1d.weight",
	        [COLUMN_K] = "k_conv1d.weight",
	        [COLUMN_V] = "v_conv1d.weight",
	};
	const char *weight = is_delta(config) ? of_delta[column] : "conv1d.weight";
	int64_t first = first_column(config, column);
	int64_t width = column_width(config, column);

	names[0] = golden_rows(weight, PARAM_CONV_WEIGHT, first, width);
	names[1] = golden_rows("conv1d.bias", PARAM_CONV_BIAS, first, width);
	names[2] = golden_columns("state.conv", STATE_CONV, first, width, false);
	return 3;
}

int family_golden_names(const struct layer_config *config, struct golden_name *names)
{
	/* Members' references agree on all of these but the last five. */
	static const struct {
		const char *name;
		int parameter;
	} own[] = {
	        {"input_norm.weight", PARAM_NORM},   {"gk_proj.1.weight", PARAM_GK_WEIGHT},
	        {"gk_proj.1.bias", PARAM_GK_BIAS},   {"f_proj.1.weight", PARAM_GK_WEIGHT},
	        {"g_proj.1.weight", PARAM_G_WEIGHT}, {"g_proj.1.bias", PARAM_G_BIAS},
	        {"lower_bound_logit", PARAM_BOUND},  {"dt_bias", PARAM_DT_BIAS},
	        {"A_log", PARAM_LOG_RATE},           {"D", PARAM_SKIP},
	        {"g_norm.weight", PARAM_OUT_NORM},   {"norm.weight", PARAM_OUT_NORM},
	        {"o_norm.weight", PARAM_OUT_NORM},   {"o_proj.weight", PARAM_OUT_PROJ},
	        {"out_proj.weight", PARAM_OUT_PROJ},
	};
	const struct family_member *m = family_member(config);
	struct tensor_spec specs[MAX_TENSORS];
	int64_t d = family_value_width(config);
	int n = 0;

	family_parameters(config, specs);
	for (size_t i = 0; i < sizeof own / sizeof *own; i++)
		names[n++] = golden_rows(own[i].name, own[i].parameter, 0,
		                         specs[own[i].parameter].dims[0]);
	for (int i = 0; i < N_FAMILY_COLUMNS && m->golden[i].name; i++) {
		enum family_column column = m->golden[i].column;

		names[n++] =
		        golden_rows(m->golden[i].name, PARAM_IN_PROJ, first_column(config, column),
		                    column_width(config, column));
		if (convolves(config) && column < COLUMN_DECAY)
			n += conv_golden_names(config, column, names + n);
	}
	names[n++] =
	        golden_columns("state.s", STATE_S, 0, m->vector_state ? d : d / config->n_heads,
	                       m->golden_values_first);
	return n;
}
