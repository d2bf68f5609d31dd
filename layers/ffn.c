/* The feed-forward layer between mixing layers of a model: y = x + W2 gelu(W1 RMSNorm(x)). Its Mix
 * is gelu, outside training and backward in place. */
#include "layers/mixing.h"
#include "layers/model.h"

static int64_t hidden_width(const struct layer_config *config)
{
	return config->ffn_width ? config->ffn_width : 4 * config->d_model;
}

static int ffn_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int n = mixing_parameters(config, specs);

	specs[PARAM_IN_PROJ].name = "fc1";
	specs[PARAM_OUT_PROJ].name = "fc2";
	return n;
}

static int ffn_state(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	return 0;
}

static int ffn_saved(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int n = mixing_saved(config, shape, specs);

	specs[SAVED_X_NORM].dims[0] = shape->batch * shape->seq_len;
	if (shape->pass != PASS_TRAIN)
		specs[SAVED_MIX].dims[0] = 0;
	return n;
}

static int ffn_scratch(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int n = mixing_scratch(config, shape, specs);

	specs[SCRATCH_DPROJ].dims[0] = 0;
	return n;
}

static enum status ffn_forward(const struct layer_run *run)
{
	const struct gelu_args args = {
	        .count = layer_tokens(run) * hidden_width(run->config),
	        .x = run->memory->saved[SAVED_PROJ],
	        .y = mixing_mix(run),
	};

	return run_gelu(run->ctx, &args);
}

static enum status ffn_backward(const struct layer_run *run)
{
	void *dhidden = run->memory->scratch[SCRATCH_DMIX];
	const struct gelu_backward_args args = {
	        .count = layer_tokens(run) * hidden_width(run->config),
	        .x = run->memory->saved[SAVED_PROJ],
	        .dy = dhidden,
	        .dx = dhidden,
	};

	return run_gelu_backward(run->ctx, &args);
}

static int ffn_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int n = mixing_golden_names(config, names);

	names[PARAM_NORM].name = "ln.weight";
	names[PARAM_IN_PROJ].name = "fc1.weight";
	names[PARAM_OUT_PROJ].name = "fc2.weight";
	return n;
}

const struct layer_class ffn_layer = {
        .name = "ffn",
        .arguments = NO_ARGUMENTS,
        .proj_width = hidden_width,
        .mix_width = hidden_width,
        .parameters = ffn_parameters,
        .state = ffn_state,
        .saved = ffn_saved,
        .scratch = ffn_scratch,
        .forward = ffn_forward,
        .backward = ffn_backward,
        .step = ffn_forward,
        .golden_names = ffn_golden_names,
};
