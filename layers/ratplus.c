/*
 * RAT+ (arXiv 2602.18196): a gated recurrence over keys and values of the whole sequence, then
 * softmax attention to a few of what it leaves: of every `dilation` tokens the last, the first
 * `initial`, and those within the window. InProj's columns are o, q, k, v, g (D each).
 *
 * The state has the recurrence's last key and value, and two caches of rotated keys and their
 * values: of tokens that are kept for all that follow, in their order, and a ring of the window.
 */
#include <math.h>

#include "kernels/key_lists.h"
#include "layers/mixing.h"

enum {
	STATE_K_KEPT,
	STATE_V_KEPT,
	STATE_K_RECENT,
	STATE_V_RECENT,
	STATE_K, /* the recurrence's, not rotated */
	STATE_V,
	N_STATES
};
enum {
	SAVED_K = SAVED_OTHER, /* what the recurrence makes of keys and values */
	SAVED_V,
	SAVED_Q_ROTATED, /* with rotary positions */
	SAVED_K_ROTATED,
	SAVED_UNGATED, /* training */
	SAVED_LSE,     /* training */
	N_SAVED
};
/* Gradients of the rotated ones, of the recurrence's, and the gate's from the keys alone. */
enum {
	SCRATCH_DQ_ROTATED = SCRATCH_OTHER,
	SCRATCH_DK_ROTATED,
	SCRATCH_DK,
	SCRATCH_DV,
	SCRATCH_DGATE,
	N_SCRATCH
};
/* Column blocks of InProj's output, in order. */
enum block { BLOCK_O, BLOCK_Q, BLOCK_K, BLOCK_V, BLOCK_G, N_BLOCKS };

static int64_t head_width(const struct layer_config *config)
{
	return config->d_model / config->n_heads;
}

static int64_t proj_width(const struct layer_config *config)
{
	return N_BLOCKS * config->d_model;
}

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* What a token's key has of its own columns is up to the gates. */
static struct score_parts ratplus_scores(const struct layer_config *config)
{
	const int64_t d = config->d_model;

	return (struct score_parts){BLOCK_Q * d,        d,           BLOCK_K * d, d,
	                            head_width(config), STATE_K_KEPT};
}

/* Kept tokens among the first `length`, and slots for them, of which there is always one. */
static int64_t kept_tokens(const struct layer_config *config, int64_t length)
{
	return keys_before(KEYS_KEPT, config->dilation, config->initial, length);
}

static int64_t kept_slots(const struct layer_config *config, int64_t capacity)
{
	const int64_t kept = kept_tokens(config, capacity);

	return kept > 0 || capacity == 0 ? kept : 1;
}

static int64_t recent_slots(const struct layer_config *config, int64_t capacity)
{
	return smaller(config->window + 1, capacity);
}

static int ratplus_state(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs)
{
	static const char *const names[] = {"k_kept", "v_kept", "k_recent", "v_recent"};
	const int64_t h = config->n_heads, width = head_width(config);
	const int64_t d = shape->capacity ? config->d_model : 0;

	for (int i = STATE_K_KEPT; i <= STATE_V_RECENT; i++) {
		const int64_t slots = i < STATE_K_RECENT ? kept_slots(config, shape->capacity)
		                                         : recent_slots(config, shape->capacity);

		specs[i] = (struct tensor_spec){names[i],
		                                STORAGE_ACTIVATION,
		                                4,
		                                {shape->batch, h, slots, width},
		                                INIT_ZEROS};
	}
	specs[STATE_K] = tensor_rows("k_state", STORAGE_FP32, shape->batch, d);
	specs[STATE_V] = tensor_rows("v_state", STORAGE_FP32, shape->batch, d);
	return N_STATES;
}

static int ratplus_saved(const struct layer_config *config, const struct layer_shape *shape,
                         struct tensor_spec *specs)
{
	const int64_t d = config->d_model;
	const int64_t n = shape->pass == PASS_GENERATION ? 0 : shape->batch * shape->seq_len;
	const int64_t rotated = config->rope ? n : 0, train = shape->pass == PASS_TRAIN ? n : 0;

	mixing_saved(config, shape, specs);
	specs[SAVED_K] = tensor_rows("k", STORAGE_ACTIVATION, n, d);
	specs[SAVED_V] = tensor_rows("v", STORAGE_ACTIVATION, n, d);
	specs[SAVED_Q_ROTATED] = tensor_rows("q_rotated", STORAGE_ACTIVATION, rotated, d);
	specs[SAVED_K_ROTATED] = tensor_rows("k_rotated", STORAGE_ACTIVATION, rotated, d);
	specs[SAVED_UNGATED] = tensor_rows("ungated", STORAGE_ACTIVATION, train, d);
	specs[SAVED_LSE] = tensor_rows("lse", STORAGE_FP32, train, config->n_heads);
	return N_SAVED;
}

static int ratplus_scratch(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	const int64_t n = shape->batch * shape->seq_len, d = config->d_model;
	const int64_t rotated = config->rope ? n : 0;

	mixing_scratch(config, shape, specs);
	specs[SCRATCH_DQ_ROTATED] = tensor_rows("dq_rotated", STORAGE_ACTIVATION, rotated, d);
	specs[SCRATCH_DK_ROTATED] = tensor_rows("dk_rotated", STORAGE_ACTIVATION, rotated, d);
	specs[SCRATCH_DK] = tensor_rows("dk", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DV] = tensor_rows("dv", STORAGE_ACTIVATION, n, d);
	specs[SCRATCH_DGATE] = tensor_rows("dgate", STORAGE_ACTIVATION, n, d);
	return N_SCRATCH;
}

/* A whole tensor [N, D] as heads, and a block of InProj's output. */
static struct view whole(const struct layer_run *run, void *tensor)
{
	return mixing_heads(run, tensor, run->config->d_model);
}

static struct view proj_block(const struct layer_run *run, enum block block)
{
	return mixing_block(run, run->memory->saved[SAVED_PROJ], block);
}

static struct view cache_view(const struct layer_run *run, int state)
{
	const int64_t capacity = run->shape->capacity;

	return mixing_slots(run, run->memory->state[state], run->config->n_heads,
	                    state < STATE_K_RECENT ? kept_slots(run->config, capacity)
	                                           : recent_slots(run->config, capacity));
}

/* ---- the sequence ---- */

/* The recurrence over keys or, of BLOCK_V, over values. */
static struct recurrence_args scan_args(const struct layer_run *run, enum block block)
{
	const bool keys = block == BLOCK_K;

	return (struct recurrence_args){
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .d_model = run->config->d_model,
	        .form = GATE_SIGMOID,
	        .x = proj_block(run, block),
	        .gate = proj_block(run, BLOCK_G),
	        .out = whole(run, run->memory->saved[keys ? SAVED_K : SAVED_V]),
	        .h_final = run->memory->state[keys ? STATE_K : STATE_V],
	};
}

static struct view queries(const struct layer_run *run)
{
	return run->config->rope ? whole(run, run->memory->saved[SAVED_Q_ROTATED])
	                         : proj_block(run, BLOCK_Q);
}

static struct view keys(const struct layer_run *run)
{
	return whole(run, run->memory->saved[run->config->rope ? SAVED_K_ROTATED : SAVED_K]);
}

static enum status rotate(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	const struct rotate_args args = {
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = config->n_heads,
	        .d_head = head_width(config),
	        .rope = true,
	        .kv_slots = run->shape->seq_len,
	        .q = proj_block(run, BLOCK_Q),
	        .k = whole(run, run->memory->saved[SAVED_K]),
	        .q_out = queries(run),
	        .k_out = keys(run),
	};

	return config->rope ? run_rotate(run->ctx, &args) : STATUS_OK;
}

/* Where all keys are seen, or those of the window alone, more kernels know the mask. */
static enum mask mask_of(const struct layer_config *config, int64_t length)
{
	if (config->dilation == 1 || config->window >= length - 1)
		return MASK_CAUSAL;
	return config->dilation == 0 && config->initial == 0 ? MASK_WINDOW : MASK_DILATED;
}

static struct attention_args attention_args(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *const *saved = run->memory->saved;

	return (struct attention_args){
	        .batch = run->shape->batch,
	        .n_heads = config->n_heads,
	        .q_heads = config->n_heads,
	        .kv_heads = config->n_heads,
	        .d_head = head_width(config),
	        .seq_len = run->shape->seq_len,
	        .kv_len = run->shape->seq_len,
	        .mask = mask_of(config, run->shape->seq_len),
	        .window = config->window,
	        .dilation = config->dilation,
	        .initial = config->initial,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .q = queries(run),
	        .k = keys(run),
	        .v = whole(run, saved[SAVED_V]),
	        .gate = proj_block(run, BLOCK_O),
	        .out = whole(run, saved[SAVED_MIX]),
	        .out_ungated = whole(run, saved[SAVED_UNGATED]),
	        .lse = saved[SAVED_LSE],
	};
}

/* Every step-th row of a view from token `first` on. */
static struct view every(const struct layer_run *run, struct view view, int64_t first, int64_t step)
{
	view.data = mixing_column(run->ctx, view.data, first * view.token);
	view.token *= step;
	return view;
}

/* Copies `count` tokens of keys and values, every step-th from `first` on, to a cache's slots from
 * `slot` on; a ring of `slots` < count has the last of them. */
static enum status fill(const struct layer_run *run, int cache, int64_t first, int64_t step,
                        int64_t count, int64_t slot, int64_t slots)
{
	const struct layer_config *config = run->config;
	const struct rotate_args args = {
	        .batch = run->shape->batch,
	        .seq_len = count,
	        .n_heads = config->n_heads,
	        .kv_heads = config->n_heads,
	        .d_head = head_width(config),
	        .first_kv = count > slots ? count - slots : 0,
	        .kv_slots = slots,
	        .k = every(run, keys(run), first, step),
	        .v = every(run, whole(run, run->memory->saved[SAVED_V]), first, step),
	        .k_out = every(run, cache_view(run, cache), slot, 1),
	        .v_out = every(run, cache_view(run, cache + 1), slot, 1),
	};

	return count > 0 ? run_rotate(run->ctx, &args) : STATUS_OK;
}

static enum status fill_caches(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	const int64_t length = run->shape->seq_len, initial = smaller(config->initial, length);
	const int64_t dilated = kept_tokens(config, length) - initial;
	const int64_t step = config->dilation > 0 ? config->dilation : 1;

	if (run->shape->capacity == 0)
		return STATUS_OK;
	TRY(fill(run, STATE_K_KEPT, 0, 1, initial, 0, initial));
	TRY(fill(run, STATE_K_KEPT, (initial / step + 1) * step - 1, step, dilated, initial,
	         dilated));
	return fill(run, STATE_K_RECENT, 0, 1, length, 0,
	            recent_slots(config, run->shape->capacity));
}

static enum status ratplus_forward(const struct layer_run *run)
{
	const struct recurrence_args scan_k = scan_args(run, BLOCK_K);
	const struct recurrence_args scan_v = scan_args(run, BLOCK_V);
	const struct attention_args attention = attention_args(run);

	TRY(run_recurrence(run->ctx, &scan_k));
	TRY(run_recurrence(run->ctx, &scan_v));
	TRY(rotate(run));
	TRY(fill_caches(run));
	return run_attention(run->ctx, &attention);
}

/* ---- its gradients ---- */

/* Of the keys' recurrence or, of BLOCK_V, the values', which comes second: it adds to the gate's.
 */
static enum status scan_backward(const struct layer_run *run, enum block block)
{
	void *const *scratch = run->memory->scratch;
	const bool keys = block == BLOCK_K;
	const struct view gate = mixing_block(run, scratch[SCRATCH_DPROJ], BLOCK_G);
	const struct view of_keys = whole(run, scratch[SCRATCH_DGATE]), none = {.data = NULL};
	const struct recurrence_backward_args args = {
	        .forward = scan_args(run, block),
	        .dout = whole(run, scratch[keys ? SCRATCH_DK : SCRATCH_DV]),
	        .dgate_base = keys ? none : of_keys,
	        .dx = mixing_block(run, scratch[SCRATCH_DPROJ], block),
	        .dgate = keys ? of_keys : gate,
	};

	return run_recurrence_backward(run->ctx, &args);
}

static enum status ratplus_backward(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	void *const *scratch = run->memory->scratch;
	const struct rotate_backward_args rotate_args = {
	        .batch = run->shape->batch,
	        .seq_len = run->shape->seq_len,
	        .n_heads = config->n_heads,
	        .kv_heads = config->n_heads,
	        .d_head = head_width(config),
	        .rope = true,
	        .dq_out = whole(run, scratch[SCRATCH_DQ_ROTATED]),
	        .dk_out = whole(run, scratch[SCRATCH_DK_ROTATED]),
	        .dq = mixing_block(run, scratch[SCRATCH_DPROJ], BLOCK_Q),
	        .dk = whole(run, scratch[SCRATCH_DK]),
	};
	const struct attention_backward_args attention = {
	        .forward = attention_args(run),
	        .dout = whole(run, scratch[SCRATCH_DMIX]),
	        .dq = config->rope ? rotate_args.dq_out : rotate_args.dq,
	        .dk = config->rope ? rotate_args.dk_out : rotate_args.dk,
	        .dv = whole(run, scratch[SCRATCH_DV]),
	        .dgate = mixing_block(run, scratch[SCRATCH_DPROJ], BLOCK_O),
	};

	TRY(run_attention_backward(run->ctx, &attention));
	if (config->rope)
		TRY(run_rotate_backward(run->ctx, &rotate_args));
	TRY(scan_backward(run, BLOCK_K));
	return scan_backward(run, BLOCK_V);
}

/* ---- a token ---- */

static enum status ratplus_step(const struct layer_run *run)
{
	const struct layer_config *config = run->config;
	const int64_t capacity = run->shape->capacity;
	const struct ratplus_step_args args = {
	        .batch = run->shape->batch,
	        .n_heads = config->n_heads,
	        .d_head = head_width(config),
	        .window = config->window,
	        .dilation = config->dilation,
	        .initial = config->initial,
	        .kept_slots = kept_slots(config, capacity),
	        .recent_slots = recent_slots(config, capacity),
	        .rope = config->rope,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .position = run->position,
	        .position_hint = run->position_hint,
	        .z = proj_block(run, BLOCK_O),
	        .q = proj_block(run, BLOCK_Q),
	        .k = proj_block(run, BLOCK_K),
	        .v = proj_block(run, BLOCK_V),
	        .gate = proj_block(run, BLOCK_G),
	        .k_state = run->memory->state[STATE_K],
	        .v_state = run->memory->state[STATE_V],
	        .k_kept = cache_view(run, STATE_K_KEPT),
	        .v_kept = cache_view(run, STATE_V_KEPT),
	        .k_recent = cache_view(run, STATE_K_RECENT),
	        .v_recent = cache_view(run, STATE_V_RECENT),
	        .out = whole(run, run->memory->saved[SAVED_MIX]),
	};

	return run_ratplus_step(run->ctx, &args);
}

/* The first token begins from zero. */
static bool ratplus_remembers(const struct layer_config *config, int64_t position)
{
	return position == 0;
}

static int golden_names(const struct layer_config *config, struct golden_name *names)
{
	int n = mixing_golden_names(config, names);

	names[n++] = golden_columns("state.k", STATE_K, 0, config->d_model, false);
	names[n++] = golden_columns("state.v", STATE_V, 0, config->d_model, false);
	return n;
}

static const struct layer_argument ratplus_arguments[] = {
        ARGUMENT("dilation", dilation, .fallback = 16,
                 .help = "of every so many tokens the last is seen by all that follow; 0: none"),
        ARGUMENT("window", window, .fallback = 256,
                 .help = "window W of RAT+: the last W + 1 keys are seen"),
        ARGUMENT("initial", initial, .fallback = 4, .help = "first tokens that all others see"),
        ARGUMENT_HEADS,
        ARGUMENT_POSITION,
        {0}};

const struct layer_class ratplus_layer = {
        .name = "ratplus",
        .mixes = true,
        .summary = "RAT+: a recurrence, and attention to few of its states",
        .arguments = ratplus_arguments,
        .check = mixing_check,
        .proj_width = proj_width,
        .parameters = mixing_parameters,
        .state = ratplus_state,
        .saved = ratplus_saved,
        .scratch = ratplus_scratch,
        .forward = ratplus_forward,
        .backward = ratplus_backward,
        .step = ratplus_step,
        .remembers = ratplus_remembers,
        .scores = ratplus_scores,
        .golden_names = golden_names,
};
