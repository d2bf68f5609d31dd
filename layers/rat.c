/*
 * RAT: a gated recurrence inside each chunk, attention to the chunks before
 * it. InProj's columns are z, v, g (D each), then q, k (one head width per group).
 */
#include <math.h>

#include "layers/mixing.h"

enum { STATE_K_CHUNK, STATE_V_CHUNK, STATE_K, STATE_V, N_STATES };
enum {
	SAVED_V_SCAN = SAVED_OTHER,
	SAVED_OWN_SCORE,
	SAVED_Q_OUT,
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
enum block { BLOCK_Z, BLOCK_V, BLOCK_G, BLOCK_Q, BLOCK_K };

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

static int64_t block_column(const struct layer_config *config, enum block block)
{
	return block <= BLOCK_Q ? block * config->d_model
	                        : 3 * config->d_model + group_width(config);
}

/* What a chunk's key has of its tokens' is up to the gates. */
static struct score_parts rat_scores(const struct layer_config *config)
{
	const int64_t width = group_width(config);

	return (struct score_parts){block_column(config, BLOCK_Q),
	                            width,
	                            block_column(config, BLOCK_K),
	                            width,
	                            head_width(config),
	                            STATE_K_CHUNK};
}

static int64_t chunks_of(const struct layer_config *config, int64_t length)
{
	return (length + config->chunk - 1) / config->chunk;
}

static enum status rat_check(const struct layer_config *config)
{
	if (config->n_heads % config->groups != 0)
		return status_set(STATUS_INVALID,
		                  "rat: groups=%lld (allowed: a divisor of %lld heads)",
		                  (long long)config->groups, (long long)config->n_heads);
	return mixing_check(config);
}

static int rat_state(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t h = config->n_heads, slots = chunks_of(config, shape->capacity);
	int64_t d = shape->capacity ? config->d_model : 0;

	specs[STATE_K_CHUNK] = (struct tensor_spec){"k_chunk",
	                                            STORAGE_ACTIVATION,
	                                            4,
	                                            {shape->batch, h, slots, head_width(config)},
	                                            INIT_ZEROS};
	specs[STATE_V_CHUNK] = specs[STATE_K_CHUNK];
	specs[STATE_V_CHUNK].name = "v_chunk";
	specs[STATE_K] = tensor_rows("k_state", STORAGE_FP32, shape->batch, d);
	specs[STATE_V] = tensor_rows("v_state", STORAGE_FP32, shape->batch, d);
	return N_STATES;
}

static int rat_saved(const struct layer_config *config, const struct layer_shape *shape,
                     struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, h = config->n_heads, d = config->d_model;
	int64_t train = shape->pass == PASS_TRAIN ? n : 0;
	int64_t chunks = shape->capacity > 0 ? 0 : shape->batch * chunks_of(config, shape->seq_len);

	mixing_saved(config, shape, specs);
	specs[SAVED_V_SCAN] = tensor_rows("v_scan", STORAGE_ACTIVATION, n, d);
	specs[SAVED_OWN_SCORE] = tensor_rows("own_score", STORAGE_FP32, n, h);
	specs[SAVED_Q_OUT] = tensor_rows("q_out", STORAGE_ACTIVATION, n, group_width(config));
	specs[SAVED_K_CHUNK] = tensor_rows("k_chunk", STORAGE_ACTIVATION, chunks, d);
	specs[SAVED_V_CHUNK] = tensor_rows("v_chunk", STORAGE_ACTIVATION, chunks, d);
	specs[SAVED_UNGATED] = tensor_rows("ungated", STORAGE_ACTIVATION, train, d);
	specs[SAVED_LSE] = tensor_rows("lse", STORAGE_FP32, train, h);
	return N_SAVED;
}

static int rat_scratch(const struct layer_config *config, const struct layer_shape *shape,
                       struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, h = config->n_heads, d = config->d_model;
	int64_t chunks = shape->batch * chunks_of(config, shape->seq_len);

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DV_SCAN] = tensor_rows("dv_scan", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DOWN_SCORE] = tensor_rows("down_score", STORAGE_FP32, n, h);
	specs[SCRATCH_DQ_OUT] = tensor_rows("dq_out", STORAGE_ACTIVATION, n, group_width(config));
	specs[SCRATCH_DK_CHUNK] = tensor_rows("dk_chunk", STORAGE_ACTIVATION, chunks, d);
	specs[SCRATCH_DV_CHUNK] = tensor_rows("dv_chunk", STORAGE_ACTIVATION, chunks, d);
	return N_SCRATCH;
}

/* A block of InProj's output or its gradient. */
static struct view column_block(const struct layer_run *run, void *proj, enum block block)
{
	return mixing_columns(run, proj, proj_width(run->config), block_column(run->config, block),
	                      head_width(run->config));
}

/* A whole tensor [N, D], and one with the columns of the groups, as heads. */
static struct view whole(const struct layer_run *run, void *tensor)
{
	return mixing_heads(run, tensor, run->config->d_model);
}

static struct view grouped(const struct layer_run *run, void *tensor)
{
	return mixing_columns(run, tensor, group_width(run->config), 0, head_width(run->config));
}

/* Chunk finals: slots of the cache where there is one, else as many as the sequence has. */
static struct view chunk_view(const struct layer_run *run, void *cache, void *saved)
{
	return mixing_slots(
	        run, cache ? cache : saved, run->config->n_heads,
	        chunks_of(run->config, cache ? run->shape->capacity : run->shape->seq_len));
}

static struct rat_scan_args scan_args(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *const *saved = run->memory->saved, *const *state = run->memory->state;
	void *proj = saved[SAVED_PROJ];

	return (struct rat_scan_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .groups = config->groups,
	        .d_head = head_width(config),
	        .chunk = config->chunk,
	        .rope = config->rope,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .v = column_block(run, proj, BLOCK_V),
	        .gate = column_block(run, proj, BLOCK_G),
	        .q = column_block(run, proj, BLOCK_Q),
	        .k = column_block(run, proj, BLOCK_K),
	        .gate_bias = run->memory->param[PARAM_GATE_BIAS],
	        .v_scan = whole(run, saved[SAVED_V_SCAN]),
	        .own_score = saved[SAVED_OWN_SCORE],
	        .q_out = grouped(run, saved[SAVED_Q_OUT]),
	        .k_chunk = chunk_view(run, state[STATE_K_CHUNK], saved[SAVED_K_CHUNK]),
	        .v_chunk = chunk_view(run, state[STATE_V_CHUNK], saved[SAVED_V_CHUNK]),
	        .k_state = state[STATE_K],
	        .v_state = state[STATE_V],
	};
}

static struct attention_args attention_args(const struct layer_run *run,
                                            const struct rat_scan_args *scan)
{
	void *const *saved = run->memory->saved;

	return (struct attention_args){
	        .batch = scan->batch,
	        .n_heads = scan->n_heads,
	        .q_heads = scan->groups,
	        .kv_heads = scan->n_heads,
	        .d_head = scan->d_head,
	        .seq_len = scan->seq_len,
	        .kv_len = chunks_of(run->config, scan->seq_len),
	        .mask = MASK_CHUNK,
	        .chunk = scan->chunk,
	        .scale = scan->scale,
	        .q = scan->q_out,
	        .k = scan->k_chunk,
	        .v = scan->v_chunk,
	        .own_score = scan->own_score,
	        .own_value = scan->v_scan,
	        .gate = column_block(run, saved[SAVED_PROJ], BLOCK_Z),
	        .out = whole(run, saved[SAVED_MIX]),
	        .out_ungated = whole(run, saved[SAVED_UNGATED]),
	        .lse = saved[SAVED_LSE],
	};
}

static enum status rat_forward(const struct layer_run *run)
{
	const struct rat_scan_args scan = scan_args(run);
	const struct attention_args attention = attention_args(run, &scan);

	TRY(run_rat_scan(run->ctx, &scan));
	return run_attention(run->ctx, &attention);
}

static enum status rat_backward(const struct layer_run *run)
{
	void *const *scratch = run->memory->scratch, *dproj = scratch[SCRATCH_DPROJ];
	const struct rat_scan_args scan = scan_args(run);
	const struct attention_backward_args attention = {
	        .forward = attention_args(run, &scan),
	        .dout = whole(run, scratch[SCRATCH_DMIX]),
	        .dq = grouped(run, scratch[SCRATCH_DQ_OUT]),
	        .dk = chunk_view(run, NULL, scratch[SCRATCH_DK_CHUNK]),
	        .dv = chunk_view(run, NULL, scratch[SCRATCH_DV_CHUNK]),
	        .dgate = column_block(run, dproj, BLOCK_Z),
	        .down_score = scratch[SCRATCH_DOWN_SCORE],
	        .down_value = whole(run, scratch[SCRATCH_DV_SCAN]),
	};
	const struct rat_scan_backward_args scan_backward = {
	        .forward = scan,
	        .dv_scan = attention.down_value,
	        .down_score = attention.down_score,
	        .dq_out = attention.dq,
	        .dk_chunk = attention.dk,
	        .dv_chunk = attention.dv,
	        .dv = column_block(run, dproj, BLOCK_V),
	        .dgate = column_block(run, dproj, BLOCK_G),
	        .dq = column_block(run, dproj, BLOCK_Q),
	        .dk = column_block(run, dproj, BLOCK_K),
	        .dgate_bias = run->memory->grad[PARAM_GATE_BIAS],
	};

	TRY(run_attention_backward(run->ctx, &attention));
	return run_rat_scan_backward(run->ctx, &scan_backward);
}

static enum status rat_step(const struct layer_run *run)
{
	const struct rat_scan_args scan = scan_args(run);
	const struct rat_step_args args = {
	        .batch = scan.batch,
	        .n_heads = scan.n_heads,
	        .groups = scan.groups,
	        .d_head = scan.d_head,
	        .chunk = scan.chunk,
	        .chunk_slots = chunks_of(run->config, run->shape->capacity),
	        .rope = scan.rope,
	        .scale = scan.scale,
	        .position = run->position,
	        .position_hint = run->position_hint,
	        .z = column_block(run, run->memory->saved[SAVED_PROJ], BLOCK_Z),
	        .v = scan.v,
	        .gate = scan.gate,
	        .q = scan.q,
	        .k = scan.k,
	        .gate_bias = scan.gate_bias,
	        .k_state = scan.k_state,
	        .v_state = scan.v_state,
	        .k_chunk = scan.k_chunk,
	        .v_chunk = scan.v_chunk,
	        .out = whole(run, run->memory->saved[SAVED_MIX]),
	};

	return run_rat_step(run->ctx, &args);
}

static const struct layer_argument rat_arguments[] = {
        ARGUMENT("chunk", chunk, .fallback = 16, .least = 1, .help = "tokens L of a chunk"),
        ARGUMENT("groups", groups, .fallback = 2, .least = 1,
                 .help = "groups G of heads that share q and k"),
        ARGUMENT_HEADS,
        ARGUMENT_POSITION,
        {0}};

/* A chunk begins from zero, and ends by writing to the cache of chunks in its own place. */
static bool rat_remembers(const struct layer_config *config, int64_t position)
{
	return position % config->chunk == 0;
}

const struct layer_class rat_layer = {
        .name = "rat",
        .mixes = true,
        .summary = "RAT: a recurrence within chunks, attention between them",
        .arguments = rat_arguments,
        .check = rat_check,
        .proj_width = proj_width,
        .parameters = mixing_gated_parameters,
        .state = rat_state,
        .saved = rat_saved,
        .scratch = rat_scratch,
        .forward = rat_forward,
        .backward = rat_backward,
        .step = rat_step,
        .remembers = rat_remembers,
        .scores = rat_scores,
        .golden_names = mixing_gated_golden_names,
};
