/*
 * The local attention of Griffin (arXiv 2402.19427): one head of keys and values for all of
 * queries, in a window of W keys, the token's own among them; the first half of a head's columns
 * is rotated, the rest is not. InProj's columns are v (d), q (D), k (d); OutProj has a bias.
 */
#include <math.h>

#include "layers/mixing.h"

enum { PARAM_OUT_BIAS = PARAM_OTHER, N_PARAMS };
enum { STATE_K, STATE_V, N_STATES };
/* Rotated queries, and keys. */
enum { SAVED_LSE = SAVED_OTHER, SAVED_Q, SAVED_K, N_SAVED };
/* Gradients of the rotated ones. */
enum { SCRATCH_DQ = SCRATCH_OTHER, SCRATCH_DK, N_SCRATCH };
enum { KV_HEADS_OF_GRIFFIN = 1 };

static int64_t head_width(const struct layer_config *config)
{
	return config->d_model / config->n_heads;
}

static int64_t proj_width(const struct layer_config *config)
{
	return config->d_model + 2 * head_width(config);
}

static struct layer_widths griffin_widths(const struct layer_config *config)
{
	const int64_t d = head_width(config);

	return (struct layer_widths){config->n_heads, KV_HEADS_OF_GRIFFIN, d, d};
}

static enum status griffin_check(const struct layer_config *config)
{
	TRY(mixing_check(config));
	if (config->rope && head_width(config) % 4 != 0)
		return status_set(STATUS_INVALID,
		                  "%s: heads=%lld makes heads %lld wide, of which a half is "
		                  "rotated (allowed: a multiple of 4, or position=none)",
		                  config->class->name, (long long)config->n_heads,
		                  (long long)head_width(config));
	return STATUS_OK;
}

static struct score_parts griffin_scores(const struct layer_config *config)
{
	const int64_t d = config->d_model, width = head_width(config);

	return (struct score_parts){width, d, width + d, width, width, STATE_K};
}

static int griffin_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	mixing_parameters(config, specs);
	specs[PARAM_OUT_BIAS] = tensor_vector("out_bias", config->d_model, INIT_ZEROS);
	return N_PARAMS;
}

/* How many tokens back the operations' window reaches: W keys are the token and W - 1 before. */
static int64_t reach(const struct layer_config *config)
{
	return config->window - 1;
}

/* Slots of the cache: a ring of the window, or every position. */
static int64_t cache_slots(const struct layer_config *config, const struct layer_shape *shape)
{
	return config->window < shape->capacity ? config->window : shape->capacity;
}

static int griffin_state(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs)
{
	const int64_t slots = cache_slots(config, shape), d = head_width(config);

	specs[STATE_K] = (struct tensor_spec){"k_cache",
	                                      STORAGE_ACTIVATION,
	                                      4,
	                                      {shape->batch, KV_HEADS_OF_GRIFFIN, slots, d},
	                                      INIT_ZEROS};
	specs[STATE_V] = specs[STATE_K];
	specs[STATE_V].name = "v_cache";
	return N_STATES;
}

static int griffin_saved(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs)
{
	const int64_t n = shape->batch * shape->seq_len;
	const int64_t rotated = config->rope && shape->pass != PASS_GENERATION ? n : 0;

	mixing_saved(config, shape, specs);
	specs[SAVED_LSE] = tensor_rows("lse", STORAGE_FP32, shape->pass == PASS_TRAIN ? n : 0,
	                               config->n_heads);
	specs[SAVED_Q] = tensor_rows("q", STORAGE_ACTIVATION, rotated, config->d_model);
	specs[SAVED_K] = tensor_rows("k", STORAGE_ACTIVATION, rotated, head_width(config));
	return N_SAVED;
}

static int griffin_scratch(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	const int64_t n = config->rope ? shape->batch * shape->seq_len : 0;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DQ] = tensor_rows("dq", STORAGE_ACTIVATION, n, config->d_model);
	specs[SCRATCH_DK] = tensor_rows("dk", STORAGE_ACTIVATION, n, head_width(config));
	return N_SCRATCH;
}

/* A whole tensor [N, D], and one head wide, as heads. */
static struct view whole(const struct layer_run *run, void *tensor)
{
	return mixing_heads(run, tensor, run->config->d_model);
}

static struct view one_head(const struct layer_run *run, void *tensor)
{
	const int64_t d = head_width(run->config);

	return mixing_columns(run, tensor, d, 0, d);
}

/* Columns of InProj's output or its gradient. */
static struct view columns(const struct layer_run *run, void *proj, int64_t first)
{
	return mixing_columns(run, proj, proj_width(run->config), first, head_width(run->config));
}

static struct view v_columns(const struct layer_run *run, void *proj)
{
	return columns(run, proj, 0);
}

static struct view q_columns(const struct layer_run *run, void *proj)
{
	return columns(run, proj, head_width(run->config));
}

static struct view k_columns(const struct layer_run *run, void *proj)
{
	return columns(run, proj, head_width(run->config) + run->config->d_model);
}

static struct view cache_view(const struct layer_run *run, int state)
{
	return mixing_slots(run, run->memory->state[state], KV_HEADS_OF_GRIFFIN,
	                    cache_slots(run->config, run->shape));
}

static struct attention_args attention_args(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *const *saved = run->memory->saved;
	void *proj = saved[SAVED_PROJ];

	return (struct attention_args){
	        .batch = run->shape->batch,
	        .n_heads = config->n_heads,
	        .q_heads = config->n_heads,
	        .kv_heads = KV_HEADS_OF_GRIFFIN,
	        .d_head = head_width(config),
	        .seq_len = run->shape->seq_len,
	        .kv_len = run->shape->seq_len,
	        .mask = MASK_WINDOW,
	        .window = reach(config),
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .q = config->rope ? whole(run, saved[SAVED_Q]) : q_columns(run, proj),
	        .k = config->rope ? one_head(run, saved[SAVED_K]) : k_columns(run, proj),
	        .v = v_columns(run, proj),
	        .out = whole(run, saved[SAVED_MIX]),
	        .lse = saved[SAVED_LSE],
	};
}

/* Sizes of a rotation, or a copy. */
static struct rotate_args rotate_args(const struct layer_run *run, bool rope)
{
	const struct layer_config *config = run->config;

	return (struct rotate_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = KV_HEADS_OF_GRIFFIN,
	        .d_head = head_width(config),
	        .rope = rope,
	        .rope_width = head_width(config) / 2,
	        .kv_slots = run->shape->seq_len,
	};
}

static enum status rotate(const struct layer_run *run, const struct attention_args *attention)
{
	struct rotate_args args = rotate_args(run, true);

	if (!run->config->rope)
		return STATUS_OK;
	args.q = q_columns(run, run->memory->saved[SAVED_PROJ]);
	args.k = k_columns(run, run->memory->saved[SAVED_PROJ]);
	args.q_out = attention->q;
	args.k_out = attention->k;
	return run_rotate(run->ctx, &args);
}

/* Copies the last tokens' keys, already rotated, and values into the cache. */
static enum status fill_cache(const struct layer_run *run, const struct attention_args *attention)
{
	struct rotate_args args = rotate_args(run, false);

	if (run->shape->capacity == 0)
		return STATUS_OK;
	args.kv_slots = cache_slots(run->config, run->shape);
	args.first_kv =
	        run->shape->seq_len > args.kv_slots ? run->shape->seq_len - args.kv_slots : 0;
	args.k = attention->k;
	args.v = attention->v;
	args.k_out = cache_view(run, STATE_K);
	args.v_out = cache_view(run, STATE_V);
	return run_rotate(run->ctx, &args);
}

static enum status griffin_forward(const struct layer_run *run)
{
	const struct attention_args args = attention_args(run);

	TRY(rotate(run, &args));
	TRY(fill_cache(run, &args));
	return run_attention(run->ctx, &args);
}

static enum status griffin_backward(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *const *scratch = run->memory->scratch;
	const struct rotate_backward_args rotate_args = {
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = KV_HEADS_OF_GRIFFIN,
	        .d_head = head_width(config),
	        .rope = true,
	        .rope_width = head_width(config) / 2,
	        .dq_out = whole(run, scratch[SCRATCH_DQ]),
	        .dk_out = one_head(run, scratch[SCRATCH_DK]),
	        .dq = q_columns(run, scratch[SCRATCH_DPROJ]),
	        .dk = k_columns(run, scratch[SCRATCH_DPROJ]),
	};
	const struct attention_backward_args args = {
	        .forward = attention_args(run),
	        .dout = whole(run, scratch[SCRATCH_DMIX]),
	        .dv = v_columns(run, scratch[SCRATCH_DPROJ]),
	        .dq = config->rope ? rotate_args.dq_out : rotate_args.dq,
	        .dk = config->rope ? rotate_args.dk_out : rotate_args.dk,
	};

	TRY(run_attention_backward(run->ctx, &args));
	return config->rope ? run_rotate_backward(run->ctx, &rotate_args) : STATUS_OK;
}

static enum status griffin_step(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *proj = run->memory->saved[SAVED_PROJ];
	const struct attention_step_args args = {
	        .batch = run->shape->batch,
	        .n_heads = config->n_heads,
	        .kv_heads = KV_HEADS_OF_GRIFFIN,
	        .d_head = head_width(config),
	        .kv_slots = cache_slots(config, run->shape),
	        .window = reach(config),
	        .rope = config->rope,
	        .rope_width = head_width(config) / 2,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .position = run->position,
	        .position_hint = run->position_hint,
	        .v = v_columns(run, proj),
	        .q = q_columns(run, proj),
	        .k = k_columns(run, proj),
	        .k_cache = cache_view(run, STATE_K),
	        .v_cache = cache_view(run, STATE_V),
	        .out = whole(run, run->memory->saved[SAVED_MIX]),
	};

	return run_attention_step(run->ctx, &args);
}

static int griffin_golden_names(const struct layer_config *config, struct golden_name *names)
{
	const int64_t d = config->d_model, width = head_width(config);
	const struct golden_name ours[] = {
	        golden_rows("input_norm.weight", PARAM_NORM, 0, d),
	        golden_rows("v_proj.weight", PARAM_IN_PROJ, 0, width),
	        golden_rows("q_proj.weight", PARAM_IN_PROJ, width, d),
	        golden_rows("k_proj.weight", PARAM_IN_PROJ, width + d, width),
	        golden_rows("o_proj.weight", PARAM_OUT_PROJ, 0, d),
	        golden_rows("o_proj.bias", PARAM_OUT_BIAS, 0, d),
	};
	const int n = sizeof ours / sizeof ours[0];

	for (int i = 0; i < n; i++)
		names[i] = ours[i];
	return n;
}

static const struct layer_argument griffin_arguments[] = {
        ARGUMENT("window", window, .fallback = 1024, .least = 1,
                 .help = "window W: W keys are seen, the token's own among them"),
        ARGUMENT_HEADS,
        ARGUMENT_POSITION,
        {0}};

const struct layer_class griffin_attention_layer = {
        .name = "griffin_attention",
        .mixes = true,
        .summary = "Griffin's attention in a sliding window, one head of keys for all",
        .arguments = griffin_arguments,
        .widths = griffin_widths,
        .check = griffin_check,
        .out_bias = PARAM_OUT_BIAS,
        .proj_width = proj_width,
        .parameters = griffin_parameters,
        .state = griffin_state,
        .saved = griffin_saved,
        .scratch = griffin_scratch,
        .forward = griffin_forward,
        .backward = griffin_backward,
        .step = griffin_step,
        .scores = griffin_scores,
        .golden_names = griffin_golden_names,
};
