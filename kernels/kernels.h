/*
 * The one C interface to every operation.
 *
 * An operation is a line of OPERATIONS, an argument struct, a description
 * (kernels/operation.h, kernels/operations/), and one or more kernels
 * (implementations, each from a provider: cpu, portable, hopper, cublaslt, cudnn,
 * cublas, flash3; reference). run_attention(ctx, &args) and its like pick the kernel: the
 * provider the user asked for with --provider, else the first in the device's
 * list that supports the arguments. Adding a kernel is one file and one line in
 * its provider's list.
 *
 * Conventions
 *   B batch, T sequence length, N = B*T tokens (token n = b*T + t), D model
 *   width, H heads, d = D/H head width, L chunk length, c(t) = t/L rounded down.
 *   `act` is the backend's activation element: fp32 on the CPU, bf16 on CUDA.
 *   Pointers to void are act; float pointers are fp32 on every backend; int32_t * are
 *   tokens or positions. All live in the device's memory; the caller owns them. The
 *   reference's device is the exception: its act is fp64, and so is what float pointers
 *   point to, which its kernels read through wide() and wide_out().
 *   A weight [N, K] maps K inputs to N outputs: y = x W^T, row-major.
 *   Head h owns columns h*d .. (h+1)*d of a D-wide tensor.
 *   Gradients OVERWRITE their destination; those of parameters are added to it if the
 *   context says so (context.accumulate).
 *   A pointer marked "or NULL" is optional; nothing is computed for it.
 *   Equations: docs/models.md and arXiv 2507.04416 (RAT),
 *   2312.06635 (GLA).
 *
 * Every run() returns STATUS_OK, STATUS_UNSUPPORTED, STATUS_OOM or
 * STATUS_CUDA, with a message. None but the reference's allocates memory: a kernel's
 * workspace() says how much it wants, and the context hands it over.
 */
#ifndef KERNELS_KERNELS_H
#define KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/device.h"
#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Every operation, as X(CONSTANT, name): an entry of enum operation, its name in CSV and
 * --provider, its argument struct (struct name_args), its description (name_description,
 * kernels/operation.h), and the function that runs it (run_name, below).
 */
#define OPERATIONS(X)                                                                              \
	X(NORM_LINEAR, norm_linear)                                                                \
	X(NORM_LINEAR_BACKWARD, norm_linear_backward)                                              \
	X(LINEAR_RESIDUAL, linear_residual)                                                        \
	X(LINEAR_RESIDUAL_BACKWARD, linear_residual_backward)                                      \
	X(ROTATE, rotate)                                                                          \
	X(ROTATE_BACKWARD, rotate_backward)                                                        \
	X(ATTENTION, attention)                                                                    \
	X(ATTENTION_BACKWARD, attention_backward)                                                  \
	X(ATTENTION_STEP, attention_step)                                                          \
	X(RAT_SCAN, rat_scan)                                                                      \
	X(RAT_SCAN_BACKWARD, rat_scan_backward)                                                    \
	X(RAT_STEP, rat_step)                                                                      \
	X(RECURRENCE, recurrence)                                                                  \
	X(RECURRENCE_BACKWARD, recurrence_backward)                                                \
	X(RECURRENCE_STEP, recurrence_step)                                                        \
	X(RATPLUS_STEP, ratplus_step)                                                              \
	X(SELECTIVE_SCAN, selective_scan)                                                          \
	X(SELECTIVE_SCAN_BACKWARD, selective_scan_backward)                                        \
	X(SELECTIVE_SCAN_STEP, selective_scan_step)                                                \
	X(MATRIX_RECURRENCE, matrix_recurrence)                                                    \
	X(MATRIX_RECURRENCE_BACKWARD, matrix_recurrence_backward)                                  \
	X(MATRIX_RECURRENCE_STEP, matrix_recurrence_step)                                          \
	X(DECAY_GATE, decay_gate)                                                                  \
	X(DECAY_GATE_BACKWARD, decay_gate_backward)                                                \
	X(NORM_GATE, norm_gate)                                                                    \
	X(NORM_GATE_BACKWARD, norm_gate_backward)                                                  \
	X(ROTATE_STEP, rotate_step)                                                                \
	X(SHORT_CONV, short_conv)                                                                  \
	X(SHORT_CONV_BACKWARD, short_conv_backward)                                                \
	X(SHORT_CONV_STEP, short_conv_step)                                                        \
	X(TIME_STEP, time_step)                                                                    \
	X(TIME_STEP_BACKWARD, time_step_backward)                                                  \
	X(DELTA_GATE, delta_gate)                                                                  \
	X(DELTA_GATE_BACKWARD, delta_gate_backward)                                                \
	X(FORGET_GATE, forget_gate)                                                                \
	X(FORGET_GATE_BACKWARD, forget_gate_backward)                                              \
	X(GATE_NORM, gate_norm)                                                                    \
	X(GATE_NORM_BACKWARD, gate_norm_backward)                                                  \
	X(BLOCK_LINEAR, block_linear)                                                              \
	X(BLOCK_LINEAR_BACKWARD, block_linear_backward)                                            \
	X(LRU_GATE, lru_gate)                                                                      \
	X(LRU_GATE_BACKWARD, lru_gate_backward)                                                    \
	X(GELU_GATE, gelu_gate)                                                                    \
	X(GELU_GATE_BACKWARD, gelu_gate_backward)                                                  \
	X(L2_NORM, l2_norm)                                                                        \
	X(L2_NORM_BACKWARD, l2_norm_backward)                                                      \
	X(TOKEN_SHIFT, token_shift)                                                                \
	X(TOKEN_SHIFT_BACKWARD, token_shift_backward)                                              \
	X(TOKEN_SHIFT_STEP, token_shift_step)                                                      \
	X(GELU, gelu)                                                                              \
	X(GELU_BACKWARD, gelu_backward)                                                            \
	X(EMBEDDING, embedding)                                                                    \
	X(EMBEDDING_BACKWARD, embedding_backward)                                                  \
	X(CROSS_ENTROPY, cross_entropy)                                                            \
	X(ARGMAX, argmax)

enum operation {
#define X(constant, name) OP_##constant,
	OPERATIONS(X)
#undef X
	        OP_COUNT
};

/* "norm_linear", "attention", "rat_scan_backward", ...: the name in CSV and --provider. */
const char *operation_name(enum operation operation);

/* Work an operation must do, whoever does it. One multiply-add is 2 FLOPs;
 * bytes count every input read once and every output written once. */
struct cost {
	double flops, bytes_read, bytes_written;
};

/*
 * y = RMSNorm(x; eps) * norm_weight, times weight^T, plus bias.
 * norm_weight NULL: no norm at all, y = x W^T, and x_norm must equal x.
 */
struct norm_linear_args {
	int64_t n_tokens, d_in, d_out;
	float eps;
	const void *x;            /* [n_tokens, d_in] */
	const float *norm_weight; /* [d_in] or NULL */
	const void *weight;       /* [d_out, d_in] */
	const float *bias;        /* [d_out] or NULL: 0 */
	void *x_norm;             /* out [n_tokens, d_in]: normalised x times norm_weight */
	float *rstd;              /* out [n_tokens]: 1/sqrt(mean(x^2)+eps), or NULL */
	void *y;                  /* out [n_tokens, d_out] */
};

/* dweight = dy^T x_norm; d(x_norm) = dy W; then through the norm. */
struct norm_linear_backward_args {
	struct norm_linear_args forward; /* as it was run; its y is not read */
	const void *dy;                  /* [n_tokens, d_out] */
	const void *dresidual;           /* [n_tokens, d_in] added to dx, or NULL */
	void *dx_norm;                   /* scratch [n_tokens, d_in] */
	void *dx;                        /* out [n_tokens, d_in]; may alias dresidual */
	float *dnorm_weight;             /* out [d_in]; NULL iff norm_weight is */
	float *dweight;                  /* out [d_out, d_in], fp32 on every backend */
	float *dbias;                    /* out [d_out] iff bias */
};

/* y = residual + x W^T + bias; residual NULL: y = x W^T + bias. */
struct linear_residual_args {
	int64_t n_tokens, d_in, d_out;
	const void *x;        /* [n_tokens, d_in] */
	const void *weight;   /* [d_out, d_in] */
	const float *bias;    /* [d_out] or NULL: 0 */
	const void *residual; /* [n_tokens, d_out] or NULL */
	void *y;              /* out [n_tokens, d_out]; may alias residual */
};

/* dx = dy W; dweight = dy^T x; dbias = the sum of dy over tokens. The residual's gradient is dy
 * itself. */
struct linear_residual_backward_args {
	int64_t n_tokens, d_in, d_out;
	const void *x, *weight, *dy;
	void *dx;       /* out [n_tokens, d_in] */
	float *dweight; /* out [d_out, d_in] */
	float *dbias;   /* out [d_out] or NULL */
};

/* A [B, T, H, d] tensor inside a larger one; the last dimension is contiguous.
 * Strides in elements. */
struct view {
	void *data;
	int64_t batch, token, head;
};

/* Element pointer of view v at (b, t, h), for fp32 (CPU) tensors. */
static inline float *view_at(const struct view *v, int64_t b, int64_t t, int64_t h)
{
	return (float *)v->data + b * v->batch + t * v->token + h * v->head;
}

/*
 * Rotary position embedding at positions 0..T-1, rotate-half:
 * theta_i = 10000^(-2i/d), (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
 * With a rope_width the first rope_width columns of each head are rotated as a head of that
 * width, and the others copied.
 * k and v of tokens from first_kv on are written to slot t % kv_slots of
 * k_out, v_out (the token stride of these views is the slot's); q to q_out.
 * Outputs may alias inputs. rope false: a copy (skipped where aliased).
 */
struct rotate_args {
	int64_t batch, seq_len, n_heads, kv_heads, d_head;
	bool rope;
	int64_t rope_width;              /* even; 0: d_head */
	int64_t first_kv, kv_slots;      /* 0 and seq_len, or a ring's tail and its size */
	struct view q, k, v;             /* [B, T, H, d]; k, v of kv_heads heads */
	struct view q_out, k_out, v_out; /* v_out.data NULL: v is left where it is;
	                                    likewise q_out.data NULL: q, k_out.data NULL: k */
};

/* Gradients of q and k from those of the rotated ones, dq_out and dk_out: rotated back. Outputs may
 * alias inputs. rope false: a copy (skipped where aliased). */
struct rotate_backward_args {
	int64_t batch, seq_len, n_heads, kv_heads, d_head;
	bool rope;
	int64_t rope_width;         /* as in struct rotate_args */
	struct view dq_out, dk_out; /* [B, T, H, d]; dk of kv_heads heads */
	struct view dq, dk;         /* out, likewise */
};

enum mask {
	MASK_CAUSAL, /* key s visible to query t iff s <= t */
	MASK_WINDOW, /* iff 0 <= t-s <= window */
	MASK_CHUNK,  /* iff s < t/chunk (keys are chunks; RAT) */
	MASK_FULL,
	MASK_DILATED /* iff 0 <= t-s, and t-s <= window or s < initial or (s+1) % dilation == 0
	              * (RAT+)
	              */
};

/* "causal", "window", "chunk", "full", "dilated". */
const char *mask_name(enum mask mask);

/*
 * Softmax attention, one query per token t and head, online softmax:
 *   o_t = sum_s p_ts v_s, p_t = softmax(scale * q_t.k_s over visible s,
 *         and own_score[t] where given, whose value is own_value[t]);
 *   out_t = sigmoid(gate_t) * o_t where a gate is given, else o_t.
 * Head h reads column group h % q_heads of q (RAT shares q over groups) and key and
 * value head h / (n_heads / kv_heads) (grouped keys, arXiv 2305.13245). Both divide
 * n_heads, and at least one is n_heads. MASK_CHUNK requires own_score (chunk 0 sees no
 * key).
 */
struct attention_args {
	int64_t batch, n_heads, q_heads, kv_heads, d_head;
	int64_t seq_len, kv_len; /* queries, keys per sequence */
	enum mask mask;
	int64_t window, chunk;     /* of MASK_WINDOW and MASK_DILATED; of MASK_CHUNK */
	int64_t dilation, initial; /* of MASK_DILATED; dilation 0: no key is seen for its place */
	float scale;
	struct view q;           /* [B, T, q_heads, d] */
	struct view k, v;        /* [B, kv_len, kv_heads, d] */
	const float *own_score;  /* [B, T, H], already scaled; or NULL */
	struct view own_value;   /* [B, T, H, d]; used iff own_score */
	struct view gate;        /* [B, T, H, d] logits; data NULL: none */
	struct view out;         /* out [B, T, H, d] */
	struct view out_ungated; /* out: o before the gate, for training; data NULL: not stored */
	float *lse;              /* out [B, H, T] natural log of the softmax denominator, own
	                            score included; or NULL */
};

/*
 * Gradients of attention. do = dout * sigmoid(gate);
 * delta = sum_d do*o; P = exp(s - lse); dS = P (do.v - delta);
 * dgate = dout * o * sigmoid'(gate).
 */
struct attention_backward_args {
	struct attention_args forward; /* as it was run; lse and out_ungated (or, without a
	                                  gate, out) hold the forward's results */
	struct view dout;              /* [B, T, H, d] */
	struct view dq;         /* out [B, T, q_heads, d], summed over the heads of a group */
	struct view dk, dv;     /* out [B, kv_len, kv_heads, d], likewise */
	struct view dgate;      /* out [B, T, H, d] iff gate */
	float *down_score;      /* out [B, T, H] iff own_score */
	struct view down_value; /* out [B, T, H, d] iff own_score */
};

/*
 * One token per sequence: rotates q and k at position *position, stores k and
 * v in slot *position % kv_slots, attends to the slots of the last
 * min(*position, window) + 1 tokens (window < 0: all). kv_slots must be at
 * least window + 1, or the largest position + 1.
 */
struct attention_step_args {
	int64_t batch, n_heads, kv_heads, d_head;
	int64_t kv_slots, window;
	bool rope;
	int64_t rope_width; /* as in struct rotate_args */
	float scale;
	const int32_t *position;      /* one, in device memory, the same for all sequences */
	int64_t position_hint;        /* its value where the host knows it, for cost(); else -1 */
	struct view q, k, v;          /* [B, 1, H, d] of the projection; k, v of kv_heads heads */
	struct view k_cache, v_cache; /* [B, kv_slots, kv_heads, d] */
	struct view out;              /* out [B, 1, H, d] */
};

/*
 * RAT inside a chunk. g = sigmoid(gate + gate_bias), channel by channel, from zero at
 * the first token of each chunk:
 *   vt_t = g*vt_{t-1} + (1-g)*v_t,  kt_t = g*kt_{t-1} + (1-g)*k_t
 * (k tiled: head h reads group h % groups). own_score = scale * q_t.kt_t,
 * unrotated. q_out = q rotated at position t/chunk. The last kt, vt of every
 * chunk (the ragged last one included) go to slot t/chunk of k_chunk, v_chunk, k rotated at
 * t/chunk.
 */
struct rat_scan_args {
	int64_t batch, seq_len, n_heads, groups, d_head, chunk;
	bool rope;
	float scale;
	struct view v, gate;          /* [B, T, H, d]; gate: logits */
	struct view q, k;             /* [B, T, groups, d] */
	const float *gate_bias;       /* [H*d] */
	struct view v_scan;           /* out [B, T, H, d]: vt */
	float *own_score;             /* out [B, T, H] */
	struct view q_out;            /* out [B, T, groups, d]; may alias q */
	struct view k_chunk, v_chunk; /* out [B, ceil(T/chunk), H, d] */
	float *k_state, *v_state; /* out [B, H*d]: running kt, vt after the last token, or NULL */
};

/* Gradients of rat_scan; recomputes the recurrence from v, k, gate. q here is
 * the unrotated projection, so a training forward must not alias q_out to q. */
struct rat_scan_backward_args {
	struct rat_scan_args forward;
	struct view dv_scan;            /* [B, T, H, d] */
	const float *down_score;        /* [B, T, H] */
	struct view dq_out;             /* [B, T, groups, d]: gradient of the rotated q */
	struct view dk_chunk, dv_chunk; /* [B, C, H, d] */
	struct view dv, dgate;          /* out [B, T, H, d] */
	struct view dq, dk;             /* out [B, T, groups, d] */
	float *dgate_bias;              /* out [H*d] */
};

/*
 * Generation at position p = *position: running state reset when p % chunk == 0,
 * updated, attention over the p/chunk stored chunks plus the running pair,
 * out = sigmoid(z) * o; when p % chunk == chunk-1 the running pair is stored
 * (k rotated at p/chunk) in slot p/chunk.
 */
struct rat_step_args {
	int64_t batch, n_heads, groups, d_head, chunk, chunk_slots;
	bool rope;
	float scale;
	const int32_t *position;
	int64_t position_hint;
	struct view z, v, gate;       /* [B, 1, H, d] */
	struct view q, k;             /* [B, 1, groups, d] */
	const float *gate_bias;       /* [H*d] */
	float *k_state, *v_state;     /* in, out [B, H*d] */
	struct view k_chunk, v_chunk; /* in, out [B, chunk_slots, H, d] */
	struct view out;              /* out [B, 1, H, d] */
};

enum gate_form {
	GATE_SIGMOID,  /* g = sigmoid(gate + gate_bias); h = g h + (1-g) x */
	GATE_LOG_DECAY /* h = exp(gate) h + x (HGRN's vector form); gate_bias must be NULL */
};

/*
 * Linear recurrence, channel by channel:  h_t = a_t h_{t-1} + u_t.
 * out_t = sigmoid(z_t) h_t where z is given, else h_t. Views have one head of width d_model.
 */
struct recurrence_args {
	int64_t batch, seq_len, d_model;
	enum gate_form form;
	struct view x, gate;    /* [B, T, 1, D] */
	struct view z;          /* [B, T, 1, D] logits; data NULL: none */
	const float *gate_bias; /* [D] or NULL */
	const float *h0;        /* [B, D] or NULL: zero */
	struct view h;   /* out [B, T, 1, D]: the states, for training; data NULL: not stored */
	struct view out; /* out [B, T, 1, D] */
	float *h_final;  /* out [B, D] or NULL */
};

struct recurrence_backward_args {
	struct recurrence_args forward; /* h (or, without z, out) holds the forward's states */
	struct view dout;               /* [B, T, 1, D] */
	struct view dgate_base; /* [B, T, 1, D]: added to dgate, a gradient of the same gate that
	                           another recurrence gave; data NULL: nothing */
	struct view dx, dgate;  /* out; dgate may alias dgate_base */
	struct view dz;         /* out iff z */
	float *dgate_bias;      /* out [D] iff gate_bias */
	float *dh0;             /* out [B, D] or NULL */
};

/* One token; h is updated in place. */
struct recurrence_step_args {
	int64_t batch, d_model;
	enum gate_form form;
	struct view x, gate, z; /* [B, 1, 1, D]; z.data NULL: none */
	const float *gate_bias; /* [D] or NULL */
	float *h;               /* in, out [B, D] */
	struct view out;        /* out [B, 1, 1, D] */
};

/*
 * Generation of RAT+ at position p = *position: with g = sigmoid(gate), channel by channel, from
 * zero at position 0,
 *   kt = g*kt + (1-g)*k,  vt = g*vt + (1-g)*v,
 * then attention of q, rotated at p, to the visible tokens (MASK_DILATED), kt and vt of this one
 * among them, out = sigmoid(z) * o. kt, rotated at p, and vt go to slot p % recent_slots of
 * k_recent, v_recent; and where all later tokens see this one (p < initial or
 * (p+1) % dilation == 0) to the next slot of k_kept, v_kept, which hold these tokens in order. Of
 * them those older than the window are read. recent_slots must be at least window + 1, or the
 * largest position + 1.
 */
struct ratplus_step_args {
	int64_t batch, n_heads, d_head;
	int64_t window, dilation, initial; /* dilation 0: no token is kept for its place */
	int64_t kept_slots, recent_slots;
	bool rope;
	float scale;
	const int32_t *position;
	int64_t position_hint;
	struct view z, q, k, v, gate;   /* [B, 1, H, d]; z, gate: logits */
	float *k_state, *v_state;       /* in, out [B, H*d]: kt, vt */
	struct view k_kept, v_kept;     /* in, out [B, kept_slots, H, d] */
	struct view k_recent, v_recent; /* in, out [B, recent_slots, H, d] */
	struct view out;                /* out [B, 1, H, d] */
};

/* Tokens between the states that selective_scan keeps for its backward. */
enum { SCAN_CHUNK = 64 };

/*
 * Mamba's selective scan (arXiv 2312.00752): each channel has a state of N numbers, whose decays
 * are rates of its own times a time step that the token chooses; B and C are the token's, for all
 * channels:
 *   h_t = exp(-exp(log_rate) dt_t) h_{t-1} + dt_t u_t B_t   [channels, N]
 *   y_t = h_t C_t + skip u_t
 *   out_t = y_t silu(z_t) where z is given, else y_t.
 * Views have one head.
 */
struct selective_scan_args {
	int64_t batch, seq_len, channels, state; /* state: N */
	struct view u, dt;                       /* [B, T, 1, channels]; dt >= 0 */
	struct view z;                           /* [B, T, 1, channels]; data NULL: none */
	struct view b, c;                        /* [B, T, 1, N] */
	const float *log_rate;                   /* [channels, N] */
	const float *skip;                       /* [channels] or NULL: 0 */
	const float *h0;                         /* [B, N, channels] or NULL: zero */
	struct view out;                         /* out [B, T, 1, channels] */
	float *borders; /* out [B, ceil(T/SCAN_CHUNK), N, channels]: the states before tokens 0,
	                   SCAN_CHUNK, ..., for training; or NULL */
	float *h_final; /* out [B, N, channels] or NULL */
};

/*
 * With dy = dout silu(z) and lambda_t = C_t dy_t + a_{t+1} lambda_{t+1}, a the decays:
 *   du = skip dy + dt (lambda B),  ddt = lambda (u B - rate a h_{t-1}),  dz = dout y silu'(z),
 *   dB = dt u lambda,  dC = dy h  (sums over the channels),
 *   dlog_rate = -rate dt lambda a h_{t-1},  dskip = dy u  (sums over the tokens).
 */
struct selective_scan_backward_args {
	struct selective_scan_args forward; /* borders holds the forward's result; out and h_final
	                                       are not read */
	struct view dout;                   /* [B, T, 1, channels] */
	struct view du, ddt;                /* out [B, T, 1, channels] */
	struct view dz;                     /* out iff z */
	struct view db, dc;                 /* out [B, T, 1, N] */
	float *dlog_rate;                   /* out [channels, N] */
	float *dskip;                       /* out [channels] iff skip */
	float *dh0;                         /* out [B, N, channels] or NULL */
};

/* One token; h is updated in place. */
struct selective_scan_step_args {
	int64_t batch, channels, state;
	struct view u, dt, z;  /* [B, 1, 1, channels]; z.data NULL: none */
	struct view b, c;      /* [B, 1, 1, N] */
	const float *log_rate; /* [channels, N] */
	const float *skip;     /* [channels] or NULL: 0 */
	float *h;              /* in, out [B, N, channels] */
	struct view out;       /* out [B, 1, 1, channels] */
};

enum decay {
	DECAY_NONE,     /* A_t = 1 (linear attention) */
	DECAY_CONSTANT, /* A_t = 1 - 2^(-5-h), h from 0 (RetNet) */
	DECAY_SCALAR,   /* exp(log_decay[b,t,h]) (Mamba-2) */
	DECAY_DIAGONAL  /* Diag(exp(log_decay[b,t,h,:])) (GLA, RWKV-6) */
};

enum rule {
	RULE_PLAIN, /* S_t = A_t S_{t-1} + k_t^T v_t; o_t = scale * q_t S_t */
	RULE_BONUS, /* the same S; o_t = scale * q_t (S_{t-1} + bonus * k_t^T v_t) (RWKV-6) */
	RULE_DELTA  /* S <- A_t S; v' = beta_t (v_t - k_t S); S <- S + k_t^T v'; o_t = scale * q_t S
	             */
};

/* "none", "constant", "scalar", "diagonal"; "plain", "bonus", "delta". */
const char *decay_name(enum decay decay);
const char *rule_name(enum rule rule);

/* Matrix-state recurrence; S [d_k, d_v] per sequence and head. */
struct matrix_recurrence_args {
	int64_t batch, seq_len, n_heads, d_k, d_v;
	enum decay decay;
	enum rule rule;
	int64_t chunk; /* chunk length of the chunkwise form; 1: the plain recurrence; 0: the kernel
	                  picks */
	float scale;
	struct view q, k;      /* [B, T, H, d_k]; a head stride of 0: the same for all heads
	                          (Mamba-2), whose gradients dq, dk remain apart */
	struct view v;         /* [B, T, H, d_v] */
	struct view log_decay; /* [B, T, H, d_k] (diagonal) or [B, T, H, 1] (scalar), natural log,
	                          <= 0; data NULL otherwise */
	const float *bonus;    /* [H, d_k] iff RULE_BONUS */
	struct view beta;      /* [B, T, H, 1] iff RULE_DELTA */
	const float *h0;       /* [B, H, d_k, d_v] or NULL: zero */
	struct view out;       /* out [B, T, H, d_v] */
	float *final_state;    /* out [B, H, d_k, d_v] or NULL */
	int64_t first_head;    /* the number of the first head, for DECAY_CONSTANT: 0 except for
	                          the reference, which may be given some of the heads */
};

struct matrix_recurrence_backward_args {
	struct matrix_recurrence_args forward;
	struct view dout;       /* [B, T, H, d_v] */
	struct view dq, dk, dv; /* out */
	struct view dlog_decay; /* out, shaped as log_decay, iff the decay is data-dependent */
	struct view dbeta;      /* out iff RULE_DELTA */
	float *dbonus;          /* out [H, d_k] iff RULE_BONUS */
	float *dh0;             /* out [B, H, d_k, d_v] or NULL */
};

/* One token; views have T = 1; state [B, H, d_k, d_v] updated in place. */
struct matrix_recurrence_step_args {
	int64_t batch, n_heads, d_k, d_v;
	enum decay decay;
	enum rule rule;
	float scale;
	struct view q, k, v, log_decay, beta;
	const float *bonus;
	float *state;
	struct view out;
	int64_t first_head; /* as in struct matrix_recurrence_args */
};

/* What a gate of low rank makes of its logits. */
enum low_rank {
	LOW_RANK_DECAY, /* logsigmoid(logit) / normalizer: GLA's decay */
	LOW_RANK_RATE,  /* -exp(log_rate_h) softplus(logit): KDA's decay, a rate per head */
	LOW_RANK_LOGIT, /* the logit: KDA's output gate, to which norm_gate gives its curve */
	LOW_RANK_TANH,  /* the logit of tanh(x): RWKV-6's mixes, of token_shift */
	LOW_RANK_EXP,   /* -exp(logit), of tanh(x): RWKV-6's decay */
	LOW_RANK_STEP   /* softplus(logit): Mamba's time step */
};

/* A gate of low rank, GLA's decay gate and those like it: logit = x W^T + bias, or tanh(x) W^T +
 * bias. x is rank-wide, with a row stride. */
struct decay_gate_args {
	int64_t n_tokens, rank, d_out, x_stride;
	enum low_rank form;
	int64_t n_heads;       /* of LOW_RANK_RATE; equal parts of d_out */
	float normalizer;      /* of LOW_RANK_DECAY */
	const void *x;         /* [n_tokens, rank], rows x_stride apart */
	const void *weight;    /* [d_out, rank] */
	const float *bias;     /* [d_out] */
	const float *log_rate; /* [n_heads] iff LOW_RANK_RATE */
	void *out;             /* out [n_tokens, d_out] */
};

struct decay_gate_backward_args {
	struct decay_gate_args forward; /* out holds the forward's result */
	const void *dout;               /* [n_tokens, d_out] */
	void *dx;                       /* out, rows x_stride apart */
	void *dlogit;                   /* scratch [n_tokens, d_out]; not where the output is the
	                                   logit */
	float *dweight, *dbias;         /* out */
	float *dlog_rate;               /* out [n_heads] iff LOW_RANK_RATE */
};

enum curve { CURVE_SILU, CURVE_SIGMOID, CURVE_NONE /* the number itself */ };

/* Of a head. */
enum norm {
	NORM_RMS,  /* x rstd * weight, rstd = 1/sqrt(mean(x^2) + eps); one weight [d] for all heads
	            */
	NORM_GROUP /* (x - mean) rstd * weight + bias, rstd that of x - mean; each channel has a
	              weight and a bias of its own (RWKV-6's group norm) */
};

/* GLA's output: a norm of each head, times curve(gate); the curve is silu, or KDA's sigmoid. */
struct norm_gate_args {
	int64_t n_tokens, n_heads, d_head, gate_stride;
	enum curve curve;
	enum norm norm;
	float eps;
	const void *x;       /* [n_tokens, H*d] */
	const float *weight; /* [d], of NORM_GROUP [H*d] */
	const float *bias;   /* [H*d] iff NORM_GROUP */
	const void *gate;    /* [n_tokens, H*d], rows gate_stride apart */
	float *rstd;         /* out [n_tokens, H] or NULL */
	void *out;           /* out [n_tokens, H*d] */
};

struct norm_gate_backward_args {
	struct norm_gate_args forward; /* rstd holds the forward's result */
	const void *dout;              /* [n_tokens, H*d] */
	void *dx;                      /* out [n_tokens, H*d] */
	void *dgate;                   /* out, rows gate_stride apart */
	float *dweight;                /* out, shaped as weight */
	float *dbias;                  /* out [H*d] iff NORM_GROUP */
};

/* One token per sequence, at *position: q and k rotated, as by struct rotate_args. Outputs may
 * alias inputs. */
struct rotate_step_args {
	int64_t batch, n_heads, d_head;
	const int32_t *position;  /* one, in device memory, the same for all sequences */
	struct view q, k;         /* [B, 1, H, d] */
	struct view q_out, k_out; /* out [B, 1, H, d] */
};

enum { CONV_WIDTH = 4, CONV_HISTORY = CONV_WIDTH - 1 };

/*
 * Mamba's short convolution, causal and channel by channel, and its activation:
 *   out_t = curve(bias + sum over j of weight_j * x_{t-3+j}),  x = 0 before the sequence;
 * the delta rules' has no bias. The curve is silu or, of Hawk, none.
 */
struct short_conv_args {
	int64_t batch, seq_len, channels;
	enum curve curve;
	int64_t x_stride;    /* of x and dx */
	const void *x;       /* [B*T, channels], rows x_stride apart */
	const float *weight; /* [channels, CONV_WIDTH]; the last is the token's own */
	const float *bias;   /* [channels] or NULL: 0 */
	void *out;           /* out [B*T, channels] */
	void *history; /* out [B, CONV_HISTORY, channels]: the last x, oldest first, or NULL */
};

struct short_conv_backward_args {
	struct short_conv_args forward; /* its out and history are not read */
	int64_t n_readers;              /* dout is the sum of theirs: keys that heads share */
	const void *dout;               /* [B*T, n_readers, channels] */
	void *dx;                       /* out [B*T, channels], rows x_stride apart */
	float *dweight;                 /* out */
	float *dbias;                   /* out iff bias */
};

/* One token; history moves on by one. */
struct short_conv_step_args {
	int64_t batch, channels, x_stride;
	enum curve curve;
	const void *x; /* [B, channels], rows x_stride apart */
	const float *weight;
	const float *bias; /* or NULL */
	void *history;     /* in, out [B, CONV_HISTORY, channels] */
	void *out;         /* out [B, channels] */
};

/*
 * Mamba-2's discretization, head by head, dt = softplus(logit + bias):
 *   log_decay = -exp(log_rate) dt,  out = dt x.
 */
struct time_step_args {
	int64_t n_tokens, n_heads, d_head;
	int64_t logit_stride, x_stride;
	const void *logit;     /* [n_tokens, H], rows logit_stride apart */
	const float *bias;     /* [H] */
	const float *log_rate; /* [H] */
	const void *x;         /* [n_tokens, H*d], rows x_stride apart */
	void *log_decay;       /* out [n_tokens, H] */
	void *out;             /* out [n_tokens, H*d] */
};

struct time_step_backward_args {
	struct time_step_args forward; /* its outputs are not read */
	const void *dlog_decay;        /* [n_tokens, H] */
	const void *dout;              /* [n_tokens, H*d] */
	const void *dskip;             /* [n_tokens, H*d] added to dx, or NULL */
	void *dlogit;                  /* out, rows logit_stride apart */
	void *dx;                      /* out [n_tokens, H*d]; may alias dskip */
	float *dbias, *dlog_rate;      /* out [H] */
};

/*
 * How much of a token a delta rule writes, and what it keeps of the state, head by head:
 *   beta = sigmoid(logit),
 *   log_decay = -exp(log_rate) softplus(decay_logit + bias)  where there is a decay_logit.
 */
struct delta_gate_args {
	int64_t n_tokens, n_heads, stride;
	const void *logit;       /* [n_tokens, H], rows `stride` apart */
	const void *decay_logit; /* likewise, or NULL: no decay */
	const float *bias;       /* [H] iff decay_logit */
	const float *log_rate;   /* [H] iff decay_logit */
	void *beta;              /* out [n_tokens, H] */
	void *log_decay;         /* out [n_tokens, H] iff decay_logit */
};

struct delta_gate_backward_args {
	struct delta_gate_args forward; /* its outputs are not read */
	const void *dbeta;              /* [n_tokens, H] */
	const void *dlog_decay;         /* [n_tokens, H] iff decay_logit */
	void *dlogit;                   /* out, rows `stride` apart */
	void *ddecay_logit;             /* out, likewise, iff decay_logit */
	float *dbias, *dlog_rate;       /* out [H] iff decay_logit */
};

/*
 * HGRN's forget gate with its lower bound: f = b + (1-b) sigmoid(logit), b = sigmoid(bound).
 *   log_decay = ln f
 *   key given (HGRN2):  key = 1-f,  out = silu(x)   (x is the query)
 *   else      (HGRN):   out = (1-f) silu(x)         (x is the input)
 */
struct forget_gate_args {
	int64_t n_tokens, width, stride;
	const void *logit, *x; /* [n_tokens, width], rows `stride` apart */
	const float *bound;    /* [width] */
	void *log_decay;       /* out [n_tokens, width] */
	void *key;             /* out [n_tokens, width] or NULL */
	void *out;             /* out [n_tokens, width] */
};

struct forget_gate_backward_args {
	struct forget_gate_args forward; /* of its outputs only whether key is NULL matters */
	const void *dlog_decay, *dout;   /* [n_tokens, width] */
	const void *dkey;                /* [n_tokens, width] iff key */
	void *dlogit, *dx;               /* out, rows `stride` apart */
	float *dbound;                   /* out [width] */
};

/*
 * The output of the layers that gate before they normalize, or do not gate:
 *   u = (x + skip_weight_h * skip) * silu(gate),  out = u * rstd_g * weight,
 * rstd_g = 1/sqrt(mean(u^2) + eps) over each of `groups` equal parts of a row.
 */
struct gate_norm_args {
	int64_t n_tokens, n_heads, d_head, groups;
	int64_t skip_stride, gate_stride;
	float eps;
	const void *x;            /* [n_tokens, H*d] */
	const void *skip;         /* [n_tokens, H*d], rows skip_stride apart, or NULL: 0 */
	const float *skip_weight; /* [H] iff skip */
	const void *gate;         /* [n_tokens, H*d], rows gate_stride apart, or NULL: no gate */
	const float *weight;      /* [H*d / groups], shared by the groups */
	float *rstd;              /* out [n_tokens, groups] or NULL */
	void *out;                /* out [n_tokens, H*d] */
};

struct gate_norm_backward_args {
	struct gate_norm_args forward; /* rstd holds the forward's result */
	const void *dout;              /* [n_tokens, H*d] */
	const void *dresidual;         /* [n_tokens, H*d] added to dx, or NULL */
	void *dx;                      /* out [n_tokens, H*d]; may alias dresidual */
	void *dskip;                   /* out [n_tokens, H*d] iff skip */
	void *dgate;                   /* out, rows gate_stride apart, iff gate */
	float *dskip_weight;           /* out [H] iff skip */
	float *dweight;                /* out [H*d / groups] */
};

/*
 * Block-diagonal products, n_products of them of the same x: block h of a row times a matrix of
 * its own, from the left,
 *   y_{p,h} = x_h weight_{p,h}.
 */
struct block_linear_args {
	int64_t n_tokens, n_products, n_blocks, d_in, d_out; /* widths of one block */
	const void *x;                                       /* [n_tokens, n_blocks, d_in] */
	const void *weight; /* [n_products, n_blocks, d_in, d_out] */
	void *y;            /* out [n_tokens, n_products, n_blocks, d_out] */
};

/* dx_h = dskip_h + sum over p of dy_{p,h} weight_{p,h}^T; dweight_{p,h} = x_h^T dy_{p,h}. */
struct block_linear_backward_args {
	struct block_linear_args forward; /* its y is not read */
	const void *dy;                   /* [n_tokens, n_products, n_blocks, d_out] */
	const void *dskip;                /* [n_tokens, n_blocks, d_in] added to dx, or NULL */
	void *dx;                         /* out [n_tokens, n_blocks, d_in] */
	float *dweight;                   /* out [n_products, n_blocks, d_in, d_out] */
};

/*
 * What stands before the recurrence of the real-gated linear recurrent unit, RG-LRU (arXiv
 * 2402.19427): with r = sigmoid(logit_0 + bias_0), i = sigmoid(logit_1 + bias_1),
 *   log_decay = -8 softplus(rate) r,  out = sqrt(1 - exp(2 log_decay)) i x,
 * the root being 1 at the first token of a sequence, before which there is no state.
 */
struct lru_gate_args {
	int64_t batch, seq_len, width;
	const int32_t *position; /* of the first token, one in device memory, the same for all
	                            sequences; or NULL: 0 */
	const void *logit;       /* [B*T, 2, width] */
	const float *bias;       /* [2, width] */
	const float *rate;       /* [width] */
	const void *x;           /* [B*T, width] */
	void *log_decay;         /* out [B*T, width] */
	void *out;               /* out [B*T, width] */
};

enum { LRU_SHARPNESS = 8 };

struct lru_gate_backward_args {
	struct lru_gate_args forward;  /* its outputs are not read */
	const void *dlog_decay, *dout; /* [B*T, width] */
	void *dlogit;                  /* out [B*T, 2, width] */
	void *dx;                      /* out [B*T, width] */
	float *dbias;                  /* out [2, width] */
	float *drate;                  /* out [width] */
};

/* out = x * gelu(gate), in the form gelu(z) = z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2. */
struct gelu_gate_args {
	int64_t n_tokens, width, gate_stride;
	const void *gate; /* [n_tokens, width], rows gate_stride apart */
	const void *x;    /* [n_tokens, width] */
	void *out;        /* out [n_tokens, width] */
};

struct gelu_gate_backward_args {
	struct gelu_gate_args forward; /* its out is not read */
	const void *dout;              /* [n_tokens, width] */
	void *dgate;                   /* out, rows gate_stride apart */
	void *dx;                      /* out [n_tokens, width] */
};

/* y = x * inverse, inverse = 1/sqrt(sum(x^2) + eps) over each head: q and k of length 1, as the
 * delta rules want them (arXiv 2406.06484). */
struct l2_norm_args {
	int64_t batch, seq_len, n_heads, d_head;
	float eps;
	struct view x, y; /* [B, T, H, d]; y out, may alias x */
	float *inverse;   /* out [B, T, H] or NULL */
};

/* dx = inverse * (dy - y * sum(y * dy)) over each head. */
struct l2_norm_backward_args {
	struct l2_norm_args forward; /* y and inverse hold the forward's results; x is not read */
	struct view dy, dx;          /* [B, T, H, d]; dx out, may alias dy */
};

enum shift {
	SHIFT_CONSTANT, /* a mix per channel, a parameter */
	SHIFT_VARIABLE  /* a mix per channel and token */
};

/*
 * RWKV's token shift: each channel of a token is mixed with that of the token before it, zero
 * before the sequence, in n_out ways:
 *   out_n = x_t + (x_{t-1} - x_t) * mix_n.
 */
struct token_shift_args {
	int64_t batch, seq_len, width, n_out;
	enum shift form;
	const void *x;       /* [B*T, width] */
	const float *weight; /* [n_out, width]: the mixes, iff SHIFT_CONSTANT */
	const void *mix;     /* [n_out, B*T, width] iff SHIFT_VARIABLE */
	void *out;           /* out [n_out, B*T, width] */
	void *last;          /* out [B, width]: the last x, or NULL */
};

struct token_shift_backward_args {
	struct token_shift_args forward; /* its outputs are not read */
	const void *dout;                /* [n_out, B*T, width] */
	const void *dresidual;           /* [B*T, width] added to dx, or NULL */
	void *dx;                        /* out [B*T, width]; may alias dresidual */
	void *dmix;                      /* out [n_out, B*T, width] iff SHIFT_VARIABLE */
	float *dweight;                  /* out [n_out, width] iff SHIFT_CONSTANT */
};

/* One token. The constant form goes first: it moves the state on, and leaves the variable one what
 * the state was. */
struct token_shift_step_args {
	int64_t batch, width, n_out;
	enum shift form;
	const void *x;       /* [B, width] */
	const float *weight; /* [n_out, width] iff SHIFT_CONSTANT */
	const void *mix;     /* [n_out, B, width] iff SHIFT_VARIABLE */
	void *state;         /* in, out [B, width]: the last x, iff SHIFT_CONSTANT */
	void *before;        /* [B, width]: x of the token before; in, of SHIFT_CONSTANT out or
	                        NULL */
	void *out;           /* out [n_out, B, width] */
};

/* gelu(x) = x * (1 + erf(x/sqrt(2))) / 2. */
struct gelu_args {
	int64_t count;
	const void *x;
	void *y; /* out; may alias x outside training */
};

struct gelu_backward_args {
	int64_t count;
	const void *x, *dy;
	void *dx; /* out; may alias dy */
};

/* y_n = table[tokens[n]]. A token outside 0..vocab-1 is the caller's error. */
struct embedding_args {
	int64_t n_tokens, vocab, d_model;
	const int32_t *tokens; /* [n_tokens] */
	const void *table;     /* [vocab, d_model] */
	void *y;               /* out [n_tokens, d_model] */
};

struct embedding_backward_args {
	int64_t n_tokens, vocab, d_model;
	const int32_t *tokens;
	const void *dy;
	float *dtable; /* out [vocab, d_model] */
};

/* Mean over n with targets[n] >= 0 of -log softmax(logits_n)[targets[n]]; its gradient replaces the
 * logits if wanted. */
struct cross_entropy_args {
	int64_t n_tokens, vocab;
	void *logits; /* in [n_tokens, vocab]; out: the gradient if want_gradient */
	bool want_gradient;
	const int32_t *targets; /* [n_tokens]; negative: ignored */
	float *loss;            /* out [1] */
	float *losses;          /* scratch [n_tokens] */
};

/* tokens[n] = argmax of logits_n (the lowest index among equals); then *position += 1 if not NULL.
 */
struct argmax_args {
	int64_t n_tokens, vocab;
	const void *logits;
	int32_t *tokens;   /* out [n_tokens] */
	int32_t *position; /* in, out, or NULL */
};

/*
 * Whether an option is one of those named, for kernels that have all of these. A kernel takes what
 * it knows: an option that is new is refused by all that nobody has taught it, the reference
 * included.
 */
static inline bool is_known_mask(enum mask mask)
{
	return mask == MASK_CAUSAL || mask == MASK_WINDOW || mask == MASK_CHUNK ||
	       mask == MASK_FULL;
}

/* Those that know MASK_DILATED as well, whose keys are no interval. */
static inline bool is_mask(enum mask mask)
{
	return is_known_mask(mask) || mask == MASK_DILATED;
}

static inline bool is_known_gate(enum gate_form form)
{
	return form == GATE_SIGMOID || form == GATE_LOG_DECAY;
}

static inline bool is_known_decay(enum decay decay)
{
	return decay == DECAY_NONE || decay == DECAY_CONSTANT || decay == DECAY_SCALAR ||
	       decay == DECAY_DIAGONAL;
}

static inline bool is_known_rule(enum rule rule)
{
	return rule == RULE_PLAIN || rule == RULE_BONUS || rule == RULE_DELTA;
}

static inline bool is_known_low_rank(enum low_rank form)
{
	return form == LOW_RANK_DECAY || form == LOW_RANK_RATE || form == LOW_RANK_LOGIT ||
	       form == LOW_RANK_TANH || form == LOW_RANK_EXP || form == LOW_RANK_STEP;
}

/* Whether the output is the logit itself. */
static inline bool is_logit(enum low_rank form)
{
	return form == LOW_RANK_LOGIT || form == LOW_RANK_TANH;
}

/* Whether it is tanh(x) that is multiplied. */
static inline bool has_tanh(enum low_rank form)
{
	return form == LOW_RANK_TANH || form == LOW_RANK_EXP;
}

static inline bool is_known_curve(enum curve curve)
{
	return curve == CURVE_SILU || curve == CURVE_SIGMOID;
}

static inline bool is_known_norm(enum norm norm)
{
	return norm == NORM_RMS || norm == NORM_GROUP;
}

static inline bool is_known_shift(enum shift form)
{
	return form == SHIFT_CONSTANT || form == SHIFT_VARIABLE;
}

/* Of convolutions. */
static inline bool is_known_activation(enum curve curve)
{
	return curve == CURVE_SILU || curve == CURVE_NONE;
}

/* Room for the arguments of any operation. */
union any_args {
#define X(constant, name) struct name##_args name;
	OPERATIONS(X)
#undef X
};

/* One implementation of one operation. */
struct kernel {
	enum operation operation;
	const char *provider;
	/* NULL if it can take these arguments, else why not, in a few words. NULL pointer: takes
	 * all. */
	const char *(*unsupported)(const struct device *device, const void *args);
	/* Bytes of workspace it wants for these arguments. NULL pointer: none. */
	size_t (*workspace)(const struct device *device, const void *args);
	/* Submits the work to the device's queue. */
	enum status (*run)(struct device *device, const void *args, void *workspace);
	/* What goes into exponentials it keeps in the type of activations. */
	bool rounds_scores;
};

enum { MAX_PROVIDER_CHOICES = 16 };

/* What the user asked for with --provider: "portable", or "attention=cudnn". */
struct provider_choice {
	int count;
	struct {
		int operation; /* -1: every operation */
		char provider[24];
	} choice[MAX_PROVIDER_CHOICES];
};

/*
 * Parses a comma-separated --provider list into *choice. STATUS_INVALID with a
 * message on an unknown operation or a provider that no kernel of `device` has.
 */
enum status provider_choice_parse(struct provider_choice *choice, struct device *device,
                                  const char *text);

/* One line of a plan: `count` runs of the same operation at the same cost. */
struct planned_operation {
	enum operation operation;
	const char *provider;
	struct cost cost; /* of one run */
	int64_t count;
};

enum { MAX_PLANNED_OPERATIONS = 128 };

/*
 * What a sequence of operations would do. With context.plan set, kernel_run()
 * runs nothing: it selects the kernel and adds to the plan, so the code that
 * runs a layer is also the code that counts its work and its workspace. The
 * pointers in the arguments are then never dereferenced.
 */
struct kernel_plan {
	size_t workspace_bytes; /* the largest of all */
	struct cost total;
	int n_operations;
	struct planned_operation operations[MAX_PLANNED_OPERATIONS];
};

/* The operations that a plan would run, one by one; calls is to be freed. */
struct operation_call {
	enum operation operation;
	const struct kernel *kernel;
	union any_args args;
};

struct call_list {
	int count, capacity;
	struct operation_call *calls;
};

/* Where and how operations run: passed down, never stored. */
struct context {
	struct device *device;
	struct provider_choice choice;
	void *workspace; /* shared by all operations, which run one after another */
	size_t workspace_bytes;
	struct kernel_plan *plan;  /* non-NULL: plan, do not run */
	struct call_list *list;    /* non-NULL with a plan: the operations one by one */
	bool accumulate;           /* gradients of parameters are added to what is there */
	bool ranges;               /* wrap each operation in a profiler range */
	const char *ran[OP_COUNT]; /* provider of the last run (or plan) of each operation */
};

/*
 * The kernel that kernel_run() would take, or NULL with a message saying why
 * none does: the reason of the last of the backend's own, which takes most; of other people's
 * kernels only if it has none. An explicit "operation=provider" choice is binding; a bare
 * provider is a preference that falls back where it has no kernel.
 */
const struct kernel *kernel_select(const struct context *ctx, enum operation operation,
                                   const void *args);

/* A list of kernels and those of `more`, which may be NULL and ends with NULL, in new memory; NULL
 * if there is none. */
struct kernel *kernels_joined(const struct kernel *kernels, const struct kernel *const *more);
/* How many there are in a list. */
size_t kernels_count(const struct kernel *kernels);

/* False if an earlier kernel of the list has the same operation and provider: a provider may have
 * several kernels of one operation, which take different arguments. */
bool kernel_is_first(const struct kernel *kernels, const struct kernel *kernel);

/* Begins and ends a named range for a profiler, where the context wants them. */
void context_range_push(const struct context *ctx, const char *name);
void context_range_pop(const struct context *ctx);

/* Selects and runs (or plans); `args` must be the struct of that operation. For generic code;
 * everybody else calls run_attention(ctx, &args) and its like, which compile with no other struct.
 */
enum status kernel_run(struct context *ctx, enum operation operation, const void *args);

#define X(constant, name)                                                                          \
	static inline enum status run_##name(struct context *ctx, const struct name##_args *args)  \
	{                                                                                          \
		return kernel_run(ctx, OP_##constant, args);                                       \
	}
OPERATIONS(X)
#undef X

/* What a float pointer of an argument struct holds on the reference's device. */
static inline const double *wide(const float *tensor)
{
	return (const double *)(const void *)tensor;
}

static inline double *wide_out(float *tensor)
{
	return (double *)(void *)tensor;
}

/* FLOPs and bytes of an operation: causal attention counts visible pairs only,
 * its backward 2.5 times the forward. */
struct cost kernel_cost(const struct device *device, enum operation operation, const void *args);

#ifdef __cplusplus
}
#endif

#endif
