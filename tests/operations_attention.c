/* Cases of rotation, attention and RAT. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/operations.h"

static int64_t ceil_div(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* A divisor of n. */
static int64_t any_divisor(struct trial *trial, int64_t n)
{
	int64_t divisor;

	do
		divisor = random_integer(&trial->random, 1, n);
	while (n % divisor != 0);
	return divisor;
}

/* Without a rotation a head may be of any width. */
static int64_t any_attention_head(struct trial *trial)
{
	bool odd = !trial->narrow && random_integer(&trial->random, 0, 3) == 0;

	return odd ? random_integer(&trial->random, 1, 37) : any_head(trial);
}

static double *copy_of(struct trial *trial, int64_t count, const double *values)
{
	double *copy = trial_doubles(trial, count);

	memcpy(copy, values, (size_t)count * sizeof *copy);
	return copy;
}

/* rotated [B, T, H, d] = x, rotated if `rope`. */
static double *rotated(struct trial *trial, bool rope, int64_t batch, int64_t seq_len,
                       int64_t n_heads, int64_t d, int64_t period, const double *x)
{
	double *y = copy_of(trial, batch * seq_len * n_heads * d, x);

	if (rope)
		reference_rotate(batch, seq_len, n_heads, d, 0, period, y, y);
	return y;
}

/* Where one of q, k, v goes, and what has to be there afterwards. */
struct destination {
	struct tensor *tensor;
	double *expected;
};

/* No destination, in place, or apart: `slots` slots that receive tokens from `first` on. */
static struct destination any_destination(struct trial *trial, struct tensor *x,
                                          const double *rotated_x, int64_t first, int64_t slots)
{
	int64_t kind = random_integer(&trial->random, 0, 3), row = x->heads * x->width;
	struct tensor *to = x;

	if (kind == 0)
		return (struct destination){NULL, NULL};
	if (kind > 1 || slots != x->tokens || first != 0)
		to = trial_input(trial, x->batch, slots, x->heads, x->width, 1);
	double *expected = copy_of(trial, x->batch * slots * row, to->values);
	for (int64_t b = 0; b < x->batch; b++)
		for (int64_t t = first; t < x->tokens; t++)
			memcpy(expected + (b * slots + t % slots) * row,
			       rotated_x + (b * x->tokens + t) * row, (size_t)row * sizeof(double));
	trial_expect_written(to);
	return (struct destination){to, expected};
}

static void check_destination(struct trial *trial, const struct destination *to, const char *name)
{
	if (to->tensor)
		trial_check(trial, to->tensor, name, to->expected, trial->tolerance);
}

static bool rotate_case(struct trial *trial)
{
	/* Now and then far positions, where an angle in fp32 would have lost its fraction. */
	bool far = random_integer(&trial->random, 0, 9) == 0;
	int64_t batch = random_integer(&trial->random, 1, 3), d = any_head(trial);
	int64_t n = far ? random_integer(&trial->random, 5000, 9000) : any_length(trial, 150);
	int64_t heads = far ? 1 : random_integer(&trial->random, 1, 4);
	bool rope = random_integer(&trial->random, 0, 3) > 0;
	int64_t slots = random_bool(&trial->random) ? n : random_integer(&trial->random, 1, 2 * n);
	int64_t first = slots < n ? n - slots : 0;
	struct tensor *q = trial_input(trial, batch, n, heads, d, 1);
	struct tensor *k = trial_input(trial, batch, n, heads, d, 1);
	struct tensor *v = trial_input(trial, batch, n, heads, d, 1);
	struct destination q_to = any_destination(
	        trial, q, rotated(trial, rope, batch, n, heads, d, 1, q->values), 0, n);
	struct destination k_to = any_destination(
	        trial, k, rotated(trial, rope, batch, n, heads, d, 1, k->values), first, slots);
	struct destination v_to = any_destination(trial, v, v->values, first, slots);
	struct rotate_args args = {batch,
	                           n,
	                           heads,
	                           d,
	                           rope,
	                           first,
	                           slots,
	                           view_of(q),
	                           view_of(k),
	                           view_of(v),
	                           view_of(q_to.tensor),
	                           view_of(k_to.tensor),
	                           view_of(v_to.tensor)};

	trial_describe(trial, "B %ld, T %ld, H %ld, d %ld, rope %d, %ld slots from token %ld",
	               (long)batch, (long)n, (long)heads, (long)d, rope, (long)slots, (long)first);
	if (!trial_run(trial, OP_ROTATE, &args))
		return false;
	check_destination(trial, &q_to, "q_out");
	check_destination(trial, &k_to, "k_out");
	check_destination(trial, &v_to, "v_out");
	return true;
}

static bool rotate_backward_case(struct trial *trial)
{
	int64_t batch = random_integer(&trial->random, 1, 3), n = any_length(trial, 150);
	int64_t heads = random_integer(&trial->random, 1, 4), d = any_head(trial);
	bool rope = random_integer(&trial->random, 0, 3) > 0;
	struct tensor *dq = trial_input(trial, batch, n, heads, d, 1);
	struct tensor *dk = trial_input(trial, batch, n, heads, d, 1);
	double *q_expected = copy_of(trial, batch * n * heads * d, dq->values);
	double *k_expected = copy_of(trial, batch * n * heads * d, dk->values);

	trial_describe(trial, "B %ld, T %ld, H %ld, d %ld, rope %d", (long)batch, (long)n,
	               (long)heads, (long)d, rope);
	if (rope) {
		reference_rotate_backward(batch, n, heads, d, 0, 1, q_expected, q_expected);
		reference_rotate_backward(batch, n, heads, d, 0, 1, k_expected, k_expected);
	}
	trial_expect_written(dq);
	trial_expect_written(dk);
	if (!trial_run(trial, OP_ROTATE_BACKWARD,
	               &(struct rotate_backward_args){batch, n, heads, d, rope, view_of(dq),
	                                              view_of(dk)}))
		return false;
	trial_check(trial, dq, "dq", q_expected, trial->gradient_tolerance);
	trial_check(trial, dk, "dk", k_expected, trial->gradient_tolerance);
	return true;
}

/* An attention's tensors, arguments and reference. */
struct attention_trial {
	struct attention_args args;
	struct reference_attention reference;
	int64_t rows;           /* B*T*H */
	double tolerance_scale; /* grows with the scores, whose rounding error moves every p */
	struct tensor *q, *k, *v, *own_score, *own_value, *gate;
	struct tensor *out, *out_ungated, *lse;
	double *expected, *expected_ungated, *expected_lse;
};

/* Often a length about which tiles of queries or keys end. */
static int64_t any_sequence(struct trial *trial)
{
	static const int64_t edges[] = {1, 63, 65, 127, 128, 129, 191, 193, 255, 256, 257};

	if (random_integer(&trial->random, 0, 3) == 0)
		return random_choice(&trial->random, edges, sizeof edges / sizeof *edges);
	return any_length(trial, 300);
}

/* Sizes, mask and options; `may_be_long`: now and then dozens of tiles, the last one cut. */
static void any_attention_shape(struct trial *trial, struct attention_args *a, bool may_be_long)
{
	struct random *random = &trial->random;
	const bool is_long = may_be_long && random_integer(random, 0, 79) == 0;

	a->batch = is_long ? 1 : random_integer(random, 1, 3);
	a->n_heads = is_long ? 1 : random_integer(random, 1, 4);
	a->q_heads = a->n_heads;
	a->d_head = is_long ? 64 : any_attention_head(trial);
	a->seq_len = a->kv_len = is_long ? 4095 : any_sequence(trial);
	a->mask = (enum mask)random_integer(random, MASK_CAUSAL, MASK_FULL);
	/* From the token alone to more than there are. */
	a->window = random_integer(random, 0, random_bool(random) ? 20 : 2 * a->seq_len);
	a->chunk = random_integer(random, 1, random_bool(random) ? 20 : 2 * a->seq_len);
	if (a->mask == MASK_CHUNK) {
		a->kv_len = ceil_div(a->seq_len, a->chunk);
		a->q_heads = any_divisor(trial, a->n_heads);
	}
	if (a->mask == MASK_FULL)
		a->kv_len = random_integer(random, 1, 300);
	a->scale = (float)(1 / sqrt((double)a->d_head));
}

/* The inputs; scores are of the order of `spread`. */
static void any_attention_inputs(struct trial *trial, struct attention_trial *x, double spread)
{
	struct attention_args *a = &x->args;
	struct random *random = &trial->random;
	bool own = a->mask == MASK_CHUNK || random_integer(random, 0, 4) == 0;
	bool gate = random_bool(random);

	x->q = trial_input(trial, a->batch, a->seq_len, a->q_heads, a->d_head, spread);
	x->k = trial_input(trial, a->batch, a->kv_len, a->n_heads, a->d_head, 1);
	x->v = trial_input(trial, a->batch, a->kv_len, a->n_heads, a->d_head, 1);
	if (own) {
		x->own_score = trial_flat_input(trial, DTYPE_F32, a->batch * a->seq_len, a->n_heads,
		                                spread);
		x->own_value = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_head, 1);
	}
	if (gate)
		x->gate = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_head, 2);
	trial_describe(trial,
	               "%s mask, B %ld, T %ld, keys %ld, H %ld (q %ld), d %ld, window %ld, "
	               "chunk %ld, own %d, gate %d, scores %.0f",
	               mask_name(a->mask), (long)a->batch, (long)a->seq_len, (long)a->kv_len,
	               (long)a->n_heads, (long)a->q_heads, (long)a->d_head, (long)a->window,
	               (long)a->chunk, own, gate, spread);
}

static void attention_reference(struct attention_trial *x)
{
	const struct attention_args *a = &x->args;

	x->reference = (struct reference_attention){.batch = a->batch,
	                                            .n_heads = a->n_heads,
	                                            .q_heads = a->q_heads,
	                                            .d_head = a->d_head,
	                                            .seq_len = a->seq_len,
	                                            .kv_len = a->kv_len,
	                                            .mask = a->mask,
	                                            .window = a->window,
	                                            .chunk = a->chunk,
	                                            .scale = a->scale,
	                                            .q = values_of(x->q),
	                                            .k = values_of(x->k),
	                                            .v = values_of(x->v),
	                                            .own_score = values_of(x->own_score),
	                                            .own_value = values_of(x->own_value),
	                                            .gate = values_of(x->gate)};
}

/* The reference's lse is [B, T, H], the kernels' [B, H, T]. */
static double *transposed_lse(struct trial *trial, const struct attention_args *a,
                              const double *lse)
{
	double *to = trial_doubles(trial, a->batch * a->seq_len * a->n_heads);

	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t t = 0; t < a->seq_len; t++)
			for (int64_t h = 0; h < a->n_heads; h++)
				to[(b * a->n_heads + h) * a->seq_len + t] =
				        lse[(b * a->seq_len + t) * a->n_heads + h];
	return to;
}

/* Makes everything that a forward needs; `train`: with all that a backward reads. */
static struct attention_trial new_attention(struct trial *trial, bool train)
{
	struct attention_trial x = {0};
	struct attention_args *a = &x.args;
	/* Mostly ordinary scores; sometimes ones that overflow a naive exponential. */
	double spread = random_integer(&trial->random, 0, 4) == 0 ? 40 : 1;
	bool want_lse = train || random_bool(&trial->random);

	any_attention_shape(trial, a, !train);
	any_attention_inputs(trial, &x, spread);
	bool want_ungated = random_bool(&trial->random) || (train && x.gate);
	x.tolerance_scale = spread > 1 ? 5 : 1;
	x.rows = a->batch * a->seq_len * a->n_heads;
	x.out = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	if (want_ungated)
		x.out_ungated = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	if (want_lse)
		x.lse = trial_flat_output(trial, DTYPE_F32, a->batch * a->n_heads, a->seq_len);
	a->q = view_of(x.q);
	a->k = view_of(x.k);
	a->v = view_of(x.v);
	a->own_score = data_of(x.own_score);
	a->own_value = view_of(x.own_value);
	a->gate = view_of(x.gate);
	a->out = view_of(x.out);
	a->out_ungated = view_of(x.out_ungated);
	a->lse = data_of(x.lse);
	attention_reference(&x);
	x.expected = trial_doubles(trial, x.rows * a->d_head);
	x.expected_ungated = trial_doubles(trial, x.rows * a->d_head);
	x.expected_lse = trial_doubles(trial, x.rows);
	return x;
}

/* Runs the forward and checks its outputs, which thereby become inputs. */
static bool run_attention(struct trial *trial, struct attention_trial *x)
{
	double tolerance = trial->tolerance * x->tolerance_scale;

	if (reference_attention_forward(&x->reference, 0, NULL, x->expected, x->expected_ungated,
	                                x->expected_lse) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_ATTENTION, &x->args))
		return false;
	trial_check(trial, x->out, "out", x->expected, tolerance);
	if (x->out_ungated)
		trial_check(trial, x->out_ungated, "out_ungated", x->expected_ungated, tolerance);
	if (x->lse)
		trial_check(trial, x->lse, "lse", transposed_lse(trial, &x->args, x->expected_lse),
		            tolerance);
	return true;
}

static bool attention_case(struct trial *trial)
{
	struct attention_trial x = new_attention(trial, false);

	return run_attention(trial, &x);
}

static bool attention_backward_case(struct trial *trial)
{
	struct attention_trial x = new_attention(trial, true);
	const struct attention_args *a = &x.args;
	int64_t n_out = x.rows * a->d_head, n_kv = a->batch * a->kv_len * a->n_heads * a->d_head;
	int64_t n_q = a->batch * a->seq_len * a->q_heads * a->d_head;

	if (!run_attention(trial, &x))
		return false;
	struct tensor *dout = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_head, 1);
	struct tensor *dq = trial_output(trial, a->batch, a->seq_len, a->q_heads, a->d_head);
	struct tensor *dk = trial_output(trial, a->batch, a->kv_len, a->n_heads, a->d_head);
	struct tensor *dv = trial_output(trial, a->batch, a->kv_len, a->n_heads, a->d_head);
	struct tensor *dgate = NULL, *down_score = NULL, *down_value = NULL;
	if (x.gate)
		dgate = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	if (x.own_score) {
		down_score = trial_flat_output(trial, DTYPE_F32, a->batch * a->seq_len, a->n_heads);
		down_value = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	}
	struct reference_attention_grads grads = {
	        trial_doubles(trial, n_q),    trial_doubles(trial, n_kv),
	        trial_doubles(trial, n_kv),   trial_doubles(trial, n_out),
	        trial_doubles(trial, x.rows), trial_doubles(trial, n_out)};
	if (reference_attention_backward(&x.reference, dout->values, &grads) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_ATTENTION_BACKWARD,
	               &(struct attention_backward_args){x.args, view_of(dout), view_of(dq),
	                                                 view_of(dk), view_of(dv), view_of(dgate),
	                                                 data_of(down_score), view_of(down_value)}))
		return false;
	double tolerance = trial->gradient_tolerance * x.tolerance_scale;
	/* dS = P (dP - delta) where one key has all the weight; dP is a sum over d. */
	trial->floor = 0.1 * x.tolerance_scale;
	trial_check(trial, dq, "dq", grads.dq, tolerance);
	trial_check(trial, dk, "dk", grads.dk, tolerance);
	trial_check(trial, dv, "dv", grads.dv, tolerance);
	if (x.gate)
		trial_check(trial, dgate, "dgate", grads.dgate, tolerance);
	if (x.own_score) {
		trial_check(trial, down_value, "down_value", grads.down_value, tolerance);
		trial->floor *= sqrt((double)a->d_head);
		trial_check(trial, down_score, "down_score", grads.down_score, tolerance);
	}
	return true;
}

/* A cache [B, slots, H, d] of which only the slots that `seen` marks hold anything; with gaps
 * between its rows, or `by_head`: as layers lay it out. */
static struct tensor *any_cache(struct trial *trial, bool by_head, int64_t batch, int64_t slots,
                                int64_t heads, int64_t d, const bool *seen)
{
	int64_t row = heads * d;
	double *values = random_doubles(&trial->random, batch * slots * row, 1);
	struct tensor *cache;

	for (int64_t b = 0; b < batch; b++)
		for (int64_t s = 0; s < slots; s++)
			for (int64_t i = 0; !seen[s] && i < row; i++)
				values[(b * slots + s) * row + i] = NAN;
	cache = by_head ? trial_by_head_values(trial, batch, slots, heads, d, values)
	                : trial_input_values(trial, batch, slots, heads, d, values);
	free(values);
	return cache;
}

/* The cache's values with `rows` [B, H, d] in one slot. */
static double *cache_after(struct trial *trial, const struct tensor *cache, int64_t slot,
                           const double *rows)
{
	int64_t row = cache->heads * cache->width;
	double *after = copy_of(trial, cache->batch * cache->tokens * row, cache->values);

	for (int64_t b = 0; b < cache->batch; b++)
		memcpy(after + (b * cache->tokens + slot) * row, rows + b * row,
		       (size_t)row * sizeof *after);
	return after;
}

/* An int32 that only the device knows. */
static struct tensor *any_position(struct trial *trial, int64_t position)
{
	double value = (double)position;

	return trial_flat_values(trial, DTYPE_I32, 1, 1, &value);
}

enum { MAX_SLOTS = 3100 };

/* Where a step is: anywhere, or at a cache's first token. */
static int64_t any_position_below(struct trial *trial, int64_t longest)
{
	return random_integer(&trial->random, 0, 9) == 0 ? 0 : any_length(trial, longest) - 1;
}

/* Sizes of a step; position and cache are apart. */
struct step_shape {
	int64_t batch, heads, d, window, slots, position;
	bool rope, by_head;
};

static struct step_shape any_step_shape(struct trial *trial)
{
	struct random *random = &trial->random;
	struct step_shape s = {.batch = random_integer(random, 1, 5),
	                       .heads = random_integer(random, 1, 4),
	                       .d = any_head(trial),
	                       .window = -1,
	                       .rope = random_bool(random),
	                       .by_head = random_bool(random)};

	int64_t longest = 300;
	/* Now and then more heads than a device can have blocks, or a long cache of few. */
	switch (random_integer(random, 0, 19)) {
	case 0:
		s.heads = random_integer(random, 700, 900) / s.batch;
		longest = 3;
		break;
	case 1:
	case 2:
	case 3:
		s.batch = 1;
		s.heads = random_integer(random, 1, 2);
		longest = 1500;
	}
	s.position = any_position_below(trial, longest);
	s.slots = s.position + 1 + random_integer(random, 0, longest);
	if (random_bool(random)) {
		s.window = random_integer(random, 0, longest);
		s.slots = s.window + 1 + random_integer(random, 0, 9);
	}
	/* The slot after the ring's last is its first. */
	if (s.window >= 0 && random_integer(random, 0, 2) == 0)
		s.position = s.slots * random_integer(random, 1, 3) + random_integer(random, -1, 1);
	return s;
}

static bool attention_step_case(struct trial *trial)
{
	const struct step_shape shape = any_step_shape(trial);
	const int64_t batch = shape.batch, heads = shape.heads, d = shape.d, window = shape.window;
	const int64_t slots = shape.slots, position = shape.position;
	const int64_t n = window >= 0 ? smaller(window, position) : position;
	const bool rope = shape.rope;
	bool seen[MAX_SLOTS] = {false};

	for (int64_t i = 1; i <= n; i++)
		seen[(position - i) % slots] = true;
	trial_describe(
	        trial,
	        "B %ld, H %ld, d %ld, position %ld, window %ld, %ld slots, rope %d, by head %d",
	        (long)batch, (long)heads, (long)d, (long)position, (long)window, (long)slots, rope,
	        shape.by_head);
	struct tensor *q = trial_input(trial, batch, 1, heads, d, 2);
	struct tensor *k = trial_input(trial, batch, 1, heads, d, 1);
	struct tensor *v = trial_input(trial, batch, 1, heads, d, 1);
	struct tensor *k_cache = any_cache(trial, shape.by_head, batch, slots, heads, d, seen);
	struct tensor *v_cache = any_cache(trial, shape.by_head, batch, slots, heads, d, seen);
	struct tensor *p = any_position(trial, position);
	struct tensor *out = trial_output(trial, batch, 1, heads, d);
	float scale = (float)(1 / sqrt((double)d));
	double *expected = trial_doubles(trial, batch * heads * d);
	double *stored = trial_doubles(trial, batch * heads * d);
	struct reference_attention_step reference = {
	        batch,    heads,     d,         slots,     window,          rope,           scale,
	        position, q->values, k->values, v->values, k_cache->values, v_cache->values};
	if (reference_attention_step(&reference, expected, stored) != STATUS_OK)
		return false;
	double *k_after = cache_after(trial, k_cache, position % slots, stored);
	double *v_after = cache_after(trial, v_cache, position % slots, v->values);
	trial_expect_written(k_cache);
	trial_expect_written(v_cache);
	struct attention_step_args args = {batch,
	                                   heads,
	                                   d,
	                                   slots,
	                                   window,
	                                   rope,
	                                   scale,
	                                   data_of(p),
	                                   random_bool(&trial->random) ? position : -1,
	                                   view_of(q),
	                                   view_of(k),
	                                   view_of(v),
	                                   view_of(k_cache),
	                                   view_of(v_cache),
	                                   view_of(out)};
	if (!trial_run(trial, OP_ATTENTION_STEP, &args))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	trial_check(trial, k_cache, "k_cache", k_after, trial->tolerance);
	trial_check(trial, v_cache, "v_cache", v_after, trial->tolerance);
	return true;
}

/* A RAT scan's tensors, arguments and reference. */
struct rat_trial {
	struct rat_scan_args args;
	struct reference_rat_scan reference;
	int64_t rows, width, n_q, chunks; /* B*T*H, H*d, B*T*groups*d, C */
	struct tensor *v, *gate, *q, *k, *gate_bias;
	struct tensor *v_scan, *own_score, *q_out, *k_chunk, *v_chunk, *k_state, *v_state;
};

static void any_rat_inputs(struct trial *trial, struct rat_trial *x, bool train)
{
	struct rat_scan_args *a = &x->args;
	struct random *random = &trial->random;

	a->batch = random_integer(random, 1, 3);
	a->seq_len = any_length(trial, 200);
	a->n_heads = random_integer(random, 1, 6);
	/* A few are long, so that kernels cut chunks, or wide. */
	if (!train && random_integer(random, 0, 5) == 0) {
		a->seq_len = random_integer(random, 1000, 6000);
		a->n_heads = random_integer(random, 1, 2);
	} else if (!train && random_integer(random, 0, 5) == 0) {
		a->seq_len = any_length(trial, 30);
		a->n_heads = random_integer(random, 16, 40);
	}
	a->groups = any_divisor(trial, a->n_heads);
	a->d_head = any_head(trial);
	a->chunk = random_integer(random, 1, random_bool(random) ? 20 : 2 * a->seq_len);
	a->rope = random_integer(random, 0, 3) > 0;
	a->scale = (float)(1 / sqrt((double)a->d_head));
	x->width = a->n_heads * a->d_head;
	x->rows = a->batch * a->seq_len * a->n_heads;
	x->n_q = a->batch * a->seq_len * a->groups * a->d_head;
	x->chunks = ceil_div(a->seq_len, a->chunk);
	x->v = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_head, 1);
	x->gate = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_head, 2);
	x->q = trial_input(trial, a->batch, a->seq_len, a->groups, a->d_head, 1);
	x->k = trial_input(trial, a->batch, a->seq_len, a->groups, a->d_head, 1);
	x->gate_bias = trial_flat_input(trial, DTYPE_F32, 1, x->width, 3);
	trial_describe(trial, "B %ld, T %ld, H %ld, groups %ld, d %ld, chunk %ld, rope %d",
	               (long)a->batch, (long)a->seq_len, (long)a->n_heads, (long)a->groups,
	               (long)a->d_head, (long)a->chunk, a->rope);
}

/* `train`: q_out apart from q, since the backward reads the unrotated one. */
static struct rat_trial new_rat(struct trial *trial, bool train)
{
	struct rat_trial x = {0};
	struct rat_scan_args *a = &x.args;
	bool want_state = random_bool(&trial->random);

	any_rat_inputs(trial, &x, train);
	x.reference = (struct reference_rat_scan){
	        a->batch,    a->seq_len,  a->n_heads,         a->groups,   a->d_head,
	        a->chunk,    a->rope,     a->scale,           x.v->values, x.gate->values,
	        x.q->values, x.k->values, x.gate_bias->values};
	x.v_scan = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	x.own_score = trial_flat_output(trial, DTYPE_F32, a->batch * a->seq_len, a->n_heads);
	x.q_out = x.q;
	if (train || random_bool(&trial->random))
		x.q_out = trial_output(trial, a->batch, a->seq_len, a->groups, a->d_head);
	x.k_chunk = trial_output(trial, a->batch, x.chunks, a->n_heads, a->d_head);
	x.v_chunk = trial_output(trial, a->batch, x.chunks, a->n_heads, a->d_head);
	if (want_state) {
		x.k_state = trial_flat_output(trial, DTYPE_F32, a->batch, x.width);
		x.v_state = trial_flat_output(trial, DTYPE_F32, a->batch, x.width);
	}
	a->v = view_of(x.v);
	a->gate = view_of(x.gate);
	a->q = view_of(x.q);
	a->k = view_of(x.k);
	a->gate_bias = data_of(x.gate_bias);
	a->v_scan = view_of(x.v_scan);
	a->own_score = data_of(x.own_score);
	a->q_out = view_of(x.q_out);
	a->k_chunk = view_of(x.k_chunk);
	a->v_chunk = view_of(x.v_chunk);
	a->k_state = data_of(x.k_state);
	a->v_state = data_of(x.v_state);
	return x;
}

static bool run_rat(struct trial *trial, struct rat_trial *x)
{
	int64_t d = x->args.d_head, batch = x->args.batch;
	struct reference_rat_scan_out expected = {
	        .v_scan = trial_doubles(trial, x->rows * d),
	        .own_score = trial_doubles(trial, x->rows),
	        .q_out = trial_doubles(trial, x->n_q),
	        .k_chunk = trial_doubles(trial, batch * x->chunks * x->width),
	        .v_chunk = trial_doubles(trial, batch * x->chunks * x->width),
	        .k_state = trial_doubles(trial, batch * x->width),
	        .v_state = trial_doubles(trial, batch * x->width)};

	if (reference_rat_scan_forward(&x->reference, &expected) != STATUS_OK)
		return false;
	if (x->q_out == x->q)
		trial_expect_written(x->q);
	if (!trial_run(trial, OP_RAT_SCAN, &x->args))
		return false;
	trial_check(trial, x->v_scan, "v_scan", expected.v_scan, trial->tolerance);
	trial_check(trial, x->own_score, "own_score", expected.own_score, trial->tolerance);
	trial_check(trial, x->q_out, "q_out", expected.q_out, trial->tolerance);
	trial_check(trial, x->k_chunk, "k_chunk", expected.k_chunk, trial->tolerance);
	trial_check(trial, x->v_chunk, "v_chunk", expected.v_chunk, trial->tolerance);
	if (x->k_state) {
		trial_check(trial, x->k_state, "k_state", expected.k_state, trial->tolerance);
		trial_check(trial, x->v_state, "v_state", expected.v_state, trial->tolerance);
	}
	return true;
}

static bool rat_scan_case(struct trial *trial)
{
	struct rat_trial x = new_rat(trial, false);

	return run_rat(trial, &x);
}

static bool rat_scan_backward_case(struct trial *trial)
{
	struct rat_trial x = new_rat(trial, true);
	const struct rat_scan_args *a = &x.args;

	if (!run_rat(trial, &x))
		return false;
	struct tensor *dv_scan = trial_input(trial, a->batch, a->seq_len, a->n_heads, a->d_head, 1);
	struct tensor *down =
	        trial_flat_input(trial, DTYPE_F32, a->batch * a->seq_len, a->n_heads, 1);
	struct tensor *dq_out = trial_input(trial, a->batch, a->seq_len, a->groups, a->d_head, 1);
	struct tensor *dk_chunk = trial_input(trial, a->batch, x.chunks, a->n_heads, a->d_head, 1);
	struct tensor *dv_chunk = trial_input(trial, a->batch, x.chunks, a->n_heads, a->d_head, 1);
	struct tensor *dv = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	struct tensor *dgate = trial_output(trial, a->batch, a->seq_len, a->n_heads, a->d_head);
	struct tensor *dq = trial_output(trial, a->batch, a->seq_len, a->groups, a->d_head);
	struct tensor *dk = trial_output(trial, a->batch, a->seq_len, a->groups, a->d_head);
	struct tensor *dbias = trial_flat_output(trial, DTYPE_F32, 1, x.width);
	struct reference_rat_scan_grads grads = {dv_scan->values,
	                                         down->values,
	                                         dq_out->values,
	                                         dk_chunk->values,
	                                         dv_chunk->values,
	                                         trial_doubles(trial, x.rows * a->d_head),
	                                         trial_doubles(trial, x.rows * a->d_head),
	                                         trial_doubles(trial, x.n_q),
	                                         trial_doubles(trial, x.n_q),
	                                         trial_doubles(trial, x.width)};
	if (reference_rat_scan_backward(&x.reference, &grads) != STATUS_OK)
		return false;
	if (!trial_run(trial, OP_RAT_SCAN_BACKWARD,
	               &(struct rat_scan_backward_args){
	                       x.args, view_of(dv_scan), data_of(down), view_of(dq_out),
	                       view_of(dk_chunk), view_of(dv_chunk), view_of(dv), view_of(dgate),
	                       view_of(dq), view_of(dk), data_of(dbias)}))
		return false;
	trial_check(trial, dv, "dv", grads.dv, trial->gradient_tolerance);
	trial_check(trial, dgate, "dgate", grads.dgate, trial->gradient_tolerance);
	trial_check(trial, dq, "dq", grads.dq, trial->gradient_tolerance);
	trial_check(trial, dk, "dk", grads.dk, trial->gradient_tolerance);
	trial_check(trial, dbias, "dgate_bias", grads.dgate_bias, trial->gradient_tolerance);
	return true;
}

/* A running state [B, D]: NaN before the first token of a chunk, which must not read it. */
static struct tensor *any_state(struct trial *trial, int64_t batch, int64_t width, bool first)
{
	double *values = random_doubles(&trial->random, batch * width, 1);
	struct tensor *state;

	for (int64_t i = 0; first && i < batch * width; i++)
		values[i] = NAN;
	state = trial_flat_values(trial, DTYPE_F32, batch, width, values);
	free(values);
	return state;
}

/* What the step leaves in the chunks: the running pair, if its chunk has ended. */
static double *chunks_after(struct trial *trial, const struct reference_rat_step *s,
                            const struct tensor *cache, const double *state, bool rotate)
{
	double *stored = copy_of(trial, s->batch * s->n_heads * s->d_head, state);

	if (s->position % s->chunk != s->chunk - 1)
		return copy_of(trial, s->batch * s->chunk_slots * s->n_heads * s->d_head,
		               cache->values);
	if (rotate && s->rope)
		reference_rotate(s->batch, 1, s->n_heads, s->d_head, s->position, s->chunk, stored,
		                 stored);
	return cache_after(trial, cache, s->position / s->chunk, stored);
}

/* Sizes of a step; everything else is left to be filled. */
static struct reference_rat_step any_rat_step(struct trial *trial)
{
	struct random *random = &trial->random;
	struct reference_rat_step s = {.batch = random_integer(random, 1, 5),
	                               .n_heads = random_integer(random, 1, 6),
	                               .d_head = any_head(trial),
	                               .chunk = random_integer(random, 1, 20),
	                               .rope = random_bool(random),
	                               .position = any_position_below(trial, 400)};

	/* Now and then more heads than a device can have blocks, or many chunks of few. */
	switch (random_integer(random, 0, 19)) {
	case 0:
		s.n_heads = random_integer(random, 700, 900) / s.batch;
		s.position = any_position_below(trial, 3);
		break;
	case 1:
	case 2:
	case 3:
		s.batch = 1;
		s.n_heads = random_integer(random, 1, 2);
		s.chunk = random_integer(random, 2, 4);
		s.position = any_position_below(trial, 3000);
	}

	s.groups = any_divisor(trial, s.n_heads);
	s.scale = (float)(1 / sqrt((double)s.d_head));
	if (random_integer(random, 0, 2) == 0) /* the end of a chunk */
		s.position = (s.position / s.chunk + 1) * s.chunk - 1;
	if (random_integer(random, 0, 2) == 0) /* its beginning */
		s.position = s.position / s.chunk * s.chunk;
	s.chunk_slots = s.position / s.chunk + 1 + random_integer(random, 0, 9);
	trial_describe(trial, "B %ld, H %ld, groups %ld, d %ld, chunk %ld, position %ld, rope %d",
	               (long)s.batch, (long)s.n_heads, (long)s.groups, (long)s.d_head,
	               (long)s.chunk, (long)s.position, s.rope);
	return s;
}

static bool rat_step_case(struct trial *trial)
{
	struct reference_rat_step s = any_rat_step(trial);
	int64_t width = s.n_heads * s.d_head, n = s.batch * width;
	bool seen[MAX_SLOTS] = {false}, first = s.position % s.chunk == 0;
	bool by_head = random_bool(&trial->random);

	for (int64_t c = 0; c < s.position / s.chunk; c++)
		seen[c] = true;
	struct tensor *z = trial_input(trial, s.batch, 1, s.n_heads, s.d_head, 2);
	struct tensor *v = trial_input(trial, s.batch, 1, s.n_heads, s.d_head, 1);
	struct tensor *gate = trial_input(trial, s.batch, 1, s.n_heads, s.d_head, 2);
	struct tensor *q = trial_input(trial, s.batch, 1, s.groups, s.d_head, 2);
	struct tensor *k = trial_input(trial, s.batch, 1, s.groups, s.d_head, 1);
	struct tensor *bias = trial_flat_input(trial, DTYPE_F32, 1, width, 2);
	struct tensor *k_state = any_state(trial, s.batch, width, first);
	struct tensor *v_state = any_state(trial, s.batch, width, first);
	struct tensor *k_chunk =
	        any_cache(trial, by_head, s.batch, s.chunk_slots, s.n_heads, s.d_head, seen);
	struct tensor *v_chunk =
	        any_cache(trial, by_head, s.batch, s.chunk_slots, s.n_heads, s.d_head, seen);
	struct tensor *position = any_position(trial, s.position);
	struct tensor *out = trial_output(trial, s.batch, 1, s.n_heads, s.d_head);
	double *expected = trial_doubles(trial, n), *kt = trial_doubles(trial, n);
	double *vt = trial_doubles(trial, n);

	s.z = z->values;
	s.v = v->values;
	s.gate = gate->values;
	s.q = q->values;
	s.k = k->values;
	s.gate_bias = bias->values;
	s.k_state = k_state->values;
	s.v_state = v_state->values;
	s.k_chunk = k_chunk->values;
	s.v_chunk = v_chunk->values;
	if (reference_rat_step(&s, expected, kt, vt) != STATUS_OK)
		return false;
	double *k_after = chunks_after(trial, &s, k_chunk, kt, true);
	double *v_after = chunks_after(trial, &s, v_chunk, vt, false);
	trial_expect_written(k_state);
	trial_expect_written(v_state);
	trial_expect_written(k_chunk);
	trial_expect_written(v_chunk);
	struct rat_step_args args = {s.batch,
	                             s.n_heads,
	                             s.groups,
	                             s.d_head,
	                             s.chunk,
	                             s.chunk_slots,
	                             s.rope,
	                             (float)s.scale,
	                             data_of(position),
	                             random_bool(&trial->random) ? s.position : -1,
	                             view_of(z),
	                             view_of(v),
	                             view_of(gate),
	                             view_of(q),
	                             view_of(k),
	                             data_of(bias),
	                             data_of(k_state),
	                             data_of(v_state),
	                             view_of(k_chunk),
	                             view_of(v_chunk),
	                             view_of(out)};
	if (!trial_run(trial, OP_RAT_STEP, &args))
		return false;
	trial_check(trial, out, "out", expected, trial->tolerance);
	trial_check(trial, k_state, "k_state", kt, trial->tolerance);
	trial_check(trial, v_state, "v_state", vt, trial->tolerance);
	trial_check(trial, k_chunk, "k_chunk", k_after, trial->tolerance);
	trial_check(trial, v_chunk, "v_chunk", v_after, trial->tolerance);
	return true;
}

const struct operation_test attention_tests[] = {
        {OP_ROTATE, 50, rotate_case},
        {OP_ROTATE_BACKWARD, 40, rotate_backward_case},
        {OP_ATTENTION, 150, attention_case},
        {OP_ATTENTION_BACKWARD, 150, attention_backward_case},
        {OP_ATTENTION_STEP, 80, attention_step_case},
        {OP_RAT_SCAN, 100, rat_scan_case},
        {OP_RAT_SCAN_BACKWARD, 100, rat_scan_backward_case},
        {OP_RAT_STEP, 80, rat_step_case},
        {0},
};
