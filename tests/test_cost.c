/*
 * kernel_cost() against counts by hand: every FLOP as it would happen, and every element as it is
 * read or written. On a backend in fp32 and on one in bf16.
 */
#include "tests/test.h"

#include "kernels/operation.h"
#include "kernels/problem.h"

/* What a step counts: elements of activations, and of what always has four bytes. */
struct count {
	double flops, read, read_wide, written, written_wide;
};

/* Some memory that must never be looked at. */
static float nowhere;
static int32_t nowhere_int;

static const struct view some_view = {&nowhere, 1, 1, 1}, other_view = {&nowhere, 2, 2, 2}, no_view;

/* Gives every operand a place that must be there and has none. */
static void place(enum operation operation, void *args)
{
	struct operand_list list;

	/* What is there decides what else must be. */
	operation_describe(operation, args, &list);
	for (int i = 0; i < list.count; i++) {
		struct operand *o = &list.operand[i];
		void *data = &nowhere;

		if (o->optional || operand_data(o))
			continue;
		memcpy(o->location, &data, sizeof data);
		operation_describe(operation, args, &list);
		i = -1;
	}
}

/* Of the operands in args and those that must be there; activations of `size` bytes. */
static struct cost cost_of(size_t size, enum operation operation, const void *args)
{
	const struct device device = {.activation = size == 2 ? DTYPE_BF16 : DTYPE_F32,
	                              .wide = DTYPE_F32};
	union any_args placed;

	memcpy(&placed, args, operation_describes(operation)->args_size);
	place(operation, &placed);
	return kernel_cost(&device, operation, &placed);
}

/* The counts are of elements: those of activations, and those that always have four bytes. */
static void check(enum operation operation, const void *args, double flops, double act_read,
                  double wide_read, double act_written, double wide_written)
{
	for (size_t size = 2; size <= 4; size += 2) {
		const struct cost cost = cost_of(size, operation, args);
		const double bytes = (double)size, read = bytes * act_read + 4 * wide_read,
		             written = bytes * act_written + 4 * wide_written;

		if (cost.flops != flops || cost.bytes_read != read || cost.bytes_written != written)
			fail_msg("%s, %zu bytes: FLOPs %.1f, read %.1f, written %.1f; counted "
			         "%.1f, %.1f, %.1f",
			         operation_name(operation), size, cost.flops, cost.bytes_read,
			         cost.bytes_written, flops, read, written);
	}
}

/* Multiply-adds of y = x W^T, two FLOPs each. */
static double product_flops(int64_t n, int64_t k, int64_t m)
{
	return (double)(2 * n * k * m);
}

/* x*x, its sum, times rstd, times weight. */
static double norm_flops(int64_t n, int64_t d)
{
	return (double)(4 * n * d);
}

TEST(linear_costs)
{
	enum { N = 5, K = 3, M = 7 };
	const double x = N * K, w = M * K, y = N * M, product = product_flops(N, K, M);
	float *f = &nowhere;
	struct norm_linear_args norm = {N, K, M, 1e-6f, f, f, f, NULL, f, f, f};
	struct norm_linear_backward_args back = {.forward = {.n_tokens = N, .d_in = K, .d_out = M}};
	struct linear_residual_args linear = {N, K, M, f, f, NULL, f, f};
	struct linear_residual_backward_args linear_back = {N, K, M, f, f, f, f, f, NULL};

	check(OP_NORM_LINEAR, &norm, product + norm_flops(N, K), x + w, K, x + y, N);
	norm.norm_weight = NULL;
	norm.rstd = NULL;
	check(OP_NORM_LINEAR, &norm, product, x + w, 0, y, 0);

	/* No norm: dx = dy W and dweight = dy^T x. */
	check(OP_NORM_LINEAR_BACKWARD, &back, 2 * product, x + w + y, 0, x, w);
	back.forward.norm_weight = f;
	check(OP_NORM_LINEAR_BACKWARD, &back, 2 * product + 2 * norm_flops(N, K), x + w + y + x,
	      K + N, x, w + K);
	back.dresidual = f;
	check(OP_NORM_LINEAR_BACKWARD, &back, 2 * product + 2 * norm_flops(N, K) + x,
	      x + w + y + x + x, K + N, x, w + K);

	check(OP_LINEAR_RESIDUAL, &linear, product + y, x + w + y, 0, y, 0);
	linear.residual = NULL;
	check(OP_LINEAR_RESIDUAL, &linear, product, x + w, 0, y, 0);
	check(OP_LINEAR_RESIDUAL_BACKWARD, &linear_back, 2 * product, x + w + y, 0, x, w);

	/* A bias is added to every element; its gradient is as many additions. */
	norm.bias = linear.bias = back.forward.bias = linear_back.dbias = f;
	back.dresidual = NULL;
	check(OP_NORM_LINEAR, &norm, product + y, x + w, M, y, 0);
	check(OP_LINEAR_RESIDUAL, &linear, product + y, x + w, M, y, 0);
	check(OP_NORM_LINEAR_BACKWARD, &back, 2 * product + 2 * norm_flops(N, K) + y, x + w + y + x,
	      K + N, x, w + K + M);
	check(OP_LINEAR_RESIDUAL_BACKWARD, &linear_back, 2 * product + y, x + w + y, 0, x, w + M);
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
	case MASK_DILATED:
		return s <= t && (t - s <= a->window || s < a->initial ||
		                  (a->dilation > 0 && (s + 1) % a->dilation == 0));
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

static void check_attention(const struct attention_args *a)
{
	const double rows = (double)(a->batch * a->seq_len * a->n_heads),
	             own = a->own_score != NULL;
	const double out = rows * (double)a->d_head;
	const double q = (double)(a->batch * a->seq_len * a->q_heads * a->d_head);
	const double kv = (double)(2 * a->batch * a->kv_len * a->kv_heads * a->d_head);
	const double inputs = q + kv + own * out + (a->gate.data ? out : 0);
	struct attention_backward_args back = {.forward = *a};

	check(OP_ATTENTION, a, attention_flops(a, 2), inputs, own * rows,
	      out * (a->out_ungated.data ? 2 : 1), a->lse ? rows : 0);
	/* q k^T again, do v^T, and the products for dq, dk, dv; reads the output, its gradient and
	 * the lse too, writes a gradient for every input. */
	check(OP_ATTENTION_BACKWARD, &back, attention_flops(a, 5), inputs + 2 * out,
	      own * rows + rows, inputs, own * rows);
}

TEST(attention_costs)
{
	struct attention_args a = {.batch = 2,
	                           .n_heads = 4,
	                           .q_heads = 4,
	                           .kv_heads = 4,
	                           .d_head = 3,
	                           .seq_len = 13,
	                           .kv_len = 13,
	                           .out = some_view};

	check_attention(&a);
	a.mask = MASK_WINDOW;
	for (a.window = 0; a.window < 16; a.window += 5)
		check_attention(&a);
	a.kv_heads = 2;
	check_attention(&a);
	a.kv_heads = 4;
	a.lse = &nowhere;
	a.gate = a.out_ungated = some_view;
	a.mask = MASK_DILATED;
	for (a.dilation = 0; a.dilation < 15; a.dilation += 2)
		for (a.window = 0; a.window < 16; a.window += 5)
			for (a.initial = 0; a.initial < 16; a.initial += 5)
				check_attention(&a);
	a.mask = MASK_FULL;
	a.kv_len = 5;
	check_attention(&a);
	a.mask = MASK_CHUNK;
	a.own_score = &nowhere;
	a.own_value = some_view;
	a.q_heads = 2;
	for (a.chunk = 1; a.chunk < 16; a.chunk += 3) {
		a.kv_len = (a.seq_len + a.chunk - 1) / a.chunk;
		check_attention(&a);
	}
}

static void check_attention_step(int64_t kv_heads, int64_t window, int64_t slots, int64_t position)
{
	enum { B = 2, H = 6, D = 4 };
	struct attention_step_args a = {.batch = B,
	                                .n_heads = H,
	                                .kv_heads = kv_heads,
	                                .d_head = D,
	                                .kv_slots = slots,
	                                .window = window,
	                                .position_hint = position};
	struct count c = {.read_wide = 1}; /* the position */

	for (int64_t row = 0; row < B * H; row++)
		for (int64_t s = 0; s <= position; s++) {
			if (window >= 0 && position - s > window)
				continue;
			c.flops += 2 * 2 * D;               /* q k^T and p v */
			c.read += s == position ? D : 0;    /* q */
			c.written += s == position ? D : 0; /* out */
			if (row % H >= kv_heads)
				continue;
			c.read += 2 * D; /* its own k, v come from the projection */
			c.written += s == position ? 2 * D : 0; /* k, v stored */
		}
	check(OP_ATTENTION_STEP, &a, c.flops, c.read, c.read_wide, c.written, c.written_wide);
}

TEST(attention_step_costs)
{
	for (int64_t position = 0; position < 9; position++) {
		check_attention_step(6, -1, 12, position);
		check_attention_step(2, -1, 12, position);
		check_attention_step(6, 0, 1, position);
		check_attention_step(1, 3, 4, position);
		check_attention_step(6, 100, 101, position);
	}
}

TEST(rotate_costs)
{
	enum { B = 2, T = 9, H = 3, D = 4 };
	enum { KV = 1 };
	const double whole = B * T * H * D, whole_k = B * T * KV * D, tail = B * 5 * KV * D;
	struct rotate_args a = {.batch = B,
	                        .seq_len = T,
	                        .n_heads = H,
	                        .kv_heads = KV,
	                        .d_head = D,
	                        .rope = true,
	                        .first_kv = 4,
	                        .kv_slots = 5,
	                        .q = some_view,
	                        .k = some_view,
	                        .v = other_view,
	                        .q_out = some_view,
	                        .k_out = some_view,
	                        .v_out = some_view};
	struct rotate_backward_args back = {B, T,         H,         KV,        D,        true,
	                                    0, some_view, some_view, some_view, some_view};

	/* Two multiplications and an addition for each element of q and of the cached k. */
	check(OP_ROTATE, &a, 3 * (whole + tail), whole + 2 * tail, 0, whole + 2 * tail, 0);
	a.v_out = no_view;
	check(OP_ROTATE, &a, 3 * (whole + tail), whole + tail, 0, whole + tail, 0);
	/* q and k stay where they are; v moves. */
	a.rope = false;
	a.v_out = some_view;
	check(OP_ROTATE, &a, 0, tail, 0, tail, 0);
	check(OP_ROTATE_BACKWARD, &back, 3 * (whole + whole_k), whole + whole_k, 0, whole + whole_k,
	      0);
	/* A half of each head is half the work, and where nothing moves half the bytes. */
	back.rope_width = D / 2;
	check(OP_ROTATE_BACKWARD, &back, 1.5 * (whole + whole_k), (whole + whole_k) / 2, 0,
	      (whole + whole_k) / 2, 0);
	back.rope_width = 0;
	back.rope = false;
	check(OP_ROTATE_BACKWARD, &back, 0, 0, 0, 0, 0);
}

/* g h + (1-g) x: two multiply-adds for every element of `states` recurrences. */
static double gated_flops(int64_t batch, int64_t seq_len, int64_t width, int states)
{
	return (double)(states * 4 * batch * seq_len * width);
}

static void rat_scan_costs(void)
{
	enum { B = 2, T = 11, H = 4, G = 2, D = 3, L = 4, W = H * D };
	const double wide = B * T * H * D, grouped = B * T * G * D, chunks = B * 3 * H * D;
	const double scores = B * T * H, flops = gated_flops(B, T, W, 2);
	struct rat_scan_args a = {
	        .batch = B, .seq_len = T, .n_heads = H, .groups = G, .d_head = D, .chunk = L};
	struct rat_scan_backward_args back = {.forward = a};

	/* v, gate; q, k; the bias -> vt, own score, q, and the chunks' k, v. */
	check(OP_RAT_SCAN, &a, flops, 2 * wide + 2 * grouped, W, wide + grouped + 2 * chunks,
	      scores);
	a.k_state = a.v_state = &nowhere;
	check(OP_RAT_SCAN, &a, flops, 2 * wide + 2 * grouped, W, wide + grouped + 2 * chunks,
	      scores + 2 * B * W);
	/* v, gate, dvt; q, k, dq; the chunks' dk, dv; down_score, bias -> dv, dgate, dq, dk, dbias.
	 */
	check(OP_RAT_SCAN_BACKWARD, &back, 2.5 * flops, 3 * wide + 3 * grouped + 2 * chunks,
	      scores + W, 2 * wide + 2 * grouped, W);
}

static void rat_step_costs(void)
{
	enum { B = 2, H = 4, G = 2, D = 3, L = 4, WIDE = B * H * D };
	struct rat_step_args a = {
	        .batch = B, .n_heads = H, .groups = G, .d_head = D, .chunk = L, .chunk_slots = 9};

	for (a.position_hint = 0; a.position_hint < 3 * L; a.position_hint++) {
		const int64_t p = a.position_hint;
		struct count c = {.flops = gated_flops(B, 1, H * D, 2),
		                  .read = 3 * WIDE + 2 * B * G * D,
		                  .read_wide = 1 + H * D,
		                  .written = WIDE,
		                  .written_wide = 2 * WIDE};

		if (p % L != 0) /* carries on from the running pair */
			c.read_wide += 2 * WIDE;
		for (int64_t chunk = 0; chunk < p / L; chunk++) {
			c.flops += 4 * WIDE;
			c.read += 2 * WIDE;
		}
		c.flops += 4 * WIDE; /* the running pair's own score and value */
		if (p % L == L - 1)
			c.written += 2 * WIDE;
		check(OP_RAT_STEP, &a, c.flops, c.read, c.read_wide, c.written, c.written_wide);
	}
}

TEST(rat_costs)
{
	rat_scan_costs();
	rat_step_costs();
}

/* Of tokens 0, 1, 2, 5, 11, 17, .. those older than the window, and 4 within it. */
static void check_ratplus_step(int64_t position, double kept, double recent, bool keeps)
{
	enum { B = 2, H = 3, D = 4, N = B * H * D };
	const struct ratplus_step_args a = {.batch = B,
	                                    .n_heads = H,
	                                    .d_head = D,
	                                    .window = 4,
	                                    .dilation = 6,
	                                    .initial = 3,
	                                    .kept_slots = 9,
	                                    .recent_slots = 5,
	                                    .position_hint = position};
	const double pair = position > 0 ? 2 * N : 0;

	/* z, q, k, v, gate, the position; two multiply-adds for each of a pair, and for each of
	 * a key. */
	check(OP_RATPLUS_STEP, &a, N * (8 + 4 * (kept + recent + 1)),
	      5 * N + 2 * N * (kept + recent), pair + 1, N + (keeps ? 4 * N : 2 * N), 2 * N);
}

TEST(ratplus_step_costs)
{
	check_ratplus_step(0, 0, 0, true);
	check_ratplus_step(2, 0, 2, true);
	check_ratplus_step(3, 0, 3, false);
	check_ratplus_step(5, 1, 4, true);
	check_ratplus_step(10, 4, 4, false);
	check_ratplus_step(17, 5, 4, true);
}

TEST(recurrence_costs)
{
	enum { B = 2, T = 7, D = 5 };
	const double n = B * T * D, h = B * D, flops = gated_flops(B, T, D, 1);
	float *f = &nowhere;
	struct recurrence_args a = {.batch = B, .seq_len = T, .d_model = D};
	struct recurrence_step_args step = {.batch = B, .d_model = D, .z = some_view};

	/* x, gate -> out. */
	check(OP_RECURRENCE, &a, flops, 2 * n, 0, n, 0);
	a.z = a.h = some_view;
	a.gate_bias = a.h0 = a.h_final = f;
	check(OP_RECURRENCE, &a, flops, 3 * n, D + h, 2 * n, h);
	/* x, gate, z, h, dout; bias, h0 -> dx, dgate, dz; dbias, dh0. */
	struct recurrence_backward_args back = {.forward = a, .dgate_bias = f, .dh0 = f};
	check(OP_RECURRENCE_BACKWARD, &back, 2.5 * flops, 5 * n, D + h, 3 * n, D + h);
	back.dgate_base = some_view;
	check(OP_RECURRENCE_BACKWARD, &back, 2.5 * flops, 6 * n, D + h, 3 * n, D + h);
	/* HGRN's form is one multiply-add. */
	a = (struct recurrence_args){
	        .batch = B, .seq_len = T, .d_model = D, .form = GATE_LOG_DECAY};
	check(OP_RECURRENCE, &a, 2 * n, 2 * n, 0, n, 0);
	check(OP_RECURRENCE_STEP, &step, 4 * h, 3 * h, h, h, h);
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

static void check_matrix(const struct matrix_recurrence_args *a, double flops)
{
	const double tokens = (double)(a->batch * a->seq_len * a->n_heads);
	const double out = tokens * (double)a->d_v;
	const double state = (double)(a->batch * a->n_heads * a->d_k * a->d_v);
	const double bonus = a->rule == RULE_BONUS ? (double)(a->n_heads * a->d_k) : 0;
	const double h0 = a->h0 ? state : 0, final_state = a->final_state ? state : 0;
	struct matrix_recurrence_backward_args back = {.forward = *a, .dh0 = &nowhere};
	double inputs = 2 * tokens * (double)a->d_k + out;

	inputs += a->decay == DECAY_DIAGONAL ? tokens * (double)a->d_k : 0;
	inputs += a->decay == DECAY_SCALAR ? tokens : 0;
	inputs += a->rule == RULE_DELTA ? tokens : 0;
	check(OP_MATRIX_RECURRENCE, a, flops, inputs, bonus + h0, out, final_state);
	check(OP_MATRIX_RECURRENCE_BACKWARD, &back, 2.5 * flops, inputs + out, bonus + h0, inputs,
	      bonus + state);
}

/* A step is one token of the plain recurrence from a state that is read and written. */
static void check_matrix_step(const struct matrix_recurrence_args *a)
{
	struct matrix_recurrence_args token = *a;
	struct matrix_recurrence_step_args step = {.batch = a->batch,
	                                           .n_heads = a->n_heads,
	                                           .d_k = a->d_k,
	                                           .d_v = a->d_v,
	                                           .decay = a->decay,
	                                           .rule = a->rule};

	token.seq_len = token.chunk = 1;
	token.h0 = token.final_state = &nowhere;
	for (size_t size = 2; size <= 4; size += 2) {
		const struct cost expected = cost_of(size, OP_MATRIX_RECURRENCE, &token);
		const struct cost cost = cost_of(size, OP_MATRIX_RECURRENCE_STEP, &step);

		assert_true(cost.flops == plain_matrix_flops(&token));
		assert_true(cost.bytes_read == expected.bytes_read);
		assert_true(cost.bytes_written == expected.bytes_written);
	}
}

static void check_matrix_form(struct matrix_recurrence_args a)
{
	a.chunk = 1;
	check_matrix(&a, plain_matrix_flops(&a));
	check_matrix_step(&a);
	if (a.rule == RULE_DELTA)
		return;
	a.h0 = a.final_state = &nowhere;
	for (a.chunk = 2; a.chunk <= 12; a.chunk += a.chunk)
		if (a.seq_len % a.chunk == 0)
			check_matrix(&a, chunked_matrix_flops(&a, a.chunk));
	/* A chunk is never longer than the sequence. */
	a.chunk = 100;
	check_matrix(&a, chunked_matrix_flops(&a, a.seq_len));
}

TEST(matrix_costs)
{
	struct matrix_recurrence_args a = {
	        .batch = 2, .seq_len = 12, .n_heads = 3, .d_k = 2, .d_v = 5};

	for (int decay = DECAY_NONE; decay <= DECAY_DIAGONAL; decay++)
		for (int rule = RULE_PLAIN; rule <= RULE_DELTA; rule++) {
			a.decay = (enum decay)decay;
			a.rule = (enum rule)rule;
			check_matrix_form(a);
		}
}

TEST(gate_costs)
{
	enum { N = 5, R = 3, M = 7, H = 2, D = 4 };
	const double x = N * R, w = M * R, y = N * M, rows = N * H, heads = N * H * D;
	/* bias; exp, 1 +, log; / normalizer. */
	const double decay_flops = product_flops(N, R, M) + 5 * y;
	/* the norm; then exp, 1 +, divide; times gate, times x. */
	const double gate_flops = norm_flops(N * H, D) + 5 * heads;
	struct decay_gate_args decay = {.n_tokens = N, .rank = R, .d_out = M, .x_stride = 9};
	struct decay_gate_backward_args decay_back = {.forward = decay};
	struct norm_gate_args gate = {
	        .n_tokens = N, .n_heads = H, .d_head = D, .gate_stride = 50, .rstd = &nowhere};
	struct norm_gate_backward_args gate_back = {.forward = gate};

	check(OP_DECAY_GATE, &decay, decay_flops, x + w, M, y, 0);
	/* x, weight, log_decay and its gradient -> dx, dweight, dbias. */
	check(OP_DECAY_GATE_BACKWARD, &decay_back, 2 * decay_flops, x + w + 2 * y, 0, x, w + M);
	/* The same with a rate per head in the normalizer's place. */
	decay.form = decay_back.forward.form = LOW_RANK_RATE;
	decay.n_heads = decay_back.forward.n_heads = M;
	check(OP_DECAY_GATE, &decay, decay_flops, x + w, M + M, y, 0);
	check(OP_DECAY_GATE_BACKWARD, &decay_back, 2 * decay_flops, x + w + 2 * y, M, x, w + 2 * M);
	/* The bias alone; nothing of the forward's is read but x and weight. */
	decay.form = decay_back.forward.form = LOW_RANK_LOGIT;
	check(OP_DECAY_GATE, &decay, product_flops(N, R, M) + y, x + w, M, y, 0);
	check(OP_DECAY_GATE_BACKWARD, &decay_back, 2 * (product_flops(N, R, M) + y), x + w + y, 0,
	      x, w + M);
	/* tanh of x; the bias, exp, negate. */
	decay.form = decay_back.forward.form = LOW_RANK_EXP;
	check(OP_DECAY_GATE, &decay, product_flops(N, R, M) + 4 * x + 3 * y, x + w, M, y, 0);
	check(OP_DECAY_GATE_BACKWARD, &decay_back, 2 * (product_flops(N, R, M) + 4 * x + 3 * y),
	      x + w + 2 * y, 0, x, w + M);
	/* bias; exp, 1 +, log. */
	decay.form = decay_back.forward.form = LOW_RANK_STEP;
	check(OP_DECAY_GATE, &decay, product_flops(N, R, M) + 4 * y, x + w, M, y, 0);
	check(OP_DECAY_GATE_BACKWARD, &decay_back, 2 * (product_flops(N, R, M) + 4 * y),
	      x + w + 2 * y, 0, x, w + M);
	check(OP_NORM_GATE, &gate, gate_flops, 2 * heads, D, heads, rows);
	/* x, gate, dout; rstd, weight -> dx, dgate; dweight. */
	check(OP_NORM_GATE_BACKWARD, &gate_back, 2 * gate_flops, 3 * heads, rows + D, 2 * heads, D);
	/* A sigmoid is not multiplied by the gate. */
	gate.curve = gate_back.forward.curve = CURVE_SIGMOID;
	check(OP_NORM_GATE, &gate, gate_flops - heads, 2 * heads, D, heads, rows);
	check(OP_NORM_GATE_BACKWARD, &gate_back, 2 * (gate_flops - heads), 3 * heads, rows + D,
	      2 * heads, D);
	/* The mean, added up and taken off, and a bias; a weight and a bias of each channel. */
	gate.norm = gate_back.forward.norm = NORM_GROUP;
	check(OP_NORM_GATE, &gate, gate_flops + 2 * heads, 2 * heads, 2 * H * D, heads, rows);
	check(OP_NORM_GATE_BACKWARD, &gate_back, 2 * (gate_flops + 2 * heads), 3 * heads,
	      rows + 2 * H * D, 2 * heads, 2 * H * D);
}

/* x_{t-1} - x_t; times a mix, plus x, of each output. */
TEST(shift_costs)
{
	enum { B = 2, T = 5, C = 6, N = 3 };
	const double x = B * T * C, last = B * C, flops = x + 2 * N * x, mixes = N * C;
	struct token_shift_args shift = {.batch = B, .seq_len = T, .width = C, .n_out = N};
	struct token_shift_backward_args back = {.forward = shift};
	struct token_shift_step_args step = {.batch = B, .width = C, .n_out = N};

	check(OP_TOKEN_SHIFT, &shift, flops, x, mixes, N * x, 0);
	/* x, dout; the mixes -> dx; their gradients. */
	check(OP_TOKEN_SHIFT_BACKWARD, &back, 2 * flops, x + N * x, mixes, x, mixes);
	/* The state is read and written. */
	check(OP_TOKEN_SHIFT_STEP, &step, flops / T, 2 * last, mixes, (N + 1) * last, 0);
	shift.form = back.forward.form = step.form = SHIFT_VARIABLE;
	check(OP_TOKEN_SHIFT, &shift, flops, x + N * x, 0, N * x, 0);
	check(OP_TOKEN_SHIFT_BACKWARD, &back, 2 * flops, x + 2 * N * x, 0, x + N * x, 0);
	check(OP_TOKEN_SHIFT_STEP, &step, flops / T, (2 + N) * last, 0, N * last, 0);
}

static void conv_costs(void)
{
	enum { B = 2, T = 5, C = 6, R = 3 };
	const double x = B * T * C, kept = B * CONV_HISTORY * C, weights = C * CONV_WIDTH + C;
	/* Four taps; exp, 1 +, divide, times x. */
	const double flops = x * (2 * CONV_WIDTH + 4);
	struct short_conv_args conv = {
	        .batch = B, .seq_len = T, .channels = C, .x_stride = 50, .history = &nowhere};
	conv.bias = &nowhere;
	struct short_conv_backward_args back = {.forward = conv, .n_readers = R};
	struct short_conv_step_args step = {
	        .batch = B, .channels = C, .x_stride = 50, .bias = &nowhere};

	check(OP_SHORT_CONV, &conv, flops, x, weights, x + kept, 0);
	check(OP_SHORT_CONV_BACKWARD, &back, 2 * flops + (R - 1) * x, (1 + R) * x, weights, x,
	      weights);
	check(OP_SHORT_CONV_STEP, &step, flops / T, x / T + kept, weights, x / T + kept, 0);
	conv.bias = back.forward.bias = step.bias = NULL;
	check(OP_SHORT_CONV, &conv, flops, x, weights - C, x + kept, 0);
	check(OP_SHORT_CONV_BACKWARD, &back, 2 * flops + (R - 1) * x, (1 + R) * x, weights - C, x,
	      weights - C);
	check(OP_SHORT_CONV_STEP, &step, flops / T, x / T + kept, weights - C, x / T + kept, 0);
	/* The taps alone. */
	conv.curve = back.forward.curve = step.curve = CURVE_NONE;
	check(OP_SHORT_CONV, &conv, flops - 4 * x, x, weights - C, x + kept, 0);
	check(OP_SHORT_CONV_BACKWARD, &back, 2 * (flops - 4 * x) + (R - 1) * x, (1 + R) * x,
	      weights - C, x, weights - C);
	check(OP_SHORT_CONV_STEP, &step, flops / T - 4 * x / T, x / T + kept, weights - C,
	      x / T + kept, 0);
}

static void hawk_costs(void)
{
	enum { B = 2, T = 5, H = 3, P = 2, K = 4, M = 6, C = 7 };
	const double rows = B * T, x = rows * H * K, w = P * H * K * M, y = rows * P * H * M;
	const double wide = rows * C, product = 2 * rows * P * H * K * M;
	struct block_linear_args blocks = {
	        .n_tokens = B * T, .n_products = P, .n_blocks = H, .d_in = K, .d_out = M};
	struct block_linear_backward_args blocks_back = {.forward = blocks};
	struct lru_gate_args lru = {.batch = B, .seq_len = T, .width = C};
	struct lru_gate_backward_args lru_back = {.forward = lru};
	struct gelu_gate_args gelu = {.n_tokens = B * T, .width = C, .gate_stride = 50};
	struct gelu_gate_backward_args gelu_back = {.forward = gelu};
	/* Two sigmoids of a sum, 4 each; times the rate; exp of twice that, 1 -, root; two
	 * products. */
	const double gates = (4 + 4 + 1 + 2 + 1 + 1 + 2) * wide;

	check(OP_BLOCK_LINEAR, &blocks, product, x + w, 0, y, 0);
	check(OP_BLOCK_LINEAR_BACKWARD, &blocks_back, 2 * product, x + w + y, 0, x, w);
	blocks_back.dskip = &nowhere;
	check(OP_BLOCK_LINEAR_BACKWARD, &blocks_back, 2 * product + x, x + w + y + x, 0, x, w);
	check(OP_LRU_GATE, &lru, gates, 3 * wide, 3 * C, 2 * wide, 0);
	check(OP_LRU_GATE_BACKWARD, &lru_back, 2 * gates, 5 * wide, 3 * C, 3 * wide, 3 * C);
	/* z^2, times its factor, 1 +, times z; a sigmoid; times z, times x. */
	check(OP_GELU_GATE, &gelu, (4 + 3 + 2) * wide, 2 * wide, 0, wide, 0);
	check(OP_GELU_GATE_BACKWARD, &gelu_back, 2 * (4 + 3 + 2) * wide, 3 * wide, 0, 2 * wide, 0);
}

static void delta_gate_costs(void)
{
	enum { N = 5, H = 2 };
	const double rows = N * H;
	struct delta_gate_args gate = {.n_tokens = N, .n_heads = H, .stride = 9};
	struct delta_gate_backward_args back = {.forward = gate};

	/* exp, 1 +, divide. */
	check(OP_DELTA_GATE, &gate, 3 * rows, rows, 0, rows, 0);
	check(OP_DELTA_GATE_BACKWARD, &back, 2 * 3 * rows, 2 * rows, 0, rows, 0);
	/* And bias; exp, 1 +, log; times the rate. */
	gate.decay_logit = &nowhere;
	back.forward = gate;
	check(OP_DELTA_GATE, &gate, (3 + 5) * rows, 2 * rows, 2 * H, 2 * rows, 0);
	check(OP_DELTA_GATE_BACKWARD, &back, 2 * (3 + 5) * rows, 4 * rows, 2 * H, 2 * rows, 2 * H);
}

static void family_gate_costs(void)
{
	enum { N = 5, H = 2, D = 4, W = H * D };
	const double rows = N * H, x = N * W;
	struct time_step_args steps = {.n_tokens = N, .n_heads = H, .d_head = D};
	struct time_step_backward_args steps_back = {.forward = steps, .dskip = &nowhere};
	struct forget_gate_args forget = {.n_tokens = N, .width = W};
	struct forget_gate_backward_args forget_back = {.forward = forget};
	struct gate_norm_args norm = {
	        .n_tokens = N, .n_heads = H, .d_head = D, .groups = 1, .rstd = &nowhere};
	struct rotate_step_args rotate = {.batch = N, .n_heads = H, .d_head = D};

	/* bias; exp, 1 +, log; times the rate; times x. */
	check(OP_TIME_STEP, &steps, 5 * rows + x, rows + x, 2 * H, rows + x, 0);
	check(OP_TIME_STEP_BACKWARD, &steps_back, 2 * (5 * rows + x) + x, 2 * (rows + x) + x, 2 * H,
	      rows + x, 2 * H);
	/* sigmoid 3, times 1-b, 1 -, log; silu 4, with 1-f; b's own are counted as one more. */
	check(OP_FORGET_GATE, &forget, 12 * x, 2 * x, W, 2 * x, 0);
	check(OP_FORGET_GATE_BACKWARD, &forget_back, 2 * 12 * x, 4 * x, W, 2 * x, W);
	forget.key = &nowhere;
	check(OP_FORGET_GATE, &forget, 12 * x, 2 * x, W, 3 * x, 0);
	check(OP_GATE_NORM, &norm, norm_flops(N, W), x, W, x, N);
	norm.skip = norm.gate = &nowhere;
	check(OP_GATE_NORM, &norm, norm_flops(N, W) + (2 + 5) * x, 3 * x, W + H, x, N);
	struct gate_norm_backward_args norm_back = {.forward = norm};
	check(OP_GATE_NORM_BACKWARD, &norm_back, 2 * (norm_flops(N, W) + (2 + 5) * x), 4 * x,
	      N + W + H, 3 * x, W + H);
	check(OP_ROTATE_STEP, &rotate, 3 * 2 * x, 2 * x, 1, 2 * x, 0);
}

static void scan_costs(void)
{
	enum { B = 2, T = SCAN_CHUNK + 1, C = 5, S = 3 };
	const double x = B * T * C, chosen = B * T * S, states = B * S * C, rates = C * S;
	struct selective_scan_args scan = {.batch = B, .seq_len = T, .channels = C, .state = S};
	struct selective_scan_backward_args back = {.dh0 = &nowhere};
	struct selective_scan_step_args step = {.batch = B, .channels = C, .state = S};

	/* dt u; of each number times the rate, exp, times h, + u B, times C, +. */
	check(OP_SELECTIVE_SCAN, &scan, (6 * S + 1) * x, 2 * x + 2 * chosen, rates, x, 0);
	scan.z.data = step.z.data = &nowhere;
	scan.skip = step.skip = scan.h0 = scan.h_final = scan.borders = &nowhere;
	/* times skip, +; exp, 1 +, divide, times z, times y. Two chunks have begun. */
	const double flops = (6 * S + 1 + 2 + 5) * x;
	check(OP_SELECTIVE_SCAN, &scan, flops, 3 * x + 2 * chosen, rates + C + states, x,
	      3 * states);
	back.forward = scan;
	/* h0 is the first border. */
	check(OP_SELECTIVE_SCAN_BACKWARD, &back, 2.5 * flops, 4 * x + 2 * chosen,
	      rates + C + 2 * states, 3 * x + 2 * chosen, rates + C + states);
	check(OP_SELECTIVE_SCAN_STEP, &step, flops / T, 3 * x / T + 2 * chosen / T,
	      rates + C + states, x / T, states);
}

TEST(family_costs)
{
	scan_costs();
	conv_costs();
	delta_gate_costs();
	hawk_costs();
	family_gate_costs();
}

/* Heads that read the same q and k: these come once. */
TEST(shared_keys_cost)
{
	enum { T = 12, H = 2, K = 2, V = 5 };
	struct matrix_recurrence_args a = {
	        .batch = 2, .seq_len = T, .n_heads = H, .d_k = K, .d_v = V};

	a.q.token = a.k.token = H * K;
	a.q.head = a.k.head = K;
	double apart = cost_of(4, OP_MATRIX_RECURRENCE, &a).bytes_read;
	a.q.token = a.k.token = K;
	a.q.head = a.k.head = 0;
	double shared = cost_of(4, OP_MATRIX_RECURRENCE, &a).bytes_read;
	assert_true(apart - shared == 4 * 2 * (2 * T * (H - 1) * K));
}

TEST(model_costs)
{
	enum { N = 5, V = 11, D = 3 };
	const double y = N * D, logits = N * V;
	struct gelu_args gelu = {.count = N * D};
	struct gelu_backward_args gelu_back = {.count = N * D};
	struct embedding_args embedding = {.n_tokens = N, .vocab = V, .d_model = D};
	struct embedding_backward_args embedding_back = {.n_tokens = N, .vocab = V, .d_model = D};
	struct cross_entropy_args loss = {.n_tokens = N, .vocab = V};
	struct argmax_args argmax = {.n_tokens = N, .vocab = V};

	/* x/sqrt(2), erf, 1 +, halve, times x. */
	check(OP_GELU, &gelu, 5 * y, y, 0, y, 0);
	check(OP_GELU_BACKWARD, &gelu_back, 2 * 5 * y, 2 * y, 0, y, 0);
	check(OP_EMBEDDING, &embedding, 0, y, N, y, 0);
	check(OP_EMBEDDING_BACKWARD, &embedding_back, y, y, N, 0, V * D);
	/* maximum; minus it, exp, sum. */
	check(OP_CROSS_ENTROPY, &loss, 4 * logits, logits, N, 0, 1);
	loss.want_gradient = true;
	check(OP_CROSS_ENTROPY, &loss, 5 * logits, logits, N, logits, 1);
	check(OP_ARGMAX, &argmax, logits, logits, 0, 0, N);
	argmax.position = &nowhere_int;
	check(OP_ARGMAX, &argmax, logits, logits, 1, 0, N + 1);
}

/* What the benchmark of an operation runs is work: it has the tensors without which there is none.
 */
TEST(every_form_has_work)
{
	const struct sizes sizes = {.batch = 2,
	                            .seq_len = 32,
	                            .n_heads = 4,
	                            .groups = 2,
	                            .kv_heads = 4,
	                            .d_head = 16,
	                            .d_k = 16,
	                            .d_v = 16,
	                            .width = 64,
	                            .d_in = 64,
	                            .d_out = 64,
	                            .rank = 16,
	                            .chunk = 8,
	                            .window = 8,
	                            .vocab = 50};
	struct device *device;

	require_ok(cpu_backend.open("", NULL, &device));
	for (int op = 0; op < OP_COUNT; op++) {
		const struct operation_form *forms = operation_forms((enum operation)op);
		int i = 0;

		do {
			const struct problem_form form = {
			        .variant = forms[i].name ? &forms[i] : NULL, .sizes = sizes};
			struct problem problem;

			problem_plan(&problem, device, (enum operation)op, &form, NULL);
			const struct cost cost =
			        kernel_cost(device, (enum operation)op, &problem.args);
			if (!(cost.bytes_read + cost.bytes_written > 0))
				fail_msg("%s has none", operation_name((enum operation)op));
			problem_free(&problem);
		} while (forms[i].name && forms[++i].name);
	}
	device_close(device);
}

/* A plan sums what would run, without running it or looking at the tensors. */
TEST(plan_sums_costs)
{
	struct gelu_args gelu = {.count = 6, .x = &nowhere, .y = &nowhere};
	struct argmax_args argmax = {
	        .n_tokens = 2, .vocab = 3, .logits = &nowhere, .tokens = &nowhere_int};
	struct kernel_plan plan = {0};
	struct device *device;

	require_ok(cpu_backend.open("", NULL, &device));
	struct context ctx = {.device = device, .plan = &plan};
	struct cost a = kernel_cost(device, OP_GELU, &gelu);
	struct cost b = kernel_cost(device, OP_ARGMAX, &argmax);
	for (int i = 0; i < 3; i++)
		require_ok(kernel_run(&ctx, OP_GELU, &gelu));
	require_ok(kernel_run(&ctx, OP_ARGMAX, &argmax));
	assert_int_equal(plan.n_operations, 2);
	assert_int_equal(plan.operations[0].count, 3);
	assert_int_equal(plan.operations[1].count, 1);
	assert_string_equal(plan.operations[0].provider, "cpu");
	assert_true(plan.total.flops == 3 * a.flops + b.flops);
	assert_true(plan.total.bytes_read == 3 * a.bytes_read + b.bytes_read);
	assert_true(plan.total.bytes_written == 3 * a.bytes_written + b.bytes_written);
	assert_string_equal(ctx.ran[OP_GELU], "cpu");
	device_close(device);
}
