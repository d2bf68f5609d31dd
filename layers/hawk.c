/*
 * Hawk (arXiv 2402.19427): OutProj of gelu(y) h, h the states of a real-gated linear recurrent unit
 * over a convolution of x. Its gates are block-diagonal products, one block a head:
 *   u = conv(x),  r, i = sigmoid(W u + b),  log a = -8 softplus(rate) r,
 *   h_t = a h_{t-1} + sqrt(1 - a^2) i u, at the first token h = i u.
 * InProj's columns are y, x (D each); all products have biases. The unit is as wide as the model,
 * where the paper widens it by a third.
 */
#include "layers/mixing.h"

enum {
	PARAM_IN_BIAS = PARAM_OTHER,
	PARAM_CONV_WEIGHT,
	PARAM_CONV_BIAS,
	PARAM_GATE_WEIGHT, /* of r, then of i: [2 H, D/H, D/H] */
	PARAM_LRU_BIAS,
	PARAM_RATE,
	PARAM_OUT_BIAS,
	N_PARAMS
};
enum { STATE_H, STATE_CONV, N_STATES };
/* After the convolution; the gates' logits; what the recurrence reads, and its states. */
enum { SAVED_CONV = SAVED_OTHER, SAVED_LOGIT, SAVED_LOG_DECAY, SAVED_INPUT, SAVED_H, N_SAVED };
/* Gradients of those; that of SAVED_CONV by way of the input alone, then all of it. */
enum {
	SCRATCH_DH = SCRATCH_OTHER,
	SCRATCH_DLOG_DECAY,
	SCRATCH_DINPUT,
	SCRATCH_DLOGIT,
	SCRATCH_DSKIP,
	SCRATCH_DCONV,
	N_SCRATCH
};
enum { N_GATES = 2 };

static int64_t two_widths(const struct layer_config *config)
{
	return 2 * config->d_model;
}

static int hawk_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	const int64_t d = config->d_model, blocks = N_GATES * config->n_heads;
	const int64_t width = d / config->n_heads;

	mixing_parameters(config, specs);
	specs[PARAM_IN_BIAS] = tensor_vector("in_bias", 2 * d, INIT_ZEROS);
	specs[PARAM_CONV_WEIGHT] =
	        (struct tensor_spec){"conv_weight", STORAGE_FP32, 3, {d, 1, CONV_WIDTH}, INIT_CONV};
	specs[PARAM_CONV_BIAS] = tensor_vector("conv_bias", d, INIT_ZEROS);
	specs[PARAM_GATE_WEIGHT] = (struct tensor_spec){
	        "gate_weight", STORAGE_ACTIVATION, 3, {blocks, width, width}, INIT_NORMAL};
	specs[PARAM_LRU_BIAS] = tensor_rows("gate_bias", STORAGE_FP32, blocks, width);
	specs[PARAM_RATE] = tensor_vector("rate", d, INIT_LRU_RATE);
	specs[PARAM_OUT_BIAS] = tensor_vector("out_bias", d, INIT_ZEROS);
	return N_PARAMS;
}

static int hawk_state(const struct layer_config *config, const struct layer_shape *shape,
                      struct tensor_spec *specs)
{
	const int64_t d = shape->capacity > 0 ? config->d_model : 0;

	specs[STATE_H] = tensor_rows("h", STORAGE_FP32, shape->batch, d);
	specs[STATE_CONV] = (struct tensor_spec){
	        "conv", STORAGE_ACTIVATION, 3, {shape->batch, CONV_HISTORY, d}, INIT_ZEROS};
	return N_STATES;
}

static int hawk_saved(const struct layer_config *config, const struct layer_shape *shape,
                      struct tensor_spec *specs)
{
	const int64_t n = shape->batch * shape->seq_len, d = config->d_model;

	mixing_saved(config, shape, specs);
	specs[SAVED_CONV] = tensor_rows("conv", STORAGE_ACTIVATION, n, d);
	specs[SAVED_LOGIT] = tensor_rows("logit", STORAGE_ACTIVATION, n, N_GATES * d);
	specs[SAVED_LOG_DECAY] = tensor_rows("log_decay", STORAGE_ACTIVATION, n, d);
	specs[SAVED_INPUT] = tensor_rows("input", STORAGE_ACTIVATION, n, d);
	specs[SAVED_H] = tensor_rows("h", STORAGE_ACTIVATION, n, d);
	return N_SAVED;
}

static int hawk_scratch(const struct layer_config *config, const struct layer_shape *shape,
                        struct tensor_spec *specs)
{
	const int64_t n = shape->batch * shape->seq_len, d = config->d_model;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DH] = tensor_rows("dh", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOG_DECAY] = tensor_rows("dlog_decay", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DINPUT] = tensor_rows("dinput", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DLOGIT] = tensor_rows("dlogit", STORAGE_ACTIVATION, n, N_GATES * d);
	specs[SCRATCH_DSKIP] = tensor_rows("dskip", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DCONV] = tensor_rows("dconv", STORAGE_ACTIVATION, n, d);
	return N_SCRATCH;
}

/* The columns of y and of x in InProj's output or its gradient. */
static void *y_columns(void *proj)
{
	return proj;
}

static void *x_columns(const struct layer_run *run, void *proj)
{
	return mixing_column(run->ctx, proj, run->config->d_model);
}

/* A tensor [N, D] as the recurrence sees it. */
static struct view one_head(const struct layer_run *run, void *tensor)
{
	const int64_t d = run->config->d_model;

	return mixing_columns(run, tensor, d, 0, d);
}

static struct short_conv_args conv_args(const struct layer_run *run)
{
	const struct layer_memory *memory = run->memory;

	return (struct short_conv_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .channels = run->config->d_model,
	        .curve = CURVE_NONE,
	        .x_stride = two_widths(run->config),
	        .x = x_columns(run, memory->saved[SAVED_PROJ]),
	        .weight = memory->param[PARAM_CONV_WEIGHT],
	        .bias = memory->param[PARAM_CONV_BIAS],
	        .out = memory->saved[SAVED_CONV],
	        .history = memory->state[STATE_CONV],
	};
}

static struct block_linear_args gate_args(const struct layer_run *run)
{
	const int64_t width = run->config->d_model / run->config->n_heads;

	return (struct block_linear_args){
	        .n_tokens = layer_tokens(run),
	        .n_products = N_GATES,
	        .n_blocks = run->config->n_heads,
	        .d_in = width,
	        .d_out = width,
	        .x = run->memory->saved[SAVED_CONV],
	        .weight = run->memory->param[PARAM_GATE_WEIGHT],
	        .y = run->memory->saved[SAVED_LOGIT],
	};
}

static struct lru_gate_args lru_args(const struct layer_run *run)
{
	const struct layer_memory *memory = run->memory;

	return (struct lru_gate_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .width = run->config->d_model,
	        .position = run->position,
	        .logit = memory->saved[SAVED_LOGIT],
	        .bias = memory->param[PARAM_LRU_BIAS],
	        .rate = memory->param[PARAM_RATE],
	        .x = memory->saved[SAVED_CONV],
	        .log_decay = memory->saved[SAVED_LOG_DECAY],
	        .out = memory->saved[SAVED_INPUT],
	};
}

static struct recurrence_args recurrence_args(const struct layer_run *run)
{
	const struct layer_memory *memory = run->memory;

	return (struct recurrence_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .d_model = run->config->d_model,
	        .form = GATE_LOG_DECAY,
	        .x = one_head(run, memory->saved[SAVED_INPUT]),
	        .gate = one_head(run, memory->saved[SAVED_LOG_DECAY]),
	        .out = one_head(run, memory->saved[SAVED_H]),
	        .h_final = memory->state[STATE_H],
	};
}

static struct gelu_gate_args output_args(const struct layer_run *run)
{
	void *const *saved = run->memory->saved;

	return (struct gelu_gate_args){
	        .n_tokens = layer_tokens(run),
	        .width = run->config->d_model,
	        .gate_stride = two_widths(run->config),
	        .gate = y_columns(saved[SAVED_PROJ]),
	        .x = saved[SAVED_H],
	        .out = saved[SAVED_MIX],
	};
}

static enum status convolve(const struct layer_run *run)
{
	const struct short_conv_args args = conv_args(run);

	return mixing_convolve(run, &args);
}

static enum status recur(const struct layer_run *run)
{
	const struct recurrence_args args = recurrence_args(run);

	return mixing_recur(run, &args);
}

/* Of a sequence, and of a step. */
static enum status hawk_forward(const struct layer_run *run)
{
	const struct block_linear_args gate = gate_args(run);
	const struct lru_gate_args lru = lru_args(run);
	const struct gelu_gate_args output = output_args(run);

	TRY(convolve(run));
	TRY(run_block_linear(run->ctx, &gate));
	TRY(run_lru_gate(run->ctx, &lru));
	TRY(recur(run));
	return run_gelu_gate(run->ctx, &output);
}

/* From the gradient of the mix to those of y and of the recurrence's operands. */
static enum status recurrence_backward(const struct layer_run *run)
{
	void *const *scratch = run->memory->scratch;
	const struct gelu_gate_backward_args output = {
	        .forward = output_args(run),
	        .dout = scratch[SCRATCH_DMIX],
	        .dgate = y_columns(scratch[SCRATCH_DPROJ]),
	        .dx = scratch[SCRATCH_DH],
	};
	const struct recurrence_backward_args recurrence = {
	        .forward = recurrence_args(run),
	        .dout = one_head(run, scratch[SCRATCH_DH]),
	        .dx = one_head(run, scratch[SCRATCH_DINPUT]),
	        .dgate = one_head(run, scratch[SCRATCH_DLOG_DECAY]),
	};

	TRY(run_gelu_gate_backward(run->ctx, &output));
	return run_recurrence_backward(run->ctx, &recurrence);
}

static enum status hawk_backward(const struct layer_run *run)
{
	void *const *scratch = run->memory->scratch;
	float *const *grad = run->memory->grad;
	const struct lru_gate_backward_args lru = {
	        .forward = lru_args(run),
	        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
	        .dout = scratch[SCRATCH_DINPUT],
	        .dlogit = scratch[SCRATCH_DLOGIT],
	        .dx = scratch[SCRATCH_DSKIP],
	        .dbias = grad[PARAM_LRU_BIAS],
	        .drate = grad[PARAM_RATE],
	};
	const struct block_linear_backward_args gate = {
	        .forward = gate_args(run),
	        .dy = scratch[SCRATCH_DLOGIT],
	        .dskip = scratch[SCRATCH_DSKIP],
	        .dx = scratch[SCRATCH_DCONV],
	        .dweight = grad[PARAM_GATE_WEIGHT],
	};
	const struct short_conv_backward_args conv = {
	        .forward = conv_args(run),
	        .n_readers = 1,
	        .dout = scratch[SCRATCH_DCONV],
	        .dx = x_columns(run, scratch[SCRATCH_DPROJ]),
	        .dweight = grad[PARAM_CONV_WEIGHT],
	        .dbias = grad[PARAM_CONV_BIAS],
	};

	TRY(recurrence_backward(run));
	TRY(run_lru_gate_backward(run->ctx, &lru));
	TRY(run_block_linear_backward(run->ctx, &gate));
	return run_short_conv_backward(run->ctx, &conv);
}

static int hawk_golden_names(const struct layer_config *config, struct golden_name *names)
{
	const int64_t d = config->d_model, h = config->n_heads;
	const struct golden_name ours[] = {
	        golden_rows("input_norm.weight", PARAM_NORM, 0, d),
	        golden_rows("linear_y.weight", PARAM_IN_PROJ, 0, d),
	        golden_rows("linear_x.weight", PARAM_IN_PROJ, d, d),
	        golden_rows("linear_y.bias", PARAM_IN_BIAS, 0, d),
	        golden_rows("linear_x.bias", PARAM_IN_BIAS, d, d),
	        golden_rows("conv_1d.weight", PARAM_CONV_WEIGHT, 0, d),
	        golden_rows("conv_1d.bias", PARAM_CONV_BIAS, 0, d),
	        golden_rows("rg_lru.recurrent_gate_weight", PARAM_GATE_WEIGHT, 0, h),
	        golden_rows("rg_lru.input_gate_weight", PARAM_GATE_WEIGHT, h, h),
	        golden_rows("rg_lru.recurrent_gate_bias", PARAM_LRU_BIAS, 0, h),
	        golden_rows("rg_lru.input_gate_bias", PARAM_LRU_BIAS, h, h),
	        golden_rows("rg_lru.recurrent_param", PARAM_RATE, 0, d),
	        golden_rows("linear_out.weight", PARAM_OUT_PROJ, 0, d),
	        golden_rows("linear_out.bias", PARAM_OUT_BIAS, 0, d),
	        golden_columns("state.h", STATE_H, 0, d, false),
	        golden_columns("state.conv", STATE_CONV, 0, d, false),
	};
	const int n = sizeof ours / sizeof ours[0];

	for (int i = 0; i < n; i++)
		names[i] = ours[i];
	return n;
}

static const struct layer_argument hawk_arguments[] = {
        ARGUMENT("heads", n_heads, .least = 1, .automatic = true,
                 .help = "blocks H of the gates' products"),
        {0}};

const struct layer_class hawk_layer = {
        .name = "hawk",
        .mixes = true,
        .summary = "Hawk, a real-gated linear recurrent unit",
        .arguments = hawk_arguments,
        .check = mixing_check,
        .in_bias = PARAM_IN_BIAS,
        .out_bias = PARAM_OUT_BIAS,
        .proj_width = two_widths,
        .parameters = hawk_parameters,
        .state = hawk_state,
        .saved = hawk_saved,
        .scratch = hawk_scratch,
        .forward = hawk_forward,
        .backward = hawk_backward,
        .step = hawk_forward,
        .golden_names = hawk_golden_names,
};
