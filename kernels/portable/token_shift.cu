/*
 * RWKV's token shift: each channel of a token, mixed with that of the token before. Bound by
 * memory.
 *
 * A thread owns eight channels and walks down TOKENS tokens with the one before in registers, so x
 * is read 1 + 1/TOKENS times. The backward pass walks up: what a token's outputs owe to the token
 * before it is carried there in registers, and of a segment's last token it is computed from the
 * token after. Where the mixes are parameters a thread takes every gridDim.y-th segment, and keeps
 * the sums of its channels; the shares are added in a fixed order. All outputs of a token are
 * loaded before any is used.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 16, TOKENS = 32, MOST_OUTPUTS = 5;

static __device__ __forceinline__ const bf16 *elements(const void *tensor)
{
	return static_cast<const bf16 *>(tensor);
}

/* Eight channels' mixes of output n: those of a token, or parameters, which a thread keeps. */
template <enum shift FORM, int N>
static __device__ __forceinline__ void get_mix(float (&mix)[8], const vector8 &stored,
                                               const float (&kept)[N][8], int n)
{
	if (FORM == SHIFT_VARIABLE)
		unpack8(mix, stored);
#pragma unroll
	for (int i = 0; FORM == SHIFT_CONSTANT && i < 8; i++)
		mix[i] = kept[n][i];
}

template <enum shift FORM, int N>
static __device__ __forceinline__ void keep_mixes(float (&kept)[N][8],
                                                  const struct token_shift_args &a, int64_t channel)
{
#pragma unroll
	for (int n = 0; FORM == SHIFT_CONSTANT && n < N; n++)
		load8f(kept[n], a.weight + n * a.width + channel);
}

static __device__ __forceinline__ void clear(float (&x)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		x[i] = 0.0f;
}

/* Segments of all sequences. */
static __host__ __device__ __forceinline__ int64_t count_segments(const struct token_shift_args &a)
{
	return a.batch * divide_up(a.seq_len, TOKENS);
}

/* The first row of a segment, the one after its last, and the one after its sequence. */
struct segment {
	int64_t first, last, end;
	bool begins; /* its sequence */
};

static __device__ __forceinline__ struct segment segment_of(const struct token_shift_args &a,
                                                            int64_t number)
{
	const int64_t per_sequence = divide_up(a.seq_len, TOKENS);
	const int64_t start = number / per_sequence * a.seq_len;
	const int64_t token = number % per_sequence * TOKENS;

	return {start + token, start + min(token + TOKENS, a.seq_len), start + a.seq_len,
	        token == 0};
}

template <enum shift FORM, int N>
static __global__ void __launch_bounds__(THREADS)
        shift_kernel(const __grid_constant__ struct token_shift_args a)
{
	const int64_t pieces = a.width / 8, index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t channel = index % pieces * 8, output = a.batch * a.seq_len * a.width;
	bf16 *out = static_cast<bf16 *>(a.out) + channel;
	float x[8], before[8], mix[8], y[8], kept[N][8];

	if (index / pieces >= count_segments(a))
		return;
	keep_mixes<FORM, N>(kept, a, channel);
	const struct segment s = segment_of(a, index / pieces);
	clear(before);
	if (!s.begins)
		load8(before, elements(a.x) + (s.first - 1) * a.width + channel);
	for (int64_t r = s.first; r < s.last; r++) {
		vector8 stored[N];

		load8(x, elements(a.x) + r * a.width + channel);
#pragma unroll
		for (int n = 0; n < N; n++)
			if (FORM == SHIFT_VARIABLE)
				stored[n] =
				        load8(elements(a.mix) + n * output + r * a.width + channel);
#pragma unroll
		for (int n = 0; n < N; n++) {
			get_mix<FORM, N>(mix, stored[n], kept, n);
#pragma unroll
			for (int i = 0; i < 8; i++)
				y[i] = fmaf(before[i] - x[i], mix[i], x[i]);
			store8(out + n * output + r * a.width, y);
		}
#pragma unroll
		for (int i = 0; i < 8; i++)
			before[i] = x[i];
	}
	if (a.last && s.last == s.end)
		store8(static_cast<bf16 *>(a.last) + (s.end / a.seq_len - 1) * a.width + channel,
		       before);
}

/* What the outputs of a token owe to the token before: the sum of dout mix. */
template <enum shift FORM, int N>
static __device__ __forceinline__ void
load_carry(float (&carry)[8], const struct token_shift_backward_args &a, int64_t r, int64_t channel,
           const float (&kept)[N][8])
{
	const struct token_shift_args &f = a.forward;
	const int64_t output = f.batch * f.seq_len * f.width, place = r * f.width + channel;
	float dout[8], mix[8];

#pragma unroll
	for (int n = 0; n < N; n++) {
		vector8 stored = {};

		load8(dout, elements(a.dout) + n * output + place);
		if (FORM == SHIFT_VARIABLE)
			stored = load8(elements(f.mix) + n * output + place);
		get_mix<FORM, N>(mix, stored, kept, n);
#pragma unroll
		for (int i = 0; i < 8; i++)
			carry[i] = fmaf(dout[i], mix[i], carry[i]);
	}
}

/* One token: dx, and the gradients of its mixes, which are stored or added to `sums`; the carry
 * becomes its own. */
template <enum shift FORM, int N>
static __device__ __forceinline__ void
token_backward(const struct token_shift_backward_args &a, int64_t r, int64_t channel,
               const float (&x)[8], const float (&before)[8], float (&carry)[8],
               float (&sums)[N][8], const float (&kept)[N][8])
{
	const struct token_shift_args &f = a.forward;
	const int64_t output = f.batch * f.seq_len * f.width, place = r * f.width + channel;
	vector8 douts[N], mixes[N];
	float dx[8], next[8] = {}, dout[8], mix[8];

#pragma unroll
	for (int n = 0; n < N; n++) {
		douts[n] = load8(elements(a.dout) + n * output + place);
		if (FORM == SHIFT_VARIABLE)
			mixes[n] = load8(elements(f.mix) + n * output + place);
	}
	if (a.dresidual)
		load8(dx, elements(a.dresidual) + place);
	else
		clear(dx);
#pragma unroll
	for (int i = 0; i < 8; i++)
		dx[i] += carry[i];
#pragma unroll
	for (int n = 0; n < N; n++) {
		unpack8(dout, douts[n]);
		get_mix<FORM, N>(mix, mixes[n], kept, n);
#pragma unroll
		for (int i = 0; i < 8; i++) {
			dx[i] = fmaf(dout[i], 1.0f - mix[i], dx[i]);
			next[i] = fmaf(dout[i], mix[i], next[i]);
			dout[i] *= before[i] - x[i];
			if (FORM == SHIFT_CONSTANT)
				sums[n][i] += dout[i];
		}
		if (FORM == SHIFT_VARIABLE)
			store8(static_cast<bf16 *>(a.dmix) + n * output + place, dout);
	}
	store8(static_cast<bf16 *>(a.dx) + place, dx);
#pragma unroll
	for (int i = 0; i < 8; i++)
		carry[i] = next[i];
}

/* parts [gridDim.y, N, width], iff the mixes are constant. */
template <enum shift FORM, int N>
static __global__ void __launch_bounds__(THREADS)
        shift_backward_kernel(const __grid_constant__ struct token_shift_backward_args a,
                              float *parts)
{
	const struct token_shift_args &f = a.forward;
	const int64_t channel = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	float sums[N][8] = {}, kept[N][8];

	if (channel >= f.width)
		return;
	keep_mixes<FORM, N>(kept, f, channel);
	for (int64_t number = blockIdx.y; number < count_segments(f); number += gridDim.y) {
		const struct segment s = segment_of(f, number);
		float x[8], before[8], carry[8] = {};

		if (s.last < s.end)
			load_carry<FORM, N>(carry, a, s.last, channel, kept);
		load8(x, elements(f.x) + (s.last - 1) * f.width + channel);
		for (int64_t r = s.last - 1; r >= s.first; r--) {
			clear(before);
			if (r > s.first || !s.begins)
				load8(before, elements(f.x) + (r - 1) * f.width + channel);
			token_backward<FORM, N>(a, r, channel, x, before, carry, sums, kept);
#pragma unroll
			for (int i = 0; i < 8; i++)
				x[i] = before[i];
		}
	}
#pragma unroll
	for (int n = 0; FORM == SHIFT_CONSTANT && n < N; n++)
		store8f(parts + ((int64_t)blockIdx.y * N + n) * f.width + channel, sums[n]);
}

static __global__ void __launch_bounds__(THREADS)
        shift_step_kernel(const __grid_constant__ struct token_shift_step_args a)
{
	const bool moves = a.form == SHIFT_CONSTANT;
	const int64_t place = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t count = a.batch * a.width;
	float x[8], before[8], mix[8], y[8];

	if (place >= count)
		return;
	load8(x, elements(a.x) + place);
	load8(before, elements(moves ? a.state : a.before) + place);
#pragma unroll 1
	for (int64_t n = 0; n < a.n_out; n++) {
		if (moves)
			load8f(mix, a.weight + n * a.width + place % a.width);
		else
			load8(mix, elements(a.mix) + n * count + place);
#pragma unroll
		for (int i = 0; i < 8; i++)
			y[i] = fmaf(before[i] - x[i], mix[i], x[i]);
		store8(static_cast<bf16 *>(a.out) + n * count + place, y);
	}
	if (moves && a.before)
		store8(static_cast<bf16 *>(a.before) + place, before);
	if (moves)
		store8(static_cast<bf16 *>(a.state) + place, x);
}

/* Kernels by their number of outputs. */
using forward_kernel = void (*)(struct token_shift_args);
using backward_kernel = void (*)(struct token_shift_backward_args, float *);

template <enum shift FORM> static forward_kernel forward_of(int64_t n_out)
{
	static constexpr forward_kernel kernels[MOST_OUTPUTS] = {
	        shift_kernel<FORM, 1>, shift_kernel<FORM, 2>, shift_kernel<FORM, 3>,
	        shift_kernel<FORM, 4>, shift_kernel<FORM, 5>};

	return kernels[n_out - 1];
}

template <enum shift FORM> static backward_kernel backward_of(int64_t n_out)
{
	static constexpr backward_kernel kernels[MOST_OUTPUTS] = {
	        shift_backward_kernel<FORM, 1>, shift_backward_kernel<FORM, 2>,
	        shift_backward_kernel<FORM, 3>, shift_backward_kernel<FORM, 4>,
	        shift_backward_kernel<FORM, 5>};

	return kernels[n_out - 1];
}

static const char *check_shift(enum shift form, int64_t n_out, int64_t width)
{
	if (!is_known_shift(form))
		return "an unknown form of shift";
	if (n_out < 1 || n_out > MOST_OUTPUTS)
		return "more than five outputs";
	return check_widths(width);
}

static int64_t backward_splits(const struct device *device, const struct token_shift_args *f)
{
	const int64_t wanted = count_shares(device, count_segments(*f), BLOCKS_PER_SM,
	                                    divide_up(f->width, 8 * THREADS));

	return wanted < 65535 ? wanted : 65535;
}

} // namespace

extern "C" const char *portable_token_shift_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct token_shift_args *>(args);

	return either(check_shift(a->form, a->n_out, a->width),
	              check_aligned(a->x, a->mix, a->out, a->last));
}

extern "C" enum status portable_token_shift(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct token_shift_args *>(args);
	const int64_t threads = count_segments(*a) * (a->width / 8);

	return launch_each(device, "token_shift",
	                   a->form == SHIFT_CONSTANT ? forward_of<SHIFT_CONSTANT>(a->n_out)
	                                             : forward_of<SHIFT_VARIABLE>(a->n_out),
	                   threads, THREADS, *a);
}

extern "C" const char *portable_token_shift_backward_unsupported(const struct device *,
                                                                 const void *args)
{
	const auto *a = static_cast<const struct token_shift_backward_args *>(args);
	const struct token_shift_args *f = &a->forward;

	return either(check_shift(f->form, f->n_out, f->width),
	              check_aligned(f->x, f->mix, a->dout, a->dresidual, a->dx, a->dmix));
}

extern "C" size_t portable_token_shift_backward_workspace(const struct device *device,
                                                          const void *args)
{
	const auto *a = static_cast<const struct token_shift_backward_args *>(args);
	const struct token_shift_args *f = &a->forward;

	return f->form == SHIFT_CONSTANT
	               ? (size_t)(backward_splits(device, f) * f->n_out * f->width) * sizeof(float)
	               : 0;
}

extern "C" enum status portable_token_shift_backward(struct device *device, const void *args,
                                                     void *workspace)
{
	const auto *a = static_cast<const struct token_shift_backward_args *>(args);
	const struct token_shift_args *f = &a->forward;
	const bool constant = f->form == SHIFT_CONSTANT;
	const int64_t splits = backward_splits(device, f), sums = f->n_out * f->width;
	const dim3 grid((unsigned)divide_up(f->width, 8 * THREADS), (unsigned)splits);
	float *parts = static_cast<float *>(workspace);
	const enum status status = launch(device, "token_shift_backward",
	                                  constant ? backward_of<SHIFT_CONSTANT>(f->n_out)
	                                           : backward_of<SHIFT_VARIABLE>(f->n_out),
	                                  grid, THREADS, 0, *a, parts);

	if (status != STATUS_OK || !constant)
		return status;
	return column_sums(device, "token_shift_backward", parts, splits, sums, sums, a->dweight);
}

extern "C" const char *portable_token_shift_step_unsupported(const struct device *,
                                                             const void *args)
{
	const auto *a = static_cast<const struct token_shift_step_args *>(args);

	return either(!is_known_shift(a->form) ? "an unknown form of shift"
	                                       : check_widths(a->width),
	              check_aligned(a->x, a->mix, a->state, a->before, a->out));
}

extern "C" enum status portable_token_shift_step(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct token_shift_step_args *>(args);

	return launch_each(device, "token_shift_step", shift_step_kernel, a->batch * a->width / 8,
	                   THREADS, *a);
}
