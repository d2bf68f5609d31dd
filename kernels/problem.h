/*
 * An operation with tensors of its own, made from its description: for the test of all providers
 * and the benchmark of single operations.
 */
#ifndef KERNELS_PROBLEM_H
#define KERNELS_PROBLEM_H

#include "kernels/data.h"
#include "kernels/operation.h"

/* Reproducible random numbers, one after another. */
struct dice {
	uint64_t seed, next;
};

uint64_t dice_bits(struct dice *dice);
/* An integer, low <= i <= high. */
int64_t dice_integer(struct dice *dice, int64_t low, int64_t high);

/* How a problem is to be made. */
struct problem_form {
	const struct operation_form *variant;
	struct sizes sizes;
	uint64_t seed;
	enum data data;
	/* For tests: optional operands, strides, outputs in the place of inputs as dice have it,
	 * guards around every tensor, and now and then data that is hard on a kernel. */
	bool any;
	bool narrow; /* strides are multiples of 8 elements, as tensor cores like them */
};

/* The memory of one operand. */
struct region {
	size_t offset, bytes; /* in the problem's memory, guards included; 0 bytes: it has none */
	size_t first;         /* from there to the operand */
	int64_t stride[OPERAND_DIMS];
	int alias;             /* index of the input whose place an output takes; -1: its own */
	unsigned char *before; /* what the region must hold outside of what is written */
};

struct problem {
	struct device *device;
	enum operation operation;
	struct problem_form form;
	union any_args args;
	struct operand_list list; /* of args */
	struct region region[MAX_OPERANDS];
	size_t bytes;
	char *memory;
	bool hard;
};

/* Sizes, options, places; `memory` NULL: at made-up addresses, for plans. Nothing is written. */
void problem_plan(struct problem *p, struct device *device, enum operation operation,
                  const struct problem_form *form, void *memory);

/*
 * Random inputs; of a backward also what its forward leaves, which the device's fastest kernel of
 * it makes. STATUS_UNSUPPORTED if it has none. nan: one element of an input is NaN.
 */
enum status problem_fill(struct problem *p, bool nan);
/* Fills what the operation is to write, and its scratch, with NaN bytes. */
enum status problem_poison(struct problem *p);

/* For tests: keeps every byte; *operand = the name of one that was touched outside of what the
 * operation may write, or NULL. */
enum status problem_guard(struct problem *p);
enum status problem_guarded(struct problem *p, const char **operand);
/* Forgets what problem_guard() kept. */
void problem_free(struct problem *p);

#endif
