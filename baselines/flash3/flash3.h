/*
 * Prototypes of the FlashAttention-3 baseline, listed in kernels/cuda/kernels.c as provider
 * "flash3". Without the library that `make flash3` builds all of them are unsupported.
 */
#ifndef BASELINES_FLASH3_FLASH3_H
#define BASELINES_FLASH3_FLASH3_H

#include <stddef.h>

#include "kernels/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* OP_ATTENTION without own token or gate, every mask but chunk; d = 64 or 128. */
const char *flash3_attention_unsupported(const void *args);
size_t flash3_attention_workspace(const void *args);
enum status flash3_attention(const void *args, void *workspace);

/* OP_ATTENTION_STEP at a position that the host knows: a kernel rotates q and k and fills the
 * cache, FlashAttention-3 attends to what is visible of it, which must be one piece. */
const char *flash3_attention_step_unsupported(const void *args);
size_t flash3_attention_step_workspace(const void *args);
enum status flash3_attention_step(const void *args, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
