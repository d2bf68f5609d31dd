/*
 * Gated linear attention, what comes before the states: every 64 tokens of a sequence and head by
 * themselves become a record (gla.cuh), a panel of 64 channels at a time.
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/gla_chunk.cuh"
#include "kernels/hopper/tensor_map.h"

using namespace hopper;

namespace
{

constexpr int BLOCKS = 3; /* of a multiprocessor */

struct prepare_parameters {
	CUtensorMap q, k, log_decay;
	int n_heads, per_sequence, total; /* records of a sequence and head; of all */
	int q_step, k_step;               /* between heads: 0 where they share q or k */
	float scale;
	const float *bonus; /* [H, d_k] iff BONUS */
	unsigned char *records;
};

struct prepare_layout {
	static constexpr int STAGES = 2, STAGE_BYTES = 3 * PANEL_BYTES;
	static constexpr int EXCHANGE = STAGES * STAGE_BYTES;
	static constexpr int BARRIERS = EXCHANGE + STAGES * EXCHANGE_BYTES;
	static constexpr int BYTES = BARRIERS + STAGES * 8 + 1024; /* 1024: room to align */
};

template <int DK> using cursor = panel_cursor<DK, prepare_layout::STAGES>;

template <int DK>
__device__ __forceinline__ void load_panel(const prepare_parameters &p, uint32_t shared,
                                           cursor<DK> &at)
{
	const int sequence = at.number / p.per_sequence;
	const int token = at.number % p.per_sequence * RECORD;
	const int b = sequence / p.n_heads, h = sequence % p.n_heads;
	const uint32_t full = shared + prepare_layout::BARRIERS + at.stage.slot * 8;
	const uint32_t stage = shared + at.stage.slot * prepare_layout::STAGE_BYTES;

	if (at.number >= p.total)
		return;
	barrier_arrive_expect(full, 3 * PANEL_BYTES);
	tensor_load(stage, &p.log_decay, full, at.panel * 64, token, h, b);
	tensor_load(stage + PANEL_BYTES, &p.q, full, at.panel * 64, token, h * p.q_step, b);
	tensor_load(stage + 2 * PANEL_BYTES, &p.k, full, at.panel * 64, token, h * p.k_step, b);
	at.advance();
}

template <int DK, int PARTS, bool BONUS>
__global__ void __launch_bounds__(128, BLOCKS)
        prepare_kernel(const __grid_constant__ prepare_parameters p)
{
	using layout = prepare_layout;
	using R = record<DK, PARTS>;
	extern __shared__ char unaligned[];
	const uint32_t shared = aligned_base(unaligned);
	const bool leader = threadIdx.x == 0;
	cursor<DK> now, ahead;
	chunk_scores s = {};

	if (leader) {
		for (int i = 0; i < layout::STAGES; i++)
			barrier_init(shared + layout::BARRIERS + i * 8, 1);
		barrier_init_fence();
		for (int i = 0; i < layout::STAGES; i++)
			load_panel<DK>(p, shared, ahead);
	}
	__syncthreads();
#pragma unroll 1
	for (bool loaded = true; now.number < p.total; loaded = false) {
		unsigned char *record_at = p.records + static_cast<int64_t>(now.number) * R::BYTES;
		const float *bonus = BONUS ? p.bonus +
		                                     now.number / p.per_sequence % p.n_heads * DK +
		                                     now.panel * 64
		                           : NULL;
		const uint32_t stage = shared + now.stage.slot * layout::STAGE_BYTES;
		const panel t = {stage + PANEL_BYTES, stage, stage + 2 * PANEL_BYTES};

		barrier_wait(shared + layout::BARRIERS + now.stage.slot * 8, now.stage.parity);
		prepare_panel<BONUS ? 1 : SLABS, SUBS / PARTS, BONUS>(
		        s, t, shared + layout::EXCHANGE + now.stage.slot * EXCHANGE_BYTES,
		        {p.scale, bonus}, now.number % p.per_sequence == 0,
		        [&] {
			        __syncthreads();
			        /* The stage before this one, once it has been stored. */
			        if (leader && !loaded) {
				        store_wait_read();
				        load_panel<DK>(p, shared, ahead);
				        loaded = true;
			        }
		        },
		        [&](int part, int channel, float x, float y) {
			        auto *decays = reinterpret_cast<float *>(record_at + R::DECAYS);

			        *reinterpret_cast<float2 *>(decays + part * DK + now.panel * 64 +
			                                    channel) = make_float2(x, y);
		        });
		const bool last = now.panel == DK / 64 - 1;
		if (last) {
			__syncthreads();
			store_scores<BONUS>(t.decays, s);
			s = {};
		}
		fence_async_proxy();
		__syncthreads();
		if (leader) {
			bulk_store(record_at + R::QUERIES + now.panel * PANEL_BYTES, t.q,
			           PANEL_BYTES);
			bulk_store(record_at + R::KEYS + now.panel * PANEL_BYTES, t.k, PANEL_BYTES);
			if (last)
				bulk_store(record_at + R::SCORES, t.decays, PANEL_BYTES);
			store_commit();
		}
		now.advance();
	}
	if (leader)
		store_wait_read();
}

template <int DK, int PARTS, bool BONUS>
enum status launch(struct device *device, const prepare_parameters &p)
{
	const auto kernel = prepare_kernel<DK, PARTS, BONUS>;
	const int resident = BLOCKS * cuda_sm_count(device);

	CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
	                              prepare_layout::BYTES));
	kernel<<<static_cast<unsigned>(p.total < resident ? p.total : resident), 128,
	         prepare_layout::BYTES, cuda_stream(device)>>>(p);
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

template <int DK, bool BONUS>
enum status launch_parts(struct device *device, const prepare_parameters &p, int parts)
{
	return parts == 1   ? launch<DK, 1, BONUS>(device, p)
	       : parts == 2 ? launch<DK, 2, BONUS>(device, p)
	                    : launch<DK, 4, BONUS>(device, p);
}

} // namespace

namespace hopper
{

const char *gla_unsupported(const struct device *device, const struct matrix_recurrence_args *a)
{
	if (a->decay != DECAY_DIAGONAL || (a->rule != RULE_PLAIN && a->rule != RULE_BONUS))
		return "only a diagonal decay, without the delta rule";
	if (a->d_k != 64 && a->d_k != 128 && a->d_k != 256)
		return "d_k must be 64, 128 or 256";
	if (a->d_v != 64 && a->d_v != 128 && a->d_v != 256 && a->d_v != 512)
		return "d_v must be 64, 128, 256 or 512";
	if (a->d_k == 256 && a->d_v == 64)
		return "d_v must be at least 128 where d_k is 256";
	if (reinterpret_cast<uintptr_t>(a->bonus) % 8)
		return "the bonus must be 8-byte aligned";
	if (a->n_heads > 1 && (!a->v.head || !a->out.head || !a->log_decay.head))
		return "heads must not share v or their decays";
	if (a->batch * a->n_heads * ((a->seq_len + RECORD - 1) / RECORD + 4 * 32) > 0x7fffffff)
		return "more chunks than a grid has blocks";
	return check_views(device, &a->q, &a->k, &a->v, &a->out, &a->log_decay);
}

static enum status encode(CUtensorMap *map, const struct view *view, int64_t d,
                          const struct matrix_recurrence_args *a)
{
	return tensor_map_encode(map, view, a->batch, a->seq_len, a->n_heads, d, RECORD);
}

enum status gla_encode_inputs(CUtensorMap *q, CUtensorMap *k, CUtensorMap *log_decay,
                              const struct matrix_recurrence_args *a)
{
	enum status status = encode(q, &a->q, a->d_k, a);

	if (status == STATUS_OK)
		status = encode(k, &a->k, a->d_k, a);
	return status == STATUS_OK ? encode(log_decay, &a->log_decay, a->d_k, a) : status;
}

enum status gla_encode_values(CUtensorMap *v, CUtensorMap *out,
                              const struct matrix_recurrence_args *a)
{
	const enum status status = encode(v, &a->v, a->d_v, a);

	return status == STATUS_OK ? encode(out, &a->out, a->d_v, a) : status;
}

enum status gla_prepare(struct device *device, const struct matrix_recurrence_args *a, int parts,
                        unsigned char *records)
{
	const int dk = static_cast<int>(a->d_k);
	prepare_parameters p = {};
	enum status status = gla_encode_inputs(&p.q, &p.k, &p.log_decay, a);

	if (status != STATUS_OK)
		return status;
	p.n_heads = static_cast<int>(a->n_heads);
	p.per_sequence = static_cast<int>((a->seq_len + RECORD - 1) / RECORD);
	p.total = static_cast<int>(a->batch) * p.n_heads * p.per_sequence;
	p.q_step = a->q.head ? 1 : 0;
	p.k_step = a->k.head ? 1 : 0;
	p.scale = a->scale;
	p.bonus = a->bonus;
	p.records = records;
	if (a->rule == RULE_BONUS)
		return dk == 64    ? launch_parts<64, true>(device, p, parts)
		       : dk == 128 ? launch_parts<128, true>(device, p, parts)
		                   : launch_parts<256, true>(device, p, parts);
	return dk == 64    ? launch_parts<64, false>(device, p, parts)
	       : dk == 128 ? launch_parts<128, false>(device, p, parts)
	                   : launch_parts<256, false>(device, p, parts);
}

} // namespace hopper
