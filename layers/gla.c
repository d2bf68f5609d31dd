/*
 * Gated linear attention: S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t
 * / sqrt(d_k), then a per-head norm times silu(output gate). InProj's columns
 * are q, k (D/2 each), v (D), the gate's low-rank input (16), the output gate (D).
 */
#include <math.h>
#include <stdlib.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"

enum { GATE_RANK = 16, GATE_NORMALIZER = 16 };
static const float out_norm_eps = 1e-5f;

enum { PARAM_GK_WEIGHT = PARAM_OTHER, PARAM_GK_BIAS, PARAM_OUT_NORM, N_PARAMS };
enum { STATE_S };
enum { SAVED_LOG_DECAY = SAVED_OTHER, SAVED_OUT, SAVED_OUT_RSTD, N_SAVED };
enum { SCRATCH_DOUT = SCRATCH_OTHER, SCRATCH_DLOG_DECAY, SCRATCH_DLOGIT, N_SCRATCH };

/* Column blocks of InProj's output, in order. */
enum block { BLOCK_Q, BLOCK_K, BLOCK_V, BLOCK_LOW_RANK, BLOCK_GATE, N_BLOCKS };

static int64_t key_width(const struct layer_config *config)
{
	return config->d_model / 2;
}

static int64_t block_width(const struct layer_config *config, enum block block)
{
	if (block == BLOCK_LOW_RANK)
		return GATE_RANK;
	return block <= BLOCK_K ? key_width(config) : config->d_model;
}

static int64_t block_column(const struct layer_config *config, enum block block)
{
	int64_t column = 0;

	for (enum block i = 0; i < block; i++)
		column += block_width(config, i);
	return column;
}

static int64_t proj_width(const struct layer_config *config)
{
	return block_column(config, N_BLOCKS);
}

static enum status gla_check(const struct layer_config *config)
{
	if (config->chunk < 0)
		return status_set(STATUS_INVALID,
		                  "--chunk: %lld (allowed for gla: 1 or more, 0: automatic)",
		                  (long long)config->chunk);
	if (config->n_heads > 0 && config->d_model % (2 * config->n_heads) != 0)
		return status_set(
		        STATUS_INVALID,
		        "--heads: %lld do not split gla's keys of width %lld / 2 (allowed: "
		        "a divisor of that)",
		        (long long)config->n_heads, (long long)config->d_model);
	return mixing_check(config, false);
}

static int gla_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int64_t d = config->d_model;

	mixing_parameters(config, proj_width(config), specs);
	specs[PARAM_GK_WEIGHT] = (struct tensor_spec){
	        "gk_weight", STORAGE_ACTIVATION, 2, {key_width(config), GATE_RANK}, INIT_NORMAL};
	specs[PARAM_GK_BIAS] =
	        (struct tensor_spec){"gk_bias", STORAGE_FP32, 1, {key_width(config)}, INIT_ZEROS};
	specs[PARAM_OUT_NORM] =
	        (struct tensor_spec){"out_norm", STORAGE_FP32, 1, {d / config->n_heads}, INIT_ONES};
	return N_PARAMS;
}

static int gla_state(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t h = config->n_heads, d_v = shape->capacity > 0 ? config->d_model / h : 0;

	specs[STATE_S] = (struct tensor_spec){
	        "s", STORAGE_FP32, 4, {shape->batch, h, key_width(config) / h, d_v}, INIT_ZEROS};
	return 1;
}

static int gla_saved(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, train = shape->pass == PASS_TRAIN ? 1 : 0;

	mixing_saved(config, shape, proj_width(config), specs);
	specs[SAVED_LOG_DECAY] = (struct tensor_spec){
	        "log_decay", STORAGE_ACTIVATION, 2, {n, key_width(config)}, INIT_ZEROS};
	specs[SAVED_OUT] = (struct tensor_spec){
	        "out", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	specs[SAVED_OUT_RSTD] = (struct tensor_spec){
	        "out_rstd", STORAGE_FP32, 2, {train * n, config->n_heads}, INIT_ZEROS};
	return N_SAVED;
}

static int gla_scratch(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len;

	mixing_scratch(config, shape, proj_width(config), specs);
	specs[SCRATCH_DOUT] = (struct tensor_spec){
	        "dout", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	specs[SCRATCH_DLOG_DECAY] = (struct tensor_spec){
	        "dlog_decay", STORAGE_ACTIVATION, 2, {n, key_width(config)}, INIT_ZEROS};
	specs[SCRATCH_DLOGIT] = (struct tensor_spec){
	        "dlogit", STORAGE_ACTIVATION, 2, {n, key_width(config)}, INIT_ZEROS};
	return N_SCRATCH;
}

/* A q, k, v block of InProj's output or its gradient, as heads. */
static struct view column_block(const struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, void *proj, enum block block)
{
	return mixing_columns(ctx, proj, shape->seq_len, proj_width(config),
	                      block_column(config, block),
	                      block_width(config, block) / config->n_heads);
}

/* A whole tensor [N, width] as heads. */
static struct view whole(const struct context *ctx, const struct layer_config *config,
                         const struct layer_shape *shape, void *tensor, int64_t width)
{
	return mixing_columns(ctx, tensor, shape->seq_len, width, 0, width / config->n_heads);
}

static struct decay_gate_args decay_args(const struct context *ctx,
                                         const struct layer_config *config,
                                         const struct layer_shape *shape,
                                         const struct layer_memory *memory)
{
	return (struct decay_gate_args){
	        .n_tokens = shape->batch * shape->seq_len,
	        .rank = GATE_RANK,
	        .d_out = key_width(config),
	        .x_stride = proj_width(config),
	        .normalizer = GATE_NORMALIZER,
	        .x = mixing_column(ctx, memory->saved[SAVED_PROJ],
	                           block_column(config, BLOCK_LOW_RANK)),
	        .weight = memory->param[PARAM_GK_WEIGHT],
	        .bias = memory->param[PARAM_GK_BIAS],
	        .log_decay = memory->saved[SAVED_LOG_DECAY],
	};
}

static struct matrix_recurrence_args recurrence_args(const struct context *ctx,
                                                     const struct layer_config *config,
                                                     const struct layer_shape *shape,
                                                     const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ];
	int64_t d_k = key_width(config) / config->n_heads;

	return (struct matrix_recurrence_args){
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .n_heads = config->n_heads,
	        .d_k = d_k,
	        .d_v = config->d_model / config->n_heads,
	        .decay = DECAY_DIAGONAL,
	        .rule = RULE_PLAIN,
	        .chunk = config->chunk,
	        .scale = 1.0f / sqrtf((float)d_k),
	        .q = column_block(ctx, config, shape, proj, BLOCK_Q),
	        .k = column_block(ctx, config, shape, proj, BLOCK_K),
	        .v = column_block(ctx, config, shape, proj, BLOCK_V),
	        .log_decay = whole(ctx, config, shape, memory->saved[SAVED_LOG_DECAY],
	                           key_width(config)),
	        .out = whole(ctx, config, shape, memory->saved[SAVED_OUT], config->d_model),
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
	        .d_head = config->d_model / config->n_heads,
	        .gate_stride = proj_width(config),
	        .eps = out_norm_eps,
	        .x = memory->saved[SAVED_OUT],
	        .weight = memory->param[PARAM_OUT_NORM],
	        .gate = mixing_column(ctx, memory->saved[SAVED_PROJ],
	                              block_column(config, BLOCK_GATE)),
	        .rstd = memory->saved[SAVED_OUT_RSTD],
	        .out = memory->saved[SAVED_MIX],
	};
}

static enum status gla_forward(struct context *ctx, const struct layer_config *config,
                               const struct layer_shape *shape, struct layer_memory *memory,
                               const void *x, void *y)
{
	const struct decay_gate_args decay = decay_args(ctx, config, shape, memory);
	const struct matrix_recurrence_args recurrence =
	        recurrence_args(ctx, config, shape, memory);
	const struct norm_gate_args gate = gate_args(ctx, config, shape, memory);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_DECAY_GATE, &decay);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_MATRIX_RECURRENCE, &recurrence);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_GATE, &gate);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

static enum status gla_backward(struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, struct layer_memory *memory,
                                const void *x, const void *dy, void *dx)
{
	void *dproj = memory->scratch[SCRATCH_DPROJ], *const *scratch = memory->scratch;
	const struct norm_gate_backward_args gate = {
	        .forward = gate_args(ctx, config, shape, memory),
	        .dout = scratch[SCRATCH_DMIX],
	        .dx = scratch[SCRATCH_DOUT],
	        .dgate = mixing_column(ctx, dproj, block_column(config, BLOCK_GATE)),
	        .dweight = memory->grad[PARAM_OUT_NORM],
	};
	const struct matrix_recurrence_backward_args recurrence = {
	        .forward = recurrence_args(ctx, config, shape, memory),
	        .dout = whole(ctx, config, shape, scratch[SCRATCH_DOUT], config->d_model),
	        .dq = column_block(ctx, config, shape, dproj, BLOCK_Q),
	        .dk = column_block(ctx, config, shape, dproj, BLOCK_K),
	        .dv = column_block(ctx, config, shape, dproj, BLOCK_V),
	        .dlog_decay =
	                whole(ctx, config, shape, scratch[SCRATCH_DLOG_DECAY], key_width(config)),
	};
	const struct decay_gate_backward_args decay = {
	        .forward = decay_args(ctx, config, shape, memory),
	        .dlog_decay = scratch[SCRATCH_DLOG_DECAY],
	        .dx = mixing_column(ctx, dproj, block_column(config, BLOCK_LOW_RANK)),
	        .dlogit = scratch[SCRATCH_DLOGIT],
	        .dweight = memory->grad[PARAM_GK_WEIGHT],
	        .dbias = memory->grad[PARAM_GK_BIAS],
	};
	enum status status = mixing_out_proj_backward(ctx, config, shape, memory, dy);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_GATE_BACKWARD, &gate);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_MATRIX_RECURRENCE_BACKWARD, &recurrence);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_DECAY_GATE_BACKWARD, &decay);
	if (status == STATUS_OK)
		status = mixing_in_proj_backward(ctx, config, shape, memory, proj_width(config), x,
		                                 dy, dx);
	return status;
}

static enum status gla_step(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const int32_t *position, int64_t position_hint, const void *x, void *y)
{
	const struct decay_gate_args decay = decay_args(ctx, config, shape, memory);
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
	        .log_decay = full.log_decay,
	        .state = memory->state[STATE_S],
	        .out = full.out,
	};
	const struct norm_gate_args gate = gate_args(ctx, config, shape, memory);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	(void)position;
	(void)position_hint;
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_DECAY_GATE, &decay);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_MATRIX_RECURRENCE_STEP, &recurrence);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_NORM_GATE, &gate);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

/* A reference's tensors: the blocks of InProj, decays and output; or their gradients. */
struct reference_tensors {
	double *memory;
	double *block[N_BLOCKS];
	double *log_decay, *out;
};

static enum status take_tensors(const struct layer_config *config, int64_t n,
                                struct reference_tensors *r)
{
	enum status status = reference_take(
	        n * (proj_width(config) + key_width(config) + config->d_model), &r->memory);

	if (status != STATUS_OK)
		return status;
	for (enum block i = 0; i < N_BLOCKS; i++)
		r->block[i] = r->memory + n * block_column(config, i);
	r->log_decay = r->memory + n * proj_width(config);
	r->out = r->log_decay + n * key_width(config);
	return STATUS_OK;
}

/* Splits proj and computes the decays; *m is then ready for a forward or backward run. */
static void reference_inputs(const struct layer_config *config, const double *const *param,
                             int64_t n_seq, int64_t seq_len, const double *proj,
                             const struct reference_tensors *r, struct reference_matrix *m)
{
	int64_t n = n_seq * seq_len, d_k = key_width(config) / config->n_heads;

	for (enum block i = 0; i < N_BLOCKS; i++)
		reference_get_columns(n, proj_width(config), block_column(config, i),
		                      block_width(config, i), proj, r->block[i]);
	reference_decay_gate(n, GATE_RANK, key_width(config), GATE_NORMALIZER,
	                     r->block[BLOCK_LOW_RANK], param[PARAM_GK_WEIGHT], param[PARAM_GK_BIAS],
	                     r->log_decay);
	*m = (struct reference_matrix){
	        .batch = n_seq,
	        .seq_len = seq_len,
	        .n_heads = config->n_heads,
	        .d_k = d_k,
	        .d_v = config->d_model / config->n_heads,
	        .decay = DECAY_DIAGONAL,
	        .rule = RULE_PLAIN,
	        .scale = 1 / sqrt((double)d_k),
	        .q = r->block[BLOCK_Q],
	        .k = r->block[BLOCK_K],
	        .v = r->block[BLOCK_V],
	        .log_decay = r->log_decay,
	};
}

/* Into r->v, which is no longer needed, all of mix from the recurrence's output. */
static double *reference_out(const struct layer_config *config, const double *const *param,
                             int64_t n, const struct reference_tensors *r)
{
	double *mix = r->block[BLOCK_V];

	reference_norm_gate(n, config->n_heads, config->d_model / config->n_heads, out_norm_eps,
	                    r->out, param[PARAM_OUT_NORM], r->block[BLOCK_GATE], mix, NULL);
	return mix;
}

static enum status reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix)
{
	struct reference_tensors r;
	struct reference_matrix m;
	enum status status = take_tensors(config, n_seq * seq_len, &r);

	if (status != STATUS_OK)
		return status;
	reference_inputs(config, param, n_seq, seq_len, proj, &r, &m);
	status = reference_matrix_forward(&m, r.out, NULL);
	reference_get_rows(config->d_model, n_rows, rows,
	                   reference_out(config, param, n_seq * seq_len, &r), mix);
	reference_release(r.memory);
	return status;
}

static enum status reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix)
{
	int64_t count = n_seq * key_width(config) * config->d_model / config->n_heads;
	struct reference_tensors r;
	struct reference_matrix m;
	double *h0 = NULL;
	enum status status = take_tensors(config, n_seq, &r);

	(void)shape;
	(void)position;
	if (status != STATUS_OK)
		return status;
	status = reference_take(count, &h0);
	if (status == STATUS_OK) {
		reference_inputs(config, param, n_seq, 1, proj, &r, &m);
		mixing_copy(count, state[STATE_S], h0);
		m.h0 = h0;
		status = reference_matrix_forward(&m, r.out, state[STATE_S]);
		mixing_copy(n_seq * config->d_model, reference_out(config, param, n_seq, &r), mix);
	}
	reference_release(h0);
	reference_release(r.memory);
	return status;
}

/* The three backward references one after the other: norm and gate, recurrence, decay. */
static enum status backward_through(const struct layer_config *config, const double *const *param,
                                    const struct reference_matrix *m,
                                    const struct reference_tensors *r, const double *dmix,
                                    const struct reference_tensors *g, double *const *dparam)
{
	int64_t n = m->batch * m->seq_len;
	const struct reference_matrix_grads grads = {.dq = g->block[BLOCK_Q],
	                                             .dk = g->block[BLOCK_K],
	                                             .dv = g->block[BLOCK_V],
	                                             .dlog_decay = g->log_decay};
	enum status status = reference_norm_gate_backward(
	        n, m->n_heads, m->d_v, out_norm_eps, r->out, param[PARAM_OUT_NORM],
	        r->block[BLOCK_GATE], dmix, g->out, g->block[BLOCK_GATE], dparam[PARAM_OUT_NORM]);

	if (status == STATUS_OK)
		status = reference_matrix_backward(m, g->out, &grads);
	if (status == STATUS_OK)
		status = reference_decay_gate_backward(
		        n, GATE_RANK, key_width(config), GATE_NORMALIZER, r->block[BLOCK_LOW_RANK],
		        param[PARAM_GK_WEIGHT], param[PARAM_GK_BIAS], g->log_decay,
		        g->block[BLOCK_LOW_RANK], dparam[PARAM_GK_WEIGHT], dparam[PARAM_GK_BIAS]);
	return status;
}

static enum status reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad)
{
	struct reference_tensors r = {0}, g = {0};
	struct reference_matrix m;
	struct tensor_spec specs[MAX_TENSORS];
	double *dparam[N_PARAMS] = {0};
	int64_t n = batch * seq_len;
	enum status status = take_tensors(config, n, &r);

	gla_parameters(config, specs);
	if (status == STATUS_OK)
		status = take_tensors(config, n, &g);
	for (int i = PARAM_OTHER; i < N_PARAMS && status == STATUS_OK; i++)
		status = reference_take(tensor_count(&specs[i]), &dparam[i]);
	if (status == STATUS_OK) {
		reference_inputs(config, param, batch, seq_len, proj, &r, &m);
		status = reference_matrix_forward(&m, r.out, NULL);
	}
	if (status == STATUS_OK)
		status = backward_through(config, param, &m, &r, dmix, &g, dparam);
	for (enum block i = 0; i < N_BLOCKS && status == STATUS_OK; i++)
		reference_set_columns(n, proj_width(config), block_column(config, i),
		                      block_width(config, i), g.block[i], dproj);
	for (int i = PARAM_OTHER; i < N_PARAMS && status == STATUS_OK; i++)
		mixing_add(tensor_count(&specs[i]), dparam[i], grad[i]);
	for (int i = PARAM_OTHER; i < N_PARAMS; i++)
		reference_release(dparam[i]);
	reference_release(r.memory);
	reference_release(g.memory);
	return status;
}

static int gla_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int64_t d = config->d_model, d_k = key_width(config);
	const struct golden_name list[] = {
	        {"input_norm.weight", PARAM_NORM, 0, d},
	        {"q_proj.weight", PARAM_IN_PROJ, block_column(config, BLOCK_Q), d_k},
	        {"k_proj.weight", PARAM_IN_PROJ, block_column(config, BLOCK_K), d_k},
	        {"v_proj.weight", PARAM_IN_PROJ, block_column(config, BLOCK_V), d},
	        {"gk_proj.0.weight", PARAM_IN_PROJ, block_column(config, BLOCK_LOW_RANK),
	         GATE_RANK},
	        {"g_proj.weight", PARAM_IN_PROJ, block_column(config, BLOCK_GATE), d},
	        {"gk_proj.1.weight", PARAM_GK_WEIGHT, 0, d_k},
	        {"gk_proj.1.bias", PARAM_GK_BIAS, 0, d_k},
	        {"g_norm.weight", PARAM_OUT_NORM, 0, d / config->n_heads},
	        {"o_proj.weight", PARAM_OUT_PROJ, 0, d},
	};
	int n = sizeof list / sizeof list[0];

	for (int i = 0; i < n; i++)
		names[i] = list[i];
	return n;
}

const struct layer_class gla_layer = {
        .name = "gla",
        .tunables = "chunk",
        .check = gla_check,
        .parameters = gla_parameters,
        .state = gla_state,
        .saved = gla_saved,
        .scratch = gla_scratch,
        .forward = gla_forward,
        .backward = gla_backward,
        .step = gla_step,
        .reference_anywhere = true,
        .reference_mix = reference_mix,
        .reference_step = reference_step,
        .reference_mix_backward = reference_mix_backward,
        .golden_names = gla_golden_names,
};
