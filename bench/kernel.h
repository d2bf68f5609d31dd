/*
 * One operation by itself: its arguments and tensors for given sizes, random
 * inputs, and the check of what it wrote against the fp64 reference.
 *
 * Activations are dense [B, T, H, d]; the caches of decoding and the chunks of
 * RAT are [B, H, slots, d], as the layers store them.
 */
#ifndef BENCH_KERNEL_H
#define BENCH_KERNEL_H

#include "bench/harness/case.h"
#include "kernels/kernels.h"

enum distribution {
	DRAW_NONE,      /* what the operation writes */
	DRAW_NORMAL,    /* normal(0, scale) */
	DRAW_UNIFORM,   /* uniform in 0 .. scale */
	DRAW_LOG_DECAY, /* logsigmoid(normal(0, 1)) / 16 */
	DRAW_POSITION   /* the last of seq_len positions, one integer */
};

struct operand {
	enum dtype dtype;
	enum operand_role { OPERAND_INPUT, OPERAND_OUTPUT, OPERAND_STATE /* both */ } role;
	enum distribution distribution;
	float scale;
	int64_t count;
	void *data;
};

enum { MAX_OPERANDS = 16 };

/* An operation with its tensors in one piece of memory. */
struct kernel_problem {
	const struct backend *backend;
	const struct kernel_kind *kind;
	/* Sizes; see kernels/kernels.h. kv_len counts keys, or chunks. */
	int64_t batch, seq_len, n_heads, groups, d_head, d_k, d_v, chunk, window, kv_len;
	int n_operands;
	struct operand operand[MAX_OPERANDS];
	char *base;
	size_t bytes;
	union {
		struct attention_args attention;
		struct attention_step_args attention_step;
		struct rat_scan_args rat_scan;
		struct rat_step_args rat_step;
		struct recurrence_args recurrence;
		struct recurrence_step_args recurrence_step;
		struct matrix_recurrence_args matrix;
		struct matrix_recurrence_step_args matrix_step;
		struct linear_residual_args linear;
		struct norm_linear_args norm_linear;
	} args;
	/* Kept by the check: what the reference makes of a case is the same for all providers. */
	double *expected, *before;
};

/* What a row's `block` names. */
struct kernel_kind {
	const char *name; /* "gla_forward" */
	enum operation operation;
	bool step;        /* one token for each of --batch sequences */
	enum decay decay; /* of the matrix recurrences */
	enum rule rule;
	bool chunkwise;   /* --chunk sets its chunk length */
	bool half_keys;   /* keys are half as wide as values */
	int64_t widening; /* of products: d_out / d_in */
	/* Takes the operands and makes the arguments. */
	void (*build)(struct kernel_problem *p);
	/* Raises *worst to the error of the worst sampled row of what the last launch wrote. */
	enum status (*check)(struct kernel_problem *p, int64_t rows, uint64_t seed, double *worst);
	/* Keeps what the check needs of the states before the launch; or NULL. */
	enum status (*keep)(struct kernel_problem *p, uint64_t seed);
};

/* Every kind; ends with a name of NULL. */
extern const struct kernel_kind kernel_kinds[];
/* The kind called `name`, or NULL. */
const struct kernel_kind *kernel_kind_find(const char *name);

/* The arguments of a case whose tensors begin at `base`, which is not looked at. */
void kernel_problem_build(struct kernel_problem *p, const struct backend *backend,
                          const struct bench_case *c, char *base);

/* Random inputs, reproducible from `seed`. */
enum status kernel_problem_fill(struct kernel_problem *p, uint64_t seed);
/* Fills what the operation is to write with NaN. */
enum status kernel_problem_poison(struct kernel_problem *p);
/* Keeps what kernel_problem_check() needs of the states before a launch. */
enum status kernel_problem_keep(struct kernel_problem *p, uint64_t seed);
/* The worst sampled row's relative error; INFINITY if any output holds a NaN or Inf. */
enum status kernel_problem_check(struct kernel_problem *p, int64_t rows, uint64_t seed,
                                 double *rel_err);
/* Forgets what the check kept. */
void kernel_problem_release(struct kernel_problem *p);

#endif
