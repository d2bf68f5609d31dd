/*
 * The gate of the RG-LRU and its gradients. Bound by memory: a thread owns eight channels of TOKENS
 * tokens, or of a share of them, so that what depends on the channel alone is computed once; the
 * shares of the parameters' gradients are added in a fixed order. 1 - a^2 comes from log a and
 * never cancels.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 128, TOKENS = 8, BLOCKS_PER_SM = 4;

/* With x = log a: a^2, 1 - a^2, and the inverse of the root of that. The second is close to a = 1
 * by the series of 1 - e^y, y = 2 x: -y (1 + y/2 (1 + y/3 (...))). */
struct decayed {
	float square, rest, inverse_root;
};

static __device__ __forceinline__ struct decayed decayed_of(float x)
{
	const float y = 2.0f * x, square = exp2_fast(2.0f * LOG2E * x);
	float p = 1.0f / 5040.0f;

	p = fmaf(p, y, 1.0f / 720.0f);
	p = fmaf(p, y, 1.0f / 120.0f);
	p = fmaf(p, y, 1.0f / 24.0f);
	p = fmaf(p, y, 1.0f / 6.0f);
	p = fmaf(p, y, 0.5f);
	p = -y * fmaf(p, y, 1.0f);
	const float rest = y > -0.25f ? p : 1.0f - square;

	return {square, rest, rsqrt_fast(rest)};
}

/* Whether a root is of anything that has an inverse; true of NaN. */
static __device__ __forceinline__ bool is_open(const struct decayed &d)
{
	return !(d.rest < 1.2e-38f);
}

/* Eight channels: the gates' biases times -log2(e), -8 softplus(rate) and the derivative of its
 * logarithm. */
struct channels {
	float bias[2][8], rate[8], slope[8];
};

static __device__ __forceinline__ void load_channels(struct channels &c,
                                                     const struct lru_gate_args &a, int64_t channel)
{
	load8f(c.bias[0], a.bias + channel);
	load8f(c.bias[1], a.bias + a.width + channel);
	load8f(c.rate, a.rate + channel);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float x = c.rate[i];
		const float softplus = (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));

		/* sigmoid(x) / softplus(x), which goes to 1. */
		c.bias[0][i] *= -LOG2E;
		c.bias[1][i] *= -LOG2E;
		c.slope[i] = x < -15.0f ? 1.0f : 1.0f / ((1.0f + expf(-x)) * softplus);
		c.rate[i] = -LRU_SHARPNESS * softplus;
	}
}

/* The sigmoid of a logit and its bias, which was scaled. */
static __device__ __forceinline__ float sigmoid_of(float logit, float bias)
{
	return reciprocal_fast(1.0f + exp2_fast(fmaf(-LOG2E, logit, bias)));
}

static __device__ __forceinline__ int64_t first_position(const struct lru_gate_args &a)
{
	return a.position ? *a.position : 0;
}

static __global__ void __launch_bounds__(THREADS)
        lru_gate_kernel(const __grid_constant__ struct lru_gate_args a)
{
	const int64_t pieces = a.width / 8, n_tokens = a.batch * a.seq_len;
	const int64_t index = (int64_t)blockIdx.x * THREADS + threadIdx.x;
	const int64_t channel = index % pieces * 8, first = index / pieces * TOKENS;
	const int64_t last = min(first + TOKENS, n_tokens), position = first_position(a);
	const bf16 *logit = static_cast<const bf16 *>(a.logit) + channel;
	struct channels c;

	if (first >= n_tokens)
		return;
	load_channels(c, a, channel);
#pragma unroll 2
	for (int64_t n = first; n < last; n++) {
		const bool begins = n % a.seq_len + position == 0;
		const int64_t at_row = n * a.width + channel;
		float r[8], gate[8], x[8];

		load8(r, logit + 2 * n * a.width);
		load8(gate, logit + (2 * n + 1) * a.width);
		load8(x, static_cast<const bf16 *>(a.x) + at_row);
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const float log = c.rate[i] * sigmoid_of(r[i], c.bias[0][i]);
			const struct decayed d = decayed_of(log);
			const float root = is_open(d) ? d.rest * d.inverse_root : 0.0f;
			const float scale = begins ? 1.0f : root;

			r[i] = log;
			x[i] *= scale * sigmoid_of(gate[i], c.bias[1][i]);
		}
		store8(static_cast<bf16 *>(a.log_decay) + at_row, r);
		store8(static_cast<bf16 *>(a.out) + at_row, x);
	}
}

/* With l = log a, s = sqrt(1 - a^2): ds/dl = -a^2 / s, and l is proportional to r and to
 * softplus(rate): l / s appears, which goes to 0 as l does. parts [gridDim.y, 3, width]: dbias,
 * drate. */
static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        lru_gate_backward_kernel(const __grid_constant__ struct lru_gate_backward_args a,
                                 float *parts)
{
	const struct lru_gate_args &f = a.forward;
	const int64_t channel = 8 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
	const int64_t n_tokens = f.batch * f.seq_len, position = first_position(f);
	const bf16 *logit = static_cast<const bf16 *>(f.logit) + channel;
	float dbias[2][8] = {}, drate[8] = {};
	struct channels c;

	if (channel >= f.width)
		return;
	load_channels(c, f, channel);
	for (int64_t n = blockIdx.y; n < n_tokens; n += gridDim.y) {
		const bool begins = n % f.seq_len + position == 0;
		const int64_t at_row = n * f.width + channel, at_logit = 2 * n * f.width;
		bf16 *dlogit = static_cast<bf16 *>(a.dlogit) + channel + at_logit;
		float r[8], gate[8], x[8], d_log[8], dout[8];

		load8(r, logit + at_logit);
		load8(gate, logit + at_logit + f.width);
		load8(x, static_cast<const bf16 *>(f.x) + at_row);
		load8(d_log, static_cast<const bf16 *>(a.dlog_decay) + at_row);
		load8(dout, static_cast<const bf16 *>(a.dout) + at_row);
#pragma unroll
		for (int i = 0; i < 8; i++) {
			const struct sigmoids z = sigmoids_of(fmaf(-LOG2E, r[i], c.bias[0][i]));
			const struct sigmoids y = sigmoids_of(fmaf(-LOG2E, gate[i], c.bias[1][i]));
			const float log = c.rate[i] * z.of;
			const struct decayed d = decayed_of(log);
			const bool open = is_open(d);
			const float ratio = open ? log * d.inverse_root : 0.0f;
			const float root = open ? d.rest * d.inverse_root : 0.0f;
			const float scaled = dout[i] * y.of, scale = begins ? 1.0f : root;
			const float slope = begins ? 0.0f : d.square * ratio;
			const float dlog = fmaf(-scaled * x[i], slope, d_log[i] * log);

			r[i] = dlog * z.of_minus;
			gate[i] = scaled * scale * x[i] * y.of_minus;
			x[i] = scaled * scale;
			dbias[0][i] += r[i];
			dbias[1][i] += gate[i];
			drate[i] += dlog * c.slope[i];
		}
		store8(dlogit, r);
		store8(dlogit + f.width, gate);
		store8(static_cast<bf16 *>(a.dx) + at_row, x);
	}
	parts += blockIdx.y * 3 * f.width + channel;
	store8f(parts, dbias[0]);
	store8f(parts + f.width, dbias[1]);
	store8f(parts + 2 * f.width, drate);
}

static int64_t shares_of(const struct device *device, const struct lru_gate_args *f)
{
	return count_shares(device, f->batch * f->seq_len, BLOCKS_PER_SM,
	                    divide_up(f->width, 8 * THREADS));
}

} // namespace

extern "C" const char *portable_lru_gate_unsupported(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct lru_gate_args *>(args);

	return check_widths(a->width);
}

extern "C" enum status portable_lru_gate(struct device *device, const void *args, void *)
{
	const auto *a = static_cast<const struct lru_gate_args *>(args);
	const int64_t threads = divide_up(a->batch * a->seq_len, TOKENS) * (a->width / 8);

	return launch_each(device, "lru_gate", lru_gate_kernel, threads, THREADS, *a);
}

extern "C" const char *portable_lru_gate_backward_unsupported(const struct device *,
                                                              const void *args)
{
	const auto *a = static_cast<const struct lru_gate_backward_args *>(args);

	return check_widths(a->forward.width);
}

extern "C" size_t portable_lru_gate_backward_workspace(const struct device *device,
                                                       const void *args)
{
	const auto *a = static_cast<const struct lru_gate_backward_args *>(args);

	return (size_t)(3 * shares_of(device, &a->forward) * a->forward.width) * sizeof(float);
}

extern "C" enum status portable_lru_gate_backward(struct device *device, const void *args,
                                                  void *workspace)
{
	const auto *a = static_cast<const struct lru_gate_backward_args *>(args);
	const int64_t shares = shares_of(device, &a->forward), width = a->forward.width;
	float *parts = static_cast<float *>(workspace);
	enum status status = launch(device, "lru_gate_backward", lru_gate_backward_kernel,
	                            dim3((unsigned)divide_up(width, 8 * THREADS), (unsigned)shares),
	                            THREADS, 0, *a, parts);

	if (status == STATUS_OK)
		status = column_sums(device, "lru_gate_backward", parts, shares, 3 * width,
		                     2 * width, a->dbias);
	return status != STATUS_OK ? status
	                           : column_sums(device, "lru_gate_backward", parts + 2 * width,
	                                         shares, 3 * width, width, a->drate);
}
