/*
 * RWKV-6 (arXiv 2404.05892), its time mixing. Each token is mixed with the one before it, channel
 * by channel, x_n = x + (x_{t-1} - x) m_n, in five ways, whose m_n is a low-rank function of the
 * token, m_n = W2_n tanh(W1_n (x + (x_{t-1} - x) mix)) + bias_n,   n = r, w, k, v, g; then r, k, v,
 * g = W_n x_n and, of low rank, log decays w = -exp(W'' tanh(W' x_w) + bias), and o_t = r_t
 * (S_{t-1} + bonus * k_t^T v_t),   S_t = Diag(exp(w_t)) S_{t-1} + k_t^T v_t. The output is a group
 * norm of each head, times silu(g). Keys are D/2 wide, values D.
 *
 * InProj is five products of five inputs: the rows of in_proj, and the blocks of its output, which
 * lie one after another ([N, width] each), are r, W' x_w, k, v, g.
 */
#include "layers/linear_family.h"
#include "layers/mixing.h"

enum {
	PARAM_MIX = PARAM_OTHER, /* of the input of the low-rank functions */
	PARAM_X_DOWN,            /* W1, of all five */
	PARAM_X_UP,              /* W2, one after another */
	PARAM_X_BIAS,
	PARAM_DECAY_UP,
	PARAM_DECAY_BIAS,
	PARAM_BONUS,
	PARAM_OUT_NORM,
	PARAM_OUT_NORM_BIAS,
	N_RWKV6_PARAMS
};

enum { STATE_S, STATE_SHIFT, N_RWKV6_STATES };

enum {
	SAVED_MIXED = SAVED_OTHER, /* x + (x_{t-1} - x) mix */
	SAVED_LOW,                 /* W1 of that, five times the rank */
	SAVED_MIXES,               /* m_n, one after another */
	SAVED_SHIFTED,             /* x_n likewise */
	SAVED_BEFORE,              /* of a step: the token before */
	SAVED_LOG_DECAY,
	SAVED_OUT,
	SAVED_OUT_RSTD,
	N_SAVED
};

/* Gradients of those. */
enum {
	SCRATCH_DMIXED = SCRATCH_OTHER,
	SCRATCH_DLOW,
	SCRATCH_DMIXES,
	SCRATCH_DSHIFTED,
	SCRATCH_DFIRST, /* of the normalized x, through the five shifts alone */
	SCRATCH_DLOG_DECAY,
	SCRATCH_DLOGIT,
	SCRATCH_DOUT,
	N_SCRATCH
};

/* What is made of the five inputs, in the reference's order. */
enum part { PART_R, PART_W, PART_K, PART_V, PART_G, N_PARTS };

static const float out_norm_eps = 1e-5f;

/* ---- widths ---- */

static int64_t key_columns(const struct layer_config *config)
{
	return config->d_model / 2;
}

/* Of the low-rank functions; half of the decay's. Models narrower than 256 have less than the
 * paper's 32. */
static int64_t mix_rank(const struct layer_config *config)
{
	const int64_t d = config->d_model;

	return d < 8 ? 1 : d < 256 ? d / 8 : d < 4096 ? 32 : 64;
}

static int64_t decay_rank(const struct layer_config *config)
{
	return 2 * mix_rank(config);
}

static int64_t part_width(const struct layer_config *config, enum part part)
{
	if (part == PART_W)
		return decay_rank(config);
	return part == PART_R || part == PART_K ? key_columns(config) : config->d_model;
}

/* Columns of the parts before one. */
static int64_t first_column(const struct layer_config *config, enum part part)
{
	int64_t first = 0;

	for (enum part i = 0; i < part; i++)
		first += part_width(config, i);
	return first;
}

static int64_t rwkv6_width(const struct layer_config *config)
{
	return first_column(config, N_PARTS);
}

static struct layer_widths rwkv6_widths(const struct layer_config *config)
{
	const int64_t h = config->n_heads;

	return (struct layer_widths){h, h, key_columns(config) / h, config->d_model / h};
}

static enum status rwkv6_check(const struct layer_config *config)
{
	if (config->d_model % 2 != 0 || key_columns(config) % config->n_heads != 0)
		return status_set(STATUS_INVALID,
		                  "%s: heads=%lld (allowed: a divisor of its keys' width, %lld / "
		                  "2)",
		                  config->class->name, (long long)config->n_heads,
		                  (long long)config->d_model);
	return mixing_check(config);
}

/* ---- tensors ---- */

static int rwkv6_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	const int64_t d = config->d_model, k = key_columns(config), h = config->n_heads;
	const int64_t rank = mix_rank(config);
	const struct tensor_spec own[] = {
	        {"mix", STORAGE_FP32, 1, {d}, INIT_MIX},
	        {"x_down", STORAGE_ACTIVATION, 2, {N_PARTS * rank, d}, INIT_NORMAL},
	        {"x_up", STORAGE_ACTIVATION, 2, {N_PARTS * d, rank}, INIT_NORMAL},
	        {"x_bias", STORAGE_FP32, 2, {N_PARTS, d}, INIT_MIX},
	        {"decay_up", STORAGE_ACTIVATION, 2, {k, decay_rank(config)}, INIT_NORMAL},
	        /* Decays of exp(-0.1) to exp(-0.001). */
	        {"decay_bias", STORAGE_FP32, 1, {k}, INIT_TIME_STEP},
	        {"bonus", STORAGE_FP32, 2, {h, k / h}, INIT_ONES},
	        {"out_norm", STORAGE_FP32, 1, {d}, INIT_ONES},
	        {"out_norm_bias", STORAGE_FP32, 1, {d}, INIT_ZEROS},
	};

	mixing_parameters(config, specs);
	for (int i = PARAM_OTHER; i < N_RWKV6_PARAMS; i++)
		specs[i] = own[i - PARAM_OTHER];
	return N_RWKV6_PARAMS;
}

static int rwkv6_state(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	const int64_t d = shape->capacity > 0 ? config->d_model : 0, h = config->n_heads;

	specs[STATE_S] = (struct tensor_spec){"s",
	                                      STORAGE_FP32,
	                                      4,
	                                      {shape->batch, h, key_columns(config) / h, d / h},
	                                      INIT_ZEROS};
	specs[STATE_SHIFT] = tensor_rows("shift", STORAGE_ACTIVATION, shape->batch, d);
	return N_RWKV6_STATES;
}

static int rwkv6_saved(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	const int64_t d = config->d_model, n = shape->batch * shape->seq_len;
	const int64_t kept = shape->pass == PASS_TRAIN ? n : 0;
	const bool steps = shape->pass == PASS_GENERATION || shape->pass == PASS_THROUGHPUT;

	mixing_saved(config, shape, specs);
	specs[SAVED_X_NORM].dims[0] = config->prenorm ? n : 0;
	specs[SAVED_MIXED] = tensor_rows("mixed", STORAGE_ACTIVATION, n, d);
	specs[SAVED_LOW] = tensor_rows("low", STORAGE_ACTIVATION, n, N_PARTS * mix_rank(config));
	specs[SAVED_MIXES] = tensor_rows("mixes", STORAGE_ACTIVATION, N_PARTS * n, d);
	specs[SAVED_SHIFTED] = tensor_rows("shifted", STORAGE_ACTIVATION, N_PARTS * n, d);
	specs[SAVED_BEFORE] = tensor_rows("before", STORAGE_ACTIVATION, steps ? n : 0, d);
	specs[SAVED_LOG_DECAY] =
	        tensor_rows("log_decay", STORAGE_ACTIVATION, n, key_columns(config));
	specs[SAVED_OUT] = tensor_rows("out", STORAGE_ACTIVATION, n, d);
	specs[SAVED_OUT_RSTD] = tensor_rows("out_rstd", STORAGE_FP32, kept, config->n_heads);
	return N_SAVED;
}

static int rwkv6_scratch(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs)
{
	const int64_t d = config->d_model, k = key_columns(config);
	const int64_t n = shape->batch * shape->seq_len;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DMIXED] = tensor_rows("dmixed", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOW] =
	        tensor_rows("dlow", STORAGE_ACTIVATION, n, N_PARTS * mix_rank(config));
	specs[SCRATCH_DMIXES] = tensor_rows("dmixes", STORAGE_ACTIVATION, N_PARTS * n, d);
	specs[SCRATCH_DSHIFTED] = tensor_rows("dshifted", STORAGE_ACTIVATION, N_PARTS * n, d);
	specs[SCRATCH_DFIRST] = tensor_rows("dfirst", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOG_DECAY] = tensor_rows("dlog_decay", STORAGE_ACTIVATION, n, k);
	specs[SCRATCH_DLOGIT] = tensor_rows("dlogit", STORAGE_ACTIVATION, n, k);
	specs[SCRATCH_DOUT] = tensor_rows("dout", STORAGE_ACTIVATION, n, d);
	return N_SCRATCH;
}

/* ---- views ---- */

/* A part of InProj's output or of its gradient. */
static void *part_of(const struct layer_run *r, void *proj, enum part part)
{
	return mixing_column(r->ctx, proj, layer_tokens(r) * first_column(r->config, part));
}

/* The same as heads. */
static struct view part_heads(const struct layer_run *r, void *proj, enum part part)
{
	return mixing_heads(r, part_of(r, proj, part), part_width(r->config, part));
}

/* One of five tensors [N, D] that lie one after another. */
static void *one_of_five(const struct layer_run *r, void *tensors, enum part part)
{
	return mixing_column(r->ctx, tensors, part * layer_tokens(r) * r->config->d_model);
}

/* Rows of a matrix of `width` columns from `first` on: of parameters, and of their gradients. */
static const void *rows_of(const struct layer_run *r, int parameter, int64_t first, int64_t width)
{
	return mixing_column(r->ctx, r->memory->param[parameter], first * width);
}

static float *elements_from(const struct layer_run *r, float *tensor, int64_t first)
{
	return (float *)((char *)tensor + (size_t)first * dtype_size(r->ctx->device->wide));
}

/* ---- before InProj ---- */

static const void *normalized(const struct layer_run *r, const void *x)
{
	return r->config->prenorm ? r->memory->saved[SAVED_X_NORM] : x;
}

/* RMSNorm alone. */
static struct gate_norm_args prenorm_args(const struct layer_run *r, const void *x)
{
	return (struct gate_norm_args){
	        .n_tokens = layer_tokens(r),
	        .n_heads = 1,
	        .d_head = r->config->d_model,
	        .groups = 1,
	        .eps = r->config->norm_eps,
	        .x = x,
	        .weight = r->memory->param[PARAM_NORM],
	        .rstd = r->memory->saved[SAVED_RSTD],
	        .out = r->memory->saved[SAVED_X_NORM],
	};
}

/* The shift that the mixes are made of, which leaves the state behind. */
static struct token_shift_args first_shift_args(const struct layer_run *r, const void *x)
{
	return (struct token_shift_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .width = r->config->d_model,
	        .n_out = 1,
	        .form = SHIFT_CONSTANT,
	        .x = normalized(r, x),
	        .weight = r->memory->param[PARAM_MIX],
	        .out = r->memory->saved[SAVED_MIXED],
	        .last = r->memory->state[STATE_SHIFT],
	};
}

/* The five shifts. */
static struct token_shift_args shift_args(const struct layer_run *r, const void *x)
{
	return (struct token_shift_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .width = r->config->d_model,
	        .n_out = N_PARTS,
	        .form = SHIFT_VARIABLE,
	        .x = normalized(r, x),
	        .mix = r->memory->saved[SAVED_MIXES],
	        .out = r->memory->saved[SAVED_SHIFTED],
	};
}

/* Of a sequence, or of a step. */
static enum status run_shift(const struct layer_run *r, const struct token_shift_args *full)
{
	const struct token_shift_step_args step = {
	        .batch = full->batch,
	        .width = full->width,
	        .n_out = full->n_out,
	        .form = full->form,
	        .x = full->x,
	        .weight = full->weight,
	        .mix = full->mix,
	        .state = full->last,
	        .before = r->memory->saved[SAVED_BEFORE],
	        .out = full->out,
	};

	return r->position ? run_token_shift_step(r->ctx, &step) : run_token_shift(r->ctx, full);
}

static struct linear_residual_args down_args(const struct layer_run *r)
{
	return (struct linear_residual_args){
	        .n_tokens = layer_tokens(r),
	        .d_in = r->config->d_model,
	        .d_out = N_PARTS * mix_rank(r->config),
	        .x = r->memory->saved[SAVED_MIXED],
	        .weight = r->memory->param[PARAM_X_DOWN],
	        .y = r->memory->saved[SAVED_LOW],
	};
}

/* One of the mixes. */
static struct decay_gate_args mix_args(const struct layer_run *r, enum part part)
{
	const int64_t d = r->config->d_model, rank = mix_rank(r->config);

	return (struct decay_gate_args){
	        .n_tokens = layer_tokens(r),
	        .rank = rank,
	        .d_out = d,
	        .x_stride = N_PARTS * rank,
	        .form = LOW_RANK_TANH,
	        .x = mixing_column(r->ctx, r->memory->saved[SAVED_LOW], part * rank),
	        .weight = rows_of(r, PARAM_X_UP, part * d, rank),
	        .bias = elements_from(r, r->memory->param[PARAM_X_BIAS], part * d),
	        .out = one_of_five(r, r->memory->saved[SAVED_MIXES], part),
	};
}

static struct linear_residual_args part_args(const struct layer_run *r, enum part part)
{
	const int64_t d = r->config->d_model;

	return (struct linear_residual_args){
	        .n_tokens = layer_tokens(r),
	        .d_in = d,
	        .d_out = part_width(r->config, part),
	        .x = one_of_five(r, r->memory->saved[SAVED_SHIFTED], part),
	        .weight = rows_of(r, PARAM_IN_PROJ, first_column(r->config, part), d),
	        .y = part_of(r, r->memory->saved[SAVED_PROJ], part),
	};
}

static enum status rwkv6_in_proj(const struct layer_run *r, const void *x)
{
	const struct token_shift_args first = first_shift_args(r, x), shifts = shift_args(r, x);
	const struct linear_residual_args down = down_args(r);

	if (r->config->prenorm) {
		const struct gate_norm_args norm = prenorm_args(r, x);

		TRY(run_gate_norm(r->ctx, &norm));
	}
	TRY(run_shift(r, &first));
	TRY(run_linear_residual(r->ctx, &down));
	for (enum part i = 0; i < N_PARTS; i++) {
		const struct decay_gate_args mix = mix_args(r, i);

		TRY(run_decay_gate(r->ctx, &mix));
	}
	TRY(run_shift(r, &shifts));
	for (enum part i = 0; i < N_PARTS; i++) {
		const struct linear_residual_args part = part_args(r, i);

		TRY(run_linear_residual(r->ctx, &part));
	}
	return STATUS_OK;
}

/* dx and dweight of y = x W^T, from dy. */
static enum status linear_backward(const struct layer_run *r,
                                   const struct linear_residual_args *forward, const void *dy,
                                   void *dx, float *dweight)
{
	const struct linear_residual_backward_args args = {
	        .n_tokens = forward->n_tokens,
	        .d_in = forward->d_in,
	        .d_out = forward->d_out,
	        .x = forward->x,
	        .weight = forward->weight,
	        .dy = dy,
	        .dx = dx,
	        .dweight = dweight,
	};

	return run_linear_residual_backward(r->ctx, &args);
}

static enum status parts_backward(const struct layer_run *r)
{
	const int64_t d = r->config->d_model;
	void *const *scratch = r->memory->scratch;

	for (enum part i = 0; i < N_PARTS; i++) {
		const struct linear_residual_args part = part_args(r, i);

		TRY(linear_backward(r, &part, part_of(r, scratch[SCRATCH_DPROJ], i),
		                    one_of_five(r, scratch[SCRATCH_DSHIFTED], i),
		                    elements_from(r, r->memory->grad[PARAM_IN_PROJ],
		                                  first_column(r->config, i) * d)));
	}
	return STATUS_OK;
}

static enum status mixes_backward(const struct layer_run *r)
{
	const int64_t d = r->config->d_model, rank = mix_rank(r->config);
	void *const *scratch = r->memory->scratch;

	for (enum part i = 0; i < N_PARTS; i++) {
		const struct decay_gate_backward_args mix = {
		        .forward = mix_args(r, i),
		        .dout = one_of_five(r, scratch[SCRATCH_DMIXES], i),
		        .dx = mixing_column(r->ctx, scratch[SCRATCH_DLOW], i * rank),
		        .dweight = elements_from(r, r->memory->grad[PARAM_X_UP], i * d * rank),
		        .dbias = elements_from(r, r->memory->grad[PARAM_X_BIAS], i * d),
		};

		TRY(run_decay_gate_backward(r->ctx, &mix));
	}
	return STATUS_OK;
}

static enum status rwkv6_in_proj_backward(const struct layer_run *r, const void *x, const void *dy,
                                          void *dx)
{
	void *const *scratch = r->memory->scratch;
	const bool prenorm = r->config->prenorm;
	const void *residual = r->config->residual ? dy : NULL;
	const struct linear_residual_args down = down_args(r);
	const struct token_shift_backward_args shifts = {
	        .forward = shift_args(r, x),
	        .dout = scratch[SCRATCH_DSHIFTED],
	        .dresidual = prenorm ? NULL : residual,
	        .dx = scratch[SCRATCH_DFIRST],
	        .dmix = scratch[SCRATCH_DMIXES],
	};
	const struct token_shift_backward_args first = {
	        .forward = first_shift_args(r, x),
	        .dout = scratch[SCRATCH_DMIXED],
	        .dresidual = scratch[SCRATCH_DFIRST],
	        .dx = prenorm ? scratch[SCRATCH_DX_NORM] : dx,
	        .dweight = r->memory->grad[PARAM_MIX],
	};
	const struct gate_norm_backward_args norm = {
	        .forward = prenorm_args(r, x),
	        .dout = scratch[SCRATCH_DX_NORM],
	        .dresidual = residual,
	        .dx = dx,
	        .dweight = r->memory->grad[PARAM_NORM],
	};

	TRY(parts_backward(r));
	TRY(run_token_shift_backward(r->ctx, &shifts));
	TRY(mixes_backward(r));
	TRY(linear_backward(r, &down, scratch[SCRATCH_DLOW], scratch[SCRATCH_DMIXED],
	                    r->memory->grad[PARAM_X_DOWN]));
	TRY(run_token_shift_backward(r->ctx, &first));
	return prenorm ? run_gate_norm_backward(r->ctx, &norm) : STATUS_OK;
}

/* ---- the recurrence, its decays and its output ---- */

static struct decay_gate_args decay_args(const struct layer_run *r)
{
	return (struct decay_gate_args){
	        .n_tokens = layer_tokens(r),
	        .rank = decay_rank(r->config),
	        .d_out = key_columns(r->config),
	        .x_stride = decay_rank(r->config),
	        .form = LOW_RANK_EXP,
	        .x = part_of(r, r->memory->saved[SAVED_PROJ], PART_W),
	        .weight = r->memory->param[PARAM_DECAY_UP],
	        .bias = r->memory->param[PARAM_DECAY_BIAS],
	        .out = r->memory->saved[SAVED_LOG_DECAY],
	};
}

static struct matrix_recurrence_args recurrence_args(const struct layer_run *r)
{
	const struct layer_widths w = rwkv6_widths(r->config);
	void *proj = r->memory->saved[SAVED_PROJ];

	return (struct matrix_recurrence_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .n_heads = w.heads,
	        .d_k = w.d_k,
	        .d_v = w.d_v,
	        .decay = DECAY_DIAGONAL,
	        .rule = RULE_BONUS,
	        .chunk = r->config->chunk,
	        .scale = 1,
	        .q = part_heads(r, proj, PART_R),
	        .k = part_heads(r, proj, PART_K),
	        .v = part_heads(r, proj, PART_V),
	        .log_decay =
	                mixing_heads(r, r->memory->saved[SAVED_LOG_DECAY], key_columns(r->config)),
	        .bonus = r->memory->param[PARAM_BONUS],
	        .out = mixing_heads(r, r->memory->saved[SAVED_OUT], r->config->d_model),
	        .final_state = r->memory->state[STATE_S],
	};
}

static struct norm_gate_args out_norm_args(const struct layer_run *r)
{
	const int64_t d = r->config->d_model;

	return (struct norm_gate_args){
	        .n_tokens = layer_tokens(r),
	        .n_heads = r->config->n_heads,
	        .d_head = d / r->config->n_heads,
	        .gate_stride = d,
	        .curve = CURVE_SILU,
	        .norm = NORM_GROUP,
	        .eps = out_norm_eps,
	        .x = r->memory->saved[SAVED_OUT],
	        .weight = r->memory->param[PARAM_OUT_NORM],
	        .bias = r->memory->param[PARAM_OUT_NORM_BIAS],
	        .gate = part_of(r, r->memory->saved[SAVED_PROJ], PART_G),
	        .rstd = r->memory->saved[SAVED_OUT_RSTD],
	        .out = r->memory->saved[SAVED_MIX],
	};
}

static enum status recur(const struct layer_run *r)
{
	const struct matrix_recurrence_args args = recurrence_args(r);

	return mixing_recur_matrix(r, &args);
}

static enum status rwkv6_forward(const struct layer_run *r)
{
	const struct decay_gate_args decay = decay_args(r);
	const struct norm_gate_args norm = out_norm_args(r);

	TRY(run_decay_gate(r->ctx, &decay));
	TRY(recur(r));
	return run_norm_gate(r->ctx, &norm);
}

static enum status rwkv6_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	void *dproj = scratch[SCRATCH_DPROJ];
	const struct norm_gate_backward_args norm = {
	        .forward = out_norm_args(r),
	        .dout = scratch[SCRATCH_DMIX],
	        .dx = scratch[SCRATCH_DOUT],
	        .dgate = part_of(r, dproj, PART_G),
	        .dweight = r->memory->grad[PARAM_OUT_NORM],
	        .dbias = r->memory->grad[PARAM_OUT_NORM_BIAS],
	};
	const struct matrix_recurrence_backward_args recurrence = {
	        .forward = recurrence_args(r),
	        .dout = mixing_heads(r, scratch[SCRATCH_DOUT], r->config->d_model),
	        .dq = part_heads(r, dproj, PART_R),
	        .dk = part_heads(r, dproj, PART_K),
	        .dv = part_heads(r, dproj, PART_V),
	        .dlog_decay = mixing_heads(r, scratch[SCRATCH_DLOG_DECAY], key_columns(r->config)),
	        .dbonus = r->memory->grad[PARAM_BONUS],
	};
	const struct decay_gate_backward_args decay = {
	        .forward = decay_args(r),
	        .dout = scratch[SCRATCH_DLOG_DECAY],
	        .dx = part_of(r, dproj, PART_W),
	        .dlogit = scratch[SCRATCH_DLOGIT],
	        .dweight = r->memory->grad[PARAM_DECAY_UP],
	        .dbias = r->memory->grad[PARAM_DECAY_BIAS],
	};

	TRY(run_norm_gate_backward(r->ctx, &norm));
	TRY(run_matrix_recurrence_backward(r->ctx, &recurrence));
	return run_decay_gate_backward(r->ctx, &decay);
}

/* ---- names ---- */

static int rwkv6_golden_names(const struct layer_config *config, struct golden_name *names)
{
	static const char *const parts[N_PARTS] = {
	        [PART_R] = "r_proj.linear.weight", [PART_W] = "w_proj.linear.lora.0.weight",
	        [PART_K] = "k_proj.linear.weight", [PART_V] = "v_proj.linear.weight",
	        [PART_G] = "g_proj.linear.weight",
	};
	static const struct {
		const char *name;
		int parameter;
	} own[] = {
	        {"input_norm.weight", PARAM_NORM},
	        {"o_proj.weight", PARAM_OUT_PROJ},
	        {"x_proj.0.mu", PARAM_MIX},
	        {"x_proj.0.linear.weight", PARAM_X_DOWN},
	        {"x_bias", PARAM_X_BIAS},
	        {"w_proj.linear.lora.2.weight", PARAM_DECAY_UP},
	        {"w_proj.linear.lora.2.bias", PARAM_DECAY_BIAS},
	        {"bonus", PARAM_BONUS},
	        {"g_norm.weight", PARAM_OUT_NORM},
	        {"g_norm.bias", PARAM_OUT_NORM_BIAS},
	};
	struct tensor_spec specs[MAX_TENSORS];
	const int64_t d = config->d_model;
	int n = 0;

	rwkv6_parameters(config, specs);
	for (size_t i = 0; i < sizeof own / sizeof *own; i++)
		names[n++] = golden_rows(own[i].name, own[i].parameter, 0,
		                         specs[own[i].parameter].dims[0]);
	for (enum part i = 0; i < N_PARTS; i++) {
		names[n++] = golden_rows(parts[i], PARAM_IN_PROJ, first_column(config, i),
		                         part_width(config, i));
		names[n] = golden_rows("x_proj.2.weight", PARAM_X_UP, i * d, d);
		names[n++].beside = true;
	}
	names[n++] = golden_columns("state.s", STATE_S, 0, d / config->n_heads, false);
	names[n++] = golden_columns("state.shift", STATE_SHIFT, 0, d, false);
	return n;
}

const struct layer_class rwkv6_layer = {
        .name = "rwkv6",
        .summary = "RWKV-6, whose tokens are mixed with the one before",
        .arguments = FAMILY_ARGUMENTS,
        .chunk_is_form = true,
        .mixes = true,
        .widths = rwkv6_widths,
        .proj_width = rwkv6_width,
        .check = rwkv6_check,
        .parameters = rwkv6_parameters,
        .state = rwkv6_state,
        .saved = rwkv6_saved,
        .scratch = rwkv6_scratch,
        .in_proj = rwkv6_in_proj,
        .in_proj_backward = rwkv6_in_proj_backward,
        .forward = rwkv6_forward,
        .backward = rwkv6_backward,
        .step = rwkv6_forward,
        .golden_names = rwkv6_golden_names,
};
