/*
 * The delta rule on sm_90a, DeltaNet and with decays that are one number per head and token
 * Gated DeltaNet:
 *   S <- a_t S; v'_t = beta_t (v_t - k_t S); S <- S + k_t^T v'_t; o_t = scale q_t S,
 * chunkwise, 64 tokens at a time, with the state on the chip.
 *
 * With G_t the sum of log2 a over the chunk's tokens up to t and S the state before the chunk,
 *   (I + A) v' = diag(beta) (v - diag(2^G) k S),  A_ts = beta_t 2^(G_t - G_s) k_t.k_s, s < t,
 * and from there on v' takes the place of v in the plain rule. The triangular
 * inverse does not depend on the state: one warpgroup computes it ahead, while
 * the state's warpgroups go through four dependent products per chunk:
 *   x = S^T k^T, o = S^T q^T;  v' = (v - 2^G x) ((I + A)^-1 diag(beta))^T;
 *   o += v' P^T;  S^T += (decayed v') k
 * all transposed, so that every left operand is already in the registers.
 *
 * The inverse is triangle.cuh's: A's blocks stay in the registers that k k^T came in.
 *
 * Roles and shared memory are the walk's (walk.cuh); the inverse and the scores have a ring each,
 * and go through it together. Walks too few for the machine are cut into segments, and each begins
 * so many chunks early that of the state before nothing is left: no state goes through memory, and
 * where gates are weak the last one's walk is the whole sequence.
 *
 * Limit: latency. A chunk of 128 x 128 takes 5,300 clocks of a multiprocessor, of which the tensor
 * cores work 2,560; solver and state each have a chain of dependent steps about as long as that.
 * docs/kernels/delta_rule.md.
 * wgmma in: delta_kernel
 */
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/walk.cuh"

using namespace hopper;

namespace
{

struct delta_rule {
	static constexpr bool SOLVES = true, BACKWARD = false, FOURTH = false, COPIES = false;

	template <int DK, int SLICES>
	static __device__ void score(const parameters &p, uint32_t shared);
	/* A chunk, with its outputs or for the state alone. */
	template <int DK, int SLICES>
	static __device__ float walk(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x,
	                             int chunk)
	{
		return step<DK, SLICES, true>(w, x, chunk);
	}
	template <int DK, int SLICES>
	static __device__ void approach(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x,
	                                int chunk)
	{
		step<DK, SLICES, false>(w, x, chunk);
	}
	template <int DK, int SLICES>
	static __device__ void finish(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x)
	{
		if (SLICES == 1)
			w.store(x, x.last - 1, w.o);
	}
	template <int DK, int SLICES, bool OUTPUTS>
	static __device__ float step(state_walk<DK, SLICES, true, delta_rule> &w, const piece &x,
	                             int chunk);
};

template <int DK, int SLICES> using shape = walk_shape<DK, SLICES, delta_rule>;

template <int DK, int SLICES, bool OUTPUTS>
__device__ __forceinline__ float delta_rule::step(state_walk<DK, SLICES, true, delta_rule> &w,
                                                  const piece &x, int chunk)
{
	using S = typename state_walk<DK, SLICES, true, delta_rule>::S;
	const uint32_t at = w.shared + w.stage.slot * S::STAGE_BYTES;
	const uint32_t powers = w.shared + S::POWERS + w.stage.slot * S::POWERS_BYTES;
	const uint32_t values = at + S::V + w.warpgroup * PANEL_BYTES;
	const uint64_t q = matrix_descriptor(at + S::Q, 16),
	               keys = matrix_descriptor(at + S::K, 16);
	const uint64_t k = matrix_descriptor(at + S::K, PANEL_BYTES);
	const uint64_t scores =
	        matrix_descriptor(w.shared + S::SCORES + w.slot.slot * PANEL_BYTES, 16);
	const uint64_t solved =
	        matrix_descriptor(w.shared + S::SOLVED + w.slot.slot * PANEL_BYTES, 16);
	/* Whether o goes on while the residual is formed: where there are registers for both. With
	 * one slice it leaves while the next chunk's x is computed, with two while the state is. */
	constexpr bool OVERLAP = DK == 64 || SLICES == 1;
	uint32_t packed[DK / 4], moved[16], decayed[16];
	float y[32], (&o)[32] = w.o;

	/* x into y, and o. */
	barrier_wait(w.shared + S::FULL + w.stage.slot * 8, w.stage.parity);
	const float whole = shared_float(powers + WHOLE);
#pragma unroll
	for (int i = 0; i < DK / 4; i++) {
		packed[i] = pack_bf16(w.s[0][2 * i], w.s[0][2 * i + 1]);
		w.s[0][2 * i] *= whole;
		w.s[0][2 * i + 1] *= whole;
	}
	pin(packed);
	pin(w.s[0]);
	pin(y);
	wgmma_fence();
	issue_panels(y, packed, keys);
	wgmma_commit();
	if (OUTPUTS) {
		if (SLICES == 1 && chunk > x.first)
			w.store(x, chunk - 1, o);
		pin(o);
		wgmma_fence();
		issue_panels(o, packed, q);
		wgmma_commit();
	}
	/* The residual v - 2^G x, and v' of it into y. */
	wgmma_wait<OUTPUTS && OVERLAP ? 1 : 0>();
	pin(y);
	if (OUTPUTS && !OVERLAP)
		pin(o);
	if (!OUTPUTS || !OVERLAP)
		pin(packed);
#pragma unroll
	for (int j = 0; j < 4; j++)
		load_transposed_x4(transposed_block(values, 16 * j, 16 * w.warp, w.lane),
		                   &moved[4 * j]);
#pragma unroll
	for (int i = 0; i < 16; i += 2) {
		const float2 power = token_pair(powers + FROM_START, i / 4, i / 2 % 2, w.lane);

#pragma unroll
		for (int r = i; r < i + 2; r++)
			moved[r] = pack_bf16(fmaf(-power.x, y[2 * r], low_bf16(moved[r])),
			                     fmaf(-power.y, y[2 * r + 1], high_bf16(moved[r])));
	}
	barrier_wait(w.shared + S::SCORES_FULL + w.slot.slot * 8, w.slot.parity);
	pin(moved);
	pin(y);
	wgmma_fence();
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs_k_major(y, &moved[4 * j], solved + j * 32 / 16, j > 0);
	wgmma_commit();
	if (OUTPUTS && OVERLAP) {
		wgmma_wait<1>();
		pin(o);
		pin(packed);
	}
	if (OUTPUTS) {
#pragma unroll
		for (int i = 0; i < 32; i += 4) {
			const float2 power =
			        token_pair(powers + FROM_START, i / 8, i / 4 % 2, w.lane);
			const float x0 = w.p.scale * power.x, x1 = w.p.scale * power.y;

			o[i] *= x0;
			o[i + 1] *= x1;
			o[i + 2] *= x0;
			o[i + 3] *= x1;
		}
	}
	/* Outputs and state. */
	wgmma_wait<0>();
	pin(y);
	pin(moved);
#pragma unroll
	for (int i = 0; i < 16; i += 2) {
		const float2 power = token_pair(powers + TO_END, i / 4, i / 2 % 2, w.lane);

#pragma unroll
		for (int r = i; r < i + 2; r++) {
			moved[r] = pack_bf16(y[2 * r], y[2 * r + 1]);
			decayed[r] = pack_bf16(y[2 * r] * power.x, y[2 * r + 1] * power.y);
		}
	}
	pin(decayed);
	pin(moved);
	pin(w.s[0]);
	if (OUTPUTS)
		pin(o);
	wgmma_fence();
	if (OUTPUTS) {
#pragma unroll
		for (int j = 0; j < CHUNK / 16; j++)
			wgmma_rs_k_major(o, &moved[4 * j], scores + j * 32 / 16, true);
		wgmma_commit();
	}
#pragma unroll
	for (int j = 0; j < CHUNK / 16; j++)
		wgmma_rs(w.s[0], &decayed[4 * j], k + j * 2048 / 16, true);
	wgmma_commit();
	if (OUTPUTS && SLICES == 2) {
		wgmma_wait<1>();
		pin(o);
		w.store(x, chunk, o);
	}
	wgmma_wait<0>();
	pin(w.s[0]);
	pin(decayed);
	pin(moved);
	if (OUTPUTS && SLICES == 1)
		pin(o);
	w.release(S::SCORES_EMPTY + w.slot.slot * 8);
	w.slot.advance();
	__syncwarp();
	w.release(S::EMPTY + w.stage.slot * 8);
	w.stage.advance();
	return whole;
}

/*
 * This warp's 16 rows of A = beta 2^(G_t - G_s) k k^T and of the scores scale 2^(G_t - G_s) q k^T,
 * from the products; no exponent that counts is above 0. A's diagonal block goes to shared memory,
 * where what is not below the diagonal is never read; the scores go to their panel.
 */
__device__ __forceinline__ void decay_products(float (&a)[32], float (&s)[32], uint32_t powers,
                                               uint32_t blocks, uint32_t scores, float scale,
                                               int warp, int lane)
{
	const int own = lane / 4, row = 16 * warp + own, key = 2 * (lane % 4);
	const uint32_t log_decay = powers + LOG_DECAY;
	const float g[2] = {shared_float(log_decay + row * 4),
	                    shared_float(log_decay + row * 4 + 32)};
	const float beta[2] = {shared_float(powers + BETA + row * 4),
	                       shared_float(powers + BETA + row * 4 + 32)};
	float2 from[2] = {token_pair(log_decay, 0, 0, lane), token_pair(log_decay, 0, 1, lane)};

#pragma unroll
	for (int j = 0; j < 4; j++) {
		float2 next[2];

		if (j > warp)
			break;
#pragma unroll
		for (int half = 0; half < 2; half++)
			next[half] = token_pair(log_decay, j < 3 ? j + 1 : 0, half, lane);
#pragma unroll
		for (int half = 0; half < 2; half++)
#pragma unroll
			for (int r = 0; r < 2; r++) {
				const int i = 8 * j + 4 * half + 2 * r;
				const float x0 = exp2_approx(g[r] - from[half].x);
				const float x1 = exp2_approx(g[r] - from[half].y);

				a[i] *= beta[r] * x0;
				a[i + 1] *= beta[r] * x1;
				s[i] *= scale * x0;
				s[i + 1] *= scale * x1;
			}
		if (j == warp) {
			store_diagonal(diagonal_block(blocks, warp), &a[8 * j], lane);
#pragma unroll
			for (int i = 0; i < 8; i++)
				if (key + i / 4 * 8 + i % 2 > own + i / 2 % 2 * 8)
					s[8 * j + i] = 0.0f;
		}
		store_block(plain_block(scores, 16 * warp, 16 * j, lane), &s[8 * j]);
#pragma unroll
		for (int half = 0; half < 2; half++)
			from[half] = next[half];
	}
}

__device__ __forceinline__ int piece_chunks(const parameters &p, int number)
{
	const piece x = locate(p, number);

	return x.last - x.begin;
}

/* Of chunk after chunk the scores and the inverse, for which nobody waits but the state. */
template <int DK, int SLICES>
__device__ __forceinline__ void delta_rule::score(const parameters &p, uint32_t shared)
{
	using S = shape<DK, SLICES>;
	/* Whether the next chunk's products run beside a solution: where registers hold both. */
	constexpr bool AHEAD = SLICES == 1;
	const int count = piece_count<true>(p), lane = threadIdx.x % 32;
	const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
	const uint32_t blocks = shared + S::TRIANGLE;
	slot_ring<S::STAGES> stage;
	slot_ring<SCORE_SLOTS> slot;
	float a[32], s[32];
	const auto issue = [&](const slot_ring<S::STAGES> &of) {
		const uint32_t at = shared + of.slot * S::STAGE_BYTES;

		barrier_wait(shared + S::FULL + of.slot * 8, of.parity);
		issue_scores<DK>(a, at + S::K, at + S::K);
		issue_scores<DK>(s, at + S::Q, at + S::K);
	};
	int number = blockIdx.x, left = piece_chunks(p, number);

	if (AHEAD)
		issue(stage);
#pragma unroll 1
	while (left > 0) {
		const uint32_t powers = shared + S::POWERS + stage.slot * S::POWERS_BYTES;
		const uint32_t scores = shared + S::SCORES + slot.slot * PANEL_BYTES;
		const uint32_t solved = shared + S::SOLVED + slot.slot * PANEL_BYTES;
		const uint32_t empty = shared + S::EMPTY + stage.slot * 8;

		if (!AHEAD)
			issue(stage);
		wgmma_wait<0>();
		pin(a);
		pin(s);
		barrier_wait(shared + S::SCORES_EMPTY + slot.slot * 8, slot.parity ^ 1);
		decay_products(a, s, powers, blocks, scores, p.scale, warp, lane);
		invert_diagonal(diagonal_block(blocks, warp), lane);
		named_barrier_sync(4, 128);
		scale_columns(blocks, a, warp, lane);
		if (--left == 0) {
			number += gridDim.x;
			left = number < count ? piece_chunks(p, number) : 0;
		}
		if (left > 0)
			stage.advance();
		if (AHEAD) /* after the last chunk its own once more, for nobody */
			issue(stage);
		named_barrier_sync(4, 128);
		solve_rows(blocks, solved, powers + BETA, warp, lane);
		warp_arrive(empty);
		warp_publish(shared + S::SCORES_FULL + slot.slot * 8);
		slot.advance();
	}
	if (AHEAD) {
		wgmma_wait<0>();
		pin(a);
		pin(s);
	}
}

template <int DK, int SLICES>
__global__ void __launch_bounds__(shape<DK, SLICES>::THREADS, 1)
        delta_kernel(const __grid_constant__ parameters p)
{
	using S = shape<DK, SLICES>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);

	if (threadIdx.x == 0)
		initialise_barriers<DK, SLICES, true, delta_rule>(shared);
	/* The upper blocks of the inverse and the scores are zero, and stay so. */
	for (int i = threadIdx.x; i < SCORE_SLOTS * PANEL_BYTES / 16; i += S::THREADS) {
		shared_store4(shared + S::SOLVED + 16 * i, 0.0f, 0.0f, 0.0f, 0.0f);
		shared_store4(shared + S::SCORES + 16 * i, 0.0f, 0.0f, 0.0f, 0.0f);
	}
	fence_async_proxy();
	__syncthreads();
	walk_block<DK, SLICES, true, delta_rule>(p, shared);
}

/* ---- segments, for walks too few to fill the machine. A segment's walk begins so many chunks
 * earlier that of the state before them nothing is left. */

/* Bits of decay after which that is so: fp32 has 149 between 1 and its least number. */
constexpr float FORGOTTEN = 160.0f;

constexpr int SCAN_WARPS = 32, SCAN_CHUNKS = 2; /* chunks of a warp at a time */

/*
 * Where the walk of a segment begins: from its first chunk back until the decays in between leave
 * nothing, or to the sequence's start. Between them I - beta k^T k must not expand: 0 <= beta |k|^2
 * <= 2; otherwise, too, from the start.
 */
__global__ void __launch_bounds__(32 * SCAN_WARPS)
        begins_kernel(const __grid_constant__ parameters p, struct view k)
{
	__shared__ float sums[SCAN_WARPS * SCAN_CHUNKS];
	const int pairs = p.walks / p.slices, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	const int first = static_cast<int>(blockIdx.x) / pairs * p.segment_chunks;
	piece x = {};
	float sum = 0.0f;
	bool expands = false;
	int begin = first;

	x.b = static_cast<int>(blockIdx.x) % pairs / p.n_heads;
	x.h = static_cast<int>(blockIdx.x) % p.n_heads;
	const token_decays decays(p, x);

	while (begin > 0 && !(sum <= -FORGOTTEN)) {
		float own[SCAN_CHUNKS] = {};

#pragma unroll
		for (int i = 0; i < 2 * SCAN_CHUNKS; i++) {
			const int chunk = begin - 1 - SCAN_CHUNKS * warp - i / 2;
			const int token = chunk * CHUNK + 2 * lane + i % 2;

			own[i / 2] += decays.log2(decays.load(token), token);
		}
#pragma unroll
		for (int i = 0; i < SCAN_CHUNKS; i++) {
#pragma unroll
			for (int offset = 16; offset > 0; offset /= 2)
				own[i] += __shfl_xor_sync(~0u, own[i], offset);
			if (lane == 0)
				sums[SCAN_CHUNKS * warp + i] = own[i];
		}
		__syncthreads();
		for (int i = 0; i < SCAN_WARPS * SCAN_CHUNKS && begin > 0 && !(sum <= -FORGOTTEN);
		     i++, begin--)
			sum += sums[i];
		__syncthreads();
	}
	const auto *keys =
	        static_cast<const __nv_bfloat16 *>(k.data) + x.b * k.batch + x.h * k.head;
	const auto *betas = static_cast<const __nv_bfloat16 *>(p.beta.data) + x.b * p.beta.batch +
	                    x.h * p.beta.head;
	const int channel = threadIdx.x % 16 * 8;

#pragma unroll 4
	for (int token = begin * CHUNK + static_cast<int>(threadIdx.x) / 16;
	     begin > 0 && token < first * CHUNK; token += 2 * SCAN_WARPS) {
		const float beta = __bfloat162float(betas[token * p.beta.token]);
		float square = 0.0f;

#pragma unroll
		for (int i = 0; i < 8; i++) {
			if (channel + i < p.d_k) {
				const float e =
				        __bfloat162float(keys[token * k.token + channel + i]);

				square = fmaf(e, e, square);
			}
		}
#pragma unroll
		for (int offset = 8; offset > 0; offset /= 2)
			square += __shfl_xor_sync(~0u, square, offset);
		expands |= !(beta >= 0.0f && beta * square <= 2.0f);
	}
	if (__syncthreads_or(expands))
		begin = 0;
	if (threadIdx.x == 0)
		p.begins[blockIdx.x] = begin;
}

/* What is not finite does not decay: after a segment that leaves such a state the channels
 * concerned are NaN, whatever walks that began later made of them. */
__global__ void __launch_bounds__(128)
        lose_kernel(const __grid_constant__ parameters p, struct view out, int width)
{
	const piece x = locate(p, p.walks + static_cast<int>(blockIdx.x));
	const int channel = x.slice * width + static_cast<int>(threadIdx.x);
	bool lost = false;

	if (x.begin > 0 && static_cast<int>(threadIdx.x) < width && channel < p.d_v)
		for (int segment = 0; segment < x.segment; segment++)
			lost |= p.lost[(segment * p.walks + x.walk) * width + threadIdx.x] != 0;
	if (!lost)
		return;
	auto *at = static_cast<__nv_bfloat16 *>(const_cast<void *>(out.data)) + x.b * out.batch +
	           x.h * out.head + channel;
	for (int token = x.first * CHUNK; token < min(x.last * CHUNK, p.seq_len); token++)
		at[token * out.token] = __float2bfloat16(NAN);
	if (p.final_state && x.segment == p.segments - 1)
		for (int i = 0; i < p.d_k; i++)
			p.final_state[((static_cast<int64_t>(x.b) * p.n_heads + x.h) * p.d_k + i) *
			                      p.d_v +
			              channel] = NAN;
}

/* Few walks are cut in two, 64 channels of v each, and then, where states decay, into segments of
 * at least LEAST_SEGMENT chunks, so that there is a block for each multiprocessor. */
constexpr int LEAST_SEGMENT = 8;

plan delta_plan(const struct device *device, const struct matrix_recurrence_args *a)
{
	const int blocks = cuda_sm_count(device);
	plan x = make_plan(a, 0);

	if (2 * x.walks <= blocks)
		x = make_plan(a, 0, 1);
	const int segments = min(blocks / x.walks, x.chunks / LEAST_SEGMENT);
	return segments > 1 && a->decay != DECAY_NONE
	               ? make_plan(a, (x.chunks + segments - 1) / segments, x.slices)
	               : x;
}

template <int DK, int SLICES>
enum status launch_delta(struct device *device, const parameters &p, const plan &x)
{
	return submit(device, delta_kernel<DK, SLICES>, turns(device, x.walks * x.segments),
	              shape<DK, SLICES>::THREADS, shape<DK, SLICES>::BYTES, p);
}

enum status launch_walks(struct device *device, const parameters &p, const plan &x)
{
	if (x.dk == 64)
		return x.slices == 1 ? launch_delta<64, 1>(device, p, x)
		                     : launch_delta<64, 2>(device, p, x);
	return x.slices == 1 ? launch_delta<128, 1>(device, p, x)
	                     : launch_delta<128, 2>(device, p, x);
}

enum status run_segments(struct device *device, const struct matrix_recurrence_args *a,
                         parameters &p, const plan &x, void *workspace)
{
	const int pairs = x.walks / x.blocks_across;

	p.begins = static_cast<int *>(workspace);
	p.lost = reinterpret_cast<uint8_t *>(p.begins + x.segments * pairs);
	TRY(submit(device, begins_kernel, x.segments * pairs, 32 * SCAN_WARPS, 0, p, a->k));
	TRY(launch_walks(device, p, x));
	return submit(device, lose_kernel, (x.segments - 1) * x.walks, 128, 0, p, a->out,
	              64 * x.slices);
}

} // namespace

extern "C" const char *hopper_delta_rule_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);

	if (a->rule != RULE_DELTA)
		return "only the delta rule";
	if (a->chunk && a->chunk != CHUNK)
		return "chunk must be 64, or 0";
	if (a->d_k > 128)
		return "d_k must be at most 128";
	return walk_unsupported(device, a);
}

extern "C" size_t hopper_delta_rule_workspace(const struct device *device, const void *args)
{
	const plan x = delta_plan(device, static_cast<const struct matrix_recurrence_args *>(args));

	return x.segments > 1
	               ? static_cast<size_t>(x.segments) * x.walks * (sizeof(int) + 64 * x.slices)
	               : 0;
}

extern "C" enum status hopper_delta_rule(struct device *device, const void *args, void *workspace)
{
	const auto *a = static_cast<const struct matrix_recurrence_args *>(args);
	const plan x = delta_plan(device, a);
	parameters p;

	TRY(fill_parameters(p, a, x, NULL));
	return x.segments > 1 ? run_segments(device, a, p, x, workspace)
	                      : launch_walks(device, p, x);
}
