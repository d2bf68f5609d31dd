/*
 * What all temporal-mixing layers share: InProj with its norm, OutProj with
 * the residual, the tensors these need, and views into them. N = B*T tokens,
 * P the width of InProj's output, d the head width.
 */
#ifndef LAYERS_MIXING_H
#define LAYERS_MIXING_H

#include "layers/layer.h"

/* Scratch tensors of every temporal-mixing layer's backward pass; a layer's own follow. */
enum { SCRATCH_DMIX = 0, SCRATCH_DPROJ = 1, SCRATCH_OTHER = 2 };

/* STATUS_INVALID unless n_heads divides d_model into heads (of even width where they rotate). */
enum status mixing_check(const struct layer_config *config, bool rotates);

/* M, the columns of the tensor that enters OutProj. */
int64_t mixing_width(const struct layer_config *config);

/* The specs of the tensors that layer.h fixes; each returns how many it wrote. */
int mixing_parameters(const struct layer_config *config, int64_t d_proj, struct tensor_spec *specs);
int mixing_saved(const struct layer_config *config, const struct layer_shape *shape, int64_t d_proj,
                 struct tensor_spec *specs);
int mixing_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   int64_t d_proj, struct tensor_spec *specs);
/* Golden names of the parameters that layer.h fixes; returns how many. */
int mixing_golden_names(const struct layer_config *config, int64_t d_proj,
                        struct golden_name *names);

/* saved[SAVED_PROJ] = InProj(RMSNorm(x)). */
enum status mixing_in_proj(struct context *ctx, const struct layer_config *config,
                           const struct layer_shape *shape, struct layer_memory *memory,
                           int64_t d_proj, const void *x);
/* y = x + OutProj(saved[SAVED_MIX]). */
enum status mixing_out_proj(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const void *x, void *y);
/* scratch[SCRATCH_DMIX] and OutProj's gradient from dy. */
enum status mixing_out_proj_backward(struct context *ctx, const struct layer_config *config,
                                     const struct layer_shape *shape, struct layer_memory *memory,
                                     const void *dy);
/* dx, InProj's and the norm's gradients from scratch[SCRATCH_DPROJ]; overwrites SCRATCH_DMIX. */
enum status mixing_in_proj_backward(struct context *ctx, const struct layer_config *config,
                                    const struct layer_shape *shape, struct layer_memory *memory,
                                    int64_t d_proj, const void *x, const void *dy, void *dx);

/* Columns first .. first + n_heads*d_head of an activation tensor [B, T, width], as heads; NULL
 * memory gives a view without data. */
struct view mixing_columns(const struct context *ctx, void *memory, int64_t seq_len, int64_t width,
                           int64_t first, int64_t d_head);
/* The same place as a plain pointer. */
void *mixing_column(const struct context *ctx, void *memory, int64_t first);
/* A cache [B, H, slots, d] as a view [B, slots, H, d]. */
struct view mixing_slots(void *cache, int64_t n_heads, int64_t slots, int64_t d_head);

/* For references on a device: `count` elements per sequence of a saved tensor of a run. */
enum status mixing_load_saved(const struct layer_run *run, int saved, enum dtype dtype,
                              int64_t count, double *to);
/* Columns first .. first+width of dproj [n_rows, d_proj] = the rows named of block [T, width]. */
enum status mixing_set_rows(int64_t d_proj, int64_t first, int64_t width, int64_t n_rows,
                            const int64_t *rows, const double *block, double *dproj);

/* For references, on the host alone. */
void mixing_copy(int64_t count, const double *from, double *to);
/* to += from. */
void mixing_add(int64_t count, const double *from, double *to);
/* A cache [n, H, slots, d] as the references want it, [n, slots, H, d]. */
void mixing_from_slots(int64_t n_seq, int64_t n_heads, int64_t slots, int64_t d_head,
                       const double *cache, double *to);
/* Slot `slot` of cache [n_heads, slots, d] = row [n_heads, d]; n_heads counts all sequences'. */
void mixing_store_slot(int64_t n_heads, int64_t slots, int64_t slot, int64_t d_head,
                       const double *row, double *cache);

#endif
