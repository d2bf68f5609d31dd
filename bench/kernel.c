#include "bench/kernel.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench/kernel_check.h"
#include "layers/noise.h"

/* Random numbers that are made once, and the pieces of them that larger tensors are put together
 * from, each from another place. */
enum { POOL_COUNT = 1 << 22, PIECE_COUNT = 1 << 18, ALIGNMENT = 256 };

/* ---- operands ---- */

static void *take(struct kernel_problem *p, enum operand_role role, enum dtype dtype,
                  enum distribution distribution, float scale, int64_t count)
{
	const size_t bytes = (size_t)count * dtype_size(dtype);
	struct operand *o = &p->operand[p->n_operands++];

	*o = (struct operand){dtype, role, distribution, scale, count, p->base + p->bytes};
	p->bytes += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	return o->data;
}

/* Activations that are read, normal. */
static void *input(struct kernel_problem *p, int64_t count)
{
	return take(p, OPERAND_INPUT, p->backend->activation, DRAW_NORMAL, 1, count);
}

static void *output(struct kernel_problem *p, int64_t count)
{
	return take(p, OPERAND_OUTPUT, p->backend->activation, DRAW_NONE, 0, count);
}

static float *parameter(struct kernel_problem *p, float scale, int64_t count)
{
	return take(p, OPERAND_INPUT, DTYPE_F32, DRAW_UNIFORM, scale, count);
}

static float *state(struct kernel_problem *p, int64_t count)
{
	return take(p, OPERAND_STATE, DTYPE_F32, DRAW_NORMAL, 1, count);
}

static int32_t *position(struct kernel_problem *p)
{
	return take(p, OPERAND_INPUT, DTYPE_I32, DRAW_POSITION, 0, 1);
}

/* A dense [B, T, H, d] tensor. */
static struct view tokens(void *data, int64_t seq_len, int64_t n_heads, int64_t d)
{
	return (struct view){data, seq_len * n_heads * d, n_heads * d, d};
}

/* A cache [B, H, slots, d] as [B, slots, H, d]. */
static struct view slots(void *data, int64_t n_slots, int64_t n_heads, int64_t d)
{
	return (struct view){data, n_heads * n_slots * d, d, n_slots * d};
}

static struct view input_tokens(struct kernel_problem *p, int64_t seq_len, int64_t n_heads,
                                int64_t d)
{
	return tokens(input(p, p->batch * seq_len * n_heads * d), seq_len, n_heads, d);
}

static struct view output_tokens(struct kernel_problem *p, int64_t seq_len, int64_t n_heads,
                                 int64_t d)
{
	return tokens(output(p, p->batch * seq_len * n_heads * d), seq_len, n_heads, d);
}

static struct view input_slots(struct kernel_problem *p)
{
	return slots(input(p, p->batch * p->n_heads * p->kv_len * p->d_head), p->kv_len, p->n_heads,
	             p->d_head);
}

static float head_scale(int64_t d)
{
	return (float)(1 / sqrt((double)d));
}

/* ---- kinds ---- */

/* Causal, in a window, or over RAT's chunks with own token and gate. */
static void build_attention(struct kernel_problem *p)
{
	const bool chunks = p->chunk != NO_VALUE;
	struct attention_args *a = &p->args.attention;

	p->kv_len = chunks ? (p->seq_len + p->chunk - 1) / p->chunk : p->seq_len;
	*a = (struct attention_args){
	        .batch = p->batch,
	        .n_heads = p->n_heads,
	        .q_heads = chunks ? p->groups : p->n_heads,
	        .d_head = p->d_head,
	        .seq_len = p->seq_len,
	        .kv_len = p->kv_len,
	        .mask = chunks                  ? MASK_CHUNK
	                : p->window != NO_VALUE ? MASK_WINDOW
	                                        : MASK_CAUSAL,
	        .window = p->window,
	        .chunk = p->chunk,
	        .scale = head_scale(p->d_head),
	};
	a->q = input_tokens(p, p->seq_len, a->q_heads, p->d_head);
	a->k = chunks ? input_slots(p) : input_tokens(p, p->kv_len, p->n_heads, p->d_head);
	a->v = chunks ? input_slots(p) : input_tokens(p, p->kv_len, p->n_heads, p->d_head);
	if (chunks) {
		a->own_score = take(p, OPERAND_INPUT, DTYPE_F32, DRAW_NORMAL, 1,
		                    p->batch * p->seq_len * p->n_heads);
		a->own_value = input_tokens(p, p->seq_len, p->n_heads, p->d_head);
		a->gate = input_tokens(p, p->seq_len, p->n_heads, p->d_head);
	}
	a->out = output_tokens(p, p->seq_len, p->n_heads, p->d_head);
}

static void build_attention_step(struct kernel_problem *p)
{
	struct attention_step_args *a = &p->args.attention_step;

	p->kv_len = p->seq_len;
	*a = (struct attention_step_args){
	        .batch = p->batch,
	        .n_heads = p->n_heads,
	        .d_head = p->d_head,
	        .kv_slots = p->kv_len,
	        .window = -1,
	        .rope = true,
	        .scale = head_scale(p->d_head),
	        .position = position(p),
	        .position_hint = p->seq_len - 1,
	};
	a->q = input_tokens(p, 1, p->n_heads, p->d_head);
	a->k = input_tokens(p, 1, p->n_heads, p->d_head);
	a->v = input_tokens(p, 1, p->n_heads, p->d_head);
	a->k_cache = input_slots(p);
	a->v_cache = input_slots(p);
	a->out = output_tokens(p, 1, p->n_heads, p->d_head);
}

static void build_rat_scan(struct kernel_problem *p)
{
	const int64_t width = p->n_heads * p->d_head;
	struct rat_scan_args *a = &p->args.rat_scan;

	p->kv_len = (p->seq_len + p->chunk - 1) / p->chunk;
	*a = (struct rat_scan_args){
	        .batch = p->batch,
	        .seq_len = p->seq_len,
	        .n_heads = p->n_heads,
	        .groups = p->groups,
	        .d_head = p->d_head,
	        .chunk = p->chunk,
	        .rope = true,
	        .scale = head_scale(p->d_head),
	};
	a->v = input_tokens(p, p->seq_len, p->n_heads, p->d_head);
	a->gate = input_tokens(p, p->seq_len, p->n_heads, p->d_head);
	a->q = input_tokens(p, p->seq_len, p->groups, p->d_head);
	a->k = input_tokens(p, p->seq_len, p->groups, p->d_head);
	a->gate_bias = parameter(p, 3, width);
	a->v_scan = output_tokens(p, p->seq_len, p->n_heads, p->d_head);
	a->own_score = take(p, OPERAND_OUTPUT, DTYPE_F32, DRAW_NONE, 0,
	                    p->batch * p->seq_len * p->n_heads);
	a->q_out = output_tokens(p, p->seq_len, p->groups, p->d_head);
	a->k_chunk =
	        slots(output(p, p->batch * p->kv_len * width), p->kv_len, p->n_heads, p->d_head);
	a->v_chunk =
	        slots(output(p, p->batch * p->kv_len * width), p->kv_len, p->n_heads, p->d_head);
}

static void build_rat_step(struct kernel_problem *p)
{
	const int64_t width = p->n_heads * p->d_head;
	struct rat_step_args *a = &p->args.rat_step;

	p->kv_len = (p->seq_len + p->chunk - 1) / p->chunk;
	*a = (struct rat_step_args){
	        .batch = p->batch,
	        .n_heads = p->n_heads,
	        .groups = p->groups,
	        .d_head = p->d_head,
	        .chunk = p->chunk,
	        .chunk_slots = p->kv_len,
	        .rope = true,
	        .scale = head_scale(p->d_head),
	        .position = position(p),
	        .position_hint = p->seq_len - 1,
	};
	a->z = input_tokens(p, 1, p->n_heads, p->d_head);
	a->v = input_tokens(p, 1, p->n_heads, p->d_head);
	a->gate = input_tokens(p, 1, p->n_heads, p->d_head);
	a->q = input_tokens(p, 1, p->groups, p->d_head);
	a->k = input_tokens(p, 1, p->groups, p->d_head);
	a->gate_bias = parameter(p, 3, width);
	a->k_state = state(p, p->batch * width);
	a->v_state = state(p, p->batch * width);
	a->k_chunk = input_slots(p);
	a->v_chunk = input_slots(p);
	a->out = output_tokens(p, 1, p->n_heads, p->d_head);
}

/* HGRN's vector form, of which other libraries have kernels. */
static void build_recurrence(struct kernel_problem *p)
{
	const int64_t width = p->n_heads * p->d_head, count = p->batch * p->seq_len * width;
	struct recurrence_args *a = &p->args.recurrence;

	*a = (struct recurrence_args){
	        .batch = p->batch, .seq_len = p->seq_len, .d_model = width, .form = GATE_LOG_DECAY};
	a->x = input_tokens(p, p->seq_len, 1, width);
	a->gate = tokens(take(p, OPERAND_INPUT, p->backend->activation, DRAW_LOG_DECAY, 1, count),
	                 p->seq_len, 1, width);
	a->out = output_tokens(p, p->seq_len, 1, width);
}

/* The paper's, as its block runs it. */
static void build_gated_recurrence(struct kernel_problem *p)
{
	const int64_t width = p->n_heads * p->d_head;
	struct recurrence_args *a = &p->args.recurrence;

	*a = (struct recurrence_args){
	        .batch = p->batch, .seq_len = p->seq_len, .d_model = width, .form = GATE_SIGMOID};
	a->x = input_tokens(p, p->seq_len, 1, width);
	a->gate = input_tokens(p, p->seq_len, 1, width);
	a->z = input_tokens(p, p->seq_len, 1, width);
	a->gate_bias = parameter(p, 5, width);
	a->out = output_tokens(p, p->seq_len, 1, width);
}

static void build_recurrence_step(struct kernel_problem *p)
{
	const int64_t width = p->n_heads * p->d_head;
	struct recurrence_step_args *a = &p->args.recurrence_step;

	*a = (struct recurrence_step_args){
	        .batch = p->batch, .d_model = width, .form = GATE_SIGMOID};
	a->x = input_tokens(p, 1, 1, width);
	a->gate = input_tokens(p, 1, 1, width);
	a->z = input_tokens(p, 1, 1, width);
	a->gate_bias = parameter(p, 5, width);
	a->h = state(p, p->batch * width);
	a->out = output_tokens(p, 1, 1, width);
}

/* Log decays of `seq_len` tokens, shaped as the decay wants them. */
static struct view log_decays(struct kernel_problem *p, int64_t seq_len)
{
	const int64_t width = p->kind->decay == DECAY_DIAGONAL ? p->d_k : 1;

	if (p->kind->decay != DECAY_DIAGONAL && p->kind->decay != DECAY_SCALAR)
		return (struct view){0};
	return tokens(take(p, OPERAND_INPUT, p->backend->activation, DRAW_LOG_DECAY, 1,
	                   p->batch * seq_len * p->n_heads * width),
	              seq_len, p->n_heads, width);
}

/* Keys; of about unit length for a delta rule, whose states long ones would let grow. */
static struct view keys(struct kernel_problem *p)
{
	const float scale = p->kind->rule == RULE_DELTA ? head_scale(p->d_k) : 1;

	return tokens(take(p, OPERAND_INPUT, p->backend->activation, DRAW_NORMAL, scale,
	                   p->batch * p->seq_len * p->n_heads * p->d_k),
	              p->seq_len, p->n_heads, p->d_k);
}

static void build_matrix(struct kernel_problem *p)
{
	struct matrix_recurrence_args *a = &p->args.matrix;

	*a = (struct matrix_recurrence_args){
	        .batch = p->batch,
	        .seq_len = p->seq_len,
	        .n_heads = p->n_heads,
	        .d_k = p->d_k,
	        .d_v = p->d_v,
	        .decay = p->kind->decay,
	        .rule = p->kind->rule,
	        .chunk = p->chunk == NO_VALUE ? 0 : p->chunk,
	        .scale = head_scale(p->d_k),
	};
	a->q = input_tokens(p, p->seq_len, p->n_heads, p->d_k);
	a->k = keys(p);
	a->v = input_tokens(p, p->seq_len, p->n_heads, p->d_v);
	a->log_decay = log_decays(p, p->seq_len);
	if (p->kind->rule == RULE_DELTA)
		a->beta = tokens(take(p, OPERAND_INPUT, p->backend->activation, DRAW_UNIFORM, 1,
		                      p->batch * p->seq_len * p->n_heads),
		                 p->seq_len, p->n_heads, 1);
	if (p->kind->rule == RULE_BONUS)
		a->bonus = parameter(p, 2, p->n_heads * p->d_k);
	a->out = output_tokens(p, p->seq_len, p->n_heads, p->d_v);
}

static void build_matrix_step(struct kernel_problem *p)
{
	struct matrix_recurrence_step_args *a = &p->args.matrix_step;

	*a = (struct matrix_recurrence_step_args){
	        .batch = p->batch,
	        .n_heads = p->n_heads,
	        .d_k = p->d_k,
	        .d_v = p->d_v,
	        .decay = p->kind->decay,
	        .rule = p->kind->rule,
	        .scale = head_scale(p->d_k),
	};
	a->q = input_tokens(p, 1, p->n_heads, p->d_k);
	a->k = input_tokens(p, 1, p->n_heads, p->d_k);
	a->v = input_tokens(p, 1, p->n_heads, p->d_v);
	a->log_decay = log_decays(p, 1);
	a->state = state(p, p->batch * p->n_heads * p->d_k * p->d_v);
	a->out = output_tokens(p, 1, p->n_heads, p->d_v);
}

static void *weight(struct kernel_problem *p)
{
	return take(p, OPERAND_INPUT, p->backend->activation, DRAW_NORMAL, 0.02f, p->d_k * p->d_v);
}

static void build_linear(struct kernel_problem *p)
{
	const int64_t n = p->batch * p->seq_len;

	p->args.linear = (struct linear_residual_args){.n_tokens = n,
	                                               .d_in = p->d_k,
	                                               .d_out = p->d_v,
	                                               .x = input(p, n * p->d_k),
	                                               .weight = weight(p),
	                                               .y = output(p, n * p->d_v)};
}

static void build_norm_linear(struct kernel_problem *p)
{
	const int64_t n = p->batch * p->seq_len;

	p->args.norm_linear = (struct norm_linear_args){.n_tokens = n,
	                                                .d_in = p->d_k,
	                                                .d_out = p->d_v,
	                                                .eps = 1e-6f,
	                                                .x = input(p, n * p->d_k),
	                                                .norm_weight = parameter(p, 2, p->d_k),
	                                                .weight = weight(p),
	                                                .x_norm = output(p, n * p->d_k),
	                                                .y = output(p, n * p->d_v)};
}

const struct kernel_kind kernel_kinds[] = {
        {"attention_forward", OP_ATTENTION, .build = build_attention, .check = check_attention},
        {"attention_decode", OP_ATTENTION_STEP, .step = true, .build = build_attention_step,
         .check = check_attention_step, .keep = keep_attention_step},
        {"rat_scan_forward", OP_RAT_SCAN, .build = build_rat_scan, .check = check_rat_scan},
        {"rat_decode", OP_RAT_STEP, .step = true, .build = build_rat_step, .check = check_rat_step,
         .keep = keep_rat_step},
        {"recurrence_forward", OP_RECURRENCE, .build = build_recurrence, .check = check_recurrence},
        {"gated_recurrence_forward", OP_RECURRENCE, .build = build_gated_recurrence,
         .check = check_recurrence},
        {"recurrence_step", OP_RECURRENCE_STEP, .step = true, .build = build_recurrence_step,
         .check = check_recurrence_step, .keep = keep_recurrence_step},
        {"gla_forward", OP_MATRIX_RECURRENCE, .chunkwise = true, .decay = DECAY_DIAGONAL,
         .rule = RULE_PLAIN, .half_keys = true, .build = build_matrix, .check = check_matrix},
        {"rwkv6_forward", OP_MATRIX_RECURRENCE, .chunkwise = true, .decay = DECAY_DIAGONAL,
         .rule = RULE_BONUS, .build = build_matrix, .check = check_matrix},
        {"scalar_decay_forward", OP_MATRIX_RECURRENCE, .chunkwise = true, .decay = DECAY_SCALAR,
         .rule = RULE_PLAIN, .build = build_matrix, .check = check_matrix},
        {"retention_forward", OP_MATRIX_RECURRENCE, .chunkwise = true, .decay = DECAY_CONSTANT,
         .rule = RULE_PLAIN, .build = build_matrix, .check = check_matrix},
        {"linear_attention_forward", OP_MATRIX_RECURRENCE, .chunkwise = true, .decay = DECAY_NONE,
         .rule = RULE_PLAIN, .build = build_matrix, .check = check_matrix},
        {"gated_delta_forward", OP_MATRIX_RECURRENCE, .chunkwise = true, .decay = DECAY_SCALAR,
         .rule = RULE_DELTA, .build = build_matrix, .check = check_matrix},
        {"gla_step", OP_MATRIX_RECURRENCE_STEP, .decay = DECAY_DIAGONAL, .rule = RULE_PLAIN,
         .step = true, .half_keys = true, .build = build_matrix_step, .check = check_matrix_step,
         .keep = keep_matrix_step},
        {"linear", OP_LINEAR_RESIDUAL, .widening = 3, .build = build_linear, .check = check_linear},
        {"norm_linear", OP_NORM_LINEAR, .widening = 3, .build = build_norm_linear,
         .check = check_norm_linear},
        {0},
};

const struct kernel_kind *kernel_kind_find(const char *name)
{
	for (const struct kernel_kind *kind = kernel_kinds; kind->name; kind++)
		if (strcmp(kind->name, name) == 0)
			return kind;
	return NULL;
}

void kernel_problem_build(struct kernel_problem *p, const struct backend *backend,
                          const struct bench_case *c, char *base)
{
	*p = (struct kernel_problem){.backend = backend,
	                             .kind = kernel_kind_find(c->block),
	                             .batch = c->batch,
	                             .seq_len = c->seq_len,
	                             .n_heads = c->n_heads,
	                             .groups = c->groups,
	                             .d_head = c->d_head,
	                             .d_k = c->d_k,
	                             .d_v = c->d_v,
	                             .chunk = c->chunk,
	                             .window = c->window,
	                             .base = base};
	p->kind->build(p);
}

/* ---- inputs ---- */

static float log_decay(float x)
{
	const float logsigmoid = x < 0 ? x - log1pf(expf(x)) : -log1pf(expf(-x));

	return logsigmoid / 16;
}

/* `count` values of an operand's distribution. */
static void draw(const struct operand *o, uint64_t seed, uint64_t stream, int64_t count,
                 float *values)
{
	if (o->distribution == DRAW_UNIFORM)
		noise_uniform(seed, stream, 0, count, 0, o->scale, values);
	else
		noise_normal(seed, stream, 0, count, o->scale, values);
	if (o->distribution == DRAW_LOG_DECAY) {
#pragma omp parallel for
		for (int64_t i = 0; i < count; i++)
			values[i] = log_decay(values[i]);
	}
}

/* A tensor from pieces of the pool, which is all of a small one. */
static enum status fill_pieces(const struct kernel_problem *p, const struct operand *o,
                               uint64_t seed, uint64_t stream, const float *pool)
{
	const size_t size = dtype_size(o->dtype);
	enum status status = STATUS_OK;

	if (o->count <= POOL_COUNT)
		return backend_upload_floats(p->backend, o->dtype, o->data, pool, (size_t)o->count);
	for (int64_t i = 0; i < o->count && status == STATUS_OK; i += PIECE_COUNT) {
		const int64_t left = o->count - i, n = left < PIECE_COUNT ? left : PIECE_COUNT;
		const uint64_t place = noise_bits(seed, stream, (uint64_t)i) %
		                       (uint64_t)(POOL_COUNT - PIECE_COUNT);

		status = backend_upload_floats(p->backend, o->dtype,
		                               (char *)o->data + (size_t)i * size, pool + place,
		                               (size_t)n);
	}
	return status;
}

static enum status fill_operand(const struct kernel_problem *p, const struct operand *o,
                                uint64_t seed, uint64_t stream, float *pool)
{
	const int64_t n = o->count < POOL_COUNT ? o->count : POOL_COUNT;
	const int32_t last = (int32_t)(p->seq_len - 1);

	if (o->role == OPERAND_OUTPUT)
		return STATUS_OK;
	if (o->distribution == DRAW_POSITION)
		return p->backend->upload(o->data, &last, sizeof last);
	if (o->distribution == DRAW_NORMAL && p->backend->normal_floats)
		return p->backend->normal_floats(o->dtype, o->data, o->count, o->scale, seed,
		                                 stream);
	draw(o, seed, stream, n, pool);
	return fill_pieces(p, o, seed, stream, pool);
}

enum status kernel_problem_fill(struct kernel_problem *p, uint64_t seed)
{
	float *pool = malloc(POOL_COUNT * sizeof *pool);
	enum status status = STATUS_OK;

	if (!pool)
		return status_set(STATUS_OOM, "no memory for random numbers");
	for (int i = 0; i < p->n_operands && status == STATUS_OK; i++)
		status = fill_operand(p, &p->operand[i], seed, (uint64_t)i, pool);
	free(pool);
	return status;
}

enum status kernel_problem_poison(struct kernel_problem *p)
{
	enum status status = STATUS_OK;

	for (int i = 0; i < p->n_operands && status == STATUS_OK; i++) {
		const struct operand *o = &p->operand[i];

		if (o->role == OPERAND_OUTPUT)
			status = p->backend->fill(o->data, 0xff,
			                          (size_t)o->count * dtype_size(o->dtype));
	}
	return status;
}

enum status kernel_problem_keep(struct kernel_problem *p, uint64_t seed)
{
	return p->kind->keep ? p->kind->keep(p, seed) : STATUS_OK;
}

enum status kernel_problem_check(struct kernel_problem *p, int64_t rows, uint64_t seed,
                                 double *rel_err)
{
	enum status status = STATUS_OK;

	*rel_err = 0;
	for (int i = 0; i < p->n_operands && status == STATUS_OK; i++)
		if (p->operand[i].role != OPERAND_INPUT)
			status = check_finite(p->backend, &p->operand[i], rel_err);
	/* What is not finite would make the comparison meaningless, but no less wrong. */
	return status == STATUS_OK ? p->kind->check(p, rows, seed, rel_err) : status;
}

void kernel_problem_release(struct kernel_problem *p)
{
	free(p->expected);
	free(p->before);
	p->expected = p->before = NULL;
}
