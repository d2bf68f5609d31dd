/*
 * Slow, obvious fp64 versions of every operation of kernels/kernels.h, on the
 * host. They share no code with any kernel: tests compare kernels with them,
 * and layers use them to verify what a timed run has left in its buffers.
 * Some can run elsewhere (struct reference_device): naive fp64 again, for long
 * sequences.
 *
 * All tensors are contiguous arrays of double in the order of the shape given
 * ([B, T, H, d]: element ((b*T + t)*H + h)*d + i), owned by the caller, never
 * aliased. Outputs and gradients are overwritten. A pointer marked "or NULL"
 * is optional. Equations and symbols are those of kernels/kernels.h.
 *
 * Functions that need scratch memory return STATUS_OOM, with a message, if
 * there is none; the others cannot fail. They use OpenMP and must not be
 * called from inside a parallel region.
 */
#ifndef KERNELS_REFERENCE_REFERENCE_H
#define KERNELS_REFERENCE_REFERENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/kernels.h"

/* ---- where they run ---- */

struct reference_attention;
struct reference_rat_scan;
struct reference_rat_scan_out;
struct reference_recurrence;
struct reference_matrix;
struct reference_attention_grads;
struct reference_attention_left;
struct reference_rat_scan_grads;
struct reference_recurrence_grads;
struct reference_conv;
struct reference_gate_norm;

/* A projection that was run: y [n, d_out] = x_norm W^T, its tensors in the backend's memory. */
struct reference_gradient_of {
	enum dtype dtype; /* of x, x_norm and dy */
	int64_t n, d_in, d_out;
	const void *x, *x_norm; /* [n, d_in] before and after the norm */
	const void *dy;         /* [n, d_out] */
};

/*
 * Another place than the host, with doubles in its own memory: the functions
 * below of the same names, which are marked "anywhere". Rows are on the host
 * nevertheless. Where a function has no status its errors wait for the next
 * one that has.
 */
struct reference_device {
	/* STATUS_OOM without a message of its own if there is no memory. */
	enum status (*take)(int64_t count, double **memory);
	void (*release)(double *memory);
	/* to [count] = elements of a tensor in the backend's memory. */
	enum status (*load)(enum dtype dtype, const void *tensor, int64_t count, double *to);
	/* host [count] = from, once all work is done. */
	enum status (*store)(int64_t count, const double *from, double *host);
	void (*get_columns)(int64_t n_rows, int64_t width, int64_t first, int64_t count,
	                    const double *from, double *to);
	void (*get_rows)(int64_t width, int64_t n_rows, const int64_t *rows, const double *from,
	                 double *to);
	void (*round)(enum dtype dtype, int64_t count, double *x);
	void (*linear)(int64_t n, int64_t d_in, int64_t d_out, const double *x,
	               const double *weight, double *y);
	void (*rms_norm)(int64_t n, int64_t d, double eps, const double *x, const double *weight,
	                 double *y);
	void (*rotate)(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
	               int64_t first, int64_t period, const double *x, double *y);
	enum status (*attention_forward)(const struct reference_attention *a, int64_t n_rows,
	                                 const int64_t *rows, double *out);
	enum status (*rat_scan_forward)(const struct reference_rat_scan *s,
	                                const struct reference_rat_scan_out *out);
	void (*recurrence_forward)(const struct reference_recurrence *r, double *out);
	enum status (*matrix_forward)(const struct reference_matrix *m, double *out);
	void (*decay_gate)(int64_t n, int64_t rank, int64_t d_out, double normalizer,
	                   const double *x, const double *weight, const double *bias,
	                   double *log_decay);
	void (*norm_gate)(int64_t n, int64_t n_heads, int64_t d_head, double eps, const double *x,
	                  const double *weight, const double *gate, double *out);
	void (*short_conv)(const struct reference_conv *c, double *out);
	void (*time_step)(int64_t n, int64_t n_heads, int64_t d_head, const double *logit,
	                  const double *bias, const double *log_rate, const double *x,
	                  double *log_decay, double *out);
	void (*forget_gate)(int64_t n, int64_t width, const double *logit, const double *bound,
	                    const double *x, double *log_decay, double *key, double *out);
	/* u = (x + skip_weight skip) silu(gate), what reference_gate_norm() normalizes. */
	void (*gated)(const struct reference_gate_norm *g, double *u);

	/* Gradients. dx [n, d_in] = dy [n, d_out] W. */
	void (*linear_input_gradient)(int64_t n, int64_t d_in, int64_t d_out, const double *dy,
	                              const double *weight, double *dx);
	void (*set_columns)(int64_t n_rows, int64_t width, int64_t first, int64_t count,
	                    const double *from, double *to);
	void (*rotate_backward)(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
	                        int64_t first, int64_t period, const double *dy, double *dx);
	/*
	 * Of one sequence: dq of the queries and dk, dv of the keys that are named, in their places
	 * in tensors whose other rows are left alone; the other gradients everywhere.
	 */
	enum status (*attention_backward_rows)(const struct reference_attention *a,
	                                       const struct reference_attention_left *left,
	                                       const double *dout, int64_t n_queries,
	                                       const int64_t *queries, int64_t n_keys,
	                                       const int64_t *keys,
	                                       const struct reference_attention_grads *grads);
	/* Neither writes dgate_bias or dh0. */
	enum status (*rat_scan_backward)(const struct reference_rat_scan *s,
	                                 const struct reference_rat_scan_grads *grads);
	enum status (*recurrence_backward)(const struct reference_recurrence *r, const double *dout,
	                                   const struct reference_recurrence_grads *grads);
	/* Over all tokens of a run, to the host: rows of dweight = dy^T x_norm, [n_rows, d_in]; */
	enum status (*weight_gradient_rows)(const struct reference_gradient_of *of, int64_t n_rows,
	                                    const int64_t *rows, double *host);
	/* columns of the norm's gradient, sum of (dy W) x rstd, W [d_out, d_in] where the reference
	 * runs; */
	enum status (*norm_gradient_columns)(const struct reference_gradient_of *of, double eps,
	                                     const double *weight, int64_t n_columns,
	                                     const int64_t *columns, double *host);
	/* the sums of the first `count` columns of a tensor of n rows `stride` apart. */
	enum status (*column_sums)(enum dtype dtype, const void *tensor, int64_t n, int64_t stride,
	                           int64_t count, double *host);
};

/* From now on the functions marked "anywhere" run on `device`, and nothing else may be called;
 * NULL: on the host, as at the start. Their optional outputs must then be NULL. */
void reference_use(const struct reference_device *device);
const struct reference_device *reference_in_use(void);

/* Anywhere: memory for `count` doubles, STATUS_OOM; memory NULL is let be. */
enum status reference_take(int64_t count, double **memory);
void reference_release(double *memory);

/* ---- the functions ---- */

/* Anywhere: to [n_rows, count] = columns first .. first+count of from [n_rows, width]. */
void reference_get_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count,
                           const double *from, double *to);
/* Columns first .. first+count of to [n_rows, width] = from [n_rows, count]. */
void reference_set_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count,
                           const double *from, double *to);

/* Anywhere: to [n_rows, width] = the rows named of from. */
void reference_get_rows(int64_t width, int64_t n_rows, const int64_t *rows, const double *from,
                        double *to);
/* Anywhere: rounds to what an element of type `dtype` can hold. */
void reference_round(enum dtype dtype, int64_t count, double *x);

/* sigmoid(x), accurate at both ends. */
double reference_sigmoid(double x);

/* Anywhere: y [n, d_out] = x [n, d_in] W^T, W [d_out, d_in]. */
void reference_linear(int64_t n, int64_t d_in, int64_t d_out, const double *x, const double *weight,
                      double *y);
/* dx [n, d_in] or NULL, dweight [d_out, d_in] or NULL, from dy [n, d_out]. */
void reference_linear_backward(int64_t n, int64_t d_in, int64_t d_out, const double *x,
                               const double *weight, const double *dy, double *dx, double *dweight);

/* Anywhere: y = x / sqrt(mean(x^2) + eps) * weight, rows of length d; rstd [n] or NULL. */
void reference_rms_norm(int64_t n, int64_t d, double eps, const double *x, const double *weight,
                        double *y, double *rstd);
/* dx [n, d] or NULL, dweight [d] or NULL. */
void reference_rms_norm_backward(int64_t n, int64_t d, double eps, const double *x,
                                 const double *weight, const double *dy, double *dx,
                                 double *dweight);

/*
 * Anywhere. Rotary embedding: y = x rotated, [batch, seq_len, n_heads, d_head]; token t
 * has the position (first + t) / period, rounded down: first 0 and period 1
 * in attention, period L for RAT's chunk index. y may be x.
 */
void reference_rotate(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
                      int64_t first, int64_t period, const double *x, double *y);
/* The inverse rotation, which is also the gradient: dx from dy. dx may be dy. */
void reference_rotate_backward(int64_t batch, int64_t seq_len, int64_t n_heads, int64_t d_head,
                               int64_t first, int64_t period, const double *dy, double *dx);

/* Softmax attention; see struct attention_args. q and k come rotated. */
struct reference_attention {
	int64_t batch, n_heads, q_heads, d_head;
	int64_t seq_len, kv_len;
	enum mask mask;
	int64_t window, chunk;
	double scale;
	const double *q;         /* [B, T, q_heads, d] */
	const double *k, *v;     /* [B, kv_len, H, d] */
	const double *own_score; /* [B, T, H], already scaled, or NULL */
	const double *own_value; /* [B, T, H, d] iff own_score */
	const double *gate;      /* [B, T, H, d] logits, or NULL */
};

struct reference_attention_grads {
	double *dq;         /* [B, T, q_heads, d] */
	double *dk, *dv;    /* [B, kv_len, H, d] */
	double *dgate;      /* [B, T, H, d] iff gate */
	double *down_score; /* [B, T, H] iff own_score */
	double *down_value; /* [B, T, H, d] iff own_score */
};

/* What a forward left: o before the gate [T, H, d], lse [H, T]. */
struct reference_attention_left {
	const double *out, *lse;
};

/*
 * Anywhere. The rows named (indices b*T + t; rows NULL: all B*T of them, n_rows is then
 * ignored): out [n_rows, H, d] with the gate applied, out_ungated [n_rows, H,
 * d] or NULL, lse [n_rows, H] or NULL (not the kernels' [B, H, T]).
 */
enum status reference_attention_forward(const struct reference_attention *a, int64_t n_rows,
                                        const int64_t *rows, double *out, double *out_ungated,
                                        double *lse);
/* All gradients from dout [B, T, H, d]; recomputes the forward. */
enum status reference_attention_backward(const struct reference_attention *a, const double *dout,
                                         const struct reference_attention_grads *grads);

/* One generated token; see struct attention_step_args. q, k, v [B, H, d] unrotated, as
 * projected; the caches as they were before the step. */
struct reference_attention_step {
	int64_t batch, n_heads, d_head;
	int64_t kv_slots, window; /* window < 0: all */
	bool rope;
	double scale;
	int64_t position;
	const double *q, *k, *v;         /* [B, H, d] */
	const double *k_cache, *v_cache; /* [B, kv_slots, H, d] */
};

/* out [B, H, d]; k_stored [B, H, d] or NULL: the key that goes to slot position % kv_slots. */
enum status reference_attention_step(const struct reference_attention_step *s, double *out,
                                     double *k_stored);

/* RAT inside a chunk; see struct rat_scan_args. C = ceil(T/L) chunks. */
struct reference_rat_scan {
	int64_t batch, seq_len, n_heads, groups, d_head, chunk;
	bool rope;
	double scale;
	const double *v, *gate;  /* [B, T, H, d]; gate: logits */
	const double *q, *k;     /* [B, T, groups, d] */
	const double *gate_bias; /* [H*d] */
};

/* Any of them may be NULL but k_chunk and v_chunk. */
struct reference_rat_scan_out {
	double *k_scan, *v_scan;   /* [B, T, H, d]: kt (unrotated), vt */
	double *own_score;         /* [B, T, H] */
	double *q_out;             /* [B, T, groups, d], rotated at t/L */
	double *k_chunk, *v_chunk; /* [B, C, H, d], k rotated at its chunk */
	double *k_state, *v_state; /* [B, H, d]: kt, vt after the last token */
};

struct reference_rat_scan_grads {
	const double *dv_scan;             /* in [B, T, H, d] */
	const double *down_score;          /* in [B, T, H] */
	const double *dq_out;              /* in [B, T, groups, d] */
	const double *dk_chunk, *dv_chunk; /* in [B, C, H, d] */
	double *dv, *dgate;                /* out [B, T, H, d] */
	double *dq, *dk;                   /* out [B, T, groups, d] */
	double *dgate_bias;                /* out [H*d] */
};

/* Anywhere. */
enum status reference_rat_scan_forward(const struct reference_rat_scan *s,
                                       const struct reference_rat_scan_out *out);
enum status reference_rat_scan_backward(const struct reference_rat_scan *s,
                                        const struct reference_rat_scan_grads *grads);

/* One generated token; see struct rat_step_args. States and chunks as before the step. */
struct reference_rat_step {
	int64_t batch, n_heads, groups, d_head, chunk, chunk_slots;
	bool rope;
	double scale;
	int64_t position;
	const double *z, *v, *gate;      /* [B, H, d] */
	const double *q, *k;             /* [B, groups, d] */
	const double *gate_bias;         /* [H*d] */
	const double *k_state, *v_state; /* [B, H, d] */
	const double *k_chunk, *v_chunk; /* [B, chunk_slots, H, d] */
};

/* out [B, H, d]; k_state, v_state [B, H, d] after the step, or both NULL. (At the end of a chunk
 * v_state, and k_state rotated at position/chunk, are also stored in that slot.) */
enum status reference_rat_step(const struct reference_rat_step *s, double *out, double *k_state,
                               double *v_state);

/* Linear recurrence; see struct recurrence_args. A step is T = 1 from h0. */
struct reference_recurrence {
	int64_t batch, seq_len, d_model;
	enum gate_form form;
	const double *x, *gate;  /* [B, T, D] */
	const double *z;         /* [B, T, D] logits, or NULL */
	const double *gate_bias; /* [D] or NULL */
	const double *h0;        /* [B, D] or NULL: zero */
};

struct reference_recurrence_grads {
	double *dx, *dgate; /* [B, T, D] */
	double *dz;         /* [B, T, D] iff z */
	double *dgate_bias; /* [D] iff gate_bias */
	double *dh0;        /* [B, D] or NULL */
};

/* Anywhere. out [B, T, D]; h [B, T, D] or NULL: the states; h_final [B, D] or NULL. */
void reference_recurrence_forward(const struct reference_recurrence *r, double *out, double *h,
                                  double *h_final);
enum status reference_recurrence_backward(const struct reference_recurrence *r, const double *dout,
                                          const struct reference_recurrence_grads *grads);

/* Matrix-state recurrence, token by token; see struct matrix_recurrence_args. A step is T = 1
 * from h0. */
struct reference_matrix {
	int64_t batch, seq_len, n_heads, d_k, d_v;
	enum decay decay;
	enum rule rule;
	double scale;
	const double *q, *k;     /* [B, T, H, d_k] */
	const double *v;         /* [B, T, H, d_v] */
	const double *log_decay; /* [B, T, H, d_k] (diagonal), [B, T, H] (scalar), else NULL */
	const double *bonus;     /* [H, d_k] iff RULE_BONUS */
	const double *beta;      /* [B, T, H] iff RULE_DELTA */
	const double *h0;        /* [B, H, d_k, d_v] or NULL: zero */
};

struct reference_matrix_grads {
	double *dq, *dk, *dv;
	double *dlog_decay; /* shaped as log_decay, iff the decay is data-dependent */
	double *dbonus;     /* [H, d_k] iff RULE_BONUS */
	double *dbeta;      /* [B, T, H] iff RULE_DELTA */
	double *dh0;        /* [B, H, d_k, d_v] or NULL */
};

/* Anywhere. out [B, T, H, d_v]; final_state [B, H, d_k, d_v] or NULL. */
enum status reference_matrix_forward(const struct reference_matrix *m, double *out,
                                     double *final_state);
/*
 * The rows named (indices b*T + t) alone, out [n_rows, H, d_v], each as a sum over the tokens
 * before it, which ends where the decays have left nothing. Not for RULE_DELTA.
 */
enum status reference_matrix_rows(const struct reference_matrix *m, int64_t n_rows,
                                  const int64_t *rows, double *out);
/* Keeps the states of about 2 sqrt(T) tokens per thread. */
enum status reference_matrix_backward(const struct reference_matrix *m, const double *dout,
                                      const struct reference_matrix_grads *grads);

/* Anywhere: log_decay [n, d_out] = logsigmoid(x W^T + bias) / normalizer; x [n, rank], W [d_out,
 * rank]. */
void reference_decay_gate(int64_t n, int64_t rank, int64_t d_out, double normalizer,
                          const double *x, const double *weight, const double *bias,
                          double *log_decay);
/* dx [n, rank], dweight [d_out, rank], dbias [d_out] from dlog_decay [n, d_out]. */
enum status reference_decay_gate_backward(int64_t n, int64_t rank, int64_t d_out, double normalizer,
                                          const double *x, const double *weight, const double *bias,
                                          const double *dlog_decay, double *dx, double *dweight,
                                          double *dbias);

/* Anywhere: out [n, H, d] = RMSNorm of each head of x [n, H, d], times weight [d], times
 * silu(gate); rstd [n, H] or NULL. */
void reference_norm_gate(int64_t n, int64_t n_heads, int64_t d_head, double eps, const double *x,
                         const double *weight, const double *gate, double *out, double *rstd);
/* dx, dgate [n, H, d], dweight [d]. */
enum status reference_norm_gate_backward(int64_t n, int64_t n_heads, int64_t d_head, double eps,
                                         const double *x, const double *weight, const double *gate,
                                         const double *dout, double *dx, double *dgate,
                                         double *dweight);

/* Short convolution; see struct short_conv_args. A step is T = 1 behind its history. */
struct reference_conv {
	int64_t batch, seq_len, channels;
	int64_t n_readers;           /* each gets its own copy of the output */
	const double *x;             /* [B, T, channels] */
	const double *weight, *bias; /* [channels, CONV_WIDTH], [channels] */
	const double *history;       /* [B, CONV_HISTORY, channels], oldest first, or NULL: zero */
};

/* Anywhere: out [B, T, n_readers, channels]; history [B, CONV_HISTORY, channels] after the last
 * token, or NULL. */
void reference_short_conv(const struct reference_conv *c, double *out, double *history);
/* From dout [B, T, n_readers, channels]. */
void reference_short_conv_backward(const struct reference_conv *c, const double *dout, double *dx,
                                   double *dweight, double *dbias);

/* Anywhere: Mamba-2's discretization; see struct time_step_args. logit, log_decay [n, H]; x, out
 * [n, H, d].
 */
void reference_time_step(int64_t n, int64_t n_heads, int64_t d_head, const double *logit,
                         const double *bias, const double *log_rate, const double *x,
                         double *log_decay, double *out);
void reference_time_step_backward(int64_t n, int64_t n_heads, int64_t d_head, const double *logit,
                                  const double *bias, const double *log_rate, const double *x,
                                  const double *dlog_decay, const double *dout, double *dlogit,
                                  double *dbias, double *dlog_rate, double *dx);

/* Anywhere: HGRN's forget gate; see struct forget_gate_args. All [n, width] but bound [width]; key
 * or NULL. */
void reference_forget_gate(int64_t n, int64_t width, const double *logit, const double *bound,
                           const double *x, double *log_decay, double *key, double *out);
void reference_forget_gate_backward(int64_t n, int64_t width, const double *logit,
                                    const double *bound, const double *x, const double *dlog_decay,
                                    const double *dkey, const double *dout, double *dlogit,
                                    double *dbound, double *dx);

/* The norm behind a gate; see struct gate_norm_args. */
struct reference_gate_norm {
	int64_t n, n_heads, d_head, groups;
	double eps;
	const double *x;                  /* [n, H, d] */
	const double *skip, *skip_weight; /* [n, H, d], [H], or NULL */
	const double *gate;               /* [n, H, d] or NULL */
	const double *weight;             /* [H*d / groups] */
};

struct reference_gate_norm_grads {
	double *dx;                   /* [n, H, d] */
	double *dskip, *dskip_weight; /* iff skip */
	double *dgate;                /* iff gate */
	double *dweight;
};

/* Anywhere: out [n, H, d]; rstd [n, groups] or NULL. */
enum status reference_gate_norm(const struct reference_gate_norm *g, double *out, double *rstd);
enum status reference_gate_norm_backward(const struct reference_gate_norm *g, const double *dout,
                                         const struct reference_gate_norm_grads *grads);

/* y = x * (1 + erf(x/sqrt(2))) / 2. */
void reference_gelu(int64_t count, const double *x, double *y);
void reference_gelu_backward(int64_t count, const double *x, const double *dy, double *dx);

/* y [n, d] = table[tokens]; dtable [vocab, d] = the sum of dy over the tokens that read a row. */
void reference_embedding(int64_t n, int64_t d, const int32_t *tokens, const double *table,
                         double *y);
void reference_embedding_backward(int64_t n, int64_t vocab, int64_t d, const int32_t *tokens,
                                  const double *dy, double *dtable);

/* Mean over targets >= 0 of -log softmax(logits [n, vocab])[target]; dlogits [n, vocab] or NULL.
 * No such target: loss and gradient 0. */
double reference_cross_entropy(int64_t n, int64_t vocab, const double *logits,
                               const int32_t *targets, double *dlogits);

#endif
