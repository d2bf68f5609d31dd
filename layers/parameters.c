/* A stack's data: random parameters, inputs and caches, and access to parameters by index or name.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layers/directions.h"
#include "layers/model.h"
#include "kernels/noise.h"

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

bool stack_parameter_spec(const struct stack *stack, int layer, int index, struct tensor_spec *spec)
{
	struct parameter parameter;
	bool found = find_parameter(stack, layer, index, &parameter);

	if (found)
		*spec = parameter.spec;
	return found;
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
	return device_upload_floats(stack->device, tensor_dtype(&p.spec, stack->device), p.value,
	                            values, (size_t)tensor_count(&p.spec));
}

enum status stack_get_parameter(const struct stack *stack, int layer, int index, float *values)
{
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p))
		return no_parameter(layer, index);
	return device_download_floats(stack->device, tensor_dtype(&p.spec, stack->device), values,
	                              p.value, (size_t)tensor_count(&p.spec));
}

enum status stack_get_gradient(const struct stack *stack, int layer, int index, float *values)
{
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p) || !p.gradient)
		return no_parameter(layer, index);
	return device_download_floats(stack->device, stack->device->wide, values, p.gradient,
	                              (size_t)tensor_count(&p.spec));
}

/* ---- golden names ---- */

static bool has_ffn(const struct stack *stack)
{
	return stack->n_layers > 1 && stack->layers[1].class == &ffn_layer;
}

/* The same for a stack that is no model: its only layer's names are as they are. */
static int bare_layer_of_name(const struct stack *stack, const char **name)
{
	int index, length = 0;

	if (stack->n_layers == 1)
		return 0;
	if (sscanf(*name, "layers.%d.%n", &index, &length) != 1 || length == 0 || index < 0)
		return -1;
	*name += length;
	return index;
}

/* Finds the layer that a name of a model means and moves *name on to its own part. -1: none. */
static int layer_of_name(const struct stack *stack, const char **name)
{
	char kind[16];
	int index, length = 0;

	if (stack->vocab == 0)
		return bare_layer_of_name(stack, name);
	if (sscanf(*name, "backbone.layers.%d.%15[a-z_].%n", &index, kind, &length) != 2 ||
	    length == 0 || index < 0 || index >= stack->n_layers)
		return -1;
	*name += length;
	if (strcmp(kind, "seq_layer") == 0)
		return has_ffn(stack) ? 2 * index : index;
	return has_ffn(stack) && strcmp(kind, "hidden_layer") == 0 ? 2 * index + 1 : -1;
}

/* What a golden name means: pieces of one of our tensors, in the reference's order. */
struct named {
	struct parameter tensor; /* or a state, which has no gradient */
	bool is_state, transposed, beside;
	int n_pieces;
	int64_t first[MAX_GOLDEN_NAMES], count[MAX_GOLDEN_NAMES]; /* rows; of a state columns */
};

static bool find_state(const struct stack *stack, int layer, int index, struct parameter *state)
{
	const struct layer_config *config = &stack->layers[layer];
	struct tensor_spec specs[MAX_TENSORS];

	if (index >= config->class->state(config, &stack->shape, specs))
		return false;
	*state = (struct parameter){specs[index], stack->memory[layer].state[index], NULL};
	return state->value != NULL;
}

static bool find_in_layer(const struct stack *stack, int layer, const char *name,
                          struct named *named)
{
	const struct layer_config *config = &stack->layers[layer];
	struct golden_name names[MAX_GOLDEN_NAMES];
	int n = config->class->golden_names(config, names);

	for (int i = 0; i < n; i++) {
		if (strcmp(name, names[i].name) != 0)
			continue;
		if (!(names[i].is_state ? find_state : find_parameter)(
		            stack, layer, names[i].tensor, &named->tensor))
			return false;
		named->is_state = names[i].is_state;
		named->transposed = names[i].transposed;
		named->beside = names[i].beside;
		named->first[named->n_pieces] = names[i].first;
		named->count[named->n_pieces++] = names[i].count;
	}
	return named->n_pieces > 0;
}

static const char *const model_names[MODEL_PARAMETERS] = {
        [MODEL_EMBEDDING] = "embedding.wte.weight",
        [MODEL_FINAL_NORM] = "backbone.ln.weight",
        [MODEL_HEAD] = "head.lm_head.weight",
};

/* False if the name means nothing. */
static bool find_named(const struct stack *stack, const char *name, struct named *named)
{
	*named = (struct named){0};
	for (int i = 0; i < MODEL_PARAMETERS && stack->vocab > 0; i++)
		if (strcmp(name, model_names[i]) == 0) {
			named->tensor = model_parameter(stack, i);
			named->count[0] = named->tensor.spec.dims[0];
			named->n_pieces = 1;
			return true;
		}
	int layer = layer_of_name(stack, &name);
	return layer >= 0 && layer < stack->n_layers && find_in_layer(stack, layer, name, named);
}

static struct tensor_spec shape_of(const struct named *named)
{
	struct tensor_spec shape = named->tensor.spec;
	int last = shape.n_dims - 1, cut = named->is_state ? last : 0;

	shape.dims[cut] = 0;
	for (int i = 0; i < named->n_pieces; i++)
		shape.dims[cut] += named->count[i];
	if (named->beside) {
		shape.dims[cut] /= named->n_pieces;
		shape.dims[last] *= named->n_pieces;
	}
	if (named->transposed) {
		int64_t columns = shape.dims[last];

		shape.dims[last] = shape.dims[last - 1];
		shape.dims[last - 1] = columns;
	}
	return shape;
}

/* What the names of a layer's tensors begin with. */
static void name_prefix(const struct stack *stack, int layer, char *prefix, size_t size)
{
	const bool ffn = stack->layers[layer].class == &ffn_layer;

	prefix[0] = '\0';
	if (stack->vocab > 0)
		snprintf(prefix, size, "backbone.layers.%d.%s.", has_ffn(stack) ? layer / 2 : layer,
		         ffn ? "hidden_layer" : "seq_layer");
	else if (stack->n_layers > 1)
		snprintf(prefix, size, "layers.%d.", layer);
}

/* Whether entry i is the first of its name, and of a parameter that is there. */
static bool begins_parameter(const struct stack *stack, int layer, const struct golden_name *names,
                             int i)
{
	struct parameter parameter;

	for (int j = 0; j < i; j++)
		if (strcmp(names[j].name, names[i].name) == 0)
			return false;
	return !names[i].is_state && find_parameter(stack, layer, names[i].tensor, &parameter);
}

/* How far before entry i, counted in names, another name of the same rows is; 0: there is none. */
static int synonym_before(const struct stack *stack, int layer, const struct golden_name *names,
                          int i)
{
	int back = 0, found = 0;

	for (int j = i - 1; j >= 0; j--) {
		if (!begins_parameter(stack, layer, names, j))
			continue;
		back++;
		if (names[j].tensor == names[i].tensor && names[j].first == names[i].first)
			found = back;
	}
	return found;
}

bool stack_name_at(const struct stack *stack, int index, char *name, size_t size, int *same_as)
{
	struct golden_name names[MAX_GOLDEN_NAMES];
	char prefix[64];
	int at = 0;

	*same_as = index;
	for (int layer = 0; layer < stack->n_layers; layer++) {
		const struct layer_config *config = &stack->layers[layer];
		const int n = config->class->golden_names(config, names);

		for (int i = 0; i < n; i++)
			if (begins_parameter(stack, layer, names, i) && at++ == index) {
				name_prefix(stack, layer, prefix, sizeof prefix);
				snprintf(name, size, "%s%s", prefix, names[i].name);
				*same_as -= synonym_before(stack, layer, names, i);
				return true;
			}
	}
	if (stack->vocab == 0 || index - at >= MODEL_PARAMETERS)
		return false;
	snprintf(name, size, "%s", model_names[index - at]);
	return true;
}

bool stack_named_shape(const struct stack *stack, const char *name, struct tensor_spec *shape)
{
	struct named named;

	if (!find_named(stack, name, &named))
		return false;
	*shape = shape_of(&named);
	return true;
}

/* The same with a message, for a tensor of `count` elements. */
static enum status require_named(const struct stack *stack, const char *name, bool is_state,
                                 int64_t count, struct named *named)
{
	if (!find_named(stack, name, named) || named->is_state != is_state)
		return status_set(STATUS_INVALID, "no %s is called '%s'",
		                  is_state ? "state" : "parameter", name);
	struct tensor_spec shape = shape_of(named);
	if (count != tensor_count(&shape))
		return status_set(STATUS_INVALID, "%s has %lld elements, not %lld", name,
		                  (long long)tensor_count(&shape), (long long)count);
	return STATUS_OK;
}

/* Where piece i of a named parameter lies in `tensor`, its values or its gradient, and how many
 * elements it has. */
static void *piece_of(const struct named *named, int i, void *tensor, enum dtype dtype, size_t *n)
{
	const struct tensor_spec *spec = &named->tensor.spec;
	size_t width = (size_t)(tensor_count(spec) / spec->dims[0]);

	*n = width * (size_t)named->count[i];
	return (char *)tensor + width * (size_t)named->first[i] * dtype_size(dtype);
}

/* Copies a named parameter between the reference's layout, where its pieces may lie beside one
 * another, and pieces one after another. */
static void arrange(const struct named *named, float *theirs, float *pieces, bool to_pieces)
{
	const struct tensor_spec *spec = &named->tensor.spec;
	int64_t width = tensor_count(spec) / spec->dims[0], row = width * named->n_pieces;

	for (int p = 0; p < named->n_pieces; p++)
		for (int64_t i = 0; i < named->count[p]; i++, pieces += width) {
			float *their_row = theirs + i * row + p * width;

			memcpy(to_pieces ? pieces : their_row, to_pieces ? their_row : pieces,
			       (size_t)width * sizeof *pieces);
		}
}

static enum status set_pieces(struct stack *stack, const struct named *named, const float *values)
{
	size_t n;

	for (int i = 0; i < named->n_pieces; i++, values += n) {
		enum dtype dtype = tensor_dtype(&named->tensor.spec, stack->device);
		void *to = piece_of(named, i, named->tensor.value, dtype, &n);

		TRY(device_upload_floats(stack->device, dtype, to, values, n));
	}
	return STATUS_OK;
}

/* Of the values or, with `gradient`, of the gradient. */
static enum status get_pieces(const struct stack *stack, const struct named *named, bool gradient,
                              float *values)
{
	const enum dtype dtype =
	        gradient ? stack->device->wide : tensor_dtype(&named->tensor.spec, stack->device);
	void *tensor = gradient ? (void *)named->tensor.gradient : named->tensor.value;
	size_t n;

	for (int i = 0; i < named->n_pieces; i++, values += n) {
		const void *from = piece_of(named, i, tensor, dtype, &n);

		TRY(device_download_floats(stack->device, dtype, values, from, n));
	}
	return STATUS_OK;
}

enum status stack_set_named(struct stack *stack, const char *name, const float *values,
                            int64_t count)
{
	struct named named;

	TRY(require_named(stack, name, false, count, &named));
	if (!named.beside)
		return set_pieces(stack, &named, values);
	float *pieces = malloc((size_t)count * sizeof *pieces);
	if (!pieces)
		return status_set(STATUS_OOM, "no memory for '%s'", name);
	arrange(&named, (float *)values, pieces, true);
	enum status status = set_pieces(stack, &named, pieces);
	free(pieces);
	return status;
}

/* The same in the reference's layout. */
static enum status get_named(const struct stack *stack, const char *name, bool gradient,
                             float *values, int64_t count)
{
	struct named named;

	TRY(require_named(stack, name, false, count, &named));
	if (gradient && !named.tensor.gradient)
		return status_set(STATUS_INVALID, "%s has a gradient only in training", name);
	if (!named.beside)
		return get_pieces(stack, &named, gradient, values);
	float *pieces = malloc((size_t)count * sizeof *pieces);
	if (!pieces)
		return status_set(STATUS_OOM, "no memory for '%s'", name);
	enum status status = get_pieces(stack, &named, gradient, pieces);
	if (status == STATUS_OK)
		arrange(&named, values, pieces, false);
	free(pieces);
	return status;
}

enum status stack_get_named(const struct stack *stack, const char *name, float *values,
                            int64_t count)
{
	return get_named(stack, name, false, values, count);
}

enum status stack_get_named_gradient(const struct stack *stack, const char *name, float *values,
                                     int64_t count)
{
	return get_named(stack, name, true, values, count);
}

/* The reference's layout of a state. */
static void rearrange_state(const struct named *named, const float *ours, float *theirs)
{
	const struct tensor_spec *spec = &named->tensor.spec, shape = shape_of(named);
	int last = spec->n_dims - 1;
	int64_t from_width = spec->dims[last], rows = last > 0 ? spec->dims[last - 1] : 1;
	int64_t to_width = shape.dims[named->transposed ? last - 1 : last], first = 0;

	for (int p = 0; p < named->n_pieces; first += named->count[p++])
		for (int64_t i = 0; i < tensor_count(spec) / from_width; i++)
			for (int64_t j = 0; j < named->count[p]; j++) {
				int64_t to = named->transposed
				                     ? (i / rows * to_width + first + j) * rows +
				                               i % rows
				                     : i * to_width + first + j;

				theirs[to] = ours[i * from_width + named->first[p] + j];
			}
}

enum status stack_get_named_state(const struct stack *stack, const char *name, float *values,
                                  int64_t count)
{
	struct named named;
	const struct tensor_spec *spec = &named.tensor.spec;

	TRY(require_named(stack, name, true, count, &named));
	float *ours = malloc((size_t)tensor_count(spec) * sizeof *ours);
	if (!ours)
		return status_set(STATUS_OOM, "no memory for '%s'", name);
	enum status status =
	        device_download_floats(stack->device, tensor_dtype(spec, stack->device), ours,
	                               named.tensor.value, (size_t)tensor_count(spec));
	if (status == STATUS_OK)
		rearrange_state(&named, ours, values);
	free(ours);
	return status;
}

/* ---- random data ---- */

/* normal(0, scale) into a tensor. What is made on the host is made in blocks of `length`: those of
 * caches are all the same, CACHE_BLOCK_COUNT long. */
static enum status fill_normal(struct device *device, enum dtype dtype, void *tensor, int64_t count,
                               float scale, uint64_t seed, uint64_t stream, int64_t length,
                               float *block)
{
	if (device->backend->normal_floats)
		return device->backend->normal_floats(device, dtype, tensor, count, scale, seed,
		                                      stream);
	for (int64_t i = 0; i < count; i += length) {
		int64_t n = smaller(length, count - i);

		if (i == 0 || length != CACHE_BLOCK_COUNT)
			noise_normal(seed, stream, i, n, scale, block);
		TRY(device_upload_floats(device, dtype,
		                         (char *)tensor + (size_t)i * dtype_size(dtype), block,
		                         (size_t)n));
	}
	return STATUS_OK;
}

/* The length that the gate bias of a layer is spread over: its chunk, or all it is trained on. */
static float gate_length(const struct layer_config *config)
{
	int64_t length = config->chunk > 0 ? config->chunk : config->train_len;

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
	        {INIT_MIX, 0.0f, 1.0f},
	        {INIT_LRU_RATE, 0.9f, 0.999f},
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
		else if (init == INIT_LRU_RATE)
			values[j] = logf(expm1f(-logf(u) / LRU_SHARPNESS));
	}
	return true;
}

/* Anything but INIT_NORMAL; of a tensor whose rows are `width` wide. */
static void make_values(const struct layer_config *config, enum init init, int64_t width,
                        uint64_t seed, uint64_t stream, int64_t first, int64_t count, float *values)
{
	if (make_spread(config, init, seed, stream, first, count, values))
		return;
	for (int64_t i = 0; i < count; i++)
		values[i] = init == INIT_ONES        ? 1.0f
		            : init == INIT_LOG_COUNT ? logf((float)(1 + (first + i) % width))
		                                     : 0.0f;
}

static enum status fill_parameter(struct stack *stack, int layer, int index, uint64_t seed,
                                  uint64_t stream, float *block)
{
	const struct layer_config *config = layer < 0 ? NULL : &stack->layers[layer];
	struct device *device = stack->device;
	struct parameter p;

	if (!find_parameter(stack, layer, index, &p))
		return STATUS_OK;
	enum dtype dtype = tensor_dtype(&p.spec, device);
	int64_t count = tensor_count(&p.spec);
	if (p.spec.init == INIT_NORMAL)
		return fill_normal(device, dtype, p.value, count,
		                   stack->data == DATA_ZEROS ? 0.0f : INIT_SCALE, seed, stream,
		                   BLOCK_COUNT, block);
	for (int64_t i = 0; i < count; i += BLOCK_COUNT) {
		int64_t n = smaller(BLOCK_COUNT, count - i);

		make_values(config, p.spec.init, p.spec.dims[p.spec.n_dims - 1], seed, stream, i, n,
		            block);
		TRY(device_upload_floats(device, dtype,
		                         (char *)p.value + (size_t)i * dtype_size(dtype), block,
		                         (size_t)n));
	}
	return STATUS_OK;
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
	/* The first of the vocabulary are those whose keys are sinks. */
	for (size_t i = 0; i < n && stack->data == DATA_SINKS; i++)
		if ((int64_t)i % stack->shape.seq_len < smaller(SINK_TOKENS, stack->vocab))
			tokens[i] = (int32_t)((int64_t)i % stack->shape.seq_len);
	status = stack_set_tokens(stack, tokens);
	for (size_t i = 0; i < batch; i++)
		tokens[i] = (int32_t)(noise_bits(seed, STREAM_NEXT, i) % (uint64_t)stack->vocab);
	if (status == STATUS_OK)
		status = device_upload(stack->device, stack->next, tokens, batch * sizeof *tokens);
	free(tokens);
	return status;
}

/* The scale of what is normal whatever x is like. */
static float one_or_zero(const struct stack *stack)
{
	return stack->data == DATA_ZEROS ? 0.0f : 1.0f;
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
		status = fill_normal(stack->device, stack->device->activation, stack->x, count,
		                     data_scale(stack->data), seed, STREAM_X, BLOCK_COUNT, block);
	if (status == STATUS_OK && !model && stack->dy)
		status = fill_normal(stack->device, stack->device->activation, stack->dy, count,
		                     one_or_zero(stack), seed, STREAM_DY, BLOCK_COUNT, block);
	free(block);
	if (status == STATUS_OK && data_has_directions(stack->data))
		status = stack_add_directions(stack, seed, model ? INIT_SCALE : 1.0f);
	return status == STATUS_OK && model ? fill_tokens(stack, seed) : status;
}

enum status stack_set_tokens(struct stack *stack, const int32_t *tokens)
{
	struct device *device = stack->device;
	size_t n = tokens_of(stack), seq_len = (size_t)stack->shape.seq_len;
	void *to = stack->shape.pass == PASS_GENERATION ? stack->next : stack->tokens;

	TRY(device_upload(device, to, tokens, n * sizeof *tokens));
	if (!stack->targets)
		return STATUS_OK;
	int32_t *targets = malloc(n * sizeof *targets);
	if (!targets)
		return status_set(STATUS_OOM, "no memory for %zu targets", n);
	for (size_t i = 0; i < n; i++)
		targets[i] = i % seq_len == seq_len - 1 ? -1 : tokens[i + 1];
	enum status status = device_upload(device, stack->targets, targets, n * sizeof *targets);
	free(targets);
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

		for (int j = 0; j < n && status == STATUS_OK; j++)
			status = fill_normal(stack->device, tensor_dtype(&specs[j], stack->device),
			                     stack->memory[i].state[j], tensor_count(&specs[j]),
			                     one_or_zero(stack), seed,
			                     (uint64_t)(STREAM_STATE + i * MAX_TENSORS + j),
			                     CACHE_BLOCK_COUNT, block);
	}
	free(block);
	if (status == STATUS_OK && data_has_directions(stack->data))
		status = stack_add_cached_directions(stack, seed);
	return status == STATUS_OK ? stack_set_position(stack, position) : status;
}

enum status stack_empty_state(struct stack *stack)
{
	TRY(device_fill(stack->device, (char *)stack->arena + stack->state_offset, 0,
	                stack->output_offset - stack->state_offset));
	return stack_set_position(stack, 0);
}
