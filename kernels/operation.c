/* Operands, and what follows from them alone. */
#include "kernels/operation.h"

#include <stdio.h>
#include <string.h>

static const struct description *const descriptions[OP_COUNT] = {
#define X(constant, name) [OP_##constant] = &name##_description,
        OPERATIONS(X)
#undef X
};

const struct description *operation_describes(enum operation id)
{
	return descriptions[id];
}

const char *operation_name(enum operation operation)
{
	return operation < OP_COUNT ? descriptions[operation]->name : "unknown";
}

void operation_describe(enum operation id, void *args, struct operand_list *list)
{
	*list = (struct operand_list){0};
	descriptions[id]->describe(args, list);
}

/* ---- variants ---- */

const struct operation_form *operation_forms(enum operation id)
{
	static const struct operation_form none[] = {{0}};
	const struct description *d = descriptions[id];

	if (d->forward != NO_OPERATION)
		d = descriptions[d->forward];
	return d->variants ? d->variants : none;
}

void form_name(enum operation id, const struct operation_form *variant, char *name, size_t size)
{
	static const char forward[] = "_forward", backward[] = "_backward";
	const struct description *d = descriptions[id];
	const char *base = variant && variant->name ? variant->name : d->name;
	size_t length = strlen(base), suffix = sizeof forward - 1;

	if (d->forward == NO_OPERATION || base == d->name) {
		snprintf(name, size, "%s", base);
		return;
	}
	if (length > suffix && strcmp(base + length - suffix, forward) == 0)
		length -= suffix;
	snprintf(name, size, "%.*s%s", (int)length, base, backward);
}

/* ---- operands ---- */

/* Whether `name` is one of the names in `list`, which '|' separates. */
static bool has_name(const char *list, const char *name)
{
	const size_t length = strlen(name);

	while (list) {
		if (strncmp(list, name, length) == 0 && (list[length] == '|' || !list[length]))
			return true;
		list = strchr(list, '|');
		list = list ? list + 1 : NULL;
	}
	return false;
}

bool operand_is(const struct operand *operand, const char *name)
{
	return has_name(operand->name, name);
}

struct operand *operand_find(struct operand_list *list, const char *name)
{
	for (int i = 0; i < list->count; i++)
		if (operand_is(&list->operand[i], name))
			return &list->operand[i];
	return NULL;
}

/* The pointers have different types; copied as bytes, none is read as another. */
void *operand_data(const struct operand *operand)
{
	void *data;

	memcpy(&data, operand->location, sizeof data);
	return data;
}

void operand_set_strided(struct operand *operand, void *data, const int64_t stride[OPERAND_DIMS])
{
	memcpy(operand->location, &data, sizeof data);
	memcpy(operand->stride, stride, sizeof operand->stride);
	if (operand->view)
		*operand->view = (struct view){data, stride[0], stride[1], stride[2]};
	if (operand->row && data)
		*operand->row = stride[2];
}

void operand_set(struct operand *operand, void *data)
{
	const int64_t *n = operand->size;
	const int64_t dense[OPERAND_DIMS] = {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1};

	operand_set_strided(operand, data, dense);
}

int64_t operand_count(const struct operand *operand)
{
	const int64_t *n = operand->size;

	return n[0] * n[1] * n[2] * n[3];
}

int64_t operand_span(const struct operand *operand)
{
	int64_t last = 0;

	for (int i = 0; i < OPERAND_DIMS; i++)
		last += (operand->size[i] - 1) * operand->stride[i];
	return operand_count(operand) > 0 ? last + 1 : 0;
}

enum dtype operand_dtype(const struct operand *operand, const struct device *device)
{
	return operand->element == ELEMENT_INT32  ? DTYPE_I32
	       : operand->element == ELEMENT_FP32 ? device->wide
	                                          : device->activation;
}

bool operand_is_written(const struct operand *operand)
{
	return operand->role == ROLE_STATE || operand->role == ROLE_OUTPUT ||
	       operand->role == ROLE_GRADIENT;
}

bool operand_is_position(const struct operand *operand)
{
	return operand->element == ELEMENT_INT32 && operand_count(operand) == 1 &&
	       operand_is_read(operand);
}

bool operand_is_read(const struct operand *operand)
{
	return operand->role == ROLE_STATE || operand->role == ROLE_INPUT ||
	       operand->role == ROLE_PARAMETER;
}

/* ---- for describe() ---- */

static struct operand *add(struct operand_list *list, enum role role, enum element element,
                           const char *name, const struct dimension dims[OPERAND_DIMS])
{
	struct operand *o = &list->operand[list->count++];

	*o = (struct operand){.name = name, .role = role, .element = element, .scale = 1};
	for (int i = 0; i < OPERAND_DIMS; i++) {
		o->size[i] = dims[i].size;
		o->axis[i] = dims[i].axis;
		if (dims[i].axis != AXIS_INNER)
			o->apart |= ALONG(dims[i].axis);
	}
	o->apart &= list->apart;
	o->read = operand_is_read(o) ? (double)operand_count(o) : 0;
	o->written = operand_is_written(o) ? (double)operand_count(o) : 0;
	return o;
}

struct operand *add_view(struct operand_list *list, enum role role, const char *name,
                         struct view *view, struct dimension b, struct dimension t,
                         struct dimension h, struct dimension d)
{
	struct operand *o = add(list, role, ELEMENT_ACTIVATION, name,
	                        (struct dimension[OPERAND_DIMS]){b, t, h, d});
	const int64_t stride[OPERAND_DIMS] = {view->batch, view->token, view->head, 1};

	o->location = &view->data;
	o->view = view;
	memcpy(o->stride, stride, sizeof stride);
	/* A head stride of 0: what all heads share is read once. */
	if (view->head == 0 && view->token > 0 && h.size > 0)
		o->read /= (double)h.size;
	return o;
}

struct operand *add_array(struct operand_list *list, enum role role, enum element element,
                          const char *name, void *location, struct dimension a, struct dimension b,
                          struct dimension c, struct dimension d)
{
	struct operand *o =
	        add(list, role, element, name, (struct dimension[OPERAND_DIMS]){a, b, c, d});
	const int64_t stride[OPERAND_DIMS] = {b.size * c.size * d.size, c.size * d.size, d.size, 1};

	o->location = location;
	memcpy(o->stride, stride, sizeof stride);
	return o;
}

struct operand *add_rows(struct operand_list *list, enum role role, const char *name,
                         void *location, int64_t *row, struct dimension n, struct dimension width)
{
	struct operand *o = add_array(list, role, ELEMENT_ACTIVATION, name, location, INNER(1),
	                              INNER(1), n, width);

	o->row = row;
	if (row)
		o->stride[2] = *row;
	return o;
}

struct operand *add_vector(struct operand_list *list, enum role role, const char *name,
                           void *location, struct dimension n)
{
	return add_array(list, role, ELEMENT_FP32, name, location, INNER(1), INNER(1), INNER(1), n);
}

struct operand *add_floats(struct operand_list *list, enum role role, const char *name,
                           void *location, struct dimension a, struct dimension b,
                           struct dimension c)
{
	return add_array(list, role, ELEMENT_FP32, name, location, INNER(1), a, b, c);
}

struct operand *add_position(struct operand_list *list, void *location, int64_t capacity)
{
	return integers(add_vector(list, ROLE_INPUT, "position", location, INNER(1)), capacity);
}

void forward_ends(struct operand_list *list, const char *reads)
{
	for (int i = 0; i < list->count; i++) {
		struct operand *o = &list->operand[i];
		char first[32];

		snprintf(first, sizeof first, "%.*s", (int)strcspn(o->name, "|"), o->name);
		o->written = 0;
		o->alias = o->base = NULL;
		if (!operand_is_written(o))
			continue;
		o->from_forward = has_name(reads, first);
		o->role = o->from_forward ? ROLE_INPUT : ROLE_UNREAD;
		o->optional = !o->from_forward && o->optional;
		o->read = o->from_forward ? (double)operand_count(o) : 0;
	}
}

/* ---- the work of an operation ---- */

struct cost kernel_cost(const struct device *device, enum operation operation, const void *args)
{
	const struct description *d = descriptions[operation];
	union any_args copy;
	struct operand_list list;
	struct cost cost = {.flops = d->flops(args)};

	memcpy(&copy, args, d->args_size);
	operation_describe(operation, &copy, &list);
	for (int i = 0; i < list.count; i++) {
		const struct operand *o = &list.operand[i];
		const double size = (double)dtype_size(operand_dtype(o, device));

		if (!operand_data(o))
			continue;
		cost.bytes_read += size * o->read;
		cost.bytes_written += size * o->written;
	}
	return cost;
}
