/*
 * The matrix-state recurrence over a whole sequence. A task is a block of
 * columns of one head's state, which stays in cache from token to token.
 *
 * Chunkwise, from the state S before a chunk, with P_i the product of the
 * decays from the chunk's first token to i and D that of the whole chunk:
 *   o_i = scale (q_i P_i) S + sum over j <= i of A_ij v_j
 *   A_ij = scale sum over c of q_ic k_jc (decays of j+1 .. i)_c
 *   S' = D S + sum over j of (k_j (decays of j+1 .. end))^T v_j
 * (RULE_BONUS: the decays that reach q_i end at i-1, and A_ii has the bonus.)
 *
 * A product of decays is never the quotient of two cumulative products, which
 * underflow. Chunks are cut into sub-chunks of SUB_CHUNK tokens: within one,
 * decays are multiplied out pair by pair; across, q is decayed from the start
 * of its sub-chunk, and k up to it (k_decayed is kept so, sub-chunk after
 * sub-chunk), so every exponent is <= 0.
 */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/block_product.h"
#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/matrix_state.h"
#include "kernels/cpu/recurrence.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/vector_math.h"

enum { DEFAULT_CHUNK = 32 }; /* the fastest for states from 64 x 128 to 256 x 512 */

/* A thread's memory; N is the chunk length, W the columns of a task. */
struct scratch {
	float *state;     /* [d_k, W] */
	float *k_decayed; /* [N, d_k] up to the start of the present sub-chunk */
	float *v;         /* [N, W] */
	float *score;     /* [N, SUB_CHUNK]: A transposed, the present sub-chunk's columns */
	float *out;       /* [SUB_CHUNK, W] */
	float *q;         /* [SUB_CHUNK, d_k]: scale q, decayed from the sub-chunk's start */
	float *q_columns; /* [d_k, SUB_CHUNK]: its transpose */
	float *decay;     /* [SUB_CHUNK, d_k] */
	float *log_chunk; /* [d_k]: log decay of the chunk's sub-chunks before the present one */
	float *log_sub;   /* [d_k]: of the present one */
	float *total;     /* [d_k]: the exponential of either */
	float *row;       /* [d_k] */
};

/* The columns of one head that a task owns. */
struct task {
	int64_t b, h, first, n;
};

static bool is_chunkwise(const struct matrix_recurrence_args *a)
{
	return a->rule != RULE_DELTA && a->chunk != 1;
}

static int64_t chunk_length(const struct matrix_recurrence_args *a)
{
	int64_t chunk = is_chunkwise(a) ? a->chunk : 1;

	if (chunk == 0)
		chunk = DEFAULT_CHUNK;
	return chunk < a->seq_len ? chunk : a->seq_len;
}

static int64_t count_blocks(const struct matrix_recurrence_args *a)
{
	return channel_blocks(a->batch * a->n_heads, a->d_v);
}

static struct scratch lay_out(const struct matrix_recurrence_args *a, struct scratch_arena *arena)
{
	int64_t n = chunk_length(a), w = a->d_v, d = a->d_k;

	return (struct scratch){
	        .state = scratch_take(arena, d * w),
	        .k_decayed = scratch_take(arena, n * d),
	        .v = scratch_take(arena, n * w),
	        .score = scratch_take(arena, n * SUB_CHUNK),
	        .out = scratch_take(arena, SUB_CHUNK * w),
	        .q = scratch_take(arena, SUB_CHUNK * d),
	        .q_columns = scratch_take(arena, d * SUB_CHUNK),
	        .decay = scratch_take(arena, SUB_CHUNK * d),
	        .log_chunk = scratch_take(arena, d),
	        .log_sub = scratch_take(arena, d),
	        .total = scratch_take(arena, d),
	        .row = scratch_take(arena, d),
	};
}

size_t cpu_matrix_recurrence_workspace(const struct device *device, const void *args)
{
	struct scratch_arena arena = {0};

	lay_out(args, &arena);
	return sizeof(float) * arena.used * (size_t)omp_get_max_threads();
}

/* Every token of the task by the plain recurrence. */
static void run_plain(const struct matrix_recurrence_args *a, const struct task *task,
                      const struct scratch *s)
{
	for (int64_t t = 0; t < a->seq_len; t++) {
		struct matrix_token token = {
		        .q = view_at(&a->q, task->b, t, task->h),
		        .k = view_at(&a->k, task->b, t, task->h),
		        .v = view_at(&a->v, task->b, t, task->h) + task->first,
		        .decay = s->decay,
		        .bonus = a->bonus ? a->bonus + task->h * a->d_k : NULL,
		        .beta = a->rule == RULE_DELTA ? *view_at(&a->beta, task->b, t, task->h)
		                                      : 0.0f};

		matrix_state_decay(a->decay, &a->log_decay, task->b, t, task->h, a->d_k, s->decay,
		                   NULL);
		matrix_state_advance(a->rule, a->d_k, task->n, a->scale, &token, s->state, task->n,
		                     view_at(&a->out, task->b, t, task->h) + task->first);
	}
}

/* to = x y, elementwise; to may be x. */
static void multiply(int64_t n, const float *x, const float *y, float *to)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		to[i] = x[i] * y[i];
}

static float weighted_dot(int64_t d, const float *x, const float *y, const float *weight)
{
	float sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++)
		sum += x[i] * y[i] * weight[i];
	return sum;
}

/* k *= decay, then q.k. */
static float decay_then_dot(int64_t d, const float *q, float *k, const float *decay)
{
	float sum = 0;

#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < d; i++) {
		k[i] *= decay[i];
		sum += q[i] * k[i];
	}
	return sum;
}

/* Decays and values of the n tokens from t on, which are tokens start .. of their chunk. */
static void load_sub_chunk(const struct matrix_recurrence_args *a, const struct task *task,
                           int64_t t, int64_t start, int64_t n, const struct scratch *s)
{
	memset(s->log_sub, 0, sizeof(float) * (size_t)a->d_k);
	for (int64_t i = 0; i < n; i++) {
		matrix_state_decay(a->decay, &a->log_decay, task->b, t + i, task->h, a->d_k,
		                   s->decay + i * a->d_k, s->log_sub);
		memcpy(s->v + (start + i) * task->n,
		       view_at(&a->v, task->b, t + i, task->h) + task->first,
		       sizeof(float) * (size_t)task->n);
	}
}

/* Scores of n tokens with each other; score: the row of the first of them. */
static void score_within(const struct matrix_recurrence_args *a, const struct task *task, int64_t t,
                         int64_t n, const struct scratch *s, float *score)
{
	int64_t d = a->d_k, lag = a->rule == RULE_BONUS;
	float *k = s->row;

	memset(score, 0, sizeof *score * (size_t)(n * SUB_CHUNK));
	for (int64_t j = 0; j < n; j++) {
		const float *q = view_at(&a->q, task->b, t + j, task->h);
		float *to = score + j * SUB_CHUNK;

		memcpy(k, view_at(&a->k, task->b, t + j, task->h), sizeof *k * (size_t)d);
		to[j] = a->scale *
		        (lag ? weighted_dot(d, q, k, a->bonus + task->h * d) : dot_f32(d, q, k));
		for (int64_t i = j + 1; i < n; i++) {
			q = view_at(&a->q, task->b, t + i, task->h);
			to[i] = a->scale *
			        (i - lag > j ? decay_then_dot(d, q, k, s->decay + (i - lag) * d)
			                     : dot_f32(d, q, k));
		}
	}
}

/* s->q and its transpose: scale q of n tokens, decayed from the start of the sub-chunk. */
static void decay_queries(const struct matrix_recurrence_args *a, const struct task *task,
                          int64_t t, int64_t n, const struct scratch *s)
{
	int64_t d = a->d_k, lag = a->rule == RULE_BONUS;
	float *product = s->row;

	for (int64_t c = 0; c < d; c++)
		product[c] = a->scale;
	memset(s->q_columns, 0, sizeof(float) * (size_t)(d * SUB_CHUNK));
	for (int64_t i = 0; i < n; i++) {
		const float *q = view_at(&a->q, task->b, t + i, task->h);
		float *to = s->q + i * d;

		if (i >= lag)
			multiply(d, product, s->decay + (i - lag) * d, product);
		multiply(d, q, product, to);
		for (int64_t c = 0; c < d; c++)
			s->q_columns[c * SUB_CHUNK + i] = to[c];
	}
}

/* Rows of k_decayed: k of n tokens, decayed to the end of the sub-chunk. */
static void decay_keys(const struct matrix_recurrence_args *a, const struct task *task, int64_t t,
                       int64_t n, const struct scratch *s, float *k_decayed)
{
	int64_t d = a->d_k;
	float *product = s->row;

	for (int64_t c = 0; c < d; c++)
		product[c] = 1.0f;
	for (int64_t j = n - 1; j >= 0; j--) {
		multiply(d, view_at(&a->k, task->b, t + j, task->h), product, k_decayed + j * d);
		multiply(d, product, s->decay + j * d, product);
	}
}

/* to = exp(from), [d]. */
static void exponentials(int64_t d, const float *from, float *to)
{
#pragma omp simd
	for (int64_t i = 0; i < d; i++)
		to[i] = exp_f32(from[i]);
}

/* The outputs of the sub-chunk: s->q is decayed on to the start of the chunk and used up. */
static void write_outputs(const struct matrix_recurrence_args *a, const struct task *task,
                          int64_t t, int64_t start, int64_t n, const struct scratch *s)
{
	int64_t d = a->d_k, w = task->n;

	exponentials(d, s->log_chunk, s->total);
	for (int64_t i = 0; i < n; i++)
		multiply(d, s->q + i * d, s->total, s->q + i * d);
	block_product(n, w, d, (struct block){s->q, d, 1}, s->state, w, s->out, w);
	block_product_add(n, w, start, (struct block){s->score, 1, SUB_CHUNK}, s->v, w, NULL,
	                  s->out, w);
	/* Row by row: a later token's NaN or infinity must not reach an output through a zero. */
	for (int64_t i = 0; i < n; i++)
		block_product_add(1, w, i + 1,
		                  (struct block){s->score + start * SUB_CHUNK + i, 1, SUB_CHUNK},
		                  s->v + start * w, w, NULL, s->out + i * w, w);
	for (int64_t i = 0; i < n; i++)
		memcpy(view_at(&a->out, task->b, t + i, task->h) + task->first, s->out + i * w,
		       sizeof(float) * (size_t)w);
}

/* Tokens start .. start+n of the chunk that begins at token t. */
static void run_sub_chunk(const struct matrix_recurrence_args *a, const struct task *task,
                          int64_t t, int64_t start, int64_t n, const struct scratch *s)
{
	int64_t d = a->d_k;

	load_sub_chunk(a, task, t + start, start, n, s);
	score_within(a, task, t + start, n, s, s->score + start * SUB_CHUNK);
	decay_queries(a, task, t + start, n, s);
	block_product(start, SUB_CHUNK, d, (struct block){s->k_decayed, d, 1}, s->q_columns,
	              SUB_CHUNK, s->score, SUB_CHUNK);
	write_outputs(a, task, t + start, start, n, s);
	exponentials(d, s->log_sub, s->total);
	for (int64_t j = 0; j < start; j++)
		multiply(d, s->k_decayed + j * d, s->total, s->k_decayed + j * d);
	decay_keys(a, task, t + start, n, s, s->k_decayed + start * d);
	for (int64_t c = 0; c < d; c++)
		s->log_chunk[c] += s->log_sub[c];
}

static void run_chunk(const struct matrix_recurrence_args *a, const struct task *task, int64_t t,
                      int64_t n, const struct scratch *s)
{
	memset(s->log_chunk, 0, sizeof(float) * (size_t)a->d_k);
	for (int64_t start = 0; start < n; start += SUB_CHUNK)
		run_sub_chunk(a, task, t, start, n - start < SUB_CHUNK ? n - start : SUB_CHUNK, s);
	exponentials(a->d_k, s->log_chunk, s->total);
	block_product_add(a->d_k, task->n, n, (struct block){s->k_decayed, 1, a->d_k}, s->v,
	                  task->n, s->total, s->state, task->n);
}

static void run_task(const struct matrix_recurrence_args *a, const struct task *task,
                     const struct scratch *s)
{
	int64_t chunk = chunk_length(a);

	matrix_state_load(a, task->b, task->h, task->first, task->n, s->state);
	if (!is_chunkwise(a))
		run_plain(a, task, s);
	else
		for (int64_t t = 0; t < a->seq_len; t += chunk)
			run_chunk(a, task, t, a->seq_len - t < chunk ? a->seq_len - t : chunk, s);
	if (!a->final_state)
		return;
	float *to = a->final_state + (task->b * a->n_heads + task->h) * a->d_k * a->d_v;
	for (int64_t i = 0; i < a->d_k; i++)
		memcpy(to + i * a->d_v + task->first, s->state + i * task->n,
		       sizeof *to * (size_t)task->n);
}

enum status cpu_matrix_recurrence(struct device *device, const void *args, void *workspace)
{
	const struct matrix_recurrence_args *a = args;
	int64_t n_blocks = count_blocks(a);
	struct scratch_arena size = {0};

	lay_out(a, &size);
#pragma omp parallel for schedule(static)
	for (int64_t i = 0; i < a->batch * a->n_heads * n_blocks; i++) {
		struct scratch_arena arena = {.memory = (float *)workspace +
		                                        size.used * (size_t)omp_get_thread_num()};
		struct scratch s = lay_out(a, &arena);
		int64_t head = i / n_blocks, block = i % n_blocks;
		int64_t first = channel_block_start(a->d_v, n_blocks, block);
		struct task task = {head / a->n_heads, head % a->n_heads, first,
		                    channel_block_start(a->d_v, n_blocks, block + 1) - first};

		run_task(a, &task, &s);
	}
	return STATUS_OK;
}
