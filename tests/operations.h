/*
 * The cases that test_operations runs: each makes random arguments for one
 * operation, runs it and compares every output with the fp64 reference.
 */
#ifndef TESTS_OPERATIONS_H
#define TESTS_OPERATIONS_H

#include "kernels/reference/reference.h"
#include "tests/support.h"

struct operation_test {
	enum operation operation;
	int n_cases;
	/* Runs one case; false if the kernel does not support its arguments. */
	bool (*run)(struct trial *trial);
};

/* Each list ends with an entry whose run is NULL. */
extern const struct operation_test dense_tests[];
extern const struct operation_test attention_tests[];
extern const struct operation_test recurrent_tests[];
extern const struct operation_test matrix_tests[];
extern const struct operation_test family_tests[];

#endif
