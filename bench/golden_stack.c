#include "bench/golden_stack.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layers/stack.h"

/* Bound on every size in the metadata: products of a few cannot overflow. */
enum { MAX_SIZE = 1 << 20 };

/* -------- metadata -------- */

/* The integer that metadata `key` holds, or `absent`; negative if it holds anything else. */
static int64_t metadata_integer(const struct golden_file *check, const char *key, int64_t absent)
{
	const char *text = safetensors_metadata(&check->file, key);
	char *end;

	if (!text)
		return absent;
	long long value = strtoll(text, &end, 10);
	return *text == '\0' || *end != '\0' || value > MAX_SIZE ? -1 : value;
}

/* Sizes are sizes; and what is built into the blocks is what the file has, or it is no test of
 * them. */
static enum status check_metadata(const struct golden_file *check)
{
	static const struct safetensors_metadata fixed[] = {
	        {"rope_base", "10000"},      {"ffn_act", "gelu_erf"},
	        {"out_norm_eps", "1e-05"},   {"gate_logit_normalizer", "16"},
	        {"norm_eps", "1e-06"},       {"norm_before_gate", "0"},
	        {"feature_map", "identity"}, {"output_gate", "0"},
	        {"l2norm_eps", "1e-06"},     {"qk_norm", "l2"},
	        {"conv_width", "4"},         {"c", "8"},
	        {"rope_fraction", "0.5"},    {"window_rule", "0 <= t - s < window"},
	};
	static const char *const sizes[] = {"d_model", "n_heads",  "d_head",     "chunk_size",
	                                    "window",  "n_groups", "n_kv_heads", "n_layers"};

	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
		if (metadata_integer(check, sizes[i], 0) < 0)
			return status_set(STATUS_INVALID, "%s is %.32s, no size", sizes[i],
			                  safetensors_metadata(&check->file, sizes[i]));
	for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
		const char *value = safetensors_metadata(&check->file, fixed[i].key);

		if (value && strcmp(value, fixed[i].value) != 0)
			return status_set(STATUS_INVALID, "%s is %.32s, but only %s is built in",
			                  fixed[i].key, value, fixed[i].value);
	}
	return STATUS_OK;
}

/* RAT+'s arguments, (dilation=16,window=0,initial=4): no option of a stack sets all of them. A
 * negative dilation is none. Returns how many characters. */
static size_t append_ratplus(const struct golden_file *check, char *text, size_t size)
{
	const int64_t dilation = metadata_integer(check, "dilation_size", 0);

	return (size_t)snprintf(text, size, "(dilation=%lld,window=%lld,initial=%lld)",
	                        (long long)(dilation < 0 ? 0 : dilation),
	                        (long long)metadata_integer(check, "local_size", 0),
	                        (long long)metadata_integer(check, "initial_size", 0));
}

/* A pattern for the stack ("rat,swa") from the reference's name of blocks ("rat-local_attention").
 * STATUS_UNSUPPORTED if there is no such block. */
static enum status block_pattern(const struct golden_file *check, const char *reference,
                                 char *pattern, size_t size)
{
	size_t used = 0;

	pattern[0] = '\0';
	while (*reference && used < size) {
		size_t length = strcspn(reference, "-");
		char name[32];

		snprintf(name, sizeof name, "%.*s", (int)length, reference);
		if (strcmp(name, "rnn") == 0)
			snprintf(name, sizeof name, "recurrence");
		else if (strcmp(name, "local_attention") == 0)
			snprintf(name, sizeof name, "swa");
		if (!layer_class_find(name))
			return status_set(STATUS_UNSUPPORTED, "no block '%s'", name);
		used += (size_t)snprintf(pattern + used, size - used, "%s%s", used ? "," : "",
		                         name);
		if (strcmp(name, "ratplus") == 0 && used < size)
			used += append_ratplus(check, pattern + used, size - used);
		reference += length + (reference[length] == '-');
	}
	return STATUS_OK;
}

static struct stack_options stack_options_of(const struct golden_file *check, const char *pattern)
{
	const char *position = safetensors_metadata(&check->file, "position");
	int64_t d_model = metadata_integer(check, "d_model", 0);
	int64_t d_head = metadata_integer(check, "d_head", 0);

	return (struct stack_options){
	        .pattern = pattern,
	        .d_model = d_model,
	        .n_heads = metadata_integer(check, "n_heads", d_head > 0 ? d_model / d_head : 0),
	        .chunk = metadata_integer(check, "chunk_size", 0),
	        .window = metadata_integer(check, "window", 0),
	        .groups = metadata_integer(check, "n_groups", 0),
	        .kv_heads = metadata_integer(check, "n_kv_heads", 0),
	        .rope = !position || strcmp(position, "none") != 0,
	        .prenorm = true,
	        .residual = true,
	        .norm_eps = 1e-6f,
	};
}

/* -------- parameters of a stack -------- */

static bool all_numbers(const float *values, int64_t count)
{
	for (int64_t i = 0; i < count; i++)
		if (isnan(values[i]))
			return false;
	return true;
}

/* Makes every parameter NaN. */
static enum status forget_parameters(struct golden_file *check, struct stack *stack)
{
	struct tensor_spec spec;
	float *values;

	for (int layer = LAYER_MODEL; layer < stack->n_layers; layer++)
		for (int i = 0; i < MAX_TENSORS; i++) {
			if (!stack_parameter_spec(stack, layer, i, &spec))
				continue;
			TRY(golden_allocate(check, tensor_count(&spec), &values));
			for (int64_t j = 0; j < tensor_count(&spec); j++)
				values[j] = NAN;
			TRY(stack_set_parameter(stack, layer, i, values));
		}
	return STATUS_OK;
}

/* STATUS_INVALID with the name of the first parameter that is NaN, or is not in the file. */
static enum status require_parameters(struct golden_file *check, const struct stack *stack)
{
	char name[128], tensor[160], shape_text[96];
	struct tensor_spec shape;
	float *values;
	int same_as;

	for (int i = 0; stack_name_at(stack, i, name, sizeof name, &same_as); i++) {
		if (!stack_named_shape(stack, name, &shape))
			continue;
		TRY(golden_allocate(check, tensor_count(&shape), &values));
		TRY(stack_get_named(stack, name, values, tensor_count(&shape)));
		if (all_numbers(values, tensor_count(&shape)))
			continue;
		snprintf(tensor, sizeof tensor, "param.%s", name);
		golden_print_shape(shape.n_dims, shape.dims, shape_text);
		return safetensors_find(&check->file, tensor)
		               ? status_set(STATUS_INVALID, "tensor '%s' has a NaN", tensor)
		               : status_set(STATUS_INVALID, "the file has no tensor '%s' %s",
		                            tensor, shape_text);
	}
	return STATUS_OK;
}

/* All parameters, from tensors of the file that are as large as the reference's. */
static enum status set_parameters(struct golden_file *check, struct stack *stack)
{
	TRY(forget_parameters(check, stack));
	for (int i = 0; i < check->file.n_tensors; i++) {
		const struct safetensor *tensor = &check->file.tensors[i];
		const char *name = golden_suffix(tensor, "param.");
		struct tensor_spec shape;
		const float *values;

		if (!name)
			continue;
		if (!stack_named_shape(stack, name, &shape))
			return status_set(STATUS_INVALID, "%s of the file is not in the layer",
			                  tensor->name);
		TRY(golden_floats(check, tensor->name, shape.n_dims, shape.dims, &values));
		TRY(stack_set_named(stack, name, values, tensor->count));
	}
	return require_parameters(check, stack);
}

typedef enum status (*get_function)(const struct stack *stack, const char *name, float *values,
                                    int64_t count);

/* Compares those of the file's tensors that begin with `prefix`, whose values are `get`'s for the
 * name from offset `skip` on. What our layer has not is left alone, and so reported. */
static enum status compare_named(struct golden_file *check, struct stack *stack, const char *prefix,
                                 size_t skip, get_function get, bool gradient, const char *note)
{
	for (int i = 0; i < check->file.n_tensors; i++) {
		const struct safetensor *tensor = &check->file.tensors[i];
		struct tensor_spec shape;
		const float *expected;
		float *actual;
		char label[96];

		if (!golden_suffix(tensor, prefix) ||
		    !stack_named_shape(stack, tensor->name + skip, &shape))
			continue;
		TRY(golden_floats(check, tensor->name, shape.n_dims, shape.dims, &expected));
		TRY(golden_allocate(check, tensor->count, &actual));
		TRY(get(stack, tensor->name + skip, actual, tensor->count));
		snprintf(label, sizeof label, "%s%s", tensor->name, note);
		golden_compare(check, tensor->name, label, gradient, actual, expected,
		               tensor->count);
	}
	return STATUS_OK;
}

static enum status compare_states(struct golden_file *check, struct stack *stack, const char *note)
{
	return compare_named(check, stack, "state.", 0, stack_get_named_state, false, note);
}

/* -------- layers and models -------- */

/* A layer or a model of the file. Its inputs and outputs are [B, T, width] in the file. */
struct subject {
	struct golden_file *check;
	struct stack stack;
	bool is_model;
	int64_t batch, seq_len;
	const void *input;        /* [B, T, D] floats or, of a model, [B, T] tokens */
	const char *x_in, *dy_in; /* what the stored outputs and dx contain besides: "x", "dy" */
	const char *output;       /* "y", "logits" */
	int64_t width;            /* of that */
};

/* A stored tensor [B, T, width]. */
static enum status stored_rows(const struct subject *s, const char *name, const float **values)
{
	const int64_t dims[] = {s->batch, s->seq_len, s->width};

	return golden_floats(s->check, name, 3, dims, values);
}

static enum status upload(const struct subject *s, void *to, const float *values, int64_t n)
{
	struct device *device = s->check->device;

	return device_upload_floats(device, device->activation, to, values,
	                            (size_t)(s->batch * n * s->width));
}

/* Takes the memory of a pass; what it writes is NaN until then. */
static enum status prepare(struct subject *s, enum pass pass)
{
	const struct layer_shape shape = {
	        .pass = pass,
	        .batch = s->batch,
	        .seq_len = pass == PASS_GENERATION ? 1 : s->seq_len,
	        .capacity = pass == PASS_TRAIN ? 0 : s->seq_len,
	};

	TRY(stack_allocate(&s->stack, &s->check->ctx, &shape));
	TRY(stack_poison(&s->stack));
	return set_parameters(s->check, &s->stack);
}

/* The stack's input: tokens first .. first+n-1 of every sequence. */
static enum status set_input(struct subject *s, int64_t first, int64_t n)
{
	/* Tokens are as wide as floats. */
	int64_t width = s->is_model ? 1 : s->stack.d_model;
	size_t row = (size_t)(n * width) * sizeof(float);
	float *rows;

	TRY(golden_allocate(s->check, s->batch * n * width, &rows));
	for (int64_t b = 0; b < s->batch; b++)
		memcpy(rows + b * n * width,
		       (const char *)s->input +
		               (size_t)((b * s->seq_len + first) * width) * sizeof(float),
		       row);
	return s->is_model ? stack_set_tokens(&s->stack, (const int32_t *)(const void *)rows)
	                   : upload(s, s->stack.x, rows, n);
}

/*
 * Compares rows first .. first+n-1 of every sequence of the stored tensor `name`. It contains
 * `also`, unless that is NULL: what is compared is without, theirs less `also`, and ours too if our
 * layer has a residual.
 */
static enum status compare_rows(struct subject *s, const char *name, const char *also,
                                const char *note, bool gradient, int64_t first, int64_t n,
                                const float *actual)
{
	const int64_t row = n * s->width;
	const float *theirs, *shortcut = NULL;
	float *expected, *ours;
	char label[96];

	TRY(stored_rows(s, name, &theirs));
	if (also)
		TRY(stored_rows(s, also, &shortcut));
	TRY(golden_allocate(s->check, s->batch * row, &expected));
	TRY(golden_allocate(s->check, s->batch * row, &ours));
	for (int64_t i = 0; i < s->batch * row; i++) {
		int64_t j = (i / row * s->seq_len + first) * s->width + i % row;
		float residual = shortcut ? shortcut[j] : 0;

		expected[i] = theirs[j] - residual;
		ours[i] = actual[i] - (s->stack.layers[0].residual ? residual : 0);
	}
	snprintf(label, sizeof label, "%s%s%s%s", name, also ? " - " : "", also ? also : "", note);
	golden_compare(s->check, name, label, gradient, ours, expected, s->batch * row);
	return STATUS_OK;
}

/* n rows of every sequence that lie in the device's memory. */
static enum status download(struct subject *s, const void *rows, int64_t n, float **values)
{
	struct device *device = s->check->device;
	int64_t count = s->batch * n * s->width;

	TRY(golden_allocate(s->check, count, values));
	return device_download_floats(device, device->activation, *values, rows, (size_t)count);
}

static const void *output_of(const struct subject *s)
{
	return s->is_model ? s->stack.logits : s->stack.y;
}

/* The last n rows of the stack's output. */
static enum status compare_output(struct subject *s, const char *note, int64_t n)
{
	float *actual;

	TRY(download(s, output_of(s), n, &actual));
	return compare_rows(s, s->output, s->x_in, note, false, s->seq_len - n, n, actual);
}

static enum status compare_loss(struct subject *s)
{
	struct golden_file *check = s->check;
	const float *expected;
	float loss = NAN;

	TRY(golden_floats(check, "loss", 0, NULL, &expected));
	TRY(device_download(check->device, &loss, s->stack.loss, sizeof loss));
	golden_compare(check, "loss", "loss", false, &loss, expected, 1);
	return STATUS_OK;
}

/* A file without the gradient of y is one of a forward pass alone. */
static enum status train(struct subject *s)
{
	struct golden_file *check = s->check;
	const float *dy;
	float *dx;

	if (!s->is_model && !safetensors_find(&check->file, "dy"))
		return STATUS_OK;
	TRY(prepare(s, PASS_TRAIN));
	TRY(set_input(s, 0, s->seq_len));
	if (!s->is_model) {
		TRY(stored_rows(s, "dy", &dy));
		TRY(upload(s, s->stack.dy, dy, s->seq_len));
	}
	TRY(stack_forward(&s->stack, &check->ctx));
	TRY(compare_output(s, "", s->seq_len));
	TRY(stack_backward(&s->stack, &check->ctx));
	if (safetensors_find(&check->file, "loss"))
		TRY(compare_loss(s));
	if (safetensors_find(&check->file, "dx")) {
		TRY(download(s, s->stack.dx, s->seq_len, &dx));
		TRY(compare_rows(s, "dx", s->dy_in, "", true, 0, s->seq_len, dx));
	}
	return compare_named(check, &s->stack, "grad.", strlen("grad."), stack_get_named_gradient,
	                     true, "");
}

/* A model's prefill has the logits of the last position alone. */
static enum status prefill(struct subject *s)
{
	static const char note[] = " (prefill)";

	TRY(prepare(s, PASS_PREFILL));
	TRY(set_input(s, 0, s->seq_len));
	TRY(stack_forward(&s->stack, &s->check->ctx));
	TRY(compare_output(s, note, s->is_model ? 1 : s->seq_len));
	return compare_states(s->check, &s->stack, note);
}

/* All tokens one by one from empty states. */
static enum status generate(struct subject *s)
{
	static const char note[] = " (steps)";
	bool own = safetensors_find(&s->check->file, "y_step") != NULL;
	int64_t width = s->width;
	float *rows, *step;

	TRY(prepare(s, PASS_GENERATION));
	TRY(stack_empty_state(&s->stack));
	TRY(golden_allocate(s->check, s->batch * s->seq_len * width, &rows));
	for (int64_t t = 0; t < s->seq_len; t++) {
		TRY(set_input(s, t, 1));
		TRY(stack_set_position(&s->stack, t));
		TRY(stack_step(&s->stack, &s->check->ctx, t));
		TRY(download(s, output_of(s), 1, &step));
		for (int64_t b = 0; b < s->batch; b++)
			memcpy(rows + (b * s->seq_len + t) * width, step + b * width,
			       (size_t)width * sizeof *rows);
	}
	TRY(compare_rows(s, own ? "y_step" : s->output, s->x_in, own ? "" : note, false, 0,
	                 s->seq_len, rows));
	return compare_states(s->check, &s->stack, note);
}

/* Every pass that the device has; one that it has not leaves the others to be compared. */
static enum status run_passes(struct subject *s)
{
	enum status status = golden_forgive(s->check, train(s));

	if (status == STATUS_OK)
		status = golden_forgive(s->check, prefill(s));
	if (status == STATUS_OK)
		status = golden_forgive(s->check, generate(s));
	stack_release(&s->stack);
	return status;
}

/* The tensor of `n_dims` dimensions that says how many sequences of how many tokens there are. */
static enum status require_input(const struct golden_file *check, const char *name, int n_dims,
                                 struct subject *s)
{
	const struct safetensor *input = safetensors_find(&check->file, name);

	if (!input || input->n_dims != n_dims || input->count < 1)
		return status_set(STATUS_INVALID, "the file has no tensor '%s' of %d dimensions",
		                  name, n_dims);
	s->batch = input->dims[0];
	s->seq_len = input->dims[1];
	return STATUS_OK;
}

/* Inputs and parameters need no verdict. */
static void mark_inputs(struct golden_file *check)
{
	golden_mark(check, "x");
	golden_mark(check, "dy");
	golden_mark(check, "tokens");
	for (int i = 0; i < check->file.n_tensors; i++)
		if (golden_suffix(&check->file.tensors[i], "param."))
			check->used[i] = true;
}

/* In bf16 the layer runs without its residual: y - x of a rounded y is noise. */
static enum status read_layer(struct subject *s, struct stack_options *options)
{
	const char *note = safetensors_metadata(&s->check->file, "note");
	bool mixer_only = note && strncmp(note, "mixer only", strlen("mixer only")) == 0;
	const float *x;

	TRY(require_input(s->check, "x", 3, s));
	options->prenorm = !mixer_only;
	options->residual = !mixer_only && s->check->device->activation == DTYPE_F32;
	s->x_in = mixer_only ? NULL : "x";
	s->dy_in = mixer_only ? NULL : "dy";
	s->output = "y";
	s->width = options->d_model;
	TRY(stored_rows(s, "x", &x));
	s->input = x;
	return STATUS_OK;
}

/* The file's tokens as int32. */
static enum status read_tokens(struct subject *s)
{
	const int64_t dims[] = {s->batch, s->seq_len};
	const struct safetensor *stored;
	float *memory;

	TRY(golden_require(s->check, "tokens", SAFETENSORS_I64, 2, dims, &stored));
	TRY(golden_allocate(s->check, stored->count, &memory));
	int32_t *tokens = (int32_t *)(void *)memory;
	for (int64_t i = 0; i < stored->count; i++) {
		int64_t token = stored->data.i64[i];

		if (token < 0 || token >= s->width)
			return status_set(STATUS_INVALID, "token %lld is not below vocab_size %lld",
			                  (long long)token, (long long)s->width);
		tokens[i] = (int32_t)token;
	}
	s->input = tokens;
	return STATUS_OK;
}

static enum status read_model(struct subject *s, struct stack_options *options)
{
	TRY(require_input(s->check, "tokens", 2, s));
	options->n_layers = metadata_integer(s->check, "n_layers", 0);
	options->vocab = metadata_integer(s->check, "vocab_size", 0);
	options->ffn = true;
	s->output = "logits";
	s->width = options->vocab;
	if (options->vocab < 1 || metadata_integer(s->check, "d_ffn", -1) != 4 * options->d_model)
		return status_set(STATUS_INVALID, "vocab_size is missing, or d_ffn not 4 d_model");
	return read_tokens(s);
}

enum status golden_stack(struct golden_file *check, bool is_model)
{
	struct subject s = {.check = check, .is_model = is_model};
	char pattern[128];

	TRY(block_pattern(check, safetensors_metadata(&check->file, is_model ? "model" : "block"),
	                  pattern, sizeof pattern));
	TRY(check_metadata(check));
	struct stack_options options = stack_options_of(check, pattern);

	TRY((is_model ? read_model : read_layer)(&s, &options));
	mark_inputs(check);
	TRY(stack_configure(&s.stack, check->device, &options));
	return run_passes(&s);
}

/* The further names of parameter number `first`. */
static void print_synonyms(const struct stack *stack, int first, FILE *file)
{
	const char *before = "  also ";
	char name[128];
	int same_as;

	for (int i = first + 1; stack_name_at(stack, i, name, sizeof name, &same_as); i++)
		if (same_as == first) {
			fprintf(file, "%sparam.%s", before, name);
			before = ", ";
		}
}

enum status golden_describe(struct device *device, const char *pattern, int64_t d_model, FILE *file)
{
	const struct stack_options options = {.pattern = pattern,
	                                      .d_model = d_model,
	                                      .n_heads = -1,
	                                      .kv_heads = -1,
	                                      .chunk = -1,
	                                      .window = -1,
	                                      .groups = -1,
	                                      .rope = -1,
	                                      .prenorm = true,
	                                      .residual = true};
	struct stack *stack = malloc(sizeof *stack);
	char name[128], shape_text[96], text[2048];
	struct tensor_spec shape;
	int same_as;

	enum status status = stack ? stack_configure(stack, device, &options)
	                           : status_set(STATUS_OOM, "no memory for a stack");
	if (status == STATUS_OK) {
		stack_pattern(stack, text, sizeof text);
		fprintf(file, "%s, d_model %lld\n", text, (long long)d_model);
	}
	for (int i = 0; status == STATUS_OK && stack_name_at(stack, i, name, sizeof name, &same_as);
	     i++) {
		if (same_as != i || !stack_named_shape(stack, name, &shape))
			continue;
		golden_print_shape(shape.n_dims, shape.dims, shape_text);
		fprintf(file, "param.%-40s %s", name, shape_text);
		print_synonyms(stack, i, file);
		fputc('\n', file);
	}
	free(stack);
	return status;
}
