/* Prototypes of the sm_90a kernels, listed in kernels/cuda/kernels.c as provider "hopper". */
#ifndef KERNELS_HOPPER_HOPPER_H
#define KERNELS_HOPPER_HOPPER_H

#include <stddef.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* OP_ATTENTION; d = 64 or 128, every mask, own token and gate. */
const char *hopper_attention_unsupported(const void *args);
size_t hopper_attention_workspace(const void *args);
enum status hopper_attention(const void *args, void *workspace);

/* OP_ATTENTION_STEP and OP_RAT_STEP; d = 64 or 128, each head's cache contiguous. */
const char *hopper_attention_step_unsupported(const void *args);
size_t hopper_attention_step_workspace(const void *args);
enum status hopper_attention_step(const void *args, void *workspace);
const char *hopper_rat_step_unsupported(const void *args);
size_t hopper_rat_step_workspace(const void *args);
enum status hopper_rat_step(const void *args, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
