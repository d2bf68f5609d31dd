/* What all temporal-mixing layers share. */
#include "layers/mixing.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"

enum status mixing_check(const struct layer_config *config, bool rotates)
{
	int64_t d = config->n_heads > 0 ? config->d_model / config->n_heads : 0;

	if (d < 1 || config->d_model % config->n_heads != 0)
		return status_set(STATUS_INVALID,
		                  "--heads: %s cannot split d_model %lld into %lld heads "
		                  "(allowed: a divisor of d_model)",
		                  config->class->name, (long long)config->d_model,
		                  (long long)config->n_heads);
	if (rotates && config->rope && d % 2 != 0)
		return status_set(
		        STATUS_INVALID,
		        "--heads: a head of %s is %lld wide, and the rotary embedding "
		        "needs an even width (allowed: another count, or --position none)",
		        config->class->name, (long long)d);
	return STATUS_OK;
}

int64_t mixing_width(const struct layer_config *config)
{
	return config->class->mix_width ? config->class->mix_width(config) : config->d_model;
}

int mixing_parameters(const struct layer_config *config, int64_t d_proj, struct tensor_spec *specs)
{
	int64_t d = config->d_model;

	specs[PARAM_NORM] = (struct tensor_spec){
	        "norm_weight", STORAGE_FP32, 1, {config->prenorm ? d : 0}, INIT_ONES};
	specs[PARAM_IN_PROJ] =
	        (struct tensor_spec){"in_proj", STORAGE_ACTIVATION, 2, {d_proj, d}, INIT_NORMAL};
	specs[PARAM_OUT_PROJ] = (struct tensor_spec){
	        "out_proj", STORAGE_ACTIVATION, 2, {d, mixing_width(config)}, INIT_NORMAL};
	return PARAM_OTHER;
}

int mixing_saved(const struct layer_config *config, const struct layer_shape *shape, int64_t d_proj,
                 struct tensor_spec *specs)
{
	int64_t d = config->d_model, n = shape->batch * shape->seq_len;
	bool train = shape->pass == PASS_TRAIN && config->prenorm;

	specs[SAVED_PROJ] =
	        (struct tensor_spec){"proj", STORAGE_ACTIVATION, 2, {n, d_proj}, INIT_ZEROS};
	specs[SAVED_MIX] = (struct tensor_spec){
	        "mix", STORAGE_ACTIVATION, 2, {n, mixing_width(config)}, INIT_ZEROS};
	specs[SAVED_X_NORM] = (struct tensor_spec){
	        "x_norm", STORAGE_ACTIVATION, 2, {train ? n : 0, d}, INIT_ZEROS};
	specs[SAVED_RSTD] =
	        (struct tensor_spec){"rstd", STORAGE_FP32, 1, {train ? n : 0}, INIT_ZEROS};
	return SAVED_OTHER;
}

int mixing_scratch(const struct layer_config *config, const struct layer_shape *shape,
                   int64_t d_proj, struct tensor_spec *specs)
{
	int64_t n = shape->batch * shape->seq_len;

	specs[SCRATCH_DMIX] = (struct tensor_spec){
	        "dmix", STORAGE_ACTIVATION, 2, {n, mixing_width(config)}, INIT_ZEROS};
	specs[SCRATCH_DPROJ] =
	        (struct tensor_spec){"dproj", STORAGE_ACTIVATION, 2, {n, d_proj}, INIT_ZEROS};
	return SCRATCH_OTHER;
}

int mixing_golden_names(const struct layer_config *config, int64_t d_proj,
                        struct golden_name *names)
{
	int64_t d = config->d_model;

	names[0] = (struct golden_name){"input_norm.weight", PARAM_NORM, 0, d};
	names[1] = (struct golden_name){"in_proj.weight", PARAM_IN_PROJ, 0, d_proj};
	names[2] = (struct golden_name){"out_proj.weight", PARAM_OUT_PROJ, 0, d};
	return 3;
}

/* Where InProj reads from and its backward finds the normalised input: x itself without a norm.
 * Outside training nobody needs it for long, and it borrows the place of the mix. */
static void *x_norm_of(const struct layer_config *config, const struct layer_memory *memory,
                       const void *x)
{
	if (!config->prenorm)
		return (void *)x;
	return memory->saved[SAVED_X_NORM] ? memory->saved[SAVED_X_NORM] : memory->saved[SAVED_MIX];
}

enum status mixing_in_proj(struct context *ctx, const struct layer_config *config,
                           const struct layer_shape *shape, struct layer_memory *memory,
                           int64_t d_proj, const void *x)
{
	const struct norm_linear_args args = {
	        .n_tokens = shape->batch * shape->seq_len,
	        .d_in = config->d_model,
	        .d_out = d_proj,
	        .eps = config->norm_eps,
	        .x = x,
	        .norm_weight = memory->param[PARAM_NORM],
	        .weight = memory->param[PARAM_IN_PROJ],
	        .x_norm = x_norm_of(config, memory, x),
	        .rstd = memory->saved[SAVED_RSTD],
	        .y = memory->saved[SAVED_PROJ],
	};

	return kernel_run(ctx, OP_NORM_LINEAR, &args);
}

enum status mixing_out_proj(struct context *ctx, const struct layer_config *config,
                            const struct layer_shape *shape, struct layer_memory *memory,
                            const void *x, void *y)
{
	const struct linear_residual_args args = {
	        .n_tokens = shape->batch * shape->seq_len,
	        .d_in = mixing_width(config),
	        .d_out = config->d_model,
	        .x = memory->saved[SAVED_MIX],
	        .weight = memory->param[PARAM_OUT_PROJ],
	        .residual = config->residual ? x : NULL,
	        .y = y,
	};

	return kernel_run(ctx, OP_LINEAR_RESIDUAL, &args);
}

enum status mixing_out_proj_backward(struct context *ctx, const struct layer_config *config,
                                     const struct layer_shape *shape, struct layer_memory *memory,
                                     const void *dy)
{
	const struct linear_residual_backward_args args = {
	        .n_tokens = shape->batch * shape->seq_len,
	        .d_in = mixing_width(config),
	        .d_out = config->d_model,
	        .x = memory->saved[SAVED_MIX],
	        .weight = memory->param[PARAM_OUT_PROJ],
	        .dy = dy,
	        .dx = memory->scratch[SCRATCH_DMIX],
	        .dweight = memory->grad[PARAM_OUT_PROJ],
	};

	return kernel_run(ctx, OP_LINEAR_RESIDUAL_BACKWARD, &args);
}

enum status mixing_in_proj_backward(struct context *ctx, const struct layer_config *config,
                                    const struct layer_shape *shape, struct layer_memory *memory,
                                    int64_t d_proj, const void *x, const void *dy, void *dx)
{
	const struct norm_linear_backward_args args = {
	        .n_tokens = shape->batch * shape->seq_len,
	        .d_in = config->d_model,
	        .d_out = d_proj,
	        .x = x,
	        .x_norm = x_norm_of(config, memory, x),
	        .weight = memory->param[PARAM_IN_PROJ],
	        .norm_weight = memory->param[PARAM_NORM],
	        .rstd = memory->saved[SAVED_RSTD],
	        .dy = memory->scratch[SCRATCH_DPROJ],
	        .dresidual = config->residual ? dy : NULL,
	        .dx_norm = memory->scratch[SCRATCH_DMIX],
	        .dx = dx,
	        .dnorm_weight = memory->grad[PARAM_NORM],
	        .dweight = memory->grad[PARAM_IN_PROJ],
	};

	return kernel_run(ctx, OP_NORM_LINEAR_BACKWARD, &args);
}

void *mixing_column(const struct context *ctx, void *memory, int64_t first)
{
	if (!memory)
		return NULL;
	return (char *)memory + (size_t)first * dtype_size(ctx->backend->activation);
}

struct view mixing_columns(const struct context *ctx, void *memory, int64_t seq_len, int64_t width,
                           int64_t first, int64_t d_head)
{
	return (struct view){mixing_column(ctx, memory, first), seq_len * width, width, d_head};
}

struct view mixing_slots(void *cache, int64_t n_heads, int64_t slots, int64_t d_head)
{
	return (struct view){cache, n_heads * slots * d_head, d_head, slots * d_head};
}

enum status mixing_load_saved(const struct layer_run *run, int saved, enum dtype dtype,
                              int64_t count, double *to)
{
	const char *tensor = run->memory->saved[saved];

	return reference_in_use()->load(
	        dtype, tensor + (size_t)(run->sequence * count) * dtype_size(dtype), count, to);
}

enum status mixing_set_rows(int64_t d_proj, int64_t first, int64_t width, int64_t n_rows,
                            const int64_t *rows, const double *block, double *dproj)
{
	double *picked;
	enum status status = reference_take(n_rows * width, &picked);

	if (status != STATUS_OK)
		return status;
	reference_get_rows(width, n_rows, rows, block, picked);
	reference_in_use()->set_columns(n_rows, d_proj, first, width, picked, dproj);
	reference_release(picked);
	return STATUS_OK;
}

void mixing_copy(int64_t count, const double *from, double *to)
{
#pragma omp parallel for simd if (count > 1 << 16)
	for (int64_t i = 0; i < count; i++)
		to[i] = from[i];
}

void mixing_add(int64_t count, const double *from, double *to)
{
	for (int64_t i = 0; i < count; i++)
		to[i] += from[i];
}

void mixing_from_slots(int64_t n_seq, int64_t n_heads, int64_t slots, int64_t d_head,
                       const double *cache, double *to)
{
	size_t bytes = (size_t)d_head * sizeof *to;

#pragma omp parallel for
	for (int64_t row = 0; row < n_seq * n_heads; row++)
		for (int64_t s = 0; s < slots; s++)
			memcpy(to + ((row / n_heads * slots + s) * n_heads + row % n_heads) *
			                       d_head,
			       cache + (row * slots + s) * d_head, bytes);
}

void mixing_store_slot(int64_t n_heads, int64_t slots, int64_t slot, int64_t d_head,
                       const double *row, double *cache)
{
	for (int64_t h = 0; h < n_heads; h++)
		mixing_copy(d_head, row + h * d_head, cache + (h * slots + slot) * d_head);
}
