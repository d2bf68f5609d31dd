/* Attention as a cuDNN graph, and the plans that a device has made of it so far. */
#ifndef BASELINES_CUDNN_SDPA_H
#define BASELINES_CUDNN_SDPA_H

#include "baselines/cudnn/graph.h"
#include "kernels/kernels.h"

/* What distinguishes one plan from another. Clear it with memset before filling: plans are found by
 * its bytes. */
struct sdpa_shape {
	int64_t batch, n_heads, kv_heads, d_head, seq_len, kv_len;
	int64_t mask;                         /* enum mask, CHUNK excepted */
	int64_t window;                       /* of MASK_WINDOW */
	int64_t stats;                        /* whether lse is stored */
	int64_t padded;                       /* whether lengths are in memory */
	int64_t backward;                     /* gradients instead; stats and padded are then 0 */
	int64_t q[3], k[3], v[3], out[3];     /* strides: batch, token, head */
	int64_t dout[3], dq[3], dk[3], dv[3]; /* iff backward */
};

/* The pointers of one run. */
struct sdpa_tensors {
	const void *q, *k, *v;
	void *out;
	float *lse;                                 /* iff stats */
	const int32_t *query_lengths, *key_lengths; /* [batch] each, iff padded */
	float scale;
	/* Of the gradients; the workspaces are [B, H, T, d] and [B, H, T]. */
	const void *dout;
	void *dq, *dk, *dv;
	float *dq_sum, *delta;
};

/* The plan of a shape, made at its first use; NULL with the reason in *why if there is none. */
const struct graph_plan *sdpa_plan(const struct device *device, const struct sdpa_shape *shape,
                                   const char **why);

/* Submits the attention. */
enum status sdpa_run(struct device *device, const struct sdpa_shape *shape,
                     const struct sdpa_tensors *tensors, void *workspace);

/* Copies a view's strides. */
void sdpa_strides(int64_t strides[3], const struct view *view);

#endif
