/* The feed-forward layer between mixing layers of a model: y = x + W2 gelu(W1 RMSNorm(x)). */
#include "layers/model.h"

enum { PARAM_FC1 = PARAM_IN_PROJ, PARAM_FC2 = PARAM_OUT_PROJ };
/* Before and after gelu; outside training it works in place. */
enum { SAVED_HIDDEN = SAVED_PROJ, SAVED_GELU = SAVED_MIX };
enum { SCRATCH_DHIDDEN, SCRATCH_DX_NORM, N_SCRATCH };

static int64_t hidden_width(const struct layer_config *config)
{
	return 4 * config->d_model;
}

static enum status ffn_check(const struct layer_config *config)
{
	(void)config;
	return STATUS_OK;
}

static int ffn_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int64_t d = config->d_model, hidden = hidden_width(config);

	specs[PARAM_NORM] = (struct tensor_spec){"norm_weight", STORAGE_FP32, 1, {d}, INIT_ONES};
	specs[PARAM_FC1] =
	        (struct tensor_spec){"fc1", STORAGE_ACTIVATION, 2, {hidden, d}, INIT_NORMAL};
	specs[PARAM_FC2] =
	        (struct tensor_spec){"fc2", STORAGE_ACTIVATION, 2, {d, hidden}, INIT_NORMAL};
	return PARAM_OTHER;
}

static int ffn_state(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	(void)config;
	(void)shape;
	(void)specs;
	return 0;
}

static int ffn_saved(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, train = shape->pass == PASS_TRAIN ? n : 0;

	specs[SAVED_HIDDEN] = (struct tensor_spec){
	        "hidden", STORAGE_ACTIVATION, 2, {n, hidden_width(config)}, INIT_ZEROS};
	specs[SAVED_GELU] = (struct tensor_spec){
	        "gelu", STORAGE_ACTIVATION, 2, {train, hidden_width(config)}, INIT_ZEROS};
	specs[SAVED_X_NORM] = (struct tensor_spec){
	        "x_norm", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	specs[SAVED_RSTD] = (struct tensor_spec){"rstd", STORAGE_FP32, 1, {train}, INIT_ZEROS};
	return SAVED_OTHER;
}

static int ffn_scratch(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len;

	specs[SCRATCH_DHIDDEN] = (struct tensor_spec){
	        "dhidden", STORAGE_ACTIVATION, 2, {n, hidden_width(config)}, INIT_ZEROS};
	specs[SCRATCH_DX_NORM] = (struct tensor_spec){
	        "dx_norm", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	return N_SCRATCH;
}

static enum status ffn_forward(struct context *ctx, const struct layer_config *config,
                               const struct layer_shape *shape, struct layer_memory *memory,
                               const void *x, void *y)
{
	int64_t n = shape->batch * shape->seq_len, hidden = hidden_width(config);
	void *gelu_out =
	        memory->saved[SAVED_GELU] ? memory->saved[SAVED_GELU] : memory->saved[SAVED_HIDDEN];
	const struct norm_linear_args fc1 = {
	        .n_tokens = n,
	        .d_in = config->d_model,
	        .d_out = hidden,
	        .eps = config->norm_eps,
	        .x = x,
	        .norm_weight = memory->param[PARAM_NORM],
	        .weight = memory->param[PARAM_FC1],
	        .x_norm = memory->saved[SAVED_X_NORM],
	        .rstd = memory->saved[SAVED_RSTD],
	        .y = memory->saved[SAVED_HIDDEN],
	};
	const struct gelu_args gelu = {
	        .count = n * hidden, .x = memory->saved[SAVED_HIDDEN], .y = gelu_out};
	const struct linear_residual_args fc2 = {
	        .n_tokens = n,
	        .d_in = hidden,
	        .d_out = config->d_model,
	        .x = gelu_out,
	        .weight = memory->param[PARAM_FC2],
	        .residual = x,
	        .y = y,
	};
	enum status status = kernel_run(ctx, OP_NORM_LINEAR, &fc1);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_GELU, &gelu);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_LINEAR_RESIDUAL, &fc2);
	return status;
}

static enum status ffn_backward(struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, struct layer_memory *memory,
                                const void *x, const void *dy, void *dx)
{
	int64_t n = shape->batch * shape->seq_len, hidden = hidden_width(config);
	void *dhidden = memory->scratch[SCRATCH_DHIDDEN];
	const struct linear_residual_backward_args fc2 = {
	        .n_tokens = n,
	        .d_in = hidden,
	        .d_out = config->d_model,
	        .x = memory->saved[SAVED_GELU],
	        .weight = memory->param[PARAM_FC2],
	        .dy = dy,
	        .dx = dhidden,
	        .dweight = memory->grad[PARAM_FC2],
	};
	const struct gelu_backward_args gelu = {.count = n * hidden,
	                                        .x = memory->saved[SAVED_HIDDEN],
	                                        .dy = dhidden,
	                                        .dx = dhidden};
	const struct norm_linear_backward_args fc1 = {
	        .n_tokens = n,
	        .d_in = config->d_model,
	        .d_out = hidden,
	        .x = x,
	        .x_norm = memory->saved[SAVED_X_NORM],
	        .weight = memory->param[PARAM_FC1],
	        .norm_weight = memory->param[PARAM_NORM],
	        .rstd = memory->saved[SAVED_RSTD],
	        .dy = dhidden,
	        .dresidual = dy,
	        .dx_norm = memory->scratch[SCRATCH_DX_NORM],
	        .dx = dx,
	        .dnorm_weight = memory->grad[PARAM_NORM],
	        .dweight = memory->grad[PARAM_FC1],
	};
	enum status status = kernel_run(ctx, OP_LINEAR_RESIDUAL_BACKWARD, &fc2);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_GELU_BACKWARD, &gelu);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_LINEAR_BACKWARD, &fc1);
	return status;
}

static enum status ffn_step(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const int32_t *position, int64_t position_hint, const void *x, void *y)
{
	(void)position;
	(void)position_hint;
	return ffn_forward(ctx, config, shape, memory, x, y);
}

static int ffn_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int64_t d = config->d_model, hidden = hidden_width(config);

	names[0] = (struct golden_name){"ln.weight", PARAM_NORM, 0, d};
	names[1] = (struct golden_name){"fc1.weight", PARAM_FC1, 0, hidden};
	names[2] = (struct golden_name){"fc2.weight", PARAM_FC2, 0, d};
	return 3;
}

const struct layer_class ffn_layer = {
        .name = "ffn",
        .tunables = "",
        .check = ffn_check,
        .parameters = ffn_parameters,
        .state = ffn_state,
        .saved = ffn_saved,
        .scratch = ffn_scratch,
        .forward = ffn_forward,
        .backward = ffn_backward,
        .step = ffn_step,
        .golden_names = ffn_golden_names,
};
