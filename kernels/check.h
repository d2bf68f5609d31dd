/*
 * Whether what an operation wrote is right, by the fp64 reference on the inputs as they are.
 *
 * A small problem is computed again as a whole. Of a large one parts are: some sequences, some
 * heads or channels, some rows, as the operation's description says that it can be cut. Of an
 * output that sums over sequences or rows all of these are added up, block by block. Memory is
 * bounded by a part. The device's reference computes them, or the host's if that has no kernel of
 * the operation.
 */
#ifndef KERNELS_CHECK_H
#define KERNELS_CHECK_H

#include "kernels/judge.h"
#include "kernels/operation.h"

struct check_options {
	int64_t rows;     /* of each output to compare at least, where it has so many */
	uint64_t seed;    /* of what to look at */
	bool everything;  /* however large */
	bool parts;       /* parts, however small */
	bool in_place;    /* keep all inputs, which the operation may overwrite */
	uint32_t ignored; /* outputs that are not looked at: bits 1 << index in the description */
	bool with_nan;    /* only that no NaN of the reference is missing */
	const struct kernel *kernel; /* that runs; NULL: any */
};

struct check;

/*
 * Before the operation runs: plans the parts and keeps what the run may overwrite (states; all
 * inputs of check_options.in_place). For an operation without any it can as well be called
 * afterwards. STATUS_OOM if there is no memory.
 */
enum status check_begin(struct check **check, struct device *device, enum operation operation,
                        const void *args, const struct check_options *options);
/* After it has run: raises *result. */
enum status check_end(struct check *check, struct check_result *result);
void check_free(struct check *check);

/* For an operation without states that has run: all of it. */
enum status check_operation(struct device *device, enum operation operation, const void *args,
                            const struct check_options *options, struct check_result *result);

/* `n` of 0 .. total-1, ascending and distinct, spread at random, 0 and total-1 among them. */
void check_pick(int64_t total, int64_t n, uint64_t seed, int64_t *picked);

#endif
