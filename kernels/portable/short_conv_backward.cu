/*
 * Gradients of the short convolution. With dpre the gradient before the silu,
 *   dx_t = sum over j of weight_j dpre_{t+3-j},  dweight_j = sum over t of dpre_t x_{t-3+j}.
 * Bound by memory, and all but by instructions. A thread owns four channels and walks down a
 * segment of the tokens, and the three behind it once more, since they complete its last dx; the
 * pre-activation is computed again. Token t's input and dx are kept in place t % 4, so that nothing
 * moves from token to token, and its loads are under way four tokens before. The sums over tokens
 * stay with the thread from segment to segment.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128, BLOCKS_PER_SM = 4, OWN = 4;
constexpr int64_t LONGEST = 128, SHORTEST = 16;

/* Four bf16, moved as 8 bytes. */
struct alignas(8) vector4 {
	uint32_t pair[2];
};

static __device__ __forceinline__ vector4 load4(const bf16 *from)
{
	return *reinterpret_cast<const vector4 *>(from);
}

static __device__ __forceinline__ void unpack4(float (&x)[OWN], const vector4 &v)
{
#pragma unroll
	for (int i = 0; i < 2; i++) {
		x[2 * i] = low_half(v.pair[i]);
		x[2 * i + 1] = high_half(v.pair[i]);
	}
}

static __device__ __forceinline__ void store4(bf16 *to, const float (&x)[OWN])
{
	*reinterpret_cast<vector4 *>(to) = {{pack(x[0], x[1]), pack(x[2], x[3])}};
}

/* A thread's channels: taps and bias, x and dx of the last four tokens, the parameters' gradients,
 * and what was loaded of the next four tokens. */
struct channels {
	float weight[CONV_WIDTH][OWN], bias[OWN];
	float x[CONV_WIDTH][OWN], dx[CONV_WIDTH][OWN];
	float dweight[CONV_WIDTH][OWN], dbias[OWN];
	vector4 next_x[CONV_WIDTH], next_dout[CONV_WIDTH];
};

/* A thread's way along a segment of `own` tokens, of which it loads `all`: the next rows to be
 * loaded, and the next to be stored. */
struct way {
	const bf16 *x, *dout;
	bf16 *dx;
	int64_t x_stride, dout_stride;
	int own, all;
};

static __device__ __forceinline__ void
start(struct channels &c, const struct short_conv_backward_args &a, int64_t channel)
{
#pragma unroll
	for (int i = 0; i < OWN; i++) {
		c.bias[i] = a.forward.bias ? a.forward.bias[channel + i] : 0.0f;
		c.dbias[i] = 0.0f;
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++) {
			c.weight[j][i] = a.forward.weight[(channel + i) * CONV_WIDTH + j];
			c.dweight[j][i] = 0.0f;
		}
	}
}

/* The next rows of x and of its first reader go to a place; zeros if they are not `there`. */
static __device__ __forceinline__ void load_rows(struct channels &c, struct way &w, int place,
                                                 bool there)
{
	c.next_x[place] = {};
	c.next_dout[place] = {};
	if (there) {
		c.next_x[place] = load4(w.x);
		c.next_dout[place] = load4(w.dout);
	}
	w.x += w.x_stride;
	w.dout += w.dout_stride;
}

/* The token in place P: its part of the dx of the four tokens up to it, and if OWNED the
 * parameters' gradients. */
template <int P, bool OWNED, bool SILU>
static __device__ __forceinline__ void advance(struct channels &c, const float (&dout)[OWN])
{
#pragma unroll
	for (int i = 0; i < OWN; i++) {
		float dpre = dout[i];

		if (SILU) {
			float pre = c.bias[i];

#pragma unroll
			for (int j = 0; j < CONV_WIDTH; j++)
				pre = fmaf(c.weight[j][i], c.x[(P + 1 + j) % CONV_WIDTH][i], pre);
			const float s = sigmoid(pre), value = pre * s;

			dpre *= fmaf(value, 1.0f - s, s);
		}
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++) {
			const int at = (P + 1 + j) % CONV_WIDTH;

			c.dx[at][i] = j < CONV_HISTORY ? fmaf(c.weight[j][i], dpre, c.dx[at][i])
			                               : c.weight[j][i] * dpre;
			if (OWNED)
				c.dweight[j][i] = fmaf(dpre, c.x[at][i], c.dweight[j][i]);
		}
		if (OWNED)
			c.dbias[i] += dpre;
	}
}

/* dout += the rows of the other readers. */
static __device__ __forceinline__ void add_readers(float (&dout)[OWN], const bf16 *first,
                                                   const struct short_conv_backward_args &a)
{
	float x[OWN];

	for (int64_t r = 1; r < a.n_readers; r++) {
		unpack4(x, load4(first + r * a.forward.channels));
#pragma unroll
		for (int i = 0; i < OWN; i++)
			dout[i] += x[i];
	}
}

/* The segment's token k, in place P = k % 4; the dx of the third before it is complete then. MANY:
 * readers. */
template <int P, bool OWNED, bool SILU, bool MANY>
static __device__ __forceinline__ void step(struct channels &c, struct way &w,
                                            const struct short_conv_backward_args &a, int k)
{
	float dout[OWN];

	unpack4(c.x[P], c.next_x[P]);
	unpack4(dout, c.next_dout[P]);
	if (MANY && k < w.all)
		add_readers(dout, w.dout - CONV_WIDTH * w.dout_stride, a);
	load_rows(c, w, P, k + CONV_WIDTH < w.all);
	advance<P, OWNED, SILU>(c, dout);
	if ((unsigned)(k - CONV_HISTORY) < (unsigned)w.own)
		store4(w.dx, c.dx[(P + 1) % CONV_WIDTH]);
	w.dx += w.x_stride;
}

/* Block column blockIdx.x of OWN THREADS channels; segments blockIdx.y, blockIdx.y + gridDim.y, ...
 * of `length` tokens, a multiple of four. parts [gridDim.y, 5 channels]: dweight, dbias. */
template <bool SILU, bool MANY>
static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        conv_backward_kernel(const __grid_constant__ struct short_conv_backward_args a,
                             int64_t length, float *parts)
{
	const struct short_conv_args &f = a.forward;
	const int64_t segments = divide_up(f.seq_len, length);
	const int64_t channel = OWN * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	struct channels c;

	if (channel >= f.channels)
		return;
	start(c, a, channel);
	for (int64_t item = blockIdx.y; item < f.batch * segments; item += gridDim.y) {
		const int64_t b = item / segments, first = item % segments * length;
		const int64_t last = min(first + length, f.seq_len), row = b * f.seq_len + first;
		struct way w = {static_cast<const bf16 *>(f.x) + row * f.x_stride + channel,
		                static_cast<const bf16 *>(a.dout) + row * a.n_readers * f.channels +
		                        channel,
		                static_cast<bf16 *>(a.dx) + (row - CONV_HISTORY) * f.x_stride +
		                        channel,
		                held(f.x_stride),
		                held(a.n_readers * f.channels),
		                (int)(last - first),
		                (int)(min(last + CONV_HISTORY, f.seq_len) - first)};
		int k = 0;

#pragma unroll
		for (int j = 1; j < CONV_WIDTH; j++) {
			vector4 before = {};

			if (first - CONV_WIDTH + j >= 0)
				before = load4(w.x + (j - CONV_WIDTH) * f.x_stride);
			unpack4(c.x[j], before);
#pragma unroll
			for (int i = 0; i < OWN; i++)
				c.dx[j][i] = 0.0f;
		}
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++)
			load_rows(c, w, j, j < w.all);
#pragma unroll 1
		for (; k < w.own; k += CONV_WIDTH) {
			step<0, true, SILU, MANY>(c, w, a, k);
			step<1, true, SILU, MANY>(c, w, a, k + 1);
			step<2, true, SILU, MANY>(c, w, a, k + 2);
			step<3, true, SILU, MANY>(c, w, a, k + 3);
		}
		step<0, false, SILU, MANY>(c, w, a, k);
		step<1, false, SILU, MANY>(c, w, a, k + 1);
		step<2, false, SILU, MANY>(c, w, a, k + 2);
	}
	float *const to = parts + blockIdx.y * (CONV_WIDTH + 1) * f.channels;
#pragma unroll
	for (int i = 0; i < OWN; i++) {
#pragma unroll
		for (int j = 0; j < CONV_WIDTH; j++)
			to[(channel + i) * CONV_WIDTH + j] = c.dweight[j][i];
		to[f.channels * CONV_WIDTH + channel + i] = c.dbias[i];
	}
}

/* How the work is cut: the longest segments of which each block still has several. */
struct cut {
	int64_t length, columns, splits;
};

static struct cut cut_of(const struct device *device, const struct short_conv_args *f)
{
	struct cut c = {LONGEST, divide_up(f->channels, OWN * THREADS), 0};
	const int64_t blocks = divide_up((int64_t)BLOCKS_PER_SM * cuda_sm_count(device), c.columns);

	while (c.length > SHORTEST && f->batch * divide_up(f->seq_len, c.length) < 8 * blocks)
		c.length /= 2;
	c.splits = count_shares(device, f->batch * divide_up(f->seq_len, c.length), BLOCKS_PER_SM,
	                        c.columns);
	return c;
}

} // namespace

extern "C" const char *portable_short_conv_backward_unsupported(const struct device *,
                                                                const void *args)
{
	const auto *a = static_cast<const struct short_conv_backward_args *>(args);
	const struct short_conv_args *f = &a->forward;

	if (!is_known_activation(f->curve))
		return "an unknown curve";
	if (f->x == a->dx)
		return "dx in the place of x";
	return either(check_widths(f->channels, f->x_stride), check_aligned(f->x, a->dx));
}

extern "C" size_t portable_short_conv_backward_workspace(const struct device *device,
                                                         const void *args)
{
	const auto *a = static_cast<const struct short_conv_backward_args *>(args);
	const struct short_conv_args *f = &a->forward;

	return (size_t)(cut_of(device, f).splits * (CONV_WIDTH + 1) * f->channels) * sizeof(float);
}

extern "C" enum status portable_short_conv_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const auto *a = static_cast<const struct short_conv_backward_args *>(args);
	const struct short_conv_args *f = &a->forward;
	const struct cut cut = cut_of(device, f);
	const int64_t splits = cut.splits, taps = CONV_WIDTH * f->channels;
	float *parts = static_cast<float *>(workspace);
	const bool silu = f->curve == CURVE_SILU, many = a->n_readers > 1;
	const auto kernel =
	        silu   ? many ? conv_backward_kernel<true, true> : conv_backward_kernel<true, false>
	          : many ? conv_backward_kernel<false, true>
	               : conv_backward_kernel<false, false>;
	enum status status = launch(device, "short_conv_backward", kernel,
	                            dim3((unsigned)cut.columns, (unsigned)splits), THREADS, 0, *a,
	                            cut.length, parts);

	if (status == STATUS_OK)
		status = column_sums(device, "short_conv_backward", parts, splits,
		                     taps + f->channels, taps, a->dweight);
	if (status != STATUS_OK || !f->bias)
		return status;
	return column_sums(device, "short_conv_backward", parts + taps, splits, taps + f->channels,
	                   f->channels, a->dbias);
}
