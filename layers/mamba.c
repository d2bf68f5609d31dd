/*
 * Mamba (arXiv 2312.00752). InProj's columns are x and z, both 2D wide. A short convolution with
 * silu runs over x; the result u makes B and C, 16 wide, and a time step per channel, of rank D/16:
 *   B, C, delta = W u,  dt = softplus(W_dt delta + bias),
 *   h_t = exp(-exp(log_rate) dt_t) h_{t-1} + dt_t u_t B_t,
 * and the mix is (h C + skip u) silu(z).
 */
#include "layers/mixing.h"

enum { STATE = 16, MODEL_PER_RANK = 16 };

enum {
	PARAM_CONV_WEIGHT = PARAM_OTHER,
	PARAM_CONV_BIAS,
	PARAM_X_PROJ, /* rows of B, C, delta */
	PARAM_DT_WEIGHT,
	PARAM_DT_BIAS,
	PARAM_LOG_RATE,
	PARAM_SKIP,
	N_PARAMS
};
enum { STATE_S, STATE_CONV, N_STATES };
enum {
	SAVED_U = SAVED_OTHER,
	SAVED_CHOICE, /* B, C, delta */
	SAVED_DT,
	SAVED_BORDERS,
	N_SAVED
};
enum {
	SCRATCH_DU = SCRATCH_OTHER, /* of the scan alone, and with what B, C and delta add */
	SCRATCH_DU_ALL,
	SCRATCH_DU_NORM, /* of a product without a norm */
	SCRATCH_DDT,
	SCRATCH_DLOGIT,
	SCRATCH_DCHOICE,
	N_SCRATCH
};

/* ---- tensors ---- */

static int64_t inner_width(const struct layer_config *config)
{
	return 2 * config->d_model;
}

static int64_t mamba_proj_width(const struct layer_config *config)
{
	return 2 * inner_width(config);
}

static int64_t rank_of(const struct layer_config *config)
{
	return (config->d_model + MODEL_PER_RANK - 1) / MODEL_PER_RANK;
}

/* What a token chooses. */
static int64_t choice_width(const struct layer_config *config)
{
	return 2 * STATE + rank_of(config);
}

static int mamba_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int64_t d = inner_width(config), rank = rank_of(config);
	const struct tensor_spec own[] = {
	        {"conv_weight", STORAGE_FP32, 2, {d, CONV_WIDTH}, INIT_CONV},
	        {"conv_bias", STORAGE_FP32, 1, {d}, INIT_ZEROS},
	        {"x_proj", STORAGE_ACTIVATION, 2, {choice_width(config), d}, INIT_NORMAL},
	        {"dt_weight", STORAGE_ACTIVATION, 2, {d, rank}, INIT_NORMAL},
	        {"dt_bias", STORAGE_FP32, 1, {d}, INIT_TIME_STEP},
	        {"log_rate", STORAGE_FP32, 2, {d, STATE}, INIT_LOG_COUNT},
	        {"skip", STORAGE_FP32, 1, {d}, INIT_ONES},
	};

	mixing_parameters(config, specs);
	for (int i = PARAM_OTHER; i < N_PARAMS; i++)
		specs[i] = own[i - PARAM_OTHER];
	return N_PARAMS;
}

static int mamba_state(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int64_t d = shape->capacity > 0 ? inner_width(config) : 0;

	specs[STATE_S] =
	        (struct tensor_spec){"s", STORAGE_FP32, 3, {shape->batch, STATE, d}, INIT_ZEROS};
	specs[STATE_CONV] = (struct tensor_spec){
	        "conv", STORAGE_ACTIVATION, 3, {shape->batch, CONV_HISTORY, d}, INIT_ZEROS};
	return N_STATES;
}

static int mamba_saved(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int64_t d = inner_width(config), n = shape->batch * shape->seq_len;
	int64_t chunks = (shape->seq_len + SCAN_CHUNK - 1) / SCAN_CHUNK;
	int64_t borders = shape->pass == PASS_TRAIN ? shape->batch * chunks : 0;

	mixing_saved(config, shape, specs);
	specs[SAVED_U] = tensor_rows("u", STORAGE_ACTIVATION, n, d);
	specs[SAVED_CHOICE] = tensor_rows("choice", STORAGE_ACTIVATION, n, choice_width(config));
	specs[SAVED_DT] = tensor_rows("dt", STORAGE_ACTIVATION, n, d);
	specs[SAVED_BORDERS] = tensor_rows("borders", STORAGE_FP32, borders, STATE * d);
	return N_SAVED;
}

static int mamba_scratch(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs)
{
	int64_t d = inner_width(config), n = shape->batch * shape->seq_len;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DU] = tensor_rows("du", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DU_ALL] = tensor_rows("du_all", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DU_NORM] = tensor_rows("du_norm", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DDT] = tensor_rows("ddt", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOGIT] = tensor_rows("dlogit", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DCHOICE] =
	        tensor_rows("dchoice", STORAGE_ACTIVATION, n, choice_width(config));
	return N_SCRATCH;
}

/* ---- views, each of one head ---- */

static struct view rows_of(const struct layer_run *r, void *memory, int64_t width, int64_t first)
{
	struct view view = mixing_columns(r, memory, width, first, 0);

	view.head = view.token;
	return view;
}

/* A whole tensor as wide as x. */
static struct view inner(const struct layer_run *r, void *memory)
{
	return rows_of(r, memory, inner_width(r->config), 0);
}

/* z, or its gradient. */
static struct view gate(const struct layer_run *r, void *proj)
{
	return rows_of(r, proj, mamba_proj_width(r->config), inner_width(r->config));
}

/* B or C, or their gradients: columns from `first` on. */
static struct view chosen(const struct layer_run *r, void *choice, int64_t first)
{
	return rows_of(r, choice, choice_width(r->config), first);
}

static void *delta(const struct layer_run *r, void *choice)
{
	return mixing_column(r->ctx, choice, 2 * (int64_t)STATE);
}

/* ---- the operations ---- */

static struct short_conv_args conv_args(const struct layer_run *r)
{
	return (struct short_conv_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .channels = inner_width(r->config),
	        .x_stride = mamba_proj_width(r->config),
	        .x = r->memory->saved[SAVED_PROJ],
	        .weight = r->memory->param[PARAM_CONV_WEIGHT],
	        .bias = r->memory->param[PARAM_CONV_BIAS],
	        .out = r->memory->saved[SAVED_U],
	        .history = r->memory->state[STATE_CONV],
	};
}

/* B, C and delta: a product without a norm, whose backward adds to the gradient of u. */
static struct norm_linear_args choice_args(const struct layer_run *r)
{
	return (struct norm_linear_args){
	        .n_tokens = layer_tokens(r),
	        .d_in = inner_width(r->config),
	        .d_out = choice_width(r->config),
	        .x = r->memory->saved[SAVED_U],
	        .weight = r->memory->param[PARAM_X_PROJ],
	        .x_norm = r->memory->saved[SAVED_U],
	        .y = r->memory->saved[SAVED_CHOICE],
	};
}

static struct decay_gate_args step_args(const struct layer_run *r)
{
	return (struct decay_gate_args){
	        .n_tokens = layer_tokens(r),
	        .rank = rank_of(r->config),
	        .d_out = inner_width(r->config),
	        .x_stride = choice_width(r->config),
	        .form = LOW_RANK_STEP,
	        .x = delta(r, r->memory->saved[SAVED_CHOICE]),
	        .weight = r->memory->param[PARAM_DT_WEIGHT],
	        .bias = r->memory->param[PARAM_DT_BIAS],
	        .out = r->memory->saved[SAVED_DT],
	};
}

static struct selective_scan_args scan_args(const struct layer_run *r)
{
	void *const *saved = r->memory->saved;

	return (struct selective_scan_args){
	        .batch = r->shape->batch,
	        .seq_len = r->shape->seq_len,
	        .channels = inner_width(r->config),
	        .state = STATE,
	        .u = inner(r, saved[SAVED_U]),
	        .dt = inner(r, saved[SAVED_DT]),
	        .z = gate(r, saved[SAVED_PROJ]),
	        .b = chosen(r, saved[SAVED_CHOICE], 0),
	        .c = chosen(r, saved[SAVED_CHOICE], STATE),
	        .log_rate = r->memory->param[PARAM_LOG_RATE],
	        .skip = r->memory->param[PARAM_SKIP],
	        .out = inner(r, saved[SAVED_MIX]),
	        .borders = saved[SAVED_BORDERS],
	        .h_final = r->memory->state[STATE_S],
	};
}

static enum status convolve(const struct layer_run *r)
{
	const struct short_conv_args args = conv_args(r);

	return mixing_convolve(r, &args);
}

static enum status scan(const struct layer_run *r)
{
	const struct selective_scan_args full = scan_args(r);
	const struct selective_scan_step_args step = {
	        .batch = full.batch,
	        .channels = full.channels,
	        .state = full.state,
	        .u = full.u,
	        .dt = full.dt,
	        .z = full.z,
	        .b = full.b,
	        .c = full.c,
	        .log_rate = full.log_rate,
	        .skip = full.skip,
	        .h = full.h_final,
	        .out = full.out,
	};

	return r->position ? run_selective_scan_step(r->ctx, &step)
	                   : run_selective_scan(r->ctx, &full);
}

/* Of a sequence, and of a step. */
static enum status mamba_forward(const struct layer_run *r)
{
	const struct norm_linear_args choice = choice_args(r);
	const struct decay_gate_args steps = step_args(r);

	TRY(convolve(r));
	TRY(run_norm_linear(r->ctx, &choice));
	TRY(run_decay_gate(r->ctx, &steps));
	return scan(r);
}

/* ---- gradients ---- */

static enum status scan_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	const struct selective_scan_backward_args args = {
	        .forward = scan_args(r),
	        .dout = inner(r, scratch[SCRATCH_DMIX]),
	        .du = inner(r, scratch[SCRATCH_DU]),
	        .ddt = inner(r, scratch[SCRATCH_DDT]),
	        .dz = gate(r, scratch[SCRATCH_DPROJ]),
	        .db = chosen(r, scratch[SCRATCH_DCHOICE], 0),
	        .dc = chosen(r, scratch[SCRATCH_DCHOICE], STATE),
	        .dlog_rate = r->memory->grad[PARAM_LOG_RATE],
	        .dskip = r->memory->grad[PARAM_SKIP],
	};

	return run_selective_scan_backward(r->ctx, &args);
}

/* Of the time step, then of B, C and delta together. */
static enum status choice_backward(const struct layer_run *r)
{
	void *const *scratch = r->memory->scratch;
	const struct decay_gate_backward_args steps = {
	        .forward = step_args(r),
	        .dout = scratch[SCRATCH_DDT],
	        .dx = delta(r, scratch[SCRATCH_DCHOICE]),
	        .dlogit = scratch[SCRATCH_DLOGIT],
	        .dweight = r->memory->grad[PARAM_DT_WEIGHT],
	        .dbias = r->memory->grad[PARAM_DT_BIAS],
	};
	const struct norm_linear_backward_args choice = {
	        .forward = choice_args(r),
	        .dy = scratch[SCRATCH_DCHOICE],
	        .dresidual = scratch[SCRATCH_DU],
	        .dx_norm = scratch[SCRATCH_DU_NORM],
	        .dx = scratch[SCRATCH_DU_ALL],
	        .dweight = r->memory->grad[PARAM_X_PROJ],
	};

	TRY(run_decay_gate_backward(r->ctx, &steps));
	return run_norm_linear_backward(r->ctx, &choice);
}

static enum status mamba_backward(const struct layer_run *r)
{
	const struct short_conv_backward_args conv = {
	        .forward = conv_args(r),
	        .n_readers = 1,
	        .dout = r->memory->scratch[SCRATCH_DU_ALL],
	        .dx = r->memory->scratch[SCRATCH_DPROJ],
	        .dweight = r->memory->grad[PARAM_CONV_WEIGHT],
	        .dbias = r->memory->grad[PARAM_CONV_BIAS],
	};

	TRY(scan_backward(r));
	TRY(choice_backward(r));
	return run_short_conv_backward(r->ctx, &conv);
}

static int mamba_golden_names(const struct layer_config *config, struct golden_name *names)
{
	const int64_t d = inner_width(config);
	const struct golden_name own[] = {
	        golden_rows("conv1d.weight", PARAM_CONV_WEIGHT, 0, d),
	        golden_rows("conv1d.bias", PARAM_CONV_BIAS, 0, d),
	        golden_rows("x_proj.weight", PARAM_X_PROJ, 2 * (int64_t)STATE, rank_of(config)),
	        golden_rows("x_proj.weight", PARAM_X_PROJ, 0, 2 * (int64_t)STATE),
	        golden_rows("dt_proj.weight", PARAM_DT_WEIGHT, 0, d),
	        golden_rows("dt_proj.bias", PARAM_DT_BIAS, 0, d),
	        golden_rows("A_log", PARAM_LOG_RATE, 0, d),
	        golden_rows("D", PARAM_SKIP, 0, d),
	        golden_columns("state.s", STATE_S, 0, d, true),
	        golden_columns("state.conv", STATE_CONV, 0, d, false),
	};
	const int n = mixing_golden_names(config, names), n_own = sizeof own / sizeof *own;

	for (int i = 0; i < n_own; i++)
		names[n + i] = own[i];
	return n + n_own;
}

const struct layer_class mamba_layer = {
        .name = "mamba",
        .mixes = true,
        .summary = "Mamba's selective scan",
        .arguments = NO_ARGUMENTS,
        .proj_width = mamba_proj_width,
        .mix_width = inner_width,
        .parameters = mamba_parameters,
        .state = mamba_state,
        .saved = mamba_saved,
        .scratch = mamba_scratch,
        .forward = mamba_forward,
        .backward = mamba_backward,
        .step = mamba_forward,
        .golden_names = mamba_golden_names,
};
