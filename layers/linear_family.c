/* Every member of the linear-attention family: its tensors, and its three passes. */
#include "layers/linear_family.h"

#include <math.h>

#include "layers/mixing.h"

/* Saved: what the recurrence reads where that is not InProj's output, and what it writes. */
enum {
	SAVED_CONV = SAVED_OTHER, /* q, k, x behind the convolution */
	SAVED_KEY,                /* k of the forget gate */
	SAVED_INPUT,              /* v of the time steps or of HGRN; q of HGRN-2 */
	SAVED_LOG_DECAY,
	SAVED_OUT,
	SAVED_OUT_RSTD,
	N_SAVED
};
/* Gradients of those, and of what InProj's columns cannot hold: one dq and dk per head. */
enum {
	SCRATCH_DOUT = SCRATCH_OTHER,
	SCRATCH_DLOG_DECAY,
	SCRATCH_DLOGIT,
	SCRATCH_DQ,
	SCRATCH_DK,
	SCRATCH_DV,
	SCRATCH_DX,
	N_SCRATCH
};

/* One run of one layer. */
struct run {
	struct context *ctx;
	const struct layer_config *config;
	const struct layer_shape *shape;
	struct layer_memory *memory;
	const struct family_member *member;
};

/* ---- widths ---- */

int64_t family_value_width(const struct layer_config *config)
{
	return family_member(config)->value_factor * config->d_model;
}

int64_t family_key_width(const struct layer_config *config)
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

int64_t family_decay_width(const struct layer_config *config)
{
	switch (family_member(config)->input) {
	case INPUT_DECAY_GATE:
		return key_columns(config);
	case INPUT_FORGET_GATE:
		return config->d_model;
	case INPUT_CONVOLVED:
		return config->n_heads;
	default:
		return 0;
	}
}

int64_t family_column_width(const struct layer_config *config, enum family_column column)
{
	const struct family_member *m = family_member(config);
	bool derives_keys = m->input == INPUT_FORGET_GATE;

	switch (column) {
	case COLUMN_Q:
		return m->vector_state ? 0 : key_columns(config);
	case COLUMN_K:
		return m->vector_state || derives_keys ? 0 : key_columns(config);
	case COLUMN_DECAY:
		return m->input == INPUT_DECAY_GATE ? GATE_RANK : family_decay_width(config);
	case COLUMN_GATE:
		return m->output == OUTPUT_NORM ? 0 : family_value_width(config);
	default:
		return family_value_width(config);
	}
}

int64_t family_first_column(const struct layer_config *config, enum family_column column)
{
	int64_t first = 0;

	for (enum family_column i = 0; i < column; i++)
		first += family_column_width(config, i);
	return first;
}

int64_t family_proj_width(const struct layer_config *config)
{
	return family_first_column(config, N_FAMILY_COLUMNS);
}

int64_t family_conv_width(const struct layer_config *config)
{
	return family_first_column(config, COLUMN_DECAY);
}

int64_t family_norm_groups(const struct layer_config *config)
{
	return family_member(config)->norm_over_all ? 1 : config->n_heads;
}

/* ---- tensors ---- */

enum status family_check(const struct layer_config *config)
{
	const struct family_member *m = family_member(config);
	const char *name = config->class->name;

	if (config->chunk < 0)
		return status_set(STATUS_INVALID,
		                  "--chunk: %lld (allowed for %s: 1 or more, 0: automatic)",
		                  (long long)config->chunk, name);
	if (!m->shared_keys && config->n_heads > 0 &&
	    config->d_model % (m->key_part * config->n_heads) != 0 && m->key_part > 1)
		return status_set(STATUS_INVALID,
		                  "--heads: %lld do not split %s's keys of width %lld / %lld "
		                  "(allowed: a divisor of that)",
		                  (long long)config->n_heads, name, (long long)config->d_model,
		                  (long long)m->key_part);
	return mixing_check(config, m->input == INPUT_ROTATED);
}

int family_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t d = family_value_width(config), h = config->n_heads;
	int64_t decay = family_decay_width(config);
	int64_t low_rank = m->input == INPUT_DECAY_GATE ? decay : 0;
	int64_t forget = m->input == INPUT_FORGET_GATE ? decay : 0;
	int64_t conv = m->input == INPUT_CONVOLVED ? family_conv_width(config) : 0;
	int64_t steps = m->input == INPUT_CONVOLVED ? h : 0;
	int64_t skip = m->output == OUTPUT_GATE_NORM ? h : 0;
	const struct tensor_spec own[] = {
	        {"out_norm", STORAGE_FP32, 1, {d / family_norm_groups(config)}, INIT_ONES},
	        {"gk_weight", STORAGE_ACTIVATION, 2, {low_rank, GATE_RANK}, INIT_NORMAL},
	        {"gk_bias", STORAGE_FP32, 1, {low_rank}, INIT_ZEROS},
	        {"lower_bound", STORAGE_FP32, 1, {forget}, INIT_LOWER_BOUND},
	        {"conv_weight", STORAGE_FP32, 2, {conv, CONV_WIDTH}, INIT_CONV},
	        {"conv_bias", STORAGE_FP32, 1, {conv}, INIT_ZEROS},
	        {"dt_bias", STORAGE_FP32, 1, {steps}, INIT_TIME_STEP},
	        {"log_rate", STORAGE_FP32, 1, {steps}, INIT_LOG_RATE},
	        {"skip", STORAGE_FP32, 1, {skip}, INIT_ONES},
	};

	mixing_parameters(config, family_proj_width(config), specs);
	for (int i = PARAM_OTHER; i < N_FAMILY_PARAMS; i++)
		specs[i] = own[i - PARAM_OTHER];
	return N_FAMILY_PARAMS;
}

int family_state(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t h = config->n_heads, d = shape->capacity > 0 ? family_value_width(config) : 0;
	const struct tensor_spec matrix = {"s",
	                                   STORAGE_FP32,
	                                   4,
	                                   {shape->batch, h, family_key_width(config), d / h},
	                                   INIT_ZEROS};
	const struct tensor_spec vector = {"h", STORAGE_FP32, 2, {shape->batch, d}, INIT_ZEROS};

	specs[STATE_S] = m->vector_state ? vector : matrix;
	if (m->input != INPUT_CONVOLVED)
		return STATE_CONV;
	specs[STATE_CONV] = (struct tensor_spec){
	        "conv",
	        STORAGE_ACTIVATION,
	        3,
	        {shape->batch, CONV_HISTORY, d > 0 ? family_conv_width(config) : 0},
	        INIT_ZEROS};
	return N_FAMILY_STATES;
}

static struct tensor_spec rows(const char *name, enum storage storage, int64_t n, int64_t width)
{
	return (struct tensor_spec){name, storage, 2, {n, width}, INIT_ZEROS};
}

int family_saved(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t d = family_value_width(config), n = shape->batch * shape->seq_len;
	bool forget = m->input == INPUT_FORGET_GATE, conv = m->input == INPUT_CONVOLVED;

	mixing_saved(config, shape, family_proj_width(config), specs);
	specs[SAVED_CONV] =
	        rows("conv", STORAGE_ACTIVATION, conv ? n : 0, family_conv_width(config));
	specs[SAVED_KEY] = rows("key", STORAGE_ACTIVATION, forget && !m->vector_state ? n : 0, d);
	specs[SAVED_INPUT] = rows("input", STORAGE_ACTIVATION, forget || conv ? n : 0, d);
	specs[SAVED_LOG_DECAY] =
	        rows("log_decay", STORAGE_ACTIVATION, n, family_decay_width(config));
	specs[SAVED_OUT] = rows("out", STORAGE_ACTIVATION, n, d);
	specs[SAVED_OUT_RSTD] = rows("out_rstd", STORAGE_FP32, shape->pass == PASS_TRAIN ? n : 0,
	                             family_norm_groups(config));
	return N_SAVED;
}

int family_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   struct tensor_spec *specs)
{
	const struct family_member *m = family_member(config);
	int64_t d = family_value_width(config), n = shape->batch * shape->seq_len;
	int64_t decay = family_decay_width(config),
	        keys = config->n_heads * family_key_width(config);
	bool forget = m->input == INPUT_FORGET_GATE, conv = m->input == INPUT_CONVOLVED;
	int64_t apart = (forget && !m->vector_state) || conv ? n : 0;

	mixing_scratch(config, shape, family_proj_width(config), specs);
	specs[SCRATCH_DOUT] = rows("dout", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOG_DECAY] = rows("dlog_decay", STORAGE_ACTIVATION, n, decay);
	specs[SCRATCH_DLOGIT] =
	        rows("dlogit", STORAGE_ACTIVATION, m->input == INPUT_DECAY_GATE ? n : 0, decay);
	specs[SCRATCH_DQ] = rows("dq", STORAGE_ACTIVATION, apart, keys);
	specs[SCRATCH_DK] = rows("dk", STORAGE_ACTIVATION, apart, keys);
	specs[SCRATCH_DV] = rows("dv", STORAGE_ACTIVATION, m->vector_state || conv ? n : 0, d);
	specs[SCRATCH_DX] = rows("dx", STORAGE_ACTIVATION, conv ? n : 0, d);
	return N_SCRATCH;
}

/* ---- views ---- */

static int64_t count_tokens(const struct run *r)
{
	return r->shape->batch * r->shape->seq_len;
}

/* A block of columns of InProj's output or of its gradient, as a plain pointer. */
static void *column(const struct run *r, void *proj, enum family_column column)
{
	return mixing_column(r->ctx, proj, family_first_column(r->config, column));
}

/* The same as heads. */
static struct view columns(const struct run *r, void *proj, enum family_column column)
{
	return mixing_columns(r->ctx, proj, r->shape->seq_len, family_proj_width(r->config),
	                      family_first_column(r->config, column),
	                      family_column_width(r->config, column) / r->config->n_heads);
}

/* A whole tensor [N, width] as heads. */
static struct view whole(const struct run *r, void *tensor, int64_t width)
{
	return mixing_columns(r->ctx, tensor, r->shape->seq_len, width, 0,
	                      width / r->config->n_heads);
}

/* The same of a vector state: all channels as one head. */
static struct view as_vector(struct view view)
{
	view.head = view.token;
	return view;
}

/* q or k behind the convolution, which all heads read. */
static struct view shared_keys(const struct run *r, enum family_column column)
{
	return mixing_columns(r->ctx, r->memory->saved[SAVED_CONV], r->shape->seq_len,
	                      family_conv_width(r->config), family_first_column(r->config, column),
	                      0);
}

/* What the recurrence reads. */
static struct view query(const struct run *r)
{
	if (r->member->input == INPUT_CONVOLVED)
		return shared_keys(r, COLUMN_Q);
	if (r->member->input == INPUT_FORGET_GATE)
		return whole(r, r->memory->saved[SAVED_INPUT], family_value_width(r->config));
	return columns(r, r->memory->saved[SAVED_PROJ], COLUMN_Q);
}

static struct view key(const struct run *r)
{
	if (r->member->input == INPUT_CONVOLVED)
		return shared_keys(r, COLUMN_K);
	if (r->member->input == INPUT_FORGET_GATE)
		return whole(r, r->memory->saved[SAVED_KEY], family_value_width(r->config));
	return columns(r, r->memory->saved[SAVED_PROJ], COLUMN_K);
}

static struct view value(const struct run *r)
{
	if (r->member->input == INPUT_CONVOLVED || r->member->vector_state)
		return whole(r, r->memory->saved[SAVED_INPUT], family_value_width(r->config));
	return columns(r, r->memory->saved[SAVED_PROJ], COLUMN_V);
}

/* ---- between InProj and the recurrence ---- */

static struct decay_gate_args decay_args(const struct run *r)
{
	return (struct decay_gate_args){
	        .n_tokens = count_tokens(r),
	        .rank = GATE_RANK,
	        .d_out = family_decay_width(r->config),
	        .x_stride = family_proj_width(r->config),
	        .normalizer = GATE_NORMALIZER,
	        .x = column(r, r->memory->saved[SAVED_PROJ], COLUMN_DECAY),
	        .weight = r->memory->param[PARAM_GK_WEIGHT],
	        .bias = r->memory->param[PARAM_GK_BIAS],
	        .log_decay = r->memory->saved[SAVED_LOG_DECAY],
	};
}

/* The columns that the forget gate takes its x from: HGRN's input, HGRN-2's query. */
static enum family_column forget_input(const struct run *r)
{
	return r->member->vector_state ? COLUMN_V : COLUMN_Q;
}

static struct forget_gate_args forget_args(const struct run *r)
{
	return (struct forget_gate_args){
	        .n_tokens = count_tokens(r),
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

static struct short_conv_args conv_args(const struct run *r)
{
	return (struct short_conv_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .channels = family_conv_width(r->config),
	        .x_stride = family_proj_width(r->config),
	        .x = r->memory->saved[SAVED_PROJ],
	        .weight = r->memory->param[PARAM_CONV_WEIGHT],
	        .bias = r->memory->param[PARAM_CONV_BIAS],
	        .out = r->memory->saved[SAVED_CONV],
	        .history = r->memory->state[STATE_CONV],
	};
}

/* The values behind the convolution. */
static void *convolved_values(const struct run *r)
{
	return column(r, r->memory->saved[SAVED_CONV], COLUMN_V);
}

static struct time_step_args time_step_args(const struct run *r)
{
	return (struct time_step_args){
	        .n_tokens = count_tokens(r),
	        .n_heads = r->config->n_heads,
	        .d_head = family_value_width(r->config) / r->config->n_heads,
	        .logit_stride = family_proj_width(r->config),
	        .x_stride = family_conv_width(r->config),
	        .logit = column(r, r->memory->saved[SAVED_PROJ], COLUMN_DECAY),
	        .bias = r->memory->param[PARAM_DT_BIAS],
	        .log_rate = r->memory->param[PARAM_LOG_RATE],
	        .x = convolved_values(r),
	        .log_decay = r->memory->saved[SAVED_LOG_DECAY],
	        .out = r->memory->saved[SAVED_INPUT],
	};
}

/* q and k in place: nobody needs them unrotated. */
static enum status rotate(const struct run *r)
{
	const struct view q = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_Q);
	const struct view k = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_K);
	const struct rotate_args args = {
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = r->config->n_heads,
	        .d_head = family_key_width(r->config),
	        .rope = true,
	        .kv_slots = r->shape->seq_len,
	        .q = q,
	        .k = k,
	        .q_out = q,
	        .k_out = k,
	};

	return r->config->rope ? kernel_run(r->ctx, OP_ROTATE, &args) : STATUS_OK;
}

/* What is the same for a sequence and for a token. */
static enum status run_gates(const struct run *r)
{
	if (r->member->input == INPUT_DECAY_GATE) {
		const struct decay_gate_args args = decay_args(r);

		return kernel_run(r->ctx, OP_DECAY_GATE, &args);
	}
	if (r->member->input == INPUT_FORGET_GATE) {
		const struct forget_gate_args args = forget_args(r);

		return kernel_run(r->ctx, OP_FORGET_GATE, &args);
	}
	if (r->member->input == INPUT_CONVOLVED) {
		const struct time_step_args args = time_step_args(r);

		return kernel_run(r->ctx, OP_TIME_STEP, &args);
	}
	return STATUS_OK;
}

static enum status prepare(const struct run *r)
{
	enum status status = STATUS_OK;

	if (r->member->input == INPUT_ROTATED)
		status = rotate(r);
	if (r->member->input == INPUT_CONVOLVED) {
		const struct short_conv_args args = conv_args(r);

		status = kernel_run(r->ctx, OP_SHORT_CONV, &args);
	}
	return status == STATUS_OK ? run_gates(r) : status;
}

static enum status prepare_step(const struct run *r, const int32_t *position)
{
	enum status status = STATUS_OK;

	if (r->member->input == INPUT_ROTATED && r->config->rope) {
		const struct rotate_step_args args = {
		        .batch = r->shape->batch,
		        .n_heads = r->config->n_heads,
		        .d_head = family_key_width(r->config),
		        .position = position,
		        .q = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_Q),
		        .k = columns(r, r->memory->saved[SAVED_PROJ], COLUMN_K),
		};

		status = kernel_run(r->ctx, OP_ROTATE_STEP, &args);
	}
	if (r->member->input == INPUT_CONVOLVED) {
		const struct short_conv_args full = conv_args(r);
		const struct short_conv_step_args args = {
		        .batch = full.batch,
		        .channels = full.channels,
		        .x_stride = full.x_stride,
		        .x = full.x,
		        .weight = full.weight,
		        .bias = full.bias,
		        .history = full.history,
		        .out = full.out,
		};

		status = kernel_run(r->ctx, OP_SHORT_CONV_STEP, &args);
	}
	return status == STATUS_OK ? run_gates(r) : status;
}

/* The convolution's backward for one block of columns, whose output's gradient dout is the sum of
 * n_readers. */
static enum status conv_backward(const struct run *r, enum family_column block, int64_t n_readers,
                                 const void *dout)
{
	int64_t first = family_first_column(r->config, block);
	struct short_conv_backward_args args = {
	        .forward = conv_args(r),
	        .n_readers = n_readers,
	        .dout = dout,
	        .dx = column(r, r->memory->scratch[SCRATCH_DPROJ], block),
	        .dweight = r->memory->grad[PARAM_CONV_WEIGHT],
	        .dbias = r->memory->grad[PARAM_CONV_BIAS],
	};

	args.forward.channels = family_column_width(r->config, block);
	args.forward.x = column(r, r->memory->saved[SAVED_PROJ], block);
	args.forward.weight += first * CONV_WIDTH;
	args.forward.bias += first;
	args.dweight += first * CONV_WIDTH;
	args.dbias += first;
	return kernel_run(r->ctx, OP_SHORT_CONV_BACKWARD, &args);
}

static enum status convolved_backward(const struct run *r)
{
	void *const *scratch = r->memory->scratch;
	const struct time_step_backward_args steps = {
	        .forward = time_step_args(r),
	        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
	        .dout = scratch[SCRATCH_DV],
	        .dskip = scratch[SCRATCH_DX],
	        .dlogit = column(r, scratch[SCRATCH_DPROJ], COLUMN_DECAY),
	        .dx = scratch[SCRATCH_DX],
	        .dbias = r->memory->grad[PARAM_DT_BIAS],
	        .dlog_rate = r->memory->grad[PARAM_LOG_RATE],
	};
	enum status status = kernel_run(r->ctx, OP_TIME_STEP_BACKWARD, &steps);

	if (status == STATUS_OK)
		status = conv_backward(r, COLUMN_Q, r->config->n_heads, scratch[SCRATCH_DQ]);
	if (status == STATUS_OK)
		status = conv_backward(r, COLUMN_K, r->config->n_heads, scratch[SCRATCH_DK]);
	if (status == STATUS_OK)
		status = conv_backward(r, COLUMN_V, 1, scratch[SCRATCH_DX]);
	return status;
}

static enum status rotate_backward(const struct run *r)
{
	void *dproj = r->memory->scratch[SCRATCH_DPROJ];
	const struct rotate_backward_args args = {
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = r->config->n_heads,
	        .d_head = family_key_width(r->config),
	        .rope = true,
	        .dq = columns(r, dproj, COLUMN_Q),
	        .dk = columns(r, dproj, COLUMN_K),
	};

	return r->config->rope ? kernel_run(r->ctx, OP_ROTATE_BACKWARD, &args) : STATUS_OK;
}

static enum status prepare_backward(const struct run *r)
{
	void *const *scratch = r->memory->scratch;
	void *ddecay = column(r, scratch[SCRATCH_DPROJ], COLUMN_DECAY);

	if (r->member->input == INPUT_ROTATED)
		return rotate_backward(r);
	if (r->member->input == INPUT_CONVOLVED)
		return convolved_backward(r);
	if (r->member->input == INPUT_DECAY_GATE) {
		const struct decay_gate_backward_args args = {
		        .forward = decay_args(r),
		        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
		        .dx = ddecay,
		        .dlogit = scratch[SCRATCH_DLOGIT],
		        .dweight = r->memory->grad[PARAM_GK_WEIGHT],
		        .dbias = r->memory->grad[PARAM_GK_BIAS],
		};

		return kernel_run(r->ctx, OP_DECAY_GATE_BACKWARD, &args);
	}
	if (r->member->input == INPUT_FORGET_GATE) {
		const struct forget_gate_backward_args args = {
		        .forward = forget_args(r),
		        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
		        .dout = scratch[r->member->vector_state ? SCRATCH_DV : SCRATCH_DQ],
		        .dkey = scratch[SCRATCH_DK],
		        .dlogit = ddecay,
		        .dx = column(r, scratch[SCRATCH_DPROJ], forget_input(r)),
		        .dbound = r->memory->grad[PARAM_BOUND],
		};

		return kernel_run(r->ctx, OP_FORGET_GATE_BACKWARD, &args);
	}
	return STATUS_OK;
}

/* ---- the recurrence ---- */

static struct recurrence_args vector_args(const struct run *r)
{
	int64_t d = family_value_width(r->config);

	return (struct recurrence_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .d_model = d,
	        .form = GATE_LOG_DECAY,
	        .x = as_vector(value(r)),
	        .gate = as_vector(whole(r, r->memory->saved[SAVED_LOG_DECAY], d)),
	        .out = as_vector(whole(r, r->memory->saved[SAVED_OUT], d)),
	        .h_final = r->memory->state[STATE_S],
	};
}

static struct matrix_recurrence_args matrix_args(const struct run *r)
{
	int64_t d_k = family_key_width(r->config);

	return (struct matrix_recurrence_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = r->config->n_heads,
	        .d_k = d_k,
	        .d_v = family_value_width(r->config) / r->config->n_heads,
	        .decay = r->member->decay,
	        .rule = RULE_PLAIN,
	        .chunk = r->config->chunk,
	        .scale = r->member->unscaled ? 1.0f : 1.0f / sqrtf((float)d_k),
	        .q = query(r),
	        .k = key(r),
	        .v = value(r),
	        .log_decay =
	                whole(r, r->memory->saved[SAVED_LOG_DECAY], family_decay_width(r->config)),
	        .out = whole(r, r->memory->saved[SAVED_OUT], family_value_width(r->config)),
	        .final_state = r->memory->state[STATE_S],
	};
}

static enum status recur(const struct run *r)
{
	if (r->member->vector_state) {
		const struct recurrence_args args = vector_args(r);

		return kernel_run(r->ctx, OP_RECURRENCE, &args);
	}
	const struct matrix_recurrence_args args = matrix_args(r);

	return kernel_run(r->ctx, OP_MATRIX_RECURRENCE, &args);
}

static enum status vector_step(const struct run *r)
{
	const struct recurrence_args full = vector_args(r);
	const struct recurrence_step_args args = {
	        .batch = full.batch,
	        .d_model = full.d_model,
	        .form = full.form,
	        .x = full.x,
	        .gate = full.gate,
	        .h = r->memory->state[STATE_S],
	        .out = full.out,
	};

	return kernel_run(r->ctx, OP_RECURRENCE_STEP, &args);
}

static enum status recur_step(const struct run *r)
{
	if (r->member->vector_state)
		return vector_step(r);
	const struct matrix_recurrence_args full = matrix_args(r);
	const struct matrix_recurrence_step_args args = {
	        .batch = full.batch,
	        .n_heads = full.n_heads,
	        .d_k = full.d_k,
	        .d_v = full.d_v,
	        .decay = full.decay,
	        .rule = full.rule,
	        .scale = full.scale,
	        .q = full.q,
	        .k = full.k,
	        .v = full.v,
	        .log_decay = full.log_decay,
	        .state = r->memory->state[STATE_S],
	        .out = full.out,
	};

	return kernel_run(r->ctx, OP_MATRIX_RECURRENCE_STEP, &args);
}

/* The gradient of value(). */
static struct view value_gradient(const struct run *r)
{
	if (r->member->input == INPUT_CONVOLVED || r->member->vector_state)
		return whole(r, r->memory->scratch[SCRATCH_DV], family_value_width(r->config));
	return columns(r, r->memory->scratch[SCRATCH_DPROJ], COLUMN_V);
}

/* The gradient of query() or key(). */
static struct view key_gradient(const struct run *r, int scratch, enum family_column column)
{
	bool apart = r->member->input == INPUT_CONVOLVED || r->member->input == INPUT_FORGET_GATE;

	return apart ? whole(r, r->memory->scratch[scratch],
	                     r->config->n_heads * family_key_width(r->config))
	             : columns(r, r->memory->scratch[SCRATCH_DPROJ], column);
}

static enum status recur_backward(const struct run *r)
{
	const struct view dout =
	        whole(r, r->memory->scratch[SCRATCH_DOUT], family_value_width(r->config));
	const struct view dlog_decay =
	        whole(r, r->memory->scratch[SCRATCH_DLOG_DECAY], family_decay_width(r->config));

	if (r->member->vector_state) {
		const struct recurrence_backward_args args = {
		        .forward = vector_args(r),
		        .dout = as_vector(dout),
		        .dx = as_vector(value_gradient(r)),
		        .dgate = as_vector(dlog_decay),
		};

		return kernel_run(r->ctx, OP_RECURRENCE_BACKWARD, &args);
	}
	const struct matrix_recurrence_backward_args args = {
	        .forward = matrix_args(r),
	        .dout = dout,
	        .dq = key_gradient(r, SCRATCH_DQ, COLUMN_Q),
	        .dk = key_gradient(r, SCRATCH_DK, COLUMN_K),
	        .dv = value_gradient(r),
	        .dlog_decay = dlog_decay,
	};

	return kernel_run(r->ctx, OP_MATRIX_RECURRENCE_BACKWARD, &args);
}

/* ---- between the recurrence and OutProj ---- */

static struct norm_gate_args norm_gate_args(const struct run *r)
{
	int64_t groups = family_norm_groups(r->config);

	return (struct norm_gate_args){
	        .n_tokens = count_tokens(r),
	        .n_heads = groups,
	        .d_head = family_value_width(r->config) / groups,
	        .gate_stride = family_proj_width(r->config),
	        .eps = family_norm_eps,
	        .x = r->memory->saved[SAVED_OUT],
	        .weight = r->memory->param[PARAM_OUT_NORM],
	        .gate = column(r, r->memory->saved[SAVED_PROJ], COLUMN_GATE),
	        .rstd = r->memory->saved[SAVED_OUT_RSTD],
	        .out = r->memory->saved[SAVED_MIX],
	};
}

/* With a skip connection from the values before their time steps, or the norm alone. */
static struct gate_norm_args gate_norm_args(const struct run *r)
{
	bool gated = r->member->output == OUTPUT_GATE_NORM;

	return (struct gate_norm_args){
	        .n_tokens = count_tokens(r),
	        .n_heads = r->config->n_heads,
	        .d_head = family_value_width(r->config) / r->config->n_heads,
	        .groups = family_norm_groups(r->config),
	        .skip_stride = gated ? family_conv_width(r->config) : 0,
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

static enum status finish(const struct run *r)
{
	if (r->member->output == OUTPUT_NORM_GATE) {
		const struct norm_gate_args args = norm_gate_args(r);

		return kernel_run(r->ctx, OP_NORM_GATE, &args);
	}
	const struct gate_norm_args args = gate_norm_args(r);

	return kernel_run(r->ctx, OP_GATE_NORM, &args);
}

static enum status finish_backward(const struct run *r)
{
	void *const *scratch = r->memory->scratch;
	void *dgate = column(r, scratch[SCRATCH_DPROJ], COLUMN_GATE);

	if (r->member->output == OUTPUT_NORM_GATE) {
		const struct norm_gate_backward_args args = {
		        .forward = norm_gate_args(r),
		        .dout = scratch[SCRATCH_DMIX],
		        .dx = scratch[SCRATCH_DOUT],
		        .dgate = dgate,
		        .dweight = r->memory->grad[PARAM_OUT_NORM],
		};

		return kernel_run(r->ctx, OP_NORM_GATE_BACKWARD, &args);
	}
	const struct gate_norm_backward_args args = {
	        .forward = gate_norm_args(r),
	        .dout = scratch[SCRATCH_DMIX],
	        .dx = scratch[SCRATCH_DOUT],
	        .dskip = scratch[SCRATCH_DX],
	        .dgate = dgate,
	        .dskip_weight = r->memory->grad[PARAM_SKIP],
	        .dweight = r->memory->grad[PARAM_OUT_NORM],
	};

	return kernel_run(r->ctx, OP_GATE_NORM_BACKWARD, &args);
}

/* ---- the passes ---- */

enum status family_forward(struct context *ctx, const struct layer_config *config,
                           const struct layer_shape *shape, struct layer_memory *memory,
                           const void *x, void *y)
{
	const struct run r = {ctx, config, shape, memory, family_member(config)};
	enum status status =
	        mixing_in_proj(ctx, config, shape, memory, family_proj_width(config), x);

	if (status == STATUS_OK)
		status = prepare(&r);
	if (status == STATUS_OK)
		status = recur(&r);
	if (status == STATUS_OK)
		status = finish(&r);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

enum status family_backward(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const void *x, const void *dy, void *dx)
{
	const struct run r = {ctx, config, shape, memory, family_member(config)};
	enum status status = mixing_out_proj_backward(ctx, config, shape, memory, dy);

	if (status == STATUS_OK)
		status = finish_backward(&r);
	if (status == STATUS_OK)
		status = recur_backward(&r);
	if (status == STATUS_OK)
		status = prepare_backward(&r);
	if (status == STATUS_OK)
		status = mixing_in_proj_backward(ctx, config, shape, memory,
		                                 family_proj_width(config), x, dy, dx);
	return status;
}

enum status family_step(struct context *ctx, const struct layer_config *config,
                        const struct layer_shape *shape, struct layer_memory *memory,
                        const int32_t *position, int64_t position_hint, const void *x, void *y)
{
	const struct run r = {ctx, config, shape, memory, family_member(config)};
	enum status status =
	        mixing_in_proj(ctx, config, shape, memory, family_proj_width(config), x);

	(void)position_hint;
	if (status == STATUS_OK)
		status = prepare_step(&r, position);
	if (status == STATUS_OK)
		status = recur_step(&r);
	if (status == STATUS_OK)
		status = finish(&r);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

int family_golden_names(const struct layer_config *config, struct golden_name *names)
{
	const char *const columns[N_FAMILY_COLUMNS] = {
	        [COLUMN_Q] = "q_proj.weight",    [COLUMN_K] = "k_proj.weight",
	        [COLUMN_V] = "v_proj.weight",    [COLUMN_DECAY] = family_member(config)->decay_name,
	        [COLUMN_GATE] = "g_proj.weight",
	};
	int64_t d = config->d_model, d_v = family_value_width(config),
	        low_rank = family_decay_width(config);
	int n = 0;

	names[n++] = (struct golden_name){"input_norm.weight", PARAM_NORM, 0, d};
	for (enum family_column i = 0; i < N_FAMILY_COLUMNS; i++)
		if (family_column_width(config, i) > 0)
			names[n++] = (struct golden_name){columns[i], PARAM_IN_PROJ,
			                                  family_first_column(config, i),
			                                  family_column_width(config, i)};
	if (family_member(config)->input == INPUT_DECAY_GATE) {
		names[n++] = (struct golden_name){"gk_proj.1.weight", PARAM_GK_WEIGHT, 0, low_rank};
		names[n++] = (struct golden_name){"gk_proj.1.bias", PARAM_GK_BIAS, 0, low_rank};
	}
	names[n++] = (struct golden_name){"g_norm.weight", PARAM_OUT_NORM, 0,
	                                  d_v / family_norm_groups(config)};
	names[n++] = (struct golden_name){"o_proj.weight", PARAM_OUT_PROJ, 0, d};
	return n;
}
