/*
 * What all temporal-mixing layers share: the tensors of the projections around
 * them, and views into these. N = B*T tokens, P the width of InProj's output.
 */
#ifndef LAYERS_MIXING_H
#define LAYERS_MIXING_H

#include "layers/layer.h"

/* STATUS_INVALID unless n_heads divides d_model into heads (of even width where they rotate). */
enum status mixing_check(const struct layer_config *config);

/* M, the columns of the tensor that enters OutProj, and where that is. */
int64_t mixing_width(const struct layer_config *config);
void *mixing_mix(const struct layer_run *run);

/* The specs of the tensors that layer.h fixes; each returns how many it wrote. */
int mixing_parameters(const struct layer_config *config, struct tensor_spec *specs);
int mixing_saved(const struct layer_config *config, const struct layer_shape *shape,
                 struct tensor_spec *specs);
int mixing_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   struct tensor_spec *specs);
/* Golden names of the parameters that layer.h fixes; returns how many. */
int mixing_golden_names(const struct layer_config *config, struct golden_name *names);

/* The layers that have z, v and a gate are three times as wide as the model; so are those of
 * v, q, k. */
int64_t mixing_three_widths(const struct layer_config *config);
/* Those with a gate, whose bias comes after the parameters that layer.h fixes. */
int mixing_gated_parameters(const struct layer_config *config, struct tensor_spec *specs);
int mixing_gated_golden_names(const struct layer_config *config, struct golden_name *names);
enum { PARAM_GATE_BIAS = PARAM_OTHER };

/* Columns first .. first + n_heads*d_head of an activation tensor [B, T, width], as heads; NULL
 * memory gives a view without data. */
struct view mixing_columns(const struct layer_run *run, void *memory, int64_t width, int64_t first,
                           int64_t d_head);
/* A whole tensor [N, width] as heads. */
struct view mixing_heads(const struct layer_run *run, void *memory, int64_t width);
/* Column block i, D wide, of InProj's output or its gradient. */
struct view mixing_block(const struct layer_run *run, void *proj, int64_t i);
/* The place of a column as a plain pointer. */
void *mixing_column(const struct context *ctx, void *memory, int64_t first);
/* A cache [B, n_heads, slots, D/H] as a view [B, slots, n_heads, D/H]. */
struct view mixing_slots(const struct layer_run *run, void *cache, int64_t n_heads, int64_t slots);

/* The operation of a sequence, or of the token at run->position; what it leaves is the step's
 * state. */
enum status mixing_convolve(const struct layer_run *run, const struct short_conv_args *args);
enum status mixing_recur(const struct layer_run *run, const struct recurrence_args *args);
enum status mixing_recur_matrix(const struct layer_run *run,
                                const struct matrix_recurrence_args *args);

#endif
