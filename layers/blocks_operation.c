/*
 * libblocks: operations, by their descriptions (kernels/operation.h). What a text says of one goes
 * to the sizes and options that its description is made from, then to further fields of its
 * argument struct.
 */
#define _POSIX_C_SOURCE 200809L
#include "layers/blocks_device.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/operation.h"

enum { NAME_BYTES = 24, MAX_SIZE = 1 << 30 };

/* ---- what can be said of an operation ---- */

/* What is not named is 1, but for these. */
static const struct size_name {
	const char *name;
	size_t offset;
	int least;
} size_names[] = {
#define SIZE(name, least)                                                                          \
	{                                                                                          \
#name, offsetof(struct sizes, name), least                                         \
	}
        SIZE(batch, 1),  SIZE(seq_len, 1), SIZE(n_heads, 1), SIZE(groups, 1), SIZE(kv_heads, 1),
        SIZE(d_head, 1), SIZE(d_k, 1),     SIZE(d_v, 1),     SIZE(width, 1),  SIZE(d_in, 1),
        SIZE(d_out, 1),  SIZE(rank, 1),    SIZE(chunk, 1),   SIZE(window, 0), SIZE(vocab, 1),
#undef SIZE
};

enum { N_SIZES = sizeof size_names / sizeof *size_names };

/* Words in the order of their enums. */
static const struct option_name {
	const char *name;
	size_t offset;
	const char *words[7];
} option_names[] = {
        {"mask",
         offsetof(struct operation_form, mask),
         {"causal", "window", "chunk", "full", "dilated"}},
        {"form", offsetof(struct operation_form, form), {"sigmoid", "log_decay"}},
        {"decay",
         offsetof(struct operation_form, decay),
         {"none", "constant", "scalar", "diagonal"}},
        {"rule", offsetof(struct operation_form, rule), {"plain", "bonus", "delta"}},
        {"low_rank",
         offsetof(struct operation_form, low_rank),
         {"decay", "rate", "logit", "tanh", "exp", "step"}},
        {"curve", offsetof(struct operation_form, curve), {"silu", "sigmoid", "none"}},
        {"norm", offsetof(struct operation_form, norm), {"rms", "group"}},
        {"shift", offsetof(struct operation_form, shift), {"constant", "variable"}},
};

enum { N_OPTIONS = sizeof option_names / sizeof *option_names };

enum kind { KIND_INTEGER, KIND_REAL, KIND_BOOL };

/* Fields of argument structs that no description is sized by. Those of a forward are its
 * backward's. */
static const struct field {
	enum operation operation;
	const char *name;
	enum kind kind;
	size_t offset;
} fields[] = {
#define FIELD(OP, op, name, kind)                                                                  \
	{                                                                                          \
		OP_##OP, #name, KIND_##kind, offsetof(struct op##_args, name)                      \
	}
        FIELD(NORM_LINEAR, norm_linear, eps, REAL),
        FIELD(ROTATE, rotate, rope, BOOL),
        FIELD(ROTATE, rotate, rope_width, INTEGER),
        FIELD(ROTATE, rotate, first_kv, INTEGER),
        FIELD(ROTATE, rotate, kv_slots, INTEGER),
        FIELD(ROTATE_BACKWARD, rotate_backward, rope, BOOL),
        FIELD(ROTATE_BACKWARD, rotate_backward, rope_width, INTEGER),
        FIELD(ATTENTION, attention, kv_len, INTEGER),
        FIELD(ATTENTION, attention, window, INTEGER),
        FIELD(ATTENTION, attention, dilation, INTEGER),
        FIELD(ATTENTION, attention, initial, INTEGER),
        FIELD(ATTENTION, attention, scale, REAL),
        FIELD(ATTENTION_STEP, attention_step, kv_slots, INTEGER),
        FIELD(ATTENTION_STEP, attention_step, window, INTEGER),
        FIELD(ATTENTION_STEP, attention_step, rope, BOOL),
        FIELD(ATTENTION_STEP, attention_step, rope_width, INTEGER),
        FIELD(ATTENTION_STEP, attention_step, scale, REAL),
        FIELD(RAT_SCAN, rat_scan, rope, BOOL),
        FIELD(RAT_SCAN, rat_scan, scale, REAL),
        FIELD(RAT_STEP, rat_step, chunk_slots, INTEGER),
        FIELD(RAT_STEP, rat_step, rope, BOOL),
        FIELD(RAT_STEP, rat_step, scale, REAL),
        FIELD(RATPLUS_STEP, ratplus_step, window, INTEGER),
        FIELD(RATPLUS_STEP, ratplus_step, dilation, INTEGER),
        FIELD(RATPLUS_STEP, ratplus_step, initial, INTEGER),
        FIELD(RATPLUS_STEP, ratplus_step, kept_slots, INTEGER),
        FIELD(RATPLUS_STEP, ratplus_step, recent_slots, INTEGER),
        FIELD(RATPLUS_STEP, ratplus_step, rope, BOOL),
        FIELD(RATPLUS_STEP, ratplus_step, scale, REAL),
        FIELD(SELECTIVE_SCAN, selective_scan, state, INTEGER),
        FIELD(SELECTIVE_SCAN_STEP, selective_scan_step, state, INTEGER),
        FIELD(MATRIX_RECURRENCE, matrix_recurrence, chunk, INTEGER),
        FIELD(MATRIX_RECURRENCE, matrix_recurrence, scale, REAL),
        FIELD(MATRIX_RECURRENCE_STEP, matrix_recurrence_step, scale, REAL),
        FIELD(DECAY_GATE, decay_gate, normalizer, REAL),
        FIELD(NORM_GATE, norm_gate, eps, REAL),
        FIELD(SHORT_CONV_BACKWARD, short_conv_backward, n_readers, INTEGER),
        FIELD(GATE_NORM, gate_norm, groups, INTEGER),
        FIELD(GATE_NORM, gate_norm, eps, REAL),
        FIELD(BLOCK_LINEAR, block_linear, n_products, INTEGER),
        FIELD(BLOCK_LINEAR, block_linear, d_in, INTEGER),
        FIELD(BLOCK_LINEAR, block_linear, d_out, INTEGER),
        FIELD(L2_NORM, l2_norm, eps, REAL),
        FIELD(TOKEN_SHIFT, token_shift, n_out, INTEGER),
        FIELD(TOKEN_SHIFT_STEP, token_shift_step, n_out, INTEGER),
        FIELD(CROSS_ENTROPY, cross_entropy, want_gradient, BOOL),
#undef FIELD
};

enum { N_FIELDS = sizeof fields / sizeof *fields };

static const struct size_name *find_size(const char *name)
{
	for (int i = 0; i < N_SIZES; i++)
		if (strcmp(size_names[i].name, name) == 0)
			return &size_names[i];
	return NULL;
}

static const struct option_name *find_option(const char *name)
{
	for (int i = 0; i < N_OPTIONS; i++)
		if (strcmp(option_names[i].name, name) == 0)
			return &option_names[i];
	return NULL;
}

static const struct field *find_field(enum operation id, const char *name)
{
	const int forward = operation_describes(id)->forward;

	for (int i = 0; i < N_FIELDS; i++)
		if ((fields[i].operation == id || (int)fields[i].operation == forward) &&
		    strcmp(fields[i].name, name) == 0)
			return &fields[i];
	return NULL;
}

/* ---- reading the text ---- */

enum { MAX_SETTINGS = 32 };

/* What a text says: an operation and its settings, name by name. */
struct request {
	enum operation id;
	struct sizes sizes;
	struct operation_form form;
	bool given[N_SIZES];
	double product; /* of the sizes that are given */
	int n_fields;
	struct {
		const struct field *field;
		double value;
	} fields[MAX_SETTINGS];
};

static enum status find_operation(const char *name, enum operation *id)
{
	for (int i = 0; i < OP_COUNT; i++)
		if (strcmp(operation_name((enum operation)i), name) == 0) {
			*id = (enum operation)i;
			return STATUS_OK;
		}
	return status_set(STATUS_INVALID, "no operation '%s'", name);
}

static enum status set_option(struct request *r, const struct option_name *option,
                              const char *value)
{
	char allowed[128] = "";

	for (unsigned i = 0; i < 7 && option->words[i]; i++) {
		if (strcmp(option->words[i], value) == 0) {
			memcpy((char *)&r->form + option->offset, &i, sizeof i);
			return STATUS_OK;
		}
		strncat(allowed, i ? ", " : "", sizeof allowed - strlen(allowed) - 1);
		strncat(allowed, option->words[i], sizeof allowed - strlen(allowed) - 1);
	}
	return status_set(STATUS_INVALID, "%s: %s=%s (allowed: %s)", operation_name(r->id),
	                  option->name, value, allowed);
}

static enum status not_allowed(const struct request *r, const char *name, const char *value)
{
	return status_set(STATUS_INVALID, "%s: %s=%s is out of range or no number",
	                  operation_name(r->id), name, value);
}

static enum status set_size(struct request *r, const struct size_name *size, double number,
                            const char *value)
{
	if (!(number >= size->least))
		return not_allowed(r, size->name, value);
	const int64_t integer = (int64_t)number;

	memcpy((char *)&r->sizes + size->offset, &integer, sizeof integer);
	r->given[size - size_names] = true;
	r->product *= number > 1 ? number : 1;
	return STATUS_OK;
}

static enum status set_number(struct request *r, const char *name, const char *value)
{
	const struct size_name *size = find_size(name);
	const struct field *field = find_field(r->id, name);
	char *end;
	const double number = strtod(value, &end);

	if (!size && !field)
		return status_set(STATUS_INVALID, "%s has no '%s'", operation_name(r->id), name);
	const bool real = field && field->kind == KIND_REAL;
	if (!*value || *end || !isfinite(number) ||
	    (!real && (number < -1 || number > MAX_SIZE || number != floor(number))))
		return not_allowed(r, name, value);
	if (field && r->n_fields < MAX_SETTINGS) {
		r->fields[r->n_fields].field = field;
		r->fields[r->n_fields++].value = number;
	}
	/* The family's kernels pick their chunk where it is 0, and a step's window may be -1. */
	return size && !(field && number < size->least) ? set_size(r, size, number, value)
	                                                : STATUS_OK;
}

/* Reads "name=value" and what follows it, up to the ')'. */
static enum status read_settings(struct request *r, char *text)
{
	char *rest = NULL;

	for (char *item = strtok_r(text, ", ", &rest); item; item = strtok_r(NULL, ", ", &rest)) {
		char *value = strchr(item, '=');

		if (!value)
			return status_set(STATUS_INVALID, "%s: '%s' has no value",
			                  operation_name(r->id), item);
		*value++ = '\0';
		const struct option_name *option = find_option(item);
		TRY(option ? set_option(r, option, value) : set_number(r, item, value));
	}
	return STATUS_OK;
}

static void default_sizes(struct request *r)
{
	*r = (struct request){.product = 1};
	for (int i = 0; i < N_SIZES; i++) {
		const int64_t least = size_names[i].least;

		memcpy((char *)&r->sizes + size_names[i].offset, &least, sizeof least);
	}
}

/* Heads that are shared divide the heads; and no product of sizes leaves 64 bits. */
static enum status check_sizes(struct request *r)
{
	if (!r->given[find_size("kv_heads") - size_names])
		r->sizes.kv_heads = r->sizes.n_heads;
	if (r->sizes.n_heads % r->sizes.kv_heads != 0 || r->sizes.n_heads % r->sizes.groups != 0)
		return status_set(STATUS_INVALID,
		                  "%s: kv_heads and groups have to divide the n_heads of %lld",
		                  operation_name(r->id), (long long)r->sizes.n_heads);
	if (r->product > 0x1p60)
		return status_set(STATUS_OOM, "%s: larger than any memory", operation_name(r->id));
	return STATUS_OK;
}

/* "name(setting=value,...)" or "name". */
static enum status read_request(struct request *r, const char *text)
{
	char copy[1024];
	const size_t length = strlen(text);

	default_sizes(r);
	if (length >= sizeof copy)
		return status_set(STATUS_INVALID, "an operation's text is longer than %zu",
		                  sizeof copy - 1);
	memcpy(copy, text, length + 1);
	char *settings = strchr(copy, '(');
	if (settings) {
		*settings++ = '\0';
		char *end = strchr(settings, ')');
		if (!end || end[1])
			return status_set(STATUS_INVALID, "%s: it ends with a ')'", copy);
		*end = '\0';
	}
	TRY(find_operation(copy, &r->id));
	if (settings)
		TRY(read_settings(r, settings));
	return check_sizes(r);
}

static void set_field(union any_args *args, const struct field *field, double value)
{
	void *place = (char *)args + field->offset;
	const int64_t integer = (int64_t)value;
	const float real = (float)value;
	const bool truth = value != 0;

	if (field->kind == KIND_INTEGER)
		memcpy(place, &integer, sizeof integer);
	else if (field->kind == KIND_REAL)
		memcpy(place, &real, sizeof real);
	else
		memcpy(place, &truth, sizeof truth);
}

/* ---- an operation ---- */

struct binding {
	char name[NAME_BYTES];
	void *data;
	int64_t stride[OPERAND_DIMS];
	bool strided;
};

struct blocks_operation {
	struct blocks_device *device;
	enum operation id;
	struct provider_choice choice;
	union any_args sized; /* without tensors */
	union any_args args;
	struct operand_list list; /* of args */
	char names[MAX_OPERANDS][NAME_BYTES];
	int n_bound;
	struct binding bound[MAX_OPERANDS];
	void *scratch[MAX_OPERANDS]; /* as list */
	size_t scratch_bytes[MAX_OPERANDS];
};

static const struct binding *binding_of(const struct blocks_operation *o,
                                        const struct operand *operand)
{
	for (int i = 0; i < o->n_bound; i++)
		if (operand_is(operand, o->bound[i].name))
			return &o->bound[i];
	return NULL;
}

static void set_operand(struct operand *operand, const struct binding *binding)
{
	if (binding->strided)
		operand_set_strided(operand, binding->data, binding->stride);
	else
		operand_set(operand, binding->data);
}

/*
 * Gives every operand its tensor. Which operands there are depends on those that are bound: they
 * are found one after the other, and then all set at once, because a description takes for absent
 * what has not come yet (without a norm, norm_linear's x_norm is x).
 */
static void place_operands(struct blocks_operation *o)
{
	bool again = true;

	o->args = o->sized;
	operation_describe(o->id, &o->args, &o->list);
	while (again) {
		again = false;
		for (int i = 0; i < o->list.count && !again; i++) {
			const struct binding *b = binding_of(o, &o->list.operand[i]);

			again = b && b->data && !operand_data(&o->list.operand[i]);
			if (again)
				set_operand(&o->list.operand[i], b);
		}
		operation_describe(o->id, &o->args, &o->list);
	}
	o->args = o->sized;
	for (int i = 0; i < o->list.count; i++) {
		const struct binding *b = binding_of(o, &o->list.operand[i]);

		if (b && b->data)
			set_operand(&o->list.operand[i], b);
	}
	operation_describe(o->id, &o->args, &o->list);
}

enum blocks_status blocks_operation_open(struct blocks_device *device, const char *text,
                                         struct blocks_operation **operation)
{
	struct request r;

	*operation = NULL;
	TRY_BLOCKS(read_request(&r, text));
	struct blocks_operation *o = calloc(1, sizeof *o);
	if (!o)
		return blocks_status_of(status_set(STATUS_OOM, "no memory for an operation"));
	o->device = device;
	o->id = r.id;
	o->choice = device->choice;
	operation_describes(r.id)->size(&o->sized, &r.sizes, &r.form);
	const struct field *chunk = find_field(r.id, "chunk");
	if (chunk)
		set_field(&o->sized, chunk, 0);
	for (int i = 0; i < r.n_fields; i++)
		set_field(&o->sized, r.fields[i].field, r.fields[i].value);
	place_operands(o);
	*operation = o;
	return BLOCKS_OK;
}

void blocks_operation_close(struct blocks_operation *operation)
{
	if (!operation)
		return;
	for (int i = 0; i < MAX_OPERANDS; i++)
		blocks_release(operation->device, operation->scratch[i]);
	free(operation);
}

const char *blocks_operation_name(int i)
{
	return i < 0 || i >= OP_COUNT ? NULL : operation_name((enum operation)i);
}

static enum blocks_role role_of(const struct operand *operand)
{
	switch (operand->role) {
	case ROLE_STATE:
		return BLOCKS_STATE;
	case ROLE_SCRATCH:
		return BLOCKS_SCRATCH;
	case ROLE_UNREAD:
		return BLOCKS_UNREAD;
	default:
		return operand_is_written(operand) ? BLOCKS_OUTPUT : BLOCKS_INPUT;
	}
}

enum blocks_status blocks_operation_operand(struct blocks_operation *operation, int i,
                                            struct blocks_operand *operand)
{
	if (i < 0 || i >= operation->list.count)
		return blocks_status_of(status_set(STATUS_INVALID, "%s has %d operands",
		                                   operation_name(operation->id),
		                                   operation->list.count));
	const struct operand *o = &operation->list.operand[i];
	const size_t length = strcspn(o->name, "|");
	struct blocks_operand found = {
	        .name = operation->names[i],
	        .role = role_of(o),
	        .dtype = (enum blocks_dtype)operand_dtype(o, operation->device->device),
	        .optional = o->optional,
	        .strided = o->view || o->row,
	        .data = operand_data(o),
	};

	memset(operation->names[i], 0, NAME_BYTES);
	memcpy(operation->names[i], o->name, length < NAME_BYTES ? length : NAME_BYTES - 1);
	memcpy(found.shape, o->size, sizeof found.shape);
	memcpy(found.stride, o->stride, sizeof found.stride);
	blocks_fill(operand, &found, sizeof found);
	return BLOCKS_OK;
}

enum blocks_status blocks_operation_bind(struct blocks_operation *operation, const char *name,
                                         void *data, const int64_t stride[BLOCKS_DIMS])
{
	struct binding *b = operation->bound;
	const struct binding *end = b + operation->n_bound;

	while (b < end && strcmp(b->name, name) != 0)
		b++;
	if (b == operation->bound + MAX_OPERANDS || strlen(name) >= NAME_BYTES)
		return blocks_status_of(status_set(STATUS_INVALID, "%s has no operand '%.64s'",
		                                   operation_name(operation->id), name));
	operation->n_bound += b == end;
	*b = (struct binding){.data = data, .strided = stride != NULL};
	memcpy(b->name, name, strlen(name));
	if (stride)
		memcpy(b->stride, stride, sizeof b->stride);
	place_operands(operation);
	return BLOCKS_OK;
}

/* ---- running ---- */

/* STATUS_INVALID with a binding that is no operand's. */
static enum status check_names(struct blocks_operation *o)
{
	for (int i = 0; i < o->n_bound; i++)
		if (o->bound[i].data && !operand_find(&o->list, o->bound[i].name))
			return status_set(STATUS_INVALID,
			                  "%s has no operand '%s' beside those that are bound",
			                  operation_name(o->id), o->bound[i].name);
	return STATUS_OK;
}

/* Whether an operand lies as its binding wants it: one that has no strides of its own is dense, and
 * some share theirs. */
static enum status check_strides(const struct blocks_operation *o, const struct operand *operand)
{
	const struct binding *b = binding_of(o, operand);
	const char *wrong = NULL;

	for (int i = 0; i < OPERAND_DIMS && b && b->strided; i++)
		if (operand->size[i] > 1 && operand->stride[i] != b->stride[i])
			wrong = i == OPERAND_DIMS - 1 ? "last dimension has to be contiguous"
			                              : "strides are not its own to choose";
	if (!wrong)
		return STATUS_OK;
	return status_set(STATUS_INVALID, "%s: %s: its %s", operation_name(o->id), b->name, wrong);
}

static enum status give_scratch(struct blocks_operation *o, int i)
{
	struct device *device = o->device->device;
	struct operand *operand = &o->list.operand[i];
	const size_t bytes =
	        (size_t)operand_count(operand) * dtype_size(operand_dtype(operand, device));

	if (o->scratch_bytes[i] < bytes) {
		blocks_release(o->device, o->scratch[i]);
		o->scratch[i] = NULL;
		o->scratch_bytes[i] = 0;
		TRY(device_allocate(device, bytes, &o->scratch[i]));
		o->scratch_bytes[i] = bytes;
	}
	operand_set(operand, o->scratch[i]);
	return STATUS_OK;
}

static enum status check_operands(struct blocks_operation *o)
{
	TRY(check_names(o));
	for (int i = 0; i < o->list.count; i++) {
		struct operand *operand = &o->list.operand[i];

		if (!operand_data(operand) && operand->role == ROLE_SCRATCH)
			TRY(give_scratch(o, i));
		if (operand_data(operand))
			TRY(check_strides(o, operand));
		else if (!operand->optional && operand->role != ROLE_UNREAD)
			return status_set(STATUS_INVALID, "%s: the operand '%.*s' is missing",
			                  operation_name(o->id), (int)strcspn(operand->name, "|"),
			                  operand->name);
	}
	return STATUS_OK;
}

static enum status grow_workspace(struct blocks_device *device, size_t bytes)
{
	if (bytes <= device->workspace_bytes)
		return STATUS_OK;
	TRY(device_synchronize(device->device));
	blocks_release(device, device->workspace);
	device->workspace = NULL;
	device->workspace_bytes = 0;
	TRY(device_allocate(device->device, bytes, &device->workspace));
	device->workspace_bytes = bytes;
	return STATUS_OK;
}

/* Plans the operation for its workspace, then runs it. */
static enum status run(struct blocks_operation *o)
{
	struct kernel_plan plan = {0};
	struct context ctx = {.device = o->device->device, .choice = o->choice, .plan = &plan};

	TRY(check_operands(o));
	TRY(kernel_run(&ctx, o->id, &o->args));
	TRY(grow_workspace(o->device, plan.workspace_bytes));
	ctx.plan = NULL;
	ctx.workspace = o->device->workspace;
	ctx.workspace_bytes = o->device->workspace_bytes;
	return kernel_run(&ctx, o->id, &o->args);
}

enum blocks_status blocks_operation_run(struct blocks_operation *operation)
{
	return blocks_status_of(run(operation));
}
