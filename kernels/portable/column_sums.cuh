/* The second stage of sums over tokens: the first leaves a row of partial sums per block. */
#ifndef KERNELS_PORTABLE_COLUMN_SUMS_CUH
#define KERNELS_PORTABLE_COLUMN_SUMS_CUH

#include <stdint.h>

#include "kernels/status.h"

/* sums[c] = the sum over r of parts[r * stride + c], c = 0 .. width-1, always in the same order. */
enum status column_sums(struct device *device, const char *operation, const float *parts,
                        int64_t n_rows, int64_t stride, int64_t width, float *sums);

/* sums[i] = the sum of columns[i * width + c], c = 0 .. width-1: of a head's columns. */
enum status part_sums(struct device *device, const char *operation, const float *columns,
                      int64_t n_parts, int64_t width, float *sums);

#endif
