/*
 * Rotary position embedding. The angles of a token are shared by its heads and by q and k. Their
 * cosines and sines come from two small tables by cos(a + b) and sin(a + b) in fp64, a of the
 * token's block of positions and b of its place within the block: exact to fp32 rounding at any
 * position that an fp64 angle can hold, without a sine per element.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"

enum { BLOCK = 64 };

/* Scratch of one thread: the block's angles in fp64, a token's in fp32; each d_head / 2 wide. */
struct angles {
	double *block_cos, *block_sin;
	float *cos, *sin;
};

/* Tables over a block, [BLOCK, half] each, then the threads' scratch. */
static size_t table_doubles(int64_t half)
{
	return 2 * BLOCK * (size_t)half;
}

/* Doubles of one thread's scratch: a pair of floats takes the room of one double. */
static size_t scratch_doubles(int64_t half)
{
	return 3 * (size_t)half;
}

static size_t rotation_workspace(bool rope, int64_t d_head)
{
	int64_t half = d_head / 2;

	if (!rope)
		return 0;
	return (table_doubles(half) + (size_t)omp_get_max_threads() * scratch_doubles(half)) *
	       sizeof(double);
}

static struct angles thread_angles(double *workspace, int64_t half)
{
	double *scratch = workspace + table_doubles(half) +
	                  (size_t)omp_get_thread_num() * scratch_doubles(half);
	float *floats = (void *)(scratch + 2 * half);

	return (struct angles){scratch, scratch + half, floats, floats + half};
}

/* theta_i = 10000^(-2i/d). */
static double frequency(int64_t i, int64_t d_head)
{
	return pow(10000, -2 * (double)i / (double)d_head);
}

/* Fills the tables; all threads of the region must call it. */
static void fill_tables(double *workspace, int64_t d_head)
{
	int64_t half = d_head / 2;
	double *table_cos = workspace, *table_sin = workspace + BLOCK * half;

#pragma omp for schedule(static)
	for (int64_t i = 0; i < half; i++) {
		double theta = frequency(i, d_head);

		for (int64_t j = 0; j < BLOCK; j++) {
			table_cos[j * half + i] = cos((double)j * theta);
			table_sin[j * half + i] = sin((double)j * theta);
		}
	}
}

static void enter_block(const struct angles *angles, int64_t d_head, int64_t first)
{
	for (int64_t i = 0; i < d_head / 2; i++) {
		double angle = (double)first * frequency(i, d_head);

		angles->block_cos[i] = cos(angle);
		angles->block_sin[i] = sin(angle);
	}
}

/* The angles of token `j` of the block that was entered. */
static void enter_token(const struct angles *angles, const double *table, int64_t half, int64_t j)
{
	const double *table_cos = table + j * half, *table_sin = table + (BLOCK + j) * half;

#pragma omp simd
	for (int64_t i = 0; i < half; i++) {
		double c = angles->block_cos[i], s = angles->block_sin[i];

		angles->cos[i] = (float)(c * table_cos[i] - s * table_sin[i]);
		angles->sin[i] = (float)(s * table_cos[i] + c * table_sin[i]);
	}
}

/* One head; `to` may be `from`. sign -1 rotates back. */
static inline void rotate_head(float *to, const float *from, const struct angles *angles,
                               int64_t half, float sign)
{
#pragma omp simd
	for (int64_t i = 0; i < half; i++) {
		float x1 = from[i], x2 = from[i + half];
		float c = angles->cos[i], s = sign * angles->sin[i];

		to[i] = x1 * c - x2 * s;
		to[i + half] = x2 * c + x1 * s;
	}
}

/* All heads of a token, from token t of one view to token (or slot) t_out of another; `rest`
 * columns after those that turn are copied. */
static void rotate_token(const struct view *to, int64_t t_out, const struct view *from, int64_t b,
                         int64_t t, int64_t n_heads, int64_t half, int64_t rest,
                         const struct angles *angles, float sign)
{
	for (int64_t h = 0; h < n_heads; h++) {
		const float *source = view_at(from, b, t, h);
		float *target = view_at(to, b, t_out, h);

		rotate_head(target, source, angles, half, sign);
		if (rest > 0 && target != source)
			memcpy(target + 2 * half, source + 2 * half, (size_t)rest * sizeof(float));
	}
}

static void copy_token(const struct view *to, int64_t t_out, const struct view *from, int64_t b,
                       int64_t t, int64_t n_heads, int64_t d_head)
{
	for (int64_t h = 0; h < n_heads; h++)
		memcpy(view_at(to, b, t_out, h), view_at(from, b, t, h),
		       (size_t)d_head * sizeof(float));
}

/* q and k of tokens `first` to `last` of sequence b; they are of one block of positions. */
static void rotate_block(const struct rotate_args *a, float sign, const double *table,
                         const struct angles *angles, int64_t b, int64_t first, int64_t last)
{
	int64_t half = a->rope_width / 2, rest = a->d_head - a->rope_width;

	enter_block(angles, a->rope_width, first);
	for (int64_t t = first; t < last; t++) {
		enter_token(angles, table, half, t - first);
		if (a->q_out.data)
			rotate_token(&a->q_out, t, &a->q, b, t, a->n_heads, half, rest, angles,
			             sign);
		if (a->k_out.data && t >= a->first_kv)
			rotate_token(&a->k_out, t % a->kv_slots, &a->k, b, t, a->kv_heads, half,
			             rest, angles, sign);
	}
}

/* With a rope_width that is not 0. */
static void rotate_q_and_k(const struct rotate_args *a, float sign, double *workspace)
{
	int64_t n_blocks = (a->seq_len + BLOCK - 1) / BLOCK;

#pragma omp parallel
	{
		struct angles angles = thread_angles(workspace, a->rope_width / 2);

		fill_tables(workspace, a->rope_width);
#pragma omp for schedule(static)
		for (int64_t i = 0; i < a->batch * n_blocks; i++) {
			int64_t first = i % n_blocks * BLOCK;
			int64_t last = first + BLOCK < a->seq_len ? first + BLOCK : a->seq_len;

			rotate_block(a, sign, workspace, &angles, i / n_blocks, first, last);
		}
	}
}

static bool same_place(const struct view *a, const struct view *b)
{
	return a->data == b->data && a->batch == b->batch && a->token == b->token &&
	       a->head == b->head;
}

/* Tokens from `first` on, each to its slot, as they are. */
static void copy_tokens(const struct rotate_args *a, const struct view *to, const struct view *from,
                        int64_t n_heads, int64_t first, int64_t slots)
{
	int64_t count = a->seq_len - first;

	if (!to->data || same_place(to, from))
		return;
#pragma omp parallel for schedule(static)
	for (int64_t i = 0; i < a->batch * count; i++)
		copy_token(to, (first + i % count) % slots, from, i / count, first + i % count,
		           n_heads, a->d_head);
}

/* Columns that turn. */
static int64_t turned(int64_t rope_width, int64_t d_head)
{
	return rope_width > 0 ? rope_width : d_head;
}

static const char *rotation_unsupported(bool rope, int64_t width)
{
	return rope && width % 2 != 0 ? "rotary positions need an even head width" : NULL;
}

const char *cpu_rotate_unsupported(const struct device *device, const void *args)
{
	const struct rotate_args *a = args;

	return rotation_unsupported(a->rope, turned(a->rope_width, a->d_head));
}

size_t cpu_rotate_workspace(const struct device *device, const void *args)
{
	const struct rotate_args *a = args;

	return rotation_workspace(a->rope, turned(a->rope_width, a->d_head));
}

enum status cpu_rotate(struct device *device, const void *args, void *workspace)
{
	const struct rotate_args *a = args;
	struct rotate_args turn = *a;

	turn.rope_width = turned(a->rope_width, a->d_head);
	if (a->rope) {
		rotate_q_and_k(&turn, 1, workspace);
	} else {
		copy_tokens(a, &a->q_out, &a->q, a->n_heads, 0, a->seq_len);
		copy_tokens(a, &a->k_out, &a->k, a->kv_heads, a->first_kv, a->kv_slots);
	}
	copy_tokens(a, &a->v_out, &a->v, a->kv_heads, a->first_kv, a->kv_slots);
	return STATUS_OK;
}

const char *cpu_rotate_backward_unsupported(const struct device *device, const void *args)
{
	const struct rotate_backward_args *a = args;

	return rotation_unsupported(a->rope, turned(a->rope_width, a->d_head));
}

size_t cpu_rotate_backward_workspace(const struct device *device, const void *args)
{
	const struct rotate_backward_args *a = args;

	return rotation_workspace(a->rope, turned(a->rope_width, a->d_head));
}

enum status cpu_rotate_backward(struct device *device, const void *args, void *workspace)
{
	const struct rotate_backward_args *a = args;
	struct rotate_args back = {
	        .batch = a->batch,
	        .seq_len = a->seq_len,
	        .n_heads = a->n_heads,
	        .kv_heads = a->kv_heads,
	        .d_head = a->d_head,
	        .rope_width = turned(a->rope_width, a->d_head),
	        .kv_slots = a->seq_len,
	        .q = a->dq_out,
	        .k = a->dk_out,
	        .q_out = a->dq,
	        .k_out = a->dk,
	};

	if (a->rope) {
		rotate_q_and_k(&back, -1, workspace);
	} else {
		copy_tokens(&back, &a->dq, &a->dq_out, a->n_heads, 0, a->seq_len);
		copy_tokens(&back, &a->dk, &a->dk_out, a->kv_heads, 0, a->seq_len);
	}
	return STATUS_OK;
}

const char *cpu_rotate_step_unsupported(const struct device *device, const void *args)
{
	const struct rotate_step_args *a = args;

	return rotation_unsupported(true, a->d_head);
}

/* Cosines and sines of one position, for all sequences. */
size_t cpu_rotate_step_workspace(const struct device *device, const void *args)
{
	const struct rotate_step_args *a = args;

	return (size_t)a->d_head * sizeof(float);
}

enum status cpu_rotate_step(struct device *device, const void *args, void *workspace)
{
	const struct rotate_step_args *a = args;
	int64_t half = a->d_head / 2;
	float *cosines = workspace;
	const struct angles angles = {NULL, NULL, cosines, cosines + half};

	for (int64_t i = 0; i < half; i++) {
		double angle = (double)*a->position * frequency(i, a->d_head);

		angles.cos[i] = (float)cos(angle);
		angles.sin[i] = (float)sin(angle);
	}
#pragma omp parallel for schedule(static)
	for (int64_t b = 0; b < a->batch; b++) {
		rotate_token(&a->q_out, 0, &a->q, b, 0, a->n_heads, half, 0, &angles, 1);
		rotate_token(&a->k_out, 0, &a->k, b, 0, a->n_heads, half, 0, &angles, 1);
	}
	return STATUS_OK;
}
