/* Other people's kernels, as lists of struct kernel beside a backend's own. */
#ifndef BASELINES_BASELINES_H
#define BASELINES_BASELINES_H

#include "kernels/kernels.h"

/* What backend.open() takes: a list for each provider, then NULL; none in a build without CUDA. */
extern const struct kernel *const baseline_kernels[];

#endif
