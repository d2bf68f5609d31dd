/*
 * The verdict on an output: how far it is from what the fp64 reference makes of the same inputs,
 * and how far it may be. docs/verification.md has the reasoning.
 *
 * What a correct kernel may differ by is what the reference itself answers to inputs that are off
 * by a rounding: its responses. Where terms cancel, or a norm magnifies, the responses are large as
 * the errors are, row by row.
 */
#ifndef KERNELS_JUDGE_H
#define KERNELS_JUDGE_H

#include "kernels/device.h"

enum { JUDGED_DIMS = 4, MAX_RESPONSES = 8 };

/* One rounding of a number to bf16; and what fp32 may lose in a few thousand terms, as if every
 * factor were off by that. */
#define ROUNDING_BF16 0x1p-9
#define ROUNDING_FP32 0x1p-20
/* That of the power of a log decay, which is close to 1 where the state remembers long. */
#define ROUNDING_DECAY 0x1p-25
/* What tensor cores lose per term of a sum, since they truncate it; measured are 2^-31 to 2^-29.
 * And at most: memories end, and sums are cut into blocks. */
#define LOST_PER_TERM 0x1p-28
#define MOST_LOST     0x1p-12
/* Tokens of a chunk within which kernels decay keys, at most. */
#define MOST_CHUNK 256

/* What is reported of a run: the worst row's ||a-b||/||b||, and the share of what is allowed; above
 * 1 is a mismatch. */
struct accuracy {
	double rel_err, share;
};

/* A tensor as it is and as it should be, dense. */
struct judged {
	const char *name;
	int64_t size[JUDGED_DIMS]; /* rows along the last */
	int position; /* the dimension that counts tokens, rows or the like: where faults begin */
	enum dtype dtype; /* of what is there */
	double *actual, *expected;
	double *base; /* what was added to both, or NULL */
	int n_responses;
	/* What the reference answers to inputs that are off by random roundings. */
	double *response[MAX_RESPONSES];
	/* Sums over positions, of roundings that no rows have in common: it is judged by what they
	 * have. */
	bool carries;
	double scale; /* one rounding of this output's kernels over one of the responses' */
	double lost;  /* what its sums may lose, relative to an element */
	bool summed;  /* along positions: what one is off by, those before it are */
	/* What all elements of a head may be off by alike, relative to themselves; and the
	 * dimension that counts heads, -1: none, all are one. */
	double *alike;
	int heads;
};

/* The worst of all outputs so far. `share` is of what the bound allows: above 1 is a mismatch.
 * INFINITY: NaN or Inf. `name` is the output with that share, `test` what it is large in. */
struct check_result {
	double rel_err, share;
	const char *name, *test;
};

/* What the elements of products with keys are off by alike, relative to themselves, because the
 * keys were multiplied with decays of this logarithm and rounded to bf16. */
double judge_alike(double log_decay);

/* Raises *result. STATUS_OOM if there is no memory. */
enum status judge(const struct judged *judged, struct check_result *result);

/* Raises *result to `share`, if that is more; NaN counts as INFINITY. */
void judge_raise(struct check_result *result, double share, const char *name, const char *test);

/* *worst = error if that is more, INFINITY if it is a NaN. */
void check_raise(double *worst, double error);

#endif
