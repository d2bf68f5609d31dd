/*
 * The gated linear recurrence: h_t = g_t h_{t-1} + (1-g_t) v_t with
 * g = sigmoid(gate + bias), out sigmoid(z) h. InProj's columns are z, v, g.
 */
#include <stdlib.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"

enum { PARAM_GATE_BIAS = PARAM_OTHER };
enum { STATE_H };
enum { SAVED_H = SAVED_OTHER };

static int64_t proj_width(const struct layer_config *config)
{
	return 3 * config->d_model;
}

static enum status recurrence_check(const struct layer_config *config)
{
	return mixing_check(config, false);
}

static int recurrence_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int n = mixing_parameters(config, proj_width(config), specs);

	specs[n++] = (struct tensor_spec){
	        "gate_bias", STORAGE_FP32, 1, {config->d_model}, INIT_GATE_BIAS};
	return n;
}

static int recurrence_state(const struct layer_config *config, const struct layer_shape *shape,
                            struct tensor_spec *specs)
{
	int64_t d = shape->capacity > 0 ? config->d_model : 0;

	specs[STATE_H] = (struct tensor_spec){"h", STORAGE_FP32, 2, {shape->batch, d}, INIT_ZEROS};
	return 1;
}

static int recurrence_saved(const struct layer_config *config, const struct layer_shape *shape,
                            struct tensor_spec *specs)
{
	int n = mixing_saved(config, shape, proj_width(config), specs);
	int64_t rows = shape->pass == PASS_TRAIN ? shape->batch * shape->seq_len : 0;

	specs[n++] = (struct tensor_spec){
	        "h", STORAGE_ACTIVATION, 2, {rows, config->d_model}, INIT_ZEROS};
	return n;
}

static int recurrence_scratch(const struct layer_config *config, const struct layer_shape *shape,
                              struct tensor_spec *specs)
{
	return mixing_scratch(config, shape, proj_width(config), specs);
}

/* Column block i (0: z, 1: v, 2: g) of InProj's output or its gradient. */
static struct view column_block(const struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, void *proj, int64_t i)
{
	return mixing_columns(ctx, proj, shape->seq_len, proj_width(config), i * config->d_model,
	                      config->d_model);
}

/* A [B, T, 1, D] view of a whole tensor. */
static struct view whole(const struct context *ctx, const struct layer_config *config,
                         const struct layer_shape *shape, void *tensor)
{
	return mixing_columns(ctx, tensor, shape->seq_len, config->d_model, 0, config->d_model);
}

static struct recurrence_args recurrence_args(const struct context *ctx,
                                              const struct layer_config *config,
                                              const struct layer_shape *shape,
                                              const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ];

	return (struct recurrence_args){
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .d_model = config->d_model,
	        .form = GATE_SIGMOID,
	        .z = column_block(ctx, config, shape, proj, 0),
	        .x = column_block(ctx, config, shape, proj, 1),
	        .gate = column_block(ctx, config, shape, proj, 2),
	        .gate_bias = memory->param[PARAM_GATE_BIAS],
	        .h = whole(ctx, config, shape, memory->saved[SAVED_H]),
	        .out = whole(ctx, config, shape, memory->saved[SAVED_MIX]),
	        .h_final = memory->state[STATE_H],
	};
}

static enum status recurrence_forward(struct context *ctx, const struct layer_config *config,
                                      const struct layer_shape *shape, struct layer_memory *memory,
                                      const void *x, void *y)
{
	const struct recurrence_args args = recurrence_args(ctx, config, shape, memory);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_RECURRENCE, &args);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

static enum status recurrence_backward(struct context *ctx, const struct layer_config *config,
                                       const struct layer_shape *shape, struct layer_memory *memory,
                                       const void *x, const void *dy, void *dx)
{
	void *dproj = memory->scratch[SCRATCH_DPROJ];
	const struct recurrence_backward_args args = {
	        .forward = recurrence_args(ctx, config, shape, memory),
	        .dout = whole(ctx, config, shape, memory->scratch[SCRATCH_DMIX]),
	        .dz = column_block(ctx, config, shape, dproj, 0),
	        .dx = column_block(ctx, config, shape, dproj, 1),
	        .dgate = column_block(ctx, config, shape, dproj, 2),
	        .dgate_bias = memory->grad[PARAM_GATE_BIAS],
	};
	enum status status = mixing_out_proj_backward(ctx, config, shape, memory, dy);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_RECURRENCE_BACKWARD, &args);
	if (status == STATUS_OK)
		status = mixing_in_proj_backward(ctx, config, shape, memory, proj_width(config), x,
		                                 dy, dx);
	return status;
}

static enum status recurrence_step(struct context *ctx, const struct layer_config *config,
                                   const struct layer_shape *shape, struct layer_memory *memory,
                                   const int32_t *position, int64_t position_hint, const void *x,
                                   void *y)
{
	void *proj = memory->saved[SAVED_PROJ];
	const struct recurrence_step_args args = {
	        .batch = shape->batch,
	        .d_model = config->d_model,
	        .form = GATE_SIGMOID,
	        .z = column_block(ctx, config, shape, proj, 0),
	        .x = column_block(ctx, config, shape, proj, 1),
	        .gate = column_block(ctx, config, shape, proj, 2),
	        .gate_bias = memory->param[PARAM_GATE_BIAS],
	        .h = memory->state[STATE_H],
	        .out = whole(ctx, config, shape, memory->saved[SAVED_MIX]),
	};
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	(void)position;
	(void)position_hint;
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_RECURRENCE_STEP, &args);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

/* The reference's own copies of z, v, g [n, D] in one piece of memory, `extra` doubles behind. */
static enum status reference_inputs(const struct layer_config *config, const double *const *param,
                                    int64_t n_seq, int64_t seq_len, const double *proj,
                                    int64_t extra, double **memory, struct reference_recurrence *r)
{
	int64_t n = n_seq * seq_len, count = n * config->d_model;
	enum status status = reference_take(3 * count + extra, memory);

	if (status != STATUS_OK)
		return status;
	for (int64_t i = 0; i < 3; i++)
		reference_get_columns(n, proj_width(config), i * config->d_model, config->d_model,
		                      proj, *memory + i * count);
	*r = (struct reference_recurrence){
	        .batch = n_seq,
	        .seq_len = seq_len,
	        .d_model = config->d_model,
	        .form = GATE_SIGMOID,
	        .z = *memory,
	        .x = *memory + count,
	        .gate = *memory + 2 * count,
	        .gate_bias = param[PARAM_GATE_BIAS],
	};
	return STATUS_OK;
}

static enum status reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix)
{
	int64_t count = n_seq * seq_len * config->d_model;
	struct reference_recurrence r;
	double *memory;
	enum status status =
	        reference_inputs(config, param, n_seq, seq_len, proj, count, &memory, &r);

	if (status != STATUS_OK)
		return status;
	double *out = memory + 3 * count;
	reference_recurrence_forward(&r, out, NULL, NULL);
	reference_get_rows(config->d_model, n_rows, rows, out, mix);
	reference_release(memory);
	return STATUS_OK;
}

static enum status reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad)
{
	int64_t d = config->d_model, n = batch * seq_len, count = n * d;
	struct reference_recurrence r;
	double *memory;
	enum status status =
	        reference_inputs(config, param, batch, seq_len, proj, 3 * count + d, &memory, &r);

	if (status != STATUS_OK)
		return status;
	double *gradients = memory + 3 * count, *dgate_bias = gradients + 3 * count;
	const struct reference_recurrence_grads grads = {
	        .dz = gradients,
	        .dx = gradients + count,
	        .dgate = gradients + 2 * count,
	        .dgate_bias = dgate_bias,
	};

	status = reference_recurrence_backward(&r, dmix, &grads);
	for (int64_t i = 0; i < 3; i++)
		reference_set_columns(n, proj_width(config), i * d, d, gradients + i * count,
		                      dproj);
	mixing_add(d, dgate_bias, grad[PARAM_GATE_BIAS]);
	reference_release(memory);
	return status;
}

static enum status reference_dproj_rows(const struct layer_config *config,
                                        const double *const *param, const struct layer_run *run,
                                        int64_t seq_len, const double *proj, const double *dmix,
                                        int64_t n_rows, const int64_t *rows, double *dproj)
{
	int64_t d = config->d_model, count = seq_len * d;
	struct reference_recurrence r;
	double *memory;
	enum status status =
	        reference_inputs(config, param, 1, seq_len, proj, 3 * count, &memory, &r);

	(void)run;
	if (status != STATUS_OK)
		return status;
	double *gradients = memory + 3 * count;
	const struct reference_recurrence_grads grads = {
	        .dz = gradients, .dx = gradients + count, .dgate = gradients + 2 * count};

	status = reference_in_use()->recurrence_backward(&r, dmix, &grads);
	for (int64_t i = 0; i < 3 && status == STATUS_OK; i++)
		status = mixing_set_rows(proj_width(config), i * d, d, n_rows, rows,
		                         gradients + i * count, dproj);
	reference_release(memory);
	return status;
}

/* The bias is added to g. */
static int64_t summed_columns(const struct layer_config *config, int index)
{
	return index == PARAM_GATE_BIAS ? 2 * config->d_model : -1;
}

static enum status reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix)
{
	int64_t count = n_seq * config->d_model;
	struct reference_recurrence r;
	double *memory;
	enum status status = reference_inputs(config, param, n_seq, 1, proj, count, &memory, &r);

	(void)shape;
	(void)position;
	if (status != STATUS_OK)
		return status;
	double *h0 = memory + 3 * count;
	mixing_copy(count, state[STATE_H], h0);
	r.h0 = h0;
	reference_recurrence_forward(&r, mix, NULL, state[STATE_H]);
	reference_release(memory);
	return STATUS_OK;
}

static int recurrence_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int n = mixing_golden_names(config, proj_width(config), names);

	names[n++] = (struct golden_name){"gate_bias", PARAM_GATE_BIAS, 0, config->d_model};
	return n;
}

const struct layer_class recurrence_layer = {
        .name = "recurrence",
        .tunables = "",
        .check = recurrence_check,
        .parameters = recurrence_parameters,
        .state = recurrence_state,
        .saved = recurrence_saved,
        .scratch = recurrence_scratch,
        .forward = recurrence_forward,
        .backward = recurrence_backward,
        .step = recurrence_step,
        .reference_anywhere = true,
        .reference_mix = reference_mix,
        .reference_step = reference_step,
        .reference_mix_backward = reference_mix_backward,
        .reference_dproj_rows = reference_dproj_rows,
        .summed_columns = summed_columns,
        .golden_names = recurrence_golden_names,
};
