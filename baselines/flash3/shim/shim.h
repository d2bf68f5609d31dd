/*
 * FlashAttention-3's forward and gradients as C functions. The shim is built with its sources
 * into a library of its own (make flash3), which the program opens at run time.
 */
#ifndef BASELINES_FLASH3_SHIM_SHIM_H
#define BASELINES_FLASH3_SHIM_SHIM_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A bf16 tensor [batch, tokens, heads, d], its last dimension contiguous; strides in elements. */
struct flash3_tensor {
	void *data;
	int64_t batch, token, head;
};

struct flash3_problem {
	int batch, n_heads, d_head; /* d 64 or 128 */
	int kv_heads;               /* of k and v; head h reads number h / (n_heads / kv_heads) */
	int seq_len, kv_len;        /* queries, keys per sequence */
	bool causal;                /* the last query sees the last key */
	int window;     /* keys that a causal query sees before its own; negative: all */
	bool may_split; /* the keys, as its heuristic says; of one query that sees them all */
	int n_sm;
	float scale;
	struct flash3_tensor q, k, v, out; /* 16-byte aligned */
};

struct flash3_gradients {
	struct flash3_problem forward; /* as many keys as queries where causal */
	struct flash3_tensor dout, dq, dk, dv;
	const float *lse; /* [batch, n_heads, seq_len], natural logarithm */
	bool deterministic;
};

/* Bytes of workspace, 256-byte aligned, enough for fewer keys as well. */
size_t flash3_workspace(const struct flash3_problem *problem);

/* Submits the forward. Errors of a launch end the process: its sources are written so. */
cudaError_t flash3_forward(const struct flash3_problem *problem, void *workspace,
                           cudaStream_t stream);

size_t flash3_backward_workspace(const struct flash3_gradients *gradients);

/* Submits the gradients, likewise. */
cudaError_t flash3_backward(const struct flash3_gradients *gradients, void *workspace,
                            cudaStream_t stream);

/* Its commit, as the build found it. */
const char *flash3_version(void);

/* sizeof(struct flash3_gradients), which has the other in it, as the library was built with it. */
size_t flash3_problem_size(void);

#ifdef __cplusplus
}
#endif

#endif
