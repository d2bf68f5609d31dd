/*
 * A bf16 device on the host: every kernel is the CPU's on fp32 copies, its results rounded once. So
 * the verdict on bf16 can be tested without a GPU, with faults put into the copies.
 */
#ifndef TESTS_ROUNDED_H
#define TESTS_ROUNDED_H

#include "kernels/operation.h"

/* What a faulty kernel does on the dense fp32 copies in place of running `kernel`. */
typedef enum status rounded_fault(struct device *cpu, const struct kernel *kernel, void *args,
                                  struct operand_list *list);

/* A device with activations of this type, F32 or BF16, that computes on the CPU `cpu`. */
struct device rounded_device(struct device *cpu, enum dtype activation);

/* Operation `operation` is computed by `how` from now on; NULL: all as they should be. */
void rounded_break(enum operation operation, rounded_fault *how);

/* Runs a CPU kernel with a workspace of its own. */
enum status rounded_run(struct device *cpu, const struct kernel *kernel, const void *args);

#endif
