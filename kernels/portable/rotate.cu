/* Rotary embedding of q and k, and the placement of k and v in a cache. */
#include "kernels/portable/portable.h"
#include "kernels/portable/rope.cuh"

enum { THREADS = 256, HEADS = 4 };

/* A thread takes 8 pairs of up to HEADS heads of one token, whose angles are the same. */
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
	if (r.rope)
		rope_angles(cosine, sine, table, 8 * piece, t / r.period);
	for (int i = 0; r.inverse && i < 8; i++)
		sine[i] = -sine[i];
	for (int64_t h = (int64_t)blockIdx.y * HEADS;
	     h < r.n_heads && h < ((int64_t)blockIdx.y + 1) * HEADS; h++) {
		const bf16 *from = at(r.from, b, t, h) + 8 * piece;
		bf16 *to = at(r.to, b, t % r.slots, h) + 8 * piece;

		load8(low, from);
		load8(high, from + r.d_head / 2);
		for (int i = 0; r.rope && i < 8; i++) {
			const float x = low[i];

			low[i] = x * cosine[i] - high[i] * sine[i];
			high[i] = high[i] * cosine[i] + x * sine[i];
		}
		store8(to, low);
		store8(to + r.d_head / 2, high);
	}
}

static bool same_view(const struct view *a, const struct view *b)
{
	return a->data == b->data && a->batch == b->batch && a->token == b->token &&
	       a->head == b->head;
}

enum status rotate_tensor(const char *operation, const struct rotation *r)
{
	const int64_t threads = r->batch * (r->n_tokens - r->first) * (r->d_head / 16);
	const dim3 grid((unsigned)divide_up(threads, THREADS),
	                (unsigned)divide_up(r->n_heads, HEADS));

	if (threads <= 0 || (!r->rope && same_view(&r->from, &r->to)))
		return STATUS_OK;
	return launch(operation, rotate_kernel, grid, THREADS, 0, *r, rope_table_of(r->d_head));
}

extern "C" const char *portable_rotate_unsupported(const void *args)
{
	const auto *a = static_cast<const struct rotate_args *>(args);
	const struct view *const views[] = {&a->q, &a->k, &a->v, &a->q_out, &a->k_out, &a->v_out};

	if (a->d_head % 16 || a->d_head > MAX_ROPE_WIDTH)
		return "head width must be a multiple of 16 up to 128";
	return views_are_aligned(views, 6) ? NULL : "views must be 16-byte aligned";
}

extern "C" enum status portable_rotate(const void *args, void *)
{
	const auto *a = static_cast<const struct rotate_args *>(args);
	struct rotation r = {};
	enum status status = STATUS_OK;

	r.batch = a->batch;
	r.n_tokens = a->seq_len;
	r.n_heads = a->n_heads;
	r.d_head = a->d_head;
	r.period = 1;
	r.slots = a->seq_len;
	r.rope = a->rope;
	if (a->q_out.data) {
		r.from = a->q;
		r.to = a->q_out;
		status = rotate_tensor("rotate", &r);
	}
	r.first = a->first_kv;
	r.slots = a->kv_slots;
	if (status == STATUS_OK && a->k_out.data) {
		r.from = a->k;
		r.to = a->k_out;
		status = rotate_tensor("rotate", &r);
	}
	r.rope = false;
	if (status == STATUS_OK && a->v_out.data) {
		r.from = a->v;
		r.to = a->v_out;
		status = rotate_tensor("rotate", &r);
	}
	return status;
}

/* Of two tensors that are rotated in place. */
static const char *check_pair(int64_t d_head, const struct view *q, const struct view *k)
{
	const struct view *const views[] = {q, k};

	if (d_head % 16 || d_head > MAX_ROPE_WIDTH)
		return "head width must be a multiple of 16 up to 128";
	return views_are_aligned(views, 2) ? NULL : "views must be 16-byte aligned";
}

extern "C" const char *portable_rotate_backward_unsupported(const void *args)
{
	const auto *a = static_cast<const struct rotate_backward_args *>(args);

	return check_pair(a->d_head, &a->dq, &a->dk);
}

extern "C" enum status portable_rotate_backward(const void *args, void *)
{
	const auto *a = static_cast<const struct rotate_backward_args *>(args);
	struct rotation r = {};

	r.batch = a->batch;
	r.n_tokens = a->seq_len;
	r.n_heads = a->n_heads;
	r.d_head = a->d_head;
	r.period = 1;
	r.slots = a->seq_len;
	r.rope = a->rope;
	r.inverse = true;
	r.from = r.to = a->dq;
	enum status status = rotate_tensor("rotate_backward", &r);
	r.from = r.to = a->dk;
	return status == STATUS_OK ? rotate_tensor("rotate_backward", &r) : status;
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
	bf16 *x = at(blockIdx.y ? a.k : a.q, b, 0, row % a.n_heads) + 8 * piece;
	load8(low, x);
	load8(high, x + a.d_head / 2);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float value = low[i];

		low[i] = value * cosine[i] - high[i] * sine[i];
		high[i] = high[i] * cosine[i] + value * sine[i];
	}
	store8(x, low);
	store8(x + a.d_head / 2, high);
}

extern "C" const char *portable_rotate_step_unsupported(const void *args)
{
	const auto *a = static_cast<const struct rotate_step_args *>(args);

	return check_pair(a->d_head, &a->q, &a->k);
}

extern "C" enum status portable_rotate_step(const void *args, void *)
{
	const auto *a = static_cast<const struct rotate_step_args *>(args);
	const int64_t threads = a->batch * a->n_heads * (a->d_head / 16);

	return launch("rotate_step", rotate_step_kernel,
	              dim3((unsigned)divide_up(threads, THREADS), 2), THREADS, 0, *a,
	              rope_table_of(a->d_head));
}
