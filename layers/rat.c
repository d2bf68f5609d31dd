/*
 * RAT: a gated recurrence inside each chunk, attention to the chunks before
 * it. InProj's columns are z, v, g (D each), then q, k (one head width per group).
 */
#include <math.h>
#include <stdlib.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"

enum { PARAM_GATE_BIAS = PARAM_OTHER };
enum { STATE_K_CHUNK, STATE_V_CHUNK, STATE_K, STATE_V, N_STATES };
enum {
	SAVED_V_SCAN = SAVED_OTHER,
	SAVED_OWN_SCORE,
	SAVED_Q_OUT,   /* training; otherwise q is rotated in place */
	SAVED_K_CHUNK, /* without a cache */
	SAVED_V_CHUNK,
	SAVED_UNGATED, /* training */
	SAVED_LSE,     /* training */
	N_SAVED
};
enum {
	SCRATCH_DV_SCAN = SCRATCH_OTHER,
	SCRATCH_DOWN_SCORE,
	SCRATCH_DQ_OUT,
	SCRATCH_DK_CHUNK,
	SCRATCH_DV_CHUNK,
	N_SCRATCH
};

/* Column blocks of InProj's output, in order. */
enum block { BLOCK_Z, BLOCK_V, BLOCK_G, BLOCK_Q, BLOCK_K, N_BLOCKS };

static int64_t head_width(const struct layer_config *config)
{
	return config->d_model / config->n_heads;
}

static int64_t group_width(const struct layer_config *config)
{
	return config->groups * head_width(config);
}

static int64_t proj_width(const struct layer_config *config)
{
	return 3 * config->d_model + 2 * group_width(config);
}

static int64_t block_width(const struct layer_config *config, enum block block)
{
	return block < BLOCK_Q ? config->d_model : group_width(config);
}

static int64_t block_column(const struct layer_config *config, enum block block)
{
	return block <= BLOCK_Q ? block * config->d_model
	                        : 3 * config->d_model + group_width(config);
}

static int64_t chunks_of(const struct layer_config *config, int64_t length)
{
	return (length + config->chunk - 1) / config->chunk;
}

static enum status rat_check(const struct layer_config *config)
{
	enum status status = mixing_check(config, true);

	if (status != STATUS_OK)
		return status;
	if (config->chunk < 1)
		return status_set(STATUS_INVALID, "--chunk: %lld (allowed for rat: 1 or more)",
		                  (long long)config->chunk);
	if (config->groups < 1 || config->n_heads % config->groups != 0)
		return status_set(STATUS_INVALID,
		                  "--groups: %lld (allowed: a divisor of %lld heads)",
		                  (long long)config->groups, (long long)config->n_heads);
	return STATUS_OK;
}

static int rat_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	int n = mixing_parameters(config, proj_width(config), specs);

	specs[n++] = (struct tensor_spec){
	        "gate_bias", STORAGE_FP32, 1, {config->d_model}, INIT_GATE_BIAS};
	return n;
}

static int rat_state(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t slots = chunks_of(config, shape->capacity),
	        d = shape->capacity ? config->d_model : 0;

	specs[STATE_K_CHUNK] =
	        (struct tensor_spec){"k_chunk",
	                             STORAGE_ACTIVATION,
	                             4,
	                             {shape->batch, config->n_heads, slots, head_width(config)},
	                             INIT_ZEROS};
	specs[STATE_V_CHUNK] = specs[STATE_K_CHUNK];
	specs[STATE_V_CHUNK].name = "v_chunk";
	specs[STATE_K] =
	        (struct tensor_spec){"k_state", STORAGE_FP32, 2, {shape->batch, d}, INIT_ZEROS};
	specs[STATE_V] =
	        (struct tensor_spec){"v_state", STORAGE_FP32, 2, {shape->batch, d}, INIT_ZEROS};
	return N_STATES;
}

static int rat_saved(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t b = shape->batch, t = shape->seq_len, n = b * t, h = config->n_heads;
	int64_t train = shape->pass == PASS_TRAIN ? 1 : 0;
	int64_t chunks = shape->capacity > 0 ? 0 : chunks_of(config, t);

	mixing_saved(config, shape, proj_width(config), specs);
	specs[SAVED_V_SCAN] = (struct tensor_spec){
	        "v_scan", STORAGE_ACTIVATION, 2, {n, config->d_model}, INIT_ZEROS};
	specs[SAVED_OWN_SCORE] =
	        (struct tensor_spec){"own_score", STORAGE_FP32, 3, {b, t, h}, INIT_ZEROS};
	specs[SAVED_Q_OUT] = (struct tensor_spec){
	        "q_out", STORAGE_ACTIVATION, 2, {train * n, group_width(config)}, INIT_ZEROS};
	specs[SAVED_K_CHUNK] = (struct tensor_spec){
	        "k_chunk", STORAGE_ACTIVATION, 4, {b, h, chunks, head_width(config)}, INIT_ZEROS};
	specs[SAVED_V_CHUNK] = specs[SAVED_K_CHUNK];
	specs[SAVED_V_CHUNK].name = "v_chunk";
	specs[SAVED_UNGATED] = (struct tensor_spec){
	        "ungated", STORAGE_ACTIVATION, 2, {train * n, config->d_model}, INIT_ZEROS};
	specs[SAVED_LSE] =
	        (struct tensor_spec){"lse", STORAGE_FP32, 3, {b, h, train * t}, INIT_ZEROS};
	return N_SAVED;
}

static int rat_scratch(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int64_t b = shape->batch, t = shape->seq_len, h = config->n_heads;

	mixing_scratch(config, shape, proj_width(config), specs);
	specs[SCRATCH_DV_SCAN] = (struct tensor_spec){
	        "dv_scan", STORAGE_ACTIVATION, 2, {b * t, config->d_model}, INIT_ZEROS};
	specs[SCRATCH_DOWN_SCORE] =
	        (struct tensor_spec){"down_score", STORAGE_FP32, 3, {b, t, h}, INIT_ZEROS};
	specs[SCRATCH_DQ_OUT] = (struct tensor_spec){
	        "dq_out", STORAGE_ACTIVATION, 2, {b * t, group_width(config)}, INIT_ZEROS};
	specs[SCRATCH_DK_CHUNK] =
	        (struct tensor_spec){"dk_chunk",
	                             STORAGE_ACTIVATION,
	                             4,
	                             {b, h, chunks_of(config, t), head_width(config)},
	                             INIT_ZEROS};
	specs[SCRATCH_DV_CHUNK] = specs[SCRATCH_DK_CHUNK];
	specs[SCRATCH_DV_CHUNK].name = "dv_chunk";
	return N_SCRATCH;
}

static struct view column_block(const struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, void *proj, enum block block)
{
	return mixing_columns(ctx, proj, shape->seq_len, proj_width(config),
	                      block_column(config, block), head_width(config));
}

/* A whole tensor [N, width] as heads. */
static struct view whole(const struct context *ctx, const struct layer_config *config,
                         const struct layer_shape *shape, void *tensor, int64_t width)
{
	return mixing_columns(ctx, tensor, shape->seq_len, width, 0, head_width(config));
}

/* Chunk finals: slots of the cache where there is one, else as many as the sequence has. */
static struct view chunk_view(const struct layer_config *config, const struct layer_shape *shape,
                              void *cache, void *saved)
{
	int64_t slots = chunks_of(config, cache ? shape->capacity : shape->seq_len);

	return mixing_slots(cache ? cache : saved, config->n_heads, slots, head_width(config));
}

static struct rat_scan_args scan_args(const struct context *ctx, const struct layer_config *config,
                                      const struct layer_shape *shape,
                                      const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ], *q_out = memory->saved[SAVED_Q_OUT];
	struct view q = column_block(ctx, config, shape, proj, BLOCK_Q);

	return (struct rat_scan_args){
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .n_heads = config->n_heads,
	        .groups = config->groups,
	        .d_head = head_width(config),
	        .chunk = config->chunk,
	        .rope = config->rope,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .v = column_block(ctx, config, shape, proj, BLOCK_V),
	        .gate = column_block(ctx, config, shape, proj, BLOCK_G),
	        .q = q,
	        .k = column_block(ctx, config, shape, proj, BLOCK_K),
	        .gate_bias = memory->param[PARAM_GATE_BIAS],
	        .v_scan = whole(ctx, config, shape, memory->saved[SAVED_V_SCAN], config->d_model),
	        .own_score = memory->saved[SAVED_OWN_SCORE],
	        .q_out = q_out ? whole(ctx, config, shape, q_out, group_width(config)) : q,
	        .k_chunk = chunk_view(config, shape, memory->state[STATE_K_CHUNK],
	                              memory->saved[SAVED_K_CHUNK]),
	        .v_chunk = chunk_view(config, shape, memory->state[STATE_V_CHUNK],
	                              memory->saved[SAVED_V_CHUNK]),
	        .k_state = memory->state[STATE_K],
	        .v_state = memory->state[STATE_V],
	};
}

static struct attention_args attention_args(const struct context *ctx,
                                            const struct layer_config *config,
                                            const struct layer_shape *shape,
                                            const struct layer_memory *memory,
                                            const struct rat_scan_args *scan)
{
	int64_t d = config->d_model;

	return (struct attention_args){
	        .batch = shape->batch,
	        .n_heads = config->n_heads,
	        .q_heads = config->groups,
	        .d_head = head_width(config),
	        .seq_len = shape->seq_len,
	        .kv_len = chunks_of(config, shape->seq_len),
	        .mask = MASK_CHUNK,
	        .chunk = config->chunk,
	        .scale = scan->scale,
	        .q = scan->q_out,
	        .k = scan->k_chunk,
	        .v = scan->v_chunk,
	        .own_score = scan->own_score,
	        .own_value = scan->v_scan,
	        .gate = column_block(ctx, config, shape, memory->saved[SAVED_PROJ], BLOCK_Z),
	        .out = whole(ctx, config, shape, memory->saved[SAVED_MIX], d),
	        .out_ungated = whole(ctx, config, shape, memory->saved[SAVED_UNGATED], d),
	        .lse = memory->saved[SAVED_LSE],
	};
}

static enum status rat_forward(struct context *ctx, const struct layer_config *config,
                               const struct layer_shape *shape, struct layer_memory *memory,
                               const void *x, void *y)
{
	const struct rat_scan_args scan = scan_args(ctx, config, shape, memory);
	const struct attention_args attention = attention_args(ctx, config, shape, memory, &scan);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_RAT_SCAN, &scan);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_ATTENTION, &attention);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

static enum status rat_backward(struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, struct layer_memory *memory,
                                const void *x, const void *dy, void *dx)
{
	void *dproj = memory->scratch[SCRATCH_DPROJ], *const *scratch = memory->scratch;
	int64_t d = config->d_model;
	const struct rat_scan_args scan = scan_args(ctx, config, shape, memory);
	const struct attention_backward_args attention = {
	        .forward = attention_args(ctx, config, shape, memory, &scan),
	        .dout = whole(ctx, config, shape, scratch[SCRATCH_DMIX], d),
	        .dq = whole(ctx, config, shape, scratch[SCRATCH_DQ_OUT], group_width(config)),
	        .dk = chunk_view(config, shape, NULL, scratch[SCRATCH_DK_CHUNK]),
	        .dv = chunk_view(config, shape, NULL, scratch[SCRATCH_DV_CHUNK]),
	        .dgate = column_block(ctx, config, shape, dproj, BLOCK_Z),
	        .down_score = scratch[SCRATCH_DOWN_SCORE],
	        .down_value = whole(ctx, config, shape, scratch[SCRATCH_DV_SCAN], d),
	};
	const struct rat_scan_backward_args scan_backward = {
	        .forward = scan,
	        .dv_scan = attention.down_value,
	        .down_score = attention.down_score,
	        .dq_out = attention.dq,
	        .dk_chunk = attention.dk,
	        .dv_chunk = attention.dv,
	        .dv = column_block(ctx, config, shape, dproj, BLOCK_V),
	        .dgate = column_block(ctx, config, shape, dproj, BLOCK_G),
	        .dq = column_block(ctx, config, shape, dproj, BLOCK_Q),
	        .dk = column_block(ctx, config, shape, dproj, BLOCK_K),
	        .dgate_bias = memory->grad[PARAM_GATE_BIAS],
	};
	enum status status = mixing_out_proj_backward(ctx, config, shape, memory, dy);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_ATTENTION_BACKWARD, &attention);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_RAT_SCAN_BACKWARD, &scan_backward);
	if (status == STATUS_OK)
		status = mixing_in_proj_backward(ctx, config, shape, memory, proj_width(config), x,
		                                 dy, dx);
	return status;
}

static enum status rat_step(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const int32_t *position, int64_t position_hint, const void *x, void *y)
{
	void *proj = memory->saved[SAVED_PROJ];
	const struct rat_step_args args = {
	        .batch = shape->batch,
	        .n_heads = config->n_heads,
	        .groups = config->groups,
	        .d_head = head_width(config),
	        .chunk = config->chunk,
	        .chunk_slots = chunks_of(config, shape->capacity),
	        .rope = config->rope,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .position = position,
	        .position_hint = position_hint,
	        .z = column_block(ctx, config, shape, proj, BLOCK_Z),
	        .v = column_block(ctx, config, shape, proj, BLOCK_V),
	        .gate = column_block(ctx, config, shape, proj, BLOCK_G),
	        .q = column_block(ctx, config, shape, proj, BLOCK_Q),
	        .k = column_block(ctx, config, shape, proj, BLOCK_K),
	        .gate_bias = memory->param[PARAM_GATE_BIAS],
	        .k_state = memory->state[STATE_K],
	        .v_state = memory->state[STATE_V],
	        .k_chunk = chunk_view(config, shape, memory->state[STATE_K_CHUNK], NULL),
	        .v_chunk = chunk_view(config, shape, memory->state[STATE_V_CHUNK], NULL),
	        .out = whole(ctx, config, shape, memory->saved[SAVED_MIX], config->d_model),
	};
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_RAT_STEP, &args);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

/* A reference's tensors: z, v, g, q, k and what the scan makes of them, or their gradients. */
struct reference_tensors {
	double *memory;
	double *block[N_BLOCKS];
	double *v_scan, *own_score, *q_out, *k_chunk, *v_chunk;
};

/* Hands out `count` doubles from *next. */
static double *take(double **next, int64_t count)
{
	double *taken = *next;

	*next += count;
	return taken;
}

static enum status take_tensors(const struct layer_config *config, int64_t n_seq, int64_t seq_len,
                                struct reference_tensors *r)
{
	int64_t n = n_seq * seq_len, chunks = n_seq * chunks_of(config, seq_len);
	enum status status = reference_take(
	        n * (proj_width(config) + config->d_model + config->n_heads + group_width(config)) +
	                2 * chunks * config->d_model,
	        &r->memory);

	if (status != STATUS_OK)
		return status;
	double *next = r->memory;
	for (enum block i = 0; i < N_BLOCKS; i++)
		r->block[i] = take(&next, n * block_width(config, i));
	r->v_scan = take(&next, n * config->d_model);
	r->own_score = take(&next, n * config->n_heads);
	r->q_out = take(&next, n * group_width(config));
	r->k_chunk = take(&next, chunks * config->d_model);
	r->v_chunk = take(&next, chunks * config->d_model);
	return STATUS_OK;
}

static void split_proj(const struct layer_config *config, int64_t n, const double *proj,
                       const struct reference_tensors *r)
{
	for (enum block i = 0; i < N_BLOCKS; i++)
		reference_get_columns(n, proj_width(config), block_column(config, i),
		                      block_width(config, i), proj, r->block[i]);
}

/* Splits proj and runs the scan; *scan and *attention are then ready for their backward. */
static enum status reference_scan(const struct layer_config *config, const double *const *param,
                                  int64_t n_seq, int64_t seq_len, const double *proj,
                                  const struct reference_tensors *r,
                                  struct reference_rat_scan *scan,
                                  struct reference_attention *attention)
{
	const struct reference_rat_scan_out out = {.v_scan = r->v_scan,
	                                           .own_score = r->own_score,
	                                           .q_out = r->q_out,
	                                           .k_chunk = r->k_chunk,
	                                           .v_chunk = r->v_chunk};

	split_proj(config, n_seq * seq_len, proj, r);
	*scan = (struct reference_rat_scan){
	        .batch = n_seq,
	        .seq_len = seq_len,
	        .n_heads = config->n_heads,
	        .groups = config->groups,
	        .d_head = head_width(config),
	        .chunk = config->chunk,
	        .rope = config->rope,
	        .scale = 1 / sqrt((double)head_width(config)),
	        .v = r->block[BLOCK_V],
	        .gate = r->block[BLOCK_G],
	        .q = r->block[BLOCK_Q],
	        .k = r->block[BLOCK_K],
	        .gate_bias = param[PARAM_GATE_BIAS],
	};
	*attention = (struct reference_attention){
	        .batch = n_seq,
	        .n_heads = config->n_heads,
	        .q_heads = config->groups,
	        .d_head = head_width(config),
	        .seq_len = seq_len,
	        .kv_len = chunks_of(config, seq_len),
	        .mask = MASK_CHUNK,
	        .chunk = config->chunk,
	        .scale = scan->scale,
	        .q = r->q_out,
	        .k = r->k_chunk,
	        .v = r->v_chunk,
	        .own_score = r->own_score,
	        .own_value = r->v_scan,
	        .gate = r->block[BLOCK_Z],
	};
	return reference_rat_scan_forward(scan, &out);
}

static enum status reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix)
{
	struct reference_tensors r;
	struct reference_rat_scan scan;
	struct reference_attention attention;
	enum status status = take_tensors(config, n_seq, seq_len, &r);

	if (status != STATUS_OK)
		return status;
	status = reference_scan(config, param, n_seq, seq_len, proj, &r, &scan, &attention);
	if (status == STATUS_OK)
		status = reference_attention_forward(&attention, n_rows, rows, mix, NULL, NULL);
	reference_release(r.memory);
	return status;
}

/* Where g holds what the attention's backward gives, and the scan's takes and gives. */
static struct reference_attention_grads attention_grads_of(const struct reference_tensors *g)
{
	return (struct reference_attention_grads){
	        .dq = g->q_out,
	        .dk = g->k_chunk,
	        .dv = g->v_chunk,
	        .dgate = g->block[BLOCK_Z],
	        .down_score = g->own_score,
	        .down_value = g->v_scan,
	};
}

static struct reference_rat_scan_grads scan_grads_of(const struct reference_tensors *g,
                                                     double *dgate_bias)
{
	return (struct reference_rat_scan_grads){
	        .dv_scan = g->v_scan,
	        .down_score = g->own_score,
	        .dq_out = g->q_out,
	        .dk_chunk = g->k_chunk,
	        .dv_chunk = g->v_chunk,
	        .dv = g->block[BLOCK_V],
	        .dgate = g->block[BLOCK_G],
	        .dq = g->block[BLOCK_Q],
	        .dk = g->block[BLOCK_K],
	        .dgate_bias = dgate_bias,
	};
}

/* The two backward references one after the other; g holds every gradient on the way. */
static enum status backward_through(const struct reference_rat_scan *scan,
                                    const struct reference_attention *attention, const double *dmix,
                                    const struct reference_tensors *g, double *dgate_bias)
{
	const struct reference_attention_grads attention_grads = attention_grads_of(g);
	const struct reference_rat_scan_grads scan_grads = scan_grads_of(g, dgate_bias);
	enum status status = reference_attention_backward(attention, dmix, &attention_grads);

	return status == STATUS_OK ? reference_rat_scan_backward(scan, &scan_grads) : status;
}

static enum status reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad)
{
	struct reference_tensors r = {0}, g = {0};
	struct reference_rat_scan scan;
	struct reference_attention attention;
	double *dgate_bias = NULL;
	enum status status = take_tensors(config, batch, seq_len, &r);

	if (status == STATUS_OK)
		status = take_tensors(config, batch, seq_len, &g);
	if (status == STATUS_OK)
		status = reference_take(config->d_model, &dgate_bias);
	if (status == STATUS_OK)
		status = reference_scan(config, param, batch, seq_len, proj, &r, &scan, &attention);
	if (status == STATUS_OK)
		status = backward_through(&scan, &attention, dmix, &g, dgate_bias);
	if (status == STATUS_OK) {
		for (enum block i = 0; i < N_BLOCKS; i++)
			reference_set_columns(batch * seq_len, proj_width(config),
			                      block_column(config, i), block_width(config, i),
			                      g.block[i], dproj);
		mixing_add(config->d_model, dgate_bias, grad[PARAM_GATE_BIAS]);
	}
	reference_release(r.memory);
	reference_release(g.memory);
	reference_release(dgate_bias);
	return status;
}

/* The rows of a sequence, then the chunks that they lie in, which are the keys they bear. */
static enum status backward_rows(const struct reference_rat_scan *scan,
                                 const struct reference_attention *attention,
                                 const struct reference_attention_left *left, const double *dmix,
                                 int64_t n_rows, const int64_t *rows,
                                 const struct reference_tensors *g)
{
	const struct reference_device *device = reference_in_use();
	const struct reference_attention_grads attention_grads = attention_grads_of(g);
	const struct reference_rat_scan_grads scan_grads = scan_grads_of(g, NULL);
	int64_t *chunks = malloc((size_t)n_rows * sizeof *chunks), n_chunks = 0;

	if (!chunks)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < n_rows; i++)
		if (i == 0 || rows[i] / scan->chunk != rows[i - 1] / scan->chunk)
			chunks[n_chunks++] = rows[i] / scan->chunk;
	enum status status = device->attention_backward_rows(attention, left, dmix, n_rows, rows,
	                                                     n_chunks, chunks, &attention_grads);
	free(chunks);
	return status == STATUS_OK ? device->rat_scan_backward(scan, &scan_grads) : status;
}

static enum status reference_dproj_rows(const struct layer_config *config,
                                        const double *const *param, const struct layer_run *run,
                                        int64_t seq_len, const double *proj, const double *dmix,
                                        int64_t n_rows, const int64_t *rows, double *dproj)
{
	struct reference_tensors r = {0}, g = {0};
	struct reference_rat_scan scan;
	struct reference_attention attention;
	int64_t count = seq_len * config->d_model, n_lse = seq_len * config->n_heads;
	double *left = NULL;
	enum status status = take_tensors(config, 1, seq_len, &r);

	if (status == STATUS_OK)
		status = take_tensors(config, 1, seq_len, &g);
	if (status == STATUS_OK)
		status = reference_take(count + n_lse, &left);
	if (status == STATUS_OK)
		status = reference_scan(config, param, 1, seq_len, proj, &r, &scan, &attention);
	if (status == STATUS_OK)
		status = mixing_load_saved(run, SAVED_UNGATED, run->backend->activation, count,
		                           left);
	if (status == STATUS_OK)
		status = mixing_load_saved(run, SAVED_LSE, DTYPE_F32, n_lse, left + count);
	if (status == STATUS_OK)
		status = backward_rows(&scan, &attention,
		                       &(struct reference_attention_left){left, left + count}, dmix,
		                       n_rows, rows, &g);
	for (enum block i = 0; i < N_BLOCKS && status == STATUS_OK; i++)
		status = mixing_set_rows(proj_width(config), block_column(config, i),
		                         block_width(config, i), n_rows, rows, g.block[i], dproj);
	reference_release(r.memory);
	reference_release(g.memory);
	reference_release(left);
	return status;
}

static int64_t summed_columns(const struct layer_config *config, int index)
{
	return index == PARAM_GATE_BIAS ? block_column(config, BLOCK_G) : -1;
}

/* Slot `chunk` of the caches = the running pair of state, k rotated (in k_state, which holds it).
 */
static void store_chunk(const struct layer_config *config, int64_t n_seq, int64_t slots,
                        int64_t chunk, double *k_state, double *const *state)
{
	int64_t h = config->n_heads, d = head_width(config);

	if (config->rope)
		reference_rotate(n_seq, 1, h, d, chunk, 1, k_state, k_state);
	mixing_store_slot(n_seq * h, slots, chunk, d, k_state, state[STATE_K_CHUNK]);
	mixing_store_slot(n_seq * h, slots, chunk, d, state[STATE_V], state[STATE_V_CHUNK]);
}

static enum status reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix)
{
	int64_t h = config->n_heads, d = head_width(config), row = n_seq * config->d_model;
	int64_t slots = chunks_of(config, shape->capacity), cache = row * slots;
	struct reference_tensors r;
	double *memory = NULL;
	enum status status = take_tensors(config, n_seq, 1, &r);

	if (status == STATUS_OK)
		status = reference_take(2 * row + 2 * cache, &memory);
	if (status != STATUS_OK) {
		reference_release(r.memory);
		return status;
	}
	double *k_state = memory, *v_state = k_state + row;
	double *k_chunk = v_state + row, *v_chunk = k_chunk + cache;
	split_proj(config, n_seq, proj, &r);
	mixing_from_slots(n_seq, h, slots, d, state[STATE_K_CHUNK], k_chunk);
	mixing_from_slots(n_seq, h, slots, d, state[STATE_V_CHUNK], v_chunk);
	const struct reference_rat_step step = {
	        .batch = n_seq,
	        .n_heads = h,
	        .groups = config->groups,
	        .d_head = d,
	        .chunk = config->chunk,
	        .chunk_slots = slots,
	        .rope = config->rope,
	        .scale = 1 / sqrt((double)d),
	        .position = position,
	        .z = r.block[BLOCK_Z],
	        .v = r.block[BLOCK_V],
	        .gate = r.block[BLOCK_G],
	        .q = r.block[BLOCK_Q],
	        .k = r.block[BLOCK_K],
	        .gate_bias = param[PARAM_GATE_BIAS],
	        .k_state = state[STATE_K],
	        .v_state = state[STATE_V],
	        .k_chunk = k_chunk,
	        .v_chunk = v_chunk,
	};

	status = reference_rat_step(&step, mix, k_state, v_state);
	mixing_copy(row, k_state, state[STATE_K]);
	mixing_copy(row, v_state, state[STATE_V]);
	if (position % config->chunk == config->chunk - 1)
		store_chunk(config, n_seq, slots, position / config->chunk, k_state, state);
	reference_release(r.memory);
	reference_release(memory);
	return status;
}

static int rat_golden_names(const struct layer_config *config, struct golden_name *names)
{
	int n = mixing_golden_names(config, proj_width(config), names);

	names[n++] = (struct golden_name){"gate_bias", PARAM_GATE_BIAS, 0, config->d_model};
	return n;
}

const struct layer_class rat_layer = {
        .name = "rat",
        .tunables = "chunk,groups,position",
        .check = rat_check,
        .parameters = rat_parameters,
        .state = rat_state,
        .saved = rat_saved,
        .scratch = rat_scratch,
        .forward = rat_forward,
        .backward = rat_backward,
        .step = rat_step,
        .reference_anywhere = true,
        .reference_mix = reference_mix,
        .reference_step = reference_step,
        .reference_mix_backward = reference_mix_backward,
        .reference_dproj_rows = reference_dproj_rows,
        .summed_columns = summed_columns,
        .golden_names = rat_golden_names,
};
