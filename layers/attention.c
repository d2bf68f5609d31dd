/*
 * Causal softmax attention, and sliding-window attention: the same layer with
 * a window. InProj's columns are v, q, k; of v and k there may be fewer heads than
 * of q, each read by several of them (grouped keys, arXiv 2305.13245).
 */
#include <math.h>

#include "layers/mixing.h"

enum { STATE_K, STATE_V, N_STATES };
/* Rotated queries, and keys where there is no cache to hold them. */
enum { SAVED_LSE = SAVED_OTHER, SAVED_Q, SAVED_K, N_SAVED };
/* Gradients of the rotated ones. */
enum { SCRATCH_DQ = SCRATCH_OTHER, SCRATCH_DK, N_SCRATCH };
/* Column blocks of InProj's output, in order. */
enum block { BLOCK_V, BLOCK_Q, BLOCK_K };

extern const struct layer_class swa_layer;

static int64_t head_width(const struct layer_config *config)
{
	return config->d_model / config->n_heads;
}

static int64_t kv_heads(const struct layer_config *config)
{
	return config->kv_heads > 0 ? config->kv_heads : config->n_heads;
}

/* Columns of k, and of v. */
static int64_t kv_width(const struct layer_config *config)
{
	return kv_heads(config) * head_width(config);
}

static int64_t proj_width(const struct layer_config *config)
{
	return config->d_model + 2 * kv_width(config);
}

static struct layer_widths attention_widths(const struct layer_config *config)
{
	const int64_t d = head_width(config);

	return (struct layer_widths){config->n_heads, kv_heads(config), d, d};
}

static enum status attention_check(const struct layer_config *config)
{
	if (config->n_heads % kv_heads(config) != 0)
		return status_set(STATUS_INVALID,
		                  "%s: kv_heads=%lld (allowed: a divisor of %lld heads)",
		                  config->class->name, (long long)config->kv_heads,
		                  (long long)config->n_heads);
	return mixing_check(config);
}

static bool has_window(const struct layer_config *config)
{
	return config->class == &swa_layer;
}

static struct score_parts attention_scores(const struct layer_config *config)
{
	const int64_t d = config->d_model, width = head_width(config);
	const int64_t keys = kv_heads(config) * width;

	return (struct score_parts){keys, d, keys + d, keys, width, STATE_K};
}

/* Slots of the cache: a ring of the window and the token itself, or every position. */
static int64_t cache_slots(const struct layer_config *config, const struct layer_shape *shape)
{
	int64_t ring = config->window + 1;

	return has_window(config) && ring < shape->capacity ? ring : shape->capacity;
}

static int attention_state(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	int64_t h = kv_heads(config), slots = cache_slots(config, shape), d = head_width(config);

	specs[STATE_K] = (struct tensor_spec){
	        "k_cache", STORAGE_ACTIVATION, 4, {shape->batch, h, slots, d}, INIT_ZEROS};
	specs[STATE_V] = specs[STATE_K];
	specs[STATE_V].name = "v_cache";
	return N_STATES;
}

/* Whether prefill can attend to the cache it fills: it holds every token. */
static bool attends_to_cache(const struct layer_config *config, const struct layer_shape *shape)
{
	return shape->capacity > 0 && cache_slots(config, shape) >= shape->seq_len;
}

static int attention_saved(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len, d = config->d_model;
	int64_t rotated = config->rope && shape->pass != PASS_GENERATION ? n : 0;
	int64_t keys = attends_to_cache(config, shape) ? 0 : rotated;

	mixing_saved(config, shape, specs);
	specs[SAVED_LSE] = tensor_rows("lse", STORAGE_FP32, shape->pass == PASS_TRAIN ? n : 0,
	                               config->n_heads);
	specs[SAVED_Q] = tensor_rows("q", STORAGE_ACTIVATION, rotated, d);
	specs[SAVED_K] = tensor_rows("k", STORAGE_ACTIVATION, keys, kv_width(config));
	return N_SAVED;
}

static int attention_scratch(const struct layer_config *config, const struct layer_shape *shape,
                             struct tensor_spec *specs)
{
	int64_t n = config->rope ? shape->batch * shape->seq_len : 0;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DQ] = tensor_rows("dq", STORAGE_ACTIVATION, n, config->d_model);
	specs[SCRATCH_DK] = tensor_rows("dk", STORAGE_ACTIVATION, n, kv_width(config));
	return N_SCRATCH;
}

/* A whole tensor [N, D], or [N, kv_width], as heads. */
static struct view whole(const struct layer_run *run, void *tensor)
{
	return mixing_heads(run, tensor, run->config->d_model);
}

static struct view whole_keys(const struct layer_run *run, void *tensor)
{
	return mixing_columns(run, tensor, kv_width(run->config), 0, head_width(run->config));
}

/* A block of InProj's output or its gradient. */
static struct view column_block(const struct layer_run *run, void *proj, enum block block)
{
	const struct layer_config *config = run->config;
	const int64_t first[] = {0, kv_width(config), kv_width(config) + config->d_model};

	return mixing_columns(run, proj, proj_width(config), first[block], head_width(config));
}

static struct view proj_block(const struct layer_run *run, enum block block)
{
	return column_block(run, run->memory->saved[SAVED_PROJ], block);
}

static struct view cache_view(const struct layer_run *run, int state)
{
	return mixing_slots(run, run->memory->state[state], kv_heads(run->config),
	                    cache_slots(run->config, run->shape));
}

/* Where attention finds its keys and, in *v, its values. */
static struct view keys(const struct layer_run *run, struct view *v)
{
	if (attends_to_cache(run->config, run->shape)) {
		*v = cache_view(run, STATE_V);
		return cache_view(run, STATE_K);
	}
	*v = proj_block(run, BLOCK_V);
	return run->config->rope ? whole_keys(run, run->memory->saved[SAVED_K])
	                         : proj_block(run, BLOCK_K);
}

static struct view queries(const struct layer_run *run)
{
	return run->config->rope ? whole(run, run->memory->saved[SAVED_Q])
	                         : proj_block(run, BLOCK_Q);
}

static struct attention_args attention_args(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	struct attention_args args = {
	        .batch = run->shape->batch,
	        .n_heads = config->n_heads,
	        .q_heads = config->n_heads,
	        .kv_heads = kv_heads(config),
	        .d_head = head_width(config),
	        .seq_len = run->shape->seq_len,
	        .kv_len = run->shape->seq_len,
	        .mask = has_window(config) ? MASK_WINDOW : MASK_CAUSAL,
	        .window = config->window,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .q = queries(run),
	        .out = whole(run, run->memory->saved[SAVED_MIX]),
	        .lse = run->memory->saved[SAVED_LSE],
	};

	args.k = keys(run, &args.v);
	return args;
}

/* Rotates q, and k with v where that is a cache that holds every token. */
static enum status rotate(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	bool cached = attends_to_cache(config, run->shape);
	struct rotate_args args = {
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = kv_heads(config),
	        .d_head = head_width(config),
	        .rope = config->rope,
	        .kv_slots = cached ? cache_slots(config, run->shape) : run->shape->seq_len,
	        .v = proj_block(run, BLOCK_V),
	        .q = proj_block(run, BLOCK_Q),
	        .k = proj_block(run, BLOCK_K),
	};

	if (!cached && !config->rope)
		return STATUS_OK;
	args.k_out = keys(run, &args.v_out);
	if (config->rope)
		args.q_out = queries(run);
	if (!cached)
		args.v_out.data = NULL;
	return run_rotate(run->ctx, &args);
}

/* Copies the last tokens, already rotated, into a ring that is shorter than the sequence. */
static enum status fill_ring(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	struct rotate_args args = {
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = kv_heads(config),
	        .d_head = head_width(config),
	        .first_kv = run->shape->seq_len - cache_slots(config, run->shape),
	        .kv_slots = cache_slots(config, run->shape),
	        .k_out = cache_view(run, STATE_K),
	        .v_out = cache_view(run, STATE_V),
	};

	if (run->shape->capacity == 0 || attends_to_cache(config, run->shape))
		return STATUS_OK;
	args.k = keys(run, &args.v);
	return run_rotate(run->ctx, &args);
}

static enum status attention_forward(const struct layer_run *run)
{
	const struct attention_args args = attention_args(run);

	TRY(rotate(run));
	TRY(fill_ring(run));
	return run_attention(run->ctx, &args);
}

static enum status attention_backward(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *const *scratch = run->memory->scratch;
	const struct rotate_backward_args rotate_args = {
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = kv_heads(config),
	        .d_head = head_width(config),
	        .rope = true,
	        .dq_out = whole(run, scratch[SCRATCH_DQ]),
	        .dk_out = whole_keys(run, scratch[SCRATCH_DK]),
	        .dq = column_block(run, scratch[SCRATCH_DPROJ], BLOCK_Q),
	        .dk = column_block(run, scratch[SCRATCH_DPROJ], BLOCK_K),
	};
	const struct attention_backward_args args = {
	        .forward = attention_args(run),
	        .dout = whole(run, scratch[SCRATCH_DMIX]),
	        .dv = column_block(run, scratch[SCRATCH_DPROJ], BLOCK_V),
	        .dq = config->rope ? rotate_args.dq_out : rotate_args.dq,
	        .dk = config->rope ? rotate_args.dk_out : rotate_args.dk,
	};

	TRY(run_attention_backward(run->ctx, &args));
	return config->rope ? run_rotate_backward(run->ctx, &rotate_args) : STATUS_OK;
}

static enum status attention_step(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	const struct attention_step_args args = {
	        .batch = run->shape->batch,
	        .n_heads = config->n_heads,
	        .kv_heads = kv_heads(config),
	        .d_head = head_width(config),
	        .kv_slots = cache_slots(config, run->shape),
	        .window = has_window(config) ? config->window : -1,
	        .rope = config->rope,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .position = run->position,
	        .position_hint = run->position_hint,
	        .v = proj_block(run, BLOCK_V),
	        .q = proj_block(run, BLOCK_Q),
	        .k = proj_block(run, BLOCK_K),
	        .k_cache = cache_view(run, STATE_K),
	        .v_cache = cache_view(run, STATE_V),
	        .out = whole(run, run->memory->saved[SAVED_MIX]),
	};

	return run_attention_step(run->ctx, &args);
}

/* What attention and swa have in common. */
#define ARGUMENT_KV_HEADS                                                                          \
	ARGUMENT("kv_heads", kv_heads, .least = 1, .automatic = true,                              \
	         .help = "heads of keys and values, a divisor of H")
#define ATTENTION_FUNCTIONS                                                                        \
	.mixes = true, .check = attention_check, .widths = attention_widths,                       \
	.proj_width = proj_width, .parameters = mixing_parameters, .state = attention_state,       \
	.saved = attention_saved, .scratch = attention_scratch, .forward = attention_forward,      \
	.backward = attention_backward, .step = attention_step, .scores = attention_scores,        \
	.golden_names = mixing_golden_names

/* A step writes at its own position alone. */
static bool attention_remembers(const struct layer_config *config, int64_t position)
{
	return true;
}

const struct layer_class attention_layer = {
        .name = "attention",
        .summary = "softmax attention over all tokens before",
        .arguments =
                (const struct layer_argument[]){
                        ARGUMENT_HEADS, ARGUMENT_KV_HEADS, ARGUMENT_POSITION, {0}},
        .remembers = attention_remembers,
        ATTENTION_FUNCTIONS,
};

static const struct layer_argument swa_arguments[] = {
        ARGUMENT("window", window, .fallback = 1024, .help = "window W: W + 1 keys are seen"),
        ARGUMENT_HEADS,
        ARGUMENT_KV_HEADS,
        ARGUMENT_POSITION,
        {0}};

const struct layer_class swa_layer = {
        .name = "swa",
        .summary = "softmax attention in a sliding window",
        .arguments = swa_arguments,
        ATTENTION_FUNCTIONS,
};
