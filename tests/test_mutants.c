/*
 * The golden tensors catch the mistakes that are easy to make: backends whose
 * first kernel for an operation is subtly wrong must fail, and the same
 * rewrites without the mistake must pass.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench/golden_check.h"
#include "kernels/cpu/kernels_cpu.h"

enum { MAX_KERNELS = 64 };

/* The CPU backend with some kernels before its own. */
struct mutant {
	struct backend backend;
	struct kernel kernels[MAX_KERNELS];
	int n_kernels;
};

static void mutant_add(struct mutant *mutant, const struct kernel *kernel)
{
	assert_true(mutant->n_kernels < MAX_KERNELS - 1);
	mutant->kernels[mutant->n_kernels++] = *kernel;
}

/* kernels ends with an entry whose run is NULL. */
static void mutant_make(struct mutant *mutant, const struct kernel *kernels)
{
	*mutant = (struct mutant){.backend = cpu_backend};
	for (const struct kernel *k = kernels; k->run; k++)
		mutant_add(mutant, k);
	for (const struct kernel *k = cpu_kernels; k->run; k++)
		mutant_add(mutant, k);
	mutant->backend.kernels = mutant->kernels;
}

static struct golden_result check(const struct mutant *mutant, const char *path, const char *tensor)
{
	struct golden_options options = {.backend = &mutant->backend};
	struct golden_report report;
	enum status status = golden_check(&options, path, &report);
	const struct golden_result *result = golden_find(&report, tensor);

	if (status != STATUS_OK && status != STATUS_MISMATCH)
		fail_msg("%s: %s", path, status_message());
	assert_non_null(result);
	assert_int_equal(status == STATUS_MISMATCH, report.n_failed > 0);
	return *result;
}

static void expect_pass(const struct kernel *kernels, const char *path, const char *tensor)
{
	struct mutant mutant;

	mutant_make(&mutant, kernels);
	struct golden_result result = check(&mutant, path, tensor);
	if (result.verdict != GOLDEN_PASS)
		fail_msg("%s, %s: %.2e off", path, tensor, result.rel_err);
}

/* Caught with room to spare: the tolerance of bf16 would catch it too. */
static void expect_caught(const struct kernel *kernels, const char *path, const char *tensor)
{
	struct mutant mutant;

	mutant_make(&mutant, kernels);
	struct golden_result result = check(&mutant, path, tensor);
	assert_int_equal(result.verdict, GOLDEN_MISS);
	if (!isfinite(result.rel_err) || result.rel_err < 1.5e-2)
		fail_msg("%s, %s: only %.2e off", path, tensor, result.rel_err);
}

static const char layer_attention[] = "tests/golden/layer_attention.safetensors";
static const char layer_swa[] = "tests/golden/layer_swa.safetensors";
static const char layer_rat[] = "tests/golden/layer_rat_L16.safetensors";
static const char model_rat[] = "tests/golden/model_rat.safetensors";
static const char op_gated_delta[] = "tests/golden/op_gated_delta_rule.safetensors";

/* -------- RoPE left out -------- */

static enum status rotate_without_rope(const void *args, void *workspace)
{
	struct rotate_args a = *(const struct rotate_args *)args;

	a.rope = false;
	return cpu_rotate(&a, workspace);
}

static enum status rat_scan_without_rope(const void *args, void *workspace)
{
	struct rat_scan_args a = *(const struct rat_scan_args *)args;

	a.rope = false;
	return cpu_rat_scan(&a, workspace);
}

static void test_rope_left_out(void **state)
{
	const struct kernel no_rope[] = {
	        {OP_ROTATE, "mutant", NULL, cpu_rotate_workspace, rotate_without_rope},
	        {OP_RAT_SCAN, "mutant", NULL, cpu_rat_scan_workspace, rat_scan_without_rope},
	        {0},
	};

	(void)state;
	expect_caught(no_rope, layer_attention, "y - x");
	expect_caught(no_rope, layer_swa, "y - x");
	expect_caught(no_rope, layer_rat, "y - x");
	expect_pass(no_rope, "tests/golden/layer_rat_L8_nope.safetensors", "y - x");
}

/* -------- a window of W keys, not W+1 -------- */

static enum status attention_short_window(const void *args, void *workspace)
{
	struct attention_args a = *(const struct attention_args *)args;

	a.window--;
	return cpu_attention(&a, workspace);
}

static void test_window_too_short(void **state)
{
	const struct kernel short_window[] = {
	        {OP_ATTENTION, "mutant", NULL, cpu_attention_workspace, attention_short_window},
	        {0},
	};

	(void)state;
	expect_caught(short_window, layer_swa, "y - x");
	expect_pass(short_window, layer_attention, "y - x");
}

/* -------- RAT's heads grouped by block (0 0 1 1), not tiled (0 1 0 1) -------- */

typedef int64_t group_of(int64_t head, int64_t n_heads, int64_t groups);

static int64_t tiled(int64_t head, int64_t n_heads, int64_t groups)
{
	(void)n_heads;
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
static enum status scan_grouped(const struct rat_scan_args *args, group_of *group)
{
	struct rat_scan_args a = *args;
	int64_t B = a.batch, T = a.seq_len, H = a.n_heads, d = a.d_head;

	a.groups = H;
	a.q = spread(&args->q, group, args->groups, B, T, H, d);
	a.k = spread(&args->k, group, args->groups, B, T, H, d);
	a.q_out = (struct view){new_floats(B * T * H * d), T * H * d, H * d, d};
	float *workspace = new_floats((int64_t)cpu_rat_scan_workspace(&a) / 4 + 64);
	enum status status = cpu_rat_scan(&a, workspace);
	gather(&a.q_out, &args->q_out, group, args->groups, B, T, H, d);
	free(workspace);
	free(a.q.data);
	free(a.k.data);
	free(a.q_out.data);
	return status;
}

/* Attention with q spread over the heads first. */
static enum status attend_grouped(const struct attention_args *args, group_of *group)
{
	struct attention_args a = *args;

	a.q_heads = a.n_heads;
	a.q = spread(&args->q, group, args->q_heads, a.batch, a.seq_len, a.n_heads, a.d_head);
	float *workspace = new_floats((int64_t)cpu_attention_workspace(&a) / 4 + 64);
	enum status status = cpu_attention(&a, workspace);
	free(workspace);
	free(a.q.data);
	return status;
}

static enum status rat_scan_tiled(const void *args, void *workspace)
{
	(void)workspace;
	return scan_grouped(args, tiled);
}

static enum status rat_scan_by_block(const void *args, void *workspace)
{
	(void)workspace;
	return scan_grouped(args, by_block);
}

static enum status attention_tiled(const void *args, void *workspace)
{
	(void)workspace;
	return attend_grouped(args, tiled);
}

static enum status attention_by_block(const void *args, void *workspace)
{
	(void)workspace;
	return attend_grouped(args, by_block);
}

static void test_heads_grouped_by_block(void **state)
{
	const struct kernel right[] = {
	        {OP_RAT_SCAN, "mutant", NULL, NULL, rat_scan_tiled},
	        {OP_ATTENTION, "mutant", NULL, NULL, attention_tiled},
	        {0},
	};
	const struct kernel wrong[] = {
	        {OP_RAT_SCAN, "mutant", NULL, NULL, rat_scan_by_block},
	        {OP_ATTENTION, "mutant", NULL, NULL, attention_by_block},
	        {0},
	};

	(void)state;
	expect_pass(right, layer_rat, "y - x");
	expect_pass(right, layer_rat, "dx - dy");
	expect_caught(wrong, layer_rat, "y - x");
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

static enum status decay_first(const void *args, void *workspace)
{
	(void)workspace;
	return gated_delta(args, DECAY_FIRST);
}

static enum status decay_after_correction(const void *args, void *workspace)
{
	(void)workspace;
	return gated_delta(args, DECAY_AFTER_CORRECTION);
}

static enum status decay_last(const void *args, void *workspace)
{
	(void)workspace;
	return gated_delta(args, DECAY_LAST);
}

static void test_decay_after_the_delta_correction(void **state)
{
	const struct kernel right[] = {
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, NULL, decay_first},
	        {0},
	};
	const struct kernel after[] = {
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, NULL, decay_after_correction},
	        {0},
	};
	const struct kernel last[] = {
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, NULL, decay_last},
	        {0},
	};

	(void)state;
	expect_pass(right, op_gated_delta, "o");
	expect_pass(right, op_gated_delta, "final_state");
	expect_caught(after, op_gated_delta, "o");
	expect_caught(last, op_gated_delta, "o");
}

/* -------- decays of the linear-attention family -------- */

static enum status matrix_without_decay(const void *args, void *workspace)
{
	struct matrix_recurrence_args a = *(const struct matrix_recurrence_args *)args;

	a.decay = DECAY_NONE;
	return cpu_matrix_recurrence(&a, workspace);
}

/* Every head with the first head's decay. */
static enum status matrix_of_one_decay(const void *args, void *workspace)
{
	struct matrix_recurrence_args a = *(const struct matrix_recurrence_args *)args;

	if (a.log_decay.data)
		a.log_decay.head = 0;
	return cpu_matrix_recurrence(&a, workspace);
}

/* HGRN's decay as if it were the logit of one, with the input closed in turn. */
static enum status recurrence_of_logits(const void *args, void *workspace)
{
	struct recurrence_args a = *(const struct recurrence_args *)args;

	a.form = GATE_SIGMOID;
	return cpu_recurrence(&a, workspace);
}

static void test_decays_of_the_family(void **state)
{
	const struct kernel no_decay[] = {
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, cpu_matrix_recurrence_workspace,
	         matrix_without_decay},
	        {0},
	};
	const struct kernel one_decay[] = {
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, cpu_matrix_recurrence_workspace,
	         matrix_of_one_decay},
	        {0},
	};
	const struct kernel logits[] = {
	        {OP_RECURRENCE, "mutant", NULL, cpu_recurrence_workspace, recurrence_of_logits},
	        {0},
	};

	(void)state;
	expect_caught(no_decay, "tests/golden/op_retention.safetensors", "o");
	expect_caught(no_decay, "tests/golden/op_scalar_decay.safetensors", "o");
	expect_caught(no_decay, "tests/golden/op_gla.safetensors", "o");
	expect_pass(no_decay, "tests/golden/op_linear_attention.safetensors", "o");
	expect_caught(one_decay, "tests/golden/op_scalar_decay.safetensors", "o");
	expect_caught(logits, "tests/golden/op_hgrn.safetensors", "o");
}

/* -------- kernels that do nothing, and backends that cannot -------- */

static enum status do_nothing(const void *args, void *workspace)
{
	(void)args;
	(void)workspace;
	return STATUS_OK;
}

static void test_unwritten_outputs(void **state)
{
	const struct kernel lazy[] = {
	        {OP_ATTENTION, "mutant", NULL, NULL, do_nothing},
	        {OP_MATRIX_RECURRENCE, "mutant", NULL, NULL, do_nothing},
	        {OP_LINEAR_RESIDUAL_BACKWARD, "mutant", NULL, NULL, do_nothing},
	        {0},
	};
	struct mutant mutant;

	(void)state;
	mutant_make(&mutant, lazy);
	assert_true(isnan(check(&mutant, layer_attention, "y - x").rel_err));
	assert_true(isnan(check(&mutant, model_rat, "logits").rel_err));
	assert_true(isnan(check(&mutant, op_gated_delta, "o").rel_err));
	assert_int_equal(check(&mutant, op_gated_delta, "final_state").verdict, GOLDEN_MISS);
	assert_int_equal(
	        check(&mutant, "tests/golden/layer_recurrence.safetensors", "grad.out_proj.weight")
	                .verdict,
	        GOLDEN_MISS);
}

/* The CPU backend without its backward passes, as a backend that is being built would be. */
static void forward_only(struct mutant *mutant)
{
	*mutant = (struct mutant){.backend = cpu_backend};
	for (const struct kernel *k = cpu_kernels; k->run; k++)
		if (!strstr(operation_name(k->operation), "_backward"))
			mutant_add(mutant, k);
	mutant->backend.kernels = mutant->kernels;
}

static void test_backward_unsupported(void **state)
{
	struct mutant mutant;

	(void)state;
	forward_only(&mutant);
	assert_int_equal(check(&mutant, layer_rat, "y - x").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, layer_rat, "dx").verdict, GOLDEN_UNSUPPORTED);
	assert_int_equal(check(&mutant, layer_rat, "grad.gate_bias").verdict, GOLDEN_UNSUPPORTED);
	/* Every position's logits all the same: by prompts of every length. */
	assert_int_equal(check(&mutant, model_rat, "logits").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, model_rat, "loss").verdict, GOLDEN_UNSUPPORTED);
	assert_int_equal(check(&mutant, op_gated_delta, "o").verdict, GOLDEN_PASS);
	assert_int_equal(check(&mutant, op_gated_delta, "dbeta").verdict, GOLDEN_UNSUPPORTED);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_rope_left_out),
	        cmocka_unit_test(test_window_too_short),
	        cmocka_unit_test(test_heads_grouped_by_block),
	        cmocka_unit_test(test_decay_after_the_delta_correction),
	        cmocka_unit_test(test_decays_of_the_family),
	        cmocka_unit_test(test_unwritten_outputs),
	        cmocka_unit_test(test_backward_unsupported),
	};

	if (cpu_backend.open(0) != STATUS_OK)
		return 1;
	int failed = cmocka_run_group_tests(tests, NULL, NULL);
	cpu_backend.close();
	return failed;
}
