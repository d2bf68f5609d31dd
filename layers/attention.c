/*
 * Causal softmax attention, and sliding-window attention: the same layer with
 * a window. InProj's columns are v, q, k.
 */
#include <math.h>
#include <stdlib.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"

enum { STATE_K, STATE_V };
enum { SAVED_LSE = SAVED_OTHER };

extern const struct layer_class swa_layer;

static int64_t proj_width(const struct layer_config *config)
{
	return 3 * config->d_model;
}

static int64_t head_width(const struct layer_config *config)
{
	return config->d_model / config->n_heads;
}

static bool has_window(const struct layer_config *config)
{
	return config->class == &swa_layer;
}

/* Slots of the cache: a ring of the window and the token itself, or every position. */
static int64_t cache_slots(const struct layer_config *config, const struct layer_shape *shape)
{
	int64_t ring = config->window + 1;

	return has_window(config) && ring < shape->capacity ? ring : shape->capacity;
}

static enum status attention_check(const struct layer_config *config)
{
	if (has_window(config) && config->window < 0)
		return status_set(STATUS_INVALID, "--window: %lld (allowed: 0 or more)",
		                  (long long)config->window);
	return mixing_check(config, true);
}

static int attention_parameters(const struct layer_config *config, struct tensor_spec *specs)
{
	return mixing_parameters(config, proj_width(config), specs);
}

static int attention_state(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	int64_t h = config->n_heads, slots = cache_slots(config, shape), d = head_width(config);

	specs[STATE_K] = (struct tensor_spec){
	        "k_cache", STORAGE_ACTIVATION, 4, {shape->batch, h, slots, d}, INIT_ZEROS};
	specs[STATE_V] = specs[STATE_K];
	specs[STATE_V].name = "v_cache";
	return 2;
}

static int attention_saved(const struct layer_config *config, const struct layer_shape *shape,
                           struct tensor_spec *specs)
{
	int n = mixing_saved(config, shape, proj_width(config), specs);
	int64_t length = shape->pass == PASS_TRAIN ? shape->seq_len : 0;

	specs[n++] = (struct tensor_spec){
	        "lse", STORAGE_FP32, 3, {shape->batch, config->n_heads, length}, INIT_ZEROS};
	return n;
}

static int attention_scratch(const struct layer_config *config, const struct layer_shape *shape,
                             struct tensor_spec *specs)
{
	return mixing_scratch(config, shape, proj_width(config), specs);
}

/* Column block i (0: v, 1: q, 2: k) of InProj's output or its gradient. */
static struct view column_block(const struct context *ctx, const struct layer_config *config,
                                const struct layer_shape *shape, void *proj, int64_t i)
{
	return mixing_columns(ctx, proj, shape->seq_len, proj_width(config), i * config->d_model,
	                      head_width(config));
}

static struct view cache_view(const struct layer_config *config, const struct layer_shape *shape,
                              void *cache)
{
	return mixing_slots(cache, config->n_heads, cache_slots(config, shape), head_width(config));
}

/* Whether prefill can attend to the cache it fills: it holds every token. */
static bool attends_to_cache(const struct layer_config *config, const struct layer_shape *shape)
{
	return shape->capacity > 0 && cache_slots(config, shape) >= shape->seq_len;
}

static struct attention_args attention_args(const struct context *ctx,
                                            const struct layer_config *config,
                                            const struct layer_shape *shape,
                                            const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ];
	struct attention_args args = {
	        .batch = shape->batch,
	        .n_heads = config->n_heads,
	        .q_heads = config->n_heads,
	        .d_head = head_width(config),
	        .seq_len = shape->seq_len,
	        .kv_len = shape->seq_len,
	        .mask = has_window(config) ? MASK_WINDOW : MASK_CAUSAL,
	        .window = config->window,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .v = column_block(ctx, config, shape, proj, 0),
	        .q = column_block(ctx, config, shape, proj, 1),
	        .k = column_block(ctx, config, shape, proj, 2),
	        .out = mixing_columns(ctx, memory->saved[SAVED_MIX], shape->seq_len,
	                              config->d_model, 0, head_width(config)),
	        .lse = memory->saved[SAVED_LSE],
	};

	if (attends_to_cache(config, shape)) {
		args.k = cache_view(config, shape, memory->state[STATE_K]);
		args.v = cache_view(config, shape, memory->state[STATE_V]);
	}
	return args;
}

/* Rotates q in place, and k in place or, with v, into a cache that holds every token. */
static enum status rotate(struct context *ctx, const struct layer_config *config,
                          const struct layer_shape *shape, const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ];
	struct rotate_args args = {
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .n_heads = config->n_heads,
	        .d_head = head_width(config),
	        .rope = config->rope,
	        .kv_slots = shape->seq_len,
	        .v = column_block(ctx, config, shape, proj, 0),
	        .q = column_block(ctx, config, shape, proj, 1),
	        .k = column_block(ctx, config, shape, proj, 2),
	};

	args.q_out = args.q;
	args.k_out = args.k;
	if (attends_to_cache(config, shape)) {
		args.kv_slots = cache_slots(config, shape);
		args.k_out = cache_view(config, shape, memory->state[STATE_K]);
		args.v_out = cache_view(config, shape, memory->state[STATE_V]);
	} else if (!config->rope) {
		return STATUS_OK;
	}
	return kernel_run(ctx, OP_ROTATE, &args);
}

/* Copies the last tokens, already rotated, into a ring that is shorter than the sequence. */
static enum status fill_ring(struct context *ctx, const struct layer_config *config,
                             const struct layer_shape *shape, const struct layer_memory *memory)
{
	void *proj = memory->saved[SAVED_PROJ];
	const struct rotate_args args = {
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .n_heads = config->n_heads,
	        .d_head = head_width(config),
	        .first_kv = shape->seq_len - cache_slots(config, shape),
	        .kv_slots = cache_slots(config, shape),
	        .v = column_block(ctx, config, shape, proj, 0),
	        .k = column_block(ctx, config, shape, proj, 2),
	        .k_out = cache_view(config, shape, memory->state[STATE_K]),
	        .v_out = cache_view(config, shape, memory->state[STATE_V]),
	};

	if (shape->capacity == 0 || attends_to_cache(config, shape))
		return STATUS_OK;
	return kernel_run(ctx, OP_ROTATE, &args);
}

static enum status attention_forward(struct context *ctx, const struct layer_config *config,
                                     const struct layer_shape *shape, struct layer_memory *memory,
                                     const void *x, void *y)
{
	const struct attention_args args = attention_args(ctx, config, shape, memory);
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = rotate(ctx, config, shape, memory);
	if (status == STATUS_OK)
		status = fill_ring(ctx, config, shape, memory);
	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_ATTENTION, &args);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

static enum status attention_backward(struct context *ctx, const struct layer_config *config,
                                      const struct layer_shape *shape, struct layer_memory *memory,
                                      const void *x, const void *dy, void *dx)
{
	void *dproj = memory->scratch[SCRATCH_DPROJ];
	const struct attention_backward_args args = {
	        .forward = attention_args(ctx, config, shape, memory),
	        .dout = mixing_columns(ctx, memory->scratch[SCRATCH_DMIX], shape->seq_len,
	                               config->d_model, 0, head_width(config)),
	        .dv = column_block(ctx, config, shape, dproj, 0),
	        .dq = column_block(ctx, config, shape, dproj, 1),
	        .dk = column_block(ctx, config, shape, dproj, 2),
	};
	const struct rotate_backward_args rotate_args = {
	        .batch = shape->batch,
	        .seq_len = shape->seq_len,
	        .n_heads = config->n_heads,
	        .d_head = head_width(config),
	        .rope = true,
	        .dq = args.dq,
	        .dk = args.dk,
	};
	enum status status = mixing_out_proj_backward(ctx, config, shape, memory, dy);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_ATTENTION_BACKWARD, &args);
	if (status == STATUS_OK && config->rope)
		status = kernel_run(ctx, OP_ROTATE_BACKWARD, &rotate_args);
	if (status == STATUS_OK)
		status = mixing_in_proj_backward(ctx, config, shape, memory, proj_width(config), x,
		                                 dy, dx);
	return status;
}

static enum status attention_step(struct context *ctx, const struct layer_config *config,
                                  const struct layer_shape *shape, struct layer_memory *memory,
                                  const int32_t *position, int64_t position_hint, const void *x,
                                  void *y)
{
	void *proj = memory->saved[SAVED_PROJ];
	const struct attention_step_args args = {
	        .batch = shape->batch,
	        .n_heads = config->n_heads,
	        .d_head = head_width(config),
	        .kv_slots = cache_slots(config, shape),
	        .window = has_window(config) ? config->window : -1,
	        .rope = config->rope,
	        .scale = 1.0f / sqrtf((float)head_width(config)),
	        .position = position,
	        .position_hint = position_hint,
	        .v = column_block(ctx, config, shape, proj, 0),
	        .q = column_block(ctx, config, shape, proj, 1),
	        .k = column_block(ctx, config, shape, proj, 2),
	        .k_cache = cache_view(config, shape, memory->state[STATE_K]),
	        .v_cache = cache_view(config, shape, memory->state[STATE_V]),
	        .out = mixing_columns(ctx, memory->saved[SAVED_MIX], 1, config->d_model, 0,
	                              head_width(config)),
	};
	enum status status = mixing_in_proj(ctx, config, shape, memory, proj_width(config), x);

	if (status == STATUS_OK)
		status = kernel_run(ctx, OP_ATTENTION_STEP, &args);
	if (status == STATUS_OK)
		status = mixing_out_proj(ctx, config, shape, memory, x, y);
	return status;
}

/* The reference's own copies of v, q, k [n, H, d], rotated, in one piece of memory. */
static enum status reference_inputs(const struct layer_config *config, int64_t n_seq,
                                    int64_t seq_len, const double *proj, double **memory,
                                    struct reference_attention *a)
{
	int64_t d = head_width(config), n = n_seq * seq_len, count = n * config->d_model;
	enum status status = reference_take(3 * count, memory);

	if (status != STATUS_OK)
		return status;
	for (int64_t i = 0; i < 3; i++) {
		double *block = *memory + i * count;

		reference_get_columns(n, proj_width(config), i * config->d_model, config->d_model,
		                      proj, block);
		if (config->rope && i > 0)
			reference_rotate(n_seq, seq_len, config->n_heads, d, 0, 1, block, block);
	}
	*a = (struct reference_attention){
	        .batch = n_seq,
	        .n_heads = config->n_heads,
	        .q_heads = config->n_heads,
	        .d_head = d,
	        .seq_len = seq_len,
	        .kv_len = seq_len,
	        .mask = has_window(config) ? MASK_WINDOW : MASK_CAUSAL,
	        .window = config->window,
	        .scale = 1 / sqrt((double)d),
	        .v = *memory,
	        .q = *memory + count,
	        .k = *memory + 2 * count,
	};
	return STATUS_OK;
}

static enum status reference_mix(const struct layer_config *config, const double *const *param,
                                 int64_t n_seq, int64_t seq_len, const double *proj, int64_t n_rows,
                                 const int64_t *rows, double *mix)
{
	struct reference_attention a;
	double *memory;
	enum status status = reference_inputs(config, n_seq, seq_len, proj, &memory, &a);

	(void)param;
	if (status != STATUS_OK)
		return status;
	status = reference_attention_forward(&a, n_rows, rows, mix, NULL, NULL);
	reference_release(memory);
	return status;
}

static enum status reference_mix_backward(const struct layer_config *config,
                                          const double *const *param, int64_t batch,
                                          int64_t seq_len, const double *proj, const double *dmix,
                                          double *dproj, double *const *grad)
{
	int64_t d = head_width(config), n = batch * seq_len, count = n * config->d_model;
	struct reference_attention a;
	double *memory, *gradients;
	enum status status = reference_inputs(config, batch, seq_len, proj, &memory, &a);

	(void)param;
	(void)grad;
	if (status != STATUS_OK)
		return status;
	status = reference_take(3 * count, &gradients);
	if (status == STATUS_OK) {
		const struct reference_attention_grads grads = {
		        .dv = gradients, .dq = gradients + count, .dk = gradients + 2 * count};

		status = reference_attention_backward(&a, dmix, &grads);
		for (int64_t i = 0; i < 3; i++) {
			double *block = gradients + i * count;

			if (config->rope && i > 0)
				reference_rotate_backward(batch, seq_len, config->n_heads, d, 0, 1,
				                          block, block);
			reference_set_columns(n, proj_width(config), i * config->d_model,
			                      config->d_model, block, dproj);
		}
		reference_release(gradients);
	}
	reference_release(memory);
	return status;
}

static enum status reference_dproj_rows(const struct layer_config *config,
                                        const double *const *param, const struct layer_run *run,
                                        int64_t seq_len, const double *proj, const double *dmix,
                                        int64_t n_rows, const int64_t *rows, double *dproj)
{
	const struct reference_device *device = reference_in_use();
	int64_t d = head_width(config), count = seq_len * config->d_model;
	struct reference_attention a;
	double *memory, *left;
	enum status status = reference_inputs(config, 1, seq_len, proj, &memory, &a);

	(void)param;
	if (status != STATUS_OK)
		return status;
	status = reference_take(4 * count + seq_len * config->n_heads, &left);
	if (status == STATUS_OK) {
		double *gradients = left + count, *lse = gradients + 3 * count;
		const struct reference_attention_grads grads = {
		        .dv = gradients, .dq = gradients + count, .dk = gradients + 2 * count};
		const struct reference_attention_left forward = {.out = left, .lse = lse};

		status = mixing_load_saved(run, SAVED_MIX, run->backend->activation, count, left);
		if (status == STATUS_OK)
			status = mixing_load_saved(run, SAVED_LSE, DTYPE_F32,
			                           seq_len * config->n_heads, lse);
		if (status == STATUS_OK)
			status = device->attention_backward_rows(&a, &forward, dmix, n_rows, rows,
			                                         n_rows, rows, &grads);
		for (int64_t i = 0; i < 3 && status == STATUS_OK; i++) {
			double *block = gradients + i * count;

			if (config->rope && i > 0)
				device->rotate_backward(1, seq_len, config->n_heads, d, 0, 1, block,
				                        block);
			status = mixing_set_rows(proj_width(config), i * config->d_model,
			                         config->d_model, n_rows, rows, block, dproj);
		}
		reference_release(left);
	}
	reference_release(memory);
	return status;
}

static int64_t summed_columns(const struct layer_config *config, int index)
{
	(void)config;
	(void)index;
	return -1;
}

static enum status reference_step(const struct layer_config *config,
                                  const struct layer_shape *shape, const double *const *param,
                                  int64_t n_seq, int64_t position, const double *proj,
                                  double *const *state, double *mix)
{
	int64_t d = head_width(config), h = config->n_heads, slots = cache_slots(config, shape);
	int64_t row = n_seq * config->d_model, cache = row * slots;
	double *memory;
	enum status status = reference_take(4 * row + 2 * cache, &memory);

	(void)param;
	if (status != STATUS_OK)
		return status;
	double *v = memory, *q = v + row, *k = q + row, *k_stored = k + row;
	double *k_cache = k_stored + row, *v_cache = k_cache + cache;
	for (int64_t i = 0; i < 3; i++)
		reference_get_columns(n_seq, proj_width(config), i * config->d_model,
		                      config->d_model, proj, memory + i * row);
	mixing_from_slots(n_seq, h, slots, d, state[STATE_K], k_cache);
	mixing_from_slots(n_seq, h, slots, d, state[STATE_V], v_cache);
	const struct reference_attention_step step = {
	        .batch = n_seq,
	        .n_heads = h,
	        .d_head = d,
	        .kv_slots = slots,
	        .window = has_window(config) ? config->window : -1,
	        .rope = config->rope,
	        .scale = 1 / sqrt((double)d),
	        .position = position,
	        .q = q,
	        .k = k,
	        .v = v,
	        .k_cache = k_cache,
	        .v_cache = v_cache,
	};

	status = reference_attention_step(&step, mix, k_stored);
	mixing_store_slot(n_seq * h, slots, position % slots, d, k_stored, state[STATE_K]);
	mixing_store_slot(n_seq * h, slots, position % slots, d, v, state[STATE_V]);
	reference_release(memory);
	return status;
}

static int attention_golden_names(const struct layer_config *config, struct golden_name *names)
{
	return mixing_golden_names(config, proj_width(config), names);
}

const struct layer_class attention_layer = {
        .name = "attention",
        .tunables = "position",
        .check = attention_check,
        .parameters = attention_parameters,
        .state = attention_state,
        .saved = attention_saved,
        .scratch = attention_scratch,
        .forward = attention_forward,
        .backward = attention_backward,
        .step = attention_step,
        .reference_anywhere = true,
        .reference_mix = reference_mix,
        .reference_step = reference_step,
        .reference_mix_backward = reference_mix_backward,
        .reference_dproj_rows = reference_dproj_rows,
        .summed_columns = summed_columns,
        .golden_names = attention_golden_names,
};

const struct layer_class swa_layer = {
        .name = "swa",
        .tunables = "window,position",
        .check = attention_check,
        .parameters = attention_parameters,
        .state = attention_state,
        .saved = attention_saved,
        .scratch = attention_scratch,
        .forward = attention_forward,
        .backward = attention_backward,
        .step = attention_step,
        .reference_anywhere = true,
        .reference_mix = reference_mix,
        .reference_step = reference_step,
        .reference_mix_backward = reference_mix_backward,
        .reference_dproj_rows = reference_dproj_rows,
        .summed_columns = summed_columns,
        .golden_names = attention_golden_names,
};
