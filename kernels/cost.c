/*
 * The work that each operation must do, whoever does it: what a roofline is drawn from.
 *
 * FLOPs: a multiply-add is 2.
 *   Products: 2 N K M forward, twice that backward (dx and dweight).
 *   Mixing (attention, recurrences): the multiply-adds of the recurrence or of the visible pairs
 *   alone; softmax, gates, decays and rotations inside are not counted. Backward 2.5 times the
 *   forward: two products become five, one of them recomputed.
 *   Elementwise operations: the FLOPs per element named at each, an exponential, logarithm, erf or
 *   division being one; backward twice that.
 * Bytes: every input read once, every output written once, weights once, caches as far as the step
 * must read and write them. Scratch that the arguments call so is not counted.
 */
#include "kernels/kernels.h"

/* Chunk length that is counted where the kernel may pick its own. */
enum { DEFAULT_CHUNK = 64 };

static const double mixing_backward = 2.5, product_backward = 2, elementwise_backward = 2;

enum {
	NORM_FLOPS = 4,            /* square, add; times rstd, times weight */
	ROTATE_FLOPS = 3,          /* 4 multiplications and 2 additions for two elements */
	SILU_GATE_FLOPS = 5,       /* exp, add, divide; times the gate, times x */
	LOG_DECAY_FLOPS = 5,       /* bias; exp, add, log; divide */
	SILU_FLOPS = 4,            /* exp, add, divide; times x */
	TIME_STEP_FLOPS = 5,       /* bias; exp, add, log; times the rate */
	FORGET_GATE_FLOPS = 12,    /* exp, add, divide; times 1-b, subtract, log; silu; times 1-f */
	SKIP_FLOPS = 2,            /* times its weight, add */
	GELU_FLOPS = 5,            /* divide, erf, add, halve, times x */
	SOFTMAX_LOSS_FLOPS = 4,    /* maximum, subtract, exp, add */
	SOFTMAX_GRADIENT_FLOPS = 1 /* divide by the sum */
};

/* `act` is the bytes of an activation element. */
typedef struct cost cost_function(double act, const void *args);

static const double fp32 = sizeof(float), int32 = sizeof(int32_t);

static double product(double n, double k, double m)
{
	return 2 * n * k * m;
}

static struct cost norm_linear_cost(double act, const void *args)
{
	const struct norm_linear_args *a = args;
	double n = (double)a->n_tokens, k = (double)a->d_in, m = (double)a->d_out;
	bool norm = a->norm_weight != NULL;

	return (struct cost){
	        .flops = product(n, k, m) + (norm ? NORM_FLOPS * n * k : 0),
	        .bytes_read = act * (n * k + m * k) + (norm ? fp32 * k : 0),
	        .bytes_written =
	                act * (n * m + (norm ? n * k : 0)) + (norm && a->rstd ? fp32 * n : 0),
	};
}

static struct cost norm_linear_backward_cost(double act, const void *args)
{
	const struct norm_linear_backward_args *a = args;
	double n = (double)a->n_tokens, k = (double)a->d_in, m = (double)a->d_out;
	bool norm = a->norm_weight != NULL;
	double residual = a->dresidual ? n * k : 0;

	return (struct cost){
	        .flops = product_backward * product(n, k, m) + residual +
	                 (norm ? elementwise_backward * NORM_FLOPS * n * k : 0),
	        .bytes_read = act * (n * k + n * m + m * k + residual) +
	                      (norm ? act * n * k + fp32 * (n + k) : 0),
	        .bytes_written = act * n * k + fp32 * (m * k + (norm ? k : 0)),
	};
}

static struct cost linear_residual_cost(double act, const void *args)
{
	const struct linear_residual_args *a = args;
	double n = (double)a->n_tokens, k = (double)a->d_in, m = (double)a->d_out;
	double residual = a->residual ? n * m : 0;

	return (struct cost){
	        .flops = product(n, k, m) + residual,
	        .bytes_read = act * (n * k + m * k + residual),
	        .bytes_written = act * n * m,
	};
}

static struct cost linear_residual_backward_cost(double act, const void *args)
{
	const struct linear_residual_backward_args *a = args;
	double n = (double)a->n_tokens, k = (double)a->d_in, m = (double)a->d_out;

	return (struct cost){
	        .flops = product_backward * product(n, k, m),
	        .bytes_read = act * (n * k + n * m + m * k),
	        .bytes_written = act * n * k + fp32 * m * k,
	};
}

static bool same_place(const struct view *a, const struct view *b)
{
	return a->data == b->data && a->token == b->token && a->head == b->head &&
	       a->batch == b->batch;
}

/* Rows that rotate moves from one view to another: none if there is nothing to do. */
static double moved(const struct view *from, const struct view *to, bool rotated, double tokens)
{
	return to->data && (rotated || !same_place(from, to)) ? tokens : 0;
}

static struct cost rotate_cost(double act, const void *args)
{
	const struct rotate_args *a = args;
	double width = (double)(a->batch * a->n_heads * a->d_head);
	double cached = (double)(a->seq_len - a->first_kv);
	double q = moved(&a->q, &a->q_out, a->rope, (double)a->seq_len) * width;
	double k = moved(&a->k, &a->k_out, a->rope, cached) * width;
	double v = moved(&a->v, &a->v_out, false, cached) * width;

	return (struct cost){
	        .flops = a->rope ? ROTATE_FLOPS * (q + k) : 0,
	        .bytes_read = act * (q + k + v),
	        .bytes_written = act * (q + k + v),
	};
}

static struct cost rotate_backward_cost(double act, const void *args)
{
	const struct rotate_backward_args *a = args;
	double count = a->rope ? 2 * (double)(a->batch * a->seq_len * a->n_heads * a->d_head) : 0;

	return (struct cost){ROTATE_FLOPS * count, act * count, act * count};
}

/* sum over t < n of min(t + 1, limit). */
static double triangle(int64_t n, int64_t limit)
{
	double rising = (double)(n < limit ? n : limit);

	return rising * (rising + 1) / 2 + ((double)n - rising) * (double)limit;
}

/*
 * Keys visible to all queries of one sequence and head, the query's own token included where it has
 * a score of its own: RAT's query t sees t/chunk chunks and itself.
 */
static double visible_pairs(const struct attention_args *a)
{
	int64_t t = a->seq_len, kv = a->kv_len, whole, rest;
	double own = a->own_score ? (double)t : 0;

	switch (a->mask) {
	case MASK_CAUSAL:
		return own + triangle(t, kv);
	case MASK_WINDOW:
		return own + triangle(t, a->window < kv ? a->window + 1 : kv);
	case MASK_CHUNK:
		whole = t / a->chunk;
		rest = t % a->chunk;
		return own + (double)a->chunk * (double)whole * (double)(whole - 1) / 2 +
		       (double)rest * (double)whole;
	case MASK_FULL:
		break;
	}
	return own + (double)t * (double)kv;
}

/* q k^T and p v: 4 d FLOPs for each visible pair. */
static double attention_flops(const struct attention_args *a)
{
	return 4 * (double)a->d_head * (double)(a->batch * a->n_heads) * visible_pairs(a);
}

/* Elements of the [B, T, H, d] tensors of an attention, and of its [B, T, H] scores. */
static double attention_rows(const struct attention_args *a)
{
	return (double)(a->batch * a->seq_len * a->n_heads);
}

static double attention_bytes_read(double act, const struct attention_args *a)
{
	double rows = attention_rows(a), d = (double)a->d_head;
	double q = (double)(a->batch * a->seq_len * a->q_heads) * d;
	double kv = 2 * (double)(a->batch * a->kv_len * a->n_heads) * d;
	double own = a->own_score ? rows * d : 0, gate = a->gate.data ? rows * d : 0;

	return act * (q + kv + own + gate) + (a->own_score ? fp32 * rows : 0);
}

static struct cost attention_cost(double act, const void *args)
{
	const struct attention_args *a = args;
	double rows = attention_rows(a), d = (double)a->d_head;

	return (struct cost){
	        .flops = attention_flops(a),
	        .bytes_read = attention_bytes_read(act, a),
	        .bytes_written =
	                act * rows * d * (a->out_ungated.data ? 2 : 1) + (a->lse ? fp32 * rows : 0),
	};
}

static struct cost attention_backward_cost(double act, const void *args)
{
	const struct attention_backward_args *b = args;
	const struct attention_args *a = &b->forward;
	double rows = attention_rows(a), d = (double)a->d_head;
	double inputs = attention_bytes_read(act, a);

	/* The gradients are as large as what they are gradients of. */
	return (struct cost){
	        .flops = mixing_backward * attention_flops(a),
	        .bytes_read = inputs + act * 2 * rows * d + fp32 * rows,
	        .bytes_written = inputs,
	};
}

/* The last position that the caches can hold, where the host does not know which it is. */
static int64_t step_position(int64_t hint, int64_t capacity)
{
	return hint >= 0 ? hint : capacity - 1;
}

/* The token's own key and value come from the projection; the others from the cache. */
static struct cost attention_step_cost(double act, const void *args)
{
	const struct attention_step_args *a = args;
	int64_t position = step_position(a->position_hint, a->kv_slots);
	int64_t others = a->window >= 0 && a->window < position ? a->window : position;
	double width = (double)(a->batch * a->n_heads * a->d_head);

	return (struct cost){
	        .flops = 4 * width * (double)(others + 1),
	        .bytes_read = act * width * (3 + 2 * (double)others) + int32,
	        .bytes_written = act * width * 3,
	};
}

/* h = g h + (1-g) x is two multiply-adds. */
static double gated_update_flops(double elements)
{
	return 4 * elements;
}

/* Elements of RAT's tensors: [B, T, H, d], [B, T, groups, d], [B, C, H, d], [B, T, H]. */
struct rat_sizes {
	double wide, grouped, chunks, scores, width;
};

static struct rat_sizes rat_scan_sizes(const struct rat_scan_args *a)
{
	double tokens = (double)(a->batch * a->seq_len), d = (double)a->d_head;
	double heads = (double)a->n_heads;
	int64_t n_chunks = (a->seq_len + a->chunk - 1) / a->chunk;

	return (struct rat_sizes){
	        .wide = tokens * heads * d,
	        .grouped = tokens * (double)a->groups * d,
	        .chunks = (double)(a->batch * n_chunks) * heads * d,
	        .scores = tokens * heads,
	        .width = heads * d,
	};
}

/* The own score's product is counted by the attention that uses it, as a visible pair. */
static struct cost rat_scan_cost(double act, const void *args)
{
	const struct rat_scan_args *a = args;
	struct rat_sizes s = rat_scan_sizes(a);
	double states = (double)((a->k_state != NULL) + (a->v_state != NULL));

	return (struct cost){
	        .flops = 2 * gated_update_flops(s.wide),
	        .bytes_read = act * (2 * s.wide + 2 * s.grouped) + fp32 * s.width,
	        .bytes_written = act * (s.wide + s.grouped + 2 * s.chunks) +
	                         fp32 * (s.scores + states * (double)a->batch * s.width),
	};
}

static struct cost rat_scan_backward_cost(double act, const void *args)
{
	const struct rat_scan_backward_args *b = args;
	struct rat_sizes s = rat_scan_sizes(&b->forward);

	return (struct cost){
	        .flops = mixing_backward * 2 * gated_update_flops(s.wide),
	        .bytes_read = act * (3 * s.wide + 3 * s.grouped + 2 * s.chunks) +
	                      fp32 * (s.scores + s.width),
	        .bytes_written = act * (2 * s.wide + 2 * s.grouped) + fp32 * s.width,
	};
}

/* The running pair is not read where a chunk begins, and is stored where one ends. */
static struct cost rat_step_cost(double act, const void *args)
{
	const struct rat_step_args *a = args;
	int64_t position = step_position(a->position_hint, a->chunk * a->chunk_slots);
	double width = (double)(a->batch * a->n_heads * a->d_head);
	double grouped = (double)(a->batch * a->groups * a->d_head);
	double chunks = (double)(position / a->chunk);
	double resumed = position % a->chunk != 0, stored = position % a->chunk == a->chunk - 1;

	return (struct cost){
	        .flops = 2 * gated_update_flops(width) + 4 * width * (chunks + 1),
	        .bytes_read = act * (3 * width + 2 * grouped + 2 * width * chunks) +
	                      fp32 * ((double)(a->n_heads * a->d_head) + 2 * width * resumed) +
	                      int32,
	        .bytes_written = act * width * (1 + 2 * stored) + fp32 * 2 * width,
	};
}

/* exp(gate) h + x is one multiply-add. */
static double recurrence_flops(enum gate_form form, double elements)
{
	return form == GATE_SIGMOID ? gated_update_flops(elements) : 2 * elements;
}

static struct cost recurrence_cost(double act, const void *args)
{
	const struct recurrence_args *a = args;
	double d = (double)a->d_model, state = (double)a->batch * d;
	double count = state * (double)a->seq_len;

	return (struct cost){
	        .flops = recurrence_flops(a->form, count),
	        .bytes_read = act * count * (a->z.data ? 3 : 2) +
	                      fp32 * ((a->gate_bias ? d : 0) + (a->h0 ? state : 0)),
	        .bytes_written =
	                act * count * (a->h.data ? 2 : 1) + (a->h_final ? fp32 * state : 0),
	};
}

/* Reads x, gate, z, the states and dout; writes dx, dgate, dz. */
static struct cost recurrence_backward_cost(double act, const void *args)
{
	const struct recurrence_backward_args *b = args;
	const struct recurrence_args *a = &b->forward;
	double d = (double)a->d_model, state = (double)a->batch * d;
	double count = state * (double)a->seq_len, z = a->z.data ? 1 : 0;
	double bias = a->gate_bias ? d : 0;

	return (struct cost){
	        .flops = mixing_backward * recurrence_flops(a->form, count),
	        .bytes_read = act * count * (4 + z) + fp32 * (bias + (a->h0 ? state : 0)),
	        .bytes_written = act * count * (2 + z) + fp32 * (bias + (b->dh0 ? state : 0)),
	};
}

static struct cost recurrence_step_cost(double act, const void *args)
{
	const struct recurrence_step_args *a = args;
	double d = (double)a->d_model, count = (double)a->batch * d;

	return (struct cost){
	        .flops = recurrence_flops(a->form, count),
	        .bytes_read =
	                act * count * (a->z.data ? 3 : 2) + fp32 * (count + (a->gate_bias ? d : 0)),
	        .bytes_written = act * count + fp32 * count,
	};
}

/*
 * FLOPs of one token and head of the plain recurrence: the rank-one update and the read, 2 d_k d_v
 * each; the delta rule also reads k S before; the bonus adds (q.(u*k)) v to the output.
 */
static double plain_state_flops(enum rule rule, double d_k, double d_v)
{
	return (rule == RULE_DELTA ? 6 : 4) * d_k * d_v +
	       (rule == RULE_BONUS ? 2 * (d_k + d_v) : 0);
}

/*
 * In chunks of n, to 4 d_k d_v between chunks come the n/2 pairs that a token sees within its own
 * (the bonus among them): 2 n (d_k + d_v) / 2. The delta rule is counted as its plain recurrence:
 * what a chunkwise form of it adds (a triangular solve) is the kernel's choice.
 */
static double matrix_recurrence_flops(const struct matrix_recurrence_args *a)
{
	double d_k = (double)a->d_k, d_v = (double)a->d_v;
	double tokens = (double)(a->batch * a->seq_len * a->n_heads);
	int64_t chunk = a->chunk == 0 ? DEFAULT_CHUNK : a->chunk;
	int64_t n = chunk < a->seq_len ? chunk : a->seq_len;

	if (chunk == 1 || a->rule == RULE_DELTA)
		return tokens * plain_state_flops(a->rule, d_k, d_v);
	return tokens * ((double)n * (d_k + d_v) + 4 * d_k * d_v);
}

/* Elements of log_decay for one token and head. */
static double decay_width(enum decay decay, double d_k)
{
	return decay == DECAY_DIAGONAL ? d_k : decay == DECAY_SCALAR ? 1 : 0;
}

/* Elements that one token and head brings: q, k, v, log_decay, beta. */
static double token_width(enum decay decay, enum rule rule, double d_k, double d_v)
{
	return 2 * d_k + d_v + decay_width(decay, d_k) + (rule == RULE_DELTA ? 1 : 0);
}

/* Whether all heads read the same rows. */
static bool is_shared(const struct view *v)
{
	return v->head == 0 && v->token > 0;
}

/* Elements of q and k that need not be read for each of the heads, per token and head. */
static double shared_width(const struct view *q, const struct view *k, double heads, double d_k)
{
	return (is_shared(q) + is_shared(k)) * d_k * (1 - 1 / heads);
}

static struct cost matrix_recurrence_cost(double act, const void *args)
{
	const struct matrix_recurrence_args *a = args;
	double d_k = (double)a->d_k, d_v = (double)a->d_v, heads = (double)a->n_heads;
	double tokens = (double)(a->batch * a->seq_len) * heads;
	double state = (double)a->batch * heads * d_k * d_v;
	double bonus = a->rule == RULE_BONUS ? heads * d_k : 0;

	return (struct cost){
	        .flops = matrix_recurrence_flops(a),
	        .bytes_read = act * tokens *
	                              (token_width(a->decay, a->rule, d_k, d_v) -
	                               shared_width(&a->q, &a->k, heads, d_k)) +
	                      fp32 * (bonus + (a->h0 ? state : 0)),
	        .bytes_written = act * tokens * d_v + (a->final_state ? fp32 * state : 0),
	};
}

/* Reads the inputs and dout; the gradients are as large as the inputs. */
static struct cost matrix_recurrence_backward_cost(double act, const void *args)
{
	const struct matrix_recurrence_backward_args *b = args;
	const struct matrix_recurrence_args *a = &b->forward;
	double d_k = (double)a->d_k, d_v = (double)a->d_v, heads = (double)a->n_heads;
	double tokens = (double)(a->batch * a->seq_len) * heads;
	double state = (double)a->batch * heads * d_k * d_v;
	double bonus = a->rule == RULE_BONUS ? heads * d_k : 0;
	double inputs = tokens * token_width(a->decay, a->rule, d_k, d_v);
	double shared = tokens * shared_width(&a->q, &a->k, heads, d_k);

	return (struct cost){
	        .flops = mixing_backward * matrix_recurrence_flops(a),
	        .bytes_read = act * (inputs - shared + tokens * d_v) +
	                      fp32 * (bonus + (a->h0 ? state : 0)),
	        .bytes_written = act * inputs + fp32 * (bonus + (b->dh0 ? state : 0)),
	};
}

static struct cost matrix_recurrence_step_cost(double act, const void *args)
{
	const struct matrix_recurrence_step_args *a = args;
	double d_k = (double)a->d_k, d_v = (double)a->d_v, heads = (double)a->n_heads;
	double rows = (double)a->batch * heads, state = rows * d_k * d_v;

	return (struct cost){
	        .flops = rows * plain_state_flops(a->rule, d_k, d_v),
	        .bytes_read = act * rows *
	                              (token_width(a->decay, a->rule, d_k, d_v) -
	                               shared_width(&a->q, &a->k, heads, d_k)) +
	                      fp32 * (state + (a->rule == RULE_BONUS ? heads * d_k : 0)),
	        .bytes_written = act * rows * d_v + fp32 * state,
	};
}

static struct cost decay_gate_cost(double act, const void *args)
{
	const struct decay_gate_args *a = args;
	double n = (double)a->n_tokens, r = (double)a->rank, m = (double)a->d_out;

	return (struct cost){
	        .flops = product(n, r, m) + LOG_DECAY_FLOPS * n * m,
	        .bytes_read = act * (n * r + m * r) + fp32 * m,
	        .bytes_written = act * n * m,
	};
}

/* Reads x, weight, log_decay (which gives the derivative) and its gradient. */
static struct cost decay_gate_backward_cost(double act, const void *args)
{
	const struct decay_gate_backward_args *b = args;
	const struct decay_gate_args *a = &b->forward;
	double n = (double)a->n_tokens, r = (double)a->rank, m = (double)a->d_out;

	return (struct cost){
	        .flops = product_backward * product(n, r, m) +
	                 elementwise_backward * LOG_DECAY_FLOPS * n * m,
	        .bytes_read = act * (n * r + m * r + 2 * n * m),
	        .bytes_written = act * n * r + fp32 * (m * r + m),
	};
}

static struct cost norm_gate_cost(double act, const void *args)
{
	const struct norm_gate_args *a = args;
	double rows = (double)(a->n_tokens * a->n_heads), d = (double)a->d_head;

	return (struct cost){
	        .flops = (NORM_FLOPS + SILU_GATE_FLOPS) * rows * d,
	        .bytes_read = act * 2 * rows * d + fp32 * d,
	        .bytes_written = act * rows * d + (a->rstd ? fp32 * rows : 0),
	};
}

static struct cost norm_gate_backward_cost(double act, const void *args)
{
	const struct norm_gate_backward_args *b = args;
	const struct norm_gate_args *a = &b->forward;
	double rows = (double)(a->n_tokens * a->n_heads), d = (double)a->d_head;

	return (struct cost){
	        .flops = elementwise_backward * (NORM_FLOPS + SILU_GATE_FLOPS) * rows * d,
	        .bytes_read = act * 3 * rows * d + fp32 * (rows + d),
	        .bytes_written = act * 2 * rows * d + fp32 * d,
	};
}

/* q and k, in place. */
static struct cost rotate_step_cost(double act, const void *args)
{
	const struct rotate_step_args *a = args;
	double count = 2 * (double)(a->batch * a->n_heads * a->d_head);

	return (struct cost){ROTATE_FLOPS * count, act * count + int32, act * count};
}

static double conv_flops(double count)
{
	return (2 * CONV_WIDTH + SILU_FLOPS) * count;
}

static struct cost short_conv_cost(double act, const void *args)
{
	const struct short_conv_args *a = args;
	double c = (double)a->channels, count = (double)(a->batch * a->seq_len) * c;
	double history = a->history ? (double)(a->batch * CONV_HISTORY) * c : 0;

	return (struct cost){
	        .flops = conv_flops(count),
	        .bytes_read = act * count + fp32 * (CONV_WIDTH + 1) * c,
	        .bytes_written = act * (count + history),
	};
}

/* Adds the readers' gradients up first. */
static struct cost short_conv_backward_cost(double act, const void *args)
{
	const struct short_conv_backward_args *b = args;
	const struct short_conv_args *a = &b->forward;
	double c = (double)a->channels, count = (double)(a->batch * a->seq_len) * c;
	double readers = (double)b->n_readers, weights = fp32 * (CONV_WIDTH + 1) * c;

	return (struct cost){
	        .flops = product_backward * conv_flops(count) + (readers - 1) * count,
	        .bytes_read = act * (1 + readers) * count + weights,
	        .bytes_written = act * count + weights,
	};
}

static struct cost short_conv_step_cost(double act, const void *args)
{
	const struct short_conv_step_args *a = args;
	double c = (double)a->channels, count = (double)a->batch * c;

	return (struct cost){
	        .flops = conv_flops(count),
	        .bytes_read = act * CONV_WIDTH * count + fp32 * (CONV_WIDTH + 1) * c,
	        .bytes_written = act * CONV_WIDTH * count,
	};
}

static struct cost time_step_cost(double act, const void *args)
{
	const struct time_step_args *a = args;
	double heads = (double)a->n_heads, rows = (double)a->n_tokens * heads;
	double count = rows * (double)a->d_head;

	return (struct cost){
	        .flops = TIME_STEP_FLOPS * rows + count,
	        .bytes_read = act * (rows + count) + fp32 * 2 * heads,
	        .bytes_written = act * (rows + count),
	};
}

static struct cost time_step_backward_cost(double act, const void *args)
{
	const struct time_step_backward_args *b = args;
	const struct time_step_args *a = &b->forward;
	double heads = (double)a->n_heads, rows = (double)a->n_tokens * heads;
	double count = rows * (double)a->d_head, skip = b->dskip ? count : 0;

	return (struct cost){
	        .flops = elementwise_backward * (TIME_STEP_FLOPS * rows + count) + skip,
	        .bytes_read = act * (2 * (rows + count) + skip) + fp32 * 2 * heads,
	        .bytes_written = act * (rows + count) + fp32 * 2 * heads,
	};
}

static struct cost forget_gate_cost(double act, const void *args)
{
	const struct forget_gate_args *a = args;
	double width = (double)a->width, count = (double)a->n_tokens * width;

	return (struct cost){
	        .flops = FORGET_GATE_FLOPS * count,
	        .bytes_read = act * 2 * count + fp32 * width,
	        .bytes_written = act * (a->key ? 3 : 2) * count,
	};
}

static struct cost forget_gate_backward_cost(double act, const void *args)
{
	const struct forget_gate_backward_args *b = args;
	const struct forget_gate_args *a = &b->forward;
	double width = (double)a->width, count = (double)a->n_tokens * width;

	return (struct cost){
	        .flops = elementwise_backward * FORGET_GATE_FLOPS * count,
	        .bytes_read = act * (a->key ? 5 : 4) * count + fp32 * width,
	        .bytes_written = act * 2 * count + fp32 * width,
	};
}

static double gate_norm_flops(const struct gate_norm_args *a, double count)
{
	return (NORM_FLOPS + (a->gate ? SILU_GATE_FLOPS : 0) + (a->skip ? SKIP_FLOPS : 0)) * count;
}

static struct cost gate_norm_cost(double act, const void *args)
{
	const struct gate_norm_args *a = args;
	double heads = (double)a->n_heads, groups = (double)a->groups;
	double width = heads * (double)a->d_head, count = (double)a->n_tokens * width;

	return (struct cost){
	        .flops = gate_norm_flops(a, count),
	        .bytes_read = act * (1 + (a->skip != NULL) + (a->gate != NULL)) * count +
	                      fp32 * (width / groups + (a->skip ? heads : 0)),
	        .bytes_written = act * count + (a->rstd ? fp32 * (double)a->n_tokens * groups : 0),
	};
}

static struct cost gate_norm_backward_cost(double act, const void *args)
{
	const struct gate_norm_backward_args *b = args;
	const struct gate_norm_args *a = &b->forward;
	double heads = (double)a->n_heads, groups = (double)a->groups;
	double width = heads * (double)a->d_head, count = (double)a->n_tokens * width;
	double tensors = 1 + (a->skip != NULL) + (a->gate != NULL);
	double weights = width / groups + (a->skip ? heads : 0);

	return (struct cost){
	        .flops = elementwise_backward * gate_norm_flops(a, count),
	        .bytes_read = act * (tensors + 1) * count +
	                      fp32 * ((double)a->n_tokens * groups + weights),
	        .bytes_written = act * tensors * count + fp32 * weights,
	};
}

static struct cost gelu_cost(double act, const void *args)
{
	double count = (double)((const struct gelu_args *)args)->count;

	return (struct cost){GELU_FLOPS * count, act * count, act * count};
}

static struct cost gelu_backward_cost(double act, const void *args)
{
	double count = (double)((const struct gelu_backward_args *)args)->count;

	return (struct cost){elementwise_backward * GELU_FLOPS * count, act * 2 * count,
	                     act * count};
}

static struct cost embedding_cost(double act, const void *args)
{
	const struct embedding_args *a = args;
	double n = (double)a->n_tokens, rows = n * (double)a->d_model;

	return (struct cost){0, act * rows + int32 * n, act * rows};
}

/* One addition per element; the whole table's gradient is written. */
static struct cost embedding_backward_cost(double act, const void *args)
{
	const struct embedding_backward_args *a = args;
	double n = (double)a->n_tokens, d = (double)a->d_model;

	return (struct cost){n * d, act * n * d + int32 * n, fp32 * (double)a->vocab * d};
}

static struct cost cross_entropy_cost(double act, const void *args)
{
	const struct cross_entropy_args *a = args;
	double n = (double)a->n_tokens, logits = n * (double)a->vocab;
	double gradient = a->want_gradient ? logits : 0;

	return (struct cost){
	        .flops = SOFTMAX_LOSS_FLOPS * logits + SOFTMAX_GRADIENT_FLOPS * gradient,
	        .bytes_read = act * logits + int32 * n,
	        .bytes_written = act * gradient + fp32,
	};
}

/* One comparison per logit. */
static struct cost argmax_cost(double act, const void *args)
{
	const struct argmax_args *a = args;
	double n = (double)a->n_tokens, logits = n * (double)a->vocab;
	double position = a->position ? int32 : 0;

	return (struct cost){logits, act * logits + position, int32 * n + position};
}

static cost_function *const cost_functions[OP_COUNT] = {
        [OP_NORM_LINEAR] = norm_linear_cost,
        [OP_NORM_LINEAR_BACKWARD] = norm_linear_backward_cost,
        [OP_LINEAR_RESIDUAL] = linear_residual_cost,
        [OP_LINEAR_RESIDUAL_BACKWARD] = linear_residual_backward_cost,
        [OP_ROTATE] = rotate_cost,
        [OP_ROTATE_BACKWARD] = rotate_backward_cost,
        [OP_ATTENTION] = attention_cost,
        [OP_ATTENTION_BACKWARD] = attention_backward_cost,
        [OP_ATTENTION_STEP] = attention_step_cost,
        [OP_RAT_SCAN] = rat_scan_cost,
        [OP_RAT_SCAN_BACKWARD] = rat_scan_backward_cost,
        [OP_RAT_STEP] = rat_step_cost,
        [OP_RECURRENCE] = recurrence_cost,
        [OP_RECURRENCE_BACKWARD] = recurrence_backward_cost,
        [OP_RECURRENCE_STEP] = recurrence_step_cost,
        [OP_MATRIX_RECURRENCE] = matrix_recurrence_cost,
        [OP_MATRIX_RECURRENCE_BACKWARD] = matrix_recurrence_backward_cost,
        [OP_MATRIX_RECURRENCE_STEP] = matrix_recurrence_step_cost,
        [OP_DECAY_GATE] = decay_gate_cost,
        [OP_DECAY_GATE_BACKWARD] = decay_gate_backward_cost,
        [OP_NORM_GATE] = norm_gate_cost,
        [OP_NORM_GATE_BACKWARD] = norm_gate_backward_cost,
        [OP_ROTATE_STEP] = rotate_step_cost,
        [OP_SHORT_CONV] = short_conv_cost,
        [OP_SHORT_CONV_BACKWARD] = short_conv_backward_cost,
        [OP_SHORT_CONV_STEP] = short_conv_step_cost,
        [OP_TIME_STEP] = time_step_cost,
        [OP_TIME_STEP_BACKWARD] = time_step_backward_cost,
        [OP_FORGET_GATE] = forget_gate_cost,
        [OP_FORGET_GATE_BACKWARD] = forget_gate_backward_cost,
        [OP_GATE_NORM] = gate_norm_cost,
        [OP_GATE_NORM_BACKWARD] = gate_norm_backward_cost,
        [OP_GELU] = gelu_cost,
        [OP_GELU_BACKWARD] = gelu_backward_cost,
        [OP_EMBEDDING] = embedding_cost,
        [OP_EMBEDDING_BACKWARD] = embedding_backward_cost,
        [OP_CROSS_ENTROPY] = cross_entropy_cost,
        [OP_ARGMAX] = argmax_cost,
};

struct cost kernel_cost(const struct backend *backend, enum operation operation, const void *args)
{
	return cost_functions[operation]((double)dtype_size(backend->activation), args);
}
