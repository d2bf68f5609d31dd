/*
 * The golden tensors catch the mistakes that are easy to make: backends whose
 * first kernel for an operation is subtly wrong must fail, and the same
 * rewrites without the mistake must pass.
 */
#include "tests/stacks.h"

#include "bench/golden_check.h"
#include "kernels/cpu/kernels_cpu.h"

static struct golden_result check(struct device *device, const char *path, const char *tensor)
{
	struct golden_options options = {.device = device};
	struct golden_report report;
	enum status status = golden_check(&options, path, &report);
	const struct golden_result *result = golden_find(&report, tensor);

	if (status != STATUS_OK && status != STATUS_MISMATCH)
		fail_msg("%s: %s", path, status_message());
	assert_non_null(result);
	assert_int_equal(status == STATUS_MISMATCH, report.n_failed > 0);
	return *result;
}

/* The check's result with these kernels before the CPU's own; `kernels` ends with an entry whose
 * run is NULL. */
static struct golden_result check_mutant(const struct kernel *kernels, const char *path,
                                         const char *tensor)
{
	struct device mutant = mutant_of(cpu, kernels);
	struct golden_result result = check(&mutant, path, tensor);

	mutant_free(&mutant);
	return result;
}

static void expect_pass(const struct kernel *kernels, const char *path, const char *tensor)
{
	struct golden_result result = check_mutant(kernels, path, tensor);

	if (result.verdict != GOLDEN_PASS)
		fail_msg("%s, %s: %.2e off", path, tensor, result.rel_err);
}

/* Caught with room to spare: the tolerance of bf16 would catch it too. */
static void expect_caught(const struct kernel *kernels, const char *path, const char *tensor)
{
	struct golden_result result = check_mutant(kernels, path, tensor);

	assert_int_equal(result.verdict, GOLDEN_MISS);
	if (!isfinite(result.rel_err) || result.rel_err < 1.5e-2)
		fail_msg("%s, %s: only %.2e off", path, tensor, result.rel_err);
}

#define KERNEL(name, body)                                                                         \
	static enum status name(struct device *device, const void *args, void *workspace)          \
	{                                                                                          \
		body;                                                                              \
	}

/* The CPU's kernel on arguments that have been changed. */
#define EDITED(name, op, change)                                                                   \
	static enum status name(struct device *device, const void *args, void *workspace)          \
	{                                                                                          \
		struct op##_args a = *(const struct op##_args *)args;                              \
		change;                                                                            \
		return cpu_##op(device, &a, workspace);                                            \
	}

/* A list of one mutant. */
#define MUTANT(operation, workspace, run)                                                          \
	(const struct kernel[2])                                                                   \
	{                                                                                          \
		{                                                                                  \
			operation, "mutant", NULL, workspace, run, false                           \
		}                                                                                  \
	}

static const char layer_attention[] = "tests/golden/layer_attention.safetensors";
static const char layer_gqa[] = "tests/golden/layer_attention_gqa.safetensors";
static const char layer_swa[] = "tests/golden/layer_swa.safetensors";
static const char layer_rat[] = "tests/golden/layer_rat_L16.safetensors";
static const char model_rat[] = "tests/golden/model_rat.safetensors";
static const char op_gated_delta[] = "tests/golden/op_gated_delta_rule.safetensors";

/* -------- RoPE left out -------- */

EDITED(rotate_without_rope, rotate, a.rope = false)
EDITED(rat_scan_without_rope, rat_scan, a.rope = false)

TEST(test_rope_left_out)
{
	const struct kernel no_rope[] = {
	        {OP_ROTATE, "mutant", NULL, cpu_rotate_workspace, rotate_without_rope, false},
	        {OP_RAT_SCAN, "mutant", NULL, cpu_rat_scan_workspace, rat_scan_without_rope, false},
	        {0},
	};

	expect_caught(no_rope, layer_attention, "y - x");
	expect_caught(no_rope, layer_swa, "y - x");
	expect_caught(no_rope, layer_rat, "y - x");
	expect_pass(no_rope, "tests/golden/layer_rat_L8_nope.safetensors", "y - x");
}

/* -------- a window of W keys, not W+1 -------- */

EDITED(attention_short_window, attention, a.window--)

TEST(test_window_too_short)
{
	const struct kernel *short_window =
	        MUTANT(OP_ATTENTION, cpu_attention_workspace, attention_short_window);

	expect_caught(short_window, layer_swa, "y - x");
	expect_pass(short_window, layer_attention, "y - x");
}

/* -------- RAT+ without the tokens that it keeps -------- */

EDITED(attention_without_initial, attention, a.initial = 0)
EDITED(attention_without_dilated, attention, a.dilation = 0)
EDITED(step_without_initial, ratplus_step, a.initial = 0)

TEST(test_kept_tokens_missing)
{
	static const char all[] = "tests/golden/layer_ratplus_D16_W32_P4.safetensors";
	static const char dilated[] = "tests/golden/layer_ratplus_D16.safetensors";
	const struct kernel *no_initial =
	        MUTANT(OP_ATTENTION, cpu_attention_workspace, attention_without_initial);
	const struct kernel *no_dilated =
	        MUTANT(OP_ATTENTION, cpu_attention_workspace, attention_without_dilated);
	const struct kernel *step =
	        MUTANT(OP_RATPLUS_STEP, cpu_ratplus_step_workspace, step_without_initial);

	expect_caught(no_initial, all, "y - x");
	expect_pass(no_initial, dilated, "y - x");
	expect_caught(no_dilated, dilated, "y - x (prefill)");
	expect_caught(step, all, "y_step - x");
	expect_pass(step, dilated, "y_step - x");
}

/* -------- RAT's heads grouped by block (0 0 1 1), not tiled (0 1 0 1) -------- */

typedef int64_t group_of(int64_t head, int64_t n_heads, int64_t groups);

static int64_t tiled(int64_t head, int64_t n_heads, int64_t groups)
{
	return head % groups;
}

static int64_t by_block(int64_t head, int64_t n_heads, int64_t groups)
{
	return head / (n_heads / groups);
}

static float *new_floats(int64_t count)
{
	float *memory = aligned_alloc(64, ((size_t)count * sizeof *memory + 63) / 64 * 64);

	assert_non_null(memory);
	return memory;
}

/* A packed [B, T, H, d] copy of a [B, T, groups, d] view: head h holds its group. */
static struct view spread(const struct view *grouped, group_of *group, int64_t groups,
                          int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d)
{
	struct view heads = {new_floats(batch * seq_len * n_heads * d), seq_len * n_heads * d,
	                     n_heads * d, d};

	for (int64_t b = 0; b < batch; b++)
		for (int64_t t = 0; t < seq_len; t++)
			for (int64_t h = 0; h < n_heads; h++)
				memcpy(view_at(&heads, b, t, h),
				       view_at(grouped, b, t, group(h, n_heads, groups)),
				       (size_t)d * sizeof(float));
	return heads;
}

/* The way back, for what is the same in all heads of a group. */
static void gather(const struct view *heads, const struct view *grouped, group_of *group,
                   int64_t groups, int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d)
{
	for (int64_t b = 0; b < batch; b++)
		for (int64_t t = 0; t < seq_len; t++)
			for (int64_t h = 0; h < n_heads; h++)
				memcpy(view_at(grouped, b, t, group(h, n_heads, groups)),
				       view_at(heads, b, t, h), (size_t)d * sizeof(float));
}

/* rat_scan with q and k spread over the heads first. */
static enum status scan_grouped(struct device *device, const struct rat_scan_args *args,
                                group_of *group)
{
	struct rat_scan_args a = *args;
	int64_t B = a.batch, T = a.seq_len, H = a.n_heads, d = a.d_head;

	a.groups = H;
	a.q = spread(&args->q, group, args->groups, B, T, H, d);
	a.k = spread(&args->k, group, args->groups, B, T, H, d);
	a.q_out = (struct view){new_floats(B * T * H * d), T * H * d, H * d, d};
	float *workspace = new_floats((int64_t)cpu_rat_scan_workspace(device, &a) / 4 + 64);
	enum status status = cpu_rat_scan(device, &a, workspace);
	gather(&a.q_out, &args->q_out, group, args->groups, B, T, H, d);
	free(workspace);
	free(a.q.data);
	free(a.k.data);
	free(a.q_out.data);
	return status;
}

/* Attention with q, k and v spread over the heads first. */
static enum status attend_grouped(struct device *device, const struct attention_args *args,
                                  group_of *group, group_of *kv)
{
	struct attention_args a = *args;
	int64_t B = a.batch, H = a.n_heads, d = a.d_head;

	a.q_heads = a.kv_heads = H;
	a.q = spread(&args->q, group, args->q_heads, B, a.seq_len, H, d);
	a.k = spread(&args->k, kv, args->kv_heads, B, a.kv_len, H, d);
	a.v = spread(&args->v, kv, args->kv_heads, B, a.kv_len, H, d);
	float *workspace = new_floats((int64_t)cpu_attention_workspace(device, &a) / 4 + 64);
	enum status status = cpu_attention(device, &a, workspace);
	free(workspace);
	free(a.q.data);
	free(a.k.data);
	free(a.v.data);
	return status;
}

KERNEL(rat_scan_tiled, return scan_grouped(device, args, tiled))
KERNEL(rat_scan_by_block, return scan_grouped(device, args, by_block))
KERNEL(attention_tiled, return attend_grouped(device, args, tiled, by_block))
KERNEL(attention_by_block, return attend_grouped(device, args, by_block, by_block))
KERNEL(attention_keys_tiled, return attend_grouped(device, args, tiled, tiled))

TEST(test_heads_grouped_by_block)
{
	const struct kernel right[] = {
	        {OP_RAT_SCAN, "mutant", NULL, NULL, rat_scan_tiled, false},
	        {OP_ATTENTION, "mutant", NULL, NULL, attention_tiled, false},
	        {0},
	};
	const struct kernel wrong[] = {
	        {OP_RAT_SCAN, "mutant", NULL, NULL, rat_scan_by_block, false},
	        {OP_ATTENTION, "mutant", NULL, NULL, attention_by_block, false},
	        {0},
	};

	expect_pass(right, layer_rat, "y - x");
	expect_pass(right, layer_rat, "dx - dy");
	expect_caught(wrong, layer_rat, "y - x");
}

/* Heads of keys are the other way round: read by heads side by side (0 0 1 1). */
TEST(test_keys_grouped_by_tiling)
{
	const struct kernel *right = MUTANT(OP_ATTENTION, NULL, attention_tiled);
	const struct kernel *wrong = MUTANT(OP_ATTENTION, NULL, attention_keys_tiled);

	expect_pass(right, layer_gqa, "y - x");
	expect_pass(right, layer_gqa, "dx - dy");
	expect_caught(wrong, layer_gqa, "y - x");
	expect_pass(wrong, layer_attention, "y - x");
}

/* -------- the gated delta rule's decay after the correction -------- */

enum order { DECAY_FIRST, DECAY_AFTER_CORRECTION, DECAY_LAST };

static void scale_state(float *state, int64_t count, float factor)
{
	for (int64_t i = 0; i < count; i++)
		state[i] *= factor;
}

/* out[j] = sum_i row[i] state[i][j] */
static void read_state(const float *row, const float *state, int64_t d_k, int64_t d_v, float *out)
{
	for (int64_t j = 0; j < d_v; j++)
		out[j] = 0;
	for (int64_t i = 0; i < d_k; i++)
		for (int64_t j = 0; j < d_v; j++)
			out[j] += row[i] * state[i * d_v + j];
}

static void delta_token(const struct matrix_recurrence_args *a, enum order order, int64_t b,
                        int64_t t, int64_t h, float *state)
{
	int64_t size = a->d_k * a->d_v;
	const float *k = view_at(&a->k, b, t, h), *v = view_at(&a->v, b, t, h);
	float *out = view_at(&a->out, b, t, h);
	float beta = *view_at(&a->beta, b, t, h);
	float alpha = expf(*view_at(&a->log_decay, b, t, h));

	if (order == DECAY_FIRST)
		scale_state(state, size, alpha);
	/* The correction takes the output's place until the output is known. */
	read_state(k, state, a->d_k, a->d_v, out);
	if (order == DECAY_AFTER_CORRECTION)
		scale_state(state, size, alpha);
	for (int64_t i = 0; i < a->d_k; i++)
		for (int64_t j = 0; j < a->d_v; j++)
			state[i * a->d_v + j] += k[i] * beta * (v[j] - out[j]);
	if (order == DECAY_LAST)
		scale_state(state, size, alpha);
	read_state(view_at(&a->q, b, t, h), state, a->d_k, a->d_v, out);
	scale_state(out, a->d_v, a->scale);
}

static enum status gated_delta(const struct matrix_recurrence_args *a, enum order order)
{
	int64_t size = a->d_k * a->d_v;

	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++) {
			float *state = a->final_state + (b * a->n_heads + h) * size;

			memcpy(state, a->h0 + (b * a->n_heads + h) * size,
			       (size_t)size * sizeof *state);
			for (int64_t t = 0; t < a->seq_len; t++)
				delta_token(a, order, b, t, h, state);
		}
	return STATUS_OK;
}

KERNEL(decay_first, return gated_delta(args, DECAY_FIRST))
KERNEL(decay_after_correction, return gated_delta(args, DECAY_AFTER_CORRECTION))
KERNEL(decay_last, return gated_delta(args, DECAY_LAST))

TEST(test_decay_after_the_delta_correction)
{
	const struct kernel *right = MUTANT(OP_MATRIX_RECURRENCE, NULL, decay_first);
	const struct kernel *after = MUTANT(OP_MATRIX_RECURRENCE, NULL, decay_after_correction);
	const struct kernel *last = MUTANT(OP_MATRIX_RECURRENCE, NULL, decay_last);

	expect_pass(right, op_gated_delta, "o");
	expect_pass(right, op_gated_delta, "final_state");
	expect_caught(after, op_gated_delta, "o");
	expect_caught(last, op_gated_delta, "o");
}

/* -------- decays of the linear-attention family -------- */

EDITED(matrix_without_decay, matrix_recurrence, a.decay = DECAY_NONE)

/* Every head with the first head's decay. */
EDITED(matrix_of_one_decay, matrix_recurrence, if (a.log_decay.data) a.log_decay.head = 0)

/* HGRN's decay as if it were the logit of one, with the input closed in turn. */
EDITED(recurrence_of_logits, recurrence, a.form = GATE_SIGMOID)

TEST(test_decays_of_the_family)
{
	const struct kernel *no_decay =
	        MUTANT(OP_MATRIX_RECURRENCE, cpu_matrix_recurrence_workspace, matrix_without_decay);
	const struct kernel *one_decay =
	        MUTANT(OP_MATRIX_RECURRENCE, cpu_matrix_recurrence_workspace, matrix_of_one_decay);
	const struct kernel *logits =
	        MUTANT(OP_RECURRENCE, cpu_recurrence_workspace, recurrence_of_logits);

	expect_caught(no_decay, "tests/golden/op_retention.safetensors", "o");
	expect_caught(no_decay, "tests/golden/op_scalar_decay.safetensors", "o");
	expect_caught(no_decay, "tests/golden/op_gla.safetensors", "o");
	expect_pass(no_decay, "tests/golden/op_linear_attention.safetensors", "o");
	expect_caught(one_decay, "tests/golden/op_scalar_decay.safetensors", "o");
	expect_caught(logits, "tests/golden/op_hgrn.safetensors", "o");
}

/* -------- what stands around the delta rules -------- */

EDITED(keys_of_any_length, l2_norm, a.eps = 1)
EDITED(silu_for_sigmoid, norm_gate, a.curve = CURVE_SILU)
/* Every head with the first head's rate. */
EDITED(low_rank_of_one_rate, decay_gate, if (a.form == LOW_RANK_RATE) a.n_heads = 1)

static enum status decay_of_first_head(struct device *device, const void *args, void *workspace)
{
	const struct delta_gate_args *a = args;
	const float rates[] = {a->decay_logit ? a->log_rate[0] : 0,
	                       a->decay_logit ? a->log_rate[0] : 0};
	struct delta_gate_args one = *a;

	assert_int_equal(a->n_heads, COUNT_OF(rates));
	one.log_rate = rates;
	return cpu_delta_gate(device, &one, workspace);
}

TEST(test_gates_of_the_delta_rules)
{
	static const char delta_net[] = "tests/golden/layer_delta_net.safetensors";
	static const char gated[] = "tests/golden/layer_gated_delta_net.safetensors";
	static const char kda[] = "tests/golden/layer_kda.safetensors";
	const struct kernel *keys = MUTANT(OP_L2_NORM, NULL, keys_of_any_length);
	const struct kernel *silu = MUTANT(OP_NORM_GATE, NULL, silu_for_sigmoid);
	const struct kernel *low_rank = MUTANT(OP_DECAY_GATE, NULL, low_rank_of_one_rate);
	const struct kernel *scalar = MUTANT(OP_DELTA_GATE, NULL, decay_of_first_head);

	expect_caught(keys, delta_net, "y");
	expect_caught(keys, gated, "y_step");
	expect_caught(keys, kda, "y (prefill)");
	expect_caught(silu, kda, "y");
	expect_pass(silu, gated, "y");
	expect_caught(low_rank, kda, "y");
	expect_caught(scalar, gated, "y");
	expect_pass(scalar, delta_net, "y");
}

/* -------- kernels that do nothing, and backends that cannot -------- */

KERNEL(do_nothing, return STATUS_OK)

TEST(test_unwritten_outputs)
{
	const struct kernel lazy[] = {
	        {OP_ATTENTION, "mutant", NULL, NULL, do_nothing, false},
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, NULL, do_nothing, false},
	        {OP_LINEAR_RESIDUAL_BACKWARD, "mutant", NULL, NULL, do_nothing, false},
	        {0},
	};
	assert_true(isnan(check_mutant(lazy, layer_attention, "y - x").rel_err));
	assert_true(isnan(check_mutant(lazy, model_rat, "logits").rel_err));
	assert_true(isnan(check_mutant(lazy, op_gated_delta, "o").rel_err));
	assert_int_equal(check_mutant(lazy, op_gated_delta, "final_state").verdict, GOLDEN_MISS);
	assert_int_equal(check_mutant(lazy, "tests/golden/layer_recurrence.safetensors",
	                              "grad.out_proj.weight")
	                         .verdict,
	                 GOLDEN_MISS);
}

/* A device without backward passes, as one that is being built would be. */
TEST(test_backward_unsupported)
{
	const struct kernel none[] = {{0}};
	struct device mutant = mutant_of(cpu, none);
	struct kernel *to = (struct kernel *)mutant.kernels;

	for (const struct kernel *k = to; k->run; k++)
		if (!strstr(operation_name(k->operation), "_backward"))
			*to++ = *k;
	*to = none[0];
	assert_int_equal(check(&mutant, layer_rat, "y - x (prefill)").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, layer_rat, "dx").verdict, GOLDEN_UNSUPPORTED);
	assert_int_equal(check(&mutant, layer_rat, "grad.gate_bias").verdict, GOLDEN_UNSUPPORTED);
	assert_int_equal(check(&mutant, model_rat, "logits (prefill)").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, model_rat, "logits (steps)").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, model_rat, "loss").verdict, GOLDEN_UNSUPPORTED);
	assert_int_equal(check(&mutant, op_gated_delta, "o").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, op_gated_delta, "dbeta").verdict, GOLDEN_UNSUPPORTED);
	mutant_free(&mutant);
}
