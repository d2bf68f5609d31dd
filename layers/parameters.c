/* A stack's data: random parameters, inputs and caches, and access to parameters by index or name.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layers/model.h"
#include "layers/noise.h"

/* Floats that are made or moved at a time. */
enum { BLOCK_COUNT = 4 << 20 };
/* Caches made on the host repeat a block of random numbers. Its length is a prime, so that no two
 * sequences, heads or slots of any usual size hold the same numbers. */
enum { CACHE_BLOCK_COUNT = 1048573 };

/* Standard deviation of INIT_NORMAL. */
static const float INIT_SCALE = 0.02f;

/* Streams of random numbers; parameter j of layer i has stream i*MAX_TENSORS + j. */
enum {
	STREAM_MODEL = MAX_LAYERS * MAX_TENSORS,
	STREAM_X = STREAM_MODEL + MODEL_PARAMETERS,
	STREAM_DY,
	STREAM_TOKENS,
	STREAM_NEXT,
	STREAM_STATE
};

static int64_t smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static size_t tokens_of(const struct stack *stack)
{
	return (size_t)(stack->shape.batch * stack->shape.seq_len);
}

/* One parameter: what it is and where it lives. */
struct parameter {
	struct tensor_spec spec;
	void *value;
	float *gradient; /* NULL outside training */
};

static struct parameter model_parameter(const struct stack *stack, int index)
{
	int64_t vocab = stack->vocab, d = stack->d_model;
	const struct parameter parameters[MODEL_PARAMETERS] = {
	        [MODEL_EMBEDDING] = {{"embedding", STORAGE_ACTIVATION, 2, {vocab, d}, INIT_NORMAL},
	                             stack->embedding,
	                             stack->d_embedding},
	        [MODEL_FINAL_NORM] = {{"final_norm", STORAGE_FP32, 1, {d}, INIT_ONES},
	                              stack->final_norm,
	                              stack->d_final_norm},
	        [MODEL_HEAD] = {{"head", STORAGE_ACTIVATION, 2, {vocab, d}, INIT_NORMAL},
	                        stack->head,
	                        stack->d_head},
	};

	return parameters[index];
}

/* False if there is no such parameter. */
static bool find_parameter(const struct stack *stack, int layer, int index,
                           struct parameter *parameter)
{
	struct tensor_spec specs[MAX_TENSORS];

	if (layer == LAYER_MODEL && stack->vocab > 0 && index >= 0 && index < MODEL_PARAMETERS) {
		*parameter = model_parameter(stack, index);
		return true;
	}
	if (layer < 0 || layer >= stack->n_layers || index < 0 ||
	    index >= stack->layers[layer].class->parameters(&stack->layers[layer], specs))
		return false;
	*parameter = (struct parameter){specs[index], stack->memory[layer].param[index],
	                                stack->memory[layer].grad[index]};
	return tensor_count(&parameter->spec) > 0;
}

static enum status no_parameter(int layer, int index)
{
	return status_set(STATUS_INVALID, "layer %d has no parameter %d", layer, index);
}

int64_t stack_parameter_count(const struct stack *stack, int layer, int index)
{
	struct parameter parameter;

	return find_parameter(stack, layer, index, &parameter) ? tensor_count(&parameter.spec) : 0;
}

enum status stack_set_parameter(struct stack *stack, int layer, int index, const float *values)
{
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p))
		return no_parameter(layer, index);
	return backend_upload_floats(stack->backend, tensor_dtype(&p.spec, stack->backend), p.value,
	                             values, (size_t)tensor_count(&p.spec));
}

enum status stack_get_parameter(const struct stack *stack, int layer, int index, float *values)
{
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p))
		return no_parameter(layer, index);
	return backend_download_floats(stack->backend, tensor_dtype(&p.spec, stack->backend),
	                               values, p.value, (size_t)tensor_count(&p.spec));
}

enum status stack_get_gradient(const struct stack *stack, int layer, int index, float *values)
{
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p) || !p.gradient)
		return no_parameter(layer, index);
	return backend_download_floats(stack->backend, DTYPE_F32, values, p.gradient,
	                               (size_t)tensor_count(&p.spec));
}

/* ---- golden names ---- */

/* Finds the layer that a name of a model means and moves *name on to its own part. -1: none. */
static int layer_of_name(const struct stack *stack, const char **name)
{
	bool has_ffn = stack->n_layers > 1 && stack->layers[1].class == &ffn_layer;
	char kind[16];
	int index, length = 0;

	if (stack->vocab == 0)
		return stack->n_layers == 1 ? 0 : -1;
	if (sscanf(*name, "backbone.layers.%d.%15[a-z_].%n", &index, kind, &length) != 2 ||
	    length == 0 || index < 0 || index >= stack->n_layers)
		return -1;
	*name += length;
	if (strcmp(kind, "seq_layer") == 0)
		return has_ffn ? 2 * index : index;
	return has_ffn && strcmp(kind, "hidden_layer") == 0 ? 2 * index + 1 : -1;
}

/* The parameter that a golden name means, and its rows; false if it means none. */
static bool find_named(const struct stack *stack, const char *name, struct parameter *parameter,
                       int64_t *row, int64_t *n_rows)
{
	static const char *const model_names[MODEL_PARAMETERS] = {
	        [MODEL_EMBEDDING] = "embedding.wte.weight",
	        [MODEL_FINAL_NORM] = "backbone.ln.weight",
	        [MODEL_HEAD] = "head.lm_head.weight",
	};
	struct golden_name names[MAX_GOLDEN_NAMES];

	for (int i = 0; i < MODEL_PARAMETERS && stack->vocab > 0; i++)
		if (strcmp(name, model_names[i]) == 0) {
			*parameter = model_parameter(stack, i);
			*row = 0;
			*n_rows = parameter->spec.dims[0];
			return true;
		}
	int layer = layer_of_name(stack, &name);
	if (layer < 0 || layer >= stack->n_layers)
		return false;
	const struct layer_config *config = &stack->layers[layer];
	for (int i = config->class->golden_names(config, names) - 1; i >= 0; i--)
		if (strcmp(name, names[i].name) == 0) {
			*row = names[i].row;
			*n_rows = names[i].n_rows;
			return find_parameter(stack, layer, names[i].parameter, parameter);
		}
	return false;
}

/* The range of a golden name in elements. */
static enum status find_range(const struct stack *stack, const char *name, int64_t count,
                              struct parameter *parameter, size_t *first)
{
	int64_t row, n_rows;

	*first = 0;
	if (!find_named(stack, name, parameter, &row, &n_rows))
		return status_set(STATUS_INVALID, "no parameter is called '%s'", name);
	int64_t width = tensor_count(&parameter->spec) / parameter->spec.dims[0];
	if (count != n_rows * width)
		return status_set(STATUS_INVALID, "%s has %lld elements, not %lld", name,
		                  (long long)(n_rows * width), (long long)count);
	*first = (size_t)(row * width);
	return STATUS_OK;
}

enum status stack_set_named(struct stack *stack, const char *name, const float *values,
                            int64_t count)
{
	struct parameter p;
	size_t first;
	enum status status = find_range(stack, name, count, &p, &first);

	if (status != STATUS_OK)
		return status;
	enum dtype dtype = tensor_dtype(&p.spec, stack->backend);
	return backend_upload_floats(stack->backend, dtype,
	                             (char *)p.value + first * dtype_size(dtype), values,
	                             (size_t)count);
}

enum status stack_get_named_gradient(const struct stack *stack, const char *name, float *values,
                                     int64_t count)
{
	struct parameter p;
	size_t first;
	enum status status = find_range(stack, name, count, &p, &first);

	if (status != STATUS_OK)
		return status;
	if (!p.gradient)
		return status_set(STATUS_INVALID, "%s has a gradient only in training", name);
	return backend_download_floats(stack->backend, DTYPE_F32, values, p.gradient + first,
	                               (size_t)count);
}

/* ---- random data ---- */

/* The length that the gate bias of a layer is spread over: its chunk, or all it is trained on. */
static float gate_length(const struct layer_config *config)
{
	bool chunked = strstr(config->class->tunables, "chunk") != NULL;
	int64_t length = chunked ? config->chunk : config->train_len;

	return length > 2 ? (float)(length - 1) : 1.0f;
}

/* Functions of a uniform number; false if `init` is not one of them. */
static bool make_spread(const struct layer_config *config, enum init init, uint64_t seed,
                        uint64_t stream, int64_t first, int64_t count, float *values)
{
	const struct {
		enum init init;
		float low, high;
	} ranges[] = {
	        {INIT_GATE_BIAS, 1.0f, config ? gate_length(config) : 1.0f},
	        {INIT_CONV, -0.5f, 0.5f},
	        {INIT_TIME_STEP, logf(0.001f), logf(0.1f)},
	        {INIT_LOG_RATE, 1.0f, 16.0f},
	        {INIT_LOWER_BOUND, 0.01f, 0.9f},
	};
	size_t i = 0, n = sizeof ranges / sizeof ranges[0];

	while (i < n && ranges[i].init != init)
		i++;
	if (i == n)
		return false;
	noise_uniform(seed, stream, first, count, ranges[i].low, ranges[i].high, values);
	for (int64_t j = 0; j < count; j++) {
		float u = values[j];

		if (init == INIT_GATE_BIAS || init == INIT_LOG_RATE)
			values[j] = logf(u);
		else if (init == INIT_TIME_STEP)
			values[j] = logf(expm1f(expf(u)));
		else if (init == INIT_LOWER_BOUND)
			values[j] = logf(u / (1.0f - u));
	}
	return true;
}

static void make_values(const struct layer_config *config, enum init init, uint64_t seed,
                        uint64_t stream, int64_t first, int64_t count, float *values)
{
	if (init == INIT_NORMAL) {
		noise_normal(seed, stream, first, count, INIT_SCALE, values);
		return;
	}
	if (make_spread(config, init, seed, stream, first, count, values))
		return;
	for (int64_t i = 0; i < count; i++)
		values[i] = init == INIT_ONES ? 1.0f : 0.0f;
}

static enum status fill_parameter(struct stack *stack, int layer, int index, uint64_t seed,
                                  uint64_t stream, float *block)
{
	const struct layer_config *config = layer < 0 ? NULL : &stack->layers[layer];
	enum status status = STATUS_OK;
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p))
		return STATUS_OK;
	enum dtype dtype = tensor_dtype(&p.spec, stack->backend);
	int64_t count = tensor_count(&p.spec);
	if (p.spec.init == INIT_NORMAL && stack->backend->normal_floats)
		return stack->backend->normal_floats(dtype, p.value, count, INIT_SCALE, seed,
		                                     stream);
	for (int64_t i = 0; i < count && status == STATUS_OK; i += BLOCK_COUNT) {
		int64_t n = smaller(BLOCK_COUNT, count - i);

		make_values(config, p.spec.init, seed, stream, i, n, block);
		status = backend_upload_floats(stack->backend, dtype,
		                               (char *)p.value + (size_t)i * dtype_size(dtype),
		                               block, (size_t)n);
	}
	return status;
}

/* normal(0, 1) into an activation tensor; NULL is left alone. */
static enum status fill_activation(const struct stack *stack, void *tensor, int64_t count,
                                   uint64_t seed, uint64_t stream, float *block)
{
	enum dtype dtype = stack->backend->activation;
	enum status status = STATUS_OK;

	if (tensor && stack->backend->normal_floats)
		return stack->backend->normal_floats(dtype, tensor, count, 1.0f, seed, stream);
	for (int64_t i = 0; i < count && tensor && status == STATUS_OK; i += BLOCK_COUNT) {
		int64_t n = smaller(BLOCK_COUNT, count - i);

		noise_normal(seed, stream, i, n, 1.0f, block);
		status = backend_upload_floats(stack->backend, dtype,
		                               (char *)tensor + (size_t)i * dtype_size(dtype),
		                               block, (size_t)n);
	}
	return status;
}

static enum status fill_tokens(struct stack *stack, uint64_t seed)
{
	size_t n = tokens_of(stack), batch = (size_t)stack->shape.batch;
	int32_t *tokens = malloc((n > batch ? n : batch) * sizeof *tokens);
	enum status status;

	if (!tokens)
		return status_set(STATUS_OOM, "no memory for %zu tokens", n);
	for (size_t i = 0; i < n; i++)
		tokens[i] = (int32_t)(noise_bits(seed, STREAM_TOKENS, i) % (uint64_t)stack->vocab);
	status = stack_set_tokens(stack, tokens);
	for (size_t i = 0; i < batch; i++)
		tokens[i] = (int32_t)(noise_bits(seed, STREAM_NEXT, i) % (uint64_t)stack->vocab);
	if (status == STATUS_OK)
		status = stack->backend->upload(stack->next, tokens, batch * sizeof *tokens);
	free(tokens);
	return status;
}

enum status stack_initialize(struct stack *stack, uint64_t seed)
{
	float *block = malloc(BLOCK_COUNT * sizeof *block);
	int64_t count = (int64_t)tokens_of(stack) * stack->d_model;
	bool model = stack->vocab > 0;
	enum status status = STATUS_OK;

	if (!block)
		return status_set(STATUS_OOM, "no memory for a block of random numbers");
	for (int i = 0; i < stack->n_layers; i++)
		for (int j = 0; j < MAX_TENSORS && status == STATUS_OK; j++)
			status = fill_parameter(stack, i, j, seed, (uint64_t)(i * MAX_TENSORS + j),
			                        block);
	for (int j = 0; j < MODEL_PARAMETERS && model && status == STATUS_OK; j++)
		status = fill_parameter(stack, LAYER_MODEL, j, seed, (uint64_t)(STREAM_MODEL + j),
		                        block);
	if (status == STATUS_OK && !model)
		status = fill_activation(stack, stack->x, count, seed, STREAM_X, block);
	if (status == STATUS_OK && !model)
		status = fill_activation(stack, stack->dy, count, seed, STREAM_DY, block);
	free(block);
	return status == STATUS_OK && model ? fill_tokens(stack, seed) : status;
}

enum status stack_set_tokens(struct stack *stack, const int32_t *tokens)
{
	const struct backend *backend = stack->backend;
	size_t n = tokens_of(stack), seq_len = (size_t)stack->shape.seq_len;
	void *to = stack->shape.pass == PASS_GENERATION ? stack->next : stack->tokens;
	enum status status = backend->upload(to, tokens, n * sizeof *tokens);

	if (status != STATUS_OK || !stack->targets)
		return status;
	int32_t *targets = malloc(n * sizeof *targets);
	if (!targets)
		return status_set(STATUS_OOM, "no memory for %zu targets", n);
	for (size_t i = 0; i < n; i++)
		targets[i] = i % seq_len == seq_len - 1 ? -1 : tokens[i + 1];
	status = backend->upload(stack->targets, targets, n * sizeof *targets);
	free(targets);
	return status;
}

/* Fills one cache with a block of random numbers over and over. */
static enum status fill_cache(const struct backend *backend, const struct tensor_spec *spec,
                              void *cache, uint64_t seed, uint64_t stream, float *block)
{
	enum dtype dtype = tensor_dtype(spec, backend);
	int64_t count = tensor_count(spec);
	enum status status = STATUS_OK;

	if (backend->normal_floats)
		return backend->normal_floats(dtype, cache, count, 1.0f, seed, stream);
	noise_normal(seed, stream, 0, smaller(CACHE_BLOCK_COUNT, count), 1.0f, block);
	for (int64_t i = 0; i < count && status == STATUS_OK; i += CACHE_BLOCK_COUNT)
		status = backend_upload_floats(backend, dtype,
		                               (char *)cache + (size_t)i * dtype_size(dtype), block,
		                               (size_t)smaller(CACHE_BLOCK_COUNT, count - i));
	return status;
}

enum status stack_fill_state(struct stack *stack, int64_t position, uint64_t seed)
{
	float *block = malloc(CACHE_BLOCK_COUNT * sizeof *block);
	struct tensor_spec specs[MAX_TENSORS];
	enum status status = STATUS_OK;

	if (!block)
		return status_set(STATUS_OOM, "no memory for a block of random numbers");
	for (int i = 0; i < stack->n_layers; i++) {
		const struct layer_config *config = &stack->layers[i];
		int n = config->class->state(config, &stack->shape, specs);

		for (int j = 0; j < n && status == STATUS_OK; j++) {
			status = fill_cache(stack->backend, &specs[j], stack->memory[i].state[j],
			                    seed, (uint64_t)(STREAM_STATE + i * MAX_TENSORS + j),
			                    block);
		}
	}
	free(block);
	return status == STATUS_OK ? stack_set_position(stack, position) : status;
}
