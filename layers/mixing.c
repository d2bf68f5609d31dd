/* What all temporal-mixing layers share. */
#include "layers/mixing.h"

enum status mixing_check(const struct layer_config *config)
{
	int64_t d = config->d_model / config->n_heads;

	if (d < 1 || config->d_model % config->n_heads != 0)
		return status_set(STATUS_INVALID, "%s: heads=%lld (allowed: a divisor of D = %lld)",
		                  config->class->name, (long long)config->n_heads,
		                  (long long)config->d_model);
	if (config->rope && d % 2 != 0)
		return status_set(STATUS_INVALID,
		                  "%s: heads=%lld makes heads %lld wide, and the rotary embedding "
		                  "needs an even width (allowed: other heads, or position=none)",
		                  config->class->name, (long long)config->n_heads, (long long)d);
	return STATUS_OK;
}

int64_t mixing_width(const struct layer_config *config)
{
	return config->class->mix_width ? config->class->mix_width(config) : config->d_model;
}

void *mixing_mix(const struct layer_run *run)
{
	return run->memory->saved[run->memory->saved[SAVED_MIX] ? SAVED_MIX : SAVED_PROJ];
}

int mixing_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int64_t d = config->d_model, d_proj = config->class->proj_width(config);

	specs[PARAM_NORM] = tensor_vector("norm_weight", config->prenorm ? d : 0, INIT_ONES);
	specs[PARAM_IN_PROJ] =
	        (struct tensor_spec){"in_proj", STORAGE_ACTIVATION, 2, {d_proj, d}, INIT_NORMAL};
	specs[PARAM_OUT_PROJ] = (struct tensor_spec){
	        "out_proj", STORAGE_ACTIVATION, 2, {d, mixing_width(config)}, INIT_NORMAL};
	return PARAM_OTHER;
}

int mixing_saved(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, d_proj = config->class->proj_width(config);
	int64_t kept = shape->pass == PASS_TRAIN && config->prenorm ? n : 0;

	specs[SAVED_PROJ] = tensor_rows("proj", STORAGE_ACTIVATION, n, d_proj);
	specs[SAVED_MIX] = tensor_rows("mix", STORAGE_ACTIVATION, n, mixing_width(config));
	specs[SAVED_X_NORM] = tensor_rows("x_norm", STORAGE_ACTIVATION, kept, config->d_model);
	specs[SAVED_RSTD] = tensor_rows("rstd", STORAGE_FP32, kept, 1);
	return SAVED_OTHER;
}

int mixing_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, d_proj = config->class->proj_width(config);

	specs[SCRATCH_DMIX] = tensor_rows("dmix", STORAGE_ACTIVATION, n, mixing_width(config));
	specs[SCRATCH_DPROJ] = tensor_rows("dproj", STORAGE_ACTIVATION, n, d_proj);
	specs[SCRATCH_DX_NORM] = tensor_rows("dx_norm", STORAGE_ACTIVATION, n, config->d_model);
	return SCRATCH_OTHER;
}

int mixing_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int64_t d = config->d_model;

	names[0] = golden_rows("input_norm.weight", PARAM_NORM, 0, d);
	names[1] =
	        golden_rows("in_proj.weight", PARAM_IN_PROJ, 0, config->class->proj_width(config));
	names[2] = golden_rows("out_proj.weight", PARAM_OUT_PROJ, 0, d);
	return 3;
}

int64_t mixing_three_widths(const struct layer_config *config)
{
	return 3 * config->d_model;
}

int mixing_gated_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	mixing_parameters(config, specs);
	specs[PARAM_GATE_BIAS] = tensor_vector("gate_bias", config->d_model, INIT_GATE_BIAS);
	return PARAM_GATE_BIAS + 1;
}

int mixing_gated_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int n = mixing_golden_names(config, names);

	names[n++] = golden_rows("gate_bias", PARAM_GATE_BIAS, 0, config->d_model);
	return n;
}

void *mixing_column(const struct context *ctx, void *memory, int64_t first)
{
	if (!memory)
		return NULL;
	return (char *)memory + (size_t)first * dtype_size(ctx->device->activation);
}

struct view mixing_columns(const struct layer_run *run, void *memory, int64_t width, int64_t first,
                           int64_t d_head)
{
	return (struct view){mixing_column(run->ctx, memory, first), run->shape->seq_len * width,
	                     width, d_head};
}

struct view mixing_heads(const struct layer_run *run, void *memory, int64_t width)
{
	return mixing_columns(run, memory, width, 0, width / run->config->n_heads);
}

struct view mixing_block(const struct layer_run *run, void *proj, int64_t i)
{
	const struct layer_config *config = run->config;

	return mixing_columns(run, proj, config->class->proj_width(config), i * config->d_model,
	                      config->d_model / config->n_heads);
}

struct view mixing_slots(const struct layer_run *run, void *cache, int64_t n_heads, int64_t slots)
{
	int64_t d = run->config->d_model / run->config->n_heads;

	return (struct view){cache, n_heads * slots * d, d, slots * d};
}

enum status mixing_convolve(const struct layer_run *run, const struct short_conv_args *args)
{
	const struct short_conv_step_args step = {
	        .batch = args->batch,
	        .channels = args->channels,
	        .x_stride = args->x_stride,
	        .curve = args->curve,
	        .x = args->x,
	        .weight = args->weight,
	        .bias = args->bias,
	        .history = args->history,
	        .out = args->out,
	};

	return run->position ? run_short_conv_step(run->ctx, &step)
	                     : run_short_conv(run->ctx, args);
}

enum status mixing_recur(const struct layer_run *run, const struct recurrence_args *args)
{
	const struct recurrence_step_args step = {
	        .batch = args->batch,
	        .d_model = args->d_model,
	        .form = args->form,
	        .x = args->x,
	        .gate = args->gate,
	        .z = args->z,
	        .gate_bias = args->gate_bias,
	        .h = args->h_final,
	        .out = args->out,
	};

	return run->position ? run_recurrence_step(run->ctx, &step)
	                     : run_recurrence(run->ctx, args);
}

enum status mixing_recur_matrix(const struct layer_run *run,
                                const struct matrix_recurrence_args *args)
{
	const struct matrix_recurrence_step_args step = {
	        .batch = args->batch,
	        .n_heads = args->n_heads,
	        .d_k = args->d_k,
	        .d_v = args->d_v,
	        .decay = args->decay,
	        .rule = args->rule,
	        .scale = args->scale,
	        .q = args->q,
	        .k = args->k,
	        .v = args->v,
	        .log_decay = args->log_decay,
	        .beta = args->beta,
	        .bonus = args->bonus,
	        .state = args->final_state,
	        .out = args->out,
	        .first_head = args->first_head,
	};

	return run->position ? run_matrix_recurrence_step(run->ctx, &step)
	                     : run_matrix_recurrence(run->ctx, args);
}
