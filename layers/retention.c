/*
 * Multi-scale retention (RetNet, arXiv 2307.08621), without its rotation: S_t =
 * gamma_h S_{t-1} + k_t^T v_t with gamma_h = 1 - 2^(-5-h), o_t = q_t S_t / sqrt(d),
 * then a per-head norm times silu(gate). InProj's columns are q, k, v, gate.
 */
#include <math.h>
#include <stdlib.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"

static const float out_norm_eps = 1e-5f;

enum { PARAM_OUT_NORM = PARAM_OTHER };
enum { STATE_S };
enum { SAVED_OUT = SAVED_OTHER, SAVED_OUT_RSTD, N_SAVED };
enum { SCRATCH_DOUT = SCRATCH_OTHER, N_SCRATCH };

/* Column blocks of InProj's output, in order, D wide each. */
enum { BLOCK_Q, BLOCK_K, BLOCK_V, BLOCK_GATE, N_BLOCKS };

static int64_t proj_width(const struct layer_config *config)
{
	return N_BLOCKS * config->d_model;
}

static int64_t head_width(const struct layer_config *config)
{
	return config->d_model / config->n_heads;
}

static enum status retention_check(const struct layer_config *config)
{
	if (config->chunk < 0)
		return status_set(STATUS_INVALID,
		                  "--chunk: %lld (allowed for retention: 1 or more, 0: automatic)",
		                  (long long)config->chunk);
	return mixing_check(config, false);
}

static int retention_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int n = mixing_parameters(config, proj_width(config), specs);

	specs[n++] =
	        (struct tensor_spec){"out_norm", STORAGE_FP32, 1, {head_width(config)}, INIT_ONES};
	return n;
}

static int retention_state(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	int64_t d = head_width(config), d_v = shape->capacity > 0 ? d : 0;

	specs[STATE_S] = (struct tensor_spec){
	        "s", STORAGE_FP32, 4, {shape->batch, config->n_heads, d, d_v}, INIT_ZEROS};
	return 1;
}

static int retention_saved(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, train = shape->pass == PASS_TRAIN ? n : 0;

	mixing_saved(config, shape, proj_width(config), specs);
	specs[SAVED_OUT] = (struct tensor_spec){
	        "out", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	specs[SAVED_OUT_RSTD] = (struct tensor_spec){
	        "out_rstd", STORAGE_FP32, 2, {train, config->n_heads}, INIT_ZEROS};
	return N_SAVED;
}

static int retention_scratch(const struct layer_config *config, const struct layer_shape *shape,
                             struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len;

	mixing_scratch(config, shape, proj_width(config), specs);
	specs[SCRATCH_DOUT] = (struct tensor_spec){
	        "dout", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	return N_SCRATCH;
}

/* A column block of InProj's output or its gradient, as heads. */
static struct view column_block(const struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, void *proj, int64_t block)
{
	return mixing_columns(ctx, proj, shape->seq_len, proj_width(config),
	                      block * config->d_model, head_width(config));
}

/* A whole tensor [N, D] as heads. */
static struct view whole(const struct context *ctx, const struct layer_config *config,
                         const struct layer_shape *shape, void *tensor)
{
	return mixing_columns(ctx, tensor, shape->seq_len, config->d_model, 0, head_width(config));
}

static struct matrix_recurrence_args recurrence_args(const struct context *ctx,
                                                     const struct layer_config *config,
                                                     const struct layer_shape *shape,
                                                     const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ];
	int64_t d = head_width(config);

	return (struct matrix_recurrence_args){
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .n_heads = config->n_heads,
	        .d_k = d,
	        .d_v = d,
	        .decay = DECAY_CONSTANT,
	        .rule = RULE_PLAIN,
	        .chunk = config->chunk,
	        .scale = 1.0f / sqrtf((float)d),
	        .q = column_block(ctx, config, shape, proj, BLOCK_Q),
	        .k = column_block(ctx, config, shape, proj, BLOCK_K),
	        .v = column_block(ctx, config, shape, proj, BLOCK_V),
	        .out = whole(ctx, config, shape, memory->saved[SAVED_OUT]),
	        .final_state = memory->state[STATE_S],
	};
}

static struct norm_gate_args gate_args(const struct context *ctx, const struct layer_config *config,
                                       const struct layer_shape *shape,
                                       const struct layer_memory *memory)
{
	return (struct norm_gate_args){
	        .n_tokens = shape->batch * shape->seq_len,
	        .n_heads = config->n_heads,
	        .d_head = head_width(config),
	        .gate_stride = proj_width(config),
	        .eps = out_norm_eps,
	        .x = memory->saved[SAVED_OUT],
	        .weight = memory->param[PARAM_OUT_NORM],
	        .gate = mixing_column(ctx, memory->saved[SAVED_PROJ], BLOCK_GATE * config->d_model),
	        .rstd = memory->saved[SAVED_OUT_RSTD],
	        .out = memory->saved[SAVED_MIX],
	};
}

static enum status retention_forward(struct context *ctx, const struct layer_config *config,
                                     const struct layer_shape *shape, struct layer_memory *memory,
                                     const void *x, void *y)
{
	const struct matrix_recurrence_args recurrence =
	        recurrence_args(ctx, config, shape, memory);
	const struct norm_gate_args gate = gate_args(ctx, config, shape, memory);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_MATRIX_RECURRENCE, &recurrence);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_GATE, &gate);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

static enum status retention_backward(struct context *ctx, const struct layer_config *config,
                                      const struct layer_shape *shape, struct layer_memory *memory,
                                      const void *x, const void *dy, void *dx)
{
	void *dproj = memory->scratch[SCRATCH_DPROJ], *dout = memory->scratch[SCRATCH_DOUT];
	const struct norm_gate_backward_args gate = {
	        .forward = gate_args(ctx, config, shape, memory),
	        .dout = memory->scratch[SCRATCH_DMIX],
	        .dx = dout,
	        .dgate = mixing_column(ctx, dproj, BLOCK_GATE * config->d_model),
	        .dweight = memory->grad[PARAM_OUT_NORM],
	};
	const struct matrix_recurrence_backward_args recurrence = {
	        .forward = recurrence_args(ctx, config, shape, memory),
	        .dout = whole(ctx, config, shape, dout),
	        .dq = column_block(ctx, config, shape, dproj, BLOCK_Q),
	        .dk = column_block(ctx, config, shape, dproj, BLOCK_K),
	        .dv = column_block(ctx, config, shape, dproj, BLOCK_V),
	};
	enum status status = mixing_out_proj_backward(ctx, config, shape, memory, dy);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_GATE_BACKWARD, &gate);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_MATRIX_RECURRENCE_BACKWARD, &recurrence);
	if (status == STATUS_OK)
		status = mixing_in_proj_backward(ctx, config, shape, memory, proj_width(config), x,
		                                 dy, dx);
	return status;
}

static enum status retention_step(struct context *ctx, const struct layer_config *config,
                                  const struct layer_shape *shape, struct layer_memory *memory,
                                  const int32_t *position, int64_t position_hint, const void *x,
                                  void *y)
{
	const struct matrix_recurrence_args full = recurrence_args(ctx, config, shape, memory);
	const struct matrix_recurrence_step_args recurrence = {
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
	        .state = memory->state[STATE_S],
	        .out = full.out,
	};
	const struct norm_gate_args gate = gate_args(ctx, config, shape, memory);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	(void)position;
	(void)position_hint;
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_MATRIX_RECURRENCE_STEP, &recurrence);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_GATE, &gate);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

/* The reference's own copies of q, k, v, gate [n, D] and room for the output [n, D], in one piece
 * of memory with `extra` doubles behind. */
static enum status reference_inputs(const struct layer_config *config, int64_t n_seq,
                                    int64_t seq_len, const double *proj, int64_t extra,
                                    double *block[N_BLOCKS + 1], struct reference_matrix *m)
{
	int64_t d = config->d_model, n = n_seq * seq_len, width = head_width(config);
	double *memory;
	enum status status = reference_take((N_BLOCKS + 1) * n * d + extra, &memory);

	block[0] = NULL;
	if (status != STATUS_OK)
		return status;
	for (int i = 0; i <= N_BLOCKS; i++)
		block[i] = memory + i * n * d;
	for (int i = 0; i < N_BLOCKS; i++)
		reference_get_columns(n, proj_width(config), i * d, d, proj, block[i]);
	*m = (struct reference_matrix){
	        .batch = n_seq,
	        .seq_len = seq_len,
	        .n_heads = config->n_heads,
	        .d_k = width,
	        .d_v = width,
	        .decay = DECAY_CONSTANT,
	        .rule = RULE_PLAIN,
	        .scale = 1 / sqrt((double)width),
	        .q = block[BLOCK_Q],
	        .k = block[BLOCK_K],
	        .v = block[BLOCK_V],
	};
	return STATUS_OK;
}

/* All of mix from the recurrence's output, in the place of v, which is no longer needed. */
static const double *reference_gate(const struct reference_matrix *m, const double *const *param,
                                    double *const *block)
{
	reference_norm_gate(m->batch * m->seq_len, m->n_heads, m->d_v, out_norm_eps,
	                    block[N_BLOCKS], param[PARAM_OUT_NORM], block[BLOCK_GATE],
	                    block[BLOCK_V], NULL);
	return block[BLOCK_V];
}

static enum status reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix)
{
	double *block[N_BLOCKS + 1];
	struct reference_matrix m;
	enum status status = reference_inputs(config, n_seq, seq_len, proj, 0, block, &m);

	if (status == STATUS_OK)
		status = reference_matrix_forward(&m, block[N_BLOCKS], NULL);
	if (status == STATUS_OK)
		reference_get_rows(config->d_model, n_rows, rows, reference_gate(&m, param, block),
		                   mix);
	reference_release(block[0]);
	return status;
}

static enum status reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix)
{
	int64_t count = n_seq * config->d_model * head_width(config);
	double *block[N_BLOCKS + 1];
	struct reference_matrix m;
	enum status status = reference_inputs(config, n_seq, 1, proj, count, block, &m);

	(void)shape;
	(void)position;
	if (status == STATUS_OK) {
		double *h0 = block[N_BLOCKS] + n_seq * config->d_model;

		mixing_copy(count, state[STATE_S], h0);
		m.h0 = h0;
		status = reference_matrix_forward(&m, block[N_BLOCKS], state[STATE_S]);
	}
	if (status == STATUS_OK)
		mixing_copy(n_seq * config->d_model, reference_gate(&m, param, block), mix);
	reference_release(block[0]);
	return status;
}

static enum status reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad)
{
	int64_t d = config->d_model, n = batch * seq_len, width = head_width(config);
	double *block[N_BLOCKS + 1], *gradient[N_BLOCKS + 1];
	struct reference_matrix m;
	enum status status =
	        reference_inputs(config, batch, seq_len, proj, 5 * n * d + width, block, &m);

	if (status == STATUS_OK)
		status = reference_matrix_forward(&m, block[N_BLOCKS], NULL);
	if (status == STATUS_OK) {
		for (int i = 0; i <= N_BLOCKS; i++)
			gradient[i] = block[N_BLOCKS] + (i + 1) * n * d;
		double *dweight = gradient[N_BLOCKS] + n * d;

		status = reference_norm_gate_backward(
		        n, m.n_heads, width, out_norm_eps, block[N_BLOCKS], param[PARAM_OUT_NORM],
		        block[BLOCK_GATE], dmix, gradient[N_BLOCKS], gradient[BLOCK_GATE], dweight);
		mixing_add(width, dweight, grad[PARAM_OUT_NORM]);
	}
	if (status == STATUS_OK) {
		const struct reference_matrix_grads grads = {
		        .dq = gradient[BLOCK_Q],
		        .dk = gradient[BLOCK_K],
		        .dv = gradient[BLOCK_V],
		};

		status = reference_matrix_backward(&m, gradient[N_BLOCKS], &grads);
		for (int i = 0; i < N_BLOCKS; i++)
			reference_set_columns(n, proj_width(config), i * d, d, gradient[i], dproj);
	}
	reference_release(block[0]);
	return status;
}

static int retention_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int64_t d = config->d_model;
	const struct golden_name list[] = {
	        {"input_norm.weight", PARAM_NORM, 0, d},
	        {"q_proj.weight", PARAM_IN_PROJ, BLOCK_Q * d, d},
	        {"k_proj.weight", PARAM_IN_PROJ, BLOCK_K * d, d},
	        {"v_proj.weight", PARAM_IN_PROJ, BLOCK_V * d, d},
	        {"g_proj.weight", PARAM_IN_PROJ, BLOCK_GATE * d, d},
	        {"g_norm.weight", PARAM_OUT_NORM, 0, head_width(config)},
	        {"o_proj.weight", PARAM_OUT_PROJ, 0, d},
	};
	int n = sizeof list / sizeof list[0];

	for (int i = 0; i < n; i++)
		names[i] = list[i];
	return n;
}

const struct layer_class retention_layer = {
        .name = "retention",
        .tunables = "chunk",
        .check = retention_check,
        .parameters = retention_parameters,
        .state = retention_state,
        .saved = retention_saved,
        .scratch = retention_scratch,
        .forward = retention_forward,
        .backward = retention_backward,
        .step = retention_step,
        .reference_anywhere = true,
        .reference_mix = reference_mix,
        .reference_step = reference_step,
        .reference_mix_backward = reference_mix_backward,
        .golden_names = retention_golden_names,
};
