/* Sizes of tensors, and what every layer does around its Mix. */
#include "layers/layer.h"

#include "layers/mixing.h"

int64_t tensor_count(const struct tensor_spec *spec)
{
	int64_t count = 1;

	for (int i = 0; i < spec->n_dims; i++)
		count *= spec->dims[i];
	return count;
}

enum dtype tensor_dtype(const struct tensor_spec *spec, const struct device *device)
{
	return spec->storage == STORAGE_FP32 ? device->wide : device->activation;
}

size_t tensor_bytes(const struct tensor_spec *spec, const struct device *device)
{
	return (size_t)tensor_count(spec) * dtype_size(tensor_dtype(spec, device));
}

/* Where InProj reads from and its backward finds the normalised input: x itself without a norm.
 * Outside training nobody needs it for long, and it borrows the place of the mix. */
static void *x_norm_of(const struct layer_run *run, const void *x)
{
	void *const *saved = run->memory->saved;

	if (!run->config->prenorm)
		return (void *)x;
	return saved[SAVED_X_NORM] ? saved[SAVED_X_NORM] : saved[SAVED_MIX];
}

/* A bias of the class, or NULL; its gradient likewise. */
static float *bias_of(void *const *tensors, int parameter)
{
	return parameter > 0 ? tensors[parameter] : NULL;
}

static float *bias_gradient(const struct layer_run *run, int parameter)
{
	float *const *gradients = run->memory->grad;

	return parameter > 0 ? gradients[parameter] : NULL;
}

static struct norm_linear_args in_proj_args(const struct layer_run *run, const void *x)
{
	return (struct norm_linear_args){
	        .n_tokens = layer_tokens(run),
	        .d_in = run->config->d_model,
	        .d_out = run->config->class->proj_width(run->config),
	        .eps = run->config->norm_eps,
	        .x = x,
	        .norm_weight = run->memory->param[PARAM_NORM],
	        .weight = run->memory->param[PARAM_IN_PROJ],
	        .bias = bias_of(run->memory->param, run->config->class->in_bias),
	        .x_norm = x_norm_of(run, x),
	        .rstd = run->memory->saved[SAVED_RSTD],
	        .y = run->memory->saved[SAVED_PROJ],
	};
}

enum status layer_forward(const struct layer_run *run, const void *x, void *y)
{
	const struct layer_config *config = run->config;
	const struct norm_linear_args in_proj = in_proj_args(run, x);
	const struct linear_residual_args out_proj = {
	        .n_tokens = layer_tokens(run),
	        .d_in = mixing_width(config),
	        .d_out = config->d_model,
	        .x = mixing_mix(run),
	        .weight = run->memory->param[PARAM_OUT_PROJ],
	        .bias = bias_of(run->memory->param, config->class->out_bias),
	        .residual = config->residual ? x : NULL,
	        .y = y,
	};

	TRY((config->class->in_proj ? config->class->in_proj(run, x)
	                            : run_norm_linear(run->ctx, &in_proj)));
	TRY((run->position ? config->class->step : config->class->forward)(run));
	return run_linear_residual(run->ctx, &out_proj);
}

enum status layer_backward(const struct layer_run *run, const void *x, const void *dy, void *dx)
{
	const struct layer_config *config = run->config;
	const struct layer_memory *memory = run->memory;
	const struct linear_residual_backward_args out_proj = {
	        .n_tokens = layer_tokens(run),
	        .d_in = mixing_width(config),
	        .d_out = config->d_model,
	        .x = memory->saved[SAVED_MIX],
	        .weight = memory->param[PARAM_OUT_PROJ],
	        .dy = dy,
	        .dx = memory->scratch[SCRATCH_DMIX],
	        .dweight = memory->grad[PARAM_OUT_PROJ],
	        .dbias = bias_gradient(run, config->class->out_bias),
	};
	const struct norm_linear_backward_args in_proj = {
	        .forward = in_proj_args(run, x),
	        .dy = memory->scratch[memory->scratch[SCRATCH_DPROJ] ? SCRATCH_DPROJ
	                                                             : SCRATCH_DMIX],
	        .dresidual = config->residual ? dy : NULL,
	        .dx_norm = memory->scratch[SCRATCH_DX_NORM],
	        .dx = dx,
	        .dnorm_weight = memory->grad[PARAM_NORM],
	        .dweight = memory->grad[PARAM_IN_PROJ],
	        .dbias = bias_gradient(run, config->class->in_bias),
	};

	TRY(run_linear_residual_backward(run->ctx, &out_proj));
	TRY(config->class->backward(run));
	return config->class->in_proj_backward ? config->class->in_proj_backward(run, x, dy, dx)
	                                       : run_norm_linear_backward(run->ctx, &in_proj);
}
