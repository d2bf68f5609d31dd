/* Rotary embedding of q and k, and the placement of k and v in a cache. */
#include "kernels/portable/kernels.h"
#include "kernels/portable/rope.cuh"

enum { THREADS = 256, HEADS = 4 };

/* A thread takes 8 pairs of up to HEADS heads of one token, whose angles are the same; or 16
 * columns of those that do not turn. */
static __global__ void __launch_bounds__(THREADS)
        rotate_kernel(const __grid_constant__ struct rotation r,
                      const __grid_constant__ struct rope_table table)
{
	const int64_t pieces = r.d_head / 16;
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t token = index / pieces, per_sequence = r.n_tokens - r.first;
	const int piece = (int)(index % pieces);
	const int64_t b = token / per_sequence, t = r.first + token % per_sequence;
	float cosine[8], sine[8], low[8], high[8];

	if (token >= r.batch * per_sequence)
		return;
	const bool paired = piece < r.width / 16, turns = r.rope && paired;
	const int64_t left = paired ? 8 * piece : 16 * piece;
	const int64_t right = left + (paired ? r.width / 2 : 8);
	/* All heads are loaded before any is stored. */
	const int64_t first = (int64_t)blockIdx.y * HEADS;
	vector8 lows[HEADS], highs[HEADS];
#pragma unroll
	for (int i = 0; i < HEADS; i++) {
		if (first + i >= r.n_heads)
			continue;
		lows[i] = load8(at(r.from, b, t, first + i) + left);
		highs[i] = load8(at(r.from, b, t, first + i) + right);
	}
	if (turns)
		rope_angles(cosine, sine, table, 8 * piece, t / r.period);
	for (int i = 0; r.inverse && i < 8; i++)
		sine[i] = -sine[i];
#pragma unroll
	for (int i = 0; i < HEADS; i++) {
		if (first + i >= r.n_heads)
			continue;
		bf16 *to = at(r.to, b, t % r.slots, first + i);

		unpack8(low, lows[i]);
		unpack8(high, highs[i]);
		if (turns)
			turn8(low, high, cosine, sine);
		store8(to + left, low);
		store8(to + right, high);
	}
}

static bool same_view(const struct view *a, const struct view *b)
{
	return a->data == b->data && a->batch == b->batch && a->token == b->token &&
	       a->head == b->head;
}

enum status rotate_tensor(struct device *device, const char *operation, struct rotation r,
                          const struct view &from, const struct view &to)
{
	const int64_t threads = r.batch * (r.n_tokens - r.first) * (r.d_head / 16);
	const dim3 grid((unsigned)divide_up(threads, THREADS),
	                (unsigned)divide_up(r.n_heads, HEADS));

	if (threads <= 0 || !to.data || (!r.rope && same_view(&from, &to)))
		return STATUS_OK;
	r.from = from;
	r.to = to;
	return launch(device, operation, rotate_kernel, grid, THREADS, 0, r,
	              rope_table_of(r.width));
}

static const char *check_rope_width(int64_t d_head, int64_t rope_width)
{
	if (rope_width % 16 || rope_width > d_head)
		return "columns that turn must be a multiple of 16";
	return d_head % 16 || d_head > MAX_ROPE_WIDTH
	               ? "head width must be a multiple of 16 up to 256"
	               : NULL;
}

extern "C" const char *portable_rotate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct rotate_args *>(args);

	return either(check_rope_width(a->d_head, a->rope_width),
	              check_aligned(&a->q, &a->k, &a->v, &a->q_out, &a->k_out, &a->v_out));
}

extern "C" enum status portable_rotate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct rotate_args *>(args);
	struct rotation r = rotation_of(a->batch, a->seq_len, a->n_heads, a->d_head, a->rope);
	r.width = turned_width(a->rope_width, a->d_head);
	enum status status = rotate_tensor(device, "rotate", r, a->q, a->q_out);

	r.n_heads = a->kv_heads;
	r.first = a->first_kv;
	r.slots = a->kv_slots;
	if (status == STATUS_OK)
		status = rotate_tensor(device, "rotate", r, a->k, a->k_out);
	r.rope = false;
	return status == STATUS_OK ? rotate_tensor(device, "rotate", r, a->v, a->v_out) : status;
}

extern "C" const char *portable_rotate_backward_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct rotate_backward_args *>(args);

	return either(check_rope_width(a->d_head, a->rope_width),
	              check_aligned(&a->dq_out, &a->dk_out, &a->dq, &a->dk));
}

extern "C" enum status portable_rotate_backward(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct rotate_backward_args *>(args);
	struct rotation r = rotation_of(a->batch, a->seq_len, a->n_heads, a->d_head, a->rope);

	r.width = turned_width(a->rope_width, a->d_head);
	r.inverse = true;
	enum status status = rotate_tensor(device, "rotate_backward", r, a->dq_out, a->dq);
	r.n_heads = a->kv_heads;
	return status == STATUS_OK ? rotate_tensor(device, "rotate_backward", r, a->dk_out, a->dk)
	                           : status;
}

/* A thread takes 8 pairs of one head, of q or of k. */
static __global__ void __launch_bounds__(THREADS)
        rotate_step_kernel(const __grid_constant__ struct rotate_step_args a,
                           const __grid_constant__ struct rope_table table)
{
	const int64_t pieces = a.d_head / 16;
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t row = index / pieces, b = row / a.n_heads;
	const int piece = (int)(index % pieces);
	float cosine[8], sine[8], low[8], high[8];

	if (b >= a.batch)
		return;
	rope_angles(cosine, sine, table, 8 * piece, *a.position);
	const bf16 *from = at(blockIdx.y ? a.k : a.q, b, 0, row % a.n_heads) + 8 * piece;
	bf16 *to = at(blockIdx.y ? a.k_out : a.q_out, b, 0, row % a.n_heads) + 8 * piece;
	load8(low, from);
	load8(high, from + a.d_head / 2);
	turn8(low, high, cosine, sine);
	store8(to, low);
	store8(to + a.d_head / 2, high);
}

extern "C" const char *portable_rotate_step_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct rotate_step_args *>(args);

	return either(check_rope_width(a->d_head, a->d_head),
	              check_aligned(&a->q, &a->k, &a->q_out, &a->k_out));
}

extern "C" enum status portable_rotate_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct rotate_step_args *>(args);
	const int64_t threads = a->batch * a->n_heads * (a->d_head / 16);

	return launch(device, "rotate_step", rotate_step_kernel,
	              dim3((unsigned)divide_up(threads, THREADS), 2), THREADS, 0, *a,
	              rope_table_of(a->d_head));
}
