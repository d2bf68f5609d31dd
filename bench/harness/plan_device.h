/*
 * A GPU that need not be here: what --dry-run plans for. Its element types, FLOPs and bytes are
 * those of the CUDA backend; its memory and rates come from a table, its kernels' workspaces are
 * estimates, and whether a kernel takes a case is not asked (docs/planning.md).
 */
#ifndef BENCH_HARNESS_PLAN_DEVICE_H
#define BENCH_HARNESS_PLAN_DEVICE_H

#include <stdbool.h>
#include <stdio.h>

#include "bench/harness/options.h"
#include "kernels/device.h"
#include "layers/pass.h"

/* Whether the options ask for a plan for a GPU of the table; `opened`: how opening the backend
 * that they name ended. A GPU that is here and cannot be opened as asked is not replaced. */
bool plan_device_wanted(const struct options *options, enum status opened);

/* Opens it for plans, device_close() ends it; sets options->backend. STATUS_INVALID if the options
 * want to do more with it than plan. */
enum status plan_device_open(struct options *options, struct device **opened);

/* The rates of a GPU in the table, by its name, where none have been measured; left alone for
 * others. */
void plan_device_estimate(struct ceilings *ceilings, const char *device_name);

/* A line that says what is planned for, and what of it is an estimate; nothing for other devices.
 */
void plan_device_print(FILE *file, const struct device *device);

/* The share of its roofline that a pass of a block has reached on a GPU; NAN: it depends on the
 * case. */
double plan_device_share(enum pass pass);

#endif
