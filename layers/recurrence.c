/*
 * The gated linear recurrence: h_t = g_t h_{t-1} + (1-g_t) v_t with
 * g = sigmoid(gate + bias), out sigmoid(z) h. InProj's columns are z, v, g.
 */
#include "layers/mixing.h"

enum { STATE_H };
enum { SAVED_H = SAVED_OTHER };
enum block { BLOCK_Z, BLOCK_V, BLOCK_G };

static int recurrence_state(const struct layer_config *config, const struct layer_shape *shape,
                            struct tensor_spec *specs)
{
	specs[STATE_H] = tensor_rows("h", STORAGE_FP32, shape->batch,
	                             shape->capacity > 0 ? config->d_model : 0);
	return 1;
}

static int recurrence_saved(const struct layer_config *config, const struct layer_shape *shape,
                            struct tensor_spec *specs)
{
	int64_t n = shape->pass == PASS_TRAIN ? shape->batch * shape->seq_len : 0;

	mixing_saved(config, shape, specs);
	specs[SAVED_H] = tensor_rows("h", STORAGE_ACTIVATION, n, config->d_model);
	return SAVED_H + 1;
}

static struct recurrence_args recurrence_args(const struct layer_run *run)
{
	const struct layer_memory *memory = run->memory;
	int64_t d = run->config->d_model;

	return (struct recurrence_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .d_model = d,
	        .form = GATE_SIGMOID,
	        .z = mixing_block(run, memory->saved[SAVED_PROJ], BLOCK_Z),
	        .x = mixing_block(run, memory->saved[SAVED_PROJ], BLOCK_V),
	        .gate = mixing_block(run, memory->saved[SAVED_PROJ], BLOCK_G),
	        .gate_bias = memory->param[PARAM_GATE_BIAS],
	        .h = mixing_heads(run, memory->saved[SAVED_H], d),
	        .out = mixing_heads(run, memory->saved[SAVED_MIX], d),
	        .h_final = memory->state[STATE_H],
	};
}

static enum status recurrence_backward(const struct layer_run *run)
{
	void *const *scratch = run->memory->scratch;
	const struct recurrence_backward_args args = {
	        .forward = recurrence_args(run),
	        .dout = mixing_heads(run, scratch[SCRATCH_DMIX], run->config->d_model),
	        .dz = mixing_block(run, scratch[SCRATCH_DPROJ], BLOCK_Z),
	        .dx = mixing_block(run, scratch[SCRATCH_DPROJ], BLOCK_V),
	        .dgate = mixing_block(run, scratch[SCRATCH_DPROJ], BLOCK_G),
	        .dgate_bias = run->memory->grad[PARAM_GATE_BIAS],
	};

	return run_recurrence_backward(run->ctx, &args);
}

/* Of a sequence, and of a step. */
static enum status recurrence_forward(const struct layer_run *run)
{
	const struct recurrence_args args = recurrence_args(run);

	return mixing_recur(run, &args);
}

const struct layer_class recurrence_layer = {
        .name = "recurrence",
        .mixes = true,
        .summary = "the gated linear recurrence",
        .arguments = NO_ARGUMENTS,
        .proj_width = mixing_three_widths,
        .parameters = mixing_gated_parameters,
        .state = recurrence_state,
        .saved = recurrence_saved,
        .scratch = mixing_scratch,
        .forward = recurrence_forward,
        .backward = recurrence_backward,
        .step = recurrence_forward,
        .golden_names = mixing_gated_golden_names,
};
