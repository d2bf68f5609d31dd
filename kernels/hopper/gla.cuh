/*
 * What the kernels of gated linear attention share: the records that every 64 tokens of a
 * sequence and head become before any state is known, in the order and swizzle in which the
 * products read them from shared memory.
 */
#ifndef KERNELS_HOPPER_GLA_CUH
#define KERNELS_HOPPER_GLA_CUH

#include <cuda.h>

#include "kernels/hopper/panels.cuh"
#include "kernels/kernels.h"

namespace hopper
{

constexpr int RECORD = 64; /* tokens */

/* PARTS chunks: byte offsets; panels of 64 channels, 128-byte swizzle. */
template <int DK, int PARTS = 1> struct record {
	static constexpr int QUERIES = 0;                    /* decayed from their chunk's start */
	static constexpr int SCORES = DK / 64 * PANEL_BYTES; /* [query, key] */
	static constexpr int KEYS = SCORES + PANEL_BYTES;    /* decayed to their chunk's end */
	static constexpr int DECAYS = KEYS + DK / 64 * PANEL_BYTES; /* fp32 [PARTS, d_k] */
	static constexpr int BYTES = DECAYS + PARTS * DK * 4;
};

inline size_t record_bytes(int d_k, int parts)
{
	return static_cast<size_t>(d_k) * (2 * RECORD * 2 + 4 * parts) + PANEL_BYTES;
}

/* Why no kernel here takes these arguments, whatever the chunk; or NULL. */
const char *gla_unsupported(const struct device *device, const struct matrix_recurrence_args *a);

enum status gla_encode_inputs(CUtensorMap *q, CUtensorMap *k, CUtensorMap *log_decay,
                              const struct matrix_recurrence_args *a);
/* Of v and of the output. */
enum status gla_encode_values(CUtensorMap *v, CUtensorMap *out,
                              const struct matrix_recurrence_args *a);

/* All records, sequence after sequence, of chunks of 64 / parts tokens. */
enum status gla_prepare(struct device *device, const struct matrix_recurrence_args *a, int parts,
                        unsigned char *records);

/*
 * The states before chunks of per_chunk records, transposed, bf16: [B, H, chunks, d_v / 64] tiles
 * of d_k / 64 panels [64 columns of v, 64 channels of k]; and the final state. What it needs
 * beside.
 */
size_t gla_states_workspace(const struct device *device, const struct matrix_recurrence_args *a);
enum status gla_states(struct device *device, const struct matrix_recurrence_args *a,
                       unsigned char *records, int per_chunk, unsigned char *states,
                       unsigned char *workspace);

/* dv, by the fused kernel from the last token on; why not, or NULL. */
const char *gla_values_gradient_unsupported(const struct device *device,
                                            const struct matrix_recurrence_backward_args *a);
enum status gla_values_gradient(struct device *device,
                                const struct matrix_recurrence_backward_args *a);

/* ---- outputs that leave as boxes of 64 x 64, by a warpgroup */

/* Until the last have left the staging. */
__device__ __forceinline__ void begin_output(int warp, int lane, int barrier)
{
	if (warp == 0 && lane == 0)
		store_wait_read();
	named_barrier_sync(barrier, 128);
}

/* o^T of some tokens into the staging, transposed on the way; token: the first of them. */
template <int WIDTH>
__device__ __forceinline__ void stage_output(float (&o)[WIDTH], uint32_t staging, int token,
                                             int warp, int lane)
{
#pragma unroll
	for (int n = 0; n < WIDTH / 4; n += 2)
		store_transposed_block(transposed_block(staging, token + 8 * n, 16 * warp, lane),
		                       &o[4 * n]);
}

/* From there to memory. */
__device__ __forceinline__ void end_output(const CUtensorMap *out, uint32_t staging, int warp,
                                           int lane, int barrier, int column, int token, int h,
                                           int b)
{
	fence_async_proxy();
	named_barrier_sync(barrier, 128);
	if (warp == 0 && lane == 0) {
		tensor_store(out, staging, column, token, h, b);
		store_commit();
	}
}

} // namespace hopper

#endif
