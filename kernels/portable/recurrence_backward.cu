/*
 * Gradients of the linear recurrence, in one pass over memory. With a the
 * decay and dh_t = dout_t sigmoid(z_t),
 *   c_t = a_t (dh_t + c_{t+1})      runs backward; lambda_t = dh_t + c_{t+1}
 *   dx = (1-a) lambda, dlogit = lambda (h_{t-1} - x) a (1-a)   (sigmoid gate)
 *   dx = lambda,       dgate  = lambda h_{t-1} a               (log decay)
 *   dz = dout h sigmoid'(z)
 * and dgate_base is added to dgate where there is one.
 * A block takes a tile of 64 channels, a warp ROWS consecutive tokens of it, a
 * lane two channels. Everything that does not depend on lambda is done while
 * the tile behind is still at work: of the forward's states only those before
 * each warp's first token are read, the others are computed again. Then the
 * tile's product of decays and its c from zero are published, the carry is
 * gathered from the tiles that follow in time (decoupled look-back: Merrill,
 * Garland 2016), which have been taken up before, and lambda is run through.
 *
 * Limit: memory, seven tensors: 2.04 ms for 262144 tokens x 2048, 3.7 TB/s.
 * docs/kernels/portable_recurrence_backward.md.
 */
#include "kernels/portable/column_sums.cuh"
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int ROWS = 16, WARPS = 8, THREADS = WARPS * WARP, BLOCKS_PER_SM = 2;
constexpr int TILE = ROWS * WARPS, SLAB = 64, PIECES = SLAB / 8;
constexpr int WINDOW = 4; /* links looked at in one step back */

/* A link of the chain: the bits of a decay and of a c. INCLUSIVE in place of the decay: c counts
 * everything behind. NOTHING is a pair of NaNs that no arithmetic makes. */
constexpr uint64_t NOTHING = ~(uint64_t)0;
constexpr float INCLUSIVE = -1.0f;

struct work {
	int tiles;              /* per sequence */
	uint32_t slabs, chains; /* per sequence, of all */
	uint64_t *links;        /* [tiles, batch, slabs, SLAB] */
	float *bias_parts;      /* [tiles * batch, D]: shares of dgate_bias */
	uint32_t *ticket;
};

union link {
	uint64_t bits;
	float value[2]; /* decay, c */
};

/* What a lane keeps of its two channels until it knows lambda. */
struct kept {
	float share[2][ROWS]; /* 1 - a; of the other form a itself */
	/* Pairs of bf16, what these would be between two operations; slope = dgate / lambda. */
	uint32_t dh[ROWS], slope[ROWS];
};

static __device__ __forceinline__ float half_of(uint32_t pair, int e)
{
	return e ? high_half(pair) : low_half(pair);
}

template <enum gate_form FORM> static __device__ __forceinline__ float decay_of(float share)
{
	return FORM == GATE_SIGMOID ? 1.0f - share : share;
}

/* Copies a thread's pieces of the tile of one tensor, every THREADS / PIECES rows one, `n` of them
 * valid. */
static __device__ __forceinline__ void load_tensor(bf16 *to, const bf16 *from, int64_t stride,
                                                   int n)
{
	constexpr int STEP = THREADS / PIECES;

#pragma unroll
	for (int i = 0; i < TILE / STEP; i++) {
		copy16_async(to + i * STEP * SLAB, from, i < n);
		from += i + 1 < n ? stride : 0;
	}
}

/* x, gate, dout, z of the tile, [rows of the tile][SLAB] each; zeros where there is nothing. */
template <bool Z>
static __device__ __forceinline__ void
load_tile(bf16 *tile, const struct recurrence_backward_args &a, int b, int64_t first, int channel)
{
	constexpr int STEP = THREADS / PIECES;
	const struct recurrence_args &f = a.forward;
	const int row = threadIdx.x / PIECES, column = threadIdx.x % PIECES * 8;
	const int rows = (int)min(f.seq_len - first, (int64_t)TILE) - row;
	const bool has_channel = channel + column < f.d_model;
	const int n = has_channel ? (rows + STEP - 1) / STEP : 0;
	const int64_t t = n > 0 ? first + row : 0, c = n > 0 ? channel + column : 0;
	bf16 *const to = tile + row * SLAB + column;

	load_tensor(to, at(f.x, b, t, 0) + c, STEP * f.x.token, n);
	load_tensor(to + TILE * SLAB, at(f.gate, b, t, 0) + c, STEP * f.gate.token, n);
	load_tensor(to + 2 * TILE * SLAB, at(a.dout, b, t, 0) + c, STEP * a.dout.token, n);
	if (Z)
		load_tensor(to + 3 * TILE * SLAB, at(f.z, b, t, 0) + c, STEP * f.z.token, n);
	copy_commit();
}

/* The two channels of the state before token t. */
static __device__ __forceinline__ void load_state(float (&h)[2], const struct recurrence_args &f,
                                                  int64_t b, int64_t t, int64_t channel)
{
	h[0] = h[1] = 0.0f;
	if (channel >= f.d_model || t > f.seq_len)
		return;
	if (t > 0) {
		const uint32_t pair = *reinterpret_cast<const uint32_t *>(
		        at(f.h.data ? f.h : f.out, b, t - 1, 0) + channel);

		h[0] = low_half(pair);
		h[1] = high_half(pair);
	} else if (f.h0) {
		h[0] = f.h0[b * f.d_model + channel];
		h[1] = f.h0[b * f.d_model + channel + 1];
	}
}

/* One channel of one token, all that needs no lambda: advances h; returns dz. The logit comes times
 * -log2(e), or of the other form times log2(e). */
template <bool Z, enum gate_form FORM>
static __device__ __forceinline__ float advance(float &h, float x, float logit, float z, float dout,
                                                float &share, float &dh, float &slope)
{
	const float before = h;

	if (FORM == GATE_SIGMOID) {
		const struct sigmoids g = sigmoids_of(logit);
		const float step = before - x;

		share = g.of_minus;
		h = x + g.of * step;
		slope = g.of * share * step;
	} else {
		share = exp2_fast(logit);
		h = share * before + x;
		slope = before * share;
	}
	dh = dout;
	if (!Z)
		return 0.0f;
	const float g = reciprocal_fast(1.0f + exp2_fast(-LOG2E * z));
	dh = dout * g;
	return dh * (h - h * g);
}

/*
 * c of the tile's successor in time, for the lane's two channels: back to the
 * nearest final c, and from there the tiles' own in the order of the chain, as
 * each of them has computed its own, so that the result does not depend on
 * timing. The first link is final from the start.
 */
static __device__ __forceinline__ void look_back(float (&carry)[2], const uint64_t *links,
                                                 int64_t stride, int tile)
{
#pragma unroll
	for (int e = 0; e < 2; e++) {
		union link seen[WINDOW];
		int last = tile - 1; /* the final one, when it is found */
		bool found = tile == 0;

		carry[e] = 0.0f;
		while (!found) {
#pragma unroll
			for (int i = 0; i < WINDOW; i++)
				seen[i].bits = load_relaxed(links + max(last - i, 0) * stride + e);
#pragma unroll
			for (int i = 0; i < WINDOW; i++) {
				if (found || seen[i].bits == NOTHING)
					break;
				found = seen[i].value[0] == INCLUSIVE;
				carry[e] = seen[i].value[1];
				last -= !found;
			}
		}
		for (int k = last + 1; k < tile; k += WINDOW) {
#pragma unroll
			for (int i = 0; i < WINDOW; i++)
				seen[i].bits =
				        load_relaxed(links + min(k + i, tile - 1) * stride + e);
#pragma unroll
			for (int i = 0; i < WINDOW; i++)
				if (k + i < tile)
					carry[e] = seen[i].value[0] == INCLUSIVE
					                   ? seen[i].value[1]
					                   : fmaf(seen[i].value[0], carry[e],
					                          seen[i].value[1]);
		}
	}
}

template <bool Z, enum gate_form FORM>
static __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
        recurrence_backward_kernel(const __grid_constant__ struct recurrence_backward_args a,
                                   const __grid_constant__ struct work work)
{
	const struct recurrence_args &f = a.forward;
	const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
	bf16 *const tile = reinterpret_cast<bf16 *>(shared_memory);
	float4 *const parts = reinterpret_cast<float4 *>(tile + (Z ? 4 : 3) * TILE * SLAB);
	float2 *const carries = reinterpret_cast<float2 *>(parts + WARPS * WARP);
	uint32_t *const ticket = reinterpret_cast<uint32_t *>(carries + WARP);
	struct kept kept;
	float bias[2] = {}, h[2], decay[2], c[2];

	if (threadIdx.x == 0)
		*ticket = take_ticket(work.ticket);
	__syncthreads();
	/* Tile `order` of its chain, counted from the last in time. All tiles of a sequence come
	 * before the next sequence's: what is at work at the same time lies close together. */
	const uint32_t per_sequence = (uint32_t)work.tiles * work.slabs;
	const int b = (int)(*ticket / per_sequence), rest = (int)(*ticket % per_sequence);
	const int order = rest / (int)work.slabs, slab_index = rest % (int)work.slabs;
	const uint32_t chains = work.chains, chain = (uint32_t)b * work.slabs + slab_index;
	const int slab = slab_index * SLAB, channel = slab + 2 * lane;
	const int64_t tile_first = (int64_t)(work.tiles - 1 - order) * TILE;
	const int64_t first = tile_first + warp * ROWS;
	const bool has_channel = channel < f.d_model;

	load_tile<Z>(tile, a, b, tile_first, slab);
	load_state(h, f, b, first, channel);
	constexpr float UNIT = FORM == GATE_SIGMOID ? -LOG2E : LOG2E;
	if (f.gate_bias && has_channel) {
		bias[0] = f.gate_bias[channel] * UNIT;
		bias[1] = f.gate_bias[channel + 1] * UNIT;
	}
	copy_wait<0>();
	__syncthreads();
	const uint32_t *const row0 =
	        reinterpret_cast<const uint32_t *>(tile + warp * ROWS * SLAB) + lane;
	constexpr int STEP = SLAB / 2, TENSOR = TILE * SLAB / 2;
	const int n = (int)min(f.seq_len - first, (int64_t)ROWS); /* its tokens, or none */
	bf16 *dz = at(a.dz, b, first, 0) + channel;
#pragma unroll
	for (int i = 0; i < ROWS; i++) {
		const uint32_t x = row0[i * STEP], gate = row0[TENSOR + i * STEP];
		const uint32_t dout = row0[2 * TENSOR + i * STEP];
		const uint32_t z = Z ? row0[3 * TENSOR + i * STEP] : 0;
		float dh[2], slope[2];
		const float dz0 = advance<Z, FORM>(
		        h[0], low_half(x), low_half(gate) * UNIT + bias[0], low_half(z),
		        low_half(dout), kept.share[0][i], dh[0], slope[0]);
		const float dz1 = advance<Z, FORM>(
		        h[1], high_half(x), high_half(gate) * UNIT + bias[1], high_half(z),
		        high_half(dout), kept.share[1][i], dh[1], slope[1]);

		kept.dh[i] = pack(dh[0], dh[1]);
		kept.slope[i] = pack(slope[0], slope[1]);
		if (Z && has_channel && i < n)
			*reinterpret_cast<uint32_t *>(dz) = pack(dz0, dz1);
		dz += a.dz.token;
	}
#pragma unroll
	for (int e = 0; e < 2; e++) {
		decay[e] = 1.0f;
		c[e] = 0.0f;
#pragma unroll
		for (int i = ROWS - 1; i >= 0; i--) {
			const float g = decay_of<FORM>(kept.share[e][i]);

			c[e] = g * (half_of(kept.dh[i], e) + c[e]);
			decay[e] *= g;
		}
	}
	parts[warp * WARP + lane] = make_float4(decay[0], c[0], decay[1], c[1]);
	__syncthreads();
	if (warp == 0) {
		uint64_t *const mine =
		        work.links + ((int64_t)order * chains + chain) * SLAB + 2 * lane;
		union link link[2];
		float carry[2];

		for (int e = 0; e < 2; e++) {
			decay[e] = 1.0f;
			c[e] = 0.0f;
		}
#pragma unroll
		for (int w = WARPS - 1; w >= 0; w--) {
			const float4 part = parts[w * WARP + lane];

			c[0] = part.y + part.x * c[0];
			c[1] = part.w + part.z * c[1];
			decay[0] *= part.x;
			decay[1] *= part.z;
		}
		for (int e = 0; e < 2 && order > 0; e++) {
			link[e].value[0] = decay[e];
			link[e].value[1] = c[e];
			store_relaxed(mine + e, link[e].bits);
		}
		look_back(carry, work.links + (int64_t)chain * SLAB + 2 * lane,
		          (int64_t)chains * SLAB, order);
		carries[lane] = make_float2(carry[0], carry[1]);
		for (int e = 0; e < 2; e++) {
			c[e] = fmaf(decay[e], carry[e], c[e]);
			link[e].value[0] = INCLUSIVE;
			link[e].value[1] = c[e];
			store_relaxed(mine + e, link[e].bits);
		}
		if (a.dh0 && tile_first == 0 && has_channel) {
			a.dh0[b * f.d_model + channel] = c[0];
			a.dh0[b * f.d_model + channel + 1] = c[1];
		}
	}
	__syncthreads();
	c[0] = carries[lane].x;
	c[1] = carries[lane].y;
	for (int w = WARPS - 1; w > warp; w--) {
		const float4 part = parts[w * WARP + lane];

		c[0] = part.y + part.x * c[0];
		c[1] = part.w + part.z * c[1];
	}
	float sums[2] = {};
	bf16 *to_dx = at(a.dx, b, first + ROWS - 1, 0) + channel;
	bf16 *to_dgate = at(a.dgate, b, first + ROWS - 1, 0) + channel;
	const bf16 *from = at(a.dgate_base, b, first + ROWS - 1, 0) + channel;
#pragma unroll
	for (int i = ROWS - 1; i >= 0; i--) {
		float dx[2], dgate[2];

#pragma unroll
		for (int e = 0; e < 2; e++) {
			const float lambda = half_of(kept.dh[i], e) + c[e];

			dx[e] = FORM == GATE_SIGMOID ? kept.share[e][i] * lambda : lambda;
			dgate[e] = half_of(kept.slope[i], e) * lambda;
			sums[e] += dgate[e];
			c[e] = decay_of<FORM>(kept.share[e][i]) * lambda;
		}
		if (has_channel && i < n) {
			if (a.dgate_base.data) {
				const uint32_t base = *reinterpret_cast<const uint32_t *>(from);

				dgate[0] += low_half(base);
				dgate[1] += high_half(base);
			}
			*reinterpret_cast<uint32_t *>(to_dx) = pack(dx[0], dx[1]);
			*reinterpret_cast<uint32_t *>(to_dgate) = pack(dgate[0], dgate[1]);
		}
		to_dx -= a.dx.token;
		to_dgate -= a.dgate.token;
		from -= a.dgate_base.token;
	}
	if (!f.gate_bias)
		return;
	__syncthreads();
	parts[warp * WARP + lane] = make_float4(sums[0], sums[1], 0.0f, 0.0f);
	__syncthreads();
	if (warp != 0 || !has_channel)
		return;
	for (int w = 1; w < WARPS; w++) {
		sums[0] += parts[w * WARP + lane].x;
		sums[1] += parts[w * WARP + lane].y;
	}
	float *const to = work.bias_parts + ((int64_t)order * f.batch + b) * f.d_model + channel;
	to[0] = sums[0];
	to[1] = sums[1];
}

static __global__ void __launch_bounds__(256)
        clear_kernel(uint64_t *links, int64_t count, uint32_t *ticket)
{
	const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;

	if (i < count)
		links[i] = NOTHING;
	if (i == 0)
		*ticket = 0;
}

static struct work work_of(const struct recurrence_args *f, void *workspace)
{
	const int64_t tiles = divide_up(f->seq_len, TILE), slabs = divide_up(f->d_model, SLAB);
	struct work w;

	w.tiles = (int)tiles;
	w.slabs = (uint32_t)slabs;
	w.chains = (uint32_t)(f->batch * slabs);
	w.links = static_cast<uint64_t *>(workspace);
	w.bias_parts = reinterpret_cast<float *>(w.links + tiles * f->batch * slabs * SLAB);
	w.ticket = reinterpret_cast<uint32_t *>(w.bias_parts + tiles * f->batch * f->d_model);
	return w;
}

static enum status run(struct device *device, const struct recurrence_backward_args *a,
                       void *workspace)
{
	const struct recurrence_args *f = &a->forward;
	const struct work w = work_of(f, workspace);
	const int64_t chains = w.chains, links = w.tiles * chains * SLAB;
	const bool z = f->z.data != NULL, logistic = f->form == GATE_SIGMOID;
	const size_t shared = (z ? 4 : 3) * TILE * SLAB * sizeof(bf16) +
	                      WARPS * WARP * sizeof(float4) + WARP * sizeof(float2) + 16;
	enum status status =
	        launch(device, "recurrence_backward", clear_kernel,
	               dim3((unsigned)divide_up(links, 256)), 256, 0, w.links, links, w.ticket);

	if (status == STATUS_OK)
		status = launch(device, "recurrence_backward",
		                z ? logistic ? recurrence_backward_kernel<true, GATE_SIGMOID>
		                             : recurrence_backward_kernel<true, GATE_LOG_DECAY>
		                : logistic ? recurrence_backward_kernel<false, GATE_SIGMOID>
		                           : recurrence_backward_kernel<false, GATE_LOG_DECAY>,
		                dim3((unsigned)(w.tiles * chains)), THREADS, shared, *a, w);
	if (status == STATUS_OK && f->gate_bias)
		status = column_sums(device, "recurrence_backward", w.bias_parts,
		                     (int64_t)w.tiles * f->batch, f->d_model, f->d_model,
		                     a->dgate_bias);
	return status;
}

} // namespace

extern "C" const char *portable_recurrence_backward_unsupported(const struct device *,
                                                                const void *args)
{
	const auto *a = static_cast<const struct recurrence_backward_args *>(args);
	const struct recurrence_args *f = &a->forward;

	if (!is_known_gate(f->form))
		return "an unknown form of gate";
	if (f->d_model % 8)
		return "width must be a multiple of 8";
	if (divide_up(f->seq_len, TILE) * f->batch * divide_up(f->d_model, SLAB) > INT32_MAX)
		return "too many tiles";
	return check_aligned(&f->x, &f->gate, &f->z, &f->h, &f->out, &a->dout, &a->dgate_base,
	                     &a->dx, &a->dgate, &a->dz);
}

extern "C" size_t portable_recurrence_backward_workspace(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct recurrence_backward_args *>(args);
	const struct work w = work_of(&a->forward, NULL);

	return (size_t)(reinterpret_cast<const char *>(w.ticket + 4) - (const char *)NULL);
}

extern "C" enum status portable_recurrence_backward(struct device *device, const void *args,
                                                    void *workspace)
{
	const auto *a = static_cast<const struct recurrence_backward_args *>(args);
	return run(device, a, workspace);
}
