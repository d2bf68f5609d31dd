/*
 * kernel_cost() against counts made by the plainest loops that do the work:
 * one tick for every FLOP as it would happen, and for every element as it is
 * read or written. On a backend in fp32 and on one in bf16.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdint.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/kernels.h"

/* What the loops have counted; bytes. */
struct count {
	double flops, read, written;
};

/* Some memory that must never be looked at. */
static float nowhere;
static int32_t nowhere_int;

static const struct view some_view = {&nowhere, 1, 1, 1}, no_view;

/* Elements of a tensor, one by one. */
static double elements(int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
	double count = 0;

	for (int64_t i = 0; i < n0; i++)
		for (int64_t j = 0; j < n1; j++)
			for (int64_t k = 0; k < n2; k++)
				for (int64_t l = 0; l < n3; l++)
					count++;
	return count;
}

/* The backend whose activations have `size` bytes. */
static struct backend backend_of(double size)
{
	struct backend backend = cpu_backend;

	backend.activation = size == 2 ? DTYPE_BF16 : DTYPE_F32;
	return backend;
}

static void check(double act, enum operation operation, const void *args, struct count expected)
{
	struct backend backend = backend_of(act);
	struct cost cost = kernel_cost(&backend, operation, args);

	if (cost.flops != expected.flops || cost.bytes_read != expected.read ||
	    cost.bytes_written != expected.written)
		fail_msg("%s, %.0f bytes: FLOPs %.1f, read %.1f, written %.1f; counted %.1f, %.1f, "
		         "%.1f",
		         operation_name(operation), act, cost.flops, cost.bytes_read,
		         cost.bytes_written, expected.flops, expected.read, expected.written);
}

/* Runs a test with both element sizes. */
static void with_both_sizes(void (*test)(double act))
{
	test(4);
	test(2);
}

/* Multiply-adds of y = x W^T, two FLOPs each. */
static double product_flops(int64_t n, int64_t k, int64_t m)
{
	double flops = 0;

	for (int64_t i = 0; i < n; i++)
		for (int64_t o = 0; o < m; o++)
			for (int64_t j = 0; j < k; j++)
				flops += 2;
	return flops;
}

/* x*x, its sum, times rstd, times weight. */
static double norm_flops(int64_t n, int64_t d)
{
	double flops = 0;

	for (int64_t i = 0; i < n; i++) {
		for (int64_t j = 0; j < d; j++)
			flops += 2;
		for (int64_t j = 0; j < d; j++)
			flops += 2;
	}
	return flops;
}

static void linear_case(double act)
{
	enum { N = 5, K = 3, M = 7 };
	double x = elements(1, 1, N, K), w = elements(1, 1, M, K), y = elements(1, 1, N, M);
	float *f = &nowhere;
	struct norm_linear_args norm = {N, K, M, 1e-6f, f, f, f, f, f, f};
	struct norm_linear_backward_args back = {.n_tokens = N, .d_in = K, .d_out = M};
	struct linear_residual_args linear = {N, K, M, f, f, f, f};
	struct linear_residual_backward_args linear_back = {N, K, M, f, f, f, f, f};
	double product = product_flops(N, K, M);

	check(act, OP_NORM_LINEAR, &norm,
	      (struct count){product + norm_flops(N, K), act * (x + w) + 4 * K,
	                     act * (x + y) + 4 * N});
	norm.norm_weight = NULL;
	norm.rstd = NULL;
	check(act, OP_NORM_LINEAR, &norm, (struct count){product, act * (x + w), act * y});

	/* No norm: dx = dy W and dweight = dy^T x. */
	check(act, OP_NORM_LINEAR_BACKWARD, &back,
	      (struct count){2 * product, act * (x + w + y), act * x + 4 * w});
	back.norm_weight = back.rstd = back.dnorm_weight = f;
	check(act, OP_NORM_LINEAR_BACKWARD, &back,
	      (struct count){2 * product + 2 * norm_flops(N, K),
	                     act * (x + w + y + x) + 4 * (K + N), act * x + 4 * (w + K)});
	back.dresidual = f;
	check(act, OP_NORM_LINEAR_BACKWARD, &back,
	      (struct count){2 * product + 2 * norm_flops(N, K) + x,
	                     act * (x + w + y + x + x) + 4 * (K + N), act * x + 4 * (w + K)});

	check(act, OP_LINEAR_RESIDUAL, &linear,
	      (struct count){product + y, act * (x + w + y), act * y});
	linear.residual = NULL;
	check(act, OP_LINEAR_RESIDUAL, &linear, (struct count){product, act * (x + w), act * y});
	check(act, OP_LINEAR_RESIDUAL_BACKWARD, &linear_back,
	      (struct count){2 * product, act * (x + w + y), act * x + 4 * w});
}

static void linear_costs(void **state)
{
	(void)state;
	with_both_sizes(linear_case);
}

/* Is key s visible to query t? As the spec has it, not as a range. */
static bool is_visible(const struct attention_args *a, int64_t t, int64_t s)
{
	switch (a->mask) {
	case MASK_CAUSAL:
		return s <= t;
	case MASK_WINDOW:
		return 0 <= t - s && t - s <= a->window;
	case MASK_CHUNK:
		return s < t / a->chunk;
	default:
		return true;
	}
}

/* `products` products of d multiply-adds for every visible pair, the own token included. */
static double attention_flops(const struct attention_args *a, int products)
{
	double flops = 0;

	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			for (int64_t t = 0; t < a->seq_len; t++) {
				int64_t pairs = a->own_score ? 1 : 0;

				for (int64_t s = 0; s < a->kv_len; s++)
					pairs += is_visible(a, t, s);
				flops += (double)(products * pairs * 2 * a->d_head);
			}
	return flops;
}

static void check_attention(double act, const struct attention_args *a)
{
	double out = elements(a->batch, a->seq_len, a->n_heads, a->d_head);
	double q = elements(a->batch, a->seq_len, a->q_heads, a->d_head);
	double kv = 2 * elements(a->batch, a->kv_len, a->n_heads, a->d_head);
	double rows = elements(a->batch, a->seq_len, a->n_heads, 1);
	double inputs = act * (q + kv);
	struct attention_backward_args back = {.forward = *a};

	if (a->own_score)
		inputs += act * out + 4 * rows;
	if (a->gate.data)
		inputs += act * out;
	check(act, OP_ATTENTION, a,
	      (struct count){attention_flops(a, 2), inputs,
	                     act * out * (a->out_ungated.data ? 2 : 1) + (a->lse ? 4 * rows : 0)});
	/* q k^T again, do v^T, and the products for dq, dk, dv; reads the output, its gradient and
	 * the lse too, writes a gradient for every input. */
	check(act, OP_ATTENTION_BACKWARD, &back,
	      (struct count){attention_flops(a, 5), inputs + act * 2 * out + 4 * rows, inputs});
}

static void attention_case(double act)
{
	struct attention_args a = {.batch = 2,
	                           .n_heads = 4,
	                           .q_heads = 4,
	                           .d_head = 3,
	                           .seq_len = 13,
	                           .kv_len = 13,
	                           .out = some_view};

	check_attention(act, &a);
	a.mask = MASK_WINDOW;
	for (a.window = 0; a.window < 16; a.window += 5)
		check_attention(act, &a);
	a.lse = &nowhere;
	a.gate = a.out_ungated = some_view;
	a.mask = MASK_FULL;
	a.kv_len = 5;
	check_attention(act, &a);
	a.mask = MASK_CHUNK;
	a.own_score = &nowhere;
	a.own_value = some_view;
	a.q_heads = 2;
	for (a.chunk = 1; a.chunk < 16; a.chunk += 3) {
		a.kv_len = (a.seq_len + a.chunk - 1) / a.chunk;
		check_attention(act, &a);
	}
}

static void attention_costs(void **state)
{
	(void)state;
	with_both_sizes(attention_case);
}

static void check_attention_step(double act, int64_t window, int64_t slots, int64_t position)
{
	enum { B = 2, H = 3, D = 4 };
	struct attention_step_args a = {.batch = B,
	                                .n_heads = H,
	                                .d_head = D,
	                                .kv_slots = slots,
	                                .window = window,
	                                .position_hint = position};
	struct count c = {0, 4, 0}; /* reads the position */

	for (int64_t row = 0; row < B * H; row++)
		for (int64_t s = 0; s <= position; s++) {
			if (window >= 0 && position - s > window)
				continue;
			c.flops += 2 * 2 * D;  /* q k^T and p v */
			c.read += act * 2 * D; /* its own k, v come from the projection */
			c.read += s == position ? act * D : 0;        /* q */
			c.written += s == position ? act * 3 * D : 0; /* k, v stored; out */
		}
	check(act, OP_ATTENTION_STEP, &a, c);
}

static void attention_step_case(double act)
{
	for (int64_t position = 0; position < 9; position++) {
		check_attention_step(act, -1, 12, position);
		check_attention_step(act, 0, 1, position);
		check_attention_step(act, 3, 4, position);
		check_attention_step(act, 100, 101, position);
	}
}

static void attention_step_costs(void **state)
{
	(void)state;
	with_both_sizes(attention_step_case);
}

static void rotate_case(double act)
{
	enum { B = 2, T = 9, H = 3, D = 4 };
	double whole = elements(B, T, H, D), tail = elements(B, 5, H, D);
	struct view other = {&nowhere, 2, 2, 2};
	struct rotate_args a = {B,         T,         H,     D,         true,      4,        5,
	                        some_view, some_view, other, some_view, some_view, some_view};
	struct rotate_backward_args back = {B, T, H, D, true, some_view, some_view};

	/* Two multiplications and an addition for each element of q and of the cached k. */
	check(act, OP_ROTATE, &a,
	      (struct count){3 * (whole + tail), act * (whole + 2 * tail),
	                     act * (whole + 2 * tail)});
	a.v_out = no_view;
	check(act, OP_ROTATE, &a,
	      (struct count){3 * (whole + tail), act * (whole + tail), act * (whole + tail)});
	/* q and k stay where they are; v moves. */
	a.rope = false;
	a.v_out = some_view;
	check(act, OP_ROTATE, &a, (struct count){0, act * tail, act * tail});
	check(act, OP_ROTATE_BACKWARD, &back,
	      (struct count){3 * 2 * whole, act * 2 * whole, act * 2 * whole});
	back.rope = false;
	check(act, OP_ROTATE_BACKWARD, &back, (struct count){0, 0, 0});
}

static void rotate_costs(void **state)
{
	(void)state;
	with_both_sizes(rotate_case);
}

/* g h + (1-g) x: two multiply-adds for every element of `states` recurrences. */
static double gated_flops(int64_t batch, int64_t seq_len, int64_t width, int states)
{
	double flops = 0;

	for (int64_t b = 0; b < batch; b++)
		for (int64_t t = 0; t < seq_len; t++)
			for (int64_t i = 0; i < width; i++)
				flops += states * 4;
	return flops;
}

static void rat_scan_case(double act)
{
	enum { B = 2, T = 11, H = 4, G = 2, D = 3, L = 4, W = H * D };
	double wide = elements(B, T, H, D), grouped = elements(B, T, G, D);
	double chunks = elements(B, 3, H, D), scores = elements(B, T, H, 1);
	struct rat_scan_args a = {
	        .batch = B, .seq_len = T, .n_heads = H, .groups = G, .d_head = D, .chunk = L};
	struct rat_scan_backward_args back = {.forward = a};

	/* v, gate; q, k; the bias -> vt, own score, q, and the chunks' k, v. */
	check(act, OP_RAT_SCAN, &a,
	      (struct count){gated_flops(B, T, W, 2), act * (2 * wide + 2 * grouped) + 4 * W,
	                     act * (wide + grouped + 2 * chunks) + 4 * scores});
	a.k_state = a.v_state = &nowhere;
	check(act, OP_RAT_SCAN, &a,
	      (struct count){gated_flops(B, T, W, 2), act * (2 * wide + 2 * grouped) + 4 * W,
	                     act * (wide + grouped + 2 * chunks) + 4 * (scores + 2 * B * W)});
	/* v, gate, dvt; q, k, dq; the chunks' dk, dv; down_score, bias -> dv, dgate, dq, dk, dbias.
	 */
	check(act, OP_RAT_SCAN_BACKWARD, &back,
	      (struct count){2.5 * gated_flops(B, T, W, 2),
	                     act * (3 * wide + 3 * grouped + 2 * chunks) + 4 * (scores + W),
	                     act * (2 * wide + 2 * grouped) + 4 * W});
}

static void rat_step_case(double act)
{
	enum { B = 2, H = 4, G = 2, D = 3, L = 4 };
	struct rat_step_args a = {
	        .batch = B, .n_heads = H, .groups = G, .d_head = D, .chunk = L, .chunk_slots = 9};

	for (a.position_hint = 0; a.position_hint < 3 * L; a.position_hint++) {
		int64_t p = a.position_hint;
		struct count c = {gated_flops(B, 1, H * D, 2), 4 + 4 * H * D, 0};

		c.read += act * (3 * elements(B, 1, H, D) + 2 * elements(B, 1, G, D));
		if (p % L != 0) /* carries on from the running pair */
			c.read += 4 * 2 * elements(B, 1, H, D);
		for (int64_t chunk = 0; chunk < p / L; chunk++) {
			c.flops += 4 * elements(B, 1, H, D);
			c.read += act * 2 * elements(B, 1, H, D);
		}
		c.flops += 4 * elements(B, 1, H, D); /* the running pair's own score and value */
		c.written += 4 * 2 * elements(B, 1, H, D) + act * elements(B, 1, H, D);
		if (p % L == L - 1)
			c.written += act * 2 * elements(B, 1, H, D);
		check(act, OP_RAT_STEP, &a, c);
	}
}

static void rat_costs(void **state)
{
	(void)state;
	with_both_sizes(rat_scan_case);
	with_both_sizes(rat_step_case);
}

static void recurrence_case(double act)
{
	enum { B = 2, T = 7, D = 5 };
	double n = elements(1, B, T, D), state = elements(1, 1, B, D);
	float *f = &nowhere;
	struct recurrence_args a = {.batch = B, .seq_len = T, .d_model = D};
	struct recurrence_backward_args back;
	struct recurrence_step_args step = {.batch = B, .d_model = D, .z = some_view};

	/* x, gate -> out. */
	check(act, OP_RECURRENCE, &a,
	      (struct count){gated_flops(B, T, D, 1), act * 2 * n, act * n});
	a.z = a.h = some_view;
	a.gate_bias = a.h0 = a.h_final = f;
	check(act, OP_RECURRENCE, &a,
	      (struct count){gated_flops(B, T, D, 1), act * 3 * n + 4 * (D + state),
	                     act * 2 * n + 4 * state});
	/* x, gate, z, h, dout; bias, h0 -> dx, dgate, dz; dbias, dh0. */
	back = (struct recurrence_backward_args){.forward = a, .dgate_bias = f, .dh0 = f};
	check(act, OP_RECURRENCE_BACKWARD, &back,
	      (struct count){2.5 * gated_flops(B, T, D, 1), act * 5 * n + 4 * (D + state),
	                     act * 3 * n + 4 * (D + state)});
	/* HGRN's form is one multiply-add. */
	a = (struct recurrence_args){
	        .batch = B, .seq_len = T, .d_model = D, .form = GATE_LOG_DECAY};
	check(act, OP_RECURRENCE, &a, (struct count){2 * n, act * 2 * n, act * n});
	check(act, OP_RECURRENCE_STEP, &step,
	      (struct count){4 * state, act * 3 * state + 4 * state, act * state + 4 * state});
}

static void recurrence_costs(void **state)
{
	(void)state;
	with_both_sizes(recurrence_case);
}

/* Multiply-adds, two FLOPs each, of one token after another. */
static double plain_matrix_flops(const struct matrix_recurrence_args *a)
{
	double flops = 0;

	for (int64_t row = 0; row < a->batch * a->seq_len * a->n_heads; row++) {
		for (int64_t i = 0; i < a->d_k; i++)
			for (int64_t j = 0; j < a->d_v; j++) {
				flops += 2 + 2;                         /* S += k^T v; q S */
				flops += a->rule == RULE_DELTA ? 2 : 0; /* k S */
			}
		for (int64_t i = 0; a->rule == RULE_BONUS && i < a->d_k; i++)
			flops += 2; /* q . (u*k) */
		for (int64_t j = 0; a->rule == RULE_BONUS && j < a->d_v; j++)
			flops += 2; /* times v */
	}
	return flops;
}

/*
 * Multiply-adds in chunks of n, which divides T: every token reads and updates the state between
 * chunks, and meets the tokens before it in its own chunk. A token's meeting with itself counts
 * half: n/2 pairs per token, where with the whole diagonal there would be (n+1)/2, and without it
 * (n-1)/2.
 */
static double chunked_matrix_flops(const struct matrix_recurrence_args *a, int64_t n)
{
	double flops = 0;

	for (int64_t row = 0; row < a->batch * a->n_heads; row++)
		for (int64_t t = 0; t < a->seq_len; t++) {
			for (int64_t i = 0; i < a->d_k; i++)
				for (int64_t j = 0; j < a->d_v; j++)
					flops += 2 + 2;
			for (int64_t s = t / n * n; s <= t; s++)
				flops += (s < t ? 2.0 : 1.0) * (double)(a->d_k + a->d_v);
		}
	return flops;
}

static void check_matrix(double act, const struct matrix_recurrence_args *a, double flops)
{
	double tokens = elements(a->batch, a->seq_len, a->n_heads, 1);
	double inputs = 2 * elements(a->batch, a->seq_len, a->n_heads, a->d_k) +
	                elements(a->batch, a->seq_len, a->n_heads, a->d_v);
	double out = elements(a->batch, a->seq_len, a->n_heads, a->d_v);
	double state = elements(a->batch, a->n_heads, a->d_k, a->d_v);
	double bonus = a->rule == RULE_BONUS ? elements(1, 1, a->n_heads, a->d_k) : 0;
	double h0 = a->h0 ? state : 0, final_state = a->final_state ? state : 0;
	struct matrix_recurrence_backward_args back = {.forward = *a, .dh0 = &nowhere};

	inputs += a->decay == DECAY_DIAGONAL ? tokens * (double)a->d_k : 0;
	inputs += a->decay == DECAY_SCALAR ? tokens : 0;
	inputs += a->rule == RULE_DELTA ? tokens : 0;
	check(act, OP_MATRIX_RECURRENCE, a,
	      (struct count){flops, act * inputs + 4 * (bonus + h0), act * out + 4 * final_state});
	check(act, OP_MATRIX_RECURRENCE_BACKWARD, &back,
	      (struct count){2.5 * flops, act * (inputs + out) + 4 * (bonus + h0),
	                     act * inputs + 4 * (bonus + state)});
}

/* A step is one token of the plain recurrence from a state that is read and written. */
static void check_matrix_step(double act, const struct matrix_recurrence_args *a)
{
	struct matrix_recurrence_args token = *a;
	struct backend backend = backend_of(act);
	struct matrix_recurrence_step_args step = {.batch = a->batch,
	                                           .n_heads = a->n_heads,
	                                           .d_k = a->d_k,
	                                           .d_v = a->d_v,
	                                           .decay = a->decay,
	                                           .rule = a->rule};

	token.seq_len = token.chunk = 1;
	token.h0 = token.final_state = &nowhere;
	struct cost cost = kernel_cost(&backend, OP_MATRIX_RECURRENCE, &token);
	check(act, OP_MATRIX_RECURRENCE_STEP, &step,
	      (struct count){plain_matrix_flops(&token), cost.bytes_read, cost.bytes_written});
}

static void matrix_case(double act)
{
	struct matrix_recurrence_args a = {
	        .batch = 2, .seq_len = 12, .n_heads = 3, .d_k = 2, .d_v = 5};

	for (int decay = DECAY_NONE; decay <= DECAY_DIAGONAL; decay++)
		for (int rule = RULE_PLAIN; rule <= RULE_DELTA; rule++) {
			a.decay = (enum decay)decay;
			a.rule = (enum rule)rule;
			a.chunk = 1;
			a.h0 = a.final_state = NULL;
			check_matrix(act, &a, plain_matrix_flops(&a));
			check_matrix_step(act, &a);
			if (rule == RULE_DELTA)
				continue;
			a.h0 = a.final_state = &nowhere;
			for (a.chunk = 2; a.chunk <= 12; a.chunk += a.chunk)
				if (a.seq_len % a.chunk == 0)
					check_matrix(act, &a, chunked_matrix_flops(&a, a.chunk));
			/* A chunk is never longer than the sequence. */
			a.chunk = 100;
			check_matrix(act, &a, chunked_matrix_flops(&a, a.seq_len));
		}
}

static void matrix_costs(void **state)
{
	(void)state;
	with_both_sizes(matrix_case);
}

/* `per_element` FLOPs, tick by tick. */
static double elementwise_flops(double count, int per_element)
{
	double flops = 0;

	for (int64_t i = 0; i < (int64_t)count; i++)
		for (int j = 0; j < per_element; j++)
			flops++;
	return flops;
}

static void gate_case(double act)
{
	enum { N = 5, R = 3, M = 7, H = 2, D = 4 };
	double x = elements(1, 1, N, R), w = elements(1, 1, M, R), y = elements(1, 1, N, M);
	double rows = elements(1, 1, N, H), heads = elements(1, N, H, D);
	/* bias; exp, 1 +, log; / normalizer. */
	double decay_flops = elementwise_flops(y, 5);
	/* the norm; then exp, 1 +, divide; times gate, times x. */
	double gate_flops = norm_flops(N * H, D) + elementwise_flops(heads, 5);
	struct decay_gate_args decay = {.n_tokens = N, .rank = R, .d_out = M, .x_stride = 9};
	struct decay_gate_backward_args decay_back = {.forward = decay};
	struct norm_gate_args gate = {
	        .n_tokens = N, .n_heads = H, .d_head = D, .gate_stride = 50, .rstd = &nowhere};
	struct norm_gate_backward_args gate_back = {.forward = gate};

	check(act, OP_DECAY_GATE, &decay,
	      (struct count){product_flops(N, R, M) + decay_flops, act * (x + w) + 4 * M, act * y});
	/* x, weight, log_decay and its gradient -> dx, dweight, dbias. */
	check(act, OP_DECAY_GATE_BACKWARD, &decay_back,
	      (struct count){2 * product_flops(N, R, M) + 2 * decay_flops, act * (x + w + 2 * y),
	                     act * x + 4 * (w + M)});
	check(act, OP_NORM_GATE, &gate,
	      (struct count){gate_flops, act * 2 * heads + 4 * D, act * heads + 4 * rows});
	/* x, gate, dout; rstd, weight -> dx, dgate; dweight. */
	check(act, OP_NORM_GATE_BACKWARD, &gate_back,
	      (struct count){2 * gate_flops, act * 3 * heads + 4 * (rows + D),
	                     act * 2 * heads + 4 * D});
}

static void gate_costs(void **state)
{
	(void)state;
	with_both_sizes(gate_case);
}

static void conv_case(double act)
{
	enum { B = 2, T = 5, C = 6, R = 3 };
	double x = elements(B, T, 1, C), kept = elements(B, CONV_HISTORY, 1, C);
	double weights = 4 * (elements(1, 1, C, CONV_WIDTH) + C);
	/* Four taps; exp, 1 +, divide, times x. */
	double flops = elementwise_flops(x, 2 * CONV_WIDTH + 4);
	struct short_conv_args conv = {
	        .batch = B, .seq_len = T, .channels = C, .x_stride = 50, .history = &nowhere};
	struct short_conv_backward_args back = {.forward = conv, .n_readers = R};
	struct short_conv_step_args step = {.batch = B, .channels = C, .x_stride = 50};

	check(act, OP_SHORT_CONV, &conv,
	      (struct count){flops, act * x + weights, act * (x + kept)});
	check(act, OP_SHORT_CONV_BACKWARD, &back,
	      (struct count){2 * flops + (R - 1) * x, act * (1 + R) * x + weights,
	                     act * x + weights});
	check(act, OP_SHORT_CONV_STEP, &step,
	      (struct count){flops / T, act * (x / T + kept) + weights, act * (x / T + kept)});
}

static void family_gate_case(double act)
{
	enum { N = 5, H = 2, D = 4 };
	double rows = elements(1, 1, N, H), x = elements(1, N, H, D), token = rows;
	struct time_step_args steps = {.n_tokens = N, .n_heads = H, .d_head = D};
	struct time_step_backward_args steps_back = {.forward = steps, .dskip = &nowhere};
	struct forget_gate_args forget = {.n_tokens = N, .width = H * D};
	struct forget_gate_backward_args forget_back = {.forward = forget};
	struct gate_norm_args norm = {
	        .n_tokens = N, .n_heads = H, .d_head = D, .groups = 1, .rstd = &nowhere};
	struct rotate_step_args rotate = {.batch = N, .n_heads = H, .d_head = D};

	/* bias; exp, 1 +, log; times the rate; times x. */
	check(act, OP_TIME_STEP, &steps,
	      (struct count){elementwise_flops(token, 5) + x, act * (rows + x) + 4 * 2 * H,
	                     act * (rows + x)});
	check(act, OP_TIME_STEP_BACKWARD, &steps_back,
	      (struct count){2 * (elementwise_flops(token, 5) + x) + x,
	                     act * (2 * (rows + x) + x) + 4 * 2 * H, act * (rows + x) + 4 * 2 * H});
	/* sigmoid 3, times 1-b, 1 -, log; silu 4, with 1-f; b's own are counted as one more. */
	check(act, OP_FORGET_GATE, &forget,
	      (struct count){elementwise_flops(x, 12), act * 2 * x + 4 * H * D, act * 2 * x});
	check(act, OP_FORGET_GATE_BACKWARD, &forget_back,
	      (struct count){2 * elementwise_flops(x, 12), act * 4 * x + 4 * H * D,
	                     act * 2 * x + 4 * H * D});
	forget.key = &nowhere;
	check(act, OP_FORGET_GATE, &forget,
	      (struct count){elementwise_flops(x, 12), act * 2 * x + 4 * H * D, act * 3 * x});
	check(act, OP_GATE_NORM, &norm,
	      (struct count){norm_flops(N, H * D), act * x + 4 * H * D, act * x + 4 * N});
	norm.skip = norm.gate = &nowhere;
	check(act, OP_GATE_NORM, &norm,
	      (struct count){norm_flops(N, H * D) + elementwise_flops(x, 2 + 5),
	                     act * 3 * x + 4 * (H * D + H), act * x + 4 * N});
	struct gate_norm_backward_args norm_back = {.forward = norm};
	check(act, OP_GATE_NORM_BACKWARD, &norm_back,
	      (struct count){2 * (norm_flops(N, H * D) + elementwise_flops(x, 2 + 5)),
	                     act * 4 * x + 4 * (N + H * D + H), act * 3 * x + 4 * (H * D + H)});
	check(act, OP_ROTATE_STEP, &rotate,
	      (struct count){elementwise_flops(2 * x, 3), act * 2 * x + 4, act * 2 * x});
}

static void family_costs(void **state)
{
	(void)state;
	with_both_sizes(conv_case);
	with_both_sizes(family_gate_case);
}

/* Heads that read the same q and k: these come once. */
static void shared_keys_cost(void **state)
{
	enum { T = 12, H = 2, K = 2, V = 5 };
	struct backend backend = backend_of(4);
	struct matrix_recurrence_args a = {
	        .batch = 2, .seq_len = T, .n_heads = H, .d_k = K, .d_v = V};

	(void)state;
	a.q.token = a.k.token = H * K;
	a.q.head = a.k.head = K;
	double apart = kernel_cost(&backend, OP_MATRIX_RECURRENCE, &a).bytes_read;
	a.q.token = a.k.token = K;
	a.q.head = a.k.head = 0;
	double shared = kernel_cost(&backend, OP_MATRIX_RECURRENCE, &a).bytes_read;
	assert_true(apart - shared == 4 * 2 * elements(2, T, H - 1, K));
}

static void model_case(double act)
{
	enum { N = 5, V = 11, D = 3 };
	double y = elements(1, 1, N, D), logits = elements(1, 1, N, V);
	struct gelu_args gelu = {.count = N * D};
	struct gelu_backward_args gelu_back = {.count = N * D};
	struct embedding_args embedding = {.n_tokens = N, .vocab = V, .d_model = D};
	struct embedding_backward_args embedding_back = {.n_tokens = N, .vocab = V, .d_model = D};
	struct cross_entropy_args loss = {.n_tokens = N, .vocab = V};
	struct argmax_args argmax = {.n_tokens = N, .vocab = V};

	/* x/sqrt(2), erf, 1 +, halve, times x. */
	check(act, OP_GELU, &gelu, (struct count){elementwise_flops(y, 5), act * y, act * y});
	check(act, OP_GELU_BACKWARD, &gelu_back,
	      (struct count){2 * elementwise_flops(y, 5), act * 2 * y, act * y});
	check(act, OP_EMBEDDING, &embedding, (struct count){0, act * y + 4 * N, act * y});
	check(act, OP_EMBEDDING_BACKWARD, &embedding_back,
	      (struct count){elementwise_flops(y, 1), act * y + 4 * N, 4 * elements(1, 1, V, D)});
	/* maximum; minus it, exp, sum. */
	check(act, OP_CROSS_ENTROPY, &loss,
	      (struct count){elementwise_flops(logits, 4), act * logits + 4 * N, 4});
	loss.want_gradient = true;
	check(act, OP_CROSS_ENTROPY, &loss,
	      (struct count){elementwise_flops(logits, 5), act * logits + 4 * N, act * logits + 4});
	check(act, OP_ARGMAX, &argmax,
	      (struct count){elementwise_flops(logits, 1), act * logits, 4 * N});
	argmax.position = &nowhere_int;
	check(act, OP_ARGMAX, &argmax,
	      (struct count){elementwise_flops(logits, 1), act * logits + 4, 4 * N + 4});
}

static void model_costs(void **state)
{
	(void)state;
	with_both_sizes(model_case);
}

/* A plan sums what would run, without running it or looking at the tensors. */
static void plan_sums_costs(void **state)
{
	struct gelu_args gelu = {.count = 6, .x = &nowhere, .y = &nowhere};
	struct argmax_args argmax = {.n_tokens = 2, .vocab = 3, .logits = &nowhere};
	struct kernel_plan plan = {0};
	struct context ctx = {.backend = &cpu_backend, .plan = &plan};
	struct cost a = kernel_cost(&cpu_backend, OP_GELU, &gelu);
	struct cost b = kernel_cost(&cpu_backend, OP_ARGMAX, &argmax);

	(void)state;
	for (int i = 0; i < 3; i++)
		assert_int_equal(kernel_run(&ctx, OP_GELU, &gelu), STATUS_OK);
	assert_int_equal(kernel_run(&ctx, OP_ARGMAX, &argmax), STATUS_OK);
	assert_int_equal(plan.n_operations, 2);
	assert_int_equal(plan.operations[0].count, 3);
	assert_int_equal(plan.operations[1].count, 1);
	assert_string_equal(plan.operations[0].provider, "cpu");
	assert_true(plan.total.flops == 3 * a.flops + b.flops);
	assert_true(plan.total.bytes_read == 3 * a.bytes_read + b.bytes_read);
	assert_true(plan.total.bytes_written == 3 * a.bytes_written + b.bytes_written);
	assert_string_equal(ctx.ran[OP_GELU], "cpu");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(linear_costs),
	        cmocka_unit_test(attention_costs),
	        cmocka_unit_test(attention_step_costs),
	        cmocka_unit_test(rotate_costs),
	        cmocka_unit_test(rat_costs),
	        cmocka_unit_test(recurrence_costs),
	        cmocka_unit_test(matrix_costs),
	        cmocka_unit_test(gate_costs),
	        cmocka_unit_test(family_costs),
	        cmocka_unit_test(shared_keys_cost),
	        cmocka_unit_test(model_costs),
	        cmocka_unit_test(plan_sums_costs),
	};

	return cmocka_run_group_tests_name("cost", tests, NULL, NULL);
}
